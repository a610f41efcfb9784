"""data.py"""
from PIL import Image
from collections.abc import Callable, Iterator
from typing import Any
from pathlib import Path
from torch.utils.data import DataLoader
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import numpy as np
import os
import re
import torch
from chat import IMAGE_TAG, IMAGE_TOKEN, collate_chat, encode_chat
from files import BadSample, read_at, read_bytes, read_json
from images import load_image
from multigrid import preprocess_image
from tokenizer import Tokenizer
from world import ranks


FIELDS = {"captions": {"text": "caption"}, "hypotheses": {"text": "hypothesis", "label": "label"},  # ours: the manifests'
          "statements": {"text": "sentence", "label": "label", "id": "id"},
          "questions": {"text": "question", "question_id": "id", "answers": "answers", "question_type": "question_type"}}


SNLI_LABELS = ("contradiction", "neutral", "entailment")


LABELS = {"statements": (False, True), "hypotheses": SNLI_LABELS}




class Part:
    """Records in the manifests' format, the i-th at places[i]; `parse` makes one of its place or of what scan gave."""
    folder, unit, rows_each = "", "row", None  # rows_each: known without a scan

    def name(self, index):
        return f"{self.path}, {self.unit} {self.places[index]}"

    def scan(self):
        return self.places


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
    columns = {"captions": ["caption"], "questions": ["questions", "answers", "answer_scores", "question_id"],
               "statements": ["questions", "answers", "identifier"], "hypotheses": ["sentences", "labels"]}

    def __init__(self, kind, path):
        self.kind, self.path, table = kind, str(path), _arrow_table(str(path))
        self.pictures = ["image_0", "image_1"] if kind == "statements" else ["image"]
        if missing := {*self.pictures, *self.columns[kind]} - {*table.column_names}:
            raise ValueError(f"{path} lacks the columns {sorted(missing)} of {kind}; it has {table.column_names}")
        self.texts = self.columns[kind] + ["image_id"] * ("image_id" in table.column_names)
        self.places = range(table.num_rows)

    def scan(self):
        for batch in _arrow_table(self.path).select(self.texts).to_batches(max_chunksize=1024):
            yield from batch.to_pylist()

    def parse(self, raw):
        if not isinstance(raw, dict):
            raw = _arrow_table(self.path).select(self.pictures + self.texts).slice(raw, 1).to_pylist()[0]
        pictures = [raw.get(name, b"") for name in self.pictures]
        if self.kind == "captions":
            rows = [{"caption": text} for text in raw["caption"] or ()]
        elif self.kind == "questions":  # test files have no answers, or nulls
            scores = [dict(zip(*pair)) if pair[0] else None for pair in zip(raw["answers"], raw["answer_scores"])]
            rows = zip(raw["question_id"], raw["questions"], scores or [None] * len(raw["questions"]))
            rows = [dict(zip(("id", "question", "answers"), row)) for row in rows]
        elif self.kind == "statements":
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


def record_rows(kind: str, record: dict) -> tuple[list, list[dict]]:
    """Pictures and rows of a record in the manifests' format; BadSample says which field is wrong."""
    if not isinstance(record, dict):
        raise BadSample(f"not a JSON object: {record!r:.80}")
    if kind.startswith("chat"):
        return _chat_row(record)
    images, items = _need(record, "images", list) if kind == "statements" else [record.get("image")], [record]
    if [isinstance(image, (str, bytes, Image.Image)) for image in images] != [True] * (1 + (kind == "statements")):
        raise BadSample(f"{'two images' if kind == 'statements' else 'an image'} expected, found {images!r:.80}")
    if "rows" in record or kind == "questions":
        items = _need(record, "rows" if "rows" in record else "questions", list)
    elif kind == "captions":
        items = [{"caption": text} for text in _need(record, "captions", list)]
    rows = []
    for item in items:
        _need(item, FIELDS[kind]["text"], str)
        rows.append({name: item.get(key) for name, key in FIELDS[kind].items()} | {"image_id": record.get("image_id")})
        if kind in LABELS and rows[-1]["label"] not in LABELS[kind]:
            raise BadSample(f"'label' must be one of {LABELS[kind]}, found {rows[-1]['label']!r}")
        if kind in LABELS:
            rows[-1]["label"] = LABELS[kind].index(rows[-1]["label"])
        if not isinstance(rows[-1].get("answers") or {}, dict):
            raise BadSample(f"'answers' must be a dict of scores, found {rows[-1]['answers']!r:.80}")
    if kind == "captions":  # de-duplicated in order: the order of a set differs from process to process
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
    """The rows of one kind over any number of parts (manifests, .arrow files, demo data), one after the other.
    `source[row]`: "text", "images" (RGB), "image_index" (the record's number), "image_id"; vqa "question_id", "answers"
    ({answer: score}; None in test sets), "question_type"; nlvr2 "label", "id"; snli_ve "label" (number in SNLI_LABELS);
    chat "conversation", "id", "length" and no text. Opening reads every text and no picture; what is broken raises
    BadSample with file and line, or is left out with on_bad_sample="skip"."""

    def __init__(self, kind: str, parts: list, on_bad_sample="error"):
        self.kind, self.parts, self.on_bad_sample, self.seen, self.bad = kind, parts, on_bad_sample, 0, set()
        digest = hashlib.sha256()
        self._hash = digest
        counts = [[part.rows_each] * len(part.places) if part.rows_each else [len(rows) for rows in self._scan(part)]
                  for part in parts]
        self.part_ends, counts = np.cumsum([len(part.places) for part in parts]), np.concatenate(counts).astype(int)
        self.num_images, self.image_of = len(counts), np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self.digest = digest.hexdigest()
        if not len(self):
            raise ValueError(f"no rows in {', '.join(part.path for part in parts)}")

    def _scan(self, part):
        for index, raw in enumerate(part.scan()):
            self.seen += 1
            try:
                rows = record_rows(self.kind, part.parse(raw))[1]
                self._hash.update(repr(rows).encode("utf-8", "surrogatepass"))
                yield rows
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
            images, rows = record_rows(self.kind, part.parse(part.places[local]))
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


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(size for size in range(1, min(number, most) + 1) if number % size == 0)


def deal(count: int, parts: int) -> list[int]:
    """`count` things dealt to `parts` as evenly as possible, the larger parts first: 7 to 3 -> [3, 2, 2]."""
    share, rest = divmod(count, parts)
    return [share + 1] * rest + [share] * (parts - rest)


class BatchPlan:
    """Which rows of each global batch a process takes, and in how many micro-steps.

    The batch is cut into as few micro-steps as keep every process at most at micro_batch_size rows, and each of them
    is dealt to the processes. Where the numbers do not divide, some parts have one unit more than others.
    unit: rows that must stay together, 2 where neighbours share a picture.

    sizes[i][r]: rows of process r in micro-step i. starts[i][r]: the place of the first one in the batch.
    """

    def __init__(self, batch_size: int, micro_batch_size: int, num_processes: int, unit: int = 1):
        if batch_size % unit or batch_size < unit * num_processes:
            raise ValueError(
                f"--batch_size {batch_size} cannot be dealt to {num_processes} processes: it must be a multiple of "
                f"{unit}, and at least {unit * num_processes}"
            )
        self.batch_size = batch_size
        units = batch_size // unit
        most = max(1, micro_batch_size // unit)
        micro_steps = math.ceil(units / (most * num_processes))
        while math.ceil(math.ceil(units / micro_steps) / num_processes) > most:
            micro_steps += 1
        micro_steps = min(micro_steps, units // num_processes)  # no process is without a row
        self.sizes = []
        self.starts = []
        place = 0
        for step_units in deal(units, micro_steps):
            sizes = [unit * share for share in deal(step_units, num_processes)]
            starts = []
            for size in sizes:
                starts.append(place)
                place += size
            self.sizes.append(sizes)
            self.starts.append(starts)


class GlobalBatchSampler(torch.utils.data.Sampler):
    """This process' micro-batches, lists of keys (epoch, position, row), for DataLoader's batch_sampler.

    The positions run over the epochs' permutations, and none is dropped; step s has the positions from
    s * batch_size on, dealt as the plan says. With `lengths` each epoch is grouped by them (see length_grouped), in
    groups of group_size, whatever the number of processes.
    """

    def __init__(
        self,
        num_rows: int,
        plan: BatchPlan,
        rank: int = 0,
        seed: int = 0,
        start_step: int = 0,
        stop_step: int = 1,
        lengths: list[int] | None = None,
        group_size: int = 1,
    ):
        self.num_rows = num_rows
        self.plan = plan
        self.rank = rank
        self.seed = seed
        self.steps = range(start_step, stop_step)
        self.lengths = lengths
        self.group_size = group_size
        self.epoch: int | None = None  # whose order is at hand
        self.order: Any = None

    def __len__(self) -> int:
        return len(self.steps) * len(self.plan.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in self.steps:
            for sizes, starts in zip(self.plan.sizes, self.plan.starts, strict=True):
                first = step * self.plan.batch_size + starts[self.rank]
                yield [self.key(position) for position in range(first, first + sizes[self.rank])]

    def key(self, position: int) -> tuple[int, int, int]:
        """(epoch, position, row) of a position in the global order of all epochs."""
        epoch, place = divmod(position, self.num_rows)
        if epoch != self.epoch:
            self.order = self.order_of(epoch)
            self.epoch = epoch
        return epoch, position, int(self.order[place])

    def order_of(self, epoch: int) -> Any:
        """The rows of an epoch in their order."""
        if self.lengths is None:
            return np.random.default_rng((self.seed, epoch, 0, 2)).permutation(self.num_rows)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        num_groups = self.plan.batch_size // self.group_size
        return length_grouped(self.lengths, self.group_size, num_groups, generator)



def batches(dataset, batch_size: int, num_workers: int = 0, collate: Callable = collate):
    """(rows, batch) of this process: batch b goes to process b % world, so that no batch depends on world."""
    starts = range(0, len(dataset), batch_size)[ranks()[0] :: ranks()[1]]
    plan = [range(start, min(start + batch_size, len(dataset))) for start in starts]
    return zip(plan, DataLoader(dataset, batch_sampler=plan, collate_fn=collate, num_workers=num_workers))


class ChatDataset(PairDataset):
    """Rows of `source`: tokens (input_ids, labels), images [ImageTiles]. Up to position `plain` of the global order
    come rows of `captions`, in stage 1's style. The model cuts what is too long, after splicing; nothing is dropped."""

    def __init__(self, source, rows, config, strict_labels=False, captions=None, plain=0, **kwargs):
        super().__init__(source, **kwargs)
        self.rows, self.config, self.strict_labels = rows, config, strict_labels
        self.captions, self.plain = captions or source, plain

    def __len__(self):
        return len(self.rows)

    def item(self, position, row, rng):
        style, source = ("plain", self.captions) if position < self.plain else ("qwen_1_5", self.source)
        row = source[int(self.rows[row])]
        images, chat, name = row["images"], row["conversation"], source.name(row["image_index"])
        try:
            tokens = encode_chat(chat, self.tokenizer, style, self.strict_labels, has_image=bool(images))
        except ValueError as error:
            raise BadSample(f"{name}: {error}") from None
        if (tags := tokens[0].count(IMAGE_TOKEN)) != len(images):
            raise BadSample(f"{name}: {len(images)} images, but {tags} {IMAGE_TAG} in the turns to train on")
        images = [preprocess_image(image, self.config, multi_image=len(images) > 1) for image in images]
        return {"tokens": tokens, "images": images, "image_index": row["image_index"]}


def collate_conversations(items: list[dict]) -> dict:
    return {**collate_chat([item["tokens"] for item in items]), "images": sum((x["images"] for x in items), []),
            "image_index": [item["image_index"] for item in items]}


def arrow_rows(path, columns: list[str]) -> list[dict]:
    return _arrow_table(str(path)).select(columns).to_pylist()


def open_source(kind: str, files: list[Path], on_bad_sample: str = "error") -> Source:
    """.jsonl manifests and .arrow files as one source."""
    parts = [ArrowFile(kind, file) if file.suffix == ".arrow" else Manifest(file) for file in files]
    return Source(kind, parts, on_bad_sample)
