"""eval.py"""
from collections.abc import Callable
from pathlib import Path
from torch import Tensor
from torch.nn import functional as F
from typing import NamedTuple
import data
import functools
import json
import math
import torch
from data import PairDataset, batches
from files import save_json
from metrics import mean_by, official_vqa_accuracy, recall
from model import ManagerTower
from objectives import class_logits
from tasks import TASKS
from weights import load_two_tower
from world import collect, evaluating, ranks


class Prediction(NamedTuple):
    choice: int  # argmax
    score: float | None  # VQA: soft score of the choice, else 1 or 0; None without labels
    question_id: int | None = None
    question_type: str | None = None


def predict(model: ManagerTower, dataset, task: str, batch_size: int = 64, num_workers: int = 0) -> list[Prediction]:
    """The predictions for all rows of vqav2, nlvr2 or snli_ve, in their order, complete on every process."""
    parts, kind = [], TASKS[task].heads[0]
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


def accuracy(predictions: list[Prediction]) -> dict:
    """{"accuracy", "count", "per_question_type" where there are types}; only the count without labels."""
    scores = [p.score for p in predictions]
    if None in scores:
        return {"count": len(scores)}
    types = mean_by(scores, [p.question_type for p in predictions])
    metrics = {"accuracy": math.fsum(scores) / len(scores), "count": len(scores)}
    return metrics | {"per_question_type": types} if types else metrics


def evaluate(model: ManagerTower, dataset: PairDataset, task: str, batch_size: int = 64, num_workers: int = 0,
             k_test: int = 128, memory_gb: float = 16.0) -> dict:
    """Metrics of a task (a key of KIND): accuracy, or recall with re-ranking. To be called by all processes."""
    if not TASKS[task].is_retrieval:
        return accuracy(predict(model, dataset, task, batch_size, num_workers))
    source, texts = dataset.source, dataset.source.texts()
    ids, mask = dataset.tokenizer([row["text"] for row in texts], dataset.max_text_len)
    pictures = (lambda i: dataset.transform(source.images(i)[0], None)), source.num_images
    scores = retrieval_scores(model, *pictures, ids, mask, k_test, None, batch_size, memory_gb, num_workers)
    metrics = recall(scores, torch.tensor([row["image_index"] for row in texts]))
    return metrics | {"images": source.num_images, "texts": len(texts)}


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


def print_table(title: str, metrics: dict, paper: dict):
    print(f"{title:<40}{'here':>10}   paper")
    rows = list(metrics.items())
    for name, value in rows:
        if isinstance(value, dict):
            rows += [(f"{name} {key}", v) for key, v in value.items()]
        else:
            number = f"{100 * value:.2f}" if isinstance(value, float) else value
            print(f"  {name.replace('per_', ''):<38}{number:>10}   {paper.get(name, '-')}")


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
