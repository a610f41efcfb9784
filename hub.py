"""Model hub: a name like `openai/clip-vit-base-patch16` in the place of a folder.

Wherever a folder of weights or of a tokenizer is taken, `find_folder` takes owner/name, and
owner/name@revision, too. A folder of that name on the disk wins. huggingface_hub downloads into its
usual cache (HF_HOME), and only the files that are read here: safetensors, the small JSON files and
the tokenizer's. A .bin is a pickle, and is never fetched. With HF_HUB_OFFLINE, or without a
network, what is in the cache is taken.
"""

import contextlib
import fcntl
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fields import show
from world import first_line_of

HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(@\S+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
# a path that ends so is a file's
FILE_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".jsonl", ".tar")

SETTINGS = ("config.json", "preprocessor_config.json", "answers.json")
WHOLE_WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
VOCABULARY = ("vocab.json", "merges.txt")  # of a tokenizer without tokenizer.json
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class HubName(NamedTuple):
    """What was typed, and its two parts."""

    typed: str
    name: str
    revision: str

    def __str__(self) -> str:
        return self.typed


def split_name(place: str | Path) -> HubName:
    name, _, revision = str(place).partition("@")
    return HubName(str(place), name, revision or "main")


def is_hub_name(place: str | Path) -> bool:
    """Whether a place that is not on the disk may be the name of a model on the hub."""
    text = str(place)
    if text.endswith(FILE_ENDINGS) or Path(text).exists():
        return False
    name = split_name(text).name
    # two dots and two hyphens are what the hub allows in no name
    return HUB_NAME.fullmatch(text) is not None and ".." not in name and "--" not in name


def find_folder(place: str | Path, wanted: str = "weights") -> Path:
    """A path as it is; the name of a model on the hub -> the folder of the cache that has it.

    wanted: "weights", "tokenizer", or "checkpoint", which is both; with the small files beside
    them. Raises ValueError for a
    name that the hub does not have or does not give, without a network, and for weights that are
    pickles.
    """
    if not is_hub_name(place):
        return Path(place)
    hub_name = split_name(place)
    folder = cached_folder(hub_name)
    # a commit never changes
    if folder and COMMIT.fullmatch(hub_name.revision) and is_complete(folder, wanted):
        return folder
    with one_process_at_a_time(hub_name) as has_waited:
        if has_waited:
            folder = cached_folder(hub_name)
            if folder and is_complete(folder, wanted):
                return folder
        return download(hub_name, wanted)


def is_at_hand(place: str | Path, wanted: str = "weights") -> bool:
    """Whether a file or folder is on the disk, or what is wanted of a hub's model in the cache."""
    if not is_hub_name(place):
        return Path(place).exists()
    folder = cached_folder(split_name(place))
    return folder is not None and is_complete(folder, wanted)


def default_output(place: str, name: str) -> str:
    """Where a result is written unless --out says it: in the checkpoint's folder, or, of a name of
    the hub, whose cache is no place for results, here.
    """
    return name if is_hub_name(place) else f"{place}/{name}"


# ---------------------------------------------------------------- the cache
def cached_folder(hub_name: HubName) -> Path | None:
    """The folder of the cache that has some file of a revision, without a network."""
    from huggingface_hub import try_to_load_from_cache

    for file in (*SETTINGS, WHOLE_WEIGHTS, WEIGHTS_INDEX, "tokenizer.json", *VOCABULARY):
        try:
            path = try_to_load_from_cache(hub_name.name, file, revision=hub_name.revision)
        except ValueError:  # no name that the hub takes
            return None
        if isinstance(path, str):  # else it is not there, or known to be nowhere
            return Path(path).parent
    return None


def is_complete(folder: Path, wanted: str) -> bool:
    """Whether a folder of the cache has the weights, the tokenizer, or both of a checkpoint."""
    if wanted == "checkpoint":
        return is_complete(folder, "weights") and is_complete(folder, "tokenizer")
    names = {path.name for path in folder.iterdir() if path.exists()}
    if wanted == "tokenizer":
        is_whole = "tokenizer.json" in names or names.issuperset(VOCABULARY)
        return is_whole or any(name.endswith(".model") for name in names)
    if WEIGHTS_INDEX in names:
        return names.issuperset(shards_named_by(folder / WEIGHTS_INDEX))
    return any(name.endswith(".safetensors") for name in names)


def shards_named_by(index_file: Path) -> list[str]:
    """The names in an index. A broken one has none: who reads it afterwards says so."""
    try:
        return list(json.loads(index_file.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return []


@contextlib.contextmanager
def one_process_at_a_time(hub_name: HubName) -> Iterator[bool]:
    """Of the processes of this machine one at a time is inside. Gives whether this one has waited:
    then another one has probably downloaded the files.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / ".locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f"{hub_name.name.replace('/', '--')}.find", "w")  # noqa: SIM115
    except OSError:  # a cache that is only to be read
        yield False
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_waited = False
        except OSError:
            fcntl.flock(lock, fcntl.LOCK_EX)
            has_waited = True
        yield has_waited


# ---------------------------------------------------------------- the download
def download(hub_name: HubName, wanted: str) -> Path:
    """Fetch what is not in the cache yet, with a progress bar. Without a network, the cache."""
    try:
        return fetch(hub_name, wanted)
    except NoSafetensors:
        raise
    except Exception as error:  # of the library, and of the one that it makes its requests with
        # a model that is gone, or a hub that does not answer
        folder = cached_folder(hub_name)
        needed = "tokenizer" if wanted == "tokenizer" else "weights"
        if folder and is_complete(folder, needed):
            return folder
        raise ValueError(why_not_fetched(hub_name, error)) from error


def fetch(hub_name: HubName, wanted: str) -> Path:
    """The folder of the cache with the files of today's commit of a revision."""
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(hub_name.name, revision=hub_name.revision, timeout=20)
    listing = [sibling.rfilename for sibling in info.siblings or []]
    files = files_to_fetch(hub_name, listing, wanted)
    folder = cached_folder(hub_name)
    is_current = folder is not None and folder.name == info.sha
    if folder and is_current and all((folder / file).exists() for file in files):
        return folder
    path = snapshot_download(hub_name.name, revision=hub_name.revision, allow_patterns=files)
    return Path(path)


class NoSafetensors(ValueError):
    """A model of the hub whose weights cannot be fetched."""


def files_to_fetch(hub_name: HubName, listing: list[str], wanted: str) -> list[str]:
    """Which of the files of a model are read here. Raises NoSafetensors where no weights are."""
    files = [name for name in SETTINGS if name in listing]
    if wanted != "weights":
        files += tokenizer_files(listing)
    if wanted != "tokenizer":
        files += weights_files(hub_name, listing)
    return files


def weights_files(hub_name: HubName, listing: list[str]) -> list[str]:
    """Those of the weights, as `files_to_fetch` says it."""
    if WEIGHTS_INDEX in listing:
        return [WEIGHTS_INDEX, *filter(SHARD.fullmatch, listing)]
    if WHOLE_WEIGHTS in listing:
        return [WHOLE_WEIGHTS]
    # under any other name there must be only one
    others = [name for name in listing if name.endswith(".safetensors") and "/" not in name]
    if len(others) == 1:
        return others
    pickles = [name for name in listing if name.endswith(PICKLES)]
    found = f"only {show(pickles[0])}, which is a pickle" if pickles else "no weights at all"
    raise NoSafetensors(
        f"{hub_name} on the hub has no {WHOLE_WEIGHTS}, {found}: look for a revision that has it "
        f"({hub_name.name}@refs/pr/N; the hub's own conversions are such), or download the pickle "
        "yourself and give it to `python prepare.py weights --source FILE --out FOLDER`, which "
        "reads it without executing it"
    )


def tokenizer_files(listing: list[str]) -> list[str]:
    """In the order in which `load_tokenizer` looks for them."""
    if "tokenizer.json" in listing:
        return ["tokenizer.json"]
    if set(VOCABULARY) <= set(listing):
        return list(VOCABULARY)
    return [name for name in listing if name.endswith(".model") and "/" not in name]


# ---------------------------------------------------------------- what went wrong, in one sentence
def why_not_fetched(hub_name: HubName, error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return sentence_of_refusal(hub_name, error)
    return sentence_of_failure(hub_name, error)


def sentence_of_refusal(hub_name: HubName, error: Any) -> str:
    """What to say if the hub answers, but not with the files."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return (
            f"{hub_name} on the hub is gated: ask for access on its page, then `hf auth login`, or "
            "set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{hub_name}: the model {hub_name.name} is on the hub, but has no revision "
            f"{show(hub_name.revision)}; it must be a branch, a tag or a whole commit"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{hub_name} does not exist: it is no file or folder here, and the hub has no model "
            f"{hub_name.name}, or it is private; correct the path, or the name, which is "
            "owner/name, or `hf auth login`"
        )
    return f"{hub_name} cannot be fetched from the hub ({first_line_of(error)}); try again later"


def sentence_of_failure(hub_name: HubName, error: Exception) -> str:
    """What to say if the hub does not answer, or the files cannot be written."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    here = f"{hub_name} does not exist: it is no file or folder here"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{here}, and, as a model's name on the hub, it is not, or not whole, in the cache "
            f"{constants.HF_HUB_CACHE}; correct the path, or unset HF_HUB_OFFLINE to download it"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{hub_name} cannot be fetched from the hub: {error.filename}: {error.strerror}"
    return (
        f"{here}, and the hub, where it may be a model's name, cannot be reached "
        f"({first_line_of(error)}); correct the path, or try again with a network"
    )
