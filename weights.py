"""weights.py"""
from pathlib import Path
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save_file
from torch import Tensor
from torch import nn
from torch.nn import functional as F
import dataclasses
import json
import math
import os
import pickle
import re
import textwrap
import torch
import zipfile
from files import VERSION, read_json, write_atomically, write_json, write_text
from images import image_transform
from llava_manager import LlavaManager, LlavaManagerConfig
from model import ManagerTower, ManagerTowerConfig
from tokenizer import load_tokenizer
from world import World
from typing import Any, Callable, NamedTuple


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


CROSS_LAYER = {"q.*": "crossattention.self.query.*", "kv.*": "crossattention.self.key.* crossattention.self.value.*",
         "cross_proj.*": "crossattention.output.dense.*", "ln_2.*": "crossattention.output.LayerNorm.*", **BERT}


def tower_table(config: ManagerTowerConfig) -> list:
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
            rows += expand(CROSS_LAYER, f"{m}_layers.{i}.", f"cross_modal_{m}_layers.{i}.")
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


def tower_from_official(state_dict: dict, config: ManagerTowerConfig) -> dict:
    """An official ManagerTower, BridgeTower or METER state -> ours, strictly; import_state raises the errors.
    Load it with `model.load_state_dict(state, strict=True, assign=True)`."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in ManagerTower(config).state_dict().items()}
    dropped = DEAD_KEYS if "itc" in config.heads else (*DEAD_KEYS, "temperature")
    return import_state(state_dict, tower_table(config), shapes, dropped)


def tower_to_official(state_dict: dict, config: ManagerTowerConfig) -> dict:
    """Ours -> official names: every key that the official model uses. Also for gradients by our parameter names."""
    return export_state(state_dict, tower_table(config))


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


def load_tower_encoders(model: ManagerTower, vision, text) -> None:
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


QWEN = {  # HF's Qwen2ForCausalLM, also inside the official states
    "embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
    "layers.{}.norm_1.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.q.*": "model.layers.{}.self_attn.q_proj.*",
    "layers.{}.kv.*": "model.layers.{}.self_attn.k_proj.* model.layers.{}.self_attn.v_proj.*",
    "layers.{}.proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.norm_2.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.gate_up.weight": "model.layers.{}.mlp.gate_proj.weight model.layers.{}.mlp.up_proj.weight",
    "layers.{}.down.weight": "model.layers.{}.mlp.down_proj.weight"}


CROSS_QUERY = {"q_proj.*": "fusion_attention.q_proj.*", "k_proj.*": "fusion_attention.k_proj.*"}


def qwen_table(config: LlavaManagerConfig, ours: str) -> list:
    head = {} if config.tie_embeddings else {"head.weight": "lm_head.weight"}
    return expand(QWEN | head, ours, layers=config.num_layers)


def llava_table(config: LlavaManagerConfig, newline: bool) -> list:
    """The layout of LLaVA-OV-Manager and LLaVA-OneVision states."""
    names = {"projector.0.*": "mm_projector.0.*", "projector.2.*": "mm_projector.2.*"}
    names |= {"image_newline": "image_newline"} if newline else {}
    names |= {"layer_embedding": "manager_layer_embedding"} if config.manager_type else {}
    rows = qwen_table(config, "llm.") + expand(names, theirs="model.")
    tower = "model.vision_tower.vision_tower.vision_model."
    rows += hf_vision_table(config.vision_layers - 1, "vision.", tower, siglip=True)
    for k, layer in enumerate(config.inject_layers if config.manager_type else ()):
        prefixes = f"managers.{k}.", f"model.manager.{k}."
        if config.is_static(layer):
            rows += expand({"scores": "layer_scores"}, *prefixes, how="scores")
        else:
            cross = CROSS_QUERY if config.manager_type == "adaptive_cross" else {}
            rows += expand({"gate": "zero_gate"}, *prefixes, how="scores")
            rows += expand({"controller.weight": "linear_controller.weight", **cross}, *prefixes)
    return rows


def drop_tied_head(state: dict, config: LlavaManagerConfig) -> dict:
    """Without the lm_head that repeats the embedding; one that differs is no tied model's: ValueError."""
    head, embedding = state.get("lm_head.weight"), state.get("model.embed_tokens.weight")
    if not config.tie_embeddings or head is None or embedding is None:
        return state
    if head.shape != embedding.shape or not (head.is_meta or torch.equal(head, embedding)):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight, but the config ties the two")
    return {k: v for k, v in state.items() if k != "lm_head.weight"}


def llava_from_official(state_dict: dict, config: LlavaManagerConfig) -> dict:
    """An official state -> ours, strictly (errors as in model.import_state); meta tensors work too. A state without
    image_newline, as stage 1 writes it, gets zeros. Load it with `load_state_dict(state, strict=True, assign=True)`."""
    state = drop_tied_head(state_dict, config)
    newline = "model.image_newline" in state
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlavaManager(config).state_dict().items()}
    dead = (r".*\.position_ids", r".*rotary_emb\.inv_freq")  # buffers that old versions of transformers wrote
    ours = import_state(state, llava_table(config, newline), shapes, dead)
    return ours if newline else {**ours, "image_newline": ours["llm.norm.weight"].new_zeros(config.hidden_size)}


def llava_to_official(state_dict: dict, config: LlavaManagerConfig) -> dict:
    """Ours -> official names, without image_newline for flat merging. Also for gradients under our parameter names."""
    return export_state(state_dict, llava_table(config, config.merge != "flat"))


def read_shards(path) -> dict:
    """A .safetensors file, or a folder's: model.safetensors, or the shards that its index names."""
    index = Path(path) / "model.safetensors.index.json"
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    return {k: v for name in shards for k, v in read_safetensors(index.parent / name).items()} or read_safetensors(path)


def load_llava_encoders(model: LlavaManager, vision, language) -> None:
    """Fill SigLIP and the LLM from HF's SiglipModel or SiglipVisionModel and Qwen2ForCausalLM: folders or files.
    SigLIP's last layer, pooling head and text encoder are dropped. ValueError for a missing, unknown, misshapen key."""
    state, layers = read_shards(vision), len(model.vision.blocks)
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in state) else ""
    last = rf"{prefix}(encoder\.layers\.{layers}|head)\..*"
    load_encoder(model.vision, state, hf_vision_table(layers, "", prefix, siglip=True),
                 (last, r"text_model\..*", r"logit_\w+", r".*position_ids"), vision)
    state = drop_tied_head(read_shards(language), model.config)
    load_encoder(model.llm, state, qwen_table(model.config, ""), (r".*rotary_emb\.inv_freq",), language)


def save_folder(state: dict, config: Any, folder: str | Path, transform: str | None = None) -> None:
    """state -> folder/model.safetensors and the config dataclass -> folder/config.json, each written atomically.

    transform: what pictures went through in training, for whoever evaluates the model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    values = {"model": type(config).__name__.removesuffix("Config"), "version": VERSION}
    if transform:
        values["transform"] = transform
    write_text(folder / "config.json", json.dumps({**values, **dataclasses.asdict(config)}, indent=1) + "\n")
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
    values.pop("version", None)
    values.pop("transform", None)
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(kind)})
    if f"{name}Config" != kind.__name__ or unknown:
        raise ValueError(f"{file} is not the config of a {kind.__name__.removesuffix('Config')}: "
                         f"model {name!r}, unknown fields {unknown}")
    return kind(**values)


def load_tower(folder, **overrides) -> ManagerTower:
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


def load_llava(folder, dtype: torch.dtype = torch.float32, **official) -> LlavaManager:
    """A checkpoint folder, ours or an official one (config.json; safetensors, sharded or not) -> model, on the CPU.
    official: `vision` and `im_start_id` of LlavaManagerConfig.from_official."""
    file = Path(folder) / "config.json"
    if file.is_file() and '"model_type"' in file.read_text():
        config = LlavaManagerConfig.from_official(json.loads(file.read_text()), **official)
        state = llava_from_official(read_shards(folder), config)
    else:
        config, state = read_config(folder, LlavaManagerConfig), read_safetensors(folder)
    with torch.device("meta"):
        model = LlavaManager(config)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    state = import_state(state, [(k, [k], "cat") for k in shapes], shapes)
    model.load_state_dict({k: v.to(dtype) for k, v in state.items()}, strict=True, assign=True)
    return model


def is_mllm(checkpoint: str) -> bool:
    """Whether a checkpoint folder holds LLaVA-OV-Manager (ours or an official one) and not a two-tower model."""
    text = file.read_text() if (file := Path(checkpoint) / "config.json").is_file() else ""
    if '"model"' not in text and '"mm_projector_type"' not in text:
        what = "is no checkpoint folder of ours" if Path(checkpoint).exists() else "does not exist"
        raise ValueError(f"--checkpoint {checkpoint} {what}; official ManagerTower weights become one by: "
                         f"python prepare.py weights --source {checkpoint} --tokenizer ROBERTA --out FOLDER")
    return '"LlavaManager"' in text or '"mm_projector_type"' in text


class Loaded(NamedTuple):
    """A checkpoint folder, ready to be used."""

    model: Any
    tokenizer: Any
    transform: Callable | None  # of pictures, as in evaluation; None for the MLLM, see multigrid.preprocess_image


def load_two_tower(checkpoint: str, head: str = "", device: str = "auto") -> Loaded:
    """(model, tokenizer, image transform) of a ManagerTower folder; ValueError if it lacks the head that is needed."""
    if is_mllm(checkpoint):
        raise ValueError(f"{checkpoint} is a LLaVA-OV-Manager, for ask.py chat, figures.py managers and grid")
    model = load_tower(checkpoint).to(World(device).device)
    if head and head not in model.heads:
        raise ValueError(f"{checkpoint} has no {head} head, only {', '.join(model.heads)}")
    transform = image_transform(stored_transform(checkpoint), model.config.image_size, False)
    return Loaded(model, load_tokenizer(checkpoint), transform)


def stored_transform(folder: str | Path) -> str:
    """What pictures went through in training, by config.json. Folders of the first edition do not say it.

    Then it is what the papers do: they pre-train with CLIP's centre crop and fine-tune with squashed pictures.
    """
    values = read_json(Path(folder) / "config.json", dict)
    return values.get("transform") or ("clip" if "mlm" in values.get("heads", ()) else "albef")


def load_mllm(checkpoint: str, tokenizer: str = "", device: str = "auto") -> Loaded:
    """(model, tokenizer) of a LLaVA-OV-Manager folder, in bf16 on CUDA."""
    if not is_mllm(checkpoint):
        raise ValueError(f"{checkpoint} is not a LLaVA-OV-Manager; ask.py question, match, search and figures.py managers take it")
    device = World(device).device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_llava(checkpoint, dtype).to(device).eval()
    return Loaded(model, load_tokenizer(tokenizer or checkpoint), None)


class Inert(dict):
    """What a pickle's globals and their instances become: it takes every call, state and item, and does nothing."""
    name, args, state, __hash__ = "", (), None, object.__hash__

    def __init__(self, *args, **kwargs):
        self.args = args

    def __setstate__(self, state):
        self.state = state

    def __call__(self, *args, **kwargs):
        return Inert()

    append = extend = add = __call__


def as_dict(value) -> dict:
    return value if isinstance(value, dict) else {}


class InertUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return type("Inert", (Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid):
        return pid  # ("storage", class, key, device, length)


STORAGES = {"Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64,
            "Long": torch.int64, "Int": torch.int32, "Byte": torch.uint8, "Bool": torch.bool}


BROKEN = (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, LookupError, ValueError, TypeError, AttributeError,
          RuntimeError, MemoryError, OverflowError)  # what a damaged or hostile file raises


class TorchFile:
    """A zip file of torch.save or torch.jit.save: its pickle as a `tree` of Inert records, and tensors on request."""

    def __init__(self, path: Path):
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is no zip archive: broken, or from before PyTorch 1.6; then: python -c "
                             f"\"import torch; torch.save(torch.load('{path}', weights_only=True), 'new.pt')\"")
        self.path, self.zip, self.storages = path, zipfile.ZipFile(path), {}
        try:
            pkl = min((n for n in self.zip.namelist() if n.split("/")[-1] == "data.pkl"), key=len)
            self.folder, self.tree = pkl.removesuffix("data.pkl"), InertUnpickler(self.zip.open(pkl)).load()
        except BROKEN as error:
            raise ValueError(f"{path} is not a readable PyTorch file: {error!r}") from error

    def tensor(self, node) -> torch.Tensor | None:
        """The tensor that a recorded call would make; None for anything else."""
        call = getattr(node, "name", "")
        if call in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return self.tensor(node.args[0])
        if call != "torch._utils._rebuild_tensor_v2":
            return None
        (_, kind, key, *_), offset, size, stride = node.args[:4]
        if key not in self.storages:
            content = bytearray(self.zip.read(f"{self.folder}data/{key}"))
            content = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
            self.storages[key] = content.view(STORAGES[kind.name.removeprefix("torch.").removesuffix("Storage")])
        if math.prod(size) > self.storages[key].numel():
            raise ValueError(f"shape {size} is larger than its storage")
        return self.storages[key].as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)

    def tensors(self, tree) -> dict[str, torch.Tensor]:
        """{dotted name: tensor} of nested dicts and TorchScript modules, each container once."""
        found, seen, todo = {}, set(), [("", tree)]
        for name, node in todo:  # it grows meanwhile
            try:
                tensor = self.tensor(node)
            except BROKEN as error:
                raise ValueError(f"{self.path}: tensor {name!r} cannot be read: {error!r}") from error
            if tensor is not None:
                found[name] = tensor
            elif id(node) not in seen:
                seen.add(id(node))
                items = {**node, **as_dict(getattr(node, "state", None))}.items()
                todo += [(f"{name}.{key}".lstrip("."), value) for key, value in items if isinstance(value, dict)]
        return found


def read_weights(source: Path) -> tuple[dict, dict]:
    """(state, settings) of a file or a HF folder; settings: Lightning's hyper-parameters, HF's config.json or empty."""
    if source.is_dir():
        files = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
        if not files:
            raise ValueError(f"{source} has neither .safetensors files nor pytorch_model.bin")
        settings = read_json(source / "config.json") if (source / "config.json").is_file() else {}
        return {k: v for file in files for k, v in read_weights(file)[0].items()}, settings
    if source.suffix == ".safetensors" or not source.is_file():
        return read_safetensors(source), {}
    file = TorchFile(source)
    tree = as_dict(file.tree)
    settings = as_dict(tree.get("hyper_parameters"))
    plain = {k: v for k, v in as_dict(settings.get("config", settings)).items() if isinstance(v, (int, float, str))}
    return file.tensors(as_dict(tree.get("state_dict", tree))), plain


V, T, X, M = "vit_model.visual.", "text_transformer.", "cross_modal_text_", "manager_tower.0.manager_layer."


HF_NAMES = {r"bridgetower\.": "", r"vision_model\.visual\.embeddings\.class_embedding": f"{V}class_embedding",
            r"vision_model\.visual\.embeddings\.patch_embedding\.": f"{V}conv1.", r"vision_model\.": "vit_model.",
            r"vit_model\.visual\.embeddings\.position_embedding\.weight": f"{V}positional_embedding",
            r"text_model\.": T, r"itc_(text|image)_head\.": r"cross_modal_itc_\1_head."}


HEAD_SHAPES = {"mlm": "mlm_score.bias", "itm": "itm_score.fc.weight", "itc": "cross_modal_itc_text_head.fc.weight",
             "vqa": "vqa_classifier.3.weight", "nlvr2": "nlvr2_classifier.3.weight",
             "snli_ve": "snli_classifier.3.weight", "retrieval": "rank_output.weight"}


SIZE_KEYS = [("vision_width", f"{V}conv1.weight", 0), ("patch_size", f"{V}conv1.weight", 3),
         ("image_size", f"{V}positional_embedding", 0), ("vocab_size", f"{T}embeddings.word_embeddings.weight", 0),
         ("max_positions", f"{T}embeddings.position_embeddings.weight", 0),
         ("text_mlp_width", f"{T}encoder.layer.0.intermediate.dense.weight", 0),
         ("text_width", f"{X}transform.weight", 1), ("hidden_size", f"{X}transform.weight", 0),
         ("mlp_ratio", f"{X}layers.0.intermediate.dense.weight", 0), ("num_answers", HEAD_SHAPES["vqa"], 0),
         ("contrastive_size", HEAD_SHAPES["itc"], 0),
         *(("head_hidden_scale", HEAD_SHAPES[head], 1) for head in ("vqa", "nlvr2", "snli_ve"))]


COUNTS = {"vision_layers": V + r"transformer\.resblocks\.\d+", "text_layers": T + r"encoder\.layer\.\d+",
          "num_layers": X + r"layers\.\d+", "managed_layers_text": X + M + r"LayerNorm\.\d+",
          "managed_layers_image": "cross_modal_image_" + M + r"LayerNorm\.\d+"}


def bridgetower_to_official(state: dict) -> dict:
    """transformers' BridgeTower layout -> the official one, less its contrastive head on the fused features."""
    official = {}
    for key, tensor in state.items():
        if not re.search(r"(position|token_type)_ids$|^itc_cross_modal_head\.", key):
            for pattern, name in HF_NAMES.items():
                key = re.sub(f"^{pattern}", name, key)
            official[key] = tensor
    if "mlm_score.bias" in official:  # tied in transformers, so possibly not stored
        official.setdefault("mlm_score.decoder.weight", official[f"{T}embeddings.word_embeddings.weight"])
    if "logit_scale" in official:
        official["temperature"] = (-official.pop("logit_scale")).exp()
        # its image feature has passed the cross-modal transform and the type embedding: fold both into the linear head
        head, transform = "cross_modal_itc_image_head.fc.", "cross_modal_image_transform."
        shift = official[transform + "bias"] + official["token_type_embeddings.weight"][1]
        official[head + "bias"] = official[head + "bias"] + official[head + "weight"] @ shift
        official[head + "weight"] = official[head + "weight"] @ official[transform + "weight"]
    return official


def infer_config(state: dict, settings: dict) -> ManagerTowerConfig:
    """The config of a state in the official layout: from shapes and keys, and from the settings what no shape shows."""
    config = dataclasses.asdict(ManagerTowerConfig())  # an absent key leaves the default, and from_official names it
    found = {field: state[key].shape[dim] for field, key, dim in SIZE_KEYS if key in state}
    counts = {field: len({m[0] for key in state if (m := re.match(pattern, key))}) for field, pattern in COUNTS.items()}
    config |= found | {field: count for field, count in counts.items() if count}
    config["image_size"] = math.isqrt(config["image_size"] - 1) * config["patch_size"]
    config["mlp_ratio"] //= config["hidden_size"]
    config["heads"] = tuple(head for head, key in HEAD_SHAPES.items() if key in state)
    config["head_hidden_scale"] = max(1, config["head_hidden_scale"] // (2 * config["hidden_size"]))
    scores = state.get(X + M + "layer_scores")
    if scores is None:
        config["fusion"] = "bridge" if f"{X}layernorm.weight" in state else "last"
    else:
        config["manager_weight"] = "scalar" if scores.shape[-1] == 1 else "vector"
        config["manager_type"] = "aaue" if any("linear_controller" in key for key in state) else "saue"
    text = settings.get("text_config", {})  # transformers builds its cross-modal layers from it as well
    heads = text.get("num_attention_heads")
    config["vision_heads"] = max(1, config["vision_width"] // 64)
    config["text_heads"] = heads or max(1, config["text_width"] // 64)
    config["num_heads"] = heads or settings.get("num_heads", max(1, config["hidden_size"] // 64))
    config["dropout"] = text.get("hidden_dropout_prob", settings.get("drop_rate", 0.1))
    config["max_text_len"] = min(settings.get("max_text_len", 50), config["max_positions"] - 2)
    return ManagerTowerConfig(**config)


def convert_weights(source: Path, out: Path, tokenizer: Path | None = None, answers: list[str] | None = None) -> None:
    """Official ManagerTower, BridgeTower, METER or HF BridgeTower -> our folder; CLIP, RoBERTa -> model.safetensors."""
    state, settings = read_weights(source)
    if any(re.match(r"(bridgetower\.)?vision_model\.visual\.", key) for key in state):
        state = bridgetower_to_official({key: tensor.float() for key, tensor in state.items()})
    if f"{X}transform.weight" in state:
        config, vocabulary = infer_config(state, settings), answers or []
        if answers and len(vocabulary) != config.num_answers:
            raise ValueError(f"--answers has {len(vocabulary)} answers, but the model has {config.num_answers}")
        save_folder({k: v.float() for k, v in tower_from_official(state, config).items()}, config, out)
        if answers:
            write_json(out / "answers.json", vocabulary)
        print(f"{out}: {config}")
    elif any(re.search(r"(^|\.)(class_embedding|word_embeddings\.weight)$", key) for key in state):
        state = {k: v for k, v in state.items() if k.startswith("visual.")} or state  # CLIP's text encoder is not used
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "model.safetensors", lambda path: save_file(state, path))
        print(f"{out / 'model.safetensors'}: {len(state)} tensors of an encoder, for --vision or --text")
    else:
        raise ValueError(f"{source} is no ManagerTower, BridgeTower, METER, CLIP or RoBERTa: {list(state)[:4]} ...")
    if tokenizer:
        load_tokenizer(tokenizer).save(out)


# ---------------------------------------------------------------- both families
def from_official(state_dict: dict, config: ManagerTowerConfig | LlavaManagerConfig) -> dict:
    """An official state -> ours."""
    if isinstance(config, LlavaManagerConfig):
        return llava_from_official(state_dict, config)
    return tower_from_official(state_dict, config)


def to_official(state_dict: dict, config: ManagerTowerConfig | LlavaManagerConfig) -> dict:
    """Ours -> official names."""
    if isinstance(config, LlavaManagerConfig):
        return llava_to_official(state_dict, config)
    return tower_to_official(state_dict, config)


def load_unimodal(model: ManagerTower | LlavaManager, vision: str | Path, text: str | Path) -> None:
    """Fill both encoders from pre-trained ones."""
    if isinstance(model, LlavaManager):
        load_llava_encoders(model, vision, text)
    else:
        load_tower_encoders(model, vision, text)


def load_model(folder: str | Path, **overrides: Any) -> Any:
    """A checkpoint folder -> model."""
    file = Path(folder) / "config.json"
    text = file.read_text() if file.is_file() else ""
    if '"LlavaManager"' in text or '"mm_projector_type"' in text:
        return load_llava(folder, **overrides)
    return load_tower(folder, **overrides)
