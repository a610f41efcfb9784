"""The MLLM on a question file of one's own: answers in batches, scores, and a table.

    python eval.py chat_task --checkpoint F --questions Q.jsonl --metric vqa_accuracy
    torchrun --nproc_per_node 8 eval.py chat_task --checkpoint F --questions Q.jsonl --metric anls

A line of Q.jsonl is an object with "image" (a path) or "images" (several; neither: a text alone),
"question", "answer" or "answers", and for choices "options", whose right letter is the answer; "id"
and "category" may be there too. Paths are relative to the file. The scores are those of metrics.py
(TCSVT 2025, section V). An answer is that of `ask.py chat` to the same question.

predictions.jsonl, in the folder of the results, has a row for each answer. What a killed evaluation
has answered is not answered again by the same command.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

import metrics
from chat import IMAGE_TAG, collate_chat, encode_prompt
from fields import check_fields, option, parse_flags, show
from files import (
    MOST_BYTES_OF_DATA,
    BadSample,
    check_output,
    json_lines,
    need,
    read_bounded,
    read_json,
    why_no_folder,
    write_json,
    write_json_lines,
)
from images import load_image
from multigrid import ImageTiles, count_image_tokens, preprocess_image
from weights import load_mllm
from world import collect, ranks


# ---------------------------------------------------------------- prompts and batches
class Prompt(NamedTuple):
    """What the model is asked."""

    ids: list[int]  # with a placeholder for each picture
    tiles: list[ImageTiles]
    length: int  # in tokens, those of the pictures included


def make_prompt(text: str, pictures: Sequence[Image.Image], model: Any, tokenizer: Any) -> Prompt:
    """A question about pictures, or about none.

    The pictures stand where the text has <image>, or without that in front of it. Raises ValueError
    if it has another number of them.
    """
    count = text.count(IMAGE_TAG)
    if count not in (0, len(pictures)):
        raise ValueError(
            f"the question has {count} times {IMAGE_TAG}, but {len(pictures)} pictures; it must "
            "have as many, or none"
        )
    tiles = []
    for picture in pictures:
        tiles.append(preprocess_image(picture, model.config, len(pictures) > 1))
    in_front = len(pictures) if count == 0 else 0
    ids = encode_prompt([text], tokenizer, in_front)
    length = len(ids) - len(tiles)
    for image in tiles:
        length += count_image_tokens(len(image.pixels), image.size, model.config)
    return Prompt(ids, tiles, length)


def answer(
    prompts: Sequence[Prompt],
    model: Any,
    tokenizer: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[str | None]:
    """The model's answers to a batch of prompts; None for one that is longer than max_length.

    A batch has the answers that its prompts have one by one.
    """
    fitting = [prompt for prompt in prompts if prompt.length <= model.config.max_length]
    answers: list[str | None] = [None] * len(prompts)
    if not fitting:
        return answers
    batch = collate_chat([(prompt.ids, prompt.ids) for prompt in fitting])
    images = []
    for prompt in fitting:
        images += prompt.tiles
    new_ids = model.generate(
        batch["input_ids"], batch["attention_mask"], images, max_new_tokens, temperature, top_p
    )
    texts = []
    for ids in new_ids.tolist():
        spoken = [token for token in ids if token not in model.config.eos_ids]
        texts.append(tokenizer.decode(spoken).strip())

    remaining = iter(texts)
    for i, prompt in enumerate(prompts):
        if prompt.length <= model.config.max_length:
            answers[i] = next(remaining)
    return answers


# ---------------------------------------------------------------- the question file
class Metric(NamedTuple):
    """How an answer is scored, from the prediction and the question's row."""

    score: Callable[[str, "Question"], float]
    needs_options: bool = False
    takes_several: bool = False  # answers, any of which is right


class Question(NamedTuple):
    """A line of the question file."""

    line: int
    id: Any
    text: str  # as the model reads it
    pictures: tuple[str, ...]  # their paths
    answers: tuple[str, ...]
    options: tuple[str, ...]
    dataset: str  # OCRBench's part
    category: str | None


METRICS = {
    "vqa_accuracy": Metric(lambda p, q: metrics.vqa_accuracy(p, q.answers), takes_several=True),
    "textvqa_accuracy": Metric(
        lambda p, q: metrics.vqa_accuracy(p, q.answers, "okvqa_textvqa"), takes_several=True
    ),
    "exact_match": Metric(lambda p, q: metrics.exact_match(p, q.answers[0])),
    "relaxed_accuracy": Metric(lambda p, q: metrics.relaxed_accuracy(p, q.answers[0])),
    "anls": Metric(lambda p, q: metrics.anls(p, q.answers), takes_several=True),
    "ocrbench": Metric(lambda p, q: metrics.ocrbench(p, q.answers, q.dataset), takes_several=True),
    "scienceqa": Metric(lambda p, q: metrics.scienceqa(p, q.answers[0])),
    "seed_image": Metric(lambda p, q: metrics.seed_image(p, q.answers[0])),
    "realworldqa": Metric(lambda p, q: metrics.realworldqa(p, q.answers[0])),
    "ai2d": Metric(lambda p, q: metrics.ai2d(p, q.answers[0])),
    "mmmu_choice": Metric(
        lambda p, q: metrics.mmmu_choice(p, q.options, q.answers[0]), needs_options=True
    ),
    "mmmu_open": Metric(lambda p, q: metrics.mmmu_open(p, q.answers), takes_several=True),
}
LETTER = "\nAnswer with the option's letter from the given choices directly."


def texts_of(record: dict, key: str, place: str) -> tuple[str, ...]:
    """A list of texts of a record; empty if the key is missing. Raises BadSample."""
    values = need(record, key, list | None, place) or []
    for value in values:
        if not isinstance(value, str):
            raise BadSample(f"{place}: {key!r} holds {show(value)}; it must hold texts")
    return tuple(values)


def one_or_several(record: dict, one: str, several: str, place: str) -> tuple[str, ...]:
    """The text of the key `one`, or the texts of the key `several`. Raises BadSample for both."""
    texts = texts_of(record, several, place)
    text = need(record, one, str | None, place)
    if text is None:
        return texts
    if texts:
        raise BadSample(f"{place}: it has both {one!r} and {several!r}; it must have one of them")
    return (text,)


def check_answers(answers: tuple[str, ...], options: tuple[str, ...], name: str) -> str:
    """What is wrong with a question's answers for a metric, or an empty text."""
    metric = METRICS[name]
    if not answers:
        return "it has neither 'answer' nor 'answers'"
    if len(answers) > 1 and not metric.takes_several:
        return f"it has {len(answers)} answers, but {name} compares with one"
    if metric.needs_options and not options:
        return f"there are no 'options', which {name} needs"
    letters = [chr(ord("A") + i) for i in range(len(options))]
    if options and answers[0] not in letters:
        return f"the answer is {show(answers[0])}; with 'options' it must be one of their letters"
    return ""


def read_question(
    record: Any, line: int, place: str, folder: Path, metric: str, reserved: Sequence[str]
) -> Question:
    """A line of the question file. Raises BadSample for one that cannot be used."""
    text = need(record, "question", str, place, filled=True)
    for word in reserved:
        if word in text:
            raise BadSample(f"{place}: 'question' has {word} in it, which is no text for the model")
    pictures = []
    for name in one_or_several(record, "image", "images", place):
        path = os.path.join(folder, name)
        if "::" not in path and not os.path.isfile(path):
            raise BadSample(f"{place}: there is no picture {show(path)}")
        pictures.append(path)
    if text.count(IMAGE_TAG) not in (0, len(pictures)):
        raise BadSample(
            f"{place}: 'question' has {text.count(IMAGE_TAG)} times {IMAGE_TAG}, but there are "
            f"{len(pictures)} pictures"
        )

    options = texts_of(record, "options", place)
    answers = one_or_several(record, "answer", "answers", place)
    wrong = check_answers(answers, options, metric)
    if wrong:
        raise BadSample(f"{place}: {wrong}")
    for i, choice in enumerate(options):
        text += f"\n{chr(ord('A') + i)}. {choice}"
    if options:
        text += LETTER
    dataset = need(record, "dataset", str | None, place) or ""
    category = need(record, "category", str | None, place)
    question_id = need(record, "id", str | int | None, place)
    if question_id is None:
        question_id = line
    return Question(line, question_id, text, tuple(pictures), answers, options, dataset, category)


def read_questions(file: str, metric: str, reserved: Sequence[str], limit: int) -> list[Question]:
    """The first `limit` questions of a file (0: all). Raises ValueError with the line."""
    questions: list[Question] = []
    for line, record in json_lines(read_bounded(file, MOST_BYTES_OF_DATA), file):
        if limit and len(questions) == limit:
            break
        place = f"{file}, line {line}"
        questions.append(read_question(record, line, place, Path(file).parent, metric, reserved))
    if not questions:
        raise ValueError(f"{file} has no questions")
    return questions


# ---------------------------------------------------------------- what is answered already
def digest_of(files: Sequence[Path]) -> str:
    """A fingerprint of the content of files."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class Journal:
    """The answers of an evaluation in a folder, kept while it goes on.

    predictions.jsonl has those of earlier runs and in the end all of them; part-R.jsonl has the new
    ones of process R. task.json says which evaluation it is.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        """Raises ValueError for the folder of another evaluation."""
        self.folder = folder
        self.file = folder / "predictions.jsonl"
        task_file = folder / "task.json"
        folder.mkdir(parents=True, exist_ok=True)
        if task_file.exists():
            stored = read_json(task_file, dict)
            for name, value in identity.items():
                if stored.get(name) != value:
                    raise ValueError(
                        f"{folder} holds the answers of another evaluation: its {name} is "
                        f"{show(stored.get(name))}, now {show(value)}; choose another --out_dir"
                    )
        elif self.file.exists():
            raise ValueError(f"{self.file} is no result of eval.py; choose another --out_dir")
        self.rows = self.read()

        # nobody writes before all have read
        self.wait()
        rank, _ = ranks()
        if rank == 0:
            write_json(task_file, identity)
            self.write()
        self.wait()
        self.part = open(folder / f"part-{rank}.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def wait(self) -> None:
        """Until all processes are here."""
        collect([(ranks()[0], None)])

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.jsonl"))

    def read(self) -> dict[int, dict]:
        """The answered rows by their line. A last row that a death cut short is left out."""
        rows = {}
        for path in (self.file, *self.parts()):
            content = path.read_bytes() if path.exists() else b""
            whole_lines = content[: content.rfind(b"\n") + 1]
            for number, row in json_lines(whole_lines, str(path)):
                rows[need(row, "line", int, f"{path}, line {number}")] = row
        return rows

    def add(self, rows: list[dict]) -> None:
        """Keep the answers of a batch."""
        for row in rows:
            self.part.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.part.flush()

    def write(self) -> None:
        """All rows into predictions.jsonl; the parts are in it, and go."""
        ordered = [self.rows[line] for line in sorted(self.rows)]
        write_json_lines(self.file, ordered)
        for path in self.parts():
            path.unlink()

    def finish(self, new_rows: list[dict]) -> None:
        """Take the new answers of all processes, and write the whole file."""
        self.part.close()
        for row in new_rows:
            self.rows[row["line"]] = row
        if ranks()[0] == 0:
            self.write()
        self.wait()


# ---------------------------------------------------------------- the command
@dataclass
class ChatTaskOptions:
    """Answer and score the questions of a file of one's own."""

    checkpoint: str = option(help="folder of the model, ours or an official one")
    questions: str = option(help="the question file, JSON Lines", path=True)
    metric: str = option(help="how answers are scored", choices=tuple(METRICS))
    out_dir: str = option(
        "", "folder of the results; none = in that of the model, called as the question file"
    )
    limit: int = option(0, "only the first questions; 0 = all", least=0)
    batch_size: int = option(16, "questions of a batch", least=1)
    max_new_tokens: int = option(64, "most tokens of an answer", least=1, most=32_768)
    tokenizer: str = option("", "folder or file; none = the one beside the model")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_fields(self)

    def folder(self) -> Path:
        """Where the results go."""
        if self.out_dir:
            return Path(self.out_dir)
        return Path(self.checkpoint) / Path(self.questions).stem


def check_folder(folder: Path) -> None:
    """Raises ValueError if the results cannot be written."""
    reason = why_no_folder(folder)
    if reason:
        raise ValueError(f"--out_dir {folder} cannot be written: {reason}")
    if folder.is_dir():
        check_output("--out_dir", str(folder / "predictions.jsonl"))


def prompt_of(question: Question, file: str, model: Any, tokenizer: Any) -> Prompt:
    """The prompt of a question. Raises BadSample, with its line, for a picture that is none."""
    pictures = []
    for path in question.pictures:
        try:
            pictures.append(load_image(path, upright=True))
        except BadSample as error:
            raise BadSample(f"{file}, line {question.line}: {error}") from None
    return make_prompt(question.text, pictures, model, tokenizer)


def row_of(question: Question, prompt: Prompt, text: str | None, metric: str) -> dict[str, Any]:
    """The row of predictions.jsonl; one without an answer has the score 0 and its length."""
    row: dict[str, Any] = {"line": question.line, "id": question.id, "prediction": text or ""}
    row["score"] = 0.0 if text is None else METRICS[metric].score(text, question)
    if question.category is not None:
        row["category"] = question.category
    if text is None:
        row["too_long"] = prompt.length
    return row


def answer_all(
    questions: list[Question], options: ChatTaskOptions, model: Any, tokenizer: Any, keep: Journal
) -> list[dict]:
    """The rows of all these questions; each process answers its share of the batches."""
    rank, num_processes = ranks()
    size = options.batch_size
    starts = range(0, len(questions), size)[rank::num_processes]
    parts: list[tuple[int, dict]] = []
    for start in tqdm(starts, desc="answers", disable=rank > 0 or None):
        batch = questions[start : start + size]
        prompts = [prompt_of(question, options.questions, model, tokenizer) for question in batch]
        texts = answer(prompts, model, tokenizer, options.max_new_tokens)
        rows = []
        for question, prompt, text in zip(batch, prompts, texts, strict=True):
            rows.append(row_of(question, prompt, text, options.metric))
        keep.add(rows)
        for row in rows:
            parts.append((row["line"], row))
    return collect(parts)


def summarize(rows: list[dict], options: ChatTaskOptions, max_length: int) -> dict[str, Any]:
    """The means of the scores, and how many prompts were too long."""
    scores = [row["score"] for row in rows]
    summary: dict[str, Any] = {
        "checkpoint": options.checkpoint,
        "questions": options.questions,
        "metric": options.metric,
        "score": math.fsum(scores) / len(scores),
        "count": len(scores),
        "too_long": sum("too_long" in row for row in rows),
        "max_length": max_length,
    }
    per_category = metrics.mean_by(scores, [row.get("category") for row in rows])
    if per_category:
        summary["per_category"] = per_category
    return summary


def table_of(summary: dict[str, Any]) -> Iterator[str]:
    """The lines of the table, in percent."""
    yield f"{summary['questions']}: {summary['metric']}"
    for name, score in summary.get("per_category", {}).items():
        yield f"  {name:<38}{100 * score:>10.2f}"
    yield f"  {'all ' + str(summary['count']):<38}{100 * summary['score']:>10.2f}"
    if summary["too_long"]:
        yield (
            f"  note: {summary['too_long']} prompts are longer than max_length "
            f"{summary['max_length']}; they have no answer and the score 0"
        )


def chat_task(options: ChatTaskOptions) -> dict[str, Any]:
    """Answer all questions and score them. All processes take part, and rank 0 prints and writes.

    Returns the summary.
    """
    # what takes no time is tested before the model is loaded
    check_folder(options.folder())
    read_questions(options.questions, options.metric, (), options.limit)
    model, tokenizer, _ = load_mllm(options.checkpoint, options.tokenizer, options.device)
    questions = read_questions(
        options.questions, options.metric, tokenizer.special_words(), options.limit
    )
    checkpoint = Path(options.checkpoint)
    weight_files = sorted(checkpoint.glob("*.safetensors"))
    identity = {
        "checkpoint": digest_of([*weight_files, checkpoint / "config.json"]),
        "tokenizer": tokenizer.digest(),
        "questions": digest_of([Path(options.questions)]),
        "metric": options.metric,
        "max_new_tokens": options.max_new_tokens,
    }
    journal = Journal(options.folder(), identity)

    waiting = [question for question in questions if question.line not in journal.rows]
    num_answered = len(questions) - len(waiting)
    is_first = ranks()[0] == 0
    if is_first and num_answered:
        print(f"{num_answered} of {len(questions)} questions are answered already")
    with torch.no_grad():
        journal.finish(answer_all(waiting, options, model, tokenizer, journal))

    rows = [journal.rows[question.line] for question in questions]
    summary = summarize(rows, options, model.config.max_length)
    if is_first:
        lines = list(table_of(summary))
        write_json(options.folder() / "scores.json", summary)
        print("\n".join(lines))
        print(f"written: {journal.file}, {options.folder() / 'scores.json'}")
    return summary


def main(argv: list[str]) -> None:
    chat_task(parse_flags(ChatTaskOptions, argv, ChatTaskOptions.__doc__ or "", "chat_task"))
