"""Pictures: any picture file -> RGB, and the transforms of the two-tower models.

Papers: ManagerTower (ACL 2023), appendix A: pre-training crops as CLIP does, VQAv2 is fine-tuned
with ALBEF's RandAugment. Official counterpart: ManagerTower's transforms, `clip_transform`,
`albef_transform` and `albef_transform_randaug_wc`, `..._wohf`.

A transform is a function (picture, rng) -> float32 (3, S, S), S pixels a side, normalised with the
mean and the standard deviation that its image encoder was trained with. Its random numbers come
from `rng` alone.
"""

import contextlib
import functools
import io
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError
from torch import Tensor

from fields import show
from files import BadSample, read_bounded
from world import first_line_of, silent_libraries


class Colours(NamedTuple):
    """What an image encoder was trained with: mean and standard deviation of red, green and blue,
    where pixels are from 0 to 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


CLIP_COLOURS = Colours((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_COLOURS = Colours((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # DeiT and DINOv2
VIT_COLOURS = Colours((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def as_pixels(colours: Sequence[float]) -> Tensor:
    """Three numbers -> (3, 1, 1), beside pixels (3, S, S)."""
    return torch.tensor(colours).view(3, 1, 1)


CLIP_MEAN = as_pixels(CLIP_COLOURS.mean)
CLIP_STD = as_pixels(CLIP_COLOURS.std)
GRAY = (128, 128, 128)
BICUBIC = Image.Resampling.BICUBIC
BILINEAR = Image.Resampling.BILINEAR

# its remarks on broken files would stand among our lines
logging.getLogger("PIL").addHandler(logging.NullHandler())

# ---------------------------------------------------------------- reading
# Pillow knows more formats. EPS runs a program, and the others hold no pictures of datasets. TGA is
# the last one, as it is not known by its first bytes.
FORMATS = (
    "JPEG",
    "PNG",
    "GIF",
    "WEBP",
    "BMP",
    "DIB",
    "TIFF",
    "AVIF",
    "JPEG2000",
    "PPM",
    "ICO",
    "QOI",
    "PCX",
    "TGA",
)
MOST_PIXELS = 64_000_000  # of a picture; the file's header is asked before anything is decoded
MOST_SIDE = 65_535  # pixels along a side, as in JPEG
MOST_BYTES = 512 * 2**20  # of a picture's file: 64 million pixels of 8 bytes


def check_size(size: tuple[int, int]) -> None:
    """Raises ValueError for a (width, height) that is not read."""
    width, height = size
    found = f"it has {width} x {height} pixels"
    if min(size) < 1:
        raise ValueError(f"{found}, so there is nothing to see")
    if max(size) > MOST_SIDE or width * height > MOST_PIXELS:
        raise ValueError(
            f"{found}; at most {MOST_PIXELS // 10**6} million are read, and {MOST_SIDE} along a "
            "side"
        )


# tags of TIFF
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262  # 0: the lowest number is white
COLOR_MAP = 320
SAMPLE_FORMAT = 339  # 2: numbers with a sign


def check_tiff(image: Image.Image) -> None:
    """Raises ValueError for a TIFF that Pillow would read as another picture than it is.

    To be called before it is decoded.
    """
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return
    area = 0
    for part in getattr(image, "tile", ()):
        left, top, right, bottom = part[1]
        area += (right - left) * (bottom - top)
    if 0 < area < image.width * image.height:
        raise ValueError("it is a TIFF that lacks some of its strips or tiles")
    if max(tags.get(COLOR_MAP, (65535,))) < 256:
        raise ValueError(
            "it is a TIFF with a palette of 8 bits, which would be black; it must have 16 bits"
        )
    if image.mode.startswith("I") or tags.get(SAMPLE_FORMAT) in (2, (2,)):
        check_gray_tiff(tags)


def check_gray_tiff(tags: Any) -> None:
    """Raises ValueError for gray TIFFs whose numbers Pillow gives without their meaning."""
    bits = tags.get(BITS_PER_SAMPLE, 16)
    if isinstance(bits, tuple):
        bits = bits[0]
    has_sign = tags.get(SAMPLE_FORMAT, 1) in (2, (2,)) and bits != 32
    if bits not in (16, 32) or tags.get(PHOTOMETRIC) == 0 or has_sign:
        raise ValueError(
            f"it is a gray TIFF of {bits} bits that are signed, or inverted, or few; convert it to "
            "8 bits, or to 16 from black to white"
        )


# how Pillow calls the pixels of a PNG that it scales, though not the transparent colour among them
GRAY_SCALES = {"L;2": 85, "L;4": 17}  # from 2 or 4 bits to 8
RGB_OF_16_BITS = "RGB;16B"  # it takes the upper 8


def scale_transparency(image: Image.Image) -> None:
    """The transparent colour of a PNG, in the numbers that Pillow gives its pixels.

    To be called before it is decoded.
    """
    transparency: Any = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    if image.format != "PNG" or transparency is None or not tiles:
        return
    raw_mode = tiles[0][3]
    if raw_mode in GRAY_SCALES:
        scale = GRAY_SCALES[raw_mode]
        image.info["transparency"] = transparency * scale % 256
    elif raw_mode == RGB_OF_16_BITS:
        image.info["transparency"] = tuple(value >> 8 for value in transparency)


def check_palette(image: Image.Image) -> None:
    """Raises ValueError for pixels of a colour that the palette lacks; Pillow paints them black."""
    if image.mode not in ("P", "PA"):
        return
    num_colours = len(image.getpalette() or ()) // 3
    for index, count in enumerate(image.histogram()[:256]):
        is_lacking = count > 0 and index >= num_colours
        if is_lacking and index != image.info.get("transparency"):
            raise ValueError(
                f"it has pixels of the colour {index}, but its palette has {num_colours} colours"
            )


def check_rows(content: bytes, image: Image.Image) -> None:
    """Raises ValueError for a PNG without its last rows, which Pillow leaves black.

    image: what was decoded. In interlaced files every second row comes last.
    """
    corner = (max(image.width - 2, 0), max(image.height - 2, 0), image.width, image.height)
    pixels = np.asarray(image.crop(corner))
    num_pixels = pixels.shape[0] * pixels.shape[1]
    if pixels.reshape(num_pixels, -1).any(axis=1).all():
        return
    # some of them are black: are they still so, where all is white before?
    again = Image.open(io.BytesIO(content), formats=("PNG",))
    num_bands = len(again.getbands())
    white = 255 if num_bands == 1 else (255,) * num_bands
    again.im = Image.new(again.mode, again.size, white).im
    if not np.array_equal(np.asarray(again.crop(corner)), pixels):
        raise ValueError("it is a PNG that lacks its last rows")


def scale_gray(image: Image.Image) -> Image.Image:
    """Gray of 16 bits -> of 8 bits. Raises ValueError for values of another range.

    Pillow has them in mode "I;16", and in the 32 bits of mode "I" where the file is PPM or has
    signed numbers.
    """
    gray = np.asarray(image)
    low = int(gray.min())
    high = int(gray.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"its pixels are whole numbers from {low} to {high}, where 0 to 65535 is read; "
            "convert it to 8 or 16 bits"
        )
    # PPM says what white is, and Pillow scales by it
    if 0 < high < 256 and image.format != "PPM":
        raise ValueError(
            f"its pixels have more than 8 bits, but are only from {low} to {high}, which would be "
            "black; convert it to 8 bits"
        )
    # v / 257, rounded
    scaled = gray.astype(np.uint32)
    scaled += 128
    scaled //= 257
    transparent: Any = image.info.get("transparency")
    if transparent is not None:
        scaled[gray == transparent] = 255  # it lies over white
    return Image.fromarray(scaled.astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode and convert: 16-bit gray is scaled, what is transparent lies over white.

    Raises ValueError for a size or for pixels that are not read, or whatever the decoder raises.
    """
    check_size(image.size)
    check_tiff(image)
    scale_transparency(image)
    image.load()
    check_size(image.size)  # the header of an icon may lie
    check_palette(image)
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers, whose range is unknown; convert it to 8 or 16 "
            "bits"
        )
    # Pillow would cut 16 bits off at 255
    if image.mode.startswith("I"):
        image = scale_gray(image)
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow converts it to
    bands = image.getbands()
    if "transparency" in image.info or "A" in bands or "a" in bands:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


ORIENTATION = 0x0112  # the number of EXIF's tag
# its value -> what turns the picture upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """How a picture is to be turned by its EXIF; None for one that is upright, or whose EXIF is
    broken.
    """
    try:
        orientation: Any = image.getexif().get(ORIENTATION)
        return TURNS.get(orientation)
    except Exception:  # its pixels are read all the same
        return None


def decode(source: bytes | Image.Image, upright: bool) -> Image.Image:
    """RGB from the bytes of a file, or from a picture. Raises whatever Pillow raises."""
    image = source
    if isinstance(image, bytes):
        if not image:
            raise ValueError("the file is empty")
        image = Image.open(io.BytesIO(image), formats=FORMATS)
    # libtiff writes its remarks on stderr by itself
    remarks = silent_libraries() if image.format == "TIFF" else contextlib.nullcontext()
    with remarks:
        picture = to_rgb(image)
    if image.format == "PNG" and isinstance(source, bytes):
        check_rows(source, image)
    turn = turn_of(image) if upright else None
    return picture if turn is None else picture.transpose(turn)


def reason_of(error: Exception) -> str:
    """Why a picture cannot be decoded, in a line: the words of Pillow, without its objects."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
        return f"at most {MOST_PIXELS // 10**6} million pixels are read, and it has far more"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    return first_line_of(error)


def name_of(where: str | Path | bytes | Image.Image) -> str:
    """What a message calls a picture: its path, in quotes where it would not be one plain line."""
    if isinstance(where, bytes):
        return "bytes"
    if isinstance(where, Image.Image):
        return "picture"
    name = str(where)
    is_plain = name.isprintable() and 0 < len(name) <= 500
    return name if is_plain else show(name)


def read_file(where: str | Path) -> bytes:
    """The bytes of a picture's file. Raises BadSample."""
    name = name_of(where)
    try:
        return read_bounded(where, MOST_BYTES)
    except OSError as error:
        raise BadSample(f"{name}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise BadSample(f"{name}: there is not enough memory to read it") from None
    except ValueError as error:
        reason = str(error)
        if reason.startswith(str(where)):  # the path may be as long as it likes
            reason = f"{name}: {reason[len(str(where)) :].lstrip(': ')}"
        raise BadSample(reason) from None


def load_image(where: str | Path | bytes | Image.Image, upright: bool = False) -> Image.Image:
    """RGB from a path, `archive.tar::member`, the bytes of a file, or a picture.

    Of an animation the first frame is taken. EXIF is ignored, as in the official code, unless
    `upright`: then the picture is turned as a viewer shows it. Raises BadSample, which names what
    cannot be read.
    """
    source = read_file(where) if isinstance(where, str | Path) else where
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and broken EXIF
            return decode(source, upright)
    except Exception as error:  # decoders raise what they like: no list of types would be complete
        reason = reason_of(error)
    raise BadSample(f"{name_of(where)}: not a readable image ({reason})")


# ---------------------------------------------------------------- cutting
def clip_crop(image: Image.Image, size: int) -> Image.Image:
    """The short side scaled to `size`, and the square in the centre: CLIP's preprocessing."""
    short_side = min(image.size)
    scaled_width = int(size * image.width / short_side)
    scaled_height = int(size * image.height / short_side)
    # the rounding of torchvision's CenterCrop
    left = round((scaled_width - size) / 2)
    top = round((scaled_height - size) / 2)
    right = left + size
    bottom = top + size
    if scaled_width * scaled_height <= 2 * MOST_PIXELS:
        image = image.resize((scaled_width, scaled_height), BICUBIC)
        return image.crop((left, top, right, bottom))

    # Of a line of 2 x 8000 pixels only the middle is scaled, as the whole would take gigabytes. It
    # is not done so for others: Pillow's rounding is not the same to the bit.
    x_scale = image.width / scaled_width
    y_scale = image.height / scaled_height
    box = (
        left * x_scale,
        top * y_scale,
        min(right * x_scale, image.width),
        min(bottom * y_scale, image.height),
    )
    return image.resize((size, size), BICUBIC, box=box)


def squash(image: Image.Image, size: int) -> Image.Image:
    """The whole picture in size x size pixels, whatever its aspect ratio."""
    return image.resize((size, size), BICUBIC)


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """A part of random area and aspect ratio, squashed; after ten misfits the whole picture."""
    for _ in range(10):
        area = image.width * image.height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width = round(math.sqrt(area * aspect))
        height = round(math.sqrt(area / aspect))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(rng.integers(image.width - width + 1))
            top = int(rng.integers(image.height - height + 1))
            box = (left, top, left + width, top + height)
            return image.resize((size, size), BICUBIC, box=box)
    return squash(image, size)


# ---------------------------------------------------------------- ALBEF's RandAugment
# An operation takes (picture, m). m is +0.7 or -0.7: magnitude 7 of 10, with a random sign.
Operation = Callable[[Image.Image, float], Image.Image]


def affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """matrix: (a, b, c, d, e, f); the pixel (x, y) comes from (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, BILINEAR, fillcolor=GRAY)


def identity(image: Image.Image, m: float) -> Image.Image:
    return image


def auto_contrast(image: Image.Image, m: float) -> Image.Image:
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, m: float) -> Image.Image:
    return ImageOps.equalize(image)


def brightness(image: Image.Image, m: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * abs(m))


def sharpness(image: Image.Image, m: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * abs(m))


def shear_x(image: Image.Image, m: float) -> Image.Image:
    return affine(image, (1, 0.3 * m, 0, 0, 1, 0))


def shear_y(image: Image.Image, m: float) -> Image.Image:
    return affine(image, (1, 0, 0, 0.3 * m, 1, 0))


def translate_x(image: Image.Image, m: float) -> Image.Image:
    return affine(image, (1, 0, 10 * m, 0, 1, 0))


def translate_y(image: Image.Image, m: float) -> Image.Image:
    return affine(image, (1, 0, 0, 0, 1, 10 * m))


def rotate(image: Image.Image, m: float) -> Image.Image:
    return image.rotate(30 * m, BILINEAR, fillcolor=GRAY)


RANDAUGMENT: dict[str, Operation] = {
    "Identity": identity,
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
}


def randaugment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Two random operations, each applied with chance 1/2."""
    for operation in rng.choice(list(RANDAUGMENT), 2):
        # both are drawn whether the operation is applied or not
        sign = rng.choice((-1, 1))
        is_applied = rng.random() < 0.5
        if is_applied:
            image = RANDAUGMENT[operation](image, 0.7 * sign)
    return image


# ---------------------------------------------------------------- the transforms
Transform = Callable[..., Tensor]  # (picture, rng) -> (3, S, S)


def normalize(image: Image.Image, mean: Tensor = CLIP_MEAN, std: Tensor = CLIP_STD) -> Tensor:
    """RGB -> (3, S, S), in units of std around the mean, which are (3, 1, 1)."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (S, S, 3) -> (3, S, S)
    # the bytes are put in order first: four times less to move than floats
    pixels = pixels.contiguous().float()
    return pixels.div_(255).sub_(mean).div_(std)


def clip_transform(
    size: int, image: Image.Image, rng: np.random.Generator | None = None, **colours: Tensor
) -> Tensor:
    return normalize(clip_crop(image, size), **colours)


def albef_transform(
    size: int, image: Image.Image, rng: np.random.Generator | None = None, **colours: Tensor
) -> Tensor:
    return normalize(squash(image, size), **colours)


def randaug_wc_transform(
    size: int, image: Image.Image, rng: np.random.Generator, **colours: Tensor
) -> Tensor:
    """Random crop, flip, RandAugment."""
    image = random_resized_crop(image, size, rng)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return normalize(randaugment(image, rng), **colours)


def randaug_wohf_transform(
    size: int, image: Image.Image, rng: np.random.Generator, **colours: Tensor
) -> Tensor:
    """Without the flip, which would turn "left" in a question into a lie."""
    image = random_resized_crop(image, size, rng)
    return normalize(randaugment(image, rng), **colours)


# the papers pre-train with "clip", without any augmentation
TRAINING_TRANSFORMS: dict[str, Transform] = {
    "clip": clip_transform,
    "albef": albef_transform,
    "albef_randaug_wc": randaug_wc_transform,
    "albef_randaug_wohf": randaug_wohf_transform,
}
EVALUATION_TRANSFORMS: dict[str, Transform] = {
    "clip": clip_transform,
    "albef": albef_transform,
    "albef_randaug_wc": albef_transform,
    "albef_randaug_wohf": albef_transform,
}


def image_transform(
    name: str,
    image_size: int,
    train: bool,
    mean: Sequence[float] = CLIP_COLOURS.mean,
    std: Sequence[float] = CLIP_COLOURS.std,
) -> Transform:
    """A function (picture, rng) -> (3, S, S), S = image_size. ValueError: an unknown name."""
    transforms = TRAINING_TRANSFORMS if train else EVALUATION_TRANSFORMS
    if name not in transforms:
        raise ValueError(f"unknown image transform {show(name)}: one of {', '.join(transforms)}")
    transform = transforms[name]
    return functools.partial(transform, image_size, mean=as_pixels(mean), std=as_pixels(std))


def tower_transform(name: str, config: Any, train: bool) -> Transform:
    """The transform of this name for a two-tower model: its image size and its encoder's colours.

    config: a ManagerTowerConfig.
    """
    return image_transform(name, config.image_size, train, config.image_mean, config.image_std)
