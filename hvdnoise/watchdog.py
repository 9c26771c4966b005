"""A rank that stands still for too long, or whose launcher is gone, ends itself and says why.

Horovod's own stall check shares the loop that blocks, so it cannot end a blocked rank. A thread
does here: when nothing has gone on for longer than the limit of the phase (`hvdnoise.limits`), it
prints the stacks of all threads and a last line with the rank, the phase, the collective and what
is known of the other ranks (`hvdnoise.peers`). Then it ends the process, and the launcher the rest.
The clock counts wakings of this thread, not wall time, so that a machine or a job that was
suspended does not trip it when it wakes up.

It also looks after the launcher (`hvdnoise.ancestors`): once that is gone, this rank asks for a
save, as SIGTERM does, and ends after `ORPHAN_SECONDS` at most.

There is one watchdog a process. The commands begin it before the ranks start and tell it each
phase; a loop of the user's own has it from `hvdnoise.init` or the first `DistributedOptimizer` on,
where it knows nothing but the collectives that are waited for.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

from hvdnoise import ancestors, limits
from hvdnoise.ending import EXIT_CODE, end_within, stacks
from hvdnoise.limits import Limits
from hvdnoise.peers import FOLLOWS, Peers

ORPHAN_SECONDS = 20.0  # to save and end in, once the launcher is gone
_ORPHAN_LAST_WORDS_SECONDS = 5.0
_LAST_WORDS_SECONDS = 10.0  # for what a full pipe or a lost file system may block


class Position(NamedTuple):
    """Where a rank stands. Each progress makes a new one: the watchdog knows it by identity."""

    phase: str = ""  # none: whatever the program does, only waits are limited
    step: int | None = None
    waits: str = ""  # the collective, if any

    def text(self) -> str:
        """The phase in words."""
        if self.phase == "step":
            return f"in step {self.step}"
        at = f"in the {self.phase}" if self.phase else ""
        return f"{at} after step {self.step}" if at and self.step else at


class Watchdog:
    """Watches over this process from now on.

    Args:
        rank: this process's; size: how many there are.
        limits: in seconds.
    """

    def __init__(self, rank: int, size: int, limits: Limits) -> None:
        self.rank, self.limits = rank, limits
        self.log: Path | None = None  # gets the stacks, too
        self.ask: Callable[[], None] | None = None  # wishes for a save, as SIGTERM does
        self._at = Position()
        self.peers = Peers(rank, size, self._describe, limits.shortest)
        self._ancestors = ancestors.of_launch()
        threading.Thread(target=self._watch, name="hvdnoise-watchdog", daemon=True).start()

    # ------------------------------------------------------------------ progress

    def enter(self, phase: str, step: int | None = None) -> None:
        """A phase or the next step begins; "" is none, where only waits are limited."""
        self._at = Position(phase, step)

    def rest(self) -> None:
        """The ranks' work is done: nothing is limited but what is waited for."""
        self.enter("")
        self.peers.close()
        self.log = self.ask = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase within another."""
        before = self._at
        self._at = Position(name, before.step)
        try:
            yield
        except BaseException:  # of which the last words say where it happened
            if not before.phase:
                self._at = Position()
            raise
        self._at = Position(*before)

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """A collective is waited for."""
        before = self._at
        self._at = Position(before.phase, before.step, what)
        try:
            yield
        finally:
            self._at = Position(before.phase, before.step)

    @property
    def ends(self) -> bool:
        """Whether this rank is about to end well, so that others may be gone already."""
        return self._at.phase == "finish"

    def place(self) -> str:
        """Where this rank stands, such as "in step 7"; empty where no phase is known."""
        return self._at.text()

    def in_place(self) -> str:
        return f" {self.place()}" if self.place() else ""

    def _describe(self) -> str:
        at = self._at
        waits = f"waiting for {at.waits!r}" if at.waits else "in no collective"
        return ", ".join(filter(None, [at.text(), waits]))

    # ------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        shortest = self.limits.shortest
        tick = min(1.0, max(shortest / 4, 0.05)) if shortest > 0 else 1.0
        seen, stood, orphaned, looked = self._at, 0.0, -1.0, 0.0
        while True:
            time.sleep(tick)
            at = self._at
            seen, stood = (at, stood + tick) if at is seen else (at, 0.0)
            limit = self.limits.of(at.phase)
            if limit and stood >= limit and (at.phase or at.waits):
                self._end(partial(self._too_long, at, limit), own=not at.waits)
            looked += tick
            if looked >= 1.0:
                orphaned = self._look_after_launcher(orphaned, looked)
                looked = 0.0

    def _look_after_launcher(self, orphaned: float, passed: float) -> float:
        """Seconds since the launcher was found gone; -1 while it is there."""
        if orphaned >= 0:
            if orphaned + passed >= ORPHAN_SECONDS:
                self._end(lambda: f"ends{self.in_place()}: its launcher is gone, and it did not "
                                  f"end by itself in {ORPHAN_SECONDS:g} s")
            return orphaned + passed
        gone = ancestors.first_gone(self._ancestors)
        if gone is None:
            return -1.0
        text = f"its launcher is gone ({gone.command}, process {gone.pid})"
        if self.ask is None and not callable(signal.getsignal(signal.SIGTERM)):
            self._end(lambda: f"ends{self.in_place()}: {text}", quiet=True)
        end_within(ORPHAN_SECONDS + _ORPHAN_LAST_WORDS_SECONDS)
        if self.ask is not None:
            self.ask()
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        self.say(f"hvdnoise: rank {self.rank}: {text}: asking for a save, then it ends")
        return 0.0

    # ------------------------------------------------------------------ the end

    def _too_long(self, at: Position, limit: float) -> str:
        others = "see its stacks above" if not at.waits else \
            self.peers.account() or "another rank is stalled, gone, or took another path"
        did = f"waited {limit:g} s for {at.waits!r}{self.in_place()}" if at.waits else \
            f"stood still for {limit:g} s{self.in_place()}, outside of any collective"
        return f"{did}: {others}; ending this rank " \
               f"({limits.variable(at.phase)} sets the limit)"

    def _end(self, tell: Callable[[], str], *, quiet: bool = False, own: bool = False) -> None:
        """Say why and end this process, whatever blocks; ``own``: the cause is on this rank."""
        end_within(_LAST_WORDS_SECONDS)
        try:
            did = tell()
            self.peers.end(did if own else FOLLOWS)
            if not quiet:
                self.say(f"hvdnoise: stacks of rank {self.rank}, process {os.getpid()}:\n"
                         f"{stacks()}")
            self.say(f"hvdnoise: rank {self.rank} {did}")
            for child in multiprocessing.active_children():  # of a data loader
                child.kill()
        finally:
            os._exit(EXIT_CODE)

    def say(self, line: str) -> None:
        """On stderr and in the log, whatever the rest of the process waits for."""
        with contextlib.suppress(Exception):
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        if self.log is not None:
            with contextlib.suppress(OSError), self.log.open("a") as file:
                file.write(f"{line}\n")


# ---------------------------------------------------------------------- of this process

_of_process: dict[int, Watchdog] = {}


def begin(rank: int, size: int) -> Watchdog:
    """This process's watchdog; the first call makes it.

    Raises:
        ValueError: for a limit in the environment that is none.
    """
    if os.getpid() not in _of_process:
        _of_process[os.getpid()] = Watchdog(rank, size, limits.from_environment())
    found = _of_process[os.getpid()]
    found.rank = found.peers.rank = rank
    found.peers.size = size
    return found


def current() -> Watchdog | None:
    """This process's watchdog, if it has begun."""
    return _of_process.get(os.getpid())


def enter(phase: str, step: int | None = None) -> None:
    """`Watchdog.enter` of this process's; nothing without one."""
    found = current()
    if found is not None:
        found.enter(phase, step)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """`Watchdog.phase` of this process's; nothing without one. Also a decorator."""
    found = current()
    with found.phase(name) if found is not None else contextlib.nullcontext():
        yield


def place() -> str:
    """Where this rank stands, in words; empty where it is not known."""
    found = current()
    return found.place() if found is not None else ""
