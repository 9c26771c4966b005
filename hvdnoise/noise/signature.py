"""What a noise says of itself: the options of its constructor, and the texts that explain them.

A noise's maker is its class, or a function that returns it. Its options are the parameters by
name. A constructor with ``**options`` hands them on, so the options of the class above count too.
The texts are those of the Args sections of the docstrings.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import types
import typing
from dataclasses import dataclass
from typing import Any, Callable

from hvdnoise.noise.base import Noise, Schedule

Maker = Callable[..., Noise]
REQUIRED: Any = inspect.Parameter.empty
# what the trainer's settings of a noise are called already
_RESERVED = ("kind", "options", "final", "settings", "build", "schema")
_PLAIN = (bool, int, float, str, type(None), Any)
_CONTAINERS = (typing.Union, types.UnionType, typing.Literal, list, tuple, dict)


@dataclass(frozen=True)
class Option:
    """An option of a noise.

    Args:
        hint: its type; float for a `Schedule`.
        default: the constructor's; `REQUIRED` where there is none.
        text: what the docstring says of it.
        schedule: whether it may be a function of the step.
    """

    hint: Any
    default: Any
    text: str
    schedule: bool = False


def options_of(maker: Maker) -> dict[str, Option]:
    """The options of a maker, in its order, those of classes above behind.

    Raises:
        ValueError: when a parameter is of no use to a trainer.
    """
    texts = _texts(maker)
    found: dict[str, Option] = {}
    for function in _constructors(maker):
        parameters = list(inspect.signature(function).parameters.values())
        hints = _hints(function)
        for each in parameters[isinstance(maker, type):]:
            if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) or each.name in found:
                continue
            if each.kind is each.POSITIONAL_ONLY:
                raise ValueError(f"{name_of(maker)}: {each.name!r} cannot be given by name")
            if each.name not in hints:
                raise ValueError(f"{name_of(maker)}: {each.name!r} has no type hint: give it one, "
                                 "such as float")
            hint, schedule = _plain(hints[each.name])
            if hint is None:
                raise ValueError(f"{name_of(maker)}: {each.name!r} is no number, text, list or "
                                 "choice of these, which a trainer could give it")
            found[each.name] = Option(hint, each.default, texts.get(each.name, ""), schedule)
        if all(each.kind is not each.VAR_KEYWORD for each in parameters):
            break
    return found


def summary(maker: Maker) -> str:
    """The first paragraph of its docstring, on one line."""
    return " ".join((inspect.getdoc(maker) or "").split("\n\n")[0].replace("``", "").split())


def name_of(maker: Maker) -> str:
    """Where a maker is defined: equal names mean the same maker, also after another import."""
    return f"{maker.__module__}.{maker.__qualname__}"


def check_name(what: str, name: Any) -> None:
    """Refuse a name that flags, files and variants could not carry."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ValueError(f"{what}={name!r} is no name: give small letters, digits, - and _, a "
                         "letter first")


def check_maker(maker: Any) -> None:
    """Refuse what is no maker, or has an option that the trainer cannot tell it."""
    if not callable(maker) or not hasattr(maker, "__qualname__"):
        raise ValueError(f"{maker!r} is neither a class nor a function")
    if taken := [name for name in options_of(maker) if name in _RESERVED]:
        raise ValueError(f"{name_of(maker)}: an option cannot be called {taken[0]!r}")


def _constructors(maker: Maker) -> list[Callable[..., Any]]:
    if not isinstance(maker, type):
        return [maker]
    return [vars(each)["__init__"] for each in maker.__mro__[:-1] if "__init__" in vars(each)]


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError as error:
        raise ValueError(f"{name_of(function)}: a type hint cannot be read: {error}") from error


def _plain(hint: Any) -> tuple[Any, bool]:
    """The hint for a flag, None where there cannot be one; and whether it is a `Schedule`."""
    parts = [each for each in typing.get_args(hint) if each is not type(None)]
    if parts == list(typing.get_args(Schedule)):
        return float, True
    return (hint if _is_plain(hint) else None), False


def _is_plain(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return True
    if origin in _CONTAINERS:
        return all(each is ... or _is_plain(each) for each in typing.get_args(hint))
    return hint in _PLAIN or hint in (list, tuple, dict)


def _texts(maker: Maker) -> dict[str, str]:
    """What the Args sections say, of a class before those of the classes above it."""
    documented = list(maker.__mro__) if isinstance(maker, type) else [maker]
    found: dict[str, str] = {}
    for each in documented:
        for source in (each, vars(each).get("__init__") if isinstance(each, type) else None):
            found = {**_arguments(getattr(source, "__doc__", None) or ""), **found}
    return found


def _arguments(docstring: str) -> dict[str, str]:
    """Name -> text of an Args section; ``a, b: text`` explains both."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n|\n)*)", inspect.cleandoc(docstring) + "\n", re.M)
    entries = re.findall(r"^(\S[^:\n]*):[ \t\n]+(.*(?:\n[ \t]+.*)*)",
                         textwrap.dedent(section[1] if section else ""), re.M)
    return {name.strip(): " ".join(text.replace("``", "").split())
            for names, text in entries for name in names.split(",")}
