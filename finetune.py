"""Fine-tuning on VQAv2, NLVR2, SNLI-VE, and Flickr30K or COCO retrieval: ManagerTower section 4 (ACL 2023), on train.py's loop.

    python finetune.py --task vqav2 --data demo --init out/demo
    torchrun --standalone --nproc_per_node 8 finetune.py --task vqav2 --data_root D --init out/pretrain
    ... --init unimodal --vision CLIP --text ROBERTA     (without vision-language pre-training)
    ... --init official:mt_pretrain.ckpt --tokenizer ROBERTA     (the authors' checkpoint)
"""
import dataclasses
import functools
import json
import math
import sys
import typing
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import data
import train
from eval import KIND, class_logits, evaluate
from model import ManagerTower, load_model, write_atomically
from prepare import prepare_weights
from train import Checkpoint, Task, TrainConfig, World, contrastive_losses, fit, one_sentence, param_groups, parse_args

HEADS = {"vqa": ("vqa",), "nlvr2": ("nlvr2",), "snli_ve": ("snli_ve",), "captions": ("itm", "itc")}


@dataclass
class FinetuneConfig(TrainConfig):
    """One fine-tuning run. max_steps 0 is as many as `epochs` take."""
    min_steps: typing.ClassVar[int] = 0
    max_steps: int = 0
    epochs: float = 10.0
    init: str = ""  # a checkpoint folder | unimodal | official:<.ckpt or folder made by prepare.py>
    data: str = ""  # demo = the built-in data
    train_split: str = "train"
    eval_split: str = "val"
    k_test: int = 128  # retrieval: candidates to re-rank
    model: str = "base"
    weight_decay: float = 0.01
    lr_mult_cross_modal: float = 5.0
    num_workers: int = 8
    log_every: int = 50
    save_every: int = 500
    eval_every: int = 0


def task(**fields) -> tuple[FinetuneConfig, dict]:
    """A row of the table: fields of the run, and of the model where they have its names."""
    run = {k: v for k, v in fields.items() if k in {f.name for f in dataclasses.fields(FinetuneConfig)}}
    return FinetuneConfig(**run), {k: v for k, v in fields.items() if k not in run}


# The papers' values; where the released script differs, it is named. No horizontal flip for VQA ("wohf").
TASKS = {
    "vqav2": task(out_dir="out/vqav2", epochs=10, batch_size=576, micro_batch_size=8, learning_rate=9e-6, weight_decay=0.06,
                  warmup=0.06, lr_mult_head=50.0, transform="albef_randaug_wohf", train_split="train+val",  # script: 504, 0.1
                  image_size=576, head_hidden_scale=2),
    "snli_ve": task(out_dir="out/snli_ve", epochs=4, batch_size=64, micro_batch_size=8, learning_rate=3e-6, warmup=0.06,
                    lr_mult_head=10.0, transform="albef_randaug_wc", eval_split="dev", image_size=384, head_hidden_scale=2),
    "nlvr2": task(out_dir="out/nlvr2", epochs=5, batch_size=256, micro_batch_size=8, learning_rate=1.4e-5, lr_mult_head=10.0,
                  transform="albef_randaug_wc", eval_split="dev", image_size=384),
    "flickr30k": task(out_dir="out/flickr30k", epochs=20, batch_size=512, micro_batch_size=8, learning_rate=6e-6, lr_mult_head=5.0,
                      transform="albef_randaug_wc", eval_split="test", image_size=384, max_text_len=40),
    "coco": task(out_dir="out/coco", epochs=10, batch_size=512, micro_batch_size=8, learning_rate=6e-6, lr_mult_head=5.0,
                 transform="albef_randaug_wc", eval_split="test", image_size=384, max_text_len=40),
}
# what replaces them on the built-in data: minutes on a CPU
DEMO = {"batch_size": 64, "micro_batch_size": 64, "learning_rate": 1e-3, "lr_mult_head": 1.0, "lr_mult_cross_modal": 1.0,
        "weight_decay": 0.01, "warmup": 0.1, "max_steps": 400, "transform": "albef", "num_workers": 0, "log_every": 20, "save_every": 100,
        "k_test": 16}


class Classification(Task):
    """VQA: binary cross-entropy summed over the answers; NLVR2 and SNLI-VE: cross-entropy."""

    def __init__(self, model: ManagerTower, kind: str):
        super().__init__(model)
        self.kind = kind

    def counts(self, batch: dict) -> dict[str, int]:
        return {self.kind: len(batch["input_ids"])}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        logits = class_logits(self.model, self.kind, batch).float()
        if self.kind == "vqa":  # official: mean over everything, times the number of answers
            return {"vqa": F.binary_cross_entropy_with_logits(logits, batch["targets"], reduction="sum")}
        return {self.kind: F.cross_entropy(logits, batch["label"], reduction="sum")}


class Retrieval(Task):
    """ITC, and ITM with hard negatives of the micro-batches of all processes; other captions of a picture are no negatives."""

    def counts(self, batch: dict) -> dict[str, int]:
        return {"itc": len(batch["input_ids"]), "itm": 3 * len(batch["input_ids"])}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        mask = batch["attention_mask"]
        texts, images = self.model.encode_text(batch["input_ids"], mask), self.model.encode_image(batch["pixels"])
        return contrastive_losses(self.model, texts, images, mask, self.negatives, batch["image_index"])


def rank_loss(model: ManagerTower, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The older retrieval objective: cross-entropy of the rank head over the true caption, which is first, and false ones.

    pixels (B, 3, S, S); input_ids and attention_mask (B, F, L). Needs the head "retrieval".
    """
    ids, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
    images = model.encode_image(pixels).repeat_interleave(input_ids.shape[1], 0)
    scores = model.heads["retrieval"](model.fuse(model.encode_text(ids, mask), images, mask).pooled).view(input_ids.shape[:2])
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))


# ---------------------------------------------------------------------------------------------------------------------
# What is known without looking at the picture


def text_only_guess(source: data.Source, heldout: data.Source) -> dict[str, float]:
    """Accuracy of the commonest answer, and of the commonest answer to the very same text in the training data."""
    def answers(row: dict) -> dict:
        return (row["answers"] or {}) if source.task == "vqa" else {row["label"]: 1.0}
    by_text, overall = defaultdict(Counter), Counter()
    for row in source.texts():
        by_text[row["text"]].update(answers(row))
        overall.update(answers(row))
    totals, rows = Counter(), heldout.texts()
    for row in rows:
        for name, known in (("majority", overall), ("text_only", by_text.get(row["text"]) or overall)):
            totals[name] += answers(row).get(known.most_common(1)[0][0], 0.0)
    return {name: totals[name] / len(rows) for name in ("majority", "text_only")}


def baselines(task_name: str, source: data.Source, heldout: data.Source) -> dict[str, dict]:
    if KIND[task_name] == "captions":
        return {"chance": {f"{d}_r{k}": k / heldout.num_images for d in ("ir", "tr") for k in (1, 5, 10)}}
    return {name: {"accuracy": value} for name, value in text_only_guess(source, heldout).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Running


def initial_model(run: FinetuneConfig, fields: dict, tokenizer: data.Tokenizer, heads: dict, world: World) -> ManagerTower:
    if run.init == "unimodal":
        return train.make_model(run, fields, tokenizer, **heads)
    folder = run.init
    if run.init.startswith("official:"):
        source, folder = Path(run.init.removeprefix("official:")), Path(run.out_dir) / "official"
        if world.rank == 0:
            prepare_weights(source, folder, None, None)
        world.barrier()
    train.seed_all(run.seed, "model")
    model = load_model(folder, **fields, **heads)
    model.set_checkpointing(run.checkpointing)
    return model


def find_tokenizer(run: FinetuneConfig) -> data.Tokenizer:
    """--tokenizer, or the one of --init's folder, or the one beside --text."""
    for place in (run.tokenizer, run.init if Path(run.init).is_dir() else "", run.text):
        if place:
            return data.load_tokenizer(place)
    if run.data == "demo":
        return data.demo_tokenizer()
    raise ValueError("no tokenizer: give --tokenizer, a folder with tokenizer.json, or vocab.json and merges.txt")


def open_sources(run: FinetuneConfig, name: str, image_size: int) -> tuple[data.Source, data.Source]:
    kind = KIND[name]
    if run.data == "demo":
        return data.demo_source(kind, "train", 20_000, run.seed, image_size), data.demo_source(kind, "heldout", run.eval_size, run.seed, image_size)
    return (data.open_source(kind, run.data_root, run.train_split, (name,), run.on_bad_sample),
            data.open_source(kind, run.data_root, run.eval_split, (name,)))


def save_extras(tokenizer: data.Tokenizer, answers: list[str], folder: Path):
    tokenizer.save(folder)
    if answers:
        write_atomically(folder / "answers.json", lambda path: path.write_text(json.dumps(answers, ensure_ascii=False) + "\n"))


def finetune(name: str, run: FinetuneConfig, fields: dict, world: World):
    kind, tokenizer, heads = KIND[name], find_tokenizer(run), {"heads": HEADS[KIND[name]]}
    answers = [] if kind != "vqa" else data.DEMO_ANSWERS if run.data == "demo" else data.load_answers(run.data_root)
    if kind == "vqa":
        heads["num_answers"] = len(answers)
    model = initial_model(run, fields, tokenizer, heads, world).to(world.device)
    config = model.config
    source, heldout = open_sources(run, name, config.image_size)
    run = run if run.max_steps else dataclasses.replace(run, max_steps=math.ceil(run.epochs * len(source) / run.batch_size))
    make = functools.partial(data.PairDataset, tokenizer=tokenizer, max_text_len=config.max_text_len, seed=run.seed, answers=answers)
    train_set = make(source, transform=data.image_transform(run.transform, config.image_size, True), on_bad_sample=run.on_bad_sample)
    eval_set = make(heldout, transform=data.image_transform(run.transform, config.image_size, False))

    def measure() -> dict:
        with train.autocast(run, world.device):
            metrics = evaluate(model, eval_set, name, run.micro_batch_size, run.num_workers, run.k_test)
        return metrics | {"score": metrics["rmean"] if kind == "captions" else metrics["accuracy"]}

    checkpoint = Checkpoint(run, model, functools.partial(save_extras, tokenizer, answers),
                            {"task": name, "config": dataclasses.asdict(config)}, world)
    world.print(f"{name}: {len(source)} rows to train on, {len(heldout)} held out, {run.max_steps} steps from {run.init}")
    known = {"untrained": measure(), **baselines(name, source, heldout)}
    job = Retrieval(model) if kind == "captions" else Classification(model, kind)
    if fit(run, job, train_set, measure, checkpoint, world, param_groups(model, run)) and world.rank == 0:
        more = " --data demo" if run.data else f" --data_root {run.data_root}"
        train.summarize(run, checkpoint, known, [f"python eval.py --task {name} --checkpoint {run.out_dir}{more}"])


def main(argv: list[str]):
    demo = any(a == "--data" and b == "demo" for a, b in zip(argv, argv[1:])) or "--data=demo" in argv
    recipes = {name: (dataclasses.replace(run, **DEMO), {}) if demo else (run, fields) for name, (run, fields) in TASKS.items()}
    name, run, fields = parse_args(argv, recipes, "task")
    if run.data not in ("", "demo") or (run.data == "") == (run.data_root == ""):
        raise ValueError("say where the data are: --data_root FOLDER, or --data demo for the built-in ones")
    if not run.init:
        raise ValueError("say what to start from: --init CHECKPOINT, --init official:FILE.ckpt, or --init unimodal with --vision and --text")
    finetune(name, run, fields, World(run.device))


if __name__ == "__main__":
    one_sentence(main)
