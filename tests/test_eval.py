"""eval.py: retrieval and figures against official numbers, metrics against values computed by hand, one process = two,
one picture = a batch, and the commands' errors."""
import json
import math

import pytest
import tokenizers
import torch
import torch.multiprocessing
from PIL import Image
from safetensors.torch import load_file
from test_model import MT, close, golden, golden_model, golden_state, meta, present
from torch.nn import functional as F

import ask
import chat
import data
import eval
import figures
import images
import llava_manager
import multigrid
import scenes
import tasks
import tokenizer
import weights
from eval import Prediction, predict, retrieval_scores
from figures import manager_statistics, visual_manager_statistics
from metrics import official_vqa_accuracy, recall
from model import ManagerTower, ManagerTowerConfig
from objectives import class_logits
from weights import load_model, save_model

FOLDER = {"vqav2": "vqa", "nlvr2": "nlvr2", "snli_ve": "snli_ve", "flickr30k": "retrieval"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of random tiny models: vqa, nlvr2, snli_ve, retrieval (ITM and ITC), itm; and nine pictures."""
    root, tokenizer = tmp_path_factory.mktemp("checkpoints"), scenes.demo_tokenizer()
    for name in ("vqa", "nlvr2", "snli_ve", "retrieval", "itm"):
        torch.manual_seed(0)
        heads = {"retrieval": ("itm", "itc"), "itm": ("mlm", "itm")}.get(name, (name,))
        model = ManagerTower(ManagerTowerConfig.tiny(
            heads=heads, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id, max_text_len=16, image_size=32,
            num_answers=len(scenes.DEMO_ANSWERS), patch_size=8, vision_width=32, vision_heads=2, text_width=32,
            text_heads=2, text_mlp_width=64, hidden_size=32, num_heads=2, num_layers=3, contrastive_size=16))
        with torch.no_grad():
            for parameter in model.parameters():  # so that outputs differ from sample to sample
                parameter += 0.2 * torch.randn_like(parameter)
        save_model(model, root / name)
        tokenizer.save(root / name)
        (root / name / "answers.json").write_text(json.dumps(scenes.DEMO_ANSWERS))
    (root / "pictures").mkdir()
    scenes = scenes.demo_source("captions", "heldout", 9)
    for i in range(9):
        scenes.images(i)[0].save(root / "pictures" / f"{i}.png")
    return root


def run(*flags):
    main([str(flag) for flag in flags])


def texts_of(tokenizer, number):
    rows = scenes.demo_source("captions", "heldout", number).texts()
    return tokenizer([row["text"] for row in rows], 16)


# ---------------------------------------------------------------- retrieval
@pytest.mark.parametrize("batch_size, memory_gb", [(64, 1), (5, 1), (7, 1e-4), (4, 0)])
@pytest.mark.parametrize("name", present("eqdim.head_irtr_itm_itc"))
def test_retrieval_equals_the_official_code(name, batch_size, memory_gb):
    tensors, case = load_file(MT / "eqdim.recall_demo.safetensors"), meta("eqdim.recall_demo")
    pixels = tensors["image_small_4x4"].repeat_interleave(8, 2).repeat_interleave(8, 3)
    scores = retrieval_scores(golden_model(name), pixels.__getitem__, 12, tensors["text_ids"], tensors["text_masks"],
                              case["k_test"], batch_size=batch_size, memory_gb=memory_gb)
    close(scores, tensors["scores_final"], 5e-6)
    metrics = recall(scores, torch.arange(24) // 2)
    for key, value in case["recall"].items():
        if key in metrics:
            assert metrics[key] == pytest.approx(value, abs=1e-6), key
    assert metrics["rmean"] == pytest.approx(case["recall"]["r_mean"], abs=1e-6)


def test_experts_are_computed_once_where_they_fit(monkeypatch):
    model, calls = ManagerTower(ManagerTowerConfig.tiny(heads=("itm", "itc"), image_size=16, patch_size=8)), []
    for kind in ("text", "image"):
        def counted(*args, kind=kind, encode=getattr(model, f"encode_{kind}")):
            calls.append((kind, len(args[0])))
            return encode(*args)
        monkeypatch.setattr(model, f"encode_{kind}", counted)
    pixels, ids = torch.randn(6, 3, 16, 16), torch.randint(5, 300, (8, 10))
    c = model.config
    of_texts = 8 * c.num_experts("text") * 10 * c.text_width * 4  # bytes of all experts
    of_images = 6 * c.num_experts("image") * ((16 // c.patch_size) ** 2 + 1) * c.vision_width * 4

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
    model, tokenizer = load_model(folder / "itm").eval(), tokenizer.load_tokenizer(folder / "itm")
    (ids, mask), pixels = texts_of(tokenizer, 4), torch.randn(3, 3, 32, 32)
    scores = retrieval_scores(model, pixels.__getitem__, 3, ids, mask, k_test=1, batch_size=5)
    assert "without an ITC head all 12 pairs are scored" in capsys.readouterr().out
    with torch.no_grad():
        one_by_one = [[model.heads["itm"](model(pixels[i : i + 1], ids[j : j + 1], mask[j : j + 1]).pooled)[0, 1]
                       for j in range(4)] for i in range(3)]
    close(scores, torch.tensor(one_by_one), 1e-5)
    with pytest.raises(ValueError, match="ITM head"):
        retrieval_scores(load_model(folder / "vqa"), pixels.__getitem__, 3, ids, mask)


def test_candidates_are_the_most_similar_ones(folder):
    model, tokenizer = load_model(folder / "retrieval").eval(), tokenizer.load_tokenizer(folder / "retrieval")
    (ids, mask), pixels = texts_of(tokenizer, 6), torch.randn(8, 3, 32, 32)
    with torch.no_grad():  # contrast takes any two batches
        texts, images = model.contrast(model.encode_text(ids, mask), model.encode_image(pixels))
        similarity = images @ texts.T  # (8, 6)
    scores = retrieval_scores(model, pixels.__getitem__, 8, ids, mask, k_test=2, texts_per_image=0, batch_size=3)
    chosen = scores > -100
    assert (chosen.sum(0) == 2).all()
    for j in range(6):
        assert set(chosen[:, j].nonzero()[:, 0].tolist()) == set(similarity[:, j].topk(2).indices.tolist())


def test_recall_by_hand():
    # two images with two captions each, and one with one
    scores = torch.tensor([[9.0, 1, 5, 2, 7], [3, 4, 8, 6, 1], [2, 5, 4, 3, 0]])
    image_index = torch.tensor([0, 0, 1, 1, 2])
    metrics = recall(scores, image_index)
    assert metrics["ir_r1"] == 3 / 5  # right for captions 0, 2, 3
    assert metrics["tr_r1"] == 2 / 3  # image 2's best caption is 1, which is image 0's
    assert metrics["ir_r5"] == metrics["tr_r5"] == metrics["tr_r10"] == 1
    assert metrics["rsum"] == pytest.approx(3 / 5 + 2 / 3 + 4)
    assert metrics["rmean"] == pytest.approx(metrics["rsum"] / 6)


# ---------------------------------------------------------------- classification
def dataset_of(folder, task, size=10):
    kind = tasks.KIND[task]
    source = scenes.demo_source(kind, "heldout", size)
    return data.PairDataset(source, tokenizer.load_tokenizer(folder / "vqa"), images.image_transform("albef", 32, False), 16,
                            answers=scenes.DEMO_ANSWERS if kind == "vqa" else None)


@pytest.mark.parametrize("task", ["vqav2", "nlvr2", "snli_ve"])
def test_predictions_do_not_depend_on_the_batch_size(folder, task):
    model, dataset = load_model(folder / FOLDER[task]), dataset_of(folder, task)
    batch = data.collate([dataset[i] for i in range(len(dataset))])
    with torch.no_grad():  # a model that prefers no class, so that its answers differ
        head = model.eval().heads[tasks.KIND[task]]
        head.fc_out.bias -= class_logits(model, tasks.KIND[task], batch).mean(0)
    model.train()
    one, many = predict(model, dataset, task, batch_size=1), predict(model, dataset, task, batch_size=7)
    assert one == many and len(one) == len(dataset) and model.training
    rows = [dataset.source[i] for i in range(len(dataset))]
    assert len({p.choice for p in one}) > 1
    if task == "vqav2":
        scores = [row["answers"].get(scenes.DEMO_ANSWERS[p.choice], 0.0) for row, p in zip(rows, one)]
        assert [p.question_id for p in one] == [row["question_id"] for row in rows]
    else:
        scores = [float(int(row["label"]) == p.choice) for row, p in zip(rows, one)]
    assert [p.score for p in one] == pytest.approx(scores)
    assert eval.evaluate(model, dataset, task)["accuracy"] == pytest.approx(sum(scores) / len(scores))


def test_soft_accuracy_by_type():
    rows = [Prediction(0, 0.3, 1, "what"), Prediction(2, 1.0, 2, "is"), Prediction(1, 0.9, 3, "what"),
            Prediction(1, 0.0, 4)]
    assert eval.accuracy(rows) == {"accuracy": pytest.approx(0.55), "count": 4,
                                         "per_question_type": {"is": 1.0, "what": pytest.approx(0.6)}}
    assert eval.accuracy([*rows, Prediction(1, None, 5)]) == {"count": 5}  # a test set


@pytest.mark.parametrize("name", present("main.head_vqa", "main.head_snli", "main.head_nlvr2"))
def test_logits_equal_the_official_ones(name):
    inputs, out = golden(name)
    batch = {"pixels": inputs["image"], "pixels_1": inputs["image_b"], "input_ids": inputs["text_ids"],
             "attention_mask": inputs["text_masks"]}
    with torch.no_grad():
        logits = class_logits(golden_model(name), name.removeprefix("main.head_").replace("snli", "snli_ve"), batch)
    close(logits, out[next(key for key in out if key.endswith("logits"))], 2e-5)


def people(*counts):
    """Ten answers from (answer, count) pairs."""
    return [{"answer": answer} for answer, count in counts for _ in range(count)]


def test_official_vqa_accuracy_by_hand():
    rows = [(1, people(("2", 1), ("3", 9)), "how many", "number"),
            (2, people(("Two", 2), ("3", 8)), "how many", "number"),
            (3, people(("the dog.", 3), ("cat", 7)), "what is", "other"),
            (4, people(("isnt", 4), ("no", 6)), "is it", "yes/no"),
            (5, people(("1,000", 10)), "how many", "number"),
            (6, people(("red", 10)), "what color", "other"),
            (7, people(("never asked", 10)), "what color", "other")]
    annotations = [dict(zip(("question_id", "answers", "question_type", "answer_type"), row)) for row in rows]
    answers = {1: "2", 2: "2", 3: "dog", 4: "isn't", 5: "1000", 6: "blue"}
    # who agrees with 1, 2, 3 others: 9/10 * 1/3 = 0.3; (2 * 1/3 + 8 * 2/3) / 10 = 0.6; (3 * 2/3 + 7) / 10 = 0.9; 4: 1
    found = official_vqa_accuracy([{"question_id": q, "answer": a} for q, a in answers.items()], annotations)
    assert found["overall"] == pytest.approx((0.3 + 0.6 + 0.9 + 1 + 1 + 0) / 6)
    by_question = {"how many": 1.9 / 3, "is it": 1, "what color": 0, "what is": 0.9}
    assert found["per_question_type"] == pytest.approx(by_question)
    assert found["per_answer_type"] == pytest.approx({"number": 1.9 / 3, "other": 0.45, "yes/no": 1.0})
    assert (found["answered"], found["questions"]) == (6, 7)
    for wrong in ([{"question_id": 1, "answer": "2"}] * 2, [{"question_id": 8, "answer": "2"}], []):
        with pytest.raises(ValueError, match="answered twice or not annotated"):
            official_vqa_accuracy(wrong, annotations)


# ---------------------------------------------------------------- the command line
def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_vqa(folder, labels: bool):
    """A VQA manifest of the nine pictures, three questions each, and the raw annotations."""
    lines, annotations = [], []
    for i, row in enumerate(scenes.demo_source("vqa", "heldout", 27).texts()[:27]):
        if i % 3 == 0:
            lines.append({"image": f"pictures/{i // 3}.png", "questions": []})
        question = {"id": 1000 - i, "question": row["text"], "question_type": row["question_type"]}
        lines[-1]["questions"].append({**question, "answers": row["answers"]} if labels else question)
        annotations.append({"question_id": 1000 - i, "answers": people((next(iter(row["answers"])), 10))})
    write_lines(folder / f"vqav2_{'val' if labels else 'test'}.jsonl", lines)
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))


def run_all(rank, world, folder, out):
    """Every task on one of `world` processes."""
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{out}/rendezvous", rank=rank, world_size=world)
    torch.set_num_threads(1)
    base = ["--data_root", folder, "--batch_size", 4]
    vqa = ["--task", "vqav2", "--checkpoint", folder / "vqa", *base]
    run(*vqa, "--split", "val", "--annotations", folder / "annotations.json", "--out", f"{out}/vqav2.json")
    run(*vqa, "--split", "test", "--submit", f"{out}/submit.json", "--out", f"{out}/test.json")
    run("--task", "flickr30k", "--checkpoint", folder / "retrieval", "--k_test", 3, *base,
        "--out", f"{out}/flickr30k.json")
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_equal_one(folder, tmp_path):
    for labels in (True, False):
        write_vqa(folder, labels)
    write_lines(folder / "flickr30k_test.jsonl", [
        {"image": f"pictures/{i}.png", "captions": [f"a red circle {i}", f"{i} blue squares"]} for i in range(9)])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run_all(0, 1, folder, tmp_path / "one")
    torch.multiprocessing.spawn(run_all, (2, folder, tmp_path / "two"), nprocs=2)
    for file in ("vqav2.json", "test.json", "submit.json", "flickr30k.json"):
        assert (tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text(), file
    submission = json.loads((tmp_path / "two" / "submit.json").read_text())
    assert [row["question_id"] for row in submission] == [1000 - i for i in range(27)]
    assert all(set(row) == {"question_id", "answer"} and row["answer"] in scenes.DEMO_ANSWERS for row in submission)
    report = json.loads((tmp_path / "two" / "vqav2.json").read_text())["splits"]["val"]
    assert report["official"]["overall"] == pytest.approx(report["accuracy"])  # all ten agree, so both are 0 or 1
    assert report["count"] == 27 and report["per_question_type"]
    assert json.loads((tmp_path / "two" / "test.json").read_text())["splits"]["test"] == {"count": 27}


def test_a_question_alone_is_answered_as_in_a_batch(folder, capsys):
    dataset, model = dataset_of(folder, "vqav2"), load_model(folder / "vqa")
    rows, predictions = [dataset.source[i] for i in range(9)], predict(model, dataset, "vqav2", batch_size=9)
    for row, prediction in zip(rows, predictions):
        row["images"][0].save(folder / "one.png")
        found = ask.ask(str(folder / "vqa"), str(folder / "one.png"), row["text"], top=4)
        assert found[0][0] == scenes.DEMO_ANSWERS[prediction.choice]
        assert sorted((p for _, p in found), reverse=True) == [p for _, p in found] and len(found) == 4
    assert capsys.readouterr().out.count("%") == 36
    ask.ask(str(folder / "vqa"), str(folder / "one.png"), "is there a red circle " * 9)
    assert "was cut to the model's text length 16" in capsys.readouterr().out


def test_unusual_pictures(folder, tmp_path):
    """16-bit, CMYK and animated pictures give the answer of their plain 8-bit form."""
    gray = Image.linear_gradient("L").resize((40, 30))
    gray.save(tmp_path / "plain.png")
    gray.convert("I").point(lambda v: v * 257).convert("I;16").save(tmp_path / "sixteen.png")
    Image.new("RGB", (40, 30), (200, 30, 90)).save(tmp_path / "flat.png")
    Image.new("CMYK", (40, 30), (55, 225, 165, 0)).save(tmp_path / "cmyk.tiff")
    frames = Image.new("RGB", (40, 30), (200, 30, 90)), Image.new("RGB", (40, 30), "blue")
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    answers = {p.stem: ask.ask(str(folder / "vqa"), str(p), "is there a circle?") for p in tmp_path.iterdir()}
    for name, plain in (("sixteen", "plain"), ("cmyk", "flat"), ("moving", "flat")):
        assert [a for a, _ in answers[name]] == [a for a, _ in answers[plain]]
        assert [p for _, p in answers[name]] == pytest.approx([p for _, p in answers[plain]], abs=1e-3)


def test_match_and_search(folder, tmp_path, capsys):
    checkpoint = str(folder / "retrieval")
    texts = ["a red circle", "two blue squares"]
    together = ask.match(checkpoint, str(folder / "pictures" / "0.png"), texts)
    for text, (_, itm, itc) in zip(texts, together):
        (_, alone, alone_itc), = ask.match(checkpoint, str(folder / "pictures" / "0.png"), [text])
        assert (alone, alone_itc) == pytest.approx((itm, itc), abs=1e-5) and 0 < itm < 1 and -1 <= itc <= 1
    assert math.isnan(ask.match(str(folder / "itm"), str(folder / "pictures" / "0.png"), texts)[0][2])
    (folder / "pictures" / "broken.png").write_text("no picture")
    sheet = tmp_path / "sheet.png"
    found = ask.search(checkpoint, texts[0], str(folder / "pictures"), 5, str(sheet), batch_size=4)
    (folder / "pictures" / "broken.png").unlink()
    assert "left out" in capsys.readouterr().out
    assert Image.open(sheet).size == (4 * 224, 2 * 240)
    model, batches = load_model(checkpoint).eval(), {}
    for file in (folder / "pictures").iterdir():
        batches[file] = ask.open_picture(checkpoint, "itm", str(file), texts[:1], "cpu")[1]
    with torch.no_grad():
        logits = {file: model.heads["itm"](model(**batch).pooled)[0, 1].item() for file, batch in batches.items()}
    assert [file for _, file in found] == sorted(logits, key=logits.get, reverse=True)[:5]
    assert [score for score, _ in found] == pytest.approx(sorted(logits.values(), reverse=True)[:5], abs=1e-5)


@pytest.mark.parametrize("flags, message", [
    (("frobnicate",), "no command 'frobnicate'"),
    (("--task", "gqa", "--checkpoint", "vqa"), "--task is one of vqav2, nlvr2"),
    (("--task", "vqav2", "--checkpoint", "vqa"), "either --data demo or --data_root"),
    (("--task", "vqav2", "--checkpoint", "nowhere", "--data", "demo"), "does not exist"),
    (("--task", "vqav2", "--checkpoint", "pictures", "--data", "demo"), "no checkpoint folder of ours"),
    (("--task", "vqav2", "--checkpoint", "nlvr2", "--data", "demo"), "has no vqa head, only nlvr2"),
    (("--task", "nlvr2", "--checkpoint", "nlvr2", "--data", "demo", "--submit", "x"), "are for vqav2"),
    (("--task", "vqav2", "--checkpoint", "vqa", "--data", "demo", "--annotations", "x"), "is not VQA's"),
    (("grid", "--image", "pictures/0.png", "--out", "nowhere/x.png"), "cannot be written"),
    (("ask", "--checkpoint", "vqa", "--image", "nowhere.png", "--question", "q"), "nowhere.png: no such file"),
    (("ask", "--checkpoint", "vqa", "--image", "vqa/config.json", "--question", "q"), "not a readable image"),
    (("ask", "--checkpoint", "vqa", "--image", "pictures/0.png", "--question", " "), "the text is empty"),
    (("ask", "--checkpoint", "itm", "--image", "pictures/0.png", "--question", "q"), "has no vqa head"),
    (("search", "--checkpoint", "itm", "--folder", "vqa", "--text", "q"), "no readable picture in vqa"),
    (("chat", "--checkpoint", "vqa", "--question", "q"), "not a LLaVA-OV-Manager"),
    (("curves", "--run", "vqa"), "vqa has no log.jsonl"),
])
def test_what_is_wrong_is_said(folder, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        run(*flags)


def test_unknown_flags_and_types_are_refused(capsys):
    for flags, message in (("ask --colour x", "required"), ("--task vqav2 --checkpoint x --k 3", "unrecognized"),
                           ("--task vqav2 --checkpoint x --k_test many", "invalid int value")):
        with pytest.raises(SystemExit):
            main(flags.split())
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
    """Mean weights from the official controller scores, similarities from the official modules' outputs."""
    model, (inputs, out), state = golden_model(name), golden(name), golden_state(name)
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
            if f"infer.manager.{m}.{i}.controller_out" in out:
                scores = out[f"infer.manager.{m}.{i}.controller_out"]  # (B, L, N)
                weights = torch.softmax(scores / manager.temperature, -1)
                weights = (weights[mask] if m == "text" else weights.flatten(0, 1)).mean(0)
                assert stats[m]["weights"][i] == pytest.approx(weights.tolist(), abs=1e-5)
        unimodal, cross = zip(*(official_parts(out, state, m, i) for i in range(3)))
        for key, parts in (("cosine_unimodal", unimodal), ("cosine_cross_modal", cross[1:])):
            pairs = [F.cosine_similarity(a, b, dim=-1) for a, b in zip(parts, parts[1:])]
            expected = [(p[mask] if m == "text" else p).mean().item() for p in pairs]
            assert stats[m][key] == pytest.approx(expected, abs=2e-5)


def official_parts(out, state, modality, i):
    """Manager i's output without and with only the part of the previous cross-modal layer, W_C * LN(C)."""
    prefix, whole = f"cross_modal_{modality}_manager_tower.{i}.manager_layer", out[f"infer.manager.{modality}.{i}.out"]
    if i == 0:
        return whole, torch.zeros_like(whole)
    n = {"text": 4, "image": 3}[modality]
    scores = state.get(f"{prefix}.layer_scores_cross", state.get(f"{prefix}.layer_scores"))[0, -1]  # (1, D or 1)
    norm = [state[f"{prefix}.LayerNorm.{n}.{p}"] for p in ("weight", "bias")]
    cross = scores * F.layer_norm(out[f"infer.cross.{modality}.layer.{i - 1}"], whole.shape[-1:], *norm, 1e-5)
    return whole - cross, cross


def test_manager_figure(folder, tmp_path):
    stats = figures.managers(str(folder / "vqa"), "demo", limit=8, out=str(tmp_path / "figure.png"))
    assert json.loads((tmp_path / "figure.json").read_text()) == stats
    assert Image.open(tmp_path / "figure.png").size == (1650, 1260)
    with pytest.raises(ValueError, match="has no managers"):
        manager_statistics(ManagerTower(ManagerTowerConfig.tiny(fusion="last")), [])


def test_curves_of_runs(tmp_path):
    rows = [{"step": 1, "loss": 3.0, "lr": 0.1}, {"step": 2, "loss": 1.5, "lr": 0.0}, {"baseline": {"accuracy": 0.1}},
            {"step": 2, "eval": {"accuracy": 0.5, "per_type": {"color": 0.4}, "score": 0.5}}]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = figures.curves([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "curves.png"))
    assert found["losses"] == {"a": ([1, 2], [3.0, 1.5]), "b": ([1, 2], [3.0, 1.5])}
    assert found["metrics"] == {"a: accuracy": ([2], [0.5]), "b: accuracy": ([2], [0.5])}
    assert Image.open(tmp_path / "curves.png").size == (1650, 630)


# ---------------------------------------------------------------- LLaVA-OV-Manager
@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    """Folders of tiny models with static and with adaptive managers, and a picture."""
    root, backend = tmp_path_factory.mktemp("mllm"), scenes.demo_tokenizer().backend
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    tokenizer = tokenizer.Tokenizer(backend)
    for kind in ("static", "adaptive_last"):
        torch.manual_seed(0)
        config = llava_manager.LlavaManagerConfig.tiny(manager_type=kind, vocab_size=tokenizer.vocab_size, eos_ids=(),
                                                       im_start_id=backend.token_to_id("<|im_start|>"))
        model = llava_manager.LlavaManager(config)
        for manager in model.managers:
            torch.nn.init.normal_(manager.scores if hasattr(manager, "scores") else manager.gate)
        weights.save_model(model, root / kind)
        tokenizer.save(root / kind)
    scenes.demo_source("captions", "heldout", 1).images(0)[0].save(root / "a.png")
    return root


def test_chat(mllm, monkeypatch, capsys):
    model, tokenizer = weights.load_model(mllm / "static").eval(), tokenizer.load_tokenizer(mllm / "static")
    assert not weights.load_mllm(str(mllm / "static"))[0].training  # managers are noisy in training
    image = multigrid.preprocess_image(Image.open(mllm / "a.png"), model.config)

    def expected(turns):
        ids = chat.encode_prompt(turns, tokenizer, 1)
        return tokenizer.decode(model.generate(torch.tensor([ids]), images=[image], max_new_tokens=4)[0]).strip()

    answer = expected(["is there a red circle?"])
    flags = "chat", "--checkpoint", mllm / "static", "--image", mllm / "a.png", "--max_new_tokens", 4
    run(*flags, "--question", "is there a red circle?")
    assert capsys.readouterr().out == answer + "\n"
    lines = iter(["is there a red circle?", "where is it?"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, ""))
    run(*flags)
    second = expected(["is there a red circle?", answer, "where is it?"])
    assert capsys.readouterr().out == f"{answer}\n{second}\n"
    with pytest.raises(ValueError, match="the question is empty"):
        run(*flags, "--question", "")


def test_visual_manager_figure(mllm):
    model = weights.load_model(mllm / "static")
    stats = figures.managers(str(mllm / "static"))
    for k, manager in enumerate(model.managers):
        assert stats["weights"][k] == pytest.approx(manager.scores.mean(1).tolist(), abs=1e-6)
        assert stats["magnitudes"][k] == pytest.approx(manager.scores.abs().mean(1).tolist(), abs=1e-6)
    assert Image.open(mllm / "static" / "managers.png").size == (1650, 630)
    with pytest.raises(ValueError, match="adaptive managers need pictures"):
        figures.managers(str(mllm / "adaptive_last"))
    figures.managers(str(mllm / "adaptive_last"), image=[str(mllm / "a.png")])
    model, tokenizer = weights.load_model(mllm / "adaptive_last"), tokenizer.load_tokenizer(mllm / "adaptive_last")
    prompts = [ask.encode_turns(model, tokenizer, ["what is it?"], [str(mllm / "a.png")])]
    once, last = visual_manager_statistics(model, prompts), model.managers[-1]
    with torch.no_grad():
        last.gate *= 2  # nothing before the last manager depends on it
    twice = visual_manager_statistics(model, prompts)
    assert twice["weights"][0] == once["weights"][0] and max(once["magnitudes"][-1]) > 0
    assert twice["weights"][-1] == pytest.approx([2 * w for w in once["weights"][-1]], rel=1e-5)


def test_grid(tmp_path, mllm):
    Image.new("RGB", (1000, 620), (90, 160, 220)).save(tmp_path / "wide.png")
    info = figures.grid(str(tmp_path / "wide.png"), out=str(tmp_path / "grid.png"))
    # 3 x 2 tiles of 27 x 27 patches; 81 * 620 / 1000 = 50.22 rows of patches are no padding; 729 + 50 * (81 + 1) tokens
    assert info == {"picture": (1000, 620), "tiles": (7,), "tokens of the base tile": (729,), "grid of tiles": (3, 2),
                    "patches without padding": (81, 50), "tokens of the grid, with newlines": (82, 50),
                    "tokens": (4829,)}
    drawn = Image.open(tmp_path / "grid.png")
    assert [drawn.getpixel((8, 8)), drawn.getpixel((500, 400)), drawn.getpixel((500, 12))] == [
        (90, 160, 220), (90, 160, 220), (110, 0, 0)]
    assert figures.grid(str(mllm / "a.png"), str(mllm / "static"), str(tmp_path / "grid.png"))["tiles"] == (5,)
