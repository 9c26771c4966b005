"""A program around a command: whatever happens to its starter, nothing of the command outlives it.

    python guard.py [--after WORDS] [--save-seconds S] RUN_FOLDER COMMAND...

It starts the command and ends with its exit code. Its standard input is a pipe whose other end the
starter holds and never writes to: when that closes, because the starter has ended in whatever way,
all processes of the command are killed. On SIGTERM the command is asked to save and has S seconds
(60); a second SIGTERM kills it. Who is asked: rank 0 of the run in the folder, as the ranks agree;
for ``-`` the command. A launcher's ranks may lose their parent; as the "subreaper" (Linux,
prctl(2)) this process becomes it, and finds them. When it is itself killed, the command is too.

WORDS is a JSON list, a command that ends what is on other hosts. It is run after the command was
killed, by this program or by another.

It has one thread, and imports nothing of hvdnoise, which would take seconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Sequence

COMMAND = [sys.executable, "-I", "-S", __file__]  # quick, as it needs no packages
SAVE_SECONDS = 60.0
AFTER_SECONDS = 25.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def adopt() -> None:
    """Processes below this one that lose their parent become its children."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


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
    """Kill every process below this one; again and again, as one may be born meanwhile."""
    until = time.monotonic() + 20
    while (left := descendants(os.getpid())) and time.monotonic() < until:
        for process in left:
            _send(process, signal.SIGKILL)
        time.sleep(0.02)


def end_elsewhere(after: Sequence[str]) -> None:
    """Run the command that ends what is on other hosts, if there is one."""
    if after:
        try:
            subprocess.run(after, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, timeout=AFTER_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            pass
        kill_all()


def ask(folder: str, command: int) -> None:
    """SIGTERM to rank 0 of the run where it is one of ours, else to the command."""
    try:
        text = "" if folder == "-" else Path(folder, "logs", "rank-0.log").read_text()
    except OSError:
        text = ""
    started = re.findall(r"rank 0, process (\d+)", text)
    rank = int(started[-1]) if started else 0
    _send(rank if rank in descendants(os.getpid()) else command, signal.SIGTERM)


def _send(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass


def _end_with_me() -> None:  # in the child, before the command
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(arguments: Sequence[str]) -> int:
    """Run the command to its end; its exit code."""
    options = {"--after": "[]", "--save-seconds": str(SAVE_SECONDS)}
    words = list(arguments)
    while words[0] in options:
        options[words[0]], words = words[1], words[2:]
    folder, command = words[0], words[1:]
    adopt()
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
        late = bool(asked) and time.monotonic() > asked[0] + float(options["--save-seconds"])
        if late or len(asked) > 1 or _closed():
            break
    kill_all()
    code = child.wait()
    if code < 0:
        end_elsewhere(json.loads(options["--after"]))
    return code if code >= 0 else 128 - code


def _closed() -> bool:
    """Whether the starter is gone; waits a moment."""
    try:
        ready, _, _ = select.select([0], [], [], 0.05)
    except InterruptedError:
        return False
    return bool(ready) and os.read(0, 1) == b""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
