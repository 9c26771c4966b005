"""A supervised run in its order: check, attempt, verdict, wait, the next attempt."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Iterator, Sequence

from hvdnoise.supervise import guard, scripts
from hvdnoise.supervise.alone import only_one
from hvdnoise.supervise.attempt import TICK_SECONDS, Attempt
from hvdnoise.supervise.cause import Cause
from hvdnoise.supervise.failures import Failure, History
from hvdnoise.supervise.options import Options, read
from hvdnoise.supervise.runstate import RunState, look
from hvdnoise.training.preemption import EXIT_AT_ONCE, EXIT_PREEMPTED, SAME_SIGNAL_SECONDS
from hvdnoise.training.process import EXIT_BAD_INPUT, EXIT_FAILED
from hvdnoise.training.resize import keep_workers
from hvdnoise.training.validation import validate


def run(arguments: Sequence[str]) -> int:
    """`hvdnoise launch`; the exit code.

    Raises:
        ConfigError: for what is wrong and can be seen from here; nothing was started.
    """
    options = read(arguments)
    scripts.start(options, "", ())
    if options.local and options.ranks is not None:  # other machines may have what is missing here
        first = replace(options.config, **resuming(options, look(options.folder), begun=False))
        validate(keep_workers(first, options.ranks), options.ranks)
    with only_one(options.folder) as hold:
        return Supervisor(options, hold).run()


def resuming(options: Options, state: RunState, *, begun: bool) -> dict[str, Any]:
    """The settings of the next attempt that are other than they were given.

    Args:
        state: the run folder's.
        begun: whether an attempt has written into it.
    """
    config = options.config
    if config.overwrite and not begun:  # what is there is still another run's
        return {}
    resume = config.resume
    inside = resume not in ("never", "auto") and \
        options.folder.resolve() in (path := Path(resume).resolve(), *path.parents)
    if resume == "never" or state.checkpoint is not None and (begun or not inside):
        resume = "auto"
    return {"resume": resume, "overwrite": False,
            "resume_resize": config.resume_resize or options.least is not None}


def flags(settings: dict[str, Any]) -> list[str]:
    """On the command line."""
    return [word for name, value in settings.items()
            for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else value)]


class Supervisor:
    """A supervisor at work.

    Args:
        options: of its command.
        hold: a descriptor that the guards of its attempts keep open.
    """

    def __init__(self, options: Options, hold: int) -> None:
        self.options, self._hold = options, hold
        self._begun = False
        self._restarts = 0
        self._history = History()
        self._signals: list[float] = []

    def run(self) -> int:
        """Attempts until the run is done, or is given up, or is to stop; the exit code."""
        guard.adopt()
        with self._handlers():
            while (code := self._attempt()) is None:
                pass
        return code

    def _attempt(self) -> int | None:
        """One attempt, and the wait after it; the exit code, or None for another one."""
        before = look(self.options.folder)
        mark = f"{socket.gethostname()}-{os.getpid()}-{self._restarts}-{time.time_ns()}"
        train = [*self.options.train,
                 *flags(resuming(self.options, before, begun=self._begun))]
        attempt = Attempt(
            scripts.start(self.options, mark, train, resumes=before.checkpoint is not None),
            after=scripts.end(self.options, mark), env=scripts.environment(), hold=self._hold)
        code = attempt.run(lambda: len(self._signals))
        after = look(self.options.folder)
        started = after.settings != before.settings
        self._begun |= started
        if code == 0 and started and after.finished:
            return 0
        if code == EXIT_BAD_INPUT:
            if attempt.refusal:  # a launcher may have hidden it
                _say(f"error: {attempt.refusal}")
            return EXIT_BAD_INPUT
        step = after.step if after.steps != before.steps else None
        cause = attempt.cause() if code else Cause(
            "said", "the ranks ended with exit code 0 before the end of the run")
        failure = Failure(cause, after.checkpoint, step)
        if self._signals:
            return self._stopped(code, failure)
        return self._failed(failure, started)

    def _stopped(self, code: int, failure: Failure) -> int:
        """The exit code after a wish to stop."""
        if code == EXIT_PREEMPTED or failure.step is None and len(self._signals) == 1:
            _say(f"stopped; {self._where(failure)}; the same command goes on")
            return EXIT_PREEMPTED
        if len(self._signals) > 1:
            _say(f"error: ended at once; {self._where(failure)}")
            return EXIT_AT_ONCE
        _say(f"error: stopped {failure.place}, and the ranks had not saved: {failure.cause.text}; "
             f"{self._where(failure)}")
        return EXIT_FAILED

    def _failed(self, failure: Failure, started: bool) -> int | None:
        """Wait for the next attempt, or the exit code."""
        cause, again, most = failure.cause, self._history.add(failure), self.options.max_restarts
        refused = cause.kind == "hosts" and not (cause.lost or started or self._restarts)
        if again or refused or self._restarts >= most:
            why = "the same failure came twice" if again else "nothing was started" if refused \
                else f"{most} restarts are over"
            _say(f"error: gave up, {why}: {cause.text}, {failure.place}; {self._where(failure)}")
            return EXIT_FAILED
        seconds = min(self.options.backoff_limit,
                      self.options.backoff * 2.0 ** (len(self._history.failures) - 1))
        self._restarts += 1
        _say(f"{cause.text}, {failure.place}: restart {self._restarts} of at most {most} in "
             f"{seconds:g} s; {self._where(failure)}")
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._signals:
                _say(f"stopped; {self._where(failure)}; the same command goes on")
                return EXIT_PREEMPTED
            time.sleep(min(TICK_SECONDS, left))
        return None

    def _where(self, failure: Failure) -> str:
        newest = failure.checkpoint
        text = "no checkpoint" if newest is None else f"newest checkpoint: step {newest}"
        return f"{text}, in {self.options.folder}"

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            if number != signal.SIGHUP or before[number] != signal.SIG_IGN:  # nohup
                signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """One wish may be delivered twice, to a process and to its group."""
        now = time.monotonic()
        if not self._signals or now - self._signals[-1] > SAME_SIGNAL_SECONDS:
            self._signals.append(now)


def _say(text: str) -> None:
    """A line of the supervisor's own, after what the attempt said."""
    with contextlib.suppress(OSError):  # nobody listens any more
        print(f"hvdnoise: {' '.join(text.split())}", file=sys.stderr, flush=True)
