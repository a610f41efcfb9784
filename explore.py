"""One page about one picture and one text: what each manager weighs and who attends to whom.

    python figures.py explore --checkpoint out/demo --image a.jpg --text "a red circle"

The page needs no server, no network and no library: page.html is its template, and the numbers
stand inside. Papers: the weights are W_i of ACL 2023, section 3, and TCSVT 2025, sections III and
IV; each is a mean over the channels. The attention is that of the cross-modal layers, or of the LLM
layers that have a manager before them; each is a mean over the heads.

The page shows units: a patch, several neighbours of a very fine map (their weights are means, the
attention to them is a sum), or another image token. Units are counted over all views of a picture.

Shapes: N experts, L tokens of a modality, U units, T text tokens, S length of a row with its
images, Q queries, K keys, H heads.
"""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from analysis import (
    QUERIES_AT_ONCE,
    adaptive_managers,
    attention_map,
    causal,
    heads_of_cross_modal,
    heads_of_llm,
    watching,
)
from files import check_output, save_result
from images import image_transform, name_of
from llava_manager import LlavaManager, expand_placeholders, find_managed
from manager import StaticVisualManager
from model import ManagerTower
from multigrid import (
    BICUBIC,
    ImageTiles,
    grid_geometry,
    pad_and_squash,
    resize_and_pad,
)
from world import evaluating

TEMPLATE = Path(__file__).with_name("page.html")
MARK = "@NUMBERS@"  # in the template
START = "<!DOCTYPE html>\n<!-- The page that `python figures.py explore` writes."  # of each page
MOST_UNITS = 1024  # about, of a view; a finer map is shown in cells of several patches
MOST_BYTES = 3_000_000  # of a page
SHOWN_SIDE = 512  # pixels of the longer side of a picture


# ---------------------------------------------------------------- what is shown
class View(NamedTuple):
    """A map of patches over a picture."""

    name: str
    picture: Image.Image
    tokens: Tensor  # (rows, columns): the number of the image token of each patch


class Layer(NamedTuple):
    """What a layer and the managers before it do. A modality without a manager has no entry."""

    name: str
    weights: dict[str, Tensor]  # modality -> (N, L), or (N, 1) where all tokens share them
    magnitudes: dict[str, Tensor]  # the same of |weight|, where weights may be negative
    text_to_image: Tensor  # attention of each text token, (T, L)
    image_to_text: Tensor  # attention of each image token, (L, T)


class Inside(NamedTuple):
    """All that a page shows."""

    title: str
    facts: str
    reading: str  # how the page is to be read
    attention_word: str  # what the attention is a part of
    tokens: list[str]
    picture_place: int  # the text token that the picture stands before; -1 where it stands nowhere
    views: list[View]
    others: dict[int, str]  # the number of an image token that is no patch -> its name
    expert_word: dict[str, str]
    experts: dict[str, list[int]]  # modality -> the numbers of the experts
    layers: list[Layer]


def token_names(tokenizer: Any, ids: list[int]) -> list[str]:
    """How each token is written; a part of a character, and a special token, by its own name."""
    backend = tokenizer.backend
    name_of = backend.id_to_token if hasattr(backend, "id_to_token") else backend.id_to_piece
    names = []
    for token in ids:
        text = tokenizer.decode([token])
        if not text or "\ufffd" in text:
            text = name_of(token) or f"token {token}"
        names.append(text)
    return names


# ---------------------------------------------------------------- ManagerTower
TOWER_READING = (
    "Before each cross-modal layer stand two managers, one for the text and one for the "
    "picture. A bar is the weight that the manager gives to an expert, a layer of the "
    "encoder, for this token: the mean over the channels; the weights of all experts sum to "
    "1. The weights of static managers are the same for all tokens. Attention is that of the "
    "cross-modal layer, from one modality to the other, the mean over its heads: it sums to 1 "
    "over all tokens of the other modality."
)


class TowerWatcher:
    """What the managers and the cross-modal layers of a ManagerTower do with one pair."""

    def __init__(self, model: ManagerTower):
        self.modules: dict[Any, torch.nn.Module] = {}
        self.weights: dict[tuple, Tensor] = {}  # (modality, layer) -> (N, L)
        self.attention: dict[tuple, Tensor] = {}  # (modality of the queries, layer) -> (Q, K)
        for modality, managers, layers in (
            ("text", model.text_managers, model.text_layers),
            ("image", model.image_managers, model.image_layers),
        ):
            for i, manager in enumerate(managers):
                self.modules["manager", modality, i] = manager
            for i, layer in enumerate(layers):
                self.modules["layer", modality, i] = layer

    def read(self, key: Any, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        """The hook of `watching`."""
        part, modality, i = key
        if part == "manager":
            weights = module.weights(*args, **kwargs)  # (1, N, L, D or 1)
            self.weights[modality, i] = weights[0].float().mean(-1).cpu()
            return
        x, mask, other, other_mask = args[:4]
        heads = heads_of_cross_modal(module, x, mask, other)
        attention = attention_map(heads.q, heads.k, other_mask)  # (1, H, Q, K)
        self.attention[modality, i] = attention[0].mean(0).cpu()


def shown_picture(picture: Image.Image, transform: str) -> Image.Image:
    """What a two-tower model sees of a picture, but in more pixels."""
    in_its_own_colours = image_transform(transform, SHOWN_SIDE, False, (0, 0, 0), (1, 1, 1))
    pixels = in_its_own_colours(picture, None)  # (3, S, S), from 0 to 1
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def look_into_tower(
    model: ManagerTower,
    tokenizer: Any,
    batch: dict[str, Tensor],
    picture: Image.Image,
    transform: str,
) -> Inside:
    """What a ManagerTower does with the batch of one "pixels", "input_ids", "attention_mask".

    picture, transform: the picture that the pixels were made of, and the transform's name. Raises
    ValueError for a model without managers.
    """
    config = model.config
    if config.fusion != "manager":
        raise ValueError(f"the model has no managers: its fusion is {config.fusion!r}")
    watcher = TowerWatcher(model)
    with evaluating(model), watching(watcher.modules, watcher.read):
        model(batch["pixels"], batch["input_ids"], batch["attention_mask"])

    # padding is left out: nothing attends to it
    is_real = batch["attention_mask"][0].bool().cpu()
    layers = []
    for i in range(config.num_layers):
        weights = {
            "text": watcher.weights["text", i][:, is_real],
            "image": watcher.weights["image", i],
        }
        to_image = watcher.attention["text", i][is_real]
        to_text = watcher.attention["image", i][:, is_real]
        layers.append(Layer(f"cross-modal layer {i + 1}", weights, {}, to_image, to_text))

    experts = {}
    for modality, last in (("text", config.text_layers), ("image", config.vision_layers)):
        first_expert = last - config.num_experts(modality) + 1
        experts[modality] = list(range(first_expert, last + 1))
    has_class_token = model.image_encoder.class_embedding is not None
    first = 1 if has_class_token else 0
    side = config.image_size // config.patch_size
    patches = torch.arange(side * side).view(side, side) + first
    facts = f"{config.num_layers} cross-modal layers, managers of type {config.manager_type}"
    return Inside(
        title="Inside a ManagerTower",
        facts=f"{facts}; {side} x {side} patches",
        reading=TOWER_READING,
        attention_word="cross-attention",
        tokens=token_names(tokenizer, batch["input_ids"][0, is_real].tolist()),
        picture_place=-1,
        views=[View("picture", shown_picture(picture, transform), patches)],
        others={0: "class token"} if has_class_token else {},
        expert_word={"text": "text layer", "image": "image layer"},
        experts=experts,
        layers=layers,
    )


# ---------------------------------------------------------------- LLaVA-OV-Manager
MLLM_READING = (
    "Before some layers of the LLM a manager adds to each image token what it aggregates of "
    "several hidden states of SigLIP. A bar is the weight of such a hidden state for this "
    "token. The weights have no softmax and differ from channel to channel: look at the mean, "
    "and at the mean of their size. Those of static managers are the same for all image "
    "tokens. Attention is that of the LLM layer behind the manager, the mean over its heads. "
    "It is causal: a token sees itself and what stands before it, and its attention sums to 1 "
    "over all of that."
)


class LlmWatcher:
    """What adaptive managers and the LLM layers behind managers do with one prompt."""

    def __init__(self, model: LlavaManager, is_image: Tensor, is_managed: Tensor):
        self.image = torch.nonzero(is_image)[:, 0]  # positions, (L,)
        self.text = torch.nonzero(~is_image)[:, 0]  # (T,)
        self.is_managed = is_managed[is_image].cpu()  # (L,)
        self.modules: dict[Any, torch.nn.Module] = {}
        self.weights: dict[int, list[Tensor]] = {}  # manager -> mean and magnitude, (N, L) each
        self.attention: dict[tuple, Tensor] = {}  # (modality of the queries, manager) -> (Q, K)
        for k, manager in adaptive_managers(model).items():
            self.modules["manager", k] = manager
        for k, layer in enumerate(model.config.inject_layers):
            self.modules["layer", k] = model.llm.layers[layer]

    def read(self, key: Any, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        """The hook of `watching`."""
        part, k = key
        if part == "manager":
            # of one prompt all managed tokens are one block; the first argument are the experts
            self.add_weights(k, module.weights(*args[1:], **kwargs)[0])
            return
        x, cos, sin = args[:3]
        heads = heads_of_llm(module, x, cos, sin)
        self.attention["text", k] = self.attend(heads, self.text, self.image)
        self.attention["image", k] = self.attend(heads, self.image, self.text)

    def add_weights(self, k: int, weights: Tensor) -> None:
        """weights (N, M or 1, D) of the managed tokens; those of others are not a number."""
        means = [weights.float().mean(-1).cpu(), weights.float().abs().mean(-1).cpu()]
        self.weights[k] = []
        for mean in means:
            spread = torch.full((len(mean), len(self.image)), math.nan)
            spread[:, self.is_managed] = mean.expand(-1, int(self.is_managed.sum()))
            self.weights[k].append(spread)

    def attend(self, heads: Any, queries: Tensor, keys: Tensor) -> Tensor:
        """The attention of some positions to some others, (Q, K), of all that they attend to."""
        every = torch.arange(heads.k.shape[2], device=queries.device)
        rows = []
        for some in queries.split(QUERIES_AT_ONCE):
            attention = attention_map(heads.q[:, :, some], heads.k, causal(some, every))
            rows.append(attention[0].mean(0)[:, keys].cpu())
        return torch.cat(rows)


def fit_side(picture: Image.Image, side: int) -> Image.Image:
    """The picture with `side` pixels along its longer side, if it has more."""
    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    width = max(round(picture.width * scale), 1)
    height = max(round(picture.height * scale), 1)
    return picture.resize((width, height), BICUBIC)


def base_view(picture: Image.Image, config: Any) -> View:
    """The base tile: the whole picture, whose patches are no squares where the tile is squashed."""
    side = config.side
    shown = pad_and_squash(picture, SHOWN_SIDE) if config.aspect == "pad" else picture
    return View(
        "whole picture", fit_side(shown, SHOWN_SIDE), torch.arange(side**2).view(side, side)
    )


def grid_view(picture: Image.Image, config: Any) -> View:
    """The grid of tiles as one map, as `multigrid.merge_grids` lays it out."""
    (columns, rows), keep, (height, width) = grid_geometry(picture.size, config)
    side = config.side
    pixels = max(SHOWN_SIDE // max(columns, rows) // side, 1)  # of a patch
    canvas = resize_and_pad(picture, (columns * side * pixels, rows * side * pixels))
    first = side**2
    if config.merge == "flat":  # tile by tile, with their padding
        number = torch.arange(rows * columns * side**2).view(rows, columns, side, side)
        tokens = number.transpose(1, 2).reshape(rows * side, columns * side)
        return View("grid of tiles", canvas, first + tokens)
    kept_rows, kept_columns = keep
    corners = (kept_columns.start, kept_rows.start, kept_columns.stop, kept_rows.stop)
    shown = canvas.crop(tuple(corner * pixels for corner in corners))
    # each row of the map ends with a newline token
    tokens = torch.arange(height * (width + 1)).view(height, width + 1)[:, :-1]
    return View("grid of tiles", shown, first + tokens)


def look_into_mllm(
    model: LlavaManager, tokenizer: Any, input_ids: list[int], tiles: ImageTiles, picture: Any
) -> Inside:
    """What a LLaVA-OV-Manager does with a prompt about one picture. Raises ValueError for a model
    without managers, and for a prompt that is longer than max_length.
    """
    config = model.config
    if config.manager_type is None:
        raise ValueError("the model has no managers")
    ids = torch.tensor([input_ids])
    batch = expand_placeholders(ids, None, [tiles], config)
    if int(batch.lengths[0]) > config.max_length:
        raise ValueError(
            f"the prompt has {int(batch.lengths[0])} tokens with its picture, more than max_length "
            f"{config.max_length}"
        )
    device = model.image_newline.device
    is_image = (batch.image[0] >= 0).to(device)
    watcher = LlmWatcher(model, is_image, find_managed(batch, config)[0].to(device))
    with evaluating(model), watching(watcher.modules, watcher.read):
        for k, manager in enumerate(model.managers):
            if isinstance(manager, StaticVisualManager):
                watcher.add_weights(k, manager.weights()[0])
        model(ids, images=[tiles], logits=False)

    layers = []
    for k, layer in enumerate(config.inject_layers):
        mean, magnitude = watcher.weights[k]
        to_image = watcher.attention["text", k]
        to_text = watcher.attention["image", k]
        name = f"LLM layer {layer}"
        layers.append(Layer(name, {"image": mean}, {"image": magnitude}, to_image, to_text))
    views = [base_view(picture, config)]
    if len(tiles.pixels) > 1:
        views.append(grid_view(picture, config))
    text = batch.ids[0][~is_image.cpu()].tolist()
    facts = f"{len(model.managers)} managers of type {config.manager_type}"
    return Inside(
        title="Inside a LLaVA-OV-Manager",
        facts=f"{facts}; {len(watcher.image)} image tokens; tiles: {len(tiles.pixels)}",
        reading=MLLM_READING,
        attention_word="attention",
        tokens=token_names(tokenizer, text),
        picture_place=int(watcher.image[0]),
        views=views,
        others={},
        expert_word={"image": "hidden state"},
        experts={"image": list(config.managed_layers)},
        layers=layers,
    )


# ---------------------------------------------------------------- tokens -> units
class Units(NamedTuple):
    """Which unit shows each image token."""

    of_token: Tensor  # (L,); -1 for one that is not shown, a newline of the grid
    num_units: int
    shapes: list[tuple[int, int]]  # (rows, columns) of each view
    others: list[int]  # the units of the tokens that are no patches


def number_units(inside: Inside, num_tokens: int) -> Units:
    """The cells of all views row by row, and behind them the tokens that are no patches."""
    of_token = torch.full((num_tokens,), -1)
    count = 0
    shapes = []
    for view in inside.views:
        rows, columns = view.tokens.shape
        # a very fine map is shown in cells of step x step patches
        step = math.ceil(math.sqrt(rows * columns / MOST_UNITS))
        num_rows = math.ceil(rows / step)
        num_columns = math.ceil(columns / step)
        row = torch.arange(rows)[:, None] // step
        column = torch.arange(columns) // step
        of_token[view.tokens] = count + row * num_columns + column
        count += num_rows * num_columns
        shapes.append((num_rows, num_columns))
    others = []
    for token in inside.others:
        of_token[token] = count
        others.append(count)
        count += 1
    return Units(of_token, count, shapes, others)


def gather_units(values: Tensor, units: Units, is_mean: bool) -> Tensor:
    """Numbers of image tokens (R, L) -> those of units (R, U): sums, or means."""
    if values.shape[1] == 1:  # the same for all
        return values
    is_shown = units.of_token >= 0
    unit = units.of_token[is_shown]
    totals = torch.zeros(len(values), units.num_units).index_add(1, unit, values[:, is_shown])
    if is_mean:
        totals = totals / unit.bincount(minlength=units.num_units)
    return totals


# ---------------------------------------------------------------- the page
def to_base64(values: np.ndarray) -> str:
    """The values row by row, in little-endian."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def pack_halves(values: Tensor) -> dict[str, Any]:
    """A matrix in float16, as page.html describes it."""
    data = to_base64(values.half().numpy())
    return {"shape": list(values.shape), "type": "float16", "data": data}


def pack_bytes(values: Tensor) -> dict[str, Any]:
    """A matrix of numbers >= 0 as bytes, in 255ths of the largest of each row."""
    scales = values.amax(1).half()  # (R,)
    totals = values.sum(1).half()
    smallest = torch.finfo(torch.half).tiny  # of a divisor
    largest = scales.float().clamp(min=smallest)[:, None]
    parts = (255 * values / largest).round().clamp(max=255)
    return {
        "shape": list(values.shape),
        "type": "uint8",
        "data": to_base64(parts.byte().numpy()),
        "scales": to_base64(scales.numpy()),
        "totals": to_base64(totals.numpy()),
    }


def share_columns(weights: Tensor) -> Tensor:
    """(N, 1) in place of (N, L) where all tokens have the same weights."""
    first = weights[:, :1]
    return first if torch.equal(weights, first.expand_as(weights)) else weights


def describe_layer(layer: Layer, inside: Inside, units: Units) -> dict[str, Any]:
    managers = {}
    for modality, weights in layer.weights.items():
        one: dict[str, Any] = {"experts": inside.experts[modality][: len(weights)]}
        for what, numbers in (("weights", layer.weights), ("magnitudes", layer.magnitudes)):
            if modality in numbers:
                shared = share_columns(numbers[modality])
                if modality == "image":
                    shared = gather_units(shared, units, is_mean=True)
                one[what] = pack_halves(shared)
        managers[modality] = one
    # of a cell of several patches: how much attention they get, and the mean of what they give
    to_image = gather_units(layer.text_to_image, units, is_mean=False)
    to_text = gather_units(layer.image_to_text.T, units, is_mean=True).T
    return {
        "name": layer.name,
        "managers": managers,
        "text_to_image": pack_bytes(to_image),
        "image_to_text": pack_bytes(to_text),
    }


def picture_address(picture: Image.Image) -> str:
    """A picture as a data: address."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def describe(inside: Inside) -> dict[str, Any]:
    """What page.html reads."""
    num_tokens = inside.layers[0].text_to_image.shape[1]
    units = number_units(inside, num_tokens)
    views = []
    first = 0
    for view, (rows, columns) in zip(inside.views, units.shapes, strict=True):
        address = picture_address(fit_side(view.picture, SHOWN_SIDE))
        shape = {"rows": rows, "columns": columns, "first": first}
        views.append({"name": view.name, "picture": address, **shape})
        first += rows * columns
    others = []
    for unit, name in zip(units.others, inside.others.values(), strict=True):
        others.append({"index": unit, "name": name})
    return {
        "title": inside.title,
        "facts": inside.facts,
        "reading": inside.reading,
        "attention_word": inside.attention_word,
        "tokens": inside.tokens,
        "picture_place": inside.picture_place,
        "views": views,
        "others": others,
        "expert_word": inside.expert_word,
        "layers": [describe_layer(layer, inside, units) for layer in inside.layers],
    }


def make_page(inside: Inside) -> str:
    """The HTML. Raises ValueError for a page that would be too large.

    The numbers stand in a script element, which ends at the first "</script"; so no "<" is left in
    them, and texts of the user come into the page by scripts, as text.
    """
    numbers = json.dumps(describe(inside)).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace(MARK, numbers)
    if len(page) > MOST_BYTES:
        raise ValueError(
            f"the page would have {len(page) / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}; a "
            "shorter text makes it smaller"
        )
    return page


def check_page(path: str | Path) -> None:
    """Raises ValueError if a page would take the place of a file that is no page of this kind."""
    check_output("--out", str(path))
    file = Path(path)
    if not file.exists():
        return
    with file.open("rb") as stream:
        is_page = stream.read(len(START)) == START.encode()
    if not is_page or file.samefile(TEMPLATE):
        raise ValueError(f"--out {name_of(file)} is there, and is no such page; it would be lost")


def save_page(path: str | Path, inside: Inside) -> None:
    page = make_page(inside)
    save_result(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
