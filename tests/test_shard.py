"""shard.py: several sharded processes equal one that is not, in both model families; each has its
part; a state of shards resumes to the same bits, on any number of processes, whatever the moment of
death."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    LOV,
    ROOT,
    TINY_MLLM,
    free_port,
    join,
    log_rows,
    losses,
    picture,
    run_in_forks,
    run_script,
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


@pytest.mark.slow
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
TINY = {**TINY_MLLM, "manager_type": "adaptive_cross", "aspect": "square", "merge": "flat"}
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
    captions = [row for row in rows if "image" in row]
    for row in captions:
        row["conversations"] = [
            {"from": "human", "value": "<image>\nDescribe."},
            {"from": "gpt", "value": f"a picture of {row['id']}"},
        ]
    (folder / "captions.json").write_text(json.dumps(3 * captions))
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
        (2, ["--recipe", "llava_stage1", "--warmup", "0"]),
    ],
)
def test_the_mllm_where_a_process_has_no_picture(size, changed, chats, tmp_path):
    """With checkpointing, which is the stage's default, and once in two micro-steps; once with a
    frozen tower and LLM, which wants captions.
    """
    flags = [str(flag) for flag in (*chats, *changed)]
    is_alignment = "llava_stage1" in changed
    if is_alignment:
        flags = [flag.replace("chats.json", "captions.json") for flag in flags]
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
    if size > 1 and not is_alignment:
        steps = zip(*[process["pictures"] for process in seen], strict=True)
        assert any(len(set(step)) == 2 for step in steps)
    # weights and two moments, the latter only of what learns
    copies = 1.2 if is_alignment else 3
    total = copies * sum(weight.nbytes for weight in read(tmp_path / "whole").values())
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


def children(process):
    """The processes that torchrun has started, by their rank."""
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    listed = subprocess.run(command, capture_output=True, text=True)
    found = {}
    for number in map(int, listed.stdout.split()):
        environment = Path(f"/proc/{number}/environ").read_text().split("\0")
        ranks = [word for word in environment if word.startswith("RANK=")]
        if ranks:
            found[int(ranks[0].removeprefix("RANK="))] = number
    return found


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_run_goes_on(small, whole, tmp_path):
    flags = [str(flag) for flag in (*small, *EXACT, tmp_path, "--shard", "--save_every", "2")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*torchrun, "--nproc_per_node", "2", str(ROOT / "train.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    index = tmp_path / "sharded_state" / "index.json"
    end = time.time() + 120
    while time.time() < end and not index.exists():
        time.sleep(0.01)
    os.kill(children(process)[1], signal.SIGKILL)
    began = time.time()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and time.time() - began < 40
    assert re.search(r"another process of this run has ended. The checkpoint of step \d+", said)
    assert len(losses(tmp_path)) < 12
    result = run_script("train.py", *flags, processes=2)
    assert result.returncode == 0 and "resuming after step " in result.stdout, result.stderr
    check_same(tmp_path, whole)


@pytest.mark.slow
def test_death_at_every_write_of_shards(small, tmp_path):
    """As test_loop.py has it of training_state.pt; here with one process."""
    few = "--vision_layers 1 --text_layers 1 --num_layers 1 --managed_layers_text 1"
    few += " --managed_layers_image 1 --batch_size 4 --micro_batch_size 4 --eval_size 4 --shard"
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "deaths.py", tmp_path / "runs", *small, *few.split()],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert int(result.stdout.split()[0]) >= 80, result.stdout


# ---------------------------------------------------------------- what is refused
SHORT = ("--max_steps", 2, "--save_every", 1, "--batch_size", 4)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A sharded run of one process, which has ended after its first step of two."""
    out = tmp_path_factory.mktemp("finished") / "run"
    sharded([*small, *SHORT], out, 1, last_step=1)
    return out


def message_of(rank, flags, file):
    """In a fork, as no process group must be left: the sentence that a run ends with."""
    try:
        train.main(flags)
    except ValueError as error:
        file.write_text(str(error))


def refused(flags, tmp_path):
    file = tmp_path / "said.txt"
    run_in_forks(message_of, [str(flag) for flag in flags], file, processes=1)
    return file.read_text() if file.exists() else ""


def test_a_state_with_shards_and_one_without_are_told_apart(small, whole, finished, tmp_path):
    with pytest.raises(ValueError, match="sharded_state is of a run with --shard, and goes on on"):
        run_small(small, *SHORT, "--out_dir", finished)
    with pytest.raises(ValueError, match="training_state.pt is of a run without --shard, and goe"):
        run_small(small, *EXACT, whole, "--shard")
    with pytest.raises(ValueError, match="shard does not go with precision fp16"):
        run_small(small, *SHORT, "--shard", "--precision", "fp16", "--out_dir", tmp_path)


def cut(folder):
    file = folder / "step-1.part-0.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def without_a_tensor(folder):
    file = folder / "step-1.part-0.safetensors"
    tensors = load_file(file)
    del tensors["weight type_embedding"]
    save_file(tensors, file)


def other_values(change):
    def damage(folder):
        file = folder / "step-1.part-0.safetensors"
        tensors = load_file(file)
        tensors["weight type_embedding"] = change(tensors["weight type_embedding"])
        save_file(tensors, file)

    return damage


def other_index(**values):
    def damage(folder):
        file = folder / "index.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return damage


READABLE = "index.json is not a readable training state"
OF_THIS_RUN = "sharded_state is not the training state of this run"


@pytest.mark.parametrize(
    "damage,words",
    [
        (cut, f"{OF_THIS_RUN} .step-1.part-0.safetensors cannot be read"),
        (without_a_tensor, f"{OF_THIS_RUN} .*has no .*weight type_embedding"),
        (other_values(lambda weight: weight[:1]), f"{OF_THIS_RUN} .*is F32 .*, not F32"),
        (other_values(lambda weight: weight.double()), f"{OF_THIS_RUN} .*is F64 .*, not F32"),
        (other_values(lambda weight: weight / 0), f"{OF_THIS_RUN} .*is not finite"),
        (other_index(step=3), f"{OF_THIS_RUN} .step is 3 of 2"),
        (other_index(step="1"), f"{READABLE} .*'step' is"),
        (other_index(step=2), f"{OF_THIS_RUN} .step-2.part-0.safetensors cannot be read"),
        (other_index(best=math.nan), f"{READABLE} .best is nan"),
        (other_index(processes=0), f"{READABLE} .processes is 0"),
        (other_index(processes=2), f"{OF_THIS_RUN} .step-1.part-1.safetensors cannot be read"),
        (other_index(identity={}), f"{READABLE} .identity is"),
        (other_index(updates={"type_embedding": "a"}), f"{OF_THIS_RUN} .updates of .* is"),
        (lambda folder: (folder / "index.json").write_text("no"), f"{READABLE} .*not JSON"),
    ],
)
def test_a_damaged_state_is_refused_and_kept(small, finished, tmp_path, damage, words):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    damage(folder / "sharded_state")
    before = {path.name: path.read_bytes() for path in (folder / "sharded_state").iterdir()}
    flags = [*small, *SHORT, "--shard", "--out_dir", folder]
    assert re.search(words, refused(flags, tmp_path))
    after = {path.name: path.read_bytes() for path in (folder / "sharded_state").iterdir()}
    assert before == after


def test_fresh_puts_the_shards_aside(small, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    run_small(small, *SHORT, "--fresh", "--out_dir", folder)
    moved = folder / "before-1" / "sharded_state"
    assert (moved / "step-1.part-0.safetensors").exists()
    assert not (folder / "sharded_state").exists()


def test_files_of_the_user_in_the_folder_are_kept(small, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    mine = folder / "sharded_state" / "notes.txt"
    mine.write_text("mine")
    (folder / "sharded_state" / "step-9.part-3.safetensors.tmp12").write_text("half")
    sharded([*small, *SHORT], folder, 1)
    names = {path.name for path in mine.parent.iterdir()}
    assert names == {"notes.txt", "index.json", "step-2.part-0.safetensors"}


def test_rows_are_dealt_as_torch_does():
    for length in (1, 2, 5, 7, 8):
        for size in (1, 2, 3, 4, 8):
            chunks = torch.arange(length).chunk(size)
            for rank in range(size):
                expected = chunks[rank].tolist() if rank < len(chunks) else []
                assert list(shard.rows_of(length, rank, size)) == expected
