"""One attempt: a script that starts the ranks once, under its guard.

What it says goes through unchanged, and is read on the way for the cause of a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from typing import Callable, Sequence

from hvdnoise.supervise import guard
from hvdnoise.supervise.cause import Cause, Reader

SAVE_SECONDS = 150  # the script has limits of its own: 60 to save, and what launchers then need
TICK_SECONDS = 0.1
PIECE = 4096  # bytes: so many can be written at once where select says so


class Attempt:
    """An attempt under way.

    Args:
        words: the command.
        after: the command that ends what is left of it on other hosts.
        env: its environment.
        hold: a descriptor that its guard keeps open.
    """

    def __init__(self, words: Sequence[str], *, after: Sequence[str], env: dict[str, str],
                 hold: int) -> None:
        self._after = after
        self._reader, self._unsaid, self._mute = Reader(), b"", False
        self._pipe, write = os.pipe()
        os.set_blocking(self._pipe, False)
        try:
            self._process = subprocess.Popen(
                [*guard.COMMAND, "--after", json.dumps(after), "--save-seconds", str(SAVE_SECONDS),
                 "-", *words], stdin=subprocess.PIPE, stderr=write, env=env, pass_fds=(hold,),
                start_new_session=True)
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(write)

    def run(self, signals: Callable[[], int]) -> int:
        """See it to its end; its exit code.

        Args:
            signals: how many wishes to stop there have been; each new one is passed on.
        """
        passed = 0
        try:
            while self._process.poll() is None:
                if signals() > passed:
                    passed += 1
                    self._process.terminate()
                self._pass_through(TICK_SECONDS)
        finally:
            self._end()
        while self._pass_through(0.0):
            pass
        os.close(self._pipe)
        return self._process.returncode

    def _end(self) -> None:
        """Nothing is left of it, also after an error here, or where its guard was killed."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if self._process.wait() >= 0:
            return
        guard.kill_all()
        guard.end_elsewhere(self._after)
        with contextlib.suppress(ChildProcessError):  # the dead, who became this one's children
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _pass_through(self, seconds: float) -> bool:
        """Read a piece, or write what was read, waiting so long; whether there was one."""
        if self._unsaid:
            return self._write(seconds)
        ready, _, _ = select.select([self._pipe], [], [], seconds)
        piece = os.read(self._pipe, PIECE) if ready else b""
        if ready and not piece:  # closed by all
            time.sleep(seconds)
        self._reader.feed(piece)
        self._unsaid = b"" if self._mute else piece
        return bool(piece)

    def _write(self, seconds: float) -> bool:
        """Where nobody reads any more, the attempt goes on."""
        _, ready, _ = select.select([], [2], [], seconds)
        if not ready:
            return self._process.poll() is None
        try:
            self._unsaid = self._unsaid[os.write(2, self._unsaid):]
        except OSError:
            self._mute, self._unsaid = True, b""
        return True

    def cause(self) -> Cause:
        """Why it failed."""
        code = self._process.returncode
        return self._reader.cause(code if code >= 0 else 128 - code)

    @property
    def refusal(self) -> str | None:
        """The line by which a rank refused its input."""
        return self._reader.refusal
