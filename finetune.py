r"""Fine-tuning on VQAv2, NLVR2, SNLI-VE, Flickr30K or COCO, in the loop of loop.py.

Paper: ManagerTower (ACL 2023), section 4.

    # the built-in scenes
    python finetune.py --task vqav2 --data demo --init out/demo
    # from a checkpoint of ours
    torchrun --standalone --nproc_per_node 8 finetune.py --task vqav2 --data_root D \
        --init out/pretrain
    # without vision-language pre-training
    torchrun ... --init unimodal --vision CLIP --text ROBERTA
    # from the authors' checkpoint
    torchrun ... --init official:mt_pretrain.ckpt --tokenizer ROBERTA

The recipes and everything else that a task needs are in tasks.py.
"""

import dataclasses
import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data import PairDataset, Source
from eval import check_vocabulary, evaluate
from fields import make_parser, option, parse_recipe
from files import write_json, write_text
from hub import find_folder
from images import tower_transform
from loop import (
    Checkpoint,
    Task,
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
from objectives import Classification, Retrieval
from scenes import DEMO_ANSWERS, demo_source
from tasks import TASKS, DownstreamTask, baselines, load_answers, open_sets
from tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from train import find_tokenizer, make_model
from weights import convert_weights, is_mllm_config, load_model, read_config_values
from world import MOST_WORKERS, World, one_sentence, seed_all

OFFICIAL = "official:"
UNIMODAL = "unimodal"


@dataclass
class FinetuneConfig(TowerRunConfig):
    """A fine-tuning run; its defaults are what the recipes in tasks.py have in common."""

    architecture: ClassVar[type] = ManagerTowerConfig

    init: str = option(
        "",
        "a checkpoint folder | unimodal | official:FILE.ckpt, or official: and a folder of HF's "
        "BridgeTower",
    )
    data: str = option(
        "",
        "demo = the built-in scenes, of which eval_size records are held out",
        choices=("", "demo"),
    )
    train_split: str = option("train", "split to train on; a+b is both")
    eval_split: str = option("val", "split to measure on")
    k_test: int = option(128, "retrieval: candidates to re-rank", least=1)
    epochs: float = option(10.0, "passes over the data, where max_steps is 0", above=0)
    max_steps: int = option(0, "optimizer updates; 0 = as many as the epochs take", least=0)
    model: str = option("base", "the preset of --init unimodal", choices=("tiny", "base", "large"))
    transform: str = option(
        "albef_randaug_wc",
        "what a picture goes through",
        choices=("clip", "albef", "albef_randaug_wc", "albef_randaug_wohf"),
    )
    micro_batch_size: int = option(8, "most rows of a process in one backward pass", least=1)
    lr_mult_cross_modal: float = option(
        5.0, "learning rate of the cross-modal part, in units of learning_rate", least=0
    )
    num_workers: int = option(
        12, "processes that load data, for each training process", least=0, most=MOST_WORKERS
    )
    save_every: int = option(500, "steps between two checkpoints", least=1)
    eval_every: int = option(0, "steps between two evaluations; 0 = only at the end", least=0)

    def check_start(self) -> None:
        """Raises ValueError where it is not said what to start from, or where the data are."""
        if bool(self.data) == bool(self.data_root):
            raise ValueError(
                "say where the data are: --data_root FOLDER, or --data demo for the built-in ones"
            )
        if not self.init:
            raise ValueError(
                "say what to start from: --init CHECKPOINT, --init official:FILE.ckpt, or --init "
                "unimodal"
            )
        encoders_needed = self.init == UNIMODAL
        if bool(self.vision) != encoders_needed or bool(self.text) != encoders_needed:
            raise ValueError(
                "--init unimodal needs --vision and --text, the two encoders; any other --init has "
                "its own"
            )


def recipe(name: str, init: str, data: str) -> tuple[FinetuneConfig, dict]:
    """The defaults of a task: the run, and the fields of the model that it changes."""
    task = TASKS[name]
    out_dir = f"out/{name}"
    if data == "demo":
        return FinetuneConfig(
            out_dir=out_dir, eval_split=task.recipe.get("eval_split", "val"), **task.demo
        ), {}
    if init == UNIMODAL and task.unimodal_recipe:
        return FinetuneConfig(out_dir=out_dir, **task.unimodal_recipe), task.unimodal_model
    return FinetuneConfig(out_dir=out_dir, **task.recipe), task.model


# ---------------------------------------------------------------- tokenizer, model, data
def find_init_tokenizer(run: FinetuneConfig) -> Tokenizer:
    """--tokenizer, or the one in --init's folder, or with --init unimodal the one beside --text."""
    if run.tokenizer or run.init == UNIMODAL:
        return find_tokenizer(run)
    try:
        return load_tokenizer(run.init.removeprefix(OFFICIAL))
    except ValueError as error:
        raise ValueError(f"--init {run.init}: {error}; or give --tokenizer") from None


def convert_official(run: FinetuneConfig, world: World) -> Path:
    """The authors' checkpoint of --init as a folder of ours, below out_dir."""
    folder = Path(run.out_dir) / "official"
    source = run.init.removeprefix(OFFICIAL)
    mark = folder / "converted_from.txt"  # so that only our own folder is written anew
    if world.rank == 0:
        if folder.exists() and not mark.exists():
            raise ValueError(
                f"{folder} is there, and was not made by --init {OFFICIAL}; move it away, or "
                "choose another --out_dir"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(mark, f"{source}\n")
            convert_weights(source, folder)
        except OSError as error:
            raise ValueError(f"--init {run.init}: {error}") from error
    world.barrier()
    return folder


def initial_model(
    run: FinetuneConfig, fields: dict, tokenizer: Tokenizer, world: World
) -> ManagerTower:
    """What --init says, with the `fields` of its config replaced (heads among them)."""
    if is_beginning_gone(run):
        return ManagerTower(stored_config(run, fields))
    if run.init == UNIMODAL:
        return make_model(run, fields, tokenizer)
    is_official = run.init.startswith(OFFICIAL)
    folder = convert_official(run, world) if is_official else find_folder(run.init)
    if is_mllm_config(read_config_values(folder)):
        raise ValueError(f"--init {run.init} is a LLaVA-OV-Manager; it must be a ManagerTower")
    seed_all(run.seed, "model")  # the new heads
    model = load_model(folder, **fields)
    try:
        check_tokenizer(tokenizer, model.config.vocab_size, model.config.pad_token_id)
    except ValueError as error:
        raise ValueError(f"--init {run.init}: {error}; give its own with --tokenizer") from None
    model.set_checkpointing(run.checkpointing)
    return model


def open_files(run: FinetuneConfig, name: str) -> tuple[Source, Source]:
    """(training, held-out) rows of a task, from --data_root. Raises ValueError for questions that
    have no answers.
    """
    kind = TASKS[name].kind
    training = open_sets(kind, run.data_root, (name,), run.train_split, run.on_bad_sample)
    heldout = open_sets(kind, run.data_root, (name,), run.eval_split)
    if training.has_answers is False:
        raise ValueError(
            f"--train_split {run.train_split} of {name} has no labels, so nothing can be learnt "
            "from it"
        )
    if heldout.has_answers is False:
        raise ValueError(
            f"--eval_split {run.eval_split} of {name} has no labels, so nothing can be measured on "
            "it"
        )
    return training, heldout


def draw_scenes(run: FinetuneConfig, name: str, image_size: int) -> tuple[Source, Source]:
    """(training, held-out) rows of a task, of built-in scenes."""
    kind = TASKS[name].kind
    training = demo_source(kind, "train", 20_000, run.seed, image_size)
    heldout = demo_source(kind, "heldout", run.eval_size, run.seed, image_size)
    return training, heldout


def find_answers(run: FinetuneConfig, task: DownstreamTask) -> list[str]:
    """The vocabulary of answers; empty for a task without one."""
    if task.kind != "questions":
        return []
    return DEMO_ANSWERS if run.data else load_answers(run.data_root)


def save_extras(tokenizer: Tokenizer, answers: list[str], folder: Path) -> None:
    tokenizer.save(folder)
    if answers:
        write_json(folder / "answers.json", answers)


# ---------------------------------------------------------------- the run
def measure(
    model: ManagerTower, dataset: PairDataset, name: str, run: FinetuneConfig
) -> dict[str, float]:
    """The task's metrics and their "score". Without gradients more fits into memory than a
    micro-batch.
    """
    metrics = evaluate(
        model, dataset, name, max(64, run.micro_batch_size), run.num_workers, run.k_test
    )
    score = metrics["rmean"] if "rmean" in metrics else metrics["accuracy"]
    numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
    return {**numbers, "score": score}


def announce(run: FinetuneConfig, name: str, source: Source, heldout: Source, world: World) -> None:
    note = ""
    splits = run.train_split.split("+")
    if not run.data and run.eval_split == "rest_val" and "val" in splits:
        part = "rest_val is a part of val: it is held out only with"
        note = f". {part} --train_split train+trainable_val"
    world.print(
        f"{name}: {len(source)} rows to train on, {len(heldout)} to measure on, from "
        f"{run.init}{note}"
    )


def count_steps(run: FinetuneConfig, num_rows: int) -> int:
    """As many updates as --epochs take. Raises ValueError for more than can be counted."""
    steps = run.epochs * num_rows / run.batch_size
    if not steps < 2**53:
        raise ValueError(f"--epochs {run.epochs:g} of {num_rows} rows are more than can be trained")
    return math.ceil(steps)


def finetune(name: str, run: FinetuneConfig, fields: dict, world: World) -> None:
    make_plan(run, world)  # refuses a batch that cannot be dealt before anything is loaded
    task = TASKS[name]
    tokenizer = find_tokenizer_of(run, lambda: find_init_tokenizer(run))
    answers = find_answers(run, task)
    # all texts are read before the model is
    files = None if run.data else open_files(run, name)
    if files and answers:
        check_vocabulary(files[0], answers)
    model_fields: dict[str, Any] = {**fields, "heads": task.heads}
    if answers:
        model_fields["num_answers"] = len(answers)
    model = initial_model(run, model_fields, tokenizer, world).to(world.device)
    config = model.config

    source, heldout = files or draw_scenes(run, name, config.image_size)
    if not run.max_steps:
        run = dataclasses.replace(run, max_steps=count_steps(run, len(source)))
    transform = functools.partial(tower_transform, run.transform, config)
    dataset = PairDataset(
        source,
        tokenizer,
        transform(train=True),
        config.max_text_len,
        run.seed,
        run.on_bad_sample,
        answers,
    )
    heldout_dataset = PairDataset(
        heldout, tokenizer, transform(train=False), config.max_text_len, answers=answers
    )

    evaluate_heldout = functools.partial(measure, model, heldout_dataset, name, run)
    identity = {
        "task": name,
        "config": dataclasses.asdict(config),
        "tokenizer": tokenizer.digest(),
        "training_texts": source.digest,
    }
    if answers:
        # the classes stand for them in their order
        identity["answers"] = hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]
    checkpoint = Checkpoint(
        run, model, functools.partial(save_extras, tokenizer, answers), identity, world
    )
    announce(run, name, source, heldout, world)
    untrained = measure_untrained(run, evaluate_heldout)
    job: Task = Retrieval(model) if task.is_retrieval else Classification(model, task.heads[0])
    fit(run, job, dataset, evaluate_heldout, checkpoint, world, param_groups(model, run))
    if world.rank == 0:
        where = "--data demo" if run.data else f"--data_root {run.data_root}"
        command = f"python eval.py --task {name} --checkpoint {run.out_dir} {where}"
        summarize(run, checkpoint, {**untrained, **baselines(source, heldout)}, [command])


def idle_flags(name: str, run: FinetuneConfig) -> dict[str, str]:
    """The flags that mean nothing in this run -> why."""
    idle = {}
    if run.data:
        for flag in ("train_split", "eval_split", "on_bad_sample"):
            idle[flag] = "with --data demo: the scenes are drawn"
    else:
        idle["eval_size"] = "with --data_root: all of --eval_split is measured on"
    if not TASKS[name].is_retrieval:
        idle["k_test"] = f"with --task {name}: only retrieval ranks candidates"
    if run.init != UNIMODAL:
        idle["model"] = f"with --init {run.init}, which has its own sizes"
    if run.max_steps:
        idle["epochs"] = f"with --max_steps {run.max_steps}; they count where that is 0"
    return idle


def main(argv: list[str]) -> None:
    first = make_parser("", add_help=False)  # the defaults depend on these two
    first.add_argument("--init", default="")
    first.add_argument("--data", default="")
    given = first.parse_known_args(argv)[0]
    recipes = {
        name: recipe(name, given.init, given.data) for name, task in TASKS.items() if task.recipe
    }
    name, run, fields = parse_recipe(argv, recipes, "task")
    run.check_start()
    refuse_idle_flags(argv, idle_flags(name, run))
    finetune(name, run, fields, World(run.device))


if __name__ == "__main__":
    one_sentence(main)
