"""figures.py: statistics of the managers against official numbers, what is drawn, and the errors of
the command line.
"""

import dataclasses
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from helpers import golden, golden_model, golden_state, present, save_tiny_mllms, save_tiny_towers
from PIL import Image
from torch.nn import functional as F

import analysis
import ask
import drawing
import fields
import figures
from analysis import manager_statistics, visual_manager_statistics
from drawing import Panel, draw_panel, legend_label, load_matplotlib
from figures import CurvesOptions, GridOptions, ManagersOptions
from llava_manager import LlavaManager
from model import ManagerTower, ManagerTowerConfig
from tokenizer import load_tokenizer
from weights import load_model, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of random tiny models: vqa, nlvr2, snli_ve, retrieval, itm; and nine pictures."""
    return save_tiny_towers(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    """Folders of tiny models with static and with adaptive managers, and a picture."""
    return save_tiny_mllms(tmp_path_factory.mktemp("mllm"))


@pytest.fixture
def shapes(monkeypatch):
    """Panels are not drawn, which takes a second; returns (panels, columns) of each figure."""
    drawn = []

    def count(panels, columns=2, is_shared=False):
        drawn.append((len(panels), columns))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(figures, "draw_panels", count)
    return drawn


def run(*flags):
    figures.main([str(flag) for flag in flags])


# ---------------------------------------------------------------- ManagerTower
class Batch(torch.utils.data.Dataset):
    """Golden inputs as a dataset."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return len(self.inputs["image"])

    def __getitem__(self, row):
        return {
            "pixels": self.inputs["image"][row],
            "input_ids": self.inputs["text_ids"][row],
            "attention_mask": self.inputs["text_masks"][row],
        }


@pytest.mark.parametrize(
    "name", present("main.mt_aaue_vector", "main.mt_saue_vector", "main.mt_aaue_scalar")
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_manager_statistics(name, batch_size):
    """Mean weights from the official controller scores, similarities from the official modules'
    outputs.
    """
    model = golden_model(name)
    inputs, out = golden(name)
    state = golden_state(name)
    stats = manager_statistics(model, Batch(inputs), batch_size)
    mask = inputs["text_masks"].bool()
    assert stats["text"]["experts"] == [2, 3, 4, 5] and stats["image"]["experts"] == [2, 3, 4]
    for m, layers in (("text", model.text_managers), ("image", model.image_managers)):
        lengths = [len(stats[m][k]) for k in ("weights", "cosine_unimodal", "cosine_cross_modal")]
        assert lengths == [3, 2, 1]
        for i, manager in enumerate(layers):
            assert sum(stats[m]["weights"][i]) == pytest.approx(1, abs=1e-5)
            if hasattr(manager, "scores"):
                scores = manager.scores[: manager.num_experts]
                weights = torch.softmax(scores / manager.temperature, 0).mean(-1)
                assert stats[m]["weights"][i] == pytest.approx(weights.tolist(), abs=1e-5)
            if f"infer.manager.{m}.{i}.controller_out" in out:
                scores = out[f"infer.manager.{m}.{i}.controller_out"]  # (B, L, N)
                weights = torch.softmax(scores / manager.temperature, -1)
                weights = (weights[mask] if m == "text" else weights.flatten(0, 1)).mean(0)
                assert stats[m]["weights"][i] == pytest.approx(weights.tolist(), abs=1e-5)
        unimodal, cross = zip(*(official_parts(out, state, m, i) for i in range(3)), strict=True)
        for key, parts in (("cosine_unimodal", unimodal), ("cosine_cross_modal", cross[1:])):
            pairs = [F.cosine_similarity(a, b, dim=-1) for a, b in zip(parts, parts[1:])]  # noqa: B905
            expected = [(p[mask] if m == "text" else p).mean().item() for p in pairs]
            assert stats[m][key] == pytest.approx(expected, abs=2e-5)


def official_parts(out, state, modality, i):
    """Manager i's output without and with only the part of the previous cross-modal layer,
    W_C * LN(C).
    """
    prefix = f"cross_modal_{modality}_manager_tower.{i}.manager_layer"
    whole = out[f"infer.manager.{modality}.{i}.out"]
    if i == 0:
        return whole, torch.zeros_like(whole)
    n = {"text": 4, "image": 3}[modality]
    scores = state.get(f"{prefix}.layer_scores_cross", state.get(f"{prefix}.layer_scores"))
    last_score = scores[0, -1]  # (1, D or 1)
    norm = [state[f"{prefix}.LayerNorm.{n}.{p}"] for p in ("weight", "bias")]
    previous = out[f"infer.cross.{modality}.layer.{i - 1}"]
    cross = last_score * F.layer_norm(previous, whole.shape[-1:], *norm, 1e-5)
    return whole - cross, cross


def test_manager_figure(folder, tmp_path):
    options = ManagersOptions(
        [str(folder / "vqa")], "demo", limit=8, out=str(tmp_path / "figure.png")
    )
    stats = figures.managers(options)
    assert list(stats) == ["vqa"]
    assert json.loads((tmp_path / "figure.json").read_text()) == stats
    assert Image.open(tmp_path / "figure.png").size == (1650, 1260)
    with pytest.raises(ValueError, match="has no managers"):
        manager_statistics(ManagerTower(ManagerTowerConfig.tiny(fusion="last")), [])


def said(panel):
    """(what is written in a panel instead of axes, whether axes are shown)."""
    axes = load_matplotlib()().subplots()
    draw_panel(axes, panel)
    return " ".join(text.get_text() for text in axes.texts), axes.axison


@pytest.mark.parametrize("num_layers, drawn", [(1, 0), (2, 0), (3, 1)])
def test_no_panel_is_empty(num_layers, drawn):
    """One cross-modal layer has no consecutive managers, and two have one pair of them."""
    config = ManagerTowerConfig.tiny(
        num_layers=num_layers, managed_layers_text=3, managed_layers_image=3, image_size=16
    )
    inputs = {
        "image": torch.randn(2, 3, 16, 16),
        "text_ids": torch.randint(5, 300, (2, 10)),
        "text_masks": torch.ones(2, 10, dtype=torch.long),
    }
    panels = figures.tower_panels(manager_statistics(ManagerTower(config), Batch(inputs)))
    assert [said(panel) for panel in panels[:2]] == [("", True)] * 2
    for panel, pairs in zip(panels[2:], (num_layers - 1, num_layers - 2), strict=True):
        text, shown = said(panel)
        assert shown == (pairs >= 2)
        if pairs <= 0:
            assert "fewer than two managers have" in text
        elif pairs == 1:
            assert "text: " in text and "image: " in text and " at i = " in text
    assert sum(said(panel)[1] for panel in panels[2:]) == drawn


def test_towers_side_by_side_on_several_tasks(folder, tmp_path, shapes):
    """A column for each; statements have two pictures. The rows share their axes."""
    out = tmp_path / "figure.png"
    checkpoints = ("--checkpoint", folder / "vqa", "--checkpoint", folder / "itm")
    tasks = ("--task", "vqav2", "--task", "nlvr2")
    run("managers", *checkpoints, *tasks, "--data", "demo", "--limit", 8, "--out", out)
    found = json.loads((tmp_path / "figure.json").read_text())
    assert list(found) == ["vqa, vqav2", "vqa, nlvr2", "itm, vqav2", "itm, nlvr2"]
    alone = figures.managers(
        ManagersOptions([str(folder / "itm")], "demo", [], ["nlvr2"], limit=8, out=str(out))
    )
    assert alone == {"itm": found["itm, nlvr2"]}
    assert shapes == [(16, 4), (4, 2)]
    assert found["vqa, vqav2"] != found["vqa, nlvr2"]
    figure = load_matplotlib()()
    row = figure.subplots(1, 3)
    panels = [Panel("t", "x", "y", {"a": ([1, 2], [0, top])}) for top in (1, 5)]
    for axes, panel in zip(row, [*panels, Panel("t", "x", "y", {})], strict=True):
        draw_panel(axes, panel)
    drawing.share_heights(row)
    assert row[0].get_ylim() == row[1].get_ylim() and row[1].get_ylim()[1] > 5


def test_a_folder_of_each_of_two_sets_has_a_column(folder, tmp_path, shapes):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        row = {"image": str(folder / "pictures" / "0.png"), "captions": [f"a {name} red circle"]}
        (tmp_path / name / "coco_test.jsonl").write_text(json.dumps(row) + "\n")
    roots = [str(tmp_path / "first"), str(tmp_path / "second")]
    out = str(tmp_path / "figure.png")
    options = ManagersOptions([str(folder / "itm")], "", roots, ["coco"], out=out)
    assert list(figures.managers(options)) == ["itm, first", "itm, second"]
    assert shapes == [(8, 2)]


def test_curves_are_told_apart_by_colour_and_marker():
    names = [f"model {number}" for number in range(10)]
    curves = {name: ([1, 2], [0.5, 1.0]) for name in names}
    panel = Panel("t", "x", "y", curves)
    styles = [drawing.curve_style(number, 10, panel) for number in range(10)]
    looks = {(style["color"], style["marker"], style["linestyle"]) for style in styles}
    assert len(looks) == 10
    ordered = panel._replace(is_ordered=True)
    lightness = []
    for number in range(6):
        red, green, blue, _ = drawing.curve_style(number, 6, ordered)["color"]
        lightness.append(0.3 * red + 0.6 * green + 0.1 * blue)
    assert lightness == sorted(lightness) and lightness[-1] < 0.85


def test_what_is_dashed_and_shaded_has_a_line_in_the_legend():
    curves = {"a": ([0, 1, 2], [0.5, 0.6, 0.7])}
    panel = Panel("t", "x", "y", curves)._replace(
        references={"a": ([0, 2], [0.2, 0.2])},
        reference_label="chance",
        span=(0.5, 2.5),
        span_label="read",
        has_legend_beside=True,
    )
    axes = load_matplotlib()().subplots()
    draw_panel(axes, panel)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "chance", "read"]
    curve, chance, _ = axes.get_lines()
    assert list(chance.get_ydata()) == [0.2, 0.2] and chance.get_color() == curve.get_color()


def test_a_single_expert_is_said_not_drawn():
    panel = Panel("weights", "expert", "weight", {"layer 1": ([12], [1.0])})
    assert said(panel) == ("weight\nlayer 1: 1 at expert = 12", False)


# ---------------------------------------------------------------- LLaVA-OV-Manager
def test_visual_manager_figure(mllm):
    model = load_model(mllm / "static")
    stats = figures.managers(ManagersOptions([str(mllm / "static")]))["static"]
    for k, manager in enumerate(model.managers):
        assert stats["weights"][k] == pytest.approx(manager.scores.mean(1).tolist(), abs=1e-6)
        magnitudes = manager.scores.abs().mean(1).tolist()
        assert stats["magnitudes"][k] == pytest.approx(magnitudes, abs=1e-6)
    assert Image.open(mllm / "static" / "managers.png").size == (1650, 630)
    adaptive = mllm / "adaptive_last"
    with pytest.raises(ValueError, match="adaptive managers need pictures"):
        figures.managers(ManagersOptions([str(adaptive)]))
    run("managers", "--checkpoint", adaptive, "--image", mllm / "a.png", "--image", mllm / "a.png")
    twice_the_same = json.loads((adaptive / "managers.json").read_text())["adaptive_last"]
    model = load_model(adaptive)
    tokenizer = load_tokenizer(adaptive)
    picture = str(mllm / "a.png")
    once = visual_manager_statistics(
        model, [ask.encode_turns(model, tokenizer, ["Describe the picture."], [picture])]
    )
    assert once["weights"][0] == pytest.approx(twice_the_same["weights"][0], rel=1e-5)
    prompts = [ask.encode_turns(model, tokenizer, ["what is it?"], [picture])]
    once = visual_manager_statistics(model, prompts)
    with torch.no_grad():
        model.managers[-1].gate *= 2  # nothing before the last manager depends on it
    twice = visual_manager_statistics(model, prompts)
    assert twice["weights"][0] == once["weights"][0] and max(once["magnitudes"][-1]) > 0
    assert twice["weights"][-1] == pytest.approx([2 * w for w in once["weights"][-1]], rel=1e-5)


def test_visual_managers_on_data_and_side_by_side(mllm, tmp_path, shapes):
    """Means over two sets of data; an adaptive manager's weights depend on them."""
    out = tmp_path / "both.png"
    flags = ("--checkpoint", mllm / "adaptive_last", "--data", "demo", "--limit", 2)
    run("managers", *flags, "--task", "nlvr2", "--task", "coco", "--out", out)
    found = json.loads((tmp_path / "both.json").read_text())
    assert list(found) == ["adaptive_last, nlvr2", "adaptive_last, coco"]
    one, other = found.values()
    assert one["weights"][0] == other["weights"][0]  # the first manager is static
    assert one["weights"][1] != other["weights"][1]
    assert shapes == [(4, 2)]


# ---------------------------------------------------------------- attention
def test_attention_figure(mllm, tmp_path):
    """Two models and two pictures; the numbers are those of analysis.py."""
    out = tmp_path / "attention.png"
    checkpoints = ("--checkpoint", mllm / "static", "--checkpoint", mllm / "adaptive_last")
    picture = mllm / "a.png"
    run("attention", *checkpoints, "--image", picture, "--image", picture, "--out", out)
    found = json.loads((tmp_path / "attention.json").read_text())
    assert list(found) == ["static", "adaptive_last"]
    assert found["static"]["prompts"] == 2
    model = load_model(mllm / "static")
    tokenizer = load_tokenizer(mllm / "static")
    prompt = ask.encode_turns(model, tokenizer, ["Describe the picture."], [str(picture)])
    expected = analysis.layer_statistics(model, [prompt])
    for what in ("cosine", "entropy", "head_divergence"):
        for part, values in expected[what].items():
            assert found["static"][what][part] == pytest.approx(values, rel=1e-4)
            assert len(values) == model.config.num_layers
    assert found["adaptive_last"]["cosine"] != found["static"]["cosine"]
    assert Image.open(out).size == (1650, 2520)


def test_attention_on_rows_of_tasks(mllm, folder, tmp_path, shapes):
    """The built-in scenes, and a manifest, each row a prompt with its text."""
    out = tmp_path / "attention.png"
    row = {"image": str(folder / "pictures" / "0.png"), "captions": ["a red circle", "a scene"]}
    (tmp_path / "coco_test.jsonl").write_text(json.dumps(row) + "\n")
    flags = ("attention", "--checkpoint", mllm / "static", "--task", "coco", "--out", out)
    run(*flags, "--data_root", tmp_path)
    assert json.loads(out.with_suffix(".json").read_text())["static"]["prompts"] == 2
    run(*flags, "--data", "demo", "--limit", 3, "--task", "nlvr2")
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["static, coco"]["prompts"] == found["static, nlvr2"]["prompts"] == 3
    # a statement has two pictures, of a tile each; a caption has one, with a grid
    config = load_model(mllm / "static").config
    assert found["static, nlvr2"]["image_tokens"] == 2 * config.side**2
    assert shapes == [(8, 2), (8, 2)]


# ---------------------------------------------------------------- probe
def test_probe_figure_of_both_kinds_of_models(folder, mllm, tmp_path):
    out = tmp_path / "probe.png"
    checkpoints = ("--checkpoint", folder / "vqa", "--checkpoint", mllm / "static")
    run("probe", *checkpoints, "--scenes", 40, "--out", out)
    found = json.loads((tmp_path / "probe.json").read_text())
    for name, rest, num_states, managed in (
        ("vqa", "class token", 4, [1, 2, 3]),
        ("static", "mean of the patches", 4, [1, 2, 3]),
    ):
        assert (found[name]["train"], found[name]["test"]) == (40, 20)
        assert found[name]["managed"] == managed
        assert list(found[name]["accuracy"]) == ["all tokens", rest]
        for lists in found[name]["accuracy"].values():
            assert list(lists) == ["color", "shape", "size", "axis of relation"]
            for accuracies in lists.values():
                assert len(accuracies) == num_states
    assert Image.open(out).size == (1650, 1260)


def save_vit(folder):
    """A random ViT as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=16,
    )
    peer = transformers.ViTModel(config, add_pooling_layer=False).eval()
    peer.save_pretrained(folder)
    colours = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours))
    return peer


def test_a_published_encoder_is_probed_as_its_library_computes_it(tmp_path, folder, shapes):
    peer = save_vit(tmp_path / "vit")
    opened = figures.open_published(str(tmp_path / "vit"), 32, "cpu")
    scene, draw = figures.probe_scenes(1)[0]
    picture = figures.paint(draw, scene, 32)
    pixels = opened.transform(picture)[None]
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    assert torch.allclose(pixels[0], (values - 0.5) / 0.5, atol=1e-6)
    with torch.no_grad():
        expected = peer(pixels, output_hidden_states=True).hidden_states
        found = opened.encoder(pixels, range(3))
    for state, other in zip(found, expected, strict=True):
        assert torch.allclose(state, other, atol=1e-5)
    assert figures.open_published(str(tmp_path / "vit"), 0, "cpu").encoder.image_size == 64
    out = tmp_path / "probe.png"
    flags = ("--checkpoint", folder / "vqa", "--vision", tmp_path / "vit", "--scenes", 20)
    run("probe", *flags, "--out", out)
    numbers = json.loads((tmp_path / "probe.json").read_text())
    assert list(numbers) == ["vqa", "vit"] and numbers["vit"]["managed"] == []
    assert shapes == [(4, 2)]


def test_the_encoder_of_a_probe_reads_what_the_model_reads(folder, mllm):
    scene = figures.probe_scenes(1)[0]
    picture = figures.paint(scene.draw, scene.scene, 32)
    model = load_model(folder / "vqa").eval()
    opened = figures.open_encoder(str(folder / "vqa"), "cpu")
    pixels = opened.transform(picture)[None]
    with torch.no_grad():
        (state,) = opened.encoder(pixels, [3])
        assert torch.equal(model.image_encoder.ln_post(state), model.encode_image(pixels)[:, -1])
    opened = figures.open_encoder(str(mllm / "static"), "cpu")
    model = load_model(mllm / "static")
    tiles = figures.preprocess_image(picture, model.config)
    assert torch.equal(opened.transform(picture), tiles.pixels[0])
    assert opened.encoder(opened.transform(picture)[None], [3])[0].shape[1] == model.config.side**2


# ---------------------------------------------------------------- grid
def test_grid(tmp_path, mllm):
    Image.new("RGB", (1000, 620), (90, 160, 220)).save(tmp_path / "wide.png")
    info = figures.grid(GridOptions(str(tmp_path / "wide.png"), out=str(tmp_path / "grid.png")))
    # 3 x 2 tiles of 27 x 27 patches; 81 * 620 / 1000 = 50.22 rows of patches are no padding;
    # 729 + 50 * (81 + 1) tokens
    assert info == {
        "picture": (1000, 620),
        "tiles": (7,),
        "tokens of the base tile": (729,),
        "grid of tiles": (3, 2),
        "patches without padding": (81, 50),
        "tokens of the grid, with newlines": (82, 50),
        "tokens": (4829,),
    }
    written = json.loads((tmp_path / "grid.json").read_text())
    assert written["grid of tiles"] == [3, 2] and written["tokens"] == [4829]
    drawn = Image.open(tmp_path / "grid.png")
    pixels = [drawn.getpixel((8, 8)), drawn.getpixel((500, 400)), drawn.getpixel((500, 12))]
    assert pixels == [(90, 160, 220), (90, 160, 220), (110, 0, 0)]
    of_model = GridOptions(str(mllm / "a.png"), str(mllm / "static"), str(tmp_path / "grid.png"))
    assert figures.grid(of_model)["tiles"] == (5,)


# ---------------------------------------------------------------- curves
ROWS = [
    {"step": 1, "loss": 3.0, "lr": 0.1},
    {"step": 2, "loss": 1.5, "lr": 0.0},
    {"step": 2, "baselines": {"untrained": {"accuracy": 0.1}}},
    {"step": 2, "eval": {"accuracy": 0.5, "per_type": {"color": 0.4}, "score": 0.5}},
]


def write_log(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_curves_of_runs(tmp_path):
    runs = [write_log(tmp_path / name, ROWS) for name in ("a", "b")]
    found = figures.curves(CurvesOptions(runs, str(tmp_path / "curves.png")))
    assert found["losses"] == {"a": ([1, 2], [3.0, 1.5]), "b": ([1, 2], [3.0, 1.5])}
    assert found["metrics"] == {"a: accuracy": ([2], [0.5]), "b: accuracy": ([2], [0.5])}
    assert Image.open(tmp_path / "curves.png").size == (1650, 630)
    written = json.loads((tmp_path / "curves.json").read_text())
    assert written["losses"]["a"] == [[1, 2], [3.0, 1.5]]


def test_runs_of_the_same_folder_name_are_told_apart(tmp_path):
    names = ("x/demo", "y/demo", "z/other")
    runs = [write_log(tmp_path / name, ROWS) for name in names]
    found = figures.curves(CurvesOptions(runs, str(tmp_path / "curves.png")))
    assert list(found["losses"]) == ["x/demo", "y/demo", "other"]
    assert figures.short_names([*runs, runs[0][: -len("/demo")]])[3] == "x"
    assert figures.short_names(["/a/b/c", "/d/b/c"]) == ["a/b/c", "d/b/c"]
    assert figures.short_names(["/c", "/d/c"]) == ["/c", "d/c"]
    with pytest.raises(ValueError, match="is given twice"):
        figures.short_names([runs[0], f"{runs[0]}/../demo"])


def test_a_run_with_one_logged_row_is_said_not_drawn(tmp_path, monkeypatch):
    panels = []

    def keep(drawn):
        panels.extend(drawn)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(figures, "draw_panels", keep)
    one_row = write_log(tmp_path / "run", ROWS[:1])
    figures.curves(CurvesOptions([one_row], str(tmp_path / "curves.png")))
    assert [said(panel) for panel in panels] == [
        ("loss\nrun: 3 at step = 1", False),
        ("no evaluation is logged yet", False),
    ]


def test_a_number_that_is_not_finite_is_a_gap(tmp_path):
    rows = [*ROWS, {"step": 3, "loss": math.nan}, {"step": 4, "loss": 10**400}]
    rows.append({"step": 4, "eval": {"accuracy": math.inf, "note": "x", "loss": 1e308}})
    found = figures.curves(
        CurvesOptions([write_log(tmp_path / "a", rows)], str(tmp_path / "curves.png"))
    )
    steps, losses = found["losses"]["a"]
    assert steps == [1, 2, 3, 4] and losses[:2] == [3.0, 1.5]
    assert math.isnan(losses[2]) and math.isnan(losses[3])
    assert math.isnan(found["metrics"]["a: accuracy"][1][1])
    written = json.loads((tmp_path / "curves.json").read_text())
    assert written["losses"]["a"][1] == [3.0, 1.5, None, None]


def test_a_log_that_is_being_written_is_drawn(tmp_path):
    folder = write_log(tmp_path / "a", ROWS)
    with open(tmp_path / "a" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lo')
    found = figures.curves(CurvesOptions([folder], str(tmp_path / "curves.png")))
    assert found["losses"] == {"a": ([1, 2], [3.0, 1.5])}


NAMES = ["_a$b$", "$\\frac{", "\u706b", "a\nb", "x" * 200, "\\$x$", "%s {0}"]


def test_runs_of_any_name_are_drawn_without_a_word(tmp_path, capfd, recwarn):
    runs = []
    for name in NAMES:
        runs += [write_log(tmp_path / "one" / name, ROWS), write_log(tmp_path / "two" / name, ROWS)]
    found = figures.curves(CurvesOptions(runs, str(tmp_path / "curves.png")))
    assert len(found["losses"]) == 2 * len(NAMES) == len(found["metrics"])
    assert Image.open(tmp_path / "curves.png").size == (1650, 630)
    assert [warning.message for warning in recwarn if warning.category is UserWarning] == []
    said = f"written: {tmp_path}/curves.png\nwritten: {tmp_path}/curves.json\n"
    assert capfd.readouterr() == (said, "")


def test_half_a_character_has_a_label():
    assert legend_label(os.fsdecode(b"a\xff")) == "a?"


def test_a_link_that_leads_to_itself_has_no_log(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="loop has no log.jsonl"):
        run("curves", "--run", tmp_path / "loop", "--out", tmp_path / "x.png")


def test_without_matplotlib_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="^figures need matplotlib: pip install matplotlib$"):
        run("curves", "--run", write_log(tmp_path / "run", ROWS), "--out", tmp_path / "x.png")


def test_no_file_of_the_user_is_overwritten(folder, tmp_path):
    config = (folder / "vqa" / "config.json").read_bytes()
    flags = ("managers", "--checkpoint", folder / "vqa", "--data", "demo", "--limit", 4)
    with pytest.raises(ValueError, match="would overwrite .*config.json; choose another name"):
        run(*flags, "--out", folder / "vqa" / "config.png")
    with pytest.raises(ValueError, match="config.json.; it must end in .png"):
        run(*flags, "--out", folder / "vqa" / "config.json")
    assert (folder / "vqa" / "config.json").read_bytes() == config
    for _ in range(2):
        run(*flags, "--out", tmp_path / "figure.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "same.png").symlink_to(tmp_path / "a.png")
    for out in ("a.png", "same.png"):
        with pytest.raises(ValueError, match=f"{out}.* is there and is no figure of ours"):
            run("grid", "--image", tmp_path / "a.png", "--out", tmp_path / out)
    with pytest.raises(ValueError, match="a.png.* is there and is no figure of ours"):
        image = tmp_path / "a.png"
        run("managers", "--checkpoint", "nowhere", "--image", image, "--out", image)
    assert Image.open(tmp_path / "a.png").size == (40, 30)
    with pytest.raises(ValueError, match="--image is for a LLaVA-OV-Manager"):
        run(*flags, "--image", tmp_path / "a.png", "--out", tmp_path / "figure.png")


@pytest.mark.parametrize("size", [(1, 1), (2, 8000), (8000, 2), (1, 60000)])
def test_the_grid_of_a_line(size, tmp_path):
    Image.new("RGB", size).save(tmp_path / "line.png")
    found = figures.grid(GridOptions(str(tmp_path / "line.png"), out=str(tmp_path / "grid.png")))
    assert found["picture"] == size and Image.open(tmp_path / "grid.png").width > 384


def test_the_grid_of_a_photo_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (1000, 620)).save(tmp_path / "turned.jpg", exif=exif)
    found = figures.grid(GridOptions(str(tmp_path / "turned.jpg"), out=str(tmp_path / "grid.png")))
    assert found["picture"] == (620, 1000)


def test_a_name_is_shown_as_it_is():
    """Neither as a formula, nor hidden."""
    panel = Panel("t", "step", "loss", {"_a$b$": ([1, 2], [3.0, 2.0]), "none": ([], [])})
    axes = load_matplotlib()().subplots()
    draw_panel(axes, panel)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [r" _a\$b\$"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "has neither a loss nor an evaluation yet"),
        ([{"step": 0, "header": {}}], "has neither a loss nor an evaluation yet"),
        ([[1]], "line 1: a row must have a whole step"),
        ([{"loss": 1.0}], "line 1: a row must have a whole step"),
        ([ROWS[0], {"step": 1, "loss": "x"}], "row 2, has the loss 'x'; it must be a number"),
        ([{"step": "x", "loss": 1.0}], "line 1: a row must have a whole step"),
        ([{"step": 1, "eval": None}], "row 1, has the eval None; it must be an object"),
        ([ROWS[0], {"step": 1, "loss": None}], "row 2, has the loss None; it must be a number"),
        ([{"step": 1, "loss": [1]}], "the loss .1.; it must be a number"),
        ([{"step": 1, "loss": True}], "the loss True; it must be a number"),
        ([{"step": 1, "loss": math.nan}], "a finite number: nothing to draw"),
        ([{"step": 1, "loss": math.inf}], "a finite number: nothing to draw"),
        ([{"step": 1, "loss": 10**400}], "a finite number: nothing to draw"),
        ([{"step": 10**400, "loss": 1.0}], "step"),
        ([{"step": 1.5, "loss": 1.0}], "line 1: a row must have a whole step"),
        ([{"step": True, "loss": 1.0}], "line 1: a row must have a whole step"),
        ([{"step": 1, "eval": {"accuracy": "x", "per_type": {}}}], "nothing to draw"),
        ([{"step": 1, "eval": {"accuracy": math.nan}}], "nothing to draw"),
        ([{"step": 1, "eval": {}}], "nothing to draw"),
        ([{"step": 1, "eval": [0.5]}], "has the eval .0.5.; it must be an object"),
        (["x", None], "line 1"),
        ([{"step": 1, "loss": "x" * 10**6}], "must be a number"),
    ],
)
def test_a_log_that_cannot_be_drawn_is_an_error(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message) as error:
        run("curves", "--run", write_log(tmp_path / "run", rows), "--out", tmp_path / "x.png")
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    assert not (tmp_path / "x.png").exists()


# ---------------------------------------------------------------- the command line
@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("frobnicate",),
            "no command 'frobnicate'; it must be one of managers, attention, probe, grid, curves",
        ),
        (("grid", "--image", "pictures/0.png", "--out", "nowhere/x.png"), "cannot be written"),
        (("curves", "--run", "vqa"), "vqa has no log.jsonl"),
        (("curves", "--run", "pictures/0.png"), "0.png has no log.jsonl"),
        (("managers", "--checkpoint", "pictures"), "pictures"),
        (("managers", "--checkpoint", "pictures/0.png", "--data", "demo"), "0.png"),
        (("grid", "--image", "pictures/0.png", "--checkpoint", "vqa", "--out", "g.png"), "vqa"),
        (("grid", "--image", "pictures", "--out", "g.png"), "pictures: "),
        (("grid", "--image", "vqa/config.json", "--out", "g.png"), "not a readable image"),
        (("grid", "--image", "pictures/0.png", "--out", "pictures"), "it is a folder"),
        (("curves", "--run", "nowhere", "--out", "nothing/x.png"), "there is no folder nothing"),
        (
            ("managers", "--checkpoint", "nowhere", "--data", "demo", "--out", "nothing/x.png"),
            "there is no folder nothing",
        ),
        (("managers", "--checkpoint", "vqa"), "either --data demo or --data_root"),
        (("managers", "--checkpoint", "nowhere", "--data", "demo"), "there is no folder nowhere"),
        (("managers", "--checkpoint", "vqa", "--data", "demo", "--task", "gqa"), "--task is 'gqa'"),
        (("managers", "--checkpoint", "vqa", "--data", "demo", "--limit", "0"), "--limit is 0"),
        (
            ("managers", "--checkpoint", "vqa", "--task", "coco"),
            "either --data demo or --data_root",
        ),
        (
            ("managers", "--checkpoint", "vqa", "--checkpoint", "./vqa", "--data", "demo"),
            "--checkpoint ./vqa is given twice|--checkpoint vqa is given twice",
        ),
        (
            (
                "managers",
                "--checkpoint",
                "vqa",
                "--data",
                "demo",
                "--task",
                "coco",
                "--task",
                "coco",
            ),
            "--task coco is given twice",
        ),
        (
            ("attention", "--checkpoint", "vqa", "--data", "demo"),
            "--checkpoint vqa is a ManagerTower; attention is for LLaVA-OV-Managers",
        ),
        (("attention", "--checkpoint", "vqa"), "--image FILE, --data demo or --data_root FOLDER"),
        (
            ("managers", "--checkpoint", "vqa", "--image", "pictures/0.png", "--data", "demo"),
            "--image is for a LLaVA-OV-Manager",
        ),
        (("attention", "--checkpoint", "nowhere", "--data", "demo"), "there is no folder nowhere"),
        (("probe", "--checkpoint", "nowhere"), "there is no folder nowhere"),
        (("probe",), "say what to probe: --checkpoint FOLDER, or --vision FOLDER"),
        (("probe", "--vision", "vqa", "--out", "p.png"), "weights of a model of this project"),
        (("probe", "--checkpoint", "vqa", "--image_size", "64"), "--image_size is for --vision"),
        (("probe", "--checkpoint", "vqa", "--scenes", "3"), "--scenes is 3"),
        (("probe", "--checkpoint", "vqa", "--out", "vqa/probe.jpg"), "must end in .png"),
    ],
)
def test_what_is_wrong_is_said(folder, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        run(*flags)


def test_what_is_wrong_with_models_is_said(folder, mllm, tmp_path):
    tower = folder / "vqa"
    static = mllm / "static"
    out = ("--out", tmp_path / "x.png")
    for name in ("managers", "attention"):
        with pytest.raises(ValueError, match="static is a LLaVA-OV-Manager and .*vqa a ManagerTow"):
            run(name, "--checkpoint", tower, "--checkpoint", static, "--data", "demo", *out)
    without = tmp_path / "without"
    tokenizer = load_tokenizer(tower)
    config = dataclasses.replace(load_model(tower).config, fusion="last")
    save_model(ManagerTower(config), without)
    tokenizer.save(without)
    with pytest.raises(ValueError, match="without has no managers: its fusion is 'last'"):
        run("managers", "--checkpoint", without, "--data", "demo", *out)
    bare = tmp_path / "bare"
    config = dataclasses.replace(load_model(static).config, manager_type=None)
    save_model(LlavaManager(config), bare)
    load_tokenizer(static).save(bare)
    with pytest.raises(ValueError, match="bare has no managers"):
        run("managers", "--checkpoint", bare, *out)
    for other in (("--data", "demo"), ("--task", "coco"), ("--split", "test")):
        flags = ("--checkpoint", static, "--image", mllm / "a.png", *other)
        with pytest.raises(ValueError, match="--image takes the place of data: give it without"):
            run("attention", *flags, *out)
    many = []
    for number in range(13):
        many += ["--checkpoint", f"{number}"]
    with pytest.raises(ValueError, match="13 models and sets of data are more than a picture"):
        run("managers", *many, "--data", "demo", *out)
    assert not (tmp_path / "x.png").exists()


def test_help_lists_the_commands_and_their_flags(capsys):
    run("-h")
    page = capsys.readouterr().out
    for name, command in figures.COMMANDS.items():
        assert f"  {name} " in page and fields.describe_command(command).splitlines()[0] in page
        with pytest.raises(SystemExit):
            run(name, "-h")
        flags = capsys.readouterr().out
        for field in command.options.__dataclass_fields__:
            assert f"--{field} " in flags


def test_the_padding_of_a_tall_picture_is_left_and_right(tmp_path):
    Image.new("RGB", (400, 900), (90, 160, 220)).save(tmp_path / "tall.png")
    figures.grid(GridOptions(str(tmp_path / "tall.png"), out=str(tmp_path / "grid.png")))
    drawn = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    reddish = (drawn == (110, 0, 0)).all(-1)
    assert reddish.any() and reddish.sum(0).max() > reddish.sum(1).max()


def test_more_curves_than_a_picture_can_show_are_cut_and_said(tmp_path, capsys):
    rows = []
    for step in range(3):
        rows.append({"step": step, "loss": 1.0, "eval": {f"m{k}": k + 0.5 for k in range(5000)}})
    out = tmp_path / "curves.png"
    found = figures.curves(CurvesOptions([str(write_log(tmp_path / "run", rows))], str(out)))
    assert len(found["metrics"]) == 5000 and Image.open(out).size == (1650, 630)
    note = "note: of 5000 curves of metrics the first 50 are drawn"
    assert capsys.readouterr().out.splitlines()[0] == note


def test_names_that_are_not_utf8_are_names_as_others(mllm, tmp_path, capsys):
    odd = os.fsdecode(b"caf\xe9")
    run_folder = write_log(tmp_path / odd, ROWS)
    run("curves", "--run", run_folder, "--out", tmp_path / f"{odd} curves.png")
    Image.open(mllm / "a.png").save(tmp_path / f"{odd}.png")
    run("grid", "--image", tmp_path / f"{odd}.png", "--out", tmp_path / f"{odd} grid.png")
    flags = ("--checkpoint", mllm / "adaptive_last", "--image", tmp_path / f"{odd}.png")
    run("managers", *flags, "--out", tmp_path / f"{odd} managers.png")
    for name in ("curves", "grid", "managers"):
        assert Image.open(tmp_path / f"{odd} {name}.png").width > 300
    assert capsys.readouterr().out.count("written: ") == 6
    with pytest.raises(ValueError, match="has no log.jsonl"):
        run("curves", "--run", tmp_path / f"{odd} nowhere", "--out", tmp_path / "x.png")


def test_a_metric_without_any_finite_number_is_named_and_not_drawn(tmp_path, capsys):
    rows = [{"step": 1, "loss": 2.0}, {"step": 1, "eval": {"good": 0.5, "odd": math.nan}}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = figures.curves(
        figures.CurvesOptions(run=[str(tmp_path)], out=str(tmp_path / "curves.png"))
    )
    (name,) = drawn["metrics"]
    assert name.endswith("good")
    assert "odd has no finite number, so it is not drawn" in capsys.readouterr().out
