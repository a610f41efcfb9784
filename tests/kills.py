"""Kill trainings at random moments and inside of saves, go on, and compare every file.

    # 100 kills, then the other situations: some ten minutes
    python tests/kills.py FOLDER
    # other moments
    python tests/kills.py FOLDER --kills 300 --seed 1
    # some of the situations alone
    python tests/kills.py FOLDER --kills 0 --situations sigint,full_disk

FOLDER is made, and is removed again if all went well. The trainings are train.py, finetune.py and
train.py --recipe llava_demo with tiny models on the built-in scenes: 20 steps, a save after every
second one. Each runs with 0 and with 2 workers, as one process and as two, of which one is killed.
Most are forks of a server that has imported everything (which else takes longer than the training);
some are `python` and `torchrun` as a user types them.

A chain is a run that is killed a few times, by SIGKILL, and each time started again by the same
command. In the end all files must be those of a run that nobody disturbed: all bytes are equal, and
of training_state.pt all values. Files of the user's own that lie in the folder must still be there.

The situations are other ways to be disturbed: signals, a worker that dies, two runs in one folder,
a full disk, a folder that is read-only, clocks that run backwards, locks of dead processes, folders
that are moved. Each must end in one sentence, and the same command must go on to the same bits.

Each kill is a line: the case, the step that the log had reached, the step the run had gone on from,
the step that was saved, and whether it hit inside the save of a file. The end is a count, "100
kills: 100 resumed to the same bits". If that is not so, the exit status is 1 and FOLDER stays, with
what was printed in it. On a full machine a FOLDER in /dev/shm saves time.
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # every optimizer imports it, which takes longer than the training
import tqdm.std
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path.insert(0, str(ROOT))
import finetune  # noqa: E402
import train  # noqa: E402
import train_llava  # noqa: E402, F401
from world import one_sentence  # noqa: E402

PATIENCE = 120  # seconds that anything may take on a busy machine

# ---------------------------------------------------------------- the trainings
SCRIPTS = {"train.py": train.main, "finetune.py": finetune.main}
MAX_STEPS = 20
SHORT = (
    f"--device cpu --max_steps {MAX_STEPS} --save_every 2 --log_every 1 --eval_every 5 "
    "--batch_size 4 --micro_batch_size 2"
).split()
TINY_TOWERS = (
    "--image_size 16 --patch_size 8 --vision_width 16 --vision_layers 2 --vision_heads 2 "
    "--text_width 16 --text_layers 2 --text_heads 2 --text_mlp_width 32 --hidden_size 16 "
    "--num_heads 2 --num_layers 2 --managed_layers_text 2 --managed_layers_image 2 --dropout 0.1"
).split()
TINY_LLAVA = (
    "--image_size 32 --patch_size 16 --vision_width 24 --vision_layers 3 --vision_heads 2 "
    "--vision_mlp_width 32 --hidden_size 32 --num_layers 3 --num_heads 2 --mlp_width 32 "
    "--managed_layers 1,2 --inject_layers 0,1"
).split()
# all folders of runs lie side by side, so this is found from each of them
INIT = "../whole_train_1/run"
TRAININGS = {  # name -> the command, less --num_workers and --out_dir
    "train": ["train.py", *TINY_TOWERS, *SHORT, "--eval_size", "8"],
    "finetune": [
        *("finetune.py", "--task", "vqav2", "--data", "demo", "--init", INIT, "--dropout", "0.1"),
        *(*SHORT, "--eval_size", "8", "--learning_rate", "2e-3"),
    ],
    "llava_demo": ["train.py", "--recipe", "llava_demo", *TINY_LLAVA, *SHORT, "--eval_size", "8"],
}


# to start and to end: its baseline takes no text of thousands of rows
QUICKEST = "llava_demo"


@dataclass(frozen=True)
class Case:
    """Which training, and how it is run."""

    training: str = QUICKEST  # a key of TRAININGS
    workers: int = 0
    processes: int = 1
    is_program: bool = False  # a new interpreter, or torchrun, and no fork of the server

    def __str__(self) -> str:
        way = "fork" if self.processes == 1 else f"{self.processes} forks"
        if self.is_program:
            way = "python" if self.processes == 1 else f"torchrun {self.processes}"
        return f"{self.training}, {self.workers} workers, {way}"

    def command(self, flags: tuple[str, ...] = ()) -> list[str]:
        """The script and its flags. The run is in the folder `run` of the current one."""
        own = TRAININGS[self.training]
        return [*own, "--num_workers", str(self.workers), "--out_dir", "run", *flags]


FORKED_CASES = [
    Case(training, workers, processes)
    for training in TRAININGS
    for processes in (1, 2)
    for workers in (0, 2)
]
PROGRAM_CASES = [
    Case("train", 2, 1, is_program=True),
    Case("finetune", 0, 1, is_program=True),
    Case("llava_demo", 2, 1, is_program=True),
    Case("train", 0, 2, is_program=True),
    Case("finetune", 2, 2, is_program=True),
]


# ---------------------------------------------------------------- processes
def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{seconds} s were not enough for {what}"
        time.sleep(0.002)


def children_of(process_id: int) -> list[int]:
    """The processes whose parent it is."""
    children = []
    for folder in Path("/proc").iterdir():
        # a process may end meanwhile
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                # "pid (name) state parent ..."; the name may hold anything
                after_the_name = (folder / "stat").read_text().rpartition(")")[2]
                if int(after_the_name.split()[1]) == process_id:
                    children.append(int(folder.name))
    return sorted(children)


def rank_of(process_id: int) -> int | None:
    """The RANK that torchrun gave a process."""
    with contextlib.suppress(OSError):
        for variable in Path(f"/proc/{process_id}/environ").read_bytes().split(b"\0"):
            name, _, value = variable.partition(b"=")
            if name == b"RANK":
                return int(value)
    return None


def start_server() -> None:
    """Start the server of the forks, unless it runs. It imports this file, and so all scripts."""
    # a shell may have started this process with Ctrl-C ignored, which children would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    forkserver.set_forkserver_preload(["kills"])
    former = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(TESTS)  # the server looks for its preloads there
    forkserver.ensure_running()
    if former is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = former


def wait_as_for_a_disk(file: Any) -> None:
    """Instead of os.fsync. A disk takes some milliseconds, in memory it takes none.

    Processes die here, and not the machine, so that nothing has to be on the disk.
    """
    time.sleep(0.01)


def train_in_fork(
    command: list[str],
    folder: Path,
    rank: int,
    environment: dict[str, str],
    prepare: Callable[[], None] | None,
) -> None:
    """In a child: what `python train.py ...` does in `folder`."""
    # a group of its own, to which signals can be sent as a terminal sends them
    os.setpgid(0, 0)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    # a child of the server would start its DataLoader workers by it too; `python` forks them
    multiprocessing.set_start_method("fork", force=True)
    os.fsync = wait_as_for_a_disk  # type: ignore[assignment]
    sys.argv = command
    if prepare is not None:
        prepare()
    one_sentence(SCRIPTS[command[0]])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Forks:
    """A training in forks of the server. Several are one run, as under torchrun."""

    def __init__(
        self,
        case: Case,
        folder: Path,
        prepare: Callable[[], None] | None = None,
        flags: tuple[str, ...] = (),
    ):
        self.folder = folder
        self.statuses: list[int] = []
        self.processes: list[Any] = []
        context = multiprocessing.get_context("forkserver")
        port = free_port()
        for rank in range(case.processes):
            environment: dict[str, str] = {}
            if case.processes > 1:
                environment = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(case.processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            arguments = (case.command(flags), folder, rank, environment, prepare)
            process = context.Process(target=train_in_fork, args=arguments)
            process.start()
            self.processes.append(process)

    def process_ids(self) -> list[int]:
        """Those that train, by rank."""
        return [process.pid for process in self.processes]

    def is_over(self) -> bool:
        """Whether one of them has ended: then the run cannot go on."""
        return any(process.exitcode is not None for process in self.processes)

    def send(self, number: int, to_group: bool = False) -> None:
        """A signal to all of them, or also to their workers."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                if to_group:
                    os.killpg(process.pid, number)
                else:
                    os.kill(process.pid, number)

    def wait(self) -> list[int]:
        """Their exit statuses, when all have ended; negative: the signal that ended one."""
        # as torchrun does it: if one fails, the others are asked to end
        wait_until(self.is_over, f"the end of {self.folder}")
        for process in self.processes:
            process.join(0.5 if len(self.processes) > 1 else None)
        if any(process.exitcode for process in self.processes):
            self.send(signal.SIGTERM)
        for process in self.processes:
            process.join(PATIENCE)
            if process.exitcode is None:
                self.send(signal.SIGKILL, to_group=True)
                raise AssertionError(f"a process does not end; see {self.folder}")
        self.statuses = [process.exitcode for process in self.processes]
        return self.statuses

    def output(self) -> str:
        """All that they have printed."""
        files = [*self.folder.glob("out*.txt"), *self.folder.glob("err*.txt")]
        return "".join(file.read_text(errors="replace") for file in sorted(files))


class Program:
    """A training as a user types it: python train.py, or torchrun."""

    def __init__(self, case: Case, folder: Path):
        self.folder = folder
        self.number = case.processes
        command = [sys.executable]
        if self.number > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(self.number)]
        script, *flags = case.command()
        with open(folder / "out0.txt", "w") as out, open(folder / "err0.txt", "w") as err:
            self.process = subprocess.Popen(
                [*command, str(ROOT / script), *flags],
                cwd=folder,
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def process_ids(self) -> list[int]:
        if self.number == 1:
            return [self.process.pid]
        children = children_of(self.process.pid)
        return [child for child in children if rank_of(child) is not None]

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def send(self, number: int, to_group: bool = False) -> None:
        if to_group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def wait(self) -> list[int]:
        try:
            return [self.process.wait(PATIENCE)]
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL, to_group=True)
            raise AssertionError(f"the program does not end; see {self.folder}") from None

    def output(self) -> str:
        files = (self.folder / "out0.txt", self.folder / "err0.txt")
        return "".join(file.read_text(errors="replace") for file in files)


def start(case: Case, folder: Path) -> Forks | Program:
    """Start a training in folder/run."""
    folder.mkdir(exist_ok=True)
    return Program(case, folder) if case.is_program else Forks(case, folder)


# ---------------------------------------------------------------- what lies in the folder of a run
TEMPORARY = re.compile(r"(.+)\.tmp\d+")
NO_RESULT = "run.lock"
USERS_FILES = ("notes.tmp.txt", "mine.tmp1", "sub/training_state.pt.tmp1", "best/photo.png.tmp22")


def plant_users_files(run: Path) -> None:
    """Files that look like ours, in the folder of a run before it begins."""
    for name in USERS_FILES:
        file = run / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"the user's {name}")


def temporary_files(run: Path) -> set[str]:
    """The files that are being written, by what they will be called."""
    names = set()
    for folder in (run, run / "best"):
        if folder.is_dir():
            for name in os.listdir(folder):
                found = TEMPORARY.fullmatch(name)
                if found and not any(name in users for users in USERS_FILES):
                    names.add(found[1])
    return names


def log_mark(run: Path) -> tuple | None:
    """What changes as soon as a command has begun, or gone on, to train."""
    try:
        status = (run / "log.jsonl").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def has_new_log(run: Path, mark: tuple | None) -> bool:
    return log_mark(run) != mark


def logged_step(run: Path) -> int:
    """The step of the last row of the log; 0 if there is none."""
    file = run / "log.jsonl"
    text = file.read_text() if file.exists() else ""
    whole_lines = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(whole_lines[-1])["step"] if whole_lines else 0


def load_state(run: Path) -> dict | None:
    """training_state.pt, which is a whole one at any moment; None before the first save."""
    file = run / "training_state.pt"
    if not file.exists():
        return None
    return torch.load(file, map_location="cpu", weights_only=True)


def saved_step(run: Path) -> int:
    state = load_state(run)
    return state["step"] if state is not None else 0


def same_values(first: Any, second: Any) -> bool:
    """Whether two training states hold the same tensors and values, to the bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        same_keys = list(first) == list(second)
        return same_keys and all(same_values(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        same_length = len(first) == len(second)
        return same_length and all(map(same_values, first, second))
    return first == second


def files_below(run: Path) -> dict[str, Path]:
    """All files of the run, by their names: without its lock, and without the user's own."""
    files = {}
    for file in sorted(run.rglob("*")):
        name = str(file.relative_to(run))
        if file.is_file() and name not in (NO_RESULT, *USERS_FILES):
            files[name] = file
    return files


def lost_users_files(run: Path) -> list[str]:
    """Those of plant_users_files that are not as they were."""
    lost = []
    for name in USERS_FILES:
        file = run / name
        if not file.exists() or file.read_text() != f"the user's {name}":
            lost.append(f"the user's {name} is not as it was")
    return lost


def differences(whole: Path, resumed: Path) -> list[str]:
    """In what a run that was disturbed differs from the one that was not."""
    ours = files_below(resumed)
    theirs = files_below(whole)
    found = [f"{name} is missing" for name in theirs if name not in ours]
    for name, file in ours.items():
        if name not in theirs:
            found.append(f"{name} is left over")
        elif name == "training_state.pt":
            if not same_values(load_state(whole), load_state(resumed)):
                found.append(f"{name} holds other values")
        elif file.read_bytes() != theirs[name].read_bytes():
            found.append(f"{name} has other bytes")
    return found


def place_of_death(run: Path) -> str:
    """Whether a death was inside of a save, as far as the files tell."""
    left = temporary_files(run)
    if left:
        return f"inside the save of {', '.join(sorted(left))}"
    state = load_state(run)
    if state is None:
        return "before the first save"
    file = run / "model.safetensors"
    weights = load_file(file) if file.exists() else {}
    is_behind = any(not torch.equal(state["model"][name], weights[name]) for name in weights)
    if is_behind or not weights:
        return "between two files of a save"
    return "between two saves"


def check_no_traceback(run: Forks | Program, was_killed: bool = False) -> None:
    """A traceback names files of ours, unless torch or torchrun prints one of its own.

    was_killed: by SIGKILL. Then torchrun does so, and threads of workers that lose their parent.
    """
    text = run.output()
    is_ours = f'File "{ROOT}' in text or "Exception ignored" in text
    is_torchrun = isinstance(run, Program) and run.number > 1
    if was_killed or is_torchrun:
        assert not is_ours, f"a traceback:\n{text}"
    else:
        assert "Traceback" not in text, f"a traceback:\n{text}"


# ---------------------------------------------------------------- runs that nobody disturbs
class Bench:
    """The folder of all runs. Those that nobody disturbs are made when they are first needed."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[Case, tuple[float, float]] = {}  # until it trains, of the training
        self.number = 0
        start_server()

    def whole(self, case: Case) -> Path:
        """The run of this training by as many processes, without workers, from a fork."""
        if case.training == "finetune":
            self.whole(Case("train"))  # it goes on from there
        case = Case(case.training, 0, case.processes)
        folder = self.folder / f"whole_{case.training}_{case.processes}"
        if case not in self.seconds:
            shutil.rmtree(folder, ignore_errors=True)
            began = time.monotonic()
            run = start(case, folder)
            wait_until(lambda: log_mark(folder / "run") or run.is_over(), "the first step")
            trains = time.monotonic()
            assert set(run.wait()) == {0}, f"{case} fails by itself:\n{run.output()}"
            self.seconds[case] = (trains - began, time.monotonic() - trains)
        return folder / "run"

    def seconds_of(self, case: Case) -> tuple[float, float]:
        """How long the whole run took until it trained, and from then on."""
        self.whole(case)
        return self.seconds[Case(case.training, 0, case.processes)]

    def new_folder(self, name: str) -> Path:
        self.number += 1
        folder = self.folder / f"{name}_{self.number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def half(self, name: str) -> Path:
        """A new folder with the first half of a run, which was killed there."""
        source = self.folder / "half"
        if not source.exists():
            source.mkdir()
            run_until(source, lambda: saved_step(source / "run") >= 10)
        folder = self.new_folder(name)
        shutil.copytree(source, folder, dirs_exist_ok=True)
        return folder

    def finish(
        self,
        folder: Path,
        case: Case = Case(),
        prepare: Callable[[], None] | None = None,
        name: str = "run",
    ) -> None:
        """The same command goes on, to the same bits."""
        run = Forks(dataclasses.replace(case, is_program=False), folder, prepare)
        statuses = run.wait()
        assert set(statuses) == {0}, f"it does not go on: {statuses}\n{run.output()}"
        check_no_traceback(run)
        found = differences(self.whole(case), folder / name)
        assert not found, f"{folder}: {'; '.join(found)}"


# ---------------------------------------------------------------- kills
@dataclass(frozen=True)
class Kill:
    """When a process is killed, and which one."""

    when: str  # start: before it trains; moment: while it trains; save: inside of a save
    part: float  # of the time until it trains, or of that in which it trains
    files: int  # which of the files that are written from then on
    rank: int


def draw_kill(dice: random.Random, case: Case) -> Kill:
    return Kill(
        when=dice.choices(("start", "moment", "save"), (1, 4, 7))[0],
        part=dice.random(),
        files=dice.randint(1, 10),
        rank=dice.randrange(case.processes),
    )


def wait_for_files(run: Forks | Program, out_dir: Path, number: int) -> None:
    """Until so many temporary files have appeared one after the other, or the run is over."""
    seen = 0
    before: set[str] = set()
    while seen < number and not run.is_over():
        now = temporary_files(out_dir)
        seen += len(now - before)
        before = now
        time.sleep(0.0002)


def strike(run: Forks | Program, kill: Kill, seconds: tuple[float, float], mark: Any) -> bool:
    """Wait for the moment, and kill. Returns False if the run was over before.

    seconds: as Bench.seconds_of. mark: the log_mark before the run was started.
    """
    until_it_trains, of_the_training = seconds
    out_dir = run.folder / "run"
    if kill.when == "start":
        wait_until(lambda: len(run.process_ids()) > kill.rank or run.is_over(), "a process")
        time.sleep(kill.part * until_it_trains)
    else:
        wait_until(lambda: has_new_log(out_dir, mark) or run.is_over(), "training")
    if kill.when == "moment":
        # what is left of it is shorter, if it has gone on; some is kept for the next kills
        left = 1 - saved_step(out_dir) / MAX_STEPS
        time.sleep(0.7 * kill.part * of_the_training * left)
    if kill.when == "save":
        wait_for_files(run, out_dir, kill.files)
    if run.is_over():
        return False
    process_ids = run.process_ids()
    if kill.rank >= len(process_ids):
        return False
    os.kill(process_ids[kill.rank], signal.SIGKILL)
    return True


@dataclass
class Tally:
    """What is counted of all kills."""

    kills: int = 0
    resumed: int = 0  # kills of chains that ended in the same bits
    seconds: float = 0.0
    places: Counter = dataclasses.field(default_factory=Counter)
    cases: Counter = dataclasses.field(default_factory=Counter)
    failures: list[str] = dataclasses.field(default_factory=list)

    def add(self, case: Case, kill: Kill, run: Path, began_at: int) -> None:
        """Count a kill, and print its line."""
        self.kills += 1
        place = place_of_death(run)
        self.places[re.sub(r" of .*", "", place) if "inside" in place else place] += 1
        self.cases[str(case)] += 1
        killed = f"rank {kill.rank} killed" if case.processes > 1 else "killed"
        print(
            f"{self.kills:4d}  {str(case):36s} {killed} at step {logged_step(run):2d}, "
            f"gone on from {began_at:2d}, saved {saved_step(run):2d}: {place}",
            flush=True,
        )

    def summary(self) -> str:
        inside = self.places["inside the save"]
        between = self.places["between two files of a save"]
        return (
            f"{self.kills} kills: {self.resumed} resumed to the same bits\n"
            f"{inside} inside the save of a file, {between} between two files of a save, "
            f"{self.kills - inside - between} elsewhere; {self.seconds:.0f} s"
        )


def run_chain(bench: Bench, case: Case, kills: list[Kill], tally: Tally) -> None:
    """Start a run, kill it, start it again ..., and let it end. Raises AssertionError."""
    seconds = bench.seconds_of(case)
    folder = bench.new_folder("chain")
    out_dir = folder / "run"
    plant_users_files(out_dir)
    hits = 0
    for kill in kills:
        mark = log_mark(out_dir)
        step = saved_step(out_dir)
        run = start(case, folder)
        was_hit = strike(run, kill, seconds, mark)
        statuses = run.wait()
        if not was_hit:
            assert set(statuses) == {0}, f"it ended before it was killed\n{run.output()}"
            break
        check_no_traceback(run, was_killed=True)
        assert saved_step(out_dir) >= step, f"step {step} was saved, and is lost"
        tally.add(case, kill, out_dir, step)
        hits += 1
    # the last time, through the same door as before
    last = start(case, folder)
    statuses = last.wait()
    assert set(statuses) == {0}, f"it does not go on: {statuses}\n{last.output()}"
    check_no_traceback(last)
    found = differences(bench.whole(case), out_dir) + lost_users_files(out_dir)
    assert not found, "; ".join(found)
    tally.resumed += hits
    shutil.rmtree(folder)


def run_kills(
    bench: Bench, number: int, seed: int = 0, cases: list[Case] | None = None, most: int = 8
) -> Tally:
    """`number` kills in chains of at most `most`, over all cases in turn."""
    began = time.monotonic()
    dice = random.Random(seed)
    tally = Tally()
    turn: list[Case] = []
    missed = 0  # chains in a row in which nothing was hit
    while tally.kills < number and missed < 10:
        if not turn:
            turn = list(cases or [*FORKED_CASES, *PROGRAM_CASES])
            dice.shuffle(turn)
        case = turn.pop()
        # a program takes so long to start that it is killed once or twice only
        length = dice.randint(1, 2 if case.is_program else most)
        length = min(length, number - tally.kills)
        kills = [draw_kill(dice, case) for _ in range(length)]
        before = tally.kills
        try:
            run_chain(bench, case, kills, tally)
        except AssertionError as error:
            print(f"FAILED: {case}, {kills}: {error}", flush=True)
            tally.failures.append(f"{case}: {error}")
        missed = 0 if tally.kills > before else missed + 1
    tally.seconds = time.monotonic() - began
    return tally


# ---------------------------------------------------------------- other situations
class Skip(Exception):
    """A situation that cannot be made here; the message says why."""


STOPPED = re.compile(r"SIGTERM|SIGINT|Ctrl-C|interrupt|stopped", re.IGNORECASE)


def lines_of(text: str) -> list[str]:
    """The lines that a user sees, without those of the progress bar."""
    lines = [line.strip() for line in re.split(r"[\r\n]", text)]
    return [line for line in lines if line and not re.search(r"\d+%\||\?step/s", line)]


def check_error(run: Forks | Program, *words: str) -> str:
    """It has ended with exit status 1 and one sentence, which holds the words; returns it."""
    statuses = run.wait()
    text = run.output()
    assert set(statuses) == {1}, f"exit status {statuses}, not 1\n{text}"
    check_no_traceback(run)
    sentences = [line for line in lines_of(text) if line.startswith("error:")]
    assert len(sentences) == 1, f"{len(sentences)} sentences, not one\n{text}"
    for word in words:
        assert word in sentences[0], f"the sentence does not hold {word!r}: {sentences[0]}"
    assert " object at 0x" not in sentences[0], sentences[0]
    return sentences[0]


def check_stopped(run: Forks | Program, step: int, number: int) -> None:
    """A signal has ended it with its status and one sentence, and what was saved is there."""
    statuses = run.wait()
    text = run.output()
    check_no_traceback(run)
    sentences = [line for line in lines_of(text) if STOPPED.search(line)]
    is_torchrun = isinstance(run, Program) and run.number > 1  # which says the signal again
    status = 1 if is_torchrun else 128 + number
    assert status in statuses, f"exit status {statuses}, not {status}\n{text}"
    assert 0 not in statuses, f"exit status {statuses}: a scheduler takes 0 for the end\n{text}"
    said_once = len(sentences) == 1 or (is_torchrun and sentences)
    assert said_once, f"{len(sentences)} sentences say why it ended ({statuses})\n{text}"
    out_dir = run.folder / "run"
    assert saved_step(out_dir) >= step, f"step {step} was saved, and is lost"
    assert logged_step(out_dir) < MAX_STEPS, "the signal came too late to prove anything"


def stop_by(
    bench: Bench,
    number: int,
    case: Case = Case(),
    to_group: bool = False,
    times: int = 1,
    only_rank: int | None = None,
) -> None:
    """Train for some steps, send a signal, and go on."""
    bench.whole(case)
    folder = bench.new_folder(signal.Signals(number).name)
    run = start(case, folder)
    wait_until(lambda: logged_step(folder / "run") >= 5 or run.is_over(), "five steps")
    step = saved_step(folder / "run")
    for _ in range(times):
        if only_rank is None:
            run.send(number, to_group)
        else:
            os.kill(run.process_ids()[only_rank], number)
        time.sleep(0.01)
    check_stopped(run, step, number)
    bench.finish(folder, case)


def sigterm(bench: Bench) -> None:
    """SIGTERM, which clusters send before they take a machine away."""
    stop_by(bench, signal.SIGTERM)


def sigint(bench: Bench) -> None:
    """Ctrl-C."""
    stop_by(bench, signal.SIGINT)


def sigint_with_workers(bench: Bench) -> None:
    """Ctrl-C reaches the workers too."""
    stop_by(bench, signal.SIGINT, Case(workers=2), to_group=True)


def sigterm_with_workers(bench: Bench) -> None:
    """A cluster may send SIGTERM to the workers too."""
    stop_by(bench, signal.SIGTERM, Case(workers=2), to_group=True)


def sigint_twice(bench: Bench) -> None:
    """Impatience."""
    stop_by(bench, signal.SIGINT, times=2)


def sigterm_to_one_of_two(bench: Bench) -> None:
    """Both leave at the same step."""
    stop_by(bench, signal.SIGTERM, Case(processes=2), only_rank=1)


def sigint_to_two(bench: Bench) -> None:
    """Ctrl-C under torchrun."""
    stop_by(bench, signal.SIGINT, Case(workers=2, processes=2), to_group=True)


def sigint_python(bench: Bench) -> None:
    """Ctrl-C at `python train.py`, with workers."""
    stop_by(bench, signal.SIGINT, Case("train", 2, is_program=True), to_group=True)


def sigterm_torchrun(bench: Bench) -> None:
    """SIGTERM to torchrun, which hands it on."""
    stop_by(bench, signal.SIGTERM, Case("train", 0, 2, is_program=True))


def sigint_before_the_first_step(bench: Bench) -> None:
    """Ctrl-C while the data are made."""
    bench.whole(Case())
    folder = bench.new_folder("early")
    run = start(Case(), folder)
    wait_until(lambda: run.output() or run.is_over(), "the first word")
    run.send(signal.SIGINT)
    check_stopped(run, 0, signal.SIGINT)
    bench.finish(folder)


def killed_worker(bench: Bench) -> None:
    """The system kills a DataLoader worker, as it does when memory is short."""
    case = Case(workers=2)
    folder = bench.half("worker")
    step = saved_step(folder / "run")
    mark = log_mark(folder / "run")
    run = start(case, folder)
    wait_until(lambda: has_new_log(folder / "run", mark) or run.is_over(), "training")
    # at its first row the log is cut to the saved step
    wait_until(lambda: logged_step(folder / "run") > step or run.is_over(), "a step")
    workers = children_of(run.process_ids()[0])
    assert workers, "there are no workers"
    os.kill(workers[0], signal.SIGKILL)
    check_error(run)
    assert saved_step(folder / "run") >= step, "the saved step is lost"
    bench.finish(folder, case)


def two_runs(bench: Bench) -> None:
    """Others in the folder of a run are refused, --fresh too, and the run is not disturbed.

    It is suspended meanwhile, as by Ctrl-Z.
    """
    case = Case()
    folder = bench.half("two")
    mark = log_mark(folder / "run")
    run = Forks(case, folder)
    wait_until(lambda: has_new_log(folder / "run", mark) or run.is_over(), "training")
    run.send(signal.SIGSTOP)  # so that it is not over before the others come
    for flags in ((), ("--fresh",)):
        other_folder = bench.new_folder("other")
        (other_folder / "run").symlink_to(folder / "run")
        check_error(Forks(case, other_folder, flags=flags), "run", "in use")
    run.send(signal.SIGCONT)
    assert run.wait() == [0], run.output()
    found = differences(bench.whole(case), folder / "run")
    assert not found, "; ".join(found)


def two_runs_at_once(bench: Bench) -> None:
    """Both are started at the same moment: one trains, the other is refused."""
    case = Case()
    folder = bench.new_folder("once")
    other_folder = bench.new_folder("other")
    (folder / "run").mkdir()
    (other_folder / "run").symlink_to(folder / "run")
    runs = [Forks(case, folder), Forks(case, other_folder)]
    statuses = [run.wait()[0] for run in runs]
    assert sorted(statuses) == [0, 1], [run.output() for run in runs]
    check_error(runs[statuses.index(1)], "in use")
    found = differences(bench.whole(case), folder / "run")
    assert not found, "; ".join(found)


def run_until(
    folder: Path, condition: Callable[[], bool], prepare: Callable[[], None] | None = None
) -> None:
    """Train until something has happened, and kill."""
    run = Forks(Case(), folder, prepare)
    wait_until(lambda: condition() or run.is_over(), "a part of a run")
    assert not run.is_over(), f"it has ended by itself\n{run.output()}"
    run.send(signal.SIGKILL)
    run.wait()


def killed_fresh(bench: Bench) -> None:
    """A run that is started anew is killed as soon as the old one is gone, and started anew again.

    Nothing of the old run may be lost.
    """
    folder = bench.half("fresh")
    out_dir = folder / "run"
    old = contents(out_dir)
    run = Forks(Case(), folder, flags=("--fresh",))
    wait_until(lambda: not (out_dir / "training_state.pt").exists() or run.is_over(), "--fresh")
    run.send(signal.SIGKILL)
    run.wait()
    last = Forks(Case(), folder, flags=("--fresh",))
    assert last.wait() == [0], last.output()
    check_no_traceback(last)
    kept: list[bytes] = []
    for number, aside in enumerate(sorted(out_dir.glob("before-*")), 1):
        kept += contents(aside).values()
        aside.rename(folder / f"aside_{number}")
    for name, content in old.items():
        # a row that a death has cut may be gone from the log
        assert content in kept or name == "log.jsonl", f"the old run's {name} is lost"
    found = differences(bench.whole(Case()), out_dir)
    assert not found, "; ".join(found)


# ---------------------------------------------------------------- disks and permissions
def limit_files(most_bytes: int) -> None:
    """From now on no file of this process may become larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))


def file_too_large(bench: Bench) -> None:
    """The system refuses to write a file to its end: at the first save, and at a later one."""
    for folder in (bench.new_folder("limit"), bench.half("limit")):
        state = folder / "run" / "training_state.pt"
        before = state.read_bytes() if state.exists() else None
        run = Forks(Case(), folder, functools.partial(limit_files, 100_000))
        check_error(run, "cannot write", "training_state.pt")
        after = state.read_bytes() if state.exists() else None
        assert after == before, "the former state is not as it was"
        assert not temporary_files(folder / "run"), "half a file is left"
        bench.finish(folder)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of 8 MiB in memory, at `folder`; what lies there is copied into it."""
    copy = folder.with_name(f"{folder.name}_copy")
    shutil.copytree(folder, copy)
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        raise Skip("only root may mount a small disk")
    try:
        shutil.copytree(copy, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(copy)


def fill(file: Path) -> None:
    """Write to it until the disk is full."""
    with contextlib.suppress(OSError), open(file, "ab", buffering=0) as filler:
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while filler.write(b"0" * size):
                    pass


def full_disk(bench: Bench) -> None:
    """Others fill the disk while it trains."""
    folder = bench.half("disk")
    with small_disk(folder / "run"):
        step = saved_step(folder / "run")
        mark = log_mark(folder / "run")
        run = Forks(Case(), folder)
        wait_until(lambda: has_new_log(folder / "run", mark) or run.is_over(), "training")
        while not run.is_over():
            fill(folder / "run" / "filler")  # again and again, as each save makes room by a rename
            time.sleep(0.005)
        sentence = check_error(run, "cannot write")
        says_why = os.strerror(errno.ENOSPC) in sentence or "0 MiB are free" in sentence
        assert says_why, f"the sentence does not say that the disk is full: {sentence}"
        assert saved_step(folder / "run") >= step, "the saved step is lost"
        (folder / "run" / "filler").unlink()
        bench.finish(folder)


def become_ordinary() -> None:
    """An ordinary user, whom the permissions of files hold for."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def set_rights(folder: Path, of_folders: int, of_files: int) -> None:
    """Of a run's folder, of all that lies in it, and of the folder around it."""
    (folder / "out0.txt").touch()  # what the run prints into
    (folder / "err0.txt").touch()
    for place in (folder / "run").rglob("*"):
        place.chmod(of_folders if place.is_dir() else of_files)
    for place in (folder / "run", folder):
        if place.exists():
            place.chmod(of_folders)


def contents(run: Path) -> dict[str, bytes]:
    return {name: file.read_bytes() for name, file in files_below(run).items()}


def read_only_folder(bench: Bench) -> None:
    """An ordinary user may not write there: no folder, an empty one, and one with half a run."""
    without = bench.new_folder("without")
    empty = bench.new_folder("empty")
    (empty / "run").mkdir()
    half = bench.half("half")
    for folder in (without, empty, half):
        before = contents(folder / "run")
        set_rights(folder, 0o555, 0o444)
        sentence = check_error(Forks(Case(), folder, become_ordinary), "run")
        assert re.search("cannot (be )?writ", sentence), f"it does not say why: {sentence}"
        assert contents(folder / "run") == before, "files have changed"
        set_rights(folder, 0o755, 0o644)
    bench.finish(half)


# ---------------------------------------------------------------- clocks, locks and places
def run_clock_backwards() -> None:
    real = time.time
    began = real()
    time.time = lambda: 2 * began - real() - 1000
    tqdm.std.time = time.time


def stop_clock() -> None:
    began = time.time()
    time.time = lambda: began
    tqdm.std.time = time.time


def clock_backwards(bench: Bench) -> None:
    """It goes on by a clock that is late and runs backwards, then by one that stands still."""
    folder = bench.half("clock")
    step = saved_step(folder / "run")
    run_until(folder, lambda: saved_step(folder / "run") > step, run_clock_backwards)
    bench.finish(folder, prepare=stop_clock)


def times_in_the_future(bench: Bench) -> None:
    """The files of the first half are ten years younger than the second half, or of 1970."""
    future = time.time() + 10 * 365 * 86400
    folder = bench.half("future")
    for number, file in enumerate(sorted((folder / "run").rglob("*"))):
        seconds = future if number % 2 else 0
        os.utime(file, (seconds, seconds))
    bench.finish(folder)


def dead_process() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def stale_lock(bench: Bench) -> None:
    """Locks that dead processes left, whole or in pieces."""
    owner = {"process": dead_process(), "host": socket.gethostname()}
    whole = json.dumps(owner)
    folder = bench.half("lock")
    for content in ("", whole[:13], whole):
        (folder / "run" / NO_RESULT).write_text(content)
        mark = log_mark(folder / "run")
        run_until(folder, functools.partial(has_new_log, folder / "run", mark))
    bench.finish(folder)


def lock_with_a_number_that_lives_again(bench: Bench) -> None:
    """After a reboot another process may have the number of the dead one.

    Either it goes on, or the sentence says which file to remove.
    """
    folder = bench.half("again")
    lock = folder / "run" / NO_RESULT
    lock.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
    run = Forks(Case(), folder)
    if run.wait() == [0]:
        found = differences(bench.whole(Case()), folder / "run")
        assert not found, "; ".join(found)
        return
    check_error(run, "in use", f"remove run/{NO_RESULT}")
    lock.unlink()
    bench.finish(folder)


def moved_folder(bench: Bench) -> None:
    """Somebody moves the folder between the two halves."""
    folder = bench.half("moved")
    elsewhere = bench.new_folder("elsewhere")
    shutil.move(folder / "run", elsewhere / "run")
    bench.finish(elsewhere)


def linked_folder(bench: Bench) -> None:
    """The folder is a link to one on another disk, and stays one."""
    folder = bench.new_folder("link")
    disk = bench.new_folder("disk")
    (folder / "run").symlink_to(disk)
    run_until(folder, lambda: saved_step(folder / "run") >= 4)
    bench.finish(folder)
    assert (folder / "run").is_symlink()
    assert saved_step(disk) == MAX_STEPS


SITUATIONS: dict[str, Callable[[Bench], None]] = {
    function.__name__: function
    for function in (
        sigterm,
        sigint,
        sigterm_with_workers,
        sigint_with_workers,
        sigint_twice,
        sigterm_to_one_of_two,
        sigint_to_two,
        sigint_python,
        sigterm_torchrun,
        sigint_before_the_first_step,
        killed_worker,
        two_runs,
        two_runs_at_once,
        killed_fresh,
        file_too_large,
        full_disk,
        read_only_folder,
        clock_backwards,
        times_in_the_future,
        stale_lock,
        lock_with_a_number_that_lives_again,
        moved_folder,
        linked_folder,
    )
}


def run_situations(bench: Bench, names: list[str]) -> list[str]:
    """Returns the names of those that fail."""
    failed = []
    for name in names:
        began = time.monotonic()
        try:
            SITUATIONS[name](bench)
            word = "right"
        except Skip as reason:
            word = f"left out: {reason}"
        except AssertionError as error:
            word = f"FAILED: {error}"
            failed.append(name)
        print(f"{name}: {word} ({time.monotonic() - began:.1f} s)", flush=True)
    return failed


# ---------------------------------------------------------------- the command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the runs are; a new or empty folder")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--situations", default="all", help=f"all, none or {','.join(SITUATIONS)}")
    arguments = parser.parse_args(argv)
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        parser.error(f"{arguments.folder} is not empty")
    names = arguments.situations.split(",")
    if arguments.situations in ("all", "none"):
        names = list(SITUATIONS) if arguments.situations == "all" else []
    unknown = [name for name in names if name not in SITUATIONS]
    if unknown:
        parser.error(f"there is no situation {unknown[0]}")
    bench = Bench(arguments.folder)
    tally = run_kills(bench, arguments.kills, arguments.seed)
    print(tally.summary(), flush=True)
    failed = run_situations(bench, names)
    print(f"{len(names)} situations: {len(names) - len(failed)} right or left out")
    is_right = tally.kills == tally.resumed == arguments.kills and not failed
    if is_right:
        shutil.rmtree(arguments.folder)
    for failure in (*tally.failures, *failed):
        print(f"FAILED: {failure.partition(chr(10))[0]}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
