"""This process among all: rank, device, seeds, autocast, what is gathered over processes, and how a
script ends.

Everything here works without torchrun too: one process is a world of size 1.
"""

import contextlib
import errno
import io
import multiprocessing
import os
import random
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from fields import FlagError, shorten, show

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PATIENCE = 10.0  # seconds that other processes give rank 0 to say what is wrong
# Processes that load data, for each training process. More help no training, and thousands of them
# take minutes and all memory before the first batch.
MOST_WORKERS = 256


MOST_PROCESSES = 2**20
# what torchrun puts into the environment of each of several processes
TORCHRUNS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment_number(name: str, default: int, least: int, most: int) -> int:
    """A number that torchrun puts into the environment. Raises ValueError for anything else."""
    text = os.environ.get(name, str(default))
    is_number = text.isascii() and text.isdigit() and len(text) < 10
    if not is_number or not least <= int(text) <= most:
        raise ValueError(
            f"the environment variable {name} is {show(text)}; torchrun sets a number from "
            f"{least} to {most}"
        )
    return int(text)


def check_environment(rank: int, size: int) -> None:
    """Raises ValueError unless the variables of several processes are all there, and agree."""
    missing = [name for name in TORCHRUNS if not os.environ.get(name)]
    is_alone = "RANK" in missing and size == 1
    if is_alone or (not missing and rank < size):
        return
    place = f"process {os.environ.get('RANK', 'none')} of {size}"
    if missing:
        place += f", without {', '.join(missing)}"
    raise ValueError(
        f"the environment variables say {place}; start several processes with torchrun, or unset "
        "RANK and WORLD_SIZE"
    )


def join_processes(backend: str) -> None:
    """Meet the other processes. Raises ValueError if that fails, or takes too long."""
    port = environment_number("MASTER_PORT", 0, least=1, most=65535)
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processes do not meet at {os.environ['MASTER_ADDR']}, port {port}, which "
            f"MASTER_ADDR and MASTER_PORT name ({first_line_of(error)})"
        ) from error


class World:
    """Rank, size and device of this process; it joins the others that torchrun started."""

    def __init__(self, device: str = "auto"):
        self.rank = environment_number("RANK", 0, least=0, most=MOST_PROCESSES)
        self.size = environment_number("WORLD_SIZE", 1, least=1, most=MOST_PROCESSES)
        local_rank = environment_number("LOCAL_RANK", 0, least=0, most=MOST_PROCESSES)
        check_environment(self.rank, self.size)
        self.device = choose_device(device, local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ and not dist.is_initialized():
            join_processes("nccl" if self.device.type == "cuda" else "gloo")

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def print(self, *args: Any) -> None:
        if self.rank == 0:
            print(*args, flush=True)


def choose_device(name: str, local_rank: int) -> torch.device:
    """auto, cpu, cuda (this process' own one) or cuda:N -> a device that is there. Raises
    ValueError.
    """
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or name == "cuda:" or (number and not is_device_number(number)):
        raise ValueError(f"--device is {show(name)}; it must be auto, cpu, cuda or cuda:N")
    if not has_cuda:
        raise ValueError(f"--device {name}, but torch sees no CUDA device here")
    index = int(number) if number else local_rank
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: device {index} of {torch.cuda.device_count()} CUDA devices"
        )
    return torch.device(f"cuda:{index}")


def is_device_number(text: str) -> bool:
    """Whether this is a short decimal number."""
    return text.isascii() and text.isdigit() and len(text) < 5


# ---------------------------------------------------------------- over all processes
def ranks() -> tuple[int, int]:
    """(rank, number of processes)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def collect(parts: list[tuple]) -> list:
    """All processes' (position, value) pairs -> the values in order, on every process."""
    _, size = ranks()
    everyone = [parts]
    if size > 1:
        everyone = [[] for _ in range(size)]
        dist.all_gather_object(everyone, parts)
    merged: dict = {}
    for process_parts in everyone:
        for position, value in process_parts:
            assert position not in merged, f"the result of position {position} arrived twice"
            merged[position] = value
    return [merged[position] for position in sorted(merged)]


class GatherWithGradient(torch.autograd.Function):
    """The rows of every process, one after the other; each gradient returns to the process that its
    row came from.

    shares: how many rows each process has.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: list[int]) -> Tensor:
        ctx.shares = shares
        # all_gather wants equal sizes: a process with fewer rows sends some zeros along
        padded = x.new_zeros(max(shares), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(parts, padded)
        return torch.cat([part[:share] for part, share in zip(parts, shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad.split(ctx.shares)[dist.get_rank()], None


def gather(x: Tensor, shares: list[int]) -> Tensor:
    """(B_r, ...) of every process r -> (sum of all B_r, ...), differentiable. shares: B_r of every
    process.
    """
    if len(shares) == 1:
        return x
    return GatherWithGradient.apply(x, shares)


# ---------------------------------------------------------------- seeds, precision, modes
def seed_of(*numbers: Any) -> int:
    """A seed that is a function of these numbers alone.

    So a resumed run draws what it would have drawn.
    """
    return random.Random(repr(numbers)).getrandbits(62)


def seed_all(*numbers: Any) -> None:
    torch.manual_seed(seed_of(*numbers))


def resolve_precision(precision: str, device: torch.device) -> str:
    """auto is bf16 on CUDA, and fp32 elsewhere."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Mixed precision for the forward pass: auto, fp32, bf16 or fp16."""
    dtype = PRECISIONS[resolve_precision(precision, device)]
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch with its tensors on the device; all else stays as it is."""
    moved = {}
    for name, value in batch.items():
        moved[name] = value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
    return moved


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode, no gradients, bf16 autocast on CUDA. Gives the device.

    Afterwards the model is in its own mode again.
    """
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
        ):
            yield device
    finally:
        model.train(training)


# ---------------------------------------------------------------- what libraries print
@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    """Rust and C++ print their failures on stderr by themselves; here the error says them."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


# ---------------------------------------------------------------- how a script ends
INTERRUPTED = 128 + signal.SIGINT  # the exit status after Ctrl-C, as shells have it
TERMINATED = 128 + signal.SIGTERM  # ... after SIGTERM
CLOSED = 128 + signal.SIGPIPE  # ... and when nobody reads the output any more

LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
ALLOCATION = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "ALLOC_FAILED",
    "Storage size calculation overflowed",
)
OUTPUT_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG)
WORKER_DIED = ("exited unexpectedly", "is killed by signal")  # what torch says of a DataLoader's


class Stopped(Exception):
    """SIGTERM has ended a run before its last step. An empty message: it is said already."""


class Remarks(io.FileIO):
    """stderr, on which no write fails: what a full disk does not take, of a progress bar or of
    anything else, is lost, and the work goes on.
    """

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def sentence_of(error: BaseException) -> str:
    """The message of an error.

    Of one that a DataLoader worker sent, with its traceback, the last line.
    """
    lines = str(error).strip().split("\n")
    if "in DataLoader worker process" in lines[0]:
        return lines[-1].partition(": ")[2] or lines[-1]
    return "\n".join(lines) or type(error).__name__


def first_line_of(error: BaseException) -> str:
    """What a library's error says, for a message: one line of bounded length, without objects."""
    line = sentence_of(error).partition("\n")[0][:1000]
    line = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "it", line)
    return shorten(line.strip(), 200) or type(error).__name__


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process ended; that one says why."""
    return (
        isinstance(error, RuntimeError)
        and dist.is_initialized()
        and any(words in str(error) for words in LOST)
    )


def sentence_of_allocation(error: BaseException) -> str | None:
    """What to say of sizes that do not fit into memory or into a number; None for other errors."""
    first_line = first_line_of(error)
    if isinstance(error, MemoryError | OverflowError):
        return f"the sizes that were asked for are too large ({first_line})"
    if any(words in first_line for words in ALLOCATION):
        return f"there is not enough memory for the sizes that were asked for ({first_line})"
    return None


def is_worker_death(error: BaseException) -> bool:
    """Whether a process that loads data ended without a word."""
    message = str(error)
    return "DataLoader worker" in message and any(words in message for words in WORKER_DIED)


def sentence_of_os(error: OSError) -> str:
    """What the system said, of which file; without a file it was said of the output."""
    if not error.strerror:
        return sentence_of(error)
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if error.errno in OUTPUT_ERRORS:
        return f"the output cannot be written: {error.strerror}"
    return str(error.strerror)


def sentence_of_system(error: BaseException) -> str | None:
    """What to say of memory, processes, packages and compilers that fail; None for a fault of the
    program.
    """
    first_line = first_line_of(error)
    if isinstance(error, ImportError):
        return sentence_of_import(error)
    if isinstance(error, RecursionError):
        return f"something in the input is nested too deeply ({first_line})"
    if is_worker_death(error):
        return (
            "a process that loads data was killed, perhaps as the memory is full: "
            f"try fewer --num_workers ({first_line})"
        )
    if isinstance(error, dist.DistError):
        return f"the processes do not reach one another ({first_line})"
    return sentence_of_compiler(error) or sentence_of_allocation(error)


def sentence_of_compiler(error: BaseException) -> str | None:
    """What to say if --compile finds no C++ compiler, or none that works; None for other errors."""
    if type(error).__module__ != "torch._inductor.exc":
        return None
    return (
        f"torch.compile does not work here ({first_line_of(error)}): leave out --compile, or "
        "install what it needs, on a CPU a C++ compiler"
    )


def sentence_of_import(error: ImportError) -> str | None:
    """What to say of a package that is missing, or is too old; None for a file of the project."""
    package = (error.name or "").partition(".")[0]
    if not package or Path(__file__).with_name(f"{package}.py").exists():
        return None
    return (
        f"this needs the package {package}, which is not there or is another version ({error}): "
        "pip install -r requirements-dev.txt"
    )


def printable(sentence: str) -> str:
    """Without the characters that move a terminal's cursor, which a file's name may hold."""
    characters = []
    for character in sentence:
        is_safe = character.isprintable() or character == "\n"
        characters.append(character if is_safe else character.encode("unicode_escape").decode())
    return "".join(characters)


def is_first_process() -> bool:
    """Whether this is rank 0, or no torchrun is there."""
    rank = os.environ.get("RANK", "0")
    size = os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdigit() and size.isdigit()):
        return True
    return int(rank) == 0 or int(rank) >= int(size)


def flush_output() -> bool:
    """Write what is printed. False if nobody reads it any more; then the rest is dropped."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        return False
    except OSError as error:
        drop_output()
        raise ValueError(f"the output cannot be written: {error.strerror}") from error
    return True


def is_output_closed() -> bool:
    """Whether nobody reads what is printed: `... | head -1`."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # the stream of a test has no descriptor
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def drop_output() -> None:
    """From now on nothing is printed, so that the interpreter's own last flush does not fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_streams() -> None:
    """Let printing never end a script: characters that a terminal lacks are shown as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    stderr = sys.__stderr__
    if stderr is not None and sys.stderr is stderr:  # the stream of a test is another one
        remarks: Any = Remarks(2, "w", closefd=False)
        sys.stderr = io.TextIOWrapper(
            remarks, stderr.encoding, errors="backslashreplace", write_through=True
        )


def end_loaders() -> None:
    """End the processes that load data: what they print would stand behind the last line."""
    loaders = [child for child in multiprocessing.active_children() if child.daemon]
    # torch's handler of SIGCHLD raises an error, wherever this process is, when the signal meets a
    # loader that has only begun: the others would stay
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for loader in loaders:
            loader.terminate()
        for loader in loaders:
            loader.join(1)
        # one that has only begun may have taken the signal for its parent's, and gone on
        for loader in loaders:
            if loader.is_alive():
                loader.kill()
                loader.join(1)
    finally:
        signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)


def say_error(sentence: str) -> None:
    """The last line on stderr. Of several processes rank 0 says it."""
    if not is_first_process():
        # Nearly always all processes meet the same error. Rank 0 says it and ends, and torchrun
        # then ends this one too. If this one is still here after a while, only it knows.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(PATIENCE)
    end_loaders()
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # else the sentence would stand behind it
    with contextlib.suppress(ValueError):
        flush_output()
    print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)


def end_of_signal(error: KeyboardInterrupt | Stopped) -> tuple[int, str]:
    """`end_of` of what a signal has ended."""
    status = TERMINATED if isinstance(error, Stopped) else INTERRUPTED
    # a terminal and torchrun send a signal to all processes: the first one says it
    if not is_first_process():
        return status, ""
    if isinstance(error, KeyboardInterrupt) and not str(error):
        return status, "interrupted"
    return status, str(error)


def end_of(error: BaseException) -> tuple[int, str] | None:
    """(exit status, what to say) after an error; None for a fault of the program.

    What to say is empty where another process says it, or nobody listens.
    """
    if isinstance(error, KeyboardInterrupt | Stopped):
        return end_of_signal(error)
    if isinstance(error, FlagError):
        return 2, sentence_of(error)
    if isinstance(error, BrokenPipeError) and is_output_closed():
        drop_output()
        return CLOSED, ""
    if is_lost_connection(error):
        return 1, ""
    if isinstance(error, ValueError):
        return 1, sentence_of(error)
    sentence = sentence_of_system(error)
    if sentence is None and isinstance(error, OSError):
        sentence = sentence_of_os(error)
    return None if sentence is None else (1, sentence)


def one_sentence(main: Callable[[list[str]], Any]) -> None:
    """Run main with the command line. What is wrong with the user's input is said in one sentence.

    Exit status 1; 2 for a command line that cannot be read; 130 after Ctrl-C; 143 after SIGTERM.
    """
    if not is_first_process() and ("-h" in sys.argv or "--help" in sys.argv):
        sys.exit(0)  # rank 0 prints the page
    prepare_streams()
    try:
        main(sys.argv[1:])
        if not flush_output():
            sys.exit(CLOSED)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            # it is pressed again, or torchrun sends it again
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        end = end_of(error)
        if end is None:
            raise  # a traceback helps to find it
        status, sentence = end
        if sentence:
            say_error(sentence)
        sys.exit(status)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
