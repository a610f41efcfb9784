"""finetune.py: losses of every task against the official numbers, and every task from raw downloads to a submission through the
command line, on tiny raw trees with real pictures."""
import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_model import check_gradients, close, golden, golden_model, present

import data
import eval as evaluation
import finetune
import prepare
import train
from model import ManagerTower, ManagerTowerConfig, save_model

# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("name", present("main.head_vqa", "main.head_snli", "main.head_nlvr2"))
def test_classification_losses_equal_the_official_ones(name):
    model, (inputs, out) = golden_model(name), golden(name)
    batch = {"pixels": inputs["image"], "pixels_1": inputs["image_b"], "input_ids": inputs["text_ids"], "attention_mask": inputs["text_masks"]}
    kind = {"vqa": "vqa", "snli": "snli_ve", "nlvr2": "nlvr2"}[name.removeprefix("main.head_")]
    if kind == "vqa":
        batch["targets"] = out["vqa_targets"]
    else:
        batch["label"] = torch.tensor([2, 0, 1]) if kind == "snli_ve" else out["nlvr2_labels"]
    task = finetune.Classification(model, kind)
    loss = task(batch)[kind] / task.counts(batch)[kind]
    close(loss, out["total_loss"], 1e-5)
    loss.backward()
    check_gradients(model, out, "grad.", 5e-5)


@pytest.mark.parametrize("name", present("eqdim.head_irtr_itm_itc", "eqdim.head_irtr_itm_itc_bt"))
def test_retrieval_loss_equals_the_official_one(name, monkeypatch):
    model, (inputs, out) = golden_model(name), golden(name)
    if "multinomial_choices" not in out:
        pytest.skip("no recorded draws")
    monkeypatch.setattr(train, "draw_negatives", lambda weights, generator: out["multinomial_choices"])
    batch = {"pixels": inputs["image"], "input_ids": inputs["text_ids"], "attention_mask": inputs["text_masks"],
             "image_index": torch.tensor([4, 9, 4, 2])}
    task = finetune.Retrieval(model)
    losses, counts = task(batch), task.counts(batch)
    close(losses["itc"] / counts["itc"], out["itc_loss"], 1e-5)
    close(losses["itm"] / counts["itm"], out["itm_loss"], 1e-5)
    sum(losses[k] / counts[k] for k in losses).backward()
    check_gradients(model, out, "grad.", 5e-5)


@pytest.mark.parametrize("name", present("main.head_irtr_itm"))
def test_rank_loss_equals_the_official_one(name):
    model, (inputs, out) = golden_model(name), golden(name)
    texts = ["text", *(f"false_text_{i}" for i in range(2))]
    ids, mask = (torch.stack([inputs[f"{text}_{what}"] for text in texts], 1) for what in ("ids", "masks"))
    close(finetune.rank_loss(model, inputs["image"], ids, mask), out["irtr_loss"], 1e-5)


# ---------------------------------------------------------------- from raw downloads to submissions


def scenes(folder, names):
    """Real pictures under the published names: demo scenes."""
    source = data.demo_source("captions", "train", len(names))
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        source.images(i)[0].save(folder / name)
    return [row["text"] for row in source.texts()]


def dump(path, content, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content))


def raw_vqav2(root):
    for split, size in (("train2014", 6), ("val2014", 3), ("test2015", 3), ("test-dev2015", 2)):
        folder = split.replace("-dev", "")
        scenes(root, [f"{folder}/COCO_{folder}_{i:012d}.png" for i in range(size)])
        for i in range(size):  # published as .jpg
            Image.open(root / f"{folder}/COCO_{folder}_{i:012d}.png").save(root / f"{folder}/COCO_{folder}_{i:012d}.jpg")
        questions = [{"image_id": i, "question_id": 10 * i + q, "question": f"what color is thing {q}?"} for i in range(size) for q in range(3)]
        dump(root / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
        if "test" not in split:
            words = ["red", "blue", "red", "red", "blue", "red"]
            dump(root / f"v2_mscoco_{split}_annotations.json", {"annotations": [
                {"question_id": q["question_id"], "image_id": q["image_id"], "multiple_choice_answer": words[q["image_id"]],
                 "question_type": "what color is", "answer_type": "other",
                 "answers": [{"answer": words[q["image_id"]], "answer_id": k} for k in range(10)]} for q in questions]})


def raw_nlvr2(root):
    for split in ("train", "dev", "test1"):
        rows = []
        for i in range(4):
            stem, directory = f"{split}-{i}-{i}", {"directory": i} if split == "train" else {}  # only the training split has folders
            folder = "/".join(["images", split, *map(str, directory.values())])
            scenes(root / folder, [f"{stem}-img0.png", f"{stem}-img1.png"])
            rows += [{"sentence": f"both images have {k} dogs", "identifier": f"{stem}-{k}", "label": str(k == 0), **directory}
                     for k in range(2)]
        dump(root / "nlvr2" / "data" / f"{split}.json", rows, lines=True)


def raw_snli_ve(root):
    for split in ("train", "dev", "test"):
        names = [f"{split}{i}" for i in range(4)]
        scenes(root / "flickr30k-images", [f"{n}.jpg" for n in names])
        dump(root / f"snli_ve_{split}.jsonl", [
            {"Flickr30K_ID": n, "sentence1": "a premise", "sentence2": f"hypothesis {k}", "gold_label": label}
            for n in names for k, label in enumerate(("entailment", "neutral", "contradiction"))], lines=True)


def raw_karpathy(root, name):
    images, coco = [], name == "coco"
    for split in ("train", "restval", "val", "test") if coco else ("train", "val", "test"):
        for i in range(4):
            folder = ("train2014" if split == "train" else "val2014") if coco else "flickr30k-images"
            file = f"COCO_{folder}_{len(images):012d}.jpg" if coco else f"{split}{i}.jpg"
            caption = scenes(root / folder, [file])[0]
            images.append({"filename": file, "filepath": folder, "split": split, "imgid": len(images), "cocoid": len(images),
                           "sentences": [{"raw": f"{caption} {i}"}, {"raw": f"picture {i} of {split}"}]})
    dump(root / "karpathy" / f"dataset_{name}.json", {"images": images})


RAW = {"vqav2": raw_vqav2, "nlvr2": raw_nlvr2, "snli_ve": raw_snli_ve, "flickr30k": lambda root: raw_karpathy(root, "flickr30k"),
       "coco": lambda root: raw_karpathy(root, "coco")}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = data.demo_tokenizer()
    torch.manual_seed(0)
    save_model(ManagerTower(ManagerTowerConfig.tiny(vocab_size=tokenizer.vocab_size, image_size=32, vision_layers=2, text_layers=2,
                                                    managed_layers_text=2, managed_layers_image=2)), folder)
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("name", list(RAW))
def test_raw_files_to_metrics_and_submission(name, pretrained, tmp_path, capsys):
    raw, prepared, out = tmp_path / "raw", tmp_path / "prepared", tmp_path / "out"
    RAW[name](raw)
    prepare.main([name, "--root", str(raw), "--out", str(prepared)])
    flags = ["--image_size", "48", "--max_text_len", "16", "--batch_size", "4", "--micro_batch_size", "2", "--max_steps", "3", "--num_workers", "0",
             "--learning_rate", "1e-4"]
    finetune.main(["--task", name, "--data_root", str(prepared), "--init", str(pretrained), "--out_dir", str(out), *flags])
    assert "held out" in capsys.readouterr().out
    losses = [r["loss"] for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in r]
    assert losses and all(math.isfinite(x) for x in losses)
    assert load_file(out / "model.safetensors")["image_encoder.position_embedding"].shape[0] == 10  # 48 / 16 squared, and one
    split = {"vqav2": "val", "nlvr2": "dev", "snli_ve": "dev", "flickr30k": "test", "coco": "test"}[name]
    evaluation.main(["--task", name, "--checkpoint", str(out), "--data_root", str(prepared), "--split", split])
    assert (out / "eval.json").is_file()
    if name == "vqav2":
        submission = tmp_path / "submission.json"
        evaluation.main(["--task", name, "--checkpoint", str(out), "--data_root", str(prepared), "--split", "test", "--submit", str(submission)])
        rows = json.loads(submission.read_text())
        assert sorted(r["question_id"] for r in rows) == sorted(10 * i + q for i in range(3) for q in range(3))
        assert {r["answer"] for r in rows} <= {"red", "blue"}


def test_demo_data_and_resume(pretrained, tmp_path, capsys):
    flags = ["--task", "nlvr2", "--data", "demo", "--init", str(pretrained), "--eval_size", "16", "--batch_size", "8", "--micro_batch_size", "8"]
    finetune.main([*flags, "--max_steps", "2", "--out_dir", str(tmp_path / "a")])
    finetune.main([*flags, "--max_steps", "2", "--out_dir", str(tmp_path / "a")])
    said = capsys.readouterr().out
    assert "is finished: 2 of 2" in said and "text only" in said and "majority" in said


@pytest.mark.parametrize("flags,message", [
    (["--data", "demo"], "--init"), (["--init", "x"], "--data_root"), (["--data", "demo", "--init", "/nowhere"], "nowhere"),
    (["--data", "demos", "--init", "x"], "--data demo")])
def test_errors(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune.main(["--task", "vqav2", "--out_dir", str(tmp_path), *flags])


def test_text_only_guess_in_closed_form():
    class Rows(list):
        task = "snli_ve"

        def texts(self):
            return self
    known = Rows([{"text": "a", "label": 0}, {"text": "a", "label": 0}, {"text": "b", "label": 2}, {"text": "a", "label": 1}])
    asked = Rows([{"text": "a", "label": 0}, {"text": "b", "label": 2}, {"text": "b", "label": 0}, {"text": "c", "label": 1}])
    assert finetune.text_only_guess(known, asked) == {"majority": 2 / 4, "text_only": 2 / 4}
