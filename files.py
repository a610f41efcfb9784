"""Files: atomic writes, JSON and JSON Lines, the log of a run, archives, and the lock of a folder.

A file is either the old one or the whole new one: it is written under a temporary name, flushed to
the disk and renamed. What cannot be read is an error that names the file.
"""

import contextlib
import difflib
import errno
import fcntl
import functools
import io
import itertools
import json
import math
import os
import posixpath
import re
import shutil
import socket
import tarfile
import tempfile
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any

from PIL import Image, PngImagePlugin
from safetensors import SafetensorError

from fields import show
from world import first_line_of, is_worker_death

# of the format of checkpoints and logs; it stands in config.json and in the first row of a log
VERSION = "2.0"


class BadSample(ValueError):
    """A sample that cannot be used. The message names the file and the line."""


# ---------------------------------------------------------------- writing
def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """write(temporary path), flush to the disk, rename.

    Raises OSError, also where a library says it otherwise.
    """
    path = Path(path)
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (
        RuntimeError,
        SafetensorError,
    ) as error:  # what torch.save and save_file make of a full disk
        if is_worker_death(error):
            raise  # its death is said wherever the program is, and has nothing to do with the disk
        free = shutil.disk_usage(path.parent).free
        if free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        reason = first_line_of(error)
        raise OSError(f"{reason} ({size_in_words(free)} are free there)") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: Path, names: tuple[str, ...]) -> None:
    """Remove what `write_atomically` left behind when its process died.

    That is NAME.tmp<digits>, for exactly these names.
    """
    if not folder.is_dir():
        return
    pattern = re.compile(rf"({'|'.join(re.escape(name) for name in names)})\.tmp[0-9]+")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.is_file():
            path.unlink()


def write_text(path: str | Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_json_lines(path: str | Path, rows: list) -> None:
    """One row a line. Raises ValueError for a row that `json_lines` would refuse to read."""
    lines = []
    for number, row in enumerate(rows, 1):
        line = json.dumps(row, ensure_ascii=False) + "\n"
        check_line_length(len(line.encode()), f"{path}, line {number},")
        lines.append(line)
    write_text(path, "".join(lines))


def why_no_folder(folder: str | Path) -> str:
    """Why no files can be written into a folder that is there, or may be made; empty if they can.

    For the check of an output before the work begins.
    """
    folder = Path(folder)
    try:
        if folder.is_symlink() and not folder.exists():
            return f"it is a link to {os.readlink(folder)}, which does not exist"
        if folder.exists() and not folder.is_dir():
            return "it is a file, not a folder"
        # the folder itself, or the one that it would be made in
        place = Path(os.path.abspath(folder))
        while not place.exists():
            place = place.parent
    except OSError as error:  # a name that is too long, a folder that may not be entered
        return str(error.strerror)
    if not place.is_dir():
        return f"{place} is a file, not a folder"
    # the one sure test, on a read-only disk too; such a file has no name that could be left behind
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return f"no file can be made in {place} ({error.strerror})"


def check_output(flag: str, path: str) -> None:
    """Raises ValueError if the file of an output flag cannot be written, before anything is loaded.

    An empty path stands for a default, inside a folder that is read anyway.
    """
    if not path:
        return
    try:
        is_there = Path(path).exists()
    except OSError as error:  # a name that is too long
        raise ValueError(f"{flag} {show(path)} cannot be written: {error.strerror}") from None
    if path.endswith("/") or (is_there and not Path(path).is_file()):
        kind = "a folder" if path.endswith("/") or Path(path).is_dir() else "a device"
        raise ValueError(f"{flag} {path} cannot be written: it is {kind}, not a file")
    folder = Path(path).parent
    if not folder.is_dir():
        raise ValueError(f"{flag} {path} cannot be written: there is no folder {folder}")
    reason = why_no_folder(folder)
    if reason:
        raise ValueError(f"{flag} {path} cannot be written: {reason}")


def save_result(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Write what the user asked for, and say where it is. Raises ValueError if that fails."""
    try:
        write_atomically(path, write)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error})") from error
    print(f"written: {path}")


def save_json(path: str | Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    save_result(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


PICTURE_MARK = "drawn by ask.py or figures.py"  # in the comment of our pictures


def save_picture(path: str | Path, picture: Any) -> None:
    """A Pillow image as PNG, marked as ours."""
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Comment", PICTURE_MARK)
    save_result(path, lambda temporary: picture.save(temporary, "PNG", pnginfo=comment))


def is_our_picture(path: str | Path) -> bool:
    """Whether a file is one that `save_picture` has written."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info.get("Comment") == PICTURE_MARK
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


# ---------------------------------------------------------------- reading
@functools.lru_cache(maxsize=256)
def open_once(path: str) -> io.BufferedReader:
    """A file that stays open, as parts of it are read again and again."""
    return open(path, "rb")  # noqa: SIM115


def read_at(path: str, offset: int, size: int) -> bytes:
    """A part of a file. It moves no file position, so that forked workers may share the handle."""
    return os.pread(open_once(path).fileno(), size, offset)


BROKEN_TAR = (
    tarfile.TarError,
    ValueError,
    OverflowError,
    MemoryError,
    RecursionError,
    EOFError,
    OSError,
)
MOST_LINKS = 40  # from a member to a file, as on Linux; links may run in a circle


def link_target(member: tarfile.TarInfo) -> str:
    """The member that a link means: a symlink is relative to its own folder, a hard link is not."""
    if member.issym():
        folder = posixpath.dirname(member.name)
        return posixpath.normpath(posixpath.join(folder, member.linkname))
    return posixpath.normpath(member.linkname)


def add_links(index: dict[str, tuple[int, int]], links: dict[str, str]) -> None:
    """Add to the index of files the links that end at one of them. links: name -> target."""
    places = {}
    for name, first_target in links.items():
        target = first_target
        for _ in range(MOST_LINKS):
            if target in index:
                break
            target = links.get(target, "")
        if target in index:
            places[name] = index[target]
    for name, place in places.items():
        index.setdefault(name, place)


@functools.cache
def tar_index(path: str) -> dict[str, tuple[int, int]]:
    """Of each member of an uncompressed tar archive its (offset, size).

    A link to another member is a member too. What is called ./b.png is found as b.png as well.
    """
    size = os.path.getsize(path)
    index: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile() and not member.issparse():
                    index[member.name] = (member.offset_data, member.size)
                elif member.issym() or member.islnk():
                    target = link_target(member)
                    # the first one counts: GNU tar writes what it meets again as a link to itself
                    links.setdefault(member.name, target)
                    links.setdefault(posixpath.normpath(member.name), target)
    except BROKEN_TAR as error:
        reason = str(error) or type(error).__name__
        raise BadSample(f"{path} is not an uncompressed tar archive: {reason}") from None
    for name in list(index):
        index.setdefault(posixpath.normpath(name), index[name])
    add_links(index, links)
    for name, (offset, length) in index.items():
        if length < 0 or offset + length > size:
            raise BadSample(f"{path} is cut short: it does not hold all of {show(name)}")
    return index


def split_member(path: str) -> tuple[str, str | None]:
    """(file, member) of a path or `archive.tar::member`; a file alone has no member, None."""
    if os.path.isfile(path) or "::" not in path:  # a file may have such a name
        return path, None
    archive, _, member = path.partition("::")
    return archive, member


def member_place(path: str, archive: str, member: str) -> tuple[int, int]:
    """(offset, size) of a member of an archive. Raises BadSample, with the path, if it is none."""
    if member not in tar_index(archive):
        raise BadSample(f"{path}: no such file or archive member")
    return tar_index(archive)[member]


def read_bytes(path: str | Path) -> bytes:
    """The content of a file, or of `archive.tar::member`. Raises BadSample if there is none."""
    file, member = split_member(str(path))
    if os.path.isdir(file):
        raise BadSample(f"{path} is a folder, not a file")
    if not os.path.isfile(file):
        raise BadSample(f"{path}: no such file or archive member")
    if member is None:
        return Path(file).read_bytes()
    offset, size = member_place(str(path), file, member)
    return read_at(file, offset, size)


# ---------------------------------------------------------------- texts
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8; some editors write it
OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff")  # how UTF-16 and UTF-32 begin
MOST_BYTES = 64 * 2**20  # of a config, a list of answers, a mixture, a log ...
MOST_BYTES_OF_DATA = 8 * 2**30  # of a file that holds a whole dataset
MOST_BYTES_OF_A_LINE = 16 * 2**20  # of JSON Lines


def decode_text(content: bytes, name: str, first_line: int = 1) -> str:
    """UTF-8 from a file called `name`, without its byte order mark.

    first_line: the number of the line that `content` begins with. Raises ValueError with the line.
    """
    if content.startswith(OTHER_MARKS):
        raise ValueError(f"{name} is UTF-16 or UTF-32; it must be UTF-8")
    content = content.removeprefix(BYTE_ORDER_MARK)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        byte = content[error.start]
        raise ValueError(
            f"{name}, line {line}: the byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def size_in_words(size: int) -> str:
    """A number of bytes as a person reads it: 12 KiB, 3 MiB."""
    if size < 2**20:
        return f"{math.ceil(size / 2**10)} KiB"
    return f"{size / 2**20:.0f} MiB"


def read_bounded(path: str | Path, most_bytes: int) -> bytes:
    """The content of a file that is not larger than it may be. Raises ValueError."""
    if os.path.isfile(path):
        size = os.path.getsize(path)
        if size > most_bytes:
            raise ValueError(
                f"{path} has {size_in_words(size)}; it must be at most {size_in_words(most_bytes)}"
            )
    return read_bytes(path)


def read_text(path: str | Path, most_bytes: int = MOST_BYTES) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises ValueError with the line.

    Its lines end in "\n", whatever they ended in.
    """
    text = decode_text(read_bounded(path, most_bytes), str(path))
    return text.replace("\r\n", "\n")


def check_characters(value: Any, name: str) -> None:
    """Raises ValueError for half a character ("\\ud83d" alone), which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        around = error.object[max(error.start - 30, 0) : error.start + 10]
        raise ValueError(f"{name} has half a character, in {around!r}") from None


def parse_json(content: bytes, name: str) -> Any:
    """JSON from a file called `name`; ValueError if it is none."""
    text = decode_text(content, name)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}"
        if "\n" in text.strip():
            place = f"line {error.lineno}, {place}"
        raise ValueError(f"{name} is not JSON: {error.msg} ({place})") from None
    except RecursionError:
        raise ValueError(f"{name} is not JSON: brackets are nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{name} is not JSON: {error}") from None
    if "\\ud" in text or "\\uD" in text:
        check_characters(value, name)
    return value


# ---------------------------------------------------------------- records
KIND_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    NoneType: "null",
}


def as_dict(value: Any) -> dict:
    """A value that should be an object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def is_of_kind(value: Any, declared: Any) -> bool:
    """Whether a value of a file has its declared type: str, int, str | None ...

    A bool is no number, and a whole number is a number.
    """
    kinds = typing.get_args(declared) or (declared,)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, kinds)


def name_of_kind(declared: Any) -> str:
    """`str | None` -> "a text or null"."""
    kinds = typing.get_args(declared) or (declared,)
    return " or ".join(KIND_NAMES[kind] for kind in kinds)


MOST_KEYS = 100  # of a record that are compared: one may have millions


def similar_key(record: dict, key: str) -> str:
    """The key of a record that looks most like another, misspelt one; empty if none does."""
    names = {}
    for name in itertools.islice(record, MOST_KEYS):
        if isinstance(name, str) and name != key:
            names[name.casefold()] = name
    similar = difflib.get_close_matches(key.casefold(), names, n=1, cutoff=0.8)
    return names[similar[0]] if similar else ""


def need(record: Any, key: str, declared: Any, place: str = "", filled: bool = False) -> Any:
    """record[key], of its declared type. A key that may be null may be absent too.

    place: file and line, or entry, for the message. filled: a text or list must not be empty.
    Raises BadSample, a ValueError, for anything else.
    """
    prefix = f"{place}: " if place else ""
    if not isinstance(record, dict):
        raise BadSample(f"{prefix}{show(record)} is not an object with the key {key!r}")
    value = record.get(key)
    if key not in record and not is_of_kind(None, declared):
        similar = similar_key(record, key)
        hint = f"; its key {show(similar)} looks like it" if similar else ""
        raise BadSample(f"{prefix}there is no {key!r} in {show(record)}{hint}")
    if not is_of_kind(value, declared):
        wanted = name_of_kind(declared)
        raise BadSample(f"{prefix}{key!r} is {show(value)}; it must be {wanted}")
    is_empty = isinstance(value, str | list) and not value
    is_blank = isinstance(value, str) and not value.strip()
    if filled and (is_empty or is_blank):
        raise BadSample(f"{prefix}{key!r} is {show(value)}; it must not be empty")
    return value


def read_json(path: str | Path, *kinds: type, most_bytes: int = MOST_BYTES) -> Any:
    """A JSON file that holds one of `kinds` (dict, list ...), or anything. Raises ValueError."""
    value = parse_json(read_bounded(path, most_bytes), str(path))
    if kinds and not isinstance(value, kinds):
        wanted = " or ".join(KIND_NAMES[kind] for kind in kinds)
        raise ValueError(f"{path} must hold {wanted}, found {show(value)}")
    return value


def check_line_length(length: int, place: str) -> None:
    """Raises ValueError for a line of more bytes than a line may have."""
    if length > MOST_BYTES_OF_A_LINE:
        raise ValueError(
            f"{place} has {size_in_words(length)}; it must be at most "
            f"{size_in_words(MOST_BYTES_OF_A_LINE)}"
        )


def json_lines(content: bytes, name: str) -> Iterator[tuple[int, Any]]:
    """(number of the line, its value) of each line of JSON Lines that is not blank.

    Raises ValueError with the line.
    """
    for number, line in enumerate(io.BytesIO(content), 1):
        place = f"{name}, line {number},"
        check_line_length(len(line), place)
        decode_text(line, name, number)  # else the line would be named twice
        if line.removeprefix(BYTE_ORDER_MARK).strip():
            yield number, parse_json(line, place)


def read_json_lines(path: str | Path, most_bytes: int = MOST_BYTES_OF_DATA) -> list:
    """The rows of a JSON Lines file, without blank lines. Raises ValueError with the line."""
    content = read_bounded(path, most_bytes)
    return [value for _, value in json_lines(content, str(path))]


def read_log(path: Path) -> list[dict]:
    """The rows of a run's log.jsonl, less a last one that a death cut short.

    Raises ValueError, with file and line, for a row that is not an object with a whole "step".
    """
    content = read_bounded(path, MOST_BYTES_OF_DATA)
    whole_lines = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, row in json_lines(whole_lines, str(path)):
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(
                f"{path}, line {number}: a row must have a whole step, found {show(row)}"
            )
        rows.append(row)
    return rows


# ---------------------------------------------------------------- one run a folder
def is_alive(process_id: int) -> bool:
    """Whether a process of this host runs."""
    if process_id <= 0:
        return False
    try:
        os.kill(process_id, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


LOCK_START = '{"process": '  # then a number
LOCK_MIDDLE = ', "host": "'  # then a name, and "}
LOCK = re.compile(re.escape(LOCK_START) + "[0-9]+" + re.escape(LOCK_MIDDLE) + '[^"]*"}')


def is_lock(content: str) -> bool:
    """Whether this is what `take_lock` writes, or the beginning of it."""
    content = content.strip("\0")  # what a power failure may leave
    if LOCK.fullmatch(content) or LOCK_START.startswith(content):
        return True
    if not content.startswith(LOCK_START):
        return False
    # cut short by a death
    rest = content.removeprefix(LOCK_START).lstrip("0123456789")
    if LOCK_MIDDLE.startswith(rest):
        return True
    return rest.startswith(LOCK_MIDDLE) and '"' not in rest.removeprefix(LOCK_MIDDLE)[:-1]


def lock_owner(content: str) -> tuple[int, str] | None:
    """(process id, host) in a lock file; None if it is free, or was cut short by a death."""
    try:
        owner = json.loads(content)
        return int(owner["process"]), str(owner["host"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def take_lock(file: Path) -> None:
    """Write this process into the lock file. A lock that a dead process left is taken over.

    Raises ValueError if a process that may be alive holds it, or for somebody's own file.
    """
    host = socket.gethostname()
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is no file; choose another --out_dir, or move it away")
    with open(file, "a+", encoding="utf-8", errors="replace") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # nobody else reads or writes it until it is closed
        lock.seek(0)
        content = lock.read(10_000)
        if not is_lock(content):
            raise ValueError(
                f"{file} is not the lock of a run, it begins with {show(content)}; choose "
                "another --out_dir, or move the file away"
            )
        owner = lock_owner(content)
        if owner is not None:
            process_id, owner_host = owner
            is_own = process_id == os.getpid() and owner_host == host
            is_dead = owner_host == host and not is_alive(process_id)
            if not is_own and not is_dead:
                raise ValueError(
                    f"{file.parent} is in use by process {process_id} on {owner_host}; choose "
                    f"another --out_dir, or, if that process is gone, remove {file}"
                )
        lock.truncate(0)
        json.dump({"process": os.getpid(), "host": host}, lock)


@contextlib.contextmanager
def folder_lock(folder: Path, needed: bool = True) -> Iterator[None]:
    """Hold folder/run.lock, which is empty when it is free. Raises ValueError if it is taken.

    needed=False: another process of this run holds it.
    """
    file = folder / "run.lock"
    if needed:
        try:
            take_lock(file)
        except OSError as error:
            raise ValueError(f"cannot write {file}: {error.strerror or error}") from error
    try:
        yield
    finally:
        if needed:
            # on a full disk it stays: the next run sees that this process is dead
            with contextlib.suppress(OSError):
                os.truncate(file, 0)
