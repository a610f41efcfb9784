"""The one training loop of the project: DDP, mixed precision, exact resume. Every training script
uses it.

Three rules make runs exact. All randomness is a function of (seed, step) and of the position in the
global batch. Losses are means over the global batch, not means of means. `training_state.pt` is
replaced atomically and is the only truth: after any death the same command goes on, and ends with
the same bits (on the CPU).

Read `fit` first, then `train_step` and `Checkpoint`.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import BatchPlan, GlobalBatchSampler, collate, largest_divisor
from fields import FieldError, check_fields, option, show
from files import (
    VERSION,
    folder_lock,
    read_log,
    remove_temporary_files,
    why_no_folder,
    write_atomically,
    write_text,
)
from hub import find_folder, is_at_hand, is_hub_name
from shard import (
    INDEX,
    STATE_FOLDER,
    Index,
    average_whole_gradients,
    clip_sharded_gradients,
    gathered,
    load_state,
    own_part,
    read_index,
    remove_old_parts,
    shard_task,
    whole_weights,
    write_index,
    write_part,
)
from tokenizer import Tokenizer, load_tokenizer
from torch_files import BROKEN, TorchFile, is_archive
from trackers import PLACES, TRACKERS, check_tracker, open_tracker
from weights import save_folder
from world import (
    MOST_WORKERS,
    Stopped,
    World,
    autocast,
    first_line_of,
    is_lost_connection,
    is_worker_death,
    resolve_precision,
    seed_all,
    seed_of,
    to_device,
)

# ---------------------------------------------------------------- the files of a run
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
EXPORTED = ("model.safetensors", "config.json", *TOKENIZER_FILES, "answers.json")  # for users
FILES = ("training_state.pt", *EXPORTED, "log.jsonl")  # in out_dir, and most in out_dir/best
FOLDERS = (STATE_FOLDER, "best")  # in out_dir; the first one with --shard
SOURCES = ("init", "vision", "text", "tokenizer", "data_root", "data_path", "image_folder")


def is_moved(place: Path, folder: Path) -> bool:
    """Whether `move_old_run` would move this file or folder, or something in it, away."""
    # links may lead there under another name
    place = place.resolve()
    folder = folder.resolve()
    if place == folder:
        return True
    if any(folder / name in (place, *place.parents) for name in FOLDERS):
        return True
    return place.parent == folder and place.name in FILES


def move_old_run(folder: Path) -> Path | None:
    """Move the files of a run into the first free folder/before-N, and return it; None: no files.

    A death on the way leaves some files here and some there. The next --fresh moves the rest.
    """
    # the training state first: without it nobody takes the rest for a run to go on with
    # a run has one of two states, with or without --shard
    names = (STATE_FOLDER, *FILES, "best", *PLACES)
    present = [name for name in names if os.path.lexists(folder / name)]
    if not present:
        return None
    # a number that no earlier --fresh has taken, whatever lies there
    number = 1
    while os.path.lexists(folder / f"before-{number}"):
        number += 1
    target = folder / f"before-{number}"
    target.mkdir()
    # renames: nothing is copied, and nothing can be lost
    for name in present:
        os.rename(folder / name, target / name)
    return target


# ---------------------------------------------------------------- the config of a run
def state_file(out_dir: str, shard: bool) -> Path:
    """What says that there is a training state in a folder, with or without --shard."""
    if shard:
        return Path(out_dir) / STATE_FOLDER / INDEX
    return Path(out_dir) / "training_state.pt"


@dataclass
class RunConfig:
    """What every training script has. Every field is a flag, and so are the fields of the model."""

    architecture: ClassVar[Any] = None  # the class of the model's config
    # the fields that change the numbers of a run: only with the same ones it can be resumed
    identity_fields: ClassVar[tuple[str, ...]] = (
        "max_steps",
        "batch_size",
        "learning_rate",
        "weight_decay",
        "beta2",
        "warmup",
        "schedule",
        "grad_clip",
        "seed",
        "precision",
    )

    # data and weights
    out_dir: str = option("out/demo", "folder of the run: checkpoint, log.jsonl, best/")
    data_root: str = option("", "folder of manifests or .arrow files; none = the built-in scenes")
    vision: str = option(
        "",
        "pre-trained image encoder: folder, .safetensors or name of the hub; none = random weights",
    )
    text: str = option(
        "",
        "pre-trained text encoder or LLM: folder, .safetensors or name of the hub; none = random "
        "weights",
    )
    tokenizer: str = option(
        "", "a folder or file; none = the one beside the weights, or a new one for the data"
    )
    on_bad_sample: str = option(
        "error",
        "a sample that cannot be read ends the run, or is skipped and counted, at most 1 in 1,000 "
        "of what each process reads that loads data; held-out ones are never skipped",
        choices=("error", "skip"),
    )
    # optimisation
    max_steps: int = option(600, "optimizer updates", least=1)
    batch_size: int = option(64, "rows of an update, over all processes", least=1, most=2**20)
    micro_batch_size: int = option(64, "most rows of a process in one backward pass", least=1)
    learning_rate: float = option(1e-3, "highest learning rate", least=0)
    weight_decay: float = option(0.01, "of AdamW", least=0)
    beta2: float = option(0.98, "of AdamW", least=0, below=1)
    warmup: float = option(
        0.1, "part of max_steps in which the learning rate rises", least=0, most=1
    )
    schedule: str = option("linear", "how it falls to zero", choices=("linear", "cosine"))
    grad_clip: float = option(
        0.0, "largest norm of the gradient; 0 = none, as in the papers' two-tower runs", least=0
    )
    seed: int = option(0, "of everything random", least=0)
    # running
    log_every: int = option(50, "steps between two rows of the log", least=1)
    save_every: int = option(200, "steps between two checkpoints", least=1)
    log: str = option("", "who gets the numbers of log.jsonl, too", choices=TRACKERS)
    eval_every: int = option(300, "steps between two evaluations; 0 = only at the end", least=0)
    eval_size: int = option(512, "held-out samples", least=1)
    num_workers: int = option(
        0, "processes that load data, for each training process", least=0, most=MOST_WORKERS
    )
    precision: str = option(
        "auto", "auto = bf16 on CUDA, fp32 elsewhere", choices=("auto", "fp32", "bf16", "fp16")
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    compile: bool | None = option(
        None, "compile the layers with torch.compile; none = on CUDA, where Triton and cc are"
    )
    checkpointing: bool = option(
        False, "compute activations again in the backward pass: less memory"
    )
    shard: bool = option(
        False,
        "each process keeps a part of the weights, gradients and moments: for models that do not "
        "fit into one",
    )
    fresh: bool = option(
        False, "start anew instead of resuming; the old run's files go into out_dir/before-N"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        # torch's scaler looks at the rows of one process
        if self.shard and self.precision == "fp16":
            raise FieldError(
                "shard does not go with precision fp16, whose scale needs whole gradients; "
                "take bf16 or fp32"
            )
        for name in ("vision", "text"):
            place = getattr(self, name)
            is_there = Path(place).exists() or is_hub_name(place)
            if place and not is_there and not goes_on(self):
                raise FieldError(f"{name} is {show(place)}, which does not exist")

    def check_places(self) -> None:
        """Raises FieldError for places that a run cannot have, before anything is loaded."""
        # 1. the folder of the run
        reason = why_no_folder(self.out_dir)
        if reason:
            raise FieldError(f"out_dir {self.out_dir} cannot be written into: {reason}")
        # 2. what is made in it, unless --fresh puts aside what lies there
        if self.fresh:
            self.check_sources()
        else:
            self.check_old_files()
        check_tracker(self.log)
        # 3. what it begins with; a name of the hub is fetched before the data are opened
        if not goes_on(self):
            self.fetch_sources()
        # 4. the data: training and measuring take different rows of it
        if Path(self.data_root).is_file():
            raise FieldError(
                f"data_root {self.data_root} is a file; it must be the folder of the splits to "
                "train and to measure on"
            )

    def check_old_files(self) -> None:
        """Raises FieldError for a folder where the run writes a file, or the other way round; and
        for a training state that --shard cannot go on from, or can only go on with.
        """
        # 1. the state of a run with or without --shard
        sharded = state_file(self.out_dir, True)
        whole = state_file(self.out_dir, False)
        if self.shard and whole.exists():
            raise FieldError(
                f"out_dir {self.out_dir}: {whole} is of a run without --shard, and goes on only "
                "without it"
            )
        if not self.shard and sharded.exists():
            raise FieldError(
                f"out_dir {self.out_dir}: {sharded.parent} is of a run with --shard, and goes on "
                "only with it"
            )
        # 2. the folders in it
        best = Path(self.out_dir) / "best"
        for name in FOLDERS:
            folder = Path(self.out_dir) / name
            reason = why_no_folder(folder)
            if reason and (self.shard or folder == best):
                raise FieldError(
                    f"out_dir {self.out_dir}: {folder} cannot be written into: {reason}"
                )
        # 3. the files in both
        for folder in (best.parent, best):
            for name in FILES:
                if (folder / name).is_dir():
                    raise FieldError(
                        f"out_dir {self.out_dir}: {folder / name} is a folder, and the run writes "
                        "a file there; choose another --out_dir, or --fresh, which puts it aside"
                    )

    def fetch_sources(self) -> None:
        """Download what is named as on the hub. Raises FieldError for what is not there."""
        for name in ("init", "vision", "text", "tokenizer"):
            place = getattr(self, name, "").removeprefix("official:")
            try:
                find_folder(place, "tokenizer" if name == "tokenizer" else "weights")
            except ValueError as error:
                raise FieldError(f"{name} {error}") from None

    def check_sources(self) -> None:
        """Raises FieldError if --fresh would move away what the run starts from."""
        for name in SOURCES:
            place = getattr(self, name, "")
            file = Path(place.removeprefix("official:"))  # of finetune.py's --init
            if place and is_moved(file, Path(self.out_dir)):
                raise FieldError(
                    f"{name} {place} is in --out_dir {self.out_dir}, whose files --fresh moves "
                    "away; choose another --out_dir"
                )

    def model_defaults(self, model_fields: dict) -> dict:
        """The model's fields as the help page shows them."""
        return dataclasses.asdict(self.architecture()) | model_fields

    def unit(self) -> int:
        """How many neighbouring rows of a batch must stay in one process."""
        return 1

    def group_size(self) -> int:
        """How many rows a dataset with `lengths` groups."""
        return largest_divisor(self.batch_size, self.micro_batch_size)


@dataclass
class TowerRunConfig(RunConfig):
    """What pre-training and fine-tuning of ManagerTower have in common."""

    identity_fields: ClassVar[tuple[str, ...]] = (
        *RunConfig.identity_fields,
        "lr_mult_head",
        "lr_mult_cross_modal",
        "transform",
    )

    model: str = option(
        "tiny",
        "preset of the architecture; each of its fields is a flag",
        choices=("tiny", "base", "large"),
    )
    transform: str = option(
        "clip",
        "what a picture goes through",
        choices=("clip", "albef", "albef_randaug_wc", "albef_randaug_wohf"),
    )
    lr_mult_head: float = option(
        1.0, "learning rate of the heads, in units of learning_rate", least=0
    )
    lr_mult_cross_modal: float = option(
        1.0, "learning rate of the cross-modal part, in the same units", least=0
    )

    def model_defaults(self, model_fields: dict) -> dict:
        return dataclasses.asdict(getattr(self.architecture, self.model)()) | model_fields


def refuse_idle_flags(argv: list[str], idle: dict[str, str]) -> None:
    """Raises ValueError for a flag of the command line that means nothing beside the others.

    idle: the flags that do so -> why, in words with the other flag. What a recipe sets does not
    count.
    """
    # flags are never abbreviated, and a value that begins with -- is written behind a =
    for word in argv:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name in idle:
            raise ValueError(f"--{name} means nothing {idle[name]}")


# ---------------------------------------------------------------- to go on without the beginning
def goes_on(run: RunConfig) -> bool:
    """Whether there is a training state in out_dir to go on from."""
    return state_file(run.out_dir, run.shard).exists() and not run.fresh


def is_beginning_gone(run: RunConfig) -> bool:
    """Whether a run goes on, and the weights that it began with are no longer there.

    It does not need them: its training state has all weights, and the model's config.
    """
    # a new run needs them
    if not goes_on(run):
        return False
    # not every script has all of these flags
    for name in ("init", "vision", "text"):
        place = getattr(run, name, "").removeprefix("official:")
        if place not in ("", "unimodal") and not is_at_hand(place):
            return True
    return False


def stored_config(run: RunConfig, fields: dict) -> Any:
    """The model's config of the run to go on with, with `fields` replaced. Raises ValueError.

    `Checkpoint` then refuses fields that change it.
    """
    # what the run is told apart by holds all fields of its model
    file = state_file(run.out_dir, run.shard)
    if run.shard:
        identity = read_index(file.parent).identity
    else:
        identity = json.loads(read_training_state(file)["identity"])
    stored: Any = identity.get("config")
    try:
        return run.architecture(**{**stored, **fields})
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} is not the training state of a "
            f"{run.architecture.__name__.removesuffix('Config')} ({first_line_of(error)})"
        ) from error


def measure_untrained(run: RunConfig, evaluate: Callable[[], dict]) -> dict[str, dict]:
    """The baseline of the model as it began; empty where that can no longer be had."""
    # a model without its first weights would give other numbers
    if is_beginning_gone(run):
        return {}
    return {"untrained": evaluate()}


# ---------------------------------------------------------------- what is trained
def make_generator(device: torch.device) -> torch.Generator:
    """A generator on the device; the meta device, where bench.py counts FLOPs, has none."""
    return torch.Generator("cpu" if device.type == "meta" else device)


class Task(nn.Module):
    """What `fit` trains: a model with its losses.

    forward(batch) -> {name: sum of a loss over this process' rows}; counts(batch) -> {name: how
    many terms that sum has}. Before each forward pass `train_step` sets `shares`, the rows of every
    process in this micro-step, and seeds `negatives`, which draws the same numbers on every
    process.
    """

    # DDP has to know when the losses do not reach all parameters
    leaves_parameters_unused = False

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model
        # a generator of its own, so that it does not disturb dropout and noise
        self.negatives = make_generator(next(model.parameters()).device)
        self.shares: list[int] = [0]

    def counts(self, batch: dict) -> dict[str, int]:
        raise NotImplementedError("a task says how many terms its losses have")


# ---------------------------------------------------------------- optimizer and schedule
# Names of norm weights that the official code's substring rule leaves without weight decay. It
# misses CLIP's norms, the managers' norms of experts and the classifiers' norms, whose names do not
# hold "LayerNorm.weight": these are decayed.
UNDECAYED = re.compile(
    r".*\.bias"
    r"|.*\.shift"
    r"|(text_encoder|text_layers|image_layers|heads\.mlm)\.(.*\.)?ln(_\d)?\.weight"
    r"|.*\.norm_query\.weight"
    r"|(text|image)_bridges\.\d+\.weight"
)
CROSS_MODAL = re.compile(
    r"(text|image)_(transform|pooler|layers|managers|bridges)\.|heads\.itc\.(text|image)\."
)
HEADS_AT_BASE_RATE = ("itc", "retrieval")  # the official code gives these two no rate of their own


def make_groups(model: nn.Module, rule: Callable[[str], tuple[float, float]]) -> list[dict]:
    """AdamW's groups of the trainable parameters; rule(name) -> (learning rate, weight decay)."""
    # parameters with the same two numbers share a group, so every parameter is in exactly one
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[rule(name)].append(parameter)
    # set_learning_rate scales "lr", and "peak_lr" stays
    return [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def param_groups(model: nn.Module, run: TowerRunConfig) -> list[dict]:
    """ManagerTower's groups: encoders, heads, cross-modal, each with and without weight decay."""

    def rule(name: str) -> tuple[float, float]:
        # 1. the learning rate: heads, cross-modal part, and the encoders, which have the base rate
        scale = 1.0
        if name.startswith("heads.") and name.split(".")[1] not in HEADS_AT_BASE_RATE:
            scale = run.lr_mult_head
        elif CROSS_MODAL.match(name):
            scale = run.lr_mult_cross_modal
        # 2. the weight decay
        decay = 0.0 if UNDECAYED.fullmatch(name) else run.weight_decay
        return scale * run.learning_rate, decay

    return make_groups(model, rule)


def lr_multiplier(step: int, max_steps: int, warmup: int, schedule: str) -> float:
    """Linear from 0 over `warmup` updates, then linear or cosine to 0."""
    # update 0 has the rate 0, as in the official code
    if step < warmup:
        return step / warmup
    # the part of the way down that is left, from 1 to 0
    rest = max(0.0, (max_steps - step) / max(1, max_steps - warmup))
    if schedule == "linear":
        return rest
    return 0.5 * (1 + math.cos(math.pi * (1 - rest)))


def set_learning_rate(optimizer: torch.optim.Optimizer, run: RunConfig, step: int) -> float:
    """Give every group its rate of this step. Returns the multiplier of the peak rates."""
    # a part of the whole run, rounded up as in the official code
    warmup_steps = math.ceil(run.max_steps * run.warmup)
    multiplier = lr_multiplier(step, run.max_steps, warmup_steps, run.schedule)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier
    return multiplier


def make_optimizer(groups: list[dict], run: RunConfig, device: torch.device) -> torch.optim.AdamW:
    # HF's AdamW, which the official code uses, adds eps before the bias correction and decays after
    # the update: with eps 1e-8 the updates agree to 1e-3 relative
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, betas=(0.9, run.beta2), eps=1e-8, fused=fused)


# ---------------------------------------------------------------- checkpoints
def find_tokenizer_of(run: RunConfig, find: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer of the checkpoint that the run goes on from; without one, find().

    So a resumed run keeps its ids, whatever has become of the data. A tokenizer that the user names
    is always taken, if it is still there, and `Checkpoint` refuses it if it is another one.
    """
    # 1. the checkpoint's own
    folder = Path(run.out_dir)
    stored = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    is_named = run.tokenizer and is_at_hand(run.tokenizer, "tokenizer")
    if goes_on(run) and stored and not is_named:
        return load_tokenizer(folder)
    # 2. a new run's
    return find()


# what torch makes of a file that is damaged, or is something else
BROKEN_STATE = (*BROKEN, pickle.UnpicklingError, AssertionError)
STATE = {  # in training_state.pt
    "step": int,
    "best": float | int | None,
    "identity": str,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
}


def check_archive(file: Path) -> None:
    """Raises ValueError for what torch.load should not be given: it believes any size."""
    if not file.is_file():
        raise ValueError("it is a folder, a device or a pipe")
    if not is_archive(file):
        raise ValueError("it is no file of torch.save")
    TorchFile(file).check_tensors()


def read_training_state(file: Path) -> dict:
    """The content of a training_state.pt. Raises ValueError for anything else."""
    try:
        check_archive(file)
        # weights_only: a pickle from elsewhere executes nothing; mmap: no second copy in memory
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        check_parts(state)
    except BROKEN_STATE as error:
        reason = first_line_of(error).removeprefix(f"{file} ")
        raise ValueError(
            f"{file} is not a readable training state ({reason}); --fresh starts anew"
        ) from error
    return state


def check_parts(state: Any) -> None:
    """Raises ValueError unless a training state has all its parts, each of its type."""
    if not isinstance(state, dict) or not all(name in state for name in STATE):
        raise ValueError(f"it does not hold {', '.join(STATE)}")
    for name, declared in STATE.items():
        # a bool is no number
        if isinstance(state[name], bool) or not isinstance(state[name], declared):
            raise ValueError(f"{name} is {show(state[name])}")
    if state["best"] is not None and not math.isfinite(state["best"]):
        raise ValueError(f"best is {state['best']}")
    identity = json.loads(state["identity"])
    if not isinstance(identity, dict) or not {"max_steps", "batch_size", "seed"} <= identity.keys():
        raise ValueError(f"identity is {show(state['identity'])}")


def check_tensor(name: str, tensor: Any, like: Tensor) -> None:
    """Raises ValueError unless it is a finite tensor of this shape and dtype."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is {show(tensor)}, not a tensor")
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        ours = f"{like.dtype} {tuple(like.shape)}"
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {ours}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} is not finite")


def check_model_state(state: dict, model: nn.Module) -> None:
    """Raises ValueError unless these are the tensors of the model."""
    ours = model.state_dict()
    # 1. the same names in both
    differing = sorted(str(name) for name in state.keys() ^ ours.keys())
    if differing:
        raise ValueError(f"it is of another model: {show(differing)} is in one of them only")
    # 2. the same shapes, and numbers that a run can go on with
    for name, tensor in ours.items():
        check_tensor(name, state[name], tensor)


# what a group of parameters is updated with, besides the learning rate of the step
SETTINGS_OF_A_GROUP = (
    "peak_lr",
    "weight_decay",
    "eps",
    "betas",
    "amsgrad",
    "maximize",
    "differentiable",
)


def check_group(group: dict, our_group: dict) -> None:
    """Raises ValueError unless a group of an optimizer has the settings of ours."""
    if not math.isfinite(group["lr"]):
        raise ValueError(f"its optimizer has the learning rate {group['lr']}")
    for name in SETTINGS_OF_A_GROUP:
        theirs = group[name]
        ours = our_group[name]
        if isinstance(theirs, list):
            theirs = tuple(theirs)
        if theirs != ours:
            raise ValueError(f"{name} of its optimizer is {show(theirs)}, not {show(ours)}")


def check_optimizer_state(state: dict, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError unless these are the numbers of an AdamW with the same parameters."""
    # 1. the groups, and which parameter each number of the state stands for
    groups = state["param_groups"]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"its optimizer has {len(groups)} groups, not {len(optimizer.param_groups)}"
        )
    parameter_of: dict[Any, Tensor] = {}
    for group, our_group in zip(groups, optimizer.param_groups, strict=True):
        check_group(group, our_group)
        if len(group["params"]) != len(our_group["params"]):
            raise ValueError("a group of its optimizer has another number of parameters")
        parameter_of.update(zip(group["params"], our_group["params"], strict=True))
    # 2. AdamW's two moments of each parameter, and how many updates it had
    for number, moments in state["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            check_tensor(f"{name} of parameter {number}", moments[name], parameter_of[number])
        check_tensor(f"step of parameter {number}", moments["step"], torch.zeros(()))


class Checkpoint:
    """out_dir: training_state.pt (the truth), the files for users (its weights), best/, log.jsonl.

    With --shard the folder sharded_state takes the place of training_state.pt, as shard.py says.
    identity: what else than `run.identity_fields` changes the numbers: the model's config, the
    digests of data and tokenizer. save_extras(folder) writes what belongs to the model besides its
    weights.
    """

    def __init__(
        self,
        run: RunConfig,
        model: nn.Module,
        save_extras: Callable[[Path], None],
        identity: dict,
        world: World,
    ):
        # what is saved
        self.run = run
        self.model = model
        self.save_extras = save_extras
        self.world = world
        # where it is saved
        self.folder = Path(run.out_dir)
        self.state_file = state_file(run.out_dir, run.shard)
        self.log_file = self.folder / "log.jsonl"
        # how far the run is, and how good it was at its best
        self.step = 0  # of the last training state
        self.best: float | None = None  # the highest score so far
        self.tracker: Any = None  # of --log, from the first row on
        fields = {name: getattr(run, name) for name in run.identity_fields}
        # through JSON and back, as it will be read: lists for tuples
        self.identity = json.loads(json.dumps({**fields, **identity}))

    def guard(self, action: Callable[[], Any], what: Path, everywhere: bool = False) -> None:
        """Run it on rank 0, which alone writes, or everywhere. Raises ValueError for a disk error.

        A write that fails leaves the file that was there.
        """
        if self.world.rank > 0 and not everywhere:
            return
        try:
            action()
        except OSError as error:
            reason = getattr(error, "strerror", None) or error
            kept = "Nothing is lost"
            if self.step:
                kept = f"The last good checkpoint, of step {self.step}, is untouched"
            raise ValueError(f"cannot write {what}: {reason}. {kept}") from error

    def what_is_kept(self) -> str:
        """For a message: what is left of the run if it ends now."""
        if self.step:
            return f"The checkpoint of step {self.step} is kept"
        return "There is no checkpoint yet"

    def what_goes_on(self) -> str:
        """For a message: what to type to go on."""
        without = ", without --fresh," if self.run.fresh else ""
        return f"the same command{without} goes on"

    def make_folder(self) -> None:
        """Rank 0 makes out_dir, the others wait for it."""
        reason = why_no_folder(self.folder)
        if reason:
            raise ValueError(f"--out_dir {self.folder} cannot be written into: {reason}")
        self.guard(lambda: self.folder.mkdir(parents=True, exist_ok=True), self.folder)
        # the others may look into the folder only when it is there
        self.world.barrier()

    def resume(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
        """Load training_state.pt if it is there, and return the step to go on from.

        Raises ValueError if the folder holds another run, or somebody's weights.
        """
        # 1. --fresh puts the old run aside, and leaves all else that lies in the folder
        if self.run.fresh:
            self.guard(self.put_old_run_aside, self.folder)
        self.world.barrier()
        # 2. go on, or begin in a folder that holds no run yet
        if self.state_file.exists():
            self.load(optimizer, scaler)
        elif not self.run.fresh:
            self.refuse_foreign_files()
        # 3. now that the folder is known to be this run's, remove what a death amid a write left
        for folder in (self.folder, self.folder / "best"):
            self.guard(functools.partial(remove_temporary_files, folder, FILES), folder)
        if self.run.shard:
            self.guard(lambda: remove_old_parts(self.state_file.parent), self.state_file.parent)
        # 4. what was logged after the state was saved will be logged again
        self.guard(self.cut_log, self.log_file)
        return self.step

    def put_old_run_aside(self) -> None:
        """Move the files of the run that lies here, and say where they are."""
        target = move_old_run(self.folder)
        if target:
            print(f"--fresh: the files of the old run are in {target} now", flush=True)

    def refuse_foreign_files(self) -> None:
        """Raises ValueError if a folder without a training state holds files that a run would lose.

        What a death before the first training state leaves is a log of this very run, and best/.
        """
        advice = "choose another --out_dir, or --fresh, which puts them aside"
        missing = f"but no {self.state_file.relative_to(self.folder)} to go on from"
        # these come after the training state
        for name in EXPORTED:
            if (self.folder / name).exists():
                raise ValueError(f"{self.folder} has a {name} {missing}; {advice}")
        # and these before it
        if self.log_file.exists():
            reason = self.why_not_own_log()
            if reason:
                raise ValueError(f"{self.folder} has a log.jsonl {missing}: {reason}; {advice}")
        elif any((self.folder / "best" / name).exists() for name in EXPORTED):
            raise ValueError(f"{self.folder} has a best/ {missing}; {advice}")

    def why_not_own_log(self) -> str:
        """Why log.jsonl is not of this run before its first training state; empty if it is."""
        try:
            rows = read_log(self.log_file)
        except ValueError as error:
            return str(error)
        # the first row says what the run was made of
        header = rows[0].get("header") if rows else None
        identity = header.get("identity") if isinstance(header, dict) else None
        if not isinstance(identity, dict):
            return "it does not begin as the log of a run does"
        differences = different_values(identity, self.identity)
        if differences:
            return f"it is of another run ({'; '.join(differences[:4])})"
        # a state is saved at save_every: if the log goes beyond, somebody has removed it
        last = max(row["step"] for row in rows)
        if last > self.run.save_every:
            return f"it goes on to step {last}, so there was one"
        return ""

    def load(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Fill model, optimizer and scaler from training_state.pt. Raises ValueError."""
        if self.run.shard:
            self.load_shards(optimizer)
            return
        state = read_training_state(self.state_file)
        self.refuse_another_run(json.loads(state["identity"]))
        # all is looked at before anything is changed
        try:
            if not 0 < state["step"] <= self.run.max_steps:
                raise ValueError(f"step is {state['step']} of {self.run.max_steps}")
            check_model_state(state["model"], self.model)
            check_optimizer_state(state["optimizer"], optimizer)
            self.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
        except BROKEN_STATE as error:
            reason = first_line_of(error)
            if isinstance(error, LookupError):
                reason = f"its optimizer lacks {reason}"
            raise ValueError(
                f"{self.state_file} is not the training state of this run ({reason}); --fresh "
                "starts anew"
            ) from error
        # where it was
        self.best = state["best"]
        self.step = state["step"]

    def refuse_another_run(self, identity: dict) -> None:
        """Raises ValueError if a state is of a run that computes other numbers."""
        differences = different_values(identity, self.identity)
        if differences:
            raise ValueError(
                f"{self.folder} holds another run ({'; '.join(differences[:4])}); choose another "
                "--out_dir, or --fresh starts anew"
            )

    def load_shards(self, optimizer: torch.optim.Optimizer) -> None:
        """`load` for --shard."""
        # 1. whose it is
        folder = self.state_file.parent
        index = read_index(folder)
        self.refuse_another_run(index.identity)
        # 2. this process' rows, whatever number of processes has written them
        try:
            if not 0 < index.step <= self.run.max_steps:
                raise ValueError(f"step is {index.step} of {self.run.max_steps}")
            load_state(folder, index, self.model, optimizer, self.world)
        except ValueError as error:
            raise ValueError(
                f"{folder} is not the training state of this run ({first_line_of(error)}); "
                "--fresh starts anew"
            ) from error
        # 3. where it was
        self.best = index.best
        self.step = index.step

    def cut_log(self) -> None:
        """Drop the rows after the saved step; a log without a header gets one."""
        rows = read_log(self.log_file) if self.log_file.exists() else []
        kept = [row for row in rows if row.get("step", 0) <= self.step]
        if not any("header" in row for row in kept):
            kept.insert(0, {"step": 0, "header": self.header()})
        write_text(self.log_file, "".join(json.dumps(row) + "\n" for row in kept))

    def header(self) -> dict:
        """What the numbers of a log depend on besides the flags."""
        return {
            "version": VERSION,
            "torch": torch.__version__,
            "device": self.world.device.type,
            "precision": resolve_precision(self.run.precision, self.world.device),
            "identity": self.identity,
        }

    def log(self, row: dict) -> None:
        """Append a row to log.jsonl."""

        # a death amid this write leaves half a row, which `read_log` leaves out
        def append() -> None:
            if self.run.log and self.tracker is None:
                self.tracker = open_tracker(self.run.log, self.folder, self.step)
            with open(self.log_file, "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.tracker is not None:
                self.tracker.write(row)

        self.guard(append, self.log_file)

    def record(self, step: int, metrics: dict, bar: tqdm) -> None:
        """Log an evaluation, and keep the weights in best/ if they score higher than all before."""
        self.log({"step": step, "eval": metrics})
        if self.world.rank == 0:
            numbers = [f"{name} {x:.4g}" for name, x in metrics.items() if isinstance(x, float)]
            bar.write(f"step {step}: {', '.join(numbers)}")
        # higher is better, whatever the score is
        if self.best is None or metrics["score"] > self.best:
            self.best = metrics["score"]
            best = self.folder / "best"
            self.export(best, best)

    def save(
        self, step: int, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        """training_state.pt, then the users' files. The next start mends a death in between."""
        if self.run.shard:
            self.save_shards(step, optimizer)
        else:
            self.guard(lambda: self.save_whole(step, optimizer, scaler), self.state_file)
        # from here on this is the last good checkpoint, whatever becomes of the users' files
        self.step = step
        self.export(self.folder, self.state_file)

    def save_whole(
        self, step: int, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        """Replace training_state.pt."""
        # every random number is drawn from (seed, step): the step is all the random state there is
        state = {
            "step": step,
            "best": self.best,
            "identity": json.dumps(self.identity),
            "model": self.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        write_atomically(self.state_file, lambda path: torch.save(state, path))

    def save_shards(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Replace sharded_state: the files of all processes first, then what says that they count.

        Until then the files of the last state stay, and index.json names those.
        """
        # 1. the folder, for all
        folder = self.state_file.parent
        self.guard(lambda: folder.mkdir(exist_ok=True), folder)
        self.world.barrier()
        # 2. each process its rows
        rank = self.world.rank
        write_own = functools.partial(write_part, folder, step, self.model, optimizer, rank)
        self.guard(write_own, folder, everywhere=True)
        self.world.barrier()
        # 3. now that all files are there, the index, and nothing needs the old ones any more
        index = Index(step, self.best, self.identity, self.world.size, {})
        self.guard(lambda: write_index(folder, index, self.model, optimizer), self.state_file)
        self.guard(lambda: remove_old_parts(folder), folder)

    def export(self, folder: Path, what: Path) -> None:
        """What users of the model need: weights, config.json, tokenizer. All processes call it.

        what: what it is a part of, for a message.
        """
        # before the guard, which only rank 0 passes: all processes have a part of them
        if self.run.shard:
            weights = whole_weights(self.model, self.world.rank)
        else:
            weights = self.model.state_dict()

        def write() -> None:
            # evaluation shows the model pictures as training did, so config.json says how
            transform = getattr(self.run, "transform", None)
            save_folder(weights, self.model.config, folder, transform)
            self.save_extras(folder)

        self.guard(write, what)


def different_values(theirs: dict, ours: dict) -> list[str]:
    """Where two identities differ, in words; the config of the model is compared key by key.

    Only what both have is compared: a field that a later version adds changes no older run.
    """
    differences = []
    for name, value in ours.items():
        if name not in theirs or theirs[name] == value:
            continue
        if isinstance(value, dict) and isinstance(theirs[name], dict):
            differences += different_values(theirs[name], value)
        else:
            differences.append(f"{name} was {show(theirs[name])}, is {show(value)}")
    return differences


# ---------------------------------------------------------------- the loop
cached_plan = functools.cache(BatchPlan)  # every step asks for it, and nobody changes it


def make_plan(run: RunConfig, world: World) -> BatchPlan:
    """Which rows of a global batch each process takes, and in how many micro-steps."""
    return cached_plan(run.batch_size, run.micro_batch_size, world.size, run.unit())


def make_loader(
    dataset: Any,
    run: RunConfig,
    world: World,
    start_step: int,
    collate: Callable = collate,
) -> DataLoader:
    """This process' micro-batches from start_step on.

    A dataset with `lengths` is read in groups of rows of similar lengths (LLaVA).
    """
    # the order of the rows is the same for any number of processes; this one takes its share
    sampler = GlobalBatchSampler(
        len(dataset),
        make_plan(run, world),
        world.rank,
        run.seed,
        start_step,
        run.max_steps,
        getattr(dataset, "lengths", None),
        run.group_size(),
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=run.num_workers,
        pin_memory=world.device.type == "cuda",
        persistent_workers=run.num_workers > 0,
    )


def compiles(run: RunConfig, device: torch.device) -> bool:
    """Whether the layers are compiled: as --compile says, or on CUDA if a compiler is there."""
    if run.compile is not None:
        return run.compile
    has_compiler = find_spec("triton") is not None and shutil.which("cc") is not None
    return device.type == "cuda" and has_compiler


# A compiled layer is compiled anew for training and for evaluation, for each kind of its inputs,
# and once for all batch sizes after the first one; all layers of a class are counted together.
MOST_RECOMPILATIONS = 64


def wrap(task: Task, run: RunConfig, world: World) -> nn.Module:
    """The task compiled, if so wished, and in DDP if there are several processes."""
    if compiles(run, world.device):
        from torch._dynamo import config as dynamo  # it takes seconds, so only where it is needed

        dynamo.recompile_limit = MOST_RECOMPILATIONS
        world.print("The layers are compiled, so the first steps are slow; not so: --compile false")
        # block by block, in place: quick, and no key of the state is renamed
        for module in task.model.modules():
            if isinstance(module, task.model.blocks_to_compile):
                module.compile()
    # one process needs no wrapper around its gradients, and shards have their own
    if world.size == 1 or run.shard:
        return task
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(
        task, device_ids=device_ids, find_unused_parameters=task.leaves_parameters_unused
    )


def count_terms(task: Task, batches: list[dict], world: World) -> tuple[list[str], Tensor]:
    """The names of the losses, and how many terms each has in the global batch.

    The second is a float64 tensor (losses,), at least 1 everywhere.
    """
    # over the micro-batches of this process, then over all processes
    counts = [task.counts(batch) for batch in batches]
    names = list(counts[0])
    own = [float(sum(count[name] for count in counts)) for name in names]
    totals = torch.tensor(own, dtype=torch.float64, device=world.device)
    return names, world.sum(totals).clamp(min=1)


def train_step(
    task: Task,
    module: Any,
    batches: list[dict],
    step: int,
    run: RunConfig,
    world: World,
    scaler: torch.amp.GradScaler,
) -> dict[str, float]:
    """Forward and backward of one global batch. Returns the mean losses over it.

    module: the task as `wrap` gives it.
    """
    # the denominators come before the first forward pass, for a mean over the whole global batch
    names, counts = count_terms(task, batches, world)
    sizes = make_plan(run, world).sizes
    totals = torch.zeros_like(counts)
    for i, batch in enumerate(batches):
        # dropout and the managers' noise differ between the processes
        seed_all(run.seed, step, i, world.rank)
        # hard negatives are drawn by all processes alike
        task.negatives.manual_seed(seed_of(run.seed, step, i))
        task.shares = sizes[i]
        # no synchronisation of the gradients before the last micro-batch
        is_last = i == len(batches) - 1
        keep_local = module is not task and not is_last
        with module.no_sync() if keep_local else contextlib.nullcontext():
            with autocast(run.precision, world.device):
                sums = module(to_device(batch, world.device))
            # DDP averages the gradients over the processes: hence world.size
            loss = sum(sums[name] * (world.size / counts[k]) for k, name in enumerate(names))
            scaler.scale(loss).backward()
        # for the log: sums over this process, then over all of them
        totals += torch.stack([sums[name].detach() for name in names]).double()
    # what --shard does not deal has gradients of this process' rows alone
    if run.shard:
        average_whole_gradients(task, world)
    means = (world.sum(totals) / counts).tolist()
    return dict(zip(names, means, strict=True))


def apply_gradients(
    task: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, run: RunConfig
) -> float:
    """Clip, update, clear. Returns the norm of the gradients before clipping.

    Without a finite norm there is no update.
    """
    # fp16 gradients carry the scale of the loss; without fp16 this does nothing
    scaler.unscale_(optimizer)
    # the norm of all gradients together, as if they were one vector
    trained = [parameter for parameter in task.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    if run.shard:
        norm = clip_sharded_gradients(trained, run.grad_clip)
    else:
        norm = nn.utils.get_total_norm(gradients)
        if run.grad_clip:
            nn.utils.clip_grads_with_norm_(trained, run.grad_clip, norm)
    if scaler.is_enabled() or torch.isfinite(norm):
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def check_finite(
    numbers: dict[str, float], step: int, batches: list[dict], dataset: Any, checkpoint: Checkpoint
) -> None:
    """Raises ValueError, naming the samples, if a loss or the gradient's norm is not finite."""
    if all(math.isfinite(number) for number in numbers.values()):
        return
    # somebody has to look at the samples, so name them, the first ones of a large batch
    names = []
    for batch in batches:
        for index in batch["image_index"]:
            names.append(dataset.source.name(int(index)))
    samples = ", ".join(names[:16])
    if len(names) > 16:
        samples += f" and {len(names) - 16} more"
    raise ValueError(
        f"the loss is not finite at step {step}: {numbers}. Samples: {samples}. "
        f"{checkpoint.what_is_kept()}"
    )


def check_weights(model: nn.Module, step: int, checkpoint: Checkpoint) -> None:
    """Raises ValueError if an update has made a weight infinite or NaN, before it is saved."""
    # a finite loss of this step says nothing about the weights that the step has made
    names = []
    flags = []
    for name, parameter in model.named_parameters():
        names.append(name)
        flags.append(~torch.isfinite(own_part(parameter)).all())
    # with --shard each process has seen a part of them
    is_broken = checkpoint.world.sum(torch.stack(flags).int()).bool().tolist()
    if any(is_broken):
        raise ValueError(
            f"the weights are not finite after step {step}: {names[is_broken.index(True)]}. Is "
            f"--learning_rate too high? {checkpoint.what_is_kept()}"
        )


MOST_SKIPPED = 100  # steps in a row that an fp16 run may spend on looking for its scale


def check_scale(skipped: int, made: int, is_last: bool) -> None:
    """Raises ValueError if an fp16 run learns nothing.

    skipped: how many steps without an update there were in a row; made: updates before them.
    """
    if skipped >= MOST_SKIPPED or (is_last and skipped and not made):
        raise ValueError(
            f"with --precision fp16 the last {skipped} steps made no update, as their gradients "
            "were not finite; use --precision bf16 or fp32, or a lower --learning_rate"
        )


def is_due(done: int, every: int, last: int) -> bool:
    """Whether what happens every so many steps (0 = never), and after the last one, is due."""
    return done == last or (every > 0 and done % every == 0)


def announce(run: RunConfig, world: World, start: int) -> None:
    """Say what is going to run."""
    begin = f"resuming after step {start}" if start else f"{run.max_steps} steps"
    # where the processes do not divide the batch, some have a row more than others
    plan = make_plan(run, world)
    smallest = min(min(sizes) for sizes in plan.sizes)
    largest = max(max(sizes) for sizes in plan.sizes)
    rows = f"{largest}" if smallest == largest else f"{smallest} to {largest} rows"
    world.print(
        f"{run.out_dir}: {begin}, batch {run.batch_size} = {rows} x {world.size} processes x "
        f"{len(plan.sizes)} micro-batches, {world.device}, torch {torch.__version__}"
    )


@contextlib.contextmanager
def stoppable(checkpoint: Checkpoint, world: World) -> Iterator[Tensor]:
    """The time of a run's steps. It gives a tensor (1,) that a SIGTERM sets to 1.

    What else ends the steps from outside says what is kept: Ctrl-C, and Stopped where a SIGTERM has
    ended the processes that load data.
    """
    # SIGTERM, which clusters send before they take a machine away, sets a flag that the loop looks
    # at after each step
    terminated = torch.zeros(1, device=world.device)
    previous = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: terminated.fill_(1))
    try:
        yield terminated
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted. {checkpoint.what_is_kept()}") from None
    except RuntimeError as error:
        # that process has said why, if it was not killed
        if is_lost_connection(error) and world.rank == 0:
            print(
                f"another process of this run has ended. {checkpoint.what_is_kept()}",
                file=sys.stderr,
                flush=True,
            )
        # a signal to the whole group of processes ends those that load data at once
        if terminated.item() == 0 or not is_worker_death(error):
            raise
        raise Stopped(
            f"SIGTERM ended the processes that load data. {checkpoint.what_is_kept()}; "
            f"{checkpoint.what_goes_on()}"
        ) from error
    finally:
        # what comes after the steps may be ended at once again
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def fit(
    run: RunConfig,
    task: Task,
    dataset: Any,
    evaluate: Callable[[], dict],
    checkpoint: Checkpoint,
    world: World,
    groups: list[dict],
    collate: Callable = collate,
) -> None:
    """Train task.model to run.max_steps, going on from what lies in run.out_dir.

    evaluate(): metrics on held-out data, computed by all ranks; "score" (higher is better) decides
    what is kept in best/. Raises Stopped, after a save, if SIGTERM ends the run early.
    """
    if run.max_steps < 1:
        raise ValueError(
            f"--max_steps is {run.max_steps}; it must be from 1 on, and there must be rows to "
            "train on"
        )
    # one run a folder: rank 0 holds its lock until the end
    checkpoint.make_folder()
    with folder_lock(checkpoint.folder, needed=world.rank == 0):
        # with --shard a part of the model is left in each process
        if run.shard:
            shard_task(task, groups, resolve_precision(run.precision, world.device), world)
        # everything that the training state is loaded into
        optimizer = make_optimizer(groups, run, world.device)
        scaler = torch.amp.GradScaler(world.device.type, enabled=run.precision == "fp16")
        start = checkpoint.resume(optimizer, scaler)
        if start >= run.max_steps:
            # in case the last save died between the state and the users' files
            checkpoint.export(checkpoint.folder, checkpoint.folder)
            world.print(
                f"{run.out_dir} is finished: {start} of {run.max_steps} steps. --fresh starts anew."
            )
            return
        # the steps
        announce(run, world, start)
        loader = make_loader(dataset, run, world, start, collate)
        bar = tqdm(
            total=run.max_steps, initial=start, unit="step", disable=world.rank > 0, mininterval=1
        )
        # the bar is closed before an error is said
        with stoppable(checkpoint, world) as terminated, bar:
            module = wrap(task, run, world)
            learner = Learner(task, module, optimizer, scaler, checkpoint, updates=start)
            done = run_steps(learner, loader, evaluate, start, bar, terminated)
            bar.close()  # before the next line
            if done == run.max_steps:
                return
            world.print(
                f"SIGTERM: saved step {done} in {run.out_dir}; {checkpoint.what_goes_on()} from "
                "there."
            )
            # torchrun ends all processes as soon as one of them fails: rank 0 may still be saving
            world.barrier()
    raise Stopped


@dataclass
class Learner:
    """What a step of the training needs, and the steps that fp16 has left without an update."""

    task: Task
    module: nn.Module  # the task as `wrap` gives it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    checkpoint: Checkpoint
    updates: int  # that were made
    skipped: int = 0  # steps without an update since the last one

    def learn(self, step: int, batches: list[dict], dataset: Any) -> dict[str, float]:
        """Forward, backward and update of one global batch. Returns its row of the log.

        Raises ValueError rather than leave a broken update to be saved.
        """
        run = self.checkpoint.run
        # 1. forward, backward, update
        rate = run.learning_rate * set_learning_rate(self.optimizer, run, step)
        self.task.train()
        losses = train_step(
            self.task, self.module, batches, step, run, self.checkpoint.world, self.scaler
        )
        norm = apply_gradients(self.task, self.optimizer, self.scaler, run)
        # from here on `done` steps are done
        done = step + 1
        # 2. fp16's scaler expects norms that are not finite
        numbers = losses if self.scaler.is_enabled() else {**losses, "grad_norm": norm}
        check_finite(numbers, done, batches, dataset, self.checkpoint)
        # 3. stop a run in which fp16 finds no scale
        is_update = math.isfinite(norm)
        self.updates += is_update
        self.skipped = 0 if is_update else self.skipped + 1
        check_scale(self.skipped, self.updates, done == run.max_steps)
        loss = sum(losses.values())
        return {"step": done, "loss": loss, **losses, "lr": rate, "grad_norm": norm}


def run_steps(
    learner: Learner,
    loader: DataLoader,
    evaluate: Callable[[], dict],
    start: int,
    bar: tqdm,
    terminated: Tensor,
) -> int:
    """The steps from `start` on. Returns how many are done: all, or those before a SIGTERM, which
    sets `terminated` to 1.
    """
    # what stays the same in all steps
    checkpoint = learner.checkpoint
    run = checkpoint.run
    world = checkpoint.world
    batches = iter(loader)
    micro_steps = len(make_plan(run, world).sizes)
    began = time.monotonic()  # a clock that nobody sets
    for step in range(start, run.max_steps):
        # 1. this process' micro-batches of one global batch
        global_batch = [next(batches) for _ in range(micro_steps)]
        row = learner.learn(step, global_batch, loader.dataset)
        done = step + 1
        # 2. show and log
        speed = (done - start) * run.batch_size / (time.monotonic() - began)
        bar.set_postfix_str(
            f"loss {row['loss']:.3f}, lr {row['lr']:.1e}, {speed:.0f} samples/s", refresh=False
        )
        bar.update()
        if done == 1 or is_due(done, run.log_every, run.max_steps):
            checkpoint.log(row)
        # 3. measure on held-out data
        if is_due(done, run.eval_every, run.max_steps):
            check_weights(learner.task.model, done, checkpoint)
            with gathered(learner.task):
                metrics = evaluate()
            checkpoint.record(done, metrics, bar)
        # 4. save; all processes leave at the same step
        leave = world.sum(terminated.clone()).item() > 0
        if leave or is_due(done, run.save_every, run.max_steps):
            check_weights(learner.task.model, done, checkpoint)
            checkpoint.save(done, learner.optimizer, learner.scaler)
        if leave:
            return done
    return run.max_steps


# ---------------------------------------------------------------- the end of a run
def summarize(
    run: RunConfig, checkpoint: Checkpoint, baselines: dict[str, dict], commands: list[str]
) -> None:
    """Show held-out metrics beside the baselines', where the checkpoint is, what to type next."""
    log = read_log(checkpoint.log_file)
    evaluations = [row["eval"] for row in log if isinstance(row.get("eval"), dict)]
    metrics = evaluations[-1] if evaluations else {}  # somebody may have removed the log
    # a run that is finished already has logged them
    if not any("baselines" in row for row in log):
        checkpoint.log({"step": run.max_steps, "baselines": baselines})
    # a column for each baseline, a row for each metric that one of them has
    titles = "".join(f"{name.replace('_', ' '):>12s}" for name in baselines)
    print(f"{'held out':15s}{'this run':>12s}{titles}")
    for name in metrics:
        if name != "score" and any(name in values for values in baselines.values()):
            cells = [format_metric(name, column) for column in (metrics, *baselines.values())]
            print(f"{name:15s}{''.join(cells)}")
    print(
        f"The checkpoint is in {run.out_dir}, the best one in {run.out_dir}/best. Next:",
        *commands,
        sep="\n  ",
    )


def format_metric(name: str, column: dict) -> str:
    """A cell of the table: a percentage, a loss as it is, or empty if the column lacks it."""
    if not isinstance(column.get(name), int | float):
        return " " * 12
    return f"{column[name]:12.4f}" if name == "loss" else f"{column[name]:12.1%}"
