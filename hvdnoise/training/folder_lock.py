"""One run in a folder at a time, also where several machines share it.

    RUN/lock-1.json      host, process, and a number that moves while the owner lives

The file is made by an exclusive creation, so of two jobs one gets it. The owner's heartbeat
(`hvdnoise.training.heartbeat`) writes the number anew every `BEAT_SECONDS`. Who takes over from a
dead owner makes the file of the next number, ``lock-2.json``, and then removes the first: of two
who do that at once one gets it, and no lock is ever replaced. The owner is who has the file with
the highest number. It is dead

- when it ran on this machine (boot and process namespace are equal) and its process is gone, or
  another process has its number by now;
- or when its file has not changed for `SILENT_SECONDS` by the watch of the one who waits. Clocks
  of two machines are never compared. Waiting is counted in wakings, so that a machine that was
  itself suspended takes nothing over.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hvdnoise.training.errors import ConfigError
from hvdnoise.training.owner import Owner, read_owner, this_process
from hvdnoise.training.progress import log

BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0
POLL_SECONDS = 0.25
_BYTES = 512  # of a lock's file: always the same, so that it is written in one piece
_NAME = re.compile(r"lock-([1-9][0-9]{0,8})\.json")
_ATTEMPTS = 10


class FolderInUse(ConfigError):
    """Another run is in the folder; one line that names its host and process."""


def is_name(name: str) -> bool:
    """Whether a file of this name is a lock."""
    return _NAME.fullmatch(name) is not None


def locks(folder: Path) -> dict[int, Path]:
    """The locks in a folder by their number."""
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    return {int(found[1]): folder / name for name in names if (found := _NAME.fullmatch(name))}


def owner_in(folder: Path) -> Owner | None:
    """Who has the folder and is not known to be dead; None where nobody has it."""
    for _, path in sorted(locks(folder).items(), reverse=True):
        with contextlib.suppress(OSError):
            owner = read_owner(_read(path))
            return None if owner.is_gone else owner
    return None


@dataclass(frozen=True)
class _Dead:
    """A lock whose owner is dead: its content, and words for that."""

    content: bytes | None
    reason: str


def take(folder: Path) -> tuple[Path, int, Owner]:
    """Have the folder, which exists, for this process.

    Takes over from a dead owner, which is said on one line.

    Returns:
        The lock's file, its descriptor for `write_beat`, and what it says of this process.

    Raises:
        FolderInUse: when another owner lives.
        OSError: when the folder cannot be written.
    """
    for _ in range(_ATTEMPTS):
        judged = {number: _wait_for_end(path) for number, path in locks(folder).items()}
        dead = {number: each for number, each in judged.items() if each is not None}
        if len(dead) < len(judged):  # one went away: look again
            continue
        path, mine = folder / f"lock-{max(dead, default=0) + 1}.json", this_process()
        descriptor = _create(path, mine)
        if descriptor is None:  # another job was quicker
            continue
        if not _others_are(dead, path):
            os.close(descriptor)
            path.unlink(missing_ok=True)
            continue
        for number, each in dead.items():
            log.warning("%s", each.reason)
            with contextlib.suppress(OSError):
                (folder / f"lock-{number}.json").unlink()
        return path, descriptor, mine
    raise FolderInUse(f"run_dir={folder} changes hands again and again: other jobs start in it; "
                      "give another one")


def _others_are(dead: dict[int, _Dead], mine: Path) -> bool:
    """Whether the other locks beside a new one are those that were looked at before it."""
    others = {number: path for number, path in locks(mine.parent).items() if path != mine}
    return others.keys() <= dead.keys() and all(
        _read_or_none(path) == dead[number].content for number, path in others.items())


def write_beat(descriptor: int, owner: Owner, beat: int) -> None:
    """Write a lock's content through its open file.

    Not by the name: if the lock was taken over, the new owner's is not touched.
    """
    text = json.dumps({**asdict(owner), "beat": beat})
    os.pwrite(descriptor, text.encode()[:_BYTES - 1].ljust(_BYTES - 1) + b"\n", 0)
    os.fsync(descriptor)


def problem(path: Path, mine: Owner) -> str | None:
    """Why the lock is no longer this process's; None while it is, or while that is not known."""
    folder = path.parent
    try:
        lost = read_owner(_read(path)).token != mine.token
    except (FileNotFoundError, NotADirectoryError):
        lost = True
    except OSError:  # a file system in trouble: the next checkpoint says so
        return None
    newer = max(locks(folder), default=0) > _number(path)
    if not lost and not newer:
        return None
    if not folder.is_dir():
        return f"the run folder {folder} is gone"
    other = owner_in(folder)
    if other is not None and other.token != mine.token:
        return f"the run folder {folder} was taken over by {other}"
    return (f"the run folder {folder} has lost its {path.name}: another run has been in it since, "
            "or somebody removed it")


def is_of(path: Path, token: str) -> bool:
    """Whether a lock is there and has this token."""
    return read_owner(_read_or_none(path) or b"").token == token


def _wait_for_end(path: Path) -> _Dead | None:
    """Return when the lock's owner is dead, or with None when the lock has gone.

    Raises:
        FolderInUse: as soon as the owner is known to live.
    """
    before: bytes | None = None
    polls = 0
    while polls * POLL_SECONDS < SILENT_SECONDS:
        if not os.path.lexists(path):
            return None
        content = _read_or_none(path)
        owner = read_owner(content or b"")
        had = f"{owner}, which had the run folder {path.parent},"
        if owner.is_gone:
            return _Dead(content, f"{had} has ended: taking it over")
        if polls and content != before or owner.is_running:
            raise FolderInUse(f"run_dir={path.parent} is in use by {owner}: wait for it or end it, "
                              "or give another folder")
        if polls == 4:
            log.info("%s has the run folder %s: waiting up to %g s for a sign of life", owner,
                     path.parent, SILENT_SECONDS)
        before, polls = content, polls + 1
        time.sleep(POLL_SECONDS)
    return _Dead(before, f"{had} has shown no sign of life for {SILENT_SECONDS:g} s: taking it "
                 "over")


def _create(path: Path, owner: Owner) -> int | None:
    """Make a lock's file; its descriptor, or None where it is there already."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return None
    try:
        write_beat(descriptor, owner, 0)
    except OSError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


def _number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _read(path: Path) -> bytes:
    """A lock's content now: a file that is opened anew is asked for at its server, too."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _BYTES)
    finally:
        os.close(descriptor)


def _read_or_none(path: Path) -> bytes | None:
    """None where it is no file, or cannot be read."""
    try:
        return _read(path)
    except OSError:
        return None
