"""Weights: every foreign layout in and out, and checkpoint folders.

What is ours are the parameter names of model.py and llava_manager.py. A foreign layout is whatever
somebody else published: the authors' ManagerTower, BridgeTower and METER (Lightning checkpoints of
`src/modules/mt_module.py`), LLaVA-OV-Manager and LLaVA-OneVision (`llava/model`), OpenAI's CLIP,
timm's ViT, DeiT and DINOv2, and the CLIP, SigLIP, ViT, DeiT, DINOv2, RoBERTa, BERT, Qwen2 and
BridgeTower of transformers.

A layout is a table, our key -> their key. In both, {} stands for the number of a layer, and * for
weight and bias. Several keys of theirs are concatenated into one of ours:

    >>> names = {"norm.weight": "final_norm.gamma", "blocks.{}.kv.*": ("h{}.key.*", "h{}.value.*")}
    >>> rows = expand(names, layers=1)
    >>> for row in rows:
    ...     print(row.ours, "<-", " and ".join(row.theirs))
    norm.weight <- final_norm.gamma
    blocks.0.kv.weight <- h0.key.weight and h0.value.weight
    blocks.0.kv.bias <- h0.key.bias and h0.value.bias

So adding a layout is adding a dict. An encoder's dict goes into a `Layout`, and that into
IMAGE_LAYOUTS or TEXT_LAYOUTS; then `load_unimodal` takes it. The import is strict: it refuses, by
their names, keys that are missing, unknown, misshapen, no floating-point numbers or not finite.

The order of this file: 1. tables; 2. import and export; 3. files and folders; 4. checkpoints, ready
to be used; 5. any file of weights; 6. official checkpoints -> our folders.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fields import FieldError, check_values, shorten, show
from files import (
    VERSION,
    as_dict,
    read_json,
    write_atomically,
    write_json,
    write_text,
)
from hub import find_folder
from images import CLIP_COLOURS, IMAGENET_COLOURS, VIT_COLOURS, tower_transform
from llava_manager import (
    OFFICIAL_FIELDS,
    SIGLIP_SUPPORTED,
    LlavaManager,
    LlavaManagerConfig,
    check_settings,
)
from model import HEADS, ManagerTower, ManagerTowerConfig
from tokenizer import (
    CHAT_ROLES,
    check_roles,
    check_special_ids,
    check_tokenizer,
    load_tokenizer,
)
from torch_files import TorchFile
from world import World, first_line_of, is_first_process

State = dict[str, Tensor]
Function = TypeVar("Function", bound=Callable)
Names = Mapping[str, str | tuple[str, ...]]  # our key -> their key or keys
MODALITIES = ("text", "image")


# ================================================================ 1. tables


class Row(NamedTuple):
    """One tensor of ours, and the tensors of a foreign layout that it is made of.

    layout says how. "cat": theirs are concatenated along the first dimension. "stack": they become
    its rows. "scores": a single one of shape (1, n, 1, width), which is (n, width) here. "token":
    one of shape (1, 1, width), here (width). "table": one of shape (1, n, width), here (n, width).
    "scaled": the second one is a layer scale, by which the outputs of the first are multiplied.

        >>> Row("qkv.bias", ("q.bias", "k.bias", "v.bias")).join([torch.zeros(2)] * 3).shape
        torch.Size([6])
        >>> [part.shape for part in Row("scores", ("s",), "scores").split(torch.zeros(4, 8))]
        [torch.Size([1, 4, 1, 8])]
    """

    ours: str
    theirs: tuple[str, ...]
    layout: str = "cat"

    def join(self, parts: list[Tensor]) -> Tensor:
        """Their tensors -> ours."""
        if self.layout == "stack":
            return torch.stack(parts)
        if self.layout == "scores":
            return parts[0][0, :, 0]
        if self.layout == "token":
            return parts[0][0, 0]
        if self.layout == "table":
            return parts[0][0]
        if self.layout == "scaled":
            return scale_outputs(*parts)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Our tensor -> theirs, in the order of `theirs`."""
        if self.layout == "stack":
            return list(tensor.unbind(0))
        if self.layout == "scores":
            return [tensor[None, :, None]]
        if self.layout == "token":
            return [tensor[None, None]]
        if self.layout == "table":
            return [tensor[None]]
        if self.layout == "scaled":
            return [tensor, tensor.new_ones(len(tensor))]
        if len(self.theirs) == 1:
            return [tensor]
        return list(tensor.chunk(len(self.theirs)))


def scale_outputs(tensor: Tensor, scale: Tensor) -> Tensor:
    """The weight (D, K) or bias (D) of a matrix whose outputs are multiplied by scale (D)."""
    factors = scale.float()
    if tensor.dim() == 2:
        factors = factors[:, None]
    return tensor.float() * factors


def expand(
    names: Names, ours: str = "", theirs: str = "", layers: int = 0, layout: str = "cat"
) -> list[Row]:
    """A table -> its rows, with {} and * filled in. `ours` and `theirs` go before all keys."""
    rows = []
    for our_name, their_names in names.items():
        if isinstance(their_names, str):
            their_names = (their_names,)
        numbers = range(layers) if "{}" in our_name else range(1)
        endings = ("weight", "bias") if "*" in our_name else ("",)
        for number in numbers:
            for ending in endings:
                foreign = [theirs + fill(name, number, ending) for name in their_names]
                rows.append(Row(ours + fill(our_name, number, ending), tuple(foreign), layout))
    return rows


def fill(name: str, number: int, ending: str) -> str:
    return name.replace("{}", str(number)).replace("*", ending)


def within(ours: str, theirs: str, names: Names) -> dict[str, str | tuple[str, ...]]:
    """The same table for a module inside another one: `ours` and `theirs` before all its keys."""
    inside: dict[str, str | tuple[str, ...]] = {}
    for our_name, their_names in names.items():
        if isinstance(their_names, str):
            inside[ours + our_name] = theirs + their_names
        else:
            inside[ours + our_name] = tuple(theirs + name for name in their_names)
    return inside


# ---------------------------------------------------------------- encoders
CLIP = {  # OpenAI's image encoder; also inside the official ManagerTower
    "class_embedding": "class_embedding",
    "position_embedding": "positional_embedding",
    "patch.weight": "conv1.weight",
    "ln_pre.*": "ln_pre.*",
    "blocks.{}.ln_1.*": "transformer.resblocks.{}.ln_1.*",
    "blocks.{}.qkv.*": "transformer.resblocks.{}.attn.in_proj_*",
    "blocks.{}.proj.*": "transformer.resblocks.{}.attn.out_proj.*",
    "blocks.{}.ln_2.*": "transformer.resblocks.{}.ln_2.*",
    "blocks.{}.fc.*": "transformer.resblocks.{}.mlp.c_fc.*",
    "blocks.{}.fc_out.*": "transformer.resblocks.{}.mlp.c_proj.*",
    "ln_post.*": "ln_post.*",
}
HF_BLOCK: Names = {  # of HF's CLIP and SigLIP
    "ln_1.*": "layer_norm1.*",
    "qkv.*": ("self_attn.q_proj.*", "self_attn.k_proj.*", "self_attn.v_proj.*"),
    "proj.*": "self_attn.out_proj.*",
    "ln_2.*": "layer_norm2.*",
    "fc.*": "mlp.fc1.*",
    "fc_out.*": "mlp.fc2.*",
}
HF_VISION: Names = {  # what HF's CLIPVisionModel and SiglipVisionModel have in common
    "patch.weight": "embeddings.patch_embedding.weight",
    "position_embedding": "embeddings.position_embedding.weight",
    **within("blocks.{}.", "encoder.layers.{}.", HF_BLOCK),
    "ln_post.*": "post_layernorm.*",
}
HF_CLIP: Names = {
    **HF_VISION,
    "class_embedding": "embeddings.class_embedding",
    "ln_pre.*": "pre_layrnorm.*",  # so it is spelled there
}
HF_SIGLIP: Names = {**HF_VISION, "patch.bias": "embeddings.patch_embedding.bias"}
HF_ATTENTION: Names = {  # of HF's ViT, DeiT and DINOv2
    "qkv.*": (
        "attention.attention.query.*",
        "attention.attention.key.*",
        "attention.attention.value.*",
    ),
}
VIT_BLOCK: Names = {
    **HF_ATTENTION,
    "ln_1.*": "layernorm_before.*",
    "proj.*": "attention.output.dense.*",
    "ln_2.*": "layernorm_after.*",
    "fc.*": "intermediate.dense.*",
    "fc_out.*": "output.dense.*",
}
DINOV2_BLOCK: Names = {
    **HF_ATTENTION,
    "ln_1.*": "norm1.*",
    "ln_2.*": "norm2.*",
    "fc.*": "mlp.fc1.*",
}
HF_PATCHES: Names = {
    "patch.*": "embeddings.patch_embeddings.projection.*",
    "ln_post.*": "layernorm.*",
}
HF_VIT: Names = {**HF_PATCHES, **within("blocks.{}.", "encoder.layer.{}.", VIT_BLOCK)}
HF_DINOV2: Names = {**HF_PATCHES, **within("blocks.{}.", "encoder.layer.{}.", DINOV2_BLOCK)}
TIMM_BLOCK: Names = {
    "ln_1.*": "norm1.*",
    "qkv.*": "attn.qkv.*",
    "ln_2.*": "norm2.*",
    "fc.*": "mlp.fc1.*",
}
TIMM: Names = {  # timm's ViT, DeiT and DINOv2
    "patch.*": "patch_embed.proj.*",
    **within("blocks.{}.", "blocks.{}.", TIMM_BLOCK),
    "ln_post.*": "norm.*",
}
# What has another shape there, or a layer scale behind it: the layout of `Row` -> names
Shaped = Mapping[str, Names]
HF_TABLES: Shaped = {
    "token": {"class_embedding": "embeddings.cls_token"},
    "table": {"position_embedding": "embeddings.position_embeddings"},
}
TIMM_TABLES: Shaped = {
    "token": {"class_embedding": "cls_token"},
    "table": {"position_embedding": "pos_embed"},
}
HF_OUTPUTS: Names = {
    "proj.*": ("attention.output.dense.*", "layer_scale1.lambda1"),
    "fc_out.*": ("mlp.fc2.*", "layer_scale2.lambda1"),
}
TIMM_OUTPUTS: Names = {
    "proj.*": ("attn.proj.*", "ls1.gamma"),
    "fc_out.*": ("mlp.fc2.*", "ls2.gamma"),
}
BERT_LAYER: Names = {
    "qkv.*": (
        "attention.self.query.*",
        "attention.self.key.*",
        "attention.self.value.*",
    ),
    "proj.*": "attention.output.dense.*",
    "ln_1.*": "attention.output.LayerNorm.*",
    "fc.*": "intermediate.dense.*",
    "fc_out.*": "output.dense.*",
    "ln_3.*": "output.LayerNorm.*",
}
ROBERTA: Names = {  # HF's RobertaModel; also inside the official ManagerTower
    "word_embedding.weight": "embeddings.word_embeddings.weight",
    "position_embedding.weight": "embeddings.position_embeddings.weight",
    "type_embedding": "embeddings.token_type_embeddings.weight",
    "ln.*": "embeddings.LayerNorm.*",
    **within("layers.{}.", "encoder.layer.{}.", BERT_LAYER),
}
QWEN_LAYER: Names = {
    "norm_1.weight": "input_layernorm.weight",
    "q.*": "self_attn.q_proj.*",
    "kv.*": ("self_attn.k_proj.*", "self_attn.v_proj.*"),
    "proj.weight": "self_attn.o_proj.weight",
    "norm_2.weight": "post_attention_layernorm.weight",
    "gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down.weight": "mlp.down_proj.weight",
}
QWEN: Names = {  # HF's Qwen2ForCausalLM; also inside the official LLaVA-OV-Manager
    "embed.weight": "model.embed_tokens.weight",
    **within("layers.{}.", "model.layers.{}.", QWEN_LAYER),
    "norm.weight": "model.norm.weight",
}
QWEN_HEAD = {"head.weight": "lm_head.weight"}  # of a model that does not tie it to the embedding


class Published(NamedTuple):
    """What the config.json beside an encoder says, and no shape shows."""

    kinds: tuple[str, ...]  # its model_type
    part: str  # where the config is that of something larger: the key of the encoder's own
    supported: Mapping[str, Any]  # what our encoder computes with
    defaults: Mapping[str, Any]  # what transformers takes for an absent key


CLIP_SETTINGS = Published(
    ("clip", "clip_vision_model"),
    "vision_config",
    {"num_channels": 3},
    {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
)
SIGLIP_SETTINGS = Published(
    ("siglip", "siglip_vision_model"),
    "vision_config",
    SIGLIP_SUPPORTED,
    {"num_attention_heads": 12},
)
VIT_SETTINGS = Published(
    ("vit",),
    "",
    {"num_channels": 3, "qkv_bias": True},
    {"num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
)
DEIT_SETTINGS = VIT_SETTINGS._replace(kinds=("deit",))
DINOV2_SETTINGS = Published(
    ("dinov2",),
    "",
    {"num_channels": 3, "qkv_bias": True, "use_swiglu_ffn": False, "mlp_ratio": 4},
    {"num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-6},
)
TEXT_SUPPORTED = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
ROBERTA_SETTINGS = Published(
    ("roberta", "xlm-roberta", "camembert"),  # they differ in their tokenizers
    "text_config",
    TEXT_SUPPORTED,
    {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "pad_token_id": 1},
)
BERT_SETTINGS = Published(
    ("bert",),
    "",
    TEXT_SUPPORTED,
    {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "pad_token_id": 0},
)


# Qwen2's, and that of the LLaVAs which are made of it
QWEN_KINDS = ("qwen2", "llava", "llava_qwen", "llava_qwen_manager")
QWEN_SETTINGS = Published(QWEN_KINDS, "text_config", {}, {})


def check_kind(values: dict, kinds: tuple[str, ...]) -> None:
    """Raises ValueError for a config.json of another family of models. Without a word of it, it is
    what the keys of the weights say.
    """
    kind = values.get("model_type")
    if kind is not None and kind not in kinds:
        raise ValueError(f"model_type is {show(kind)}; it must be {' or '.join(kinds)}")


class Layout(NamedTuple):
    """How one kind of encoder is published."""

    names: Names
    prefix: str  # before all its keys, where the encoder is a part of something larger
    dead: tuple[str, ...]  # patterns of other keys in such files; {} is the number of our layers
    settings: Published | None = None  # where a config.json belongs to it
    # fields of ManagerTowerConfig as they are where neither keys, shapes nor a config.json say it
    fields: Mapping[str, Any] = MappingProxyType({})
    shaped: Shaped = MappingProxyType({})  # more names

    def rows(self, prefix: str, layers: int) -> list[Row]:
        """The rows of an encoder of so many layers, with this before their keys."""
        rows = expand(self.names, "", prefix, layers)
        for layout, names in self.shaped.items():
            rows += expand(names, "", prefix, layers, layout)
        return rows


CLIP_FIELDS = {
    "vision_kind": "clip",
    "vision_activation": "quick_gelu",
    "vision_eps": 1e-5,
    "image_mean": CLIP_COLOURS.mean,
    "image_std": CLIP_COLOURS.std,
}
VIT_FIELDS = {
    "vision_kind": "vit",
    "vision_activation": "gelu",
    "vision_eps": 1e-12,
    "image_mean": VIT_COLOURS.mean,
    "image_std": VIT_COLOURS.std,
}
DEIT_FIELDS = {
    **VIT_FIELDS,
    "image_mean": IMAGENET_COLOURS.mean,
    "image_std": IMAGENET_COLOURS.std,
}
DINOV2_FIELDS = {**DEIT_FIELDS, "vision_eps": 1e-6}
ROBERTA_FIELDS = {"text_kind": "roberta", "text_eps": 1e-5, "pad_token_id": 1}
BERT_FIELDS = {"text_kind": "bert", "text_eps": 1e-12, "pad_token_id": 0}

OPENAI_LAYOUT = Layout(
    within("", "visual.", CLIP),
    "",
    (r"(?!visual\.).*", r"visual\.proj"),
    fields=CLIP_FIELDS,
)
HF_CLIP_LAYOUT = Layout(
    HF_CLIP,
    "vision_model.",
    (r"text_model\..*", r"logit_scale", r"(visual|text)_projection\.weight", r".*position_ids"),
    CLIP_SETTINGS,
    CLIP_FIELDS,
)
HF_SIGLIP_LAYOUT = Layout(
    HF_SIGLIP,
    "vision_model.",
    # LLaVA-OneVision drops the last layer and the pooling head
    (
        r"(vision_model\.)?encoder\.layers\.{}\..*",
        r"(vision_model\.)?head\..*",
        r"text_model\..*",
        r"logit_\w+",
        r".*position_ids",
    ),
    SIGLIP_SETTINGS,
)
# the pooler, the classifier, and what masked image modelling needs
HF_VIT_DEAD = (
    r"(\w+\.)?pooler\..*",
    r"classifier\..*",
    r"(\w+\.)?embeddings\.mask_token",
    r"decoder\..*",
)
HF_VIT_LAYOUT = Layout(HF_VIT, "vit.", HF_VIT_DEAD, VIT_SETTINGS, VIT_FIELDS, HF_TABLES)
HF_DEIT_LAYOUT = Layout(HF_VIT, "deit.", HF_VIT_DEAD, DEIT_SETTINGS, DEIT_FIELDS, HF_TABLES)
HF_DINOV2_LAYOUT = Layout(
    HF_DINOV2,
    "dinov2.",
    HF_VIT_DEAD,
    DINOV2_SETTINGS,
    DINOV2_FIELDS,
    {**HF_TABLES, "scaled": within("blocks.{}.", "encoder.layer.{}.", HF_OUTPUTS)},
)
TIMM_DEAD = (r"head\..*", r"pre_logits\..*", r"mask_token")
# timm's epsilon; mean and standard deviation are in its config.json
TIMM_FIELDS = {**VIT_FIELDS, "vision_eps": 1e-6}
TIMM_UNSCALED: Names = {"proj.*": "attn.proj.*", "fc_out.*": "mlp.fc2.*"}
TIMM_LAYOUT = Layout(
    {**TIMM, **within("blocks.{}.", "blocks.{}.", TIMM_UNSCALED)},
    "",
    TIMM_DEAD,
    fields=TIMM_FIELDS,
    shaped=TIMM_TABLES,
)
TIMM_DINOV2_LAYOUT = Layout(
    TIMM,
    "",
    TIMM_DEAD,
    fields=DINOV2_FIELDS,
    shaped={**TIMM_TABLES, "scaled": within("blocks.{}.", "blocks.{}.", TIMM_OUTPUTS)},
)
HF_ROBERTA_LAYOUT = Layout(
    ROBERTA,
    "roberta.",
    (r"lm_head\..*", r".*pooler\..*", r".*position_ids"),
    ROBERTA_SETTINGS,
    ROBERTA_FIELDS,
)
HF_BERT_LAYOUT = Layout(
    ROBERTA,
    "bert.",
    (r"cls\..*", r".*pooler\..*", r".*position_ids"),
    BERT_SETTINGS,
    BERT_FIELDS,
)
INV_FREQ = r".*rotary_emb\.inv_freq"  # a buffer that old versions of transformers wrote
QWEN_LAYOUT = Layout({**QWEN, **QWEN_HEAD}, "", (INV_FREQ,), QWEN_SETTINGS)
# of two that have the same keys the later one is meant, where no config.json says which
IMAGE_LAYOUTS = (
    OPENAI_LAYOUT,
    TIMM_DINOV2_LAYOUT,
    TIMM_LAYOUT,
    HF_DINOV2_LAYOUT,
    HF_DEIT_LAYOUT,
    HF_VIT_LAYOUT,
    HF_CLIP_LAYOUT,
)
TEXT_LAYOUTS = (HF_BERT_LAYOUT, HF_ROBERTA_LAYOUT)

# ---------------------------------------------------------------- the official ManagerTower
VISUAL = "vit_model.visual."
TEXT = "text_transformer."
CROSS_LAYER: Names = {
    **BERT_LAYER,
    "q.*": "crossattention.self.query.*",
    "kv.*": ("crossattention.self.key.*", "crossattention.self.value.*"),
    "cross_proj.*": "crossattention.output.dense.*",
    "ln_2.*": "crossattention.output.LayerNorm.*",
}
# of each modality: ours begin with text_ or image_, theirs with cross_modal_text_ or _image_
CROSS_MODAL: Names = {
    "transform.*": "transform.*",
    "pooler.*": "pooler.dense.*",
    **within("layers.{}.", "layers.{}.", CROSS_LAYER),
}
ADAPTIVE = {
    "norm_query.*": "extra_query_LayerNorm.*",
    "controller.*": "linear_controller.*",
    "q_proj.*": "fusion_attention.q_proj.*",
    "k_proj.*": "fusion_attention.k_proj.*",
}
OWN_QUERY = {"controller.*": ADAPTIVE["controller.*"]}  # aaue without the other modality
CLASSIFIER = {"fc.*": "0.*", "ln.*": "1.*", "fc_out.*": "3.*"}
MLM_HEAD = {
    "dense.*": "mlm_score.transform.dense.*",
    "ln.*": "mlm_score.transform.LayerNorm.*",
    "decoder.weight": "mlm_score.decoder.weight",
    "bias": "mlm_score.bias",
}
ITC_HEAD = {
    "text.*": "cross_modal_itc_text_head.fc.*",
    "image.*": "cross_modal_itc_image_head.fc.*",
    "temperature": "temperature",
}
HEAD_NAMES: dict[str, Names] = {
    "mlm": MLM_HEAD,
    "itm": {"*": "itm_score.fc.*"},
    "itc": ITC_HEAD,
    "vqa": within("", "vqa_classifier.", CLASSIFIER),
    "nlvr2": within("", "nlvr2_classifier.", CLASSIFIER),
    "snli_ve": within("", "snli_classifier.", CLASSIFIER),
    "retrieval": {"*": "rank_output.*"},
}
DEAD_KEYS: tuple[str, ...] = (  # in every official state, but not used by its model
    r"vit_model\.(positional_embedding|ln_final\..*)",
    r"text_transformer\.(pooler\..*|embeddings\.position_ids)",
    r".*\.softmax_temperature_cross",
)


# what the official code builds, whatever its config says
OFFICIAL_ENCODERS = {
    "vision_kind": "clip",
    "vision_activation": "quick_gelu",
    "vision_eps": 1e-5,
    "text_kind": "roberta",
    "text_eps": 1e-5,
}


def tower_rows(config: ManagerTowerConfig) -> list[Row]:
    """The layout of the official ManagerTower, BridgeTower and METER states."""
    if config.fusion == "manager" and config.manager_type == "sae":
        raise ValueError(
            "manager_type 'sae' has no official code, so there are no official weights of it"
        )
    for field, official in OFFICIAL_ENCODERS.items():
        value = getattr(config, field)
        if value != official:
            raise ValueError(
                f"{field} is {show(value)}; the official weights are of CLIP and RoBERTa, with "
                f"{show(official)}"
            )
    rows = expand(CLIP, "image_encoder.", VISUAL, config.vision_layers)
    rows += expand(ROBERTA, "text_encoder.", TEXT, config.text_layers)
    rows += expand({"type_embedding": "token_type_embeddings.weight"})
    for modality in MODALITIES:
        rows += modality_rows(config, modality)
    for head in config.heads:
        if head not in HEAD_NAMES:
            raise ValueError(f"the head {head!r} has no official code, so no official weights")
        rows += expand(HEAD_NAMES[head], f"heads.{head}.")
    return rows


def modality_rows(config: ManagerTowerConfig, modality: str) -> list[Row]:
    """The cross-modal half of one modality, with its managers or bridges."""
    ours = f"{modality}_"
    theirs = f"cross_modal_{modality}_"
    rows = expand(CROSS_MODAL, ours, theirs, config.num_layers)
    if config.fusion == "manager":
        rows += expand({f"{modality}_layer_embedding": f"layer_embeddings_{modality}.weight"})
        for i in range(config.num_layers):
            rows += manager_rows(config, modality, i)
    elif config.fusion == "bridge":
        # the first bridge reads no cross-modal layer: it is a lone norm, and the others start at 0
        rows += expand({"bridges.0.*": "layernorm.*"}, ours, theirs)
        for i in range(1, config.num_layers):
            bridge = {f"bridges.{i}.*": f"link_tower.{i - 1}.LayerNorm.*"}
            rows += expand(bridge, ours, theirs)
    return rows


def manager_rows(config: ManagerTowerConfig, modality: str, i: int) -> list[Row]:
    """The manager before cross-modal layer i."""
    ours = f"{modality}_managers.{i}."
    theirs = f"cross_modal_{modality}_manager_tower.{i}.manager_layer."
    # one norm an expert, and from the second layer on one of the cross-modal layer before
    norms = range(config.num_experts(modality) + (1 if i > 0 else 0))
    affine = {
        "scale": tuple(f"LayerNorm.{n}.weight" for n in norms),
        "shift": tuple(f"LayerNorm.{n}.bias" for n in norms),
    }
    rows = expand(affine, ours, theirs, layout="stack")
    rows += expand({"temperature": "softmax_temperature"}, ours, theirs)
    if config.manager_type == "aaue" and i > 0:
        rows += expand({"score_previous": "layer_scores_cross"}, ours, theirs, layout="scores")
        rows += expand(OWN_QUERY if config.manager_query == "own" else ADAPTIVE, ours, theirs)
    else:
        rows += expand({"scores": "layer_scores"}, ours, theirs, layout="scores")
    return rows


@functools.cache
def official_keys() -> dict[str, str]:
    """Our key -> the (first) official key of it, of everything that a base model may have."""
    keys = {}
    for fusion in ("bridge", "manager"):
        config = ManagerTowerConfig(fusion=fusion, heads=tuple(HEAD_NAMES))
        for row in tower_rows(config):
            keys[row.ours] = row.theirs[0]
    return keys


# ---------------------------------------------------------------- the official LLaVA-OV-Manager
SIGLIP_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = {"projector.0.*": "mm_projector.0.*", "projector.2.*": "mm_projector.2.*"}
CROSS_QUERY = {name: ADAPTIVE[name] for name in ("q_proj.*", "k_proj.*")}


def qwen_names(config: LlavaManagerConfig) -> Names:
    if config.tie_embeddings:
        return QWEN
    return {**QWEN, **QWEN_HEAD}


def llava_rows(config: LlavaManagerConfig, newline: bool) -> list[Row]:
    """The layout of LLaVA-OV-Manager and LLaVA-OneVision states, with image_newline or without."""
    rows = expand(qwen_names(config), "llm.", layers=config.num_layers)
    rows += expand(HF_SIGLIP, "vision.", SIGLIP_PREFIX, config.vision_layers - 1)
    rows += expand(PROJECTOR, theirs="model.")
    if newline:
        rows += expand({"image_newline": "image_newline"}, theirs="model.")
    if config.manager_type:
        rows += expand({"layer_embedding": "manager_layer_embedding"}, theirs="model.")
        for number, layer in enumerate(config.inject_layers):
            rows += visual_manager_rows(config, number, layer)
    return rows


def visual_manager_rows(config: LlavaManagerConfig, number: int, layer: int) -> list[Row]:
    """The manager before one layer of the LLM."""
    ours = f"managers.{number}."
    theirs = f"model.manager.{number}."
    if config.is_static(layer):
        return expand({"scores": "layer_scores"}, ours, theirs, layout="scores")
    rows = expand({"gate": "zero_gate"}, ours, theirs, layout="scores")
    rows += expand({"controller.weight": "linear_controller.weight"}, ours, theirs)
    if config.manager_type == "adaptive_cross":
        rows += expand(CROSS_QUERY, ours, theirs)
    return rows


# ================================================================ 2. import and export
def import_state(
    state: State, rows: list[Row], shapes: Mapping[str, torch.Size], dead: tuple[str, ...] = ()
) -> State:
    """A foreign state -> ours, by renaming, concatenating and reshaping. Meta tensors work too.

    shapes: our key -> shape; dead: patterns of keys that are known to be unused. Raises ValueError
    with the keys that are missing, unknown, misshapen, no floating-point numbers or not finite.
    """
    expected = expected_shapes(rows, shapes)
    unknown = [key for key in state if key not in expected and not is_dead(key, dead)]
    wanted = {key: state[key] for key in expected if key in state}
    misshapen = []
    for key, tensor in wanted.items():
        if tensor.shape != expected[key]:
            misshapen.append(f"{key} is {tuple(tensor.shape)}, should be {tuple(expected[key])}")
    problems = {
        "missing": sorted(set(expected) - set(state)),
        "unknown": unknown,
        "wrong shape": misshapen,
        **bad_values(wanted),
    }
    refuse(problems)

    imported = {}
    for row in rows:
        parts = [state[key] for key in row.theirs]
        imported[row.ours] = row.join(parts)
    return imported


def expected_shapes(rows: list[Row], shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Their key -> the shape that it should have, from the shapes of ours."""
    expected = {}
    for row in rows:
        ours = torch.empty(shapes[row.ours], device="meta")
        for key, part in zip(row.theirs, row.split(ours), strict=True):
            expected[key] = part.shape
    return expected


def is_dead(key: str, dead: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in dead)


def bad_values(state: State) -> dict[str, list[str]]:
    """The weights that are no floating-point numbers, and those that are not finite."""
    not_floating = []
    not_finite = []
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            not_floating.append(f"{key} is {tensor.dtype}")
        elif not is_finite(tensor):
            not_finite.append(key)
    return {"no floating-point numbers": not_floating, "not finite": not_finite}


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; one on the meta device has no values."""
    if tensor.is_meta:
        return True
    if tensor.dtype.itemsize == 1:  # torch does not test all of its 8-bit numbers
        tensor = tensor.float()
    return bool(tensor.isfinite().all())


def refuse(problems: dict[str, list[str]]) -> None:
    """Raises ValueError if there are any: of each kind the first keys, where they are many."""
    parts = []
    for name, items in problems.items():
        if items:
            parts.append(f"{name}: {shorten('; '.join(items), 250)}")
    if parts:
        raise ValueError("the weights do not fit the config. " + ". ".join(parts))


def export_state(state: State, rows: list[Row]) -> State:
    """The inverse of `import_state`, for any dict with our keys: gradients and partial ones too."""
    exported: State = {}
    for row in rows:
        if row.ours in state:
            parts = row.split(state[row.ours])
            exported.update(zip(row.theirs, parts, strict=True))
    return exported


def from_official(state_dict: State, config: ManagerTowerConfig | LlavaManagerConfig) -> State:
    """An official state -> ours, strictly: `import_state` raises the errors. Meta tensors work too.

    The type of the config says which model it is. Load the result with
    `model.load_state_dict(state, strict=True, assign=True)`.
    """
    if isinstance(config, LlavaManagerConfig):
        return llava_from_official(state_dict, config)
    with torch.device("meta"):
        shapes = shapes_of(ManagerTower(config))
    dead = DEAD_KEYS
    if "itc" not in config.heads:
        dead = (*dead, ITC_HEAD["temperature"])
    return import_state(state_dict, tower_rows(config), shapes, dead)


def llava_from_official(state_dict: State, config: LlavaManagerConfig) -> State:
    """LLaVA-OV-Manager's half. A state without image_newline, as stage 1 writes it, gets zeros."""
    state = drop_tied_head(state_dict, config)
    with torch.device("meta"):
        shapes = shapes_of(LlavaManager(config))
    has_newline = "model.image_newline" in state
    rows = llava_rows(config, has_newline)
    ours = import_state(state, rows, shapes, (r".*\.position_ids", INV_FREQ))
    if not has_newline:
        ours["image_newline"] = ours["llm.norm.weight"].new_zeros(config.hidden_size)
    return ours


def to_official(state_dict: State, config: ManagerTowerConfig | LlavaManagerConfig) -> State:
    """Ours -> official names: every key that the official model uses.

    It takes any dict with our parameter names: gradients, and a part of a model. image_newline is
    left out where the config merges tiles flat.
    """
    if isinstance(config, LlavaManagerConfig):
        return export_state(state_dict, llava_rows(config, config.merge != "flat"))
    return export_state(state_dict, tower_rows(config))


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def drop_tied_head(state: State, config: LlavaManagerConfig) -> State:
    """Without the lm_head that repeats the embedding. Raises ValueError for one that differs."""
    head_key = QWEN_HEAD["head.weight"]
    embedding_key = str(QWEN["embed.weight"])
    if not config.tie_embeddings or head_key not in state or embedding_key not in state:
        return state
    if not is_same(state[embedding_key], state[head_key]):
        raise ValueError(f"{head_key} differs from {embedding_key}, but the config ties the two")
    return {key: tensor for key, tensor in state.items() if key != head_key}


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and values; on the meta device no values."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_meta or not is_finite(one):  # the import refuses it
        return True
    return torch.equal(one, other)


def resize_position_embedding(table: Tensor, grid: int) -> Tensor:
    """A position table for other images: (1 + g * g, D) -> (1 + grid * grid, D).

    Its first row, the class token's, stays; the rest is resized bicubically, without antialiasing.
    Returns the table itself for g = grid. Raises ValueError for a table of another kind.
    """
    old = math.isqrt(max(table.shape[0] - 1, 0)) if table.dim() == 2 else 0
    if old == 0 or old * old + 1 != table.shape[0]:
        raise ValueError(
            f"a position table of shape {tuple(table.shape)} is not a class row and a square grid"
        )
    if old == grid:
        return table
    patches = table[1:].float().T.reshape(1, -1, old, old)  # (1, D, g, g)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], patches.flatten(2)[0].T.to(table.dtype)])  # (1 + grid * grid, D)


# ================================================================ 3. files and folders
@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """A ValueError inside begins with this file or folder."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


DTYPES = {  # how the header of a .safetensors file calls them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def safetensors_file(path: str | Path) -> Path:
    """A .safetensors file, or the model.safetensors of a folder. Raises ValueError if none is."""
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if file.is_file() and file.suffix == ".safetensors":
        return file
    problem = "does not exist"
    if file.exists() or file.is_symlink():
        problem = "is not a .safetensors file"
    raise ValueError(
        f"{file} {problem}; `python prepare.py weights` makes a folder with model.safetensors "
        "from PyTorch's .bin, .pt and .ckpt files"
    )


def read_safetensors(path: str | Path) -> State:
    """A .safetensors file, or the model.safetensors of a folder, as CPU tensors.

    Raises ValueError if there is none, or if it cannot be read.
    """
    file = safetensors_file(path)
    read_header(file)  # it names what load_file does not
    try:
        return load_file(file)
    except SafetensorError as error:
        reason = first_line_of(error)
        raise ValueError(f"{file} is not a readable safetensors file ({reason})") from error


def read_header(path: str | Path) -> State:
    """What `read_safetensors` reads, as tensors on the meta device: they need no memory, so a file
    can be compared with a config before anything is allocated.
    """
    file = safetensors_file(path)
    state = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (it is no dict)
                part = opened.get_slice(key)
                name = part.get_dtype()
                if name not in DTYPES:
                    raise ValueError(f"{file}: {key} has the type {name}, which cannot be read")
                shape = part.get_shape()
                state[key] = torch.empty(shape, dtype=DTYPES[name], device="meta")
    except (SafetensorError, RuntimeError, TypeError) as error:
        reason = first_line_of(error)
        raise ValueError(f"{file} is not a readable safetensors file ({reason})") from error
    return state


def weight_files(path: str | Path) -> list[Path]:
    """The .safetensors file of a path, or all shards that the index of a folder names."""
    index_file = Path(path) / "model.safetensors.index.json"
    return list(shards_of(index_file)) if index_file.is_file() else [Path(path)]


def shards_of(index_file: Path) -> dict[Path, list[str]]:
    """The files that an index names, each with its keys, in alphabetical order."""
    suffix = Path(index_file.name.removesuffix(".index.json")).suffix
    weight_map = read_json(index_file, dict).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_file} has no weight_map: it must say which file has which key")
    shards: dict[Path, list[str]] = {}
    for key, name in weight_map.items():
        is_file_name = isinstance(name, str) and Path(name).name == name and len(name) < 256
        if not is_file_name or not name.endswith(suffix):
            raise ValueError(
                f"{index_file}: weight_map has {show(name)}; it must be the name of a {suffix} "
                "file beside it"
            )
        shards.setdefault(index_file.parent / name, []).append(key)
    for file in shards:
        if not file.is_file():
            raise ValueError(f"{file} does not exist, but {index_file.name} names it")
    return {file: shards[file] for file in sorted(shards)}


def read_shards(path: str | Path) -> State:
    """What `read_safetensors` reads, of all `weight_files`."""
    state: State = {}
    for file in weight_files(path):
        state.update(read_safetensors(file))
    return state


def read_headers(path: str | Path) -> State:
    """What `read_shards` reads, on the meta device."""
    state: State = {}
    for file in weight_files(path):
        state.update(read_header(file))
    return state


# Who compares a file with a model reads it twice: the header decides whether the rest is read.
READERS = (read_headers, read_shards)


# ---------------------------------------------------------------- arguments of Python code
def checked(function: Function) -> Function:
    """A function for Python code, whose arguments must have the types that it declares.

    It raises ValueError, in one sentence, where they have not.
    """
    signature = inspect.signature(function)
    hints = get_type_hints(function)

    @functools.wraps(function)
    def checking(*args: Any, **keywords: Any) -> Any:
        for name, value in signature.bind(*args, **keywords).arguments.items():
            variadic = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            if not variadic:
                check_argument(f"{function.__name__}: {name}", value, hints[name])
        return function(*args, **keywords)

    return checking  # type: ignore[return-value]


def check_argument(name: str, value: Any, declared: Any) -> None:
    """Raises ValueError for a value of another type than `str | Path`, `list[str] | None` ..."""
    kinds = get_args(declared) if isinstance(declared, UnionType) else (declared,)
    kinds = tuple(get_origin(kind) or kind for kind in kinds)
    if Any not in kinds and not isinstance(value, kinds):
        names = " or ".join(ARGUMENT_NAMES.get(kind, kind.__name__) for kind in kinds)
        raise ValueError(f"{name} is {show(value)}; it must be {names}")


# how a message calls a type
ARGUMENT_NAMES = {
    str: "a text",
    Path: "a Path",
    int: "a whole number",
    dict: "a dict",
    list: "a list",
    torch.dtype: "a dtype like torch.bfloat16",
    NoneType: "None",
}


# ---------------------------------------------------------------- published encoders
@checked
def load_unimodal(model: ManagerTower | LlavaManager, vision: str | Path, text: str | Path) -> None:
    """Fill both encoders from pre-trained ones: .safetensors files, or folders of them.

    ManagerTower: vision is CLIP in OpenAI's layout or HF's, ViT, DeiT or DINOv2 in HF's or timm's,
    its position table resized to the model's image size; text is HF's RoBERTa or BERT, with a head
    or without. `config_of_encoders` says which model they fit. LlavaManager: HF's SiglipModel or
    SiglipVisionModel, without its last layer, and Qwen2ForCausalLM.

    A config.json beside them must say what the model computes with. Raises ValueError with the
    file, and the keys as in `import_state`.
    """
    if isinstance(model, LlavaManager):
        layers = len(model.vision.blocks)
        load_encoder(model.vision, vision, (HF_SIGLIP_LAYOUT,), layers, model.config, "image")
        load_language_model(model, text)
        return
    config = model.config
    images = model.image_encoder
    texts = model.text_encoder
    image_layouts = layouts_of(IMAGE_LAYOUTS, "vision_kind", config.vision_kind)
    text_layouts = layouts_of(TEXT_LAYOUTS, "text_kind", config.text_kind)
    load_encoder(images, vision, image_layouts, len(images.blocks), config, "image")
    load_encoder(texts, text, text_layouts, len(texts.layers), config, "text")


def layouts_of(layouts: tuple[Layout, ...], field: str, kind: str) -> tuple[Layout, ...]:
    """The layouts of this kind of encoder, and those that do not say their kind."""
    return tuple(layout for layout in layouts if layout.fields.get(field, kind) == kind)


def load_encoder(
    encoder: nn.Module,
    path: str | Path,
    layouts: tuple[Layout, ...],
    num_layers: int,
    config: ManagerTowerConfig | LlavaManagerConfig,
    modality: str,
) -> None:
    """Load a file or folder in one of these layouts into an encoder of a model with this config."""
    path = find_folder(path)
    imported: State = {}
    settings = settings_beside(path)
    for read in READERS:
        state = read_published(path, read)
        layout, prefix = find_layout(state, layouts, settings)
        if read is read_headers:
            check_published(settings, layout, config, modality)
        with naming(path):
            rows = layout.rows(prefix, num_layers)
            dead = tuple(pattern.replace("{}", str(num_layers)) for pattern in layout.dead)
            state = fit_tables(state, rows, encoder)
            imported = import_state(state, rows, shapes_of(encoder), dead)
    encoder.load_state_dict(imported)


def read_published(path: str | Path, read: Callable[[str | Path], State]) -> State:
    """The state of a published encoder by one of READERS, with the names of today."""
    state = read(path)
    with naming(path):
        refuse_our_own(state)
        refuse_distilled(state)
        return with_new_names(state)


# the second token of a distilled DeiT, of transformers and of timm
SECOND_TOKENS = ("distillation_token", "dist_token")


def refuse_distilled(state: State) -> None:
    for key in state:
        if key.endswith(SECOND_TOKENS):
            raise ValueError(
                f"{key} is the second token of a distilled DeiT, which is not supported; take a "
                "DeiT without distillation"
            )


# how files from before 2019 call weight and bias of BERT's norms
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def with_new_names(state: State) -> State:
    """The state with the names of today. Raises ValueError for a weight that has both."""
    renamed: State = {}
    for key, tensor in state.items():
        for old, new in OLD_NAMES.items():
            if key.endswith(old):
                key = key.removesuffix(old) + new
        if key in renamed:
            raise ValueError(f"{key} is there twice, under its name of today and an older one")
        renamed[key] = tensor
    return renamed


def load_language_model(model: LlavaManager, path: str | Path) -> None:
    path = find_folder(path)
    check_published_llm(config_beside(path), model.config)
    imported: State = {}
    for read in READERS:
        state = read(path)
        with naming(path):
            refuse_our_own(state)
            state = drop_tied_head(whole_language_model(state), model.config)
            rows = expand(qwen_names(model.config), layers=model.config.num_layers)
            imported = import_state(state, rows, shapes_of(model.llm), (INV_FREQ,))
    model.llm.load_state_dict(imported)


def whole_language_model(state: State) -> State:
    """A Qwen2Model that was saved by itself, under the names that it has in Qwen2ForCausalLM."""
    if any(key.startswith("model.") for key in state):
        return state
    return {f"model.{key}": tensor for key, tensor in state.items()}


# what transformers calls the only file of weights in a folder, which the config.json there is of
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")


PREPROCESSING_FILE = "preprocessor_config.json"  # what transformers does with pictures


def config_beside(path: str | Path) -> Path | None:
    """The config.json of a folder, or beside one of WHOLE_FILES; None if there is none."""
    return file_beside(path, "config.json")


def file_beside(path: str | Path, name: str) -> Path | None:
    """The file of this name in a folder, or beside one of WHOLE_FILES; None if there is none."""
    path = Path(path)
    folder = path.parent if path.name in WHOLE_FILES and path.is_file() else path
    file = folder / name
    return file if file.is_file() else None


class Settings(NamedTuple):
    """A config.json beside an encoder."""

    file: Path | None  # None where there is none
    values: dict[str, Any]  # what it says; empty where there is none

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """A ValueError inside begins with the file."""
        if self.file is None:
            yield
            return
        with naming(self.file):
            yield

    def part(self, published: Published) -> dict[str, Any]:
        """The encoder's own part of it. Raises ValueError if that is no object."""
        values = self.values.get(published.part, self.values)
        if not isinstance(values, dict):
            raise ValueError(f"{published.part} is {show(values)}; it must be an object")
        return values

    def kind(self, published: Published) -> Any:
        """The model_type of the encoder; None where nothing says it."""
        return self.part(published).get("model_type", self.values.get("model_type"))

    def said(self, published: Published) -> dict[str, Any]:
        """Its part, with what transformers takes for an absent key. null is an absent key."""
        said = {}
        for key, value in self.part(published).items():
            if value is not None:
                said[key] = value
        return {**published.defaults, **said}


def settings_beside(path: str | Path) -> Settings:
    file = config_beside(path)
    return Settings(file, read_json(file, dict) if file else {})


def check_published(
    settings: Settings,
    layout: Layout,
    config: ManagerTowerConfig | LlavaManagerConfig,
    modality: str,
) -> None:
    """Raises ValueError for a config.json of other settings than the model's."""
    published = published_fields(settings, layout, modality)
    with settings.naming():
        for field in UNSEEN_FIELDS:
            ours = getattr(config, field, None)  # the MLLM has not all of them
            if field not in published or ours is None or published[field] == ours:
                continue
            key = PUBLISHED_KEYS[modality][field]
            found = f"{key} is {show(published[field])}"
            if field in UNSEEN_FLAGS:
                raise ValueError(f"{found}, but the model has --{field} {ours}")
            raise ValueError(f"{found}; only {show(ours)} fits the model's {field}")


def check_published_llm(file: Path | None, config: LlavaManagerConfig) -> None:
    """Raises ValueError for a config.json of another LLM than the model's."""
    if file is None:
        return
    with naming(file):
        values = read_json(file, dict)
        check_kind(values, QWEN_KINDS)
        published = LlavaManagerConfig.from_official(values)
        for field, key in {**OFFICIAL_FIELDS, "rope_theta": "rope_theta"}.items():
            theirs = getattr(published, field)
            ours = getattr(config, field)
            if theirs != ours:
                raise ValueError(f"{key} is {theirs}, but the model has --{field} {ours}")


def find_layout(
    state: State, layouts: tuple[Layout, ...], settings: Settings
) -> tuple[Layout, str]:
    """The layout of a state, and what its keys begin with.

    It is the one that has most of its keys there, among those that the config.json may be of. An
    encoder that was saved by itself has nothing before its keys. Raises ValueError for a
    config.json of another family of models.
    """
    best_layout = layouts[-1]
    best_prefix = ""
    most = -1
    for layout in possible_layouts(layouts, settings):
        for prefix in (layout.prefix, ""):
            count = 0
            for row in layout.rows(prefix, 1):
                count += sum(key in state for key in row.theirs)
            if count >= most:
                best_layout = layout
                best_prefix = prefix
                most = count
    return best_layout, best_prefix


def possible_layouts(layouts: tuple[Layout, ...], settings: Settings) -> list[Layout]:
    """Those that the model_type of a config.json allows. Raises ValueError if it allows none."""
    possible = []
    kinds: list[str] = []
    found: Any = None
    with settings.naming():
        for layout in layouts:
            if layout.settings is None:
                possible.append(layout)
                continue
            kinds += layout.settings.kinds
            found = settings.kind(layout.settings)
            if found is None or found in layout.settings.kinds:
                possible.append(layout)
        if found is not None and not any(layout.settings for layout in possible):
            check_kind({"model_type": found}, tuple(kinds))
    return possible


def fit_tables(state: State, rows: list[Row], encoder: Any) -> State:
    """The state with its position table resized to the encoder's images, if it has a class token
    and a table, and with the first sentence type alone, which all texts have.
    """
    fitted = dict(state)
    names = {row.ours: row for row in rows}
    types = names.get("type_embedding")
    if types is not None and types.theirs[0] in state:
        key = types.theirs[0]
        if state[key].dim() == 2:  # else the import names it
            fitted[key] = state[key][:1]
    positions = names.get("position_embedding")
    # SigLIP, which has no class token, has images of one size
    if positions is not None and "class_embedding" in names and positions.theirs[0] in state:
        key = positions.theirs[0]
        grid = encoder.image_size // encoder.patch.kernel_size[0]
        fitted[key] = resize_foreign_positions(state[key], positions, grid)
    return fitted


def resize_foreign_positions(table: Tensor, row: Row, grid: int) -> Tensor:
    """A position table of theirs, (1, L, D) or (L, D), for grid x grid patches."""
    if row.layout == "table" and table.dim() == 3 and len(table) == 1:
        return resize_position_embedding(table[0], grid)[None]
    return resize_position_embedding(table, grid)


# ---------------------------------------------------------------- the config that encoders ask for
# field of ManagerTowerConfig -> (our key in the encoder, dimension) of the tensor whose size it is
ENCODER_SIZES = {
    "image": {
        "vision_width": ("patch.weight", 0),
        "patch_size": ("patch.weight", 3),
    },
    "text": {
        "vocab_size": ("word_embedding.weight", 0),
        "text_width": ("word_embedding.weight", 1),
        "max_positions": ("position_embedding.weight", 0),
        "text_mlp_width": ("layers.0.fc.weight", 0),
    },
}
# modality -> (field, our key of the first of the layers, whose number it is)
ENCODER_LAYERS = {
    "image": ("vision_layers", "blocks.0.fc.weight"),
    "text": ("text_layers", "layers.0.fc.weight"),
}
# modality -> field -> its key in transformers' config.json
PUBLISHED_KEYS = {
    "image": {
        "vision_width": "hidden_size",
        "vision_layers": "num_hidden_layers",
        "vision_heads": "num_attention_heads",
        "patch_size": "patch_size",
        "vision_activation": "hidden_act",
        "vision_eps": "layer_norm_eps",
    },
    "text": {
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "text_width": "hidden_size",
        "text_layers": "num_hidden_layers",
        "text_heads": "num_attention_heads",
        "text_mlp_width": "intermediate_size",
        "pad_token_id": "pad_token_id",
        "text_eps": "layer_norm_eps",
    },
}
# all fields of `config_of_encoders`
FOLLOWING_FIELDS = (
    *CLIP_FIELDS,
    *ROBERTA_FIELDS,
    *PUBLISHED_KEYS["image"],
    *PUBLISHED_KEYS["text"],
)
# what no shape shows, so that weights of another model would be taken without a word
UNSEEN_FLAGS = ("vision_heads", "text_heads", "pad_token_id")
UNSEEN_FIELDS = (*UNSEEN_FLAGS, "vision_activation", "vision_eps", "text_eps")
# transformers' name of an activation -> ours
ACTIVATION_NAMES = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
# of one attention head, in all released encoders up to this width, where nothing says it
CHANNELS_OF_A_HEAD = 64
WIDEST_WITH_SUCH_HEADS = 1024
# field -> its key in transformers' preprocessor_config.json, and in timm's config.json
COLOUR_KEYS = {"image_mean": ("image_mean", "mean"), "image_std": ("image_std", "std")}
PREPROCESSING_SUPPORTED = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
# the arguments of a timm model that show in shapes, and the number of heads
TIMM_ARGUMENTS = ("img_size", "patch_size", "embed_dim", "depth", "num_classes", "num_heads")


@checked
def config_of_encoders(vision: str | Path, text: str | Path) -> dict[str, Any]:
    """The fields of ManagerTowerConfig that follow from two published encoders.

    vision, text: as for `load_unimodal`, which then fills a model with these fields. They are the
    sizes, heads, kinds and epsilons of both, and the mean and standard deviation of the pictures.
    Only headers are read. Raises ValueError for what is not supported.
    """
    return {**encoder_fields(vision, "image"), **encoder_fields(text, "text")}


def encoder_fields(path: str | Path, modality: str) -> dict[str, Any]:
    """The half of `config_of_encoders` of one modality: what is usual for the layout, what shapes
    show, and what stands in the files beside the weights, which counts most.
    """
    layouts = {"image": IMAGE_LAYOUTS, "text": TEXT_LAYOUTS}[modality]
    path = find_folder(path)
    settings = settings_beside(path)
    state = read_published(path, read_headers)
    layout, prefix = find_layout(state, layouts, settings)
    fields = dict(layout.fields)
    with naming(path):
        fields.update(shown_fields(state, layout, prefix, modality))
    fields.update(published_fields(settings, layout, modality))
    if modality == "image":
        fields.update(preprocessing_beside(path))
    return fields


def shown_fields(state: State, layout: Layout, prefix: str, modality: str) -> dict[str, Any]:
    """What shapes and keys show. What is missing is left out: the import then names it."""
    keys = {row.ours: row.theirs[0] for row in layout.rows(prefix, 1)}
    fields: dict[str, Any] = {}
    for field, (our_key, dimension) in ENCODER_SIZES[modality].items():
        size = size_of(state, keys[our_key], dimension, 0)
        if size > 0:
            fields[field] = size
    field, our_key = ENCODER_LAYERS[modality]
    layers = count_numbers(state, keys[our_key])
    if layers > 0:
        fields[field] = layers
    # heads do not show, but all of them have the same size
    tower = {"image": "vision", "text": "text"}[modality]
    width = fields.get(f"{tower}_width", 0)
    if 0 < width <= WIDEST_WITH_SUCH_HEADS and width % CHANNELS_OF_A_HEAD == 0:
        fields[f"{tower}_heads"] = width // CHANNELS_OF_A_HEAD
    return fields


def published_fields(settings: Settings, layout: Layout, modality: str) -> dict[str, Any]:
    """What a config.json says. Raises ValueError, with the file, for what is not supported."""
    if settings.file is None:
        return {}
    with settings.naming():
        if layout.settings is None:
            return timm_fields(settings.values)
        said = settings.said(layout.settings)
        check_settings(said, layout.settings.supported, "the encoder's")
        fields: dict[str, Any] = {}
        for field, key in PUBLISHED_KEYS[modality].items():
            if key in said:
                value = said[key]
                if field == "vision_activation":
                    value = activation_of(value)
                check_as(key, field, value)
                fields[field] = value
    return fields


def check_as(key: str, field: str, value: Any) -> None:
    """Raises ValueError unless the value of a foreign key may be that of a field of ours."""
    try:
        check_values(ManagerTowerConfig, {field: value})
    except FieldError as error:
        _, _, problem = str(error).partition(" ")
        raise ValueError(f"{key} {problem}") from None


def activation_of(name: Any) -> str:
    """Our name of an activation of transformers."""
    if not isinstance(name, str) or name not in ACTIVATION_NAMES:
        raise ValueError(f"hidden_act is {show(name)}; it must be {' or '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def timm_fields(values: dict[str, Any]) -> dict[str, Any]:
    """What timm's config.json says and no shape shows: the pictures, and perhaps the heads."""
    arguments = as_dict(values.get("model_args"))
    unknown = sorted(set(arguments) - set(TIMM_ARGUMENTS))
    if unknown:
        raise ValueError(
            f"model_args has {show(unknown[0])}; only {', '.join(TIMM_ARGUMENTS)} are supported"
        )
    fields: dict[str, Any] = {}
    if "num_heads" in arguments:
        check_as("num_heads", "vision_heads", arguments["num_heads"])
        fields["vision_heads"] = arguments["num_heads"]
    # old files have no pretrained_cfg, but its keys
    pictures = {**values, **as_dict(values.get("pretrained_cfg"))}
    for field, (_, key) in COLOUR_KEYS.items():
        if pictures.get(key) is not None:
            fields[field] = colours_in(pictures, key, field)
    return fields


def preprocessing_beside(path: str | Path) -> dict[str, Any]:
    """Mean and standard deviation of a preprocessor_config.json; empty where there is none."""
    file = file_beside(path, PREPROCESSING_FILE)
    if file is None:
        return {}
    values = read_json(file, dict)
    fields = {}
    with naming(file):
        check_settings(values, PREPROCESSING_SUPPORTED, "the pictures'")
        for field, (key, _) in COLOUR_KEYS.items():
            if values.get(key) is not None:
                fields[field] = colours_in(values, key, field)
    return fields


def colours_in(values: dict[str, Any], key: str, field: str) -> tuple[float, ...]:
    check_as(key, field, values[key])
    if len(values[key]) != 3:
        raise ValueError(f"{key} is {show(values[key])}; it must be three numbers")
    return tuple(values[key])


def fit_image_size(image_size: int, patch_size: int) -> int:
    """The nearest image size that whole patches cover."""
    return patch_size * max(1, round(image_size / patch_size))


OUR_MARKS = ("image_encoder.patch.weight", "llm.embed.weight")  # each model of ours has one of them


def refuse_our_own(state: State) -> None:
    """Raises ValueError for weights under our own names, where foreign ones are wanted."""
    if any(mark in state for mark in OUR_MARKS):
        raise ValueError(
            "these are weights of a model of this project, not published ones to be imported; give "
            "its folder as --init or --checkpoint"
        )


# ---------------------------------------------------------------- our checkpoint folders
def save_folder(
    state: State, config: Any, folder: str | Path, transform: str | None = None
) -> None:
    """Write folder/model.safetensors and, from the config, folder/config.json, each atomically.

    transform: what pictures went through in training, for whoever evaluates the model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    values = {"model": type(config).__name__.removesuffix("Config"), "version": VERSION}
    if transform:
        values["transform"] = transform
    values.update(dataclasses.asdict(config))
    write_text(folder / "config.json", json.dumps(values, indent=1) + "\n")
    write_atomically(folder / "model.safetensors", lambda path: save_file(state, path))


def save_model(model: ManagerTower | LlavaManager, folder: str | Path) -> None:
    """Write a model's model.safetensors and config.json, atomically."""
    save_folder(model.state_dict(), model.config, folder)


def read_config_values(folder: str | Path) -> dict[str, Any]:
    """folder/config.json, ours or a foreign one. Raises ValueError if it is no JSON object."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a checkpoint folder: it has no config.json")
    return read_json(file, dict)


def read_config(folder: str | Path, config_class: Any = ManagerTowerConfig) -> Any:
    """folder/config.json of ours -> an instance of this config class.

    Folders of the first edition, without `version` and `transform`, are read as well. Raises
    ValueError if the file is missing, broken or another model's.
    """
    file = Path(folder) / "config.json"
    values = read_config_values(folder)
    name = values.pop("model", None)
    version = values.pop("version", VERSION)
    if version != VERSION:
        raise ValueError(f"{file} has the version {show(version)}; this program reads {VERSION}")
    values.pop("transform", None)
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(config_class)})
    if f"{name}Config" != config_class.__name__ or unknown:
        wanted = config_class.__name__.removesuffix("Config")
        problem = f'its "model" is {show(name)}'
        if name is None:
            problem = f'it has no "model": "{wanted}", which a config.json of this program has'
        elif name == wanted:
            problem = f"it has the unknown fields {show(unknown)}"
        raise ValueError(f"{file} is not the config of a {wanted}: {problem}")
    try:
        return config_class(**values)
    except (ValueError, TypeError) as error:  # a TypeError where a list is a number, or null
        raise ValueError(f"{file}: {error}") from error


def is_mllm_config(values: dict[str, Any]) -> bool:
    """Whether a config.json is that of LLaVA-OV-Manager, ours or an official one."""
    return values.get("model") == "LlavaManager" or "mm_projector_type" in values


@checked
def load_model(folder: str | Path, **overrides: Any) -> Any:
    """A checkpoint folder -> ManagerTower or LlavaManager, on the CPU.

    A two-tower model takes other values of config fields: `heads`, `image_size`, ... (`load_tower`
    says what becomes of its weights). The MLLM takes `dtype`, and for an official folder `vision`
    and `im_start_id` (see `load_llava`). Raises ValueError for whatever does not fit.
    """
    folder = find_folder(folder)
    if is_mllm_config(read_config_values(folder)):
        load: Callable = load_llava
        names = set(inspect.signature(load_llava).parameters) - {"folder"}
    else:
        load = load_tower
        names = {field.name for field in dataclasses.fields(ManagerTowerConfig)}
    unknown = sorted(set(overrides) - names)
    if unknown:
        raise ValueError(
            f"load_model: {', '.join(unknown)} means nothing for {folder}; it may be "
            f"{', '.join(sorted(names))}"
        )
    return load(folder, **overrides)


@checked
def load_llava(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    vision: dict | None = None,
    im_start_id: int | None = None,
) -> LlavaManager:
    """A checkpoint folder, ours or an official one -> LlavaManager, on the CPU.

    An official one has config.json and .safetensors, sharded or not; `vision` is the config of its
    SigLIP, and `im_start_id` the token of its tokenizer, where they are not those of the paper.
    """
    folder = find_folder(folder)
    values = read_config_values(folder)
    is_official = values.get("model") != "LlavaManager"
    if is_official:
        known = {} if im_start_id is None else {"im_start_id": im_start_id}
        with naming(Path(folder) / "config.json"):
            check_kind(values, QWEN_KINDS)
            # the authors only name their SigLIP; an export of ours says its sizes
            vision = vision or values.get("vision_config")
            config = LlavaManagerConfig.from_official(values, vision, **known)
    elif vision is not None or im_start_id is not None:
        raise ValueError(
            f"{folder} is no official folder: vision and im_start_id are in its config"
        )
    else:
        config = read_config(folder, LlavaManagerConfig)

    refuse_more_layers(folder, config, read_headers(folder))
    with torch.device("meta"):
        model = LlavaManager(config)
    # official or not, the tensors of the file must be exactly those of the model
    shapes = shapes_of(model)
    for read in READERS:
        state = read(folder)
        with naming(folder):
            if is_official:
                state = llava_from_official(state, config)
            state = import_state(state, [Row(key, (key,)) for key in shapes], shapes)
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model


def refuse_more_layers(folder: str | Path, config: Any, header: State) -> None:
    """Raises ValueError for more layers than the file has tensors: building them takes long."""
    for name in ("vision_layers", "text_layers", "num_layers"):
        layers = getattr(config, name, 0)
        if layers > len(header) + 1:  # the last one of SigLIP is not built
            raise ValueError(
                f"{folder}: the weights do not fit the config. {name} is {layers}, but the file "
                f"has only {len(header)} tensors"
            )


# ---------------------------------------------------------------- a model for another task
# The fields that may differ from those of a stored model: its weights mean the same with them.
FREE_FIELDS = (
    "heads",  # others are dropped, or new
    "num_answers",
    "head_hidden_scale",
    "image_size",  # the position table is resized
    "max_text_len",
    "dropout",
    "mask_fused_query",
    "manager_noise",
    # of what is new
    "contrastive_size",
    "temperature",
    "initializer_range",
)


@checked
def load_tower(folder: str | Path, **overrides: Any) -> ManagerTower:
    """A checkpoint folder of ours -> ManagerTower; overrides are other values of FREE_FIELDS.

    What fits is kept. For another image size the position table is resized; NLVR2's third token
    type copies the second; a new rank head starts as the match row of the ITM head; heads of other
    tasks are dropped and new ones initialised, both of which is printed. Any other difference
    raises ValueError.
    """
    folder = find_folder(folder)
    stored_config = read_config(folder)
    config = dataclasses.replace(stored_config, **overrides)
    for name in overrides:
        before = getattr(stored_config, name)
        after = getattr(config, name)
        if name not in FREE_FIELDS and before != after:
            raise ValueError(
                f"--{name} is {show(after)}, but {folder} has {show(before)}: its weights mean "
                "nothing with another value"
            )
    # from the header alone: what does not fit is neither built nor read
    header = in_our_names(folder, read_header(folder), stored_config)
    refuse_more_layers(folder, config, header)
    with torch.device("meta"):
        fit_state(folder, header, ManagerTower(config))
    # the numbers
    model = ManagerTower(config)
    stored = in_our_names(folder, read_safetensors(folder), stored_config)
    state = fit_state(folder, stored, model)
    model.load_state_dict(state)
    dropped = sorted(stored_heads(stored) - set(model.heads))
    new = sorted(set(model.heads) - stored_heads(stored))
    if (dropped or new) and is_first_process():
        print(
            f"{folder}: heads dropped: {', '.join(dropped) or 'none'}; "
            f"heads initialised: {', '.join(new) or 'none'}"
        )
    return model


def in_our_names(folder: str | Path, state: State, config: ManagerTowerConfig) -> State:
    """The weights of a folder of ours; those that `prepare.py export` gave the authors' names get
    ours again.
    """
    if official_keys()["text_transform.weight"] not in state:
        return state
    with naming(folder):
        return from_official(state, config)


def fit_state(folder: str | Path, stored: State, model: ManagerTower) -> State:
    """The weights of a file, made to fit a model for another task. Meta tensors work too.

    Raises ValueError for what does not fit.
    """
    state = dict(stored)
    with naming(folder):
        refuse(bad_values(state))
        resize_positions(state, model.config)
    fit_type_embedding(state, model)
    if "retrieval" in model.heads:
        seed_rank_head(state)
    kept = stored_heads(state)
    state = without_heads(state, sorted(kept - set(model.heads)))
    add_new_heads(state, model, sorted(set(model.heads) - kept))
    # all that was to be changed is changed; from here on it is strict
    refuse_differences(folder, state, model)
    return state


def resize_positions(state: State, config: ManagerTowerConfig) -> None:
    key = "image_encoder.position_embedding"
    if key in state:
        grid = config.image_size // config.patch_size
        state[key] = resize_position_embedding(state[key], grid)


def fit_type_embedding(state: State, model: ManagerTower) -> None:
    """Two rows (text, image), and for NLVR2 a third one, which starts as a copy of the second."""
    types = state.get("type_embedding")
    if types is not None and types.dim() == 2:
        grown = torch.cat([types, types[1:2]])
        state["type_embedding"] = grown[: len(model.type_embedding)]


def seed_rank_head(state: State) -> None:
    """A rank head that is not in the file scores as the ITM head scores a match, its second row."""
    if "heads.retrieval.weight" in state:
        return
    for ending in ("weight", "bias"):
        itm = state.get(f"heads.itm.{ending}")
        if itm is not None and itm.dim() > 0:
            state[f"heads.retrieval.{ending}"] = itm[1:2]


def stored_heads(state: State) -> set[str]:
    """The names of the heads in a state of ours."""
    stored = set()
    for name in HEADS:
        if any(key.startswith(f"heads.{name}.") for key in state):
            stored.add(name)
    return stored


def without_heads(state: State, names: list[str]) -> State:
    prefixes = tuple(f"heads.{name}." for name in names)
    return {key: tensor for key, tensor in state.items() if not key.startswith(prefixes)}


def add_new_heads(state: State, model: ManagerTower, names: list[str]) -> None:
    """The model's own, freshly initialised weights of these heads."""
    prefixes = tuple(f"heads.{name}." for name in names)
    for key, tensor in model.state_dict().items():
        if key.startswith(prefixes):
            state[key] = tensor


def refuse_differences(folder: str | Path, state: State, model: nn.Module) -> None:
    """Raises ValueError unless a state has exactly the model's keys and shapes."""
    ours = {key: tuple(shape) for key, shape in shapes_of(model).items()}
    stored = {key: tuple(tensor.shape) for key, tensor in state.items()}
    differences = []
    for key in sorted(set(ours) | set(stored)):
        in_file = stored.get(key, "missing")
        in_model = ours.get(key, "missing")
        if in_file != in_model:
            differences.append(f"{key}: {in_file} in the file, {in_model} in the model")
    if differences:
        listed = shorten("; ".join(differences), 600)
        raise ValueError(f"{folder} does not fit the model. {listed}")


# ================================================================ 4. checkpoints, ready to be used
class Loaded(NamedTuple):
    """A checkpoint folder, ready to be used."""

    model: Any
    tokenizer: Any
    transform: Callable | None  # of pictures, as in evaluation; the MLLM has preprocess_image


def is_mllm(checkpoint: str | Path) -> bool:
    """Whether a checkpoint folder holds LLaVA-OV-Manager (ours or an official one) or ManagerTower.

    Raises ValueError if it holds neither.
    """
    folder = find_folder(checkpoint)
    values = read_config_values(folder) if (folder / "config.json").is_file() else {}
    if "model" not in values and not is_mllm_config(values):
        problem = "is no checkpoint folder of ours" if folder.exists() else "does not exist"
        raise ValueError(
            f"--checkpoint {checkpoint} {problem}; official ManagerTower weights become one by: "
            f"python prepare.py weights --source {checkpoint} --tokenizer ROBERTA --out FOLDER"
        )
    return is_mllm_config(values)


@checked
def load_two_tower(checkpoint: str | Path, head: str = "", device: str = "auto") -> Loaded:
    """A ManagerTower folder. Raises ValueError if it lacks the head that is needed."""
    checkpoint = find_folder(checkpoint, "checkpoint")
    if is_mllm(checkpoint):
        raise ValueError(
            f"{checkpoint} is a LLaVA-OV-Manager, for ask.py chat, figures.py managers and grid"
        )
    place = World(device).device
    config = read_config(checkpoint)
    if head and head not in config.heads:
        others = f", only {', '.join(config.heads)}" if config.heads else ": it has no heads"
        raise ValueError(f"{checkpoint} has no {head} head{others}")
    tokenizer = load_tokenizer(checkpoint)
    with naming(checkpoint):
        check_tokenizer(tokenizer, config.vocab_size, config.pad_token_id)
        transform = tower_transform(stored_transform(checkpoint), config, train=False)
    return Loaded(load_tower(checkpoint).to(place), tokenizer, transform)


def stored_transform(folder: str | Path) -> str:
    """What pictures went through in training, by config.json.

    Folders of the first edition do not say it. Then it is what the papers do: they pre-train with
    CLIP's centre crop, and fine-tune with squashed pictures.
    """
    values = read_config_values(folder)
    stored = values.get("transform")
    if stored:
        return str(stored)
    return "clip" if "mlm" in values.get("heads", ()) else "albef"


@checked
def load_mllm(
    checkpoint: str | Path, tokenizer: str | Path | None = None, device: str = "auto"
) -> Loaded:
    """A LLaVA-OV-Manager folder, in evaluation mode, and in bf16 on CUDA."""
    checkpoint = find_folder(checkpoint, "checkpoint")
    if not is_mllm(checkpoint):
        raise ValueError(
            f"{checkpoint} is not a LLaVA-OV-Manager; ask.py question, match, search and "
            "figures.py managers take it"
        )
    place = World(device).device
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    text_tokenizer = load_tokenizer(tokenizer or checkpoint)
    with naming(tokenizer or checkpoint):
        check_roles(text_tokenizer, CHAT_ROLES)
    if read_config_values(checkpoint).get("model") == "LlavaManager":
        model = load_llava(checkpoint, dtype)
    else:  # an official config does not say which token it is
        im_start_id = text_tokenizer.role_id(CHAT_ROLES[0])
        model = load_llava(checkpoint, dtype, im_start_id=im_start_id)
    with naming(tokenizer or checkpoint):
        check_tokenizer(
            text_tokenizer,
            model.config.vocab_size,
            roles=CHAT_ROLES,
            im_start_id=model.config.im_start_id,
        )
    return Loaded(model.to(place).eval(), text_tokenizer, None)


# ================================================================ 5. any file of weights
CONTAINERS = ("state_dict", "model", "module")  # under which training frameworks save the weights


def read_weights(source: str | Path) -> tuple[State, dict]:
    """(state, settings) of a .safetensors or PyTorch file, or of a HF folder.

    The settings are Lightning's hyper-parameters, HF's config.json, or empty. Wrappers of training
    frameworks are taken off: {"model": ...}, module. of DDP, and _orig_mod. of torch.compile.
    """
    source = Path(source)
    if not source.is_dir():
        state, settings = read_weights_file(source)
        file = config_beside(source)
        if file is not None:
            settings = read_json(file, dict)
        with naming(source):
            return unwrap(state), settings
    settings = {}
    if (source / "config.json").is_file():
        settings = read_json(source / "config.json", dict)
    state = {}
    for file, keys in files_of_folder(source).items():
        part, _ = read_weights_file(file)
        missing = sorted(set(keys) - set(part))
        if missing:
            listed = shorten(", ".join(missing), 250)
            raise ValueError(f"{file} lacks {listed}, which the index says it has")
        state.update(part)
    with naming(source):
        return unwrap(state), settings


def files_of_folder(folder: Path) -> dict[Path, list[str]]:
    """The files of weights that transformers would read, with the keys that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index_file = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return {folder / name: []}
        if index_file.is_file():
            return shards_of(index_file)
    # under any other name there must be only one
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(
            f"{folder} has neither model.safetensors nor pytorch_model.bin, nor an index of "
            f"them; of other .safetensors files it has {len(files)}"
        )
    return {files[0]: []}


def read_weights_file(file: Path) -> tuple[State, dict]:
    if file.suffix == ".safetensors" or not file.is_file():
        return read_safetensors(file), {}
    torch_file = TorchFile(file)
    tree = as_dict(torch_file.tree)
    # Lightning keeps what the model was built with, the authors' under one more key
    hyper_parameters = as_dict(tree.get("hyper_parameters"))
    hyper_parameters = as_dict(hyper_parameters.get("config", hyper_parameters))
    settings = {}
    for name, value in hyper_parameters.items():
        if isinstance(value, int | float | str):
            settings[name] = value
    return torch_file.tensors(find_state(tree)), settings


def find_state(tree: dict) -> dict:
    """The dict of weights inside what a training framework saved."""
    for name in CONTAINERS:
        inside = as_dict(tree.get(name))
        if inside:
            return inside
    return tree


def unwrap(state: State) -> State:
    """The keys without what DDP and torch.compile put before them."""
    names = {key: key.replace("_orig_mod.", "") for key in state}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {key: name.removeprefix("module.") for key, name in names.items()}
    unwrapped = {names[key]: tensor for key, tensor in state.items()}
    if len(unwrapped) < len(state):
        raise ValueError("some weights are there twice, with and without the prefix _orig_mod.")
    return unwrapped


# ================================================================ 6. official -> our folders
BRIDGETOWER = {  # how the keys of transformers' BridgeTower begin -> how the official ones do
    "vision_model.visual.embeddings.class_embedding": VISUAL + CLIP["class_embedding"],
    "vision_model.visual.embeddings.patch_embedding.weight": VISUAL + CLIP["patch.weight"],
    "vision_model.visual.embeddings.position_embedding.weight": VISUAL + CLIP["position_embedding"],
    "vision_model.": "vit_model.",
    "text_model.": TEXT,
    "itc_text_head.": "cross_modal_itc_text_head.",
    "itc_image_head.": "cross_modal_itc_image_head.",
}
BRIDGETOWER_MARK = r"(bridgetower\.)?vision_model\.visual\..*"
BRIDGETOWER_DEAD = (r".*(position|token_type)_ids", r"itc_cross_modal_head\..*")


# what its config.json may say of the whole, and of each part: ours computes with it
BRIDGETOWER_SUPPORTED: dict[str, dict[str, Any]] = {
    "": {
        "model_type": "bridgetower",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "link_tower_type": "add",
        "share_link_tower_layers": False,
        "share_cross_modal_transformer_layers": True,
    },
    "text_config": {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "position_embedding_type": "absolute",
        "is_decoder": False,
    },
    "vision_config": {
        "layer_norm_eps": 1e-5,
        "share_layernorm": True,
        "remove_last_layer": False,
    },
}
# what transformers takes for an absent key of its text_config
BRIDGETOWER_DEFAULTS = {"num_attention_heads": 12, "pad_token_id": 1}


def bridgetower_settings(settings: dict) -> dict:
    """The settings of a config.json, with those of the text encoder that it leaves out.

    Raises ValueError for one that says what our model does not compute with.
    """
    for name, supported in BRIDGETOWER_SUPPORTED.items():
        part = settings.get(name) if name else settings
        if part is None:
            continue
        if not isinstance(part, dict):
            raise ValueError(f"{name} of its config.json is {show(part)}; it must be an object")
        check_settings(part, supported, f"{name or 'the whole'} of its config.json:")
    if not settings:  # weights alone
        return settings
    said = {}
    for key, value in as_dict(settings.get("text_config")).items():
        if value is not None:  # null is an absent key
            said[key] = value
    return {**settings, "text_config": {**BRIDGETOWER_DEFAULTS, **said}}


def bridgetower_key(key: str) -> str:
    key = key.removeprefix("bridgetower.")
    for theirs, official in BRIDGETOWER.items():
        if key.startswith(theirs):
            return official + key.removeprefix(theirs)
    return key


def bridgetower_to_official(state: State) -> State:
    """transformers' BridgeTower -> the official layout, without its head on the fused features."""
    kept = {key: tensor for key, tensor in state.items() if not is_dead(key, BRIDGETOWER_DEAD)}
    refuse(bad_values(kept))
    official = {bridgetower_key(key): tensor.float() for key, tensor in kept.items()}
    keys = official_keys()
    decoder = keys["heads.mlm.decoder.weight"]
    words = keys["text_encoder.word_embedding.weight"]
    # tied in transformers, so possibly not stored
    if keys["heads.mlm.bias"] in official and words in official:
        official.setdefault(decoder, official[words])
    if "logit_scale" in official:
        scale = official.pop("logit_scale")
        official[keys["heads.itc.temperature"]] = (-scale).exp()
        fold_transform(official)
    return official


def fold_transform(official: State) -> None:
    """In transformers the image feature of ITC has passed the cross-modal transform and the type
    embedding. Both are linear, so they go into the linear head.
    """
    keys = official_keys()
    head_weight = keys["heads.itc.image.weight"]
    head_bias = keys["heads.itc.image.bias"]
    needed = {
        head_weight: 2,
        head_bias: 1,
        keys["image_transform.weight"]: 2,
        keys["image_transform.bias"]: 1,
        keys["type_embedding"]: 2,
    }
    for key, dimensions in needed.items():
        if key not in official or official[key].dim() != dimensions:
            return  # the import that follows names what is wrong
    weight = official[head_weight]
    try:
        shift = official[keys["image_transform.bias"]] + official[keys["type_embedding"]][1]
        official[head_bias] = official[head_bias] + weight @ shift
        official[head_weight] = weight @ official[keys["image_transform.weight"]]
    except (IndexError, RuntimeError) as error:
        shapes = [f"{key} is {tuple(official[key].shape)}" for key in needed]
        raise ValueError(f"wrong shape: {'; '.join(shapes)} do not go together") from error


# ---------------------------------------------------------------- the config of an official state
# field -> (our key, dimension) of the tensor whose size it is; the official key is in the tables
SIZES = {
    "vision_width": ("image_encoder.patch.weight", 0),
    "patch_size": ("image_encoder.patch.weight", 3),
    "vocab_size": ("text_encoder.word_embedding.weight", 0),
    "max_positions": ("text_encoder.position_embedding.weight", 0),
    "text_mlp_width": ("text_encoder.layers.0.fc.weight", 0),
    "text_width": ("text_transform.weight", 1),
    "hidden_size": ("text_transform.weight", 0),
    "num_answers": ("heads.vqa.fc_out.weight", 0),
    "contrastive_size": ("heads.itc.text.weight", 0),
}
# field -> our key of the first of the layers, or of the experts, whose number it is
COUNTS = {
    "vision_layers": "image_encoder.blocks.0.fc.weight",
    "text_layers": "text_encoder.layers.0.fc.weight",
    "num_layers": "text_layers.0.fc.weight",
    "managed_layers_text": "text_managers.0.scale",
    "managed_layers_image": "image_managers.0.scale",
}

# part of transformers' config.json -> the field of which it says the number of layers
LAYERS = {"": "num_layers", "text_config": "text_layers", "vision_config": "vision_layers"}


def infer_config(state: State, settings: dict) -> ManagerTowerConfig:
    """The config of a state in the official layout.

    Sizes and parts show in shapes and keys; what does not, numbers of attention heads for example,
    is in the settings or as usual. A missing key leaves the default: the import then names it.
    Raises ValueError for sizes that no model has.
    """
    values = dataclasses.asdict(ManagerTowerConfig())
    values["heads"] = infer_heads(state)
    keys = official_keys()
    for field, (our_key, dimension) in SIZES.items():
        values[field] = size_of(state, keys[our_key], dimension, values[field])
    for field, our_key in COUNTS.items():
        values[field] = count_numbers(state, keys[our_key]) or values[field]
    infer_derived_sizes(state, values)
    infer_fusion(state, values)
    check_layers(settings, values)
    infer_from_settings(settings, values)
    if values["vocab_size"] <= values["pad_token_id"]:
        key = keys["text_encoder.word_embedding.weight"]
        raise ValueError(f"wrong shape: {key} has no row for the padding token")
    return ManagerTowerConfig(**values)


def size_of(state: State, key: str, dimension: int, default: int) -> int:
    """The size of a dimension of a tensor; the default where it is missing."""
    if key not in state:
        return default
    shape = tuple(state[key].shape)
    if len(shape) <= dimension:
        raise ValueError(f"wrong shape: {key} is {shape}, should have more dimensions")
    return shape[dimension]


def count_numbers(state: State, key: str) -> int:
    """How many different numbers stand where a key has its last .0."""
    before, _, _ = key.rpartition(".0.")
    pattern = re.compile(re.escape(before) + r"\.(\d+)\.")
    numbers = set()
    for key in state:
        match = pattern.match(key)
        if match:
            numbers.add(match[1])
    return len(numbers)


def infer_heads(state: State) -> tuple[str, ...]:
    """The heads of which a key is there."""
    heads = []
    for head, names in HEAD_NAMES.items():
        keys = [row.theirs[0] for row in expand(names)]
        # every official state has a temperature, whether it has the ITC head or not
        if any(key in state for key in keys if key != ITC_HEAD["temperature"]):
            heads.append(head)
    return tuple(heads)


def infer_derived_sizes(state: State, values: dict[str, Any]) -> None:
    """The sizes that stand in shapes as multiples of others."""
    keys = official_keys()
    positions = size_of(state, keys["image_encoder.position_embedding"], 0, 0)
    if positions > 0:
        values["image_size"] = math.isqrt(positions - 1) * values["patch_size"]
    width = max(1, values["hidden_size"])
    mlp_width = size_of(state, keys["text_layers.0.fc.weight"], 0, 0)
    if mlp_width > 0:
        values["mlp_ratio"] = mlp_width // width
    for head in values["heads"]:
        if "fc.*" in HEAD_NAMES[head]:  # a classifier
            hidden = size_of(state, keys[f"heads.{head}.fc_out.weight"], 1, 0)
            values["head_hidden_scale"] = max(1, hidden // (2 * width))


def infer_fusion(state: State, values: dict[str, Any]) -> None:
    """Which managers the state has, if any."""
    keys = official_keys()
    scores = state.get(keys["text_managers.0.scores"])
    if scores is None:
        values["fusion"] = "bridge" if keys["text_bridges.0.weight"] in state else "last"
        return
    values["manager_weight"] = "scalar" if scores.shape[-1:] == (1,) else "vector"
    controller = ADAPTIVE["controller.*"].removesuffix("*")
    is_adaptive = any(controller in key for key in state)
    values["manager_type"] = "aaue" if is_adaptive else "saue"
    query = ADAPTIVE["q_proj.*"].removesuffix("*")
    if is_adaptive and not any(query in key for key in state):
        values["manager_query"] = "own"


def infer_from_settings(settings: dict, values: dict[str, Any]) -> None:
    """What no shape shows. Attention heads have 64 channels where nothing else is said."""
    # transformers builds BridgeTower's cross-modal layers from the text encoder's config as well
    text_settings = as_dict(settings.get("text_config"))
    text_heads = number_in(text_settings, "num_attention_heads", 0)
    values["vision_heads"] = max(1, values["vision_width"] // 64)
    values["text_heads"] = text_heads or max(1, values["text_width"] // 64)
    usual_heads = max(1, values["hidden_size"] // 64)
    values["num_heads"] = text_heads or number_in(settings, "num_heads", usual_heads)
    drop_rate = number_in(settings, "drop_rate", 0.1)
    values["dropout"] = number_in(text_settings, "hidden_dropout_prob", drop_rate)
    values["pad_token_id"] = number_in(text_settings, "pad_token_id", values["pad_token_id"])
    longest = values["max_positions"] - 1 - values["pad_token_id"]
    # of fewer than 3 positions the config says that no text fits
    values["max_text_len"] = max(3, min(number_in(settings, "max_text_len", 50), longest))


def check_layers(settings: dict, values: dict[str, Any]) -> None:
    """Raises ValueError for settings with other numbers of layers than the weights have: with some
    of them left out, transformers computes something else.
    """
    for name, field in LAYERS.items():
        part = as_dict(settings.get(name)) if name else settings
        layers = part.get("num_hidden_layers")
        if layers is not None and layers != values[field]:
            raise ValueError(
                f"num_hidden_layers of {name or 'the whole'} is {show(layers)}, but the weights "
                f"have {values[field]}"
            )


def number_in(settings: dict, name: str, default: float) -> Any:
    """A number of the settings; the default for none. Raises ValueError for a text."""
    value = settings.get(name)
    if value is None:
        return default
    if type(value) not in (int, float):
        raise ValueError(f"the setting {name} is {show(value)}; it must be a number")
    return value


# ---------------------------------------------------------------- the conversion
# how a key of an encoder ends -> the dimensions of its tensor, and the layouts that have it
ENCODER_MARKS: dict[str, tuple[int, tuple[Layout, ...]]] = {
    CLIP["class_embedding"]: (1, IMAGE_LAYOUTS),
    "embeddings.cls_token": (3, IMAGE_LAYOUTS),  # of HF's ViT, DeiT and DINOv2
    "patch_embed.proj.weight": (4, IMAGE_LAYOUTS),  # of timm's
    str(HF_SIGLIP["patch.bias"]): (1, (HF_SIGLIP_LAYOUT,)),
    str(ROBERTA["word_embedding.weight"]): (2, TEXT_LAYOUTS),
    "embed_tokens.weight": (2, (QWEN_LAYOUT,)),
}


ENCODERS = ("CLIP", "SigLIP", "ViT", "DeiT", "DINOv2", "RoBERTa", "BERT", "Qwen2")


@checked
def convert_weights(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    answers: list[str] | None = None,
) -> None:
    """Official weights -> a folder of ours; nothing in their files is executed.

    ManagerTower, BridgeTower, METER and HF's BridgeTower become a checkpoint folder, in float32;
    CLIP, SigLIP, ViT, DeiT, DINOv2, RoBERTa, BERT and Qwen2 a folder for --vision or --text, and
    LLaVA-OV-Manager one for --checkpoint, under their own names. The tokenizer, and the texts of a
    VQA model's answers, go along. Raises ValueError, with the source's name, for anything else.
    """
    out = Path(out)
    source = find_folder(source)
    state, settings = read_weights(source)
    text_tokenizer = load_tokenizer(tokenizer) if tokenizer else None
    with naming(source):
        if text_tokenizer:
            check_special_ids(text_tokenizer, settings, "its config.json")
        refuse_our_own(state)
        if any(re.fullmatch(BRIDGETOWER_MARK, key) for key in state):
            settings = bridgetower_settings(settings)
            state = bridgetower_to_official(state)
    if official_keys()["text_transform.weight"] in state:
        convert_tower(source, state, settings, out, answers)
    elif is_mllm_config(settings):
        with naming(source):
            convert_llava(state, settings, out)
    elif any(key.endswith(tuple(ENCODER_MARKS)) for key in state):
        with naming(source):
            check_marks(state)
            convert_encoder(source, state, settings, out)
    else:
        raise ValueError(
            f"{source} is no ManagerTower, BridgeTower, METER, {', '.join(ENCODERS)} or "
            f"LLaVA-OV-Manager: {describe_keys(state)}"
        )
    if text_tokenizer:
        text_tokenizer.save(out)


def convert_tower(
    source: str | Path, state: State, settings: dict, out: Path, answers: list[str] | None
) -> None:
    """A state in the official layout -> a checkpoint folder."""
    with naming(source):
        config = infer_config(state, settings)
        ours = from_official(state, config)
    if answers and len(answers) != config.num_answers:
        raise ValueError(
            f"--answers has {len(answers)} answers, but the model has {config.num_answers}"
        )
    save_folder({key: tensor.float() for key, tensor in ours.items()}, config, out)
    if answers:
        write_json(out / "answers.json", answers)
    print(f"{out}: {config}")


def describe_keys(state: State) -> str:
    """What a file holds, for a message."""
    if not state:
        return "it holds no tensor"
    return f"it has the keys {shorten(', '.join(sorted(state)), 200)}"


def check_marks(state: State) -> None:
    for key, tensor in state.items():
        for mark, (dimensions, _) in ENCODER_MARKS.items():
            if key.endswith(mark) and tensor.dim() != dimensions:
                raise ValueError(
                    f"wrong shape: {key} is {tuple(tensor.shape)}, should have {dimensions} "
                    "dimensions"
                )


def published_layout(state: State, settings: dict) -> tuple[Layout, str]:
    """The layout of an encoder that has one of ENCODER_MARKS, and what its keys begin with."""
    layouts: tuple[Layout, ...] = ()
    for mark, (_, layouts_with_mark) in ENCODER_MARKS.items():
        if any(key.endswith(mark) for key in state):
            layouts = layouts_with_mark
    return find_layout(state, layouts, Settings(None, settings))


def unknown_keys(state: State, layout: Layout, prefix: str) -> list[str]:
    """The keys that no encoder of this layout has, whatever its number of layers."""
    patterns = list(layout.dead)
    for row in layout.rows(prefix, 1):
        for name in row.theirs:
            patterns.append(re.escape(name).replace(r"\.0\.", r"\.\d+\."))
    return [key for key in state if not is_dead(key, tuple(patterns))]


def convert_encoder(source: str | Path, state: State, settings: dict, out: Path) -> None:
    """An encoder under its own names; `load_unimodal` reads it, and the files beside it."""
    visual = {key: tensor for key, tensor in state.items() if key.startswith("visual.")}
    if visual:  # CLIP's text encoder is not used
        state = visual
    refuse_distilled(state)
    state = with_new_names(state)
    layout, prefix = published_layout(state, settings)
    if layout is QWEN_LAYOUT:
        state = whole_language_model(state)
    unknown = unknown_keys(state, layout, prefix)
    if unknown:
        raise ValueError(
            f"it is no {', '.join(ENCODERS[:-1])} or {ENCODERS[-1]}, as it has the keys "
            f"{shorten(', '.join(unknown), 200)}"
        )
    # a config.json of transformers, or of timm
    published = settings if {"model_type", "architecture"} & settings.keys() else {}
    write_published(state, published, out, "an encoder, for --vision or --text")
    preprocessing = file_beside(source, PREPROCESSING_FILE)
    if preprocessing:
        write_json(out / PREPROCESSING_FILE, read_json(preprocessing, dict))


def convert_llava(state: State, settings: dict, out: Path) -> None:
    """An official LLaVA-OV-Manager; `load_llava` reads it, and compares it with its config.json."""
    check_kind(settings, QWEN_KINDS)
    refuse(bad_values(state))
    write_published(state, settings, out, "a LLaVA-OV-Manager, for --checkpoint")


def write_published(state: State, settings: dict, out: Path, what: str) -> None:
    """Weights as they are, and their config.json, if they have one."""
    out.mkdir(parents=True, exist_ok=True)
    if settings:
        write_json(out / "config.json", settings)
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    write_atomically(out / "model.safetensors", lambda path: save_file(state, path))
    print(f"{out / 'model.safetensors'}: {len(state)} tensors of {what}")
