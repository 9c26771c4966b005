"""A data set of the user's own, which the function that ``data.dataset`` names returns.

The function is called with the folder ``data.root`` and returns a dict: ``train`` and ``test``,
each a pair of tensors or a map-style data set of pairs; ``classes``; and, if wanted, ``mean`` and
``std``. See docs/own.md. What it returns is looked at here, once a process; the examples are those
of `hvdnoise.training.own_images`. Torch is not imported before the function is called.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdnoise.training import plugins
from hvdnoise.training.datasets import DataRecord
from hvdnoise.training.errors import DataError

if TYPE_CHECKING:
    from hvdnoise.training.dataspec import DataConfig
    from hvdnoise.training.images import Images
    from hvdnoise.training.own_images import Part, Sets

_KEYS = ("train", "test", "classes", "mean", "std")
_NEEDED = _KEYS[:3]


@dataclass(frozen=True, kw_only=True)
class OwnData(DataRecord):
    """The data set of a function of the user's; all facts are known once it was called."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    side: int = 0
    counted: bool = True
    own: bool = True

    def shape(self, config: DataConfig) -> tuple[int, ...]:
        return _sets(self.name, config.path).train.shape

    def dtype(self, config: DataConfig) -> str:
        return _sets(self.name, config.path).train.fed_as

    def count(self, config: DataConfig) -> tuple[int, int]:
        found = _sets(self.name, config.path)
        return len(found.train.labels), found.classes

    def prepare(self, config: DataConfig) -> None:
        """Call the function, first in one process of each host, so that it may fetch files."""
        _sets(self.name, config.path)

    def load(self, config: DataConfig, seed: int, part: str) -> tuple[Images, int]:
        from hvdnoise.training.own_images import OwnImages
        found = _sets(self.name, config.path)
        images = OwnImages(found.train if part == "train" else found.test, mean=found.mean,
                           std=found.std, classes=found.classes, seed=seed,
                           draws_anew=part == "train" and config.augment)
        if config.loader_workers > 0:
            images.check_travels(config.loader_workers)
        return images, found.classes


@functools.lru_cache(maxsize=1)
def _sets(name: str, root: Path) -> Sets:
    """The data set of the function.

    Raises:
        DataError: one line that names the function and what is wrong.
    """
    from hvdnoise.training.own_images import Sets, own_part, without_chance
    function, say = plugins.function(name), f"data.dataset={name}"
    _check_takes(function, "data.root", (root,), say)
    try:
        with without_chance(0):
            found = function(root)
    except (Exception, SystemExit) as error:
        raise DataError(f"{say} raised {plugins.blame(error, function)}") from error
    values = _keys(found, say)
    classes = values["classes"]
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        raise DataError(f"{say}: classes is {classes!r}: give a whole number of at least 2")
    try:
        with without_chance(0):
            train, test = (own_part(values[part], f"{say}: {part}", plugins.code_of(name), classes)
                           for part in ("train", "test"))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{say}: its examples cannot be read: "
                        f"{plugins.blame(error, function)}") from error
    if (test.shape, test.fed_as) != (train.shape, train.fed_as):
        raise DataError(f"{say}: an example of test is {test.fed_as} {test.shape}, and one of "
                        f"train {train.fed_as} {train.shape}: give both the same shape and kind")
    mean, std = (_numbers(values.get(key), train, f"{say}: {key}") for key in ("mean", "std"))
    if std and min(std) <= 0:
        raise DataError(f"{say}: std is {list(std)}: give numbers above 0")
    return Sets(train, test, classes, mean or (0.0,), std or (1.0,))


def _check_takes(function: Any, what: str, arguments: tuple[Any, ...], say: str) -> None:
    """Raise a DataError where the function cannot be called so."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise DataError(f"{say} cannot be called with {what} ({error})") from error
    except ValueError:  # it has no signature that Python knows
        pass


def _keys(found: Any, say: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise DataError(f"{say} returned {kind_of(found)}: return a dict with "
                        f"{', '.join(_NEEDED)}, and mean and std if wanted")
    for key in found:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            raise DataError(f"{say} returned the unknown key {key!r}: " + (
                f"did you mean {near[0]}?" if near else f"it may have {', '.join(_KEYS)}"))
    missing = [key for key in _NEEDED if key not in found]
    if missing:
        raise DataError(f"{say} returned a dict without {' and '.join(missing)}: add "
                        f"{'it' if len(missing) == 1 else 'them'}")
    return found


def _numbers(value: Any, train: Part, say: str) -> tuple[float, ...]:
    """One number, or one for each channel (the first dimension); none where it is not given."""
    if value is None:
        return ()
    try:
        numbers = tuple(map(float, value)) if hasattr(value, "__len__") else (float(value),)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) not in (1, train.shape[0]) or not all(map(math.isfinite, numbers)):
        raise DataError(f"{say} is {' '.join(repr(value).split())}: give one number, or one for "
                        f"each of the {train.shape[0]} channels of an example {train.shape}")
    if train.fed_as != "float32":
        raise DataError(f"{say} is given, and examples are whole numbers ({train.fed_as}), which "
                        "go to the model as they are: leave it out, or give floats")
    return numbers


def kind_of(value: Any) -> str:
    """What a value is, for a message: ``None``, ``a dict``, ``an int``."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
