"""--shard: each process keeps a part of the weights, of their gradients and of AdamW's moments.

FSDP2 (`torch.distributed.fsdp.fully_shard`) deals the rows of every parameter to the processes. A
block of the model gathers its weights right before it runs and lets them go afterwards; the rest
of the model is gathered from the beginning of a forward pass to the end of its backward pass. A
parameter that is a single number, the temperature of ITC, stays whole in every process: the loss
changes it in place.

The state of a run is a folder, sharded_state: each process writes its own rows into a file of
safetensors, and then rank 0 replaces index.json, which says what belongs together. So it is read
without a pickle, and by any number of processes: each one reads its new rows out of the files that
have them. Read `shard_task` first, then `save_state` and `load_state`.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fields import show
from files import VERSION, need, read_json, write_atomically, write_json
from world import MOST_PROCESSES, World, first_line_of

STATE_FOLDER = "sharded_state"  # in out_dir
INDEX = "index.json"


# ---------------------------------------------------------------- the parts of a parameter
def own_part(tensor: Tensor) -> Tensor:
    """The rows that this process has, without gradients; all of a tensor that is not dealt."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """All rows, from all processes, which call this together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(length: int, rank: int, size: int) -> range:
    """Which rows of a parameter a process has: as torch.chunk cuts, so the last ones have less."""
    rows = math.ceil(length / size)
    start = min(rank * rows, length)
    return range(start, min(start + rows, length))


# ---------------------------------------------------------------- sharding of what is trained
def shard_task(task: Any, groups: list[dict], precision: str, world: World) -> None:
    """Deal the weights of a task to the processes, and put the parts into the optimizer's groups.

    Each process has all weights before, and may then read them only inside of the task's forward
    pass, or in `gathered`. precision: a resolved one.
    """
    names = {parameter: name for name, parameter in task.named_parameters()}
    deal(task, precision, world)
    # all processes gather a block, or none does
    task.model.runs_all_blocks = True
    # The new parameters have the names of the old ones. In place: whoever has the groups would keep
    # the whole weights else.
    dealt = dict(task.named_parameters())
    for group in groups:
        group["params"] = [dealt[names[parameter]] for parameter in group["params"]]
    groups[:] = [kind for group in groups for kind in split_group(group)]


def deal(task: Any, precision: str, world: World) -> None:
    """Let each process keep its rows: FSDP2, block by block, then the rest as one."""
    # 1. without torchrun this process is a group of its own
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(world.device.type, (world.size,))

    # 2. The weights of blocks are gathered in bf16, into which autocast would round them anyway.
    # The rest stays in float32, and so does what goes from block to block: as without --shard.
    is_half = precision == "bf16" and world.device.type == "cuda"
    block_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if is_half else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    root_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)

    # 3. Gradients are dealt out in every micro-step, not only in the last one: until then they
    # would be whole in every process, as large as the weights that are not.
    for module in task.model.modules():
        if isinstance(module, task.model.blocks_to_shard):
            fully_shard(module, mesh=mesh, mp_policy=block_policy)
    fully_shard(
        task,
        mesh=mesh,
        mp_policy=root_policy,
        reshard_after_forward=False,
        ignored_params={parameter for parameter in task.parameters() if parameter.dim() == 0},
    )


def split_group(group: dict) -> list[dict]:
    """What is dealt and what is not, as groups of their own: an update takes one kind only."""
    kinds = []
    for is_dealt in (True, False):
        parameters = [x for x in group["params"] if isinstance(x, DTensor) == is_dealt]
        if parameters:
            kinds.append({**group, "params": parameters})
    return kinds


@contextlib.contextmanager
def gathered(task: nn.Module) -> Iterator[None]:
    """The time in which a process has all weights: to evaluate, whatever the others do meanwhile.

    All processes enter and leave it together. Without --shard it does nothing.
    """
    units = [module for module in task.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            # the task itself stays gathered until its backward pass
            unit.set_reshard_after_forward(unit is not task, recurse=False)


def whole_weights(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """All weights on the CPU of rank 0, by name; the other processes get none.

    One parameter after the other is gathered, so that no device holds the whole model.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        whole = whole_tensor(parameter)
        if rank == 0:
            weights[name] = whole.cpu()
    return weights


# ---------------------------------------------------------------- gradients
def average_whole_gradients(task: nn.Module, world: World) -> None:
    """The mean over the processes of the gradients of what is not dealt; FSDP makes the others."""
    for parameter in task.parameters():
        if not isinstance(parameter, DTensor) and parameter.grad is not None:
            world.sum(parameter.grad).div_(world.size)


def clip_sharded_gradients(parameters: list[nn.Parameter], most: float) -> Tensor:
    """The norm of all gradients together before they are clipped to `most`; 0 clips none."""
    # the functions of torch do not take both kinds together
    kinds: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        kinds[isinstance(parameter, DTensor)].append(parameter)
    norms = []
    for kind in kinds.values():
        gradients = [parameter.grad for parameter in kind if parameter.grad is not None]
        if gradients:
            norms.append(whole_tensor(nn.utils.get_total_norm(gradients)))
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if most:
        for kind in kinds.values():
            nn.utils.clip_grads_with_norm_(kind, most, norm)
    return norm


# ---------------------------------------------------------------- the state of a run
class Index(NamedTuple):
    """The content of index.json."""

    step: int
    best: float | None  # the highest score so far
    identity: dict  # what a run is told apart by
    processes: int  # how many have written a file
    updates: dict[str, int]  # name of a parameter -> how many updates it had


INDEX_FIELDS = {
    "step": int,
    "best": float | None,
    "identity": dict,
    "processes": int,
    "updates": dict,
}


def part_file(folder: Path, step: int, rank: int) -> Path:
    """The file of a process. A later state has other names: the old one stays whole meanwhile."""
    return folder / f"step-{step}.part-{rank}.safetensors"


OUR_FILES = re.compile(r"(step-[0-9]+\.part-[0-9]+\.safetensors|index\.json)(\.tmp[0-9]+)?")


def remove_old_parts(folder: Path) -> None:
    """Remove what `save_state` left of an older state, or of one that it did not finish."""
    if not folder.is_dir():
        return
    kept = {INDEX}
    if (folder / INDEX).exists():
        index = read_index(folder)
        kept |= {part_file(folder, index.step, rank).name for rank in range(index.processes)}
    for path in folder.iterdir():
        if OUR_FILES.fullmatch(path.name) and path.name not in kept and path.is_file():
            path.unlink()


def tensors_of(name: str, parameter: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A parameter, and AdamW's two moments of it if it had an update, by their names in a file."""
    tensors = {f"weight {name}": parameter}
    moments = optimizer.state.get(parameter, {})
    for kind in ("exp_avg", "exp_avg_sq"):
        if kind in moments:
            tensors[f"{kind} {name}"] = moments[kind]
    return tensors


def write_part(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int
) -> None:
    """The rows of this process, of weights and moments, into its file."""
    parts = {}
    for name, parameter in model.named_parameters():
        # what every process has is in the first file
        if not isinstance(parameter, DTensor) and rank > 0:
            continue
        for key, tensor in tensors_of(name, parameter, optimizer).items():
            part = own_part(tensor)
            if part.numel():
                parts[key] = part.cpu().contiguous()
    write_atomically(part_file(folder, step, rank), lambda path: save_file(parts, path))


def write_index(
    folder: Path, index: Index, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """index.json: from here on the files of this step are the state of the run."""
    updates = {}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {})
        if "step" in moments:
            updates[name] = int(moments["step"])
    index = index._replace(updates=updates)
    write_json(folder / INDEX, {"version": VERSION, **index._asdict()})


def read_index(folder: Path) -> Index:
    """What index.json says. Raises ValueError for anything else."""
    file = folder / INDEX
    try:
        record = read_json(file, dict)
        values = [need(record, name, kind) for name, kind in INDEX_FIELDS.items()]
        index = Index(*values)
        check_index(index)
    except (ValueError, OSError) as error:
        reason = first_line_of(error).removeprefix(f"{file}: ").removeprefix(f"{file} ")
        raise ValueError(
            f"{file} is not a readable training state ({reason}); --fresh starts anew"
        ) from error
    return index


def check_index(index: Index) -> None:
    """Raises ValueError for values that no run writes."""
    if index.best is not None and not math.isfinite(index.best):
        raise ValueError(f"best is {index.best}")
    if not 0 < index.processes <= MOST_PROCESSES:
        raise ValueError(f"processes is {index.processes}")
    if not {"max_steps", "batch_size", "seed"} <= index.identity.keys():
        raise ValueError(f"identity is {show(index.identity)}")


class Parts:
    """The files of a state, open, with what is in them checked against the model."""

    def __init__(self, folder: Path, index: Index):
        self.paths = []
        self.files: list[Any] = []
        self.keys: list[set[str]] = []
        for rank in range(index.processes):
            path = part_file(folder, index.step, rank)
            try:
                file: Any = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path.name} cannot be read: {first_line_of(error)}") from error
            self.paths.append(path)
            self.files.append(file)
            self.keys.append(set(file.keys()))

    def check(self, rank: int, key: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless a file has a tensor of this name and shape."""
        name = self.paths[rank].name
        if key not in self.keys[rank]:
            raise ValueError(f"{name} has no {show(key)}")
        found = self.files[rank].get_slice(key)
        found_shape = tuple(found.get_shape())
        if found_shape != shape or found.get_dtype() != "F32":
            raise ValueError(
                f"{show(key)} in {name} is {found.get_dtype()} {found_shape}, not F32 {shape}"
            )

    def read(self, key: str, shape: torch.Size, rows: range) -> Tensor:
        """Some rows of a tensor of this shape, from the files that have them. Raises ValueError."""
        parts = []
        for rank, file in enumerate(self.files):
            stored = rows_of(shape[0], rank, len(self.files))
            start = max(rows.start, stored.start)
            stop = min(rows.stop, stored.stop)
            if start < stop:
                self.check(rank, key, (len(stored), *shape[1:]))
                part = file.get_slice(key)
                parts.append(part[start - stored.start : stop - stored.start])
        return torch.cat(parts)

    def fill(self, key: str, tensor: Tensor, world: World) -> None:
        """Give a tensor, or the rows of it that this process has, what is stored. Raises
        ValueError.
        """
        own = own_part(tensor)
        if own.numel() == 0:
            return
        if tensor.dim() == 0:  # every process has it, and the first file
            self.check(0, key, ())
            stored = self.files[0].get_tensor(key)
        else:
            stored = self.read(key, tensor.shape, rows_of(len(tensor), world.rank, world.size))
        if not torch.isfinite(stored).all():
            raise ValueError(f"{show(key)} is not finite")
        own.copy_(stored)


def load_state(
    folder: Path, index: Index, model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> None:
    """Fill a dealt model and its AdamW, whatever number of processes has written the state.

    Raises ValueError for files of another model, or damaged ones.
    """
    parts = Parts(folder, index)
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter in trained and name in index.updates:
            optimizer.state[parameter] = first_moments(name, parameter, index)
        for key, tensor in tensors_of(name, parameter, optimizer).items():
            parts.fill(key, tensor, world)


def first_moments(name: str, parameter: Tensor, index: Index) -> dict[str, Tensor]:
    """AdamW's state of a parameter, with zeros for the moments. Raises ValueError."""
    updates = index.updates[name]
    if type(updates) is not int or not 0 < updates <= index.step:
        raise ValueError(f"updates of {show(name)} is {show(updates)}")
    return {
        "step": torch.tensor(float(updates), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter).detach(),
        "exp_avg_sq": torch.zeros_like(parameter).detach(),
    }
