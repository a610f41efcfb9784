"""llava_manager.py against the official LLaVA-OV-Manager code (golden numbers) and against
transformers on random weights; invariants of batching, generation and training; placeholders;
configs and errors."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers
from helpers import (
    LLAVA_TINY,
    LLAVA_VARIANTS,
    close,
    hf_configs,
    llava_golden_model,
    llava_image,
    llava_inputs,
    read_llava,
)
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import llava_manager
import multigrid
from chat import IMAGE_TOKEN
from llava_manager import LlavaManager, LlavaManagerConfig
from manager import StaticVisualManager
from multigrid import ImageTiles
from weights import from_official, to_official

# ---------------------------------------------------------------- the official code's numbers


def check_outputs(variant, case, out):
    golden, lengths = (
        read_llava(f"tiny/out_{variant}.safetensors"),
        read_llava("tiny/cases.json")["cases"][case]["valid_len"],
    )
    for row, length in enumerate(lengths):
        key = f"{case}/{{}}/{row}".format
        if key("final_hidden") in golden:
            at = golden[key("final_hidden_pos")].long()
            close(out.hidden_states[-1][row, at], golden[key("final_hidden")], 3e-4)
        if key("logits_last") in golden:
            close(out.logits[row, length - 2 : length], golden[key("logits_last")], 3e-4)
        if key("logits") in golden:
            close(out.logits[row, :length], golden[key("logits")], 3e-4)
        if key("logits_argmax") in golden:
            logits = out.logits[row, :length]
            best = logits.gather(1, golden[key("logits_argmax")].long()[:, None])[:, 0]
            close(best, logits.amax(1), 3e-4)
    for i, hidden in enumerate(out.hidden_states):
        if f"{case}/llm_hidden/{i}" in golden and i < len(out.hidden_states) - 1:
            close(hidden, golden[f"{case}/llm_hidden/{i}"], 3e-4)


def check_gradients(variant, case, model, loss):
    golden, stats = read_llava(f"tiny/out_{variant}.safetensors"), {}
    if (LLAVA_TINY / f"gradstats_{variant}.json").exists():
        stats = {
            k: v[case]
            for k, v in read_llava(f"tiny/gradstats_{variant}.json")["stats"].items()
            if case in v
        }
    expected = {
        k.partition("/grad/")[2]: v for k, v in golden.items() if k.startswith(f"{case}/grad/")
    }
    if not expected and not stats:
        return
    loss.backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    gradients = to_official(gradients, dataclasses.replace(model.config, merge="spatial_unpad"))
    for name, gradient in expected.items():
        close(gradients[name], gradient, 1e-3 * gradient.abs().max().item())
    for name, values in stats.items():
        if name == "lm_head.weight":
            continue
        assert (values is None) == (name not in gradients), name
        if values is not None:
            assert math.isclose(gradients[name].norm(), values[0], rel_tol=1e-3, abs_tol=1e-6), name


def check_generation(variant, case, model, images):
    info, golden = (
        read_llava(f"tiny/info_{variant}.json")["cases"][case],
        read_llava(f"tiny/out_{variant}.safetensors"),
    )
    if "gen_ids" not in info:
        return
    prompt, tokens = torch.tensor([info["gen_ids_in"]]), info["gen_ids"]
    assert model.generate(prompt, images=images, max_new_tokens=len(tokens))[0].tolist() == tokens
    if f"{case}/gen_scores" in golden:  # and without a cache
        logits = model(
            torch.cat([prompt, torch.tensor([tokens[:-1]])], dim=1), images=images
        ).logits[0, -len(tokens) :]
        close(logits, golden[f"{case}/gen_scores"], 3e-4)


@pytest.mark.parametrize("variant", LLAVA_VARIANTS)
def test_golden(variant):
    """Spliced embeddings, hidden states, logits, loss, gradients and greedy tokens of every case of
    every variant.
    """
    tensors, infos = (
        read_llava("tiny/features.safetensors"),
        read_llava(f"tiny/info_{variant}.json")["cases"],
    )
    compared = 0
    for case, description in read_llava("tiny/cases.json")["cases"].items():
        model = llava_golden_model(variant, case)
        inputs = llava_inputs(case, model.config)
        out = model(**inputs, hidden_states=True)
        if (
            "raises" in infos[case]
        ):  # grid type "grid" without a grid, or cut: here the lone tile is managed
            assert variant == "static_grid" and out.loss.isfinite()
            continue
        left = case.startswith(
            "c15"
        )  # the official code's left padding moves queries, and its loss sees padding
        if left and variant in ("adaptive_last_all", "adaptive_average_all", "adaptive_cross_all"):
            continue
        compared += 1
        check_outputs(variant, case, out)
        if not left:
            batch = llava_manager.expand_placeholders(config=model.config, **inputs)
            assert torch.equal(batch.labels, tensors[f"{case}/spliced_labels"].long())
            assert batch.mask.sum(1).tolist() == description["valid_len"]
            if f"{case}/inputs_embeds" in tensors:
                embeddings, _ = model.embed(batch, inputs["images"])
                close(embeddings, tensors[f"{case}/inputs_embeds"], 3e-4)
            assert abs(out.loss.item() - infos[case]["loss"]) < 2e-5
        check_gradients(variant, case, model, out.loss)
        check_generation(variant, case, model, inputs["images"])
    assert compared >= 4


def recorder(store, key):
    def hook(_module, _args, out):
        store[key] = out

    return hook


def test_what_each_manager_adds():
    compared = 0
    for variant in LLAVA_VARIANTS:
        golden = {
            k: v
            for k, v in read_llava(f"tiny/out_{variant}.safetensors").items()
            if "c01_a9_100x60/manager_out" in k
        }
        if not golden:
            continue
        model, added = llava_golden_model(variant, "c01_a9_100x60"), {}
        for k, manager in enumerate(model.managers):
            manager.register_forward_hook(recorder(added, k))
        inputs = llava_inputs("c01_a9_100x60", model.config)
        model(**inputs)  # the static managers are not called one by one
        batch = llava_manager.expand_placeholders(
            inputs["input_ids"], None, inputs["images"], model.config
        )
        _, experts = model.encode_images(inputs["images"])
        increments = model.plan_managers(batch, experts).increments
        for k, increment in enumerate(increments):
            added[k] = increment[None]
        for key, value in golden.items():
            close(added[int(key.split("/")[2])], value, 3e-4)
            compared += 1
    assert compared


def test_training_noise():
    compared, case = 0, "c09_square_100x60"
    for variant in LLAVA_VARIANTS:
        golden = read_llava(f"tiny/out_{variant}.safetensors")
        if f"train_jitter/{case}/final_hidden" not in golden:
            continue
        model = llava_golden_model(variant, case).train()
        for k, manager in enumerate(model.managers):
            u = golden[f"train_jitter/{case}/u/{k}"]
            manager.draw = lambda scores, u=u: u.reshape(scores.shape)
        out = model(**llava_inputs(case, model.config), hidden_states=True)
        close(out.hidden_states[-1], golden[f"train_jitter/{case}/final_hidden"], 3e-4)
        assert (
            abs(
                out.loss.item()
                - read_llava(f"tiny/info_{variant}.json")["cases"][f"train_jitter/{case}"]["loss"]
            )
            < 2e-5
        )
        compared += 1
    assert compared >= 2


def test_jitter_is_uniform_around_one():
    manager = StaticVisualManager(8, 3).train()
    torch.nn.init.ones_(manager.scores)
    weights = manager.weights(4000)  # another draw for every row of the batch
    assert 0.99 <= weights.min() < 0.9901 and 1.0099 < weights.max() <= 1.01
    assert abs(weights.var() - 0.02**2 / 12) < 1e-6
    assert torch.equal(manager.eval().weights(), torch.ones(1, 3, 1, 8))


def test_vision_tower():
    golden, model = (
        read_llava("tiny/vision_100x60.safetensors"),
        llava_golden_model("static_all", "c01_a9_100x60"),
    )
    pixels = multigrid.preprocess_image(llava_image("100x60"), model.config).pixels
    states = model.vision(pixels, range(6))
    for key, value in golden.items():
        if key.startswith("hidden_states/"):
            close(states[int(key.split("/")[1])], value, 3e-4)
    close(model.projector(states[5]), golden["projected_final"], 3e-4)
    if "projected_multi_layer_plus_layer_embedding" in golden:
        ours = model.projector(torch.stack(states[2:5], 1)) + model.layer_embedding[:, None]
        close(ours, golden["projected_multi_layer_plus_layer_embedding"], 3e-4)


# ---------------------------------------------------------------- transformers on random weights


def randomize(model):
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    return model.eval()


SIZES = {
    "vision_width": 32,
    "vision_heads": 2,
    "vision_mlp_width": 64,
    "vocab_size": 100,
    "hidden_size": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_width": 80,
    "num_layers": 3,
    "inject_layers": (0, 2),
}


def small(**overrides):
    return LlavaManagerConfig.tiny(**{**SIZES, "im_start_id": 98, "eos_ids": (), **overrides})


def random_tiles(size, config, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return multigrid.preprocess_image(Image.fromarray(pixels), config)


def test_parity_with_llava_onevision_of_transformers():
    text, vision = hf_configs()
    vision.num_hidden_layers = 3  # transformers' conversion drops the unused layer too
    pinpoints = [[32 * i, 32 * j] for i in range(1, 4) for j in range(1, 4)]
    theirs = randomize(
        transformers.LlavaOnevisionForConditionalGeneration(
            transformers.LlavaOnevisionConfig(
                vision_config=vision,
                text_config=text,
                image_token_index=99,
                image_grid_pinpoints=pinpoints,
                vision_feature_layer=-1,
                vision_aspect_ratio="anyres_max_2",
                vision_feature_select_strategy="full",
                tie_word_embeddings=True,
            )
        )
    )
    config = small(manager_type=None, aspect="anyres_max_2", grid_pinpoints=pinpoints)
    names = {
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.language_model.": "model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    }
    state = {}
    for key, value in theirs.state_dict().items():
        old = next((name for name in names if key.startswith(name)), "")
        if ".head." not in key:
            state[names.get(old, "") + key.removeprefix(old)] = value
    model = LlavaManager(config).eval()
    model.load_state_dict(from_official(state, config))
    for size in ((70, 40), (90, 85), (30, 96)):  # two of them shrunk to the budget
        image = random_tiles(size, config)
        n = multigrid.count_image_tokens(len(image.pixels), size, config)
        ours = model(torch.tensor([[1, 2, IMAGE_TOKEN, 4, 5]]), images=[image]).logits
        ids = torch.tensor([[1, 2, *[99] * n, 4, 5]])
        expected = theirs(
            input_ids=ids, pixel_values=image.pixels[None], image_sizes=torch.tensor([size[::-1]])
        ).logits
        close(ours, expected, 1e-4)


# ---------------------------------------------------------------- invariants


def busy_model(**overrides):
    """Random weights, managers included."""
    return randomize(LlavaManager(small(**overrides)))


def conversation_ids(text_before, text_after):
    """<|im_start|> is 98, user 3, newline 2, <|im_end|> 97."""
    return [98, 1, 2, 97, 2, 98, 3, 2, *text_before, IMAGE_TOKEN, 2, *text_after, 97, 2, 98, 4, 2]


def pad(rows, side="right"):
    length = max(map(len, rows))
    order = (lambda row, fill: row + fill) if side == "right" else (lambda row, fill: fill + row)
    ids = torch.tensor([order(row, [0] * (length - len(row))) for row in rows])
    return ids, torch.tensor([order([1] * len(row), [0] * (length - len(row))) for row in rows])


ROWS = [
    conversation_ids([], [10, 11, 12]),
    [98, 1, 2, 97, 2, 98, 3, 2, 20, 97, 2, 98, 4, 2],
    conversation_ids([5, 6, 2], [30]),
    conversation_ids([], [])[:-4],
]


ROW_SIZES = [[(64, 40)], [], [(30, 64)], [(50, 50)]]


@pytest.mark.parametrize(
    "kind", [None, "static", "adaptive", "adaptive_last", "adaptive_average", "adaptive_cross"]
)
def test_a_batch_is_its_rows(kind):
    """Rows of different length, padded on either side, with and without images, give what each
    gives alone; generation with a cache gives the tokens of full recomputation.
    """
    model = busy_model(manager_type=kind)
    images = [
        [random_tiles(size, model.config, i) for size in sizes] for i, sizes in enumerate(ROW_SIZES)
    ]
    flat = [image for row in images for image in row]
    alone = [
        model(torch.tensor([ids]), images=row).logits[0]
        for ids, row in zip(ROWS, images, strict=True)
    ]
    for side in ("right", "left"):
        logits = model(*pad(ROWS, side), flat).logits
        for row, expected in enumerate(alone):
            close(logits[row, : len(expected)], expected, 1e-4)
        tokens = model.generate(*pad(ROWS, side), flat, max_new_tokens=6)
        for row, ids in enumerate(ROWS):
            single = model.generate(torch.tensor([ids]), images=images[row], max_new_tokens=6)[0]
            assert torch.equal(tokens[row], single)
    # without a third <|im_start|> the text query ends with the row, so it grows with the answer,
    # officially too
    for row, ids in enumerate(ROWS[:-1] if "_" in str(kind) else ROWS):
        for step in range(6):
            extended = torch.tensor([ids + tokens[row, :step].tolist()])
            assert model(extended, images=images[row]).logits[0, -1].argmax() == tokens[row, step]


def test_generation_stops_at_eos():
    model = busy_model()
    ids, mask = pad([[1, 2, 3], [4, 5, 6, 7]])
    free = model.generate(ids, mask, max_new_tokens=12)
    assert free.shape == (2, 12)
    stop = int(free[0, 3])
    model.config.eos_ids = (96, stop)
    stopped = model.generate(ids, mask, max_new_tokens=12)
    for row, tokens in enumerate(free.tolist()):
        end = tokens.index(stop) + 1 if stop in tokens else 12
        assert stopped[row, :end].tolist() == tokens[:end] and set(stopped[row, end:].tolist()) <= {
            96
        }
    only = model.generate(ids[:1, :3], max_new_tokens=12)
    assert only[0].tolist() == free[0].tolist()[: free[0].tolist().index(stop) + 1]


def test_the_block_of_the_cache_changes_no_bit(monkeypatch):
    """Hidden states of every step, with a block of one position and with one that holds all."""
    model = busy_model(manager_type="adaptive_cross")
    images = [random_tiles(size, model.config, 1) for sizes in ROW_SIZES for size in sizes]
    results = []
    for block in (1, 7, 4096):
        monkeypatch.setattr(llava_manager, "CACHE_BLOCK", block)
        states = []
        hook = model.llm.register_forward_hook(lambda _m, _a, out, kept=states: kept.append(out))
        tokens = model.generate(*pad(ROWS), images, max_new_tokens=20)
        hook.remove()
        results.append([tokens, *states])
    for other in results[1:]:
        assert len(other) == 21
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_cache_has_no_room_for_an_answer_that_is_not_there_yet():
    cache = llava_manager.KVCache(torch.arange(5)[None])
    k = torch.randn(1, 2, 5, 4)
    cache.append(0, k, k)
    block = llava_manager.CACHE_BLOCK
    assert cache.keys[0].shape == cache.values[0].shape == (1, 2, block, 4)
    for position in range(5, block + 1):
        cache.advance(torch.tensor([[position]]))
        keys, _ = cache.append(0, k[:, :, :1], k[:, :, :1])
    assert cache.keys[0].shape[2] == 2 * block and keys.shape[2] == block + 1
    assert torch.equal(keys[:, :, :5], k)


def test_tokens_are_seen_while_they_are_generated():
    """The model has not gone further than the token that is taken."""
    model = busy_model()
    ids, mask = pad([[1, 2, 3], [4, 5, 6, 7]])
    expected = model.generate(ids, mask, max_new_tokens=6)
    calls = []
    model.llm.register_forward_hook(lambda _module, _arguments, _out: calls.append(1))
    for step, token in enumerate(model.generate_steps(ids, mask, max_new_tokens=6)):
        assert torch.equal(token, expected[:, step]) and not token.requires_grad
        assert len(calls) == step + 1
        assert torch.is_grad_enabled()
    assert len(calls) == 6


def test_a_row_ends_where_its_stop_rule_says():
    model = busy_model()
    ids, mask = pad([[1, 2, 3], [4, 5, 6, 7]])
    free = model.generate(ids, mask, max_new_tokens=9).tolist()
    last = free[0][2]
    ends = [row.index(last) + 1 if last in row else 9 for row in free]
    found = model.generate(ids, mask, max_new_tokens=9, stop=lambda new: new[-1] == last).tolist()
    for row, expected, end in zip(found, free, ends, strict=True):
        assert row[:end] == expected[:end] and set(row[end:]) <= {0}
    assert len(found[0]) == max(ends)


def test_sampling():
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    generator = torch.Generator().manual_seed(0)

    def frequencies(temperature, top_p):
        logits = probabilities.log().expand(20000, -1)
        return (
            llava_manager.sample(logits, temperature, top_p, generator).bincount(minlength=4)
            / 20000
        )

    close(frequencies(1.0, 1.0), probabilities[0], 0.015)
    close(frequencies(1.0, 0.75), torch.tensor([0.625, 0.375, 0, 0]), 0.015)
    close(frequencies(0.5, 1.0), (probabilities**2 / (probabilities**2).sum())[0], 0.015)
    assert frequencies(1.0, 0.4)[0] == frequencies(0, 1.0)[0] == 1
    model = busy_model()
    greedy = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5)
    assert torch.equal(
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, temperature=1.0, top_p=1e-6),
        greedy,
    )


@pytest.mark.parametrize(
    "kind", ["static", "adaptive", "adaptive_last", "adaptive_average", "adaptive_cross"]
)
def test_untrained_managers_change_nothing(kind):
    """Zero initialisation: the same logits as without managers, but a gradient reaches every
    manager.
    """
    torch.manual_seed(0)
    model = LlavaManager(small(manager_type=kind)).eval()
    plain = LlavaManager(small(manager_type=None)).eval()
    theirs = {
        k: v
        for k, v in model.state_dict().items()
        if not k.startswith(("managers.", "layer_embedding"))
    }
    plain.load_state_dict(theirs)
    ids, images = torch.tensor(ROWS[:1]), [random_tiles((64, 40), model.config)]
    assert torch.equal(model(ids, images=images).logits, plain(ids, images=images).logits)
    model(ids, images=images, labels=ids).loss.backward()
    for name, p in model.managers.named_parameters():
        if name.endswith(("scores", "gate")):
            assert p.grad.abs().max() > 0, name


def test_initialisation():
    torch.manual_seed(0)
    model = LlavaManager(
        LlavaManagerConfig.tiny(manager_type="adaptive_cross", hidden_size=256, num_heads=4)
    )
    manager = model.managers[1]
    for p, std in (
        (manager.controller.weight, 0.02),
        (manager.q_proj.weight, 0.02),
        (manager.k_proj.weight, 0.02),
        (model.layer_embedding, 1 / 16),
        (model.image_newline, 1 / 16),
        (model.llm.embed.weight, 0.02),
        (model.projector[2].weight, 1 / 16 / 3**0.5),
    ):
        assert abs(p.std() / std - 1) < 0.15
    for p in (model.managers[0].scores, manager.gate, manager.q_proj.bias, manager.k_proj.bias):
        assert torch.count_nonzero(p) == 0
    assert model.managers[0].scores.shape == (1, 256) and manager.gate.shape == (2, 256)


def labelled(rows):
    ids, mask = pad(rows)
    labels = torch.where(
        (mask == 1) & (ids != IMAGE_TOKEN) & (torch.arange(ids.shape[1]) > 4), ids, -100
    )
    return ids, mask, labels


def test_loss_of_parts_adds_up():
    """The sum over micro-batches is that of the batch; num_tokens is known beforehand; no logits
    are needed for it.
    """
    model = busy_model()
    ids, mask, labels = labelled(ROWS)
    images = [random_tiles(size, model.config) for sizes in ROW_SIZES for size in sizes]
    out = model(ids, mask, images, labels)
    assert int(out.num_tokens) == model.count_labels(ids, mask, images, labels)
    spliced = llava_manager.expand_placeholders(ids, mask, images, model.config, labels).labels
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), spliced[:, 1:].flatten()
    )
    close(out.loss, expected, 1e-5)
    parts = [
        model(ids[:2], mask[:2], images[:1], labels[:2], logits=False),
        model(ids[2:], mask[2:], images[1:], labels[2:]),
    ]
    assert parts[0].logits is None
    close(sum(p.loss * p.num_tokens for p in parts) / out.num_tokens, out.loss, 1e-5)
    hidden = torch.randn(*spliced.shape, 48)
    close(model.loss_sum(hidden, spliced, chunk=3)[0], model.loss_sum(hidden, spliced)[0], 1e-3)
    empty = model(ids, mask, images, torch.full_like(ids, -100))
    assert empty.loss == 0 and empty.num_tokens == 0
    empty.loss.backward()


def gradients(model, *inputs):
    model.zero_grad(set_to_none=True)
    model(*inputs, logits=False).loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_gives_the_same_gradients():
    for kind in ("static", "adaptive_cross"):
        model = busy_model(manager_type=kind)
        ids, mask, labels = labelled(ROWS[:1])
        images = [random_tiles((64, 40), model.config)]
        plain = gradients(model, ids, mask, images, labels)
        model.set_checkpointing(True)
        recomputed = gradients(model, ids, mask, images, labels)
        assert plain.keys() == recomputed.keys()
        for name in plain:
            close(recomputed[name], plain[name], 1e-5 * max(1, plain[name].abs().max().item()))


@pytest.mark.parametrize("kind", [None, "static", "adaptive_cross"])
def test_bf16(kind):
    """Autocast, and a model in bf16, are near float32."""
    model = busy_model(manager_type=kind)
    ids, mask, labels = labelled(ROWS)
    images = [random_tiles(size, model.config) for sizes in ROW_SIZES for size in sizes]
    exact = model(ids, mask, images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids, mask, images, labels)
        mixed.loss.backward()
        assert model.generate(ids, mask, images, max_new_tokens=3).shape == (4, 3)
    low = model.bfloat16()(ids, mask, images, labels)
    for out, tolerance in ((mixed, 0.03), (low, 0.06)):
        assert out.logits.dtype == torch.bfloat16
        assert (out.logits - exact.logits).norm() < tolerance * exact.logits.norm()


def test_every_parameter_takes_part_in_every_training_step():
    """DDP waits for all of them: also in a batch of text, and where there is no grid. Frozen ones
    stay so.
    """
    model = busy_model(manager_type="adaptive_last").train()
    ids, mask, labels = labelled(ROWS)
    trainable = {k for k, p in model.named_parameters() if p.requires_grad}
    assert not any("ln_post" in name for name in trainable)
    tiles = ImageTiles(torch.randn(1, 3, 32, 32), (40, 40))
    assert gradients(model, ids[1:2], mask[1:2], [], labels[1:2]).keys() == trainable
    assert gradients(model, ids[:1], mask[:1], [tiles], labels[:1]).keys() == trainable
    model.eval()
    text = gradients(model, ids[1:2], mask[1:2], [], labels[1:2])
    assert all(name.startswith("llm.") for name in text)


@pytest.mark.parametrize("kind", ["static", "adaptive", "adaptive_cross"])
@pytest.mark.parametrize("grids", ["all", "base", "grids"])
def test_truncation(kind, grids):
    """A cut sequence is the beginning of the whole one, also inside an image, or before one that is
    wholly lost.
    """
    model = busy_model(manager_type=kind, managed_grids=grids)
    ids = torch.tensor([[98, 1, 2, 97, 2, 98, 3, 2, 5, 6, 2, IMAGE_TOKEN, 7, IMAGE_TOKEN, 97, 2]])
    images = [random_tiles((64, 40), model.config, seed) for seed in (0, 1)]
    whole = model(ids, images=images).logits
    n = multigrid.count_image_tokens(len(images[0].pixels), (64, 40), model.config)
    for length in (4, 11, 20, 11 + n, 11 + n + 20):
        model.config.max_length = length
        cut = model(ids, images=images, labels=ids.clamp(min=-100)).logits
        assert cut.shape[1] == length
        if kind != "adaptive_cross" or length <= 11:  # there the query is what follows the images
            close(cut, whole[:, :length], 1e-4)
        assert cut.isfinite().all()
    with pytest.raises(ValueError, match="more than max_length"):
        model.generate(ids, images=images)


def test_managed_grids():
    """What the managers touch: base + grids = all, as the increments of static managers do not
    depend on the LLM.
    """
    model = busy_model(inject_layers=(0,), managed_layers=(0, 1, 2))
    ids, images = torch.tensor(ROWS[:1]), [random_tiles((64, 40), model.config)]
    start, n = ROWS[0].index(IMAGE_TOKEN), 16
    total = multigrid.count_image_tokens(len(images[0].pixels), (64, 40), model.config)
    batch = llava_manager.expand_placeholders(ids, None, images, model.config)
    inputs, _ = model.embed(batch, images)
    touched = {}
    for grids in ("all", "base", "grids"):
        model.config.managed_grids = grids
        state = model(ids, images=images, hidden_states=True).hidden_states[0]
        touched[grids] = ((state - inputs).abs().amax(-1) > 0)[0].nonzero()[:, 0].tolist()
    assert touched["all"] == list(range(start, start + total))
    assert touched["base"] == touched["all"][:n] and touched["grids"] == touched["all"][n:]


# ---------------------------------------------------------------- configs, costs and errors


def test_config_from_official():
    published = {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "eos_token_id": 151645,
        "tie_word_embeddings": True,
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": "(1x1),...,(6x6)",
        "mm_patch_merge_type": "spatial_unpad",
        "tokenizer_model_max_length": 16384,
        "mm_vision_select_layer": -2,
        "mm_manager_type": "static_zerouni",
        "mm_manager_grid_type": "all",
        "mm_manager_vision_select_layers_start": 13,
        "mm_manager_vision_select_layers_end": 26,
        "mm_manager_vision_select_layers_interval": 1,
        "something_else": 1,
        "mm_manager_injection_start": 0,
        "mm_manager_injection_end": 24,
        "mm_manager_injection_interval": 4,
    }
    assert LlavaManagerConfig.from_official(published) == LlavaManagerConfig.base()
    plain = {k: v for k, v in published.items() if "manager" not in k and k != "eos_token_id"}
    assert LlavaManagerConfig.from_official(plain) == LlavaManagerConfig.base(
        manager_type=None, eos_ids=()
    )
    assert LlavaManagerConfig.base().grid_pinpoints[:7] == (
        *((384, 384 * i) for i in range(1, 7)),
        (768, 384),
    )
    for change, message in (
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"mm_manager_type": "other"}, "manager_type is"),
        ({"mm_projector_type": "linear"}, "mlp2x_gelu"),
        ({"image_aspect_ratio": "highres"}, "aspect is"),
        ({"mm_manager_injection_end": 30}, "inject_layers is"),
        ({"image_grid_pinpoints": "3x3"}, "like"),
        ({"image_grid_pinpoints": [[384, 400]]}, "multiples"),
        ({"num_attention_heads": 13}, "multiple of"),
    ):
        with pytest.raises(ValueError, match=message):
            LlavaManagerConfig.from_official({**published, **change})
    for missing in ("rope_theta", "hidden_size"):
        broken = {k: v for k, v in published.items() if k != missing}
        with pytest.raises(ValueError, match=f"lacks {missing}"):
            LlavaManagerConfig.from_official(broken)
    with pytest.raises(ValueError, match="at least two"):
        LlavaManagerConfig.base(managed_layers=(25,))


@pytest.mark.slow
def test_managers_cost_at_most_four_percent():
    """The paper's figure, in FLOPs of the full model on one picture of 1024 x 768, counted on the
    meta device.
    """
    flops = {}
    for kind in (None, "static", "adaptive_cross"):
        config = LlavaManagerConfig.base(manager_type=kind)
        with torch.device("meta"):
            model = LlavaManager(config).eval()
        image = ImageTiles(torch.empty(7, 3, 384, 384, device="meta"), (1024, 768))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.tensor([[1, 2, IMAGE_TOKEN, *[5] * 60]]), images=[image], logits=False)
        flops[kind] = counter.get_total_flops()
    assert flops[None] > 5e12
    for kind in ("static", "adaptive_cross"):
        assert 1 < flops[kind] / flops[None] < 1.04


def test_bad_inputs():
    model = busy_model()
    image = random_tiles((64, 40), model.config)
    ids = torch.tensor(ROWS[:1])
    two_tiles = image._replace(pixels=image.pixels[:3])
    narrow = image._replace(pixels=torch.zeros(1, 3, 30, 32))
    for arguments, message in (
        ((ids, None, []), "1 placeholders .* but 0 images"),
        ((ids, None, [image] * 2), "but 2 images"),
        ((torch.tensor([[100]]),), "token id 100"),
        ((torch.tensor([[-7]]),), "token id -7"),
        ((ids[0],), r"not \(B, L\)"),
        ((ids, torch.zeros_like(ids)), "empty row"),
        ((ids, None, [two_tiles]), "2 tiles, but an image of 64 x 40 has a grid of 2 x 2"),
        ((ids, None, [narrow]), r"\(1, 3, 30, 32\); should be \(T, 3, 32, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    for bad in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            model.generate(torch.tensor([[1]]), **bad)


# ---------------------------------------------------------------- placeholders
def test_a_placeholder_becomes_the_tokens_of_its_image():
    """Ids, labels, images and places of a batch that is padded on the left and cut in an image."""
    config = small(aspect="square", merge="flat", max_length=22)
    images = [random_tiles((32, 32), config, seed) for seed in (0, 1)]
    ids = torch.tensor([[0, 0, 5, IMAGE_TOKEN, 6], [7, IMAGE_TOKEN, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = llava_manager.expand_placeholders(ids, mask, images, config, labels=ids)
    tokens = [IMAGE_TOKEN] * 16
    assert batch.ids.tolist() == [[5, *tokens, 6, 0, 0], [7, *tokens, 8, 9, 10]]
    assert batch.labels.tolist() == [
        [5, *[-100] * 16, 6, -100, -100],
        [7, *[-100] * 16, 8, 9, 10],
    ]
    assert batch.mask.sum(1).tolist() == batch.lengths.tolist() == [18, 20]
    assert batch.image.tolist() == [[-1, *[0] * 16, -1, -1, -1], [-1, *[1] * 16, -1, -1, -1]]
    assert batch.place[0].tolist() == [0, *range(16), 0, 0, 0]
    assert batch.images_per_row == [1, 1]
    assert batch.counts.tolist() == [16, 16]
    config.max_length = 10
    cut = llava_manager.expand_placeholders(ids, mask, images, config)
    assert cut.ids.tolist() == [[5, *tokens[:9]], [7, *tokens[:9]]]
    assert cut.labels is None
    assert cut.lengths.tolist() == [18, 20]


@pytest.mark.parametrize(
    ("ids", "query"),
    [
        (conversation_ids([5, 6, 2], [30, 31]), [5, 6, 30, 31]),
        (conversation_ids([], [10, 11]), [10, 11]),
        (conversation_ids([], []), []),
        (conversation_ids([5, 2], [10])[:-3], [5, 10]),  # no third <|im_start|>
        ([98, 1, 2, 97, 2, 98, 3, 2, IMAGE_TOKEN, 2, 9, IMAGE_TOKEN, 2, 10, 97, 2, 98, 4, 2], [10]),
        ([IMAGE_TOKEN, 5, 6, 2], [5, 6]),  # plain
        ([98, 3, 2, 5, 97, 2, 98, 4, 2], []),  # no image
    ],
)
def test_the_text_query_is_the_text_of_the_users_first_turn(ids, query):
    config = small(aspect="square", merge="flat", manager_type="adaptive_last")
    images = [random_tiles((32, 32), config)] * ids.count(IMAGE_TOKEN)
    batch = llava_manager.expand_placeholders(torch.tensor([ids]), None, images, config)
    assert batch.ids[batch.is_query].tolist() == query


def test_without_a_text_query_an_image_is_its_own():
    """Managed tokens read the text of their row, or else the tokens of their own image only."""
    config = small(aspect="square", merge="flat", manager_type="adaptive_cross")
    images = [random_tiles((32, 32), config, seed) for seed in range(3)]
    ids, mask = pad([[IMAGE_TOKEN, 5, 6, 2], [IMAGE_TOKEN, 9, IMAGE_TOKEN]])
    batch = llava_manager.expand_placeholders(ids, mask, images, config)
    managed = llava_manager.find_managed(batch, config)
    blocks = llava_manager.find_blocks(batch, managed, config)
    length = batch.ids.shape[1]
    # the first row reads its text, the two images of the second read themselves
    assert blocks.tokens.tolist() == [list(range(16 * i, 16 * i + 16)) for i in range(3)]
    assert blocks.slots.tolist() == list(range(48))
    own = [range(length, length + 16), range(length + 17, length + 33)]
    assert blocks.query.tolist() == [[16, 17, *[0] * 14], *map(list, own)]
    assert blocks.query_mask[:, 0].sum(1).tolist() == [2, 16, 16]


@pytest.mark.parametrize("grids", ["all", "base", "grids"])
def test_blocks_of_different_size_are_padded(grids):
    """Every managed token is in one block, and reads all of its row's query and nothing else."""
    config = small(manager_type="adaptive_average", managed_grids=grids)
    ids, mask = pad(ROWS)
    images = [random_tiles(size, config) for sizes in ROW_SIZES for size in sizes]
    batch = llava_manager.expand_placeholders(ids, mask, images, config)
    managed = llava_manager.find_managed(batch, config)
    blocks = llava_manager.find_blocks(batch, managed, config)
    assert blocks.tokens.flatten()[blocks.slots].tolist() == list(range(int(managed.sum())))
    length = batch.ids.shape[1]
    positions = managed.flatten().nonzero()[:, 0]
    block_of_token = blocks.slots // blocks.tokens.shape[1]
    for number in range(len(blocks.tokens)):
        (row,) = set((positions[block_of_token == number] // length).tolist())
        read = blocks.query[number][blocks.query_mask[number, 0]] - row * length
        text = batch.is_query[row].nonzero()[:, 0].tolist()
        assert read.tolist() == (text or managed[row].nonzero()[:, 0].tolist())


def test_the_plan_does_not_grow_with_the_square_of_the_batch():
    """Twice the rows, twice the numbers: no token has a mask over the text of other rows."""
    config = small(manager_type="adaptive_cross")
    elements = []
    for num_rows in (8, 16):
        ids = torch.tensor(ROWS[:1] * num_rows)
        images = [random_tiles((64, 40), config)] * num_rows
        batch = llava_manager.expand_placeholders(ids, None, images, config)
        managed = llava_manager.find_managed(batch, config)
        blocks = llava_manager.find_blocks(batch, managed, config)
        elements.append(sum(part.numel() for part in blocks))
    assert elements[1] == 2 * elements[0]


@pytest.mark.parametrize("max_length", [1, 9, 20, 25, 40, 200])
def test_tokens_are_counted_without_making_the_batch(max_length):
    """Labels, lengths and lost image tokens, as in the batch itself, padded on either side."""
    config = small(max_length=max_length)
    images = [random_tiles(size, config) for sizes in ROW_SIZES for size in sizes]
    for side in ("left", "right"):
        ids, mask = pad(ROWS, side)
        batch = llava_manager.expand_placeholders(ids, mask, images, config, ids)
        counts = llava_manager.count_tokens(ids, mask, images, config, ids)
        assert counts.labels.tolist() == (batch.labels[:, 1:] != -100).sum(1).tolist()
        assert counts.lengths.tolist() == batch.lengths.tolist()
        left = (batch.image >= 0).sum(1)
        whole = torch.zeros_like(left)
        row_of_image = torch.arange(len(ROWS)).repeat_interleave(torch.tensor(batch.images_per_row))
        whole.index_add_(0, row_of_image, batch.counts)
        assert counts.lost.tolist() == (whole - left).tolist()


def test_another_vision_side_takes_the_place_of_encode_images():
    """It may be any function of the images, with or without experts."""
    model = busy_model(manager_type=None)
    ids = torch.tensor(ROWS[:1])
    images = [random_tiles((64, 40), model.config)]
    tokens, experts = model.encode_images(images)
    assert experts == llava_manager.Experts()
    expected = model(ids, images=images).logits
    model.encode_images = lambda images, images_per_row=None: (2 * tokens, experts)
    doubled = model(ids, images=images).logits
    assert not torch.equal(doubled, expected)
    batch = llava_manager.expand_placeholders(ids, None, images, model.config)
    embeddings, _ = model.embed(batch, images)
    assert torch.equal(embeddings[batch.ids == IMAGE_TOKEN], 2 * tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 60, "num_heads": 4}, "heads of 15; .* even"),
        ({"num_heads": 0}, "num_heads is 0; it must be a whole number from 1 on"),
        ({"num_kv_heads": -2}, "num_kv_heads is -2"),
        ({"vision_heads": 0}, "vision_heads is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"patch_size": 128}, "patch_size 128 is larger than image_size 32"),
        ({"vision_width": "96"}, "vision_width is '96'"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"managed_layers": None}, "managed_layers is None; it must be a list"),
        ({"managed_layers": [1, "2"]}, "managed_layers is '2'"),
        ({"grid_pinpoints": "(1x1),...,(9999x9999)"}, "99980001 sizes; there may be 4096"),
    ],
)
def test_impossible_configs_are_refused_in_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        small(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_manager_injection_end": "x"}, "mm_manager_injection_end is 'x'; it must be a whole"),
        ({"mm_manager_injection_interval": 0}, "mm_manager_injection_interval is 0"),
        ({"mm_manager_grid_type": ["x"]}, "managed_grids is"),
        ({"eos_token_id": "x"}, "eos_ids is"),
        ({"hidden_size": "x"}, "hidden_size is 'x'"),
        ({"tie_word_embeddings": "true"}, "tie_embeddings is 'true'.*in the file .* tie_word_emb"),
        ({"num_attention_heads": 0}, "num_heads is 0; .*in the file it is num_attention_heads"),
        ({"use_sliding_window": True}, "use_sliding_window is True; only False"),
        ({"layer_types": ["sliding_attention"]}, "layer_types is .'sliding_attention'."),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"attention_bias": False}, "attention_bias is False; only True"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer is -1; only -2"),
        ({"model_type": "llava_llama"}, "model_type is 'llava_llama'; the LLM must be a qwen2"),
        ({"model_type": 5}, "model_type is 5"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling is .* only its default"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}}, "rope_parameters is"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "several values of rope_theta: .1000000.0, 5.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters is"),
        ({"rope_parameters": "x"}, "rope_parameters is 'x'; it must be an object"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"num_hidden_layers": 10**6}, "num_layers is 1000000; .* to 1000"),
        ({"tiny_vision_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'; only 'gelu_py"),
        ({"tiny_vision_config": {"vision_config": 3}}, "vision config is 3; it must be an object"),
    ],
)
def test_broken_official_configs_are_refused(change, message):
    official = read_llava("tiny/config_static_all.json")
    with pytest.raises(ValueError, match=message):
        changed = {**official, **change}
        LlavaManagerConfig.from_official(changed, changed["tiny_vision_config"])


def test_configs_of_other_versions_of_transformers_are_read():
    official = read_llava("tiny/config_static_all.json")
    vision = official["tiny_vision_config"]
    expected = LlavaManagerConfig.from_official(official, vision)
    without_theta = {key: value for key, value in official.items() if key != "rope_theta"}
    for change in (
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_scaling": {"rope_theta": 1e6, "type": "default"}},
        {"rope_theta": 1e6, "rope_scaling": None, "rope_parameters": None},
        {"rope_theta": 1e6, "layer_types": ["full_attention"] * 6, "sliding_window": None},
    ):
        assert LlavaManagerConfig.from_official({**without_theta, **change}, vision) == expected
    # a whole SigLIP, and one that leaves out what SiglipVisionConfig says without it
    assert LlavaManagerConfig.from_official(official, {"vision_config": vision}) == expected
    base = LlavaManagerConfig.from_official(
        {**official, "image_grid_pinpoints": None}, {"vision_config": {"model_type": "siglip"}}
    )
    assert (base.image_size, base.patch_size, base.vision_width, base.vision_heads) == (
        224,
        16,
        768,
        12,
    )


def test_labels_of_another_shape_are_refused():
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"labels \(1, 2\) must be like input_ids \(1, 3\)"):
        busy_model()(ids, labels=ids[:, :2])


def test_flags_of_managers_mean_nothing_without_managers():
    with pytest.raises(ValueError, match="--managed_layers means nothing with --manager_type none"):
        LlavaManagerConfig.check_flags({"manager_type": None, "managed_layers": (1,)})
    LlavaManagerConfig.check_flags({"managed_layers": (1,)})
