"""figures.py"""
from PIL import Image
from PIL import ImageDraw
from collections import Counter
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from torch.nn import functional as F
from torch.utils.data import Subset
import contextlib
import data
import functools
import io
import llava_manager
import numpy as np
import torch
from ask import encode_turns
from data import batches
from files import read_log, write
from images import load_image
from llava_manager import LlavaManager, LlavaManagerConfig
from model import ManagerTower
from multigrid import count_image_tokens, grid_geometry, preprocess_image
from tasks import KIND, SPLITS, open_dataset
from weights import is_mllm, load_llava, load_mllm, load_two_tower
from world import evaluating


@contextlib.contextmanager
def watching(modules: dict, read: Callable):
    """Calls read(key, module, args, output) after each forward pass of modules[key]."""
    hooks = [module.register_forward_hook(functools.partial(read, key)) for key, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def manager_statistics(model: ManagerTower, dataset, batch_size: int = 32, num_workers: int = 0) -> dict:
    """For "text" and "image", means over all tokens of the dataset that are not padding:

    "weights" (a list for each cross-modal layer): mean weight of each of the "experts" (encoder layers, from 1);
    "cosine_unimodal", "cosine_cross_modal": cosine similarity of the parts of consecutive managers' outputs, the sum
    over the experts and W_C * LN(C). The first manager has no second part, so that list is one shorter.
    """
    c, parts, sums, tokens = model.config, {}, defaultdict(float), Counter()
    if c.fusion != "manager":
        raise ValueError(f"a model with fusion {c.fusion!r} has no managers")

    def read(key, manager, args, output):
        weights = manager.weights(*args)  # (B, N, L, D or 1)
        unimodal = manager.aggregate_experts(weights, args[0]).float()  # (B, L, D)
        parts[key] = weights.float().mean(-1), unimodal, output.float() - unimodal

    managers = {(name, i): m for name in ("text", "image") for i, m in enumerate(getattr(model, f"{name}_managers"))}
    with evaluating(model) as device, watching(managers, read):
        for _, batch in batches(dataset, batch_size, num_workers):
            mask = batch["attention_mask"].to(device)
            model(batch["pixels"].to(device), batch["input_ids"].to(device), mask)
            for (name, i), (weights, *both) in parts.items():
                real = mask if name == "text" else torch.ones_like(weights[:, 0])  # (B, L)
                tokens[name] += int(real.sum()) * (i == 0)
                sums[name, "weights", i] += (weights * real[:, None]).sum((0, 2)).cpu()
                for part, here, before in zip(("unimodal", "cross_modal"), both, parts[name, i - 1][1:] if i else ()):
                    sums[name, part, i] += (F.cosine_similarity(here, before, dim=-1) * real).sum().cpu()

    def means(name, what, start):
        return [(sums[name, what, i] / tokens[name]).tolist() for i in range(start, c.num_layers)]

    tops = {"text": c.text_layers, "image": c.vision_layers}
    return {name: {"experts": list(range(top - c.num_experts(name) + 1, top + 1)), "weights": means(name, "weights", 0),
                   "cosine_unimodal": means(name, "unimodal", 1), "cosine_cross_modal": means(name, "cross_modal", 2)}
            for name, top in tops.items()}


def visual_manager_statistics(model: LlavaManager, prompts: list[tuple]) -> dict:
    """Of the MLLM's managers before the LLM "layers": mean "weights" and "magnitudes" (|weight|) of each expert, over
    channels, and for adaptive managers over the image tokens of prompts, a list of (input_ids, images)."""
    adaptive = {k: m for k, m in enumerate(model.managers) if isinstance(m, llava_manager.AdaptiveVisualManager)}
    if not len(model.managers) or len(prompts) < bool(adaptive):
        raise ValueError("adaptive managers need pictures: give --image" if adaptive else "this model has no managers")
    found = defaultdict(list)

    def add(k, weights):  # (B, N, L, D)
        found[k].append(torch.stack([weights.mean((0, 2, 3)), weights.abs().mean((0, 2, 3))]).float().cpu())

    with evaluating(model), watching(adaptive, lambda k, manager, args, _: add(k, manager.weights(*args[1:]))):
        for k in set(range(len(model.managers))) - set(adaptive):
            add(k, model.managers[k].weights())
        for ids, images in prompts if adaptive else ():
            model(torch.tensor([ids]), images=images, logits=False)
    means = [torch.stack(found[k]).mean(0).tolist() for k in range(len(model.managers))]
    return {"experts": list(model.config.managed_layers), "layers": list(model.config.inject_layers),
            "weights": [m[0] for m in means], "magnitudes": [m[1] for m in means]}


def draw_curves(panels: list[tuple]) -> Image.Image:
    """Panels (title, x label, y label, {name: (x, y)}), two in a row."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 2.1 * len(panels)), dpi=150, layout="constrained")
    for axes, (title, xlabel, ylabel, curves) in zip(figure.subplots(len(panels) // 2, 2).flat, panels):
        for name, (x, y) in curves.items():
            axes.plot(x, y, marker="o" if len(x) < 30 else None, markersize=4, label=name)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if xlabel != "step":  # every layer has a tick
            axes.set_xticks(sorted({v for x, _ in curves.values() for v in x}))
        low, high = axes.get_ylim()
        axes.set_ylim(min(0, low), 1.05 * (1 if ylabel == "cosine similarity" else max(0, high)))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file := io.BytesIO(), format="png")
    return Image.open(file)


def manager_panels(stats: dict) -> list[tuple]:
    """What draw_curves takes, from manager_statistics or visual_manager_statistics."""
    if "layers" in stats:
        return [(f"visual managers: {what} of each expert", "SigLIP hidden state", what,
                 {f"LLM layer {i}": (stats["experts"][: len(y)], y) for i, y in zip(stats["layers"], stats[key])})
                for what, key in (("mean weight", "weights"), ("mean |weight|", "magnitudes"))]
    panels = [(f"{name} managers: mean weight of each expert", f"{name} expert (encoder layer)", "weight",
               {f"cross-modal layer {i}": (s["experts"], y) for i, y in enumerate(s["weights"], 1)})
              for name, s in stats.items()]
    cosines = ("unimodal", "cosine_unimodal", 1), ("cross-modal", "cosine_cross_modal", 2)
    return panels + [(f"managers i and i + 1: {part} parts", "i", "cosine similarity",
                      {name: (range(first, first + len(s[key])), s[key]) for name, s in stats.items()})
                     for part, key, first in cosines]


def managers(checkpoint: str, data: str = "", data_root: str = "", task: str = "", split: str = "", image: list = None,
             limit: int = 512, batch_size: int = 32, num_workers: int = 0, out: str = "", device: str = "auto") -> dict:
    """Draw the aggregation weights of all managers, and how alike consecutive ones are, as PNG and JSON."""
    if is_mllm(checkpoint):
        model, tokenizer = load_mllm(checkpoint, "", device)
        prompts = [encode_turns(model, tokenizer, ["Describe the picture."], [file]) for file in image or ()]
        stats = visual_manager_statistics(model, prompts)
    else:
        loaded = load_two_tower(checkpoint, "", device)
        task = task or next((name for name, kind in KIND.items() if kind in loaded[0].heads), "coco")
        dataset = open_dataset(*loaded, task, checkpoint, data, data_root, split or SPLITS[task].split(",")[0])
        dataset = Subset(dataset, range(min(limit, len(dataset))))
        stats = manager_statistics(loaded[0], dataset, batch_size, num_workers)
    out = Path(out or f"{checkpoint}/managers.png")
    write(out, draw_curves(manager_panels(stats)))
    write(out.with_suffix(".json"), stats)
    return stats


def curves(run: list, out: str = "curves.png") -> dict:
    """Draw training loss and held-out metrics of runs, given by their --out_dir: --run A --run B."""
    losses, metrics = {}, {}
    for folder in run:
        if not (log := Path(folder) / "log.jsonl").is_file():
            raise ValueError(f"--run {folder} has no log.jsonl; it must be the --out_dir of a run")
        rows, name = read_log(log), Path(folder).name
        losses[name] = tuple([row[key] for row in rows if "loss" in row] for key in ("step", "loss"))
        for step, metric, value in ((row["step"], *item) for row in rows for item in row.get("eval", {}).items()):
            if isinstance(value, float) and metric != "score":
                x, y = metrics.setdefault(f"{name}: {metric}", ([], []))
                x.append(step)
                y.append(value)
    panels = [("training", "step", "loss", losses), ("held out", "step", "metric", metrics)]
    write(out, draw_curves(panels))
    return {"losses": losses, "metrics": metrics}


def grid(image: str, checkpoint: str = "", out: str = "grid.png") -> dict:
    """Draw what LLaVA-OV-Manager (default: the paper's) sees: base tile, grid with padding in red, token counts."""
    config = load_llava(checkpoint).config if checkpoint else LlavaManagerConfig()
    tiles, s, n = preprocess_image(load_image(image), config), config.image_size, config.side
    pixels = ((tiles.pixels * 0.5 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (T, s, s, 3)
    panels, info = [pixels[0]], {"picture": tiles.size, "tiles": (len(pixels),), "tokens of the base tile": (n * n,)}
    if len(pixels) > 1:
        (columns, rows), keep, (h, w) = grid_geometry(tiles.size, config)
        whole = pixels[1:].reshape(rows, columns, s, s, 3).swapaxes(1, 2).reshape(rows * s, columns * s, 3)
        padding = np.ones((rows * n, columns * n), dtype=bool)
        padding[keep] = False
        padding = np.asarray(Image.fromarray(padding).resize((columns * s, rows * s)))
        whole[padding] = whole[padding] // 2 + np.uint8([110, 0, 0])
        whole[s::s] = whole[:, s::s] = 255, 0, 0
        panels, info["grid of tiles"] = [*panels, whole], (columns, rows)
        info["patches without padding"] = tuple(k.stop - k.start for k in reversed(keep))
        info["tokens of the grid, with newlines"] = (w + 1, h)
    info["tokens"] = (count_image_tokens(len(pixels), tiles.size, config),)
    text = "\n".join(f"{name}: {' x '.join(map(str, value))}" for name, value in info.items())
    print(text)
    sheet = Image.new("RGB", (sum(len(p[0]) + 8 for p in panels) + 228, max(len(panels[-1]), 120) + 16), "white")
    for i, panel in enumerate(panels):
        sheet.paste(Image.fromarray(panel), (8 + i * (s + 8), 8))
    ImageDraw.Draw(sheet).multiline_text((sheet.width - 220, 8), text, fill="black")
    write(out, sheet)
    return info
