"""model.py"""
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from torch import Tensor
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
import dataclasses
import torch
from fields import check_fields, option
from manager import AdaptiveManager, Manager, StaticManager, standardize


HEADS = ("mlm", "itm", "itc", "vqa", "nlvr2", "snli_ve", "retrieval")


@dataclass
class ManagerTowerConfig:
    """The architecture. Defaults: the papers' base model (CLIP ViT-B/16 + RoBERTa-base, 6 cross-modal layers)."""
    # vision
    image_size: int = option(288, "pixels a side", least=1)
    patch_size: int = option(16, "patch size", least=1)
    vision_width: int = option(768, "vision width", least=1)
    vision_layers: int = option(12, "vision layers", least=1)
    vision_heads: int = option(12, "vision heads", least=1)
    # text
    vocab_size: int = option(50265, "vocab size", least=1)
    max_positions: int = option(514, "RoBERTa's positions start at pad_token_id + 1", least=1)
    text_width: int = option(768, "text width", least=1)
    text_layers: int = option(12, "text layers", least=1)
    text_heads: int = option(12, "text heads", least=1)
    text_mlp_width: int = option(3072, "text mlp width", least=1)
    pad_token_id: int = option(1, "pad token id", least=0)
    # cross-modal
    hidden_size: int = option(768, "hidden size", least=1)
    num_layers: int = option(6, "num layers", least=1)
    num_heads: int = option(12, "num heads", least=1)
    mlp_ratio: int = option(4, "mlp ratio", least=1)
    dropout: float = option(0.1, "text encoder and cross-modal layers; CLIP, managers and heads have none", least=0, below=1)
    contrastive_size: int = option(256, "contrastive size", least=1)
    temperature: float = option(0.07, "of ITC at the start, a divisor", above=0)
    initializer_range: float = option(0.02, "standard deviation of new matrices, BERT's", least=0)
    # managers
    fusion: str = option("manager", "manager | bridge (BridgeTower) | last (METER)", choices=("manager", "bridge", "last"))
    manager_type: str = option("aaue", "aaue | saue | sae", choices=("aaue", "saue", "sae"))
    manager_weight: str = option("vector", "vector | scalar", choices=("vector", "scalar"))
    managed_layers_text: int = option(6, "N: the last ones of the encoder", least=1)
    managed_layers_image: int = option(6, "managed layers image", least=1)
    mask_fused_query: bool = option(False, "mask padding in AAUE's attention; the released weights were trained without")
    manager_noise: bool = option(True, "in training mode")
    # heads
    heads: tuple[str, ...] = option(("mlm", "itm"), "heads", choices=HEADS, flag=False)
    num_answers: int = option(3129, "num answers", least=1, flag=False)
    head_hidden_scale: int = option(1, "hidden width of the classifiers, in units of 2 * hidden_size", least=1)
    max_text_len: int = option(50, "text is padded to it: AAUE's results depend on the padded length", least=1)

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
        check_fields(self)
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

    @staticmethod
    def check_flags(flags: dict) -> None:
        """Raises ValueError for flags of managers where there are none."""
        if flags.get("fusion", "manager") == "manager":
            return
        for name in flags:
            if name.startswith(("manager_", "managed_", "mask_fused")):
                raise ValueError(f"--{name} means nothing with --fusion {flags['fusion']}: no managers")

    def num_experts(self, modality: str) -> int:
        """N: how many of the encoder's last layers reach the cross-modal layers; modality is "text" or "image"."""
        managed = self.managed_layers_text if modality == "text" else self.managed_layers_image
        return {"manager": managed, "bridge": self.num_layers, "last": 1}[self.fusion]


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


@dataclass
class Features:
    text: Tensor  # (B, Lt, D)
    image: Tensor  # (B, Li, D)
    pooled: Tensor  # (B, 2D): text, then image


class ManagerTower(nn.Module):
    """Two encoders, and num_layers pairs of cross-modal layers, each reading what its managers aggregate."""

    blocks_to_compile = (ViTBlock, BertLayer, Manager)

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
