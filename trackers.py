"""Trackers: the numbers of log.jsonl for TensorBoard or Weights & Biases, with `--log`.

The log of a run is log.jsonl, and no tracker is needed. A tracker gets the numbers of its rows and
nothing else. It is opened with the first row that a process logs: a run that is resumed goes on in
the same place, and a run that had no tracker before brings its old rows along.

    python train.py --log tensorboard       # then: tensorboard --logdir out/demo/tensorboard
    python train.py --log wandb             # WANDB_MODE=offline needs no account
"""

import secrets
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fields import FieldError
from files import read_log, write_text
from world import first_line_of

TRACKERS = ("", "tensorboard", "wandb")
PLACES = ("tensorboard", "wandb", "wandb.id")  # what they write into the folder of a run


def check_tracker(name: str) -> None:
    """Raises FieldError if the package of a tracker is missing, before anything is loaded."""
    if name and find_spec(name) is None:
        raise FieldError(f"log is {name}, but there is no such package here: pip install {name}")


def numbers_of(row: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of all numbers in a row of log.jsonl; those of "eval" are eval/NAME."""
    for name, value in row.items():
        if name in ("step", "header"):
            continue
        if isinstance(value, dict):
            yield from numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


class TensorBoard:
    """Event files in out_dir/tensorboard."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.is_new = not (folder / "tensorboard").exists()
        # what was logged after the state was saved counts no more
        purged = None if self.is_new else step + 1
        self.writer: Any = SummaryWriter(folder / "tensorboard", purge_step=purged)

    def write(self, row: dict) -> None:
        for name, number in numbers_of(row):
            self.writer.add_scalar(name, number, row["step"])
        self.writer.flush()  # a death loses nothing


class Wandb:
    """A run of Weights & Biases, in out_dir/wandb. Its id is kept in out_dir/wandb.id.

    A step that is logged again after a death has the same numbers: runs are exact.
    """

    def __init__(self, folder: Path, step: int):
        import wandb

        file = folder / "wandb.id"
        self.is_new = not file.exists()
        if self.is_new:
            write_text(file, secrets.token_hex(8))
        settings = wandb.Settings(
            # the numbers and nothing else: not what is printed, nor the machine, nor the code
            console="off",
            save_code=False,
            disable_git=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
            # a run that is resumed goes on where it was, or where it was on another machine
            resume="allow",
        )
        self.run: Any = wandb.init(
            project="manager",
            name=folder.name,
            id=file.read_text(encoding="utf-8").strip(),
            dir=folder,
            settings=settings,
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, row: dict) -> None:
        self.run.log({"step": row["step"], **dict(numbers_of(row))})


CLASSES: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Wandb}


def open_tracker(name: str, folder: Path, step: int) -> Any:
    """The tracker of a run that goes on after `step`. Raises ValueError if it does not start."""
    try:
        tracker = CLASSES[name](folder, step)
    except OSError:
        raise  # of the disk: who writes says it
    except Exception as error:  # of the package: no account, no network, another version ...
        raise ValueError(f"--log {name} does not start: {first_line_of(error)}") from error
    if tracker.is_new:
        for row in read_log(folder / "log.jsonl"):
            tracker.write(row)
    return tracker
