"""The fuzzer finds nothing in its first mutations of each kind; and it sees what there is to see.

`python tests/fuzz.py` runs ten times as many.
"""

import json
import os
import time
from collections import Counter
from pathlib import Path

import fuzz
import pytest

MUTATIONS = 300
HEAVY = ("safetensors", "config", "pickles", "tokenizer")  # they load models


def kinds():
    """All kinds, those that take longer marked as slow."""
    parameters = []
    for name in fuzz.KINDS:
        marks = [pytest.mark.slow] if name in HEAVY else []
        parameters.append(pytest.param(name, marks=marks))
    return parameters


@pytest.mark.parametrize("name", kinds())
def test_every_mutation_ends_in_a_right_result_or_in_one_sentence(name):
    results = fuzz.fuzz(name, MUTATIONS)
    assert fuzz.fault_lines(name, results) == []
    outcomes = Counter(result.outcome for result in results)
    assert outcomes.keys() == {"right", "refused"}
    assert [result.number for result in results] == list(range(MUTATIONS))


# ---------------------------------------------------------------- the fuzzer itself
def use_memory():
    blocks = []
    while True:
        blocks.append(b"x" * (20 * 2**20))
        time.sleep(0.01)


def use_time():
    while True:
        pass


def die():
    os.abort()


def refuse_at_length():
    raise ValueError("x" * 5000)


def refuse_with_an_object():
    raise ValueError(f"cannot read {object()}")


def change_the_input():
    Path("a.json").write_text("{}")


def execute():
    Path("executed").touch()


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (use_memory, "300 MB"),
        (use_time, "TooSlow"),
        (die, "ended by signal 6"),
        (refuse_at_length, "a message of 5000 characters"),
        (refuse_with_an_object, "a message with 'object at 0x'"),
        (change_the_input, "a.json was changed"),
        (execute, "Executed"),
        (lambda: {}["x"], "KeyError"),
        (lambda: fuzz.require(False, "no rows"), "Insane"),
        (lambda: os.stat("none"), "FileNotFoundError for a good input"),
    ],
)
def test_every_fault_is_seen_and_the_next_mutation_is_run(monkeypatch, behaviour, error):
    cases = [fuzz.Case("good", {"a.json": b"[1, 2]"}, ("a.json",))]

    def read(folder, name):
        # the good input is the first mutation: it shows the fault, and the others are right
        if json_of(folder / "a.json") == [1, 2]:
            behaviour()

    monkeypatch.setitem(fuzz.KINDS, "test", fuzz.Kind(lambda folder: cases, read))
    monkeypatch.setattr(fuzz, "SECONDS", 2.0)
    limit = fuzz.megabytes_of(os.getpid()) + 300
    monkeypatch.setattr(fuzz, "MEGABYTES", limit)
    results = fuzz.fuzz("test", 5)
    assert [result.number for result in results] == list(range(5))
    assert results[0].outcome == "fault"
    if error == "300 MB":
        assert results[0].error.endswith(" MB") and results[0].megabytes > limit
    else:
        assert results[0].error == error
    assert {result.outcome for result in results[1:]} == {"right"}


def json_of(path):
    """The content of a file, or None where a mutation has broken it."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None


def test_a_mutation_is_a_function_of_seed_kind_and_number(tmp_path):
    cases = fuzz.make_cases("chat", tmp_path)
    for number in range(len(cases)):
        assert fuzz.mutation("chat", 0, number, cases) == cases[number], "the good inputs first"
    differ = 0
    for number in range(50, 80):
        mutated = fuzz.mutation("chat", 0, number, cases)
        assert mutated == fuzz.mutation("chat", 0, number, cases)
        differ += mutated != fuzz.mutation("chat", 1, number, cases)
    assert differ > 25


def test_one_mutation_can_be_repeated_and_is_kept(capsys):
    assert fuzz.main(["answers", "--only", "7"]) == 0
    said = capsys.readouterr().out
    folder = Path(said.split("\n")[1].partition(": ")[0])
    assert folder.name == "fuzz-answers-0-7" and (folder / "answers.json").is_file()
    assert "refused" in said or "right" in said


def test_the_report_counts_and_names_faults():
    results = [
        fuzz.Result(0, "right", seconds=0.5, megabytes=100),
        fuzz.Result(1, "fault", "KeyError", "data.py:5", "'x'"),
        fuzz.Result(2, "refused", "ValueError", "data.py:9", "bad"),
        fuzz.Result(8, "fault", "KeyError", "data.py:5", "'y'"),
    ]
    assert fuzz.summary("chat", results).split() == ["chat", *"4 1 1 2 0.50 100".split()]
    lines = fuzz.fault_lines("chat", results)
    assert lines == ["chat 1  KeyError  data.py:5  'x'  [2 times: 8 ...]"]
