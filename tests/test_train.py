"""train.py: objectives, groups, schedule and optimizer against the official numbers; one process = two = accumulation;
resumed = uninterrupted, whatever the moment of death; bad input in one sentence."""
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from conftest import ROOT
from safetensors.torch import load_file
from test_model import MT, check_gradients, close, golden, golden_model, meta, present
from torch.nn import functional as F

import data
import images
import loop
import objectives
import scenes
import tokenizer
import train
from loop import lr_multiplier, param_groups
from model import ManagerTower, ManagerTowerConfig
from objectives import contrastive_logits, itc_loss, negative_weights
from train import TrainConfig
from weights import to_official
from world import World



@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a small run on real files: 112 scenes for 14 steps of 8, and 8 that are held out."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, name, size in (("train", "train", 112), ("val", "heldout", 8)):
        source, rows = scenes.demo_source("captions", name, size, image_size=16), []
        for i, row in enumerate(source.texts()):
            source.images(i)[0].save(folder / f"{split}{i}.png")
            rows.append({"image": f"{split}{i}.png", "captions": [row["text"]]})
        (folder / f"coco_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*SMALL, "--data_root", str(folder), "--datasets", "coco"]








# ---------------------------------------------------------------- objectives


def experts(model, inputs):
    return model.encode_text(inputs["text_ids"], inputs["text_masks"]), model.encode_image(inputs["image"])


def same_pairs(case, size):
    index = torch.tensor([4, 9, 4, 2]) if "irtr" in case else torch.arange(size)
    return (index[:, None] == index).float()


@pytest.mark.parametrize("name", present(
    "eqdim.head_mlm_itm_itc", "eqdim.head_irtr_itm_itc", "eqdim.head_mlm_itmitc_pretrain", "eqdim.head_irtr_itm_itc_bt",
    "eqdim.head_mlm_itm_itc_bt"))
def test_contrastive_objectives(name, monkeypatch):
    model, (inputs, out) = golden_model(name), golden(name)
    text, image = experts(model, inputs)
    for ours, key in zip(model.contrast(text, image), ("text", "image"), strict=True):
        close(ours, out[f"unimodal_feats_{key}"], 1e-5)
    logits, logits_t = contrastive_logits(model, text, image)
    close(logits, out["itc_logits_t2i"], 5e-5)
    close(logits_t, out["itc_logits_i2t"], 5e-5)
    same, rows_ = same_pairs(name, 4), slice(0, 4)
    itc = itc_loss(logits, logits_t, same, rows_) / 4
    close(itc, out["itc_loss"], 1e-5)
    loss = itc
    if "multinomial_weights" in out:
        weights = torch.cat([negative_weights(logits, same), negative_weights(logits_t, same)])
        close(weights, out["multinomial_weights"], 1e-5)
        monkeypatch.setattr(train, "draw_negatives", lambda weights, generator: out["multinomial_choices"])
        itm, labels = objectives.hard_negative_itm(model, text, image, inputs["text_masks"], (logits, logits_t), same, rows_)
        close(itm, out["itm_logits"], 2e-5)
        assert torch.equal(labels, out["itm_labels"])
        close(F.cross_entropy(itm, labels), out["itm_loss"], 1e-5)
        loss = loss + F.cross_entropy(itm, labels)
    else:
        match = out["itm_labels"].long()
        images = torch.where(match[:, None, None, None] == 1, inputs["image"], inputs["image_b"])
        pooled = model(images, inputs["text_ids"], inputs["text_masks"]).pooled
        itm = F.cross_entropy(model.heads["itm"](pooled), match)
        close(itm, out["itm_loss"], 1e-5)
        loss = loss + itm
    if "mlm_labels" in out:
        logits = model.heads["mlm"](model(inputs["image"], out["mlm_ids"], inputs["text_masks"]).text)
        loss = loss + F.cross_entropy(logits.flatten(0, 1), out["mlm_labels"].flatten())
    close(loss, out["total_loss"], 2e-5)
    loss.backward()
    check_gradients(model, out, "grad.", 5e-5)


def test_temperature_is_clamped_in_place():
    name = present("eqdim.head_mlm_itm_itc", "eqdim.head_irtr_itm_itc")[0]
    model, (inputs, _) = golden_model(name), golden(name)
    for before, after in ((0.8, 0.5), (1e-5, 0.001)):
        model.heads["itc"].temperature.data.fill_(before)
        contrastive_logits(model, *experts(model, inputs))
        assert model.heads["itc"].temperature.item() == pytest.approx(after)


def test_rows_without_negatives_draw_uniformly():
    weights = negative_weights(torch.randn(3, 3), torch.ones(3, 3))
    close(weights, torch.full((3, 3), 1e-5), 0)


def test_pretraining_task_is_the_sum_of_the_official_losses():
    """Pretraining.forward on a hand-made batch, with both ways of getting the image experts, against the bare model."""
    torch.manual_seed(0)
    model = ManagerTower(ManagerTowerConfig.tiny(manager_noise=False)).eval()
    pixels, ids, mask = torch.randn(4, 3, 64, 64), torch.randint(5, 300, (4, 24)), torch.ones(4, 24, dtype=torch.long)
    labels = torch.full((4, 24), -100)
    labels[:, 3] = ids[:, 3]
    match = torch.tensor([1, 0, 0, 1])
    batch = {"pixels": pixels, "input_ids": ids, "attention_mask": mask, "mlm_ids": ids, "mlm_labels": labels,
             "itm_labels": match, "itm_pixels": pixels[[0, 0, 3, 3]]}
    mlm = F.cross_entropy(model.heads["mlm"](model(pixels, ids, mask).text).flatten(0, 1), labels.flatten())
    itm = F.cross_entropy(model.heads["itm"](model(batch["itm_pixels"], ids, mask).pooled), match)
    for share in (False, True):
        task = objectives.Pretraining(model, ("mlm", "itm"), share_images=share)
        counts, sums = task.counts(batch), task(batch)
        close(sums["mlm"] / counts["mlm"], mlm, 1e-5)
        close(sums["itm"] / counts["itm"], itm, 1e-5)  # the partners of 1 and 2 are 0 and 3


# ---------------------------------------------------------------- optimizer


@pytest.mark.skipif(not (MT / "optim_pretrain.json").exists(), reason="this golden set has no optimizer groups")
@pytest.mark.parametrize("file,run,fields", [
    ("optim_pretrain", *train.RECIPES["pretrain"]),
    ("optim_ftfpt_vqa", TrainConfig(learning_rate=9e-6, weight_decay=0.06, lr_mult_head=50.0, lr_mult_cross_modal=5.0),
     {"heads": ("vqa",), "image_size": 576, "head_hidden_scale": 2})])
def test_groups_equal_the_official_ones(file, run, fields):
    config = ManagerTowerConfig.base(**fields)
    official = json.loads((MT / f"{file}.json").read_text())
    with torch.device("meta"):
        model = ManagerTower(config)
    names = {id(p): n for n, p in model.named_parameters()}
    ours, rates = {}, {}
    for group in param_groups(model, run):
        for p in group["params"]:
            rates[names[id(p)]] = [group["lr"], group["weight_decay"]]
    assert len(rates) == len(names)
    for name, rate in rates.items():
        ours.update(dict.fromkeys(to_official({name: model.get_parameter(name)}, config), rate))
    assert len(ours) > 800
    for name, (lr, decay) in ours.items():
        assert [lr, decay] == pytest.approx(official["param"][name], rel=1e-12), name
    for step, multiplier in official["lr_multiplier"].items():
        ours = lr_multiplier(int(step), official["max_steps"], official["warmup_steps"], "linear")
        assert ours == pytest.approx(multiplier, abs=1e-12)
    assert (run.beta2, run.weight_decay) == (0.98, official["config"]["weight_decay"])


def test_cosine_schedule():
    assert lr_multiplier(0, 100, 3, "cosine") == 0 and lr_multiplier(3, 100, 3, "cosine") == 1
    assert lr_multiplier(51, 99, 3, "cosine") == pytest.approx(0.5)
    assert lr_multiplier(99, 99, 3, "cosine") == pytest.approx(0)


def test_gradients_are_clipped_to_their_norm():
    layer, scaler = torch.nn.Linear(1, 1, bias=False), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for clip, change in ((0.0, 8.0), (0.5, 0.5), (9.0, 8.0)):
        before = layer.weight.item()
        layer(torch.tensor([[8.0]])).sum().backward()
        assert loop.apply_gradients(layer, optimizer, scaler, TrainConfig(grad_clip=clip)) == 8
        assert before - layer.weight.item() == pytest.approx(change, rel=1e-4) and layer.weight.grad is None


@pytest.mark.skipif(not (MT / "main.optim_demo.safetensors").exists(), reason="this golden set has no optimizer steps")
def test_five_optimizer_steps():
    name, stored, j = "main.head_vqa", load_file(MT / "main.optim_demo.safetensors"), meta("main.optim_demo")
    model, (inputs, out) = golden_model(name), golden(name)
    run = TrainConfig(learning_rate=2e-4, weight_decay=0.06, lr_mult_head=50.0, lr_mult_cross_modal=5.0, max_steps=10,
                      warmup=0.2)
    optimizer = loop.make_optimizer(param_groups(model, run), run, torch.device("cpu"))
    for step in range(5):
        loop.set_learning_rate(optimizer, run, step)
        rates, theirs = {g["lr"] for g in optimizer.param_groups}, set(j["group_lrs_at_each_step"][step])
        assert sorted(rates) == pytest.approx(sorted(theirs))
        logits = model.heads["vqa"](model(inputs["image"], inputs["text_ids"], inputs["text_masks"]).pooled)
        loss = F.binary_cross_entropy_with_logits(logits, out["vqa_targets"]) * logits.shape[1]
        assert loss.item() == pytest.approx(j["losses_before_each_step"][step], rel=1e-3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 4):
            ours = to_official(dict(model.named_parameters()), model.config)
            for key in (k.removeprefix("init.") for k in stored if k.startswith("init.")):
                if key in ours:
                    update = stored[f"after_step_{step + 1}.{key}"] - stored[f"init.{key}"]
                    error = (ours[key] - stored[f"init.{key}"] - update).norm()
                    assert error <= 2e-3 * update.norm(), (key, error, update.norm())


# ---------------------------------------------------------------- processes
# objectives -> micro_batch_size of one process that accumulates, and of two. MLM + ITM: 8 = 4 x 2 = 2 processes x 2 x
# 2. ITC sees one micro-batch of all processes: 8 = 2 processes x 4.
MICRO = {("mlm", "itm"): (2, 2), ("mlm", "itm", "itc"): (8, 4)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def first_gradients(world, objectives, micro, dtype):
    """Losses and gradients of a tiny model at the first step of 8 rows."""
    run = TrainConfig(batch_size=8, micro_batch_size=micro, objectives=objectives, max_steps=2)
    tokenizer = tokenizer.train_tokenizer(["a small red circle is left of a large blue square"] * 3, 400)
    config = ManagerTowerConfig.tiny(heads=objectives, manager_noise=False, vocab_size=tokenizer.vocab_size,
                                     image_size=16, patch_size=8)
    torch.manual_seed(0)
    task = objectives.Pretraining(ManagerTower(config).to(dtype), objectives)
    dataset = data.PretrainDataset(scenes.demo_source("captions", "train", 64, image_size=16), tokenizer,
                                   images.image_transform("clip", 16, True), 16, batch_size=run.batch_size)
    batches = list(loop.make_loader(dataset, run, world, 0))[: 8 // micro // world.size]
    for batch in batches:
        batch.update({k: v.to(dtype) for k, v in batch.items() if k.endswith("pixels")})
    off = torch.amp.GradScaler("cpu", enabled=False)
    means = loop.train_step(task, loop.wrap(task, run, world), batches, 0, run, world, off)
    return means, {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}






def gradients_of_two(rank, port, out):
    world = join(rank, port)
    found = {(objectives, dtype): first_gradients(world, objectives, two, dtype)
             for objectives, (_, two) in MICRO.items() for dtype in TOLERANCE}
    if rank == 0:
        torch.save(found, out)


def test_one_process_two_processes_and_accumulation_agree(tmp_path):
    torch.multiprocessing.spawn(gradients_of_two, (free_port(), tmp_path / "two.pt"), nprocs=2)
    one = World("cpu")
    for (objectives, dtype), two in torch.load(tmp_path / "two.pt").items():
        tolerance, micro = TOLERANCE[dtype], MICRO[objectives][0]
        means, whole = first_gradients(one, objectives, 8, dtype)
        for other, grads in (two, *([first_gradients(one, objectives, micro, dtype)] if micro < 8 else [])):
            assert other == pytest.approx(means, rel=tolerance) and grads.keys() == whole.keys()
            error = sum((grad - whole[name]).norm() ** 2 for name, grad in grads.items()).sqrt()
            assert error <= tolerance * sum(grad.norm() ** 2 for grad in whole.values()).sqrt()
            if dtype == torch.float64:
                assert all((grad - whole[n]).norm() <= 1e-10 * max(whole[n].norm(), 1e-3) for n, grad in grads.items())


def test_torchrun_with_two_processes_and_on_with_one(small, tmp_path, capsys):
    """14 steps of one process, of one that accumulates, and of two until they fail, on rank 0, and then of one."""
    flags = ("--max_steps 14 --eval_every 12 --save_every 5 --objectives mlm,itm --share_images false --dropout 0 "
             "--manager_noise false --out_dir").split()
    run(small, *flags, tmp_path / "one")
    run(small, *flags, tmp_path / "accumulated", "--micro_batch_size", 2)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "best").touch()  # in the way of the folder, when step 12 has been evaluated
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py",
         *small, *flags, tmp_path / "two", "--micro_batch_size", "2"], capture_output=True, text=True, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 1 and "2 x 2 processes x 2 micro-batches" in result.stdout, result.stderr
    sentence = f"error: cannot write {tmp_path / 'two' / 'best'}: File exists. The last good checkpoint, of step 10"
    assert sentence in result.stderr
    one = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(one[:12], rel=1e-4)
    (tmp_path / "two" / "best").unlink()
    capsys.readouterr()
    run(small, *flags, tmp_path / "two")
    assert "resuming after step 10, batch 8 = 8 x 1 processes" in capsys.readouterr().out
    for name in ("two", "accumulated"):
        assert losses(tmp_path / name) == pytest.approx(one, rel=1e-4) and len(one) == 14
        for ours, theirs in zip(rows(tmp_path / name, "eval"), rows(tmp_path / "one", "eval"), strict=True):
            assert ours["eval"] == pytest.approx(theirs["eval"], abs=0.13)  # one pair of eight may be a tie


# ---------------------------------------------------------------- resume
def test_killed_run_resumes_to_the_same_bits(small, tmp_path):
    flags = [*small, "--max_steps", "12", "--save_every", "3", "--eval_every", "2", "--dropout", "0.1", "--out_dir"]
    run(flags, tmp_path / "whole")
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags, tmp_path / "killed", "--num_workers", "2"],
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    log, end = tmp_path / "killed" / "log.jsonl", time.time() + 280
    while time.time() < end and not (log.exists() and len(log.read_text().splitlines()) >= 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert log.read_text().count("\n") >= 3
    run(flags, tmp_path / "killed")
    for file in ("model.safetensors", "best/model.safetensors", "log.jsonl"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes(), file


class Terminate:
    """A dataset that gets this process a SIGTERM when its 20th row is read."""

    def __init__(self, dataset):
        self.dataset, self.source, self.left = dataset, dataset.source, 20

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.dataset[key]


def test_sigterm_saves_and_the_run_goes_on(small, tmp_path, capsys, monkeypatch):
    flags = [*small, "--max_steps", "6", "--out_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        original = loop.fit
        patch.setattr(train, "fit", lambda run, task, rows, *args: original(run, task, Terminate(rows), *args))
        run(flags)
    assert "SIGTERM: saved step 3" in capsys.readouterr().out
    run(flags)
    assert [r["step"] for r in rows(tmp_path, "loss")] == [1, 2, 3, 4, 5, 6]
    run(flags)
    assert "is finished: 6 of 6 steps" in capsys.readouterr().out


def test_death_at_every_write_flush_and_rename(small, tmp_path):
    """See tests/deaths.py: it dies, or finds the disk full, at each of them in turn, and resumes to the same bits."""
    result = subprocess.run([sys.executable, ROOT / "tests" / "deaths.py", tmp_path, *small], capture_output=True,
                            text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    # two saves of 3 + 7 writes, flushes and renames, best/ with 7, 5 lines of the log; all of them in two ways
    assert int(result.stdout.split()[0]) >= 2 * (2 * (3 + 7) + 7 + 5), result.stdout


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt"])
def test_a_file_that_does_not_fit_is_one_sentence(small, tmp_path, name):
    """The system's own limit on a file's size instead of an error of ours: the libraries wrap what the disk says."""
    run(small, "--max_steps", 2, "--save_every", 1, "--out_dir", tmp_path / "whole")
    most = (tmp_path / "whole" / name).stat().st_size - 100
    command = [sys.executable, ROOT / "train.py", *small, "--max_steps", "2", "--out_dir", tmp_path / "cut"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    assert result.returncode == 1 and re.search(r"^error: cannot write .*step 0, is untouched$", result.stderr, re.M)
    assert "Traceback" not in result.stderr and not list((tmp_path / "cut").rglob("*.tmp*"))


def test_non_finite_loss_names_step_and_samples_and_keeps_the_checkpoint(small, tmp_path):
    sentence = r"not finite at step \d+.*Samples: \S+coco_train.jsonl, line \d+.*checkpoint of step \d+ is kept"
    with pytest.raises(ValueError, match=sentence):
        run(small, "--max_steps", 30, "--save_every", 1, "--learning_rate", 1e12, "--out_dir", tmp_path)
    state = torch.load(tmp_path / "training_state.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in state["model"].values())


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize("flags,message", [
    (["--batch_size", "9"], "multiple"), (["--micro_batch_size", "0"], "micro_batch_size"),
    (["--batch_size", "0"], "--batch_size 0 must be"), (["--save_every", "0"], "--save_every 0 must be"),
    (["--log_every", "-1"], "--log_every -1 must be"),
    (["--max_steps", "0"], "max_steps"), (["--precision", "fp8"], "precision"),
    (["--objectives", "mlm,itc"], "itc needs itm"), (["--fusion", "bridge", "--manager_type", "saue"], "no managers"),
    (["--micro_batch_size", "1", "--share_images", "true"], "must be even"),
    (["--vision", "x.safetensors"], "go together"), (["--hidden_size", "17"], "not a multiple"),
    (["--data_root", "/nowhere"], "nowhere")])
def test_bad_flags_are_one_sentence(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(SMALL, "--out_dir", tmp_path / "x", *flags)


@pytest.mark.parametrize("flags", [["--nonsense", "1"], ["--max_steps", "many"], ["--fresh", "maybe"],
                                   ["--recipe", "none"], ["--lr", "1"]])
def test_unknown_flags_and_wrong_types_exit(flags, capsys):
    with pytest.raises(SystemExit):
        train.main(flags)
    assert flags[0].removeprefix("--") in capsys.readouterr().err


def test_another_runs_folder_is_refused(small, tmp_path):
    flags = [*small, "--out_dir", str(tmp_path), "--max_steps"]
    run(flags, 2)
    for other, message in (((3,), "max_steps was 2, is 3"), ((2, "--mlp_ratio", 2), "another run")):
        with pytest.raises(ValueError, match=message):
            run(flags, *other)
    (tmp_path / "training_state.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable training state"):
        run(flags, 2)
    run(flags, 2, "--fresh")
    assert math.isfinite(rows(tmp_path, "eval")[-1]["eval"]["score"])


def test_log_rows_and_files_of_a_run_on_the_demo_data(tmp_path):
    run(SMALL, "--max_steps", 5, "--log_every", 2, "--eval_every", 2, "--out_dir", tmp_path)
    assert [r["step"] for r in rows(tmp_path, "loss")] == [1, 2, 4, 5]
    assert [r["step"] for r in rows(tmp_path, "eval")] == [2, 4, 5]
    assert {"loss", "lr", "step", "mlm", "itm"} <= rows(tmp_path, "loss")[0].keys()
    assert rows(tmp_path, "baselines")[0]["baselines"]["text_only"]["itm_accuracy"] == 0.5
    for folder in (tmp_path, tmp_path / "best"):
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= {f.name for f in folder.iterdir()}
    assert not list(tmp_path.rglob("*.tmp*"))


def test_precisions_and_checkpointing_run(small, tmp_path):
    for i, flags in enumerate((["--precision", "bf16"], ["--precision", "fp16"], ["--checkpointing"], [])):
        run(small, "--max_steps", 2, "--out_dir", tmp_path / str(i), *flags)
    bf16, fp16, recomputed, plain = (losses(tmp_path / str(i)) for i in range(4))
    assert bf16 == pytest.approx(plain, rel=2e-2) and fp16 == pytest.approx(plain, rel=5e-3) and recomputed == plain
