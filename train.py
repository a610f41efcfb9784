r"""Pre-training of ManagerTower: MLM and ITM, on request ITC with hard negatives.

Paper: ManagerTower (ACL 2023), section 4.

    # the built-in scenes; a CPU is enough
    python train.py
    # the papers' run
    torchrun --standalone --nproc_per_node 8 train.py --recipe pretrain --data_root D \
        --vision CLIP --text ROBERTA
    # the MLLM's recipes, which are in train_llava.py
    python train.py --recipe llava_demo

`python train.py -h` lists all flags. The loop itself is in loop.py, the objectives are in
objectives.py.
"""

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, Subset

from data import PretrainDataset, Source, collate
from fields import make_parser, option, parse_recipe, show
from hub import find_folder
from images import tower_transform
from loop import (
    Checkpoint,
    TowerRunConfig,
    find_tokenizer_of,
    fit,
    is_beginning_gone,
    make_plan,
    measure_untrained,
    param_groups,
    refuse_idle_flags,
    stored_config,
    summarize,
)
from model import ManagerTower, ManagerTowerConfig
from objectives import Pretraining
from scenes import demo_source, demo_tokenizer
from tasks import PRETRAINING_SETS, TASKS, open_sets
from tokenizer import (
    MLM_ROLES,
    TOWER_ROLES,
    Tokenizer,
    check_roles,
    check_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from weights import (
    FOLLOWING_FIELDS,
    PUBLISHED_KEYS,
    config_of_encoders,
    fit_image_size,
    load_unimodal,
)
from world import World, autocast, one_sentence, seed_all, to_device


@dataclass
class TrainConfig(TowerRunConfig):
    """A pre-training run."""

    architecture: ClassVar[type] = ManagerTowerConfig
    identity_fields: ClassVar[tuple[str, ...]] = (
        *TowerRunConfig.identity_fields,
        "objectives",
        "share_images",
    )

    datasets: tuple[str, ...] = option(PRETRAINING_SETS, "sets of --data_root, one after the other")
    objectives: tuple[str, ...] = option(
        ("mlm", "itm"), "itc brings hard negatives to itm", choices=("mlm", "itm", "itc")
    )
    share_images: bool = option(False, "MLM and ITM share one pass of the image encoder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.objectives or ("itc" in self.objectives and "itm" not in self.objectives):
            raise ValueError(
                f"--objectives {','.join(self.objectives)} must be some of mlm,itm,itc; itc needs "
                "itm"
            )
        if self.micro_batch_size < self.unit():
            raise ValueError(
                f"--micro_batch_size {self.micro_batch_size} must be at least 2, as --share_images "
                "pairs rows"
            )

    def unit(self) -> int:
        return 2 if self.share_images else 1


# (run, fields of the model)
RECIPES: dict[str, tuple[Any, dict]] = {
    "demo": (TrainConfig(share_images=True), {}),
    # The papers' pre-training (ACL appendix A): 100k steps of 4,096 pairs, linear decay after 10k
    # steps, heads and cross-modal layers at five times the encoders' learning rate.
    "pretrain": (
        TrainConfig(
            out_dir="out/pretrain",
            model="base",
            max_steps=100_000,
            batch_size=4096,
            micro_batch_size=32,
            learning_rate=1e-5,
            lr_mult_head=5.0,
            lr_mult_cross_modal=5.0,
            save_every=1000,
            eval_every=5000,
            eval_size=4096,
            num_workers=12,  # `bench.py data` says how many cores a GPU keeps busy
        ),
        {},
    ),
    # the pictures of `prepare.py openclipart` and `prepare.py tuxpaint`, on a CPU
    "clipart": (
        TrainConfig(
            out_dir="out/clipart",
            data_root="out/clipart_data",
            datasets=tuple(name for name, task in TASKS.items() if not task.recipe),
            objectives=("mlm", "itm", "itc"),
            transform="albef",
            max_steps=600,
            eval_every=300,
        ),
        {},
    ),
}
# the MLLM's, which are in train_llava.py
LLAVA_RECIPES = ("llava_demo", "llava_stage1", "llava_stage1_5", "llava_stage2")


# ---------------------------------------------------------------- data, tokenizer, model
def make_sources(run: TrainConfig, image_size: int) -> tuple[Source, Source]:
    """(training, held-out) captions: built-in scenes, or data_root's manifests and .arrow files."""
    if not run.data_root:
        training = demo_source("captions", "train", 40_000, run.seed, image_size)
        heldout = demo_source("captions", "heldout", run.eval_size, run.seed, image_size)
    else:
        training = open_sets("captions", run.data_root, run.datasets, "train", run.on_bad_sample)
        # the val split of the first set: of the papers' four, vg and sbu have none
        heldout = open_sets("captions", run.data_root, run.datasets[:1], "val")
    return training, heldout


def find_tokenizer(run: TowerRunConfig, source: Source | None = None) -> Tokenizer:
    """--tokenizer, or the one beside --text, or a small BPE trained on scenes or captions."""
    if run.tokenizer:
        return load_tokenizer(run.tokenizer)
    if run.text:
        text = find_folder(run.text, "tokenizer")
        return load_tokenizer(text if text.is_dir() else text.parent)
    if source is None or not run.data_root:
        return demo_tokenizer()
    return train_tokenizer((row["text"] for row in source.iterate_texts()), 8000)


def follow_encoders(run: TowerRunConfig, fields: dict) -> dict:
    """`fields` of the model, with those that follow from the encoders --vision and --text.

    Raises ValueError for a field that contradicts them.
    """
    if bool(run.vision) != bool(run.text):
        raise ValueError(
            "--vision and --text go together: both encoders are pre-trained, or neither"
        )
    if not run.vision:
        return fields
    # 1. what the encoders are; a run that goes on has it stored
    if is_beginning_gone(run):
        stored = stored_config(run, {})
        followed = {name: getattr(stored, name) for name in FOLLOWING_FIELDS}
    else:
        followed = config_of_encoders(run.vision, run.text)
    # 2. recipe and flags say the same or nothing
    for name, value in fields.items():
        if name in followed and followed[name] != value:
            flag = "text" if name in PUBLISHED_KEYS["text"] else "vision"
            raise ValueError(
                f"--{name} is {show(value)}, but --{flag} {getattr(run, flag)} has "
                f"{show(followed[name])}"
            )
    # 3. whole patches cover a picture: the preset's 288 pixels are 294 where a patch has 14
    preset = getattr(ManagerTowerConfig, run.model)()
    patch_size = followed.get("patch_size", preset.patch_size)
    image_size = fit_image_size(preset.image_size, patch_size)
    return {"image_size": image_size, **followed, **fields}


def make_model(
    run: TowerRunConfig, fields: dict, tokenizer: Tokenizer, **heads: Any
) -> ManagerTower:
    """The preset --model with `fields` replaced, sized for the tokenizer; encoders from --vision,
    --text or random.
    """
    fields = follow_encoders(run, fields)
    # without a token for each role the sizes that follow from the tokenizer mean nothing
    check_roles(tokenizer, MLM_ROLES if "mlm" in heads.get("heads", ()) else TOWER_ROLES)
    values: dict[str, Any] = {}
    if not run.text:
        values |= {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
    if run.model == "tiny":
        values["initializer_range"] = 0.1  # so narrow a model with 0.02 learns late
    preset = getattr(ManagerTowerConfig, run.model)
    config = preset(**{**values, **fields, **heads})
    check_tokenizer(tokenizer, config.vocab_size, config.pad_token_id)
    seed_all(run.seed, "model")
    model = ManagerTower(config)
    if run.vision and not is_beginning_gone(run):
        load_unimodal(model, run.vision, run.text)
    model.set_checkpointing(run.checkpointing)
    return model


# ---------------------------------------------------------------- held-out accuracy
@torch.no_grad()
def evaluate_pretraining(
    model: ManagerTower, dataset: Any, run: TrainConfig, world: World
) -> dict[str, float]:
    """Held-out accuracy of MLM (over all masked tokens) and ITM (over all pairs, half of them
    false), of all ranks.
    """
    model.eval()
    own_rows = Subset(dataset, range(world.rank, len(dataset), world.size))
    right = torch.zeros(2, dtype=torch.float64, device=world.device)  # of MLM, of ITM
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in DataLoader(
        own_rows, run.micro_batch_size, collate_fn=collate, num_workers=run.num_workers
    ):
        batch = to_device(batch, world.device)
        mask = batch["attention_mask"]
        is_masked = batch["mlm_labels"] != -100
        with autocast(run.precision, world.device):
            if "mlm" in run.objectives:
                text = model(batch["pixels"], batch["mlm_ids"], mask).text
                logits = model.heads["mlm"](text[is_masked])
                right[0] += (logits.argmax(-1) == batch["mlm_labels"][is_masked]).sum()
            if "itm" in run.objectives:
                pooled = model(batch["itm_pixels"], batch["input_ids"], mask).pooled
                logits = model.heads["itm"](pooled)
                right[1] += (logits.argmax(-1) == batch["itm_labels"]).sum()
        total[0] += is_masked.sum()
        total[1] += len(mask)
    accuracies = (world.sum(right) / world.sum(total).clamp(min=1)).tolist()
    metrics = {}
    for objective, accuracy in zip(("mlm", "itm"), accuracies, strict=True):
        if objective in run.objectives:
            metrics[f"{objective}_accuracy"] = accuracy
    return {**metrics, "score": sum(metrics.values()) / len(metrics)}


def masked_tokens(dataset: Any, samples: int) -> Iterator[tuple[tuple[int, int], int]]:
    """(the two neighbours, the true token) of every masked token of the first samples."""
    for row in range(min(samples, len(dataset))):
        item = dataset[row]
        ids = item["mlm_ids"].tolist()
        for i, label in enumerate(item["mlm_labels"].tolist()):
            if label != -100:
                yield (ids[i - 1], ids[(i + 1) % len(ids)]), label


def text_only_mlm_guess(training: Any, heldout: Any, samples: int = 2000) -> float:
    """MLM accuracy without pictures: the guess is the commonest token between the neighbours."""
    between: dict[tuple[int, int], Counter] = defaultdict(Counter)
    overall: Counter = Counter()
    for neighbours, label in masked_tokens(training, samples):
        between[neighbours][label] += 1
        overall[label] += 1
    hits = []
    for neighbours, label in masked_tokens(heldout, samples):
        guess = between.get(neighbours, overall).most_common(1)[0][0]
        hits.append(guess == label)
    return sum(hits) / max(1, len(hits))


# ---------------------------------------------------------------- the run
def pretrain(run: TrainConfig, fields: dict, world: World) -> None:
    make_plan(run, world)  # refuses a batch that cannot be dealt before anything is loaded
    fields = follow_encoders(run, fields)
    image_size = fields.get("image_size", ManagerTowerConfig.tiny().image_size)
    source, heldout_source = make_sources(run, image_size)
    tokenizer = find_tokenizer_of(run, lambda: find_tokenizer(run, source))
    model = make_model(run, fields, tokenizer, heads=run.objectives).to(world.device)
    config = model.config

    make_dataset = functools.partial(
        PretrainDataset,
        tokenizer=tokenizer,
        max_text_len=config.max_text_len,
        seed=run.seed,
        batch_size=run.batch_size,
        objectives=run.objectives,
    )
    dataset = make_dataset(
        source,
        transform=tower_transform(run.transform, config, train=True),
        # with ITC the false pairs are hard negatives of the batch, so the data need not load any
        share_images=run.share_images or "itc" in run.objectives,
        on_bad_sample=run.on_bad_sample,
    )
    heldout_all = make_dataset(
        heldout_source, transform=tower_transform(run.transform, config, train=False)
    )
    heldout = Subset(heldout_all, range(min(run.eval_size, len(heldout_all))))

    evaluate = functools.partial(evaluate_pretraining, model, heldout, run, world)
    identity = {
        "config": dataclasses.asdict(config),
        "tokenizer": tokenizer.digest(),
        "training_texts": source.digest,
    }
    checkpoint = Checkpoint(run, model, tokenizer.save, identity, world)
    encoders = f"{run.vision} and {run.text}" if run.vision else "random weights"
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    world.print(
        f"ManagerTower, {parameters:.2f}M parameters, encoders from {encoders}; {len(source)} "
        "captions of "
        f"{source.num_images} pictures, {len(heldout)} held out"
    )
    untrained = measure_untrained(run, evaluate)
    task = Pretraining(model, run.objectives, run.share_images)
    fit(run, task, dataset, evaluate, checkpoint, world, param_groups(model, run))
    if world.rank == 0:
        text_only = {"mlm_accuracy": text_only_mlm_guess(dataset, heldout), "itm_accuracy": 0.5}
        baselines = {**untrained, "text_only": text_only}
        summarize(run, checkpoint, baselines, next_commands(run))


def next_commands(run: TrainConfig) -> list[str]:
    """What to type after a run."""
    if run.data_root:
        return [
            f"python figures.py managers --checkpoint {run.out_dir} --data_root {run.data_root}"
        ]
    return [
        f"python figures.py managers --checkpoint {run.out_dir} --data demo",
        f"python finetune.py --task {next(iter(TASKS))} --init {run.out_dir} --data demo",
    ]


def idle_flags(run: TrainConfig) -> dict[str, str]:
    """The flags that mean nothing in this run -> why."""
    if run.data_root:
        return {}
    return dict.fromkeys(("datasets", "on_bad_sample"), "without --data_root: the scenes are drawn")


def is_llava(argv: list[str]) -> bool:
    """Whether the command line names one of the MLLM's recipes."""
    parser = make_parser("", add_help=False)
    parser.add_argument("--recipe", default="")
    return parser.parse_known_args(argv)[0].recipe in LLAVA_RECIPES


def main(argv: list[str]) -> None:
    if is_llava(argv):
        import train_llava  # the MLLM's training, which the two-tower model does not need

        return train_llava.main(argv)
    _, run, fields = parse_recipe(argv, RECIPES, "recipe", elsewhere=LLAVA_RECIPES)
    refuse_idle_flags(argv, idle_flags(run))
    return pretrain(run, fields, World(run.device))


if __name__ == "__main__":
    one_sentence(main)
