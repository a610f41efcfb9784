"""Pre-training, and the one training loop of the project: DDP, mixed precision, exact resume. finetune.py uses it too.

    python train.py                                                     # built-in demo data, a CPU is enough
    torchrun --standalone --nproc_per_node 8 train.py --recipe pretrain --data_root D --vision CLIP --text ROBERTA
    torchrun ... train.py --recipe llava_stage1 ...                     # the MLLM's recipes are in train_llava.py

ManagerTower: MLM + ITM (ACL 2023, section 4), on request ITC with hard negatives. Read `fit` first. Three rules make
runs exact. All randomness is a function of (seed, step) and of the position in the global batch. Losses are means over
the global batch, not means of means. `training_state.pt` is replaced atomically and is the only truth: after any death
the same command goes on.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import random
import re
import signal
import sys
import time
import typing
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import data
from llava_manager import DecoderLayer
from manager import Manager
from model import BertLayer, ManagerTower, ManagerTowerConfig, ViTBlock, load_unimodal, save_folder, write_atomically


@dataclass
class TrainConfig:
    """One run. Every field is a flag, and so is every field of the model's config."""
    architecture: typing.ClassVar[type] = ManagerTowerConfig
    hidden: typing.ClassVar[set[str]] = {"heads", "num_answers"}  # fields that are no flags: they follow from others
    min_steps: typing.ClassVar[int] = 1
    out_dir: str = "out/demo"
    data_root: str = ""  # manifests or .arrow files; empty = built-in demo data
    datasets: tuple[str, ...] = ("coco", "vg", "sbu", "cc3m")
    model: str = "tiny"  # tiny | base | large; its fields are flags of their own
    vision: str = ""  # pre-trained CLIP, .safetensors; empty = random weights
    text: str = ""  # pre-trained RoBERTa, .safetensors
    tokenizer: str = ""  # empty = the one beside --text, or a small BPE trained on the captions
    objectives: tuple[str, ...] = ("mlm", "itm")  # and itc, which brings hard negatives to itm
    share_images: bool = False  # MLM and ITM share one pass of the image encoder
    transform: str = "clip"
    on_bad_sample: str = "error"  # or skip: counted, logged, at most 1 in 1,000
    # optimisation
    max_steps: int = 600  # optimizer updates
    batch_size: int = 64  # global, whatever the number of processes
    micro_batch_size: int = 64  # per process and backward pass
    learning_rate: float = 1e-3
    lr_mult_head: float = 1.0
    lr_mult_cross_modal: float = 1.0
    weight_decay: float = 0.01
    beta2: float = 0.98
    warmup: float = 0.1  # part of max_steps
    schedule: str = "linear"  # linear | cosine, both to zero
    grad_clip: float = 0.0  # largest gradient norm; 0 = none, as in the papers' two-tower runs
    seed: int = 0
    # running
    log_every: int = 50
    save_every: int = 200
    eval_every: int = 300  # 0 = only at the end
    eval_size: int = 512  # held-out samples
    num_workers: int = 0
    precision: str = "auto"  # fp32 | bf16 | fp16; auto = bf16 on CUDA, fp32 elsewhere
    device: str = "auto"
    compile: bool = False
    checkpointing: bool = False  # recompute activations in the backward pass
    fresh: bool = False  # start anew instead of resuming

    def __post_init__(self):
        for name, allowed in (("precision", ("auto", "fp32", "bf16", "fp16")), ("schedule", ("linear", "cosine")),
                              ("model", ("tiny", "base", "large")), ("on_bad_sample", ("error", "skip"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)!r} must be one of {', '.join(allowed)}")
        unknown = set(self.objectives) - {"mlm", "itm", "itc"}
        if unknown or not self.objectives or ("itc" in self.objectives and "itm" not in self.objectives):
            raise ValueError(f"--objectives {','.join(self.objectives)} must be some of mlm,itm,itc; itc needs itm")
        if self.max_steps < self.min_steps:
            raise ValueError(f"--max_steps {self.max_steps} is below {self.min_steps}")
        for name in ("batch_size", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size:
            raise ValueError(f"--batch_size {self.batch_size} is not a multiple of --micro_batch_size "
                             f"{self.micro_batch_size}")
        if self.share_images and self.micro_batch_size % 2:
            raise ValueError(f"--share_images pairs rows: --micro_batch_size {self.micro_batch_size} must be even")


# (run, fields of the model). The papers' pre-training (ACL appendix A): 100k steps of 4,096 pairs, linear decay after
# 10k steps, heads and cross-modal layers at five times the encoders' learning rate.
RECIPES = {
    "demo": (TrainConfig(share_images=True), {}),
    "pretrain": (TrainConfig(
        out_dir="out/pretrain", model="base", max_steps=100_000, batch_size=4096, micro_batch_size=32,
        learning_rate=1e-5, lr_mult_head=5.0, lr_mult_cross_modal=5.0, save_every=1000, eval_every=5000,
        eval_size=4096, num_workers=8), {}),
    # the pictures of `prepare.py openclipart` and `prepare.py tuxpaint`, on a CPU
    "clipart": (TrainConfig(
        out_dir="out/clipart", data_root="out/clipart_data", datasets=("openclipart", "tuxpaint"),
        objectives=("mlm", "itm", "itc"), transform="albef", max_steps=600, eval_every=300), {}),
}
# what may differ between a run and its resumption
FREE_FIELDS = {"out_dir", "micro_batch_size", "log_every", "save_every", "eval_every", "num_workers", "device",
               "compile", "checkpointing", "fresh"}
COMPILED = (ViTBlock, BertLayer, Manager, DecoderLayer)


# ---------------------------------------------------------------- command line, from the dataclasses' fields
def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1")


def parse_optional(text: str) -> str | None:
    return None if text.lower() == "none" else text


def add_flags(parser: argparse.ArgumentParser, kind: type, hidden: set[str]):
    """A flag for each field of the dataclass `kind`; tuples are given as a,b,c."""
    how = {bool: {"type": parse_bool, "nargs": "?", "const": True}, str | None: {"type": parse_optional},
           tuple[str, ...]: {"type": lambda text: tuple(text.split(","))},
           tuple[int, ...]: {"type": lambda text: tuple(map(int, text.split(",")))},
           tuple | str: {"type": lambda text: json.loads(text) if text.startswith("[") else text}}  # --grid_pinpoints
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name not in hidden and (hints[field.name] in how or isinstance(hints[field.name], type)):
            parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS,
                                **how.get(hints[field.name], {"type": hints[field.name]}))


def parse_args(argv: list[str], recipes: dict, key: str) -> tuple[str, TrainConfig, dict]:
    """--{key} names the recipe, (run, fields of the model); every other flag overrides one of these fields.

    Returns the recipe's name, the run, and the fields of the model that differ from its preset.
    """
    parser = argparse.ArgumentParser(
        allow_abbrev=False, usage=f"{Path(sys.argv[0]).name} [--{key} {'|'.join(recipes)}] [--FIELD VALUE ...]")
    parser.add_argument(f"--{key}", choices=list(recipes), default=next(iter(recipes)))
    name = getattr(parser.parse_known_args(argv)[0], key)
    run, fields = recipes[name]
    add_flags(parser, type(run), {key, *run.hidden})
    add_flags(parser, run.architecture, run.hidden)
    given = vars(parser.parse_args(argv))
    of_run = {f.name for f in dataclasses.fields(run)}
    of_model = {k: v for k, v in given.items() if k not in {key, *of_run}}
    dead = [k for k in of_model if k.startswith(("manager_", "managed_", "mask_fused", "inject_")) and of_model[k]]
    if dead and (of_model.get("fusion", "manager") != "manager" or of_model.get("manager_type", "some") is None):
        raise ValueError(f"--{dead[0]} means nothing with --fusion bridge or last, or --manager_type none: no managers")
    return name, dataclasses.replace(run, **{k: v for k, v in given.items() if k in of_run}), fields | of_model


def one_sentence(main: Callable):
    """Run main(argv); what is wrong with the user's input ends in one sentence instead of a traceback."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        lines = str(error).strip().splitlines()
        # an error of a DataLoader worker comes with the worker's traceback, the sentence last
        sys.exit(f"error: {lines[-1] if 'DataLoader worker' in lines[0] else str(error)}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------- processes
class World:
    """This process among all: rank, size, device. Single-process without torchrun."""

    def __init__(self, device: str = "auto"):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch sees no CUDA device here")
        self.device = torch.device(f"cuda:{local}" if device == "cuda" else device)
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ and not dist.is_initialized():
            dist.init_process_group("nccl" if device == "cuda" else "gloo")

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def print(self, *args):
        if self.rank == 0:
            print(*args, flush=True)


class GatherWithGradient(torch.autograd.Function):
    """(B, ...) of every process -> (W * B, ...); the gradient of each part returns to the process that it came from."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    return GatherWithGradient.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


# ---------------------------------------------------------------- objectives
def contrastive_logits(model: ManagerTower, texts: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """ITC logits, text -> image and image -> text, (W*B, W*B) over the micro-batches of all W processes.

    The temperature is a divisor, clamped in place as in the official code.
    """
    head = model.heads["itc"]
    with torch.no_grad():
        head.temperature.clamp_(0.001, 0.5)
    text, image = (gather(x) for x in model.contrast(texts, images))
    logits = text @ image.T / head.temperature
    return logits, logits.T


def itc_loss(logits: Tensor, logits_t: Tensor, same: Tensor, rows: slice) -> Tensor:
    """Sum over this process' rows of the mean of both directions' cross-entropy; same (W*B, W*B): pairs that match."""
    targets = same / same.sum(1, keepdim=True)
    return sum(F.cross_entropy(x[rows], targets[rows], reduction="sum") for x in (logits, logits_t)) / 2


def negative_weights(logits: Tensor, same: Tensor) -> Tensor:
    """softmax(logits) without the matching pairs; a row with no weight left draws uniformly, its own pair too."""
    weights = torch.softmax(logits.detach(), dim=1).masked_fill(same.bool(), 0)
    return weights + 1e-5 * (weights.sum(1, keepdim=True) == 0)  # official: + 1e-5 when multinomial raises


def draw_negatives(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """A column for each row, texts then images (2 * W*B). All processes draw the same, and take their own rows."""
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


def hard_negative_itm(model: ManagerTower, texts: Tensor, images: Tensor, mask: Tensor, logits: tuple[Tensor, Tensor],
                      same: Tensor, rows: slice, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """ITM on (t, i), (t, hard i), (hard t, i), with negatives from all processes: logits (3B, 2), labels (3B)."""
    chosen = draw_negatives(torch.cat([negative_weights(x, same) for x in logits]), generator)
    image_of_text, text_of_image = (c[rows] for c in chosen.chunk(2))
    all_texts, all_images, all_masks = gather(texts), gather(images), gather(mask)
    features = model.fuse(torch.cat([texts, texts, all_texts[text_of_image]]),
                          torch.cat([images, all_images[image_of_text], images]),
                          torch.cat([mask, mask, all_masks[text_of_image]]))
    labels = torch.zeros(3 * len(mask), dtype=torch.long, device=mask.device)
    labels[: len(mask)] = 1
    return model.heads["itm"](features.pooled), labels


def contrastive_losses(model: ManagerTower, texts: Tensor, images: Tensor, mask: Tensor, generator: torch.Generator,
                       image_index: Tensor | None = None) -> dict[str, Tensor]:
    """Sums of ITC and of ITM with hard negatives, over this process' rows of one micro-batch of all processes.

    texts, images: experts (B, N, L, D_modality); captions with equal image_index (B,) match each other's picture.
    """
    logits = contrastive_logits(model, texts, images)
    index = torch.arange(len(logits[0]), device=mask.device) if image_index is None else gather(image_index)
    same = (index[:, None] == index).to(logits[0].dtype)
    start = len(mask) * (dist.get_rank() if dist.is_initialized() else 0)
    rows = slice(start, start + len(mask))
    itm, labels = hard_negative_itm(model, texts, images, mask, logits, same, rows, generator)
    return {"itc": itc_loss(*logits, same, rows), "itm": F.cross_entropy(itm, labels, reduction="sum")}


class Task(nn.Module):
    """What `fit` trains: forward(batch) -> {name: sum of a loss}, counts(batch) -> {name: its number of terms}."""
    leaves_parameters_unused = False

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.negatives = torch.Generator(next(model.parameters()).device)  # see train_step


class Pretraining(Task):
    """MLM + ITM, each with its own pass as in the official code, or with one shared image pass; and ITC."""

    def __init__(self, model: ManagerTower, objectives: tuple[str, ...], share_images: bool = False):
        super().__init__(model)
        self.objectives, self.share_images = objectives, share_images
        self.leaves_parameters_unused = "itm" not in objectives  # the poolers

    def counts(self, batch: dict) -> dict[str, int]:
        pairs = len(batch["input_ids"])
        counts = {"mlm": int((batch["mlm_labels"] != -100).sum()), "itc": pairs,
                  "itm": 3 * pairs if "itc" in self.objectives else pairs}
        return {name: counts[name] for name in self.objectives}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        model, mask, out = self.model, batch["attention_mask"], {}
        needed = self.share_images or {"mlm", "itc"} & set(self.objectives)
        images = model.encode_image(batch["pixels"]) if needed else None
        if "mlm" in self.objectives:
            masked = batch["mlm_labels"] != -100
            text = model.fuse(model.encode_text(batch["mlm_ids"], mask), images, mask).text
            logits = model.heads["mlm"](text[masked])  # the vocabulary is wide: only the masked tokens
            out["mlm"] = F.cross_entropy(logits, batch["mlm_labels"][masked], reduction="sum")
        if "itm" in self.objectives:
            texts = model.encode_text(batch["input_ids"], mask)
            if "itc" in self.objectives:
                return out | contrastive_losses(model, texts, images, mask, self.negatives)
            pooled = model.fuse(texts, self.itm_images(batch, images), mask).pooled
            out["itm"] = F.cross_entropy(model.heads["itm"](pooled), batch["itm_labels"], reduction="sum")
        return out

    def itm_images(self, batch: dict, images: Tensor) -> Tensor:
        """Experts of the pictures that ITM sees: a second pass; or, shared, false pairs take their partner's."""
        if not self.share_images:
            return self.model.encode_image(batch["itm_pixels"])
        own = torch.arange(len(images), device=images.device)
        return images[torch.where(batch["itm_labels"] == 1, own, own ^ 1)]


# ---------------------------------------------------------------- optimizer and schedule
# Names of norm weights that the official code's substring rule leaves without weight decay. It misses CLIP's norms, the
# managers' norms of experts and the classifiers' norms, whose names do not hold "LayerNorm.weight": these are decayed.
UNDECAYED = re.compile(r".*\.bias|.*\.shift|(text_encoder|text_layers|image_layers|heads\.mlm)\.(.*\.)?ln(_\d)?\.weight"
                       r"|.*\.norm_query\.weight|(text|image)_bridges\.\d+\.weight")
HEAD_LR = re.compile(r"heads\.(vqa|nlvr2|snli_ve|mlm|itm)\.")
CROSS_LR = re.compile(r"(text|image)_(transform|pooler|layers|managers|bridges)\.|heads\.itc\.(text|image)\.")


def make_groups(model: nn.Module, rule: Callable[[str], tuple[float, float]]) -> list[dict]:
    """AdamW's groups of the trainable parameters; rule(name) -> (learning rate, weight decay)."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[rule(name)].append(parameter)
    return [{"params": params, "lr": lr, "peak_lr": lr, "weight_decay": decay}
            for (lr, decay), params in groups.items()]


def param_groups(model: ManagerTower, run: TrainConfig) -> list[dict]:
    """Three learning rates (encoders, heads, cross-modal), each with and without weight decay."""
    def rule(name):
        scale = run.lr_mult_head if HEAD_LR.match(name) else run.lr_mult_cross_modal if CROSS_LR.match(name) else 1.0
        return scale * run.learning_rate, 0.0 if UNDECAYED.fullmatch(name) else run.weight_decay
    return make_groups(model, rule)


def lr_multiplier(step: int, max_steps: int, warmup: int, schedule: str) -> float:
    """Linear from 0 over `warmup` updates, then linear or cosine to 0. Update 0 has 0, as in the official code."""
    if step < warmup:
        return step / warmup
    rest = max(0.0, (max_steps - step) / max(1, max_steps - warmup))
    return rest if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - rest)))


def set_learning_rate(optimizer: torch.optim.Optimizer, run: TrainConfig, step: int) -> float:
    multiplier = lr_multiplier(step, run.max_steps, math.ceil(run.max_steps * run.warmup), run.schedule)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier
    return multiplier


def make_optimizer(groups: list[dict], run: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    # HF's AdamW, which the official code uses, adds eps before the bias correction and decays after the update: with
    # eps 1e-8 the updates agree to 1e-3 relative
    return torch.optim.AdamW(groups, betas=(0.9, run.beta2), eps=1e-8, fused=device.type in ("cuda", "cpu"))


# ---------------------------------------------------------------- checkpoints
def read_log(file: Path) -> list[dict]:
    """The rows of a log.jsonl, less a last one that a death cut short."""
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Checkpoint:
    """out_dir: training_state.pt (the truth), the files for users (its weights), best/, log.jsonl."""

    def __init__(self, run: TrainConfig, model: nn.Module, save_extras: Callable, identity: dict, world: World):
        self.folder, self.run, self.model, self.world = Path(run.out_dir), run, model, world
        self.save_extras, self.best, self.step = save_extras, None, 0
        self.state_file, self.log_file = self.folder / "training_state.pt", self.folder / "log.jsonl"
        fixed = {k: v for k, v in dataclasses.asdict(run).items() if k not in FREE_FIELDS}
        self.identity = json.loads(json.dumps({**fixed, **identity}))  # as it comes back: lists for tuples

    def guard(self, action: Callable, what: Path):
        """Run it on rank 0; a disk error is one sentence, and a failed write leaves the file that was there."""
        if self.world.rank == 0:
            try:
                action()
            except OSError as error:
                raise ValueError(f"cannot write {what}: {getattr(error, 'strerror', None) or error}. The last good "
                                 f"checkpoint, of step {self.step}, is untouched") from error

    def resume(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
        """Load training_state.pt if it is there. Returns the step to go on from. ValueError: another run's."""
        self.guard(lambda: self.folder.mkdir(parents=True, exist_ok=True), self.folder)
        self.guard(lambda: [f.unlink() for f in self.folder.rglob("*.tmp*")], self.folder)  # of a death amid a write
        if self.run.fresh:
            self.guard(lambda: [f.unlink(missing_ok=True) for f in (self.state_file, self.log_file)], self.folder)
        self.world.barrier()
        if self.state_file.exists():
            self.load(optimizer, scaler)
        elif (self.folder / "config.json").exists() and not self.run.fresh:
            raise ValueError(f"{self.folder} has a checkpoint but no training_state.pt; choose another --out_dir, or "
                             "--fresh")
        self.guard(self.cut_log, self.log_file)
        return self.step

    def load(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler):
        try:
            state = torch.load(self.state_file, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"{self.state_file} is not a readable training state ({error}); --fresh starts "
                             "anew") from error
        theirs = json.loads(state["identity"])
        other = [f"{k} was {theirs.get(k)!r}, is {v!r}" for k, v in self.identity.items() if theirs.get(k) != v]
        if other:
            raise ValueError(f"{self.folder} holds another run ({'; '.join(other[:4])}); choose another --out_dir, or "
                             "--fresh starts anew")
        self.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        self.best, self.step = state["best"], state["step"]

    def cut_log(self):
        """Drop what was logged after the state was saved: it will be logged again."""
        if self.log_file.exists():
            kept = [json.dumps(row) + "\n" for row in read_log(self.log_file) if row.get("step", 0) <= self.step]
            write_atomically(self.log_file, lambda path: path.write_text("".join(kept)))

    def log(self, row: dict):
        def append():
            with open(self.log_file, "a") as file:
                file.write(json.dumps(row) + "\n")
        self.guard(append, self.log_file)

    def record(self, step: int, metrics: dict, bar: tqdm):
        """Log an evaluation, and keep the weights in best/ if they score higher than all before."""
        self.log({"step": step, "eval": metrics})
        if self.world.rank == 0:
            numbers = [f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, float)]
            bar.write(f"step {step}: {', '.join(numbers)}")
        if self.best is None or metrics["score"] > self.best:
            self.best = metrics["score"]
            self.guard(lambda: self.export(self.folder / "best"), self.folder / "best")

    def save(self, step: int, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler):
        """training_state.pt, then the users' files; a death in between is mended by the next save or start."""
        def write():
            # every random number is drawn from (seed, step): the step is all the random state there is
            state = {"step": step, "best": self.best, "identity": json.dumps(self.identity),
                     "model": self.model.state_dict(), "optimizer": optimizer.state_dict(),
                     "scaler": scaler.state_dict()}
            write_atomically(self.state_file, lambda path: torch.save(state, path))
            self.step = step
            self.export(self.folder)
        self.guard(write, self.state_file)
        self.step = step

    def export(self, folder: Path):
        save_folder(self.model.state_dict(), self.model.config, folder)
        self.save_extras(folder)


# ---------------------------------------------------------------- the loop
def seed_of(*numbers) -> int:
    """A seed that is a function of these numbers alone, so that a resumed run draws what it would have drawn."""
    return random.Random(repr(numbers)).getrandbits(62)


def seed_all(*numbers):
    torch.manual_seed(seed_of(*numbers))


def autocast(run: TrainConfig, device: torch.device):
    precision = run.precision if run.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def to_device(batch: dict, device: torch.device) -> dict:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def make_loader(dataset, run: TrainConfig, world: World, start_step: int, collate=data.collate) -> DataLoader:
    """This process' micro-batches from start_step on; dataset.lengths, where it has them, group the rows (LLaVA)."""
    sampler = data.GlobalBatchSampler(len(dataset), run.batch_size, run.micro_batch_size, world.rank, world.size,
                                      run.seed, start_step, run.max_steps, getattr(dataset, "lengths", None))
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=run.num_workers,
                      pin_memory=world.device.type == "cuda", persistent_workers=run.num_workers > 0)


def wrap(task: Task, run: TrainConfig, world: World) -> nn.Module:
    """The task compiled, and in DDP, if so wished."""
    for module in task.model.modules() if run.compile else ():
        if isinstance(module, COMPILED):  # block by block, in place: quick, and no key of the state is renamed
            module.compile()
    if world.size == 1:
        return task
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(task, device_ids=ids, find_unused_parameters=task.leaves_parameters_unused)


def train_step(task: Task, module: nn.Module, batches: list[dict], step: int, run: TrainConfig, world: World,
               scaler: torch.amp.GradScaler) -> dict[str, float]:
    """Forward and backward of one global batch; the mean losses over it. `module` is the task as `wrap` gives it.

    The denominators are known before the first forward pass, so that each loss is a mean over the whole global batch.
    """
    names = list(task.counts(batches[0]))
    counts = torch.tensor([[float(task.counts(b)[n]) for n in names] for b in batches], dtype=torch.float64).sum(0)
    counts = world.sum(counts.to(world.device)).clamp(min=1)
    totals = torch.zeros_like(counts)
    for i, batch in enumerate(batches):
        seed_all(run.seed, step, i, world.rank)  # dropout, manager noise
        task.negatives.manual_seed(seed_of(run.seed, step, i))
        # no synchronisation of the gradients before the last micro-batch
        with module.no_sync() if i < len(batches) - 1 and module is not task else contextlib.nullcontext():
            with autocast(run, world.device):
                sums = module(to_device(batch, world.device))
            # DDP averages the gradients over the processes: hence world.size
            loss = sum(sums[n] * (world.size / counts[k]) for k, n in enumerate(names))
            scaler.scale(loss).backward()
        totals += torch.stack([sums[n].detach() for n in names]).double()
    return dict(zip(names, (world.sum(totals) / counts).tolist(), strict=True))


def apply_gradients(task: Task, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                    run: TrainConfig) -> float:
    """Clip, update, clear. Returns the gradients' norm before clipping; without a finite norm there is no update."""
    scaler.unscale_(optimizer)
    trained = [p for p in task.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained])
    if run.grad_clip:
        nn.utils.clip_grads_with_norm_(trained, run.grad_clip, norm)
    if scaler.is_enabled() or torch.isfinite(norm):
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def check_finite(numbers: dict[str, float], step: int, batches: list[dict], dataset, checkpoint: Checkpoint):
    if not all(math.isfinite(x) for x in numbers.values()):
        names = [dataset.source.name(int(index)) for batch in batches for index in batch["image_index"]]
        raise ValueError(f"the loss is not finite at step {step}: {numbers}. Samples: {', '.join(names[:16])}"
                         f"{f' and {len(names) - 16} more' if len(names) > 16 else ''}. The checkpoint of step "
                         f"{checkpoint.step} is kept")


def fit(run: TrainConfig, task: Task, dataset, evaluate: Callable[[], dict], checkpoint: Checkpoint, world: World,
        groups: list[dict], collate=data.collate) -> bool:
    """Train task.model to run.max_steps, going on from what lies in run.out_dir. False if it left early, at SIGTERM.

    evaluate(): metrics on held-out data, computed by all ranks; "score" (higher is better) decides what is best/.
    """
    optimizer = make_optimizer(groups, run, world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=run.precision == "fp16")
    start = checkpoint.resume(optimizer, scaler)
    if start >= run.max_steps:
        checkpoint.guard(lambda: checkpoint.export(checkpoint.folder), checkpoint.folder)  # had the last save died
        world.print(f"{run.out_dir} is finished: {start} of {run.max_steps} steps. --fresh starts anew.")
        return True
    per_step = run.batch_size // (run.micro_batch_size * world.size)
    world.print(f"{run.out_dir}: {f'resuming after step {start}' if start else f'{run.max_steps} steps'}, batch "
                f"{run.batch_size} = {run.micro_batch_size} x {world.size} processes x {per_step} micro-batches, "
                f"{world.device}, torch {torch.__version__}")
    batches, module = iter(make_loader(dataset, run, world, start, collate)), wrap(task, run, world)
    terminated = torch.zeros(1, device=world.device)
    signal.signal(signal.SIGTERM, lambda *_: terminated.fill_(1))
    bar = tqdm(total=run.max_steps, initial=start, unit="step", disable=world.rank > 0, mininterval=1)
    began = time.time()
    for step in range(start, run.max_steps):
        group, done = [next(batches) for _ in range(per_step)], step + 1
        lr = run.learning_rate * set_learning_rate(optimizer, run, step)
        losses = train_step(task.train(), module, group, step, run, world, scaler)
        norm = apply_gradients(task, optimizer, scaler, run)
        check_finite(losses | ({} if scaler.is_enabled() else {"grad_norm": norm}), done, group, dataset, checkpoint)
        loss, speed = sum(losses.values()), (done - start) * run.batch_size / (time.time() - began)
        bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed:.0f} samples/s", refresh=False)
        bar.update()
        if done % run.log_every == 0 or done in (1, run.max_steps):
            checkpoint.log({"step": done, "loss": loss, **losses, "lr": lr, "grad_norm": norm})
        if done == run.max_steps or (run.eval_every and done % run.eval_every == 0):
            checkpoint.record(done, evaluate(), bar)
        leave = world.sum(terminated.clone()).item() > 0
        if leave or done == run.max_steps or done % run.save_every == 0:
            checkpoint.save(done, optimizer, scaler)
        if leave and done < run.max_steps:
            break
    bar.close()
    if done < run.max_steps:
        world.print(f"SIGTERM: saved step {done} in {run.out_dir}; the same command goes on from there.")
    return done == run.max_steps


# ---------------------------------------------------------------- pre-training of ManagerTower
@torch.no_grad()
def evaluate_pretraining(model: ManagerTower, dataset, run: TrainConfig, world: World) -> dict[str, float]:
    """Held-out accuracy of MLM (over all masked tokens) and ITM (over all pairs, half of them false), of all ranks."""
    model.eval()
    rows = Subset(dataset, range(world.rank, len(dataset), world.size))
    right, total = torch.zeros(2, 2, dtype=torch.float64, device=world.device)
    for batch in DataLoader(rows, run.micro_batch_size, collate_fn=data.collate, num_workers=run.num_workers):
        batch = to_device(batch, world.device)
        mask, masked = batch["attention_mask"], batch["mlm_labels"] != -100
        with autocast(run, world.device):
            if "mlm" in run.objectives:
                logits = model.heads["mlm"](model(batch["pixels"], batch["mlm_ids"], mask).text[masked])
                right[0] += (logits.argmax(-1) == batch["mlm_labels"][masked]).sum()
            if "itm" in run.objectives:
                logits = model.heads["itm"](model(batch["itm_pixels"], batch["input_ids"], mask).pooled)
                right[1] += (logits.argmax(-1) == batch["itm_labels"]).sum()
        total += torch.stack([masked.sum(), masked.new_tensor(len(mask), dtype=torch.long)])
    accuracy = zip(("mlm", "itm"), (world.sum(right) / world.sum(total).clamp(min=1)).tolist())
    metrics = {f"{name}_accuracy": value for name, value in accuracy if name in run.objectives}
    return metrics | {"score": sum(metrics.values()) / len(metrics)}


def text_only_mlm_guess(train, heldout, samples: int = 2000) -> float:
    """MLM accuracy without pictures: each masked token is the commonest one between the same neighbours."""
    def masked(dataset):
        for row in range(min(samples, len(dataset))):
            item = dataset[row]
            ids, labels = item["mlm_ids"].tolist(), item["mlm_labels"].tolist()
            yield from (((ids[i - 1], ids[(i + 1) % len(ids)]), x) for i, x in enumerate(labels) if x != -100)
    seen, overall = defaultdict(Counter), Counter()
    for neighbours, label in masked(train):
        seen[neighbours][label] += 1
        overall[label] += 1
    hits = [seen.get(neighbours, overall).most_common(1)[0][0] == label for neighbours, label in masked(heldout)]
    return sum(hits) / max(1, len(hits))


def make_sources(run: TrainConfig, image_size: int) -> tuple[data.Source, data.Source]:
    """(training, held-out) captions: built-in scenes, or data_root's manifests and .arrow files."""
    if not run.data_root:
        return (data.demo_source("captions", "train", 40_000, run.seed, image_size),
                data.demo_source("captions", "heldout", run.eval_size, run.seed, image_size))
    return (data.open_source("captions", run.data_root, "train", run.datasets, run.on_bad_sample),
            data.open_source("captions", run.data_root, "val", run.datasets[:1]))


def find_tokenizer(run: TrainConfig, source: data.Source) -> data.Tokenizer:
    """--tokenizer, or the one beside --text, or a small BPE trained on the captions."""
    if place := run.tokenizer or run.text:
        return data.load_tokenizer(place if Path(place).is_dir() or run.tokenizer else Path(place).parent)
    if not run.data_root:
        return data.demo_tokenizer()
    return data.train_tokenizer((row["text"] for row in source.texts()), 8000)


def make_model(run: TrainConfig, fields: dict, tokenizer: data.Tokenizer, **heads) -> ManagerTower:
    """The preset --model with `fields` replaced, sized for the tokenizer; encoders from --vision, --text or random."""
    if bool(run.vision) != bool(run.text):
        raise ValueError("--vision and --text go together: both encoders are pre-trained, or neither")
    known = {} if run.text else {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
    known |= {"initializer_range": 0.1} if run.model == "tiny" else {}  # so narrow a model with 0.02 learns late
    config = getattr(ManagerTowerConfig, run.model)(**{**known, **fields, **heads})
    if tokenizer.vocab_size > config.vocab_size or tokenizer.pad_id != config.pad_token_id:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids and pad id {tokenizer.pad_id}, the model "
                         f"--vocab_size {config.vocab_size} and --pad_token_id {config.pad_token_id}")
    seed_all(run.seed, "model")
    model = ManagerTower(config)
    if run.vision:
        load_unimodal(model, run.vision, run.text)
    model.set_checkpointing(run.checkpointing)
    return model


def pretrain(run: TrainConfig, fields: dict, world: World):
    source, heldout_source = make_sources(run, fields.get("image_size", ManagerTowerConfig.tiny().image_size))
    tokenizer = find_tokenizer(run, source)
    model = make_model(run, fields, tokenizer, heads=run.objectives).to(world.device)
    c = model.config
    make = functools.partial(data.PretrainDataset, tokenizer=tokenizer, max_text_len=c.max_text_len, seed=run.seed,
                             batch_size=run.batch_size)
    # with ITC the false pairs are hard negatives of the batch, so the data need not load any
    dataset = make(source, transform=data.image_transform(run.transform, c.image_size, True),
                   share_images=run.share_images or "itc" in run.objectives, on_bad_sample=run.on_bad_sample)
    heldout = make(heldout_source, transform=data.image_transform(run.transform, c.image_size, False))
    heldout = Subset(heldout, range(min(run.eval_size, len(heldout))))
    evaluate = functools.partial(evaluate_pretraining, model, heldout, run, world)
    checkpoint = Checkpoint(run, model, tokenizer.save, {"config": dataclasses.asdict(c)}, world)
    world.print(f"ManagerTower, {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, encoders from "
                f"{f'{run.vision} and {run.text}' if run.vision else 'random weights'}; {len(source)} captions of "
                f"{source.num_images} pictures, {len(heldout)} held out")
    untrained, task = evaluate(), Pretraining(model, run.objectives, run.share_images)
    if fit(run, task, dataset, evaluate, checkpoint, world, param_groups(model, run)) and world.rank == 0:
        text_only = {"mlm_accuracy": text_only_mlm_guess(dataset, heldout), "itm_accuracy": 0.5}
        more = "" if run.data_root else " --data demo"
        summarize(run, checkpoint, {"untrained": untrained, "text_only": text_only}, [
            f"python eval.py managers --checkpoint {run.out_dir}{more or f' --data_root {run.data_root}'}",
            *([f"python finetune.py --task vqav2 --init {run.out_dir}{more}"] if more else [])])


def summarize(run: TrainConfig, checkpoint: Checkpoint, baselines: dict[str, dict], commands: list[str]):
    """The end of a run: held-out metrics beside those of the baselines, where the checkpoint is, what to type next."""
    rows = read_log(checkpoint.log_file)
    metrics = [row["eval"] for row in rows if "eval" in row][-1]
    if not any("baselines" in row for row in rows):
        checkpoint.log({"step": run.max_steps, "baselines": baselines})
    print(f"{'held out':15s}{'this run':>12s}" + "".join(f"{name.replace('_', ' '):>12s}" for name in baselines))
    for name in metrics:
        if name != "score" and any(name in values for values in baselines.values()):
            columns = [metrics, *baselines.values()]
            style = "12.4f" if name == "loss" else "12.1%"
            print(f"{name:15s}" + "".join(f"{c[name]:{style}}" if name in c else f"{'':12s}" for c in columns))
    print(f"The checkpoint is in {run.out_dir}, the best one in {run.out_dir}/best. Next:", *commands, sep="\n  ")


def main(argv: list[str]):
    from train_llava import LLAVA_RECIPES, train_llava  # which imports this file
    name, run, fields = parse_args(argv, RECIPES | LLAVA_RECIPES, "recipe")
    if name in LLAVA_RECIPES:
        train_llava(name, run, fields, World(run.device))
    else:
        pretrain(run, fields, World(run.device))


if __name__ == "__main__":
    one_sentence(main)
