"""What a run says on the terminal while it runs.

Rank 0 speaks; the other ranks write to their log files only (see `hvdnoise.training.records`).
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

log = logging.getLogger("hvdnoise")


class _Terminal(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "terminal", True):  # said there already, in its own way
            return
        from tqdm import tqdm
        warning = record.levelno >= logging.WARNING
        tqdm.write(("warning: " if warning else "") + record.getMessage(),
                   file=sys.stderr if warning else sys.stdout)
        sys.stdout.flush()


def start_terminal(rank: int) -> None:
    """Rank 0's messages appear on its terminal, the other ranks' in their log files only."""
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(_Terminal() if rank == 0 else logging.NullHandler())


class Progress:
    """How far the run is: a bar with ETA, plain lines, or nothing (``style``)."""

    def __init__(self, style: str, *, rank: int, total: int, done: int, unit: str = "step"
                 ) -> None:
        if style == "auto":
            style = "bar" if sys.stderr.isatty() else "lines"
        self._unit = unit
        self.total, self._done, self._started, self._first = total, done, time.monotonic(), done
        self._lines = rank == 0 and style == "lines"
        self._bar: Any = None
        if rank == 0 and style == "bar":
            from tqdm import tqdm
            self._bar = tqdm(total=total, initial=done, unit=unit, mininterval=0.5,
                             dynamic_ncols=True)

    def step(self) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def show(self, text: str) -> None:
        """The newest numbers: beside the bar, or as a line."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._lines:
            filled = 20 * self._done // max(self.total, 1)
            log.info("[%s%s] %s %d/%d  %s  %s left", "#" * filled, "." * (20 - filled),
                     self._unit, self._done, self.total, text, self._left())

    def _left(self) -> str:
        spent, made = time.monotonic() - self._started, self._done - self._first
        seconds = round(spent / max(made, 1) * (self.total - self._done))
        return f"{seconds // 60}:{seconds % 60:02d}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
