"""Evaluation: the papers' metrics, retrieval with re-ranking, submissions, one model and one picture, figures.

    python eval.py --task vqav2 --checkpoint out/vqav2 --data demo
    torchrun --nproc_per_node 8 eval.py --task flickr30k --checkpoint F --data_root D
    python eval.py ask|match|search|managers|chat|grid|curves --help

Metrics: ACL section 4, TCSVT section V; figures: ACL figures 4 and 7, TCSVT figures 21-23. Every process evaluates its
share of the batches; results are gathered once, and metrics (fractions; the printed table shows percent) come from the
complete list in the order of the rows, so they do not depend on the number of processes.
"""
import argparse
import contextlib
import functools
import inspect
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

import data
import llava_manager
from model import ManagerTower, load_model, write_atomically
from prepare import normalize_answer
from train import World, one_sentence, read_log

RETRIEVAL = ("flickr30k", "coco", "openclipart", "tuxpaint")
KIND = {"vqav2": "vqa", "nlvr2": "nlvr2", "snli_ve": "snli_ve", **dict.fromkeys(RETRIEVAL, "captions")}
SPLITS = {"vqav2": "rest_val", "nlvr2": "dev,test1", "snli_ve": "dev,test", **dict.fromkeys(RETRIEVAL, "test")}
# ManagerTower base with 4M VLP, in percent (ACL table 3, TCSVT table III); flickr30k's RMEAN is without VLP (table I)
PAPER = {"vqav2": {"accuracy": "79.39 test-dev, 79.15 test-std"}, "nlvr2 dev": {"accuracy": 82.81},
         "nlvr2 test1": {"accuracy": 83.34}, "snli_ve dev": {"accuracy": 81.26}, "snli_ve test": {"accuracy": 81.44},
         "flickr30k test": {"ir_r1": 86.56, "tr_r1": 95.64, "rmean": "93.97 without VLP"}}


# ---------------------------------------------------------------- Processes
def ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def collect(parts: list[tuple]) -> list:
    """All processes' (position, value) pairs -> the values in the order of their positions, on every process."""
    everyone = [parts]
    if ranks()[1] > 1:
        everyone = [None] * ranks()[1]
        dist.all_gather_object(everyone, parts)
    merged = dict(pair for part in everyone for pair in part)
    assert len(merged) == sum(map(len, everyone)), f"{sum(map(len, everyone)) - len(merged)} results arrived twice"
    return [merged[position] for position in sorted(merged)]


def batches(dataset, batch_size: int, num_workers: int = 0, collate: Callable = data.collate):
    """(rows, batch) of this process: batch b goes to process b % world, so that no batch depends on world."""
    starts = range(0, len(dataset), batch_size)[ranks()[0] :: ranks()[1]]
    plan = [range(start, min(start + batch_size, len(dataset))) for start in starts]
    return zip(plan, DataLoader(dataset, batch_sampler=plan, collate_fn=collate, num_workers=num_workers))


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode, no gradients, bf16 autocast on CUDA; gives the device. The model's own mode comes back."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            yield device
    finally:
        model.train(training)


# ---------------------------------------------------------------- VQAv2, NLVR2, SNLI-VE
class Prediction(NamedTuple):
    choice: int  # argmax
    score: float | None  # VQA: soft score of the choice, else 1 or 0; None without labels
    question_id: int | None = None
    question_type: str | None = None


def class_logits(model: ManagerTower, kind: str, batch: dict) -> Tensor:
    """Logits of a collated batch on the model's device: vqa (B, answers), nlvr2 (B, 2), snli_ve (B, 3)."""
    mask = batch["attention_mask"]
    text = model.encode_text(batch["input_ids"], mask)
    images = [batch["pixels"], batch["pixels_1"]] if kind == "nlvr2" else [batch["pixels"]]
    pooled = [model.fuse(text, model.encode_image(pixels), mask, i).pooled for i, pixels in enumerate(images, 1)]
    return model.heads[kind](torch.cat(pooled, dim=-1))


def predict(model: ManagerTower, dataset, task: str, batch_size: int = 64, num_workers: int = 0) -> list[Prediction]:
    """The predictions for all rows of vqav2, nlvr2 or snli_ve, in their order, complete on every process."""
    parts, kind = [], KIND[task]
    with evaluating(model) as device:
        for rows, batch in batches(dataset, batch_size, num_workers):
            tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
            choices = class_logits(model, kind, tensors).float().argmax(-1).cpu()
            scores = unknown = [None] * len(rows)
            if "targets" in batch:
                scores = batch["targets"].gather(1, choices[:, None])[:, 0].tolist()
            elif "label" in batch:
                scores = (choices == batch["label"]).float().tolist()
            extra = (batch.get(name, unknown) for name in ("question_id", "question_type"))
            parts += zip(rows, map(Prediction, choices.tolist(), scores, *extra))
    return collect(parts)


def read_annotations(file: str) -> list[dict]:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))["annotations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not VQA's v2_mscoco_*_annotations.json ({error!r})") from error


def mean_by(scores, keys) -> dict:
    """Mean score of each key, keys in alphabetical order, without None."""
    groups = defaultdict(list)
    for score, key in zip(scores, keys, strict=True):
        groups[key].append(score)
    return {key: math.fsum(groups[key]) / len(groups[key]) for key in sorted(k for k in groups if k is not None)}


def accuracy(predictions: list[Prediction]) -> dict:
    """{"accuracy", "count", "per_question_type" where there are types}; only the count without labels."""
    scores = [p.score for p in predictions]
    if None in scores:
        return {"count": len(scores)}
    types = mean_by(scores, [p.question_type for p in predictions])
    metrics = {"accuracy": math.fsum(scores) / len(scores), "count": len(scores)}
    return metrics | {"per_question_type": types} if types else metrics


def evaluate(model: ManagerTower, dataset: data.PairDataset, task: str, batch_size: int = 64, num_workers: int = 0,
             k_test: int = 128, memory_gb: float = 16.0) -> dict:
    """Metrics of a task (a key of KIND): accuracy, or recall with re-ranking. To be called by all processes."""
    if KIND[task] != "captions":
        return accuracy(predict(model, dataset, task, batch_size, num_workers))
    source, texts = dataset.source, dataset.source.texts()
    ids, mask = dataset.tokenizer([row["text"] for row in texts], dataset.max_text_len)
    pictures = (lambda i: dataset.transform(source.images(i)[0], None)), source.num_images
    scores = retrieval_scores(model, *pictures, ids, mask, k_test, None, batch_size, memory_gb, num_workers)
    metrics = recall(scores, torch.tensor([row["image_index"] for row in texts]))
    return metrics | {"images": source.num_images, "texts": len(texts)}


def official_vqa_accuracy(results: list[dict], annotations: list[dict]) -> dict:
    """VQA's official evaluation (visualqa.org/evaluation.html) from the raw annotations.

    results: [{"question_id", "answer"}]; annotations: [{"question_id", "answers": [{"answer"}], "question_type",
    "answer_type"}]. All answers are normalised; each person is left out in turn; the score is the mean of min(matches
    among the others / 3, 1). Means over the "answered" of all "questions". Answered twice or unknown: ValueError.
    """
    known, times, scores = {a["question_id"]: a for a in annotations}, Counter(r["question_id"] for r in results), []
    wrong = [q for q, n in times.items() if n > 1 or q not in known]
    if wrong or not results:
        raise ValueError(f"{len(wrong)} of {len(results)} questions are answered twice or not annotated: {wrong[:5]}")
    for result in results:
        people = [normalize_answer(person["answer"]) for person in known[result["question_id"]]["answers"]]
        n = people.count(normalize_answer(result["answer"]))
        # without one of the n who agree n - 1 are left, without one of the others n
        scores.append((n * min((n - 1) / 3, 1) + (len(people) - n) * min(n / 3, 1)) / len(people))
    kinds = {key: [known[r["question_id"]].get(key) for r in results] for key in ("question_type", "answer_type")}
    return {"overall": math.fsum(scores) / len(scores), "answered": len(results), "questions": len(known),
            **{f"per_{key}": mean_by(scores, values) for key, values in kinds.items()}}


# ---------------------------------------------------------------- Retrieval
def unit_vectors(model: ManagerTower, modality: str, experts: Tensor) -> Tensor:
    """One half of model.contrast: experts (B, N, L, D) -> ITC unit vectors (B, C) on the CPU."""
    return F.normalize(getattr(model.heads["itc"], modality)(experts[:, -1, 0]), dim=-1).float().cpu()


def host_dtype(model) -> torch.dtype:
    """Under `evaluating`'s autocast the next layer rounds experts to bf16 anyway: half the bytes lose nothing."""
    return torch.bfloat16 if next(model.parameters()).is_cuda else torch.float32


class TextExperts:
    """The experts of captions, by index: kept in host memory if all fit into `budget` bytes, else computed again."""

    def __init__(self, model: ManagerTower, input_ids: Tensor, attention_mask: Tensor, batch_size: int, budget: float):
        self.model, self.input_ids, self.attention_mask = model, input_ids, attention_mask
        self.kept, self.vectors = None, []
        shape = len(input_ids), model.config.num_experts("text"), input_ids.shape[1], model.config.text_width
        nbytes = math.prod(shape) * host_dtype(model).itemsize
        kept = torch.empty(shape, dtype=host_dtype(model)) if nbytes <= budget else None
        self.free = budget if kept is None else budget - nbytes
        for start in range(0, len(input_ids), batch_size):
            experts = self[start : start + batch_size]
            if "itc" in model.heads:
                self.vectors.append(unit_vectors(model, "text", experts))
            if kept is not None:
                kept[start : start + batch_size] = experts.cpu()
        self.kept = kept

    def __getitem__(self, index) -> Tensor:
        """n captions, by a slice or an index tensor (n,) on the CPU -> (n, N, L, D) on the model's device."""
        device = next(self.model.parameters()).device
        if self.kept is not None:
            return self.kept[index].to(device)
        return self.model.encode_text(self.input_ids[index].to(device), self.attention_mask[index].to(device))


def image_experts(model: ManagerTower, load: Callable, count: int, batch_size: int, num_workers: int, budget: float,
                  kept: list):
    """(rows, experts (B, N, L, D)) of this process's images; the second time from `kept`, if all fit into budget."""
    device, before = next(model.parameters()).device, list(kept)
    loaded = batches(range(count), batch_size, num_workers, lambda rows: torch.stack([load(i) for i in rows]))
    yield from ((rows, experts.to(device)) for rows, experts in before)
    for rows, pixels in () if before else loaded:
        experts = model.encode_image(pixels.to(device))
        kept.append((rows, experts.to("cpu", host_dtype(model))))
        budget -= kept[-1][1].nbytes
        if budget < 0:
            kept.clear()
        yield rows, experts


def match_logits(model: ManagerTower, texts: TextExperts, images: Tensor, pairs: Tensor, batch_size: int) -> Tensor:
    """ITM logit "match" (P,) on the CPU of pairs (P, 2) = (caption, place in this batch of image experts)."""
    scores, device = [torch.empty(0)], images.device
    for pair in pairs.split(batch_size):
        captions, place = pair[:, 0].unique(return_inverse=True)  # pairs are sorted by caption: few distinct ones
        mask = texts.attention_mask[pair[:, 0]].to(device)
        pooled = model.fuse(texts[captions][place.to(device)], images[pair[:, 1].to(device)], mask).pooled
        scores.append(model.heads["itm"](pooled)[:, 1].float().cpu())
    return torch.cat(scores)


def retrieval_scores(model: ManagerTower, load: Callable, num_images: int, input_ids: Tensor, attention_mask: Tensor,
                     k_test: int = 128, texts_per_image: int | None = None, batch_size: int = 64,
                     memory_gb: float = 16.0, num_workers: int = 0) -> Tensor:
    """ITM scores (I, M) of I images and M captions, the same on every process; -100 where a pair was not re-ranked.

    load(i) is image i, (3, S, S); input_ids, attention_mask: (M, L). One pass gives experts and ITC vectors; then the
    ITM head scores the k_test most similar images of each caption and the texts_per_image (None: k_test) most similar
    captions of each image. A pair that both choose is scored once (officially twice, and the maximum taken). Each
    process re-ranks its images, in full batches, and keeps at most memory_gb of experts in host memory; captions or
    images that do not fit are encoded again. Without an ITC head every pair is scored. ValueError without an ITM head.
    """
    if "itm" not in model.heads:
        raise ValueError(f"retrieval needs a model with an ITM head; this one has {', '.join(model.config.heads)}")
    with evaluating(model):
        texts = TextExperts(model, input_ids, attention_mask, batch_size, memory_gb * 2**30)
        experts = functools.partial(image_experts, model, load, num_images, batch_size, num_workers, texts.free, [])
        chosen, scored = torch.full((num_images, len(input_ids)), "itc" not in model.heads), []
        if "itc" in model.heads:
            vectors = collect([(rows[0], unit_vectors(model, "image", batch)) for rows, batch in experts()])
            similarity = torch.cat(vectors) @ torch.cat(texts.vectors).T
            for dim, k in ((0, k_test), (1, k_test if texts_per_image is None else texts_per_image)):
                chosen.scatter_(dim, similarity.topk(min(k, similarity.shape[dim]), dim=dim).indices, True)
        elif ranks()[0] == 0:
            print(f"note: without an ITC head all {chosen.numel()} pairs are scored")
        for rows, batch in experts():
            wanted = chosen[rows.start : rows.stop]
            pairs, local = wanted.T.nonzero(), torch.empty(wanted.shape)  # (caption, image), sorted by caption
            local[pairs[:, 1], pairs[:, 0]] = match_logits(model, texts, batch, pairs, batch_size)
            scored.append((rows[0], local[wanted]))
        return torch.full(chosen.shape, -100.0).masked_scatter_(chosen, torch.cat(collect(scored)))


def recall(scores: Tensor, image_index: Tensor) -> dict:
    """R@1/5/10 of image (ir) and text retrieval (tr), their mean and sum; scores (I, M), each caption's image (M,)."""
    own, metrics = image_index[None] == torch.arange(len(scores))[:, None], {}
    for name, dim in (("ir", 0), ("tr", 1)):
        for k in (1, 5, 10):
            best = scores.topk(min(k, scores.shape[dim]), dim=dim).indices
            metrics[f"{name}_r{k}"] = own.gather(dim, best).any(dim).double().mean().item()
    return {**metrics, "rmean": sum(metrics.values()) / 6, "rsum": sum(metrics.values())}


# ---------------------------------------------------------------- Figures of the managers
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


def visual_manager_statistics(model: llava_manager.LlavaManager, prompts: list[tuple]) -> dict:
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


# ---------------------------------------------------------------- Loading and writing
def is_mllm(checkpoint: str) -> bool:
    """Whether a checkpoint folder holds LLaVA-OV-Manager (ours or an official one) and not a two-tower model."""
    text = file.read_text() if (file := Path(checkpoint) / "config.json").is_file() else ""
    if '"model"' not in text and '"mm_projector_type"' not in text:
        what = "is no checkpoint folder of ours" if Path(checkpoint).exists() else "does not exist"
        raise ValueError(f"--checkpoint {checkpoint} {what}; official ManagerTower weights become one by: "
                         f"python prepare.py weights --source {checkpoint} --tokenizer ROBERTA --out FOLDER")
    return '"LlavaManager"' in text or '"mm_projector_type"' in text


def load_two_tower(checkpoint: str, head: str = "", device: str = "auto") -> tuple:
    """(model, tokenizer, image transform) of a ManagerTower folder; ValueError if it lacks the head that is needed."""
    if is_mllm(checkpoint):
        raise ValueError(f"{checkpoint} is a LLaVA-OV-Manager, for eval.py chat, managers and grid")
    model = load_model(checkpoint).to(World(device).device)
    if head and head not in model.heads:
        raise ValueError(f"{checkpoint} has no {head} head, only {', '.join(model.heads)}")
    # the papers pre-train with CLIP's centre crop and fine-tune with squashed pictures
    transform = data.image_transform("clip" if "mlm" in model.heads else "albef", model.config.image_size, False)
    return model, data.load_tokenizer(checkpoint), transform


def load_mllm(checkpoint: str, tokenizer: str = "", device: str = "auto") -> tuple:
    """(model, tokenizer) of a LLaVA-OV-Manager folder, in bf16 on CUDA."""
    if not is_mllm(checkpoint):
        raise ValueError(f"{checkpoint} is not a LLaVA-OV-Manager; eval.py ask, match, search and managers take it")
    device = World(device).device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return llava_manager.load_model(checkpoint, dtype).to(device).eval(), data.load_tokenizer(tokenizer or checkpoint)


def open_dataset(model, tokenizer, transform, task: str, checkpoint: str, demo: str, data_root: str, split: str):
    """The PairDataset of a task's split below data_root, or with demo="demo" of the built-in held-out scenes."""
    if task not in KIND or demo not in ("", "demo") or bool(demo) == bool(data_root):
        raise ValueError(f"give --task ({', '.join(KIND)}) and either --data demo or --data_root FOLDER")
    kind, config = KIND[task], model.config
    source = (data.demo_source(kind, "heldout", 512, image_size=config.image_size) if demo else
              data.open_source(kind, data_root, split, (task,)))
    answers = data.load_answers(checkpoint) if "vqa" in model.heads else None
    return data.PairDataset(source, tokenizer, transform, config.max_text_len, answers=answers)


def encode_texts(tokenizer, texts: list[str], max_text_len: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, max_text_len), as in training; says what was cut. ValueError for an empty text."""
    for text in texts:
        if not text.strip():
            raise ValueError("the text is empty; write a question or a sentence")
        if (length := len(tokenizer.encode(text))) > max_text_len:
            print(f"note: {text[:40]!r}... has {length} tokens and was cut to the model's text length {max_text_len}")
    return tokenizer(texts, max_text_len)


def open_picture(checkpoint: str, head: str, image: str, texts: list[str], device: str) -> tuple:
    """(model, a batch of one picture and B texts on its device)."""
    model, tokenizer, transform = load_two_tower(checkpoint, head, device)
    ids, mask = encode_texts(tokenizer, texts, model.config.max_text_len)
    batch = {"pixels": transform(data.load_image(image), None)[None], "input_ids": ids, "attention_mask": mask}
    return model, {k: v.to(next(model.parameters()).device) for k, v in batch.items()}


def write(path: str | Path, content):
    """Write a picture as PNG, anything else as JSON, atomically; ValueError if that fails."""
    text = "" if isinstance(content, Image.Image) else json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    save = (lambda file: file.write_text(text, encoding="utf-8")) if text else (lambda file: content.save(file, "PNG"))
    try:
        write_atomically(path, save)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error})") from error
    print(f"written: {path}")


def contact_sheet(items: list[tuple], columns: int = 4, side: int = 224) -> Image.Image:
    """(picture, label) pairs in rows."""
    sheet = Image.new("RGB", (min(columns, len(items)) * side, math.ceil(len(items) / columns) * (side + 16)), "white")
    for i, (picture, label) in enumerate(items):
        x, y = i % columns * side, i // columns * (side + 16)
        sheet.paste(ImageOps.contain(picture, (side - 8, side - 8)), (x + 4, y + 4))
        ImageDraw.Draw(sheet).text((x + 4, y + side - 2), label[:36], fill="black")
    return sheet


def print_table(title: str, metrics: dict, paper: dict):
    print(f"{title:<40}{'here':>10}   paper")
    rows = list(metrics.items())
    for name, value in rows:
        if isinstance(value, dict):
            rows += [(f"{name} {key}", v) for key, v in value.items()]
        else:
            number = f"{100 * value:.2f}" if isinstance(value, float) else value
            print(f"  {name.replace('per_', ''):<38}{number:>10}   {paper.get(name, '-')}")


# ---------------------------------------------------------------- Commands; their parameters are their flags (see main)
def run_task(task: str, checkpoint: str, data: str = "", data_root: str = "", split: str = "", submit: str = "",
             annotations: str = "", batch_size: int = 64, k_test: int = 128, memory_gb: float = 16.0,
             num_workers: int = 0, out: str = "", device: str = "auto"):
    """Evaluate a task: the papers' metrics as a table and in eval.json; --submit FILE writes VQA answers for EvalAI,
    --annotations FILE (v2_mscoco_val2014_annotations.json) gives the official VQA accuracy."""
    if task not in KIND or (task != "vqav2" and (submit or annotations)):
        raise ValueError(f"--task is one of {', '.join(KIND)}; --submit and --annotations are for vqav2")
    given = read_annotations(annotations) if annotations else None
    loaded = load_two_tower(checkpoint, "itm" if KIND[task] == "captions" else KIND[task], device)
    report, first = {"checkpoint": checkpoint, "task": task, "splits": {}}, ranks()[0] == 0
    for name in ["demo"] if data else (split or SPLITS[task]).split(","):
        dataset = open_dataset(*loaded, task, checkpoint, data, data_root, name)
        if task == "vqav2":
            predictions = predict(loaded[0], dataset, task, batch_size, num_workers)
            metrics, answers = accuracy(predictions), list(dataset.answers)
            results = [{"question_id": p.question_id, "answer": answers[p.choice]} for p in predictions]
            if given:
                metrics["official"] = official_vqa_accuracy(results, given)
            if submit and first:
                write(submit, results)
        else:
            metrics = evaluate(loaded[0], dataset, task, batch_size, num_workers, k_test, memory_gb)
        report["splits"][name] = metrics
        if first:
            print_table(f"{task} {name}", metrics, {} if data else PAPER.get(f"{task} {name}", PAPER.get(task, {})))
    if first:
        write(out or f"{checkpoint}/eval.json", report)


def ask(checkpoint: str, image: str, question: str, top: int = 5, device: str = "auto") -> list[tuple[str, float]]:
    """Answer a question about a picture: the best answers and their probabilities (sigmoids, as in VQA's loss)."""
    model, batch = open_picture(checkpoint, "vqa", image, [question], device)
    answers = data.load_answers(checkpoint)
    with evaluating(model):
        best = class_logits(model, "vqa", batch)[0].float().sigmoid().topk(min(top, len(answers)))
    found = [(answers[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist())]
    print(*(f"{probability:8.2%}  {answer}" for answer, probability in found), sep="\n")
    return found


def match(checkpoint: str, image: str, text: list, device: str = "auto") -> list[tuple]:
    """How well texts fit a picture: ITM probability and, with an ITC head, cosine similarity."""
    model, batch = open_picture(checkpoint, "itm", image, text, device)
    mask, itc = batch["attention_mask"], [math.nan] * len(text)
    with evaluating(model):
        texts = model.encode_text(batch["input_ids"], mask)
        images = model.encode_image(batch["pixels"]).expand(len(texts), -1, -1, -1)
        itm = model.heads["itm"](model.fuse(texts, images, mask).pooled).float().softmax(-1)[:, 1].tolist()
        if "itc" in model.heads:
            itc = (unit_vectors(model, "text", texts) * unit_vectors(model, "image", images)).sum(-1).tolist()
    found = list(zip(text, itm, itc))
    print(*(f"ITM {probability:8.2%}   ITC {cosine:+.3f}   {line}" for line, probability, cosine in found), sep="\n")
    return found


def search(checkpoint: str, text: str, folder: str, top: int = 12, out: str = "search.png", k_test: int = 128,
           batch_size: int = 32, memory_gb: float = 4.0, device: str = "auto") -> list[tuple]:
    """Find the pictures of a folder that fit a text best, and draw them on a contact sheet."""
    model, tokenizer, transform = load_two_tower(checkpoint, "itm", device)
    ids, mask = encode_texts(tokenizer, [text], model.config.max_text_len)
    files = []
    for file in sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in Image.registered_extensions()):
        try:
            data.load_image(file)
            files.append(file)
        except data.BadSample as error:
            print(f"left out: {error}")
    if not files:
        raise ValueError(f"there is no readable picture in {folder}")
    pictures = (lambda i: transform(data.load_image(files[i]), None)), len(files)
    scores = retrieval_scores(model, *pictures, ids, mask, k_test, 0, batch_size, memory_gb)[:, 0]
    best = scores.topk(min(top, k_test, len(files)))
    found = [(score, files[i]) for score, i in zip(best.values.tolist(), best.indices.tolist())]
    print(*(f"{score:8.3f}  {file}" for score, file in found), sep="\n")
    write(out, contact_sheet([(data.load_image(file), f"{score:.2f}: {file.name}") for score, file in found]))
    return found


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


def encode_turns(model, tokenizer, turns: list[str], files: list | None) -> tuple[list[int], list]:
    """Input ids and tiles of a conversation about pictures."""
    images = [data.load_image(file) for file in files or ()]
    tiles = [llava_manager.preprocess_image(image, model.config, len(images) > 1) for image in images]
    return llava_manager.encode_prompt(turns, tokenizer, len(tiles)), tiles


def chat(checkpoint: str, image: list = None, question: str = None, temperature: float = 0.0, top_p: float = 1.0,
         max_new_tokens: int = 256, tokenizer: str = "", device: str = "auto") -> list[str]:
    """Talk with a LLaVA-OV-Manager about pictures; without --question line by line, until an empty one."""
    model, tokenizer = load_mllm(checkpoint, tokenizer, device)
    turns = []
    with contextlib.suppress(EOFError):
        for line in iter(lambda: input("> "), "") if question is None else [question]:
            if not line.strip():
                raise ValueError("the question is empty")
            ids, tiles = encode_turns(model, tokenizer, [*turns, line], image)
            new = model.generate(torch.tensor([ids]), None, tiles, max_new_tokens, temperature, top_p)[0].tolist()
            turns += [line, tokenizer.decode([token for token in new if token not in model.config.eos_ids]).strip()]
            print(turns[-1])
    return turns


def grid(image: str, checkpoint: str = "", out: str = "grid.png") -> dict:
    """Draw what LLaVA-OV-Manager (default: the paper's) sees: base tile, grid with padding in red, token counts."""
    config = llava_manager.load_model(checkpoint).config if checkpoint else llava_manager.LlavaManagerConfig()
    tiles, s, n = llava_manager.preprocess_image(data.load_image(image), config), config.image_size, config.side
    pixels = ((tiles.pixels * 0.5 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (T, s, s, 3)
    panels, info = [pixels[0]], {"picture": tiles.size, "tiles": (len(pixels),), "tokens of the base tile": (n * n,)}
    if len(pixels) > 1:
        (columns, rows), keep, (h, w) = llava_manager.grid_geometry(tiles.size, config)
        whole = pixels[1:].reshape(rows, columns, s, s, 3).swapaxes(1, 2).reshape(rows * s, columns * s, 3)
        padding = np.ones((rows * n, columns * n), dtype=bool)
        padding[keep] = False
        padding = np.asarray(Image.fromarray(padding).resize((columns * s, rows * s)))
        whole[padding] = whole[padding] // 2 + np.uint8([110, 0, 0])
        whole[s::s] = whole[:, s::s] = 255, 0, 0
        panels, info["grid of tiles"] = [*panels, whole], (columns, rows)
        info["patches without padding"] = tuple(k.stop - k.start for k in reversed(keep))
        info["tokens of the grid, with newlines"] = (w + 1, h)
    info["tokens"] = (llava_manager.count_image_tokens(len(pixels), tiles.size, config),)
    text = "\n".join(f"{name}: {' x '.join(map(str, value))}" for name, value in info.items())
    print(text)
    sheet = Image.new("RGB", (sum(len(p[0]) + 8 for p in panels) + 228, max(len(panels[-1]), 120) + 16), "white")
    for i, panel in enumerate(panels):
        sheet.paste(Image.fromarray(panel), (8 + i * (s + 8), 8))
    ImageDraw.Draw(sheet).multiline_text((sheet.width - 220, 8), text, fill="black")
    write(out, sheet)
    return info


COMMANDS = {"": run_task, **{f.__name__: f for f in (ask, match, search, managers, chat, grid, curves)}}


def main(argv: list[str]):
    """eval.py [command] --flag value ...; a list is given by repeating its flag."""
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    if name not in COMMANDS:
        raise ValueError(f"eval.py has no command {name!r}, only {', '.join(list(COMMANDS)[1:])}, or none and --task")
    parser = argparse.ArgumentParser(f"eval.py {name}", description=COMMANDS[name].__doc__, allow_abbrev=False)
    for flag in inspect.signature(COMMANDS[name]).parameters.values():
        how = {"action": "append"} if flag.annotation is list else {"type": flag.annotation}
        how |= {"required": True} if flag.default is flag.empty else {"default": flag.default, "help": "%(default)r"}
        parser.add_argument(f"--{flag.name}", **how)
    COMMANDS[name](**vars(parser.parse_args(argv[len(name) > 0 :])))


if __name__ == "__main__":
    one_sentence(main)
