"""Several optimizers in one process: ranks finish their exchanges in the same order, or are told.

With one optimizer, ``backward()`` waits for the exchange. With several it must not: another rank
may have no gradient for this optimizer in its backward, and start its part of the exchange only
when it calls ``step()``, after a backward that would wait for this rank in turn. So buckets leave
in backward as ever, and ``step()`` or ``synchronize()`` wait, as in Horovod itself.

A rank that waits for one optimizer while another rank waits for another may wait for ever. So each
rank announces which exchange it finishes next, in an allreduce of 24 bytes that nobody waits for:
sum over ranks of (1, x, x^2), with x a number for the optimizer. The ranks agree if and only if
(sum 1)(sum x^2) = (sum x)^2, and whoever waits looks. Ranks that have called ``hvd.join()`` add
zeros, and so do not count.
"""

from __future__ import annotations

import gc
import hashlib
import time
import weakref
from collections import deque
from typing import Any, Callable

import torch

from hvdnoise.world import Handle, World

COLLECT_SECONDS = 10.0
MOST_UNANSWERED = 16  # announcements that the other ranks have not made yet


class FinishOrder:
    """The optimizers of one world in this process, and the order in which they finish."""

    def __init__(self) -> None:
        self._were_several = False
        self._live: weakref.WeakSet[Any] = weakref.WeakSet()
        self._finished = 0  # exchanges, of all optimizers
        self._announced: deque[tuple[Handle, str]] = deque()
        self._silent = False

    def join(self, optimizer: Any) -> None:
        """One more; it counts while it lives, and is told by its ``label`` and ``description``."""
        self._live.add(optimizer)

    def begin(self) -> None:
        """An optimizer's first exchange: count those that live."""
        if len(self._live) > 1:
            _collect()  # so that all ranks count alike
        self._were_several = len(self._live) > 1

    @property
    def several(self) -> bool:
        """Whether there are several optimizers."""
        return self._were_several and len(self._live) > 1

    @property
    def poll(self) -> Callable[[], None] | None:
        """What to call while waiting; None: nothing."""
        return self._check if self._announced else None

    def announce(self, world: World, optimizer: Any) -> None:
        """This rank is about to wait for the exchange of an optimizer.

        Raises:
            RuntimeError: when the ranks were found to differ.
        """
        self._check()
        self._finished += 1
        if not self.several or self._silent:
            return
        if len(self._announced) == MOST_UNANSWERED:  # the other ranks have one optimizer only
            self._silent = True
            return
        x = int(hashlib.sha256(optimizer.label.encode()).hexdigest()[:5], 16)
        handle = world.allreduce_(torch.tensor([1, x, x * x]), op="sum",
                                  name=f"hvdnoise.order.{self._finished % (2 * MOST_UNANSWERED)}")
        self._announced.append((handle, optimizer.description))

    def _check(self) -> None:
        while self._announced and self._announced[0][0].done():
            handle, mine = self._announced.popleft()
            count, total, squares = handle.wait().tolist()
            if count * squares != total * total:
                self._silent = True  # told once
                self._announced.clear()
                others = sorted({each.description for each in self._live} - {mine})
                raise RuntimeError(
                    f"the ranks finish their exchanges in different orders: this one came to "
                    f"{mine} when another came to another optimizer (here are {'; '.join(others)}, "
                    "too): call step() or synchronize() of all optimizers in the same order on all "
                    "ranks, also where a rank has no gradients for one")


class _Cycle:
    """Garbage that only a collection can find."""

    def __init__(self) -> None:
        self.me = self


def _collect() -> None:
    """Collect garbage, also where ``gc.collect()`` does nothing as another thread collects."""
    cycle, until = weakref.ref(_Cycle()), time.monotonic() + COLLECT_SECONDS
    while cycle() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.001)
