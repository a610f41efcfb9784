"""trackers.py: TensorBoard and Weights & Biases get the numbers of log.jsonl. Both are optional:
where they are not installed, their tests are skipped.
"""

import json
import struct
import sys

import pytest
from helpers import run_small

import trackers
from files import read_log
from trackers import numbers_of


def rows_of(out_dir):
    """{name: [(step, number)]} of a log.jsonl."""
    numbers = {}
    for row in read_log(out_dir / "log.jsonl"):
        for name, number in numbers_of(row):
            numbers.setdefault(name, []).append((row["step"], number))
    return numbers


def scalars_of(out_dir):
    """{name: [(step, number)]} of TensorBoard's event files, as its own reader has them."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(out_dir / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    numbers = {}
    for name in events.Tags()["scalars"]:
        numbers[name] = [(event.step, event.value) for event in events.Scalars(name)]
    return numbers


def compare(numbers, expected):
    assert numbers.keys() == expected.keys()
    for name, pairs in expected.items():
        assert [step for step, _ in numbers[name]] == [step for step, _ in pairs], name
        values = [number for _, number in pairs]
        assert [number for _, number in numbers[name]] == pytest.approx(values, rel=1e-6), name


# ---------------------------------------------------------------- rows
def test_the_numbers_of_a_row_are_all_but_step_and_header():
    row = {"step": 3, "loss": 1, "eval": {"a": 0.5, "per": {"b": 2.0}, "c": "text", "d": True}}
    assert dict(numbers_of(row)) == {"loss": 1.0, "eval/a": 0.5, "eval/per/b": 2.0}
    assert not dict(numbers_of({"step": 0, "header": {"version": 2.0}}))


def test_a_missing_package_is_said_before_the_run(small, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--log is wandb, .*: pip install wandb"):
        run_small(small, "--out_dir", tmp_path / "run", "--log", "wandb")
    assert not (tmp_path / "run").exists()


def test_a_tracker_is_imported_only_where_it_is_asked_for(small, tmp_path):
    loaded = "wandb" in sys.modules
    run_small(small, "--out_dir", tmp_path, "--max_steps", 1)
    assert ("wandb" in sys.modules) == loaded
    assert not (tmp_path / "tensorboard").exists()


def test_what_a_tracker_says_is_one_sentence(tmp_path, monkeypatch):
    def refuse(folder, step):
        raise RuntimeError("no account\nsecond line")

    monkeypatch.setitem(trackers.CLASSES, "wandb", refuse)
    with pytest.raises(ValueError, match=r"--log wandb does not start: no account$"):
        trackers.open_tracker("wandb", tmp_path, 0)


class Recorder:
    """A tracker in memory."""

    def __init__(self, folder, step):
        self.is_new = step == 0
        self.rows = []

    def write(self, row):
        self.rows.append(row)


def test_every_row_of_the_log_reaches_the_tracker(small, tmp_path, monkeypatch):
    opened = []

    def make(folder, step):
        opened.append(Recorder(folder, step))
        return opened[-1]

    monkeypatch.setitem(trackers.CLASSES, "wandb", make)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    flags = ("--out_dir", tmp_path, "--save_every", 2, "--log", "wandb")
    run_small(small, *flags, "--max_steps", 2)
    (recorder,) = opened
    assert recorder.rows == read_log(tmp_path / "log.jsonl")


# ---------------------------------------------------------------- the packages themselves
def test_tensorboard_has_the_numbers_of_the_log(small, tmp_path):
    pytest.importorskip("tensorboard")
    run_small(small, "--out_dir", tmp_path, "--log", "tensorboard", "--max_steps", 3)
    compare(scalars_of(tmp_path), rows_of(tmp_path))


def interrupt(small, tmp_path, *flags):
    """A run of 6 steps that dies in its fifth, behind its checkpoint of step 2."""
    import loop

    flags = ("--out_dir", tmp_path, "--max_steps", 6, "--save_every", 2, *flags)
    save = loop.Checkpoint.save

    def die(self, step, *arguments):
        if step == 4:
            raise MemoryError("the machine is gone")
        save(self, step, *arguments)

    loop.Checkpoint.save = die
    try:
        with pytest.raises(MemoryError):
            run_small(small, *flags)
    finally:
        loop.Checkpoint.save = save
    return flags


def test_a_resumed_run_goes_on_in_the_same_event_files(small, tmp_path):
    pytest.importorskip("tensorboard")
    flags = interrupt(small, tmp_path, "--log", "tensorboard")
    run_small(small, *flags)
    compare(scalars_of(tmp_path), rows_of(tmp_path))


def test_a_run_that_had_no_tracker_brings_its_rows_along(small, tmp_path):
    pytest.importorskip("tensorboard")
    flags = interrupt(small, tmp_path)
    run_small(small, *flags, "--log", "tensorboard")
    compare(scalars_of(tmp_path), rows_of(tmp_path))


def test_fresh_puts_the_trackers_files_aside(small, tmp_path):
    pytest.importorskip("tensorboard")
    flags = ("--out_dir", tmp_path, "--log", "tensorboard")
    run_small(small, *flags, "--max_steps", 2)
    run_small(small, *flags, "--max_steps", 1, "--fresh")
    assert (tmp_path / "before-1" / "tensorboard").is_dir()
    compare(scalars_of(tmp_path), rows_of(tmp_path))


def records_of(file):
    """The records of a small .wandb file: 7 bytes of its own, then each with check sum, length and
    kind before it.
    """
    content = file.read_bytes()
    assert len(content) < 2**15  # one block: no record is split
    place = 7
    while place < len(content):
        length, kind = struct.unpack_from("<HB", content, place + 4)
        assert kind == 1
        yield content[place + 7 : place + 7 + length]
        place += 7 + length


def history_of(folder):
    """The rows of an offline run of wandb."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    rows = []
    identities = set()
    for data in records_of(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.run.run_id:
            identities.add(record.run.run_id)
        if record.history.item:
            items = {}
            for item in record.history.item:
                items[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            rows.append({name: items[name] for name in items if not name.startswith("_")})
    return rows, identities


def test_wandb_has_the_numbers_of_the_log(small, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    opened = []

    def make(folder, step):
        opened.append(trackers.Wandb(folder, step))
        return opened[-1]

    monkeypatch.setitem(trackers.CLASSES, "wandb", make)
    flags = interrupt(small, tmp_path, "--log", "wandb")
    opened[0].run.finish()  # else the end of the process does it
    run_small(small, *flags)
    opened[1].run.finish()
    rows = []
    identities = set()
    for folder in sorted((tmp_path / "wandb").glob("offline-run-*")):
        more_rows, more_identities = history_of(folder)
        rows += more_rows
        identities |= more_identities
    assert identities == {(tmp_path / "wandb.id").read_text()}
    # a step that is logged again has the same numbers
    logged = {}
    for row in rows:
        step = row.pop("step")
        for name, number in row.items():
            assert logged.setdefault((name, step), number) == number
    expected = {}
    for name, pairs in rows_of(tmp_path).items():
        for step, number in pairs:
            expected[name, step] = number
    assert logged == expected
