"""Counting without running: FLOPs, bytes and kernels of a step, and the estimates that follow.

bench.py has the commands: `roofline`, `plan` and `managers`. Models and batches are on the meta
device, whose tensors have shapes and no memory. An estimate divides what is counted by what a GPU's
data sheet says, times assumed shares of it. Nothing here has been run on one of these GPUs.

B samples of a batch, N experts, L tokens, D width, S pixels a side of a picture or tile, T tiles of
an image.
"""

import bisect
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from chat import IGNORE, IMAGE_TOKEN
from llava_manager import LlavaManager, LlavaManagerConfig
from manager import AdaptiveManager, Manager, StaticManager
from model import HEADS, ManagerTower, ManagerTowerConfig, run
from multigrid import ImageTiles, count_image_tokens
from objectives import Pretraining, class_logits
from world import autocast

META = torch.device("meta")


# ---------------------------------------------------------------- FLOPs and memory of a call
def count_gflop(call: Callable[[], Any]) -> float:
    """GFLOP of a call.

    Attention is counted in its plain form: of the fused kernels the CPU's are not counted, and
    CUDA's with what they compute again.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def storages_in(tree: Any) -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors in nested lists, tuples and dicts, by their address in C++."""
    storages = {}
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            storages[storage._cdata] = storage
    return storages


class Footprint(TorchDispatchMode):
    """`peak`: the most bytes that tensors made under it held at a time, on any device, meta too."""

    now = 0
    peak = 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        before = storages_in((args, kwargs))
        for key, storage in storages_in(out).items():
            if key not in before:  # neither a view of an argument nor changed in place
                self.grow(storage.nbytes())
                weakref.finalize(storage, self.grow, -storage.nbytes())
        return out

    def grow(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def step(
    function: Callable[[], Any],
    module: nn.Module,
    training: bool,
    precision: str,
    device: torch.device,
) -> None:
    """Inference; or forward and backward of function(), a loss, for the weights of `module`.

    The optimizer is the same for all sides, and left out.
    """
    with torch.inference_mode(not training), autocast(precision, device):
        loss = function()
    if training:
        loss.backward()
        module.zero_grad()


# ---------------------------------------------------------------- steps without data or memory
MASKED_EVERY = 7  # of the tokens one in seven is masked, about the usual 15%
FIRST_MASKED = 1


def random_pairs(
    config: ManagerTowerConfig, batch_size: int, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """A pre-training batch without padding: every seventh token masked, every other pair false.

    input_ids, attention_mask, mlm_ids, mlm_labels (B, L); pixels, itm_pixels (B, 3, S, S);
    itm_labels (B,).
    """
    length = config.max_text_len
    ids = torch.randint(config.pad_token_id + 1, config.vocab_size, (batch_size, length))
    is_masked = torch.arange(length) % MASKED_EVERY == FIRST_MASKED
    pixels = torch.randn(batch_size, 3, config.image_size, config.image_size)
    numbers = torch.arange(batch_size)
    other_pixels = pixels[numbers | 1]  # an even row gets the picture of the row after it
    batch = {
        "pixels": pixels,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mlm_ids": ids,
        "mlm_labels": ids.where(is_masked, IGNORE),
        "itm_labels": numbers % 2,
        "itm_pixels": other_pixels,
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def tower_features(model: ManagerTower, batch: dict[str, Tensor]) -> Tensor:
    """The pooled features (B, 2D), which the heads of all tasks but MLM read."""
    mask = batch["attention_mask"]
    text_experts = model.encode_text(batch["input_ids"], mask)
    image_experts = model.encode_image(batch["pixels"])
    return model.fuse_pooled(text_experts, image_experts, mask)


def pretraining_loss(task: Pretraining, batch: dict[str, Tensor]) -> Any:
    return sum(task(batch).values())


class CountedPretraining(Pretraining):
    """Pre-training on the meta device, whose tensors have no values: `random_pairs` are known."""

    def places_where(self, condition: Tensor) -> Tensor:
        if condition.dim() == 1:  # the false pairs
            count = len(condition) // 2
        else:  # the masked tokens (B, L)
            count = len(condition) * len(range(FIRST_MASKED, condition.shape[1], MASKED_EVERY))
        return torch.arange(count, device=condition.device)


def training_gflop(config: ManagerTowerConfig, share_images: bool = False) -> float:
    """GFLOP of a training step for one sample, counted on the meta device."""
    samples = 2  # a true pair and a false one
    model, loss = towers_on_meta(config, samples, share_images)
    return count_gflop(partial(step, loss, model, True, "fp32", META)) / samples


def towers_on_meta(
    config: ManagerTowerConfig,
    samples: int,
    share_images: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[ManagerTower, Callable[[], Tensor]]:
    """A model on the meta device, and the loss of a batch.

    It is on MLM and ITM, or, in a model with the head of a classification, on that one.
    """
    with META:
        model = ManagerTower(config).to(dtype)
    batch = random_pairs(config, samples, META)
    batch["pixels"] = batch["pixels"].to(dtype)
    batch["itm_pixels"] = batch["itm_pixels"].to(dtype)
    if "mlm" in config.heads:
        task = CountedPretraining(model, ("mlm", "itm"), share_images)
        return model, partial(pretraining_loss, task, batch)
    if HEADS[config.heads[0]].pictures == 2:
        batch["pixels_1"] = batch["pixels"]
    return model, partial(sum_of_logits, model, batch)


def sum_of_logits(model: ManagerTower, batch: dict[str, Tensor]) -> Tensor:
    """A loss of a classification; what is between the logits and the true one is a few FLOPs."""
    return class_logits(model, model.config.heads[0], batch).sum()


PROMPT = 33  # ids, with the image's placeholder


class Prompt(NamedTuple):
    """The same prompt for each row of a batch."""

    ids: Tensor  # (B, L), with one placeholder a row
    images: list[ImageTiles]
    num_image_tokens: int  # of one image


def llava_prompt(
    config: LlavaManagerConfig, grid: int, batch_size: int, device: torch.device
) -> Prompt:
    """32 tokens around one image of a base tile and grid x grid tiles (0: the base tile alone)."""
    side = max(grid, 1) * config.image_size
    shape = (1 + grid**2, 3, config.image_size, config.image_size)
    image = ImageTiles(torch.randn(shape, device=device), (side, side))
    ids = torch.randint(3, config.vocab_size - 1, (batch_size, PROMPT))
    ids[:, PROMPT // 2] = IMAGE_TOKEN
    num_image_tokens = count_image_tokens(len(image.pixels), image.size, config)
    return Prompt(ids, [image] * batch_size, num_image_tokens)


# ---------------------------------------------------------------- GPUs
class Gpu(NamedTuple):
    """What the data sheets say."""

    tflops: float  # bf16, without sparsity
    bandwidth: float  # TB/s of its memory
    memory: float  # GB
    link: float  # GB/s that it sends to the GPUs of its node: half of NVLink's both ways
    network: float  # GB/s that it sends to other nodes


GPUS = {
    # NVIDIA's data sheet of A100 80GB SXM; DGX A100: 200 Gb/s a GPU
    "a100": Gpu(tflops=312, bandwidth=2.039, memory=80, link=300, network=25),
    # of H100 SXM (1,979 TFLOP/s are with sparsity); DGX H100: 400 Gb/s a GPU
    "h100": Gpu(tflops=989, bandwidth=3.35, memory=80, link=450, network=50),
    # of H200 SXM; DGX H200 as DGX H100
    "h200": Gpu(tflops=989, bandwidth=4.8, memory=141, link=450, network=50),
}


# ---------------------------------------------------------------- estimates: what is counted
MATMUL_SHARE = 0.65  # of the peak FLOP/s that matrix products and attention reach: an assumption
BANDWIDTH_SHARE = 0.85  # of the memory's bandwidth that other kernels reach: an assumption
LINK_SHARE = 0.8  # of the links' bandwidth: an assumption
LAUNCH_SECONDS = 5e-6  # of the CPU for each kernel, Python and autograd included: an assumption
MEMORY_SHARE = 0.95  # of the memory that tensors may fill: an assumption
ASSUMED = (
    f"an ESTIMATE, nothing was run on that GPU. Assumed: {MATMUL_SHARE:.0%} of its FLOP/s, "
    f"{BANDWIDTH_SHARE:.0%} of its memory's bandwidth,\n{LINK_SHARE:.0%} of its links', "
    f"{LAUNCH_SECONDS * 1e6:.0f} us of a CPU a kernel, a kernel for each operation"
)

IN_BF16 = {
    F.linear,
    F.conv2d,
    F.scaled_dot_product_attention,
    torch.addmm,
    Tensor.__matmul__,
}
IN_FP32 = {F.layer_norm, F.cross_entropy, torch.softmax}
IN_THE_WIDEST = {torch.addcmul, torch.cat, torch.stack}  # in fp32 if any of their tensors is


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as one kernel, as on CUDA: with a mask it is another one than without."""
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal)[0]
    shape = (*query.shape[:-1], key.shape[-2])
    bias = attn_mask.to(query.dtype).expand(shape)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, True, dropout_p, is_causal)[0]


def fused_dropout(
    x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def fused_rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    return torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0]


def has_fp32(args: Any) -> bool:
    dtypes = [leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    return torch.float32 in dtypes


FUSED: dict[Any, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: fused_attention,
    F.dropout: fused_dropout,
    F.rms_norm: fused_rms_norm,
}


class AsOnCuda(TorchFunctionMode):
    """What CUDA has and the meta device lacks: fused kernels, and bf16 autocast.

    autocast: False for a model that is in bf16 itself.
    """

    def __init__(self, autocast: bool):
        super().__init__()
        self.autocast = autocast
        self.copies: dict[int, Tensor] = {}  # of weights in bf16: one serves the whole forward pass

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if self.autocast:
            args = self.cast(func, args)
        kwargs = kwargs or {}
        out = FUSED.get(func, func)(*args, **kwargs)
        # manager.standardize is the layer norm without weights: it keeps autocast's own dtype
        is_standardize = func is F.layer_norm and kwargs.get("weight") is None
        if self.autocast and is_standardize:
            return out.bfloat16()
        return out

    def cast(self, func: Callable, args: tuple) -> tuple:
        """The arguments as autocast gives them to a function."""
        if func in IN_BF16:
            return tree_map(self.to_bf16, args)
        if func in IN_FP32 or (func in IN_THE_WIDEST and has_fp32(args)):
            return tree_map(self.to_fp32, args)
        return args

    def to_bf16(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        # only weights live long enough to be told by their address; and what a checkpoint computes
        # again, in the backward pass, makes copies of its own
        if not isinstance(x, nn.Parameter) or torch._C._current_autograd_node() is not None:
            return x.bfloat16()
        if id(x) not in self.copies:
            self.copies[id(x)] = x.bfloat16()
        return self.copies[id(x)]

    def to_fp32(self, x: Any) -> Any:
        if isinstance(x, Tensor) and x.dtype == torch.bfloat16:
            return x.float()
        return x


def moved_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested lists, tuples and dicts, each read or written once; so is what
    was expanded.
    """
    total = 0
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            total += min(leaf.nbytes, leaf.untyped_storage().nbytes())
    return total


class Operation(NamedTuple):
    """A kernel: one operation that is no view."""

    part: str  # of the model
    kind: str  # matmul, attention or memory
    flops: int
    nbytes: int  # of all it reads and writes

    def seconds(self, gpu: Gpu) -> float:
        """It takes as long as its FLOPs or its bytes, whichever take longer."""
        computing = self.flops / (gpu.tflops * 1e12 * MATMUL_SHARE)
        moving = self.nbytes / (gpu.bandwidth * 1e12 * BANDWIDTH_SHARE)
        return max(computing, moving)


# in-place operations that do not read what they change
OVERWRITING = ("normal_", "uniform_", "bernoulli_", "zero_", "fill_", "copy_")
NO_KERNELS = ("_unsafe_view", "detach")  # views that are not called so
BETWEEN = "between them"  # experts are stacked, projected, joined; embeddings; the losses


class Ledger(TorchDispatchMode):
    """`operations`: the kernels of what runs under it, forward and backward, by part of the model.

    An operation of the backward pass belongs to the part that its autograd node was made in: nodes
    are numbered in the order of the forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.part = BETWEEN
        self.entered = [(0, BETWEEN)]  # (number of the first node, the part from there on)

    def enter(self, part: str) -> str:
        """From now on a part of the model runs. Returns the one that ran before."""
        before = self.part
        self.part = part
        self.entered.append((torch.autograd._get_sequence_nr(), part))
        return before

    def find_part(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self.part
        # a node that stores a gradient has no number: the last part goes on
        if "AccumulateGrad" not in node.name():
            number = node._sequence_nr()
            place = bisect.bisect_right(self.entered, number, key=lambda entry: entry[0])
            self.part = self.entered[place - 1][1]
        return self.part

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        name = packet.__name__
        if func.is_view or name in NO_KERNELS or "empty" in name:
            return out
        flops = 0
        kind = "memory"
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            kind = "attention" if "attention" in name else "matmul"
        read = args[1:] if name in OVERWRITING else args
        nbytes = moved_bytes((read, kwargs, out))
        self.operations.append(Operation(self.find_part(), kind, flops, nbytes))
        return out


def watch_parts(model: nn.Module, parts: dict[str, str], ledger: Ledger) -> None:
    """Hooks that tell the ledger which part runs. parts: a child of the model -> its part."""
    for name, module in model.named_modules():
        part = parts.get(name.partition(".")[0])
        if part is not None:
            stack: list[str] = []

            def before(*_: Any, part: str = part, stack: list[str] = stack) -> None:
                stack.append(ledger.enter(part))

            def after(*_: Any, stack: list[str] = stack) -> None:
                ledger.enter(stack.pop())

            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)


def backward(loss: Tensor) -> None:
    """loss.backward() under the modes: there AsOnCuda would not act, which checkpoints need."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,),
        (torch.ones_like(loss),),
        False,  # keep the graph
        False,  # make a graph of the backward pass
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def count_step(
    loss: Callable[[], Any], train: bool = True, autocast: bool = True, ledger: Ledger | None = None
) -> tuple[Ledger, int]:
    """Forward and backward of loss() on the meta device: the kernels, and the most bytes that
    tensors held on top of the weights.
    """
    ledger = ledger or Ledger()
    cuda = AsOnCuda(autocast)
    with torch.set_grad_enabled(train), cuda, ledger, Footprint() as footprint:
        value = loss()
        cuda.copies.clear()
        if train:
            backward(value)
    return ledger, footprint.peak


# ---------------------------------------------------------------- the roofline of the two towers
PARTS = {
    "text_encoder": "encoders",
    "image_encoder": "encoders",
    "text_transform": BETWEEN,
    "image_transform": BETWEEN,
    "text_managers": "managers",
    "image_managers": "managers",
    "text_layers": "cross-modal layers",
    "image_layers": "cross-modal layers",
    "text_pooler": "heads",
    "image_pooler": "heads",
    "heads": "heads",
}
FUSED_MANAGERS = "managers, if fused"
OPTIMIZER_BYTES = 28  # AdamW reads weight, gradient and two moments in fp32, and writes three back


class RooflineRow(NamedTuple):
    """A part of a step. Milliseconds of the GPU but for `launch_ms`, which are the CPU's."""

    name: str
    matmul_ms: float
    attention_ms: float
    memory_ms: float
    sum_ms: float
    gigabytes: float
    gflop: float
    launches: int
    launch_ms: float


ROOFLINE_TITLES = (
    "matmul, ms",
    "attention",
    "memory",
    "sum",
    "GB",
    "GFLOP",
    "launches",
    "their ms",
)
ROOFLINE_HEAD = "{:>30s}{:>11s}{:>9s}{:>9s}{:>9s}{:>10s}{:>10s}{:>11s}"
ROOFLINE_ROW = (
    "{name:22s}{matmul_ms:8.2f}{attention_ms:11.2f}{memory_ms:9.2f}{sum_ms:9.2f}{gigabytes:9.2f}"
    "{gflop:10.0f}{launches:10d}{launch_ms:11.2f}"
)


def roofline_row(name: str, operations: list[Operation], gpu: Gpu) -> RooflineRow:
    """The row of some operations."""
    times = {"matmul": 0.0, "attention": 0.0, "memory": 0.0}
    for operation in operations:
        times[operation.kind] += 1000 * operation.seconds(gpu)
    return RooflineRow(
        name=name,
        matmul_ms=times["matmul"],
        attention_ms=times["attention"],
        memory_ms=times["memory"],
        sum_ms=sum(times.values()),
        gigabytes=sum(operation.nbytes for operation in operations) / 1e9,
        gflop=sum(operation.flops for operation in operations) / 1e9,
        launches=len(operations),
        launch_ms=1000 * LAUNCH_SECONDS * len(operations),
    )


def watch_managers(model: nn.Module, train: bool) -> list[Operation]:
    """What fused managers would move instead of all their operations that are no products: a list
    that fills while the model runs.

    Forward each input is read and the output written once. Backward the inputs and the output's
    gradient are read; the inputs' gradients are written, and added to those of their other readers.
    """
    fused: list[Operation] = []

    def note(manager: Any, inputs: Any, output: Tensor) -> None:
        read = moved_bytes(inputs)
        written = moved_bytes(output)
        fused.append(Operation(FUSED_MANAGERS, "memory", 0, read + written))
        if train:
            fused.append(Operation(FUSED_MANAGERS, "memory", 0, 2 * read + written + 3 * read))

    for module in model.modules():
        if isinstance(module, Manager):
            module.register_forward_hook(note)
    return fused


class PartsOfAStep(NamedTuple):
    """The kernels of a step."""

    by_part: dict[str, list[Operation]]
    fused: list[Operation]  # instead of those of the managers that are no products
    gflop: float  # with nothing computed twice: what an MFU is about

    def products(self) -> list[Operation]:
        """The managers' matrix products and attention, which are not fused."""
        return [operation for operation in self.by_part["managers"] if operation.kind != "memory"]


def count_parts(architecture: ManagerTowerConfig, samples: int, train: bool) -> PartsOfAStep:
    """The kernels of a step of the two-tower model, by part, but for AdamW's."""
    model, loss = towers_on_meta(architecture, samples)
    if not train:
        batch = random_pairs(architecture, samples, META)
        loss = partial(tower_features, model.eval(), batch)
    gflop = count_gflop(partial(step, loss, model, train, "fp32", META))

    ledger = Ledger()
    watch_parts(model, PARTS, ledger)
    fused = watch_managers(model, train)
    count_step(loss, train, ledger=ledger)
    by_part: dict[str, list[Operation]] = {part: [] for part in PARTS.values()}
    for operation in ledger.operations:
        by_part[operation.part].append(operation)
    by_part["AdamW"] = []
    if train:
        nbytes = OPTIMIZER_BYTES * sum(parameter.numel() for parameter in model.parameters())
        by_part["AdamW"].append(Operation("AdamW", "memory", 0, nbytes))
    return PartsOfAStep(by_part, fused, gflop)


def roofline_rows(parts: PartsOfAStep, gpu: Gpu) -> list[RooflineRow]:
    """A row for each part, for fused managers, and for the step without and with these."""
    rows = []
    eager: list[Operation] = []
    others: list[Operation] = []
    for part, operations in parts.by_part.items():
        rows.append(roofline_row(part, operations, gpu))
        eager += operations
        if part != "managers":
            others += operations
    managers = parts.products() + parts.fused
    rows.append(roofline_row(FUSED_MANAGERS, managers, gpu))
    rows.append(roofline_row("a step, eager", eager, gpu))
    rows.append(roofline_row("a step, managers fused", others + managers, gpu))
    return rows


def estimate_roofline(size: str, samples: int, gpu_name: str, train: bool) -> list[dict]:
    """Where the time of a step of the two-tower model goes: a table, and its rows."""
    gpu = GPUS[gpu_name]
    parts = count_parts(getattr(ManagerTowerConfig, size)(), samples, train)
    rows = roofline_rows(parts, gpu)

    kind = "a training step" if train else "inference"
    print(f"ManagerTower {size}, {kind} of {samples} samples in bf16 on {gpu_name}:")
    print(ASSUMED)
    print(ROOFLINE_HEAD.format(*ROOFLINE_TITLES))
    for row in rows:
        print(ROOFLINE_ROW.format(**row._asdict()))

    results = [row._asdict() for row in rows]
    # the CPU launches while the GPU computes
    for result in results[-2:]:
        result["step_ms"] = max(result["sum_ms"], result["launch_ms"])
        result["gflop_a_sample"] = parts.gflop / samples
        result["mfu"] = parts.gflop / result["step_ms"] / gpu.tflops
        print(
            f"{result['name']}: {result['step_ms']:.1f} ms, the longer of GPU and launches; "
            f"{result['gflop_a_sample']:.1f} GFLOP a sample; MFU {result['mfu']:.1%}"
        )
    return results


# ---------------------------------------------------------------- what the managers are compiled to
class ManagersRow(NamedTuple):
    """Forward and backward of managers."""

    name: str
    kernels: int  # but for matrix products and attention
    products: int  # kernels of matrix products and attention
    gigabytes: float  # that `kernels` read and write
    passes: float  # the same, in units of the experts that are read once


MANAGERS_ROW = (
    "{name:38s}{kernels:6d} kernels and {products:4d} products, {gigabytes:10.6f} GB = "
    "{passes:7.1f} times the experts"
)
SMALL_EXPERTS = (2, 6, 24, 64)  # B, N, L, D: inductor's kernels do not depend on it


def managers_row(name: str, operations: list[Operation], expert_bytes: float) -> ManagersRow:
    others = [operation for operation in operations if operation.kind == "memory"]
    nbytes = sum(operation.nbytes for operation in others)
    num_products = len(operations) - len(others)
    passes = nbytes / expert_bytes
    return ManagersRow(name, len(others), num_products, nbytes / 1e9, passes)


def small_manager(kind: type[Manager], device: torch.device) -> Callable[[], Tensor]:
    """A manager with what it reads, which wants gradients: a call makes the sum of its output."""
    batch, num_experts, length, width = SMALL_EXPERTS
    manager: Any = AdaptiveManager(width, num_experts)
    if kind is StaticManager:
        manager = StaticManager(width, num_experts, num_previous=1)
    manager.to(device)
    experts = torch.randn(SMALL_EXPERTS, device=device, requires_grad=True)
    previous = torch.randn(batch, length, width, device=device, requires_grad=True)
    query = torch.randn(batch, length, width, device=device, requires_grad=True)
    if device != META:
        manager.compile()
    return lambda: manager(experts, previous, query).sum()


def inductor_kernels(call: Callable[[], Tensor]) -> list[list[Operation]]:
    """What inductor makes of a compiled call on the CPU: its kernels, forward and backward."""
    from torch._inductor import config as inductor

    graphs = []

    def note(nodes: list) -> list:
        graph = []
        for node in nodes:
            nbytes = node.get_read_write_buffers_sizes()
            if nbytes:  # some are names of tensors alone
                kernel = getattr(node.node, "python_kernel_name", None) or ""
                is_product = "mm" in kernel or "attention" in kernel
                graph.append(Operation("", "matmul" if is_product else "memory", 0, nbytes))
        graphs.append(graph)
        return nodes

    with inductor.patch(_post_fusion_custom_pass=note, force_disable_caches=True):
        call().backward()
    return graphs


def count_experts(architecture: ManagerTowerConfig, samples: int) -> int:
    """Elements of the experts of both modalities: two rows a sample, of MLM and of ITM."""
    patches = (architecture.image_size // architecture.patch_size) ** 2
    tokens = architecture.num_experts("text") * architecture.max_text_len
    tokens += architecture.num_experts("image") * (1 + patches)
    return 2 * samples * tokens * architecture.hidden_size


def compiled_rows(kind: type[Manager]) -> list[ManagersRow]:
    """A small manager: eager, and what inductor makes of it."""
    expert_bytes = 4.0 * math.prod(SMALL_EXPERTS)
    ledger, _ = count_step(small_manager(kind, META), autocast=False)
    rows = [managers_row(f"{kind.__name__}, eager", ledger.operations, expert_bytes)]
    graphs = inductor_kernels(small_manager(kind, torch.device("cpu")))
    for way, graph in zip(("forward", "backward"), graphs, strict=True):
        rows.append(managers_row(f"{kind.__name__}, compiled, {way}", graph, expert_bytes))
    return rows


def estimate_managers(size: str, samples: int) -> list[dict]:
    """What the managers of a training step move, and what torch.compile makes of two of them."""
    architecture: ManagerTowerConfig = getattr(ManagerTowerConfig, size)()
    parts = count_parts(architecture, samples, train=True)
    expert_bytes = 2.0 * count_experts(architecture, samples)  # bf16
    fused = parts.products() + parts.fused
    rows = [
        managers_row("all, eager", parts.by_part["managers"], expert_bytes),
        managers_row("all, if each were one kernel each way", fused, expert_bytes),
    ]
    print(f"the managers of ManagerTower {size}, a training step of {samples} samples in bf16,")
    print(f"counted; and one with experts {SMALL_EXPERTS} in fp32, compiled for this CPU")
    rows += compiled_rows(StaticManager)
    rows += compiled_rows(AdaptiveManager)
    for row in rows:
        print(MANAGERS_ROW.format(**row._asdict()))
    return [row._asdict() for row in rows]


# ---------------------------------------------------------------- a plan for several GPUs
PLANNED = ("0.5b", "7b", "72b", "base", "large")
GPUS_OF_A_NODE = 8
PLAN_GRID = 3  # an image of the plan has a base tile and 3 x 3 tiles: as many tokens as one may
# the LLMs, as the published config.json of Qwen2-7B and Qwen2-72B say; a manager in every 4 layers
QWEN2: dict[str, dict[str, Any]] = {
    "0.5b": {},
    "7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "num_layers": 28,
        "num_heads": 28,
        "num_kv_heads": 4,
        "mlp_width": 18944,
        "tie_embeddings": False,
        "inject_layers": tuple(range(0, 28, 4)),
    },
    "72b": {
        "vocab_size": 152064,
        "hidden_size": 8192,
        "num_layers": 80,
        "num_heads": 64,
        "num_kv_heads": 8,
        "mlp_width": 29568,
        "tie_embeddings": False,
        "inject_layers": tuple(range(0, 80, 4)),
    },
}


class CountedLlava(LlavaManager):
    """On the meta device nobody knows where the labels are: here they are the first tokens."""

    def loss_sum(self, hidden: Tensor, labels: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
        hidden = hidden[:, : PROMPT - 1].flatten(0, 1)
        labels = labels[:, : PROMPT - 1].flatten()
        total = run(self.cross_entropy_sum, True, hidden, labels)
        return total, hidden.new_ones(())


def llava_on_meta(
    config: LlavaManagerConfig, samples: int
) -> tuple[LlavaManager, Callable[[], Tensor]]:
    """A model on the meta device, and the loss of a batch with an image a sample."""
    with META:
        model = CountedLlava(config)
    prompt = llava_prompt(config, PLAN_GRID, samples, META)
    labels = prompt.ids.where(prompt.ids != IMAGE_TOKEN, IGNORE)

    def loss() -> Any:
        return model(prompt.ids, images=prompt.images, labels=labels, logits=False).loss

    return model, loss


class Counts(NamedTuple):
    """What is counted of a model and its training step on one GPU."""

    parameters: int
    block: int  # parameters of the largest block, which are gathered at a time
    outside: int  # parameters outside of all blocks
    activations: int  # bytes: what a step takes on top of weights and gradients
    seconds: float  # of a step without AdamW: of its kernels, or of launching them


class PlanRow(NamedTuple):
    """What each GPU holds, in GB, sends, and takes."""

    gpus: int
    how: str  # alone, DDP, or sharded: fp32 in shards, gathered in bf16 block by block
    checkpointing: bool
    weights: float
    gradients: float
    moments: float
    buffers: float  # of DDP: gradients to be sent; of shards: what is gathered
    activations: float
    memory: float  # the sum
    fits: bool
    sent: float  # GB a step
    seconds: float  # of a step
    rate: float  # samples a second, of all GPUs


PLAN_HEAD = "{:>4s} {:9s}{:14s}{:>8s}{:>10s}{:>9s}{:>10s}{:>13s}{:>9s} {:5s}{:>9s}{:>8s}{:>11s}"
PLAN_ROW = (
    "{gpus:4d} {how:9s}{checkpoints:14s}{weights:8.1f}{gradients:10.1f}{moments:9.1f}"
    "{buffers:10.1f}{activations:13.1f}{memory:9.1f} {verdict:5s}{sent:9.2f}{seconds:8.3f}"
    "{rate:11.1f}"
)


def count_plan(name: str, samples: int, sharded: bool, checkpointing: bool, gpu: Gpu) -> Counts:
    """Counts of a model of PLANNED: under autocast, or with the weights of a shard in bf16."""
    model: Any
    dtype = torch.bfloat16 if sharded else torch.float32
    if name in QWEN2:
        model, loss = llava_on_meta(LlavaManagerConfig.base(**QWEN2[name]), samples)
        model.to(dtype)
    else:
        config = getattr(ManagerTowerConfig, name)()
        model, loss = towers_on_meta(config, samples, dtype=dtype)
    model.set_checkpointing(checkpointing)
    # gradients that are there already count for themselves
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ledger, peak = count_step(loss, autocast=not sharded)

    blocks = []
    for module in model.modules():
        if isinstance(module, model.blocks_to_compile):
            blocks.append(sum(parameter.numel() for parameter in module.parameters()))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    computing = sum(operation.seconds(gpu) for operation in ledger.operations)
    return Counts(
        parameters=parameters,
        block=max(blocks),
        outside=parameters - sum(blocks),
        activations=peak,
        seconds=max(computing, LAUNCH_SECONDS * len(ledger.operations)),
    )


def sent_bytes(counts: Counts, gpus: int, sharded: bool) -> float:
    """What each GPU sends in a step: around a ring, all but its own part."""
    share = (gpus - 1) / gpus
    if not sharded:  # the sum of fp32 gradients: scattered, and gathered
        return 2 * share * 4 * counts.parameters
    # bf16 blocks are gathered forward and backward, what is outside of them once; fp32 gradients
    gathered = 2 * (counts.parameters - counts.outside) + counts.outside
    return share * (2 * gathered + 4 * counts.parameters)


def plan_row(
    counts: Counts, gpus: int, sharded: bool, checkpointing: bool, samples: int, gpu: Gpu
) -> PlanRow:
    """Memory and time of one GPU of several. Messages are sent while it computes."""
    own = counts.parameters  # parameters that this GPU keeps
    how = "alone"
    buffers = 0.0
    if sharded:
        own = -(-counts.parameters // gpus)
        how = "sharded"
        # in bf16: outside of the blocks weights and gradients; of the blocks the weights of two,
        # as one is gathered ahead, and the gradients of one
        buffers = 2.0 * (2 * counts.outside + 3 * counts.block)
    elif gpus > 1:
        how = "DDP"
        buffers = 4.0 * counts.parameters
    memory = 16 * own + buffers + counts.activations
    sent = sent_bytes(counts, gpus, sharded)
    speed = gpu.link if gpus <= GPUS_OF_A_NODE else gpu.network
    sending = sent / (speed * 1e9 * LINK_SHARE)
    optimizing = OPTIMIZER_BYTES * own / (gpu.bandwidth * 1e12 * BANDWIDTH_SHARE)
    seconds = max(counts.seconds, sending) + optimizing
    return PlanRow(
        gpus=gpus,
        how=how,
        checkpointing=checkpointing,
        weights=4 * own / 1e9,
        gradients=4 * own / 1e9,
        moments=8 * own / 1e9,
        buffers=buffers / 1e9,
        activations=counts.activations / 1e9,
        memory=memory / 1e9,
        fits=memory <= MEMORY_SHARE * gpu.memory * 1e9,
        sent=sent / 1e9,
        seconds=seconds,
        rate=gpus * samples / seconds,
    )


def estimate_plan(name: str, samples: int, numbers: Sequence[int], gpu_name: str) -> list[dict]:
    """Memory and time of training on several GPUs: a table, and its rows."""
    gpu = GPUS[gpu_name]
    rows = []
    for sharded in (False, True):
        for checkpointing in (False, True):
            counts = count_plan(name, samples, sharded, checkpointing, gpu)
            for gpus in numbers:
                if sharded and gpus == 1:
                    continue
                row = plan_row(counts, gpus, sharded, checkpointing, samples, gpu)
                rows.append(row)
    print(f"{name}, {counts.parameters} parameters, {samples} samples a GPU, on {gpu_name}:")
    print(f"{ASSUMED}; {MEMORY_SHARE:.0%} of its memory for tensors")
    print("GB a GPU; sharded: fp32 in shards, gathered in bf16 block by block (--shard)")
    titles = ("GPUs", "how", "checkpointing", "weights", "gradients", "moments", "buffers")
    print(PLAN_HEAD.format(*titles, "activations", "sum", "fits", "GB sent", "s", "samples/s"))
    for row in sorted(rows, key=lambda row: row.gpus):
        values = row._asdict()
        values["checkpoints"] = "yes" if row.checkpointing else "no"
        values["verdict"] = "yes" if row.fits else "no"
        print(PLAN_ROW.format(**values))
    return [row._asdict() for row in rows]
