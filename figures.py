"""Pictures of what a model does inside: its managers, the grid of tiles that the MLLM sees, and the
curves of runs.

    python figures.py managers --checkpoint out/demo --data demo
    python figures.py managers --checkpoint LLAVA --image a.jpg --image b.jpg
    python figures.py grid --image a.jpg
    python figures.py curves --run out/a --run out/b

`managers` draws figures 4 and 7 of ACL 2023, and figures 21 to 23 of TCSVT 2025 for the MLLM.
`python figures.py -h` lists the commands, `python figures.py managers -h` the flags of one. The
numbers of a figure lie beside it as JSON. `managers` and `curves` need matplotlib.

Shapes: B batch, N experts, L tokens, D width, T tiles, S side of a tile.
"""

import contextlib
import functools
import io
import itertools
import math
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from ask import encode_turns
from data import batches
from eval import check_data_flags, check_picture_output, open_task
from fields import Command, check_fields, option, run_command, show
from files import read_log, save_json, save_picture
from hub import default_output
from images import load_image, name_of
from llava_manager import LlavaManager, LlavaManagerConfig
from manager import AdaptiveVisualManager
from model import ManagerTower
from multigrid import ImageTiles, count_image_tokens, grid_geometry, preprocess_image
from tasks import find_task, task_of_heads
from weights import is_mllm, load_llava, load_mllm, load_two_tower
from world import MOST_WORKERS, evaluating, one_sentence


# ---------------------------------------------------------------- drawing
class Panel(NamedTuple):
    """One pair of axes and its curves."""

    title: str
    xlabel: str
    ylabel: str
    curves: dict[str, tuple[list, list]]  # name -> (x, y)
    if_empty: str = "nothing to draw"  # what is said where there is no point


def load_matplotlib() -> Any:
    """The class of matplotlib's figures. Raises ValueError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    return Figure


def legend_label(name: str) -> str:
    """A name as matplotlib shows it: no formula between two $, and not hidden for its first _.

    Of a long one its end; it is one line, and UTF-8.
    """
    label = " ".join(name.split())
    if len(label) > 60:
        label = f"...{label[-57:]}"
    label = label.encode("utf-8", errors="replace").decode()
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def describe_points(panel: Panel) -> str:
    """The few points of a panel in words: what they are, then a line each."""
    lines = []
    for name, (x, y) in panel.curves.items():
        for position, value in zip(x, y, strict=True):
            lines.append(f"{legend_label(name)}: {value:.4g} at {panel.xlabel} = {position}")
    if not lines:
        return panel.if_empty
    return "\n".join([panel.ylabel, *lines])


def draw_panel(axes: Any, panel: Panel) -> None:
    """Draw the curves; where none has two points, axes would be empty: say what there is."""
    axes.set(title=panel.title)
    if all(len(x) < 2 for x, _ in panel.curves.values()):
        axes.set_axis_off()
        middle = 0.5
        axes.text(middle, middle, describe_points(panel), ha="center", va="center")
        return

    positions = set()
    for name, (x, y) in panel.curves.items():
        if not x:
            continue
        marker = "o" if len(x) < 30 else None
        axes.plot(x, y, marker=marker, markersize=4, label=legend_label(name))
        positions.update(x)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    if panel.xlabel == "step":
        axes.locator_params(axis="x", integer=True)
    else:
        axes.set_xticks(sorted(positions))  # every layer has a tick
    low, high = axes.get_ylim()
    top = 1.0 if panel.ylabel == "cosine similarity" else max(0.0, high)
    axes.set_ylim(min(0.0, low), 1.05 * top)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_panels(panels: list[Panel]) -> Image.Image:
    """An even number of panels, two in a row."""
    figure_class = load_matplotlib()
    figure = figure_class(figsize=(11, 2.1 * len(panels)), dpi=150, layout="constrained")
    grid_of_axes = figure.subplots(len(panels) // 2, 2)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks, and of narrow axes
        for axes, panel in zip(grid_of_axes.flat, panels, strict=True):
            draw_panel(axes, panel)
        figure.savefig(file, format="png")
    return Image.open(file)


# ---------------------------------------------------------------- statistics of the managers
@contextlib.contextmanager
def watching(modules: dict[Any, nn.Module], read: Callable[..., None]) -> Iterator[None]:
    """Inside, read(key, module, args, kwargs, output) is called after each forward pass of
    modules[key].
    """
    hooks = []
    for key, module in modules.items():
        hook = functools.partial(read, key)
        hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class Parts(NamedTuple):
    """What a manager makes of a batch."""

    weights: Tensor  # (B, N, L), means over the channels
    unimodal: Tensor  # (B, L, D), the sum over the experts
    cross_modal: Tensor  # (B, L, D), W_C * LN(C)


class ManagerWatcher:
    """Sums over the tokens of all batches, from what the managers of a ManagerTower do."""

    def __init__(self, model: ManagerTower):
        self.modules: dict[Any, nn.Module] = {}
        for modality, managers in (("text", model.text_managers), ("image", model.image_managers)):
            for i, manager in enumerate(managers):
                self.modules[modality, i] = manager
        self.parts: dict[Any, Parts] = {}  # of the last batch
        self.sums: dict[tuple, Any] = defaultdict(float)  # (modality, what, layer) -> sum
        self.tokens: Counter[str] = Counter()

    def read(self, key: Any, manager: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        """Take a manager's output apart: the hook of `watching`."""
        weights = manager.weights(*args, **kwargs)  # (B, N, L, D or 1)
        unimodal = manager.aggregate_experts(weights.unbind(1), args[0]).float()
        self.parts[key] = Parts(weights.float().mean(-1), unimodal, output.float() - unimodal)

    def add_batch(self, attention_mask: Tensor) -> None:
        """Add the parts of the last batch to the sums; padding does not count."""
        for (modality, i), parts in self.parts.items():
            # 1 for the tokens that count, (B, L)
            is_text = modality == "text"
            real = attention_mask if is_text else torch.ones_like(parts.weights[:, 0])
            weights = (parts.weights * real[:, None]).sum((0, 2))  # (N,)
            self.sums[modality, "weights", i] += weights.cpu()
            if i == 0:
                self.tokens[modality] += int(real.sum())
                continue
            before = self.parts[modality, i - 1]
            unimodal = F.cosine_similarity(parts.unimodal, before.unimodal, dim=-1)  # (B, L)
            self.sums[modality, "unimodal", i] += (unimodal * real).sum().cpu()
            cross_modal = F.cosine_similarity(parts.cross_modal, before.cross_modal, dim=-1)
            self.sums[modality, "cross_modal", i] += (cross_modal * real).sum().cpu()

    def means(self, modality: str, what: str, first_layer: int, num_layers: int) -> list:
        """Means over the tokens, for each layer from the first one on."""
        result = []
        for i in range(first_layer, num_layers):
            mean = self.sums[modality, what, i] / self.tokens[modality]
            result.append(mean.tolist())
        return result


def manager_statistics(
    model: ManagerTower, dataset: Any, batch_size: int = 32, num_workers: int = 0
) -> dict[str, dict]:
    """For "text" and "image", means over all tokens of the dataset that are not padding.

    "weights", a list for each cross-modal layer: the mean weight of each of the "experts" (encoder
    layers, counted from 1). "cosine_unimodal", "cosine_cross_modal": cosine similarity of the parts
    of consecutive managers' outputs, the sum over the experts and W_C * LN(C). The first manager
    has no second part, so the latter list is one shorter. Raises ValueError for a model without
    managers.
    """
    config = model.config
    if config.fusion != "manager":
        raise ValueError(f"a model with fusion {config.fusion!r} has no managers")
    watcher = ManagerWatcher(model)
    with evaluating(model) as device, watching(watcher.modules, watcher.read):
        for _, batch in batches(dataset, batch_size, num_workers):
            mask = batch["attention_mask"].to(device)
            model(batch["pixels"].to(device), batch["input_ids"].to(device), mask)
            watcher.add_batch(mask)

    statistics = {}
    for modality, last in (("text", config.text_layers), ("image", config.vision_layers)):
        first = last - config.num_experts(modality) + 1
        means = functools.partial(watcher.means, modality, num_layers=config.num_layers)
        statistics[modality] = {
            "experts": list(range(first, last + 1)),
            "weights": means("weights", 0),
            "cosine_unimodal": means("unimodal", 1),
            "cosine_cross_modal": means("cross_modal", 2),
        }
    return statistics


def adaptive_managers(model: LlavaManager) -> dict[Any, nn.Module]:
    """{number: manager} of the managers whose weights depend on the picture."""
    adaptive: dict[Any, nn.Module] = {}
    for k, manager in enumerate(model.managers):
        if isinstance(manager, AdaptiveVisualManager):
            adaptive[k] = manager
    return adaptive


def visual_manager_statistics(model: LlavaManager, prompts: list[tuple]) -> dict[str, list]:
    """Of the MLLM's managers before the LLM "layers": mean "weights" and mean "magnitudes"
    (|weight|) of each of the "experts".

    Means over the channels; for adaptive managers also over the image tokens of prompts, a list of
    (input_ids, images). Raises ValueError for a model without managers, or for adaptive ones
    without prompts.
    """
    managers: Any = model.managers
    if not len(managers):
        raise ValueError("this model has no managers")
    adaptive = adaptive_managers(model)
    if adaptive and not prompts:
        raise ValueError("adaptive managers need pictures: give --image")
    parts = defaultdict(list)  # manager -> of each prompt (2, N): weights and magnitudes

    def add(k: Any, of_batch: Tensor) -> None:  # (B, N, L, D)
        means = [of_batch.mean((0, 2, 3)), of_batch.abs().mean((0, 2, 3))]
        parts[k].append(torch.stack(means).float().cpu())

    def read(k: Any, manager: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        add(k, manager.weights(*args[1:], **kwargs))  # the first argument are the experts

    with evaluating(model), watching(adaptive, read):
        for k, manager in enumerate(managers):
            if k not in adaptive:
                add(k, manager.weights())
        if adaptive:
            for input_ids, images in prompts:
                model(torch.tensor([input_ids]), images=images, logits=False)

    weights = []
    magnitudes = []
    for k in range(len(managers)):
        mean = torch.stack(parts[k]).mean(0)  # (2, N)
        weights.append(mean[0].tolist())
        magnitudes.append(mean[1].tolist())
    return {
        "experts": list(model.config.managed_layers),
        "layers": list(model.config.inject_layers),
        "weights": weights,
        "magnitudes": magnitudes,
    }


# ---------------------------------------------------------------- managers
@dataclass
class ManagersOptions:
    """Draw the weights of all managers.

    Of ManagerTower also how alike consecutive managers are, on the data of a task. Of
    LLaVA-OV-Manager the weights of its visual managers: adaptive ones need pictures.
    """

    checkpoint: str = option(help="folder of a ManagerTower, or of a LLaVA-OV-Manager")
    data: str = option(
        "", "demo = the held-out built-in scenes, instead of data_root", choices=("", "demo")
    )
    data_root: str = option("", "folder of manifests or .arrow files")
    task: str = option("", "whose data to take; none = one that the model can do")
    split: str = option("", "which split; none = the task's first one")
    image: list[str] = option((), "a picture for the MLLM", path=True)
    limit: int = option(512, "most rows of the data", least=1)
    batch_size: int = option(32, "rows of a batch", least=1)
    num_workers: int = option(0, "processes that load data", least=0, most=MOST_WORKERS)
    out: str = option(
        "", "file of the figure; none = managers.png in the folder of the model", path=True
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.task:
            find_task(self.task)


def measure_tower(options: ManagersOptions) -> dict[str, dict]:
    """The statistics of a ManagerTower on the data of a task."""
    if options.image:
        raise ValueError("--image is for a LLaVA-OV-Manager; a ManagerTower needs --data demo")
    check_data_flags(options.data, options.data_root)
    loaded = load_two_tower(options.checkpoint, "", options.device)
    name = options.task or task_of_heads(loaded.model.config.heads)
    task = find_task(name)
    split = options.split or task.splits[0]
    dataset = open_task(loaded, options.checkpoint, name, split, options.data, options.data_root)
    first_rows = Subset(dataset, range(min(options.limit, len(dataset))))
    return manager_statistics(loaded.model, first_rows, options.batch_size, options.num_workers)


def measure_mllm(options: ManagersOptions) -> dict[str, list]:
    """The statistics of a LLaVA-OV-Manager, each picture in a prompt of its own."""
    model, tokenizer, _ = load_mllm(options.checkpoint, "", options.device)
    prompts = []
    for file in options.image:
        prompts.append(encode_turns(model, tokenizer, ["Describe the picture."], [file]))
    return visual_manager_statistics(model, prompts)


def tower_panels(statistics: dict[str, dict]) -> list[Panel]:
    """What is drawn of a ManagerTower: weights and similarities."""
    panels = []
    for modality, numbers in statistics.items():
        curves = {}
        for layer, weights in enumerate(numbers["weights"], 1):
            curves[f"cross-modal layer {layer}"] = (numbers["experts"], weights)
        title = f"{modality} managers: mean weight of each expert"
        panels.append(Panel(title, f"{modality} expert (encoder layer)", "weight", curves))

    parts = (("unimodal", "cosine_unimodal", 1), ("cross-modal", "cosine_cross_modal", 2))
    for part, key, first in parts:
        curves = {}
        for modality, numbers in statistics.items():
            similarities = numbers[key]
            if similarities:
                layers = list(range(first, first + len(similarities)))
                curves[modality] = (layers, similarities)
        # the first manager has no cross-modal part
        missing = f"fewer than two managers have {part} parts:\nnothing to compare"
        title = f"managers i and i + 1: {part} parts"
        panels.append(Panel(title, "i", "cosine similarity", curves, missing))
    return panels


def mllm_panels(statistics: dict[str, list]) -> list[Panel]:
    """What is drawn of a LLaVA-OV-Manager: its weights."""
    panels = []
    for what, key in (("mean weight", "weights"), ("mean |weight|", "magnitudes")):
        curves = {}
        for layer, values in zip(statistics["layers"], statistics[key], strict=True):
            experts = statistics["experts"][: len(values)]
            curves[f"LLM layer {layer}"] = (experts, values)
        title = f"visual managers: {what} of each expert"
        panels.append(Panel(title, "SigLIP hidden state", what, curves))
    return panels


def check_is_no_input(out: str | Path, files: Sequence[str]) -> None:
    """Raises ValueError if a figure would take the place of one of the pictures it is made of."""
    for file in files:
        both_exist = os.path.exists(out) and os.path.exists(file)
        if both_exist and os.path.samefile(out, file):
            raise ValueError(f"--out {name_of(out)} is the picture itself; it would be lost")


def check_pair(picture: Path) -> None:
    """Raises ValueError if the figure, or the JSON beside it, would take the place of another file.

    A JSON file without its figure is not ours: `--out CHECKPOINT/config.png`.
    """
    numbers = picture.with_suffix(".json")
    if numbers.exists() and not picture.exists():
        raise ValueError(
            f"--out {name_of(picture)}: the numbers beside it would overwrite {name_of(numbers)}; "
            "choose another name"
        )


def managers(options: ManagersOptions) -> dict[str, Any]:
    """Draw the figure; the numbers in it are returned, and written beside it as JSON."""
    out = Path(options.out or default_output(options.checkpoint, "managers.png"))
    check_picture_output("--out", out)
    check_pair(out)
    check_is_no_input(out, options.image)
    load_matplotlib()
    statistics: dict[str, Any]
    if is_mllm(options.checkpoint):
        statistics = measure_mllm(options)
        panels = mllm_panels(statistics)
    else:
        statistics = measure_tower(options)
        panels = tower_panels(statistics)
    save_picture(out, draw_panels(panels))
    save_json(out.with_suffix(".json"), statistics)
    return statistics


# ---------------------------------------------------------------- curves
@dataclass
class CurvesOptions:
    """Draw the training loss and the held-out metrics of runs."""

    run: list[str] = option(help="the --out_dir of a run", path=True)
    out: str = option("curves.png", "file of the figure", path=True)

    def __post_init__(self) -> None:
        check_fields(self)


def short_names(folders: list[str]) -> list[str]:
    """The last part of each folder's path, or as many of its last parts as tell it from the others.

    Raises ValueError for a folder that is given twice.
    """
    paths = [Path(os.path.realpath(folder)) for folder in folders]
    names = []
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"--run {folder} is given twice")
        length = 1
        while [other.parts[-length:] for other in paths].count(path.parts[-length:]) > 1:
            length += 1
        names.append(str(Path(*path.parts[-length:])))
    return names


MOST_DRAWN = 1e300  # of a number; matplotlib adds margins to it


def is_drawable(value: Any) -> bool:
    """Whether this is a finite number."""
    return type(value) in (int, float) and abs(value) < MOST_DRAWN


def check_row(place: str, row: dict) -> None:
    """Raises ValueError for a row of a log that cannot be drawn. place: its file and number. That
    it has a whole step has been tested when it was read.

    Held-out metrics may be of any type, as only numbers are drawn of them. A loss or a metric that
    is NaN or infinite is a gap in its curve.
    """
    if not is_drawable(row["step"]):
        raise ValueError(f"{place} has the step {show(row['step'])}; it must be a smaller number")
    if "loss" in row and type(row["loss"]) not in (int, float):
        raise ValueError(f"{place} has the loss {show(row['loss'])}; it must be a number")
    if not isinstance(row.get("eval", {}), dict):
        raise ValueError(f"{place} has the eval {show(row['eval'])}; it must be an object")


Curves = dict[str, tuple[list, list]]  # name -> (steps, values)


def add_point(curves: Curves, name: str, step: int, value: float) -> None:
    """A further point of a curve; one that is not finite is a gap."""
    steps, values = curves.setdefault(name, ([], []))
    steps.append(step)
    values.append(float(value) if is_drawable(value) else math.nan)


def read_run(folder: str, name: str, losses: Curves, metrics: Curves) -> None:
    """Add the curves of a run, called `name`. Raises ValueError for a folder without a log, for a
    log that is none, and for one without any finite number to draw.
    """
    log = Path(folder) / "log.jsonl"
    if not log.is_file():
        raise ValueError(f"--run {folder} has no log.jsonl; it must be the --out_dir of a run")
    can_be_drawn = False
    for number, row in enumerate(read_log(log), 1):
        check_row(f"{log}, row {number},", row)
        if "loss" in row:
            add_point(losses, name, row["step"], row["loss"])
            can_be_drawn |= is_drawable(row["loss"])
        for metric, value in row.get("eval", {}).items():
            # the score is one of the other metrics again
            if isinstance(value, float) and metric != "score":
                add_point(metrics, f"{name}: {metric}", row["step"], value)
                can_be_drawn |= is_drawable(value)
    if not can_be_drawn:
        raise ValueError(
            f"{log} has neither a loss nor an evaluation yet that is a finite number: nothing to "
            "draw"
        )


def with_numbers(found: Curves) -> Curves:
    """The curves that have a finite number; the others are named."""
    kept = {}
    for name, (steps, values) in found.items():
        if any(math.isfinite(value) for value in values):
            kept[name] = (steps, values)
        else:
            print(f"note: {name} has no finite number, so it is not drawn")
    return kept


MOST_CURVES = 50  # of a panel, with as many names in its legend


def first_curves(found: Curves, what: str) -> Curves:
    """The first ones, where there are more than a picture can show; then it is said."""
    if len(found) > MOST_CURVES:
        print(f"note: of {len(found)} curves of {what} the first {MOST_CURVES} are drawn")
    return dict(itertools.islice(found.items(), MOST_CURVES))


def curves(options: CurvesOptions) -> dict[str, dict]:
    """Draw the figure. Returns what was read: "losses", {run: (steps, losses)}, and "metrics",
    {"run: metric": (steps, values)}.
    """
    check_picture_output("--out", options.out)
    load_matplotlib()
    losses: Curves = {}
    metrics: Curves = {}
    for name, folder in zip(short_names(options.run), options.run, strict=True):
        read_run(folder, name, losses, metrics)
    losses = with_numbers(losses)
    metrics = with_numbers(metrics)
    drawn_losses = first_curves(losses, "losses")
    drawn_metrics = first_curves(metrics, "metrics")
    panels = [
        Panel("training", "step", "loss", drawn_losses, "no loss is logged yet"),
        Panel("held out", "step", "metric", drawn_metrics, "no evaluation is logged yet"),
    ]
    save_picture(options.out, draw_panels(panels))
    return {"losses": losses, "metrics": metrics}


# ---------------------------------------------------------------- grid
@dataclass
class GridOptions:
    """Draw what LLaVA-OV-Manager sees of a picture.

    The base tile, the grid of tiles with its padding in red, and the numbers of tokens.
    """

    image: str = option(help="the picture", path=True)
    checkpoint: str = option("", "folder of the model; none = the paper's architecture")
    out: str = option("grid.png", "file of the figure", path=True)

    def __post_init__(self) -> None:
        check_fields(self)


PADDING = np.array([110, 0, 0], dtype=np.uint8)  # a dark red over what is padding
BORDER = (255, 0, 0)  # between two tiles


def tile_pictures(tiles: ImageTiles) -> np.ndarray:
    """The tiles as they were before they were normalised: bytes (T, S, S, 3)."""
    pixels = (tiles.pixels * 0.5 + 0.5) * 255
    return pixels.round().byte().permute(0, 2, 3, 1).numpy()


def draw_grid(
    pictures: np.ndarray, size: tuple[int, int], config: LlavaManagerConfig
) -> np.ndarray:
    """The grid's tiles (T - 1, S, S, 3) as one picture (rows * S, columns * S, 3), with the padding
    in red.
    """
    (columns, rows), keep, _ = grid_geometry(size, config)
    side = config.image_size
    grid = pictures.reshape(rows, columns, side, side, 3)
    grid = grid.swapaxes(1, 2)  # (rows, S, columns, S, 3)
    grid = grid.reshape(rows * side, columns * side, 3)

    # which pixels lie in patches that the model drops
    is_padding = np.ones((rows * config.side, columns * config.side), dtype=bool)
    is_padding[keep] = False
    mask = np.asarray(Image.fromarray(is_padding).resize((columns * side, rows * side)))
    grid[mask] = grid[mask] // 2 + PADDING
    grid[side::side] = BORDER
    grid[:, side::side] = BORDER
    return grid


def grid_numbers(
    num_tiles: int, size: tuple[int, int], config: LlavaManagerConfig
) -> dict[str, tuple[int, ...]]:
    """What is written beside the picture, in the order of the reading."""
    numbers: dict[str, tuple[int, ...]] = {
        "picture": size,
        "tiles": (num_tiles,),
        "tokens of the base tile": (config.side**2,),
    }
    if num_tiles > 1:
        grid_tiles, keep, (height, width) = grid_geometry(size, config)
        kept_rows, kept_columns = keep
        kept_width = kept_columns.stop - kept_columns.start
        kept_height = kept_rows.stop - kept_rows.start
        numbers["grid of tiles"] = grid_tiles
        numbers["patches without padding"] = (kept_width, kept_height)
        numbers["tokens of the grid, with newlines"] = (width + 1, height)
    numbers["tokens"] = (count_image_tokens(num_tiles, size, config),)
    return numbers


def grid(options: GridOptions) -> dict[str, tuple[int, ...]]:
    """Draw the figure; returns the numbers beside it, sizes as (width, height)."""
    check_picture_output("--out", options.out)
    picture = load_image(options.image, upright=True)
    check_is_no_input(options.out, [options.image])
    config = LlavaManagerConfig()
    if options.checkpoint:
        config = load_llava(options.checkpoint).config
    tiles = preprocess_image(picture, config)
    pictures = tile_pictures(tiles)
    numbers = grid_numbers(len(pictures), tiles.size, config)
    lines = []
    for name, values in numbers.items():
        lines.append(f"{name}: {' x '.join(str(value) for value in values)}")
    text = "\n".join(lines)
    print(text)

    # base tile, grid and numbers from left to right
    panels = [pictures[0]]
    if len(pictures) > 1:
        panels.append(draw_grid(pictures[1:], tiles.size, config))
    margin = 8
    width = sum(panel.shape[1] + margin for panel in panels) + 228
    height = max(panels[-1].shape[0], 120) + 2 * margin
    sheet = Image.new("RGB", (width, height), "white")
    left = margin
    for panel in panels:
        sheet.paste(Image.fromarray(panel), (left, margin))
        left += panel.shape[1] + margin
    ImageDraw.Draw(sheet).multiline_text((sheet.width - 220, margin), text, fill="black")
    save_picture(options.out, sheet)
    return numbers


COMMANDS = {
    "managers": Command(ManagersOptions, managers),
    "grid": Command(GridOptions, grid),
    "curves": Command(CurvesOptions, curves),
}


def main(argv: list[str]) -> None:
    run_command(COMMANDS, argv, "Look inside a model or a run.")


if __name__ == "__main__":
    one_sentence(main)
