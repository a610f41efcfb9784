"""Speed and memory: our models beside transformers' of the same size, interleaved in one run.

    python bench.py                            # ManagerTower base and BridgeTower: inference, training step
    python bench.py retrieval                  # re-ranking in full batches, and one image at a time
    python bench.py llava                      # LLaVA-OV-Manager and LlavaOnevision: training step, prefill, decoding
    python bench.py --model tiny --json speed.json

A round runs every case once, and a matrix product of the same precision: whatever else the machine does hits all alike.
Printed are medians over the rounds. "of matmul" is the FLOP/s over those of the product in the same round (on CUDA: the
MFU); FLOPs are counted by torch, with attention as plain matrix products. "ratio" is the speed over that of the peer;
for share_images and for managers, over that without. Weights are random. The peers need requirements-dev.txt.
"""
import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import eval
from llava_manager import IGNORE, IMAGE_TOKEN, ImageTiles, LlavaManager, LlavaManagerConfig, count_image_tokens
from model import ManagerTower, ManagerTowerConfig, write_atomically
from train import Pretraining, World, add_flags, autocast, one_sentence, wrap

PEER = "transformers"
DECODED = 16  # tokens after the first


@dataclass
class BenchConfig:
    """One run. Every field is a flag."""
    model: str = ""  # tiny | base | large (two-tower only); empty = base, and tiny for retrieval and llava
    batch_size: int = 4
    rounds: int = 5
    precision: str = "auto"  # fp32 | bf16 | fp16; auto = bf16 on CUDA, fp32 elsewhere
    device: str = "auto"
    compile: bool = False  # torch.compile of both sides
    json: str = ""  # where to write the numbers

    def __post_init__(self):
        for name, allowed in (("precision", ("auto", "fp32", "bf16", "fp16")), ("model", ("", "tiny", "base", "large"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)!r} must be one of {', '.join(filter(None, allowed))}")
        if self.batch_size < 2 or self.batch_size % 2 or self.rounds < 1:
            raise ValueError(f"--batch_size {self.batch_size} must be even, --rounds {self.rounds} at least 1")


# ---------------------------------------------------------------- Measuring
class Case(NamedTuple):
    name: str
    call: Callable
    amount: int  # samples or tokens of one call
    gflop: float  # of one call
    module: nn.Module  # its weights count as memory
    peer: str = ""  # the case that the ratio is to
    minus: str = ""  # the case whose time is not to count


def count_gflop(call: Callable) -> float:
    # attention in its plain form: of the fused kernels the CPU's are not counted, and CUDA's with their recomputation
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


class Footprint(TorchDispatchMode):
    """`peak`: the most bytes that tensors made under it held at one time, on any device, meta too."""
    now = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old, new = ({s._cdata: s for s in (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor))}
                    for tree in ((args, kwargs), out))
        for key in new.keys() - old.keys():  # neither a view of an argument nor changed in place
            self.grow(new[key].nbytes())
            weakref.finalize(new[key], self.grow, -new[key].nbytes())
        return out

    def grow(self, nbytes: int):
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def peak_bytes(call: Callable, device: torch.device) -> int:
    """What call() takes on top of what is there: from the allocator on CUDA, of tensors elsewhere."""
    if device.type != "cuda":
        with Footprint() as footprint:
            call()
        return footprint.peak
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def seconds(call: Callable, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def precision_of(run: BenchConfig, device: torch.device) -> torch.dtype:
    with autocast(run, device):
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def measure(cases: list[Case], unit: str, run: BenchConfig, device: torch.device) -> list[dict]:
    """Runs the cases and prints a line for each; returns their numbers."""
    n, times = (8192, 20) if device.type == "cuda" else (2048, 4)  # large enough for the device's best
    (a, b), gflop = torch.randn(2, n, n, device=device, dtype=precision_of(run, device)), 2e-9 * n**3 * times
    calls = {"": lambda: [a @ b for _ in range(times)], **{case.name: case.call for case in cases}}
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}  # and this warms up
    rounds = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(run.rounds)]
    for t, case in itertools.product(rounds, cases):
        t[case.name] -= t.get(case.minus, 0)

    def median(numerator: str, denominator: str = "") -> float:
        return statistics.median(t[numerator] / (t[denominator] if denominator else 1) for t in rounds)

    rows, rate = [], gflop / median("")
    print(f"\n{'seconds':>46s}{unit + '/s':>11s}{'GFLOP':>10s}{'GFLOP/s':>10s}{'of matmul':>10s}{'GiB':>8s}{'ratio':>7s}")
    for case in cases:
        t = median(case.name)
        rows.append({"name": case.name, "seconds": t, "rate": case.amount / t, "gflop": case.gflop / case.amount,
                     "gflop_per_second": case.gflop / t, "of_matmul": case.gflop / gflop * median("", case.name),
                     "gib": (peaks[case.name] + sum(p.nbytes for p in case.module.parameters())) / 2**30,
                     "ratio": median(case.peer or case.name, case.name), "matmul_gflop_per_second": rate})
        print("{name:38s}{seconds:8.3f}{rate:11.2f}{gflop:10.3f}{gflop_per_second:10.1f}{of_matmul:10.3f}{gib:8.2f}{ratio:7.2f}"
              .format(**rows[-1]))
    print(f"GFLOP of one of the {unit}, GiB with the weights. The matrix product: {rate:.1f} GFLOP/s")
    return rows


def once(function: Callable, module: nn.Module, training: bool, run: BenchConfig, device: torch.device):
    """Inference, or the forward and backward pass of function(), a loss. The optimizer, the same for all, is left out."""
    with torch.inference_mode(not training), autocast(run, device):
        loss = function()
    if training:
        loss.backward()
        module.zero_grad()


# ---------------------------------------------------------------- ManagerTower and BridgeTower
def random_pairs(c: ManagerTowerConfig, batch_size: int, device="cpu") -> dict:
    """A pre-training batch without padding: every seventh token is masked, every other pair is false."""
    ids = torch.randint(c.pad_token_id + 1, c.vocab_size, (batch_size, c.max_text_len))
    pixels, match = torch.randn(batch_size, 3, c.image_size, c.image_size), torch.arange(batch_size) % 2
    batch = {"pixels": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mlm_ids": ids,
             "mlm_labels": ids.where(torch.arange(c.max_text_len) % 7 == 1, IGNORE), "itm_labels": match,
             "itm_pixels": pixels[torch.arange(batch_size) ^ (1 - match)]}
    return {k: v.to(device) for k, v in batch.items()}


def bridge_tower(c: ManagerTowerConfig) -> nn.ModuleDict:
    """transformers' two models for pre-training, on one common body."""
    from transformers import BridgeTowerConfig, BridgeTowerForImageAndTextRetrieval, BridgeTowerForMaskedLM
    text = {"vocab_size": c.vocab_size, "hidden_size": c.text_width, "num_hidden_layers": c.text_layers,
            "num_attention_heads": c.text_heads, "intermediate_size": c.text_mlp_width,
            "max_position_embeddings": c.max_positions, "hidden_dropout_prob": c.dropout,
            "attention_probs_dropout_prob": c.dropout}
    vision = {"hidden_size": c.vision_width, "num_hidden_layers": c.vision_layers, "patch_size": c.patch_size,
              "image_size": c.image_size}
    config = BridgeTowerConfig(hidden_size=c.hidden_size, num_attention_heads=c.num_heads, num_hidden_layers=c.num_layers,
                               text_config=text, vision_config=vision)
    models = nn.ModuleDict({"mlm": BridgeTowerForMaskedLM(config), "itm": BridgeTowerForImageAndTextRetrieval(config)})
    models["itm"].bridgetower = models["mlm"].bridgetower
    return models


def bridge_tower_loss(models: nn.ModuleDict, b: dict) -> Tensor:
    """MLM + ITM as transformers offers them: with logits of all tokens, where our head takes the masked ones."""
    mask = b["attention_mask"]
    mlm = models["mlm"](b["mlm_ids"], mask, pixel_values=b["pixels"], labels=b["mlm_labels"])
    return mlm.loss + models["itm"](b["input_ids"], mask, pixel_values=b["itm_pixels"], labels=b["itm_labels"]).loss


def bench_towers(run: BenchConfig, device: torch.device) -> list[dict]:
    config = getattr(ManagerTowerConfig, run.model or "base")()
    ours, peer = ManagerTower(config).to(device), bridge_tower(config).to(device)
    task, shared = (Pretraining(ours, ("mlm", "itm"), share) for share in (False, True))
    inference = {"ManagerTower": (ours, lambda b: ours(b["pixels"], b["input_ids"], b["attention_mask"]), PEER),
                 PEER: (peer, lambda b: peer["mlm"].bridgetower(b["input_ids"], b["attention_mask"], pixel_values=b["pixels"]), "")}
    training = {"ManagerTower": (ours, lambda b: sum(task(b).values()), PEER),
                "share_images": (ours, lambda b: sum(shared(b).values()), "ManagerTower"),
                PEER: (peer, partial(bridge_tower_loss, peer), "")}
    batch, rows, plans = random_pairs(config, run.batch_size, device), [], []
    pair = {k: v[:2] for k, v in batch.items()}  # FLOPs are counted on two samples
    for mode, functions in ((False, inference), (True, training)):
        cases, kind = [], "training step" if mode else "inference"
        for name, (module, function, other) in functions.items():
            gflop = count_gflop(partial(once, partial(function, pair), module.train(mode), mode, run, device))
            cases.append(Case(f"{name} {kind}", partial(once, partial(function, batch), module, mode, run, device),
                              run.batch_size, gflop * run.batch_size / 2, module, other and f"{other} {kind}"))
        plans.append((mode, cases))
    if run.compile:
        wrap(task, run, World(run.device))
        peer["mlm"].bridgetower.compile()
    print(f"ManagerTower {run.model or 'base'} ({sum(p.numel() for p in ours.parameters()) / 1e6:.1f}M parameters) and {PEER}' "
          f"BridgeTower, {config.image_size} px, {config.max_text_len} tokens, batch {run.batch_size}; training step: MLM + ITM")
    for mode, cases in plans:
        ours.train(mode), peer.train(mode)
        rows += measure(cases, "samples", run, device)
    print(f"share_images saves {1 - rows[3]['gflop'] / rows[2]['gflop']:.1%} of the FLOPs, {1 - 1 / rows[3]['ratio']:.1%} of the time")
    return rows


# ---------------------------------------------------------------- Retrieval
def one_image_at_a_time(model: ManagerTower, images: Tensor, ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    """What eval.retrieval_scores gives for the pairs chosen (I, M), by one pass for each image and its captions."""
    texts, scores = model.encode_text(ids, mask), torch.full(chosen.shape, -100.0)
    for i, image in enumerate(images):
        rows = chosen[i].nonzero()[:, 0].to(ids.device)
        experts = model.encode_image(image[None]).expand(len(rows), -1, -1, -1)
        scores[i, chosen[i]] = model.heads["itm"](model.fuse(texts[rows], experts, mask[rows]).pooled)[:, 1].float().cpu()
    return scores


def bench_retrieval(run: BenchConfig, device: torch.device) -> list[dict]:
    """Four pictures for each place of a batch, five captions each; k_test is the batch size."""
    config, size, scores = getattr(ManagerTowerConfig, run.model or "tiny")(heads=("itm", "itc")), run.batch_size, {}
    model, batch = ManagerTower(config).to(device), random_pairs(config, 20 * size)
    images, ids, mask = batch["pixels"][: 4 * size], batch["input_ids"], batch["attention_mask"]

    def batched():
        scores["batched"] = eval.retrieval_scores(model, images, ids, mask, k_test=size, batch_size=size)

    def single():
        with eval.evaluating(model):
            tensors = (x.to(device) for x in (images, ids, mask))
            scores["single"] = one_image_at_a_time(model, *tensors, scores["batched"] > -100)

    times = [[seconds(call, device) for call in (batched, single)] for _ in range(run.rounds + 1)][1:]  # the first warms up
    (a, b), pairs = map(statistics.median, zip(*times)), int((scores["batched"] > -100).sum())
    ratio, difference = statistics.median(y / x for x, y in times), (scores["batched"] - scores["single"]).abs().max().item()
    print(f"{len(images)} pictures, {len(ids)} captions, {pairs} pairs re-ranked: {a:.3f} s in batches of {size}, {b:.3f} s one image "
          f"at a time, ratio {ratio:.2f}; the scores differ by at most {difference:.1e}")
    return [{"pairs": pairs, "batched_seconds": a, "single_seconds": b, "ratio": ratio, "largest_difference": difference}]


# ---------------------------------------------------------------- LLaVA-OV-Manager and LlavaOnevision
def llava_onevision(c: LlavaManagerConfig) -> nn.Module:
    """transformers' model of the same size: what ours is without managers."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    vision = {"model_type": "siglip_vision_model", "hidden_size": c.vision_width, "intermediate_size": c.vision_mlp_width,
              "num_hidden_layers": c.vision_layers - 1, "num_attention_heads": c.vision_heads, "image_size": c.image_size,
              "patch_size": c.patch_size, "vision_use_head": False}
    text = {"model_type": "qwen2", "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "intermediate_size": c.mlp_width,
            "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads,
            "tie_word_embeddings": c.tie_embeddings, "max_position_embeddings": c.max_length}
    return LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=c.vocab_size - 1, vision_feature_layer=-1,
        image_grid_pinpoints=[list(size) for size in c.grid_pinpoints], vision_aspect_ratio=c.aspect,
        vision_feature_select_strategy="full", tie_word_embeddings=c.tie_embeddings))


def llava_prompt(c: LlavaManagerConfig, grid: int, batch_size: int, device) -> tuple[Tensor, list[ImageTiles], int]:
    """input_ids: 32 tokens around one image; the images: a base tile and grid x grid tiles; the tokens of an image."""
    size = (max(grid, 1) * c.image_size,) * 2
    image = ImageTiles(torch.randn(1 + grid**2, 3, c.image_size, c.image_size, device=device), size)
    ids = torch.randint(3, c.vocab_size - 1, (batch_size, 33)).index_fill(1, torch.tensor([16]), IMAGE_TOKEN)
    return ids, [image] * batch_size, count_image_tokens(len(image.pixels), size, c)


def llava_calls(model: nn.Module, c: LlavaManagerConfig, grid: int, run: BenchConfig, device: torch.device) -> tuple[int, dict]:
    """(tokens of the spliced batch, {"training step": gives the loss, "prefill", "decoding"}), of ours or of the peer."""
    ids, images, count = llava_prompt(c, grid, run.batch_size, device)
    labels, more = ids.where(ids != IMAGE_TOKEN, IGNORE), {"images": images}
    if not isinstance(model, LlavaManager):
        repeats = torch.where(ids[0] == IMAGE_TOKEN, count, 1)
        ids, labels = (x.where(ids != IMAGE_TOKEN, fill).repeat_interleave(repeats, 1).to(device)
                       for x, fill in ((ids, c.vocab_size - 1), (labels, IGNORE)))
        more = {"attention_mask": torch.ones_like(ids), "image_sizes": torch.tensor([images[0].size] * len(ids)),
                "pixel_values": torch.stack([image.pixels for image in images]).to(next(model.parameters()).dtype)}
    return (count + 32) * len(ids), {"training step": lambda: model(ids, labels=labels, **more)[0],
                                     "prefill": lambda: model.generate(ids, max_new_tokens=1, **more),
                                     "decoding": lambda: model.generate(ids, max_new_tokens=1 + DECODED, **more)}


def bench_llava(run: BenchConfig, device: torch.device) -> list[dict]:
    c, rows = getattr(LlavaManagerConfig, run.model or "tiny")(eos_ids=()), []
    models = {"managers": LlavaManager(c), "no managers": LlavaManager(dataclasses.replace(c, manager_type=None)),
              PEER: llava_onevision(c)}
    for training in (True, False):
        cases = []
        for (name, model), grid in itertools.product(models.items(), (2, 0)):
            if name == PEER and not grid:
                continue  # it cannot leave the grid out
            model.train(training).to(device, torch.float32 if training else precision_of(run, device))
            total, calls = llava_calls(model, c, grid, run, device)
            for kind in ("training step",) if training else ("prefill", "decoding"):
                what = f"{'grid' if grid else 'one tile'}, {kind}"
                call = partial(once, calls[kind], model, training, run, device)
                peer = {"managers": "no managers", "no managers": PEER if grid else ""}.get(name, "")
                prefill = cases[-1] if kind == "decoding" else None
                gflop, amount = count_gflop(call) - (prefill.gflop if prefill else 0), DECODED * run.batch_size if prefill else total
                cases.append(Case(f"{name}, {what}", call, amount, gflop, model, peer and f"{peer}, {what}", prefill.name if prefill else ""))
        rows += measure(cases, "tokens", run, device)
    return rows + manager_overhead()


def manager_overhead(grids=(1, 2, 3)) -> list[dict]:
    """What managers add to the prefill of one image by the 0.5B model, in bf16, on the meta device."""
    rows, meta = [], torch.device("meta")
    print("\nthe 0.5B model's prefill of one image, counted on the meta device")
    for grid, kind in itertools.product(grids, (None, "static", "adaptive", "adaptive_last", "adaptive_average", "adaptive_cross")):
        with meta:
            model = LlavaManager(LlavaManagerConfig.base(manager_type=kind)).eval().to(torch.bfloat16)
        ids, images, count = llava_prompt(model.config, grid, 1, meta)
        call = partial(once, partial(model, ids, images=images), model, False, BenchConfig(), torch.device("cpu"))
        row = {"name": f"{kind} managers, grid of {grid} x {grid}", "image_tokens": count, "gflop": count_gflop(call),
               "parameters": sum(p.numel() for p in model.parameters()), "gib": peak_bytes(call, meta) / 2**30}
        plain = row if kind is None else plain
        more = {k: row[k] - plain[k] for k in ("gflop", "parameters", "gib")}
        rows.append(row | {"overhead": more["gflop"] / plain["gflop"]})
        print(f"{row['name']:40s}{count:6d} image tokens {row['gflop']:9.0f} GFLOP, {rows[-1]['overhead']:+6.2%}; {more['parameters']:+9d} "
              f"parameters; {more['gib'] * 1024:+7.1f} MiB of activations")
    return rows


BENCHES = {"towers": bench_towers, "retrieval": bench_retrieval, "llava": bench_llava}


def main(argv: list[str]):
    parser = argparse.ArgumentParser(allow_abbrev=False, usage=f"{sys.argv[0]} [{'|'.join(BENCHES)}] [--FIELD VALUE ...]")
    parser.add_argument("what", nargs="?", default="towers", choices=list(BENCHES))
    add_flags(parser, BenchConfig)
    given = vars(parser.parse_args(argv))
    what = given.pop("what")
    dead = {"towers": set(), "retrieval": {"precision", "compile"}, "llava": {"compile"}}[what] & given.keys()
    if dead or (what == "llava" and given.get("model") == "large"):
        raise ValueError(f"bench.py {what} has no --{' or --'.join(sorted(dead)) or 'model large'}")
    run = BenchConfig(**given)
    device = World(run.device).device
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {precision_of(run, device)}, median of {run.rounds} rounds")
    torch.manual_seed(0)
    try:
        rows = BENCHES[what](run, device)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; the peers come with: pip install -r requirements-dev.txt") from error
    if run.json:
        report = {"bench": what, "device": name, "torch": torch.__version__, **dataclasses.asdict(run), "rows": rows}
        write_atomically(Path(run.json), lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))


if __name__ == "__main__":
    one_sentence(main)
