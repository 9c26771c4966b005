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
_TAG = re.compile(r"^(?:\[[\d,]+\]<\w+>:)?\s?(.*)$")  # horovodrun's and mpirun's
# of a rank's own failure, and of what it has noticed of others
_FAILED = re.compile(r"hvdnoise: rank (\d+) (?:failed[^:]*: (.*)|((?:stood|was) .*))")
_NOTICED = re.compile(r"hvdnoise: rank (\d+) ((?:ends|waited)\b[^:]*: (.*))")
_ERROR = re.compile(r"hvdnoise: error: (.*)")
_NAMED = re.compile(r".*?\brank (\d+)")
_SCRIPT = re.compile(r"^(?:horovodrun|mpirun)\.sh: error: (.*)")
# of horovodrun with Gloo by horovodrun.sh, and of mpirun
_CODE = re.compile(r"^\w+\.sh: rank (\d+) on (\S+) ended first, with exit code (\d+)")
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
        text = found[1] if found else line
        if found := _FAILED.search(text):
            rank = int(found[1])
            self._said = self._said or Cause("said", f"rank {rank}: {found[2] or found[3]}", rank)
        elif found := _NOTICED.search(text):
            self._notice(int(found[1]), found[2], found[3])
        elif found := _ERROR.search(text):
            self.refusal = self.refusal or found[1]
            named = _NAMED.search(found[1])
            self._said = self._said or Cause("said", found[1], int(named[1]) if named else None)
        else:
            self._read_launcher(line)

    def _notice(self, rank: int, text: str, what: str) -> None:
        """What a rank says that ends because of others; where it can tell, it names one of them."""
        named = _NAMED.match(what)
        if named:
            found = Cause("killed" if " is gone" in what else "said", what, int(named[1]))
        elif text.startswith("waited"):
            found = Cause("said", f"rank {rank}: {text}", rank)
        else:
            found = Cause("killed", f"a rank is gone, and nothing says why; rank {rank}: {what}",
                          rank)
        self._second = self._second or found
        self._seconds.add(rank)

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
