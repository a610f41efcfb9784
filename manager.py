"""The managers: modules that aggregate the layers of pre-trained unimodal encoders.

ManagerTower (ACL 2023, section 3; section III of Manager, TCSVT 2025) puts a textual and a visual manager before every
cross-modal layer. An *expert* is one layer of a unimodal encoder, its output is the *insight*. A manager weighs the
insights V_i of N experts and adds C, the output of the previous cross-modal layer of its own modality:

    M = sum_i W_i * LN_i(V_i) + W_C * LN_C(C)

StaticManager learns W: SAUE (SAUM in the journal), and SAE (SAM) over the outputs of all previous cross-modal layers.
AdaptiveManager computes W for each token from both modalities: AAUE (AAUM). LLaVA-OV-Manager's visual managers, with
neither norm nor C, are at the end (section IV).

The mean and the variance of V_i are the same for every manager. So `standardize` takes them out once for each modality;
LN_i is left with its scale and shift, which fold into the weights: no manager makes a normalised copy of the N experts.

Shapes: B batch, N experts (managed layers), L tokens, D width, K previous cross-modal layers. Experts: (B, N, L, D).
"""
import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def standardize(experts: Tensor, eps: float = 1e-5) -> Tensor:
    """Zero mean and unit variance over D for each token of each expert, (B, N, L, D): what all LN_i have in common."""
    out = F.layer_norm(experts, experts.shape[-1:], eps=eps)
    # autocast normalises in float32; kept in its own dtype afterwards, the stack costs half the memory traffic
    device = experts.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return out.to(torch.get_autocast_dtype(device)) if on else out


def draw_noise(experts: Tensor) -> Tensor:
    """Training noise on the scores: N(0, (1/N)^2) for each element (B, N, L, D), whatever the shape of the weights."""
    return torch.randn_like(experts) / experts.shape[1]


class Manager(nn.Module):
    """What both kinds share; a kind has its `score`, and `weigh_previous`, which gives W_C for each of the K.

    width: D; num_experts: N; num_previous: K; weight: "vector" for a weight per channel, "scalar" for one per expert;
    noise: add `draw_noise` to the experts' scores in training mode."""

    def __init__(self, width: int, num_experts: int, num_previous: int = 0, weight: str = "vector", noise: bool = True):
        super().__init__()
        if weight not in ("vector", "scalar"):
            raise ValueError(f'weight is {weight!r}; it must be "vector" or "scalar"')
        self.num_experts, self.num_previous, self.noise = num_experts, num_previous, noise
        self.weight_width = width if weight == "vector" else 1
        self.scale = nn.Parameter(torch.ones(num_experts + num_previous, width))  # LN_i, then LN_C
        self.shift = nn.Parameter(torch.zeros(num_experts + num_previous, width))
        self.temperature = nn.Parameter(torch.ones(1))

    def norm_previous(self, previous: Tensor | None) -> list[Tensor]:
        """LN_C of the outputs of the previous cross-modal layers, K tensors (B, L, D)."""
        previous = () if previous is None else previous.unbind(1) if previous.dim() == 4 else (previous,)
        affine = self.scale[self.num_experts :], self.shift[self.num_experts :]
        return [F.layer_norm(c, c.shape[-1:], scale, shift, 1e-5) for c, scale, shift in zip(previous, *affine)]

    def normalize(self, scores: Tensor, experts: Tensor) -> Tensor:
        """softmax((scores + noise) / temperature) over the experts; scores (1 or B, N, 1 or L, 1 or D)."""
        if experts.shape[1] != self.num_experts:
            raise ValueError(f"experts {tuple(experts.shape)} are {experts.shape[1]}, not {self.num_experts} layers")
        if self.training and self.noise:
            scores = scores + draw_noise(experts)
        return torch.softmax(scores / self.temperature, dim=1)

    def aggregate_experts(self, weights: Tensor, experts: Tensor) -> Tensor:
        """sum_i weights_i * (scale_i * experts_i + shift_i), (B, L, D), expert by expert: no (B, N, L, D) temporary."""
        parts = zip(weights.unbind(1), self.scale, self.shift, experts.unbind(1))
        return functools.reduce(torch.add, (torch.addcmul(w * shift, w * scale, x) for w, scale, shift, x in parts))

    def weights(self, experts: Tensor, previous=None, query=None, query_mask=None) -> Tensor:
        """The experts' aggregation weights, (B, N, L, D), or (B, N, L, 1) where the channels share them."""
        weights = self.normalize(self.score(self.norm_previous(previous), query, query_mask), experts)
        return weights.expand(experts.shape[0], -1, experts.shape[2], -1)

    def forward(self, experts: Tensor, previous: Tensor | None = None, query: Tensor | None = None,
                query_mask: Tensor | None = None) -> Tensor:
        """experts (B, N, L, D), standardised -> (B, L, D). previous: (B, L, D), or (B, K, L, D), or None for K = 0;
        AdaptiveManager reads the query (B, Lq, D), the previous output of the other modality, and its mask (B, Lq)."""
        own = self.norm_previous(previous)
        if len(own) != self.num_previous:
            raise ValueError(f"{len(own)} previous outputs, this manager aggregates {self.num_previous}")
        out = self.aggregate_experts(self.normalize(self.score(own, query, query_mask), experts), experts)
        for w, c in zip(self.weigh_previous(), own, strict=True):
            out = torch.addcmul(out, w, c)
        return out


class StaticManager(Manager):
    """SAUE (SAUM): learnt weights, softmax over the experts; W_C is a raw multiplier (ACL eq. 5, TCSVT section III-A).

    With sae=True, or K > 1: SAE (SAM), where the K previous outputs have a softmax and a temperature of their own."""

    def __init__(self, width: int, num_experts: int, num_previous: int = 0, weight: str = "vector", noise: bool = True,
                 sae: bool = False):
        super().__init__(width, num_experts, num_previous, weight, noise)
        self.sae = num_previous > 0 and (sae or num_previous > 1)
        scores = torch.full((num_experts + num_previous, self.weight_width), 1 / num_experts)
        scores[num_experts:] = 1 / max(num_previous, 1)
        self.scores = nn.Parameter(scores)  # W, then W_C
        if self.sae:
            self.temperature_previous = nn.Parameter(torch.ones(1))

    def score(self, own: list[Tensor], query: Tensor | None, query_mask: Tensor | None) -> Tensor:
        return self.scores[None, : self.num_experts, None, :]  # (1, N, 1, D or 1)

    def weigh_previous(self) -> Tensor:
        scores = self.scores[self.num_experts :]  # (K, D or 1)
        return torch.softmax(scores / self.temperature_previous, dim=0) if self.sae else scores


class AdaptiveManager(Manager):
    """AAUE (AAUM): weights for each token, from the cross-modal fused query (ACL section 3.2.3, TCSVT section III-A).

        Cn = LN_C(C);  On = LN_Q(C_other);  A = softmax(q(Cn) k(On)^T / sqrt(D)) On;  W = softmax(Linear([A, Cn]) / tau)

    query_mask (B, Lq; 1 = real token) masks padding in that attention. The official code does not mask it, and the
    released weights were trained so: ManagerTower passes a mask only with mask_fused_query=True."""

    def __init__(self, width: int, num_experts: int, weight: str = "vector", noise: bool = True):
        super().__init__(width, num_experts, 1, weight, noise)
        self.score_previous = nn.Parameter(torch.ones(1, self.weight_width))  # W_C: all that "vector" shapes here
        self.norm_query = nn.LayerNorm(width, eps=1e-5)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.controller = nn.Linear(2 * width, num_experts)

    def score(self, own: list[Tensor], query: Tensor, query_mask: Tensor | None) -> Tensor:
        own, other = own[0], self.norm_query(query)
        mask = None if query_mask is None else query_mask[:, None, None, :].bool()
        # one head, no value projection, no dropout
        q, k, v = (x.unsqueeze(1) for x in (self.q_proj(own), self.k_proj(other), other))  # (B, 1, L or Lq, D)
        attended = F.scaled_dot_product_attention(q, k, v, mask).squeeze(1)
        return self.controller(torch.cat([attended, own], dim=-1)).transpose(1, 2).unsqueeze(-1)  # (B, N, L, 1)

    def weigh_previous(self) -> Tensor:
        return self.score_previous


# ---------------------------------------------------------------- LLaVA-OV-Manager (TCSVT 2025, section IV)
def weighted_sum(weights, experts) -> Tensor:
    """sum_n weights_n * experts_n over two iterables of N broadcastable tensors, one expert after the other."""
    return sum(weight.to(expert.dtype) * expert for weight, expert in zip(weights, experts, strict=True))


class VisualManager(nn.Module):
    """What the MLLM's visual managers share: the training noise, scores * U(0.99, 1.01) (the paper: 0.98 .. 1.02)."""

    def draw(self, scores: Tensor) -> Tensor:
        """u ~ U[0, 1), of the shape of `scores`: the only source of randomness, replaceable in tests."""
        return torch.rand_like(scores)

    def jitter(self, scores: Tensor) -> Tensor:
        return scores * (0.99 + 0.02 * self.draw(scores)) if self.training else scores


class StaticVisualManager(VisualManager):
    """What h_image gains before an LLM layer: sum_n W_n * V_n with W (N, D) learnt, zero at the start (TCSVT eq. 12).

    No layer norm, softmax or W_C, unlike the two-tower managers: an untrained one leaves the LLM as it is.
    """

    def __init__(self, width: int, num_experts: int):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(num_experts, width))

    def weights(self, rows: int = 1) -> Tensor:
        """(1, N, 1, D); in training (rows, N, 1, D), as every sequence of the batch has its own noise."""
        scores = self.scores[None, :, None]
        return self.jitter(scores.expand(rows, -1, -1, -1)) if self.training else scores

    def forward(self, experts: Tensor) -> Tensor:
        """experts (B, N, L, D) -> (B, L, D)."""
        return weighted_sum(self.weights(len(experts)).unbind(1), experts.unbind(1))


class AdaptiveVisualManager(VisualManager):
    """sum_n s_n * g_n * V_n: N scores s for each image token, a Linear of the LLM's hidden state h of that token,
    without softmax, and a gate g (N, D), zero at the start (TCSVT eq. 13, 14).

    With a query the Linear reads [context, h]. The context is the text query's "last" token, its "average", or "cross":
    softmax(q(h) k(query)^T / sqrt(D)) query, without value projection.
    """

    def __init__(self, width: int, num_experts: int, query: str | None = None):
        super().__init__()
        if query not in (None, "last", "average", "cross"):
            raise ValueError(f'query is {query!r}; it must be None, "last", "average" or "cross"')
        self.query = query
        self.gate = nn.Parameter(torch.zeros(num_experts, width))
        self.controller = nn.Linear(2 * width if query else width, num_experts, bias=False)
        if query == "cross":
            self.q_proj = nn.Linear(width, width)
            self.k_proj = nn.Linear(width, width)

    def context(self, hidden: Tensor, query: Tensor, query_mask: Tensor) -> Tensor:
        """hidden (B, L, D), query (B, Q, D), query_mask (B, L, Q), True = the token may see it. Returns (B, L, D)."""
        if self.query == "last":
            last = (query_mask * torch.arange(query.shape[1], device=query.device)).amax(-1)  # (B, L)
            return query.gather(1, last[..., None].expand(-1, -1, query.shape[-1]))
        if self.query == "average":
            mask = query_mask.to(query.dtype)
            return mask / mask.sum(-1, keepdim=True) @ query
        q, k, v = (x[:, None] for x in (self.q_proj(hidden), self.k_proj(query), query))  # (B, 1, L or Q, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=query_mask[:, None])[:, 0]

    def score(self, hidden: Tensor, query: Tensor | None = None, query_mask: Tensor | None = None) -> Tensor:
        """(B, N, L, 1); in training (B, N, L, D), as the noise is drawn for each element."""
        if self.query:
            hidden = torch.cat([self.context(hidden, query, query_mask).to(hidden.dtype), hidden], dim=-1)
        scores = self.controller(hidden).transpose(1, 2)[..., None]
        return self.jitter(scores.expand(-1, -1, -1, self.gate.shape[-1])) if self.training else scores

    def weights(self, hidden: Tensor, query: Tensor | None = None, query_mask: Tensor | None = None) -> Tensor:
        """The aggregation weights, (B, N, L, D)."""
        return self.score(hidden, query, query_mask) * self.gate[:, None]

    def forward(self, experts: Tensor, hidden: Tensor, query: Tensor | None = None,
                query_mask: Tensor | None = None) -> Tensor:
        """experts (B, N, L, D), hidden (B, L, D), query (B, Q, D), query_mask (B, L, Q) -> (B, L, D). The MLLM lays all
        image tokens of a batch behind one another, as B = 1; query_mask then keeps the images apart."""
        scores = self.score(hidden, query, query_mask)
        weights = (s * g for s, g in zip(scores.unbind(1), self.gate.unbind(0), strict=True))
        return weighted_sum(weights, experts.unbind(1))
