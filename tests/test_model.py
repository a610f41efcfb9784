"""Parity of manager.py and model.py with the official ManagerTower, BridgeTower and METER code (golden numbers), and with
transformers' encoders on random weights."""
import dataclasses
import json

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import manager
import model as model_module
from manager import AdaptiveManager, StaticManager, standardize
from model import (
    ManagerTower,
    ManagerTowerConfig,
    from_official,
    load_model,
    load_unimodal,
    resize_position_embedding,
    save_model,
    to_official,
)

MT = GOLDEN / "manager_tower"
HEADS = {"mlm": "mlm", "itm": "itm", "itc": "itc", "itm_itc": "itc itm", "irtr_itm_itc": "itc itm", "vqa": "vqa", "nlvr2": "nlvr2",
         "snli": "snli_ve", "irtr": "retrieval"}
VARIANTS = ["mt_aaue_vector", "mt_saue_vector", "mt_aaue_scalar", "mt_saue_scalar", "bt", "meter"]


def meta(name):
    return json.loads((MT / f"{name}.json").read_text())


def present(*names):
    """The golden cases that this golden set holds; the full set has them all."""
    found = [n for n in names if (MT / f"{n}.json").exists() and (MT / f"{n}.out.safetensors").exists()]
    assert found, f"no golden file of {names} in {MT}"
    return found


def golden_state(name):
    state = meta(name)["state"]
    out = {k: v for k, v in load_file(MT / state["base"]).items() if k not in set(state["base_keys_not_in_model"])}
    out.update(load_file(MT / state["delta"]) if state["delta"] else {})
    assert len(out) == state["n_keys"]
    return out


def golden_config(name):
    j = meta(name)
    c, v, t = j["config"], j["vision"], j["text"]
    heads = {h for task, on in c["loss_names"].items() if on for h in HEADS[task].split()}
    fusion = {"MT": "manager", "BT": "bridge", "METER": "last"}[j["model_type"]]
    if c["meter_fusion"]:
        fusion = "last"
    return ManagerTowerConfig(
        image_size=c["image_size"], patch_size=c["patch_size"], vision_width=v["width"], vision_layers=v["layers"],
        vision_heads=v["heads"], vocab_size=t["vocab"], max_positions=t["max_pos"], text_width=t["hidden"],
        text_layers=t["layers"], text_heads=t["heads"], text_mlp_width=t["intermediate"], hidden_size=c["hidden_size"],
        num_layers=c["num_layers"], num_heads=c["num_heads"], contrastive_size=c["contrastive_hidden_size"], fusion=fusion,
        manager_type=c["manager_type"].lower(), manager_weight=c["manager_weight_type"],
        managed_layers_text=c["managed_layers_text"], managed_layers_image=c["managed_layers_image"],
        heads=tuple(sorted(heads)), num_answers=c["vqav2_label_size"], head_hidden_scale=c["head_hidden_scale"],
        max_text_len=c["max_text_len"])


def golden_model(name):
    config = golden_config(name)
    model = ManagerTower(config)
    model.load_state_dict(from_official(golden_state(name), config), strict=True, assign=True)
    return model.eval()


def golden(name):
    return load_file(MT / f"{name.split('.')[0]}.inputs.safetensors"), load_file(MT / f"{name}.out.safetensors")


def close(ours, theirs, atol):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def check_gradients(model, out, prefix, atol=2e-5):
    """Every stored gradient, under its official name; `NAME[:k]` holds the first k rows."""
    ours = to_official({k: p.grad for k, p in model.named_parameters() if p.grad is not None}, model.config)
    stored = [k for k in out if k.startswith(prefix)]
    assert stored
    for key in stored:
        name, _, rows = key.removeprefix(prefix).partition("[:")
        grad = ours[name][: int(rows[:-1])] if rows else ours[name]
        close(grad, out[key], max(atol, 1e-4 * out[key].abs().max().item()))


@pytest.mark.parametrize("name", present(*(f"main.{v}" for v in VARIANTS)))
def test_every_layer_of_the_forward_pass(name):
    model, (inputs, out) = golden_model(name), golden(name)
    hooked = {}
    for m in ("text", "image"):
        for part, modules in (("cross.{}.layer", getattr(model, f"{m}_layers")), ("manager.{}", getattr(model, f"{m}_managers", []))):
            for i, module in enumerate(modules):
                key = f"infer.{part.format(m)}.{i}" + (".out" if part.startswith("manager") else "")
                module.register_forward_hook(lambda _m, _i, o, key=key: hooked.__setitem__(key, o))
        for i, module in enumerate(getattr(model, f"{m}_bridges", [])):
            key = f"infer.link.{m}." + (f"{i - 1}.out" if i else "first_layernorm")
            module.register_forward_hook(lambda _m, _i, o, key=key: hooked.__setitem__(key, o))
    with torch.no_grad():
        text_experts, image_experts = model.encode_text(inputs["text_ids"], inputs["text_masks"]), model.encode_image(inputs["image"])
        features = model(inputs["image"], inputs["text_ids"].int(), inputs["text_masks"].int())
        first = dict(hooked)
        masked = model(inputs["image"], inputs["text_ids_mlm"], inputs["text_masks"])
    seen = first | {"infer.text_feats": features.text, "infer.image_feats": features.image}
    if "infer.stack.text.pre_transform" in out:
        seen |= {"infer.stack.text.pre_transform": text_experts, "infer.stack.image.pre_transform": image_experts}
    assert len(seen) >= 8 and not set(seen) - set(out)
    for key, value in seen.items():
        close(value, out[key], 5e-5)
    close(features.pooled, out["infer.cls_feats"], 5e-6)
    close(model.heads["itm"](features.pooled), out["infer.itm_logits"], 2e-5)
    close(model.heads["mlm"](masked.text), out["infer_mlm.mlm_logits"], 2e-5)


@pytest.mark.parametrize("name", present(*(f"main.{v}" for v in VARIANTS)))
def test_mlm_and_itm_losses_and_gradients(name):
    model, (inputs, out) = golden_model(name), golden(name)
    text = model(inputs["image"], inputs["text_ids_mlm"], inputs["text_masks"]).text
    mlm = F.cross_entropy(model.heads["mlm"](text).flatten(0, 1), inputs["text_labels_mlm"].flatten())
    match = out["loss_mlm_itm.itm_labels"].long()
    images = torch.where(match[:, None, None, None] == 1, inputs["image"], inputs["image_b"])
    logits = model.heads["itm"](model(images, inputs["text_ids"], inputs["text_masks"]).pooled)
    itm = F.cross_entropy(logits, match)
    close(logits, out["loss_mlm_itm.itm_logits"], 2e-5)
    close(mlm, out["loss_mlm_itm.mlm_loss"], 1e-5)
    close(itm, out["loss_mlm_itm.itm_loss"], 1e-5)
    (mlm + itm).backward()
    check_gradients(model, out, "loss_mlm_itm.grad.")


@pytest.mark.parametrize("name", present("main.mt_aaue_vector", "main.mt_saue_vector", "main.mt_aaue_scalar"))
def test_training_noise(name, monkeypatch):
    model, (inputs, out) = golden_model(name), golden(name)
    recorded = [out[f"train_noise.noise.{m}.{i}"] for i in range(model.config.num_layers) for m in ("text", "image")]
    monkeypatch.setattr(manager, "draw_noise", lambda experts: recorded.pop(0))
    model.text_managers.train(), model.image_managers.train()
    with torch.no_grad():
        features = model(inputs["image"], inputs["text_ids"], inputs["text_masks"])
    assert not recorded
    close(features.text, out["train_noise.text_feats"], 5e-5)
    close(features.image, out["train_noise.image_feats"], 5e-5)
    close(features.pooled, out["train_noise.cls_feats"], 1e-5)


def test_noise_has_the_papers_standard_deviation():
    torch.manual_seed(0)
    noise = manager.draw_noise(torch.zeros(8, 4, 50, 32))
    assert abs(noise.std().item() * 4 - 1) < 0.01 and abs(noise.mean().item()) < 0.005


@pytest.mark.skipif(not (MT / "main.eps_probe.safetensors").exists(), reason="this golden set has no epsilon probe")
@pytest.mark.parametrize("variant", ["mt_aaue_vector", "bt"])
def test_epsilon_probe(variant):
    state = golden_state(f"main.{variant}")
    for k, v in state.items():
        if (v.dim() == 1 and "softmax_temperature" not in k) or "embedding" in k or "conv1.weight" in k:
            state[k] = 0.003 * v if v.is_floating_point() else v
    config = golden_config(f"main.{variant}")
    model = ManagerTower(config).eval()
    model.load_state_dict(from_official(state, config))
    inputs, out = golden(f"main.{variant}")[0], load_file(MT / "main.eps_probe.safetensors")
    with torch.no_grad():
        features = model(inputs["image"], inputs["text_ids"], inputs["text_masks"])
        logits = model.heads["mlm"](model(inputs["image"], inputs["text_ids_mlm"], inputs["text_masks"]).text)[0]
    for key, value in {"cls_feats": features.pooled, "image_feats": features.image, "text_feats": features.text,
                       "mlm_logits_first_row": logits}.items():
        torch.testing.assert_close(value, out[f"{variant}.{key}"], rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not (MT / "main.padding_demo.safetensors").exists(), reason="this golden set has no padding demo")
def test_padding_reaches_the_fused_query_unless_masked():
    model, (inputs, out) = golden_model("main.mt_aaue_vector"), golden("main.mt_aaue_vector")
    padded = load_file(MT / "main.padding_demo.safetensors")
    ids, mask = F.pad(inputs["text_ids"], (0, 4), value=1), F.pad(inputs["text_masks"], (0, 4))
    with torch.no_grad():
        features = model(inputs["image"], ids, mask)
        close(features.pooled, padded["padded.cls_feats"], 1e-5)
        close(features.image, padded["padded.image_feats"], 5e-5)
        model.config.mask_fused_query = True
        short = model(inputs["image"], inputs["text_ids"], inputs["text_masks"]).pooled
        close(model(inputs["image"], ids, mask).pooled, short, 1e-5)
    assert (short - out["infer.cls_feats"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", present("main.head_vqa", "main.head_snli"))
def test_vqa_and_snli_ve_heads(name):
    model, (inputs, out) = golden_model(name), golden(name)
    pooled = model(inputs["image"], inputs["text_ids"], inputs["text_masks"]).pooled
    if name == "main.head_vqa":
        logits, want = model.heads["vqa"](pooled), "vqa"
        loss = F.binary_cross_entropy_with_logits(logits, out["vqa_targets"]) * logits.shape[1]
    else:
        logits, want = model.heads["snli_ve"](pooled), "snli"
        loss = F.cross_entropy(logits, torch.tensor([2, 0, 1]))
    close(logits, out[f"{want}_logits"], 2e-5)
    close(loss, out["total_loss"], 1e-5)
    loss.backward()
    check_gradients(model, out, "grad.", 5e-5)


@pytest.mark.parametrize("name", present("main.head_nlvr2"))
def test_nlvr2_head_and_third_token_type(name, tmp_path):
    model, (inputs, out) = golden_model(name), golden(name)
    pairs = [model(inputs[image], inputs["text_ids"], inputs["text_masks"], image_type).pooled
             for image, image_type in (("image", 1), ("image_b", 2))]
    logits = model.heads["nlvr2"](torch.cat(pairs, dim=-1))
    loss = F.cross_entropy(logits, out["nlvr2_labels"])
    close(logits, out["nlvr2_logits"], 2e-5)
    close(loss, out["total_loss"], 1e-5)
    loss.backward()
    check_gradients(model, out, "grad.", 5e-5)


def test_load_model_for_another_task(tmp_path, capsys):
    model = golden_model("main.mt_aaue_vector")
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    pair = load_model(tmp_path, heads=("nlvr2",), image_size=96)
    assert torch.equal(pair.type_embedding[2], model.type_embedding[1]) and pair.image_encoder.position_embedding.shape[0] == 37
    assert "dropped: itm, mlm; heads initialised: nlvr2" in capsys.readouterr().out
    rank = load_model(tmp_path, heads=("itm", "retrieval"))
    assert torch.equal(rank.heads["retrieval"].weight[0], model.heads["itm"].weight[1])
    with pytest.raises(ValueError, match="does not fit.*hidden|does not fit.*layers"):
        load_model(tmp_path, num_layers=2)
    with pytest.raises(ValueError, match="no config.json"):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize("name", present("main.head_irtr_itm"))
def test_rank_loss(name):
    model, (inputs, out) = golden_model(name), golden(name)
    ids = torch.stack([inputs["text_ids"], *(inputs[f"false_text_{i}_ids"] for i in range(2))], 1)  # (B, 1 true + 2 false, L)
    masks = torch.stack([inputs["text_masks"], *(inputs[f"false_text_{i}_masks"] for i in range(2))], 1)
    images = model.encode_image(inputs["image"]).repeat_interleave(3, 0)
    pooled = model.fuse(model.encode_text(ids.flatten(0, 1), masks.flatten(0, 1)), images, masks.flatten(0, 1)).pooled
    scores = model.heads["retrieval"](pooled).view(3, 3)
    loss = F.cross_entropy(scores, torch.zeros(3, dtype=torch.long))
    close(pooled, out["irtr.cls_feats"], 1e-5)
    close(scores, out["irtr_scores"], 2e-5)
    close(loss, out["irtr_loss"], 1e-5)


@pytest.mark.skipif(not (MT / "posemb.safetensors").exists(), reason="this golden set has no position tables")
def test_position_embedding_interpolation():
    tables = load_file(MT / "posemb.safetensors")
    for case in json.loads((MT / "posemb.json").read_text()):
        table = tables[f"in.{case['name']}"]
        resized = resize_position_embedding(table, case["grid_after"])
        close(resized, tables[f"out.{case['name']}"], 1e-6)
        assert not case["identical"] or torch.equal(table, resized)


def manifest(name):
    folder = MT / "manifests"
    if (folder / f"{name}.json").exists():
        return json.loads((folder / f"{name}.json").read_text())
    delta = json.loads((folder / f"{name}.delta.json").read_text())
    out = {k: v for k, v in json.loads((folder / delta["base"]).read_text()).items() if k not in set(delta["removed"])}
    return out | delta["changed_or_added"]


def on_meta(name):
    return {k: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for k, (shape, dtype) in manifest(name).items()}


MANIFESTS = {
    "mt_pretrain": {}, "bt_pretrain": dict(fusion="bridge"), "mt_aaue_scalar_pretrain": dict(manager_weight="scalar"),
    "mt_saue_vector_pretrain": dict(manager_type="saue"), "mt_ftfpt_vqa": dict(heads=("vqa",), image_size=576, head_hidden_scale=2),
    "mt_ftfs_vqa": dict(heads=("vqa",), image_size=576), "mt_ftfpt_snli": dict(heads=("snli_ve",), image_size=384, head_hidden_scale=2),
    "mt_ftfpt_nlvr2": dict(heads=("nlvr2",), image_size=384), "mt_ftfpt_flickr": dict(heads=("itm", "itc"), image_size=384)}


@pytest.mark.skipif(not (MT / "manifests").exists(), reason="this golden set has no manifests")
@pytest.mark.parametrize("name", MANIFESTS)
def test_full_size_manifests_load_strictly(name):
    config, state = ManagerTowerConfig.base(**MANIFESTS[name]), on_meta(name)
    with torch.device("meta"):
        model = ManagerTower(config)
    model.load_state_dict(from_official(state, config), strict=True, assign=True)
    back = to_official(model.state_dict(), config)
    assert {k: v.shape for k, v in back.items()}.items() <= {k: v.shape for k, v in state.items()}.items()
    counts = json.loads((MT / "manifests" / "param_counts.json").read_text())
    if name == "mt_pretrain":
        dead = sum(v.numel() for k, v in state.items() if k not in back and v.is_floating_point())
        assert sum(p.numel() for p in model.parameters()) + dead == counts["pretrain"]["total_parameters"]


@pytest.mark.skipif(not (MT / "manifests").exists(), reason="this golden set has no manifests")
@pytest.mark.parametrize("text", ["hf_roberta_base_RobertaModel", "hf_roberta_base_RobertaForMaskedLM"])
@pytest.mark.parametrize("vision", ["hf_clip_vit_base_patch16", "openai_clip_vit_b16"])
def test_unimodal_manifests(vision, text, monkeypatch):
    with torch.device("meta"):
        model = ManagerTower(ManagerTowerConfig.base(image_size=224))
    monkeypatch.setattr(model_module, "read_safetensors", on_meta)
    load_unimodal(model, vision, text)
    monkeypatch.setattr(model_module, "read_safetensors", lambda name: {k: v for k, v in on_meta(name).items() if ".3." not in k})
    with pytest.raises(ValueError, match=r"missing: .*3\."):
        load_unimodal(model, vision, text)


def test_official_round_trip_and_errors():
    name = "main.mt_aaue_vector"
    config, state = golden_config(name), golden_state(name)
    back = to_official(from_official(state, config), config)
    assert all(torch.equal(state[k], v) for k, v in back.items())
    assert set(state) - set(back) == {k for k in state if k == "temperature" or "softmax_temperature_cross" in k or "pooler.dense" in k
                                      and "text_transformer" in k or k.startswith(("vit_model.positional", "vit_model.ln_final"))
                                      or k.endswith("position_ids")}
    for broken, message in (({**state, "extra.weight": torch.zeros(2)}, "unknown: extra.weight"),
                            ({k: v for k, v in state.items() if k != "itm_score.fc.bias"}, "missing: itm_score.fc.bias"),
                            ({**state, "itm_score.fc.bias": torch.zeros(5)}, r"itm_score.fc.bias is \(5,\), should be \(2,\)")):
        with pytest.raises(ValueError, match=message):
            from_official(broken, config)


def test_encoders_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=16)).eval()
    text = transformers.RobertaModel(transformers.RobertaConfig(
        vocab_size=99, hidden_size=40, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, max_position_embeddings=34,
        type_vocab_size=1, layer_norm_eps=1e-5)).eval()
    for peer, folder in ((vision, "clip"), (text, "roberta")):
        for p in peer.parameters():  # transformers' small initialisation hides mistakes
            p.data.add_(0.1 * torch.randn_like(p))
        (tmp_path / folder).mkdir()
        save_file({k: v.contiguous() for k, v in peer.state_dict().items()}, tmp_path / folder / "model.safetensors")
    model = ManagerTower(ManagerTowerConfig(
        image_size=64, patch_size=16, vision_width=48, vision_layers=3, vision_heads=4, vocab_size=99, max_positions=34, text_width=40,
        text_layers=3, text_heads=4, text_mlp_width=96, hidden_size=32, num_heads=4, num_layers=3, managed_layers_text=3,
        managed_layers_image=3, max_text_len=12)).eval()
    load_unimodal(model, tmp_path / "clip", tmp_path / "roberta" / "model.safetensors")
    pixels, ids = torch.randn(2, 3, 64, 64), torch.randint(3, 99, (2, 12))
    ids[1, 7:] = 1
    mask = (ids != 1).long()
    with torch.no_grad():
        theirs = vision(pixels, output_hidden_states=True).hidden_states
        ours = model.image_encoder(pixels, range(4))
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, 1e-5 * max(1, b.abs().max().item()))
        theirs = text(ids, mask, output_hidden_states=True).hidden_states
        for a, b in zip(model.text_encoder(ids, mask, range(4)), theirs, strict=True):
            close(a[mask.bool()], b[mask.bool()], 1e-5)
        exact = torch.stack([model.encode_image(pixels)[:, -1, 0], *ours[-1:][0][:, :1].unbind(1)])
        with torch.autocast("cpu", torch.bfloat16):
            rough = torch.stack([model.encode_image(pixels)[:, -1, 0], *model.image_encoder(pixels, [3])[0][:, :1].unbind(1)])
            words = model.text_encoder(ids, mask, [3])[0][mask.bool()]
    assert (rough.float() - exact).norm() / exact.norm() < 2e-2
    assert (words.float() - theirs[-1][mask.bool()]).norm() / theirs[-1][mask.bool()].norm() < 2e-2


def formula(manager_, experts, weights):
    """The papers' formula, written with a LayerNorm of every expert."""
    normed = [F.layer_norm(experts[:, i], experts.shape[-1:], manager_.scale[i], manager_.shift[i], 1e-5) for i in range(experts.shape[1])]
    return (weights * torch.stack(normed, 1)).sum(1)


@pytest.mark.parametrize("weight", ["vector", "scalar"])
def test_sae_is_the_papers_formula(weight):
    torch.manual_seed(0)
    m = StaticManager(16, 4, num_previous=3, weight=weight).eval()
    torch.testing.assert_close(m.scores[:4], torch.full_like(m.scores[:4], 1 / 4))
    torch.testing.assert_close(m.scores[4:], torch.full_like(m.scores[4:], 1 / 3))
    for p in m.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    experts, previous = 3 * torch.randn(2, 4, 5, 16) + 1, torch.randn(2, 3, 5, 16)
    want = formula(m, experts, torch.softmax(m.scores[:4] / m.temperature, 0)[None, :, None])
    w = torch.softmax(m.scores[4:] / m.temperature_previous, 0)
    for k in range(3):
        want = want + w[k] * F.layer_norm(previous[:, k], (16,), m.scale[4 + k], m.shift[4 + k], 1e-5)
    close(m(standardize(experts), previous), want, 1e-5)
    assert m.weights(standardize(experts)).shape == (2, 4, 5, 16 if weight == "vector" else 1)


def test_sae_model_trains_and_has_no_official_layout():
    config = ManagerTowerConfig.tiny(manager_type="sae", num_layers=3)
    model = ManagerTower(config)
    features = model(torch.randn(2, 3, 64, 64), torch.randint(3, 99, (2, 24)), torch.ones(2, 24, dtype=torch.long))
    features.pooled.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "managers" in n)
    with pytest.raises(ValueError, match="no official"):
        to_official(model.state_dict(), config)


def test_adaptive_weights_sum_to_one_and_mask_ignores_padding():
    torch.manual_seed(0)
    m = AdaptiveManager(16, 4).eval()
    for p in m.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    experts, own, other = standardize(torch.randn(2, 4, 5, 16)), torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    weights = m.weights(experts, own, other, mask)
    close(weights.sum(1), torch.ones(2, 5, 1), 1e-6)
    changed = other.clone()
    changed[1, 4:] = 9
    close(m(experts, own, changed, mask), m(experts, own, other, mask), 1e-6)
    assert (m(experts, own, changed) - m(experts, own, other)).abs().max() > 1e-3


def test_forward_allocates_no_copy_of_the_expert_stack_in_the_managers():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                self.size = max(self.size, out.numel())
            return out

    b, n, length, width = 2, 6, 10, 8
    experts, own = torch.randn(b, n, length, width), torch.randn(b, length, width)
    for m, args in ((StaticManager(width, n, 1), (own,)), (AdaptiveManager(width, n), (own, own))):
        with torch.no_grad(), Largest() as largest:
            m.eval()(experts, *args)
        assert largest.size < b * n * length * width / 2


@pytest.mark.parametrize("field,value,message", [
    ("fusion", "tower", "fusion"), ("heads", ("cls",), "heads"), ("hidden_size", 97, "not a multiple"), ("image_size", 60, "not a multiple"),
    ("managed_layers_text", 9, "managed layers"), ("max_text_len", 100, "max_positions")])
def test_config_errors(field, value, message):
    with pytest.raises(ValueError, match=message):
        ManagerTowerConfig.tiny(**{field: value})


def test_presets_and_checkpointing():
    assert ManagerTowerConfig.large().vision_layers == 24
    config = ManagerTowerConfig.tiny(dropout=0.0, manager_noise=False)
    assert dataclasses.replace(config, fusion="last").num_experts("text") == 1
    torch.manual_seed(0)
    model = ManagerTower(config)
    batch = torch.randn(2, 3, 64, 64), torch.randint(3, 99, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    grads = []
    for on in (False, True):
        model.set_checkpointing(on)
        model.zero_grad()
        model(*batch).pooled.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
