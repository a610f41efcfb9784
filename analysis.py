"""What the papers look at inside of a model, as numbers; figures.py draws them.

ACL 2023, section 5 (figures 4 and 7); TCSVT 2025, figures 18 to 20 and 26 (31 and 32 in the
appendix). There are four parts:

    the measures            cosine, entropy, divergence of heads, distance, ridge: closed forms
    attention, once more    a layer's attention map from its input and its own weights
    statistics of a model   the measures over data, by hooks on the layers as they run
    probes                  what can be read off each layer of an encoder

Kernels of attention do not give their maps away. So a hook takes what a layer reads, and computes
queries and keys again with the layer's own modules; no model is written down a second time.

Shapes: B batch, T tiles, N experts, H heads, L tokens, Q queries, K keys, D width, d width of a
head, S length of a row with its images, R scenes, F features of a scene, C classes.
"""

import contextlib
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import batches
from llava_manager import IMAGE_TOKEN, DecoderLayer, LlavaManager, expand_placeholders, rotate
from manager import AdaptiveVisualManager, standardize
from model import BertLayer, ManagerTower, ViT, ViTBlock, attention, split_heads
from world import evaluating


# ---------------------------------------------------------------- the measures
def attention_entropy(attention: Tensor) -> Tensor:
    """-sum_k a_k log a_k in nats, (..., K) -> (...). Of K equal weights it is log K."""
    return torch.special.entr(attention).sum(-1)


def head_divergence(attention: Tensor) -> Tensor:
    """How differently the heads attend: the mean of KL(head g || head h) in nats over all ordered
    pairs of different heads, (B, H, Q, K) -> (B, Q). 0 where all heads agree, and for one head.
    """
    heads = attention.shape[1]
    if heads == 1:
        return torch.zeros_like(attention[:, 0, :, 0])
    smallest = torch.finfo(attention.dtype).tiny  # a key without weight has no logarithm
    logs = attention.clamp(min=smallest).log()
    # sum over h of a_g (log a_g - log a_h); the pair of a head with itself adds nothing
    sums = attention * (heads * logs - logs.sum(1, keepdim=True))
    return sums.sum((1, 3)) / (heads * (heads - 1))


def patch_places(side: int, patch_size: int) -> Tensor:
    """The centres of side * side patches, row by row, in pixels: (side * side, 2)."""
    centres = (torch.arange(side) + 0.5) * patch_size
    return torch.cartesian_prod(centres, centres)


def attention_distance(attention: Tensor, places: Tensor) -> Tensor:
    """How far each query looks on average: sum_k a_k |place_q - place_k|, in the unit of the
    places. attention (..., L, L), places (L, 2) -> (..., L).
    """
    distances = torch.cdist(places, places)  # (L, L)
    return (attention * distances).sum(-1)


def consecutive_cosines(states: list[Tensor], is_counted: Tensor) -> list[float]:
    """The mean cosine similarity of each state with the next one, over the tokens that count.

    states: (B, L, D) each; is_counted (B, L), boolean.
    """
    means = []
    for i in range(1, len(states)):
        before = states[i - 1].float()
        cosines = F.cosine_similarity(before, states[i].float(), dim=-1)  # (B, L)
        means.append(cosines[is_counted].mean().item())
    return means


class Ridge(NamedTuple):
    """What a ridge regression says of the test rows."""

    scores: Tensor  # (test rows, C)
    penalty: float  # that was chosen
    error: float  # sum of the squared errors of the training rows, each left out in turn


PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # as parts of the mean squared length of a row


def ridge(train: Tensor, targets: Tensor, test: Tensor) -> Ridge:
    """Ridge regression in closed form, with an offset that is not penalised.

    train (R, F), targets (R, C), test (rows, F). With the centred rows X and targets Y

        W = (X^T X + p I)^-1 X^T Y = X^T (X X^T + p I)^-1 Y

    and the right side is used, as there are more features than rows. The penalty p is that of
    PENALTIES with the smallest squared error when each training row is left out in turn, which has
    a closed form too: the error of row i is a_i / (G_ii - 1 / (p R)), with G = (X X^T + p I)^-1 and
    a = G Y. The second term is there because without row i the middle is another one.
    """
    train = train.double()
    middle = train.mean(0)
    offset = targets.double().mean(0)
    rows = train - middle
    values, vectors = torch.linalg.eigh(rows @ rows.T)  # (R,), (R, R)
    values = values.clamp(min=0)
    rotated = vectors.T @ (targets.double() - offset)  # (R, C)

    # the penalty whose left-out rows are predicted best
    errors = {}
    for part in PENALTIES:
        penalty = max(part * values.mean().item(), 1e-12)
        inverse = 1 / (values + penalty)
        duals = vectors @ (inverse[:, None] * rotated)  # a
        diagonal = (vectors.square() * inverse).sum(1) - 1 / (penalty * len(rows))
        errors[penalty] = (duals / diagonal[:, None]).square().sum().item()
    penalty = min(errors, key=lambda candidate: errors[candidate])

    duals = vectors @ (rotated / (values + penalty)[:, None])
    weights = rows.T @ duals  # (F, C)
    scores = (test.double() - middle) @ weights + offset
    return Ridge(scores, penalty, errors[penalty])


# ---------------------------------------------------------------- attention, once more
class Heads(NamedTuple):
    """What the attention of a layer reads, split into heads: (B, H, L, d) each."""

    q: Tensor
    k: Tensor
    v: Tensor


def heads_of_vit(block: ViTBlock, x: Tensor) -> Heads:
    """Of a block of CLIP or SigLIP that reads x (B, L, D)."""
    q, k, v = block.qkv(block.ln_1(x)).chunk(3, dim=-1)
    return Heads(
        split_heads(q, block.heads), split_heads(k, block.heads), split_heads(v, block.heads)
    )


def heads_of_cross_modal(layer: BertLayer, x: Tensor, mask: Tensor | None, other: Tensor) -> Heads:
    """Of the cross-attention of a cross-modal layer that reads x (B, L, D) and, of the other
    modality, (B, Lo, D). mask (B, 1, 1, L): of x, as the layer takes it.

    Its queries are the tokens behind the self-attention of the layer.
    """
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    out = attention(q, k, v, layer.heads, mask)
    x = layer.ln_1(x + layer.proj(out))
    q = layer.q(x)
    k, v = layer.kv(other).chunk(2, dim=-1)
    return Heads(
        split_heads(q, layer.heads), split_heads(k, layer.heads), split_heads(v, layer.heads)
    )


def heads_of_llm(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor) -> Heads:
    """Of a layer of Qwen2 that reads x (B, S, D), with the rotary embedding that it is given.

    Each head of keys and values stands as often as there are heads of queries that share it.
    """
    normed = layer.norm_1(x)
    q = rotate(layer.split_heads(layer.q(normed)), cos, sin)
    keys, values = layer.kv(normed).chunk(2, dim=-1)
    k = rotate(layer.split_heads(keys), cos, sin)
    v = layer.split_heads(values)
    group = q.shape[1] // k.shape[1]
    return Heads(q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1))


def attention_map(q: Tensor, k: Tensor, is_seen: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) over the keys, in float32, (B, H, Q, K).

    is_seen: boolean, broadcastable to it. Without some of the keys the result is what the attention
    over all keys gives to the others, normalised to sum to 1.
    """
    with torch.autocast(q.device.type, enabled=False):
        scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
    if is_seen is not None:
        scores = scores.masked_fill(~is_seen, -math.inf)
    return scores.softmax(-1)


def causal(queries: Tensor, keys: Tensor) -> Tensor:
    """Which keys a query sees: its own position and those before it. Positions (Q,) and (K,) ->
    (Q, K), boolean.
    """
    return keys <= queries[:, None]


@contextlib.contextmanager
def watching(modules: dict[Any, nn.Module], read: Callable[..., None]) -> Iterator[None]:
    """Inside, read(key, module, args, kwargs, output) is called after each forward pass of
    modules[key].
    """
    hooks = []
    for key, module in modules.items():
        hook = functools.partial(read, key)
        hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


# ---------------------------------------------------------------- the managers of ManagerTower
class Parts(NamedTuple):
    """What a manager makes of a batch."""

    weights: Tensor  # (B, N, L), means over the channels
    unimodal: Tensor  # (B, L, D), the sum over the experts
    cross_modal: Tensor  # (B, L, D), W_C * LN(C)


class ManagerWatcher:
    """Sums over the tokens of all batches, from what the managers of a ManagerTower do."""

    def __init__(self, model: ManagerTower):
        self.modules: dict[Any, nn.Module] = {}
        for modality, managers in (("text", model.text_managers), ("image", model.image_managers)):
            for i, manager in enumerate(managers):
                self.modules[modality, i] = manager
        self.parts: dict[Any, Parts] = {}  # of the last batch
        self.sums: dict[tuple, Any] = defaultdict(float)  # (modality, what, layer) -> sum
        self.tokens: Counter[str] = Counter()

    def read(self, key: Any, manager: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        """Take a manager's output apart: the hook of `watching`."""
        weights = manager.weights(*args, **kwargs)  # (B, N, L, D or 1)
        unimodal = manager.aggregate_experts(weights.unbind(1), args[0]).float()
        self.parts[key] = Parts(weights.float().mean(-1), unimodal, output.float() - unimodal)

    def add_batch(self, attention_mask: Tensor) -> None:
        """Add the parts of the last batch to the sums; padding does not count."""
        for (modality, i), parts in self.parts.items():
            # 1 for the tokens that count, (B, L)
            is_text = modality == "text"
            real = attention_mask if is_text else torch.ones_like(parts.weights[:, 0])
            weights = (parts.weights * real[:, None]).sum((0, 2))  # (N,)
            self.sums[modality, "weights", i] += weights.cpu()
            if i == 0:
                self.tokens[modality] += int(real.sum())
                continue
            before = self.parts[modality, i - 1]
            unimodal = F.cosine_similarity(parts.unimodal, before.unimodal, dim=-1)  # (B, L)
            self.sums[modality, "unimodal", i] += (unimodal * real).sum().cpu()
            cross_modal = F.cosine_similarity(parts.cross_modal, before.cross_modal, dim=-1)
            self.sums[modality, "cross_modal", i] += (cross_modal * real).sum().cpu()

    def means(self, modality: str, what: str, first_layer: int, num_layers: int) -> list:
        """Means over the tokens, for each layer from the first one on."""
        result = []
        for i in range(first_layer, num_layers):
            mean = self.sums[modality, what, i] / self.tokens[modality]
            result.append(mean.tolist())
        return result


def manager_statistics(
    model: ManagerTower, dataset: Any, batch_size: int = 32, num_workers: int = 0
) -> dict[str, dict]:
    """For "text" and "image", means over all tokens of the dataset that are not padding; of a
    statement about two pictures both of them, each with the text.

    "weights", a list for each cross-modal layer: the mean weight of each of the "experts" (encoder
    layers, counted from 1). "cosine_unimodal", "cosine_cross_modal": cosine similarity of the parts
    of consecutive managers' outputs, the sum over the experts and W_C * LN(C). The first manager
    has no second part, so the latter list is one shorter. Raises ValueError for a model without
    managers.
    """
    config = model.config
    if config.fusion != "manager":
        raise ValueError(f"a model with fusion {config.fusion!r} has no managers")
    watcher = ManagerWatcher(model)
    second_type = len(model.type_embedding) - 1  # without a type of its own it is as the first
    with evaluating(model) as device, watching(watcher.modules, watcher.read):
        for _, batch in batches(dataset, batch_size, num_workers):
            mask = batch["attention_mask"].to(device)
            input_ids = batch["input_ids"].to(device)
            model(batch["pixels"].to(device), input_ids, mask)
            watcher.add_batch(mask)
            if "pixels_1" in batch:  # statements are about two pictures
                model(batch["pixels_1"].to(device), input_ids, mask, second_type)
                watcher.add_batch(mask)

    statistics = {}
    for modality, last in (("text", config.text_layers), ("image", config.vision_layers)):
        first = last - config.num_experts(modality) + 1
        means = functools.partial(watcher.means, modality, num_layers=config.num_layers)
        statistics[modality] = {
            "experts": list(range(first, last + 1)),
            "weights": means("weights", 0),
            "cosine_unimodal": means("unimodal", 1),
            "cosine_cross_modal": means("cross_modal", 2),
        }
    return statistics


def adaptive_managers(model: LlavaManager) -> dict[Any, nn.Module]:
    """{number: manager} of the managers whose weights depend on the picture."""
    adaptive: dict[Any, nn.Module] = {}
    for k, manager in enumerate(model.managers):
        if isinstance(manager, AdaptiveVisualManager):
            adaptive[k] = manager
    return adaptive


def visual_manager_statistics(model: LlavaManager, prompts: list[tuple]) -> dict[str, list]:
    """Of the MLLM's managers before the LLM "layers": mean "weights" and mean "magnitudes"
    (|weight|) of each of the "experts".

    Means over the channels; for adaptive managers also over the image tokens of prompts, a list of
    (input_ids, images). Raises ValueError for a model without managers, or for adaptive ones
    without prompts.
    """
    managers: Any = model.managers
    if not len(managers):
        raise ValueError("this model has no managers")
    adaptive = adaptive_managers(model)
    if adaptive and not prompts:
        raise ValueError("adaptive managers need pictures: give --image or --data demo")
    parts = defaultdict(list)  # manager -> of each prompt (2, N): weights and magnitudes

    def add(k: Any, of_batch: Tensor) -> None:  # (B, N, L, D)
        means = [of_batch.mean((0, 2, 3)), of_batch.abs().mean((0, 2, 3))]
        parts[k].append(torch.stack(means).float().cpu())

    def read(k: Any, manager: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        add(k, manager.weights(*args[1:], **kwargs))  # the first argument are the experts

    with evaluating(model), watching(adaptive, read):
        for k, manager in enumerate(managers):
            if k not in adaptive:
                add(k, manager.weights())
        if adaptive:
            for input_ids, images in prompts:
                model(torch.tensor([input_ids]), images=images, logits=False)

    weights = []
    magnitudes = []
    for k in range(len(managers)):
        mean = torch.stack(parts[k]).mean(0)  # (2, N)
        weights.append(mean[0].tolist())
        magnitudes.append(mean[1].tolist())
    return {
        "experts": list(model.config.managed_layers),
        "layers": list(model.config.inject_layers),
        "weights": weights,
        "magnitudes": magnitudes,
    }


# ---------------------------------------------------------------- the layers of the MLLM
QUERIES_AT_ONCE = 256  # rows of an attention map that are in memory together
PARTS = ("visual", "text_to_visual")  # whose attention is measured: the queries, always over images


class PromptTokens(NamedTuple):
    """Where the tokens of one prompt stand in the LLM's sequence."""

    is_image: Tensor  # (1, S), boolean: image tokens, with the newlines of the grid
    image: Tensor  # (K,), their positions
    readers: Tensor  # (Q,), positions of the text that sees an image token


def find_tokens(
    model: LlavaManager, input_ids: list[int], images: list, number: int
) -> PromptTokens:
    """The PromptTokens of prompt `number`. Raises ValueError for one without pictures, or that
    max_length leaves no text behind its pictures.
    """
    device = model.image_newline.device
    batch = expand_placeholders(torch.tensor([input_ids]), None, images, model.config)
    is_image = batch.ids == IMAGE_TOKEN  # (1, S)
    image = torch.nonzero(is_image[0])[:, 0]
    text = torch.nonzero(~is_image[0])[:, 0]
    readers = text[text > image[0]] if len(image) else text[:0]
    if len(readers) == 0:
        reason = "has no picture" if not images else "has no text behind its pictures"
        raise ValueError(
            f"prompt {number} {reason}; of its {int(batch.lengths[0])} tokens the model reads "
            f"max_length {model.config.max_length}"
        )
    return PromptTokens(is_image.to(device), image.to(device), readers.to(device))


def measure_attention(heads: Heads, queries: Tensor, keys: Tensor) -> dict[str, float]:
    """Entropy, and divergence of the heads, of the causal attention of some positions (Q,) to some
    others (K,): means over the queries, and the entropy over the heads. heads: of one row.

    Each query's attention is normalised over those of the keys that it sees; "uniform" is the
    entropy if it saw all of them alike.
    """
    sums: dict[str, float] = defaultdict(float)
    k = heads.k[:, :, keys]
    for part in queries.split(QUERIES_AT_ONCE):
        is_seen = causal(part, keys)  # (Q, K)
        attention = attention_map(heads.q[:, :, part], k, is_seen)  # (1, H, Q, K)
        sums["entropy"] += attention_entropy(attention).mean(1).sum().item()
        sums["uniform"] += is_seen.sum(1).log().sum().item()
        sums["head_divergence"] += head_divergence(attention).sum().item()
    return {what: total / len(queries) for what, total in sums.items()}


class LlavaWatcher:
    """What the layers of a LlavaManager do with prompts, one prompt after the other."""

    def __init__(self, model: LlavaManager):
        self.model = model
        self.modules: dict[Any, nn.Module] = {"llm": model.llm}
        for number, layer in enumerate(model.llm.layers):
            self.modules["layer", number] = layer
        for number, block in enumerate(model.vision.blocks):
            self.modules["block", number] = block
        config = model.config
        self.places = patch_places(config.side, config.patch_size).to(model.image_newline.device)
        self.tokens: Any = None  # of the prompt that runs
        self.outputs: list[Tensor] = []  # of the LLM's layers, (1, S, D)
        self.values: dict[tuple, list] = defaultdict(list)  # what -> of each prompt

    def read(self, key: Any, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        """The hook of `watching`, for blocks of SigLIP, layers of the LLM, and the LLM itself."""
        if key == "llm":
            self.add_cosines([args[0], *self.outputs])
            self.outputs = []
            return
        kind, number = key
        if kind == "block":
            self.add_distance(number, module, args[0])
            return
        self.outputs.append(output)
        x, cos, sin = args[:3]
        heads = heads_of_llm(module, x, cos, sin)
        for part, queries in zip(PARTS, (self.tokens.image, self.tokens.readers), strict=True):
            for what, value in measure_attention(heads, queries, self.tokens.image).items():
                self.values[what, part, number].append(value)

    def add_distance(self, number: int, block: ViTBlock, x: Tensor) -> None:
        """The attention distance of each head of a block, means over queries and tiles."""
        tiles = []
        for tile in x.split(1):  # one at a time, as a map is large
            heads = heads_of_vit(block, tile)
            distances = attention_distance(attention_map(heads.q, heads.k), self.places)
            tiles.append(distances.mean((0, 2)))  # (H,)
        self.values["distance", number].append(torch.stack(tiles).mean(0).tolist())

    def add_cosines(self, states: list[Tensor]) -> None:
        """states: the LLM's input and the outputs of its layers."""
        is_image = self.tokens.is_image
        for part, is_counted in (("visual", is_image), ("text", ~is_image)):
            self.values["cosine", part].append(consecutive_cosines(states, is_counted))

    def mean(self, *key: Any) -> Any:
        """The mean over the prompts, of a number or of a list of numbers."""
        return torch.tensor(self.values[key], dtype=torch.float64).mean(0).tolist()


def layer_statistics(model: LlavaManager, prompts: Iterable[tuple]) -> dict[str, Any]:
    """What the layers of the MLLM do with prompts of (input_ids, images): means over the tokens of
    a prompt, then over the prompts.

    "cosine", of {"visual", "text"}: cosine similarity of the output of an LLM layer and that of the
    one before it, a list over the layers; layer 0 is compared with the LLM's input. The manager
    before a layer acts between the two.

    "entropy", "head_divergence" and "uniform", of {"visual", "text_to_visual"}: lists over the
    LLM's layers, in nats. The queries are the image tokens, or the text tokens behind the first of
    them. The keys are the image tokens that a query sees, as attention is causal; its weights are
    normalised over them. "uniform" is the entropy of equal weights, and so the largest one.

    "distance": for each block of SigLIP a list over its heads: how far a patch looks, in pixels of
    a tile. "prompts", "image_tokens": their number, and the mean number of image tokens.
    """
    watcher = LlavaWatcher(model)
    num_tokens = []
    with evaluating(model), watching(watcher.modules, watcher.read):
        for number, (input_ids, images) in enumerate(prompts):
            watcher.tokens = find_tokens(model, input_ids, images, number)
            num_tokens.append(len(watcher.tokens.image))
            model(torch.tensor([input_ids]), images=images, logits=False)
    if not num_tokens:
        raise ValueError("there are no prompts")

    statistics: dict[str, Any] = {"prompts": len(num_tokens)}
    statistics["image_tokens"] = sum(num_tokens) / len(num_tokens)
    statistics["cosine"] = {part: watcher.mean("cosine", part) for part in ("visual", "text")}
    layers = range(len(model.llm.layers))
    for what in ("entropy", "uniform", "head_divergence"):
        statistics[what] = {}
        for part in PARTS:
            statistics[what][part] = [watcher.mean(what, part, layer) for layer in layers]
    blocks = range(len(model.vision.blocks))
    statistics["distance"] = [watcher.mean("distance", block) for block in blocks]
    return statistics


# ---------------------------------------------------------------- probes
MOST_CELLS = 6  # along a side; a finer grid of patches is averaged over as many cells


def pool_patches(patches: Tensor) -> Tensor:
    """(R, n * n, D) -> (R, m * m, D), m at most MOST_CELLS: means over cells of neighbours."""
    side = math.isqrt(patches.shape[1])
    if side <= MOST_CELLS:
        return patches
    grid = patches.transpose(1, 2).unflatten(2, (side, side))  # (R, D, n, n)
    return F.adaptive_avg_pool2d(grid, MOST_CELLS).flatten(2).transpose(1, 2)


def probe_features(state: Tensor, has_class_token: bool) -> dict[str, Tensor]:
    """A hidden state (R, L, D) of R scenes -> what two probes read of it.

    "all tokens" (R, F): the class token, if there is one, and the patches, or the means over
    MOST_CELLS x MOST_CELLS cells where there are more. "class token" (R, D), or without one "mean
    of the patches". Each token is standardised first, as it is for the managers.
    """
    tokens = standardize(state[:, None])[:, 0].float()
    patches = tokens[:, 1:] if has_class_token else tokens
    pooled = pool_patches(patches).flatten(1)
    # half precision: a probe does not see the difference, and all layers wait in memory
    if not has_class_token:
        return {"all tokens": pooled.half(), "mean of the patches": patches.mean(1).half()}
    everything = torch.cat([tokens[:, 0], pooled], dim=1)
    return {"all tokens": everything.half(), "class token": tokens[:, 0].half()}


def encode_scenes(encoder: ViT, batches_of_pixels: Iterable[Tensor]) -> list[dict[str, Tensor]]:
    """For each hidden state of an encoder, from 0 on, the features of all scenes, (R, F)."""
    parameter = next(encoder.parameters())
    numbers = range(len(encoder.blocks) + 1)
    parts: list[dict[str, list]] = [defaultdict(list) for _ in numbers]
    with evaluating(encoder):
        for pixels in batches_of_pixels:
            states = encoder(pixels.to(parameter.device, parameter.dtype), numbers)
            for layer, state in zip(parts, states, strict=True):
                features = probe_features(state, encoder.class_embedding is not None)
                for name, rows in features.items():
                    layer[name].append(rows.cpu())
    layers = []
    for layer in parts:
        layers.append({name: torch.cat(rows) for name, rows in layer.items()})
    return layers


def one_hot(values: list[str], names: list[str]) -> Tensor:
    """(R, C): 1 for the name of each value."""
    numbers = torch.tensor([names.index(value) for value in values])
    return F.one_hot(numbers, len(names)).float()


def probe_accuracies(
    features: Tensor, values: dict[str, list[str]], num_train: int
) -> dict[str, float]:
    """How often a ridge regression from features (R, F) to the values of a property, as one-hot
    vectors, is largest at the true one. It learns from the first num_train scenes and is tested on
    the others.

    values: property -> its value in each of the R scenes. All properties share one penalty.
    """
    names = {}
    targets = []
    for name, column in values.items():
        names[name] = sorted(set(column))
        targets.append(one_hot(column, names[name]))
    sizes = [target.shape[1] for target in targets]
    every_target = torch.cat(targets, dim=1)  # (R, C)
    result = ridge(features[:num_train], every_target[:num_train], features[num_train:])

    accuracies = {}
    for name, scores, target in zip(names, result.scores.split(sizes, 1), targets, strict=True):
        is_right = scores.argmax(1) == target[num_train:].argmax(1)
        accuracies[name] = is_right.double().mean().item()
    return accuracies


def probe_statistics(
    encoder: ViT,
    batches_of_pixels: Iterable[Tensor],
    values: dict[str, list[str]],
    num_train: int,
) -> dict[str, Any]:
    """What a linear probe reads off each hidden state of an encoder of pictures.

    "accuracy", {features: {property: a list over the hidden states, 0 before the first block}};
    "chance", {property: accuracy of a guess among its values}; "train", "test": how many scenes.
    """
    accuracy: dict[str, dict] = {}
    for layer in encode_scenes(encoder, batches_of_pixels):
        for name, features in layer.items():
            lists = accuracy.setdefault(name, {property_name: [] for property_name in values})
            for property_name, value in probe_accuracies(features, values, num_train).items():
                lists[property_name].append(value)
    num_scenes = len(next(iter(values.values())))
    return {
        "accuracy": accuracy,
        "chance": {name: 1 / len(set(column)) for name, column in values.items()},
        "train": num_train,
        "test": num_scenes - num_train,
    }
