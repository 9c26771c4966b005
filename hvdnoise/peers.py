"""What a rank can tell of the others without asking them: for the last words of a run.

On its own host it looks at the processes: a rank may be stopped or gone. With a folder that all
ranks share it reads ``rank-N.state``, which a thread on each rank writes anew every few seconds:
where the rank stands, or why it has ended. A file that is old is of a rank that is stopped, gone or
cut off. Nothing here waits for another rank; all that touches the folder may hang where its file
system does, so none of it is done by the thread of the watchdog before it has decided to end.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any, Callable

from hvdnoise.launched import environment, job

FOLLOWS = "follows another"
MOST_NAMED = 8  # ranks in one message
_LONGEST_PERIOD = 60.0
_OLD_PERIODS = 4  # a file that is older is of a rank that does not write any more


class Peers:
    """The other ranks, as seen from one.

    Args:
        rank: this rank.
        size: how many there are.
        position: says where this rank stands: a text, equal on ranks that stand at the same place.
        limit: the shortest time, in seconds, after which a rank may want to know.
    """

    def __init__(self, rank: int, size: int, position: Callable[[], str], limit: float) -> None:
        self.rank, self.size = rank, size
        self._position = position
        self._period = min(_LONGEST_PERIOD, limit / 8) if limit > 0 else _LONGEST_PERIOD
        self._path: Path | None = None
        self._ended = ""
        self._closed = threading.Event()
        self._writing = threading.Lock()

    def share(self, folder: Path) -> None:
        """Begin to write this rank's state into ``folder``, which exists."""
        self._path = folder / f"rank-{self.rank}.state"
        self._closed.clear()
        threading.Thread(target=self._write_again, name="hvdnoise-state", daemon=True).start()

    def close(self) -> None:
        """Stop, and remove this rank's file."""
        self._closed.set()
        with self._writing:
            path, self._path = self._path, None
            if path is not None:
                path.unlink(missing_ok=True)

    def end(self, cause: str = FOLLOWS) -> None:
        """Leave word of why this rank ends: "failed in ..."; by default, as another has ended."""
        self._ended = self._ended or cause
        self._write()

    def account(self, *, lost: bool = False) -> str:
        """What is known of ranks that are not where this one is; empty where it is nothing.

        Args:
            lost: only ranks that are gone, or have ended for a cause of their own.
        """
        self._write()
        here = local_ranks()
        tell = self._loss if lost else self._tell
        found = {rank: text for rank in range(self.size) if rank != self.rank
                 and (text := tell(rank, here))}
        texts = [f"rank {rank} {text}" for rank, text in list(found.items())[:MOST_NAMED]]
        if len(found) > MOST_NAMED:
            texts.append(f"and {len(found) - MOST_NAMED} more")
        return "; ".join(texts)

    def _loss(self, rank: int, here: dict[int, str]) -> str:
        state, _ = self._read(rank)
        if state.get("ended"):
            return "" if state["ended"] == FOLLOWS else str(state["ended"])
        given = environment()
        on_this_host = given["local_size"] == given["size"] or \
            state.get("host") == socket.gethostname()
        if here and given["size"] == self.size and on_this_host and rank not in here:
            return "is gone: it was killed, crashed, or left without a word"
        return ""

    def _tell(self, rank: int, here: dict[int, str]) -> str:
        if text := self._loss(rank, here):
            return text
        state, age = self._read(rank)
        if state.get("ended"):
            return ""
        if here.get(rank) == "T" and environment()["size"] == self.size:
            return "is stopped"
        if not state:
            return "" if self._path is None or age is None else "gave no sign of life"
        if age is not None and age > _OLD_PERIODS * self._period:
            return f"gave no sign of life for {age:.0f} s (process {state.get('process')} on " \
                   f"{state.get('host')})"
        at = str(state.get("position"))
        return f"is {at}" if at != self._position() else ""

    # ------------------------------------------------------------------ the files

    def _write_again(self) -> None:
        while True:
            self._write()
            if self._closed.wait(self._period):
                return

    def _write(self) -> None:
        with self._writing:
            if self._path is None:
                return
            part = self._path.with_suffix(".state.part")
            try:
                part.write_text(json.dumps({
                    "launch": job(), "process": os.getpid(), "host": socket.gethostname(),
                    "position": self._position(), "ended": self._ended}))
                part.replace(self._path)
            except OSError:
                pass  # the folder is gone or full: then less is known

    def _read(self, rank: int) -> tuple[dict[str, Any], float | None]:
        """A rank's state ({} without one), and how much older it is than this rank's, in seconds
        (None where this rank has none)."""
        if self._path is None:
            return {}, None
        other = self._path.with_name(f"rank-{rank}.state")
        try:
            own = self._path.stat().st_mtime
        except OSError:
            return {}, None
        try:
            state = json.loads(other.read_text())
            of_now = isinstance(state, dict) and state.get("launch") == job()
            return (state if of_now else {}), own - other.stat().st_mtime
        except (OSError, ValueError):
            return {}, 0.0


def local_ranks() -> dict[int, str]:
    """The ranks of this launch that have a process on this host, and its state's letter (T: it is
    stopped); empty where no launcher tells one launch from another."""
    own, found = job(), dict[int, str]()
    if not own or not Path("/proc").is_dir():
        return found
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            variables = dict(word.partition("=")[::2] for word in words if word)
            if job(variables) != own or b"multiprocessing" in (entry / "cmdline").read_bytes():
                continue  # another launch's, or a helper of a rank
            state = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            rank = environment(variables)["rank"]
        except (OSError, IndexError, ValueError):  # ended meanwhile, or another user's
            continue
        if state not in "ZX":
            found[rank] = max(found.get(rank, ""), state, key=lambda each: each == "T")
    return found
