"""Fine-tuning on VQAv2, NLVR2, SNLI-VE, Flickr30K or COCO (ManagerTower, ACL 2023, section 4), in train.py's loop.

    python finetune.py --task vqav2 --data demo --init out/demo
    torchrun --standalone --nproc_per_node 8 finetune.py --task vqav2 --data_root D --init out/pretrain
    ... --init unimodal --vision CLIP --text ROBERTA     (without vision-language pre-training)
    ... --init official:mt_pretrain.ckpt --tokenizer ROBERTA     (the authors' checkpoint)
"""
import argparse
import dataclasses
import functools
import math
import typing
from collections import Counter, defaultdict
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

import data
import train
from eval import KIND, class_logits, evaluate
from model import ManagerTower, load_model
from prepare import prepare_weights, write_json
from train import Checkpoint, Task, TrainConfig, World, contrastive_losses, fit, one_sentence, param_groups

HEADS = {"vqa": ("vqa",), "nlvr2": ("nlvr2",), "snli_ve": ("snli_ve",), "captions": ("itm", "itc")}


@dataclasses.dataclass
class FinetuneConfig(TrainConfig):
    """One fine-tuning run."""
    hidden: typing.ClassVar[set[str]] = TrainConfig.hidden | {"datasets", "objectives", "share_images"}
    min_steps: typing.ClassVar[int] = 0
    max_steps: int = 0  # 0 = as many as the epochs take
    epochs: float = 10.0
    init: str = ""  # a checkpoint folder | unimodal | official:FILE.ckpt, or a folder of transformers' BridgeTower
    data: str = ""  # demo = the built-in data, of which eval_size records are held out
    train_split: str = "train"
    eval_split: str = "val"
    k_test: int = 128  # retrieval: candidates to re-rank
    model: str = "base"  # the preset of --init unimodal
    transform: str = "albef_randaug_wc"
    micro_batch_size: int = 8
    lr_mult_cross_modal: float = 5.0
    num_workers: int = 8
    save_every: int = 500
    eval_every: int = 0


# Fields of the run and of the model: the paper's values, and the released scripts' but for one comment.
RETRIEVAL = {"batch_size": 512, "learning_rate": 6e-6, "lr_mult_head": 5.0, "image_size": 384, "max_text_len": 40,
             "eval_split": "test"}
TASKS = {
    # the papers train on val too: rest_val, a part of it, only shows that the run learns. Script: batch 504, warmup 0.1
    "vqav2": {"epochs": 10, "batch_size": 576, "learning_rate": 9e-6, "weight_decay": 0.06, "warmup": 0.06,
              "lr_mult_head": 50.0, "transform": "albef_randaug_wohf", "image_size": 576, "head_hidden_scale": 2,
              "train_split": "train+val", "eval_split": "rest_val"},
    "snli_ve": {"epochs": 4, "batch_size": 64, "learning_rate": 3e-6, "warmup": 0.06, "lr_mult_head": 10.0,
                "image_size": 384, "head_hidden_scale": 2, "eval_split": "dev"},
    "nlvr2": {"epochs": 5, "batch_size": 256, "learning_rate": 1.4e-5, "lr_mult_head": 10.0, "image_size": 384,
              "eval_split": "dev"},
    "flickr30k": {"epochs": 20, **RETRIEVAL},
    "coco": {"epochs": 10, **RETRIEVAL},  # not in the papers
}
UNIMODAL = {"vqav2": {"batch_size": 512, "learning_rate": 2e-5, "weight_decay": 0.01, "warmup": 0.1,
                      "head_hidden_scale": 1}}  # what --init unimodal changes, as in the paper and its script
DEMO = {"batch_size": 64, "micro_batch_size": 64, "learning_rate": 5e-4, "lr_mult_head": 1.0,
        "lr_mult_cross_modal": 1.0, "weight_decay": 0.01, "warmup": 0.1, "max_steps": 500, "transform": "albef",
        "num_workers": 0, "log_every": 20, "save_every": 100, "k_test": 16}  # minutes on a CPU
DEMO_STEPS = {"vqav2": {"max_steps": 1000}}  # a question's step is cheap, and there are six kinds of them


def recipe(name: str, init: str, source: str) -> tuple[FinetuneConfig, dict]:
    """The defaults of a task: the run, and the fields of the model that it changes."""
    values = {"out_dir": f"out/{name}"} | TASKS[name] | (UNIMODAL.get(name, {}) if init == "unimodal" else {})
    of_run = {f.name for f in dataclasses.fields(FinetuneConfig)}
    values |= DEMO | DEMO_STEPS.get(name, {}) if source == "demo" else {}
    run = FinetuneConfig(**{k: v for k, v in values.items() if k in of_run})
    return run, {k: v for k, v in values.items() if k not in of_run and source != "demo"}


# ---------------------------------------------------------------- objectives
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
    """ITC, and ITM with hard negatives from all processes; other captions of a picture are no negatives."""

    def counts(self, batch: dict) -> dict[str, int]:
        return {"itc": len(batch["input_ids"]), "itm": 3 * len(batch["input_ids"])}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        mask = batch["attention_mask"]
        texts, images = self.model.encode_text(batch["input_ids"], mask), self.model.encode_image(batch["pixels"])
        return contrastive_losses(self.model, texts, images, mask, self.negatives, batch["image_index"])


def rank_loss(model: ManagerTower, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The older retrieval objective: cross-entropy of the head "retrieval" over the true caption, the first, and false
    ones. pixels (B, 3, S, S); input_ids and attention_mask (B, F, L)."""
    ids, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
    images = model.encode_image(pixels).repeat_interleave(input_ids.shape[1], 0)
    scores = model.heads["retrieval"](model.fuse(model.encode_text(ids, mask), images, mask).pooled)
    return F.cross_entropy(scores.view(input_ids.shape[:2]), ids.new_zeros(len(pixels)).long())


# ---------------------------------------------------------------- what is known without looking at the picture
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


def baselines(kind: str, source: data.Source, heldout: data.Source) -> dict[str, dict]:
    if kind == "captions":
        return {"chance": {f"{d}_r{k}": min(1.0, k / heldout.num_images) for d in ("ir", "tr") for k in (1, 5, 10)}}
    return {name: {"accuracy": value} for name, value in text_only_guess(source, heldout).items()}


# ---------------------------------------------------------------- running
def find_tokenizer(run: FinetuneConfig) -> data.Tokenizer:
    """--tokenizer, or the one in --init's folder, or with --init unimodal the one beside --text."""
    if run.tokenizer or run.init == "unimodal":
        return train.find_tokenizer(run, None)
    try:
        return data.load_tokenizer(run.init.removeprefix("official:"))
    except ValueError as error:
        raise ValueError(f"--init {run.init}: {error}; or give --tokenizer") from None


def initial_model(run: FinetuneConfig, fields: dict, tokenizer: data.Tokenizer, world: World) -> ManagerTower:
    """What --init says, with the `fields` of its config replaced (heads among them)."""
    if run.init == "unimodal":
        return train.make_model(run, fields, tokenizer)
    folder = Path(run.init)
    if run.init.startswith("official:"):
        folder = Path(run.out_dir) / "official"
        if world.rank == 0:
            try:
                prepare_weights(Path(run.init.removeprefix("official:")), folder)
            except OSError as error:
                raise ValueError(f"--init {run.init}: {error}") from error
        world.barrier()
    train.seed_all(run.seed, "model")  # the new heads
    model = load_model(folder, **fields)
    c = model.config
    if tokenizer.vocab_size > c.vocab_size or tokenizer.pad_id != c.pad_token_id:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids and pad id {tokenizer.pad_id}, but {run.init} "
                         f"{c.vocab_size} and {c.pad_token_id}: give its own with --tokenizer")
    model.set_checkpointing(run.checkpointing)
    return model


def open_sources(run: FinetuneConfig, name: str, image_size: int) -> tuple[data.Source, data.Source]:
    if run.data == "demo":
        demo = functools.partial(data.demo_source, KIND[name], seed=run.seed, image_size=image_size)
        return demo("train", 20_000), demo("heldout", run.eval_size)
    return (data.open_source(KIND[name], run.data_root, run.train_split, (name,), run.on_bad_sample),
            data.open_source(KIND[name], run.data_root, run.eval_split, (name,)))


def save_extras(tokenizer: data.Tokenizer, answers: list[str], folder: Path):
    tokenizer.save(folder)
    if answers:
        write_json(folder / "answers.json", answers)


def measure(model: ManagerTower, dataset: data.PairDataset, name: str, run: FinetuneConfig) -> dict[str, float]:
    """The task's metrics and their "score". Without gradients more fits into memory than a micro-batch."""
    found = evaluate(model, dataset, name, max(64, run.micro_batch_size), run.num_workers, run.k_test)
    score = found.get("rmean", found.get("accuracy"))
    if score is None:
        raise ValueError(f"--eval_split {run.eval_split} of {name} has no labels, so nothing can be measured on it")
    return {k: v for k, v in found.items() if isinstance(v, float)} | {"score": score}


def finetune(name: str, run: FinetuneConfig, fields: dict, world: World):
    kind, tokenizer = KIND[name], find_tokenizer(run)
    answers = [] if kind != "vqa" else data.DEMO_ANSWERS if run.data else data.load_answers(run.data_root)
    fields = fields | {"heads": HEADS[kind]} | ({"num_answers": len(answers)} if answers else {})
    model = initial_model(run, fields, tokenizer, world).to(world.device)
    c = model.config
    source, heldout = open_sources(run, name, c.image_size)
    run = dataclasses.replace(run, max_steps=run.max_steps or math.ceil(run.epochs * len(source) / run.batch_size))
    view = functools.partial(data.image_transform, run.transform, c.image_size)
    dataset = data.PairDataset(source, tokenizer, view(True), c.max_text_len, run.seed, run.on_bad_sample, answers)
    eval_set = data.PairDataset(heldout, tokenizer, view(False), c.max_text_len, answers=answers)
    evaluated = functools.partial(measure, model, eval_set, name, run)
    checkpoint = Checkpoint(run, model, functools.partial(save_extras, tokenizer, answers),
                            {"task": name, "config": dataclasses.asdict(c)}, world)
    seen = not run.data and run.eval_split == "rest_val" and "val" in run.train_split.split("+")
    world.print(f"{name}: {len(source)} rows to train on, {len(heldout)} to measure on, from {run.init}"
                + seen * ". rest_val is a part of val: it is held out only with --train_split train+trainable_val")
    untrained, job = evaluated(), Retrieval(model) if kind == "captions" else Classification(model, kind)
    if fit(run, job, dataset, evaluated, checkpoint, world, param_groups(model, run)) and world.rank == 0:
        known = {"untrained": untrained, **baselines(kind, source, heldout)}
        train.summarize(run, checkpoint, known, [f"python eval.py --task {name} --checkpoint {run.out_dir} "
                        + ("--data demo" if run.data else f"--data_root {run.data_root}")])


def main(argv: list[str]):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # the defaults depend on these two
    for flag in ("--init", "--data"):
        parser.add_argument(flag, default="")
    given = parser.parse_known_args(argv)[0]
    name, run, fields = train.parse_args(argv, {name: recipe(name, given.init, given.data) for name in TASKS}, "task")
    if run.data not in ("", "demo") or bool(run.data) == bool(run.data_root):
        raise ValueError("say where the data are: --data_root FOLDER, or --data demo for the built-in ones")
    if not run.init:
        raise ValueError("say what to start from: --init CHECKPOINT, --init official:FILE.ckpt, or --init unimodal")
    if [bool(run.vision), bool(run.text)] != [run.init == "unimodal"] * 2:
        raise ValueError("--init unimodal needs --vision and --text, the two encoders; any other --init has its own")
    finetune(name, run, fields, World(run.device))


if __name__ == "__main__":
    one_sentence(main)
