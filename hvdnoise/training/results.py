"""What the commands that measure have in common: a folder for results, JSON, tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Sequence

from hvdnoise.comm import World
from hvdnoise.training.config import ConfigError
from hvdnoise.training.together import call_or_raise


def make_folder(folder: Path | None, world: World) -> None:
    """Rank 0 makes it before the work, so that a wrong one costs nothing. Collective.

    Raises:
        ConfigError: on all ranks, where it cannot be made.
    """
    def make() -> None:
        if world.rank == 0 and folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"out={folder} cannot be made ({error}): give another one"
                                  ) from error
    call_or_raise(world, make)


def finite(value: Any) -> Any:
    """JSON has no infinity: what is no finite number is None, at any depth."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(cells: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """The lines of a table in Markdown that reads well on a terminal, the heads first.

    Args:
        left: so many columns are text, which goes to the left.
    """
    cells = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(
        cell.ljust(width) if column < left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths))) + " |" for line in cells]
    rule = "|".join("-" * (width + 2) if column < left else "-" * (width + 1) + ":"
                    for column, width in enumerate(widths))
    return [lines[0], f"|{rule}|", *lines[1:]]
