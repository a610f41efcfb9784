"""ManagerTower in plain PyTorch: two unimodal encoders, managers, cross-modal layers, heads, and the import of official weights.

Papers: ManagerTower (ACL 2023) section 3, Manager (TCSVT 2025) section III. BridgeTower and METER live in the same frame, as
values of `fusion`. Read manager.py first, then this file from `ManagerTower.fuse` on.

Shapes: B batch, N experts (managed layers), L tokens (Lt text, Li image), D width, H heads, V vocabulary. The stack of experts
is always (B, N, L, D). attention_mask is 1 for real tokens.

    model = ManagerTower(ManagerTowerConfig.tiny())
    features = model(pixels, input_ids, attention_mask)            # (B, 3, S, S), (B, Lt), (B, Lt)
    match_logits = model.heads["itm"](features.pooled)             # (B, 2)
"""
import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
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
    """The architecture; the defaults are the papers' base model (CLIP ViT-B/16 + RoBERTa-base, 6 cross-modal layers)."""
    # vision
    image_size: int = 288
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    # text
    vocab_size: int = 50265
    max_positions: int = 514
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
    dropout: float = 0.1  # text encoder, cross-modal layers, NLVR2 head; CLIP has none
    contrastive_size: int = 256
    temperature: float = 0.07  # of ITC, a divisor
    # managers
    fusion: str = "manager"  # manager | bridge (BridgeTower) | last (METER)
    manager_type: str = "aaue"  # aaue | saue | sae
    manager_weight: str = "vector"  # vector | scalar
    managed_layers_text: int = 6
    managed_layers_image: int = 6
    mask_fused_query: bool = False  # mask padding in AAUE's attention; the released weights were trained without
    manager_noise: bool = True
    # heads
    heads: tuple[str, ...] = ("mlm", "itm")
    num_answers: int = 3129
    head_hidden_scale: int = 1
    max_text_len: int = 50

    @classmethod
    def base(cls, **overrides) -> "ManagerTowerConfig":
        return cls(**overrides)

    @classmethod
    def large(cls, **overrides) -> "ManagerTowerConfig":
        """CLIP ViT-L/14 + RoBERTa-large."""
        return cls(**{**dict(image_size=294, patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16, text_width=1024,
                             text_layers=24, text_heads=16, text_mlp_width=4096, hidden_size=1024, num_heads=16), **overrides})

    @classmethod
    def tiny(cls, **overrides) -> "ManagerTowerConfig":
        """For the built-in demo data: learns on a CPU in minutes."""
        return cls(**{**dict(image_size=64, patch_size=8, vision_width=96, vision_layers=3, vision_heads=3, vocab_size=300,
                             max_positions=52, text_width=96, text_layers=3, text_heads=3, text_mlp_width=384, hidden_size=96,
                             num_layers=2, num_heads=3, contrastive_size=64, managed_layers_text=3, managed_layers_image=3, dropout=0.0,
                             max_text_len=16), **overrides})

    def __post_init__(self):
        self.heads = tuple(self.heads)
        for name, value, allowed in (("fusion", self.fusion, ("manager", "bridge", "last")),
                                     ("manager_type", self.manager_type, ("aaue", "saue", "sae")),
                                     ("manager_weight", self.manager_weight, ("vector", "scalar")),
                                     *(("heads", head, HEADS) for head in self.heads)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        for width, heads in (("vision_width", "vision_heads"), ("text_width", "text_heads"), ("hidden_size", "num_heads"),
                             ("image_size", "patch_size")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}")
        for kind, layers, managed in (("text", self.text_layers, self.num_experts("text")),
                                      ("vision", self.vision_layers, self.num_experts("image"))):
            if not 0 < managed <= layers:
                raise ValueError(f"{managed} managed layers, but the {kind} encoder has {layers} (fusion {self.fusion!r})")
        if self.max_text_len + self.pad_token_id + 1 > self.max_positions:
            raise ValueError(f"max_text_len {self.max_text_len} does not fit into max_positions {self.max_positions} "
                             f"(positions start at {self.pad_token_id + 1})")

    def num_experts(self, modality: str) -> int:
        """N: how many of the encoder's last layers reach the cross-modal layers."""
        managed = self.managed_layers_text if modality == "text" else self.managed_layers_image
        return {"manager": managed, "bridge": self.num_layers, "last": 1}[self.fusion]


# ---------------------------------------------------------------------------------------------------------------------
# Encoders and cross-modal layers


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Multi-head attention (B, Lq, D), (B, Lk, D), (B, Lk, D) -> (B, Lq, D); mask (B or 1, 1, 1 or Lq, Lk), True = attend."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, L, D/H)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(2)


def run_layers(layers: nn.ModuleList, x: Tensor, args: tuple, keep, checkpointing: bool) -> list[Tensor]:
    """Hidden states `keep` in ascending order: 0 = x, k = output of layer k (from 1). Layers above max(keep) do not run."""
    keep, kept = set(keep), []
    for i in range(max(keep) + 1):
        if i > 0 and checkpointing and torch.is_grad_enabled():
            x = checkpoint(layers[i - 1], x, *args, use_reentrant=False)
        elif i > 0:
            x = layers[i - 1](x, *args)
        if i in keep:
            kept.append(x)
    return kept


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), CLIP's activation, through the fused SiLU."""
    return F.silu(1.702 * x) / 1.702


class ViTBlock(nn.Module):
    """Pre-norm transformer block without dropout."""

    def __init__(self, width: int, heads: int, mlp_width: int, siglip: bool):
        super().__init__()
        eps = 1e-6 if siglip else 1e-5
        self.heads, self.siglip = heads, siglip
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.fc = nn.Linear(width, mlp_width)
        self.fc_out = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(attention(*self.qkv(self.ln_1(x)).chunk(3, dim=-1), self.heads))
        hidden = self.fc(self.ln_2(x))
        return x + self.fc_out(F.gelu(hidden, approximate="tanh") if self.siglip else quick_gelu(hidden))


class ViT(nn.Module):
    """CLIP's ViT (class token, ln_pre, QuickGELU), or SigLIP's (none of them; GELU tanh, a bias in the patch embedding)."""

    def __init__(self, image_size: int, patch_size: int, width: int, layers: int, heads: int, mlp_width: int | None = None,
                 siglip: bool = False):
        super().__init__()
        num_patches = (image_size // patch_size) ** 2
        self.patch = nn.Conv2d(3, width, patch_size, patch_size, bias=siglip)
        self.class_embedding = None if siglip else nn.Parameter(0.02 * torch.randn(width))
        self.position_embedding = nn.Parameter(0.02 * torch.randn(num_patches + (not siglip), width))
        self.ln_pre = nn.Identity() if siglip else nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ViTBlock(width, heads, mlp_width or 4 * width, siglip) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width, eps=1e-6 if siglip else 1e-5)
        self.checkpointing = False

    def forward(self, pixels: Tensor, keep) -> list[Tensor]:
        """pixels (B, 3, S, S) -> hidden states `keep` (0 = embeddings, k = output of block k), each (B, L, D), before ln_post."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # (B, L, D)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.position_embedding.to(x.dtype))
        return run_layers(self.blocks, x, (), keep, self.checkpointing)


class BertLayer(nn.Module):
    """Post-norm BERT layer: RoBERTa's (cross=False), or a cross-modal layer, which also attends to the other modality."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float, eps: float, cross: bool = False):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        if cross:
            self.q = nn.Linear(width, width)
            self.kv = nn.Linear(width, 2 * width)
            self.cross_proj = nn.Linear(width, width)
            self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.fc = nn.Linear(width, mlp_width)
        self.fc_out = nn.Linear(mlp_width, width)
        self.ln_3 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None, other: Tensor | None = None, other_mask: Tensor | None = None) -> Tensor:
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
        width, self.pad = config.text_width, config.pad_token_id
        self.word_embedding = nn.Embedding(config.vocab_size, width, padding_idx=self.pad)
        self.position_embedding = nn.Embedding(config.max_positions, width, padding_idx=self.pad)
        self.type_embedding = nn.Parameter(0.02 * torch.randn(1, width))
        self.ln = nn.LayerNorm(width)
        self.layers = nn.ModuleList(BertLayer(width, config.text_heads, config.text_mlp_width, config.dropout, 1e-5)
                                    for _ in range(config.text_layers))
        self.dropout = config.dropout
        self.checkpointing = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor, keep) -> list[Tensor]:
        """(B, L), (B, L) -> hidden states `keep` (0 = embeddings, k = output of layer k), each (B, L, D)."""
        real = (input_ids != self.pad).long()
        positions = torch.cumsum(real, dim=1) * real + self.pad  # from the ids, not from the mask: pad + 1, pad + 2, ...; pad
        x = self.word_embedding(input_ids) + self.position_embedding(positions) + self.type_embedding
        x = F.dropout(self.ln(x), self.dropout, self.training)
        return run_layers(self.layers, x, (key_mask(attention_mask),), keep, self.checkpointing)


def key_mask(attention_mask: Tensor) -> Tensor:
    return attention_mask[:, None, None, :].bool()  # (B, 1, 1, L)


# ---------------------------------------------------------------------------------------------------------------------
# Heads


class MLMHead(nn.Module):
    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.ln = nn.LayerNorm(width, eps=1e-12)
        self.decoder = nn.Linear(width, vocab_size, bias=False)  # not tied to the word embedding
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, text: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        return self.decoder(self.ln(F.gelu(self.dense(text)))) + self.bias


class ClassifierHead(nn.Module):
    def __init__(self, width: int, hidden: int, num_classes: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.fc = nn.Linear(width, hidden)
        self.ln = nn.LayerNorm(hidden)
        self.fc_out = nn.Linear(hidden, num_classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, width) -> (B, num_classes)"""
        return self.fc_out(F.gelu(self.ln(self.fc(F.dropout(pooled, self.dropout, self.training)))))


class ContrastiveHead(nn.Module):
    def __init__(self, config: ManagerTowerConfig):
        super().__init__()
        # sized by the towers; the official code sizes them by hidden_size, which only works when all widths are equal
        self.text = nn.Linear(config.text_width, config.contrastive_size)
        self.image = nn.Linear(config.vision_width, config.contrastive_size)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """First tokens (B, D_text), (B, D_image) -> unit vectors (B, C), (B, C)."""
        return F.normalize(self.text(text), dim=-1), F.normalize(self.image(image), dim=-1)


def make_head(name: str, config: ManagerTowerConfig) -> nn.Module:
    width = 2 * config.hidden_size  # of the pooled features
    hidden = width * config.head_hidden_scale
    return {"mlm": lambda: MLMHead(config.hidden_size, config.vocab_size),
            "itm": lambda: nn.Linear(width, 2),
            "itc": lambda: ContrastiveHead(config),
            "vqa": lambda: ClassifierHead(width, hidden, config.num_answers),
            "nlvr2": lambda: ClassifierHead(2 * width, hidden, 2, config.dropout),
            "snli_ve": lambda: ClassifierHead(width, hidden, 3),
            "retrieval": lambda: nn.Linear(width, 1)}[name]()


# ---------------------------------------------------------------------------------------------------------------------
# The model


@dataclass
class Features:
    text: Tensor  # (B, Lt, D)
    image: Tensor  # (B, Li, D)
    pooled: Tensor  # (B, 2D): text, then image


class ManagerTower(nn.Module):
    """Two encoders, and num_layers pairs of cross-modal layers, each reading what its managers aggregate."""

    def __init__(self, config: ManagerTowerConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.text_encoder = TextEncoder(config)
        self.image_encoder = ViT(config.image_size, config.patch_size, config.vision_width, config.vision_layers, config.vision_heads)
        self.text_transform = nn.Linear(config.text_width, width)
        self.image_transform = nn.Linear(config.vision_width, width)
        self.type_embedding = nn.Parameter(0.02 * torch.randn(3 if "nlvr2" in config.heads else 2, width))
        if config.fusion == "manager":
            self.text_layer_embedding = nn.Parameter(0.02 * torch.randn(config.text_layers, width))
            self.image_layer_embedding = nn.Parameter(0.02 * torch.randn(config.vision_layers, width))
            self.text_managers = self.make_managers(config.managed_layers_text)
            self.image_managers = self.make_managers(config.managed_layers_image)
        elif config.fusion == "bridge":
            self.text_bridges = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.num_layers))
            self.image_bridges = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.num_layers))
        self.text_layers = self.make_layers()
        self.image_layers = self.make_layers()
        self.text_pooler = nn.Linear(width, width)
        self.image_pooler = nn.Linear(width, width)
        self.heads = nn.ModuleDict({name: make_head(name, config) for name in config.heads})
        self.apply(self.init_weights)

    def make_managers(self, num_experts: int) -> nn.ModuleList:
        config, managers = self.config, []
        for i in range(config.num_layers):
            if config.manager_type == "aaue" and i > 0:
                managers.append(AdaptiveManager(config.hidden_size, num_experts, config.manager_weight, config.manager_noise))
            else:  # the first cross-modal layer has no previous output, so AAUE starts with a static manager
                sae = config.manager_type == "sae"
                managers.append(StaticManager(config.hidden_size, num_experts, i if sae else min(i, 1), config.manager_weight,
                                              config.manager_noise, sae))
        return nn.ModuleList(managers)

    def make_layers(self) -> nn.ModuleList:
        c = self.config
        return nn.ModuleList(BertLayer(c.hidden_size, c.num_heads, c.mlp_ratio * c.hidden_size, c.dropout, 1e-12, cross=True)
                             for _ in range(c.num_layers))

    @staticmethod
    def init_weights(module: nn.Module):
        """BERT's initialisation: N(0, 0.02) for matrices, zero biases, and a zero row for padding."""
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            if getattr(module, "padding_idx", None) is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()

    def set_checkpointing(self, on: bool):
        """Activation checkpointing of encoder blocks and cross-modal layers: a third more computation, far less memory."""
        self.text_encoder.checkpointing = self.image_encoder.checkpointing = self.checkpointing = on

    checkpointing = False

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, Lt), (B, Lt) -> the text experts (B, N, Lt, D_text): the last N layers, before projection."""
        top = self.config.text_layers + 1
        return torch.stack(self.text_encoder(input_ids, attention_mask, range(top - self.config.num_experts("text"), top)), 1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> the image experts (B, N, Li, D_image): the last N blocks, each after the one shared ln_post."""
        top = self.config.vision_layers + 1
        states = self.image_encoder(pixels, range(top - self.config.num_experts("image"), top))
        return self.image_encoder.ln_post(torch.stack(states, 1))

    def contrast(self, text_experts: Tensor, image_experts: Tensor) -> tuple[Tensor, Tensor]:
        """ITC features: unit vectors (B, C) of the first token of the last expert of each modality, before any fusion."""
        return self.heads["itc"](text_experts[:, -1, 0], image_experts[:, -1, 0])

    def project(self, experts: Tensor, transform: nn.Linear, type_row: int, layer_embedding: Tensor | None) -> Tensor:
        """(B, N, L, D_modality) -> (B, N, L, D), with type and layer embeddings; standardised when managers will read them."""
        embedding = self.type_embedding[type_row]
        if layer_embedding is None:
            return transform(experts) + embedding
        embedding = embedding + layer_embedding[-experts.shape[1] :]  # rows are absolute layer numbers: (N, D)
        return standardize(transform(experts) + embedding[:, None, :])

    def fuse(self, text_experts: Tensor, image_experts: Tensor, attention_mask: Tensor, image_type: int = 1) -> Features:
        """The cross-modal encoder (ACL section 3.2; Manager, TCSVT, section III).

        text_experts (B, N, Lt, D_text), image_experts (B, N, Li, D_image), attention_mask (B, Lt); image_type is 2 for the
        second image of NLVR2. Managers or bridges of layer i read the outputs of layer i - 1.
        """
        text_experts = self.project(text_experts, self.text_transform, 0, getattr(self, "text_layer_embedding", None))
        image_experts = self.project(image_experts, self.image_transform, image_type, getattr(self, "image_layer_embedding", None))
        text_mask = key_mask(attention_mask)
        text, image = [], []  # outputs of the cross-modal layers
        for i, (text_layer, image_layer) in enumerate(zip(self.text_layers, self.image_layers, strict=True)):
            text_in, image_in = self.layer_inputs(i, text_experts, image_experts, text, image, attention_mask)
            if self.checkpointing and torch.is_grad_enabled():
                text.append(checkpoint(text_layer, text_in, text_mask, image_in, None, use_reentrant=False))
                image.append(checkpoint(image_layer, image_in, None, text_in, text_mask, use_reentrant=False))
            else:
                text.append(text_layer(text_in, text_mask, image_in, None))
                image.append(image_layer(image_in, None, text_in, text_mask))
        pooled = torch.cat([self.text_pooler(text[-1][:, 0]).tanh(), self.image_pooler(image[-1][:, 0]).tanh()], dim=-1)
        return Features(text[-1], image[-1], pooled)

    def layer_inputs(self, i: int, text_experts: Tensor, image_experts: Tensor, text: list, image: list,
                     attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What cross-modal layer i reads; text and image are the outputs of the layers before it."""
        fusion, text_c, image_c = self.config.fusion, text[-1] if text else None, image[-1] if image else None
        if fusion == "last":
            return (text_c, image_c) if i else (text_experts[:, -1], image_experts[:, -1])
        if fusion == "bridge":
            return (self.text_bridges[i](text_experts[:, i] + text_c if i else text_experts[:, i]),
                    self.image_bridges[i](image_experts[:, i] + image_c if i else image_experts[:, i]))
        if self.config.manager_type == "sae" and i:
            return (self.text_managers[i](text_experts, torch.stack(text, 1)),
                    self.image_managers[i](image_experts, torch.stack(image, 1)))
        mask = attention_mask if self.config.mask_fused_query else None
        return (self.text_managers[i](text_experts, text_c, image_c),
                self.image_managers[i](image_experts, image_c, text_c, mask))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, image_type: int = 1) -> Features:
        """pixels (B, 3, S, S), input_ids and attention_mask (B, Lt), of any integer dtype."""
        input_ids = input_ids.long()
        return self.fuse(self.encode_text(input_ids, attention_mask), self.encode_image(pixels), attention_mask, image_type)


# ---------------------------------------------------------------------------------------------------------------------
# Weights: one table of (our key, their keys, how) for every foreign layout. how: "cat" their tensors along rows, "stack"
# them, or "scores": theirs has the shape (1, n, 1, width).


def import_state(state: dict, table: list, shapes: dict, dropped: tuple[str, ...] = ()) -> dict:
    """Foreign state -> ours, by renaming, concatenating and reshaping; no value is read, so meta tensors work too.

    shapes: our key -> shape. dropped: patterns of keys that are known to be dead. Raises ValueError, naming every missing,
    left-over or misshapen key.
    """
    wanted, out, wrong = {key for _, keys, _ in table for key in keys}, {}, []
    left_over = [k for k in state if k not in wanted and not any(re.fullmatch(p, k) for p in dropped)]
    for name, keys in (("missing", sorted(wanted - set(state))), ("unknown", left_over)):
        if keys:
            wrong.append(f"{name}: {', '.join(keys[:8])}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}")
    for ours, keys, how in table:
        parts, (rows, *rest) = [state[k] for k in keys if k in state], shapes[ours] or (None,)
        part_shape = {"cat": (rows // len(keys), *rest) if rows else (), "stack": tuple(rest),
                      "scores": (1, rows, 1, *rest)}[how]
        bad = [f"{k} is {tuple(p.shape)}, should be {part_shape}" for k, p in zip(keys, parts) if tuple(p.shape) != part_shape]
        if bad or len(parts) < len(keys):
            wrong += bad
        elif how == "scores":
            out[ours] = parts[0].reshape(shapes[ours])
        else:
            out[ours] = parts[0] if len(parts) == 1 and how == "cat" else {"cat": torch.cat, "stack": torch.stack}[how](parts)
    if wrong:
        raise ValueError("the weights do not fit the config. " + "; ".join(wrong))
    return out


def export_state(state: dict, table: list) -> dict:
    """The inverse of import_state, for any dict keyed by our parameter names, also gradients and partial dicts."""
    out = {}
    for ours, keys, how in table:
        if ours in state:
            tensor = state[ours]
            parts = {"cat": lambda: tensor.chunk(len(keys)) if len(keys) > 1 else (tensor,), "stack": lambda: tensor.unbind(0),
                     "scores": lambda: (tensor[None, :, None, :],)}[how]()
            out.update(zip(keys, parts, strict=True))
    return out


def pair(ours: str, *theirs: str, how: str = "cat") -> list:
    """Rows of the table for a module's weight and bias."""
    return [(f"{ours}.{p}", [f"{t}.{p}" for t in theirs], how) for p in ("weight", "bias")]


def bert_table(ours: str, theirs: str, cross: bool = False) -> list:
    a, c = f"{theirs}.attention", f"{theirs}.crossattention"
    rows = [*pair(f"{ours}.qkv", *(f"{a}.self.{x}" for x in ("query", "key", "value"))), *pair(f"{ours}.proj", f"{a}.output.dense"),
            *pair(f"{ours}.ln_1", f"{a}.output.LayerNorm"), *pair(f"{ours}.fc", f"{theirs}.intermediate.dense"),
            *pair(f"{ours}.fc_out", f"{theirs}.output.dense"), *pair(f"{ours}.ln_3", f"{theirs}.output.LayerNorm")]
    if cross:
        rows += [*pair(f"{ours}.q", f"{c}.self.query"), *pair(f"{ours}.kv", f"{c}.self.key", f"{c}.self.value"),
                 *pair(f"{ours}.cross_proj", f"{c}.output.dense"), *pair(f"{ours}.ln_2", f"{c}.output.LayerNorm")]
    return rows


def roberta_table(layers: int, ours: str, theirs: str) -> list:
    """HF's RobertaModel layout, also inside the official states; ours and theirs are prefixes that end in a dot or are empty."""
    e = f"{theirs}embeddings."
    rows = [(f"{ours}{x}_embedding.weight", [f"{e}{x}_embeddings.weight"], "cat") for x in ("word", "position")]
    rows += [(f"{ours}type_embedding", [f"{e}token_type_embeddings.weight"], "cat"), *pair(f"{ours}ln", f"{e}LayerNorm")]
    return rows + [r for i in range(layers) for r in bert_table(f"{ours}layers.{i}", f"{theirs}encoder.layer.{i}")]


def clip_table(layers: int, ours: str, theirs: str) -> list:
    """OpenAI's CLIP layout (`visual.`), also inside the official states."""
    rows = [(f"{ours}{a}", [f"{theirs}{b}"], "cat") for a, b in (("class_embedding", "class_embedding"), ("patch.weight", "conv1.weight"),
                                                               ("position_embedding", "positional_embedding"))]
    rows += pair(f"{ours}ln_pre", f"{theirs}ln_pre") + pair(f"{ours}ln_post", f"{theirs}ln_post")
    for i in range(layers):
        a, b = f"{ours}blocks.{i}", f"{theirs}transformer.resblocks.{i}"
        rows += [(f"{a}.qkv.{p}", [f"{b}.attn.in_proj_{p}"], "cat") for p in ("weight", "bias")]
        for x, y in (("proj", "attn.out_proj"), ("ln_1", "ln_1"), ("ln_2", "ln_2"), ("fc", "mlp.c_fc"), ("fc_out", "mlp.c_proj")):
            rows += pair(f"{a}.{x}", f"{b}.{y}")
    return rows


def hf_vision_table(layers: int, ours: str, theirs: str, siglip: bool = False) -> list:
    """HF's CLIPVisionModel and SiglipVisionModel layout."""
    e = f"{theirs}embeddings."
    rows = [(f"{ours}patch.weight", [f"{e}patch_embedding.weight"], "cat"),
            (f"{ours}position_embedding", [f"{e}position_embedding.weight"], "cat"), *pair(f"{ours}ln_post", f"{theirs}post_layernorm")]
    if siglip:
        rows += [(f"{ours}patch.bias", [f"{e}patch_embedding.bias"], "cat")]
    else:
        rows += [(f"{ours}class_embedding", [f"{e}class_embedding"], "cat"), *pair(f"{ours}ln_pre", f"{theirs}pre_layrnorm")]
    for i in range(layers):
        a, b = f"{ours}blocks.{i}", f"{theirs}encoder.layers.{i}"
        rows += pair(f"{a}.qkv", *(f"{b}.self_attn.{x}_proj" for x in "qkv"))
        for x, y in (("proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("fc", "mlp.fc1"), ("fc_out", "mlp.fc2")):
            rows += pair(f"{a}.{x}", f"{b}.{y}")
    return rows


def manager_table(config: ManagerTowerConfig, modality: str) -> list:
    rows = []
    for i in range(config.num_layers):
        ours, theirs = f"{modality}_managers.{i}", f"cross_modal_{modality}_manager_tower.{i}.manager_layer"
        norms = [f"{theirs}.LayerNorm.{n}" for n in range(config.num_experts(modality) + (i > 0))]
        rows += [(f"{ours}.scale", [f"{n}.weight" for n in norms], "stack"), (f"{ours}.shift", [f"{n}.bias" for n in norms], "stack"),
                 (f"{ours}.temperature", [f"{theirs}.softmax_temperature"], "cat")]
        if config.manager_type == "aaue" and i > 0:
            rows += [(f"{ours}.score_previous", [f"{theirs}.layer_scores_cross"], "scores"),
                     *pair(f"{ours}.norm_query", f"{theirs}.extra_query_LayerNorm"), *pair(f"{ours}.controller", f"{theirs}.linear_controller"),
                     *pair(f"{ours}.q_proj", f"{theirs}.fusion_attention.q_proj"), *pair(f"{ours}.k_proj", f"{theirs}.fusion_attention.k_proj")]
        else:
            rows.append((f"{ours}.scores", [f"{theirs}.layer_scores"], "scores"))
    return rows


def head_table(name: str) -> list:
    ours = f"heads.{name}"
    if name == "mlm":
        return [*pair(f"{ours}.dense", "mlm_score.transform.dense"), *pair(f"{ours}.ln", "mlm_score.transform.LayerNorm"),
                (f"{ours}.decoder.weight", ["mlm_score.decoder.weight"], "cat"), (f"{ours}.bias", ["mlm_score.bias"], "cat")]
    if name == "itc":
        return [*pair(f"{ours}.text", "cross_modal_itc_text_head.fc"), *pair(f"{ours}.image", "cross_modal_itc_image_head.fc"),
                (f"{ours}.temperature", ["temperature"], "cat")]
    if name in ("itm", "retrieval"):
        return pair(ours, {"itm": "itm_score.fc", "retrieval": "rank_output"}[name])
    theirs = {"vqa": "vqa", "nlvr2": "nlvr2", "snli_ve": "snli"}[name] + "_classifier"
    return [*pair(f"{ours}.fc", f"{theirs}.0"), *pair(f"{ours}.ln", f"{theirs}.1"), *pair(f"{ours}.fc_out", f"{theirs}.3")]


def official_table(config: ManagerTowerConfig) -> list:
    """The layout of the official ManagerTower, BridgeTower and METER states."""
    if config.fusion == "manager" and config.manager_type == "sae":
        raise ValueError("manager_type 'sae' has no official code, so there are no official weights of it")
    rows = clip_table(config.vision_layers, "image_encoder.", "vit_model.visual.")
    rows += roberta_table(config.text_layers, "text_encoder.", "text_transformer.")
    rows.append(("type_embedding", ["token_type_embeddings.weight"], "cat"))
    for m in ("text", "image"):
        rows += pair(f"{m}_transform", f"cross_modal_{m}_transform") + pair(f"{m}_pooler", f"cross_modal_{m}_pooler.dense")
        for i in range(config.num_layers):
            rows += bert_table(f"{m}_layers.{i}", f"cross_modal_{m}_layers.{i}", cross=True)
        if config.fusion == "manager":
            rows += [(f"{m}_layer_embedding", [f"layer_embeddings_{m}.weight"], "cat"), *manager_table(config, m)]
        elif config.fusion == "bridge":
            for i in range(config.num_layers):
                theirs = f"cross_modal_{m}_link_tower.{i - 1}.LayerNorm" if i else f"cross_modal_{m}_layernorm"
                rows += pair(f"{m}_bridges.{i}", theirs)
    return rows + [row for name in config.heads for row in head_table(name)]


# in every official state, but not used by its model
DEAD_KEYS = (r"vit_model\.(positional_embedding|ln_final\..*)", r"text_transformer\.(pooler\..*|embeddings\.position_ids)",
             r".*\.softmax_temperature_cross")


def meta_shapes(config: ManagerTowerConfig) -> dict:
    with torch.device("meta"):
        return {k: v.shape for k, v in ManagerTower(config).state_dict().items()}


def from_official(state_dict: dict, config: ManagerTowerConfig) -> dict:
    """An official ManagerTower, BridgeTower or METER state -> ours, strictly; see import_state for the errors.

    Load it with `model.load_state_dict(state, strict=True, assign=True)`.
    """
    dropped = DEAD_KEYS if "itc" in config.heads else (*DEAD_KEYS, "temperature")
    return import_state(state_dict, official_table(config), meta_shapes(config), dropped)


def to_official(state_dict: dict, config: ManagerTowerConfig) -> dict:
    """Ours -> official names: every key that the official model uses. Also for gradients keyed by our parameter names."""
    return export_state(state_dict, official_table(config))


def read_safetensors(path) -> dict:
    """A .safetensors file, or the model.safetensors of a folder, as a dict of CPU tensors; ValueError if it cannot be read."""
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist; expected a .safetensors file or a folder with model.safetensors")
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} is not a .safetensors file; `python prepare.py weights --source {file} --out FOLDER` makes one")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error})") from error


def load_unimodal(model: ManagerTower, vision, text) -> None:
    """Fill both encoders from pre-trained ones: .safetensors files, or folders with model.safetensors.

    vision: CLIP in HF's layout or OpenAI's; text: RoBERTa as HF's RobertaModel or RobertaForMaskedLM. The position table is
    resized to the model's image size. Raises ValueError for a missing, left-over or misshapen key.
    """
    encoder, state = model.image_encoder, read_safetensors(vision)
    if any(k.startswith("visual.") for k in state):
        table = clip_table(len(encoder.blocks), "", "visual.")
        dropped = (r"(?!visual\.).*", r"visual\.proj")  # CLIP's own text encoder
    else:
        prefix = "vision_model." if any(k.startswith("vision_model.") for k in state) else ""
        table = hf_vision_table(len(encoder.blocks), "", prefix)
        dropped = (r"text_model\..*", "logit_scale", r"(visual|text)_projection\.weight", r".*position_ids")
    positions = next(keys[0] for ours, keys, _ in table if ours == "position_embedding")
    if positions in state:
        grid = math.isqrt(encoder.position_embedding.shape[0] - 1)
        state[positions] = resize_position_embedding(state[positions], grid)
    load_encoder(encoder, state, table, dropped, vision)
    state = read_safetensors(text)
    prefix = "roberta." if any(k.startswith("roberta.") for k in state) else ""
    load_encoder(model.text_encoder, state, roberta_table(len(model.text_encoder.layers), "", prefix),
                 (r"lm_head\..*", r".*pooler\..*", r".*position_ids"), text)


def load_encoder(encoder: nn.Module, state: dict, table: list, dropped: tuple, source) -> None:
    try:
        encoder.load_state_dict(import_state(state, table, {k: v.shape for k, v in encoder.state_dict().items()}, dropped))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def resize_position_embedding(table: Tensor, grid: int) -> Tensor:
    """Class row + (g*g, D) -> class row + (grid*grid, D), bicubic (align_corners False, no antialias); as it is if g == grid."""
    old = math.isqrt(table.shape[0] - 1)
    if old * old + 1 != table.shape[0]:
        raise ValueError(f"a position table of {table.shape[0]} rows is not a class row and a square grid")
    if old == grid:
        return table
    patches = table[1:].float().T.reshape(1, -1, old, old)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], patches.flatten(2)[0].T.to(table.dtype)])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint folders: model.safetensors + config.json


def write_atomically(path, write) -> None:
    """write(temporary path), flush to disk, rename: the file is either the old one or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
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
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    name = values.pop("model", None)
    unknown = set(values) - {f.name for f in dataclasses.fields(kind)}
    if f"{name}Config" != kind.__name__ or unknown:
        raise ValueError(f"{file} is not the config of a {kind.__name__.removesuffix('Config')}: model {name!r}, "
                         f"unknown fields {sorted(unknown)}")
    return kind(**values)


def load_model(folder, **overrides) -> ManagerTower:
    """A checkpoint folder -> model. overrides are config fields: other `heads`, another `image_size`, ...

    What fits is kept; other tasks' heads are dropped and new ones initialised (both printed); the position table is resized;
    NLVR2's third token type copies the second; the rank head starts as the match row of the ITM head. Any other difference
    raises ValueError.
    """
    model = ManagerTower(dataclasses.replace(read_config(folder), **overrides))
    state, own = read_safetensors(folder), model.state_dict()
    grid = model.config.image_size // model.config.patch_size
    state["image_encoder.position_embedding"] = resize_position_embedding(state["image_encoder.position_embedding"], grid)
    types = state["type_embedding"]
    state["type_embedding"] = torch.cat([types, types[1:2]])[:3] if len(own["type_embedding"]) == 3 else types[:2]
    if "heads.retrieval.weight" in own and "heads.itm.weight" in state:
        for p in ("weight", "bias"):
            state.setdefault(f"heads.retrieval.{p}", state[f"heads.itm.{p}"][1:2].clone())
    dropped = sorted({k.split(".")[1] for k in state if k.startswith("heads.") and k not in own})
    new = sorted({k.split(".")[1] for k in own if k.startswith("heads.") and k not in state})
    state = {k: v for k, v in state.items() if not (k.startswith("heads.") and k not in own)}
    state.update({k: v for k, v in own.items() if k.startswith("heads.") and k not in state})
    wrong = [f"{k}: {tuple(state[k].shape) if k in state else 'missing'} in the file, {tuple(own[k].shape) if k in own else 'unknown'} in the model"
             for k in sorted({*state, *own}) if k not in state or k not in own or state[k].shape != own[k].shape]
    if wrong:
        raise ValueError(f"{folder} does not fit the model. " + "; ".join(wrong[:8]))
    model.load_state_dict(state)
    if (dropped or new) and os.environ.get("RANK", "0") == "0":
        print(f"{folder}: heads dropped: {', '.join(dropped) or 'none'}; heads initialised: {', '.join(new) or 'none'}")
    return model
