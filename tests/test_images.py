"""images.py against transformers, closed forms, and the published ranges of the augmentation."""

import io
import math
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from helpers import ROOT, encoded, picture, png
from PIL import Image, ImageOps

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


# ---------------------------------------------------------------- pictures of every kind
FORMATS = "PNG JPEG MPO GIF WEBP BMP DIB TIFF AVIF JPEG2000 PPM ICO QOI PCX TGA".split()


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_is_read(file_format):
    content = encoded(Image.new("RGB", (16, 16), (200, 30, 90)), file_format)
    found = load_image(content)
    assert found.mode == "RGB" and found.size == (16, 16)
    assert np.abs(np.array(found).astype(int) - [200, 30, 90]).max() <= 6


def in_mode(mode):
    """A red picture in a mode."""
    red = Image.new("RGB", (3, 2), "red")
    if mode in ("PA", "La", "RGBa"):
        return red.convert({"PA": "P", "La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    if mode == "LAB":
        return Image.new("LAB", (3, 2), (136, 208, 195))  # L* 53, a* 80, b* 67, about red
    return red.convert(mode)


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "P", "PA"]
)
def test_a_red_picture_of_any_mode_is_red(mode):
    assert np.abs(np.array(load_image(in_mode(mode))).astype(int) - [255, 0, 0]).max() <= 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La"])
def test_a_picture_without_colours_is_gray(mode):
    found = np.array(load_image(in_mode(mode).copy()))
    assert (found[..., 0] == found[..., 2]).all()
    if mode != "1":
        assert found[0, 0, 0] == 76  # 0.299 * 255


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_sixteen_bits_are_scaled(mode):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = Image.frombytes(mode, (256, 256), values.astype(">u2" if "B" in mode else "<u2"))
    expected = (values / 257).round()
    assert (np.array(load_image(image))[..., 1] == expected).all()


def test_thirty_two_bits_are_those_of_sixteen():
    sixteen = Image.fromarray(np.array([[0, 300, 65535]], dtype=np.int32))
    assert np.array(load_image(encoded(sixteen, "TIFF")))[0, :, 0].tolist() == [0, 1, 255]
    black = encoded(Image.new("I", (2, 2)), "TIFF")
    assert load_image(black).getpixel((0, 0)) == (0, 0, 0)
    dark = b"P5 2 1 65535\n" + bytes([0, 200, 0, 255])  # PPM says that white is 65535
    assert load_image(dark).getpixel((1, 0)) == (1, 1, 1)


def test_a_palette_whose_transparency_is_cut_short_or_too_long():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    half = load_image(encoded(palette, "PNG", transparency=b"\x00"))
    assert [half.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]
    long = load_image(encoded(palette, "PNG", transparency=b"\xff" * 200))
    assert long.getpixel((1, 0)) == (40, 50, 60)


# ---------------------------------------------------------------- bad pictures
def chunk(name, content):
    """A chunk of a PNG file."""
    size = struct.pack(">I", len(content))
    return size + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of_zeros(width, height, bits=8, color=0, row_bytes=None):
    """A PNG of black, whatever its size: the rows are made one after the other."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    row = bytes(1 + (width if row_bytes is None else row_bytes))
    compressor = zlib.compressobj(1)
    packed = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", packed), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width, height):
    """A PNG whose header says this, with no pixels for it."""
    whole = png_of_zeros(1, 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return whole[:8] + chunk(b"IHDR", header) + whole[33:]


def numbers(*values, dtype):
    return encoded(Image.fromarray(np.array([values], dtype=dtype)), "TIFF")


def icon_of_another_size():
    """An icon of 16 x 16 pixels by its header, with a large PNG inside."""
    inner = png_of_zeros(9000, 9000, 1, row_bytes=1125)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inner


NONE = "it is none of JPEG, PNG"
PIXELS = "at most 64 million are read, and 65535 along a side"
BAD_PICTURES = {
    "empty": (b"", "the file is empty"),
    "text": (b"not an image", NONE),
    "zeros": (bytes(5000), NONE),
    "html": (b"<!DOCTYPE html><html>404</html>" * 50, NONE),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', NONE),
    "pdf": (b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n", NONE),
    "eps": (encoded(Image.new("RGB", (9, 9)), "EPS"), NONE),
    "sgi": (encoded(Image.new("RGB", (9, 9)), "SGI"), NONE),
    "im": (encoded(Image.new("RGB", (9, 9)), "IM"), NONE),
    "dds": (encoded(Image.new("RGB", (9, 9)), "DDS"), NONE),
    "zip": (b"PK\x03\x04" + bytes(90), NONE),
    "png, 60 bytes": (png()[:60], "not enough image data|truncated|Truncated"),
    "png, no end": (png()[:-30], "truncated|Truncated|broken"),
    "png, 12 bytes": (png()[:12], NONE),
    "png, 0 wide": (png_header(0, 5), "0 x 5|none of"),
    "png, too few pixels": (png_header(500, 500), "truncated|Truncated|not enough|broken"),
    "png, 20000 wide": (png_header(20000, 5000), f"20000 x 5000 pixels; {PIXELS}"),
    "png, 4 billion": (png_header(65000, 65000), "at most 64 million"),
    "png, a line": (png_header(70000, 1), f"70000 x 1 pixels; {PIXELS}"),
    "png, 13000 x 13000": (png_of_zeros(13000, 13000, 1, row_bytes=1625), PIXELS),
    "ppm, a header": (b"P6 9000 9000 255\n", f"9000 x 9000 pixels; {PIXELS}"),
    "ppm, 0": (b"P6 0 0 255\n", "."),
    "ppm, words": (b"P6 a b 255\n", "."),
    "pfm": (b"Pf 1 1 -1.0\n" + bytes(4), "floating-point numbers"),
    "icon with a large picture": (icon_of_another_size(), f"9000 x 9000 pixels; {PIXELS}"),
    "float 0..1": (numbers(0.0, 0.5, 1.0, dtype=np.float32), "floating-point .* 8 or 16 bits"),
    "float 0..255": (numbers(0.0, 255.0, dtype=np.float32), "floating-point"),
    "float nan": (numbers(0.0, math.nan, dtype=np.float32), "floating-point"),
    "float inf": (numbers(0.0, math.inf, dtype=np.float32), "floating-point"),
    "32 bits 0..255": (
        numbers(0, 9, 255, dtype=np.int32),
        "more than 8 bits, but are only from 0 to 255",
    ),
    "32 bits negative": (numbers(-1, 900, dtype=np.int32), "from -1 to 900, where 0 to 65535"),
    "32 bits large": (numbers(0, 2**31 - 1, dtype=np.int32), "to 2147483647, where 0 to 65535"),
    "0 x 0": (Image.new("RGB", (0, 0)), "0 x 0 pixels, so there is nothing to see"),
    "3 x 0": (Image.new("L", (3, 0)), "3 x 0 pixels, so there is nothing to see"),
    "F": (Image.new("F", (3, 2), 0.5), "floating-point"),
}
for file_format in FORMATS:
    good = encoded(picture(1, (32, 32)), file_format)
    BAD_PICTURES[f"{file_format} cut in the middle"] = (good[: len(good) // 2], ".")
    BAD_PICTURES[f"{file_format} of 9 bytes"] = (good[:9], ".")


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_ends_in_one_sentence(name, tmp_path, capfd):
    content, words = BAD_PICTURES[name]
    file = tmp_path / "the file.png"
    sources = [content]
    if isinstance(content, bytes):
        file.write_bytes(content)
        sources.append(file)
    for source in sources:
        with pytest.raises(BadSample, match=f"not a readable image .*({words})") as error:
            load_image(source)
        sentence = str(error.value)
        assert "\n" not in sentence and " at 0x" not in sentence and len(sentence) < 400
        start = {bytes: "bytes", Image.Image: "picture"}.get(type(source), str(file))
        assert sentence.startswith(f"{start}: not a readable image (")
        assert sentence.count(str(file)) <= 1
    assert capfd.readouterr() == ("", "")


def is_read(content):
    try:
        load_image(content)
    except BadSample:
        return False
    return True


def test_damaged_pictures_are_read_or_refused(capfd):
    """Nothing else is raised, and nothing is printed, by Pillow's libraries either."""
    rng = np.random.default_rng(0)
    goods = [encoded(picture(1, (32, 32)), file_format) for file_format in FORMATS]
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        goods.append(encoded(picture(1, (32, 32)), "TIFF", compression=compression))
    for content in goods:
        for _ in range(25):
            damaged = bytearray(content)
            for _ in range(int(rng.integers(1, 6))):
                damaged[rng.integers(min(len(damaged), 300))] = rng.integers(256)
            is_read(bytes(damaged[: rng.integers(len(damaged) // 2, len(damaged) + 1)]))
    assert capfd.readouterr() == ("", "")


def test_what_is_not_there_is_named_once(tmp_path):
    (tmp_path / "locked.png").write_bytes(png())
    os.mkfifo(tmp_path / "pipe.png")
    cases = [
        (tmp_path / "nowhere.png", "no such file or archive member"),
        (tmp_path, "is a folder|no such file"),
        (tmp_path / "pipe.png", "no such file|not a file|a pipe|no regular file"),
        (f"{tmp_path}/locked.png::x", "not an uncompressed tar archive"),
        ("", "'': no such file"),
        ("a\nb.png", r"'a\\nb.png': no such file"),
        ("a\0b.png", "no such file"),
        ("a\udcff.png", "no such file"),
        ("x" * 100_000, "no such file"),
    ]
    for where, message in cases:
        with pytest.raises(BadSample, match=message) as error:
            load_image(where)
        sentence = str(error.value)
        assert "\n" not in sentence and len(sentence) < 600
        assert sentence.count(str(tmp_path)) <= 1


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(BadSample, match="huge.png: has 3072 MiB; it must be at most 512"):
        load_image(tmp_path / "huge.png")


# ---------------------------------------------------------------- upright
def with_orientation(value, file_format="JPEG"):
    exif = Image.Exif()
    exif[0x0112] = value
    left_is_red = Image.new("RGB", (16, 8), "blue")
    left_is_red.paste("red", (0, 0, 8, 8))
    return encoded(left_is_red, file_format, exif=exif)


def test_a_photo_is_turned_upright_only_where_it_is_asked_for():
    for file_format in ("JPEG", "PNG", "WEBP"):
        content = with_orientation(6, file_format)  # a quarter to the right
        assert load_image(content).size == (16, 8)
        upright = load_image(content, upright=True)
        assert upright.size == (8, 16)
        assert upright.getpixel((4, 2))[0] > 200 and upright.getpixel((4, 13))[2] > 200
    for value in range(1, 9):
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(with_orientation(value))))
        upright = load_image(with_orientation(value), upright=True)
        assert np.array_equal(np.array(upright), np.array(expected.convert("RGB")))


def test_broken_exif_turns_nothing(recwarn):
    as_it_lies = np.array(load_image(with_orientation(1)))
    good = with_orientation(6)
    start = good.index(b"Exif\0\0") + 6
    for value in (0, 9, 99):
        assert np.array_equal(np.array(load_image(with_orientation(value), True)), as_it_lies)
    for position in range(start, start + 26):
        broken = bytearray(good)
        broken[position] = 0xFF
        assert sorted(load_image(bytes(broken), upright=True).size) == [8, 16]
    assert [str(warning.message) for warning in recwarn] == []


# ---------------------------------------------------------------- memory
MEASURE = """
import resource, sys
import numpy as np
from images import image_transform, load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sys.argv[1:]:
    for name in ("clip", "albef", "albef_randaug_wc"):
        transform = image_transform(name, 288, True)
        pixels = transform(load_image(file, upright=True), np.random.default_rng(0))
        assert pixels.shape == (3, 288, 288) and pixels.isfinite().all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_the_memory_of_a_transform_is_not_decided_by_the_shape(tmp_path):
    files = []
    for size in ((2, 8000), (8000, 2), (1, 60000), (60000, 1), (1, 1), (3, 2)):
        files.append(str(tmp_path / f"{size[0]}.png"))
        Image.new("RGB", size, (9, 200, 90)).save(files[-1])
    command = [sys.executable, "-c", MEASURE, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < 200  # MiB; the first one, scaled as a whole, would have 1,300


@pytest.mark.parametrize("size", [(4, 300), (300, 4), (30, 200), (7, 90)])
def test_the_middle_alone_is_what_is_cut_from_the_whole(size, monkeypatch):
    smooth = picture(2, (4, 4)).resize(size, Image.Resampling.BICUBIC)
    whole = np.array(images.clip_crop(smooth, 32)).astype(int)
    monkeypatch.setattr(images, "MOST_PIXELS", 0)
    middle = np.array(images.clip_crop(smooth, 32)).astype(int)
    assert np.abs(whole - middle).max() <= 2


@pytest.mark.parametrize(
    "error",
    [RuntimeError, NotImplementedError, OSError, SyntaxError, KeyError, AssertionError, TypeError],
)
def test_whatever_a_decoder_raises_is_a_bad_sample(error, monkeypatch):
    content = png()

    def decode(image):
        raise error("the decoder's reason")

    monkeypatch.setattr(images, "to_rgb", decode)
    with pytest.raises(
        BadSample, match="bytes: not a readable image .[\"']?the decoder.{1,2}s reason"
    ):
        load_image(content)


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), "there is not enough memory to decode it"),
        (ValueError(), "ValueError"),
        (OSError("cannot read <_io.BytesIO object at 0x7f0a12> here"), "cannot read it here"),
        (ValueError("one " + "x" * 10_000 + "\ntwo"), "one x+\\.\\.\\."),
    ],
)
def test_a_reason_is_one_line_without_objects(error, words, monkeypatch):
    def decode(image):
        raise error

    monkeypatch.setattr(images, "to_rgb", decode)
    with pytest.raises(BadSample, match=f"^bytes: not a readable image .{words}.$") as found:
        load_image(png())
    assert len(str(found.value)) < 300


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


# ---------------------------------------------------------------- files that Pillow reads otherwise
def png_chunk(name, content):
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


def png_by_hand(bits, colour_type, pixels, extra=b"", interlace=0, side=8):
    """A PNG of 8 x 8 pixels. pixels: the rows, each with its filter; extra: further chunks."""
    header = struct.pack(">IIBBBBB", side, side, bits, colour_type, 0, 0, interlace)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b"")


def gray_rows(number, side=8, value=200):
    return (b"\0" + bytes([value]) * side) * number


def interlaced(side, value=200):
    """Adam7: the seven passes of a gray square."""
    starts_and_steps = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4))
    starts_and_steps += ((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    passes = []
    for top, left, row_step, column_step in starts_and_steps:
        width = len(range(left, side, column_step))
        if width:
            passes.append(gray_rows(len(range(top, side, row_step)), width, value))
    return b"".join(passes)


def transparent(*values):
    return png_chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def tiff_by_hand(num_strips, **more):
    """A gray TIFF of 8 x 8 pixels in strips of two rows. more: further tags, t258=(8,)."""
    tags = {256: (8,), 257: (8,), 258: (8,), 259: (1,), 262: (1,), 277: (1,), 278: (2,)}
    tags |= {int(name[1:]): values for name, values in more.items()}
    tags |= {273: tuple(1000 + 16 * i for i in range(num_strips)), 279: (16,) * num_strips}
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    behind = b""
    for tag, values in sorted(tags.items()):
        content = struct.pack(f"<{len(values)}H", *values)
        if len(content) > 4:
            place = start + len(behind)
            behind += content
            content = struct.pack("<I", place)
        entries += struct.pack("<HHI", tag, 3, len(values)) + content.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + behind
    return head.ljust(1000, b"\0") + bytes([200]) * 16 * num_strips


RED = png_chunk(b"PLTE", b"\xff\0\0" * 3)
PALETTE_OF_8_BITS = tuple(range(256)) * 3
MISREAD = {
    "half of the rows": (png_by_hand(8, 0, gray_rows(4)), "PNG that lacks its last rows"),
    "a row less": (png_by_hand(8, 0, gray_rows(7)), "PNG that lacks its last rows"),
    "no row at all": (png_by_hand(8, 0, b""), "."),
    "no last pass": (png_by_hand(8, 0, interlaced(8)[:-36], b"", 1), "PNG that lacks its last"),
    "a row of the last pass less": (
        png_by_hand(8, 0, interlaced(8)[:-9], b"", 1),
        "PNG that lacks its last rows",
    ),
    "a row of an odd last pass less": (
        png_by_hand(8, 0, interlaced(9)[:-10], b"", 1, side=9),
        "PNG that lacks its last rows",
    ),
    "no palette": (png_by_hand(8, 3, gray_rows(8)), "colour 200, but its palette has 0 colours"),
    "a palette too late": (
        png_by_hand(8, 3, gray_rows(8))[:-12] + RED + png_chunk(b"IEND", b""),
        "its palette has 0 colours",
    ),
    "a short palette": (png_by_hand(8, 3, gray_rows(8, value=3), RED), "the colour 3, but its pal"),
    "TIFF, a strip less": (tiff_by_hand(3), "TIFF that lacks some of its strips or tiles"),
    "TIFF, a short palette": (tiff_by_hand(4, t262=(3,), t320=(40000,) * 30), "has 10 colours"),
    "TIFF, a palette of 8 bits": (
        tiff_by_hand(4, t262=(3,), t320=PALETTE_OF_8_BITS),
        "a palette of 8 bits, which would be black",
    ),
    "TIFF, signed": (tiff_by_hand(4, t339=(2,)), "gray TIFF of 8 bits that are signed"),
    "no palette of a picture": (Image.new("P", (2, 2)), "its palette has 0 colours"),
}


@pytest.mark.parametrize("name", MISREAD)
def test_what_pillow_would_make_black_is_refused(name, capfd):
    content, words = MISREAD[name]
    with pytest.raises(BadSample, match=f"not a readable image .*{words}") as error:
        load_image(content)
    assert len(str(error.value)) < 200
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [0, 1, 200, 255])
@pytest.mark.parametrize("side", [1, 2, 3, 8, 9])
def test_whole_files_of_these_kinds_are_read(side, value):
    flat = np.full((side, side, 3), value)
    for content in (
        png_by_hand(8, 0, gray_rows(side, side, value), side=side),
        png_by_hand(8, 0, interlaced(side, value), b"", 1, side=side),
    ):
        assert np.array_equal(np.array(load_image(content)), flat)


def test_whole_tiffs_are_read():
    assert np.array(load_image(tiff_by_hand(4))).tolist() == [[[200] * 3] * 8] * 8
    full = tuple(257 * i for i in range(256)) * 3
    assert np.array(load_image(tiff_by_hand(4, t262=(3,), t320=full))).max() == 200


def test_a_transparent_index_beyond_the_palette_is_no_error():
    """Some GIFs have one, for what they leave open."""
    square = Image.new("P", (8, 8), 1)
    square.putpalette([0, 0, 0, 200, 90, 30])
    square.paste(9, (0, 0, 4, 4))
    square.info["transparency"] = 9
    assert load_image(square).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(square).getpixel((7, 7)) == (200, 90, 30)


SIXTEEN = struct.pack(">8H", 0, 1000, 2000, 30000, 40000, 50000, 60000, 65535)
TRANSPARENT = [
    (1, 0, b"\x0f", (0,), [255] * 8),
    (2, 0, b"\x1b\x1b", (1,), [0, 255, 170, 255, 0, 255, 170, 255]),
    (4, 0, b"\x01\x23\x45\x67", (1,), [0, 255, 34, 51, 68, 85, 102, 119]),
    (8, 0, bytes(range(8)), (3,), [0, 1, 2, 255, 4, 5, 6, 7]),
    (16, 0, SIXTEEN, (1000,), [0, 255, 8, 117, 156, 195, 233, 255]),
    (8, 2, b"\x09\x08\x07" * 7 + bytes(3), (9, 8, 7), [255] * 7 + [0]),
    (16, 2, struct.pack(">24H", *[1000, 2000, 30000] * 7, 0, 0, 0), (1000, 2000, 30000), None),
]


@pytest.mark.parametrize("bits, colour_type, row, colour, expected", TRANSPARENT)
def test_the_transparent_colour_of_a_png_lies_over_white(bits, colour_type, row, colour, expected):
    content = png_by_hand(bits, colour_type, (b"\0" + row) * 8, transparent(*colour))
    found = np.array(load_image(content))[3, :, 0].tolist()
    assert found == (expected or [255] * 7 + [0])
