"""Trainings that are killed or disturbed go on to the same bits: the short form of kills.py."""

import shutil

import kills
import pytest
import torch

# those that start new interpreters, or signal whole groups of processes, take too long here
LONG = ("sigint_python", "sigterm_torchrun", "sigterm_with_workers", "sigint_to_two")
SHORT = ("sigint",)
SLOW = [name for name in kills.SITUATIONS if name not in (*LONG, *SHORT)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Runs that nobody disturbs, which all tests are compared with."""
    return kills.Bench(tmp_path_factory.mktemp("deaths"))


def check(bench, name):
    try:
        kills.SITUATIONS[name](bench)
    except kills.Skip as reason:
        pytest.skip(str(reason))


def resume_after(bench, number, seed, cases):
    """So many kills, all of which go on to the same bits."""
    tally = kills.run_kills(bench, number, seed, cases)
    assert not tally.failures, tally.failures
    assert tally.kills == tally.resumed == number


# ---------------------------------------------------------------- kills
def test_a_killed_run_goes_on_to_the_same_bits(bench):
    resume_after(bench, 2, 0, [kills.Case()])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        kills.Case("train", workers=2),
        kills.Case("llava_demo", workers=2, processes=2),
    ],
    ids=str,
)
def test_other_killed_runs_go_on_to_the_same_bits(bench, case):
    resume_after(bench, 2, 1, [case])


# ---------------------------------------------------------------- other situations
@pytest.mark.parametrize("name", SHORT)
def test_a_disturbed_run_goes_on_to_the_same_bits(bench, name):
    check(bench, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_other_disturbed_runs_go_on_to_the_same_bits(bench, name):
    check(bench, name)


# ---------------------------------------------------------------- the proof itself
def test_the_comparison_sees_every_difference(bench, tmp_path):
    whole = bench.whole(kills.Case())
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    kills.plant_users_files(copy)
    assert kills.differences(whole, copy) == []
    assert kills.lost_users_files(copy) == []
    # a bit of the weights, a moment of the optimizer, a file too many, files that are missing
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    state = torch.load(copy / "training_state.pt", weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"].view(-1)[0] += 1e-12
    torch.save(state, copy / "training_state.pt")
    (copy / "best" / "model.safetensors.tmp77").touch()
    (copy / "best" / "config.json").unlink()
    (copy / "notes.tmp.txt").unlink()
    assert kills.differences(whole, copy) == [
        "best/config.json is missing",
        "best/model.safetensors.tmp77 is left over",
        "model.safetensors has other bytes",
        "training_state.pt holds other values",
    ]
    assert kills.lost_users_files(copy) == ["the user's notes.tmp.txt is not as it was"]


def test_kills_are_drawn_by_the_seed():
    def draw(seed):
        dice = kills.random.Random(seed)
        return [kills.draw_kill(dice, kills.Case(processes=2)) for _ in range(30)]

    assert draw(3) == draw(3) != draw(4)
    assert {kill.when for kill in draw(3)} == {"start", "moment", "save"}
    assert {kill.rank for kill in draw(3)} == {0, 1}
