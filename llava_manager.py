"""LLaVA-OV-Manager in plain PyTorch: SigLIP, a projector, multi-grid images, Qwen2, and visual managers inside the LLM.

Paper: Manager (TCSVT 2025), sections IV and V. An image is a base tile and a grid of tiles; their projected last hidden
states of SigLIP take the place of <image> in the text. Before some LLM layers a manager adds to the image tokens what
it aggregates from N hidden states of SigLIP (the managed layers): h_image += sum_n W_n * (proj(V_n) + e_n). W starts at
zero: an untrained manager leaves LLaVA-OneVision as it is. Read from `LlavaManager.forward` on.

Shapes: B batch, N experts (managed layers), K managers, L tokens, S spliced length, T tiles, D width, V vocabulary.
Experts are (B, N, L, D), where B counts tiles, or is 1 with all image tokens of the batch behind one another.

    model = load_model("llava-ov-manager-0.5b").eval()                      # the published folder, or one of ours
    image = preprocess_image(Image.open("a.jpg"), model.config)
    prompt = encode_prompt(["What is this?"], tokenizer, num_images=1)
    tokens = model.generate(torch.tensor([prompt]), images=[image])
"""
import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from manager import AdaptiveVisualManager, StaticVisualManager, weighted_sum
from model import (
    ViT,
    expand,
    export_state,
    hf_vision_table,
    import_state,
    init_weights,
    load_encoder,
    read_config,
    read_safetensors,
    run,
    save_folder,
)

IMAGE_TOKEN, IGNORE = -200, -100  # the id of an image placeholder; the label of a token without loss
IMAGE_TAG, SYSTEM = "<image>", "You are a helpful assistant."
BICUBIC = Image.Resampling.BICUBIC
OFFICIAL_FIELDS = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers",
                   "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
                   "mlp_width": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta"}
VISION_FIELDS = {"image_size": "image_size", "patch_size": "patch_size", "vision_width": "hidden_size",
                 "vision_layers": "num_hidden_layers", "vision_heads": "num_attention_heads",
                 "vision_mlp_width": "intermediate_size"}
OPTIONAL_FIELDS = {"max_length": "tokenizer_model_max_length", "grid_pinpoints": "image_grid_pinpoints",
                   "aspect": "image_aspect_ratio", "merge": "mm_patch_merge_type",
                   "tie_embeddings": "tie_word_embeddings"}
SUPPORTED = {"rope_scaling": None, "use_sliding_window": False, "hidden_act": "silu", "mm_projector_type": "mlp2x_gelu",
             "mm_manager_residual": True}


@dataclass
class LlavaManagerConfig:
    """The architecture; the defaults are the paper's: SigLIP-so400m-384, Qwen2-0.5B-Instruct, static managers."""
    # vision: SigLIP, whose last layer is not used (nor built): hidden states 0 .. vision_layers - 1 exist
    image_size: int = 384
    patch_size: int = 14
    vision_width: int = 1152
    vision_layers: int = 27
    vision_heads: int = 16
    vision_mlp_width: int = 4304
    # language: Qwen2
    vocab_size: int = 151936
    hidden_size: int = 896
    num_layers: int = 24
    num_heads: int = 14
    num_kv_heads: int = 2
    mlp_width: int = 4864
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_embeddings: bool = True  # False in the 7B model
    initializer_range: float = 0.02  # standard deviation of new matrices, Qwen2's
    max_length: int = 16384  # sequences are cut here after splicing
    im_start_id: int = 151644  # <|im_start|>: adaptive managers find the text query by it
    eos_ids: tuple[int, ...] = (151645,)  # generation stops at any of them
    # managers
    manager_type: str | None = "static"  # None | static | adaptive | adaptive_last | adaptive_average | adaptive_cross
    managed_layers: tuple[int, ...] = tuple(range(13, 26))  # hidden states of SigLIP
    inject_layers: tuple[int, ...] = tuple(range(0, 24, 4))  # LLM layers with a manager before them
    managed_grids: str = "all"  # all | base | grids: the tokens that are managed; an image of one tile always is
    # images
    aspect: str = "anyres_max_9"  # square | pad | anyres | anyres_max_K: at most about K tiles' worth of tokens
    grid_pinpoints: tuple | str = "(1x1),...,(6x6)"  # (width, height) in pixels, or a range of them in tiles
    merge: str = "spatial_unpad"  # spatial_unpad | flat

    @classmethod
    def base(cls, **overrides) -> "LlavaManagerConfig":
        return cls(**overrides)

    @classmethod
    def tiny(cls, **overrides) -> "LlavaManagerConfig":
        """For the built-in demo data: a 64 x 64 scene is a base tile and a grid of 2 x 2."""
        return cls(**{"image_size": 32, "patch_size": 8, "vision_width": 96, "vision_layers": 4, "vision_heads": 3,
                      "vision_mlp_width": 384, "vocab_size": 320, "hidden_size": 96, "num_layers": 4, "num_heads": 4,
                      "num_kv_heads": 2, "mlp_width": 256, "max_length": 512, "im_start_id": 1, "eos_ids": (2,),
                      "managed_layers": (1, 2), "inject_layers": (0, 2), "aspect": "anyres_max_4",
                      "grid_pinpoints": "(1x1),...,(2x2)", **overrides})

    @classmethod
    def from_official(cls, config: dict, vision: dict | None = None, im_start_id: int = 151644) -> "LlavaManagerConfig":
        """The published config.json of LLaVA-OV-Manager or LLaVA-OneVision -> ours; unknown keys are ignored.
        vision: a HF SigLIP (vision) config; SigLIP-so400m-patch14-384 when not given. Raises ValueError."""
        vision = vision and vision.get("vision_config", vision)
        kind, eos, grids = (config.get(k) for k in ("mm_manager_type", "eos_token_id", "mm_manager_grid_type"))
        names = (("managed_layers", "vision_select_layers"), ("inject_layers", "injection")) if kind else ()
        spans = {k: [f"mm_manager_{name}_{x}" for x in ("start", "end", "interval")] for k, name in names}
        missing = [k for k in [*OFFICIAL_FIELDS.values(), *sum(spans.values(), [])] if k not in config]
        missing += [f"vision {k}" for k in VISION_FIELDS.values() if vision and k not in vision]
        if missing:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        for key, value in SUPPORTED.items():
            if config.get(key, value) != value:
                raise ValueError(f"the config's {key} is {config[key]!r}; only {value!r} is supported")
        values = {ours: config[theirs] for ours, theirs in OFFICIAL_FIELDS.items()}
        values |= {ours: vision[theirs] for ours, theirs in VISION_FIELDS.items() if vision}
        values |= {ours: tuple(range(*(config[k] for k in keys))) for ours, keys in spans.items()}
        values |= {"aspect": "square", "merge": "flat", "tie_embeddings": False, "im_start_id": im_start_id}
        values |= {ours: config[theirs] for ours, theirs in OPTIONAL_FIELDS.items() if config.get(theirs)}
        return cls(**values, eos_ids=() if eos is None else (eos,) if isinstance(eos, int) else eos,
                   manager_type=kind and kind.removesuffix("_zerouni"),
                   managed_grids={None: "all", "main": "base", "grid": "grids"}.get(grids, grids))

    def __post_init__(self):
        for name in ("managed_layers", "inject_layers", "eos_ids"):
            setattr(self, name, tuple(getattr(self, name)))
        self.grid_pinpoints = expand_pinpoints(self.grid_pinpoints, self.image_size)
        managers = "None|static|adaptive|adaptive_last|adaptive_average|adaptive_cross"
        for name, pattern in (("manager_type", managers), ("managed_grids", "all|base|grids"),
                              ("merge", "spatial_unpad|flat"), ("aspect", r"square|pad|anyres|anyres_max_[1-9]\d*")):
            if not re.fullmatch(pattern, str(getattr(self, name))):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {pattern.replace('|', ' or ')}")
        for width, heads in (("vision_width", "vision_heads"), ("hidden_size", "num_heads"),
                             ("num_heads", "num_kv_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}")
        ends = {"managed_layers": self.vision_layers, "inject_layers": self.num_layers} if self.manager_type else {}
        for name, end in ends.items():
            layers = getattr(self, name)
            if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < end:
                raise ValueError(f"{name} is {layers}; it must be ascending numbers from 0 to {end - 1}")
        if ends and self.inject_layers[0] == 0 and len(self.managed_layers) < 2:
            raise ValueError("a manager at LLM layer 0 drops the last managed layer, so it needs at least two of them")

    def is_static(self, layer: int) -> bool:
        """Whether this LLM layer's manager is static; before layer 0, where the image has not met the text, all are."""
        return self.manager_type == "static" or layer == 0

    @property
    def side(self) -> int:
        """Patches along the side of a tile."""
        return self.image_size // self.patch_size


# ---- Images: which tiles, and which tokens. Sizes are (width, height) everywhere
class ImageTiles(NamedTuple):
    pixels: Tensor  # (T, 3, S, S): the base tile, then the grid row by row
    size: tuple[int, int]  # of the original image


def expand_pinpoints(pinpoints, image_size: int) -> tuple[tuple[int, int], ...]:
    """"(1x1),...,(6x6)" -> ((s, s), (s, 2s), ..., (6s, 6s)); a list of sizes in pixels is only checked."""
    if isinstance(pinpoints, str):
        span = re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", pinpoints.replace(" ", ""))
        if not span:
            raise ValueError(f'grid_pinpoints is {pinpoints!r}; it must be like "(1x1),...,(6x6)", or a list of sizes')
        w0, h0, w1, h1 = map(int, span.groups())
        pinpoints = [(w * image_size, h * image_size) for w in range(w0, w1 + 1) for h in range(h0, h1 + 1)]
    pinpoints = tuple((int(w), int(h)) for w, h in pinpoints)
    if not pinpoints or any(x < image_size or x % image_size for size in pinpoints for x in size):
        raise ValueError(f"grid_pinpoints {pinpoints} must be sizes in pixels, multiples of the tile's {image_size}")
    return pinpoints


def select_best_resolution(size: tuple[int, int], pinpoints) -> tuple[int, int]:
    """The (width, height) of `pinpoints` that keeps most of the image's pixels, then wastes least, then comes first."""
    def key(candidate):
        scale = min(candidate[0] / size[0], candidate[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - candidate[0] * candidate[1]
    return max(map(tuple, pinpoints), key=key)


def paste_centred(image: Image.Image, size: tuple[int, int], grey: int) -> Image.Image:
    canvas = Image.new("RGB", size, (grey,) * 3)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def resize_and_pad(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """Scale to fit into the target, the other side rounded up, and centre on black."""
    scale = min(target[0] / image.width, target[1] / image.height)
    fit = [min(math.ceil(x * scale), limit) for x, limit in zip(image.size, target)]
    return paste_centred(image.resize(fit, BICUBIC), target, 0)


def preprocess_image(image: Image.Image, config: LlavaManagerConfig, multi_image: bool = False) -> ImageTiles:
    """The tiles that SigLIP sees. anyres: the whole image squashed into one, then its best resolution cut into tiles;
    square: the first alone; pad, and every image of a conversation that has several (multi_image): one tile, padded."""
    image, s = image.convert("RGB"), config.image_size
    tiles = [image]
    if multi_image or config.aspect == "pad":
        tiles = [paste_centred(image, (max(image.size), max(image.size)), 127)]
    elif config.aspect != "square":
        big = resize_and_pad(image, select_best_resolution(image.size, config.grid_pinpoints))
        tiles += [big.crop((x, y, x + s, y + s)) for y in range(0, big.height, s) for x in range(0, big.width, s)]
    pixels = torch.from_numpy(np.stack([np.asarray(tile.resize((s, s), BICUBIC)) for tile in tiles]))
    return ImageTiles(pixels.permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5).contiguous(), image.size)


def grid_geometry(size: tuple[int, int], config: LlavaManagerConfig) -> tuple:
    """(columns, rows) of tiles; the slices (rows, columns) of their map of patches that are not padding; the final
    (height, width) of the map, smaller than the slices where anyres_max_K shrinks it."""
    columns, rows = (x // config.image_size for x in select_best_resolution(size, config.grid_pinpoints))
    h, w = rows * config.side, columns * config.side
    # truncated, where resize_and_pad rounds up, and the same margin on both sides: so does the official code
    if size[0] / size[1] > w / h:
        top, left = (h - max(int(size[1] * (w / size[0])), 1)) // 2, 0
    else:
        top, left = 0, (w - max(int(size[0] * (h / size[1])), 1)) // 2
    keep = slice(top, h - top), slice(left, w - left)
    h, w = h - 2 * top, w - 2 * left
    if "max" in config.aspect:
        times = math.sqrt(h * w / (int(config.aspect.rpartition("_")[2]) * config.side**2))
        if times > 1.1:
            h, w = int(h // times), int(w // times)
    return (columns, rows), keep, (h, w)


def count_image_tokens(num_tiles: int, size: tuple[int, int], config: LlavaManagerConfig) -> int:
    if num_tiles == 1 or config.merge == "flat":
        return num_tiles * config.side**2
    h, w = grid_geometry(size, config)[2]
    return config.side**2 + h * (w + 1)


def merge_grids(features: Tensor, size: tuple[int, int], config: LlavaManagerConfig,
                newline: Tensor | None = None) -> Tensor:
    """The tokens of one image: features (T, *, n*n, D) -> (*, tokens, D), the base tile's first.
    spatial_unpad: the grid becomes one map, without what was padding, shrunk to the budget of anyres_max_K; each row
    ends with `newline` (*, D), zeros when it is None. size: the original image's (width, height)."""
    base, tiles, n = features[0], features[1:], config.side
    if config.merge == "flat" or len(tiles) == 0:
        return features.movedim(0, -3).flatten(-3, -2)
    (columns, rows), keep, (h, w) = grid_geometry(size, config)
    if len(tiles) != columns * rows:
        raise ValueError(f"{len(tiles)} tiles, but an image of {size[0]} x {size[1]} has a grid of {columns} x {rows}")
    *shape, _, width = base.shape
    grid = tiles.reshape(rows, columns, -1, n, n, width).permute(2, 0, 3, 1, 4, 5)
    grid = grid.reshape(-1, rows * n, columns * n, width)[:, keep[0], keep[1]]  # (M, h, w, D)
    if grid.shape[1:3] != (h, w):
        grid = F.interpolate(grid.permute(0, 3, 1, 2), size=(h, w), mode="bilinear").permute(0, 2, 3, 1)
    newline = grid.new_zeros(1, width) if newline is None else newline.to(grid.dtype).reshape(-1, width)
    grid = torch.cat([grid, newline[:, None, None].expand(len(grid), h, 1, width)], dim=2)
    return torch.cat([base, grid.reshape(*shape, -1, width)], dim=-2)


# ---- Splicing: where every token of the batch goes, as index tensors
class Splice(NamedTuple):
    """Index tensors of a batch. A flat position is one in (B * S); image tokens are numbered through the batch."""
    index: Tensor  # (B, S): the source of each position: first the tokens of input_ids, then image tokens, then padding
    lengths: Tensor  # (B,): of each spliced row, without padding, before truncation
    image_rows: Tensor  # (I,): the row of each image
    managed: Tensor  # (M,): the image tokens that managers act on, none of them beyond the truncation
    positions: Tensor  # (M,): their flat positions
    query: Tensor  # (Q,): flat positions of the query tokens of the adaptive managers
    query_mask: Tensor  # (1, M, Q): which of them a managed token sees

    def labels(self, labels: Tensor) -> Tensor:
        """labels (B, L) of input_ids -> (B, S) of the spliced rows; -100 for image tokens and padding."""
        flat = F.pad(labels.to(self.index.device).long().flatten(), (0, 1), value=IGNORE)
        return flat[self.index.clamp(max=labels.numel())]


def plan_splice(input_ids: Tensor, attention_mask: Tensor | None, images, config: LlavaManagerConfig,
                device="cpu") -> Splice:
    """Each placeholder of input_ids (B, L) makes room for its image's tokens; padding, on either side, goes; rows are
    cut at max_length and padded on the right. Computed on the CPU, without a loop over rows or tokens."""
    ids = input_ids.cpu().long()
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    is_image = (ids == IMAGE_TOKEN) & real
    check_inputs(ids, real, is_image, images, config)
    counts = torch.tensor([count_image_tokens(len(x.pixels), x.size, config) for x in images], dtype=torch.long)
    lengths = real.long()  # how many tokens each token of input_ids becomes
    lengths[is_image] = counts
    ends, totals = lengths.cumsum(1), lengths.sum(1)
    S = min(int(totals.max()), config.max_length)
    # of each spliced token: its source in input_ids, its row, its number in the source, its position in the row
    source = torch.repeat_interleave(torch.arange(ids.numel()), lengths.flatten())
    row = source // ids.shape[1]
    offset = torch.arange(len(source)) - (lengths.flatten().cumsum(0) - lengths.flatten())[source]
    position = (ends - lengths).flatten()[source] + offset
    keep, of_image = position < S, is_image.flatten()[source]
    index = torch.full((len(ids), S), ids.numel() + int(counts.sum()))
    index[row[keep], position[keep]] = torch.where(of_image, ids.numel() - 1 + of_image.cumsum(0), source)[keep]
    image = torch.repeat_interleave(torch.arange(len(counts)), counts)
    alone = (counts == config.side**2)[image]  # the only tile of its image
    in_base = offset[of_image] < config.side**2
    acts = {"all": alone | True, "base": alone | in_base, "grids": alone | ~in_base}[config.managed_grids]
    managed = torch.nonzero(acts & keep[of_image])[:, 0]
    positions = (row * S + position)[of_image][managed]
    query = managed[:0], managed[:0]
    if str(config.manager_type).startswith("adaptive_"):
        im_start = (ids == config.im_start_id) & real
        query = plan_query(im_start, is_image, ends - lengths, ends, S, positions, image[managed])
    plan = index, totals, torch.nonzero(is_image)[:, 0], managed, positions, *query
    return Splice(*(x.to(device) for x in plan))


def check_inputs(ids: Tensor, real: Tensor, is_image: Tensor, images, config: LlavaManagerConfig):
    if ids.dim() != 2 or real.shape != ids.shape or not real.any(1).all():
        raise ValueError(f"input_ids {tuple(ids.shape)}, attention_mask {tuple(real.shape)}: not (B, L), or empty row")
    if int(is_image.sum()) != len(images):
        raise ValueError(f"{int(is_image.sum())} placeholders ({IMAGE_TOKEN}) in input_ids, but {len(images)} images")
    bad = ids[real & ~is_image & ((ids < 0) | (ids >= config.vocab_size))]
    if len(bad):
        raise ValueError(f"token id {int(bad[0])} is outside the vocabulary of {config.vocab_size}")
    shape = (3, config.image_size, config.image_size)
    for i, image in enumerate(images):
        if image.pixels.dim() != 4 or image.pixels.shape[1:] != shape:
            raise ValueError(f"image {i} has pixels {tuple(image.pixels.shape)}; should be (T, {str(shape)[1:]}")


def plan_query(im_start: Tensor, is_image: Tensor, starts: Tensor, ends: Tensor, S: int, positions: Tensor,
               image: Tensor) -> tuple[Tensor, Tensor]:
    """The query of the adaptive managers: the text of the first user turn, less the image and a newline beside it. With
    several images only the text after the last one counts. Without a second <|im_start|> ("plain") it is what follows
    the image, less the last newline. An image with an empty query is its own query.
    (B, L): which tokens are <|im_start|>, which are images, where each one starts and ends after splicing. positions,
    image (M,): flat position and image of each managed token. Returns `Splice.query` and `Splice.query_mask`."""
    order, total, far = im_start.cumsum(1), ends[:, -1:], int(ends.max())
    second, third = (starts.masked_fill(~(im_start & (order == k)), far).amin(1, keepdim=True) for k in (2, 3))
    first_image = starts.masked_fill(~is_image, far).amin(1, keepdim=True)
    last_end = ends.masked_fill(~is_image, 0).amax(1, keepdim=True)
    chat, at = order[:, -1:] >= 2, torch.arange(S)
    stop = torch.where(chat, torch.minimum(third, total) - 2, total - 1)  # chat: where the user's <|im_end|> is
    after = (at >= last_end + chat.long()) & (at < stop)
    before = chat & (is_image.sum(1, keepdim=True) == 1) & (at >= second + 3) & (at < first_image - 1)
    is_query = (after | before) & is_image.any(1, keepdim=True)  # (B, S)
    row, text = positions // S, torch.nonzero(is_query.flatten())[:, 0]
    own = ~is_query.any(1)[row]
    # a token sees the queries of its group: its row's (numbered -1, -2, ...), or its image's
    group = torch.where(own, image, -1 - row)
    return torch.cat([text, positions[own]]), (group[:, None] == torch.cat([-1 - text // S, image[own]]))[None]


# ---- Qwen2
class KVCache:
    """Keys and values of all layers, allocated once for `capacity` positions. Position p of a row is slot p: prompts of
    different length are padded on the right, and new tokens overwrite padding, so a row does not notice the others."""

    def __init__(self, capacity: int, slots: Tensor):
        self.capacity, self.store, self.mask = capacity, {}, None
        self.slots, self.end = slots, slots.shape[1]  # slots (B, S) of the tokens that are being computed

    def advance(self, slots: Tensor):
        """Go on with one token a row, at slots (B, 1), which sees the slots up to its own."""
        self.slots, self.end = slots, self.end + 1
        self.mask = (torch.arange(self.end, device=slots.device) <= slots)[:, None, None]  # (B, 1, 1, end)

    def append(self, layer: int, k: Tensor, v: Tensor) -> list[Tensor]:
        """k, v (B, H_kv, S, d) of the new tokens -> those of all tokens so far."""
        if layer not in self.store:
            self.store[layer] = [x.new_zeros(*x.shape[:2], self.capacity, x.shape[3]) for x in (k, v)]
        slots = self.slots[:, None, :, None].expand_as(k)
        return [store.scatter_(2, slots, x)[:, :, : self.end] for store, x in zip(self.store[layer], (k, v))]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, rotate-half form: x (B, H, S, d), cos and sin (B or 1, 1, S, d)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


class DecoderLayer(nn.Module):
    def __init__(self, config: LlavaManagerConfig, number: int):
        super().__init__()
        width, self.number, self.head_size = config.hidden_size, number, config.hidden_size // config.num_heads
        self.norm_1 = nn.RMSNorm(width, config.norm_eps)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * config.num_kv_heads * self.head_size)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm_2 = nn.RMSNorm(width, config.norm_eps)
        self.gate_up = nn.Linear(width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, S, D) -> (B, S, D). Rows are padded on the right only, so the causal mask alone hides the padding."""
        normed = self.norm_1(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
                   for y in (self.q(normed), *self.kv(normed).chunk(2, dim=-1)))  # (B, H or H_kv, S, d)
        q, k, mask = rotate(q, cos, sin), rotate(k, cos, sin), None
        if cache is not None:
            (k, v), mask = cache.append(self.number, k, v), cache.mask
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Qwen2(nn.Module):
    def __init__(self, config: LlavaManagerConfig):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, inject=None, cache: KVCache | None = None, states: list | None = None) -> Tensor:
        """Embeddings (B, S, D) -> hidden states after the last norm. inject(i, x) -> x acts before layer i; what each
        layer then gets is appended to `states`."""
        positions = torch.arange(x.shape[1], device=x.device)[None] if cache is None else cache.slots
        d = self.config.hidden_size // self.config.num_heads
        frequencies = self.config.rope_theta ** (-torch.arange(0, d, 2, device=x.device) / d)
        angles = (positions[:, None, :, None].float() * frequencies).repeat(1, 1, 1, 2)  # (B or 1, 1, S, d)
        cos, sin = angles.cos(), angles.sin()
        for i, layer in enumerate(self.layers):
            x = x if inject is None else inject(i, x)
            if states is not None:
                states.append(x)
            x = run(layer, self.checkpointing, x, cos, sin, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """logits (B, V) -> token ids (B,): the likeliest for temperature 0, else drawn from the fewest that reach top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    values, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    values = values.masked_fill(values.cumsum(-1) - values >= top_p, 0)
    return order.gather(1, torch.multinomial(values, 1, generator=generator))[:, 0]


# ---- The model
class Output(NamedTuple):
    loss: Tensor | None  # mean over the label tokens of the batch; their sum is loss * num_tokens
    logits: Tensor | None  # (B, S, V)
    num_tokens: Tensor | None = None  # (): how many tokens have a loss
    hidden_states: list[Tensor] | None = None  # the input of each LLM layer, then the last hidden state: (B, S, D)


class LlavaManager(nn.Module):
    """LLaVA-OneVision with visual managers. input_ids (B, L) hold one placeholder -200 for each image; images is a flat
    list, in the order of the placeholders, of what preprocess_image returns. Outputs are in spliced positions, padded
    on the right. Any integer dtype will do."""

    def __init__(self, config: LlavaManagerConfig):
        super().__init__()
        self.config = c = config
        D, N = c.hidden_size, len(c.managed_layers)
        self.vision = ViT(c.image_size, c.patch_size, c.vision_width, c.vision_layers - 1, c.vision_heads,
                          c.vision_mlp_width, siglip=True)
        self.vision.ln_post.requires_grad_(False)  # in the official checkpoints, but not used
        self.llm = Qwen2(c)
        init = partial(init_weights, std=c.initializer_range)
        self.apply(init)
        self.projector = nn.Sequential(nn.Linear(c.vision_width, D), nn.GELU(), nn.Linear(D, D))
        self.image_newline = nn.Parameter(torch.randn(D) / math.sqrt(D))
        self.managers = nn.ModuleList()
        if c.manager_type is not None:
            self.layer_embedding = nn.Parameter(torch.randn(N, D) / math.sqrt(D))
            query = c.manager_type.partition("_")[2] or None
            for layer in c.inject_layers:
                # before layer 0 without the last one, which, says the paper, the LLM's input holds already
                static = c.is_static(layer)
                manager = StaticVisualManager(D, N - (layer == 0)) if static else AdaptiveVisualManager(D, N, query)
                self.managers.append(manager.apply(init))

    def set_checkpointing(self, on: bool):
        """Activation checkpointing of SigLIP's blocks, the projector and the LLM's layers."""
        self.vision.checkpointing = self.llm.checkpointing = on

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, images=(), labels: Tensor | None = None,
                logits: bool = True, hidden_states: bool = False) -> Output:
        """input_ids, attention_mask, labels (B, L) -> Output. labels: input_ids, or -100 where there is no loss; the
        logits of a position predict the next one. The loss does not need logits=True, and False saves their memory."""
        plan = plan_splice(input_ids, attention_mask, images, self.config, self.image_newline.device)
        embeddings, inject = self.embed(input_ids, images, plan)
        states, loss, num_tokens = [] if hidden_states else None, None, None
        hidden = self.llm(embeddings, inject, states=states)
        if labels is not None:
            total, num_tokens = self.loss_sum(hidden, plan.labels(labels))
            loss = total / num_tokens.clamp(min=1)
        return Output(loss, self.llm.logits(hidden) if logits else None, num_tokens,
                      [*states, hidden] if hidden_states else None)

    def embed(self, input_ids: Tensor, images, plan: Splice) -> tuple:
        """The LLM's input (B, S, D), and what it calls before each layer."""
        text = self.llm.embed(input_ids.to(self.image_newline.device).long().flatten().clamp(min=0))
        parts, inject = [text, text.new_zeros(1, text.shape[1])], None
        if len(images):
            tokens, increments, experts = self.encode_images(images, plan)
            parts.insert(1, tokens.to(text.dtype))
            inject = partial(self.inject, plan=plan, increments=increments, experts=experts)
        embeddings = torch.cat(parts)[plan.index]
        return embeddings + self.unused(len(images)) if self.training else embeddings, inject

    def unused(self, num_images: int) -> Tensor:
        """0, with a gradient path to the parameters that a batch without images or without grids leaves out: DDP waits
        for every parameter in every step."""
        named = self.named_parameters() if num_images == 0 else [("image_newline", self.image_newline)]
        return 0 * sum(p.flatten()[0] for name, p in named if p.requires_grad and not name.startswith("llm."))

    def encode_images(self, images, plan: Splice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """All tiles of the batch in one pass. Returns the LLM's input for all image tokens (L, D); and for the managed
        ones what each static manager adds (K, M, D), and the adaptive managers' experts (1, N, M, D).
        Static managers do not depend on the LLM, and merging is linear: their sums over the experts come first, of all
        managers at once, and only these K results are merged."""
        c, newline, counts = self.config, self.image_newline, [len(image.pixels) for image in images]
        pixels = torch.cat([image.pixels for image in images]).to(newline.device, self.vision.patch.weight.dtype)
        last, managed = c.vision_layers - 1, c.managed_layers if c.manager_type else ()
        kept = sorted({last, *managed})
        states = dict(zip(kept, self.vision(pixels, kept), strict=True))  # each (T, n*n, D_vision)

        def merge(stack, newlines):  # (T, M, L, D), (I or 1, M, D) -> (M, L, D)
            each = zip(stack.split(counts), images, newlines.expand(len(images), -1, -1), strict=True)
            return torch.cat([merge_grids(tiles, image.size, c, line) for tiles, image, line in each], dim=1)

        def insight(state, embedding):  # (T, n*n, D_vision), (D) -> (T, 1, n*n, D)
            x = run(self.projector, self.vision.checkpointing, state)
            return (x + embedding.to(x.dtype))[:, None]

        increments = experts = None
        tokens = merge(self.projector(states[last])[:, None], newline[None, None])[0]
        insights = (insight(states[n], self.layer_embedding[i]) for i, n in enumerate(managed))
        if managed and c.manager_type != "static":
            insights = list(insights)
            experts = merge(torch.cat(insights, 1), newline.expand(1, len(managed), -1))[None, :, plan.managed]
        if managed and c.is_static(c.inject_layers[0]):
            weights = self.static_weights(len(plan.index))[plan.image_rows]  # (I, N, K, 1, D)
            of_tile = weights.repeat_interleave(torch.tensor(counts, device=weights.device), 0, output_size=len(pixels))
            increments = merge(weighted_sum(of_tile.unbind(1), insights), weights.sum(1)[:, :, 0] * newline)
            increments = increments[:, plan.managed]
        return tokens, increments, experts

    def static_weights(self, rows: int) -> Tensor:
        """The weights of all static managers, (rows, N, K, 1, D); 0 for the layer that the one at LLM layer 0 drops."""
        static = [m for m in self.managers if isinstance(m, StaticVisualManager)]
        weights, num_experts = [m.weights(rows).expand(rows, -1, -1, -1) for m in static], len(self.layer_embedding)
        return torch.stack([F.pad(w, (0, 0, 0, 0, 0, num_experts - w.shape[1])) for w in weights], dim=2)

    def inject(self, layer: int, x: Tensor, plan: Splice, increments: Tensor | None, experts: Tensor | None) -> Tensor:
        """x (B, S, D) before an LLM layer, plus what its manager, if it has one, adds to the image tokens."""
        if self.config.manager_type is None or layer not in self.config.inject_layers:
            return x
        k, flat = self.config.inject_layers.index(layer), x.flatten(0, 1)
        if self.config.is_static(layer):
            increment = increments[k]
        else:
            image, query = flat[None, plan.positions], flat[None, plan.query]
            increment = self.managers[k](experts, image, query, plan.query_mask)[0]
        return flat.index_add(0, plan.positions, increment.to(x.dtype)).view_as(x)

    def loss_sum(self, hidden: Tensor, labels: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
        """hidden (B, S, D), labels (B, S) -> the sum of the label tokens' cross entropies, and their number. Only their
        logits, `chunk` at a time, and again in the backward pass: all of (B, S, V) would outweigh the model."""
        def part(rows, targets):
            return F.cross_entropy(self.llm.logits(rows).float(), targets, reduction="sum")

        keep = labels[:, 1:] != IGNORE
        total = 0 * hidden.flatten()[0].float()
        for rows, targets in zip(hidden[:, :-1][keep].split(chunk), labels[:, 1:][keep].split(chunk)):
            total = total + run(part, True, rows, targets)
        return total, keep.sum()

    def count_labels(self, input_ids: Tensor, attention_mask: Tensor | None, images, labels: Tensor) -> int:
        """The num_tokens that forward will give, without running the model: for the mean over a global batch."""
        spliced = plan_splice(input_ids, attention_mask, images, self.config).labels(labels)
        return int((spliced[:, 1:] != IGNORE).sum())

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, images=(), max_new_tokens: int = 128,
                 temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """The new token ids only, (B, T), T <= max_new_tokens; after its end a row repeats the eos id. Managers act in
        the prefill, then tokens come one by one from the KV cache. ValueError for a prompt longer than max_length."""
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, temperature {temperature}, top_p {top_p}; "
                             "they must be at least 1, at least 0, and above 0 up to 1")
        device = self.image_newline.device
        plan = plan_splice(input_ids, attention_mask, images, self.config, device)
        (B, S), eos, tokens = plan.index.shape, torch.tensor(self.config.eos_ids, dtype=torch.long, device=device), []
        if int(plan.lengths.max()) > S:
            raise ValueError(f"a prompt has {int(plan.lengths.max())} tokens with its images, more than max_length {S}")
        cache = KVCache(S + max_new_tokens, torch.arange(S, device=device).expand(B, S))
        embeddings, inject = self.embed(input_ids, images, plan)
        hidden = self.llm(embeddings, inject, cache)[torch.arange(B, device=device), plan.lengths - 1]  # (B, D)
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            token = sample(self.llm.logits(hidden), temperature, top_p, generator)
            tokens.append(torch.where(ended, eos[0], token) if len(eos) else token)
            ended |= torch.isin(token, eos)
            if ended.all() or step == max_new_tokens - 1:
                break
            cache.advance((plan.lengths + step)[:, None])
            hidden = self.llm(self.llm.embed(tokens[-1])[:, None], cache=cache)[:, 0]
        return torch.stack(tokens, dim=1)


# ---- Conversations. tokenizer: a tokenizers.Tokenizer with Qwen2's special tokens, or what has one as its `backend`
def tokenize(text: str, tokenizer, has_image: bool = True) -> list[int]:
    """Token ids. Every <image> is a placeholder, unless has_image is False; the pieces around it are encoded alone."""
    backend, ids = getattr(tokenizer, "backend", tokenizer), []
    if "<|im_start|>" in text and None in map(backend.token_to_id, ("<|im_start|>", "<|im_end|>")):
        raise ValueError("the tokenizer lacks <|im_start|> or <|im_end|>, which chats need; Qwen2's has both")
    for i, piece in enumerate(text.split(IMAGE_TAG) if has_image else [text]):
        ids += [IMAGE_TOKEN] * (i > 0) + backend.encode(piece, add_special_tokens=False).ids
    return ids


def encode_chat(conversation: list[dict], tokenizer, style: str = "qwen_1_5", strict_labels: bool = False,
                has_image: bool = True) -> tuple[list[int], list[int]]:
    """A training conversation -> input_ids, labels.
    qwen_1_5: the system's turn, then each turn as <|im_start|>role, newline, text, <|im_end|>, newline. A leading gpt
    turn is dropped; the only <image> of a turn moves to its front; with has_image=False the tag is text. Labels: the
    assistant's turns, and, as in the official code, every newline, <|im_start|>, <|im_end|>, unless strict_labels.
    plain (stage 1): a placeholder, the caption, a newline; the placeholder alone has no label."""
    turns = [({"human": "user", "gpt": "assistant"}.get(x.get("from")), x.get("value")) for x in conversation]
    for i, (role, text) in enumerate(turns):
        if role is None or not isinstance(text, str):
            raise ValueError(f'turn {i}: {str(conversation[i])[:80]} is not {{"from": "human" | "gpt", "value": text}}')
    if style == "plain":
        if [role for role, _ in turns] != ["user", "assistant"] or IMAGE_TAG not in turns[0][1]:
            raise ValueError(f"style plain needs a human turn with {IMAGE_TAG}, then gpt, not {str(conversation)[:80]}")
        caption = tokenize(turns[1][1] + "\n", tokenizer, has_image=False)
        return [IMAGE_TOKEN, *caption], [IGNORE, *caption]
    turns = turns[1:] if turns and turns[0][0] == "assistant" else turns
    if style != "qwen_1_5" or not turns:
        raise ValueError(f"style {style!r} with {len(turns)} turns; it must be qwen_1_5 or plain, with a human turn")
    always = set(tokenize("<|im_start|><|im_end|>\n", tokenizer))
    ids, labels = [], []
    for role, text in [("system", SYSTEM), *turns]:
        if has_image and text.count(IMAGE_TAG) == 1 and not text.startswith(IMAGE_TAG):
            text = f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip()
        turn = tokenize(f"<|im_start|>{role}\n{text}<|im_end|>\n", tokenizer, has_image)
        shown = {*turn} - {IMAGE_TOKEN} if role == "assistant" else set() if strict_labels else always
        ids, labels = ids + turn, labels + [token if token in shown else IGNORE for token in turn]
    return ids, labels


def encode_prompt(turns: list[str], tokenizer, num_images: int = 0) -> list[int]:
    """The prompt for an answer. turns: user, assistant, user, ...; in front of the first go num_images times <image>,
    joined by spaces, and a newline."""
    if len(turns) % 2 == 0:
        raise ValueError(f"a prompt ends with a turn of the user, so their number is odd, not {len(turns)}")
    roles = ["system", *["user", "assistant"] * len(turns)]
    images = " ".join([IMAGE_TAG] * num_images) + "\n" * (num_images > 0)
    texts = [SYSTEM, images + turns[0], *turns[1:]]
    chat = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(roles, texts))
    return tokenize(chat + "<|im_start|>assistant\n", tokenizer)


def collate_chat(rows: list[tuple[list[int], list[int]]], pad_id: int = 0, max_length: int | None = None) -> dict:
    """Rows of (input_ids, labels) -> input_ids, labels, attention_mask (B, L), cut at max_length and padded."""
    columns = {"input_ids": ([ids for ids, _ in rows], pad_id), "labels": ([labels for _, labels in rows], IGNORE),
               "attention_mask": ([[1] * len(ids) for ids, _ in rows], 0)}
    return {k: nn.utils.rnn.pad_sequence([torch.tensor(x[:max_length]) for x in column], True, pad)
            for k, (column, pad) in columns.items()}


# ---- Weights: tables for model.import_state and model.export_state
QWEN = {  # HF's Qwen2ForCausalLM, also inside the official states
    "embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
    "layers.{}.norm_1.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.q.*": "model.layers.{}.self_attn.q_proj.*",
    "layers.{}.kv.*": "model.layers.{}.self_attn.k_proj.* model.layers.{}.self_attn.v_proj.*",
    "layers.{}.proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.norm_2.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.gate_up.weight": "model.layers.{}.mlp.gate_proj.weight model.layers.{}.mlp.up_proj.weight",
    "layers.{}.down.weight": "model.layers.{}.mlp.down_proj.weight"}
CROSS = {"q_proj.*": "fusion_attention.q_proj.*", "k_proj.*": "fusion_attention.k_proj.*"}


def qwen_table(config: LlavaManagerConfig, ours: str) -> list:
    head = {} if config.tie_embeddings else {"head.weight": "lm_head.weight"}
    return expand(QWEN | head, ours, layers=config.num_layers)


def official_table(config: LlavaManagerConfig, newline: bool) -> list:
    """The layout of LLaVA-OV-Manager and LLaVA-OneVision states."""
    names = {"projector.0.*": "mm_projector.0.*", "projector.2.*": "mm_projector.2.*"}
    names |= {"image_newline": "image_newline"} if newline else {}
    names |= {"layer_embedding": "manager_layer_embedding"} if config.manager_type else {}
    rows = qwen_table(config, "llm.") + expand(names, theirs="model.")
    tower = "model.vision_tower.vision_tower.vision_model."
    rows += hf_vision_table(config.vision_layers - 1, "vision.", tower, siglip=True)
    for k, layer in enumerate(config.inject_layers if config.manager_type else ()):
        prefixes = f"managers.{k}.", f"model.manager.{k}."
        if config.is_static(layer):
            rows += expand({"scores": "layer_scores"}, *prefixes, how="scores")
        else:
            cross = CROSS if config.manager_type == "adaptive_cross" else {}
            rows += expand({"gate": "zero_gate"}, *prefixes, how="scores")
            rows += expand({"controller.weight": "linear_controller.weight", **cross}, *prefixes)
    return rows


def drop_tied_head(state: dict, config: LlavaManagerConfig) -> dict:
    """Without the lm_head that repeats the embedding; one that differs is no tied model's: ValueError."""
    head, embedding = state.get("lm_head.weight"), state.get("model.embed_tokens.weight")
    if not config.tie_embeddings or head is None or embedding is None:
        return state
    if head.shape != embedding.shape or not (head.is_meta or torch.equal(head, embedding)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight, but the config ties the two")
    return {k: v for k, v in state.items() if k != "lm_head.weight"}


def from_official(state_dict: dict, config: LlavaManagerConfig) -> dict:
    """An official state -> ours, strictly (errors as in model.import_state); meta tensors work too. A state without
    image_newline, as stage 1 writes it, gets zeros. Load it with `load_state_dict(state, strict=True, assign=True)`."""
    state = drop_tied_head(state_dict, config)
    newline = "model.image_newline" in state
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlavaManager(config).state_dict().items()}
    dead = (r".*\.position_ids", r".*rotary_emb\.inv_freq")  # buffers that old versions of transformers wrote
    ours = import_state(state, official_table(config, newline), shapes, dead)
    return ours if newline else {**ours, "image_newline": ours["llm.norm.weight"].new_zeros(config.hidden_size)}


def to_official(state_dict: dict, config: LlavaManagerConfig) -> dict:
    """Ours -> official names, without image_newline for flat merging. Also for gradients under our parameter names."""
    return export_state(state_dict, official_table(config, config.merge != "flat"))


def read_shards(path) -> dict:
    """A .safetensors file, or a folder's: model.safetensors, or the shards that its index names."""
    index = Path(path) / "model.safetensors.index.json"
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    return {k: v for name in shards for k, v in read_safetensors(index.parent / name).items()} or read_safetensors(path)


def load_unimodal(model: LlavaManager, vision, language) -> None:
    """Fill SigLIP and the LLM from HF's SiglipModel or SiglipVisionModel and Qwen2ForCausalLM: folders or files.
    SigLIP's last layer, pooling head and text encoder are dropped. ValueError for a missing, unknown, misshapen key."""
    state, layers = read_shards(vision), len(model.vision.blocks)
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in state) else ""
    last = rf"{prefix}(encoder\.layers\.{layers}|head)\..*"
    load_encoder(model.vision, state, hf_vision_table(layers, "", prefix, siglip=True),
                 (last, r"text_model\..*", r"logit_\w+", r".*position_ids"), vision)
    state = drop_tied_head(read_shards(language), model.config)
    load_encoder(model.llm, state, qwen_table(model.config, ""), (r".*rotary_emb\.inv_freq",), language)


def save_model(model: LlavaManager, folder) -> None:
    """Write model.safetensors and config.json, atomically."""
    save_folder(model.state_dict(), model.config, folder)


def load_model(folder, dtype: torch.dtype = torch.float32, **official) -> LlavaManager:
    """A checkpoint folder, ours or an official one (config.json; safetensors, sharded or not) -> model, on the CPU.
    official: `vision` and `im_start_id` of LlavaManagerConfig.from_official."""
    file = Path(folder) / "config.json"
    if file.is_file() and '"model_type"' in file.read_text():
        config = LlavaManagerConfig.from_official(json.loads(file.read_text()), **official)
        state = from_official(read_shards(folder), config)
    else:
        config, state = read_config(folder, LlavaManagerConfig), read_safetensors(folder)
    with torch.device("meta"):
        model = LlavaManager(config)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    state = import_state(state, [(k, [k], "cat") for k in shapes], shapes)
    model.load_state_dict({k: v.to(dtype) for k, v in state.items()}, strict=True, assign=True)
    return model
