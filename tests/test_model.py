"""manager.py and model.py against the official ManagerTower, BridgeTower and METER code (golden numbers), transformers'
encoders on random weights, and the papers' formulas; checkpoints and bad input."""
import dataclasses
import json

import pytest
import torch
from conftest import GOLDEN, ROOT
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import manager
import model
from model import ManagerTower, ManagerTowerConfig
from weights import from_official, load_model, load_unimodal, read_safetensors, resize_position_embedding, save_model, to_official
from manager import AdaptiveManager, StaticManager, standardize

























# ---------------------------------------------------------------- the official code's numbers
def record(modules, key, seen):
    for i, module in enumerate(modules):
        module.register_forward_hook(lambda _module, _args, out, i=i: seen.__setitem__(key(i), out))


@pytest.mark.parametrize("name", present(*VARIANTS))
def test_every_layer_of_the_forward_pass(name):
    model, (inputs, out), seen = golden_model(name), golden(name), {}
    for m in ("text", "image"):
        record(getattr(model, f"{m}_layers"), f"infer.cross.{m}.layer.{{}}".format, seen)
        record(getattr(model, f"{m}_managers", []), f"infer.manager.{m}.{{}}.out".format, seen)
        record(getattr(model, f"{m}_bridges", []),
               lambda i, m=m: f"infer.link.{m}.{i - 1}.out" if i else f"infer.link.{m}.first_layernorm", seen)
    with torch.no_grad():
        features = model(inputs["image"], inputs["text_ids"].int(), inputs["text_masks"].int())
        seen = seen | {"infer.text_feats": features.text, "infer.image_feats": features.image}
        if name == "main.mt_aaue_vector":
            text_experts = model.encode_text(inputs["text_ids"], inputs["text_masks"])
            seen |= {"infer.stack.text.pre_transform": text_experts,
                     "infer.stack.image.pre_transform": model.encode_image(inputs["image"])}
        masked = model(inputs["image"], inputs["text_ids_mlm"], inputs["text_masks"])
        itm, mlm = model.heads["itm"](features.pooled), model.heads["mlm"](masked.text)
    assert len(seen) >= 8
    compare(seen | {"infer.itm_logits": itm}, out, 5e-5)
    compare({"infer.itm_logits": itm, "infer_mlm.mlm_logits": mlm}, out, 2e-5)
    compare({"infer.cls_feats": features.pooled}, out, 5e-6)
    logits = {"infer.itm_logits": itm, "infer_mlm.mlm_logits": mlm}
    largest = [max(((v - out[k]).abs().max().item() for k, v in x.items() if k in out), default=0.0)
               for x in (seen, logits)]
    print(f"{name}: largest deviation of hidden states {largest[0]:.1e}, of logits {largest[1]:.1e}")


@pytest.mark.parametrize("name", present(*VARIANTS))
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
    if SMALL_SET:
        pytest.skip("only the full golden set has recorded noise")
    recorded = [out[f"train_noise.noise.{m}.{i}"] for i in range(model.config.num_layers) for m in ("text", "image")]
    monkeypatch.setattr(manager, "draw_noise", lambda experts: recorded.pop(0))
    model.text_managers.train(), model.image_managers.train()
    with torch.no_grad():
        features = model(inputs["image"], inputs["text_ids"], inputs["text_masks"])
    assert not recorded
    close(features.text, out["train_noise.text_feats"], 5e-5)
    close(features.image, out["train_noise.image_feats"], 5e-5)
    close(features.pooled, out["train_noise.cls_feats"], 1e-5)


@needs("main.eps_probe.safetensors")
@pytest.mark.parametrize("name", present("main.mt_aaue_vector", "main.bt"))
def test_epsilon_probe(name):
    config, state = golden_config(name), golden_state(name)
    for k, v in state.items():
        vector = v.dim() == 1 and "softmax_temperature" not in k
        if v.is_floating_point() and (vector or "embedding" in k or "conv1.weight" in k):
            state[k] = 0.003 * v
    model = ManagerTower(config).eval()
    model.load_state_dict(from_official(state, config))
    inputs, out = golden(name)[0], load_file(MT / "main.eps_probe.safetensors")
    with torch.no_grad():
        features = model(inputs["image"], inputs["text_ids"], inputs["text_masks"])
        logits = model.heads["mlm"](model(inputs["image"], inputs["text_ids_mlm"], inputs["text_masks"]).text)[0]
    ours = {"cls_feats": features.pooled, "image_feats": features.image, "text_feats": features.text,
            "mlm_logits_first_row": logits}
    compare({f"{name.removeprefix('main.')}.{k}": v for k, v in ours.items()}, out, 1e-6, 1e-3)


@needs("main.padding_demo.safetensors")
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


@pytest.mark.parametrize("name", present("main.head_vqa", "main.head_snli", "main.head_nlvr2"))
def test_classification_heads(name):
    model, (inputs, out), task = golden_model(name), golden(name), name.removeprefix("main.head_")
    text = inputs["text_ids"], inputs["text_masks"]
    pooled = model(inputs["image"], *text).pooled
    if task == "nlvr2":
        pooled = torch.cat([pooled, model(inputs["image_b"], *text, image_type=2).pooled], dim=-1)
    logits = model.heads["snli_ve" if task == "snli" else task](pooled)
    loss = {"vqa": lambda: F.binary_cross_entropy_with_logits(logits, out["vqa_targets"]) * logits.shape[1],
            "snli": lambda: F.cross_entropy(logits, torch.tensor([2, 0, 1])),
            "nlvr2": lambda: F.cross_entropy(logits, out["nlvr2_labels"])}[task]()
    close(logits, out[f"{task}_logits"], 2e-5)
    close(loss, out["total_loss"], 1e-5)
    loss.backward()
    check_gradients(model, out, "grad.", 5e-5)


@pytest.mark.parametrize("name", present("main.head_irtr_itm"))
def test_rank_loss(name):
    model, (inputs, out) = golden_model(name), golden(name)
    texts = ("text", "false_text_0", "false_text_1")
    ids, masks = (torch.stack([inputs[f"{t}_{what}"] for t in texts], 1) for what in ("ids", "masks"))  # (B, 3, L)
    images = model.encode_image(inputs["image"]).repeat_interleave(3, 0)
    text_experts = model.encode_text(ids.flatten(0, 1), masks.flatten(0, 1))
    pooled = model.fuse(text_experts, images, masks.flatten(0, 1)).pooled
    scores = model.heads["retrieval"](pooled).view(3, 3)
    close(pooled, out["irtr.cls_feats"], 1e-5)
    close(scores, out["irtr_scores"], 2e-5)
    close(F.cross_entropy(scores, torch.zeros(3, dtype=torch.long)), out["irtr_loss"], 1e-5)


@pytest.mark.parametrize("name", present("eqdim.head_irtr_itm_itc", "eqdim.head_irtr_itm_itc_bt",
                                         "eqdim.head_mlm_itm_itc", "eqdim.head_mlm_itmitc_pretrain"))
def test_contrastive_features(name):
    model, (inputs, out) = golden_model(name), golden(name)
    text = model.encode_text(inputs["text_ids"], inputs["text_masks"])
    text, image = model.contrast(text, model.encode_image(inputs["image"]))
    close(text, out["unimodal_feats_text"], 1e-5)
    close(image, out["unimodal_feats_image"], 1e-5)
    close(text @ image.T / model.heads["itc"].temperature, out["itc_logits_t2i"], 5e-5)


@needs("posemb.safetensors")
def test_position_embedding_interpolation():
    tables = load_file(MT / "posemb.safetensors")
    for case in json.loads((MT / "posemb.json").read_text()):
        table = tables[f"in.{case['name']}"]
        resized = resize_position_embedding(table, case["grid_after"])
        close(resized, tables[f"out.{case['name']}"], 1e-6)
        assert not case["identical"] or torch.equal(table, resized)


# ---------------------------------------------------------------- foreign layouts
def manifest(name):
    folder = MT / "manifests"
    if (folder / f"{name}.json").exists():
        return json.loads((folder / f"{name}.json").read_text())
    delta = json.loads((folder / f"{name}.delta.json").read_text())
    out = {k: v for k, v in json.loads((folder / delta["base"]).read_text()).items() if k not in set(delta["removed"])}
    return out | delta["changed_or_added"]


def on_meta(name):
    return {k: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for k, (shape, dtype) in manifest(name).items()}


MANIFESTS = {
    "mt_pretrain": {}, "bt_pretrain": {"fusion": "bridge"}, "mt_aaue_scalar_pretrain": {"manager_weight": "scalar"},
    "mt_saue_vector_pretrain": {"manager_type": "saue"},
    "mt_ftfpt_vqa": {"heads": ("vqa",), "image_size": 576, "head_hidden_scale": 2},
    "mt_ftfs_vqa": {"heads": ("vqa",), "image_size": 576},
    "mt_ftfpt_snli": {"heads": ("snli_ve",), "image_size": 384, "head_hidden_scale": 2},
    "mt_ftfpt_nlvr2": {"heads": ("nlvr2",), "image_size": 384},
    "mt_ftfpt_flickr": {"heads": ("itm", "itc"), "image_size": 384}}


@needs("manifests")
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


@needs("manifests")
@pytest.mark.parametrize("text", ["hf_roberta_base_RobertaModel", "hf_roberta_base_RobertaForMaskedLM"])
@pytest.mark.parametrize("vision", ["hf_clip_vit_base_patch16", "openai_clip_vit_b16"])
def test_unimodal_manifests(vision, text, monkeypatch):
    with torch.device("meta"):
        model = ManagerTower(ManagerTowerConfig.base(image_size=224))
    monkeypatch.setattr(model_module, "read_safetensors", on_meta)
    load_unimodal(model, vision, text)
    monkeypatch.setattr(model_module, "read_safetensors",
                        lambda name: {k: v for k, v in on_meta(name).items() if ".3." not in k})
    with pytest.raises(ValueError, match=rf"{vision}: .*missing: .*3\."):
        load_unimodal(model, vision, text)


def test_official_round_trip_and_errors():
    name = "main.mt_aaue_vector"
    config, state = golden_config(name), golden_state(name)
    back = to_official(from_official(state, config), config)
    assert all(torch.equal(state[k], v) for k, v in back.items())
    dead = ("temperature", "vit_model.positional_embedding", "vit_model.ln_final.weight", "vit_model.ln_final.bias",
            "text_transformer.pooler.dense.weight", "text_transformer.pooler.dense.bias",
            "text_transformer.embeddings.position_ids")  # and the unused temperatures
    assert {k for k in set(state) - set(back) if "softmax_temperature_cross" not in k} == set(dead) & set(state)
    key, bias = "itm_score.fc.bias", torch.zeros(5)
    for broken, message in (({**state, "extra.weight": bias}, "unknown: extra.weight"),
                            ({k: v for k, v in state.items() if k != key}, f"missing: {key}"),
                            ({**state, key: bias}, rf"{key} is \(5,\), should be \(2,\)")):
        with pytest.raises(ValueError, match=message):
            from_official(broken, config)


def random_encoders(tmp_path):
    """transformers' CLIP and RoBERTa with random weights, also saved in tmp_path/clip and tmp_path/roberta."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, image_size=64,
        patch_size=16))
    text = transformers.RobertaModel(transformers.RobertaConfig(
        vocab_size=99, hidden_size=40, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=34, type_vocab_size=1, layer_norm_eps=1e-5))
    for peer, folder in ((vision, "clip"), (text, "roberta")):
        for p in peer.parameters():  # transformers' small initialisation hides mistakes
            p.data.add_(0.1 * torch.randn_like(p))
        (tmp_path / folder).mkdir()
        save_file({k: v.contiguous() for k, v in peer.state_dict().items()}, tmp_path / folder / "model.safetensors")
    config = ManagerTowerConfig(
        image_size=64, patch_size=16, vision_width=48, vision_layers=3, vision_heads=4, vocab_size=99, max_positions=34,
        text_width=40, text_layers=3, text_heads=4, text_mlp_width=96, hidden_size=32, num_heads=4, num_layers=3,
        managed_layers_text=3, managed_layers_image=3, max_text_len=12)
    return vision.eval(), text.eval(), config


def test_encoders_equal_transformers(tmp_path):
    vision, text, config = random_encoders(tmp_path)
    model = ManagerTower(config).eval()
    load_unimodal(model, tmp_path / "clip", tmp_path / "roberta" / "model.safetensors")
    pixels, ids, mask = tiny_batch(config)
    ids[0, 3] = 1  # a pad id in the text takes no position: those follow the ids, attention follows the mask
    with torch.no_grad():
        theirs = vision(pixels, output_hidden_states=True).hidden_states
        for a, b in zip(model.image_encoder(pixels, range(4)), theirs, strict=True):
            close(a, b, 1e-5 * max(1, b.abs().max().item()))
        words = text(ids, mask, output_hidden_states=True).hidden_states
        for a, b in zip(model.text_encoder(ids, mask, range(4)), words, strict=True):
            close(a[mask.bool()], b[mask.bool()], 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.image_encoder(pixels, [3])[0], model.text_encoder(ids, mask, [3])[0][mask.bool()]
    for ours, exact in zip(rough, (theirs[-1], words[-1][mask.bool()]), strict=True):
        assert (ours.float() - exact).norm() / exact.norm() < 2e-2


def test_unimodal_errors(tmp_path):
    config = random_encoders(tmp_path)[2]
    model, clip, roberta = ManagerTower(config), tmp_path / "clip", tmp_path / "roberta"
    state = read_safetensors(clip)
    key = next(k for k in state if k.endswith("position_embedding.weight"))
    save_file({**state, key: state[key][1:].clone()}, tmp_path / "no_class_row.safetensors")
    (tmp_path / "text.bin").write_bytes(b"x")
    (tmp_path / "cut.safetensors").write_bytes((clip / "model.safetensors").read_bytes()[:-9])
    for vision, text, message in (
            (tmp_path / "nothing", roberta, "nothing does not exist"),
            (clip, tmp_path, "model.safetensors does not exist"),
            (clip, tmp_path / "text.bin", "not a .safetensors file"),
            (tmp_path / "cut.safetensors", roberta, "not a readable"),
            (roberta, clip, "roberta: .*missing"), (clip, clip, "clip: .*missing"),
            (tmp_path / "no_class_row.safetensors", roberta, r"no_class_row.*position table of shape \(16, 48\)")):
        with pytest.raises(ValueError, match=message):
            load_unimodal(model, vision, text)


# ---------------------------------------------------------------- formulas and invariants
def test_noise_has_the_papers_standard_deviation():
    torch.manual_seed(0)
    noise = manager.draw_noise(torch.zeros(8, 4, 50, 32))
    assert abs(noise.std().item() * 4 - 1) < 0.01 and abs(noise.mean().item()) < 0.005


@pytest.mark.parametrize("weight", ["vector", "scalar"])
@pytest.mark.parametrize("num_previous", [1, 3])
def test_static_manager_is_the_papers_formula(weight, num_previous):
    """SAUE for one previous output, SAE for several; every LayerNorm written out."""
    torch.manual_seed(0)
    m = StaticManager(16, 4, num_previous, weight).eval()
    start = torch.tensor([1 / 4] * 4 + [1 / num_previous] * num_previous)
    torch.testing.assert_close(m.scores, start[:, None].expand_as(m.scores))
    for p in m.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    experts, previous = 3 * torch.randn(2, 4, 5, 16) + 1, torch.randn(2, num_previous, 5, 16)
    w = torch.softmax(m.scores[:4] / m.temperature, 0)
    w_previous = torch.softmax(m.scores[4:] / m.temperature_previous, 0) if num_previous > 1 else m.scores[4:]
    layers = [*zip(w, experts.unbind(1)), *zip(w_previous, previous.unbind(1))]
    want = sum(w * F.layer_norm(v, (16,), m.scale[i], m.shift[i], 1e-5) for i, (w, v) in enumerate(layers))
    close(m(standardize(experts), previous if num_previous > 1 else previous[:, 0]), want, 1e-5)
    assert m.weights(standardize(experts)).shape == (2, 4, 5, 16 if weight == "vector" else 1)


def test_adaptive_weights_sum_to_one_and_mask_ignores_padding():
    torch.manual_seed(0)
    m = AdaptiveManager(16, 4).eval()
    for p in m.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    experts, own, other = standardize(torch.randn(2, 4, 5, 16)), torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    close(m.weights(experts, own, other, mask).sum(1), torch.ones(2, 5, 1), 1e-6)
    changed = other.clone()
    changed[1, 4:] = 9
    close(m(experts, own, changed, mask), m(experts, own, other, mask), 1e-6)
    assert (m(experts, own, changed) - m(experts, own, other)).abs().max() > 1e-3


def test_managers_allocate_no_copy_of_the_expert_stack():
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


def test_sae_model_trains_and_has_no_official_layout():
    config = ManagerTowerConfig.tiny(manager_type="sae", num_layers=3)
    model = ManagerTower(config)
    model(*tiny_batch(config)).pooled.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "managers" in n)
    with pytest.raises(ValueError, match="no official"):
        to_official(model.state_dict(), config)


@pytest.mark.parametrize("dropout, noise", [(0.5, False), (0.0, True)])
def test_dropout_and_noise_are_for_training_only(dropout, noise):
    config = ManagerTowerConfig.tiny(dropout=dropout, manager_noise=noise)
    model, batch = ManagerTower(config), tiny_batch(config)
    with torch.no_grad():
        a, b = model(*batch).pooled, model(*batch).pooled
        model.eval()
        c, d = model(*batch).pooled, model(*batch).pooled
        still = ManagerTower(dataclasses.replace(config, dropout=0.0, manager_noise=False))  # train() = eval()
        still.load_state_dict(model.state_dict())
        assert not torch.equal(a, b) and torch.equal(c, d) and torch.equal(still(*batch).pooled, c)


def test_the_padding_rows_are_read_but_never_learnt():
    config = ManagerTowerConfig.tiny()
    model, (pixels, ids, mask) = ManagerTower(config).eval(), tiny_batch(config)
    model(pixels, ids, mask).text.square().sum().backward()
    for table in (model.text_encoder.word_embedding, model.text_encoder.position_embedding):
        assert table.weight.grad[config.pad_token_id].abs().max() == 0 < table.weight.grad.abs().max()
    with torch.no_grad():
        before = model(pixels, ids, mask).pooled
        model.text_encoder.word_embedding.weight[config.pad_token_id] += 1
        assert not torch.equal(model(pixels, ids, mask).pooled, before)  # the fused query sees padding


@pytest.mark.parametrize("kind", ["aaue", "saue", "sae", "bridge"])
def test_precisions(kind):
    """Training under bf16 autocast, noise included, and float64, against float32."""
    settings = {"fusion": "bridge"} if kind == "bridge" else {"manager_type": kind}
    config = ManagerTowerConfig.tiny(heads=("mlm", "itm", "itc"), num_layers=3, **settings)
    torch.manual_seed(0)
    model, (pixels, ids, mask) = ManagerTower(config), tiny_batch(config)
    exact = model.eval()(pixels, ids, mask).pooled
    close(model.double()(pixels.double(), ids, mask).pooled, exact.double(), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.float().train()(pixels, ids, mask)
        text, image = model.contrast(model.encode_text(ids, mask), model.encode_image(pixels))
        loss = model.heads["mlm"](features.text).float().square().mean() + model.heads["itm"](features.pooled).sum()
    (loss + (text @ image.T / model.heads["itc"].temperature).sum()).backward()
    assert (features.pooled.float() - exact).norm() / exact.norm() < 0.05
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_compiles_into_one_graph():
    """Traced forward and backward; aot_eager runs the graphs without the minute that code generation takes."""
    config = ManagerTowerConfig.tiny(manager_noise=False, vision_layers=2, text_layers=2, managed_layers_text=2,
                                     managed_layers_image=2)
    model, batch, results = ManagerTower(config), tiny_batch(config), []
    for f in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        features = f(*batch)
        (features.pooled.square().sum() + features.text.square().mean()).backward()
        results.append([features.text, features.pooled, *(p.grad for p in model.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results, strict=True):
        close(compiled, eager, 1e-6)


def test_checkpointing_changes_no_gradient():
    config = ManagerTowerConfig.tiny(manager_noise=False)
    model, batch, grads = ManagerTower(config), tiny_batch(config), []
    for on in (False, True):
        model.set_checkpointing(on)
        model.zero_grad()
        model(*batch).pooled.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---------------------------------------------------------------- configs, checkpoints, bad input
def test_presets():
    large = ManagerTowerConfig.large(num_layers=5)
    assert (large.vision_layers, large.text_width, large.num_layers, large.num_experts("image")) == (24, 1024, 5, 6)
    assert dataclasses.replace(large, fusion="last").num_experts("text") == 1
    assert dataclasses.replace(large, fusion="bridge").num_experts("text") == 5


@pytest.mark.parametrize("field, value, message", [
    ("fusion", "tower", "fusion is 'tower'"), ("heads", ("cls",), "heads is 'cls'"),
    ("hidden_size", 97, "not a multiple"), ("image_size", 60, "not a multiple"),
    ("managed_layers_text", 9, "9 managed layers, the text encoder has 3"), ("max_text_len", 100, "max_positions"),
    ("num_layers", 0, "num_layers is 0"), ("vocab_size", "9", "vocab_size is '9'"),
    ("managed_layers_image", 0, "managed_layers_image is 0"), ("dropout", 1.5, "dropout is 1.5")])
def test_config_errors(field, value, message):
    with pytest.raises(ValueError, match=message):
        ManagerTowerConfig.tiny(**{field: value})


def test_input_errors():
    config = ManagerTowerConfig.tiny()
    model, (pixels, ids, mask) = ManagerTower(config), tiny_batch(config)
    with pytest.raises(ValueError, match="image_size 64"):
        model(pixels[..., :48], ids, mask)
    with pytest.raises(ValueError, match="60 tokens, the position table holds 50"):
        model(pixels, torch.full((2, 60), 5), torch.ones(2, 60))
    experts = torch.randn(2, 3, 4, 96)
    with pytest.raises(ValueError, match="are 2, not 3 layers"):
        model.text_managers[0](experts[:, :2])
    with pytest.raises(ValueError, match="0 previous outputs, this manager aggregates 1"):
        StaticManager(96, 3, 1)(experts)
    with pytest.raises(ValueError, match="weight is 'matrix'"):
        StaticManager(96, 3, weight="matrix")


def test_load_model_for_another_task(tmp_path, capsys):
    model = golden_model("main.mt_aaue_vector")
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert again.config == model.config
    pair = load_model(tmp_path, heads=("nlvr2",), image_size=96)
    assert torch.equal(pair.type_embedding, model.type_embedding[[0, 1, 1]])
    assert pair.image_encoder.position_embedding.shape[0] == 37
    assert "dropped: itm, mlm; heads initialised: nlvr2" in capsys.readouterr().out
    save_model(pair, tmp_path / "pair")
    assert torch.equal(load_model(tmp_path / "pair", heads=("itm",)).type_embedding, model.type_embedding)
    rank = load_model(tmp_path, heads=("itm", "retrieval"))
    assert torch.equal(rank.heads["retrieval"].weight[0], model.heads["itm"].weight[1])
    fresh = ManagerTower(ManagerTowerConfig.tiny(heads=("nlvr2",))).type_embedding
    assert torch.equal(fresh[2], fresh[1]) and not torch.equal(fresh[1], fresh[0])


def test_load_model_errors(tmp_path):
    save_model(ManagerTower(ManagerTowerConfig.tiny(heads=("vqa",), num_answers=9)), tmp_path)
    for overrides, message in (({"num_layers": 3}, "does not fit the model. image_layers.2.*: missing in"),
                               ({"num_answers": 8}, r"heads.vqa.fc_out.bias: \(9,\) in the file, \(8,\) in the model"),
                               ({"patch_size": 8}, r"image_encoder.patch.weight: \(96, 3, 16, 16\) in the file")):
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path, **overrides)
    state = load_file(tmp_path / "model.safetensors")
    for missing in ("heads.vqa.fc.bias", "type_embedding", "image_encoder.position_embedding"):
        save_file({k: v for k, v in state.items() if k != missing}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"{missing}: missing in the file"):
            load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors does not exist"):
        load_model(tmp_path)
    for text, message in (("{", "is not a JSON object"), ("[1]", "is not a JSON object"),
                          ('{"model_type": "clip", "hidden_size": 9}', "model None, unknown fields .'model_type'"),
                          ('{"model": "LlavaManager"}', "not the config of a ManagerTower: model 'LlavaManager'")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    with pytest.raises(ValueError, match="no config.json"):
        load_model(tmp_path / "nothing")
