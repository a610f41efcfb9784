"""train.py: objectives, groups, schedule and optimizer against the official numbers; one process = two = accumulation;
resumed = uninterrupted, whatever the moment of death; bad input in one sentence."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from conftest import ROOT
from safetensors.torch import load_file
from test_model import MT, close, check_gradients, golden, golden_config, golden_model, meta, present
from torch.nn import functional as F

import data
import train
from model import ManagerTower, ManagerTowerConfig, to_official
from train import TrainConfig, World, contrastive_logits, itc_loss, lr_multiplier, negative_weights, param_groups

SMALL = ("--image_size 16 --patch_size 8 --vision_width 16 --vision_layers 2 --vision_heads 2 --text_width 16 --text_layers 2 --text_heads 2 "
         "--text_mlp_width 32 --hidden_size 16 --num_heads 2 --num_layers 2 --managed_layers_text 2 --managed_layers_image 2 "
         "--batch_size 8 --micro_batch_size 8 --eval_size 8 --log_every 1 --eval_every 0").split()


def run_main(*flags):
    train.main([*SMALL, *map(str, flags)])


def rows(out_dir, key):
    return [r for r in map(json.loads, (Path(out_dir) / "log.jsonl").read_text().splitlines()) if key in r]


# ---------------------------------------------------------------- objectives


def experts(model, inputs):
    return model.encode_text(inputs["text_ids"], inputs["text_masks"]), model.encode_image(inputs["image"])


def same_pairs(case, size):
    index = torch.tensor([4, 9, 4, 2]) if "irtr" in case else torch.arange(size)
    return (index[:, None] == index).float()


@pytest.mark.parametrize("name", present("eqdim.head_mlm_itm_itc", "eqdim.head_irtr_itm_itc", "eqdim.head_mlm_itmitc_pretrain",
                                         "eqdim.head_irtr_itm_itc_bt", "eqdim.head_mlm_itm_itc_bt"))
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
        close(torch.cat([negative_weights(logits, same), negative_weights(logits_t, same)]), out["multinomial_weights"], 1e-5)
        monkeypatch.setattr(train, "draw_negatives", lambda weights, generator: out["multinomial_choices"])
        itm, labels = train.hard_negative_itm(model, text, image, inputs["text_masks"], (logits, logits_t), same, rows_)
        close(itm, out["itm_logits"], 2e-5)
        assert torch.equal(labels, out["itm_labels"])
        close(F.cross_entropy(itm, labels), out["itm_loss"], 1e-5)
        loss = loss + F.cross_entropy(itm, labels)
    else:
        match = out["itm_labels"].long()
        images = torch.where(match[:, None, None, None] == 1, inputs["image"], inputs["image_b"])
        itm = F.cross_entropy(model.heads["itm"](model(images, inputs["text_ids"], inputs["text_masks"]).pooled), match)
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
    """Pretraining.forward on a hand-made batch, with its two ways of getting the image experts, against the model used directly."""
    torch.manual_seed(0)
    model = ManagerTower(ManagerTowerConfig.tiny(manager_noise=False)).eval()
    pixels, ids, mask = torch.randn(4, 3, 64, 64), torch.randint(5, 300, (4, 24)), torch.ones(4, 24, dtype=torch.long)
    labels = torch.full((4, 24), -100)
    labels[:, 3] = ids[:, 3]
    match = torch.tensor([1, 0, 0, 1])
    batch = {"pixels": pixels, "input_ids": ids, "attention_mask": mask, "mlm_ids": ids, "mlm_labels": labels, "itm_labels": match,
             "itm_pixels": pixels[[0, 0, 3, 3]]}
    mlm = F.cross_entropy(model.heads["mlm"](model(pixels, ids, mask).text).flatten(0, 1), labels.flatten())
    itm = F.cross_entropy(model.heads["itm"](model(batch["itm_pixels"], ids, mask).pooled), match)
    for share in (False, True):
        task = train.Pretraining(model, ("mlm", "itm"), share_images=share)
        counts, sums = task.counts(batch), task(batch)
        close(sums["mlm"] / counts["mlm"], mlm, 1e-5)
        close(sums["itm"] / counts["itm"], itm, 1e-5)  # the partners of 1 and 2 are 0 and 3


# ---------------------------------------------------------------- optimizer


@pytest.mark.skipif(not (MT / "optim_pretrain.json").exists(), reason="this golden set has no optimizer groups")
@pytest.mark.parametrize("file,run,config", [
    ("optim_pretrain", train.RECIPES["pretrain"][0], ManagerTowerConfig.base()),
    ("optim_ftfpt_vqa", TrainConfig(learning_rate=9e-6, weight_decay=0.06, lr_mult_head=50.0, lr_mult_cross_modal=5.0),
     ManagerTowerConfig.base(heads=("vqa",), image_size=576, head_hidden_scale=2))])
def test_groups_equal_the_official_ones(file, run, config):
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
        ours.update({k: rate for k in to_official({name: model.get_parameter(name)}, config)})
    assert len(ours) > 800
    for name, (lr, decay) in ours.items():
        assert [lr, decay] == pytest.approx(official["param"][name], rel=1e-12), name
    for step, multiplier in official["lr_multiplier"].items():
        assert lr_multiplier(int(step), official["max_steps"], official["warmup_steps"], "linear") == pytest.approx(multiplier, abs=1e-12)
    assert (run.beta2, run.weight_decay) == (0.98, official["config"]["weight_decay"])


def test_cosine_schedule():
    assert lr_multiplier(0, 100, 3, "cosine") == 0 and lr_multiplier(3, 100, 3, "cosine") == 1
    assert lr_multiplier(51, 99, 3, "cosine") == pytest.approx(0.5) and lr_multiplier(99, 99, 3, "cosine") == pytest.approx(0)


@pytest.mark.skipif(not (MT / "main.optim_demo.safetensors").exists(), reason="this golden set has no optimizer steps")
def test_five_optimizer_steps():
    name, stored, j = "main.head_vqa", load_file(MT / "main.optim_demo.safetensors"), meta("main.optim_demo")
    model, (inputs, out) = golden_model(name), golden(name)
    run = TrainConfig(learning_rate=2e-4, weight_decay=0.06, lr_mult_head=50.0, lr_mult_cross_modal=5.0, max_steps=10, warmup=0.2)
    optimizer = train.make_optimizer(param_groups(model, run), run, torch.device("cpu"))
    for step in range(5):
        train.set_learning_rate(optimizer, run, step)
        assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx(sorted(set(j["group_lrs_at_each_step"][step])))
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


def first_gradients(rank, world_size, micro, objectives, dtype, port, out):
    """Gradients of the first step of a tiny model, saved by rank 0; runs in a process of its own, or in this one."""
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = World("cpu")
    run = TrainConfig(batch_size=8, micro_batch_size=micro, objectives=objectives, max_steps=2)
    tokenizer = data.train_tokenizer(["a small red circle is left of a large blue square"] * 3, 400)
    config = ManagerTowerConfig.tiny(heads=objectives, manager_noise=False, vocab_size=tokenizer.vocab_size, image_size=16, patch_size=8)
    torch.manual_seed(0)
    model = ManagerTower(config).to(dtype)
    dataset = data.PretrainDataset(data.demo_source("captions", "train", 64, image_size=16), tokenizer,
                                   data.image_transform("clip", 16, True), 16, batch_size=run.batch_size)
    task = train.Pretraining(model, objectives)
    batches = list(train.make_loader(dataset, run, world, 0))[: 8 // micro // world_size]
    for batch in batches:
        batch.update({k: v.to(dtype) for k, v in batch.items() if k.endswith("pixels")})
    losses = train.train_step(task, train.wrap(task, run, world), batches, 0, run, world, torch.amp.GradScaler("cpu", enabled=False))
    if rank == 0:
        torch.save({"losses": losses} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, out)


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_processes(function, *args):
    port = free_port()
    torch.multiprocessing.spawn(function, (2, *args[:-1], port, args[-1]), nprocs=2)


@pytest.mark.parametrize("objectives,one,two", [(("mlm", "itm"), 2, 2), (("mlm", "itm", "itc"), 8, 4)])
def test_one_process_two_processes_and_accumulation_agree(objectives, one, two, tmp_path):
    """MLM + ITM: 8 = 4 x 2 = 2 processes x 2 x 2. ITC sees one micro-batch of all processes: 8 = 2 processes x 4."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        first_gradients(0, 1, 8, objectives, dtype, 0, tmp_path / "whole.pt")
        whole = torch.load(tmp_path / "whole.pt")
        two_processes(first_gradients, two, objectives, dtype, tmp_path / "two.pt")
        others = [torch.load(tmp_path / "two.pt")]
        if one < 8:
            first_gradients(0, 1, one, objectives, dtype, 0, tmp_path / "accumulated.pt")
            others.append(torch.load(tmp_path / "accumulated.pt"))
        for other in others:
            assert other.pop("losses") == pytest.approx(whole["losses"], rel=tolerance)
            assert other.keys() == whole.keys() - {"losses"}
            error = sum((grad - whole[name]).norm() ** 2 for name, grad in other.items()).sqrt()
            assert error <= tolerance * sum(whole[name].norm() ** 2 for name in other).sqrt()
            if dtype == torch.float64:
                assert all((grad - whole[name]).norm() <= 1e-10 * max(whole[name].norm(), 1e-3) for name, grad in other.items())


def train_worker(rank, world_size, port, flags):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run_main(*flags)


def test_twelve_steps_of_one_and_two_processes(tmp_path):
    flags = "--max_steps 12 --objectives mlm,itm --share_images false --dropout 0 --manager_noise false".split()
    run_main(*flags, "--out_dir", tmp_path / "one")
    run_main(*flags, "--out_dir", tmp_path / "accumulated", "--micro_batch_size", 2)
    torch.multiprocessing.spawn(train_worker, (2, free_port(), [*flags, "--out_dir", tmp_path / "two", "--micro_batch_size", 2]), nprocs=2)
    one = rows(tmp_path / "one", "loss")
    assert len(one) == 12
    for other in ("accumulated", "two"):
        assert [r["loss"] for r in rows(tmp_path / other, "loss")] == pytest.approx([r["loss"] for r in one], rel=1e-4)
        assert rows(tmp_path / other, "eval")[-1]["eval"] == pytest.approx(rows(tmp_path / "one", "eval")[-1]["eval"], abs=0.13)


# ---------------------------------------------------------------- resume


def test_killed_run_resumes_to_the_same_bits(tmp_path):
    flags = [*SMALL, "--max_steps", "12", "--save_every", "3", "--dropout", "0.1", "--num_workers", "2"]
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    run_main(*flags[len(SMALL):], "--out_dir", tmp_path / "whole", "--num_workers", 0)
    process = subprocess.Popen([*command, "--out_dir", str(tmp_path / "killed")], env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, end = tmp_path / "killed" / "log.jsonl", time.time() + 120
    while time.time() < end and not (log.exists() and len(log.read_text().splitlines()) >= 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run_main(*flags[len(SMALL):], "--out_dir", tmp_path / "killed", "--num_workers", 0)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    strip = [[{k: v for k, v in r.items()} for r in rows(tmp_path / name, "loss")] for name in ("whole", "killed")]
    assert strip[0] == strip[1]


def test_sigterm_saves_and_the_run_goes_on(tmp_path, capsys):
    class Terminate:
        def __init__(self, dataset):
            self.dataset, self.source, self.left = dataset, dataset.source, 20

        def __len__(self):
            return len(self.dataset)

        def __getitem__(self, key):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.dataset[key]

    original = train.fit
    try:
        train.fit = lambda run, task, dataset, *args: original(run, task, Terminate(dataset), *args)
        run_main("--max_steps", 6, "--out_dir", tmp_path)
    finally:
        train.fit = original
    assert "SIGTERM: saved step 3" in capsys.readouterr().out
    run_main("--max_steps", 6, "--out_dir", tmp_path)
    assert [r["step"] for r in rows(tmp_path, "loss")] == [1, 2, 3, 4, 5, 6]
    run_main("--max_steps", 6, "--out_dir", tmp_path)
    assert "is finished: 6 of 6 steps" in capsys.readouterr().out


def test_death_at_every_write_flush_and_rename(tmp_path):
    """See tests/deaths.py: it dies, or finds the disk full, at each of them in turn, and resumes to the same bits."""
    result = subprocess.run([sys.executable, str(ROOT / "tests" / "deaths.py"), str(tmp_path), *SMALL], capture_output=True, text=True,
                            timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "moments of death" in result.stdout


def test_non_finite_loss_names_step_and_samples_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"not finite at step \d+.*Samples: demo captions.*checkpoint of step \d+ is kept"):
        run_main("--max_steps", 30, "--save_every", 1, "--learning_rate", 1e12, "--warmup", 0.1, "--out_dir", tmp_path)
    state = torch.load(tmp_path / "training_state.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in state["model"].values())


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("flags,message", [
    (["--batch_size", "9"], "multiple"), (["--max_steps", "0"], "max_steps"), (["--precision", "fp8"], "precision"),
    (["--objectives", "mlm,itc"], "itc needs itm"), (["--fusion", "bridge", "--manager_type", "saue"], "no managers"),
    (["--vision", "x.safetensors"], "go together"), (["--hidden_size", "17"], "not a multiple"), (["--data_root", "/nowhere"], "nowhere")])
def test_bad_flags_are_one_sentence(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_main("--out_dir", tmp_path / "x", *flags)


@pytest.mark.parametrize("flags", [["--nonsense", "1"], ["--max_steps", "many"], ["--fresh", "maybe"], ["--recipe", "none"], ["--lr", "1"]])
def test_unknown_flags_and_wrong_types_exit(flags, capsys):
    with pytest.raises(SystemExit):
        train.main(flags)
    assert flags[0].removeprefix("--") in capsys.readouterr().err


def test_another_runs_folder_is_refused(tmp_path):
    run_main("--max_steps", 2, "--out_dir", tmp_path)
    for flags, message in ((("--max_steps", 3), "max_steps was 2, is 3"), (("--max_steps", 2, "--mlp_ratio", 2), "another run")):
        with pytest.raises(ValueError, match=message):
            run_main("--out_dir", tmp_path, *flags)
    (tmp_path / "training_state.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable training state"):
        run_main("--max_steps", 2, "--out_dir", tmp_path)
    run_main("--max_steps", 2, "--out_dir", tmp_path, "--fresh")
    assert math.isfinite(rows(tmp_path, "eval")[-1]["eval"]["score"])


def test_log_rows_and_files(tmp_path):
    run_main("--max_steps", 5, "--log_every", 2, "--eval_every", 2, "--out_dir", tmp_path)
    assert [r["step"] for r in rows(tmp_path, "loss")] == [1, 2, 4, 5] and [r["step"] for r in rows(tmp_path, "eval")] == [2, 4, 5]
    assert {"loss", "lr", "step", "mlm", "itm"} <= rows(tmp_path, "loss")[0].keys()
    assert rows(tmp_path, "baselines")[0]["baselines"]["text_only"]["itm_accuracy"] == 0.5
    for folder in (tmp_path, tmp_path / "best"):
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= {f.name for f in folder.iterdir()}
    assert not list(tmp_path.rglob("*.tmp*"))


def test_precisions_compile_and_checkpointing_run(tmp_path):
    for i, flags in enumerate((["--precision", "bf16"], ["--precision", "fp16"], ["--checkpointing", "true"])):
        run_main("--max_steps", 2, "--out_dir", tmp_path / str(i), *flags)
        assert math.isfinite(rows(tmp_path / str(i), "loss")[-1]["loss"])
    loss = [rows(tmp_path / str(i), "loss")[0]["loss"] for i in range(3)]
    assert loss[0] == pytest.approx(loss[2], rel=2e-2) and loss[1] == pytest.approx(loss[2], rel=5e-3)
