"""What every comparison needs: its runs side by side on the cores of a machine, and what their
numbers say.

compare.py and compare_llava.py use it. A comparison is a list of jobs, one for each variant, seed
and learning rate. Each of them runs in a process of its own, writes into a folder of its own, and
is never run twice: after any death the same command goes on with the jobs that are not done.

Outcomes are scores of seeds. Two variants with the same seed begin with the same weights wherever
they share a part, and see the same rows in the same order, so they are compared seed by seed:
`sign_flip_test` is exact, and assumes nothing about how scores are distributed.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drawing import load_matplotlib
from files import need, read_json, save_picture, write_atomically, write_json
from loop import Task, different_values
from roofline import count_gflop
from world import Stopped, World, end_of

RESULT = "result.json"  # in the folder of a job, when it is done
ROUNDS = 10  # of measuring the time of a step
OUTPUT = "output.txt"  # in the same folder: what the job has printed
ALL = "all"  # the name of the score over everything


# ---------------------------------------------------------------- jobs
class Job(NamedTuple):
    """One run of a comparison: function(folder, **settings) -> numbers that JSON can hold.

    The function is one that another process can import. Only with the same settings a job that is
    done counts as done.
    """

    name: str  # of its folder
    function: Callable[..., dict]
    settings: dict[str, Any]


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def count_processes(processes: int, device: str) -> int:
    """How many runs at the same time, where 0 stands for one a core, and one on CUDA."""
    if processes:
        return processes
    return 1 if World(device).device.type == "cuda" else count_cores()


def refuse_torchrun() -> None:
    """Raises ValueError under torchrun: a comparison starts its processes by itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "a comparison starts its own processes (--processes): start it by python, not by "
            "torchrun"
        )


def read_result(job: Job, folder: Path) -> dict | None:
    """What a job has computed; None if it is not done. Raises ValueError for other settings."""
    file = folder / job.name / RESULT
    if not file.exists():
        return None
    stored = read_json(file, dict)
    settings = need(stored, "settings", dict, f"{file}")
    differences = different_values(settings, as_json(job.settings))
    if differences:
        raise ValueError(
            f"{file} is of a run with other settings ({'; '.join(differences[:4])}); choose "
            "another --out_dir"
        )
    return need(stored, "result", dict, f"{file}")


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they come back from a JSON file: lists for tuples, wherever they are."""
    return json.loads(json.dumps(settings))


def work(job: Job, folder: Path) -> None:
    """What a process of a job does. All that it prints goes into a file of the job's folder."""
    own_folder = folder / job.name
    with open(own_folder / OUTPUT, "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        # one thread: sums in another order give other numbers, and each core has a job of its own
        torch.set_num_threads(1)
        try:
            began = time.monotonic()
            result = job.function(str(own_folder), **job.settings)
            result["seconds"] = time.monotonic() - began
            write_json(own_folder / RESULT, {"settings": as_json(job.settings), "result": result})
        except (Exception, KeyboardInterrupt) as error:
            end = end_of(error)
            if end is None:
                traceback.print_exc()
                sys.exit(1)
            status, sentence = end
            if sentence:
                print(f"error: {sentence}", flush=True)
            sys.exit(status)


def last_line(file: Path) -> str:
    """The last line of what a job has printed."""
    lines = file.read_text(errors="replace").strip().splitlines()
    if not lines:
        return "it printed nothing"
    return lines[-1].removeprefix("error: ")


@contextmanager
def stopping_on_signal(advice: str) -> Iterator[None]:
    """Inside, a SIGTERM raises Stopped, so that the processes of all jobs are ended too."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(f"SIGTERM. {advice}")

    previous = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted. {advice}") from None
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


class Team:
    """The processes that work on jobs at the same time."""

    def __init__(self, folder: Path):
        self.folder = folder
        # a process that begins anew, as one that was copied amid PyTorch's threads may hang
        self.context: Any = multiprocessing.get_context("spawn")
        self.running: dict[Any, Job] = {}

    def start(self, job: Job) -> None:
        """Begin a job in a process of its own."""
        (self.folder / job.name).mkdir(parents=True, exist_ok=True)
        process = self.context.Process(target=work, args=(job, self.folder), daemon=True)
        process.start()
        self.running[process] = job

    def finish(self) -> list[Job]:
        """Wait until jobs are done, and return them. Raises ValueError for one that has failed."""
        ended = wait([process.sentinel for process in self.running])
        done = []
        for process in list(self.running):
            if process.sentinel not in ended:
                continue
            process.join()
            job = self.running.pop(process)
            if process.exitcode != 0:
                output = self.folder / job.name / OUTPUT
                reason = f"its process was killed by signal {-process.exitcode}"
                if process.exitcode > 0:
                    reason = last_line(output)
                raise ValueError(f"{job.name} has failed: {reason} (all it printed: {output})")
            done.append(job)
        return done

    def end(self) -> None:
        """End what still runs; training saves its state first."""
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.join()


def describe_time(seconds: float) -> str:
    """ "40 s", or "12 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"


def run_jobs(
    jobs: list[Job], folder: Path, processes: int, summary: Callable[[dict], str]
) -> dict[str, dict]:
    """The results of all jobs by their names; at most `processes` run at the same time.

    summary(result): what is said of a job that is done. Raises ValueError if a job fails.
    """
    # 1. what an earlier start has done
    results = {}
    waiting = []
    for job in jobs:
        result = read_result(job, folder)
        if result is None:
            waiting.append(job)
        else:
            results[job.name] = result
    if results:
        print(f"{len(results)} of {len(jobs)} runs are done already", flush=True)

    # 2. the others
    team = Team(folder)
    began = time.monotonic()
    total = len(waiting)
    with stopping_on_signal("The same command goes on with what is not done"):
        try:
            while waiting or team.running:
                while waiting and len(team.running) < processes:
                    team.start(waiting.pop(0))
                for job in team.finish():
                    result = read_result(job, folder)
                    assert result is not None, job.name
                    results[job.name] = result
                    rest = len(waiting) + len(team.running)
                    left = (time.monotonic() - began) / (total - rest) * rest
                    print(
                        f"[{len(results)}/{len(jobs)}] {job.name}: {summary(result)}, "
                        f"{describe_time(result['seconds'])}; about {describe_time(left)} left",
                        flush=True,
                    )
        finally:
            team.end()
    return results


# ---------------------------------------------------------------- what jobs read
def keep_array(folder: Path, name: str, parts: list[Tensor]) -> None:
    """Write one array of all parts, in one piece or not at all."""
    array = torch.cat(parts).numpy()

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.save(file, array)

    write_atomically(folder / f"{name}.npy", write)


def describe_weights(folder: str) -> list:
    """What tells the weights in a folder apart from others."""
    files = []
    for file in sorted(Path(folder).rglob("*.safetensors")):
        files.append(
            [file.name, file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
        )
    return files


# ---------------------------------------------------------------- what the numbers say
@dataclass
class Outcome:
    """What came out for one variant, in fractions.

    scores: of each kind of test rows, ALL first, a number for each seed. curves: for each seed the
    (step, validation score) on the way.
    """

    name: str
    scores: dict[str, list[float]]
    curves: list[list[tuple[int, float]]]
    learning_rate: float
    facts: dict[str, float]  # parameters, FLOPs, seconds

    def mean(self, kind: str = ALL) -> float:
        return statistics.fmean(self.scores[kind])

    def deviation(self, kind: str = ALL) -> float | None:
        """The sample standard deviation over the seeds; None for a single one."""
        scores = self.scores[kind]
        return statistics.stdev(scores) if len(scores) > 1 else None


def sign_flip_test(scores: Sequence[float], others: Sequence[float]) -> float:
    """How likely a mean difference at least as large is by chance: a two-sided p, exact.

    If two variants were alike, the difference of each seed would have either sign with the same
    probability. p is the part of all 2^n ways to choose the n signs whose mean is at least as far
    from zero as the one that was found. It cannot be less than 2 / 2^n: 0.25 with 3 seeds, 0.0625
    with 5.
    """
    differences = [score - other for score, other in zip(scores, others, strict=True)]
    found = abs(math.fsum(differences))
    as_far = 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        total = math.fsum(sign * x for sign, x in zip(signs, differences, strict=True))
        # equal sums may differ in the last bit
        if abs(total) >= found * (1 - 1e-9):
            as_far += 1
    return as_far / 2 ** len(differences)


def choose_rate(validation: dict[float, list[float]]) -> float:
    """The learning rate with the highest mean validation score over the seeds."""
    return max(validation, key=lambda rate: statistics.fmean(validation[rate]))


def make_outcome(
    variant: str,
    rates: Sequence[float],
    num_seeds: int,
    results: dict[tuple[str, float, int], dict],
) -> Outcome:
    """The runs of one variant with the learning rate that is best on validation rows.

    results: of jobs, by variant, learning rate and seed.
    """
    seeds = range(num_seeds)
    validation = {}
    for rate in rates:
        validation[rate] = [results[variant, rate, seed]["validation"] for seed in seeds]
    rate = choose_rate(validation)
    chosen = [results[variant, rate, seed] for seed in seeds]
    scores = {}
    for kind in chosen[0]["test"]:
        scores[kind] = [result["test"][kind] for result in chosen]
    curves = [result["curve"] for result in chosen]
    return Outcome(variant, scores, curves, rate, {})


def percent(outcome: Outcome, kind: str) -> str:
    """ "83.4 +- 1.4", or "83.4" for a single seed."""
    mean = f"{100 * outcome.mean(kind):.1f}"
    deviation = outcome.deviation(kind)
    if deviation is None:
        return mean
    return f"{mean} +- {100 * deviation:.1f}"


def comparison_with(outcome: Outcome, baseline: Outcome | None, kind: str = ALL) -> str:
    """ "+9.2 (p 0.25)": the mean difference to a baseline in points, and `sign_flip_test`."""
    if baseline is None or baseline is outcome:
        return "-"
    difference = 100 * (outcome.mean(kind) - baseline.mean(kind))
    p = sign_flip_test(outcome.scores[kind], baseline.scores[kind])
    return f"{difference:+.1f} (p {p:.2g})"


def find_outcome(outcomes: list[Outcome], name: str) -> Outcome | None:
    for outcome in outcomes:
        if outcome.name == name:
            return outcome
    return None


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns under their titles, the first one to the left and the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        for cell, width in zip(line[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        text.append("  ".join(cells))
    return "\n".join(text)


def describe_scores(outcomes: list[Outcome], baselines: Sequence[str]) -> str:
    """The table of test scores: all, each kind, and the differences to the baselines."""
    kinds = list(outcomes[0].scores)
    header = ["test, %", *kinds]
    for name in baselines:
        header.append(f"against {name}")
    rows = []
    for outcome in outcomes:
        row = [outcome.name]
        for kind in kinds:
            row.append(percent(outcome, kind))
        for name in baselines:
            row.append(comparison_with(outcome, find_outcome(outcomes, name)))
        rows.append(row)
    return format_table(header, rows)


def describe_order(outcomes: list[Outcome]) -> str:
    """The order of the means, and where neighbours are not told apart in every seed."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.mean())
    words = [ordered[0].name]
    for lower, higher in itertools.pairwise(ordered):
        pairs = zip(lower.scores[ALL], higher.scores[ALL], strict=True)
        sign = "<" if all(low < high for low, high in pairs) else "<~"
        words += [sign, higher.name]
    return (
        f"order of the means: {' '.join(words)}   (<~: not in every seed, so the two may be equal)"
    )


def show_number(value: float) -> str:
    """ "343,052", or "0.5412"."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def describe_facts(outcomes: list[Outcome]) -> str:
    """The table of what each variant costs, and of its learning rate."""
    names = list(outcomes[0].facts)
    rows = []
    for outcome in outcomes:
        row = [outcome.name, f"{outcome.learning_rate:g}"]
        for name in names:
            row.append(show_number(outcome.facts[name]))
        rows.append(row)
    return format_table(["", "learning rate", *names], rows)


def describe_test(seeds: int) -> str:
    """What p is, and how small it can be."""
    return (
        "p: how likely so large a difference is by chance, an exact test over the seeds' signs; "
        f"with {seeds} seeds it cannot be less than {2 / 2**seeds:.2g}"
    )


def as_record(outcomes: list[Outcome]) -> list[dict]:
    """The outcomes as JSON."""
    return [dataclasses.asdict(outcome) for outcome in outcomes]


def describe_result(result: dict) -> str:
    return f"test {result['test'][ALL]:.1%}, validation {result['validation']:.1%}"


# ---------------------------------------------------------------- what a variant costs
def training_step(objective: Task, batch: dict) -> None:
    """Forward and backward, without an update."""
    objective.negatives.manual_seed(0)
    objective.shares = [len(batch["input_ids"])]
    losses = objective(batch)
    total: Any = sum(losses.values())
    total.backward()
    objective.zero_grad(set_to_none=True)


def measure_costs(
    objectives: dict[str, Task], batches: dict[str, dict]
) -> dict[str, dict[str, float]]:
    """Parameters that are trained, GFLOPs and milliseconds of a step on a batch, for each variant.

    The variants take turns, so that what else the machine does is shared among them.
    """
    torch.set_num_threads(1)  # as in the runs
    calls = {}
    for name, objective in objectives.items():
        calls[name] = functools.partial(training_step, objective.train(), batches[name])
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    costs = {}
    for name, objective in objectives.items():
        trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        costs[name] = {
            "parameters": float(sum(parameter.numel() for parameter in trained)),
            "GFLOPs a step": count_gflop(calls[name]),
            "ms a step": 1000 * statistics.median(seconds[name]),
        }
    return costs


# ---------------------------------------------------------------- the picture
# of Okabe and Ito: they differ for colour-blind eyes too
COLORS_OF_VARIANTS = (
    "#999999",
    "#E69F00",
    "#56B4E9",
    "#0072B2",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#000000",
)


def draw_bars(axes: Any, outcomes: list[Outcome]) -> None:
    """The mean test score of each variant, its standard deviation, and a point for each seed."""
    for place, outcome in enumerate(outcomes):
        color = COLORS_OF_VARIANTS[place % len(COLORS_OF_VARIANTS)]
        deviation = 100 * (outcome.deviation() or 0.0)
        mean = 100 * outcome.mean()
        axes.bar(place, mean, color=color, alpha=0.75, yerr=deviation, capsize=5)
        points = [100 * score for score in outcome.scores[ALL]]
        axes.plot([place] * len(points), points, "o", color="black", markersize=4)
        axes.annotate(
            f"{mean:.1f}", (place, 1), xytext=(0, 3), textcoords="offset points", ha="center"
        )
    axes.set_xticks(range(len(outcomes)), [outcome.name for outcome in outcomes])
    axes.set(title="after the last step", ylabel="test score, %")
    axes.grid(alpha=0.3, axis="y")


def draw_curves(axes: Any, outcomes: list[Outcome]) -> None:
    """The validation score over the steps: mean over the seeds, and a band from least to most."""
    for place, outcome in enumerate(outcomes):
        color = COLORS_OF_VARIANTS[place % len(COLORS_OF_VARIANTS)]
        steps = [step for step, _ in outcome.curves[0]]
        scores = np.array([[100 * score for _, score in curve] for curve in outcome.curves])
        axes.plot(steps, scores.mean(0), color=color, label=outcome.name)
        axes.fill_between(steps, scores.min(0), scores.max(0), color=color, alpha=0.15)
    axes.set(
        title="on the way: mean and range over the seeds",
        xlabel="step",
        ylabel="validation score, %",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_outcomes(outcomes: list[Outcome], caption: str) -> Image.Image:
    """Bars and curves side by side, and below them what they depend on."""
    figure = load_matplotlib()(figsize=(11, 5), dpi=150, layout="constrained")
    bars, curves = figure.subplots(1, 2)
    draw_bars(bars, outcomes)
    draw_curves(curves, outcomes)
    figure.supxlabel(textwrap.fill(caption, 150), fontsize="x-small")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)


def save_drawing(outcomes: list[Outcome], caption: str, file: Path) -> str:
    """Draw, and say where; without matplotlib say what is missing: the numbers are there anyway."""
    try:
        save_picture(file, draw_outcomes(outcomes, caption))
    except ValueError as error:
        return f"There is no picture: {error}"
    return f"The picture is {file}."
