"""train_llava.py: groups, schedule and loss equal the official ones; one process = two = accumulation; the stages on
files through the command line, resumed = uninterrupted; the demo; errors."""
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
import transformers
from PIL import Image
from safetensors.torch import load_file
from test_llava import LOV, golden_inputs, golden_model, read
from test_train import free_port, rows

import chat
import data
import files
import llava_manager
import loop
import multigrid
import tokenizer
import train
import train_llava
import weights
from train_llava import LLAVA_RECIPES
from world import World

TINY = {"image_size": 16, "patch_size": 8, "vision_width": 16, "vision_layers": 3, "vision_heads": 2,
        "vision_mlp_width": 32, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 32,
        "managed_layers": (1, 2), "inject_layers": (0, 1), "max_length": 120}
FAST = ("--batch_size 4 --micro_batch_size 2 --num_workers 0 --log_every 1 --eval_every 0 --eval_size 2 "
        "--learning_rate 1e-2 --lr_manager 1e-2 --lr_vision 1e-2").split()
PINPOINTS = "[[16,32],[32,16],[32,32],[48,16],[16,48]]"  # stage 1.5's for tiles of 16 pixels
TAGS = "", "<image>\n", "<image> <image>\n"


def tokenizer():
    return tokenizer.load_tokenizer(LOV / "chat")


def tiny_model(**fields):
    torch.manual_seed(0)
    model = llava_manager.LlavaManager(llava_manager.LlavaManagerConfig.tiny(**{**TINY, "vocab_size": tokenizer().vocab_size, **fields}))
    for manager in model.managers:
        torch.nn.init.normal_(manager.scores, std=0.5)
    return model


def save_start(folder, **fields):
    weights.save_model(tiny_model(aspect="square", merge="flat", **fields), folder)
    tokenizer().save(folder)
    return folder


def turns(question, i):
    answer = f"a picture{' of it' * (i % 4)}"
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """chat.json: 10 rows with no, one, two pictures in turn; captions.json; start/: a tiny checkpoint."""
    folder, random, chats = tmp_path_factory.mktemp("llava"), np.random.default_rng(0), []
    for i in range(10):
        pixels = random.integers(0, 255, (12 + 5 * i, 40 - 2 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images = ({}, {"image": f"{i}.png"}, {"image": [f"{i}.png", "0.png"]})[i % 3]
        chats.append({"id": str(i), **images, "conversations": turns(f"{TAGS[i % 3]}what is {i}?", i)})
    captions = [{"image": f"{i}.png", "conversations": turns("<image>\nDescribe.", i)} for i in range(10)]
    (folder / "chat.json").write_text(json.dumps(chats))
    (folder / "captions.json").write_text(json.dumps(captions))
    save_start(folder / "start")
    return folder


def run_main(recipe, files, out, *flags, data_path="chat.json"):
    where = ["--data_root", files, "--data_path", data_path, "--out_dir", out]
    train.main(["--recipe", recipe, *FAST, *map(str, [*where, *flags])])


# ---------------------------------------------------------------- the official numbers


def official_rates(model, run):
    """{official name: [learning rate, weight decay]}; each parameter in one group only."""
    names, rates = {id(p): name for name, p in model.named_parameters()}, {}
    for group in train_llava.llava_groups(model, run):
        for parameter in group["params"]:
            for name in weights.to_official({names[id(parameter)]: parameter}, model.config):
                assert name not in rates
                rates[name] = [group["peak_lr"], group["weight_decay"]]
    return rates


def full_size(recipe, monkeypatch, **fields):
    """The 0.5B model, on the meta device, as `recipe` trains it."""
    with torch.device("meta"):
        start = llava_manager.LlavaManager(llava_manager.LlavaManagerConfig.base(**fields))
    monkeypatch.setattr(lm, "load_model", lambda folder: start)
    run, own = LLAVA_RECIPES[recipe]
    return train_llava.make_llava(dataclasses.replace(run, init="start"), own, tokenizer())


def without_dead(rates):
    return {name: rate for name, rate in rates.items() if "post_layernorm" not in name}  # never has a gradient


@pytest.mark.parametrize("file,recipe", [
    ("stage1_manager", "llava_stage1"), ("stage1p5_and_2_manager_grid", "llava_stage1_5"),
    ("stage1p5_and_2_manager_grid", "llava_stage2")])
def test_groups_equal_the_official_ones(file, recipe, monkeypatch):
    if not (LOV / "optim" / f"{file}.json").exists():
        pytest.skip("this golden set has no such groups")
    golden, run = read(f"optim/{file}.json"), LLAVA_RECIPES[recipe][0]
    assert official_rates(full_size(recipe, monkeypatch), run) == without_dead(golden["params_lr_wd"])
    assert [0.9, run.beta2] == golden["betas"] and (run.grad_clip, run.batch_size, run.schedule) == (1, 512, "cosine")
    if run.alignment:
        baseline = official_rates(full_size(recipe, monkeypatch, manager_type=None), run)
        assert sorted(baseline) == read("optim/schedule_and_notes.json")["baseline_stage1_trainable"]


def test_decay_split_equals_the_official_one(monkeypatch):
    if not (LOV / "optim" / "decay_split_example_wd0p1_adaptive_cross.json").exists():
        pytest.skip("this golden set has no decay split")
    official = without_dead(read("optim/decay_split_example_wd0p1_adaptive_cross.json")["params_lr_wd"])
    run = dataclasses.replace(LLAVA_RECIPES["llava_stage2"][0], weight_decay=0.1)
    rates = official_rates(full_size("llava_stage2", monkeypatch, manager_type="adaptive_cross"), run)
    assert {name: rates[name] for name in official} == official


def test_schedule_equals_the_official_one():
    for steps, golden in read("optim/schedule_and_notes.json")["schedules"].items():
        run = dataclasses.replace(LLAVA_RECIPES["llava_stage2"][0], max_steps=int(steps))
        optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "peak_lr": 3.0}])
        for step, factor in golden["lr_factor_by_step"].items():
            loop.set_learning_rate(optimizer, run, int(step))
            assert optimizer.param_groups[0]["lr"] == pytest.approx(3 * factor, abs=1e-12)


@pytest.mark.parametrize("case", ["c04_a9_31x300_multiturn", "c11_a9_batch_img_text", "c14_plain_square_batch",
                                  "c16_a9_trunc_31x300"])
def test_loss_equals_the_official_one(case):
    task = train_llava.Chat(golden_model("static_all", case))
    batch = {**golden_inputs(case, task.model.config), "image_index": [0]}
    loss = task(batch)["lm"].item() / task.counts(batch)["lm"]
    assert abs(loss - read("tiny/info_static_all.json")["cases"][case]["loss"]) < 2e-5


def test_stages_prepare_images_as_the_paper():
    one, middle, two = (llava_manager.LlavaManagerConfig.base(**LLAVA_RECIPES[f"llava_stage{s}"][1]) for s in ("1", "1_5", "2"))
    assert (one.aspect, one.merge, one.max_length) == ("square", "flat", 8192)
    assert (middle.aspect, middle.merge, middle.max_length) == ("anyres", "spatial_unpad", 16384)
    assert [list(size) for size in middle.grid_pinpoints] == read("preprocess/real_size_grids.json")["pins_anyres"]
    assert (two.aspect, two.merge, two.max_length, len(two.grid_pinpoints)) == (
        "anyres_max_9", "spatial_unpad", 16384, 36)


# ---------------------------------------------------------------- data


def chat_dataset(folder, path="chat.json", **kwargs):
    source = data.open_chat(folder / path)
    return data.ChatDataset(source, range(len(source)), tiny_model().config, tokenizer=tokenizer(), **kwargs)


def test_rows_are_encoded_as_stage_and_images_say(files):
    dataset = chat_dataset(files)
    assert [len(dataset[i]["images"]) for i in range(3)] == [0, 1, 2]
    assert len(dataset[1]["images"][0].pixels) > 1  # a grid
    assert [len(image.pixels) for image in dataset[2]["images"]] == [1, 1]  # several images: padded, one tile each
    for i in range(3):
        expected = chat.encode_chat(turns(f"{TAGS[i]}what is {i}?", i), tokenizer(), has_image=i > 0)
        assert dataset[i]["tokens"] == expected
    plain = chat_dataset(files, "captions.json", plain=7)
    assert plain[0, 6, 1]["tokens"][0] == [chat.IMAGE_TOKEN, *tokenizer().encode("a picture of it\n")]
    assert plain[0, 7, 1]["tokens"] == chat.encode_chat(turns("<image>\nDescribe.", 1), tokenizer())
    strict, loose = chat_dataset(files, strict_labels=True)[1]["tokens"], dataset[1]["tokens"]
    assert strict[0] == loose[0] and strict[1].count(chat.IGNORE) > loose[1].count(chat.IGNORE)


def test_images_that_do_not_fit_the_turns_raise(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    chat = [{"from": "gpt", "value": "<image> hello"}, *turns("hi", 0)]  # a leading gpt turn is not trained on
    rows_ = [{"image": "a.png", "conversations": chat}, {"conversations": chat[1:]}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    with pytest.raises(files.BadSample, match=r"chat.jsonl, line 1: 1 images, but 0 <image> in the turns"):
        chat_dataset(tmp_path, "chat.jsonl")[0]
    with pytest.raises(files.BadSample, match=r"chat.jsonl, line 2: style plain needs"):
        chat_dataset(tmp_path, "chat.jsonl", plain=2)[1]
    assert chat_dataset(tmp_path, "chat.jsonl", on_bad_sample="skip")[0]["images"] == []  # the next row


def test_batches_are_of_one_modality(files):
    dataset = chat_dataset(files)
    dataset.lengths = [row["length"] for row in dataset.source.texts()]
    run = dataclasses.replace(LLAVA_RECIPES["llava_stage2"][0], batch_size=2, micro_batch_size=1, max_steps=5,
                              num_workers=0)
    batches = list(loop.make_loader(dataset, run, World("cpu"), 0, data.collate_conversations))
    kinds = [[bool(batch["images"]) for batch in batches[i : i + 2]] for i in range(0, 10, 2)]
    # of 6 rows with pictures and 4 without, the last 2 of each kind come mixed at the end
    assert all(a == b for a, b in kinds[:3]) and sum(map(sum, kinds)) == 6
    assert sorted(i for batch in batches for i in batch["image_index"]) == list(range(10))


def test_too_long_rows_are_cut_not_dropped(files):
    dataset, model = chat_dataset(files), tiny_model(max_length=25)
    for i in range(3):
        item, (ids, labels) = dataset[i], dataset[i]["tokens"]
        sizes = iter([multigrid.count_image_tokens(len(image.pixels), image.size, model.config) for image in item["images"]])
        spliced = [x for token, label in zip(ids, labels)
                   for x in ([label] if token != chat.IMAGE_TOKEN else [chat.IGNORE] * next(sizes))]
        task, batch = train_llava.Chat(model), data.collate_conversations([item])
        assert len(spliced) > 25 and task(batch)["lm"].isfinite()
        assert task.counts(batch)["lm"] == sum(label != chat.IGNORE for label in spliced[1:25])


# ---------------------------------------------------------------- processes


def first_gradients(rank, world_size, port, files, micro, out):
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    lm.StaticVisualManager.draw = lambda self, scores: torch.full_like(scores, 0.5)  # the managers' noise, off
    world, task, dataset = World("cpu"), train_llava.Chat(tiny_model().double()), chat_dataset(files)
    run = dataclasses.replace(LLAVA_RECIPES["llava_stage2"][0], batch_size=4, micro_batch_size=micro, max_steps=1,
                              num_workers=0, seed=1)
    batches = list(loop.make_loader(dataset, run, world, 0, data.collate_conversations))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = loop.train_step(task.train(), loop.wrap(task, run, world), batches, 0, run, world, scaler)
    if rank == 0:
        gradients = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
        torch.save({"losses": losses, **gradients}, out)


def test_one_process_two_processes_and_accumulation_agree(files, tmp_path, monkeypatch):
    """Rows with none, one and two pictures, of different lengths."""
    monkeypatch.setattr(lm.StaticVisualManager, "draw", lm.StaticVisualManager.draw)  # restored afterwards
    first_gradients(0, 1, 0, files, 4, tmp_path / "whole.pt")
    first_gradients(0, 1, 0, files, 1, tmp_path / "accumulated.pt")
    torch.multiprocessing.spawn(first_gradients, (2, free_port(), files, 1, tmp_path / "two.pt"), nprocs=2)
    whole = torch.load(tmp_path / "whole.pt")
    for name in ("accumulated", "two"):
        other = torch.load(tmp_path / f"{name}.pt")
        assert other.pop("losses") == pytest.approx(whole["losses"], rel=1e-6)  # cross-entropy is in float32
        for key, grad in other.items():
            assert (grad - whole[key]).norm() <= 1e-6 * max(whole[key].norm(), 1e-3), key


# ---------------------------------------------------------------- the stages, through the command line


def weights(folder):
    return load_file(folder / "model.safetensors")


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_three_stages(files, tmp_path):
    one, middle, two = (tmp_path / stage for stage in ("1", "1_5", "2"))
    run_main("llava_stage1", files, one, "--init", files / "start", data_path="captions.json")
    before, after = weights(files / "start"), weights(one)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"layer_embedding", "managers.0.scores", "managers.1.scores", "projector.0.weight",
                       "projector.0.bias", "projector.2.weight", "projector.2.bias"}
    assert [row["step"] for row in rows(one, "loss")] == [1, 2]  # an epoch: 10 rows, 2 are held out
    run_main("llava_stage1_5", files, middle, "--init", one, "--grid_pinpoints", PINPOINTS)
    run_main("llava_stage2", files, two, "--init", middle, "--max_steps", 12)
    end = weights(two)
    for name in ("vision.patch.weight", "llm.embed.weight", "image_newline", "projector.0.weight", "layer_embedding"):
        assert not torch.equal(after[name], end[name]), name
    assert [config(folder)["aspect"] for folder in (one, middle, two)] == ["square", "anyres", "anyres_max_9"]
    assert config(middle)["grid_pinpoints"] == json.loads(PINPOINTS) and len(config(two)["grid_pinpoints"]) == 36
    held_out, untrained = rows(two, "eval")[-1]["eval"], rows(two, "baselines")[0]["baselines"]["untrained"]
    assert held_out["loss"] < untrained["loss"]
    assert {"tokenizer.json", "training_state.pt", "best"} <= {path.name for path in two.iterdir()}


def test_resumed_equals_uninterrupted(files, tmp_path, monkeypatch):
    flags = ("--init", files / "start", "--max_steps", 5, "--save_every", 2)
    run_main("llava_stage2", files, tmp_path / "whole", *flags)
    save = loop.Checkpoint.save

    def save_and_die(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run_main("llava_stage2", files, tmp_path / "killed", *flags)
    monkeypatch.setattr(loop.Checkpoint, "save", save)
    run_main("llava_stage2", files, tmp_path / "killed", *flags)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert rows(tmp_path / "whole", "loss") == rows(tmp_path / "killed", "loss")


def test_starts_from_siglip_and_qwen(files, tmp_path):
    vision = transformers.SiglipVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                                             num_attention_heads=2, image_size=16, patch_size=8)
    text = transformers.Qwen2Config(vocab_size=tokenizer().vocab_size, hidden_size=32, intermediate_size=32,
                                    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                    tie_word_embeddings=True, rope_theta=1e6)
    siglip, qwen = transformers.SiglipVisionModel(vision), transformers.Qwen2ForCausalLM(text)
    siglip.save_pretrained(tmp_path / "siglip")
    qwen.save_pretrained(tmp_path / "qwen")
    tokenizer().save(tmp_path / "qwen")
    published = {**text.to_dict(), "rope_theta": 1e6}  # as in the released config.json, older than transformers 5
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(published))
    run_main("llava_stage1", files, tmp_path / "out", "--vision", tmp_path / "siglip", "--text", tmp_path / "qwen",
             "--max_steps", 1, "--managed_layers", "1,2", "--inject_layers", "0", data_path="captions.json")
    ours = weights(tmp_path / "out")
    assert torch.equal(ours["llm.embed.weight"], qwen.model.embed_tokens.weight)
    patch = next(module for module in siglip.modules() if isinstance(module, torch.nn.Conv2d))
    assert torch.equal(ours["vision.patch.weight"], patch.weight)
    got = config(tmp_path / "out")
    assert (got["manager_type"], got["managed_layers"], got["inject_layers"]) == ("static", [1, 2], [0])
    assert got["eos_ids"] == [tokenizer().backend.token_to_id("<|im_end|>")]


def test_no_grid_and_no_managers(files, tmp_path):
    start = save_start(tmp_path / "start", manager_type=None)
    flags = ("--init", start, "--grid", "false", "--manager_type", "none", "--max_steps", 1)
    run_main("llava_stage2", files, tmp_path / "out", *flags)
    got = config(tmp_path / "out")
    assert (got["aspect"], got["merge"], got["manager_type"]) == ("square", "flat", None)
    assert not [name for name in weights(tmp_path / "out") if name.startswith(train_llava.MANAGERS)]


# ---------------------------------------------------------------- the demo


def run_demo(out, *flags):
    train.main(["--recipe", "llava_demo", *FAST, "--eval_size", "40", "--out_dir", str(out), *map(str, flags)])


def test_demo_goes_from_captions_to_conversations(tmp_path, monkeypatch):
    styles, encode = [], chat.encode_chat
    monkeypatch.setattr(lm, "encode_chat", lambda chat, tokenizer, style, *args, **kwargs: (
        styles.append(style) or encode(chat, tokenizer, style, *args, **kwargs)))
    run_demo(tmp_path, "--max_steps", 4, "--manager_type", "none")
    captions = int(4 * train_llava.CAPTION_PART) * 4
    assert 0 < captions < 16 and styles == ["plain"] * captions + ["qwen_1_5"] * (16 - captions)
    known = rows(tmp_path, "baselines")[0]["baselines"]
    assert 0.3 < known["text_only"]["accuracy"] < 0.55 and known["untrained"]["accuracy"] < 0.3
    assert rows(tmp_path, "eval")[-1]["step"] == 4 and weights.load_model(tmp_path).config.manager_type is None


def test_accuracy_counts_exact_answers():
    words, said = ["yes", "no", "red", "left"], {"yes": "yes", "no": "not", "red": "red", "left": "left"}
    quiz = [(tokenizer().encode(word), word, None) for word in words]

    class Echo(torch.nn.Module):
        def generate(self, ids, mask, images, max_new_tokens):
            end = tokenizer().backend.token_to_id("<|im_end|>")
            prompts = [tokenizer().decode(row[keep]) for row, keep in zip(ids, mask.bool())]
            answers = [torch.tensor([*tokenizer().encode(said[prompt]), end]) for prompt in prompts]
            return torch.nn.utils.rnn.pad_sequence(answers, True, end)

    for size in (1, 4):
        run = dataclasses.replace(LLAVA_RECIPES["llava_demo"][0], batch_size=size, micro_batch_size=size)
        assert train_llava.answer_accuracy(Echo(), quiz, tokenizer(), run, World("cpu"))["accuracy"] == 0.75


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("flags,message", [
    ("--data_path=", "need --data_path"), ("--data_path no.json", "no.json"), ("--init=", "either --init"),
    ("--vision x", "either --init"), ("--vision x --text y", "either --init"), ("--init /nowhere", "nowhere"),
    ("--grid false --aspect pad", "--grid false"), ("--eval_size 10", "must be from 1 to 9"),
    ("--manager_type none", "--manager_type None, but --init"), ("--manager_type clever", "manager_type is 'clever'"),
    ("--managed_layers 1,2 --manager_type none", "no managers"), ("--batch_size 3", "multiple"),
    ("--hidden_size 64", "--hidden_size 64, but --init .* has 32"), ("--tokenizer roberta", "roberta")])
def test_bad_flags_are_one_sentence(flags, message, files, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        run_main("llava_stage2", files, tmp_path / "out", "--init", files / "start", *flags.split())
    assert not Path(tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["--recipe llava_demo --model base", "--recipe llava_stage2 --objectives mlm",
                                   "--recipe demo --strict_labels", "--recipe llava_demo --alignment true"])
def test_flags_of_the_other_family_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        train.main(flags.split())
    assert flags.split()[2] in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--data_path", "x.json"), ("--init", "x"), ("--tokenizer", "x")])
def test_the_demo_takes_no_data_and_no_start(flags, tmp_path):
    with pytest.raises(ValueError, match=f"{flags[0]} means nothing to llava_demo"):
        run_demo(tmp_path / "out", *flags)
