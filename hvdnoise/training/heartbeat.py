"""Having a run folder for as long as a run lasts; see `hvdnoise.training.folder_lock`.

Rank 0 has the lock. Its heartbeat is a daemon thread, which also looks whether the lock is still
there. When it is not, the run is asked to stop, and at the next step boundary `check`
raises on all ranks. A run that has not stopped after `GRACE_SECONDS`, because its main thread waits
for something, is ended by the thread.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Iterable, Iterator

from hvdnoise.comm import World
from hvdnoise.training import folder_lock
from hvdnoise.training.checkpoint import CheckpointError
from hvdnoise.training.errors import ConfigError
from hvdnoise.training.folder_lock import BEAT_SECONDS, FolderInUse
from hvdnoise.training.progress import log
from hvdnoise.training.together import call_or_raise

GRACE_SECONDS = 60.0
SEEN_SECONDS = 10.0  # until a new file is seen on all hosts of a shared file system


class FolderLost(CheckpointError):
    """The run folder is gone, or another run's; one line, equal on all ranks."""


class FolderLock:
    """A lock of this process, with its heartbeat.

    Args:
        folder: exists.
        on_loss: called by the heartbeat's thread, once, when the lock is no longer this process's.

    Raises:
        FolderInUse: when another run is in the folder.
        OSError: when the folder cannot be written.
    """

    def __init__(self, folder: Path, on_loss: Callable[[], None]) -> None:
        self.path, self._descriptor, self.owner = folder_lock.take(folder)
        self._on_loss = on_loss
        self._beaten = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="hvdnoise-folder", daemon=True)
        self._thread.start()

    def problem(self) -> str | None:
        """Why the lock is no longer this process's; None while it is."""
        return folder_lock.problem(self.path, self.owner)

    def is_ours(self) -> bool:
        """Quick: asks the file system only when the heartbeat is late, as after SIGSTOP."""
        return time.monotonic() - self._beaten < 3 * BEAT_SECONDS or self.problem() is None

    def release(self) -> None:
        """Give the folder to others; what is another's by now stays."""
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        if self._thread.is_alive():
            return  # the file system does not answer
        if self.problem() is None:
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self._descriptor)

    def _beat(self) -> None:
        beat, warned = 0, False
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                folder_lock.write_beat(self._descriptor, self.owner, beat)
            except OSError as error:
                if not warned:
                    log.warning("cannot write %s any more (%s): others may take the run folder "
                                "for free", self.path, error.strerror)
                warned = True
            problem = self.problem()
            if problem is not None:
                self._on_loss()
                if not self._ended.wait(GRACE_SECONDS):
                    print(f"hvdnoise: error: {problem} (rank 0)", file=sys.stderr, flush=True)
                    os._exit(1)
                return
            self._beaten = time.monotonic()


def check(lock: FolderLock | None, world: World) -> None:
    """Raise FolderLost on all ranks when rank 0, the others giving None, has lost its lock.

    Collective.
    """
    problem = world.gather_json(lock and lock.problem(), name="folder.lock")[0]
    if problem is not None:
        raise FolderLost(f"{problem} ({world.places()[0]}); this run ends")


@contextlib.contextmanager
def held(choose: Callable[[], Iterable[Path]], world: World, on_loss: Callable[[], None]
         ) -> Iterator[tuple[Path, FolderLock | None]]:
    """Have a folder on all ranks: its path, and on rank 0 its lock. Collective.

    A folder that is made for it and is still empty at the end is removed again.

    Args:
        choose: called on rank 0: which folder; the next one is tried where one is in use. May
            raise a ValueError or OSError.
        on_loss: see `FolderLock`.

    Raises:
        ConfigError: on all ranks, when the folder cannot be had: it is in use, cannot be written,
            or is another one on another rank.
    """
    made: list[Path] = []
    locks: list[FolderLock] = []

    def take() -> list[str]:
        if world.rank > 0:
            return []
        lock = _take_first(choose(), made, on_loss)
        locks.append(lock)
        return [str(lock.path.parent), lock.path.name, lock.owner.token]
    try:
        chosen = call_or_raise(world, take)
        folder, name, token = world.gather_json(chosen, name="folder.taken")[0]
        call_or_raise(world, lambda: _see(Path(folder), name, token))
        yield Path(folder), locks[0] if locks else None
    finally:
        for lock in locks:
            lock.release()
        for path in reversed(made):
            with contextlib.suppress(OSError):  # it is in use by now
                path.rmdir()


def _take_first(folders: Iterable[Path], made: list[Path], on_loss: Callable[[], None]
                ) -> FolderLock:
    refused: FolderInUse | None = None
    for folder in folders:
        try:
            return _take(folder, made, on_loss)
        except FolderInUse as error:
            refused = error
    raise refused or ConfigError("name: too many runs of this name began in this second; give "
                                 "another one, or run_dir")


def _take(folder: Path, made: list[Path], on_loss: Callable[[], None]) -> FolderLock:
    """Make the folder, and lock it; ``made`` tells which folders are new."""
    for _ in range(10):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            for path in reversed(missing):
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
                    made.append(path)
            return FolderLock(folder, on_loss)
        except FileNotFoundError:  # another job, which was refused, has just removed it
            continue
        except OSError as error:
            raise ConfigError(f"run_dir={folder} cannot be written ({error.strerror}): give "
                              "another one") from error
    raise ConfigError(f"run_dir={folder} goes away again and again: give another one")


def _see(folder: Path, name: str, token: str) -> None:
    """Wait until this rank sees rank 0's lock.

    Raises:
        ConfigError: when it does not: then the folder is another one.
    """
    until = time.monotonic() + SEEN_SECONDS
    while not folder_lock.is_of(folder / name, token):
        if time.monotonic() > until:
            raise ConfigError(f"run_dir={folder} is not the folder that rank 0 has: give one in a "
                              "file system that all hosts share")
        time.sleep(0.2)
