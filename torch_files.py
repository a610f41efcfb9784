"""PyTorch's files (.bin, .pt, .ckpt), read without executing them.

They are zip archives: data.pkl, a pickle, says what there is, and a member for each storage holds
the numbers. A pickle is a program that may call anything. `Machine` runs it without calling
anything: it notes each call as an `Inert`, and the tensors are then made from these notes.

Whatever a file says about itself is checked before it is believed: a small one can claim
terabytes.
"""

import math
import pickletools
import struct
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fields import show
from files import as_dict
from world import first_line_of

State = dict[str, Tensor]

# A tensor takes about 40 opcodes, so this is enough for 25,000 tensors. A language model of 7
# billion parameters has about 1,000 with the states of its optimizer.
MOST_OPCODES = 2**20
MOST_BYTES_OF_A_PICKLE = 128 * 2**20
MOST_BITS = 4096  # of a whole number; the state of a random generator has 128
MOST_DEPTH = 100  # of dicts and modules inside each other
MOST_CHARACTERS = 1000  # of a tensor's name
MOST_DIMENSIONS = 64
CHUNK = 2**24  # bytes of an archive that are unpacked at once

# What a file may become in memory. Trained numbers can hardly be compressed, but tensors may share
# their numbers, as tied weights do, and each then gets its own.
MOST_GROWTH = 8  # times its size
FREE_GROWTH = 64 * 2**20  # and so many bytes, whatever its size
LEAST_BYTES_OF_A_TENSOR = 512  # what an empty tensor takes as well

BROKEN = (  # what a damaged or hostile file makes the libraries raise
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    MemoryError,
    OverflowError,
)


def words_of(error: Exception) -> str:
    """What an error says, on one line of bounded length."""
    if isinstance(error, EOFError):
        return "it ends too early"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, OSError):
        return error.strerror or "it cannot be read"
    if isinstance(error, UnicodeDecodeError):
        return f"it has a name that is no text (byte 0x{error.object[error.start]:02x})"
    return first_line_of(error)


# ---------------------------------------------------------------- pickles
class Inert(dict):
    """A class or function that a pickle names, or what a call of it would have made.

    It holds the items that the pickle puts into it. name: of the class or function; args: what it
    is called with, None where it is not called; state: what the pickle would have restored.
    """

    __slots__ = ("name", "args", "state")

    def __init__(self, name: str, args: tuple | None = None):
        self.name = name
        self.args = args
        self.state: Any = None

    def __repr__(self) -> str:
        """Short: the items may be millions."""
        return self.name[:60] if self.args is None else f"a call of {self.name[:60]}"


PUSHED = frozenset(  # opcodes that put their argument on the stack
    "BININT BININT1 BININT2 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "PERSID".split()
)
NEW_VALUES: dict[str, Callable[[], Any]] = {  # opcodes that put a new value on the stack
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,  # nobody looks into a set
}
NO_KEYS = (list, dict, bytearray)  # what Python does not take as a key


def opcodes_of(content: bytes | bytearray) -> Iterator[tuple[str, Any]]:
    """(name, argument) of each opcode. The arguments are never longer than the pickle."""
    try:
        for opcode, argument, _ in pickletools.genops(content):
            yield opcode.name, argument
    except ValueError as error:
        raise ValueError(f"its pickle is damaged: {words_of(error)}") from error


class Machine:
    """Runs the opcodes of a pickle on a stack, as the module pickle does, but calls nothing.

    Dicts keep only those items whose keys are texts: no others are asked for, and comparing them
    could be made to take forever. Raises ValueError and what is in BROKEN.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.stacks_below: list[list[Any]] = []  # one for each MARK that is open
        self.memo: dict[int, Any] = {}
        self.calls: list[Inert] = []  # every call that was noted
        self.actions: dict[str, Callable[[Any], None]] = {
            "PROTO": self.check_protocol,
            "FRAME": self.ignore,
            "STOP": self.ignore,
            "INT": self.push_integer,
            "LONG": self.push_integer,
            "LONG1": self.push_integer,
            "LONG4": self.push_integer,
            "MARK": self.mark,
            "POP": self.drop,
            "POP_MARK": self.drop_to_mark,
            "DUP": self.duplicate,
            "PUT": self.put,
            "BINPUT": self.put,
            "LONG_BINPUT": self.put,
            "MEMOIZE": self.memoize,
            "GET": self.get,
            "BINGET": self.get,
            "LONG_BINGET": self.get,
            "TUPLE1": lambda _: self.make_tuple(1),
            "TUPLE2": lambda _: self.make_tuple(2),
            "TUPLE3": lambda _: self.make_tuple(3),
            "TUPLE": self.make_long_tuple,
            "FROZENSET": self.make_frozen_set,
            "LIST": self.make_list,
            "DICT": self.make_dict,
            "APPEND": self.append,
            "APPENDS": self.append_many,
            "ADDITEMS": self.add_many,
            "SETITEM": self.set_item,
            "SETITEMS": self.set_many,
            "GLOBAL": self.name_global,
            "STACK_GLOBAL": self.name_global_of_stack,
            "REDUCE": self.call,
            "NEWOBJ": self.call,
            "NEWOBJ_EX": self.call_with_keywords,
            "INST": self.make_instance,
            "OBJ": self.make_instance_of_stack,
            "BUILD": self.build,
            "BINPERSID": self.refer,
        }

    def run(self, content: bytes | bytearray) -> Any:
        """The value that the pickle makes."""
        count = 0
        for name, argument in opcodes_of(content):
            count += 1
            if count > MOST_OPCODES:
                raise ValueError(f"its pickle has more than {MOST_OPCODES} opcodes")
            if name in PUSHED:
                self.stack.append(argument)
            elif name in NEW_VALUES:
                self.stack.append(NEW_VALUES[name]())
            elif name in self.actions:
                self.actions[name](argument)
            else:
                raise ValueError(f"its pickle has the opcode {name}, which torch.save never writes")
        return self.pop()

    # ---- the stack
    def ignore(self, _: Any) -> None:
        pass

    def check_protocol(self, protocol: int) -> None:
        if protocol > 5:
            raise ValueError(f"its pickle is of protocol {protocol}; it must be at most 5")

    def push_integer(self, number: int) -> None:
        if number.bit_length() > MOST_BITS:
            raise ValueError(f"its pickle has a whole number of more than {MOST_BITS} bits")
        self.stack.append(number)

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("its pickle takes a value from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise ValueError("its pickle changes a value on an empty stack")
        return self.stack[-1]

    def drop(self, _: Any) -> None:
        """POP also closes a MARK that nothing lies on."""
        if self.stack or not self.stacks_below:
            self.pop()
        else:
            self.pop_to_mark()

    def duplicate(self, _: Any) -> None:
        self.stack.append(self.top())

    def mark(self, _: Any) -> None:
        self.stacks_below.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        """All values since the last MARK."""
        if not self.stacks_below:
            raise ValueError("its pickle looks for a MARK that is not there")
        values = self.stack
        self.stack = self.stacks_below.pop()
        return values

    def drop_to_mark(self, _: Any) -> None:
        self.pop_to_mark()

    # ---- the memo: values that are used again
    def put(self, number: int) -> None:
        self.memo[number] = self.top()

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.top()

    def get(self, number: int) -> None:
        if number not in self.memo:
            raise ValueError(f"its pickle uses the value {show(number)}, which is not there")
        self.stack.append(self.memo[number])

    # ---- tuples, lists, sets, dicts
    def make_tuple(self, length: int) -> None:
        values = [self.pop() for _ in range(length)]
        values.reverse()
        self.stack.append(tuple(values))

    def make_long_tuple(self, _: Any) -> None:
        values = self.pop_to_mark()
        self.stack.append(tuple(values))

    def make_list(self, _: Any) -> None:
        values = self.pop_to_mark()
        self.stack.append(values)

    def make_frozen_set(self, _: Any) -> None:
        values = self.pop_to_mark()
        check_keys(values)
        self.stack.append(tuple(values))

    def make_dict(self, _: Any) -> None:
        values = self.pop_to_mark()
        self.stack.append({})
        self.set_items(values)

    def append(self, _: Any) -> None:
        self.extend([self.pop()])

    def append_many(self, _: Any) -> None:
        self.extend(self.pop_to_mark())

    def add_many(self, _: Any) -> None:
        values = self.pop_to_mark()
        check_keys(values)
        self.extend(values)

    def extend(self, values: list[Any]) -> None:
        """Add values to the list or set on top; what is added to an Inert is not needed."""
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Inert):
            raise ValueError(f"its pickle appends to {kind_of(target)}")

    def set_item(self, _: Any) -> None:
        value = self.pop()
        key = self.pop()
        self.set_items([key, value])

    def set_many(self, _: Any) -> None:
        self.set_items(self.pop_to_mark())

    def set_items(self, values: list[Any]) -> None:
        """Put items into the dict on top; values: key, value, key, value ..."""
        target = self.top()
        if not isinstance(target, dict):
            raise ValueError(f"its pickle puts items into {kind_of(target)}")
        if len(values) % 2 == 1:
            raise ValueError("its pickle has a dict with a key without a value")
        keys = values[::2]
        check_keys(keys)
        for key, value in zip(keys, values[1::2], strict=True):
            if isinstance(key, str):
                target[key] = value

    # ---- classes, functions and their calls
    def name_global(self, module_and_name: str) -> None:
        self.stack.append(Inert(module_and_name.replace(" ", ".")))

    def name_global_of_stack(self, _: Any) -> None:
        name = self.pop()
        module = self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("its pickle has a class whose name is no text")
        self.stack.append(Inert(f"{module}.{name}"))

    def note_call(self, function: Any, args: Any) -> None:
        """Put the note of a call on the stack. A call of what a call made has no name."""
        if not isinstance(function, Inert):
            raise ValueError(f"its pickle calls {kind_of(function)}")
        if not isinstance(args, tuple):
            raise ValueError(f"its pickle calls something, but the arguments are {kind_of(args)}")
        name = function.name if function.args is None else ""
        note = Inert(name, args)
        self.calls.append(note)
        self.stack.append(note)

    def call(self, _: Any) -> None:
        args = self.pop()
        function = self.pop()
        self.note_call(function, args)

    def call_with_keywords(self, _: Any) -> None:
        self.pop()
        self.call(_)

    def make_instance(self, module_and_name: str) -> None:
        args = tuple(self.pop_to_mark())
        self.note_call(Inert(module_and_name.replace(" ", ".")), args)

    def make_instance_of_stack(self, _: Any) -> None:
        values = self.pop_to_mark()
        if not values:
            raise ValueError("its pickle makes an instance of no class")
        self.note_call(values[0], tuple(values[1:]))

    def build(self, _: Any) -> None:
        state = self.pop()
        target = self.top()
        if not isinstance(target, Inert):
            raise ValueError(f"its pickle restores the state of {kind_of(target)}")
        target.state = state

    def refer(self, _: Any) -> None:
        """What stands outside of the pickle: ("storage", class, key, device, length)."""
        self.top()


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, Inert):
        return show(value)
    return f"a value of type {type(value).__name__}"


def check_keys(keys: list[Any]) -> None:
    """Raises ValueError for what can be no key of a dict and no member of a set."""
    for key in keys:
        if type(key) in NO_KEYS:
            raise ValueError(f"its pickle has {kind_of(key)} as a key")


# ---------------------------------------------------------------- tensors
STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,  # then the tensor says what the bytes are
}
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
TENSOR = "torch._utils._rebuild_tensor_v2"
TENSOR_WITH_DTYPE = "torch._utils._rebuild_tensor_v3"  # of dtypes without a class of storages
TENSORS = ("torch._utils._rebuild_", "torch._tensor._rebuild_", "torch.nn.parameter.Uninitialized")


def is_tensor(node: Any) -> bool:
    """Whether the note is of a call that makes a tensor, of whatever kind."""
    return isinstance(node, Inert) and node.args is not None and node.name.startswith(TENSORS)


class View(NamedTuple):
    """What a tensor is of its storage."""

    storage: Any  # ("storage", class, key, device, length)
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None  # None: as the storage

    def check(self) -> None:
        """Raises ValueError for what cannot be sizes, strides or an offset."""
        for numbers in (self.size, self.stride):
            if not isinstance(numbers, tuple) or len(numbers) > MOST_DIMENSIONS:
                raise ValueError(f"its shape must be a tuple of at most {MOST_DIMENSIONS} numbers")
        for number in (self.offset, *self.size, *self.stride):
            if type(number) is not int or not 0 <= number < 2**63:
                raise ValueError(
                    f"its shape, strides or place hold {show(number)}; they must be whole numbers "
                    "from 0 on"
                )
        if len(self.size) != len(self.stride):
            raise ValueError(f"it has {len(self.size)} dimensions, but {len(self.stride)} strides")

    def end(self) -> int:
        """How many elements of the storage there have to be."""
        if 0 in self.size:
            return 0
        last = self.offset
        for length, step in zip(self.size, self.stride, strict=True):
            last += (length - 1) * step
        return last + 1


def innermost_call(node: Inert) -> tuple[str, tuple]:
    """(name, args) of the call that makes the numbers: without what makes a parameter of them, or
    adds attributes.
    """
    name = node.name
    args = node.args or ()
    for _ in range(3):  # a parameter may be a tensor with attributes, and the other way round
        if not args or not isinstance(args[0], Inert):
            break
        if name in PARAMETERS:
            name = args[0].name
            args = args[0].args or ()
        elif name == WITH_ATTRIBUTES and len(args) >= 3 and isinstance(args[2], tuple):
            name = args[0].name
            args = args[2]
    return name, args


def view_of(node: Inert) -> View:
    """What a noted call would make. Raises ValueError for kinds of tensors that are not read."""
    name, args = innermost_call(node)
    dtype = None
    if name == TENSOR and len(args) >= 4:
        metadata = args[6:7]
    elif name == TENSOR_WITH_DTYPE and len(args) >= 7:
        dtype = dtype_of(args[6])
        metadata = args[7:8]
    else:
        raise ValueError(
            f"{show(name)} makes a tensor that is not supported; it must be an ordinary one: "
            "dense, with numbers, not quantized"
        )
    if metadata and as_dict(metadata[0]):
        raise ValueError("it is a conjugated or negated view; save resolve_conj().resolve_neg()")
    check_hooks(args[5:6])
    storage, offset, size, stride = args[:4]
    view = View(storage, offset, size, stride, dtype)
    view.check()
    return view


def check_hooks(hooks: tuple) -> None:
    """Raises ValueError unless a tensor has the empty dict of hooks that torch.save writes."""
    for value in hooks:
        is_made = isinstance(value, Inert) and value.args == ()
        if not is_made or value.name != "collections.OrderedDict" or value:
            raise ValueError("it has hooks, which are functions; save it without them")


def dtype_of(node: Any) -> torch.dtype:
    name = getattr(node, "name", "")
    if name not in DTYPES:
        raise ValueError(f"its dtype {show(name)} is not known")
    return DTYPES[name]


def storage_of(view: View) -> tuple[str, torch.dtype, int]:
    """(key, dtype, number of elements) of the storage of a view, as the pickle names it."""
    if not isinstance(view.storage, tuple) or len(view.storage) < 5:
        raise ValueError("its storage is not named as torch.save does")
    mark, storage_class, key, _, length = view.storage[:5]
    if mark != "storage" or not isinstance(key, str) or type(length) is not int:
        raise ValueError("its storage is not named as torch.save does")
    class_name = getattr(storage_class, "name", "")
    if class_name not in STORAGES:
        raise ValueError(f"numbers in {show(class_name)} are not supported")
    return key, STORAGES[class_name], length


class Place(NamedTuple):
    """Where a value of the tree stands: under a key of what stands in another place."""

    container: "Place | None"
    key: str
    depth: int

    def name(self) -> str:
        """The keys that lead to it, with dots. Raises ValueError for what cannot be a name."""
        keys = []
        place: Place | None = self
        while place is not None:
            keys.append(place.key)
            place = place.container
        length = sum(len(key) for key in keys)
        if length > MOST_CHARACTERS:
            raise ValueError(
                f"a tensor's name has {length} characters; it must have at most {MOST_CHARACTERS}"
            )
        name = ".".join(reversed(keys))
        if not name.isprintable():
            raise ValueError(f"a tensor's name is {show(name)}; it must be a printable text")
        return name


# ---------------------------------------------------------------- files
def is_archive(path: Path) -> bool:
    """Whether the file ends as a zip archive does, be it a damaged one."""
    with open(path, "rb") as file:  # raises OSError where it may not be read
        try:
            return zipfile.is_zipfile(file)
        except BROKEN:
            return True  # ZipFile then says what is wrong


class TorchFile:
    """A zip file of torch.save or torch.jit.save: its pickle as a `tree` of dicts and Inert notes,
    and its tensors on request. Raises ValueError, with the file's name, for what cannot be read.
    """

    def __init__(self, path: Path):
        if not is_archive(path):
            raise ValueError(
                f"{path} is no zip archive: broken, or from before PyTorch 1.6; then: python -c "
                f"\"import torch; torch.save(torch.load('{path}', weights_only=True), 'new.pt')\""
            )
        self.path = path
        self.most_bytes = MOST_GROWTH * path.stat().st_size + FREE_GROWTH
        self.storages: dict[str, bytearray] = {}
        self.handed_out: set[str] = set()  # keys of storages that are the numbers of a tensor
        self.bytes_of_tensors = 0
        try:
            self.zip = zipfile.ZipFile(path)
            self.check_members()
            self.folder = self.find_folder()
            self.check_byte_order()
            content = self.read_member("data.pkl", MOST_BYTES_OF_A_PICKLE)
            machine = Machine()
            self.tree = machine.run(content)
            self.calls = machine.calls
        except BROKEN as error:
            raise ValueError(f"{path} is not a readable PyTorch file: {words_of(error)}") from error

    def check_members(self) -> None:
        """Raises ValueError for a member that is there twice, or that is too large together."""
        total = 0
        names = set()
        for member in self.zip.infolist():
            if member.filename in names:
                raise ValueError(f"it has the member {show(member.filename)} twice")
            names.add(member.filename)
            total += member.file_size
        if total > self.most_bytes:
            raise ValueError(
                f"it would be {total / 2**20:.0f} MiB unpacked; for its size it must be at most "
                f"{self.most_bytes / 2**20:.0f} MiB"
            )

    def find_folder(self) -> str:
        """What the names of the members begin with; torch.load takes the shortest as well."""
        pickles = [name for name in self.zip.namelist() if name.split("/")[-1] == "data.pkl"]
        if not pickles:
            raise ValueError("it has no data.pkl, so it is a zip archive of something else")
        return min(pickles, key=len).removesuffix("data.pkl")

    def check_byte_order(self) -> None:
        name = "byteorder"
        if self.folder + name not in self.zip.namelist():
            return  # older files have none
        order = self.read_member(name, most_bytes=100).decode("ascii", "replace")
        if order != sys.byteorder:
            raise ValueError(
                f"its byteorder is {show(order)}, but this computer's is '{sys.byteorder}'"
            )

    def read_member(self, name: str, most_bytes: int) -> bytearray:
        """The content of a member, a chunk at a time: no more is held than it has."""
        try:
            member = self.zip.getinfo(self.folder + name)
        except KeyError:
            raise ValueError(f"its member {show(name)} is missing") from None
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"its member {show(name)} is compressed in a way that is not read")
        if member.file_size > most_bytes:
            raise ValueError(
                f"its member {show(name)} has {member.file_size} bytes; it must have at most "
                f"{most_bytes}"
            )
        content = bytearray(member.file_size)
        position = 0
        with self.zip.open(member) as stream:
            while position < len(content):
                chunk = stream.read(CHUNK)
                if not chunk:
                    raise ValueError(f"its member {show(name)} ends too early")
                content[position : position + len(chunk)] = chunk
                position += len(chunk)
        return content

    def check_tensors(self) -> None:
        """Raises ValueError for a tensor that does not lie in its storage, and for anything else
        than dicts of tensors and simple values, before any is read.

        torch.load lets a storage grow to whatever size a tensor claims, and allocates a bytearray
        of any size.
        """
        for node in self.calls:
            try:
                if is_tensor(node):
                    self.check_view(view_of(node))
                elif node.name != "collections.OrderedDict":
                    raise ValueError(f"it calls {show(node.name)}, which makes no tensor")
            except BROKEN as error:
                raise ValueError(
                    f"{self.path} is not a readable PyTorch file: {words_of(error)}"
                ) from error

    def check_view(self, view: View) -> None:
        key, stored_dtype, _ = storage_of(view)
        num_bytes = self.zip.getinfo(f"{self.folder}data/{key}").file_size
        dtype = view.dtype or stored_dtype
        if view.end() * dtype.itemsize > num_bytes:
            raise ValueError(
                f"shape {show(view.size)} is larger than its storage of {num_bytes} bytes"
            )

    def tensor(self, node: Inert) -> Tensor:
        """The tensor that a noted call would make."""
        view = view_of(node)
        key, flat = self.storage(view)
        if view.end() > flat.numel():
            raise ValueError(
                f"shape {view.size} with strides {view.stride} from {view.offset} on is larger "
                f"than its storage of {flat.numel()}"
            )
        count = math.prod(view.size)
        self.bytes_of_tensors += max(LEAST_BYTES_OF_A_TENSOR, count * flat.itemsize)
        if self.bytes_of_tensors > self.most_bytes:
            raise ValueError(
                f"with it the tensors take more than {self.most_bytes / 2**20:.0f} MiB, too much "
                "for the size of the file: they share their numbers, or repeat them"
            )
        tensor = flat.as_strided(view.size, view.stride, view.offset)
        # the first tensor that is all of a storage takes its memory; every other one is a copy
        is_whole = tensor.is_contiguous() and count == flat.numel()
        if is_whole and key not in self.handed_out:
            self.handed_out.add(key)
            return flat.view(view.size)
        return tensor.clone(memory_format=torch.contiguous_format)

    def storage(self, view: View) -> tuple[str, Tensor]:
        """(key, flat tensor) of the numbers that several tensors may share."""
        key, stored_dtype, length = storage_of(view)
        if key not in self.storages:
            self.storages[key] = self.read_member(f"data/{key}", self.most_bytes)
        content = self.storages[key]
        if len(content) != length * stored_dtype.itemsize:
            raise ValueError(
                f"its storage {show(key)} has {len(content)} bytes, but should have "
                f"{show(length)} numbers of {stored_dtype.itemsize}"
            )
        dtype = view.dtype or stored_dtype
        if len(content) % dtype.itemsize > 0:
            raise ValueError(f"the {len(content)} bytes of its storage are no numbers of {dtype}")
        if not content:  # frombuffer refuses it
            return key, torch.empty(0, dtype=dtype)
        return key, torch.frombuffer(content, dtype=torch.uint8).view(dtype)

    def tensors(self, tree: Any) -> State:
        """{dotted name: tensor} of nested dicts and TorchScript modules, each container once."""
        tensors: State = {}
        seen: set[int] = set()
        waiting: deque[tuple[Place | None, Any]] = deque([(None, tree)])
        while waiting:
            place, node = waiting.popleft()
            if is_tensor(node):
                self.add_tensor(tensors, place, node)
            elif id(node) not in seen and isinstance(node, dict):
                seen.add(id(node))
                waiting.extend(self.children(place, node))
        self.storages.clear()
        self.handed_out.clear()
        return tensors

    def add_tensor(self, tensors: State, place: Place | None, node: Inert) -> None:
        try:
            name = place.name() if place else ""
        except ValueError as error:
            raise ValueError(f"{self.path}: {words_of(error)}") from error
        try:
            tensors[name] = self.tensor(node)
        except BROKEN as error:
            raise ValueError(
                f"{self.path}: tensor {show(name)} cannot be read: {words_of(error)}"
            ) from error

    def children(self, place: Place | None, node: dict) -> list[tuple[Place | None, Any]]:
        """What a container holds, with its places. A module's state stands in its own place."""
        depth = place.depth + 1 if place else 1
        if depth > MOST_DEPTH:
            raise ValueError(f"{self.path}: more than {MOST_DEPTH} dicts are inside each other")
        children: list[tuple[Place | None, Any]] = []
        for key, child in node.items():
            if isinstance(child, dict):
                children.append((Place(place, key, depth), child))
        state = getattr(node, "state", None)
        if isinstance(state, dict):
            if "_parameters" in state and "_modules" in state:
                raise ValueError(
                    f"{self.path} holds a whole model, whose code would have to be executed; save "
                    "its weights: torch.save(model.state_dict(), 'new.pt')"
                )
            children.append((place, state))
        return children
