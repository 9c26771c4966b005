"""The page: one HTML file that asks for nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from jinja2 import Environment, FileSystemLoader, select_autoescape

from hvdnoise.report.drawing import DARK, FONTS, LIGHT, properties
from hvdnoise.report.numbers import POINTS
from hvdnoise.report.parts import Section


def render(title: str, sections: Sequence[Section], sources: str) -> str:
    """The HTML; all words in it are escaped, as the names of runs may hold anything."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True,
                              autoescape=select_autoescape(["html", "j2"]))
    environment.filters.pop("urlize")  # no name becomes a link
    css = environment.from_string((Path(__file__).parent / "page.css").read_text())
    from markupsafe import Markup
    return environment.get_template("page.html.j2").render(
        title=title, sections=sections, sources=sources, points=POINTS,
        light=Markup(properties(LIGHT)), dark=Markup(properties(DARK)),
        css=Markup(css.render(fonts=Markup(FONTS))))
