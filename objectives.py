"""The objectives of ManagerTower: MLM, ITM, ITC with hard negatives, and those of the downstream
tasks.

ACL 2023, section 4 and appendix A. Each objective is a `Task` of the loop: it returns the sum of
each loss over this process' rows, and says how many terms that sum has; the loop makes means over
the global batch of it.

B rows of this process, A rows of all processes in this micro-step, C width of the ITC
vectors.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loop import Task
from model import ManagerTower
from world import gather, ranks


# ---------------------------------------------------------------- ITC, and ITM with hard negatives
def contrastive_logits(
    model: ManagerTower,
    text_experts: Tensor,
    image_experts: Tensor,
    shares: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """ITC logits, text -> image and image -> text, both (A, A), over this micro-step of all
    processes.

    shares: the rows of every process; None: there is only this one. The temperature is a divisor,
    clamped in place as in the official code.
    """
    shares = shares or [len(text_experts)]
    head: Any = model.heads["itc"]
    with torch.no_grad():
        head.temperature.clamp_(0.001, 0.5)
    text, image = model.contrast(text_experts, image_experts)
    all_texts = gather(text, shares)  # (A, C)
    all_images = gather(image, shares)
    if all_texts.dtype in (torch.float16, torch.bfloat16):
        all_texts = all_texts.float()
        all_images = all_images.float()
    # in float32: at the smallest temperature a logit is up to 1,000, where half precision is coarse
    with torch.autocast(all_texts.device.type, enabled=False):
        logits = all_texts @ all_images.T / head.temperature
    return logits, logits.T


def itc_loss(logits: Tensor, logits_t: Tensor, same: Tensor, rows: slice) -> Tensor:
    """Sum over this process' rows of the mean of both directions' cross-entropy; same (A, A): pairs
    that match.
    """
    targets = same / same.sum(1, keepdim=True)
    losses = [F.cross_entropy(x[rows], targets[rows], reduction="sum") for x in (logits, logits_t)]
    return (losses[0] + losses[1]) / 2


def negative_weights(logits: Tensor, same: Tensor) -> Tensor:
    """softmax(logits) without the matching pairs.

    A row with no weight left draws uniformly, its own pair too.
    """
    weights = torch.softmax(logits.detach(), dim=1).masked_fill(same.bool(), 0)
    has_none = weights.sum(1, keepdim=True) == 0
    return weights + 1e-5 * has_none  # official: + 1e-5 when multinomial raises


def draw_negatives(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """A column for each row, texts then images (2A).

    All processes draw the same, and take their own rows.
    """
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


def hard_negative_itm(
    model: ManagerTower,
    text_experts: Tensor,
    image_experts: Tensor,
    mask: Tensor,
    logits: tuple[Tensor, Tensor],
    same: Tensor,
    rows: slice,
    generator: torch.Generator | None = None,
    shares: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """ITM on (t, i), (t, hard i), (hard t, i), with negatives from all processes: logits (3B, 2),
    labels (3B).
    """
    shares = shares or [len(mask)]
    weights = torch.cat([negative_weights(x, same) for x in logits])
    image_of_text, text_of_image = draw_negatives(weights, generator).chunk(2)
    hard_texts = gather(text_experts, shares)[text_of_image[rows]]
    three_texts = torch.cat([text_experts, text_experts, hard_texts])
    hard_images = gather(image_experts, shares)[image_of_text[rows]]
    three_images = torch.cat([image_experts, hard_images, image_experts])
    hard_masks = gather(mask, shares)[text_of_image[rows]]
    features = model.fuse(three_texts, three_images, torch.cat([mask, mask, hard_masks]))
    labels = torch.zeros(3 * len(mask), dtype=torch.long, device=mask.device)
    labels[: len(mask)] = 1
    return model.heads["itm"](features.pooled), labels


def contrastive_losses(
    model: ManagerTower,
    text_experts: Tensor,
    image_experts: Tensor,
    mask: Tensor,
    generator: torch.Generator,
    shares: list[int],
    image_index: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sums of ITC and of ITM with hard negatives, over this process' rows of one micro-step of all
    processes.

    text_experts, image_experts (B, N, L, D_modality). Captions with equal image_index (B,) match
    each other's picture; None: every caption has a picture of its own.
    """
    logits = contrastive_logits(model, text_experts, image_experts, shares)
    if image_index is None:
        index = torch.arange(len(logits[0]), device=mask.device)
    else:
        index = gather(image_index, shares)
    same = (index[:, None] == index).to(logits[0].dtype)
    rank, _ = ranks()
    start = sum(shares[:rank])
    rows = slice(start, start + len(mask))
    itm, labels = hard_negative_itm(
        model, text_experts, image_experts, mask, logits, same, rows, generator, shares
    )
    return {
        "itc": itc_loss(*logits, same, rows),
        "itm": F.cross_entropy(itm, labels, reduction="sum"),
    }


# ---------------------------------------------------------------- pre-training
class Pretraining(Task):
    """MLM and ITM, and ITC.

    MLM and ITM have an image pass each, as in the official code, or share one.
    """

    def __init__(
        self, model: ManagerTower, objectives: tuple[str, ...], share_images: bool = False
    ):
        super().__init__(model)
        self.objectives = objectives
        self.share_images = share_images
        self.leaves_parameters_unused = "itm" not in objectives  # the poolers

    def counts(self, batch: dict) -> dict[str, int]:
        pairs = len(batch["input_ids"])
        counts = {
            "mlm": int((batch["mlm_labels"] != -100).sum()),
            "itm": 3 * pairs if "itc" in self.objectives else pairs,
            "itc": pairs,
        }
        return {name: counts[name] for name in self.objectives}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        model = self.model
        mask = batch["attention_mask"]
        image_experts: Any = None
        if self.share_images or "mlm" in self.objectives or "itc" in self.objectives:
            image_experts = model.encode_image(batch["pixels"])
        sums = {}
        if "mlm" in self.objectives:
            sums["mlm"] = self.mlm_loss(batch, image_experts)
        if "itm" in self.objectives:
            text_experts = model.encode_text(batch["input_ids"], mask)
            if "itc" in self.objectives:
                sums |= contrastive_losses(
                    model, text_experts, image_experts, mask, self.negatives, self.shares
                )
            else:
                itm_images = self.itm_images(batch, image_experts)
                pooled = model.fuse(text_experts, itm_images, mask).pooled
                logits = model.heads["itm"](pooled)
                sums["itm"] = F.cross_entropy(logits, batch["itm_labels"], reduction="sum")
        return sums

    def mlm_loss(self, batch: dict, image_experts: Tensor) -> Tensor:
        mask = batch["attention_mask"]
        is_masked = batch["mlm_labels"] != -100
        text_experts = self.model.encode_text(batch["mlm_ids"], mask)
        text = self.model.fuse(text_experts, image_experts, mask).text
        # the vocabulary is wide: only the masked tokens
        logits = self.model.heads["mlm"](text[is_masked])
        return F.cross_entropy(logits, batch["mlm_labels"][is_masked], reduction="sum")

    def itm_images(self, batch: dict, image_experts: Any) -> Tensor:
        """Experts of the pictures that ITM sees.

        They come from a second pass; or, shared, a false pair takes its partner's.
        """
        if not self.share_images:
            return self.model.encode_image(batch["itm_pixels"])
        own = torch.arange(len(image_experts), device=image_experts.device)
        partner = own ^ 1
        return image_experts[torch.where(batch["itm_labels"] == 1, own, partner)]


# ---------------------------------------------------------------- downstream tasks
def class_logits(model: ManagerTower, head: str, batch: dict) -> Tensor:
    """Logits (B, classes) of a collated batch on the model's device.

    A batch of pairs of pictures has "pixels" and "pixels_1": the head reads the pooled features of
    both.
    """
    mask = batch["attention_mask"]
    text_experts = model.encode_text(batch["input_ids"], mask)
    pooled = [model.fuse(text_experts, model.encode_image(batch["pixels"]), mask).pooled]
    if "pixels_1" in batch:
        image_experts = model.encode_image(batch["pixels_1"])
        pooled.append(model.fuse(text_experts, image_experts, mask, image_type=2).pooled)
    return model.heads[head](torch.cat(pooled, dim=-1))


class Classification(Task):
    """Soft targets: binary cross-entropy, summed over the answers (VQA); a label: cross-entropy."""

    def __init__(self, model: ManagerTower, head: str):
        super().__init__(model)
        self.head = head

    def counts(self, batch: dict) -> dict[str, int]:
        return {self.head: len(batch["input_ids"])}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        logits = class_logits(self.model, self.head, batch).float()
        if "targets" in batch:  # official: mean over everything, times the number of answers
            loss = F.binary_cross_entropy_with_logits(logits, batch["targets"], reduction="sum")
        else:
            loss = F.cross_entropy(logits, batch["label"], reduction="sum")
        return {self.head: loss}


class Retrieval(Task):
    """ITC, and ITM with hard negatives from all processes.

    Other captions of a picture are no negatives.
    """

    def counts(self, batch: dict) -> dict[str, int]:
        pairs = len(batch["input_ids"])
        return {"itc": pairs, "itm": 3 * pairs}

    def forward(self, batch: dict) -> dict[str, Tensor]:
        mask = batch["attention_mask"]
        text_experts = self.model.encode_text(batch["input_ids"], mask)
        image_experts = self.model.encode_image(batch["pixels"])
        return contrastive_losses(
            self.model,
            text_experts,
            image_experts,
            mask,
            self.negatives,
            self.shares,
            batch["image_index"],
        )


def rank_loss(
    model: ManagerTower, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """The older retrieval objective: cross-entropy of the head "retrieval" over the true caption,
    the first, and false ones. pixels (B, 3, S, S); input_ids and attention_mask (B, F, L)."""
    num_captions = input_ids.shape[1]
    ids = input_ids.flatten(0, 1)  # (B * F, L)
    mask = attention_mask.flatten(0, 1)
    image_experts = model.encode_image(pixels).repeat_interleave(num_captions, 0)
    text_experts = model.encode_text(ids, mask)
    pooled = model.fuse(text_experts, image_experts, mask).pooled
    scores = model.heads["retrieval"](pooled).view(-1, num_captions)
    return F.cross_entropy(scores, ids.new_zeros(len(pixels)).long())
