"""finetune.py: its table and the losses of every task against the official ones; one process = two; every task from raw
downloads to a submission, with every kind of --init, through the command line, on tiny raw trees with real pictures."""
import json
import math

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from test_model import MT, check_gradients, close, golden, golden_model, needs, present
from test_train import free_port, join, losses, rows

import eval
import finetune
import objectives
import prepare
import scenes
import tasks
import tokenizer
import train
from model import ManagerTower, ManagerTowerConfig
from weights import CLIP, ROBERTA, expand, export_state, save_model, to_official


# ---------------------------------------------------------------- the table
@needs("manifests/resolved_configs.json")
@pytest.mark.parametrize("script,task,init,papers", [
    ("ftfpt_vqa", "vqav2", "folder", {"batch_size": 576, "warmup": 0.06}), ("ftfs_vqa", "vqav2", "unimodal", {}),
    ("ftfpt_snli", "snli_ve", "folder", {}), ("ftfpt_nlvr2", "nlvr2", "folder", {}),
    ("ftfpt_flickr", "flickr30k", "folder", {})])
def test_hyper_parameters_are_those_of_the_scripts_or_the_papers(script, task, init, papers):
    script = json.loads((MT / "manifests" / "resolved_configs.json").read_text())[script]
    names = {"epochs": "max_epoch", "warmup": "warmup_steps", "dropout": "drop_rate"}
    run, fields = finetune.recipe(task, init, "")
    ours = vars(run) | vars(ManagerTowerConfig.base(**fields))
    for name in ("batch_size", "learning_rate", "weight_decay", "lr_mult_head", "lr_mult_cross_modal", "k_test",
                 "epochs", "warmup", "dropout", "image_size", "patch_size", "max_text_len", "head_hidden_scale"):
        assert ours[name] == papers.get(name, script[names.get(name, name)]), name
    assert [run.transform] == script["train_transform_keys"] and (run.schedule, run.grad_clip) == ("linear", 0)


# ---------------------------------------------------------------- losses
@pytest.mark.parametrize("name", present("main.head_vqa", "main.head_snli", "main.head_nlvr2"))
def test_classification_losses_equal_the_official_ones(name):
    model, (inputs, out) = golden_model(name), golden(name)
    batch = {"pixels": inputs["image"], "pixels_1": inputs["image_b"], "input_ids": inputs["text_ids"],
             "attention_mask": inputs["text_masks"]}
    kind = {"vqa": "vqa", "snli": "snli_ve", "nlvr2": "nlvr2"}[name.removeprefix("main.head_")]
    if kind == "vqa":
        batch["targets"] = out["vqa_targets"]
    else:
        batch["label"] = torch.tensor([2, 0, 1]) if kind == "snli_ve" else out["nlvr2_labels"]
    task = objectives.Classification(model, kind)
    loss = task(batch)[kind] / task.counts(batch)[kind]
    close(loss, out["total_loss"], 1e-5)
    loss.backward()
    check_gradients(model, out, "grad.", 5e-5)


@pytest.mark.parametrize("name", present("eqdim.head_irtr_itm_itc", "eqdim.head_irtr_itm_itc_bt"))
def test_retrieval_loss_equals_the_official_one(name, monkeypatch):
    model, (inputs, out) = golden_model(name), golden(name)
    monkeypatch.setattr(train, "draw_negatives", lambda weights, generator: out["multinomial_choices"])
    batch = {"pixels": inputs["image"], "input_ids": inputs["text_ids"], "attention_mask": inputs["text_masks"],
             "image_index": torch.tensor([4, 9, 4, 2])}
    task = objectives.Retrieval(model)
    sums, counts = task(batch), task.counts(batch)
    close(sums["itc"] / counts["itc"], out["itc_loss"], 1e-5)
    close(sums["itm"] / counts["itm"], out["itm_loss"], 1e-5)
    sum(sums[k] / counts[k] for k in sums).backward()
    check_gradients(model, out, "grad.", 5e-5)


@pytest.mark.parametrize("name", present("main.head_irtr_itm"))
def test_rank_loss_equals_the_official_one(name):
    model, (inputs, out) = golden_model(name), golden(name)
    texts = ["text", *(f"false_text_{i}" for i in range(2))]
    ids, mask = (torch.stack([inputs[f"{text}_{what}"] for text in texts], 1) for what in ("ids", "masks"))
    close(objectives.rank_loss(model, inputs["image"], ids, mask), out["irtr_loss"], 1e-5)


# ---------------------------------------------------------------- from raw downloads to submissions
def scenes(folder, names):
    """Real pictures under the published names: demo scenes."""
    source = scenes.demo_source("captions", "train", len(names))
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
        scenes(root / folder, [f"COCO_{folder}_{i:012d}.jpg" for i in range(size)])
        questions = [{"image_id": i, "question_id": 10 * i + q, "question": f"what color is thing {q}?"}
                     for i in range(size) for q in range(3)]
        dump(root / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
        if "test" not in split:
            words = ["red", "blue", "red", "red", "blue", "red"]
            dump(root / f"v2_mscoco_{split}_annotations.json", {"annotations": [
                {"question_id": q["question_id"], "image_id": q["image_id"], "question_type": "what color is",
                 "answer_type": "other", "multiple_choice_answer": words[q["image_id"]],
                 "answers": [{"answer": words[q["image_id"]], "answer_id": k} for k in range(10)]} for q in questions]})


def raw_nlvr2(root):
    for split in ("train", "dev", "test1"):
        rows = []
        for i in range(4):
            stem, directory = f"{split}-{i}-{i}", {"directory": i} if split == "train" else {}  # as published
            folder = "/".join(["images", split, *map(str, directory.values())])
            scenes(root / folder, [f"{stem}-img0.png", f"{stem}-img1.png"])
            rows += [{"sentence": f"both images have {k} dogs", "identifier": f"{stem}-{k}", "label": str(k == 0),
                      **directory} for k in range(2)]
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
            images.append({"filename": file, "filepath": folder, "split": split, "imgid": len(images),
                           "cocoid": len(images),
                           "sentences": [{"raw": f"{caption} {i}"}, {"raw": f"picture {i} of {split}"}]})
    dump(root / "karpathy" / f"dataset_{name}.json", {"images": images})


RAW = {"vqav2": raw_vqav2, "nlvr2": raw_nlvr2, "snli_ve": raw_snli_ve,
       "flickr30k": lambda root: raw_karpathy(root, "flickr30k"), "coco": lambda root: raw_karpathy(root, "coco")}
TINY = {"image_size": 32, "vision_layers": 2, "text_layers": 2, "managed_layers_text": 2, "managed_layers_image": 2}
FLAGS = ("--image_size 48 --max_text_len 16 --batch_size 4 --micro_batch_size 2 --max_steps 3 --num_workers 0 "
         "--log_every 1 --learning_rate 1e-4").split()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of all tasks' manifests, made by prepare.py from tiny raw trees."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared")
    for name, make in RAW.items():
        make(raw / name)
        prepare.main([name, "--root", str(raw / name), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = scenes.demo_tokenizer()
    torch.manual_seed(0)
    save_model(ManagerTower(ManagerTowerConfig.tiny(vocab_size=tokenizer.vocab_size, **TINY)), folder)
    tokenizer.save(folder)
    return folder


def run(name, init, out, *flags):
    finetune.main(["--task", name, "--init", str(init), "--out_dir", str(out), *FLAGS, *map(str, flags)])


@pytest.mark.parametrize("name", list(RAW))
def test_raw_files_to_metrics_and_submission(name, prepared, pretrained, tmp_path, capsys):
    out = tmp_path / "out"
    run(name, pretrained, out, "--data_root", prepared)
    said, heads = capsys.readouterr().out, "itc" if name in ("flickr30k", "coco") else name.removesuffix("av2")
    assert "held out" in said and ("rest_val is a part of val" in said) == (name == "vqav2")
    assert "heads dropped: " in said and heads in said.split("heads initialised: ")[1].splitlines()[0]
    assert len(losses(out)) == 3 and all(math.isfinite(x) for x in losses(out))
    state = load_file(out / "model.safetensors")
    assert state["image_encoder.position_embedding"].shape[0] == 10  # 48 / 16 squared, and one
    assert len(state["type_embedding"]) == (3 if name == "nlvr2" else 2)
    evaluation.main(["--task", name, "--checkpoint", str(out), "--data_root", str(prepared)])
    report = json.loads((out / "eval.json").read_text())["splits"]
    assert list(report) == tasks.SPLITS[name].split(",")
    metrics = report[tasks.TASKS[name]["eval_split"]]
    logged = rows(out, "eval")[-1]["eval"]["score"]
    assert logged == pytest.approx(metrics["rmean" if "rmean" in metrics else "accuracy"])
    if name == "vqav2":
        submission = tmp_path / "submission.json"
        evaluation.main(["--task", name, "--checkpoint", str(out), "--data_root", str(prepared), "--split", "test",
                         "--submit", str(submission)])
        answers = json.loads(submission.read_text())
        assert [a["question_id"] for a in answers] == [10 * i + q for i in range(3) for q in range(3)]
        assert {a["answer"] for a in answers} <= {"red", "blue"}


TWO = ("vqav2", "nlvr2", "flickr30k")  # the two others differ in their data alone
STILL = ("--dropout", 0, "--manager_noise", "false", "--warmup", 0, "--learning_rate", 1e-3)


def in_two(rank, port, prepared, pretrained, out):
    join(rank, port)
    for name in TWO:
        run(name, pretrained, out / name, "--data_root", prepared, *STILL)


def test_two_processes_equal_one(prepared, pretrained, tmp_path):
    """Hard negatives are those of one micro-batch of 4 in one process, or of 2 x 2."""
    torch.multiprocessing.spawn(in_two, (free_port(), prepared, pretrained, tmp_path / "two"), nprocs=2)
    for name in TWO:
        run(name, pretrained, tmp_path / "one" / name, "--data_root", prepared, *STILL, "--micro_batch_size", 4)
        one, two = (losses(tmp_path / folder / name) for folder in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-4) and one[0] != one[2] and len(one) == 3


# ---------------------------------------------------------------- what to start from
def encoders(folder, model):
    """Files of a CLIP and of a RoBERTa with the model's encoders, and the tokenizer beside the latter."""
    for name, table in (("image", CLIP), ("text", ROBERTA)):
        encoder, prefix = getattr(model, f"{name}_encoder"), "visual." if name == "image" else ""
        (folder / name).mkdir()
        rows = expand(table, "", prefix, 2)
        state = {k: v.detach().contiguous() for k, v in export_state(encoder.state_dict(), rows).items()}
        save_file(state, folder / name / "model.safetensors")
    scenes.demo_tokenizer().save(folder / "text")
    return "--vision", folder / "image" / "model.safetensors", "--text", folder / "text" / "model.safetensors"


@pytest.mark.parametrize("init", ["folder", "unimodal", "official"])
def test_what_a_run_starts_from(init, prepared, tmp_path):
    """After one update at learning rate 0 the encoders are those that were given."""
    torch.manual_seed(1)
    sizes = {**TINY, **dict.fromkeys(("vision_width", "text_width", "hidden_size"), 64),
             **dict.fromkeys(("vision_heads", "text_heads", "num_heads"), 1)}  # the official heads have 64 channels
    model = ManagerTower(ManagerTowerConfig.tiny(vocab_size=scenes.demo_tokenizer().vocab_size, **sizes))
    given, flags = str(tmp_path / "given"), ["--max_steps", 1, "--image_size", 32]
    if init == "folder":
        save_model(model, given)
        scenes.demo_tokenizer().save(given)
    elif init == "unimodal":
        given = init
        flags += [*encoders(tmp_path, model), "--model", "tiny", *(x for k, v in sizes.items() for x in (f"--{k}", v))]
        flags += ["--vocab_size", model.config.vocab_size]
    else:
        given = f"official:{tmp_path / 'x.ckpt'}"
        torch.save({"state_dict": to_official(model.state_dict(), model.config)}, tmp_path / "x.ckpt")
        scenes.demo_tokenizer().save(tmp_path)
        flags += ["--tokenizer", tmp_path]
    run("snli_ve", given, tmp_path / "out", "--data_root", prepared, *flags)
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    kept = [k for k in theirs if "encoder" in k or (init != "unimodal" and not k.startswith("heads."))]
    assert len(kept) > 50 and all(torch.equal(ours[k], theirs[k]) for k in kept)
    assert ours["heads.snli_ve.fc.weight"].shape == (2 * 128, 128)


def test_demo_data_and_resume(pretrained, tmp_path, capsys):
    flags = ["--task", "nlvr2", "--data", "demo", "--init", str(pretrained), "--eval_size", "16", "--batch_size", "8",
             "--micro_batch_size", "8", "--max_steps", "2", "--out_dir", str(tmp_path)]
    finetune.main(flags)
    said = capsys.readouterr().out
    assert "text only" in said and "majority" in said and "eval.py --task nlvr2" in said
    finetune.main(flags)
    assert "is finished: 2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize("flags,message", [
    (["--data", "demo"], "--init"), (["--init", "x"], "--data_root"),
    (["--data", "demos", "--init", "x"], "--data demo"),
    (["--data=demo", "--init", "/nowhere"], "nowhere"), (["--data", "demo", "--init", "unimodal"], "needs --vision"),
    (["--data", "demo", "--init", "x", "--text", "y"], "has its own"),
    (["--data", "demo", "--init", "official:/nowhere.ckpt"], "give --tokenizer")])
def test_errors(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune.main(["--task", "vqav2", "--out_dir", str(tmp_path), *flags])


def test_errors_of_data_and_weights(prepared, pretrained, tmp_path):
    tokenizer.train_tokenizer(map(chr, range(0x4E00, 0x5E00)), 2000).save(tmp_path)
    (tmp_path / "x.ckpt").write_bytes(b"no")
    for init, message, flags in (
            (pretrained, "eval_split test of vqav2 has no labels", ["--eval_split", "test"]),
            (pretrained, r"has \d+ ids .* give its own with --tokenizer", ["--tokenizer", tmp_path]),
            (f"official:{tmp_path / 'x.ckpt'}", "x.ckpt is no zip", ["--tokenizer", pretrained])):
        with pytest.raises(ValueError, match=message):
            run("vqav2", init, tmp_path / "out", "--data_root", prepared, *flags)
    with pytest.raises(SystemExit):  # a flag of pre-training
        run("vqav2", pretrained, tmp_path / "out", "--data_root", prepared, "--objectives", "mlm")


# ---------------------------------------------------------------- baselines
def test_text_only_guess_in_closed_form():
    class Rows(list):
        task = "snli_ve"

        def texts(self):
            return self
    known, asked = (Rows({"text": text, "label": int(label)} for text, label in pairs.split())
                    for pairs in ("a0 a0 b2 a1", "a0 b2 b0 c1"))
    assert tasks.text_only_guess(known, asked) == {"majority": 2 / 4, "text_only": 2 / 4}


def test_chance_of_retrieval():
    class Held:
        num_images = 8
    assert tasks.baselines("captions", None, Held) == {"chance": {
        f"{d}_r{k}": value for d in ("ir", "tr") for k, value in ((1, 1 / 8), (5, 5 / 8), (10, 1.0))}}
