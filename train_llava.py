r"""The training recipes of LLaVA-OV-Manager, in the loop of loop.py; train.py runs them.

Paper: Manager (TCSVT 2025), section IV.

    # the built-in scenes; a CPU is enough
    python train.py --recipe llava_demo [--manager_type none]
    # the paper's stages; with --grid false, without multi-grid
    torchrun ... train.py --recipe llava_stage1 --vision SIGLIP --text QWEN2 \
        --data_path captions.json --image_folder D
    torchrun ... train.py --recipe llava_stage1_5 --init out/llava_stage1 \
        --data_path mixture.yaml --image_folder D
    torchrun ... train.py --recipe llava_stage2 --init out/llava_stage1_5 ...

Stage 1 aligns the projector and the managers on captions; stages 1.5 and 2 train everything on
conversations.
"""

import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from chat import SYSTEM, collate_chat, encode_prompt, tokenize
from data import ChatDataset, Source, collate_conversations, open_chat
from fields import option, parse_recipe
from files import read_json
from hub import find_folder
from llava_manager import LlavaManager, LlavaManagerConfig, TokenCounts, count_tokens
from loop import (
    Checkpoint,
    RunConfig,
    Task,
    find_tokenizer_of,
    fit,
    is_beginning_gone,
    make_groups,
    make_plan,
    measure_untrained,
    refuse_idle_flags,
    stored_config,
    summarize,
)
from multigrid import preprocess_image
from scenes import demo_source
from tasks import text_only_guess
from tokenizer import (
    CHAT_ROLES,
    Tokenizer,
    check_roles,
    check_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from weights import load_model, load_unimodal
from world import World, autocast, ranks, seed_all, to_device


@dataclass
class LlavaTrainConfig(RunConfig):
    """One stage, or the demo. max_steps 0 is one epoch."""

    architecture: ClassVar[type] = LlavaManagerConfig
    identity_fields: ClassVar[tuple[str, ...]] = (
        *RunConfig.identity_fields,
        "alignment",
        "strict_labels",
        "lr_vision",
        "lr_manager",
    )

    data_path: str = option(
        "", "LLaVA's .json or .jsonl, or a mixture of them (.yaml, .json), below --data_root"
    )
    image_folder: str = option("", "where its pictures lie, below --data_root")
    init: str = option(
        "", "the previous stage's folder, or an official one; else --vision and --text, folders"
    )
    grid: bool = option(
        True, "false: an image is one squashed tile, the paper's models without +Grid"
    )
    alignment: bool = option(
        False,
        "stage 1: plain captions, the rest frozen, batches without regard to length",
        flag=False,
    )
    strict_labels: bool = option(
        False,
        "no loss on newlines and special tokens of user turns; the official masking leaves them in",
    )
    # The paper's rates. The released scripts give DeepSpeed a config with an optimizer, which takes
    # all parameters as one list: there these two seem to have had no effect (here: --lr_vision 1e-5
    # --lr_manager 1e-5).
    lr_vision: float = option(2e-6, "highest learning rate of SigLIP", least=0)
    lr_manager: float = option(5e-5, "highest learning rate of the managers", least=0)
    max_steps: int = option(0, "optimizer updates; 0 = one epoch", least=0)

    def model_defaults(self, model_fields: dict) -> dict:
        preset = (
            LlavaManagerConfig.tiny() if self.out_dir.endswith("demo") else LlavaManagerConfig()
        )
        return {**dataclasses.asdict(preset), "grid_pinpoints": "(1x1),...,(6x6)", **model_fields}


PLAIN = {"aspect": "square", "merge": "flat"}  # without multi-grid
PINPOINTS = ((384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152))
# The stages, TCSVT 2025, section V-A: what they have in common
stage = functools.partial(
    LlavaTrainConfig,
    max_steps=0,
    batch_size=512,
    weight_decay=0.0,
    beta2=0.999,
    warmup=0.03,
    schedule="cosine",
    grad_clip=1.0,
    log_every=10,
    save_every=500,
    eval_every=500,
    eval_size=256,
    num_workers=8,
    checkpointing=True,
)
LLAVA_RECIPES: dict[str, tuple[Any, dict]] = {  # (run, fields of the model)
    "llava_demo": (
        LlavaTrainConfig(
            out_dir="out/llava_demo",
            max_steps=2400,
            batch_size=32,
            micro_batch_size=32,
            learning_rate=2e-3,
            lr_vision=2e-3,
            lr_manager=2e-3,
            warmup=0.03,
            schedule="cosine",
            grad_clip=1.0,
            eval_every=400,
            eval_size=128,
        ),
        {
            "aspect": "square",
            "merge": "flat",
            "image_size": 64,
            "patch_size": 16,
            "initializer_range": 0.1,
        },
    ),
    "llava_stage1": (
        stage(
            out_dir="out/llava_stage1",
            alignment=True,
            micro_batch_size=16,
            learning_rate=1e-3,
            lr_manager=1e-3,
        ),
        {"aspect": "square", "merge": "flat", "max_length": 8192},
    ),
    "llava_stage1_5": (
        stage(out_dir="out/llava_stage1_5", micro_batch_size=2, learning_rate=1e-5),
        {
            "aspect": "anyres",
            "merge": "spatial_unpad",
            "grid_pinpoints": PINPOINTS,
            "max_length": 16384,
        },
    ),
    "llava_stage2": (
        stage(out_dir="out/llava_stage2", micro_batch_size=2, learning_rate=1e-5),
        {
            "aspect": "anyres_max_9",
            "merge": "spatial_unpad",
            "grid_pinpoints": "(1x1),...,(6x6)",
            "max_length": 16384,
        },
    ),
}
DEMO = "llava_demo"
NOT_IN_DEMO = (
    "data_path",
    "data_root",
    "image_folder",
    "init",
    "vision",
    "text",
    "tokenizer",
    "on_bad_sample",
)
CAPTION_PART = 0.375  # of the demo's steps: questions alone teach nothing in that time
# what may differ from --init: it does not change what the parameters mean
FREE_FIELDS = {
    "aspect",
    "merge",
    "grid_pinpoints",
    "managed_grids",
    "max_length",
    "im_start_id",
    "eos_ids",
}
MANAGERS = ("managers.", "layer_embedding")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


ENOUGH = 256  # conversations, after which it is said how many of them max_length leaves useless


class Chat(Task):
    """Next-token prediction over the label tokens.

    It counts the conversations that `max_length` leaves without a label or without a whole image,
    and says once how many there are: of the first ENOUGH that this process meets, or at the end.
    """

    def __init__(self, model: LlavaManager):
        super().__init__(model)
        self.seen = 0
        self.without_label = 0
        self.without_image = 0
        self.is_said = False

    def model_inputs(self, batch: dict) -> dict:
        return {name: value for name, value in batch.items() if name != "image_index"}

    def counts(self, batch: dict) -> dict[str, int]:
        counts = count_tokens(**self.model_inputs(batch), config=self.model.config)
        if not self.is_said:
            self.count_cut(counts)
            if self.seen >= ENOUGH:
                self.say_cut()
        return {"lm": int(counts.labels.sum())}

    def count_cut(self, counts: TokenCounts) -> None:
        """Add the rows of a batch to what is said by `say_cut`."""
        is_cut = counts.lengths > self.model.config.max_length  # (B,)
        has_no_label = counts.labels == 0
        self.seen += len(is_cut)
        self.without_label += int((is_cut & has_no_label).sum())
        self.without_image += int((counts.lost > 0).sum())

    def say_cut(self) -> None:
        """Say how many conversations max_length has made useless, once, if there are any."""
        if self.is_said:
            return
        self.is_said = True
        max_length = self.model.config.max_length
        for number, loss in (
            (self.without_label, "no label"),
            (self.without_image, "not all of their images"),
        ):
            if number and ranks()[0] == 0:
                tqdm.write(
                    f"{number} of the first {self.seen} conversations have {loss} left after "
                    f"--max_length {max_length}",
                    file=sys.stderr,
                )

    def forward(self, batch: dict) -> dict[str, Tensor]:
        output = self.model(**self.model_inputs(batch), logits=False)
        return {"lm": output.loss * output.num_tokens}


def llava_groups(model: LlavaManager, run: LlavaTrainConfig) -> list[dict]:
    """SigLIP, managers, the rest.

    Official: biases and SigLIP's norms, but not Qwen2's, have no weight decay.
    """

    def rule(name: str) -> tuple[float, float]:
        rate = run.learning_rate
        if name.startswith("vision."):
            rate = run.lr_vision
        elif name.startswith(MANAGERS):
            rate = run.lr_manager
        undecayed = re.fullmatch(r".*\.bias|vision\..*ln_\w+\.weight", name)
        return rate, 0.0 if undecayed else run.weight_decay

    return make_groups(model, rule)


# ---------------------------------------------------- the model that a stage starts from
def initial_llava(run: LlavaTrainConfig, fields: dict) -> LlavaManager:
    """--init, with `fields` of its config replaced.

    Those that change what the parameters mean must stay.
    """
    model = load_model(run.init)
    if not isinstance(model, LlavaManager):
        raise ValueError(f"--init {run.init} is a {type(model).__name__}, not a LlavaManager")
    old = model.config
    new = dataclasses.replace(old, **fields)
    for field in dataclasses.fields(new):
        before = getattr(old, field.name)
        after = getattr(new, field.name)
        if field.name not in FREE_FIELDS and before != after:
            raise ValueError(f"--{field.name} {after}, but --init {run.init} has {before}")
    model.config = new
    model.llm.config = new
    return model


def make_llava(run: LlavaTrainConfig, fields: dict, tokenizer: Tokenizer) -> LlavaManager:
    """--init; or --vision and --text with new managers; or, the demo, random weights."""
    check_roles(tokenizer, CHAT_ROLES)
    _, im_start, im_end = (tokenize(name, tokenizer) for name in SPECIALS)
    fields = {**fields, "im_start_id": im_start[0], "eos_ids": im_end}
    seed_all(run.seed, "model")
    if is_beginning_gone(run):
        model = LlavaManager(stored_config(run, fields))
    elif run.init:
        model = initial_llava(run, fields)
    elif run.vision:
        text_config = read_json(find_folder(run.text) / "config.json", dict)
        vision_config = read_json(find_folder(run.vision) / "config.json", dict)
        config = LlavaManagerConfig.from_official(text_config, vision_config)
        config = dataclasses.replace(config, **{"manager_type": "static", **fields})
        model = LlavaManager(config)
        load_unimodal(model, run.vision, run.text)
    else:
        model = LlavaManager(
            LlavaManagerConfig.tiny(**{"vocab_size": tokenizer.vocab_size, **fields})
        )
    check_tokenizer(tokenizer, model.config.vocab_size, roles=CHAT_ROLES)
    if run.alignment:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("projector.", *MANAGERS)))
    model.set_checkpointing(run.checkpointing)
    return model


# ---------------------------------------------------------------- held-out measures
@torch.no_grad()
def heldout_loss(
    task: Chat, dataset: ChatDataset, run: RunConfig, world: World
) -> dict[str, float]:
    """Mean over the label tokens of all ranks' rows."""
    totals = torch.zeros(2, dtype=torch.float64)  # of the losses, of the tokens
    own_rows = Subset(dataset, range(world.rank, len(dataset), world.size))
    task.eval()
    for batch in DataLoader(
        own_rows,
        run.micro_batch_size,
        collate_fn=collate_conversations,
        num_workers=run.num_workers,
    ):
        with autocast(run.precision, world.device):
            loss_sum = task(to_device(batch, world.device))["lm"].item()
        totals += torch.tensor([loss_sum, task.counts(batch)["lm"]])
    loss_sum, count = world.sum(totals.to(world.device)).tolist()
    if not count:
        raise ValueError(
            f"none of the {len(dataset)} held-out conversations has a label left after "
            f"--max_length {task.model.config.max_length}: it must be higher"
        )
    loss = loss_sum / count
    return {"loss": loss, "score": -loss}


@torch.no_grad()
def answer_accuracy(
    model: LlavaManager, quiz: list[tuple], tokenizer: Tokenizer, run: RunConfig, world: World
) -> dict:
    """Share of the (prompt, answer, image) in `quiz` that are answered to the letter."""
    right = torch.zeros((), dtype=torch.float64)
    size = 2 * run.micro_batch_size
    model.eval()
    for start in range(world.rank * size, len(quiz), world.size * size):
        prompts, answers, images = zip(*quiz[start : start + size], strict=True)
        batch = collate_chat([(prompt, prompt) for prompt in prompts])
        with autocast(run.precision, world.device):
            new_ids = model.generate(
                batch["input_ids"], batch["attention_mask"], images, max_new_tokens=4
            )
        for ids, answer in zip(new_ids.tolist(), answers, strict=True):
            right += tokenizer.decode(ids) == answer
    accuracy = world.sum(right.to(world.device)).item() / len(quiz)
    return {"accuracy": accuracy, "score": accuracy}


# ---------------------------------------------------------------- the two ways to begin
class Prepared(NamedTuple):
    """All that a run of the MLLM needs."""

    run: LlavaTrainConfig
    task: Chat
    dataset: ChatDataset
    evaluate: Callable[[], dict]
    tokenizer: Tokenizer
    baselines: dict[str, dict]
    identity: dict  # what else than the run's fields changes the numbers


def demo_llava_tokenizer(captions: Source, questions: Source) -> Tokenizer:
    """A BPE of the words in the scenes' conversations."""
    texts = []
    for source in (captions, questions):
        for row in source.texts(300):
            texts += [turn["value"] for turn in row["conversation"]]
    texts.append(f"system\n{SYSTEM}\nuser\nassistant\n")
    return train_tokenizer(texts, 512, SPECIALS)


def prepare_demo(run: LlavaTrainConfig, fields: dict, world: World) -> Prepared:
    """The built-in scenes: first captions, then questions."""
    demo = functools.partial(demo_source, seed=run.seed)
    captions = demo("chat_captions", "train", 20_000)
    questions = demo("chat", "train", 20_000)
    tokenizer = find_tokenizer_of(run, lambda: demo_llava_tokenizer(captions, questions))
    model = make_llava(run, fields, tokenizer).to(world.device)
    dataset = ChatDataset(
        questions,
        range(len(questions)),
        model.config,
        run.strict_labels,
        captions,
        plain=int(CAPTION_PART * run.max_steps) * run.batch_size,
        tokenizer=tokenizer,
        seed=run.seed,
    )
    heldout = demo("questions", "heldout", run.eval_size)
    quiz = []
    for number in range(len(heldout)):
        row = heldout[number]
        prompt = encode_prompt([row["text"]], tokenizer, num_images=1)
        (answer,) = row["answers"]
        quiz.append((prompt, answer, preprocess_image(row["images"][0], model.config)))
    evaluate = functools.partial(answer_accuracy, model, quiz, tokenizer, run, world)
    blind = text_only_guess(demo("questions", "train", 4000), heldout)["text_only"]
    identity = {"training_texts": [captions.digest, questions.digest]}
    return Prepared(
        run, Chat(model), dataset, evaluate, tokenizer, {"text_only": {"accuracy": blind}}, identity
    )


def prepare_stage(run: LlavaTrainConfig, fields: dict, world: World) -> Prepared:
    """The conversations of --data_path, less eval_size rows for the held-out loss."""
    data_path = os.path.join(run.data_root, run.data_path)
    image_folder = os.path.join(run.data_root, run.image_folder) or None
    if run.image_folder and not Path(str(image_folder)).is_dir():
        raise ValueError(f"--image_folder: there is no folder {image_folder}")
    kind = "chat_captions" if run.alignment else "chat"
    source = open_chat(data_path, image_folder, run.seed, run.on_bad_sample, kind)
    if not run.eval_size < len(source):
        raise ValueError(
            f"--eval_size {run.eval_size} must be from 1 to {len(source) - 1}, as "
            f"{run.data_path} has {len(source)} rows"
        )
    tokenizer = find_tokenizer_of(
        run, lambda: load_tokenizer(run.tokenizer or run.init or run.text)
    )
    model = make_llava(run, fields, tokenizer).to(world.device)
    order = np.random.default_rng((run.seed, len(source))).permutation(len(source))
    make_dataset = functools.partial(
        ChatDataset,
        source,
        config=model.config,
        strict_labels=run.strict_labels,
        seed=run.seed,
        tokenizer=tokenizer,
        plain=math.inf if run.alignment else 0,
    )
    dataset = make_dataset(order[run.eval_size :], on_bad_sample=run.on_bad_sample)
    heldout = make_dataset(order[: run.eval_size])
    if not run.alignment:  # LLaVA's batches of one modality and of similar lengths
        dataset.lengths = source.lengths[dataset.rows]
    if not run.max_steps:
        run = dataclasses.replace(run, max_steps=math.ceil(len(dataset) / run.batch_size))
    task = Chat(model)
    evaluate = functools.partial(heldout_loss, task, heldout, run, world)
    # eval_size decides which rows are left to train on, group_size in which order
    identity = {
        "training_texts": source.digest,
        "eval_size": run.eval_size,
        "group_size": 0 if run.alignment else run.group_size(),
    }
    return Prepared(run, task, dataset, evaluate, tokenizer, {}, identity)


# ---------------------------------------------------------------- the run
def check_start(name: str, run: LlavaTrainConfig, fields: dict) -> None:
    """Raises ValueError for flags that do not fit together."""
    if name == DEMO and not run.max_steps:
        raise ValueError(
            "--max_steps is 0, which means one epoch; llava_demo draws its scenes without end, "
            "so it must be at least 1"
        )
    if name != DEMO:
        encoders = bool(run.vision)
        if not run.data_path or encoders != bool(run.text) or encoders == bool(run.init):
            raise ValueError(
                "the stages need --data_path, and to start from either --init, or --vision and "
                "--text"
            )
    defaults = LLAVA_RECIPES[name][1]
    for field in ("aspect", "merge", "grid_pinpoints"):
        if not run.grid and fields.get(field) != defaults.get(field):
            raise ValueError("--grid false means --aspect square --merge flat: give it alone")


def train_llava(name: str, run: LlavaTrainConfig, fields: dict, world: World) -> None:
    check_start(name, run, fields)
    make_plan(run, world)  # refuses a batch that cannot be dealt before anything is loaded
    if not run.grid:
        fields = {**fields, **PLAIN}
    prepare = prepare_demo if name == DEMO else prepare_stage
    prepared = prepare(run, fields, world)
    run = prepared.run
    model = prepared.task.model
    identity = {
        "config": dataclasses.asdict(model.config),
        "tokenizer": prepared.tokenizer.digest(),
        **prepared.identity,
    }
    checkpoint = Checkpoint(run, model, prepared.tokenizer.save, identity, world)

    counts = {True: 0, False: 0}  # parameters that learn, and that do not
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    world.print(
        f"LLaVA-OV-Manager: {counts[True] / 1e6:.2f}M parameters learn, {counts[False] / 1e6:.2f}M "
        "do not; "
        f"{len(prepared.dataset)} conversations"
    )
    # it refuses held-out rows of which no label is left
    untrained = measure_untrained(run, prepared.evaluate)
    fit(
        run,
        prepared.task,
        prepared.dataset,
        prepared.evaluate,
        checkpoint,
        world,
        llava_groups(model, run),
        collate_conversations,
    )
    prepared.task.say_cut()
    if world.rank == 0:
        command = f"python ask.py chat --checkpoint {run.out_dir}"
        if run.alignment:
            command = f"python train.py --recipe llava_stage1_5 --data_path X --init {run.out_dir}"
        summarize(run, checkpoint, {**untrained, **prepared.baselines}, [command])


def idle_flags(name: str) -> dict[str, str]:
    """The flags that mean nothing in this run -> why."""
    if name == DEMO:
        return dict.fromkeys(NOT_IN_DEMO, f"to {DEMO}, which draws its scenes and starts anew")
    return {}


def main(argv: list[str]) -> None:
    name, run, fields = parse_recipe(argv, LLAVA_RECIPES, "recipe", elsewhere=("demo", "pretrain"))
    refuse_idle_flags(argv, idle_flags(name))
    train_llava(name, run, fields, World(run.device))
