"""Small panels: the trials of each method against a setting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import numpy as np

from hvdnoise.report import drawing
from hvdnoise.report.charts import Quantity
from hvdnoise.report.drawing import Drawing
from hvdnoise.report.numbers import text
from hvdnoise.report.parts import Graphic, Table


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
