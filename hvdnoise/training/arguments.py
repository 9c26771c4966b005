"""What the arguments of a command mean, before jsonargparse reads them."""

from __future__ import annotations

import contextlib
import json
import os
import typing
from pathlib import Path
from typing import Any, Sequence

import jsonargparse
import yaml

from hvdnoise.training import yamlfile
from hvdnoise.training.errors import ConfigError


def with_lists(arguments: Sequence[str]) -> list[str]:
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


def check_values(arguments: Sequence[str]) -> None:
    """Refuse a value that would take long, or end in no error of its own, as YAML."""
    before = ""
    for argument in arguments:
        flag, given, value = argument.partition("=") if argument.startswith("--") else \
            (before, "=", argument)
        if given and any(sign in value for sign in "[{&*!") and flag != "--config":
            yamlfile.check_text(flag.removeprefix("--") or "arguments", value)
        before = argument if argument.startswith("--") else ""


def plugins_of(kind: type, arguments: Sequence[str]) -> list[str]:
    """The plugins that the arguments name; what is wrong with them otherwise is found later."""
    found: Any = None
    if "plugins" not in typing.get_type_hints(kind):
        return []
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        flag, given, value = argument.partition("=")
        value = value if given else following
        with contextlib.suppress(ValueError, yaml.YAMLError):
            if flag == "--plugins":
                found = yamlfile.load(value)
            elif flag == "--config":
                found = _file_or_text(value)[1].get("plugins", found)
    right = isinstance(found, list) and all(isinstance(each, str) for each in found)
    return found if right else []


class ConfigFile(jsonargparse.ActionConfigFile):
    """``--config``: a YAML file, or its text. Its noise may be a list."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        text, settings = _file_or_text(values)
        if isinstance(settings.get("noise"), list):
            text = yaml.safe_dump(several_noises(settings))
        super().__call__(parser, cfg, f"{text}\n", option_string)  # with it, it names no file


def _file_or_text(value: str) -> tuple[str, dict[str, Any]]:
    """The text of settings and what they are; of a file, or given as they are."""
    path = Path(value)
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        if not os.path.lexists(path):
            inside = yamlfile.load(value)
            if isinstance(inside, dict):
                return value, inside
    return yamlfile.read(path)


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
