"""The objectives of ManagerTower: MLM, ITM, ITC with hard negatives, and those of the downstream
tasks.

ACL 2023, section 4 and appendix A. Each objective is a `Task` of the loop: it returns the sum of
each loss over this process' rows, and says how many terms that sum has; the loop makes means over
the global batch of it.

B rows of this process, A rows of all processes in this micro-step, C width of the ITC
vectors.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from loop import Task
from model import LayerInputs, ManagerTower
from world import gather, ranks


class Pairs(NamedTuple):
    """Texts and pictures as the cross-modal layers get them, in R rows."""

    text_experts: Tensor  # (R, N, Lt, D_text)
    image_experts: Tensor  # (R, N, Li, D_image)
    mask: Tensor  # (R, Lt)


def join(parts: list[Pairs]) -> Pairs:
    """The rows of all parts, one after the other."""
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return Pairs(*columns)


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


def hard_negative_pairs(
    pairs: Pairs,
    logits: tuple[Tensor, Tensor],
    same: Tensor,
    rows: slice,
    generator: torch.Generator | None = None,
    shares: list[int] | None = None,
) -> tuple[Pairs, Tensor]:
    """(t, i), (t, hard i), (hard t, i), with negatives from all processes: 3B rows, labels (3B)."""
    text_experts, image_experts, mask = pairs
    shares = shares or [len(mask)]
    weights = torch.cat([negative_weights(x, same) for x in logits])
    image_of_text, text_of_image = draw_negatives(weights, generator).chunk(2)
    hard_images = gather(image_experts, shares)[image_of_text[rows]]
    hard_texts = gather(text_experts, shares)[text_of_image[rows]]
    hard_masks = gather(mask, shares)[text_of_image[rows]]
    with_hard_images = Pairs(text_experts, hard_images, mask)
    with_hard_texts = Pairs(hard_texts, image_experts, hard_masks)
    labels = torch.zeros(3 * len(mask), dtype=torch.long, device=mask.device)
    labels[: len(mask)] = 1
    return join([pairs, with_hard_images, with_hard_texts]), labels


def compare(
    model: ManagerTower,
    pairs: Pairs,
    generator: torch.Generator,
    shares: list[int],
    image_index: Tensor | None = None,
) -> tuple[Tensor, Pairs, Tensor]:
    """The sum of ITC over this process' rows, and what ITM reads: its pairs (3B) and labels (3B).

    pairs: this process' rows (B) of one micro-step of all processes. Captions with equal
    image_index (B,) match each other's picture; None: every caption has a picture of its own.
    """
    logits = contrastive_logits(model, pairs.text_experts, pairs.image_experts, shares)
    if image_index is None:
        index = torch.arange(len(logits[0]), device=pairs.mask.device)
    else:
        index = gather(image_index, shares)
    same = (index[:, None] == index).to(logits[0].dtype)
    rank, _ = ranks()
    start = sum(shares[:rank])
    rows = slice(start, start + len(pairs.mask))
    three, labels = hard_negative_pairs(pairs, logits, same, rows, generator, shares)
    return itc_loss(*logits, same, rows), three, labels


# ---------------------------------------------------------------- pre-training
class Pretraining(Task):
    """MLM and ITM, and ITC.

    The official code runs the whole model for each objective. Here each encoder runs once, over
    the texts and the pictures of all objectives, and so do the cross-modal layers: the same losses
    and gradients, with fewer and larger matrix products. share_images: the false pairs of ITM take
    pictures that MLM sees as well, so that none is encoded for ITM alone.
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
        # the encoders
        texts = self.encode_texts(batch)
        images, itm_images = self.encode_images(batch)

        # the pairs that each objective wants to have fused, MLM's first
        mask = batch["attention_mask"]
        sums = {}
        parts = []
        if "mlm" in self.objectives:
            parts.append(Pairs(texts["mlm_ids"], images, mask))
        if "itc" in self.objectives:
            pairs = Pairs(texts["input_ids"], images, mask)
            sums["itc"], itm_pairs, itm_labels = self.compare(pairs, batch)
            parts.append(itm_pairs)
        elif "itm" in self.objectives:
            parts.append(Pairs(texts["input_ids"], itm_images, mask))
            itm_labels = batch["itm_labels"]

        # the cross-modal layers, and the heads on their own rows
        fused = self.model.fuse_until_last(*join(parts))
        if "mlm" in self.objectives:
            sums["mlm"] = self.mlm_loss(fused.rows(slice(len(mask))), batch["mlm_labels"])
            fused = fused.rows(slice(len(mask), None))
        if "itm" in self.objectives:
            logits = self.model.heads["itm"](self.model.last_pooled(fused))
            sums["itm"] = F.cross_entropy(logits, itm_labels, reduction="sum")
        return sums

    def compare(self, pairs: Pairs, batch: dict) -> tuple[Tensor, Pairs, Tensor]:
        """What `compare` returns; a system of another kind of ITC replaces it."""
        return compare(self.model, pairs, self.negatives, self.shares)

    def encode_texts(self, batch: dict) -> dict[str, Tensor]:
        """Text experts (B, N, Lt, D_text) of the ids that the objectives read, by name."""
        names = []
        if "mlm" in self.objectives:
            names.append("mlm_ids")
        if "itm" in self.objectives:
            names.append("input_ids")
        ids = torch.cat([batch[name] for name in names])
        mask = batch["attention_mask"].repeat(len(names), 1)
        experts = self.model.encode_text(ids, mask).chunk(len(names))
        return dict(zip(names, experts, strict=True))

    def encode_images(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Image experts (B, N, Li, D_image) of the rows' own pictures, and of those that ITM sees.

        With ITC the false pairs come later, from the experts of all processes.
        """
        pixels = batch["pixels"]
        if "itm" not in self.objectives or "itc" in self.objectives:
            experts = self.model.encode_image(pixels)
            return experts, experts

        if "mlm" not in self.objectives and not self.share_images:
            experts = self.model.encode_image(batch["itm_pixels"])
            return experts, experts

        is_false = batch["itm_labels"] == 0
        own = torch.arange(len(pixels), device=pixels.device)
        if self.share_images:  # a false pair takes its partner's picture
            experts = self.model.encode_image(pixels)
            places = torch.where(is_false, own ^ 1, own)
        else:  # a true pair has the row's own picture, so only those of the false ones are new
            false_pixels = batch["itm_pixels"].index_select(0, self.places_where(is_false))
            experts = self.model.encode_image(torch.cat([pixels, false_pixels]))
            place_of_false = len(pixels) - 1 + is_false.cumsum(0)
            places = torch.where(is_false, place_of_false, own)
        return experts[: len(pixels)], experts.index_select(0, places)

    def mlm_loss(self, fused: LayerInputs, labels: Tensor) -> Tensor:
        """Sum over the masked tokens. labels (B, Lt)."""
        text = self.model.last_text(fused)
        # the vocabulary is wide: only the masked tokens
        masked = self.places_where(labels != -100)
        logits = self.model.heads["mlm"](text.flatten(0, 1).index_select(0, masked))
        targets = labels.flatten().index_select(0, masked)
        return F.cross_entropy(logits, targets, reduction="sum")

    def places_where(self, condition: Tensor) -> Tensor:
        """Where a condition of any shape holds, counted through its rows. (bench.py counts FLOPs on
        tensors without values: there it says how many places there are.)
        """
        return condition.flatten().nonzero()[:, 0]


# ---------------------------------------------------------------- downstream tasks
def class_logits(model: ManagerTower, head: str, batch: dict) -> Tensor:
    """Logits (B, classes) of a collated batch on the model's device.

    A batch of pairs of pictures has "pixels" and "pixels_1": the head reads the pooled features of
    both.
    """
    mask = batch["attention_mask"]
    text_experts = model.encode_text(batch["input_ids"], mask)
    pooled = [model.fuse_pooled(text_experts, model.encode_image(batch["pixels"]), mask)]
    if "pixels_1" in batch:
        image_experts = model.encode_image(batch["pixels_1"])
        pooled.append(model.fuse_pooled(text_experts, image_experts, mask, image_type=2))
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
        pairs = Pairs(text_experts, image_experts, mask)
        itc, itm_pairs, labels = self.compare(pairs, batch)
        logits = self.model.heads["itm"](self.model.fuse_pooled(*itm_pairs))
        return {"itc": itc, "itm": F.cross_entropy(logits, labels, reduction="sum")}

    def compare(self, pairs: Pairs, batch: dict) -> tuple[Tensor, Pairs, Tensor]:
        """What `compare` returns; a system of another kind of ITC replaces it."""
        return compare(self.model, pairs, self.negatives, self.shares, batch["image_index"])


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
    pooled = model.fuse_pooled(text_experts, image_experts, mask)
    scores = model.heads["retrieval"](pooled).view(-1, num_captions)
    return F.cross_entropy(scores, ids.new_zeros(len(pixels)).long())
