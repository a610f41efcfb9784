"""A seeded fuzzer: python tests/fuzz.py [KIND ...] [--mutations 3000] [--seed 0] [--only NUMBER]

For each kind of input the script makes a few good ones, damages copies of them, and reads these as
a user's command would. The outcome of each must be a right result, or ValueError or OSError with a
short message. Everything else is a fault: another exception, a death of the process, a result that
cannot be right, something executed, a changed input, 10 seconds, 2 GB.

A mutation is a function of (seed, kind, number) alone. The first numbers are the good inputs
themselves, which must be read. --only NUMBER runs a single one and keeps its folder.

The order of this file: 1. mutations; 2. inputs and targets, kind by kind; 3. the worker process;
4. the report.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import io
import json
import math
import os
import pickletools
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save  # noqa: E402

import ask  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import figures  # noqa: E402
import files  # noqa: E402
import images  # noqa: E402
import loop  # noqa: E402
import metrics  # noqa: E402
import multigrid  # noqa: E402
import prepare  # noqa: E402
import tasks  # noqa: E402
import tokenizer as tokenizers_room  # noqa: E402
import train  # noqa: E402
import weights  # noqa: E402
from llava_manager import LlavaManager, LlavaManagerConfig  # noqa: E402
from model import ManagerTower, ManagerTowerConfig  # noqa: E402
from world import World, evaluating, sentence_of  # noqa: E402

SECONDS = 10.0  # of processor time, that a mutation may take
MEGABYTES = 2048  # that the process may have meanwhile
WALL_SECONDS = 90.0  # on the clock: for what waits and takes no processor time
BATCH = 100  # mutations of one process: caches do not grow for ever
MOST_MESSAGE = 2000  # characters
MOST_LINES = 10  # of a message

Random = random.Random


class Case(NamedTuple):
    """One input: a small folder."""

    name: str
    files: dict[str, bytes]  # path in the folder -> content
    changed: tuple[str, ...]  # the files that mutations change


class Insane(Exception):
    """A result that cannot be right."""


def require(condition: Any, what: str) -> None:
    if not condition:
        raise Insane(what)


# ================================================================ 1. mutations
# ---------------------------------------------------------------- bytes
MAGIC = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1)


def span_in(rng: Random, length: int) -> tuple[int, int]:
    """(start, end) of some bytes; half of the time among the first 512, where headers are."""
    most = length if rng.random() < 0.5 else min(length, 512)
    start = rng.randrange(most)
    size = rng.choice((1, 1, 1, 2, 4, 8, 16, 64, 512))
    return start, min(length, start + size)


def mutate_bytes(rng: Random, content: bytes, other: bytes) -> bytes:
    """One change somewhere: bits, bytes, blocks; cut off; or the end of another file."""
    if not content:
        return other
    action = rng.randrange(9)
    start, end = span_in(rng, len(content))
    if action == 0:
        return content[:start]
    if action == 1:
        return content[:start] + other[rng.randrange(len(other) + 1) :]
    if action <= 3:  # a number at the border of a type, at a multiple of its size
        size = rng.choice((1, 2, 4, 8))
        start -= start % size
        number = rng.choice(MAGIC) % 256**size
        magic = number.to_bytes(size, rng.choice(("little", "big")))
        return content[:start] + magic + content[start + size :]
    block = content[start:end]
    noise_bytes = rng.randbytes(len(block))
    flipped = bytes([block[0] ^ 1 << rng.randrange(8)]) + block[1:]
    replacement = rng.choice(
        (flipped, flipped, noise_bytes, b"", block + noise_bytes, block * 2, block * 50)
    )
    return content[:start] + replacement + content[end:]


# ---------------------------------------------------------------- lines of text
def to_encoding(encoding: str) -> Callable[[bytes], bytes]:
    return lambda content: content.decode(errors="replace").encode(encoding, errors="replace")


WHOLE_TEXTS: tuple[Callable[[bytes], bytes], ...] = (
    lambda content: b"\xef\xbb\xbf" + content,
    lambda content: content.replace(b"\n", b"\r\n"),
    lambda content: content.replace(b"\n", b"\r"),
    lambda content: content.replace(b"\n", b""),
    lambda content: content.rstrip(b"\n"),
    lambda content: content.replace(b'"', b"'"),
    lambda content: b"\n" + content.replace(b"\n", b"\n \t\n"),
    lambda content: content + b"\0" * 9,
    lambda content: b" " * 100_000 + content,
    to_encoding("utf-16"),
    to_encoding("utf-32"),
    to_encoding("cp500"),  # EBCDIC
)
PIECES = (
    b"\0", b"\xe9", b"\xed\xa0\x80", "\u2028".encode(), "\u202e".encode(), b"\xef\xbb\xbf",
    b",", b"//", b"NaN", b"\\ud800", b"\\u0000", b"[" * 20_000, b"<image>", b"9" * 5000,
    b"x" * 100_000, b"\t", b"../",
)  # fmt: skip


def mutate_text(rng: Random, content: bytes) -> bytes:
    """Encodings, ends of lines, odd characters, lines that are gone, doubled or exchanged."""
    action = rng.randrange(3)
    if action == 0:
        return rng.choice(WHOLE_TEXTS)(content)
    if action == 1:
        place = rng.randrange(len(content) + 1)
        return content[:place] + rng.choice(PIECES) + content[place:]
    lines = content.split(b"\n")
    first = rng.randrange(len(lines))
    second = rng.randrange(len(lines))
    change = rng.randrange(4)
    if change == 0:
        del lines[first]
    elif change == 1:
        lines.insert(second, lines[first])
    elif change == 2:
        lines[first], lines[second] = lines[second], lines[first]
    else:
        lines[first] = b""
    return b"\n".join(lines)


# ---------------------------------------------------------------- JSON
# what json.dumps does not write; "@@3@@" in a value becomes the fourth of them
RAW = (
    "NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '{"a":' * 50_000,
    "[" * 900 + "]" * 900, '{"a":' * 400 + "1" + "}" * 400, '"\\ud800"', '"a\\udfffb"', "-0.0",
    "1E400", "0x10", "tru", '{"a": 1, "a": 2}', "1.0", "1" + "0" * 400, "0." + "0" * 400 + "1",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 255, 65536, 2**31 - 1, 2**31, 2**53, 2**63 - 1,
    2**63, 10**12, 10**20, 1.5, -0.5, 0.0, 1e-9, 1e9, 1e308, 5e-324, "", " ", "x", "1", "true",
    "None", "<image>", "<image> <image>", "\0", "a\u202eb\u2028c", "x" * 3000, "naïve 雪 🙂",
    "..", "/dev/zero", "/proc/self/mem", "b.tar::x", "::", [], {}, [[]], [None], [0], [1, 2],
    [-1], ["x"], ["x", None], [["x"]], [[1, 2], [3]], [{}], [True], list(range(5000)),
    {"a": {}}, {"x": None}, {"x": "y"}, {"x": 1}, {"": 0.5}, {"from": "human", "value": "x"},
)  # fmt: skip


def random_value(rng: Random) -> Any:
    if rng.random() < 0.25:
        return f"@@{rng.randrange(len(RAW))}@@"
    return rng.choice(VALUES)


def places_in(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree of dicts and lists."""
    places = []
    waiting = [tree]
    seen = set()  # an alias of YAML may hold itself
    while waiting:
        container = waiting.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        keys: Sequence = ()
        if isinstance(container, dict):
            keys = list(container)
        elif isinstance(container, list):
            keys = range(len(container))
        for key in keys:
            places.append((container, key))
            waiting.append(container[key])
    return places


def changed_text(rng: Random, text: str) -> str:
    place = rng.randrange(len(text) + 1)
    piece = rng.choice(("\0", " ", "\n", "é", "<image>", "x" * 2000, "/", "..", "%", "{", "0", ":"))
    return rng.choice(
        (text[:place] + piece + text[place:], text[:place], text[place:], text * 2, text.upper())
    )


def changed_number(rng: Random, number: float) -> Any:
    return rng.choice(
        (
            -number,
            number + 1,
            number - 1,
            number * 1_000_000,
            number / 2,
            number * 2,
            float(number),
            str(number),
            [number],
            bool(number),
        )
    )


def near_value(rng: Random, value: Any) -> Any:
    """A value like this one."""
    if isinstance(value, str):
        return changed_text(rng, value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return changed_number(rng, value)
    if isinstance(value, list):
        return rng.choice(([], value * 2, value[:1], value[::-1], [value], [*value, None]))
    if isinstance(value, dict):
        return rng.choice(({}, [value], list(value), list(value.values()), {"x": value}))
    return random_value(rng)


def change_entry(rng: Random, container: Any, key: Any, places: list) -> None:
    """Change one entry of a dict or list in place."""
    action = rng.randrange(8)
    if action <= 2:
        container[key] = random_value(rng)
    elif action <= 4:
        container[key] = near_value(rng, container[key])
    elif action == 5:
        del container[key]
    elif action == 6:
        other, other_key = rng.choice(places)
        copied = json.dumps(other[other_key])  # not the object itself: it would be a circle
        container[key] = json.loads(copied)
    elif isinstance(container, dict):
        name = rng.choice((key.upper(), f"{key} ", "x", "", "video", "answers", "model_type"))
        container[name] = container[key] if rng.random() < 0.5 else random_value(rng)
    else:
        container.insert(key, random_value(rng))


def mutate_tree(rng: Random, tree: Any) -> Any:
    """A changed tree of JSON values; it may hold the placeholders of RAW."""
    holder = {"root": tree}
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        places = places_in(holder)
        # the root itself is seldom changed, and in large trees the upper entries are
        chosen = rng.choice(places[: rng.choice((3, 12, 100, len(places)))][1:] or places)
        change_entry(rng, *chosen, places)
        if "root" not in holder:
            return None
    return holder["root"]


def write_tree(rng: Random, tree: Any, indent: int | None = None) -> str:
    """JSON with what no JSON writer writes."""
    text = json.dumps(tree, indent=indent, ensure_ascii=rng.random() < 0.8)
    keys = list(re.finditer(r'"\w+": ', text))
    if keys and rng.random() < 0.05:  # a key that is there twice
        key = rng.choice(keys)
        second = f"{key[0]}{json.dumps(random_value(rng))}, "
        text = text[: key.start()] + second + text[key.start() :]
    return re.sub(r'"@@(\d+)@@"', lambda found: RAW[int(found[1])], text)


def mutate_json(rng: Random, content: bytes) -> bytes:
    if rng.random() < 0.15:
        return mutate_text(rng, content)
    text = write_tree(rng, mutate_tree(rng, json.loads(content)))
    return text.encode("utf-8", errors="surrogatepass")


def mutate_json_lines(rng: Random, content: bytes) -> bytes:
    if rng.random() < 0.2:
        return mutate_text(rng, content)
    lines = content.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = mutate_json(rng, lines[number])
    return b"\n".join(lines) + b"\n"


YAML_PIECES = (
    "a: &a [*a]\n", "&x datasets: *x\n",
    "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b]\ndatasets: [*c,*c,*c]\n",
    "datasets: !!python/object/apply:os.system ['touch executed']\n",
    "- !!python/name:os.system\n", "<<: {datasets: []}\n",
    "datasets:\n- json_path: 2001-01-01\n",
    "datasets:\n- json_path: a.json\n  sampling_strategy: .inf\n",
    "datasets:\n- json_path: !!binary aGk=\n", "datasets: !!set {a, b}\n", "? [a, b]\n: c\n",
    "? {a: b}\n: c\n", "---\n", "...\n---\n", "%YAML 9.9\n---\n", "\t", "- - - - -\n",
    "[" * 5000, "2001-99-99: 0x\n", "a: 1_0:99:99.9e\n", "!!float x\n", "!!int ''\n",
    "!!timestamp x\n",
)  # fmt: skip


def mutate_yaml(rng: Random, content: bytes) -> bytes:
    action = rng.random()
    if action < 0.2:
        return mutate_text(rng, content)
    if action < 0.45:
        piece = rng.choice(YAML_PIECES).encode()
        return rng.choice((piece, piece + content, content + piece))
    tree = mutate_tree(rng, yaml.safe_load(content))
    if rng.random() < 0.5:
        return write_tree(rng, tree).encode("utf-8", errors="surrogatepass")
    return yaml.safe_dump(tree).encode()


# ---------------------------------------------------------------- pickles and PyTorch's files
COMMAND = b"cos\nsystem\nX\x0e\x00\x00\x00touch executed\x85R"  # what no reader may execute
OPCODES = (
    *(bytes([opcode]) for opcode in b"0012(}]))NRbsuaetlod.Q\x81\x85\x86\x87\x88\x89\x8f\x90\x91"),
    b"K\x05", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 8 + b"\x00",
    b"\x8a\xff" + b"\x7f" * 255, b"G\x7f\xf8" + b"\0" * 6, b"X\x03\0\0\0abc",
    b"X\xff\xff\xff\x7f", b"\x8d" + struct.pack("<Q", 2**40),
    b"\x8e" + struct.pack("<Q", 2**62), b"\x96" + struct.pack("<Q", 2**33),
    b"\x95" + struct.pack("<Q", 2**40), b"h\x00", b"h\x05", b"q\x01",
    b"r" + struct.pack("<I", 2**24), b"r" + struct.pack("<I", 2**31 - 1), b"p99999999\n",
    b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n)R", b"c__builtin__\neval\n",
    b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R", COMMAND, b"ios\nsystem\n",
    b"]" * 2000 + b"a" * 1999, b"]" * 200_000, b"(" * 200_000,
    b"}X\1\0\0\0a" * 500 + b"}" + b"s" * 500, b"2" * 50 + b"l", b"h\x00h\x00h\x00s",
    b"h\x00h\x00a", b"\x82\x01", b"P\n", b"F1e999\n", b"I" + b"9" * 6000 + b"\n", b"L99L\n",
    b"V\\ud800\n", b"S'x'\n", b"\x80\x09",
)  # fmt: skip


def mutate_pickle(rng: Random, content: bytes) -> bytes:
    """Insert, delete, repeat or exchange opcodes."""
    with contextlib.suppress(ValueError):  # a damaged one is left as it is
        starts = [
            position for _, _, position in pickletools.genops(content) if position is not None
        ]
        start = rng.choice(starts)
        later = [other for other in starts if other > start][: rng.choice((1, 1, 3, 20))]
        end = later[-1] if later else len(content)
        action = rng.randrange(6)
        if action <= 2:
            return content[:start] + rng.choice(OPCODES) + content[start:]
        if action == 3:
            return content[:start] + content[end:]
        if action == 4:
            return content[:end] + content[start:end] + content[end:]
        return content[:start] + rng.choice(OPCODES) + content[end:]
    return mutate_bytes(rng, content, content)


def read_zip(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(members: Sequence[tuple[str, bytes]], compression: int) -> bytes:
    """A zip without times: the same bytes every time."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", compression) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return sink.getvalue()


def lie_about_size(rng: Random, content: bytes) -> bytes:
    """Another size in a zip's directory, or in the header before a member."""
    mark, field = rng.choice(((b"PK\1\2", 20), (b"PK\1\2", 24), (b"PK\3\4", 18), (b"PK\3\4", 22)))
    places = [found.start() for found in re.finditer(re.escape(mark), content)]
    place = rng.choice(places) + field
    number = rng.choice((0, 1, 100, 0x7FFFFFF0, 0xFFFFFFFE, 0xFFFFFFFF))
    return content[:place] + struct.pack("<I", number) + content[place + 4 :]


def mutate_torch(rng: Random, content: bytes) -> bytes:
    """The pickle of a PyTorch file, or the zip around it."""
    members = read_zip(content)
    pickle_name = next(name for name in members if name.endswith("data.pkl"))
    action = rng.random()
    if action < 0.7:
        for _ in range(rng.choice((1, 1, 2))):
            members[pickle_name] = mutate_pickle(rng, members[pickle_name])
        return write_zip(list(members.items()), zipfile.ZIP_STORED)
    if action < 0.8:
        return lie_about_size(rng, content)
    name = rng.choice(list(members))
    change = rng.randrange(6)
    if change == 0:
        del members[name]
    elif change == 1:
        members[name.replace("data", rng.choice(("Data", "..", "data/data")))] = members.pop(name)
    elif change == 2:
        members[name] = mutate_bytes(rng, members[name], members[pickle_name])
    elif change == 3:
        members[name] = b"\0" * rng.choice((0, 1, 64 * 2**20))
    elif change == 4:
        members[f"x/{name}"] = members[name]
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    entries = list(members.items())
    if rng.random() < 0.3:
        rng.shuffle(entries)
    return write_zip(entries, compression)


# ---------------------------------------------------------------- safetensors
DTYPES = "F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL F8_E4M3 F8_E5M2 U16 U64 C64 F4 f32 X".split()
CASTS = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8)
SIZES = (0, 1, 2, 3, 2**31, 2**40, 2**63, -1, 1.5, "4", None)


def split_safetensors(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def mutate_header(rng: Random, content: bytes) -> bytes:
    """One field of the header of a .safetensors file, whatever the numbers behind it are."""
    header, numbers = split_safetensors(content)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    action = rng.randrange(8)
    if action == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif action == 1:
        entry["shape"] = near_value(rng, entry["shape"])
    elif action == 2:
        entry["shape"] = [*entry["shape"][:-1], rng.choice(SIZES)]
    elif action == 3:
        shift = rng.choice((-4, 1, 4, 64, 2**33))
        entry["data_offsets"][rng.randrange(2)] += shift
    elif action == 4:
        other = rng.choice(list(header.values()))
        entry["data_offsets"] = other.get("data_offsets", [0, 0])
    elif action == 5:
        header["__metadata__"] = rng.choice(
            ({"format": "pt"}, {"a": 1}, None, [], {"format": "np"})
        )
    elif action == 6:
        header[rng.choice(("", "x", f"{name}.x", name.upper()))] = header.pop(name)
    else:
        header = mutate_tree(rng, header)
    text = write_tree(rng, header).encode("utf-8", errors="surrogatepass")
    length = len(text)
    if rng.random() < 0.1:
        length = rng.choice((0, length - 1, length + 8, 2**40, 2**64 - 1))
    return length.to_bytes(8, "little") + text + numbers


def change_tensor(rng: Random, tensor: torch.Tensor) -> torch.Tensor:
    action = rng.randrange(9)
    if action == 0:
        return tensor.to(rng.choice(CASTS))
    if action == 1:
        return tensor[..., :-1] if tensor.dim() else tensor[None]
    if action == 2:
        return tensor[None]
    if action == 3:
        return tensor.flatten()
    if action == 4:
        return tensor.new_tensor(0.5)
    if action == 5:
        return tensor.new_zeros(rng.choice(((0,), (0, 4), (1,), (2, 0, 3))))
    if action == 6:
        return torch.full_like(tensor, rng.choice((math.nan, math.inf, 0.0, 3e38, -1e20)))
    if action == 7:
        return tensor.transpose(0, -1) if tensor.dim() > 1 else tensor.repeat(2)
    changed = tensor.clone().flatten()
    changed[rng.randrange(len(changed))] = rng.choice((math.nan, math.inf, 1e30))
    return changed.view(tensor.shape)


def mutate_safetensors(rng: Random, content: bytes) -> bytes:
    """The header alone, or a file that is whole but holds other tensors."""
    if rng.random() < 0.6:
        return mutate_header(rng, content)
    from safetensors.torch import load

    state = load(content)
    name = rng.choice(list(state))
    action = rng.randrange(6)
    if action == 0:
        del state[name]
    elif action == 1:
        prefix = rng.choice(("module.", "x.", "model.", "heads.vqa.", "heads.itc."))
        state[prefix + name] = state.pop(name)
    else:
        state[name] = change_tensor(rng, state[name])
    return save({key: tensor.contiguous() for key, tensor in state.items()})


# ---------------------------------------------------------------- pictures
SIDES = (
    0, 1, 2, 7, 255, 256, 4095, 7000, 16_384, 30_000, 65_535, 2**31 - 1, 2**31, 2**32 - 1,
)  # fmt: skip
WIDTH = 23  # of the good pictures: numbers that stand for nothing else
HEIGHT = 17


def chunks_of_png(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 8
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        yield content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        place += 12 + length


def write_png(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A PNG with the right checksums."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in chunks:
        checksum = zlib.crc32(name + body)
        parts.append(struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum))
    return b"".join(parts)


def mutate_png(rng: Random, content: bytes) -> bytes:
    """A chunk changed, gone, doubled or moved; the checksums are right."""
    chunks = list(chunks_of_png(content))
    number = rng.randrange(len(chunks))
    name, body = chunks[number]
    action = rng.randrange(5)
    if action == 0:
        del chunks[number]
    elif action == 1:
        chunks.insert(rng.randrange(len(chunks)), chunks[number])
    elif action == 2:
        kind = rng.choice((b"tRNS", b"PLTE", b"iCCP", b"acTL", b"fdAT", b"zTXt", b"gAMA", b"eXIf"))
        chunks.insert(1, (kind, rng.randbytes(rng.choice((0, 1, 6, 26)))))
    else:
        chunks[number] = (name, mutate_bytes(rng, body, body))
    return write_png(chunks)


def mutate_picture(rng: Random, content: bytes) -> bytes:
    """Another width or height, wherever the right one stands in the header."""
    is_png = content.startswith(b"\x89PNG")
    if is_png and rng.random() < 0.5:
        return mutate_png(rng, content)
    order = rng.choice(("<", ">"))
    code = rng.choice(("H", "I"))
    number = rng.choice((WIDTH, HEIGHT))
    wanted = struct.pack(order + code, number)
    places = [found.start() for found in re.finditer(re.escape(wanted), content[:2000])]
    if not places:
        return mutate_bytes(rng, content, content)
    place = rng.choice(places)
    side = rng.choice(SIDES) % 256 ** len(wanted)
    changed = content[:place] + struct.pack(order + code, side) + content[place + len(wanted) :]
    return write_png(list(chunks_of_png(changed))) if is_png else changed


# ---------------------------------------------------------------- archives
TAR_FIELDS = ((0, 100), (100, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100), (257, 8))


def mutate_tar(rng: Random, content: bytes) -> bytes:
    """A field of a header; mostly with the right checksum. Or a block that is gone or doubled."""
    block = 512 * rng.randrange(len(content) // 512)
    if rng.random() < 0.3:
        middle = content[block : block + 512] * rng.choice((0, 2))
        return content[:block] + middle + content[block + 512 :]
    headers = [
        place for place in range(0, len(content), 512) if content[place + 257 :][:5] == b"ustar"
    ]
    header = rng.choice(headers)
    changed = bytearray(content)
    start, length = rng.choice(TAR_FIELDS)
    field = rng.choice(
        (
            b"\0" * length,
            b"7" * length,
            b"\xff" * length,
            b"\x80" + b"\0" * (length - 2) + b"\x05",
            b"b.png".ljust(length, b"\0")[:length],
            bytes([rng.choice(b"0123456789gxLKSVD\0")]) * length,
            rng.randbytes(length),
            b"-1".ljust(length, b" ")[:length],
        )
    )
    changed[header + start : header + start + length] = field
    if rng.random() < 0.8:
        changed[header + 148 : header + 156] = b" " * 8
        total = sum(changed[header : header + 512])
        changed[header + 148 : header + 156] = f"{total:06o}\0 ".encode()
    return bytes(changed)


# ---------------------------------------------------------------- .arrow files
def arrow_bytes(table: Any, stream: bool = False, **options: Any) -> bytes:
    import pyarrow

    sink = io.BytesIO()
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(sink, table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


ENTRIES: tuple[Any, ...] = (
    None, [], [None], [[]], [[None]], "", "red", ["red"], [["red"]], ["True", "False"],
    [["red", "blue"], ["a"]], 0, [0], [7, -1], [[0.5]], [[math.nan]], [math.inf], 1.5, True,
    [True], b"\xff\xd8", [b"x"], {"a": 1}, [{"a": None}],
)  # fmt: skip


def mutate_arrow(rng: Random, content: bytes) -> bytes:
    """A column of another type, with other entries, gone, renamed or twice; another file format."""
    import pyarrow

    table = pyarrow.ipc.open_file(io.BytesIO(content)).read_all()
    number = rng.randrange(table.num_columns)
    name = table.column_names[number]
    action = rng.randrange(10)
    entries = table.column(number).to_pylist()
    if action <= 3:
        entries = [rng.choice(ENTRIES)] * len(entries)
    elif action <= 6:  # inside: all entries must stay of one type
        entries[rng.randrange(len(entries))] = rng.choice((None, near_value(rng, entries[0])))
    if action <= 6:
        table = table.set_column(number, name, pyarrow.array(entries))
    elif action == 7:
        table = table.drop_columns([name])
    elif action == 8:
        table = table.append_column(rng.choice((name, "x", "image_id")), table.column(number))
    else:
        table = table.slice(0, rng.randrange(2))
    options = {}
    if rng.random() < 0.1:
        options = {"compression": rng.choice(("lz4", "zstd"))}
    return arrow_bytes(table, rng.random() < 0.03, **options)


# ---------------------------------------------------------------- which mutation a file has
STRUCTURES: dict[str, Callable[[Random, bytes], bytes]] = {
    ".json": mutate_json, ".jsonl": mutate_json_lines, ".yaml": mutate_yaml,
    ".txt": mutate_text, ".tsv": mutate_text, ".svg": mutate_text, ".ckpt": mutate_torch,
    ".pt": mutate_torch, ".bin": mutate_torch, ".safetensors": mutate_safetensors,
    ".tar": mutate_tar, ".arrow": mutate_arrow, ".picture": mutate_picture,
    ".png": mutate_picture,
}  # fmt: skip


def mutate_file(rng: Random, name: str, content: bytes, other: bytes) -> bytes:
    """One to three mutations of a file, first of its structure, then of its bytes."""
    structure = STRUCTURES.get(Path(name).suffix)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        before = content
        if structure is not None and rng.random() < 0.7:
            # what one mutation broke, another one may not be able to read
            with contextlib.suppress(Exception):
                content = structure(rng, content)
        if content is before:
            content = mutate_bytes(rng, content, other)
            structure = None  # broken .arrow files let their readers die
    return content


def mutation(kind: str, seed: int, number: int, cases: Sequence[Case]) -> Case:
    """The mutated input of a number; the first numbers are the good inputs."""
    case = cases[number % len(cases)]
    if number < len(cases):
        return case
    rng = Random(f"{seed} {kind} {number}")
    name = rng.choice(case.changed)
    other_case = rng.choice(cases)
    other = other_case.files[rng.choice(other_case.changed)]
    changed = mutate_file(rng, name, case.files[name], other)
    return case._replace(files={**case.files, name: changed})


# ================================================================ 2. inputs and targets
class Kind(NamedTuple):
    """make: the good inputs, in an empty folder; read: what a user's command does with one.

    read(folder, name of the case) raises Insane where the result cannot be right.
    """

    make: Callable[[Path], list[Case]]
    read: Callable[[Path, str], None]
    rewritten: tuple[str, ...] = ()  # inputs that the command is there to write


def case_of(name: str, folder: Path, *changed: str) -> Case:
    """What lies in a folder, as a case."""
    content = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content[path.relative_to(folder).as_posix()] = path.read_bytes()
    return Case(name, content, changed or tuple(content))


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def as_lines(rows: Sequence) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows)


def noise(number: int, mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def picture_file(image: Image.Image, file_format: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, file_format, **options)
    return sink.getvalue()


PNG = picture_file(noise(0), "png")


def strictly_and_tolerantly(read: Callable[[str], None]) -> None:
    """read("error"), then read("skip"), which takes at least what the first one takes."""
    refusal: Exception | None = None
    try:
        read("error")
    except (ValueError, OSError) as error:
        refusal = error
    try:
        read("skip")
    except (ValueError, OSError) as error:
        require(refusal is not None, f'"skip" refuses what "error" reads: {error}')
    if refusal is not None:
        raise refusal


# ---------------------------------------------------------------- pairs of picture and text
SIDE = 16
LENGTH = 12


class Tools:
    """What the targets share. It is made once, before the workers are forked."""

    def __init__(self) -> None:
        texts = ["is the red square left of a blue circle ?", "what is it ? yes no red blue"]
        texts.append("system You are a helpful assistant. user assistant")
        names = (*tokenizers_room.ROBERTA_SPECIALS, "<|im_start|>", "<|im_end|>")
        self.tokenizer = tokenizers_room.train_tokenizer(texts, 300, names)
        self.transform = images.image_transform("albef", SIDE, True)
        sizes = {"image_size": SIDE, "patch_size": 8, "vision_width": 16, "vision_heads": 2}
        sizes |= {"hidden_size": 16, "num_heads": 2, "vocab_size": self.tokenizer.vocab_size}
        self.llava = LlavaManagerConfig.tiny(
            **sizes, vision_layers=3, vision_mlp_width=16, num_layers=3, num_kv_heads=1,
            mlp_width=16, managed_layers=(1, 2), inject_layers=(0, 2), eos_ids=(),
            im_start_id=self.tokenizer.backend.token_to_id("<|im_start|>"),
        )  # fmt: skip
        self.tower = ManagerTowerConfig.tiny(
            **sizes, vision_layers=2, pad_token_id=self.tokenizer.pad_id, max_positions=20,
            text_width=16, text_layers=2, text_heads=2, text_mlp_width=16, num_layers=2,
            mlp_ratio=1, contrastive_size=8, managed_layers_text=2, managed_layers_image=2,
            max_text_len=LENGTH, num_answers=2, heads=("vqa",),
        )  # fmt: skip
        # the first model without memory imports half of torch: once here, not in every worker
        with torch.device("meta"):
            ManagerTower(self.tower)


TOOLS: Tools


def check_pair(item: dict) -> None:
    """A row that a model can read."""
    require(item["input_ids"].shape == (LENGTH,), "a row has another number of tokens")
    require(item["input_ids"].max() < TOOLS.tokenizer.vocab_size, "an id above the vocabulary")
    require(item["attention_mask"].sum() >= 3, "a text without a token")
    for name in ("pixels", "pixels_1"):
        if name in item:
            require(item[name].shape == (3, SIDE, SIDE), "pixels of another shape")
            require(item[name].isfinite().all(), "pixels that are not finite")
    if "targets" in item:
        targets = item["targets"]
        require(((targets >= 0) & (targets <= 1)).all(), f"the scores {targets}")
    if "label" in item:
        require(0 <= item["label"] <= 2, f"the label {item['label']}")


def read_pairs(name: str, paths: list[Path], policy: str) -> None:
    """All rows, one by one and in batches, as training, evaluation and their baselines do."""
    is_test = name == "unanswered"  # a test set, which nobody trains on
    kind = "questions" if is_test else name
    source = data.open_source(kind, paths, policy)
    answers = ("red", "yes")
    dataset = data.PairDataset(
        source, TOOLS.tokenizer, TOOLS.transform, LENGTH, on_bad_sample=policy, answers=answers
    )
    require(len(dataset) > 0, "a source without rows")
    for number in range(len(dataset)):
        check_pair(dataset[number])
    for _, batch in data.batches(dataset, 2):
        require(torch.is_tensor(batch["pixels"]), "pixels that are no batch")
    for row in source.texts():
        require(row["text"].strip(), "an empty text")
    if not is_test:
        tasks.baselines(source, source)
    if kind == "captions":
        arguments = (source, TOOLS.tokenizer, TOOLS.transform, LENGTH)
        pretraining = data.PretrainDataset(*arguments, batch_size=2, on_bad_sample=policy)
        for number in range(len(pretraining)):
            require((pretraining[number]["mlm_labels"] >= -100).all(), "wrong MLM labels")


QUESTIONS = [
    {"id": 7, "question": "is it red ?", "answers": {"red": 1.0, "no": 0.3}, "question_type": "is"},
    {"id": 8, "question": "what is it ?", "answers": {"yes": 0.6}, "question_type": "what"},
]
RECORDS: dict[str, list[dict]] = {
    "captions": [
        {"image": "a.png", "captions": ["a red square", "it is red"], "image_id": 1},
        {"image": "b.png", "captions": ["a blue circle"], "image_id": 2},
        {"image": "a.png", "captions": ["left of it"]},
    ],
    "questions": [
        {"image": "a.png", "questions": QUESTIONS, "image_id": 5},
        {"image": "b.png", "questions": QUESTIONS[1:], "image_id": "x"},
    ],
    "statements": [
        {"images": ["a.png", "b.png"], "sentence": "it is left", "label": True, "id": "dev-1-0"},
        {"images": ["b.png", "a.png"], "sentence": "it is red", "label": False, "id": "dev-1-1"},
    ],
    "hypotheses": [
        {"image": "a.png", "hypothesis": "it is red", "label": "neutral", "image_id": "9.jpg"},
        {"image": "b.png", "hypothesis": "it is blue", "label": "entailment"},
    ],
}
PICTURES = {"a.png": PNG, "b.png": picture_file(noise(1, size=(9, 12)), "png")}


def make_manifests(folder: Path) -> list[Case]:
    cases = []
    for kind, records in RECORDS.items():
        contents = {**PICTURES, "data.jsonl": as_lines(records)}
        cases.append(Case(kind, contents, ("data.jsonl",)))
    tests = [{"image": "a.png", "questions": [{"id": 1, "question": "why ?"}]}] * 2
    cases.append(Case("unanswered", {**PICTURES, "data.jsonl": as_lines(tests)}, ("data.jsonl",)))
    return cases


def read_manifest(folder: Path, name: str) -> None:
    strictly_and_tolerantly(lambda policy: read_pairs(name, [folder / "data.jsonl"], policy))


# ---------------------------------------------------------------- .arrow files
ARROW_COLUMNS: dict[str, dict[str, list]] = {
    "captions": {"caption": [["a red square", "it is red"], ["a blue circle"]], "image_id": [1, 2]},
    "questions": {
        "questions": [["is it red ?", "what is it ?"], ["is it blue ?"]],
        "question_id": [[11, 12], [13]],
        "answers": [[["no", "yes"], ["red"]], [["yes"]]],
        "answer_labels": [[[2, 0], [1]], [[0]]],
        "answer_scores": [[[1.0, 0.3], [0.6]], [[0.9]]],
        "image_id": [5, 6],
    },
    "statements": {
        "questions": [["it is left", "it is red"], ["it is blue"]],
        "answers": [["True", "False"], ["True"]],
        "identifier": ["dev-1", "dev-2"],
    },
    "hypotheses": {
        "sentences": [[["a man", "it is red"], ["a man", "it is blue"]], [["a dog", "it is left"]]],
        "labels": [[0, 2], [1]],
    },
}


def make_arrows(folder: Path) -> list[Case]:
    import pyarrow

    cases = []
    for kind, columns in ARROW_COLUMNS.items():
        pictures: dict[str, list] = {"image": list(PICTURES.values())}
        if kind == "statements":
            pictures = {"image_0": list(PICTURES.values()), "image_1": [PNG, PNG]}
        content = arrow_bytes(pyarrow.table({**pictures, **columns}))
        cases.append(Case(kind, {"vqav2_train.arrow": content}, ("vqav2_train.arrow",)))
    return cases


def read_arrow(folder: Path, name: str) -> None:
    def read(policy: str) -> None:
        read_pairs(name, [folder / "vqav2_train.arrow"], policy)
        if name == "questions":
            answers = tasks.load_answers(folder)
            require(all(isinstance(answer, str) for answer in answers), "an answer is no text")

    strictly_and_tolerantly(read)


# ---------------------------------------------------------------- conversations and mixtures
def turn(speaker: str, text: str) -> dict:
    return {"from": speaker, "value": text}


CHAT = [
    {
        "id": 1,
        "image": "a.png",
        "conversations": [turn("human", "<image>\nwhat is it ?"), turn("gpt", "a red square")],
    },
    {
        "id": "two",
        "image": ["a.png", "b.png"],
        "conversations": [
            turn("human", "<image> <image> is it left ?"),
            turn("gpt", "yes"),
            turn("human", "and blue ?"),
            turn("gpt", "no"),
        ],
    },
    {"id": 3, "conversations": [turn("human", "what ?"), turn("gpt", "red")]},
]
PLAIN = [
    {"id": 1, "image": "a.png", "conversations": [turn("human", "<image>"), turn("gpt", "it")]},
    {"id": 2, "image": "b.png", "conversations": [turn("human", "see\n<image>"), turn("gpt", "a")]},
]


def make_chats(folder: Path) -> list[Case]:
    return [
        Case("chat", {**PICTURES, "a.json": as_json(CHAT)}, ("a.json",)),
        Case("chat", {**PICTURES, "a.jsonl": as_lines(CHAT)}, ("a.jsonl",)),
        Case("plain", {**PICTURES, "a.json": as_json(PLAIN)}, ("a.json",)),
    ]


def check_conversation(item: dict) -> None:
    ids, labels = item["tokens"]
    require(len(ids) == len(labels) > 0, "labels and ids of different lengths")
    require(max(ids) < TOOLS.tokenizer.vocab_size, "an id above the vocabulary")
    require(ids.count(data.IMAGE_TOKEN) == len(item["images"]), "another number of pictures")
    for tiles in item["images"]:
        require(tiles.pixels.shape[1:] == (3, SIDE, SIDE), "tiles of another shape")
        require(tiles.pixels.isfinite().all(), "tiles that are not finite")


def read_conversations(path: Path, policy: str, plain: bool = False) -> None:
    """All rows of a file of conversations or of a mixture, as the stages of training do."""
    source = data.open_chat(path, None, 0, policy)
    require(len(source) > 0, "a source without rows")
    dataset = data.ChatDataset(
        source,
        range(len(source)),
        TOOLS.llava,
        plain=math.inf if plain else 0,
        tokenizer=TOOLS.tokenizer,
        on_bad_sample=policy,
    )
    for row in range(len(dataset)):
        check_conversation(dataset[row])
    for _, batch in data.batches(dataset, 2, collate=data.collate_conversations):
        require(batch["input_ids"].shape == batch["labels"].shape, "labels of another shape")
    lengths = [row["length"] for row in source.texts()]
    data.length_grouped(lengths, 2, 1, torch.Generator().manual_seed(0))


def read_chat(folder: Path, name: str) -> None:
    path = next(folder.glob("a.json*"))
    strictly_and_tolerantly(lambda policy: read_conversations(path, policy, name == "plain"))


def make_mixtures(folder: Path) -> list[Case]:
    entries = [
        {"json_path": "a.json", "sampling_strategy": "first:50%"},
        {"json_path": "b.jsonl", "sampling_strategy": "random:2"},
        {"json_path": "a.json"},
    ]
    mixture = {"datasets": entries}
    parts = {**PICTURES, "a.json": as_json(CHAT), "b.jsonl": as_lines(CHAT)}
    return [
        Case("mix.yaml", {**parts, "mix.yaml": yaml.safe_dump(mixture).encode()}, ("mix.yaml",)),
        Case("mix.json", {**parts, "mix.json": as_json(mixture)}, ("mix.json",)),
    ]


def read_mixture(folder: Path, name: str) -> None:
    strictly_and_tolerantly(lambda policy: read_conversations(folder / name, policy))


# ---------------------------------------------------------------- pictures and archives
ANIMATION = {"save_all": True, "append_images": [noise(1), noise(2)]}
PICTURE_FILES: tuple[tuple[str, str, dict], ...] = (
    ("png", "RGB", {}), ("png", "P", {"transparency": 3}), ("png", "LA", {}),
    ("png", "I;16", {}), ("png", "1", {}), ("png", "RGB", ANIMATION), ("jpeg", "RGB", {}),
    ("jpeg", "CMYK", {"progressive": True}), ("mpo", "RGB", ANIMATION), ("gif", "RGB", ANIMATION),
    ("bmp", "RGB", {}), ("bmp", "P", {}), ("tiff", "RGB", {}), ("tiff", "I;16", {}),
    ("tiff", "RGBA", {"compression": "tiff_lzw"}), ("tiff", "1", {"compression": "group4"}),
    ("tiff", "CMYK", {"compression": "tiff_adobe_deflate"}), ("webp", "RGBA", {}),
    ("webp", "RGB", ANIMATION), ("avif", "RGB", {"speed": 10}), ("jpeg2000", "RGB", {}),
    ("ppm", "RGB", {}), ("ppm", "L", {}), ("tga", "RGB", {"compression": "tga_rle"}),
    ("pcx", "RGB", {}), ("ico", "RGBA", {"sizes": [(16, 16)]}),
)  # fmt: skip


def make_pictures(folder: Path) -> list[Case]:
    cases = []
    for number, (file_format, mode, options) in enumerate(PICTURE_FILES):
        image = noise(number, "L" if mode == "I;16" else mode)
        if mode == "I;16":  # values of 16 bits: those of 8 would be refused
            image = Image.fromarray(257 * np.asarray(image).astype(np.uint16))
        contents = {"a.picture": picture_file(image, file_format, **options)}
        cases.append(Case(f"{file_format} {mode}", contents, ("a.picture",)))
    return cases


def read_picture(folder: Path, name: str) -> None:
    """The picture, and everything that is made of one."""
    for where in (folder / "a.picture", (folder / "a.picture").read_bytes()):
        picture = images.load_image(where)
        require(picture.mode == "RGB" and min(picture.size) > 0, "no RGB")
    for transforms in (images.TRAINING_TRANSFORMS, images.EVALUATION_TRANSFORMS):
        for transform in transforms.values():
            pixels = transform(SIDE, picture, np.random.default_rng(0))
            require(pixels.shape == (3, SIDE, SIDE), "pixels of another shape")
            require(pixels.isfinite().all(), "pixels that are not finite")
    for several in (False, True):
        tiles = multigrid.preprocess_image(picture, TOOLS.llava, several)
        require(tiles.pixels.isfinite().all(), "tiles that are not finite")
        multigrid.count_image_tokens(len(tiles.pixels), tiles.size, TOOLS.llava)


def make_tars(folder: Path) -> list[Case]:
    archive = io.BytesIO()
    long_name = "folder/" * 20 + "c.png"  # longer than a header's field: a block of its own
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("b.png", long_name):
            member = tarfile.TarInfo(name)
            member.size = len(PNG)
            tar.addfile(member, io.BytesIO(PNG))
    records = [
        {"image": "a.tar::b.png", "captions": ["a red square"]},
        {"image": f"a.tar::{long_name}", "captions": ["a blue circle"]},
    ]
    contents = {"a.tar": archive.getvalue(), "data.jsonl": as_lines(records)}
    return [Case("captions", contents, ("a.tar",)), Case("captions", contents, ("data.jsonl",))]


def read_tar(folder: Path, name: str) -> None:
    read_manifest(folder, name)
    content = files.read_bytes(f"{folder}/a.tar::b.png")
    require(len(content) < 10**8, "a member larger than its archive")


# ---------------------------------------------------------------- checkpoint folders
def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = ManagerTower(config) if isinstance(config, ManagerTowerConfig) else LlavaManager(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_checkpoint(config: Any, folder: Path) -> Any:
    """A folder as training leaves it. Returns the model."""
    model = random_model(config)
    transform = "albef" if isinstance(config, ManagerTowerConfig) else None
    weights.save_folder(model.state_dict(), config, folder, transform)
    TOOLS.tokenizer.save(folder)
    files.write_json(folder / "answers.json", ["red", "yes"])
    (folder / "a.png").write_bytes(PNG)
    return model


OFFICIAL_VISION = {
    "image_size": SIDE, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip
OFFICIAL_CONFIG = {
    "model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"], "hidden_size": 16,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "eos_token_id": 2, "tie_word_embeddings": True, "use_sliding_window": False,
    "image_aspect_ratio": "anyres_max_4",
    "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16], [32, 32]],
    "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu",
    "tokenizer_model_max_length": 512, "mm_manager_type": "static_zerouni",
    "mm_manager_residual": True, "mm_manager_grid_type": None,
    "mm_manager_vision_select_layers_start": 1, "mm_manager_vision_select_layers_end": 3,
    "mm_manager_vision_select_layers_interval": 1, "mm_manager_injection_start": 0,
    "mm_manager_injection_end": 3, "mm_manager_injection_interval": 2,
}  # fmt: skip


def save_official(folder: Path) -> None:
    """A published LLaVA-OV-Manager: two shards and their index."""
    folder.mkdir()
    state = weights.to_official(random_model(TOOLS.llava).state_dict(), TOOLS.llava)
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        tensors = {name: state[name].contiguous().clone() for name in part}
        (folder / file).write_bytes(save(tensors))
        weight_map.update(dict.fromkeys(part, file))
    files.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    vocab_size = TOOLS.tokenizer.vocab_size
    files.write_json(folder / "config.json", {**OFFICIAL_CONFIG, "vocab_size": vocab_size})
    TOOLS.tokenizer.save(folder)
    (folder / "a.png").write_bytes(PNG)


def save_encoders(model: Any, folder: Path) -> None:
    """vision.safetensors and text.safetensors in the layouts of those who published such."""
    folder.mkdir()
    if isinstance(model, LlavaManager):
        vision = weights.expand(weights.HF_SIGLIP, "", "vision_model.", len(model.vision.blocks))
        text = weights.expand(weights.QWEN, layers=model.config.num_layers)
        encoders = {"vision": (model.vision, vision), "text": (model.llm, text)}
    else:
        vision = weights.expand(weights.CLIP, "", "visual.", len(model.image_encoder.blocks))
        text = weights.expand(weights.ROBERTA, "", "roberta.", len(model.text_encoder.layers))
        encoders = {"vision": (model.image_encoder, vision), "text": (model.text_encoder, text)}
    for name, (encoder, rows) in encoders.items():
        state = weights.export_state(encoder.state_dict(), rows)
        tensors = {key: tensor.contiguous().clone() for key, tensor in state.items()}
        (folder / f"{name}.safetensors").write_bytes(save(tensors))


def checkpoint_cases(folder: Path, *changed: str) -> list[Case]:
    """A model with questions, one of pre-training and an MLLM."""
    pretrained = dataclasses.replace(TOOLS.tower, heads=("mlm", "itm", "itc"))
    adaptive = dataclasses.replace(TOOLS.llava, manager_type="adaptive_cross")
    cases: list[Case] = []
    for name, config in (
        ("questions", TOOLS.tower),
        ("match", pretrained),
        ("chat", TOOLS.llava),
        ("chat", adaptive),
    ):
        place = folder / f"{len(cases)}"
        save_checkpoint(config, place)
        cases.append(case_of(name, place, *changed))
    return cases


def check_chances(chances: Sequence[float]) -> None:
    require(len(chances) > 0, "no answer")
    require(all(0 <= chance <= 1 for chance in chances), f"the probabilities {chances}")


def talk(loaded: Any, folder: Path) -> None:
    """An MLLM's answer about a picture, as `ask.py chat` gives it."""
    model = loaded.model
    ids, tiles = ask.encode_turns(model, loaded.tokenizer, ["what is it ?"], [f"{folder}/a.png"])
    with evaluating(model):
        model.generate(torch.tensor([ids]), None, tiles, 2)
    options = ask.ChatOptions(checkpoint=str(folder), max_new_tokens=2)
    turns = ["<image>\nwhat is it ?"]
    answer = "".join(ask.reply(model, loaded.tokenizer, turns, tiles, options))
    require(isinstance(answer, str), "an answer that is no text")


def read_checkpoint(folder: Path, name: str) -> None:
    """One command of ask.py with this checkpoint; the tokenizer alone too."""
    checkpoint = str(folder)
    picture = f"{folder}/a.png"
    if name == "questions":
        options = ask.QuestionOptions(checkpoint, picture, "is it red ?", device="cpu")
        answers = ask.question(options)
        check_chances([chance for _, chance in answers])
        require(all(isinstance(answer, str) for answer, _ in answers), "an answer is no text")
    elif name == "match":
        texts = ["a red square", "it is blue"]
        matches = ask.match(ask.MatchOptions(checkpoint, picture, texts, device="cpu"))
        check_chances([chance for _, chance, _ in matches])
        has_itc = "itc" in weights.read_config(folder).heads
        for _, _, itc in matches:
            require(abs(itc) < 1.01 or not has_itc, f"the similarity {itc}")
    elif name == "official":
        im_start_id = TOOLS.llava.im_start_id
        model = weights.load_model(folder, vision=OFFICIAL_VISION, im_start_id=im_start_id)
        talk(weights.Loaded(model, tokenizers_room.load_tokenizer(folder), None), folder)
    else:
        talk(weights.load_mllm(checkpoint, "", "cpu"), folder)


def make_safetensors(folder: Path) -> list[Case]:
    cases = checkpoint_cases(folder, "model.safetensors")
    for config, name in ((TOOLS.tower, "tower encoders"), (TOOLS.llava, "mllm encoders")):
        place = folder / name
        save_encoders(random_model(config), place)
        cases.append(case_of(name, place))
    save_official(folder / "official")
    changed = ("model-0.safetensors", "model-1.safetensors", "model.safetensors.index.json")
    cases.append(case_of("official", folder / "official", *changed))
    return cases


def read_safetensors(folder: Path, name: str) -> None:
    if not name.endswith("encoders"):
        read_checkpoint(folder, name)
        return
    config: Any = TOOLS.tower if name.startswith("tower") else TOOLS.llava
    model = random_model(config)
    weights.load_unimodal(model, folder / "vision.safetensors", folder / "text.safetensors")
    for key, tensor in model.state_dict().items():
        require(tensor.isfinite().all(), f"{key} is not finite")


def make_configs(folder: Path) -> list[Case]:
    cases = checkpoint_cases(folder, "config.json")
    save_official(folder / "official")
    cases.append(case_of("official", folder / "official", "config.json"))
    return cases


# ---------------------------------------------------------------- tokenizers
def make_tokenizers(folder: Path) -> list[Case]:
    import sentencepiece
    import tokenizers

    # 1. ours, beside models
    cases = checkpoint_cases(folder, "tokenizer.json")[:3]
    # 2. RoBERTa's two files
    (folder / "pair").mkdir()
    TOOLS.tokenizer.backend.model.save(str(folder / "pair"))
    cases.append(case_of("tokenizer", folder / "pair"))
    # 3. a tokenizer.json with everything that a published one may have
    published = tokenizers.Tokenizer.from_str(TOOLS.tokenizer.backend.to_str())
    published.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Replace("`", "'")]
    )
    published.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    published.enable_padding(pad_id=1, pad_token="<pad>", length=9)
    published.enable_truncation(5)
    content = {"tokenizer.json": published.to_str().encode()}
    cases.append(Case("tokenizer", content, ("tokenizer.json",)))
    # 4. BERT's
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "it", "is", "red", "##d", "?"]
    piece = tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    bert = tokenizers.Tokenizer(piece)
    bert.normalizer = tokenizers.normalizers.BertNormalizer()
    bert.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    bert.add_special_tokens(words[:5])
    cases.append(Case("tokenizer", {"tokenizer.json": bert.to_str().encode()}, ("tokenizer.json",)))
    # 5. a SentencePiece model
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["is the red square left", "a blue circle is it"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    cases.append(Case("tokenizer", {"spm.model": model.getvalue()}, ("spm.model",)))
    return cases


TEXTS = ["is it red ?", "", "naïve 雪 🙂", "a" * 40, "<mask> </s> <s>", "\t\r\n x", "it is blue"]


def read_tokenizer(folder: Path, name: str) -> None:
    if name != "tokenizer":
        read_checkpoint(folder, name)
        return
    tokenizer = tokenizers_room.load_tokenizer(folder)
    tokenizer.digest()
    ids, mask = tokenizer(TEXTS, LENGTH)
    require(ids.shape == mask.shape == (len(TEXTS), LENGTH), "ids of another shape")
    require(0 <= ids.min() and ids.max() < tokenizer.vocab_size, "an id outside the vocabulary")
    for row in ids.tolist():
        require(isinstance(tokenizer.decode(row), str), "ids without a text")
    out = folder / "out"
    out.mkdir()
    tokenizer.save(out)
    again = tokenizers_room.load_tokenizer(out)
    require(torch.equal(again(TEXTS, LENGTH)[0], ids), "other ids when saved and read again")


# ---------------------------------------------------------------- PyTorch's files
class Whole(torch.nn.Module):
    """A CLIP in TorchScript, as OpenAI publishes it."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        self.names = list(state)
        for name, tensor in state.items():
            place: torch.nn.Module = self
            *parents, last = name.split(".")
            for parent in parents:
                if not hasattr(place, parent):
                    place.add_module(parent, torch.nn.Module())
                place = getattr(place, parent)
            place.register_parameter(last, torch.nn.Parameter(tensor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def saved(content: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(content, sink)
    return sink.getvalue()


def make_pickles(folder: Path) -> list[Case]:
    one_layer: dict[str, Any] = dict.fromkeys(("vision_layers", "text_layers", "num_layers"), 1)
    one_layer |= dict.fromkeys(("managed_layers_text", "managed_layers_image"), 1)
    config = dataclasses.replace(
        TOOLS.tower, **one_layer, manager_type="saue", heads=("vqa", "itc"), contrastive_size=8
    )
    tower = random_model(config)
    official = weights.to_official(tower.state_dict(), config)
    settings = {"num_heads": 2, "drop_rate": 0.1, "max_text_len": LENGTH, "loss_names": {"a": 1}}
    lightning = {
        "epoch": 3,
        "state_dict": official,
        "hyper_parameters": {"config": settings},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "range": range(3),
        "path": Path("x"),
        "set": {1, 2},
    }
    save_encoders(tower, folder / "encoders")
    vision = weights.read_safetensors(folder / "encoders" / "vision.safetensors")
    text = weights.read_safetensors(folder / "encoders" / "text.safetensors")
    scripted = io.BytesIO()
    few = dict(list(vision.items())[:6])
    torch.jit.save(torch.jit.script(Whole(few)), scripted)
    parameters = {key: torch.nn.Parameter(tensor) for key, tensor in text.items()}
    hugging_face = {
        "pytorch_model.bin": saved(official),
        "config.json": as_json({"model_type": "x", "text_config": {"num_attention_heads": 2}}),
    }
    return [
        Case("a.ckpt", {"a.ckpt": saved(lightning)}, ("a.ckpt",)),
        Case("a.pt", {"a.pt": saved(vision)}, ("a.pt",)),
        Case("a.bin", {"a.bin": saved({"model": parameters})}, ("a.bin",)),
        Case("a.pt", {"a.pt": scripted.getvalue()}, ("a.pt",)),
        Case(".", hugging_face, ("config.json", "pytorch_model.bin")),
    ]


def read_pickle(folder: Path, name: str) -> None:
    state, _ = weights.read_weights(folder / name)
    for key, tensor in state.items():
        require(isinstance(key, str) and isinstance(tensor, torch.Tensor), "no state of tensors")
    out = folder / "out"
    weights.convert_weights(folder / name, out)
    if (out / "config.json").exists():
        model = weights.load_model(out)
        require(isinstance(model, ManagerTower), "another model")
    else:
        require(len(weights.read_safetensors(out)) > 0, "an encoder without tensors")


# ---------------------------------------------------------------- raw datasets
def vqa_trees() -> dict[str, bytes]:
    trees = {}
    for split, first in (("train2014", 0), ("val2014", 100)):
        questions = []
        annotations = []
        for number in range(first, first + 10):
            answer = "red" if number % 2 else "yes"
            given = [{"answer": answer, "answer_id": i} for i in range(3)]
            question = {"image_id": 9 + number % 2, "question_id": number, "question": "what ?"}
            questions.append(question)
            annotation = {**question, "multiple_choice_answer": answer}
            annotation |= {"question_type": "what", "answer_type": "other", "answers": given}
            annotations.append(annotation)
        trees[f"v2_OpenEnded_mscoco_{split}_questions.json"] = as_json(
            {"info": {}, "questions": questions}
        )
        annotation_file = f"v2_mscoco_{split}_annotations.json"
        trees[annotation_file] = as_json({"info": {}, "annotations": annotations})
        for number in (9, 10):
            trees[f"{split}/COCO_{split}_{number:012d}.jpg"] = PNG
    for split in ("test2015", "test-dev2015"):
        question = {"image_id": 1, "question_id": 10, "question": "why ?"}
        trees[f"v2_OpenEnded_mscoco_{split}_questions.json"] = as_json({"questions": [question]})
    trees["test2015/COCO_test2015_000000000001.jpg"] = PNG
    return trees


def karpathy(names: Sequence[str], splits: Sequence[str]) -> bytes:
    entries = []
    for name, split in zip(names, splits, strict=True):
        sentences = [{"raw": "a red square ."}, {"raw": "it is red"}]
        entries.append({"filename": name, "split": split, "sentences": sentences, "imgid": 0})
    return as_json({"dataset": "x", "images": entries})


SVG = """<svg><metadata><rdf:RDF><dc:title>TITLE</dc:title><dc:creator><cc:Agent>
<dc:title>me</dc:title></cc:Agent></dc:creator>
<dc:description>it is red &amp; square</dc:description>
<dc:subject><rdf:Bag><rdf:li>square</rdf:li><rdf:li>shape</rdf:li></rdf:Bag></dc:subject>
</rdf:RDF></metadata><path d="M0"/></svg>"""
TITLES = ("a red square", "a boat", "a cat")  # their hashes say: train, val, test


def drawings() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Three pictures as Openclipart has them, and as Tux Paint has them."""
    clip_art = {}
    stamps = {}
    for number, title in enumerate(TITLES):
        content = picture_file(noise(number, size=(40, 40)), "png")
        clip_art[f"png/a/{number}.png"] = content
        clip_art[f"svg/a/{number}.svg"] = SVG.replace("TITLE", title).encode()
        stamps[f"a/{number}.png"] = content
        stamps[f"a/{number}.txt"] = f"{title}\nde=Ein Bild\n".encode()
    return clip_art, stamps


def raw_trees() -> dict[str, dict[str, bytes]]:
    """Name of a dataset -> {path: content} of a tiny one."""
    clip_art, stamps = drawings()
    captions = ["a red square", "a blue circle"]
    nlvr2 = {"sentence": "it is left", "identifier": "a-1-0", "label": "True", "directory": 3}
    snli = {"Flickr30K_ID": "7", "sentence2": "it is red", "gold_label": "neutral"}
    flickr = ["7.jpg", "8.jpg", "9.jpg"]
    coco = [f"COCO_val2014_{number:012d}.jpg" for number in (1, 2, 3)]
    trees = {
        "vqav2": vqa_trees(),
        "vgqa": {
            "image_data.json": as_json(
                [{"image_id": 1, "coco_id": 7}, {"image_id": 2, "coco_id": 5}]
            ),
            "question_answers.json": as_json(
                [
                    {"id": 1, "qas": [{"qa_id": 3, "question": "what ?", "answer": "Red."}]},
                    {"id": 2, "qas": [{"qa_id": 4, "question": "why ?", "answer": "yes"}]},
                ]
            ),
            "karpathy_val_images.txt": b"val2014/COCO_val2014_000000000005.jpg 5\n",
            "karpathy_test_images.txt": b"val2014/COCO_val2014_000000000006.jpg 6\n",
            "VG_100K/1.jpg": PNG,
            "VG_100K_2/2.jpg": PNG,
            "out/answers.json": as_json(["red", "yes"]),
        },
        "nlvr2": {},
        "snli_ve": {"flickr30k-images/7.jpg": PNG},
        "flickr30k": {
            "dataset_flickr30k.json": karpathy(flickr, ["train", "val", "test"]),
            **{f"flickr30k-images/{name}": PNG for name in flickr},
        },
        "coco": {
            "dataset_coco.json": karpathy(coco, ["restval", "val", "test"]),
            **{f"val2014/{name}": PNG for name in coco},
        },
        "vg": {
            "region_descriptions.json": as_json(
                [{"id": 1, "regions": [{"image_id": 1, "phrase": text} for text in captions]}]
            ),
            "VG_100K/1.jpg": PNG,
        },
        "sbu": {
            "sbu-captions-all.json": as_json(
                {"captions": captions, "image_urls": ["http://x/1.jpg", "http://x/2.jpg"]}
            ),
            "SBU/1.jpg": PNG,
            "SBU/2.jpg": PNG,
        },
        "cc3m": {
            "Train_GCC-training.tsv": b"a red square\thttp://x/1\nit is red\thttp://x/2\n",
            "Validation_GCC-1.1.0-Validation.tsv": b"a blue circle\thttp://x/3\n",
            "train/0.jpg": PNG,
            "train/1": PNG,
            "val/0.jpg": PNG,
        },
        "openclipart": clip_art,
        "tuxpaint": stamps,
    }
    for split in ("train", "dev", "test1"):
        second = {**nlvr2, "identifier": "a-1-1", "label": "False"}
        trees["nlvr2"][f"{split}.json"] = as_lines([nlvr2, second])
        for side in (0, 1):
            trees["nlvr2"][f"images/{split}/3/a-1-img{side}.png"] = PNG
    for split in ("train", "dev", "test"):
        rows = [snli, {**snli, "gold_label": "-"}]
        trees["snli_ve"][f"snli_ve_{split}.jsonl"] = as_lines(rows)
    return trees


KIND_OF_SET = {
    "vqav2": "questions",
    "vgqa": "questions",
    "nlvr2": "statements",
    "snli_ve": "hypotheses",
}


def make_raw(folder: Path) -> list[Case]:
    cases = []
    for name, contents in raw_trees().items():
        changed = [path for path in contents if not path.endswith(".jpg")]
        if name in ("nlvr2", "cc3m"):
            changed = [path for path in changed if path.endswith(("json", "tsv"))]
        cases.append(Case(name, contents, tuple(changed)))
    return cases


def read_raw(folder: Path, name: str) -> None:
    """prepare.py NAME; what it writes must be readable."""
    out = folder / "out"
    refusal: Exception | None = None
    try:
        prepare.main([name, "--root", str(folder), "--out", str(out)])
    except (ValueError, OSError) as error:
        refusal = error
    written = sorted(out.glob("*.jsonl"))
    require(written or refusal, "no manifest, and no word about it")
    for manifest in written:
        try:
            data.open_source(KIND_OF_SET.get(name, "captions"), [manifest])
        except (ValueError, OSError) as error:
            raise Insane(f"it wrote a manifest that is refused: {error}") from error
    if refusal is not None:
        raise refusal


# ---------------------------------------------------------------- side files
def make_annotations(folder: Path) -> list[Case]:
    content = vqa_trees()["v2_mscoco_val2014_annotations.json"]
    return [Case("annotations", {"a.json": content}, ("a.json",))]


def read_annotations(folder: Path, name: str) -> None:
    annotations = evaluation.read_annotations(str(folder / "a.json"))
    results = [{"question_id": number, "answer": "red"} for number in range(100, 104)]
    measured = metrics.official_vqa_accuracy(results, list(annotations.values()))
    require(0 <= measured["overall"] <= 1, f"the accuracy {measured['overall']}")
    json.dumps(measured).encode()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.print_table("official", measured, {})


LOG = [
    {"step": 0, "header": {"version": "2.0", "device": "cpu"}},
    {"step": 1, "loss": 2.5, "mlm": 1.0, "learning_rate": 1e-3},
    {"step": 2, "loss": 2.25, "mlm": 0.5, "learning_rate": 2e-3},
    {"step": 2, "eval": {"score": 0.5, "mlm_accuracy": 0.25, "rows": 8}},
    {"step": 3, "loss": 2.0},
    {"step": 3, "eval": {"score": 0.75, "mlm_accuracy": 0.5}},
]


def make_logs(folder: Path) -> list[Case]:
    return [
        Case("run", {"log.jsonl": as_lines(LOG)}, ("log.jsonl",)),
        Case("run", {"log.jsonl": as_lines(LOG[:2])}, ("log.jsonl",)),
    ]


def read_log(folder: Path, name: str) -> None:
    """`figures.py curves`. Only one in sixteen is drawn, for that takes a second."""
    content = (folder / "log.jsonl").read_bytes()
    draw = figures.draw_panels
    if zlib.crc32(content) % 16:
        figures.draw_panels = lambda panels: noise(0)
    try:
        options = figures.CurvesOptions(run=[str(folder)], out=str(folder / "curves.png"))
        drawn = figures.curves(options)
    finally:
        figures.draw_panels = draw
    require((folder / "curves.png").stat().st_size > 100, "no picture")
    for curves in drawn.values():
        for steps, values in curves.values():
            require(len(steps) == len(values), "a curve without some of its steps")
            require(np.isfinite(np.array(values, float)).any(), f"the values {values}")


def make_answers(folder: Path) -> list[Case]:
    return [Case("answers", {"answers.json": as_json(["red", "yes"])}, ("answers.json",))]


def read_answers(folder: Path, name: str) -> None:
    """What the classes of a model with two answers are called, and the answers of vgqa."""
    model: Any = argparse.Namespace(config=TOOLS.tower)
    for answers in (
        evaluation.load_vocabulary(str(folder), model),
        tasks.load_answers(folder),
    ):
        require(len(answers) == 2, "another number of answers")
        require(all(isinstance(answer, str) for answer in answers), "an answer is no text")
        json.dumps(answers, ensure_ascii=False).encode()


class Small(torch.nn.Module):
    """A model of two layers: what is saved of a run has the same form as with a large one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = TOOLS.tower
        self.text_encoder = torch.nn.Linear(3, 4)
        self.heads = torch.nn.ModuleDict({"itm": torch.nn.Linear(4, 2)})


def checkpoint_of_run(folder: Path) -> tuple[loop.Checkpoint, Any, Any]:
    """(checkpoint, optimizer, scaler) of a run whose --out_dir this is."""
    run = train.TrainConfig(out_dir=str(folder), max_steps=4, device="cpu")
    model = Small()
    identity = {"config": dataclasses.asdict(model.config), "training_texts": "x"}
    checkpoint = loop.Checkpoint(run, model, TOOLS.tokenizer.save, identity, World("cpu"))
    optimizer = loop.make_optimizer(loop.param_groups(model, run), run, torch.device("cpu"))
    return checkpoint, optimizer, torch.amp.GradScaler("cpu", enabled=False)


def make_update(checkpoint: loop.Checkpoint, optimizer: Any) -> None:
    loop.set_learning_rate(optimizer, checkpoint.run, checkpoint.step + 1)
    for parameter in checkpoint.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()


def make_states(folder: Path) -> list[Case]:
    checkpoint, optimizer, scaler = checkpoint_of_run(folder)
    make_update(checkpoint, optimizer)
    checkpoint.save(2, optimizer, scaler)
    (folder / "log.jsonl").write_bytes(as_lines(LOG))
    return [case_of("run", folder, "training_state.pt"), case_of("run", folder, "log.jsonl")]


def read_state(folder: Path, name: str) -> None:
    """The same command again: resume, make an update, save."""
    checkpoint, optimizer, scaler = checkpoint_of_run(folder)
    step = checkpoint.resume(optimizer, scaler)
    require(type(step) is int and 0 <= step <= checkpoint.run.max_steps, f"it goes on at {step!r}")
    make_update(checkpoint, optimizer)
    loop.check_weights(checkpoint.model, step + 1, checkpoint)
    is_better = checkpoint.best is None or 0.5 > checkpoint.best
    require(isinstance(is_better, bool), "no best score")
    checkpoint.save(step + 1, optimizer, scaler)
    rows = files.read_log(folder / "log.jsonl")
    require(rows and all(row["step"] <= step for row in rows), "a log that runs ahead")


KINDS: dict[str, Kind] = {
    "manifests": Kind(make_manifests, read_manifest),
    "arrow": Kind(make_arrows, read_arrow),
    "chat": Kind(make_chats, read_chat),
    "mixtures": Kind(make_mixtures, read_mixture),
    "images": Kind(make_pictures, read_picture),
    "tar": Kind(make_tars, read_tar),
    "safetensors": Kind(make_safetensors, read_safetensors),
    "config": Kind(make_configs, read_checkpoint),
    "tokenizer": Kind(make_tokenizers, read_tokenizer),
    "pickles": Kind(make_pickles, read_pickle),
    "raw": Kind(make_raw, read_raw),
    "annotations": Kind(make_annotations, read_annotations),
    "logs": Kind(make_logs, read_log),
    "answers": Kind(make_answers, read_answers),
    "states": Kind(
        make_states,
        read_state,
        rewritten=(
            "training_state.pt",
            "log.jsonl",
            "model.safetensors",
            "config.json",
            "tokenizer.json",
        ),
    ),
}


# ================================================================ 3. the worker process
class TooSlow(BaseException):
    """Raised in the middle of a mutation that takes too much processor time."""


class Result(NamedTuple):
    """What became of one mutation."""

    number: int
    outcome: str  # right, refused or fault
    error: str = ""  # name of the exception, or what else happened
    place: str = ""  # file:line of the project where it came out
    message: str = ""
    seconds: float = 0.0  # of processor time
    megabytes: float = 0.0  # the most that the process had


def place_in(frames: Sequence[tuple[str, int]]) -> str:
    """The innermost frame in the project's own files, as file:line."""
    place = ""
    for file, line in frames:
        if Path(file).parent == ROOT:
            place = f"{Path(file).name}:{line}"
    return place


def place_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return place_in([(frame.filename, frame.lineno or 0) for frame in frames])


def wrong_message(message: str) -> str:
    """Why a message is no sentence for a user; empty if it is one."""
    if not message.strip():
        return "no message"
    if len(message) >= MOST_MESSAGE:
        return f"a message of {len(message)} characters"
    if message.count("\n") >= MOST_LINES:
        return f"a message of {message.count(chr(10)) + 1} lines"
    for words in ("object at 0x", "instance at 0x", "Traceback", "Error('", 'Error("'):
        if words in message:
            return f"a message with {words!r}"
    return ""


def peak_megabytes(start: bool = False) -> float:
    """The most memory since it was called with start=True."""
    if start:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return 0.0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def lay_out(case: Case, folder: Path) -> None:
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def judge(kind: Kind, case: Case, folder: Path, is_good: bool) -> tuple[str, str, str, str]:
    """(outcome, error, place, message) of reading a case that lies in a folder."""
    try:
        kind.read(folder, case.name)
    except (ValueError, OSError) as error:
        message = sentence_of(error)
        problem = wrong_message(message)
        if is_good and not problem:
            problem = f"{type(error).__name__} for a good input"
        if problem:
            return "fault", problem, place_of(error), message
        return "refused", type(error).__name__, place_of(error), message
    except BaseException as error:  # PanicException of Rust is no Exception
        return "fault", type(error).__name__, place_of(error), str(error)
    return "right", "", "", ""


def harm_to(kind: Kind, case: Case, folder: Path) -> str:
    """What was executed or changed; empty if nothing."""
    if list(folder.rglob("executed")):
        return "Executed"
    for name, content in case.files.items():
        if name not in kind.rewritten and (folder / name).read_bytes() != content:
            return f"{name} was changed"
    return ""


def attempt(kind: Kind, case: Case, number: int, folder: Path, is_good: bool) -> Result:
    """Read one case in this process."""
    lay_out(case, folder)
    os.chdir(folder)
    peak_megabytes(start=True)
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    outcome, error, place, message = judge(kind, case, folder, is_good)
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - started
    megabytes = peak_megabytes()
    harm = harm_to(kind, case, folder)
    if harm:
        outcome = "fault"
        error = harm
    elif megabytes > MEGABYTES:
        outcome = "fault"
        error = f"{megabytes:.0f} MB"
    return Result(number, outcome, error, place, message[:300], seconds, megabytes)


def on_alarm(signal_number: int, frame: Any) -> None:
    raise TooSlow


def work(name: str, seed: int, numbers: Sequence[int], cases: list[Case], root: Path, pipe: int):
    """The child: a line before and after each mutation. It does not return."""
    torch.set_num_threads(1)  # threads do not survive a fork
    os.fsync = lambda fd: None  # nobody pulls the plug here
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silent, descriptor)
    # what pytest puts there writes to no descriptor of these
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stdout
    crash_file = open(root / "crash.txt", "w")  # noqa: SIM115
    faulthandler.enable(crash_file, all_threads=False)
    signal.signal(signal.SIGPROF, on_alarm)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        folder = root / f"{number}"
        os.write(pipe, as_json({"start": number}) + b"\n")
        case = mutation(name, seed, number, cases)
        result = attempt(KINDS[name], case, number, folder, number < len(cases))
        os.write(pipe, as_json(result) + b"\n")
        os.chdir(root)
        shutil.rmtree(folder, ignore_errors=True)
        if result.error in ("TooSlow", "MemoryError"):
            break  # what was interrupted may be in any state
    os._exit(0)


def megabytes_of(process: int) -> float:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * resource.getpagesize() / 2**20


def crash_place(root: Path) -> str:
    """Where the child was, by the stack that faulthandler left."""
    text = (root / "crash.txt").read_text(errors="replace")
    frames = [(file, int(line)) for file, line in re.findall(r'File "(.+?)", line (\d+)', text)]
    return place_in(frames[::-1])  # it writes the innermost frame first


class Watch:
    """The parent's view of a child."""

    def __init__(self, process: int, pipe: int):
        self.process = process
        self.pipe = pipe
        self.results: list[Result] = []
        self.current: int | None = None  # the mutation that the child is at
        self.verdict = ""  # why the child was ended
        self.largest = 0.0
        self.since = time.monotonic()
        self.rest = b""

    def take(self, content: bytes) -> None:
        """Lines of the child."""
        *lines, self.rest = (self.rest + content).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if isinstance(message, dict):
                self.current = message["start"]
            else:
                self.results.append(Result(*message))
                self.current = None
            self.since = time.monotonic()

    def check(self) -> None:
        """End a child that is too large, or silent for too long."""
        megabytes = megabytes_of(self.process)
        self.largest = max(self.largest, megabytes)
        if megabytes > MEGABYTES:
            self.verdict = f"{megabytes:.0f} MB"
        elif time.monotonic() - self.since > WALL_SECONDS:
            self.verdict = f"no end within {WALL_SECONDS:.0f} s"
        if self.verdict:
            os.kill(self.process, signal.SIGABRT)  # faulthandler writes where it was
            time.sleep(0.2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)

    def follow(self) -> None:
        """Until the child has ended."""
        while True:
            ready, _, _ = select.select([self.pipe], [], [], 0.02)
            if ready:
                content = os.read(self.pipe, 2**16)
                if not content:
                    break
                self.take(content)
            if not self.verdict:
                self.check()
        _, status = os.waitpid(self.process, 0)
        if self.current is not None and not self.verdict:
            self.verdict = f"ended by signal {os.WTERMSIG(status)}"


def run_batch(
    name: str, seed: int, numbers: Sequence[int], cases: list, root: Path
) -> list[Result]:
    """The results of the first of these numbers: all of them, or up to the one that was fatal."""
    (root / "crash.txt").write_text("")
    reader, writer = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            os.close(reader)
            work(name, seed, numbers, cases, root, writer)
        finally:
            os._exit(1)  # never back into the parent's code
    os.close(writer)
    watch = Watch(process, reader)
    watch.follow()
    os.close(reader)
    results = watch.results
    if watch.current is not None:
        fatal = Result(watch.current, "fault", watch.verdict, crash_place(root))
        results.append(fatal._replace(megabytes=watch.largest))
        shutil.rmtree(root / f"{watch.current}", ignore_errors=True)
    if not results:
        raise RuntimeError(f"the worker for {name} does not start: {crash_place(root)}")
    return results


def make_cases(name: str, folder: Path) -> list[Case]:
    """The good inputs of a kind."""
    global TOOLS
    if "TOOLS" not in globals():
        TOOLS = Tools()
    place = folder / f"good {name}"
    place.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        return KINDS[name].make(place)


def fuzz(name: str, mutations: int, seed: int = 0) -> list[Result]:
    """The results of the first mutations of a kind."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        root = Path(folder)
        cases = make_cases(name, root)
        while len(results) < mutations:
            start = len(results)
            numbers = range(start, min(start + BATCH, mutations))
            results += run_batch(name, seed, numbers, cases, root)
    return results


# ================================================================ 4. the report
def summary(name: str, results: Sequence[Result]) -> str:
    """One row of the table."""
    outcomes = Counter(result.outcome for result in results)
    slowest = max(result.seconds for result in results)
    largest = max(result.megabytes for result in results)
    return (
        f"{name:<12}{len(results):>10}{outcomes['right']:>8}{outcomes['refused']:>9}"
        f"{outcomes['fault']:>8}{slowest:>10.2f}{largest:>10.0f}"
    )


TITLE = (
    f"{'kind':<12}{'mutations':>10}{'right':>8}{'refused':>9}{'faults':>8}{'slowest s':>10}"
    f"{'largest MB':>11}"
)


def fault_lines(name: str, results: Sequence[Result]) -> list[str]:
    """A line for each distinct fault: kind, first number, what, where, the message."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.outcome == "fault":
            what = re.sub(r"\d+", "N", result.error)
            groups.setdefault((what, result.place), []).append(result)
    lines = []
    for (_, place), group in groups.items():
        first = group[0]
        message = " ".join(first.message.split())[:160]
        others = ""
        if len(group) > 1:
            numbers = ", ".join(str(result.number) for result in group[1:5])
            others = f"  [{len(group)} times: {numbers} ...]"
        lines.append(f"{name} {first.number}  {first.error}  {place}  {message}{others}")
    return lines


def run_one(name: str, seed: int, number: int) -> list[Result]:
    """A single mutation; its folder is kept."""
    kept = Path(tempfile.gettempdir()) / f"fuzz-{name}-{seed}-{number}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        root = Path(folder)
        cases = make_cases(name, root)
        case = mutation(name, seed, number, cases)
        lay_out(case, kept)
        print(f"{kept}: {case.name!r}, of which {', '.join(case.changed)} may be changed")
        results = run_batch(name, seed, [number], cases, root)
    print(f"{results[0].outcome}: {results[0].error} {results[0].place}\n{results[0].message}")
    return results


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one mutation to run")
    options = parser.parse_args(argv)
    unknown = set(options.kinds) - KINDS.keys()
    if unknown:
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}")

    faults: list[str] = []
    print(TITLE)
    for name in options.kinds or KINDS:
        if options.only is None:
            results = fuzz(name, options.mutations, options.seed)
        else:
            results = run_one(name, options.seed, options.only)
        print(summary(name, results), flush=True)
        faults += fault_lines(name, results)
    print("\n".join(["", *faults]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
