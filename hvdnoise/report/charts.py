"""Axes, and curves over them.

A chart, here and in `marks` and `clouds`, returns a `Graphic`, or a sentence that says why there is
none: no figure is empty.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np

from hvdnoise.report import drawing
from hvdnoise.report.drawing import Drawing, Style
from hvdnoise.report.numbers import text, thin
from hvdnoise.report.parts import NOT_RECORDED, Graphic, Table

_SHOWN = 8  # places of a curve in its table


def without(caption: str, given: Sequence[Any], kept: Sequence[Any]) -> str:
    """The caption; with the names of what has no numbers."""
    names = {each.label for each in given} - {each.label for each in kept}
    named = [" ".join(drawing.short(each.label).split()) for each in given if each.label in names]
    return caption + f" Not drawn, as there are no numbers: {'; '.join(named)}." * bool(named)


@dataclass(frozen=True)
class Quantity:
    """What an axis shows.

    Args:
        label: with its unit.
        scale: factor from the records to the axis.
        log: a log axis, where the values span enough for one.
        unit: of counts with a prefix (k, M); None: plain numbers.
    """

    label: str
    scale: float = 1.0
    log: bool = False
    unit: str | None = None

    def apply(self, axes: Any, which: str, values: Any) -> None:
        """Set the label, the scale and the ticks of an axis for the values on it."""
        getattr(axes, f"set_{which}label")("\n".join(textwrap.wrap(self.label, 38)))
        if self.unit is not None:
            drawing.counted(axes, which, values, self.unit)
        elif self.log:
            drawing.logarithmic(axes, which, values)
        else:
            drawing.plain(getattr(axes, f"{which}axis"))
        drawing.wide(axes, which, values)


def accuracy(of: str) -> Quantity:
    """Of some images, in percent."""
    return Quantity(f"{of} accuracy (%)", 100)


EPOCH = Quantity("Epoch")
STEP = Quantity("Step")


@dataclass(frozen=True)
class Curve:
    """A line, its band where there is one, and how it looks."""

    label: str
    style: Style
    x: Any
    y: Any
    error: Any = None


def curves(key: str, title: str, caption: str, lines: Sequence[Curve], *, x: Quantity, y: Quantity
           ) -> Graphic | str:
    """Lines with bands of one error to both sides."""
    kept = [each for each in (_scaled(line, x, y) for line in lines)
            if np.isfinite(each.x * each.y).any()]
    if not kept:
        return title + NOT_RECORDED
    drawn = Drawing(labels=[each.label for each in kept] if len(kept) > 1 else ())
    for each in kept:
        alone = np.isfinite(each.y).sum() == 1
        drawn.axes.plot(each.x, each.y, label=drawing.short(each.label), markersize=4.5,
                        **each.style.line(1 if alone else len(each.x)))
        if each.error is not None and np.isfinite(each.error).any():
            drawn.axes.fill_between(each.x, each.y - each.error, each.y + each.error,
                                    color=each.style.colour, alpha=0.16, linewidth=0)
    x.apply(drawn.axes, "x", np.concatenate([each.x for each in kept]))
    y.apply(drawn.axes, "y", np.concatenate([each.y for each in kept]))
    return drawn.finish(key, title, without(caption, lines, kept),
                        _table_of_curves(title, kept, x, y))


def _scaled(line: Curve, x: Quantity, y: Quantity) -> Curve:
    columns = [np.asarray(line.x, float) * x.scale, np.asarray(line.y, float) * y.scale]
    if line.error is not None:
        columns.append(np.asarray(line.error, float) * y.scale)
    if y.log and len(columns[1]):  # a log axis has no place for it
        columns[1] = np.where(columns[1] > 0, columns[1], math.nan)
    places, values, *error = thin(*columns)
    return Curve(line.label, line.style, places, values, error[0] if error else None)


def _table_of_curves(title: str, lines: Sequence[Curve], x: Quantity, y: Quantity) -> Table:
    every = np.unique(np.concatenate([each.x[np.isfinite(each.x * each.y)] for each in lines]))
    places = every[np.linspace(0, len(every) - 1, min(_SHOWN, len(every))).round().astype(int)]
    rows = []
    for each in lines:
        ok = np.isfinite(each.x * each.y)
        found = np.interp(places, each.x[ok], each.y[ok], left=math.nan, right=math.nan)
        rows.append([each.label, *(text(float(value)) for value in found)])
    return Table(f"{title}: {y.label} at {x.label.lower()} …", ["series",
                 *(text(float(place)) for place in places)], rows)
