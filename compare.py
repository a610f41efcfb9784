r"""The papers' comparison on one's own machine: METER's `last`, BridgeTower's `bridge`, managers.

    # two small towers, pre-trained apart, on the built-in scenes; no download
    python compare.py
    # the same with real encoders
    python compare.py --vision dinov2-small --text granite-30m --out_dir out/compare_real
    # the MLLM with and without managers and grid, which is in compare_llava.py
    python compare.py llava

ManagerTower (ACL 2023), tables 1 and 2; TCSVT 2025, tables I and II. The papers' claim is an order:
last < bridge < managers. Here it is looked at where minutes are enough: the encoders are
pre-trained and frozen, the states of their layers are kept on disk, and only the cross-modal part
is trained. All variants have the same rows in the same order, the same steps and batch, and the
same weights to begin with wherever they share a part; they differ in what a cross-modal layer reads
of the encoders, and in nothing else. The order that comes out is the one that is printed.

The steps of `compare` tell the story. FrozenTower is the trick: what loop, objectives and
evaluation take for pixels and ids are the numbers of kept states.

Shapes: B batch, N experts, L tokens, D width, P pictures, T texts, S pixels a side.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import small_towers
from comparison import (
    ALL,
    Job,
    Outcome,
    as_record,
    count_processes,
    describe_facts,
    describe_order,
    describe_result,
    describe_scores,
    describe_test,
    describe_weights,
    keep_array,
    make_outcome,
    measure_costs,
    refuse_torchrun,
    run_jobs,
    save_drawing,
)
from data import PairDataset, Part, Source, batches
from eval import evaluate
from fields import FieldError, check_fields, option, parse_flags
from files import (
    read_json,
    read_log,
    save_json,
    why_no_folder,
    write_json,
)
from hub import find_folder
from images import tower_transform
from loop import Checkpoint, Task, TowerRunConfig, fit, param_groups
from model import ManagerTower, ManagerTowerConfig
from objectives import Classification, Retrieval
from scenes import DEMO_ANSWERS, Demo, demo_tokenizer
from tasks import TASKS, baselines, find_task, load_answers, open_sets
from tokenizer import Tokenizer, load_tokenizer
from weights import config_of_encoders, fit_image_size, load_unimodal
from world import World, evaluating, one_sentence, seed_all, to_device

# ---------------------------------------------------------------- what is compared
# name -> fields of ManagerTowerConfig
VARIANTS: dict[str, dict[str, str]] = {
    "last": {"fusion": "last"},
    "bridge": {"fusion": "bridge"},
    "sae": {"manager_type": "sae"},
    "saue": {"manager_type": "saue"},
    "aaue": {"manager_type": "aaue"},
    "aaue_own": {"manager_type": "aaue", "manager_query": "own"},
    "sae_scalar": {"manager_type": "sae", "manager_weight": "scalar"},
    "saue_scalar": {"manager_type": "saue", "manager_weight": "scalar"},
}
USUAL = ("last", "bridge", "sae", "saue", "aaue")
BASELINES = ("last", "bridge")
CLIP_ART = tuple(name for name, task in TASKS.items() if not task.recipe)  # of prepare.py


class Sizes(NamedTuple):
    """How much is trained and measured where no flag says it."""

    pairs: int
    validation: int
    test: int
    steps: int


SMALL = Sizes(pairs=5000, validation=300, test=700, steps=1500)  # the small towers of this project
REAL = Sizes(pairs=1200, validation=200, test=300, steps=600)  # encoders from folders
FEW_SEEDS = 3
MANY_SEEDS = 5
RATE = 1e-3
RATES = (1e-3, 2e-3)  # of the search
IMAGE_STEPS = 1500  # of the small towers
TEXT_STEPS = 800
TOWER_PICTURES = 10_000  # that they learn from
TOWER_TEXTS = 9000  # of each kind
LONGEST_TEXT = 50  # tokens, as in the papers
SMALL_PICTURES = 64  # pixels a side


@dataclass
class CompareConfig:
    """Compare what stands between encoders and cross-modal layers; prints tables, draws a picture.

    0 and none stand for what is usual: 3 seeds, 5 with --full; the learning rate 0.001, with --full
    also 0.002, whichever is better on validation rows; 5000 pictures and 1500 steps, with --vision
    and --text 1200 pictures and 600 steps.
    """

    out_dir: str = option("out/compare", "folder of the runs, of result.json and result.png")
    # the encoders
    vision: str = option(
        "", "image encoder: a folder or hub name; none = a small one, pre-trained here"
    )
    text: str = option(
        "", "text encoder: a folder or hub name; none = a small one, pre-trained here"
    )
    image_size: int = option(
        0, "pixels a side; 0 = 64, or the next size that patches cover", least=0, most=4096
    )
    # what is learnt
    task: str = option(next(iter(TASKS)), "what is learnt and measured", choices=tuple(TASKS))
    data: str = option(
        "demo",
        "the built-in scenes, or the clip art that prepare.py has made of Debian's packages",
        choices=("demo", *CLIP_ART),
    )
    data_root: str = option(
        "", "folder of manifests or .arrow files; none = the built-in scenes, or out/clipart_data"
    )
    # what is compared
    variants: tuple[str, ...] = option(
        (), "which ones; none = last, bridge, sae, saue, aaue", choices=tuple(VARIANTS)
    )
    seeds: int = option(0, "runs of each variant, with the seeds 0, 1, ...", least=0, most=20)
    rates: tuple[float, ...] = option(
        (), "learning rates to choose from, on validation rows", above=0
    )
    full: bool = option(False, "5 seeds, the search for the rate, and all variants")
    # how much
    pairs: int = option(0, "pictures to learn from", least=0)
    steps: int = option(0, "optimizer updates of each run", least=0)
    batch_size: int = option(32, "rows of an update", least=1, most=2**16)
    # the cross-modal part
    hidden_size: int = option(64, "channels of the cross-modal layers", least=1, most=4096)
    num_heads: int = option(4, "their attention heads", least=1)
    num_layers: int = option(3, "how many there are of each modality", least=1, most=100)
    experts: int = option(6, "layers of each encoder that are managed: the papers' N", least=1)
    noise: bool = option(False, "noise on the managers' scores in training, as in the papers")
    tune: float = option(
        0.0,
        "train the encoders too, with this part of the learning rate (the papers: 0.2); 0 = frozen",
        least=0,
        most=1,
    )
    # running
    processes: int = option(
        0, "runs at the same time; 0 = one a core, one on CUDA", least=0, most=256
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_fields(self)
        if bool(self.vision) != bool(self.text):
            raise ValueError("--vision and --text go together: real encoders for both, or neither")
        reason = why_no_folder(self.out_dir)
        if reason:
            raise FieldError(f"out_dir {self.out_dir} cannot be written into: {reason}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"--hidden_size {self.hidden_size} is not a multiple of --num_heads "
                f"{self.num_heads}"
            )

    def task_name(self) -> str:
        """The row of tasks.py: clip art is a task of its own."""
        return self.data if self.data in CLIP_ART else self.task

    def root(self) -> str:
        """Where the data are; empty for the built-in scenes."""
        if self.data in CLIP_ART and not self.data_root:
            return "out/clipart_data"
        return self.data_root

    def usual(self) -> Sizes:
        return REAL if self.vision else SMALL

    def num_seeds(self) -> int:
        usual = MANY_SEEDS if self.full else FEW_SEEDS
        return self.seeds or usual

    def learning_rates(self) -> tuple[float, ...]:
        usual = RATES if self.full else (RATE,)
        return self.rates or usual

    def variant_names(self) -> tuple[str, ...]:
        usual = tuple(VARIANTS) if self.full else USUAL
        return self.variants or usual

    def num_steps(self) -> int:
        return self.steps or self.usual().steps

    def num_kept(self) -> int:
        """How many layers of each encoder some variant reads."""
        return max(self.experts, self.num_layers)


# ---------------------------------------------------------------- what is kept
class KeptPart(Part):
    """Records of a split whose pictures are numbers of kept states."""

    def __init__(self, split: str, records: list[tuple[list[int], list[dict]]]):
        self.path = f"kept {split}"
        self.places = range(len(records))
        self.records = records

    def parse(self, kind: str, index: int) -> Any:
        """(numbers of the pictures, text rows)."""
        numbers, rows = self.records[index]
        return numbers, [dict(row) for row in rows]

    def picture_key(self, kind: str, index: int) -> Any:
        return self.records[index][0][0]


class KeptSource(Source):
    """A source that gives the numbers of pictures in place of pictures."""

    def load(self, index: int) -> Any:
        part, number = self.find(index)
        return part.parse(self.kind, number)


class KeptTexts:
    """A tokenizer of kept texts. With frozen encoders each id of a text is the text's number."""

    def __init__(self, texts: list[str], ids: Tensor, masks: Tensor, are_frozen: bool):
        self.numbers = {text: number for number, text in enumerate(texts)}
        self.ids = ids  # (T, L)
        self.masks = masks  # (T, L)
        self.are_frozen = are_frozen

    def __call__(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """(ids, attention_mask), both (number of texts, L)."""
        numbers = torch.tensor([self.numbers[text] for text in texts])
        masks = self.masks[numbers].long()
        if self.are_frozen:
            return numbers[:, None].expand_as(masks), masks
        return self.ids[numbers].long(), masks


class FrozenTower(ManagerTower):
    """A ManagerTower whose encoders have run already: it looks their states up.

    "pixels" are the numbers (B,) of kept pictures, "input_ids" those of kept texts (B, L).
    """

    def __init__(self, config: ManagerTowerConfig, image_states: Tensor, text_states: Tensor):
        # as many layers as were kept, in place of all
        kept = image_states.shape[1]
        super().__init__(dataclasses.replace(config, vision_layers=kept, text_layers=kept))
        del self.text_encoder
        del self.image_encoder
        # no parameters and no buffers: they are neither trained nor saved
        self.image_states = image_states  # (P, N, L, D_image), float16
        self.text_states = text_states  # (T, N, L, D_text)

    def look_up(self, modality: str, states: Tensor, numbers: Tensor) -> Tensor:
        """The experts (B, N, L, D) of this variant, the last ones of those that were kept."""
        num_experts = self.config.num_experts(modality)
        device = self.type_embedding.device
        experts = states[:, -num_experts:][numbers.cpu()]
        return experts.to(device).float()

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.look_up("text", self.text_states, input_ids[:, 0])

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.look_up("image", self.image_states, pixels)


def number_of_picture(number: int, rng: Any) -> Tensor:
    """What takes the place of a transform where the states of pictures are kept."""
    return torch.tensor(number)


def pixels_of_picture(pixels: Tensor, number: int, rng: Any) -> Tensor:
    """The same where their pixels (P, 3, S, S) are kept."""
    return pixels[number].float()


class Kept:
    """A folder of what was kept, beside info.json, as arrays.

    ids, masks (T, L); images (P, N, L, D_image) and texts (T, N, L, D_text), or with --tune pixels
    (P, 3, S, S).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.info: dict[str, Any] = read_json(self.folder / "info.json", dict)

    def array(self, name: str) -> Tensor:
        """An array, read from the disk where it is looked at."""
        # mode c: what is written into it, which is nothing, would not reach the file
        return torch.from_numpy(np.load(self.folder / f"{name}.npy", mmap_mode="c"))

    def source(self, split: str) -> Source:
        records = []
        for numbers, rows in self.info["splits"][split]:
            records.append((numbers, rows))
        return KeptSource(self.info["kind"], [KeptPart(split, records)])

    def dataset(self, split: str, seed: int = 0) -> PairDataset:
        """The rows of a split, for the loop and for eval.py."""
        are_frozen = not self.info["tuned"]
        transform: Any = number_of_picture
        if not are_frozen:
            transform = functools.partial(pixels_of_picture, self.array("pixels"))
        texts = self.info["texts"]
        tokenizer: Any = KeptTexts(texts, self.array("ids"), self.array("masks"), are_frozen)
        return PairDataset(
            self.source(split),
            tokenizer,
            transform,
            self.info["max_text_len"],
            seed,
            answers=self.info["answers"],
        )


# ---------------------------------------------------------------- the encoders and their states
class Encoders(NamedTuple):
    """The two encoders that all variants read."""

    fields: dict[str, Any]  # of ManagerTowerConfig: sizes of the encoders
    tokenizer: Tokenizer
    vision: str  # folders
    text: str
    are_small: bool  # of this project


def load_encoders(model: ManagerTower, vision: str, text: str, are_small: bool) -> None:
    """Give a tower its two pre-trained encoders."""
    if are_small:
        small_towers.load_small_towers(model, Path(vision), Path(text))
    else:
        load_unimodal(model, vision, text)


def fields_of_encoders(config: CompareConfig) -> dict[str, Any]:
    """What a tower has to have to take the encoders of --vision and --text."""
    fields = config_of_encoders(config.vision, config.text)
    patch_size = fields["patch_size"]
    image_size = config.image_size or fit_image_size(SMALL_PICTURES, patch_size)
    return {**fields, "image_size": image_size}


def find_encoders(config: CompareConfig, processes: int) -> Encoders:
    """The encoders of --vision and --text, or two small ones, which are trained first."""
    if config.vision:
        vision = find_folder(config.vision)
        text = find_folder(config.text, "checkpoint")
        fields = fields_of_encoders(config)
        return Encoders(fields, load_tokenizer(text), str(vision), str(text), are_small=False)
    image_size = config.image_size or SMALL_PICTURES
    common = {"image_size": image_size, "seed": 0, "device": config.device}
    image_settings = {"max_steps": IMAGE_STEPS, "pictures": TOWER_PICTURES, **common}
    text_settings = {"max_steps": TEXT_STEPS, "texts": TOWER_TEXTS, **common}
    jobs = [
        Job("image_tower", small_towers.train_image_tower, image_settings),
        Job("text_tower", small_towers.train_text_tower, text_settings),
    ]
    print("Two small towers are pre-trained, apart from each other.", flush=True)
    folder = Path(config.out_dir) / "towers"
    run_jobs(jobs, folder, processes, lambda result: f"{result['accuracy']:.1%} right")
    tokenizer = demo_tokenizer()
    tower = small_towers.tower_config(image_size, tokenizer)
    names = small_towers.ENCODER_FIELDS
    fields = {name: getattr(tower, name) for name in names}
    image_folder = str(folder / "image_tower")
    text_folder = str(folder / "text_tower")
    return Encoders(fields, tokenizer, image_folder, text_folder, are_small=True)


def open_sources(config: CompareConfig, image_size: int) -> dict[str, tuple[Source, list[int]]]:
    """Of each split the source, and the records of it that are taken."""
    usual = config.usual()
    pairs = config.pairs or usual.pairs
    task = find_task(config.task_name())
    if not config.root():
        # held-out scenes are never shown in training; validation and test are drawn apart
        sizes = {"train": pairs, "validation": usual.validation, "test": usual.test}
        sources = {}
        for seed, (split, size) in enumerate(sizes.items()):
            scenes = "train" if split == "train" else "heldout"
            part = Demo(task.kind, scenes, size, seed, image_size)
            sources[split] = (Source(task.kind, [part]), list(range(size)))
        return sources

    # files: a part of the training pictures is kept apart to choose the learning rate on
    names = (config.task_name(),)
    training = open_sets(task.kind, config.root(), names, "train")
    test = open_sets(task.kind, config.root(), names, task.splits[-1])
    order = np.random.default_rng(0).permutation(training.num_images).tolist()
    end = usual.validation + pairs
    return {
        "validation": (training, order[: usual.validation]),
        "train": (training, order[usual.validation : end]),
        "test": (test, list(range(min(usual.test, test.num_images)))),
    }


def read_records(
    sources: dict[str, tuple[Source, list[int]]], transform: Any
) -> Iterator[tuple[str, list[Tensor], list[dict]]]:
    """(split, pixels of the pictures, text rows) of every record."""
    for split, (source, numbers) in sources.items():
        for number in tqdm(numbers, desc=f"{split} pictures", unit="picture", leave=False):
            images, rows = source.load(number)
            yield split, [transform(image, None) for image in images], rows


def keep_states(
    config: CompareConfig, encoders: Encoders, folder: Path, device: torch.device
) -> None:
    """Run both encoders over all pictures and texts, once, and keep what variants will read."""
    # 1. a tower that keeps as many layers as any variant wants
    number = config.num_kept()
    task = find_task(config.task_name())
    fields = {
        **encoders.fields,
        "fusion": "manager",
        "managed_layers_text": number,
        "managed_layers_image": number,
    }
    tower = ManagerTowerConfig(**fields)
    model = ManagerTower(tower)
    load_encoders(model, encoders.vision, encoders.text, encoders.are_small)
    model = model.to(device).eval()
    transform = tower_transform("albef", tower, train=False)

    # 2. pictures: their states, or with --tune their pixels
    splits: dict[str, list] = {}
    texts: dict[str, None] = {}  # the different ones, in their order
    pixels: list[Tensor] = []
    kept: list[Tensor] = []
    num_pictures = 0
    with evaluating(model):
        for split, pictures, rows in read_records(
            open_sources(config, tower.image_size), transform
        ):
            numbers = list(range(num_pictures, num_pictures + len(pictures)))
            num_pictures += len(pictures)
            splits.setdefault(split, []).append([numbers, rows])
            texts.update(dict.fromkeys(row["text"] for row in rows))
            pixels += pictures
            if len(pixels) >= 64:
                kept.append(encode_pictures(model, pixels, config.tune > 0, device))
                pixels = []
        if pixels:
            kept.append(encode_pictures(model, pixels, config.tune > 0, device))
        keep_array(folder, "pixels" if config.tune else "images", kept)

        # 3. texts, each once, all padded to the longest one
        ids, masks = encoders.tokenizer(list(texts), LONGEST_TEXT)
        length = int(masks.sum(1).max())
        ids, masks = encoders.tokenizer(list(texts), length)
        keep_array(folder, "ids", [ids.int()])
        keep_array(folder, "masks", [masks.int()])
        if not config.tune:
            states = []
            for some_ids, some_masks in zip(ids.split(64), masks.split(64), strict=True):
                experts = model.encode_text(some_ids.to(device), some_masks.to(device))
                states.append(experts.cpu().half())
            keep_array(folder, "texts", states)

    # 4. what belongs to the numbers; this file comes last, and says that all others are there
    answers = find_answers(config)
    info = {
        "kind": task.kind,
        "splits": splits,
        "texts": list(texts),
        "answers": answers,
        "max_text_len": length,
        "tower": encoders.fields,
        "tuned": config.tune > 0,
        "encoders": {
            "vision": encoders.vision,
            "text": encoders.text,
            "are_small": encoders.are_small,
        },
    }
    write_json(folder / "info.json", info)


def encode_pictures(
    model: ManagerTower, pixels: list[Tensor], are_pixels_kept: bool, device: torch.device
) -> Tensor:
    """Pictures (3, S, S) -> their states (P, N, L, D), or their pixels (P, 3, S, S); float16."""
    batch = torch.stack(pixels)
    if are_pixels_kept:
        return batch.half()
    return model.encode_image(batch.to(device)).cpu().half()


def find_answers(config: CompareConfig) -> list[str]:
    """The vocabulary of a task of questions."""
    if find_task(config.task_name()).kind != "questions":
        return []
    return load_answers(config.root()) if config.root() else DEMO_ANSWERS


def find_kept(config: CompareConfig, encoders: Encoders, device: torch.device) -> Kept:
    """The kept states for these flags: those of an earlier start, or new ones."""
    # everything that the states depend on; other flags get another folder
    depends_on = {
        "encoders": [describe_weights(encoders.vision), describe_weights(encoders.text)],
        "fields": encoders.fields,
        "tokenizer": encoders.tokenizer.digest(),
        "task": config.task_name(),
        "root": config.root() and os.path.realpath(config.root()),
        "pairs": config.pairs or config.usual().pairs,
        "sizes": config.usual(),
        "layers": config.num_kept(),
        "tuned": config.tune > 0,
    }
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:12]
    folder = Path(config.out_dir) / f"states-{digest}"
    if not (folder / "info.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        keep_states(config, encoders, folder, device)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"The encoders have run; {size / 1e6:.0f} MB of their states are in {folder}.", flush=True
    )
    return Kept(folder)


# ---------------------------------------------------------------- one run
@dataclass
class CompareRun(TowerRunConfig):
    """How a cross-modal part is trained."""


def make_run(
    folder: str, seed: int, rate: float, steps: int, batch_size: int, tune: float, device: str
) -> CompareRun:
    """Frozen encoders: one learning rate for all. With tune the encoders have the part `tune`."""
    part = tune or 1.0
    return CompareRun(
        out_dir=folder,
        seed=seed,
        max_steps=steps,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        learning_rate=part * rate,
        lr_mult_head=1 / part,
        lr_mult_cross_modal=1 / part,
        eval_every=max(1, steps // 10),
        save_every=max(1, steps // 4),
        precision="fp32",
        device=device,
    )


def make_config(kept: Kept, fields: dict[str, Any], heads: tuple[str, ...]) -> ManagerTowerConfig:
    """The tower of one variant."""
    answers = kept.info["answers"]
    values = {
        **kept.info["tower"],
        "dropout": 0.0,
        "initializer_range": 0.1,  # so narrow a model with 0.02 learns late
        "max_text_len": kept.info["max_text_len"],
        "heads": heads,
        **fields,
    }
    if answers:
        values["num_answers"] = len(answers)
    return ManagerTowerConfig(**values)


def new_tower(kept: Kept, config: ManagerTowerConfig) -> ManagerTower:
    """A tower with new weights, on kept states or, with --tune, on pixels and ids."""
    if kept.info["tuned"]:
        return ManagerTower(config)
    return FrozenTower(config, kept.array("images"), kept.array("texts"))


def make_tower(kept: Kept, config: ManagerTowerConfig, seed: int) -> ManagerTower:
    """The tower that a run begins with: what all variants have begins with equal weights in all."""
    seed_all(seed, "compare")
    model = new_tower(kept, config)
    # METER has the parts that all share, and no others
    seed_all(seed, "compare, shared")
    shared = new_tower(kept, dataclasses.replace(config, fusion="last"))
    model.load_state_dict(shared.state_dict(), strict=False)
    if kept.info["tuned"]:
        load_encoders(model, **kept.info["encoders"])
    return model


def make_objective(model: ManagerTower, task_name: str) -> Task:
    task = find_task(task_name)
    if task.is_retrieval:
        return Retrieval(model)
    return Classification(model, task.heads[0])


def matching_accuracy(model: ManagerTower, dataset: PairDataset) -> float:
    """How often the ITM head is right about pairs, of which half have another row's picture."""
    right = 0
    shift = len(dataset) // 2
    with evaluating(model) as device:
        for rows, batch in batches(dataset, 64):
            batch = to_device(batch, device)
            others = [dataset[(row + shift) % len(dataset)]["pixels"] for row in rows]
            texts = model.encode_text(batch["input_ids"], batch["attention_mask"])
            for pixels, label in ((batch["pixels"], 1), (torch.stack(others).to(device), 0)):
                images = model.encode_image(pixels)
                pooled = model.fuse_pooled(texts, images, batch["attention_mask"])
                choices = model.heads["itm"](pooled).argmax(-1)
                right += int((choices == label).sum())
    return right / (2 * len(dataset))


# what the questions about scenes are called that begin with "is there" and "is the"
KINDS = {"there": "existence", "the": "relation"}
K_TEST = 16  # candidates that retrieval ranks again


def measure(model: ManagerTower, dataset: PairDataset, task_name: str) -> dict[str, float]:
    """Scores in fractions: ALL first, then each kind of questions, or each recall."""
    metrics = evaluate(model, dataset, task_name, k_test=K_TEST)
    if not find_task(task_name).is_retrieval:
        scores = {ALL: metrics["accuracy"]}
        for kind, accuracy in metrics.get("per_question_type", {}).items():
            scores[KINDS.get(kind, kind)] = accuracy
        return scores
    recalls = {name: value for name, value in metrics.items() if "_r" in name}
    matching = matching_accuracy(model, dataset)
    return {ALL: metrics["rmean"], "matching": matching, **recalls}


def measure_validation(
    model: ManagerTower, dataset: PairDataset, task_name: str
) -> dict[str, float]:
    """What the loop logs on the way."""
    metrics = evaluate(model, dataset, task_name, k_test=K_TEST)
    score = metrics["rmean"] if "rmean" in metrics else metrics["accuracy"]
    return {"score": score}


def train_variant(
    folder: str,
    states: str,
    task: str,
    fields: dict[str, Any],
    seed: int,
    rate: float,
    steps: int,
    batch_size: int,
    tune: float,
    device: str,
) -> dict:
    """A job: train the cross-modal part of one variant, and measure it.

    folder: of the run; states: of what was kept; fields: of ManagerTowerConfig.
    """
    kept = Kept(states)
    world = World(device)
    config = make_config(kept, fields, find_task(task).heads)
    model = make_tower(kept, config, seed).to(world.device)
    run = make_run(folder, seed, rate, steps, batch_size, tune, device)
    dataset = kept.dataset("train", seed)
    validation = kept.dataset("validation")

    evaluate_run = functools.partial(measure_validation, model, validation, task)
    identity = {"config": dataclasses.asdict(config), "states": states}
    checkpoint = Checkpoint(run, model, lambda folder: None, identity, world)
    objective = make_objective(model, task)
    fit(run, objective, dataset, evaluate_run, checkpoint, world, param_groups(model, run))

    curve = []
    for row in read_log(checkpoint.log_file):
        if isinstance(row.get("eval"), dict):
            curve.append([row["step"], row["eval"]["score"]])
    return {
        "validation": curve[-1][1],
        "curve": curve,
        "test": measure(model, kept.dataset("test"), task),
    }


# ---------------------------------------------------------------- the comparison
def variant_fields(config: CompareConfig, variant: str) -> dict[str, Any]:
    """The fields of ManagerTowerConfig that this comparison sets."""
    return {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "managed_layers_text": config.experts,
        "managed_layers_image": config.experts,
        "manager_noise": config.noise,
        **VARIANTS[variant],
    }


def make_job(config: CompareConfig, kept: Kept, variant: str, rate: float, seed: int) -> Job:
    settings = {
        "states": str(kept.folder),
        "task": config.task_name(),
        "fields": variant_fields(config, variant),
        "seed": seed,
        "rate": rate,
        "steps": config.num_steps(),
        "batch_size": config.batch_size,
        "tune": config.tune,
        "device": config.device,
    }
    return Job(f"{variant}-rate{rate:g}-seed{seed}", train_variant, settings)


def all_jobs(config: CompareConfig, kept: Kept) -> dict[tuple[str, float, int], Job]:
    """(variant, learning rate, seed) -> job. A seed is done with before the next one begins."""
    jobs = {}
    for seed in range(config.num_seeds()):
        for variant in config.variant_names():
            for rate in config.learning_rates():
                jobs[variant, rate, seed] = make_job(config, kept, variant, rate, seed)
    return jobs


def add_costs(config: CompareConfig, kept: Kept, outcomes: list[Outcome]) -> None:
    """What a step of each variant costs on this machine."""
    task = config.task_name()
    _, batch = next(batches(kept.dataset("train"), config.batch_size))
    objectives = {}
    for outcome in outcomes:
        fields = variant_fields(config, outcome.name)
        model = make_tower(kept, make_config(kept, fields, find_task(task).heads), seed=0)
        objectives[outcome.name] = make_objective(model, task)
    costs = measure_costs(objectives, dict.fromkeys(objectives, batch))
    for outcome in outcomes:
        outcome.facts = costs[outcome.name]


def describe_guess(kept: Kept) -> str:
    """What is known without looking at the pictures, in one line."""
    parts = []
    for name, metrics in baselines(kept.source("train"), kept.source("test")).items():
        for metric, value in metrics.items():
            parts.append(f"{name.replace('_', ' ')} {metric} {value:.1%}")
    return f"without looking: {', '.join(parts)}"


def describe_settings(config: CompareConfig, kept: Kept) -> str:
    """What the numbers depend on, in words."""
    sizes = {split: len(records) for split, records in kept.info["splits"].items()}
    encoders = "two small towers"
    if config.vision:
        encoders = f"{Path(config.vision).name} and {Path(config.text).name}"
    data = config.root() or "built-in scenes"
    trained = f"trained at {config.tune:g} of the rate" if config.tune else "frozen"
    noise = "with" if config.noise else "without"
    rates = ", ".join(f"{rate:g}" for rate in config.learning_rates())
    return (
        f"{config.task_name()} on {data}: {encoders}, pre-trained apart, {trained}; "
        f"{sizes['train']} pictures to learn from, {sizes['validation']} to choose the learning "
        f"rate on (of {rates}), {sizes['test']} to measure on; {config.num_steps()} steps of "
        f"{config.batch_size} rows, {config.hidden_size} channels, {config.num_layers} "
        f"cross-modal layers, {config.experts} experts, {noise} noise on the "
        f"managers' scores, {config.num_seeds()} seeds"
    )


def describe_limits(config: CompareConfig) -> str:
    """What the tables do not show."""
    lines = ["What this does not show:"]
    if len(config.learning_rates()) == 1:
        lines.append("- another learning rate may suit a variant better: --full chooses from two")
    if not config.noise:
        lines.append("- the papers train with noise on the managers' scores: --noise true")
    if not config.tune:
        lines.append("- the papers train the encoders too: --tune 0.2")
    lines += [
        "- differences may shrink with more steps or pictures: --steps, --pairs",
        "- that the last layers have lost something: `python figures.py probe` finds most of it "
        "there too. Managers let a small cross-modal part find it in fewer steps",
    ]
    return "\n".join(lines)


def compare(config: CompareConfig) -> list[Outcome]:
    """The whole comparison: encoders, their states, the runs, the tables and the picture."""
    processes = count_processes(config.processes, config.device)
    folder = Path(config.out_dir)
    folder.mkdir(parents=True, exist_ok=True)

    # 1. the encoders, and what they say of all pictures and texts
    encoders = find_encoders(config, processes)
    kept = find_kept(config, encoders, World(config.device).device)
    settings = describe_settings(config, kept)
    guess = describe_guess(kept)
    print(f"{settings}\n{guess}", flush=True)

    # 2. the runs
    jobs = all_jobs(config, kept)
    by_name = run_jobs(list(jobs.values()), folder / "runs", processes, describe_result)
    results = {key: by_name[job.name] for key, job in jobs.items()}

    # 3. what came out
    rates = config.learning_rates()
    outcomes = []
    for variant in config.variant_names():
        outcomes.append(make_outcome(variant, rates, config.num_seeds(), results))
    add_costs(config, kept, outcomes)
    present = [name for name in BASELINES if name in config.variant_names()]
    report = "\n\n".join(
        [
            f"{describe_scores(outcomes, present)}\n{guess}",
            f"{describe_order(outcomes)}\n{describe_test(config.num_seeds())}",
            describe_facts(outcomes),
            describe_limits(config),
        ]
    )
    print(f"\n{report}")

    # 4. the same for other programs, and for the eye
    searched = [[*key, result["validation"]] for key, result in results.items()]
    record = {
        "settings": settings,
        "flags": dataclasses.asdict(config),
        "guess": guess,
        "outcomes": as_record(outcomes),
        "validation": searched,
    }
    save_json(folder / "result.json", record)
    drawn = save_drawing(outcomes, f"{settings}; {guess}", folder / "result.png")
    print(f"\nThe numbers are in {folder / 'result.json'}. {drawn}")
    return outcomes


def main(argv: list[str]) -> None:
    if argv[:1] == ["llava"]:
        import compare_llava  # the MLLM's comparison, which the two-tower models do not need

        compare_llava.main(argv[1:])
        return
    config = parse_flags(CompareConfig, argv, inspect.getdoc(CompareConfig) or "")
    refuse_torchrun()
    compare(config)


if __name__ == "__main__":
    one_sentence(main)
