"""multigrid.py: tiles, token counts and merging against the official numbers; pinpoints that are
refused.
"""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, llava_config, llava_image, picture, read_llava
from PIL import Image

import llava_manager
import multigrid
from llava_manager import LlavaManagerConfig


def test_image_tiles_bit_for_bit():
    tensors = read_llava("tiny/images.safetensors")
    for key in (k for k in tensors if k.startswith("pixels_u8/")):
        _, name, mode = key.split("/")
        config = llava_config("none")
        if mode == "a5":
            config = dataclasses.replace(
                config, aspect="anyres", grid_pinpoints=read_llava("tiny/cases.json")["pins5"]
            )
        elif mode != "a9":
            config = dataclasses.replace(config, aspect=mode)
        tiles = multigrid.preprocess_image(llava_image(name), config)
        expected = (tensors[key].float() / 255 - 0.5) / 0.5
        assert torch.equal(tiles.pixels, expected.reshape(tiles.pixels.shape)), key
        if mode == "pad":
            multi = multigrid.preprocess_image(
                llava_image(name), llava_config("none"), multi_image=True
            )
            assert torch.equal(multi.pixels, tiles.pixels)
    base_tile = multigrid.preprocess_image(llava_image("100x60"), llava_config("none")).pixels[:1]
    assert torch.equal(base_tile, tensors["pixels_f32_tile0/100x60/a9"])


def test_real_size_grids():
    golden = read_llava("preprocess/real_size_grids.json")
    base = LlavaManagerConfig.base()
    configs = {
        "anyres_max_9": base,
        "anyres": dataclasses.replace(base, aspect="anyres", grid_pinpoints=golden["pins_anyres"]),
    }
    for case in golden["cases"]:
        config, size = configs[case["mode"]], tuple(case["image_wh"])
        best = multigrid.select_best_resolution(size, config.grid_pinpoints)
        grid, keep, final = multigrid.grid_geometry(size, config)
        assert [list(best), list(grid), list(final)] == [
            case["best_resolution_wh"],
            case["grid_wh"],
            case["final_hw"],
        ]
        assert [s.stop - s.start for s in keep] == case["unpadded_hw"]
        tiles = 1 + grid[0] * grid[1]
        assert tiles == case["n_tiles_incl_base"]
        assert multigrid.count_image_tokens(tiles, size, config) == case["n_visual_tokens"]
        features = torch.empty(tiles, 729, 2, device="meta")
        assert multigrid.merge_grids(features, size, config).shape == (case["n_visual_tokens"], 2)
        white = multigrid.resize_and_pad(Image.new("RGB", size, (255, 255, 255)), best)
        assert list(white.getbbox()) == case["pasted_box_xyxy"]


def test_merge_grids():
    """Where each token comes from, on features that carry their own place."""
    config = LlavaManagerConfig.tiny(aspect="anyres")
    features = torch.arange(5 * 16.0).reshape(5, 16, 1)
    merged = multigrid.merge_grids(features, (64, 64), config, newline=torch.tensor([-1.0]))[:, 0]
    assert merged[:16].tolist() == list(range(16))
    rows = merged[16:].reshape(8, 9)
    assert rows[:, 8].eq(-1).all()
    assert rows[0, :8].tolist() == [
        16,
        17,
        18,
        19,
        32,
        33,
        34,
        35,
    ]  # first rows of the upper two tiles
    assert rows[4, :8].tolist() == [48, 49, 50, 51, 64, 65, 66, 67]
    flat = multigrid.merge_grids(features, (64, 64), dataclasses.replace(config, merge="flat"))[
        :, 0
    ]
    assert flat.tolist() == list(range(80))
    stacked = multigrid.merge_grids(torch.stack([features, 2 * features], 1), (64, 64), config)
    assert torch.equal(stacked[1], 2 * stacked[0]) and stacked[0, 16 + 8] == 0
    assert multigrid.merge_grids(features[:1], (64, 64), config).shape == (16, 1)
    thin = (
        config.image_size,
        4096 * config.image_size,
    )  # a picture of one pixel's breadth keeps one column
    assert (
        multigrid.grid_geometry((1, 3000), config)[2][1] >= 1
        and multigrid.grid_geometry(thin, config)[2][1] >= 1
    )


@pytest.mark.parametrize(
    ("pinpoints", "message"),
    [
        ("3x3", "like"),
        ("(1x1),...,(9999x9999)", "99980001 sizes; there may be 4096"),
        ("(2x2),...,(1x1)", "a list of 1 to 4096 sizes"),
        ([1, 2], r"has 1; it must be \(width, height\) in pixels"),
        ([None], "has None"),
        (None, "is None"),
        (5, "is 5"),
        ([["a", 64]], "'a'"),
        ([[32, 32, 32]], r"\[32, 32, 32\]"),
        ([[32, 40]], "multiples of the tile's 32"),
        ([[0, 32]], "multiples"),
        ([[32_000_000, 32]], "at most 4096 tiles"),
        ([[32, 32]] * 5000, "a list of 1 to 4096 sizes"),
    ],
)
def test_pinpoints_that_are_refused(pinpoints, message):
    with pytest.raises(ValueError, match=f"^grid_pinpoints .*{message}") as error:
        multigrid.expand_pinpoints(pinpoints, 32)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    "pinpoints",
    [
        "",
        "(0x0),...,(1x1)",
        "(1x1),...,(1x)",
        "(-1x1),...,(2x2)",
        "(1.5x1),...,(2x2)",
        f"(1x1),...,({'9' * 5000}x1)",
        "(1x1)" * 100_000,
        "(1x1),...,(2x2)\0",
        [],
        {},
        (),
        b"(1x1),...,(2x2)",
        [[[32, 32]]],
        [[32.0, 32.0]],
        [[float("nan"), 32]],
        [[float("inf"), 32]],
        [[-32, 32]],
        [[True, 32]],
        [[10**400, 32]],
        ["32x32"],
        [{"width": 32}],
        [[32, 32], None],
        True,
        1.5,
    ],
)
def test_pinpoints_of_every_kind_end_in_one_sentence(pinpoints):
    with pytest.raises(ValueError, match="^grid_pinpoints ") as error:
        multigrid.expand_pinpoints(pinpoints, 32)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_a_grid_has_a_bounded_number_of_pixels():
    assert multigrid.expand_pinpoints([[7680, 7680]], 384) == ((7680, 7680),)
    with pytest.raises(ValueError, match="64 million pixels"):
        multigrid.expand_pinpoints([[8448, 8448]], 384)


# ---------------------------------------------------------------- shapes of pictures
@pytest.mark.parametrize("size", [(50, 31), (31, 50), (300, 7), (7, 300), (1, 1), (640, 639)])
@pytest.mark.parametrize("side", [32, 384])
def test_a_padded_picture_is_that_of_the_whole_canvas(size, side, monkeypatch):
    """Bit for bit, however many strips it is made of."""
    image = picture(3, size)
    longest = max(size)
    canvas = multigrid.paste_centred(image, (longest, longest), multigrid.GREY)
    expected = np.array(canvas.resize((side, side), multigrid.BICUBIC))
    for pixels in (1, 1000, 4_000_000):
        monkeypatch.setattr(multigrid, "STRIP_PIXELS", pixels)
        assert np.array_equal(np.array(multigrid.pad_and_squash(image, side)), expected)


def test_a_picture_beyond_the_longest_is_nearly_the_same(monkeypatch):
    smooth = picture(3, (3, 3)).resize((1000, 150), multigrid.BICUBIC)
    exact = np.array(multigrid.pad_and_squash(smooth, 32)).astype(int)
    monkeypatch.setattr(multigrid, "LONGEST_PADDED", 100)
    nearly = np.array(multigrid.pad_and_squash(smooth, 32)).astype(int)
    assert np.abs(exact - nearly).mean() < 1


@pytest.mark.parametrize("aspect", ["pad", "square", "anyres", "anyres_max_1"])
@pytest.mark.parametrize("size", [(1, 1), (1, 60000), (60000, 1), (2, 8000), (8000, 2)])
def test_a_line_has_tiles_and_tokens(aspect, size):
    config = LlavaManagerConfig.tiny(aspect=aspect)
    tiles = multigrid.preprocess_image(Image.new("RGB", size, (200, 9, 9)), config)
    assert tiles.size == size and tiles.pixels.isfinite().all()
    features = torch.zeros(len(tiles.pixels), config.side**2, 2)
    tokens = multigrid.merge_grids(features, size, config)
    assert len(tokens) == multigrid.count_image_tokens(len(tiles.pixels), size, config)


def test_a_shrunk_line_keeps_a_row():
    """A budget of one tile, and a grid of one row of patches after its padding is gone."""
    config = LlavaManagerConfig.tiny(aspect="anyres_max_1", grid_pinpoints=[[64 * 32, 32]])
    final = multigrid.grid_geometry((60000, 1), config).final
    assert min(final) == 1
    features = torch.zeros(65, config.side**2, 2)
    tokens = multigrid.merge_grids(features, (60000, 1), config)
    assert len(tokens) == multigrid.count_image_tokens(65, (60000, 1), config)


MEASURE = """
import resource
from PIL import Image
import multigrid
from llava_manager import LlavaManagerConfig
base = LlavaManagerConfig.base()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in ((2, 8000), (8000, 2), (1, 60000), (60000, 1), (1080, 12000)):
    picture = Image.new("RGB", size)
    multigrid.preprocess_image(picture, base)
    multigrid.preprocess_image(picture, base, multi_image=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_the_memory_of_tiles_is_not_decided_by_the_shape():
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < 500  # MiB; the square of the third one would have 14,000


def test_pinpoints_are_a_range_of_tiles_or_a_list_of_sizes():
    expected = ((32, 32), (32, 64), (64, 32), (64, 64))
    assert multigrid.expand_pinpoints("(1x1), ..., (2x2)", 32) == expected
    assert multigrid.expand_pinpoints([list(size) for size in expected], 32) == expected


def test_what_a_model_needs_is_reachable_from_llava_manager():
    for name in ("ImageTiles", "preprocess_image", "merge_grids", "select_best_resolution"):
        assert getattr(llava_manager, name) is getattr(multigrid, name)
