"""Reads the command line of a script, and the TOML files that give its flags."""

import io
import json
import re
import shlex
import signal
import sys
import tomllib
from collections.abc import Callable, Collection, Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro

from common.errors import UserError, one_line_errors, printable
from common.options import flag_of
from common.system import print_what_can_be_printed
from common.text import read_text
from options.foreign import DIFFERENT, NO_EFFECT, REMOVED, SAME

T = TypeVar("T")

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}
SWITCH_VALUES = {"true", "false", "yes", "no", "on", "off", "1", "0"}
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(e[+-]?\d+)?", re.IGNORECASE)


def parse_command(program: str, config: type[T], description: str | None) -> T:
    """The options that the command line gives. --help ends the program, and so does a mistake, with one line and status 2.

    A script calls this before it imports PyTorch, which takes seconds: Ctrl-C during that would print a traceback, so until
    `one_line_errors` around `main` it just ends the script.
    """
    print_what_can_be_printed()
    with one_line_errors(program):
        options = parse_arguments(config, sys.argv[1:], description)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return options


def parse_arguments(config: type[T], arguments: list[str], description: str | None = None) -> T:
    """Raises UserError."""
    known = {spec.name: spec for spec in all_fields(config)}
    given = given_flags(arguments, known)
    values = read_files(arguments, known) if "config" in known else {}
    values = without(values, given)
    from_files = [argument for name, (value, _) in values.items() for argument in as_arguments(known[name], value)]
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(config, description=description, args=from_files + arguments, config=(tyro.conf.OmitArgPrefixes,))
    except UserError as error:
        message = str(error)
    except SystemExit as end:
        if not end.code:
            raise
        message = sentence_of(printed.getvalue())
    flags = (flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*)", message))
    file = next((values[flag][1] for flag in flags if flag in values), None)
    raise UserError(f"{file}: {message}" if file else message)


def all_fields(config: type) -> Iterator[Field]:
    """The fields of a dataclass and of those in it."""
    for spec in fields(config):
        nested = get_args(spec.type)[0] if get_origin(spec.type) is Annotated else spec.type
        if isinstance(nested, type) and is_dataclass(nested):
            yield from all_fields(nested)
        else:
            yield spec


def is_positional(spec: Field) -> bool:
    return tyro.conf.Positional in get_args(Annotated[spec.type, None])


def sentence_of(box: str) -> str:
    """The sentence in tyro's box around an error: what is above its first rule, without the title."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((n for n, line in enumerate(lines) if line.startswith(("─", "╰"))), len(lines))
    return " ".join(" ".join(lines[:end]).split()).removeprefix("Error parsing ")


# The command line.


def given_flags(arguments: list[str], known: dict[str, Field]) -> set[str]:
    """The names of the options that a command line gives. Raises UserError for what is no flag of this script, a switch with a
    value, a decimal comma and what is no number.
    """
    given, current = set(), None
    for argument, following in pairwise([*arguments, ""]):
        value = argument
        if argument.startswith("--") and not argument.startswith("--tyro-") and argument != "--help":
            flag, equals, value = argument.partition("=")
            name = flag[2:].replace("-", "_")
            current = known.get(name) or known.get(name.removeprefix("no_"))
            if current is None or is_positional(current) or (name not in known and current.type is not bool):
                raise UserError(f"{flag}: {what_is_meant(name, known, flag_of)}")
            given.add(current.name)
            if current.type is bool and (equals or following.lower() in SWITCH_VALUES):
                on = flag_of(current.name)
                raise UserError(f"{on} takes no value: {on} or {on.replace('--', '--no-', 1)}")
        if current is not None and value and (numbers := atoms(current.type) - {tuple}) in ({int}, {float}):
            check_number(flag_of(current.name), value, *numbers)
            current = current if tuple in atoms(current.type) else None  # what follows is not of this flag
    return given


def check_number(flag: str, value: str, kind: Callable[[str], float]) -> None:
    """Raises UserError unless `value` is one, or None. `kind`: int or float."""
    if kind is float and DECIMAL_COMMA.fullmatch(value):
        raise UserError(f"{flag} {value}: write {value.replace(',', '.')}")
    with suppress(ValueError):
        kind("0" if value == "None" else value)
        return
    raise UserError(f"{flag} {value}: this must be {KINDS[kind]}")  # type: ignore[index]


def what_is_meant(name: str, known: dict[str, Field], spell: Callable[[str], str]) -> str:
    """After the unknown `name` of an option and a colon: what it is here, or the nearest, written by `spell`."""
    if "config" in known and name in SAME:
        return f"here it is {spell(SAME[name])}"
    if "config" in known and (theirs := DIFFERENT.get(name) or NO_EFFECT.get(name)):
        return theirs
    if any(name == n and is_positional(spec) for n, spec in known.items()):
        return f"here the {'folder' if name == 'data' else 'file'} stands without a flag"
    flags = [n for n, spec in known.items() if not is_positional(spec)]
    nearest = get_close_matches(name, [*flags, *(f"no_{n}" for n in flags if known[n].type is bool)], 1)
    return f"there is no such option: {f'do you mean {spell(nearest[0])}?' if nearest else 'see --help'}"


# Files of options.


def read_files(arguments: list[str], known: dict[str, Field]) -> dict[str, tuple[Any, str]]:
    """{name: (value, file)} of the files after --config; the later file wins. Raises UserError that names file and key."""
    files = []
    for argument, following in pairwise([*arguments, ""]):
        flag, equals, value = argument.partition("=")
        if flag == "--config":
            files.append(value if equals else following)
            if not files[-1] or files[-1].startswith("--"):
                raise UserError("--config needs a file")
    values: dict[str, tuple[Any, str]] = {}
    for file in files:
        later = read_file(file, known)
        values = without(values, later) | {name: (value, file) for name, value in later.items()}
    return values


def without(values: dict[str, tuple[Any, str]], later: Collection[str]) -> dict[str, tuple[Any, str]]:
    """The options of files that hold beside `later` ones: --steps takes the place of --epochs, which would win over it."""
    hidden = {*later, "epochs"} if "steps" in later else later
    return {name: value for name, value in values.items() if name not in hidden}


def read_file(file: str, known: dict[str, Field]) -> dict[str, Any]:
    """{name: value} of a TOML file. Raises UserError."""
    try:
        table = tomllib.loads(read_text(Path(file).read_bytes()))
    except OSError as error:
        raise UserError(f"--config {file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # no UTF-8, or no TOML
        raise UserError(f"--config {file} is no TOML: {error}") from None
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in REMOVED:
            continue
        if isinstance(value, dict):
            raise UserError(f"{file}: [{key}] is a table, and options stand without one: rank = 8")
        if name == "config":
            raise UserError(f"{file}: {key}: a file names no other: give several --config")
        if name in values:
            raise UserError(f"{file}: {key} is there twice: remove one")
        if name not in known and known.get(on := name.removeprefix("no_")) and known[on].type is bool:
            raise UserError(f"{file}: {key}: in a file it is {on} = {'false' if value is True else 'true'}")
        if name not in known:
            raise UserError(f"{file}: {key}: {what_is_meant(name, known, str)}")
        if problem := wrong_type(known[name].type, value):
            raise UserError(f"{file}: {key} = {value!r} must be {problem}")
        several = value if isinstance(value, list) else [value]
        if get_origin(known[name].type) is tuple and any(str(item).startswith("-") for item in several):
            raise UserError(f"{file}: {key}: none of its texts may begin with -")
        values[name] = value
    return values


def atoms(annotation: Any) -> set[type]:
    """bool, int, float and str: those that a value of this type consists of, and tuple if it may have several."""
    if get_origin(annotation) is Literal or annotation is Path:
        return {str}
    inner = set().union(*map(atoms, get_args(annotation)))
    own = {annotation} if annotation in KINDS else {tuple} if get_origin(annotation) is tuple else set()
    return inner | own


def wrong_type(annotation: Any, value: Any) -> str | None:
    """What a value of a TOML file must be instead; None if it fits."""
    allowed = atoms(annotation)
    accepted = allowed | ({int} if float in allowed else set())
    if isinstance(value, list) and tuple in allowed:
        wrong = any(type(item) not in accepted for item in value)
    else:
        wrong = type(value) not in accepted
    kinds = " or ".join(text for kind, text in KINDS.items() if kind in allowed)
    return (kinds + (", or a list of such" if tuple in allowed else "")) if wrong else None


def as_arguments(spec: Field, value: Any) -> list[str]:
    """What gives `value` on a command line."""
    flag = flag_of(spec.name)
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if not isinstance(value, list):
        return [f"{flag}={value}"]
    appended = get_origin(spec.type) is not tuple  # tyro.conf.UseAppendAction
    return [f"{flag}={item}" for item in value] if appended else [flag, *map(str, value)] if value else []


def options_as_toml(flags: dict[str, Any], command: list[str]) -> str:
    """{name: value} of options as a file for --config. The command is a comment, and so is None, which TOML does not have."""
    lines = ["# " + printable(shlex.join(command))]
    for name, value in flags.items():
        lines.append(f"{name} = {as_toml(value)}" if value is not None else f"# {name}: not given")
    return "\n".join(lines) + "\n"


def as_toml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
