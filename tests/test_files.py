"""files.py: a file is the old one or the whole new one; what cannot be read is named with file and
line; one run a folder.
"""

import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

import files
from files import BadSample

# ---------------------------------------------------------------- writing


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path):
    file = tmp_path / "a.txt"
    files.write_text(file, "old")
    files.write_text(str(file), "new ö")
    assert file.read_text(encoding="utf-8") == "new ö"
    assert names_in(tmp_path) == ["a.txt"]


def write_half(path):
    path.write_text("half")


@pytest.mark.parametrize(
    "raised,seen",
    [
        (OSError(28, "No space left on device"), OSError),
        (ValueError("no such codec"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        # what torch.save and save_file make of a full disk
        (RuntimeError("unexpected pos 64 vs 0\nat inline_container.cc"), OSError),
        (files.SafetensorError("I/O error"), OSError),
    ],
)
def test_a_failing_write_leaves_the_old_file_and_no_temporary_one(raised, seen, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def write(path):
        write_half(path)
        raise raised

    with pytest.raises(seen) as error:
        files.write_atomically(file, write)
    assert file.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]
    if seen is OSError and not isinstance(raised, OSError):
        first_line = str(raised).splitlines()[0]
        assert str(error.value).startswith(first_line)
        assert "iB are free there" in str(error.value)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_flush_or_rename_leaves_the_old_file(call, tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_atomically(file, write_half)
    assert file.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_the_content_is_on_the_disk_before_the_file_gets_its_name(tmp_path, monkeypatch):
    order = []
    fsync = os.fsync
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda *args: (order.append("fsync"), fsync(*args)))
    monkeypatch.setattr(os, "replace", lambda *args: (order.append("replace"), replace(*args)))
    files.write_text(tmp_path / "a.txt", "x")
    assert order == ["fsync", "replace"]


def test_only_the_exact_names_of_temporary_files_are_removed(tmp_path):
    own = ["config.json.tmp1", "config.json.tmp123456", "log.jsonl.tmp7"]
    others = [
        "config.json",
        "config.json.tmp",
        "config.json.tmp1x",
        "config.json.tmpl",
        "xconfig.json.tmp1",
        "configxjson.tmp1",
        "config.json.tmp1.bak",
        "notes.tmp1",
    ]
    for name in (*own, *others):
        (tmp_path / name).write_text("precious")
    (tmp_path / "log.jsonl.tmp8").mkdir()  # a folder of such a name
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "config.json.tmp1").write_text("precious")
    files.remove_temporary_files(tmp_path, ("config.json", "log.jsonl"))
    assert names_in(tmp_path) == sorted([*others, "log.jsonl.tmp8", "below"])
    assert (tmp_path / "below" / "config.json.tmp1").exists()
    files.remove_temporary_files(tmp_path / "nowhere", ("config.json",))


def test_what_a_death_leaves_is_removed_by_name(tmp_path):
    """A process that is killed amid a write leaves a file that remove_temporary_files knows."""
    code = (
        "import os, signal, sys; import files; "
        "files.write_atomically(sys.argv[1], lambda path: "
        "(path.write_text('half'), os.kill(os.getpid(), signal.SIGKILL)))"
    )
    root = os.path.dirname(files.__file__)
    subprocess.run([sys.executable, "-c", code, tmp_path / "config.json"], cwd=root)
    left = names_in(tmp_path)
    assert len(left) == 1
    assert left[0].startswith("config.json.tmp")
    files.remove_temporary_files(tmp_path, ("config.json",))
    assert names_in(tmp_path) == []


def test_json_is_written_readable_and_read_back(tmp_path):
    value = {"text": "ä\n", "list": [1, 2.5, None, True]}
    files.write_json(tmp_path / "a.json", value)
    assert "ä" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert files.read_json(tmp_path / "a.json", dict) == value
    rows = [{"a": 1}, "text\u2028 with a line separator", []]
    files.write_json_lines(tmp_path / "a.jsonl", rows)
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 3
    assert files.read_json_lines(tmp_path / "a.jsonl") == rows
    files.write_json_lines(tmp_path / "empty.jsonl", [])
    assert files.read_json_lines(tmp_path / "empty.jsonl") == []


def test_a_result_says_where_it_is_or_why_it_is_nowhere(tmp_path, capsys):
    files.save_json(tmp_path / "a.json", {"a": 1})
    files.save_picture(tmp_path / "a.png", Image.new("RGB", (2, 3)))
    said = capsys.readouterr().out.splitlines()
    assert said == [f"written: {tmp_path / 'a.json'}", f"written: {tmp_path / 'a.png'}"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert Image.open(tmp_path / "a.png").size == (2, 3)
    missing = tmp_path / "nowhere" / "a.json"
    with pytest.raises(ValueError, match=f"{missing} cannot be written .*No such file"):
        files.save_json(missing, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder cannot be written .*[Dd]irectory"):
        files.save_json(tmp_path / "folder", {})
    assert capsys.readouterr().out == ""
    assert names_in(tmp_path) == ["a.json", "a.png", "folder"]


# ---------------------------------------------------------------- reading
def save_tar(path, mode, members):
    with tarfile.open(path, mode) as archive:
        for file in members:
            archive.add(file, arcname=f"pictures/{file.name}")
        archive.add(path.parent / "folder", arcname="folder")


def test_members_of_a_tar_archive_are_read_where_they_lie(tmp_path):
    (tmp_path / "folder").mkdir()
    contents = {"a.bin": b"first", "empty.bin": b"", "b.bin": bytes(range(256)) * 50}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    archive = tmp_path / "x.tar"
    save_tar(archive, "w", [tmp_path / name for name in contents])
    for name, content in contents.items():
        assert files.read_bytes(f"{archive}::pictures/{name}") == content
        assert files.read_bytes(tmp_path / name) == content
    for wrong in (
        f"{archive}::pictures/c.bin",
        f"{archive}::folder",  # no file
        f"{archive}::a.bin",
        f"{tmp_path}/y.tar::a.bin",
        f"{tmp_path}/nowhere",
    ):
        with pytest.raises(BadSample, match="no such file or archive member") as error:
            files.read_bytes(wrong)
        assert str(error.value).startswith(wrong)


@pytest.mark.parametrize(
    "name,target,kind",
    [
        ("d/link.png", "../a.png", tarfile.SYMTYPE),
        ("d/link.png", "a.png", tarfile.LNKTYPE),
        ("./link.png", "./a.png", tarfile.LNKTYPE),
        ("d/link.png", "second", tarfile.SYMTYPE),  # a link to a link
        ("d/link.png", "third.png", tarfile.SYMTYPE),  # a link to itself
        ("d/link.png", "/etc/hostname", tarfile.SYMTYPE),
        ("d/link.png", "../../a.png", tarfile.SYMTYPE),  # outside of the archive
    ],
)
def test_links_within_a_tar_archive_are_members(name, target, kind, tmp_path):
    archive = tmp_path / "x.tar"
    (tmp_path / "a.png").write_bytes(b"picture")
    links = {name: (target, kind), "d/second": ("../a.png", tarfile.SYMTYPE)}
    links["d/third.png"] = ("link.png", tarfile.SYMTYPE)
    with tarfile.open(archive, "w") as tar:
        for link_name, (link_target, link_kind) in links.items():
            member = tarfile.TarInfo(link_name)
            member.linkname = link_target
            member.type = link_kind
            tar.addfile(member)
        tar.add(tmp_path / "a.png", "./a.png")
        # GNU tar writes a file that is named twice so
        for again_name in ("a.png", "d/second"):
            again = tarfile.TarInfo(again_name)
            again.linkname = again_name
            again.type = tarfile.LNKTYPE
            tar.addfile(again)
    for found in ("./a.png", "a.png"):
        assert files.read_bytes(f"{archive}::{found}") == b"picture"
    link = f"{archive}::{name.removeprefix('./')}"
    if target in ("third.png", "/etc/hostname", "../../a.png"):
        with pytest.raises(BadSample, match="no such file or archive member"):
            files.read_bytes(link)
    else:
        assert files.read_bytes(link) == b"picture"


@pytest.mark.parametrize("error", [OSError(22, "Invalid argument"), EOFError()])
def test_a_tar_archive_that_cannot_be_read_is_a_bad_sample(error, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    (tmp_path / "x.tar").write_bytes(bytes(1024))
    monkeypatch.setattr(tarfile, "open", fail)
    with pytest.raises(BadSample, match="x.tar is not an uncompressed tar archive: .") as found:
        files.read_bytes(f"{tmp_path}/x.tar::a")
    assert len(str(found.value)) < 300


def test_what_is_no_plain_tar_archive_is_said(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.bin").write_bytes(b"x")
    save_tar(tmp_path / "x.tar.gz", "w:gz", [tmp_path / "a.bin"])
    (tmp_path / "text.tar").write_text("no archive" * 100)
    for name in ("x.tar.gz", "text.tar"):
        with pytest.raises(BadSample, match=f"{name} is not an uncompressed tar archive"):
            files.read_bytes(f"{tmp_path / name}::pictures/a.bin")


def test_a_damaged_tar_archive_is_said(tmp_path):
    """At every length, and with every byte of the headers changed: read as it was, or refused."""
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 700)
    archive = tmp_path / "x.tar"
    save_tar(archive, "w", [tmp_path / "a", tmp_path / "b"])
    whole = archive.read_bytes()
    damaged = [whole[:length] for length in range(0, 3000, 250)]
    for place in range(0, 512, 3):
        damaged.append(whole[:place] + b"\xff" + whole[place + 1 :])
    # a name of 8 GB, and a member that begins before the file
    long_name = whole[:124] + b"100000000000" + whole[136:156] + b"L" + whole[157:]
    damaged.append(long_name)
    refused = 0
    for number, content in enumerate(damaged):
        file = tmp_path / f"{number}.tar"
        file.write_bytes(content)
        try:
            assert files.read_bytes(f"{file}::pictures/b") in (b"b" * 700, b"a" * 700)
        except BadSample as error:
            assert str(file) in str(error) and len(str(error)) < 300
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "name,words",
    [
        ("file", "it is a file, not a folder"),
        ("file/inside", "file is a file, not a folder"),
        ("dangling", "it is a link to .*nowhere, which does not exist"),
        ("x" * 300, "File name too long"),
        ("closed/new", r"no file can be made in .*closed \(Permission denied\)"),
        ("closed", r"no file can be made in .*closed \(Permission denied\)"),
    ],
)
def test_a_folder_that_cannot_be_written_into_says_why(name, words, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")

    def refuse(dir):  # as an ordinary user: root may do everything
        raise PermissionError(13, "Permission denied")

    if name.startswith("closed"):
        monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    assert re.search(words, files.why_no_folder(tmp_path / name))


def test_a_folder_that_can_be_written_into_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    for name in ("there", "link", "link/a/b", "new", "new/a/b", ".", "../x"):
        assert files.why_no_folder(name) == "", name
        assert files.why_no_folder(tmp_path / name) == "", name
    assert names_in(tmp_path) == ["link", "there"]
    assert files.why_no_folder("/proc/new") != ""


def test_a_row_that_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES_OF_A_LINE", 20)
    with pytest.raises(ValueError, match="x.jsonl, line 2, has"):
        files.write_json_lines(tmp_path / "x.jsonl", [1, "x" * 30])
    assert names_in(tmp_path) == []
    files.write_json_lines(tmp_path / "x.jsonl", [1, "x" * 10])


def test_parts_of_a_file_are_read_in_any_order(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"0123456789")
    assert files.read_at(str(file), 7, 2) == b"78"
    assert files.read_at(str(file), 0, 3) == b"012"
    assert files.read_at(str(file), 9, 5) == b"9"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"a": 1,}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5000,  # a number of too many digits
    ],
)
def test_what_is_not_json_is_named(content, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not JSON: ") as error:
        files.read_json(file)
    assert len(str(error.value)) < len(str(tmp_path)) + 300


@pytest.mark.parametrize(
    "content,words",
    [
        (b'{"a":\n"\xe4"}', "a.json, line 2: the byte 0xe4 is not UTF-8"),  # Latin-1
        ('{"a": 1}'.encode("utf-16"), "a.json is UTF-16 or UTF-32; it must be UTF-8"),
        (b'{"a": "What is \\ud83d?"}', 'half a character, in \'{"a": "What is \\ud83d?'),
    ],
)
def test_a_text_in_another_encoding_is_named(content, words, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        files.read_json(file)
    assert words in str(error.value)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert files.read_text(file) == "one\ntwo\n"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}\r\n{"a": 2}\r\n')
    assert files.read_json_lines(file) == [{"a": "\U0001f600"}, {"a": 2}]


def test_a_file_or_a_line_that_is_too_long_is_named(monkeypatch, tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}\n[1, 2, 3, 4, 5, 6]')
    monkeypatch.setattr(files, "MOST_BYTES_OF_A_LINE", 12)
    with pytest.raises(ValueError, match=r"a\.json, line 2, has 1 KiB; it must be at most 1 KiB"):
        files.read_json_lines(file)
    with pytest.raises(ValueError, match=r"a\.json has 1 KiB; it must be at most 1 KiB"):
        files.read_json(file, most_bytes=10)


@pytest.mark.parametrize(
    "record,key,declared,words",
    [
        ([1], "a", str, "f, line 3: [1] is not an object with the key 'a'"),
        ({"b": 1}, "a", str, "f, line 3: there is no 'a' in {'b': 1}"),
        ({"a": True}, "a", int, "f, line 3: 'a' is True; it must be a whole number"),
        ({"a": 1.5}, "a", int | None, "'a' is 1.5; it must be a whole number or null"),
        ({"a": " "}, "a", str, "f, line 3: 'a' is ' '; it must not be empty"),
        ({"a": []}, "a", list, "f, line 3: 'a' is []; it must not be empty"),
        ({"a": ["x" * 1000] * 1000}, "a", str, "...; it must be a text"),
    ],
)
def test_what_a_record_lacks_is_named_with_its_place(record, key, declared, words):
    with pytest.raises(BadSample) as error:
        files.need(record, key, declared, "f, line 3", filled=True)
    assert words in str(error.value)
    assert len(str(error.value)) < 200


def test_a_key_that_may_be_null_may_be_absent():
    assert files.need({}, "a", int | None) is None
    assert files.need({"a": 3}, "a", float) == 3


@pytest.mark.parametrize(
    "content,kinds,wanted",
    [
        ("[1]", (dict,), "an object"),
        ("{}", (list,), "a list"),
        ('"text"', (list, dict), "a list or an object"),
        ("null", (dict,), "an object"),
    ],
)
def test_json_of_another_kind_is_refused(content, kinds, wanted, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json must hold {wanted}, found "):
        files.read_json(file, *kinds)
    assert files.read_json(file) == json.loads(content)


def test_a_broken_row_is_named_with_its_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\r\n\n  \n{"b": 2}\n{"c"\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 5, is not JSON: "):
        files.read_json_lines(file)
    file.write_bytes(b"1\n" + b"[" * 100_000 + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, is not JSON: "):
        files.read_json_lines(file)
    file.write_bytes(b'{"a": 1}\r\n\n{"b": 2}')
    assert files.read_json_lines(file) == [{"a": 1}, {"b": 2}]
    with pytest.raises(BadSample, match="nowhere.jsonl: no such file"):
        files.read_json_lines(tmp_path / "nowhere.jsonl")


def test_a_log_is_read_without_the_line_that_a_death_cut_short(tmp_path):
    file = tmp_path / "log.jsonl"
    whole = b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n'
    expected = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]
    last = b'{"step": 3, "loss": 2.0}\n'
    for length in range(len(last)):
        file.write_bytes(whole + last[:length])
        assert files.read_log(file) == expected
    file.write_bytes(whole + last)
    assert len(files.read_log(file)) == 3
    file.write_bytes(b"")
    assert files.read_log(file) == []
    # a line that no death explains
    file.write_bytes(b'{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2, is not JSON"):
        files.read_log(file)


# ---------------------------------------------------------------- one run a folder
HOST = socket.gethostname()


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def owner_in(file):
    return files.lock_owner(file.read_text())


def write_lock(folder, process, host=HOST):
    (folder / "run.lock").write_text(json.dumps({"process": process, "host": host}))


def test_a_lock_names_its_process_and_goes_with_it(tmp_path):
    file = tmp_path / "run.lock"
    with files.folder_lock(tmp_path):
        assert owner_in(file) == (os.getpid(), HOST)
    assert owner_in(file) is None
    with pytest.raises(KeyboardInterrupt), files.folder_lock(tmp_path):
        raise KeyboardInterrupt
    assert owner_in(file) is None


def test_a_folder_that_is_in_use_is_refused_and_stays_so(tmp_path):
    file = tmp_path / "run.lock"
    write_lock(tmp_path, os.getppid())
    sentence = f"is in use by process {os.getppid()} on {HOST}; choose another --out_dir"
    with pytest.raises(ValueError, match=sentence), files.folder_lock(tmp_path):
        raise AssertionError("it must not come here")
    assert owner_in(file) == (os.getppid(), HOST)


def test_somebody_elses_process_is_alive(tmp_path, monkeypatch):
    def refuse(process, signal):
        raise PermissionError

    write_lock(tmp_path, 1)
    monkeypatch.setattr(os, "kill", refuse)
    with pytest.raises(ValueError, match="in use by process 1"), files.folder_lock(tmp_path):
        raise AssertionError("it must not come here")


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    write_lock(tmp_path, dead_process())
    with files.folder_lock(tmp_path):
        assert owner_in(tmp_path / "run.lock") == (os.getpid(), HOST)
    assert owner_in(tmp_path / "run.lock") is None


def test_of_another_host_nobody_can_say_that_a_process_is_dead(tmp_path):
    write_lock(tmp_path, dead_process(), "another-host")
    with (
        pytest.raises(ValueError, match=r"on another-host; .* remove .*run\.lock"),
        files.folder_lock(tmp_path),
    ):
        raise AssertionError("it must not come here")
    assert (tmp_path / "run.lock").exists()


@pytest.mark.parametrize(
    "content", ["", "{", '{"process": 1', '{"process": 1, "ho', '{"process": 1, "host": "a']
)
def test_a_lock_that_a_death_cut_short_is_taken_over(content, tmp_path):
    (tmp_path / "run.lock").write_text(content)
    assert owner_in(tmp_path / "run.lock") is None
    with files.folder_lock(tmp_path):
        assert owner_in(tmp_path / "run.lock") == (os.getpid(), HOST)


@pytest.mark.parametrize(
    "content", [b"precious", b"[]", b"null", b'{"host": "x"}', b"[" * 100_000, b"caf\xe9", b"\n"]
)
def test_somebodys_own_file_called_run_lock_is_kept(content, tmp_path):
    (tmp_path / "run.lock").write_bytes(content)
    with pytest.raises(ValueError, match="run.lock is not the lock of a run") as error:
        with files.folder_lock(tmp_path):
            raise AssertionError("it must not come here")
    assert len(str(error.value)) < 300 + len(str(tmp_path))
    assert (tmp_path / "run.lock").read_bytes() == content


def test_a_folder_called_run_lock_is_named(tmp_path):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(ValueError, match="run.lock is no file"):
        with files.folder_lock(tmp_path):
            raise AssertionError("it must not come here")


def take_and_hold(file, at_once, results, everybody_tried):
    """In a process of its own: try to take the lock, say whether it worked, and stay alive."""
    at_once.wait()
    try:
        files.take_lock(file)
        results.put(True)
    except ValueError:
        results.put(False)
    everybody_tried.wait()


def test_of_several_that_begin_at_once_one_gets_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    number = 6
    at_once = context.Barrier(number)
    everybody_tried = context.Event()
    results = context.Queue()
    write_lock(tmp_path, dead_process())
    arguments = (tmp_path / "run.lock", at_once, results, everybody_tried)
    processes = [context.Process(target=take_and_hold, args=arguments) for _ in range(number)]
    for process in processes:
        process.start()
    taken = [results.get(timeout=60) for _ in processes]
    everybody_tried.set()
    for process in processes:
        process.join()
    assert sum(taken) == 1


def test_the_other_processes_of_a_run_leave_the_lock_to_rank_0(tmp_path):
    with files.folder_lock(tmp_path, needed=False):
        assert names_in(tmp_path) == []
    write_lock(tmp_path, os.getppid())
    with files.folder_lock(tmp_path, needed=False):
        assert names_in(tmp_path) == ["run.lock"]
    assert names_in(tmp_path) == ["run.lock"]
