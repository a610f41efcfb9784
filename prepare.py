"""What was downloaded -> what the other files read: official weights, and manifests of the raw datasets.

    python prepare.py weights --source model.ckpt --out FOLDER   Lightning .ckpt, HF BridgeTower, OpenAI CLIP .pt
    python prepare.py openclipart --out DIR                      drawings with captions; also: tuxpaint
    python prepare.py vqav2 --root RAW --out DIR                 also: vgqa nlvr2 snli_ve flickr30k coco vg sbu cc3m

Manifests are JSON Lines, DIR/<name>_<split>.jsonl; images stay where they are. Running it again gives the same bytes.
The rules are those of the official preprocessing (src/utils/write_*.py) except where a comment says otherwise.
"""
import argparse
import dataclasses
import functools
import hashlib
import html
import io
import json
import math
import os
import pickle
import re
import struct
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from data import load_answers, load_image, load_tokenizer
from model import ManagerTowerConfig, from_official, read_safetensors, save_folder, write_atomically

# ---------------- VQA answers: the normaliser of ViLT and METER, on the tables of VQA's official evaluator

# a key is its contraction with one apostrophe left out: couldnt've and couldn'tve -> couldn't've
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
    wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've""".split()
                for i, letter in enumerate(word) if letter == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the official table
DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")  # meant: (?<!\d); as it is, "3." loses its period. Kept


@functools.cache
def normalize_answer(text: str) -> str:
    """An answer as the ViLT family writes it: 'The two-story house.' -> '2 story house'."""
    out = text
    for mark in PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text or COMMA.search(text)
        out = out.replace(mark, "" if alone else " ")
    words = (DIGITS.get(word, word) for word in PERIOD.sub("", out, count=32).lower().split())  # 32: re.UNICODE
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES).replace(",", "")


def answer_score(count: int) -> float:
    """Soft score of what `count` of ten annotators answered: the mean of min(n / 3, 1) with each left out in turn."""
    return (0.0, 0.3, 0.6, 0.9, 1.0)[min(count, 4)]


# ---------------- Raw files

FOLDERS = ("annotations", "images", "data", "utils", "karpathy", "coco_splits", "coco", "flickr30k", "nlvr2/data")


class Dataset(NamedTuple):
    build: Callable  # Raw -> {split: rows}
    files: dict[str, str]  # name -> where to get it
    images: str  # where to get them
    published: dict[str, str] = {}  # split -> the counts of the papers or of the authors
    root: Path | None = None  # RAW, where it has a fixed place


def read_json(path: Path, lines: bool = False):
    """A JSON file, or JSON Lines as a list."""
    values = []
    for number, part in enumerate(path.read_bytes().split(b"\n") if lines else [path.read_bytes()], 1):
        try:
            values += [json.loads(part)] if part.strip() or not lines else []
        except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
            raise ValueError(f"{path}, {f'line {number}' if lines else 'the file'} is not JSON: {error}") from error
    return values if lines else values[0]


def fields(path: Path, items, *keys: str) -> Iterator[tuple]:
    """The values of `keys` of each item of a file's list, with a progress bar; a key with a ? may be absent (None)."""
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected a list of entries, found {type(items).__name__}")
    for number, item in enumerate(tqdm(items, desc=path.name, unit_scale=True, leave=False, disable=len(items) < 1000)):
        absent = [k for k in keys if not k.endswith("?") and (not isinstance(item, dict) or k not in item)]
        if absent:
            raise ValueError(f"{path}, entry {number} has no field {absent[0]!r}: {str(item)[:100]}")
        yield tuple(item.get(k.rstrip("?")) for k in keys)


class Raw:
    """The downloads of one dataset below `root`: finds files and images, and notes what is missing or left out."""

    def __init__(self, name: str, root: Path, out: Path):
        self.name, self.spec, self.root, self.out = name, DATASETS[name], root, Path(os.path.realpath(out))
        self.bases = [base for folder in ("", name, *FOLDERS) if (base := root / folder).is_dir()]  # usual sub-folders
        self.folders: dict[str, dict[str, str]] = {}  # listings of image folders
        self.missing: dict[str, None] = {}  # images, in the order of their first use
        self.found, self.left_out = 0, Counter()
        absent = [f"  {file}   from {source}" for file, source in self.spec.files.items() if not self.find(file)]
        if not self.bases or absent:
            looked = ", ".join(map(str, self.bases)) or f"{root}: no such folder; {self.spec.images}"
            raise ValueError("\n".join([f"files of {name} are missing (looked in {looked})", *absent]))

    def find(self, file: str) -> Path | None:
        return next((path for base in self.bases if (path := base / file).is_file()), None)

    def entries(self, file: str, *keys: str, under: str | None = None, lines: bool = False) -> Iterator[tuple]:
        """`fields` of a JSON list, of the list `under` a key, or of JSON Lines."""
        items = read_json(self.find(file), lines)
        yield from fields(self.find(file), items.get(under) if under and isinstance(items, dict) else items, *keys)

    def image(self, *candidates: str) -> str | None:
        """The first of these images that exists, relative to the manifest; None if none does, which is noted."""
        for candidate in candidates:
            folder, _, file = candidate.rpartition("/")
            if folder not in self.folders:  # one listing instead of a system call an image
                places = [os.path.realpath(base / folder) for base in reversed(self.bases) if (base / folder).is_dir()]
                self.folders[folder] = {entry.name: entry.path for place in places for entry in os.scandir(place)}
            if path := self.folders[folder].get(file):
                self.found += 1
                return os.path.relpath(path, self.out)
        self.missing[candidates[0]] = None
        return None

    def captions(self, image_id, captions: Iterable[str], *candidates: str) -> list[dict]:
        """One row, or none where the image or every caption is missing."""
        captions, image = dedupe(captions), self.image(*candidates)
        self.left_out["images without a caption"] += not captions
        return [{"image": image, "captions": captions, "image_id": image_id}] if captions and image else []


def dedupe(texts: Iterable[str]) -> list[str]:
    """Distinct non-empty texts in order (the official list(set(...)) changes its order with every process)."""
    return list(dict.fromkeys(text for t in texts if (text := " ".join(t.split()))))


def write_json(path: Path, values: list, lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [json.dumps(value, ensure_ascii=False) for value in values]
    text = "".join(f"{part}\n" for part in parts) if lines else "[" + ",\n".join(parts) + "]\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def prepare_dataset(name: str, root: Path, out: Path) -> None:
    """Write the manifests of one dataset and print its counts beside the published ones."""
    raw = Raw(name, root, out)
    splits = raw.spec.build(raw)
    if not raw.found:
        raise ValueError(f"no image of {name} is in {root}, e.g. {[*raw.missing][:1]}; get them: {raw.spec.images}")
    for split, rows in splits.items():
        images = len({image for row in rows for image in row.get("images", [row.get("image")])})
        texts = sum(len(row.get("captions", row.get("questions", [""]))) for row in rows)
        print(f"{name}_{split}: {images:,} images, {texts:,} texts (published: {raw.spec.published.get(split, '-')})")
        if rows:  # an empty manifest is not written
            write_json(out / f"{name}_{split}.jsonl", rows, lines=True)
    for what, number in (+raw.left_out).items():
        print(f"left out: {number:,} {what}")
    if raw.missing:
        print(f"left out: {len(raw.missing):,} missing images: {', '.join([*raw.missing][:3])} ... ({raw.spec.images})")


# ---------------- The datasets


def build_vqav2(raw: Raw) -> dict:
    """Vocabulary: normalised multiple_choice_answer of train, then val, with count >= 9, ids by first occurrence."""
    annotations, counts = {}, Counter()
    keys = ("question_id", "multiple_choice_answer", "answers", "question_type?", "answer_type?")
    for file in ("v2_mscoco_train2014_annotations.json", "v2_mscoco_val2014_annotations.json"):
        for question_id, answer, answers, *types in raw.entries(file, *keys, under="annotations"):
            counts[normalize_answer(answer)] += 1
            given = Counter(normalize_answer(a) for a, in fields(raw.find(file), answers, "answer"))
            annotations[question_id] = given, *types
    vocabulary = [answer for answer, count in counts.items() if count >= 9]
    if not vocabulary:
        raise ValueError("no answer stands 9 times: use whole annotation files (the images may be a subset)")
    splits = {split: vqa_rows(raw, f"{split}2014", annotations, set(vocabulary)) for split in ("train", "val")}
    # to choose a checkpoint when training on nearly everything; a subset keeps the share of the published 1,000 images
    rest = len(splits["val"]) - min(1000, math.ceil(len(splits["val"]) / 40))
    splits |= {"trainable_val": splits["val"][:rest], "rest_val": splits["val"][rest:]}
    splits |= {"test": vqa_rows(raw, "test2015"), "test-dev": vqa_rows(raw, "test-dev2015")}
    write_json(raw.out / "answers.json", vocabulary)
    print(f"answers.json: {len(vocabulary):,} answers (published: 3,129)")
    return splits


def vqa_rows(raw: Raw, split: str, annotations: dict | None = None, vocabulary: set[str] = frozenset()) -> list[dict]:
    """One row an image, in the order of the file. Questions without an answer of the vocabulary are left out."""
    file, rows, folder = f"v2_OpenEnded_mscoco_{split}_questions.json", {}, split.replace("test-dev", "test")
    for image_id, question_id, text in raw.entries(file, "image_id", "question_id", "question", under="questions"):
        question = {"id": question_id, "question": text}
        if annotations is not None:
            if question_id not in annotations:
                raise ValueError(f"{raw.find(file)}: question {question_id} is not in the annotations of {split}")
            given, *types = annotations[question_id]
            question["answers"] = {a: answer_score(n) for a, n in given.items() if a in vocabulary}
            question |= {k: v for k, v in zip(("question_type", "answer_type"), types) if v is not None}
        if question.get("answers") == {}:
            raw.left_out[f"questions of {split} without an answer of the vocabulary"] += 1
        else:
            rows.setdefault(image_id, []).append(question)
    return [{"image": image, "image_id": image_id, "questions": questions} for image_id, questions in rows.items()
            if (image := raw.image(f"{folder}/COCO_{folder}_{image_id:012d}.jpg"))]


def build_vgqa(raw: Raw) -> dict:
    """Questions with one distinct answer of the VQAv2 vocabulary (made before, in --out). coco_*: the images in COCO.

    Karpathy's val and test images are never in train. Of the images outside COCO one in ten goes to val, by a hash.
    """
    vocabulary, kept, file = set(load_answers(raw.out)), {}, "question_answers.json"
    lines = "\n".join(raw.find(f"karpathy_{split}_images.txt").read_text() for split in ("val", "test")).split("\n")
    held_out = {int(re.findall(r"\d+", line.split(".jpg")[0])[-1]) for line in lines if line.strip()}
    coco = dict(raw.entries("image_data.json", "image_id", "coco_id?"))
    for image_id, pairs in raw.entries(file, "id", "qas"):
        questions = {}  # text -> {answer: id of its first question}
        for question_id, text, answer in fields(raw.find(file), pairs, "qa_id", "question", "answer"):
            if (answer := normalize_answer(answer)) in vocabulary:
                questions.setdefault(" ".join(text.split()), {}).setdefault(answer, question_id)
        raw.left_out["questions with several answers"] += sum(len(found) > 1 for found in questions.values())
        kept[image_id] = [{"id": i, "question": text, "answers": {answer: 1.0}} for text, found in questions.items()
                          if len(found) == 1 for answer, i in found.items()]
    splits = {name: [] for name in ("coco_train", "coco_val", "train", "val")}
    for image_id, questions in kept.items():
        image = raw.image(f"VG_100K/{image_id}.jpg", f"VG_100K_2/{image_id}.jpg") if questions else None
        coco_id = coco.get(image_id)
        split = "val" if (coco_id in held_out if coco_id else bucket(str(image_id)) < 10) else "train"
        for name in (split, f"coco_{split}")[: 1 + bool(coco_id)] if image else ():
            splits[name].append({"image": image, "image_id": image_id, "questions": questions})
    return splits


def build_nlvr2(raw: Raw) -> dict:
    splits = {"train": [], "dev": [], "test1": []}
    for split, rows in splits.items():
        keys = ("sentence", "identifier", "label", "directory?")
        for sentence, identifier, label, directory in raw.entries(f"{split}.json", *keys, lines=True):
            if str(label) not in ("True", "False"):
                raise ValueError(f"{raw.find(split + '.json')}: label {label!r} of {identifier} is not True or False")
            name = identifier.rpartition("-")[0]  # the last field numbers the sentences of a pair
            folder = split if directory is None else f"{split}/{directory}"
            pair = [raw.image(f"images/{folder}/{name}-img{k}.png", f"{folder}/{name}-img{k}.png") for k in (0, 1)]
            if all(pair):
                rows.append({"images": pair, "sentence": sentence, "label": str(label) == "True", "id": identifier})
    return splits


def build_snli_ve(raw: Raw) -> dict:
    splits = {"train": [], "dev": [], "test": []}
    for split, rows in splits.items():
        keys = ("Flickr30K_ID", "sentence2", "gold_label")
        for image_id, hypothesis, label in raw.entries(f"snli_ve_{split}.jsonl", *keys, lines=True):
            image = raw.image(f"flickr30k-images/{image_id}.jpg", f"flickr30k_images/{image_id}.jpg")
            if label not in ("contradiction", "neutral", "entailment"):
                raw.left_out[f"rows of {split} with label {label!r}"] += 1
            elif image:
                rows.append({"image": image, "image_id": image_id, "hypothesis": hypothesis, "label": label})
    return splits


def build_karpathy(raw: Raw) -> dict:
    """COCO and Flickr30K by Karpathy's splits. The papers train on COCO's restval and on Flickr30K's val as well."""
    file, coco, splits = f"dataset_{raw.name}.json", raw.name == "coco", {"train": [], "val": [], "test": []}
    for name, split, sentences in raw.entries(file, "filename", "split", "sentences", under="images"):
        captions, stem = (caption for caption, in fields(raw.find(file), sentences, "raw")), Path(name).stem
        if coco:  # COCO_val2014_000000391895.jpg
            row = raw.captions(int(stem.split("_")[-1]), captions, f"{stem.split('_')[1]}/{name}")
        else:
            row = raw.captions(stem, captions, f"flickr30k-images/{name}", f"flickr30k_images/{name}")
        for target in {"restval": ["train"], "val": ["val"] if coco else ["train", "val"]}.get(split, [split]):
            splits[target] += row
    return splits


def build_vg(raw: Raw) -> dict:
    """Every distinct region phrase of an image is one of its captions."""
    rows, file = [], "region_descriptions.json"
    for regions, in raw.entries(file, "regions"):
        phrases = list(fields(raw.find(file), regions, "image_id", "phrase"))
        for image_id in dict(phrases):
            texts = (phrase for owner, phrase in phrases if owner == image_id)
            rows += raw.captions(image_id, texts, f"VG_100K/{image_id}.jpg", f"VG_100K_2/{image_id}.jpg")
    return {"train": rows}


def build_sbu(raw: Raw) -> dict:
    path, rows = raw.find("sbu-captions-all.json"), []
    (captions, urls), = fields(path, [read_json(path)], "captions", "image_urls")
    if len(captions) != len(urls):
        raise ValueError(f"{path}: {len(captions)} captions, but {len(urls)} image_urls")
    for name, caption in zip((url.rpartition("/")[2] for url in urls), tqdm(captions, desc=path.name, leave=False)):
        rows += raw.captions(name, [caption], f"SBU/{name}", f"images/{name}")
    return {"train": rows}


def build_cc3m(raw: Raw) -> dict:
    """The image of row i (from 0) is <split>/i or <split>/i.jpg."""
    splits = {"train": [], "val": []}
    for (split, rows), file in zip(splits.items(), raw.spec.files):
        path = raw.find(file)
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        for i, line in enumerate(tqdm(lines, desc=file, unit_scale=True, leave=False)):
            caption, tab, _ = line.partition("\t")
            if not tab:
                raise ValueError(f"{path}, line {i + 1}: expected a caption, a tab and a URL, found {line[:80]!r}")
            rows += raw.captions(str(i), [caption], f"{split}/{i}.jpg", f"{split}/{i}", f"images_{split}/{i}.jpg")
    return splits


# ---------------- Real pictures with captions in two Debian packages: drawings in the public domain, and stamps (GPL-2)

SKIPPED_STAMPS = re.compile(r"_(mirror|flip)\b|symbols/alphabets")
BOILERPLATE = re.compile(r"https?:|www\.|\.com\b|@|licen[sc]e|copyright|public domain|hash\(0x|clip ?arts?\b|theme|Ã"
                         r"|collection|icon ?set|inkscape|sodipodi|s[iu]bmission|convert|advertising|rollandin$", re.I)
DULL_KEYWORD = re.compile(r".*(sym|national|travel)|.*\d.*|hash|unsorted|signs?( and symbols)?|symbols?|shapes?|icons?"
                          r"|united nations member|recreation|geometry|menu|equipment|activities|miscellany|computer")


def bucket(text: str) -> int:
    """0..99, from a hash that is the same in every process."""
    return int(hashlib.sha1(text.encode()).hexdigest(), 16) % 100


def tidy(text: str, title: bool = False) -> str:
    """A caption without file-name spelling, numbering and author; empty if it is boilerplate or says nothing."""
    text = " ".join(html.unescape(html.unescape(text)).split())
    if title:
        text = re.sub(r"\.(svg|png)\b", "", text.replace("_", " "), flags=re.I)
        text = text.replace("-", " ") if " " not in text and text.count("-") > 1 else text
        text = re.sub(r"\s(by|di)\s[A-Z].*|\s*(?i:architetto|rollandin)\b.*|(?<=[a-z])[\s#]*\d{1,3}$", "", text)
    dull = BOILERPLATE.search(text) or len(text.split()) > 40 or len(re.findall(r"[^\W\d_]", text)) < 2
    return "" if dull else text.strip(" -,")


def build_openclipart(raw: Raw) -> dict:
    """Images with [title, description, title with keywords], from the Dublin Core in the SVG of the same name."""
    found, pictures = [], []
    for path in sorted(p for p in (raw.root / "png").rglob("*.png") if not p.is_symlink()):
        svg = (raw.root / "svg" / path.relative_to(raw.root / "png")).with_suffix(".svg")
        drawing = svg.read_text(encoding="utf-8", errors="replace") if svg.is_file() else ""
        core = re.search(r"<metadata.*?</metadata>|$", drawing, re.S)[0]
        core = re.sub(r"<(\w+:)?Agent\b.*?</(\w+:)?Agent>", "", core, flags=re.S)  # people have titles as well
        texts = [re.findall(rf"<(?:\w+:)?{tag}\b[^/>]*>([^<]*)<", core) for tag in ("title", "description", "li")]
        if not re.search(r'<image\b[^>]*href="(?!data:|#)', drawing):  # its PNG says "linked image not found"
            found.append((path, *("".join(t[:1]) for t in texts[:2]), texts[2]))
    uses = [Counter(row[i] for row in found) for i in (1, 2)]
    for path, title, description, keywords in found:  # what stands on more than 25 images is the name of a collection
        title = tidy(title, title=True) if uses[0][title] <= 25 else ""
        description = tidy(description) if uses[1][description] <= 25 else ""
        first = title or description
        keywords = dict.fromkeys(k.replace("_", " ").lower() for k in keywords if tidy(k))
        keywords = [k for k in keywords if not DULL_KEYWORD.fullmatch(k) and k not in first.lower()][:6]
        pictures.append((path, [first, description, ", ".join([first, *keywords])] if first else []))
    return split_pictures(raw, pictures)


def build_tuxpaint(raw: Raw) -> dict:
    """Stamps with the first, English line of their .txt."""
    paths = [path for path in sorted(raw.root.rglob("*.png")) if not SKIPPED_STAMPS.search(path.as_posix())]
    texts = [t.read_text(encoding="utf-8") if (t := p.with_suffix(".txt")).is_file() else "" for p in paths]
    return split_pictures(raw, [(path, [text.partition("\n")[0]]) for path, text in zip(paths, texts)])


def split_pictures(raw: Raw, pictures: list[tuple[Path, list[str]]]) -> dict:
    """What is fit to learn from, 80 / 10 / 10 by a hash of the first caption; no caption is in two splits."""
    splits, where, seen, uses = {"train": [], "val": [], "test": []}, {}, set(), Counter()
    for path, captions in tqdm(pictures, desc=raw.name, leave=False):
        captions = list({c.casefold().rstrip("."): c for c in reversed(dedupe(captions))}.values())[::-1]
        content, first = path.read_bytes(), captions[0].casefold() if captions else ""
        digest = hashlib.sha1(content).digest()
        # the size stands in the header; nothing is decoded, for there are files of 600 megapixels
        sides = struct.unpack(">II", content[16:24]) if content[:4] == b"\x89PNG" and len(content) > 24 else (0, 0)
        area, ratio = math.prod(sides), max(sides) / max(1, min(sides))
        checks = {"without a caption": not captions, "below 32 px": min(sides) < 32, "above 8 megapixels": area > 8e6,
                  "longer than 5:1": ratio > 5, "that are blank": area > 2000 * len(content),
                  "that are copies": digest in seen, "beyond six of a caption": uses[first] == 6}
        if wrong := [reason for reason, holds in checks.items() if holds]:
            raw.left_out[f"images {wrong[0]}"] += 1
            continue
        seen.add(digest)
        uses[first] += 1
        raw.found += 1
        split = "train" if bucket(first) < 80 else "val" if bucket(first) < 90 else "test"
        image_id = path.relative_to(raw.root).as_posix()
        splits[split].append({"image": f"{raw.name}.tar::{image_id}", "captions": captions, "image_id": image_id})
        for caption in captions:
            where.setdefault(caption.casefold(), set()).add(split)
    for row in (row for rows in splits.values() for row in rows):
        first, *others = row["captions"]
        row["captions"] = [first, *(c for c in others if len(where[c.casefold()]) == 1)]
    names = sorted(row["image_id"] for rows in splits.values() for row in rows)
    raw.out.mkdir(parents=True, exist_ok=True)
    write_atomically(raw.out / f"{raw.name}.tar", lambda file: pack(file, raw.root, names))
    return splits


def pack(file: Path, root: Path, names: list[str], side: int = 256) -> None:
    """Copies of at most `side` pixels, RGB over white, in a tar; decoding the originals takes 0.1 s each."""
    with tarfile.open(file, "w") as archive:
        for name in tqdm(names, desc=file.name.partition(".")[0], leave=False):
            image, content = load_image(root / name), io.BytesIO()
            image.thumbnail((side, side), Image.Resampling.BICUBIC)
            image.save(content, "PNG")
            member = tarfile.TarInfo(name)  # without a time stamp
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)


COCO, NLVR2, SHARE = "https://cocodataset.org", "https://github.com/lil-lab/nlvr", Path("/usr/share")
SPLITS = "https://github.com/peteanderson80/bottom-up-attention/tree/master/data/genome/coco_splits"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
GENOME = "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"
FLICKR, SNLI_VE = "https://shannon.cs.illinois.edu/DenotationGraph", "https://github.com/necla-ml/SNLI-VE"
SBU, CC3M = "https://www.cs.rice.edu/~vo/sbucaptions", "https://ai.google.com/research/ConceptualCaptions/download"
DATASETS = {
    "vqav2": Dataset(build_vqav2, dict.fromkeys([f"v2_{name}.json" for name in (
        "OpenEnded_mscoco_train2014_questions", "OpenEnded_mscoco_val2014_questions", "mscoco_train2014_annotations",
        "mscoco_val2014_annotations", "OpenEnded_mscoco_test2015_questions", "OpenEnded_mscoco_test-dev2015_questions"
        )], "https://visualqa.org/download.html"), COCO, {
        "train": "82,774 images, 435,174 questions", "val": "40,503 images, 210,207 questions"}),
    "vgqa": Dataset(build_vgqa, {
        "question_answers.json": GENOME, "image_data.json": GENOME, "karpathy_val_images.txt": SPLITS,
        "karpathy_test_images.txt": SPLITS}, GENOME, {
        "coco_train": "429,061 questions", "coco_val": "38,855", "train": "846,015", "val": "85,851"}),
    "nlvr2": Dataset(build_nlvr2, dict.fromkeys(["train.json", "dev.json", "test1.json"], NLVR2), NLVR2, {
        "train": "86,373 sentences", "dev": "6,982", "test1": "6,967"}),
    "snli_ve": Dataset(build_snli_ve, {f"snli_ve_{s}.jsonl": SNLI_VE for s in ("train", "dev", "test")}, FLICKR, {
        "train": "529,527 hypotheses", "dev": "17,858", "test": "17,901"}),
    "flickr30k": Dataset(build_karpathy, {"dataset_flickr30k.json": KARPATHY}, FLICKR, {
        "train": "29,000 + 1,014 images", "val": "1,014", "test": "1,000"}),
    "coco": Dataset(build_karpathy, {"dataset_coco.json": KARPATHY}, COCO, {
        "train": "113,287 images, 567K captions", "val": "5,000", "test": "5,000"}),
    "vg": Dataset(build_vg, {"region_descriptions.json": GENOME}, GENOME, {"train": "108K images, 4.8M captions"}),
    "sbu": Dataset(build_sbu, {"sbu-captions-all.json": SBU}, "its image_urls", {"train": "860K images"}),
    "cc3m": Dataset(build_cc3m, dict.fromkeys(["Train_GCC-training.tsv", "Validation_GCC-1.1.0-Validation.tsv"], CC3M),
                    "their URLs", {"train": "2.9M images"}),
    "openclipart": Dataset(build_openclipart, {}, "apt-get install openclipart-png openclipart-svg", {},
                           SHARE / "openclipart"),
    "tuxpaint": Dataset(build_tuxpaint, {}, "apt-get install tuxpaint-stamps-default", {}, SHARE / "tuxpaint/stamps")}


# ---------------- Weights: a pickle becomes inert records, from which tensors are rebuilt; nothing is executed


class Inert(dict):
    """What a pickle's globals and their instances become: it takes every call, state and item, and does nothing."""
    name, args, state, __hash__ = "", (), None, object.__hash__

    def __init__(self, *args, **kwargs):
        self.args = args

    def __setstate__(self, state):
        self.state = state

    def __call__(self, *args, **kwargs):
        return Inert()

    append = extend = add = __call__


def as_dict(value) -> dict:
    return value if isinstance(value, dict) else {}


class InertUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return type("Inert", (Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid):
        return pid  # ("storage", class, key, device, length)


STORAGES = {"Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64,
            "Long": torch.int64, "Int": torch.int32, "Byte": torch.uint8, "Bool": torch.bool}
BROKEN = (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, LookupError, ValueError, TypeError, AttributeError,
          RuntimeError, MemoryError, OverflowError)  # what a damaged or hostile file raises


class TorchFile:
    """A zip file of torch.save or torch.jit.save: its pickle as a `tree` of Inert records, and tensors on request."""

    def __init__(self, path: Path):
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is no zip archive: broken, or from before PyTorch 1.6; then: python -c "
                             f"\"import torch; torch.save(torch.load('{path}', weights_only=True), 'new.pt')\"")
        self.path, self.zip, self.storages = path, zipfile.ZipFile(path), {}
        try:
            pkl = min((n for n in self.zip.namelist() if n.split("/")[-1] == "data.pkl"), key=len)
            self.folder, self.tree = pkl.removesuffix("data.pkl"), InertUnpickler(self.zip.open(pkl)).load()
        except BROKEN as error:
            raise ValueError(f"{path} is not a readable PyTorch file: {error!r}") from error

    def tensor(self, node) -> torch.Tensor | None:
        """The tensor that a recorded call would make; None for anything else."""
        call = getattr(node, "name", "")
        if call in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return self.tensor(node.args[0])
        if call != "torch._utils._rebuild_tensor_v2":
            return None
        (_, kind, key, *_), offset, size, stride = node.args[:4]
        if key not in self.storages:
            content = bytearray(self.zip.read(f"{self.folder}data/{key}"))
            content = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
            self.storages[key] = content.view(STORAGES[kind.name.removeprefix("torch.").removesuffix("Storage")])
        if math.prod(size) > self.storages[key].numel():
            raise ValueError(f"shape {size} is larger than its storage")
        return self.storages[key].as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)

    def tensors(self, tree) -> dict[str, torch.Tensor]:
        """{dotted name: tensor} of nested dicts and TorchScript modules, each container once."""
        found, seen, todo = {}, set(), [("", tree)]
        for name, node in todo:  # it grows meanwhile
            try:
                tensor = self.tensor(node)
            except BROKEN as error:
                raise ValueError(f"{self.path}: tensor {name!r} cannot be read: {error!r}") from error
            if tensor is not None:
                found[name] = tensor
            elif id(node) not in seen:
                seen.add(id(node))
                items = {**node, **as_dict(getattr(node, "state", None))}.items()
                todo += [(f"{name}.{key}".lstrip("."), value) for key, value in items if isinstance(value, dict)]
        return found


def read_weights(source: Path) -> tuple[dict, dict]:
    """(state, settings) of a file or a HF folder; settings: Lightning's hyper-parameters, HF's config.json or empty."""
    if source.is_dir():
        files = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
        if not files:
            raise ValueError(f"{source} has neither .safetensors files nor pytorch_model.bin")
        settings = read_json(source / "config.json") if (source / "config.json").is_file() else {}
        return {k: v for file in files for k, v in read_weights(file)[0].items()}, settings
    if source.suffix == ".safetensors" or not source.is_file():
        return read_safetensors(source), {}
    file = TorchFile(source)
    tree = as_dict(file.tree)
    settings = as_dict(tree.get("hyper_parameters"))
    plain = {k: v for k, v in as_dict(settings.get("config", settings)).items() if isinstance(v, (int, float, str))}
    return file.tensors(as_dict(tree.get("state_dict", tree))), plain


V, T, X, M = "vit_model.visual.", "text_transformer.", "cross_modal_text_", "manager_tower.0.manager_layer."
HF_NAMES = {r"bridgetower\.": "", r"vision_model\.visual\.embeddings\.class_embedding": f"{V}class_embedding",
            r"vision_model\.visual\.embeddings\.patch_embedding\.": f"{V}conv1.", r"vision_model\.": "vit_model.",
            r"vit_model\.visual\.embeddings\.position_embedding\.weight": f"{V}positional_embedding",
            r"text_model\.": T, r"itc_(text|image)_head\.": r"cross_modal_itc_\1_head."}
HEAD_KEYS = {"mlm": "mlm_score.bias", "itm": "itm_score.fc.weight", "itc": "cross_modal_itc_text_head.fc.weight",
             "vqa": "vqa_classifier.3.weight", "nlvr2": "nlvr2_classifier.3.weight",
             "snli_ve": "snli_classifier.3.weight", "retrieval": "rank_output.weight"}
SIZES = [("vision_width", f"{V}conv1.weight", 0), ("patch_size", f"{V}conv1.weight", 3),
         ("image_size", f"{V}positional_embedding", 0), ("vocab_size", f"{T}embeddings.word_embeddings.weight", 0),
         ("max_positions", f"{T}embeddings.position_embeddings.weight", 0),
         ("text_mlp_width", f"{T}encoder.layer.0.intermediate.dense.weight", 0),
         ("text_width", f"{X}transform.weight", 1), ("hidden_size", f"{X}transform.weight", 0),
         ("mlp_ratio", f"{X}layers.0.intermediate.dense.weight", 0), ("num_answers", HEAD_KEYS["vqa"], 0),
         ("contrastive_size", HEAD_KEYS["itc"], 0),
         *(("head_hidden_scale", HEAD_KEYS[head], 1) for head in ("vqa", "nlvr2", "snli_ve"))]
COUNTS = {"vision_layers": V + r"transformer\.resblocks\.\d+", "text_layers": T + r"encoder\.layer\.\d+",
          "num_layers": X + r"layers\.\d+", "managed_layers_text": X + M + r"LayerNorm\.\d+",
          "managed_layers_image": "cross_modal_image_" + M + r"LayerNorm\.\d+"}


def bridgetower_to_official(state: dict) -> dict:
    """transformers' BridgeTower layout -> the official one, less its contrastive head on the fused features."""
    official = {}
    for key, tensor in state.items():
        if not re.search(r"(position|token_type)_ids$|^itc_cross_modal_head\.", key):
            for pattern, name in HF_NAMES.items():
                key = re.sub(f"^{pattern}", name, key)
            official[key] = tensor
    if "mlm_score.bias" in official:  # tied in transformers, so possibly not stored
        official.setdefault("mlm_score.decoder.weight", official[f"{T}embeddings.word_embeddings.weight"])
    if "logit_scale" in official:
        official["temperature"] = (-official.pop("logit_scale")).exp()
        # its image feature has passed the cross-modal transform and the type embedding: fold both into the linear head
        head, transform = "cross_modal_itc_image_head.fc.", "cross_modal_image_transform."
        shift = official[transform + "bias"] + official["token_type_embeddings.weight"][1]
        official[head + "bias"] = official[head + "bias"] + official[head + "weight"] @ shift
        official[head + "weight"] = official[head + "weight"] @ official[transform + "weight"]
    return official


def infer_config(state: dict, settings: dict) -> ManagerTowerConfig:
    """The config of a state in the official layout: from shapes and keys, and from the settings what no shape shows."""
    config = dataclasses.asdict(ManagerTowerConfig())  # an absent key leaves the default, and from_official names it
    found = {field: state[key].shape[dim] for field, key, dim in SIZES if key in state}
    counts = {field: len({m[0] for key in state if (m := re.match(pattern, key))}) for field, pattern in COUNTS.items()}
    config |= found | {field: count for field, count in counts.items() if count}
    config["image_size"] = math.isqrt(config["image_size"] - 1) * config["patch_size"]
    config["mlp_ratio"] //= config["hidden_size"]
    config["heads"] = tuple(head for head, key in HEAD_KEYS.items() if key in state)
    config["head_hidden_scale"] = max(1, config["head_hidden_scale"] // (2 * config["hidden_size"]))
    scores = state.get(X + M + "layer_scores")
    if scores is None:
        config["fusion"] = "bridge" if f"{X}layernorm.weight" in state else "last"
    else:
        config["manager_weight"] = "scalar" if scores.shape[-1] == 1 else "vector"
        config["manager_type"] = "aaue" if any("linear_controller" in key for key in state) else "saue"
    text = settings.get("text_config", {})  # transformers builds its cross-modal layers from it as well
    heads = text.get("num_attention_heads")
    config["vision_heads"] = max(1, config["vision_width"] // 64)
    config["text_heads"] = heads or max(1, config["text_width"] // 64)
    config["num_heads"] = heads or settings.get("num_heads", max(1, config["hidden_size"] // 64))
    config["dropout"] = text.get("hidden_dropout_prob", settings.get("drop_rate", 0.1))
    config["max_text_len"] = min(settings.get("max_text_len", 50), config["max_positions"] - 2)
    return ManagerTowerConfig(**config)


def prepare_weights(source: Path, out: Path, tokenizer: Path | None = None, answers: Path | None = None) -> None:
    """Official ManagerTower, BridgeTower, METER or HF BridgeTower -> our folder; CLIP, RoBERTa -> model.safetensors."""
    state, settings = read_weights(source)
    if any(re.match(r"(bridgetower\.)?vision_model\.visual\.", key) for key in state):
        state = bridgetower_to_official({key: tensor.float() for key, tensor in state.items()})
    if f"{X}transform.weight" in state:
        config, vocabulary = infer_config(state, settings), load_answers(answers) if answers else []
        if answers and len(vocabulary) != config.num_answers:
            raise ValueError(f"{answers} has {len(vocabulary)} answers, but the model has {config.num_answers}")
        save_folder({k: v.float() for k, v in from_official(state, config).items()}, config, out)
        if answers:
            write_json(out / "answers.json", vocabulary)
        print(f"{out}: {config}")
    elif any(re.search(r"(^|\.)(class_embedding|word_embeddings\.weight)$", key) for key in state):
        state = {k: v for k, v in state.items() if k.startswith("visual.")} or state  # CLIP's text encoder is not used
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "model.safetensors", lambda path: save_file(state, path))
        print(f"{out / 'model.safetensors'}: {len(state)} tensors of an encoder, for --vision or --text")
    else:
        raise ValueError(f"{source} is no ManagerTower, BridgeTower, METER, CLIP or RoBERTa: {list(state)[:4]} ...")
    if tokenizer:
        load_tokenizer(tokenizer).save(out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    weights = commands.add_parser("weights", help="official weights -> a checkpoint folder, without executing them")
    weights.add_argument("--source", type=Path, required=True, help=".ckpt, .pt, .bin, .safetensors or a HF folder")
    weights.add_argument("--tokenizer", type=Path, help="tokenizer.json, *.model or a folder, to go along")
    weights.add_argument("--answers", type=Path, help="folder with answers.json, to go along with a VQA model")
    for name, spec in DATASETS.items():
        command = commands.add_parser(name, help=spec.images)
        command.add_argument("--root", type=Path, default=spec.root, required=not spec.root, help="the raw files")
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args(arguments)
    try:
        if args.command == "weights":
            prepare_weights(args.source, args.out, args.tokenizer, args.answers)
        else:
            prepare_dataset(args.command, args.root, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
