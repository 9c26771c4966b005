"""A rank that waits too long for the others ends itself, and says where it waited.

Horovod's own stall check shares the loop that blocks, so it cannot end a blocked rank. This
thread does: when one collective has been waited for longer than the limit, it prints the rank
and the collective on stderr and ends the process, whose exit makes the launcher end the rest.
The clock counts wakings of this thread, not wall time, so that a suspended machine does not trip
it when it wakes up.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import contextmanager
from typing import Iterator

DEFAULT_TIMEOUT_SECONDS = 1800.0


def timeout_from_environment() -> float:
    """Seconds from ``HVDNOISE_TIMEOUT`` (0 switches the watchdog off), 1800 where it is unset."""
    text = os.environ.get("HVDNOISE_TIMEOUT", "")
    try:
        return float(text) if text else DEFAULT_TIMEOUT_SECONDS
    except ValueError:
        raise ValueError(f"HVDNOISE_TIMEOUT={text!r} is not a number of seconds") from None


class Watchdog:
    """Ends the process when one wait outlasts ``timeout`` seconds; ``timeout=0`` never does."""

    def __init__(self, who: str, timeout: float) -> None:
        self.timeout = timeout
        self._who = who
        self._waiting: str | None = None
        self._waited = 0.0
        if timeout > 0:
            threading.Thread(target=self._watch, name="hvdnoise-watchdog", daemon=True).start()

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        self._waited, self._waiting = 0.0, what
        try:
            yield
        finally:
            self._waiting = None

    def _watch(self) -> None:
        tick = min(1.0, self.timeout / 4)
        while True:
            time.sleep(tick)
            what = self._waiting
            self._waited = self._waited + tick if what is not None else 0.0
            if what is not None and self._waited >= self.timeout:
                self._end(what)

    def _end(self, what: str) -> None:
        print(f"hvdnoise: {self._who} waited {self.timeout:g} s for {what!r}: another rank is "
              f"stalled, gone, or took another path; ending this rank (HVDNOISE_TIMEOUT sets the "
              f"limit)", file=sys.stderr, flush=True)
        os._exit(1)
