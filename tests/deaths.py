"""Let a small training die (os._exit), or find the disk full, at every write, flush and rename of
its files, and go on.

One run forks a child for each of these moments, in a copy of its folder. The child dies there, in
the middle of a write if it is one; then the same command in the copy must end with the same bits as
the run itself, which is never disturbed. What several deaths left behind alike, to the byte, goes
on once for all of them. All processes are forks of one, which has imported everything: python
tests/deaths.py FOLDER [train.py's flags]
"""

import errno
import hashlib
import itertools
import os
import re
import shutil
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # every optimizer imports it, which takes longer than the training

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import loop  # noqa: E402
import shard  # noqa: E402
import train  # noqa: E402
import weights  # noqa: E402

FLAGS = [
    "--max_steps",
    "3",
    "--save_every",
    "2",
    "--dropout",
    "0.1",
    "--device",
    "cpu",
    "--out_dir",
    "run",
]
DEATHS = {"exit": 9, "full": 3}  # kind -> exit status


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die(kind: str, copy: Path, target: Path | None):
    """In a forked child: go on in `copy`, write half of `target`, and die."""
    os.chdir(copy)
    if target:
        with open(target, "ab") as file:
            file.write(b"half")
    if kind == "exit":
        os._exit(DEATHS[kind])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disturb():
    """From now on this process, in folder/whole, leaves folder/exit0, folder/full0, folder/exit1,
    ... behind.
    """
    moments = itertools.count()

    def wrap(owner, name, halves=False):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            target = (
                next(Path(a) for a in args if isinstance(a, str | os.PathLike)) if halves else None
            )
            moment = next(moments)
            for kind, status in DEATHS.items():
                copy = Path.cwd().with_name(f"{kind}{moment}")
                shutil.copytree(Path.cwd(), copy)
                sys.stdout.flush()
                pid = os.fork()
                if not pid:
                    die(kind, copy, target)
                assert wait(pid) == status, (kind, moment, (copy / "log.txt").read_text())
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    loop.open = open  # what appends to the log
    writers = (
        (torch, "save"),
        (weights, "save_file"),
        (shard, "save_file"),
        (Path, "write_text"),
        (Path, "write_bytes"),
        (loop, "open"),
    )
    for owner, name in writers:
        wrap(owner, name, halves=True)
    for name in ("fsync", "replace"):
        wrap(os, name)


def run(folder: Path, flags: list[str], prepare=lambda: None) -> int:
    """Train in folder/run, in a child: 0 finished, 3 one clear sentence about the disk, else a
    fault, see log.txt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if pid := os.fork():
        return wait(pid)
    os.chdir(folder)
    sys.stdout = sys.stderr = open("log.txt", "a")  # noqa: SIM115
    status = 1
    try:
        torch.set_num_threads(1)
        os.fsync = lambda file: (
            None
        )  # processes die here, not the machine, so waiting for the disk changes nothing
        prepare()
        train.main([*flags, *FLAGS])
        status = 0
    except ValueError as error:
        status = (
            3 if "No space left on device" in str(error) and "cannot write" in str(error) else 1
        )
    finally:
        if status == 1:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)


def digest(folder: Path) -> dict[str, str]:
    """Every file below it -> its hash; names of temporary files without the process that wrote
    them.
    """
    return {
        re.sub(r"\.tmp\d+$", ".tmp", str(file.relative_to(folder))): hashlib.sha256(
            file.read_bytes()
        ).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def for_users(folder: Path) -> dict[str, str]:
    return {
        k: v
        for k, v in digest(folder).items()
        if Path(k).suffix in (".safetensors", ".json", ".jsonl")
    }


def main(folder: Path, flags: list[str]):
    assert run(folder / "whole", flags, disturb) == 0, (folder / "whole" / "log.txt").read_text()
    want, deaths, left = for_users(folder / "whole"), 0, set()
    for copy in (folder / f"{kind}{moment}" for moment in itertools.count() for kind in DEATHS):
        if not copy.exists():
            break
        deaths += 1
        before = frozenset(digest(copy / "run").items())
        if before not in left:
            status = run(copy, flags)
            assert status == 0, (copy.name, status, (copy / "log.txt").read_text())
            assert for_users(copy) == want, copy.name
        left.add(before)
        shutil.rmtree(copy)
    print(f"{deaths} deaths, which left {len(left)} different folders")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
