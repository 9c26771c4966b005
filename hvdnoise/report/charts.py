"""The kinds of figures: curves, points with two errors, and rows with intervals.

Each returns a `Graphic`, or a sentence that says why there is none: no figure is empty.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import numpy as np

from hvdnoise.report import drawing
from hvdnoise.report.drawing import Drawing, Style
from hvdnoise.report.numbers import text, thin
from hvdnoise.report.parts import NOT_RECORDED, Graphic, Table

_SHOWN = 8  # places of a curve in its table


def _without(caption: str, given: Sequence[Any], kept: Sequence[Any]) -> str:
    """The caption; with the names of what has no numbers."""
    names = {each.label for each in given} - {each.label for each in kept}
    named = [each.label for each in given if each.label in names]
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
    return drawn.finish(key, title, _without(caption, lines, kept),
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


def points(key: str, title: str, caption: str, found: Sequence[Point], *, x: Quantity, y: Quantity,
           joined: bool = False, ticks: Sequence[float] = ()) -> Graphic | str:
    """Markers with error bars; with ``joined`` a line through those of one label."""
    kept = [each for each in found if math.isfinite(each.x) and math.isfinite(each.y)]
    if not kept:
        return title + NOT_RECORDED
    groups: dict[str, list[Point]] = {}
    for each in kept:
        groups.setdefault(each.label, []).append(each)
    focus = _focus([(each.y, *_ends(each.y, each.y_error), each.lost) for each in kept])
    names = {label: _beyond(label, group, focus, y) for label, group in groups.items()}
    drawn = Drawing(labels=list(names.values()))
    for label, group in groups.items():
        _marks(drawn.axes, group, names[label], focus, x, y, joined)
    x.apply(drawn.axes, "x", [each.x * x.scale for each in kept])
    y.apply(drawn.axes, "y", [each.y * y.scale for each in kept])
    if focus:
        drawn.axes.set_ylim(focus[0] * y.scale, focus[1] * y.scale)
    if ticks:
        drawn.axes.set_xticks(ticks, [text(tick) for tick in ticks])
        drawn.axes.tick_params(axis="x", which="minor", length=0, labelbottom=False)
    rows = [[each.label, text(each.x * x.scale), text(each.x_error * x.scale, 2),
             text(each.y * y.scale), text(each.y_error * y.scale, 2)] for each in kept]
    return drawn.finish(key, title, _without(caption, found, kept), Table(
        f"{title}: the numbers", ["series", x.label, "its error", y.label, "its error"], rows))


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
           x: Quantity, y: Quantity, joined: bool) -> None:
    """The points of one series; those beyond the axis stand on its edge without bars."""
    group.sort(key=lambda each: each.x)
    look = {"color": group[0].style.colour, "marker": group[0].style.marker, "markersize": 7,
            "linestyle": group[0].style.dash if joined else "none"}
    axes.plot([], [], label=drawing.short(label), **look)
    kept = [each for each in group if not focus or focus[0] <= each.y <= focus[1]]
    if kept:
        columns = np.array([[each.x, each.y, each.x_error, each.y_error] for each in kept]).T
        at, value, at_error, error = columns * np.array([[x.scale], [y.scale]] * 2)
        axes.errorbar(at, value, xerr=_bar(at_error), yerr=_bar(error), capsize=2.5,
                      elinewidth=1.1, **look)
    for each in group:
        if each not in kept and focus:
            axes.plot([each.x * x.scale], [0.0 if each.y < focus[0] else 1.0],
                      transform=axes.get_xaxis_transform(), clip_on=False, **look)


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
        axes.set_xlim(focus[0] * x.scale, focus[1] * x.scale)
    table = Table(f"{title}: the numbers", ["row", x.label, "low", "high"],
                  [[each.label, *(text(value * x.scale) for value in
                                  (each.value, each.low, each.high))] for each in kept])
    return drawn.finish(key, title, _without(caption, found, kept), table)


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


@dataclass(frozen=True)
class Cloud:
    """Trials of one method: places (numbers or choices), scores, which is chosen."""

    label: str
    places: Sequence[Any]
    scores: Sequence[float]
    chosen: Sequence[Any]
    log: bool


_PANELS = 8  # in a figure


def clouds(key: str, title: str, caption: str, found: Sequence[Cloud], *, x: str, y: Quantity
           ) -> list[Graphic | str]:
    """A panel for each cloud, eight in a figure; the scores have one scale in all of them."""
    kept = [each for each in found if np.isfinite(np.array(each.scores, float)).any()]
    if not kept:
        return [f"{title}: no trial has ended with a score."]
    parts = [kept[start:start + _PANELS] for start in range(0, len(kept), _PANELS)]
    made: list[Graphic | str] = []
    for place, part in enumerate(parts):
        several = f" ({place + 1} of {len(parts)})" if len(parts) > 1 else ""
        columns = 1 if len(part) == 1 else 2
        lines = math.ceil(len(part) / columns)
        drawn = Drawing(rows=lines, columns=columns, height=0.3 + 1.75 * lines, share_y=True)
        for panel, each in zip(drawn.panels, part):
            _cloud(panel, each, y)
        for panel in drawn.panels[len(part):]:
            panel.remove()
        drawn.figure.supxlabel(x.replace("$", r"\$"), fontsize=9.5)
        drawn.figure.supylabel(y.label, fontsize=9.5)
        table = Table(f"{title}{several}: the trials", ["method", x, y.label, "chosen"],
                      [[each.label, text(where), text(score * y.scale),
                        "yes" if where in each.chosen else ""]
                       for each in part for where, score in zip(each.places, each.scores)], left=2)
        made.append(drawn.finish(f"{key}-{place + 1}" if several else key, title + several, caption,
                                 table))
    return made


def _cloud(axes: Any, each: Cloud, y: Quantity) -> None:
    numeric = all(isinstance(place, (int, float)) and not isinstance(place, bool)
                  for place in each.places)
    names = sorted({text(place) for place in [*each.places, *each.chosen]})
    where: Callable[[Any], float] = float if numeric else lambda place: names.index(text(place))
    at = np.array([where(place) for place in each.places])
    scores = np.array(each.scores, float) * y.scale
    lost = ~np.isfinite(scores)
    for place in {where(chosen) for chosen in each.chosen}:
        axes.axvline(place, color=drawing.LIGHT["series-2"], linewidth=1.4, linestyle=(0, (5, 1.5)))
    axes.plot(at[~lost], scores[~lost], "o", color=drawing.LIGHT["series-1"], markersize=4.5)
    if lost.any():
        axes.plot(at[lost], np.zeros(lost.sum()), "x", color=drawing.LIGHT["series-2"],
                  markersize=5.5, transform=axes.get_xaxis_transform(), clip_on=False)
    if not numeric:
        axes.set_xticks(range(len(names)), [drawing.short(name, 14) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif each.log:
        drawing.logarithmic(axes, "x", at)
    else:
        drawing.plain(axes.xaxis)
    if numeric:
        drawing.wide(axes, "x", at)
    drawing.plain(axes.yaxis)
    axes.tick_params(labelsize=8)
    axes.set_title(drawing.short(each.label, 26), fontsize=8.5, loc="left")
