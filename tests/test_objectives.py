"""objectives.py: ITC, hard negatives, ITM and MLM, and the losses of the downstream tasks, against
the numbers of the official code; pre-training also against the bare model.
"""

import pytest
import torch
from helpers import check_gradients, close, golden, golden_model, present
from torch.nn import functional as F

import objectives
from model import ManagerTower, ManagerTowerConfig
from objectives import contrastive_logits, itc_loss, negative_weights

# ---------------------------------------------------------------- objectives


def experts(model, inputs):
    return model.encode_text(inputs["text_ids"], inputs["text_masks"]), model.encode_image(
        inputs["image"]
    )


def same_pairs(case, size):
    index = torch.tensor([4, 9, 4, 2]) if "irtr" in case else torch.arange(size)
    return (index[:, None] == index).float()


@pytest.mark.parametrize(
    "name",
    present(
        "eqdim.head_mlm_itm_itc",
        "eqdim.head_irtr_itm_itc",
        "eqdim.head_mlm_itmitc_pretrain",
        "eqdim.head_irtr_itm_itc_bt",
        "eqdim.head_mlm_itm_itc_bt",
    ),
)
def test_contrastive_objectives(name, monkeypatch):
    model, (inputs, out) = golden_model(name), golden(name)
    text, image = experts(model, inputs)
    for ours, key in zip(model.contrast(text, image), ("text", "image"), strict=True):
        close(ours, out[f"unimodal_feats_{key}"], 1e-5)
    logits, logits_t = contrastive_logits(model, text, image)
    close(logits, out["itc_logits_t2i"], 5e-5)
    close(logits_t, out["itc_logits_i2t"], 5e-5)
    same, rows_ = same_pairs(name, 4), slice(0, 4)
    itc = itc_loss(logits, logits_t, same, rows_) / 4
    close(itc, out["itc_loss"], 1e-5)
    loss = itc
    if "multinomial_weights" in out:
        weights = torch.cat([negative_weights(logits, same), negative_weights(logits_t, same)])
        close(weights, out["multinomial_weights"], 1e-5)
        monkeypatch.setattr(
            objectives, "draw_negatives", lambda weights, generator: out["multinomial_choices"]
        )
        pairs = objectives.Pairs(text, image, inputs["text_masks"])
        three, labels = objectives.hard_negative_pairs(pairs, (logits, logits_t), same, rows_)
        itm = model.heads["itm"](model.fuse_pooled(*three))
        close(itm, out["itm_logits"], 2e-5)
        assert torch.equal(labels, out["itm_labels"])
        close(F.cross_entropy(itm, labels), out["itm_loss"], 1e-5)
        loss = loss + F.cross_entropy(itm, labels)
    else:
        match = out["itm_labels"].long()
        images = torch.where(match[:, None, None, None] == 1, inputs["image"], inputs["image_b"])
        pooled = model(images, inputs["text_ids"], inputs["text_masks"]).pooled
        itm = F.cross_entropy(model.heads["itm"](pooled), match)
        close(itm, out["itm_loss"], 1e-5)
        loss = loss + itm
    if "mlm_labels" in out:
        logits = model.heads["mlm"](
            model(inputs["image"], out["mlm_ids"], inputs["text_masks"]).text
        )
        loss = loss + F.cross_entropy(logits.flatten(0, 1), out["mlm_labels"].flatten())
    close(loss, out["total_loss"], 2e-5)
    loss.backward()
    check_gradients(model, out, "grad.", 5e-5)


def test_temperature_is_clamped_in_place():
    name = present("eqdim.head_mlm_itm_itc", "eqdim.head_irtr_itm_itc")[0]
    model, (inputs, _) = golden_model(name), golden(name)
    for before, after in ((0.8, 0.5), (1e-5, 0.001)):
        model.heads["itc"].temperature.data.fill_(before)
        contrastive_logits(model, *experts(model, inputs))
        assert model.heads["itc"].temperature.item() == pytest.approx(after)


def test_rows_without_negatives_draw_uniformly():
    weights = negative_weights(torch.randn(3, 3), torch.ones(3, 3))
    close(weights, torch.full((3, 3), 1e-5), 0)


def test_pretraining_task_is_the_sum_of_the_official_losses():
    """Pretraining.forward on a hand-made batch, with both ways of getting the image experts,
    against the bare model.
    """
    torch.manual_seed(0)
    model = ManagerTower(ManagerTowerConfig.tiny(manager_noise=False)).eval()
    pixels, ids, mask = (
        torch.randn(4, 3, 64, 64),
        torch.randint(5, 300, (4, 24)),
        torch.ones(4, 24, dtype=torch.long),
    )
    labels = torch.full((4, 24), -100)
    labels[:, 3] = ids[:, 3]
    match = torch.tensor([1, 0, 0, 1])
    batch = {
        "pixels": pixels,
        "input_ids": ids,
        "attention_mask": mask,
        "mlm_ids": ids,
        "mlm_labels": labels,
        "itm_labels": match,
        "itm_pixels": pixels[[0, 0, 3, 3]],
    }
    mlm = F.cross_entropy(
        model.heads["mlm"](model(pixels, ids, mask).text).flatten(0, 1), labels.flatten()
    )
    itm = F.cross_entropy(model.heads["itm"](model(batch["itm_pixels"], ids, mask).pooled), match)
    for share in (False, True):
        task = objectives.Pretraining(model, ("mlm", "itm"), share_images=share)
        counts, sums = task.counts(batch), task(batch)
        close(sums["mlm"] / counts["mlm"], mlm, 1e-5)
        close(sums["itm"] / counts["itm"], itm, 1e-5)  # the partners of 1 and 2 are 0 and 3


# ---------------------------------------------------------------- downstream tasks
HEAD_OF = {"vqa": "vqa", "snli": "snli_ve", "nlvr2": "nlvr2"}  # the official name -> ours


@pytest.mark.parametrize("name", present("main.head_vqa", "main.head_snli", "main.head_nlvr2"))
def test_classification_losses_equal_the_official_ones(name):
    model = golden_model(name)
    inputs, out = golden(name)
    head = HEAD_OF[name.removeprefix("main.head_")]
    batch = {
        "pixels": inputs["image"],
        "input_ids": inputs["text_ids"],
        "attention_mask": inputs["text_masks"],
    }
    if head == "vqa":
        batch["targets"] = out["vqa_targets"]
    elif head == "snli_ve":
        batch["label"] = torch.tensor([2, 0, 1])
    else:
        batch["label"] = out["nlvr2_labels"]
        batch["pixels_1"] = inputs["image_b"]
    task = objectives.Classification(model, head)
    loss = task(batch)[head] / task.counts(batch)[head]
    close(loss, out["total_loss"], 1e-5)
    loss.backward()
    check_gradients(model, out, "grad.", 5e-5)


@pytest.mark.parametrize("name", present("eqdim.head_irtr_itm_itc", "eqdim.head_irtr_itm_itc_bt"))
def test_retrieval_loss_equals_the_official_one(name, monkeypatch):
    model = golden_model(name)
    inputs, out = golden(name)
    monkeypatch.setattr(
        objectives, "draw_negatives", lambda weights, generator: out["multinomial_choices"]
    )
    batch = {
        "pixels": inputs["image"],
        "input_ids": inputs["text_ids"],
        "attention_mask": inputs["text_masks"],
        "image_index": torch.tensor([4, 9, 4, 2]),
    }
    task = objectives.Retrieval(model)
    task.shares = [4]  # all rows are of this process
    sums = task(batch)
    counts = task.counts(batch)
    close(sums["itc"] / counts["itc"], out["itc_loss"], 1e-5)
    close(sums["itm"] / counts["itm"], out["itm_loss"], 1e-5)
    (sums["itc"] / counts["itc"] + sums["itm"] / counts["itm"]).backward()
    check_gradients(model, out, "grad.", 5e-5)


@pytest.mark.parametrize("name", present("main.head_irtr_itm"))
def test_rank_loss_equals_the_official_one(name):
    model = golden_model(name)
    inputs, out = golden(name)
    captions = ("text", "false_text_0", "false_text_1")
    ids = torch.stack([inputs[f"{caption}_ids"] for caption in captions], 1)
    mask = torch.stack([inputs[f"{caption}_masks"] for caption in captions], 1)
    close(objectives.rank_loss(model, inputs["image"], ids, mask), out["irtr_loss"], 1e-5)
