"""Multi-grid images: an image becomes a base tile and a grid of tiles; their features become one
sequence of tokens.

Paper: Manager (TCSVT 2025), section IV, after LLaVA-OneVision's AnyRes. Official counterpart:
`process_anyres_image` and the "spatial_unpad" branch of llava_arch.py in LLaVA-NeXT. The base tile
is the whole image, squashed. The grid is the image at the best of several resolutions (the
pinpoints), padded and cut into tiles.

Sizes are (width, height) wherever they belong to a picture, as in Pillow; (height, width) where
they belong to a map of patches.

Shapes: T tiles, S pixels along a tile's side, n patches along it (config.side), L tokens, D width.
"""

import math
import re
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fields import show

BICUBIC = Image.Resampling.BICUBIC
GREY = 127  # of each channel: the padding of a picture that stays one tile
BLACK = 0  # the padding of a grid
MOST = 4096  # pinpoints in a config, and tiles in a grid
MOST_PIXELS = 64_000_000  # of a grid
LONGEST_PADDED = 16_384  # the longer side of a picture that is padded as it is
STRIP_PIXELS = 4_000_000  # of a part of its canvas


class GridConfig(Protocol):
    """What multi-grid reads of a LlavaManagerConfig."""

    image_size: int
    aspect: str
    merge: str
    grid_pinpoints: tuple | str

    @property
    def side(self) -> int: ...


class ImageTiles(NamedTuple):
    """An image as the model takes it."""

    pixels: Tensor  # (T, 3, S, S): the base tile, then the grid row by row
    size: tuple[int, int]  # of the original image


class GridGeometry(NamedTuple):
    """How a grid becomes a map of patches."""

    tiles: tuple[int, int]  # (columns, rows)
    keep: tuple[slice, slice]  # (rows, columns) of patches that are not padding
    final: tuple[int, int]  # (height, width), smaller than `keep` where anyres_max_K shrinks it


# ---------------------------------------------------------------- which resolutions there are
def parse_range(text: str, image_size: int) -> list[tuple[int, int]]:
    """ "(1x1),...,(6x6)" in tiles -> the sizes (s, s), (s, 2s), ... (6s, 6s) in pixels."""
    match = re.fullmatch(
        r"\((\d{1,9})x(\d{1,9})\),\.\.\.,\((\d{1,9})x(\d{1,9})\)", text.replace(" ", "")
    )
    if match is None:
        raise ValueError(
            f'grid_pinpoints is {show(text)}; it must be like "(1x1),...,(6x6)", or a list of sizes'
        )
    first_width, first_height, last_width, last_height = (int(part) for part in match.groups())
    widths = range(first_width, last_width + 1)
    heights = range(first_height, last_height + 1)
    # tested before the sizes are made: there may be more than memory holds
    if len(widths) * len(heights) > MOST:
        raise ValueError(
            f"grid_pinpoints is {show(text)}, which is {len(widths) * len(heights)} sizes; there "
            f"may be {MOST}"
        )
    sizes = []
    for width in widths:
        for height in heights:
            sizes.append((width * image_size, height * image_size))
    return sizes


def is_size(value: Any, image_size: int) -> bool:
    """Whether this is a (width, height) of whole tiles, and not of too many."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    for length in value:
        if type(length) is not int or length < image_size or length % image_size:
            return False
    pixels = value[0] * value[1]
    return pixels <= min(MOST * image_size**2, MOST_PIXELS)


def expand_pinpoints(pinpoints: Any, image_size: int) -> tuple[tuple[int, int], ...]:
    """Sizes in pixels, from a range of tiles "(1x1),...,(6x6)", or from a list of such sizes, which
    is only tested. Raises ValueError.
    """
    if isinstance(pinpoints, str):
        pinpoints = parse_range(pinpoints, image_size)
    if not isinstance(pinpoints, list | tuple) or not 0 < len(pinpoints) <= MOST:
        raise ValueError(
            f"grid_pinpoints is {show(pinpoints)}; it must be a list of 1 to {MOST} sizes"
        )
    for size in pinpoints:
        if not is_size(size, image_size):
            raise ValueError(
                f"grid_pinpoints has {show(size)}; it must be (width, height) in pixels, multiples "
                f"of the tile's {image_size}, with at most {MOST} tiles and "
                f"{MOST_PIXELS // 10**6} million pixels"
            )
    return tuple((width, height) for width, height in pinpoints)


def select_best_resolution(size: tuple[int, int], pinpoints: Any) -> tuple[int, int]:
    """The (width, height) of `pinpoints` that keeps most of the image's pixels; of those with as
    many the one that wastes least; of those the first.

    size: the image's (width, height). pinpoints: the expanded ones, see `expand_pinpoints`.
    """
    best = (0, 0)
    best_score = (-1, 0)
    for width, height in pinpoints:
        scale = min(width / size[0], height / size[1])
        scaled_area = int(size[0] * scale) * int(size[1] * scale)
        kept = min(scaled_area, size[0] * size[1])
        wasted = width * height - kept
        score = (kept, -wasted)
        if score > best_score:
            best = (width, height)
            best_score = score
    return best


# ---------------------------------------------------------------- picture -> tiles
def paste_centred(image: Image.Image, size: tuple[int, int], grey: int) -> Image.Image:
    """The picture in the middle of a canvas of this size and this shade of grey."""
    canvas = Image.new("RGB", size, (grey, grey, grey))
    left = (size[0] - image.width) // 2
    top = (size[1] - image.height) // 2
    canvas.paste(image, (left, top))
    return canvas


def pad_and_squash(image: Image.Image, side: int) -> Image.Image:
    """The picture in the middle of a grey square, in side x side pixels.

    These are the pixels of the official code, which makes the square, with the square of the
    picture's longer side as its number of pixels. Here it is made strip by strip: Pillow scales the
    rows first, each by itself. A picture that is longer than LONGEST_PADDED is made smaller before.
    """
    longest = max(image.size)
    if longest > LONGEST_PADDED:
        scale = 8 * side / longest  # fine enough for a tile
        width = max(round(image.width * scale), 1)
        height = max(round(image.height * scale), 1)
        image = image.resize((width, height), BICUBIC)
        longest = max(width, height)

    # the rows of the picture, each with its padding on the left and on the right, scaled
    rows_each = max(STRIP_PIXELS // longest, 1)
    strips = []
    for first in range(0, image.height, rows_each):
        last = min(first + rows_each, image.height)
        rows = image.crop((0, first, image.width, last))
        strip = paste_centred(rows, (longest, rows.height), GREY)
        strips.append(strip.resize((side, rows.height), BICUBIC))

    # then the columns, with the padding above and below
    narrow = Image.new("RGB", (side, longest), (GREY, GREY, GREY))
    top = (longest - image.height) // 2
    for strip in strips:
        narrow.paste(strip, (0, top))
        top += strip.height
    return narrow.resize((side, side), BICUBIC)


def resize_and_pad(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """Scale the picture to fit into the target, its other side rounded up, and centre it on
    black.
    """
    scale = min(target[0] / image.width, target[1] / image.height)
    width = min(math.ceil(image.width * scale), target[0])
    height = min(math.ceil(image.height * scale), target[1])
    return paste_centred(image.resize((width, height), BICUBIC), target, BLACK)


def cut_into_tiles(image: Image.Image, side: int) -> list[Image.Image]:
    """The tiles of a picture, row by row."""
    tiles = []
    for top in range(0, image.height, side):
        for left in range(0, image.width, side):
            tiles.append(image.crop((left, top, left + side, top + side)))
    return tiles


def preprocess_image(
    image: Image.Image, config: GridConfig, multi_image: bool = False
) -> ImageTiles:
    """The tiles of a picture, with values from -1 to 1, as SigLIP takes them.

    aspect anyres: the whole image squashed into one tile, then its best resolution cut into tiles.
    aspect square: the first of these alone. aspect pad, and every image of a conversation that has
    several (multi_image): one tile, padded to a square before.
    """
    image = image.convert("RGB")
    side = config.image_size
    if multi_image or config.aspect == "pad":
        tiles = [pad_and_squash(image, side)]
    else:
        tiles = [image.resize((side, side), BICUBIC)]
        if config.aspect != "square":
            best = select_best_resolution(image.size, config.grid_pinpoints)
            tiles += cut_into_tiles(resize_and_pad(image, best), side)

    arrays = [np.asarray(tile) for tile in tiles]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)  # (T, 3, S, S)
    # the bytes are put in order first: four times less to move than floats
    pixels = pixels.contiguous().float()
    return ImageTiles(pixels.div_(255).sub_(0.5).div_(0.5), image.size)


# ---------------------------------------------------------------- features -> tokens
def token_budget(config: GridConfig) -> int | None:
    """K of anyres_max_K: a grid has at most about the tokens of K tiles. None without a limit."""
    if not config.aspect.startswith("anyres_max_"):
        return None
    return int(config.aspect.removeprefix("anyres_max_"))


def padding_margins(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """(top, left): how many rows or columns of patches of a height x width map are padding, on each
    of its two sides.

    The length of the image is truncated here, where resize_and_pad rounds it up, and the margin is
    the same on both sides, so a row of padding may remain: so does the official code.
    """
    if size[0] / size[1] > width / height:
        image_height = max(int(size[1] * (width / size[0])), 1)
        return (height - image_height) // 2, 0
    image_width = max(int(size[0] * (height / size[1])), 1)
    return 0, (width - image_width) // 2


def grid_geometry(size: tuple[int, int], config: GridConfig) -> GridGeometry:
    """How the grid of an image of this (width, height) becomes a map of patches."""
    best = select_best_resolution(size, config.grid_pinpoints)
    columns = best[0] // config.image_size
    rows = best[1] // config.image_size
    height = rows * config.side
    width = columns * config.side

    top, left = padding_margins(size, height, width)
    keep = (slice(top, height - top), slice(left, width - left))
    height -= 2 * top
    width -= 2 * left

    budget = token_budget(config)
    if budget is not None:
        times = math.sqrt(height * width / (budget * config.side**2))
        if times > 1.1:  # a little more than the budget is left as it is: official
            height = max(int(height // times), 1)
            width = max(int(width // times), 1)
    return GridGeometry((columns, rows), keep, (height, width))


def count_image_tokens(num_tiles: int, size: tuple[int, int], config: GridConfig) -> int:
    """How many tokens an image has for the LLM. size: its original (width, height)."""
    if num_tiles == 1 or config.merge == "flat":
        return num_tiles * config.side**2
    height, width = grid_geometry(size, config).final
    return config.side**2 + height * (width + 1)


def assemble_map(tiles: Tensor, geometry: GridGeometry, side: int) -> Tensor:
    """Features of the grid's tiles (columns * rows, *, n*n, D) -> one map (M, h, w, D), without
    what was padding, and shrunk to the budget. M is the product of the dimensions *.
    """
    columns, rows = geometry.tiles
    width = tiles.shape[-1]
    grid = tiles.reshape(rows, columns, -1, side, side, width)
    grid = grid.permute(2, 0, 3, 1, 4, 5)  # (*, rows, n, columns, n, D)
    grid = grid.reshape(-1, rows * side, columns * side, width)
    keep_rows, keep_columns = geometry.keep
    grid = grid[:, keep_rows, keep_columns]
    if grid.shape[1:3] != geometry.final:
        grid = grid.permute(0, 3, 1, 2)  # (*, D, h, w)
        grid = F.interpolate(grid, size=geometry.final, mode="bilinear")
        grid = grid.permute(0, 2, 3, 1)  # (*, h, w, D)
    return grid


def merge_grids(
    features: Tensor, size: tuple[int, int], config: GridConfig, newline: Tensor | None = None
) -> Tensor:
    """The tokens of one image: features (T, *, n*n, D) -> (*, L, D), the base tile's first.

    merge flat: all tiles behind one another. merge spatial_unpad: the grid becomes one map, without
    what was padding, shrunk to the budget of anyres_max_K; each of its rows ends with `newline`
    (*, D), zeros when it is None. size: the original image's (width, height). Raises ValueError if
    the number of tiles is not that of the image's grid.
    """
    base = features[0]
    tiles = features[1:]
    if config.merge == "flat" or len(tiles) == 0:
        return features.movedim(0, -3).flatten(-3, -2)
    geometry = grid_geometry(size, config)
    columns, rows = geometry.tiles
    if len(tiles) != columns * rows:
        raise ValueError(
            f"{len(tiles)} tiles, but an image of {size[0]} x {size[1]} has a grid of {columns} x "
            f"{rows}"
        )

    grid = assemble_map(tiles, geometry, config.side)  # (M, h, w, D), M = the product of *
    width = base.shape[-1]
    if newline is None:
        newline = grid.new_zeros(1, width)
    newline = newline.to(grid.dtype).reshape(-1, width)  # (M or 1, D)
    ends = newline[:, None, None].expand(len(grid), grid.shape[1], 1, width)
    grid = torch.cat([grid, ends], dim=2)  # (M, h, w + 1, D)
    grid = grid.reshape(*base.shape[:-2], -1, width)  # (*, h * (w + 1), D)
    return torch.cat([base, grid], dim=-2)
