"""The tests import the project's files from the folder above; see helpers.py."""

import json

import pytest
from helpers import SMALL

import scenes


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Flags of a small run on real files: 112 scenes for 14 steps of 8, and 8 that are held out."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, name, size in (("train", "train", 112), ("val", "heldout", 8)):
        source, rows = scenes.demo_source("captions", name, size, image_size=16), []
        for i, row in enumerate(source.texts()):
            source.images(i)[0].save(folder / f"{split}{i}.png")
            rows.append({"image": f"{split}{i}.png", "captions": [row["text"]]})
        (folder / f"coco_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*SMALL, "--data_root", str(folder), "--datasets", "coco"]
