"""What a user gets for a bad input: one sentence that names the flag or file, and an exit status
that is not 0.

Each case is a command as it would be typed, in a folder of small good files of which it may damage
one. All of them run in this process.
"""

import json
import os
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers import (
    ANSWERS,
    QUESTIONS,
    SMALL,
    picture,
    png,
    save_tiny_mllms,
    save_tiny_towers,
    write_arrow,
    write_records,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import ask
import bench
import eval as evaluation
import figures
import finetune
import prepare
import train
import world

SCRIPTS = {
    "ask": ask,
    "bench": bench,
    "eval": evaluation,
    "figures": figures,
    "finetune": finetune,
    "prepare": prepare,
    "train": train,
}
SMALL_FLAGS = " ".join(SMALL)


# ---------------------------------------------------------------- where all cases start
def write_data(folder):
    """Manifests of every kind, two rows each, with their pictures."""
    folder.mkdir()
    for name in ("a", "b", "c", "d"):
        picture(ord(name), (32, 32)).save(folder / f"{name}.png")
    captions = [
        {"image": "a.png", "captions": ["a red square", "a square"]},
        {"image": "b.png", "captions": ["a blue circle"]},
        {"image": "c.png", "captions": ["a green circle"]},
        {"image": "d.png", "captions": ["a cross"]},
    ]
    questions = [
        {"image": "a.png", "questions": [{"id": 1, "question": "what?", "answers": {"yes": 1.0}}]},
        {"image": "b.png", "questions": [{"id": 2, "question": "who?", "answers": {"no": 0.3}}]},
        {"image": "c.png", "questions": [{"id": 3, "question": "why?", "answers": {"no": 0.9}}]},
    ]
    statements = [
        {"images": ["a.png", "b.png"], "sentence": "both are red", "label": True, "id": "1-0"},
        {"images": ["b.png", "c.png"], "sentence": "one is blue", "label": False, "id": "1-1"},
    ]
    hypotheses = [
        {"image": "a.png", "hypothesis": "it is red", "label": "entailment"},
        {"image": "b.png", "hypothesis": "it is green", "label": "neutral"},
    ]
    for split in ("train", "val", "test", "dev", "rest_val", "test1", "minival"):
        write_records(folder / f"coco_{split}.jsonl", captions)
        write_records(folder / f"flickr30k_{split}.jsonl", captions)
        write_records(folder / f"vqav2_{split}.jsonl", questions)
        write_records(folder / f"nlvr2_{split}.jsonl", statements)
        write_records(folder / f"snli_ve_{split}.jsonl", hypotheses)
    (folder / "answers.json").write_text('["yes", "no"]')


def write_chats(folder):
    """A chat file of LLaVA's in both formats, and a mixture."""
    folder.mkdir()
    picture(1, (32, 32)).save(folder / "a.png")
    rows = []
    for number in range(6):
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": f"It is {number}."},
        ]
        rows.append({"id": number, "image": "a.png", "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(rows))
    write_records(folder / "chat.jsonl", rows)
    (folder / "mixture.yaml").write_text("datasets:\n- json_path: chat.json\n")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The good files."""
    root = tmp_path_factory.mktemp("good")
    save_tiny_towers(root)
    save_tiny_mllms(root)
    write_data(root / "data")
    write_chats(root / "chats")
    (root / "arrows").mkdir()
    write_arrow(root / "arrows" / "vqav2_train.arrow", {**QUESTIONS, **ANSWERS})
    write_arrow(root / "arrows" / "vqav2_val.arrow", {**QUESTIONS, **ANSWERS})
    write_arrow(root / "arrows" / "vqav2_rest_val.arrow", {**QUESTIONS, **ANSWERS})
    (root / "arrows" / "answers.json").write_text('["yes", "no"]')
    (root / "own").mkdir()
    (root / "own" / "model.safetensors").write_bytes(b"mine")
    return root


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A folder with links to the good ones, which is the working directory."""
    for path in good.iterdir():
        os.symlink(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_copy(place, name):
    """The path of a file below `place` that may be changed: its folder is copied first."""
    top = place / name.split("/")[0]
    if top.is_symlink() and top.is_dir():
        target = top.resolve()
        top.unlink()
        shutil.copytree(target, top)
    elif top.is_symlink():
        top.unlink()
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# ---------------------------------------------------------------- what a case does to a file
def with_values(**changes):
    """A JSON object in which these keys have other values."""

    def change(path):
        values = json.loads(path.read_text())
        values.update(changes)
        path.write_text(json.dumps(values))

    return change


def without_token(name):
    """A tokenizer.json in which a special token is an ordinary word."""

    def change(path):
        values = json.loads(path.read_text())
        tokens = values["added_tokens"]
        values["added_tokens"] = [token for token in tokens if token["content"] != name]
        path.write_text(json.dumps(values))

    return change


def with_id_of_pad(i):
    """A tokenizer.json with another id of <pad>."""

    def change(path):
        values = json.loads(path.read_text())
        for token in values["added_tokens"]:
            if token["content"] == "<pad>":
                token["id"] = i
        path.write_text(json.dumps(values))

    return change


def with_row(number, text):
    """JSON Lines in which one line, counted from 1, is another one."""

    def change(path):
        lines = path.read_text().splitlines()
        lines[number - 1] = text if isinstance(text, str) else json.dumps(text)
        path.write_text("\n".join(lines) + "\n")

    return change


def with_item(number, **changes):
    """A JSON list in which one item has other values."""

    def change(path):
        rows = json.loads(path.read_text())
        rows[number].update(changes)
        path.write_text(json.dumps(rows))

    return change


def with_tensor(key, tensor):
    """Weights in which one tensor is another one; None: it is missing."""

    def change(path):
        state = load_file(path)
        state[key] = tensor
        if tensor is None:
            del state[key]
        save_file(state, path)

    return change


def with_every_tensor(function):
    def change(path):
        save_file({key: function(tensor) for key, tensor in load_file(path).items()}, path)

    return change


def content(new):
    """Another content: bytes, or a text in UTF-8."""

    def change(path):
        path.write_bytes(new if isinstance(new, bytes) else new.encode())

    return change


def cut(path):
    """The first half of a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def latin(path):
    path.write_bytes(path.read_text().replace("red", "r\xe4d").encode("latin-1"))


def utf16(path):
    path.write_bytes(path.read_text().encode("utf-16"))


def removed(path):
    path.unlink()


def a_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def arrow_with(**columns):
    """An .arrow file with some columns changed; None: it is missing."""

    def change(path):
        table = {**QUESTIONS, **ANSWERS, **columns}
        write_arrow(path, {name: column for name, column in table.items() if column is not None})

    return change


def array_picture(array, file_format):
    def change(path):
        Image.fromarray(array).save(path, file_format)

    return change


# ---------------------------------------------------------------- the cases
TRAIN = f"train {SMALL_FLAGS} --data_root data --datasets coco --max_steps 1 --eval_size 2"
VQA = (
    "finetune --task vqav2 --init itm --data_root data --max_steps 1 --num_workers 0 "
    "--batch_size 2 --image_size 32 --max_text_len 16"
)
QUESTION = "ask question --checkpoint vqa --image data/a.png --question what"
MATCH = "ask match --checkpoint itm --image data/a.png --text square"
SEARCH = "ask search --checkpoint retrieval --folder data --text square"
CHAT = "ask chat --checkpoint static --image data/a.png --question what"
STAGE = (
    "train --recipe llava_stage2 --init static --data_path chats/chat.json --image_folder chats "
    "--eval_size 2 --max_steps 1 --num_workers 0 --batch_size 2"
)
EVAL = "eval --checkpoint vqa --task vqav2 --data_root data"

FLAGS = [
    # numbers out of their range, of another type, or not finite
    (f"{TRAIN} --learning_rate nan", "--learning_rate"),
    (f"{TRAIN} --learning_rate -1", "--learning_rate is -1"),
    (f"{TRAIN} --learning_rate fast", "--learning_rate"),
    (f"{TRAIN} --weight_decay inf", "--weight_decay"),
    (f"{TRAIN} --warmup 2", "--warmup is 2"),
    (f"{TRAIN} --warmup inf", "--warmup"),
    (f"{TRAIN} --beta2 1", "--beta2 is 1"),
    (f"{TRAIN} --seed -1", "--seed is -1"),
    (f"{TRAIN} --max_steps 0", "--max_steps is 0"),
    (f"{TRAIN} --max_steps 1.5", "--max_steps"),
    (f"{TRAIN} --max_steps 1e3", "--max_steps"),
    (f"{TRAIN} --max_steps 99999999999999999999", "--max_steps"),
    (f"{TRAIN} --eval_size 0", "--eval_size is 0"),
    (f"{TRAIN} --eval_every -1", "--eval_every is -1"),
    (f"{TRAIN} --num_workers -1", "--num_workers is -1"),
    (f"{TRAIN} --batch_size 0", "--batch_size is 0"),
    (f"{TRAIN} --batch_size 3 --share_images", "--batch_size"),
    (f"{TRAIN} --temperature 0", "--temperature is 0"),
    (f"{TRAIN} --temperature nan", "--temperature"),
    (f"{TRAIN} --dropout 1.5", "--dropout is 1.5"),
    (f"{TRAIN} --initializer_range -1", "--initializer_range is -1"),
    (f"{TRAIN} --lr_mult_head -1", "--lr_mult_head is -1"),
    (f"{VQA} --epochs 0", "--epochs is 0"),
    (f"{STAGE} --lr_manager nan", "--lr_manager"),
    (f"{STAGE} --max_length 0", "--max_length is 0"),
    (f"{QUESTION} --top 0", "--top is 0"),
    (f"{SEARCH} --batch_size -1", "--batch_size is -1"),
    (f"{SEARCH} --memory_gb nan", "--memory_gb"),
    (f"{CHAT} --temperature nan", "--temperature"),
    (f"{CHAT} --top_p 0", "--top_p is 0"),
    (f"{CHAT} --max_new_tokens 1000000000", "--max_new_tokens"),
    (f"{EVAL} --batch_size 0", "--batch_size is 0"),
    (f"{EVAL} --k_test 0", "--k_test is 0"),
    ("figures managers --checkpoint vqa --data_root data --limit 0", "--limit is 0"),
    ("bench towers --rounds 0", "--rounds is 0"),
    ("bench towers --batch_size 1", "--batch_size is 1"),
    # words that are none of the allowed ones
    ("train --recipe none", "--recipe"),
    (f"{TRAIN} --precision fp8", "--precision"),
    (f"{TRAIN} --schedule step", "--schedule"),
    (f"{TRAIN} --manager_type best", "--manager_type"),
    (f"{TRAIN} --objectives mlm,mlm", "--objectives"),
    (f"{TRAIN} --objectives mlm,xyz", "--objectives"),
    (f"{TRAIN} --transform none", "--transform"),
    (f"{TRAIN} --datasets imagenet", "data has no imagenet_train.jsonl"),
    (f"{TRAIN} --on_bad_sample ignore", "--on_bad_sample"),
    (f"{TRAIN} --compile perhaps", "--compile"),
    ("finetune --task imagenet", "--task"),
    (f"{TRAIN} --no_such_flag 1", "--no_such_flag"),
    (f"{TRAIN} stray", "stray"),
    ("ask", "needs a command"),
    ("ask sing", "'sing'"),
    ("ask question --checkpoint vqa", "--image"),
    ("prepare imagenet --root . --out o", "imagenet"),
    # devices
    (f"{TRAIN} --device foo", "--device is 'foo'"),
    (f"{TRAIN} --device cuda:99", "--device"),
    (f"{EVAL} --device mps", "--device is 'mps'"),
    (f"{CHAT} --device meta", "--device is 'meta'"),
    # sizes of a model that cannot be
    (f"{TRAIN} --vocab_size 1000000000000", "--vocab_size is 1000000000000"),
    (f"{TRAIN} --image_size 1600000", "--image_size is 1600000"),
    (f"{TRAIN} --image_size 17", "image_size"),
    (f"{TRAIN} --mlp_ratio 1000000000", "mlp_ratio"),
    (f"{TRAIN} --num_layers 1000000", "--num_layers is 1000000"),
    (f"{TRAIN} --num_heads 3", "num_heads"),
    (f"{TRAIN} --managed_layers_text 9", "managed_layers_text"),
    (f"{TRAIN} --batch_size 1000000000000", "--batch_size"),
    ("train --recipe llava_demo --num_heads 0", "--num_heads is 0"),
    ("train --recipe llava_demo --hidden_size 60 --num_heads 4", "head"),
    ("train --recipe llava_demo --patch_size 128", "patch_size"),
    ("train --recipe llava_demo --grid_pinpoints [1,2]", "grid_pinpoints"),
    ('train --recipe llava_demo --grid_pinpoints "["', "--grid_pinpoints"),
    ("train --recipe llava_demo --grid_pinpoints (1x1),...,(9999x9999)", "grid_pinpoints"),
    ("train --recipe llava_demo --managed_layers 99", "managed_layers"),
    ("train --recipe llava_demo --max_steps 0", "--max_steps"),
    # places that do not exist, or are something else
    (f"{TRAIN} --data_root nowhere", "--data_root"),
    (f"{TRAIN} --vision nope --text nope", "--vision is 'nope', which does not exist"),
    (f"{TRAIN} --tokenizer nope", "nope"),
    (f"{TRAIN} --out_dir data/a.png", "data/a.png"),
    (f'{TRAIN} --out_dir ""', "--out_dir is empty"),
    (f"{TRAIN} --out_dir own", "own has a model.safetensors"),
    (f"{TRAIN} --vision vqa --text vqa --vocab_size 400", "vqa: these are weights of a model of"),
    (f"{VQA} --init nowhere", "nowhere"),
    (f"{VQA} --init static", "static"),
    (f"{VQA} --num_heads 1", "--num_heads is 1, but itm has 2"),
    ("ask question --checkpoint nowhere --image data/a.png --question what", "nowhere"),
    ("ask question --checkpoint itm --image data/a.png --question what", "itm has no vqa head"),
    ("ask question --checkpoint static --image data/a.png --question what", "static is a LLaVA"),
    ("ask chat --checkpoint vqa --image data/a.png --question what", "vqa is not a LLaVA"),
    ("ask question --checkpoint vqa --image nowhere.png --question what", "nowhere.png"),
    ("ask question --checkpoint vqa --image data --question what", "data"),
    ("ask search --checkpoint retrieval --folder nowhere --text square", "nowhere"),
    ("ask search --checkpoint retrieval --folder chats/chat.json --text square", "chats/chat.json"),
    ("eval --checkpoint vqa --task nlvr2 --data_root data", "nlvr2"),
    ("eval --checkpoint vqa --task vqav2 --data_root data --split never", "never"),
    ("eval --checkpoint vqa --task vqav2 --data_root nowhere", "--data_root"),
    ("prepare weights --source nowhere --out o", "nowhere"),
    ("prepare weights --source vqa --out o", "vqa"),
    ("prepare weights --source data/a.png --out o", "a.png"),
    ("prepare vqav2 --root nowhere --out o", "nowhere"),
    ("figures curves --run nowhere", "nowhere"),
    ("figures grid --image nowhere.png", "nowhere.png"),
    # texts
    ('ask question --checkpoint vqa --image data/a.png --question " "', "empty"),
    ('ask match --checkpoint itm --image data/a.png --text ""', "empty"),
    ('ask chat --checkpoint static --image data/a.png --question ""', "empty"),
    # results that could not be written are refused before the work
    (f"{EVAL} --out nowhere/x.json", "--out nowhere/x.json"),
    (f"{EVAL} --submit nowhere/x.json", "--submit nowhere/x.json"),
    (f"{SEARCH} --out nowhere/x.png", "--out nowhere/x.png"),
    ("figures grid --image data/a.png --out nowhere/x.png", "--out nowhere/x.png"),
    ("bench towers --json nowhere/x.json", "--json nowhere/x.json"),
    (f"{EVAL} --out vqa/config.json", "config.json is there and is no result of eval.py"),
    (f"{EVAL} --submit data/vqav2_val.jsonl --split val", "vqav2_val.jsonl is there and is no"),
    (f"{EVAL} --out x.json --submit x.json --split val", "are the same file, x.json"),
    (f"{EVAL} --out /dev/null", "--out /dev/null cannot be written: it is a device"),
    # what does not go together
    (EVAL.replace("root data", "root data/vqav2_val.jsonl"), "which holds one split"),
    (TRAIN.replace("root data", "root data/coco_train.jsonl"), "--data_root data/coco_train.jsonl"),
    ("train --recipe llava_demo --data_path chats/chat.json", "--data_path means nothing"),
    ("train --recipe llava_stage2 --init static", "--data_path"),
    (f"{STAGE} --vision vqa", "--init"),
    (f"{STAGE} --eval_size 6", "--eval_size 6"),
    (f"{STAGE} --num_layers 9", "--num_layers 9"),
]

RECORDS = [
    # captions
    ("data/coco_train.jsonl", with_row(2, "{"), TRAIN, "coco_train.jsonl, line 2"),
    ("data/coco_train.jsonl", with_row(3, "[" * 100_000), TRAIN, "line 3"),
    ("data/coco_train.jsonl", with_row(2, "[1]"), TRAIN, "line 2"),
    ("data/coco_train.jsonl", with_row(2, {"captions": ["x"]}), TRAIN, "line 2: an image"),
    ("data/coco_train.jsonl", with_row(2, {"image": 5, "captions": ["x"]}), TRAIN, "5"),
    ("data/coco_train.jsonl", with_row(2, {"image": "a.png", "captions": "x"}), TRAIN, "captions"),
    ("data/coco_train.jsonl", with_row(2, {"image": "a.png", "captions": []}), TRAIN, "empty"),
    ("data/coco_train.jsonl", with_row(2, {"image": "a.png", "captions": [" "]}), TRAIN, "empty"),
    ("data/coco_train.jsonl", with_row(2, {"image": "a.png", "captions": [None]}), TRAIN, "None"),
    (
        "data/coco_train.jsonl",
        with_row(2, {"image": "a.png", "captions": ["\ud83d"]}),
        TRAIN,
        "line 2, has half a character",
    ),
    ("data/coco_train.jsonl", latin, TRAIN, "coco_train.jsonl, line 1: the byte 0xe4"),
    ("data/coco_train.jsonl", utf16, TRAIN, "UTF-16"),
    ("data/coco_train.jsonl", content(""), TRAIN, "no rows"),
    ("data/coco_train.jsonl", removed, TRAIN, "coco"),
    ("data/coco_train.jsonl", a_folder, TRAIN, "coco_train.jsonl"),
    ("data/b.png", removed, f"{TRAIN} --max_steps 4", "b.png: no such file"),
    ("data/b.png", cut, f"{TRAIN} --max_steps 4", "b.png"),
    ("data/b.png", content("no picture"), f"{TRAIN} --max_steps 4", "b.png"),
    # questions
    (
        "data/vqav2_train.jsonl",
        with_row(1, {"image": "a.png", "questions": [{"id": 1, "question": 5}]}),
        VQA,
        "line 1",
    ),
    *[
        (
            "data/vqav2_train.jsonl",
            with_row(
                2,
                {
                    "image": "a.png",
                    "questions": [{"id": 2, "question": "what?", "answers": answers}],
                },
            ),
            VQA,
            "line 2",
        )
        for answers in (
            {"yes": None},
            {"yes": [1]},
            {"yes": "1"},
            {"yes": True},
            {"yes": 7},
            {"yes": -1},
            {"yes": float("nan")},
            {"yes": 1e308},
            [],
            "yes",
            None,  # the other rows have answers
        )
    ],
    ("data/answers.json", content('["yes", 1]'), VQA, "answers.json"),
    ("data/answers.json", content('["yes", "yes"]'), VQA, "answers.json"),
    ("data/answers.json", content("[]"), VQA, "answers.json"),
    ("data/answers.json", content("{}"), VQA, "answers.json"),
    ("data/answers.json", removed, VQA, "answers.json"),
    ("data/answers.json", content('["foo", "bar"]'), VQA, "answers.json belongs to other data"),
    ("vqa/answers.json", content('["yes"]'), QUESTION, "answers.json"),
    ("vqa/answers.json", content('[["yes"]]'), QUESTION, "answers.json"),
    (
        "data/vqav2_test.jsonl",
        with_row(
            2, {"image": "a.png", "questions": [{"id": 1, "question": "what?", "answers": {}}]}
        ),
        "eval --checkpoint vqa --task vqav2 --data_root data --split test --submit s.json",
        "1",
    ),
    (
        "data/vqav2_test.jsonl",
        with_row(
            2, {"image": "a.png", "questions": [{"id": "x", "question": "what?", "answers": {}}]}
        ),
        "eval --checkpoint vqa --task vqav2 --data_root data --split test --submit s.json",
        "x",
    ),
    *[
        (
            "data/nlvr2_dev.jsonl",
            with_row(
                2,
                {"images": ["a.png", "b.png"], "sentence": "both", "label": label, "id": "1"},
            ),
            "eval --checkpoint nlvr2 --task nlvr2 --data_root data --split dev",
            "line 2",
        )
        for label in (1, 1.0, "true", None, [])
    ],
    (
        "data/nlvr2_dev.jsonl",
        with_row(2, {"images": ["a.png"], "sentence": "both", "label": True, "id": "1"}),
        "eval --checkpoint nlvr2 --task nlvr2 --data_root data --split dev",
        "two images",
    ),
    *[
        (
            "data/snli_ve_dev.jsonl",
            with_row(2, {"image": "a.png", "hypothesis": "it is red", "label": label}),
            "eval --checkpoint snli_ve --task snli_ve --data_root data --split dev",
            "line 2",
        )
        for label in (0, "contradicts", None)
    ],
    # .arrow files
    *[
        (
            "arrows/vqav2_train.arrow",
            arrow_with(**columns),
            VQA.replace("--data_root data", "--data_root arrows"),
            words,
        )
        for columns, words in (
            ({"questions": ["what?", "why?"]}, "'questions'"),
            ({"questions": None}, "questions"),
            ({"image": ["a", "b"]}, "'image'"),
            ({"answers": [["net"], ["yes"]]}, "'answers'"),
            ({"answer_scores": [[[float("nan"), 0.3], [0.6]], [[0.9]]]}, "row 0"),
            ({"answer_scores": [[[1.0], [0.6]], [[0.9]]]}, "row 0"),
            ({"question_id": [[11], [13]]}, "row 0"),
            ({"image": [b"none", b"no picture"]}, "not a readable image"),
        )
    ],
    ("arrows/vqav2_train.arrow", cut, VQA.replace("root data", "root arrows"), "train.arrow"),
    # conversations
    ("chats/chat.json", content("["), STAGE, "chat.json"),
    ("chats/chat.json", content("[]"), STAGE, "chat.json"),
    ("chats/chat.json", content("5"), STAGE, "chat.json"),
    ("chats/chat.json", cut, STAGE, "chat.json"),
    ("chats/chat.json", latin, STAGE.replace("chat.json", "nowhere.json"), "nowhere.json"),
    *[
        ("chats/chat.json", with_item(3, **changes), STAGE, "item 3")
        for changes in (
            {"conversations": []},
            {"conversations": None},
            {"conversations": "hello"},
            {"conversations": [{"from": "human"}]},
            {"conversations": [{"from": ["human"], "value": "<image>"}]},
            {"conversations": [{"from": "robot", "value": "<image>"}]},
            {"conversations": [{"from": "human", "value": 5}]},
            {"image": 5},
            {"image": [None]},
            {"image": ["a.png", "a.png"]},
            {"video": "a.mp4"},
        )
    ],
    ("chats/a.png", removed, STAGE, "a.png"),
    # mixtures
    *[
        ("chats/mixture.yaml", content(text), STAGE.replace("chat.json", "mixture.yaml"), words)
        for text, words in (
            ("", "datasets"),
            ("datasets:", "datasets"),
            ("datasets: [", "mixture.yaml"),
            ("datasets:\n- path: chat.json", "entry 1"),
            ("datasets:\n- json_path: 5", "entry 1"),
            ("datasets:\n- json_path: nowhere.json", "nowhere.json"),
            (
                "datasets:\n- json_path: chat.json\n  sampling_strategy: first:1.2.3%",
                "first:1.2.3%",
            ),
            ("datasets:\n- json_path: chat.json\n  sampling: first:1%", "'sampling'"),
            ("a: &a [x, x]\nb: &b [*a, *a]\ndatasets: *b", "entry 1"),
            (b"datasets:\n- json_path: r\xe4d.json", "mixture.yaml"),
        )
    ],
]

CHECKPOINTS = [
    # config.json
    ("vqa/config.json", removed, QUESTION, "vqa"),
    ("vqa/config.json", content("{"), QUESTION, "config.json"),
    ("vqa/config.json", content("[]"), QUESTION, "config.json"),
    ("vqa/config.json", content("[" * 100_000), QUESTION, "config.json"),
    ("vqa/config.json", with_values(unknown=1), QUESTION, "unknown"),
    *[
        ("vqa/config.json", with_values(**{key: value}), QUESTION, key)
        for key, value in (
            ("dropout", "0"),
            ("dropout", None),
            ("temperature", "x"),
            ("heads", ["vqa", "vqa"]),
            ("heads", None),
            ("manager_noise", "maybe"),
            ("num_layers", 3.0),
            ("num_layers", True),
            ("num_layers", 1_000_000),
            ("vision_layers", 100_000),
            ("vision_width", 10**9),
            ("vision_width", 2_000_000),
            ("max_positions", 10**13),
            ("hidden_size", -32),
            ("managed_layers_text", "12"),
            ("transform", "none"),
        )
    ],
    *[
        ("static/config.json", with_values(**{key: value}), CHAT, key)
        for key, value in (
            ("vision_width", "96"),
            ("vision_width", 96.0),
            ("num_heads", 0),
            ("num_kv_heads", -2),
            ("managed_layers", None),
            ("managed_layers", [[1]]),
            ("norm_eps", "x"),
            ("norm_eps", -1),
            ("rope_theta", 0),
            ("grid_pinpoints", 5),
            ("grid_pinpoints", [[32_000_000, 32]]),
            ("im_start_id", "x"),
            ("tie_embeddings", "x"),
            ("max_length", -1),
            ("vocab_size", 10**12),
        )
    ],
    # weights
    ("vqa/model.safetensors", removed, QUESTION, "model.safetensors"),
    ("vqa/model.safetensors", cut, QUESTION, "model.safetensors"),
    ("vqa/model.safetensors", content("mine"), QUESTION, "model.safetensors"),
    ("vqa/model.safetensors", content(b"\xff" * 64), QUESTION, "model.safetensors"),
    ("vqa/model.safetensors", with_tensor("type_embedding", None), QUESTION, "type_embedding"),
    (
        "vqa/model.safetensors",
        with_tensor("type_embedding", torch.tensor(1.0)),
        QUESTION,
        "type_embedding",
    ),
    (
        "vqa/model.safetensors",
        with_tensor("image_encoder.position_embedding", torch.ones(5)),
        QUESTION,
        "position",
    ),
    ("vqa/model.safetensors", with_tensor("more", torch.ones(2)), QUESTION, "more"),
    ("vqa/model.safetensors", with_every_tensor(lambda x: x * torch.nan), QUESTION, "not finite"),
    ("vqa/model.safetensors", with_every_tensor(torch.Tensor.long), QUESTION, "int64"),
    (
        "static/model.safetensors",
        with_every_tensor(lambda x: x * torch.inf),
        CHAT,
        "not finite",
    ),
    ("static/model.safetensors", with_every_tensor(torch.Tensor.int), CHAT, "int32"),
    # tokenizers
    ("vqa/tokenizer.json", removed, QUESTION, "no tokenizer"),
    ("vqa/tokenizer.json", content("{}"), QUESTION, "tokenizer.json"),
    ("vqa/tokenizer.json", cut, QUESTION, "tokenizer.json"),
    ("vqa/tokenizer.json", with_values(added_tokens=[]), QUESTION, "<pad>"),
    ("static/tokenizer.json", with_values(added_tokens=[]), CHAT, "im_start"),
    (f"{TRAIN.split()[0]}.json", content("{}"), f"{TRAIN} --tokenizer train.json", "train.json"),
    ("vqa/tokenizer.json", without_token("<mask>"), f"{TRAIN} --tokenizer vqa", "<mask>"),
    ("vqa/tokenizer.json", with_id_of_pad(2**31 - 1), QUESTION, "2147483647"),
    *[
        (
            "own/model.safetensors.index.json",
            content(text),
            f"{TRAIN} --vision own --text own --tokenizer vqa --vocab_size 400",
            words,
        )
        for text, words in (
            ("{}", "weight_map"),
            ('{"weight_map": {"a": {"b": 1}}}', "weight_map has {'b': 1}"),
            ('{"weight_map": {"a": "../vqa/model.safetensors"}}', "weight_map has '../vqa"),
            ('{"weight_map": {"a": "none.safetensors"}}', "none.safetensors"),
        )
    ],
    # other files of a run
    ("run/log.jsonl", content('{"step": 1, "loss": "x"}\n'), "figures curves --run run", "loss"),
    ("run/log.jsonl", content('{"step": 1.5}\n'), "figures curves --run run", "line 1"),
    ("run/log.jsonl", content("[1]\n"), "figures curves --run run", "line 1"),
    ("run/log.jsonl", content("{\n"), "figures curves --run run", "line 1"),
    ("run/log.jsonl", content(""), "figures curves --run run", "run"),
    ("run/training_state.pt", content("mine"), f"{TRAIN} --out_dir run", "training_state.pt"),
    ("run/training_state.pt", content(b""), f"{TRAIN} --out_dir run", "training_state.pt"),
]

PICTURES = [
    ("x.png", content(b""), "x.png"),
    ("x.png", content("mine"), "x.png"),
    ("x.png", content(png()[:60]), "x.png"),
    ("x.png", content(png().replace(b"IDAT", b"IDAX")), "x.png"),
    ("x.png", content(png()[:16] + b"\x00\x0f\x00\x00\x00\x0f\x00\x00" + png()[24:]), "x.png"),
    ("x.eps", content("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"), "x.eps"),
    ("x.tif", array_picture(np.full((9, 9), np.nan, np.float32), "TIFF"), "x.tif"),
    ("x.tif", array_picture(np.full((9, 9), 0.5, np.float32), "TIFF"), "x.tif"),
    ("x.tif", array_picture(np.full((9, 9), -7, np.int32), "TIFF"), "x.tif"),
    ("x.svg", content("<svg/>"), "x.svg"),
    ("x.gif", content(b"GIF89a\x01"), "x.gif"),
    ("x.webp", content(b"RIFF\x00\x00\x00\x00WEBP"), "x.webp"),
]

PICTURE_CASES = [
    (file, change, QUESTION.replace("data/a.png", file), words) for file, change, words in PICTURES
]
DAMAGED = [*RECORDS, *CHECKPOINTS, *PICTURE_CASES]


# ---------------------------------------------------------------- what the user gets
def run_command(command, monkeypatch, capsys):
    """(exit status, the sentence) of a command as it would be typed."""
    script, *argv = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    with pytest.raises(SystemExit) as exit:
        world.one_sentence(SCRIPTS[script].main)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return exit.value.code, lines[0].removeprefix("error: ")


def check_sentence(status, sentence, words):
    assert status in (1, 2)
    assert words in sentence
    assert len(sentence) < 1000
    for word in ("object at 0x", "Traceback", "Error(", "[Errno"):
        assert word not in sentence


GOOD = (
    [TRAIN, VQA, VQA.replace("root data", "root arrows"), STAGE]
    + [QUESTION, MATCH, SEARCH, CHAT]
    + [EVAL.replace("vqa --", f"{task} --").replace("vqav2", task) for task in ("nlvr2", "snli_ve")]
)


@pytest.mark.parametrize("command", GOOD, ids=range(len(GOOD)))
def test_with_good_files_the_same_commands_end_well(command, place, monkeypatch, capsys):
    script, *argv = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    world.one_sentence(SCRIPTS[script].main)
    said = capsys.readouterr()
    assert said.out
    assert "error: " not in said.err


@pytest.mark.parametrize("command, words", FLAGS, ids=range(len(FLAGS)))
def test_a_bad_flag_ends_in_one_sentence(command, words, place, monkeypatch, capsys):
    status, sentence = run_command(command, monkeypatch, capsys)
    check_sentence(status, sentence, words)


@pytest.mark.parametrize("file, change, command, words", DAMAGED, ids=range(len(DAMAGED)))
def test_a_bad_file_ends_in_one_sentence_and_is_kept(
    file, change, command, words, place, monkeypatch, capsys
):
    path = own_copy(place, file)
    change(path)
    before = path.read_bytes() if path.is_file() else None
    status, sentence = run_command(command, monkeypatch, capsys)
    check_sentence(status, sentence, words)
    if before is not None:
        assert path.read_bytes() == before
