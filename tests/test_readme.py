"""What README.md and CONTRIBUTING.md name exists: files, functions, flags, commands."""

import importlib
import re
import shlex

import pytest
from helpers import ROOT

DOCUMENTS = ("README.md", "CONTRIBUTING.md")
SUFFIXES = (".py", ".sh", ".md", ".cff", ".toml", ".png")
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("runs/*")]
CODE = "\n".join(path.read_text() for path in SOURCES if path.is_file())
NOT_OURS = {"python", "torchrun", "bash", "git", "pip", "pre", "commit"}


def blocks(text):
    """The contents of the document's ```bash blocks."""
    return re.findall(r"```bash\n(.*?)```", text, re.S)


def spans(text):
    """The document's inline code, without what stands in a column about the official code."""
    kept = []
    official = None
    for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines():
        cells = line.strip().strip("|").split("|")
        titles = [cell.strip() for cell in cells]
        if line.startswith("|") and any(title.startswith("official") for title in titles):
            official = [title.startswith("official") for title in titles].index(True)
        if not line.startswith("|"):
            official = None
            cells = [line]
        for number, cell in enumerate(cells):
            if number != official:
                kept += re.findall(r"`([^`]+)`", cell)
    return kept


def commands(text):
    """(script, its arguments) of every command that runs a script of this project."""
    lines = []
    for block in blocks(text):
        lines += block.replace("\\\n", " ").splitlines()
    lines += spans(text)
    for line in lines:
        line = line.partition(" #")[0].strip()
        for part in re.split(r";|&&|\bdo\b", line):
            words = shlex.split(part.replace("[", "").replace("]", ""), posix=True)
            scripts = [word for word in words if re.fullmatch(r"(runs/)?\w+\.py", word)]
            if words and words[0] in ("python", "python3", "torchrun") and scripts:
                yield scripts[0], words[words.index(scripts[0]) + 1 :]


def help_of(script, arguments, capsys):
    """The help page of a script for these arguments: of its command or recipe."""
    module = importlib.import_module(script.removesuffix(".py"))
    chosen = [arguments[0]] if arguments and not arguments[0].startswith("-") else []
    for flag in ("--recipe", "--task", "--init", "--data"):
        if flag in arguments and script in ("train.py", "finetune.py"):
            chosen += [flag, arguments[arguments.index(flag) + 1]]
    with pytest.raises(SystemExit) as end:
        module.main([*chosen, "-h"])
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist(document):
    text = (ROOT / document).read_text()
    names = [word for span in spans(text) for word in span.split() if word.endswith(SUFFIXES)]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    links = re.findall(r"\]\(([^)]+)\)", prose)
    names += [link for link in links if not link.startswith("http")]
    assert names
    for name in names:
        assert (ROOT / name).exists(), f"{document} names {name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_exist(document):
    """Every word of inline code stands somewhere in the sources."""
    text = (ROOT / document).read_text()
    words = set()
    for span in spans(text):
        named = re.sub(r"\bout/\w+", "", span)  # folders of runs are the reader's own
        words |= set(re.findall(r"[A-Za-z_]\w{3,}", named))
    places = {path.stem for path in ROOT.rglob("*") if ".git/" not in str(path)}
    assert words
    for word in words - NOT_OURS - places:
        assert word in CODE, f"{document} names {word}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_exist(document, capsys):
    found = list(commands((ROOT / document).read_text()))
    for script, arguments in found:
        assert (ROOT / script).exists(), script
        if script == "bench.py" or script.startswith("runs/"):
            continue
        if script == "prepare.py" and arguments and arguments[0].startswith("$"):
            arguments = ["coco", *arguments[1:]]  # a loop over names
        page = help_of(script, arguments, capsys)
        for argument in arguments:
            if argument.startswith("--"):
                assert re.search(rf"{argument}\b", page), f"{script} has no {argument}"
    if document == "README.md":
        assert len(found) > 20


def test_every_file_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in text, path.name
