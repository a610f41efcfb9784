"""torch_files.py: PyTorch's files are read without executing them; hostile and damaged ones."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from helpers import ROOT, lightning_checkpoint
from torch import nn

import torch_files
import weights
from torch_files import MOST_BITS, MOST_OPCODES, TorchFile
from weights import convert_weights


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


# ---------------------------------------------------------------- pickles
class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_is_read_without_executing_anything(tmp_path):
    mark = tmp_path / "executed"
    base = torch.arange(12, dtype=torch.float32)
    state = {
        "half": torch.randn(3, 2).half(),
        "bf16": torch.randn(4).bfloat16(),
        "int": torch.arange(3),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "view": base[2:8].view(2, 3),
        "transposed": base.view(3, 4).T,
        "strided": base[::3],
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "bool": torch.tensor([True, False]),
    }
    lightning_checkpoint(tmp_path / "x.ckpt", state, {"num_heads": 4}, Evil(mark))
    read, settings = weights.read_weights(tmp_path / "x.ckpt")
    assert not mark.exists()
    assert settings == {"num_heads": 4}
    assert set(read) == set(state)
    for key, tensor in state.items():
        assert read[key].dtype == tensor.dtype, key
        assert torch.equal(read[key], tensor), key
        assert read[key].is_contiguous(), key
    torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert mark.exists(), "the file is indeed malicious"


def raw_pickle(path, content: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)


@pytest.mark.parametrize(
    "content",
    [
        b"cposix\nsystem\n(S'touch MARK'\ntR.",
        b"(S'touch MARK'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'touch MARK'\no.",
        b"cposix\nsystem\n(S'touch MARK'\nt\x81.",
        b'cbuiltins\neval\n(S\'__import__("os").system("touch MARK")\'\ntR}b.',
        b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S'touch MARK'\ntR.",
    ],
)
def test_no_opcode_calls_anything(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    raw_pickle(tmp_path / "x.pt", content)
    with pytest.raises(ValueError, match="x.pt"):
        convert_weights(tmp_path / "x.pt", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt"]


def rewrite(source, target, change, compression=zipfile.ZIP_STORED):
    """A copy of a zip file, its stored numbers changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if "/data/" in name else content)


def test_broken_files_are_named(tmp_path):
    state = {"a": torch.randn(100)}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="before PyTorch 1.6"):
        weights.read_weights(tmp_path / "old.pt")
    raw_pickle(tmp_path / "cut.pt", pickle.dumps({"a": 1}, 2)[:-3])
    with pytest.raises(ValueError, match="cut.pt is not a readable PyTorch file"):
        weights.read_weights(tmp_path / "cut.pt")
    with zipfile.ZipFile(tmp_path / "no.pt", "w") as archive:
        archive.writestr("archive/other", b"")
    with pytest.raises(ValueError, match="no.pt is not a readable PyTorch file"):
        weights.read_weights(tmp_path / "no.pt")
    torch.save(state, tmp_path / "good.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "short.pt", lambda content: content[:-8])
    with pytest.raises(ValueError, match="tensor 'a' cannot be read"):
        weights.read_weights(tmp_path / "short.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "packed.pt", lambda x: x, zipfile.ZIP_DEFLATED)
    assert equal(weights.read_weights(tmp_path / "packed.pt")[0], state)
    with zipfile.ZipFile(tmp_path / "packed.pt") as archive:
        member = next(x for x in archive.infolist() if "/data/" in x.filename)
    content = bytearray((tmp_path / "packed.pt").read_bytes())
    start = member.header_offset + 30 + len(member.filename)
    content[start : start + 40] = b"\xff" * 40
    (tmp_path / "packed.pt").write_bytes(content)
    with pytest.raises(ValueError, match="packed.pt: tensor 'a' cannot be read"):
        weights.read_weights(tmp_path / "packed.pt")
    with pytest.raises(ValueError, match="good.pt is no ManagerTower"):
        convert_weights(tmp_path / "good.pt", tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist"):
        convert_weights(tmp_path / "none.pt", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has neither model.safetensors nor"):
        convert_weights(tmp_path / "empty", tmp_path / "out")


# ---------------------------------------------------------------- what PyTorch itself writes
def read(path):
    torch_file = TorchFile(path)
    return torch_file.tensors(torch_file.tree)


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
        *("complex32", "complex64", "complex128"),
    ],
)
def test_every_dtype_is_read(tmp_path, name):
    dtype = getattr(torch, name)
    content = torch.arange(160, dtype=torch.uint8).remainder(2)
    flat = content.view(dtype)
    tensors = {"flat": flat, "part": flat[2:6].clone(), "empty": flat[:0].clone()}
    read_tensors = read(saved(tmp_path / "x.pt", tensors))
    for key, tensor in tensors.items():
        assert read_tensors[key].dtype is dtype
        assert torch.equal(read_tensors[key].view(torch.uint8), tensor.view(torch.uint8)), key


def test_every_way_to_hold_numbers_is_read(tmp_path):
    numbers = torch.randn(4, 3)
    marked = numbers.clone()
    marked.mark = "an attribute"
    marked_parameter = nn.Parameter(numbers.clone())
    marked_parameter.mark = "an attribute"
    pixels = torch.randn(4, 3, 1, 1)
    tensors = {
        "tied": numbers,
        "tied_too": numbers,
        "transposed": numbers.T,
        "row": numbers[2],
        "repeated": torch.randn(3).expand(100, 3),
        "marked": marked,
        "marked_parameter": marked_parameter,
        "buffer": nn.Buffer(numbers.clone()),
        "channels_last": pixels.to(memory_format=torch.channels_last),
        "no_numbers": torch.empty(0, 7),
    }
    read_tensors = read(saved(tmp_path / "x.pt", tensors))
    assert list(read_tensors) == list(tensors)
    pointers = set()
    for key, tensor in tensors.items():
        ours = read_tensors[key]
        assert torch.equal(ours, tensor), key
        expected = torch.empty(tensor.shape).stride()
        assert ours.stride() == expected, key
        assert ours.untyped_storage().nbytes() == ours.nbytes, key
        pointers.add(ours.untyped_storage().data_ptr())
    assert len(pointers) == len(tensors), "each has numbers of its own"


def test_states_of_wrapped_models_and_scripts_are_read(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    state = model.state_dict()
    path = tmp_path / "x.pt"
    assert equal(read(saved(path, state)), state)
    parallel = nn.DataParallel(model).state_dict()
    assert equal(read(saved(path, parallel)), parallel)
    torch.jit.script(model).save(str(path))
    assert equal(read(path), state)
    torch.jit.trace(model.eval(), torch.zeros(2, 2)).save(str(path))
    assert read(path).keys() >= {"0.weight", "1.1.bias"}


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        torch.zeros(3, device="meta"),
        nn.UninitializedParameter(),
    ],
    ids=["sparse", "csr", "quantized", "nested", "meta", "uninitialized"],
)
def test_unusual_tensors_are_refused_by_name(tmp_path, content):
    saved(tmp_path / "x.pt", {"state_dict": {"a": content}})
    with pytest.raises(ValueError, match="x.pt: tensor 'a' .*makes a tensor that is not supported"):
        weights.read_weights(tmp_path / "x.pt")


def test_views_and_whole_models_are_told_how_to_be_saved(tmp_path):
    conjugated = torch.zeros(3, dtype=torch.complex64).conj()
    for view in (conjugated, conjugated.imag):
        with pytest.raises(ValueError, match=r"x.pt: tensor 'a' .*save resolve_conj\(\)"):
            read(saved(tmp_path / "x.pt", {"a": view}))
    for content in (nn.Linear(2, 3), {"model": nn.Linear(2, 3)}):
        with pytest.raises(ValueError, match="x.pt holds a whole model.*save its weights"):
            read(saved(tmp_path / "x.pt", content))


def test_what_lies_beside_the_weights_does_not_matter(tmp_path):
    """Other objects, keys that are no texts, and a dict that holds itself."""
    itself = {"a": torch.ones(2)}
    itself["itself"] = itself
    content = {
        "state_dict": itself,
        "model": nn.Linear(2, 3),
        "sparse": torch.eye(2).to_sparse(),
        5: torch.zeros(1),
        (1, "x"): 3,
        None: {},
        torch.float16: torch.device("cpu"),
        "size": torch.Size([3]),
        "random": torch.get_rng_state(),
    }
    saved(tmp_path / "x.pt", content)
    read_tensors, _ = weights.read_weights(tmp_path / "x.pt")
    assert equal(read_tensors, {"a": torch.ones(2)})
    assert read(saved(tmp_path / "x.pt", {5: torch.zeros(1)})) == {}


# ---------------------------------------------------------------- hostile and damaged pickles
def text(content: str) -> bytes:
    """The opcode that puts a text on the stack."""
    encoded = content.encode("utf-8", "surrogatepass")
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def refused(path, *words):
    """The sentence that refuses the file; it holds all words."""
    with pytest.raises(ValueError) as error:
        read(path)
    sentence = str(error.value)
    assert str(path) in sentence
    for word in words:
        assert word in sentence
    rest = sentence.replace(str(path), "")
    assert len(rest) < 400
    assert "\n" not in rest and "0x7f" not in rest and "Error(" not in rest
    return sentence


LONG_NUMBER = 2 ** (MOST_BITS + 8)
HUGE = b"\xff\xff\xff\x7f"
PICKLES = {  # name -> (opcodes after the protocol, words of the sentence)
    "nothing": (b"", "before seeing STOP"),
    "empty stack": (b".", "empty stack"),
    "no stop": (b"}", "before seeing STOP"),
    "unknown opcode": (b"\xfe.", "unknown"),
    "protocol 6": (b"\x80\x06}.", "protocol 6; it must be at most 5"),
    "pop too many": (b"}00.", "empty stack"),
    "too few for a tuple": (b"}\x87.", "empty stack"),
    "too few for an item": (b"}}s.", "empty stack"),
    "pop through a mark": (b"}(\x85.", "empty stack"),
    "no mark": (b"]e.", "MARK that is not there"),
    "duplicate nothing": (b"2.", "empty stack"),
    "memo of nothing": (b"q\x00.", "empty stack"),
    "memo without value": (b"h\x07.", "uses the value 7"),
    "huge memo without value": (b"j" + HUGE + b".", "uses the value 2147483647"),
    "text longer than the pickle": (b"X" + HUGE + b"a.", "bytes in a unicodestring4"),
    "text of 2^63": (b"\x8d" + b"\xff" * 8 + b"a.", "byte count > sys.maxsize"),
    "bytes longer than the pickle": (b"B" + HUGE + b"a.", "bytes in a bytes4"),
    "text that is none": (b"X\x01\x00\x00\x00\xff.", "no text (byte 0xff)"),
    "class that is no text": (b"c\xff\nx\n.", "no text (byte 0xff)"),
    "number that is none": (b"Ix\n.", "invalid literal"),
    "number of 5000 digits": (b"L" + b"9" * 5000 + b"\n.", "digits"),
    "number of many bits": (pickle.dumps(LONG_NUMBER, 2)[2:], f"more than {MOST_BITS} bits"),
    "float that is none": (b"Fx\n.", "could not convert"),
    "dict with half an item": (b"}(K\x01u.", "a key without a value"),
    "new dict with half an item": (b"(K\x01d.", "a key without a value"),
    "list as key": (b"}]K\x01s.", "type list as a key"),
    "dict as key": (b"}}K\x01s.", "type dict as a key"),
    "list in a set": (b"\x8f(]\x90.", "type list as a key"),
    "list in a frozen set": (b"(]\x91.", "type list as a key"),
    "item of a list": (b"]K\x01K\x02s.", "puts items into a value of type list"),
    "item of a number": (b"K\x01K\x01K\x02s.", "puts items into a value of type int"),
    "append to a dict": (b"}K\x01a.", "appends to a value of type dict"),
    "state of a dict": (b"}}b.", "restores the state of a value of type dict"),
    "state of a list": (b"]K\x01b.", "restores the state of a value of type list"),
    "call of a text": (text("os") + b")R.", "calls a value of type str"),
    "call with a list": (b"cos\nsystem\n]R.", "the arguments are a value of type list"),
    "new object of a number": (b"K\x01)\x81.", "calls a value of type int"),
    "new object with keywords": (b"K\x01)}\x92.", "calls a value of type int"),
    "instance of nothing": (b"(o.", "instance of no class"),
    "class whose name is a number": (b"K\x01K\x02\x93.", "a class whose name is no text"),
    "extension": (b"\x82\x01.", "EXT1, which torch.save never writes"),
    "buffer from outside": (b"\x97.", "NEXT_BUFFER, which torch.save never writes"),
    "too many opcodes": (b"](" + b"}" * MOST_OPCODES + b"e.", f"more than {MOST_OPCODES}"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles_are_refused_in_words(tmp_path, name):
    opcodes, words = PICKLES[name]
    raw_pickle(tmp_path / "x.pt", b"\x80\x02" + opcodes)
    refused(tmp_path / "x.pt", "is not a readable PyTorch file", words)


def nested(depth: int) -> bytes:
    """Dicts inside each other."""
    return b"}" + (text("a") + b"}") * depth + b"s" * depth + b"."


EMPTY_TENSOR = (  # as torch.save writes it, without a storage
    b"ctorch._utils\n_rebuild_tensor_v2\n()))tR"
)
TREES = {  # name -> (opcodes, words of the sentence)
    "101 dicts": (nested(101), "more than 100 dicts are inside each other"),
    "100,000 dicts": (nested(100_000), "more than 100 dicts are inside each other"),
    "long key": (b"}" + text("k" * 1001) + EMPTY_TENSOR + b"s.", "name has 1001 characters"),
    "long keys": (
        (b"}" + text("k" * 400)) * 3 + EMPTY_TENSOR + b"sss.",
        "name has 1200 characters",
    ),
    "half a character": (b"}" + text("\ud800") + EMPTY_TENSOR + b"s.", "printable"),
    "line break": (b"}" + text("a\nb") + EMPTY_TENSOR + b"s.", "printable"),
    "parameter of parameters": (
        b"}" + text("a")
        + b"ctorch._utils\n_rebuild_parameter\nq\x00" * 9 + EMPTY_TENSOR + b"\x85R" * 9 + b"s.",
        "makes a tensor that is not supported",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_hostile_trees_are_refused_in_words(tmp_path, name):
    opcodes, words = TREES[name]
    raw_pickle(tmp_path / "x.pt", b"\x80\x02" + opcodes)
    refused(tmp_path / "x.pt", words)


def test_what_would_explode_is_read(tmp_path):
    """Tuples of the same tuple twice, and so on: 2^60 items if one followed them, and as a key."""
    tuples = b"()q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"1"
    lists = b"(]q\x01" + b"](h\x01h\x01eq\x01" * 60 + b"1"
    dicts = b"(}q\x02" + (b"}(" + text("a") + b"h\x02" + text("b") + b"h\x02uq\x02") * 60 + b"1"
    huge_memo = b"Nr" + HUGE + b"0"
    key = b"}(h\x00K\x01" + text("a") + b"h\x02u"
    pickle_of_all = b"\x80\x02" + tuples + lists + dicts + huge_memo + key + b"h\x01h\x02\x87."
    raw_pickle(tmp_path / "x.pt", pickle_of_all)
    torch_file = TorchFile(tmp_path / "x.pt")
    assert len(torch_file.tree) == 3
    for part in torch_file.tree:
        assert torch_file.tensors(part) == {}


# ---------------------------------------------------------------- hostile and damaged tensors
class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *args):
        self.function = function
        self.args = args

    def __reduce__(self):
        return self.function, self.args


class Storage:
    """Pickled as the name of a storage."""

    def __init__(self, *name):
        self.name = name


class TensorPickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.name if isinstance(value, Storage) else None


STORAGE = Storage("storage", torch.FloatStorage, "0", "cpu", 4)
V2 = torch._utils._rebuild_tensor_v2
V3 = torch._utils._rebuild_tensor_v3


def v2(storage=STORAGE, offset=0, size=(4,), stride=(1,)):
    return Call(V2, storage, offset, size, stride, False, OrderedDict())


def v3(dtype, length=16):
    storage = Storage("storage", torch.UntypedStorage, "0", "cpu", length)
    return Call(V3, storage, 0, (1,), (1,), False, OrderedDict(), dtype)


def write_members(path, content, members):
    """An archive with this content of data.pkl and these members."""
    file = io.BytesIO()
    TensorPickler(file, 2).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", file.getvalue())
        for name, member in members.items():
            archive.writestr(f"archive/{name}", member)


def storage(*name):
    return v2(Storage(*name))


CALLS = {  # name -> (call, words of the sentence)
    "size too large": (v2(size=(5,)), "shape (5,) with strides (1,) from 0 on is larger than"),
    "stride too large": (v2(stride=(2,)), "is larger than its storage of 4"),
    "offset too large": (v2(offset=1), "is larger than its storage of 4"),
    "size below 0": (v2(size=(-4,)), "hold -4; they must be whole numbers from 0 on"),
    "stride below 0": (v2(stride=(-1,), offset=3), "hold -1"),
    "offset below 0": (v2(offset=-1), "hold -1"),
    "size of a float": (v2(size=(4.0,)), "hold 4.0"),
    "size of true": (v2(size=(True,)), "hold True"),
    "size of a text": (v2(size=("4",)), "hold '4'"),
    "offset of none": (v2(offset=None), "hold None"),
    "size beyond 64 bits": (v2(size=(2**64,)), "hold 18446744073709551616"),
    "size that overflows": (v2(size=(2**62,), stride=(2**62,)), "is larger than its storage"),
    "empty and overflows": (v2(size=(2**62, 2**62, 0), stride=(1, 1, 1)), "cannot be read"),
    "list as size": (v2(size=[4]), "must be a tuple of at most 64 numbers"),
    "number as size": (v2(size=4), "must be a tuple of at most 64 numbers"),
    "65 dimensions": (v2(size=(1,) * 65, stride=(1,) * 65), "a tuple of at most 64 numbers"),
    "10^5 dimensions": (v2(size=(1,) * 10**5, stride=(1,) * 10**5), "at most 64 numbers"),
    "too few strides": (v2(size=(2, 2)), "it has 2 dimensions, but 1 strides"),
    "repeated forever": (v2(size=(2**40,), stride=(0,)), "too much for the size of the file"),
    "no storage": (v2(storage=None), "storage is not named as torch.save does"),
    "short name": (storage("storage", torch.FloatStorage), "not named as torch.save does"),
    "another mark": (storage("x", torch.FloatStorage, "0", "cpu", 4), "not named as"),
    "key of a number": (storage("storage", torch.FloatStorage, 0, "cpu", 4), "not named as"),
    "length of a text": (storage("storage", torch.FloatStorage, "0", "cpu", "4"), "not named"),
    "unknown class": (storage("storage", Path, "0", "cpu", 4), "'pathlib.Path' are not supported"),
    "no class": (storage("storage", 5, "0", "cpu", 4), "are not supported"),
    "no member": (storage("storage", torch.FloatStorage, "1", "cpu", 4), "'data/1' is missing"),
    "another member": (storage("storage", torch.FloatStorage, "../data.pkl", "cpu", 4), "missing"),
    "wrong length": (
        storage("storage", torch.FloatStorage, "0", "cpu", 5),
        "its storage '0' has 16 bytes, but should have 5 numbers of 4",
    ),
    "wrong type": (storage("storage", torch.HalfStorage, "0", "cpu", 4), "4 numbers of 2"),
    "length below 0": (storage("storage", torch.FloatStorage, "0", "cpu", -4), "-4 numbers"),
    "half a number": (v3(torch.complex128, 5), "has 16 bytes, but should have 5 numbers of 1"),
    "unknown dtype": (v3(torch.strided), "is not known"),
    "dtype of a number": (v3(5), "its dtype '' is not known"),
    "no arguments": (Call(V2), "makes a tensor that is not supported"),
    "parameter of nothing": (Call(torch._utils._rebuild_parameter), "that is not supported"),
    "parameter of a number": (Call(torch._utils._rebuild_parameter, 5), "that is not supported"),
}


@pytest.mark.parametrize("name", CALLS)
def test_hostile_tensors_are_refused_in_words(tmp_path, name):
    call, words = CALLS[name]
    write_members(tmp_path / "x.pt", {"good": v2(), "w": call}, {"data/0": bytes(16)})
    refused(tmp_path / "x.pt", "tensor 'w' cannot be read", words)


def test_bytes_that_are_no_whole_numbers_are_refused(tmp_path):
    write_members(tmp_path / "x.pt", {"w": v3(torch.int32, 5)}, {"data/0": bytes(5)})
    refused(tmp_path / "x.pt", "tensor 'w'", "the 5 bytes of its storage are no numbers")


def test_a_small_file_does_not_become_many_tensors(tmp_path, monkeypatch):
    """All are views of one storage; tied weights are, too, but not so many."""
    monkeypatch.setattr(torch_files, "FREE_GROWTH", 2**20)
    numbers = bytes(2**18)
    whole = v2(Storage("storage", torch.FloatStorage, "0", "cpu", 2**16), size=(2**16,))
    empty = v2(size=(0,))
    for call, most, member in ((whole, 12, numbers), (empty, 2048, bytes(16))):
        some = {f"layer.{i}": call for i in range(most)}
        write_members(tmp_path / "x.pt", some, {"data/0": member})
        assert len(read(tmp_path / "x.pt")) == most
        many = {f"layer.{i}": call for i in range(8 * most)}
        write_members(tmp_path / "x.pt", many, {"data/0": member})
        refused(tmp_path / "x.pt", "with it the tensors take more than", "share their numbers")


# ---------------------------------------------------------------- hostile and damaged archives
def write_archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)


EMPTY = ("archive/data.pkl", b"\x80\x02}.")
ZEROS = ("archive/data/0", bytes(100 * 2**20))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_archives_are_refused_in_words(tmp_path):
    path = tmp_path / "x.pt"
    for members, compression, words in (
        ([], zipfile.ZIP_STORED, "has no data.pkl"),
        ([("word/document.xml", b"")], zipfile.ZIP_STORED, "has no data.pkl"),
        ([EMPTY, EMPTY], zipfile.ZIP_STORED, "member 'archive/data.pkl' twice"),
        ([EMPTY, ("archive/byteorder", b"big")], zipfile.ZIP_STORED, "byteorder is 'big'"),
        ([EMPTY, ("archive/byteorder", b"x" * 101)], zipfile.ZIP_STORED, "at most 100"),
        ([EMPTY], zipfile.ZIP_BZIP2, "compressed in a way that is not read"),
        ([EMPTY], zipfile.ZIP_LZMA, "compressed in a way that is not read"),
        ([EMPTY, ZEROS], zipfile.ZIP_DEFLATED, "it would be 100 MiB unpacked"),
    ):
        write_archive(path, members, compression)
        refused(path, "is not a readable PyTorch file", words)


def change_directory(path, offset, value: bytes):
    """Other bytes in the directory's entry of the only member."""
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02") + offset
    content[entry : entry + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (8, b"\x01\x00", "encrypted"),
        (10, b"\x63\x00", "compressed in a way that is not read"),
        (16, b"\x00\x00\x00\x00", "Bad CRC-32"),
        (20, b"\xff\xff\xff\x02\xff\xff\xff\x02", "too early"),  # 48 MiB
        (24, b"\xff\xff\xff\x0f", "256 MiB unpacked"),
        (42, b"\xff\x00\x00\x00", "x.pt"),  # where it begins
    ],
)
def test_archives_that_say_the_wrong_thing_are_refused(tmp_path, offset, value, words):
    write_archive(tmp_path / "x.pt", [EMPTY])
    assert read(tmp_path / "x.pt") == {}
    change_directory(tmp_path / "x.pt", offset, value)
    refused(tmp_path / "x.pt", "is not a readable PyTorch file", words)


def test_no_prefix_of_a_file_is_read(tmp_path):
    saved(tmp_path / "good.pt", {"a": torch.randn(100)})
    content = (tmp_path / "good.pt").read_bytes()
    for size in range(0, len(content), 37):
        (tmp_path / "x.pt").write_bytes(content[:size])
        refused(tmp_path / "x.pt", "x.pt is no")


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def forbidden(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    saved(tmp_path / "x.pt", {})
    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(OSError, match="Permission denied: .*x.pt"):
        TorchFile(tmp_path / "x.pt")


READ_AND_MEASURE = """
import resource, sys, time
from pathlib import Path
import torch
from torch_files import TorchFile

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.empty(1).clone()
for path in sys.argv[1:]:
    before = peak()
    start = time.process_time()
    try:
        torch_file = TorchFile(Path(path))
        torch_file.tensors(torch_file.tree)
    except ValueError:
        pass
    print(peak() - before, time.process_time() - start)
"""


@pytest.mark.slow
def test_time_and_memory_are_bounded(tmp_path):
    """Each in less than 2 s of one core. A file's numbers are held once."""
    numbers = torch.zeros(2**23)  # 32 MiB
    files = {
        "100,000 dicts": (b"\x80\x02" + nested(100_000), 40),
        "memo": (b"\x80\x02}r" + HUGE + b".", 40),
        "laughs": (b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 10_000 + b".", 40),
        "shared state": (shared_state(20_000), 60),
        "numbers": ({"a": numbers}, 56),
    }
    for name, (content, _) in files.items():
        if isinstance(content, bytes):
            raw_pickle(tmp_path / name, content)
        else:
            torch.save(content, tmp_path / name)
    command = [sys.executable, "-c", READ_AND_MEASURE]
    command += [str(tmp_path / name) for name in files]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    for (name, (_, most)), line in zip(files.items(), result.stdout.splitlines(), strict=True):
        memory, seconds = line.split()
        assert float(memory) < most, name
        assert float(seconds) < 2, name


def shared_state(count: int) -> bytes:
    """Objects that all have the same state: a dict of as many dicts."""
    items = [text(f"{i:06d}") + b"}" for i in range(count)]
    state = b"}(" + b"".join(items) + b"uq\x01"
    item = b"h\x00)\x81h\x01b"
    objects = [text(f"n{i:05d}") + item for i in range(count)]
    return b"\x80\x02" + state + b"0cx\ny\nq\x000}(" + b"".join(objects) + b"u."
