"""The training recipes of LLaVA-OV-Manager (TCSVT 2025, section IV), on train.py's loop; train.py --recipe runs them.

    python train.py --recipe llava_demo [--manager_type none]                     # built-in scenes, a CPU is enough
    torchrun ... train.py --recipe llava_stage1 --vision SIGLIP --text QWEN2 --data_path captions.json --image_folder D
    torchrun ... train.py --recipe llava_stage1_5 --init out/llava_stage1 --data_path mixture.yaml --image_folder D
    torchrun ... train.py --recipe llava_stage2 --init out/llava_stage1_5 ...     # --grid false: without multi-grid

Stage 1 aligns the projector and the managers on captions; stages 1.5 and 2 train everything on conversations.
"""
import dataclasses
import functools
import math
import os
import re
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import data
import llava_manager as lm
from finetune import text_only_guess
from train import Checkpoint, Task, TrainConfig, World, autocast, fit, make_groups, seed_all, summarize, to_device


@dataclass
class LlavaTrainConfig(TrainConfig):
    """One stage. max_steps 0 is one epoch."""
    architecture: typing.ClassVar[type] = lm.LlavaManagerConfig
    hidden: typing.ClassVar[set[str]] = {"model", "datasets", "objectives", "share_images", "transform", "lr_mult_head",
                                         "lr_mult_cross_modal", "alignment", "im_start_id", "eos_ids"}
    min_steps: typing.ClassVar[int] = 0
    data_path: str = ""  # LLaVA's .json or .jsonl, or a mixture of them (.yaml, .json)
    image_folder: str = ""  # both are relative to --data_root
    init: str = ""  # the previous stage's folder, or an official one; else --vision and --text, folders
    grid: bool = True  # false: an image is one squashed tile, the paper's models without "+Grid"
    alignment: bool = False  # stage 1: plain captions, the rest frozen, batches without regard to length
    strict_labels: bool = False  # the official masking leaves newlines and special tokens of user turns in the loss
    # The paper's rates. The released scripts give DeepSpeed a config with an optimizer, which takes all parameters as
    # one list: there these two seem to have had no effect (here: --lr_vision 1e-5 --lr_manager 1e-5).
    lr_vision: float = 2e-6
    lr_manager: float = 5e-5


PLAIN, FINE = {"aspect": "square", "merge": "flat"}, {"merge": "spatial_unpad", "max_length": 16384}
PINPOINTS = ((384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152))
stage = functools.partial(
    LlavaTrainConfig, max_steps=0, batch_size=512, micro_batch_size=2, learning_rate=1e-5, weight_decay=0.0,
    beta2=0.999, warmup=0.03, schedule="cosine", grad_clip=1.0, log_every=10, save_every=500, eval_every=500,
    eval_size=256, num_workers=8, checkpointing=True)
LLAVA_RECIPES = {
    "llava_demo": (LlavaTrainConfig(
        out_dir="out/llava_demo", max_steps=2400, batch_size=32, micro_batch_size=32, learning_rate=2e-3,
        lr_vision=2e-3, lr_manager=2e-3, warmup=0.03, schedule="cosine", grad_clip=1.0, eval_every=400, eval_size=128),
        {**PLAIN, "image_size": 64, "patch_size": 16, "initializer_range": 0.1}),
    "llava_stage1": (stage(out_dir="out/llava_stage1", alignment=True, micro_batch_size=16, learning_rate=1e-3,
                           lr_manager=1e-3), {**PLAIN, "max_length": 8192}),
    "llava_stage1_5": (stage(out_dir="out/llava_stage1_5"), {**FINE, "aspect": "anyres", "grid_pinpoints": PINPOINTS}),
    "llava_stage2": (stage(out_dir="out/llava_stage2"),
                     {**FINE, "aspect": "anyres_max_9", "grid_pinpoints": "(1x1),...,(6x6)"})}
CAPTION_PART = 0.375  # of the demo's steps: questions alone teach nothing in that time
# what may differ from --init: it does not change what the parameters mean
FREE = {"aspect", "merge", "grid_pinpoints", "managed_grids", "max_length", "im_start_id", "eos_ids"}
MANAGERS = ("managers.", "layer_embedding")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class Chat(Task):
    """Next-token prediction over the label tokens."""

    def counts(self, batch: dict) -> dict[str, int]:
        return {"lm": self.model.count_labels(**{k: v for k, v in batch.items() if k != "image_index"})}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        out = self.model(**{k: v for k, v in batch.items() if k != "image_index"}, logits=False)
        return {"lm": out.loss * out.num_tokens}


class ChatDataset(data.PairDataset):
    """Rows of `source`: tokens (input_ids, labels), images [ImageTiles]. Up to position `plain` of the global order
    come rows of `captions`, in stage 1's style. The model cuts what is too long, after splicing; nothing is dropped."""

    def __init__(self, source, rows, config, strict_labels=False, captions=None, plain=0, **kwargs):
        super().__init__(source, **kwargs)
        self.rows, self.config, self.strict_labels = rows, config, strict_labels
        self.captions, self.plain = captions or source, plain

    def __len__(self):
        return len(self.rows)

    def item(self, position, row, rng):
        style, source = ("plain", self.captions) if position < self.plain else ("qwen_1_5", self.source)
        row = source[int(self.rows[row])]
        images, chat, name = row["images"], row["conversation"], source.name(row["image_index"])
        try:
            tokens = lm.encode_chat(chat, self.tokenizer, style, self.strict_labels, has_image=bool(images))
        except ValueError as error:
            raise data.BadSample(f"{name}: {error}") from None
        if (tags := tokens[0].count(lm.IMAGE_TOKEN)) != len(images):
            raise data.BadSample(f"{name}: {len(images)} images, but {tags} {lm.IMAGE_TAG} in the turns to train on")
        images = [lm.preprocess_image(image, self.config, multi_image=len(images) > 1) for image in images]
        return {"tokens": tokens, "images": images, "image_index": row["image_index"]}


def collate(items: list[dict]) -> dict:
    return {**lm.collate_chat([item["tokens"] for item in items]), "images": sum((x["images"] for x in items), []),
            "image_index": [item["image_index"] for item in items]}


def llava_groups(model: lm.LlavaManager, run: LlavaTrainConfig) -> list[dict]:
    """SigLIP, managers, the rest. Biases and SigLIP's norms, but not Qwen2's, have no weight decay: official."""
    def rule(name):
        vision, manager = name.startswith("vision."), name.startswith(MANAGERS)
        lr = run.lr_vision if vision else run.lr_manager if manager else run.learning_rate
        return lr, 0.0 if re.fullmatch(r".*\.bias|vision\..*ln_\w+\.weight", name) else run.weight_decay
    return make_groups(model, rule)


def make_llava(run: LlavaTrainConfig, fields: dict, tokenizer: data.Tokenizer) -> lm.LlavaManager:
    """--init with `fields` of its config; or --vision and --text with new managers; or, the demo, random weights."""
    start, end = (lm.tokenize(name, tokenizer) for name in SPECIALS[1:])
    fields = {**fields, "im_start_id": start[0], "eos_ids": end}
    seed_all(run.seed, "model")
    if run.init:
        model = lm.load_model(run.init)
        old, new = model.config, dataclasses.replace(model.config, **fields)
        for name in {f.name for f in dataclasses.fields(new)} - FREE:
            if getattr(old, name) != getattr(new, name):
                raise ValueError(f"--{name} {getattr(new, name)}, but --init {run.init} has {getattr(old, name)}")
        model.config = model.llm.config = new
    elif run.vision:
        text, vision = (data.read_json(Path(folder) / "config.json", dict) for folder in (run.text, run.vision))
        config = lm.LlavaManagerConfig.from_official(text, vision)
        model = lm.LlavaManager(dataclasses.replace(config, **{"manager_type": "static", **fields}))
        lm.load_unimodal(model, run.vision, run.text)
    else:
        model = lm.LlavaManager(lm.LlavaManagerConfig.tiny(**{"vocab_size": tokenizer.vocab_size, **fields}))
    for name, parameter in model.named_parameters() if run.alignment else ():
        parameter.requires_grad_(name.startswith(("projector.", *MANAGERS)))
    model.set_checkpointing(run.checkpointing)
    return model


@torch.no_grad()
def heldout_loss(task: Chat, dataset: ChatDataset, run: TrainConfig, world: World) -> dict[str, float]:
    """Mean over the label tokens of all ranks' rows."""
    totals, rows = torch.zeros(2, dtype=torch.float64), Subset(dataset, range(world.rank, len(dataset), world.size))
    for batch in DataLoader(rows, run.micro_batch_size, collate_fn=collate, num_workers=run.num_workers):
        with autocast(run, world.device):
            total = task.eval()(to_device(batch, world.device))["lm"].item()
        totals += torch.tensor([total, task.counts(batch)["lm"]])
    total, count = world.sum(totals.to(world.device)).tolist()
    return {"loss": total / max(count, 1), "score": -total / max(count, 1)}


@torch.no_grad()
def answer_accuracy(model: lm.LlavaManager, quiz: list[tuple], tokenizer, run: TrainConfig, world: World) -> dict:
    """Share of the (prompt, answer, image) in `quiz` whose greedy answer is the true one to the letter."""
    right, size = torch.zeros((), dtype=torch.float64), 2 * run.micro_batch_size
    for at in range(world.rank * size, len(quiz), world.size * size):
        prompts, answers, images = zip(*quiz[at : at + size])
        batch = lm.collate_chat([(prompt, prompt) for prompt in prompts])
        with autocast(run, world.device):
            out = model.eval().generate(batch["input_ids"], batch["attention_mask"], images, max_new_tokens=4)
        right += sum(tokenizer.decode(ids) == answer for ids, answer in zip(out.tolist(), answers))
    accuracy = world.sum(right.to(world.device)).item() / len(quiz)
    return {"accuracy": accuracy, "score": accuracy}


def prepare_demo(run: LlavaTrainConfig, fields: dict, world: World) -> tuple:
    """Run, task, training set, evaluation, tokenizer and baselines on the built-in scenes."""
    demo = functools.partial(data.demo_source, seed=run.seed)
    captions, source = demo("chat_captions", "train", 20_000), demo("chat", "train", 20_000)
    texts = [turn["value"] for x in (captions, source) for row in x.texts(300) for turn in row["conversation"]]
    tokenizer = data.train_tokenizer([*texts, f"system\n{lm.SYSTEM}\nuser\nassistant\n"], 512, SPECIALS)
    model, heldout = make_llava(run, fields, tokenizer).to(world.device), demo("vqa", "heldout", run.eval_size)
    dataset = ChatDataset(source, range(len(source)), model.config, run.strict_labels, captions, tokenizer=tokenizer,
                          plain=int(CAPTION_PART * run.max_steps) * run.batch_size, seed=run.seed)
    rows = map(heldout.__getitem__, range(len(heldout)))  # one question each
    quiz = [(lm.encode_prompt([row["text"]], tokenizer, 1), *row["answers"],
             lm.preprocess_image(row["images"][0], model.config)) for row in rows]
    evaluate = functools.partial(answer_accuracy, model, quiz, tokenizer, run, world)
    blind = text_only_guess(demo("vqa", "train", 4000), heldout)["text_only"]
    return run, Chat(model), dataset, evaluate, tokenizer, {"text_only": {"accuracy": blind}}


def prepare_stage(run: LlavaTrainConfig, fields: dict, world: World) -> tuple:
    """The same on --data_path, less eval_size rows for the held-out loss."""
    root = functools.partial(os.path.join, run.data_root)
    source = data.open_chat(root(run.data_path), root(run.image_folder) or None, run.seed, run.on_bad_sample)
    if not 0 < run.eval_size < len(source):
        raise ValueError(f"--eval_size {run.eval_size} must be from 1 to {len(source) - 1}, as {run.data_path} has "
                         f"{len(source)} rows")
    tokenizer = data.load_tokenizer(run.tokenizer or run.init or run.text)
    model = make_llava(run, fields, tokenizer).to(world.device)
    order = np.random.default_rng((run.seed, len(source))).permutation(len(source))
    make = functools.partial(ChatDataset, source, config=model.config, strict_labels=run.strict_labels, seed=run.seed,
                             tokenizer=tokenizer, plain=math.inf if run.alignment else 0)
    dataset, heldout = make(order[run.eval_size :], on_bad_sample=run.on_bad_sample), make(order[: run.eval_size])
    if not run.alignment:  # LLaVA's batches of one modality and of similar lengths
        dataset.lengths = np.array([row["length"] for row in source.texts()])[dataset.rows].tolist()
    run = run if run.max_steps else dataclasses.replace(run, max_steps=math.ceil(len(dataset) / run.batch_size))
    task = Chat(model)
    return run, task, dataset, functools.partial(heldout_loss, task, heldout, run, world), tokenizer, {}


def train_llava(name: str, run: LlavaTrainConfig, fields: dict, world: World):
    own, demo = LLAVA_RECIPES[name][1], name == "llava_demo"
    files = "data_path", "data_root", "image_folder", "init", "vision", "text", "tokenizer"
    if given := [name for name in files if demo and getattr(run, name)]:
        raise ValueError(f"--{given[0]} means nothing to llava_demo, which draws its scenes and starts anew")
    if not demo and (not run.data_path or bool(run.vision) != bool(run.text) or bool(run.init) == bool(run.vision)):
        raise ValueError("the stages need --data_path, and to start from either --init, or --vision and --text")
    if not run.grid and any(fields.get(k) != own.get(k) for k in ("aspect", "merge", "grid_pinpoints")):
        raise ValueError("--grid false means --aspect square --merge flat: give it alone")
    fields = fields if run.grid else {**fields, **PLAIN}
    run, task, dataset, evaluate, tokenizer, known = (prepare_demo if demo else prepare_stage)(run, fields, world)
    model, groups = task.model, llava_groups(task.model, run)
    checkpoint = Checkpoint(run, model, tokenizer.save, {"config": dataclasses.asdict(model.config)}, world)
    learn, fixed = (sum(p.numel() for p in model.parameters() if p.requires_grad == x) / 1e6 for x in (True, False))
    world.print(f"LLaVA-OV-Manager: {learn:.2f}M parameters learn, {fixed:.2f}M do not; {len(dataset)} conversations")
    known = {"untrained": evaluate(), **known}
    if fit(run, task, dataset, evaluate, checkpoint, world, groups, collate) and world.rank == 0:
        next_stage = "train.py --recipe llava_stage1_5 --data_path X --init"
        after = next_stage if run.alignment else "eval.py chat --checkpoint"
        summarize(run, checkpoint, known, [f"python {after} {run.out_dir}"])
