"""SIGTERM as a wish that all ranks grant at the same step.

The signal only raises a flag on the rank that got it. At each step boundary the ranks start a
reduction of their flags (one number, asynchronous) and look at the one of the boundary before, so
that nobody waits for it, and all ranks stop at the same step, at most two after the signal.

A second SIGTERM ends the process at once. It is noticed by a thread, because Python's own signal
handlers do not run while the main thread waits inside a collective. Launchers and schedulers may
deliver one wish twice (to the process and to its group): what follows the first signal within
`SAME_SIGNAL_SECONDS` counts as the same.

What launchers make of it (seen with Horovod 0.28.1 and Open MPI 4.1.8):

    signal to          horovodrun --gloo          mpirun
    one rank, or all   saved; exit code 1, and    saved; exit code 75
                       "Exit code: 75" printed
    the launcher       ranks get SIGTERM, and     ranks get SIGTERM after T seconds, SIGKILL after
                       SIGKILL 5 s later;         T more (T: the MCA parameter
                       exit code 1                odls_base_sigkill_timeout, 1 by default); exit
                                                  code 1

Where the exit code does not tell, RUN/preempted.json does. ``horovodrun --mpi`` itself dies of a
SIGTERM and leaves the ranks running. launch/horovodrun.sh and launch/mpirun.sh do better: they ask
one rank, and pass 75 on.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import torch

from hvdnoise.comm import Handle, World

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, start me again
EXIT_AT_ONCE = 128 + signal.SIGTERM
SAME_SIGNAL_SECONDS = 1.0


class Preemption:
    """Takes over SIGTERM in this process (main thread only)."""

    def __init__(self) -> None:
        self.wanted = False
        self._since = 0.0
        self._pending: Handle | None = None
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.signal(signal.SIGTERM, lambda *_: None)  # so that Python writes to the pipe
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read,), name="hvdnoise-sigterm",
                         daemon=True).start()

    def _watch(self, pipe: int) -> None:
        while received := os.read(pipe, 64):
            if signal.SIGTERM not in received:
                continue
            if not self.wanted:
                self.wanted, self._since = True, time.monotonic()
            elif time.monotonic() - self._since > SAME_SIGNAL_SECONDS:
                os.write(2, b"hvdnoise: second SIGTERM: ending at once\n")
                os._exit(EXIT_AT_ONCE)

    def agreed(self, world: World) -> bool:
        """Whether the ranks stop at this step boundary. Collective: call it at each one."""
        if world.size == 1:
            return self.wanted
        if self.wait():
            return True
        self._pending = world.allreduce_(torch.tensor([float(self.wanted)]),
                                         name="hvdnoise.preempt", op="max")
        return False

    def wait(self) -> bool:
        """Wait for the reduction under way; whether a rank wanted to stop. Collective."""
        pending, self._pending = self._pending, None
        return pending is not None and float(pending.wait()) > 0
