"""images.py"""
from PIL import Image
from PIL import ImageEnhance
from PIL import ImageOps
import functools
import io
import math
import numpy as np
import torch
from files import BadSample, read_bytes


CLIP_MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)


CLIP_STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


GRAY = (128, 128, 128)


def load_image(where) -> Image.Image:
    """RGB from a path, `archive.tar::member`, bytes or a picture: transparency over white, an animation's first frame,
    16-bit gray scaled, EXIF ignored. BadSample names what cannot be read."""
    try:
        content = where if isinstance(where, (bytes, Image.Image)) else read_bytes(where)
        image = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
        image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if "transparency" in image.info or {*image.getbands()} & {"A", "a"}:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(f"{'bytes' if isinstance(where, bytes) else where}: not a readable image ({error})") from None


def random_resized_crop(image, size, rng, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)):
    """A part of random area and aspect ratio, squashed to size x size; the whole picture after ten misfits."""
    width, height = image.size
    for _ in range(10):
        area, aspect = width * height * rng.uniform(*scale), math.exp(rng.uniform(*map(math.log, ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return image.resize((size, size), Image.BICUBIC, box=(left, top, left + w, top + h))
    return image.resize((size, size), Image.BICUBIC)


def _affine(image, *matrix):
    return image.transform(image.size, Image.AFFINE, matrix, Image.BILINEAR, fillcolor=GRAY)


RANDAUGMENT = {  # ALBEF's operations; m = +-0.7 is magnitude 7 of 10 with a random sign
    "Identity": lambda image, m: image,
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "Equalize": lambda image, m: ImageOps.equalize(image),
    "Brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * abs(m)),
    "Sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * abs(m)),
    "ShearX": lambda image, m: _affine(image, 1, 0.3 * m, 0, 0, 1, 0),
    "ShearY": lambda image, m: _affine(image, 1, 0, 0, 0.3 * m, 1, 0),
    "TranslateX": lambda image, m: _affine(image, 1, 0, 10 * m, 0, 1, 0),
    "TranslateY": lambda image, m: _affine(image, 1, 0, 0, 0, 1, 10 * m),
    "Rotate": lambda image, m: image.rotate(30 * m, Image.BILINEAR, fillcolor=GRAY)}


def image_transform(name: str, image_size: int, train: bool):
    """A function (picture, rng) -> float32 (3, S, S), normalised with CLIP's mean and standard deviation.
    "clip": short side and centre crop, in training too (as the papers pre-train); "albef": squash to S x S; in training
    "albef_randaug_wc": random crop, flip, two operations of RANDAUGMENT, each with chance 1/2; "..._wohf": no flip."""
    if name not in ("clip", "albef", "albef_randaug_wc", "albef_randaug_wohf"):
        raise ValueError(f"unknown image transform {name!r}: one of clip, albef, albef_randaug_wc, albef_randaug_wohf")
    return functools.partial(_transform, name, image_size, train)


def _transform(name, size, train, image, rng=None):
    if name == "clip":
        image = image.resize([int(size * side / min(image.size)) for side in image.size], Image.BICUBIC)
        left, top = (round((side - size) / 2) for side in image.size)
        image = image.crop((left, top, left + size, top + size))
    elif name == "albef" or not train:
        image = image.resize((size, size), Image.BICUBIC)
    else:
        image = random_resized_crop(image, size, rng)
        if name == "albef_randaug_wc" and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        for operation in rng.choice(list(RANDAUGMENT), 2):
            sign, applied = rng.choice((-1, 1)), rng.random() < 0.5
            image = RANDAUGMENT[operation](image, 0.7 * sign) if applied else image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return pixels.div_(255).sub_(CLIP_MEAN).div_(CLIP_STD).contiguous()
