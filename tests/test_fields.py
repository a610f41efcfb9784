"""fields.py: every value of a config is of its type and in its range, wherever it comes from; and
one grammar of flags for all scripts, whose help pages are complete.
"""

import dataclasses
import json
import math
import os
import re
import sys
from dataclasses import dataclass

import pytest
from helpers import ROOT, run_script, run_script_in_fork

import ask
import bench
import eval as evaluation
import figures
import finetune
import prepare
import tasks
import train
import train_llava
from fields import (
    FieldError,
    FlagError,
    check_fields,
    field_types,
    option,
    parse_flags,
    parse_recipe,
)
from llava_manager import LlavaManagerConfig
from model import ManagerTowerConfig
from weights import read_config


# ---------------------------------------------------------------- the checker
@dataclass
class Fields:
    """A field of every type and of every kind of range."""

    count: int = option(3, "how many", least=1)
    few: int = option(3, "a few", least=1, most=9)
    rate: float = option(0.5, "a rate", least=0)
    part: float = option(0.5, "a part", least=0, most=1)
    beta: float = option(0.5, "a beta", least=0, below=1)
    mass: float = option(0.5, "a mass", above=0, most=1)
    heat: float = option(0.5, "a temperature", above=0)
    depth: float = option(-1.0, "a depth", below=0)
    height: float = option(-1.0, "a height", most=0)
    anything: float = option(0.0, "any number")
    name: str = option("x", "a name")
    folder: str = option("", "a folder; none = none")
    color: str = option("red", "a color", choices=("red", "blue"))
    is_on: bool = option(False, "a switch")
    maybe: str | None = option(None, "a color or none", choices=("red", "blue"))
    colors: tuple[str, ...] = option(("red",), "colors", choices=("red", "blue"))
    layers: tuple[int, ...] = option((0, 1), "layers", least=0)
    texts: list[str] = option((), "texts")

    def __post_init__(self) -> None:
        check_fields(self)


NAN = math.nan
INF = math.inf


@pytest.mark.parametrize(
    "name,value",
    [
        *[("count", value) for value in (1, 2**62)],
        *[("few", value) for value in (1, 9)],
        *[("rate", value) for value in (0, 0.0, 3, 1e30)],
        *[("part", value) for value in (0, 1, 0.0, 1.0)],
        *[("beta", value) for value in (0, 0.999999)],
        *[("mass", value) for value in (1e-30, 1)],
        *[("heat", value) for value in (1e-30, 1e30)],
        *[("depth", value) for value in (-1e-30, -5)],
        *[("height", value) for value in (0, -5)],
        *[("anything", value) for value in (-1e300, 5)],
        *[("name", value) for value in ("nan", " ", "\u00e9")],
        ("folder", ""),
        *[("color", value) for value in ("red", "blue")],
        *[("is_on", value) for value in (True, False)],
        *[("maybe", value) for value in (None, "red")],
        *[("colors", value) for value in ((), ("red", "blue"), ["blue"])],
        *[("layers", value) for value in ((), (0, 5), [2])],
        *[("texts", value) for value in ((), ["a", "b"])],
    ],
)
def test_what_is_of_its_type_and_in_its_range_is_taken(name, value):
    assert getattr(Fields(**{name: value}), name) == value


WHOLE = "a whole number from 1 on"
COLORS = "one of red, blue"


@pytest.mark.parametrize(
    "name,values,allowed",
    [
        # a bool is no number, and a number of another type or as a text is none either
        ("count", (0, -1, True, 1.0, "3", None, NAN, INF, [3]), WHOLE),
        ("few", (0, 10), "a whole number from 1 to 9"),
        ("rate", (-1e-30, -1, NAN, INF, -INF, True, "0.5", None), "a finite number from 0 on"),
        ("part", (-1e-9, 1.0000001, NAN), "a finite number from 0 to 1"),
        ("beta", (-1e-9, 1, 1.0, 2, NAN), "a finite number from 0 on and below 1"),
        ("mass", (0, 0.0, -1, 1.1, NAN), "a finite number above 0 up to 1"),
        ("heat", (0, -1, NAN, INF), "a finite number above 0"),
        ("depth", (0, 1, NAN, -INF), "a finite number below 0"),
        ("height", (1e-30, NAN), "a finite number up to 0"),
        ("anything", (NAN, INF, -INF, "0", True), "a finite number"),
        ("name", (5, None, b"x", ["x"]), "a text"),
        ("color", ("green", "", "Red", "red,blue", None, 5), COLORS),
        ("is_on", (0, 1, "true", None), "true or false"),
        ("maybe", ("green", "none", 5, False), COLORS),
        ("colors", (("red", "green"), ("",), (None,), ("red,blue",)), COLORS),
        ("colors", ("red", None, 5, {"red": 1}), "a list"),
        ("layers", ((0, -1), (0.0,), ("0",), (True,), (None,)), "a whole number from 0 on"),
        ("layers", ("12", None, 5, range(3)), "a list"),
        ("texts", ([5], [None], [["a"]]), "a text"),
        ("texts", ("ab", None), "a list"),
    ],
)
def test_what_is_not_is_refused_by_name_with_what_is_allowed(name, values, allowed):
    for value in values:
        with pytest.raises(FieldError) as error:
            Fields(**{name: value})
        sentence = str(error.value)
        assert sentence.startswith(f"{name} is "), sentence
        assert sentence.endswith(f"; it must be {allowed}"), sentence
        assert len(sentence.splitlines()) == 1


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(FieldError) as error:
        Fields(color="x" * 10_000)
    assert len(str(error.value)) < 200


def test_a_field_that_is_no_option_is_left_to_the_config():
    @dataclass
    class Mixed:
        count: int = option(1, "how many", least=1)
        own: int = 0

    check_fields(Mixed(own="anything"))
    with pytest.raises(FieldError, match="count is 0"):
        check_fields(Mixed(count=0, own="anything"))


# ---------------------------------------------------------------- the command line
def parse(*flags):
    return parse_flags(Fields, list(flags))


@pytest.mark.parametrize(
    "flags,name,value",
    [
        ("--count 7", "count", 7),
        ("--count=7", "count", 7),
        ("--rate 1e-3", "rate", 1e-3),
        ("--depth -2", "depth", -2.0),
        ("--depth=-2e-1", "depth", -0.2),
        ("--is_on", "is_on", True),
        ("--is_on TRUE", "is_on", True),
        ("--is_on 0", "is_on", False),
        ("--maybe none", "maybe", None),
        ("--maybe blue", "maybe", "blue"),
        ("--colors red,blue", "colors", ("red", "blue")),
        ("--layers 0,2,10", "layers", (0, 2, 10)),
        ("--texts a --texts b", "texts", ["a", "b"]),
        ("--folder=", "folder", ""),
        ("--depth -1e-3", "depth", -1e-3),
        ("--depth -.5", "depth", -0.5),
        ("--count +7", "count", 7),
        ("--count 007", "count", 7),
        ("--rate 5.", "rate", 5.0),
        ("--rate 1E2", "rate", 100.0),
        ("--count 3 --count 5", "count", 5),  # the last one counts
    ],
)
def test_flags_become_fields(flags, name, value):
    config = parse(*flags.split())
    assert config == dataclasses.replace(Fields(), **{name: value})
    assert type(getattr(config, name)) is type(value)


@pytest.mark.parametrize(
    "flags",
    [
        "--nonsense 1",
        "--coun 1",  # an abbreviation
        "--count many",
        "--count 1.5",
        "--count",
        "--rate x",
        "--is_on maybe",
        "--layers 1,x",
        "--layers=",
        "stray",
        # what Python reads as a number, and nobody types as one
        "--count 1_000",
        "--count \u0663",
        "--count 1e3",
        "--count 0x10",
        "--count 5.0",
        "--count=",
        "--rate 1_0.5",
        "--rate \u0663.5",
        "--rate 1e",
        "--rate .",
        "--rate infinitely",
        "--layers 1,,2",
        "--layers 1_0,2",
        "--layers 1,\u0663",
        "--count " + "9" * 5000,
        "--is_on " + "x" * 5000,
        "--nonsense " + "x" * 5000,
    ],
)
def test_what_cannot_be_read_is_an_error_of_the_command_line(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    with pytest.raises(FlagError) as error:
        parse(*flags.split())
    sentence = str(error.value)
    assert flags.split("=")[0].split()[0] in sentence
    assert sentence.endswith("; `python train.py -h` lists all flags")
    assert len(sentence.splitlines()) == 1
    assert len(sentence) < 400


@pytest.mark.parametrize("value", [" 5", "5 ", "5\n", "5\0", "\udce95", "\x1b[2J"])
def test_a_number_with_anything_around_it_is_refused(value):
    for flag in ("--count", "--rate", "--layers"):
        with pytest.raises(FlagError, match=f"argument {flag}: ") as error:
            parse(flag, value)
        assert str(error.value).isprintable()
        assert str(error.value).isascii()


def test_an_unknown_flag_that_is_like_another_is_asked_about():
    for typed in ("--colour", "--colour=red", "--couunt"):
        with pytest.raises(FlagError, match=r"\(did you mean --co(lors?|unt)\?\)"):
            parse(typed, "1")
    with pytest.raises(FlagError) as error:
        parse("--quite_another\x1b[2J\nthing", "1")
    assert "did you mean" not in str(error.value)
    assert str(error.value).isprintable()


def test_a_value_that_begins_with_a_dash_is_asked_for_in_one_word():
    with pytest.raises(FlagError, match="argument --name: .*is written --FLAG=VALUE"):
        parse("--name", "-x")
    assert parse("--name=-x").name == "-x"
    with pytest.raises(FieldError, match="--rate is -inf; it must be a finite number"):
        parse("--rate", "-inf")


@pytest.mark.parametrize("text", ["[", "[" * 100_000, "[1,", '["\\ud83d', "[nan]"])
def test_what_begins_with_a_bracket_is_json(text):
    @dataclass
    class Sizes:
        sizes: tuple | str = option("", "sizes")

    with pytest.raises(
        FlagError, match=r"argument --sizes: .* is not JSON like \[\[384,768\]"
    ) as e:
        parse_flags(Sizes, ["--sizes", text])
    assert len(str(e.value)) < 400
    assert parse_flags(Sizes, ["--sizes", "[[1,2]]"]).sizes == [[1, 2]]


@pytest.mark.parametrize(
    "flags,sentence",
    [
        ("--count 0", "--count is 0; it must be a whole number from 1 on"),
        ("--rate nan", "--rate is nan; it must be a finite number from 0 on"),
        ("--rate inf", "--rate is inf; it must be a finite number from 0 on"),
        ("--rate -1", "--rate is -1.0; it must be a finite number from 0 on"),
        ("--color green", "--color is 'green'; it must be one of red, blue"),
        ("--maybe green", "--maybe is 'green'; it must be one of red, blue"),
        ("--colors red,green", "--colors is 'green'; it must be one of red, blue"),
        ("--layers 1,-1", "--layers is -1; it must be a whole number from 0 on"),
        ("--name=", "--name is empty; it must be a text"),
        ("--texts=", "--texts is empty; it must be a text"),
        (
            "--count 9223372036854775808",
            "--count is 9223372036854775808; it must be a whole number from 1 on and below 2 to "
            "the power of 63",
        ),
        (
            "--name a\0b",
            "--name is 'a\\x00b'; it must be a text in UTF-8, without the character NUL",
        ),
        (
            "--texts caf\udce9",
            "--texts is 'caf\\udce9'; it must be a text in UTF-8, without the character NUL",
        ),
    ],
)
def test_a_value_that_is_not_allowed_names_its_flag(flags, sentence):
    with pytest.raises(FieldError) as error:
        parse(*flags.split())
    assert str(error.value) == sentence


def test_a_flag_without_a_default_must_be_given():
    @dataclass
    class Needs:
        checkpoint: str = option(help="a folder")
        out: str = option("", "a file")

    assert parse_flags(Needs, ["--checkpoint", "x"]) == Needs("x", "")
    with pytest.raises(FlagError, match="--checkpoint"):
        parse_flags(Needs, ["--out", "x"])


@dataclass
class Shape:
    """The architecture of a recipe."""

    width: int = option(8, "width", least=1)
    kind: str = option("a", "kind", choices=("a", "b"))
    classes: int = option(2, "classes", least=1, flag=False)

    def __post_init__(self) -> None:
        check_fields(self)

    @staticmethod
    def check_flags(flags):
        if flags.get("kind") == "b" and "width" in flags:
            raise ValueError("--width means nothing with --kind b")


@dataclass
class Run:
    """The run of a recipe."""

    architecture = Shape
    steps: int = option(5, "steps", least=1)

    def __post_init__(self) -> None:
        check_fields(self)

    def model_defaults(self, fields):
        return {**dataclasses.asdict(Shape()), **fields}

    def check_places(self) -> None:
        if self.steps == 13:
            raise FieldError("steps is 13; it must be another number")


RECIPES = {"small": (Run(), {}), "wide": (Run(steps=9), {"width": 64})}


def test_a_recipe_gives_defaults_and_flags_override_them():
    def parse(*flags):
        return parse_recipe(list(flags), RECIPES, "recipe")

    assert parse() == ("small", Run(), {})
    assert parse("--recipe", "wide") == ("wide", Run(steps=9), {"width": 64})
    assert parse("--steps", "2", "--recipe=wide") == ("wide", Run(steps=2), {"width": 64})
    flags = ("--recipe", "wide", "--width", "32", "--kind", "b")
    with pytest.raises(ValueError, match="--width means nothing with --kind b"):
        parse(*flags)
    assert parse("--kind", "a", "--width", "32")[2] == {"width": 32, "kind": "a"}
    with pytest.raises(FieldError, match="--steps is 0; it must be a whole number from 1 on"):
        parse("--steps", "0")
    with pytest.raises(FieldError, match="--steps is 13; it must be another number"):
        parse("--steps", "13")
    for flags in (("--recipe", "huge"), ("--classes", "3"), ("--recipe",)):
        with pytest.raises(FlagError, match=flags[0]):
            parse(*flags)


# ---------------------------------------------------------------- the help pages
def page_of(main, capsys, *argv):
    """What a script prints for `... -h`."""
    try:
        main([*argv, "-h"])
    except SystemExit as end:
        assert not end.code
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def entries_of(page):
    """Name of each flag -> its entry, in one line."""
    entries = {}
    for part in re.split(r"^  --", page, flags=re.MULTILINE)[1:]:
        entry = part.partition("\n\n")[0]  # a blank line ends a group of flags
        name = re.split(r"[\s,]", entry, maxsplit=1)[0]
        assert name not in entries, f"--{name} is listed twice"
        entry = re.sub(r"-\n +", "-", entry)  # argparse breaks lines at hyphens too
        entries[name] = " ".join(entry.split())
    return entries


def typed(value):
    """A default as one would type it."""
    if value is None or value in ("", [], ()):
        return "none"
    if isinstance(value, tuple) and isinstance(value[0], tuple):
        return json.dumps(value, separators=(",", ":"))
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)


def check_entry(entry, field, default):
    """The help of a field stands there, and its default."""
    assert field.metadata["help"], f"--{field.name} has no help"
    assert field.metadata["help"] in entry
    for choice in field.metadata["choices"]:
        assert choice in entry
    shown = re.search(r" \[([^\[]*)\](; may be repeated)?$", entry)
    if default is dataclasses.MISSING:
        assert shown is None, entry
    elif field.name != "grid_pinpoints":  # it has a grammar of its own
        assert shown, entry
        assert shown[1] == typed(default), entry


def flags_of(config_class):
    """The fields of a config class that are flags."""
    return [field for field in dataclasses.fields(config_class) if field.metadata.get("flag", True)]


@pytest.fixture
def wide(monkeypatch):
    """A terminal that is wide enough for any line."""
    monkeypatch.setenv("COLUMNS", "100000")


def check_recipe_page(page, key, run, model_fields):
    entries = entries_of(page)
    of_model = run.model_defaults(model_fields)
    names = {key}
    for field in flags_of(type(run)):
        names.add(field.name)
        check_entry(entries[field.name], field, getattr(run, field.name))
    for field in flags_of(run.architecture):
        if field.name not in names:
            names.add(field.name)
            check_entry(entries[field.name], field, of_model[field.name])
    assert entries.keys() == names


ALL_RECIPES = {**train.RECIPES, **train_llava.LLAVA_RECIPES}


@pytest.mark.parametrize("name", list(ALL_RECIPES))
def test_train_lists_every_flag_of_every_recipe(name, capsys, wide):
    page = page_of(train.main, capsys, "--recipe", name)
    check_recipe_page(page, "recipe", *ALL_RECIPES[name])


def test_the_help_of_train_alone_is_that_of_the_demo(capsys, wide):
    entries = entries_of(page_of(train.main, capsys))
    batch_size = "batch_size INT rows of an update, over all processes [64]"
    assert entries["batch_size"] == batch_size
    assert entries["share_images"].endswith("[True]")
    assert entries["objectives"].endswith("; some of mlm, itm, itc [mlm,itm]")
    assert entries["data_root"].endswith("[none]")


@pytest.mark.parametrize("start", [(), ("--data", "demo"), ("--init", "unimodal")])
@pytest.mark.parametrize("name", [name for name, task in tasks.TASKS.items() if task.recipe])
def test_finetune_lists_every_flag_of_every_task(name, start, capsys, wide):
    page = page_of(finetune.main, capsys, "--task", name, *start)
    init = start[1] if "--init" in start else ""
    data = start[1] if "--data" in start else ""
    check_recipe_page(page, "task", *finetune.recipe(name, init, data))


def commands_with_flags():
    """(main function, words before the flags, class of the flags) of the other scripts."""
    cases = [(evaluation.main, (), evaluation.EvalConfig)]
    for script in (ask, figures):
        for name, command in script.COMMANDS.items():
            cases.append((script.main, (name,), command.options))
    for name, dataset in prepare.DATASETS.items():
        cases.append((prepare.main, (name,), dataset.config))
    cases.append((prepare.main, ("weights",), prepare.WeightsConfig))
    cases.append((bench.main, (), bench.BENCHES["towers"].config))
    for name, comparison in bench.BENCHES.items():
        cases.append((bench.main, (name,), comparison.config))
    return cases


CASES = commands_with_flags()
CASE_NAMES = [f"{main.__module__} {' '.join(words)}" for main, words, _ in CASES]


@pytest.mark.parametrize("main,words,config_class", CASES, ids=CASE_NAMES)
def test_the_other_scripts_list_every_flag(main, words, config_class, capsys, wide):
    entries = entries_of(page_of(main, capsys, *words))
    fields = flags_of(config_class)
    assert entries.keys() == {field.name for field in fields}
    for field in fields:
        check_entry(entries[field.name], field, field.default)


@pytest.mark.parametrize("script", [ask, figures, prepare])
def test_scripts_with_commands_list_them(script, capsys):
    commands = script.DATASETS if script is prepare else script.COMMANDS
    page = page_of(script.main, capsys)
    for name in commands:
        assert re.search(rf"^  {name}\b", page, re.MULTILINE), name


@pytest.mark.parametrize("script", [ask, figures, prepare, bench, evaluation])
def test_a_command_that_is_none_is_an_error_of_the_command_line(script):
    with pytest.raises(FlagError, match="'paint'"):
        script.main(["paint"])


@pytest.mark.parametrize("main,words,config_class", CASES, ids=CASE_NAMES)
def test_the_other_scripts_refuse_what_is_no_flag(main, words, config_class):
    required = []
    for field in flags_of(config_class):
        if field.default is dataclasses.MISSING:
            required += [f"--{field.name}", "x"]
    with pytest.raises(FlagError, match="unrecognized arguments: --nonsense 1"):
        main([*words, *required, "--nonsense", "1"])


def test_every_default_of_a_recipe_can_be_typed(capsys, wide):
    """What the page shows in brackets, typed as a flag, is the default itself."""
    for name, (run, model_fields) in ALL_RECIPES.items():
        entries = entries_of(page_of(train.main, capsys, "--recipe", name))
        typed_flags = ["--recipe", name]
        for field in flags_of(type(run)):
            shown = re.search(r" \[([^\[]*)\]$", entries[field.name])[1]
            if shown != "none":
                typed_flags += [f"--{field.name}={shown}"]
        recipes = train.RECIPES if name in train.RECIPES else train_llava.LLAVA_RECIPES
        assert parse_recipe(typed_flags, recipes, "recipe") == (name, run, model_fields)


def test_every_field_of_a_config_is_an_option_with_a_type_that_is_checked():
    for config_class in (
        train.TrainConfig,
        finetune.FinetuneConfig,
        train_llava.LlavaTrainConfig,
        ManagerTowerConfig,
        LlavaManagerConfig,
        *[config_class for _, _, config_class in CASES],
    ):
        declared = field_types(config_class)
        for field in dataclasses.fields(config_class):
            assert "choices" in field.metadata, f"{config_class.__name__}.{field.name}"
            assert declared[field.name] is not None


# ---------------------------------------------------------------- as a user sees it
def test_help_and_errors_of_a_script():
    page = run_script_in_fork("train.py", "-h", "--recipe", "pretrain")
    assert page.returncode == 0
    assert page.stderr == ""
    assert page.stdout.startswith("usage: train.py [--FLAG VALUE ...]")
    assert "--lr_mult_cross_modal" in page.stdout
    refused = run_script("eval.py", "--task", "vqav2", "--checkpoint", "x", "--learning_rate", 1)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.splitlines() == [
        "error: unrecognized arguments: --learning_rate 1; `python eval.py -h` lists all flags"
    ]


def test_no_script_reads_flags_in_another_way():
    for file in ROOT.glob("*.py"):
        if file.name != "fields.py":
            assert "argparse" not in file.read_text(), file.name


# ---------------------------------------------------------------- config.json
def write_config(folder, config, **changes):
    """config.json as a checkpoint holds it, with other values."""
    model = type(config).__name__.removesuffix("Config")
    values = {"model": model, **dataclasses.asdict(config), **changes}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "name,value",
    [
        ("vision_width", "96"),
        ("vision_width", 96.0),
        ("vision_width", None),
        ("vision_width", 0),
        ("num_heads", -1),
        ("num_heads", True),
        ("dropout", "0"),
        ("dropout", None),
        ("dropout", 1),
        ("temperature", NAN),
        ("temperature", 0),
        ("initializer_range", -1),
        ("manager_noise", "maybe"),
        ("manager_noise", 1),
        ("manager_type", "clever"),
        ("fusion", 5),
        ("heads", None),
        ("heads", "itm"),
        ("heads", ["itm", "vqv"]),
        ("heads", 5),
        ("managed_layers_text", 0),
    ],
)
def test_a_bad_value_in_a_two_tower_config_names_file_and_key(name, value, tmp_path):
    write_config(tmp_path, ManagerTowerConfig.tiny())
    assert read_config(tmp_path, ManagerTowerConfig) == ManagerTowerConfig.tiny()
    write_config(tmp_path, ManagerTowerConfig.tiny(), **{name: value})
    with pytest.raises(ValueError, match=name) as error:
        read_config(tmp_path, ManagerTowerConfig)
    assert str(tmp_path / "config.json") in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name,value",
    [
        ("vision_width", "96"),
        ("vision_width", 96.0),
        ("num_kv_heads", 0),
        ("patch_size", -2),
        ("patch_size", 1000),
        ("max_length", None),
        ("max_length", 0),
        ("norm_eps", "x"),
        ("norm_eps", NAN),
        ("norm_eps", -1),
        ("rope_theta", 0),
        ("rope_theta", INF),
        ("im_start_id", "x"),
        ("tie_embeddings", "x"),
        ("eos_ids", [1.5]),
        ("managed_layers", None),
        ("managed_layers", "12"),
        ("managed_layers", [1, "2"]),
        ("managed_layers", [[1]]),
        ("managed_layers", [2, 1]),
        ("inject_layers", [99]),
        ("manager_type", "clever"),
        ("aspect", "anyres_max_0"),
        ("merge", None),
        ("grid_pinpoints", None),
        ("grid_pinpoints", 5),
        ("grid_pinpoints", [[32]]),
        ("grid_pinpoints", [["a", 64]]),
        ("grid_pinpoints", [[32e6, 32]]),
        ("grid_pinpoints", "(1x1),...,(9999x9999)"),
    ],
)
def test_a_bad_value_in_a_config_of_the_mllm_names_file_and_key(name, value, tmp_path):
    write_config(tmp_path, LlavaManagerConfig.tiny())
    assert read_config(tmp_path, LlavaManagerConfig) == LlavaManagerConfig.tiny()
    write_config(tmp_path, LlavaManagerConfig.tiny(), **{name: value})
    with pytest.raises(ValueError, match=name) as error:
        read_config(tmp_path, LlavaManagerConfig)
    assert str(tmp_path / "config.json") in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < len(str(tmp_path)) + 400


def test_a_config_of_another_model_or_with_unknown_keys_is_refused(tmp_path):
    write_config(tmp_path, ManagerTowerConfig.tiny())
    with pytest.raises(ValueError, match=r"config\.json is not the config of a LlavaManager"):
        read_config(tmp_path, LlavaManagerConfig)
    write_config(tmp_path, ManagerTowerConfig.tiny(), heights=5)
    with pytest.raises(ValueError, match=r"config\.json .*unknown fields \['heights'\]"):
        read_config(tmp_path, ManagerTowerConfig)
    for content in ("[]", "{", "null", "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json "):
            read_config(tmp_path, ManagerTowerConfig)
    with pytest.raises(ValueError, match="nowhere is not a checkpoint folder"):
        read_config(tmp_path / "nowhere", ManagerTowerConfig)


# ---------------------------------------------------------------- names of files
@dataclass
class Places:
    image: str = option("", "a file", path=True)
    name: str = option("", "a name that is stored")


def test_a_path_need_not_be_utf8():
    """Its bytes reach the system as they were; what is stored in files must be UTF-8."""
    odd = os.fsdecode(b"caf\xe9.png")
    assert parse_flags(Places, ["--image", odd]).image == odd
    for flag in ("--image", "--name"):
        for value in ("a\0b", "half \ud83d", odd):
            if (flag, value) == ("--image", odd):
                continue
            config = parse_flags(Places, [f"{flag}={value}"])
            with pytest.raises(FieldError, match="in UTF-8, without the character NUL"):
                check_fields(config)
    check_fields(Places(image=odd))
