"""Checkpoints beside the training: it stops for a copy of the state, and a thread writes the files.

One is under way at most. While it is, the ranks start a reduction at each step boundary of whether
they still write, and look at the one of the boundary before, so that nobody waits for it. All ranks
commit the checkpoint at the same boundary, or raise the same error. The copy has its own memory,
which the next one takes again.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import torch
from torch import Tensor

from hvdnoise import watchdog
from hvdnoise.comm import Handle, World
from hvdnoise.training import checkpoint
from hvdnoise.training.checkpoint import Facts, State

_NAME = "checkpoints"


@contextlib.contextmanager
def naming(folder: Path) -> Iterator[None]:
    """A CheckpointError names the run folder."""
    try:
        yield
    except checkpoint.NotFiniteError:  # has nothing to do with the folder
        raise
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"run folder {folder}: {error}") from error


class Saver:
    """Writes the checkpoints of a run. All methods are collective.

    Args:
        folder: the run folder, of which they go into ``checkpoints``.
        keep: how many.
        check: called before anything is made or renamed there.
    """

    def __init__(self, folder: Path, world: World, *, keep: int,
                 check: Callable[[], None] = lambda: None) -> None:
        self.step = -1  # that the last checkpoint, written or under way, is of
        self._folder, self._world, self._keep, self._check = folder, world, keep, check
        self._copy: Any = None
        self._part: Path | None = None  # of the one under way
        self._written: Future[Facts] = Future()
        self._pending: Handle | None = None  # the reduction of the boundary before

    def start(self, step: int, shared: State, own: State) -> None:
        """Copy the states, and begin to write them; the one under way is waited for.

        Raises:
            CheckpointError: on all ranks, for the one under way or this one.
        """
        self.wait()
        with watchdog.phase("checkpoint"):
            self._check()
            with naming(self._folder):
                checkpoint.gather_or_raise(self._world, "folder", self._make_folder)
                part = checkpoint.begin(self._folder / _NAME, step, self._world)
            rank = self._world.rank
            self._copy = shared, own = copied((None if rank else shared, own), self._copy)
            self.step, self._part, self._written = step, part, Future()
            _in_thread(self._written, partial(checkpoint.write, part, shared, own, rank))

    def poll(self) -> None:
        """Commit the checkpoint under way if all ranks have written; call it at each boundary.

        Raises:
            CheckpointError: on all ranks, when one could not write.
        """
        if self._part is None:
            return
        pending, self._pending = self._pending, None
        if self._world.size == 1:
            writing = not self._written.done()
        else:
            writing = pending is None or float(pending.wait()) > 0
        if not writing:
            self.wait()
        elif self._world.size > 1:
            self._pending = self._world.allreduce_(
                torch.tensor([float(not self._written.done())]), name="hvdnoise.saving", op="max")

    def wait(self) -> None:
        """Wait for the checkpoint under way, and commit it.

        Raises:
            CheckpointError: on all ranks, when one could not write.
        """
        part, self._part = self._part, None
        pending, self._pending = self._pending, None
        if part is None:
            return
        if pending is not None:
            pending.wait()
        with watchdog.phase("checkpoint"):
            self._check()
            with naming(self._folder):
                checkpoint.commit(part, self._written.result, self._world, keep=self._keep)

    def _make_folder(self) -> None:
        if self._world.rank == 0:  # not its parents: a run folder that has gone is not made anew
            (self._folder / _NAME).mkdir(exist_ok=True)


def copied(state: Any, memory: Any = None) -> Any:
    """A copy of a state on the CPU, of dicts, lists, tuples and tensors.

    Args:
        memory: an earlier copy, whose tensors are written to where they fit.
    """
    if isinstance(state, Tensor):
        state = state.detach()
        if isinstance(memory, Tensor) and memory.dtype == state.dtype \
                and memory.shape == state.shape:
            return memory.copy_(state)
        return state.to("cpu", copy=True)
    if isinstance(state, Mapping):
        before = memory if isinstance(memory, Mapping) else {}
        return {name: copied(each, before.get(name)) for name, each in state.items()}
    if isinstance(state, (list, tuple)):
        kept = list(memory) if isinstance(memory, (list, tuple)) else []
        kept += [None] * (len(state) - len(kept))
        return type(state)(copied(*both) for both in zip(state, kept))
    return state


def _in_thread(result: Future[Facts], action: Callable[[], Facts]) -> None:
    def run() -> None:
        try:
            result.set_result(action())
        except BaseException as error:  # for whoever asks for the result
            result.set_exception(error)
    threading.Thread(target=run, name="hvdnoise-checkpoint", daemon=True).start()
