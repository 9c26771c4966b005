"""From the command line and YAML files to settings; every mistake is one line.

jsonargparse does the work. Around it: bool flags need no value, the settings come back as the
dataclasses, its messages become one line with the value and the remedy, and a group whose settings
are known only now (the noise, after the plugins) says what they are by its ``schema``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import re
import typing
from argparse import ArgumentError
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Sequence, TypeVar

import jsonargparse
import yaml

from hvdnoise.training import plugins
from hvdnoise.training.config import ConfigError, flatten

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], *, program: str, positional: str = "") -> T:
    """The settings ``kind`` (a dataclass) from flags and ``--config`` files.

    Plugins that they name are imported first. ``--help`` and ``--print_config`` print and exit
    with 0.

    Raises:
        ConfigError: for anything that is no right setting by itself.
    """
    arguments = _with_several_noises(_with_lists(arguments))
    plugins.load(_plugins(kind, arguments))
    with _one_line_errors(kind):
        arguments = _with_values(kind, arguments)
        first = _schema(kind)
        found = _parser(kind, first, program, positional).parse_args(arguments)
        if first is not kind:  # noises may have options of one name and several types
            exact = _schema(kind, found)
            if _types(exact) != _types(first):
                found = _parser(kind, exact, program, positional).parse_args(arguments)
        config = _build(kind, found)
    plugins.load(getattr(config, "plugins", ()))  # by an abbreviated flag
    return config


def from_file(kind: type[T], path: Path, *, program: str, without: Sequence[str] = ()) -> T:
    """The settings of a file alone, but some groups, which are as by default.

    No plugin is imported.

    Raises:
        ConfigError: for a file that holds no such settings.
    """
    with _one_line_errors(kind):
        try:
            values = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no settings")
    values = several_noises(values)
    return reader(kind, program=program)(
        {key: value for key, value in values.items() if key not in without})


def reader(kind: type[T], *, program: str) -> Callable[[dict[str, Any]], T]:
    """A function from nested settings to ``kind``; quick where there are many to read.

    No plugin is imported. The function raises a ConfigError for what are no such settings.
    """
    groups = [name for name, hint in typing.get_type_hints(kind).items() if hasattr(hint, "schema")]
    parsers: dict[Any, jsonargparse.ArgumentParser] = {}  # by the kinds of noise, as in `parse`

    def read(values: dict[str, Any]) -> T:
        given = {name: values.get(name) for name in groups}
        kinds = {name: each["kind"] for name, each in given.items()
                 if isinstance(each, dict) and isinstance(each.get("kind"), str)}
        key = tuple(kinds.items())
        with _one_line_errors(kind):
            if key not in parsers:
                found = {name: SimpleNamespace(kind=kinds.get(name, "none")) for name in groups}
                parsers[key] = _parser(kind, _schema(kind, found), program)
            return _build(kind, parsers[key].parse_object(values))
    return read


def _parser(kind: type, schema: type, program: str, positional: str = ""
            ) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(prog=program, description=_description(kind),
                                         exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it "
                        "override it")
    if positional:
        several = typing.get_origin(typing.get_type_hints(kind)[positional]) is tuple
        parser.add_argument(positional, help=f"the {positional}", nargs="+" if several else None)
    parser.add_class_arguments(schema, skip={positional} if positional else None)
    return parser


@contextlib.contextmanager
def _one_line_errors(kind: type) -> Iterator[None]:
    said = io.StringIO()  # usage that argparse prints before it raises
    try:
        with contextlib.redirect_stderr(said):
            yield
    except ConfigError:
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(_one_line(error, kind)) from error


def _description(kind: type) -> str:
    return (kind.__doc__ or "").split("\n\n")[0].strip()


def _schema(kind: type, found: Any = None) -> type:
    """``kind``, where each group that has a schema of its own is that; as for what was found."""
    groups = [(name, hint.schema(*(() if found is None else (found[name].kind,))))
              for name, hint in typing.get_type_hints(kind).items() if hasattr(hint, "schema")]
    if not groups:
        return kind
    made = dataclasses.make_dataclass(
        kind.__name__, [(name, group, dataclasses.field(default_factory=group))
                        for name, group in groups], bases=(kind,), frozen=True)
    made.__doc__ = kind.__doc__
    return made


def _types(kind: Any) -> dict[str, Any]:
    """The types of the settings, of a group as a dict."""
    return {name: _types(hint) if dataclasses.is_dataclass(hint) else hint
            for name, hint in typing.get_type_hints(kind).items()}


def _with_values(kind: type, arguments: Sequence[str]) -> list[str]:
    """``--flag`` alone means ``--flag true`` where the setting is a bool."""
    full: list[str] = []
    bools = _bools(_schema(kind))
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        full.append(argument)
        if argument.removeprefix("--") in bools and following.startswith("--"):
            full.append("true")
    return full


def _with_lists(arguments: Sequence[str]) -> list[str]:
    """``--plugins a,b`` and ``--plugins=a,b`` mean ``--plugins '["a", "b"]'``."""
    full: list[str] = []
    for argument in arguments:
        if argument.startswith("--plugins="):
            flag, _, argument = argument.partition("=")
            full.append(flag)
        if full and full[-1] == "--plugins" and not argument.startswith(("[", "--")):
            argument = json.dumps([each.strip() for each in argument.split(",")])
        full.append(argument)
    return full


def _with_several_noises(arguments: Sequence[str]) -> list[str]:
    """A file whose noise is a list is given as its text, in the form that the settings have."""
    full: list[str] = []
    for argument in arguments:
        flag, given, value = argument.partition("=")
        if full and full[-1] == "--config" or given and flag == "--config":
            values = None
            with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
                values = yaml.safe_load(Path(value if given else argument).read_text())
            if isinstance(values, dict) and isinstance(values.get("noise"), list):
                text = yaml.safe_dump(several_noises(values))
                argument = f"{flag}={text}" if given else text
        full.append(argument)
    return full


def several_noises(values: dict[str, Any]) -> dict[str, Any]:
    """``noise: [a, b]`` means ``noise: {..a, also: [b]}``."""
    noises = values.get("noise")
    if not isinstance(noises, list):
        return values
    if not all(isinstance(each, dict) for each in noises):
        raise ConfigError(f"noise={noises} is wrong: give a list of groups such as "
                          "{kind: gnc, radius: 0.1}")
    first, *rest = noises or [{}]
    return {**values, "noise": {**first, "also": rest} if rest else first}


def _plugins(kind: type, arguments: Sequence[str]) -> list[str]:
    """The plugins that the arguments name; what is wrong with them otherwise is found later."""
    found: Any = None
    if "plugins" not in typing.get_type_hints(kind):
        return []
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        flag, given, value = argument.partition("=")
        value = value if given else following
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            if flag == "--plugins":
                found = yaml.safe_load(value)
            elif flag == "--config":
                inside = yaml.safe_load(Path(value).read_text() if Path(value).is_file() else value)
                found = inside.get("plugins", found) if isinstance(inside, dict) else found
    right = isinstance(found, list) and all(isinstance(each, str) for each in found)
    return found if right else []


def _bools(kind: type, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, annotation in typing.get_type_hints(kind).items():
        if annotation in (bool, bool | None):
            names.add(prefix + name)
        elif dataclasses.is_dataclass(annotation):
            names |= _bools(typing.cast(type, annotation), f"{prefix}{name}.")
    return names


def _build(kind: type[T], values: Any) -> T:
    """The dataclass from parsed values, group by group."""
    if hasattr(kind, "schema"):
        return kind(**vars(values))
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
    return f"{text}; {help_}" if isinstance(error, ArgumentError) else text


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
    near = difflib.get_close_matches(wanted, flatten(_schema(kind)()), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else "see --help"
