"""data.py: parsers, sources, mixtures, datasets, masking, and the order of training rows."""

import json
import logging
import os
import pickle
import tarfile
import time
import tracemalloc
from collections import Counter

import numpy as np
import open_manifests
import pytest
import torch
from helpers import (
    ANSWERS,
    GOLDEN,
    LOV,
    QUESTIONS,
    picture,
    png,
    run_in_forks,
    write_arrow,
    write_records,
)
from PIL import Image
from torch.utils.data import DataLoader

import chat
import data
import files
from data import (
    BatchPlan,
    ChatDataset,
    GlobalBatchSampler,
    PairDataset,
    PretrainDataset,
    collate,
    collate_conversations,
    deal,
    largest_divisor,
    open_chat,
    open_source,
)
from files import BadSample
from images import image_transform
from llava_manager import LlavaManagerConfig
from scenes import demo_source, demo_tokenizer
from tokenizer import load_tokenizer

CLIP = image_transform("clip", 16, True)


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer()


@pytest.fixture
def manifest(tmp_path):
    """12 pictures in a folder, 12 in a tar archive; two captions each, one of them doubled."""
    (tmp_path / "pictures").mkdir()
    names = []
    with tarfile.open(tmp_path / "more.tar", "w") as archive:
        for i in range(12):
            (tmp_path / f"pictures/{i}.png").write_bytes(png(i))
            names.append(f"pictures/{i}.png")
        for i in range(12, 24):
            (tmp_path / "member").write_bytes(png(i))
            archive.add(tmp_path / "member", f"in/{i}.png")
            names.append(f"more.tar::in/{i}.png")
    records = []
    for i, name in enumerate(names):
        captions = [f"first of {i}", f"second of {i}", f"first of {i}"]
        records.append({"image": name, "captions": captions, "image_id": i})
    return write_records(tmp_path / "coco_train.jsonl", records)


def open_captions(path, **kwargs):
    return open_source("captions", [path], **kwargs)


# ---------------------------------------------------------------- sources
def test_rows_of_a_manifest_are_pairs_without_doubles_in_order(manifest):
    source = open_captions(manifest)
    expected = [f"{word} of {i}" for i in range(24) for word in ("first", "second")]
    assert [row["text"] for row in source.texts()] == expected
    assert (len(source), source.num_images) == (48, 24)
    assert [row["text"] for row in source.texts(3)][-1] == "first of 1"
    for row in (0, 25, 47):
        item = source[row]
        assert item["text"] == expected[row]
        assert (item["image_index"], item["image_id"]) == (row // 2, row // 2)
        assert np.array_equal(item["images"][0], picture(row // 2))


def test_files_follow_one_another(manifest):
    twice = open_source("captions", [manifest, manifest])
    assert len(twice) == 96
    assert twice[48]["image_index"] == 24
    assert twice[48]["text"] == "first of 0"
    assert twice.name(24).endswith("coco_train.jsonl, line 1")
    assert twice.name(47).endswith("coco_train.jsonl, line 24")
    assert [row["image_index"] for row in twice.texts()] == [row // 2 for row in range(96)]


def test_every_kind_has_its_parser(tmp_path):
    records = {
        "captions": {"image": "a.png", "captions": ["x"]},
        "questions": {"image": "a.png", "questions": [{"id": 7, "question": "x"}]},
        "statements": {"images": ["a", "b"], "sentence": "x", "label": True, "id": "s"},
        "hypotheses": {"image": "a.png", "hypothesis": "x", "label": "neutral"},
        "chat": {"image": "a.png", "conversations": turns("x", "y")},
        "chat_captions": {"image": "a.png", "conversations": turns("x", "y")},
    }
    assert data.PARSERS.keys() == records.keys()
    rows = {}
    for kind, record in records.items():
        path = write_records(tmp_path / f"{kind}.jsonl", [record])
        (rows[kind],) = open_source(kind, [path]).texts()
    assert rows["captions"] == {"text": "x", "image_id": None, "image_index": 0}
    assert rows["questions"]["question_id"] == 7
    assert rows["questions"]["answers"] is None
    assert (rows["statements"]["label"], rows["statements"]["id"]) == (1, "s")
    assert rows["hypotheses"]["label"] == data.SNLI_LABELS.index("neutral")
    assert rows["chat"] == rows["chat_captions"]


# ---------------------------------------------------------------- bad records
BROKEN = [
    ("{", "line 3, is not JSON"),
    ("[" * 100_000, "line 3, is not JSON: brackets are nested too deeply"),
    ('{"image": 1' + "1" * 5000 + "}", "line 3, is not JSON: .*digits"),
    ('"x"', "line 3: a record must be an object, found 'x'"),
    ("[1]", r"line 3: a record must be an object, found \[1\]"),
    ("null", "line 3: a record must be an object, found None"),
    (b"\xff\xfe", "line 3, is UTF-16"),
    (b'{"image": "\xe4.png"}', "line 3: the byte 0xe4 is not UTF-8"),
    (r'{"image": "a.png", "captions": ["\ud83d"]}', "line 3, has half a character"),
    ("{}", "line 3: an image expected, but there is no 'image' in {}"),
    ('{"image": "a.png"}', "line 3: there is no 'captions'"),
    ('{"image": "a.png", "captions": []}', r"line 3: 'captions' is \[\]; it must not be empty"),
    ('{"image": "a.png", "captions": {"a": 1}}', "line 3: 'captions' is .*; it must be a list"),
    ('{"image": 3, "captions": ["x"]}', "line 3: an image expected, found 3"),
    ('{"image": " ", "captions": ["x"]}', "line 3: an image expected, found ' '"),
    ('{"image": ["a.png"], "captions": ["x"]}', "line 3: an image expected"),
    (r'{"image": "a\u0000.png", "captions": ["x"]}', "line 3: an image expected"),
    ('{"image": "a.png", "captions": ["good", "  "]}', "line 3: 'caption' .* not be empty"),
    ('{"image": "a.png", "captions": [["x"]]}', "line 3: 'caption' is .*; it must be a text"),
    ('{"image": "a.png", "captions": ["x"], "image_id": []}', "line 3: 'image_id' is"),
]


@pytest.mark.parametrize("line, message", BROKEN)
def test_broken_lines_are_named(line, message, tmp_path):
    good = b'\n{"image": "a.png", "captions": ["fine"]}\n'
    broken = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "x_train.jsonl").write_bytes(good + broken + 2 * good)
    with pytest.raises(BadSample, match=f"x_train.jsonl, {message}") as error:
        open_captions(tmp_path / "x_train.jsonl")
    check_sentence(str(error.value))


def check_sentence(text):
    """One line, of a length that can be read, without the address of an object."""
    assert len(text.splitlines()) == 1
    assert len(text) < 600
    assert " at 0x" not in text


TURN = {"from": "human", "value": "x"}
GOOD_RECORDS = {
    "questions": {"image": "a.png", "questions": [{"id": 7, "question": "x", "answers": {"y": 1}}]},
    "statements": {"images": ["a", "b"], "sentence": "x", "label": True, "id": "s"},
    "hypotheses": {"image": "a.png", "hypothesis": "x", "label": "neutral"},
    "chat": {"image": "a.png", "conversations": [TURN, {"from": "gpt", "value": "y"}]},
    "chat_captions": {"image": "a.png", "conversations": [TURN, {"from": "gpt", "value": "y"}]},
}


def question(**fields):
    return {"image": "a.png", "questions": [{"id": 1, "question": "x", **fields}]}


def statement(**fields):
    return {**GOOD_RECORDS["statements"], **fields}


def hypothesis(**fields):
    return {**GOOD_RECORDS["hypotheses"], **fields}


def conversation(*turns, **fields):
    return {"conversations": list(turns), **fields}


GPT = {"from": "gpt", "value": "y"}
SYSTEM_TURN = {"from": "system", "value": "be brief"}
TAGGED = {"from": "human", "value": "<image>\nx"}
WRONG_FIELDS = [
    ("questions", {"image": "a.png", "questions": [{"id": 1}]}, "no 'question'"),
    ("questions", {"image": "a.png"}, "no 'questions'"),
    ("questions", {"image": "a.png", "questions": []}, "'questions' is .*must not be empty"),
    ("questions", {"image": "a.png", "questions": ["x"]}, "'x' is not an object"),
    ("questions", {"image": "a.png", "questions": "x"}, "'questions' is 'x'; it must be a list"),
    ("questions", question(question=5, answers={}), "'question' is 5; it must be a text"),
    ("questions", question(question="", answers={}), "'question' is ''; it must not be empty"),
    ("questions", question(answers=["y"]), "'answers' is .* an object or null"),
    ("questions", question(answers=[]), r"'answers' is \[\]; it must be an object or null"),
    ("questions", question(answers="y"), "'answers' is 'y'"),
    ("questions", question(answers={"y": "1"}), "the score of 'y' is '1'; .* from 0 to 1"),
    ("questions", question(answers={"y": None}), "the score of 'y' is None"),
    ("questions", question(answers={"y": [1]}), r"the score of 'y' is \[1\]"),
    ("questions", question(answers={"y": True}), "the score of 'y' is True"),
    ("questions", question(answers={"y": 1.01}), "the score of 'y' is 1.01"),
    ("questions", question(answers={"y": -0.1}), "the score of 'y' is -0.1"),
    ("questions", question(answers={"y": float("nan")}), "the score of 'y' is nan"),
    ("questions", question(answers={"y": float("inf")}), "the score of 'y' is inf"),
    ("questions", question(answers={"y": 10**400}), "the score of 'y' is 1"),
    ("questions", question(), "'x' has no answers, but those before it have some"),
    ("questions", question(answers={}, id=[1]), "'id' is .* a whole number or a text or null"),
    ("questions", question(answers={}, id=1.5), "'id' is 1.5"),
    ("questions", question(answers={}, question_type=[]), "'question_type' is"),
    ("statements", statement(images=["a.png"]), "two images expected"),
    ("statements", statement(images=["a", 5]), "two images expected"),
    ("statements", statement(images="ab"), "'images' is 'ab'; it must be a list"),
    ("statements", statement(label="yes"), "'label' is 'yes'; it must be true or false"),
    ("statements", statement(label=1), "'label' is 1; it must be true or false"),
    ("statements", statement(label=1.0), "'label' is 1.0"),
    ("statements", statement(label=None), "'label' is None"),
    ("statements", statement(sentence=None), "'sentence' is None; it must be a text"),
    ("statements", statement(sentence=" "), "'sentence' is ' '; it must not be empty"),
    ("statements", statement(id={}), "'id' is {}"),
    ("hypotheses", hypothesis(label="-"), "'label' is '-'; it must be one of contradiction"),
    ("hypotheses", hypothesis(label=1), "'label' is 1; it must be a text"),
    ("hypotheses", {"image": "a", "label": "neutral"}, "no 'hypothesis'"),
    ("hypotheses", hypothesis(hypothesis=["x"]), "'hypothesis' is"),
    ("chat", conversation(image="a"), "'conversations' is .* must not be empty"),
    ("chat", {"image": "a"}, "no 'conversations'"),
    ("chat", conversation({"from": "human"}), "turn 0: there is no 'value'"),
    ("chat", conversation("x"), "turn 0: 'x' is not an object"),
    ("chat", conversation(TURN, {"from": ["gpt"], "value": "y"}), "turn 1: 'from' is .*a text"),
    ("chat", conversation(TURN, {"from": {}, "value": "y"}), "turn 1: 'from' is {}"),
    ("chat", conversation(TURN, {"from": "bot", "value": "y"}), "turn 1: 'from' is 'bot'"),
    ("chat", conversation(TURN, {"from": "gpt", "value": 5}), "turn 1: 'value' is 5"),
    ("chat", conversation(TURN, SYSTEM_TURN, GPT), "turn 1: 'from' is 'system'; .*the first"),
    ("chat", conversation(SYSTEM_TURN), "no human turn"),
    ("chat", conversation(GPT), "no human turn"),
    ("chat", conversation(SYSTEM_TURN, GPT), "no human turn"),
    ("chat", conversation(TURN, GPT, video="a.mp4"), "'video' is 'a.mp4'; videos are not read"),
    ("chat", conversation(TURN, GPT, videos=["a"]), "'videos' is .*; videos are not read"),
    ("chat", conversation(TAGGED, GPT, images=["a"]), "'images' is .* must be 'image'"),
    ("chat", conversation(TURN, GPT, image=None, Image="a"), "'Image' is 'a'.* must be 'image'"),
    ("chat_captions", conversation(TAGGED, GPT, images="a"), "'images' is 'a'.* must be 'image'"),
    ("chat", conversation(TURN), "no gpt turn after a human one"),
    ("chat", conversation(GPT, TURN), "no gpt turn after a human one"),
    ("chat", conversation(GPT, GPT), "no human turn"),
    ("chat", conversation(TURN, GPT, image=[3]), "'image' is .3.; it must be a path or a list"),
    ("chat", conversation(TURN, GPT, image=5), "'image' is 5"),
    ("chat", conversation(TURN, GPT, image=False), "'image' is False"),
    ("chat", conversation(TURN, GPT, image=[None]), "'image' is .None."),
    ("chat", conversation(TURN, GPT, image={}), "'image' is {}"),
    ("chat", conversation(TURN, GPT, image=["a", ""]), "'image' is"),
    ("chat", conversation(TAGGED, TAGGED, GPT, image="a"), "1 images but 2 <image> tags"),
    ("chat", conversation(TAGGED, GPT, image=["a", "b"]), "2 images but 1 <image> tags"),
    (
        "chat",
        conversation({"from": "gpt", "value": "<image>"}, TURN, GPT, image="a"),
        "1 images but 0 <image> tags, and 1 in a turn before the first question",
    ),
    (
        "chat",
        conversation({"from": "system", "value": "<image>"}, TURN, GPT, image="a"),
        "1 images but 0 <image> tags, and 1 in a turn before the first question",
    ),
    ("chat_captions", conversation(TURN, GPT), "stage 1 trains on one picture.* found 0"),
    ("chat_captions", conversation(TURN, image="a"), "no gpt turn after a human one"),
    ("chat_captions", conversation(TURN, GPT, TURN, GPT, image="a"), "stage 1 trains on"),
]


@pytest.mark.parametrize("kind, record, message", WRONG_FIELDS)
def test_a_wrong_record_among_good_ones_is_named_at_opening(kind, record, message, tmp_path):
    good = GOOD_RECORDS[kind]
    records = [good, good, record, good, good]
    path = write_records(tmp_path / "x.jsonl", records)
    with pytest.raises(BadSample, match=f"x.jsonl, line 3: .*{message}") as error:
        open_source(kind, [path])
    check_sentence(str(error.value))
    (tmp_path / "x.json").write_text(json.dumps(records, indent=2))
    with pytest.raises(BadSample, match=f"x.json, item 2: .*{message}"):
        open_source(kind, [tmp_path / "x.json"])


GOOD_CHATS = [
    conversation(TURN, GPT, video=None),
    conversation(TURN, GPT, video=[], image=None),
    conversation(TURN, GPT, video="", image=""),
    conversation(TURN, GPT, image=[]),
    conversation(TURN, GPT, images=[], Image=None, videos=""),
    conversation(TAGGED, GPT, image="a.png", images=["b.png"]),
    conversation(SYSTEM_TURN, TURN, GPT),
    conversation(GPT, TURN, GPT),
    conversation(SYSTEM_TURN, GPT, TURN, GPT),
    conversation(TURN, TURN, GPT, GPT),
    conversation(TAGGED, GPT),  # without a picture a tag is a text
    conversation(TURN, GPT, id=1.5),
    conversation(GPT, TAGGED, GPT, image="a.png"),
]


@pytest.mark.parametrize("record", GOOD_CHATS)
def test_good_conversations_stay_good(record, tmp_path, chat_tokenizer):
    (tmp_path / "a.png").write_bytes(png())
    path = write_records(tmp_path / "x.jsonl", [record])
    item = chat_dataset(path, chat_tokenizer)[0]
    assert len(item["images"]) == ("a.png" in str(record))


def test_tags_without_pictures_are_counted_once(tmp_path, caplog):
    record = conversation(TAGGED, GPT)
    records = [record, conversation(TURN, GPT), record]
    source = open_source("chat", [write_records(tmp_path / "x.jsonl", records)])
    source.texts()
    (message,) = caplog.messages
    expected = "x.jsonl: 2 of 3 conversations have <image> but no picture; the tag stays text"
    assert message.endswith(expected)


def test_missing_tags_go_before_the_first_turn_that_is_trained_on(tmp_path, chat_tokenizer):
    (tmp_path / "a.png").write_bytes(png())
    record = conversation(GPT, TURN, GPT, image="a.png")
    dataset = chat_dataset(write_records(tmp_path / "x.jsonl", [record]), chat_tokenizer)
    (row,) = dataset.source.texts()
    assert [turn["value"] for turn in row["conversation"]] == ["y", "<image>\nx", "y"]
    assert chat.IMAGE_TOKEN in dataset[0]["tokens"][0]


def test_a_split_has_answers_everywhere_or_nowhere(tmp_path):
    with_answers = question(answers={"y": 0.5})
    without = question()
    mixed = {"image": "a.png", "questions": [*with_answers["questions"], *without["questions"]]}
    for records, line, words in (
        ([without, without, with_answers], 3, "has answers, but those before it have none"),
        ([mixed], 1, "has no answers, but those before it have some"),
    ):
        path = write_records(tmp_path / "x.jsonl", records)
        with pytest.raises(BadSample, match=f"line {line}: the question 'x' {words}"):
            open_source("questions", [path])
    first = write_records(tmp_path / "a.jsonl", [with_answers])
    second = write_records(tmp_path / "b.jsonl", [without])
    with pytest.raises(BadSample, match="b.jsonl, line 1: the question 'x' has no answers"):
        open_source("questions", [first, second])
    assert open_source("questions", [first]).has_answers is True
    assert open_source("questions", [second]).has_answers is False


def test_rows_that_are_measured_on_are_never_skipped(manifest, tokenizer):
    (manifest.parent / "pictures/3.png").write_bytes(png()[:70])
    dataset = PairDataset(open_captions(manifest), tokenizer, CLIP, 16)
    with pytest.raises(BadSample, match="line 4: .*held-out rows are never skipped: repair"):
        dataset[6]
    with pytest.raises(BadSample) as error:
        PairDataset(open_captions(manifest), tokenizer, CLIP, 16, on_bad_sample="error")[6]
    assert "held-out" not in str(error.value)


# ---------------------------------------------------------------- where records stand in a file
RECORD = {"image": "a.png", "captions": ["fine"]}


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder_train.jsonl").mkdir()
    with pytest.raises(ValueError, match="folder_train.jsonl is a folder; it must be a file"):
        open_captions(tmp_path / "folder_train.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="pipe.jsonl is a device or a pipe"):
        open_captions(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="/dev/zero is a device or a pipe"):
        open_chat("/dev/zero")
    with pytest.raises(ValueError, match="nothing.jsonl: no such file"):
        open_captions(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_record_is_at_most_as_long_as_a_line_may_be(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 64)
    monkeypatch.setattr(files, "MOST_BYTES_OF_A_LINE", 1000)
    records = [RECORD, {**RECORD, "captions": ["x" * 900]}, {**RECORD, "captions": ["x" * 9000]}]
    path = tmp_path / f"x.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(records))
        message = "x.json is not JSON: an item has .* KiB; .* at most 1 KiB .line 1, byte"
    else:
        write_records(path, records)
        message = "x.jsonl, line 3 has 9 KiB; it must be at most 1 KiB"
    with pytest.raises(ValueError, match=message):
        open_captions(path)


def test_a_line_of_100_mb_costs_no_memory(tmp_path):
    path = tmp_path / "x.jsonl"
    with open(path, "wb") as file:
        file.write(json.dumps(RECORD).encode() + b"\n")
        for _ in range(100):
            file.write(b"[" * 2**20)
    tracemalloc.start()
    with pytest.raises(BadSample, match="x.jsonl, line 2 has 100 MiB; it must be at most 16 MiB"):
        open_captions(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_marks_and_ends_of_lines_do_not_matter(tmp_path):
    lines = [json.dumps({**RECORD, "captions": [f"grün {i}"]}, ensure_ascii=False) for i in (0, 1)]
    for number, text in enumerate(
        ("\n".join(lines), "\r\n".join(lines), "\n\n" + "\n".join(lines))
    ):
        for encoding in ("utf-8", "utf-8-sig"):
            path = tmp_path / f"{number}{encoding}.jsonl"
            path.write_bytes(text.encode(encoding))
            texts = [row["text"] for row in open_captions(path).texts()]
            assert texts == ["grün 0", "grün 1"]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_manifest_may_be_a_member_of_an_archive(suffix, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "x").write_text(json.dumps([RECORD]) if suffix == "json" else json.dumps(RECORD))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "first")
        archive.add(tmp_path / "x", f"m.{suffix}")
    manifest = data.Manifest(f"{tmp_path}/a.tar::m.{suffix}", folder=tmp_path)
    source = data.Source("captions", [manifest])
    assert source[0]["text"] == "fine"
    with pytest.raises(ValueError, match="no such file or archive member"):
        data.Manifest(f"{tmp_path}/a.tar::n.{suffix}")


FORMATS = [
    {},
    {"indent": 3},
    {"indent": "\t", "ensure_ascii": False},
    {"separators": (",", ":"), "ensure_ascii": False},
    {"separators": (" ,\r\n\n", " : ")},
]


@pytest.mark.parametrize("piece", [5, 17, 64, 2**20])
@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("mark", ["", "\ufeff", " \r\n\t"])
def test_items_of_a_list_are_found_whatever_it_looks_like(
    mark, options, piece, tmp_path, monkeypatch
):
    monkeypatch.setattr(data, "PIECE", piece)
    items = [
        {"a": 'quote " brace } bracket ] comma ,', "b": "\\", "c": '\\\\"', "ü": "日本 \U0001f600"},
        {},
        [],
        {"nested": [[{"x": [1, -2.5e-10, True, None]}], {"y": {"z": []}}]},
        1234567890123,
        -1.5e300,
        "text , ] }",
        True,
        None,
        "\u2028",
        {"long": "x" * 300},
        12,
    ]
    path = tmp_path / "x.json"
    for count in range(len(items) + 1):
        text = mark + json.dumps(items[:count], **options) + "\n \n"
        path.write_bytes(text.encode())
        spans = data.find_items(str(path))
        content = path.read_bytes()
        found = []
        for start, end in zip(spans.starts, spans.ends, strict=True):
            found.append(json.loads(content[start:end]))
        assert found == items[:count]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "x.json must hold a list, found ''"),
        ("5", "x.json must hold a list, found '5'"),
        ("{}", "x.json must hold a list, found"),
        ("[", r"x.json is not JSON: Expecting value \(line 1, byte 2\)"),
        ("[1", r"a comma or \] expected \(line 1, byte 3\)"),
        ("[1,", "Expecting value"),
        ("[1,]", "Expecting value"),
        ("[,1]", "Expecting value"),
        ("[1 2]", r"a comma or \] expected \(line 1, byte 4\)"),
        ("[1]]", r"more after the list \(line 1, byte 4\)"),
        ("[1]\n\n x", r"more after the list \(line 3, byte 2\)"),
        ('[\n{"a": 1},\n{"a": }\n]', r"Expecting value \(line 3, byte 7\)"),
        ('[\n{"a": 1},\n{"a": "x\n"}\n]', r"Invalid control character at \(line 3, byte 9\)"),
        ('[{"a": "x]', r"Unterminated string starting at \(line 1, byte 8\)"),
        ("[{'a': 1}]", "Expecting property name"),
        ("[" * 100_000, "brackets are nested too deeply"),
        ("[" + "1" * 5000 + "]", "digits"),
        ("[truth]", "Expecting value"),
    ],
)
@pytest.mark.parametrize("piece", [3, 2**20])
def test_a_broken_list_is_refused_with_its_line(text, message, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", piece)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        data.find_items(str(tmp_path / "x.json"))
    check_sentence(str(error.value))


def test_lists_in_other_encodings_are_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(json.dumps([RECORD]).encode("utf-16"))
    with pytest.raises(ValueError, match="x.json is UTF-16 or UTF-32; it must be UTF-8"):
        open_chat(path)
    path.write_bytes('[{"image": "ä"}]'.encode("latin-1"))
    with pytest.raises(BadSample, match="x.json, item 0,.* the byte 0xe4 is not UTF-8"):
        open_chat(path)


def test_json_lines_under_another_name_are_told_apart(tmp_path):
    write_records(tmp_path / "x.json", [RECORD, RECORD])
    with pytest.raises(ValueError, match="Extra data .*; JSON Lines must be called .jsonl"):
        open_chat(tmp_path / "x.json")


def test_a_large_list_costs_little_memory(tmp_path):
    row = conversation({"from": "human", "value": "x " * 500}, GPT)
    path = tmp_path / "x.json"
    path.write_text("[" + ",".join([json.dumps(row)] * 10_000) + "]")
    assert path.stat().st_size > 10 * 2**20
    tracemalloc.start()
    source = open_chat(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 10_000
    assert source.lengths.tolist() == [-501] * 10_000
    assert kept < 2 * 2**20
    assert peak < 8 * 2**20


def test_missing_pictures_name_manifest_line_and_file(manifest):
    folder = manifest.parent
    (folder / "pictures/3.png").unlink()
    source = open_captions(manifest)
    with pytest.raises(BadSample, match="coco_train.jsonl, line 4: .*pictures/3.png: no such file"):
        source[6]
    records = files.read_json_lines(manifest)
    for record in records:
        record["image"] = record["image"].replace("in/", "out/")
    write_records(manifest, records)
    message = "line 13: .*more.tar::out/12.png: no such file or archive member"
    with pytest.raises(BadSample, match=message):
        open_captions(manifest)[24]
    (folder / "more.tar").write_bytes(b"\x1f\x8b" * 600)
    files.tar_index.cache_clear()
    with pytest.raises(BadSample, match="line 14: .*not an uncompressed tar"):
        open_captions(manifest)[26]


def test_a_file_without_rows_is_refused(tmp_path):
    (tmp_path / "empty_val.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows in .*empty_val.jsonl"):
        open_captions(tmp_path / "empty_val.jsonl")


# ---------------------------------------------------------------- digests
def test_the_digest_is_of_texts_and_labels_and_not_of_places(manifest, tmp_path):
    digest = open_captions(manifest).digest
    assert isinstance(digest, str) and int(digest, 16) > 0
    records = files.read_json_lines(manifest)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # other file names, paths of pictures and names of pictures, one line more that is blank
    moved = [{**record, "image": f"moved/{record['image_id']}.png"} for record in records]
    path = write_records(elsewhere / "other.jsonl", moved)
    path.write_text("\n" + path.read_text())
    assert open_captions(path).digest == digest
    # the same records in two files
    first = write_records(elsewhere / "a.jsonl", moved[:5])
    second = write_records(elsewhere / "b.jsonl", moved[5:])
    assert open_source("captions", [first, second]).digest == digest
    assert open_source("captions", [second, first]).digest != digest
    # one letter less, and two captions that change places
    for captions in (["first of 0", "second of "], ["second of 0", "first of 0"]):
        changed = [{**moved[0], "captions": captions}, *moved[1:]]
        assert open_captions(write_records(path, changed)).digest != digest


def test_the_digest_sees_labels_answers_and_turns(tmp_path):
    def digest(kind, record):
        return open_source(kind, [write_records(tmp_path / "x.jsonl", [record])]).digest

    pairs = [
        (
            "statements",
            {"images": ["a", "b"], "sentence": "x", "label": True},
            {"images": ["a", "b"], "sentence": "x", "label": False},
        ),
        (
            "hypotheses",
            {"image": "a", "hypothesis": "x", "label": "neutral"},
            {"image": "a", "hypothesis": "x", "label": "entailment"},
        ),
        (
            "questions",
            {"image": "a", "questions": [{"question": "x", "answers": {"yes": 1.0}}]},
            {"image": "a", "questions": [{"question": "x", "answers": {"yes": 0.9}}]},
        ),
        (
            "chat",
            {"conversations": [TURN, {"from": "gpt", "value": "y"}]},
            {"conversations": [TURN, {"from": "gpt", "value": "z"}]},
        ),
    ]
    for kind, one, other in pairs:
        assert digest(kind, one) == digest(kind, one)
        assert digest(kind, one) != digest(kind, other), kind


def test_an_arrow_file_and_a_manifest_of_the_same_data_have_one_digest(tmp_path):
    captions = [["one", "two"], ["three"], ["four"]]
    columns = {"image": [png(i) for i in range(3)], "caption": captions}
    write_arrow(tmp_path / "sbu.arrow", columns)
    records = [{"image": "a.png", "captions": texts} for texts in captions]
    path = write_records(tmp_path / "sbu.jsonl", records)
    assert open_captions(tmp_path / "sbu.arrow").digest == open_captions(path).digest


# ---------------------------------------------------------------- bad samples that are skipped
def test_skip_replaces_by_the_next_row_logs_and_counts(manifest, tokenizer, caplog):
    (manifest.parent / "pictures/3.png").write_bytes(png()[:70])

    def make(policy):
        return PairDataset(open_captions(manifest), tokenizer, CLIP, 16, on_bad_sample=policy)

    with pytest.raises(BadSample, match="line 4"):
        make("error")[0, 0, 7]
    dataset = make("skip")
    with caplog.at_level(logging.WARNING):
        items = [dataset[0, position, row] for position, row in enumerate([5, 6, 7, 8])]
    assert [item["image_index"].item() for item in items] == [2, 4, 4, 4]
    assert torch.equal(items[1]["input_ids"], items[3]["input_ids"])
    assert caplog.text.count("skipped bad sample") == 1
    assert "pictures/3.png" in caplog.text
    assert len(dataset.bad) == 1
    (manifest.parent / "pictures/4.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2 of .* samples are bad, more than 1 in 1,000"):
        for row in range(5, 12):
            dataset[0, 0, row]


@pytest.mark.parametrize("bad, stops", [(1, False), (4, False), (12, True)])
def test_skip_at_opening_stops_above_one_in_a_thousand(bad, stops, tmp_path):
    lines = ['{"image": "a.png", "captions": ["fine"]}'] * 2000
    for i in range(bad):
        lines[1000 + 80 * i] = "{"
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    if stops:
        with pytest.raises(ValueError, match="more than 1 in 1,000"):
            open_captions(path, on_bad_sample="skip")
    else:
        source = open_captions(path, on_bad_sample="skip")
        assert len(source) == 2000 - bad
        assert len(source.bad) == bad
        assert source.num_images == 2000


def test_data_without_one_readable_sample_are_refused(manifest, tokenizer, monkeypatch):
    dataset = PairDataset(open_captions(manifest), tokenizer, CLIP, 16, on_bad_sample="skip")

    def item(*args):
        raise BadSample("broken")

    monkeypatch.setattr(dataset, "item", item)
    with pytest.raises(ValueError, match="no sample of the data can be read"):
        dataset[0]


# ---------------------------------------------------------------- .arrow files of the ViLT family
@pytest.mark.parametrize("text", ["string", "large_string"])
def test_arrow_captions(text, tmp_path):
    pa = pytest.importorskip("pyarrow")
    text_type = {"string": pa.string(), "large_string": pa.large_string()}[text]
    captions = [["one", "two", "one"], ["three"], ["four", "five"]]
    columns = {
        "image": [png(i) for i in range(3)],
        "caption": pa.array(captions, pa.list_(text_type)),
        "image_id": pa.array(["a", "b", "c"], text_type),
    }
    write_arrow(tmp_path / "a.arrow", columns)
    source = pickle.loads(pickle.dumps(open_captions(tmp_path / "a.arrow")))
    assert [row["text"] for row in source.texts()] == ["one", "two", "three", "four", "five"]
    row = source[2]
    assert row["text"] == "three"
    assert row["image_id"] == "b"
    assert np.array_equal(row["images"][0], picture(1))
    write_arrow(
        tmp_path / "b.arrow",
        {"image": [b"no"], "caption": pa.array([["x", " "]], pa.list_(text_type))},
    )
    with pytest.raises(BadSample, match="b.arrow, row 0: 'caption' is ' '; it must not be"):
        open_captions(tmp_path / "b.arrow")


def test_texts_of_an_arrow_file_are_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(data.ArrowFile, "chunk_size", 3)
    columns = {"image": [png()] * 8, "caption": [[f"number {i}"] for i in range(8)]}
    write_arrow(tmp_path / "a.arrow", columns)
    source = open_captions(tmp_path / "a.arrow")
    assert [row["text"] for row in source.texts()] == [f"number {i}" for i in range(8)]


def test_arrow_questions_with_and_without_answers(tmp_path, tokenizer):
    pa = pytest.importorskip("pyarrow")
    write_arrow(tmp_path / "train.arrow", {**QUESTIONS, **ANSWERS})
    nulls = pa.array([[], []], pa.list_(pa.null()))
    write_arrow(tmp_path / "test.arrow", {**QUESTIONS, **dict.fromkeys(ANSWERS, nulls)})

    def dataset(name):
        source = open_source("questions", [tmp_path / f"{name}.arrow"])
        return PairDataset(source, tokenizer, CLIP, 16, answers=["yes", "no"])

    train = dataset("train")
    batch = collate([train[0], train[1], train[2]])
    expected = torch.tensor([[0.3, 0], [0, 0.6], [0.9, 0]])  # without "net"
    assert torch.allclose(batch["targets"], expected)
    assert batch["question_id"] == [11, 12, 13]
    assert batch["image_id"] == [5, 5, 6]
    assert batch["image_index"].tolist() == [0, 0, 1]
    test = dataset("test")
    assert "targets" not in test[2]
    assert test[2]["question_id"] == 13


def test_arrow_statements_and_hypotheses(tmp_path, tokenizer):
    write_arrow(
        tmp_path / "dev.arrow",
        {
            "image_0": [png(0)],
            "image_1": [png(1)],
            "questions": [["a", "b"]],
            "answers": [["True", "False"]],
            "identifier": ["dev-1"],
        },
    )
    statements = open_source("statements", [tmp_path / "dev.arrow"])
    dataset = PairDataset(statements, tokenizer, CLIP, 8)
    items = collate([dataset[0], dataset[1]])
    assert items["label"].tolist() == [1, 0]
    assert items["id"] == ["dev-1"] * 2
    assert torch.equal(items["pixels"][1], CLIP(picture(0)))
    assert torch.equal(items["pixels_1"][0], CLIP(picture(1)))
    write_arrow(
        tmp_path / "snli.arrow",
        {
            "image": [png(2)],
            "sentences": [[["premise", "x"], ["premise", "y"]]],
            "labels": [[2, 0]],
        },
    )
    hypotheses = open_source("hypotheses", [tmp_path / "snli.arrow"])
    texts = [(row["text"], row["label"]) for row in hypotheses.texts()]
    assert texts == [("x", 2), ("y", 0)]


@pytest.mark.parametrize(
    "kind, columns, message",
    [
        ("questions", {**QUESTIONS, **ANSWERS, "question_id": [[11], [13]]}, "equally long"),
        ("questions", {**QUESTIONS, **ANSWERS, "answer_scores": [[[1.0]], [[1.0]]]}, "equally"),
        (
            "questions",
            {**QUESTIONS, **ANSWERS, "answer_scores": [[[1.0], [0.6]], [[0.9]]]},
            r"answers, answer_scores must be equally long, found \[2, 1\]",
        ),
        (
            "statements",
            {
                "image_0": [png()],
                "image_1": [png()],
                "questions": [["a"]],
                "answers": [["maybe"]],
                "identifier": ["x"],
            },
            "'True' or 'False', found 'maybe'",
        ),
        (
            "hypotheses",
            {"image": [png()], "sentences": [[["a", "b"]]], "labels": [[3]]},
            "0, 1 or 2, found 3",
        ),
        (
            "hypotheses",
            {"image": [png()], "sentences": [[["a"]]], "labels": [[0]]},
            "premise and hypothesis",
        ),
        (
            "questions",
            {**QUESTIONS, **ANSWERS, "answers": [[["yes", "yes"], ["no"]], [["yes"]]]},
            "'answers' holds 'yes' twice for one question",
        ),
    ],
)
def test_arrow_rows_that_do_not_fit_are_named(kind, columns, message, tmp_path):
    write_arrow(tmp_path / "x.arrow", columns)
    with pytest.raises(BadSample, match=f"x.arrow, row 0: .*{message}"):
        open_source(kind, [tmp_path / "x.arrow"])


WRONG_COLUMNS = [
    ("captions", {"caption": [["a"], None]}, "row 1: 'caption' is None; it must be a list"),
    ("captions", {"caption": [["a"], [None]]}, "row 1: 'caption' is None; it must be a text"),
    ("captions", {"caption": ["a", "b"]}, "'caption' is string; it must be list of text"),
    ("captions", {"caption": [["a"], ["b"]], "image_id": [[1], [2]]}, "row 0: 'image_id' is"),
    ("questions", {"answers": [["net"], ["yes"]]}, "'answers' is .*; it must be list of list"),
    ("questions", {"answer_scores": [[[2.0, 0.3], [0.6]], [[0.9]]]}, "row 0: .* 'net' is 2.0"),
    ("questions", {"answer_scores": [[[1.0, 0.3], [0.6]], [[float("nan")]]]}, "row 1: .*is nan"),
    ("questions", {"answer_scores": [None, None]}, "row 0: 'answer_scores' is None"),
    ("questions", {"answers": [[["net", "yes"], ["no"]], []]}, "row 1: .*have some"),
    ("questions", {"answers": [[["net", None], ["no"]], [["a"]]]}, "row 0: 'answer' is None"),
    ("questions", {"question_id": [[[1], [2]], [[3]]]}, "row 0: 'question_id' is"),
    ("questions", {"questions": [["what?", " "], ["why?"]]}, "row 0: 'question' is ' '"),
]


@pytest.mark.parametrize("kind, columns, message", WRONG_COLUMNS)
def test_wrong_columns_are_named_at_opening(kind, columns, message, tmp_path):
    base = {**QUESTIONS, **ANSWERS} if kind == "questions" else {"image": [png(0), png(1)]}
    write_arrow(tmp_path / "x.arrow", {**base, **columns})
    with pytest.raises(ValueError, match=f"x.arrow.* {message}") as error:
        open_source(kind, [tmp_path / "x.arrow"])
    check_sentence(str(error.value))


@pytest.mark.parametrize("name", ["string_view", "list_view", "large_list_view", "fixed_size_list"])
def test_every_type_of_texts_lists_and_bytes_is_read(name, tmp_path):
    pa = pytest.importorskip("pyarrow")
    list_types = {
        "string_view": pa.list_(pa.string_view()),
        "list_view": pa.list_view(pa.string()),
        "large_list_view": pa.large_list_view(pa.string()),
        "fixed_size_list": pa.list_(pa.string(), 1),
    }
    columns = {
        "image": pa.array([png(0), png(1), png(2)], pa.binary_view()),
        "caption": pa.array([["one"], ["two"], ["three"]], list_types[name]),
    }
    write_arrow(tmp_path / "x.arrow", columns)
    source = open_captions(tmp_path / "x.arrow")
    assert [row["text"] for row in source.texts()] == ["one", "two", "three"]
    assert np.array_equal(source[2]["images"][0], picture(2))


def test_the_stream_format_is_read_and_a_cut_one_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    columns = {"image": [png(i) for i in range(4)], "caption": [[f"number {i}"] for i in range(4)]}
    write_arrow(tmp_path / "file.arrow", columns)
    table = pa.table(columns)
    path = tmp_path / "stream.ARROW"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    source = open_captions(path)
    assert source.digest == open_captions(tmp_path / "file.arrow").digest
    assert np.array_equal(source[3]["images"][0], picture(3))
    content = path.read_bytes()
    for size in (0, 3, 20, 300, len(content) // 2, len(content) - 200, len(content) - 8):
        cut = tmp_path / f"cut_{size}.arrow"
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"cut_{size}.arrow is not an Arrow file: .") as error:
            open_captions(cut)
        check_sentence(str(error.value))


@pytest.mark.parametrize("name", ["ArrowNotImplementedError", "ArrowKeyError", "ArrowTypeError"])
def test_whatever_pyarrow_raises_is_a_sentence(name, tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")

    def fail(*args):
        raise getattr(pa, name)("this is\nnot supported")

    write_arrow(tmp_path / "x.arrow", {"image": [png()], "caption": [["a"]]})
    monkeypatch.setattr(pa.ipc, "open_file", fail)
    with pytest.raises(ValueError, match="x.arrow is not an Arrow file: .*this is not supported"):
        open_captions(tmp_path / "x.arrow")


def test_whole_numbers_that_pandas_made_floats_are_whole_again(tmp_path):
    ids = {"image_id": [5.0, None], "question_id": [[11.0, None], [13.0]]}
    write_arrow(tmp_path / "x.arrow", {**QUESTIONS, **ANSWERS, **ids})
    rows = open_source("questions", [tmp_path / "x.arrow"]).texts()
    found = [(row["image_id"], row["question_id"]) for row in rows]
    assert repr(found) == "[(5, 11), (5, None), (None, 13)]"
    write_arrow(tmp_path / "y.arrow", {**QUESTIONS, **ANSWERS, "image_id": [5.0, 6.5]})
    with pytest.raises(BadSample, match="y.arrow, row 1: 'image_id' is 6.5"):
        open_source("questions", [tmp_path / "y.arrow"])


def test_texts_of_an_arrow_file_must_be_utf_8(tmp_path):
    pa = pytest.importorskip("pyarrow")
    damaged = pa.array([b"\xff\xfe"]).view(pa.string())
    captions = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), damaged)
    write_arrow(tmp_path / "x.arrow", {"image": [png()], "caption": captions})
    with pytest.raises(ValueError, match="x.arrow: the column 'caption' is damaged"):
        open_captions(tmp_path / "x.arrow")


def test_an_arrow_row_without_a_picture_is_named(tmp_path):
    write_arrow(tmp_path / "x.arrow", {"image": [png(), None], "caption": [["a"], ["b"]]})
    source = open_captions(tmp_path / "x.arrow")
    with pytest.raises(BadSample, match="x.arrow, row 1: an image expected"):
        source[1]


def test_arrow_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "bad.arrow").write_bytes(b"ARROW1 not really" * 9)
    with pytest.raises(ValueError, match="bad.arrow is not an Arrow file"):
        open_captions(tmp_path / "bad.arrow")
    write_arrow(tmp_path / "a.arrow", {"image": [png()], "texts": [["x"]]})
    with pytest.raises(ValueError, match="a.arrow lacks the columns caption; it has"):
        open_captions(tmp_path / "a.arrow")
    write_arrow(tmp_path / "b.arrow", {"image": [png()], "caption": ["x"]})
    message = "b.arrow: the column 'caption' is string; it must be list of text"
    with pytest.raises(ValueError, match=message):
        open_captions(tmp_path / "b.arrow")
    write_arrow(tmp_path / "c.arrow", {"image": ["path.png"], "caption": [["x"]]})
    with pytest.raises(ValueError, match="the column 'image' is string; it must be bytes"):
        open_captions(tmp_path / "c.arrow")
    with pytest.raises(ValueError, match="chat are not read from .arrow files"):
        open_source("chat", [tmp_path / "c.arrow"])


# ---------------------------------------------------------------- pre-training rows
def test_masking_statistics(tokenizer):
    ids = tokenizer(["a small red circle is left of a large blue square"], 16)[0][0]
    draws = [data.mask_tokens(ids, tokenizer, np.random.default_rng(i)) for i in range(20_000)]
    masked = torch.stack([ids for ids, _ in draws])
    labels = torch.stack([labels for _, labels in draws])
    chosen = labels != -100
    whole = ids.expand_as(labels)
    assert torch.equal(labels[chosen], whole[chosen])
    assert torch.equal(masked[~chosen], whole[~chosen])
    specials = [i for i, token in enumerate(ids.tolist()) if token in tokenizer.special_ids]
    assert not chosen[:, specials].any()
    n = chosen.sum().item()
    total = 20_000 * 11

    def within(count, of, p):
        """Five standard deviations of a binomial count."""
        return abs(count - of * p) < 5 * (of * p * (1 - p)) ** 0.5

    assert within(n, total, 0.15)
    share = 0.1 / tokenizer.vocab_size  # a random token can be <mask> or the token itself
    assert within((masked[chosen] == tokenizer.mask_id).sum().item(), n, 0.8 + share)
    assert within((masked[chosen] == labels[chosen]).sum().item(), n, 0.1 + share)
    assert masked.max() < tokenizer.vocab_size
    assert len(masked[chosen].unique()) > 0.9 * tokenizer.vocab_size
    assert not torch.equal(chosen[0], chosen[1:50].any(0))
    assert chosen[:, 1:12].float().mean(0).std() < 0.01


def pretraining(source, tokenizer, **options):
    return PretrainDataset(
        source, tokenizer, CLIP, max_text_len=16, batch_size=12, seed=3, **options
    )


def sampler(num_rows, batch, micro, rank=0, processes=1, unit=1, **options):
    return GlobalBatchSampler(num_rows, BatchPlan(batch, micro, processes, unit), rank, **options)


def test_exactly_half_of_each_global_batch_is_false(manifest, tokenizer):
    dataset = pretraining(open_captions(manifest), tokenizer)
    batches = []
    for keys in sampler(48, 12, 12, stop_step=9, seed=3):
        batches.append(collate([dataset[key] for key in keys]))
    labels = torch.stack([batch["itm_labels"] for batch in batches])
    assert (labels.sum(1) == 6).all()
    assert len(labels.unique(dim=0)) == 9
    equal = [(batch["pixels"] == batch["itm_pixels"]).flatten(1).all(1) for batch in batches]
    assert torch.equal(torch.stack(equal), labels == 1)


def test_matching_needs_two_pictures(tokenizer):
    with pytest.raises(ValueError, match="at least two images"):
        pretraining(demo_source("captions", "train", 1), tokenizer)


def test_false_pictures_come_from_the_whole_set(tokenizer):
    dataset = pretraining(demo_source("captions", "train", 8), tokenizer)
    pictures = [CLIP(dataset.source.images(i)[0]) for i in range(8)]
    which = Counter()
    for position in range(1400):
        pixels = dataset[0, position, 2]["itm_pixels"]
        (index,) = [i for i in range(8) if torch.equal(pictures[i], pixels)]
        which[index] += 1
    own = which.pop(2)
    assert 600 < own < 800
    assert len(which) == 7
    assert max(which.values()) < 1.5 * min(which.values())


def test_shared_images_have_one_false_of_two_partners(manifest, tokenizer):
    dataset = pretraining(open_captions(manifest), tokenizer, share_images=True)
    labels = [dataset[0, position, position % 48]["itm_labels"] for position in range(200)]
    pairs = torch.tensor(labels).view(-1, 2)
    assert (pairs.sum(1) == 1).all()
    assert 30 < pairs[:, 0].sum() < 70
    assert "itm_pixels" not in dataset[0]
    without_itm = pretraining(dataset.source, tokenizer, objectives=("mlm",))
    assert "itm_pixels" not in without_itm[0]


# ---------------------------------------------------------------- who takes which rows
def test_things_are_dealt_as_evenly_as_possible():
    assert deal(7, 3) == [3, 2, 2]
    assert deal(6, 3) == [2, 2, 2]
    assert deal(2, 3) == [1, 1, 0]


def test_the_largest_divisor():
    assert largest_divisor(12, 5) == 4
    assert largest_divisor(12, 12) == 12
    assert largest_divisor(12, 100) == 12
    assert largest_divisor(13, 12) == 1


PLANS = [  # batch, micro-batch, processes, unit
    (64, 64, 3, 2),
    (64, 8, 3, 2),
    (64, 7, 3, 2),
    (64, 64, 1, 1),
    (64, 5, 6, 1),
    (64, 1, 6, 2),
    (30, 4, 8, 1),
    (12, 4, 2, 1),
    (7, 2, 3, 1),
    (8, 1, 8, 1),
    (16, 2, 8, 2),
    (4096, 32, 6, 1),
]


@pytest.mark.parametrize("batch, micro, processes, unit", PLANS)
def test_every_place_of_a_batch_goes_to_one_process(batch, micro, processes, unit):
    plan = BatchPlan(batch, micro, processes, unit)
    place = 0
    for sizes, starts in zip(plan.sizes, plan.starts, strict=True):
        assert len(sizes) == len(starts) == processes
        for size, start in zip(sizes, starts, strict=True):
            assert start == place  # the processes' rows follow one another
            assert size % unit == 0  # partners stay together
            assert unit <= size
            place += size
        assert max(sizes) - min(sizes) <= unit  # as even as can be
    assert place == batch


@pytest.mark.parametrize("batch, micro, processes, unit", PLANS)
def test_a_process_has_at_most_micro_batch_size_rows(batch, micro, processes, unit):
    plan = BatchPlan(batch, micro, processes, unit)
    largest = max(max(sizes) for sizes in plan.sizes)
    units = batch // unit
    most = max(1, micro // unit)
    steps = len(plan.sizes)
    if most == 1 and units % processes:
        # some step has one unit more than processes, as none may be without a row
        assert steps == units // processes
        assert largest == 2 * unit
        return
    assert largest <= unit * most
    # with one step less some process would have more
    if steps > 1:
        rows_of_a_step = deal(units, steps - 1)[0]
        assert deal(rows_of_a_step, processes)[0] > most


def test_an_uneven_deal_in_numbers():
    assert BatchPlan(64, 64, 3, unit=2).sizes == [[22, 22, 20]]
    assert BatchPlan(64, 64, 3, unit=2).starts == [[0, 22, 44]]
    assert BatchPlan(64, 8, 3, unit=2).sizes == [[8, 8, 6], [8, 8, 6], [8, 6, 6]]
    assert BatchPlan(7, 2, 3).sizes == [[2, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    "batch, processes, unit, least", [(2, 3, 1, 3), (5, 1, 2, 2), (4, 3, 2, 6), (7, 8, 1, 8)]
)
def test_a_batch_that_cannot_be_dealt_is_refused(batch, processes, unit, least):
    message = (
        f"--batch_size {batch} cannot be dealt to {processes} processes: "
        f"it must be a multiple of {unit}, and at least {least}"
    )
    with pytest.raises(ValueError, match=message):
        BatchPlan(batch, 4, processes, unit)


# ---------------------------------------------------------------- samplers
def stream(num_rows, batch, micro, processes, stop, start=0, seed=0, unit=1, **options):
    """The keys as all processes see them: micro-step for micro-step, process for process."""
    of_processes = []
    for rank in range(processes):
        one = sampler(
            num_rows,
            batch,
            micro,
            rank,
            processes,
            unit,
            seed=seed,
            start_step=start,
            stop_step=stop,
            **options,
        )
        keys = list(one)
        assert len(one) == len(keys)
        of_processes.append(keys)
    result = []
    for micro_step in zip(*of_processes, strict=True):
        for keys in micro_step:
            result += keys
    return result


def test_the_positions_run_over_the_epochs_permutations():
    keys = stream(20, 12, 12, 1, 5)
    assert [key[:2] for key in keys] == [(i // 20, i) for i in range(60)]
    orders = [[row for _, _, row in keys[i : i + 20]] for i in (0, 20, 40)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert stream(20, 12, 12, 1, 5, seed=1) != keys
    assert stream(20, 12, 6, 2, 5, start=2) == keys[24:]


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("micro", [1, 2, 3, 5, 12])
def test_the_global_order_does_not_depend_on_processes_or_accumulation(processes, micro):
    assert stream(20, 12, micro, processes, 5) == stream(20, 12, 12, 1, 5)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 8])
def test_partners_stay_together_and_every_position_comes_once(processes):
    keys = stream(100, 64, 8, processes, 3, unit=2)
    assert [position for _, position, _ in keys] == list(range(3 * 64))
    for rank in range(processes):
        for batch in sampler(100, 64, 8, rank, processes, 2, stop_step=3):
            positions = [position for _, position, _ in batch]
            assert positions[0] % 2 == 0
            assert len(positions) % 2 == 0
            assert positions == list(range(positions[0], positions[0] + len(positions)))


def test_a_sampler_knows_how_many_batches_it_has():
    one = sampler(20, 12, 3, 1, 2, seed=0, start_step=1, stop_step=5)
    assert len(one) == len(list(one)) == 8


@pytest.mark.parametrize("origin", ["manifest", "arrow", "demo"])
def test_items_do_not_depend_on_workers(origin, manifest, tokenizer, tmp_path):
    if origin == "manifest":
        source = open_captions(manifest)
    elif origin == "demo":
        source = demo_source("captions", "train", 30)
    else:
        columns = {"image": [png(i) for i in range(9)], "caption": [[f"no {i}"] for i in range(9)]}
        write_arrow(tmp_path / "sbu.arrow", columns)
        source = open_captions(tmp_path / "sbu.arrow")
    transform = image_transform("albef_randaug_wc", 16, True)
    dataset = PretrainDataset(source, tokenizer, transform, 16, batch_size=8, seed=5)
    dataset = pickle.loads(pickle.dumps(dataset))
    runs = []
    for workers, micro in ((0, 8), (2, 8), (2, 4)):
        order = sampler(len(source), 8, micro, seed=5, stop_step=4)
        loader = DataLoader(dataset, batch_sampler=order, collate_fn=collate, num_workers=workers)
        runs.append(list(loader))
    tensors = "pixels itm_pixels mlm_ids mlm_labels itm_labels input_ids image_index"
    for name in tensors.split():
        whole = [torch.cat([batch[name] for batch in run]) for run in runs]
        assert torch.equal(whole[0], whole[1]), name
        assert torch.equal(whole[0], whole[2]), name


def test_batches_are_dealt_whole_to_the_processes(monkeypatch):
    rows = [{"x": torch.tensor(i)} for i in range(11)]
    everything = []
    for rank in range(3):
        monkeypatch.setattr(data, "ranks", lambda rank=rank: (rank, 3))
        for places, batch in data.batches(rows, 2):
            assert batch["x"].tolist() == list(places)
            everything.append(list(places))
    assert sorted(everything) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]


def test_length_grouped_order_equals_the_official_sampler():
    path = GOLDEN / "llava_ov_manager/optim/sampler.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    for case in json.loads(path.read_text())["cases"]:
        generator = torch.Generator().manual_seed(case["torch_seed"])
        order = data.length_grouped(
            case["signed_lengths"], case["batch_size"], case["world_size"], generator
        )
        assert order == case["indices"]
        # packed, as a source has them
        generator = torch.Generator().manual_seed(case["torch_seed"])
        packed = np.array(case["signed_lengths"], dtype=np.int32)
        again = data.length_grouped(packed, case["batch_size"], case["world_size"], generator)
        assert again == case["indices"]


def test_length_grouped_batches_are_of_one_modality():
    lengths = [int(n) for n in np.random.default_rng(0).integers(5, 300, 90)]
    lengths[::3] = [-n for n in lengths[::3]]
    options = {"seed": 2, "lengths": lengths, "group_size": 4}
    rows = []
    for keys in sampler(90, 8, 4, stop_step=11, **options):
        rows.append([row for _, _, row in keys])
    all_rows = [row for batch in rows for row in batch]
    assert len(set(all_rows)) == len(all_rows) == 88
    mixed = [batch for batch in rows if len({lengths[row] > 0 for row in batch}) > 1]
    assert len(mixed) <= 4
    # the batches of a step are not those that neighbours would make
    apart = [row for _, _, row in stream(90, 8, 4, 2, 11)]
    steps = [sorted(rows[i] + rows[i + 1]) for i in range(0, 22, 2)]
    assert steps != [sorted(apart[i : i + 8]) for i in range(0, 88, 8)]
    # and they do not depend on the number of processes
    for processes, micro in ((2, 4), (1, 8), (4, 2), (3, 4)):
        keys = stream(90, 8, micro, processes, 11, **options)
        assert [row for _, _, row in keys] == all_rows


# ---------------------------------------------------------------- LLaVA's conversations
def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def chats(tmp_path):
    """a.json and b.jsonl, nine conversations each, with pictures in pictures/."""
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / f"pictures/{i}.png").write_bytes(png(i))
    records = []
    for i in range(9):
        conversation = turns("<image>\nwhat?", f"answer {i}")
        records.append({"id": i, "image": "0.png", "conversations": conversation})
    (tmp_path / "a.json").write_text(json.dumps(records))
    write_records(tmp_path / "b.jsonl", records)
    return tmp_path


def ids(source):
    return [row["id"] for row in source.texts()]


STRATEGIES = [
    ("all", range(9)),
    ("first:4", range(4)),
    ("end:2", (7, 8)),
    ("first:10%", (0,)),
    ("end:12%", (7, 8)),
    ("first:99", range(9)),
    ("first:100%", range(9)),
    ("end:0", ()),
]


@pytest.mark.parametrize("strategy, expected", STRATEGIES)
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_mixtures(strategy, expected, suffix, chats):
    first = {"json_path": str(chats / "a.json"), "sampling_strategy": strategy}
    text = json.dumps({"datasets": [first, {"json_path": str(chats / "b.jsonl")}]})
    if suffix == "yaml":
        text = (
            f"# mixture\ndatasets:\n  - json_path: '{chats}/a.json'  # one\n"
            f'    sampling_strategy: "{strategy}"\n\n  - json_path: {chats}/b.jsonl\n'
        )
    (chats / f"mix.{suffix}").write_text(text)
    source = open_chat(chats / f"mix.{suffix}", chats / "pictures")
    assert ids(source) == [*expected, *range(9)]
    first_row = source[0]
    assert np.array_equal(first_row["images"][0], picture(0))
    assert first_row["conversation"][1]["value"] == f"answer {first_row['id']}"


def test_unquoted_strategies_are_texts_in_yaml(chats):
    text = f"datasets:\n- json_path: {chats}/a.json\n  sampling_strategy: first:10%\n"
    (chats / "mix.yaml").write_text(text)
    assert ids(open_chat(chats / "mix.yaml")) == [0]


def test_paths_in_a_mixture_are_relative_to_it(chats):
    (chats / "mix.yaml").write_text("datasets:\n- json_path: a.json\n- json_path: b.jsonl\n")
    assert len(open_chat(chats / "mix.yaml")) == 18
    (chats / "mix.json").write_text('{"datasets": [{"json_path": "a.json"}]}')
    assert len(open_chat(chats / "mix.json")) == 9


def test_random_sampling_and_braces(chats):
    draws = [data.sample_rows("random:5", 50, seed).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 5
    assert len(data.sample_rows("random:31%", 10, 0)) == 4
    (chats / "c.json").write_text((chats / "a.json").read_text())
    assert len(open_chat(f"{chats}/{{a,c}}.json", chats / "pictures")) == 18
    with pytest.raises(ValueError, match="'some:3' is none of all, first:N"):
        data.sample_rows("some:3", 10, 0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("datasets:\n- json_path: x\n  weight: 3", "mix.yaml, entry 1: unknown key 'weight'"),
        ("- sampling_strategy: all\n- x", "mix.yaml, entry 1: json_path is None"),
        ("datasets:\n- json_path: a.json\n- x", "mix.yaml, entry 2 is 'x'"),
        ("datasets:\n- json_path: [a.json]", r"mix.yaml, entry 1: json_path is \['a.json'\]"),
        (
            "datasets:\n- json_path: a.json\n  sampling_strategy: some:3",
            "mix.yaml, entry 1: sampling_strategy 'some:3' is none of",
        ),
        (
            "datasets:\n- json_path: a.json\n  sampling_strategy: 3",
            "mix.yaml, entry 1: sampling_strategy '3' is none of",
        ),
        ("datasets: []", r"mix.yaml has no list `datasets`, found \[\]"),
        ("datasets:", "mix.yaml has no list `datasets`, found ''"),
        ("datasets:\n- json_path: 5", "mix.yaml, entry 1: json_path '5': no such file"),
        ("datasets:\n- json_path: ''", "mix.yaml, entry 1: json_path is ''; it must be a path"),
        ('datasets:\n- json_path: "a\\0"', "mix.yaml, entry 1: json_path is .*must be a path"),
        ('datasets:\n- json_path: "\\ud800"', "mix.yaml"),
        ("datasets:\n- json_path: no.json", "entry 1: json_path 'no.json': no such file, neither"),
        ("datasets:\n- json_path: pictures", "pictures is a folder; it must be a file"),
        (
            f"datasets:\n- json_path: a.json\n  sampling_strategy: first:{'9' * 5000}",
            "mix.yaml, entry 1: sampling_strategy .* is none of",
        ),
        ("datasets: " + "[" * 5000, "mix.yaml is not YAML"),
        ("datasets:\n- !!python/object/apply:os.system [ls]", r"entry 1 is \['ls'\]"),
        ("# " + "x" * 2**20, "mix.yaml has 1 MiB; it must be at most 256 KiB"),
        ("datasets: 3", "mix.yaml has no list `datasets`, found '3'"),
        ("", "mix.yaml has no list `datasets`, found None"),
        ("datasets: [", "mix.yaml is not YAML: .*line 1"),
        ("a: b: c", "mix.yaml is not YAML"),
    ],
)
def test_wrong_mixtures_name_file_and_entry(text, message, chats):
    (chats / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        open_chat(chats / "mix.yaml")
    check_sentence(str(error.value))


def test_mixtures_in_other_encodings_are_named(chats):
    for encoding, words in (("utf-16", "is UTF-16"), ("latin-1", "line 2: the byte 0xe4")):
        (chats / "mix.yaml").write_bytes("datasets:\n- json_path: ä.json".encode(encoding))
        with pytest.raises(ValueError, match=f"mix.yaml.* {words}"):
            open_chat(chats / "mix.yaml")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"datasets": []}, "has no list"),
        ({"datasets": {"a": 1}}, "has no list"),
        ({"datasets": [{}]}, "entry 1: json_path is None"),
        ({"datasets": [None]}, "entry 1 is None"),
        ({"dataset": []}, "must hold a list of conversations, or an object with"),
        ([], "no rows in"),
        ([5], "item 0"),
        ("text", "must hold a list"),
        (None, "must hold a list"),
    ],
)
def test_wrong_json_files_are_named(content, message, chats):
    (chats / "mix.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        open_chat(chats / "mix.json")
    assert "mix.json" in str(error.value)


@pytest.mark.parametrize("name", ["mix.YAML", "mix.Yml", "mix.JSON"])
def test_endings_may_be_capital_letters(name, chats):
    (chats / name).write_text('{"datasets": [{"json_path": "a.json"}]}')
    assert len(open_chat(chats / name)) == 9


def test_a_file_with_braces_in_its_name_is_taken_as_it_stands(chats):
    for name in ("x{1}.json", "x{a,b}.json"):
        (chats / name).write_bytes((chats / "a.json").read_bytes())
        assert len(open_chat(chats / name)) == 9


@pytest.mark.parametrize("name", ["nothing.json", "nothing.jsonl", "nothing.yaml"])
def test_conversations_that_are_not_there(name, chats):
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        open_chat(chats / name)


def test_chat_rows_and_their_published_inconsistencies(chats):
    records = [
        {"id": "text", "conversations": turns("hi there", "hello")},
        {"id": "no tag", "image": "1.png", "conversations": turns("what is it", "a cat")},
        {
            "id": "list",
            "image": ["0.png", "2.png"],
            "conversations": turns("<image> <image>\nsame?", "no"),
        },
        {"id": "late", "image": "1.png", "conversations": turns("what\n<image>", "a cat")},
        {"id": "untagged", "image": ["0.png", "2.png"], "conversations": turns("same?", "no")},
        {"id": "gone", "image": "9.png", "conversations": turns("<image>", "x")},
    ]
    write_records(chats / "x.jsonl", records)
    source = open_chat(chats / "x.jsonl", chats / "pictures")
    rows = [source[i] for i in range(5)]
    assert [len(row["images"]) for row in rows] == [0, 1, 2, 1, 2]
    assert np.array_equal(rows[2]["images"][1], picture(2))
    assert [row["conversation"][0]["value"] for row in rows] == [
        "hi there",
        "<image>\nwhat is it",
        "<image> <image>\nsame?",
        "what\n<image>",
        "<image> <image>\nsame?",
    ]
    assert [row["length"] for row in source.texts()][:4] == [-3, 6, 4, 4]
    with pytest.raises(BadSample, match="x.jsonl, line 6: .*pictures/9.png: no such file"):
        PairDataset(source)[0, 0, 5]
    assert PairDataset(source)[0, 7, 3]["id"] == "late"
    assert collate([rows[0], rows[1]])["id"] == ["text", "no tag"]


# ---------------------------------------------------------------- conversations as tokens
TAGS = ("", "<image>\n", "<image> <image>\n")


@pytest.fixture
def conversations(tmp_path):
    """chat.json: three rows with no, one, two pictures; captions.json: three with one."""
    for i in range(3):
        picture(i, (40 - 2 * i, 12 + 5 * i)).save(tmp_path / f"{i}.png")
    chats = []
    captions = []
    for i in range(3):
        images = [["0.png", "1.png", "2.png"][k] for k in range(i)]
        answer = f"a picture{' of it' * i}"
        chats.append({"image": images, "conversations": turns(f"{TAGS[i]}what is {i}?", answer)})
        caption = turns("<image>\nDescribe.", answer)
        captions.append({"image": f"{i}.png", "conversations": caption})
    (tmp_path / "chat.json").write_text(json.dumps(chats))
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return tmp_path


@pytest.fixture(scope="module")
def chat_tokenizer():
    return load_tokenizer(LOV / "chat")


def chat_dataset(path, tokenizer, **options):
    source = open_chat(path)
    config = LlavaManagerConfig.tiny(image_size=16, patch_size=8)
    return ChatDataset(source, range(len(source)), config, tokenizer=tokenizer, **options)


def test_rows_are_encoded_as_stage_and_images_say(conversations, chat_tokenizer):
    dataset = chat_dataset(conversations / "chat.json", chat_tokenizer)
    assert [len(dataset[i]["images"]) for i in range(3)] == [0, 1, 2]
    assert len(dataset[1]["images"][0].pixels) > 1  # a grid
    tiles = [len(image.pixels) for image in dataset[2]["images"]]
    assert tiles == [1, 1]  # several images: padded, one tile each
    for i in range(3):
        conversation = turns(f"{TAGS[i]}what is {i}?", f"a picture{' of it' * i}")
        expected = chat.encode_chat(conversation, chat_tokenizer, has_image=i > 0)
        assert dataset[i]["tokens"] == expected
    strict = chat_dataset(conversations / "chat.json", chat_tokenizer, strict_labels=True)
    strict_ids, strict_labels = strict[1]["tokens"]
    loose_ids, loose_labels = dataset[1]["tokens"]
    assert strict_ids == loose_ids
    assert strict_labels.count(chat.IGNORE) > loose_labels.count(chat.IGNORE)


def test_the_style_changes_at_a_position_of_the_global_order(conversations, chat_tokenizer):
    dataset = chat_dataset(conversations / "captions.json", chat_tokenizer, plain=7)
    caption = chat_tokenizer.encode("a picture of it\n")
    assert dataset[0, 6, 1]["tokens"][0] == [chat.IMAGE_TOKEN, *caption]
    whole = turns("<image>\nDescribe.", "a picture of it")
    assert dataset[0, 7, 1]["tokens"] == chat.encode_chat(whole, chat_tokenizer)


def test_captions_of_another_source_come_first(conversations, chat_tokenizer):
    dataset = chat_dataset(
        conversations / "chat.json",
        chat_tokenizer,
        captions=open_chat(conversations / "captions.json"),
        plain=2,
    )
    assert [len(dataset[0, position, 0]["images"]) for position in range(4)] == [1, 1, 0, 0]


def test_images_that_do_not_fit_the_turns_raise(tmp_path, chat_tokenizer):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    leading = {"from": "gpt", "value": "<image> hello"}  # such a turn is not trained on
    records = [
        {"image": "a.png", "conversations": [leading, *turns("hi", "a picture")]},
        {"conversations": turns("hi", "a picture")},
    ]
    path = write_records(tmp_path / "chat.jsonl", records)
    with pytest.raises(BadSample, match="chat.jsonl, line 1: 1 images but 0 <image> tags, and 1"):
        open_chat(path)
    source = open_chat(path, on_bad_sample="skip")
    assert [row["image_index"] for row in source.texts()] == [1]
    text_only = write_records(tmp_path / "text.jsonl", records[1:])
    with pytest.raises(BadSample, match="text.jsonl, line 1: style plain needs"):
        chat_dataset(text_only, chat_tokenizer, plain=2)[0]


def test_conversations_are_padded_and_their_pictures_stand_in_one_list(
    conversations, chat_tokenizer
):
    dataset = chat_dataset(conversations / "chat.json", chat_tokenizer)
    items = [dataset[i] for i in range(3)]
    batch = collate_conversations(items)
    lengths = [len(item["tokens"][0]) for item in items]
    assert batch["input_ids"].shape == batch["labels"].shape == (3, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert len(batch["images"]) == 3
    assert torch.equal(batch["images"][0].pixels, items[1]["images"][0].pixels)
    assert torch.equal(batch["images"][2].pixels, items[2]["images"][1].pixels)
    assert batch["image_index"] == [0, 1, 2]


# ---------------------------------------------------------------- several records of one picture
def captioned(*pictures):
    """A record for each picture, with a caption of its own."""
    return [{"image": name, "captions": [f"text {i}"]} for i, name in enumerate(pictures)]


@pytest.fixture
def copies(tmp_path):
    """Two pictures, the first one under several paths."""
    (tmp_path / "s").mkdir()
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "link.png").symlink_to("0.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "0.png", "0.png")
        archive.add(tmp_path / "1.png", "1.png")
    return tmp_path


@pytest.mark.parametrize(
    "names",
    [
        ("0.png", "0.png", "1.png"),
        ("0.png", "./s/../0.png", "1.png"),
        ("0.png", "link.png", "1.png"),
        ("a.tar::0.png", "./a.tar::0.png", "a.tar::1.png"),
    ],
)
def test_records_of_one_picture_are_one_picture_of_a_retrieval_set(names, copies, tokenizer):
    path = write_records(copies / "x.jsonl", captioned(*names))
    source = open_captions(path)
    retrieval = data.group_by_picture(source)
    assert retrieval == ([0, 2], ["text 0", "text 1", "text 2"], [0, 0, 1])
    absolute = write_records(copies / "s" / "y.jsonl", captioned(str(copies / names[0])))
    both = data.group_by_picture(open_source("captions", [path, absolute]))
    assert both == retrieval  # the same caption of the same picture counts once
    check_false_pictures(source, tokenizer)


def check_false_pictures(source, tokenizer):
    """A pair is called false if, and only if, its picture is another one."""
    dataset = pretraining(source, tokenizer)
    labels = []
    for position in range(60):
        item = dataset[0, position, position % len(dataset)]
        is_own = torch.equal(item["pixels"], item["itm_pixels"])
        assert is_own == bool(item["itm_labels"])
        labels.append(is_own)
    assert sum(labels) == 30


def test_rows_of_one_picture_in_an_arrow_file(tmp_path, tokenizer):
    columns = {"image": [png(0), png(0), png(1)], "caption": [["a"], ["b", "a"], ["a"]]}
    write_arrow(tmp_path / "x.arrow", columns)
    source = open_source("captions", [tmp_path / "x.arrow"])
    retrieval = data.group_by_picture(source)
    assert retrieval == ([0, 2], ["a", "b", "a"], [0, 0, 1])
    check_false_pictures(source, tokenizer)


@pytest.mark.parametrize("suffix", ["jsonl", "arrow"])
def test_matching_needs_two_different_pictures(suffix, copies, tokenizer):
    if suffix == "jsonl":
        path = write_records(copies / "x.jsonl", captioned("0.png", "./0.png", "link.png"))
    else:
        path = copies / "x.arrow"
        write_arrow(path, {"image": [png(0)] * 3, "caption": [["a"], ["b"], ["c"]]})
    with pytest.raises(ValueError, match="at least two images, the data has one"):
        pretraining(open_source("captions", [path]), tokenizer)


def test_different_pictures_are_drawn_as_ever(manifest, tokenizer):
    dataset = pretraining(open_captions(manifest), tokenizer)
    for row in range(48):
        own = int(dataset.source.image_of[row])
        rng = np.random.default_rng(row)
        expected = own
        while expected == own:
            expected = int(dataset.source.image_of[rng.integers(48)])
        assert dataset.draw_other_image(row, np.random.default_rng(row)) == expected
    drawn = demo_source("captions", "heldout", 40)
    texts = drawn.texts()
    retrieval = data.group_by_picture(drawn)
    assert retrieval.records == list(range(40))
    assert retrieval.texts == [row["text"] for row in texts]
    assert retrieval.image_index == [row["image_index"] for row in texts]


# ---------------------------------------------------------------- misspelt keys
MISSPELT = [
    (
        "questions",
        question(answer={"y": 1}),
        "no 'answers', but 'answer' is {'y': 1}; the key must",
    ),
    ("questions", question(Answers={"y": 1}), "no 'answers', but 'Answers' is"),
    ("questions", question(answers=None, anwsers={"y": 1}), "no 'answers', but 'anwsers' is"),
    ("questions", question(questionType="what"), "no 'question_type', but 'questionType' is"),
    ("questions", {**question(), "answers": {"y": 1}}, "beside 'questions'; it must be in each"),
    (
        "statements",
        {"images": ["a", "b"], "sentence": "x", "lable": True},
        "no 'label' in .*; its key 'lable' looks like it",
    ),
    ("hypotheses", {"image": "a", "hypothesis": "x", "Label": "neutral"}, "its key 'Label' looks"),
    ("captions", {"image": "a", "caption": ["x"]}, "its key 'caption' looks like it"),
    ("captions", {"Image": "a", "captions": ["x"]}, "no 'image', but 'Image' is 'a'"),
    ("chat", conversation(TAGGED, GPT, iamge="a"), "no 'image', but 'iamge' is 'a'"),
    ("chat", {"conversation": [TAGGED, GPT], "image": "a"}, "its key 'conversation' looks like it"),
]


@pytest.mark.parametrize("kind, record, message", MISSPELT)
def test_a_key_that_looks_like_a_missing_one_is_named(kind, record, message, tmp_path):
    path = write_records(tmp_path / "x.jsonl", [record])
    with pytest.raises(BadSample, match=f"x.jsonl, line 1: .*{message}"):
        open_source(kind, [path])


@pytest.mark.parametrize(
    "kind, record",
    [
        ("questions", question(answer=None, answer_type="other", question_id=5, url="u")),
        ("questions", question(answers={"y": 1}, answer="y", question_types=["what"])),
        ("questions", {**question(answers={"y": 1}), "answers": 5, "idx": 1, "source": "s"}),
        ("captions", {"image": "a", "captions": ["x"], "caption": "x", "images": [], "id": 1}),
        ("chat", conversation(TURN, GPT, image_id=5, images=[], Image=None, image_source="a")),
    ],
)
def test_keys_that_nobody_misses_are_left_alone(kind, record, tmp_path):
    if record.get("questions", [{}])[0].get("question_types"):
        record["questions"][0]["question_type"] = "what"
    assert len(open_source(kind, [write_records(tmp_path / "x.jsonl", [record])])) == 1


# ---------------------------------------------------------------- the index of a large source
@pytest.fixture
def indexed(monkeypatch):
    """Every source is large enough for an index."""
    monkeypatch.setattr(data, "INDEX_FROM", 0)


@pytest.fixture
def readings(monkeypatch):
    """A list that gets an entry for each time that a source reads all its records."""
    entries = []
    read = data.Source.read

    def counted(source, *args, **kwargs):
        entries.append(source.kind)
        read(source, *args, **kwargs)

    monkeypatch.setattr(data.Source, "read", counted)
    return entries


def index_files(folder):
    return sorted(path.name for path in folder.iterdir() if ".index" in path.name)


def all_of(source):
    """What a user can see of a source, but for its pictures."""
    records = range(source.num_images)
    return {
        "digest": source.digest,
        "has_answers": source.has_answers,
        "seen": source.seen,
        "bad": sorted(source.bad),
        "image_of": (source.image_of.tolist(), str(source.image_of.dtype)),
        "lengths": (source.lengths.tolist(), str(source.lengths.dtype)),
        "names": [source.name(index) for index in records],
        "places": [[int(place) for place in part.places] for part in source.parts],
        "texts": source.texts(),
    }


def write_parts(folder, kind):
    """Files of one kind, some with blank lines and bad records."""
    if kind == "captions":
        lines = ['{"image": "a.png", "captions": ["one", "two"]}', "", "{"]
        for i in range(3000):
            lines.append(f'{{"image": "{i}.png", "captions": ["number {i}"], "image_id": {i}}}')
        (folder / "a.jsonl").write_text("\n".join(lines))
        (folder / "b.jsonl").write_text("\n".join(["[]", *lines[3:]]) + "\n\n")
    elif kind == "questions":
        write_records(folder / "a.jsonl", [question(answers={"y": 0.5})] * 20)
        columns = {
            "image": [png()],
            "questions": [["q"]],
            "question_id": [[1]],
            "answers": [[["y"]]],
            "answer_scores": [[[1.0]]],
        }
        write_arrow(folder / "b.arrow", columns)
    else:
        records = [{"id": i, "conversations": turns("<image>", f"a{i}")} for i in range(9)]
        (folder / "a.json").write_text(json.dumps(records, indent=1))
        write_records(folder / "b.jsonl", records)
        entries = [
            {"json_path": "a.json", "sampling_strategy": "random:5"},
            {"json_path": "b.jsonl", "sampling_strategy": "end:3"},
            {"json_path": "b.jsonl"},
        ]
        (folder / "mix.yaml").write_text(json.dumps({"datasets": entries}))


def open_parts(folder, kind, policy="skip", seed=3):
    if kind == "chat":
        return open_chat(folder / "mix.yaml", seed=seed, on_bad_sample=policy)
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in (".jsonl", ".arrow")]
    return open_source(kind, paths, policy)


@pytest.mark.parametrize("kind", ["captions", "questions", "chat"])
def test_a_source_is_the_same_with_and_without_an_index(kind, tmp_path, monkeypatch, readings):
    write_parts(tmp_path, kind)
    in_memory = all_of(open_parts(tmp_path, kind))
    assert index_files(tmp_path) == []
    monkeypatch.setattr(data, "INDEX_FROM", 0)
    for times_read in (2, 2, 2):  # the first one writes it
        source = open_parts(tmp_path, kind)
        assert all_of(source) == in_memory
        assert len(readings) == times_read
        with pytest.raises(ValueError, match="read-only"):
            source.image_of[0] = 1
    assert len(index_files(tmp_path)) == 1


def test_small_sources_and_drawn_ones_leave_no_file(manifest, tmp_path):
    open_captions(manifest)
    demo_source("captions", "train", 10)
    assert index_files(manifest.parent) == []
    assert data.INDEX_FROM > manifest.stat().st_size


def test_bad_records_of_an_index_are_met_as_in_a_scan(tmp_path, indexed, readings, caplog):
    write_parts(tmp_path, "captions")
    source = open_parts(tmp_path, "captions")
    messages = [record.message for record in caplog.records]
    assert len(messages) == len(source.bad) == 2
    caplog.clear()
    open_parts(tmp_path, "captions")
    assert [record.message for record in caplog.records] == messages
    with pytest.raises(BadSample, match="a.jsonl, line 3, is not JSON: .*never skipped"):
        open_parts(tmp_path, "captions", policy=data.HELD_OUT)
    assert readings == ["captions"]


def test_a_bad_record_is_named_when_the_index_is_built(tmp_path, indexed):
    path = write_records(tmp_path / "x.jsonl", [RECORD, RECORD])
    path.write_text(path.read_text() + '{"image": "a.png"}\n')
    for _ in range(2):
        with pytest.raises(BadSample, match="x.jsonl, line 3: there is no 'captions'"):
            open_captions(path)
    assert index_files(tmp_path) == []


def rewrite_later(path, content):
    """Other content of the same age in whole seconds, written a little later."""
    modified = path.stat().st_mtime_ns
    path.write_text(content)
    os.utime(path, ns=(modified, modified + 1))


CHANGES = {
    "another line": lambda path: rewrite_later(path, path.read_text() + json.dumps(RECORD)),
    "another text": lambda path: rewrite_later(path, path.read_text().replace("7 of", "8 of")),
    "another time": lambda path: os.utime(path, (7, 7)),
    "an older file": lambda path: path.write_text(json.dumps(RECORD)) and os.utime(path, (7, 7)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_of_older_data_is_built_anew(change, tmp_path, indexed, readings, monkeypatch):
    records = [{"image": "a.png", "captions": [f"text {i} of {i}"]} for i in range(10)]
    path = write_records(tmp_path / "x.jsonl", records)
    open_captions(path)
    names = index_files(tmp_path)
    CHANGES[change](path)
    source = open_captions(path)
    assert len(readings) == 2
    open_captions(path)
    assert len(readings) == 2
    assert index_files(tmp_path) == names
    monkeypatch.setattr(data, "INDEX_FROM", 2**40)
    assert all_of(source) == all_of(open_captions(path))


def test_an_index_of_another_seed_or_edition_is_built_anew(
    tmp_path, indexed, readings, monkeypatch
):
    write_parts(tmp_path, "chat")
    first = ids(open_parts(tmp_path, "chat", seed=3))
    assert ids(open_parts(tmp_path, "chat", seed=4)) != first
    assert ids(open_parts(tmp_path, "chat", seed=3)) == first
    monkeypatch.setattr(data, "INDEX_FORMAT", 10**6)
    assert ids(open_parts(tmp_path, "chat", seed=3)) == first
    assert len(readings) == 4
    assert len(index_files(tmp_path)) == 1


def test_each_kind_and_choice_of_files_has_its_own_index(tmp_path, indexed, readings):
    records = [conversation(TAGGED, GPT, image="a.png")] * 3
    paths = [write_records(tmp_path / f"{name}.jsonl", records) for name in "ab"]
    for _ in range(2):
        assert len(open_source("chat", paths)) == 6
        assert len(open_source("chat", paths[:1])) == 3
        assert len(open_source("chat_captions", paths[:1])) == 3
    assert len(readings) == len(index_files(tmp_path)) == 3


def damage(path, how, others):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-70])
    elif how == "flipped":
        middle = len(content) - 100
        changed = content[middle] ^ 1
        path.write_bytes(content[:middle] + bytes([changed]) + content[middle + 1 :])
    elif how == "zeros":
        path.write_bytes(bytes(len(content)))
    elif how == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif how == "foreign":
        path.write_bytes(others.read_bytes())
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["truncated", "flipped", "zeros", "pickle", "foreign", "empty"])
def test_a_damaged_or_foreign_index_is_built_anew(how, manifest, tmp_path, indexed, readings):
    (tmp_path / "other").mkdir()
    open_captions(write_records(tmp_path / "other/x.jsonl", [RECORD] * 24))
    (other_name,) = index_files(tmp_path / "other")
    expected = all_of(open_captions(manifest))
    (name,) = index_files(tmp_path)
    content = (tmp_path / name).read_bytes()
    damage(tmp_path / name, how, tmp_path / "other" / other_name)
    assert all_of(open_captions(manifest)) == expected
    assert (tmp_path / name).read_bytes() == content
    assert len(readings) == 3
    open_captions(manifest)
    assert len(readings) == 3


def test_an_index_moves_with_its_data(tmp_path, indexed, readings):
    (tmp_path / "old").mkdir()
    path = write_records(tmp_path / "old/x.jsonl", [RECORD] * 4)
    open_captions(path)
    (tmp_path / "old").rename(tmp_path / "new")
    source = open_captions(tmp_path / "new/x.jsonl")
    assert len(readings) == 1
    assert source.name(2) == f"{tmp_path}/new/x.jsonl, line 3"


def full_disk(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", ["folder", "disk"])
def test_where_nothing_can_be_written_the_data_are_kept_in_memory(
    place, manifest, indexed, readings, monkeypatch, caplog
):
    if place == "folder":
        monkeypatch.setattr(data, "why_no_folder", lambda _: "no file can be made there")
    else:
        monkeypatch.setattr(data, "write_index", full_disk)
    for _ in range(2):
        caplog.clear()
        source = open_captions(manifest)
        assert len(source) == 48
        (message,) = caplog.messages
        assert "index is not written (" in message
        assert "keeps it in memory" in message
    assert len(readings) == 2
    assert index_files(manifest.parent) == []


def test_data_that_change_while_they_are_read_get_no_index(manifest, indexed, monkeypatch, caplog):
    scan = data.Source.scan

    def disturbed(source, part):
        os.utime(manifest, (9, 9))
        return scan(source, part)

    monkeypatch.setattr(data.Source, "scan", disturbed)
    assert len(open_captions(manifest)) == 48
    assert "not written (the data changed while they were read)" in caplog.text
    assert index_files(manifest.parent) == []


def test_an_archive_has_its_index_beside_it(tmp_path, indexed, readings):
    write_records(tmp_path / "m.jsonl", [RECORD] * 3)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "m.jsonl", "m.jsonl")
    for _ in range(2):
        part = data.Manifest(f"{tmp_path}/a.tar::m.jsonl", folder=tmp_path)
        assert len(data.Source("captions", [part])) == 3
    assert len(readings) == 1
    (name,) = index_files(tmp_path)
    assert name.startswith("a.tar.captions-")


def open_in_a_process(rank, folder):
    """Open the manifest, and leave its digest and the number of readings in a file."""
    entries = []
    read = data.Source.read

    def slow_read(source, *args, **kwargs):
        entries.append(rank)
        # the others come in the meantime
        while len(list(folder.glob("at *"))) < 3:
            time.sleep(0.01)
        time.sleep(0.3)
        read(source, *args, **kwargs)

    data.Source.read = slow_read
    data.INDEX_FROM = 0
    (folder / f"at {rank}").touch()
    source = open_captions(folder / "coco_train.jsonl")
    (folder / f"{source.digest} {len(entries)} {rank}").touch()


def test_of_processes_that_open_it_at_once_one_reads_it(manifest):
    run_in_forks(open_in_a_process, manifest.parent, processes=3)
    digest = open_captions(manifest).digest
    counts = [path.name.split()[1] for path in manifest.parent.glob(f"{digest} *")]
    assert sorted(counts) == ["0", "0", "1"]
    (name,) = index_files(manifest.parent)
    assert name.endswith(".index")


def test_what_a_killed_builder_left_is_removed(manifest, indexed):
    open_captions(manifest)
    (name,) = index_files(manifest.parent)
    (manifest.parent / name).unlink()
    for left in (f"{name}.tmp123", f"{name}.lock"):
        (manifest.parent / left).touch()
    open_captions(manifest)
    assert index_files(manifest.parent) == [name]


@pytest.mark.parametrize("count", [5_000, 20_000])
def test_the_memory_of_a_process_does_not_grow_with_the_data(count, tmp_path, indexed):
    path = write_records(tmp_path / "x.jsonl", [{"image": "a", "captions": ["b", "c"]}] * count)
    open_captions(path)
    tracemalloc.start()
    source = open_captions(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (source.num_images, len(source)) == (count, 2 * count)
    assert kept < 2**17
    assert peak < 2 * data.PIECE + 2**20
    # three numbers of eight bytes a record, one of four bytes a row
    (name,) = index_files(tmp_path)
    size = (tmp_path / name).stat().st_size
    assert 0 <= size - 24 * count - 4 * 2 * count < 2000


def test_the_arrays_of_an_index_are_pages_of_the_file(manifest, indexed):
    open_captions(manifest)
    source = open_captions(manifest)
    (part,) = source.parts
    for values in (source.image_of, source.lengths, part.places, part.starts, part.ends):
        assert not values.flags.owndata
        assert not values.flags.writeable


def test_the_cost_of_opening_is_measured(tmp_path, capfd):
    open_manifests.main(["--records", "30", "--folder", str(tmp_path)])
    rows = [line.split() for line in capfd.readouterr().out.splitlines()]
    digests = {row[-1] for row in rows if row[0] == "captions"}
    assert len(digests) == 1
    assert [row[-7] for row in rows if row[0] in ("captions", "chat")] == ["60"] * 3 + ["30"] * 3
    assert not list(tmp_path.iterdir())


def test_who_builds_an_index_shows_its_progress_whatever_its_rank(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert data.progress("x", 3, "B").disable
    assert not data.progress("x", 3, "B", is_shown=True).disable
