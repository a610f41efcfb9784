"""prepare.py: manifests from tiny raw trees in the published layouts, and weights without executing their files."""
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from safetensors.torch import load_file, save_file
from test_model import golden, golden_config, golden_state, present
from torch import nn

import prepare
import weights
from images import load_image
from metrics import answer_score, normalize_answer
from model import ManagerTower, ManagerTowerConfig
from prepare import main
from tokenizer import train_tokenizer
from weights import infer_config, load_model, load_unimodal, to_official

MT = GOLDEN / "manager_tower"


def rows_of(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list) and path.suffix != ".json" or path.parent.name == "data":
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def touch(root, *images):
    for image in images:
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        (root / image).write_bytes(b"not opened")


def run(name, root, out):
    """Run the command twice; returns {file: content}, which must be the same bytes both times."""
    main([name, "--root", str(root), "--out", str(out)])
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    main([name, "--root", str(root), "--out", str(out)])
    assert first == {p.name: p.read_bytes() for p in out.iterdir()}
    return first


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert isinstance(stop.value.code, str), "an error is a sentence and exit code 1"
    return stop.value.code


# ---------------------------------------------------------------------------------------------------------------------
# VQA's rules


@pytest.mark.parametrize(("text", "expected"), [
    ("Yes.", "yes"), ("3.", "3"), ("1.5", "1.5"), ("u.s.a", "usa"), ("none", "0"), ("Ten", "10"), ("dont", "don't"),
    ("The two-story house", "2 story house"), ("a cat, and the dog", "cat and dog"), ("1,000", "1000"),
    ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("yall'll", "y'all'll"), ("somebody'd", "somebodyd"),
    ("black/white", "black white"), ("black / white", "black white"), ("what?", "what"),
    ("." * 40 + "x", "." * 8 + "x"), ("", ""), ("An", "")])
def test_the_answer_normaliser_on_hand_made_cases(text, expected):
    assert normalize_answer(text) == expected


def test_answer_score_is_the_mean_over_left_out_annotators():
    for count in range(11):
        given = [1] * count + [0] * (10 - count)
        leave_one_out = [min(sum(others) / 3, 1) for others in combinations(given, 9)]
        assert answer_score(count) == pytest.approx(sum(leave_one_out) / 10)


def vqa_tree(root):
    """The published layout, with 12 training and 8 validation questions; 'yes' 10 times, 'red' 9 times, 'blue' once."""
    site = {"license": {}, "info": {}}
    first = ["red", "Yes"] + ["yes."] * 9
    answers = {"train2014": [*first, "red"], "val2014": ["red"] * 7 + ["blue"]}
    given = {"red": ["red"] * 2 + ["Red."] + ["yes"] * 7, "blue": ["blue"] * 10}
    for split, majority in answers.items():
        ids = [int(split == "val2014") * 1000 + i for i in range(len(majority))]
        put(root / f"v2_OpenEnded_mscoco_{split}_questions.json", {**site, "questions": [
            {"image_id": 9 + i % 3, "question_id": i, "question": f"What is {i}?"} for i in ids]})
        put(root / f"v2_mscoco_{split}_annotations.json", {**site, "annotations": [
            {"question_id": i, "image_id": 9 + i % 3, "multiple_choice_answer": answer, "question_type": "what is",
             "answer_type": "other", "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k}
                                                 for k, a in enumerate(given.get(answer, ["yes"] * 10))]}
            for i, answer in zip(reversed(ids), reversed(majority))][::-1]})
        touch(root, *(f"{split}/COCO_{split}_{i:012d}.jpg" for i in (9, 10, 11)))
    for split in ("test2015", "test-dev2015"):
        put(root / f"v2_OpenEnded_mscoco_{split}_questions.json", {**site, "questions": [
            {"image_id": 1, "question_id": 10, "question": "Why?"}]})
    touch(root, "test2015/COCO_test2015_000000000001.jpg")


def test_vqav2_vocabulary_scores_and_splits(tmp_path, capsys):
    root, out = tmp_path / "raw", tmp_path / "out"
    vqa_tree(root / "vqav2")
    (root / "vqav2" / "val2014" / "COCO_val2014_000000000010.jpg").unlink()
    files = run("vqav2", root, out)
    assert set(files) == {"answers.json", *(f"vqav2_{s}.jsonl"
                                            for s in ("train", "val", "trainable_val", "rest_val", "test", "test-dev"))}
    assert json.loads(files["answers.json"]) == ["red", "yes"]
    train = rows_of(out / "vqav2_train.jsonl")
    assert [row["image_id"] for row in train] == [9, 10, 11] and (out / train[0]["image"]).is_file()
    question = train[0]["questions"][0]
    assert question == {"id": 0, "question": "What is 0?", "answers": {"red": 0.9, "yes": 1.0},
                        "question_type": "what is",
                        "answer_type": "other"}
    val = rows_of(out / "vqav2_val.jsonl")
    assert {row["image_id"] for row in val} == {9, 11}, "image 10 is missing"
    assert 1007 not in {q["id"] for row in val for q in row["questions"]}, "its only answer is not in the vocabulary"
    assert rows_of(out / "vqav2_trainable_val.jsonl") + rows_of(out / "vqav2_rest_val.jsonl") == val
    assert rows_of(out / "vqav2_test.jsonl") == [{"image": os.path.relpath(
        root / "vqav2/test2015/COCO_test2015_000000000001.jpg", out), "image_id": 1,
        "questions": [{"id": 10, "question": "Why?"}]}]
    said = capsys.readouterr().out
    for part in ("435,174", "210,207", "2 answers (published: 3,129)", "1 questions of val2014", "1 missing images: ",
                 "val2014/COCO_val2014_000000000010.jpg"):
        assert part in said


def test_vqav2_errors(tmp_path, capsys):
    vqa_tree(tmp_path)
    out = tmp_path / "out"
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    content = json.loads(annotations.read_text())
    for broken, word in (({**content, "annotations": content["annotations"][:1]},
                          "question 1001 is not in the annotations"),
                         ({"annotations": [{"question_id": 1}]}, "entry 0 has no field 'multiple_choice_answer'"),
                         ({"other": 1}, "expected a list of entries"), ("{", "is not JSON")):
        put(annotations, broken)
        assert word in refused(capsys, "vqav2", "--root", tmp_path, "--out", out)
    annotations.unlink()
    (tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    message = refused(capsys, "vqav2", "--root", tmp_path, "--out", out)
    assert "v2_mscoco_val2014" in message and "mscoco_test2015" in message and "https://visualqa.org" in message
    assert "mscoco_train2014" not in message, "what is there is not listed"
    assert "no such folder" in refused(capsys, "vqav2", "--root", tmp_path / "none", "--out", out)


def test_vgqa_keeps_coco_test_images_out_of_training(tmp_path, capsys):
    root, out = tmp_path / "raw", tmp_path / "out"
    put(root / "image_data.json", [{"image_id": i, "coco_id": coco, "url": ""} for i, coco in
                                   ((1, 391895), (2, 522418), (3, 184613), *((i, None) for i in range(4, 60)))])
    qas = [("What color?", "Red."), ("What color?", "red"), ("How many?", "two"), ("Who?", "nobody knows"),
           ("Which?", "red"),
           ("Which?", "2")]
    put(root / "question_answers.json", [
        {"id": i, "qas": [{"qa_id": 100 * i + k, "image_id": i, "question": q, "answer": a} for k,
                          (q, a) in enumerate(qas)]}
        for i in range(1, 60)])
    put(root / "coco_splits" / "karpathy_val_images.txt", "val2014/COCO_val2014_000000522418.jpg 522418\n")
    put(root / "coco_splits" / "karpathy_test_images.txt", "COCO_val2014_000000184613.jpg\n")
    touch(root, *(f"VG_100K/{i}.jpg" for i in range(1, 30)), *(f"VG_100K_2/{i}.jpg" for i in range(30, 60)))
    assert "answers.json" in refused(capsys, "vgqa", "--root", root, "--out", out)
    put(out / "answers.json", ["red", "2"])
    run("vgqa", root, out)
    coco_train, coco_val = rows_of(out / "vgqa_coco_train.jsonl"), rows_of(out / "vgqa_coco_val.jsonl")
    assert [r["image_id"] for r in coco_train] == [1] and [r["image_id"] for r in coco_val] == [2, 3]
    assert coco_train[0]["questions"] == [{"id": 100, "question": "What color?", "answers": {"red": 1.0}},
                                          {"id": 102, "question": "How many?", "answers": {"2": 1.0}}]
    train, val = rows_of(out / "vgqa_train.jsonl"), rows_of(out / "vgqa_val.jsonl")
    assert {2, 3} <= {r["image_id"] for r in val} and len(train) + len(val) == 59 and 1 <= len(val) - 2 <= 15
    assert "59 questions with several answers" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# The other datasets


@pytest.mark.parametrize("place", [".", "nlvr2"])
def test_nlvr2(tmp_path, capsys, place):
    root, out = tmp_path / "raw", tmp_path / "out"
    names = {"train": "train-10-0", "dev": "dev-7-1", "test1": "test1-3-2"}
    for split, name in names.items():
        entry = {"sentence": "Two dogs.", "identifier": f"{name}-1", "label": "True",
                 **({"directory": 4} if split == "train" else {})}
        put(root / place / "data" / f"{split}.json", [entry, {**entry, "identifier": f"{name}-0", "label": "False"}])
        folder = f"images/{split}/4" if split == "train" else f"images/{split}"
        touch(root / place, *(f"{folder}/{name}-img{k}.png" for k in (0, 1)))
    run("nlvr2", root, out)
    train = rows_of(out / "nlvr2_train.jsonl")
    assert [(r["label"], r["id"], r["sentence"]) for r in train] == [(True, "train-10-0-1", "Two dogs."),
                                                                     (False, "train-10-0-0", "Two dogs.")]
    assert [Path(i).name for i in train[0]["images"]] == ["train-10-0-img0.png", "train-10-0-img1.png"]
    assert len(rows_of(out / "nlvr2_dev.jsonl")) == len(rows_of(out / "nlvr2_test1.jsonl")) == 2
    assert "86,373" in capsys.readouterr().out
    put(root / place / "data" / "dev.json", [{**entry, "label": "maybe"}])
    assert "label 'maybe' of test1-3-2-1" in refused(capsys, "nlvr2", "--root", root, "--out", out)
    (root / place / "data" / "dev.json").write_text(json.dumps(entry) + "\n{\n")
    assert "dev.json, line 2 is not JSON" in refused(capsys, "nlvr2", "--root", root, "--out", out)


def test_snli_ve(tmp_path, capsys):
    entry = {"Flickr30K_ID": "4705552913", "sentence1": "A premise", "sentence2": "Women.", "gold_label": "neutral"}
    for split in ("train", "dev", "test"):
        put(tmp_path / f"snli_ve_{split}.jsonl", [entry, {**entry, "gold_label": "-"}, {**entry, "Flickr30K_ID": "1"}])
    touch(tmp_path, "flickr30k-images/4705552913.jpg")
    out = tmp_path / "out"
    run("snli_ve", tmp_path, out)
    assert rows_of(out / "snli_ve_dev.jsonl") == [{"image": "../flickr30k-images/4705552913.jpg",
                                                   "image_id": "4705552913",
                                                  "hypothesis": "Women.", "label": "neutral"}]
    said = capsys.readouterr().out
    for part in ("1 rows of test with label '-'", "1 missing images: flickr30k-images/1.jpg", "529,527"):
        assert part in said


def test_coco_and_flickr30k_follow_karpathys_splits(tmp_path, capsys):
    root, out = tmp_path / "raw", tmp_path / "out"
    names = {"train": "COCO_train2014_000000000001.jpg", "restval": "COCO_val2014_000000000002.jpg",
             "val": "COCO_val2014_000000000003.jpg", "test": "COCO_val2014_000000000004.jpg"}
    sentences = [{"raw": t} for t in ("A  dog.", "A dog.", " ", "A cat.\n")]
    put(root / "karpathy" / "dataset_coco.json", {"images": [
        {"filename": name, "filepath": "x", "split": split, "sentences": sentences, "cocoid": 7} for split,
        name in names.items()]})
    put(root / "karpathy" / "dataset_flickr30k.json", {"images": [
        {"filename": f"{i}.jpg", "split": split, "sentences": sentences[:2]} for i,
        split in enumerate(("train", "val", "test"))]})
    touch(root, *(f"{name.split('_')[1]}/{name}" for name in names.values()),
          *(f"flickr30k-images/{i}.jpg" for i in range(3)))
    run("coco", root, out)
    train = rows_of(out / "coco_train.jsonl")
    assert [r["image_id"] for r in train] == [1, 2] and train[0]["captions"] == ["A dog.", "A cat."]
    assert train[0]["image"] == "../raw/train2014/COCO_train2014_000000000001.jpg"
    assert [[r["image_id"] for r in rows_of(out / f"coco_{s}.jsonl")] for s in ("val", "test")] == [[3], [4]]
    run("flickr30k", root, out)
    assert [[r["image_id"] for r in rows_of(out / f"flickr30k_{s}.jsonl")]
            for s in ("train", "val", "test")] == [["0", "1"], ["1"], ["2"]]
    assert "113,287" in capsys.readouterr().out
    put(root / "karpathy" / "dataset_coco.json", {"images": [{"filename": "x.jpg", "split": "train"}]})
    assert "entry 0 has no field 'sentences'" in refused(capsys, "coco", "--root", root, "--out", out)


def test_vg_sbu_and_cc3m(tmp_path, capsys):
    root, out = tmp_path / "raw", tmp_path / "out"
    regions = [{"image_id": 5, "phrase": p, "x": 0, "y": 0, "width": 1, "height": 1}
               for p in ("a tree", "a sky", "a tree")]
    put(root / "annotations" / "region_descriptions.json", [{"id": 5, "regions": regions}, {"id": 6, "regions": []}])
    touch(root, "images/VG_100K_2/5.jpg", "SBU/a.jpg", "train/1.jpg", "train/2", "val/0.jpg")
    run("vg", root, out)
    assert rows_of(out / "vg_train.jsonl") == [{"image": "../raw/images/VG_100K_2/5.jpg",
                                                "captions": ["a tree", "a sky"], "image_id": 5}]
    put(root / "sbu-captions-all.json", {"captions": ["one", "two"],
                                         "image_urls": ["http://x.com/1/a.jpg", "http://x.com/b.jpg"]})
    run("sbu", root, out)
    assert rows_of(out / "sbu_train.jsonl") == [{"image": "../raw/SBU/a.jpg", "captions": ["one"], "image_id": "a.jpg"}]
    put(root / "utils" / "Train_GCC-training.tsv", "zero\thttp://0\none\u2028more\thttp://1\ntwo\thttp://2\n")
    put(root / "utils" / "Validation_GCC-1.1.0-Validation.tsv", "null\thttp://0\n")
    run("cc3m", root, out)
    assert [(r["captions"], r["image_id"]) for r in rows_of(out / "cc3m_train.jsonl")] == [(["one more"], "1"),
                                                                                           (["two"], "2")]
    assert "1 missing images: train/0.jpg" in capsys.readouterr().out
    put(root / "utils" / "Validation_GCC-1.1.0-Validation.tsv", "no tab\n")
    assert "line 1: expected a caption, a tab" in refused(capsys, "cc3m", "--root", root, "--out", out)
    put(root / "sbu-captions-all.json", {"captions": ["one"], "image_urls": []})
    assert "1 captions, but 0 image_urls" in refused(capsys, "sbu", "--root", root, "--out", out)
    touch(tmp_path / "empty", "x")
    put(tmp_path / "empty" / "region_descriptions.json", [{"id": 5, "regions": regions}])
    assert "no image of vg" in refused(capsys, "vg", "--root", tmp_path / "empty", "--out", out)


def svg(title, description="", keywords=(), body=""):
    items = "".join(f"<rdf:li>{k}</rdf:li>" for k in keywords)
    return ("<svg><metadata><cc:Work><dc:creator><cc:Agent><dc:title>Somebody</dc:title></cc:Agent></dc:creator>"
            f"<dc:title>{title}</dc:title><dc:description>{description}</dc:description><rdf:Bag>{items}</rdf:Bag>"
            f"</cc:Work></metadata>{body}</svg>")


def test_openclipart(tmp_path, capsys):
    root, out = tmp_path / "raw", tmp_path / "out"
    drawings = {
        "a": svg("pear_01", "A &amp;amp; B pear", ["hash", "fruit", "", "food", "pear"]), "copy": svg("Other title"),
        "b": svg("Part of the Flat Icon Collection", "", ["food"]), "c": svg("See http://x.org", "A red house."),
        "linked": svg("Yoga", body='<image xlink:href="c:/x.png"/>'), "small": svg("Small"), "long": svg("Long"),
        "blank": svg("Blank"),
        **{f"many{i}": svg("lemon", f"lemon number {i}") for i in range(8)},
        **{f"set{i}": svg("gramastar") for i in range(26)},
        **{f"other{i}": svg(f"thing {'abcdefghij'[i % 10]}{'abcdefghij'[i // 10]} by Jane Doe", "The same words.")
           for i in range(20)}}
    sizes = {"small": (31, 40), "long": (300, 40), "blank": (2800, 2800)}
    for i, (name, text) in enumerate(drawings.items()):
        put(root / "svg" / "x" / f"{name}.svg", text)
        (root / "png" / "x").mkdir(parents=True, exist_ok=True)
        mode, color = ("1", 1) if name == "blank" else ("RGBA", (i, 0, 0, 255))
        image = Image.new(mode, sizes.get(name, (40, 40)), color)
        image.save(root / "png" / "x" / f"{name}.png", optimize=True)
    (root / "png" / "x" / "copy.png").write_bytes((root / "png" / "x" / "a.png").read_bytes())
    huge = bytearray((root / "png" / "x" / "long.png").read_bytes())
    huge[16:24] = (25000).to_bytes(4, "big") * 2  # a header that says 625 megapixels: never decoded
    (root / "png" / "x" / "huge.png").write_bytes(huge)
    put(root / "svg" / "x" / "huge.svg", svg("Huge"))
    run("openclipart", root, out)
    splits = {s: rows_of(out / f"openclipart_{s}.jsonl") for s in ("train", "val", "test")}
    rows = {r["image_id"]: r for split in splits.values() for r in split}
    assert rows["png/x/a.png"]["captions"] == ["pear", "A & B pear", "pear, fruit, food"]
    assert rows["png/x/a.png"]["image"] == "openclipart.tar::png/x/a.png"
    assert load_image(f"{out}/openclipart.tar::png/x/a.png").size == (40, 40)
    assert rows["png/x/c.png"]["captions"] == ["A red house."]
    assert rows["png/x/other0.png"]["captions"][0] == "thing aa"
    assert sum("lemon" in r["captions"] for r in rows.values()) == 6 and len(rows) == 2 + 6 + 20
    words = {s: {c.casefold() for r in split for c in r["captions"]} for s, split in splits.items()}
    assert len(words) == 3 and not any(a & b for a, b in combinations(words.values(), 2)), "a caption is in two splits"
    said = capsys.readouterr().out
    for part in ("below 32 px", "longer than 5:1", "that are copies", "above 8 megapixels", "that are blank"):
        assert f"1 images {part}" in said
    assert "apt-get install openclipart-png" in refused(capsys, "openclipart", "--root", tmp_path / "no", "--out", out)


def test_tuxpaint(tmp_path, capsys):
    root, out = tmp_path / "raw", tmp_path / "out"
    for i, name in enumerate(("animals/cat", "animals/cat_mirror", "symbols/alphabets/a", "plants/tree",
                              "plants/untold")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("LA", (40 + i, 40)).save(root / f"{name}.png")
        if name != "plants/untold":
            put(root / f"{name}.txt", f"A {Path(name).name}.\nde.utf8=Etwas.\n")
    run("tuxpaint", root, out)
    rows = [r for p in sorted(out.glob("*.jsonl")) for r in rows_of(p)]
    assert sorted((r["image_id"], *r["captions"]) for r in rows) == [("animals/cat.png", "A cat."),
                                                                     ("plants/tree.png", "A tree.")]
    assert "1 images without a caption" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Weights


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Foreign(dict):
    """A class that the reader does not have: instances carry a state, items, and a call that Lightning would make."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.where = "here"


class ForeignList(list):
    pass


def lightning_checkpoint(path, state, settings, extra=None):
    torch.save({"epoch": 3, "state_dict": OrderedDict(state),
                "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
                "callbacks": {Foreign: Foreign(best=torch.ones(2))}, "list": ForeignList([1, 2]), "set": {1, 2},
                "range": range(3),
                "numpy": np.float64(1.5), "path": Path("/x"), "hyper_parameters": Foreign(config=Foreign(settings)),
                "extra": extra}, path)


def test_a_pickle_is_read_without_executing_anything(tmp_path):
    mark = tmp_path / "executed"
    base = torch.arange(12, dtype=torch.float32)
    state = {"half": torch.randn(3, 2).half(), "bf16": torch.randn(4).bfloat16(), "int": torch.arange(3),
             "empty": torch.empty(0, 4),
             "scalar": torch.tensor(2.5), "view": base[2:8].view(2, 3), "transposed": base.view(3, 4).T,
             "strided": base[::3],
             "parameter": nn.Parameter(torch.randn(2, 2)), "bool": torch.tensor([True, False])}
    lightning_checkpoint(tmp_path / "x.ckpt", state, {"num_heads": 4}, Evil(mark))
    read, settings = weights.read_weights(tmp_path / "x.ckpt")
    assert not mark.exists() and settings == {"num_heads": 4} and set(read) == set(state)
    for key, tensor in state.items():
        assert read[key].dtype == tensor.dtype and torch.equal(read[key], tensor) and read[key].is_contiguous(), key
    torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert mark.exists(), "the file is indeed malicious"


def raw_pickle(path, content: bytes):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", content)


@pytest.mark.parametrize("content", [
    b"cposix\nsystem\n(S'touch MARK'\ntR.", b"(S'touch MARK'\niposix\nsystem\n.", b"(cposix\nsystem\nS'touch MARK'\no.",
    b"cposix\nsystem\n(S'touch MARK'\nt\x81.", b"cbuiltins\neval\n(S'__import__(\"os\").system(\"touch MARK\")'\ntR}b.",
    b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S'touch MARK'\ntR."])
def test_no_opcode_calls_anything(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    raw_pickle(tmp_path / "x.pt", content)
    with pytest.raises(ValueError, match="x.pt"):
        weights.convert_weights(tmp_path / "x.pt", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt"]


def test_broken_files_are_named(tmp_path):
    state = {"a": torch.randn(100)}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="before PyTorch 1.6"):
        weights.read_weights(tmp_path / "old.pt")
    raw_pickle(tmp_path / "cut.pt", pickle.dumps({"a": 1}, 2)[:-3])
    with pytest.raises(ValueError, match="cut.pt is not a readable PyTorch file"):
        weights.read_weights(tmp_path / "cut.pt")
    torch.save(state, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "short.pt", "w") as short:
        for name in good.namelist():
            short.writestr(name, good.read(name)[:-8] if "/data/" in name else good.read(name))
    with pytest.raises(ValueError, match="tensor 'a' cannot be read"):
        weights.read_weights(tmp_path / "short.pt")
    with pytest.raises(ValueError, match="is no ManagerTower"):
        weights.convert_weights(tmp_path / "good.pt", tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist"):
        weights.convert_weights(tmp_path / "none.pt", tmp_path / "out")


@pytest.mark.parametrize("name", present("main.mt_aaue_vector", "main.mt_saue_scalar", "main.bt", "main.meter",
                                         "main.head_vqa",
                                         "main.head_nlvr2", "main.head_irtr_itm", "eqdim.head_mlm_itmitc_pretrain"))
def test_official_checkpoints_become_folders_with_the_official_outputs(tmp_path, name):
    expected = golden_config(name)
    settings = {"num_heads": expected.num_heads, "drop_rate": 0.1, "max_text_len": expected.max_text_len,
                "model_type": "MT"}
    lightning_checkpoint(tmp_path / "x.ckpt", golden_state(name), settings)
    main(["weights", "--source", str(tmp_path / "x.ckpt"), "--out", str(tmp_path / "out")])
    model = load_model(tmp_path / "out", vision_heads=expected.vision_heads, text_heads=expected.text_heads).eval()
    ours, theirs = vars(model.config), vars(expected)
    unused = {"contrastive_size", "num_answers", "head_hidden_scale", "heads"} | (
        {f for f in ours if f.startswith("manage")} if expected.fusion != "manager" else set())
    assert {k: v for k, v in ours.items() if k not in unused} == {k: v for k, v in theirs.items() if k not in unused}
    assert set(model.config.heads) == set(expected.heads)
    inputs, out = golden(name)
    if "infer.cls_feats" in out:
        features = model(inputs["image"], inputs["text_ids"], inputs["text_masks"])
        torch.testing.assert_close(features.pooled, out["infer.cls_feats"], atol=5e-6, rtol=0)


@pytest.mark.skipif(not (MT / "manifests").exists(), reason="this golden set has no manifests")
def test_full_size_configs_are_inferred_from_shapes():
    base = json.loads((MT / "manifests" / "mt_pretrain.json").read_text())
    cases = {"bt_pretrain": {"fusion": "bridge"}, "mt_aaue_scalar_pretrain": {"manager_weight": "scalar"},
             "mt_saue_vector_pretrain": {"manager_type": "saue"},
             "mt_ftfpt_nlvr2": {"heads": ("nlvr2",), "image_size": 384},
             "mt_ftfpt_snli": {"heads": ("snli_ve",), "image_size": 384, "head_hidden_scale": 2},
             "mt_ftfpt_vqa": {"heads": ("vqa",), "image_size": 576, "head_hidden_scale": 2},
             "mt_ftfpt_flickr": {"heads": ("itm", "itc"), "image_size": 384, "max_text_len": 40}}
    for name, differs in cases.items():
        delta = json.loads((MT / "manifests" / f"{name}.delta.json").read_text())
        manifest = {k: v for k, v in base.items() if k not in set(delta["removed"])} | delta["changed_or_added"]
        state = {k: torch.empty(shape, device="meta") for k, (shape, _) in manifest.items()}
        config = ManagerTowerConfig.base(**differs)
        assert infer_config(state, {"max_text_len": config.max_text_len}) == config
        with torch.device("meta"):
            expected = {k: v.shape for k, v in ManagerTower(config).state_dict().items()}
        assert {k: v.shape for k, v in prepare.from_official(state, config).items()} == expected


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(width, 2), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x):
        return self.mlp["c_proj"](self.mlp["c_fc"](self.ln_2(self.ln_1(x))))


class Tower(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(Block(width), Block(width), Block(width))
        self.class_embedding, self.proj = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width, 5))
        self.positional_embedding = nn.Parameter(torch.randn(17, width))
        self.conv1, self.ln_pre, self.ln_post = nn.Conv2d(3, width, 8, 8,
                                                          bias=False), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2) + self.class_embedding + self.positional_embedding[1:]
        return self.ln_post(self.transformer.resblocks(self.ln_pre(x))) @ self.proj


class OpenAIClip(nn.Module):
    """The parameter names of OpenAI's release; its computation does not matter here."""

    def __init__(self, width):
        super().__init__()
        self.visual, self.text_projection = Tower(width), nn.Parameter(torch.randn(5, 5))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self, image):
        return self.visual(image) * self.logit_scale


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["TorchScript", "state"])
def test_openai_clip_fills_the_image_encoder(tmp_path, kind):
    config = ManagerTowerConfig.tiny(image_size=32, patch_size=8, vision_width=96, vision_layers=3, heads=())
    clip = OpenAIClip(96)
    if kind == "TorchScript":
        torch.jit.trace(clip, torch.randn(1, 3, 32, 32)).save(tmp_path / "clip.pt")
    else:
        torch.save(clip.state_dict(), tmp_path / "clip.pt")
    main(["weights", "--source", str(tmp_path / "clip.pt"), "--out", str(tmp_path / "clip")])
    state = load_file(tmp_path / "clip" / "model.safetensors")
    expected = {k: v for k, v in clip.state_dict().items() if k.startswith("visual.")}
    assert set(state) == set(expected) and all(torch.equal(state[k], v) for k, v in expected.items())
    model = ManagerTower(config)
    prefix = "text_transformer."
    official = to_official(model.state_dict(), config)
    roberta = {k.removeprefix(prefix): v for k, v in official.items() if k.startswith(prefix)}
    torch.save(roberta, tmp_path / "pytorch_model.bin")
    main(["weights", "--source", str(tmp_path / "pytorch_model.bin"), "--out", str(tmp_path / "roberta")])
    load_unimodal(model, tmp_path / "clip", tmp_path / "roberta")
    assert torch.equal(model.image_encoder.class_embedding, clip.visual.class_embedding)
    assert torch.equal(model.image_encoder.blocks[2].fc.weight, clip.visual.transformer.resblocks[2].mlp["c_fc"].weight)


def test_huggingface_bridgetower_has_equal_outputs(tmp_path):
    transformers = pytest.importorskip("transformers")
    hub = pytest.importorskip("transformers.models.bridgetower.modeling_bridgetower")
    config = transformers.BridgeTowerConfig(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=3, contrastive_hidden_size=16,
        logit_scale_init_value=2.6592,
        vision_config={"hidden_size": 64, "num_hidden_layers": 4, "patch_size": 8, "image_size": 32},
        text_config={"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256,
                     "vocab_size": 90,
                     "max_position_embeddings": 40})
    torch.manual_seed(0)
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(3, 90, (2, 9))
    ids[1, 6:] = 1
    mask = (ids != 1).long()
    for name, safe in (("Model", True), ("ForMaskedLM", True), ("ForImageAndTextRetrieval", False),
                       ("ForContrastiveLearning", True)):
        theirs = getattr(hub, f"BridgeTower{name}")(config).eval()
        for parameter in theirs.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        folder, out = tmp_path / name, tmp_path / f"ours {name}"
        theirs.save_pretrained(folder)
        if not safe:  # older uploads
            torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        main(["weights", "--source", str(folder), "--out", str(out)])
        model = load_model(out).eval()
        with torch.no_grad():
            expected = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels)
            features = model(pixels, ids, mask)
        if name == "Model":
            # transformers has layer norm's epsilon 1e-5 in the cross-modal layers, the official code 1e-12
            pairs = [(features.pooled, expected.pooler_output), (features.text[1, :6], expected.text_features[1, :6]),
                     (features.image, expected.image_features)]
        elif name == "ForMaskedLM":
            pairs = [(model.heads["mlm"](features.text)[:, :6], expected.logits[:, :6])]
        elif name == "ForImageAndTextRetrieval":
            pairs = [(model.heads["itm"](features.pooled), expected.logits)]
        else:
            text, image = model.contrast(model.encode_text(ids, mask), model.encode_image(pixels))
            pairs = [(text, expected.text_embeds), (image, expected.image_embeds),
                     (1 / model.heads["itc"].temperature, theirs.logit_scale.exp())]
        for ours, reference in pairs:
            torch.testing.assert_close(ours, reference, atol=2e-4, rtol=1e-4)


@pytest.mark.skipif(not (MT / "main.head_vqa.json").exists(), reason="this golden set has no VQA head")
def test_weights_take_tokenizer_and_answers_along(tmp_path, capsys):
    save_file({k: v.contiguous() for k, v in golden_state("main.head_vqa").items()}, tmp_path / "x.safetensors")
    put(tmp_path / "short" / "answers.json", ["yes"])
    command = ["weights", "--source", tmp_path / "x.safetensors", "--out", tmp_path / "out", "--answers"]
    assert "1 answers, but the model has 17" in refused(capsys, *command, tmp_path / "short")
    put(tmp_path / "full" / "answers.json", [str(i) for i in range(17)])
    train_tokenizer(["a b"], 300).save(tmp_path / "full")
    main([str(a) for a in (*command, tmp_path / "full", "--tokenizer", tmp_path / "full")])
    assert json.loads((tmp_path / "out" / "answers.json").read_text())[16] == "16"
    assert load_model(tmp_path / "out").config.num_answers == 17
    ours, theirs = (prepare.load_tokenizer(tmp_path / folder) for folder in ("out", "full"))
    assert ours.encode("a b") == theirs.encode("a b")
