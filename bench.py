"""Speed and memory beside peers: transformers' models of the same sizes, and the plain way to
re-rank.

    python bench.py [towers]      ManagerTower and BridgeTower: inference, and training on MLM + ITM
    python bench.py retrieval     re-ranking in batches, and by one pass for each image
    python bench.py llava         LLaVA-OV-Manager and LLaVA-OneVision: training, prefill, decoding
    python bench.py data          pictures a second that one CPU core makes ready for training
    python bench.py roofline      an estimate: where the time of a step goes on a GPU
    python bench.py plan          an estimate: memory and time of training on 1, 8 and 64 GPUs
    python bench.py managers      what the managers move, and what torch.compile makes of them

A round runs every case once, and a matrix product of the same precision: whatever else the machine
does hits all alike. Printed are medians over the rounds. "of matmul" is the FLOP/s over those of
the product in the same round (on CUDA: the MFU); FLOPs are counted by torch, with attention as
plain matrix products. "ratio" is the speed over that of the peer; for share_images and for
managers, over that without. "GiB" is what the allocator (CUDA), or the tensors of the call
(elsewhere), hold at most, with the weights. Weights are random. The peers need
requirements-dev.txt.

The estimates run nothing on a GPU: FLOPs, bytes and kernels are counted on the meta device, whose
tensors have no memory, and divided by assumed shares of what a data sheet says.

The papers count 101.25 GFLOP for BridgeTower and 105.52 for ManagerTower (one VQA sample of 384 px
and 50 tokens), and 39.43 and 43.20 ms on a TITAN V; of the MLLM, 4% more time with managers.

B samples of a batch, L tokens, S pixels a side of a picture or tile, T tiles of an image; I
pictures, M captions.
"""

import dataclasses
import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from chat import IGNORE, IMAGE_TOKEN
from eval import check_output, retrieval_scores
from fields import FieldError, FlagError, check_fields, option, parse_flags
from files import save_json
from finetune import FinetuneConfig
from images import image_transform, load_image, normalize
from llava_manager import OFFICIAL_FIELDS, VISION_FIELDS, LlavaManager, LlavaManagerConfig
from loop import RunConfig, wrap
from model import HEADS, ManagerTower, ManagerTowerConfig
from multigrid import ImageTiles, preprocess_image
from objectives import Pretraining
from roofline import (
    GPUS,
    PLANNED,
    PROMPT,
    Footprint,
    Prompt,
    count_gflop,
    estimate_managers,
    estimate_plan,
    estimate_roofline,
    llava_prompt,
    pretraining_loss,
    random_pairs,
    step,
    tower_features,
    training_gflop,
)
from tasks import TASKS
from world import World, evaluating, one_sentence, resolve_precision

PEER = "transformers"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---------------------------------------------------------------- the flags
@dataclass
class BenchConfig:
    """What every comparison has."""

    model: str = option("base", "preset of the architecture", choices=("tiny", "base", "large"))
    batch_size: int = option(4, "samples of a batch; an even number", least=2)
    rounds: int = option(5, "times that everything is measured; the median counts", least=1)
    precision: str = option(
        "auto", "auto = bf16 on CUDA, fp32 elsewhere", choices=("auto", *DTYPES)
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    compile: bool = option(False, "compile the layers of both sides with torch.compile")
    json: str = option("", "file to write the numbers to")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batch_size % 2:
            raise FieldError(f"batch_size is {self.batch_size}; it must be an even number")


@dataclass
class RetrievalConfig(BenchConfig):
    """`retrieval`, where both sides are this project's code."""

    model: str = option("tiny", "preset of the architecture", choices=("tiny", "base", "large"))
    batch_size: int = option(32, "samples of a batch; an even number", least=2)
    precision: str = option("auto", choices=("auto", *DTYPES), flag=False)
    compile: bool = option(False, flag=False)


@dataclass
class LlavaConfig(BenchConfig):
    """`llava`, which has two sizes."""

    model: str = option("tiny", "preset of the architecture", choices=("tiny", "base"))
    compile: bool = option(False, flag=False)


@dataclass
class DataConfig(BenchConfig):
    """`data`, which runs on one core of the CPU and has no batches."""

    pictures: int = option(16, "pictures of a round", least=1, most=10_000)
    model: str = option("base", flag=False)
    batch_size: int = option(2, flag=False)
    precision: str = option("fp32", flag=False)
    device: str = option("cpu", flag=False)
    compile: bool = option(False, flag=False)


@dataclass
class EstimateConfig(BenchConfig):
    """What the estimates have, which run on no GPU."""

    gpu: str = option("h100", "the GPU to estimate for", choices=tuple(GPUS))
    rounds: int = option(1, flag=False)
    precision: str = option("bf16", flag=False)
    device: str = option("cpu", flag=False)
    compile: bool = option(False, flag=False)


@dataclass
class RooflineConfig(EstimateConfig):
    """`roofline`, of the two-tower model."""

    batch_size: int = option(32, "samples of a batch; an even number", least=2, most=4096)
    train: bool = option(True, "a training step on MLM and ITM; false: inference")


@dataclass
class PlanConfig(EstimateConfig):
    """`plan`, of both models."""

    model: str = option(
        "0.5b", "LLaVA-OV-Manager by its LLM, or a two-tower model", choices=PLANNED
    )
    batch_size: int = option(2, "samples of a GPU's step; an even number", least=2, most=4096)
    gpus: tuple[int, ...] = option((1, 8, 64), "numbers of GPUs", least=1, most=100_000)


@dataclass
class ManagersConfig(EstimateConfig):
    """`managers`, of the two-tower model."""

    batch_size: int = option(32, "samples of a batch; an even number", least=2, most=4096)
    gpu: str = option("h100", flag=False)


# ---------------------------------------------------------------- FLOPs and memory of a call
def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """What a call takes on top of what is there, by CUDA's allocator; of tensors elsewhere."""
    if device.type != "cuda":
        with Footprint() as footprint:
            call()
        return footprint.peak
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, until the device is done with it."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---------------------------------------------------------------- measuring
class Case(NamedTuple):
    """One call that is measured."""

    name: str
    call: Callable[[], Any]
    amount: int  # samples or tokens of one call
    gflop: float  # of one call
    module: nn.Module  # its weights count as memory
    peer: str | None = None  # the case that the ratio is to
    minus: str | None = None  # the case whose time is not to count


class CaseResult(NamedTuple):
    """A row of the table."""

    name: str
    seconds: float
    rate: float  # samples or tokens a second
    gflop: float  # of one sample or token
    gflop_per_second: float
    of_matmul: float  # the same, in units of the device's matrix product
    gib: float
    ratio: float  # the peer's time by this one
    matmul_gflop_per_second: float


class MatrixProduct(NamedTuple):
    """What the device can do at best."""

    call: Callable[[], Any]
    gflop: float  # of one call


Round = dict[str, float]  # name of a case -> its seconds in one round
MATMUL = ""  # the name of the matrix product in a round


def matrix_product(dtype: torch.dtype, device: torch.device) -> MatrixProduct:
    """Products of two square matrices that are large enough for the device's best."""
    size = 8192 if device.type == "cuda" else 2048
    times = 20 if device.type == "cuda" else 4
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)

    def call() -> list[Tensor]:
        return [left @ right for _ in range(times)]

    return MatrixProduct(call, 2e-9 * size**3 * times)


def net_seconds(measured: Round, cases: list[Case]) -> Round:
    """The times of one round, each less what is not to count (of decoding: the prefill)."""
    net = dict(measured)
    for case in cases:
        if case.minus is not None:
            net[case.name] = measured[case.name] - measured[case.minus]
    return net


def median_ratio(rounds: list[Round], numerator: str, denominator: str) -> float:
    """The median over rounds of the ratio of two times."""
    return statistics.median(round_[numerator] / round_[denominator] for round_ in rounds)


def case_result(case: Case, rounds: list[Round], peak: int, matmul_gflop: float) -> CaseResult:
    """The row of a case. peak: the bytes of its call; matmul_gflop: of one call of the product."""
    seconds = statistics.median(round_[case.name] for round_ in rounds)
    matmul_seconds = statistics.median(round_[MATMUL] for round_ in rounds)
    matmuls = median_ratio(rounds, MATMUL, case.name)  # that take as long as one call
    of_matmul = case.gflop / matmul_gflop * matmuls
    weights = sum(parameter.nbytes for parameter in case.module.parameters())
    gib = (peak + weights) / 2**30
    gflop_per_second = case.gflop / seconds
    matmul_speed = matmul_gflop / matmul_seconds
    ratio = median_ratio(rounds, case.peer or case.name, case.name)
    return CaseResult(
        name=case.name,
        seconds=seconds,
        rate=case.amount / seconds,
        gflop=case.gflop / case.amount,
        gflop_per_second=gflop_per_second,
        of_matmul=of_matmul,
        gib=gib,
        ratio=ratio,
        matmul_gflop_per_second=matmul_speed,
    )


TABLE_HEAD = "{:>46s}{:>11s}{:>10s}{:>10s}{:>10s}{:>8s}   ratio"
TABLE_ROW = (
    "{name:38s}{seconds:8.3f}{rate:11.2f}{gflop:10.3f}{gflop_per_second:10.1f}{of_matmul:10.3f}"
    "{gib:8.2f}{ratio:8.2f}"
)


def print_table(results: list[CaseResult], unit: str) -> None:
    """unit: samples or tokens."""
    print()
    print(TABLE_HEAD.format("seconds", f"{unit}/s", "GFLOP", "GFLOP/s", "of matmul", "GiB"))
    for result in results:
        print(TABLE_ROW.format(**result._asdict()))
    speed = results[0].matmul_gflop_per_second
    print(
        f"GFLOP of one of the {unit}, GiB with the weights. The matrix product: {speed:.1f} GFLOP/s"
    )


def measure(
    cases: list[Case], unit: str, config: BenchConfig, device: torch.device
) -> list[CaseResult]:
    """Run the cases in turns, and print a line for each."""
    product = matrix_product(DTYPES[config.precision], device)
    calls = {MATMUL: product.call}
    for case in cases:
        calls[case.name] = case.call

    # the memory first, for this warms up
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}

    rounds = []
    for _ in range(config.rounds):
        measured = {name: seconds_of(call, device) for name, call in calls.items()}
        rounds.append(net_seconds(measured, cases))

    results = []
    for case in cases:
        results.append(case_result(case, rounds, peaks[case.name], product.gflop))
    print_table(results, unit)
    return results


# ---------------------------------------------------------------- two towers
def bridge_tower(config: ManagerTowerConfig) -> nn.ModuleDict:
    """transformers' two models for pre-training ("mlm" and "itm"), on one common body."""
    import transformers

    text: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "intermediate_size": config.text_mlp_width,
    }
    text["max_position_embeddings"] = config.max_positions
    text["hidden_dropout_prob"] = config.dropout
    text["attention_probs_dropout_prob"] = config.dropout
    vision = {
        "hidden_size": config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
    }
    theirs = transformers.BridgeTowerConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        text_config=text,
        num_hidden_layers=config.num_layers,
        vision_config=vision,
    )
    mlm: Any = transformers.BridgeTowerForMaskedLM(theirs)
    itm: Any = transformers.BridgeTowerForImageAndTextRetrieval(theirs)
    itm.bridgetower = mlm.bridgetower
    return nn.ModuleDict({"mlm": mlm, "itm": itm})


def bridge_tower_loss(models: nn.ModuleDict, batch: dict[str, Tensor]) -> Tensor:
    """MLM + ITM as transformers offers them: with logits of all tokens, ours of the masked ones."""
    mask = batch["attention_mask"]
    mlm = models["mlm"](
        batch["mlm_ids"], mask, pixel_values=batch["pixels"], labels=batch["mlm_labels"]
    )
    itm = models["itm"](
        batch["input_ids"], mask, pixel_values=batch["itm_pixels"], labels=batch["itm_labels"]
    )
    return mlm.loss + itm.loss


def bridge_tower_features(models: nn.ModuleDict, batch: dict[str, Tensor]) -> Any:
    body: Any = models["mlm"].bridgetower
    return body(batch["input_ids"], batch["attention_mask"], pixel_values=batch["pixels"])


class Side(NamedTuple):
    """One side of the comparison of towers."""

    name: str
    module: nn.Module
    function: Callable[[dict[str, Tensor]], Any]  # batch -> features, or a loss
    peer: str | None = None  # the side that the ratio is to


def tower_cases(
    sides: list[Side],
    training: bool,
    batch: dict[str, Tensor],
    config: BenchConfig,
    device: torch.device,
) -> list[Case]:
    """The cases of inference, or of training steps. FLOPs are counted on the first two samples."""
    kind = ", training step" if training else ", inference"
    pair = {name: tensor[:2] for name, tensor in batch.items()}
    cases = []
    for side in sides:
        side.module.train(training)
        settings = (side.module, training, config.precision, device)
        on_pair = partial(step, partial(side.function, pair), *settings)
        on_batch = partial(step, partial(side.function, batch), *settings)
        gflop = count_gflop(on_pair) * config.batch_size / 2
        peer = side.peer + kind if side.peer else None
        name = side.name + kind
        cases.append(Case(name, on_batch, config.batch_size, gflop, side.module, peer))
    return cases


def bench_towers(config: BenchConfig, device: torch.device) -> list[dict]:
    """ManagerTower and transformers' BridgeTower of the same size."""
    architecture: ManagerTowerConfig = getattr(ManagerTowerConfig, config.model)()
    ours = ManagerTower(architecture).to(device)
    peer = bridge_tower(architecture).to(device)
    task = Pretraining(ours, ("mlm", "itm"), share_images=False)
    sharing_task = Pretraining(ours, ("mlm", "itm"), share_images=True)
    batch = random_pairs(architecture, config.batch_size, device)

    inference_sides = [
        Side("ManagerTower", ours, partial(tower_features, ours), PEER),
        Side(PEER, peer, partial(bridge_tower_features, peer)),
    ]
    loss = partial(pretraining_loss, task)
    sharing_loss = partial(pretraining_loss, sharing_task)
    training_sides = [
        Side("ManagerTower", ours, loss, PEER),
        Side("share_images", ours, sharing_loss, "ManagerTower"),
        Side(PEER, peer, partial(bridge_tower_loss, peer)),
    ]
    inference_cases = tower_cases(inference_sides, False, batch, config, device)
    training_cases = tower_cases(training_sides, True, batch, config, device)

    # only now, for what is compiled cannot be counted
    if config.compile:
        wrap(task, RunConfig(compile=True), World(config.device))
        body: Any = peer["mlm"].bridgetower
        body.compile()

    print(
        f"ManagerTower and BridgeTower {config.model}, {architecture.image_size} px, "
        f"{architecture.max_text_len} tokens; MLM + ITM"
    )
    ours.eval()
    peer.eval()
    inference = measure(inference_cases, "samples", config, device)
    ours.train()
    peer.train()
    training = measure(training_cases, "samples", config, device)

    apart, shared, _ = training
    saved_flops = 1 - shared.gflop / apart.gflop
    saved_time = 1 - 1 / shared.ratio
    print(
        f"share_images saves {saved_flops:.1%} of a training step's FLOPs and "
        f"{saved_time:.1%} of its time"
    )
    return [result._asdict() for result in (*inference, *training)]


# ---------------------------------------------------------------- re-ranking
def one_image_at_a_time(
    model: ManagerTower, images: Tensor, ids: Tensor, mask: Tensor, chosen: Tensor
) -> Tensor:
    """What eval.retrieval_scores gives for the pairs chosen (I, M), by one pass for each image.

    images (I, 3, S, S); ids, mask (M, L). The scores (I, M) of the other pairs are -100.
    """
    scores = torch.full(chosen.shape, -100.0)
    with evaluating(model) as device:
        texts = model.encode_text(ids.to(device), mask.to(device))
        mask = mask.to(device)
        for i, image in enumerate(images):
            rows = chosen[i].nonzero()[:, 0].to(device)
            one_image = model.encode_image(image[None].to(device))
            experts = one_image.expand(len(rows), -1, -1, -1)
            features = model.fuse(texts[rows], experts, mask[rows])
            logits = model.heads["itm"](features.pooled)
            scores[i, chosen[i]] = logits[:, 1].float().cpu()
    return scores


class RetrievalResult(NamedTuple):
    """Times are medians over rounds, in seconds."""

    pictures: int
    captions: int
    pairs: int  # that were re-ranked
    batch: int
    difference: float  # the largest one of two scores
    batched: float
    single: float  # one image at a time
    ratio: float


def bench_retrieval(config: BenchConfig, device: torch.device) -> list[dict]:
    """Two batches of pictures, five captions each, 16 candidates."""
    architecture = getattr(ManagerTowerConfig, config.model)(heads=("itm", "itc"))
    model = ManagerTower(architecture).to(device)
    num_pictures = 2 * config.batch_size
    num_captions = 10 * config.batch_size
    batch = random_pairs(model.config, num_captions)
    images = batch["pixels"][:num_pictures]
    ids = batch["input_ids"]
    mask = batch["attention_mask"]
    batched = partial(
        retrieval_scores,
        model,
        load=images.__getitem__,
        num_images=num_pictures,
        input_ids=ids,
        attention_mask=mask,
        k_test=16,
        batch_size=config.batch_size,
    )
    scores = batched()
    is_chosen = scores > -100
    single = partial(one_image_at_a_time, model, images, ids, mask, is_chosen)
    difference = (scores - single()).abs().max().item()

    batched_times = []
    single_times = []
    for _ in range(config.rounds):
        batched_times.append(seconds_of(batched, device))
        single_times.append(seconds_of(single, device))
    ratios = [slow / fast for slow, fast in zip(single_times, batched_times, strict=True)]
    num_pairs = int(is_chosen.sum())
    batched_seconds = statistics.median(batched_times)
    single_seconds = statistics.median(single_times)
    ratio = statistics.median(ratios)
    print(
        f"{num_pictures} pictures, {num_captions} captions, {num_pairs} pairs re-ranked: "
        f"{batched_seconds:.3f} s in batches of {config.batch_size}, "
        f"{single_seconds:.3f} s one image at a time, ratio {ratio:.2f}; "
        f"the scores agree to {difference:.1e}"
    )
    result = RetrievalResult(
        pictures=num_pictures,
        captions=num_captions,
        pairs=num_pairs,
        batch=config.batch_size,
        difference=difference,
        batched=batched_seconds,
        single=single_seconds,
        ratio=ratio,
    )
    return [result._asdict()]


# ---------------------------------------------------------------- the MLLM
DECODED = 16  # tokens after the first one
TRAINING_STEP = "training step"
PREFILL = "prefill"
DECODING = "decoding"


def llava_onevision(config: LlavaManagerConfig) -> nn.Module:
    """transformers' model of the same size: what ours is without managers."""
    import transformers

    vision = {theirs: getattr(config, ours) for ours, theirs in VISION_FIELDS.items()}
    vision["model_type"] = "siglip_vision_model"
    vision["num_hidden_layers"] = config.vision_layers - 1  # without the last one, as ours
    vision["vision_use_head"] = False
    text = {theirs: getattr(config, ours) for ours, theirs in OFFICIAL_FIELDS.items()}
    text["model_type"] = "qwen2"
    pinpoints = [list(size) for size in config.grid_pinpoints]
    image_token = config.vocab_size - 1
    theirs: Any = transformers.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=-1,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=config.aspect,
        vision_feature_select_strategy="full",
        tie_word_embeddings=config.tie_embeddings,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(theirs)


def expand_placeholders(tokens: Tensor, is_image: Tensor, count: int) -> Tensor:
    """(B, L) -> (B, L + count - 1): each placeholder `count` times. is_image (L,)."""
    repeats = torch.where(is_image, count, 1)
    return tokens.repeat_interleave(repeats, dim=1)


def llava_inputs(
    model: nn.Module, config: LlavaManagerConfig, prompt: Prompt, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(input_ids, labels, the images' keywords) as our model takes them, or the peer."""
    is_image = prompt.ids == IMAGE_TOKEN
    labels = prompt.ids.where(~is_image, IGNORE)
    if isinstance(model, LlavaManager):
        return prompt.ids, labels, {"images": prompt.images}
    # the peer has a token of its own for images, as often as an image has tokens
    ids = prompt.ids.where(~is_image, config.vocab_size - 1)
    ids = expand_placeholders(ids, is_image[0], prompt.num_image_tokens).to(device)
    labels = expand_placeholders(labels, is_image[0], prompt.num_image_tokens).to(device)
    dtype = next(model.parameters()).dtype
    pixels = torch.stack([image.pixels for image in prompt.images]).to(dtype)  # (B, T, 3, S, S)
    sizes = torch.tensor([image.size for image in prompt.images])
    return ids, labels, {"pixel_values": pixels, "image_sizes": sizes}


class LlavaSide(NamedTuple):
    """One side of the comparison of MLLMs."""

    name: str
    model: nn.Module
    grid: int  # the image has a base tile and grid x grid tiles
    peer: str | None = None


def llava_cases(
    side: LlavaSide,
    architecture: LlavaManagerConfig,
    training: bool,
    config: BenchConfig,
    device: torch.device,
) -> list[Case]:
    """The case of a training step; or those of prefill and of decoding, which is less its prefill.

    On the way the model moves to the device, in fp32 for training.
    """
    dtype = DTYPES["fp32" if training else config.precision]
    model: Any = side.model.train(training).to(device, dtype)
    prompt = llava_prompt(architecture, side.grid, config.batch_size, device)
    ids, labels, images = llava_inputs(model, architecture, prompt, device)
    num_tokens = (prompt.num_image_tokens + PROMPT - 1) * config.batch_size

    def make_case(kind: str, function: Callable[[], Any], prefill: Case | None = None) -> Case:
        suffix = f", grid {side.grid}, {kind}"
        name = side.name + suffix
        peer = side.peer + suffix if side.peer else None
        call = partial(step, function, model, training, config.precision, device)
        gflop = count_gflop(call)
        if prefill is None:
            return Case(name, call, num_tokens, gflop, model, peer)
        gflop -= prefill.gflop
        num_decoded = DECODED * config.batch_size
        return Case(name, call, num_decoded, gflop, model, peer, minus=prefill.name)

    if training:
        return [make_case(TRAINING_STEP, lambda: model(ids, labels=labels, **images)[0])]
    prefill = make_case(PREFILL, partial(model.generate, ids, max_new_tokens=1, **images))
    decode = partial(model.generate, ids, max_new_tokens=1 + DECODED, **images)
    return [prefill, make_case(DECODING, decode, prefill)]


def bench_llava(config: BenchConfig, device: torch.device) -> list[dict]:
    """LLaVA-OV-Manager with and without managers, and transformers' LLaVA-OneVision."""
    architecture: LlavaManagerConfig = getattr(LlavaManagerConfig, config.model)(eos_ids=())
    ours = LlavaManager(architecture)
    peer = llava_onevision(architecture)
    plain = LlavaManager(dataclasses.replace(architecture, manager_type=None))
    with_grid = [
        LlavaSide("managers", ours, 2, "no managers"),
        LlavaSide("no managers", plain, 2, PEER),
        LlavaSide(PEER, peer, 2),
    ]
    # transformers' model always has a grid
    base_tile_alone = [
        LlavaSide("managers", ours, 0, "no managers"),
        LlavaSide("no managers", plain, 0),
    ]
    results: list[dict] = []
    for training in (True, False):
        cases = []
        for side in (*with_grid, *base_tile_alone):
            cases += llava_cases(side, architecture, training, config, device)
        results += [result._asdict() for result in measure(cases, "tokens", config, device)]
    overheads = manager_overhead()
    return results + [overhead._asdict() for overhead in overheads]


# ---------------------------------------------------------------- what managers add to the MLLM
class Cost(NamedTuple):
    """Of the prefill of one image."""

    image_tokens: int
    gflop: float
    parameters: int
    mib: float  # of activations


class OverheadResult(NamedTuple):
    """A line of the second table: of one kind of managers, beside the model without any."""

    name: str
    image_tokens: int
    gflop: float
    overhead: float  # more FLOPs than without managers, as a part of those
    parameters: int  # more than without managers
    mib: float  # more than without managers


OVERHEAD_ROW = (
    "{name:40s}{image_tokens:5d} image tokens, {gflop:6.0f} GFLOP, {overhead:+6.2%}; "
    "{parameters:+8d} parameters, {mib:+6.1f} MiB"
)


def prefill_cost(manager_type: str | None, grid: int) -> Cost:
    """The cost of the 0.5B model in bf16, counted on the meta device."""
    meta = torch.device("meta")
    with meta:
        model = LlavaManager(LlavaManagerConfig.base(manager_type=manager_type))
    model = model.eval().to(torch.bfloat16)
    prompt = llava_prompt(model.config, grid, 1, meta)
    function = partial(model, prompt.ids, images=prompt.images)
    call = partial(step, function, model, False, "fp32", meta)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    gflop = count_gflop(call)
    mib = peak_bytes(call, meta) / 2**20
    return Cost(prompt.num_image_tokens, gflop, parameters, mib)


def compare_costs(name: str, cost: Cost, plain: Cost) -> OverheadResult:
    """The cost of a model beside the one of the model without managers."""
    overhead = (cost.gflop - plain.gflop) / plain.gflop
    parameters = cost.parameters - plain.parameters
    mib = cost.mib - plain.mib
    return OverheadResult(name, cost.image_tokens, cost.gflop, overhead, parameters, mib)


def manager_overhead() -> list[OverheadResult]:
    """What managers add to the prefill of one image by the 0.5B model, for three grids."""
    results = []
    for grid in (1, 2, 3):
        plain = prefill_cost(None, grid)
        costs = {"no": plain}
        for manager_type in ("static", "adaptive", "adaptive_cross"):
            costs[manager_type] = prefill_cost(manager_type, grid)
        for kind, cost in costs.items():
            name = f"0.5B, {kind} managers, {grid} x {grid} tiles"
            result = compare_costs(name, cost, plain)
            print(OVERHEAD_ROW.format(**result._asdict()))
            results.append(result)
    return results


# ---------------------------------------------------------------- pictures
PICTURE_SIZE = (640, 480)  # of most of COCO
GPU = "H100"
GPU_TFLOPS = GPUS["h100"].tflops
MFU = 0.4  # an assumption: what a well-tuned training run reaches of that


def random_jpegs(count: int) -> list[bytes]:
    """Files with soft shapes and some grain, about as large as a photograph's (90 kB)."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(PICTURE_SIZE, Image.Resampling.BICUBIC)
        grain = rng.normal(0, 9, (PICTURE_SIZE[1], PICTURE_SIZE[0], 3))
        grainy = (np.asarray(picture) + grain).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(grainy).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


class PictureJob(NamedTuple):
    """A transform of pictures, and the training that it feeds."""

    name: str
    transform: Callable[[Image.Image, np.random.Generator], Any]
    size: int  # pixels on each side of what comes out
    gflop: float | None  # of a training step for one picture, where that is counted


class DataResult(NamedTuple):
    """A row of the table: one core of the CPU, medians over rounds."""

    name: str
    decode: float  # milliseconds for one picture
    transform: float  # resize, augment, and to a tensor
    to_tensor: float  # the last of these three
    rate: float  # pictures a second
    cores: float | None  # that one GPU keeps busy: an estimate


DATA_HEAD = "{:>46s}{:>12s}{:>12s}{:>14s}{:>14s}"
DATA_ROW = "{name:36s}{decode:10.2f}{transform:12.2f}{to_tensor:12.2f}{rate:14.1f}{cores:>14s}"


def picture_jobs() -> list[PictureJob]:
    """The pictures of pre-training, of every downstream task as its recipe has it, of the MLLM."""
    # a pair of pre-training has one and a half pictures, as half of all pairs are false
    config = ManagerTowerConfig.base()
    size = config.image_size
    clip = image_transform("clip", size, train=True)
    jobs = [PictureJob("pre-training: clip", clip, size, training_gflop(config) / 1.5)]
    gflop = training_gflop(config, share_images=True)
    jobs.append(PictureJob("share_images: clip", clip, size, gflop))

    for task_name, task in TASKS.items():
        if not task.recipe:  # the papers do not train on it
            continue
        config = ManagerTowerConfig.base(heads=task.heads, **task.model)
        size = config.image_size
        name = task.recipe.get("transform", FinetuneConfig.transform)
        transform = image_transform(name, size, train=True)
        counted = None
        if not task.is_retrieval:  # retrieval's batches have no fixed number of FLOPs a picture
            counted = training_gflop(config) / HEADS[task.heads[0]].pictures
        jobs.append(PictureJob(f"{task_name}: {name}", transform, size, counted))

    tiles = LlavaManagerConfig.base()
    jobs.append(PictureJob("MLLM: tiles", partial(cut_tiles, tiles), tiles.image_size, None))
    return jobs


def cut_tiles(config: LlavaManagerConfig, image: Image.Image, rng: Any) -> ImageTiles:
    return preprocess_image(image, config)


def milliseconds_of(call: Callable[..., Any], inputs: list, *others: Any) -> float:
    """Of one input: the mean over all. others: what each call gets besides."""
    start = time.perf_counter()
    for value in inputs:
        call(value, *others)
    return 1000 * (time.perf_counter() - start) / len(inputs)


def data_result(job: PictureJob, rounds: list[tuple[float, float, float]]) -> DataResult:
    """rounds: milliseconds of a picture for decoding, the transform, and its tensor alone."""
    decode = statistics.median(decode for decode, _, _ in rounds)
    transform = statistics.median(transform for _, transform, _ in rounds)
    to_tensor = statistics.median(to_tensor for _, _, to_tensor in rounds)
    rate = 1000 / (decode + transform)
    cores = None
    if job.gflop is not None:
        pictures_of_a_gpu = MFU * GPU_TFLOPS * 1000 / job.gflop
        cores = pictures_of_a_gpu / rate
    return DataResult(f"{job.name}, {job.size} px", decode, transform, to_tensor, rate, cores)


def bench_data(config: DataConfig, device: torch.device) -> list[dict]:
    """Pictures a second that one CPU core decodes, transforms and makes tensors of."""
    torch.set_num_threads(1)  # as in a worker of the data loader
    files = random_jpegs(config.pictures)
    pictures = [load_image(file) for file in files]
    bytes_of_a_file = sum(len(file) for file in files) // len(files)
    print(f"{len(files)} JPEGs, 640 x 480 pixels, {bytes_of_a_file} bytes each; one core")

    jobs = picture_jobs()
    rounds: list[list[tuple[float, float, float]]] = [[] for _ in jobs]
    for _ in range(config.rounds):
        for job, measured in zip(jobs, rounds, strict=True):
            rng = np.random.default_rng(0)
            squares = [picture.resize((job.size, job.size)) for picture in pictures]
            decode = milliseconds_of(load_image, files)
            transform = milliseconds_of(job.transform, pictures, rng)
            to_tensor = milliseconds_of(normalize, squares)
            measured.append((decode, transform, to_tensor))

    print()
    print(DATA_HEAD.format("decode, ms", "transform", "its tensor", "pictures/s", "cores"))
    results = []
    for job, measured in zip(jobs, rounds, strict=True):
        result = data_result(job, measured)
        cores = "-" if result.cores is None else f"{result.cores:.1f}"
        print(DATA_ROW.format(**{**result._asdict(), "cores": cores}))
        results.append(result._asdict())
    print(
        f"cores: how many keep one {GPU} busy that trains the base model at {MFU:.0%} of "
        f"{GPU_TFLOPS} TFLOP/s, an estimate"
    )
    return results


# ---------------------------------------------------------------- estimates
def bench_roofline(config: RooflineConfig, device: torch.device) -> list[dict]:
    """An estimate of where the time of a step goes on a GPU, from what is counted."""
    return estimate_roofline(config.model, config.batch_size, config.gpu, config.train)


def bench_plan(config: PlanConfig, device: torch.device) -> list[dict]:
    """An estimate of memory and time of training on several GPUs, from what is counted."""
    return estimate_plan(config.model, config.batch_size, config.gpus, config.gpu)


def bench_managers(config: ManagersConfig, device: torch.device) -> list[dict]:
    """What the managers of a training step move, and what torch.compile makes of two of them."""
    return estimate_managers(config.model, config.batch_size)


# ---------------------------------------------------------------- the command line
class Bench(NamedTuple):
    """A command."""

    run: Callable[[Any, torch.device], list[dict]]  # config, device -> the numbers
    config: type[BenchConfig]
    has_peer: bool  # it needs transformers


BENCHES = {
    "towers": Bench(bench_towers, BenchConfig, has_peer=True),
    "retrieval": Bench(bench_retrieval, RetrievalConfig, has_peer=False),
    "llava": Bench(bench_llava, LlavaConfig, has_peer=True),
    "data": Bench(bench_data, DataConfig, has_peer=False),
    "roofline": Bench(bench_roofline, RooflineConfig, has_peer=False),
    "plan": Bench(bench_plan, PlanConfig, has_peer=False),
    "managers": Bench(bench_managers, ManagersConfig, has_peer=False),
}


def split_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """(name of the bench, its flags); without a name it is `towers`."""
    if not argv or argv[0].startswith("-"):
        return "towers", list(argv)
    if argv[0] not in BENCHES:
        raise FlagError(
            f"bench.py has no {argv[0]!r}; it must be one of {', '.join(BENCHES)}; "
            "`python bench.py -h` lists all flags"
        )
    return argv[0], list(argv[1:])


def main(argv: list[str]) -> None:
    name, flags = split_command(argv)
    bench = BENCHES[name]
    others = ", ".join(other for other in BENCHES if other != name)
    description = f"{bench.run.__doc__} Other comparisons: {others}."
    config = parse_flags(bench.config, flags, description, name)
    check_output("--json", config.json)
    if bench.has_peer and find_spec("transformers") is None:
        raise ValueError("the peers are transformers' models: pip install -r requirements-dev.txt")
    device = World(config.device).device
    precision = resolve_precision(config.precision, device)
    config = dataclasses.replace(config, precision=precision)
    machine = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    report: dict[str, Any] = {"bench": name, "on": machine, "torch": torch.__version__}
    report.update(dataclasses.asdict(config))
    print(", ".join(f"{key} {value}" for key, value in report.items()))

    torch.manual_seed(0)
    report["rows"] = bench.run(config, device)
    if config.json:
        save_json(config.json, report)


if __name__ == "__main__":
    one_sentence(main)
