"""index.py: arrays in a file come back as they were, or not at all; one process builds them."""

import os
import time

import numpy as np
import pytest
from helpers import run_in_forks

import index
from index import Index, one_builder, read_index, write_index

KEY = {"size": 12, "parts": ["a", None, 3]}
FACTS = {"digest": "abc", "has_answers": None}


@pytest.fixture
def written(tmp_path):
    arrays = {
        "few": np.arange(5, dtype=np.int32),
        "none": np.zeros(0, dtype=np.int64),
        "many": np.arange(1000, dtype=np.int64) << 40,
        "every other": np.arange(20, dtype=np.int32)[::2],
    }
    write_index(tmp_path / "x.index", KEY, Index(FACTS, arrays))
    return tmp_path / "x.index", arrays


def test_arrays_come_back_as_they_were_and_cannot_be_written(written):
    path, arrays = written
    found = read_index(path, KEY)
    assert found.facts == FACTS
    assert list(found.arrays) == list(arrays)
    for name, values in arrays.items():
        assert found.arrays[name].dtype == values.dtype
        assert found.arrays[name].tolist() == values.tolist()
    with pytest.raises(ValueError, match="read-only"):
        found.arrays["few"][0] = 1
    assert os.listdir(path.parent) == ["x.index"]


def test_the_file_has_the_arrays_and_little_else(written):
    path, arrays = written
    size = sum(values.nbytes for values in arrays.values())
    pieces = len(arrays) + 1  # each is followed by less than ALIGNMENT bytes
    assert 0 < path.stat().st_size - size < 500 + pieces * index.ALIGNMENT


def test_an_index_of_other_data_does_not_count(written):
    path, _ = written
    assert read_index(path, {**KEY, "size": 13}) is None
    assert read_index(path, {}) is None


def test_no_flipped_bit_and_no_lost_byte_is_believed(written):
    path, _ = written
    content = path.read_bytes()
    for place in [*range(700), *range(700, len(content), 37), len(content) - 1]:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert read_index(path, KEY) is None, place
    for size in [*range(0, len(content), 61), len(content) - 1]:
        path.write_bytes(content[:size])
        assert read_index(path, KEY) is None, size
    path.write_bytes(content + b"\0")
    assert read_index(path, KEY) is None
    path.write_bytes(content)
    assert read_index(path, KEY) is not None


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"5",
        b"{}",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"key": KEY}',
        b'{"key": KEY, "facts": {}, "columns": 3}',
        b'{"key": KEY, "facts": {}, "columns": {"a": 3}}',
        b'{"key": KEY, "facts": {}, "columns": {"a": ["<i8", 1]}}',
        b'{"key": KEY, "facts": {}, "columns": {"a": ["<i8", -1]}}',
        b'{"key": KEY, "facts": {}, "columns": {"a": ["<i8", 1e300]}}',
        b'{"key": KEY, "facts": {}, "columns": {"a": ["O", 1]}}',
        b'{"key": KEY, "facts": {}, "columns": {"a": ["<i8", "x"]}}',
    ],
)
def test_a_forged_header_with_a_right_checksum_is_refused(header, tmp_path):
    header = header.replace(b"KEY", b'{"size": 12, "parts": ["a", null, 3]}')
    content = index.MAGIC + len(header).to_bytes(8, "little") + header
    content += index.padding(len(content))
    checksum = index.zlib.crc32(content).to_bytes(4, "little")
    (tmp_path / "x.index").write_bytes(content + checksum)
    assert read_index(tmp_path / "x.index", KEY) is None


def test_what_is_no_file_is_no_index(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert read_index(tmp_path / "pipe", KEY) is None
    assert read_index(tmp_path, KEY) is None
    assert read_index(tmp_path / "nothing", KEY) is None
    assert read_index(tmp_path / ("x" * 300), KEY) is None


# ---------------------------------------------------------------- one process builds it
def build_once(rank, folder, fails):
    """In each of several processes: build the index, if this one is to do so."""
    with one_builder(folder / "x.index", lambda: (folder / f"waited {rank}").touch()) as is_builder:
        if is_builder:
            (folder / f"built {rank}").touch()
            while len(list(folder.glob("waited *"))) < 2:
                time.sleep(0.01)
            if not fails:
                write_index(folder / "x.index", KEY, Index(FACTS, {}))
    is_there = read_index(folder / "x.index", KEY) is not None
    (folder / f"{is_there} {rank}").touch()


@pytest.mark.parametrize("fails", [False, True])
def test_one_process_builds_and_the_others_wait_for_it(fails, tmp_path):
    run_in_forks(build_once, tmp_path, fails, processes=3)
    assert len(list(tmp_path.glob("built *"))) == 1
    assert len(list(tmp_path.glob(f"{not fails} *"))) == 3
    assert not list(tmp_path.glob("*.lock"))


def test_a_lock_that_a_dead_process_left_holds_nobody_up(tmp_path):
    (tmp_path / "x.index.lock").touch()
    with one_builder(tmp_path / "x.index", pytest.fail) as is_builder:
        assert is_builder
    assert not (tmp_path / "x.index.lock").exists()


def test_file_systems_without_locks_and_folders_without_room(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(index.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(index.fcntl, "flock", no_locks)
    for folder in (tmp_path, tmp_path / "nothing"):
        with one_builder(folder / "x.index", pytest.fail) as is_builder:
            assert is_builder
    assert not list(tmp_path.iterdir())
