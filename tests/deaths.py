"""Run a small training, and let it die (os._exit) or find the disk full at every write, flush and rename of its saves.

Each death is followed by the same command again, which must end with the same bits as a run that was never disturbed. One
process forks all the runs, so that torch is imported once: python tests/deaths.py FOLDER [train.py's flags]
"""
import errno
import hashlib
import os
import shutil
import sys
from pathlib import Path

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model  # noqa: E402
import train  # noqa: E402

FLAGS = ["--max_steps", "3", "--save_every", "2", "--dropout", "0.1"]


def disturb(moment: int, kind: str):
    """Count the I/O calls of the saves; the one with number `moment` dies, or raises ENOSPC after half of a write."""
    count = [0]

    def wrap(owner, name, halves):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            count[0] += 1
            if count[0] - 1 == moment:
                if halves:  # a file that was written in part
                    target = next(Path(a) for a in args if isinstance(a, str | os.PathLike))
                    target.write_bytes(b"half")
                if kind == "exit":
                    os._exit(9)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)
        setattr(owner, name, wrapped)

    wrap(os, "replace", False)
    wrap(os, "fsync", False)
    wrap(torch, "save", True)
    wrap(model, "save_file", True)
    assert model.save_file is not safetensors.torch.save_file
    return count


def fork(out_dir: Path, flags: list[str], moment: int = -1, kind: str = "exit") -> int:
    """Train in a child process; its exit status: 0 finished, 9 died, 3 one clear sentence about the disk, else a fault."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sys.stdout = sys.stderr = open(out_dir.with_suffix(".log"), "a")  # noqa: SIM115
    status = 1
    try:
        torch.set_num_threads(1)
        count = disturb(moment, kind)
        train.main([*flags, *FLAGS, "--out_dir", str(out_dir)])
        out_dir.with_suffix(".count").write_text(str(count[0]))
        status = 0
    except ValueError as error:
        print(error)
        status = 3 if "No space left on device" in str(error) and "cannot write" in str(error) else 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def digest(folder: Path) -> dict:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.suffix in (".safetensors", ".json", ".jsonl")}


def main(folder: Path, flags: list[str]):
    assert fork(folder / "whole", flags) == 0, (folder / "whole.log").read_text()
    want, moments = digest(folder / "whole"), int((folder / "whole.count").read_text())
    for moment in range(moments):
        for kind, expected in (("exit", 9), ("full", 3)):
            out_dir = folder / f"{kind}{moment}"
            assert fork(out_dir, flags, moment, kind) == expected, (moment, kind, out_dir.with_suffix(".log").read_text())
            assert fork(out_dir, flags) == 0, (moment, kind, out_dir.with_suffix(".log").read_text())
            assert digest(out_dir) == want, (moment, kind)
            shutil.rmtree(out_dir)
    print(f"{moments} moments of death, twice each")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
