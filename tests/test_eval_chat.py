"""eval_chat.py and eval_lmms.py: a batch = one by one, two processes = one, an evaluation that was
killed goes on, and the errors of question files.
"""

import itertools
import json
import sys

import pytest
import torch
from helpers import free_port, join, run_in_forks, save_tiny_mllms, write_records
from PIL import Image

import ask
import eval
import eval_chat
import eval_lmms
import scenes
from eval_lmms import Request
from weights import load_mllm, load_model, save_model


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    """A tiny MLLM, questions about one picture, two, and none, and a prompt that is too long."""
    torch.manual_seed(0)
    root = save_tiny_mllms(tmp_path_factory.mktemp("mllm"))
    model = load_model(root / "static")
    with torch.no_grad():
        for parameter in model.parameters():  # so that answers differ from question to question
            parameter += 0.3 * torch.randn_like(parameter)
    save_model(model, root / "static")
    source = scenes.demo_source("questions", "heldout", 6)
    records = []
    for number in range(6):
        row = source[number]
        row["images"][0].save(root / f"{number}.png")
        record = {"question": row["text"], "image": f"{number}.png", "answers": ["red", "blue"]}
        records.append(record)
    records[1]["category"] = "colours"
    records[2]["images"] = ["0.png", records[2].pop("image")]
    del records[3]["image"]
    records[4]["question"] = "is there a red circle " * 2000
    write_records(root / "q.jsonl", records)
    return root


def run(mllm, out, *flags):
    common = ["--checkpoint", mllm / "static", "--questions", mllm / "q.jsonl", "--out_dir", out]
    common += ["--metric", "vqa_accuracy", "--max_new_tokens", "6", "--device", "cpu"]
    eval.main(["chat_task", *[str(flag) for flag in (*common, *flags)]])
    return (out / "predictions.jsonl").read_text()


def two_processes(rank, mllm, out, port):
    join(rank, port)
    run(mllm, out, "--batch_size", "2")


def test_any_batch_size_and_number_of_processes_give_the_same_file(mllm, tmp_path, capsys):
    alone = run(mllm, tmp_path / "alone", "--batch_size", "1")
    assert "1 prompts are longer than max_length" in capsys.readouterr().out
    assert run(mllm, tmp_path / "batch", "--batch_size", "16") == alone
    run_in_forks(two_processes, mllm, tmp_path / "two", free_port(), processes=2)
    assert (tmp_path / "two" / "predictions.jsonl").read_text() == alone
    rows = [json.loads(line) for line in alone.splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [("too_long" in row) for row in rows] == [False] * 4 + [True, False]
    assert json.loads((tmp_path / "two" / "scores.json").read_text())["count"] == 6
    assert len({row["prediction"] for row in rows}) > 2


def test_an_answer_is_that_of_ask(mllm, tmp_path):
    rows = [json.loads(line) for line in run(mllm, tmp_path / "o").splitlines()]
    question = json.loads((mllm / "q.jsonl").read_text().splitlines()[0])["question"]
    options = ask.ChatOptions(
        str(mllm / "static"), [str(mllm / "0.png")], question, max_new_tokens=6, device="cpu"
    )
    assert ask.chat(options)[1] == rows[0]["prediction"]


def test_a_killed_evaluation_answers_only_what_is_missing(mllm, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o"
    whole = run(mllm, out)
    lines = whole.splitlines(keepends=True)
    # what a death leaves: some rows, and in the part of a process a whole row and half a row
    (out / "predictions.jsonl").write_text("".join(lines[:2]))
    (out / "part-3.jsonl").write_text(lines[4] + lines[5][:20])
    asked = []
    prompt_of = eval_chat.prompt_of

    def counted(question, *rest):
        asked.append(question.line)
        return prompt_of(question, *rest)

    monkeypatch.setattr(eval_chat, "prompt_of", counted)
    assert run(mllm, out) == whole
    assert asked == [3, 4, 6]
    assert sorted(path.name for path in out.iterdir()) == [
        "predictions.jsonl",
        "scores.json",
        "task.json",
    ]
    assert "3 of 6 questions are answered already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another evaluation: its metric is 'vqa_accuracy'"):
        run(mllm, out, "--metric", "anls")
    with pytest.raises(ValueError, match="another evaluation: its checkpoint is"):
        run(mllm, out, "--checkpoint", mllm / "adaptive_last")


def test_a_limit_may_be_raised(mllm, tmp_path):
    assert run(mllm, tmp_path / "o", "--limit", "2").count("\n") == 2
    assert run(mllm, tmp_path / "o").count("\n") == 6


@pytest.mark.parametrize(
    ("metric", "record", "words"),
    [
        ("anls", {"question": "?"}, "line 1: it has neither 'answer' nor 'answers'"),
        ("anls", {"question": " ", "answer": "a"}, "line 1: 'question' is ' '; it must not be"),
        ("anls", {"question": "?", "answers": [1]}, "line 1: 'answers' holds 1; it must hold"),
        ("anls", {"question": "?", "answer": "a", "image": "no.png"}, "there is no picture"),
        ("anls", {"question": "?", "answer": "a", "answers": ["b"]}, "it has both 'answer' and"),
        ("ai2d", {"question": "?", "answers": ["A", "B"]}, "ai2d compares with one"),
        ("mmmu_choice", {"question": "?", "answer": "A"}, "there are no 'options'"),
        ("ai2d", {"question": "?", "answer": "C", "options": ["x", "y"]}, "one of their letters"),
        ("anls", {"question": "<image> ?", "answer": "a"}, "1 times <image>, but there are 0"),
    ],
)
def test_a_bad_question_is_one_sentence_with_its_line(tmp_path, metric, record, words):
    write_records(tmp_path / "q.jsonl", [record])
    with pytest.raises(ValueError) as error:
        eval_chat.read_questions(str(tmp_path / "q.jsonl"), metric, (), 0)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- lmms-eval, without it
def test_requests_are_answered_in_their_order_whatever_the_batch(mllm):
    model, tokenizer, _ = load_mllm(mllm / "static", device="cpu")
    picture = Image.open(mllm / "0.png")
    greedy = {"max_new_tokens": 5, "temperature": 0, "until": ["\n"]}
    requests = [
        Request("what is this", greedy, lambda: [picture]),
        Request("a circle", {**greedy, "max_new_tokens": 3}, lambda: None),
        Request("is there a red circle", greedy, list),
        Request("two pictures", greedy, lambda: [picture, picture]),
        Request("is there a red circle " * 2000, greedy, list),
    ]
    with torch.no_grad():
        one_by_one = eval_lmms.answer_requests(requests, model, tokenizer, 1)
        assert eval_lmms.answer_requests(requests, model, tokenizer, 16) == one_by_one
    assert one_by_one[4] == ""
    assert len(set(one_by_one[:4])) > 2
    assert sorted(itertools.chain(*eval_lmms.plan_batches(requests, 2))) == [0, 1, 2, 3, 4]


def test_settings_without_do_sample_are_greedy():
    greedy = eval_lmms.generation_of({"temperature": 0.7, "top_p": 0.5})
    assert greedy == (eval_lmms.MAX_NEW_TOKENS, 0.0, 1.0)
    drawn = eval_lmms.generation_of({"do_sample": True, "temperature": 0.7, "max_new_tokens": 9})
    assert drawn == (9, 0.7, 1.0)


def test_other_flags_are_passed_on():
    words = eval_lmms.lmms_arguments("--checkpoint F --tasks a,b --limit 8".split())
    assert words[-2:] == ["--limit", "8"]
    assert words[words.index("--model_args") + 1] == "checkpoint=F"
    with pytest.raises(ValueError, match="has a comma"):
        eval_lmms.lmms_arguments("--checkpoint a,b --tasks c".split())


def test_without_lmms_eval_the_sentence_has_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ValueError, match="pip install .*lmms-eval==0.7.3.*filelock<4.*torchvision"):
        eval.main(["lmms", "--checkpoint", "F", "--tasks", "a"])
