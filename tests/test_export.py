"""export.py: what it writes is read again by transformers, with the same outputs, and by
load_model, with the same bits.
"""

import json

import pytest
import torch
from helpers import run_script_in_fork, save_tiny_towers

import multigrid
import scenes
from chat import IMAGE_TOKEN
from export import export_checkpoint, save_shards
from llava_manager import LlavaManager, LlavaManagerConfig
from model import ManagerTower, ManagerTowerConfig
from weights import config_of_encoders, load_model, load_unimodal, read_shards, save_model


def randomize(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save_bridge(folder, **overrides):
    """A small BridgeTower of sizes that transformers has too; returns it."""
    values = {
        "fusion": "bridge",
        "image_size": 32,
        "patch_size": 8,
        "vision_width": 64,
        "vision_heads": 1,
        "vision_layers": 2,
        "text_width": 64,
        "text_heads": 4,
        "text_layers": 2,
        "managed_layers_text": 2,
        "managed_layers_image": 2,
        "text_mlp_width": 256,
        "hidden_size": 64,
        "num_heads": 4,
        "num_layers": 2,
        "vocab_size": 300,
    }
    model = randomize(ManagerTower(ManagerTowerConfig.tiny(**{**values, **overrides})))
    save_model(model, folder)
    return model


def save_llava(folder, **overrides):
    """A small MLLM without managers, of 99 ids and a free row; returns it."""
    values = {
        "vision_width": 32,
        "vision_heads": 2,
        "vision_mlp_width": 64,
        "vocab_size": 100,
        "hidden_size": 48,
        "mlp_width": 80,
        "num_layers": 3,
        "inject_layers": (0, 2),
        "im_start_id": 98,
        "eos_ids": (),
        "manager_type": None,
        "aspect": "anyres_max_2",
        "grid_pinpoints": "(1x1),...,(3x3)",
    }
    model = randomize(LlavaManager(LlavaManagerConfig.tiny(**{**values, **overrides})))
    save_model(model, folder)
    return model


def same(ours, again):
    assert again.config == ours.config
    state = again.state_dict()
    assert state.keys() == ours.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def loaded_by_transformers(name, folder, unused=(), **settings):
    """A model of transformers; it must find all its weights, and use all but these keys."""
    transformers = pytest.importorskip("transformers")
    model, info = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, **settings
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(key.startswith(unused) for key in info["unexpected_keys"]), info["unexpected_keys"]
    return model.eval()


def tower_inputs(vocabulary=300):
    torch.manual_seed(1)
    ids = torch.randint(3, vocabulary, (2, 9))
    ids[1, 6:] = 1
    return torch.randn(2, 3, 32, 32), ids, (ids != 1).long()


# ---------------------------------------------------------------- the authors' layouts
@pytest.mark.parametrize("fusion", ["manager", "bridge", "last"])
def test_an_official_tower_has_the_same_bits(fusion, tmp_path):
    model = save_bridge(tmp_path / "ours", fusion=fusion)
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "out", "official")
    keys = read_shards(tmp_path / "out").keys()
    assert "vit_model.visual.transformer.resblocks.1.mlp.c_fc.weight" in keys
    same(model, load_model(tmp_path / "out"))


def test_an_official_tower_may_be_adapted_as_ours_may(tmp_path):
    save_bridge(tmp_path / "ours")
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "out", "official")
    larger = load_model(tmp_path / "out", image_size=64, heads=("itm",))
    assert len(larger.image_encoder.position_embedding) == 65


@pytest.mark.parametrize(
    "manager_type", [None, "static", "adaptive", "adaptive_average", "adaptive_cross"]
)
def test_an_official_mllm_has_the_same_bits(manager_type, tmp_path):
    managed = {"managed_layers": (1, 3), "inject_layers": (0, 2), "managed_grids": "base"}
    if manager_type is None:
        managed = {}
    model = save_llava(tmp_path / "ours", manager_type=manager_type, **managed)
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "out", "official")
    again = load_model(tmp_path / "out", im_start_id=98)
    if manager_type is None:  # the published config.json has no managed layers without managers
        again.config.managed_layers = model.config.managed_layers
        again.config.inject_layers = model.config.inject_layers
    same(model, again)


def test_shards_and_their_index_are_read_again(tmp_path):
    state = {f"layer.{i}": torch.full((1000,), float(i)) for i in range(12)}
    save_shards(state, tmp_path, 20_000)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 48_000
    again = read_shards(tmp_path)
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


# ---------------------------------------------------------------- transformers
def test_a_bridge_tower_is_that_of_transformers(tmp_path):
    model = save_bridge(tmp_path / "ours", heads=("mlm", "itm"))
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "out", "transformers")
    pixels, ids, mask = tower_inputs()
    with torch.no_grad():
        features = model(pixels, ids, mask)
        ours = {
            "BridgeTowerForMaskedLM": model.heads["mlm"](features.text),
            "BridgeTowerForImageAndTextRetrieval": model.heads["itm"](features.pooled),
        }
    for name, logits in ours.items():
        theirs = loaded_by_transformers(name, tmp_path / "out", ("mlm_score.", "itm_score."))
        with torch.no_grad():
            expected = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        # the epsilon of their cross-modal layer norms is 1e-5, and that of ours 1e-12
        if name.endswith("LM"):
            logits, expected = logits[1, :6], expected[1, :6]
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_a_bridge_tower_without_heads_is_the_bare_model(tmp_path):
    model = save_bridge(tmp_path / "ours", heads=())
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "out", "transformers")
    theirs = loaded_by_transformers("BridgeTowerModel", tmp_path / "out")
    pixels, ids, mask = tower_inputs()
    with torch.no_grad():
        ours = model(pixels, ids, mask).pooled
        expected = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).pooler_output
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)


def test_an_mllm_without_managers_is_that_of_transformers(tmp_path):
    model = save_llava(tmp_path / "ours")
    export_checkpoint(str(tmp_path / "ours"), tmp_path / "out", "transformers")
    theirs = loaded_by_transformers("LlavaOnevisionForConditionalGeneration", tmp_path / "out")
    picture = scenes.demo_source("captions", "heldout", 1).images(0)[0].resize((70, 40))
    image = multigrid.preprocess_image(picture, model.config)
    count = multigrid.count_image_tokens(len(image.pixels), image.size, model.config)
    with torch.no_grad():
        ours = model(torch.tensor([[1, 2, IMAGE_TOKEN, 4, 5]]), images=[image]).logits
        expected = theirs(
            input_ids=torch.tensor([[1, 2, *[theirs.config.image_token_index] * count, 4, 5]]),
            pixel_values=image.pixels[None],
            image_sizes=torch.tensor([image.size[::-1]]),
        ).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_the_encoders_of_a_tower_are_clip_and_roberta(tmp_path):
    model = save_bridge(tmp_path / "ours", fusion="manager")
    pixels, ids, mask = tower_inputs()
    for part in ("vision", "text"):
        export_checkpoint(str(tmp_path / "ours"), tmp_path / part, "transformers", part)
    clip = loaded_by_transformers("CLIPVisionModel", tmp_path / "vision")
    roberta = loaded_by_transformers("RobertaModel", tmp_path / "text", add_pooling_layer=False)
    with torch.no_grad():
        text = roberta(ids, mask, output_hidden_states=True).hidden_states
        image = clip(pixels, output_hidden_states=True).hidden_states
        text_experts = model.encode_text(ids, mask)
        image_experts = model.encode_image(pixels)
    for expert, reference in zip(text_experts.unbind(1)[::-1], text[::-1], strict=False):
        torch.testing.assert_close(expert[0], reference[0], atol=1e-4, rtol=1e-4)
    # the encoder's last norm is a part of each expert here, and of the pooled output there
    for expert, reference in zip(image_experts.unbind(1)[::-1], image[::-1], strict=False):
        reference = model.image_encoder.ln_post(reference)
        torch.testing.assert_close(expert, reference, atol=1e-4, rtol=1e-4)


def test_the_encoders_of_an_mllm_are_siglip_and_qwen2(tmp_path):
    model = save_llava(tmp_path / "ours", manager_type="static")
    for part in ("vision", "text"):
        export_checkpoint(str(tmp_path / "ours"), tmp_path / part, "transformers", part)
    siglip = loaded_by_transformers("SiglipVisionModel", tmp_path / "vision")
    qwen = loaded_by_transformers("Qwen2ForCausalLM", tmp_path / "text")
    pixels = torch.randn(2, 3, 32, 32)
    ids = torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        (ours,) = model.vision(pixels, [model.config.vision_layers - 1])
        expected = siglip(pixels, output_hidden_states=True).hidden_states[-1]
        logits = model(ids).logits
        torch.testing.assert_close(logits, qwen(ids).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"fusion": "manager"}, "no class for --fusion manager, only for bridge"),
        ({"fusion": "last"}, "no class for --fusion last"),
        ({"heads": ("vqa",)}, "no place for the vqa head"),
        ({"heads": ("itm", "itc")}, "no place for the itc head"),
        ({"text_heads": 2}, "has text_heads 4, but this model has 2"),
        ({"vision_heads": 2}, "has vision_heads 1, but this model has 2"),
    ],
)
def test_what_transformers_lacks_is_refused(overrides, words, tmp_path):
    save_bridge(tmp_path / "ours", **overrides)
    with pytest.raises(ValueError, match=words) as raised:
        export_checkpoint(str(tmp_path / "ours"), tmp_path / "out", "transformers")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "overrides, layout, words",
    [
        ({"manager_type": "static"}, "transformers", "no class for a model with managers"),
        ({"aspect": "square", "merge": "flat"}, "transformers", "but this model has square"),
        (
            {"manager_type": "static", "managed_layers": (0, 1, 3)},
            "official",
            "only say layers at even distances",
        ),
    ],
)
def test_what_a_layout_cannot_say_is_refused(overrides, layout, words, tmp_path):
    save_llava(tmp_path / "ours", **overrides)
    with pytest.raises(ValueError, match=words):
        export_checkpoint(str(tmp_path / "ours"), tmp_path / "out", layout)


@pytest.mark.parametrize(
    "part, kind, words",
    [("vision", {"vision_kind": "vit"}, "vision_kind clip"), ("text", {"text_kind": "bert"}, "ro")],
)
def test_encoders_of_other_kinds_are_refused(part, kind, words, tmp_path):
    save_bridge(tmp_path / "ours", fusion="manager", **kind)
    with pytest.raises(ValueError, match=f"--part exports .*{words}"):
        export_checkpoint(str(tmp_path / "ours"), tmp_path / "out", "transformers", part)
    with pytest.raises(ValueError, match="the official weights are of CLIP and RoBERTa"):
        export_checkpoint(str(tmp_path / "ours"), tmp_path / "out", "official")


def test_encoders_that_are_written_alone_are_taken_again(tmp_path):
    model = save_bridge(tmp_path / "ours", fusion="manager", image_mean=(0.5, 0.25, 0.75))
    for part in ("vision", "text"):
        export_checkpoint(str(tmp_path / "ours"), tmp_path / part, "transformers", part)
    fields = config_of_encoders(tmp_path / "vision", tmp_path / "text")
    for name, value in fields.items():
        assert value == getattr(model.config, name), name
    again = ManagerTower(model.config)
    load_unimodal(again, tmp_path / "vision", tmp_path / "text")
    for name in ("image_encoder", "text_encoder"):
        ours = getattr(model, name).state_dict()
        for key, tensor in getattr(again, name).state_dict().items():
            assert torch.equal(tensor, ours[key]), key


def test_an_sae_manager_has_no_official_layout(tmp_path):
    save_bridge(tmp_path / "ours", fusion="manager", manager_type="sae")
    with pytest.raises(ValueError, match="no official code"):
        export_checkpoint(str(tmp_path / "ours"), tmp_path / "out", "official")


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    save_bridge(tmp_path / "ours")
    for folder in (tmp_path / "ours", tmp_path / "ours" / "config.json"):
        with pytest.raises(ValueError, match="is there already; choose a new folder"):
            export_checkpoint(str(tmp_path / "ours"), folder, "official")


# ---------------------------------------------------------------- the model card, and the command
def test_the_card_has_the_numbers_of_the_run(tmp_path):
    save_bridge(tmp_path / "run")
    save_bridge(tmp_path / "run" / "best")
    rows = [
        {"step": 0, "header": {"torch": "2", "identity": {"seed": 7, "config": {"x": 1}}}},
        {"step": 5, "eval": {"itm_accuracy": 0.75, "score": 0.75}},
        {"step": 9, "eval": {"itm_accuracy": 0.5, "score": 0.5}},
        {"step": 9, "baselines": {"untrained": {"itm_accuracy": 0.25}}},
    ]
    log = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run" / "log.jsonl").write_text(log)
    for name, number in (("run", "0.5000"), ("run/best", "0.7500")):
        out = tmp_path / name.replace("/", "_out_")
        out = out.with_name(out.name + "_out")
        export_checkpoint(str(tmp_path / name), out, "official")
        card = (out / "README.md").read_text()
        assert f"| itm_accuracy | {number} | 0.2500 |" in card
        assert '"seed": 7' in card
        assert "library_name: pytorch" in card


def test_the_command_exports_a_checkpoint(tmp_path):
    root = save_tiny_towers(tmp_path)
    flags = ("--checkpoint", root / "vqa", "--out", tmp_path / "out", "--format", "official")
    ended = run_script_in_fork("prepare.py", "export", *flags)
    assert ended.returncode == 0, ended.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "answers.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    ended = run_script_in_fork("prepare.py", "export", *flags)
    assert ended.stderr.strip().endswith("is there already; choose a new folder")
    same(load_model(root / "vqa"), load_model(tmp_path / "out"))
