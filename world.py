"""This process among all: rank, device, seeds, autocast, what is gathered over processes, and how a
script ends.

Everything here works without torchrun too: one process is a world of size 1.
"""

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fields import FlagError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PATIENCE = 10.0  # seconds that other processes give rank 0 to say what is wrong


class World:
    """Rank, size and device of this process; it joins the others that torchrun started."""

    def __init__(self, device: str = "auto"):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.device = choose_device(device, local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

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
    if kind != "cuda" or (number and not number.isdigit()):
        raise ValueError(f"--device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    if not has_cuda:
        raise ValueError(f"--device {name}, but torch sees no CUDA device here")
    index = int(number) if number else local_rank
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: device {index} of {torch.cuda.device_count()} CUDA devices"
        )
    return torch.device(f"cuda:{index}")


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


# ---------------------------------------------------------------- how a script ends
def sentence_of(error: Exception) -> str:
    """The message of an error.

    Of one that a DataLoader worker sent, with its traceback, the last line.
    """
    lines = str(error).strip().splitlines()
    if lines and "DataLoader worker" in lines[0]:
        return lines[-1].partition(": ")[2] or lines[-1]
    return "\n".join(lines)


LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process ended; that one says why."""
    return dist.is_initialized() and any(words in str(error) for words in LOST)


ALLOCATION = ("allocate memory", "out of memory", "Storage size calculation overflowed")


def sentence_of_allocation(error: Exception) -> str | None:
    """What to say of sizes that do not fit into memory or into a number; None for other errors."""
    first_line = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError | OverflowError):
        return f"the sizes that were asked for are too large ({first_line or 'out of memory'})"
    if any(words in first_line for words in ALLOCATION):
        return f"there is not enough memory for the sizes that were asked for ({first_line})"
    return None


def say_error(sentence: str) -> None:
    """The last line on stderr. Of several processes rank 0 says it."""
    if int(os.environ.get("RANK", 0)) > 0:
        # Nearly always all processes meet the same error. Rank 0 says it and ends, and torchrun
        # then ends this one too. If this one is still here after a while, only it knows.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)


def one_sentence(main: Callable[[list[str]], Any]) -> None:
    """Run main with the command line. What is wrong with the user's input is said in one sentence.

    Exit status 1; 2 for a command line that cannot be read.
    """
    if int(os.environ.get("RANK", 0)) > 0 and ("-h" in sys.argv or "--help" in sys.argv):
        sys.exit(0)  # rank 0 prints the page
    try:
        main(sys.argv[1:])
    except FlagError as error:
        say_error(sentence_of(error))
        sys.exit(2)
    except (ValueError, OSError) as error:
        say_error(sentence_of(error))
        sys.exit(1)
    except (MemoryError, OverflowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and is_lost_connection(error):
            sys.exit(1)  # the process that ended says why
        sentence = sentence_of_allocation(error)
        if sentence is None:
            raise  # a fault of the program, which a traceback helps to find
        say_error(sentence)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
