"""SIGTERM as a wish that all ranks grant at the same step; SIGHUP, of a closed terminal, too.

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

torchrun hands SIGTERM on at once, sends SIGKILL 30 s later, and always ends with 1.
Where the exit code does not tell, RUN/preempted.json does. ``horovodrun --mpi`` itself dies of a
SIGTERM and leaves the ranks running. launch/horovodrun.sh and launch/mpirun.sh do better: they ask
one rank, and pass 75 on.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time

import torch

from hvdnoise import watchdog
from hvdnoise.comm import Handle, World

_SIGNALS = signal.SIGTERM, signal.SIGHUP
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, start me again
EXIT_AT_ONCE = 128 + signal.SIGTERM
SAME_SIGNAL_SECONDS = 1.0


class Preemption:
    """Takes over SIGTERM in this process (main thread only)."""

    def __init__(self) -> None:
        self.wanted = False
        self._told_at = -math.inf
        self._pending: Handle | None = None
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._ignored = {number for number in _SIGNALS  # as SIGHUP under nohup
                         if signal.getsignal(number) == signal.SIG_IGN}
        self.listen()
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._leave)
        threading.Thread(target=self._watch, args=(read,), name="hvdnoise-sigterm",
                         daemon=True).start()

    def listen(self) -> Preemption:
        """Take the signals, again after Horovod was imported: that takes SIGHUP over."""
        for number in _SIGNALS:  # a handler of Python's writes to the pipe
            signal.signal(number, signal.SIG_IGN if number in self._ignored else lambda *_: None)
        return self

    def _leave(self) -> None:
        """In a process that was forked: what it is sent is none of this rank's business."""
        with contextlib.suppress(ValueError):  # of another interpreter
            signal.set_wakeup_fd(-1)
            for number in set(_SIGNALS) - self._ignored:
                signal.signal(number, signal.SIG_DFL)

    def _watch(self, pipe: int) -> None:
        while received := os.read(pipe, 64):
            if not any(number in received for number in _SIGNALS):
                continue
            now = time.monotonic()
            if self._told_at == -math.inf:
                self.wanted, self._told_at = True, now
                self._say_who_is_lost()
            elif now - self._told_at > SAME_SIGNAL_SECONDS:
                with contextlib.suppress(OSError):
                    os.write(2, b"hvdnoise: second SIGTERM: ending at once\n")
                os._exit(EXIT_AT_ONCE)

    def want(self) -> None:
        """Wish for it as the first signal does; no signal after this one counts as the second."""
        self.wanted = True

    @staticmethod
    def _say_who_is_lost() -> None:
        """A launcher sends SIGTERM to those that are left when a rank has failed. They may be
        stuck in a collective until they are killed, so it is said here."""
        watched = watchdog.current()
        if watched is None or watched.ends:
            return
        if others := watched.peers.account(lost=True):
            watched.peers.end()
            watched.say(f"hvdnoise: rank {watched.rank} ends{watched.in_place()}: {others}")

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
