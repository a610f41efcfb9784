"""Data: sources of rows, datasets that make tensors of them, samplers that order them.

A *record* is one picture (or a pair of them) with all its texts, a *row* is one (picture, text), a
*source* is the list of all rows of one kind. Records are read from JSON Lines manifests, from the
.arrow files of the ViLT family, from LLaVA's .json files, or drawn (scenes.py). A new kind of
records is a new parser in PARSERS.

Everything random here is a function of (seed, epoch, position in the global order), never of the
process or of the worker that does it.

Papers: ManagerTower (ACL 2023) section 5.1 and appendix A; LLaVA-OV-Manager (TCSVT 2025) section
IV. Official counterparts: the datamodules of ManagerTower, and `LazySupervisedDataset` and
`LengthGroupedSampler` of LLaVA-NeXT.

Shapes: B rows, T tokens, S pixels a side, A answers of the VQA vocabulary.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import posixpath
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from chat import IMAGE_TAG, IMAGE_TOKEN, collate_chat, encode_chat, num_untrained, read_turns
from fields import show
from files import (
    BYTE_ORDER_MARK,
    OTHER_MARKS,
    VERSION,
    BadSample,
    check_characters,
    check_line_length,
    decode_text,
    member_place,
    need,
    parse_json,
    read_at,
    read_json,
    read_text,
    remove_temporary_files,
    similar_key,
    split_member,
    why_no_folder,
)
from images import load_image
from index import Index, one_builder, read_index, write_index
from multigrid import preprocess_image
from tokenizer import Tokenizer
from world import first_line_of, is_first_process, ranks

SNLI_LABELS = ("contradiction", "neutral", "entailment")

# ---------------------------------------------------------------- records of a manifest -> rows
Numbers = Sequence[int] | np.ndarray  # whole numbers, packed where there may be millions
Parsed = tuple[list, list[dict]]  # the pictures of a record (paths, bytes or images), its text rows
Parser = Callable[[Any], Parsed]


def is_picture(value: Any) -> bool:
    """Whether a record may hold this as a picture: a path, the bytes of a file, or an image."""
    if isinstance(value, str):
        return bool(value.strip()) and "\0" not in value
    return isinstance(value, bytes | Image.Image)


def need_picture(record: Any) -> list:
    """The picture of a record, as a list of one."""
    need_object(record)
    picture = record.get("image")
    if not is_picture(picture):
        check_spelling(record, "image")
        if "image" not in record:
            raise BadSample(f"an image expected, but there is no 'image' in {show(record)}")
        raise BadSample(f"an image expected, found {show(picture)}; 'image' must be a path")
    return [picture]


def need_two_pictures(record: Any) -> list:
    pictures = need(record, "images", list)
    if len(pictures) != 2 or not all(is_picture(picture) for picture in pictures):
        raise BadSample(f"two images expected, found {show(pictures)}; 'images' must be two paths")
    return pictures


def need_object(record: Any) -> None:
    if not isinstance(record, dict):
        raise BadSample(f"a record must be an object, found {show(record)}")


def need_name(record: dict, key: str) -> Any:
    """What a record, a question or a picture is called: a text or a whole number, or nothing."""
    return need(record, key, int | str | None)


NOTHING: tuple = (None, "", [])  # is as absent, as in tables that were made of several sets


def check_spelling(record: dict, key: str) -> None:
    """Raises BadSample if a key that may be absent is, and another one looks like it.

    Else what stands under the misspelt key would be missed, and nobody would know.
    """
    if record.get(key) not in NOTHING:
        return
    filled = {name: value for name, value in record.items() if value not in NOTHING}
    similar = similar_key(filled, key)
    if similar:
        raise BadSample(
            f"there is no {key!r}, but {show(similar)} is {show(record[similar])}; the key must be "
            f"{key!r}"
        )


def without_doubles(rows: list[dict]) -> list[dict]:
    """The rows with different texts, in their order."""
    # no Python set: it would have another order in every process
    first_rows: dict[str, dict] = {}
    for row in rows:
        first_rows.setdefault(row["text"], row)
    return list(first_rows.values())


def check_answers(answers: Any) -> None:
    """Raises BadSample unless it is {answer: score}, or None as in test sets."""
    need({"answers": answers}, "answers", dict | None)
    for answer, score in (answers or {}).items():
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        # written so that NaN does not pass
        if not is_number or not 0 <= score <= 1:
            raise BadSample(
                f"'answers': the score of {show(answer)} is {show(score)}; it must be a number "
                "from 0 to 1"
            )


def parse_captions(record: Any) -> Parsed:
    """{"image", "captions": [text, ...]} -> a row for each different caption."""
    pictures = need_picture(record)
    image_id = need_name(record, "image_id")
    rows = []
    for text in need(record, "captions", list, filled=True):
        need({"caption": text}, "caption", str, filled=True)
        rows.append({"text": text, "image_id": image_id})
    return pictures, without_doubles(rows)


def parse_questions(record: Any) -> Parsed:
    """{"image", "questions": [{"id", "question", "answers", "question_type"}, ...]} -> rows.

    "answers" is {answer: score}; test sets have none.
    """
    pictures = need_picture(record)
    image_id = need_name(record, "image_id")
    rows = []
    for question in need(record, "questions", list, filled=True):
        row = {
            "text": need(question, "question", str, filled=True),
            "question_id": need_name(question, "id"),
            "answers": question.get("answers"),
            "question_type": need(question, "question_type", str | None),
            "image_id": image_id,
        }
        check_answers(row["answers"])
        for key in ("answers", "question_type"):
            check_spelling(question, key)
        if row["answers"] is None and record.get("answers") not in NOTHING:
            raise BadSample(
                f"'answers' is {show(record['answers'])}, beside 'questions'; it must be in each "
                "of the questions"
            )
        rows.append(row)
    return pictures, rows


def parse_statement(record: Any) -> Parsed:
    """{"images": [left, right], "sentence", "label": bool, "id"} -> one row with label 0 or 1."""
    pictures = need_two_pictures(record)
    row = {
        "text": need(record, "sentence", str, filled=True),
        "label": int(need(record, "label", bool)),
        "id": need_name(record, "id"),
        "image_id": need_name(record, "image_id"),
    }
    return pictures, [row]


def parse_hypothesis(record: Any) -> Parsed:
    """{"image", "hypothesis", "label": text} -> one row; its label is the number in SNLI_LABELS."""
    pictures = need_picture(record)
    row = {
        "text": need(record, "hypothesis", str, filled=True),
        "label": need(record, "label", str),
        "image_id": need_name(record, "image_id"),
    }
    if row["label"] not in SNLI_LABELS:
        raise BadSample(
            f"'label' is {show(row['label'])}; it must be one of {', '.join(SNLI_LABELS)}"
        )
    row["label"] = SNLI_LABELS.index(row["label"])
    return pictures, [row]


# ---------------------------------------------------------------- records of conversations -> rows
def need_chat_pictures(record: dict) -> list:
    """The pictures of a conversation: none, one or a list of them."""
    pictures = record.get("image")
    if pictures in NOTHING:
        check_spelling(record, "image")
        return []
    if not isinstance(pictures, list):
        pictures = [pictures]
    if not all(is_picture(picture) for picture in pictures):
        raise BadSample(f"'image' is {show(record['image'])}; it must be a path or a list of paths")
    return pictures


def check_tags(turns: list[tuple[str, str]], start: int, num_pictures: int) -> None:
    """Raises BadSample unless the turns from `start` on, which are trained on, have a tag for each
    picture, or no turn has any.
    """
    tags = sum(text.count(IMAGE_TAG) for _, text in turns[start:])
    tags_before = sum(text.count(IMAGE_TAG) for _, text in turns[:start])
    if tags == num_pictures or tags + tags_before == 0:
        return
    where = ""
    if tags_before:
        where = f", and {tags_before} in a turn before the first question, which is not trained on"
    raise BadSample(
        f"{num_pictures} images but {tags} {IMAGE_TAG} tags{where}; each image needs one tag"
    )


def check_roles(turns: list[tuple[str, str]], conversation: list) -> None:
    """Raises BadSample unless there is a human turn, and behind it one of gpt to train on."""
    roles = [role for role, _ in turns]
    if "user" not in roles:
        raise BadSample(f"there is no human turn in the conversation {show(conversation)}")
    if "assistant" not in roles[roles.index("user") :]:
        raise BadSample(
            f"there is no gpt turn after a human one in the conversation {show(conversation)}"
        )


def is_tagged_without_picture(row: dict) -> bool:
    """Whether the row of a conversation has tags that stay ordinary text, for want of a picture."""
    if row["length"] > 0:  # it has a picture
        return False
    return any(IMAGE_TAG in turn["value"] for turn in row["conversation"])


def parse_chat(record: Any) -> Parsed:
    """{"conversations": [{"from", "value"}, ...], "image": none, one or a list} -> one row.

    With the published inconsistency: images whose tags are missing get them before the first turn
    that is trained on. The row's length is its number of words, negative without a picture (see
    `length_grouped`).
    """
    conversation = need(record, "conversations", list, filled=True)
    turns = read_turns(conversation)
    start = num_untrained(turns)
    check_roles(turns, conversation)
    for key in ("video", "videos"):
        if record.get(key) not in NOTHING:
            raise BadSample(f"{key!r} is {show(record[key])}; videos are not read")
    pictures = need_chat_pictures(record)

    # each picture needs a tag, the place where its tokens will stand; without a picture a tag is
    # ordinary text
    conversation = [dict(turn) for turn in conversation]
    if pictures:
        check_tags(turns, start, len(pictures))
        if not any(IMAGE_TAG in text for _, text in turns):
            missing_tags = " ".join([IMAGE_TAG] * len(pictures))
            first = conversation[start]
            first["value"] = f"{missing_tags}\n{first['value']}"

    length = sum(len(turn["value"].split()) for turn in conversation)
    if not pictures:
        length = -length
    return pictures, [{"conversation": conversation, "id": record.get("id"), "length": length}]


def parse_chat_caption(record: Any) -> Parsed:
    """As `parse_chat`, of what stage 1 trains on: a picture, a human turn and its caption."""
    pictures, rows = parse_chat(record)
    turns = read_turns(rows[0]["conversation"])
    roles = [role for role, _ in turns if role != "system"]
    if len(pictures) != 1 or roles != ["user", "assistant"]:
        raise BadSample(
            "stage 1 trains on one picture, a human turn and a gpt turn with its caption; found "
            f"{len(pictures)} pictures and the turns {show(roles)}"
        )
    return pictures, rows


# kind -> how a record of a manifest, of LLaVA's files or of the demo is read
PARSERS: dict[str, Parser] = {
    "captions": parse_captions,
    "questions": parse_questions,
    "statements": parse_statement,
    "hypotheses": parse_hypothesis,
    "chat": parse_chat,
    "chat_captions": parse_chat_caption,
}


# ---------------------------------------------------------------- the ViLT family's .arrow files
def zip_columns(arrow_row: dict, *names: str) -> list[tuple]:
    """The entries of these columns side by side. Raises BadSample unless they are equally many."""
    columns = [need(arrow_row, name, list, filled=True) for name in names]
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise BadSample(f"the columns {', '.join(names)} must be equally long, found {lengths}")
    return list(zip(*columns, strict=True))


def need_arrow_name(arrow_row: dict, key: str) -> Any:
    """As `need_name`. pandas makes 5.0 of 5 where others of the column are missing; 5 is meant."""
    value = arrow_row.get(key)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return need_name(arrow_row, key)


def arrow_captions(arrow_row: dict) -> list[dict]:
    image_id = need_arrow_name(arrow_row, "image_id")
    rows = []
    for text in need(arrow_row, "caption", list, filled=True):
        need({"caption": text}, "caption", str, filled=True)
        rows.append({"text": text, "image_id": image_id})
    return without_doubles(rows)


def arrow_questions(arrow_row: dict) -> list[dict]:
    image_id = need_arrow_name(arrow_row, "image_id")
    rows = []
    for text, question_id in zip_columns(arrow_row, "questions", "question_id"):
        need({"question": text}, "question", str, filled=True)
        row = {
            "text": text,
            "question_id": need_arrow_name({"question_id": question_id}, "question_id"),
            "answers": None,
            "question_type": None,
            "image_id": image_id,
        }
        rows.append(row)
    # the answers of test files are null or empty
    if arrow_row["answers"]:
        columns = zip_columns(arrow_row, "questions", "answers", "answer_scores")
        for row, (_, answers, scores) in zip(rows, columns, strict=True):
            if answers:
                row["answers"] = scored_answers(answers, scores)
    return rows


def scored_answers(answers: list, scores: list | None) -> dict[str, float]:
    """{answer: score} of one question."""
    pairs = zip_columns({"answers": answers, "answer_scores": scores}, "answers", "answer_scores")
    for answer, _ in pairs:
        need({"answer": answer}, "answer", str)
    scored = {}
    for answer, score in pairs:
        if answer in scored:
            raise BadSample(f"'answers' holds {show(answer)} twice for one question")
        scored[answer] = score
    check_answers(scored)
    return scored


def arrow_statements(arrow_row: dict) -> list[dict]:
    identifier = need_arrow_name(arrow_row, "identifier")
    image_id = need_arrow_name(arrow_row, "image_id")
    rows = []
    for text, answer in zip_columns(arrow_row, "questions", "answers"):
        need({"sentence": text}, "sentence", str, filled=True)
        if answer not in ("True", "False"):
            raise BadSample(f"'answers' must hold 'True' or 'False', found {show(answer)}")
        label = int(answer == "True")
        rows.append({"text": text, "label": label, "id": identifier, "image_id": image_id})
    return rows


def arrow_hypotheses(arrow_row: dict) -> list[dict]:
    image_id = need_arrow_name(arrow_row, "image_id")
    rows = []
    for pair, label in zip_columns(arrow_row, "sentences", "labels"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadSample(f"'sentences' must hold premise and hypothesis, found {show(pair)}")
        hypothesis = need({"hypothesis": pair[1]}, "hypothesis", str, filled=True)
        if label not in range(len(SNLI_LABELS)):
            raise BadSample(f"'labels' must hold 0, 1 or 2, found {show(label)}")
        rows.append({"text": hypothesis, "label": int(label), "image_id": image_id})
    return rows


class ArrowKind(NamedTuple):
    """What an .arrow file of one kind has: columns with their types, and how a row is read."""

    pictures: tuple[str, ...]
    texts: dict[str, str]  # column -> its type, in the words of `is_of_arrow_type`
    parse: Callable[[dict], list[dict]]


# kind -> what its .arrow files look like; conversations have none
ARROW_KINDS = {
    "captions": ArrowKind(("image",), {"caption": "list of text"}, arrow_captions),
    "questions": ArrowKind(
        ("image",),
        {
            "questions": "list of text",
            "answers": "list of list of text",
            "answer_scores": "list of list of number",
            "question_id": "list of anything",
        },
        arrow_questions,
    ),
    "statements": ArrowKind(
        ("image_0", "image_1"),
        {"questions": "list of text", "answers": "list of text", "identifier": "anything"},
        arrow_statements,
    ),
    "hypotheses": ArrowKind(
        ("image",),
        {"sentences": "list of list of text", "labels": "list of number"},
        arrow_hypotheses,
    ),
}


# the names of pyarrow's types; older versions have no tests for some of them
ARROW_LISTS = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
ARROW_TEXTS = ("string", "large_string", "string_view")
ARROW_BYTES = ("binary", "large_binary", "binary_view")


def is_of_arrow_type(declared: Any, wanted: str) -> bool:
    """Whether a pyarrow type is bytes, text, number, anything, or "list of" one of them, as wanted.

    A column of nulls fits everything: test files have such ones.
    """
    from pyarrow import types  # optional: only who has .arrow files needs it

    if types.is_null(declared) or wanted == "anything":
        return True
    if types.is_dictionary(declared):
        return is_of_arrow_type(declared.value_type, wanted)
    type_name = str(declared).partition("<")[0]  # list<item: string> is a list
    if wanted.startswith("list of "):
        is_list = type_name in ARROW_LISTS
        return is_list and is_of_arrow_type(declared.value_type, wanted.removeprefix("list of "))
    if wanted == "number":
        return types.is_integer(declared) or types.is_floating(declared)
    if wanted == "text":
        return type_name in ARROW_TEXTS
    return type_name in ARROW_BYTES


ARROW_FILE_START = b"ARROW1"
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def open_arrow(path: str) -> Any:
    """A pyarrow.Table of a file in the file format, or in the stream format of `datasets`.

    Raises what pyarrow raises.
    """
    import pyarrow

    mapped = pyarrow.memory_map(path)
    size = mapped.size()
    if mapped.read_at(min(size, len(ARROW_FILE_START)), 0) == ARROW_FILE_START:
        return pyarrow.ipc.open_file(mapped).read_all()
    table = pyarrow.ipc.open_stream(mapped).read_all()
    # pyarrow takes the end of the file for the end of the stream, and rows would be lost
    end_size = min(size, len(ARROW_STREAM_END))
    if mapped.read_at(end_size, size - end_size) != ARROW_STREAM_END:
        raise ValueError("it is cut short, as the mark at its end is missing")
    return table


@functools.cache
def arrow_table(path: str) -> Any:
    """A pyarrow.Table, memory-mapped. Raises ValueError for what is none, or without pyarrow."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        return open_arrow(path)
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not an Arrow file: {reason[:200]}") from None


def check_columns(path: str, table: Any, wanted_types: dict[str, str]) -> None:
    """Raises ValueError for a column that is missing, is there twice, has another type, or is
    damaged. wanted_types: name -> type, in the words of `is_of_arrow_type`.
    """
    from pyarrow import ArrowException

    names = table.column_names
    missing = sorted(set(wanted_types) - set(names))
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}; it has {show(names)}")
    for name, wanted in wanted_types.items():
        if names.count(name) > 1:
            raise ValueError(f"{path} has {names.count(name)} columns {name!r}; it must have one")
        declared = table.schema.field(name).type
        if not is_of_arrow_type(declared, wanted):
            raise ValueError(f"{path}: the column {name!r} is {declared}; it must be {wanted}")
        try:
            # texts that are UTF-8, lists that end where they must; pictures are not looked at
            table.column(name).validate(full=True)
        except (ValueError, ArrowException) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: the column {name!r} is damaged: {reason[:200]}") from None


def arrow_rows(path: str | Path, wanted_types: dict[str, str]) -> list[dict]:
    """All rows of some columns of an .arrow file. Raises ValueError as `check_columns` does."""
    table = arrow_table(os.path.abspath(path))
    check_columns(str(path), table, wanted_types)
    return table.select(list(wanted_types)).to_pylist()


# ---------------------------------------------------------------- where records stand in a file
PIECE = 2**20  # bytes of a file that are read at once
LINES_A_REPORT = 10_000  # on the progress bar
HEAD = 2**16  # bytes of a file's head and of its tail
TOO_EARLY = 16  # an error so near to the end of what was read may be that end's


class Spans(NamedTuple):
    """Where the records of a file are: each an int64 array with one entry a record."""

    numbers: np.ndarray  # of the line, from 1 on, or of the item, from 0 on
    starts: np.ndarray  # offset of the first byte
    ends: np.ndarray  # offset behind the last byte


def as_spans(numbers: array, starts: array, ends: array) -> Spans:
    return Spans(*[np.asarray(column, dtype=np.int64) for column in (numbers, starts, ends)])


def is_json(path: str) -> bool:
    """Whether a file should hold one JSON value, and not JSON Lines."""
    return path.lower().endswith(".json")


def is_yaml(path: str) -> bool:
    return path.lower().endswith((".yaml", ".yml"))


def locate(path: str) -> tuple[str, int, int]:
    """The file that holds a path or `archive.tar::member`, and its offset and size in there.

    The file's path is absolute, as files stay open under their names, and the current folder may
    change. Raises ValueError for what is no file.
    """
    file, member = split_member(path)
    if os.path.isdir(file):
        raise ValueError(f"{path} is a folder; it must be a file")
    if not os.path.exists(file):
        raise ValueError(f"{path}: no such file or archive member")
    if not os.path.isfile(file):
        raise ValueError(f"{path} is a device or a pipe; it must be a file")
    file = os.path.abspath(file)
    if member is None:
        return file, 0, os.path.getsize(file)
    offset, size = member_place(path, file, member)
    return file, offset, size


def progress(path: str, total: int, unit: str, is_shown: bool = False) -> tqdm:
    """A bar on stderr, of rank 0 or where is_shown, for what takes more than two seconds."""
    return tqdm(
        total=total,
        desc=f"reading {os.path.basename(path)}",
        unit=unit,
        unit_scale=True,
        delay=2,
        mininterval=1,
        leave=False,
        # the processes may not have met yet
        disable=not (is_shown or is_first_process()),
    )


def find_lines(path: str, is_shown: bool = False) -> Spans:
    """The lines of JSON Lines that are not blank. No line is ever in memory as a whole."""
    file, position, size = locate(path)
    end_of_file = position + size
    numbers = array("q")
    starts = array("q")
    ends = array("q")
    number = 0
    with open(file, "rb") as stream, progress(path, size, "B", is_shown) as bar:
        stream.seek(position)
        while position < end_of_file:
            number += 1
            if number % LINES_A_REPORT == 0:
                bar.update(position - end_of_file + size - bar.n)
            start = position
            is_blank = True
            # a long line comes in pieces
            piece = b""
            while position < end_of_file and not piece.endswith(b"\n"):
                piece = stream.readline(min(PIECE, end_of_file - position))
                if not piece:
                    raise ValueError(f"{path} became shorter while it was read")
                position += len(piece)
                if piece.removeprefix(BYTE_ORDER_MARK).strip():
                    is_blank = False
            if not is_blank:
                numbers.append(number)
                starts.append(start)
                ends.append(position)
    return as_spans(numbers, starts, ends)


class JsonReader:
    """A JSON file, of which a window is in memory, with a place in it that moves forward.

    In the window a character stands for each byte, so that places in it are offsets in the file;
    the marks of JSON are the same in UTF-8.
    """

    blank = re.compile(r"[ \t\r\n]*")

    def __init__(self, path: str):
        self.path = path
        self.file, self.begin, self.size = locate(path)
        self.stream = open(self.file, "rb")  # noqa: SIM115
        self.stream.seek(self.begin)
        self.start = self.begin  # offset of the window
        self.window = ""
        self.place = 0  # in the window
        self.grow()
        head = self.window[:4].encode("latin-1")
        if head.startswith(OTHER_MARKS):
            decode_text(head, path)
        if head.startswith(BYTE_ORDER_MARK):
            self.place = len(BYTE_ORDER_MARK)

    def grow(self) -> bool:
        """Read on, and drop what lies behind. Returns False at the end of the file.

        The window grows by what it has, so that a long value is not read too many times.
        """
        wanted = max(PIECE, len(self.window) - self.place)
        left = self.begin + self.size - self.stream.tell()
        content = self.stream.read(min(wanted, left))
        if not content:
            return False
        self.window = self.window[self.place :] + content.decode("latin-1")
        self.start += self.place
        self.place = 0
        return True

    def offset(self) -> int:
        return self.start + self.place

    def peek(self) -> str:
        """The next character that is not blank, with the place before it; "" at the end."""
        while True:
            blank = self.blank.match(self.window, self.place)
            assert blank is not None  # it may be empty
            self.place = blank.end()
            if self.place < len(self.window):
                return self.window[self.place]
            if not self.grow():
                return ""

    def skip_value(self) -> None:
        """Move behind the value that comes next. Raises ValueError, with the line."""
        while True:
            fault = ""
            end = len(self.window)
            try:
                _, end = json.JSONDecoder().raw_decode(self.window, self.place)
                reached = end
            except json.JSONDecodeError as error:
                fault = error.msg
                reached = error.pos
            except RecursionError:
                raise self.error("brackets are nested too deeply", self.place) from None
            except ValueError as error:  # a number of thousands of digits
                raise self.error(str(error), self.place) from None
            # what stops near the end of the window, or in a text, may go on behind it
            may_go_on = reached > len(self.window) - TOO_EARLY or fault.startswith("Unterminated")
            if may_go_on:
                try:
                    check_line_length(len(self.window) - self.place, "an item")
                except ValueError as error:
                    raise self.error(str(error), self.place) from None
                if self.grow():
                    continue
            if fault:
                raise self.error(fault, reached)
            self.place = end
            return

    def error(self, fault: str, place: int) -> ValueError:
        """What to raise for a fault at a place in the window."""
        line = 1
        line_start = self.begin
        offset = self.start + place
        with open(self.file, "rb") as stream:
            stream.seek(self.begin)
            position = self.begin
            while position < offset:
                content = stream.read(min(PIECE, offset - position))
                if not content:
                    break
                line += content.count(b"\n")
                if b"\n" in content:
                    line_start = position + content.rfind(b"\n") + 1
                position += len(content)
        byte = offset - line_start + 1
        return ValueError(f"{self.path} is not JSON: {fault} (line {line}, byte {byte})")


def find_items(path: str, is_shown: bool = False) -> Spans:
    """The items of a .json file that holds one list, whatever it looks like.

    No more of it than one item and PIECE is ever in memory. Raises ValueError, with the line, for a
    file that holds no list.
    """
    numbers = array("q")
    starts = array("q")
    ends = array("q")
    reader = JsonReader(path)
    with reader.stream, progress(path, reader.size, "B", is_shown) as bar:
        if reader.peek() != "[":
            found = show(reader.window[reader.place : reader.place + 40])
            raise ValueError(f"{path} must hold a list, found {found}")
        reader.place += 1
        mark = reader.peek()
        while mark != "]":
            # an item
            numbers.append(len(numbers))
            starts.append(reader.offset())
            reader.skip_value()
            ends.append(reader.offset())
            # what comes behind it
            mark = reader.peek()
            if mark == ",":
                reader.place += 1
                reader.peek()
            elif mark != "]":
                raise reader.error("a comma or ] expected", reader.place)
            bar.update(reader.offset() - reader.begin - bar.n)
        reader.place += 1
        if reader.peek():
            raise reader.error("more after the list", reader.place)
    return as_spans(numbers, starts, ends)


def state_of(path: str) -> dict[str, Any]:
    """What changes when a file does: size, time, and a hash of its head and tail. The key of an
    index.
    """
    file, offset, size = locate(path)
    length = min(size, HEAD)
    with open(file, "rb") as stream:
        modified = os.fstat(stream.fileno()).st_mtime_ns
        head = os.pread(stream.fileno(), length, offset)
        tail = os.pread(stream.fileno(), length, offset + size - length)
    head_and_tail = hashlib.sha256(head + tail).hexdigest()
    return {"size": size, "offset": offset, "modified": modified, "head_and_tail": head_and_tail}


# ---------------------------------------------------------------- parts of a source
@contextlib.contextmanager
def named(part: "Part", index: int) -> Iterator[None]:
    """Put file and line of a record before the message of a BadSample."""
    try:
        yield
    except BadSample as error:
        raise BadSample(f"{part.name(index)}: {error}") from None


class Part:
    """Records of a file, or drawn ones. Subclasses have `record`, or `parse`, `parse_texts`
    and `picture_key`.
    """

    path: str  # for messages
    places: Any  # a sequence: record i is at places[i], a line or a row
    folder = ""  # the paths of pictures are relative to it
    strategy = ""  # which records of the file are taken; see `sample_rows`
    unit = "row"  # what a place is called in messages
    # how many rows each record has, where that is known without a scan
    rows_each: int | None = None
    description = ""  # of a part with rows_each: what its texts are a function of

    def text_bytes(self) -> int:
        """How much is read at opening, in bytes."""
        return 0

    def key(self) -> dict[str, Any]:
        """What an index of the part depends on."""
        return state_of(self.path)

    def find(self, is_shown: bool = False) -> None:
        """Find out where the records are. is_shown: with a progress bar, whatever the rank."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What `find` has found, for an index."""
        return {}

    def take(self, arrays: dict[str, np.ndarray]) -> None:
        """Take from an index what `find` would find."""

    def name(self, index: int) -> str:
        """File and line of a record."""
        return f"{self.path}, {self.unit} {self.places[index]}"

    def record(self, index: int) -> Any:
        """A record in the format of the manifests."""
        raise NotImplementedError("a part says how its records are read")

    def parse(self, kind: str, index: int) -> Parsed:
        """The pictures and the text rows of a record. Raises BadSample with file and line."""
        record = self.record(index)
        with named(self, index):
            return PARSERS[kind](record)

    def parse_texts(self, kind: str, index: int) -> list[dict]:
        """The text rows of a record."""
        _, rows = self.parse(kind, index)
        return rows

    def picture_key(self, kind: str, index: int) -> Any:
        """What the records of one picture have in common: the place of its file."""
        pictures, _ = self.parse(kind, index)
        file, member = split_member(os.path.join(self.folder, pictures[0]))
        place = os.path.realpath(file)
        if member is None:
            return place
        return f"{place}::{posixpath.normpath(member)}"


class Manifest(Part):
    """JSON Lines, or LLaVA's .json with one list; either may be a member of an archive.

    Only the places of the records stay in memory, or in an index that many processes share. The
    records are read when they are asked for. folder: where the pictures are, if not beside the
    file. strategy: see `sample_rows`.
    """

    def __init__(
        self,
        path: str | Path,
        folder: str | Path | None = None,
        strategy: str = "all",
        seed: int = 0,
    ):
        self.path = str(path)
        self.folder = str(folder or Path(path).parent)
        self.file, _, self.size = locate(self.path)
        self.unit = "item" if is_json(self.path) else "line"
        self.strategy = strategy
        self.seed = seed

    def text_bytes(self) -> int:
        return self.size

    def key(self) -> dict[str, Any]:
        name, _ = parse_strategy(self.strategy)
        seed = self.seed if name == "random" else None  # the others draw nothing
        return {**state_of(self.path), "strategy": self.strategy, "seed": seed}

    def find(self, is_shown: bool = False) -> None:
        find_spans = find_items if self.unit == "item" else find_lines
        spans = find_spans(self.path, is_shown)
        if self.strategy != "all":
            chosen = sample_rows(self.strategy, len(spans.numbers), self.seed)
            spans = Spans(*[column[chosen] for column in spans])
        self.take(spans._asdict())

    def arrays(self) -> dict[str, np.ndarray]:
        return {"numbers": self.places, "starts": self.starts, "ends": self.ends}

    def take(self, arrays: dict[str, np.ndarray]) -> None:
        self.places = arrays["numbers"]
        self.starts = arrays["starts"]
        self.ends = arrays["ends"]

    def record(self, index: int) -> Any:
        name = self.name(index)
        start = int(self.starts[index])
        size = int(self.ends[index]) - start
        try:
            check_line_length(size, name)
            content = read_at(self.file, start, size)
            if self.unit == "line" and not content.startswith(OTHER_MARKS):
                # it counts lines, and this is not the first one
                decode_text(content, self.path, int(self.places[index]))
            return parse_json(content, f"{name},")
        except ValueError as error:
            raise BadSample(str(error)) from None


class ArrowFile(Part):
    """An .arrow file as ViLT, METER, BridgeTower and ManagerTower users have it, memory-mapped."""

    chunk_size = 1024  # rows whose texts are read at once

    def __init__(self, kind: str, path: str | Path):
        if kind not in ARROW_KINDS:
            raise ValueError(f"{path}: {kind} are not read from .arrow files")
        self.path = str(path)
        self.file, _, _ = locate(self.path)
        self.arrow_kind = ARROW_KINDS[kind]
        table = arrow_table(self.file)
        wanted_types = dict.fromkeys(self.arrow_kind.pictures, "bytes")
        wanted_types.update(self.arrow_kind.texts)
        if "image_id" in table.column_names:
            wanted_types["image_id"] = "anything"
        check_columns(self.path, table, wanted_types)
        self.columns = list(wanted_types)
        # pictures are large: a scan leaves their columns out
        self.text_columns = self.columns[len(self.arrow_kind.pictures) :]
        self.places = range(table.num_rows)
        self.chunk_number = -1  # none yet
        self.chunk: list[dict] = []  # the texts of its rows

    def text_bytes(self) -> int:
        return arrow_table(self.file).select(self.text_columns).get_total_buffer_size()

    def parse(self, kind: str, index: int) -> Parsed:
        arrow_row = arrow_table(self.file).select(self.columns).slice(index, 1).to_pylist()[0]
        with named(self, index):
            pictures = [arrow_row[name] for name in self.arrow_kind.pictures]
            if not all(is_picture(picture) for picture in pictures):
                raise BadSample(f"an image expected, found {show(pictures)}")
            return pictures, self.arrow_kind.parse(arrow_row)

    def parse_texts(self, kind: str, index: int) -> list[dict]:
        # a scan goes from chunk to chunk
        chunk_number = index // self.chunk_size
        if chunk_number != self.chunk_number:
            texts = arrow_table(self.file).select(self.text_columns)
            chunk = texts.slice(chunk_number * self.chunk_size, self.chunk_size)
            self.chunk = chunk.to_pylist()
            self.chunk_number = chunk_number
        with named(self, index):
            return self.arrow_kind.parse(self.chunk[index % self.chunk_size])

    def picture_key(self, kind: str, index: int) -> Any:
        """A hash of the bytes of the picture, as there is no path."""
        picture = arrow_table(self.file).column(self.arrow_kind.pictures[0])[index].as_py()
        return hashlib.sha256(picture or b"").digest()


# ---------------------------------------------------------------- sources
HELD_OUT = "held out"  # a policy for bad samples, beside those of the flag --on_bad_sample


def tolerate(error: BadSample, policy: str, seen: int, bad: set[str]) -> None:
    """Raises a bad sample; the policy "skip" only logs it, unless more than 1 in 1,000 are bad.

    seen: how many samples this process has met. bad: the messages of the bad ones; every DataLoader
    worker has its own count. The policy HELD_OUT raises it, and says that a score over other rows
    would be another score.
    """
    if policy == HELD_OUT:
        raise BadSample(
            f"{error}; held-out rows are never skipped: repair this one, or take it out"
        )
    if policy != "skip":
        raise error
    message = str(error)
    if message not in bad:
        logging.warning("skipped bad sample: %s", message)
    bad.add(message)
    expected = seen / 1000
    most = max(1, expected + 3 * math.sqrt(expected))  # three standard deviations of chance
    if len(bad) > most:
        raise ValueError(
            f"{len(bad)} of {seen} samples are bad, more than 1 in 1,000; repair the data. "
            f"Last: {message}"
        )


# the fields of a row that the numbers of a run depend on
DIGESTED = ("text", "label", "answers", "conversation", "length")


def digest_rows(rows: list[dict]) -> bytes:
    """The texts and labels of one record, as bytes for a hash."""
    values = []
    for row in rows:
        for name in DIGESTED:
            values.append(row.get(name))
    return json.dumps(values).encode()


# an index is kept of sources with at least so many bytes of texts: about 100,000 records
INDEX_FROM = 16 * 2**20
# raise it when records are read, checked or digested in another way: older indices then count no
# more
INDEX_FORMAT = 1


def say_no_index(path: Path, reason: str) -> None:
    if is_first_process():
        logging.warning(
            "%s is not written (%s); every process reads the data anew, and keeps it in memory",
            path,
            reason,
        )


def say_waiting(path: Path) -> None:
    if is_first_process():
        logging.warning("waiting for another process, which reads the data and writes %s", path)


class Source:
    """The rows of one kind over any number of parts, one part after the other.

    `source[row]` has "text", "images" (RGB), "image_index" (the number of its record), "image_id",
    and by kind: questions "question_id", "answers" ({answer: score}; None in test sets),
    "question_type"; statements "label" (0 or 1), "id"; hypotheses "label" (a number in
    SNLI_LABELS); chat "conversation", "id", "length", and no text.

    Opening reads every text and no picture. What is broken raises BadSample with file and line, or
    is left out with on_bad_sample="skip". HELD_OUT is the policy of rows that are measured on. Of
    large sources what opening finds is kept in an index (index.py) beside the first file.

    has_answers: whether the questions have answers, all of them or none; None where that is not
    scanned. lengths: the "length" of each row of conversations, int32. image_of: the number of the
    record that each row belongs to, int32 (rows,).

    digest: a hash of all texts and labels in their order. It is the same for the same data at
    another place, and another one when a text changes. Drawn parts, which are not scanned, add
    their name, size and seed to it.
    """

    def __init__(self, kind: str, parts: Sequence[Part], on_bad_sample: str = HELD_OUT):
        self.kind = kind
        self.parts = parts
        self.on_bad_sample = on_bad_sample
        self.seen = 0  # records that were scanned
        self.bad: set[str] = set()  # messages of the bad ones
        self.has_answers: bool | None = None
        self.tagged = 0  # conversations with a tag, but without a picture
        if self.is_large():
            self.open_index()
        else:
            self.read()
        paths = ", ".join(part.path for part in parts)
        if self.tagged:
            logging.warning(
                "%s: %d of %d conversations have %s but no picture; the tag stays text",
                paths,
                self.tagged,
                len(self.lengths),
                IMAGE_TAG,
            )
        if len(self) == 0:
            raise ValueError(f"no rows in {paths}")

    def is_large(self) -> bool:
        """Whether an index of the source is worth a file."""
        if any(part.rows_each is not None for part in self.parts):
            return False  # drawn
        return sum(part.text_bytes() for part in self.parts) >= INDEX_FROM

    def read(self, is_shown: bool = False) -> None:
        """Find, read and check all records. is_shown: with progress bars, whatever the rank."""
        for part in self.parts:
            part.find(is_shown)
        # rows of each record, words of each conversation: packed, as there may be millions
        counts = array("i")
        lengths = array("i")
        digest = hashlib.sha256()
        for part in self.parts:
            if part.rows_each is not None:
                # drawing every record only to count its rows would take minutes
                digest.update(part.description.encode())
                counts.extend([part.rows_each] * len(part.places))
                continue
            with progress(part.path, len(part.places), " records", is_shown) as bar:
                for rows in self.scan(part):
                    digest.update(digest_rows(rows))
                    counts.append(len(rows))
                    for row in rows:
                        if "length" in row:
                            lengths.append(row["length"])
                            self.tagged += is_tagged_without_picture(row)
                    bar.update()
        self.digest = digest.hexdigest()
        self.lengths = np.asarray(lengths, dtype=np.int32)
        self.num_images = len(counts)
        self.image_of = np.repeat(np.arange(len(counts), dtype=np.int32), np.asarray(counts))
        self.bad_records = np.flatnonzero(np.asarray(counts) == 0)
        self.number_parts()

    def number_parts(self) -> None:
        """Set part_ends: the number of the record after the last one of each part, (parts,)."""
        self.part_ends = np.cumsum([len(part.places) for part in self.parts])

    def key(self) -> dict[str, Any]:
        """What an index depends on. JSON gives it back as it is."""
        parts = [part.key() for part in self.parts]
        return {"format": [VERSION, INDEX_FORMAT], "kind": self.kind, "parts": parts}

    def index_path(self) -> Path:
        """Beside the first file, one for each kind and each choice of files, whatever they hold."""
        choice = [self.kind]
        for part in self.parts:
            choice += [os.path.basename(part.path), part.strategy]
        name = hashlib.sha256(json.dumps(choice).encode()).hexdigest()[:8]
        first_file, _, _ = locate(self.parts[0].path)
        return Path(f"{first_file}.{self.kind}-{name}.index")

    def open_index(self) -> None:
        """As `read`, from the index. Where there is none, one process of the node writes it."""
        path = self.index_path()
        index = read_index(path, self.key())
        if index is None:
            reason = why_no_folder(path.parent)
            if reason:
                say_no_index(path, reason)
                self.read()
                return
            with one_builder(path, lambda: say_waiting(path)) as is_builder:
                # another process may have written it in the meantime
                index = read_index(path, self.key())
                if index is None and is_builder:
                    self.build_index(path)
                    return
        if index is None:
            self.read()
            return
        self.take(index)
        self.meet_bad_records()

    def build_index(self, path: Path) -> None:
        """As `read`. What it has found is written, and then mapped as in all other processes."""
        key = self.key()
        self.read(is_shown=True)
        index = self.as_index()
        try:
            if self.key() != key:
                raise ValueError("the data changed while they were read")
            remove_temporary_files(path.parent, (path.name,))
            write_index(path, key, index)
        except (ValueError, OSError) as error:
            say_no_index(path, first_line_of(error))
            return
        written = read_index(path, key)
        if written is not None:
            self.take(written)  # and the own arrays are freed

    def as_index(self) -> Index:
        """What `read` has found, for an index."""
        facts: dict[str, Any] = {
            "digest": self.digest,
            "num_images": self.num_images,
            "has_answers": self.has_answers,
            "tagged": self.tagged,
        }
        arrays: dict[str, np.ndarray] = {
            "image_of": self.image_of,
            "lengths": self.lengths,
            "bad_records": self.bad_records,
        }
        for number, part in enumerate(self.parts):
            for name, values in part.arrays().items():
                arrays[f"{number} {name}"] = values
        return Index(facts, arrays)

    def take(self, index: Index) -> None:
        """Take from an index what `read` finds."""
        self.digest = index.facts["digest"]
        self.num_images = index.facts["num_images"]
        self.has_answers = index.facts["has_answers"]
        self.tagged = index.facts["tagged"]
        self.image_of = index.arrays["image_of"]
        self.lengths = index.arrays["lengths"]
        self.bad_records = index.arrays["bad_records"]
        for number, part in enumerate(self.parts):
            start = f"{number} "
            own = {}
            for name, values in index.arrays.items():
                if name.startswith(start):
                    own[name.removeprefix(start)] = values
            part.take(own)
        self.number_parts()

    def meet_bad_records(self) -> None:
        """Raise or tolerate the bad records of an index, as if all had just been scanned."""
        for index in self.bad_records:
            self.seen = int(index)
            part, number = self.find(int(index))
            self.scan_record(part, number)
        self.seen = self.num_images

    def scan_record(self, part: Part, index: int) -> list[dict]:
        """The text rows of a record; none for a bad one that is tolerated."""
        self.seen += 1
        try:
            rows = part.parse_texts(self.kind, index)
            if self.kind == "questions":
                with named(part, index):
                    self.check_answers_alike(rows)
        except BadSample as error:
            # the record keeps its number, so that the names of the others stay right
            tolerate(error, self.on_bad_sample, self.seen, self.bad)
            rows = []
        return rows

    def scan(self, part: Part) -> Iterator[list[dict]]:
        """The text rows of each record of a part."""
        for index in range(len(part.places)):
            yield self.scan_record(part, index)

    def check_answers_alike(self, rows: list[dict]) -> None:
        """Raises BadSample unless these questions have answers as all those before have."""
        for row in rows:
            has_answers = row["answers"] is not None
            if self.has_answers is None:
                self.has_answers = has_answers
            if has_answers != self.has_answers:
                words = "has answers" if has_answers else "has no answers"
                before = "have some" if self.has_answers else "have none"
                raise BadSample(
                    f"the question {show(row['text'])} {words}, but those before it {before}; all "
                    "questions of a split must have answers, or none"
                )

    def __len__(self) -> int:
        return len(self.image_of)

    def find(self, index: int) -> tuple[Part, int]:
        """The part of record `index`, and the record's number in it."""
        number = int(np.searchsorted(self.part_ends, index, side="right"))
        part = self.parts[number]
        start = int(self.part_ends[number]) - len(part.places)
        return part, index - start

    def name(self, index: int) -> str:
        """File and line of record `index`."""
        part, number = self.find(index)
        return part.name(number)

    def picture_key(self, index: int) -> Any:
        """What is equal for records of the same picture, and for no others."""
        part, number = self.find(index)
        return part.picture_key(self.kind, number)

    def load(self, index: int) -> tuple[list[Image.Image], list[dict]]:
        """The opened pictures and the rows of record `index`. BadSample names file and line."""
        part, number = self.find(index)
        pictures, rows = part.parse(self.kind, number)
        images = []
        with named(part, number):
            for picture in pictures:
                if isinstance(picture, str):
                    picture = os.path.join(part.folder, picture)
                images.append(load_image(picture))
        return images, rows

    def images(self, index: int) -> list[Image.Image]:
        """The pictures of record `index`, RGB."""
        images, _ = self.load(index)
        return images

    def __getitem__(self, row: int) -> dict:
        index = int(self.image_of[row])
        images, rows = self.load(index)
        # rows of one record are neighbours, so the first of them tells which one this is
        first_row = int(np.searchsorted(self.image_of, self.image_of[row]))
        return {**rows[row - first_row], "images": images, "image_index": index}

    def iterate_texts(self) -> Iterator[dict]:
        """All rows, one after the other, without their pictures."""
        index = 0
        for part in self.parts:
            for rows in self.scan(part):
                for row in rows:
                    yield {**row, "image_index": index}
                index += 1

    def texts(self, limit: int | None = None) -> list[dict]:
        """All rows, or the first `limit` ones, without their pictures."""
        return list(itertools.islice(self.iterate_texts(), limit))


class RetrievalSet(NamedTuple):
    """The pictures and captions of a source, each picture once."""

    records: list[int]  # of each picture the number of its first record
    texts: list[str]
    image_index: list[int]  # of each text the place of its picture in `records`


def group_by_picture(source: Source) -> RetrievalSet:
    """The captions of a source by their pictures, as some manifests have a line for each caption.

    Of several records of one picture the first one counts, with the different captions of all.
    """
    records: list[int] = []
    place_of_key: dict[Any, int] = {}
    places = []  # of each record, the place of its picture
    for index in range(source.num_images):
        key = source.picture_key(index)
        if key not in place_of_key:
            place_of_key[key] = len(records)
            records.append(index)
        places.append(place_of_key[key])

    texts = []
    image_index = []
    seen = set()
    for row in source.iterate_texts():
        place = places[row["image_index"]]
        pair = (place, row["text"])
        if pair not in seen:
            seen.add(pair)
            texts.append(row["text"])
            image_index.append(place)
    return RetrievalSet(records, texts, image_index)


def open_source(kind: str, files: Sequence[Path], on_bad_sample: str = HELD_OUT) -> Source:
    """.jsonl manifests and .arrow files as one source."""
    parts: list[Part] = []
    for file in files:
        is_arrow = file.suffix.lower() == ".arrow"
        parts.append(ArrowFile(kind, file) if is_arrow else Manifest(file))
    return Source(kind, parts, on_bad_sample)


# ---------------------------------------------------------------- LLaVA's mixtures
def parse_strategy(strategy: str) -> tuple[str, str]:
    """ "first:10%" -> ("first", "10%"). Raises ValueError for what is no sampling strategy."""
    if strategy == "all":
        return "first", "100%"
    pattern = r"(first|end|random):(\d{1,15}|(?:\d{1,15}\.?\d{0,15}|\.\d{1,15})%)"
    match = re.fullmatch(pattern, strategy)
    if match is None:
        raise ValueError(
            f"sampling_strategy {show(strategy)} is none of all, first:N, end:N, random:N (or N%)"
        )
    return match[1], match[2]


def sample_rows(strategy: str, count: int, seed: int) -> np.ndarray:
    """The row numbers that a sampling strategy of LLaVA takes of `count` rows.

    Strategies: all, first:N, end:N, random:N. N may be a percentage, which is rounded up.
    """
    name, amount = parse_strategy(strategy)
    if amount.endswith("%"):
        size = math.ceil(count * float(amount[:-1]) / 100)
    else:
        size = int(amount)
    size = min(size, count)
    if name == "random":
        rng = np.random.default_rng((seed, count, size, 3))
        return rng.permutation(count)[:size]
    rows = np.arange(count)
    if name == "end":
        return rows[count - size :]
    return rows[:size]


MIXTURE_KEYS = ("json_path", "sampling_strategy")


def check_entry(place: str, entry: Any) -> None:
    """Raises ValueError unless an entry of a mixture has a json_path, and only MIXTURE_KEYS."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is {show(entry)}; it must have json_path and sampling_strategy")
    for key in entry:
        if key not in MIXTURE_KEYS:
            raise ValueError(
                f"{place}: unknown key {show(key)}; it may have {', '.join(MIXTURE_KEYS)}"
            )
    json_path = entry.get("json_path")
    if not isinstance(json_path, str) or not json_path.strip() or "\0" in json_path:
        raise ValueError(f"{place}: json_path is {show(json_path)}; it must be a path")
    check_characters(json_path, place)
    strategy = entry.get("sampling_strategy", "all")
    if not isinstance(strategy, str):
        raise ValueError(f"{place}: sampling_strategy is {show(strategy)}; it must be a text")
    try:
        parse_strategy(strategy)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


MOST_BYTES_OF_YAML = 2**18  # thousands of entries; a reader of YAML takes two seconds for them


def read_yaml(path: str) -> Any:
    """Lists, dicts and texts of a YAML file. Numbers stay texts: no tag in it is obeyed."""
    locate(path)  # no such file, a folder, a pipe
    text = read_text(path, MOST_BYTES_OF_YAML)
    try:
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML: {reason}") from None
    return content


def read_entries(path: str) -> Any:
    """What should be the list `datasets` of a mixture; None for a file that is none."""
    if is_yaml(path):
        content = read_yaml(path)
        # a list alone is taken too
        return content.get("datasets") if isinstance(content, dict) else content
    if not is_json(path):
        return None
    # conversations are a list, which may be too large to be read at once
    reader = JsonReader(path)
    with reader.stream:
        if reader.peek() != "{":
            return None
    try:
        content = read_json(path, dict)
    except ValueError as error:
        if "Extra data" in str(error):
            raise ValueError(f"{error}; JSON Lines must be called .jsonl") from None
        raise
    if "datasets" not in content:
        raise ValueError(
            f"{path} must hold a list of conversations, or an object with a list `datasets`, "
            f"found {show(content)}"
        )
    return content["datasets"]


def resolve_path(json_path: str, mixture: str, place: str) -> str:
    """The file of an entry: beside its mixture, or else as it stands. Raises ValueError."""
    beside = str(Path(mixture).parent / json_path)
    for path in (beside, json_path):
        if os.path.exists(path.partition("::")[0]):
            return path
    raise ValueError(
        f"{place}: json_path {show(json_path)}: no such file, neither beside the mixture nor in "
        "the current folder"
    )


def read_mixture(path: str) -> list[dict]:
    """The entries of a mixture in YAML or JSON: `datasets`, a list of json_path, sampling_strategy.

    Any other file is its own only entry. A json_path is taken from the mixture's folder if there is
    such a file, else as it stands.
    """
    entries = read_entries(path)
    if entries is None and not is_yaml(path):
        return [{"json_path": path}]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has no list `datasets`, found {show(entries)}")
    # each entry with its path resolved
    resolved = []
    for number, entry in enumerate(entries, 1):
        place = f"{path}, entry {number}"
        check_entry(place, entry)
        resolved.append({**entry, "json_path": resolve_path(entry["json_path"], path, place)})
    return resolved


def expand_braces(pattern: str) -> list[str]:
    """ "/p/{a,b}.json" -> "/p/a.json", "/p/b.json"; without braces the path alone, and so where a
    file is called like that.
    """
    if os.path.isfile(pattern.partition("::")[0]):
        return [pattern]
    match = re.fullmatch(r"([^{}]*)\{([^{}]*)\}([^{}]*)", pattern)
    if match is None:
        return [pattern]
    return [f"{match[1]}{name}{match[3]}" for name in match[2].split(",")]


def open_chat(
    where: str | Path,
    image_folder: str | Path | None = None,
    seed: int = 0,
    on_bad_sample: str = HELD_OUT,
    kind: str = "chat",
) -> Source:
    """LLaVA's .json or .jsonl, `/p/{a,b}.json`, or a mixture of them (.yaml, .json).

    image_folder: where the pictures are; None: beside each file. kind: chat, or chat_captions for
    stage 1.
    """
    parts = []
    for path in expand_braces(str(where)):
        for entry in read_mixture(path):
            strategy = entry.get("sampling_strategy", "all")
            parts.append(Manifest(entry["json_path"], image_folder, strategy, seed))
    return Source(kind, parts, on_bad_sample)


# ---------------------------------------------------------------- datasets
def mask_tokens(
    ids: Tensor, tokenizer: Tokenizer, rng: np.random.Generator, probability: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Masked ids and labels (-100: not chosen) of ids, all (T,).

    Of the ordinary tokens 15% are chosen: 80% of these become <mask>, 10% any token, 10% stay
    (BERT, and HF's DataCollatorForLanguageModeling, which the official code uses).
    """
    chosen = rng.random(len(ids)) < probability
    fate = rng.random(len(ids))
    tokens = ids.numpy()
    is_ordinary = [token not in tokenizer.special_ids for token in tokens.tolist()]
    chosen &= np.array(is_ordinary)
    mask_id: Any = tokenizer.mask_id
    masked = np.where(chosen & (fate < 0.8), mask_id, tokens)
    any_tokens = rng.integers(tokenizer.vocab_size, size=len(tokens))
    masked = np.where(chosen & (fate >= 0.9), any_tokens, masked)
    labels = np.where(chosen, tokens, -100)
    return torch.from_numpy(masked), torch.from_numpy(labels)


class PairDataset(Dataset):
    """Rows as tensors: pixels (3, S, S), input_ids and attention_mask (T,), image_index ().

    The other fields of a row stay. Statements have pixels_1 and label too; questions have targets
    (A,), the soft scores of the answers in the vocabulary `answers`, and none in test sets. Without
    a tokenizer the rows are left as they are.

    A key is (epoch, position, row), or the row alone. After a bad row that is skipped comes the
    next one.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer | None = None,
        transform: Callable[..., Tensor] | None = None,
        max_text_len: int = 50,
        seed: int = 0,
        on_bad_sample: str = HELD_OUT,
        answers: Sequence[str] | None = (),
    ):
        self.source = source
        self.tokenizer: Any = tokenizer
        self.transform: Any = transform
        self.max_text_len = max_text_len
        self.seed = seed
        self.on_bad_sample = on_bad_sample
        self.answers = answers or ()
        self.seen = 0  # samples that were tried
        self.bad: set[str] = set()  # messages of the bad ones

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int, int]) -> dict:
        epoch, position, row = key if isinstance(key, tuple) else (0, key, key)
        for candidate in range(row, row + len(self)):
            self.seen += 1
            # anew for each candidate: what is drawn depends on the position alone
            rng = np.random.default_rng((self.seed, epoch, position))
            try:
                return self.item(position, candidate % len(self), rng)
            except BadSample as error:
                tolerate(error, self.on_bad_sample, self.seen, self.bad)
        raise ValueError("no sample of the data can be read")

    def item(self, position: int, row: int, rng: np.random.Generator) -> dict:
        """The tensors of one row; position: its place in the global order of all epochs."""
        item = self.source[row]
        if self.tokenizer is None:
            return item
        ids, mask = self.tokenizer([item.pop("text")], self.max_text_len)
        item["input_ids"] = ids[0]
        item["attention_mask"] = mask[0]
        images = item.pop("images")
        for name, image in zip(("pixels", "pixels_1"), images, strict=False):
            item[name] = self.transform(image, rng)
        # test sets have no answers, and then no targets
        scores = item.pop("answers", None)
        if scores is not None:
            targets = [float(scores.get(answer, 0)) for answer in self.answers]
            item["targets"] = torch.tensor(targets)
        for name in ("label", "image_index"):
            if name in item:
                item[name] = torch.tensor(int(item[name]))
        return item


class PretrainDataset(PairDataset):
    """Adds mlm_ids and mlm_labels (T,), itm_labels () and itm_pixels (3, S, S).

    itm_labels: 1 where picture and text match. itm_pixels: the picture, or where the pair is false
    any other one of the data. Exactly half of each global batch is false. With share_images there
    is no itm_pixels: of the positions 2k and 2k + 1 exactly one is false, and takes its partner's
    picture.
    """

    def __init__(
        self,
        *args: Any,
        batch_size: int,
        objectives: Sequence[str] = ("mlm", "itm"),
        share_images: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.batch_size = 2 if share_images else batch_size
        self.loads_false_images = "itm" in objectives and not share_images
        if not self.has_two_pictures():
            raise ValueError("image-text matching needs at least two images, the data has one")

    def has_two_pictures(self) -> bool:
        """Whether not all rows have the same picture. It looks no further than to the second."""
        first_key = self.source.picture_key(int(self.source.image_of[0]))
        return any(self.source.picture_key(int(i)) != first_key for i in self.source.image_of)

    def is_match(self, position: int) -> bool:
        """Whether the pair at this position is a true one: half of each batch, drawn for it."""
        # the last number of the seed keeps this stream apart from those of the samplers
        batch, place = divmod(position, self.batch_size)
        order = np.random.default_rng((self.seed, batch, 0, 1)).permutation(self.batch_size)
        return bool(order[place] >= self.batch_size // 2)

    def draw_other_image(self, row: int, rng: np.random.Generator) -> int:
        """The number of a record with another picture than the row's own."""
        own = int(self.source.image_of[row])
        own_key = self.source.picture_key(own)
        index = own
        while index == own or self.source.picture_key(index) == own_key:
            index = int(self.source.image_of[rng.integers(len(self))])
        return index

    def item(self, position: int, row: int, rng: np.random.Generator) -> dict:
        item = super().item(position, row, rng)
        masked, labels = mask_tokens(item["input_ids"], self.tokenizer, rng)
        item["mlm_ids"] = masked
        item["mlm_labels"] = labels
        match = self.is_match(position)
        item["itm_labels"] = torch.tensor(int(match))
        if self.loads_false_images and match:
            item["itm_pixels"] = item["pixels"]
        elif self.loads_false_images:
            index = self.draw_other_image(row, rng)
            item["itm_pixels"] = self.transform(self.source.images(index)[0], rng)
        return item


class ChatDataset(PairDataset):
    """Rows of `source` as tokens (input_ids, labels) and images, a list of ImageTiles.

    rows: which ones. Up to position `plain` of the global order come rows of `captions` instead, in
    the style of stage 1. Nothing is dropped: the model cuts what is too long, after the image
    tokens are in their places. lengths: of each of the rows, where batches are to be grouped by
    them (see `length_grouped`).
    """

    lengths: Numbers | None = None

    def __init__(
        self,
        source: Source,
        rows: Numbers,
        config: Any,
        strict_labels: bool = False,
        captions: Source | None = None,
        plain: float = 0,
        **kwargs: Any,
    ):
        super().__init__(source, **kwargs)
        self.rows = rows
        self.config = config
        self.strict_labels = strict_labels
        self.captions = source if captions is None else captions
        self.plain = plain

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, position: int, row: int, rng: np.random.Generator) -> dict:
        # which data this position of the run trains on, and in which style
        style = "qwen_1_5"
        source = self.source
        if position < self.plain:
            style = "plain"
            source = self.captions
        chat = source[int(self.rows[row])]
        images = chat["images"]
        name = source.name(chat["image_index"])
        try:
            tokens = encode_chat(
                chat["conversation"],
                self.tokenizer,
                style,
                self.strict_labels,
                has_image=bool(images),
            )
        except ValueError as error:
            raise BadSample(f"{name}: {error}") from None
        # a leading turn of the assistant is dropped, and its tags with it
        input_ids, _ = tokens
        tags = input_ids.count(IMAGE_TOKEN)
        if tags != len(images):
            raise BadSample(
                f"{name}: {len(images)} images, but {tags} {IMAGE_TAG} in the turns to train on"
            )
        # of several images each one is a single tile
        multi_image = len(images) > 1
        tiles = [preprocess_image(image, self.config, multi_image=multi_image) for image in images]
        return {"tokens": tokens, "images": tiles, "image_index": chat["image_index"]}


# ---------------------------------------------------------------- batches
def collate(items: list[dict]) -> dict:
    """Tensors are stacked, everything else becomes a list."""
    batch: dict[str, Any] = {}
    for name in items[0]:
        column = [item[name] for item in items]
        batch[name] = torch.stack(column) if torch.is_tensor(column[0]) else column
    return batch


def collate_conversations(items: list[dict]) -> dict:
    """input_ids, labels, attention_mask (B, T), images (a flat list of all rows'), image_index."""
    batch: dict[str, Any] = collate_chat([item["tokens"] for item in items])
    batch["images"] = []
    for item in items:
        batch["images"] += item["images"]
    batch["image_index"] = [item["image_index"] for item in items]
    return batch


def batches(
    dataset: Any, batch_size: int, num_workers: int = 0, collate: Callable = collate
) -> Iterator[tuple[range, dict]]:
    """(rows, batch) for the batches of this process.

    Batch b goes to process b % processes, so that no batch depends on their number.
    """
    rank, num_processes = ranks()
    starts = range(0, len(dataset), batch_size)[rank::num_processes]
    plan = [range(start, min(start + batch_size, len(dataset))) for start in starts]
    batch_sampler: Any = plan
    loader = DataLoader(
        dataset, batch_sampler=batch_sampler, collate_fn=collate, num_workers=num_workers
    )
    return zip(plan, loader, strict=True)


# ---------------------------------------------------------------- the order of training rows
def deal_by_length(rows: list[int], lengths: Numbers, num_batches: int) -> list[int]:
    """A megabatch, longest row first, dealt to batches of equal size, each row to the smallest sum.

    Returns the batches one after the other. Rows that cannot be dealt evenly are dealt in turn.
    """
    # only the last megabatch of a modality can be uneven
    if len(rows) % num_batches != 0:
        dealt = []
        for i in range(num_batches):
            dealt += rows[i::num_batches]
        return dealt
    full_size = len(rows) // num_batches
    chunks: list[list[int]] = [[] for _ in range(num_batches)]
    totals = [0.0] * num_batches
    for row in rows:
        i = totals.index(min(totals))
        chunks[i].append(row)
        totals[i] += abs(lengths[row])
        if len(chunks[i]) == full_size:
            totals[i] = math.inf  # takes no more
    return list(itertools.chain.from_iterable(chunks))


def megabatches(
    rows: list[int],
    lengths: Numbers,
    batch_size: int,
    num_batches: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """The rows of one modality, shuffled, cut into megabatches of num_batches batches, dealt."""
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    size = batch_size * num_batches
    result = []
    for start in range(0, len(shuffled), size):
        longest_first = sorted(
            shuffled[start : start + size], key=lambda row: abs(lengths[row]), reverse=True
        )
        result.append(deal_by_length(longest_first, lengths, num_batches))
    return result


def length_grouped(
    lengths: Numbers, batch_size: int, world_size: int, generator: torch.Generator
) -> list[int]:
    """One epoch's order of LLaVA's sampler: batches of one modality and of similar lengths.

    lengths: of each row, negative for one without an image. A megabatch has world_size batches (all
    micro-batches of a step). The last, incomplete megabatches of both modalities come sorted at the
    end, as in LLaVA-NeXT's `get_modality_length_grouped_indices`.
    """
    with_image = [row for row, length in enumerate(lengths) if length > 0]
    text_only = [row for row, length in enumerate(lengths) if length <= 0]
    modalities = []
    for rows in (with_image, text_only):
        if rows:
            modalities.append(megabatches(rows, lengths, batch_size, world_size, generator))
    if len(modalities) == 1:
        return list(itertools.chain.from_iterable(modalities[0]))
    # whole megabatches of both modalities, mixed
    full = modalities[0][:-1] + modalities[1][:-1]
    order: list[int] = []
    for i in torch.randperm(len(full), generator=generator).tolist():
        order += full[i]
    return order + sorted(modalities[0][-1] + modalities[1][-1])


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(size for size in range(1, min(number, most) + 1) if number % size == 0)


def deal(count: int, parts: int) -> list[int]:
    """`count` things dealt as evenly as possible, the larger parts first: 7 to 3 -> [3, 2, 2]."""
    share, rest = divmod(count, parts)
    return [share + 1] * rest + [share] * (parts - rest)


class BatchPlan:
    """Which rows of each global batch a process takes, and in how many micro-steps.

    The batch is cut into as few micro-steps as keep every process at most at micro_batch_size rows,
    and each of them is dealt to the processes. Where the numbers do not divide, some parts have one
    unit more than others. No process is ever without a row, so where micro_batch_size is a single
    unit, some may have to take two. unit: rows that must stay together, 2 where neighbours share a
    picture.

    sizes[i][r]: rows of process r in micro-step i. starts[i][r]: the place of the first of them in
    the batch. Raises ValueError where a process would be without a row.
    """

    def __init__(self, batch_size: int, micro_batch_size: int, num_processes: int, unit: int = 1):
        if batch_size % unit or batch_size < unit * num_processes:
            raise ValueError(
                f"--batch_size {batch_size} cannot be dealt to {num_processes} processes: it must "
                f"be a multiple of {unit}, and at least {unit * num_processes}"
            )
        self.batch_size = batch_size
        # everything is counted in units first
        units = batch_size // unit
        most = max(1, micro_batch_size // unit)
        # as few micro-steps as possible, then more where an uneven deal would exceed `most`
        micro_steps = math.ceil(units / (most * num_processes))
        while math.ceil(math.ceil(units / micro_steps) / num_processes) > most:
            micro_steps += 1
        micro_steps = min(micro_steps, units // num_processes)  # no process is without a row
        # deal the batch to the micro-steps, and each of these to the processes
        self.sizes = []
        self.starts = []
        place = 0
        for step_units in deal(units, micro_steps):
            sizes = [unit * share for share in deal(step_units, num_processes)]
            starts = []
            for size in sizes:
                starts.append(place)
                place += size
            self.sizes.append(sizes)
            self.starts.append(starts)


class GlobalBatchSampler(Sampler):
    """This process' micro-batches, lists of keys (epoch, position, row), for a DataLoader.

    The positions run over the epochs' permutations, and none is dropped; step s has the positions
    from s * batch_size on, dealt as the plan says. With `lengths` each epoch is grouped by them
    (see length_grouped), in groups of group_size, whatever the number of processes.
    """

    def __init__(
        self,
        num_rows: int,
        plan: BatchPlan,
        rank: int = 0,
        seed: int = 0,
        start_step: int = 0,
        stop_step: int = 1,
        lengths: Numbers | None = None,
        group_size: int = 1,
    ):
        self.num_rows = num_rows
        self.plan = plan
        self.rank = rank
        self.seed = seed
        self.steps = range(start_step, stop_step)
        self.lengths = lengths
        self.group_size = group_size
        self.epoch: int | None = None  # whose order is at hand
        self.order: Any = None

    def __len__(self) -> int:
        return len(self.steps) * len(self.plan.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in self.steps:
            for sizes, starts in zip(self.plan.sizes, self.plan.starts, strict=True):
                first = step * self.plan.batch_size + starts[self.rank]
                yield [self.key(position) for position in range(first, first + sizes[self.rank])]

    def key(self, position: int) -> tuple[int, int, int]:
        """(epoch, position, row) of a position in the global order of all epochs."""
        epoch, place = divmod(position, self.num_rows)
        if epoch != self.epoch:
            self.order = self.order_of(epoch)
            self.epoch = epoch
        return epoch, position, int(self.order[place])

    def order_of(self, epoch: int) -> Any:
        """The rows of an epoch in their order."""
        if self.lengths is None:
            return np.random.default_rng((self.seed, epoch, 0, 2)).permutation(self.num_rows)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        num_groups = self.plan.batch_size // self.group_size
        return length_grouped(self.lengths, self.group_size, num_groups, generator)
