"""ManagerTower in plain PyTorch: two encoders, managers, cross-modal layers, heads, and the import of official weights.

Papers: ManagerTower (ACL 2023) section 3, Manager (TCSVT 2025) section III. BridgeTower and METER live in the same
frame, as values of `fusion`. Read manager.py first, then this file from `ManagerTower.fuse` on.

    model = ManagerTower(ManagerTowerConfig.tiny())
    features = model(pixels, input_ids, attention_mask)            # (B, 3, S, S), (B, Lt), (B, Lt; 1 = real token)
    match_logits = model.heads["itm"](features.pooled)             # (B, 2)

B batch, N experts (managed layers), L tokens (Lt text, Li image), D width, H heads, V vocabulary.
"""
import dataclasses
import json
import math
import os
import re
import shutil
import textwrap
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from manager import AdaptiveManager, StaticManager, standardize

HEADS = ("mlm", "itm", "itc", "vqa", "nlvr2", "snli_ve", "retrieval")


@dataclass
class ManagerTowerConfig:
    """The architecture. Defaults: the papers' base model (CLIP ViT-B/16 + RoBERTa-base, 6 cross-modal layers)."""
    # vision
    image_size: int = 288  # pixels a side
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    # text
    vocab_size: int = 50265
    max_positions: int = 514  # RoBERTa's positions start at pad_token_id + 1
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_mlp_width: int = 3072
    pad_token_id: int = 1
    # cross-modal
    hidden_size: int = 768
    num_layers: int = 6
    num_heads: int = 12
    mlp_ratio: int = 4
    dropout: float = 0.1  # text encoder and cross-modal layers; CLIP, managers and heads have none
    contrastive_size: int = 256
    temperature: float = 0.07  # of ITC at the start, a divisor
    initializer_range: float = 0.02  # standard deviation of new matrices, BERT's
    # managers
    fusion: str = "manager"  # manager | bridge (BridgeTower) | last (METER)
    manager_type: str = "aaue"  # aaue | saue | sae
    manager_weight: str = "vector"  # vector | scalar
    managed_layers_text: int = 6  # N: the last ones of the encoder
    managed_layers_image: int = 6
    mask_fused_query: bool = False  # mask padding in AAUE's attention; the released weights were trained without
    manager_noise: bool = True  # in training mode
    # heads
    heads: tuple[str, ...] = ("mlm", "itm")
    num_answers: int = 3129
    head_hidden_scale: int = 1  # hidden width of the classifiers, in units of 2 * hidden_size
    max_text_len: int = 50  # text is padded to it: AAUE's results depend on the padded length

    @classmethod
    def base(cls, **overrides) -> "ManagerTowerConfig":
        return cls(**overrides)

    @classmethod
    def large(cls, **overrides) -> "ManagerTowerConfig":
        """CLIP ViT-L/14 + RoBERTa-large."""
        return cls(**{
            "image_size": 294, "patch_size": 14, "vision_width": 1024, "vision_layers": 24, "vision_heads": 16,
            "text_width": 1024, "text_layers": 24, "text_heads": 16, "text_mlp_width": 4096,
            "hidden_size": 1024, "num_heads": 16} | overrides)

    @classmethod
    def tiny(cls, **overrides) -> "ManagerTowerConfig":
        """For the built-in demo data: learns on a CPU in minutes."""
        return cls(**{
            "image_size": 64, "patch_size": 16, "vision_width": 96, "vision_layers": 3, "vision_heads": 3,
            "vocab_size": 300, "max_positions": 52, "text_width": 96, "text_layers": 3, "text_heads": 3,
            "text_mlp_width": 384, "hidden_size": 96, "num_layers": 2, "num_heads": 3, "contrastive_size": 64,
            "managed_layers_text": 3, "managed_layers_image": 3, "dropout": 0.0, "max_text_len": 16} | overrides)

    def __post_init__(self):
        self.heads = tuple(self.heads)
        for name, value, allowed in (("fusion", self.fusion, ("manager", "bridge", "last")),
                                     ("manager_type", self.manager_type, ("aaue", "saue", "sae")),
                                     ("manager_weight", self.manager_weight, ("vector", "scalar")),
                                     *(("heads", head, HEADS) for head in self.heads)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "pad_token_id" else 1
            if field.type is int and (type(value) is not int or value < least):
                raise ValueError(f"{field.name} is {value!r}; it must be a whole number from {least} on")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be from 0 on and below 1")
        for total, part in (("vision_width", "vision_heads"), ("text_width", "text_heads"),
                            ("hidden_size", "num_heads"), ("image_size", "patch_size")):
            if getattr(self, total) % getattr(self, part):
                raise ValueError(f"{total} {getattr(self, total)} is not a multiple of {part} {getattr(self, part)}")
        for modality, layers in (("text", self.text_layers), ("image", self.vision_layers)):
            if (n := self.num_experts(modality)) > layers:
                raise ValueError(f"{n} managed layers, the {modality} encoder has {layers} (fusion {self.fusion!r})")
        if self.max_text_len + self.pad_token_id + 1 > self.max_positions:
            raise ValueError(f"max_text_len {self.max_text_len} does not fit into max_positions {self.max_positions} "
                             f"(positions start at {self.pad_token_id + 1})")

    def num_experts(self, modality: str) -> int:
        """N: how many of the encoder's last layers reach the cross-modal layers; modality is "text" or "image"."""
        managed = self.managed_layers_text if modality == "text" else self.managed_layers_image
        return {"manager": managed, "bridge": self.num_layers, "last": 1}[self.fusion]


# ---------------------------------------------------------------- encoders, cross-modal layers, heads
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Multi-head attention (B, Lq, D), (B, Lk, D), (B, Lk, D) -> (B, Lq, D). mask: boolean, broadcastable to
    (B, H, Lq, Lk), True = attend. dropout applies in every mode, so the caller passes it in training only."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, L, D/H)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(2)


def run(layer: nn.Module, checkpointing: bool, *args) -> Tensor:
    """layer(*args); with checkpointing its activations are computed again in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


def run_layers(layers: nn.ModuleList, x: Tensor, args: tuple, keep, checkpointing: bool) -> list[Tensor]:
    """Hidden states `keep` in ascending order: 0 = x, k = output of layer k (from 1). Layers above do not run."""
    keep = set(keep)
    kept = [x] if 0 in keep else []
    for k in range(1, max(keep) + 1):
        x = run(layers[k - 1], checkpointing, x, *args)
        if k in keep:
            kept.append(x)
    return kept


class ViTBlock(nn.Module):
    """Pre-norm transformer block without dropout."""

    def __init__(self, width: int, heads: int, mlp_width: int, siglip: bool):
        super().__init__()
        eps = 1e-6 if siglip else 1e-5
        self.heads, self.siglip = heads, siglip
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.fc_out = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(attention(*self.qkv(self.ln_1(x)).chunk(3, dim=-1), self.heads))
        hidden = self.fc(self.ln_2(x))
        # CLIP has QuickGELU, h * sigmoid(1.702 h), here through the fused SiLU
        hidden = F.gelu(hidden, approximate="tanh") if self.siglip else F.silu(1.702 * hidden) / 1.702
        return x + self.fc_out(hidden)


class ViT(nn.Module):
    """CLIP's ViT (class token, ln_pre, QuickGELU), or SigLIP's (neither token nor ln_pre; patch bias, tanh GELU)."""

    def __init__(self, image_size: int, patch_size: int, width: int, layers: int, heads: int,
                 mlp_width: int | None = None, siglip: bool = False):
        super().__init__()
        self.image_size, num_patches = image_size, (image_size // patch_size) ** 2
        self.patch = nn.Conv2d(3, width, patch_size, patch_size, bias=siglip)
        self.class_embedding = None if siglip else nn.Parameter(0.02 * torch.randn(width))
        self.position_embedding = nn.Parameter(0.02 * torch.randn(num_patches + (not siglip), width))
        self.ln_pre = nn.Identity() if siglip else nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ViTBlock(width, heads, mlp_width or 4 * width, siglip) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width, eps=1e-6 if siglip else 1e-5)
        self.checkpointing = False

    def forward(self, pixels: Tensor, keep) -> list[Tensor]:
        """(B, 3, S, S) -> hidden states `keep` (0 = after ln_pre, k = block k), each (B, L, D), before ln_post."""
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"pixels {tuple(pixels.shape)} do not have the encoder's image_size {self.image_size}")
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # (B, L, D)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.position_embedding.to(x.dtype))
        return run_layers(self.blocks, x, (), keep, self.checkpointing)


class BertLayer(nn.Module):
    """Post-norm BERT layer: RoBERTa's, or a cross-modal one (cross=True), which also attends to the other modality."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float, eps: float, cross: bool = False):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        if cross:
            self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
            self.cross_proj = nn.Linear(width, width)
            self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.fc, self.fc_out = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.ln_3 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None, other: Tensor | None = None, other_mask=None) -> Tensor:
        """x (B, L, D), other (B, Lo, D) or None; masks (B, 1, 1, L or Lo) boolean or None. Returns (B, L, D)."""
        p = self.dropout if self.training else 0.0
        out = attention(*self.qkv(x).chunk(3, dim=-1), self.heads, mask, p)
        x = self.ln_1(x + F.dropout(self.proj(out), p))
        if other is not None:
            out = attention(self.q(x), *self.kv(other).chunk(2, dim=-1), self.heads, other_mask, p)
            x = self.ln_2(x + F.dropout(self.cross_proj(out), p))
        return self.ln_3(x + F.dropout(self.fc_out(F.gelu(self.fc(x))), p))


class TextEncoder(nn.Module):
    """RoBERTa without its pooler."""

    def __init__(self, config: ManagerTowerConfig):
        super().__init__()
        width, self.pad, self.dropout = config.text_width, config.pad_token_id, config.dropout
        self.word_embedding = nn.Embedding(config.vocab_size, width, padding_idx=self.pad)
        self.position_embedding = nn.Embedding(config.max_positions, width, padding_idx=self.pad)
        self.type_embedding = nn.Parameter(0.02 * torch.randn(1, width))
        self.ln = nn.LayerNorm(width)
        self.layers = nn.ModuleList(BertLayer(width, config.text_heads, config.text_mlp_width, config.dropout, 1e-5)
                                    for _ in range(config.text_layers))
        self.checkpointing = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor, keep) -> list[Tensor]:
        """(B, L), (B, L) -> hidden states `keep` (0 = embeddings, k = output of layer k), each (B, L, D)."""
        longest = self.position_embedding.num_embeddings - self.pad - 1
        if input_ids.shape[1] > longest:
            raise ValueError(f"the text has {input_ids.shape[1]} tokens, the position table holds {longest}")
        real = (input_ids != self.pad).long()
        # from the ids, not from the mask: pad + 1, pad + 2, ... for tokens and pad for padding
        positions = torch.cumsum(real, dim=1) * real + self.pad
        x = self.word_embedding(input_ids) + self.position_embedding(positions) + self.type_embedding
        x = F.dropout(self.ln(x), self.dropout, self.training)
        return run_layers(self.layers, x, (attention_mask[:, None, None, :].bool(),), keep, self.checkpointing)


class MLMHead(nn.Module):
    """(..., D) -> (..., V); not tied to the word embedding."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.dense, self.ln = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.decoder, self.bias = nn.Linear(width, vocab_size, bias=False), nn.Parameter(torch.zeros(vocab_size))

    def forward(self, text: Tensor) -> Tensor:
        return self.decoder(self.ln(F.gelu(self.dense(text)))) + self.bias


class ContrastiveHead(nn.Module):
    """First tokens (B, D_text), (B, D_image) -> unit vectors (B, C), (B, C)."""

    def __init__(self, config: ManagerTowerConfig):
        super().__init__()
        # sized by the towers; the official code sizes them by hidden_size, which only works when all widths are equal
        self.text = nn.Linear(config.text_width, config.contrastive_size)
        self.image = nn.Linear(config.vision_width, config.contrastive_size)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.text(text), dim=-1), F.normalize(self.image(image), dim=-1)


def make_head(name: str, config: ManagerTowerConfig) -> nn.Module:
    width = 2 * config.hidden_size  # of the pooled features
    if name == "mlm":
        return MLMHead(config.hidden_size, config.vocab_size)
    if name == "itc":
        return ContrastiveHead(config)
    classes = {"itm": 2, "retrieval": 1, "vqa": config.num_answers, "nlvr2": 2, "snli_ve": 3}[name]
    if name in ("itm", "retrieval"):
        return nn.Linear(width, classes)
    hidden, width = width * config.head_hidden_scale, 2 * width if name == "nlvr2" else width
    # without dropout, as in the released recipes: NLVR2's sets its nlvr2_drop_rate to 0
    return nn.Sequential(OrderedDict(fc=nn.Linear(width, hidden), ln=nn.LayerNorm(hidden), gelu=nn.GELU(),
                                     fc_out=nn.Linear(hidden, classes)))


def init_weights(module: nn.Module, std: float):
    """As in BERT and Qwen2: N(0, std^2) for matrices, zero biases, and a zero row for padding."""
    if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "padding_idx", None) is not None:
            module.weight.data[module.padding_idx] = 0
        elif getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


# ---------------------------------------------------------------- the model
@dataclass
class Features:
    text: Tensor  # (B, Lt, D)
    image: Tensor  # (B, Li, D)
    pooled: Tensor  # (B, 2D): text, then image


class ManagerTower(nn.Module):
    """Two encoders, and num_layers pairs of cross-modal layers, each reading what its managers aggregate."""

    def __init__(self, config: ManagerTowerConfig):
        super().__init__()
        c, width = config, config.hidden_size
        self.config, self.checkpointing = config, False
        self.text_encoder = TextEncoder(c)
        self.image_encoder = ViT(c.image_size, c.patch_size, c.vision_width, c.vision_layers, c.vision_heads)
        self.text_transform, self.image_transform = nn.Linear(c.text_width, width), nn.Linear(c.vision_width, width)
        types = 0.02 * torch.randn(2, width)  # text, image; NLVR2's second image starts as a copy of image
        self.type_embedding = nn.Parameter(torch.cat([types, types[1:]]) if "nlvr2" in c.heads else types)
        if c.fusion == "manager":
            self.text_layer_embedding, self.image_layer_embedding = (
                nn.Parameter(0.02 * torch.randn(layers, width)) for layers in (c.text_layers, c.vision_layers))
            self.text_managers, self.image_managers = (
                nn.ModuleList(make_manager(i, m, c) for i in range(c.num_layers)) for m in ("text", "image"))
        elif c.fusion == "bridge":
            self.text_bridges, self.image_bridges = (
                nn.ModuleList(nn.LayerNorm(width) for _ in range(c.num_layers)) for _ in range(2))
        self.text_layers, self.image_layers = (
            nn.ModuleList(BertLayer(width, c.num_heads, c.mlp_ratio * width, c.dropout, 1e-12, cross=True)
                          for _ in range(c.num_layers)) for _ in range(2))
        self.text_pooler, self.image_pooler = nn.Linear(width, width), nn.Linear(width, width)
        self.heads = nn.ModuleDict({name: make_head(name, c) for name in c.heads})
        self.apply(partial(init_weights, std=c.initializer_range))

    def set_checkpointing(self, on: bool):
        """Activation checkpointing of encoder and cross-modal layers: a third more computation, far less memory."""
        self.text_encoder.checkpointing = self.image_encoder.checkpointing = self.checkpointing = on

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, Lt), (B, Lt) -> the text experts (B, N, Lt, D_text): the last N layers, before projection."""
        last = range(self.config.text_layers + 1)[-self.config.num_experts("text") :]
        return torch.stack(self.text_encoder(input_ids.long(), attention_mask, last), 1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> the image experts (B, N, Li, D_image): the last N blocks, each after the shared ln_post."""
        last = range(self.config.vision_layers + 1)[-self.config.num_experts("image") :]
        return self.image_encoder.ln_post(torch.stack(self.image_encoder(pixels, last), 1))

    def contrast(self, text_experts: Tensor, image_experts: Tensor) -> tuple[Tensor, Tensor]:
        """ITC features: unit vectors (B, C) of the first token of each modality's last expert, before any fusion."""
        return self.heads["itc"](text_experts[:, -1, 0], image_experts[:, -1, 0])

    def project(self, modality: str, experts: Tensor, type_row: int) -> Tensor:
        """(B, N, L, D_modality) -> (B, N, L, D) with type and layer embeddings; standardised if managers read them."""
        embedding, managed = self.type_embedding[type_row], self.config.fusion == "manager"
        if managed:  # one row for each layer of the encoder, the experts have the last ones
            embedding = embedding + getattr(self, f"{modality}_layer_embedding")[-experts.shape[1] :, None]  # (N, 1, D)
        experts = getattr(self, f"{modality}_transform")(experts) + embedding
        return standardize(experts) if managed else experts

    def layer_input(self, modality: str, i: int, experts: Tensor, own: list, other: list, query_mask=None) -> Tensor:
        """What cross-modal layer i reads, (B, L, D), from what the layers before it put out: own and other modality."""
        if self.config.fusion == "last":
            return own[-1] if i else experts[:, -1]
        if self.config.fusion == "bridge":
            return getattr(self, f"{modality}_bridges")[i](experts[:, i] + own[-1] if i else experts[:, i])
        manager = getattr(self, f"{modality}_managers")[i]
        if i == 0:
            return manager(experts)
        previous = torch.stack(own, 1) if self.config.manager_type == "sae" else own[-1]
        return manager(experts, previous, other[-1], query_mask)

    def fuse(self, text_experts: Tensor, image_experts: Tensor, attention_mask: Tensor, image_type=1) -> Features:
        """The cross-modal encoder (ACL section 3.2; TCSVT section III): text_experts (B, N, Lt, D_text), image_experts
        (B, N, Li, D_image), attention_mask (B, Lt); image_type is 2 for the second image of NLVR2, else 1."""
        text_experts = self.project("text", text_experts, 0)
        image_experts = self.project("image", image_experts, image_type)
        text_mask = attention_mask[:, None, None, :].bool()  # (B, 1, 1, Lt)
        query_mask = attention_mask if self.config.mask_fused_query else None
        text, image = [], []  # outputs of the cross-modal layers
        for i, (text_layer, image_layer) in enumerate(zip(self.text_layers, self.image_layers, strict=True)):
            text_in = self.layer_input("text", i, text_experts, text, image)
            image_in = self.layer_input("image", i, image_experts, image, text, query_mask)
            text.append(run(text_layer, self.checkpointing, text_in, text_mask, image_in, None))
            image.append(run(image_layer, self.checkpointing, image_in, None, text_in, text_mask))
        pooled = [self.text_pooler(text[-1][:, 0]).tanh(), self.image_pooler(image[-1][:, 0]).tanh()]
        return Features(text[-1], image[-1], torch.cat(pooled, dim=-1))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, image_type: int = 1) -> Features:
        """pixels (B, 3, S, S), input_ids and attention_mask (B, Lt), of any integer dtype."""
        experts = self.encode_text(input_ids, attention_mask), self.encode_image(pixels)
        return self.fuse(*experts, attention_mask, image_type)


def make_manager(i: int, modality: str, config: ManagerTowerConfig) -> nn.Module:
    """The manager before cross-modal layer i. The first one has no layer before it: there AAUE is static."""
    width, n, sae = config.hidden_size, config.num_experts(modality), config.manager_type == "sae"
    if config.manager_type == "aaue" and i > 0:
        return AdaptiveManager(width, n, config.manager_weight, config.manager_noise)
    return StaticManager(width, n, i if sae else min(i, 1), config.manager_weight, config.manager_noise, sae)


# ---------------------------------------------------------------- weights
# One table of rows (our key, their keys, how) for every foreign layout; `how` is the way from theirs to ours:
# "cat" along the rows, "stack", or "scores" for a (1, n, 1, width) that is (n, width) here.
SPLIT = {"cat": lambda tensor, count: tensor.chunk(count) if count > 1 else (tensor,),
         "stack": lambda tensor, count: tensor.unbind(0), "scores": lambda tensor, count: (tensor[None, :, None],)}
JOIN = {"cat": lambda parts: torch.cat(parts) if len(parts) > 1 else parts[0],
        "stack": torch.stack, "scores": lambda parts: parts[0][0, :, 0]}


def import_state(state: dict, table: list, shapes: dict, dropped: tuple[str, ...] = ()) -> dict:
    """Foreign state -> ours, by renaming, concatenating and reshaping; no value is read, so meta tensors work too.

    shapes: our key -> shape; dropped: patterns of keys that are known to be dead. Raises ValueError with the missing,
    unknown and misshapen keys, the first ones where they are many."""
    wanted = {key for _, keys, _ in table for key in keys}
    unknown = [k for k in state if k not in wanted and not any(re.fullmatch(p, k) for p in dropped)]
    on_meta = {ours: torch.empty(shape, device="meta") for ours, shape in shapes.items()}
    misshapen = [f"{key} is {tuple(state[key].shape)}, should be {tuple(part.shape)}" for ours, keys, how in table
                 for key, part in zip(keys, SPLIT[how](on_meta[ours], len(keys)), strict=True)
                 if key in state and state[key].shape != part.shape]
    problems = {"missing": sorted(wanted - set(state)), "unknown": unknown, "wrong shape": misshapen}
    if any(problems.values()):
        raise ValueError("the weights do not fit the config. " + ". ".join(
            f"{name}: {textwrap.shorten('; '.join(items), 400)}" for name, items in problems.items() if items))
    return {ours: JOIN[how]([state[k] for k in keys]) for ours, keys, how in table}


def export_state(state: dict, table: list) -> dict:
    """The inverse of import_state, for any dict keyed by our parameter names, also gradients and partial dicts."""
    return {key: part for ours, keys, how in table if ours in state
            for key, part in zip(keys, SPLIT[how](state[ours], len(keys)), strict=True)}


def expand(names: dict, ours: str = "", theirs: str = "", layers: int = 0, how: str = "cat") -> list:
    """{our key: their keys, divided by spaces} -> rows of a table. `ours` and `theirs` are prefixes; a {} in a name
    stands for each layer number, a * for weight and bias."""
    return [((ours + a.format(i)).replace("*", p), [(theirs + key.format(i)).replace("*", p) for key in b.split()], how)
            for a, b in names.items() for i in range(layers if "{}" in a else 1)
            for p in (("weight", "bias") if "*" in a else ("",))]


BERT = {"qkv.*": "attention.self.query.* attention.self.key.* attention.self.value.*",
        "proj.*": "attention.output.dense.*", "ln_1.*": "attention.output.LayerNorm.*",
        "fc.*": "intermediate.dense.*", "fc_out.*": "output.dense.*", "ln_3.*": "output.LayerNorm.*"}
CROSS = {"q.*": "crossattention.self.query.*", "kv.*": "crossattention.self.key.* crossattention.self.value.*",
         "cross_proj.*": "crossattention.output.dense.*", "ln_2.*": "crossattention.output.LayerNorm.*", **BERT}
ROBERTA = {  # HF's RobertaModel, also inside the official states
    "word_embedding.weight": "embeddings.word_embeddings.weight", "ln.*": "embeddings.LayerNorm.*",
    "position_embedding.weight": "embeddings.position_embeddings.weight",
    "type_embedding": "embeddings.token_type_embeddings.weight",
    **{f"layers.{{}}.{a}": " ".join(f"encoder.layer.{{}}.{key}" for key in b.split()) for a, b in BERT.items()}}
CLIP = {  # OpenAI's, also inside the official states
    "class_embedding": "class_embedding", "position_embedding": "positional_embedding", "patch.weight": "conv1.weight",
    "blocks.{}.ln_1.*": "transformer.resblocks.{}.ln_1.*", "blocks.{}.ln_2.*": "transformer.resblocks.{}.ln_2.*",
    "blocks.{}.qkv.*": "transformer.resblocks.{}.attn.in_proj_*", "ln_pre.*": "ln_pre.*", "ln_post.*": "ln_post.*",
    "blocks.{}.proj.*": "transformer.resblocks.{}.attn.out_proj.*",
    "blocks.{}.fc.*": "transformer.resblocks.{}.mlp.c_fc.*",
    "blocks.{}.fc_out.*": "transformer.resblocks.{}.mlp.c_proj.*"}
HF_VISION = {  # HF's CLIPVisionModel and SiglipVisionModel
    "patch.weight": "embeddings.patch_embedding.weight", "position_embedding": "embeddings.position_embedding.weight",
    "blocks.{}.ln_1.*": "encoder.layers.{}.layer_norm1.*", "blocks.{}.ln_2.*": "encoder.layers.{}.layer_norm2.*",
    "blocks.{}.qkv.*": " ".join(f"encoder.layers.{{}}.self_attn.{x}_proj.*" for x in "qkv"),
    "blocks.{}.proj.*": "encoder.layers.{}.self_attn.out_proj.*", "ln_post.*": "post_layernorm.*",
    "blocks.{}.fc.*": "encoder.layers.{}.mlp.fc1.*", "blocks.{}.fc_out.*": "encoder.layers.{}.mlp.fc2.*"}
HF_CLIP = {"class_embedding": "embeddings.class_embedding", "ln_pre.*": "pre_layrnorm.*"}
HF_SIGLIP = {"patch.bias": "embeddings.patch_embedding.bias"}
ADAPTIVE = {"norm_query.*": "extra_query_LayerNorm.*", "controller.*": "linear_controller.*",
            "q_proj.*": "fusion_attention.q_proj.*", "k_proj.*": "fusion_attention.k_proj.*"}
HEAD_KEYS = {
    "mlm": {"dense.*": "mlm_score.transform.dense.*", "ln.*": "mlm_score.transform.LayerNorm.*",
            "decoder.weight": "mlm_score.decoder.weight", "bias": "mlm_score.bias"},
    "itc": {"text.*": "cross_modal_itc_text_head.fc.*", "image.*": "cross_modal_itc_image_head.fc.*",
            "temperature": "temperature"},
    "itm": {"*": "itm_score.fc.*"}, "retrieval": {"*": "rank_output.*"},
    **{ours: {f"{layer}.*": f"{theirs}_classifier.{i}.*" for layer, i in (("fc", 0), ("ln", 1), ("fc_out", 3))}
       for ours, theirs in (("vqa", "vqa"), ("nlvr2", "nlvr2"), ("snli_ve", "snli"))}}
DEAD_KEYS = (  # in every official state, but not used by its model
    r"vit_model\.(positional_embedding|ln_final\..*)", r"text_transformer\.(pooler\..*|embeddings\.position_ids)",
    r".*\.softmax_temperature_cross")


def hf_vision_table(layers: int, ours: str, theirs: str, siglip: bool = False) -> list:
    return expand(HF_VISION | (HF_SIGLIP if siglip else HF_CLIP), ours, theirs, layers)


def official_table(config: ManagerTowerConfig) -> list:
    """The layout of the official ManagerTower, BridgeTower and METER states."""
    if config.fusion == "manager" and config.manager_type == "sae":
        raise ValueError("manager_type 'sae' has no official code, so there are no official weights of it")
    rows = expand(CLIP, "image_encoder.", "vit_model.visual.", config.vision_layers)
    rows += expand(ROBERTA, "text_encoder.", "text_transformer.", config.text_layers)
    rows += expand({"type_embedding": "token_type_embeddings.weight"})
    for m in ("text", "image"):
        rows += expand({"transform.*": "transform.*", "pooler.*": "pooler.dense.*"}, f"{m}_", f"cross_modal_{m}_")
        if config.fusion == "manager":
            rows += expand({f"{m}_layer_embedding": f"layer_embeddings_{m}.weight"})
        for i in range(config.num_layers):
            rows += expand(CROSS, f"{m}_layers.{i}.", f"cross_modal_{m}_layers.{i}.")
            if config.fusion == "manager":
                rows += manager_rows(config, m, i)
            elif config.fusion == "bridge":
                theirs = f"cross_modal_{m}_link_tower.{i - 1}.LayerNorm" if i else f"cross_modal_{m}_layernorm"
                rows += expand({f"{m}_bridges.{i}.*": f"{theirs}.*"})
    return rows + [row for name in config.heads for row in expand(HEAD_KEYS[name], f"heads.{name}.")]


def manager_rows(config: ManagerTowerConfig, modality: str, i: int) -> list:
    prefixes = f"{modality}_managers.{i}.", f"cross_modal_{modality}_manager_tower.{i}.manager_layer."
    norms = [f"LayerNorm.{n}." for n in range(config.num_experts(modality) + (i > 0))]
    affine = {"scale": " ".join(f"{n}weight" for n in norms), "shift": " ".join(f"{n}bias" for n in norms)}
    adaptive = config.manager_type == "aaue" and i > 0
    scores = {"score_previous": "layer_scores_cross"} if adaptive else {"scores": "layer_scores"}
    names = {"temperature": "softmax_temperature", **(ADAPTIVE if adaptive else {})}
    return expand(affine, *prefixes, how="stack") + expand(scores, *prefixes, how="scores") + expand(names, *prefixes)


def from_official(state_dict: dict, config: ManagerTowerConfig) -> dict:
    """An official ManagerTower, BridgeTower or METER state -> ours, strictly; import_state raises the errors.
    Load it with `model.load_state_dict(state, strict=True, assign=True)`."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in ManagerTower(config).state_dict().items()}
    dropped = DEAD_KEYS if "itc" in config.heads else (*DEAD_KEYS, "temperature")
    return import_state(state_dict, official_table(config), shapes, dropped)


def to_official(state_dict: dict, config: ManagerTowerConfig) -> dict:
    """Ours -> official names: every key that the official model uses. Also for gradients by our parameter names."""
    return export_state(state_dict, official_table(config))


def read_safetensors(path) -> dict:
    """A .safetensors file, or the model.safetensors of a folder, as a dict of CPU tensors; ValueError if unreadable."""
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        what = "is not a .safetensors file" if file.is_file() else "does not exist"
        raise ValueError(f"{file} {what}; `python prepare.py weights` makes a folder with model.safetensors from "
                         "PyTorch's .bin, .pt and .ckpt files")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error})") from error


def load_unimodal(model: ManagerTower, vision, text) -> None:
    """Fill both encoders from pre-trained ones: .safetensors files, or folders with model.safetensors.

    vision: CLIP in HF's layout or OpenAI's, its position table resized to the model's image size; text: RoBERTa as HF's
    RobertaModel or RobertaForMaskedLM. Raises ValueError for a missing, left-over or misshapen key."""
    encoder, state = model.image_encoder, read_safetensors(vision)
    if any(k.startswith("visual.") for k in state):
        positions, table = "visual.positional_embedding", expand(CLIP, "", "visual.", len(encoder.blocks))
        dropped = (r"(?!visual\.).*", r"visual\.proj")  # CLIP's own text encoder
    else:
        prefix = "vision_model." if any(k.startswith("vision_model.") for k in state) else ""
        positions = f"{prefix}embeddings.position_embedding.weight"
        table = hf_vision_table(len(encoder.blocks), "", prefix)
        dropped = (r"text_model\..*", "logit_scale", r"(visual|text)_projection\.weight", r".*position_ids")
    load_encoder(encoder, state, table, dropped, vision, positions)
    encoder, state = model.text_encoder, read_safetensors(text)
    prefix = "roberta." if any(k.startswith("roberta.") for k in state) else ""
    dropped = (r"lm_head\..*", r".*pooler\..*", r".*position_ids")
    load_encoder(encoder, state, expand(ROBERTA, "", prefix, len(encoder.layers)), dropped, text)


def load_encoder(encoder: nn.Module, state: dict, table: list, dropped: tuple, source, positions: str = "") -> None:
    """Load a foreign state into one encoder; positions: the key of a table to resize. Its errors name the source."""
    try:
        if positions in state:
            grid = encoder.image_size // encoder.patch.kernel_size[0]
            state = {**state, positions: resize_position_embedding(state[positions], grid)}
        shapes = {k: v.shape for k, v in encoder.state_dict().items()}
        encoder.load_state_dict(import_state(state, table, shapes, dropped))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def resize_position_embedding(table: Tensor, grid: int) -> Tensor:
    """Class row + (g * g, D) -> class row + (grid * grid, D), bicubic without antialias; as it is for g = grid."""
    old = math.isqrt(max(len(table) - 1, 0))
    if old * old + 1 != len(table):
        raise ValueError(f"a position table of shape {tuple(table.shape)} is not a class row and a square grid")
    if old == grid:
        return table
    patches = table[1:].float().T.reshape(1, -1, old, old)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], patches.flatten(2)[0].T.to(table.dtype)])


# ---------------------------------------------------------------- checkpoint folders: model.safetensors + config.json
def write_atomically(path, write) -> None:
    """write(temporary path), flush to disk, rename: the file is either the old one or the whole new one. OSError."""
    path, temporary = Path(path), Path(f"{path}.tmp{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (RuntimeError, SafetensorError) as error:  # what torch.save and save_file make of a full disk
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(f"{str(error).splitlines()[0]} ({free:.0f} MiB are free there)") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_folder(state: dict, config, folder) -> None:
    """state -> folder/model.safetensors and the config dataclass -> folder/config.json, each written atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    text = json.dumps({"model": type(config).__name__.removesuffix("Config"), **dataclasses.asdict(config)}, indent=1)
    write_atomically(folder / "config.json", lambda path: path.write_text(text + "\n"))
    write_atomically(folder / "model.safetensors", lambda path: save_file(state, path))


def save_model(model: ManagerTower, folder) -> None:
    """Write model.safetensors and config.json, atomically."""
    save_folder(model.state_dict(), model.config, folder)


def read_config(folder, kind=ManagerTowerConfig):
    """folder/config.json -> the config dataclass `kind`; ValueError if it is missing, broken or another model's."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a checkpoint folder: it has no config.json")
    try:
        values = dict(json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from error
    name = values.pop("model", None)
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(kind)})
    if f"{name}Config" != kind.__name__ or unknown:
        raise ValueError(f"{file} is not the config of a {kind.__name__.removesuffix('Config')}: "
                         f"model {name!r}, unknown fields {unknown}")
    return kind(**values)


def load_model(folder, **overrides) -> ManagerTower:
    """A checkpoint folder -> model. overrides are config fields: other `heads`, another `image_size`, ...

    What fits is kept; other tasks' heads are dropped and new ones initialised (both printed); the position table is
    resized; NLVR2's third token type copies the second; a new rank head starts as the match row of the ITM head. Any
    other difference raises ValueError."""
    model = ManagerTower(dataclasses.replace(read_config(folder), **overrides))
    state, own = read_safetensors(folder), model.state_dict()
    positions, types = "image_encoder.position_embedding", "type_embedding"
    if positions in state:
        grid = model.config.image_size // model.config.patch_size
        state[positions] = resize_position_embedding(state[positions], grid)
    if types in state:
        state[types] = torch.cat([state[types], state[types][1:2]])[: len(own[types])]
    if "retrieval" in model.heads and "heads.retrieval.weight" not in state:
        state |= {k.replace("itm", "retrieval"): v[1:2] for k, v in state.items() if k.startswith("heads.itm.")}
    stored = {k.split(".")[1] for k in state if k.startswith("heads.")}
    dropped, new = sorted(stored - set(model.heads)), sorted(set(model.heads) - stored)
    state = {k: v for k, v in state.items() if not k.startswith(tuple(f"heads.{name}." for name in dropped))}
    state |= {k: v for k, v in own.items() if k.startswith(tuple(f"heads.{name}." for name in new))}
    theirs, ours = ({k: tuple(v.shape) for k, v in s.items()} for s in (state, own))
    if theirs != ours:
        wrong = [f"{k}: {theirs.get(k, 'missing')} in the file, {ours.get(k, 'missing')} in the model"
                 for k in sorted({*theirs, *ours}) if theirs.get(k) != ours.get(k)]
        raise ValueError(f"{folder} does not fit the model. {textwrap.shorten('; '.join(wrong), 800)}")
    model.load_state_dict(state)
    if (dropped or new) and os.environ.get("RANK", "0") == "0":
        print(f"{folder}: heads dropped: {', '.join(dropped) or 'none'}; heads initialised: {', '.join(new) or 'none'}")
    return model
