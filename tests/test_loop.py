"""loop.py: groups, schedule and optimizer against the official numbers; one process = two =
accumulation; resumed = uninterrupted, whatever the moment of death; what identifies a run; only one
run a folder."""

import functools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from helpers import (
    MT,
    ROOT,
    fork_script,
    free_port,
    golden,
    golden_model,
    join,
    log_rows,
    losses,
    meta,
    run_in_forks,
    run_script,
    run_script_in_fork,
    run_small,
    status_of,
)
from safetensors.torch import load_file
from torch.nn import functional as F

import data
import files
import images
import loop
import objectives
import scenes
import tokenizer
import train
from loop import lr_multiplier, param_groups
from model import ManagerTower, ManagerTowerConfig
from train import TrainConfig
from weights import to_official
from world import Stopped, World

# ---------------------------------------------------------------- optimizer


@pytest.mark.skipif(
    not (MT / "optim_pretrain.json").exists(), reason="this golden set has no optimizer groups"
)
@pytest.mark.parametrize(
    "file,run,fields",
    [
        ("optim_pretrain", *train.RECIPES["pretrain"]),
        (
            "optim_ftfpt_vqa",
            TrainConfig(
                learning_rate=9e-6, weight_decay=0.06, lr_mult_head=50.0, lr_mult_cross_modal=5.0
            ),
            {"heads": ("vqa",), "image_size": 576, "head_hidden_scale": 2},
        ),
    ],
)
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
        assert (
            before - layer.weight.item() == pytest.approx(change, rel=1e-4)
            and layer.weight.grad is None
        )


@pytest.mark.skipif(
    not (MT / "main.optim_demo.safetensors").exists(),
    reason="this golden set has no optimizer steps",
)
def test_five_optimizer_steps():
    name, stored, j = (
        "main.head_vqa",
        load_file(MT / "main.optim_demo.safetensors"),
        meta("main.optim_demo"),
    )
    model, (inputs, out) = golden_model(name), golden(name)
    run = TrainConfig(
        learning_rate=2e-4,
        weight_decay=0.06,
        lr_mult_head=50.0,
        lr_mult_cross_modal=5.0,
        max_steps=10,
        warmup=0.2,
    )
    optimizer = loop.make_optimizer(param_groups(model, run), run, torch.device("cpu"))
    for step in range(5):
        loop.set_learning_rate(optimizer, run, step)
        rates, theirs = (
            {g["lr"] for g in optimizer.param_groups},
            set(j["group_lrs_at_each_step"][step]),
        )
        assert sorted(rates) == pytest.approx(sorted(theirs))
        logits = model.heads["vqa"](
            model(inputs["image"], inputs["text_ids"], inputs["text_masks"]).pooled
        )
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
@functools.cache
def few_words():
    return tokenizer.train_tokenizer(["a small red circle is left of a large blue square"] * 3, 400)


def first_gradients(world, losses_of, micro, dtype, share_images=False):
    """Losses and gradients of a tiny model at the first step of 8 rows."""
    run = TrainConfig(
        batch_size=8,
        micro_batch_size=micro,
        objectives=losses_of,
        share_images=share_images,
        max_steps=2,
    )
    words = few_words()
    config = ManagerTowerConfig.tiny(
        heads=losses_of,
        manager_noise=False,
        vocab_size=words.vocab_size,
        image_size=16,
        patch_size=8,
        vision_layers=2,
        text_layers=2,
        managed_layers_text=2,
        managed_layers_image=2,
    )
    torch.manual_seed(0)
    task = objectives.Pretraining(ManagerTower(config).to(dtype), losses_of, share_images)
    dataset = data.PretrainDataset(
        scenes.demo_source("captions", "train", 64, image_size=16),
        words,
        images.image_transform("clip", 16, True),
        16,
        batch_size=run.batch_size,
        share_images=share_images or "itc" in losses_of,
    )
    micro_steps = len(loop.make_plan(run, world).sizes)
    batches = list(loop.make_loader(dataset, run, world, 0))[:micro_steps]
    for batch in batches:
        for name in batch:
            if name.endswith("pixels"):
                batch[name] = batch[name].to(dtype)
    off = torch.amp.GradScaler("cpu", enabled=False)
    means = loop.train_step(task, loop.wrap(task, run, world), batches, 0, run, world, off)
    gradients = {}
    for name, parameter in task.model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
    return means, gradients


@functools.cache
def whole_gradients(losses_of, dtype, share_images=False):
    """first_gradients of one process with the whole batch in one pass."""
    return first_gradients(World("cpu"), losses_of, 8, dtype, share_images)


def check_same(other, whole, tolerance):
    """Two results of first_gradients agree; the gradients in the norm of all together."""
    assert other[0] == pytest.approx(whole[0], rel=tolerance)
    assert other[1].keys() == whole[1].keys()
    error = sum((grad - whole[1][name]).norm() ** 2 for name, grad in other[1].items()).sqrt()
    norm = sum(grad.norm() ** 2 for grad in whole[1].values()).sqrt()
    assert error <= tolerance * norm


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# objectives, share_images, micro_batch_size of the processes: MLM + ITM also in several
# micro-steps; ITC sees one micro-step of all processes, so it must be one
CASES = [
    (("mlm", "itm"), False, 2),
    (("mlm", "itm"), True, 8),
    (("mlm", "itm", "itc"), False, 8),
]


def gradients_of_several(rank, size, port, out):
    world = join(rank, port, size)
    results = {}
    for losses_of, share, micro in CASES:
        if share and size > 4:
            continue  # there are only four pairs
        for dtype in TOLERANCE:
            results[losses_of, share, dtype] = first_gradients(
                world, losses_of, micro, dtype, share
            )
    if rank == 0:
        torch.save(results, out)


@pytest.mark.parametrize(
    "size",
    [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4, 6, 8))],
)
def test_one_process_and_several_agree(size, tmp_path):
    """Also where the batch of 8 does not divide: 3 processes take 3, 3 and 2 rows."""
    out = tmp_path / "several.pt"
    run_in_forks(gradients_of_several, size, free_port(), out, processes=size)
    results = torch.load(out)
    assert results
    for (losses_of, share, dtype), several in results.items():
        whole = whole_gradients(losses_of, dtype, share)
        check_same(several, whole, TOLERANCE[dtype])


def test_accumulation_changes_nothing():
    one = World("cpu")
    for micro in (1, 2, 3, 5):
        for dtype, tolerance in TOLERANCE.items():
            whole = whole_gradients(("mlm", "itm"), dtype)
            check_same(first_gradients(one, ("mlm", "itm"), micro, dtype), whole, tolerance)


EXACT = (
    "--objectives mlm,itm --share_images false --dropout 0 --manager_noise false --max_steps 14 "
    "--eval_every 12 --save_every 5 --out_dir"
).split()


BROKEN_DISK = f"""
import errno, sys
sys.path.insert(0, {str(ROOT)!r})
import loop, train, world

save_folder = loop.save_folder

def save_or_fail(weights, config, folder, transform):
    if folder.name == "best":
        raise OSError(errno.EIO, "Input/output error", str(folder))
    save_folder(weights, config, folder, transform)

loop.save_folder = save_or_fail
world.one_sentence(train.main)
"""


@pytest.mark.slow
def test_torchrun_with_two_processes_and_on_with_one(small, tmp_path, capsys):
    """14 steps of one process, of one that accumulates, and of two until they fail, on rank 0, and
    then of one.
    """
    run_small(small, *EXACT, tmp_path / "one")
    run_small(small, *EXACT, tmp_path / "accumulated", "--micro_batch_size", 2)
    # the disk fails when step 12 has been evaluated
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN_DISK)
    flags = [*small, *EXACT, tmp_path / "two", "--micro_batch_size", "2"]
    result = run_script(broken, *flags, processes=2)
    assert result.returncode == 1, result.stderr
    assert "2 x 2 processes x 2 micro-batches" in result.stdout
    sentence = f"error: cannot write {tmp_path / 'two' / 'best'}: Input/output error. "
    assert result.stderr.count(sentence + "The last good checkpoint, of step 10") == 1
    one = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(one[:12], rel=1e-4)
    capsys.readouterr()
    run_small(small, *EXACT, tmp_path / "two")
    assert "resuming after step 10, batch 8 = 8 x 1 processes" in capsys.readouterr().out
    assert len(one) == 14
    for name in ("two", "accumulated"):
        assert losses(tmp_path / name) == pytest.approx(one, rel=1e-4)
        ours = log_rows(tmp_path / name, "eval")
        theirs = log_rows(tmp_path / "one", "eval")
        for row, other in zip(ours, theirs, strict=True):
            assert row["eval"] == pytest.approx(
                other["eval"], abs=0.13
            )  # one pair of 8 may be a tie


@pytest.mark.slow
def test_torchrun_with_three_processes_deals_unevenly(small, tmp_path):
    run_small(small, *EXACT, tmp_path / "one")
    result = run_script("train.py", *small, *EXACT, tmp_path / "three", processes=3)
    assert result.returncode == 0, result.stderr
    assert "batch 8 = 2 to 3 rows x 3 processes x 1 micro-batches" in result.stdout
    expected = pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert losses(tmp_path / "three") == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes,flags,sentence",
    [
        (3, ("--batch_size", 2), "error: --batch_size 2 cannot be dealt to 3 processes"),
        (2, ("--learning_rate", "-1"), "error: --learning_rate is -1.0; it must be"),
        (2, ("--nonsense", "1"), "error: unrecognized arguments: --nonsense 1"),
        (
            2,
            ("--data_root", "/nowhere"),
            "error: --data_root /nowhere: there is no such folder or file",
        ),
    ],
)
def test_an_error_under_torchrun_is_said_once(processes, flags, sentence, tmp_path):
    result = run_script("train.py", "--out_dir", tmp_path / "x", *flags, processes=processes)
    assert result.returncode == 1
    assert result.stderr.count(sentence) == 1 and result.stderr.count("error: ") == 1, result.stderr
    ours = result.stderr.split("ChildFailedError")[0]
    assert "train.py" not in ours.split("Traceback")[0].replace("train.py -h", "")


# ---------------------------------------------------------------- resume
def test_killed_run_resumes_to_the_same_bits(small, tmp_path):
    exact = "--max_steps 12 --save_every 3 --eval_every 2 --dropout 0.1 --out_dir".split()
    run_small(small, *exact, tmp_path / "whole")
    flags = [*small, *exact, tmp_path / "killed", "--num_workers", "2"]
    with open(tmp_path / "said.txt", "a") as said:
        child = fork_script(ROOT / "train.py", flags, out=said, err=said)
    log = tmp_path / "killed" / "log.jsonl"
    end = time.time() + 280
    while time.time() < end and not (log.exists() and log.read_text().count("\n") >= 6):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert status_of(child) == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    assert log.read_text().count("\n") >= 4
    run_small(small, *exact, tmp_path / "killed")
    for file in ("model.safetensors", "best/model.safetensors", "log.jsonl"):
        whole = (tmp_path / "whole" / file).read_bytes()
        assert whole == (tmp_path / "killed" / file).read_bytes(), file


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
        patch.setattr(
            train, "fit", lambda run, task, rows, *args: original(run, task, Terminate(rows), *args)
        )
        with pytest.raises(Stopped):
            run_small(flags)
    said = capsys.readouterr().out
    assert f"SIGTERM: saved step 3 in {tmp_path}; the same command goes on from there." in said
    assert "held out  " not in said
    run_small(flags)
    assert [r["step"] for r in log_rows(tmp_path, "loss")] == [1, 2, 3, 4, 5, 6]
    run_small(flags)
    assert "is finished: 6 of 6 steps" in capsys.readouterr().out


ONE_LAYER = (
    "--vision_layers 1 --text_layers 1 --num_layers 1 --managed_layers_text 1 "
    "--managed_layers_image 1 --batch_size 4 --micro_batch_size 4 --eval_size 4"
).split()


def few_pictures(small, folder, number=12):
    """The first of the small run's pictures and captions, copied into folder/few."""
    whole = Path(small[small.index("--data_root") + 1])
    few = folder / "few"
    few.mkdir()
    for split in ("train", "val"):
        lines = (whole / f"coco_{split}.jsonl").read_text().splitlines()[:number]
        (few / f"coco_{split}.jsonl").write_text("".join(line + "\n" for line in lines))
        for line in lines:
            shutil.copy(whole / json.loads(line)["image"], few)
    return few


@pytest.mark.slow
def test_death_at_every_write_flush_and_rename(small, tmp_path):
    """See tests/deaths.py: it dies, or finds the disk full, at each of them in turn, and resumes to
    the same bits.
    """
    # fewer pictures and a model of fewer layers: the same files are written at the same moments
    flags = [*small, *ONE_LAYER, "--data_root", few_pictures(small, tmp_path)]
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "deaths.py", tmp_path / "runs", *flags],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    # two saves of 3 + 7 writes, flushes and renames, best/ with 7, 5 lines of the log; all of them
    # in two ways
    assert int(result.stdout.split()[0]) >= 2 * (2 * (3 + 7) + 7 + 5), result.stdout


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt"])
def test_a_file_that_does_not_fit_is_one_sentence(small, tmp_path, name):
    """The system's own limit on a file's size instead of an error of ours: the libraries wrap what
    the disk says.
    """
    run_small(small, "--max_steps", 2, "--save_every", 1, "--out_dir", tmp_path / "whole")
    most = (tmp_path / "whole" / name).stat().st_size - 100
    result = run_script_in_fork(
        "train.py",
        *small,
        *("--max_steps", 2, "--out_dir", tmp_path / "cut"),
        prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )
    assert result.returncode == 1
    assert re.search(r"^error: cannot write .*Nothing is lost$", result.stderr, re.M), result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "cut").rglob("*.tmp*"))


def test_non_finite_loss_names_step_and_samples_and_keeps_the_checkpoint(small, tmp_path):
    sentence = (
        r"not finite at step \d+.*Samples: \S+coco_train.jsonl, line \d+.*"
        r"checkpoint of step \d+ is kept"
    )
    with pytest.raises(ValueError, match=sentence):
        run_small(
            small,
            "--max_steps",
            30,
            "--save_every",
            1,
            "--learning_rate",
            1e12,
            "--out_dir",
            tmp_path,
        )
    state = torch.load(tmp_path / "training_state.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in state["model"].values())


# ---------------------------------------------------- what belongs to a run, and what does not
def test_only_the_temporary_files_of_the_project_are_removed(small, tmp_path):
    flags = [*small, "--max_steps", 2, "--out_dir", tmp_path]
    mine = ["training_state.pt.tmp123", "model.safetensors.tmp4", "best/config.json.tmp77"]
    theirs = [
        "notes.tmp",
        "notes.tmp.txt",
        "best/my.tmpfile",
        "sub/model.safetensors.tmp1",
        "x.tmp12",
    ]
    theirs += ["model.safetensors.tmp", "config.json.tmpl", "answers.json.tmp5/inside"]
    for name in (*mine, *theirs):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("precious")
    run_small(flags)
    for name in mine:
        assert not (tmp_path / name).exists(), name
    for name in theirs:
        assert (tmp_path / name).read_text() == "precious", name


def test_another_runs_folder_keeps_even_its_temporary_files(small, tmp_path):
    run_small(small, "--max_steps", 2, "--out_dir", tmp_path)
    (tmp_path / "model.safetensors.tmp9").write_text("of the other run")
    with pytest.raises(ValueError, match="holds another run"):
        run_small(small, "--max_steps", 3, "--out_dir", tmp_path)
    assert (tmp_path / "model.safetensors.tmp9").exists()


def test_a_second_run_in_the_same_folder_is_refused(small, tmp_path):
    lock = tmp_path / "run.lock"
    host = socket.gethostname()
    lock.write_text(json.dumps({"process": os.getppid(), "host": host}))
    with pytest.raises(ValueError, match=f"in use by process {os.getppid()} on {host}"):
        run_small(small, "--max_steps", 2, "--out_dir", tmp_path)
    assert lock.exists() and not (tmp_path / "training_state.pt").exists()
    # of a process that is dead, or cut short by a death: taken over
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for content in (json.dumps({"process": dead.pid, "host": host}), '{"process": 1'):
        lock.write_text(content)
        run_small(small, "--max_steps", 2, "--out_dir", tmp_path)
        assert lock.read_text() == ""


@pytest.mark.parametrize(
    "changed",
    [
        ("--on_bad_sample", "skip"),
        ("--eval_size", 4),
        ("--num_workers", 1),
        ("--micro_batch_size", 4),
        ("--log_every", 3),
        ("--checkpointing", "true"),
    ],
)
def test_what_does_not_change_the_numbers_may_change(small, tmp_path, changed, capsys):
    run_small(small, "--max_steps", 2, "--out_dir", tmp_path)
    run_small(small, "--max_steps", 2, "--out_dir", tmp_path, *changed)
    assert "is finished: 2 of 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changed",
    [("--learning_rate", 0.5), ("--seed", 1), ("--batch_size", 4), ("--transform", "albef")],
)
def test_what_changes_the_numbers_is_refused(small, tmp_path, changed):
    run_small(small, "--max_steps", 2, "--out_dir", tmp_path)
    name = changed[0].removeprefix("--")
    with pytest.raises(ValueError, match=f"holds another run .*{name} was"):
        run_small(small, "--max_steps", 2, "--out_dir", tmp_path, *changed)


def test_data_at_another_place_are_the_same_data_and_other_texts_are_not(small, tmp_path):
    data_root = Path(small[small.index("--data_root") + 1])
    moved = tmp_path / "moved"
    shutil.copytree(data_root, moved)
    out = tmp_path / "out"
    run_small(small, "--max_steps", 2, "--out_dir", out)
    before = (out / "tokenizer.json").read_bytes()
    run_small(small, "--max_steps", 2, "--out_dir", out, "--data_root", f"{moved}/")
    # the manifest grows: a BPE trained anew would give the old weights other ids
    manifest = moved / "coco_train.jsonl"
    more = {"image": "train0.png", "captions": ["quite another sentence"]}
    manifest.write_text(manifest.read_text() + json.dumps(more) + "\n")
    with pytest.raises(ValueError, match="training_texts was"):
        run_small(small, "--max_steps", 2, "--out_dir", out, "--data_root", moved)
    assert (out / "tokenizer.json").read_bytes() == before


def test_another_tokenizer_is_refused(small, tmp_path):
    out = tmp_path / "out"
    run_small(small, "--max_steps", 2, "--out_dir", out)
    other = tmp_path / "other"
    other.mkdir()
    size = json.loads((out / "config.json").read_text())["vocab_size"]
    tokenizer.train_tokenizer(["quite other words"] * 9, size).save(other)
    with pytest.raises(ValueError, match="tokenizer was"):
        run_small(
            small, "--max_steps", 2, "--out_dir", out, "--tokenizer", other, "--vocab_size", size
        )


def test_a_run_of_the_first_edition_goes_on(small, tmp_path, capsys):
    """Its identity held every flag and no digests: only what both have is compared."""
    flags = [*small, "--max_steps", 4, "--save_every", 2, "--out_dir"]
    run_small(flags, tmp_path / "whole")
    run_small(flags, tmp_path / "old")
    file = tmp_path / "old" / "training_state.pt"
    state = torch.load(file, weights_only=True)
    identity = json.loads(state["identity"])
    for name in ("training_texts", "tokenizer"):
        del identity[name]
    identity |= {
        "data_root": "elsewhere",
        "tokenizer": "",
        "eval_size": 99,
        "on_bad_sample": "skip",
    }
    del identity["tokenizer"]
    state["identity"] = json.dumps(identity)
    torch.save(state, file)
    run_small(flags, tmp_path / "old")
    assert "is finished: 4 of 4 steps" in capsys.readouterr().out


def test_log_and_config_say_their_version(small, tmp_path):
    run_small(small, "--max_steps", 2, "--out_dir", tmp_path)
    header = log_rows(tmp_path, "header")[0]["header"]
    assert header["version"] == files.VERSION and header["torch"] == torch.__version__
    assert (header["device"], header["precision"]) == ("cpu", "fp32")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["version"] == files.VERSION and config["transform"] == "clip"


def test_a_half_precision_run_that_learns_nothing_says_so(small, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "apply_gradients", lambda *_: math.inf)
    with pytest.raises(ValueError, match="the last 3 steps made no update.*--precision bf16"):
        run_small(small, "--max_steps", 3, "--precision", "fp16", "--out_dir", tmp_path)
    assert not (tmp_path / "training_state.pt").exists()


def test_weights_that_are_not_finite_are_never_saved(small, tmp_path):
    flags = ("--warmup", 0, "--learning_rate", 1e39, "--max_steps", 1, "--out_dir", tmp_path)
    with pytest.raises(ValueError, match="the weights are not finite after step 1: "):
        run_small(small, *flags)
    assert not (tmp_path / "training_state.pt").exists()
    assert not (tmp_path / "best").exists()


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """The folder of a run of two steps, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_small(small, "--max_steps", 2, "--save_every", 1, "--out_dir", folder)
    return folder


def digests(folder):
    """Every file below a folder -> its content."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "run.lock":
            contents[str(path.relative_to(folder))] = path.read_bytes()
    return contents


class Executed:
    """A pickle that would make a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def with_part(name, value):
    def change(state, folder):
        state[name] = value

    return change


class Claims:
    """Pickled as a tensor with this size, over a storage of four bytes."""

    def __init__(self, size, hooks):
        self.size = size
        self.hooks = hooks

    def __reduce__(self):
        storage = torch.zeros(1).storage()
        arguments = (storage, 0, (self.size,), (1,), False, self.hooks)
        return torch._utils._rebuild_tensor_v2, arguments


def with_huge_tensor(state, folder):
    """torch.load would make its storage grow to 8 GB."""
    state["scaler"] = {"x": Claims(2**31, OrderedDict())}


def with_hooks(state, folder):
    state["scaler"] = {"x": Claims(1, OrderedDict)}


def without_part(name):
    def change(state, folder):
        del state[name]

    return change


def with_weight(function):
    def change(state, folder):
        name = next(iter(state["model"]))
        state["model"][name] = function(state["model"][name])

    return change


def with_moment(function):
    def change(state, folder):
        moments = state["optimizer"]["state"][0]
        moments["exp_avg"] = function(moments["exp_avg"])

    return change


def with_group(**changes):
    def change(state, folder):
        state["optimizer"]["param_groups"][0].update(changes)

    return change


def without_a_group(state, folder):
    state["optimizer"]["param_groups"].pop()


def without_a_moment(state, folder):
    del state["optimizer"]["state"][0]["exp_avg_sq"]


def with_code(state, folder):
    state["best"] = Executed(folder / "executed")


READABLE = "training_state.pt is not a readable training state"
OF_THIS_RUN = "training_state.pt is not the training state of this run"


@pytest.mark.parametrize(
    "change,words",
    [
        *[(without_part(name), READABLE) for name in loop.STATE],
        (with_part("step", "2"), READABLE),
        (with_part("step", True), READABLE),
        (with_part("step", -1), OF_THIS_RUN),
        (with_part("step", 99), OF_THIS_RUN),
        (with_part("best", [1]), READABLE),
        (with_huge_tensor, READABLE),
        (with_hooks, READABLE),
        (with_part("identity", {}), READABLE),
        (with_part("identity", "[]"), READABLE),
        (with_part("identity", "["), READABLE),
        (with_part("model", {}), OF_THIS_RUN),
        (with_part("model", {1: torch.ones(2)}), OF_THIS_RUN),
        (with_part("optimizer", {}), OF_THIS_RUN),
        (with_part("optimizer", {"state": [], "param_groups": 5}), OF_THIS_RUN),
        (with_weight(lambda x: x * math.nan), OF_THIS_RUN),
        (with_weight(lambda x: x.half()), OF_THIS_RUN),
        (with_weight(lambda x: x.flatten()[:1]), OF_THIS_RUN),
        (with_weight(lambda x: "x"), OF_THIS_RUN),
        (with_moment(lambda x: x * math.inf), OF_THIS_RUN),
        (with_moment(lambda x: x.flatten()[:1]), OF_THIS_RUN),
        (with_moment(lambda x: None), OF_THIS_RUN),
        (with_group(params=[0]), OF_THIS_RUN),
        (with_group(peak_lr=None), OF_THIS_RUN),
        (with_group(lr=math.nan), OF_THIS_RUN),
        (with_group(betas=0.5), OF_THIS_RUN),
        (without_a_group, OF_THIS_RUN),
        (without_a_moment, OF_THIS_RUN),
        (with_code, READABLE),
    ],
)
@pytest.mark.parametrize("old_format", [False, True])
def test_a_state_from_elsewhere_is_refused_and_kept(
    small, finished, tmp_path, change, words, old_format
):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    file = out / "training_state.pt"
    state = torch.load(file, weights_only=True)
    change(state, tmp_path)
    torch.save(state, file, _use_new_zipfile_serialization=not old_format)
    before = digests(out)
    with pytest.raises(ValueError, match=READABLE if old_format else words) as error:
        run_small(small, "--max_steps", 2, "--save_every", 1, "--out_dir", out)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 600
    assert " object at 0x" not in str(error.value)
    assert digests(out) == before
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"no", b"\x80\x02(", [1], {}, torch.zeros(2), "half"])
def test_what_is_no_training_state_is_refused(small, finished, tmp_path, content):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    file = out / "training_state.pt"
    if content == "half":
        content = file.read_bytes()[: file.stat().st_size // 2]
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    before = digests(out)
    with pytest.raises(ValueError, match=READABLE):
        run_small(small, "--max_steps", 2, "--save_every", 1, "--out_dir", out)
    assert digests(out) == before


def test_a_folder_called_training_state_is_refused(small, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "training_state.pt").unlink()
    (out / "training_state.pt").mkdir()
    with pytest.raises(ValueError, match="training_state.pt is a folder, and .* writes a file"):
        run_small(small, "--max_steps", 2, "--save_every", 1, "--out_dir", out)


# ---------------------------------------------------------------- --fresh, and what is not ours
FRESH = ("--max_steps", 2, "--save_every", 1, "--fresh", "--out_dir")


def test_fresh_puts_the_old_run_aside_and_keeps_all_else(small, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    old = digests(out)
    foreign = {"notes.txt": b"mine", "before-2": b"mine", "sub/log.jsonl": b"mine"}
    for name, content in foreign.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    (out / "best" / "thoughts.txt").write_bytes(b"mine")
    for number in (1, 3):  # somebody has a before-2
        capsys.readouterr()
        run_small(small, *FRESH, out)
        said = f"--fresh: the files of the old run are in {out}/before-{number} now\n"
        assert capsys.readouterr().out.count(said) == 1
    assert digests(out / "before-1") == {**old, "best/thoughts.txt": b"mine"}
    assert digests(out / "before-3") == old
    for name in old:
        assert (out / name).read_bytes() == old[name], name
    for name, content in foreign.items():
        assert (out / name).read_bytes() == content


def test_fresh_in_a_folder_without_a_run_moves_nothing(small, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    run_small(small, *FRESH, tmp_path)
    assert "--fresh: " not in capsys.readouterr().out
    assert not list(tmp_path.glob("before-*"))


def test_after_a_death_between_two_renames_nothing_is_lost(small, finished, tmp_path, monkeypatch):
    """At each of the renames; then the same command again, and without --fresh."""
    number = len(loop.FILES) - 1  # one of the two tokenizers, no answers; but best/
    rename = os.rename
    for last in range(number - 1):
        out = tmp_path / f"run{last}"
        shutil.copytree(finished, out)
        old = digests(out)
        calls = []

        def dies(source, target, calls=calls, last=last):
            if len(calls) == last:
                raise KeyboardInterrupt
            calls.append(source)
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(loop.os, "rename", dies)
            with pytest.raises(KeyboardInterrupt):
                run_small(small, *FRESH, out)
        if last:  # the training state is aside, so the rest is nobody's
            with pytest.raises(ValueError, match="no training_state.pt to go on from"):
                run_small(small, *FRESH[:4], "--out_dir", out)
        run_small(small, *FRESH, out)
        found = {**digests(out / "before-2"), **digests(out / "before-1")}
        assert found == old
        assert {name: content for name, content in digests(out).items() if name in old} == old


@pytest.mark.parametrize("flag", ["--vision", "--text", "--tokenizer", "--data_root"])
@pytest.mark.parametrize(
    "place",
    ["run", "run/best", "link", "run/../run/best", "run/best/model.safetensors", "run/config.json"],
)
def test_fresh_is_refused_where_it_would_move_what_the_run_starts_from(
    small, finished, tmp_path, monkeypatch, flag, place
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run")
    (tmp_path / "link").symlink_to("run")
    before = digests(tmp_path)
    with pytest.raises(ValueError, match=f"{flag} {place} is in --out_dir run, whose files"):
        run_small(small, *FRESH, "run", flag, place)
    assert digests(tmp_path) == before


def test_what_fresh_does_not_move_may_lie_in_the_folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for place in ("run/before-1", "run/data", "elsewhere", ".", "run/notes.txt", "run/sub/best"):
        assert not loop.is_moved(tmp_path / place, tmp_path / "run"), place


@pytest.mark.parametrize("name", loop.EXPORTED)
def test_files_without_a_training_state_are_kept(small, tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=f"has a {name} but no training_state.pt .*--fresh"):
        run_small(small, *FRESH[:4], "--out_dir", tmp_path)
    assert (tmp_path / name).read_text() == "precious"
    run_small(small, *FRESH, tmp_path)
    assert (tmp_path / "before-1" / name).read_text() == "precious"


@pytest.mark.parametrize(
    "content",
    [
        "precious\n",
        '{"step": 0}\n',
        '{"step": 0, "header": 5}\n',
        '{"step": 0, "header": {"identity": {"seed": 5}}}\n',
        '{"loss": 1}\n',
    ],
)
def test_a_foreign_log_is_kept(small, tmp_path, content):
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(ValueError, match="log.jsonl but no training_state.pt .*--fresh"):
        run_small(small, *FRESH[:4], "--out_dir", tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == content
    assert digests(tmp_path) == {"log.jsonl": content.encode()}


def test_what_is_left_without_its_training_state_is_kept(small, finished, tmp_path):
    """Somebody removed the large file, and all that comes with it but best/ or the log."""
    for kept in ("best", "log.jsonl"):
        out = tmp_path / kept
        shutil.copytree(finished, out)
        for name in set(loop.FILES) - {kept}:
            (out / name).unlink(missing_ok=True)
        if kept != "best":
            shutil.rmtree(out / "best")
        before = digests(out)
        with pytest.raises(ValueError, match="but no training_state.pt to go on from"):
            run_small(small, *FRESH[:4], "--out_dir", out)
        assert digests(out) == before


def test_a_run_that_died_before_its_first_save_begins_again(small, finished, tmp_path):
    """It left a log and best/."""
    flags = [*small, "--max_steps", 2, "--save_every", 2, "--eval_every", 1, "--out_dir"]
    run_small(flags, tmp_path / "whole")
    out = tmp_path / "died"
    shutil.copytree(tmp_path / "whole", out)
    for name in ("training_state.pt", *loop.EXPORTED):
        (out / name).unlink(missing_ok=True)
    run_small(flags, out)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    "name,words",
    [
        ("file", "it is a file, not a folder"),
        ("file/x", "is a file, not a folder"),
        ("dangling", "it is a link to nowhere, which does not exist"),
        ("y" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("fresh", ["true", "false"])
def test_a_folder_that_cannot_be_is_said_before_the_work(
    small, tmp_path, monkeypatch, name, words, fresh
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.setattr(train, "pretrain", None)  # it must not come so far
    with pytest.raises(ValueError, match=f"--out_dir {name} cannot be written into: .*{words}"):
        run_small(small, "--out_dir", name, "--fresh", fresh)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_to_a_folder_is_a_folder(small, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for _ in range(2):
        run_small(small, *FRESH, tmp_path / "link")
    assert (tmp_path / "folder" / "before-1" / "training_state.pt").is_file()
    assert (tmp_path / "link").is_symlink()


def test_somebodys_own_run_lock_is_kept(small, tmp_path):
    (tmp_path / "run.lock").write_text("precious")
    with pytest.raises(ValueError, match="run.lock is not the lock of a run"):
        run_small(small, *FRESH, tmp_path)
    assert digests(tmp_path) == {} and (tmp_path / "run.lock").read_text() == "precious"


# ---------------------------------------------------------------- how a run ends early
class Interrupt(Terminate):
    """A dataset of which a row is read when Ctrl-C is pressed."""

    def __getitem__(self, key):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.dataset[key]


@pytest.mark.parametrize(
    "save_every,words", [(1, "The checkpoint of step 2 is kept"), (9, "There is no checkpoint yet")]
)
def test_ctrl_c_says_what_is_kept(small, tmp_path, monkeypatch, save_every, words):
    flags = [*small, "--max_steps", "6", "--save_every", save_every, "--out_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        original = loop.fit
        patch.setattr(
            train, "fit", lambda run, task, rows, *args: original(run, task, Interrupt(rows), *args)
        )
        with pytest.raises(KeyboardInterrupt, match=f"interrupted. {words}"):
            run_small(flags)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run_small(flags)
    assert [r["step"] for r in log_rows(tmp_path, "loss")] == [1, 2, 3, 4, 5, 6]


def test_a_clock_that_goes_back_disturbs_nothing(small, finished, tmp_path, monkeypatch):
    times = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: next(times))
    run_small(small, "--max_steps", 2, "--save_every", 1, "--out_dir", tmp_path)
    assert digests(tmp_path) == digests(finished)


def test_a_run_without_a_step_is_none(tmp_path):
    for steps in (0, -1):
        run = TrainConfig(out_dir=str(tmp_path / "x"))
        run.max_steps = steps
        with pytest.raises(ValueError, match=f"--max_steps is {steps}; it must be from 1 on"):
            loop.fit(run, None, None, None, None, None, None)
    with pytest.raises(ValueError, match="--max_steps is 0"):
        train.main(["--recipe", "llava_demo", "--max_steps", "0", "--out_dir", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_most_workers(small, tmp_path):
    with pytest.raises(ValueError, match="--num_workers is 100000; .* from 0 to 256"):
        run_small(small, "--num_workers", 100000, "--out_dir", tmp_path / "x")


@pytest.mark.parametrize("row", ["5", "[1]", '{"step": "a"}', '{"step": null}', "{", '{"loss": 1}'])
def test_a_row_of_the_log_that_is_none_is_named(small, tmp_path, row):
    run_small(small, "--max_steps", 1, "--out_dir", tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(row + "\n")
    with pytest.raises(ValueError, match=r"log.jsonl, line \d+"):
        run_small(small, "--max_steps", 1, "--out_dir", tmp_path)


def test_after_fresh_the_command_goes_on_without_it(small, tmp_path, capsys, monkeypatch):
    original = loop.fit
    monkeypatch.setattr(
        train, "fit", lambda run, task, rows, *args: original(run, task, Terminate(rows), *args)
    )
    with pytest.raises(Stopped):
        run_small(small, "--max_steps", 6, "--fresh", "--out_dir", tmp_path)
    assert "the same command, without --fresh, goes on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name,words",
    [
        ("best", "best cannot be written into: it is a file, not a folder"),
        ("best/model.safetensors/x", "model.safetensors is a folder, and the run writes a file"),
        ("log.jsonl/x", "log.jsonl is a folder, and the run writes a file"),
    ],
)
def test_a_place_of_another_kind_is_found_before_the_work(small, tmp_path, capsys, name, words):
    place = tmp_path / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("mine")
    with pytest.raises(ValueError, match=words):
        run_small(small, "--max_steps", 1, "--out_dir", tmp_path)
    assert capsys.readouterr().out == ""
    assert place.read_text() == "mine"
    # --fresh puts it aside
    run_small(small, "--max_steps", 1, "--fresh", "--out_dir", tmp_path)
    assert (tmp_path / "before-1" / name).read_text() == "mine"


def test_a_run_goes_on_without_the_tokenizer_that_it_was_given(small, tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    scenes.demo_tokenizer().save(words)
    flags = [*small, "--tokenizer", words, "--save_every", 1, "--out_dir", tmp_path / "run"]
    run_small(flags, "--max_steps", 2)
    shutil.rmtree(words)
    run_small(flags, "--max_steps", 2)
    with pytest.raises(ValueError, match="words"):
        run_small(flags, "--max_steps", 2, "--fresh")
