"""Jobs that run side by side, and what their numbers say."""

import itertools
import os
import signal
import time

import pytest

import comparison
from comparison import Job, Outcome, describe_order, describe_scores, run_jobs, sign_flip_test
from world import Stopped


# ---------------------------------------------------------------- jobs that others import
def square(folder, number):
    print(f"the square of {number}")
    with open(f"{folder}/starts.txt", "a") as file:
        file.write("started\n")
    return {"square": number**2}


def refuse(folder, number):
    raise ValueError(f"{number} is no good")


def break_down(folder, number):
    raise KeyError(number)


def kill_itself(folder, number):
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_long(folder, number):
    with open(f"{folder}/process.txt", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(100)
    return {}


def jobs_of(function, numbers):
    return [Job(f"job{number}", function, {"number": number}) for number in numbers]


def say(result):
    return str(result["square"])


def test_jobs_run_once_whatever_is_asked_again(tmp_path, capsys):
    results = run_jobs(jobs_of(square, [2, 3]), tmp_path, 2, say)
    assert {name: result["square"] for name, result in results.items()} == {"job2": 4, "job3": 9}
    again = run_jobs(jobs_of(square, [2, 3, 4]), tmp_path, 2, say)
    assert again["job2"] == results["job2"] and again["job4"]["square"] == 16
    for number in (2, 3, 4):
        assert (tmp_path / f"job{number}" / "starts.txt").read_text() == "started\n"
    printed = capsys.readouterr().out
    assert "2 of 3 runs are done already" in printed
    assert "[3/3] job4: 16" in printed
    # what a job prints does not disturb the others' lines
    assert "the square of" not in printed
    assert "the square of 2" in (tmp_path / "job2" / "output.txt").read_text()


def test_a_result_of_other_settings_is_refused(tmp_path):
    folder = tmp_path / "job2"
    folder.mkdir()
    comparison.write_json(folder / "result.json", {"settings": {"number": 3}, "result": {}})
    with pytest.raises(ValueError, match="number was 3, is 2.*another --out_dir"):
        run_jobs(jobs_of(square, [2]), tmp_path, 1, say)


def keep_settings(folder, fields):
    return {"square": len(fields["layers"])}


def test_settings_with_tuples_inside_are_the_same_after_json(tmp_path):
    job = Job("job", keep_settings, {"fields": {"layers": (2, 3)}})
    first = run_jobs([job], tmp_path, 1, say)
    assert run_jobs([job], tmp_path, 1, say) == first


@pytest.mark.parametrize(
    ("function", "reason"),
    [(refuse, "2 is no good"), (break_down, "KeyError: 2"), (kill_itself, "killed by signal 9")],
)
def test_a_failed_job_ends_all_in_one_sentence(tmp_path, function, reason):
    with pytest.raises(ValueError, match=f"job2 has failed: .*{reason}.*output.txt"):
        run_jobs(jobs_of(function, [2]), tmp_path, 1, say)
    assert not (tmp_path / "job2" / "result.json").exists()


def test_a_signal_leaves_no_process_behind(tmp_path):
    """Stopped as a SIGTERM raises it, from inside of the wait for the job."""
    team = comparison.Team(tmp_path)
    with pytest.raises(Stopped, match="goes on"), comparison.stopping_on_signal("It goes on"):
        try:
            team.start(jobs_of(sleep_long, [1])[0])
            while not (tmp_path / "job1" / "process.txt").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            team.end()
    assert not any(process.is_alive() for process in team.running)


# ---------------------------------------------------------------- statistics
def test_the_sign_flip_test_is_exact():
    # all differences of one sign: only they and their opposites are as far from zero
    assert sign_flip_test([3, 4, 5], [1, 1, 1]) == 2 / 8
    assert sign_flip_test([0.5] * 5, [0.1, 0.2, 0.3, 0.4, 0.45]) == 2 / 32
    # no difference, or two that cancel: nothing is further
    assert sign_flip_test([1, 2], [1, 2]) == 1
    assert sign_flip_test([1, 0], [0, 1]) == 1
    # differences 1, 2, -1: their sum is 2, and so far from zero are 1+2+1, 1+2-1, -1+2+1 ...
    assert sign_flip_test([1, 2, 0], [0, 0, 1]) == 6 / 8


def test_chance_gives_a_small_p_no_more_often_than_p():
    """The closed form: over all signs of given differences P(p <= a) is at most a."""
    sizes = [0.3, 1.1, 0.7, 2.0]
    found = []
    for signs in itertools.product((1, -1), repeat=4):
        found.append(sign_flip_test([s * x for s, x in zip(signs, sizes, strict=True)], [0] * 4))
    for level in sorted(set(found)):
        assert sum(p <= level for p in found) / 16 <= level + 1e-12


def outcomes():
    return [
        Outcome("last", {"all": [0.5, 0.6, 0.4], "color": [0.9, 0.9, 0.9]}, [], 1e-3, {"x": 1.0}),
        Outcome("saue", {"all": [0.7, 0.7, 0.7], "color": [1.0, 1.0, 1.0]}, [], 2e-3, {"x": 2e6}),
        Outcome("aaue", {"all": [0.6, 0.8, 0.8], "color": [1.0, 1.0, 0.7]}, [], 2e-3, {"x": 3.0}),
    ]


def test_the_table_has_means_deviations_and_tests():
    lines = describe_scores(outcomes(), ("last",)).splitlines()
    assert lines[0].split("  ")[0] == "test, %"
    last, saue, aaue = (line.split("  ") for line in lines[1:])
    assert "50.0 +- 10.0" in lines[1] and lines[1].rstrip().endswith("-")
    assert "70.0 +- 0.0" in lines[2] and "+20.0 (p 0.25)" in lines[2]
    assert "90.0 +- 17.3" in lines[3]
    assert len(last) and len(saue) and len(aaue)


def test_an_order_that_does_not_hold_in_every_seed_is_said_so():
    assert describe_order(outcomes()).startswith("order of the means: last < saue <~ aaue")


def test_facts_have_a_row_each():
    lines = comparison.describe_facts(outcomes()).splitlines()
    assert lines[0].split() == ["learning", "rate", "x"]
    assert lines[2].split() == ["saue", "0.002", "2,000,000"]


def test_under_torchrun_it_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="by python, not by torchrun"):
        comparison.refuse_torchrun()
