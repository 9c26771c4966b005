"""One study at a time in a folder, and no run of a killed one beside a new one.

Two files are locked (flock(2)). STUDY/.lock belongs to the study's process. STUDY/.lock-runs is
inherited by the guards of its runs too, so it is free only when the last of them has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Iterator

from hvdnoise.training.config import ConfigError

WAIT_SECONDS = 60.0


@contextlib.contextmanager
def only_one(folder: Path, *, wait: float = WAIT_SECONDS) -> Iterator[int]:
    """Hold both locks; yields the descriptor that the guards inherit.

    Raises:
        ConfigError: when another study works in the folder, or runs of one do not end.
    """
    with contextlib.ExitStack() as stack:
        mine = _open(folder / ".lock", stack)
        if not _take(mine):
            raise ConfigError(f"another study works in {folder} (process "
                              f"{_who(folder / '.lock')}): wait for it, or end it first")
        os.ftruncate(mine, 0)
        os.pwrite(mine, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        runs = _open(folder / ".lock-runs", stack)
        until = time.monotonic() + wait
        while not _take(runs):
            if time.monotonic() > until:
                raise ConfigError(f"runs of an earlier study in {folder} do not end (process "
                                  f"{_holders(folder / '.lock-runs')}): end them first")
            time.sleep(0.1)
        yield runs


def _open(path: Path, stack: contextlib.ExitStack) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"out={path.parent} cannot be written ({error.strerror}): give another "
                          "one") from error
    stack.callback(os.close, descriptor)
    return descriptor


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _who(path: Path) -> str:
    return path.read_text() or "not known"


def _holders(path: Path) -> str:
    """The processes on this host that have the file open."""
    found, wanted = [], os.path.realpath(path)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if any(os.path.realpath(each) == wanted for each in (entry / "fd").iterdir()):
                    found.append(entry.name)
    return ", ".join(found) or "on another host"
