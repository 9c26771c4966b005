"""A world of W threads in one process, with the interface of `hvdnoise.comm.World`.

    def work(world):
        return world.allreduce_(torch.tensor([world.rank]), name="x", op="sum").wait()

    first, second = run_threads(2, work)

What differs from Horovod, on purpose:

- Reductions go in rank order, so all ranks get the same bits, run after run.
- A collective fills its floating-point target (in place, or ``out``) with NaN until `wait`: who
  reads the result too early, or never waits, sees it every time and not once in a hundred.
- What is sent from elsewhere is read when the last rank arrives: who writes to it while it is on
  its way sends wrong numbers.
- A name may be used again only after the earlier collective of that name was waited for.
- A rank that does not come is named after ``timeout`` seconds; one that raised or returned ends
  the waits of the others at once.
- Ranks that ask for different things (op, shape, dtype, root) all get an error that shows both.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import Any, Callable, Sequence, TypeVar

import torch
from torch import Tensor

from hvdnoise.comm import Finished, Handle, World, group_of

Result = TypeVar("Result")
REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add, "average": torch.add, "product": torch.mul,
    "min": torch.minimum, "max": torch.maximum}


class WorldBroken(RuntimeError):
    """Another rank failed, so that this one's collective can never end."""


@dataclass
class _Collective:
    """One use of one name: what each rank asked for, and what came out."""

    asked: dict[int, tuple[Any, ...]] = field(default_factory=dict)   # must agree
    tensors: dict[int, Tensor] = field(default_factory=dict)
    splits: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of an alltoall
    results: dict[int, Tensor] = field(default_factory=dict)
    error: str | None = None
    waited: int = 0


class Meeting:
    """Where the threads of one world meet: all collectives by (name, how often it was used)."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout = size, timeout
        self._changed = threading.Condition()
        self._collectives: dict[tuple[str, int], _Collective] = {}
        self._gone: dict[int, BaseException | None] = {}  # rank -> what it raised, if it did
        self._groups: dict[tuple[int, int], Meeting] = {}

    def group(self, first: int, size: int) -> Meeting:
        """The meeting of the ranks from ``first`` on, the same for all of them."""
        with self._changed:
            return self._groups.setdefault((first, size), Meeting(size, self.timeout))

    def leave(self, rank: int, error: BaseException | None) -> None:
        with self._changed:
            self._gone[rank] = error
            self._changed.notify_all()

    def arrive(self, key: tuple[str, int], rank: int, asked: tuple[Any, ...],
               tensor: Tensor, splits: tuple[int, ...] = ()) -> None:
        with self._changed:
            collective = self._collectives.setdefault(key, _Collective())
            collective.asked[rank], collective.tensors[rank] = asked, tensor
            collective.splits[rank] = splits
            if len(collective.asked) == self.size:
                _finish(collective, key[0])
                self._changed.notify_all()

    def done(self, key: tuple[str, int]) -> bool:
        with self._changed:
            return (key not in self._collectives
                    or len(self._collectives[key].asked) == self.size)

    def wait(self, key: tuple[str, int], rank: int) -> Tensor:
        """A rank's result, which may be shared: copy it before writing. Once for each rank."""
        with self._changed:
            collective = self._collectives[key]

            def missing() -> set[int]:
                return set(range(self.size)) - set(collective.asked)

            self._changed.wait_for(lambda: not missing() or missing() & set(self._gone),
                                   self.timeout)
            if missing():
                raise self._missing(key[0], missing())
            collective.waited += 1
            if collective.waited == self.size:
                del self._collectives[key]
        if collective.error is not None:
            raise RuntimeError(collective.error)
        return collective.results[rank]

    def _missing(self, name: str, missing: set[int]) -> Exception:
        for rank in sorted(missing & set(self._gone)):
            error = self._gone[rank]
            if error is not None:
                return WorldBroken(f"{name!r}: rank {rank} will not come, it failed: {error!r}")
            return RuntimeError(f"{name!r}: rank {rank} will not come, it has returned")
        return TimeoutError(f"{name!r}: ranks {sorted(missing)} of {self.size} did not come "
                            f"within {self.timeout:g} s")


def _finish(collective: _Collective, name: str) -> None:
    asked = [collective.asked[rank] for rank in sorted(collective.asked)]
    if any(each != asked[0] for each in asked):
        collective.error = f"{name!r}: the ranks do not agree: {dict(enumerate(asked))}"
        return
    tensors = [collective.tensors[rank] for rank in sorted(collective.tensors)]
    kind, *options = asked[0]
    ranks = range(len(tensors))
    if kind == "alltoall":
        parts = [tensors[rank].split(collective.splits[rank]) for rank in ranks]
        collective.results = {rank: torch.cat([part[rank] for part in parts]) for rank in ranks}
    elif kind == "allreduce":
        collective.results = dict.fromkeys(ranks, _reduce(tensors, *options[:3]))
    elif kind == "allgather":
        collective.results = dict.fromkeys(ranks, torch.cat(tensors))
    else:
        collective.results = dict.fromkeys(ranks, tensors[options[0]])
    collective.tensors.clear()


def _reduce(tensors: list[Tensor], op: str, prescale: float, postscale: float) -> Tensor:
    scaled = [tensor * prescale for tensor in tensors] if prescale != 1.0 else tensors
    total = scaled[0]
    for tensor in scaled[1:]:
        total = REDUCTIONS[op](total, tensor)
    if op == "average":
        postscale /= len(tensors)
    return (total * postscale if postscale != 1.0 else total).to(tensors[0].dtype)


class _ThreadHandle:
    def __init__(self, world: ThreadWorld, key: tuple[str, int], target: Tensor | None) -> None:
        self._world, self._key, self._target = world, key, target

    def wait(self, poll: Callable[[], None] | None = None) -> Tensor:
        until = time.monotonic() + self._world.meeting.timeout
        while poll is not None and not self.done() and time.monotonic() < until:
            poll()
            time.sleep(0.0002)
        result = self._world.meeting.wait(self._key, self._world.rank)
        self._world.in_flight.discard(self._key[0])
        if self._target is None:
            return result.clone()
        with torch.no_grad():
            return self._target.copy_(result)

    def done(self) -> bool:
        return self._world.meeting.done(self._key)


class ThreadWorld(World):
    """One rank of a world of threads; the ranks share a `Meeting`, each used by one thread."""

    def __init__(self, meeting: Meeting, rank: int, local_size: int | None = None) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.size
        self.local_size = local_size or meeting.size
        self.local_rank = rank % self.local_size
        self.in_flight: set[str] = set()
        self._uses: dict[str, int] = {}

    def allreduce_(self, tensor: Tensor, *, name: str, op: str = "average",
                   prescale: float = 1.0, postscale: float = 1.0) -> Handle:
        if op not in REDUCTIONS:
            raise ValueError(f"op={op!r}: one of {', '.join(REDUCTIONS)}")
        asked = ("allreduce", op, prescale, postscale, tuple(tensor.shape), tensor.dtype)
        return self._start(asked, tensor, name, tensor)

    def allgather(self, tensor: Tensor, *, name: str, out: Tensor | None = None) -> Handle:
        asked = ("allgather", tuple(tensor.shape[1:]), tensor.dtype)
        return self._start(asked, tensor, name, out)

    def alltoall(self, tensor: Tensor, splits: Sequence[int], *, name: str,
                 out: Tensor | None = None) -> Handle:
        if len(splits) != self.size or sum(splits) != len(tensor):
            raise ValueError(f"splits={splits} of {len(tensor)} entries among {self.size} ranks")
        asked = ("alltoall", tuple(tensor.shape[1:]), tensor.dtype)
        return self._start(asked, tensor, name, out, tuple(splits))

    def broadcast_(self, tensor: Tensor, *, root: int, name: str) -> Handle:
        asked = ("broadcast", root, tuple(tensor.shape), tensor.dtype)
        return self._start(asked, tensor, name, tensor)

    def group(self, size: int) -> ThreadWorld:
        ranks = group_of(self.rank, self.size, size)
        return ThreadWorld(self.meeting.group(ranks.start, size), self.rank - ranks.start)

    def _start(self, asked: tuple[Any, ...], tensor: Tensor, name: str, target: Tensor | None,
               splits: tuple[int, ...] = ()) -> Handle:
        if self.size == 1:
            return Finished(tensor)
        if name in self.in_flight:
            raise ValueError(f"{name!r} is still in flight on rank {self.rank}: wait for it "
                             "before its name is used again")
        self.in_flight.add(name)
        self._uses[name] = self._uses.get(name, 0) + 1
        key = (name, self._uses[name])
        sent = tensor.detach()
        if target is tensor:
            sent = sent.clone()
        if target is not None and target.is_floating_point():
            target.detach().fill_(float("nan"))
        self.meeting.arrive(key, self.rank, asked, sent, splits)
        return _ThreadHandle(self, key, target)


def run_threads(size: int, work: Callable[[ThreadWorld], Result], *, timeout: float = 60,
                local_size: int | None = None) -> list[Result]:
    """Run ``work(world)`` in ``size`` threads, one a rank, and return the results in rank order.

    Raises: the exception of the rank that failed first, with a note that names the rank;
        TimeoutError with each stuck rank's stack when a rank has not returned after ``timeout``.
    """
    meeting = Meeting(size, timeout)
    results: dict[int, Result] = {}
    failures: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadWorld(meeting, rank, local_size))
            meeting.leave(rank, None)
        except BaseException as error:  # also SystemExit, which a thread would swallow
            failures.append((rank, error))
            meeting.leave(rank, error)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True)
               for rank in range(size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout + 2  # a wait in a collective times out first
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if failures:
        own = [each for each in failures if not isinstance(each[1], WorldBroken)]
        rank, error = (own or failures)[0]
        note = f"[rank {rank} of {size}; failed: {sorted(rank for rank, _ in failures)}]"
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(note)
        raise error
    if len(results) < size:
        raise TimeoutError(_stuck(threads, timeout))
    return [results[rank] for rank in range(size)]


def _stuck(threads: list[threading.Thread], timeout: float) -> str:
    frames = sys._current_frames()
    lines = [f"not finished after {timeout:g} s:"]
    for thread in threads:
        if thread.is_alive() and thread.ident in frames:
            stack = "".join(traceback.format_stack(frames[thread.ident])[-4:])
            lines.append(f"{thread.name}, now at\n{stack}")
    return "\n".join(lines)
