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
import re
import typing
from argparse import ArgumentError
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Sequence, TypeVar

import jsonargparse

from hvdnoise.training import plugins, yamlfile
from hvdnoise.training.arguments import (
    ConfigFile,
    check_values,
    plugins_of,
    several_noises,
    with_lists,
)
from hvdnoise.training.config import ConfigError, flatten
from hvdnoise.training.errors import REFUSALS, one_line
from hvdnoise.training.values import check_value

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], *, program: str, positional: str = "") -> T:
    """The settings ``kind`` (a dataclass) from flags and ``--config`` files.

    Plugins that they name are imported first, functions last. ``--help`` and ``--print_config``
    print and exit with 0.

    Raises:
        ConfigError: for anything that is no right setting by itself.
    """
    arguments = with_lists(arguments)
    check_values(arguments)
    plugins.load(plugins_of(kind, arguments))
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
    plugins.load_functions(config)
    return config


def from_file(kind: type[T], path: Path, *, program: str, without: Sequence[str] = ()) -> T:
    """The settings of a file alone, but some groups, which are as by default.

    No plugin and no function is imported.

    Raises:
        ConfigError: for a file that holds no such settings.
    """
    values = several_noises(yamlfile.read(path)[1])
    return reader(kind, program=program)(
        {key: value for key, value in values.items() if key not in without})


def reader(kind: type[T], *, program: str) -> Callable[[dict[str, Any]], T]:
    """A function from nested settings to ``kind``; quick where there are many to read.

    Nothing that they name is imported. The function raises a ConfigError for what are no such
    settings.
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
    parser.add_argument("--config", action=ConfigFile, help="YAML file of settings; flags after "
                        "it override it")
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
    except (ArgumentError, TypeError, *REFUSALS) as error:
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


def _bools(kind: type, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, annotation in typing.get_type_hints(kind).items():
        if annotation in (bool, bool | None):
            names.add(prefix + name)
        elif dataclasses.is_dataclass(annotation):
            names |= _bools(typing.cast(type, annotation), f"{prefix}{name}.")
    return names


def _build(kind: type[T], values: Any, prefix: str = "") -> T:
    """The dataclass from parsed values, group by group."""
    if hasattr(kind, "schema"):
        given = dict(vars(values))
    else:
        hints = typing.get_type_hints(kind)
        given = {each.name: _checked(prefix + each.name, hints[each.name], values[each.name])
                 for each in dataclasses.fields(typing.cast(Any, kind))}
    for name, value in given.items():
        check_value(prefix + name, value)
    return kind(**given)


def _checked(name: str, hint: Any, value: Any) -> Any:
    """A group, or a value that may be null only where the type says so."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{name}.")
    if value is None and hint is not Any and type(None) not in typing.get_args(hint):
        raise ConfigError(f"{name}=null is wrong: give a value, or leave it out")
    return value


def _one_line(error: Exception, kind: type) -> str:
    text = one_line(error)
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
