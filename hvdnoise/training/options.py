"""From the command line and YAML files to settings; every mistake is one line.

jsonargparse does the work. Around it: bool flags need no value, the settings come back as the
dataclasses, and its messages become one line with the value and the remedy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from argparse import ArgumentError
from typing import Any, Sequence, TypeVar

import jsonargparse

from hvdnoise.training.config import ConfigError, flatten

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], *, program: str, positional: str = "") -> T:
    """The settings ``kind`` (a dataclass) from flags and ``--config`` files.

    ``--help`` and ``--print_config`` print and exit with 0.

    Raises:
        ConfigError: for anything that is no right setting by itself.
    """
    parser = jsonargparse.ArgumentParser(prog=program, description=_description(kind),
                                         exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it "
                        "override it")
    if positional:
        parser.add_argument(positional, help=f"the {positional}")
    parser.add_class_arguments(kind, skip={positional} if positional else None)
    said = io.StringIO()  # usage that argparse prints before it raises
    try:
        with contextlib.redirect_stderr(said):
            found = parser.parse_args(_with_values(kind, arguments))
        return _build(kind, found)
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(_one_line(error, kind)) from error


def _description(kind: type) -> str:
    return (kind.__doc__ or "").split("\n\n")[0].strip()


def _with_values(kind: type, arguments: Sequence[str]) -> list[str]:
    """``--flag`` alone means ``--flag true`` where the setting is a bool."""
    full = []
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        full.append(argument)
        if argument.removeprefix("--") in _bools(kind) and following.startswith("--"):
            full.append("true")
    return full


def _bools(kind: type, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, annotation in typing.get_type_hints(kind).items():
        if annotation is bool:
            names.add(prefix + name)
        elif dataclasses.is_dataclass(annotation):
            names |= _bools(typing.cast(type, annotation), f"{prefix}{name}.")
    return names


def _build(kind: type[T], values: Any) -> T:
    """The dataclass from parsed values, group by group."""
    hints = typing.get_type_hints(kind)
    return kind(**{each.name: _build(hints[each.name], values[each.name])
                   if dataclasses.is_dataclass(hints[each.name]) else values[each.name]
                   for each in dataclasses.fields(typing.cast(Any, kind))})


def _one_line(error: Exception, kind: type) -> str:
    text = " ".join(str(error).split())
    help_ = "see --help"
    if found := re.search(r"[Uu]nrecognized arguments?: (.*)", text):
        return f"unknown {found[1]}: {_nearest(found[1], kind)}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'|"
                          r"Option '([\w.]+)' is not accepted", text):
        key = found[3] or f"{found[1]}.{found[2]}"
        return f"unknown setting {key!r}: {_nearest(key, kind)}"
    if found := re.search(r'Parser key "([\w.]+)":(.*)', text):
        key, why = found[1], found[2].strip()
        value = re.search(r"(?:Got value|Given value): (.*)$", why)
        if value:
            return f"{key}={value[1]} is wrong: give {_expected(why)}"
        return f"{key}: {why}; {help_}"
    return text if isinstance(error, ConfigError) or not isinstance(error, ArgumentError) \
        else f"{text}; {help_}"


def _expected(why: str) -> str:
    """What a message of jsonargparse says it wants, in plain words."""
    if choices := re.search(r"Literal\[(.*?)\]", why):
        return f"one of {choices[1]}".replace("'", "")
    names: list[str] = re.findall(r"<class '(\w+)'>", why.split("Given value type")[0])
    words = {"int": "a whole number", "float": "a number", "bool": "true or false",
             "str": "text", "NoneType": "null", "list": "a list", "tuple": "a list"}
    wanted = dict.fromkeys(words.get(name, name) for name in names)  # each once, in order
    return " or ".join(wanted) or "another value; see --help"


def _nearest(text: str, kind: type) -> str:
    wanted = text.split()[0].removeprefix("--").split("=")[0]
    near = difflib.get_close_matches(wanted, flatten(kind()), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else "see --help"
