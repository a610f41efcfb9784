"""shard.py: several sharded processes equal one that is not, in both model families; each has its
part; a state of shards resumes to the same bits, on any number of processes, whatever the moment of
death."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import (
    LOV,
    ROOT,
    free_port,
    join,
    log_rows,
    losses,
    picture,
    run_in_forks,
    run_script,
    run_script_in_fork,
    run_small,
)
from safetensors.torch import load_file, save_file

import loop
import manager
import shard
import train
import weights
from llava_manager import LlavaManager, LlavaManagerConfig
from tokenizer import load_tokenizer

EXACT = (
    "--objectives mlm,itm,itc --share_images false --dropout 0 --manager_noise false "
    "--grad_clip 1 --max_steps 12 --save_every 4 --eval_every 6 --temperature 0.2 --out_dir"
).split()


def spy_on_steps(sizes, pictures):
    """Record in each process what it holds after the steps, and whether each batch has pictures."""
    run_steps = loop.run_steps
    embed = LlavaManager.embed

    def run_and_measure(learner, *arguments):
        done = run_steps(learner, *arguments)
        tensors = list(learner.task.parameters())
        for state in learner.optimizer.state.values():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
        for tensor in tensors:
            # the bytes behind it: a view of all weights would keep them
            sizes.append(shard.own_part(tensor).untyped_storage().nbytes())
        return done

    def embed_and_look(self, batch, images):
        if self.training:
            pictures.append(len(images) > 0)
        return embed(self, batch, images)

    loop.run_steps = run_and_measure
    LlavaManager.embed = embed_and_look


def run_sharded(rank, size, port, flags, out, last_step=0):
    """train.py --shard in one of several processes. last_step: end after the state of this step."""
    join(rank, port, size)
    # the managers' noise differs between the processes
    manager.StaticVisualManager.draw = lambda self, scores: torch.full_like(scores, 0.5)
    manager.AdaptiveVisualManager.draw = manager.StaticVisualManager.draw
    sizes = []
    pictures = []
    spy_on_steps(sizes, pictures)
    save = loop.Checkpoint.save

    def save_and_end(self, step, *arguments):
        save(self, step, *arguments)
        if step == last_step:
            raise KeyboardInterrupt

    loop.Checkpoint.save = save_and_end
    try:
        train.main([str(flag) for flag in (*flags, "--shard", "--out_dir", out)])
    except KeyboardInterrupt:
        assert last_step
    seen = {"bytes": sum(sizes), "pictures": pictures}
    (out / f"seen-{rank}.json").write_text(json.dumps(seen))


def sharded(flags, out, size, last_step=0):
    """The same in `size` processes. Returns what each of them has seen."""
    flags = [str(flag) for flag in flags]
    run_in_forks(run_sharded, size, free_port(), flags, out, last_step, processes=size)
    return [json.loads((out / f"seen-{rank}.json").read_text()) for rank in range(size)]


def read(folder):
    return load_file(folder / "model.safetensors")


def check_same(folder, whole, tolerance=1e-5):
    """Losses, metrics and weights of two runs agree, the last ones in the norm of all together."""
    assert losses(folder) == pytest.approx(losses(whole), rel=tolerance)
    for key in ("grad_norm",):
        ours = [row[key] for row in log_rows(folder, key)]
        assert ours == pytest.approx([row[key] for row in log_rows(whole, key)], rel=10 * tolerance)
    for ours, theirs in zip(log_rows(folder, "eval"), log_rows(whole, "eval"), strict=True):
        assert ours["eval"] == pytest.approx(theirs["eval"], rel=tolerance)
    for name in ("", "best"):
        ours = read(folder / name)
        theirs = read(whole / name)
        assert ours.keys() == theirs.keys()
        error = sum((ours[key] - theirs[key]).norm() ** 2 for key in theirs).sqrt()
        norm = sum(theirs[key].norm() ** 2 for key in theirs).sqrt()
        print(name, "error of the weights", float(error / norm))
        assert error <= tolerance * norm


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """12 steps of one process without --shard."""
    out = tmp_path_factory.mktemp("whole")
    run_small(small, *EXACT, out)
    return out


def test_two_processes_equal_one(small, whole, tmp_path):
    seen = sharded([*small, *EXACT[:-1]], tmp_path, 2)
    check_same(tmp_path, whole)
    # each has half of weights and moments, and a little for what does not divide
    total = 3 * sum(weight.nbytes for weight in read(whole).values())
    for process in seen:
        assert process["bytes"] < 0.51 * total


@pytest.mark.slow
def test_four_processes_equal_one(small, whole, tmp_path):
    sharded([*small, *EXACT[:-1]], tmp_path, 4)
    check_same(tmp_path, whole)


# ---------------------------------------------------------------- the MLLM
TINY = {
    "image_size": 16,
    "patch_size": 8,
    "vision_width": 16,
    "vision_layers": 3,
    "vision_heads": 2,
    "vision_mlp_width": 32,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "mlp_width": 32,
    "managed_layers": (1, 2),
    "inject_layers": (0, 1),
    "max_length": 120,
    "manager_type": "adaptive_cross",
    "aspect": "square",
    "merge": "flat",
}
FAST = (
    "--recipe llava_stage2 --batch_size 4 --micro_batch_size 2 --num_workers 0 --log_every 1 "
    "--eval_every 6 --save_every 4 --eval_size 2 --max_steps 12 --learning_rate 1e-2 "
    "--lr_manager 1e-2 --lr_vision 1e-2"
).split()


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Flags of a stage on 14 conversations, two in three without a picture, and a tiny model."""
    folder = tmp_path_factory.mktemp("chats")
    words = load_tokenizer(LOV / "chat")
    torch.manual_seed(0)
    model = LlavaManager(LlavaManagerConfig.tiny(**TINY, vocab_size=words.vocab_size))
    for parameter in model.managers.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights.save_model(model, folder / "start")
    words.save(folder / "start")
    rows = []
    for i in range(14):
        turns = [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": "it" * i}]
        rows.append({"id": str(i), "conversations": turns})
        if i % 3 == 0:
            picture(i, (20 + i, 30 - i)).save(folder / f"{i}.png")
            rows[-1]["image"] = f"{i}.png"
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    (folder / "chats.json").write_text(json.dumps(rows))
    places = ["--data_root", folder, "--data_path", "chats.json", "--init", folder / "start"]
    return [*FAST, *places]


def whole_in_a_fork(rank, flags, out):
    """train.py without --shard, and without the managers' noise."""
    manager.StaticVisualManager.draw = lambda self, scores: torch.full_like(scores, 0.5)
    manager.AdaptiveVisualManager.draw = manager.StaticVisualManager.draw
    train.main([*flags, "--out_dir", str(out)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "size,changed",
    [
        (2, []),
        (4, []),
        (2, ["--checkpointing", "false", "--micro_batch_size", "1"]),
        (1, ["--manager_type", "static"]),
    ],
)
def test_the_mllm_where_a_process_has_no_picture(size, changed, chats, tmp_path):
    """With checkpointing, which is the stage's default, and once in two micro-steps."""
    flags = [str(flag) for flag in (*chats, *changed)]
    if "static" in changed:
        changed_start = tmp_path / "start"
        words = load_tokenizer(LOV / "chat")
        fields = {**TINY, "manager_type": "static", "vocab_size": words.vocab_size}
        weights.save_model(LlavaManager(LlavaManagerConfig.tiny(**fields)), changed_start)
        words.save(changed_start)
        flags[flags.index("--init") + 1] = str(changed_start)
    run_in_forks(whole_in_a_fork, flags, tmp_path / "whole", processes=1)
    seen = sharded(flags, tmp_path / "sharded", size)
    check_same(tmp_path / "sharded", tmp_path / "whole")
    # in some step one process has a picture, and another one has none
    if size > 1:
        steps = zip(*[process["pictures"] for process in seen], strict=True)
        assert any(len(set(step)) == 2 for step in steps)
    total = 3 * sum(weight.nbytes for weight in read(tmp_path / "whole").values())
    for process in seen:
        assert process["bytes"] < 1.05 * total / size


# ---------------------------------------------------------------- resume
@pytest.mark.slow
def test_resumed_equals_uninterrupted(small, tmp_path):
    flags = [*small, *EXACT[:-1]]
    sharded(flags, tmp_path / "whole", 2)
    sharded(flags, tmp_path / "ended", 2, last_step=8)
    assert len(losses(tmp_path / "ended")) == 8
    sharded(flags, tmp_path / "ended", 2)
    for name in ("model.safetensors", "best/model.safetensors", "log.jsonl"):
        ours = (tmp_path / "ended" / name).read_bytes()
        assert ours == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_another_number_of_processes_goes_on(small, whole, tmp_path):
    flags = [*small, *EXACT[:-1]]
    sharded(flags, tmp_path, 4, last_step=4)
    sharded(flags, tmp_path, 1, last_step=8)
    sharded(flags, tmp_path, 3)
    check_same(tmp_path, whole)
    names = {path.name for path in (tmp_path / "sharded_state").iterdir()}
    assert names == {"index.json", *(f"step-12.part-{rank}.safetensors" for rank in range(3))}
