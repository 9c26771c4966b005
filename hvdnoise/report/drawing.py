"""Figures in SVG and PNG that have the same lines, in colours that the page decides.

matplotlib draws with the light colours. Each of them is a different one, so that in the SVG each is
replaced by a custom property (``var(--series-1)``), which has another value in the dark. Text stays
text: the layout is made for DejaVu Sans, which is wider than the fonts that the page asks for.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from dataclasses import dataclass
from typing import Any, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from hvdnoise.report.parts import Graphic, Table

# Okabe and Ito's hues, each dark enough for lines on white and light enough for lines on black.
LIGHT = {"page": "#fefefe", "text": "#1c1d21", "muted": "#5b606b", "grid": "#d9dce2",
         "series-0": "#26272b", "series-1": "#0072b2", "series-2": "#c85100", "series-3": "#00805f",
         "series-4": "#b3478d", "series-5": "#8c6a00", "series-6": "#4a55b5", "series-7": "#83442a"}
DARK = {"page": "#15171c", "text": "#e9eaed", "muted": "#a9aeb9", "grid": "#383c45",
        "series-0": "#f2f2f4", "series-1": "#5cb8ee", "series-2": "#ff9350", "series-3": "#35cd9f",
        "series-4": "#eb9bd0", "series-5": "#e8c53a", "series-6": "#a9b2ff", "series-7": "#dda889"}
FONTS = ('system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", '
         "sans-serif")
_MARKERS = "osD^vPX<>*hp"
_DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
WIDTH = 4.7  # inches of 72 units
_ROOM = 0.3  # of the span of the values, at both ends of an axis
_STYLE: Any = {"svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9.5,
               "axes.edgecolor": LIGHT["muted"], "axes.labelcolor": LIGHT["text"],
               "text.color": LIGHT["text"], "xtick.color": LIGHT["muted"],
               "ytick.color": LIGHT["muted"], "xtick.labelcolor": LIGHT["text"],
               "ytick.labelcolor": LIGHT["text"], "grid.color": LIGHT["grid"],
               "grid.linewidth": 0.7,
               "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
               "axes.spines.right": False, "figure.facecolor": LIGHT["page"],
               "axes.facecolor": LIGHT["page"], "legend.frameon": False, "lines.linewidth": 1.6,
               "lines.markersize": 5.5, "axes.unicode_minus": True, "path.simplify_threshold": 0.3}


@dataclass(frozen=True)
class Style:
    """How a series looks: told apart by its marker and dashes too."""

    colour: str
    marker: str
    dash: Any

    def line(self, count: int) -> dict[str, Any]:
        """For a line of so many points: at most eight of them have a marker."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dash,
                "markevery": max(1, math.ceil(count / 8))}


def style(colour: int, shape: int | None = None) -> Style:
    """The ``colour``-th of the series (0 is the baseline's), with a marker by ``shape``."""
    shape = colour if shape is None else shape
    hue = 0 if colour == 0 else 1 + (colour - 1) % 7
    return Style(LIGHT[f"series-{hue}"], _MARKERS[shape % len(_MARKERS)],
                 _DASHES[(shape + shape // len(_DASHES)) % len(_DASHES)])


def short(name: str, width: int = 44) -> str:
    """A label of at most two lines of ``width``; the middle of a longer one is left out.

    No part of it is a formula, and it is shown also where it begins with "_".
    """
    name = " ".join(name.split())
    if len(name) > 2 * width - 4:
        name = f"{name[:width - 3]} … {name[len(name) - width + 6:]}"
    lines = textwrap.wrap(name, width)[:2] or ["unnamed"]
    return " " * lines[0].startswith("_") + "\n".join(lines).replace("$", r"\$")


class Drawing:
    """A figure with panels and a legend below them.

    Args:
        height: of the panels together, in inches.
        labels: of the legend, to make room for them; the first panel has them, each by `short`.
    """

    def __init__(self, *, height: float = 3.1, labels: Sequence[str] = (), rows: int = 1,
                 columns: int = 1, share_y: bool = False) -> None:
        longest = max((len(line) for each in labels for line in short(each).split("\n")), default=0)
        self._columns = 3 if longest <= 11 else 2 if longest <= 21 else 1
        lines = sum(1 + short(each).count("\n") for each in labels) / self._columns
        self._legend = len(labels) > 0
        with matplotlib.rc_context(_STYLE):
            self.figure: Any = Figure(
                figsize=(WIDTH, height + (0.22 * math.ceil(lines) + 0.1) * self._legend),
                layout="constrained")
            self.panels: list[Any] = self.figure.subplots(
                rows, columns, squeeze=False, sharey=share_y).ravel().tolist()
        self.axes = self.panels[0]

    def finish(self, key: str, title: str, caption: str, table: Table) -> Graphic:
        """The figure in all its forms."""
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
            if self._legend:
                handles, labels = self.axes.get_legend_handles_labels()
                self.figure.legend(
                    handles, labels, loc="outside lower left", ncols=self._columns, fontsize=9,
                    handlelength=2.6, columnspacing=1.4, labelspacing=0.4)
            png, svg = io.BytesIO(), io.StringIO()
            canvas: Any = FigureCanvasSVG(self.figure)  # savefig would draw each twice
            self.figure.dpi = 72
            self.figure.get_layout_engine().execute(self.figure)
            self.figure.set_layout_engine("none")
            canvas.print_svg(svg, metadata={"Date": None})
            canvas = FigureCanvasAgg(self.figure)
            self.figure.dpi = 192
            canvas.print_png(png)
        inline = _clean(svg.getvalue(), key, title, caption)
        return Graphic(key, title, caption, table, inline, _standalone(inline), png.getvalue())


def _clean(svg: str, key: str, title: str, caption: str) -> str:
    """For use within a page: no prolog, no ids but its own, the page's colours and fonts."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", _rounded, tag[0]), svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    start = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
             f'viewBox="{box[1]}" role="img" aria-labelledby="{key}-t {key}-d">'
             f'<title id="{key}-t">{html.escape(title)}</title>'
             f'<desc id="{key}-d">{html.escape(caption)}</desc>')
    return start + svg[svg.index(">") + 1:]


def _rounded(found: re.Match[str]) -> str:
    """A coordinate; only within tags, as the numbers that a reader sees stay as they are."""
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def properties(colours: dict[str, str]) -> str:
    """The colours as custom properties of CSS."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _standalone(inline: str) -> str:
    """With a background of its own, so that it reads on a light page and on a dark one."""
    css = (f"<style>svg {{ {properties(LIGHT)} font-family: {FONTS}; }} "
           f"@media (prefers-color-scheme: dark) {{ svg {{ {properties(DARK)} }} }}</style>")
    end = inline.index("</desc>") + len("</desc>")
    width, height = (float(each) for each in inline.split('viewBox="')[1].split('"')[0].split()[2:])
    sized = inline[:end].replace("<svg ", f'<svg width="{width * 1.5:.0f}" '
                                 f'height="{height * 1.5:.0f}" ', 1)
    return sized + css + inline[end:]


# ---------------------------------------------------------------------- axes


def spans(values: Any) -> float:
    """Largest by smallest of positive values; 1 where some are not positive, or there are none."""
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found)]
    return float(found.max() / found.min()) if len(found) and found.min() > 0 else 1.0


def plain(axis: Any) -> None:
    """Ticks of a linear axis, few and without an offset."""
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.5g}".replace("-", "−")))


def logarithmic(axes: Any, which: str, values: Any) -> None:
    """A log axis where the values span enough for one, with ticks that are numbers in full."""
    axis = getattr(axes, f"{which}axis")
    if spans(values) < 6:
        return plain(axis)
    getattr(axes, f"set_{which}scale")("log")
    decades = math.log10(spans(values))
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 3.0), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def counted(axes: Any, which: str, values: Any, unit: str = "") -> None:
    """A log or linear axis of counts or bytes: 20k, 1.5G."""
    logarithmic(axes, which, values)
    getattr(axes, f"{which}axis").set_major_formatter(EngFormatter(unit=unit, sep=""))


def wide(axes: Any, which: str, values: Any) -> None:
    """Give a constant its room, so that ticks do not show differences that are not there."""
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found)]
    if len(found) and np.ptp(found) <= 1e-6 * max(1e-30, float(np.abs(found).max())):
        middle = float(found.mean())
        side = abs(middle) * 0.1 or 1.0
        getattr(axes, f"set_{which}lim")(middle - side, middle + side)


def roomy(axes: Any, values: Any) -> None:
    """Room at both ends of the horizontal axis for what is drawn beside its place.

    A constant has it by `wide`.
    """
    transform = axes.xaxis.get_transform()
    low, high = transform.transform(np.array([min(values), max(values)], dtype=float))
    side = _ROOM * (high - low)
    if side > 0:
        axes.set_xlim(*transform.inverted().transform(np.array([low - side, high + side])))


def least_distance(axes: Any, values: Any) -> float:
    """Between any two of the places on a `roomy` horizontal axis, in points of 1/72 inch."""
    found = np.sort(axes.xaxis.get_transform().transform(np.array(values, dtype=float)))
    if len(found) < 2:
        return math.inf
    return float(np.diff(found).min() / np.ptp(found) / (1 + 2 * _ROOM) * 0.8 * 72 * WIDTH)


def only_ticks(axes: Any, places: Sequence[float]) -> None:
    """Ticks of the horizontal axis here and nowhere else, and no lines."""
    axes.set_xticks(places)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", visible=False)
