"""data.py: parsers, sources, mixtures, datasets, masking, and the order of training rows."""

import json
import logging
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import ANSWERS, GOLDEN, LOV, QUESTIONS, picture, png, write_arrow, write_records
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
        "chat": {"conversations": [{"from": "human", "value": "x"}]},
        "chat_captions": {"conversations": [{"from": "human", "value": "x"}]},
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


BROKEN = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('"x"', "not a JSON object"),
    (b"\xff\xfe", "not JSON"),
    ("{}", "an image expected"),
    ('{"image": "a.png"}', "'captions' must be"),
    ('{"image": "a.png", "captions": []}', "'captions' must be a non-empty list"),
    ('{"image": 3, "captions": ["x"]}', "an image expected"),
    ('{"image": "a.png", "captions": ["good", "  "]}', "'caption' must be a non-empty str"),
    ('{"image": "a.png", "captions": [["x"]]}', "'caption' must be"),
]


@pytest.mark.parametrize("line, message", BROKEN)
def test_broken_lines_are_named(line, message, tmp_path):
    good = b'\n{"image": "a.png", "captions": ["fine"]}\n'
    broken = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "x_train.jsonl").write_bytes(good + broken + good)
    with pytest.raises(BadSample, match=f"x_train.jsonl, line 3: .*{message}"):
        open_captions(tmp_path / "x_train.jsonl")


TURN = {"from": "human", "value": "x"}
WRONG_FIELDS = [
    ("questions", {"image": "a.png", "questions": [{"id": 1}]}, "'question' must be"),
    ("questions", {"image": "a.png"}, "'questions' must be"),
    ("questions", {"image": "a.png", "questions": ["x"]}, "'question' must be"),
    (
        "questions",
        {"image": "a.png", "questions": [{"question": "x", "answers": ["y"]}]},
        "'answers' must be",
    ),
    (
        "questions",
        {"image": "a.png", "questions": [{"question": "x", "answers": {"y": "1"}}]},
        "'answers' must be .* the score '1'",
    ),
    ("statements", {"images": ["a.png"], "sentence": "x", "label": True}, "two images expected"),
    ("statements", {"images": ["a", "b"], "sentence": "x", "label": "yes"}, "'label' must be"),
    ("statements", {"images": ["a", "b"], "label": True}, "'sentence' must be"),
    ("hypotheses", {"image": "a", "hypothesis": "x", "label": "-"}, "'label' must be one of"),
    ("hypotheses", {"image": "a", "label": "neutral"}, "'hypothesis'"),
    ("chat", {"image": "a", "conversations": []}, "'conversations' must be"),
    ("chat", {"conversations": [{"from": "human"}]}, "every turn needs"),
    ("chat", {"conversations": ["x"]}, "every turn needs"),
    ("chat", {"video": "a.mp4", "conversations": [TURN]}, "videos are not read"),
    ("chat", {"image": [3], "conversations": [TURN]}, "'image' must be a path"),
    (
        "chat",
        {"image": "a", "conversations": [{"from": "human", "value": "<image> <image>"}]},
        "1 images but 2",
    ),
]


@pytest.mark.parametrize("kind, record, message", WRONG_FIELDS)
def test_wrong_fields_are_named(kind, record, message, tmp_path):
    path = write_records(tmp_path / "x.jsonl", [record])
    with pytest.raises(BadSample, match=f"x.jsonl, line 1: .*{message}"):
        open_source(kind, [path])
    if kind == "chat":
        with pytest.raises(BadSample, match=f"x.jsonl, line 1: .*{message}"):
            open_chat(path)


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
    with pytest.raises(BadSample, match="b.arrow, row 0: 'caption' must be"):
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
    ],
)
def test_arrow_rows_that_do_not_fit_are_named(kind, columns, message, tmp_path):
    write_arrow(tmp_path / "x.arrow", columns)
    with pytest.raises(BadSample, match=f"x.arrow, row 0: .*{message}"):
        open_source(kind, [tmp_path / "x.arrow"])


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
    with pytest.raises(ValueError, match=r"lacks the columns \['caption'\] of captions"):
        open_captions(tmp_path / "a.arrow")
    write_arrow(tmp_path / "b.arrow", {"image": [png()], "caption": ["x"]})
    message = "b.arrow: the column 'caption' of captions is string; it must be list of text"
    with pytest.raises(ValueError, match=message):
        open_captions(tmp_path / "b.arrow")
    write_arrow(tmp_path / "c.arrow", {"image": ["path.png"], "caption": [["x"]]})
    with pytest.raises(ValueError, match="the column 'image' .* is string; it must be bytes"):
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
            "mix.yaml, entry 1: sampling_strategy is 3",
        ),
        ("datasets: 3", "mix.yaml has no list `datasets`, found 3"),
        ("", "mix.yaml has no list `datasets`, found None"),
        ("datasets: [", "mix.yaml is not YAML: .*line 1"),
        ("a: b: c", "mix.yaml is not YAML"),
    ],
)
def test_wrong_mixtures_name_file_and_entry(text, message, chats):
    (chats / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_chat(chats / "mix.yaml")


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
    message = "chat.jsonl, line 1: 1 images, but 0 <image> in the turns"
    with pytest.raises(BadSample, match=message):
        chat_dataset(path, chat_tokenizer)[0]
    with pytest.raises(BadSample, match="chat.jsonl, line 2: style plain needs"):
        chat_dataset(path, chat_tokenizer, plain=2)[1]
    skipping = chat_dataset(path, chat_tokenizer, on_bad_sample="skip")
    assert skipping[0]["images"] == []  # the next row


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
