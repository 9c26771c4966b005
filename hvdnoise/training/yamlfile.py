"""YAML with settings, read so that nothing in it is executed, takes long or is silently lost.

PyYAML's safe loader executes nothing. But a few lines with aliases can stand for more values than
there is memory, an alias for what holds it, or so many brackets for a nesting that Python does not
reach the bottom of; and of a key that is there twice only the last value would count.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from hvdnoise.training.errors import ConfigError, one_line

LARGEST = 1 << 20  # bytes of a file
DEEPEST = 40       # groups and lists within one another
MOST = 10_000      # values, each alias with all that it stands for
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN = (type(None), bool, int, float, str)


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a file, and the settings that it holds: keys are text, values plain.

    Raises:
        ConfigError: one line that names the file, for anything else.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise ConfigError(f"{path} is no file: give a YAML file of settings")
        if state.st_size > LARGEST:
            raise ConfigError(f"{path} has {state.st_size} bytes: a file of settings has at most "
                              f"{LARGEST}")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8 (byte {error.start}): give a YAML file of "
                          "settings") from error
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path} cannot be read: {what}") from error
    try:
        values = load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} cannot be read: it is no YAML ({one_line(error)})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings: give lines such as epochs: 10")
    return text, values


def load(text: str) -> Any:
    """The value that YAML stands for.

    Raises:
        yaml.YAMLError: where it is no YAML.
        ConfigError: where it is too much, or holds what is no setting.
    """
    _check_events(text)
    try:
        values = jsonargparse.get_loader("yaml")(text)
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML's constructors raise many kinds, as for "!!bool 7"
        raise ConfigError(f"a value cannot be read ({type(error).__name__}: {one_line(error)})"
                          ) from error
    _check_plain(values)
    return values


def check_text(name: str, text: str) -> None:
    """Refuse the text of a flag that would be too much as YAML; other text is left as it is.

    Raises:
        ConfigError: one line that begins with ``name``.
    """
    try:
        load(text)
    except yaml.YAMLError:
        pass
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def dump(values: dict[str, Any]) -> str:
    """The text that `load` reads as ``values``."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    return text


class _Dumper(yaml.SafeDumper):
    """Text that would be read as something else is quoted: as "1e-3", a number to `load` alone."""

    def represent_text(self, value: str) -> yaml.ScalarNode:
        try:
            stays = load(value) == value
        except (ConfigError, yaml.YAMLError):
            stays = False
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if stays else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


class _Open:
    """A list or group whose end has not come: how many values it has, and the keys of a group."""

    def __init__(self, event: Any) -> None:
        self.anchor, self.size = event.anchor, 1
        self.keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None
        self.key_next = self.keys is not None

    def take(self, size: int, key: str | None) -> None:
        """A value, or the key before it, has ended."""
        self.size += size
        if self.keys is None:
            return
        if self.key_next and key is not None and key != "<<":
            if key in self.keys:
                raise ConfigError(f"{key} is there twice: leave one out")
            self.keys.add(key)
        self.key_next = not self.key_next


def _check_events(text: str) -> None:
    """Refuse what is too deep, too much or doubled, before any of it is built."""
    outer = _Open(yaml.SequenceStartEvent(None, None, True))  # the document
    open_, sizes = [outer], dict[str, int]()  # by anchor, of what has ended
    for event in yaml.parse(text, Loader=_Loader):
        size, key = 1, None
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            open_.append(_Open(event))
            if len(open_) > DEEPEST:
                raise ConfigError(f"it is nested more than {DEEPEST} deep")
            continue
        if isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            ended = open_.pop()
            size = ended.size
            if ended.anchor:
                sizes[ended.anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in [each.anchor for each in open_]:
                raise ConfigError(f"*{event.anchor} stands inside of itself")
            size = sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            key = event.value
            if event.anchor:
                sizes[event.anchor] = 1
        else:
            continue
        open_[-1].take(size, key)
        if sum(each.size for each in open_) > MOST:
            raise ConfigError(f"it has more than {MOST} values")


def _check_plain(value: Any) -> None:
    """Refuse keys that are no text, and values that are no settings, at any depth."""
    if isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"the key {key!r} is no text: put it into quotes")
            _check_plain(each)
    elif isinstance(value, list):
        for each in value:
            _check_plain(each)
    elif not isinstance(value, _PLAIN):
        raise ConfigError(f"{value!r} is no setting: give text, a number, true, false, null, a "
                          "list or a group")
