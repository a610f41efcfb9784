"""multigrid.py"""
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from typing import NamedTuple
import math
import numpy as np
import re
import torch
from typing import Protocol


BICUBIC = Image.Resampling.BICUBIC


class GridConfig(Protocol):
    """What multi-grid reads of a LlavaManagerConfig."""

    image_size: int
    aspect: str
    merge: str
    grid_pinpoints: tuple | str

    @property
    def side(self) -> int: ...


class ImageTiles(NamedTuple):
    pixels: Tensor  # (T, 3, S, S): the base tile, then the grid row by row
    size: tuple[int, int]  # of the original image


def expand_pinpoints(pinpoints, image_size: int) -> tuple[tuple[int, int], ...]:
    """"(1x1),...,(6x6)" -> ((s, s), (s, 2s), ..., (6s, 6s)); a list of sizes in pixels is only checked."""
    if isinstance(pinpoints, str):
        span = re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", pinpoints.replace(" ", ""))
        if not span:
            raise ValueError(f'grid_pinpoints is {pinpoints!r}; it must be like "(1x1),...,(6x6)", or a list of sizes')
        w0, h0, w1, h1 = map(int, span.groups())
        pinpoints = [(w * image_size, h * image_size) for w in range(w0, w1 + 1) for h in range(h0, h1 + 1)]
    pinpoints = tuple((int(w), int(h)) for w, h in pinpoints)
    if not pinpoints or any(x < image_size or x % image_size for size in pinpoints for x in size):
        raise ValueError(f"grid_pinpoints {pinpoints} must be sizes in pixels, multiples of the tile's {image_size}")
    return pinpoints


def select_best_resolution(size: tuple[int, int], pinpoints) -> tuple[int, int]:
    """The (width, height) of `pinpoints` that keeps most of the image's pixels, then wastes least, then comes first."""
    def key(candidate):
        scale = min(candidate[0] / size[0], candidate[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - candidate[0] * candidate[1]
    return max(map(tuple, pinpoints), key=key)


def paste_centred(image: Image.Image, size: tuple[int, int], grey: int) -> Image.Image:
    canvas = Image.new("RGB", size, (grey,) * 3)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def resize_and_pad(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """Scale to fit into the target, the other side rounded up, and centre on black."""
    scale = min(target[0] / image.width, target[1] / image.height)
    fit = [min(math.ceil(x * scale), limit) for x, limit in zip(image.size, target)]
    return paste_centred(image.resize(fit, BICUBIC), target, 0)


def preprocess_image(image: Image.Image, config: GridConfig, multi_image: bool = False) -> ImageTiles:
    """The tiles that SigLIP sees. anyres: the whole image squashed into one, then its best resolution cut into tiles;
    square: the first alone; pad, and every image of a conversation that has several (multi_image): one tile, padded."""
    image, s = image.convert("RGB"), config.image_size
    tiles = [image]
    if multi_image or config.aspect == "pad":
        tiles = [paste_centred(image, (max(image.size), max(image.size)), 127)]
    elif config.aspect != "square":
        big = resize_and_pad(image, select_best_resolution(image.size, config.grid_pinpoints))
        tiles += [big.crop((x, y, x + s, y + s)) for y in range(0, big.height, s) for x in range(0, big.width, s)]
    pixels = torch.from_numpy(np.stack([np.asarray(tile.resize((s, s), BICUBIC)) for tile in tiles]))
    return ImageTiles(pixels.permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5).contiguous(), image.size)


def grid_geometry(size: tuple[int, int], config: GridConfig) -> tuple:
    """(columns, rows) of tiles; the slices (rows, columns) of their map of patches that are not padding; the final
    (height, width) of the map, smaller than the slices where anyres_max_K shrinks it."""
    columns, rows = (x // config.image_size for x in select_best_resolution(size, config.grid_pinpoints))
    h, w = rows * config.side, columns * config.side
    # truncated, where resize_and_pad rounds up, and the same margin on both sides: so does the official code
    if size[0] / size[1] > w / h:
        top, left = (h - max(int(size[1] * (w / size[0])), 1)) // 2, 0
    else:
        top, left = 0, (w - max(int(size[0] * (h / size[1])), 1)) // 2
    keep = slice(top, h - top), slice(left, w - left)
    h, w = h - 2 * top, w - 2 * left
    if "max" in config.aspect:
        times = math.sqrt(h * w / (int(config.aspect.rpartition("_")[2]) * config.side**2))
        if times > 1.1:
            h, w = int(h // times), int(w // times)
    return (columns, rows), keep, (h, w)


def count_image_tokens(num_tiles: int, size: tuple[int, int], config: GridConfig) -> int:
    if num_tiles == 1 or config.merge == "flat":
        return num_tiles * config.side**2
    h, w = grid_geometry(size, config)[2]
    return config.side**2 + h * (w + 1)


def merge_grids(features: Tensor, size: tuple[int, int], config: GridConfig,
                newline: Tensor | None = None) -> Tensor:
    """The tokens of one image: features (T, *, n*n, D) -> (*, tokens, D), the base tile's first.
    spatial_unpad: the grid becomes one map, without what was padding, shrunk to the budget of anyres_max_K; each row
    ends with `newline` (*, D), zeros when it is None. size: the original image's (width, height)."""
    base, tiles, n = features[0], features[1:], config.side
    if config.merge == "flat" or len(tiles) == 0:
        return features.movedim(0, -3).flatten(-3, -2)
    (columns, rows), keep, (h, w) = grid_geometry(size, config)
    if len(tiles) != columns * rows:
        raise ValueError(f"{len(tiles)} tiles, but an image of {size[0]} x {size[1]} has a grid of {columns} x {rows}")
    *shape, _, width = base.shape
    grid = tiles.reshape(rows, columns, -1, n, n, width).permute(2, 0, 3, 1, 4, 5)
    grid = grid.reshape(-1, rows * n, columns * n, width)[:, keep[0], keep[1]]  # (M, h, w, D)
    if grid.shape[1:3] != (h, w):
        grid = F.interpolate(grid.permute(0, 3, 1, 2), size=(h, w), mode="bilinear").permute(0, 2, 3, 1)
    newline = grid.new_zeros(1, width) if newline is None else newline.to(grid.dtype).reshape(-1, width)
    grid = torch.cat([grid, newline[:, None, None].expand(len(grid), h, 1, width)], dim=2)
    return torch.cat([base, grid.reshape(*shape, -1, width)], dim=-2)
