"""Evaluation of a downstream task with the papers' metrics: accuracy, and retrieval with
re-ranking.

    python eval.py --task vqav2 --checkpoint out/vqav2 --data demo
    torchrun --nproc_per_node 8 eval.py --task flickr30k --checkpoint F --data_root D
    python eval.py chat_task --checkpoint F --questions Q.jsonl --metric anls    # the MLLM
    python eval.py lmms --checkpoint F --tasks chartqa,ai2d                      # the MLLM

ACL 2023, section 4, tables 1 and 3; TCSVT 2025, table III. `python eval.py -h` lists all flags;
what a task needs is in tasks.py. Every process evaluates its share of the batches. The results are
gathered once, and the metrics (fractions; the printed table shows percent) come from the complete
list in the order of the rows, so they do not depend on the number of processes.

Shapes: B batch, N experts, L tokens, D width, C contrastive width, I images, M captions, P pairs of
a caption and an image, S side of an image.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data import HELD_OUT, PairDataset, Source, batches, group_by_picture, tolerate
from fields import FlagError, check_fields, option, parse_flags, show
from files import (
    MOST_BYTES_OF_DATA,
    BadSample,
    as_dict,
    check_output,
    is_our_picture,
    need,
    read_json,
    save_json,
)
from hub import default_output, find_folder
from metrics import mean_by, official_vqa_accuracy, recall
from model import ManagerTower
from objectives import class_logits
from tasks import TASKS, check_names, find_task, load_answers, open_sets, open_split
from train import load_checkpoint
from weights import Loaded
from world import MOST_WORKERS, collect, evaluating, one_sentence, ranks, to_device

MOVED = {  # commands of the first edition -> where they are now
    "ask": "ask.py question",
    "match": "ask.py match",
    "search": "ask.py search",
    "chat": "ask.py chat",
    "managers": "figures.py managers",
    "grid": "figures.py grid",
    "curves": "figures.py curves",
}


@dataclass
class EvalConfig:
    """Evaluate a checkpoint on a downstream task; prints the metrics, and writes them as JSON."""

    task: str = option(help="what to measure", choices=tuple(TASKS))
    checkpoint: str = option(help="folder of the model")
    data: str = option(
        "", "demo = the held-out built-in scenes, instead of data_root", choices=("", "demo")
    )
    data_root: str = option("", "folder of manifests or .arrow files")
    split: str = option(
        "", "splits to measure on, comma-separated; none = those of the task in tasks.py"
    )
    submit: str = option("", "file for the answers to all questions, as EvalAI takes them")
    annotations: str = option(
        "", "v2_mscoco_val2014_annotations.json: gives the official VQA accuracy too"
    )
    batch_size: int = option(64, "rows of a batch", least=1)
    k_test: int = option(128, "retrieval: candidates to re-rank", least=1)
    memory_gb: float = option(16.0, "retrieval: host memory of a process for experts", least=0)
    num_workers: int = option(
        0, "processes that load data, for each process", least=0, most=MOST_WORKERS
    )
    out: str = option("", "file of the metrics; none = eval.json in the folder of the model")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_fields(self)
        check_names(self.splits(), "--split")
        if self.submit or self.annotations:
            self.check_questions()
        check_data_flags(self.data, self.data_root)
        if self.annotations and self.data:
            raise ValueError(
                f"--annotations are for --data_root; the scenes of --data {self.data} are not in "
                f"{self.annotations}"
            )
        self.check_split()

    def check_split(self) -> None:
        """Raises ValueError for a file whose split is not named. The demo has one split only."""
        is_one_split = bool(self.split) and "," not in self.split
        if Path(self.data_root).is_file() and not is_one_split:
            raise ValueError(
                f"--data_root {self.data_root} is a file, which holds one split: say which by "
                "--split NAME"
            )

    def check_questions(self) -> None:
        """Raises ValueError where there are no questions, or where one file is to hold the answers
        of several splits.
        """
        with_questions = [name for name, task in TASKS.items() if task.kind == "questions"]
        if self.task not in with_questions:
            raise ValueError(
                f"--submit and --annotations are for {', '.join(with_questions)}, not for "
                f"{self.task}"
            )
        if self.submit and len(self.splits()) > 1:
            raise ValueError(f"--submit takes one split, but --split is {self.split}")

    def splits(self) -> list[str]:
        """The names of the splits to measure on."""
        if self.data:
            return ["demo"]
        if self.split:
            return self.split.split(",")
        return list(find_task(self.task).splits)


def check_data_flags(data: str, data_root: str) -> None:
    """Raises ValueError unless exactly one of the two flags says where the data are."""
    if bool(data) == bool(data_root):
        raise ValueError("say where the data are: either --data demo or --data_root FOLDER")


def check_picture_output(flag: str, path: str | Path) -> None:
    """Raises ValueError if a figure cannot be written there, or would replace another file."""
    check_output(flag, str(path))
    name = show(str(path))
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{flag} is {name}; it must end in .png")
    if os.path.exists(path) and not is_our_picture(path):
        raise ValueError(
            f"{flag} {name} is there and is no figure of ours, so it is kept; choose another name"
        )


def is_result(path: Path) -> bool:
    """Whether a file is one that --out or --submit has written."""
    try:
        content = read_json(path)
    except (ValueError, OSError):
        return False
    if isinstance(content, dict):
        return {"checkpoint", "task", "splits"} <= content.keys()
    keys = {"question_id", "answer"}
    return isinstance(content, list) and all(as_dict(row).keys() == keys for row in content)


def check_results(config: EvalConfig) -> None:
    """Raises ValueError for outputs that cannot be written, or would replace another file."""
    outputs = (("--out", config.out), ("--submit", config.submit))
    for flag, path in outputs:
        check_output(flag, path)
        if path and Path(path).exists() and not is_result(Path(path)):
            raise ValueError(
                f"{flag} {path} is there and is no result of eval.py, so it is kept; choose "
                "another name"
            )
    if config.out and Path(config.out).resolve() == Path(config.submit).resolve():
        raise ValueError(f"--out and --submit are the same file, {config.out}")


# ---------------------------------------------------------------- classification
class Prediction(NamedTuple):
    """What a model says to one row."""

    choice: int  # the class with the highest logit
    score: float | None  # soft score of a chosen answer, else 1 or 0; None without labels
    question_id: int | None = None
    question_type: str | None = None


def check_finite(scores: Tensor) -> None:
    """Raises ValueError for scores that say nothing, however finite the weights are."""
    if not scores.isfinite().all():
        raise ValueError("the model's scores are not finite: its weights are damaged or too large")


def predict(
    model: ManagerTower, dataset: Any, task: str, batch_size: int = 64, num_workers: int = 0
) -> list[Prediction]:
    """The predictions for all rows of a task that is no retrieval, in their order; complete on
    every process.
    """
    head = find_task(task).heads[0]
    parts: list[tuple[int, Prediction]] = []
    with evaluating(model) as device:
        for rows, batch in batches(dataset, batch_size, num_workers):
            logits = class_logits(model, head, to_device(batch, device)).float()  # (B, classes)
            check_finite(logits)
            choices = logits.argmax(-1).cpu()
            scores = score_choices(choices, batch)
            missing = [None] * len(rows)
            question_ids = batch.get("question_id", missing)
            question_types = batch.get("question_type", missing)
            for i, row in enumerate(rows):
                prediction = Prediction(
                    int(choices[i]), scores[i], question_ids[i], question_types[i]
                )
                parts.append((row, prediction))
    return collect(parts)


def score_choices(choices: Tensor, batch: dict) -> list:
    """The score of each choice (B,): that of the answer where there are soft targets (B, answers),
    else 1 or 0; None without labels.
    """
    if "targets" in batch:
        return batch["targets"].gather(1, choices[:, None])[:, 0].tolist()
    if "label" in batch:
        return (choices == batch["label"]).float().tolist()
    return [None] * len(choices)


def accuracy(predictions: list[Prediction]) -> dict[str, Any]:
    """{"accuracy", "count"}, and "per_question_type" where there are types; without labels only
    the count.
    """
    scores = []
    for prediction in predictions:
        if prediction.score is None:
            return {"count": len(predictions)}
        scores.append(prediction.score)
    metrics: dict[str, Any] = {"accuracy": math.fsum(scores) / len(scores), "count": len(scores)}
    question_types = [prediction.question_type for prediction in predictions]
    means = mean_by(scores, question_types)
    if means:
        metrics["per_question_type"] = means
    return metrics


def evaluate(
    model: ManagerTower,
    dataset: PairDataset,
    task: str,
    batch_size: int = 64,
    num_workers: int = 0,
    k_test: int = 128,
    memory_gb: float = 16.0,
) -> dict[str, Any]:
    """The metrics of a task: accuracy, or recall with re-ranking. To be called by all processes."""
    if not find_task(task).is_retrieval:
        return accuracy(predict(model, dataset, task, batch_size, num_workers))
    retrieval = group_by_picture(dataset.source)
    input_ids, attention_mask = dataset.tokenizer(retrieval.texts, dataset.max_text_len)
    scores = retrieval_scores(
        model,
        functools.partial(load_pixels, dataset, retrieval.records),
        len(retrieval.records),
        input_ids,
        attention_mask,
        k_test,
        None,
        batch_size,
        memory_gb,
        num_workers,
    )
    metrics = recall(scores, torch.tensor(retrieval.image_index))
    return {**metrics, "images": len(retrieval.records), "texts": len(retrieval.texts)}


def load_pixels(dataset: PairDataset, records: list[int], index: int) -> Tensor:
    """The picture of record records[index], (3, S, S)."""
    try:
        picture = dataset.source.images(records[index])[0]
    except BadSample as error:
        tolerate(error, HELD_OUT, 0, set())
        raise
    return dataset.transform(picture, None)


# ---------------------------------------------------------------- experts, kept or computed again
def host_dtype(model: ManagerTower) -> torch.dtype:
    """The type in which experts wait in host memory. Under `evaluating`'s autocast the next layer
    rounds them to bf16 anyway, so that half the bytes lose nothing.
    """
    on_cuda = next(model.parameters()).is_cuda
    return torch.bfloat16 if on_cuda else torch.float32


class TextExperts:
    """The experts of captions, by index: kept in host memory if all fit into `budget` bytes, else
    computed again.

    vectors: their ITC unit vectors (M, C), None without an ITC head; free: what is left of the
    budget.
    """

    def __init__(
        self,
        model: ManagerTower,
        input_ids: Tensor,  # (M, L)
        attention_mask: Tensor,  # (M, L)
        batch_size: int,
        budget: float,
    ):
        self.model = model
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.kept: Tensor | None = None
        self.free = budget

        dtype = host_dtype(model)
        num_captions, length = input_ids.shape
        shape = (num_captions, model.config.num_experts("text"), length, model.config.text_width)
        needed = math.prod(shape) * dtype.itemsize
        kept = None
        if needed <= budget:
            kept = torch.empty(shape, dtype=dtype)  # (M, N, L, D)
            self.free = budget - needed

        vectors = []
        for start in range(0, num_captions, batch_size):
            experts = self[start : start + batch_size]
            if "itc" in model.heads:
                mask = attention_mask[start : start + batch_size].to(experts.device)
                vectors.append(model.contrast_text(experts, mask).float().cpu())
            if kept is not None:
                kept[start : start + batch_size] = experts.cpu()
        self.vectors = torch.cat(vectors) if vectors else None
        self.kept = kept  # only now, as __getitem__ reads it

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """n captions, by a slice or an index tensor (n,) on the CPU -> (n, N, L, D) on the model's
        device.
        """
        device = next(self.model.parameters()).device
        if self.kept is not None:
            return self.kept[index].to(device)
        input_ids = self.input_ids[index].to(device)
        return self.model.encode_text(input_ids, self.attention_mask[index].to(device))


class ImageExperts:
    """The experts of this process's images, batch by batch: (rows, experts (B, N, L, D)).

    The first pass keeps them in host memory if all fit into `budget` bytes; then the second one
    takes them from there, else it encodes the images again.
    """

    def __init__(
        self,
        model: ManagerTower,
        load: Callable[[int], Tensor],
        num_images: int,
        batch_size: int,
        num_workers: int,
        budget: float,
    ):
        self.model = model
        self.load = load
        self.num_images = num_images
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.budget = budget
        self.kept: list[tuple[range, Tensor]] = []

    def load_batch(self, numbers: list[int]) -> dict[str, Tensor]:
        """Image numbers -> pixels (B, 3, S, S)."""
        return {"pixels": torch.stack([self.load(number) for number in numbers])}

    def __iter__(self) -> Iterator[tuple[range, Tensor]]:
        device = next(self.model.parameters()).device
        if self.kept:
            for rows, experts in self.kept:
                yield rows, experts.to(device)
            return

        kept: list[tuple[range, Tensor]] = []
        free = self.budget
        numbers = range(self.num_images)
        for rows, batch in batches(numbers, self.batch_size, self.num_workers, self.load_batch):
            experts = self.model.encode_image(batch["pixels"].to(device))  # (B, N, L, D)
            if free >= 0:
                on_host = experts.to("cpu", host_dtype(self.model))
                kept.append((rows, on_host))
                free -= on_host.nbytes
            if free < 0:
                kept.clear()
            yield rows, experts
        self.kept = kept


# ---------------------------------------------------------------- retrieval
def choose_pairs(similarity: Tensor, k_images: int, k_texts: int) -> Tensor:
    """Which pairs the ITM head scores, (I, M): the k_images most similar images of each caption and
    the k_texts most similar captions of each image. similarity: (I, M).
    """
    chosen = torch.zeros(similarity.shape, dtype=torch.bool)
    for dim, k in ((0, k_images), (1, k_texts)):
        best = similarity.topk(min(k, similarity.shape[dim]), dim=dim).indices
        chosen.scatter_(dim, best, True)
    return chosen


def match_logits(
    model: ManagerTower, texts: TextExperts, images: Tensor, pairs: Tensor, batch_size: int
) -> Tensor:
    """ITM logit "match" (P,) on the CPU, of pairs (P, 2) = (caption, place in this batch of image
    experts (B, N, L, D)). The pairs are sorted by caption.
    """
    device = images.device
    scores = [torch.empty(0)]
    for part in pairs.split(batch_size):
        captions = part[:, 0]
        places = part[:, 1].to(device)
        # as they are sorted, a part has few different captions: each is fetched once
        different, position = captions.unique(return_inverse=True)
        text_experts = texts[different][position.to(device)]
        mask = texts.attention_mask[captions].to(device)
        pooled = model.fuse_pooled(text_experts, images[places], mask)
        logits = model.heads["itm"](pooled)  # (P, 2)
        scores.append(logits[:, 1].float().cpu())
    return torch.cat(scores)


def score_chosen(
    model: ManagerTower,
    texts: TextExperts,
    images: ImageExperts,
    chosen: Tensor,
    batch_size: int,
) -> Tensor:
    """ITM logits of the chosen pairs of all processes, in the order of chosen (I, M)."""
    parts = []
    for rows, experts in images:
        wanted = chosen[rows.start : rows.stop]  # (B, M)
        pairs = wanted.T.nonzero()  # (P, 2) = (caption, place of the image), sorted by caption
        scores = torch.empty(wanted.shape)
        scores[pairs[:, 1], pairs[:, 0]] = match_logits(model, texts, experts, pairs, batch_size)
        parts.append((rows[0], scores[wanted]))
    return torch.cat(collect(parts))


def retrieval_scores(
    model: ManagerTower,
    load: Callable[[int], Tensor],
    num_images: int,
    input_ids: Tensor,
    attention_mask: Tensor,
    k_test: int = 128,
    texts_per_image: int | None = None,
    batch_size: int = 64,
    memory_gb: float = 16.0,
    num_workers: int = 0,
) -> Tensor:
    """ITM scores (I, M) of I images and M captions, the same on every process; -100 where a pair
    was not re-ranked.

    load(i) is image i, (3, S, S); input_ids, attention_mask: (M, L). One pass gives experts and ITC
    vectors. Then the ITM head scores the k_test most similar images of each caption and the
    texts_per_image (None: k_test) most similar captions of each image. A pair that both choose is
    scored once (officially twice, and the maximum taken). Each process re-ranks its images, in full
    batches, and keeps at most memory_gb of experts in host memory; captions or images that do not
    fit are encoded again. Without an ITC head every pair is scored. Raises ValueError without an
    ITM head.
    """
    if "itm" not in model.heads:
        heads = ", ".join(model.config.heads)
        raise ValueError(f"retrieval needs a model with an ITM head; this one has {heads}")
    if texts_per_image is None:
        texts_per_image = k_test
    shape = (num_images, len(input_ids))
    with evaluating(model):
        texts = TextExperts(model, input_ids, attention_mask, batch_size, memory_gb * 2**30)
        images = ImageExperts(model, load, num_images, batch_size, num_workers, texts.free)

        # first pass over the images: which pairs are worth a second look
        if texts.vectors is None:
            chosen = torch.ones(shape, dtype=torch.bool)
            if ranks()[0] == 0:
                print(f"note: without an ITC head all {chosen.numel()} pairs are scored")
        else:
            parts = []
            for rows, experts in images:
                parts.append((rows[0], model.contrast_image(experts).float().cpu()))
            similarity = torch.cat(collect(parts)) @ texts.vectors.T  # (I, M)
            chosen = choose_pairs(similarity, k_test, texts_per_image)

        # second pass: the ITM head
        scores = score_chosen(model, texts, images, chosen, batch_size)
        check_finite(scores)
        return torch.full(shape, -100.0).masked_scatter_(chosen, scores)


# ---------------------------------------------------------------- the command
def read_annotations(file: str) -> dict[int, dict]:
    """VQA's annotations by the ids of their questions. Raises ValueError for a file that does not
    hold them.
    """
    content = read_json(file, dict, most_bytes=MOST_BYTES_OF_DATA)
    annotations: dict[int, dict] = {}
    for number, annotation in enumerate(need(content, "annotations", list, file, filled=True)):
        place = f"{file}, annotation {number}"
        question_id = need(annotation, "question_id", int, place)
        if question_id in annotations:
            raise ValueError(f"{place}: question {question_id} is annotated twice")
        for name in ("question_type", "answer_type"):
            need(annotation, name, str | None, place)
        for person in need(annotation, "answers", list, place, filled=True):
            need(person, "answer", str, place)
        annotations[question_id] = annotation
    return annotations


def check_question_ids(source: Source, annotations: dict[int, dict] | None) -> None:
    """Raises ValueError unless each question has an id of its own, a whole number, as EvalAI asks
    for; with annotations: one that is annotated.
    """
    seen: set[int] = set()
    for row in source.iterate_texts():
        question_id = row["question_id"]
        place = f"{source.name(row['image_index'])}: the question {show(row['text'])}"
        if type(question_id) is not int:
            raise ValueError(
                f"{place} has the id {show(question_id)}; for --submit and --annotations it must "
                "be a whole number"
            )
        if question_id in seen:
            raise ValueError(f"{place} has the id {question_id}, which another question has too")
        if annotations is not None and question_id not in annotations:
            raise ValueError(f"{place} has the id {question_id}, which --annotations lacks")
        seen.add(question_id)


def load_vocabulary(checkpoint: str, model: ManagerTower) -> list[str]:
    """The answers that the model's classes stand for. Raises ValueError if they are not as many."""
    answers = load_answers(find_folder(checkpoint))
    if len(answers) != model.config.num_answers:
        raise ValueError(
            f"answers.json in {checkpoint} has {len(answers)} answers, but the model has "
            f"{model.config.num_answers}"
        )
    return answers


def check_vocabulary(source: Source, answers: list[str]) -> None:
    """Raises ValueError if the questions have answers, but none that the vocabulary knows."""
    known = set(answers)
    for row in source.iterate_texts():
        scores = row["answers"]
        if scores is None:
            return  # a test set
        if any(score > 0 and answer in known for answer, score in scores.items()):
            return
    raise ValueError(
        f"no question of {source.parts[0].path} has an answer that is in the vocabulary, "
        f"{show(answers)}: answers.json belongs to other data"
    )


def flatten(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, number) of all metrics, those of an inner dict under "outer inner"."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value


def print_table(title: str, metrics: dict[str, Any], paper: dict[str, Any]) -> None:
    """Metrics in percent, beside the paper's numbers."""
    print(f"{title:<40}{'here':>10}   paper")
    for name, value in flatten(metrics):
        number = f"{100 * value:.2f}" if isinstance(value, float) else value
        print(f"  {name.replace('per_', ''):<38}{number:>10}   {paper.get(name, '-')}")


def open_task(
    loaded: Loaded,
    checkpoint: str,
    name: str,
    split: str,
    data: str,
    data_root: str,
    source: Source | None = None,
) -> PairDataset:
    """One split of a task, as the model of a checkpoint reads it: with its tokenizer, transform and
    vocabulary of answers. source: its rows, if they are open already.
    """
    task = find_task(name)
    model = loaded.model
    answers = None
    if task.kind == "questions" and task.heads[0] in model.heads:
        answers = load_vocabulary(checkpoint, model)
        if source is not None:
            check_vocabulary(source, answers)
    return open_split(
        name,
        split,
        data_root,
        bool(data),
        loaded.tokenizer,
        loaded.transform,
        model.config.max_text_len,
        model.config.image_size,
        answers,
        source,
    )


def open_sources(
    config: EvalConfig, annotations: dict[int, dict] | None
) -> dict[str, Source | None]:
    """The rows of each split, before the model is loaded; None for built-in scenes, which are
    drawn in the size that the model asks for.
    """
    sources: dict[str, Source | None] = {}
    for split in config.splits():
        sources[split] = None
        if not config.data:
            kind = find_task(config.task).kind
            source = open_sets(kind, config.data_root, (config.task,), split)
            if config.submit or annotations is not None:
                check_question_ids(source, annotations)
            sources[split] = source
    return sources


def measure_split(
    config: EvalConfig, loaded: Loaded, split: str, source: Source | None
) -> tuple[dict, list[dict]]:
    """(metrics, [{"question_id", "answer"}]) of one split; the latter is empty for a task without
    questions.
    """
    model = loaded.model
    dataset = open_task(
        loaded, config.checkpoint, config.task, split, config.data, config.data_root, source
    )
    if find_task(config.task).kind != "questions":
        metrics = evaluate(
            model,
            dataset,
            config.task,
            config.batch_size,
            config.num_workers,
            config.k_test,
            config.memory_gb,
        )
        return metrics, []
    predictions = predict(model, dataset, config.task, config.batch_size, config.num_workers)
    results = []
    for prediction in predictions:
        answer = dataset.answers[prediction.choice]
        results.append({"question_id": prediction.question_id, "answer": answer})
    return accuracy(predictions), results


def run_task(config: EvalConfig) -> None:
    """Evaluate all splits. All processes take part, and rank 0 prints and writes."""
    check_results(config)
    annotations = read_annotations(config.annotations) if config.annotations else None
    task = find_task(config.task)
    sources = open_sources(config, annotations)
    loaded = load_checkpoint(config.checkpoint, task.heads[0], config.device)
    is_first = ranks()[0] == 0

    splits: dict[str, dict] = {}
    for split, source in sources.items():
        metrics, results = measure_split(config, loaded, split, source)
        if annotations is not None:
            metrics["official"] = official_vqa_accuracy(results, list(annotations.values()))
        splits[split] = metrics
        if is_first:
            if config.submit:
                save_json(config.submit, results)
            print_table(f"{config.task} {split}", metrics, task.paper.get(split, {}))
            if source is not None and source.has_answers is False and not config.submit:
                print("  note: its questions have no 'answers', so they are only counted")

    if is_first:
        report = {"checkpoint": config.checkpoint, "task": config.task, "splits": splits}
        save_json(config.out or default_output(config.checkpoint, "eval.json"), report)


def main(argv: list[str]) -> None:
    command = argv[0] if argv else "-"
    if command == "chat_task":
        import eval_chat  # the MLLM's evaluation, which the two-tower model does not need

        return eval_chat.main(argv[1:])
    if command == "lmms":
        import eval_lmms

        return eval_lmms.main(argv[1:])
    if command in MOVED:
        raise FlagError(f"`eval.py {command}` is now `python {MOVED[command]}`")
    if not command.startswith("-"):
        raise FlagError(
            f"eval.py has no command {command!r}; it takes --task, --checkpoint and other flags, "
            "or chat_task, or lmms"
        )
    return run_task(parse_flags(EvalConfig, argv, EvalConfig.__doc__ or ""))


if __name__ == "__main__":
    one_sentence(main)
