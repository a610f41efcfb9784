"""Two small unimodal encoders, pre-trained apart from each other, for compare.py.

The papers' encoders, CLIP's ViT and RoBERTa, have learnt before the cross-modal layers see them. So
have these two, in minutes on a CPU, and neither has seen the other:

    the image tower   a ViT that says which words a scene's caption has: sizes, colours, shapes and
                      the axis of the relation, from the class token alone. It is never told which
                      word belongs to which thing, nor what is left of what: that is left to the
                      cross-modal layers.
    the text tower    RoBERTa's masked language modelling, on what is said about the scenes.

Both learn from training scenes only, in the loop of loop.py.

Shapes: B batch, S pixels a side, L tokens, D width, W words.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from data import batches, mask_tokens
from images import image_transform
from loop import Checkpoint, Task, TowerRunConfig, fit, param_groups
from model import BertLayer, ManagerTower, ManagerTowerConfig, ViTBlock
from scenes import COLORS, SHAPES, SIZES, demo_source, demo_tokenizer
from tokenizer import Tokenizer
from weights import read_safetensors
from world import World, evaluating, seed_all, to_device

WORDS = (*SIZES, *COLORS, *SHAPES, "left", "above")  # "right of" and "below" say the same two
AXES = {"left": ("left", "right"), "above": ("above", "below")}
# what is said about scenes, by kind: texts of a record
TEXT_KINDS = {"captions": 1, "questions": 3, "statements": 1, "hypotheses": 1}
HELD_OUT = 500  # pictures, and texts of each kind, to measure on
BATCH = 64
# what a ManagerTower has to have to take them
ENCODER_FIELDS = (
    "image_size",
    "patch_size",
    "vision_width",
    "vision_layers",
    "vision_heads",
    "vocab_size",
    "pad_token_id",
    "max_positions",
    "text_width",
    "text_layers",
    "text_heads",
    "text_mlp_width",
)
TEXT_SEED = 1  # added to the run's: other texts than those of the scenes that follow


def tower_config(image_size: int, tokenizer: Tokenizer) -> ManagerTowerConfig:
    """Both towers, 64 wide and 8 layers deep, so that the 6 managed layers are a part of each."""
    pad_id: Any = tokenizer.pad_id
    return ManagerTowerConfig(
        image_size=image_size,
        patch_size=16,
        vision_width=64,
        vision_layers=8,
        vision_heads=4,
        vocab_size=tokenizer.vocab_size,
        pad_token_id=pad_id,
        max_positions=64,
        text_width=64,
        text_layers=8,
        text_heads=4,
        text_mlp_width=256,
        hidden_size=64,
        num_heads=4,
        num_layers=3,
        dropout=0.0,
        initializer_range=0.1,
        max_text_len=20,
    )


# ---------------------------------------------------------------- the image tower
class ImageTower(nn.Module):
    """The image encoder, and a linear layer that reads its class token."""

    blocks_to_compile = (ViTBlock,)

    def __init__(self, config: ManagerTowerConfig):
        super().__init__()
        self.config = config
        self.encoder = ManagerTower(config).image_encoder
        self.words = nn.Linear(config.vision_width, len(WORDS))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> logits (B, W)."""
        states = self.encoder(pixels, [self.config.vision_layers])
        class_token = self.encoder.ln_post(states[0][:, 0])  # (B, D)
        return self.words(class_token)


class NamingWords(Task):
    """Binary cross-entropy over the words."""

    def counts(self, batch: dict) -> dict[str, int]:
        return {"words": batch["words"].numel()}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        logits = self.model(batch["pixels"]).float()
        loss = F.binary_cross_entropy_with_logits(logits, batch["words"], reduction="sum")
        return {"words": loss}


class PicturesWithWords(Dataset):
    """Scenes with the words of their captions: pixels (3, S, S), words (W,), image_index."""

    def __init__(self, split: str, count: int, seed: int, image_size: int):
        self.source = demo_source("captions", split, count, seed, image_size)
        self.transform = image_transform("clip", image_size, train=False)
        self.kept: dict[int, tuple[Image.Image, Tensor]] = {}  # a scene is drawn once

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Any) -> dict:
        row = key[2] if isinstance(key, tuple) else key
        if row not in self.kept:
            record = self.source[row]
            self.kept[row] = (record["images"][0], words_of(record["text"]))
        picture, words = self.kept[row]
        return {"pixels": self.transform(picture, None), "words": words, "image_index": row}


def words_of(caption: str) -> Tensor:
    """1 for each of WORDS that is in the caption, (W,)."""
    said = caption.split()
    flags = []
    for word in WORDS:
        names = AXES.get(word, (word,))
        flags.append(float(any(name in said for name in names)))
    return torch.tensor(flags)


def measure_words(model: nn.Module, dataset: Any) -> dict[str, float]:
    """The part of the pictures whose words are all right."""
    right = 0
    with evaluating(model) as device:
        for _, batch in batches(dataset, BATCH):
            logits = model(batch["pixels"].to(device)).cpu()  # (B, W)
            is_right = (logits > 0) == batch["words"].bool()
            right += int(is_right.all(dim=1).sum())
    accuracy = right / len(dataset)
    return {"accuracy": accuracy, "score": accuracy}


# ---------------------------------------------------------------- the text tower
class TextTower(nn.Module):
    """The text encoder, and ManagerTower's head for masked words."""

    blocks_to_compile = (BertLayer,)

    def __init__(self, config: ManagerTowerConfig):
        super().__init__()
        self.config = config
        tower = ManagerTower(config)
        self.encoder = tower.text_encoder
        self.head = tower.heads["mlm"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, L) -> the last layer's states (B, L, D)."""
        return self.encoder(input_ids, attention_mask, [self.config.text_layers])[0]


class MaskedWords(Task):
    """Cross-entropy over the masked tokens."""

    def counts(self, batch: dict) -> dict[str, int]:
        return {"mlm": int((batch["labels"] != -100).sum())}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        is_masked = batch["labels"] != -100
        states = self.model(batch["input_ids"], batch["attention_mask"])
        logits = self.model.head(states[is_masked])
        loss = F.cross_entropy(logits, batch["labels"][is_masked], reduction="sum")
        return {"mlm": loss}


class MaskedTexts(Dataset):
    """What is said about scenes, with 15% of the tokens masked anew at each reading.

    count: texts of each kind. input_ids, attention_mask, labels (L,), image_index.
    """

    def __init__(self, split: str, count: int, seed: int, tokenizer: Tokenizer, length: int):
        self.texts = []
        for kind, texts_each in TEXT_KINDS.items():
            source = demo_source(kind, split, math.ceil(count / texts_each), seed)
            for row in source.iterate_texts():
                self.texts.append(row["text"])
        self.seed = seed
        self.tokenizer = tokenizer
        self.ids, self.masks = tokenizer(self.texts, length)
        self.source = self

    def name(self, index: int) -> str:
        return f"text {index}: {self.texts[index]}"

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, key: Any) -> dict:
        epoch, position, row = key if isinstance(key, tuple) else (0, key, key)
        rng = np.random.default_rng((self.seed, epoch, position))
        input_ids, labels = mask_tokens(self.ids[row], self.tokenizer, rng)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": self.masks[row],
            "image_index": row,
        }


def measure_masked(model: TextTower, dataset: MaskedTexts) -> dict[str, float]:
    """The part of the masked tokens that are named."""
    right = 0
    total = 0
    with evaluating(model) as device:
        for _, batch in batches(dataset, BATCH):
            batch = to_device(batch, device)
            is_masked = batch["labels"] != -100
            states = model(batch["input_ids"], batch["attention_mask"])
            choices = model.head(states[is_masked]).argmax(-1)
            right += int((choices == batch["labels"][is_masked]).sum())
            total += int(is_masked.sum())
    accuracy = right / total
    return {"accuracy": accuracy, "score": accuracy}


# ---------------------------------------------------------------- the two runs
@dataclass
class TowerRun(TowerRunConfig):
    """How both towers are trained."""


def tower_run(folder: str, max_steps: int, seed: int, device: str) -> TowerRun:
    return TowerRun(
        out_dir=folder,
        max_steps=max_steps,
        learning_rate=2e-3,
        weight_decay=0.05,
        seed=seed,
        eval_every=0,
        precision="fp32",
        device=device,
    )


def train_tower(
    task: Task, dataset: Any, evaluate: Any, run: TowerRun, world: World
) -> dict[str, float]:
    """Train one of the two, and return its accuracy on held-out scenes."""
    model = task.model
    identity = {"config": dataclasses.asdict(model.config), "rows": len(dataset)}
    checkpoint = Checkpoint(run, model, lambda folder: None, identity, world)
    fit(run, task, dataset, evaluate, checkpoint, world, param_groups(model, run))
    return evaluate()


def train_image_tower(
    folder: str, max_steps: int, pictures: int, image_size: int, seed: int, device: str
) -> dict:
    """A job of compare.py. pictures: how many scenes it learns from."""
    world = World(device)
    run = tower_run(folder, max_steps, seed, device)
    seed_all(seed, "image tower")
    model = ImageTower(tower_config(image_size, demo_tokenizer())).to(world.device)
    dataset = PicturesWithWords("train", pictures, seed, image_size)
    heldout = PicturesWithWords("heldout", HELD_OUT, seed, image_size)
    evaluate = partial(measure_words, model, heldout)
    return train_tower(NamingWords(model), dataset, evaluate, run, world)


def train_text_tower(
    folder: str, max_steps: int, texts: int, image_size: int, seed: int, device: str
) -> dict:
    """A job of compare.py. texts: how many of each kind it learns from."""
    world = World(device)
    run = tower_run(folder, max_steps, seed, device)
    seed_all(seed, "text tower")
    tokenizer = demo_tokenizer()
    config = tower_config(image_size, tokenizer)
    model = TextTower(config).to(world.device)
    length = config.max_text_len
    dataset = MaskedTexts("train", texts, seed + TEXT_SEED, tokenizer, length)
    heldout = MaskedTexts("heldout", HELD_OUT, seed + TEXT_SEED, tokenizer, length)
    evaluate = partial(measure_masked, model, heldout)
    return train_tower(MaskedWords(model), dataset, evaluate, run, world)


def load_small_towers(model: ManagerTower, image_folder: Path, text_folder: Path) -> None:
    """Give a ManagerTower the encoders of the two runs."""
    for folder, encoder in ((image_folder, model.image_encoder), (text_folder, model.text_encoder)):
        state = read_safetensors(folder)
        prefix = "encoder."
        own = {}
        for name, tensor in state.items():
            if name.startswith(prefix):
                own[name.removeprefix(prefix)] = tensor
        encoder.load_state_dict(own)
