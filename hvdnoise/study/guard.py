"""A program around one run: whatever happens to the study, nothing of the run outlives it.

    python guard.py RUN_FOLDER COMMAND...

It starts the command and ends with its exit code. Its standard input is a pipe whose other end the
study holds and never writes to: when that closes, because the study has ended in whatever way, all
processes of the run are killed. On SIGTERM the run is asked to save (rank 0, as the ranks agree)
and has `SAVE_SECONDS`; a second SIGTERM kills it. A launcher's ranks may lose their parent; as the
"subreaper" (Linux, prctl(2)) this process becomes it, and finds them. When it is itself killed, the
command is too. It has one thread, and imports nothing of hvdnoise, which would take seconds.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

SAVE_SECONDS = 60.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def descendants(root: int) -> list[int]:
    """Every living process below ``root``, the nearest first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # ended meanwhile
                continue
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry.name))
    found = list(children.get(root, []))
    for process in found:  # grows while it is walked
        found += children.get(process, [])
    return found


def kill_all() -> None:
    """Kill every process of the run; again and again, as one may be born meanwhile."""
    until = time.monotonic() + 20
    while (left := descendants(os.getpid())) and time.monotonic() < until:
        for process in left:
            _send(process, signal.SIGKILL)
        time.sleep(0.02)


def ask(folder: Path, command: int) -> None:
    """SIGTERM to rank 0 of the run where it is one of ours, else to the command."""
    try:
        started = re.findall(r"rank 0, process (\d+)", (folder / "logs" / "rank-0.log").read_text())
    except OSError:
        started = []
    rank = int(started[-1]) if started else 0
    _send(rank if rank in descendants(os.getpid()) else command, signal.SIGTERM)


def _send(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass


def _end_with_me() -> None:  # in the child, before the command
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(folder: Path, command: list[str]) -> int:
    """Run the command to its end; its exit code."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    asked: list[float] = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(time.monotonic()))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # the command's own input is a pipe that stays open: as long as this process lives
    child = subprocess.Popen(command, stdin=subprocess.PIPE, preexec_fn=_end_with_me)
    told = False
    while child.poll() is None:
        if asked and not told:
            told = True
            ask(folder, child.pid)
        late = bool(asked) and time.monotonic() > asked[0] + SAVE_SECONDS
        if late or len(asked) > 1 or _closed():
            break
    kill_all()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _closed() -> bool:
    """Whether the study is gone; waits a moment."""
    try:
        ready, _, _ = select.select([0], [], [], 0.05)
    except InterruptedError:
        return False
    return bool(ready) and os.read(0, 1) == b""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
