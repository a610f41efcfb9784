"""llava_parquet.py, on files that the tests write in the published schema of LLaVA-OneVision's
data: the same rows and the same pictures arrive where conversations are read.
"""

import tarfile

import numpy as np
import pytest
import yaml
from helpers import encoded, picture, png
from PIL import Image

import data
import prepare
from data import open_chat
from files import read_json_lines
from llava_parquet import prepare_parquet, read_rows

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SCHEMA = pyarrow.schema(
    {
        "id": pyarrow.string(),
        "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
        "conversations": pyarrow.list_(
            pyarrow.struct({"from": pyarrow.string(), "value": pyarrow.string()})
        ),
        "data_source": pyarrow.string(),
    }
)


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def row(number, content=b"", tag="<image>\n"):
    image = {"bytes": content, "path": f"{number}.png"} if content else None
    question = f"{tag}What is {number}?" if content else f"What is {number}?"
    conversations = turns(question, f"It is {number}.")
    return {
        "id": f"row {number}",
        "image": image,
        "conversations": conversations,
        "data_source": "set",
    }


def write(path, rows, schema=SCHEMA, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path, **settings)


@pytest.fixture
def raw(tmp_path):
    """Two sets: one of two files, with a row without a picture; and one of texts alone."""
    jpeg = encoded(picture(1), "JPEG")
    root = tmp_path / "raw"
    first = [row(0, png(0)), row(1), row(2, jpeg)]
    write(root / "ai2d(llava)" / "train-00000-of-00002.parquet", first, row_group_size=2)
    write(root / "ai2d(llava)" / "train-00001-of-00002.parquet", [row(3, png(3))])
    write(root / "text-00000-of-00001.parquet", [row(4)])
    return root


# ---------------------------------------------------------------- the same rows
def test_the_rows_are_those_of_the_files(raw, tmp_path):
    prepare_parquet(raw, tmp_path / "out")
    rows = []
    for file in sorted(raw.rglob("*.parquet")):
        rows += parquet.read_table(file).to_pylist()
    written = read_json_lines(tmp_path / "out" / "ai2d(llava).jsonl")
    written += read_json_lines(tmp_path / "out" / "text.jsonl")
    assert len(written) == len(rows)
    for ours, theirs in zip(written, rows, strict=True):
        for name in ("id", "conversations", "data_source"):
            assert ours[name] == theirs[name]
        assert ("image" in ours) == (theirs["image"] is not None)
        if "image" in ours:
            archive, _, member = ours["image"].partition("::")
            with tarfile.open(tmp_path / "out" / archive) as opened:
                assert opened.extractfile(member).read() == theirs["image"]["bytes"]


def test_the_mixture_is_read_as_conversations(raw, tmp_path):
    prepare_parquet(raw, tmp_path / "out")
    source = open_chat(tmp_path / "out" / "mixture.yaml")
    assert len(source) == 5
    assert source[0]["conversation"] == row(0, png(0))["conversations"]
    assert np.array_equal(np.asarray(source[3]["images"][0]), np.asarray(picture(3)))
    assert source[1]["images"] == [] and source[4]["images"] == []
    names = [path.name for path in sorted((tmp_path / "out").iterdir())]
    assert names == ["ai2d(llava).jsonl", "ai2d(llava).tar", "mixture.yaml", "text.jsonl"]


def test_the_same_files_come_out_again(raw, tmp_path):
    prepare_parquet(raw, tmp_path / "one")
    prepare_parquet(raw, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_pictures_are_opened_only_when_they_are_asked_for(tmp_path, monkeypatch):
    write(tmp_path / "raw" / "a.parquet", [row(0, b"no picture at all"), row(1, png(1))])
    monkeypatch.setattr(Image, "open", lambda *arguments, **settings: 1 / 0)
    prepare_parquet(tmp_path / "raw", tmp_path / "out")
    source = open_chat(tmp_path / "out" / "a.jsonl")
    monkeypatch.undo()
    assert source[1]["images"][0].size == picture(1).size
    with pytest.raises(data.BadSample, match="not a readable image"):
        source[0]


def test_other_widths_of_text_and_a_column_of_nulls_are_read(tmp_path):
    wide = pyarrow.schema(
        {
            "id": pyarrow.large_string(),
            "image": pyarrow.null(),
            "conversations": pyarrow.large_list(
                pyarrow.struct({"from": pyarrow.large_string(), "value": pyarrow.large_string()})
            ),
        }
    )
    rows = [{name: value for name, value in row(0).items() if name != "data_source"}]
    write(tmp_path / "raw" / "a.parquet", rows, wide)
    prepare_parquet(tmp_path / "raw", tmp_path / "out")
    (written,) = read_json_lines(tmp_path / "out" / "a.jsonl")
    assert written == {"id": "row 0", "conversations": rows[0]["conversations"]}


def test_no_more_than_some_row_groups_are_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    size = 2**16
    rows = [row(number, b"BM" + rng.bytes(size)) for number in range(128)]  # 8 MiB
    write(tmp_path / "a.parquet", rows, row_group_size=8, use_dictionary=False)
    before = pyarrow.total_allocated_bytes()
    most = 0
    for number, read in read_rows(tmp_path / "a.parquet"):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        assert read["image"] == rows[number]["image"] and read["id"] == f"row {number}"
    assert most < 128 * size / 2


# ---------------------------------------------------------------- what is wrong
def test_rows_that_training_refuses_are_counted_and_kept(tmp_path, capsys):
    twice = row(1, png(1), tag="<image>\n<image>\n")
    lost = row(2, png(2))
    lost["image"]["bytes"] = None
    write(tmp_path / "raw" / "a.parquet", [row(0, png(0)), twice, lost])
    prepare_parquet(tmp_path / "raw", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "a: 2 rows, 2 pictures" in printed
    assert "left out: 1 rows whose picture is not in the file" in printed
    assert (
        "1 rows that training refuses" in printed and "a.parquet, row 1: 1 images but 2" in printed
    )
    assert len(read_json_lines(tmp_path / "out" / "a.jsonl")) == 2


def sentence(root, out):
    with pytest.raises(ValueError) as raised:
        prepare_parquet(root, out)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_is_no_such_file_is_said_before_the_work(tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    assert "no .parquet file in" in sentence(root, tmp_path / "out")
    write(root / "a.parquet", [row(0)])
    (root / "b.parquet").write_bytes(b"PAR1 and nothing else")
    assert "b.parquet is not a Parquet file" in sentence(root, tmp_path / "out")
    write(root / "b.parquet", [{"id": "a"}], pyarrow.schema({"id": pyarrow.string()}))
    assert "lacks the columns conversations, image" in sentence(root, tmp_path / "out")
    for name, declared, wanted in (
        ("image", pyarrow.binary(), "an object with bytes and path"),
        ("conversations", pyarrow.string(), "a list of objects with from and value"),
    ):
        fields = {field.name: field.type for field in SCHEMA}
        write(root / "b.parquet", [], pyarrow.schema({**fields, name: declared}))
        assert wanted in sentence(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_names_its_row_and_leaves_nothing(tmp_path):
    path = tmp_path / "raw" / "a.parquet"
    rows = [row(number, png(number)) for number in range(40)]
    write(path, rows, row_group_size=10, compression="snappy", use_dictionary=False)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    assert "a.parquet is damaged behind row" in sentence(tmp_path / "raw", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_converts(raw, tmp_path, capsys):
    prepare.main(["llava_parquet", "--root", str(raw), "--out", str(tmp_path / "out")])
    assert (
        capsys.readouterr().out.splitlines()[-1].endswith("mixture.yaml: 2 sets, for --data_path")
    )
    entries = yaml.safe_load((tmp_path / "out" / "mixture.yaml").read_text())["datasets"]
    assert [entry["json_path"] for entry in entries] == ["ai2d(llava).jsonl", "text.jsonl"]
