"""What opening large manifests costs: python tests/open_manifests.py --records 1000000

Writes generated manifests, opens each in processes of their own, and prints a row for each
opening: without an index, as the one that writes it, and as any later one. A record of captions
has 1, 2 or 3 of them, a record of chat one question and one answer. The manifests are removed at
the end.

Columns: seconds of the clock and of the processor, and MiB that opening and then reading 1,000
rows has added: of this process alone, at the peak, and of pages that it shares with the others.
"""

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data

WORDS = (
    "a man rides the old red bicycle past two dogs and some people near large green trees in "
    "front of an empty white house"
).split()
SAMPLES = 1000  # rows that are read after the opening


def text_of(number):
    """Ten words, others for each number."""
    step = 1 + number % 5
    first = number * 7919
    return " ".join(WORDS[(first + i * step) % len(WORDS)] for i in range(10))


def record_of(kind, number):
    picture = f"pictures/{number // 1000:05d}/{number:09d}.jpg"
    text = text_of(number)
    if kind == "captions":
        captions = [f"{text} {i}" for i in range(1 + number % 3)]
        return {"image": picture, "captions": captions, "image_id": number}
    question = {"from": "human", "value": "<image>\nWhat is in this picture?"}
    answer = {"from": "gpt", "value": f"{text} {text}"}
    return {"id": number, "image": picture, "conversations": [question, answer]}


def write_manifest(path, kind, count):
    with open(path, "w") as file:
        for number in range(count):
            file.write(json.dumps(record_of(kind, number)) + "\n")


def memory():
    """MiB of this process: its own, those of files, and all at the peak."""
    values = {}
    with open("/proc/self/status") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssFile", "VmHWM"):
                values[name] = int(value.split()[0]) / 1024
    return values


def open_manifest(kind, path, title, with_index):
    """Open it in this process, and print what that cost."""
    data.INDEX_FROM = 0 if with_index else math.inf
    before = memory()
    clock = time.perf_counter()
    processor = time.process_time()
    source = data.open_source(kind, [path])
    clock = time.perf_counter() - clock
    processor = time.process_time() - processor
    for i in range(SAMPLES):
        row = i * len(source) // SAMPLES
        part, number = source.find(int(source.image_of[row]))
        part.parse(kind, number)
    after = memory()
    grown = {name: after[name] - before[name] for name in after}
    print(
        f"{kind:9s}{title:17s}{source.num_images:11,d}{len(source):12,d}{clock:9.1f}"
        f"{processor:9.1f}{grown['RssAnon']:9.1f}{grown['VmHWM']:9.1f}{grown['RssFile']:9.1f}"
        f"  {source.digest[:8]}",
        flush=True,
    )


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", default=["captions", "chat"])
    parser.add_argument("--folder", help="where the manifests are written; default: as tempfile's")
    options = parser.parse_args(arguments)
    print(
        "kind     opening              records        rows  seconds      cpu  own MiB     peak"
        "   shared  digest"
    )
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for kind in options.kinds:
            path = Path(folder) / f"{kind}.jsonl"
            write_manifest(path, kind, options.records)
            for title in ("without an index", "writes the index", "with the index"):
                with_index = title != "without an index"
                process = fork.Process(target=open_manifest, args=(kind, path, title, with_index))
                process.start()
                process.join()
            sizes = [file.stat().st_size for file in Path(folder).glob(f"{kind}.jsonl*")]
            print(
                f"         bytes of manifest and index: {sorted(sizes, reverse=True)}", flush=True
            )
            path.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
