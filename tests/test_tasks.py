"""tasks.py: files of a set, the vocabulary of answers, and guesses that need no picture."""

import numpy as np
import pytest
from helpers import ANSWERS, QUESTIONS, picture, png, write_arrow, write_records

import data
import tasks
from files import BadSample
from images import image_transform
from scenes import demo_tokenizer
from tasks import open_sets


@pytest.fixture
def folder(tmp_path):
    """coco_train.jsonl: four pictures with two captions each."""
    records = []
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        captions = [f"first of {i}", f"second of {i}"]
        records.append({"image": f"{i}.png", "captions": captions, "image_id": i})
    write_records(tmp_path / "coco_train.jsonl", records)
    return tmp_path


# ---------------------------------------------------------------- files of a set
def test_sets_and_splits_come_one_after_the_other(folder):
    source = open_sets("captions", folder, ("coco",), "train")
    expected = [f"{word} of {i}" for i in range(4) for word in ("first", "second")]
    assert [row["text"] for row in source.texts()] == expected
    assert (len(source), source.num_images) == (8, 4)
    for name in ("coco_val", "other_train"):
        (folder / f"{name}.jsonl").write_text((folder / "coco_train.jsonl").read_text())
    twice = open_sets("captions", folder, ("coco",), "train+val")
    assert len(twice) == 16
    assert twice[8]["image_index"] == 4
    assert twice[8]["text"] == "first of 0"
    both = open_sets("captions", folder, ("coco", "other"), "train")
    assert both.texts() == twice.texts()


@pytest.mark.parametrize(
    "names, split, message",
    [
        (("coco", "coco"), "train", "the set 'coco' is named twice"),
        (("coco",), "train+train", "the split 'train' is named twice"),
        (("",), "train", "the name of a set is empty"),
        (("coco", " "), "train", "the name of a set is empty, in 'coco, '"),
        (("coco",), "", "the name of a split is empty"),
        (("coco",), "train++val", "the name of a split is empty, in 'train,,val'"),
        (("unknown",), "train", "no unknown_train.jsonl.*; its manifests: coco_train.jsonl"),
        ((), "train", "is a folder, of which no sets were named"),
    ],
)
def test_names_of_sets_and_splits_are_checked(names, split, message, folder):
    with pytest.raises(ValueError, match=message):
        open_sets("captions", folder, names, split)


def test_one_file_may_stand_for_a_folder(folder):
    source = open_sets("captions", folder / "coco_train.jsonl", (), "val")
    assert source.texts() == open_sets("captions", folder, ("coco",), "train").texts()


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="nothing.jsonl: there is no such folder or file"):
        open_sets("captions", tmp_path / "nothing.jsonl", (), "train")
    missing = "no flickr30k_train.jsonl, .* f30k_.*_train.arrow, f30k_.*_val.arrow"
    with pytest.raises(ValueError, match=missing):
        open_sets("captions", tmp_path, ("flickr30k",), "train")
    (tmp_path / "empty_val.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows in .*empty_val.jsonl"):
        open_sets("captions", tmp_path, ("empty",), "val")


def test_missing_shards_are_all_named(tmp_path):
    write_arrow(tmp_path / "sbu_0.arrow", {"image": [png()], "caption": [["x"]]})
    missing = ", ".join(f"sbu_{i}.arrow" for i in range(1, 9))
    with pytest.raises(ValueError, match=missing):
        open_sets("captions", tmp_path, ("sbu",), "train")


@pytest.mark.parametrize("text", ["string", "large_string"])
@pytest.mark.parametrize(
    "name, shards, extra",
    [
        ("coco", ("coco_caption_karpathy_train", "coco_caption_karpathy_restval"), {}),
        ("vg", ("vg",), {"width": [[1, 2]] * 3, "x": [[0, 0]] * 3}),
    ],
)
def test_arrow_shards_of_captions_are_found_and_read(text, name, shards, extra, tmp_path):
    pa = pytest.importorskip("pyarrow")
    text_type = {"string": pa.string(), "large_string": pa.large_string()}[text]
    captions = [["one", "two", "one"], ["three"], ["four", "five"]]
    for shard in shards:
        columns = {
            "image": [png(i) for i in range(3)],
            "caption": pa.array(captions, pa.list_(text_type)),
            "image_id": pa.array(["a", "b", "c"], text_type),
            **extra,
        }
        write_arrow(tmp_path / f"{shard}.arrow", columns)
    source = open_sets("captions", tmp_path, (name,), "train")
    texts = [row["text"] for row in source.texts()]
    assert texts == ["one", "two", "three", "four", "five"] * len(shards)
    row = source[2 + 5 * (len(shards) - 1)]
    assert row["text"] == "three"
    assert row["image_id"] == "b"
    assert np.array_equal(row["images"][0], picture(1))
    broken = {"image": [b"no"], "caption": pa.array([["x", " "]], pa.list_(text_type))}
    write_arrow(tmp_path / f"{shards[-1]}.arrow", broken)
    data.arrow_table.cache_clear()
    with pytest.raises(BadSample, match=f"{shards[-1]}.arrow, row 0: 'caption' is ' '; it must"):
        open_sets("captions", tmp_path, (name,), "train")


# ---------------------------------------------------------------- answers


def test_fixed_arrow_files_come_first(tmp_path):
    write_arrow(tmp_path / "vqav2_train_fix.arrow", {**QUESTIONS, **ANSWERS})
    other_ids = {**QUESTIONS, **ANSWERS, "question_id": [[0, 0], [0]]}
    write_arrow(tmp_path / "vqav2_train.arrow", other_ids)
    source = open_sets("questions", tmp_path, ("vqav2",), "train")
    assert [row["question_id"] for row in source.texts()] == [11, 12, 13]


def test_the_vocabulary_is_a_file_or_rebuilt_from_the_arrow_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    write_arrow(tmp_path / "vqav2_train_fix.arrow", {**QUESTIONS, **ANSWERS})
    nulls = pa.array([[], []], pa.list_(pa.null()))
    write_arrow(tmp_path / "vqav2_test.arrow", {**QUESTIONS, **dict.fromkeys(ANSWERS, nulls)})
    assert tasks.load_answers(tmp_path) == ["yes", "no", "net"]
    (tmp_path / "answers.json").write_text('["a", "b"]')
    assert tasks.load_answers(tmp_path) == ["a", "b"]
    with pytest.raises(ValueError, match="no VQA vocabulary"):
        tasks.load_answers(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "answers.json is empty"),
        ("{}", "answers.json must hold a list"),
        ("[", "answers.json is not JSON"),
        ('["a", 5]', "answers.json, entry 1 is 5; it must be a text"),
        ('["a", null]', "entry 1 is None"),
        ('[["a"]]', r"entry 0 is \['a'\]"),
        ('["a", "b", "a"]', "entry 2: the answer 'a' is there twice"),
    ],
)
def test_a_vocabulary_is_a_list_of_different_texts(content, message, tmp_path):
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        tasks.load_answers(tmp_path)


def test_the_answer_a_is_normalised_to_nothing(tmp_path):
    (tmp_path / "answers.json").write_text('["yes", ""]')
    assert tasks.load_answers(tmp_path) == ["yes", ""]


@pytest.mark.parametrize(
    "labels, message",
    [
        ([[[2, 0], [1]], [[-1]]], "row 1: 'answer_labels' of 'yes' is -1, but 0 in .*row 0"),
        ([[[2, 0], [7]], [[0]]], "no VQA vocabulary"),
        ([[[2], [1]], [[0]]], "row 0: the columns answers, answer_labels must be equally long"),
        ([[[2, 0]], [[0]]], "row 0: the columns answers, answer_labels must be equally long"),
        ([[[2.5, 0.0], [1.0]], [[0.0]]], "row 0: 'answer_labels' is 2.5; it must be a whole"),
        ([[2, 0], [0]], "'answer_labels' is .*; it must be list of list of number"),
        (None, "lacks the columns answer_labels"),
    ],
)
def test_wrong_labels_of_answers_are_named(labels, message, tmp_path):
    columns = {**QUESTIONS, **ANSWERS, "answer_labels": labels}
    if labels is None:
        del columns["answer_labels"]
    write_arrow(tmp_path / "vqav2_train.arrow", columns)
    with pytest.raises(ValueError, match=message):
        tasks.load_answers(tmp_path)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([[[0, 2], [1]], [[2]]], "'answer_labels' 0 is 'net', but 'yes' in .*"),
        ([[[2, 3], [1]], [[3]]], "'answer_labels' of 'yes' is 3, but 0 in .*"),
    ],
)
def test_files_that_number_the_answers_otherwise_are_named(labels, message, tmp_path):
    write_arrow(tmp_path / "vqav2_train.arrow", {**QUESTIONS, **ANSWERS})
    write_arrow(tmp_path / "vqav2_val.arrow", {**QUESTIONS, **ANSWERS, "answer_labels": labels})
    words = f"vqav2_val.arrow, row 0: {message}vqav2_train.arrow, row 0; all vqav2_"
    with pytest.raises(ValueError, match=words):
        tasks.load_answers(tmp_path)


def test_one_row_that_numbers_its_answers_twice_is_named(tmp_path):
    labels = [[[2, 1], [1]], [[0]]]
    write_arrow(tmp_path / "vqav2_train.arrow", {**QUESTIONS, **ANSWERS, "answer_labels": labels})
    with pytest.raises(ValueError, match="row 0: 'answer_labels' 1 is 'no', but 'yes' in"):
        tasks.load_answers(tmp_path)


# ---------------------------------------------------------------- guesses
def questions_of(folder, name, pairs):
    """A source with one question for each (text, answer)."""
    records = []
    for i, (text, answer) in enumerate(pairs):
        question = {"id": i, "question": text, "answers": {answer: 1.0}}
        records.append({"image": "a.png", "questions": [question]})
    return data.open_source("questions", [write_records(folder / name, records)])


def test_guesses_from_the_text_alone_in_closed_form(tmp_path):
    training = questions_of(tmp_path, "a.jsonl", [("a", "0"), ("a", "0"), ("b", "2"), ("a", "1")])
    heldout = questions_of(tmp_path, "b.jsonl", [("a", "0"), ("b", "2"), ("b", "0"), ("c", "1")])
    # the commonest answer is 0; of "a" it is 0, of "b" 2, and "c" is not known
    assert tasks.text_only_guess(training, heldout) == {"majority": 0.5, "text_only": 0.5}


def test_there_is_no_guess_without_answers(tmp_path):
    record = {"image": "a.png", "questions": [{"id": 1, "question": "x", "answers": {}}]}
    source = data.open_source("questions", [write_records(tmp_path / "a.jsonl", [record])])
    assert tasks.text_only_guess(source, source) == {"majority": 0.0, "text_only": 0.0}


def test_chance_of_retrieval(folder):
    source = open_sets("captions", folder, ("coco",), "train")
    chance = tasks.baselines(source, source)["chance"]
    assert chance == {
        "ir_r1": 0.25,
        "ir_r5": 1.0,
        "ir_r10": 1.0,
        "tr_r1": 0.25,
        "tr_r5": 1.0,
        "tr_r10": 1.0,
    }


@pytest.mark.parametrize("name", [name for name, task in tasks.TASKS.items() if task.recipe])
def test_every_task_runs_on_the_built_in_scenes(name):
    dataset = tasks.open_split(
        name, "any", "", True, demo_tokenizer(), image_transform("clip", 32, False), 20, 32
    )
    assert dataset.source.kind == tasks.TASKS[name].kind
    assert dataset.source.num_images == 512
    assert dataset[0]["input_ids"].shape == (20,)
