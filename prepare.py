"""What was downloaded -> what the other scripts read: manifests of datasets, and official weights.

    python prepare.py NAME --root RAW --out DIR     DIR/<name>_<split>.jsonl (vqav2: answers.json)
    python prepare.py weights --source X --out F    a checkpoint folder, or an encoder's weights
    python prepare.py llava_parquet --root R --out D    LLaVA-OneVision's data, for train.py
    python prepare.py export --checkpoint F --out G --format official | transformers

A manifest is JSON Lines, one picture (or pair of pictures) a line; the pictures stay where they
are. The rules are those of ACL 2023, section 4 and appendix A, and of the official code
(src/utils/write_*.py of ManagerTower); each builder below says its own. The number of pictures and
texts is printed beside the published one.

A raw file that breaks its published layout ends in one sentence with file, entry and key. What a
download may lack (pictures, mostly) is left out, counted and said.
"""

import hashlib
import html
import io
import math
import os
import re
import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from data import PARSERS
from export import FORMATS, PARTS, export_checkpoint
from fields import FlagError, check_fields, option, parse_flags, show
from files import (
    MOST_BYTES,
    MOST_BYTES_OF_DATA,
    BadSample,
    is_of_kind,
    need,
    read_bounded,
    read_json,
    read_json_lines,
    read_text,
    why_no_folder,
    write_atomically,
    write_json,
    write_json_lines,
)
from images import load_image
from llava_parquet import prepare_parquet
from metrics import answer_score, normalize_answer
from tasks import load_answers
from weights import convert_weights
from world import one_sentence

Splits = dict[str, list[dict[str, Any]]]  # split -> the rows of its manifest


# ---------------------------------------------------------------- raw records
def entries_with(
    place: str, records: Iterable, kinds: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each record of a list, once the types of its keys are tested.

    kinds: key -> type, as `files.need` takes them.
    place: where the list stands; the place of a record is "{place}, entry {number from 0}".
    """
    for number, record in enumerate(records):
        record_place = f"{place}, entry {number}"
        for key, declared in kinds.items():
            need(record, key, declared, record_place)
        yield record_place, record


def dedupe(texts: Iterable[str]) -> list[str]:
    """Distinct texts in order, white space made single, empty ones dropped.

    The official list(set(...)) has another order in every process.
    """
    distinct = {}
    for text in texts:
        clean = " ".join(text.split())
        if clean:
            distinct[clean] = True
    return list(distinct)


def is_url(text: str) -> bool:
    """Whether a text is an address of the web. One that a line end cuts in two is none."""
    return re.fullmatch(r"https?://[^\t\r\n]+", text, re.IGNORECASE) is not None


def is_filled_file(path: str) -> bool:
    """Whether this is a file of more than 0 bytes, directly or by a link."""
    return os.path.isfile(path) and os.path.getsize(path) > 0


# ---------------------------------------------------------------- the downloads of one dataset
# the usual places of raw files below --root
FOLDERS = (
    "annotations",
    "images",
    "data",
    "utils",
    "karpathy",
    "coco_splits",
    "coco",
    "flickr30k",
    "nlvr2/data",
)


class Raw:
    """The downloads of one dataset below `root`: finds files and pictures, notes what is left out.

    out: the folder of the manifests, to which the paths of pictures are relative. Raises ValueError
    with the names of all raw files that are missing, and where to get them.
    """

    def __init__(self, name: str, root: Path, out: Path):
        self.name = name
        self.spec = DATASETS[name]
        self.root = root
        self.out = Path(os.path.realpath(out))
        self.bases: list[Path] = []  # the folders to look in, in this order
        for folder in ("", name, *FOLDERS):
            if (root / folder).is_dir():
                self.bases.append(root / folder)
        self.paths = self.find_files()
        self.listings: dict[str, dict[str, str]] = {}  # folder -> {name of a picture: its path}
        self.found = 0  # pictures
        self.missing: dict[str, None] = {}  # pictures, in the order of their first use
        self.left_out: Counter[str] = Counter()

    def find_files(self) -> dict[str, Path]:
        """The path of each raw file."""
        paths = {}
        absent = []
        for file, origin in self.spec.files.items():
            candidates = [base / file for base in self.bases if (base / file).is_file()]
            if candidates:
                paths[file] = candidates[0]
            else:
                absent.append(f"{file} from {origin}")
        if self.bases and not absent:
            return paths
        looked_in = ", ".join(str(base) for base in self.bases)
        if not self.bases:
            looked_in = f"{self.root}: no such folder; {self.spec.images}"
        listed = f": {'; '.join(absent)}" if absent else ""
        raise ValueError(f"files of {self.name} are missing (looked in {looked_in}){listed}")

    def entries(
        self,
        file: str,
        kinds: dict[str, Any],
        under: str = "",
        lines: bool = False,
        unique: str = "",
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """`entries_with` of a raw file: a JSON list, the list `under` a key, or JSON Lines.

        unique: a key whose value no two entries share. An empty list is an error: it is what a
        broken download leaves.
        """
        path = self.paths[file]
        if lines:
            records = read_json_lines(path)
        else:
            records = read_json(path, most_bytes=MOST_BYTES_OF_DATA)
        if under:
            records = need(records, under, list, str(path))
        if not isinstance(records, list):
            raise ValueError(f"{path} is {show(records)}; it must be a list of entries")
        if not records:
            raise ValueError(f"{path}: expected a list of entries, found none; download it again")
        is_short = len(records) < 1000
        bar = tqdm(records, desc=path.name, unit_scale=True, leave=False, disable=is_short)
        places: dict[Any, str] = {}  # value of the unique key -> where it stands
        for place, record in entries_with(str(path), bar, kinds):
            if unique:
                value = record[unique]
                if value in places:
                    raise ValueError(f"{place}: {unique!r} is {show(value)}, as in {places[value]}")
                places[value] = place.rpartition(", ")[2]
            yield place, record

    def list_folder(self, folder: str) -> dict[str, str]:
        """{name: path} of what a folder holds: one listing instead of a system call a picture."""
        listing = {}
        for base in reversed(self.bases):  # the first base wins
            if (base / folder).is_dir():
                for entry in os.scandir(os.path.realpath(base / folder)):
                    listing[entry.name] = entry.path
        return listing

    def image(self, *candidates: str) -> str | None:
        """The first of these pictures that exists, relative to the manifest; or None, and noted."""
        for candidate in candidates:
            folder, _, file = candidate.rpartition("/")
            if folder not in self.listings:
                self.listings[folder] = self.list_folder(folder)
            path = self.listings[folder].get(file)
            if path and not is_filled_file(path):
                del self.listings[folder][file]  # it is counted once, and then as missing
                self.left_out["images that are empty, or no files"] += 1
            elif path:
                self.found += 1
                return os.path.relpath(path, self.out)
        self.missing[candidates[0]] = None
        return None

    def captioned(self, image_id: int | str, texts: Iterable[str], *candidates: str) -> list[dict]:
        """The row of a captioned picture, in a list: it is empty if picture or captions lack."""
        captions = dedupe(texts)
        image = self.image(*candidates)
        if not captions:
            self.left_out["images without a caption"] += 1
            return []
        if not image:
            return []
        return [{"image": image, "captions": captions, "image_id": image_id}]


def count_row(row: dict) -> tuple[list[str], int]:
    """The pictures of a row, and its number of texts."""
    pictures = row["images"] if "images" in row else [row["image"]]
    texts = row.get("captions") or row.get("questions") or [""]
    return pictures, len(texts)


def describe_split(rows: list[dict], published: str) -> str:
    """How much a manifest holds, beside what was published."""
    pictures: set[str] = set()
    num_texts = 0
    for row in rows:
        row_pictures, row_texts = count_row(row)
        pictures.update(row_pictures)
        num_texts += row_texts
    return f"{len(pictures):,} images, {num_texts:,} texts (published: {published})"


def check_out(out: Path) -> None:
    """Raises ValueError if nothing can be written into --out, before the work begins."""
    reason = why_no_folder(out)
    if reason:
        raise ValueError(f"--out {out} cannot be written into: {reason}")


# by one of these a folder is known as a checkpoint or as a run
SIGNS_OF_A_CHECKPOINT = (
    "config.json",
    "model.safetensors",
    "training_state.pt",
    "sharded_state",
)


def check_no_checkpoint(out: Path) -> None:
    """Raises ValueError if --out is a checkpoint or a run: answers.json there is the model's."""
    for sign in SIGNS_OF_A_CHECKPOINT:
        if (out / sign).exists():
            raise ValueError(
                f"--out {out} is the folder of a checkpoint or a run, for it has {sign}; "
                "choose another folder"
            )


def check_raw_stays(raw: Raw) -> None:
    """Raises ValueError if what will be written is the same file as a raw one."""
    outputs = [raw.out / "answers.json", raw.out / f"{raw.name}.tar"]
    outputs += sorted(raw.out.glob(f"{raw.name}_*.jsonl"))
    for output in outputs:
        for path in raw.paths.values():
            if output.exists() and os.path.samefile(output, path):
                raise ValueError(
                    f"{output}, which would be written, is the raw file {path}; "
                    "choose another folder as --out"
                )


def check_rows(name: str, splits: Splits) -> None:
    """Raises ValueError for a row that training could not read again."""
    parse = PARSERS[DATASETS[name].kind]
    for split, rows in splits.items():
        for number, row in enumerate(rows, 1):
            try:
                parse(row)
            except BadSample as error:
                raise ValueError(f"{name}_{split}.jsonl, line {number} would be: {error}") from None


def prepare_dataset(name: str, root: Path, out: Path) -> None:
    """Write the manifests of one dataset into `out`; print what they hold.

    Raises ValueError; for a manifest that would be empty at the end, when the others are written.
    """
    check_out(out)
    check_no_checkpoint(out)
    raw = Raw(name, root, out)
    check_raw_stays(raw)
    out.mkdir(parents=True, exist_ok=True)
    splits = raw.spec.build(raw)
    missing = list(raw.missing)
    if not raw.found:
        example = f", e.g. {missing[0]}" if missing else ""
        raise ValueError(f"no image of {name} is in {root}{example}; get them: {raw.spec.images}")
    check_rows(name, splits)
    empty = []
    for split, rows in splits.items():
        published = raw.spec.published.get(split, "-")
        print(f"{name}_{split}: {describe_split(rows, published)}")
        if rows:
            write_json_lines(out / f"{name}_{split}.jsonl", rows)
        else:
            empty.append(f"{name}_{split}")
    for what, number in raw.left_out.items():
        print(f"left out: {number:,} {what}")
    if missing:
        examples = ", ".join(missing[:3])
        print(f"left out: {len(missing):,} missing images: {examples} ... ({raw.spec.images})")
    if empty:
        reason = f"none of its pictures is in {root}" if missing else "there are too few pictures"
        for what, number in raw.left_out.most_common(1):
            reason += f", and {number:,} {what} are left out"
        raise ValueError(
            f"{', '.join(empty)} would be empty and is not written, as {reason}; all other "
            "manifests are written"
        )


# ---------------------------------------------------------------- VQAv2
ANNOTATION_KINDS = {
    "question_id": int,
    "multiple_choice_answer": str,
    "answers": list,
    "question_type": str | None,
    "answer_type": str | None,
    "image_id": int,
}
QUESTION_KINDS = {"image_id": int, "question_id": int, "question": str}
TYPES = ("question_type", "answer_type")


class Annotation(NamedTuple):
    """What the ten annotators said about one question."""

    image_id: int
    counts: Counter  # normalised answer -> how many gave it
    types: dict[str, str]  # question_type and answer_type, where the file has them


def read_annotations(raw: Raw, split: str, majority: Counter[str]) -> dict[int, Annotation]:
    """{question id: annotation} of train2014 or val2014.

    majority: of how many questions each answer is the most frequent one; it is added to.
    """
    annotations = {}
    file = f"v2_mscoco_{split}_annotations.json"
    for place, entry in raw.entries(
        file, ANNOTATION_KINDS, under="annotations", unique="question_id"
    ):
        majority[normalize_answer(entry["multiple_choice_answer"])] += 1
        counts: Counter[str] = Counter()
        for _, answer in entries_with(f"{place}, answers", entry["answers"], {"answer": str}):
            counts[normalize_answer(answer["answer"])] += 1
        types = {key: entry[key] for key in TYPES if entry.get(key) is not None}
        annotations[entry["question_id"]] = Annotation(entry["image_id"], counts, types)
    return annotations


def build_vqav2(raw: Raw) -> Splits:
    """VQAv2, as the ViLT family and the paper prepare it.

    Vocabulary: the normalised multiple_choice_answer of train, then val, with count >= 9, in the
    order of first occurrence. A score is the mean over left-out annotators (`answer_score`).
    """
    majority: Counter[str] = Counter()
    of_train = read_annotations(raw, "train2014", majority)
    of_val = read_annotations(raw, "val2014", majority)
    vocabulary = [answer for answer, count in majority.items() if count >= 9]
    if not vocabulary:
        raise ValueError(
            "no answer stands 9 times: use whole annotation files (the images may be a subset)"
        )
    train = annotated_questions(raw, "train2014", of_train, set(vocabulary))
    val = annotated_questions(raw, "val2014", of_val, set(vocabulary))

    # rest_val is to choose a checkpoint by when training on nearly everything. It has the last
    # 1,000 pictures; in a subset of the data, their share.
    num_rest = min(1000, math.ceil(len(val) / 40))
    start_of_rest = len(val) - num_rest
    splits = {
        "train": train,
        "val": val,
        "trainable_val": val[:start_of_rest],
        "rest_val": val[start_of_rest:],
        "test": unanswered_questions(raw, "test2015"),
        "test-dev": unanswered_questions(raw, "test-dev2015"),
    }
    write_json(raw.out / "answers.json", vocabulary)
    print(f"answers.json: {len(vocabulary):,} answers (published: 3,129)")
    return splits


def questions_of(raw: Raw, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, entry) of each question of a split."""
    file = f"v2_OpenEnded_mscoco_{split}_questions.json"
    entries = raw.entries(file, QUESTION_KINDS, under="questions", unique="question_id")
    for place, entry in entries:
        need(entry, "question", str, place, filled=True)
        yield place, entry


def annotated_questions(
    raw: Raw, split: str, annotations: dict[int, Annotation], vocabulary: set[str]
) -> list[dict]:
    """The rows of train2014 or val2014. Questions with no answer of the vocabulary are left out."""
    by_image: dict[int, list[dict]] = {}
    for place, entry in questions_of(raw, split):
        question_id = entry["question_id"]
        if question_id not in annotations:
            raise ValueError(
                f"{place}: question {question_id} is not in the annotations of {split}"
            )
        annotation = annotations[question_id]
        if entry["image_id"] != annotation.image_id:
            raise ValueError(
                f"{place}: 'image_id' is {show(entry['image_id'])}, but "
                f"{show(annotation.image_id)} in the annotation of question {question_id}"
            )
        answers = {}
        for answer, count in annotation.counts.items():
            if answer in vocabulary:
                answers[answer] = answer_score(count)
        if not answers:
            raw.left_out[f"questions of {split} without an answer of the vocabulary"] += 1
            continue
        question = {"id": question_id, "question": entry["question"], "answers": answers}
        question.update(annotation.types)
        by_image.setdefault(entry["image_id"], []).append(question)
    return vqa_rows(raw, split, by_image)


def unanswered_questions(raw: Raw, split: str) -> list[dict]:
    """The rows of test2015 or test-dev2015, whose answers are not published."""
    by_image: dict[int, list[dict]] = {}
    for _, entry in questions_of(raw, split):
        question = {"id": entry["question_id"], "question": entry["question"]}
        by_image.setdefault(entry["image_id"], []).append(question)
    return vqa_rows(raw, "test2015", by_image)  # test-dev is a part of test's pictures


def vqa_rows(raw: Raw, folder: str, by_image: dict[int, list[dict]]) -> list[dict]:
    """A row for each picture of COCO that is there, in the order of the questions' file."""
    rows = []
    for image_id, questions in by_image.items():
        image = raw.image(f"{folder}/COCO_{folder}_{image_id:012d}.jpg")
        if image:
            rows.append({"image": image, "image_id": image_id, "questions": questions})
    return rows


# ---------------------------------------------------------------- questions of Visual Genome
def read_karpathy_images(path: Path) -> set[int]:
    """COCO's ids of listed pictures. A line: val2014/COCO_val2014_000000391895.jpg 391895."""
    ids = set()
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        name = re.search(r"([0-9]{1,15})\.jpg", line)
        if name is None:
            raise ValueError(
                f"{path}, line {number}: expected a picture like COCO_val2014_000000391895.jpg, "
                f"found {show(line)}"
            )
        ids.add(int(name[1]))
    if not ids:
        raise ValueError(f"{path} is empty: without it COCO's test pictures would be trained on")
    return ids


def unambiguous_questions(
    raw: Raw, place: str, pairs: list, vocabulary: set[str]
) -> list[dict[str, Any]]:
    """The questions of one picture with one distinct answer of the vocabulary, whose score is 1."""
    kinds = {"qa_id": int, "question": str, "answer": str}
    answers_of: dict[str, dict[str, int]] = {}  # question -> {answer: id of its first question}
    for _, pair in entries_with(f"{place}, qas", pairs, kinds):
        answer = normalize_answer(pair["answer"])
        question = " ".join(pair["question"].split())
        if not question:
            raw.left_out["questions without a text"] += 1
        elif answer in vocabulary:
            answers_of.setdefault(question, {}).setdefault(answer, pair["qa_id"])
    questions = []
    for question, ids in answers_of.items():
        if len(ids) > 1:
            raw.left_out["questions with several answers"] += 1
            continue
        answer, question_id = next(iter(ids.items()))
        questions.append({"id": question_id, "question": question, "answers": {answer: 1.0}})
    return questions


def build_vgqa(raw: Raw) -> Splits:
    """Visual Genome's questions whose one answer is in VQAv2's vocabulary, made before in --out.

    coco_train and coco_val: the pictures that are in COCO too. Karpathy's val and test pictures are
    never in train. Of the pictures outside COCO one in ten goes to val, by a hash.
    """
    vocabulary = set(load_answers(raw.out))
    held_out = set()
    for file in ("karpathy_val_images.txt", "karpathy_test_images.txt"):
        held_out.update(read_karpathy_images(raw.paths[file]))
    coco_ids = {}
    image_kinds = {"image_id": int, "coco_id": int | None}
    for place, entry in raw.entries("image_data.json", image_kinds, unique="image_id"):
        if "coco_id" not in entry:
            raise ValueError(f"{place}: there is no 'coco_id'; it must be a whole number or null")
        coco_ids[entry["image_id"]] = entry["coco_id"]
    questions_by_image = {}
    entry_kinds = {"id": int, "qas": list}
    for place, entry in raw.entries("question_answers.json", entry_kinds, unique="id"):
        if entry["id"] not in coco_ids:  # it may be a test picture of COCO
            raise ValueError(
                f"{place}: image {show(entry['id'])} is not in {raw.paths['image_data.json']}, "
                "which says whether it is in COCO; use files of one version"
            )
        questions_by_image[entry["id"]] = unambiguous_questions(
            raw, place, entry["qas"], vocabulary
        )

    splits: Splits = {"coco_train": [], "coco_val": [], "train": [], "val": []}
    for image_id, questions in questions_by_image.items():
        if not questions:
            continue
        image = raw.image(f"VG_100K/{image_id}.jpg", f"VG_100K_2/{image_id}.jpg")
        if not image:
            continue
        row = {"image": image, "image_id": image_id, "questions": questions}
        coco_id = coco_ids[image_id]
        if coco_id:
            split = "val" if coco_id in held_out else "train"
            splits[f"coco_{split}"].append(row)
        else:
            split = "val" if bucket(str(image_id)) < 10 else "train"
        splits[split].append(row)
    return splits


# ---------------------------------------------------------------- NLVR2 and SNLI-VE
def build_nlvr2(raw: Raw) -> Splits:
    """Pairs of pictures with a statement; test1 is the paper's test-P."""
    kinds = {
        "sentence": str,
        "identifier": str,
        "label": str | bool,
        "directory": int | str | None,
    }
    splits: Splits = {"train": [], "dev": [], "test1": []}
    for split, rows in splits.items():
        for place, entry in raw.entries(f"{split}.json", kinds, lines=True, unique="identifier"):
            need(entry, "sentence", str, place, filled=True)
            identifier = entry["identifier"]
            label = str(entry["label"])
            if label not in ("True", "False"):
                raise ValueError(f"{place}: 'label' is {show(label)}; it must be True or False")
            folder = split
            if entry.get("directory") is not None:
                folder = f"{split}/{entry['directory']}"
            pair = nlvr2_pair(raw, folder, identifier)
            if None not in pair:
                row = {
                    "images": pair,
                    "sentence": entry["sentence"],
                    "label": label == "True",
                    "id": identifier,
                }
                rows.append(row)
    return splits


def nlvr2_pair(raw: Raw, folder: str, identifier: str) -> list[str | None]:
    """The left and the right picture of dev-7-1-0: ...dev-7-1-img0.png and ...dev-7-1-img1.png."""
    name = identifier.rpartition("-")[0]  # the last field numbers the sentences of a pair
    pair = []
    for side in (0, 1):
        file = f"{folder}/{name}-img{side}.png"
        pair.append(raw.image(f"images/{file}", file))
    return pair


def build_snli_ve(raw: Raw) -> Splits:
    """Flickr30K's pictures with a hypothesis; SNLI's premise is not used."""
    kinds = {"Flickr30K_ID": str | int, "sentence2": str, "gold_label": str}
    splits: Splits = {"train": [], "dev": [], "test": []}
    for split, rows in splits.items():
        for place, entry in raw.entries(f"snli_ve_{split}.jsonl", kinds, lines=True):
            image_id = entry["Flickr30K_ID"]
            label = entry["gold_label"]
            image = raw.image(
                f"flickr30k-images/{image_id}.jpg", f"flickr30k_images/{image_id}.jpg"
            )
            if label not in ("contradiction", "neutral", "entailment"):
                raw.left_out[f"rows of {split} with label {show(label)}"] += 1
            elif image:
                need(entry, "sentence2", str, place, filled=True)
                row = {
                    "image": image,
                    "image_id": image_id,
                    "hypothesis": entry["sentence2"],
                    "label": label,
                }
                rows.append(row)
    return splits


# ---------------------------------------------------------------- COCO and Flickr30K
KarpathySplits = dict[str, tuple[str, ...]]  # split -> the manifests that its pictures go to

# The papers train on COCO's restval and
# on Flickr30K's val as well.
COCO_SPLITS: KarpathySplits = {
    "train": ("train",),
    "restval": ("train",),
    "val": ("val",),
    "test": ("test",),
}
FLICKR_SPLITS: KarpathySplits = {"train": ("train",), "val": ("train", "val"), "test": ("test",)}
KARPATHY_KINDS = {"filename": str, "split": str, "sentences": list}


class KarpathyImage(NamedTuple):
    """One picture of Karpathy's dataset_*.json."""

    place: str  # file and entry
    name: str  # of the file
    manifests: tuple[str, ...]
    captions: list[str]


def karpathy_images(raw: Raw, file: str, manifests_of: KarpathySplits) -> Iterator[KarpathyImage]:
    """The pictures of a dataset_*.json. Raises ValueError for a split not in `manifests_of`."""
    for place, entry in raw.entries(file, KARPATHY_KINDS, under="images", unique="filename"):
        split = entry["split"]
        if split not in manifests_of:
            expected = ", ".join(manifests_of)
            raise ValueError(f"{place}: 'split' is {show(split)}; it must be one of {expected}")
        name = entry["filename"]
        if not name.strip() or "/" in name or "\0" in name:
            raise ValueError(
                f"{place}: 'filename' is {show(name)}; it must be a file's name, without a folder"
            )
        captions = []
        sentences_place = f"{place}, sentences"
        for _, sentence in entries_with(sentences_place, entry["sentences"], {"raw": str}):
            captions.append(sentence["raw"])
        yield KarpathyImage(place, name, manifests_of[split], captions)


def build_coco(raw: Raw) -> Splits:
    """COCO's captions by Karpathy's splits."""
    splits: Splits = {"train": [], "val": [], "test": []}
    for image in karpathy_images(raw, "dataset_coco.json", COCO_SPLITS):
        parts = Path(image.name).stem.split("_")  # COCO, val2014, 000000391895
        if len(parts) != 3 or not re.fullmatch("[0-9]{1,15}", parts[2]):
            raise ValueError(
                f"{image.place}: 'filename' is {show(image.name)}; "
                "it must be like COCO_val2014_000000391895.jpg"
            )
        rows = raw.captioned(int(parts[2]), image.captions, f"{parts[1]}/{image.name}")
        for manifest in image.manifests:
            splits[manifest] += rows
    return splits


def build_flickr30k(raw: Raw) -> Splits:
    """Flickr30K's captions by Karpathy's splits."""
    splits: Splits = {"train": [], "val": [], "test": []}
    for image in karpathy_images(raw, "dataset_flickr30k.json", FLICKR_SPLITS):
        rows = raw.captioned(
            Path(image.name).stem,
            image.captions,
            f"flickr30k-images/{image.name}",
            f"flickr30k_images/{image.name}",
        )
        for manifest in image.manifests:
            splits[manifest] += rows
    return splits


# ---------------------------------------------------------------- Visual Genome, SBU, CC3M
def build_vg(raw: Raw) -> Splits:
    """Every distinct region phrase of a picture is one of its captions."""
    rows: list[dict] = []
    place_of: dict[int, str] = {}  # id of a picture -> the entry with its regions
    for place, entry in raw.entries("region_descriptions.json", {"regions": list}):
        phrases_of: dict[int, list[str]] = {}
        kinds = {"image_id": int, "phrase": str}
        for _, region in entries_with(f"{place}, regions", entry["regions"], kinds):
            phrases_of.setdefault(region["image_id"], []).append(region["phrase"])
        for image_id, phrases in phrases_of.items():
            if image_id in place_of:
                raise ValueError(
                    f"{place}: image {show(image_id)} has regions in {place_of[image_id]} too; "
                    "each image must be in one entry"
                )
            place_of[image_id] = place.rpartition(", ")[2]
            candidates = (f"VG_100K/{image_id}.jpg", f"VG_100K_2/{image_id}.jpg")
            rows += raw.captioned(image_id, phrases, *candidates)
    return {"train": rows}


def need_texts(path: Path, record: Any, key: str) -> list[str]:
    """The list of texts under a key of a raw file."""
    texts = need(record, key, list, str(path))
    for number, text in enumerate(texts):
        if not is_of_kind(text, str):
            raise ValueError(
                f"{path}, entry {number} of {key!r} is {show(text)}; it must be a text"
            )
    return texts


def picture_names(path: Path, urls: list[str]) -> list[str]:
    """The last part of each URL. Raises ValueError for what is none, or two with one last part."""
    names = []
    url_of: dict[str, str] = {}
    for number, url in enumerate(urls):
        place = f"{path}, entry {number} of 'image_urls'"
        if not is_url(url):
            raise ValueError(f"{place} is {show(url)}; it must begin with http:// or https://")
        name = url.rpartition("/")[2]
        other = url_of.setdefault(name, url)
        if other != url:
            raise ValueError(
                f"{place} is {show(url)}, and {show(other)} has the same last part, which is the "
                "name of the picture; leave one of them out"
            )
        names.append(name)
    return names


def build_sbu(raw: Raw) -> Splits:
    """One caption a picture, called as the last part of its URL."""
    path = raw.paths["sbu-captions-all.json"]
    content = read_json(path, most_bytes=MOST_BYTES_OF_DATA)
    captions = need_texts(path, content, "captions")
    urls = need_texts(path, content, "image_urls")
    if len(captions) != len(urls):
        raise ValueError(f"{path}: {len(captions)} captions, but {len(urls)} image_urls")
    rows: list[dict] = []
    names = picture_names(path, urls)
    for caption, name in zip(tqdm(captions, desc=path.name, leave=False), names, strict=True):
        rows += raw.captioned(name, [caption], f"SBU/{name}", f"images/{name}")
    return {"train": rows}


def build_cc3m(raw: Raw) -> Splits:
    """Lines of caption, tab, URL. The picture of line i (from 0) is <split>/i or <split>/i.jpg."""
    file_of = {
        "train": "Train_GCC-training.tsv",
        "val": "Validation_GCC-1.1.0-Validation.tsv",
    }
    splits: Splits = {"train": [], "val": []}
    for split, rows in splits.items():
        path = raw.paths[file_of[split]]
        lines = read_text(path, MOST_BYTES_OF_DATA).rstrip("\n").split("\n")
        for i, line in enumerate(tqdm(lines, desc=path.name, unit_scale=True, leave=False)):
            caption, _, url = line.partition("\t")
            if not is_url(url):
                raise ValueError(
                    f"{path}, line {i + 1}: expected a caption, a tab and a URL that begins with "
                    f"http, found {show(line)}"
                )
            candidates = (f"{split}/{i}.jpg", f"{split}/{i}", f"images_{split}/{i}.jpg")
            rows += raw.captioned(str(i), [caption], *candidates)
    return splits


# ---------------------------------------------------------------- texts of Openclipart
MOST_USES = 25  # a title or description of more drawings is the name of a collection, no caption
MOST_KEYWORDS = 6
MOST_CHARACTERS = 4000  # of a text, before its entities and its white space are made plain

# in a title, a description or a keyword: somebody's advertising, a licence, a converter's remark
BOILERPLATE = re.compile(
    r"https?:|www\.|\.com\b|@|licen[sc]e|copyright|public domain|hash\(0x|clip ?arts?\b|theme|Ã"
    r"|collection|icon ?set|inkscape|sodipodi|s[iu]bmission|convert|advertising|rollandin$",
    re.IGNORECASE,
)
# keywords that say where a drawing is filed, not what it shows
DULL_KEYWORD = re.compile(
    r".*(sym|national|travel)|(?=.*\d).*|hash|unsorted|signs?( and symbols)?|symbols?|shapes?"
    r"|icons?|united nations member|recreation|geometry|menu|equipment|activities|miscellany"
    r"|computer"
)
# " by Jane Doe", " di ...", the authors who sign without it, and a number at the end
AUTHOR_OR_NUMBER = re.compile(
    r"\s(by|di)\s[A-Z].*|(?<!\s)\s*(?i:architetto|rollandin)\b.*|(?<=[a-z])[\s#]*\d{1,3}$"
)
FILE_SUFFIX = re.compile(r"\.(svg|png)\b", re.IGNORECASE)

AGENT_START = re.compile(r"<(?:\w+:)?Agent\b")
AGENT_END = re.compile(r"</(?:\w+:)?Agent>")
TITLE_START = re.compile(r"<(?:\w+:)?title\b")
DESCRIPTION_START = re.compile(r"<(?:\w+:)?description\b")
KEYWORD_START = re.compile(r"<(?:\w+:)?li\b")
IMAGE_START = re.compile(r"<image\b")
HREF = 'href="'


class Drawing(NamedTuple):
    """A PNG, and what the Dublin Core in the SVG of the same name says about it."""

    path: Path
    title: str
    description: str
    keywords: list[str]


def metadata_of(svg: str) -> str:
    """The Dublin Core of an SVG: from <metadata to </metadata>, without what is about people."""
    start = svg.find("<metadata")
    end = svg.find("</metadata>", start + 1)
    if start < 0 or end < 0:
        return ""
    metadata = svg[start:end]
    parts = []
    position = 0
    while True:
        # <cc:Agent> ... </cc:Agent> has a title as well: a person's name
        opening = AGENT_START.search(metadata, position)
        closing = AGENT_END.search(metadata, opening.end()) if opening else None
        if opening is None or closing is None:
            break
        parts.append(metadata[position : opening.start()])
        position = closing.end()
    parts.append(metadata[position:])
    return "".join(parts) + "</metadata>"


def texts_of(metadata: str, element: re.Pattern) -> list[str]:
    """What stands in the elements of one name, up to the next tag. Every character is read once.

    <dc:title> and <dc:title x="y"> count; <dc:title/> and a tag with a slash inside do not.
    """
    texts: list[str] = []
    position = 0
    while True:
        tag = element.search(metadata, position)
        if tag is None:
            return texts
        end_of_tag = metadata.find(">", tag.end())
        if end_of_tag < 0:
            return texts
        slash = metadata.find("/", tag.end(), end_of_tag)
        if slash >= 0:
            position = slash
            continue
        end_of_text = metadata.find("<", end_of_tag)
        if end_of_text < 0:
            return texts
        texts.append(metadata[end_of_tag + 1 : end_of_text])
        position = end_of_text + 1


def links_a_picture(svg: str) -> bool:
    """Whether a drawing shows another file: then its PNG says "linked image not found"."""
    position = 0
    while True:
        tag = IMAGE_START.search(svg, position)
        if tag is None:
            return False
        end_of_tag = svg.find(">", tag.end())
        if end_of_tag < 0:
            end_of_tag = len(svg)
        href = svg.find(HREF, tag.end(), end_of_tag)
        while href >= 0:
            target = href + len(HREF)
            if not svg.startswith(("data:", "#"), target):
                return True
            href = svg.find(HREF, target, end_of_tag)
        position = end_of_tag


def read_drawings(root: Path) -> list[Drawing]:
    """The drawings below root/png, with the texts of their twins below root/svg."""
    drawings = []
    for path in sorted((root / "png").rglob("*.png")):
        if path.is_symlink() or not path.is_file():
            continue
        twin = root / "svg" / path.relative_to(root / "png").with_suffix(".svg")
        content = read_bounded(twin, MOST_BYTES) if twin.is_file() else b""
        svg = content.decode("utf-8", errors="replace")
        if links_a_picture(svg):
            continue
        metadata = metadata_of(svg)
        titles = texts_of(metadata, TITLE_START) or [""]
        descriptions = texts_of(metadata, DESCRIPTION_START) or [""]
        keywords = texts_of(metadata, KEYWORD_START)
        drawings.append(Drawing(path, titles[0], descriptions[0], keywords))
    return drawings


def unescape(text: str) -> str:
    """A text of an SVG: its entities (many are escaped twice) and its white space made plain.

    What is too long for a caption anyway is dropped: it may hold numbers of a million digits.
    """
    if len(text) > MOST_CHARACTERS:
        return ""
    return " ".join(html.unescape(html.unescape(text)).split())


def useful(text: str) -> str:
    """The text, or nothing if it is boilerplate, longer than 40 words, or without two letters."""
    if BOILERPLATE.search(text) or len(text.split()) > 40:
        return ""
    letters = re.findall(r"[^\W\d_]", text)
    if len(letters) < 2:
        return ""
    return text.strip(" -,")


def tidy(text: str) -> str:
    """A description or a keyword as a caption; empty if it says nothing."""
    return useful(unescape(text))


def tidy_title(text: str) -> str:
    """A title as a caption, without the spelling of file names, numbering and author; or empty."""
    title = unescape(text).replace("_", " ")
    title = FILE_SUFFIX.sub("", title)
    if " " not in title and title.count("-") > 1:
        title = title.replace("-", " ")
    return useful(AUTHOR_OR_NUMBER.sub("", title))


def tidy_keywords(keywords: list[str], caption: str) -> list[str]:
    """The first keywords that tell more than the caption does."""
    chosen: dict[str, None] = {}
    for keyword in keywords:
        plain = keyword.replace("_", " ").lower()
        if tidy(keyword) and not DULL_KEYWORD.fullmatch(plain) and plain not in caption.lower():
            chosen[plain] = None
    return list(chosen)[:MOST_KEYWORDS]


def drawing_captions(
    drawing: Drawing, title_uses: Counter[str], description_uses: Counter[str]
) -> list[str]:
    """[title, description, title with keywords]. Without a title the description comes first."""
    title = ""
    if title_uses[drawing.title] <= MOST_USES:
        title = tidy_title(drawing.title)
    description = ""
    if description_uses[drawing.description] <= MOST_USES:
        description = tidy(drawing.description)
    first = title or description
    if not first:
        return []
    keywords = tidy_keywords(drawing.keywords, first)
    return [first, description, ", ".join([first, *keywords])]


def build_openclipart(raw: Raw) -> Splits:
    """Public-domain drawings, with their titles, descriptions and keywords as captions."""
    drawings = read_drawings(raw.root)
    title_uses = Counter(drawing.title for drawing in drawings)
    description_uses = Counter(drawing.description for drawing in drawings)
    pictures = []
    for drawing in drawings:
        captions = drawing_captions(drawing, title_uses, description_uses)
        pictures.append((drawing.path, captions))
    return split_pictures(raw, pictures)


# ---------------------------------------------------------------- Tux Paint
SKIPPED_STAMPS = re.compile(r"_(mirror|flip)\b|symbols/alphabets")


def build_tuxpaint(raw: Raw) -> Splits:
    """Stamps with the first, English line of the .txt beside them."""
    pictures = []
    for path in sorted(raw.root.rglob("*.png")):
        if SKIPPED_STAMPS.search(path.as_posix()) or not path.is_file():
            continue
        text_file = path.with_suffix(".txt")
        text = read_text(text_file) if text_file.is_file() else ""
        pictures.append((path, [text.partition("\n")[0]]))
    return split_pictures(raw, pictures)


# ---------------------------------------------------------------- pictures that go into an archive
SPLIT_ENDS = {"train": 80, "val": 90, "test": 100}  # split -> the first bucket after it
MOST_PICTURES = 6  # of one first caption: flags
LEAST_SIDE = 32  # pixels
MOST_PIXELS = 8e6
MOST_RATIO = 5  # of the sides
BLANK = 2000  # pixels for each byte of the file
ARCHIVED_SIDE = 256  # pixels


def bucket(text: str) -> int:
    """0 to 99, from a hash that is the same in every process."""
    return int(hashlib.sha1(text.encode()).hexdigest(), 16) % 100


def split_of(caption: str) -> str:
    """train, val or test, 80 / 10 / 10 by a hash of the caption."""
    number = bucket(caption)
    return next(split for split, end in SPLIT_ENDS.items() if number < end)


def png_size(content: bytes) -> tuple[int, int]:
    """(width, height) in the header of a PNG; (0, 0) if it is none.

    Nothing is decoded, for there are files of 600 megapixels.
    """
    if content[:4] != b"\x89PNG" or len(content) <= 24:
        return 0, 0
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def distinct_captions(texts: list[str]) -> list[str]:
    """Without those that differ only in case or in a full stop: the first spelling stays."""
    spellings: dict[str, str] = {}
    for text in dedupe(texts):
        spellings.setdefault(text.casefold().rstrip("."), text)
    return list(spellings.values())


def why_unfit(content: bytes) -> str:
    """Why nothing can be learned from a picture file; empty if it is fit."""
    width, height = png_size(content)
    shorter = min(width, height)
    longer = max(width, height)
    if shorter < LEAST_SIDE:
        return f"below {LEAST_SIDE} px"
    if width * height > MOST_PIXELS:
        return "above 8 megapixels"
    if longer / shorter > MOST_RATIO:
        return f"longer than {MOST_RATIO}:1"
    if width * height > BLANK * len(content):
        return "that are blank"
    return ""


def fit_pictures(raw: Raw, pictures: list[tuple[Path, list[str]]]) -> list[tuple[Path, list[str]]]:
    """The pictures to learn from, with distinct captions. Counts why the others are left out."""
    fit = []
    digests = set()
    uses: Counter[str] = Counter()  # of a first caption
    for path, texts in tqdm(pictures, desc=raw.name, leave=False):
        captions = distinct_captions(texts)
        if not captions:
            raw.left_out["images without a caption"] += 1
            continue
        if path.stat().st_size > MOST_BYTES:
            raw.left_out["images above 64 MiB"] += 1
            continue
        content = path.read_bytes()
        digest = hashlib.sha1(content).digest()
        first = captions[0].casefold()
        reason = why_unfit(content)
        if not reason and digest in digests:
            reason = "that are copies"
        if not reason and uses[first] == MOST_PICTURES:
            reason = "beyond six of a caption"
        if reason:
            raw.left_out[f"images {reason}"] += 1
            continue
        digests.add(digest)
        uses[first] += 1
        fit.append((path, captions))
    return fit


def drop_shared_captions(splits: Splits) -> None:
    """Drop the captions that another split has too. A row's first one is in its split only."""
    splits_of: dict[str, set[str]] = {}  # caption -> where it stands
    for split, rows in splits.items():
        for row in rows:
            for caption in row["captions"]:
                splits_of.setdefault(caption.casefold(), set()).add(split)
    for rows in splits.values():
        for row in rows:
            first, *others = row["captions"]
            own = [text for text in others if len(splits_of[text.casefold()]) == 1]
            row["captions"] = [first, *own]


def split_pictures(raw: Raw, pictures: list[tuple[Path, list[str]]]) -> Splits:
    """Splits of (picture, captions) pairs, no caption in two; the pictures go into a tar."""
    splits: Splits = {split: [] for split in SPLIT_ENDS}
    names = []
    for path, captions in fit_pictures(raw, pictures):
        name = path.relative_to(raw.root).as_posix()
        names.append(name)
        row = {"image": f"{raw.name}.tar::{name}", "captions": captions, "image_id": name}
        splits[split_of(captions[0].casefold())].append(row)
    raw.found += len(names)
    drop_shared_captions(splits)
    if names:
        archive = raw.out / f"{raw.name}.tar"
        write_atomically(archive, lambda temporary: pack(temporary, raw.root, sorted(names)))
    return splits


def pack(file: Path, root: Path, names: list[str]) -> None:
    """A tar of copies of at most 256 x 256 pixels, RGB over white.

    Decoding the originals at every use would take 0.1 s each.
    """
    title = file.name.partition(".")[0]
    with tarfile.open(file, "w") as archive:
        for name in tqdm(names, desc=title, leave=False):
            image = load_image(root / name)
            image.thumbnail((ARCHIVED_SIDE, ARCHIVED_SIDE), Image.Resampling.BICUBIC)
            content = io.BytesIO()
            image.save(content, "PNG")
            member = tarfile.TarInfo(name)  # without a time stamp: the same bytes every time
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)


# ---------------------------------------------------------------- the command line
@dataclass(kw_only=True)
class DatasetConfig:
    """The flags of a dataset."""

    root: str = option(help="folder of the raw files and the pictures")
    out: str = option(help="folder to write the manifests to")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(kw_only=True)
class OpenclipartConfig(DatasetConfig):
    root: str = option("/usr/share/openclipart", "folder with png/ and svg/")


@dataclass(kw_only=True)
class TuxpaintConfig(DatasetConfig):
    root: str = option("/usr/share/tuxpaint/stamps", "folder of the stamps")


@dataclass(kw_only=True)
class WeightsConfig:
    """The flags of `weights`."""

    source: str = option(help=".ckpt, .pt, .bin, .safetensors, or a folder of Hugging Face's")
    out: str = option(help="folder to write to")
    tokenizer: str = option("", "tokenizer.json, *.model or a folder, to go along")
    answers: str = option("", "folder with answers.json, to go along with a VQA model")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(kw_only=True)
class ExportConfig:
    """The flags of `export`."""

    checkpoint: str = option(help="folder of the model, or a name of the hub")
    out: str = option(help="a new folder to write to")
    format: str = option(help="whose layout", choices=FORMATS)
    part: str = option("", "an encoder alone, in transformers' layout", choices=PARTS)

    def __post_init__(self) -> None:
        check_fields(self)


# what `weights` writes
WRITTEN = (
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "answers.json",
    "tokenizer.json",
    "tokenizer.model",
)


@dataclass(frozen=True)
class Dataset:
    """How the manifests of a dataset are made, and where its downloads come from."""

    build: Callable[[Raw], Splits]
    kind: str  # of its rows, as data.py calls it
    files: dict[str, str]  # name of a raw file -> where to get it
    images: str  # where to get the pictures
    published: dict[str, str]  # split -> the counts of the papers, or of the authors of the data
    config: type[DatasetConfig] = DatasetConfig  # its flags


COCO = "https://cocodataset.org"
FLICKR30K = "https://shannon.cs.illinois.edu/DenotationGraph"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
COCO_SPLIT_LISTS = (
    "https://github.com/peteanderson80/bottom-up-attention/tree/master/data/genome/coco_splits"
)
VQA = "https://visualqa.org/download.html"
VISUAL_GENOME = "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"
NLVR2 = "https://github.com/lil-lab/nlvr"
SNLI_VE = "https://github.com/necla-ml/SNLI-VE"
SBU = "https://www.cs.rice.edu/~vo/sbucaptions"
CC3M = "https://ai.google.com/research/ConceptualCaptions/download"

DATASETS = {
    "vqav2": Dataset(
        build=build_vqav2,
        kind="questions",
        files={
            "v2_OpenEnded_mscoco_train2014_questions.json": VQA,
            "v2_OpenEnded_mscoco_val2014_questions.json": VQA,
            "v2_mscoco_train2014_annotations.json": VQA,
            "v2_mscoco_val2014_annotations.json": VQA,
            "v2_OpenEnded_mscoco_test2015_questions.json": VQA,
            "v2_OpenEnded_mscoco_test-dev2015_questions.json": VQA,
        },
        images=COCO,
        published={
            "train": "82,774 images, 435,174 questions",
            "val": "40,503 images, 210,207 questions",
        },
    ),
    "vgqa": Dataset(
        build=build_vgqa,
        kind="questions",
        files={
            "question_answers.json": VISUAL_GENOME,
            "image_data.json": VISUAL_GENOME,
            "karpathy_val_images.txt": COCO_SPLIT_LISTS,
            "karpathy_test_images.txt": COCO_SPLIT_LISTS,
        },
        images=VISUAL_GENOME,
        published={
            "coco_train": "429,061 questions",
            "coco_val": "38,855",
            "train": "846,015",
            "val": "85,851",
        },
    ),
    "nlvr2": Dataset(
        build=build_nlvr2,
        kind="statements",
        files={"train.json": NLVR2, "dev.json": NLVR2, "test1.json": NLVR2},
        images=NLVR2,
        published={"train": "86,373 sentences", "dev": "6,982", "test1": "6,967"},
    ),
    "snli_ve": Dataset(
        build=build_snli_ve,
        kind="hypotheses",
        files={
            "snli_ve_train.jsonl": SNLI_VE,
            "snli_ve_dev.jsonl": SNLI_VE,
            "snli_ve_test.jsonl": SNLI_VE,
        },
        images=FLICKR30K,
        published={"train": "529,527 hypotheses", "dev": "17,858", "test": "17,901"},
    ),
    "flickr30k": Dataset(
        build=build_flickr30k,
        kind="captions",
        files={"dataset_flickr30k.json": KARPATHY},
        images=FLICKR30K,
        published={"train": "29,000 + 1,014 images", "val": "1,014", "test": "1,000"},
    ),
    "coco": Dataset(
        build=build_coco,
        kind="captions",
        files={"dataset_coco.json": KARPATHY},
        images=COCO,
        published={"train": "113,287 images, 567K captions", "val": "5,000", "test": "5,000"},
    ),
    "vg": Dataset(
        build=build_vg,
        kind="captions",
        files={"region_descriptions.json": VISUAL_GENOME},
        images=VISUAL_GENOME,
        published={"train": "108K images, 4.8M captions"},
    ),
    "sbu": Dataset(
        build=build_sbu,
        kind="captions",
        files={"sbu-captions-all.json": SBU},
        images="its image_urls",
        published={"train": "860K images"},
    ),
    "cc3m": Dataset(
        build=build_cc3m,
        kind="captions",
        files={"Train_GCC-training.tsv": CC3M, "Validation_GCC-1.1.0-Validation.tsv": CC3M},
        images="their URLs",
        published={"train": "2.9M images"},
    ),
    "openclipart": Dataset(
        build=build_openclipart,
        kind="captions",
        files={},
        images="apt-get install openclipart-png openclipart-svg",
        published={},
        config=OpenclipartConfig,
    ),
    "tuxpaint": Dataset(
        build=build_tuxpaint,
        kind="captions",
        files={},
        images="apt-get install tuxpaint-stamps-default",
        published={},
        config=TuxpaintConfig,
    ),
}


def help_page() -> str:
    """What `python prepare.py -h` prints."""
    lines = [
        "usage: prepare.py NAME --root RAW --out DIR",
        "       prepare.py weights --source X --out F [--tokenizer T] [--answers A]",
        "       prepare.py export --checkpoint F --out G --format official|transformers",
        "       prepare.py llava_parquet --root R --out D",
        "",
        "Downloads -> what the other scripts read. `prepare.py NAME -h` lists the flags.",
        "",
        f"  {'weights':12s} official weights -> a checkpoint folder, without executing them",
        f"  {'export':12s} a checkpoint folder -> the authors' layout, or transformers'",
        f"  {'llava_parquet':12s} LLaVA-OneVision's .parquet files -> conversations and pictures",
    ]
    for name, spec in DATASETS.items():
        lines.append(f"  {name:12s} pictures: {spec.images}")
    return "\n".join(lines)


def describe_dataset(name: str) -> str:
    """What `python prepare.py NAME -h` says above the flags."""
    spec = DATASETS[name]
    lines = [f"The manifests of {name}. Pictures: {spec.images}"]
    for file, origin in spec.files.items():
        lines.append(f"  {file}   from {origin}")
    return "\n".join(lines)


def check_not_overwritten(config: WeightsConfig) -> None:
    """Raises ValueError if --out is the folder of a run, or of what is converted."""
    out = Path(config.out)
    if (out / "training_state.pt").exists() or (out / "sharded_state").exists():
        raise ValueError(f"--out {out} is the folder of a run; choose another one")
    for flag in ("source", "tokenizer"):
        place = Path(getattr(config, flag))
        folder = place if place.is_dir() else place.parent
        if not getattr(config, flag) or not out.exists() or not folder.exists():
            continue
        present = [name for name in WRITTEN if (out / name).exists()]
        if present and os.path.samefile(folder, out):
            raise ValueError(
                f"--out {out} is where --{flag} lies, whose {present[0]} would be overwritten; "
                "choose another folder"
            )


def prepare_weights(argv: list[str]) -> None:
    """The command `weights`."""
    description = "Official weights -> a checkpoint folder, without executing them."
    config = parse_flags(WeightsConfig, argv, description, "weights")
    check_out(Path(config.out))
    check_not_overwritten(config)
    answers = load_answers(Path(config.answers)) if config.answers else None
    convert_weights(config.source, Path(config.out), config.tokenizer or None, answers)


def export_weights(argv: list[str]) -> None:
    """The command `export`."""
    description = "A checkpoint folder -> the authors' layout, or transformers', with a model card."
    config = parse_flags(ExportConfig, argv, description, "export")
    check_out(Path(config.out))
    export_checkpoint(config.checkpoint, Path(config.out), config.format, config.part)


def convert_parquet(argv: list[str]) -> None:
    """The command `llava_parquet`."""
    description = "LLaVA-OneVision's .parquet files -> SET.jsonl, SET.tar and mixture.yaml."
    config = parse_flags(DatasetConfig, argv, description, "llava_parquet")
    out = Path(config.out)
    check_out(out)
    check_no_checkpoint(out)
    prepare_parquet(Path(config.root), out)


# what is no dataset
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "weights": prepare_weights,
    "export": export_weights,
    "llava_parquet": convert_parquet,
}


def main(argv: list[str]) -> None:
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        print(help_page())
    elif command in COMMANDS:
        COMMANDS[command](argv[1:])
    elif command in DATASETS:
        spec = DATASETS[command]
        config = parse_flags(spec.config, argv[1:], describe_dataset(command), command)
        prepare_dataset(command, Path(config.root), Path(config.out))
    else:
        commands = ", ".join([*COMMANDS, *DATASETS])
        raise FlagError(
            f"the first word is {show(command)}; it must be one of {commands}; "
            "`python prepare.py -h` says what they are"
        )


if __name__ == "__main__":
    one_sentence(main)
