"""The data of both families: tokenizers, pictures, demo data, sources of rows, datasets, samplers. It imports no room.

Papers: ManagerTower section 5.1 and appendix; LLaVA-OV-Manager section IV. A *record* is one image (or pair) with all
its texts, a *row* one (image, text), a *source* the list of a task's rows, read from JSON Lines manifests, ViLT-family
.arrow files, or drawn by the built-in demo. Everything random is a function of (seed, epoch, position in the global
order), never of the process or the worker."""
import functools
import io
import itertools
import json
import logging
import math
import os
import random
import re
import tarfile
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from tokenizers import decoders, models, pre_tokenizers, trainers


class BadSample(ValueError):
    """A sample that cannot be used. The message names the file and the line."""


# ---------------------------------------------------------------- tokenizers
ROBERTA_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
ROLES = ("<pad>", "[PAD]", "<|endoftext|>"), ("<s>", "[CLS]"), ("</s>", "[SEP]"), ("<mask>", "[MASK]")


class Tokenizer:
    """Text <-> ids. `pad_id, cls_id, sep_id, mask_id` are None where a vocabulary has no such token (Qwen2)."""
    options = {"add_special_tokens": False}

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend, self.vocab_size = backend, backend.get_vocab_size()
        backend.no_padding()
        backend.no_truncation()
        special = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        roles = [next((special[name] for name in names if name in special), None) for names in ROLES]
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = roles
        self.special_ids = {*special.values(), *roles} - {None}

    def encode(self, text: str, max_len: int | None = None) -> list[int]:
        """<s> text </s>, cut to max_len with </s> kept; the text's ids alone where a vocabulary has no <s> and </s>."""
        start, end = ([] if i is None else [i] for i in (self.cls_id, self.sep_id))
        pieces = self.backend.encode(text, **self.options)
        ids = getattr(pieces, "ids", pieces)  # SentencePiece gives a list
        return start + (ids if max_len is None else ids[:max_len - len(start) - len(end)]) + end

    def decode(self, ids) -> str:
        return self.backend.decode([int(i) for i in ids if int(i) not in self.special_ids])

    def __call__(self, texts: list[str], max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, (B, max_len) int64. Always padded to max_len: AAUE's fused query sees the padding."""
        rows = [self.encode(text, max_len) for text in texts]
        ids = torch.tensor([row + [self.pad_id] * (max_len - len(row)) for row in rows])
        return ids, torch.tensor([[1] * len(row) + [0] * (max_len - len(row)) for row in rows])

    def content(self) -> tuple[str, bytes]:
        return "tokenizer.json", self.backend.to_str(pretty=True).encode()

    def save(self, folder):
        name, content = self.content()
        with open(Path(folder) / f"{name}.tmp", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, Path(folder) / name)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model. Those of <pad>, <s>, </s> and <mask> that it lacks get the ids after its last piece."""
    options = {}

    def __init__(self, path):
        backend, roles = sentencepiece.SentencePieceProcessor(model_file=str(path)), []
        self.path, self.backend, self.vocab_size = Path(path), backend, backend.get_piece_size()
        special = {i for i in range(self.vocab_size) if backend.is_control(i) or backend.is_unknown(i)}
        for names in ROLES:
            ids = [i for i in map(backend.piece_to_id, names) if backend.id_to_piece(i) in names]
            roles += ids[:1] or [self.vocab_size]
            self.vocab_size += not ids
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = roles
        self.special_ids = special | {*roles}

    def content(self) -> tuple[str, bytes]:
        return "tokenizer.model", self.path.read_bytes()


def _byte_level(model, specials) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    return backend


def load_tokenizer(path) -> Tokenizer:
    """A folder or file: tokenizer.json, RoBERTa's vocab.json + merges.txt, or a SentencePiece *.model. ValueError."""
    path = Path(path)
    files = [path / "tokenizer.json", path / "vocab.json", *sorted(path.glob("*.model"))] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file() and file.suffix in (".json", ".model")), None)
    if file is None:
        raise ValueError(f"no tokenizer at {path}: expected tokenizer.json, vocab.json with merges.txt, or a *.model")
    try:
        if file.suffix == ".model":
            return SentencePieceTokenizer(file)
        if file.name != "vocab.json":
            return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))
        model = models.BPE.from_file(str(file), str(file.with_name("merges.txt")))
    except Exception as error:  # both libraries raise nothing narrower
        raise ValueError(f"{file} is not a readable tokenizer: {error}") from None
    if missing := [name for name in ROBERTA_SPECIALS if model.token_to_id(name) is None]:
        raise ValueError(f"{file} is not RoBERTa's, it lacks {missing}: give the tokenizer.json of other vocabularies")
    return Tokenizer(_byte_level(model, ROBERTA_SPECIALS))


def train_tokenizer(texts, vocab_size: int, specials=ROBERTA_SPECIALS) -> Tokenizer:
    """Byte-level BPE of at most vocab_size ids, the specials first; the same texts give the same tokenizer."""
    backend = _byte_level(models.BPE(), ())
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(specials), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return Tokenizer(_byte_level(backend.model, specials))


# ---------------------------------------------------------------- pictures
CLIP_MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
CLIP_STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
GRAY = (128, 128, 128)
_open = functools.lru_cache(maxsize=256)(functools.partial(open, mode="rb"))


def read_at(path: str, offset: int, size: int) -> bytes:
    return os.pread(_open(path).fileno(), size, offset)  # moves no file position: forked workers may share the handle


@functools.cache
def tar_index(path: str) -> dict[str, tuple[int, int]]:  # member name -> (offset, size)
    try:
        with tarfile.open(path, "r:") as archive:
            return {member.name: (member.offset_data, member.size) for member in archive if member.isfile()}
    except tarfile.TarError as error:
        raise BadSample(f"{path} is not an uncompressed tar archive: {error}") from None


def read_bytes(path) -> bytes:
    archive, _, member = str(path).partition("::")
    if not os.path.isfile(archive) or (member and member not in tar_index(archive)):
        raise BadSample(f"{path}: no such file or archive member")
    return read_at(archive, *tar_index(archive)[member]) if member else Path(path).read_bytes()


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


# ---------------------------------------------------------------- demo data
COLORS = {"red": (220, 0, 0), "green": (0, 160, 60), "blue": (40, 80, 230), "yellow": (250, 200, 0), "black": (9, 9, 9)}
SHAPES, SIZES = ("circle", "square", "triangle"), {"small": 0.12, "large": 0.20}  # radius as a part of the side
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = {"left of": ("left", "right"), "above": ("top", "bottom")}
DEMO_ANSWERS = ["yes", "no", *SIZES, *COLORS, *SHAPES]
SNLI_LABELS = ("contradiction", "neutral", "entailment")
Thing = namedtuple("Thing", "size color shape")
Scene = namedtuple("Scene", "first second relation")  # first is "left of" or "above" second
COVER = Thing("large", "gray", "square")  # SNLI-VE: hides what is behind it


def describe(scene: Scene, swap=False) -> str:
    first, second, relation = scene if not swap else (scene.second, scene.first, OPPOSITE[scene.relation])
    return f"a {' '.join(first)} is {relation} a {' '.join(second)}"


def random_thing(draw) -> Thing:
    return Thing(draw.choice(list(SIZES)), draw.choice(list(COLORS)), draw.choice(SHAPES))


def refer(scene, number, asked=None) -> str:
    """The shortest phrase that fits only one of the two things, without its attribute `asked`."""
    thing, other = scene[number], scene[1 - number]
    noun = "object" if asked == "shape" else thing.shape
    if noun not in ("object", other.shape):
        return noun
    differing = [name for name in ("color", "size") if name != asked and getattr(thing, name) != getattr(other, name)]
    return f"{getattr(thing, differing[0]) if differing else PLACES[scene.relation][number]} {noun}"


def ask(draw, scene) -> tuple[str, str]:
    """A question about a scene and its answer, one of DEMO_ANSWERS; yes and no are equally likely."""
    number, answer = draw.randrange(2), draw.choice(("yes", "no"))
    kind = draw.choice((*Thing._fields, "exists", "relation"))
    if kind in Thing._fields:
        return f"what {kind} is the {refer(scene, number, kind)}?", getattr(scene[number], kind)
    if kind == "exists":
        thing = scene[number]
        while answer == "no" and thing[1:] in (scene.first[1:], scene.second[1:]):
            thing = random_thing(draw)
        return f"is there a {thing.color} {thing.shape}?", answer
    true = scene.relation if number == 0 else OPPOSITE[scene.relation]
    relation = true if answer == "yes" else draw.choice([relation for relation in OPPOSITE if relation != true])
    return f"is the {refer(scene, number)} {relation} the {refer(scene, 1 - number)}?", answer


# ---------------------------------------------------------------- sources
FIELDS = {"captions": {"text": "caption"}, "snli_ve": {"text": "hypothesis", "label": "label"},  # ours: the manifests'
          "nlvr2": {"text": "sentence", "label": "label", "id": "id"},
          "vqa": {"text": "question", "question_id": "id", "answers": "answers", "question_type": "question_type"}}
LABELS = {"nlvr2": (False, True), "snli_ve": SNLI_LABELS}
ARROW_STEMS = {"coco": "coco_caption_karpathy", "flickr30k": "f30k_caption_karpathy", "cc3m": "conceptual_caption",
               "snli_ve": "snli"}
ARROW_PARTS = {"coco_train": ["train", "restval"], "flickr30k_train": ["train", "val"], "vg_train": [""],
               "sbu_train": range(9), "cc3m_train": [f"train_{i}" for i in range(31)], "cc3m_val": ["val_0"]}


class Part:
    """Records in the manifests' format, the i-th at places[i]; `parse` makes one of its place or of what scan gave."""
    folder, unit, rows_each = "", "row", None  # rows_each: known without a scan

    def name(self, index):
        return f"{self.path}, {self.unit} {self.places[index]}"

    def scan(self):
        return self.places


class Demo(Part):
    """The built-in data, drawn at need from (seed, task, split, index). The splits train and heldout share no scene."""

    def __init__(self, task, split, size, seed=0, image_size=64):
        assert split in ("train", "heldout"), split
        self.path, self.places, self.rows_each = f"demo {task} {split}", range(size), 3 if task == "vqa" else 1
        self.task, self.heldout, self.seed, self.image_size = task, split == "heldout", seed, image_size

    def parse(self, raw):
        return getattr(self, self.task)(raw, random.Random(f"{self.seed} {self.name(raw)}"))

    def scene(self, draw) -> Scene:
        """Held out is a fifth of all scenes, by a hash of the description: no training picture ever shows one."""
        while True:
            scene = Scene(random_thing(draw), random_thing(draw), draw.choice(list(PLACES)))
            if scene.first != scene.second and (zlib.crc32(describe(scene).encode()) % 5 == 0) == self.heldout:
                return scene

    def paint(self, draw, scene) -> Image.Image:
        """`draw` jitters tone and places, never so far that relation, size or colour are in doubt."""
        size, across = self.image_size, draw.uniform(0.3, 0.7)
        image = Image.new("RGB", (size, size), (draw.randint(235, 255),) * 3)
        for thing, middle in ((scene.first, 0.25), (scene.second, 0.75)):
            place = middle + draw.uniform(-0.03, 0.03), across + draw.uniform(-0.06, 0.06)
            x, y = (size * side for side in (place if scene.relation == "left of" else place[::-1]))
            canvas, fill, r = ImageDraw.Draw(image), COLORS.get(thing.color, GRAY), SIZES[thing.size] * size
            if thing.shape == "circle":
                canvas.ellipse((x - r, y - r, x + r, y + r), fill)
            elif thing.shape == "square":
                canvas.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill)
            else:
                canvas.polygon(((x, y - r), (x - r, y + 0.9 * r), (x + r, y + 0.9 * r)), fill)
        return image

    def captions(self, number, draw):
        """In both directions for pre-training, in one for the MLLM, which has to know what to say."""
        scene = self.scene(draw)
        return {"image": self.paint(draw, scene), "captions": [describe(scene, swap=draw.random() < 0.5)],
                "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": describe(scene)}]}

    def vqa(self, number, draw):
        scene, asked = self.scene(draw), {}
        while len(asked) < 3:
            asked |= [ask(draw, scene)]
        turns = [{"from": role, "value": text} for turn in asked.items() for role, text in zip(("human", "gpt"), turn)]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        return {"image": self.paint(draw, scene), "conversations": turns, "questions": [
            {"id": 3 * number + k, "question": question, "answers": {answer: 1.0}, "question_type": question.split()[1]}
            for k, (question, answer) in enumerate(asked.items())]}

    def nlvr2(self, number, draw):
        """The label and the kind are drawn first, then the scenes: the text alone tells nothing."""
        label, kind, told, other = number % 2 == 0, draw.randrange(4), self.scene(draw), draw.random() < 0.5
        left, right = ((label, other), (other, label), (label or other, label or not other),
                       (label == other, not other))[kind]  # which images show what is told
        scenes = [self.scene(draw) for _ in range(2)]
        while told in scenes:
            scenes = [self.scene(draw) for _ in range(2)]
        scenes = [told if shown else scene for shown, scene in zip((left, right), scenes)]
        place = ("left image", "right image", "both images", "one image")[kind]
        return {"images": [self.paint(draw, scene) for scene in scenes], "label": label, "id": f"demo-{number}",
                "sentence": f"{describe(told, swap=draw.random() < 0.5)} in {place}"}

    def snli_ve(self, number, draw):
        """Entailment: it is seen. Neutral: what is seen agrees, the rest is covered. Contradiction: it disagrees."""
        label, told, k = SNLI_LABELS[number % 3], self.scene(draw), draw.randrange(2)  # thing k may be covered
        covered, scene = label == "neutral" or (label == "contradiction" and draw.random() < 0.5), told
        while label == "contradiction" and scene[1 - k] == told[1 - k] and scene.relation == told.relation:
            scene = self.scene(draw)
        shown = scene._replace(**{Scene._fields[k]: COVER}) if covered else scene
        return {"image": self.paint(draw, shown), "hypothesis": describe(told, draw.random() < 0.5), "label": label}

    chat_captions, chat = captions, vqa


def read_json(path, *kinds: type):
    content = read_bytes(path)
    try:
        content = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, kinds):
        raise ValueError(f"{path} must hold a {' or '.join(kind.__name__ for kind in kinds)}, found {content!r:.80}")
    return content


class Manifest(Part):
    """JSON Lines, of which only the lines' places stay in memory; or LLaVA's .json with one list, kept in memory."""

    def __init__(self, path, folder=None, strategy="all", seed=0):
        self.path, self.folder, self.items = str(path), str(folder or Path(path).parent), None
        if self.path.endswith(".json"):
            self.items, self.unit = read_json(path, list), "item"
            self.places = np.arange(len(self.items))
        else:
            lengths = [(len(line), bool(line.strip())) for line in io.BytesIO(read_bytes(self.path))]
            self.starts, self.unit = np.cumsum([0, *(length for length, _ in lengths)]), "line"
            self.places = np.array([number for number, (_, full) in enumerate(lengths, 1) if full], dtype=np.int64)
        self.places = self.places[sample_rows(strategy, len(self.places), seed)]

    def parse(self, raw):
        if self.items is not None:
            return self.items[raw]
        try:
            return json.loads(read_at(self.path, self.starts[raw - 1], self.starts[raw] - self.starts[raw - 1]))
        except ValueError as error:  # broken JSON or UTF-8
            raise BadSample(f"not JSON: {error}") from None


@functools.cache
def _arrow_table(path):
    try:
        import pyarrow
        return pyarrow.ipc.open_file(pyarrow.memory_map(path)).read_all()
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    except (ValueError, OSError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise ValueError(f"{path} is not an Arrow file: {error}") from None


class ArrowFile(Part):
    """An .arrow file as ViLT, METER, BridgeTower and ManagerTower users have it, memory-mapped."""
    columns = {"captions": ["caption"], "vqa": ["questions", "answers", "answer_scores", "question_id"],
               "nlvr2": ["questions", "answers", "identifier"], "snli_ve": ["sentences", "labels"]}

    def __init__(self, task, path):
        self.task, self.path, table = task, str(path), _arrow_table(str(path))
        self.pictures = ["image_0", "image_1"] if task == "nlvr2" else ["image"]
        if missing := {*self.pictures, *self.columns[task]} - {*table.column_names}:
            raise ValueError(f"{path} lacks the columns {sorted(missing)} of {task}; it has {table.column_names}")
        self.texts = self.columns[task] + ["image_id"] * ("image_id" in table.column_names)
        self.places = range(table.num_rows)

    def scan(self):
        for batch in _arrow_table(self.path).select(self.texts).to_batches(max_chunksize=1024):
            yield from batch.to_pylist()

    def parse(self, raw):
        if not isinstance(raw, dict):
            raw = _arrow_table(self.path).select(self.pictures + self.texts).slice(raw, 1).to_pylist()[0]
        pictures = [raw.get(name, b"") for name in self.pictures]
        if self.task == "captions":
            rows = [{"caption": text} for text in raw["caption"] or ()]
        elif self.task == "vqa":  # test files have no answers, or nulls
            scores = [dict(zip(*pair)) if pair[0] else None for pair in zip(raw["answers"], raw["answer_scores"])]
            rows = zip(raw["question_id"], raw["questions"], scores or [None] * len(raw["questions"]))
            rows = [dict(zip(("id", "question", "answers"), row)) for row in rows]
        elif self.task == "nlvr2":
            rows = [{"sentence": text, "label": answer == "True", "id": raw["identifier"]}
                    for text, answer in zip(raw["questions"], raw["answers"])]
        else:
            rows = [{"hypothesis": texts[1], "label": dict(enumerate(SNLI_LABELS)).get(label)}
                    for texts, label in zip(raw["sentences"], raw["labels"])]
        return {"images": pictures, "image": pictures[0], "image_id": raw.get("image_id"), "rows": rows}


def _need(record, key, kind):
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or value == [] or (isinstance(value, str) and not value.strip()):
        raise BadSample(f"{key!r} must be a non-empty {kind.__name__}, found {value!r:.80}")
    return value


def _chat_row(record):
    """With the published inconsistency: images whose tags are missing get them before the first turn."""
    turns, images = _need(record, "conversations", list), record.get("image") or []
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) and "from" in turn for turn in turns):
        raise BadSample(f"every turn needs 'from' and a text 'value', found {turns!r:.80}")
    turns, images = [dict(turn) for turn in turns], images if isinstance(images, list) else [images]
    tags = sum(turn["value"].count("<image>") for turn in turns)
    if "video" in record or (images and tags not in (0, len(images))):
        raise BadSample(f"{len(images)} images but {tags} <image> tags; videos are not read")
    if images and not tags:
        turns[0]["value"] = " ".join(["<image>"] * len(images)) + "\n" + turns[0]["value"]
    words = sum(len(turn["value"].split()) for turn in turns)
    return images, [{"conversation": turns, "id": record.get("id"), "length": words if images else -words}]


def record_rows(task: str, record: dict) -> tuple[list, list[dict]]:
    """Pictures and rows of a record in the manifests' format; BadSample says which field is wrong."""
    if not isinstance(record, dict):
        raise BadSample(f"not a JSON object: {record!r:.80}")
    if task.startswith("chat"):
        return _chat_row(record)
    images, items = _need(record, "images", list) if task == "nlvr2" else [record.get("image")], [record]
    if [isinstance(image, (str, bytes, Image.Image)) for image in images] != [True] * (1 + (task == "nlvr2")):
        raise BadSample(f"{'two images' if task == 'nlvr2' else 'an image'} expected, found {images!r:.80}")
    if "rows" in record or task == "vqa":
        items = _need(record, "rows" if "rows" in record else "questions", list)
    elif task == "captions":
        items = [{"caption": text} for text in _need(record, "captions", list)]
    rows = []
    for item in items:
        _need(item, FIELDS[task]["text"], str)
        rows.append({name: item.get(key) for name, key in FIELDS[task].items()} | {"image_id": record.get("image_id")})
        if task in LABELS and rows[-1]["label"] not in LABELS[task]:
            raise BadSample(f"'label' must be one of {LABELS[task]}, found {rows[-1]['label']!r}")
        if task in LABELS:
            rows[-1]["label"] = LABELS[task].index(rows[-1]["label"])
        if not isinstance(rows[-1].get("answers") or {}, dict):
            raise BadSample(f"'answers' must be a dict of scores, found {rows[-1]['answers']!r:.80}")
    if task == "captions":  # de-duplicated in order: the order of a set differs from process to process
        rows = list({row["text"]: row for row in rows}.values())
    return images, rows


def tolerate(error, policy: str, seen: int, bad: set):
    """Raises a bad sample, or with the policy "skip" logs it, and raises when more than 1 in 1,000 are bad. `bad` holds
    the different ones that this process has met: every DataLoader worker has its own count."""
    if policy != "skip":
        raise error
    if str(error) not in bad:
        logging.warning("skipped bad sample: %s", error)
    bad.add(str(error))
    if len(bad) > max(1, seen / 1000 + 3 * math.sqrt(seen / 1000)):  # and three standard deviations of chance
        raise ValueError(f"{len(bad)} of {seen} samples are bad, more than 1 in 1,000; repair the data. Last: {error}")


class Source:
    """The rows of one task over any number of parts (manifests, .arrow files, demo data), one after the other.
    `source[row]`: "text", "images" (RGB), "image_index" (the record's number), "image_id"; vqa "question_id", "answers"
    ({answer: score}; None in test sets), "question_type"; nlvr2 "label", "id"; snli_ve "label" (number in SNLI_LABELS);
    chat "conversation", "id", "length" and no text. Opening reads every text and no picture; what is broken raises
    BadSample with file and line, or is left out with on_bad_sample="skip"."""

    def __init__(self, task: str, parts: list, on_bad_sample="error"):
        self.task, self.parts, self.on_bad_sample, self.seen, self.bad = task, parts, on_bad_sample, 0, set()
        counts = [[part.rows_each] * len(part.places) if part.rows_each else [len(rows) for rows in self._scan(part)]
                  for part in parts]
        self.part_ends, counts = np.cumsum([len(part.places) for part in parts]), np.concatenate(counts).astype(int)
        self.num_images, self.image_of = len(counts), np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        if not len(self):
            raise ValueError(f"no rows in {', '.join(part.path for part in parts)}")

    def _scan(self, part):
        for index, raw in enumerate(part.scan()):
            self.seen += 1
            try:
                yield record_rows(self.task, part.parse(raw))[1]
            except BadSample as error:
                tolerate(BadSample(f"{part.name(index)}: {error}"), self.on_bad_sample, self.seen, self.bad)
                yield []

    def __len__(self):
        return len(self.image_of)

    def _find(self, index):
        number = int(np.searchsorted(self.part_ends, index, side="right"))
        return self.parts[number], index - int(self.part_ends[number]) + len(self.parts[number].places)

    def name(self, index: int) -> str:
        """Its file and line."""
        part, local = self._find(index)
        return part.name(local)

    def _record(self, index):
        part, local = self._find(index)
        try:
            images, rows = record_rows(self.task, part.parse(part.places[local]))
            return [load_image(os.path.join(part.folder, x) if isinstance(x, str) else x) for x in images], rows
        except BadSample as error:
            raise BadSample(f"{part.name(local)}: {error}") from None

    def images(self, index: int) -> list[Image.Image]:
        return self._record(index)[0]

    def __getitem__(self, row: int) -> dict:
        index = int(self.image_of[row])
        images, rows = self._record(index)
        first = int(np.searchsorted(self.image_of, self.image_of[row]))
        return rows[row - first] | {"images": images, "image_index": index}

    def texts(self, limit: int | None = None) -> list[dict]:
        """All rows, or the first ones, without their pictures."""
        records = enumerate(rows for part in self.parts for rows in self._scan(part))
        return list(itertools.islice((row | {"image_index": index} for index, rows in records for row in rows), limit))


def demo_source(task: str, split: str, size: int, seed: int = 0, image_size: int = 64) -> Source:
    """`size` records of captions, vqa (3 questions each), nlvr2, snli_ve, chat_captions or chat; train or heldout."""
    return Source(task, [Demo(task, split, size, seed, image_size)])


def demo_tokenizer(vocab_size=512) -> Tokenizer:
    """A byte-level BPE in which every word of the demo data is one token."""
    texts = [row["text"] for task in FIELDS for row in demo_source(task, "train", 300).texts()]
    return train_tokenizer(texts, vocab_size)


def source_files(root, name: str, split: str) -> list[Path]:
    """Files of one split of a set: `<name>_<split>.jsonl`, or all the .arrow shards under their ViLT-family names."""
    manifest, stem = Path(root) / f"{name}_{split}.jsonl", ARROW_STEMS.get(name, name)
    if manifest.is_file():
        return [manifest]
    stems = [f"{stem}_{part}".rstrip("_") for part in ARROW_PARTS.get(f"{name}_{split}", [split])]
    files = [Path(root) / f"{stem}.arrow" for stem in stems]
    fixed = [file.with_name(f"{file.stem}_fix.arrow") for file in files]  # VQAv2 with normalised human answers
    if missing := [file.name for file, fix in zip(files, fixed) if not file.is_file() and not fix.is_file()]:
        raise ValueError(f"{root} has no {manifest.name}, and of its .arrow files it lacks {', '.join(missing)}")
    return [fix if fix.is_file() else file for file, fix in zip(files, fixed)]


def open_source(task: str, where, split="train", names=(), on_bad_sample="error") -> Source:
    """A .jsonl or .arrow file, or the sets `names` of a folder, one after the other; split "train+val" takes both.
    Names: coco, flickr30k, vg, sbu, cc3m, vqav2, vgqa_coco, nlvr2, snli_ve, or the <name> of any <name>_<split>.jsonl.
    As in the papers, the .arrow training split of COCO includes restval and that of Flickr30K val."""
    files = [Path(where)] if Path(where).is_file() else [
        file for name in names for part in split.split("+") for file in source_files(where, name, part)]
    if not files:
        raise ValueError(f"{where}: no such file, or a folder of which no sets were named")
    parts = [ArrowFile(task, file) if file.suffix == ".arrow" else Manifest(file) for file in files]
    return Source(task, parts, on_bad_sample)


def load_answers(root) -> list[str]:
    """The VQA vocabulary: answers.json (a list), or rebuilt from the answers and labels inside vqav2_*.arrow."""
    if (Path(root) / "answers.json").is_file():
        return read_json(Path(root) / "answers.json", list)
    rows = [row for path in Path(root).glob("vqav2_*.arrow")
            for row in _arrow_table(str(path)).select(["answers", "answer_labels"]).to_pylist()]
    known = {label: answer for row in rows for pair in zip(row["answers"], row["answer_labels"]) if all(pair)
             for answer, label in zip(*pair)}
    if not known or max(known) >= len(known):
        raise ValueError(f"no VQA vocabulary in {root}: neither answers.json nor vqav2_*.arrow files with all answers")
    return [known[i] for i in range(len(known))]


def sample_rows(strategy: str, count: int, seed: int) -> np.ndarray:
    """Row numbers for LLaVA's sampling strategies: all, first:N, end:N, random:N; N may be a percentage, rounded up."""
    match = re.fullmatch(r"(all)|(first|end|random):([\d.]+%|\d+)", strategy)
    if not match:
        raise ValueError(f"sampling_strategy {strategy!r} is none of all, first:N, end:N, random:N (or N%)")
    kind, amount = match[2], match[3] or "100%"
    size = min(count, math.ceil(count * float(amount[:-1]) / 100) if amount.endswith("%") else int(amount))
    rows = np.random.default_rng((seed, count, size, 3)).permutation(count) if kind == "random" else np.arange(count)
    return rows[count - size:] if kind == "end" else rows[:size]


def read_mixture(path: str) -> list[dict]:
    """The `datasets` list of json_path and sampling_strategy: JSON or YAML of just this shape. Else: the file."""
    if not path.endswith((".yaml", ".yml")):
        content = {} if path.endswith(".jsonl") else read_json(path, list, dict)
        return content["datasets"] if "datasets" in content else [{"json_path": path}]
    entries = []
    for number, line in enumerate(read_bytes(path).decode().splitlines(), 1):
        match = re.fullmatch(r"""\s*(-\s+)?(json_path|sampling_strategy):\s*(["']?)(.+?)\3\s*(\s#.*)?""", line)
        if match and (match[1] or entries):
            entries += [{}] if match[1] else []
            entries[-1][match[2]] = match[4]
        elif not re.fullmatch(r"\s*(#.*)?|datasets:\s*(#.*)?", line):
            raise ValueError(f"{path}, line {number}: {line!r} is no `datasets:`, `- json_path:`, `sampling_strategy:`")
    return entries


def open_chat(where, image_folder=None, seed=0, on_bad_sample="error") -> Source:
    """LLaVA's .json or .jsonl, `/p/{a,b}.json`, or a mixture of them (.yaml, .json); images lie in image_folder."""
    head, *braced = re.split(r"[{}]", str(where))
    names = [head + name + braced[1] for name in braced[0].split(",")] if len(braced) == 2 else [str(where)]
    entries = [entry for name in names for entry in read_mixture(name)]
    parts = [Manifest(one["json_path"], image_folder, one.get("sampling_strategy", "all"), seed) for one in entries]
    return Source("chat", parts, on_bad_sample)


# ---------------------------------------------------------------- datasets
def mask_tokens(ids: torch.Tensor, tokenizer: Tokenizer, rng, probability=0.15) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked ids and labels (-100: not chosen), (L,): of 15% of the ordinary tokens 80% <mask>, 10% any, 10% kept."""
    chosen, kind, ids = rng.random(len(ids)) < probability, rng.random(len(ids)), ids.numpy()
    chosen &= [i not in tokenizer.special_ids for i in ids.tolist()]
    masked = np.where(chosen & (kind < 0.8), tokenizer.mask_id, ids)
    masked = np.where(chosen & (kind >= 0.9), rng.integers(tokenizer.vocab_size, size=len(ids)), masked)
    return torch.from_numpy(masked), torch.from_numpy(np.where(chosen, ids, -100))


class PairDataset(torch.utils.data.Dataset):
    """Rows as tensors: pixels (3, S, S), input_ids, attention_mask (T), image_index, and the row's other fields; nlvr2
    pixels_1, label; vqa targets (A), soft scores without those of unknown answers, none in test sets. No tokenizer:
    rows as they are (LLaVA). A key is (epoch, position, row) or the row; after a skipped row comes the next one."""

    def __init__(self, source: Source, tokenizer: Tokenizer | None = None, transform=None, max_text_len=50, seed=0,
                 on_bad_sample="error", answers=()):
        self.source, self.tokenizer, self.transform, self.max_text_len = source, tokenizer, transform, max_text_len
        self.seed, self.on_bad_sample, self.seen, self.bad, self.answers = seed, on_bad_sample, 0, set(), answers

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key) -> dict:
        epoch, position, row = key if isinstance(key, tuple) else (0, key, key)
        for other in range(row, row + len(self)):
            self.seen += 1
            try:
                return self.item(position, other % len(self), np.random.default_rng((self.seed, epoch, position)))
            except BadSample as error:
                tolerate(error, self.on_bad_sample, self.seen, self.bad)
        raise ValueError("no sample of the data can be read")

    def item(self, position, row, rng) -> dict:
        item = self.source[row]
        if self.tokenizer is None:
            return item
        ids, mask = self.tokenizer([item.pop("text")], self.max_text_len)
        item |= {"input_ids": ids[0], "attention_mask": mask[0]}
        item |= zip(("pixels", "pixels_1"), (self.transform(image, rng) for image in item.pop("images")))
        if (scores := item.pop("answers", None)) is not None:
            item["targets"] = torch.tensor([float(scores.get(answer, 0)) for answer in self.answers or ()])
        return item | {name: torch.tensor(int(item[name])) for name in ("label", "image_index") if name in item}


class PretrainDataset(PairDataset):
    """Adds mlm_ids, mlm_labels (T), itm_labels () 1 = match, itm_pixels: the picture, or any other one. Exactly half of
    each global batch is false. With share_images there is no itm_pixels: of the positions 2k and 2k + 1 exactly one is
    false, and takes its partner's picture."""

    def __init__(self, *args, batch_size, objectives=("mlm", "itm"), share_images=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.batch_size, self.false_images = 2 if share_images else batch_size, "itm" in objectives and not share_images
        if self.source.image_of[0] == self.source.image_of[-1]:
            raise ValueError("image-text matching needs at least two images, the data has one")

    def item(self, position, row, rng):
        item = super().item(position, row, rng)
        item["mlm_ids"], item["mlm_labels"] = mask_tokens(item["input_ids"], self.tokenizer, rng)
        batch, place = divmod(position, self.batch_size)
        order = np.random.default_rng((self.seed, batch, 0, 1)).permutation(self.batch_size)
        match = int(order[place] >= self.batch_size // 2)
        item["itm_labels"] = torch.tensor(match)
        if self.false_images:
            index = own = int(self.source.image_of[row])
            while index == own and not match:
                index = int(self.source.image_of[rng.integers(len(self))])
            item["itm_pixels"] = item["pixels"] if match else self.transform(self.source.images(index)[0], rng)
        return item


def collate(items: list[dict]) -> dict:
    """Tensors are stacked, everything else becomes a list."""
    columns = {name: [item[name] for item in items] for name in items[0]}
    return {name: torch.stack(column) if torch.is_tensor(column[0]) else column for name, column in columns.items()}


# ---------------------------------------------------------------- samplers
def length_grouped(lengths, batch_size: int, world_size: int, generator: torch.Generator) -> list[int]:
    """One epoch's order of LLaVA's sampler: batches of one modality (negative length: no image) and of similar lengths.
    Megabatches of world_size batches (all micro-batches of a step) of shuffled rows are dealt out, longest row first,
    to the smallest total; the last ones of both modalities come sorted at the end."""
    def deal(rows):
        chunks, totals = [rows[i::world_size] for i in range(world_size)], [0] * world_size
        if len(rows) % world_size == 0:
            chunks = [[] for _ in range(world_size)]
            for row in rows:
                i = totals.index(min(totals))
                chunks[i].append(row)
                full = len(chunks[i]) * world_size == len(rows)
                totals[i] = math.inf if full else totals[i] + abs(lengths[row])
        return [row for chunk in chunks for row in chunk]

    modalities, size = [], batch_size * world_size
    for rows in ([i for i, n in enumerate(lengths) if n > 0], [i for i, n in enumerate(lengths) if n <= 0]):
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()] if rows else rows
        megas = [sorted(rows[i:i + size], key=lambda row: -abs(lengths[row])) for i in range(0, len(rows), size)]
        modalities += [[deal(mega) for mega in megas]] if rows else []
    if len(modalities) == 1:
        return [row for mega in modalities[0] for row in mega]
    full = modalities[0][:-1] + modalities[1][:-1]
    order = torch.randperm(len(full), generator=generator).tolist()
    return [row for i in order for row in full[i]] + sorted(modalities[0][-1] + modalities[1][-1])


class GlobalBatchSampler(torch.utils.data.Sampler):
    """This process's micro-batches, lists of keys (epoch, position, row), for DataLoader's batch_sampler. The positions
    run over the epochs' permutations (`lengths`: length_grouped), none is dropped; step s has s * batch_size onwards,
    and of each of its micro-steps rank r takes the r-th micro_batch_size, whatever the number of processes."""

    def __init__(self, num_rows: int, batch_size: int, micro_batch_size: int, rank=0, world_size=1, seed=0,
                 start_step=0, stop_step=1, lengths=None):
        stride = micro_batch_size * world_size
        if batch_size % stride:
            raise ValueError(f"batch_size {batch_size} must be a multiple of micro_batch_size x processes = {stride}")
        self.num_rows, self.batch_size, self.size = num_rows, batch_size, micro_batch_size
        self.seed, self.lengths, self.epoch, self.order = seed, lengths, None, None
        self.starts = range(start_step * batch_size + rank * self.size, stop_step * batch_size, stride)

    def __len__(self):
        return len(self.starts)

    def __iter__(self):
        for start in self.starts:
            yield [self.key(position) for position in range(start, start + self.size)]

    def key(self, position: int) -> tuple[int, int, int]:
        epoch, place = divmod(position, self.num_rows)
        if epoch != self.epoch and self.lengths is None:
            self.order = np.random.default_rng((self.seed, epoch, 0, 2)).permutation(self.num_rows)
        elif epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self.order = length_grouped(self.lengths, self.size, self.batch_size // self.size, generator)
        self.epoch = epoch
        return epoch, position, int(self.order[place])
