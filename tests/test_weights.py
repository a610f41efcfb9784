"""weights.py: every layout against the published manifests and golden numbers, transformers' models
and hostile pickles; checkpoint folders of both families and of the first edition; bad weights.
"""

import dataclasses
import doctest
import functools
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    MT,
    close,
    golden,
    golden_config,
    golden_model,
    golden_state,
    hf_configs,
    llava_config,
    llava_state,
    needs,
    present,
    read_llava,
    tiny_batch,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import files
import weights
from images import image_transform
from llava_manager import LlavaManager, LlavaManagerConfig
from model import HEADS, ManagerTower, ManagerTowerConfig
from tokenizer import load_tokenizer, train_tokenizer
from weights import (
    CLIP,
    ROBERTA,
    convert_weights,
    expand,
    export_state,
    from_official,
    infer_config,
    load_model,
    load_unimodal,
    read_config,
    read_safetensors,
    resize_position_embedding,
    save_folder,
    save_model,
    to_official,
)


def without(state, *keys):
    return {key: tensor for key, tensor in state.items() if key not in keys}


def contiguous(state):
    return {key: tensor.detach().contiguous() for key, tensor in state.items()}


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


# ---------------------------------------------------------------- tables
def test_the_examples_of_the_docstrings_are_true():
    result = doctest.testmod(weights)
    assert result.attempted >= 5
    assert result.failed == 0


def test_every_row_comes_back_as_it_was():
    for layout, shape in (("cat", (6, 3)), ("stack", (2, 3)), ("scores", (4, 8))):
        theirs = ("a",) if layout == "scores" else ("a", "b")
        row = weights.Row("ours", theirs, layout)
        tensor = torch.randn(shape)
        parts = row.split(tensor)
        assert len(parts) == len(theirs)
        assert torch.equal(row.join(parts), tensor)


def test_every_head_of_the_model_has_official_names():
    assert list(weights.HEAD_NAMES) == list(HEADS)
    config = ManagerTowerConfig.tiny(heads=tuple(HEADS))
    model = ManagerTower(config)
    official = to_official(model.state_dict(), config)
    assert equal(from_official(official, config), model.state_dict())


def test_another_layout_is_another_dict(tmp_path, monkeypatch):
    """The text encoder under names that nobody has, with the value projection apart."""
    model = ManagerTower(ManagerTowerConfig.tiny(heads=()))
    block = {"qkv.*": ("q.*", "k.*", "v.*")}
    for name in ("proj", "ln_1", "fc", "fc_out", "ln_3"):
        block[f"{name}.*"] = f"the_{name}.*"
    names = {
        "word_embedding.weight": "words",
        "position_embedding.weight": "places",
        "type_embedding": "kind",
        "ln.*": "norm.*",
        **weights.within("layers.{}.", "h{}.", block),
    }
    expected = {key: tensor.clone() for key, tensor in model.text_encoder.state_dict().items()}
    exported = export_state(expected, expand(names, "", "peer.", 3))
    assert exported["peer.h2.k.bias"].shape == (96,)
    save_file(contiguous(exported), tmp_path / "peer.safetensors")
    clip = export_state(model.image_encoder.state_dict(), expand(CLIP, "", "visual.", 3))
    save_file(contiguous(clip), tmp_path / "clip.safetensors")
    encoders = (tmp_path / "clip.safetensors", tmp_path / "peer.safetensors")
    with pytest.raises(ValueError, match="peer.safetensors: .*missing"):
        load_unimodal(model, *encoders)

    layout = weights.Layout(names, "peer.", ())
    monkeypatch.setattr(weights, "TEXT_LAYOUTS", (layout, *weights.TEXT_LAYOUTS))
    nn.init.zeros_(model.text_encoder.layers[2].qkv.weight)
    load_unimodal(model, *encoders)
    assert equal(model.text_encoder.state_dict(), expected)


# ---------------------------------------------------------------- the official ManagerTower
@needs("posemb.safetensors")
def test_position_embedding_interpolation():
    tables = load_file(MT / "posemb.safetensors")
    for case in json.loads((MT / "posemb.json").read_text()):
        table = tables[f"in.{case['name']}"]
        resized = resize_position_embedding(table, case["grid_after"])
        close(resized, tables[f"out.{case['name']}"], 1e-6)
        assert not case["identical"] or torch.equal(table, resized)


@pytest.mark.parametrize("shape", [(), (5,), (16, 48), (1, 48), (17, 4, 2), (0, 4)])
def test_what_is_no_position_table_is_refused(shape):
    message = rf"position table of shape {re.escape(str(shape))} is not a class row"
    with pytest.raises(ValueError, match=message):
        resize_position_embedding(torch.zeros(shape), 3)


def manifest(name):
    folder = MT / "manifests"
    if (folder / f"{name}.json").exists():
        return json.loads((folder / f"{name}.json").read_text())
    delta = json.loads((folder / f"{name}.delta.json").read_text())
    base = json.loads((folder / delta["base"]).read_text())
    return {**without(base, *delta["removed"]), **delta["changed_or_added"]}


def on_meta(name):
    state = {}
    for key, (shape, dtype) in manifest(name).items():
        state[key] = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    return state


MANIFESTS = {
    "mt_pretrain": {},
    "bt_pretrain": {"fusion": "bridge"},
    "mt_aaue_scalar_pretrain": {"manager_weight": "scalar"},
    "mt_saue_vector_pretrain": {"manager_type": "saue"},
    "mt_ftfpt_vqa": {"heads": ("vqa",), "image_size": 576, "head_hidden_scale": 2},
    "mt_ftfs_vqa": {"heads": ("vqa",), "image_size": 576},
    "mt_ftfpt_snli": {"heads": ("snli_ve",), "image_size": 384, "head_hidden_scale": 2},
    "mt_ftfpt_nlvr2": {"heads": ("nlvr2",), "image_size": 384},
    "mt_ftfpt_flickr": {"heads": ("itm", "itc"), "image_size": 384},
}


@needs("manifests")
@pytest.mark.parametrize("name", MANIFESTS)
def test_full_size_manifests_load_strictly(name):
    config = ManagerTowerConfig.base(**MANIFESTS[name])
    state = on_meta(name)
    with torch.device("meta"):
        model = ManagerTower(config)
    model.load_state_dict(from_official(state, config), strict=True, assign=True)
    back = to_official(model.state_dict(), config)
    shapes = {key: tensor.shape for key, tensor in state.items()}
    assert {key: tensor.shape for key, tensor in back.items()}.items() <= shapes.items()
    counts = json.loads((MT / "manifests" / "param_counts.json").read_text())
    if name == "mt_pretrain":
        dead = [v for k, v in state.items() if k not in back and v.is_floating_point()]
        parameters = [*dead, *model.parameters()]
        total = sum(parameter.numel() for parameter in parameters)
        assert total == counts["pretrain"]["total_parameters"]


@needs("manifests")
@pytest.mark.parametrize(
    "text", ["hf_roberta_base_RobertaModel", "hf_roberta_base_RobertaForMaskedLM"]
)
@pytest.mark.parametrize("vision", ["hf_clip_vit_base_patch16", "openai_clip_vit_b16"])
def test_unimodal_manifests(vision, text, monkeypatch):
    with torch.device("meta"):
        model = ManagerTower(ManagerTowerConfig.base(image_size=224))
    monkeypatch.setattr(weights, "read_safetensors", on_meta)
    load_unimodal(model, vision, text)

    def without_the_third_layer(name):
        return {key: tensor for key, tensor in on_meta(name).items() if ".3." not in key}

    monkeypatch.setattr(weights, "read_safetensors", without_the_third_layer)
    with pytest.raises(ValueError, match=rf"{vision}: .*missing: .*3\."):
        load_unimodal(model, vision, text)


def test_official_round_trip_and_errors():
    name = "main.mt_aaue_vector"
    config = golden_config(name)
    state = golden_state(name)
    back = to_official(from_official(state, config), config)
    assert all(torch.equal(state[key], tensor) for key, tensor in back.items())
    dead = {
        "temperature",
        "vit_model.positional_embedding",
        "vit_model.ln_final.weight",
        "vit_model.ln_final.bias",
        "text_transformer.pooler.dense.weight",
        "text_transformer.pooler.dense.bias",
        "text_transformer.embeddings.position_ids",
    }  # and the unused temperatures
    unused = {key for key in set(state) - set(back) if "softmax_temperature_cross" not in key}
    assert unused == dead & set(state)

    key = "itm_score.fc.bias"
    bias = torch.zeros(5)
    for broken, message in (
        ({**state, "extra.weight": bias}, "unknown: extra.weight"),
        (without(state, key), f"missing: {key}"),
        ({**state, key: bias}, rf"{key} is \(5,\), should be \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            from_official(broken, config)


def test_sae_has_no_official_layout():
    config = ManagerTowerConfig.tiny(manager_type="sae", num_layers=3)
    with pytest.raises(ValueError, match="no official"):
        to_official(ManagerTower(config).state_dict(), config)


def test_export_takes_parts_of_a_model_and_gradients():
    config = ManagerTowerConfig.tiny()
    model = ManagerTower(config)
    qkv = torch.arange(3 * 96.0)
    exported = to_official({"text_layers.1.qkv.bias": qkv}, config)
    prefix = "cross_modal_text_layers.1.attention.self."
    assert sorted(exported) == [f"{prefix}{part}.bias" for part in ("key", "query", "value")]
    assert torch.equal(exported[f"{prefix}value.bias"], qkv[2 * 96 :])
    model(*tiny_batch(config)).pooled.sum().backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert len(to_official(gradients, config)) > len(gradients) > 50


# ---------------------------------------------------------------- published encoders
def random_encoders(tmp_path):
    """transformers' CLIP and RoBERTa with random weights, saved in tmp_path/clip, roberta."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
        )
    )
    text = transformers.RobertaModel(
        transformers.RobertaConfig(
            vocab_size=99,
            hidden_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=34,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
    )
    for peer, folder in ((vision, "clip"), (text, "roberta")):
        for p in peer.parameters():  # transformers' small initialisation hides mistakes
            p.data.add_(0.1 * torch.randn_like(p))
        (tmp_path / folder).mkdir()
        save_file(contiguous(peer.state_dict()), tmp_path / folder / "model.safetensors")
    config = ManagerTowerConfig(
        image_size=64,
        patch_size=16,
        vision_width=48,
        vision_layers=3,
        vision_heads=4,
        vocab_size=99,
        max_positions=34,
        text_width=40,
        text_layers=3,
        text_heads=4,
        text_mlp_width=96,
        hidden_size=32,
        num_heads=4,
        num_layers=3,
        managed_layers_text=3,
        managed_layers_image=3,
        max_text_len=12,
    )
    return vision.eval(), text.eval(), config


def test_encoders_equal_transformers(tmp_path):
    vision, text, config = random_encoders(tmp_path)
    model = ManagerTower(config).eval()
    load_unimodal(model, tmp_path / "clip", tmp_path / "roberta" / "model.safetensors")
    pixels, ids, mask = tiny_batch(config)
    # a pad id in the text takes no position: those follow the ids, attention follows the mask
    ids[0, 3] = 1
    with torch.no_grad():
        theirs = vision(pixels, output_hidden_states=True).hidden_states
        for a, b in zip(model.image_encoder(pixels, range(4)), theirs, strict=True):
            close(a, b, 1e-5 * max(1, b.abs().max().item()))
        words = text(ids, mask, output_hidden_states=True).hidden_states
        for a, b in zip(model.text_encoder(ids, mask, range(4)), words, strict=True):
            close(a[mask.bool()], b[mask.bool()], 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            rough_image = model.image_encoder(pixels, [3])[0]
            rough_text = model.text_encoder(ids, mask, [3])[0][mask.bool()]
    for ours, exact in ((rough_image, theirs[-1]), (rough_text, words[-1][mask.bool()])):
        assert (ours.float() - exact).norm() / exact.norm() < 2e-2


def test_unimodal_errors(tmp_path):
    _, _, config = random_encoders(tmp_path)
    model = ManagerTower(config)
    clip = tmp_path / "clip"
    roberta = tmp_path / "roberta"
    state = read_safetensors(clip)
    key = next(k for k in state if k.endswith("position_embedding.weight"))
    norm = next(k for k in state if k.endswith("post_layernorm.weight"))
    no_class_row = tmp_path / "no_class_row.safetensors"
    save_file({**state, key: state[key][1:].clone()}, no_class_row)
    save_file({**state, key: torch.tensor(1.0)}, tmp_path / "scalar.safetensors")
    save_file(
        {**state, norm: torch.full_like(state[norm], torch.inf)}, tmp_path / "inf.safetensors"
    )
    save_file({**state, norm: state[norm].long()}, tmp_path / "long.safetensors")
    (tmp_path / "text.bin").write_bytes(b"x")
    whole = (clip / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-9])
    for vision, text, message in (
        (tmp_path / "nothing", roberta, "nothing does not exist"),
        (clip, tmp_path, "model.safetensors does not exist"),
        (clip, tmp_path / "text.bin", "not a .safetensors file"),
        (tmp_path / "cut.safetensors", roberta, "not a readable"),
        (roberta, clip, "roberta: .*missing"),
        (clip, clip, "clip: .*missing"),
        (no_class_row, roberta, r"no_class_row.*position table of shape \(16, 48\)"),
        (tmp_path / "scalar.safetensors", roberta, r"scalar.*position table of shape \(\)"),
        (tmp_path / "inf.safetensors", roberta, f"inf.safetensors: .*not finite: {norm}"),
        (
            tmp_path / "long.safetensors",
            roberta,
            f"long.*no floating-point numbers: {norm} is .*int64",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_unimodal(model, vision, text)


def randomize(model):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    return model.eval()


def small_llava(**overrides):
    config = LlavaManagerConfig.tiny(
        vision_width=32,
        vision_heads=2,
        vision_mlp_width=64,
        vocab_size=100,
        hidden_size=48,
        num_heads=4,
        num_kv_heads=2,
        mlp_width=80,
        num_layers=3,
        inject_layers=(0, 2),
        im_start_id=98,
        eos_ids=(),
    )
    return dataclasses.replace(config, **overrides)


def test_unimodal_parity_with_transformers(tmp_path):
    """load_unimodal of the MLLM from HF folders, sharded and not: the results of both towers."""
    transformers = pytest.importorskip("transformers")
    text, vision = hf_configs()
    qwen = randomize(transformers.Qwen2ForCausalLM(text))
    siglip = randomize(transformers.SiglipVisionModel(vision))
    qwen.save_pretrained(tmp_path / "qwen", max_shard_size="30KB")
    siglip.save_pretrained(tmp_path / "siglip")
    assert len(list((tmp_path / "qwen").glob("*.safetensors"))) > 1
    model = LlavaManager(small_llava()).eval()
    load_unimodal(model, tmp_path / "siglip", tmp_path / "qwen")
    ids = torch.randint(0, 98, (2, 12))
    pixels = torch.randn(2, 3, 32, 32)
    close(model(ids).logits, qwen(ids).logits, 1e-4)
    states = siglip(pixels, output_hidden_states=True).hidden_states
    for ours, theirs in zip(model.vision(pixels, range(4)), states[:4], strict=True):
        close(ours, theirs, 1e-4)
    assert not any(p.requires_grad for p in model.vision.ln_post.parameters())

    # the layout of a whole SiglipModel
    both = {f"vision_model.{key}": tensor for key, tensor in siglip.state_dict().items()}
    other = {"text_model.x": torch.zeros(1), "logit_scale": torch.zeros(1)}
    save_file({**both, **other}, tmp_path / "full.safetensors")
    no_bias = {key: tensor for key, tensor in both.items() if "fc1.bias" not in key}
    save_file(no_bias, tmp_path / "broken.safetensors")
    message = "broken.safetensors: .*missing: vision_model.encoder.layers.0.mlp.fc1.bias"
    with pytest.raises(ValueError, match=message):
        load_unimodal(model, tmp_path / "broken.safetensors", tmp_path / "qwen")
    model.vision.blocks[0].fc.weight.data.zero_()
    load_unimodal(model, tmp_path / "full.safetensors", tmp_path / "qwen")
    close(model.vision(pixels, [3])[0], states[3], 1e-4)

    untied = LlavaManager(small_llava(tie_embeddings=False))
    with pytest.raises(ValueError, match="qwen: .*missing: lm_head.weight"):
        load_unimodal(untied, tmp_path / "siglip", tmp_path / "qwen")
    index = tmp_path / "qwen" / "model.safetensors.index.json"
    for text, message in (("{", "index.json is not JSON"), ("{}", "index.json has no weight_map")):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_unimodal(model, tmp_path / "siglip", tmp_path / "qwen")


# ---------------------------------------------------------------- the official LLaVA-OV-Manager
def test_the_manifest_of_llava_ov_manager():
    """The published checkpoint's keys load strictly on the meta device, and come back."""
    tensors = read_llava("manifest/llava_ov_manager_0p5b_static_all_grid.json")["tensors"]
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in tensors.items()}
    config = LlavaManagerConfig.base()
    ours = from_official(state, config)
    with torch.device("meta"):
        model = LlavaManager(config)
    model.load_state_dict(ours, strict=True, assign=True)
    # the paper's numbers of parameters
    assert sum(p.numel() for p in model.parameters()) == 893_698_848
    prefixes = ("managers.", "layer_embedding")
    managers = [p for key, p in model.named_parameters() if key.startswith(prefixes)]
    assert sum(p.numel() for p in managers) == 80_640
    back = {key: list(tensor.shape) for key, tensor in to_official(ours, config).items()}
    assert back == {key: shape for key, (shape, _) in tensors.items()}
    nogrid = dataclasses.replace(config, merge="flat", aspect="square")
    no_newline = without(state, "model.image_newline")
    flat = from_official(no_newline, nogrid)
    assert flat["image_newline"].shape == (896,)
    assert to_official(flat, nogrid).keys() == no_newline.keys()
    baseline = {key: tensor for key, tensor in state.items() if "manager" not in key}
    from_official(baseline, dataclasses.replace(config, manager_type=None))


def test_summary_of_other_llava_checkpoints():
    compared = 0
    for name, entry in read_llava("manifest/summary.json").items():
        if not isinstance(entry, dict) or "manager_tensors" not in entry:
            continue
        kind = name.partition("0p5b_")[2].removesuffix("_zerouni")
        config = LlavaManagerConfig.base(manager_type=kind)
        with torch.device("meta"):
            model = LlavaManager(config)
        state = to_official(model.state_dict(), config)
        assert sum(tensor.numel() for tensor in state.values()) == entry["n_params"]
        managers = {key: list(v.shape) for key, v in state.items() if "manager" in key}
        assert managers == entry["manager_tensors"]
        compared += 1
    assert compared


def test_the_import_of_llava_is_strict():
    config = llava_config("adaptive_cross_all")
    state = llava_state("adaptive_cross_all")
    assert equal(to_official(from_official(state, config), config), state)
    for key in ("model.manager.1.zero_gate", "model.layers.2.self_attn.k_proj.bias"):
        with pytest.raises(ValueError, match=f"missing: {key}"):
            from_official(without(state, key), config)
    norm = "model.norm.weight"
    head = state["model.embed_tokens.weight"].clone()
    broken_head = head.clone()
    broken_head[0, 0] = torch.nan
    for changed, message in (
        ({"model.layers.6.x": torch.zeros(1)}, "unknown: model.layers.6.x"),
        ({norm: torch.zeros(47)}, rf"{norm} is \(47,\), should be \(48,\)"),
        ({norm: torch.tensor(0.0)}, rf"wrong shape: {norm} is \(\), should be \(48,\)"),
        (
            {"model.manager.0.layer_scores": torch.zeros(3)},
            r"wrong shape: .*layer_scores is \(3,\)",
        ),
        ({norm: torch.zeros(48).int()}, f"no floating-point numbers: {norm} is torch.int32"),
        ({norm: torch.full((48,), torch.nan)}, f"not finite: {norm}"),
        ({"lm_head.weight": head + 1}, "lm_head.weight differs"),
        ({"lm_head.weight": head[:, :-1]}, "lm_head.weight differs"),
        ({"lm_head.weight": broken_head}, "lm_head.weight differs"),
        (
            {"lm_head.weight": broken_head, "model.embed_tokens.weight": broken_head},
            "not finite: model.embed_tokens.weight",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            from_official({**state, **changed}, config)
    tied = from_official({**state, "lm_head.weight": head}, config)
    assert tied.keys() == from_official(state, config).keys()
    untied = dataclasses.replace(config, tie_embeddings=False)
    ours = from_official({**state, "lm_head.weight": head + 1}, untied)
    assert torch.equal(ours["llm.head.weight"], head + 1)


def test_checkpoint_folders_of_llava(tmp_path):
    config = llava_config("static_all")
    official = {**read_llava("tiny/config_static_all.json"), "eos_token_id": 319}
    state = llava_state("static_all")
    names = sorted(state)
    folder = tmp_path / "official"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(official))
    weight_map = {}
    for file, keys in (("model-1.safetensors", names[:50]), ("model-2.safetensors", names[50:])):
        save_file({key: state[key].to(torch.bfloat16) for key in keys}, folder / file)
        weight_map.update(dict.fromkeys(keys, file))
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load = functools.partial(load_model, folder, vision=official["tiny_vision_config"])
    model = load(im_start_id=318)
    assert model.config == dataclasses.replace(config, eos_ids=(319,))
    expected = from_official({key: v.bfloat16().float() for key, v in state.items()}, config)
    assert equal(model.state_dict(), expected)
    assert not model.vision.ln_post.weight.requires_grad
    assert model.llm.norm.weight.requires_grad
    low = load(im_start_id=318, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}

    ours = tmp_path / "ours"
    save_model(model, ours)
    again = load_model(ours)
    assert again.config == model.config
    assert equal(again.state_dict(), expected)
    with pytest.raises(ValueError, match="ours is no official folder"):
        load_model(ours, im_start_id=318)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match="model-2.safetensors does not exist"):
        load()
    for removed in ("rope_theta", "vocab_size"):
        (folder / "config.json").write_text(json.dumps(without(official, removed)))
        with pytest.raises(ValueError, match=f"config.json: the config lacks {removed}"):
            load()
    values = json.loads((ours / "config.json").read_text())
    for changed, message in (
        ({"num_layers": 7}, "ours: .*missing: llm.layers.6"),
        ({"hidden_size": 0}, "config.json: hidden_size is 0"),
    ):
        (ours / "config.json").write_text(json.dumps({**values, **changed}))
        with pytest.raises(ValueError, match=message):
            load_model(ours)
    with pytest.raises(ValueError, match="no config.json"):
        load_model(tmp_path)


# ---------------------------------------------------------------- our folders
def test_load_model_for_another_task(tmp_path, capsys):
    model = golden_model("main.mt_aaue_vector")
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert equal(again.state_dict(), model.state_dict())
    assert again.config == model.config
    assert capsys.readouterr().out == ""
    pair = load_model(tmp_path, heads=("nlvr2",), image_size=96)
    assert torch.equal(pair.type_embedding, model.type_embedding[[0, 1, 1]])
    assert pair.image_encoder.position_embedding.shape[0] == 37
    assert "dropped: itm, mlm; heads initialised: nlvr2" in capsys.readouterr().out
    save_model(pair, tmp_path / "pair")
    single = load_model(tmp_path / "pair", heads=("itm",))
    assert torch.equal(single.type_embedding, model.type_embedding)
    rank = load_model(tmp_path, heads=("itm", "retrieval"))
    assert torch.equal(rank.heads["retrieval"].weight[0], model.heads["itm"].weight[1])
    fresh = ManagerTower(ManagerTowerConfig.tiny(heads=("nlvr2",))).type_embedding
    assert torch.equal(fresh[2], fresh[1])
    assert not torch.equal(fresh[1], fresh[0])


def test_new_heads_are_the_same_as_in_a_new_model(tmp_path):
    """The random draws do not depend on what the file holds."""
    config = ManagerTowerConfig.tiny(heads=("mlm",))
    save_model(ManagerTower(config), tmp_path)
    torch.manual_seed(5)
    loaded = load_model(tmp_path, heads=("vqa", "itm"))
    torch.manual_seed(5)
    new = ManagerTower(dataclasses.replace(config, heads=("vqa", "itm")))
    assert equal(loaded.heads.state_dict(), new.heads.state_dict())


def test_load_model_errors(tmp_path):
    save_model(ManagerTower(ManagerTowerConfig.tiny(heads=("vqa",), num_answers=9)), tmp_path)
    patch = r"image_encoder.patch.weight: \(96, 3, 16, 16\) in the file"
    answers = r"heads.vqa.fc_out.bias: \(9,\) in the file, \(8,\) in the model"
    for overrides, message in (
        ({"num_layers": 3}, "does not fit the model. image_layers.2.*: missing in"),
        ({"num_answers": 8}, answers),
        ({"patch_size": 8}, patch),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path, **overrides)
    state = load_file(tmp_path / "model.safetensors")
    for missing in ("heads.vqa.fc.bias", "type_embedding", "image_encoder.position_embedding"):
        save_file(without(state, missing), tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"{missing}: missing in the file"):
            load_model(tmp_path)
    save_file({**state, "heads.cls.bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"heads.cls.bias: \(1,\) in the file, missing in the mod"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors does not exist"):
        load_model(tmp_path)
    config = (tmp_path / "config.json").read_text()
    for text, message in (
        ("{", "is not a JSON object"),
        ("[1]", "is not a JSON object"),
        ("[" * 9999, "is not a JSON object"),
        ('{"model_type": "clip", "hidden_size": 9}', "model None, unknown fields .'model_type'"),
        (config.replace('"num_heads": 3', '"num_heads": -3'), "config.json: num_heads is -3"),
        (config.replace('"num_heads": 3', '"num_heads": "3"'), "config.json: num_heads is '3'"),
        (re.sub(r'"heads": \[[^]]*\]', '"heads": null', config), "config.json: "),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model": "LlavaManager"}')
    with pytest.raises(ValueError, match="not the config of a ManagerTower: model 'LlavaManager'"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="no config.json"):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    "key",
    ["type_embedding", "image_encoder.position_embedding", "heads.itm.weight", "text_pooler.bias"],
)
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda tensor: tensor.round().long(), "no floating-point numbers: {} is torch.int64"),
        (
            lambda tensor: tensor.round().to(torch.int8),
            "no floating-point numbers: {} is torch.int8",
        ),
        (lambda tensor: tensor.bool(), "no floating-point numbers: {} is torch.bool"),
        (lambda tensor: tensor / 0, "not finite: {}"),
        (lambda tensor: torch.full_like(tensor, torch.inf).bfloat16(), "not finite: {}"),
        (
            lambda tensor: torch.tensor(1.0),
            "({}: \\(\\) in the file|position table of shape \\(\\))",
        ),
        (lambda tensor: tensor[None], "({}: \\(1, .* in the file|position table of shape \\(1, )"),
    ],
)
def test_damaged_weights_are_named(tmp_path, key, damage, message):
    model = ManagerTower(ManagerTowerConfig.tiny())
    save_model(model, tmp_path)
    state = contiguous(model.state_dict())
    state[key] = damage(state[key] + 0.7).contiguous()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message.format(re.escape(key))) as error:
        load_model(tmp_path, heads=("itm", "retrieval", "nlvr2"))
    assert str(tmp_path) in str(error.value)


def test_damaged_weights_of_llava_are_named(tmp_path):
    model = LlavaManager(small_llava())
    save_model(model, tmp_path)
    state = contiguous(model.state_dict())
    key = "llm.norm.weight"
    for damaged, message in (
        (state[key].long(), f"no floating-point numbers: {key}"),
        (state[key] * torch.nan, f"not finite: {key}"),
        (torch.tensor(1.0), rf"wrong shape: {key} is \(\), should be \(48,\)"),
    ):
        save_file({**state, key: damaged}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"{tmp_path}: .*{message}"):
            load_model(tmp_path)


def test_weights_in_any_floating_point_dtype_are_taken(tmp_path):
    model = ManagerTower(ManagerTowerConfig.tiny())
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        low = {key: tensor.to(dtype) for key, tensor in model.state_dict().items()}
        save_folder(low, model.config, tmp_path)
        loaded = load_model(tmp_path).state_dict()
        assert equal(loaded, {key: tensor.float() for key, tensor in low.items()})
    nan = torch.full((96,), torch.nan).to(torch.float8_e4m3fn)
    save_folder({**low, "text_pooler.bias": nan}, model.config, tmp_path)
    with pytest.raises(ValueError, match="not finite: text_pooler.bias"):
        load_model(tmp_path)


def test_config_json_says_model_version_and_transform(tmp_path):
    model = ManagerTower(ManagerTowerConfig.tiny())
    save_folder(model.state_dict(), model.config, tmp_path, "albef_randaug_wc")
    values = json.loads((tmp_path / "config.json").read_text())
    assert values.pop("model") == "ManagerTower"
    assert values.pop("version") == files.VERSION
    assert values.pop("transform") == "albef_randaug_wc"
    assert values == json.loads(json.dumps(dataclasses.asdict(model.config)))
    assert weights.stored_transform(tmp_path) == "albef_randaug_wc"
    assert not list(tmp_path.glob("*.tmp*"))


def test_folders_of_the_first_edition_load_as_before(tmp_path):
    """Without version and transform, which were not written then."""
    for heads, transform in ((("mlm", "itm"), "clip"), (("vqa",), "albef")):
        model = ManagerTower(ManagerTowerConfig.tiny(heads=heads))
        save_model(model, tmp_path)
        values = {"model": "ManagerTower", **dataclasses.asdict(model.config)}
        (tmp_path / "config.json").write_text(json.dumps(values, indent=1))
        loaded = load_model(tmp_path)
        assert equal(loaded.state_dict(), model.state_dict())
        assert loaded.config == model.config
        assert weights.stored_transform(tmp_path) == transform
    mllm = LlavaManager(small_llava())
    save_model(mllm, tmp_path)
    values = {"model": "LlavaManager", **dataclasses.asdict(mllm.config)}
    (tmp_path / "config.json").write_text(json.dumps(values, indent=1))
    loaded = load_model(tmp_path)
    assert equal(loaded.state_dict(), mllm.state_dict())
    assert loaded.config == mllm.config


# ---------------------------------------------------------------- checkpoints, ready to be used
def test_loaded_has_model_tokenizer_and_transform(tmp_path):
    tokenizer = train_tokenizer(["a b"], 300)
    tower = ManagerTower(ManagerTowerConfig.tiny(heads=("vqa",)))
    save_folder(tower.state_dict(), tower.config, tmp_path / "tower", "clip")
    tokenizer.save(tmp_path / "tower")
    mllm = LlavaManager(small_llava())
    save_model(mllm, tmp_path / "mllm")
    tokenizer.save(tmp_path / "mllm")
    assert not weights.is_mllm(tmp_path / "tower")
    assert weights.is_mllm(str(tmp_path / "mllm"))

    loaded = weights.load_two_tower(str(tmp_path / "tower"), "vqa", "cpu")
    assert isinstance(loaded, weights.Loaded)
    assert equal(loaded.model.state_dict(), tower.state_dict())
    assert loaded.tokenizer.encode("a b") == tokenizer.encode("a b")
    picture = random_picture()
    expected = image_transform("clip", tower.config.image_size, False)(picture)
    assert torch.equal(loaded.transform(picture), expected)
    other = weights.load_mllm(str(tmp_path / "mllm"), "", "cpu")
    assert not other.model.training  # managers are noisy in training
    assert equal(other.model.state_dict(), mllm.state_dict())
    assert other.transform is None

    for load, arguments, message in (
        (weights.load_two_tower, ("tower", "itm"), "tower has no itm head, only vqa"),
        (weights.load_two_tower, ("mllm",), "mllm is a LLaVA-OV-Manager"),
        (weights.load_mllm, ("tower",), "tower is not a LLaVA-OV-Manager"),
        (weights.load_mllm, ("nothing",), "nothing does not exist"),
        (weights.load_two_tower, ("",), "is no checkpoint folder of ours"),
    ):
        name, *rest = arguments
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path / name), *rest)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="is no checkpoint folder of ours"):
        weights.is_mllm(tmp_path)


def random_picture():
    pixels = np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ---------------------------------------------------------------- pickles
class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Foreign(dict):
    """A class that the reader lacks: instances have a state, items, and a call of Lightning's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.where = "here"


class ForeignList(list):
    pass


def lightning_checkpoint(path, state, settings, extra=None):
    content = {
        "epoch": 3,
        "state_dict": OrderedDict(state),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "callbacks": {Foreign: Foreign(best=torch.ones(2))},
        "list": ForeignList([1, 2]),
        "set": {1, 2},
        "range": range(3),
        "numpy": np.float64(1.5),
        "path": Path("/x"),
        "hyper_parameters": Foreign(config=Foreign(settings)),
        "extra": extra,
    }
    torch.save(content, path)


def test_a_pickle_is_read_without_executing_anything(tmp_path):
    mark = tmp_path / "executed"
    base = torch.arange(12, dtype=torch.float32)
    state = {
        "half": torch.randn(3, 2).half(),
        "bf16": torch.randn(4).bfloat16(),
        "int": torch.arange(3),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "view": base[2:8].view(2, 3),
        "transposed": base.view(3, 4).T,
        "strided": base[::3],
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "bool": torch.tensor([True, False]),
    }
    lightning_checkpoint(tmp_path / "x.ckpt", state, {"num_heads": 4}, Evil(mark))
    read, settings = weights.read_weights(tmp_path / "x.ckpt")
    assert not mark.exists()
    assert settings == {"num_heads": 4}
    assert set(read) == set(state)
    for key, tensor in state.items():
        assert read[key].dtype == tensor.dtype, key
        assert torch.equal(read[key], tensor), key
        assert read[key].is_contiguous(), key
    torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert mark.exists(), "the file is indeed malicious"


def raw_pickle(path, content: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)


@pytest.mark.parametrize(
    "content",
    [
        b"cposix\nsystem\n(S'touch MARK'\ntR.",
        b"(S'touch MARK'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'touch MARK'\no.",
        b"cposix\nsystem\n(S'touch MARK'\nt\x81.",
        b'cbuiltins\neval\n(S\'__import__("os").system("touch MARK")\'\ntR}b.',
        b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S'touch MARK'\ntR.",
    ],
)
def test_no_opcode_calls_anything(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    raw_pickle(tmp_path / "x.pt", content)
    with pytest.raises(ValueError, match="x.pt"):
        convert_weights(tmp_path / "x.pt", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt"]


def rewrite(source, target, change, compression=zipfile.ZIP_STORED):
    """A copy of a zip file, its stored numbers changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if "/data/" in name else content)


def test_broken_files_are_named(tmp_path):
    state = {"a": torch.randn(100)}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="before PyTorch 1.6"):
        weights.read_weights(tmp_path / "old.pt")
    raw_pickle(tmp_path / "cut.pt", pickle.dumps({"a": 1}, 2)[:-3])
    with pytest.raises(ValueError, match="cut.pt is not a readable PyTorch file"):
        weights.read_weights(tmp_path / "cut.pt")
    with zipfile.ZipFile(tmp_path / "no.pt", "w") as archive:
        archive.writestr("archive/other", b"")
    with pytest.raises(ValueError, match="no.pt is not a readable PyTorch file"):
        weights.read_weights(tmp_path / "no.pt")
    torch.save(state, tmp_path / "good.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "short.pt", lambda content: content[:-8])
    with pytest.raises(ValueError, match="tensor 'a' cannot be read"):
        weights.read_weights(tmp_path / "short.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "packed.pt", lambda x: x, zipfile.ZIP_DEFLATED)
    assert equal(weights.read_weights(tmp_path / "packed.pt")[0], state)
    with zipfile.ZipFile(tmp_path / "packed.pt") as archive:
        member = next(x for x in archive.infolist() if "/data/" in x.filename)
    content = bytearray((tmp_path / "packed.pt").read_bytes())
    start = member.header_offset + 30 + len(member.filename)
    content[start : start + 40] = b"\xff" * 40
    (tmp_path / "packed.pt").write_bytes(content)
    with pytest.raises(ValueError, match="packed.pt: tensor 'a' cannot be read"):
        weights.read_weights(tmp_path / "packed.pt")
    with pytest.raises(ValueError, match="good.pt is no ManagerTower"):
        convert_weights(tmp_path / "good.pt", tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist"):
        convert_weights(tmp_path / "none.pt", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has neither .safetensors files nor"):
        convert_weights(tmp_path / "empty", tmp_path / "out")


def test_the_wrappers_of_training_frameworks_are_taken_off(tmp_path):
    state = {"a.weight": torch.randn(2), "b.bias": torch.randn(3)}

    def prefixed(prefix):
        return {prefix + key: tensor for key, tensor in state.items()}

    inner = {"a._orig_mod.weight": state["a.weight"], "b.bias": state["b.bias"]}
    for number, content in enumerate(
        (
            state,
            prefixed("module."),
            prefixed("_orig_mod."),
            prefixed("module._orig_mod."),
            prefixed("_orig_mod.module."),
            inner,
            {"model": state, "optimizer": {"state": {}}, "step": 3},
            {"model": prefixed("module."), "epoch": 1},
            {"module": state},
            {"state_dict": prefixed("_orig_mod."), "model": "MT"},
        )
    ):
        torch.save(content, tmp_path / f"{number}.pt")
        read, _ = weights.read_weights(tmp_path / f"{number}.pt")
        assert equal(read, state), number
    save_file(prefixed("module."), tmp_path / "x.safetensors")
    assert equal(weights.read_weights(tmp_path / "x.safetensors")[0], state)
    (tmp_path / "folder").mkdir()
    torch.save({"model": prefixed("module.")}, tmp_path / "folder" / "pytorch_model.bin")
    assert equal(weights.read_weights(tmp_path / "folder")[0], state)
    # a part of a model that is called so is no wrapper
    part = {"module.weight": torch.randn(2), "head.weight": torch.randn(1)}
    torch.save(part, tmp_path / "part.pt")
    assert equal(weights.read_weights(tmp_path / "part.pt")[0], part)
    torch.save({"a": torch.zeros(1), "_orig_mod.a": torch.ones(1)}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match="twice.pt: some weights are there twice"):
        weights.read_weights(tmp_path / "twice.pt")


def test_our_own_folder_is_no_foreign_one(tmp_path):
    tower = ManagerTower(ManagerTowerConfig.tiny())
    save_model(tower, tmp_path / "tower")
    mllm = LlavaManager(small_llava())
    save_model(mllm, tmp_path / "mllm")
    torch.save({"model": tower.state_dict(), "step": 3}, tmp_path / "training_state.pt")
    for source in ("tower", "tower/model.safetensors", "mllm", "training_state.pt"):
        message = f"{source}: these are weights of a model of this project, not published ones"
        with pytest.raises(ValueError, match=message):
            convert_weights(tmp_path / source, tmp_path / "out")
    encoder = tmp_path / "clip.safetensors"
    rows = expand(CLIP, "", "visual.", 3)
    save_file(contiguous(export_state(tower.image_encoder.state_dict(), rows)), encoder)
    for model, vision, text, message in (
        (tower, "tower", "tower", "tower: these are weights of a model of this project"),
        (tower, "clip.safetensors", "tower", "tower: these are weights"),
        (mllm, "mllm", "mllm", "mllm: these are weights"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_unimodal(model, tmp_path / vision, tmp_path / text)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- official -> our folders
@pytest.mark.parametrize(
    "name",
    present(
        "main.mt_aaue_vector",
        "main.mt_saue_scalar",
        "main.bt",
        "main.meter",
        "main.head_vqa",
        "main.head_nlvr2",
        "main.head_irtr_itm",
        "eqdim.head_mlm_itmitc_pretrain",
    ),
)
def test_official_checkpoints_become_folders_with_the_official_outputs(tmp_path, name):
    expected = golden_config(name)
    settings = {
        "num_heads": expected.num_heads,
        "drop_rate": 0.1,
        "max_text_len": expected.max_text_len,
        "model_type": "MT",
    }
    lightning_checkpoint(tmp_path / "x.ckpt", golden_state(name), settings)
    convert_weights(tmp_path / "x.ckpt", tmp_path / "out")
    heads = {"vision_heads": expected.vision_heads, "text_heads": expected.text_heads}
    model = load_model(tmp_path / "out", **heads).eval()
    unused = {"contrastive_size", "num_answers", "head_hidden_scale", "heads"}
    if expected.fusion != "manager":
        unused |= {field for field in vars(expected) if field.startswith("manage")}
    assert without(vars(model.config), *unused) == without(vars(expected), *unused)
    assert set(model.config.heads) == set(expected.heads)
    inputs, out = golden(name)
    if "infer.cls_feats" in out:
        features = model(inputs["image"], inputs["text_ids"], inputs["text_masks"])
        close(features.pooled, out["infer.cls_feats"], 5e-6)


@pytest.mark.slow
@needs("manifests")
def test_full_size_configs_are_inferred_from_shapes():
    cases = {
        "bt_pretrain": {"fusion": "bridge"},
        "mt_aaue_scalar_pretrain": {"manager_weight": "scalar"},
        "mt_saue_vector_pretrain": {"manager_type": "saue"},
        "mt_ftfpt_nlvr2": {"heads": ("nlvr2",), "image_size": 384},
        "mt_ftfpt_snli": {"heads": ("snli_ve",), "image_size": 384, "head_hidden_scale": 2},
        "mt_ftfpt_vqa": {"heads": ("vqa",), "image_size": 576, "head_hidden_scale": 2},
        "mt_ftfpt_flickr": {"heads": ("itm", "itc"), "image_size": 384, "max_text_len": 40},
    }
    for name, differs in cases.items():
        state = on_meta(name)
        config = ManagerTowerConfig.base(**differs)
        assert infer_config(state, {"max_text_len": config.max_text_len}) == config
        with torch.device("meta"):
            expected = {k: v.shape for k, v in ManagerTower(config).state_dict().items()}
        ours = from_official(state, config)
        assert {key: tensor.shape for key, tensor in ours.items()} == expected


@pytest.mark.slow
def test_damaged_official_states_are_named(tmp_path):
    """Whatever is missing, misshapen, no number or not finite, the converter says file and key."""
    config = ManagerTowerConfig.tiny(
        heads=("mlm", "itm"), vision_width=64, vision_heads=1, text_width=64, text_heads=1,
        hidden_size=64, num_heads=1,
    )  # fmt: skip
    official = to_official(ManagerTower(config).state_dict(), config)
    keys = [weights.official_keys()[our_key] for our_key, _ in weights.SIZES.values()]
    keys += [weights.official_keys()[our_key] for our_key in weights.COUNTS.values()]
    keys += ["vit_model.visual.positional_embedding", "cross_modal_text_layers.0.output.dense.bias"]
    keys += ["cross_modal_text_manager_tower.0.manager_layer.layer_scores"]
    damages = {
        "missing": None,
        "0-dim": torch.tensor(1.0),
        "1-dim": torch.ones(1),
        "empty": torch.zeros(0, 0),
        "5-dim": torch.zeros(3, 1, 1, 2, 1),
        "int": torch.zeros(4, dtype=torch.int64),
        "nan": torch.full((17, 64), torch.nan),
    }
    for key in {key for key in keys if key in official}:
        for name, damaged in damages.items():
            state = {**official, key: damaged}
            if damaged is None:
                del state[key]
            if key == "cross_modal_text_transform.weight" and name == "missing":
                continue  # by it the converter knows the layout
            file = tmp_path / "x.safetensors"
            save_file(contiguous(state), file)
            with pytest.raises(ValueError, match="x.safetensors: ") as error:
                convert_weights(file, tmp_path / "out")
            assert "\n" not in str(error.value)
            assert not (tmp_path / "out").exists()
    nan = torch.full((64,), torch.nan)
    for changed, message in (
        ({"text_transformer.embeddings.LayerNorm.bias": nan}, "not finite: .*LayerNorm.bias"),
        ({"itm_score.fc.bias": torch.zeros(2).int()}, "no floating-point.*: itm_score.fc.bias"),
    ):
        save_file(contiguous({**official, **changed}), file)
        with pytest.raises(ValueError, match=f"x.safetensors: .*{message}"):
            convert_weights(file, tmp_path / "out")
    lightning_checkpoint(tmp_path / "x.ckpt", official, {"max_text_len": "fifty"})
    with pytest.raises(ValueError, match="x.ckpt: the setting max_text_len is 'fifty'"):
        convert_weights(tmp_path / "x.ckpt", tmp_path / "out")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.ModuleDict(layers)

    def forward(self, x):
        return self.mlp["c_proj"](self.mlp["c_fc"](self.ln_2(self.ln_1(x))))


class Tower(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(Block(width), Block(width), Block(width))
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.proj = nn.Parameter(torch.randn(width, 5))
        self.positional_embedding = nn.Parameter(torch.randn(17, width))
        self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, x):
        patches = self.conv1(x).flatten(2).transpose(1, 2)
        x = patches + self.class_embedding + self.positional_embedding[1:]
        return self.ln_post(self.transformer.resblocks(self.ln_pre(x))) @ self.proj


class OpenAIClip(nn.Module):
    """The parameter names of OpenAI's release; its computation does not matter here."""

    def __init__(self, width):
        super().__init__()
        self.visual = Tower(width)
        self.text_projection = nn.Parameter(torch.randn(5, 5))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self, image):
        return self.visual(image) * self.logit_scale


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["TorchScript", "state"])
def test_openai_clip_fills_the_image_encoder(tmp_path, kind):
    config = ManagerTowerConfig.tiny(
        image_size=32, patch_size=8, vision_width=96, vision_layers=3, heads=()
    )
    clip = OpenAIClip(96)
    if kind == "TorchScript":
        torch.jit.trace(clip, torch.randn(1, 3, 32, 32)).save(tmp_path / "clip.pt")
    else:
        torch.save(clip.state_dict(), tmp_path / "clip.pt")
    convert_weights(tmp_path / "clip.pt", tmp_path / "clip")
    state = load_file(tmp_path / "clip" / "model.safetensors")
    assert equal(state, {k: v for k, v in clip.state_dict().items() if k.startswith("visual.")})
    model = ManagerTower(config)
    prefix = "text_transformer."
    official = to_official(model.state_dict(), config)
    roberta = {k.removeprefix(prefix): v for k, v in official.items() if k.startswith(prefix)}
    torch.save(roberta, tmp_path / "pytorch_model.bin")
    convert_weights(tmp_path / "pytorch_model.bin", tmp_path / "roberta")
    load_unimodal(model, tmp_path / "clip", tmp_path / "roberta")
    assert torch.equal(model.image_encoder.class_embedding, clip.visual.class_embedding)
    theirs = clip.visual.transformer.resblocks[2].mlp["c_fc"].weight
    assert torch.equal(model.image_encoder.blocks[2].fc.weight, theirs)


def bridgetower_config():
    transformers = pytest.importorskip("transformers")
    return transformers.BridgeTowerConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=3,
        contrastive_hidden_size=16,
        logit_scale_init_value=2.6592,
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "patch_size": 8,
            "image_size": 32,
        },
        text_config={
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "vocab_size": 90,
            "max_position_embeddings": 40,
        },
    )


@pytest.mark.parametrize(
    "name, safe",
    [
        ("Model", True),
        ("ForMaskedLM", True),
        ("ForImageAndTextRetrieval", False),
        ("ForContrastiveLearning", True),
    ],
)
def test_huggingface_bridgetower_has_equal_outputs(tmp_path, name, safe):
    hub = pytest.importorskip("transformers.models.bridgetower.modeling_bridgetower")
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32)
    ids = torch.randint(3, 90, (2, 9))
    ids[1, 6:] = 1
    mask = (ids != 1).long()
    theirs = getattr(hub, f"BridgeTower{name}")(bridgetower_config()).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path / name
    theirs.save_pretrained(folder)
    if not safe:  # older uploads
        torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    convert_weights(folder, tmp_path / "ours")
    model = load_model(tmp_path / "ours").eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        features = model(pixels, ids, mask)
    if name == "Model":
        # transformers has layer norm's epsilon 1e-5 in the cross-modal layers, officially 1e-12
        pairs = [
            (features.pooled, expected.pooler_output),
            (features.text[1, :6], expected.text_features[1, :6]),
            (features.image, expected.image_features),
        ]
    elif name == "ForMaskedLM":
        pairs = [(model.heads["mlm"](features.text)[:, :6], expected.logits[:, :6])]
    elif name == "ForImageAndTextRetrieval":
        pairs = [(model.heads["itm"](features.pooled), expected.logits)]
    else:
        text, image = model.contrast(model.encode_text(ids, mask), model.encode_image(pixels))
        pairs = [
            (text, expected.text_embeds),
            (image, expected.image_embeds),
            (1 / model.heads["itc"].temperature, theirs.logit_scale.exp()),
        ]
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference, atol=2e-4, rtol=1e-4)


@pytest.mark.slow
def test_damaged_huggingface_bridgetowers_are_named(tmp_path):
    hub = pytest.importorskip("transformers.models.bridgetower.modeling_bridgetower")
    peer = hub.BridgeTowerForContrastiveLearning(bridgetower_config())
    state = contiguous(peer.state_dict())
    settings = json.dumps(peer.config.to_dict(), default=str)
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text(settings)
    for ending in (
        "itc_image_head.fc.weight",
        "cross_modal_image_transform.bias",
        "token_type_embeddings.weight",
        "patch_embedding.weight",
        "logit_scale",
    ):
        key = next(k for k in state if k.endswith(ending) and "text_model" not in k)
        for damaged in (
            torch.tensor([1.0, 2.0, 3.0]),
            torch.zeros(1, 3),
            torch.zeros(2, dtype=torch.int64),
            torch.full((64,), torch.nan),
        ):
            save_file({**state, key: damaged}, file)
            # what has been renamed already has its official name
            message = f"{tmp_path}: .*({ending}|conv1.weight|temperature)"
            with pytest.raises(ValueError, match=message) as error:
                convert_weights(tmp_path, tmp_path / "out")
            assert "\n" not in str(error.value)
        if ending != "logit_scale":
            save_file(without(state, key), file)
            with pytest.raises(
                ValueError, match=f"{tmp_path}: .*missing: .*({ending}|conv1.weight)"
            ):
                convert_weights(tmp_path, tmp_path / "out")


@needs("main.head_vqa.json")
def test_weights_take_tokenizer_and_answers_along(tmp_path):
    save_file(contiguous(golden_state("main.head_vqa")), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="1 answers, but the model has 17"):
        convert_weights(tmp_path / "x.safetensors", tmp_path / "out", answers=["yes"])
    with pytest.raises(ValueError, match="no tokenizer at"):
        convert_weights(tmp_path / "x.safetensors", tmp_path / "out", tmp_path / "nothing")
    assert not (tmp_path / "out").exists()
    answers = [str(i) for i in range(17)]
    (tmp_path / "full").mkdir()
    train_tokenizer(["a b"], 300).save(tmp_path / "full")
    convert_weights(tmp_path / "x.safetensors", tmp_path / "out", tmp_path / "full", answers)
    assert json.loads((tmp_path / "out" / "answers.json").read_text())[16] == "16"
    assert load_model(tmp_path / "out").config.num_answers == 17
    ours = load_tokenizer(tmp_path / "out")
    theirs = load_tokenizer(tmp_path / "full")
    assert ours.encode("a b") == theirs.encode("a b")


def test_an_encoder_is_exported_under_its_published_names():
    encoder = ManagerTower(ManagerTowerConfig.tiny()).text_encoder
    exported = export_state(encoder.state_dict(), expand(ROBERTA, "", "roberta.", 3))
    assert exported["roberta.encoder.layer.2.attention.self.key.bias"].shape == (96,)
