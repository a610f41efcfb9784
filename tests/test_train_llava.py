"""train_llava.py: groups, schedule and loss equal the official ones; one process = two =
accumulation; the stages on files through the command line, resumed = uninterrupted; the demo;
errors.
"""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    LOV,
    TINY_MLLM,
    free_port,
    join,
    llava_golden_model,
    llava_inputs,
    log_rows,
    losses,
    read_llava,
    run_in_forks,
)
from PIL import Image
from safetensors.torch import load_file

import chat
import data
import loop
import manager
import multigrid
import train
import train_llava
import weights
from fields import FlagError
from files import BadSample
from llava_manager import LlavaManager, LlavaManagerConfig
from tokenizer import load_tokenizer
from train_llava import LLAVA_RECIPES, LlavaTrainConfig
from world import World

FAST = (
    "--batch_size 4 --micro_batch_size 2 --num_workers 0 --log_every 1 --eval_every 0 "
    "--eval_size 2 --learning_rate 1e-2 --lr_manager 1e-2 --lr_vision 1e-2"
).split()
PINPOINTS = "[[16,32],[32,16],[32,32],[48,16],[16,48]]"  # stage 1.5's for tiles of 16 pixels
TAGS = ("", "<image>\n", "<image> <image>\n")  # of no, one and two pictures


@functools.cache
def words():
    return load_tokenizer(LOV / "chat")


def tiny_model(**fields):
    torch.manual_seed(0)
    config = LlavaManagerConfig.tiny(**{**TINY_MLLM, "vocab_size": words().vocab_size, **fields})
    model = LlavaManager(config)
    for one in model.managers:
        torch.nn.init.normal_(one.scores, std=0.5)
    return model


def save_start(folder, **fields):
    """A tiny checkpoint to start from."""
    weights.save_model(tiny_model(aspect="square", merge="flat", **fields), folder)
    words().save(folder)
    return folder


def turns(question, i):
    answer = f"a picture{' of it' * (i % 4)}"
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """chat.json: 10 rows with no, one, two pictures in turn; captions.json; start/, a tiny
    checkpoint.
    """
    folder = tmp_path_factory.mktemp("llava")
    random = np.random.default_rng(0)
    chats = []
    captions = []
    for i in range(10):
        pixels = random.integers(0, 255, (12 + 5 * i, 40 - 2 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images = ({}, {"image": f"{i}.png"}, {"image": [f"{i}.png", "0.png"]})[i % 3]
        question = f"{TAGS[i % 3]}what is {i}?"
        chats.append({"id": str(i), **images, "conversations": turns(question, i)})
        captions.append({"image": f"{i}.png", "conversations": turns("<image>\nDescribe.", i)})
    (folder / "chat.json").write_text(json.dumps(chats))
    (folder / "captions.json").write_text(json.dumps(captions))
    save_start(folder / "start")
    return folder


def run_stage(recipe, folder, out, *flags, data_path="chat.json"):
    where = ["--data_root", folder, "--data_path", data_path, "--out_dir", out]
    arguments = [str(argument) for argument in (*where, *flags)]
    train.main(["--recipe", recipe, *FAST, *arguments])


def read_weights(folder):
    return load_file(folder / "model.safetensors")


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


# ---------------------------------------------------------------- the official numbers
def official_rates(model, run):
    """{official name: [learning rate, weight decay]}; each parameter in one group only."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {}
    for group in train_llava.llava_groups(model, run):
        for parameter in group["params"]:
            ours = {names[id(parameter)]: parameter}
            for name in weights.to_official(ours, model.config):
                assert name not in rates
                rates[name] = [group["peak_lr"], group["weight_decay"]]
    return rates


def full_size(recipe, monkeypatch, **fields):
    """The 0.5B model, on the meta device, as `recipe` trains it."""
    with torch.device("meta"):
        start = LlavaManager(LlavaManagerConfig.base(**fields))
    monkeypatch.setattr(train_llava, "load_model", lambda folder: start)
    run, own_fields = LLAVA_RECIPES[recipe]
    run = dataclasses.replace(run, init="start")
    return train_llava.make_llava(run, own_fields, words())


def without_dead(rates):
    """SigLIP's last norm never has a gradient."""
    return {name: rate for name, rate in rates.items() if "post_layernorm" not in name}


def needs_optim(name):
    file = LOV / "optim" / f"{name}.json"
    return pytest.mark.skipif(not file.exists(), reason=f"this golden set has no {name}")


STAGE_1 = "stage1_manager"
LATER = "stage1p5_and_2_manager_grid"


@pytest.mark.parametrize(
    "file,recipe",
    [
        pytest.param(STAGE_1, "llava_stage1", marks=needs_optim(STAGE_1)),
        pytest.param(LATER, "llava_stage1_5", marks=needs_optim(LATER)),
        pytest.param(LATER, "llava_stage2", marks=needs_optim(LATER)),
    ],
)
def test_groups_equal_the_official_ones(file, recipe, monkeypatch):
    official = read_llava(f"optim/{file}.json")
    run = LLAVA_RECIPES[recipe][0]
    rates = official_rates(full_size(recipe, monkeypatch), run)
    assert rates == without_dead(official["params_lr_wd"])
    assert official["betas"] == [0.9, run.beta2]
    assert (run.grad_clip, run.batch_size, run.schedule) == (1, 512, "cosine")
    if run.alignment:
        baseline = official_rates(full_size(recipe, monkeypatch, manager_type=None), run)
        notes = read_llava("optim/schedule_and_notes.json")
        assert sorted(baseline) == notes["baseline_stage1_trainable"]


DECAY_SPLIT = "decay_split_example_wd0p1_adaptive_cross"


@needs_optim(DECAY_SPLIT)
def test_decay_split_equals_the_official_one(monkeypatch):
    official = without_dead(read_llava(f"optim/{DECAY_SPLIT}.json")["params_lr_wd"])
    run = dataclasses.replace(LLAVA_RECIPES["llava_stage2"][0], weight_decay=0.1)
    model = full_size("llava_stage2", monkeypatch, manager_type="adaptive_cross")
    rates = official_rates(model, run)
    assert {name: rates[name] for name in official} == official


def test_schedule_equals_the_official_one():
    schedules = read_llava("optim/schedule_and_notes.json")["schedules"]
    assert schedules
    for steps, official in schedules.items():
        run = dataclasses.replace(LLAVA_RECIPES["llava_stage2"][0], max_steps=int(steps))
        optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "peak_lr": 3.0}])
        for step, factor in official["lr_factor_by_step"].items():
            loop.set_learning_rate(optimizer, run, int(step))
            assert optimizer.param_groups[0]["lr"] == pytest.approx(3 * factor, abs=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        "c04_a9_31x300_multiturn",
        "c11_a9_batch_img_text",
        "c14_plain_square_batch",
        "c16_a9_trunc_31x300",
    ],
)
def test_loss_equals_the_official_one(case):
    task = train_llava.Chat(llava_golden_model("static_all", case))
    batch = {**llava_inputs(case, task.model.config), "image_index": [0]}
    loss = task(batch)["lm"].item() / task.counts(batch)["lm"]
    assert abs(loss - read_llava("tiny/info_static_all.json")["cases"][case]["loss"]) < 2e-5


def test_stages_prepare_images_as_the_paper():
    configs = []
    for stage in ("1", "1_5", "2"):
        fields = LLAVA_RECIPES[f"llava_stage{stage}"][1]
        configs.append(LlavaManagerConfig.base(**fields))
    one, middle, two = configs
    assert (one.aspect, one.merge, one.max_length) == ("square", "flat", 8192)
    assert (middle.aspect, middle.merge, middle.max_length) == ("anyres", "spatial_unpad", 16384)
    official = read_llava("preprocess/real_size_grids.json")["pins_anyres"]
    assert [list(size) for size in middle.grid_pinpoints] == official
    assert (two.aspect, two.merge, two.max_length) == ("anyres_max_9", "spatial_unpad", 16384)
    assert len(two.grid_pinpoints) == 36


# ---------------------------------------------------------------- data
def chat_dataset(folder, path="chat.json", **settings):
    source = data.open_chat(folder / path)
    config = tiny_model().config
    return data.ChatDataset(source, range(len(source)), config, tokenizer=words(), **settings)


def test_rows_are_encoded_as_stage_and_images_say(folder):
    dataset = chat_dataset(folder)
    assert [len(dataset[i]["images"]) for i in range(3)] == [0, 1, 2]
    assert len(dataset[1]["images"][0].pixels) > 1  # a grid
    # several images: padded, one tile each
    assert [len(image.pixels) for image in dataset[2]["images"]] == [1, 1]
    for i in range(3):
        conversation = turns(f"{TAGS[i]}what is {i}?", i)
        expected = chat.encode_chat(conversation, words(), has_image=i > 0)
        assert dataset[i]["tokens"] == expected
    # up to position 7 the style of stage 1
    plain = chat_dataset(folder, "captions.json", plain=7)
    caption = words().encode("a picture of it\n")
    assert plain[0, 6, 1]["tokens"][0] == [chat.IMAGE_TOKEN, *caption]
    described = chat.encode_chat(turns("<image>\nDescribe.", 1), words())
    assert plain[0, 7, 1]["tokens"] == described
    # strict labels: the same ids, fewer labels
    strict = chat_dataset(folder, strict_labels=True)[1]["tokens"]
    loose = dataset[1]["tokens"]
    assert strict[0] == loose[0]
    assert strict[1].count(chat.IGNORE) > loose[1].count(chat.IGNORE)


def test_batches_are_of_one_modality(folder):
    dataset = chat_dataset(folder)
    dataset.lengths = dataset.source.lengths
    assert dataset.lengths.tolist() == [row["length"] for row in dataset.source.texts()]
    run = dataclasses.replace(
        LLAVA_RECIPES["llava_stage2"][0],
        batch_size=2,
        micro_batch_size=1,
        max_steps=5,
        num_workers=0,
    )
    batches = list(loop.make_loader(dataset, run, World("cpu"), 0, data.collate_conversations))
    has_images = [bool(batch["images"]) for batch in batches]
    assert len(has_images) == 10
    # of 6 rows with pictures and 4 without, the last 2 of each kind come mixed at the end
    for step in range(3):
        assert has_images[2 * step] == has_images[2 * step + 1]
    assert sum(has_images) == 6
    indices = []
    for batch in batches:
        indices += batch["image_index"]
    assert sorted(indices) == list(range(10))


def spliced_labels(item, config):
    """The labels of a row, each placeholder replaced by those of its image tokens."""
    sizes = []
    for image in item["images"]:
        sizes.append(multigrid.count_image_tokens(len(image.pixels), image.size, config))
    labels = []
    ids, given = item["tokens"]
    for token, label in zip(ids, given, strict=True):
        if token == chat.IMAGE_TOKEN:
            labels += [chat.IGNORE] * sizes.pop(0)
        else:
            labels.append(label)
    return labels


def test_too_long_rows_are_cut_not_dropped(folder):
    dataset = chat_dataset(folder)
    model = tiny_model(max_length=25)
    task = train_llava.Chat(model)
    for i in range(3):
        item = dataset[i]
        labels = spliced_labels(item, model.config)
        assert len(labels) > 25
        batch = data.collate_conversations([item])
        assert task(batch)["lm"].isfinite()
        learnt = [label for label in labels[1:25] if label != chat.IGNORE]
        assert task.counts(batch)["lm"] == len(learnt)


def test_what_max_length_cuts_away_is_counted_and_said_once(folder, capsys):
    dataset = chat_dataset(folder)
    task = train_llava.Chat(tiny_model(max_length=8))
    batch = data.collate_conversations([dataset[i] for i in range(6)])
    strict = chat_dataset(folder, strict_labels=True)
    assert task.counts(data.collate_conversations([strict[i] for i in range(6)])) == {"lm": 0}
    task.counts(batch)
    assert capsys.readouterr().err == ""
    task.say_cut()
    task.say_cut()
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "6 of the first 12 conversations have no label left after --max_length 8",
        "8 of the first 12 conversations have not all of their images left after --max_length 8",
    ]
    whole = train_llava.Chat(tiny_model(max_length=2000))
    whole.counts(batch)
    whole.say_cut()
    assert capsys.readouterr().err == ""


def test_it_is_said_early_in_a_long_run(folder, capsys, monkeypatch):
    monkeypatch.setattr(train_llava, "ENOUGH", 5)
    dataset = chat_dataset(folder, strict_labels=True)
    task = train_llava.Chat(tiny_model(max_length=8))
    for _ in range(3):
        task.counts(data.collate_conversations([dataset[i] for i in range(3)]))
    assert capsys.readouterr().err.startswith("6 of the first 6 conversations have no label left")


@pytest.mark.parametrize("manager_type", ["static", "adaptive_last", "adaptive_cross"])
def test_a_batch_without_any_image_left_has_a_loss(manager_type, folder):
    torch.manual_seed(0)
    fields = {**TINY_MLLM, "vocab_size": words().vocab_size, "max_length": 8}
    model = LlavaManager(LlavaManagerConfig.tiny(**fields, manager_type=manager_type))
    items = [chat_dataset(folder)[i] for i in (1, 4)]
    question = turns(f"{'what ' * 20}<image>", 0)
    for item in items:
        item["tokens"] = chat.encode_chat(question, words(), has_image=True)
    loss = train_llava.Chat(model)(data.collate_conversations(items))["lm"]
    assert loss.isfinite()


# ---------------------------------------------------------------- processes
def first_gradients(rank, size, port, folder, micro, out):
    """The losses and gradients of one update of 4 rows, saved by rank 0."""
    torch.set_num_threads(1)
    # the managers' noise, off
    manager.StaticVisualManager.draw = lambda self, scores: torch.full_like(scores, 0.5)
    world = join(rank, port, size) if size > 1 else World("cpu")
    task = train_llava.Chat(tiny_model().double())
    run = dataclasses.replace(
        LLAVA_RECIPES["llava_stage2"][0],
        batch_size=4,
        micro_batch_size=micro,
        max_steps=1,
        num_workers=0,
        seed=1,
    )
    loader = loop.make_loader(chat_dataset(folder), run, world, 0, data.collate_conversations)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    module = loop.wrap(task.train(), run, world)
    means = loop.train_step(task, module, list(loader), 0, run, world, scaler)
    if rank == 0:
        result = {"losses": means}
        for name, parameter in task.model.named_parameters():
            if parameter.grad is not None:
                result[name] = parameter.grad
        torch.save(result, out)


def check_same(path, whole):
    """The losses and gradients in a file equal those of the whole batch in one pass."""
    other = torch.load(path)
    assert other.keys() == whole.keys()
    # cross-entropy is in float32
    assert other["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    for name in whole.keys() - {"losses"}:
        error = (other[name] - whole[name]).norm()
        assert error <= 1e-6 * max(whole[name].norm(), 1e-3), name


@pytest.fixture
def whole(folder, tmp_path, monkeypatch):
    """The losses and gradients of the whole batch in one pass."""
    draw = manager.StaticVisualManager.draw
    monkeypatch.setattr(manager.StaticVisualManager, "draw", draw)  # restored afterwards
    first_gradients(0, 1, 0, folder, 4, tmp_path / "whole.pt")
    return torch.load(tmp_path / "whole.pt")


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulation_changes_nothing(micro, whole, folder, tmp_path):
    """Rows with none, one and two pictures, of different lengths."""
    first_gradients(0, 1, 0, folder, micro, tmp_path / "accumulated.pt")
    check_same(tmp_path / "accumulated.pt", whole)


@pytest.mark.slow
@pytest.mark.parametrize("size,micro", [(2, 1), (3, 2)])
def test_one_process_and_several_agree(size, micro, whole, folder, tmp_path):
    """Two processes accumulate; three take 2, 1 and 1 rows."""
    settings = (size, free_port(), folder, micro, tmp_path / "several.pt")
    run_in_forks(first_gradients, *settings, processes=size)
    check_same(tmp_path / "several.pt", whole)


# ---------------------------------------------------------------- the stages
def test_three_stages(folder, tmp_path):
    start = folder / "start"
    one = tmp_path / "1"
    middle = tmp_path / "1_5"
    two = tmp_path / "2"
    run_stage("llava_stage1", folder, one, "--init", start, data_path="captions.json")
    before = read_weights(start)
    after = read_weights(one)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        "layer_embedding",
        "managers.0.scores",
        "managers.1.scores",
        "projector.0.weight",
        "projector.0.bias",
        "projector.2.weight",
        "projector.2.bias",
    }
    # an epoch: 10 rows, 2 are held out
    assert [row["step"] for row in log_rows(one, "loss")] == [1, 2]
    run_stage("llava_stage1_5", folder, middle, "--init", one, "--grid_pinpoints", PINPOINTS)
    run_stage("llava_stage2", folder, two, "--init", middle, "--max_steps", 12)
    end = read_weights(two)
    for name in (
        "vision.patch.weight",
        "llm.embed.weight",
        "image_newline",
        "projector.0.weight",
        "layer_embedding",
    ):
        assert not torch.equal(after[name], end[name]), name
    aspects = [read_config(out)["aspect"] for out in (one, middle, two)]
    assert aspects == ["square", "anyres", "anyres_max_9"]
    assert read_config(middle)["grid_pinpoints"] == json.loads(PINPOINTS)
    assert len(read_config(two)["grid_pinpoints"]) == 36
    held_out = log_rows(two, "eval")[-1]["eval"]
    untrained = log_rows(two, "baselines")[0]["baselines"]["untrained"]
    assert held_out["loss"] < untrained["loss"]
    names = {path.name for path in two.iterdir()}
    assert {"tokenizer.json", "training_state.pt", "best"} <= names


def test_resumed_equals_uninterrupted(folder, tmp_path, monkeypatch):
    flags = ("--init", folder / "start", "--max_steps", 5, "--save_every", 2)
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    run_stage("llava_stage2", folder, whole, *flags)
    save = loop.Checkpoint.save

    def save_and_die(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpoint, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run_stage("llava_stage2", folder, killed, *flags)
    assert len(losses(killed)) == 2
    run_stage("llava_stage2", folder, killed, *flags)
    ours = read_weights(killed)
    for name, weight in read_weights(whole).items():
        assert torch.equal(weight, ours[name]), name
    assert log_rows(whole, "loss") == log_rows(killed, "loss")


def test_a_run_is_told_apart_by_what_changes_its_batches(folder, tmp_path):
    """A stage's rows are grouped by their lengths, in groups of the micro-batches' size."""
    flags = ("--init", folder / "start", "--max_steps", 1)
    run_stage("llava_stage2", folder, tmp_path, *flags)
    run_stage("llava_stage2", folder, tmp_path, *flags, "--micro_batch_size", 3)  # 2 divides 4
    with pytest.raises(ValueError, match="group_size was 2, is 4"):
        run_stage("llava_stage2", folder, tmp_path, *flags, "--micro_batch_size", 4)
    with pytest.raises(ValueError, match="eval_size was 2, is 3"):
        run_stage("llava_stage2", folder, tmp_path, *flags, "--eval_size", 3)
    with pytest.raises(ValueError, match="lr_vision was 0.01, is 0.1"):
        run_stage("llava_stage2", folder, tmp_path, *flags, "--lr_vision", 0.1)


def test_starts_from_siglip_and_qwen(folder, tmp_path):
    import transformers  # here, as the processes that tests start import this file too

    vision = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text = transformers.Qwen2Config(
        vocab_size=words().vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_theta=1e6,
    )
    siglip = transformers.SiglipVisionModel(vision)
    qwen = transformers.Qwen2ForCausalLM(text)
    siglip.save_pretrained(tmp_path / "siglip")
    qwen.save_pretrained(tmp_path / "qwen")
    words().save(tmp_path / "qwen")
    # as in the released config.json, older than transformers 5
    published = {**text.to_dict(), "rope_theta": 1e6}
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(published))
    flags = ["--vision", tmp_path / "siglip", "--text", tmp_path / "qwen", "--max_steps", 1]
    flags += ["--managed_layers", "1,2", "--inject_layers", "0"]
    out = tmp_path / "out"
    run_stage("llava_stage1", folder, out, *flags, data_path="captions.json")
    ours = read_weights(out)
    assert torch.equal(ours["llm.embed.weight"], qwen.model.embed_tokens.weight)
    convolutions = [m for m in siglip.modules() if isinstance(m, torch.nn.Conv2d)]
    assert torch.equal(ours["vision.patch.weight"], convolutions[0].weight)
    config = read_config(out)
    assert config["manager_type"] == "static"
    assert config["managed_layers"] == [1, 2]
    assert config["inject_layers"] == [0]
    assert config["eos_ids"] == [words().backend.token_to_id("<|im_end|>")]


def test_no_grid_and_no_managers(folder, tmp_path):
    start = save_start(tmp_path / "start", manager_type=None)
    flags = ("--init", start, "--grid", "false", "--manager_type", "none", "--max_steps", 1)
    out = tmp_path / "out"
    run_stage("llava_stage2", folder, out, *flags)
    config = read_config(out)
    assert (config["aspect"], config["merge"]) == ("square", "flat")
    assert config["manager_type"] is None
    for name in read_weights(out):
        assert not name.startswith(train_llava.MANAGERS)


def test_any_size_of_batch_runs(folder, tmp_path):
    flags = ("--init", folder / "start", "--max_steps", 2, "--batch_size", 3)
    run_stage("llava_stage2", folder, tmp_path, *flags)
    assert len(losses(tmp_path)) == 2
    assert all(math.isfinite(loss) for loss in losses(tmp_path))


# ---------------------------------------------------------------- the demo
def run_demo(out, *flags):
    arguments = ["--eval_size", 40, "--out_dir", out, *flags]
    train.main(["--recipe", "llava_demo", *FAST, *[str(argument) for argument in arguments]])


def test_demo_goes_from_captions_to_conversations(tmp_path, monkeypatch):
    styles = []
    encode = chat.encode_chat

    def note_style(conversation, tokenizer, style, *args, **settings):
        styles.append(style)
        return encode(conversation, tokenizer, style, *args, **settings)

    monkeypatch.setattr(data, "encode_chat", note_style)
    run_demo(tmp_path, "--max_steps", 4, "--manager_type", "none")
    captions = int(4 * train_llava.CAPTION_PART) * 4
    assert 0 < captions < 16
    assert styles == ["plain"] * captions + ["qwen_1_5"] * (16 - captions)
    baselines = log_rows(tmp_path, "baselines")[0]["baselines"]
    assert 0.3 < baselines["text_only"]["accuracy"] < 0.55
    assert baselines["untrained"]["accuracy"] < 0.3
    assert log_rows(tmp_path, "eval")[-1]["step"] == 4
    assert weights.load_model(tmp_path).config.manager_type is None


class Echo(torch.nn.Module):
    """Answers with the prompt, but "no" with "not"."""

    def generate(self, ids, mask, images, max_new_tokens):
        end = words().backend.token_to_id("<|im_end|>")
        answers = []
        for row, keep in zip(ids, mask.bool(), strict=True):
            prompt = words().decode(row[keep])
            said = "not" if prompt == "no" else prompt
            answers.append(torch.tensor([*words().encode(said), end]))
        return torch.nn.utils.rnn.pad_sequence(answers, True, end)


@pytest.mark.parametrize("size", [1, 4])
def test_accuracy_counts_exact_answers(size):
    quiz = [(words().encode(word), word, None) for word in ("yes", "no", "red", "left")]
    run = LlavaTrainConfig(batch_size=size, micro_batch_size=size)
    metrics = train_llava.answer_accuracy(Echo(), quiz, words(), run, World("cpu"))
    assert metrics == {"accuracy": 0.75, "score": 0.75}


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "flags,message",
    [
        ("--data_path=", "need --data_path"),
        ("--data_path no.json", "no.json"),
        ("--init=", "either --init"),
        ("--vision .", "either --init"),
        ("--vision . --text .", "either --init"),
        ("--init /nowhere", "nowhere"),
        ("--grid false --aspect pad", "--grid false"),
        ("--eval_size 10", "must be from 1 to 9"),
        ("--eval_size 0", "--eval_size is 0; it must be"),
        ("--manager_type none", "--manager_type None, but --init"),
        ("--manager_type clever", "manager_type is 'clever'"),
        ("--managed_layers 1,2 --manager_type none", "no managers"),
        ("--batch_size 0", "--batch_size is 0; it must be a whole number from 1 to 1048576"),
        ("--lr_vision nan", "--lr_vision is nan; it must be a finite number from 0 on"),
        ("--lr_manager -1", "--lr_manager is -1.0; it must be"),
        ("--hidden_size 64", "--hidden_size 64, but --init .* has 32"),
        ("--tokenizer roberta", "roberta"),
        ("--image_folder nowhere", "--image_folder: there is no folder .*nowhere"),
        ("--data_path start", "start is a folder; it must be a file"),
        (
            "--max_length 3 --strict_labels",
            "none of the 2 held-out conversations has a label left after --max_length 3",
        ),
    ],
)
def test_bad_flags_are_one_sentence(flags, message, folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises((ValueError, OSError), match=message) as error:
        run_stage("llava_stage2", folder, out, "--init", folder / "start", *flags.split())
    assert not isinstance(error.value, FlagError)
    assert len(str(error.value).splitlines()) == 1
    assert not Path(out).exists()


def test_a_bad_row_is_found_at_opening(folder, tmp_path):
    rows = json.loads((folder / "chat.json").read_text())
    for change, message in (
        ({"conversations": [{"from": "bot", "value": "x"}]}, "turn 0: 'from' is 'bot'"),
        ({"video": "a.mp4"}, "videos are not read"),
        ({"image": ["0.png"] * 3, "conversations": turns("<image>", 0)}, "3 images but 1"),
    ):
        rows[3] = {**rows[0], **change}
        (tmp_path / "x.json").write_text(json.dumps(rows))
        flags = ("--init", "nowhere")  # the model comes later
        with pytest.raises(BadSample, match=f"x.json, item 3: .*{message}"):
            run_stage("llava_stage2", tmp_path, tmp_path / "out", *flags, data_path="x.json")


def test_stage_1_wants_captions(folder, tmp_path):
    flags = ("--init", "nowhere")
    with pytest.raises(BadSample, match="chat.json, item 0: stage 1 trains on one picture"):
        run_stage("llava_stage1", folder, tmp_path / "out", *flags)


def test_held_out_conversations_are_never_skipped(folder, tmp_path):
    rows = [row for row in json.loads((folder / "chat.json").read_text()) if "image" in row]
    (tmp_path / "x.json").write_text(json.dumps(rows))  # whose pictures are elsewhere
    flags = ("--init", folder / "start", "--on_bad_sample", "skip")
    with pytest.raises(BadSample, match="no such file.*held-out rows are never skipped: repair"):
        run_stage("llava_stage2", tmp_path, tmp_path / "out", *flags, data_path="x.json")


@pytest.mark.parametrize(
    "flags",
    [
        "--recipe llava_demo --model base",
        "--recipe llava_stage2 --objectives mlm",
        "--recipe demo --strict_labels",
        "--recipe llava_demo --alignment true",
        "--recipe llava_stage1 --im_start_id 5",
        "--recipe llava_stage2 --grid_pinpoints [",
        "--recipe llava_stage2 --managed_layers 1,x",
    ],
)
def test_flags_of_the_other_family_are_refused(flags):
    with pytest.raises(FlagError, match=flags.split()[2]):
        train.main(flags.split())


def test_an_unknown_recipe_of_the_mllm_is_refused():
    with pytest.raises(FlagError, match="--recipe.*llava_stage9.*llava_stage2"):
        train.main(["--recipe", "llava_stage9"])


@pytest.mark.parametrize(
    "flags", [("--data_path", "x.json"), ("--init", "x"), ("--tokenizer", "x")]
)
def test_the_demo_takes_no_data_and_no_start(flags, tmp_path):
    with pytest.raises(ValueError, match=f"{flags[0]} means nothing to llava_demo"):
        run_demo(tmp_path / "out", *flags)


def test_the_demo_has_no_epochs(tmp_path):
    with pytest.raises(ValueError, match="--max_steps is 0, which means one epoch; llava_demo"):
        run_demo(tmp_path / "out", "--max_steps", 0)


def test_a_stage_goes_on_when_its_init_is_gone(folder, tmp_path, capsys):
    init = tmp_path / "start"
    shutil.copytree(folder / "start", init)
    flags = ("--init", init, "--max_steps", 1)
    run_stage("llava_stage2", folder, tmp_path / "run", *flags)
    weights_file = tmp_path / "run" / "model.safetensors"
    content = weights_file.read_bytes()
    shutil.rmtree(init)
    weights_file.unlink()
    run_stage("llava_stage2", folder, tmp_path / "run", *flags)
    assert "is finished: 1 of 1 steps" in capsys.readouterr().out
    assert weights_file.read_bytes() == content
    with pytest.raises(ValueError, match="start"):
        run_stage("llava_stage2", folder, tmp_path / "other", *flags)
