"""What a comparison shows beside its tables: what a step of each variant costs, and the picture.

compare.py and compare_llava.py use it, beside comparison.py.
"""

import functools
import io
import statistics
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from comparison import ALL, Outcome
from figures import load_matplotlib
from files import save_picture
from loop import Task
from roofline import count_gflop

ROUNDS = 10  # of measuring the time of a step


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
