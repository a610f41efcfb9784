"""The managers: how a cross-modal layer gets all layers of pre-trained unimodal encoders to read.

This is the contribution of the papers: ManagerTower (ACL 2023, section 3) and Manager (TCSVT 2025,
section III for two towers, section IV for LLaVA-OV-Manager). In the official state dicts these
modules are the `cross_modal_*_manager_tower` and `model.manager`; weights.py has both names of each
parameter.

An *expert* is one layer of a unimodal encoder, and its output V_i is the *insight*; in the code
`experts` are these outputs. Before each cross-modal layer stand two managers, one for each
modality. A manager weighs the insights of N experts, and adds C, the output of the previous
cross-modal layer of its own modality:

    M = sum_i W_i * LN_i(V_i) + W_C * LN_C(C)

    StaticManager          W is learnt: SAUE (the journal says SAUM), and SAE (SAM)
    AdaptiveManager        W is computed for each token from both modalities: AAUE (AAUM)
    StaticVisualManager    the MLLM's, with neither norm nor C: W is learnt
    AdaptiveVisualManager  the MLLM's: W is computed for each image token

All LN_i take the mean and the variance out of V_i in the same way. `standardize` does that once for
each modality, so only a scale and a shift of each LN_i are left here.

Shapes: B batch, N experts, L tokens (Lq of the other modality), D width, K previous cross-modal
layers. The stack of experts is always (B, N, L, D).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5  # of all layer norms in this file


# ---------------------------------------------------------------- what does not depend on a manager
def standardize(experts: Tensor, eps: float = EPS) -> Tensor:
    """Zero mean and unit variance over D, for each token of each expert, (B, N, L, D)."""
    standardized = F.layer_norm(experts, experts.shape[-1:], eps=eps)

    # Autocast normalises in float32. Every manager reads this stack, so it is kept in autocast's
    # own dtype afterwards: half the memory traffic.
    device = experts.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return standardized.to(torch.get_autocast_dtype(device))
    return standardized


def draw_noise(experts: Tensor) -> Tensor:
    """Training noise of the scores: N(0, (1/N)^2) for each element of the experts, (B, N, L, D).

    It has this shape whatever the shape of the scores is. It is the only source of randomness of
    the two-tower managers, so tests replace this function.
    """
    num_experts = experts.shape[1]
    if torch.compiler.is_compiling():  # a draw that becomes a part of the kernel
        return torch.randn_like(experts) / num_experts
    return torch.empty_like(experts).normal_(std=1 / num_experts)


def softmax_over_experts(scores: Tensor) -> tuple[Tensor, ...]:
    """softmax over dimension 1 of (B, N, L, D), as N tensors (B, L, D).

    torch.compile puts all passes of a manager into one kernel where nothing sums over a dimension
    between them. There the sum over the few experts is written out.
    """
    if not torch.compiler.is_compiling():
        return torch.softmax(scores, dim=1).unbind(1)
    parts = scores.unbind(1)
    largest = parts[0]
    for part in parts[1:]:
        largest = torch.maximum(largest, part)
    powers = [torch.exp(part - largest) for part in parts]
    total = powers[0]
    for power in powers[1:]:
        total = total + power
    return tuple(power / total for power in powers)


def split_previous(previous: Tensor | None) -> list[Tensor]:
    """The K previous outputs, (B, L, D) each, of (B, K, L, D), of (B, L, D), or of None (K = 0)."""
    if previous is None:
        return []
    if previous.dim() == 4:
        return list(previous.unbind(1))
    return [previous]


# ---------------------------------------------------------- ManagerTower (ACL 2023, section 3)
class Manager(nn.Module):
    """What both two-tower managers share. A subclass has `score` and `weigh_previous`.

    width: D. num_experts: N. num_previous: K, how many previous outputs are added; 0 before the
    first cross-modal layer. weight: "vector" for a weight of each channel, "scalar" for one weight
    of each expert. noise: add `draw_noise` to the experts' scores in training mode.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        num_previous: int = 0,
        weight: str = "vector",
        noise: bool = True,
    ):
        super().__init__()
        if weight not in ("vector", "scalar"):
            raise ValueError(f'weight is {weight!r}; it must be "vector" or "scalar"')
        self.num_experts = num_experts
        self.num_previous = num_previous
        self.noise = noise
        self.weight_width = width if weight == "vector" else 1

        # Row i belongs to LN_i of expert i; the last K rows belong to LN_C of the previous outputs.
        self.scale = nn.Parameter(torch.ones(num_experts + num_previous, width))
        self.shift = nn.Parameter(torch.zeros(num_experts + num_previous, width))
        self.temperature = nn.Parameter(torch.ones(1))

    def score(self, own: list[Tensor], query: Tensor | None, query_mask: Tensor | None) -> Tensor:
        """The experts' scores before the softmax, (1 or B, N, 1 or L, 1 or D). own: LN_C(C)."""
        raise NotImplementedError("each kind of manager has scores of its own")

    def weigh_previous(self) -> Tensor:
        """W_C of the K previous outputs, (K, 1 or D)."""
        raise NotImplementedError("each kind of manager has a W_C of its own")

    def norm_previous(self, previous: list[Tensor]) -> list[Tensor]:
        """LN_C(C) of each previous output, (B, L, D)."""
        scales = self.scale[self.num_experts :].unbind(0)  # K tensors (D)
        shifts = self.shift[self.num_experts :].unbind(0)
        own = []
        for i, output in enumerate(previous):
            own.append(F.layer_norm(output, output.shape[-1:], scales[i], shifts[i], EPS))
        return own

    def normalize(self, scores: Tensor, experts: Tensor) -> tuple[Tensor, ...]:
        """softmax((scores + noise) / temperature) over the experts, which sum to 1: W_i.

        scores (1 or B, N, 1 or L, 1 or D) -> N tensors (1 or B, 1 or L, 1 or D). Raises ValueError
        for another N.
        """
        if experts.shape[1] != self.num_experts:
            raise ValueError(
                f"experts {tuple(experts.shape)} are {experts.shape[1]}, not {self.num_experts} "
                "layers"
            )
        scaled = scores / self.temperature
        if self.training and self.noise:
            # one pass over (B, N, L, D): scores / temperature + noise * (1 / temperature)
            scaled = torch.addcmul(scaled, draw_noise(experts), 1 / self.temperature)
        return softmax_over_experts(scaled)

    def aggregate_experts(self, weight: tuple[Tensor, ...], experts: Tensor) -> Tensor:
        """sum_i W_i * LN_i(V_i), (B, L, D), one expert after the other, in two passes over each.

        weight: what `normalize` returns; experts (B, N, L, D), standardised.
        """
        # unbind and not an index: its gradient is one stack of all experts, where the gradient of
        # each index would be a stack of zeros around one expert
        scale = self.scale.unbind(0)  # N + K tensors (D)
        shift = self.shift.unbind(0)
        expert = experts.unbind(1)  # N tensors (B, L, D)
        total = weight[0] * torch.addcmul(shift[0], scale[0], expert[0])
        for i in range(1, self.num_experts):
            insight = torch.addcmul(shift[i], scale[i], expert[i])  # LN_i(V_i)
            total = torch.addcmul(total, weight[i], insight)
        return total

    def weights(
        self,
        experts: Tensor,
        previous: Tensor | None = None,
        query: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """The experts' aggregation weights W_i, for the arguments of `forward`; figures draw them.

        (B, N, L, D), or (B, N, L, 1) where all channels of an expert share a weight. A static
        manager's do not depend on previous, which may be left out.
        """
        own = self.norm_previous(split_previous(previous))
        weight = self.normalize(self.score(own, query, query_mask), experts)
        weights = torch.stack(weight, 1)  # (1 or B, N, 1 or L, 1 or D)
        return weights.expand(experts.shape[0], -1, experts.shape[2], -1)

    def forward(
        self,
        experts: Tensor,
        previous: Tensor | None = None,
        query: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """What the cross-modal layer reads, (B, L, D).

        experts: (B, N, L, D), standardised. previous: the previous outputs of the own modality,
        (B, L, D), or (B, K, L, D), or None for K = 0. query: the previous output of the other
        modality, (B, Lq, D), and query_mask (B, Lq), 1 for its real tokens; only AdaptiveManager
        reads these two. Raises ValueError for another N or K.
        """
        outputs = split_previous(previous)
        if len(outputs) != self.num_previous:
            raise ValueError(
                f"{len(outputs)} previous outputs, this manager aggregates {self.num_previous}"
            )
        own = self.norm_previous(outputs)  # the own modality's: K tensors (B, L, D)

        # the insights: sum_i W_i * LN_i(V_i)
        weight = self.normalize(self.score(own, query, query_mask), experts)
        managed = self.aggregate_experts(weight, experts)  # (B, L, D)

        # what the previous cross-modal layers know: + W_C * LN_C(C)
        for weight_previous, output in zip(self.weigh_previous(), own, strict=True):
            managed = torch.addcmul(managed, weight_previous, output)
        return managed


class StaticManager(Manager):
    """SAUE (SAUM): W is learnt, with a softmax over the experts; W_C is a raw multiplier.

    ACL eq. 5, TCSVT section III-A. With sae=True, or with K > 1, it is SAE (SAM), over the experts
    and the outputs of all previous cross-modal layers: there the K previous outputs have a softmax
    and a temperature of their own.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        num_previous: int = 0,
        weight: str = "vector",
        noise: bool = True,
        sae: bool = False,
    ):
        super().__init__(width, num_experts, num_previous, weight, noise)
        self.sae = num_previous > 1 or (sae and num_previous == 1)

        # rows of W, then rows of W_C; at the start both are plain averages
        scores = torch.full((num_experts + num_previous, self.weight_width), 1 / num_experts)
        if num_previous > 0:
            scores[num_experts:] = 1 / num_previous
        self.scores = nn.Parameter(scores)
        if self.sae:
            self.temperature_previous = nn.Parameter(torch.ones(1))

    def score(self, own: list[Tensor], query: Tensor | None, query_mask: Tensor | None) -> Tensor:
        """The learnt scores, the same for each sample and token."""
        return self.scores[None, : self.num_experts, None, :]  # (1, N, 1, 1 or D)

    def weigh_previous(self) -> Tensor:
        scores = self.scores[self.num_experts :]  # (K, 1 or D)
        if self.sae:
            return torch.softmax(scores / self.temperature_previous, dim=0)
        return scores


class AdaptiveManager(Manager):
    """AAUE (AAUM): W is computed for each token from the cross-modal fused query.

    ACL section 3.2.3, TCSVT section III-A. C_other is the previous output of the other modality:

        Cn = LN_C(C)
        On = LN_Q(C_other)
        A  = softmax(q(Cn) k(On)^T / sqrt(D)) On
        W  = softmax(Linear([A, Cn]) / temperature)

    own_query=True is the papers' ablation without the other modality, W = softmax(Linear(Cn) /
    temperature), which needs neither the attention nor LN_Q (TCSVT table I).

    query_mask (B, Lq) masks the padding of On in that attention. The official code does not mask
    it, and the released weights were trained so: ManagerTower passes a mask only with
    mask_fused_query=True.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        weight: str = "vector",
        noise: bool = True,
        own_query: bool = False,
    ):
        super().__init__(width, num_experts, 1, weight, noise)
        self.own_query = own_query
        # W_C. "vector" or "scalar" shapes nothing else here: W has one number for each expert.
        self.score_previous = nn.Parameter(torch.ones(1, self.weight_width))
        if own_query:
            self.controller = nn.Linear(width, num_experts)
            return
        self.norm_query = nn.LayerNorm(width, eps=EPS)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.controller = nn.Linear(2 * width, num_experts)

    def score(self, own: list[Tensor], query: Tensor | None, query_mask: Tensor | None) -> Tensor:
        """The scores of each token, (B, N, L, 1). query (B, Lq, D): C_other."""
        own_normed = own[0]  # Cn (B, L, D)
        if self.own_query:
            own_scores = self.controller(own_normed)  # (B, L, N)
            return own_scores.transpose(1, 2).unsqueeze(-1)  # (B, N, L, 1)
        other_normed = self.norm_query(query)  # On (B, Lq, D)
        mask = None
        if query_mask is not None:
            mask = query_mask[:, None, None, :].bool()  # (B, 1, 1, Lq)

        # the fused query A: attention with one head, without a value projection and without dropout
        q = self.q_proj(own_normed)
        k = self.k_proj(other_normed)
        attended = F.scaled_dot_product_attention(
            q.unsqueeze(1),  # (B, 1, L, D)
            k.unsqueeze(1),  # (B, 1, Lq, D)
            other_normed.unsqueeze(1),
            mask,
        )
        fused_query = attended.squeeze(1)  # (B, L, D)

        scores = self.controller(torch.cat([fused_query, own_normed], dim=-1))  # (B, L, N)
        return scores.transpose(1, 2).unsqueeze(-1)  # (B, N, L, 1)

    def weigh_previous(self) -> Tensor:
        return self.score_previous


# ------------------------------------------------------- LLaVA-OV-Manager (TCSVT 2025, section IV)
def weighted_sum(weights, experts) -> Tensor:
    """sum_n W_n * V_n, one after the other, over two iterables of N broadcastable tensors.

    Both may be generators: then only one expert has to be in memory at a time.
    """
    total = None
    for weight, expert in zip(weights, experts, strict=True):
        weight = weight.to(expert.dtype)
        total = weight * expert if total is None else torch.addcmul(total, weight, expert)
    assert total is not None, "a sum over no experts"
    return total


class VisualManager(nn.Module):
    """What the MLLM's visual managers share: the training noise, which multiplies the scores.

    It is U(0.99, 1.01) as in the official code; the paper says 0.98 to 1.02.
    """

    def draw(self, scores: Tensor) -> Tensor:
        """u ~ U[0, 1) of the shape of the scores: the only randomness, so tests replace it."""
        return torch.rand_like(scores)

    def jitter(self, scores: Tensor) -> Tensor:
        """The scores with training noise of each element; unchanged in evaluation mode."""
        if not self.training:
            return scores
        return scores * (0.99 + 0.02 * self.draw(scores))


class StaticVisualManager(VisualManager):
    """What the image tokens gain before an LLM layer: sum_n W_n * V_n (TCSVT eq. 12).

    W (N, D) is learnt and zero at the start, without softmax: an untrained manager leaves the LLM
    as it is. `forward` is the definition. LlavaManager computes the same in another order: it sums
    over the experts of all its static managers at once, tile by tile (`static_increments`).
    """

    def __init__(self, width: int, num_experts: int):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(num_experts, width))

    def weights(self, batch_size: int = 1) -> Tensor:
        """(1, N, 1, D); in training (batch_size, N, 1, D), for each sequence has its own noise."""
        scores = self.scores[None, :, None]  # (1, N, 1, D)
        if not self.training:
            return scores
        return self.jitter(scores.expand(batch_size, -1, -1, -1))

    def forward(self, experts: Tensor) -> Tensor:
        """experts (B, N, L, D) -> (B, L, D)."""
        weights = self.weights(len(experts))
        return weighted_sum(weights.unbind(1), experts.unbind(1))


class AdaptiveVisualManager(VisualManager):
    """sum_n s_n * g_n * V_n (TCSVT eq. 13 and 14).

    s_n: N scores of each image token, a Linear of h, the LLM's hidden state of that token, without
    softmax. g (N, D): a gate, zero at the start.

    With a query the Linear reads [context, h], where the context is made of the hidden states of
    the text. query: "last" takes the last text token, "average" their mean, and "cross" is
    softmax(q(h) k(text)^T / sqrt(D)) text, without a value projection. None: no context.
    """

    def __init__(self, width: int, num_experts: int, query: str | None = None):
        super().__init__()
        if query not in (None, "last", "average", "cross"):
            raise ValueError(f'query is {query!r}; it must be None, "last", "average" or "cross"')
        self.query = query
        self.gate = nn.Parameter(torch.zeros(num_experts, width))
        controller_width = 2 * width if query else width
        self.controller = nn.Linear(controller_width, num_experts, bias=False)
        if query == "cross":
            self.q_proj = nn.Linear(width, width)
            self.k_proj = nn.Linear(width, width)

    def context(self, hidden: Tensor, query: Tensor, query_mask: Tensor) -> Tensor:
        """What the image tokens read of the text, (B, L, D), or (B, 1, D) where all read the same;
        zeros where there is no text at all.

        hidden (B, L, D); query (B, Q, D), the text; query_mask (B, 1 or L, Q), True where the image
        token may see the text token.
        """
        if self.query == "last":
            return self.last_token(query, query_mask)
        if self.query == "average":
            mask = query_mask.to(query.dtype)
            mean_weights = mask / mask.sum(-1, keepdim=True)  # (B, L, Q), each row sums to 1
            return mean_weights @ query
        # "cross": attention with one head; its values are the text's hidden states themselves
        q = self.q_proj(hidden)[:, None]  # (B, 1, L, D)
        k = self.k_proj(query)[:, None]  # (B, 1, Q, D)
        mask = query_mask[:, None]  # (B, 1, L, Q)
        return F.scaled_dot_product_attention(q, k, query[:, None], attn_mask=mask)[:, 0]

    def last_token(self, query: Tensor, query_mask: Tensor) -> Tensor:
        """The last text token that each image token may see, (B, 1 or L, D)."""
        batch_size, num_tokens, num_queries = query_mask.shape
        width = query.shape[-1]
        if num_queries == 0:  # all pictures are cut off: there is no text token to choose
            return query.new_zeros(batch_size, num_tokens, width)
        # the largest position that the mask leaves is the last text token
        positions = torch.arange(num_queries, device=query.device)
        last = (query_mask * positions).amax(-1)  # (B, 1 or L)
        index = last[..., None].expand(-1, -1, width)  # (B, 1 or L, D)
        return query.gather(1, index)

    def score(
        self, hidden: Tensor, query: Tensor | None = None, query_mask: Tensor | None = None
    ) -> Tensor:
        """(B, N, L, 1); in training (B, N, L, D), for the noise is drawn for each element."""
        if self.query:
            assert query is not None and query_mask is not None, "this manager reads a text query"
            context = self.context(hidden, query, query_mask).to(hidden.dtype)
            hidden = torch.cat([context.expand_as(hidden), hidden], dim=-1)  # (B, L, 2D)
        scores = self.controller(hidden).transpose(1, 2)[..., None]  # (B, L, N) -> (B, N, L, 1)
        if not self.training:
            return scores
        return self.jitter(scores.expand(-1, -1, -1, self.gate.shape[-1]))

    def weights(
        self, hidden: Tensor, query: Tensor | None = None, query_mask: Tensor | None = None
    ) -> Tensor:
        """The aggregation weights s_n * g_n, (B, N, L, D), as figures draw them."""
        return self.score(hidden, query, query_mask) * self.gate[:, None]  # gate (N, 1, D)

    def forward(
        self,
        experts: Tensor,
        hidden: Tensor,
        query: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """What the image tokens gain before an LLM layer, (B, L, D).

        experts (B, N, L, D), hidden (B, L, D), query (B, Q, D), query_mask (B, 1 or L, Q). In the
        MLLM B counts the rows of the batch that have a picture, with all tokens of their pictures.
        """
        scores = self.score(hidden, query, query_mask)
        # a generator: the weights s_n * g_n of one expert at a time, for together they would be as
        # large as all experts
        pairs = zip(scores.unbind(1), self.gate.unbind(0), strict=True)
        weights = (score * gate for score, gate in pairs)  # (B, L, D) each
        return weighted_sum(weights, experts.unbind(1))
