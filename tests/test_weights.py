"""weights.py: every layout against the published manifests and golden numbers, transformers' models
and hostile pickles; checkpoint folders of both families and of the first edition; bad weights.
"""

import dataclasses
import doctest
import functools
import json
import re
import time

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
    lightning_checkpoint,
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
    for reader in ("read_header", "read_safetensors"):
        monkeypatch.setattr(weights, reader, on_meta)
    load_unimodal(model, vision, text)

    def without_the_third_layer(name):
        return {key: tensor for key, tensor in on_meta(name).items() if ".3." not in key}

    monkeypatch.setattr(weights, "read_header", without_the_third_layer)
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


# ---------------------------------------------------------------- a config.json beside them
def hf_folders(root):
    """What transformers saves of CLIP and RoBERTa, in root/NAME; and the config of our model."""
    transformers = pytest.importorskip("transformers")
    vision, text, config = random_encoders(root)
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2},
            vision_config=vision.config.to_dict(),
        )
    )
    clip.vision_model.load_state_dict(vision.state_dict())
    masked = transformers.RobertaForMaskedLM(text.config)
    masked.roberta.load_state_dict(text.state_dict(), strict=False)
    for name, model in (
        ("CLIPVisionModel", vision),
        ("CLIPModel", clip),
        ("RobertaModel", text),
        ("RobertaForMaskedLM", masked),
    ):
        model.save_pretrained(root / name)
        model.save_pretrained(root / f"{name}-sharded", max_shard_size="100KB")
    return vision, text, config


def test_folders_that_transformers_saves_are_read(tmp_path):
    vision, text, config = hf_folders(tmp_path)
    pixels, ids, mask = tiny_batch(config)
    with torch.no_grad():
        image = vision(pixels, output_hidden_states=True).hidden_states[-1]
        words = text(ids, mask).last_hidden_state[mask.bool()]
    for ending in ("", "-sharded"):
        for clip in ("CLIPVisionModel", "CLIPModel"):
            for roberta in ("RobertaModel", "RobertaForMaskedLM"):
                model = ManagerTower(config).eval()
                load_unimodal(model, tmp_path / (clip + ending), tmp_path / (roberta + ending))
                with torch.no_grad():
                    close(model.image_encoder(pixels, [3])[0], image, 1e-4)
                    close(model.text_encoder(ids, mask, [3])[0][mask.bool()], words, 1e-4)


def change_json(file, part="", **values):
    """Other values of a JSON object, or of an object in it; ... removes a key."""
    content = json.loads(file.read_text())
    inner = content[part] if part else content
    for key, value in values.items():
        inner.pop(key, None)
        if value is not ...:
            inner[key] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name, part, values, message",
    [
        ("CLIPModel", "vision_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'quick"),
        ("CLIPVisionModel", "", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'quick_gelu'"),
        ("CLIPVisionModel", "", {"num_attention_heads": 8}, "is 8, but .* --vision_heads 4"),
        ("CLIPVisionModel", "", {"num_attention_heads": ...}, "is 12, but .* --vision_heads 4"),
        ("CLIPVisionModel", "", {"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06; only 1e-05"),
        ("CLIPVisionModel", "", {"layer_norm_eps": "1e-5"}, "layer_norm_eps is '1e-5'"),
        ("CLIPVisionModel", "", {"model_type": "siglip"}, "model_type is 'siglip'; it must be cl"),
        ("CLIPModel", "", {"vision_config": "x"}, "vision_config is 'x'; it must be an object"),
        ("RobertaModel", "", {"hidden_act": "relu"}, "hidden_act is 'relu'; only 'gelu'"),
        ("RobertaModel", "", {"layer_norm_eps": ...}, "layer_norm_eps is 1e-12; only 1e-05"),
        ("RobertaModel", "", {"num_attention_heads": 8}, "is 8, but .* --text_heads 4"),
        ("RobertaModel", "", {"pad_token_id": 0}, "is 0, but .* --pad_token_id 1"),
        ("RobertaModel", "", {"position_embedding_type": "relative_key"}, "position_embedding_ty"),
        ("RobertaModel", "", {"model_type": "bert"}, "model_type is 'bert'; it must be roberta"),
        ("RobertaForMaskedLM", "", {"is_decoder": True}, "is_decoder is True"),
    ],
)
def test_settings_that_differ_from_the_models_are_named(tmp_path, name, part, values, message):
    _, _, config = hf_folders(tmp_path)
    file = tmp_path / name / "config.json"
    change_json(file, part, **values)
    vision = name if "CLIP" in name else "CLIPModel"
    text = name if "Roberta" in name else "RobertaModel"
    for given in (tmp_path / vision, tmp_path / vision / "model.safetensors"):
        with pytest.raises(ValueError, match=f"{file}: .*{message}"):
            load_unimodal(ManagerTower(config), given, tmp_path / text)
    for content, problem in (("[1]", "must hold an object"), ("{", "is not JSON")):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"{file} {problem}"):
            load_unimodal(ManagerTower(config), tmp_path / vision, tmp_path / text)
    file.unlink()  # weights alone are taken as they are
    load_unimodal(ManagerTower(config), tmp_path / vision, tmp_path / text)


def test_llava_starts_from_what_transformers_saves(tmp_path):
    transformers = pytest.importorskip("transformers")
    text, vision = hf_configs()
    qwen = randomize(transformers.Qwen2ForCausalLM(text))
    siglip = randomize(transformers.SiglipVisionModel(vision))
    whole = transformers.SiglipModel(
        transformers.SiglipConfig(
            text_config={"vocab_size": 9, "hidden_size": 32, "num_attention_heads": 2},
            vision_config=vision.to_dict(),
        )
    )
    whole.vision_model.load_state_dict(siglip.state_dict())
    for name, model in (
        ("Qwen2ForCausalLM", qwen),
        ("Qwen2Model", qwen.model),
        ("SiglipVisionModel", siglip),
        ("SiglipModel", whole),
    ):
        model.save_pretrained(tmp_path / name)
    ids = torch.randint(0, 98, (2, 12))
    pixels = torch.randn(2, 3, 32, 32)
    state = siglip(pixels, output_hidden_states=True).hidden_states[3]
    for vision_name in ("SiglipVisionModel", "SiglipModel"):
        for text_name in ("Qwen2ForCausalLM", "Qwen2Model"):
            configs = []
            for name in (text_name, vision_name):
                configs.append(json.loads((tmp_path / name / "config.json").read_text()))
            config = LlavaManagerConfig.from_official(*configs)
            assert config.rope_theta == 1e6
            model = LlavaManager(config).eval()
            load_unimodal(model, tmp_path / vision_name, tmp_path / text_name)
            close(model.vision(pixels, [3])[0], state, 1e-4)
            close(model(ids).logits, qwen(ids).logits, 1e-4)
    for values, message in (
        ({"num_attention_heads": 8}, "num_attention_heads is 8, but .* --num_heads 4"),
        ({"num_attention_heads": 4, "rope_parameters": {"rope_theta": 9.0}}, "rope_theta is 9.0"),
    ):
        change_json(tmp_path / "Qwen2Model" / "config.json", **values)
        with pytest.raises(ValueError, match=f"config.json: {message}"):
            load_unimodal(model, tmp_path / "SiglipModel", tmp_path / "Qwen2Model")
    change_json(tmp_path / "SiglipModel" / "config.json", "vision_config", hidden_act="gelu")
    with pytest.raises(ValueError, match="hidden_act is 'gelu'; only 'gelu_pytorch_tanh'"):
        load_unimodal(model, tmp_path / "SiglipModel", tmp_path / "Qwen2ForCausalLM")


def test_a_converted_encoder_keeps_its_config(tmp_path):
    _, _, config = hf_folders(tmp_path)
    change_json(tmp_path / "CLIPModel" / "config.json", "vision_config", hidden_act="gelu")
    convert_weights(tmp_path / "CLIPModel", tmp_path / "out")
    with pytest.raises(ValueError, match="out/config.json: .*hidden_act is 'gelu'"):
        load_unimodal(ManagerTower(config), tmp_path / "out", tmp_path / "RobertaModel")
    state = read_safetensors(tmp_path / "CLIPModel")
    key = "vision_model.embeddings.class_embedding"
    save_file({**state, key: torch.tensor(1.0)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"x.safetensors: wrong shape: {key} is \(\)"):
        convert_weights(tmp_path / "x.safetensors", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "part, values, message",
    [
        ("", {"link_tower_type": "interpolate"}, "link_tower_type is 'interpolate'; only 'add'"),
        ("text_config", {"hidden_act": "relu"}, "text_config .*hidden_act is 'relu'; only 'gelu'"),
        ("", {"text_config": "x"}, "text_config of its config.json is 'x'; it must be an object"),
        ("", {"model_type": "bert"}, "model_type is 'bert'; only 'bridgetower'"),
        ("", {"layer_norm_eps": 1e-3}, "the whole .*layer_norm_eps is 0.001; only 1e-05"),
        ("", {"share_cross_modal_transformer_layers": False}, "only True is supported"),
        ("", {"num_hidden_layers": 2}, "num_hidden_layers of the whole is 2, .*have 3"),
        ("text_config", {"num_hidden_layers": 3}, "of text_config is 3, but the weights have 4"),
        ("text_config", {"is_decoder": True}, "is_decoder is True; only False"),
        ("text_config", {"num_attention_heads": ...}, "64 is not a multiple of text_heads 12"),
        ("", {"text_config": ...}, "text_heads 12"),
        ("text_config", {"pad_token_id": -1}, "pad_token_id is -1"),
        ("text_config", {"pad_token_id": 39}, "which is 40, and a text"),
        ("vision_config", {"remove_last_layer": True}, "remove_last_layer is True; only False"),
    ],
)
def test_settings_of_a_bridgetower_that_differ_are_named(tmp_path, part, values, message):
    transformers = pytest.importorskip("transformers")
    transformers.BridgeTowerModel(bridgetower_config()).save_pretrained(tmp_path / "bt")
    change_json(tmp_path / "bt" / "config.json", part, **values)
    with pytest.raises(ValueError, match=f"bt: .*{message}"):
        convert_weights(tmp_path / "bt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- headers
def header_only(path, header, length=None, body=b""):
    """A .safetensors file with any header."""
    content = json.dumps(header).encode() if isinstance(header, dict) else header
    size = len(content) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + content + body)


@pytest.mark.parametrize(
    "header, length, body",
    [
        ({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}, None, b"x" * 8),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}}, None, b"x" * 8),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, None, b"x" * 8),
        ({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}, None, b"x" * 8),
        ({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, None, b"x" * 8),
        ({"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, None, b""),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            None,
            b"x" * 12,
        ),
        ({}, 2**62, b""),
        (b"[" * 9999, None, b""),
        (b"\xff\xfe", None, b""),
        ({"a": 1}, None, b""),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, length, body):
    save_model(ManagerTower(ManagerTowerConfig.tiny(heads=("vqa",))), tmp_path)
    header_only(tmp_path / "model.safetensors", header, length, body)
    with pytest.raises(ValueError, match="model.safetensors") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_what_is_no_file_of_weights_is_said(tmp_path):
    save_model(ManagerTower(ManagerTowerConfig.tiny(heads=("vqa",))), tmp_path)
    file = tmp_path / "model.safetensors"
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match="model.safetensors is not a .safetensors file"):
        load_model(tmp_path)
    file.rmdir()
    file.symlink_to(file)
    with pytest.raises(ValueError, match="model.safetensors is not a .safetensors file"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_layers": 900}, "num_layers is 900, but the file has only"),
        ({"vision_layers": 1000}, "vision_layers is 1000, but the file has only"),
        ({"num_layers": 10**6}, "num_layers is 1000000; it must be .* to 1000"),
        ({"text_width": 99_999}, "text_encoder.* in the file, .*99999.* in the model"),
        ({"vocab_size": 9_999_999}, "word_embedding.*300, 96.* in the file, .9999999, 96. in"),
        ({"vision_width": 10**9}, "vision_width is 1000000000"),
        ({"image_size": 4096, "patch_size": 1}, "patch.weight"),
        ({"vocab_size": 1}, "pad_token_id is 1, but the ids of vocab_size 1 end at 0"),
        ({"image_size": 65}, "image_size 65 is not a multiple of patch_size 16"),
        ({"hidden_size": 96.0}, "hidden_size is 96.0"),
        ({"heads": [["vqa"]]}, "heads is"),
        ({"heads": {"vqa": 1}}, "heads is"),
        ({"transform": ["x"]}, ""),
    ],
)
def test_a_config_that_is_not_the_files_costs_nothing(tmp_path, values, message):
    save_model(ManagerTower(ManagerTowerConfig.tiny(heads=("vqa",))), tmp_path)
    change_json(tmp_path / "config.json", **{"text_heads": 1, **values})
    if not message:
        train_tokenizer(["a b"], 300).save(tmp_path)
        with pytest.raises(ValueError, match="unknown image transform"):
            weights.load_two_tower(str(tmp_path), "vqa", "cpu")
        return
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
    assert time.monotonic() - start < 2


def test_a_llava_config_that_is_not_the_files_costs_nothing(tmp_path):
    save_model(LlavaManager(small_llava()), tmp_path)
    for values, message in (
        ({"num_layers": 1000}, "num_layers is 1000, but the file has only"),
        (
            {"hidden_size": 96_000},
            r"wrong shape: .*embed.weight is \(100, 48\), should be .100, 96000",
        ),
        ({"vision_mlp_width": 99_999}, "wrong shape"),
    ):
        config = tmp_path / "config.json"
        before = config.read_text()
        change_json(config, **values)
        start = time.monotonic()
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
        assert time.monotonic() - start < 2
        config.write_text(before)


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
    answers = r"heads.vqa.fc_out.bias: \(9,\) in the file, \(8,\) in the model"
    for overrides, message in (
        ({"num_answers": 8}, answers),
        ({"num_layers": 3}, "--num_layers is 3, but .* has 2"),
        ({"patch_size": 8}, "--patch_size is 8, but .* has 16"),
        ({"num_heads": 6}, "--num_heads is 6, but .* has 3"),
        ({"vision_heads": 4}, "--vision_heads is 4, but .* has 3"),
        ({"managed_layers_text": 2}, "--managed_layers_text is 2, but .* has 3"),
        ({"pad_token_id": 0}, "--pad_token_id is 0, but .* has 1"),
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
        ("{", "config.json is not JSON"),
        ("[1]", "config.json must hold an object"),
        ("[" * 99999, "config.json is not JSON: brackets"),
        ('{"model_type": "clip", "hidden_size": 9}', 'it has no "model": "ManagerTower"'),
        (config.replace('"num_heads": 3', '"num_heads": -3'), "config.json: num_heads is -3"),
        (config.replace('"num_heads": 3', '"num_heads": "3"'), "config.json: num_heads is '3'"),
        (re.sub(r'"heads": \[[^]]*\]', '"heads": null', config), "config.json: "),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model": "LlavaManager"}')
    with pytest.raises(ValueError, match="of a ManagerTower: its .model. is 'LlavaManager'"):
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
    chat_tokenizer = train_tokenizer(["a b"], 300, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    mllm = LlavaManager(small_llava(vocab_size=300, im_start_id=1))
    save_model(mllm, tmp_path / "mllm")
    chat_tokenizer.save(tmp_path / "mllm")
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


def chat_tokenizer(words="a b", specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
    return train_tokenizer([words], 300, specials)


@pytest.mark.parametrize(
    "tokenizer, message",
    [
        (chat_tokenizer, "lacks a special token <s> or"),
        (lambda: train_tokenizer(["a b c d e f g h"] * 9 + ["abc def"] * 9, 400), "ids .0 to"),
        (lambda: train_tokenizer(["a"], 290, ("<pad>", "<s>", "</s>")), "has pad id 0, the model"),
        (lambda: train_tokenizer(["a"], 290, ("<s>", "</s>")), "lacks a special token <pad> or"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer, message):
    config = ManagerTowerConfig.tiny(heads=("vqa",), vocab_size=262)
    save_model(ManagerTower(config), tmp_path)
    tokenizer().save(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer .*{message}"):
        weights.load_two_tower(str(tmp_path), "vqa", "cpu")


@pytest.mark.parametrize(
    "tokenizer, message",
    [
        (lambda: train_tokenizer(["a"], 290), "lacks a special token <.im_start.>"),
        (lambda: chat_tokenizer(specials=("<|im_start|>",)), "lacks a special token <.im_end.>"),
        (lambda: chat_tokenizer(specials=("<|im_start|>", "<|im_end|>")), "as id 0, the model has"),
        (
            lambda: chat_tokenizer(specials=("<pad>", "<|im_start|>", "<|im_end|>", "<x>")),
            "ids .0 to",
        ),
    ],
)
def test_a_tokenizer_of_another_llava_is_refused(tmp_path, tokenizer, message):
    save_model(LlavaManager(small_llava(vocab_size=259, im_start_id=1)), tmp_path)
    tokenizer().save(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer .*{message}"):
        weights.load_mllm(str(tmp_path), "", "cpu")


def test_an_official_llava_takes_im_start_from_its_tokenizer(tmp_path):
    official = {**read_llava("tiny/config_static_all.json"), "eos_token_id": 319}
    config = llava_config("static_all")
    model = LlavaManager(config)
    save_file(contiguous(to_official(model.state_dict(), model.config)), tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(official))
    chat_tokenizer().save(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        vision = official["tiny_vision_config"]
        patch.setattr(weights, "load_llava", functools.partial(weights.load_llava, vision=vision))
        loaded = weights.load_mllm(str(tmp_path), "", "cpu")
    assert loaded.model.config.im_start_id == 1


def random_picture():
    pixels = np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ---------------------------------------------------------------- any file of weights
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
    # the file does not say how many heads the encoders have: the user has to
    file = tmp_path / "out" / "config.json"
    values = json.loads(file.read_text())
    values.update(vision_heads=expected.vision_heads, text_heads=expected.text_heads)
    file.write_text(json.dumps(values))
    model = load_model(tmp_path / "out").eval()
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


# ---------------------------------------------------------------- settings, growth, wrong arguments
def test_a_bridgetower_may_have_another_padding_token(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = bridgetower_config()
    config.text_config.pad_token_id = 0
    theirs = randomize(transformers.BridgeTowerForMaskedLM(config))
    theirs.save_pretrained(tmp_path / "bt")
    convert_weights(tmp_path / "bt", tmp_path / "out")
    model = load_model(tmp_path / "out").eval()
    assert model.config.pad_token_id == 0
    pixels = torch.randn(2, 3, 32, 32)
    ids = torch.randint(3, 90, (2, 9))
    ids[1, 6:] = 0
    mask = (ids != 0).long()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        logits = model.heads["mlm"](model(pixels, ids, mask).text)
    torch.testing.assert_close(logits[:, :6], expected[:, :6], atol=5e-3, rtol=1e-3)


def as_bin(folder):
    """The weights of a folder in PyTorch's format instead."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_the_advice_for_bin_files_works_for_every_encoder(tmp_path):
    """load_unimodal names a command, and what that writes is read."""
    transformers = pytest.importorskip("transformers")
    text, vision = hf_configs()
    transformers.Qwen2ForCausalLM(text).save_pretrained(tmp_path / "Qwen2ForCausalLM")
    transformers.Qwen2Model(text).save_pretrained(tmp_path / "Qwen2Model")
    transformers.SiglipVisionModel(vision).save_pretrained(tmp_path / "siglip")
    configs = []
    for name in ("Qwen2ForCausalLM", "siglip"):
        configs.append(json.loads((tmp_path / name / "config.json").read_text()))
    config = LlavaManagerConfig.from_official(*configs)
    expected = LlavaManager(config)
    load_unimodal(expected, tmp_path / "siglip", tmp_path / "Qwen2ForCausalLM")
    for name in ("Qwen2ForCausalLM", "Qwen2Model", "siglip"):
        as_bin(tmp_path / name)
    with pytest.raises(ValueError, match="prepare.py weights` makes a folder"):
        load_unimodal(LlavaManager(config), tmp_path / "siglip", tmp_path / "Qwen2ForCausalLM")
    for name in ("Qwen2ForCausalLM", "Qwen2Model", "siglip"):
        convert_weights(tmp_path / name, tmp_path / "new" / name)
    model = LlavaManager(config)
    load_unimodal(model, tmp_path / "new" / "siglip", tmp_path / "new" / "Qwen2ForCausalLM")
    assert torch.equal(model.llm.embed.weight, expected.llm.embed.weight)
    key = "vision.blocks.0.qkv.weight"
    assert torch.equal(model.state_dict()[key], expected.state_dict()[key])
    if config.tie_embeddings:
        load_unimodal(model, tmp_path / "new" / "siglip", tmp_path / "new" / "Qwen2Model")


def test_the_advice_for_bin_files_works_for_an_official_llava(tmp_path):
    official = {**read_llava("tiny/config_static_all.json"), "eos_token_id": 319}
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(official))
    state = llava_state("static_all")
    torch.save(state, folder / "pytorch_model.bin")
    load = functools.partial(load_model, vision=official["tiny_vision_config"], im_start_id=318)
    with pytest.raises(ValueError, match="prepare.py weights` makes a folder"):
        load(folder)
    convert_weights(folder, tmp_path / "new")
    expected = from_official(state, llava_config("static_all"))
    assert equal(load(tmp_path / "new").state_dict(), expected)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3", "falcon", "my_own", 5, ["qwen2"]])
def test_every_other_family_is_refused_by_name(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    text, vision = hf_configs()
    transformers.Qwen2ForCausalLM(text).save_pretrained(tmp_path / "qwen")
    transformers.SiglipVisionModel(vision).save_pretrained(tmp_path / "siglip")
    model = LlavaManager(small_llava())
    change_json(tmp_path / "qwen" / "config.json", model_type=kind)
    shown = re.escape(repr(kind))
    with pytest.raises(ValueError, match=f"model_type is {shown}; it must be qwen2 or llava"):
        load_unimodal(model, tmp_path / "siglip", tmp_path / "qwen")
    with pytest.raises(ValueError, match=f"model_type is {shown}; it must be qwen2 or llava"):
        convert_weights(tmp_path / "qwen", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arguments_of_another_type_are_named(tmp_path):
    tower = ManagerTower(ManagerTowerConfig.tiny(heads=("vqa",)))
    save_model(tower, tmp_path / "tower")
    save_model(LlavaManager(small_llava()), tmp_path / "llava")
    for call, message in (
        (lambda: load_model(None), "load_model: folder is None; it must be a text or a Path"),
        (lambda: load_model(3), "load_model: folder is 3; it must be a text or a Path"),
        (lambda: load_model(tmp_path / "llava", dtype="bf16"), "dtype is 'bf16'; it must be a dt"),
        (lambda: load_model(tmp_path / "llava", device="gpu"), "device means nothing for .*llava"),
        (lambda: load_model(tmp_path / "tower", dtype=torch.float16), "dtype means nothing for"),
        (lambda: load_model(tmp_path / "tower", heads=3), "heads is 3"),
        (lambda: load_model(tmp_path / "tower", heads=None), "heads is None"),
        (lambda: weights.load_two_tower(tmp_path / "tower", device="gpu"), "is 'gpu'; it must be"),
        (lambda: weights.load_two_tower(tmp_path / "tower", device=None), "device is None; it mus"),
        (lambda: weights.load_mllm(tmp_path / "llava", tokenizer=4), "tokenizer is 4; it must be"),
        (lambda: load_unimodal(None, "a", "b"), "model is None; it must be ManagerTower or Llava"),
        (lambda: load_unimodal(tower, None, "b"), "vision is None; it must be a text or a Path"),
        (lambda: convert_weights(tmp_path, None), "out is None; it must be a text or a Path"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_no_sentence_holds_an_empty_list(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    torch.save({}, tmp_path / "empty.pt")
    for name in ("empty.safetensors", "empty.pt"):
        with pytest.raises(ValueError, match=f"{name} is no ManagerTower, .*: it holds no tensor"):
            convert_weights(tmp_path / name, tmp_path / "out")
    save_file({"x" * 900: torch.zeros(1)}, tmp_path / "long.safetensors")
    with pytest.raises(ValueError, match="it has the keys xxx.*") as error:
        convert_weights(tmp_path / "long.safetensors", tmp_path / "out")
    assert len(str(error.value)) < 600
    save_model(ManagerTower(ManagerTowerConfig.tiny(heads=())), tmp_path / "headless")
    with pytest.raises(ValueError, match="has no itm head: it has no heads"):
        weights.load_two_tower(str(tmp_path / "headless"), "itm", "cpu")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match='it has no "model": "ManagerTower", which'):
        load_model(tmp_path / "hf")
