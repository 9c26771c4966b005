"""Points with two errors, and rows with intervals.

A method with a diverged run counts with the accuracy of chance. Where it would leave no room on the
axis for the others, its mark stands on the axis' edge, with its value in words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Sequence

import numpy as np
from matplotlib.transforms import ScaledTranslation

from hvdnoise.report import drawing
from hvdnoise.report.charts import Quantity, without
from hvdnoise.report.drawing import Drawing, Style
from hvdnoise.report.numbers import text
from hvdnoise.report.parts import NOT_RECORDED, Graphic, Table

_AT_THE_EDGE = (" A mark at the edge stands for a value off the axis, which is beside its name: a "
                "run diverged.")
_SIDE_BY_SIDE = " Markers on one band have the same cost, to 3%."
_SPREAD = 84.0  # points of 1/72 inch, of the markers at one place
_PLACES = 4  # at most, for markers to stand side by side
_SAME = 0.03  # costs that differ by less than this share are drawn side by side


@dataclass(frozen=True)
class Point:
    """A value with its error, NaN where there is none, at a place that may have one too.

    Args:
        lost: a diverged run is in it: it may lie beyond the axis, which is then said.
    """

    label: str
    style: Style
    x: float
    y: float
    x_error: float = math.nan
    y_error: float = math.nan
    lost: bool = False


@dataclass(frozen=True)
class Row:
    """A value with the ends of its interval, NaN where there is none; ``lost`` as in `Point`."""

    label: str
    colour: str
    value: float
    low: float = math.nan
    high: float = math.nan
    lost: bool = False


def _focus(found: Sequence[tuple[float, float, float, bool]]) -> tuple[float, float] | None:
    """The axis for (value, low, high, lost), where a lost one would leave no room for the others.

    None where all fit.
    """
    kept = np.array([each[:3] for each in found if not each[3]], dtype=float)
    values = np.array([each[0] for each in found if each[3]], dtype=float)
    if len(kept) < 2 or not len(values):
        return None
    low, high = float(np.nanmin(kept)), float(np.nanmax(kept))
    side = 2 * (high - low)
    if high <= low or values.min() >= low - side and values.max() <= high + side:
        return None
    return low - 0.08 * (high - low), high + 0.08 * (high - low)


def points(key: str, title: str, caption: str, found: Sequence[Point], *, x: Quantity, y: Quantity,
           joined: bool = False, ticks: Sequence[float] = ()) -> Graphic | str:
    """Markers with error bars; with ``joined`` a line through those of one label, without it those
    at the same place side by side."""
    kept = [each for each in found if math.isfinite(each.x) and math.isfinite(each.y)]
    if not kept:
        return title + NOT_RECORDED
    shown = kept if joined else _at_few_places(kept)
    groups: dict[str, list[Point]] = {}
    for each in shown:
        groups.setdefault(each.label, []).append(each)
    focus = _focus([(each.y, *_ends(each.y, each.y_error), each.lost) for each in kept])
    names = {label: _beyond(label, group, focus, y) for label, group in groups.items()}
    drawn = Drawing(labels=list(names.values()))
    x.apply(drawn.axes, "x", [each.x * x.scale for each in shown])
    shifts = {} if joined else _side_by_side(drawn.axes, groups, x)
    for label, group in groups.items():
        _marks(drawn.axes, group, names[label], focus, x, y, joined, shifts.get(label, 0.0))
    if shifts:
        caption += _SIDE_BY_SIDE
        drawing.roomy(drawn.axes, [each.x * x.scale for each in shown])
    y.apply(drawn.axes, "y", [each.y * y.scale for each in kept])
    if focus:
        caption += _AT_THE_EDGE
        drawn.axes.set_ylim(focus[0] * y.scale, focus[1] * y.scale)
    if ticks:
        drawn.axes.set_xticks(ticks, [text(tick) for tick in ticks])
        drawn.axes.tick_params(axis="x", which="minor", length=0, labelbottom=False)
    rows = [[each.label, text(each.x * x.scale), text(each.x_error * x.scale, 2),
             text(each.y * y.scale), text(each.y_error * y.scale, 2)] for each in kept]
    return drawn.finish(key, title, without(caption, found, kept), Table(
        f"{title}: the numbers", ["series", x.label, "its error", y.label, "its error"], rows))


def _at_few_places(found: Sequence[Point]) -> list[Point]:
    """The points, those of nearly one place at one, where there are few places in all."""
    places: list[float] = []
    moved = []
    for each in found:
        near = (place for place in places if math.isclose(place, each.x, rel_tol=_SAME))
        moved.append(replace(each, x=next(near, each.x)))
        places += [each.x] * (moved[-1].x not in places)
    return moved if len(places) <= _PLACES else list(found)


def _side_by_side(axes: Any, groups: dict[str, list[Point]], x: Quantity) -> dict[str, float]:
    """How far to the right each series is drawn, in points of 1/72 inch.

    Where all are at a few places, those at one can so be told apart. A band joins them, and has the
    only tick of the place.
    """
    places: dict[float, list[str]] = {}
    for label, group in groups.items():
        for each in group:
            places.setdefault(each.x, []).append(label)
    if len(places) > _PLACES or all(len(labels) == 1 for labels in places.values()):
        return {}
    room = min(_SPREAD, drawing.least_distance(axes, [place * x.scale for place in places]) - 18)
    shifts = {}
    for place, labels in places.items():
        step = min(12.0, max(0.0, room) / max(1, len(labels) - 1))
        shifts.update({label: step * (number - (len(labels) - 1) / 2)
                       for number, label in enumerate(labels) if len(groups[label]) == 1})
        if len(labels) > 1:
            axes.axvline(place * x.scale, color=drawing.LIGHT["grid"], alpha=0.45, zorder=0,
                         linewidth=step * (len(labels) - 1) + 14)
    drawing.only_ticks(axes, [float(f"{place * x.scale:.3g}") for place in places])
    return shifts


def _ends(value: float, error: float) -> tuple[float, float]:
    error = 0.0 if math.isnan(error) else error
    return value - error, value + error


def _beyond(label: str, group: Sequence[Point], focus: tuple[float, float] | None, y: Quantity
            ) -> str:
    """The label; with the values that have no place on the axis."""
    out = [text(each.y * y.scale) for each in group
           if focus and not focus[0] <= each.y <= focus[1]]
    return f"{label} (off the axis: {', '.join(out)})" if out else label


def _marks(axes: Any, group: list[Point], label: str, focus: tuple[float, float] | None,
           x: Quantity, y: Quantity, joined: bool, shift: float) -> None:
    """The points of one series; those beyond the axis stand on its edge without bars."""
    beside = ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    group.sort(key=lambda each: each.x)
    look = {"color": group[0].style.colour, "marker": group[0].style.marker, "markersize": 7,
            "linestyle": group[0].style.dash if joined else "none"}
    axes.plot([], [], label=drawing.short(label), **look)
    kept = [each for each in group if not focus or focus[0] <= each.y <= focus[1]]
    if kept:
        columns = np.array([[each.x, each.y, each.x_error, each.y_error] for each in kept]).T
        at, value, at_error, error = columns * np.array([[x.scale], [y.scale]] * 2)
        line, caps, bars = axes.errorbar(at, value, xerr=_bar(at_error), yerr=_bar(error),
                                         capsize=2.5, elinewidth=1.1, **look)
        for part in (line, *caps, *bars):  # afterwards: the axes' limits are those of the data
            part.set_transform(axes.transData + beside)
    for each in group:
        if each not in kept and focus:
            axes.plot([each.x * x.scale], [0.0 if each.y < focus[0] else 1.0],
                      transform=axes.get_xaxis_transform() + beside, clip_on=False, **look)


def _bar(errors: Any) -> Any:
    return np.nan_to_num(errors) if np.isfinite(errors).any() else None


def rows(key: str, title: str, caption: str, found: Sequence[Row], *, x: Quantity,
         zero: bool = False) -> Graphic | str:
    """A line for each, with its name at the left and an interval around the value."""
    kept = [each for each in found if math.isfinite(each.value)]
    if not kept:
        return title + NOT_RECORDED
    focus = _focus([(each.value, each.low, each.high, each.lost) for each in kept])
    names = [drawing.short(each.label, 26) for each in kept]
    lines = sum(1 + name.count("\n") for name in names)
    drawn = Drawing(height=0.75 + 0.2 * lines + 0.06 * len(kept))
    axes = drawn.axes
    for place, each in enumerate(kept):
        if _interval(axes, place, each, focus, x):
            names[place] += f" ({text(each.value * x.scale, 3)})"
    if zero:
        axes.axvline(0, color=drawing.LIGHT["muted"], linewidth=1.2)
    axes.set_yticks(range(len(kept)), names)
    axes.set_ylim(len(kept) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    x.apply(axes, "x", [value * x.scale for each in kept
                        for value in (each.value, each.low, each.high)])
    if focus:
        caption += _AT_THE_EDGE
        axes.set_xlim(focus[0] * x.scale, focus[1] * x.scale)
    table = Table(f"{title}: the numbers", ["row", x.label, "low", "high"],
                  [[each.label, *(text(value * x.scale) for value in
                                  (each.value, each.low, each.high))] for each in kept])
    return drawn.finish(key, title, without(caption, found, kept), table)


def _interval(axes: Any, place: int, each: Row, focus: tuple[float, float] | None, x: Quantity
              ) -> bool:
    """Draw a row; whether its value has no place on the axis."""
    if focus and not focus[0] <= each.value <= focus[1]:
        below = each.value < focus[0]
        axes.plot([0.0 if below else 1.0], [place], marker="<" if below else ">", markersize=8,
                  color=each.colour, transform=axes.get_yaxis_transform(), clip_on=False)
        return True
    low, high = (value if math.isfinite(value) else each.value for value in (each.low, each.high))
    axes.errorbar([each.value * x.scale], [place], capsize=2.5, marker="o", markersize=6,
                  xerr=[[max(0.0, each.value - low) * x.scale],
                        [max(0.0, high - each.value) * x.scale]],
                  color=each.colour, elinewidth=1.4)
    return False
