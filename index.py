"""The index of a large source of records: what opening it computes, in one file of arrays.

Opening tens of millions of records takes minutes, and what it finds takes gigabytes. So one process
of a node finds it, and writes it beside the data; all processes map that file into their memory,
where the system keeps one copy of it for all of them. An index is never believed: it counts only
with the key of these very data, with the length that it should have, and with the right checksum.

The file: MAGIC, the length of the header, the header (JSON), the arrays, the checksum. Every piece
begins at a multiple of 64 bytes, and the checksum is of all that stands before it.
"""

import contextlib
import errno
import fcntl
import io
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from files import MOST_BYTES, need, parse_json, write_atomically

MAGIC = b"an index of data"
PIECE = 2**20  # bytes that are read at once
ALIGNMENT = 64
CHECKSUM_BYTES = 4
COLUMN_TYPES = ("<i4", "<i8")  # whole numbers of 4 or 8 bytes, the smallest byte first


class Index(NamedTuple):
    """What was found when the data were opened."""

    facts: dict[str, Any]  # single values, as JSON has them
    arrays: dict[str, np.ndarray]  # int32 or int64, (n,), read-only where they are a file's


# ---------------------------------------------------------------- writing
def padding(size: int) -> bytes:
    """What follows `size` bytes, so that the next piece is aligned."""
    return b"\0" * (-size % ALIGNMENT)


def header_of(key: dict, index: Index) -> bytes:
    """All that stands before the arrays."""
    columns = {}
    for name, values in index.arrays.items():
        columns[name] = [values.dtype.newbyteorder("<").str, len(values)]
    header = json.dumps({"key": key, "facts": index.facts, "columns": columns}).encode()
    start = MAGIC + len(header).to_bytes(8, "little") + header
    return start + padding(len(start))


def write_index(path: Path, key: dict, index: Index) -> None:
    """Write the index of the data that have this key. Raises OSError."""

    def write(temporary: Path) -> None:
        checksum = 0
        with open(temporary, "wb") as file:
            pieces: list[Any] = [header_of(key, index)]
            for values in index.arrays.values():
                content = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
                pieces += [content.view(np.uint8), padding(content.nbytes)]
            for piece in pieces:
                file.write(piece)
                checksum = zlib.crc32(piece, checksum)
            file.write(checksum.to_bytes(CHECKSUM_BYTES, "little"))

    write_atomically(path, write)


# ---------------------------------------------------------------- reading
def read_header(file: io.BufferedReader, size: int) -> tuple[dict, int]:
    """The header of an index, and the offset behind it. Raises ValueError if there is none."""
    start = file.read(len(MAGIC) + 8)
    if not start.startswith(MAGIC):
        raise ValueError("it does not begin as an index does")
    length = int.from_bytes(start[len(MAGIC) :], "little")
    if length > min(size, MOST_BYTES):
        raise ValueError("its header is cut short")
    header = parse_json(file.read(length), "the header")
    end = len(start) + length
    return header, end + len(padding(end))


def has_checksum(file: io.BufferedReader, size: int) -> bool:
    """Whether the checksum at the end of a file is the one of its content.

    The file is read, not mapped: mapped pages would count as memory of this process.
    """
    file.seek(0)
    checksum = 0
    left = size - CHECKSUM_BYTES
    while left > 0:
        piece = file.read(min(PIECE, left))
        if not piece:
            return False
        checksum = zlib.crc32(piece, checksum)
        left -= len(piece)
    return file.read() == checksum.to_bytes(CHECKSUM_BYTES, "little")


def map_arrays(file: io.BufferedReader, columns: dict, offset: int, size: int) -> dict:
    """The arrays of an index, in memory that all processes share. Raises ValueError."""
    places = {}
    for name, (column_type, count) in columns.items():
        if column_type not in COLUMN_TYPES:
            raise ValueError("it has a column of an unknown type")
        places[name] = (column_type, count, offset)
        length = count * np.dtype(column_type).itemsize
        offset += length + len(padding(length))
    if offset + CHECKSUM_BYTES != size:
        raise ValueError("it does not have the length that it should have")
    mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    arrays = {}
    for name, (column_type, count, start) in places.items():
        arrays[name] = np.frombuffer(mapped, column_type, count, start)
    return arrays


def read_index(path: Path, key: dict) -> Index | None:
    """The index in a file; None if there is none, if it is damaged, or if it is of other data."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, offset = read_header(file, size)
            if need(header, "key", dict) != key or not has_checksum(file, size):
                return None
            arrays = map_arrays(file, need(header, "columns", dict), offset, size)
            return Index(need(header, "facts", dict), arrays)
    except (ValueError, TypeError, OSError):
        return None  # whatever is wrong with it: it is no index


# ---------------------------------------------------------------- one process builds it
# what file systems without locks say
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def lock_or_wait(lock: io.TextIOWrapper, say_waiting: Callable[[], None]) -> bool:
    """Lock a file. False if another process had done so; it has freed it by then.

    Where there are no locks, several processes may build the same index.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say_waiting()
        fcntl.flock(lock, fcntl.LOCK_SH)  # all that wait go on at the same time
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


@contextlib.contextmanager
def one_builder(path: Path, say_waiting: Callable[[], None]) -> Iterator[bool]:
    """Whether this process is to build the index. The others wait here until it is built.

    A process that waited in vain, since the first one failed, does not build it either: else they
    would do so one after the other. The lock is a file that is there only while one builds, and the
    system frees it if that one dies.
    """
    lock_path = Path(f"{path}.lock")
    try:
        lock = open(lock_path, "w")  # noqa: SIM115
    except OSError:  # then the index cannot be written either, and that says why
        yield True
        return
    with lock:
        is_builder = lock_or_wait(lock, say_waiting)
        try:
            yield is_builder
        finally:
            if is_builder:
                lock_path.unlink(missing_ok=True)
