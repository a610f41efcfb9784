"""PyTorch's files (.bin, .pt, .ckpt), read without executing them.

A pickle is a program that may call anything. Here it runs with every function and class replaced by
`Inert`, which only notes what it was called with; the tensors are then made from these notes.
"""

import math
import pickle
import zipfile
import zlib
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


class Inert(dict):
    """What each global of a pickle and each of its instances become.

    It takes every call, state and item, and does nothing. `name` is that of the global.
    """

    name = ""
    args: tuple = ()
    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any):
        self.args = args

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        return Inert()

    append = extend = add = __call__


class InertUnpickler(pickle.Unpickler):
    """Reads a pickle into dicts, numbers, texts and Inert notes."""

    def find_class(self, module: str, name: str, /) -> type:
        return type("Inert", (Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid  # ("storage", class, key, device, length)


def as_dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
TENSOR = "torch._utils._rebuild_tensor_v2"
BROKEN = (  # what a damaged or hostile file raises
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    MemoryError,
    OverflowError,
)


class TorchFile:
    """A zip file of torch.save or torch.jit.save: its pickle as a `tree` of Inert notes, and its
    tensors on request. Raises ValueError, with the file's name, for whatever cannot be read.
    """

    def __init__(self, path: Path):
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} is no zip archive: broken, or from before PyTorch 1.6; then: python -c "
                f"\"import torch; torch.save(torch.load('{path}', weights_only=True), 'new.pt')\""
            )
        self.path = path
        self.storages: State = {}  # key -> flat tensor
        try:
            self.zip = zipfile.ZipFile(path)
            pickles = [name for name in self.zip.namelist() if name.split("/")[-1] == "data.pkl"]
            shortest = min(pickles, key=len)
            self.folder = shortest.removesuffix("data.pkl")
            self.tree = InertUnpickler(self.zip.open(shortest)).load()
        except BROKEN as error:
            raise ValueError(f"{path} is not a readable PyTorch file: {error!r}") from error

    def tensor(self, node: Any) -> Tensor | None:
        """The tensor that a noted call would make; None for anything else."""
        call = getattr(node, "name", "")
        if call in PARAMETERS:
            return self.tensor(node.args[0])
        if call != TENSOR:
            return None
        storage, offset, size, stride = node.args[:4]
        flat = self.storage(storage)
        if math.prod(size) > flat.numel():
            raise ValueError(f"shape {size} is larger than its storage")
        view = flat.as_strided(size, stride, offset)
        return view.clone(memory_format=torch.contiguous_format)

    def storage(self, storage: tuple) -> Tensor:
        """The numbers that several tensors may share, as a flat tensor."""
        _, storage_class, key, *_ = storage
        if key not in self.storages:
            dtype = STORAGES[storage_class.name.removeprefix("torch.")]
            content = bytearray(self.zip.read(f"{self.folder}data/{key}"))
            flat = torch.empty(0, dtype=torch.uint8)
            if content:  # frombuffer refuses an empty one
                flat = torch.frombuffer(content, dtype=torch.uint8)
            self.storages[key] = flat.view(dtype)
        return self.storages[key]

    def tensors(self, tree: Any) -> State:
        """{dotted name: tensor} of nested dicts and TorchScript modules, each container once."""
        tensors = {}
        seen = set()
        waiting: deque[tuple[str, Any]] = deque([("", tree)])
        while waiting:
            name, node = waiting.popleft()
            try:
                tensor = self.tensor(node)
            except BROKEN as error:
                raise ValueError(
                    f"{self.path}: tensor {name!r} cannot be read: {error!r}"
                ) from error
            if tensor is not None:
                tensors[name] = tensor
            elif id(node) not in seen:
                seen.add(id(node))
                children = {**as_dict(node), **as_dict(getattr(node, "state", None))}
                for key, child in children.items():
                    if isinstance(child, dict) and isinstance(key, str):
                        waiting.append((f"{name}.{key}" if name else key, child))
        return tensors
