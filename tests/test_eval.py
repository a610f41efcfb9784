"""eval.py: retrieval against official numbers, one process = two, any batch size = one, and the
errors of the command line.
"""

import json

import pytest
import torch
from helpers import (
    MT,
    close,
    golden,
    golden_model,
    meta,
    people,
    present,
    run_in_forks,
    run_small,
    save_tiny_towers,
)
from PIL import Image
from safetensors.torch import load_file

import data
import eval
import images
import scenes
import tasks
import tokenizer
from eval import Prediction, predict, retrieval_scores
from fields import FlagError
from metrics import recall
from model import ManagerTower, ManagerTowerConfig
from objectives import class_logits
from weights import load_model, load_two_tower

FOLDER = {"vqav2": "vqa", "nlvr2": "nlvr2", "snli_ve": "snli_ve", "flickr30k": "retrieval"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of random tiny models: vqa, nlvr2, snli_ve, retrieval, itm; and nine pictures."""
    return save_tiny_towers(tmp_path_factory.mktemp("checkpoints"))


def run(*flags):
    eval.main([str(flag) for flag in flags])


def texts_of(some_tokenizer, number):
    rows = scenes.demo_source("captions", "heldout", number).texts()
    return some_tokenizer([row["text"] for row in rows], 16)


# ---------------------------------------------------------------- retrieval
@pytest.mark.parametrize("batch_size, memory_gb", [(64, 1), (5, 1), (7, 1e-4), (4, 0)])
@pytest.mark.parametrize("name", present("eqdim.head_irtr_itm_itc"))
def test_retrieval_equals_the_official_code(name, batch_size, memory_gb):
    tensors = load_file(MT / "eqdim.recall_demo.safetensors")
    case = meta("eqdim.recall_demo")
    pixels = tensors["image_small_4x4"].repeat_interleave(8, 2).repeat_interleave(8, 3)
    scores = retrieval_scores(
        golden_model(name),
        pixels.__getitem__,
        12,
        tensors["text_ids"],
        tensors["text_masks"],
        case["k_test"],
        batch_size=batch_size,
        memory_gb=memory_gb,
    )
    close(scores, tensors["scores_final"], 5e-6)
    metrics = recall(scores, torch.arange(24) // 2)
    for key, value in case["recall"].items():
        if key in metrics:
            assert metrics[key] == pytest.approx(value, abs=1e-6), key
    assert metrics["rmean"] == pytest.approx(case["recall"]["r_mean"], abs=1e-6)


def test_experts_are_computed_once_where_they_fit(monkeypatch):
    config = ManagerTowerConfig.tiny(heads=("itm", "itc"), image_size=16, patch_size=8)
    model = ManagerTower(config)
    calls = []
    for modality in ("text", "image"):

        def counted(*args, modality=modality, encode=getattr(model, f"encode_{modality}")):
            calls.append((modality, len(args[0])))
            return encode(*args)

        monkeypatch.setattr(model, f"encode_{modality}", counted)
    pixels = torch.randn(6, 3, 16, 16)
    ids = torch.randint(5, 300, (8, 10))
    # bytes of all experts
    of_texts = 8 * config.num_experts("text") * 10 * config.text_width * 4
    num_patches = (16 // config.patch_size) ** 2
    of_images = 6 * config.num_experts("image") * (num_patches + 1) * config.vision_width * 4

    def count(budget):
        calls.clear()
        retrieval_scores(
            model, pixels.__getitem__, 6, ids, torch.ones_like(ids), 6, None, 3, budget / 2**30
        )
        return [sum(n for what, n in calls if what == kind) for kind in ("text", "image")]

    assert count(of_texts + of_images) == [8, 6]
    assert count(of_texts + of_images - 1) == [8, 12]
    of_both = count(of_texts - 1)
    assert of_both[0] > 8
    assert of_both[1] == 6  # what the captions left is enough for the images
    assert count(0)[1] == 12


def test_without_an_itc_head_every_pair_is_scored(folder, capsys):
    model = load_model(folder / "itm").eval()
    ids, mask = texts_of(tokenizer.load_tokenizer(folder / "itm"), 4)
    pixels = torch.randn(3, 3, 32, 32)
    scores = retrieval_scores(model, pixels.__getitem__, 3, ids, mask, k_test=1, batch_size=5)
    assert "without an ITC head all 12 pairs are scored" in capsys.readouterr().out
    one_by_one = torch.empty(3, 4)
    with torch.no_grad():
        for i in range(3):
            for j in range(4):
                features = model(pixels[i : i + 1], ids[j : j + 1], mask[j : j + 1])
                one_by_one[i, j] = model.heads["itm"](features.pooled)[0, 1]
    close(scores, one_by_one, 1e-5)
    with pytest.raises(ValueError, match="ITM head"):
        retrieval_scores(load_model(folder / "vqa"), pixels.__getitem__, 3, ids, mask)


def test_candidates_are_the_most_similar_ones(folder):
    model = load_model(folder / "retrieval").eval()
    ids, mask = texts_of(tokenizer.load_tokenizer(folder / "retrieval"), 6)
    pixels = torch.randn(8, 3, 32, 32)
    with torch.no_grad():  # contrast takes any two batches
        vectors = model.contrast(model.encode_text(ids, mask), model.encode_image(pixels))
        similarity = vectors[1] @ vectors[0].T  # (8, 6)
    scores = retrieval_scores(
        model, pixels.__getitem__, 8, ids, mask, k_test=2, texts_per_image=0, batch_size=3
    )
    chosen = scores > -100
    assert (chosen.sum(0) == 2).all()
    for j in range(6):
        most_similar = set(similarity[:, j].topk(2).indices.tolist())
        assert set(chosen[:, j].nonzero()[:, 0].tolist()) == most_similar


# ---------------------------------------------------------------- classification
def dataset_of(folder, task, size=10):
    kind = tasks.TASKS[task].kind
    return data.PairDataset(
        scenes.demo_source(kind, "heldout", size),
        tokenizer.load_tokenizer(folder / "vqa"),
        images.image_transform("albef", 32, False),
        16,
        answers=scenes.DEMO_ANSWERS if kind == "questions" else (),
    )


@pytest.mark.parametrize("task", ["vqav2", "nlvr2", "snli_ve"])
def test_predictions_do_not_depend_on_the_batch_size(folder, task):
    model = load_model(folder / FOLDER[task])
    dataset = dataset_of(folder, task)
    head = tasks.TASKS[task].heads[0]
    batch = data.collate([dataset[i] for i in range(len(dataset))])
    with torch.no_grad():  # a model that prefers no class, so that its answers differ
        logits = class_logits(model.eval(), head, batch)
        model.heads[head].fc_out.bias -= logits.mean(0)
    model.train()
    one = predict(model, dataset, task, batch_size=1)
    many = predict(model, dataset, task, batch_size=7)
    assert one == many and len(one) == len(dataset) and model.training
    rows = [dataset.source[i] for i in range(len(dataset))]
    assert len({p.choice for p in one}) > 1
    if task == "vqav2":
        scores = [
            row["answers"].get(scenes.DEMO_ANSWERS[p.choice], 0.0)
            for row, p in zip(rows, one, strict=True)
        ]
        assert [p.question_id for p in one] == [row["question_id"] for row in rows]
    else:
        scores = [float(int(row["label"]) == p.choice) for row, p in zip(rows, one, strict=True)]
    assert [p.score for p in one] == pytest.approx(scores)
    accuracy = eval.evaluate(model, dataset, task)["accuracy"]
    assert accuracy == pytest.approx(sum(scores) / len(scores))


def test_soft_accuracy_by_type():
    rows = [
        Prediction(0, 0.3, 1, "what"),
        Prediction(2, 1.0, 2, "is"),
        Prediction(1, 0.9, 3, "what"),
        Prediction(1, 0.0, 4),
    ]
    assert eval.accuracy(rows) == {
        "accuracy": pytest.approx(0.55),
        "count": 4,
        "per_question_type": {"is": 1.0, "what": pytest.approx(0.6)},
    }
    assert eval.accuracy([*rows, Prediction(1, None, 5)]) == {"count": 5}  # a test set


@pytest.mark.parametrize("name", present("main.head_vqa", "main.head_snli", "main.head_nlvr2"))
def test_logits_equal_the_official_ones(name):
    inputs, out = golden(name)
    batch = {
        "pixels": inputs["image"],
        "input_ids": inputs["text_ids"],
        "attention_mask": inputs["text_masks"],
    }
    head = name.removeprefix("main.head_").replace("snli", "snli_ve")
    if head == "nlvr2":
        batch["pixels_1"] = inputs["image_b"]
    with torch.no_grad():
        logits = class_logits(golden_model(name), head, batch)
    close(logits, out[next(key for key in out if key.endswith("logits"))], 2e-5)


# ---------------------------------------------------------------- the transform of a checkpoint
def test_a_checkpoint_trained_with_albef_is_evaluated_with_it(small, tmp_path, monkeypatch):
    """Its heads are those of pre-training, which the papers do with "clip"."""
    picture = Image.linear_gradient("L").convert("RGB").resize((40, 20))
    picture.save(tmp_path / "wide.png")
    row = {"image": "wide.png", "captions": ["a picture"]}
    (tmp_path / "flickr30k_test.jsonl").write_text(json.dumps(row) + "\n")
    seen = {}

    def look(model, dataset, *settings):
        seen[model.config.image_size, len(seen)] = dataset[0]["pixels"]
        return {"accuracy": 0.0}

    monkeypatch.setattr(eval, "evaluate", look)
    for name in ("albef", "clip"):
        out = tmp_path / name
        run_small(small, "--transform", name, "--max_steps", 1, "--out_dir", out)
        expected = images.image_transform(name, 16, train=False)(picture, None)
        for checkpoint in (out, out / "best"):
            seen.clear()
            run("--task", "flickr30k", "--checkpoint", checkpoint, "--data_root", tmp_path)
            assert torch.equal(seen.popitem()[1], expected), name
            transform = load_two_tower(str(checkpoint)).transform
            assert torch.equal(transform(picture, None), expected), name


# ---------------------------------------------------------------- the command line
def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_vqa(folder, labels: bool):
    """A VQA manifest of the nine pictures, three questions each, and the raw annotations."""
    lines = []
    annotations = []
    for i, row in enumerate(scenes.demo_source("questions", "heldout", 27).texts()[:27]):
        if i % 3 == 0:
            lines.append({"image": f"pictures/{i // 3}.png", "questions": []})
        question = {
            "id": 1000 - i,
            "question": row["text"],
            "question_type": row["question_type"],
        }
        if labels:
            question["answers"] = row["answers"]
        lines[-1]["questions"].append(question)
        true_answer = next(iter(row["answers"]))
        annotations.append({"question_id": 1000 - i, "answers": people((true_answer, 10))})
    write_lines(folder / f"vqav2_{'val' if labels else 'test'}.jsonl", lines)
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))


def run_all(rank, world, folder, out):
    """Every task on one of `world` processes."""
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", f"file://{out}/rendezvous", rank=rank, world_size=world
        )
    torch.set_num_threads(1)
    base = ["--data_root", folder, "--batch_size", 4]
    vqa = ["--task", "vqav2", "--checkpoint", folder / "vqa", *base]
    annotations = folder / "annotations.json"
    run(*vqa, "--split", "val", "--annotations", annotations, "--out", f"{out}/vqav2.json")
    run(*vqa, "--split", "test", "--submit", f"{out}/submit.json", "--out", f"{out}/test.json")
    retrieval = ["--task", "flickr30k", "--checkpoint", folder / "retrieval", "--k_test", 3]
    run(*retrieval, *base, "--out", f"{out}/flickr30k.json")
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(folder, tmp_path):
    for labels in (True, False):
        write_vqa(folder, labels)
    captions = []
    for i in range(9):
        texts = [f"a red circle {i}", f"{i} blue squares"]
        captions.append({"image": f"pictures/{i}.png", "captions": texts})
    write_lines(folder / "flickr30k_test.jsonl", captions)
    one = tmp_path / "one"
    two = tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run_all(0, 1, folder, one)
    run_in_forks(run_all, 2, folder, two, processes=2)
    for file in ("vqav2.json", "test.json", "submit.json", "flickr30k.json"):
        assert (one / file).read_text() == (two / file).read_text(), file
    submission = json.loads((two / "submit.json").read_text())
    assert [row["question_id"] for row in submission] == [1000 - i for i in range(27)]
    for row in submission:
        assert set(row) == {"question_id", "answer"} and row["answer"] in scenes.DEMO_ANSWERS
    report = json.loads((two / "vqav2.json").read_text())["splits"]["val"]
    # all ten agree, so both are 0 or 1
    assert report["official"]["overall"] == pytest.approx(report["accuracy"])
    assert report["count"] == 27 and report["per_question_type"]
    assert json.loads((two / "test.json").read_text())["splits"]["test"] == {"count": 27}


def test_the_table_shows_percent_beside_the_paper(capsys):
    metrics = {"accuracy": 0.5, "count": 4, "per_question_type": {"is": 0.25}}
    eval.print_table("a task", metrics, {"accuracy": 82.81})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["accuracy", "50.00", "82.81"],
        ["count", "4", "-"],
        ["question_type", "is", "25.00", "-"],
    ]


VQA = ("--task", "vqav2", "--checkpoint", "vqa")
DEMO = (*VQA, "--data", "demo")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("frobnicate",), "no command 'frobnicate'"),
        (
            ("--task", "gqa", "--checkpoint", "vqa"),
            "--task is 'gqa'; it must be one of vqav2, nlvr2",
        ),
        (VQA, "either --data demo or --data_root"),
        ((*DEMO, "--data_root", "x"), "either --data demo or --data_root"),
        (("--task", "vqav2", "--checkpoint", "nowhere", "--data", "demo"), "does not exist"),
        (
            ("--task", "vqav2", "--checkpoint", "pictures", "--data", "demo"),
            "no checkpoint folder of ours",
        ),
        (
            ("--task", "vqav2", "--checkpoint", "nlvr2", "--data", "demo"),
            "has no vqa head",
        ),
        (
            ("--task", "nlvr2", "--checkpoint", "nlvr2", "--data", "demo", "--submit", "x"),
            "are for vqav2",
        ),
        ((*VQA, "--data_root", "x", "--split", "a,b", "--submit", "x"), "--submit takes one split"),
        ((*VQA, "--data_root", "x", "--split", "a,,b"), "the name of a --split is empty"),
        ((*VQA, "--data_root", "x", "--split", "a,a"), "the --split 'a' is named twice"),
        ((*VQA, "--data_root", "x"), "--data_root x: there is no such folder or file"),
        ((*VQA, "--data_root", ".", "--annotations", "x"), "x: no such file"),
        (
            (*VQA, "--data_root", ".", "--annotations", "broken.json"),
            "broken.json, annotation 0: there is no",
        ),
        ((*DEMO, "--annotations", "broken.json"), "--annotations are for .* of --data demo"),
        ((*DEMO, "--batch_size", "0"), "--batch_size is 0; it must be a whole number from 1 on"),
    ],
)
def test_what_is_wrong_is_said(folder, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    (folder / "broken.json").write_text('{"annotations": [{"question_id": 1}]}')
    with pytest.raises(ValueError, match=message):
        run(*flags)


@pytest.mark.parametrize(
    "annotations, message",
    [
        ([], "must hold an object"),
        ({}, "there is no 'annotations'"),
        ({"annotations": 5}, "'annotations' is 5; it must be a list"),
        ({"annotations": []}, "'annotations' is .*; it must not be empty"),
        ({"annotations": [5]}, "annotation 0: 5 is not an object"),
        ({"annotations": [{"question_id": "1"}]}, "annotation 0: 'question_id' is '1'"),
        ({"annotations": [{"question_id": True}]}, "annotation 0: 'question_id' is True"),
        ({"annotations": [{"question_id": 1, "answers": []}]}, "annotation 0: 'answers' is"),
        ({"annotations": [{"question_id": 1, "answers": ["x"]}]}, "annotation 0: 'x' is not"),
        ({"annotations": [{"question_id": 1, "answers": [{"answer": 5}]}]}, "'answer' is 5"),
        (
            {"annotations": [{"question_id": 1, "answers": people(("a", 1)), "answer_type": []}]},
            "annotation 0: 'answer_type' is",
        ),
        (
            {"annotations": [{"question_id": 1, "answers": people(("a", 1))}] * 2},
            "annotation 1: question 1 is annotated twice",
        ),
    ],
)
def test_wrong_annotations_are_named(annotations, message, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(annotations))
    with pytest.raises(ValueError, match=f"a.json.*{message}"):
        eval.read_annotations(str(file))


def vqa_manifest(path, *ids):
    records = []
    for number in ids:
        question = {"id": number, "question": "what?"}
        records.append({"image": "none.png", "questions": [question]})
    write_lines(path, records)


@pytest.mark.parametrize(
    "ids, message",
    [
        ((1, 2, 1), "line 3: the question 'what.' has the id 1, which another question has too"),
        ((1, "x"), "line 2: the question 'what.' has the id 'x'; for --submit"),
        ((1, None), "line 2: the question 'what.' has the id None; for --submit"),
    ],
)
def test_a_submission_needs_ids_and_says_so_before_the_model_is_loaded(ids, message, tmp_path):
    vqa_manifest(tmp_path / "vqav2_test.jsonl", *ids)
    flags = ("--task", "vqav2", "--checkpoint", "nowhere", "--data_root", tmp_path)
    submit = tmp_path / "s.json"
    with pytest.raises(ValueError, match=f"vqav2_test.jsonl, {message}"):
        run(*flags, "--split", "test", "--submit", submit)
    assert not submit.exists()


def test_questions_that_are_not_annotated_are_named_before_the_model_is_loaded(tmp_path):
    vqa_manifest(tmp_path / "vqav2_val.jsonl", 1, 2)
    annotations = [{"question_id": 1, "answers": people(("yes", 10))}]
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations}))
    flags = ("--task", "vqav2", "--checkpoint", "nowhere", "--data_root", tmp_path)
    with pytest.raises(ValueError, match="line 2: .* has the id 2, which --annotations lacks"):
        run(*flags, "--split", "val", "--annotations", tmp_path / "a.json")


@pytest.mark.parametrize("task, model", [("nlvr2", "nlvr2"), ("flickr30k", "retrieval")])
def test_rows_to_measure_on_are_never_skipped(folder, task, model, tmp_path):
    (tmp_path / "a.png").write_bytes((folder / "pictures" / "0.png").read_bytes())
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = []
    for name in ("a.png", "bad.png"):
        pair = {"images": ["a.png", name], "sentence": "x", "label": True}
        caption = {"image": name, "captions": ["x"]}
        rows.append(pair if task == "nlvr2" else caption)
    write_lines(tmp_path / f"{task}_test.jsonl", rows)
    flags = ("--task", task, "--checkpoint", folder / model, "--data_root", tmp_path)
    with pytest.raises(ValueError, match="line 2: .*bad.png.*held-out rows are never skipped"):
        run(*flags, "--split", "test")


@pytest.mark.parametrize("flag", ["--out", "--submit"])
def test_an_output_without_a_folder_is_refused_before_anything_is_loaded(flag, tmp_path):
    flags = ("--task", "vqav2", "--checkpoint", "nowhere", "--data", "demo")
    with pytest.raises(ValueError, match=f"{flag} .*x.json cannot be written: there is no folder"):
        run(*flags, flag, tmp_path / "nothing" / "x.json")
    with pytest.raises(ValueError, match=f"{flag} .* cannot be written: it is a folder"):
        run(*flags, flag, tmp_path)


def test_a_vocabulary_of_another_size_is_refused(folder, tmp_path):
    model = load_model(folder / "vqa")
    (tmp_path / "answers.json").write_text('["yes", "no"]')
    with pytest.raises(ValueError, match="has 2 answers, but the model has 12"):
        eval.load_vocabulary(str(tmp_path), model)


@pytest.mark.parametrize(
    "command", ["ask", "match", "search", "chat", "managers", "grid", "curves"]
)
def test_a_command_that_moved_says_where_it_is(command):
    script = "ask" if command in ("ask", "match", "search", "chat") else "figures"
    name = "question" if command == "ask" else command
    with pytest.raises(FlagError, match=f"`python {script}.py {name}`$"):
        run(command, "--help")


def test_unknown_flags_and_types_are_refused():
    for flags, message in (
        ("--checkpoint x", "required"),
        ("--task vqav2 --checkpoint x --k 3", "unrecognized"),
        ("--task vqav2 --checkpoint x --k_test many", "--k_test: 'many' is not a whole number"),
    ):
        with pytest.raises(FlagError, match=message):
            run(*flags.split())


def test_all_flags_are_listed(capsys):
    with pytest.raises(SystemExit):
        run("-h")
    page = capsys.readouterr().out
    for name in eval.EvalConfig.__dataclass_fields__:
        assert f"--{name} " in page


def test_one_line_a_caption_is_the_same_retrieval_set(folder, tmp_path):
    captions = [["a red circle", "a blue square"], ["a triangle"], ["one", "two"], ["yellow"]]
    grouped = []
    single = []
    for i, texts in enumerate(captions):
        image = str(folder / "pictures" / f"{i}.png")
        grouped.append({"image": image, "captions": texts})
        single += [{"image": image, "captions": [text]} for text in texts]
    write_lines(tmp_path / "flickr30k_grouped.jsonl", grouped)
    write_lines(tmp_path / "flickr30k_single.jsonl", single)
    flags = ("--task", "flickr30k", "--checkpoint", folder / "retrieval", "--data_root", tmp_path)
    run(*flags, "--split", "grouped,single", "--out", tmp_path / "out.json")
    splits = json.loads((tmp_path / "out.json").read_text())["splits"]
    assert splits["grouped"] == splits["single"]
    assert (splits["single"]["images"], splits["single"]["texts"]) == (4, 6)


def test_questions_without_answers_are_said_to_be_only_counted(folder, tmp_path, capsys):
    row = {"image": str(folder / "pictures" / "0.png"), "questions": [{"id": 1, "question": "x"}]}
    write_lines(tmp_path / "vqav2_test.jsonl", [row])
    flags = ("--task", "vqav2", "--checkpoint", folder / "vqa", "--data_root", tmp_path)
    run(*flags, "--split", "test", "--out", tmp_path / "out.json")
    assert "note: its questions have no 'answers', so they are only" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, message",
    [("x" * 300, "--out 'xxx.* cannot be written: File name too long"), ("new/", "it is a folder")],
)
def test_an_output_that_no_file_can_be_is_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--task", "vqav2", "--checkpoint", "nowhere", "--data", "demo")
    with pytest.raises(ValueError, match=message):
        run(*flags, "--out", name)
    assert not (tmp_path / "new").exists()
