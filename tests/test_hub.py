"""hub.py: names of the hub where folders are taken. No test reaches the hub: a server of this file
stands in for it, on 127.0.0.1, and caches are laid out by hand.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub
import pytest
import torch
from helpers import ROOT, run_in_forks, run_script, run_script_in_fork, save_tiny_towers
from huggingface_hub import constants

import hub
from hub import find_folder, is_hub_name
from tokenizer import load_tokenizer
from weights import load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OWNED = "owner/tower"
PICTURE = ROOT / "curves.png"


# ---------------------------------------------------------------- the stand-in
class StandIn(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a download needs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, content, status=200, **headers):
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def refuse(self, status, code):
        self.answer(b"{}", status, X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.server.requests.append((self.command, path))
        is_api = path.startswith("/api/models/")
        owner, name, verb, *rest = path.removeprefix("/api/models").strip("/").split("/")
        files = self.server.models.get(f"{owner}/{name}")
        if files is None:
            return self.refuse(404, "RepoNotFound")
        revision = "/".join(rest) if is_api else rest[0]
        if revision not in ("main", "v1", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if verb == "revision":
            listing = [{"rfilename": file} for file in files]
            content = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": listing}
            return self.answer(json.dumps(content).encode(), Content_Type="application/json")
        if verb == "tree":
            listing = []
            for file, content in files.items():
                identity = hashlib.sha1(content).hexdigest()
                listing.append(
                    {"type": "file", "path": file, "size": len(content), "oid": identity}
                )
            return self.answer(json.dumps(listing).encode(), Content_Type="application/json")
        if f"{owner}/{name}" in self.server.gated:
            return self.refuse(403, "GatedRepo")
        content = files[rest[1]]
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """The files of a small checkpoint of ours."""
    root = save_tiny_towers(tmp_path_factory.mktemp("towers"))
    return {path.name: path.read_bytes() for path in sorted((root / "vqa").iterdir())}


@pytest.fixture
def server(tower, tmp_path, monkeypatch):
    """The stand-in, with an empty cache in tmp_path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    more = {"pytorch_model.bin": b"never read", "README.md": b"# card", "onnx/model.onnx": b"x"}
    server.models = {OWNED: {**tower, **more}}
    server.gated = set()
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def downloaded(server):
    """The names of the files of which the content was fetched."""
    names = []
    for command, path in server.requests:
        if command == "GET" and "/resolve/" in path:
            names.append(path.rpartition(f"{COMMIT}/")[2])
    return sorted(names)


def lay_out_cache(cache, name, files, commit=COMMIT):
    """What huggingface_hub would have left in its cache."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file, content in files.items():
        (snapshot / file).write_bytes(content)
    return snapshot


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """HF_HUB_OFFLINE, as all tests have it, and a cache of one's own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert constants.HF_HUB_OFFLINE
    return tmp_path / "cache"


# ---------------------------------------------------------------- names
@pytest.mark.parametrize(
    "place", ["openai/clip-vit-base-patch16", "a/b.c_d@main", "a/b@refs/pr/3", "out/pretrian"]
)
def test_two_words_are_a_name(place):
    assert is_hub_name(place)


@pytest.mark.parametrize(
    "place",
    ["clip", "./a/b", "/a/b", "../b", "~/b", "a/b/c", "a/", "a/b.safetensors", "a/b c", "a/b..c"],
)
def test_what_can_only_be_a_path_is_no_name(place):
    assert not is_hub_name(place)
    assert find_folder(place) == Path(place)


def test_a_folder_on_the_disk_wins(tower, tmp_path, monkeypatch, server):
    folder = tmp_path / "owner" / "tower"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_folder(OWNED) == Path(OWNED)
    assert not server.requests


# ---------------------------------------------------------------- the download
def test_a_model_is_downloaded_and_is_the_same(server, tower, tmp_path):
    for name, content in tower.items():
        (tmp_path / name).write_bytes(content)
    ours = load_model(tmp_path).state_dict()
    fetched = load_model(OWNED).state_dict()
    assert ours.keys() == fetched.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, fetched[key])


def test_only_the_files_that_are_read_are_fetched(server):
    find_folder(OWNED)
    assert downloaded(server) == ["answers.json", "config.json", "model.safetensors"]
    load_tokenizer(OWNED)
    assert downloaded(server)[3:] == ["tokenizer.json"]


def test_what_is_in_the_cache_is_not_fetched_again(server):
    first = find_folder(OWNED, "checkpoint")
    fetched = downloaded(server)
    assert find_folder(OWNED, "checkpoint") == first
    assert downloaded(server) == fetched
    # a whole commit cannot have changed: not even asked for
    requests = list(server.requests)
    assert find_folder(f"{OWNED}@{COMMIT}", "checkpoint") == first
    assert server.requests == requests


def test_a_revision_is_what_the_hub_is_asked_for(server):
    find_folder(f"{OWNED}@v1")
    assert ("GET", f"/api/models/{OWNED}/revision/v1") in server.requests


def test_the_shards_of_an_index_are_fetched_and_a_whole_file_beside_them_is_not(server):
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = json.dumps({"weight_map": weight_map}).encode()
    shards = dict.fromkeys(weight_map.values(), b"x")
    server.models["owner/big"] = {
        "model.safetensors.index.json": index,
        "model.safetensors": b"y",
        **shards,
    }
    folder = find_folder("owner/big")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors.index.json", *shards}


def test_old_vocabularies_are_fetched_where_there_is_no_tokenizer_json(server):
    files = {"vocab.json": b"{}", "merges.txt": b"", "x.model": b"", "config.json": b"{}"}
    server.models["owner/old"] = files
    folder = find_folder("owner/old", "tokenizer")
    assert {path.name for path in folder.iterdir()} == {"config.json", "merges.txt", "vocab.json"}


def test_a_cache_serves_when_the_hub_is_gone(server):
    folder = find_folder(OWNED)
    del server.models[OWNED]
    assert find_folder(OWNED) == folder
    server.shutdown()
    server.server_close()
    assert find_folder(OWNED) == folder


def wait_for_the_download(rank, folder):
    found = find_folder(OWNED)
    (Path(folder) / str(rank)).write_text(str(found))


def test_one_process_of_a_machine_downloads_and_the_others_wait(server, tmp_path):
    run_in_forks(wait_for_the_download, tmp_path, processes=4)
    found = {(tmp_path / str(rank)).read_text() for rank in range(4)}
    assert found == {str(find_folder(OWNED))}
    assert downloaded(server) == ["answers.json", "config.json", "model.safetensors"]


# ---------------------------------------------------------------- one sentence
def sentence(place, wanted="weights"):
    with pytest.raises(ValueError) as raised:
        find_folder(place, wanted)
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_a_name_that_nobody_has_is_said_in_both_readings(server):
    text = sentence("out/pretrian")
    assert text.startswith("out/pretrian does not exist: it is no file or folder here, and the hub")
    assert "owner/name" in text


def test_a_revision_that_is_not_there(server):
    assert "has no revision 'v9'" in sentence(f"{OWNED}@v9")


def test_a_gated_model_says_what_to_do(server):
    server.gated.add(OWNED)
    assert "is gated: ask for access" in sentence(OWNED)


def test_a_model_of_pickles_alone_is_not_fetched(server):
    server.models["owner/old"] = {"config.json": b"{}", "pytorch_model.bin": b"cos\nsystem"}
    text = sentence("owner/old")
    assert "only 'pytorch_model.bin', which is a pickle" in text
    assert "prepare.py weights --source FILE" in text
    assert downloaded(server) == []


def test_no_network_is_said(server):
    server.shutdown()
    server.server_close()
    assert "cannot be reached" in sentence(OWNED)


def test_a_hub_in_trouble_is_said(server, monkeypatch):
    monkeypatch.setattr(StandIn, "do_GET", lambda self: self.refuse(418, "Teapot"))
    assert "cannot be fetched from the hub (" in sentence(OWNED)


def test_offline_and_not_in_the_cache(offline):
    text = sentence("out/pretrian")
    assert "unset HF_HUB_OFFLINE" in text and str(offline) in text


# ---------------------------------------------------------------- a cache that others have filled
def test_a_cache_serves_offline(offline, tower):
    snapshot = lay_out_cache(offline, OWNED, tower)
    assert find_folder(OWNED) == snapshot
    assert find_folder(f"{OWNED}@{COMMIT}") == snapshot
    assert load_tokenizer(OWNED).digest() == load_tokenizer(snapshot).digest()


def test_a_part_of_a_model_is_none_offline(offline, tower):
    snapshot = lay_out_cache(offline, OWNED, tower)
    (snapshot / "model.safetensors").unlink()
    assert "not whole, in the cache" in sentence(OWNED)
    assert find_folder(OWNED, "tokenizer") == snapshot


def test_a_cache_that_may_not_be_written_serves(offline, tower):
    snapshot = lay_out_cache(offline, OWNED, tower)
    (offline / ".locks").write_text("a file, so that no lock can be made in it")
    assert find_folder(OWNED) == snapshot
    assert hub.is_at_hand(OWNED)


def test_results_do_not_go_into_the_cache(tmp_path):
    assert hub.default_output(OWNED, "eval.json") == "eval.json"
    assert hub.default_output(str(tmp_path), "eval.json") == f"{tmp_path}/eval.json"


# ---------------------------------------------------------------- as users do it
def test_scripts_take_names(offline, tower, tmp_path):
    lay_out_cache(offline, OWNED, tower)
    ended = run_script_in_fork(
        "eval.py",
        *("--task", "vqav2", "--data", "demo", "--checkpoint", OWNED),
        *("--split", "heldout", "--batch_size", "64", "--out", tmp_path / "eval.json"),
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "eval.json").read_text())["checkpoint"] == OWNED


def test_the_environment_names_the_hub_and_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", constants.ENDPOINT)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    flags = ("question", "--checkpoint", OWNED, "--image", PICTURE, "--question", "What is it?")
    ended = run_script("ask.py", *flags)
    assert ended.returncode == 0, ended.stderr
    assert downloaded(server)[-1] == "tokenizer.json"
    assert "Fetching" in ended.stderr  # the progress bar
    assert (tmp_path / "home" / "hub" / "models--owner--tower").is_dir()


@pytest.mark.parametrize(
    "script, flags",
    [
        ("train.py", ("--vision", "out/clpi", "--text", "out/roberta")),
        ("train.py", ("--tokenizer", "out/clpi")),
        ("finetune.py", ("--task", "vqav2", "--data", "demo", "--init", "out/clpi")),
        ("ask.py", ("match", "--checkpoint", "out/clpi", "--image", PICTURE, "--text", "x")),
        ("prepare.py", ("weights", "--source", "out/clpi", "--out", "out/x")),
    ],
)
def test_a_mistyped_path_ends_in_one_sentence(script, flags, offline):
    ended = run_script_in_fork(script, *flags)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1, ended.stderr
    assert last.startswith("error: ") and "out/clpi does not exist" in last
