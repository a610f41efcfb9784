"""ask.py: one picture = a batch, a search = every picture alone, conversations, and the errors of
the command line.
"""

import io
import json
import math
import os
import sys

import pytest
import torch
from helpers import run_script, save_tiny_mllms, save_tiny_towers
from PIL import Image

import ask
import chat
import data
import images
import multigrid
import scenes
from ask import ChatOptions, MatchOptions, QuestionOptions, SearchOptions
from eval import predict
from fields import FlagError
from tokenizer import load_tokenizer
from weights import load_mllm, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of random tiny models: vqa, nlvr2, snli_ve, retrieval, itm; and nine pictures."""
    return save_tiny_towers(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    """Folders of tiny models with static and with adaptive managers, and a picture."""
    return save_tiny_mllms(tmp_path_factory.mktemp("mllm"))


def run(*flags):
    ask.main([str(flag) for flag in flags])


def ask_question(folder, image, question, top=5):
    return ask.question(QuestionOptions(str(folder / "vqa"), str(image), question, top))


# ---------------------------------------------------------------- question
def test_a_question_alone_is_answered_as_in_a_batch(folder, capsys):
    dataset = data.PairDataset(
        scenes.demo_source("questions", "heldout", 10),
        load_tokenizer(folder / "vqa"),
        images.image_transform("albef", 32, False),
        16,
        answers=scenes.DEMO_ANSWERS,
    )
    predictions = predict(load_model(folder / "vqa"), dataset, "vqav2", batch_size=9)
    for i in range(9):
        row = dataset.source[i]
        row["images"][0].save(folder / "one.png")
        found = ask_question(folder, folder / "one.png", row["text"], top=4)
        assert found[0][0] == scenes.DEMO_ANSWERS[predictions[i].choice]
        assert sorted((p for _, p in found), reverse=True) == [p for _, p in found]
        assert len(found) == 4
    assert capsys.readouterr().out.count("%") == 36
    ask_question(folder, folder / "one.png", "is there a red circle " * 9)
    assert "was cut to the model's text length 16" in capsys.readouterr().out


def test_unusual_pictures(folder, tmp_path):
    """16-bit, CMYK and animated pictures give the answer of their plain 8-bit form."""
    gray = Image.linear_gradient("L").resize((40, 30))
    gray.save(tmp_path / "plain.png")
    gray.convert("I").point(lambda v: v * 257).convert("I;16").save(tmp_path / "sixteen.png")
    Image.new("RGB", (40, 30), (200, 30, 90)).save(tmp_path / "flat.png")
    Image.new("CMYK", (40, 30), (55, 225, 165, 0)).save(tmp_path / "cmyk.tiff")
    frames = [Image.new("RGB", (40, 30), (200, 30, 90)), Image.new("RGB", (40, 30), "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    answers = {}
    for file in list(tmp_path.iterdir()):
        answers[file.stem] = ask_question(folder, file, "is there a circle?")
    for name, plain in (("sixteen", "plain"), ("cmyk", "flat"), ("moving", "flat")):
        assert [a for a, _ in answers[name]] == [a for a, _ in answers[plain]]
        probabilities = [p for _, p in answers[plain]]
        assert [p for _, p in answers[name]] == pytest.approx(probabilities, abs=1e-3)


# ---------------------------------------------------------------- match
def test_texts_together_match_as_each_alone(folder):
    picture = str(folder / "pictures" / "0.png")
    texts = ["a red circle", "two blue squares"]
    together = ask.match(MatchOptions(str(folder / "retrieval"), picture, texts))
    for text, (_, itm, itc) in zip(texts, together, strict=True):
        alone = ask.match(MatchOptions(str(folder / "retrieval"), picture, [text]))
        assert len(alone) == 1
        assert alone[0][1:] == pytest.approx((itm, itc), abs=1e-5)
        assert 0 < itm < 1 and -1 <= itc <= 1


def test_without_an_itc_head_its_column_is_left_out(folder, capsys):
    flags = ("--checkpoint", folder / "itm", "--image", folder / "pictures" / "0.png")
    run("match", *flags, "--text", "a red circle", "--text", "two blue squares")
    out = capsys.readouterr().out
    assert "nan" not in out and "ITC  " not in out and "no ITC head" in out
    assert out.count("ITM ") == 2
    found = ask.match(MatchOptions(str(flags[1]), str(flags[3]), ["a red circle"]))
    assert math.isnan(found[0][2])
    capsys.readouterr()
    with_head = ("--checkpoint", folder / "retrieval", *flags[2:], "--text", "a red circle")
    run("match", *with_head)
    assert "ITC " in capsys.readouterr().out


# ---------------------------------------------------------------- search
def test_a_search_ranks_as_every_picture_alone(folder, tmp_path, capsys):
    checkpoint = str(folder / "retrieval")
    pictures = folder / "pictures"
    (pictures / "broken.png").write_text("no picture")
    sheet = tmp_path / "sheet.png"
    options = SearchOptions(checkpoint, "a red circle", str(pictures), 5, str(sheet), batch_size=4)
    found = ask.search(options)
    (pictures / "broken.png").unlink()
    assert "left out" in capsys.readouterr().out
    assert Image.open(sheet).size == (4 * 224, 2 * 240)
    model = load_model(checkpoint).eval()
    logits = {}
    for file in pictures.iterdir():
        batch = ask.open_picture(checkpoint, "itm", str(file), ["a red circle"], "cpu")[1]
        with torch.no_grad():
            logits[file] = model.heads["itm"](model(**batch).pooled)[0, 1].item()
    assert [file for _, file in found] == sorted(logits, key=logits.get, reverse=True)[:5]
    best = sorted(logits.values(), reverse=True)[:5]
    assert [score for score, _ in found] == pytest.approx(best, abs=1e-5)


def test_a_narrow_terminal_loses_no_result(folder, tmp_path, monkeypatch):
    """Names that it cannot show, and names that are not even UTF-8."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (40, 30), "red").save(pictures / "\u706b.png")
    Image.new("RGB", (40, 30), "blue").save(os.fsencode(pictures) + b"/\xff.png")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    flags = ("--text", "a red circle", "--folder", pictures, "--out", tmp_path / "found.png")
    run("search", "--checkpoint", folder / "retrieval", *flags)
    terminal.flush()
    printed = terminal.buffer.getvalue().decode("ascii")
    assert "pictures/?.png" in printed and "found.png" in printed
    assert Image.open(tmp_path / "found.png").size == (2 * 224, 240)


# ---------------------------------------------------------------- chat
def answers_of(mllm, conversation):
    """What the model says to the user's lines, by the pieces of a prompt."""
    model = load_model(mllm / "static").eval()
    tokenizer = load_tokenizer(mllm / "static")
    image = multigrid.preprocess_image(Image.open(mllm / "a.png"), model.config)
    turns = []
    for line in conversation:
        turns.append(line)
        ids = chat.encode_prompt(turns, tokenizer, 1)
        new = model.generate(torch.tensor([ids]), images=[image], max_new_tokens=4)[0]
        turns.append(tokenizer.decode(new).strip())
    return turns[1::2]


def chat_flags(mllm):
    files = ("--checkpoint", mllm / "static", "--image", mllm / "a.png")
    return ("chat", *files, "--max_new_tokens", 4)


def type_lines(monkeypatch, *lines):
    """The user types these, and then nothing more."""
    left = list(lines)

    def read(prompt):
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", read)
    return left


def test_chat(mllm, monkeypatch, capsys):
    assert not load_mllm(str(mllm / "static")).model.training  # managers are noisy in training
    questions = ["is there a red circle?", "where is it?"]
    first, second = answers_of(mllm, questions)
    run(*chat_flags(mllm), "--question", questions[0])
    assert capsys.readouterr().out == first + "\n"
    type_lines(monkeypatch, *questions)
    run(*chat_flags(mllm))
    assert capsys.readouterr().out == f"{first}\n{second}\n"
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="the question is empty"):
            run(*chat_flags(mllm), "--question", empty)


def test_chat_runs_in_evaluation_mode(mllm, monkeypatch, capsys):
    """Whatever mode the model comes in."""

    def load_training(*settings):
        loaded = load_mllm(*settings)
        loaded.model.train()
        return loaded

    monkeypatch.setattr(ask, "load_mllm", load_training)
    run(*chat_flags(mllm), "--question", "is there a red circle?")
    assert capsys.readouterr().out == answers_of(mllm, ["is there a red circle?"])[0] + "\n"


@pytest.mark.parametrize("blank", ["", " ", "\t "])
def test_a_blank_line_ends_a_conversation(mllm, monkeypatch, capsys, blank):
    left = type_lines(monkeypatch, "is there a red circle?", blank, "where is it?")
    options = ChatOptions(str(mllm / "static"), [str(mllm / "a.png")], max_new_tokens=4)
    turns = ask.chat(options)
    assert len(turns) == 2 and left == ["where is it?"]
    assert capsys.readouterr().err == ""


def test_a_slip_does_not_end_a_conversation(mllm, monkeypatch, capsys):
    """A placeholder without a picture; the next line is read as if it had not been."""
    questions = ["is there a red circle?", "where is it?"]
    type_lines(monkeypatch, questions[0], "and in <image>?", questions[1])
    run(*chat_flags(mllm))
    captured = capsys.readouterr()
    assert captured.out.splitlines() == answers_of(mllm, questions)
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_a_picture_that_cannot_be_read_ends_a_conversation_at_once(mllm, monkeypatch):
    left = type_lines(monkeypatch, "what is it?")
    with pytest.raises(ValueError, match="nowhere.png: no such file"):
        run("chat", "--checkpoint", mllm / "static", "--image", "nowhere.png")
    assert left == ["what is it?"]


# ---------------------------------------------------------------- the command line
ONE = ("--image", "pictures/0.png", "--question", "q")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("frobnicate",), "no command 'frobnicate'; it must be one of question, match"),
        ((), "needs a command, one of question, match, search, chat"),
        (
            ("question", "--checkpoint", "vqa", "--image", "nowhere.png", "--question", "q"),
            "nowhere.png: no such file",
        ),
        (
            ("question", "--checkpoint", "vqa", "--image", "vqa/config.json", "--question", "q"),
            "not a readable image",
        ),
        (
            ("question", "--checkpoint", "vqa", "--image", "pictures/0.png", "--question", " "),
            "the text is empty",
        ),
        (("question", "--checkpoint", "itm", *ONE), "has no vqa head"),
        (("question", "--checkpoint", "vqa", *ONE, "--top", "0"), "--top is 0; it must be"),
        (
            ("search", "--checkpoint", "itm", "--folder", "vqa", "--text", "q"),
            "no readable picture in vqa",
        ),
        (
            (
                *("search", "--checkpoint", "nowhere", "--folder", "vqa", "--text", "q"),
                *("--out", "nothing/x.png"),
            ),
            "--out nothing/x.png cannot be written: there is no folder nothing",
        ),
        (("chat", "--checkpoint", "vqa", "--question", "q"), "not a LLaVA-OV-Manager"),
        (
            ("chat", "--checkpoint", "vqa", "--question", "q", "--temperature", "nan"),
            "--temperature is nan",
        ),
    ],
)
def test_what_is_wrong_is_said(folder, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        run(*flags)


def test_unknown_flags_and_types_are_refused():
    for flags, message in (
        ("question --colour x", "required"),
        ("question --checkpoint x --image y --question z --colour w", "unrecognized"),
        ("question --checkpoint x --image y --question z --top many", "invalid int value"),
    ):
        with pytest.raises(FlagError, match=message):
            run(*flags.split())


def test_help_lists_the_commands_and_their_flags(capsys):
    run("-h")
    page = capsys.readouterr().out
    for name, command in ask.COMMANDS.items():
        assert f"  {name} " in page and ask.describe(command).splitlines()[0] in page
        with pytest.raises(SystemExit):
            run(name, "-h")
        flags = capsys.readouterr().out
        for field in command.options.__dataclass_fields__:
            assert f"--{field} " in flags


@pytest.mark.slow
def test_the_script_ends_in_one_sentence(folder):
    picture = folder / "pictures" / "0.png"
    flags = ("--checkpoint", folder / "vqa", "--image", picture, "--question", "is it red?")
    done = run_script("ask.py", "question", *flags)
    assert done.returncode == 0 and done.stdout.count("%") == 5
    done = run_script("ask.py", "frobnicate")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ask.py has no command 'frobnicate'")
    assert json.loads((folder / "vqa" / "answers.json").read_text()) == scenes.DEMO_ANSWERS
