"""The downstream tasks, one row each: kind of data, heads, splits, recipe, and the papers' numbers.

A new task is a new row here, a parser of its records in data.py (unless its kind of records is
there already) and a head in model.py. Elsewhere a task's name stands only in the tables of raw
files, of scenes, of heads and of official weights.

Papers: ACL 2023, section 4, tables 1 and 3, appendix A; TCSVT 2025, table III. The recipes hold the
papers' values, and those of the released scripts where the papers say nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import HELD_OUT, PairDataset, Source, arrow_rows, open_source, zip_columns
from fields import show
from files import BadSample, need, read_json
from scenes import demo_source


@dataclass(frozen=True)
class DownstreamTask:
    """A row of the table.

    recipe, unimodal_recipe and demo are values of finetune.FinetuneConfig; model and unimodal_model
    are fields of ManagerTowerConfig.
    """

    kind: str  # of its records, a key of data.PARSERS; it decides the metric and the loss
    heads: tuple[str, ...]  # that are trained; the logits of the first one are measured
    splits: tuple[str, ...]  # that eval.py measures
    recipe: dict[str, Any] = field(default_factory=dict)  # empty: it is only evaluated
    model: dict[str, Any] = field(default_factory=dict)
    # with --init unimodal, where that differs
    unimodal_recipe: dict[str, Any] = field(default_factory=dict)
    unimodal_model: dict[str, Any] = field(default_factory=dict)
    demo: dict[str, Any] = field(default_factory=dict)  # on the built-in scenes, with a tiny model
    # split -> metric -> ManagerTower base with 4M VLP, in percent
    paper: dict[str, dict] = field(default_factory=dict)

    @property
    def is_retrieval(self) -> bool:
        return self.kind == "captions"


# minutes on a CPU
DEMO = {
    "batch_size": 64,
    "micro_batch_size": 64,
    "learning_rate": 5e-4,
    "weight_decay": 0.01,
    "warmup": 0.1,
    "lr_mult_head": 1.0,
    "lr_mult_cross_modal": 1.0,
    "transform": "albef",
    "max_steps": 500,
    "k_test": 16,
    "num_workers": 0,
    "log_every": 20,
    "save_every": 100,
}

# ---------------------------------------------------------------- the tasks
VQAV2_SPLITS = {"train_split": "train+val", "eval_split": "rest_val"}
VQAV2 = DownstreamTask(
    kind="questions",
    heads=("vqa",),
    # The papers train on val too: rest_val, a part of it, only shows that the run learns.
    splits=("rest_val",),
    # The released script has batch 504 and warmup 0.1.
    recipe={
        "epochs": 10.0,
        "batch_size": 576,
        "learning_rate": 9e-6,
        "weight_decay": 0.06,
        "warmup": 0.06,
        "lr_mult_head": 50.0,
        "transform": "albef_randaug_wohf",
        **VQAV2_SPLITS,
    },
    model={"image_size": 576, "head_hidden_scale": 2},
    unimodal_recipe={
        "epochs": 10.0,
        "batch_size": 512,
        "learning_rate": 2e-5,
        "weight_decay": 0.01,
        "warmup": 0.1,
        "lr_mult_head": 50.0,
        "transform": "albef_randaug_wohf",
        **VQAV2_SPLITS,
    },
    unimodal_model={"image_size": 576, "head_hidden_scale": 1},
    demo={**DEMO, "max_steps": 1000},  # a question's step is cheap, and there are six kinds of them
    paper={"rest_val": {"accuracy": "79.39 test-dev, 79.15 test-std"}},
)

NLVR2 = DownstreamTask(
    kind="statements",
    heads=("nlvr2",),
    splits=("dev", "test1"),
    recipe={
        "epochs": 5.0,
        "batch_size": 256,
        "learning_rate": 1.4e-5,
        "weight_decay": 0.01,
        "warmup": 0.1,
        "lr_mult_head": 10.0,
        "eval_split": "dev",
    },
    model={"image_size": 384},
    demo=DEMO,
    paper={"dev": {"accuracy": 82.81}, "test1": {"accuracy": 83.34}},
)

SNLI_VE = DownstreamTask(
    kind="hypotheses",
    heads=("snli_ve",),
    splits=("dev", "test"),
    recipe={
        "epochs": 4.0,
        "batch_size": 64,
        "learning_rate": 3e-6,
        "weight_decay": 0.01,
        "warmup": 0.06,
        "lr_mult_head": 10.0,
        "eval_split": "dev",
    },
    model={"image_size": 384, "head_hidden_scale": 2},
    demo=DEMO,
    paper={"dev": {"accuracy": 81.26}, "test": {"accuracy": 81.44}},
)

RETRIEVAL_RECIPE = {
    "batch_size": 512,
    "learning_rate": 6e-6,
    "weight_decay": 0.01,
    "warmup": 0.1,
    "lr_mult_head": 5.0,
    "eval_split": "test",
}
RETRIEVAL_MODEL = {"image_size": 384, "max_text_len": 40}

FLICKR30K = DownstreamTask(
    kind="captions",
    heads=("itm", "itc"),
    splits=("test",),
    recipe={"epochs": 20.0, **RETRIEVAL_RECIPE},
    model=RETRIEVAL_MODEL,
    demo=DEMO,
    # RMEAN is the number without VLP (ACL table 1)
    paper={"test": {"ir_r1": 86.56, "tr_r1": 95.64, "rmean": "93.97 without VLP"}},
)

COCO = DownstreamTask(  # not in the papers
    kind="captions",
    heads=("itm", "itc"),
    splits=("test",),
    recipe={"epochs": 10.0, **RETRIEVAL_RECIPE},
    model=RETRIEVAL_MODEL,
    demo=DEMO,
)

# pictures of two Debian packages, see prepare.py: `train.py --recipe clipart` learns on them
OPENCLIPART = DownstreamTask(kind="captions", heads=("itm", "itc"), splits=("test",))
TUXPAINT = DownstreamTask(kind="captions", heads=("itm", "itc"), splits=("test",))

TASKS = {
    "vqav2": VQAV2,
    "nlvr2": NLVR2,
    "snli_ve": SNLI_VE,
    "flickr30k": FLICKR30K,
    "coco": COCO,
    "openclipart": OPENCLIPART,
    "tuxpaint": TUXPAINT,
}

# the sets of images and captions that the papers pre-train on (4M images)
PRETRAINING_SETS = ("coco", "vg", "sbu", "cc3m")


def find_task(name: str) -> DownstreamTask:
    """A row of the table. Raises ValueError for a name that it does not have."""
    if name not in TASKS:
        raise ValueError(f"--task is {name!r}; it must be one of {', '.join(TASKS)}")
    return TASKS[name]


def task_of_heads(heads: tuple[str, ...]) -> str:
    """The first task that a model with these heads can do.

    The heads of pre-training do the first one of captions.
    """
    for name, task in TASKS.items():
        if task.heads[0] in heads:
            return name
    return next(name for name, task in TASKS.items() if task.is_retrieval)


def open_split(
    name: str,
    split: str,
    data_root: str,
    demo: bool,
    tokenizer: Any,
    transform: Any,
    max_text_len: int,
    image_size: int,
    answers: list[str] | None = None,
    source: Source | None = None,
) -> PairDataset:
    """One split of a task to measure on: below data_root, or 512 held-out scenes (demo). source:
    its rows, if they are open already.
    """
    task = find_task(name)
    if demo:
        source = demo_source(task.kind, "heldout", 512, image_size=image_size)
    elif source is None:
        source = open_sets(task.kind, data_root, (name,), split)
    return PairDataset(source, tokenizer, transform, max_text_len, answers=answers or ())


# ---------------------------------------------------------------- where the data of a set lie
# names of .arrow files in the ViLT family: set -> first part of the name, (set, split) -> its
# shards
ARROW_STEMS = {
    "coco": "coco_caption_karpathy",
    "flickr30k": "f30k_caption_karpathy",
    "cc3m": "conceptual_caption",
    "snli_ve": "snli",
}
ARROW_SHARDS = {
    ("coco", "train"): ["train", "restval"],  # the papers train on restval too
    ("flickr30k", "train"): ["train", "val"],  # and on Flickr30K's val
    ("vg", "train"): [""],
    ("sbu", "train"): [f"{i}" for i in range(9)],
    ("cc3m", "train"): [f"train_{i}" for i in range(31)],
    ("cc3m", "val"): ["val_0"],
}


def arrow_files(root: Path, name: str, split: str) -> list[Path]:
    """The .arrow shards of one split of a set; of VQAv2 those with normalised human answers
    ("_fix") come first.

    A file may be missing: the caller looks.
    """
    stem = ARROW_STEMS.get(name, name)
    files = []
    for shard in ARROW_SHARDS.get((name, split), [split]):
        file = root / f"{f'{stem}_{shard}'.rstrip('_')}.arrow"
        fixed = file.with_name(f"{file.stem}_fix.arrow")
        files.append(fixed if fixed.is_file() else file)
    return files


def split_files(root: str | Path, name: str, split: str) -> list[Path]:
    """The files of one split of a set: `<name>_<split>.jsonl`, or all its .arrow shards. Raises
    ValueError.
    """
    manifest = Path(root) / f"{name}_{split}.jsonl"
    if manifest.exists():
        return [manifest]
    files = arrow_files(Path(root), name, split)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        there = sorted(file.name for file in Path(root).glob("*.jsonl"))
        raise ValueError(
            f"{root} has no {manifest.name}, and of its .arrow files it lacks "
            f"{', '.join(missing)}; its manifests: {', '.join(there[:12]) or 'none'}"
        )
    return files


def check_names(names: Sequence[str], what: str) -> None:
    """Raises ValueError for a name of a set or split that is empty, or is given twice."""
    for name in names:
        if not name.strip():
            raise ValueError(f"the name of a {what} is empty, in {show(','.join(names))}")
        if names.count(name) > 1:
            raise ValueError(f"the {what} {show(name)} is named twice")


def open_sets(
    kind: str,
    root: str | Path,
    names: tuple[str, ...],
    split: str,
    on_bad_sample: str = HELD_OUT,
) -> Source:
    """The sets `names` of a folder, one after the other; split "train+val" takes both. Or `root` is
    one file.

    Names: coco, flickr30k, vg, sbu, cc3m, vqav2, vgqa_coco, nlvr2, snli_ve, or the <name> of any
    <name>_<split>.jsonl.
    """
    if Path(root).is_file():
        return open_source(kind, [Path(root)], on_bad_sample)
    if not Path(root).is_dir():
        raise ValueError(f"--data_root {root}: there is no such folder or file")
    splits = split.split("+")
    check_names(names, "set")
    check_names(splits, "split")
    files = []
    for name in names:
        for part in splits:
            files += split_files(root, name, part)
    if not files:
        raise ValueError(f"{root} is a folder, of which no sets were named")
    return open_source(kind, files, on_bad_sample)


def read_answers(file: Path) -> list[str]:
    """An answers.json: a list of different texts. Raises ValueError for anything else.

    One of them may be empty: so the answer "a" is normalised.
    """
    answers = read_json(file, list)
    if not answers:
        raise ValueError(f"{file} is empty; it must be the list of a vocabulary's answers")
    seen: set[str] = set()
    for number, answer in enumerate(answers):
        place = f"{file}, entry {number}"
        if not isinstance(answer, str):
            raise ValueError(f"{place} is {show(answer)}; it must be a text")
        if answer in seen:
            raise ValueError(f"{place}: the answer {show(answer)} is there twice")
        seen.add(answer)
    return answers


def labels_of_row(arrow_row: dict) -> list[tuple[int, str]]:
    """(number of an answer, the answer) of all answers in one row of a vqav2_*.arrow file."""
    pairs: list[tuple[int, str]] = []
    if not arrow_row["answers"]:
        return pairs
    for answers, labels in zip_columns(arrow_row, "answers", "answer_labels"):
        if answers:
            columns = {"answers": answers, "answer_labels": labels}
            for answer, label in zip_columns(columns, "answers", "answer_labels"):
                number = need({"answer_labels": label}, "answer_labels", int)
                pairs.append((number, need({"answers": answer}, "answers", str)))
    return pairs


class Vocabulary:
    """Numbers of answers, gathered from many files, which must agree on them."""

    def __init__(self) -> None:
        self.answers: dict[int, str] = {}
        self.numbers: dict[str, int] = {}
        self.places: dict[int, str] = {}  # where each number was met first

    def add(self, number: int, answer: str, place: str) -> None:
        """place: file and row. Raises ValueError if the number or the answer is known otherwise."""
        known_answer = self.answers.setdefault(number, answer)
        known_number = self.numbers.setdefault(answer, number)
        first_place = self.places.setdefault(number, place)
        if known_answer != answer:
            raise ValueError(
                f"{place}: 'answer_labels' {number} is {show(answer)}, but {show(known_answer)} in "
                f"{first_place}; all vqav2_*.arrow files must number the answers alike"
            )
        if known_number != number:
            raise ValueError(
                f"{place}: 'answer_labels' of {show(answer)} is {number}, but {known_number} in "
                f"{self.places[known_number]}; all vqav2_*.arrow files must number the answers "
                "alike"
            )


ANSWER_COLUMNS = {"answers": "list of list of text", "answer_labels": "list of list of number"}


def load_answers(root: str | Path) -> list[str]:
    """The VQA vocabulary: answers.json (a list), or what vqav2_*.arrow files hold.

    Raises ValueError if there is none, or where files disagree on it.
    """
    file = Path(root) / "answers.json"
    if file.exists():
        return read_answers(file)
    vocabulary = Vocabulary()
    for path in sorted(Path(root).glob("vqav2_*.arrow")):
        for number, row in enumerate(arrow_rows(path, ANSWER_COLUMNS)):
            place = f"{path}, row {number}"
            try:
                pairs = labels_of_row(row)
            except BadSample as error:
                raise ValueError(f"{place}: {error}") from None
            for label, answer in pairs:
                vocabulary.add(label, answer, place)
    answers = vocabulary.answers
    if not answers or sorted(answers) != list(range(len(answers))):
        raise ValueError(
            f"no VQA vocabulary in {root}: neither answers.json nor vqav2_*.arrow files with all "
            "answers"
        )
    return [answers[i] for i in range(len(answers))]


# ---------------------------------------------------- what is known without looking at the picture
def true_answers(source: Source, row: dict) -> dict:
    """{answer or label: score} of a row."""
    if source.kind == "questions":
        return row["answers"] or {}
    return {row["label"]: 1.0}


def text_only_guess(
    source: Source, heldout: Source, question_type: str | None = None
) -> dict[str, float]:
    """Accuracy of the commonest answer, and of the commonest answer to the same text.

    question_type: of the held-out rows that are counted; None counts all.
    """
    overall: Counter = Counter()
    by_text: dict[str, Counter] = defaultdict(Counter)
    for row in source.iterate_texts():
        by_text[row["text"]].update(true_answers(source, row))
        overall.update(true_answers(source, row))
    totals: Counter = Counter()
    num_rows = 0
    for row in heldout.iterate_texts():
        if question_type is not None and row["question_type"] != question_type:
            continue
        num_rows += 1
        same_text = by_text.get(row["text"]) or overall
        for name, counts in (("majority", overall), ("text_only", same_text)):
            # there is no guess if no question has an answer with a score
            for guess, _ in counts.most_common(1):
                totals[name] += true_answers(heldout, row).get(guess, 0.0)
    return {name: totals[name] / num_rows for name in ("majority", "text_only")}


def baselines(source: Source, heldout: Source) -> dict[str, dict]:
    """What a model has to beat: chance of retrieval, else guesses from the text alone."""
    if source.kind == "captions":
        chance = {}
        for direction in ("ir", "tr"):
            for k in (1, 5, 10):
                chance[f"{direction}_r{k}"] = min(1.0, k / heldout.num_images)
        return {"chance": chance}
    return {name: {"accuracy": value} for name, value in text_only_guess(source, heldout).items()}
