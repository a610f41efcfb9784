"""LLaVA-OneVision's Parquet files -> conversations that train_llava.py reads.

    python prepare.py llava_parquet --root R --out D
    python train.py --recipe llava_stage2 --data_path D/mixture.yaml --init out/llava_stage1_5

The published data have a folder for each set, of files with the columns id, image {bytes, path},
conversations [{from, value}] and data_source; an image is null where there is none. In Parquet one
picture cannot be read without its whole row group, which a run in random order would read thousands
of times. So each set becomes SET.jsonl, a line a row, and SET.tar with its pictures, byte for byte
as they were; a picture is opened when it is trained on. mixture.yaml names all sets. Never is
more in memory than a few row groups.
"""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from data import PARSERS, is_of_arrow_type
from fields import show
from files import BadSample, check_line_length, write_atomically, write_text
from world import first_line_of

ROWS_AT_ONCE = 16
BUFFER = 2**20  # bytes of a column that are read at once
# how a picture's file begins -> how it is called
PICTURE_STARTS = {
    b"\xff\xd8": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


# ---------------------------------------------------------------- reading
def open_parquet(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile of the published schema. Raises ValueError for another one."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        # without pre_buffer a row group is read when its rows are asked for, not before
        file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is not a Parquet file: {first_line_of(error)}") from None
    check_schema(path, file.schema_arrow)
    return file


def check_schema(path: Path, schema: Any) -> None:
    """Raises ValueError, with the column, for a file that is not of the published schema."""
    missing = sorted({"id", "image", "conversations"} - set(schema.names))
    if missing:
        raise ValueError(
            f"{path} lacks the columns {', '.join(missing)}; it has {show(schema.names)}"
        )
    image = schema.field("image").type
    if not is_null(image) and not has_parts(image, {"bytes": "bytes", "path": "text"}):
        raise ValueError(
            f"{path}: the column 'image' is {image}; it must be an object with bytes and path"
        )
    turns = schema.field("conversations").type
    item = getattr(turns, "value_type", None)
    if item is None or not has_parts(item, {"from": "text", "value": "text"}):
        raise ValueError(
            f"{path}: the column 'conversations' is {turns}; it must be a list of objects with "
            "from and value"
        )


def is_null(declared: Any) -> bool:
    return str(declared) == "null"


def has_parts(declared: Any, wanted_types: dict[str, str]) -> bool:
    """Whether a pyarrow type is an object with these parts, of these types."""
    if not str(declared).startswith("struct<"):
        return False
    for name, wanted in wanted_types.items():
        number = declared.get_field_index(name)
        if number < 0 or not is_of_arrow_type(declared.field(number).type, wanted):
            return False
    return True


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(number, row) of a file, from 0 on. Raises ValueError with the row where it is damaged."""
    import pyarrow

    file = open_parquet(path)
    names = [name for name in ("id", "image", "conversations", "data_source") if has(file, name)]
    number = 0
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=names, use_threads=False):
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is damaged behind row {number}: {first_line_of(error)}") from None


def has(file: Any, name: str) -> bool:
    return name in file.schema_arrow.names


# ---------------------------------------------------------------- writing
class Conversion:
    """A set of LLaVA-OneVision while its rows are written."""

    def __init__(self, name: str, archive: tarfile.TarFile, lines: io.BufferedWriter, bar: tqdm):
        self.name = name
        self.archive = archive
        self.lines = lines
        self.bar = bar
        self.rows = 0
        self.pictures = 0
        self.left_out: Counter[str] = Counter()
        self.refused: list[str] = []  # what training will say of rows

    def add_file(self, path: Path) -> None:
        for number, row in read_rows(path):
            self.bar.update()
            place = f"{path}, row {number}"
            record = {"id": row["id"], "conversations": row["conversations"]}
            if row.get("data_source") is not None:
                record["data_source"] = row["data_source"]
            image = row["image"]
            if image is not None:
                if not image["bytes"]:
                    self.left_out["rows whose picture is not in the file"] += 1
                    continue
                record["image"] = self.add_picture(image["bytes"])
            self.add_record(record, place)

    def add_picture(self, content: bytes) -> str:
        """Put a picture into the archive; its path, as a row has it."""
        beginnings = [start for start in PICTURE_STARTS if content.startswith(start)]
        suffix = PICTURE_STARTS[beginnings[0]] if beginnings else ".img"
        member = tarfile.TarInfo(f"{self.pictures:08d}{suffix}")  # the same bytes every time
        member.size = len(content)
        self.archive.addfile(member, io.BytesIO(content))
        self.pictures += 1
        return f"{self.name}.tar::{member.name}"

    def add_record(self, record: dict, place: str) -> None:
        try:
            PARSERS["chat"](record)
        except BadSample as error:
            # it is written: whether such rows end a run is for --on_bad_sample to say
            self.refused.append(f"{place}: {error}")
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        check_line_length(len(line), place)
        self.lines.write(line)
        self.rows += 1

    def report(self) -> None:
        """Print what became of the set."""
        print(f"{self.name}: {self.rows:,} rows, {self.pictures:,} pictures")
        for what, number in self.left_out.items():
            print(f"left out: {number:,} {what}")
        if self.refused:
            print(
                f"{len(self.refused):,} rows that training refuses, or skips with --on_bad_sample "
                f"skip; the first one: {self.refused[0]}"
            )


def convert_set(name: str, files: list[Path], out: Path) -> Conversion:
    """Write out/NAME.jsonl and, where there are pictures, out/NAME.tar."""
    total = sum(open_parquet(file).metadata.num_rows for file in files)
    conversions = []

    def write_rows(temporary_archive: Path, temporary_lines: Path) -> None:
        with (
            tarfile.open(temporary_archive, "w") as archive,
            open(temporary_lines, "wb") as lines,
            tqdm(total=total, desc=name, unit="row", leave=False) as bar,
        ):
            conversion = Conversion(name, archive, lines, bar)
            conversions.append(conversion)
            for file in files:
                conversion.add_file(file)

    # the archive is in its place before the lines that name it
    archive = out / f"{name}.tar"

    def write_both(temporary_lines: Path) -> None:
        write_atomically(archive, lambda temporary: write_rows(temporary, temporary_lines))

    write_atomically(out / f"{name}.jsonl", write_both)
    (conversion,) = conversions
    if not conversion.pictures:
        archive.unlink()
    return conversion


def set_name(root: Path, file: Path) -> str:
    """The name of the set that a file is of: its folder's, or the last word before its number."""
    folder = file.parent.relative_to(root).as_posix()
    name = folder if folder != "." else re.sub(r"-\d+-of-\d+$", "", file.stem)
    # a path with :: is that of a member of an archive, and braces are a choice of files
    return re.sub(r"[/{}:]", "_", name)


def prepare_parquet(root: Path, out: Path) -> None:
    """All sets below a folder, and out/mixture.yaml with all of them. Raises ValueError."""
    sets: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*.parquet")):
        sets.setdefault(set_name(root, file), []).append(file)
    if not sets:
        raise ValueError(f"there is no .parquet file in {root}, or below it")
    for files in sets.values():
        for file in files:
            open_parquet(file)  # what is no such file is said before hours of work
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, files in sets.items():
        conversion = convert_set(name, files, out)
        conversion.report()
        if conversion.rows:
            entries.append({"json_path": f"{name}.jsonl", "sampling_strategy": "all"})
    if not entries:
        raise ValueError(f"the .parquet files in {root} have no rows")
    text = yaml.safe_dump({"datasets": entries}, allow_unicode=True, sort_keys=False)
    write_text(out / "mixture.yaml", text)
    print(f"{out / 'mixture.yaml'}: {len(entries)} sets, for --data_path")
