"""ManagerTower: two unimodal encoders, managers, cross-modal layers and heads.

Papers: ManagerTower (ACL 2023), section 3; Manager (TCSVT 2025), section III. The papers' baselines
BridgeTower and METER live in the same frame, as values of `fusion`. weights.py reads and writes the
official checkpoints. Read manager.py first, then this file from `ManagerTower.fuse` on.

    model = ManagerTower(ManagerTowerConfig.tiny())
    features = model(pixels, input_ids, attention_mask)
    match_logits = model.heads["itm"](features.pooled)  # (B, 2)

Shapes of the two-tower model, in all of its files:

    B   batch                              pixels           (B, 3, S, S)
    S   pixels on each side                input_ids        (B, Lt)
    L   tokens: Lt of text, Li of image    attention_mask   (B, Lt), 1 = real token, 0 = padding
    D   width: D_text and D_image of the   stack of experts (B, N, L, D)
        encoders, D of the cross-modal     hidden states    (B, L, D)
        layers (hidden_size)
    N   experts: encoder layers that a cross-modal layer reads (managed layers)
    H   attention heads
    V   vocabulary
    C   contrastive size
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fields import FieldError, check_fields, option, show
from images import CLIP_COLOURS
from manager import AdaptiveManager, Manager, StaticManager, standardize

MANAGER_FLAGS = (  # the fields that mean something only with managers
    "manager_type",
    "manager_weight",
    "manager_query",
    "managed_layers_text",
    "managed_layers_image",
    "mask_fused_query",
    "manager_noise",
)


# No model is larger in any of these, and a typing error is found before memory is asked for.
MOST_PIXELS = 4096  # on each side of a picture
MOST_LAYERS = 1000
MOST_CHANNELS = 100_000
MOST_ROWS = 10_000_000  # of a table of words, positions or answers
MOST_TIMES = 1000  # a width in units of another one

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")  # of image encoders, see `ViTBlock`


# ---------------------------------------------------------------- the architecture
@dataclass
class ManagerTowerConfig:
    """The architecture. Every field is a flag of the training scripts, but the heads' and what only
    pre-trained encoders decide.

    The defaults are the papers' base model: CLIP ViT-B/16, RoBERTa-base, 6 cross-modal layers.
    """

    # the image encoder
    image_size: int = option(288, "pixels on each side of a picture", least=1, most=MOST_PIXELS)
    patch_size: int = option(16, "pixels on each side of a patch", least=1, most=MOST_PIXELS)
    vision_width: int = option(768, "channels of the image encoder", least=1, most=MOST_CHANNELS)
    vision_layers: int = option(12, "layers of the image encoder", least=1, most=MOST_LAYERS)
    vision_heads: int = option(12, "attention heads of the image encoder", least=1)
    # what follows from the weights of --vision, where there are any: see `ViT`
    vision_kind: str = option(
        "clip", "which parts the image encoder has", choices=("clip", "vit"), flag=False
    )
    vision_activation: str = option(
        "quick_gelu", "in the image encoder's MLPs", choices=ACTIVATIONS, flag=False
    )
    vision_eps: float = option(
        1e-5, "epsilon of the image encoder's norms", above=0, most=1, flag=False
    )
    image_mean: tuple[float, ...] = option(
        CLIP_COLOURS.mean,
        "of red, green and blue, which the transform subtracts",
        least=0,
        flag=False,
    )
    image_std: tuple[float, ...] = option(
        CLIP_COLOURS.std,
        "of red, green and blue, which the transform divides by",
        above=0,
        flag=False,
    )
    # the text encoder
    vocab_size: int = option(50265, "tokens in the vocabulary", least=1, most=MOST_ROWS)
    max_positions: int = option(
        514,
        "rows of the text's position table; RoBERTa's positions start at pad_token_id + 1",
        least=1,
        most=MOST_ROWS,
    )
    text_width: int = option(768, "channels of the text encoder", least=1, most=MOST_CHANNELS)
    text_layers: int = option(12, "layers of the text encoder", least=1, most=MOST_LAYERS)
    text_heads: int = option(12, "attention heads of the text encoder", least=1)
    text_mlp_width: int = option(
        3072, "hidden channels of the text encoder's MLPs", least=1, most=MOST_CHANNELS
    )
    pad_token_id: int = option(1, "id of the padding token", least=0)
    # what follows from the weights of --text, where there are any
    text_kind: str = option(
        "roberta",
        "where a text's positions start: behind pad_token_id (roberta), or at 0 (bert)",
        choices=("roberta", "bert"),
        flag=False,
    )
    text_eps: float = option(
        1e-5, "epsilon of the text encoder's norms", above=0, most=1, flag=False
    )
    # the cross-modal layers
    hidden_size: int = option(
        768, "channels of the cross-modal layers", least=1, most=MOST_CHANNELS
    )
    num_layers: int = option(6, "cross-modal layers of each modality", least=1, most=MOST_LAYERS)
    num_heads: int = option(12, "attention heads of the cross-modal layers", least=1)
    mlp_ratio: int = option(
        4,
        "hidden channels of the cross-modal MLPs, in units of hidden_size",
        least=1,
        most=MOST_TIMES,
    )
    dropout: float = option(
        0.1,
        "probability in the text encoder and the cross-modal layers; nothing else has dropout",
        least=0,
        below=1,
    )
    contrastive_size: int = option(
        256, "channels of the features that ITC compares", least=1, most=MOST_CHANNELS
    )
    temperature: float = option(
        0.07,
        "what the similarities of ITC are divided by at the start; it is learnt",
        above=0,
        most=1000,
    )
    initializer_range: float = option(
        0.02, "standard deviation of new weight matrices, as in BERT", least=0, most=100
    )
    # what stands between the encoders and the cross-modal layers
    fusion: str = option(
        "manager",
        "what a cross-modal layer reads: managers over many encoder layers, bridges to one each "
        "(BridgeTower), or the last one alone (METER)",
        choices=("manager", "bridge", "last"),
    )
    manager_type: str = option(
        "aaue",
        "weights from both modalities (aaue), learnt ones (saue), or learnt ones also over all "
        "previous cross-modal layers (sae)",
        choices=("aaue", "saue", "sae"),
    )
    manager_weight: str = option(
        "vector",
        "a learnt weight for each channel of a layer, or one for the whole layer",
        choices=("vector", "scalar"),
    )
    manager_query: str = option(
        "fused",
        "what aaue computes its weights from: both modalities, or the own one alone (an ablation)",
        choices=("fused", "own"),
    )
    managed_layers_text: int = option(
        6, "how many of the text encoder's last layers are managed", least=1
    )
    managed_layers_image: int = option(
        6, "how many of the image encoder's last layers are managed", least=1
    )
    mask_fused_query: bool = option(
        False, "mask padding in aaue's attention; the released weights were trained without"
    )
    manager_noise: bool = option(True, "noise on the managers' scores during training")
    # the heads; which ones, and how many answers, follow from the task and its data
    heads: tuple[str, ...] = option(("mlm", "itm"), "names of rows of HEADS", flag=False)
    num_answers: int = option(3129, "answers of the VQA head", least=1, most=MOST_ROWS, flag=False)
    head_hidden_scale: int = option(
        1,
        "hidden channels of the classifiers, in units of 2 * hidden_size",
        least=1,
        most=MOST_TIMES,
    )
    max_text_len: int = option(
        50,
        "tokens that each text is padded to; aaue's results depend on it",
        least=3,
        most=MOST_ROWS,
    )

    @classmethod
    def base(cls, **overrides: Any) -> "ManagerTowerConfig":
        """CLIP ViT-B/16 and RoBERTa-base: the defaults."""
        return cls(**overrides)

    @classmethod
    def large(cls, **overrides: Any) -> "ManagerTowerConfig":
        """CLIP ViT-L/14 and RoBERTa-large."""
        fields: dict[str, Any] = {
            "image_size": 294,
            "patch_size": 14,
            "vision_width": 1024,
            "vision_layers": 24,
            "vision_heads": 16,
            "text_width": 1024,
            "text_layers": 24,
            "text_heads": 16,
            "text_mlp_width": 4096,
            "hidden_size": 1024,
            "num_heads": 16,
        }
        fields.update(overrides)
        return cls(**fields)

    @classmethod
    def tiny(cls, **overrides: Any) -> "ManagerTowerConfig":
        """For the built-in demo data: it learns on a CPU in minutes."""
        fields: dict[str, Any] = {
            "image_size": 64,
            "patch_size": 16,
            "vision_width": 96,
            "vision_layers": 3,
            "vision_heads": 3,
            "vocab_size": 300,
            "max_positions": 52,
            "text_width": 96,
            "text_layers": 3,
            "text_heads": 3,
            "text_mlp_width": 384,
            "hidden_size": 96,
            "num_layers": 2,
            "num_heads": 3,
            "dropout": 0.0,
            "contrastive_size": 64,
            "managed_layers_text": 3,
            "managed_layers_image": 3,
            "max_text_len": 16,
        }
        fields.update(overrides)
        return cls(**fields)

    def __post_init__(self) -> None:
        check_fields(self)
        # config.json has lists
        self.heads = tuple(self.heads)
        self.image_mean = tuple(self.image_mean)
        self.image_std = tuple(self.image_std)
        for name in self.heads:  # HEADS stands below: the checker of fields does not know it
            if name not in HEADS:
                raise FieldError(f"heads is {show(name)}; it must be one of {', '.join(HEADS)}")
        if len(set(self.heads)) < len(self.heads):
            raise FieldError(f"heads is {show(self.heads)}; it names one of them twice")
        # attention heads share the channels equally, and whole patches cover the picture
        check_multiple("vision_width", self.vision_width, "vision_heads", self.vision_heads)
        check_multiple("text_width", self.text_width, "text_heads", self.text_heads)
        check_multiple("hidden_size", self.hidden_size, "num_heads", self.num_heads)
        check_multiple("image_size", self.image_size, "patch_size", self.patch_size)
        # an encoder has at least as many layers as the cross-modal layers ask for
        for modality, layers in (("text", self.text_layers), ("image", self.vision_layers)):
            managed = self.num_experts(modality)
            if managed > layers:
                raise ValueError(
                    f"fusion {self.fusion!r} reads {managed} layers of the {modality} encoder "
                    f"(managed_layers_{modality}, or num_layers), which has {layers}"
                )
        # the other managers compute no weights from anything
        if self.manager_query == "own" and self.manager_type != "aaue":
            raise FieldError(
                f"manager_query is 'own', which only aaue has; manager_type is {self.manager_type}"
            )
        self.check_rows()
        # a picture has three colours
        for field, colours in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            if len(colours) != 3:
                raise FieldError(f"{field} is {show(colours)}; it must be three numbers")

    @property
    def first_position(self) -> int:
        """The row of the text's position table that belongs to the first token."""
        return 0 if self.text_kind == "bert" else self.pad_token_id + 1

    def check_rows(self) -> None:
        """Raises ValueError for tables without a row for the padding, or for a text's places."""
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}, but the ids of vocab_size {self.vocab_size} "
                f"end at {self.vocab_size - 1}"
            )
        # RoBERTa's positions start behind the id of its padding, wherever that lies
        needed = self.first_position + self.max_text_len
        if needed > self.max_positions:
            start = "BERT's positions start at 0"
            if self.text_kind == "roberta":
                start = (
                    f"RoBERTa's positions start at pad_token_id + 1, which is {self.first_position}"
                )
            raise ValueError(
                f"max_positions is {self.max_positions}; it must be at least {needed}: {start}, "
                f"and a text has max_text_len {self.max_text_len} of them"
            )

    @staticmethod
    def check_flags(flags: dict[str, Any]) -> None:
        """Raises ValueError for flags of managers where there are none."""
        fusion = flags.get("fusion", "manager")
        if fusion == "manager":
            return
        for name in flags:
            if name in MANAGER_FLAGS:
                raise ValueError(f"--{name} means nothing with --fusion {fusion}: no managers")

    def num_experts(self, modality: str) -> int:
        """N: how many of an encoder's last layers reach the cross-modal layers.

        modality: "text" or "image".
        """
        if self.fusion == "last":
            return 1
        if self.fusion == "bridge":
            return self.num_layers  # one expert for each cross-modal layer
        if modality == "text":
            return self.managed_layers_text
        return self.managed_layers_image


def check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor != 0:
        raise ValueError(f"{name} {value} is not a multiple of {divisor_name} {divisor}")


# ---------------------------------------------------------------- layers
def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, H, L, D/H)


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Multi-head attention: q (B, Lq, D), k and v (B, Lk, D) -> (B, Lq, D).

    mask: boolean, broadcastable to (B, H, Lq, Lk), True = attend. dropout applies in evaluation
    mode too, so the caller passes it in training only.
    """
    out = F.scaled_dot_product_attention(
        split_heads(q, heads),
        split_heads(k, heads),
        split_heads(v, heads),
        attn_mask=mask,
        dropout_p=dropout,
    )
    return out.transpose(1, 2).flatten(2)  # (B, H, Lq, D/H) -> (B, Lq, D)


def scaled_linear(linear: nn.Linear, x: Tensor, factor: float) -> Tensor:
    """factor * (x @ weight.T) + bias: the matrix product takes the factor, without a pass over x.

    x (..., D) -> (..., D of the output).
    """
    product = torch.addmm(linear.bias, x.flatten(0, -2), linear.weight.T, alpha=factor)
    return product.unflatten(0, x.shape[:-1])


def run(layer: Callable[..., Tensor], checkpointing: bool, *args: Any) -> Tensor:
    """layer(*args); with checkpointing its activations are computed again in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


def run_layers(
    layers: nn.ModuleList, x: Tensor, keep: Iterable[int], checkpointing: bool, *args: Any
) -> list[Tensor]:
    """The hidden states `keep`, in ascending order: 0 is x, k the output of the k-th layer.

    args: what each layer takes besides the hidden states. Layers above the last kept one do not
    run.
    """
    wanted = set(keep)  # keep may be a generator
    kept = []
    if 0 in wanted:
        kept.append(x)
    for k in range(1, max(wanted) + 1):
        x = run(layers[k - 1], checkpointing, x, *args)
        if k in wanted:
            kept.append(x)
    return kept


def last_layers(num_layers: int, num_experts: int) -> range:
    """The numbers of an encoder's last hidden states, as `run_layers` counts them."""
    return range(num_layers + 1 - num_experts, num_layers + 1)


class ViTBlock(nn.Module):
    """A pre-norm transformer block without dropout, of CLIP, SigLIP, ViT, DeiT or DINOv2.

    activation: one of ACTIVATIONS, in its MLP; eps: epsilon of its norms.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, activation: str, eps: float):
        super().__init__()
        self.heads = heads
        self.activation = activation
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc = nn.Linear(width, mlp_width)
        self.fc_out = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        # attention
        q, k, v = self.qkv(self.ln_1(x)).chunk(3, dim=-1)  # (B, L, 3D) -> three times (B, L, D)
        x = x + self.proj(attention(q, k, v, self.heads))

        # MLP
        hidden = self.fc(self.ln_2(x))
        if self.activation == "quick_gelu":
            # CLIP's QuickGELU, h * sigmoid(1.702 h), is SiLU(1.702 h) / 1.702
            hidden = F.silu(1.702 * hidden)
            return x + scaled_linear(self.fc_out, hidden, 1 / 1.702)
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return x + self.fc_out(F.gelu(hidden, approximate=approximate))


class ViT(nn.Module):
    """An image encoder: patches, positions, pre-norm blocks and a norm. Its kind says what else:

        kind     class token   bias of the patches   ln_pre
        clip     yes           no                    yes
        vit      yes           yes                   no      (ViT, DeiT, DINOv2)
        siglip   no            yes                   no

    The default activation and epsilon are CLIP's; each encoder has those that it was trained with.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        mlp_width: int | None = None,
        kind: str = "clip",
        activation: str = "quick_gelu",
        eps: float = 1e-5,
    ):
        super().__init__()
        self.image_size = image_size
        self.checkpointing = False
        # patches do not overlap: the stride is their size
        self.patch = nn.Conv2d(3, width, patch_size, patch_size, bias=kind != "clip")
        num_tokens = (image_size // patch_size) ** 2
        # the class token has a position as well, the first
        self.class_embedding = None
        if kind != "siglip":
            self.class_embedding = nn.Parameter(0.02 * torch.randn(width))
            num_tokens += 1
        self.position_embedding = nn.Parameter(0.02 * torch.randn(num_tokens, width))
        # CLIP alone has a norm before its blocks; all have one behind them, which `encode_image`
        # applies to every layer
        self.ln_pre = nn.LayerNorm(width, eps=eps) if kind == "clip" else nn.Identity()
        mlp_width = mlp_width or 4 * width  # only SigLIP's is another one, and is given
        self.blocks = nn.ModuleList(
            ViTBlock(width, heads, mlp_width, activation, eps) for _ in range(layers)
        )
        self.ln_post = nn.LayerNorm(width, eps=eps)

    def forward(self, pixels: Tensor, keep: Iterable[int]) -> list[Tensor]:
        """pixels (B, 3, S, S) -> the hidden states `keep`, each (B, L, D), before ln_post.

        0 is the output of ln_pre, k the output of the k-th block. Raises ValueError for another S.
        """
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"pixels {tuple(pixels.shape)} do not have the encoder's image_size "
                f"{self.image_size}"
            )
        # n * n patches, row by row; the class token comes first
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # (B, D, n, n) -> (B, n*n, D)
        if self.class_embedding is not None:
            class_token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
            x = torch.cat([class_token, x], dim=1)  # (B, 1 + n*n, D)
        x = self.ln_pre(x + self.position_embedding.to(x.dtype))
        return run_layers(self.blocks, x, keep, self.checkpointing)


class BertLayer(nn.Module):
    """A post-norm BERT layer: RoBERTa's; or with cross=True a cross-modal one.

    The cross-modal one also attends to the other modality, between self-attention and MLP.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        dropout: float,
        eps: float,
        cross: bool = False,
    ):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        if cross:  # queries from this modality, keys and values from the other one
            self.q = nn.Linear(width, width)
            self.kv = nn.Linear(width, 2 * width)
            self.cross_proj = nn.Linear(width, width)
            self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.fc = nn.Linear(width, mlp_width)
        self.fc_out = nn.Linear(mlp_width, width)
        self.ln_3 = nn.LayerNorm(width, eps=eps)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        other: Tensor | None = None,
        other_mask: Tensor | None = None,
        only_first: bool = False,
    ) -> Tensor:
        """x (B, L, D), other (B, Lo, D) or None -> (B, L, D).

        mask (B, 1, 1, L), other_mask (B, 1, 1, Lo): boolean, True = real token; None masks nothing.
        only_first: only the first token is computed, (B, 1, D); it still attends to all tokens.
        """
        dropout = self.dropout if self.training else 0.0

        # self-attention
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if only_first:  # keys and values are of all tokens, only the query is of one
            q = q[:, :1]
            x = x[:, :1]
        out = attention(q, k, v, self.heads, mask, dropout)
        x = self.ln_1(x + F.dropout(self.proj(out), dropout))

        # cross-attention
        if other is not None:
            q = self.q(x)
            k, v = self.kv(other).chunk(2, dim=-1)
            out = attention(q, k, v, self.heads, other_mask, dropout)
            x = self.ln_2(x + F.dropout(self.cross_proj(out), dropout))

        # MLP
        out = self.fc_out(F.gelu(self.fc(x)))
        return self.ln_3(x + F.dropout(out, dropout))


class TextEncoder(nn.Module):
    """RoBERTa, or BERT, without its pooler. They differ in where their positions start."""

    def __init__(self, config: ManagerTowerConfig):
        super().__init__()
        width = config.text_width
        self.pad = config.pad_token_id
        self.is_bert = config.text_kind == "bert"
        self.first_position = config.first_position
        self.dropout = config.dropout
        self.checkpointing = False
        self.word_embedding = nn.Embedding(config.vocab_size, width, padding_idx=self.pad)
        # RoBERTa's padding has a position of its own, which is not trained
        unused = None if self.is_bert else self.pad
        self.position_embedding = nn.Embedding(config.max_positions, width, padding_idx=unused)
        # of BERT's two sentence types all texts have the first; RoBERTa has a single one
        self.type_embedding = nn.Parameter(0.02 * torch.randn(1, width))
        self.ln = nn.LayerNorm(width, eps=config.text_eps)
        mlp_width = config.text_mlp_width
        self.layers = nn.ModuleList(
            BertLayer(width, config.text_heads, mlp_width, config.dropout, config.text_eps)
            for _ in range(config.text_layers)
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, keep: Iterable[int]
    ) -> list[Tensor]:
        """input_ids, attention_mask (B, L) -> the hidden states `keep`, each (B, L, D).

        0 is the embeddings, k the output of the k-th layer. Raises ValueError for too long a text.
        """
        # the rows before the first position belong to no token
        longest = self.position_embedding.num_embeddings - self.first_position
        if input_ids.shape[1] > longest:
            raise ValueError(
                f"the text has {input_ids.shape[1]} tokens, the position table holds {longest}"
            )
        positions = self.positions(input_ids)
        x = self.word_embedding(input_ids) + self.position_embedding(positions)
        x = F.dropout(self.ln(x + self.type_embedding), self.dropout, self.training)
        mask = attention_mask[:, None, None, :].bool()  # (B, 1, 1, L)
        return run_layers(self.layers, x, keep, self.checkpointing, mask)

    def positions(self, input_ids: Tensor) -> Tensor:
        """The rows of the position table, (B, L) of RoBERTa, (L) of BERT."""
        if self.is_bert:  # padding has positions as well, which nothing attends to
            return torch.arange(input_ids.shape[1], device=input_ids.device)
        # RoBERTa's: pad + 1, pad + 2, ... for tokens, and pad for padding; they follow from the ids
        # and not from the mask
        is_token = (input_ids != self.pad).long()
        return torch.cumsum(is_token, dim=1) * is_token + self.pad


def init_weights(module: nn.Module, std: float) -> None:
    """As in BERT and Qwen2: N(0, std^2) for matrices, zero biases, and a zero row for padding."""
    if not isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
        return
    nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Embedding):  # it has no bias
        if module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0
    elif module.bias is not None:
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------- heads
class MLMHead(nn.Module):
    """Logits of the vocabulary for each token, (..., D) -> (..., V); not tied to word_embedding."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.ln = nn.LayerNorm(width, eps=1e-12)  # official: BERT's epsilon here, 1e-5 elsewhere
        self.decoder = nn.Linear(width, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.ln(F.gelu(self.dense(text)))
        return self.decoder(hidden) + self.bias


class ContrastiveHead(nn.Module):
    """First tokens of the encoders, (B, D_text) and (B, D_image) -> unit vectors (B, C), (B, C)."""

    def __init__(self, config: ManagerTowerConfig):
        super().__init__()
        # Sized by the encoders. The official code sizes them by hidden_size, which works only where
        # all widths are equal.
        self.text = nn.Linear(config.text_width, config.contrastive_size)
        self.image = nn.Linear(config.vision_width, config.contrastive_size)
        # the divisor itself, not its logarithm as in CLIP
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature)))

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        text_vectors = F.normalize(self.text(text), dim=-1)
        image_vectors = F.normalize(self.image(image), dim=-1)
        return text_vectors, image_vectors


class Head(NamedTuple):
    """A row of HEADS. make(config, row) makes the head's module."""

    make: Callable[[ManagerTowerConfig, "Head"], nn.Module]
    classes: int = 0  # logits; 0: the config says how many
    pictures: int = 1  # of a sample, each of them fused with the text

    def input_width(self, config: ManagerTowerConfig) -> int:
        """Width of the pooled features of all pictures of a sample, concatenated."""
        return self.pictures * 2 * config.hidden_size


def make_mlm_head(config: ManagerTowerConfig, row: Head) -> nn.Module:
    return MLMHead(config.hidden_size, config.vocab_size)


def make_contrastive_head(config: ManagerTowerConfig, row: Head) -> nn.Module:
    return ContrastiveHead(config)


def make_linear_head(config: ManagerTowerConfig, row: Head) -> nn.Module:
    """One matrix, (B, input width) -> (B, classes)."""
    return nn.Linear(row.input_width(config), row.classes)


def make_classifier(config: ManagerTowerConfig, row: Head) -> nn.Module:
    """An MLP, (B, input width) -> (B, classes).

    It has no dropout, as in the released recipes: they set the official nlvr2_drop_rate to 0.
    """
    hidden_width = 2 * config.hidden_size * config.head_hidden_scale
    classes = row.classes or config.num_answers
    layers = OrderedDict(
        fc=nn.Linear(row.input_width(config), hidden_width),
        ln=nn.LayerNorm(hidden_width),
        gelu=nn.GELU(),
        fc_out=nn.Linear(hidden_width, classes),
    )
    return nn.Sequential(layers)


# The one place where a head is added. What does not say otherwise reads Features.pooled.
HEADS: dict[str, Head] = {
    # pre-training
    "mlm": Head(make_mlm_head),  # reads Features.text
    "itm": Head(make_linear_head, classes=2),
    "itc": Head(make_contrastive_head),  # reads the encoders: `ManagerTower.contrast`
    # downstream tasks
    "vqa": Head(make_classifier),  # as many classes as num_answers
    "nlvr2": Head(make_classifier, classes=2, pictures=2),  # reads two Features.pooled
    "snli_ve": Head(make_classifier, classes=3),
    "retrieval": Head(make_linear_head, classes=1),
}


def make_head(name: str, config: ManagerTowerConfig) -> nn.Module:
    row = HEADS[name]
    return row.make(config, row)


# ---------------------------------------------------------------- the parts of the tower
def make_type_embedding(config: ManagerTowerConfig) -> nn.Parameter:
    """The token types (2 or 3, D): text, image, and the second image where a head reads two."""
    types = 0.02 * torch.randn(2, config.hidden_size)
    if any(HEADS[name].pictures == 2 for name in config.heads):
        second_image = types[1:]  # it starts as a copy of the first one's
        types = torch.cat([types, second_image])
    return nn.Parameter(types)


def make_layer_embedding(layers: int, config: ManagerTowerConfig) -> nn.Parameter:
    """A row for each layer of an encoder, (layers, D): it tells a manager which expert is which."""
    return nn.Parameter(0.02 * torch.randn(layers, config.hidden_size))


def make_manager(i: int, modality: str, config: ManagerTowerConfig) -> Manager:
    """The manager of a modality before cross-modal layer i."""
    width = config.hidden_size
    num_experts = config.num_experts(modality)
    weight = config.manager_weight
    noise = config.manager_noise
    if config.manager_type == "sae":
        return StaticManager(width, num_experts, i, weight, noise, sae=True)
    if i == 0:  # no cross-modal layer before it, so there is no fused query: AAUE is static too
        return StaticManager(width, num_experts, 0, weight, noise)
    if config.manager_type == "saue":
        return StaticManager(width, num_experts, 1, weight, noise)
    own_query = config.manager_query == "own"
    return AdaptiveManager(width, num_experts, weight, noise, own_query)


def make_managers(modality: str, config: ManagerTowerConfig) -> nn.ModuleList:
    return nn.ModuleList(make_manager(i, modality, config) for i in range(config.num_layers))


def make_bridges(config: ManagerTowerConfig) -> nn.ModuleList:
    return nn.ModuleList(nn.LayerNorm(config.hidden_size) for _ in range(config.num_layers))


def make_cross_modal_layers(config: ManagerTowerConfig) -> nn.ModuleList:
    width = config.hidden_size
    mlp_width = config.mlp_ratio * width
    # official: BERT's epsilon 1e-12, where the encoders have 1e-5
    return nn.ModuleList(
        BertLayer(width, config.num_heads, mlp_width, config.dropout, 1e-12, cross=True)
        for _ in range(config.num_layers)
    )


# ---------------------------------------------------------------- the tower
@dataclass
class Features:
    """What the cross-modal layers put out."""

    text: Tensor  # (B, Lt, D)
    image: Tensor  # (B, Li, D)
    pooled: Tensor  # (B, 2D): text, then image


class LayerInputs(NamedTuple):
    """What a pair of cross-modal layers reads."""

    text: Tensor  # (B, Lt, D)
    image: Tensor  # (B, Li, D)
    text_mask: Tensor  # (B, 1, 1, Lt), boolean, True = real token

    def rows(self, rows: slice) -> "LayerInputs":
        """The same for some of the rows."""
        return LayerInputs(self.text[rows], self.image[rows], self.text_mask[rows])


class ManagerTower(nn.Module):
    """Two encoders, then num_layers pairs of cross-modal layers; managers stand before each pair.

    Everything there is twice, for text and for image, under the names text_* and image_*.
    """

    blocks_to_compile = (ViTBlock, BertLayer, Manager)  # what --compile compiles, one by one
    blocks_to_shard = (ViTBlock, BertLayer)  # what --shard gathers, one by one

    def __init__(self, config: ManagerTowerConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        width = config.hidden_size

        # the order of all that follows is the order of the random numbers of a fixed seed
        self.text_encoder = TextEncoder(config)
        self.image_encoder = ViT(
            config.image_size,
            config.patch_size,
            config.vision_width,
            config.vision_layers,
            config.vision_heads,
            kind=config.vision_kind,
            activation=config.vision_activation,
            eps=config.vision_eps,
        )
        # from the encoders' widths to the width of the cross-modal layers
        self.text_transform = nn.Linear(config.text_width, width)
        self.image_transform = nn.Linear(config.vision_width, width)
        self.type_embedding = make_type_embedding(config)

        # what stands between the encoders and the cross-modal layers; with fusion "last" nothing
        if config.fusion == "manager":
            self.text_layer_embedding = make_layer_embedding(config.text_layers, config)
            self.image_layer_embedding = make_layer_embedding(config.vision_layers, config)
            self.text_managers = make_managers("text", config)
            self.image_managers = make_managers("image", config)
        if config.fusion == "bridge":
            self.text_bridges = make_bridges(config)
            self.image_bridges = make_bridges(config)

        # the cross-modal layers, and what reads them
        self.text_layers = make_cross_modal_layers(config)
        self.image_layers = make_cross_modal_layers(config)
        self.text_pooler = nn.Linear(width, width)
        self.image_pooler = nn.Linear(width, width)
        self.heads = nn.ModuleDict({name: make_head(name, config) for name in config.heads})

        # new numbers for all matrices; load_unimodal puts pre-trained ones into the encoders
        self.apply(partial(init_weights, std=config.initializer_range))

    def set_checkpointing(self, on: bool) -> None:
        """Activation checkpointing of all layers: a third more computation, far less memory."""
        self.text_encoder.checkpointing = on
        self.image_encoder.checkpointing = on
        self.checkpointing = on

    # -------------------------------------------------------- the encoders
    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, Lt) -> the text experts (B, N, Lt, D_text).

        They are the last N layers of the text encoder, before the projection to D.
        """
        keep = last_layers(self.config.text_layers, self.config.num_experts("text"))
        states = self.text_encoder(input_ids.long(), attention_mask, keep)
        return torch.stack(states, 1)  # N tensors (B, Lt, D_text) -> (B, N, Lt, D_text)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> the image experts (B, N, Li, D_image).

        They are the last N layers of the image encoder, each after the shared ln_post, before the
        projection to D.
        """
        keep = last_layers(self.config.vision_layers, self.config.num_experts("image"))
        states = self.image_encoder(pixels, keep)
        return self.image_encoder.ln_post(torch.stack(states, 1))  # (B, N, Li, D_image)

    def contrast(self, text_experts: Tensor, image_experts: Tensor) -> tuple[Tensor, Tensor]:
        """The features that ITC compares: unit vectors (B, C) of texts, and (B, C) of images.

        They come from the first token of each modality's last expert, before any fusion.
        """
        text = text_experts[:, -1, 0]  # (B, D_text)
        image = image_experts[:, -1, 0]  # (B, D_image)
        return self.heads["itc"](text, image)

    # -------------------------------------------------------- the fusion
    def project(self, modality: str, experts: Tensor, token_type: int) -> Tensor:
        """(B, N, L, D_text or D_image) -> (B, N, L, D), with the embeddings of type and layer.

        What managers will read is standardised.
        """
        transform = {"text": self.text_transform, "image": self.image_transform}[modality]
        embedding = self.type_embedding[token_type]  # (D)
        if self.config.fusion != "manager":
            return transform(experts) + embedding
        layer_embeddings = {"text": self.text_layer_embedding, "image": self.image_layer_embedding}
        # one row for each layer of the encoder: those of the experts are the last N
        num_experts = experts.shape[1]
        embedding = embedding + layer_embeddings[modality][-num_experts:, None]  # (N, 1, D)
        return standardize(transform(experts) + embedding)

    def layer_input(
        self,
        modality: str,
        i: int,
        experts: Tensor,
        own: list[Tensor],
        other: list[Tensor],
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """What cross-modal layer i of a modality reads, (B, L, D).

        experts (B, N, L, D): what `project` returns. own, other: the outputs of the i cross-modal
        layers before it, of its own modality, each (B, L, D), and of the other one. query_mask: of
        the other modality's tokens, for AAUE.
        """
        if self.config.fusion == "manager":
            return self.managed_input(modality, i, experts, own, other, query_mask)
        if self.config.fusion == "bridge":
            return self.bridged_input(modality, i, experts, own)
        # "last", METER: the first layer reads the one expert, the others the layer before them
        return own[-1] if own else experts[:, -1]

    def managed_input(
        self,
        modality: str,
        i: int,
        experts: Tensor,
        own: list[Tensor],
        other: list[Tensor],
        query_mask: Tensor | None,
    ) -> Tensor:
        """ManagerTower: a manager over all experts."""
        managers = {"text": self.text_managers, "image": self.image_managers}[modality]
        if i == 0:  # nothing is fused yet
            return managers[i](experts)
        if self.config.manager_type == "sae":
            previous = torch.stack(own, 1)  # (B, K, L, D)
        else:
            previous = own[-1]
        return managers[i](experts, previous, other[-1], query_mask)

    def bridged_input(self, modality: str, i: int, experts: Tensor, own: list[Tensor]) -> Tensor:
        """BridgeTower: LN(V_i + C), for each cross-modal layer one expert."""
        bridges = {"text": self.text_bridges, "image": self.image_bridges}[modality]
        if i == 0:
            return bridges[i](experts[:, i])
        return bridges[i](experts[:, i] + own[-1])

    def fuse(
        self,
        text_experts: Tensor,
        image_experts: Tensor,
        attention_mask: Tensor,
        image_type: int = 1,
    ) -> Features:
        """The cross-modal encoder (ACL section 3.2; TCSVT section III).

        text_experts (B, N, Lt, D_text), image_experts (B, N, Li, D_image), attention_mask (B, Lt).
        image_type: 2 for the second picture of a sample, else 1.
        """
        last = self.fuse_until_last(text_experts, image_experts, attention_mask, image_type)
        text = self.last_text(last)
        image = self.image_layer(-1, last)
        return Features(text, image, self.pool(text, image))

    def fuse_pooled(
        self,
        text_experts: Tensor,
        image_experts: Tensor,
        attention_mask: Tensor,
        image_type: int = 1,
    ) -> Tensor:
        """`fuse(...).pooled`, (B, 2D), for less: the last layers compute only first tokens."""
        last = self.fuse_until_last(text_experts, image_experts, attention_mask, image_type)
        return self.last_pooled(last)

    def fuse_until_last(
        self,
        text_experts: Tensor,
        image_experts: Tensor,
        attention_mask: Tensor,
        image_type: int = 1,
    ) -> LayerInputs:
        """All of `fuse` but the last pair of cross-modal layers, of which no head reads all.

        MLM reads the text, and the others the first tokens; who reads what calls `last_text` or
        `last_pooled`.
        """
        text_experts = self.project("text", text_experts, token_type=0)  # (B, N, Lt, D)
        image_experts = self.project("image", image_experts, token_type=image_type)  # (B, N, Li, D)
        text_mask = attention_mask[:, None, None, :].bool()  # (B, 1, 1, Lt)
        query_mask = attention_mask if self.config.mask_fused_query else None

        text: list[Tensor] = []  # the outputs of the cross-modal layers, (B, Lt, D)
        image: list[Tensor] = []  # (B, Li, D)
        for i in range(self.config.num_layers):
            # both managers read what the layers before have put out, of both modalities ...
            text_in = self.layer_input("text", i, text_experts, text, image)
            image_in = self.layer_input("image", i, image_experts, image, text, query_mask)
            inputs = LayerInputs(text_in, image_in, text_mask)
            # ... and each cross-modal layer attends to what the other modality's layer reads
            if i < self.config.num_layers - 1:
                text.append(self.text_layer(i, inputs))
                image.append(self.image_layer(i, inputs))
        return inputs

    def text_layer(self, i: int, inputs: LayerInputs, only_first: bool = False) -> Tensor:
        """Cross-modal layer i of the text, (B, Lt, D); only_first: (B, 1, D)."""
        # queries: text; keys and values: text, then image
        layer = self.text_layers[i]
        arguments = (inputs.text, inputs.text_mask, inputs.image, None, only_first)
        return run(layer, self.checkpointing, *arguments)

    def image_layer(self, i: int, inputs: LayerInputs, only_first: bool = False) -> Tensor:
        """Cross-modal layer i of the image, (B, Li, D); only_first: (B, 1, D)."""
        # the same with the two modalities exchanged; an image has no padding
        layer = self.image_layers[i]
        arguments = (inputs.image, None, inputs.text, inputs.text_mask, only_first)
        return run(layer, self.checkpointing, *arguments)

    def pool(self, text: Tensor, image: Tensor) -> Tensor:
        """The first token of each modality, RoBERTa's <s> and CLIP's class token, (B, 2D)."""
        text_pooled = self.text_pooler(text[:, 0]).tanh()  # (B, D)
        image_pooled = self.image_pooler(image[:, 0]).tanh()
        return torch.cat([text_pooled, image_pooled], dim=-1)

    def last_text(self, inputs: LayerInputs) -> Tensor:
        """Features.text, (B, Lt, D), of what `fuse_until_last` returns."""
        return self.text_layer(-1, inputs)

    def last_pooled(self, inputs: LayerInputs) -> Tensor:
        """Features.pooled, (B, 2D), of what `fuse_until_last` returns."""
        text = self.text_layer(-1, inputs, only_first=True)  # (B, 1, D)
        image = self.image_layer(-1, inputs, only_first=True)
        return self.pool(text, image)

    def forward(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, image_type: int = 1
    ) -> Features:
        """pixels (B, 3, S, S), input_ids and attention_mask (B, Lt), of any integer dtype."""
        text_experts = self.encode_text(input_ids, attention_mask)
        image_experts = self.encode_image(pixels)
        return self.fuse(text_experts, image_experts, attention_mask, image_type)
