"""Which rank failed first, and why, from what an attempt says on stderr.

Lines of ranks that only noticed that another one is gone count where there is nothing better.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import Literal

Kind = Literal["said", "killed", "launcher", "hosts", "preempted"]
LONGEST_LINE = 16384  # bytes; what is longer is cut
_TAG = re.compile(r"^(\[[\d,]+\]<\w+>:)?\s?(.*)$")  # horovodrun's and mpirun's
_FAILED = re.compile(r"hvdnoise: rank (\d+) failed(?: [^:]*)?: (.*)")
_ENDED = re.compile(r"hvdnoise: (rank (\d+) (?:waited|ends|was) .*)")
_ERROR = re.compile(r"hvdnoise: error: (.*)")
_NAMED = re.compile(r"\brank (\d+)")
_SECOND = re.compile("another rank is gone|other ranks are gone")
_SCRIPT = re.compile(r"^(?:horovodrun|mpirun)\.sh: error: (.*)")
# of horovodrun with Gloo by horovodrun.sh, and of mpirun
_CODE = re.compile(r"^horovodrun\.sh: rank (\d+) on (\S+) ended first, with exit code (\d+)")
_SHELL = re.compile(r"^\[(\d+)\]<stderr>:(Killed|Aborted|Segmentation fault)")
_SIGNAL = re.compile(r"process rank (\d+) with PID \d+ on node (\S+) exited on signal (\d+)")
LOST = "It was there at the start"


@dataclass(frozen=True)
class Cause:
    """Why an attempt failed.

    Args:
        kind: a rank said it (or ended with an exit code), a rank was killed by a signal, the
            launcher was, hosts cannot be reached, or ranks were told to save.
        text: one line that names the rank where it is known.
        rank: where it is known.
        lost: of hosts: whether they were there when the attempt began.
    """

    kind: Kind
    text: str
    rank: int | None = None
    lost: bool = False


class Reader:
    """Reads an attempt's stderr, in pieces as they come, in bounded memory."""

    def __init__(self) -> None:
        self._rest = b""
        self._tracebacks: dict[str, int] = {}  # by tag: the rank whose traceback is under way
        self._said: Cause | None = None
        self._second: Cause | None = None
        self._seconds: set[int | None] = set()
        self._killed: Cause | None = None
        self._shell: Cause | None = None
        self._ended: Cause | None = None
        self._hosts: list[str] = []
        self.refusal: str | None = None

    def feed(self, piece: bytes) -> None:
        """Take in a piece."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        self._rest = self._rest[-LONGEST_LINE:]
        for line in lines:
            self._read(line[:LONGEST_LINE].decode(errors="replace").rstrip())

    def _read(self, line: str) -> None:
        found = _TAG.match(line)
        tag, text = (found[1] or "", found[2]) if found else ("", line)
        if tag in self._tracebacks:
            self._read_traceback(tag, text)
        elif found := _FAILED.search(text):
            rank, why = int(found[1]), found[2]
            if why.startswith("Traceback "):
                self._tracebacks[tag] = rank
            else:
                self._note(rank, why)
        elif found := _ENDED.search(text):
            self._note(int(found[2]), found[1].partition(" ")[2].partition(" ")[2])
        elif found := _ERROR.search(text):
            self.refusal = self.refusal or found[1]
            named = _NAMED.search(found[1])
            self._said = self._said or Cause("said", found[1], int(named[1]) if named else None)
        else:
            self._read_launcher(line)

    def _read_traceback(self, tag: str, text: str) -> None:
        """Its first line that is not indented and no frame says what was raised."""
        if text and not text.startswith((" ", "Traceback ", "+", "|")) and \
                not text.startswith(("During handling of", "The above exception")):
            self._note(self._tracebacks.pop(tag), text)

    def _note(self, rank: int, why: str) -> None:
        cause = Cause("said", f"rank {rank}: {why}", rank)
        if _SECOND.search(why):
            self._second = self._second or Cause("killed", "a rank is gone, and nothing says why; "
                                                 + cause.text)
            self._seconds.add(rank)
        else:
            self._said = self._said or cause

    def _read_launcher(self, line: str) -> None:
        if found := _SCRIPT.search(line):
            self._hosts.append(found[1])
        elif found := _SIGNAL.search(line):
            self._killed = self._killed or _killed(int(found[1]), found[2], int(found[3]))
        elif found := _SHELL.search(line):
            self._shell = self._shell or Cause("killed", f"rank {found[1]} was killed ({found[2]})",
                                               int(found[1]))
        elif found := _CODE.search(line):
            rank, host, code = int(found[1]), found[2], int(found[3])
            if code > 128:
                self._killed = self._killed or _killed(rank, host, code - 128)
            elif rank not in self._seconds:
                self._ended = self._ended or Cause(
                    "said", f"rank {rank} on {host} ended with exit code {code}", rank)

    def cause(self, code: int) -> Cause:
        """Why, once the attempt has ended with this exit code."""
        if self._rest:
            self.feed(b"\n")
        lost = [each for each in self._hosts if LOST in each]
        if code == 75:
            return Cause("preempted", "the ranks were told to stop, and saved")
        killed = self._killed or self._shell
        if code > 128 and killed is None:
            return Cause("launcher", f"the launcher was killed by {_name(code - 128)}")
        # a rank aborts where others have gone, so what was said counts more than an abort
        first = killed if self._killed is not None and "SIGABRT" not in self._killed.text else \
            self._said or killed
        if first is not None:
            return first
        if self._hosts:
            return Cause("hosts", (lost or self._hosts)[-1], lost=bool(lost))
        return self._ended or self._second or Cause("said", f"the ranks ended with exit code {code}"
                                                    " and did not say why")


def _killed(rank: int, host: str, number: int) -> Cause:
    return Cause("killed", f"rank {rank} on {host} was killed by {_name(number)}", rank)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
