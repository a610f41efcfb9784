"""Pictures: any picture file -> RGB, and the transforms of the two-tower models.

Papers: ManagerTower (ACL 2023), appendix A: pre-training crops as CLIP does, VQAv2 is fine-tuned
with ALBEF's RandAugment. Official counterpart: ManagerTower's transforms, `clip_transform`,
`albef_transform` and `albef_transform_randaug_wc`, `..._wohf`.

A transform is a function (picture, rng) -> float32 (3, S, S), S pixels a side, normalised with
CLIP's mean and standard deviation. Its random numbers come from `rng` alone.
"""

import functools
import io
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from files import BadSample, read_bytes

CLIP_MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
CLIP_STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
GRAY = (128, 128, 128)
BICUBIC = Image.Resampling.BICUBIC
BILINEAR = Image.Resampling.BILINEAR

# ---------------------------------------------------------------- reading
# what Pillow's decoders raise on broken files
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode and convert: 16-bit gray is scaled, what is transparent lies over white."""
    image.load()
    # Pillow would cut 16 bits off at 255
    if image.mode.startswith("I"):
        gray = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(gray.round().astype(np.uint8))
    bands = image.getbands()
    if "transparency" in image.info or "A" in bands or "a" in bands:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def load_image(where: str | Path | bytes | Image.Image) -> Image.Image:
    """RGB from a path, `archive.tar::member`, the bytes of a file, or a picture.

    Of an animation the first frame is taken; EXIF is ignored, as in the official code. Raises
    BadSample, which names what cannot be read.
    """
    name = "bytes" if isinstance(where, bytes) else where
    try:
        if isinstance(where, Image.Image):
            return to_rgb(where)
        content = where if isinstance(where, bytes) else read_bytes(where)
        return to_rgb(Image.open(io.BytesIO(content)))
    except DECODER_ERRORS as error:
        raise BadSample(f"{name}: not a readable image ({error})") from None


# ---------------------------------------------------------------- cutting
def clip_crop(image: Image.Image, size: int) -> Image.Image:
    """The short side scaled to `size`, and the square in the centre: CLIP's preprocessing."""
    short_side = min(image.size)
    scaled_width = int(size * image.width / short_side)
    scaled_height = int(size * image.height / short_side)
    image = image.resize((scaled_width, scaled_height), BICUBIC)
    # the rounding of torchvision's CenterCrop
    left = round((scaled_width - size) / 2)
    top = round((scaled_height - size) / 2)
    return image.crop((left, top, left + size, top + size))


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


def normalize(image: Image.Image) -> Tensor:
    """RGB -> (3, S, S), with CLIP's mean and standard deviation."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()  # (S, S, 3) -> (3, S, S)
    return pixels.div_(255).sub_(CLIP_MEAN).div_(CLIP_STD).contiguous()


def clip_transform(size: int, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
    return normalize(clip_crop(image, size))


def albef_transform(
    size: int, image: Image.Image, rng: np.random.Generator | None = None
) -> Tensor:
    return normalize(squash(image, size))


def randaug_wc_transform(size: int, image: Image.Image, rng: np.random.Generator) -> Tensor:
    """Random crop, flip, RandAugment."""
    image = random_resized_crop(image, size, rng)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return normalize(randaugment(image, rng))


def randaug_wohf_transform(size: int, image: Image.Image, rng: np.random.Generator) -> Tensor:
    """Without the flip, which would turn "left" in a question into a lie."""
    image = random_resized_crop(image, size, rng)
    return normalize(randaugment(image, rng))


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


def image_transform(name: str, image_size: int, train: bool) -> Transform:
    """A function (picture, rng) -> (3, S, S), S = image_size. ValueError: an unknown name."""
    transforms = TRAINING_TRANSFORMS if train else EVALUATION_TRANSFORMS
    if name not in transforms:
        raise ValueError(f"unknown image transform {name!r}: one of {', '.join(transforms)}")
    return functools.partial(transforms[name], image_size)
