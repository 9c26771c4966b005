"""One supervisor of a run at a time on this machine, and no attempt of a killed one beside it.

Two names are taken as abstract addresses of Unix sockets (unix(7)): they are in no folder, and free
again when the last process that holds them has ended. One belongs to the supervisor. The other is
inherited by the guards of its attempts too. On other machines the run folder's own lock speaks.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import time
from pathlib import Path
from typing import Iterator

from hvdnoise.training.config import ConfigError

WAIT_SECONDS = 60.0


@contextlib.contextmanager
def only_one(folder: Path, *, wait: float = WAIT_SECONDS) -> Iterator[int]:
    """Hold both names of a run folder; yields the descriptor that the guards inherit.

    Raises:
        ConfigError: when another supervisor works on it, or an attempt of one does not end.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    with socket.socket(socket.AF_UNIX) as mine, socket.socket(socket.AF_UNIX) as attempts:
        if not _take(mine, f"{digest}-supervisor"):
            raise ConfigError(f"another hvdnoise launch works on {folder}: wait for it, or end it "
                              "first")
        until = time.monotonic() + wait
        while not _take(attempts, f"{digest}-attempts"):
            if time.monotonic() > until:
                raise ConfigError(f"the ranks of an earlier hvdnoise launch on {folder} do not end:"
                                  " end them first")
            time.sleep(0.1)
        yield attempts.fileno()


def _take(address: socket.socket, name: str) -> bool:
    try:
        address.bind(f"\0hvdnoise-launch-{name}")
    except OSError:
        return False
    return True
