"""Exports: a checkpoint of ours in the layouts that other programs read, with a model card.

`official` is the authors' layout: LLaVA-OV-Manager's config.json and keys, and the keys of
ManagerTower, BridgeTower and METER beside our config.json. `load_model` reads both, too.
`transformers` is that library's, where it has such a class: BridgeTower (--fusion bridge),
LlavaOnevision (--manager_type none), and the encoders alone. It is not needed to write it.

    python prepare.py export --checkpoint F --out G --format official
    python prepare.py export --checkpoint F --out G --format transformers [--part vision]

The tables of keys are those of weights.py, read from right to left.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from fields import show
from files import VERSION, read_json, read_log, write_atomically, write_json, write_text
from hub import find_folder
from llava_manager import (
    LAYER_RANGES,
    OFFICIAL_FIELDS,
    OPTIONAL_FIELDS,
    SIGLIP_SUPPORTED,
    VISION_FIELDS,
    LlavaManagerConfig,
    layer_range_keys,
)
from model import ManagerTowerConfig
from tokenizer import Tokenizer, load_tokenizer
from weights import (
    ACTIVATION_NAMES,
    BRIDGETOWER,
    HF_CLIP,
    HF_SIGLIP,
    PREPROCESSING_FILE,
    PREPROCESSING_SUPPORTED,
    ROBERTA,
    SIGLIP_PREFIX,
    State,
    expand,
    export_state,
    is_mllm,
    load_llava,
    load_tower,
    qwen_names,
    read_headers,
    stored_transform,
    to_official,
)

MOST_BYTES_OF_A_SHARD = 5 * 10**9
FORMATS = ("official", "transformers")
PARTS = ("", "vision", "text")


class Export(NamedTuple):
    """What is written: weights, config.json, and how the model card says to load them."""

    state: State
    config: dict[str, Any]
    usage: str  # lines of Python
    pictures: dict[str, Any] = {}  # what a preprocessor_config.json says


# ---------------------------------------------------------------- the authors' layouts
def official_export(model: Any, transform: str) -> Export:
    """A whole model under the authors' names."""
    state = to_official(model.state_dict(), model.config)
    usage = 'from weights import load_model\n\nmodel = load_model("{out}")'
    if isinstance(model.config, LlavaManagerConfig):
        return Export(state, official_llava_config(model.config), usage)
    # the authors publish no config.json: it is that of a folder of ours
    values = {"model": "ManagerTower", "version": VERSION, "transform": transform}
    return Export(state, values | dataclasses.asdict(model.config), usage)


def siglip_config(config: LlavaManagerConfig) -> dict[str, Any]:
    """SigLIP as transformers describes it. vision_layers counts the last layer, which is neither
    used nor stored.
    """
    values = {theirs: getattr(config, ours) for ours, theirs in VISION_FIELDS.items()}
    settings = {key: value for key, value in SIGLIP_SUPPORTED.items() if value is not None}
    return {"model_type": "siglip_vision_model", **values, **settings}


def qwen_config(config: LlavaManagerConfig) -> dict[str, Any]:
    """Qwen2 as transformers describes it."""
    values: dict[str, Any] = {
        theirs: getattr(config, ours) for ours, theirs in OFFICIAL_FIELDS.items()
    }
    values["rope_theta"] = config.rope_theta
    values["tie_word_embeddings"] = config.tie_embeddings
    values["eos_token_id"] = list(config.eos_ids) or None
    values["hidden_act"] = "silu"
    values["max_position_embeddings"] = max(32768, config.max_length)  # the former is Qwen2's
    values["use_sliding_window"] = False
    return {"model_type": "qwen2", **values}


def official_llava_config(config: LlavaManagerConfig) -> dict[str, Any]:
    """The config.json of LLaVA-OV-Manager, or of LLaVA-OneVision; the inverse of
    `LlavaManagerConfig.from_official`. Its SigLIP, which they name only, is written in full.
    """
    has_managers = config.manager_type is not None
    values = qwen_config(config)
    values["model_type"] = "llava_qwen_manager" if has_managers else "llava_qwen"
    for ours, theirs in OPTIONAL_FIELDS.items():
        values[theirs] = getattr(config, ours)
    values |= {
        "tokenizer_padding_side": "right",
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_hidden_size": config.vision_width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "vision_config": siglip_config(config),
    }
    return values | official_manager_config(config) if has_managers else values


def official_manager_config(config: LlavaManagerConfig) -> dict[str, Any]:
    """The mm_manager_... keys. Raises ValueError for layers that they cannot say."""
    grids = {"all": "all", "base": "main", "grids": "grid"}
    values: dict[str, Any] = {
        "mm_manager_type": f"{config.manager_type}_zerouni",
        "mm_manager_grid_type": grids[config.managed_grids],
        "mm_manager_residual": True,
        "mm_manager_softmax_temperature": 1.0,
    }
    for name in LAYER_RANGES:
        layers = getattr(config, name)
        start_key, end_key, interval_key = layer_range_keys(name)
        interval = layers[1] - layers[0] if len(layers) > 1 else 1
        evenly = tuple(range(layers[0], layers[-1] + 1, interval))
        if evenly != tuple(layers):
            raise ValueError(
                f"{name} is {show(layers)}; the official config.json can only say layers at even "
                "distances"
            )
        values[start_key] = layers[0]
        values[end_key] = layers[-1] + 1
        values[interval_key] = interval
    return values


# ---------------------------------------------------------------- transformers: two towers
def bridgetower_export(model: Any) -> Export:
    """transformers' BridgeTower. Raises ValueError for what it has no place for."""
    config = model.config
    refuse_for_bridgetower(config)
    official = to_official(model.state_dict(), config)
    state = {transformers_bridgetower_key(key): tensor for key, tensor in official.items()}
    # it has a pooler of the text encoder, and no use for it
    width = config.text_width
    pooler = "bridgetower.text_model.pooler.dense."
    state |= {f"{pooler}weight": torch.zeros(width, width), f"{pooler}bias": torch.zeros(width)}
    classes = {
        "mlm": "BridgeTowerForMaskedLM",
        "itm": "BridgeTowerForImageAndTextRetrieval",
    }
    names = [classes[head] for head in config.heads] or ["BridgeTowerModel"]
    text = {
        **roberta_config(config),
        "model_type": "bridgetower_text_model",
        # transformers builds the cross-modal layers from this one as well
        "hidden_dropout_prob": config.dropout,
    }
    values = {
        "model_type": "bridgetower",
        "architectures": names[:1],
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "link_tower_type": "add",
        "share_link_tower_layers": False,
        "share_cross_modal_transformer_layers": True,
        # both have weights of their own, as in the official code
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {
            "model_type": "bridgetower_vision_model",
            "hidden_size": config.vision_width,
            "num_hidden_layers": config.vision_layers,
            "patch_size": config.patch_size,
            "image_size": config.image_size,
            "share_layernorm": True,
            "remove_last_layer": False,
        },
    }
    return Export(state, values, transformers_usage(names))


def refuse_for_bridgetower(config: ManagerTowerConfig) -> None:
    """Raises ValueError, with what is in the way."""
    other = "--format official takes it, and --part exports an encoder alone"
    if config.fusion != "bridge":
        raise ValueError(
            f"transformers has no class for --fusion {config.fusion}, only for bridge: {other}"
        )
    for head in config.heads:
        if head not in ("mlm", "itm"):
            raise ValueError(
                f"transformers' BridgeTower has no place for the {head} head of this model: {other}"
            )
    # its cross-modal layers have the sizes of its text encoder, and its image encoder's are fixed
    fixed = {
        "text_width": config.hidden_size,
        "text_heads": config.num_heads,
        "text_mlp_width": config.mlp_ratio * config.hidden_size,
        "vision_heads": config.vision_width // 64,
    }
    for name, theirs in fixed.items():
        ours = getattr(config, name)
        if ours != theirs:
            raise ValueError(
                f"transformers' BridgeTower of these sizes has {name} {theirs}, but this model has "
                f"{ours}: {other}"
            )


def transformers_bridgetower_key(key: str) -> str:
    """An official key -> that of transformers' BridgeTower with a head."""
    if key.startswith(("mlm_score.", "itm_score.")):
        return key
    for theirs, official in BRIDGETOWER.items():
        if key.startswith(official):
            return f"bridgetower.{theirs}{key.removeprefix(official)}"
    return f"bridgetower.{key}"


def roberta_config(config: ManagerTowerConfig) -> dict[str, Any]:
    return {
        "model_type": "roberta",
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "intermediate_size": config.text_mlp_width,
        "hidden_act": "gelu",
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": 1,
        "layer_norm_eps": config.text_eps,
        "pad_token_id": config.pad_token_id,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
    }


def clip_config(config: ManagerTowerConfig) -> dict[str, Any]:
    # of several names that transformers has for one activation the first one
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATION_NAMES.items())}
    return {
        "model_type": "clip_vision_model",
        "hidden_size": config.vision_width,
        "intermediate_size": 4 * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "hidden_act": activations[config.vision_activation],
        "layer_norm_eps": config.vision_eps,
    }


def clip_export(model: Any) -> Export:
    """The image encoder of a two-tower model, as CLIP's."""
    refuse_other_kind("vision_kind", model.config.vision_kind, "clip")
    rows = expand(HF_CLIP, "", "vision_model.", model.config.vision_layers)
    state = export_state(model.image_encoder.state_dict(), rows)
    values = {**clip_config(model.config), "architectures": ["CLIPVisionModel"]}
    size = {"height": model.config.image_size, "width": model.config.image_size}
    pictures = {
        **PREPROCESSING_SUPPORTED,
        "image_mean": model.config.image_mean,
        "image_std": model.config.image_std,
        "size": size,
        "crop_size": size,
        "image_processor_type": "CLIPImageProcessor",
    }
    return Export(state, values, transformers_usage(["CLIPVisionModel"]), pictures)


def refuse_other_kind(field: str, found: str, wanted: str) -> None:
    """Raises ValueError for an encoder of another kind than those that are written alone."""
    if found != wanted:
        raise ValueError(
            f"--part exports a two-tower model's {field} {wanted}, but this model has {found}; it "
            "is in the folder that --vision or --text named"
        )


def roberta_export(model: Any) -> Export:
    """The text encoder of a two-tower model, as RoBERTa."""
    refuse_other_kind("text_kind", model.config.text_kind, "roberta")
    rows = expand(ROBERTA, "", "", model.config.text_layers)
    state = export_state(model.text_encoder.state_dict(), rows)
    values = {**roberta_config(model.config), "architectures": ["RobertaModel"]}
    usage = transformers_usage(["RobertaModel"], ", add_pooling_layer=False")
    return Export(state, values, usage)


# ---------------------------------------------------------------- transformers: the MLLM
# how the keys of the official LLaVA-OneVision begin -> how those of llava-hf's files do
ONEVISION = {
    SIGLIP_PREFIX: "vision_tower.vision_model.",
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.image_newline": "image_newline",
    "": "language_model.",
}


def onevision_export(model: Any, tokenizer: Tokenizer | None) -> Export:
    """transformers' LLaVA-OneVision. Raises ValueError for what it cannot do."""
    config = model.config
    refuse_for_onevision(config)
    image_token = find_image_token(config, tokenizer)
    official = to_official(model.state_dict(), config)
    state = {onevision_key(key): tensor for key, tensor in official.items()}
    name = "LlavaOnevisionForConditionalGeneration"
    values = {
        "model_type": "llava_onevision",
        "architectures": [name],
        "text_config": qwen_config(config),
        "vision_config": siglip_tower_config(config),
        "image_token_index": image_token,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": config.aspect,
        "image_grid_pinpoints": config.grid_pinpoints,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": list(config.eos_ids) or None,
    }
    return Export(state, values, transformers_usage([name]))


def siglip_tower_config(config: LlavaManagerConfig) -> dict[str, Any]:
    """SigLIP as it is stored: without its last layer, and without its pooling head."""
    values = siglip_config(config)
    values["num_hidden_layers"] = config.vision_layers - 1
    values["vision_use_head"] = False
    return values


def refuse_for_onevision(config: LlavaManagerConfig) -> None:
    """Raises ValueError, with what is in the way."""
    other = "--format official takes it, and --part exports an encoder alone"
    if config.manager_type is not None:
        raise ValueError(
            f"transformers has no class for a model with managers ({config.manager_type}): {other}"
        )
    if not config.aspect.startswith("anyres_max_") or config.merge != "spatial_unpad":
        raise ValueError(
            "transformers' LLaVA-OneVision has aspect anyres_max_K and merge spatial_unpad, but "
            f"this model has {config.aspect} and {config.merge}: {other}"
        )


def find_image_token(config: LlavaManagerConfig, tokenizer: Tokenizer | None) -> int:
    """The id that stands for a picture's tokens, as transformers wants one: that of <image>, or a
    row of the embedding that no token has, or a special token that no chat has.
    """
    if tokenizer is None:
        return config.vocab_size - 1
    for name in ("<image>", "<mask>", "<unk>"):
        token_id = tokenizer.id_of(name)
        if name == "<image>" and token_id is None and tokenizer.vocab_size < config.vocab_size:
            token_id = tokenizer.vocab_size
        if token_id is not None and token_id < config.vocab_size:
            return token_id
    raise ValueError(
        "transformers' LLaVA-OneVision needs a token for pictures, but each row of this model's "
        "embedding belongs to a token of texts: add <image> to its tokenizer"
    )


def onevision_key(key: str) -> str:
    """An official key -> that of llava-hf's files."""
    beginning = next(name for name in ONEVISION if key.startswith(name))
    return ONEVISION[beginning] + key.removeprefix(beginning)


def siglip_export(model: Any) -> Export:
    """The image encoder of an MLLM, as it is stored."""
    rows = expand(HF_SIGLIP, "", "vision_model.", model.config.vision_layers - 1)
    state = export_state(model.vision.state_dict(), rows)
    values = {**siglip_tower_config(model.config), "architectures": ["SiglipVisionModel"]}
    return Export(state, values, transformers_usage(["SiglipVisionModel"]))


def qwen_export(model: Any) -> Export:
    """The LLM of an MLLM, as Qwen2."""
    rows = expand(qwen_names(model.config), layers=model.config.num_layers)
    state = export_state(model.llm.state_dict(), rows)
    values = {**qwen_config(model.config), "architectures": ["Qwen2ForCausalLM"]}
    return Export(state, values, transformers_usage(["Qwen2ForCausalLM"]))


def transformers_usage(names: list[str], arguments: str = "") -> str:
    lines = [f"from transformers import {', '.join(names)}", ""]
    lines += [f'model = {name}.from_pretrained("{{out}}"{arguments})' for name in names]
    return "\n".join(lines)


# ---------------------------------------------------------------- files
def save_shards(state: State, out: Path, most_bytes: int = MOST_BYTES_OF_A_SHARD) -> None:
    """model.safetensors, or, where that would be larger, shards and their index."""
    state = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    shards = deal_tensors(state, most_bytes)
    if len(shards) == 1:
        save_tensors(state, out / "model.safetensors")
        return
    weight_map = {}
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors({key: state[key] for key in keys}, out / name)
        weight_map.update(dict.fromkeys(keys, name))
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(out / "model.safetensors.index.json", index)


def deal_tensors(state: State, most_bytes: int) -> list[list[str]]:
    """The keys of each shard, in their order; a larger tensor has a shard of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > most_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    return shards


def save_tensors(state: State, file: Path) -> None:
    # older versions of transformers read only files that say so
    write_atomically(file, lambda path: save_file(state, path, metadata={"format": "pt"}))


# ---------------------------------------------------------------- the model card
def find_log(checkpoint: Path) -> list[dict]:
    """The log of the run that a checkpoint, or the best/ of a run, is of; empty for none."""
    for folder in (checkpoint, checkpoint.parent if checkpoint.name == "best" else checkpoint):
        file = folder / "log.jsonl"
        if file.is_file():
            return read_log(file)
    return []


def card_of(checkpoint: Path, name: str, title: str, export: Export, out: Path) -> str:
    """README.md: what it is, how it is loaded, what was measured, what it was made of."""
    library = "transformers" if "from transformers" in export.usage else "pytorch"
    usage = export.usage.replace("{out}", str(out))
    parts = [
        f"---\nlibrary_name: {library}\n---\n\n# {title}",
        f"Exported from `{name}` by `python prepare.py export`.",
        f"```python\n{usage}\n```",
    ]
    parts += numbers_of(find_log(checkpoint), checkpoint)
    config = json.dumps(export.config, indent=1)
    parts.append(f"## Config\n\n```json\n{config}\n```")
    return "\n\n".join(parts) + "\n"


def numbers_of(log: list[dict], checkpoint: Path) -> list[str]:
    """The sections of the card that say what is known of the run."""
    parts = []
    evaluations = [row for row in log if isinstance(row.get("eval"), dict)]
    if evaluations:
        measured = evaluations[-1]
        if checkpoint.name == "best":
            measured = max(evaluations, key=lambda row: row["eval"].get("score", -torch.inf))
        columns = {f"step {measured['step']}": measured["eval"]}
        for row in log:
            columns |= row.get("baselines", {})
        parts.append(f"## Held out, as the run measured it\n\n{table_of(columns)}")
    if (checkpoint / "eval.json").is_file():
        report = json.dumps(read_json(checkpoint / "eval.json", dict), indent=1)
        parts.append(f"## eval.py\n\n```json\n{report}\n```")
    headers = [row["header"] for row in log if isinstance(row.get("header"), dict)]
    if headers:
        made_of = json.dumps(without_config(headers[0]), indent=1)
        parts.append(f"## The run\n\n```json\n{made_of}\n```")
    if not parts:
        parts.append("No numbers are known: there is no log of a run beside the checkpoint.")
    return parts


def without_config(header: dict) -> dict:
    """The header of a log without the model's config, which has a section of its own."""
    identity = dict(header.get("identity", {}))
    identity.pop("config", None)
    return {**header, "identity": identity}


def table_of(columns: dict[str, dict]) -> str:
    """A table with a column for each of them, and a row for each number of the first."""
    names = list(columns)
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for metric in columns[names[0]]:
        cells = [number_in_table(columns[name].get(metric)) for name in names]
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def number_in_table(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str("" if value is None else value)


# ---------------------------------------------------------------- a checkpoint -> an export
def load_stored(checkpoint: Path) -> Any:
    """The model of a checkpoint, in the type of numbers that is stored."""
    if not is_mllm(checkpoint):
        return load_tower(checkpoint)
    first = next(iter(read_headers(checkpoint).values()), torch.zeros(()))
    return load_llava(checkpoint, first.dtype if first.is_floating_point() else torch.float32)


def make_export(model: Any, checkpoint: Path, layout: str, part: str) -> Export:
    """What to write. Raises ValueError for what the layout has no place for."""
    has_llm = isinstance(model.config, LlavaManagerConfig)
    if layout == "official":
        if part:
            raise ValueError(f"--part {part} goes with --format transformers, which has encoders")
        return official_export(model, "" if has_llm else stored_transform(checkpoint))
    if part == "vision":
        return siglip_export(model) if has_llm else clip_export(model)
    if part == "text":
        return qwen_export(model) if has_llm else roberta_export(model)
    if has_llm:
        return onevision_export(model, tokenizer_in(checkpoint))
    return bridgetower_export(model)


def tokenizer_in(checkpoint: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None for official folders, which may lack it."""
    try:
        return load_tokenizer(checkpoint)
    except ValueError:
        return None


def export_checkpoint(checkpoint: str, out: Path, layout: str, part: str = "") -> None:
    """Write a checkpoint into a new folder, in a layout of FORMATS, whole or a part of PARTS.

    Raises ValueError for a folder that holds something, and for what has no place in the layout.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there already; choose a new folder")
    folder = find_folder(checkpoint, "checkpoint")
    model = load_stored(folder)
    export = make_export(model, folder, layout, part)
    title = " ".join([type(model).__name__, part, f"in the layout {layout}"]).replace("  ", " ")
    # all is known to be possible: from here on files are written
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = None if part == "vision" else tokenizer_in(folder)
    if tokenizer is not None:
        tokenizer.save(out)
    if (folder / "answers.json").is_file() and not part:
        write_json(out / "answers.json", read_json(folder / "answers.json", list))
    write_json(out / "config.json", export.config)
    if export.pictures:
        write_json(out / PREPROCESSING_FILE, export.pictures)
    write_text(out / "README.md", card_of(folder, checkpoint, title, export, out))
    save_shards(export.state, out)
    size = sum(tensor.nbytes for tensor in export.state.values())
    print(f"{out}: {len(export.state)} tensors, {size / 1e6:.1f} MB, {title}; see {out}/README.md")
