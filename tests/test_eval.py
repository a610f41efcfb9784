"""eval.py: retrieval against the official re-ranking, metrics against values computed by hand, one process = two processes,
one picture = a batch, and the commands' errors."""
import json
import math

import pytest
import tokenizers
import torch
import torch.multiprocessing
from PIL import Image
from safetensors.torch import load_file
from test_model import MT, close, golden, golden_model, meta, present

import data
import eval as evaluation
import llava_manager
from eval import class_logits, main, manager_statistics, official_vqa_accuracy, predict, recall, retrieval_scores
from model import ManagerTower, ManagerTowerConfig, load_model, save_model

DEMO = {"vqav2": "vqa", "nlvr2": "nlvr2", "snli_ve": "snli_ve", "flickr30k": "retrieval"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of random tiny models: vqa, nlvr2, snli_ve, retrieval (ITM and ITC), itm (ITM alone), and some pictures."""
    root, tokenizer = tmp_path_factory.mktemp("checkpoints"), data.demo_tokenizer()
    for name, heads in (("vqa", ("vqa",)), ("nlvr2", ("nlvr2",)), ("snli_ve", ("snli_ve",)), ("retrieval", ("itm", "itc")),
                        ("itm", ("mlm", "itm"))):
        torch.manual_seed(0)
        model = ManagerTower(ManagerTowerConfig.tiny(
            heads=heads, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id, num_answers=len(data.DEMO_ANSWERS),
            max_text_len=16, image_size=32, vision_width=32, vision_heads=2, text_width=32, text_heads=2, text_mlp_width=64,
            hidden_size=32, num_heads=2, num_layers=3, contrastive_size=16))
        with torch.no_grad():
            for parameter in model.parameters():  # so that outputs differ from sample to sample
                parameter += 0.2 * torch.randn_like(parameter)
        save_model(model, root / name)
        tokenizer.save(root / name)
        (root / name / "answers.json").write_text(json.dumps(data.DEMO_ANSWERS))
    (root / "pictures").mkdir()
    scenes = data.demo_source("captions", "heldout", 9)
    for i in range(9):
        scenes.images(i)[0].save(root / "pictures" / f"{i}.png")
    return root


def run(*flags):
    return main([str(flag) for flag in flags])


def texts_of(tokenizer, number):
    rows = data.demo_source("captions", "heldout", number).texts()
    return tokenizer([row["text"] for row in rows], 16)


# ---------------------------------------------------------------- retrieval
@pytest.mark.parametrize("batch_size, memory_gb", [(64, 1), (5, 1), (7, 1e-4), (4, 0)])
@pytest.mark.parametrize("name", present("eqdim.head_irtr_itm_itc") if (MT / "eqdim.recall_demo.json").exists() else [])
def test_retrieval_equals_the_official_code(name, batch_size, memory_gb):
    model, tensors, case = golden_model(name), load_file(MT / "eqdim.recall_demo.safetensors"), meta("eqdim.recall_demo")
    pixels = tensors["image_small_4x4"].repeat_interleave(8, 2).repeat_interleave(8, 3)
    scores = retrieval_scores(model, pixels.__getitem__, len(pixels), tensors["text_ids"], tensors["text_masks"],
                              case["k_test"], batch_size=batch_size, memory_gb=memory_gb)
    close(scores, tensors["scores_final"], 5e-6)
    metrics = recall(scores, torch.arange(24) // 2)
    for key, value in case["recall"].items():
        if key in metrics:
            assert metrics[key] == pytest.approx(value, abs=1e-6), key
    assert metrics["rmean"] == pytest.approx(case["recall"]["r_mean"], abs=1e-6)


def test_experts_are_computed_once_where_they_fit(monkeypatch):
    model, calls = ManagerTower(ManagerTowerConfig.tiny(heads=("itm", "itc"), image_size=16)), []
    monkeypatch.setattr(model, "encode_text", lambda *a, f=model.encode_text: calls.append(("text", len(a[0]))) or f(*a))
    monkeypatch.setattr(model, "encode_image", lambda *a, f=model.encode_image: calls.append(("image", len(a[0]))) or f(*a))
    pixels, ids = torch.randn(6, 3, 16, 16), torch.randint(5, 300, (8, 10))
    of_texts, of_images = 8 * 3 * 10 * 96 * 4, 6 * 3 * 5 * 96 * 4  # bytes of all experts

    def count(budget):
        calls.clear()
        retrieval_scores(model, pixels.__getitem__, 6, ids, torch.ones_like(ids), 6, None, 3, budget / 2**30)
        return [sum(n for what, n in calls if what == kind) for kind in ("text", "image")]

    assert count(of_texts + of_images) == [8, 6]
    assert count(of_texts + of_images - 1) == [8, 12]
    texts, images = count(of_texts - 1)
    assert texts > 8 and images == 6  # what the captions left is enough for the images
    assert count(0)[1] == 12


def test_without_an_itc_head_every_pair_is_scored(folder, capsys):
    model, tokenizer = load_model(folder / "itm").eval(), data.load_tokenizer(folder / "itm")
    (ids, mask), pixels = texts_of(tokenizer, 4), torch.randn(3, 3, 32, 32)
    scores = retrieval_scores(model, pixels.__getitem__, 3, ids, mask, k_test=1, batch_size=5)
    assert "without an ITC head all 12 pairs are scored" in capsys.readouterr().out
    with torch.no_grad():
        one_by_one = [[model.heads["itm"](model(pixels[i : i + 1], ids[j : j + 1], mask[j : j + 1]).pooled)[0, 1] for j in range(4)]
                      for i in range(3)]
    close(scores, torch.tensor(one_by_one), 1e-5)
    with pytest.raises(ValueError, match="ITM head"):
        retrieval_scores(load_model(folder / "vqa"), pixels.__getitem__, 3, ids, mask)


def test_candidates_are_the_most_similar_ones(folder):
    model, tokenizer = load_model(folder / "retrieval").eval(), data.load_tokenizer(folder / "retrieval")
    (ids, mask), pixels = texts_of(tokenizer, 6), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        texts, images = model.contrast(model.encode_text(ids, mask), model.encode_image(pixels)[:6])
        texts, images = texts[:, None], model.contrast(model.encode_text(ids[:1], mask[:1]).expand(8, -1, -1, -1), model.encode_image(pixels))[1]
        similarity = (texts * images).sum(-1).T  # (8, 6)
    scores = retrieval_scores(model, pixels.__getitem__, 8, ids, mask, k_test=2, texts_per_image=0, batch_size=3)
    chosen = scores > -100
    assert (chosen.sum(0) == 2).all()
    for j in range(6):
        assert set(chosen[:, j].nonzero()[:, 0].tolist()) == set(similarity[:, j].topk(2).indices.tolist())


def test_recall_by_hand():
    # two images with two captions each, then one with one; ranks of the true pairs can be read off
    scores = torch.tensor([[9.0, 1, 5, 2, 7], [3, 4, 8, 6, 1], [2, 5, 4, 3, 0]])
    image_index = torch.tensor([0, 0, 1, 1, 2])
    metrics = recall(scores, image_index)
    assert metrics["ir_r1"] == 3 / 5  # right for captions 0, 2, 3
    assert metrics["tr_r1"] == 2 / 3  # image 2's best caption is 1, which is image 0's
    assert metrics["ir_r5"] == metrics["tr_r5"] == metrics["tr_r10"] == 1
    assert metrics["rsum"] == pytest.approx(3 / 5 + 2 / 3 + 4) and metrics["rmean"] == pytest.approx(metrics["rsum"] / 6)


# ---------------------------------------------------------------- classification
def dataset_of(folder, task, size=10):
    kind = evaluation.KIND[task]
    source = data.demo_source(kind, "heldout", size)
    return data.PairDataset(source, data.load_tokenizer(folder / DEMO[task]), data.image_transform("albef", 32, False), 16,
                            answers=data.DEMO_ANSWERS if kind == "vqa" else None)


@pytest.mark.parametrize("task", ["vqav2", "nlvr2", "snli_ve"])
def test_predictions_do_not_depend_on_the_batch_size(folder, task):
    model, dataset = load_model(folder / DEMO[task]), dataset_of(folder, task)
    model.train()
    one, many = predict(model, dataset, task, batch_size=1), predict(model, dataset, task, batch_size=7)
    assert one == many and len(one) == len(dataset) and model.training
    rows = [dataset.source[i] for i in range(len(dataset))]
    assert len({p.choice for p in one}) > 1
    if task == "vqav2":
        scores = [row["answers"].get(data.DEMO_ANSWERS[p.choice], 0.0) for row, p in zip(rows, one)]
        assert [p.question_id for p in one] == [row["question_id"] for row in rows]
    else:
        scores = [float(int(row["label"]) == p.choice) for row, p in zip(rows, one)]
    assert [p.score for p in one] == pytest.approx(scores)
    assert evaluation.evaluate(model, dataset, task)["accuracy"] == pytest.approx(sum(scores) / len(scores))


def test_soft_accuracy_by_type():
    rows = [evaluation.Prediction(0, 0.3, 1, "what"), evaluation.Prediction(2, 1.0, 2, "is"), evaluation.Prediction(1, 0.9, 3, "what"),
            evaluation.Prediction(1, 0.0, 4, None)]
    assert evaluation.accuracy(rows) == {"accuracy": pytest.approx(0.55), "count": 4,
                                         "per_question_type": {"is": 1.0, "what": pytest.approx(0.6)}}
    assert evaluation.accuracy([*rows, evaluation.Prediction(1, None, 5)]) == {"count": 5}  # a test set


def test_golden_logits_of_the_task_heads():
    for name, kind in (("vqa", "vqa"), ("snli", "snli_ve"), ("nlvr2", "nlvr2")):
        if not (MT / f"main.head_{name}.json").exists():
            continue
        inputs, out = golden(f"main.head_{name}")
        batch = {"pixels": inputs["image"], "pixels_1": inputs["image_b"], "input_ids": inputs["text_ids"],
                 "attention_mask": inputs["text_masks"]}
        with torch.no_grad():
            logits = class_logits(golden_model(f"main.head_{name}"), kind, batch)
        stored = [value for key, value in out.items() if key.endswith("logits") and value.shape == logits.shape]
        close(logits, stored[0], 2e-5)


def people(*counts):
    """Ten answers from (answer, count) pairs."""
    return [{"answer": answer} for answer, count in counts for _ in range(count)]


def test_official_vqa_accuracy_by_hand():
    annotations = [
        {"question_id": 1, "answers": people(("2", 1), ("3", 9)), "question_type": "how many", "answer_type": "number"},
        {"question_id": 2, "answers": people(("Two", 2), ("3", 8)), "question_type": "how many", "answer_type": "number"},
        {"question_id": 3, "answers": people(("the dog.", 3), ("cat", 7)), "question_type": "what is", "answer_type": "other"},
        {"question_id": 4, "answers": people(("isnt", 4), ("no", 6)), "question_type": "is it", "answer_type": "yes/no"},
        {"question_id": 5, "answers": people(("1,000", 10)), "question_type": "how many", "answer_type": "number"},
        {"question_id": 6, "answers": people(("red", 10)), "question_type": "what color", "answer_type": "other"},
        {"question_id": 7, "answers": people(("never asked", 10)), "question_type": "what color", "answer_type": "other"}]
    answers = {1: "2", 2: "2", 3: "dog", 4: "isn't", 5: "1000", 6: "blue"}
    # who agrees with 1, 2, 3 others: 9/10 * 1/3 = 0.3; (2 * 1/3 + 8 * 2/3) / 10 = 0.6; (3 * 2/3 + 7) / 10 = 0.9; 4: 1
    found = official_vqa_accuracy([{"question_id": q, "answer": a} for q, a in answers.items()], annotations)
    assert found["overall"] == pytest.approx((0.3 + 0.6 + 0.9 + 1 + 1 + 0) / 6)
    assert found["per_question_type"] == pytest.approx({"how many": 1.9 / 3, "is it": 1.0, "what color": 0.0, "what is": 0.9})
    assert found["per_answer_type"] == pytest.approx({"number": 1.9 / 3, "other": 0.45, "yes/no": 1.0})
    assert (found["answered"], found["questions"]) == (6, 7)
    for wrong in ([{"question_id": 1, "answer": "2"}] * 2, [{"question_id": 8, "answer": "2"}], []):
        with pytest.raises(ValueError, match="answered twice or not annotated"):
            official_vqa_accuracy(wrong, annotations)


# ---------------------------------------------------------------- the command line
def write_vqa(folder, labels: bool):
    """A VQA manifest of the nine pictures, three questions each, and the raw annotations."""
    lines, annotations = [], []
    for i, row in enumerate(data.demo_source("vqa", "heldout", 27).texts()[:27]):
        if i % 3 == 0:
            lines.append({"image": f"pictures/{i // 3}.png", "questions": []})
        question = {"id": 1000 - i, "question": row["text"], "question_type": row["question_type"]}
        lines[-1]["questions"].append({**question, "answers": row["answers"]} if labels else question)
        annotations.append({"question_id": 1000 - i, "answers": people((next(iter(row["answers"])), 10))})
    (folder / f"vqav2_{'val' if labels else 'test'}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))


def run_all(rank, world, folder, out):
    """Every task on one of `world` processes."""
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{out}/rendezvous", rank=rank, world_size=world)
    torch.set_num_threads(1)
    base = ["--data_root", folder, "--batch_size", "4"]
    run("--task", "vqav2", "--checkpoint", folder / "vqa", "--split", "val", "--annotations", folder / "annotations.json",
        "--out", f"{out}/vqav2.json", *base)
    run("--task", "vqav2", "--checkpoint", folder / "vqa", "--split", "test", "--submit", f"{out}/submit.json",
        "--out", f"{out}/test.json", *base)
    run("--task", "flickr30k", "--checkpoint", folder / "retrieval", "--out", f"{out}/flickr30k.json", "--k_test", "3", *base)
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_equal_one(folder, tmp_path):
    for labels in (True, False):
        write_vqa(folder, labels)
    (folder / "flickr30k_test.jsonl").write_text("".join(json.dumps(
        {"image": f"pictures/{i}.png", "captions": [f"a red circle {i}", f"{i} blue squares"]}) + "\n" for i in range(9)))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run_all(0, 1, folder, tmp_path / "one")
    torch.multiprocessing.spawn(run_all, (2, folder, tmp_path / "two"), nprocs=2)
    for file in ("vqav2.json", "test.json", "submit.json", "flickr30k.json"):
        assert (tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text(), file
    submission = json.loads((tmp_path / "two" / "submit.json").read_text())
    assert [row["question_id"] for row in submission] == [1000 - i for i in range(27)]
    assert all(set(row) == {"question_id", "answer"} and row["answer"] in data.DEMO_ANSWERS for row in submission)
    report = json.loads((tmp_path / "two" / "vqav2.json").read_text())["splits"]["val"]
    assert report["official"]["overall"] == pytest.approx(report["accuracy"])  # all ten agree, so both are 0 or 1
    assert report["count"] == 27 and report["per_question_type"]
    assert json.loads((tmp_path / "two" / "test.json").read_text())["splits"]["test"] == {"count": 27}


def test_a_question_alone_is_answered_as_in_a_batch(folder, capsys):
    dataset, model = dataset_of(folder, "vqav2"), load_model(folder / "vqa")
    rows, predictions = [dataset.source[i] for i in range(9)], predict(model, dataset, "vqav2", batch_size=9)
    for row, prediction in zip(rows, predictions):
        row["images"][0].save(folder / "one.png")
        found = evaluation.ask(str(folder / "vqa"), str(folder / "one.png"), row["text"], top=4)
        assert found[0][0] == data.DEMO_ANSWERS[prediction.choice]
        assert sorted((p for _, p in found), reverse=True) == [p for _, p in found] and len(found) == 4
    assert capsys.readouterr().out.count("%") == 36
    run("ask", "--checkpoint", folder / "vqa", "--image", folder / "one.png", "--question", "is there a red circle " * 9)
    assert "was cut to the model's text length 16" in capsys.readouterr().out


def test_unusual_pictures(folder, tmp_path):
    """16-bit, CMYK and animated pictures give the answer of their plain 8-bit form."""
    gray = Image.linear_gradient("L").resize((40, 30))
    gray.save(tmp_path / "plain.png")
    gray.convert("I").point(lambda v: v * 257).convert("I;16").save(tmp_path / "sixteen.png")
    Image.new("RGB", (40, 30), (200, 30, 90)).save(tmp_path / "flat.png")
    Image.new("CMYK", (40, 30), (55, 225, 165, 0)).save(tmp_path / "cmyk.tiff")
    Image.new("RGB", (40, 30), (200, 30, 90)).save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (40, 30), "blue")])
    answers = {p.stem: evaluation.ask(str(folder / "vqa"), str(p), "is there a circle?") for p in tmp_path.iterdir()}
    for name, plain in (("sixteen", "plain"), ("cmyk", "flat"), ("moving", "flat")):
        assert [a for a, _ in answers[name]] == [a for a, _ in answers[plain]]
        assert [p for _, p in answers[name]] == pytest.approx([p for _, p in answers[plain]], abs=1e-3)


def test_match_and_search(folder, tmp_path, capsys):
    checkpoint = str(folder / "retrieval")
    texts = ["a red circle", "two blue squares"]
    together = evaluation.match(checkpoint, str(folder / "pictures" / "0.png"), texts)
    for text, (_, itm, itc) in zip(texts, together):
        (_, alone, alone_itc), = evaluation.match(checkpoint, str(folder / "pictures" / "0.png"), [text])
        assert (alone, alone_itc) == pytest.approx((itm, itc), abs=1e-5) and 0 < itm < 1 and -1 <= itc <= 1
    assert math.isnan(evaluation.match(str(folder / "itm"), str(folder / "pictures" / "0.png"), texts)[0][2])
    (folder / "pictures" / "broken.png").write_text("no picture")
    found = evaluation.search(checkpoint, texts[0], str(folder / "pictures"), top=5, out=str(tmp_path / "sheet.png"), batch_size=4)
    (folder / "pictures" / "broken.png").unlink()
    assert "left out" in capsys.readouterr().out
    scores = [score for score, _ in found]
    probabilities = [evaluation.match(checkpoint, str(file), texts[:1])[0][1] for _, file in found]
    assert scores == sorted(scores, reverse=True) and len(found) == 5
    everything = [evaluation.match(checkpoint, str(p), texts[:1])[0][1] for p in (folder / "pictures").iterdir()]
    assert len(everything) == 9 and all(0 < p < 1 for p in probabilities)
    assert Image.open(tmp_path / "sheet.png").size == (4 * 224, 2 * 240)


@pytest.mark.parametrize("flags, message", [
    (("frobnicate",), "no command 'frobnicate'"),
    (("--task", "gqa", "--checkpoint", "vqa"), "--task is one of vqav2, nlvr2"),
    (("--task", "vqav2", "--checkpoint", "vqa"), "either --data demo or --data_root"),
    (("--task", "vqav2", "--checkpoint", "nowhere", "--data", "demo"), "does not exist"),
    (("--task", "vqav2", "--checkpoint", "pictures", "--data", "demo"), "no checkpoint folder of ours"),
    (("--task", "vqav2", "--checkpoint", "nlvr2", "--data", "demo"), "has no vqa head, only nlvr2"),
    (("--task", "nlvr2", "--checkpoint", "nlvr2", "--data", "demo", "--submit", "x"), "are for vqav2"),
    (("--task", "vqav2", "--checkpoint", "vqa", "--data", "demo", "--annotations", "x"), "is not VQA's"),
    (("--task", "vqav2", "--checkpoint", "vqa", "--data", "demo", "--out", "nowhere/x.json"), "cannot be written"),
    (("ask", "--checkpoint", "vqa", "--image", "nowhere.png", "--question", "q"), "nowhere.png: no such file"),
    (("ask", "--checkpoint", "vqa", "--image", "vqa/config.json", "--question", "q"), "not a readable image"),
    (("ask", "--checkpoint", "vqa", "--image", "pictures/0.png", "--question", " "), "the text is empty"),
    (("ask", "--checkpoint", "itm", "--image", "pictures/0.png", "--question", "q"), "has no vqa head"),
    (("search", "--checkpoint", "itm", "--folder", "vqa", "--text", "q"), "no readable picture in vqa"),
    (("chat", "--checkpoint", "vqa", "--question", "q"), "not a LLaVA-OV-Manager"),
])
def test_what_is_wrong_is_said(folder, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        run(*flags)


def test_unknown_flags_and_types_are_refused(capsys):
    for flags, message in ((["ask", "--colour", "x"], "required"), (["--task", "vqav2", "--checkpoint", "x", "--k", "3"], "unrecognized"),
                           (["--task", "vqav2", "--checkpoint", "x", "--k_test", "many"], "invalid int value")):
        with pytest.raises(SystemExit):
            main(flags)
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------- figures
class Batch(torch.utils.data.Dataset):
    """Golden inputs as a dataset."""

    def __init__(self, inputs):
        self.rows = [dict(zip(("pixels", "input_ids", "attention_mask"), row)) for row in
                     zip(inputs["image"], inputs["text_ids"], inputs["text_masks"])]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


@pytest.mark.parametrize("name", present("main.mt_aaue_vector", "main.mt_saue_vector", "main.mt_aaue_scalar"))
@pytest.mark.parametrize("batch_size", [1, 3])
def test_manager_statistics(name, batch_size):
    """Mean weights from the official controller scores; similarities from the official managers' outputs where there is no C."""
    model, (inputs, out) = golden_model(name), golden(name)
    stats, mask = manager_statistics(model, Batch(inputs), batch_size), inputs["text_masks"].bool()
    assert stats["text"]["experts"] == [2, 3, 4, 5] and stats["image"]["experts"] == [2, 3, 4]
    for m in ("text", "image"):
        layers = getattr(model, f"{m}_managers")
        assert [len(stats[m][k]) for k in ("weights", "cosine_unimodal", "cosine_cross_modal")] == [3, 2, 1]
        for i, manager in enumerate(layers):
            assert sum(stats[m]["weights"][i]) == pytest.approx(1, abs=1e-5)
            if hasattr(manager, "scores"):
                weights = torch.softmax(manager.scores[: manager.num_experts] / manager.temperature, 0).mean(-1)
                assert stats[m]["weights"][i] == pytest.approx(weights.tolist(), abs=1e-5)
    checked = 0
    for key in [k for k in out if k.startswith("infer.manager") and k.endswith("controller_out")]:
        _, _, m, i, *_ = key.split(".")
        weights = torch.softmax(out[key] / getattr(model, f"{m}_managers")[int(i)].temperature.detach(), -1)  # (B, L, N)
        weights = (weights[mask] if m == "text" else weights.flatten(0, 1)).mean(0)
        assert stats[m]["weights"][int(i)] == pytest.approx(weights.tolist(), abs=1e-5)
        checked += 1
    assert checked == (4 if "aaue" in name else 0)
