"""model.py against the official ManagerTower, BridgeTower and METER code (golden numbers).

Also precisions, compilation, checkpointing, presets and bad configs.

Managers alone are in test_manager.py, weights and checkpoint folders in test_weights.py.
"""

import dataclasses

import pytest
import torch
from helpers import (
    MT,
    VARIANTS,
    check_gradients,
    close,
    compare,
    golden,
    golden_config,
    golden_model,
    golden_state,
    needs,
    present,
    tiny_batch,
)
from safetensors.torch import load_file
from torch.nn import functional as F

from model import HEADS, MANAGER_FLAGS, ManagerTower, ManagerTowerConfig, make_head
from weights import from_official


# ---------------------------------------------------------------- the official code's numbers
def record(modules, names, outputs):
    """Store the output of each module under its official name."""
    for module, name in zip(modules, names, strict=True):

        def store(_module, _args, out, name=name):
            outputs[name] = out

        module.register_forward_hook(store)


def record_layers(model, outputs):
    """The outputs of all cross-modal layers, managers and bridges, under their official names."""
    layers = range(model.config.num_layers)
    for modality in ("text", "image"):
        names = [f"infer.cross.{modality}.layer.{i}" for i in layers]
        record(getattr(model, f"{modality}_layers"), names, outputs)
        if model.config.fusion == "manager":
            names = [f"infer.manager.{modality}.{i}.out" for i in layers]
            record(getattr(model, f"{modality}_managers"), names, outputs)
        if model.config.fusion == "bridge":
            names = [f"infer.link.{modality}.{i - 1}.out" for i in layers]
            names[0] = f"infer.link.{modality}.first_layernorm"
            record(getattr(model, f"{modality}_bridges"), names, outputs)


def largest_deviation(ours, theirs):
    deviations = [(value - theirs[key]).abs().max() for key, value in ours.items() if key in theirs]
    return max(deviations, default=torch.tensor(0.0)).item()


@pytest.mark.parametrize("name", present(*VARIANTS))
def test_every_layer_of_the_forward_pass(name):
    model = golden_model(name)
    inputs, out = golden(name)
    outputs = {}
    record_layers(model, outputs)
    with torch.no_grad():
        features = model(inputs["image"], inputs["text_ids"].int(), inputs["text_masks"].int())
        hidden = dict(outputs)  # of this pass: the next one is recorded too
        hidden["infer.text_feats"] = features.text
        hidden["infer.image_feats"] = features.image
        if name == "main.mt_aaue_vector":
            text_experts = model.encode_text(inputs["text_ids"], inputs["text_masks"])
            hidden["infer.stack.text.pre_transform"] = text_experts
            hidden["infer.stack.image.pre_transform"] = model.encode_image(inputs["image"])
        masked = model(inputs["image"], inputs["text_ids_mlm"], inputs["text_masks"])
        itm = model.heads["itm"](features.pooled)
        mlm = model.heads["mlm"](masked.text)
    logits = {"infer.itm_logits": itm, "infer_mlm.mlm_logits": mlm}
    assert len(hidden) >= 8
    compare({**hidden, "infer.itm_logits": itm}, out, 5e-5)
    compare(logits, out, 2e-5)
    compare({"infer.cls_feats": features.pooled}, out, 5e-6)
    print(
        f"{name}: largest deviation of hidden states {largest_deviation(hidden, out):.1e}, of "
        f"logits {largest_deviation(logits, out):.1e}"
    )


@pytest.mark.parametrize("name", present(*VARIANTS))
def test_mlm_and_itm_losses_and_gradients(name):
    model = golden_model(name)
    inputs, out = golden(name)
    text = model(inputs["image"], inputs["text_ids_mlm"], inputs["text_masks"]).text
    mlm_logits = model.heads["mlm"](text).flatten(0, 1)
    mlm = F.cross_entropy(mlm_logits, inputs["text_labels_mlm"].flatten())
    match = out["loss_mlm_itm.itm_labels"].long()
    images = torch.where(match[:, None, None, None] == 1, inputs["image"], inputs["image_b"])
    logits = model.heads["itm"](model(images, inputs["text_ids"], inputs["text_masks"]).pooled)
    itm = F.cross_entropy(logits, match)
    close(logits, out["loss_mlm_itm.itm_logits"], 2e-5)
    close(mlm, out["loss_mlm_itm.mlm_loss"], 1e-5)
    close(itm, out["loss_mlm_itm.itm_loss"], 1e-5)
    (mlm + itm).backward()
    check_gradients(model, out, "loss_mlm_itm.grad.")


@needs("main.eps_probe.safetensors")
@pytest.mark.parametrize("name", present("main.mt_aaue_vector", "main.bt"))
def test_epsilon_probe(name):
    """With weights so small that the epsilons of the norms decide the result."""
    config = golden_config(name)
    state = golden_state(name)
    for key, value in state.items():
        vector = value.dim() == 1 and "softmax_temperature" not in key
        if value.is_floating_point() and (vector or "embedding" in key or "conv1.weight" in key):
            state[key] = 0.003 * value
    model = ManagerTower(config).eval()
    model.load_state_dict(from_official(state, config))
    inputs, _ = golden(name)
    out = load_file(MT / "main.eps_probe.safetensors")
    with torch.no_grad():
        features = model(inputs["image"], inputs["text_ids"], inputs["text_masks"])
        masked = model(inputs["image"], inputs["text_ids_mlm"], inputs["text_masks"])
        logits = model.heads["mlm"](masked.text)[0]
    prefix = name.removeprefix("main.")
    ours = {
        f"{prefix}.cls_feats": features.pooled,
        f"{prefix}.image_feats": features.image,
        f"{prefix}.text_feats": features.text,
        f"{prefix}.mlm_logits_first_row": logits,
    }
    compare(ours, out, 1e-6, 1e-3)


@needs("main.padding_demo.safetensors")
def test_padding_reaches_the_fused_query_unless_masked():
    model = golden_model("main.mt_aaue_vector")
    inputs, out = golden("main.mt_aaue_vector")
    padded = load_file(MT / "main.padding_demo.safetensors")
    ids = F.pad(inputs["text_ids"], (0, 4), value=1)
    mask = F.pad(inputs["text_masks"], (0, 4))
    with torch.no_grad():
        features = model(inputs["image"], ids, mask)
        close(features.pooled, padded["padded.cls_feats"], 1e-5)
        close(features.image, padded["padded.image_feats"], 5e-5)
        model.config.mask_fused_query = True
        short = model(inputs["image"], inputs["text_ids"], inputs["text_masks"]).pooled
        close(model(inputs["image"], ids, mask).pooled, short, 1e-5)
    assert (short - out["infer.cls_feats"]).abs().max() > 1e-3


def classification_loss(task, logits, out):
    if task == "vqa":
        mean = F.binary_cross_entropy_with_logits(logits, out["vqa_targets"])
        return mean * logits.shape[1]
    if task == "snli":
        return F.cross_entropy(logits, torch.tensor([2, 0, 1]))
    return F.cross_entropy(logits, out["nlvr2_labels"])


@pytest.mark.parametrize("name", present("main.head_vqa", "main.head_snli", "main.head_nlvr2"))
def test_classification_heads(name):
    model = golden_model(name)
    inputs, out = golden(name)
    task = name.removeprefix("main.head_")
    ids = inputs["text_ids"]
    mask = inputs["text_masks"]
    pooled = model(inputs["image"], ids, mask).pooled
    if task == "nlvr2":
        second = model(inputs["image_b"], ids, mask, image_type=2).pooled
        pooled = torch.cat([pooled, second], dim=-1)
    logits = model.heads["snli_ve" if task == "snli" else task](pooled)
    loss = classification_loss(task, logits, out)
    close(logits, out[f"{task}_logits"], 2e-5)
    close(loss, out["total_loss"], 1e-5)
    loss.backward()
    check_gradients(model, out, "grad.", 5e-5)


@pytest.mark.parametrize("name", present("main.head_irtr_itm"))
def test_rank_loss(name):
    model = golden_model(name)
    inputs, out = golden(name)
    texts = ("text", "false_text_0", "false_text_1")
    ids = torch.stack([inputs[f"{text}_ids"] for text in texts], 1).flatten(0, 1)  # (B * 3, L)
    masks = torch.stack([inputs[f"{text}_masks"] for text in texts], 1).flatten(0, 1)
    images = model.encode_image(inputs["image"]).repeat_interleave(3, 0)
    pooled = model.fuse(model.encode_text(ids, masks), images, masks).pooled
    scores = model.heads["retrieval"](pooled).view(3, 3)
    close(pooled, out["irtr.cls_feats"], 1e-5)
    close(scores, out["irtr_scores"], 2e-5)
    close(F.cross_entropy(scores, torch.zeros(3, dtype=torch.long)), out["irtr_loss"], 1e-5)


CONTRASTIVE = (
    "eqdim.head_irtr_itm_itc",
    "eqdim.head_irtr_itm_itc_bt",
    "eqdim.head_mlm_itm_itc",
    "eqdim.head_mlm_itmitc_pretrain",
)


@pytest.mark.parametrize("name", present(*CONTRASTIVE))
def test_contrastive_features(name):
    model = golden_model(name)
    inputs, out = golden(name)
    text_experts = model.encode_text(inputs["text_ids"], inputs["text_masks"])
    text, image = model.contrast(text_experts, model.encode_image(inputs["image"]))
    close(text, out["unimodal_feats_text"], 1e-5)
    close(image, out["unimodal_feats_image"], 1e-5)
    close(text @ image.T / model.heads["itc"].temperature, out["itc_logits_t2i"], 5e-5)


# ---------------------------------------------------------------- invariants
def test_sae_model_trains():
    config = ManagerTowerConfig.tiny(manager_type="sae", num_layers=3)
    model = ManagerTower(config)
    model(*tiny_batch(config)).pooled.sum().backward()
    managers = [p for name, p in model.named_parameters() if "managers" in name]
    assert managers
    assert all(parameter.grad is not None for parameter in managers)


@pytest.mark.parametrize("dropout, noise", [(0.5, False), (0.0, True)])
def test_dropout_and_noise_are_for_training_only(dropout, noise):
    config = ManagerTowerConfig.tiny(dropout=dropout, manager_noise=noise)
    model = ManagerTower(config)
    batch = tiny_batch(config)
    # without dropout and noise the training mode is the evaluation mode
    still = ManagerTower(dataclasses.replace(config, dropout=0.0, manager_noise=False))
    still.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.equal(model(*batch).pooled, model(*batch).pooled)
        model.eval()
        quiet = model(*batch).pooled
        assert torch.equal(quiet, model(*batch).pooled)
        assert torch.equal(still(*batch).pooled, quiet)


def test_the_padding_rows_are_read_but_never_learnt():
    config = ManagerTowerConfig.tiny()
    model = ManagerTower(config).eval()
    pixels, ids, mask = tiny_batch(config)
    model(pixels, ids, mask).text.square().sum().backward()
    for table in (model.text_encoder.word_embedding, model.text_encoder.position_embedding):
        assert table.weight.grad[config.pad_token_id].abs().max() == 0
        assert table.weight.grad.abs().max() > 0
    with torch.no_grad():
        before = model(pixels, ids, mask).pooled
        model.text_encoder.word_embedding.weight[config.pad_token_id] += 1
        # the fused query sees padding
        assert not torch.equal(model(pixels, ids, mask).pooled, before)


@pytest.mark.parametrize("kind", ["aaue", "saue", "sae", "bridge"])
def test_precisions(kind):
    """Training under bf16 autocast, noise included, and float64, against float32."""
    settings = {"fusion": "bridge"} if kind == "bridge" else {"manager_type": kind}
    config = ManagerTowerConfig.tiny(heads=("mlm", "itm", "itc"), num_layers=3, **settings)
    torch.manual_seed(0)
    model = ManagerTower(config)
    pixels, ids, mask = tiny_batch(config)
    exact = model.eval()(pixels, ids, mask).pooled
    close(model.double()(pixels.double(), ids, mask).pooled, exact.double(), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.float().train()(pixels, ids, mask)
        text, image = model.contrast(model.encode_text(ids, mask), model.encode_image(pixels))
        mlm = model.heads["mlm"](features.text).float().square().mean()
        itm = model.heads["itm"](features.pooled).sum()
    itc = (text @ image.T / model.heads["itc"].temperature).sum()
    (mlm + itm + itc).backward()
    assert (features.pooled.float() - exact).norm() / exact.norm() < 0.05
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.slow
def test_compiles_into_one_graph():
    """Forward and backward; aot_eager runs the traced graphs without generating code."""
    torch.manual_seed(0)
    config = ManagerTowerConfig.tiny(
        manager_noise=False,
        vision_layers=2,
        text_layers=2,
        managed_layers_text=2,
        managed_layers_image=2,
    )
    model = ManagerTower(config)
    batch = tiny_batch(config)
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        features = function(*batch)
        (features.pooled.square().sum() + features.text.square().mean()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([features.text, features.pooled, *gradients])
    # the softmax over the experts is written out where it is compiled: other roundings
    for eager, compiled in zip(*results, strict=True):
        close(compiled, eager, 5e-6)


def test_checkpointing_changes_no_gradient():
    config = ManagerTowerConfig.tiny(manager_noise=False)
    model = ManagerTower(config)
    batch = tiny_batch(config)
    gradients = []
    for on in (False, True):
        model.set_checkpointing(on)
        model.zero_grad()
        model(*batch).pooled.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 50
    for without, with_checkpointing in zip(*gradients, strict=True):
        assert torch.equal(without, with_checkpointing)


def test_only_the_layers_that_are_kept_run():
    config = ManagerTowerConfig.tiny()
    model = ManagerTower(config).eval()
    pixels, ids, mask = tiny_batch(config)
    with torch.no_grad():
        every = model.image_encoder(pixels, range(4))
        some = model.image_encoder(pixels, (layer for layer in (2, 0)))
        text = model.text_encoder(ids, mask, range(4))
        experts = model.encode_text(ids, mask)
    assert len(every) == 4
    assert torch.equal(some[0], every[0])
    assert torch.equal(some[1], every[2])
    assert torch.equal(experts, torch.stack(text[1:], 1))
    model.image_encoder.blocks[2] = None  # calling it would be an error
    with torch.no_grad():
        assert torch.equal(model.image_encoder(pixels, [2])[0], every[2])


# ---------------------------------------------------------------- heads
def test_every_head_is_made_by_its_row():
    config = ManagerTowerConfig.tiny(heads=tuple(HEADS), num_answers=7, head_hidden_scale=2)
    model = ManagerTower(config)
    assert list(model.heads) == list(HEADS)
    width = config.hidden_size
    logits = {"itm": 2, "vqa": 7, "nlvr2": 2, "snli_ve": 3, "retrieval": 1}
    for name, classes in logits.items():
        pooled = torch.randn(2, HEADS[name].pictures * 2 * width)
        assert model.heads[name](pooled).shape == (2, classes)
    assert model.heads["mlm"](torch.randn(2, 5, width)).shape == (2, 5, config.vocab_size)
    assert model.heads["vqa"].fc.out_features == 2 * 2 * width
    assert model.heads["nlvr2"].fc.out_features == 2 * 2 * width
    with pytest.raises(KeyError):
        make_head("cls", config)


def test_the_second_picture_has_a_type_of_its_own_only_where_a_head_reads_two():
    assert [name for name, row in HEADS.items() if row.pictures == 2] == ["nlvr2"]
    pair = ManagerTower(ManagerTowerConfig.tiny(heads=("nlvr2",))).type_embedding
    assert torch.equal(pair[2], pair[1])
    assert not torch.equal(pair[1], pair[0])
    assert len(ManagerTower(ManagerTowerConfig.tiny(heads=("vqa",))).type_embedding) == 2


# ---------------------------------------------------------------- configs and bad input
def test_presets():
    large = ManagerTowerConfig.large(num_layers=5)
    assert large.vision_layers == 24
    assert large.text_width == 1024
    assert large.num_layers == 5
    assert large.num_experts("image") == 6
    assert dataclasses.replace(large, fusion="last").num_experts("text") == 1
    assert dataclasses.replace(large, fusion="bridge").num_experts("text") == 5
    assert ManagerTowerConfig.base() == ManagerTowerConfig()


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("fusion", "tower", "fusion is 'tower'"),
        ("heads", ("cls",), "heads is 'cls'; it must be one of mlm, "),
        ("heads", ["vqa", "vqa"], "heads is .'vqa', 'vqa'.; it names one of them twice"),
        ("hidden_size", 97, "hidden_size 97 is not a multiple of num_heads 3"),
        ("image_size", 60, "image_size 60 is not a multiple of patch_size 16"),
        ("managed_layers_text", 9, "reads 9 layers of the text encoder"),
        ("max_text_len", 100, "max_positions is 52; it must be at least 102"),
        ("pad_token_id", 299, "max_positions is 52; it must be at least 316: .* pad_token_id . 1"),
        ("pad_token_id", 300, "pad_token_id is 300, but the ids of vocab_size 300 end at 299"),
        ("max_text_len", 2, "max_text_len is 2; it must be a whole number from 3"),
        ("vocab_size", 10**12, "vocab_size is 1000000000000"),
        ("num_layers", 10**6, "num_layers is 1000000; it must be a whole number from 1 to 1000"),
        ("vision_width", 10**9, "vision_width is 1000000000"),
        ("mlp_ratio", 10**9, "mlp_ratio is 1000000000"),
        ("image_size", 1_600_000, "image_size is 1600000"),
        ("num_layers", 0, "num_layers is 0"),
        ("vocab_size", "9", "vocab_size is '9'"),
        ("managed_layers_image", 0, "managed_layers_image is 0"),
        ("dropout", 1.5, "dropout is 1.5"),
    ],
)
def test_config_errors(field, value, message):
    with pytest.raises(ValueError, match=message):
        ManagerTowerConfig.tiny(**{field: value})


def test_the_pad_token_may_be_the_last_of_the_vocabulary():
    """Positions then start far into the table, which has to be longer."""
    config = ManagerTowerConfig.tiny(pad_token_id=299, max_positions=316)
    model = ManagerTower(config).eval()
    pixels, ids, mask = tiny_batch(config)
    ids = ids.clamp(max=298)
    expected = model(pixels, ids, mask).pooled
    padded = ids.masked_fill(mask == 0, 299)
    close(model(pixels, padded, mask).pooled[mask.all(1)], expected[mask.all(1)], 1e-6)
    assert expected.isfinite().all()


def test_flags_of_managers_mean_nothing_without_managers():
    fields = {field.name for field in dataclasses.fields(ManagerTowerConfig)}
    prefixes = ("manager_", "managed_", "mask_fused")
    assert set(MANAGER_FLAGS) == {name for name in fields if name.startswith(prefixes)}
    for name in MANAGER_FLAGS:
        ManagerTowerConfig.check_flags({name: 1})
        ManagerTowerConfig.check_flags({"fusion": "manager", name: 1})
        with pytest.raises(ValueError, match=f"--{name} means nothing with --fusion last"):
            ManagerTowerConfig.check_flags({"fusion": "last", name: 1})
    ManagerTowerConfig.check_flags({"fusion": "bridge", "num_layers": 2})


def test_every_flag_has_a_help_text():
    texts = {field.name: field.metadata["help"] for field in dataclasses.fields(ManagerTowerConfig)}
    for name, text in texts.items():
        assert len(text.split()) >= 3, name
        assert text != name.replace("_", " "), name
    assert len(set(texts.values())) == len(texts)


def test_input_errors():
    config = ManagerTowerConfig.tiny()
    model = ManagerTower(config)
    pixels, ids, mask = tiny_batch(config)
    with pytest.raises(ValueError, match="image_size 64"):
        model(pixels[..., :48], ids, mask)
    with pytest.raises(ValueError, match="60 tokens, the position table holds 50"):
        model(pixels, torch.full((2, 60), 5), torch.ones(2, 60))
    with pytest.raises(ValueError, match="are 2, not 3 layers"):
        model.text_managers[0](torch.randn(2, 2, 4, 96))
