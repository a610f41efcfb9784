"""Pictures of what a model does inside: its managers, its attention, what its encoder knows, the
grid of tiles that the MLLM sees, and the curves of runs.

    python figures.py managers --checkpoint out/demo --data demo
    python figures.py managers --checkpoint A --checkpoint B --task T1 --task T2 --data_root D
    python figures.py attention --checkpoint LLAVA --checkpoint WITHOUT_MANAGERS --data demo
    python figures.py probe --checkpoint out/demo --vision DINOV2
    python figures.py grid --image a.jpg
    python figures.py curves --run out/a --run out/b

`managers` draws figures 4 and 7 of ACL 2023, and 21 to 23 of TCSVT 2025; of the MLLM the weights of
its visual managers. `attention` draws figures 18 to 20, 26, 31 and 32 of TCSVT 2025. `python
figures.py -h` lists the commands, `python figures.py managers -h` the flags of one. The numbers of
a figure lie beside it as JSON. All but `grid` need matplotlib.

analysis.py measures the numbers, drawing.py draws the panels; here is which model looks at what.

Shapes: T tiles, S side of a tile.
"""

import functools
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Subset

from analysis import (
    layer_statistics,
    manager_statistics,
    probe_statistics,
    visual_manager_statistics,
)
from ask import encode_turns
from chat import encode_prompt
from data import Source
from drawing import Curves, Panel, draw_panels, load_matplotlib
from eval import check_data_flags, check_picture_output, open_task
from fields import Command, check_fields, option, run_command, show
from files import read_log, save_json, save_picture
from hub import default_output
from images import load_image, name_of, tower_transform
from llava_manager import LlavaManagerConfig
from model import ManagerTower, ManagerTowerConfig, ViT
from multigrid import ImageTiles, count_image_tokens, grid_geometry, preprocess_image
from scenes import Scene, demo_source, paint, random_scene
from tasks import TASKS, find_task, open_sets, task_of_heads
from weights import (
    IMAGE_LAYOUTS,
    Loaded,
    encoder_fields,
    fit_image_size,
    is_mllm,
    layouts_of,
    load_encoder,
    load_llava,
    load_mllm,
    load_two_tower,
)
from world import MOST_WORKERS, World, one_sentence


# ---------------------------------------------------------------- the files of a figure
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


def check_figure(out: str | Path) -> None:
    """Raises ValueError for a figure that cannot be written, or would replace another file."""
    check_picture_output("--out", out)
    check_pair(Path(out))


def save_figure(out: str | Path, picture: Image.Image, numbers: Any) -> None:
    """The picture, and its numbers beside it as JSON."""
    save_picture(out, picture)
    save_json(Path(out).with_suffix(".json"), numbers)


# ---------------------------------------------------------------- which models, which data
MOST_COLUMNS = 12  # models and sets of data side by side


@dataclass
class InsideOptions:
    """Models, and what they look at."""

    checkpoint: list[str] = option(help="folder of a model, several are drawn side by side")
    data: str = option(
        "", "demo = the held-out built-in scenes, instead of data_root", choices=("", "demo")
    )
    data_root: list[str] = option((), "folder of manifests or .arrow files")
    task: list[str] = option((), "whose data to take; none = one that the model can do")
    split: str = option("", "which split; none = the task's first one")
    image: list[str] = option((), "a picture for the MLLM, instead of data", path=True)
    limit: int = option(512, "most rows of a set of data", least=1)
    out: str = option(
        "", "file of the figure; none = beside the first model, named as the command", path=True
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.task:
            find_task(name)
        check_is_once("--task", self.task)
        check_is_once("--data_root", self.data_root)
        if self.data or self.data_root:
            check_data_flags(self.data, ",".join(self.data_root))


def check_is_once(flag: str, values: Sequence[str]) -> None:
    """Raises ValueError for a value that a repeated flag has twice."""
    for value in values:
        if list(values).count(value) > 1:
            raise ValueError(f"{flag} {value} is given twice")


def short_names(folders: Sequence[str], flag: str = "--run") -> list[str]:
    """The last part of each folder's path, or as many of its last parts as tell it from the others.

    Raises ValueError for a folder that is given twice.
    """
    paths = [Path(os.path.realpath(folder)) for folder in folders]
    names = []
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"{flag} {folder} is given twice")
        length = 1
        while [other.parts[-length:] for other in paths].count(path.parts[-length:]) > 1:
            length += 1
        names.append(str(Path(*path.parts[-length:])))
    return names


def are_mllms(checkpoints: Sequence[str]) -> bool:
    """Whether all are LLaVA-OV-Managers; False: all are ManagerTowers. Raises ValueError for both
    kinds, whose figures show different things.
    """
    kinds = [is_mllm(checkpoint) for checkpoint in checkpoints]
    if any(kinds) and not all(kinds):
        mllm = checkpoints[kinds.index(True)]
        tower = checkpoints[kinds.index(False)]
        raise ValueError(
            f"--checkpoint {mllm} is a LLaVA-OV-Manager and --checkpoint {tower} a ManagerTower; "
            "give models of one kind"
        )
    return all(kinds)


def place_of(options: Any, command: str) -> Path:
    """Where a figure is written. Raises ValueError where that cannot be, or matplotlib is missing;
    it is tested before anything is measured.
    """
    folder = options.checkpoint[0] if options.checkpoint else "."
    out = Path(options.out or default_output(folder, f"{command}.png"))
    check_figure(out)
    check_is_no_input(out, getattr(options, "image", ()))
    load_matplotlib()
    return out


class Dataset(NamedTuple):
    """One set of data that the models look at."""

    task: str
    split: str
    data_root: str  # "" for the built-in scenes
    label: str  # what tells it from the others; "" for the only one


def choose_datasets(options: InsideOptions, default_task: str) -> list[Dataset]:
    """Each task in each folder. Raises ValueError where no data were named."""
    check_data_flags(options.data, ",".join(options.data_root))
    names = options.task or [default_task]
    folders = list(options.data_root) or [""]
    labels = short_names(folders, "--data_root") if options.data_root else [options.data]
    datasets = []
    for name in names:
        for folder, label in zip(folders, labels, strict=True):
            parts = []
            if len(names) > 1:
                parts.append(name)
            if len(folders) > 1:
                parts.append(label)
            split = options.split or find_task(name).splits[0]
            datasets.append(Dataset(name, split, folder, " ".join(parts)))
    return datasets


def question_task() -> str:
    """The first task of questions, which is what an MLLM is asked."""
    return next(name for name, task in TASKS.items() if task.kind == "questions")


def join_labels(model_name: str, label: str) -> str:
    return f"{model_name}, {label}" if label else model_name


def check_columns(count: int) -> None:
    if count > MOST_COLUMNS:
        raise ValueError(
            f"{count} models and sets of data are more than a picture can show; give at most "
            f"{MOST_COLUMNS}"
        )


Prompt = tuple[list[int], list[ImageTiles]]  # input ids and pictures


class Prompts:
    """The first rows of a source as prompts of the MLLM: its pictures, and its text as the user's
    turn.
    """

    def __init__(self, loaded: Loaded, source: Source, limit: int):
        self.loaded = loaded
        self.source = source
        self.count = min(limit, len(source))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Prompt]:
        for number in range(self.count):
            row = self.source[number]
            has_several = len(row["images"]) > 1
            tiles = []
            for picture in row["images"]:
                tiles.append(preprocess_image(picture, self.loaded.model.config, has_several))
            yield encode_prompt([row["text"]], self.loaded.tokenizer, len(tiles)), tiles


def open_prompts(options: InsideOptions, loaded: Loaded) -> dict[str, Any]:
    """Label -> the prompts of a set of data, or of the pictures of --image, one each."""
    if options.image:
        if options.data or options.data_root or options.task or options.split:
            raise ValueError(
                "--image takes the place of data: give it without --data, --data_root, --task and "
                "--split"
            )
        prompts = []
        for file in options.image:
            turns = ["Describe the picture."]
            prompts.append(encode_turns(loaded.model, loaded.tokenizer, turns, [file]))
        return {"": prompts}
    sets: dict[str, Any] = {}
    for dataset in choose_datasets(options, question_task()):
        kind = find_task(dataset.task).kind
        if dataset.data_root:
            source = open_sets(kind, dataset.data_root, (dataset.task,), dataset.split)
        else:  # large enough for a grid of tiles
            side = 2 * loaded.model.config.image_size
            source = demo_source(kind, "heldout", options.limit, image_size=side)
        sets[dataset.label] = Prompts(loaded, source, options.limit)
    return sets


# ---------------------------------------------------------------- managers
@dataclass
class ManagersOptions(InsideOptions):
    """Draw the weights of all managers.

    Of ManagerTower also how alike consecutive managers are: means over the tokens of the data of a
    task. Of LLaVA-OV-Manager the weights of its visual managers: adaptive ones need pictures or
    data.
    """

    batch_size: int = option(32, "rows of a batch", least=1)
    num_workers: int = option(0, "processes that load data", least=0, most=MOST_WORKERS)


Statistics = dict[str, Any]


def measure_towers(options: ManagersOptions) -> dict[str, Statistics]:
    """The statistics of each ManagerTower on each set of data."""
    if options.image:
        raise ValueError("--image is for a LLaVA-OV-Manager; a ManagerTower needs --data demo")
    check_data_flags(options.data, ",".join(options.data_root))
    statistics = {}
    names = short_names(options.checkpoint, "--checkpoint")
    for name, checkpoint in zip(names, options.checkpoint, strict=True):
        loaded = load_two_tower(checkpoint, "", options.device)
        if loaded.model.config.fusion != "manager":
            raise ValueError(
                f"{checkpoint} has no managers: its fusion is {loaded.model.config.fusion!r}"
            )
        for dataset in choose_datasets(options, task_of_heads(loaded.model.config.heads)):
            rows = open_task(
                loaded,
                checkpoint,
                dataset.task,
                dataset.split,
                options.data,
                dataset.data_root,
            )
            first_rows = Subset(rows, range(min(options.limit, len(rows))))
            statistics[join_labels(name, dataset.label)] = manager_statistics(
                loaded.model, first_rows, options.batch_size, options.num_workers
            )
    return statistics


def measure_visual_managers(options: ManagersOptions) -> dict[str, Statistics]:
    """The statistics of each LLaVA-OV-Manager; with data, on each set of them."""
    statistics = {}
    names = short_names(options.checkpoint, "--checkpoint")
    for name, checkpoint in zip(names, options.checkpoint, strict=True):
        loaded = load_mllm(checkpoint, "", options.device)
        if loaded.model.config.manager_type is None:
            raise ValueError(f"{checkpoint} has no managers")
        sets: dict[str, Any] = {"": []}
        if options.image or options.data or options.data_root or options.task:
            sets = open_prompts(options, loaded)
        for label, prompts in sets.items():
            numbers = visual_manager_statistics(loaded.model, prompts)
            statistics[join_labels(name, label)] = numbers
    return statistics


def weight_panel(title: str, modality: str, numbers: Statistics) -> Panel:
    """The mean weights of the managers of a modality."""
    curves = {}
    for layer, weights in enumerate(numbers["weights"], 1):
        curves[f"cross-modal layer {layer}"] = (numbers["experts"], weights)
    xlabel = f"{modality} expert (encoder layer)"
    return Panel(title, xlabel, "weight", curves, is_ordered=True)


def similarity_panel(title: str, statistics: Statistics, part: str, first: int) -> Panel:
    """How alike a part of consecutive managers is. first: the first manager that has such a
    part.
    """
    curves = {}
    for modality, numbers in statistics.items():
        similarities = numbers[f"cosine_{part}"]
        if similarities:
            layers = list(range(first, first + len(similarities)))
            curves[modality] = (layers, similarities)
    name = part.replace("_", "-")
    missing = f"fewer than two managers have {name} parts:\nnothing to compare"
    return Panel(title, "i", "cosine similarity", curves, missing, highest=1.0)


def tower_panels(statistics: Statistics, name: str = "") -> list[Panel]:
    """What is drawn of a ManagerTower: weights and similarities. name: which model, on what."""
    end = f"\n{name}" if name else ""
    panels = []
    for modality, numbers in statistics.items():
        title = f"{modality} managers: mean weight of each expert{end}"
        panels.append(weight_panel(title, modality, numbers))
    # the first manager has no cross-modal part
    for part, first in (("unimodal", 1), ("cross_modal", 2)):
        title = f"managers i and i + 1: {part.replace('_', '-')} parts{end}"
        panels.append(similarity_panel(title, statistics, part, first))
    return panels


def visual_panels(statistics: Statistics, name: str = "") -> list[Panel]:
    """What is drawn of a LLaVA-OV-Manager: its weights."""
    end = f"\n{name}" if name else ""
    panels = []
    for what, key in (("mean weight", "weights"), ("mean |weight|", "magnitudes")):
        curves = {}
        for layer, values in zip(statistics["layers"], statistics[key], strict=True):
            experts = statistics["experts"][: len(values)]
            curves[f"LLM layer {layer}"] = (experts, values)
        title = f"visual managers: {what} of each expert{end}"
        panels.append(Panel(title, "SigLIP hidden state", what, curves, is_ordered=True))
    return panels


def draw_columns(
    statistics: dict[str, Statistics], panels_of: Callable[[Statistics, str], list[Panel]]
) -> Image.Image:
    """The panels of the only model in rows of two; those of several in columns side by side."""
    if len(statistics) == 1:
        (only,) = statistics.values()
        return draw_panels(panels_of(only, ""))
    columns = [panels_of(numbers, name) for name, numbers in statistics.items()]
    panels: list[Panel] = []
    for row in zip(*columns, strict=True):
        panels.extend(row)
    return draw_panels(panels, len(columns), is_shared=True)


def managers(options: ManagersOptions) -> dict[str, Statistics]:
    """Draw the figure; the numbers in it are returned, and written beside it as JSON: those of each
    model on each set of data.
    """
    out = place_of(options, "managers")
    sets = max(len(options.task), 1) * max(len(options.data_root), 1)
    check_columns(len(options.checkpoint) * sets)
    panels_of: Callable[[Statistics, str], list[Panel]]
    if are_mllms(options.checkpoint):
        statistics = measure_visual_managers(options)
        panels_of = visual_panels
    else:
        statistics = measure_towers(options)
        panels_of = tower_panels
    save_figure(out, draw_columns(statistics, panels_of), statistics)
    return statistics


# ---------------------------------------------------------------- attention
@dataclass
class AttentionOptions(InsideOptions):
    """Draw what the layers of LLaVA-OV-Managers do: with and without managers, or a grid.

    How alike consecutive LLM layers are, entropy of their attention to the picture, how differently
    their heads attend, and how far SigLIP's heads look.
    """


PART_NAMES = {  # queries of the LLM's attention whose keys are the image tokens
    "visual": "visual self-attention",
    "text_to_visual": "text-to-visual attention",
}


def layer_panel(
    title: str, ylabel: str, statistics: dict[str, Statistics], what: str, part: str
) -> Panel:
    """A number of each LLM layer, a curve for each model. The largest entropy is drawn too."""
    curves = {}
    references = {}
    for name, numbers in statistics.items():
        layers = list(range(len(numbers[what][part])))
        curves[name] = (layers, numbers[what][part])
        references[name] = (layers, numbers["uniform"][part])
    panel = Panel(title, "LLM layer, from 0", ylabel, curves)
    if what == "entropy":
        label = "if all keys had the same weight"
        return panel._replace(references=references, reference_label=label)
    return panel


def distance_panels(statistics: dict[str, Statistics]) -> list[Panel]:
    """How far SigLIP looks: means over the heads, and each head."""
    means: Curves = {}
    heads: Curves = {}
    for name, numbers in statistics.items():
        blocks = list(range(1, len(numbers["distance"]) + 1))
        means[name] = (blocks, [sum(values) / len(values) for values in numbers["distance"]])
        x: list[int] = []
        y: list[float] = []
        for block, values in zip(blocks, numbers["distance"], strict=True):
            x += [block] * len(values)
            y += values
        heads[name] = (x, y)
    xlabel = "SigLIP block"
    ylabel = "mean attention distance (pixels of a tile)"
    return [
        Panel("SigLIP: how far a patch looks, mean over the heads", xlabel, ylabel, means),
        Panel("SigLIP: how far a patch looks, each head", xlabel, ylabel, heads, is_cloud=True),
    ]


def attention_panels(statistics: dict[str, Statistics]) -> list[Panel]:
    """Pairs of panels: of the visual part, and of the text's."""
    panels = []
    for part in ("visual", "text"):
        curves = {}
        for name, numbers in statistics.items():
            values = numbers["cosine"][part]
            curves[name] = (list(range(len(values))), values)
        title = f"outputs of consecutive LLM layers: {part} tokens"
        xlabel = "LLM layer i, from 0: its output and that of i - 1"
        ylabel = "cosine similarity"
        panels.append(Panel(title, xlabel, ylabel, curves, from_zero=False, highest=1.0))
    for what, words, unit in (
        ("entropy", "entropy", "entropy over the image tokens\nthat a query sees (nats)"),
        ("head_divergence", "difference of the heads", "mean KL between two heads (nats)"),
    ):
        for part, part_name in PART_NAMES.items():
            panels.append(layer_panel(f"{part_name}: {words}", unit, statistics, what, part))
    return panels + distance_panels(statistics)


def attention(options: AttentionOptions) -> dict[str, Statistics]:
    """Draw the figure; the numbers in it are returned, and written beside it as JSON: those of each
    model on each set of data.
    """
    out = place_of(options, "attention")
    if not (options.image or options.data or options.data_root):
        raise ValueError("say what to look at: --image FILE, --data demo or --data_root FOLDER")
    if not are_mllms(options.checkpoint):
        raise ValueError(
            f"--checkpoint {options.checkpoint[0]} is a ManagerTower; attention is for "
            "LLaVA-OV-Managers, with managers or without"
        )
    statistics = {}
    names = short_names(options.checkpoint, "--checkpoint")
    for name, checkpoint in zip(names, options.checkpoint, strict=True):
        loaded = load_mllm(checkpoint, "", options.device)
        for label, prompts in open_prompts(options, loaded).items():
            statistics[join_labels(name, label)] = layer_statistics(loaded.model, prompts)
    save_figure(out, draw_panels(attention_panels(statistics)), statistics)
    return statistics


# ---------------------------------------------------------------- probe
@dataclass
class ProbeOptions:
    """Draw what each layer of an image encoder still knows of a scene.

    A ridge regression reads colour, shape and size of the first thing, and the axis of the relation
    of the two, off all tokens of a layer, and off the class token alone (without one, off the mean
    of the patches). It learns from built-in scenes and is tested on held-out ones.
    """

    checkpoint: list[str] = option((), "folder of a model of any kind, several are rows")
    vision: list[str] = option(
        (), "folder or file of a published image encoder, as train.py takes it", path=True
    )
    image_size: int = option(
        0, "of --vision, pixels a side; 0 = 64, or the nearest size that patches cover", least=0
    )
    scenes: int = option(1000, "scenes to learn from; half as many are the test", least=20)
    batch_size: int = option(32, "scenes of a batch", least=1)
    out: str = option(
        "",
        "file of the figure; none = probe.png beside the first model, or here with --vision alone",
        path=True,
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.checkpoint and not self.vision:
            raise ValueError("say what to probe: --checkpoint FOLDER, or --vision FOLDER")
        if self.image_size and not self.vision:
            raise ValueError("--image_size is for --vision: a checkpoint has a size of its own")


class ProbeScene(NamedTuple):
    """A scene of which all is known, and the random numbers that its picture is drawn with."""

    scene: Scene
    draw: random.Random


def probe_scenes(num_train: int) -> list[ProbeScene]:
    """The scenes to learn from, and behind them half as many held-out ones; none is in both."""
    scenes = []
    for split, count in (("train", num_train), ("heldout", num_train // 2)):
        for number in range(count):
            draw = random.Random(f"probe {split} {number}")
            scenes.append(ProbeScene(random_scene(draw, split == "heldout"), draw))
    return scenes


def scene_values(scenes: list[ProbeScene]) -> dict[str, list[str]]:
    """Property -> its value in each scene. Colour, shape and size are those of the first thing."""
    return {
        "color": [scene.first.color for scene, _ in scenes],
        "shape": [scene.first.shape for scene, _ in scenes],
        "size": [scene.first.size for scene, _ in scenes],
        "axis of relation": [scene.relation for scene, _ in scenes],
    }


Transform = Callable[[Image.Image], Tensor]  # a picture -> the pixels (3, S, S) that a model reads


def probe_encoder(
    encoder: ViT, transform: Transform, num_train: int, batch_size: int
) -> Statistics:
    """Probe any encoder of pictures on num_train scenes and half as many held-out ones."""
    scenes = probe_scenes(num_train)

    def read_batches() -> Iterator[Tensor]:
        for start in range(0, len(scenes), batch_size):
            pixels = []
            for scene, draw in scenes[start : start + batch_size]:
                pixels.append(transform(paint(draw, scene, encoder.image_size)))
            yield torch.stack(pixels)

    return probe_statistics(encoder, read_batches(), scene_values(scenes), num_train)


class Encoder(NamedTuple):
    """The image encoder of a checkpoint, or a published one."""

    encoder: ViT
    transform: Transform
    managed: list[int]  # its hidden states that what is behind it reads; none for an encoder alone


def open_encoder(checkpoint: str, device: str) -> Encoder:
    """The image encoder of a checkpoint of either kind."""
    if is_mllm(checkpoint):
        model = load_mllm(checkpoint, "", device).model
        config = model.config
        managed = {config.vision_layers - 1}  # what is projected to the LLM's tokens
        if config.manager_type is not None:
            managed.update(config.managed_layers)
        transform = functools.partial(base_tile, config)
        return Encoder(model.vision, transform, sorted(managed))
    loaded = load_two_tower(checkpoint, "", device)
    config = loaded.model.config
    first = config.vision_layers + 1 - config.num_experts("image")
    managed_layers = list(range(first, config.vision_layers + 1))
    transform = functools.partial(transform_picture, loaded.transform)
    return Encoder(loaded.model.image_encoder, transform, managed_layers)


SMALL_PICTURES = 64  # pixels on each side of a scene


def open_published(path: str, image_size: int, device: str) -> Encoder:
    """A published image encoder, in a small tower that is not used. image_size 0: the multiple of
    its patches that is nearest to SMALL_PICTURES.
    """
    fields = encoder_fields(path, "image")
    if "vision_heads" not in fields:
        raise ValueError(f"{path}: the number of heads is unknown; a config.json must say it")
    fields["image_size"] = image_size or fit_image_size(SMALL_PICTURES, fields["patch_size"])
    config = ManagerTowerConfig.tiny(fusion="last", num_layers=1, **fields)
    encoder = ManagerTower(config).image_encoder
    layouts = layouts_of(IMAGE_LAYOUTS, "vision_kind", config.vision_kind)
    load_encoder(encoder, path, layouts, len(encoder.blocks), config, "image")
    transform = tower_transform("albef", config, train=False)
    device_of_run = World(device).device
    return Encoder(encoder.to(device_of_run), functools.partial(transform_picture, transform), [])


def base_tile(config: LlavaManagerConfig, picture: Image.Image) -> Tensor:
    return preprocess_image(picture, config).pixels[0]


def transform_picture(transform: Any, picture: Image.Image) -> Tensor:
    return transform(picture, None)


def probe_panels(name: str, statistics: Statistics) -> list[Panel]:
    """A panel for all tokens, and one for the class token or the mean of the patches."""
    panels = []
    for features, accuracies in statistics["accuracy"].items():
        curves = {}
        references = {}
        for property_name, values in accuracies.items():
            layers = list(range(len(values)))
            curves[property_name] = (layers, values)
            chance = statistics["chance"][property_name]
            references[property_name] = ([0, layers[-1]], [chance, chance])
        managed = statistics["managed"]
        panel = Panel(
            f"{name}: ridge probe on {features}",
            "hidden state (0: before the first block)",
            "accuracy on held-out scenes",
            curves,
            highest=1.0,
            references=references,
            reference_label="chance",
            span=(managed[0] - 0.5, managed[-1] + 0.5) if managed else None,
            span_label="what the model reads",
            has_legend_beside=True,
        )
        panels.append(panel)
    return panels


def probe(options: ProbeOptions) -> dict[str, Statistics]:
    """Draw the figure; the numbers in it are returned, and written beside it as JSON: those of each
    model.
    """
    out = place_of(options, "probe")
    check_columns(len(options.checkpoint) + len(options.vision))
    folders = [*options.checkpoint, *options.vision]
    statistics = {}
    panels = []
    for name, folder in zip(short_names(folders, "the model"), folders, strict=True):
        if folder in options.vision:
            opened = open_published(folder, options.image_size, options.device)
        else:
            opened = open_encoder(folder, options.device)
        numbers = probe_encoder(
            opened.encoder, opened.transform, options.scenes, options.batch_size
        )
        statistics[name] = {**numbers, "managed": opened.managed}
        panels += probe_panels(name, statistics[name])
    save_figure(out, draw_panels(panels), statistics)
    return statistics


# ---------------------------------------------------------------- curves
@dataclass
class CurvesOptions:
    """Draw the training loss and the held-out metrics of runs."""

    run: list[str] = option(help="the --out_dir of a run", path=True)
    out: str = option("curves.png", "file of the figure", path=True)

    def __post_init__(self) -> None:
        check_fields(self)


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


def for_json(found: dict[str, Curves]) -> dict[str, dict]:
    """The same for JSON, which has no NaN, so that a gap is null; and UTF-8 names only."""
    result: dict[str, dict] = {}
    for what, named_curves in found.items():
        result[what] = {}
        for name, (steps, values) in named_curves.items():
            finite = [value if math.isfinite(value) else None for value in values]
            spelled = name.encode("utf-8", errors="backslashreplace").decode()
            result[what][spelled] = (steps, finite)
    return result


def curves(options: CurvesOptions) -> dict[str, dict]:
    """Draw the figure. Returns what was read: "losses", {run: (steps, losses)}, and "metrics",
    {"run: metric": (steps, values)}.
    """
    check_figure(options.out)
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
    found = {"losses": losses, "metrics": metrics}
    save_figure(options.out, draw_panels(panels), for_json(found))
    return found


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
    check_figure(options.out)
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
    save_figure(options.out, sheet, numbers)
    return numbers


COMMANDS = {
    "managers": Command(ManagersOptions, managers),
    "attention": Command(AttentionOptions, attention),
    "probe": Command(ProbeOptions, probe),
    "grid": Command(GridOptions, grid),
    "curves": Command(CurvesOptions, curves),
}


def main(argv: list[str]) -> None:
    run_command(COMMANDS, argv, "Look inside a model or a run.")


if __name__ == "__main__":
    one_sentence(main)
