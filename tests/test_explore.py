"""explore.py: the numbers on a page are those of the managers and of the layers; texts of the user
are only text; and a browser shows these numbers.
"""

import base64
import json
import re

import browser
import numpy as np
import pytest
import torch
from helpers import TINY_MLLM, close, save_tiny_mllms, save_tiny_towers
from PIL import Image

import analysis
import chat
import explore
import figures
from images import load_image
from llava_manager import LlavaManager, LlavaManagerConfig
from multigrid import merge_grids, preprocess_image
from weights import load_mllm, load_two_tower

TEXT = "is there a red </script><b>circle</b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random tiny towers, random tiny MLLMs in mllm/, and a picture."""
    root = save_tiny_towers(tmp_path_factory.mktemp("towers"))
    (root / "mllm").mkdir()
    save_tiny_mllms(root / "mllm")
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(root / "a.png")
    return root


def write_page(folder, checkpoint, text=TEXT):
    """(the file, what explore returns)"""
    out = folder / f"{checkpoint.replace('/', '_')}.html"
    flags = (str(folder / checkpoint), str(folder / "a.png"), text, str(out))
    return out, figures.explore(figures.ExploreOptions(*flags))


def read_numbers(page):
    """The JSON of a page, as a browser finds it: up to the first end of a script."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="numbers">(.*?)</script', text, re.DOTALL).group(1))


def unpack(packed):
    """A matrix of the page as the comment in page.html describes it."""
    content = base64.b64decode(packed["data"])
    if packed["type"] == "float16":
        return torch.from_numpy(np.frombuffer(content, "<f2").astype("f4")).view(packed["shape"])
    values = torch.from_numpy(np.frombuffer(content, np.uint8).astype("f4")).view(packed["shape"])
    scales = np.frombuffer(base64.b64decode(packed["scales"]), "<f2").astype("f4")
    return values / 255 * torch.from_numpy(scales)[:, None]


def tower_weights(folder, inside):
    """(modality, layer) -> (N, L), by the watcher of `figures.py managers`."""
    model, tokenizer, transform = load_two_tower(folder / "vqa", "")
    ids, mask = tokenizer([TEXT], model.config.max_text_len)
    watcher = analysis.ManagerWatcher(model)
    with torch.no_grad(), analysis.watching(watcher.modules, watcher.read):
        model.eval()(transform(load_image(folder / "a.png"), None)[None], ids, mask)
    return {key: parts.weights[0] for key, parts in watcher.parts.items()}, int(mask.sum())


# ---------------------------------------------------------------- ManagerTower
def test_a_page_has_the_weights_of_the_managers(folder):
    page, inside = write_page(folder, "vqa")
    expected, num_text = tower_weights(folder, inside)
    numbers = read_numbers(page)
    assert len(numbers["layers"]) == 3 and len(numbers["tokens"]) == num_text
    for i, layer in enumerate(numbers["layers"]):
        for modality in ("text", "image"):
            shown = unpack(layer["managers"][modality]["weights"])
            weights = expected[modality, i]
            if modality == "text":
                weights = weights[:, :num_text]
            else:  # the class token is the last unit
                weights = weights.roll(-1, 1)
            close(shown.expand_as(weights), weights, 5e-4)
            close(shown.sum(0), torch.ones(shown.shape[1]), 2e-3)
    # before the first layer all tokens share the weights, behind it each has its own
    shapes = [layer["managers"]["image"]["weights"]["shape"][1] for layer in numbers["layers"]]
    assert shapes == [1, 17, 17]


def test_attention_of_cross_modal_layers_is_what_the_layers_do(folder):
    """The map, applied to the values, is what the layer's own kernel hands to its projection."""
    model, _, _ = load_two_tower(folder / "vqa", "")
    layer = model.eval().image_layers[0]
    torch.manual_seed(0)
    x, other = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None]
    own_mask = torch.tensor([[1] * 7, [1] * 6 + [0]]).bool()[:, None, None]
    read = []
    layer.cross_proj.register_forward_hook(lambda _module, args, _out: read.append(args[0]))
    with torch.no_grad():
        layer(x, own_mask, other, mask)
        heads = analysis.heads_of_cross_modal(layer, x, own_mask, other)
        attended = analysis.attention_map(heads.q, heads.k, mask) @ heads.v
    close(attended.transpose(1, 2).flatten(2), read[0], 1e-5)


def test_attention_sums_to_one_over_the_other_modality(folder):
    _, inside = write_page(folder, "vqa")
    for layer in inside.layers:
        assert layer.text_to_image.shape == (len(inside.tokens), 17)
        close(layer.text_to_image.sum(1), torch.ones(len(inside.tokens)), 1e-5)
        close(layer.image_to_text.sum(1), torch.ones(17), 1e-5)


def test_bytes_are_as_near_as_they_can_be():
    values = torch.rand(5, 40) ** 3
    values[2] = 0
    found = unpack(explore.pack_bytes(values))
    assert ((found - values).abs().amax(1) <= values.amax(1) / 255).all()


# ---------------------------------------------------------------- LLaVA-OV-Manager
@pytest.mark.parametrize("kind", ["static", "adaptive_last"])
def test_a_page_has_the_weights_of_visual_managers(folder, kind):
    page, inside = write_page(folder, f"mllm/{kind}", "is there a red circle?")
    model, tokenizer, _ = load_mllm(folder / "mllm" / kind)
    tiles = preprocess_image(Image.open(folder / "a.png"), model.config)
    ids = chat.encode_prompt(["is there a red circle?"], tokenizer, 1)
    found = {}

    def read(key, manager, args, kwargs, output):
        found[key] = manager.weights(*args[1:], **kwargs)[0]

    watched = {k: manager for k, manager in enumerate(model.managers) if kind != "static" and k > 0}
    with torch.no_grad(), analysis.watching(watched, read):
        model(torch.tensor([ids]), images=[tiles])
    assert len(found) == (kind != "static")  # the manager before layer 0 is static
    for k, layer in enumerate(read_numbers(page)["layers"]):
        weights = found[k] if k in found else model.managers[k].weights()[0]
        manager = layer["managers"]["image"]
        assert manager["experts"] == list(model.config.managed_layers)[: len(weights)]
        units = explore.number_units(inside, inside.layers[0].text_to_image.shape[1])
        for what, values in (("weights", weights), ("magnitudes", weights.abs())):
            means = explore.gather_units(values.mean(-1).detach(), units, True)
            close(unpack(manager[what]), means, 2e-3)
    assert inside.tokens[0] == "<|im_start|>" and "picture" not in inside.tokens


def test_attention_of_the_llm_is_causal(folder):
    """The text before the picture does not see it; the picture sees only that text."""
    _, inside = write_page(folder, "mllm/static", "is there a red circle?")
    place = inside.picture_place
    for layer in inside.layers:
        assert (layer.text_to_image[:place] == 0).all()
        assert (layer.image_to_text[:, place:] == 0).all()
        shares = layer.text_to_image[place:].sum(1)
        assert (shares > 0).all() and (shares < 1).all()
        # the first image token sees the text before it, and itself
        assert 0 < layer.image_to_text[0].sum() < 1


@pytest.mark.parametrize("merge", ["flat", "spatial_unpad"])
@pytest.mark.parametrize("size", [(90, 30), (30, 90), (50, 50)])
def test_a_patch_of_a_view_is_the_token_of_its_place(merge, size):
    """The places on the canvas of tiles go through merge_grids, as features do."""
    pinpoints = ((16, 32), (32, 16), (32, 32), (48, 16), (16, 48))
    settings = {**TINY_MLLM, "aspect": "anyres", "grid_pinpoints": pinpoints, "merge": merge}
    config = LlavaManagerConfig.tiny(**settings)
    picture = Image.new("RGB", size)
    tiles = preprocess_image(picture, config)
    side = config.side
    (columns, rows), keep, _ = explore.grid_geometry(size, config)
    canvas = torch.cartesian_prod(torch.arange(rows * side), torch.arange(columns * side))
    canvas = canvas.view(rows, side, columns, side, 2).transpose(1, 2)
    grid = canvas.reshape(rows * columns, side * side, 2).float()
    base = torch.full((1, side * side, 2), -1.0)
    assert len(grid) == len(tiles.pixels) - 1
    merged = merge_grids(torch.cat([base, grid]), size, config, torch.full((1, 2), -5.0))
    assert (merged[explore.base_view(picture, config).tokens] == -1).all()
    view = explore.grid_view(picture, config)
    if merge == "flat":
        keep = (slice(0, rows * side), slice(0, columns * side))
    row, column = keep
    row_numbers = torch.arange(row.start, row.stop)
    column_numbers = torch.arange(column.start, column.stop)
    expected = torch.stack(torch.meshgrid(row_numbers, column_numbers, indexing="ij"), -1)
    assert torch.equal(merged[view.tokens], expected.float())
    width, height = view.picture.size
    assert width * len(row_numbers) == height * len(column_numbers)


def test_a_fine_map_is_shown_in_cells(monkeypatch):
    """Sums are kept, a constant stays one, and newlines are left out."""
    monkeypatch.setattr(explore, "MOST_UNITS", 4)
    tokens = torch.arange(7 * 6).view(7, 6)[:, :-1]  # each row ends with a newline
    view = explore.View("grid", Image.new("RGB", (8, 8)), tokens)
    inside = explore.Inside(*[None] * 6, [view], {42: "class token"}, {}, {}, [])
    units = explore.number_units(inside, 43)
    assert units.shapes == [(3, 2)] and units.num_units == 7 and units.others == [6]
    values = torch.rand(2, 43)
    sums = explore.gather_units(values, units, is_mean=False)
    is_shown = units.of_token >= 0
    assert int(is_shown.sum()) == 36
    close(sums.sum(1), values[:, is_shown].sum(1), 1e-5)
    close(sums[:, 0], values[:, tokens[:3, :3].flatten()].sum(1), 1e-5)
    ones = explore.gather_units(torch.ones(1, 43), units, is_mean=True)
    assert torch.equal(ones, torch.ones(1, 7))


# ---------------------------------------------------------------- the page
def test_texts_of_the_user_are_text(folder):
    page, inside = write_page(folder, "vqa")
    text = page.read_text(encoding="utf-8")
    template = explore.TEMPLATE.read_text(encoding="utf-8")
    assert text.count("</script") == template.count("</script") == 2
    assert text.count("<b>") == 0 and "</" in "".join(read_numbers(page)["tokens"])
    # nothing is loaded from anywhere
    assert not re.search(r"https?:|@import|<link|url\(", template)
    assert 10_000 < page.stat().st_size < explore.MOST_BYTES


def test_a_page_of_the_papers_sizes_is_small(folder):
    """24 x 24 patches and 50 tokens in 6 layers; 729 base patches, a grid, 40 tokens, 8 layers."""
    _, inside = write_page(folder, "vqa")
    noise = Image.effect_noise((512, 512), 90).convert("RGB")
    for sizes, num_layers, num_text in (([24], 6, 50), ([27, 81], 8, 40)):
        views = []
        first = 0
        for side in sizes:
            numbers = torch.arange(side * side).view(side, side) + first
            views.append(explore.View("a", noise, numbers))
            first += side * side
        weights = {"image": torch.rand(8, first)}
        to_image, to_text = torch.rand(num_text, first), torch.rand(first, num_text)
        layer = explore.Layer("layer", weights, weights, to_image, to_text)
        experts = {"image": list(range(8))}
        large = inside._replace(
            views=views, others={}, experts=experts, layers=[layer] * num_layers
        )
        assert len(explore.make_page(large)) < explore.MOST_BYTES
    too_many = inside._replace(views=views, others={}, experts=experts, layers=[layer] * 40)
    with pytest.raises(ValueError, match="a shorter text makes it smaller"):
        explore.make_page(too_many)


def test_what_cannot_be_explored_is_said(folder, tmp_path):
    def run(*flags, text="a circle"):
        flags = [str(flag) for flag in flags]
        figures.main(["explore", "--image", str(folder / "a.png"), "--text", text, *flags])

    foreign = tmp_path / "mine.html"
    foreign.write_text("my own page")
    for out in (foreign, explore.TEMPLATE):
        with pytest.raises(ValueError, match="is there, and is no such page"):
            run("--checkpoint", folder / "vqa", "--out", out)
    out = ("--out", tmp_path / "new.html")
    with pytest.raises(ValueError, match="the text is empty"):
        run("--checkpoint", folder / "vqa", *out, text=" ")
    with pytest.raises(ValueError, match="which is no text for the model"):
        run("--checkpoint", folder / "mllm" / "static", *out, text="an <image>")
    with pytest.raises(ValueError, match="more than max_length"):
        run("--checkpoint", folder / "mllm" / "static", *out, text="a word " * 300)
    for _ in range(2):  # a page of ours is written anew
        run("--checkpoint", folder / "vqa", *out)
    model = LlavaManager(LlavaManagerConfig.tiny(**{**TINY_MLLM, "manager_type": None}))
    with pytest.raises(ValueError, match="the model has no managers"):
        explore.look_into_mllm(model, None, [1], None, None)


# ---------------------------------------------------------------- in a browser
@pytest.mark.skipif(browser.find_browser() is None, reason="there is no browser: install Chromium")
def test_a_browser_shows_the_managers_weights(folder):
    """Of a patch, a token and the class token, in two layers; and the text of the user did nothing:
    it makes no element.
    """
    page, inside = write_page(folder, "vqa")
    expected, _ = tower_weights(folder, inside)
    positions = [(1, "image", 5), (2, "text", 3), (2, "image", 16)]
    fragment = ";".join(f"{layer},{modality},{number}" for layer, modality, number in positions)
    document = browser.read_page(page, f"check={fragment}")
    shown = browser.numbers_shown(document)
    names = [one["name"] for one in shown]
    assert names[0] == "Patch, row 2, column 2" and names[2] == "class token"
    for (layer, modality, number), one in zip(positions, shown, strict=True):
        token = number if modality == "text" else (number + 1) % 17  # the class token comes first
        weights = expected[modality, layer][:, token]
        for bar, weight in zip(one["bars"], weights.tolist(), strict=True):
            assert float(bar[1]) == pytest.approx(weight, rel=2e-3, abs=1e-4)
        assert [name for name, _ in one["bars"]] == [
            f"{modality} layer {expert}" for expert in inside.experts[modality]
        ]
        other = "image" if modality == "text" else "text"
        attention = getattr(inside.layers[layer], f"{modality}_to_{other}")[token]
        assert float(one["attended"][0][1]) == pytest.approx(attention.max().item(), abs=1e-3)
    assert document.count("<script") == 2 and "<b>" not in document.partition("<main")[2]
