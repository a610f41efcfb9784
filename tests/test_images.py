"""images.py against transformers, closed forms, and the published ranges of the augmentation."""

import pickle

import numpy as np
import pytest
import torch
from helpers import encoded, picture, png
from PIL import Image

import images
from files import BadSample
from images import image_transform, load_image

CLIP = image_transform("clip", 16, True)


# ---------------------------------------------------------------- reading
def test_every_kind_of_picture_becomes_rgb(tmp_path):
    half = Image.new("RGBA", (2, 1), (100, 0, 0, 128))
    half.putpixel((1, 0), (9, 9, 9, 0))
    over_white = [(177, 127, 127), (255, 255, 255)]  # 255 + (100 - 255) * 128/255 = 177.2
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    red = Image.new("RGB", (2, 1), "red")
    blue = Image.new("RGB", (2, 1), "blue")
    deep = Image.fromarray(np.array([[0, 65535 // 2]], dtype=np.uint16))
    cyan_off = Image.new("CMYK", (2, 1), (0, 255, 255, 0))
    cases = [
        (encoded(half, "png"), over_white),
        (encoded(deep, "png"), [(0, 0, 0), (127, 127, 127)]),
        (encoded(palette, "png", transparency=1), [(10, 20, 30), (255, 255, 255)]),
        (encoded(palette, "png"), [(10, 20, 30), (40, 50, 60)]),
        (encoded(red, "gif", save_all=True, append_images=[blue]), [(255, 0, 0)] * 2),
        (encoded(cyan_off, "tiff"), [(255, 0, 0)] * 2),
        (encoded(Image.new("1", (2, 1), 1), "png"), [(255, 255, 255)] * 2),
    ]
    for content, colors in cases:
        (tmp_path / "file").write_bytes(content)
        for image in (load_image(content), load_image(tmp_path / "file")):
            assert image.mode == "RGB" and image.size == (2, 1)
            assert np.abs(np.array(image)[0].astype(int) - np.array(colors)).max() <= 1
    gray_with_alpha = load_image(encoded(half.convert("LA"), "png"))
    assert gray_with_alpha.mode == "RGB" and gray_with_alpha.size == (2, 1)
    assert gray_with_alpha.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("content", [b"", b"not an image", png()[:60], png()[:-30]])
def test_broken_pictures_are_named(content, tmp_path):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(BadSample, match="broken.png: not a readable image"):
        load_image(tmp_path / "broken.png")
    with pytest.raises(BadSample, match="bytes: not a readable image"):
        load_image(content)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, OSError, SyntaxError])
def test_whatever_a_decoder_raises_is_a_bad_sample(error, monkeypatch):
    content = png()

    def decode(image):
        raise error("the decoder's reason")

    monkeypatch.setattr(images, "to_rgb", decode)
    with pytest.raises(BadSample, match="bytes: not a readable image .the decoder's reason."):
        load_image(content)


# ---------------------------------------------------------------- transforms
@pytest.mark.parametrize("size", [(50, 33), (33, 50), (16, 16), (41, 40), (7, 9), (100, 20)])
def test_clip_transform_equals_transformers(size):
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    expected = processor(picture(1, size), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(CLIP(picture(1, size)).numpy(), expected, atol=2e-6)


def test_albef_squashes_and_normalises():
    pixels = image_transform("albef", 8, True)(Image.new("RGB", (30, 10), (0, 128, 255)))
    mean = [0.48145466, 0.4578275, 0.40821073]
    std = [0.26862954, 0.26130258, 0.27577711]
    expected = (np.array([0, 128, 255]) / 255 - mean) / std
    expected = np.broadcast_to(expected[:, None, None], (3, 8, 8))
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)


def test_an_unknown_transform_is_refused():
    with pytest.raises(ValueError, match="unknown image transform 'vit'"):
        image_transform("vit", 8, True)


@pytest.mark.parametrize("name, flips", [("albef_randaug_wc", 0.5), ("albef_randaug_wohf", 0.0)])
def test_random_crop_and_flip_have_the_published_ranges(name, flips, monkeypatch):
    """Red and green are the picture's own coordinates: they tell which box was cut."""
    monkeypatch.setattr(images, "RANDAUGMENT", {"Identity": lambda image, m: image})
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    ramp = Image.fromarray(np.stack([x, y, x * 0], -1).astype(np.uint8))
    transform = image_transform(name, 100, True)
    areas = []
    aspects = []
    flipped = 0
    for seed in range(300):
        pixels = transform(ramp, np.random.default_rng(seed)) * images.CLIP_STD + images.CLIP_MEAN
        red = pixels[0].mean(0) * 255
        green = pixels[1].mean(1) * 255
        width = (red[-1] - red[0]).item() * 100 / 99
        height = (green[-1] - green[0]).item() * 100 / 99
        flipped += width < 0
        areas.append(abs(width) * height / 200**2)
        aspects.append(abs(width) / height)
    assert 0.48 < min(areas) < 0.55
    assert 0.95 < max(areas) < 1.03
    assert 0.70 < np.mean(areas) < 0.78
    assert 0.73 < min(aspects) < 0.80
    assert 1.25 < max(aspects) < 1.37
    assert abs(flipped / 300 - flips) < 0.08
    evaluated = image_transform(name, 100, False)(ramp)
    assert torch.equal(evaluated, image_transform("albef", 100, True)(ramp))


def test_randaugment_magnitudes():
    dot = Image.new("RGB", (41, 41))
    dot.putpixel((20, 30), (255, 255, 255))

    def place(name, m):
        """(y, x) of the dot, rounded; what comes from outside is gray."""
        values = np.array(images.RANDAUGMENT[name](dot, m))[..., 0].astype(float)
        values[values == 128] = 0
        return np.round(np.argwhere(values == values.max()).mean(0)).tolist()

    assert place("TranslateX", 0.7) == [30, 13]
    assert place("TranslateY", -0.7) == [37, 20]
    assert place("ShearX", 0.7) == [30, 14]  # 0.21 * 30 = 6.3
    assert place("ShearY", -0.7) == [34, 20]  # 0.21 * 20 = 4.2
    assert place("Rotate", 0.7) == [29, 24]  # 21 degrees counter-clockwise: (0, 10) -> (3.6, 9.3)
    gray = Image.new("RGB", (4, 4), (100, 50, 0))
    brighter = images.RANDAUGMENT["Brightness"](gray, -0.7)
    assert brighter.getpixel((1, 1)) == (136, 68, 0)  # 0.1 + 1.8 * 0.7 = 1.36
    assert images.RANDAUGMENT["Sharpness"](gray, 0.7).getpixel((1, 1)) == (100, 50, 0)
    ramp = np.tile(np.arange(50, 150, dtype=np.uint8), (4, 1))
    stretched = np.array(images.RANDAUGMENT["AutoContrast"](Image.fromarray(ramp), 0.7))
    np.testing.assert_allclose(stretched.astype(float), (ramp - 50.0) * 255 / 99, atol=1)


def test_a_transform_is_a_function_of_the_picture_and_its_random_numbers():
    transform = image_transform("albef_randaug_wc", 16, True)
    sent = pickle.loads(pickle.dumps(transform))  # as to a worker of a DataLoader
    view = transform(picture(3), np.random.default_rng(1))
    assert torch.equal(view, sent(picture(3), np.random.default_rng(1)))
    assert not torch.equal(view, transform(picture(3), np.random.default_rng(2)))
