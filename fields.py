"""The fields of configs: their type, their range and their help; one checker and one command line
for all scripts.

A config is a dataclass. Each of its fields is declared once, with everything that is to be known
about it:

    batch_size: int = option(64, "rows of an optimizer update, over all processes", least=1)

`check_fields` tests the values of a config, wherever they came from (a flag, a config.json,
Python), and `add_flags` makes a flag of every field, so that `-h` lists all of them with type,
default and help.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import io
import json
import math
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn


class FieldError(ValueError):
    """A field's value is not allowed. The message begins with the name of the field."""


class FlagError(ValueError):
    """A command line that cannot be read: a flag is unknown, missing, or of another type."""


SHORT = reprlib.Repr()  # it reads no more of a value than it shows
SHORT.maxlevel = 3
SHORT.maxlist = SHORT.maxtuple = SHORT.maxdict = 4
SHORT.maxstring = SHORT.maxother = 80


def shorten(text: str, most: int) -> str:
    """A text, or its beginning where it has more characters."""
    return text if len(text) <= most else f"{text[:most]}..."


def show(value: Any) -> str:
    """A value that was found, for a message: at most 80 characters, however large it is."""
    if isinstance(value, bytes):
        value = value[:40]
    text = SHORT.repr(value)
    if " object at 0x" in text or " instance at 0x" in text:
        text = f"a {type(value).__name__}"
    if len(text) > 80:
        text = f"{text[:77]}..."
    return text


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    flag: bool = True,
    path: bool = False,
) -> Any:
    """A field of a config. Without a default it has to be given.

    least, most: the range of a number, ends included; above, below: without the ends; choices: the
    texts that are allowed (in a tuple: each of its items); flag=False: the field follows from
    others, so it is no flag; path=True: it names a file or folder and is written into none, so it
    need not be UTF-8.
    """
    metadata = {
        "help": help,
        "least": least,
        "most": most,
        "above": above,
        "below": below,
        "choices": tuple(choices),
        "flag": flag,
        "path": path,
    }
    return dataclasses.field(default=default, metadata=metadata)


# ---------------------------------------------------------------- the checker
NUMBERS = {int: "a whole number", float: "a finite number"}
TYPE_NAMES = {bool: "true or false", str: "a text", **NUMBERS}


def field_types(config_class: type) -> dict[str, Any]:
    """The declared type of each field: int, float, bool, str, `str | None`, `tuple[int, ...]`,
    `list[str]` ...
    """
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def item_type(declared: Any) -> Any:
    """`int` of `tuple[int, ...]`, `str` of `list[str]`; None for a type that is no list."""
    if typing.get_origin(declared) in (tuple, list):
        return typing.get_args(declared)[0]
    return None


def may_be_none(declared: Any) -> bool:
    return isinstance(declared, types.UnionType) and type(None) in typing.get_args(declared)


def is_of_type(value: Any, declared: Any, is_path: bool = False) -> bool:
    """Whether a value has exactly this simple type.

    A bool is no number; a float is finite, and may be given as an int; a path need not be UTF-8.
    """
    if type(value) is int and abs(value) >= 2**63:
        return False  # more than a tensor can count
    if declared is float:
        return type(value) in (int, float) and math.isfinite(value)
    if declared is str and isinstance(value, str) and not is_plain(value, is_path):
        return False
    return type(value) is declared


def is_plain(text: str, is_path: bool = False) -> bool:
    """Whether a text may be a name: it is without the character NUL, and UTF-8 unless it is a path.

    Python reads bytes of a command line that are no UTF-8 as halves of characters, and gives them
    to the system as they were.
    """
    try:
        text.encode(errors="surrogateescape" if is_path else "strict")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def in_range(value: float, rule: Mapping[str, Any]) -> bool:
    """Whether a number lies in the range of its field."""
    if rule["least"] is not None and not value >= rule["least"]:
        return False
    if rule["most"] is not None and not value <= rule["most"]:
        return False
    if rule["above"] is not None and not value > rule["above"]:
        return False
    return rule["below"] is None or value < rule["below"]


def describe_rule(declared: Any, rule: Mapping[str, Any]) -> str:
    """What is allowed, in words: "a whole number from 1 on", "one of linear, cosine"."""
    if rule["choices"]:
        return f"one of {', '.join(choice or 'none' for choice in rule['choices'])}"
    parts = [TYPE_NAMES.get(declared, "another value")]
    # where the range begins
    if rule["least"] is not None:
        parts.append(f"from {rule['least']}")
    if rule["above"] is not None:
        parts.append(f"above {rule['above']}")
    # where it ends
    if rule["most"] is None and rule["least"] is not None:
        parts.append("on")
    if rule["most"] is not None:
        parts.append(f"to {rule['most']}" if rule["least"] is not None else f"up to {rule['most']}")
    if rule["below"] is not None:
        parts.append(f"and below {rule['below']}" if len(parts) > 1 else f"below {rule['below']}")
    return " ".join(parts)


def check_value(name: str, value: Any, declared: Any, rule: Mapping[str, Any]) -> None:
    """Raises FieldError unless the value of a simple type is allowed."""
    is_path = rule["path"]
    allowed = is_of_type(value, declared, is_path)
    if allowed and declared in NUMBERS:
        allowed = in_range(value, rule)
    if allowed and rule["choices"]:
        allowed = value in rule["choices"]
    if allowed:
        return
    wanted = describe_rule(declared, rule)
    if type(value) is int and abs(value) >= 2**63:
        wanted += " and below 2 to the power of 63"
    if isinstance(value, str) and not is_plain(value, is_path):
        wanted += " in UTF-8, without the character NUL"
    raise FieldError(f"{name} is {show(value)}; it must be {wanted}")


def check_filled(name: str, value: Any, declared: Any, rule: Mapping[str, Any]) -> None:
    """Raises FieldError for an empty text where a text is needed."""
    if declared is str and value == "" and "" not in rule["choices"]:
        raise FieldError(f"{name} is empty; it must be {describe_rule(declared, rule)}")


def check_field(field: dataclasses.Field, declared: Any, value: Any) -> None:
    """Raises FieldError unless a field that was declared with `option` may have this value."""
    name = field.name
    rule = field.metadata
    if may_be_none(declared):
        if value is None:
            return
        declared = typing.get_args(declared)[0]
    if declared in TYPE_NAMES:
        check_value(name, value, declared, rule)
        if field.default != "":  # where it is, an empty text means none
            check_filled(name, value, declared, rule)
    elif item_type(declared) in TYPE_NAMES:
        if not isinstance(value, tuple | list):
            raise FieldError(f"{name} is {show(value)}; it must be a list")
        for item in value:
            check_value(name, item, item_type(declared), rule)
            check_filled(name, item, item_type(declared), rule)
        if rule["choices"] and len(set(value)) < len(value):
            raise FieldError(f"{name} is {show(value)}; it names one of them twice")


def check_values(config_class: type, values: Mapping[str, Any]) -> None:
    """Test the values of some fields of a config class: type, range, choices. Raises FieldError.

    A field of another type than those in `field_types` is left to the config itself.
    """
    declared_types = field_types(config_class)
    for field in dataclasses.fields(config_class):
        if "choices" in field.metadata and field.name in values:
            check_field(field, declared_types[field.name], values[field.name])


def check_fields(config: Any) -> None:
    """Test every field of a config. Raises FieldError."""
    check_values(type(config), vars(config))


# ---------------------------------------------------------------- the command line
MOST_CHARACTERS = 300  # of argparse's messages, which hold what was typed


class Parser(argparse.ArgumentParser):
    """argparse with errors of one sentence."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        # argparse takes -1e-3 and -inf for flags
        self._negative_number_matcher = re.compile(r"-(\.?[0-9]|inf|nan)")

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += " (one that begins with - is written --FLAG=VALUE)"
        if not message.isprintable():
            message = message.encode("unicode_escape").decode()
        if len(message) > MOST_CHARACTERS:
            message = f"{message[:MOST_CHARACTERS]}..."
        raise FlagError(f"{message}; `python {self.prog} -h` lists all flags")

    def parse_args(self, argv: Any = None, namespace: Any = None) -> Any:
        """As argparse does; of an unknown flag it says which one is like it."""
        known, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {self.describe(unknown)}")
        return known

    def describe(self, unknown: list[str]) -> str:
        """The words of a command line that are no flags, with the flag that the first is like."""
        typed = unknown[0].partition("=")[0][:80]
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        similar = difflib.get_close_matches(typed, flags, n=1, cutoff=0.75)
        if typed.startswith("-") and similar:
            return f"{typed} (did you mean {similar[0]}?)"
        return " ".join(unknown)


# What Python reads as a number is more than what looks like one: 1_000, " 5", other scripts' digits
WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,40}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|nan)", re.IGNORECASE)


def parse_whole_number(text: str) -> int:
    if not WHOLE_NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{show(text)} is not a whole number like 12")
    return int(text)


def parse_number(text: str) -> float:
    if not NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{show(text)} is not a number like 0.5 or 1e-3")
    return float(text)


def parse_bool(text: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{show(text)} is not true or false")
    return values[text.lower()]


def parse_optional_bool(text: str) -> bool | None:
    return None if text.lower() == "none" else parse_bool(text)


def parse_optional(text: str) -> str | None:
    return None if text.lower() == "none" else text


def parse_texts(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def parse_integers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(WHOLE_NUMBER.fullmatch(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{show(text)} is not a list like 1,2,3")
    return tuple(int(part) for part in parts)


def parse_numbers(text: str) -> tuple[float, ...]:
    parts = text.split(",")
    if not all(NUMBER.fullmatch(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{show(text)} is not a list like 0.001,0.002")
    return tuple(float(part) for part in parts)


def parse_text_or_json(text: str) -> Any:
    """A text, or what begins with [ as JSON: --grid_pinpoints."""
    if not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(
            f"{show(text)} is not JSON like [[384,768],[768,384]]"
        ) from None


# declared type -> how to read a flag, and what its value is called in the help
FLAG_READERS: dict[Any, tuple[Any, str]] = {
    int: (parse_whole_number, "INT"),
    float: (parse_number, "FLOAT"),
    str: (str, "TEXT"),
    bool: (parse_bool, "BOOL"),
    bool | None: (parse_optional_bool, "BOOL"),
    str | None: (parse_optional, "TEXT"),
    tuple[str, ...]: (parse_texts, "A,B,..."),
    tuple[int, ...]: (parse_integers, "1,2,..."),
    tuple[float, ...]: (parse_numbers, "0.1,0.2,..."),
    tuple | str: (parse_text_or_json, "TEXT"),
    list[str]: (str, "TEXT"),
}


def show_default(value: Any) -> str:
    """A default as it would be typed."""
    if value is None or value in ("", [], ()):
        return "none"
    if isinstance(value, tuple) and isinstance(value[0], tuple):
        return json.dumps(value, separators=(",", ":"))  # sizes: [[384,768],[768,384]]
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)


def add_flags(
    parser: argparse._ActionsContainer,
    config_class: type,
    defaults: dict[str, Any] | None = None,
    skip: Collection[str] = (),
) -> None:
    """A flag for each field of a config class. defaults: what the help page shows instead of the
    fields' own.

    A flag that is not given leaves no trace in the parser's result.
    """
    declared_types = field_types(config_class)
    for field in dataclasses.fields(config_class):
        if field.name in skip or not field.metadata.get("flag", True):
            continue
        declared = declared_types[field.name]
        reader, metavar = FLAG_READERS[declared]
        default = (defaults or {}).get(field.name, field.default)
        help_text = field.metadata.get("help", "")
        if field.metadata.get("choices"):
            amount = "some" if item_type(declared) else "one"
            names = [choice or "none" for choice in field.metadata["choices"]]
            help_text += f"; {amount} of {', '.join(names)}"
        if default is not dataclasses.MISSING:
            help_text += f" [{show_default(default)}]"
        settings: dict[str, Any] = {"type": reader, "metavar": metavar}
        if declared in (bool, bool | None):
            settings |= {"nargs": "?", "const": True}  # --compile alone means true
        if declared == list[str]:
            settings["action"] = "append"
            help_text += "; may be repeated"
        parser.add_argument(
            f"--{field.name}",
            default=argparse.SUPPRESS,
            required=default is dataclasses.MISSING,
            help=help_text.replace("%", "%%"),
            **settings,
        )


def make_parser(description: str, command: str = "", add_help: bool = True) -> Parser:
    """A parser of this script, or of one of its commands."""
    script = Path(sys.argv[0]).name
    prog = f"{script} {command}".strip()
    return Parser(
        prog=prog,
        usage=f"{prog} [--FLAG VALUE ...]",
        description=description,
        allow_abbrev=False,
        add_help=add_help,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, width=100, max_help_position=32
        ),
    )


def make_config(config_class: type, values: dict[str, Any]) -> Any:
    """config_class(**values) from flags: an error names the flag."""
    try:
        return config_class(**values)
    except FieldError as error:
        raise FieldError(f"--{error}") from None


def parse_flags(
    config_class: type, argv: list[str], description: str = "", command: str = ""
) -> Any:
    """The command line of a script, or of one of its commands -> its config."""
    parser = make_parser(description, command)
    add_flags(parser, config_class)
    return make_config(config_class, vars(parser.parse_args(argv)))


def parse_recipe(
    argv: list[str],
    recipes: dict[str, tuple[Any, dict]],
    key: str,
    elsewhere: Sequence[str] = (),
) -> tuple[str, Any, dict]:
    """The command line of a training script: --{key} names a recipe, the other flags change it.

    recipes: name -> (config of the run, fields of the model's config); elsewhere: the names of
    recipes that another script has. Returns the recipe's name, the config of the run, and the
    fields of the model that differ from its preset. `check_places` of a run tests its files and
    folders.
    """
    # 1. the recipe alone, for it decides which other flags there are
    first = make_parser("", add_help=False)
    first.add_argument(f"--{key}", choices=[*recipes, *elsewhere], default=next(iter(recipes)))
    name = getattr(first.parse_known_args(argv)[0], key)
    run, model_fields = recipes[name]

    # 2. a flag for each field of the run and of the model
    others = [other for other in (*recipes, *elsewhere) if other != name]
    parser = make_parser(
        f"The flags of --{key} {name}, with their defaults in brackets.\n"
        f"--{key} may also be {', '.join(others)}: other defaults."
    )
    parser.add_argument(f"--{key}", metavar="NAME", default=name, help=f"which {key} [{name}]")
    run_defaults = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    add_flags(parser.add_argument_group("the run"), type(run), run_defaults)
    add_flags(
        parser.add_argument_group("the model"),
        run.architecture,
        run.model_defaults(model_fields),
        skip=run_defaults.keys(),
    )

    # 3. what was given: of the run, of the model
    run_values = {}
    model_values = {}
    for field_name, value in vars(parser.parse_args(argv)).items():
        if field_name in run_defaults:
            run_values[field_name] = value
        elif field_name != key:
            model_values[field_name] = value
    run.architecture.check_flags(model_values)
    try:
        check_values(run.architecture, model_values)
        run = dataclasses.replace(run, **run_values)
        run.check_places()
    except FieldError as error:
        raise FieldError(f"--{error}") from None
    return name, run, {**model_fields, **model_values}


# ---------------------------------------------------------------- a script with commands
class Command(NamedTuple):
    """One command of a script: the dataclass of its flags, and what it does with them."""

    options: type
    run: Callable[[Any], Any]


def describe_command(command: Command) -> str:
    """What a command does: the docstring of its options."""
    return inspect.getdoc(command.options) or ""


def list_commands(commands: dict[str, Command], description: str) -> str:
    """The help page of a script with commands."""
    script = Path(sys.argv[0]).name
    lines = [
        f"usage: {script} COMMAND [--FLAG VALUE ...]",
        "",
        description,
        "",
        f"commands, whose flags `python {script} COMMAND -h` lists:",
    ]
    for name, command in commands.items():
        first_line = describe_command(command).partition("\n")[0]
        lines.append(f"  {name:<12}{first_line}")
    return "\n".join(lines)


def forgive_encodings() -> None:
    """A letter that the terminal cannot show is shown as "?": no result is lost for it."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run_command(commands: dict[str, Command], argv: list[str], description: str) -> None:
    """The main function of a script with commands. Raises FlagError for a command that is none."""
    forgive_encodings()
    script = Path(sys.argv[0]).name
    if not argv:
        raise FlagError(f"{script} needs a command, one of {', '.join(commands)}")
    name = argv[0]
    if name in ("-h", "--help"):
        print(list_commands(commands, description))
        return
    if name not in commands:
        raise FlagError(
            f"{script} has no command {show(name)}; it must be one of {', '.join(commands)}"
        )
    command = commands[name]
    options = parse_flags(command.options, argv[1:], describe_command(command), name)
    command.run(options)
