"""systems/fiber.py against golden numbers of the official code, and its seams with the scripts."""

import itertools
import json

import pytest
import torch
from helpers import GOLDEN, ROOT, close
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import ask
import eval
import finetune
import loop
import prepare
import tasks
import train
from data import PairDataset
from images import image_transform
from loop import TowerRunConfig, lr_multiplier, set_learning_rate
from model import BertLayer
from objectives import Classification, class_logits
from scenes import demo_source
from systems import fiber
from systems.fiber import Fiber, FiberConfig, FiberPretraining
from weights import is_dead

# the full golden set has the folder among those of other systems
FOLDERS = [GOLDEN / "fiber", GOLDEN / "systems" / "fiber", ROOT / "tests" / "golden" / "fiber"]
FIBER = next(folder for folder in FOLDERS if folder.exists())
VISION_HEADS = (1, 2, 4, 8)
TEXT_HEADS = 5


def read(name):
    path = FIBER / name
    return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


@pytest.fixture(scope="module")
def state():
    return read("main.pretrain.state.safetensors")


@pytest.fixture(scope="module")
def delta():
    return read("main.heads.state_delta.safetensors")


@pytest.fixture(scope="module")
def inputs():
    values = read("main.inputs.safetensors")
    return {key: x.float() if x.is_floating_point() else x for key, x in values.items()}


def load(state, fused=6):
    return fiber.load_official(state, 128, VISION_HEADS, TEXT_HEADS, fused)


def without(state, *parts):
    return {key: x for key, x in state.items() if not any(part in key for part in parts)}


PRETRAINING_KEYS = ("mlm_score", "itm_score", "rank_output", "temp", "queue")


@pytest.fixture(scope="module")
def task_state(state, delta):
    """What the official model of a task has; so do ours of VQA, NLVR2 and captioning."""

    def make(head, *kept):
        dropped = [key for key in PRETRAINING_KEYS if key not in kept]
        added = {key: x for key, x in delta.items() if key.startswith(head)}
        return {**without(state, *dropped), **added}

    return make


# ---------------------------------------------------------------- the model
def watch(model):
    """{official name of a module: its output}, filled in each pass."""
    seen = {}

    def keep(name):
        def hook(module, args, out):
            seen[name] = out

        return hook

    model.text_encoder.ln.register_forward_hook(keep("text.embeddings.out"))
    for number, layer in enumerate(model.text_encoder.layers):
        layer.register_forward_hook(keep(f"text.layer{number}.out"))
    image = model.image_encoder
    image.ln_patch.register_forward_hook(keep("img.patch_embed.out"))
    image.ln_post.register_forward_hook(keep("img.norm.out"))
    stages = image.stage_of_block
    for number, block in enumerate(image.blocks):
        place = number - stages.index(stages[number])
        block.register_forward_hook(keep(f"img.stage{stages[number]}.block{place}.out"))
    for stage, name in enumerate(("stage0.out", "stage1.out", "stage2.downsample.out")):
        image.merges[stage].register_forward_hook(keep(f"img.{name}"))
    return seen


def check_states(seen, out, prefix):
    """Every stored state of a pass, to 5e-5; features are compared by their own tests."""
    stored = [key for key in out if key.startswith((f"{prefix}.img", f"{prefix}.text."))]
    assert stored
    for key in stored:
        close(seen[key.removeprefix(f"{prefix}.")], out[key], 5e-5)


@torch.no_grad()
def test_the_fused_model_equals_the_official_one(state, inputs):
    model = load(state)
    out = read("main.pretrain.out.safetensors")
    seen = watch(model)
    features = model(inputs["image"], inputs["text_ids"], inputs["text_masks"])
    check_states(seen, out, "fused")
    close(features.text, out["fused.text_feats"], 1e-5)
    close(features.image, out["fused.image_feats"], 1e-5)
    close(features.pooled, out["fused.cls_feats"], 5e-6)
    close(model.heads["itm"](features.pooled), out["fused.itm_logits"], 5e-6)
    close(model.heads["retrieval"](features.pooled), out["fused.rank_output"], 5e-6)

    masked = model(inputs["image"], inputs["text_ids_mlm"], inputs["text_masks"])
    close(masked.text, out["mlm.text_feats"], 1e-5)
    close(masked.pooled, out["mlm.cls_feats"], 5e-6)
    close(model.heads["mlm"](masked.text), out["mlm.logits"], 5e-6)


@torch.no_grad()
def test_the_dual_encoder_equals_the_official_one(state, inputs):
    model = load(state)
    out = read("main.pretrain.out.safetensors")
    seen = watch(model)
    ids = inputs["text_ids"]
    image, text = model.contrast_features(inputs["image"], ids, inputs["text_masks"])
    check_states(seen, out, "image_only")
    check_states(seen, out, "text_only")
    close(image, out["image_only.cls_feats"], 5e-6)
    close(text, out["text_only.cls_feats"], 5e-6)
    head = model.heads["itc"]
    close(head.image_transform(seen["img.norm.out"]), out["image_only.image_feats"], 1e-5)
    close(head.text_transform(seen["text.layer11.out"]), out["text_only.text_feats"], 1e-5)


@torch.no_grad()
def test_closed_gates_leave_the_two_encoders(state, inputs):
    closed = {key: torch.zeros_like(x) if "alpha" in key else x for key, x in state.items()}
    model = load(closed)
    out = read("main.alpha0.out.safetensors")
    seen = watch(model)
    features = model(inputs["image"], inputs["text_ids"], inputs["text_masks"])
    check_states(seen, out, "fused")
    close(features.text, out["fused.text_feats"], 1e-5)
    close(features.image, out["fused.image_feats"], 1e-5)
    close(features.pooled, out["fused.cls_feats"], 5e-6)

    # and to the last bit what the dual encoder computes
    experts = model.encode_image(inputs["image"])
    dual = model.image_transform(model.finish_image(experts))
    assert torch.equal(features.image, dual)
    gates = [name for name, _ in model.named_parameters() if "alpha" in name]
    assert len(gates) == 12


@torch.no_grad()
def test_each_alteration_moves_the_outputs_as_it_moves_the_official_ones(state, inputs):
    moved = read("main.sensitivity.json")
    model = load(state)
    ids = inputs["text_ids"]
    mask = inputs["text_masks"]
    right = model(inputs["image"], ids, mask)

    def check(name, features, atol=2e-5):
        official_names = {"text": "text_feats", "image": "image_feats", "pooled": "cls_feats"}
        for ours, theirs in official_names.items():
            if theirs in moved[name]:
                size = (getattr(features, ours) - getattr(right, ours)).abs().max().item()
                assert size == pytest.approx(moved[name][theirs], abs=atol), (name, theirs)

    # the last norm that the fused pass leaves out
    text_experts = model.encode_text(ids, mask)
    last = model.fuse_until_last(text_experts, model.encode_image(inputs["image"]), mask)
    text = model.text_transform(model.text_layer(5, last))
    image = model.last_image(last)
    altered = fiber.Features(text, image, model.pool(text, image))
    check("last text layer with its LayerNorm (as in captioning/ITC)", altered)
    # text without padding
    images = model.encode_image(inputs["image"])
    everything = torch.ones_like(mask)
    unmasked = model.fuse(model.encode_text(ids, everything), images, everything)
    check("text padding not masked", unmasked)
    # the queries without their norm
    for block in model.image_encoder.blocks[model.first_block :]:
        block.ln_cross = torch.nn.Identity()
    check("no norm_i2t_i (fine-grained v2)", model(inputs["image"], ids, mask))
    # more padding changes nothing
    model = load(state)
    padded = model(inputs["image"], F.pad(ids, (0, 2), value=1), F.pad(mask, (0, 2)))
    close(padded.pooled, right.pooled, 2e-6)


@torch.no_grad()
def test_without_fusion_the_image_side_is_plain_swin_to_the_bit(state, inputs):
    model = load(state)
    block = model.image_encoder.blocks[model.first_block]
    plain = fiber.SwinBlock(32, 4, 8, 4, block.shift, 0.0)
    own = block.state_dict()
    plain.load_state_dict({key: own[key] for key in plain.state_dict()})
    x = model.encode_image(inputs["image"])[:, -1]
    assert torch.equal(block(x), plain(x))
    # a text layer without image is a RoBERTa layer
    layer = model.text_encoder.layers[6]
    bert = BertLayer(40, 5, 80, 0.1, 1e-5).eval()
    own = layer.state_dict()
    bert.load_state_dict({key: own[key] for key in bert.state_dict()})
    x = model.encode_text(inputs["text_ids"], inputs["text_masks"])[:, -1]
    assert torch.equal(layer(x, None), bert(x, None))


@torch.no_grad()
@pytest.mark.parametrize("fused", [2, 4])
def test_the_dual_encoder_is_the_same_however_many_pairs_are_fused(state, inputs, fused):
    kept = {}
    stages = FiberConfig().stage_of_block()
    for key, x in state.items():
        name = key.replace("vit_model.layers.", "").replace("text_transformer.encoder.layer.", "")
        first, *rest = name.split(".")
        number = int(first) if first.isdigit() else 99
        if key.startswith("vit_model.layers.") and "i2t" in key:
            number = stages.index(number) + int(rest[1]) - 12  # block 18 is of layer 6
        is_cross = "i2t" in key or "crossattention_t2i" in key
        if not is_cross or number >= 12 - fused:
            kept[key] = x
    model = load(kept, fused)
    out = read("main.pretrain.out.safetensors")
    ids = inputs["text_ids"]
    image, text = model.contrast_features(inputs["image"], ids, inputs["text_masks"])
    close(image, out["image_only.cls_feats"], 5e-6)
    close(text, out["text_only.cls_feats"], 5e-6)
    assert len([name for name, _ in model.named_parameters() if "alpha" in name]) == 2 * fused


# ---------------------------------------------------------------- official weights
def full_state():
    shapes = read("full_pretrain_manifest.json")
    state = {}
    for key, (shape, dtype) in shapes.items():
        state[key] = torch.empty(shape, dtype=getattr(torch, dtype.split(".")[1]), device="meta")
    return state


def test_the_full_size_manifest_loads_strictly():
    state = full_state()
    assert len(state) == 722
    config = fiber.official_config(state, 384, (4, 8, 16, 32), 12, 6)
    heads = ("mlm", "itm", "itc", "retrieval")
    assert config == FiberConfig(heads=heads, max_text_len=40)
    with torch.device("meta"):
        model = Fiber(config)
    parameters = fiber.from_official(state, config)
    assert parameters.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(parameters, strict=False, assign=True)
    for wrong in ("surplus", "vit_model.norm.weight"):
        damaged = {**state, wrong: torch.empty(3, device="meta")}
        with pytest.raises(ValueError, match=wrong):
            fiber.from_official(damaged, config)
    del state["cross_modal_text_pooler.dense.bias"]
    with pytest.raises(ValueError, match="missing: cross_modal_text_pooler.dense.bias"):
        fiber.from_official(state, config)


@pytest.mark.parametrize("task", ["pretrain", "vqa", "nlvr2", "itc", "itm", "caption"])
def test_each_task_has_the_published_number_of_parameters(task):
    """Of those that ours leaves out, it is said how many they are."""
    counts = read("param_counts.json")[task]
    state = full_state()
    for key in counts.get("pretrain_keys_absent", ()):
        del state[key]
    for key, shape in counts.get("keys_not_in_pretrain", {}).items():
        state[key] = torch.empty(shape, device="meta")
    config = fiber.official_config(state, 384, (4, 8, 16, 32), 12, 6)
    with torch.device("meta"):
        ours = sum(parameter.numel() for parameter in Fiber(config).parameters())
    dead = [key for key in state if is_dead(key, fiber.idle_keys(config))]
    buffers = ("queue", "position_ids", "attn_mask", "relative_position_index")
    idle = sum(state[key].numel() for key in dead if not any(b in key for b in buffers))
    assert ours + idle == counts["params"]


def test_export_is_the_inverse_of_the_import(state):
    model = load(state)
    exported = fiber.to_official(dict(model.named_parameters()), model.config)
    idle = {key for key in state if is_dead(key, fiber.idle_keys(model.config))}
    assert exported.keys() == state.keys() - idle
    for key, x in exported.items():
        assert torch.equal(x, state[key]), key


def test_bias_tables_are_resized_as_officially():
    tables = read("main.posbias.safetensors")
    for side in (224, 576):
        resized = fiber.resize_position_bias(tables["before_384"], side // 32)
        close(resized, tables[f"after_{side}"], 1e-6)
    assert torch.equal(fiber.resize_position_bias(tables["before_384"], 12), tables["before_384"])
    with pytest.raises(ValueError, match="odd square"):
        fiber.resize_position_bias(torch.zeros(16, 4), 12)


# ---------------------------------------------------------------- losses and gradients
def check_gradients(model, out, absent=()):
    """Every stored gradient: rtol 1e-3, or 1e-4 of the largest value of its tensor."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours = fiber.to_official(grads, model.config)
    stored = [key for key in out if key.startswith("grad.")]
    assert stored
    for key in stored:
        theirs = out[key]
        atol = max(1e-6, 1e-4 * theirs.abs().max().item())
        name = key.removeprefix("grad.")
        assert torch.allclose(ours[name], theirs, rtol=1e-3, atol=atol), key
    # what gets none there gets none here
    trained = {key for key, x in ours.items() if x.abs().sum() > 0}
    assert not trained & set(absent)


def fill_queue(model, state):
    """The golden queue; its pictures are numbered by their places."""
    queue = model.heads["itc"].queue
    queue.text.copy_(state["text_queue"].T)
    queue.image.copy_(state["image_queue"].T)
    queue.input_ids.copy_(state["text_input_queue"])
    queue.attention_mask.copy_(state["text_input_mask_queue"])
    queue.rows.copy_(torch.arange(queue.size))
    queue.place.copy_(state["queue_ptr"])
    queue.filled.copy_(state["queue_total"])
    return queue


def pretraining_batch(inputs):
    return {
        "pixels": inputs["image"],
        "input_ids": inputs["text_ids"],
        "attention_mask": inputs["text_masks"],
        "mlm_ids": inputs["text_ids_mlm"],
        "mlm_labels": inputs["text_labels_mlm"],
        "image_index": torch.tensor([100, 101, 102]),
    }


@pytest.fixture
def pretraining(state, inputs, monkeypatch):
    """(task, its golden numbers, the weights of the draws): the draws are the golden ones."""
    out = read("main.loss.safetensors")
    model = load(state)
    model.config.whole_queue = True
    fill_queue(model, state)
    golden_draws = iter([out["neg.image_index"], out["neg.text_index"]])
    weights = []

    def draw(given, generator):
        weights.append(given)
        return next(golden_draws)

    def load_pictures(rows):
        index = 3 + rows  # places of the queue come after the three of the batch
        where = [out["neg.image_index"].tolist().index(i) for i in index.tolist()]
        return out["neg.image"][where].float()

    monkeypatch.setattr(fiber, "draw_negatives", draw)
    task = FiberPretraining(model, ("mlm", "itm", "itc"), False, load_pictures).eval()
    task.shares = [3]
    return task, out, weights


def test_the_objectives_and_their_gradients_equal_the_official_ones(pretraining, inputs):
    task, out, weights = pretraining
    batch = pretraining_batch(inputs)
    seen = {}
    task.model.heads["itm"].register_forward_hook(lambda m, a, logits: seen.update(itm=logits))
    sums = task(batch)
    counts = task.counts(batch)
    losses = {name: sums[name] / counts[name] for name in sums}
    assert losses.keys() == {"mlm", "itm", "itc"}
    for name, loss in losses.items():
        close(loss, out[f"{name}_loss"], 2e-6)
    close(seen["itm"], out["itm_logits"], 5e-6)
    close(weights[0], out["neg.weights_t2i"], 2e-6)
    close(weights[1], out["neg.weights_i2t"], 2e-6)
    sum(losses.values()).backward()
    check_gradients(task.model, out, read("main.json")["runs"]["pretrain_loss"]["no_grad"])


def test_the_labels_and_texts_of_hard_negatives_are_the_official_ones(pretraining, inputs, state):
    task, out, _ = pretraining
    model = task.model
    batch = pretraining_batch(inputs)
    with torch.no_grad():
        texts = model.encode_text(batch["input_ids"], batch["attention_mask"])
        pairs = fiber.Pairs(texts, model.encode_image(batch["pixels"]), batch["attention_mask"])
        _, three, labels = task.compare(pairs, batch)
        expected = model.encode_text(out["neg.text_ids"], out["neg.text_masks"])
        images = model.encode_image(out["neg.image"].float())
    assert torch.equal(labels, out["itm_labels"].long())
    close(three.text_experts[3:6], expected, 1e-6)
    assert torch.equal(three.mask[3:6], out["neg.text_masks"])
    close(three.image_experts[6:], images, 1e-6)


def test_the_queue_takes_the_place_of_its_oldest_pairs(pretraining, inputs, monkeypatch):
    task, out, _ = pretraining
    monkeypatch.setattr(fiber, "draw_negatives", lambda weights, generator: torch.zeros(3).long())
    model = task.model
    batch = pretraining_batch(inputs)
    texts = model.encode_text(batch["input_ids"], batch["attention_mask"])
    pairs = fiber.Pairs(texts, model.encode_image(batch["pixels"]), batch["attention_mask"])
    task.compare(pairs, batch)
    assert model.heads["itc"].queue.filled == 5  # measuring leaves it as it is
    task.train()
    for module in (model.text_encoder, model.image_encoder):
        module.eval()  # no dropout, as in the golden run
    for _ in range(3):
        task.compare(pairs, batch)
    queue = model.heads["itc"].queue
    close(queue.text, out["queue_after.text_queue"].T, 5e-6)
    close(queue.image, out["queue_after.image_queue"].T, 5e-6)
    assert torch.equal(queue.input_ids, out["queue_after.text_input_queue"])
    assert torch.equal(queue.attention_mask, out["queue_after.text_input_mask_queue"])
    assert torch.equal(queue.place, out["queue_after.queue_ptr"])
    assert queue.filled == min(12, int(out["queue_after.queue_total"]))
    assert queue.rows[[5, 8, 11, 0, 1]].tolist() == [100, 100, 100, 101, 102]


def test_what_is_not_filled_takes_no_part(pretraining, inputs):
    """Without whole_queue the loss is that of a queue with the filled places alone."""
    task, _, _ = pretraining
    model = task.model
    model.config.whole_queue = False
    batch = pretraining_batch(inputs)
    with torch.no_grad():
        texts = model.encode_text(batch["input_ids"], batch["attention_mask"])
        pairs = fiber.Pairs(texts, model.encode_image(batch["pixels"]), batch["attention_mask"])
        loss, _, _ = task.compare(pairs, batch)
        text, image = model.contrast(*pairs[:2], pairs.mask)
        queue = model.heads["itc"].queue
        temperature = model.heads["itc"].temperature
        own = torch.arange(3)
        images = torch.cat([image, queue.image[:5]])
        texts = torch.cat([text, queue.text[:5]])
        both = F.cross_entropy(text @ images.T / temperature, own, reduction="sum")
        both += F.cross_entropy(image @ texts.T / temperature, own, reduction="sum")
    close(loss, both / 2, 1e-5)


def test_matching_without_itc_equals_the_official_one(state, inputs):
    out = read("main.loss.safetensors")
    model = load(without(state, "temp", "queue", "mlm_score"))
    labels = out["plain_itm.labels"].long()
    false_images = torch.where(labels[:, None, None, None] == 1, inputs["image"], inputs["image_b"])
    batch = {
        "pixels": inputs["image"],
        "itm_pixels": false_images,
        "input_ids": inputs["text_ids"],
        "attention_mask": inputs["text_masks"],
        "itm_labels": labels,
    }
    task = FiberPretraining(model, ("itm",), False, lambda rows: rows).eval()
    with torch.no_grad():
        close(task(batch)["itm"] / 3, out["plain_itm.loss"], 2e-6)
        pooled = model(false_images, inputs["text_ids"], inputs["text_masks"]).pooled
        close(model.heads["itm"](pooled), out["plain_itm.logits"], 5e-6)


def test_vqa_equals_the_official_one(task_state, inputs):
    out = read("main.vqa.out.safetensors")
    model = load(task_state("vqa"))
    batch = {
        "pixels": inputs["image"],
        "input_ids": inputs["text_ids"],
        "attention_mask": inputs["text_masks"],
        "targets": out["targets"],
    }
    close(class_logits(model, "vqa", batch), out["logits"], 5e-6)
    # official: mean over everything, times the number of answers
    loss = Classification(model, "vqa")(batch)["vqa"] / 3
    close(loss, out["loss"], 5e-6)
    loss.backward()
    check_gradients(model, out, read("main.json")["runs"]["vqa"]["no_grad"])
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle  # what nothing reads is frozen


def test_nlvr2_equals_the_official_one(task_state, inputs):
    out = read("main.nlvr2.out.safetensors")
    model = load(task_state("nlvr2"))
    batch = {
        "pixels": inputs["image"],
        "pixels_1": inputs["image_b"],
        "input_ids": inputs["text_ids"],
        "attention_mask": inputs["text_masks"],
        "label": torch.tensor([0, 1, 0]),
    }
    close(class_logits(model, "nlvr2", batch), out["logits"], 5e-6)
    loss = Classification(model, "nlvr2")(batch)["nlvr2"] / 3
    close(loss, out["loss"], 2e-6)
    loss.backward()
    check_gradients(model, out, read("main.json")["runs"]["nlvr2"]["no_grad"])


# ---------------------------------------------------------------- the optimizer
def test_every_parameter_has_its_official_rate_and_decay():
    for task, base, head in (("pretrain", 1e-5, 5.0), ("vqa", 2e-5, 50.0)):
        golden = read("main.optim.json")[task]
        assert golden["defaults"]["betas"] == [0.9, TowerRunConfig().beta2]
        run = TowerRunConfig(learning_rate=base, lr_mult_head=head, lr_mult_cross_modal=5.0)
        for name, rate_and_decay in golden["params"].items():
            assert fiber.official_rule(name, run) == pytest.approx(rate_and_decay), name
        for step, factor in golden["lr_factor_at_step"].items():
            assert lr_multiplier(int(step), 100_000, 10_000, "linear") == pytest.approx(factor)


def official_step(group, moments, step):
    """AdamW of transformers: eps before the bias correction, decay after the update."""
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        mean, square = moments.setdefault(
            parameter, (torch.zeros_like(parameter), torch.zeros_like(parameter))
        )
        mean.mul_(0.9).add_(parameter.grad, alpha=0.1)
        square.mul_(0.98).addcmul_(parameter.grad, parameter.grad, value=0.02)
        size = group["lr"] * (1 - 0.98**step) ** 0.5 / (1 - 0.9**step)
        parameter.addcdiv_(mean, square.sqrt() + 1e-8, value=-size)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


@pytest.mark.parametrize("kind", ["official", "torch"])
def test_five_steps_end_where_the_official_ones_do(task_state, inputs, kind):
    """With the official update to 2e-6; torch's AdamW decays before it, and stays close."""
    golden = read("main.optim_demo.safetensors")
    meta = read("main.optim_demo.json")
    settings = meta["config"]
    run = TowerRunConfig(
        learning_rate=settings["base_lr"],
        lr_mult_head=settings["head"],
        lr_mult_cross_modal=settings["cross"],
        weight_decay=settings["weight_decay"],
        warmup=settings["warmup_steps"],
        max_steps=settings["max_steps"],
    )
    model = load(task_state("vqa"))
    groups = fiber.param_groups(model, run)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, run.beta2), eps=1e-8)
    moments = {}
    task = Classification(model, "vqa")
    batch = {
        "pixels": inputs["image"],
        "input_ids": inputs["text_ids"],
        "attention_mask": inputs["text_masks"],
        "targets": read("main.vqa.out.safetensors")["targets"],
    }

    def check(step, atol, rtol):
        ours = fiber.to_official(dict(model.named_parameters()), model.config)
        for key, x in golden.items():
            name = key.removeprefix(f"step{step}.")
            if name != key and name in ours:
                torch.testing.assert_close(ours[name], x, atol=atol, rtol=rtol)

    check(0, 0, 0)
    for step, (loss, rates) in enumerate(meta["loss_and_group_lrs_before_each_step"]):
        set_learning_rate(optimizer, run, step)
        ours = sorted(group["lr"] for group in optimizer.param_groups)
        assert ours == pytest.approx(sorted(rates))
        optimizer.zero_grad()
        ours = task(batch)["vqa"] / 3
        assert ours.item() == pytest.approx(loss, rel=1e-5 if kind == "official" else 5e-3)
        ours.backward()
        if kind == "torch":
            optimizer.step()
        else:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    official_step(group, moments, step + 1)
        if kind == "official" and step + 1 in (2, 5):
            check(step + 1, 2e-6, 2e-6)
    if kind == "torch":
        check(5, 3e-3, 1e-2)
    # the gate of a layer that is not fused is dropped: officially it never moves
    gate = "text_transformer.encoder.layer.0.alpha_t2i"
    assert torch.equal(golden[f"step0.{gate}"], golden[f"step5.{gate}"])


# ---------------------------------------------------------------- captioning
@pytest.fixture(scope="module")
def captioner(task_state):
    return load(task_state("cross_modal_att_layers", "mlm_score"))


def test_captioning_equals_the_official_one(captioner, inputs):
    model = captioner
    out = read("main.caption.out.safetensors")
    ids = inputs["text_ids"]
    mask = inputs["text_masks"]
    seen = watch(model)
    image = model.finish_image(model.encode_image(inputs["image"]))
    logits = model.caption_logits(image, ids, mask)
    stored = [key for key in out if key.startswith(("cap.text.", "cap.img."))]
    for key in stored:
        close(seen[key.removeprefix("cap.")], out[key], 5e-5)
    close(model.text_transform(seen["text.layer11.out"]), out["cap.text_feats"], 1e-5)
    # what follows padding is read by nobody
    close(logits, out["cap.logits"], 5e-6)
    labels = fiber.next_words(ids, mask)
    assert torch.equal(labels, out["cap.labels"])

    batch = {"pixels": inputs["image"], "input_ids": ids, "attention_mask": mask}
    task = fiber.Captioning(model).eval()
    loss = task(batch)["caption"] / task.counts(batch)["caption"]
    close(loss, out["cap.loss"], 2e-6)
    loss.backward()
    check_gradients(model, out, read("main.json")["runs"]["caption"]["no_grad"])
    close(fiber.gold_loss(logits, logits, labels), out["gold.loss"], 2e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_decoded_ids_are_the_official_ones(captioner, inputs, beams):
    words = fiber.Words(begin=0, end=2, mask=119, pad=1)
    ids = fiber.write_captions(captioner, inputs["image"], words, beams, length=12)
    expected = read("main.json")["runs"]["caption"][f"beam{beams}"]
    assert [" ".join(str(i) for i in row) for row in ids.tolist()] == expected


def test_a_caption_sees_only_the_words_before(captioner, inputs):
    ids = inputs["text_ids"].clone()
    mask = torch.ones_like(ids)
    with torch.no_grad():
        image = captioner.finish_image(captioner.encode_image(inputs["image"]))
        before = captioner.caption_logits(image, ids, mask)
        ids[:, 6] = 5
        after = captioner.caption_logits(image, ids, mask)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def best_caption(table, begin, end, length):
    """All captions of at most `length` words, searched: the highest mean log-probability."""
    best = (-float("inf"), ())
    for size in range(1, length + 1):
        for words in itertools.product(range(len(table)), repeat=size):
            if end in words[:-1] or (words[-1] != end and size < length):
                continue
            chain = (begin, *words)
            score = sum(table[a][b] for a, b in itertools.pairwise(chain)) / size
            best = max(best, (score, words))
    return best[1]


@pytest.mark.parametrize("seed", range(6))
def test_a_wide_beam_finds_the_best_caption(monkeypatch, seed):
    """A chain of words whose probabilities follow from the last word, so that all can be tried."""
    words = fiber.Words(begin=0, end=1, mask=2, pad=3)
    draws = torch.Generator().manual_seed(seed)
    table = 2 * torch.randn(7, 7, generator=draws)
    table[:, [0, 2, 3]] = -30  # no word of a caption
    table = table.log_softmax(-1)
    monkeypatch.setattr(fiber, "next_word_scores", lambda model, image, ids, w: table[ids[:, -1]])

    class Blind:
        encode_image = finish_image = staticmethod(lambda pixels: pixels)

    found = fiber.write_captions(Blind(), torch.zeros(2, 1), words, beams=200, length=5)
    written = [i for i in found[0].tolist() if i != words.pad]
    assert tuple(written) == best_caption(table.tolist(), 0, 1, 4)
    assert torch.equal(found[0], found[1])


# ---------------------------------------------------------------- files
def test_a_checkpoint_of_the_authors_becomes_a_folder(state, tmp_path):
    source = tmp_path / "fiber.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": {"config": {"image_size": 128}}}, source)
    out = tmp_path / "out"
    prepare.main(["weights", "--system", "fiber", "--source", str(source), "--out", str(out)])
    model = fiber.load_fiber(out)
    assert model.config.image_size == 128
    assert model.config.vision_heads == VISION_HEADS
    exported = fiber.to_official(dict(model.named_parameters()), model.config)
    for key, x in exported.items():
        assert torch.equal(x, state[key]), key

    # another task, and larger pictures
    larger = fiber.load_fiber(out, heads=("vqa",), image_size=160, num_answers=5)
    table = larger.image_encoder.blocks[3].position_bias
    key = "vit_model.layers.1.blocks.1.attn.relative_position_bias_table"
    close(table, fiber.resize_position_bias(state[key], 5), 0)
    with pytest.raises(ValueError, match="its weights mean nothing with another value"):
        fiber.load_fiber(out, text_heads=4)


def test_what_is_no_fiber_is_refused(state, tmp_path):
    source = tmp_path / "x.safetensors"
    convert = [
        "weights",
        "--system",
        "fiber",
        "--source",
        str(source),
        "--out",
        str(tmp_path / "o"),
    ]
    save_file({"something.weight": torch.zeros(2)}, source)
    with pytest.raises(ValueError, match="no official FIBER weights: they have no vit_model"):
        prepare.main(convert)
    save_file(without(state, "cross_modal_text_pooler.dense"), source)
    with pytest.raises(ValueError, match="missing: cross_modal_text_pooler.dense.bias"):
        prepare.main(convert)


@torch.no_grad()
def test_both_encoders_come_from_pretrained_ones(state, inputs, tmp_path):
    swin = {}
    roberta = {}
    for key, x in state.items():
        if key.startswith("vit_model.") and "i2t" not in key:
            swin[key.removeprefix("vit_model.")] = x.contiguous()
        if key.startswith("text_transformer.") and "t2i" not in key:
            roberta[key.replace("text_transformer.", "roberta.")] = x.contiguous()
    swin["head.weight"] = torch.zeros(5, 64)
    torch.save({"model": swin}, tmp_path / "swin.pth")
    fiber.convert(tmp_path / "swin.pth", tmp_path / "swin")
    save_file(roberta, tmp_path / "roberta.safetensors")
    whole = load(state)
    model = Fiber(whole.config).eval()
    fiber.load_unimodal(model, tmp_path / "swin", tmp_path / "roberta.safetensors")
    images = (whole.encode_image(inputs["image"]), model.encode_image(inputs["image"]))
    assert torch.equal(whole.finish_image(images[0]), model.finish_image(images[1]))
    ids = inputs["text_ids"]
    mask = inputs["text_masks"]
    texts = (whole.encode_text(ids, mask), model.encode_text(ids, mask))
    assert torch.equal(whole.finish_text(texts[0], mask), model.finish_text(texts[1], mask))
    # the gates are closed at the start
    assert all(p.sum() == 0 for name, p in model.named_parameters() if "alpha" in name)


# ---------------------------------------------------------------- the scripts
SMALL = (
    "--system fiber --vision_width 8 --vision_depths 1,1,1,1 --vision_heads 1,1,2,2 "
    "--text_width 16 --text_layers 2 --text_heads 2 --text_mlp_width 32 --hidden_size 16 "
    "--fused_layers 2 --queue_size 12 --batch_size 8 --micro_batch_size 8 --eval_size 8 "
    "--log_every 1"
).split()
TASK = "--system fiber --batch_size 8 --micro_batch_size 8 --eval_size 8 --max_steps 2".split()


@pytest.fixture(scope="module")
def small_data(small):
    """Flags for the pictures of the session, which are few."""
    start = small.index("--data_root")
    return [*SMALL, *small[start:], "--transform", "albef"]


@pytest.fixture(scope="module")
def pretrained(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fiber") / "pretrained"
    train.main([*small_data, "--max_steps", "4", "--save_every", "2", "--out_dir", str(folder)])
    return folder


@pytest.fixture
def few_scenes(monkeypatch):
    def few(kind, split, size, seed=0, image_size=64):
        return demo_source(kind, split, min(size, 16), seed, image_size)

    monkeypatch.setattr(finetune, "demo_source", few)
    monkeypatch.setattr(tasks, "demo_source", few)


def test_a_run_goes_on_with_its_queue_to_the_same_bits(
    small_data, pretrained, tmp_path, monkeypatch
):
    learn = loop.Learner.learn

    def die(self, step, batches, dataset):
        if step == 3:
            raise KeyboardInterrupt
        return learn(self, step, batches, dataset)

    flags = [*small_data, "--max_steps", "4", "--save_every", "2", "--out_dir", str(tmp_path)]
    monkeypatch.setattr(loop.Learner, "learn", die)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags)
    monkeypatch.setattr(loop.Learner, "learn", learn)
    train.main(flags)
    whole = load_file(pretrained / "model.safetensors")
    resumed = load_file(tmp_path / "model.safetensors")
    assert whole.keys() == resumed.keys()
    for key, x in whole.items():
        assert torch.equal(x, resumed[key]), key
    assert whole["heads.itc.queue.filled"] == 12  # 32 pairs have gone through it


@pytest.mark.parametrize("task", ["vqav2", "nlvr2", "flickr30k"])
def test_the_scripts_run_it_without_knowing_it(pretrained, few_scenes, tmp_path, capsys, task):
    flags = [*TASK, "--task", task, "--data", "demo", "--init", str(pretrained)]
    finetune.main([*flags, "--out_dir", str(tmp_path)])
    capsys.readouterr()
    eval.main(["--task", task, "--data", "demo", "--checkpoint", str(tmp_path)])
    printed = capsys.readouterr().out
    metric = "ir_r1" if task == "flickr30k" else "accuracy"
    assert metric in printed
    metrics = json.loads((tmp_path / "eval.json").read_text())["splits"]["demo"]
    assert 0 <= metrics[metric] <= 1


def test_one_can_ask_it(pretrained, tmp_path, capsys):
    picture = tmp_path / "x.png"
    demo_source("captions", "train", 1).images(0)[0].save(picture)
    flags = ["--checkpoint", str(pretrained), "--image", str(picture)]
    ask.main(["match", *flags, "--text", "a red circle", "--text", "a blue square"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ITM", "ITM"]
    assert all("ITC" in line for line in lines)


@torch.no_grad()
def test_it_has_the_methods_of_a_two_tower_model(task_state, inputs):
    model = load(task_state("vqa"))
    texts = model.encode_text(inputs["text_ids"], inputs["text_masks"])
    images = model.encode_image(inputs["image"])
    features = model.fuse(texts, images, inputs["text_masks"])
    whole = model(inputs["image"], inputs["text_ids"], inputs["text_masks"])
    assert torch.equal(features.pooled, whole.pooled)
    out = read("main.vqa.out.safetensors")
    close(model.heads["vqa"](features.pooled), out["logits"], 5e-6)


def test_a_system_that_is_not_there_is_one_sentence(pretrained, monkeypatch):
    with pytest.raises(ValueError, match="--system is 'nobody'; it must be one of fiber"):
        train.main(["--system", "nobody"])
    with pytest.raises(
        ValueError, match="not the config of a ManagerTower: its \"model\" is 'Fiber'"
    ):
        finetune.main(["--task", "vqav2", "--data", "demo", "--init", str(pretrained)])
    with pytest.raises(ValueError, match="there is no such preset"):
        train.main(["--system", "fiber", "--model", "large"])
    monkeypatch.setitem(train.SYSTEMS, "fiber", "systems.gone")
    with pytest.raises(ValueError, match="--system fiber is systems/gone.py, which is not there"):
        train.main(["--system", "fiber"])


def test_the_queue_does_not_go_with_shards(small_data, tmp_path):
    with pytest.raises(ValueError, match="--shard does not go with FIBER's ITC"):
        train.main([*small_data, "--shard", "--max_steps", "1", "--out_dir", str(tmp_path)])


def test_a_picture_of_the_queue_is_that_of_its_record():
    source = demo_source("captions", "train", 4, image_size=32)
    dataset = PairDataset(source, transform=image_transform("albef", 32, train=False))
    loader = fiber.PictureLoader(dataset, threads=2)
    rows = torch.tensor([2, 0, 2])
    expected = [dataset.transform(source.images(int(row))[0], None) for row in rows]
    assert torch.equal(loader(rows), torch.stack(expected))


def test_both_captions_of_a_scene_are_right():
    caption = "a large red circle is above a small blue square"
    other = "a small blue square is below a large red circle"
    assert fiber.both_captions(caption) == [caption, other]
    assert fiber.both_captions(other) == [other, caption]
    for row in demo_source("captions", "train", 8).texts():
        assert len(fiber.both_captions(row["text"])) == 2
