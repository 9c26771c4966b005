"""The points of a search: quasi-random, the same for all methods, nested in their number.

Trial t of every method is point t of one Halton sequence. Its first dimension is the learning
rate's, so methods with the same range are tried at the same learning rates, and a method without
further settings at no fewer. A larger budget keeps the points of a smaller one. Nothing depends on
the order in which runs end, so that they can be done in parallel, and again after a kill, without a
store. Quasi-random points find better settings than as many of a grid or random ones: Bousquet et
al. 2017, arXiv:1706.03200; Bergstra & Bengio 2012, JMLR 13:281.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Iterator, Mapping

from scipy.stats import qmc

from hvdnoise.training.config import ConfigError
from hvdnoise.training.validation import require

LEARNING_RATE = "optim.lr"
_DIGITS = 4  # significant, of a tried value
_PATIENCE = 64  # points per combination of lists, until those that are missing are appended


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, evenly spread, or their logarithms (``log``)."""

    low: float
    high: float
    log: bool = False

    def at(self, unit: float) -> float:
        """The value at ``unit``, 0 .. 1, to four significant digits."""
        if self.log:
            value = math.exp((1 - unit) * math.log(self.low) + unit * math.log(self.high))
        else:
            value = self.low + unit * (self.high - self.low)
        return float(f"{value:.{_DIGITS}g}")

    def as_json(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "log": self.log}


Axis = Range | list[Any]
Point = dict[str, Any]


def read(search: Mapping[str, Any]) -> dict[str, Axis]:
    """The axes by the settings' names, the learning rate first; the file's order is no matter.

    Raises:
        ConfigError: for what is neither a range nor a list.
    """
    axes = {name: _axis(name, value) for name, value in search.items()}
    return {name: axes[name] for name in sorted(axes, key=lambda it: (it != LEARNING_RATE, it))}


def _axis(name: str, value: Any) -> Axis:
    if isinstance(value, list):
        require(bool(value), f"search.{name}", value, "give one choice or more")
        require(all(not isinstance(each, (list, dict)) for each in value), f"search.{name}", value,
                "a choice is one value")
        require(all(value.index(each) == i for i, each in enumerate(value)), f"search.{name}",
                value, "a choice is there twice")
        return list(value)
    if not isinstance(value, dict) or not {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
        raise ConfigError(f"search.{name}={value} is wrong: give {{low: ..., high: ..., log: "
                          "true} or a list of choices")
    low, high, log = value["low"], value["high"], value.get("log", False)
    for each in (low, high):
        require(isinstance(each, (int, float)) and not isinstance(each, bool)
                and math.isfinite(each), f"search.{name}", value, "low and high must be numbers")
    require(low < high, f"search.{name}", value, "low must be less than high; one value is a list")
    require(isinstance(log, bool), f"search.{name}", value, "log must be true or false")
    require(not log or low > 0, f"search.{name}", value, "log needs low above 0")
    return Range(float(low), float(high), log)


def combinations(axes: Mapping[str, Axis]) -> int | None:
    """How many points there are; None for infinitely many."""
    if any(isinstance(axis, Range) for axis in axes.values()):
        return None
    return math.prod(len(axis) for axis in axes.values() if isinstance(axis, list))


def points(axes: Mapping[str, Axis], count: int) -> list[Point]:
    """The first ``count`` points, or as many as there are; none is there twice."""
    found: list[Point] = []
    for point in _all_points(axes):
        if point not in found:
            found.append(point)
        if len(found) == count:
            break
    return found


def _all_points(axes: Mapping[str, Axis]) -> Iterator[Point]:
    limit = combinations(axes)
    if not axes:
        yield {}
        return
    # not scrambled: the points depend on no generator and no version, and lie inside the ranges
    sequence = qmc.Halton(len(axes), scramble=False).fast_forward(1)
    for _ in itertools.count() if limit is None else range(_PATIENCE * limit):
        units = sequence.random(1)[0]
        yield {name: axis.at(float(unit)) if isinstance(axis, Range)
               else axis[int(unit * len(axis))]
               for unit, (name, axis) in zip(units, axes.items())}
    names = list(axes)
    for values in itertools.product(*(axis for axis in axes.values() if isinstance(axis, list))):
        yield dict(zip(names, values))


def edges(axes: Mapping[str, Axis], tried: list[Point], chosen: Point) -> list[str]:
    """The settings whose chosen value is the smallest or the largest of all that were tried.

    Where there are several numbers: for words nothing lies beyond, and one value is no search.
    """
    found = []
    for name, axis in axes.items():
        values = [point[name] for point in tried] if isinstance(axis, Range) else axis
        numbers = {value for value in values
                   if isinstance(value, (int, float)) and not isinstance(value, bool)}
        if len(numbers) > 1 and chosen[name] in (min(numbers), max(numbers)):
            found.append(name)
    return found


def as_json(axes: Mapping[str, Axis]) -> dict[str, Any]:
    """As results.json has it."""
    return {name: axis.as_json() if isinstance(axis, Range) else axis
            for name, axis in axes.items()}
