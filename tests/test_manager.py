"""manager.py: the papers' formulas written out, the noise, and what an empty query gives.

The parity of whole models with the official numbers is in test_model.py and test_llava_manager.py.
"""

import pytest
import torch
from helpers import SMALL_SET, close, golden, golden_model, present
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import manager
from manager import (
    AdaptiveManager,
    AdaptiveVisualManager,
    StaticManager,
    StaticVisualManager,
    standardize,
    weighted_sum,
)
from model import ManagerTower, ManagerTowerConfig


def randomize(module, std):
    for parameter in module.parameters():
        parameter.data.add_(std * torch.randn_like(parameter))
    return module


# ---------------------------------------------------------------- noise
def test_noise_has_the_papers_standard_deviation():
    torch.manual_seed(0)
    noise = manager.draw_noise(torch.zeros(8, 4, 50, 32))
    assert abs(noise.std().item() * 4 - 1) < 0.01
    assert abs(noise.mean().item()) < 0.005


@pytest.mark.parametrize(
    "name", present("main.mt_aaue_vector", "main.mt_saue_vector", "main.mt_aaue_scalar")
)
def test_training_noise_enters_as_in_the_official_code(name, monkeypatch):
    if SMALL_SET:
        pytest.skip("only the full golden set has recorded noise")
    model = golden_model(name)
    inputs, out = golden(name)
    recorded = []
    for i in range(model.config.num_layers):
        for modality in ("text", "image"):
            recorded.append(out[f"train_noise.noise.{modality}.{i}"])
    monkeypatch.setattr(manager, "draw_noise", lambda experts: recorded.pop(0))
    model.text_managers.train()
    model.image_managers.train()
    with torch.no_grad():
        features = model(inputs["image"], inputs["text_ids"], inputs["text_masks"])
    assert not recorded
    close(features.text, out["train_noise.text_feats"], 5e-5)
    close(features.image, out["train_noise.image_feats"], 5e-5)
    close(features.pooled, out["train_noise.cls_feats"], 1e-5)


def test_noise_is_added_in_training_only_and_only_if_wanted():
    torch.manual_seed(0)
    experts = standardize(torch.randn(2, 4, 5, 16))
    noisy = StaticManager(16, 4)
    assert not torch.equal(noisy(experts), noisy(experts))
    assert noisy.weights(experts).shape == (2, 4, 5, 16)
    quiet = StaticManager(16, 4, noise=False)
    assert torch.equal(quiet(experts), noisy.eval()(experts))


def test_jitter_of_visual_managers_is_uniform_around_one():
    visual = StaticVisualManager(8, 3).train()
    torch.nn.init.ones_(visual.scores)
    weights = visual.weights(4000)  # another draw for every sequence of the batch
    assert 0.99 <= weights.min() < 0.9901
    assert 1.0099 < weights.max() <= 1.01
    assert abs(weights.var() - 0.02**2 / 12) < 1e-6
    assert torch.equal(visual.eval().weights(), torch.ones(1, 3, 1, 8))


# ---------------------------------------------------------------- the two-tower managers
def test_standardized_experts_have_zero_mean_and_unit_variance():
    torch.manual_seed(0)
    experts = standardize(3 * torch.randn(2, 4, 5, 64) + 1)
    close(experts.mean(-1), torch.zeros(2, 4, 5), 1e-5)
    close(experts.var(-1, unbiased=False), torch.ones(2, 4, 5), 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert standardize(experts).dtype == torch.bfloat16


@pytest.mark.parametrize("weight", ["vector", "scalar"])
@pytest.mark.parametrize("num_previous", [1, 3])
def test_static_manager_is_the_papers_formula(weight, num_previous):
    """SAUE for one previous output, SAE for several; every LayerNorm written out."""
    torch.manual_seed(0)
    static = StaticManager(16, 4, num_previous, weight).eval()
    start = torch.tensor([1 / 4] * 4 + [1 / num_previous] * num_previous)
    torch.testing.assert_close(static.scores, start[:, None].expand_as(static.scores))
    randomize(static, 0.2)
    experts = 3 * torch.randn(2, 4, 5, 16) + 1
    previous = torch.randn(2, num_previous, 5, 16)

    weights = torch.softmax(static.scores[:4] / static.temperature, 0)
    weights_previous = static.scores[4:]
    if num_previous > 1:
        weights_previous = torch.softmax(weights_previous / static.temperature_previous, 0)
    layers = [*experts.unbind(1), *previous.unbind(1)]
    want = torch.zeros(2, 5, 16)
    for i, weight_i in enumerate([*weights, *weights_previous]):
        want += weight_i * F.layer_norm(layers[i], (16,), static.scale[i], static.shift[i], 1e-5)

    given = previous if num_previous > 1 else previous[:, 0]
    close(static(standardize(experts), given), want, 1e-5)
    shape = static.weights(standardize(experts)).shape
    assert shape == (2, 4, 5, 16 if weight == "vector" else 1)


def test_an_adaptive_manager_with_its_own_query_is_the_papers_ablation():
    """TCSVT table I: W = softmax(Linear(Cn)), without the other modality."""
    torch.manual_seed(0)
    adaptive = randomize(AdaptiveManager(16, 4, own_query=True).eval(), 0.3)
    experts = torch.randn(2, 4, 5, 16)
    own = torch.randn(2, 5, 16)
    own_normed = F.layer_norm(own, (16,), adaptive.scale[4], adaptive.shift[4], 1e-5)
    weights = torch.softmax(adaptive.controller(own_normed) / adaptive.temperature, -1)  # (B, L, N)
    want = adaptive.score_previous * own_normed
    for i in range(4):
        insight = F.layer_norm(experts[:, i], (16,), adaptive.scale[i], adaptive.shift[i], 1e-5)
        want = want + weights[..., i : i + 1] * insight
    close(adaptive(standardize(experts), own, torch.randn(2, 7, 16)), want, 1e-5)


def test_managers_have_as_many_parameters_as_the_paper_says():
    """Of all parameters: 326.58M with bridges, 326.77M with SAUE, 326.77M and 338.64M with AAUE."""
    millions = []
    for fields in (
        {"fusion": "bridge"},
        {"manager_type": "saue"},
        {"manager_query": "own"},
        {},
    ):
        with torch.device("meta"):
            model = ManagerTower(ManagerTowerConfig(heads=(), **fields))
        millions.append(sum(parameter.numel() for parameter in model.parameters()) / 1e6)
    more_than_bridges = [round(count - millions[0], 2) for count in millions[1:]]
    assert more_than_bridges == [0.19, 0.19, 12.06]


def test_adaptive_manager_is_the_papers_formula():
    torch.manual_seed(0)
    adaptive = randomize(AdaptiveManager(16, 4).eval(), 0.3)
    experts = torch.randn(2, 4, 5, 16)
    own = torch.randn(2, 5, 16)
    other = torch.randn(2, 7, 16)

    own_normed = F.layer_norm(own, (16,), adaptive.scale[4], adaptive.shift[4], 1e-5)
    other_normed = adaptive.norm_query(other)
    similarity = adaptive.q_proj(own_normed) @ adaptive.k_proj(other_normed).transpose(1, 2)
    fused = torch.softmax(similarity / 4, -1) @ other_normed  # sqrt(D) is 4
    scores = adaptive.controller(torch.cat([fused, own_normed], -1))
    weights = torch.softmax(scores / adaptive.temperature, -1)  # (B, L, N)
    want = adaptive.score_previous * own_normed
    for i in range(4):
        normed = F.layer_norm(experts[:, i], (16,), adaptive.scale[i], adaptive.shift[i], 1e-5)
        want = want + weights[..., i : i + 1] * normed
    close(adaptive(standardize(experts), own, other), want, 1e-5)
    assert adaptive.weights(standardize(experts), own, other).shape == (2, 4, 5, 1)


def test_adaptive_weights_sum_to_one_and_mask_ignores_padding():
    torch.manual_seed(0)
    adaptive = randomize(AdaptiveManager(16, 4).eval(), 0.3)
    experts = standardize(torch.randn(2, 4, 5, 16))
    own = torch.randn(2, 5, 16)
    other = torch.randn(2, 7, 16)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    close(adaptive.weights(experts, own, other, mask).sum(1), torch.ones(2, 5, 1), 1e-6)
    changed = other.clone()
    changed[1, 4:] = 9
    close(adaptive(experts, own, changed, mask), adaptive(experts, own, other, mask), 1e-6)
    assert (adaptive(experts, own, changed) - adaptive(experts, own, other)).abs().max() > 1e-3


def test_managers_allocate_no_copy_of_the_expert_stack():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                self.size = max(self.size, out.numel())
            return out

    experts = torch.randn(2, 6, 10, 8)
    own = torch.randn(2, 10, 8)
    for module, args in (
        (StaticManager(8, 6, 1), (own,)),
        (AdaptiveManager(8, 6), (own, own)),
    ):
        with torch.no_grad(), Largest() as largest:
            module.eval()(experts, *args)
        assert 0 < largest.size < experts.numel() / 2


def test_what_does_not_fit_a_manager_is_refused():
    experts = torch.randn(2, 3, 4, 96)
    with pytest.raises(ValueError, match="are 2, not 3 layers"):
        StaticManager(96, 3)(experts[:, :2])
    with pytest.raises(ValueError, match="0 previous outputs, this manager aggregates 1"):
        StaticManager(96, 3, 1)(experts)
    with pytest.raises(ValueError, match="3 previous outputs, this manager aggregates 1"):
        StaticManager(96, 3, 1)(experts, experts)
    with pytest.raises(ValueError, match="0 previous outputs, this manager aggregates 1"):
        AdaptiveManager(96, 3)(experts)
    with pytest.raises(ValueError, match="weight is 'matrix'"):
        StaticManager(96, 3, weight="matrix")
    with pytest.raises(ValueError, match="query is 'first'"):
        AdaptiveVisualManager(96, 3, "first")


# ---------------------------------------------------------------- the MLLM's managers
def test_a_weighted_sum_takes_generators_and_keeps_the_experts_dtype():
    weights = torch.randn(3, 1, 8)
    experts = torch.randn(3, 5, 8)
    close(weighted_sum(iter(weights), iter(experts)), (weights * experts).sum(0), 1e-6)
    assert weighted_sum(weights, experts.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="shorter|longer"):
        weighted_sum(weights, experts[:2])


@pytest.mark.parametrize("query", [None, "last", "average", "cross"])
def test_adaptive_visual_manager_is_the_papers_formula(query):
    torch.manual_seed(0)
    visual = randomize(AdaptiveVisualManager(16, 3, query).eval(), 0.3)
    experts = torch.randn(2, 3, 5, 16)
    hidden = torch.randn(2, 5, 16)
    text = torch.randn(2, 4, 16)
    sees = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()  # the same for all image tokens
    mask = sees[:, None].expand(-1, 5, -1)

    contexts = []
    for row in range(2):
        seen = text[row, sees[row]]  # (3, D)
        if query == "last":
            contexts.append(seen[-1].expand(5, -1))
        elif query == "average":
            contexts.append(seen.mean(0).expand(5, -1))
        elif query == "cross":
            similarity = visual.q_proj(hidden[row]) @ visual.k_proj(seen).T / 4
            contexts.append(torch.softmax(similarity, -1) @ seen)
    read = torch.cat([torch.stack(contexts), hidden], -1) if query else hidden
    scores = visual.controller(read)  # (B, L, N)
    want = torch.zeros(2, 5, 16)
    for n in range(3):
        want += scores[..., n : n + 1] * visual.gate[n] * experts[:, n]

    args = (hidden, text, mask) if query else (hidden,)
    close(visual(experts, *args), want, 1e-5)
    assert visual.weights(*args).shape == (2, 3, 5, 16)


@pytest.mark.parametrize("query", ["last", "average", "cross"])
@pytest.mark.parametrize("num_tokens, num_queries", [(0, 0), (0, 3), (2, 0)])
def test_without_managed_tokens_or_text_nothing_is_asked(query, num_tokens, num_queries):
    """All pictures lie beyond max_length: no token is managed, and there may be no text token."""
    torch.manual_seed(0)
    visual = AdaptiveVisualManager(8, 2, query)
    experts = torch.randn(1, 2, num_tokens, 8)
    hidden = torch.randn(1, num_tokens, 8, requires_grad=True)
    text = torch.randn(1, num_queries, 8)
    mask = torch.ones(1, num_tokens, num_queries, dtype=torch.bool)
    context = visual.context(hidden, text, mask)
    assert context.shape == (1, num_tokens, 8)
    if num_queries == 0:
        assert torch.equal(context, torch.zeros(1, num_tokens, 8))
    out = visual(experts, hidden, text, mask)
    assert out.shape == (1, num_tokens, 8)
    # every parameter takes part, as several processes expect it of each other
    out.sum().backward()
    for parameter in visual.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
