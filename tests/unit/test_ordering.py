"""Which optimizers of a process count."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

from hvdnoise.ordering import FinishOrder


class Cycle:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.me = self


class Slow(Cycle):
    """Garbage whose end takes a while, and lets other threads go on meanwhile."""

    def __init__(self, ending: threading.Event) -> None:
        super().__init__()
        self.ending = ending

    def __del__(self) -> None:
        self.ending.set()
        time.sleep(0.3)


def joined(order: FinishOrder) -> Any:
    """Two optimizers, of which one is garbage."""
    alive = Cycle()
    order.join(alive)
    order.join(Cycle())
    return alive


def test_garbage_does_not_count() -> None:
    order = FinishOrder()
    alive = joined(order)
    order.begin()
    assert not order.several and alive.me is alive
    order.join(other := Cycle())
    order.begin()
    assert order.several and other.me is other


def test_garbage_does_not_count_while_another_thread_collects() -> None:
    gc.collect()
    ending, order = threading.Event(), FinishOrder()
    Slow(ending)
    thread = threading.Thread(target=gc.collect)
    thread.start()
    assert ending.wait(10)
    alive = joined(order)
    order.begin()
    assert not order.several and alive.me is alive
    thread.join(10)
