"""`hvdnoise` in which one rank fails in a step, as the environment says: how, rank and step.

    HVDNOISE_TEST_FAILS="memory 1 7" python failing.py train ...
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from typing import Any

from hvdnoise import cli
from hvdnoise.training import loop


def memory() -> None:
    raise MemoryError("none is left")


def leave() -> None:
    raise SystemExit(0)


def hang() -> None:
    time.sleep(1000)


FAULTS = {
    "memory": memory, "leave": leave, "hang": hang, "vanish": lambda: os._exit(0),
    "crash": getattr(faulthandler, "_sigsegv"),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP)}
_fault, _rank, _step = os.environ["HVDNOISE_TEST_FAILS"].split()
_take_step = loop.take_step


def take_step(job: Any, batches: Any, meter: Any) -> None:
    if (job.world.rank, job.counters.step + 1) == (int(_rank), int(_step)):
        FAULTS[_fault]()
    _take_step(job, batches, meter)


if __name__ == "__main__":
    loop.take_step = take_step
    sys.exit(cli.main())
