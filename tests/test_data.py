"""data.py against transformers, SentencePiece, golden numbers, closed forms, pixels, and its promises of invariance."""
import io
import json
import logging
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import GOLDEN
from PIL import Image
from torch.utils.data import DataLoader

import data
import files
import images
import scenes
import tokenizer
from data import GlobalBatchSampler, PairDataset, PretrainDataset, collate
from images import image_transform
from scenes import demo_source

TOKENIZERS = GOLDEN.parent / "tokenizers"
HARD = ["Hello world", "", "  double  spaces ", "naïve café — déjà vu", "雪が降る 🙂🙃", "I'd've said so",
        "100% $5 #tag 3.5", "\t\r\n x", "a" * 70, "The <mask> sat", "x<mask>y  <mask>",
        "<s>hi</s>", "zero​width é é ﬁ ½", "<|endoftext|>", "\x00\x01"]
CLIP = image_transform("clip", 16, True)


@pytest.fixture(scope="module")
def tokenizer():
    return scenes.demo_tokenizer()


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def picture(number, size=(20, 16), mode="RGB"):
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    return Image.fromarray(noise.squeeze(), mode=None)


def png(number=0):
    file = io.BytesIO()
    picture(number).save(file, "png")
    return file.getvalue()


@pytest.fixture
def manifest(tmp_path):
    """12 pictures in a folder, 12 in a tar archive; two captions each, one of them doubled."""
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        (tmp_path / f"pictures/{i}.png").write_bytes(png(i))
    with tarfile.open(tmp_path / "more.tar", "w") as archive:
        for i in range(12, 24):
            member = tarfile.TarInfo(f"in/{i}.png")
            member.size = len(png(i))
            archive.addfile(member, io.BytesIO(png(i)))
    names = [f"pictures/{i}.png" if i < 12 else f"more.tar::in/{i}.png" for i in range(24)]
    return write_lines(tmp_path / "coco_train.jsonl", [
        {"image": name, "captions": [f"first of {i}", f"second of {i}", f"first of {i}"], "image_id": i}
        for i, name in enumerate(names)])


# ---------------------------------------------------------------- tokenizers
@pytest.mark.parametrize("name", ["roberta-base", "qwen2"])
def test_tokenizer_gives_the_published_ids(name, tmp_path):
    if not (TOKENIZERS / name).is_dir():
        pytest.skip(f"no {TOKENIZERS / name}")
    tokenizer = tokenizer.load_tokenizer(TOKENIZERS / name)
    tokenizer.save(tmp_path)
    for case in json.loads((TOKENIZERS / name / "expected_ids.json").read_text()):
        assert tokenizer.encode(case["text"]) == tokenizer.load_tokenizer(tmp_path).encode(case["text"]) == case["ids"]


def test_vocab_and_merges_are_read_as_transformers_reads_them(tmp_path):
    RobertaTokenizer = pytest.importorskip("transformers").RobertaTokenizer
    folder = TOKENIZERS / "roberta-base"
    if not folder.is_dir():
        folder = tmp_path
        tokenizer.train_tokenizer(HARD * 3 + ["the man and the dog"] * 9, 400).backend.model.save(str(folder))
    ours, peer = tokenizer.load_tokenizer(folder), RobertaTokenizer.from_pretrained(folder)
    assert (ours.pad_id, ours.cls_id, ours.sep_id, ours.mask_id) == (
        peer.pad_token_id, peer.cls_token_id, peer.sep_token_id, peer.mask_token_id)
    assert ours.special_ids == set(peer.all_special_ids) and ours.vocab_size == len(peer)
    for text in HARD:
        assert ours.encode(text) == peer(text)["input_ids"], text
        assert ours.encode(text, 7) == peer(text, truncation=True, max_length=7)["input_ids"], text
    ids, mask = ours(HARD, 20)
    expected = peer(HARD, truncation=True, max_length=20, padding="max_length", return_tensors="pt")
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask, expected["attention_mask"])


def test_trained_tokenizer_is_deterministic_lossless_and_whole_worded(tokenizer, tmp_path):
    assert tokenizer.backend.to_str() == scenes.demo_tokenizer().backend.to_str()
    assert (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 1, 2, 4)
    tokenizer.save(tmp_path)
    again = pickle.loads(pickle.dumps(tokenizer.load_tokenizer(tmp_path / "tokenizer.json")))
    for text in HARD:
        if "<" not in text:
            assert again.decode(again.encode(text)) == text
    for task in ("captions", "nlvr2", "snli_ve"):
        for row in demo_source(task, "heldout", 50).texts():
            assert len(tokenizer.encode(row["text"])) == len(row["text"].split()) + 2


def test_sentencepiece_equals_the_library_and_adds_what_it_lacks(tmp_path):
    (tmp_path / "text").write_text("\n".join(row["text"] for row in demo_source("captions", "train", 300).texts()))
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spm"),
                                             vocab_size=36, minloglevel=2)
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    ours = tokenizer.load_tokenizer(tmp_path)
    text = "a small red circle"
    assert ours.encode(text) == [peer.bos_id(), *peer.encode(text), peer.eos_id()]
    assert ours.decode(ours.encode(text)) == text
    assert (ours.pad_id, ours.mask_id, ours.vocab_size) == (36, 37, 38) and ours.special_ids == {0, 1, 2, 36, 37}
    (tmp_path / "out").mkdir()
    ours.save(tmp_path / "out")
    assert pickle.loads(pickle.dumps(tokenizer.load_tokenizer(tmp_path / "out"))).encode(text) == ours.encode(text)


@pytest.mark.parametrize("files, message", [
    ({}, "expected tokenizer.json"), ({"tokenizer.json": "{}"}, "tokenizer.json is not a readable"),
    ({"x.model": "?"}, "x.model is not a readable"), ({"vocab.json": '{"a": 0}'}, "vocab.json is not a readable"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\n"}, "lacks .'<s>'")])
def test_tokenizer_errors(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        tokenizer.load_tokenizer(tmp_path)


# ---------------------------------------------------------------- pictures
def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    half = Image.new("RGBA", (2, 1), (100, 0, 0, 128))
    half.putpixel((1, 0), (9, 9, 9, 0))
    over_white = [(177, 127, 127), (255, 255, 255)]  # 255 + (100 - 255) * 128/255 = 177.2
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    frames = [Image.new("RGB", (2, 1), color) for color in ("red", "blue")]
    deep = Image.fromarray(np.array([[0, 65535 // 2]], dtype=np.uint16))
    cases = [(encoded(half, "png"), over_white), (encoded(half.convert("LA"), "png"), None),
             (encoded(deep, "png"), [(0,) * 3, (127,) * 3]),
             (encoded(palette, "png", transparency=1), [(10, 20, 30), (255, 255, 255)]),
             (encoded(palette, "png"), [(10, 20, 30), (40, 50, 60)]),
             (encoded(frames[0], "gif", save_all=True, append_images=frames[1:]), [(255, 0, 0)] * 2),
             (encoded(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "tiff"), [(255, 0, 0)] * 2),
             (encoded(Image.new("1", (2, 1), 1), "png"), [(255,) * 3] * 2)]
    for content, colors in cases:
        (tmp_path / "file").write_bytes(content)
        for image in (images.load_image(content), images.load_image(tmp_path / "file")):
            assert image.mode == "RGB" and image.size == (2, 1)
            assert colors is None or np.abs(np.array(image)[0].astype(int) - np.array(colors)).max() <= 1
    assert images.load_image(cases[1][0]).getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("content", [b"", b"not an image", png()[:60], png()[:-30]])
def test_broken_pictures_are_named(content, tmp_path):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(files.BadSample, match="broken.png: not a readable image"):
        images.load_image(tmp_path / "broken.png")


@pytest.mark.parametrize("size", [(50, 33), (33, 50), (16, 16), (41, 40), (7, 9), (100, 20)])
def test_clip_transform_equals_transformers(size):
    processor = pytest.importorskip("transformers").CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    expected = processor(picture(1, size), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(CLIP(picture(1, size)).numpy(), expected, atol=2e-6)


def test_albef_squashes_and_normalises():
    pixels = image_transform("albef", 8, True)(Image.new("RGB", (30, 10), (0, 128, 255)))
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    expected = (np.array([0, 128, 255]) / 255 - mean) / std
    np.testing.assert_allclose(pixels.numpy(), np.broadcast_to(expected[:, None, None], (3, 8, 8)), atol=1e-6)
    with pytest.raises(ValueError, match="unknown image transform 'vit'"):
        image_transform("vit", 8, True)


def test_random_crop_and_flip_have_the_published_ranges(monkeypatch):
    """A picture whose red and green are its own coordinates tells which box was cut and whether it was mirrored."""
    monkeypatch.setattr(data, "RANDAUGMENT", {"Identity": lambda image, m: image})
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    ramp = Image.fromarray(np.stack([x, y, x * 0], -1).astype(np.uint8))
    for name, flips in (("albef_randaug_wc", 0.5), ("albef_randaug_wohf", 0.0)):
        transform, areas, aspects, flipped = image_transform(name, 100, True), [], [], 0
        for seed in range(300):
            pixels = transform(ramp, np.random.default_rng(seed)) * images.CLIP_STD + images.CLIP_MEAN
            red, green = pixels[0].mean(0) * 255, pixels[1].mean(1) * 255
            width, height = (red[-1] - red[0]).item() * 100 / 99, (green[-1] - green[0]).item() * 100 / 99
            flipped += width < 0
            areas.append(abs(width) * height / 200**2)
            aspects.append(abs(width) / height)
        assert 0.48 < min(areas) < 0.55 and 0.95 < max(areas) < 1.03 and 0.70 < np.mean(areas) < 0.78
        assert 0.73 < min(aspects) < 0.80 and 1.25 < max(aspects) < 1.37
        assert abs(flipped / 300 - flips) < 0.08
    assert torch.equal(image_transform(name, 100, False)(ramp), image_transform("albef", 100, True)(ramp))


def test_randaugment_magnitudes():
    dot = Image.new("RGB", (41, 41))
    dot.putpixel((20, 30), (255, 255, 255))

    def place(name, m):
        values = np.array(images.RANDAUGMENT[name](dot, m))[..., 0].astype(float)
        values[values == 128] = 0
        return np.round(np.argwhere(values == values.max()).mean(0)).tolist()  # y, x
    assert place("TranslateX", 0.7) == [30, 13] and place("TranslateY", -0.7) == [37, 20]
    assert place("ShearX", 0.7) == [30, 14] and place("ShearY", -0.7) == [34, 20]  # 0.21 * 30 = 6.3, 0.21 * 20 = 4.2
    assert place("Rotate", 0.7) == [29, 24]  # 21 degrees counter-clockwise: (0, 10) -> (3.6, 9.3)
    gray = Image.new("RGB", (4, 4), (100, 50, 0))
    assert images.RANDAUGMENT["Brightness"](gray, -0.7).getpixel((1, 1)) == (136, 68, 0)  # 0.1 + 1.8 * 0.7 = 1.36
    assert images.RANDAUGMENT["Sharpness"](gray, 0.7).getpixel((1, 1)) == (100, 50, 0)
    ramp = np.tile(np.arange(50, 150, dtype=np.uint8), (4, 1))
    stretched = np.array(images.RANDAUGMENT["AutoContrast"](Image.fromarray(ramp), 0.7)).astype(float)
    np.testing.assert_allclose(stretched, (ramp - 50.0) * 255 / 99, atol=1)
    transform = image_transform("albef_randaug_wc", 16, True)
    views = [transform(picture(3), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


# ---------------------------------------------------------------- demo data: read back from the pixels
PALETTE = scenes.COLORS | {"gray": images.GRAY}


def look(image):
    """The scene in a picture, from its pixels alone: (two (size, color, shape), relation), left or top first."""
    pixels = np.array(image).astype(int)
    distances = {name: np.abs(pixels - color).sum(-1) for name, color in PALETTE.items()}
    ink = np.abs(pixels - pixels[0, 0]).sum(-1) > 0
    for axis in (0, 1):
        filled = np.flatnonzero(ink.any(axis))
        gap = np.flatnonzero(np.diff(filled) > 1)
        if len(gap):
            break
    things = []
    for part in (filled[:gap[0] + 1], filled[gap[0] + 1:]):
        mask = np.zeros_like(ink)
        mask[(slice(None), part) if axis == 0 else part] = ink[(slice(None), part) if axis == 0 else part]
        ys, xs = np.nonzero(mask)
        width, height = np.ptp(xs) + 1, np.ptp(ys) + 1
        color = min(PALETTE, key=lambda name: distances[name][mask].sum())
        assert distances[color][int(ys.mean()), int(xs.mean())] == 0  # the colour at the object's centre
        fill = mask.sum() / (width * height)
        shape = "square" if fill > 0.95 else "circle" if fill > 0.65 else "triangle"
        things.append(("small" if width < 0.32 * len(ink) else "large", color, shape))
    return things, ("left of", "above")[axis]


RELATIONS = {("left of", 0): "left of", ("left of", 1): "right of", ("above", 0): "above", ("above", 1): "below"}


def says(things, relation):
    """All true "A relation B" triples."""
    return {(things[i], RELATIONS[relation, i], things[1 - i]) for i in (0, 1)}


def matching(things, relation, words):
    """Which of the two things a noun phrase fits: 'red circle', 'small object', 'left square'."""
    places = {"left of": ("left", "right"), "above": ("top", "bottom")}[relation]
    return [i for i, thing in enumerate(things) if all(word in (*thing, "object", places[i]) for word in words)]


@pytest.mark.parametrize("split, size", [("train", 64), ("heldout", 64), ("heldout", 96)])
def test_demo_captions_say_what_the_pixels_show(split, size):
    for row in map(demo_source("captions", split, 120, image_size=size).__getitem__, range(120)):
        assert claim(row["text"]) in says(*look(row["images"][0])), row["text"]


def test_demo_questions_have_the_answers_that_the_pixels_give():
    source, yes = demo_source("vqa", "heldout", 150), []
    for row in map(source.__getitem__, range(450)):
        (answer,), words = row["answers"], row["text"].rstrip("?").split()
        things, relation = look(row["images"][0])
        if words[0] == "what":
            (which,) = matching(things, relation, words[4:])  # the phrase is unambiguous
            truth = dict(zip(("size", "color", "shape"), things[which]))[words[1]]
        elif words[1] == "there":
            truth = "yes" if matching(things, relation, words[3:]) else "no"
        else:
            middle = 3 + next(i for i, word in enumerate(words[3:]) if word in ("left", "right", "above", "below"))
            (a,) = matching(things, relation, words[2:middle])
            (b,) = matching(things, relation, words[words.index("the", 2) + 1:])
            told = things[a], " ".join(words[middle:words.index("the", 2)]), things[b]
            truth = "yes" if told in says(things, relation) else "no"
        assert answer == truth and answer in scenes.DEMO_ANSWERS, row["text"]
        yes += [answer == "yes"] if words[0] == "is" else []
    assert row["question_id"] == 449 and row["question_type"] in ("color", "size", "shape", "there", "the")
    assert abs(np.mean(yes) - 0.5) < 0.1


def claim(text):
    """'a large red circle is above a small blue square' -> the triple that `says` gives."""
    a, relation, b = text.replace(" is ", "|").replace(" a ", "|a ").split("|")
    return tuple(a.split()[1:]), relation, tuple(b.split()[1:])


def test_demo_statements_about_pairs_follow_from_the_pixels():
    source = demo_source("nlvr2", "heldout", 200)
    for row in map(source.__getitem__, range(200)):
        told, place = row["text"].split(" in ")
        left, right = (claim(told) in says(*look(image)) for image in row["images"])
        truth = {"left image": left, "right image": right, "both images": left and right,
                 "one image": left != right}[place]
        assert truth == bool(row["label"]), row["text"]
    assert sum(row["label"] for row in source.texts()) == 100


def test_demo_hypotheses_follow_from_the_pixels():
    source, covered = demo_source("snli_ve", "heldout", 210), Counter()
    for row in map(source.__getitem__, range(210)):
        things, relation = look(row["images"][0])
        hidden = [i for i, thing in enumerate(things) if thing[1] == "gray"]
        a, told, b = claim(row["text"])
        agrees = any((RELATIONS[relation, i] == told) and all(
            i_ in hidden or things[i_] == x for i_, x in ((i, a), (1 - i, b))) for i in (0, 1))
        assert row["label"] == (0 if not agrees else 1 if hidden else 2), row["text"]
        covered[row["label"]] += len(hidden)
    assert covered[2] == 0 and covered[1] == 70 and 20 < covered[0] < 50
    assert Counter(row["label"] for row in source.texts()) == {0: 70, 1: 70, 2: 70}


def test_demo_scenes_of_the_splits_are_disjoint_in_content():
    seen = {}
    for task in ("captions", "vqa", "nlvr2", "snli_ve"):
        for split in ("train", "heldout"):
            source = demo_source(task, split, 150, seed=len(seen))
            pictures = (image for i in range(150) for image in source.images(i))
            scenes = {(*things, relation) for things, relation in map(look, pictures)}
            seen.setdefault(split, set()).update(scene for scene in scenes if "gray" not in (scene[0][1], scene[1][1]))
    assert not seen["train"] & seen["heldout"] and len(seen["train"]) > 400 and len(seen["heldout"]) > 150


def test_demo_texts_alone_do_not_tell_the_answers():
    """The commonest training answer to the same question, or to texts with the same two words, is often wrong."""
    for task, words, limit in (("vqa", (0, 99), 0.5), ("nlvr2", (-2, None), 0.6), ("snli_ve", (1, 3), 0.45)):
        def key(row, words=words):
            return tuple(row["text"].split()[slice(*words)])

        known = {}
        for row in demo_source(task, "train", 1500).texts():
            known.setdefault(key(row), Counter())[str(row.get("answers", row.get("label")))] += 1
        rows = [row for row in demo_source(task, "heldout", 500).texts() if key(row) in known]
        hits = [known[key(row)].most_common(1)[0][0] == str(row.get("answers", row.get("label"))) for row in rows]
        assert len(hits) > 300 and np.mean(hits) < limit


def test_demo_is_a_function_of_seed_and_index():
    a, b, other = (demo_source("captions", "train", 40, seed) for seed in (1, 1, 2))
    assert [a[i]["text"] for i in range(40)] == [b[i]["text"] for i in reversed(range(40))][::-1]
    assert all(np.array_equal(a.images(i)[0], b.images(i)[0]) for i in range(40))
    assert a.texts() == b.texts() != other.texts()
    with pytest.raises(AssertionError, match="val"):
        demo_source("captions", "val", 4)


# ---------------------------------------------------------------- sources
def test_manifest_rows_are_pairs_without_doubles_in_order(manifest):
    source = data.open_source("captions", manifest.parent, "train", ["coco"])
    expected = [f"{word} of {i}" for i in range(24) for word in ("first", "second")]
    assert [row["text"] for row in source.texts()] == expected
    assert (len(source), source.num_images) == (48, 24) and [row["text"] for row in source.texts(3)][-1] == "first of 1"
    for row in (0, 25, 47):
        item = source[row]
        assert (item["text"], item["image_index"], item["image_id"]) == (expected[row], row // 2, row // 2)
        assert np.array_equal(item["images"][0], picture(row // 2))
    twice = data.open_source("captions", manifest.parent, "train+train", ["coco"])
    assert len(twice) == 96 and twice[48]["image_index"] == 24 and twice[48]["text"] == "first of 0"


BROKEN = [("{", "not JSON"), ('"x"', "not a JSON object"), (b"\xff\xfe", "not JSON"), ("{}", "an image expected"),
          ('{"image": "a.png"}', "'captions' must be"),
          ('{"image": "a.png", "captions": []}', "'captions' must be a non-empty list"),
          ('{"image": 3, "captions": ["x"]}', "an image expected"),
          ('{"image": "a.png", "captions": ["good", "  "]}', "'caption' must be a non-empty str"),
          ('{"image": "a.png", "captions": [["x"]]}', "'caption' must be")]


@pytest.mark.parametrize("line, message", BROKEN)
def test_broken_lines_are_named(line, message, tmp_path):
    good = b'\n{"image": "a.png", "captions": ["fine"]}\n'
    (tmp_path / "x_train.jsonl").write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + good)
    with pytest.raises(files.BadSample, match=f"x_train.jsonl, line 3: .*{message}"):
        data.open_source("captions", tmp_path / "x_train.jsonl")


@pytest.mark.parametrize("task, record, message", [
    ("vqa", {"image": "a.png", "questions": [{"id": 1}]}, "'question' must be"),
    ("vqa", {"image": "a.png"}, "'questions' must be"),
    ("vqa", {"image": "a.png", "questions": ["x"]}, "'question' must be"),
    ("vqa", {"image": "a.png", "questions": [{"question": "x", "answers": ["y"]}]}, "'answers' must be"),
    ("nlvr2", {"images": ["a.png"], "sentence": "x", "label": True}, "two images expected"),
    ("nlvr2", {"images": ["a", "b"], "sentence": "x", "label": "yes"}, "'label' must be"),
    ("nlvr2", {"images": ["a", "b"], "label": True}, "'sentence' must be"),
    ("snli_ve", {"image": "a", "hypothesis": "x", "label": "-"}, "'label' must be one of"),
    ("snli_ve", {"image": "a", "label": "neutral"}, "'hypothesis'"),
    ("chat", {"image": "a", "conversations": []}, "'conversations' must be"),
    ("chat", {"conversations": [{"from": "human"}]}, "every turn needs"),
    ("chat", {"conversations": ["x"]}, "every turn needs"),
    ("chat", {"video": "a.mp4", "conversations": [{"from": "human", "value": "x"}]}, "videos are not read"),
    ("chat", {"image": "a", "conversations": [{"from": "human", "value": "<image> <image>"}]}, "1 images but 2")])
def test_wrong_fields_are_named(task, record, message, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [record])
    with pytest.raises(files.BadSample, match=f"x.jsonl, line 1: .*{message}"):
        data.open_chat(path) if task == "chat" else data.open_source(task, path)


def test_missing_pictures_name_manifest_line_and_file(manifest):
    (manifest.parent / "pictures/3.png").unlink()
    source = data.open_source("captions", manifest)
    with pytest.raises(files.BadSample, match="coco_train.jsonl, line 4: .*pictures/3.png: no such file"):
        source[6]
    records = [json.loads(line) for line in manifest.read_text().splitlines()]
    write_lines(manifest, [record | {"image": record["image"].replace("in/", "out/")} for record in records])
    with pytest.raises(files.BadSample, match="line 13: .*more.tar::out/12.png: no such file or archive member"):
        data.open_source("captions", manifest)[24]
    (manifest.parent / "more.tar").write_bytes(b"\x1f\x8b" * 600)
    files.tar_index.cache_clear()
    with pytest.raises(files.BadSample, match="line 14: .*not an uncompressed tar"):
        data.open_source("captions", manifest)[26]


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="no sets were named"):
        data.open_source("captions", tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="no flickr30k_train.jsonl, .* f30k_.*_train.arrow, f30k_.*_val.arrow"):
        data.open_source("captions", tmp_path, "train", ["flickr30k"])
    (tmp_path / "empty_val.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows in .*empty_val.jsonl"):
        data.open_source("captions", tmp_path, "val", ["empty"])


def test_skip_replaces_by_the_next_row_logs_and_counts(manifest, tokenizer, caplog):
    (manifest.parent / "pictures/3.png").write_bytes(png()[:70])
    make = lambda policy: PairDataset(data.open_source("captions", manifest), tokenizer, CLIP, 16, on_bad_sample=policy)  # noqa: E731
    with pytest.raises(files.BadSample, match="line 4"):
        make("error")[0, 0, 7]
    dataset = make("skip")
    with caplog.at_level(logging.WARNING):
        items = [dataset[0, position, row] for position, row in enumerate([5, 6, 7, 8])]
    assert [item["image_index"].item() for item in items] == [2, 4, 4, 4]
    assert torch.equal(items[1]["input_ids"], items[3]["input_ids"])
    assert caplog.text.count("skipped bad sample") == 1 and "pictures/3.png" in caplog.text and len(dataset.bad) == 1
    (manifest.parent / "pictures/4.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2 of .* samples are bad, more than 1 in 1,000"):
        [dataset[0, 0, row] for row in range(5, 12)]


@pytest.mark.parametrize("bad, stops", [(1, False), (4, False), (12, True)])
def test_skip_at_opening_stops_above_one_in_a_thousand(bad, stops, tmp_path):
    lines = ['{"image": "a.png", "captions": ["fine"]}'] * 2000
    lines[1000:1000 + 80 * bad:80] = ["{"] * bad
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    if stops:
        with pytest.raises(ValueError, match="more than 1 in 1,000"):
            data.open_source("captions", tmp_path / "x.jsonl", on_bad_sample="skip")
    else:
        source = data.open_source("captions", tmp_path / "x.jsonl", on_bad_sample="skip")
        assert len(source) == 2000 - bad and len(source.bad) == bad and source.num_images == 2000


# ---------------------------------------------------------------- .arrow files of ViLT's family
def write_arrow(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(columns)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("text", ["string", "large_string"])
@pytest.mark.parametrize("name, extra", [("coco", {}), ("vg", {"width": [[1, 2]] * 3, "x": [[0, 0]] * 3})])
def test_arrow_captions(text, name, extra, tmp_path):
    pa = pytest.importorskip("pyarrow")
    text = getattr(pa, text)()
    captions = [["one", "two", "one"], ["three"], ["four", "five"]]
    names = {"coco": ("coco_caption_karpathy_train", "coco_caption_karpathy_restval"), "vg": ("vg",)}[name]
    for shard in names:
        write_arrow(tmp_path / f"{shard}.arrow", {
            "image": [png(i) for i in range(3)], "caption": pa.array(captions, pa.list_(text)),
            "image_id": pa.array(["a", "b", "c"], text), **extra})
    source = data.open_source("captions", tmp_path, "train", [name])
    assert [row["text"] for row in source.texts()] == ["one", "two", "three", "four", "five"] * len(names)
    row = pickle.loads(pickle.dumps(source))[2 + 5 * (len(names) - 1)]
    assert row["text"] == "three" and row["image_id"] == "b" and np.array_equal(row["images"][0], picture(1))
    write_arrow(tmp_path / f"{names[-1]}.arrow", {"image": [b"no"], "caption": pa.array([["x", " "]], pa.list_(text))})
    data._arrow_table.cache_clear()
    with pytest.raises(files.BadSample, match=f"{names[-1]}.arrow, row 0: 'caption' must be"):
        data.open_source("captions", tmp_path, "train", [name])


def test_arrow_vqa_with_and_without_answers(tmp_path, tokenizer):
    pa = pytest.importorskip("pyarrow")
    common = {"image": [png(0), png(1)], "questions": [["what?", "who?"], ["why?"]], "question_id": [[11, 12], [13]],
              "image_id": [5, 6]}
    answers = {"answers": [[["net", "yes"], ["no"]], [["yes"]]], "answer_labels": [[[2, 0], [1]], [[0]]],
               "answer_scores": [[[1.0, 0.3], [0.6]], [[0.9]]]}
    write_arrow(tmp_path / "vqav2_train_fix.arrow", common | answers)
    write_arrow(tmp_path / "vqav2_train.arrow", common | answers | {"question_id": [[0, 0], [0]]})
    nulls = pa.array([[], []], pa.list_(pa.null()))
    write_arrow(tmp_path / "vqav2_test.arrow", common | dict.fromkeys(answers, nulls))
    assert data.load_answers(tmp_path) == ["yes", "no", "net"]
    train, test = (PairDataset(data.open_source("vqa", tmp_path, split, ["vqav2"]), tokenizer, CLIP, 16,
                               answers=["yes", "no"])
                   for split in ("train", "test"))
    batch = collate([train[0], train[1], train[2]])
    assert torch.allclose(batch["targets"], torch.tensor([[0.3, 0], [0, 0.6], [0.9, 0]]))  # without "net"
    assert batch["question_id"] == [11, 12, 13] and batch["image_id"] == [5, 5, 6]
    assert batch["image_index"].tolist() == [0, 0, 1]
    assert "targets" not in test[2] and test[2]["question_id"] == 13
    (tmp_path / "answers.json").write_text('["a", "b"]')
    assert data.load_answers(tmp_path) == ["a", "b"]
    with pytest.raises(ValueError, match="no VQA vocabulary"):
        data.load_answers(tmp_path / "elsewhere")


def test_arrow_nlvr2_and_snli_ve(tmp_path, tokenizer):
    write_arrow(tmp_path / "nlvr2_dev.arrow", {
        "image_0": [png(0)], "image_1": [png(1)], "questions": [["a", "b"]], "answers": [["True", "False"]],
        "identifier": ["dev-1"]})
    write_arrow(tmp_path / "snli_test.arrow", {
        "image": [png(2)], "sentences": [[["premise", "x"], ["premise", "y"]]], "labels": [[2, 0]]})
    nlvr2 = data.open_source("nlvr2", tmp_path, "dev", ["nlvr2"])
    snli = data.open_source("snli_ve", tmp_path, "test", ["snli_ve"])
    items = collate([PairDataset(nlvr2, tokenizer, CLIP, 8)[i] for i in range(2)])
    assert items["label"].tolist() == [1, 0] and items["id"] == ["dev-1"] * 2
    assert torch.equal(items["pixels"][1], CLIP(picture(0))) and torch.equal(items["pixels_1"][0], CLIP(picture(1)))
    assert [(row["text"], row["label"]) for row in snli.texts()] == [("x", 2), ("y", 0)]


def test_arrow_errors(tmp_path):
    (tmp_path / "bad.arrow").write_bytes(b"ARROW1 not really" * 9)
    with pytest.raises(ValueError, match="bad.arrow is not an Arrow file"):
        data.open_source("captions", tmp_path / "bad.arrow")
    write_arrow(tmp_path / "sbu_0.arrow", {"image": [png()], "texts": [["x"]]})
    with pytest.raises(ValueError, match=r"lacks the columns \['caption'\] of captions"):
        data.open_source("captions", tmp_path / "sbu_0.arrow")
    with pytest.raises(ValueError, match=", ".join(f"sbu_{i}.arrow" for i in range(1, 9))):
        data.open_source("captions", tmp_path, "train", ["sbu"])


# ---------------------------------------------------------------- pre-training rows
def test_masking_statistics(tokenizer):
    ids = tokenizer(["a small red circle is left of a large blue square"], 16)[0][0]
    draws = [data.mask_tokens(ids, tokenizer, np.random.default_rng(i)) for i in range(20_000)]
    masked, labels = (torch.stack(part) for part in zip(*draws))
    chosen = labels != -100
    whole = ids.expand_as(labels)
    assert torch.equal(labels[chosen], whole[chosen]) and torch.equal(masked[~chosen], whole[~chosen])
    assert not chosen[:, [i for i, token in enumerate(ids.tolist()) if token in tokenizer.special_ids]].any()
    n, total = chosen.sum().item(), 20_000 * 11
    within = lambda count, of, p: abs(count - of * p) < 5 * (of * p * (1 - p)) ** 0.5  # noqa: E731
    assert within(n, total, 0.15)
    share = 0.1 / tokenizer.vocab_size  # a random token can be <mask> or the token itself
    assert within((masked[chosen] == tokenizer.mask_id).sum().item(), n, 0.8 + share)
    assert within((masked[chosen] == labels[chosen]).sum().item(), n, 0.1 + share)
    assert masked.max() < tokenizer.vocab_size and len(masked[chosen].unique()) > 0.9 * tokenizer.vocab_size
    assert not torch.equal(chosen[0], chosen[1:50].any(0)) and chosen[:, 1:12].float().mean(0).std() < 0.01


def pretraining(source, tokenizer, **options):
    return PretrainDataset(source, tokenizer, CLIP, max_text_len=16, batch_size=12, seed=3, **options)


def test_exactly_half_of_each_global_batch_is_false(manifest, tokenizer):
    dataset = pretraining(data.open_source("captions", manifest), tokenizer)
    batches = [collate([dataset[key] for key in keys]) for keys in GlobalBatchSampler(48, 12, 12, stop_step=9, seed=3)]
    labels = torch.stack([batch["itm_labels"] for batch in batches])
    assert (labels.sum(1) == 6).all() and len(labels.unique(dim=0)) == 9
    same = torch.stack([(batch["pixels"] == batch["itm_pixels"]).flatten(1).all(1) for batch in batches])
    assert torch.equal(same, labels == 1)
    with pytest.raises(ValueError, match="at least two images"):
        pretraining(demo_source("captions", "train", 1), tokenizer)


def test_false_pictures_come_from_the_whole_set(tokenizer):
    dataset = pretraining(demo_source("captions", "train", 8), tokenizer)
    pictures = [CLIP(dataset.source.images(i)[0]) for i in range(8)]
    which = Counter()
    for position in range(1400):
        item = dataset[0, position, 2]
        which[next(i for i, pixels in enumerate(pictures) if torch.equal(pixels, item["itm_pixels"]))] += 1
    assert 600 < which.pop(2) < 800 and len(which) == 7 and max(which.values()) < 1.5 * min(which.values())


def test_shared_images_have_one_false_of_two_partners(manifest, tokenizer):
    dataset = pretraining(data.open_source("captions", manifest), tokenizer, share_images=True)
    labels = torch.tensor([dataset[0, position, position % 48]["itm_labels"] for position in range(200)]).view(-1, 2)
    assert (labels.sum(1) == 1).all() and 30 < labels[:, 0].sum() < 70 and "itm_pixels" not in dataset[0]
    assert "itm_pixels" not in pretraining(dataset.source, tokenizer, objectives=("mlm",))[0]


# ---------------------------------------------------------------- samplers
def stream(num_rows, batch, micro, world, stop, start=0, seed=0):
    """Keys of each step as all processes see them, in the order of the positions."""
    ranks = [list(GlobalBatchSampler(num_rows, batch, micro, rank, world, seed, start, stop)) for rank in range(world)]
    return [key for micro_step in zip(*ranks) for keys in micro_step for key in keys]


def test_the_stream_does_not_depend_on_processes_or_accumulation():
    one = stream(20, 12, 12, 1, 5)
    assert [key[:2] for key in one] == [(i // 20, i) for i in range(60)]
    orders = [[row for _, _, row in one[i:i + 20]] for i in (0, 20, 40)]
    assert all(sorted(order) == list(range(20)) for order in orders) and orders[0] != orders[1] != orders[2]
    assert one == stream(20, 12, 6, 2, 5) == stream(20, 12, 3, 1, 5) == stream(20, 12, 2, 3, 5)
    assert stream(20, 12, 6, 2, 5, start=2) == one[24:] and stream(20, 12, 12, 1, 5, seed=1) != one
    sampler = GlobalBatchSampler(20, 12, 3, 1, 2, 0, 1, 5)
    assert len(sampler) == len(list(sampler)) == 8
    with pytest.raises(ValueError, match="batch_size 12 must be a multiple of micro_batch_size x processes = 8"):
        GlobalBatchSampler(20, 12, 4, 0, 2)


@pytest.mark.parametrize("kind", ["manifest", "arrow", "demo"])
def test_items_do_not_depend_on_workers(kind, manifest, tokenizer, tmp_path):
    if kind == "arrow":
        write_arrow(tmp_path / "sbu.arrow", {
            "image": [png(i) for i in range(9)], "caption": [[f"number {i}"] for i in range(9)]})
    source = {"manifest": lambda: data.open_source("captions", manifest),
              "arrow": lambda: data.open_source("captions", tmp_path / "sbu.arrow"),
              "demo": lambda: demo_source("captions", "train", 30)}[kind]()
    transform = image_transform("albef_randaug_wc", 16, True)
    dataset = pickle.loads(pickle.dumps(PretrainDataset(source, tokenizer, transform, 16, batch_size=8, seed=5)))
    sampler = lambda micro: GlobalBatchSampler(len(source), 8, micro, seed=5, stop_step=4)  # noqa: E731
    runs = [list(DataLoader(dataset, batch_sampler=sampler(micro), collate_fn=collate, num_workers=workers))
            for workers, micro in ((0, 8), (2, 8), (2, 4))]
    for name in ("pixels", "itm_pixels", "mlm_ids", "mlm_labels", "itm_labels", "input_ids", "image_index"):
        whole = [torch.cat([batch[name] for batch in run]) for run in runs]
        assert torch.equal(whole[0], whole[1]) and torch.equal(whole[0], whole[2]), name


def test_length_grouped_order_equals_the_official_sampler():
    path = GOLDEN / "llava_ov_manager/optim/sampler.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    for case in json.loads(path.read_text())["cases"]:
        generator = torch.Generator().manual_seed(case["torch_seed"])
        order = data.length_grouped(case["signed_lengths"], case["batch_size"], case["world_size"], generator)
        assert order == case["indices"]


def test_length_grouped_batches_are_of_one_modality(tokenizer):
    lengths = [int(n) for n in np.random.default_rng(0).integers(5, 300, 90)]
    lengths[::3] = [-n for n in lengths[::3]]
    rows = [[row for _, _, row in keys] for keys in GlobalBatchSampler(90, 8, 4, seed=2, stop_step=11, lengths=lengths)]
    kinds = [{lengths[row] > 0 for row in keys} for keys in rows]
    assert sorted(sum(rows, [])) == sorted(set(sum(rows, []))) and sum(len(kind) > 1 for kind in kinds) <= 4
    steps = [rows[i] + rows[i + 1] for i in range(0, 22, 2)]
    apart = stream(90, 8, 4, 2, 11)
    assert [sorted(step) for step in steps] != [sorted(row for _, _, row in apart[i:i + 8]) for i in range(0, 88, 8)]
    two = [list(GlobalBatchSampler(90, 8, 4, rank, 2, 2, 0, 11, lengths)) for rank in range(2)]
    assert [[row for _, _, row in keys] for pair in zip(*two) for keys in pair] == rows


# ---------------------------------------------------------------- LLaVA's conversations
def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def chats(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / f"pictures/{i}.png").write_bytes(png(i))
    records = [{"id": i, "image": "0.png", "conversations": turns("<image>\nwhat?", f"answer {i}")} for i in range(9)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    write_lines(tmp_path / "b.jsonl", records)
    return tmp_path


def ids(source):
    return [source[i]["id"] for i in range(len(source))]


@pytest.mark.parametrize("strategy, expected", [
    ("all", range(9)), ("first:4", range(4)), ("end:2", (7, 8)), ("first:10%", (0,)), ("end:12%", (7, 8)),
    ("first:99", range(9)), ("first:100%", range(9)), ("end:0", ())])
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_mixtures(strategy, expected, suffix, chats):
    first = {"json_path": str(chats / "a.json"), "sampling_strategy": strategy}
    text = json.dumps({"datasets": [first, {"json_path": str(chats / "b.jsonl")}]})
    if suffix == "yaml":
        text = (f"# mixture\ndatasets:\n  - json_path: '{chats}/a.json'  # one\n    sampling_strategy: \"{strategy}\""
                f"\n\n  - json_path: {chats}/b.jsonl\n")
    (chats / f"mix.{suffix}").write_text(text)
    source = data.open_chat(chats / f"mix.{suffix}", chats / "pictures")
    assert ids(source) == [*expected, *range(9)]
    assert np.array_equal(source[0]["images"][0], picture(0))
    assert source[0]["conversation"][1]["value"] == f"answer {ids(source)[0]}"


def test_random_sampling_braces_and_wrong_mixtures(chats):
    draws = [data.sample_rows("random:5", 50, seed).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) == 5
    assert len(data.sample_rows("random:31%", 10, 0)) == 4
    (chats / "c.json").write_text((chats / "a.json").read_text())
    assert len(data.open_chat(f"{chats}/{{a,c}}.json", chats / "pictures")) == 18
    for text, message in (("datasets:\n- json_path: x\n  weight: 3", "line 3: '  weight: 3'"),
                          ("- sampling_strategy: all\n- x", "line 2")):
        (chats / "mix.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"mix.yaml, {message}"):
            data.open_chat(chats / "mix.yaml")
    with pytest.raises(ValueError, match="'some:3' is none of all, first:N"):
        data.sample_rows("some:3", 10, 0)
    for name in ("nothing.json", "nothing.jsonl", "nothing.yaml"):
        with pytest.raises(ValueError, match=f"{name}: no such file"):
            data.open_chat(chats / name)


def test_chat_rows_and_their_published_inconsistencies(chats):
    write_lines(chats / "x.jsonl", [
        {"id": "text", "conversations": turns("hi there", "hello")},
        {"id": "no tag", "image": "1.png", "conversations": turns("what is it", "a cat")},
        {"id": "list", "image": ["0.png", "2.png"], "conversations": turns("<image> <image>\nsame?", "no")},
        {"id": "late", "image": "1.png", "conversations": turns("what\n<image>", "a cat")},
        {"id": "two untagged", "image": ["0.png", "2.png"], "conversations": turns("same?", "no")},
        {"id": "gone", "image": "9.png", "conversations": turns("<image>", "x")}])
    source = data.open_chat(chats / "x.jsonl", chats / "pictures")
    rows = [source[i] for i in range(5)]
    assert [len(row["images"]) for row in rows] == [0, 1, 2, 1, 2] and np.array_equal(rows[2]["images"][1], picture(2))
    assert [row["conversation"][0]["value"] for row in rows] == [
        "hi there", "<image>\nwhat is it", "<image> <image>\nsame?", "what\n<image>",
        "<image> <image>\nsame?"]
    assert [row["length"] for row in source.texts()][:4] == [-3, 6, 4, 4]
    with pytest.raises(files.BadSample, match="x.jsonl, line 6: .*pictures/9.png: no such file"):
        PairDataset(source)[0, 0, 5]
    assert PairDataset(source)[0, 7, 3]["id"] == "late" and collate([rows[0], rows[1]])["id"] == ["text", "no tag"]


def test_demo_conversations_are_true():
    captions, questions = demo_source("chat_captions", "heldout", 20), demo_source("chat", "heldout", 20)
    for row in map(captions.__getitem__, range(20)):
        things, relation = look(row["images"][0])
        assert row["conversation"] == turns("<image>", f"a {' '.join(things[0])} is {relation} a {' '.join(things[1])}")
    for row in map(questions.__getitem__, range(20)):
        asked = [turn["value"] for turn in row["conversation"][::2]]
        assert len(row["conversation"]) == 6 and len(set(asked)) == 3
        assert [text.startswith("<image>\n") for text in asked] == [True, False, False]
        assert all(turn["value"] in scenes.DEMO_ANSWERS for turn in row["conversation"][1::2])
