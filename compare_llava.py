r"""The papers' comparison for the MLLM on one's own machine: managers and grids, each with and
without the other.

    python compare.py llava
    # 5 seeds, the search for the learning rate, and managers that read the question
    python compare.py llava --full --out_dir out/compare_llava_full

Manager (TCSVT 2025), section V, where LLaVA-OneVision's grid and the visual managers are added to a
plain MLLM, alone and together. Here it is looked at where minutes are enough: scenes of 128 x 128
pixels, a SigLIP of 64 x 64 that is pre-trained on scenes and frozen, and a small LLM that is
trained from random weights, together with the projector and the managers.

The scenes (`paint_details` of scenes.py) are made so that the grid has something to show. Their two
things are filled with patterns of single pixels, which the base tile, half as large, shows as an
even tone. Half of the questions are about colours, places, sizes and shapes: the base tile answers
them. The other half are about the patterns: only a tile of the grid does.

All variants have the same pictures in the same order, the same steps and batch, and the same
weights to begin with wherever they share a part. As the tower is frozen, its hidden states are kept
on disk, and KeptLlava reads them there.

Shapes: B batch, P pictures, T tiles, N kept hidden states, n patches along a tile's side, W words,
D width.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from chat import encode_chat, encode_prompt, tokenize
from comparison import (
    ALL,
    Job,
    Outcome,
    as_record,
    comparison_with,
    count_processes,
    describe_facts,
    describe_order,
    describe_result,
    describe_scores,
    describe_test,
    describe_weights,
    find_outcome,
    format_table,
    keep_array,
    make_outcome,
    measure_costs,
    refuse_torchrun,
    run_jobs,
    save_drawing,
)
from data import collate_conversations
from fields import FieldError, check_fields, option, parse_flags
from files import read_json, read_log, save_json, why_no_folder, write_json
from llava_manager import LlavaManager, LlavaManagerConfig
from loop import Checkpoint, Task, fit
from model import ViTBlock
from multigrid import ImageTiles, preprocess_image
from scenes import COLORS, DETAIL, OVERVIEW, PATTERNS, SHAPES, SIZES, Demo, demo_source
from small_towers import NamingWords, measure_words, tower_run, train_tower
from tasks import text_only_guess
from tokenizer import load_tokenizer
from train_llava import (
    PLAIN,
    SPECIALS,
    Chat,
    LlavaTrainConfig,
    answer_accuracy,
    demo_llava_tokenizer,
    llava_groups,
)
from weights import read_safetensors
from world import World, evaluating, seed_all

# ---------------------------------------------------------------- what is compared
SCENE = 128  # pixels a side
GRID = {"aspect": "anyres", "merge": "spatial_unpad", "grid_pinpoints": ((SCENE, SCENE),)}
# name -> fields of LlavaManagerConfig
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"manager_type": None, **PLAIN},
    "static": {"manager_type": "static", **PLAIN},
    "adaptive": {"manager_type": "adaptive", **PLAIN},
    "none+grid": {"manager_type": None, **GRID},
    "static+grid": {"manager_type": "static", **GRID},
    "adaptive+grid": {"manager_type": "adaptive", **GRID},
    "cross": {"manager_type": "adaptive_cross", **PLAIN},
    "cross+grid": {"manager_type": "adaptive_cross", **GRID},
}
USUAL = ("none", "static", "adaptive", "none+grid", "static+grid", "adaptive+grid")
# (variant, what it is compared with): managers with the same grid, then what the grid gives
PAIRS = (
    ("static", "none"),
    ("adaptive", "none"),
    ("cross", "none"),
    ("static+grid", "none+grid"),
    ("adaptive+grid", "none+grid"),
    ("cross+grid", "none+grid"),
    ("none+grid", "none"),
    ("static+grid", "static"),
    ("adaptive+grid", "adaptive"),
    ("cross+grid", "cross"),
)
# the sizes of tower and LLM; what is not here is as in LlavaManagerConfig.tiny
MODEL: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 16,
    "vision_width": 64,
    "vision_layers": 6,
    "vision_heads": 4,
    "vision_mlp_width": 256,
    "hidden_size": 64,
    "mlp_width": 176,
    "managed_layers": (2, 3, 4, 5),
    "initializer_range": 0.1,  # so narrow a model with 0.02 learns late
}


class Sizes(NamedTuple):
    """Pictures of each split, with 4 questions each, and those that the tower learns from."""

    pictures: int
    validation: int
    test: int
    tower: int


SIZES_OF_SPLITS = Sizes(pictures=3000, validation=80, test=400, tower=2000)
STEPS = 800
TOWER_STEPS = 1500
FEW_SEEDS = 3
MANY_SEEDS = 5
RATE = 2e-3
RATES = (1e-3, 2e-3, 4e-3)  # of the search
TOWER_SEED = 1000  # of the scenes that the tower learns from: others than those that follow


@dataclass
class CompareLlavaConfig:
    """Compare MLLMs with and without managers and grid; prints tables, draws a picture.

    0 and none stand for what is usual: 3 seeds, 5 with --full; the learning rate 0.002, with --full
    also 0.001 and 0.004, whichever is best on validation scenes.
    """

    out_dir: str = option("out/compare_llava", "folder of the runs, of result.json and result.png")
    # what is compared
    variants: tuple[str, ...] = option(
        (),
        "which ones; none = no, static and adaptive managers, each without and with the grid",
        choices=tuple(VARIANTS),
    )
    seeds: int = option(0, "runs of each variant, with the seeds 0, 1, ...", least=0, most=20)
    rates: tuple[float, ...] = option(
        (), "learning rates to choose from, on validation scenes", above=0
    )
    full: bool = option(False, "5 seeds, the search for the rate, and all variants")
    # how much
    pairs: int = option(0, "pictures to learn from, with 4 questions each", least=0)
    steps: int = option(0, "optimizer updates of each run", least=0)
    batch_size: int = option(16, "conversations of an update", least=1, most=2**16)
    # running
    processes: int = option(
        0, "runs at the same time; 0 = one a core, one on CUDA", least=0, most=256
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_fields(self)
        reason = why_no_folder(self.out_dir)
        if reason:
            raise FieldError(f"out_dir {self.out_dir} cannot be written into: {reason}")

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
        return self.steps or STEPS

    def split_sizes(self) -> dict[str, int]:
        """How many pictures each split has."""
        usual = SIZES_OF_SPLITS
        return {
            "train": self.pairs or usual.pictures,
            "validation": usual.validation,
            "test": usual.test,
        }


# ---------------------------------------------------------------- the vision tower
WORDS = (*SIZES, *COLORS, *SHAPES, *PATTERNS)  # all that is said of things
LEAST_PART = 0.25  # of a thing's box that a tile has to hold to show the thing


class VisionTower(nn.Module):
    """SigLIP, and a linear layer that says which words each patch shows.

    A tile shows a word if one of its patches does: its logits are the patches' soft maximum. So the
    state of a patch comes to hold what is seen there, as that of a SigLIP does.
    """

    blocks_to_compile = (ViTBlock,)

    def __init__(self, config: LlavaManagerConfig):
        super().__init__()
        self.config = config
        # an MLLM does not build the last layer, which is trained here
        whole = dataclasses.replace(config, vision_layers=config.vision_layers + 1)
        self.vision = LlavaManager(whole).vision
        self.words = nn.Linear(config.vision_width, len(WORDS))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> logits (B, W)."""
        (states,) = self.vision(pixels, [self.config.vision_layers])
        logits = self.words(self.vision.ln_post(states))  # (B, n*n, W)
        return logits.logsumexp(dim=1)


def part_inside(box: list[float], tile: list[float]) -> float:
    """Which part of a box (left, top, right, bottom) lies in a tile."""
    width = min(box[2], tile[2]) - max(box[0], tile[0])
    height = min(box[3], tile[3]) - max(box[1], tile[1])
    area = (box[2] - box[0]) * (box[3] - box[1])
    return max(width, 0.0) * max(height, 0.0) / area


def words_of(things: list[dict], tile: list[float], is_base: bool) -> Tensor:
    """1 for each of WORDS that is seen in the tile, (W,). A base tile shows no pattern."""
    seen = set()
    for thing in things:
        if part_inside(thing["box"], tile) >= LEAST_PART:
            seen |= {thing["size"], thing["color"], thing["shape"]}
            if not is_base:
                seen.add(thing["pattern"])
    return torch.tensor([float(word in seen) for word in WORDS])


def places_of_tiles(config: LlavaManagerConfig) -> list[list[float]]:
    """Where the tiles of a scene are in it: the base tile everywhere, then the grid row by row."""
    side = config.image_size
    places = [[0, 0, SCENE, SCENE]]
    for top in range(0, SCENE, side):
        for left in range(0, SCENE, side):
            places.append([left, top, left + side, top + side])
    return [[float(value) for value in place] for place in places]


class TilesWithWords(Dataset):
    """The tiles of scenes, base tiles too: pixels (3, S, S), words (W,)."""

    def __init__(self, split: str, scenes: int, seed: int, config: LlavaManagerConfig):
        self.part = Demo("details", split, scenes, seed, SCENE)
        self.config = config
        self.places = places_of_tiles(config)
        self.kept: dict[int, tuple[Tensor, list[Tensor]]] = {}  # a scene is drawn once
        self.source = self

    def name(self, index: int) -> str:
        return self.part.name(index)

    def __len__(self) -> int:
        return len(self.part.places) * len(self.places)

    def draw(self, scene: int) -> tuple[Tensor, list[Tensor]]:
        """The tiles of a scene (T, 3, S, S), and what is in each of them."""
        if scene not in self.kept:
            record = self.part.record(scene)
            tiles = preprocess_image(record["image"], self.config)
            words = []
            for number, place in enumerate(self.places):
                words.append(words_of(record["things"], place, is_base=number == 0))
            self.kept[scene] = (tiles.pixels.half(), words)
        return self.kept[scene]

    def __getitem__(self, key: Any) -> dict:
        row = key[2] if isinstance(key, tuple) else key
        scene = row // len(self.places)
        tile = row % len(self.places)
        pixels, words = self.draw(scene)
        return {"pixels": pixels[tile].float(), "words": words[tile], "image_index": scene}


def train_vision_tower(
    folder: str, max_steps: int, scenes: int, fields: dict[str, Any], seed: int, device: str
) -> dict:
    """A job: the tower that all variants have. fields: of LlavaManagerConfig."""
    world = World(device)
    config = LlavaManagerConfig.tiny(**fields, **GRID)
    seed_all(seed, "vision tower")
    model = VisionTower(config).to(world.device)
    dataset = TilesWithWords("train", scenes, seed + TOWER_SEED, config)
    heldout = TilesWithWords("heldout", max(1, scenes // 20), seed + TOWER_SEED, config)
    evaluate = functools.partial(measure_words, model, heldout)
    run = tower_run(folder, max_steps, seed, device)
    return train_tower(NamingWords(model), dataset, evaluate, run, world)


def load_vision_tower(model: LlavaManager, folder: str | Path) -> None:
    """Give an MLLM the tower, without its last layer, and freeze it."""
    last = f"vision.blocks.{model.config.vision_layers - 1}."
    state = {}
    for name, tensor in read_safetensors(Path(folder)).items():
        if name.startswith("vision.") and not name.startswith(last):
            state[name.removeprefix("vision.")] = tensor
    model.vision.load_state_dict(state)
    model.vision.requires_grad_(False)


# ---------------------------------------------------------------- what is kept
def kept_layers(config: LlavaManagerConfig) -> list[int]:
    """The hidden states that some variant reads."""
    return sorted({*config.managed_layers, config.vision_layers - 1})


def stand_in(number: int, config: LlavaManagerConfig) -> ImageTiles:
    """What takes the place of a scene's tiles where its states are kept: each pixel is its number.

    It has the shape of tiles, and the memory of one number.
    """
    num_tiles = 1
    if config.aspect != PLAIN["aspect"]:
        num_tiles = len(places_of_tiles(config))
    side = config.image_size
    pixels = torch.tensor(float(number)).expand(num_tiles, 3, side, side)
    return ImageTiles(pixels, (SCENE, SCENE))


class KeptLlava(LlavaManager):
    """An MLLM whose tower has run already: it looks the states of tiles up.

    Its images are what `stand_in` gives.
    """

    def __init__(self, config: LlavaManagerConfig, states: Tensor):
        super().__init__(config)
        # no parameter and no buffer: they are neither trained nor saved
        self.states = states  # (P, T, N, n*n, D_vision), float16

    def encode_tiles(self, images: Sequence[ImageTiles]) -> dict[int, Tensor]:
        """Number of a hidden state -> (T, n*n, D_vision), as the tower gives it."""
        parts = []
        for image in images:
            number = int(image.pixels[0, 0, 0, 0])
            parts.append(self.states[number, : len(image.pixels)])
        states = torch.cat(parts).to(self.image_newline.device).float()
        return dict(zip(kept_layers(self.config), states.unbind(1), strict=True))


class Kept:
    """A folder of what was kept: info.json, the tokenizer, and the states of all pictures."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.info: dict[str, Any] = read_json(self.folder / "info.json", dict)
        self.tokenizer = load_tokenizer(self.folder)

    def states(self) -> Tensor:
        """(P, T, N, n*n, D_vision), read from the disk where they are looked at."""
        # mode c: what is written into it, which is nothing, would not reach the file
        return torch.from_numpy(np.load(self.folder / "states.npy", mmap_mode="c"))

    def config(self, variant: str) -> LlavaManagerConfig:
        """The MLLM of one variant."""
        _, im_start, im_end = (tokenize(name, self.tokenizer) for name in SPECIALS)
        return LlavaManagerConfig.tiny(
            vocab_size=self.tokenizer.vocab_size,
            im_start_id=im_start[0],
            eos_ids=im_end,
            **self.info["model"],
            **VARIANTS[variant],
        )

    def quiz(self, split: str, kind: str, config: LlavaManagerConfig) -> list[tuple]:
        """(prompt, answer, image) of the questions of one kind, for `answer_accuracy`."""
        quiz = []
        for record in self.info["splits"][split]:
            for question in record["questions"]:
                if question["question_type"] == kind:
                    prompt = encode_prompt([question["question"]], self.tokenizer, num_images=1)
                    (answer,) = question["answers"]
                    quiz.append((prompt, answer, stand_in(record["number"], config)))
        return quiz


class KeptConversations(Dataset):
    """The training conversations: tokens (input_ids, labels), images, image_index."""

    def __init__(self, kept: Kept, config: LlavaManagerConfig):
        self.config = config
        self.records = kept.info["splits"]["train"]
        self.tokens = []
        for record in self.records:
            conversation = record["conversations"]
            # of the answers alone: all else is the same in all conversations
            self.tokens.append(encode_chat(conversation, kept.tokenizer, strict_labels=True))
        self.source = self

    def name(self, index: int) -> str:
        return f"kept picture {index}"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Any) -> dict:
        row = key[2] if isinstance(key, tuple) else key
        number = self.records[row]["number"]
        images = [stand_in(number, self.config)]
        return {"tokens": self.tokens[row], "images": images, "image_index": number}


def open_parts(sizes: dict[str, int]) -> dict[str, Demo]:
    """The scenes of each split. Held-out ones are never shown in training, the tower's included."""
    parts = {}
    for seed, (split, size) in enumerate(sizes.items()):
        scenes = "train" if split == "train" else "heldout"
        parts[split] = Demo("details", scenes, size, seed, SCENE)
    return parts


def keep_states(
    folder: Path, tower: str, sizes: dict[str, int], fields: dict[str, Any], device: torch.device
) -> None:
    """Run the tower over the tiles of all pictures, once, and keep what variants will read."""
    # 1. the tower
    config = LlavaManagerConfig.tiny(**fields, **GRID)
    model = LlavaManager(config)
    load_vision_tower(model, tower)
    model = model.to(device)
    layers = kept_layers(config)

    # 2. the pictures of all splits, numbered through
    splits: dict[str, list[dict]] = {}
    states = []
    number = 0
    with evaluating(model):
        for split, part in open_parts(sizes).items():
            splits[split] = []
            for index in tqdm(range(len(part.places)), desc=f"{split} pictures", leave=False):
                record = part.record(index)
                tiles = preprocess_image(record["image"], config)
                hidden = model.vision(tiles.pixels.to(device), layers)
                states.append(torch.stack(hidden, dim=1)[None].cpu().half())
                texts = {name: record[name] for name in ("conversations", "questions")}
                splits[split].append({"number": number, **texts})
                number += 1
    keep_array(folder, "states", states)

    # 3. what belongs to the numbers; info.json comes last, and says that all others are there
    chats = demo_source("chat_details", "train", sizes["train"], 0, SCENE)
    demo_llava_tokenizer(chats, chats).save(folder)
    write_json(folder / "info.json", {"splits": splits, "model": fields, "tower": tower})


def find_kept(config: CompareLlavaConfig, tower: str, device: torch.device) -> Kept:
    """The kept states for these flags: those of an earlier start, or new ones."""
    # everything that the states depend on; other flags get another folder
    depends_on = {
        "tower": describe_weights(tower),
        "sizes": config.split_sizes(),
        "model": MODEL,
    }
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:12]
    folder = Path(config.out_dir) / f"states-{digest}"
    if not (folder / "info.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        keep_states(folder, tower, config.split_sizes(), MODEL, device)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"The tower has run; {size / 1e6:.0f} MB of its states are in {folder}.", flush=True)
    return Kept(folder)


# ---------------------------------------------------------------- one run
def make_llava(kept: Kept, variant: str, seed: int) -> KeptLlava:
    """The MLLM that a run begins with: what all variants have begins with equal weights in all."""
    config = kept.config(variant)
    states = kept.states()
    seed_all(seed, "compare llava")
    model = KeptLlava(config, states)
    # an MLLM without managers has the parts that all share, and no others
    seed_all(seed, "compare llava, shared")
    shared = KeptLlava(dataclasses.replace(config, manager_type=None), states)
    model.load_state_dict(shared.state_dict(), strict=False)
    load_vision_tower(model, kept.info["tower"])
    return model


def make_run(
    folder: str, seed: int, rate: float, steps: int, batch_size: int, device: str
) -> LlavaTrainConfig:
    """Managers have the learning rate of all others."""
    return LlavaTrainConfig(
        out_dir=folder,
        seed=seed,
        max_steps=steps,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        learning_rate=rate,
        lr_manager=rate,
        warmup=0.05,
        schedule="cosine",
        grad_clip=1.0,
        eval_every=max(1, steps // 8),
        save_every=max(1, steps // 4),
        precision="fp32",
        device=device,
    )


def measure(
    model: LlavaManager, kept: Kept, split: str, run: LlavaTrainConfig, world: World
) -> dict[str, float]:
    """The part of the questions that are answered to the letter: of ALL, then of each kind."""
    scores = {}
    right = 0.0
    total = 0
    for kind in (OVERVIEW, DETAIL):
        quiz = kept.quiz(split, kind, model.config)
        scores[kind] = answer_accuracy(model, quiz, kept.tokenizer, run, world)["accuracy"]
        right += scores[kind] * len(quiz)
        total += len(quiz)
    return {ALL: right / total, **scores}


def measure_validation(
    model: LlavaManager, kept: Kept, run: LlavaTrainConfig, world: World
) -> dict[str, float]:
    """What the loop logs on the way."""
    scores = measure(model, kept, "validation", run, world)
    return {**scores, "score": scores[ALL]}


def train_variant(
    folder: str,
    states: str,
    variant: str,
    seed: int,
    rate: float,
    steps: int,
    batch_size: int,
    device: str,
) -> dict:
    """A job: train the MLLM of one variant, and measure it.

    folder: of the run; states: of what was kept.
    """
    kept = Kept(states)
    world = World(device)
    model = make_llava(kept, variant, seed).to(world.device)
    run = make_run(folder, seed, rate, steps, batch_size, device)
    dataset = KeptConversations(kept, model.config)

    evaluate = functools.partial(measure_validation, model, kept, run, world)
    identity = {"config": dataclasses.asdict(model.config), "states": states}
    checkpoint = Checkpoint(run, model, kept.tokenizer.save, identity, world)
    groups = llava_groups(model, run)
    fit(run, Chat(model), dataset, evaluate, checkpoint, world, groups, collate_conversations)

    curve = []
    for row in read_log(checkpoint.log_file):
        if isinstance(row.get("eval"), dict):
            curve.append([row["step"], row["eval"]["score"]])
    test = measure(model, kept, "test", run, world)
    return {"validation": curve[-1][1], "curve": curve, "test": test}


# ---------------------------------------------------------------- the comparison
def find_tower(config: CompareLlavaConfig) -> str:
    """The folder of the tower, which is trained unless an earlier start has done it."""
    settings = {
        "max_steps": TOWER_STEPS,
        "scenes": SIZES_OF_SPLITS.tower,
        "fields": MODEL,
        "seed": 0,
        "device": config.device,
    }
    job = Job("tower", train_vision_tower, settings)
    print("A small vision tower is pre-trained.", flush=True)

    def summary(result: dict) -> str:
        return f"all is right of {result['accuracy']:.1%} of the tiles"

    run_jobs([job], Path(config.out_dir), 1, summary)
    return str(Path(config.out_dir) / job.name)


Key = tuple[str, float, int]  # variant, learning rate, seed


def all_jobs(config: CompareLlavaConfig, kept: Kept) -> dict[Key, Job]:
    """A seed is done with before the next one begins."""
    jobs = {}
    for seed in range(config.num_seeds()):
        for variant in config.variant_names():
            for rate in config.learning_rates():
                settings = {
                    "states": str(kept.folder),
                    "variant": variant,
                    "seed": seed,
                    "rate": rate,
                    "steps": config.num_steps(),
                    "batch_size": config.batch_size,
                    "device": config.device,
                }
                name = f"{variant}-rate{rate:g}-seed{seed}"
                jobs[variant, rate, seed] = Job(name, train_variant, settings)
    return jobs


def add_costs(config: CompareLlavaConfig, kept: Kept, outcomes: list[Outcome]) -> None:
    """What a step of each variant costs on this machine, the frozen tower's part included."""
    part = open_parts(config.split_sizes())["train"]
    number = min(config.batch_size, len(part.places))
    pictures = [part.record(index)["image"] for index in range(number)]
    objectives: dict[str, Task] = {}
    batches = {}
    for outcome in outcomes:
        model = make_llava(kept, outcome.name, seed=0)
        # the same weights in an MLLM that looks at pictures
        whole = LlavaManager(model.config)
        whole.load_state_dict(model.state_dict())
        whole.vision.requires_grad_(False)
        objectives[outcome.name] = Chat(whole)
        conversations = KeptConversations(kept, model.config)
        items = [conversations[row] for row in range(number)]
        for item, picture in zip(items, pictures, strict=True):
            item["images"] = [preprocess_image(picture, model.config)]
        batches[outcome.name] = collate_conversations(items)
    costs = measure_costs(objectives, batches)
    for outcome in outcomes:
        outcome.facts = costs[outcome.name]


def describe_guess(config: CompareLlavaConfig) -> str:
    """What is known without looking at the pictures, in one line."""
    sizes = config.split_sizes()
    train = demo_source("details", "train", sizes["train"], 0, SCENE)
    test = demo_source("details", "heldout", sizes["test"], 2, SCENE)
    parts = []
    for kind in (None, OVERVIEW, DETAIL):
        guess = text_only_guess(train, test, kind)["text_only"]
        parts.append(f"{kind or ALL} {guess:.1%}")
    return f"a guess from the question alone: {', '.join(parts)}"


def describe_pairs(outcomes: list[Outcome]) -> str:
    """The table of differences to the variant with one thing less."""
    kinds = list(outcomes[0].scores)
    rows = []
    for name, other in PAIRS:
        outcome = find_outcome(outcomes, name)
        baseline = find_outcome(outcomes, other)
        if outcome is not None and baseline is not None:
            differences = [comparison_with(outcome, baseline, kind) for kind in kinds]
            rows.append([f"{name} against {other}", *differences])
    return format_table(["difference, points", *kinds], rows)


def describe_settings(config: CompareLlavaConfig) -> str:
    """What the numbers depend on, in words."""
    sizes = config.split_sizes()
    rates = ", ".join(f"{rate:g}" for rate in config.learning_rates())
    side = MODEL["image_size"]
    return (
        f"scenes of {SCENE} x {SCENE} pixels, a small SigLIP of {side} x {side}, pre-trained on "
        f"words of scenes and frozen, and a small LLM from random weights; {sizes['train']} "
        f"pictures to learn from, {sizes['validation']} to choose the learning rate on (of "
        f"{rates}), {sizes['test']} to measure on, with 4 questions each; {config.num_steps()} "
        f"steps of {config.batch_size} conversations, {config.num_seeds()} seeds"
    )


def compare(config: CompareLlavaConfig) -> list[Outcome]:
    """The whole comparison: the tower, its states, the runs, the tables and the picture."""
    processes = count_processes(config.processes, config.device)
    folder = Path(config.out_dir)
    folder.mkdir(parents=True, exist_ok=True)

    # 1. the tower, and what it says of all tiles
    tower = find_tower(config)
    kept = find_kept(config, tower, World(config.device).device)
    settings = describe_settings(config)
    guess = describe_guess(config)
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
    report = "\n\n".join(
        [
            f"{describe_scores(outcomes, ())}\n{guess}",
            f"{describe_pairs(outcomes)}\n{describe_test(config.num_seeds())}",
            describe_order(outcomes),
            describe_facts(outcomes),
        ]
    )
    print(f"\n{report}")

    # 4. the same for other programs, and for the eye
    record = {
        "settings": settings,
        "flags": dataclasses.asdict(config),
        "guess": guess,
        "outcomes": as_record(outcomes),
        "validation": [[*key, result["validation"]] for key, result in results.items()],
    }
    save_json(folder / "result.json", record)
    drawn = save_drawing(outcomes, f"{settings}; {guess}", folder / "result.png")
    print(f"\nThe numbers are in {folder / 'result.json'}. {drawn}")
    return outcomes


def main(argv: list[str]) -> None:
    config = parse_flags(CompareLlavaConfig, argv, inspect.getdoc(CompareLlavaConfig) or "")
    refuse_torchrun()
    compare(config)
