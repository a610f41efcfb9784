r"""FIBER: fusion inside of the backbones, by gated cross-attention in their last blocks.

Paper: Coarse-to-Fine Vision-Language Pre-training with Fusion in the Backbone (NeurIPS 2022),
section 3, the coarse-grained half. Official counterpart: `coarse_grained` of microsoft/FIBER.

    # learn the built-in scenes: captions, then questions, then to write captions; minutes on a CPU
    python -m systems.fiber
    # the paper's pre-training, and a task
    torchrun --nproc_per_node 8 train.py --system fiber --recipe pretrain --data_root D \
        --vision SWIN --text ROBERTA
    torchrun --nproc_per_node 8 finetune.py --system fiber --task vqav2 --init out/fiber_pretrain
    # the authors' checkpoint
    python prepare.py weights --system fiber --source FIBER.ckpt --tokenizer ROBERTA --out F

There are no cross-modal layers. A Swin Transformer and a RoBERTa attend to each other in their last
`fused_layers` blocks, which are paired from the end: x of one modality reads y of the other,

    s = SelfAtt(x)
    x = x + s + alpha * CrossAtt(s, y)
    x = x + FFN(x)

with a learnt gate alpha that starts at 0, so that the model starts as its two encoders. Without
the middle term the same weights are a dual encoder, whose images and texts can be stored.

The order of this file: 1. sizes; 2. the fused blocks (3.1); 3. the model; 4. ITC with a queue, and
hard negatives (3.2); 5. captioning; 6. official weights; 7. what the scripts ask; 8. the demo.

What the official code does, item by item, and what this file does about it:

    official code                                            here
    the exchange is simultaneous: both read what the other   kept
      had before the pair
    the queries are the projected self-attention's outputs,  kept; outside of the windows, which
      and each window attends to all text                      change nothing here
    the last text layer has no last norm where it is fused,  kept
      and the image stream never has its own there
    12 text layers and Swin depths 2,2,18,2 are hard coded   mended: any depths; fused are blocks
                                                               of the last two stages
    alpha_t2i and a norm that nothing reads; text pooler     dropped on import
    ITC poolers that are always there                        only with the head itc
    keys of ITC carry no gradient, in-batch ones included    kept
    in-batch means the rows of one process                   kept: others' come through the queue
    ITC compares from step 1 on with a queue of random       switch: --whole_queue; without it only
      vectors of norm 28                                       what is filled takes part
    the queue has the pixels of 4,096 images, 7.25 GB        mended: it has numbers of rows
    hard negatives never are the own pair, but for 1e-9      kept
    rank_output is a copy of the ITM head that no gradient   mended: the ITM head ranks; the copy is
      reaches, and it ranks pictures and captions              the head `retrieval`, if asked for
    no decay and learning rates by parts of official names   kept, see `official_rule`
    temp is clamped in place to 0.001 ... 1                  kept
    selection of checkpoints on test splits                  not here: the splits are tasks.py's
    bias tables are resized bicubically for another size     kept
    window = image_size / 32, whatever the checkpoint had    kept
    beam search: lengths not re-ordered with their beams; a  mended: a finished caption is carried
      finished beam may fill all places with copies            on once, with its own length
    the mask token has the logit -10,000 in captions         kept
    GOLD loss is divided by the number of padded positions   kept in `gold_loss`: the published
                                                               learning rate belongs to it
    a bad picture is replaced by another one in silence      not here: data.py says it

A queue of row numbers means that a hard negative from the queue is read and transformed again, with
augmentation drawn from its row number, in threads; officially it is the very picture of some steps
ago, from memory. Its vector of that time decides, as there, whether it is drawn.

Shapes: as in model.py, with N = 1: the one expert of each modality is the state before the first
fused pair. Lt text tokens, Li image tokens, C_s width of Swin's stage s, T = w * w tokens of a
window, nW windows, Q places of the queue.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from data import PairDataset, batches
from fields import FieldError, check_fields, option, parse_flags, show
from files import read_log, write_atomically, write_json
from hub import find_folder
from images import IMAGENET_COLOURS, tower_transform
from loop import Checkpoint, System, Task, TowerRunConfig, fit, make_groups
from metrics import bleu
from model import (
    HEADS,
    MOST_CHANNELS,
    MOST_LAYERS,
    MOST_PIXELS,
    MOST_ROWS,
    BertLayer,
    Features,
    LayerInputs,
    TextEncoder,
    attention,
    check_multiple,
    init_weights,
    make_head,
    run,
)
from objectives import Pairs, Pretraining, Retrieval, draw_negatives, join
from scenes import OPPOSITE, demo_source
from tokenizer import load_tokenizer
from weights import (
    HEAD_NAMES,
    HF_ROBERTA_LAYOUT,
    READERS,
    ROBERTA,
    Names,
    Row,
    State,
    add_new_heads,
    bad_values,
    check_published,
    expand,
    export_state,
    find_layout,
    import_state,
    is_dead,
    load_fitted,
    naming,
    read_headers,
    read_published,
    read_weights,
    refuse,
    refuse_differences,
    refuse_our_own,
    save_folder,
    seed_rank_head,
    settings_beside,
    shapes_of,
    stored_heads,
    without_heads,
)
from world import World, collect, evaluating, gather, one_sentence, seed_all

PATCH = 4  # pixels on each side of Swin's patches
STAGES = 4  # of Swin; each halves the sides of the map of tokens, and doubles the channels
SCALE = 32  # pixels on each side of a token of the last stage
OWN_HEADS = ("itc", "caption")  # the others are those of model.py


# ================================================================ 1. sizes
@dataclass
class FiberConfig:
    """The architecture; the defaults are the paper's: Swin-B, RoBERTa-base, six fused pairs."""

    # Swin
    image_size: int = option(384, "pixels on each side of a picture", least=32, most=MOST_PIXELS)
    vision_width: int = option(
        128, "channels of Swin's first stage; each stage doubles them", least=1, most=MOST_CHANNELS
    )
    vision_depths: tuple[int, ...] = option(
        (2, 2, 18, 2), "blocks of Swin's four stages", least=1, most=MOST_LAYERS
    )
    vision_heads: tuple[int, ...] = option(
        (4, 8, 16, 32), "attention heads of Swin's four stages", least=1
    )
    drop_path: float = option(
        0.1,
        "Swin's stochastic depth: probability for its last block, rising from 0",
        least=0,
        below=1,
    )
    # RoBERTa
    vocab_size: int = option(50265, "tokens in the vocabulary", least=1, most=MOST_ROWS)
    max_positions: int = option(
        514,
        "rows of the text's position table; positions start at pad_token_id + 1",
        least=1,
        most=MOST_ROWS,
    )
    text_width: int = option(768, "channels of the text encoder", least=1, most=MOST_CHANNELS)
    text_layers: int = option(12, "layers of the text encoder", least=1, most=MOST_LAYERS)
    text_heads: int = option(12, "attention heads of the text encoder", least=1)
    text_mlp_width: int = option(
        3072, "hidden channels of the text encoder's MLPs", least=1, most=MOST_CHANNELS
    )
    pad_token_id: int = option(1, "id of the padding token", least=0)
    dropout: float = option(0.1, "probability in the text encoder", least=0, below=1)
    # the fusion, and what reads it
    fused_layers: int = option(
        6, "pairs of blocks that attend to each other, from the last one on", least=1
    )
    hidden_size: int = option(768, "channels of the fused features", least=1, most=MOST_CHANNELS)
    temperature: float = option(
        0.07,
        "what the similarities of ITC are divided by at the start; it is learnt",
        above=0,
        most=1000,
    )
    queue_size: int = option(4096, "past pairs that ITC compares with", least=1, most=MOST_ROWS)
    whole_queue: bool = option(
        False, "ITC also compares with places of the queue that are not filled yet, as officially"
    )
    initializer_range: float = option(
        0.02, "standard deviation of new weight matrices, as in BERT", least=0, most=100
    )
    # the heads; which ones, and how many answers, follow from the task and its data
    heads: tuple[str, ...] = option(("mlm", "itm", "itc"), "names of heads", flag=False)
    num_answers: int = option(3129, "answers of the VQA head", least=1, most=MOST_ROWS, flag=False)
    head_hidden_scale: int = option(
        1, "hidden channels of the classifiers, in units of 2 * hidden_size", least=1, most=1000
    )
    max_text_len: int = option(50, "tokens that each text is padded to", least=3, most=MOST_ROWS)

    @classmethod
    def base(cls, **overrides: Any) -> "FiberConfig":
        """Swin-B and RoBERTa-base: the defaults."""
        return cls(**overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> "FiberConfig":
        """For the built-in demo data: it learns on a CPU in minutes."""
        fields: dict[str, Any] = {
            "image_size": 64,
            "vision_width": 16,
            "vision_depths": (1, 1, 2, 2),
            "vision_heads": (1, 2, 4, 8),
            "drop_path": 0.0,
            "vocab_size": 300,
            "max_positions": 52,
            "text_width": 64,
            "text_layers": 4,
            "text_heads": 2,
            "text_mlp_width": 256,
            "dropout": 0.0,
            "fused_layers": 3,
            "hidden_size": 64,
            "queue_size": 32,  # of one batch: from random weights the vectors change fast
            "max_text_len": 16,
        }
        fields.update(overrides)
        return cls(**fields)

    def __post_init__(self) -> None:
        check_fields(self)
        # config.json has lists
        self.heads = tuple(self.heads)
        self.vision_depths = tuple(self.vision_depths)
        self.vision_heads = tuple(self.vision_heads)
        self.check_heads()
        for name in ("vision_depths", "vision_heads"):
            if len(getattr(self, name)) != STAGES:
                raise FieldError(
                    f"{name} is {show(getattr(self, name))}; it must have {STAGES} numbers, one "
                    "for each of Swin's stages"
                )
        # attention heads share the channels equally, and whole windows cover the picture
        for stage in range(STAGES):
            width = self.stage_width(stage)
            check_multiple(
                f"the width of stage {stage + 1}", width, "its heads", self.vision_heads[stage]
            )
        check_multiple("text_width", self.text_width, "text_heads", self.text_heads)
        check_multiple("image_size", self.image_size, "Swin's smallest scale", SCALE)
        self.check_fused_layers()
        self.check_rows()

    def check_heads(self) -> None:
        """Raises FieldError for a head that there is not, or that is there twice."""
        names = (*HEADS, "caption")
        for name in self.heads:
            if name not in names:
                raise FieldError(f"heads is {show(name)}; it must be one of {', '.join(names)}")
        if len(set(self.heads)) < len(self.heads):
            raise FieldError(f"heads is {show(self.heads)}; it names one of them twice")
        if "caption" in self.heads and "mlm" not in self.heads:
            raise FieldError("heads has caption without mlm, whose head the captions' words are of")

    def check_fused_layers(self) -> None:
        """Raises FieldError where there are not as many blocks to be paired."""
        most = min(self.text_layers, self.vision_depths[2] + self.vision_depths[3])
        if self.fused_layers > most:
            raise FieldError(
                f"fused_layers is {self.fused_layers}; it must be at most {most}, as the pairs are "
                "layers of the text encoder and blocks of Swin's last two stages"
            )

    def check_rows(self) -> None:
        """Raises FieldError for tables without a row for the padding, or for a text's places."""
        if self.pad_token_id >= self.vocab_size:
            raise FieldError(
                f"pad_token_id is {self.pad_token_id}, but the ids of vocab_size {self.vocab_size} "
                f"end at {self.vocab_size - 1}"
            )
        needed = self.pad_token_id + 1 + self.max_text_len
        if needed > self.max_positions:
            raise FieldError(
                f"max_positions is {self.max_positions}; it must be at least {needed}, as "
                f"positions start at {self.pad_token_id + 1} and a text has {self.max_text_len} of "
                "them"
            )

    @staticmethod
    def check_flags(flags: dict[str, Any]) -> None:
        """All flags go together."""

    # what the parts of the project read, and what is the same in all models of this kind
    text_kind: ClassVar[str] = "roberta"
    text_eps: ClassVar[float] = 1e-5
    image_mean: ClassVar[tuple[float, ...]] = IMAGENET_COLOURS[0]  # of Swin's training
    image_std: ClassVar[tuple[float, ...]] = IMAGENET_COLOURS[1]

    @property
    def first_position(self) -> int:
        """The row of the position table that RoBERTa's first token has."""
        return self.pad_token_id + 1

    def num_experts(self, modality: str) -> int:
        """N: the state before the first fused pair, of either modality."""
        return 1

    @property
    def window(self) -> int:
        """w: tokens on each side of a window. The last stage is one window."""
        return self.image_size // SCALE

    def stage_width(self, stage: int) -> int:
        """C_s, channels of a stage, counted from 0."""
        return self.vision_width * 2**stage

    def stage_of_block(self) -> list[int]:
        """The stage of each of Swin's blocks, all counted from 0."""
        stages = []
        for stage, depth in enumerate(self.vision_depths):
            stages += [stage] * depth
        return stages

    def fused_widths(self) -> list[int]:
        """The channels of the image in each fused pair."""
        return [self.stage_width(stage) for stage in self.stage_of_block()[-self.fused_layers :]]


# ================================================================ 2. the fused blocks (3.1)
def drop_path(x: Tensor, probability: float, training: bool) -> Tensor:
    """Stochastic depth: for some rows of the batch a branch (B, L, D) is left out."""
    if not training or probability == 0:
        return x
    kept = F.dropout(x.new_ones(len(x), 1, 1), probability)
    return x * kept


def relative_places(window: int) -> Tensor:
    """For each pair of tokens of a window, the row of the bias table, (T, T).

    There is a row for each difference of places, which is from -(w-1) to w-1 down and across.
    """
    numbers = torch.arange(window)
    down, across = torch.meshgrid(numbers, numbers, indexing="ij")
    places = torch.stack([down.flatten(), across.flatten()])  # (2, T)
    difference = places[:, :, None] - places[:, None, :]  # (2, T, T)
    from_zero = difference + window - 1
    return from_zero[0] * (2 * window - 1) + from_zero[1]


def shifted_regions(side: int, window: int, shift: int) -> Tensor:
    """-100 for pairs of tokens of a shifted window that are no neighbours, else 0, (nW, T, T).

    Rolled by `shift`, the last window of a row has tokens of the right and of the left border.
    """
    # along one axis: 0 before the last window, 1 its own tokens, 2 those that came round
    numbers = torch.arange(side)
    in_last_window = numbers >= side - window
    came_round = numbers >= side - shift
    strip = in_last_window.long() + came_round.long()
    region = 3 * strip[:, None] + strip[None, :]  # (side, side)
    as_picture = region[None, :, :, None]
    windows = split_windows(as_picture, window)[0, :, :, 0]  # (nW, T)
    differs = windows[:, :, None] != windows[:, None, :]
    return -100.0 * differs.float()


def split_windows(x: Tensor, window: int) -> Tensor:
    """(B, side, side, C) -> (B, nW, T, C), row by row."""
    x = x.unflatten(2, (-1, window))
    x = x.unflatten(1, (-1, window))  # (B, n, w, n, w, C)
    x = x.transpose(2, 3).flatten(3, 4)  # (B, n, n, T, C)
    return x.flatten(1, 2)


def join_windows(x: Tensor, window: int) -> Tensor:
    """The inverse of `split_windows`."""
    n = round(x.shape[1] ** 0.5)
    x = x.unflatten(2, (window, window))
    x = x.unflatten(1, (n, n))  # (B, n, n, w, w, C)
    x = x.transpose(2, 3).flatten(3, 4)  # (B, n, w, side, C)
    return x.flatten(1, 2)


class SwinBlock(nn.Module):
    """A Swin block (pre-norm); with a text_width one that can also attend to the text."""

    places: Tensor  # (T, T), rows of position_bias
    regions: Tensor  # (nW, T, T), where windows are shifted

    def __init__(
        self,
        width: int,
        heads: int,
        side: int,
        window: int,
        shift: int,
        drop_path: float,
        text_width: int = 0,
    ):
        super().__init__()
        self.heads = heads
        self.side = side
        self.window = window
        self.shift = shift
        self.drop_path = drop_path
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        differences = 2 * window - 1
        self.position_bias = nn.Parameter(0.02 * torch.randn(differences**2, heads))
        if text_width:  # queries from the image, keys and values from the text
            self.ln_cross = nn.LayerNorm(width)
            self.cross_q = nn.Linear(width, width)
            self.cross_kv = nn.Linear(text_width, 2 * width)
            self.cross_proj = nn.Linear(width, width)
            self.alpha = nn.Parameter(torch.zeros(1))
        self.ln_2 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width)
        self.fc_out = nn.Linear(4 * width, width)
        self.register_buffer("places", relative_places(window), persistent=False)
        if shift:
            regions = shifted_regions(side, window, shift)
            self.register_buffer("regions", regions, persistent=False)

    def forward(
        self, x: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """x (B, L, C), with L = side * side; text (B, Lt, D_text) or None -> (B, L, C).

        text_mask (B, 1, 1, Lt): boolean, True = real token. Without text this is plain Swin.
        """
        # s = SelfAtt(x)
        attended = self.self_attention(self.ln_1(x))
        # s + alpha * CrossAtt(s, y)
        if text is not None:
            attended = attended + self.alpha * self.cross_attention(attended, text, text_mask)
        x = x + drop_path(attended, self.drop_path, self.training)
        # FFN
        hidden = self.fc_out(F.gelu(self.fc(self.ln_2(x))))
        return x + drop_path(hidden, self.drop_path, self.training)

    def self_attention(self, x: Tensor) -> Tensor:
        """Among the tokens of each window, (B, L, C) -> (B, L, C)."""
        square = x.unflatten(1, (self.side, self.side))
        if self.shift:
            square = square.roll((-self.shift, -self.shift), (1, 2))
        windows = split_windows(square, self.window)  # (B, nW, T, C)

        # windows and heads share one dimension: the bias is the same for all rows of the batch
        q, k, v = self.qkv(windows).chunk(3, dim=-1)
        q = self.split_heads(q)
        k = self.split_heads(k)
        v = self.split_heads(v)
        bias = self.window_bias(windows.shape[1]).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out = out.unflatten(1, (-1, self.heads))  # (B, nW, H, T, C / H)
        out = out.transpose(2, 3).flatten(3)  # (B, nW, T, C)

        square = join_windows(self.proj(out), self.window)
        if self.shift:
            square = square.roll((self.shift, self.shift), (1, 2))
        return square.flatten(1, 2)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, nW, T, C) -> (B, nW * H, T, C / H)."""
        x = x.unflatten(-1, (self.heads, -1))  # (B, nW, T, H, C / H)
        return x.transpose(2, 3).flatten(1, 2)

    def window_bias(self, num_windows: int) -> Tensor:
        """What is added to the scores: by relative places, and -100 between regions, (1, nW * H, T,
        T).
        """
        bias = self.position_bias[self.places].permute(2, 0, 1)  # (T, T, H) -> (H, T, T)
        if self.shift:
            return (bias + self.regions[:, None]).flatten(0, 1)[None]
        return bias.repeat(num_windows, 1, 1)[None]

    def cross_attention(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        """CrossAtt(s, y): every image token attends to all text tokens, (B, L, C)."""
        q = self.cross_q(self.ln_cross(x))
        k, v = self.cross_kv(text).chunk(2, dim=-1)
        return self.cross_proj(attention(q, k, v, self.heads, text_mask))


class PatchMerging(nn.Module):
    """Four neighbours become one token, (B, side * side, C) -> (B, side * side / 4, 2C)."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.side = side
        self.ln = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        square = x.unflatten(1, (self.side, self.side))
        quarters = []
        for across in (0, 1):
            for down in (0, 1):
                quarters.append(square[:, down::2, across::2])
        return self.reduction(self.ln(torch.cat(quarters, -1).flatten(1, 2)))


class Swin(nn.Module):
    """A Swin Transformer, whose last `fused_layers` blocks can attend to a text."""

    def __init__(self, config: FiberConfig):
        super().__init__()
        self.image_size = config.image_size
        self.checkpointing = False
        self.stage_of_block = config.stage_of_block()
        width = config.vision_width
        self.patch = nn.Conv2d(3, width, PATCH, PATCH)
        self.ln_patch = nn.LayerNorm(width)
        numbers = range(len(self.stage_of_block))
        self.blocks = nn.ModuleList(make_swin_block(number, config) for number in numbers)
        # before the second, third and fourth stage
        side = config.image_size // PATCH
        self.merges = nn.ModuleList()
        for stage in range(STAGES - 1):
            self.merges.append(PatchMerging(config.stage_width(stage), side // 2**stage))
        self.ln_post = nn.LayerNorm(config.stage_width(STAGES - 1))

    def forward(self, pixels: Tensor, keep: Sequence[int]) -> list[Tensor]:
        """pixels (B, 3, S, S) -> the hidden states `keep`, in ascending order, each (B, L, C_s).

        0 is the embedded patches, k the output of the k-th block, before any merging and without
        ln_post. Blocks above the last kept one do not run. Raises ValueError for another S.
        """
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"pixels {tuple(pixels.shape)} do not have the encoder's image_size "
                f"{self.image_size}"
            )
        x = self.ln_patch(self.patch(pixels).flatten(2).transpose(1, 2))
        kept = []
        for number in range(max(keep) + 1):
            if number in keep:
                kept.append(x)
            if number < max(keep):
                x = self.run_block(number, x)
        return kept

    def enter(self, number: int, x: Tensor) -> Tensor:
        """What block `number` (from 0) reads: merged, if it is the first one of its stage."""
        stage = self.stage_of_block[number]
        if number > 0 and self.stage_of_block[number - 1] < stage:
            return self.merges[stage - 1](x)
        return x

    def run_block(self, number: int, x: Tensor) -> Tensor:
        """The output of block `number` (from 0) without text, of that of the one before."""
        return run(self.blocks[number], self.checkpointing, self.enter(number, x))


def make_swin_block(number: int, config: FiberConfig) -> SwinBlock:
    """Block `number` of all, from 0."""
    stages = config.stage_of_block()
    stage = stages[number]
    place = number - stages.index(stage)  # in its stage
    side = config.image_size // PATCH // 2**stage
    # every second block has shifted windows, where there is more than one
    shift = 0
    if place % 2 == 1 and side > config.window:
        shift = config.window // 2
    rate = config.drop_path * number / max(1, len(stages) - 1)
    is_fused = number >= len(stages) - config.fused_layers
    return SwinBlock(
        config.stage_width(stage),
        config.vision_heads[stage],
        side,
        config.window,
        shift,
        rate,
        config.text_width if is_fused else 0,
    )


class FusedTextLayer(BertLayer):
    """A RoBERTa layer that can also attend to the image. BertLayer has its other parts."""

    def __init__(
        self, width: int, heads: int, mlp_width: int, dropout: float, eps: float, image_width: int
    ):
        super().__init__(width, heads, mlp_width, dropout, eps)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(image_width, 2 * width)
        self.cross_proj = nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        mask: Tensor | None,
        image: Tensor | None = None,
        last_norm: bool = True,
    ) -> Tensor:
        """x (B, L, D), image (B, Li, C) or None -> (B, L, D).

        mask, broadcastable to (B, H, L, L): boolean, True = attend. Without an image this is a
        plain RoBERTa layer. last_norm: whether the norm after the MLP is applied.
        """
        dropout = self.dropout if self.training else 0.0
        # s = SelfAtt(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out = attention(q, k, v, self.heads, mask, dropout)
        attended = F.dropout(self.proj(out), dropout)
        # s + alpha * CrossAtt(s, y)
        if image is not None:
            k, v = self.kv(image).chunk(2, dim=-1)
            out = attention(self.q(attended), k, v, self.heads, None, dropout)
            crossed = F.dropout(self.cross_proj(out), dropout)
            attended = attended + self.alpha * crossed
        x = self.ln_1(x + attended)
        # FFN
        out = self.fc_out(F.gelu(self.fc(x)))
        x = x + F.dropout(out, dropout)
        return self.ln_3(x) if last_norm else x


class FiberTextEncoder(TextEncoder):
    """RoBERTa, whose last `fused_layers` layers can attend to an image."""

    def __init__(self, config: Any):
        super().__init__(config)
        first = config.text_layers - config.fused_layers
        for place, image_width in enumerate(config.fused_widths()):
            self.layers[first + place] = FusedTextLayer(
                config.text_width,
                config.text_heads,
                config.text_mlp_width,
                config.dropout,
                1e-5,
                image_width,
            )


# ================================================================ 3. the model
class Queue(nn.Module):
    """The last Q pairs that ITC has seen: their vectors, and what they were made of.

    These buffers are part of the model's state, so that a run goes on with them. The vectors begin
    as in the official code, with random numbers, which are read only with whole_queue.
    """

    text: Tensor  # (Q, D)
    image: Tensor  # (Q, D)
    rows: Tensor  # (Q,), the records of the pictures
    input_ids: Tensor  # (Q, Lt)
    attention_mask: Tensor  # (Q, Lt)
    place: Tensor  # (1,), where the next pair goes
    filled: Tensor  # (1,), how many places have a pair

    def __init__(self, size: int, width: int, length: int):
        super().__init__()
        self.size = size
        self.register_buffer("text", torch.randn(size, width))
        self.register_buffer("image", torch.randn(size, width))
        self.register_buffer("rows", torch.zeros(size, dtype=torch.long))
        self.register_buffer("input_ids", torch.zeros(size, length, dtype=torch.long))
        self.register_buffer("attention_mask", torch.zeros(size, length, dtype=torch.long))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))
        self.register_buffer("filled", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def push(self, columns: Mapping[str, Tensor]) -> None:
        """Put pairs in the places of the oldest ones. columns: name of a buffer -> (n, ...)."""
        count = len(columns["rows"])
        numbers = torch.arange(count, device=self.place.device)
        places = (self.place + numbers) % self.size
        places = places[-self.size :]  # of more than Q pairs the last ones
        for name, new in columns.items():
            buffer = getattr(self, name)
            buffer[places] = new[-self.size :].to(buffer.dtype)
        self.place.copy_((self.place + count) % self.size)
        self.filled.copy_((self.filled + count).clamp(max=self.size))


class ContrastiveHead(nn.Module):
    """The last states of the dual encoder -> unit vectors; and the queue."""

    def __init__(self, config: FiberConfig):
        super().__init__()
        width = config.hidden_size
        self.text_transform = nn.Linear(config.text_width, width)
        self.image_transform = nn.Linear(config.stage_width(STAGES - 1), width)
        self.text_pooler = nn.Linear(width, width)
        self.image_pooler = nn.Linear(width, width)
        # the divisor itself, not its logarithm as in CLIP
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature)))
        self.queue = Queue(config.queue_size, width, config.max_text_len)

    def text(self, states: Tensor) -> Tensor:
        """(B, Lt, D_text) -> (B, D), of the first token."""
        pooled = self.text_pooler(self.text_transform(states[:, 0])).tanh()
        return F.normalize(pooled, dim=-1)

    def image(self, states: Tensor) -> Tensor:
        """(B, Li, C) -> (B, D), of the mean token."""
        pooled = self.image_pooler(self.image_transform(states).mean(1)).tanh()
        return F.normalize(pooled, dim=-1)


def make_caption_head(config: FiberConfig) -> nn.ModuleList:
    """Captioning gives all layers the last image tokens: these make them as wide as the layers of
    Swin's third stage expect.
    """
    last = config.stage_width(STAGES - 1)
    narrower = [width for width in config.fused_widths() if width != last]
    return nn.ModuleList(nn.Linear(last, width) for width in narrower)


def make_fiber_head(name: str, config: Any) -> nn.Module:
    if name == "itc":
        return ContrastiveHead(config)
    if name == "caption":
        return make_caption_head(config)
    return make_head(name, config)


class Fiber(nn.Module):
    """Two encoders that attend to each other in their last blocks, and heads.

    Everything there is twice, for text and for image, under the names text_* and image_*. The
    methods are those of ManagerTower, with one expert of each modality: the state before the first
    fused pair, from which both the fused model and the dual encoder go on.
    """

    blocks_to_compile = (SwinBlock, BertLayer)  # what --compile compiles, one by one
    blocks_to_shard = (SwinBlock, BertLayer)  # what --shard gathers, one by one

    def __init__(self, config: FiberConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        width = config.hidden_size
        self.text_encoder = FiberTextEncoder(config)
        self.image_encoder = Swin(config)
        self.text_transform = nn.Linear(config.text_width, width)
        self.image_transform = nn.Linear(config.stage_width(STAGES - 1), width)
        self.text_pooler = nn.Linear(width, width)
        self.image_pooler = nn.Linear(width, width)
        self.heads = nn.ModuleDict({name: make_fiber_head(name, config) for name in config.heads})
        self.apply(partial(init_weights, std=config.initializer_range))

        # the numbers of the first layer and of the first block that are fused
        self.first_layer = config.text_layers - config.fused_layers
        self.first_block = len(self.image_encoder.blocks) - config.fused_layers
        self.freeze_idle_norms()

    def freeze_idle_norms(self) -> None:
        """The last norms, which the fused pass leaves out, are trained only by who reads them."""
        if "itc" not in self.config.heads:
            self.image_encoder.ln_post.requires_grad_(False)
            last: Any = self.text_encoder.layers[-1]
            last.ln_3.requires_grad_("caption" in self.config.heads)

    def set_checkpointing(self, on: bool) -> None:
        """Activation checkpointing of all layers: a third more computation, far less memory."""
        self.text_encoder.checkpointing = on
        self.image_encoder.checkpointing = on
        self.checkpointing = on

    # -------------------------------------------------------- before the fusion
    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, Lt) -> (B, 1, Lt, D_text), before the first fused layer."""
        states = self.text_encoder(input_ids.long(), attention_mask, [self.first_layer])
        return torch.stack(states, 1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> (B, 1, Li, C), before the first fused block."""
        return torch.stack(self.image_encoder(pixels, [self.first_block]), 1)

    # -------------------------------------------------------- with fusion
    def fuse_until_last(
        self,
        text_experts: Tensor,
        image_experts: Tensor,
        attention_mask: Tensor,
        image_type: int = 1,
    ) -> LayerInputs:
        """What the last fused pair reads.

        text_experts (B, 1, Lt, D_text), image_experts (B, 1, Li, C), attention_mask (B, Lt).
        image_type: which picture of a sample it is; FIBER has no embedding of it.
        """
        text = text_experts[:, -1]
        image = image_experts[:, -1]
        mask = attention_mask[:, None, None, :].bool()  # (B, 1, 1, Lt)
        for pair in range(self.config.fused_layers):
            # a new stage begins before the text looks at it
            image = self.image_encoder.enter(self.first_block + pair, image)
            inputs = LayerInputs(text, image, mask)
            # the exchange is simultaneous: both read what the other one was before the pair
            if pair < self.config.fused_layers - 1:
                text = self.text_layer(pair, inputs)
                image = self.image_block(pair, inputs)
        return inputs

    def text_layer(self, pair: int, inputs: LayerInputs, last_norm: bool = True) -> Tensor:
        """The text's half of a fused pair, counted from 0, (B, Lt, D_text)."""
        layer = self.text_encoder.layers[self.first_layer + pair]
        arguments = (inputs.text, inputs.text_mask, inputs.image, last_norm)
        return run(layer, self.checkpointing, *arguments)

    def image_block(self, pair: int, inputs: LayerInputs) -> Tensor:
        """The image's half of a fused pair, counted from 0, (B, Li, C)."""
        block = self.image_encoder.blocks[self.first_block + pair]
        arguments = (inputs.image, inputs.text, inputs.text_mask)
        return run(block, self.checkpointing, *arguments)

    def last_text(self, inputs: LayerInputs) -> Tensor:
        """Features.text, (B, Lt, D), of what `fuse_until_last` returns."""
        # official: the last layer has no last norm where it is fused
        text = self.text_layer(self.config.fused_layers - 1, inputs, last_norm=False)
        return self.text_transform(text)

    def last_image(self, inputs: LayerInputs) -> Tensor:
        """Features.image, (B, Li, D), of what `fuse_until_last` returns."""
        # official: nor has the image stream its ln_post
        return self.image_transform(self.image_block(self.config.fused_layers - 1, inputs))

    def pool(self, text: Tensor, image: Tensor) -> Tensor:
        """The first text token and the mean image token, (B, 2D)."""
        text_pooled = self.text_pooler(text[:, 0]).tanh()
        image_pooled = self.image_pooler(image.mean(1)).tanh()
        return torch.cat([text_pooled, image_pooled], dim=-1)

    def last_pooled(self, inputs: LayerInputs) -> Tensor:
        """Features.pooled, (B, 2D), of what `fuse_until_last` returns."""
        return self.pool(self.last_text(inputs), self.last_image(inputs))

    def fuse(
        self,
        text_experts: Tensor,
        image_experts: Tensor,
        attention_mask: Tensor,
        image_type: int = 1,
    ) -> Features:
        """The fused pairs and what reads them; the arguments are those of `fuse_until_last`."""
        last = self.fuse_until_last(text_experts, image_experts, attention_mask, image_type)
        text = self.last_text(last)
        image = self.last_image(last)
        return Features(text, image, self.pool(text, image))

    def fuse_pooled(
        self,
        text_experts: Tensor,
        image_experts: Tensor,
        attention_mask: Tensor,
        image_type: int = 1,
    ) -> Tensor:
        """`fuse(...).pooled`, (B, 2D)."""
        return self.fuse(text_experts, image_experts, attention_mask, image_type).pooled

    def forward(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, image_type: int = 1
    ) -> Features:
        """pixels (B, 3, S, S), input_ids and attention_mask (B, Lt), of any integer dtype."""
        text_experts = self.encode_text(input_ids, attention_mask)
        image_experts = self.encode_image(pixels)
        return self.fuse(text_experts, image_experts, attention_mask, image_type)

    # -------------------------------------------------------- without fusion: the dual encoder
    def finish_image(self, image_experts: Tensor) -> Tensor:
        """The last image tokens without fusion and without ln_post, (B, Li, C)."""
        image = image_experts[:, -1]
        for number in range(self.first_block, len(self.image_encoder.blocks)):
            image = self.image_encoder.run_block(number, image)
        return image

    def finish_text(self, text_experts: Tensor, attention_mask: Tensor) -> Tensor:
        """The last text tokens without fusion, (B, Lt, D_text)."""
        mask = attention_mask[:, None, None, :].bool()
        text = text_experts[:, -1]
        for layer in self.text_encoder.layers[self.first_layer :]:
            text = run(layer, self.checkpointing, text, mask)
        return text

    def contrast_text(self, text_experts: Tensor, attention_mask: Tensor) -> Tensor:
        """The vectors of texts that ITC compares, (B, D), of length 1."""
        head: Any = self.heads["itc"]
        return head.text(self.finish_text(text_experts, attention_mask))

    def contrast_image(self, image_experts: Tensor) -> Tensor:
        """The vectors of pictures that ITC compares, (B, D), of length 1."""
        head: Any = self.heads["itc"]
        return head.image(self.image_encoder.ln_post(self.finish_image(image_experts)))

    def contrast(
        self, text_experts: Tensor, image_experts: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The vectors of texts, and of pictures, both (B, D)."""
        text = self.contrast_text(text_experts, attention_mask)
        return text, self.contrast_image(image_experts)

    def contrast_features(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The dual encoder from the pixels and the ids on: vectors of pictures, and of texts."""
        text_experts = self.encode_text(input_ids, attention_mask)
        text, image = self.contrast(text_experts, self.encode_image(pixels), attention_mask)
        return image, text

    # -------------------------------------------------------- captioning
    def caption_logits(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of the next word after each token, (B, L, V).

        image (B, Li, C): the tokens of `finish_image`. A token sees those before it, and the fused
        layers see the image; only this direction of the fusion is left.
        """
        length = input_ids.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=image.device).tril()
        mask = attention_mask[:, None, None, :].bool() & earlier  # (B, 1, L, L)
        [text] = self.text_encoder(input_ids.long(), attention_mask, [0])
        layers: Any = self.text_encoder.layers
        narrow: Any = self.heads["caption"]
        for number, layer in enumerate(layers):
            pair = number - self.first_layer
            if pair < 0:
                text = run(layer, self.checkpointing, text, mask)
            else:
                seen = narrow[pair](image) if pair < len(narrow) else image
                text = run(layer, self.checkpointing, text, mask, seen)
        return self.heads["mlm"](self.text_transform(text))


# ================================================================ 4. ITC with a queue (3.2)
class Drawn(NamedTuple):
    """Similarities of this process' pairs with themselves and with the queue."""

    text_logits: Tensor  # (B, B + Q), text -> image; the first B columns are the batch's own
    image_logits: Tensor  # (B, B + Q), image -> text
    text: Tensor  # (B, D)
    image: Tensor  # (B, D)


def queue_logits(model: Fiber, pairs: Pairs) -> Drawn:
    """What ITC compares. The keys carry no gradient, those of the batch included."""
    head: Any = model.heads["itc"]
    queue = head.queue
    with torch.no_grad():
        head.temperature.clamp_(0.001, 1.0)
    text, image = model.contrast(pairs.text_experts, pairs.image_experts, pairs.mask)
    text = text.float()
    image = image.float()
    # in float32: at the smallest temperature a logit is up to 1,000, where half precision is coarse
    with torch.autocast(text.device.type, enabled=False):
        image_keys = torch.cat([image.detach(), queue.image])
        text_keys = torch.cat([text.detach(), queue.text])
        text_logits = text @ image_keys.T / head.temperature
        image_logits = image @ text_keys.T / head.temperature
    return Drawn(text_logits, image_logits, text, image)


def negative_weights(logits: Tensor) -> Tensor:
    """How likely each column is drawn as a hard negative: softmax without the own pair, which is
    column i of row i.
    """
    weights = torch.softmax(logits.detach(), dim=1)
    return weights.fill_diagonal_(0) + 1e-9


class PictureLoader:
    """Reads pictures again, by the numbers that the queue keeps of them."""

    def __init__(self, dataset: Any, threads: int):
        self.dataset = dataset
        self.threads = max(1, threads)

    def load(self, row: int) -> Tensor:
        """The picture of one record, (3, S, S); what augmentation draws follows from its number."""
        draw = np.random.default_rng((self.dataset.seed, row))
        return self.dataset.transform(self.dataset.source.images(row)[0], draw)

    def __call__(self, rows: Tensor) -> Tensor:
        """Numbers (R,) -> pixels (R, 3, S, S) on the CPU."""
        with ThreadPoolExecutor(self.threads) as pool:
            return torch.stack(list(pool.map(self.load, rows.tolist())))


def with_queued(experts: Tensor, index: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """The experts of what was drawn, (B, 1, L, D), from those of the batch (B, 1, L, D).

    index (B,): from B on it is a place of the queue; encode(places) gives the experts of these.
    """
    own = len(experts)
    is_queued = index >= own
    if not is_queued.any():
        return experts[index]
    queued = encode(index[is_queued] - own)
    place_of_queued = own - 1 + is_queued.cumsum(0)
    return torch.cat([experts, queued])[torch.where(is_queued, place_of_queued, index)]


def hard_negatives(
    model: Fiber, pairs: Pairs, ids: Tensor, drawn: Drawn, task: Any
) -> tuple[Pairs, Tensor]:
    """(t, i), (hard t, i), (t, hard i): 3B rows, and their labels (3B).

    Negatives are of the batch and of the filled part of the queue. ids (B, Lt).
    """
    queue: Any = model.heads["itc"].queue
    known = len(ids) + int(queue.filled)
    image_of_text = draw_negatives(negative_weights(drawn.text_logits[:, :known]), task.negatives)
    text_of_image = draw_negatives(negative_weights(drawn.image_logits[:, :known]), task.negatives)

    def encode_images(places: Tensor) -> Tensor:
        return model.encode_image(task.load_pictures(queue.rows[places]).to(ids.device))

    def encode_texts(places: Tensor) -> Tensor:
        return model.encode_text(queue.input_ids[places], queue.attention_mask[places])

    hard_images = with_queued(pairs.image_experts, image_of_text, encode_images)
    hard_texts = with_queued(pairs.text_experts, text_of_image, encode_texts)
    queued_masks = queue.attention_mask.to(pairs.mask.dtype)
    masks = torch.cat([pairs.mask, queued_masks])
    hard_masks = masks[text_of_image]
    with_hard_texts = Pairs(hard_texts, pairs.image_experts, hard_masks)
    with_hard_images = Pairs(pairs.text_experts, hard_images, pairs.mask)
    labels = torch.zeros(3 * len(ids), dtype=torch.long, device=ids.device)
    labels[: len(ids)] = 1
    return join([pairs, with_hard_texts, with_hard_images]), labels


def compare_with_queue(task: Any, pairs: Pairs, batch: dict) -> tuple[Tensor, Pairs, Tensor]:
    """The sum of ITC over this process' rows, and what ITM reads: its pairs (3B) and labels (3B).

    In training the batch goes into the queue afterwards.
    """
    model = task.model
    queue = model.heads["itc"].queue
    drawn = queue_logits(model, pairs)
    # row i belongs to column i, and all other columns are false
    own = torch.arange(len(pairs.mask), device=pairs.mask.device)
    columns = len(own) + int(queue.filled)
    if model.config.whole_queue:
        columns = len(own) + queue.size
    text_loss = F.cross_entropy(drawn.text_logits[:, :columns], own, reduction="sum")
    image_loss = F.cross_entropy(drawn.image_logits[:, :columns], own, reduction="sum")
    # the negatives are drawn before the queue changes
    itm_pairs, labels = hard_negatives(model, pairs, batch["input_ids"], drawn, task)
    if task.training:
        remember(queue, drawn, batch, task.shares)
    return (text_loss + image_loss) / 2, itm_pairs, labels


def remember(queue: Queue, drawn: Drawn, batch: dict, shares: list[int]) -> None:
    """Put the rows of all processes into the queue, which is the same in each of them.

    shares: the rows of every process.
    """
    columns = {"text": drawn.text.detach(), "image": drawn.image.detach()}
    columns["rows"] = batch["image_index"]
    columns["input_ids"] = batch["input_ids"]
    columns["attention_mask"] = batch["attention_mask"]
    for name, column in columns.items():
        columns[name] = gather(column, shares)
    queue.push(columns)


class FiberPretraining(Pretraining):
    """MLM and ITM, and ITC with its queue. load_pictures: numbers of records -> pixels."""

    def __init__(
        self,
        model: Any,
        objectives: tuple[str, ...],
        share_images: bool,
        load_pictures: Callable[[Tensor], Tensor],
    ):
        super().__init__(model, objectives, share_images)
        self.load_pictures = load_pictures

    def compare(self, pairs: Pairs, batch: dict) -> tuple[Tensor, Pairs, Tensor]:
        return compare_with_queue(self, pairs, batch)


class FiberRetrieval(Retrieval):
    """ITC with its queue, and ITM with hard negatives from it."""

    def __init__(self, model: Any, load_pictures: Callable[[Tensor], Tensor]):
        super().__init__(model)
        self.load_pictures = load_pictures

    def compare(self, pairs: Pairs, batch: dict) -> tuple[Tensor, Pairs, Tensor]:
        return compare_with_queue(self, pairs, batch)


# ================================================================ 5. captioning
def next_words(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The labels of captioning: after each token the next one, -100 at padding, (B, L)."""
    is_padding = attention_mask[:, 1:] == 0
    following = input_ids[:, 1:].masked_fill(is_padding, -100)
    return F.pad(following, (0, 1), value=-100)


class Captioning(Task):
    """Cross-entropy of each next word, summed over the words."""

    def counts(self, batch: dict) -> dict[str, int]:
        return {"caption": int(batch["attention_mask"][:, 1:].sum())}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        mask = batch["attention_mask"]
        image = self.model.finish_image(self.model.encode_image(batch["pixels"]))
        logits = self.model.caption_logits(image, ids, mask).float()
        labels = next_words(ids, mask)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return {"caption": loss}


def gold_loss(logits: Tensor, old_logits: Tensor, labels: Tensor) -> Tensor:
    """GOLD, the second stage of captioning: the words that an older model finds likely count more.

    logits of the model, and of its older copy, (B, L, V), labels (B, L) as `next_words` makes them.
    The weight of a word is max(0.1, its probability * the mean probability of it and all later
    ones). official: a caption's sum is divided by the number of its positions without a word, and
    not by that of its words. The mean over the captions is returned.
    """
    is_word = labels != -100
    targets = labels.clamp(min=0)[..., None]
    log_probabilities = logits.log_softmax(-1).gather(-1, targets)
    losses = -log_probabilities[..., 0]  # (B, L)
    with torch.no_grad():
        probabilities = old_logits.softmax(-1).gather(-1, targets)
        likely = probabilities[..., 0] * is_word
        # over each word and all later ones
        later = likely.flip(1).cumsum(1).flip(1)
        counts = is_word.flip(1).cumsum(1).flip(1).clamp(min=1)
        weights = (likely * later / counts).clamp(min=0.1) * is_word
    sums = (losses * weights).sum(1)
    places_without = (~is_word).sum(1)
    return (sums / places_without.clamp(min=1)).mean()


class Words(NamedTuple):
    """What captioning has to know of a tokenizer."""

    begin: int
    end: int
    mask: int  # it is never written
    pad: int


class Beams:
    """Captions that are being written, `count` of each of B pictures."""

    def __init__(self, batch: int, count: int, words: Words, device: torch.device):
        self.count = count
        self.words = words
        self.ids = torch.full((batch, count, 1), words.begin, device=device)  # (B, count, T)
        # at first all captions of a picture are the same, so only one of them may go on
        self.sums = torch.full((batch, count), -torch.inf, device=device)  # of log-probabilities
        self.sums[:, 0] = 0
        self.sizes = torch.zeros(batch, count, device=device)  # words, the end included
        self.done = torch.zeros(batch, count, dtype=torch.bool, device=device)

    def extend(self, scores: Tensor) -> None:
        """Go on with the captions that are best so far. scores (B, count, V): log-probabilities of
        their next words.
        """
        # a finished caption goes on as it is, with padding, and so takes one place
        vocabulary = scores.shape[-1]
        is_padding = torch.arange(vocabulary, device=scores.device) == self.words.pad
        done = self.done[..., None]
        scores = scores.masked_fill(done & ~is_padding, -torch.inf)
        scores = scores.masked_fill(done & is_padding, 0)
        # the best of all captions with all next words, by their means
        totals = self.sums[..., None] + scores
        sizes = self.sizes + (~self.done).float()
        means = totals / sizes[..., None]
        best = means.flatten(1).topk(self.count).indices  # (B, count)
        parents = best // vocabulary
        new_words = best % vocabulary
        self.sums = totals.flatten(1).gather(1, best)
        self.sizes = sizes.gather(1, parents)
        self.done = self.done.gather(1, parents) | (new_words == self.words.end)
        ids = self.ids.take_along_dim(parents[..., None], dim=1)
        self.ids = torch.cat([ids, new_words[..., None]], dim=-1)

    def best(self) -> Tensor:
        """The best caption of each picture, (B, T - 1) ids, without the first one."""
        chosen = (self.sums / self.sizes).argmax(1)
        return self.ids.take_along_dim(chosen[:, None, None], dim=1)[:, 0, 1:]


@torch.no_grad()
def write_captions(
    model: Fiber, pixels: Tensor, words: Words, beams: int = 5, length: int = 0
) -> Tensor:
    """Captions by beam search, (B, T) ids without the first token, with padding after their ends.

    length: most tokens with the first one; 0: max_text_len of the config. The best caption has the
    highest mean log-probability.
    """
    length = length or model.config.max_text_len
    image = model.finish_image(model.encode_image(pixels))
    captions = Beams(len(image), beams, words, image.device)
    image = image.repeat_interleave(beams, 0)
    for _ in range(length - 1):
        ids = captions.ids.flatten(0, 1)
        scores = next_word_scores(model, image, ids, words)
        captions.extend(scores.unflatten(0, (-1, beams)))
        if captions.done.all():
            break
    return captions.best()


def next_word_scores(model: Fiber, image: Tensor, ids: Tensor, words: Words) -> Tensor:
    """log-probabilities of each next word, (B * beams, V)."""
    mask = torch.ones_like(ids)
    logits = model.caption_logits(image, ids, mask)[:, -1].float()
    # official: a very low logit, before the softmax
    logits[:, words.mask] = -1e4
    return logits.log_softmax(-1)


# ================================================================ 6. official weights
SWIN_BLOCK: Names = {
    "ln_1.*": "norm1.*",
    "qkv.*": "attn.qkv.*",
    "proj.*": "attn.proj.*",
    "position_bias": "attn.relative_position_bias_table",
    "ln_2.*": "norm2.*",
    "fc.*": "mlp.fc1.*",
    "fc_out.*": "mlp.fc2.*",
}
FUSED_BLOCK: Names = {
    "ln_cross.*": "attn.norm_i2t_i.*",
    "cross_q.*": "attn.qkv_i2t.*",
    "cross_kv.*": "attn.qkv_text_i2t.*",
    "cross_proj.*": "attn.proj_i2t.*",
    "alpha": "attn.alpha_i2t",
}
SWIN: Names = {
    "patch.*": "patch_embed.proj.*",
    "ln_patch.*": "patch_embed.norm.*",
    "merges.{}.ln.*": "layers.{}.downsample.norm.*",
    "merges.{}.reduction.weight": "layers.{}.downsample.reduction.weight",
    "ln_post.*": "norm.*",
}
FUSED_LAYER: Names = {
    "q.*": "crossattention_t2i.self.query.*",
    "kv.*": ("crossattention_t2i.self.key.*", "crossattention_t2i.self.value.*"),
    "cross_proj.*": "crossattention_t2i.output.dense.*",
    "alpha": "alpha_t2i",
}
FUSED_FEATURES: Names = {
    "text_transform.*": "cross_modal_text_transform.*",
    "image_transform.*": "cross_modal_image_transform.*",
    "text_pooler.*": "cross_modal_text_pooler.dense.*",
    "image_pooler.*": "cross_modal_image_pooler.dense.*",
}
ITC_NAMES: Names = {
    "text_transform.*": "cross_modal_text_transform_itc.*",
    "image_transform.*": "cross_modal_image_transform_itc.*",
    "text_pooler.*": "cross_modal_text_pooler_itc.dense.*",
    "image_pooler.*": "cross_modal_image_pooler_itc.dense.*",
    "temperature": "temp",
}
FIBER_HEADS: dict[str, Names] = {**HEAD_NAMES, "itc": ITC_NAMES}
FIBER_HEAD_NAMES = (*HEADS, "caption")
QUEUE = "heads.itc.queue."  # of these buffers the official ones are pixels and words of other data
SWIN_BUFFERS = (r".*\.attn_mask", r".*\.relative_position_index")
IDLE_KEYS = (
    *SWIN_BUFFERS,
    r"text_transformer\.(embeddings\.position_ids|pooler\..*)",
    r".*\.crossattention_t2i\.output\.LayerNorm\..*",
    r".*_queue|queue_(ptr|total)",
)
# in every official state, and in a model of ours only with the head that reads it
KEYS_OF_HEADS = {
    "itc": (r"temp", r"cross_modal_(text|image)_(transform|pooler)_itc\..*"),
    "retrieval": (r"rank_output\..*",),
}


def swin_rows(config: FiberConfig, ours: str, theirs: str) -> list[Row]:
    """The layout of Swin, without what FIBER adds to it; the prefixes go before all keys."""
    rows = expand(SWIN, ours, theirs, STAGES - 1)
    stages = config.stage_of_block()
    for number, stage in enumerate(stages):
        place = number - stages.index(stage)
        block = f"{theirs}layers.{stage}.blocks.{place}."
        rows += expand(SWIN_BLOCK, f"{ours}blocks.{number}.", block)
    return rows


def fiber_rows(config: FiberConfig) -> list[Row]:
    """The layout of an official state."""
    rows = swin_rows(config, "image_encoder.", "vit_model.")
    rows += expand(ROBERTA, "text_encoder.", "text_transformer.", config.text_layers)
    # what makes the last blocks fused ones
    stages = config.stage_of_block()
    for number in range(len(stages) - config.fused_layers, len(stages)):
        place = number - stages.index(stages[number])
        block = f"vit_model.layers.{stages[number]}.blocks.{place}."
        rows += expand(FUSED_BLOCK, f"image_encoder.blocks.{number}.", block)
    for number in range(config.text_layers - config.fused_layers, config.text_layers):
        layer = f"text_transformer.encoder.layer.{number}."
        rows += expand(FUSED_LAYER, f"text_encoder.layers.{number}.", layer)
    rows += expand(FUSED_FEATURES)
    for head in config.heads:
        rows += head_rows(head, config)
    return rows


def head_rows(head: str, config: FiberConfig) -> list[Row]:
    """The layout of one head."""
    if head != "caption":
        return expand(FIBER_HEADS[head], f"heads.{head}.")
    # theirs are numbered as the text layers are
    rows = []
    first = config.text_layers - config.fused_layers
    for pair in range(num_caption_layers(config)):
        names = {f"{pair}.*": f"cross_modal_att_layers.{first + pair}.*"}
        rows += expand(names, "heads.caption.")
    return rows


def num_caption_layers(config: FiberConfig) -> int:
    """How many fused pairs are in Swin's third stage."""
    return max(0, config.fused_layers - config.vision_depths[3])


def idle_keys(config: FiberConfig) -> tuple[str, ...]:
    """Patterns of the official keys that a model with these heads does not read."""
    patterns = list(IDLE_KEYS)
    for head, keys in KEYS_OF_HEADS.items():
        if head not in config.heads:
            patterns += keys
    # what the official code makes for all text layers, and reads only in the fused ones
    for number in range(config.text_layers - config.fused_layers):
        patterns.append(rf"text_transformer\.encoder\.layer\.{number}\.alpha_t2i")
        if "caption" in config.heads:
            patterns.append(rf"cross_modal_att_layers\.{number}\..*")
    return tuple(patterns)


def from_official(state: State, config: FiberConfig) -> State:
    """An official state -> ours, strictly, without the queue's buffers; meta tensors work too.

    Raises ValueError with the keys that are missing, unknown, misshapen or not finite.
    """
    with torch.device("meta"):
        shapes = shapes_of(Fiber(config))
    return import_state(state, fiber_rows(config), shapes, idle_keys(config))


def to_official(state: State, config: FiberConfig) -> State:
    """Ours -> official names, of any dict with our keys: gradients, and a part of a model."""
    return export_state(state, fiber_rows(config))


def resize_position_bias(table: Tensor, window: int) -> Tensor:
    """A bias table for windows of another size: ((2v - 1)^2, H) -> ((2w - 1)^2, H), bicubically.

    Raises ValueError for a table that is of no window.
    """
    side = round(len(table) ** 0.5)
    if table.dim() != 2 or side * side != len(table) or side % 2 == 0:
        raise ValueError(
            f"a table of biases of shape {tuple(table.shape)} has no odd square of rows"
        )
    new_side = 2 * window - 1
    if new_side == side:
        return table
    square = table.float().T.reshape(1, -1, side, side)  # (1, H, 2v - 1, 2v - 1)
    square = F.interpolate(square, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return square.flatten(2)[0].T.to(table.dtype)


def official_heads(state: State) -> tuple[str, ...]:
    """The heads that an official state has."""
    marks = {
        "mlm": "mlm_score.bias",
        "itm": "itm_score.fc.weight",
        "itc": "temp",
        "retrieval": "rank_output.weight",
        "vqa": "vqa_classifier.0.weight",
        "nlvr2": "nlvr2_classifier.0.weight",
        "caption": "cross_modal_att_layers.0.weight",
    }
    return tuple(head for head, key in marks.items() if key in state)


def count_layers(state: State, key: str) -> int:
    """How many numbers stand for {} in a key."""
    number = 0
    while key.replace("{}", str(number)) in state:
        number += 1
    return number


def shape_of(state: State, key: str, dimensions: int) -> torch.Size:
    """The shape of an official tensor. Raises ValueError if it is not there, or of another rank."""
    if key not in state:
        raise ValueError(f"these are no official FIBER weights: they have no {key}")
    shape = state[key].shape
    if len(shape) != dimensions:
        raise ValueError(
            f"wrong shape: {key} is {tuple(shape)}, should have {dimensions} dimensions"
        )
    return shape


def official_config(
    state: State,
    image_size: int,
    vision_heads: Sequence[int],
    text_heads: int,
    fused: int,
    pad_token_id: int = 1,
) -> FiberConfig:
    """The sizes of an official state. Meta tensors work too."""
    size = functools.partial(shape_of, state)
    depths = []
    for stage in range(STAGES):
        depths.append(count_layers(state, f"vit_model.layers.{stage}.blocks.{{}}.norm1.weight"))
    layer = "text_transformer.encoder.layer.{}."
    embeddings = "text_transformer.embeddings."
    words = size(f"{embeddings}word_embeddings.weight", 2)
    positions = size(f"{embeddings}position_embeddings.weight", 2)
    mlp = size("text_transformer.encoder.layer.0.intermediate.dense.weight", 2)
    values: dict[str, Any] = {}
    values["vision_width"] = size("vit_model.patch_embed.proj.weight", 4)[0]
    values["vision_depths"] = tuple(depths)
    values["vocab_size"] = words[0]
    values["text_width"] = words[1]
    values["max_positions"] = positions[0]
    values["text_layers"] = count_layers(state, f"{layer}attention.output.dense.weight")
    values["text_mlp_width"] = mlp[0]
    values["hidden_size"] = size("cross_modal_text_transform.weight", 2)[0]
    if "vqa_classifier.3.weight" in state:
        values["num_answers"] = size("vqa_classifier.3.weight", 2)[0]
    # the queue has the length that texts were padded to
    values["max_text_len"] = min(50, positions[0] - pad_token_id - 1)
    if "text_input_queue" in state:
        queue = size("text_input_queue", 2)
        values["queue_size"] = queue[0]
        values["max_text_len"] = queue[1]
    return FiberConfig(
        image_size=image_size,
        vision_heads=tuple(vision_heads),
        text_heads=text_heads,
        pad_token_id=pad_token_id,
        fused_layers=fused,
        heads=official_heads(state),
        **values,
    )


def load_official(
    state: State,
    image_size: int,
    vision_heads: Sequence[int],
    text_heads: int,
    fused: int = 6,
    pad_token_id: int = 1,
) -> Fiber:
    """An official state -> Fiber, in evaluation mode; all other sizes follow from the shapes."""
    config = official_config(state, image_size, vision_heads, text_heads, fused, pad_token_id)
    model = Fiber(config)
    ours = as_float32(from_official(state, config))
    model.load_state_dict({**ours, **queue_of(model)})
    return model.eval()


def as_float32(state: State) -> State:
    return {key: tensor.float() for key, tensor in state.items()}


def queue_of(model: nn.Module) -> State:
    """The buffers of a model's queue, which no foreign weights have."""
    return {key: x for key, x in model.state_dict().items() if key.startswith(QUEUE)}


# ---------------------------------------------------------------- files
def load_fiber(folder: str | Path, **overrides: Any) -> Fiber:
    """A checkpoint folder of ours -> Fiber; overrides are other values of fields, as `load_tower`
    of weights.py takes them.

    Bias tables are resized for another image size. The queue of the folder, whose rows are of the
    data of another run, is left there.
    """
    return load_fitted(folder, FiberConfig, Fiber, fit_state, overrides)


def fit_state(folder: str | Path, stored: State, model: Any) -> State:
    """The weights of a file, made to fit a model for another task. Meta tensors work too.

    Raises ValueError for what does not fit.
    """
    state = {key: tensor for key, tensor in stored.items() if not key.startswith(QUEUE)}
    with naming(folder):
        refuse(bad_values(state))
        state = resize_position_biases(state, "position_bias", model.config)
    if "retrieval" in model.heads:
        seed_rank_head(state)
    kept = stored_heads(state, FIBER_HEAD_NAMES)
    state = without_heads(state, sorted(kept - set(model.heads)))
    add_new_heads(state, model, sorted(set(model.heads) - kept))
    state.update(queue_of(model))
    refuse_differences(folder, state, model)
    return state


def resize_position_biases(state: State, ending: str, config: FiberConfig) -> State:
    """The same with all bias tables, whose keys have this ending, for the windows of a config."""
    resized = dict(state)
    for key, tensor in state.items():
        if key.endswith(ending):
            resized[key] = resize_position_bias(tensor, config.window)
    return resized


SWIN_DEAD = (*SWIN_BUFFERS, r"head\..*")  # in a Swin's file, and not in ours


def load_unimodal(model: Fiber, vision: str | Path, text: str | Path) -> None:
    """Fill both encoders from a Swin-B and a RoBERTa: .safetensors files, or folders of them.

    Swin is read under the names of its authors, which timm 0.4 has too. What FIBER adds stays new.
    """
    config: Any = model.config
    settings = settings_beside(text)
    for read in READERS:
        state = read_published(text, read)
        layout, prefix = find_layout(state, (HF_ROBERTA_LAYOUT,), settings)
        if read is read_headers:
            check_published(settings, layout, config, "text")
        with naming(text):
            rows = layout.rows(prefix, config.text_layers)
            roberta = import_state(state, rows, shapes_of(model.text_encoder), layout.dead)
    for read in READERS:
        state = read_published(vision, read)
        with naming(vision):
            state = resize_position_biases(state, "relative_position_bias_table", config)
            rows = swin_rows(config, "", "")
            swin = import_state(state, rows, shapes_of(model.image_encoder), SWIN_DEAD)
    for encoder, new in ((model.text_encoder, roberta), (model.image_encoder, swin)):
        encoder.load_state_dict({**encoder.state_dict(), **new})


def convert(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    answers: list[str] | None = None,
) -> None:
    """The authors' checkpoint -> a checkpoint folder, or a Swin's -> a folder for --vision.

    Nothing in their files is executed. The tokenizer, and the texts of a VQA model's answers, go
    along.
    """
    out = Path(out)
    source = find_folder(source)
    state, _ = read_weights(source)
    with naming(source):
        refuse_our_own(state)
        if "patch_embed.proj.weight" in state:
            convert_swin(state, out)
            return
        config = published_config(state)
        if answers and len(answers) != config.num_answers:
            raise ValueError(
                f"--answers has {len(answers)} answers, but the model has {config.num_answers}"
            )
        ours = as_float32(from_official(state, config))
    save_folder({**ours, **queue_of(Fiber(config))}, config, out)
    if answers:
        write_json(out / "answers.json", answers)
    if tokenizer:
        load_tokenizer(tokenizer).save(out)
    print(f"{out}: {config}")


def published_config(state: State) -> FiberConfig:
    """The sizes of a checkpoint as the authors publish them.

    A window has image_size / 32 tokens on each side, so the bias tables say how large the pictures
    are; their columns are Swin's heads, and RoBERTa has 64 channels a head.
    """
    table = "vit_model.layers.{}.blocks.0.attn.relative_position_bias_table"
    shapes = [shape_of(state, table.format(stage), 2) for stage in range(STAGES)]
    window = (round(shapes[0][0] ** 0.5) + 1) // 2
    width = shape_of(state, "text_transformer.embeddings.word_embeddings.weight", 2)[1]
    fused = len([key for key in state if key.endswith(".alpha_i2t")])
    vision_heads = [shape[1] for shape in shapes]
    return official_config(state, SCALE * window, vision_heads, max(1, width // 64), fused)


def convert_swin(state: State, out: Path) -> None:
    """A Swin under its own names, as the model.safetensors of a folder."""
    kept = {key: x.contiguous() for key, x in state.items() if not is_dead(key, SWIN_DEAD)}
    refuse(bad_values(kept))
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "model.safetensors", lambda path: save_file(kept, path))
    print(f"{out}: a Swin Transformer, for --vision")


# ================================================================ 7. what the scripts ask
# parts of official names, by which the official code gives learning rates and weight decay
FAST_HEADS = ("vqa_classifier", "nlvr2_classifier", "snli_classifier", "mlm_score", "itm_score")
CROSS_MODAL = ("cross_modal", "i2t", "t2i")
UNDECAYED = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")


def has_part(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)


def official_rule(name: str, run: Any) -> tuple[float, float]:
    """(learning rate, weight decay) of a parameter, by its official name.

    So bias tables and most norms have no decay, but norm_i2t_i, the norms of classifiers, the gates
    and the embeddings have.
    """
    scale = 1.0
    if has_part(name, FAST_HEADS):
        scale = run.lr_mult_head
    elif has_part(name, CROSS_MODAL):
        scale = run.lr_mult_cross_modal
    decay = 0.0 if has_part(name, UNDECAYED) else run.weight_decay
    return scale * run.learning_rate, decay


def param_groups(model: Fiber, run: Any) -> list[dict]:
    """AdamW's groups: what the official code does with the official names of our parameters."""
    official_names = {row.ours: row.theirs[0] for row in fiber_rows(model.config)}
    return make_groups(model, lambda name: official_rule(official_names[name], run))


def picture_loader(dataset: Any, run: Any) -> PictureLoader:
    """Raises ValueError for --shard, whose training state has no room for a queue."""
    if run.shard:
        raise ValueError(
            "--shard does not go with FIBER's ITC: a sharded training state holds parameters, and "
            "the queue is none"
        )
    return PictureLoader(dataset, run.num_workers)


def make_pretraining(model: Any, run: Any, dataset: Any) -> Task:
    if "itc" not in run.objectives:
        return Pretraining(model, run.objectives, run.share_images)
    loader = picture_loader(dataset, run)
    return FiberPretraining(model, run.objectives, run.share_images, loader)


def make_retrieval(model: Fiber, run: Any, dataset: Any) -> Task:
    return FiberRetrieval(model, picture_loader(dataset, run))


RECIPES: dict[str, tuple[dict, dict]] = {
    "demo": (
        {
            "out_dir": "out/fiber",
            "objectives": ("mlm", "itm", "itc"),
            "max_steps": 600,
            "batch_size": 32,
            "micro_batch_size": 32,
            "learning_rate": 7e-4,
            # the gates start closed, and open at this rate
            "lr_mult_cross_modal": 3.0,
            "eval_every": 0,
            "save_every": 300,
        },
        {},
    ),
    # section 4: 100k steps of 1,024 pairs at 384 pixels, decay after 10k steps, and five times the
    # rate for what the encoders did not have before
    "pretrain": (
        {
            "out_dir": "out/fiber_pretrain",
            "model": "base",
            "objectives": ("mlm", "itm", "itc"),
            "max_steps": 100_000,
            "batch_size": 1024,
            "micro_batch_size": 32,
            "learning_rate": 1e-5,
            "lr_mult_head": 5.0,
            "lr_mult_cross_modal": 5.0,
            "transform": "albef",
            "save_every": 1000,
            "eval_every": 5000,
            "eval_size": 4096,
            "num_workers": 12,
        },
        {"max_text_len": 40},
    ),
}
# the authors' configuration of VQA; of the other tasks the recipes of tasks.py are taken
TASK_RECIPES: dict[str, tuple[dict, dict]] = {
    "vqav2": (
        {"learning_rate": 2e-5, "weight_decay": 0.01, "warmup": 0.1, "batch_size": 512},
        {"image_size": 576, "head_hidden_scale": 1, "max_text_len": 50},
    ),
    "snli_ve": ({}, {"head_hidden_scale": 1}),
}
SYSTEM = System(
    config=FiberConfig,
    model=Fiber,
    pretraining=make_pretraining,
    retrieval=make_retrieval,
    groups=param_groups,
    load=load_fiber,
    load_unimodal=load_unimodal,
    convert=convert,
    recipes=RECIPES,
    tasks=TASK_RECIPES,
)


# ================================================================ 8. the demo
@dataclass
class DemoOptions:
    """Learn the built-in scenes: captions, questions about them, and to write captions."""

    out_dir: str = option("out/fiber", "folder of the three runs")
    pretrain_steps: int = option(600, "updates of MLM, ITM and ITC", least=1)
    question_steps: int = option(600, "updates on questions", least=1)
    caption_steps: int = option(400, "updates on writing captions", least=1)
    seed: int = option(0, "of everything random", least=0)

    def __post_init__(self) -> None:
        check_fields(self)


def both_captions(caption: str) -> list[str]:
    """A caption of a built-in scene, and the one that says the same the other way round."""
    for relation, opposite in OPPOSITE.items():
        first, found, second = caption.partition(f" is {relation} ")
        if found:
            return [caption, f"{second} is {opposite} {first}"]
    return [caption]


def evaluate_captions(model: Fiber, dataset: PairDataset, beams: int = 3) -> dict[str, float]:
    """BLEU-4 and the share of captions that are right to the last word, both from 0 to 1."""
    tokenizer = dataset.tokenizer
    words = Words(tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id)
    parts = []
    with evaluating(model) as device:
        for rows, batch in batches(dataset, 64):
            ids = write_captions(model, batch["pixels"].to(device), words, beams).tolist()
            for row, row_ids in zip(rows, ids, strict=True):
                parts.append((row, tokenizer.decode(row_ids).strip()))
    written = collect(parts)
    references = [both_captions(row["text"]) for row in dataset.source.texts()]
    right = [text in texts for text, texts in zip(written, references, strict=True)]
    bleu_4 = bleu(written, references)
    return {"bleu_4": bleu_4, "exact_match": sum(right) / len(right), "score": bleu_4}


def train_captions(init: str, run: TowerRunConfig, world: World) -> dict[str, float]:
    """Captioning of the built-in scenes, from a checkpoint folder. Returns held-out metrics."""
    seed_all(run.seed, "model")
    model = load_fiber(init, heads=("mlm", "caption")).to(world.device)
    tokenizer = load_tokenizer(init)
    size = model.config.image_size
    length = model.config.max_text_len
    transform = functools.partial(tower_transform, run.transform, model.config)
    source = demo_source("captions", "train", 20_000, run.seed, size)
    heldout = demo_source("captions", "heldout", run.eval_size, run.seed, size)
    dataset = PairDataset(source, tokenizer, transform(train=True), length, run.seed)
    measured = PairDataset(heldout, tokenizer, transform(train=False), length)
    evaluate = functools.partial(evaluate_captions, model, measured)
    identity = {
        "config": dataclasses.asdict(model.config),
        "tokenizer": tokenizer.digest(),
        "training_texts": source.digest,
    }
    checkpoint = Checkpoint(run, model, tokenizer.save, identity, world)
    fit(run, Captioning(model), dataset, evaluate, checkpoint, world, param_groups(model, run))
    # the last row: the run may have been finished before
    evaluations = [row["eval"] for row in read_log(checkpoint.log_file) if "eval" in row]
    return evaluations[-1]


def demo(options: DemoOptions) -> None:
    """Three runs, one after the other; each says what it learnt."""
    import finetune  # the scripts find this file by its name, as they do for --system fiber
    import train

    folder = options.out_dir
    common = ["--system", "fiber", "--seed", str(options.seed)]
    train.main([*common, "--out_dir", folder, "--max_steps", str(options.pretrain_steps)])
    questions = ["--task", "vqav2", "--data", "demo", "--init", folder]
    # the gates go on opening faster than the rest learns, as in pre-training
    steps = ["--max_steps", str(options.question_steps), "--lr_mult_cross_modal", "3"]
    finetune.main([*common, *questions, *steps, "--out_dir", f"{folder}/questions"])
    run = TowerRunConfig(
        out_dir=f"{folder}/captions",
        max_steps=options.caption_steps,
        learning_rate=1e-3,
        lr_mult_cross_modal=3.0,
        transform="albef",
        eval_every=0,
        eval_size=256,
        seed=options.seed,
    )
    metrics = train_captions(folder, run, World(run.device))
    print(
        f"captions of held-out scenes: BLEU-4 {metrics['bleu_4']:.1%}, right to the last word "
        f"{metrics['exact_match']:.1%}"
    )


def main(argv: list[str]) -> None:
    demo(parse_flags(DemoOptions, argv, DemoOptions.__doc__ or ""))


if __name__ == "__main__":
    one_sentence(main)
