"""bench.py"""
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from torch import Tensor
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from typing import NamedTuple
import argparse
import dataclasses
import itertools
import json
import statistics
import time
import torch
import weakref
from chat import IGNORE, IMAGE_TOKEN
from eval import retrieval_scores
from fields import add_flags
from files import write_atomically
from llava_manager import LlavaManager, LlavaManagerConfig, OFFICIAL_FIELDS, VISION_FIELDS
from loop import wrap
from model import ManagerTower, ManagerTowerConfig
from multigrid import ImageTiles, count_image_tokens
from objectives import Pretraining
from world import World, autocast, evaluating


PEER, DECODED = "transformers", 16  # tokens after the first


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass
class BenchConfig:
    """One run. Every field is a flag."""
    model: str = "base"  # tiny | base | large (not for llava)
    batch_size: int = 4
    rounds: int = 5
    precision: str = "auto"  # fp32 | bf16 | fp16; auto = bf16 on CUDA, fp32 elsewhere
    device: str = "auto"
    compile: bool = False  # torch.compile of both sides
    json: str = ""  # where to write the numbers

    def __post_init__(self):
        known = self.model in ("tiny", "base", "large") and self.precision in ("auto", *DTYPES)
        if not known or self.rounds < 1 or self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"model: tiny, base, large; precision: auto, {', '.join(DTYPES)}; rounds: 1, 2, ...; "
                             f"batch_size: 2, 4, ...; and not {self}")


class Case(NamedTuple):
    name: str
    call: Callable
    amount: int  # samples or tokens of one call
    gflop: float  # of one call
    module: nn.Module  # its weights count as memory
    peer: str | None = None  # the case that the ratio is to
    minus: str | None = None  # the case whose time is not to count


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
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(cases: list[Case], unit: str, run: BenchConfig, device: torch.device) -> list[dict]:
    """Runs the cases and prints a line for each; returns their numbers."""
    n, times = (8192, 20) if device.type == "cuda" else (2048, 4)  # large enough for the device's best
    (a, b), gflop = torch.randn(2, n, n, device=device, dtype=DTYPES[run.precision]), 2e-9 * n**3 * times
    calls = {"": lambda: [a @ b for _ in range(times)], **{case.name: case.call for case in cases}}
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}  # and this warms up
    rounds = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(run.rounds)]
    for t, case in itertools.product(rounds, cases):
        t[case.name] -= t.get(case.minus, 0)

    def median(numerator: str, denominator: str | None = None) -> float:
        return statistics.median(t[numerator] / t.get(denominator, 1) for t in rounds)

    rows, rate = [], gflop / median("")
    print(f"\n{'seconds':>46s}{unit + '/s':>11s}{'GFLOP':>10s}{'GFLOP/s':>10s}{'of matmul':>10s}{'GiB':>8s}   ratio")
    for case in cases:
        t = median(case.name)
        rows.append({"name": case.name, "seconds": t, "rate": case.amount / t, "gflop": case.gflop / case.amount,
                     "gflop_per_second": case.gflop / t, "of_matmul": case.gflop / gflop * median("", case.name),
                     "gib": (peaks[case.name] + sum(p.nbytes for p in case.module.parameters())) / 2**30,
                     "ratio": median(case.peer or case.name, case.name), "matmul_gflop_per_second": rate})
        print("{name:38s}{seconds:8.3f}{rate:11.2f}{gflop:10.3f}{gflop_per_second:10.1f}{of_matmul:10.3f}{gib:8.2f}"
              "{ratio:8.2f}".format(**rows[-1]))
    print(f"GFLOP of one of the {unit}, GiB with the weights. The matrix product: {rate:.1f} GFLOP/s")
    return rows


def once(function: Callable, module: nn.Module, training: bool, run: BenchConfig, device: torch.device):
    """Inference; or forward and backward of function(), a loss. The optimizer is the same for all, and left out."""
    with torch.inference_mode(not training), autocast(run, device):
        loss = function()
    if training:
        loss.backward()
        module.zero_grad()


def random_pairs(c: ManagerTowerConfig, batch_size: int, device="cpu") -> dict:
    """A pre-training batch without padding: every seventh token is masked, every other pair is false."""
    ids = torch.randint(c.pad_token_id + 1, c.vocab_size, (batch_size, c.max_text_len))
    labels = ids.where(torch.arange(c.max_text_len) % 7 == 1, IGNORE)
    pixels, match = torch.randn(batch_size, 3, c.image_size, c.image_size), torch.arange(batch_size) % 2
    batch = {"pixels": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mlm_ids": ids,
             "mlm_labels": labels, "itm_labels": match, "itm_pixels": pixels[torch.arange(batch_size) | 1]}
    return {k: v.to(device) for k, v in batch.items()}


def bridge_tower(c: ManagerTowerConfig) -> nn.ModuleDict:
    """transformers' two models for pre-training, on one common body."""
    from transformers import BridgeTowerConfig, BridgeTowerForImageAndTextRetrieval, BridgeTowerForMaskedLM
    text = {"vocab_size": c.vocab_size, "hidden_size": c.text_width, "num_hidden_layers": c.text_layers,
            "num_attention_heads": c.text_heads, "intermediate_size": c.text_mlp_width,
            "hidden_dropout_prob": c.dropout,
            "attention_probs_dropout_prob": c.dropout, "max_position_embeddings": c.max_positions}
    vision = {"hidden_size": c.vision_width, "num_hidden_layers": c.vision_layers, "patch_size": c.patch_size,
              "image_size": c.image_size}
    config = BridgeTowerConfig(hidden_size=c.hidden_size, num_attention_heads=c.num_heads, text_config=text,
                               num_hidden_layers=c.num_layers, vision_config=vision)
    models = nn.ModuleDict({"mlm": BridgeTowerForMaskedLM(config), "itm": BridgeTowerForImageAndTextRetrieval(config)})
    models["itm"].bridgetower = models["mlm"].bridgetower
    return models


def bridge_tower_loss(models: nn.ModuleDict, b: dict) -> Tensor:
    """MLM + ITM as transformers offers them: with logits of all tokens, where our head takes the masked ones."""
    mask = b["attention_mask"]
    mlm = models["mlm"](b["mlm_ids"], mask, pixel_values=b["pixels"], labels=b["mlm_labels"])
    return mlm.loss + models["itm"](b["input_ids"], mask, pixel_values=b["itm_pixels"], labels=b["itm_labels"]).loss


def bench_towers(run: BenchConfig, device: torch.device) -> list[dict]:
    config = getattr(ManagerTowerConfig, run.model)()
    ours, peer = ManagerTower(config).to(device), bridge_tower(config).to(device)
    task, shared = (Pretraining(ours, ("mlm", "itm"), share) for share in (False, True))
    body, inputs = peer["mlm"].bridgetower, ("pixels", "input_ids", "attention_mask")
    functions = [("ManagerTower", ours, False, lambda b: ours(*(b[k] for k in inputs)), PEER),
                 (PEER, peer, False, lambda b: body(*(b[k] for k in inputs[1:]), pixel_values=b["pixels"]), None),
                 ("ManagerTower", ours, True, lambda b: sum(task(b).values()), PEER),
                 ("share_images", ours, True, lambda b: sum(shared(b).values()), "ManagerTower"),
                 (PEER, peer, True, partial(bridge_tower_loss, peer), None)]
    batch, cases, rows = random_pairs(config, run.batch_size, device), {False: [], True: []}, []
    pair = {k: v[:2] for k, v in batch.items()}  # FLOPs are counted on two samples
    for name, module, training, function, other in functions:
        kind, rest = ", training step" if training else ", inference", (module.train(training), training, run, device)
        gflop = count_gflop(partial(once, partial(function, pair), *rest)) * run.batch_size / 2
        call = partial(once, partial(function, batch), *rest)
        cases[training].append(Case(name + kind, call, run.batch_size, gflop, module, other and other + kind))
    if run.compile:
        wrap(task, run, World(run.device))
        body.compile()
    print(f"ManagerTower and BridgeTower {run.model}, {config.image_size} px, {config.max_text_len} tokens; MLM + ITM")
    for training in (False, True):
        ours.train(training), peer.train(training)
        rows += measure(cases[training], "samples", run, device)
    print(f"share_images saves {1 - rows[3]['gflop'] / rows[2]['gflop']:.1%} of a training step's FLOPs and "
          f"{1 - 1 / rows[3]['ratio']:.1%} of its time")
    return rows


def one_image_at_a_time(model: ManagerTower, images: Tensor, ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    """What eval.retrieval_scores gives for the pairs chosen (I, M), by one pass for each image and its captions."""
    scores = torch.full(chosen.shape, -100.0)
    with evaluating(model) as device:
        texts, mask = model.encode_text(ids.to(device), mask.to(device)), mask.to(device)
        for i, image in enumerate(images):
            rows = chosen[i].nonzero()[:, 0].to(device)
            experts = model.encode_image(image[None].to(device)).expand(len(rows), -1, -1, -1)
            logits = model.heads["itm"](model.fuse(texts[rows], experts, mask[rows]).pooled)
            scores[i, chosen[i]] = logits[:, 1].float().cpu()
    return scores


def bench_retrieval(run: BenchConfig, device: torch.device) -> list[dict]:
    """Two batches of pictures, five captions each, 16 candidates."""
    model = ManagerTower(getattr(ManagerTowerConfig, run.model)(heads=("itm", "itc"))).to(device)
    batch, size = random_pairs(model.config, 10 * run.batch_size), run.batch_size
    images, texts = batch["pixels"][: 2 * size], {k: batch[k] for k in ("input_ids", "attention_mask")}
    batched = partial(retrieval_scores, model, load=images.__getitem__, num_images=len(images), **texts, k_test=16,
                      batch_size=size)
    scores = batched()
    single = partial(one_image_at_a_time, model, images, *texts.values(), scores > -100)
    row = {"pictures": len(images), "captions": 10 * size, "pairs": int((scores > -100).sum()), "batch": size,
           "difference": (scores - single()).abs().max().item()}
    times = [(seconds(batched, device), seconds(single, device)) for _ in range(run.rounds)]
    row["batched"], row["single"], row["ratio"] = map(statistics.median, zip(*((x, y, y / x) for x, y in times)))
    print("{pictures} pictures, {captions} captions, {pairs} pairs re-ranked: {batched:.3f} s in batches of {batch}, "
          "{single:.3f} "
          "s one image at a time, ratio {ratio:.2f}; the scores agree to {difference:.1e}".format(**row))
    return [row]


def llava_onevision(c: LlavaManagerConfig) -> nn.Module:
    """transformers' model of the same size: what ours is without managers."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    vision, text = ({theirs: getattr(c, ours) for ours, theirs in fields.items()}
                    for fields in (VISION_FIELDS, OFFICIAL_FIELDS))
    vision |= {"model_type": "siglip_vision_model", "num_hidden_layers": c.vision_layers - 1, "vision_use_head": False}
    return LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(
        vision_config=vision, text_config=text | {"model_type": "qwen2"}, image_token_index=c.vocab_size - 1,
        vision_feature_layer=-1, image_grid_pinpoints=[list(size) for size in c.grid_pinpoints],
        vision_aspect_ratio=c.aspect,
        vision_feature_select_strategy="full", tie_word_embeddings=c.tie_embeddings))


def llava_prompt(c: LlavaManagerConfig, grid: int, batch_size: int, device) -> tuple[Tensor, list, int]:
    """input_ids: 32 tokens around one image; the images: a base tile and grid x grid tiles; the tokens of an image."""
    size = (max(grid, 1) * c.image_size,) * 2
    image = ImageTiles(torch.randn(1 + grid**2, 3, c.image_size, c.image_size, device=device), size)
    ids = torch.randint(3, c.vocab_size - 1, (batch_size, 33)).index_fill(1, torch.tensor([16]), IMAGE_TOKEN)
    return ids, [image] * batch_size, count_image_tokens(len(image.pixels), size, c)


def llava_calls(model: nn.Module, c: LlavaManagerConfig, grid: int, batch_size: int, device) -> tuple[int, dict]:
    """(tokens of the spliced batch, functions: "training step" gives a loss), for our model or for the peer."""
    ids, images, count = llava_prompt(c, grid, batch_size, device)
    labels, more = ids.where(ids != IMAGE_TOKEN, IGNORE), {"images": images}
    if not isinstance(model, LlavaManager):
        repeats = torch.where(ids[0] == IMAGE_TOKEN, count, 1)
        ids = ids.where(ids != IMAGE_TOKEN, c.vocab_size - 1)
        ids, labels = (x.repeat_interleave(repeats, 1).to(device) for x in (ids, labels))
        pixels = torch.stack([image.pixels for image in images]).to(next(model.parameters()).dtype)
        more = {"pixel_values": pixels, "image_sizes": torch.tensor([images[0].size] * batch_size)}
    return (count + 32) * batch_size, {
        "training step": lambda: model(ids, labels=labels, **more)[0],
        "prefill": lambda: model.generate(ids, max_new_tokens=1, **more),
        "decoding": lambda: model.generate(ids, max_new_tokens=1 + DECODED, **more)}


def bench_llava(run: BenchConfig, device: torch.device) -> list[dict]:
    c, rows = getattr(LlavaManagerConfig, run.model)(eos_ids=()), []
    ours, peer = LlavaManager(c), llava_onevision(c)
    plain = LlavaManager(dataclasses.replace(c, manager_type=None))
    plan = [("managers", ours, 2, "no managers"), ("no managers", plain, 2, PEER), (PEER, peer, 2, None),
            ("managers", ours, 0, "no managers"), ("no managers", plain, 0, None)]  # the peer always has a grid
    for training in (True, False):
        cases = []
        for name, model, grid, other in plan:
            model.train(training).to(device, DTYPES["fp32" if training else run.precision])
            total, calls = llava_calls(model, c, grid, run.batch_size, device)
            for kind in ["training step"] if training else ["prefill", "decoding"]:
                call, what = partial(once, calls[kind], model, training, run, device), f", grid {grid}, {kind}"
                # decoding: less its prefill
                amount, less = (DECODED * run.batch_size, cases[-1]) if kind == "decoding" else (total, None)
                gflop = count_gflop(call) - (less.gflop if less else 0)
                cases.append(Case(name + what, call, amount, gflop, model, other and other + what, less and less.name))
        rows += measure(cases, "tokens", run, device)
    return rows + manager_overhead()


def manager_overhead() -> list[dict]:
    """What managers add to the prefill of one image by the 0.5B model, in bf16, counted on the meta device."""
    rows, plain, meta = [], (), torch.device("meta")
    for grid, kind in itertools.product((1, 2, 3), (None, "static", "adaptive", "adaptive_cross")):
        with meta:
            model = LlavaManager(LlavaManagerConfig.base(manager_type=kind)).eval().to(torch.bfloat16)
        ids, images, count = llava_prompt(model.config, grid, 1, meta)
        call = partial(once, partial(model, ids, images=images), model, False, BenchConfig(precision="fp32"), meta)
        cost = count_gflop(call), sum(p.numel() for p in model.parameters()), peak_bytes(call, meta) / 2**20
        plain = plain if kind else cost
        gflop, parameters, mib = (x - y for x, y in zip(cost, plain))
        rows.append({"name": f"0.5B, {kind or 'no'} managers, {grid} x {grid} tiles", "image_tokens": count,
                     "gflop": cost[0], "overhead": gflop / plain[0], "parameters": parameters, "mib": mib})
        print("{name:40s}{image_tokens:5d} image tokens, {gflop:6.0f} GFLOP, {overhead:+6.2%}; "
              "{parameters:+8d} parameters, {mib:+6.1f} MiB".format(**rows[-1]))
    return rows


BENCHES = {"towers": (bench_towers, BenchConfig(), ()),
           "retrieval": (bench_retrieval, BenchConfig("tiny", 32), ("precision", "compile")),
           "llava": (bench_llava, BenchConfig("tiny"), ("compile",))}


def main(argv: list[str]):
    what, argv = (argv[0], argv[1:]) if argv and argv[0] in BENCHES else ("towers", argv)
    bench, run, skip = BENCHES[what]
    parser = argparse.ArgumentParser(allow_abbrev=False, description=f"bench.py [{'|'.join(BENCHES)}], here: {what}")
    add_flags(parser, BenchConfig, skip)
    run = dataclasses.replace(run, **vars(parser.parse_args(argv)))
    if what == "llava" and run.model == "large":
        raise ValueError("bench.py llava has no --model large, only tiny and base")
    if what != "retrieval" and find_spec("transformers") is None:
        raise ValueError("the peers are transformers' models: pip install -r requirements-dev.txt")
    device = World(run.device).device
    if run.precision == "auto":
        run.precision = "bf16" if device.type == "cuda" else "fp32"
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    report = {"bench": what, "on": name, "torch": torch.__version__, **dataclasses.asdict(run)}
    print(", ".join(f"{key} {value}" for key, value in report.items()))
    torch.manual_seed(0)
    report["rows"] = bench(run, device)
    if run.json:
        write_atomically(Path(run.json), lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
