"""analysis.py: each measure against a closed form or torch's own, recomputed attention against the
layers themselves.
"""

import math

import pytest
import torch
from helpers import TINY_MLLM
from torch import nn
from torch.distributions import Categorical, kl_divergence

import analysis
import figures
from chat import IMAGE_TOKEN
from llava_manager import LlavaManager, LlavaManagerConfig
from model import ManagerTower, ManagerTowerConfig, ViT
from multigrid import ImageTiles


def random_attention(*shape):
    torch.manual_seed(0)
    return torch.randn(shape, dtype=torch.float64).softmax(-1)


# ---------------------------------------------------------------- the measures
def test_uniform_attention_has_entropy_log_n_and_heads_that_agree():
    attention = torch.full((2, 3, 4, 8), 1 / 8)
    assert torch.allclose(analysis.attention_entropy(attention), torch.tensor(math.log(8)))
    assert analysis.head_divergence(attention).abs().max() < 1e-6


def test_attention_to_one_key_has_no_entropy():
    attention = torch.eye(5)[None, None]
    assert analysis.attention_entropy(attention).abs().max() == 0


def test_entropy_and_divergence_are_those_of_torch_distributions():
    attention = random_attention(1, 3, 2, 6)
    entropy = Categorical(probs=attention).entropy()
    assert torch.allclose(analysis.attention_entropy(attention), entropy)
    pairs = []
    for one in range(3):
        for other in range(3):
            if one != other:
                first = Categorical(probs=attention[:, one])
                pairs.append(kl_divergence(first, Categorical(probs=attention[:, other])))
    mean = torch.stack(pairs).mean(0)
    assert torch.allclose(analysis.head_divergence(attention), mean)


def test_a_single_head_agrees_with_itself_and_unseen_keys_do_not_count():
    assert analysis.head_divergence(random_attention(1, 1, 2, 6)).tolist() == [[0, 0]]
    seen = random_attention(1, 3, 2, 6)
    with_unseen = torch.cat([seen, torch.zeros(1, 3, 2, 2, dtype=torch.float64)], dim=-1)
    found = analysis.head_divergence(with_unseen)
    assert torch.allclose(found, analysis.head_divergence(seen))


def test_attention_distance_in_pixels():
    places = analysis.patch_places(2, 10)
    assert places.tolist() == [[5, 5], [5, 15], [15, 5], [15, 15]]
    stay = torch.eye(4)
    right_or_left = torch.eye(4)[[1, 0, 3, 2]]
    crosswise = torch.eye(4)[[3, 2, 1, 0]]
    uniform = torch.full((4, 4), 0.25)
    for attention, distance in (
        (stay, 0),
        (right_or_left, 10),
        (crosswise, 10 * math.sqrt(2)),
        (uniform, (10 + 10 + 10 * math.sqrt(2)) / 4),
    ):
        found = analysis.attention_distance(attention, places)
        assert found.tolist() == pytest.approx([distance] * 4, abs=1e-4)


def test_cosines_of_consecutive_states():
    state = torch.randn(1, 4, 8)
    turned = state.clone()
    turned[:, 2:] *= -1
    first_two = torch.tensor([[True, True, False, False]])
    states = [state, 2 * state, turned]
    assert analysis.consecutive_cosines(states, first_two) == pytest.approx([1, 1])
    assert analysis.consecutive_cosines(states, ~first_two) == pytest.approx([1, -1])


# ---------------------------------------------------------------- ridge
def ridge_data(rows):
    torch.manual_seed(0)
    features = torch.randn(rows + 10, 30, dtype=torch.float64)
    targets = features @ torch.randn(30, 3, dtype=torch.float64)
    targets += 5 + torch.randn(rows + 10, 3, dtype=torch.float64)
    return features[:rows], targets[:rows], features[rows:]


@pytest.mark.parametrize("rows", [20, 50])
def test_ridge_is_the_normal_equations_whether_rows_or_features_are_more(rows):
    train, targets, test = ridge_data(rows)
    found = analysis.ridge(train, targets, test)
    x = train - train.mean(0)
    matrix = x.T @ x + found.penalty * torch.eye(30, dtype=torch.float64)
    weights = torch.linalg.solve(matrix, x.T @ (targets - targets.mean(0)))
    expected = (test - train.mean(0)) @ weights + targets.mean(0)
    assert torch.allclose(found.scores, expected)


@pytest.mark.parametrize("rows", [20, 50])
def test_the_penalty_is_that_of_the_best_predicted_left_out_rows(rows):
    """By brute force: without each row in turn, middle and offset are computed anew."""
    train, targets, test = ridge_data(rows)
    length = (train - train.mean(0)).square().sum().item() / rows
    errors = {}
    for part in analysis.PENALTIES:
        error = 0.0
        for left_out in range(rows):
            kept = [row for row in range(rows) if row != left_out]
            middle = train[kept].mean(0)
            offset = targets[kept].mean(0)
            x = train[kept] - middle
            matrix = x.T @ x + part * length * torch.eye(30, dtype=torch.float64)
            weights = torch.linalg.solve(matrix, x.T @ (targets[kept] - offset))
            predicted = (train[left_out] - middle) @ weights + offset
            error += (predicted - targets[left_out]).square().sum().item()
        errors[part * length] = error
    found = analysis.ridge(train, targets, test)
    assert found.penalty == pytest.approx(min(errors, key=errors.get))
    assert found.error == pytest.approx(min(errors.values()))


# ---------------------------------------------------------------- attention, once more
class Caught:
    """What the layers read, and what their last projection of the attention reads."""

    def __init__(self, layers):
        self.inputs = {}
        self.attended = {}
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self.keeper(self.inputs, number))
            layer.proj.register_forward_pre_hook(self.keeper(self.attended, number))

    @staticmethod
    def keeper(where, number):
        def keep(module, args):
            where[number] = args

        return keep


def check_attention(caught, layers, heads_of):
    """Recomputed attention @ v is what each layer gave to its projection."""
    for number, layer in enumerate(layers):
        heads = heads_of(layer, *caught.inputs[number][:3])
        is_seen = None
        if heads_of is analysis.heads_of_llm:
            positions = torch.arange(heads.q.shape[2])
            is_seen = analysis.causal(positions, positions)
        attention = analysis.attention_map(heads.q, heads.k, is_seen)
        assert torch.allclose(attention.sum(-1), torch.ones(()))
        attended = (attention @ heads.v).transpose(1, 2).flatten(2)
        (own,) = caught.attended[number]
        assert torch.allclose(attended, own, atol=1e-5)
    assert len(caught.inputs) == len(layers)


@pytest.mark.parametrize("kind", ["clip", "vit", "siglip"])
def test_recomputed_attention_of_a_vit_is_that_of_its_blocks(kind):
    torch.manual_seed(0)
    encoder = ViT(16, 4, 24, 3, 4, 32, kind=kind)
    caught = Caught(encoder.blocks)
    with torch.no_grad():
        encoder(torch.randn(2, 3, 16, 16), [3])
        check_attention(caught, encoder.blocks, analysis.heads_of_vit)


def tiny_mllm(**overrides):
    torch.manual_seed(0)
    values = {**TINY_MLLM, "vocab_size": 50, "num_heads": 4, "num_kv_heads": 2, **overrides}
    model = LlavaManager(LlavaManagerConfig.tiny(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def make_prompt(seed=0, text=(5, 6, 7)):
    """Ids with a placeholder behind two tokens, and a picture of five tiles."""
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return [3, 4, IMAGE_TOKEN, *text], [ImageTiles(pixels, (32, 32))]


def test_recomputed_attention_of_the_llm_is_that_of_its_layers():
    """With rotary embedding, keys that heads share, and managers."""
    model = tiny_mllm()
    caught = Caught(model.llm.layers)
    input_ids, images = make_prompt()
    with torch.no_grad():
        model(torch.tensor([input_ids]), images=images)
        check_attention(caught, model.llm.layers, analysis.heads_of_llm)


def test_without_some_keys_attention_is_normalised_over_the_others():
    q = torch.randn(1, 2, 5, 4)
    k = torch.randn(1, 2, 5, 4)
    positions = torch.arange(5)
    everything = analysis.attention_map(q, k, analysis.causal(positions, positions))
    keys = torch.tensor([1, 3])
    queries = torch.tensor([1, 3, 4])
    found = analysis.attention_map(q[:, :, queries], k[:, :, keys], analysis.causal(queries, keys))
    expected = everything[:, :, queries][..., keys]
    assert torch.allclose(found, expected / expected.sum(-1, keepdim=True))


# ---------------------------------------------------------------- the layers of the MLLM
def flat(statistics):
    """All numbers of layer_statistics, in one order."""
    numbers = []
    for what in ("cosine", "entropy", "uniform", "head_divergence"):
        for values in statistics[what].values():
            numbers += values
    for heads in statistics["distance"]:
        numbers += heads
    return numbers


def test_layers_without_attention_and_without_effect_have_the_closed_form():
    """Queries of zero attend to all alike, and layers that add nothing leave their input."""
    model = tiny_mllm(manager_type=None)
    with torch.no_grad():
        for layer in model.llm.layers:
            nn.init.zeros_(layer.q.weight)
            nn.init.zeros_(layer.q.bias)
            nn.init.zeros_(layer.proj.weight)
            nn.init.zeros_(layer.down.weight)
        for block in model.vision.blocks:
            nn.init.zeros_(block.qkv.weight)
            nn.init.zeros_(block.qkv.bias)
    input_ids, images = make_prompt()
    found = analysis.layer_statistics(model, [(input_ids, images)])
    count = int(found["image_tokens"])
    assert count == found["image_tokens"] == 4 + 4 * 5  # a tile, and 4 x 4 patches with newlines
    assert found["cosine"]["visual"] == pytest.approx([1, 1])
    assert found["cosine"]["text"] == pytest.approx([1, 1])
    # image token number m sees m of them, and the text behind sees all
    visual = sum(math.log(m) for m in range(1, count + 1)) / count
    for what in ("entropy", "uniform"):
        assert found[what]["visual"] == pytest.approx([visual] * 2)
        assert found[what]["text_to_visual"] == pytest.approx([math.log(count)] * 2)
    for part in analysis.PARTS:
        assert found["head_divergence"][part] == pytest.approx([0, 0], abs=1e-6)
    # patches of 8 x 8 pixels, two along a side
    distance = (8 + 8 + 8 * math.sqrt(2)) / 4
    for heads in found["distance"]:
        assert heads == pytest.approx([distance] * 2, rel=1e-4)


def test_statistics_are_means_over_prompts_and_do_not_depend_on_the_blocks(monkeypatch):
    model = tiny_mllm()
    prompts = [make_prompt(1), make_prompt(2, (8, 9))]
    found = flat(analysis.layer_statistics(model, prompts))
    each = [flat(analysis.layer_statistics(model, [prompt])) for prompt in prompts]
    means = [(one + other) / 2 for one, other in zip(*each, strict=True)]
    assert found == pytest.approx(means)
    assert each[0] != pytest.approx(each[1])
    monkeypatch.setattr(analysis, "QUERIES_AT_ONCE", 3)
    assert flat(analysis.layer_statistics(model, prompts)) == pytest.approx(found)


def test_a_manager_shows_in_the_cosine_of_its_layer():
    """The states of layer_statistics are the outputs of the layers, before the managers."""
    model = tiny_mllm(num_layers=3, inject_layers=(1,), managed_layers=(1, 2))
    prompts = [make_prompt()]
    before = analysis.layer_statistics(model, prompts)["cosine"]["visual"]
    with torch.no_grad():
        model.managers[0].scores += 5
    after = analysis.layer_statistics(model, prompts)["cosine"]["visual"]
    assert before[0] == after[0] and before[1] > after[1] + 0.01


@pytest.mark.parametrize(
    "prompt, message",
    [
        (([3, 4, 5], []), "prompt 0 has no picture; of its 3 tokens"),
        (([3, *make_prompt()[0][2:3]], make_prompt()[1]), "no text behind its pictures"),
        (([3] * 118 + [IMAGE_TOKEN, 4], make_prompt()[1]), "no text .* max_length 120"),
    ],
)
def test_a_prompt_without_what_is_measured_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        analysis.layer_statistics(tiny_mllm(), [prompt])


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="there are no prompts"):
        analysis.layer_statistics(tiny_mllm(), [])


# ---------------------------------------------------------------- managers
class Rows(torch.utils.data.Dataset):
    """Rows of tensors."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["input_ids"])

    def __getitem__(self, row):
        return {name: column[row] for name, column in self.columns.items()}


def test_both_pictures_of_a_statement_count():
    torch.manual_seed(0)
    config = ManagerTowerConfig.tiny(image_size=16, num_layers=3)
    model = ManagerTower(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    text = {
        "input_ids": torch.randint(5, 300, (3, 10)),
        "attention_mask": torch.ones(3, 10, dtype=torch.long),
    }
    pictures = torch.randn(2, 3, 3, 16, 16)
    each = []
    for pixels in pictures:
        each.append(analysis.manager_statistics(model, Rows({**text, "pixels": pixels})))
    pair = {**text, "pixels": pictures[0], "pixels_1": pictures[1]}
    both = analysis.manager_statistics(model, Rows(pair))
    for modality in ("text", "image"):
        for what in ("weights", "cosine_unimodal", "cosine_cross_modal"):
            values = torch.tensor([one[modality][what] for one in each]).mean(0)
            found = torch.tensor(both[modality][what])
            assert torch.allclose(found, values, atol=1e-6)
    assert each[0]["text"]["weights"] != each[1]["text"]["weights"]


# ---------------------------------------------------------------- probes
def test_patches_are_averaged_over_cells():
    few = torch.randn(2, 16, 5)
    assert analysis.pool_patches(few) is few
    rows = torch.arange(12.0).repeat_interleave(12)  # the row of each of 12 x 12 patches
    pooled = analysis.pool_patches(rows[None, :, None])
    means = [0.5, 2.5, 4.5, 6.5, 8.5, 10.5]
    assert pooled.flatten().tolist() == [mean for mean in means for _ in range(6)]


class PixelEncoder(nn.Module):
    """Hidden state 0 says nothing of the picture, state 1 has its pixels."""

    image_size = 16

    def __init__(self, has_class_token):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(1)) if has_class_token else None
        self.blocks = nn.ModuleList([nn.Linear(1, 1)])

    def forward(self, pixels, keep):
        patches = nn.functional.unfold(pixels, 4, stride=4).transpose(1, 2)  # (R, 16, 48)
        if self.class_embedding is not None:
            patches = nn.functional.pad(patches, (0, 0, 1, 0))
        return [torch.ones_like(patches), patches]


def to_pixels(picture):
    values = torch.tensor(list(picture.tobytes())).view(16, 16, 3) / 255
    return values.permute(2, 0, 1)


@pytest.mark.parametrize("has_class_token", [True, False])
def test_a_probe_finds_what_is_there_and_nothing_else(has_class_token):
    found = figures.probe_encoder(PixelEncoder(has_class_token), to_pixels, 300, 64)
    assert (found["train"], found["test"]) == (300, 150)
    chance = {"color": 1 / 5, "shape": 1 / 3, "size": 1 / 2, "axis of relation": 1 / 2}
    assert found["chance"] == chance
    rest = "class token" if has_class_token else "mean of the patches"
    assert list(found["accuracy"]) == ["all tokens", rest]
    for name, (nothing, pixels) in found["accuracy"]["all tokens"].items():
        assert abs(nothing - chance[name]) < 0.13
        assert pixels > nothing
        if name == "axis of relation":
            assert pixels > 0.85
    if has_class_token:  # it holds nothing, in both states
        for nothing, nothing_either in found["accuracy"][rest].values():
            assert nothing == nothing_either


def test_a_probe_on_the_truth_itself_is_always_right():
    values = figures.scene_values(figures.probe_scenes(100))
    truth = []
    for column in values.values():
        truth.append(analysis.one_hot(column, sorted(set(column))))
    accuracies = analysis.probe_accuracies(torch.cat(truth, dim=1), values, 100)
    assert accuracies == dict.fromkeys(values, 1.0)


def test_scenes_to_learn_from_and_to_test_on_are_others_and_the_same_each_time():
    scenes = figures.probe_scenes(200)
    train = {scene for scene, _ in scenes[:200]}
    test = {scene for scene, _ in scenes[200:]}
    assert len(scenes) == 300 and not train & test
    assert [scene for scene, _ in figures.probe_scenes(200)] == [scene for scene, _ in scenes]
