"""LLaVA-OV-Manager in plain PyTorch: SigLIP, a projector, multi-grid images, Qwen2, and visual
managers inside the LLM.

Paper: Manager (TCSVT 2025), sections IV and V. Official counterpart: LLaVA-OV-Manager, a tree of
LLaVA-NeXT (llava_arch.py, llava_qwen_manager.py, modeling_qwen2.py, model/manager).

An image is a base tile and a grid of tiles. Their last hidden states of SigLIP, projected, take the
place of <image> in the text. Before some layers of the LLM a manager adds to the image tokens what
it aggregates from N hidden states of SigLIP (the managed layers):

    h_image += sum_n W_n * (proj(V_n) + e_n)

W starts at zero, so an untrained manager leaves LLaVA-OneVision as it is. Read `forward` of
LlavaManager first, then `expand_placeholders`, `encode_images` and `inject`.

Shapes: B rows of a batch, L ids of a row or image tokens of the batch, S length of a row with its
images, I images, T tiles of all images, n patches along a tile's side, N experts (managed layers),
K static managers, M managed tokens, Q query tokens, D width of the LLM, H heads, V vocabulary.
Experts are (B, N, L, D); here B is 1, with all image tokens of the batch behind one another.

    model = load_model("llava-ov-manager-0.5b").eval()        # of weights.py
    image = preprocess_image(Image.open("a.jpg"), model.config)
    prompt = encode_prompt(["What is this?"], tokenizer, num_images=1)
    tokens = model.generate(torch.tensor([prompt]), images=[image])
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chat import (
    IGNORE,
    IMAGE_TAG,
    IMAGE_TOKEN,
    SYSTEM,
    collate_chat,
    encode_chat,
    encode_prompt,
    tokenize,
)
from fields import FieldError, check_fields, option, show
from manager import AdaptiveVisualManager, StaticVisualManager, weighted_sum
from model import (
    MOST_CHANNELS,
    MOST_LAYERS,
    MOST_PIXELS,
    MOST_ROWS,
    ViT,
    ViTBlock,
    init_weights,
    run,
)
from multigrid import (
    ImageTiles,
    count_image_tokens,
    expand_pinpoints,
    grid_geometry,
    merge_grids,
    preprocess_image,
    select_best_resolution,
)

# What a user of the model needs beside it is reachable from here too.
__all__ = [
    "IGNORE",
    "IMAGE_TAG",
    "IMAGE_TOKEN",
    "SYSTEM",
    "AdaptiveVisualManager",
    "ImageTiles",
    "LlavaManager",
    "LlavaManagerConfig",
    "Output",
    "StaticVisualManager",
    "collate_chat",
    "count_image_tokens",
    "encode_chat",
    "encode_prompt",
    "expand_pinpoints",
    "grid_geometry",
    "merge_grids",
    "preprocess_image",
    "select_best_resolution",
    "tokenize",
]

# ---------------------------------------------------------------- the config
# Our field -> the key of the published config.json ...
OFFICIAL_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
# ... of a SigLIP config of HF ...
VISION_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "vision_width": "hidden_size",
    "vision_layers": "num_hidden_layers",
    "vision_heads": "num_attention_heads",
    "vision_mlp_width": "intermediate_size",
}
# ... which may leave out what SiglipVisionConfig says without it, as that of siglip-base does ...
SIGLIP_DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
# ... and what a config.json may lack, as the one of Qwen2 does.
OPTIONAL_FIELDS = {
    "max_length": "tokenizer_model_max_length",
    "grid_pinpoints": "image_grid_pinpoints",
    "aspect": "image_aspect_ratio",
    "merge": "mm_patch_merge_type",
    "tie_embeddings": "tie_word_embeddings",
}
# What the official code could be told, and this code cannot; an absent key means the same.
SUPPORTED = {
    "use_sliding_window": False,
    "hidden_act": "silu",
    "attention_bias": True,
    "mlp_bias": False,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_use_im_start_end": False,
    "mm_manager_residual": True,
    "quantization_config": None,
}
SIGLIP_SUPPORTED = {
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "quantization_config": None,
}
# parts of a model_type that is none of Qwen2's: its layers compute something else
OTHER_MODELS = (
    "clip",
    "roberta",
    "bert",
    "llama",
    "mistral",
    "gemma",
    "phi",
    "qwen3",
    "_vl",
    "moe",
)
# where the base of the rotary embedding stands, and what it is stretched by: in transformers up to
# 4 and from 5 on
ROPE_KEYS = ("rope_scaling", "rope_parameters")
# Our tuple of layers -> the official keys that end with _start, _end and _interval.
LAYER_RANGES = {
    "managed_layers": "mm_manager_vision_select_layers",
    "inject_layers": "mm_manager_injection",
}
RANGE_ENDS = ("start", "end", "interval")
MANAGER_TYPES = ("static", "adaptive", "adaptive_last", "adaptive_average", "adaptive_cross")
MANAGER_FLAGS = ("managed_layers", "inject_layers", "managed_grids")


@dataclass
class LlavaManagerConfig:
    """The architecture. The defaults are the paper's: SigLIP-so400m-384, Qwen2-0.5B-Instruct and
    static managers.
    """

    # vision: SigLIP, whose last layer is neither used nor built
    image_size: int = option(384, "pixels along the side of a tile", least=1, most=MOST_PIXELS)
    patch_size: int = option(14, "pixels along the side of a patch", least=1, most=MOST_PIXELS)
    vision_width: int = option(1152, "width of SigLIP", least=1, most=MOST_CHANNELS)
    vision_layers: int = option(
        27,
        "layers of SigLIP; its hidden states are 0 to vision_layers - 1",
        least=1,
        most=MOST_LAYERS,
    )
    vision_heads: int = option(16, "attention heads of SigLIP", least=1)
    vision_mlp_width: int = option(
        4304, "width inside the MLPs of SigLIP", least=1, most=MOST_CHANNELS
    )
    # language: Qwen2
    vocab_size: int = option(151936, "rows of the LLM's embedding", least=1, most=MOST_ROWS)
    hidden_size: int = option(896, "width of the LLM", least=1, most=MOST_CHANNELS)
    num_layers: int = option(24, "layers of the LLM", least=1, most=MOST_LAYERS)
    num_heads: int = option(14, "attention heads of the LLM", least=1)
    num_kv_heads: int = option(2, "heads of keys and values, which others share", least=1)
    mlp_width: int = option(4864, "width inside the MLPs of the LLM", least=1, most=MOST_CHANNELS)
    norm_eps: float = option(1e-6, "epsilon of the LLM's RMSNorms", above=0, most=1)
    rope_theta: float = option(1e6, "base of the rotary position embedding", above=0)
    tie_embeddings: bool = option(
        True, "the output head is the embedding; false in the model of 7B"
    )
    initializer_range: float = option(
        0.02, "standard deviation of new matrices, as Qwen2's", least=0, most=100
    )
    max_length: int = option(
        16384,
        "most tokens of a sequence, images included; the rest is cut",
        least=1,
        most=MOST_ROWS,
    )
    im_start_id: int = option(
        151644, "<|im_start|>; adaptive managers find the text query by it", least=0, flag=False
    )
    eos_ids: tuple[int, ...] = option(
        (151645,), "generation stops at any of them", least=0, flag=False
    )
    # managers
    manager_type: str | None = option(
        "static",
        "the visual managers; none = LLaVA-OneVision. What follows adaptive is its query",
        choices=MANAGER_TYPES,
    )
    managed_layers: tuple[int, ...] = option(
        tuple(range(13, 26)), "the hidden states of SigLIP that managers aggregate", least=0
    )
    inject_layers: tuple[int, ...] = option(
        tuple(range(0, 24, 4)), "the LLM's layers, from 0, with a manager before them", least=0
    )
    managed_grids: str = option(
        "all",
        "the tiles whose tokens are managed, of an image that has several",
        choices=("all", "base", "grids"),
    )
    # images
    aspect: str = option(
        "anyres_max_9",
        "square or pad = one tile; anyres = a grid too; anyres_max_K = with about K tiles' tokens",
    )
    grid_pinpoints: tuple | str = option(
        "(1x1),...,(6x6)",
        "the resolutions of a grid: a range in tiles, or JSON [[width, height], ...] in pixels",
    )
    merge: str = option(
        "spatial_unpad",
        "the grid's tiles become one map without padding, or stay behind one another",
        choices=("spatial_unpad", "flat"),
    )

    @classmethod
    def base(cls, **overrides: Any) -> "LlavaManagerConfig":
        """The paper's model of 0.5B."""
        return cls(**overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> "LlavaManagerConfig":
        """For the built-in demo data: a scene of 64 x 64 is a base tile and a grid of 2 x 2."""
        values: dict[str, Any] = {
            "image_size": 32,
            "patch_size": 8,
            "vision_width": 96,
            "vision_layers": 4,
            "vision_heads": 3,
            "vision_mlp_width": 384,
            "vocab_size": 320,
            "hidden_size": 96,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "mlp_width": 256,
            "max_length": 512,
            "im_start_id": 1,
            "eos_ids": (2,),
            "managed_layers": (1, 2),
            "inject_layers": (0, 2),
            "aspect": "anyres_max_4",
            "grid_pinpoints": "(1x1),...,(2x2)",
        }
        values.update(overrides)
        return cls(**values)

    @classmethod
    def from_official(
        cls, config: dict, vision: dict | None = None, im_start_id: int = 151644
    ) -> "LlavaManagerConfig":
        """The published config.json of LLaVA-OV-Manager, of LLaVA-OneVision or of Qwen2 -> ours.

        vision: a HF config of SigLIP, or of its vision tower; SigLIP-so400m-patch14-384 when not
        given. Keys that are not known are ignored. Raises ValueError for keys that are missing and
        for values that this code does not support.
        """
        vision = vision_part(vision)
        check_official(config, vision)
        values: dict[str, Any] = {
            # what the official code does without these keys
            "aspect": "square",
            "merge": "flat",
            "tie_embeddings": False,
            "im_start_id": im_start_id,
            "eos_ids": official_eos_ids(config),
            "rope_theta": official_rope_theta(config),
        }
        for ours, theirs in OFFICIAL_FIELDS.items():
            values[ours] = config[theirs]
        # null is an absent key
        for ours, theirs in OPTIONAL_FIELDS.items():
            if config.get(theirs) not in (None, "", []):
                values[ours] = config[theirs]
        if vision:
            for ours, theirs in VISION_FIELDS.items():
                values[ours] = vision.get(theirs, SIGLIP_DEFAULTS[theirs])
        values.update(official_managers(config))
        return make_official(cls, values)

    def __post_init__(self) -> None:
        # JSON has lists
        if isinstance(self.managed_layers, list):
            self.managed_layers = tuple(self.managed_layers)
        if isinstance(self.inject_layers, list):
            self.inject_layers = tuple(self.inject_layers)
        if isinstance(self.eos_ids, list):
            self.eos_ids = tuple(self.eos_ids)
        # first each field for itself, then the fields together
        check_fields(self)
        self.grid_pinpoints = expand_pinpoints(self.grid_pinpoints, self.image_size)
        self.check_sizes()
        self.check_managers()

    def check_sizes(self) -> None:
        """Raises ValueError for sizes that do not fit together."""
        if not re.fullmatch(r"square|pad|anyres|anyres_max_[1-9]\d{0,5}", self.aspect):
            raise ValueError(
                f"aspect is {show(self.aspect)}; it must be square, pad, anyres or anyres_max_K"
            )
        if self.patch_size > self.image_size:
            raise ValueError(
                f"patch_size {self.patch_size} is larger than image_size {self.image_size}"
            )
        # attention splits a width into heads, and grouped queries split the heads
        for total, part in (
            ("vision_width", "vision_heads"),
            ("hidden_size", "num_heads"),
            ("num_heads", "num_kv_heads"),
        ):
            if getattr(self, total) % getattr(self, part):
                raise ValueError(
                    f"{total} {getattr(self, total)} is not a multiple of {part} "
                    f"{getattr(self, part)}"
                )
        # the rotary embedding turns pairs of channels
        head_size = self.hidden_size // self.num_heads
        if head_size % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} with num_heads {self.num_heads} makes heads of "
                f"{head_size}; the rotary position embedding needs an even size"
            )

    def check_managers(self) -> None:
        """Raises ValueError for layers that managers cannot have."""
        if self.manager_type is None:
            return
        for name, layers, count in (
            ("managed_layers", self.managed_layers, self.vision_layers),
            ("inject_layers", self.inject_layers, self.num_layers),
        ):
            is_ascending = list(layers) == sorted(set(layers))
            if not layers or not is_ascending or layers[-1] >= count:
                raise ValueError(
                    f"{name} is {show(layers)}; it must be ascending numbers from 0 to {count - 1}"
                )
        if self.inject_layers[0] == 0 and len(self.managed_layers) < 2:
            raise ValueError(
                "a manager at LLM layer 0 drops the last managed layer, so it needs at least two "
                "of them"
            )

    @staticmethod
    def check_flags(flags: dict) -> None:
        """Raises ValueError for flags of managers where there are none."""
        if flags.get("manager_type", "static") is not None:
            return
        for name in flags:
            if name in MANAGER_FLAGS:
                raise ValueError(f"--{name} means nothing with --manager_type none: no managers")

    def is_static(self, layer: int) -> bool:
        """Whether the manager before this layer of the LLM is static. Before layer 0, where the
        image has not met the text, all are.
        """
        return self.manager_type == "static" or layer == 0

    @property
    def has_static(self) -> bool:
        """Whether any manager is static."""
        return self.manager_type is not None and self.is_static(self.inject_layers[0])

    @property
    def query(self) -> str | None:
        """What the adaptive managers read beside the image: last, average, cross, or None."""
        return str(self.manager_type).partition("adaptive_")[2] or None

    @property
    def side(self) -> int:
        """Patches along the side of a tile."""
        return self.image_size // self.patch_size


def layer_range_keys(name: str) -> list[str]:
    return [f"{LAYER_RANGES[name]}_{end}" for end in RANGE_ENDS]


def make_official(config_class: Any, values: dict[str, Any]) -> Any:
    """config_class(**values); an error says what the field is called in the published file."""
    # our field -> the key of the file
    theirs = {**OFFICIAL_FIELDS, **OPTIONAL_FIELDS}
    for name, key in VISION_FIELDS.items():
        theirs[name] = f"{key} of the vision tower"
    try:
        return config_class(**values)
    except FieldError as error:
        name = str(error).partition(" ")[0]
        note = f" (in the file it is {theirs[name]})" if theirs.get(name, name) != name else ""
        raise FieldError(f"{error}{note}") from None


def vision_part(vision: Any) -> dict:
    """The config of SigLIP's vision tower, which a config of a whole SigLIP holds; {} for none."""
    if isinstance(vision, dict):
        vision = vision.get("vision_config", vision)
    if vision is not None and not isinstance(vision, dict):
        raise ValueError(f"the vision config is {show(vision)}; it must be an object")
    return vision or {}


def check_official(config: Any, vision: dict) -> None:
    """Raises ValueError for keys that are missing, and for values that are not supported."""
    if not isinstance(config, dict):
        raise ValueError(f"the config is {show(config)}; it must be an object")
    # 1. what is not there
    needed = list(OFFICIAL_FIELDS.values())
    if config.get("mm_manager_type") is not None:
        for name in LAYER_RANGES:
            needed += layer_range_keys(name)
    missing = [key for key in needed if key not in config]
    # 2. another model; a model of ours has no LLM but Qwen2
    model_type = config.get("model_type") or "qwen2"
    if not is_qwen(model_type):
        raise ValueError(f"the config's model_type is {show(model_type)}; the LLM must be a qwen2")
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}")
    # 3. what is there, and computed otherwise
    check_settings(config, SUPPORTED, "the config's")
    check_settings(vision, SIGLIP_SUPPORTED, "the vision config's")
    # of each layer; transformers from 5 on writes it, even where all are the same
    layer_types = config.get("layer_types") or []
    if not is_full_attention(layer_types):
        raise ValueError(
            f"the config's layer_types is {show(layer_types)}; only full_attention is supported"
        )


def is_qwen(model_type: Any) -> bool:
    """Whether this may be Qwen2's model_type, or one of the LLaVAs that are made of it."""
    if not isinstance(model_type, str):
        return False
    return not any(name in model_type for name in OTHER_MODELS)


def is_full_attention(layer_types: Any) -> bool:
    if not isinstance(layer_types, list):
        return False
    return all(name == "full_attention" for name in layer_types)


def check_settings(config: dict, supported: Mapping[str, Any], whose: str) -> None:
    """Raises ValueError for a value that this code does not compute with. null is an absent key."""
    for key, value in supported.items():
        found = config.get(key)
        if found is not None and found != value:
            raise ValueError(f"{whose} {key} is {show(found)}; only {show(value)} is supported")


def official_rope_theta(config: dict) -> Any:
    """The base of the rotary embedding, wherever it stands. Raises ValueError for one that is
    stretched, or that is there twice.
    """
    # all of them, as a file may have been written by one version and changed by another
    bases = []
    if config.get("rope_theta") is not None:
        bases.append(config["rope_theta"])
    for key in ROPE_KEYS:
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"the config's {key} is {show(rope)}; it must be an object or null")
        # "type" is what versions before 4.43 wrote
        kind = rope.get("rope_type", rope.get("type", "default"))
        is_partial = rope.get("partial_rotary_factor", 1) != 1
        if kind != "default" or is_partial:
            raise ValueError(f"the config's {key} is {show(rope)}; only its default is supported")
        if rope.get("rope_theta") is not None:
            bases.append(rope["rope_theta"])
    # Qwen2Config would say 10000 without one, and no published model has that
    if not bases:
        raise ValueError("the config lacks rope_theta")
    if any(base != bases[0] for base in bases):
        raise ValueError(f"the config has several values of rope_theta: {show(bases)}")
    return bases[0]


def official_eos_ids(config: dict) -> Any:
    """The official value is one id, a list of them, or null."""
    ids = config.get("eos_token_id")
    if ids is None:
        return ()
    if isinstance(ids, int):
        return (ids,)
    return ids


def official_managers(config: dict) -> dict[str, Any]:
    """The fields that the official mm_manager_... keys decide."""
    # which tiles are managed
    values: dict[str, Any] = {"manager_type": None, "managed_grids": "all"}
    grids = config.get("mm_manager_grid_type")
    if grids == "main":
        values["managed_grids"] = "base"
    elif grids == "grid":
        values["managed_grids"] = "grids"
    elif grids is not None:
        values["managed_grids"] = grids

    manager_type = config.get("mm_manager_type")
    if manager_type is None:
        return values
    # "zerouni" says how the official managers are initialised; all are so
    values["manager_type"] = str(manager_type).removesuffix("_zerouni")
    # which hidden states and which layers of the LLM: what range() takes
    for name in LAYER_RANGES:
        keys = layer_range_keys(name)
        for key in keys:
            if type(config[key]) is not int or not 0 <= config[key] <= MOST_LAYERS:
                raise ValueError(
                    f"the config's {key} is {show(config[key])}; it must be a whole number from 0 "
                    f"to {MOST_LAYERS}"
                )
        start, end, interval = (config[key] for key in keys)
        if interval == 0:
            raise ValueError(f"the config's {keys[2]} is 0; it must be at least 1")
        values[name] = tuple(range(start, end, interval))
    return values


# ---------------------------------------------------------------- placeholders -> image tokens
class ExpandedBatch(NamedTuple):
    """A batch in which each placeholder has become as many positions as its image has tokens.

    Padding is on the right, whatever side it was on before; rows are cut at max_length. All tensors
    are on the CPU.
    """

    ids: Tensor  # (B, S): IMAGE_TOKEN at each image token, 0 in the padding
    mask: Tensor  # (B, S), boolean: what is not padding
    labels: Tensor | None  # (B, S): IGNORE at image tokens and in the padding
    image: Tensor  # (B, S): which image of the batch a position belongs to; -1 for text and padding
    place: Tensor  # (B, S): which token of its image it is; 0 for text and padding
    is_query: Tensor  # (B, S), boolean: the text that the adaptive managers may read
    lengths: Tensor  # (B,): of the rows before they were cut
    counts: Tensor  # (I,): tokens of each image
    images_per_row: list[int]


def check_inputs(
    ids: Tensor,
    mask: Tensor,
    labels: Tensor | None,
    images: Sequence[ImageTiles],
    config: LlavaManagerConfig,
) -> None:
    """Raises ValueError for inputs of the model that do not fit together."""
    if ids.dim() != 2 or mask.shape != ids.shape or not mask.any(1).all():
        raise ValueError(
            f"input_ids {tuple(ids.shape)}, attention_mask {tuple(mask.shape)}: not (B, L), or "
            "empty row"
        )
    if labels is not None and labels.shape != ids.shape:
        raise ValueError(f"labels {tuple(labels.shape)} must be like input_ids {tuple(ids.shape)}")
    # placeholders and images in equal number
    is_placeholder = (ids == IMAGE_TOKEN) & mask
    count = int(is_placeholder.sum())
    if count != len(images):
        raise ValueError(
            f"{count} placeholders ({IMAGE_TOKEN}) in input_ids, but {len(images)} images"
        )
    # ids that the embedding has
    is_unknown = (ids < 0) | (ids >= config.vocab_size)
    unknown = ids[is_unknown & mask & ~is_placeholder]
    if len(unknown):
        raise ValueError(
            f"token id {int(unknown[0])} is outside the vocabulary of {config.vocab_size}"
        )
    # tiles of the size that SigLIP takes
    side = config.image_size
    for number, image in enumerate(images):
        shape = tuple(image.pixels.shape)
        if len(shape) != 4 or shape[1:] != (3, side, side):
            raise ValueError(f"image {number} has pixels {shape}; should be (T, 3, {side}, {side})")


def find_text_query(ids: Tensor, im_start_id: int) -> Tensor:
    """Which tokens of a row the adaptive managers may read as text query, (L,) boolean.

    ids: of one row without padding, with a placeholder for each image. The query is the text of
    the first turn of the user, which is

        <|im_start|> user newline TEXT newline IMAGE newline TEXT <|im_end|> newline <|im_start|>

    without the newlines beside the image. With several images only the text behind the last one
    counts. A row without a second <|im_start|> is of style plain: IMAGE TEXT newline.
    """
    at = torch.arange(len(ids))
    images = torch.nonzero(ids == IMAGE_TOKEN)[:, 0].tolist()
    if not images:
        return torch.zeros_like(at, dtype=torch.bool)
    last_image = images[-1]

    # style plain
    turns = torch.nonzero(ids == im_start_id)[:, 0].tolist()  # the system, the user, the assistant
    if len(turns) < 2:
        last_newline = len(ids) - 1
        return (at > last_image) & (at < last_newline)

    # the text behind the last image; without a third turn the row's end stands for its beginning,
    # as in the official code
    assistant = turns[2] if len(turns) > 2 else len(ids)
    im_end = assistant - 2
    newline_behind = last_image + 1
    query = (at > newline_behind) & (at < im_end)
    # the text before the only image
    if len(images) == 1:
        newline_before = last_image - 1
        text = turns[1] + 3  # behind <|im_start|>, user, newline
        query = query | ((at >= text) & (at < newline_before))
    return query


class Layout(NamedTuple):
    """Where the tokens of a batch (B, L) stand once each placeholder has become image tokens.

    Token t of a row becomes the positions from starts[t] to ends[t] - 1: one of text, as many as
    its image has tokens of a placeholder, none of padding.
    """

    is_placeholder: Tensor  # (B, L), boolean
    starts: Tensor  # (B, L)
    ends: Tensor  # (B, L)
    counts: Tensor  # (I,): tokens of each image


def lay_out(
    ids: Tensor, mask: Tensor, images: Sequence[ImageTiles], config: LlavaManagerConfig
) -> Layout:
    """ids and mask (B, L) of inputs that fit together -> where their tokens will stand."""
    counts = [count_image_tokens(len(image.pixels), image.size, config) for image in images]
    is_placeholder = (ids == IMAGE_TOKEN) & mask
    # how many positions each token becomes
    repeats = mask.long()
    repeats[is_placeholder] = torch.tensor(counts, dtype=torch.long)
    ends = repeats.cumsum(1)
    return Layout(is_placeholder, ends - repeats, ends, torch.tensor(counts, dtype=torch.long))


def on_cpu(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The ids as whole numbers and the mask as booleans, all True where there is none."""
    ids = input_ids.cpu().long()
    if attention_mask is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    return ids, attention_mask.cpu().bool()


class TokenCounts(NamedTuple):
    """What each row of a batch will hold, (B,), without making it."""

    labels: Tensor  # label tokens that are left; the first token of a row is predicted by none
    lengths: Tensor  # all tokens before the row is cut
    lost: Tensor  # image tokens that are cut off


def count_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    images: Sequence[ImageTiles],
    config: LlavaManagerConfig,
    labels: Tensor,
) -> TokenCounts:
    """input_ids, attention_mask, labels (B, L) -> TokenCounts. Raises ValueError for inputs that do
    not fit together.
    """
    ids, mask = on_cpu(input_ids, attention_mask)
    check_inputs(ids, mask, labels, images, config)
    layout = lay_out(ids, mask, images, config)
    # text alone has labels: it must be behind the first position and before the cut
    is_text = mask & ~layout.is_placeholder
    is_left = (layout.starts > 0) & (layout.starts < config.max_length)
    has_label = is_text & is_left & (labels.cpu() != IGNORE)
    # how much of each token is behind the cut
    behind = layout.ends - layout.starts.clamp(min=config.max_length)
    lost = behind.clamp(min=0) * layout.is_placeholder
    return TokenCounts(has_label.sum(1), layout.ends[:, -1], lost.sum(1))


def expand_placeholders(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    images: Sequence[ImageTiles],
    config: LlavaManagerConfig,
    labels: Tensor | None = None,
) -> ExpandedBatch:
    """input_ids, attention_mask, labels (B, L) of any integer dtype, with a placeholder for each
    image -> the batch as the LLM sees it. Raises ValueError for inputs that do not fit together.
    """
    # 1. what is known of each token, (B, L)
    ids, mask = on_cpu(input_ids, attention_mask)
    check_inputs(ids, mask, labels, images, config)
    layout = lay_out(ids, mask, images, config)
    image = torch.full_like(ids, -1)
    image[layout.is_placeholder] = torch.arange(len(images))
    is_query = torch.zeros_like(mask)
    if config.query is not None:
        for row, row_ids in enumerate(ids):
            is_query[row, mask[row]] = find_text_query(row_ids[mask[row]], config.im_start_id)

    # 2. the token that each position (B, S) comes from: the first of its row that ends behind it
    lengths = layout.ends[:, -1]
    longest = min(int(lengths.max()), config.max_length)
    position = torch.arange(longest).expand(len(ids), longest).contiguous()
    token = torch.searchsorted(layout.ends, position, right=True)
    is_padding = position >= lengths[:, None]
    token = token.masked_fill(is_padding, 0)

    # 3. what is known of each position
    def spread(values: Tensor, padding: int) -> Tensor:
        """(B, L) -> (B, S)."""
        return values.gather(1, token).masked_fill(is_padding, padding)

    if labels is not None:
        labels = labels.cpu().long().masked_fill(layout.is_placeholder, IGNORE)
        labels = spread(labels, IGNORE)
    image = spread(image, -1)
    place = position - spread(layout.starts, 0)
    return ExpandedBatch(
        ids=spread(ids, 0),
        mask=~is_padding,
        labels=labels,
        image=image,
        place=place.masked_fill(image < 0, 0),
        is_query=spread(is_query, False),
        lengths=lengths,
        counts=layout.counts,
        images_per_row=layout.is_placeholder.sum(1).tolist(),
    )


# ---------------------------------------------------------------- what managers read and write
class Experts(NamedTuple):
    """What the managers of a batch read of its images, over all L image tokens of the batch."""

    increments: Tensor | None = None  # (K, L, D): what each static manager adds
    stack: Tensor | None = None  # (N, L, D): the experts that adaptive managers aggregate


class Blocks(NamedTuple):
    """The managed tokens in G blocks: the tokens of a block read the same text query.

    Blocks are padded on the right, to P tokens and Q query tokens.
    """

    tokens: Tensor  # (G, P): which of the M managed tokens; 0 in the padding
    slots: Tensor  # (M,): where in (G * P) a managed token is
    query: Tensor  # (G, Q): flat positions of the query tokens; 0 in the padding
    query_mask: Tensor  # (G, 1, Q), boolean: what is not padding


class Managed(NamedTuple):
    """Where the managers of a batch act, and on what. A flat position is one in (B * S)."""

    positions: Tensor  # (M,): flat positions of the managed tokens
    increments: Tensor | None  # (K, M, D): what each static manager adds to them
    stack: Tensor | None  # (G, N, P, D): the experts of adaptive managers, in blocks
    blocks: Blocks | None  # for adaptive managers


def find_managed(batch: ExpandedBatch, config: LlavaManagerConfig) -> Tensor:
    """The image tokens that managers act on, (B, S) boolean. The only tile of an image always is
    managed.
    """
    is_image = batch.image >= 0
    if config.managed_grids == "all" or len(batch.counts) == 0:
        return is_image
    # the base tile's tokens are the first ones of an image
    tile = config.side**2
    is_alone = (batch.counts == tile)[batch.image]  # of text it says nothing
    in_base = batch.place < tile
    in_part = in_base if config.managed_grids == "base" else ~in_base
    return is_image & (is_alone | in_part)


def pad_rows(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """G tensors of different length -> (G, longest), filled with 0, and a mask of what is not."""
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def number_blocks(batch: ExpandedBatch, row: Tensor, image: Tensor) -> Tensor:
    """The number of the block of each managed token, (M,): its row, from 0 on; in a row without a
    text query its image, counted behind the rows. row and image (M,): of each managed token.
    """
    num_rows = len(batch.ids)
    has_text = batch.is_query.any(1)  # (B,)
    return torch.where(has_text[row], row, num_rows + image)


def find_blocks(batch: ExpandedBatch, is_managed: Tensor, config: LlavaManagerConfig) -> Blocks:
    """The blocks of the managed tokens, (B, S) boolean, and what each reads.

    The managed tokens of a row read its text query. In a row that has none those of an image read
    one another. Managers without a query read nothing: the whole batch is one block.
    """
    num_rows, length = batch.ids.shape
    positions = torch.nonzero(is_managed.flatten())[:, 0]  # (M,), flat
    number = torch.zeros_like(positions)
    if config.query is not None:
        number = number_blocks(batch, positions // length, batch.image[is_managed])
    # the tokens of a block stand behind one another
    numbers, sizes = number.unique_consecutive(return_counts=True)
    if len(positions) == 0:  # all images are cut off: one empty block
        numbers = torch.tensor([0])
        sizes = torch.tensor([0])
    tokens = torch.arange(len(positions)).split(sizes.tolist())

    # the query of each block
    queries = []
    for block, own in zip(numbers.tolist(), tokens, strict=True):
        query = positions[own]
        if block < num_rows:
            query = block * length + torch.nonzero(batch.is_query[block])[:, 0]
        # of these no more is read
        if config.query == "last":
            query = query[-1:]
        queries.append(query)

    padded_tokens, token_mask = pad_rows(list(tokens))
    padded_query, query_mask = pad_rows(queries)
    slots = torch.nonzero(token_mask.flatten())[:, 0]
    return Blocks(padded_tokens, slots, padded_query, query_mask[:, None])


# ---------------------------------------------------------------- Qwen2
CACHE_BLOCK = 256  # positions that a cache grows by


class KVCache:
    """Keys and values of all layers. They grow by whole blocks: how long an answer may be costs
    nothing, only how long it is.

    Position p of a row is slot p. Prompts of different length are padded on the right, and new
    tokens overwrite the padding, so a row does not notice the others.
    """

    def __init__(self, slots: Tensor):
        self.slots = slots  # (B, S): of the tokens that are being computed
        self.end = slots.shape[1]  # of the slots that are in use
        self.mask: Tensor | None = None  # (B, 1, 1, end): what the new token sees; None in a prompt
        self.keys: dict[int, Tensor] = {}  # layer -> (B, H_kv, whole blocks, d)
        self.values: dict[int, Tensor] = {}

    def advance(self, slots: Tensor) -> None:
        """Go on with one token a row, at slots (B, 1). It sees the slots up to its own."""
        self.slots = slots
        self.end += 1
        seen = torch.arange(self.end, device=slots.device) <= slots  # (B, end)
        self.mask = seen[:, None, None]

    def with_room(self, cached: Tensor | None, new: Tensor) -> Tensor:
        """The cached keys or values of a layer, with zeros behind them up to the end of the block
        that `end` is in. new (B, H_kv, S, d): has their type, and says what shape the first ones
        get.
        """
        length = 0 if cached is None else cached.shape[2]
        if cached is not None and self.end <= length:
            return cached
        batch, heads, _, head_size = new.shape
        # whole blocks, so that few tokens have to move what is cached already
        capacity = math.ceil(self.end / CACHE_BLOCK) * CACHE_BLOCK
        larger = new.new_zeros(batch, heads, capacity, head_size)
        if cached is not None:
            larger[:, :, :length] = cached
        return larger

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H_kv, S, d) of the new tokens -> those of all tokens so far."""
        self.keys[layer] = self.with_room(self.keys.get(layer), k)
        self.values[layer] = self.with_room(self.values.get(layer), v)
        # in place: the new tokens take the slots of padding, or the next ones
        slots = self.slots[:, None, :, None].expand_as(k)
        keys = self.keys[layer].scatter_(2, slots, k)
        values = self.values[layer].scatter_(2, slots, v)
        return keys[:, :, : self.end], values[:, :, : self.end]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in its rotate-half form: x (B, H, S, d), cos and sin
    (B or 1, 1, S, d).
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


class DecoderLayer(nn.Module):
    """A layer of Qwen2: grouped-query attention and a gated MLP, each behind an RMSNorm."""

    def __init__(self, config: LlavaManagerConfig, number: int):
        super().__init__()
        width = config.hidden_size
        self.number = number
        self.head_size = width // config.num_heads
        self.norm_1 = nn.RMSNorm(width, config.norm_eps)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * config.num_kv_heads * self.head_size)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm_2 = nn.RMSNorm(width, config.norm_eps)
        self.gate_up = nn.Linear(width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, width, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, S, H * d) -> (B, H, S, d)."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """Causal attention, (B, S, D) -> (B, S, D)."""
        q = self.split_heads(self.q(x))
        k, v = self.kv(x).chunk(2, dim=-1)
        k = self.split_heads(k)
        v = self.split_heads(v)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        # in a prompt, and in training, causal attention; then a token sees the slots up to its own
        mask = None
        if cache is not None:
            k, v = cache.append(self.number, k, v)
            mask = cache.mask
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, S, D) -> (B, S, D). Rows are padded on the right only, so the causal mask alone
        hides the padding.
        """
        # attention
        x = x + self.attend(self.norm_1(x), cos, sin, cache)
        # gated MLP
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Qwen2(nn.Module):
    """The LLM, with a place before each layer where something may be added to its input."""

    def __init__(self, config: LlavaManagerConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, number) for number in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (B or 1, S) -> cos and sin of the rotary embedding, (B or 1, 1, S, d)."""
        head_size = self.config.hidden_size // self.config.num_heads
        exponents = torch.arange(0, head_size, 2, device=positions.device) / head_size
        frequencies = self.config.rope_theta ** (-exponents)  # (d / 2,)
        angles = positions[:, None, :, None].float() * frequencies
        angles = angles.repeat(1, 1, 1, 2)
        return angles.cos(), angles.sin()

    def forward(
        self,
        x: Tensor,
        inject: Callable[[int, Tensor], Tensor] | None = None,
        cache: KVCache | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Embeddings (B, S, D) -> the hidden states after the last norm.

        inject(number, x) -> x acts before the layer of this number. What each layer then gets is
        appended to `states`.
        """
        if cache is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        else:
            positions = cache.slots
        # all layers turn queries and keys by the same angles
        cos, sin = self.rotations(positions)
        for number, layer in enumerate(self.layers):
            if inject is not None:
                x = inject(number, x)
            if states is not None:
                states.append(x)
            x = run(layer, self.checkpointing, x, cos, sin, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        if self.head is None:
            return F.linear(hidden, self.embed.weight)
        return self.head(hidden)


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """logits (B, V) -> token ids (B,): the likeliest ones for temperature 0, else drawn from the
    fewest that together reach the probability top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    probabilities, order = probabilities.sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities  # what the likelier ones have
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    choice = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
    return order.gather(1, choice)[:, 0]


StopRule = Callable[[list[int]], bool]  # the new ids of a row -> whether it ends here


def ask_stop(stop: StopRule, new_ids: list[list[int]], token: Tensor) -> Tensor:
    """Which rows end by a StopRule behind their new token, (B,). new_ids gets that token too."""
    ends = []
    for ids, new in zip(new_ids, token.tolist(), strict=True):
        ids.append(new)
        ends.append(stop(ids))
    return torch.tensor(ends, device=token.device)


# ---------------------------------------------------------------- the model
class Output(NamedTuple):
    """What `forward` gives, in the positions of ExpandedBatch."""

    loss: Tensor | None  # mean over the label tokens of the batch; their sum is loss * num_tokens
    logits: Tensor | None  # (B, S, V)
    num_tokens: Tensor | None = None  # (): how many tokens have a loss
    hidden_states: list[Tensor] | None = None  # the input of each layer, then the result: (B, S, D)


class LlavaManager(nn.Module):
    """LLaVA-OneVision with visual managers.

    input_ids (B, L) hold one placeholder IMAGE_TOKEN for each image. images is a flat list, in the
    order of the placeholders, of what preprocess_image returns. Outputs are in the positions of the
    sequences with their image tokens, padded on the right. Any integer dtype will do.
    """

    blocks_to_compile = (ViTBlock, DecoderLayer)
    blocks_to_shard = (ViTBlock, DecoderLayer)
    # Whether a batch without images runs SigLIP too, in training: with --shard a block is gathered
    # by all processes or by none.
    runs_all_blocks = False

    def __init__(self, config: LlavaManagerConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        # Without SigLIP's last layer, whose output the official code does not use.
        self.vision = ViT(
            config.image_size,
            config.patch_size,
            config.vision_width,
            config.vision_layers - 1,
            config.vision_heads,
            config.vision_mlp_width,
            kind="siglip",
            activation="gelu_tanh",
            eps=1e-6,
        )
        self.vision.ln_post.requires_grad_(False)  # in the official checkpoints, but not used
        self.llm = Qwen2(config)
        init = partial(init_weights, std=config.initializer_range)
        self.apply(init)
        # The projector keeps the default initialisation of nn.Linear: official.
        self.projector = nn.Sequential(
            nn.Linear(config.vision_width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.image_newline = nn.Parameter(torch.randn(width) / math.sqrt(width))
        self.managers = nn.ModuleList()
        if config.manager_type is not None:
            num_experts = len(config.managed_layers)
            embedding = torch.randn(num_experts, width) / math.sqrt(width)
            self.layer_embedding = nn.Parameter(embedding)
            for layer in config.inject_layers:
                self.managers.append(self.make_manager(layer).apply(init))

    def make_manager(self, layer: int) -> nn.Module:
        """The manager before this layer of the LLM."""
        num_experts = len(self.config.managed_layers)
        if not self.config.is_static(layer):
            return AdaptiveVisualManager(self.config.hidden_size, num_experts, self.config.query)
        if layer == 0:
            # without the last expert, which, says the paper, the LLM's input holds already
            num_experts -= 1
        return StaticVisualManager(self.config.hidden_size, num_experts)

    def set_checkpointing(self, on: bool) -> None:
        """Compute the activations of SigLIP's blocks, the projector and the LLM's layers again in
        the backward pass: a third more computation, far less memory.
        """
        self.vision.checkpointing = on
        self.llm.checkpointing = on

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: Sequence[ImageTiles] = (),
        labels: Tensor | None = None,
        logits: bool = True,
        hidden_states: bool = False,
    ) -> Output:
        """input_ids, attention_mask, labels (B, L) -> Output.

        labels: input_ids, or -100 where there is no loss; the logits of a position predict the next
        one. The loss does not need logits=True, and False saves their memory.
        """
        device = self.image_newline.device
        # 1. each placeholder becomes the positions of its image's tokens
        batch = expand_placeholders(input_ids, attention_mask, images, self.config, labels)
        # 2. SigLIP and the projector fill them; managers get what they read
        embeddings, inject = self.embed(batch, images)
        # 3. the LLM, with managers before some of its layers
        states: list[Tensor] | None = [] if hidden_states else None
        hidden = self.llm(embeddings, inject, states=states)
        if states is not None:
            states.append(hidden)
        # 4. the loss of the label tokens
        loss = None
        num_tokens = None
        if batch.labels is not None:
            total, num_tokens = self.loss_sum(hidden, batch.labels.to(device))
            loss = total / num_tokens.clamp(min=1)
        all_logits = self.llm.logits(hidden) if logits else None
        return Output(loss, all_logits, num_tokens, states)

    # ---------------------------------------------------------------- images -> tokens, experts
    def encode_images(
        self, images: Sequence[ImageTiles], images_per_row: Sequence[int] | None = None
    ) -> tuple[Tensor, Experts]:
        """The LLM's tokens (L, D) of all images, behind one another, and what managers read of
        them.

        Another vision side takes the place of this method. The number of tokens of each image must
        be what count_image_tokens says; a model without managers gives Experts().

        images_per_row: how many images each row of the batch has, as the images of a row share the
        training noise of static managers. Not given: each is a row of its own.
        """
        config = self.config
        states = self.encode_tiles(images)
        if images_per_row is None:
            images_per_row = [1] * len(images)
        # 1. features of the tiles, (T, *, n*n, D), and of the images' newlines, (I, *, D): first
        # the tokens, which are the last hidden state
        last = self.projector(states[config.vision_layers - 1])
        features = [last[:, None]]
        newlines = [self.image_newline.expand(len(images), 1, -1)]
        # then the experts, which adaptive managers read as they are
        insights: Iterable[Tensor] = ()
        num_experts = 0
        if config.manager_type is not None:
            insights = self.insights(states)
        if config.manager_type not in (None, "static"):
            insights = list(insights)
            num_experts = len(insights)
            features += insights
            newlines.append(self.image_newline.expand(len(images), num_experts, -1))
        # then what static managers add
        if config.has_static:
            sums, newline_sums = self.static_sums(insights, images, images_per_row)
            features.append(sums)
            newlines.append(newline_sums)

        # 2. all are merged at once
        merged = self.merge_images(torch.cat(features, 1), images, torch.cat(newlines, 1))
        experts = Experts()
        if num_experts > 0:
            experts = experts._replace(stack=merged[1 : 1 + num_experts])
        if config.has_static:
            experts = experts._replace(increments=merged[1 + num_experts :])
        return merged[0], experts

    def encode_tiles(self, images: Sequence[ImageTiles]) -> dict[int, Tensor]:
        """All tiles of the batch through SigLIP in one pass: number of a hidden state ->
        (T, n*n, D_vision), for the last one and those that are managed.
        """
        weight = self.vision.patch.weight
        pixels = torch.cat([image.pixels for image in images]).to(weight.device, weight.dtype)
        kept = {self.config.vision_layers - 1}
        if self.config.manager_type is not None:
            kept.update(self.config.managed_layers)
        numbers = sorted(kept)
        return dict(zip(numbers, self.vision(pixels, numbers), strict=True))

    def insight(self, state: Tensor, embedding: Tensor) -> Tensor:
        """proj(V_n) + e_n of one managed layer: (T, n*n, D_vision) and (D,) -> (T, 1, n*n, D)."""
        projected = run(self.projector, self.vision.checkpointing, state)
        return (projected + embedding.to(projected.dtype))[:, None]

    def insights(self, states: dict[int, Tensor]) -> Iterator[Tensor]:
        """The insights of the managed layers, made one after the other as they are asked for."""
        managed_layers = self.config.managed_layers
        for number, embedding in zip(managed_layers, self.layer_embedding, strict=True):
            yield self.insight(states[number], embedding)

    def static_sums(
        self,
        insights: Iterable[Tensor],
        images: Sequence[ImageTiles],
        images_per_row: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """N insights (T, 1, n*n, D) -> what each static manager adds to the tiles, (T, K, n*n, D),
        and to the images' newlines, (I, K, D).

        Static managers do not depend on the LLM, and merging is linear. So their sums over the
        experts come first, of all managers at once, and only these K results are merged.
        """
        device = self.image_newline.device
        num_rows = len(images_per_row)
        tiles_per_image = torch.tensor([len(image.pixels) for image in images])
        row_of_image = torch.arange(num_rows).repeat_interleave(torch.tensor(images_per_row))
        row_of_tile = row_of_image.repeat_interleave(tiles_per_image)
        weights = self.static_weights(num_rows)  # (B, N, K, 1, D)
        # the sums of all managers over the experts, tile by tile
        tile_weights = weights.index_select(0, row_of_tile.to(device))  # (T, N, K, 1, D)
        sums = weighted_sum(tile_weights.unbind(1), insights)  # (T, K, n*n, D)
        # a newline is the same for all experts, so its weight is the sum of theirs
        newline_weights = weights.sum(1)[:, :, 0].index_select(0, row_of_image.to(device))
        return sums, newline_weights * self.image_newline

    def static_weights(self, num_rows: int) -> Tensor:
        """The weights of all static managers, (num_rows, N, K, 1, D): 0 for the last expert of the
        manager before layer 0, which has one less.
        """
        # stacking needs the same number of experts for all: zeros take the place of a missing one
        num_experts = len(self.config.managed_layers)
        all_weights = []
        for manager in self.managers:
            if isinstance(manager, StaticVisualManager):
                weights = manager.weights(num_rows).expand(num_rows, -1, -1, -1)
                missing = num_experts - weights.shape[1]
                all_weights.append(F.pad(weights, (0, 0, 0, 0, 0, missing)))
        return torch.stack(all_weights, dim=2)

    def merge_images(
        self, features: Tensor, images: Sequence[ImageTiles], newlines: Tensor
    ) -> Tensor:
        """Several features of each tile, (T, K, n*n, D), and their newline tokens, (I or 1, K, D)
        -> those of all image tokens, (K, L, D).
        """
        # image by image, as each has a grid of its own
        tiles_of_image = features.split([len(image.pixels) for image in images])
        newlines = newlines.expand(len(images), -1, -1)
        merged = []
        for tiles, image, newline in zip(tiles_of_image, images, newlines, strict=True):
            merged.append(merge_grids(tiles, image.size, self.config, newline))
        return torch.cat(merged, dim=1)

    # ---------------------------------------------------------------- tokens -> the LLM
    def embed(
        self, batch: ExpandedBatch, images: Sequence[ImageTiles]
    ) -> tuple[Tensor, Callable[[int, Tensor], Tensor] | None]:
        """The LLM's input (B, S, D), and what it calls before each layer."""
        device = self.image_newline.device
        embeddings = self.llm.embed(batch.ids.clamp(min=0).to(device))  # (B, S, D)
        # padding is zeros, as in the official code
        is_padding = ~batch.mask[..., None].to(device)
        embeddings = embeddings.masked_fill(is_padding, 0)
        inject = None
        if len(images):
            tokens, experts = self.encode_images(images, batch.images_per_row)
            is_image = batch.ids == IMAGE_TOKEN
            # not simply 0, 1, ...: rows that were cut have lost the last tokens of their images
            numbers = self.number_tokens(batch)[is_image].to(device)
            embeddings[is_image] = tokens[numbers].to(embeddings.dtype)
            if self.config.manager_type is not None:
                inject = partial(self.inject, managed=self.plan_managers(batch, experts))
        if self.training:
            embeddings = embeddings + self.unused(len(images))
            if self.runs_all_blocks and not images:
                embeddings = embeddings + self.black_tile()
        return embeddings, inject

    @staticmethod
    def number_tokens(batch: ExpandedBatch) -> Tensor:
        """Which of the batch's L image tokens a position holds, (B, S); of text it says nothing."""
        first_token = batch.counts.cumsum(0) - batch.counts  # (I,)
        return first_token[batch.image] + batch.place

    def plan_managers(self, batch: ExpandedBatch, experts: Experts) -> Managed:
        """What `inject` needs, for all managers."""
        device = self.image_newline.device
        is_managed = find_managed(batch, self.config)
        positions = torch.nonzero(is_managed.flatten())[:, 0].to(device)
        tokens = self.number_tokens(batch)[is_managed].to(device)  # (M,)
        # only the managed tokens are left of what managers read
        increments = experts.increments
        if increments is not None:
            increments = increments.index_select(1, tokens)
        if experts.stack is None:
            return Managed(positions, increments, None, None)
        # adaptive managers read theirs in blocks
        blocks = find_blocks(batch, is_managed, self.config)
        blocks = Blocks(*(part.to(device) for part in blocks))
        stack = experts.stack[:, tokens[blocks.tokens]]  # (N, G, P, D)
        return Managed(positions, increments, stack.transpose(0, 1), blocks)

    def inject(self, layer: int, x: Tensor, managed: Managed) -> Tensor:
        """x (B, S, D) before a layer of the LLM, plus what its manager, if it has one, adds to the
        image tokens.
        """
        if layer not in self.config.inject_layers:
            return x
        number = self.config.inject_layers.index(layer)
        flat = x.flatten(0, 1)  # (B * S, D)
        if self.config.is_static(layer):
            assert managed.increments is not None
            increment = managed.increments[number]
        else:
            increment = self.adaptive_increment(number, flat, managed)
        return flat.index_add(0, managed.positions, increment.to(x.dtype)).view_as(x)

    def adaptive_increment(self, number: int, flat: Tensor, managed: Managed) -> Tensor:
        """What an adaptive manager adds to the managed tokens, (M, D). flat: (B * S, D)."""
        blocks = managed.blocks
        assert blocks is not None
        image = flat[managed.positions[blocks.tokens]]  # (G, P, D)
        query = flat[blocks.query]  # (G, Q, D)
        # each token of a block reads all that is not padding
        manager = self.managers[number]
        increment = manager(managed.stack, image, query, blocks.query_mask)  # (G, P, D)
        # without the padding of the blocks
        return increment.flatten(0, 1).index_select(0, blocks.slots)

    def unused(self, num_images: int) -> Tensor:
        """0, with a path for gradients to the parameters that a batch without images or without
        grids leaves out: DDP waits for every parameter in every step.
        """
        named = [("image_newline", self.image_newline)]
        if num_images == 0:
            named = list(self.named_parameters())
        # the LLM runs always, and with --shard SigLIP's blocks do
        elsewhere = ("llm.", "vision.blocks.") if self.runs_all_blocks else ("llm.",)
        total: Any = 0
        for name, parameter in named:
            if parameter.requires_grad and not name.startswith(elsewhere):
                total = total + parameter.flatten()[0]
        return 0 * total

    def black_tile(self) -> Tensor:
        """0, from a black tile that goes through SigLIP, and a path for gradients to its blocks."""
        weight = self.vision.patch.weight
        side = self.config.image_size
        pixels = torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype)
        (last,) = self.vision(pixels, [self.config.vision_layers - 1])
        return 0 * last.sum()

    # ---------------------------------------------------------------- loss
    def cross_entropy_sum(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden (L, D) of the positions before the label tokens, labels (L,) -> a number."""
        return F.cross_entropy(self.llm.logits(hidden).float(), labels, reduction="sum")

    def loss_sum(self, hidden: Tensor, labels: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
        """hidden (B, S, D), labels (B, S) -> the sum of the label tokens' cross entropies, and
        their number.

        Only the label tokens' logits are made, `chunk` at a time, and again in the backward pass:
        all of (B, S, V) would outweigh the model.
        """
        # the hidden state of a position predicts the next token
        has_loss = labels[:, 1:] != IGNORE
        hidden_parts = hidden[:, :-1][has_loss].split(chunk)
        label_parts = labels[:, 1:][has_loss].split(chunk)
        total = 0 * hidden.flatten()[0].float()  # a gradient path, also without a label
        for hidden_part, label_part in zip(hidden_parts, label_parts, strict=True):
            total = total + run(self.cross_entropy_sum, True, hidden_part, label_part)
        return total, has_loss.sum()

    def count_labels(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        images: Sequence[ImageTiles],
        labels: Tensor,
    ) -> int:
        """The num_tokens that `forward` will give, without running the model: for the mean over a
        global batch.
        """
        counts = count_tokens(input_ids, attention_mask, images, self.config, labels)
        return int(counts.labels.sum())

    # ---------------------------------------------------------------- generation
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: Sequence[ImageTiles] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        stop: StopRule | None = None,
    ) -> Tensor:
        """The new token ids only, (B, L), L <= max_new_tokens; after its end a row repeats an eos
        id, or 0 where the model has none.

        Managers act in the prompt; then tokens come one by one from the KV cache. stop: called with
        all new ids of a row after each of them; True ends the row. `chat.stop_at` makes one of stop
        strings. Raises ValueError for a prompt that is longer than max_length, and for settings
        that make no sense.
        """
        steps = self.generate_steps(
            input_ids,
            attention_mask,
            images,
            max_new_tokens,
            temperature,
            top_p,
            generator,
            stop,
        )
        return torch.stack(list(steps), dim=1)

    @torch.no_grad()
    def generate_steps(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: Sequence[ImageTiles] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        stop: StopRule | None = None,
    ) -> Iterator[Tensor]:
        """The columns (B,) of what `generate` returns, each as soon as it is known."""
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}, temperature {temperature}, top_p {top_p}; "
                "they must be at least 1, at least 0, and above 0 up to 1"
            )
        batch = expand_placeholders(input_ids, attention_mask, images, self.config)
        hidden, cache = self.read_prompt(batch, images)

        # then one token after the other
        device = hidden.device
        lengths = batch.lengths.to(device)
        eos = torch.tensor(self.config.eos_ids, dtype=torch.long, device=device)
        filler = eos[0] if len(eos) else torch.zeros_like(lengths[0])
        ended = torch.zeros(len(lengths), dtype=torch.bool, device=device)
        new_ids: list[list[int]] = [[] for _ in lengths]  # of each row, for `stop`
        for step in range(max_new_tokens):
            logits = self.llm.logits(hidden)
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite: its weights are damaged")
            token = sample(logits, temperature, top_p, generator)
            # a row that has ended waits for the others
            token = torch.where(ended, filler, token)
            yield token
            ended = ended | torch.isin(token, eos)
            if stop is not None:
                ended = ended | ask_stop(stop, new_ids, token)
            if ended.all() or step == max_new_tokens - 1:
                return
            # managers have acted in the prompt: a new token is text, and nothing is injected
            cache.advance((lengths + step)[:, None])
            hidden = self.llm(self.llm.embed(token)[:, None], cache=cache)[:, 0]

    def read_prompt(
        self, batch: ExpandedBatch, images: Sequence[ImageTiles]
    ) -> tuple[Tensor, KVCache]:
        """The hidden state of each row's last token, (B, D), which predicts the first new one, and
        the cache of the prompt. Raises ValueError for one that is longer than max_length.
        """
        num_rows, length = batch.ids.shape
        longest = int(batch.lengths.max())
        if longest > length:
            raise ValueError(
                f"a prompt has {longest} tokens with its images, more than max_length {length}"
            )
        device = self.image_newline.device
        cache = KVCache(torch.arange(length, device=device).expand(num_rows, length))
        embeddings, inject = self.embed(batch, images)
        hidden = self.llm(embeddings, inject, cache)  # (B, S, D)
        # rows are padded on the right, so the last token of each stands elsewhere
        rows = torch.arange(num_rows, device=device)
        return hidden[rows, batch.lengths.to(device) - 1], cache
