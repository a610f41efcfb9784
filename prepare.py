"""prepare.py"""
from PIL import Image
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from pathlib import Path
from tqdm import tqdm
from typing import NamedTuple
import argparse
import hashlib
import html
import io
import json
import math
import os
import re
import struct
import sys
import tarfile
from data import load_answers
from files import write_atomically, write_json
from images import load_image
from metrics import answer_score, normalize_answer
from weights import convert_weights


FOLDERS = ("annotations", "images", "data", "utils", "karpathy", "coco_splits", "coco", "flickr30k", "nlvr2/data")


class Dataset(NamedTuple):
    build: Callable  # Raw -> {split: rows}
    files: dict[str, str]  # name -> where to get it
    images: str  # where to get them
    published: dict[str, str] = {}  # split -> the counts of the papers or of the authors
    root: Path | None = None  # RAW, where it has a fixed place


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
        items = read_raw_json(self.find(file), lines)
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
    (captions, urls), = fields(path, [read_raw_json(path)], "captions", "image_urls")
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
            convert_weights(args.source, args.out, args.tokenizer, args.answers)
        else:
            prepare_dataset(args.command, args.root, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def read_raw_json(path: Path, lines: bool = False):
    """A JSON file, or JSON Lines as a list."""
    values = []
    for number, part in enumerate(path.read_bytes().split(b"\n") if lines else [path.read_bytes()], 1):
        try:
            values += [json.loads(part)] if part.strip() or not lines else []
        except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
            raise ValueError(f"{path}, {f'line {number}' if lines else 'the file'} is not JSON: {error}") from error
    return values if lines else values[0]
