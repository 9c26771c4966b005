"""What a page is made of; `page` writes it as HTML, `beside` as Markdown and CSV."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Sequence, Union

NOT_RECORDED = ": not recorded"  # the end of a sentence that `Part.left_out` joins with others


@dataclass(frozen=True)
class Table:
    """Words and numbers, ready to show.

    Args:
        left: so many columns are text; the first one names the row.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclass(frozen=True)
class Graphic:
    """A figure, its numbers, and its words.

    Args:
        key: name of its files, unlike all others of the page.
        caption: what is drawn, and how bands and bars are computed.
        inline: SVG whose colours are the page's.
        standalone: the same as a file, with colours and a background of its own.
        png: the light colours at 2x.
    """

    key: str
    title: str
    caption: str
    table: Table
    inline: str
    standalone: str
    png: bytes


Item = Union[Table, Graphic]


@dataclass
class Part:
    """A heading and what is below it.

    Args:
        missing: what is left out, and why, a sentence each.
    """

    title: str
    items: list[Item] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> list[str]:
        """``missing``, where one sentence names all that is not recorded."""
        names = [each.removesuffix(NOT_RECORDED) for each in self.missing
                 if each.endswith(NOT_RECORDED)]
        others = [each for each in self.missing if not each.endswith(NOT_RECORDED)]
        joined = f"Not drawn, as there are no numbers of it: {'; '.join(names)}."
        return others + [joined] * bool(names)

    def add(self, found: Item | str) -> None:
        """An item, or the sentence that says why there is none."""
        if isinstance(found, str):
            self.missing.append(found)
        else:
            self.items.append(found)


@dataclass
class Section:
    """A run, a study or a comparison of runs.

    Args:
        headline: in a sentence or two.
        notices: what a reader must know first: still running, diverged, not readable.
    """

    key: str
    title: str
    headline: str
    notices: list[str]
    parts: list[Part]
