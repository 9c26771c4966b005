"""torch.distributed's ranks as a `World`: Gloo for what is in the host's memory, NCCL for GPUs.

Names are negotiated (`hvdnoise.negotiation`), and a thread starts what all ranks have asked for. A
mean is a sum that is multiplied, as Horovod's is. What is not computed with travels as bytes.
`hvdnoise.comm` says when this is used.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import socket
import threading
import time
from datetime import timedelta
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hvdnoise import watchdog
from hvdnoise.launched import environment
from hvdnoise.negotiation import Negotiator, connect
from hvdnoise.staging import StagingWorld
from hvdnoise.world import Handle, RanksLost, group_of

LEAVE_SECONDS = 5.0  # that a rank waits for the others at its end
_MARGIN_SECONDS = 60.0  # beyond the limits of the watchdog, which is to be the first to speak
_LONGEST_SECONDS = 10.0 ** 8
_LAST_SECONDS = 1.0  # for what is on its way when a rank is found lost, and for news of a loss
_POLL_SECONDS = 0.0002
_TOLD_BYTES = 1024  # of what rank 0 says at the start
_OPS = {"average": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN,
        "max": dist.ReduceOp.MAX, "product": dist.ReduceOp.PRODUCT}
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
Start = Callable[[list[int]], tuple[Any, Callable[[], Tensor]]]


class _TorchHandle:
    """A collective that this rank has asked for: a `hvdnoise.negotiation.Request`.

    Args:
        start: given what each rank sends to this one, starts it; its work (None: there is nothing
            to do), and what gives the result once that is finished.
    """

    def __init__(self, world: TorchWorld, name: str, device: torch.device, start: Start) -> None:
        self._world, self._name, self._device, self._start = world, name, device, start
        self._asked = threading.Event()  # by all ranks, or failed
        self._work: Any = None
        self._error: Exception | None = None
        self._finish: Callable[[], Tensor]
        self._result: Tensor | None = None
        # another thread starts the work of a GPU, after what this one has asked of it
        self._before = torch.cuda.current_stream(device).record_event() \
            if device.type == "cuda" else None

    def begin(self, sizes: list[int]) -> None:
        try:
            with self._world.stream_after(self._before, self._device), torch.no_grad():
                self._work, self._finish = self._start(sizes)
        except Exception as error:
            self._error = RuntimeError(f"{self._name!r} cannot be started: {_first_line(error)}")
        self._asked.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._asked.set()

    def done(self) -> bool:
        return self._asked.is_set() and (self._work is None or bool(self._work.is_completed()))

    @torch.no_grad()
    def wait(self, poll: Callable[[], None] | None = None) -> Tensor:
        if self._result is None:
            with self._world.watchdog.waiting_for(self._name):
                while not self._asked.wait(_POLL_SECONDS if poll is not None else None):
                    if poll is not None:
                        poll()
                if self._error is not None:
                    raise self._error
                if self._work is not None:
                    self._wait_for_work(poll)
            self._result = self._finish()
        return self._result

    def _wait_for_work(self, poll: Callable[[], None] | None) -> None:
        until = math.inf
        while not self._work.is_completed():
            if poll is not None:
                poll()
            if poll is not None or self._before is not None:
                time.sleep(_POLL_SECONDS)
            else:
                with contextlib.suppress(RuntimeError):  # not yet; a failure raises again below
                    self._work.wait(timedelta(seconds=_LAST_SECONDS))
            if self._world.lost and until == math.inf:
                until = time.monotonic() + _LAST_SECONDS
            if time.monotonic() > until:
                raise RanksLost(f"{self._name!r}: {self._world.lost}")
        try:
            self._work.wait()
        except RuntimeError as error:
            until = time.monotonic() + _LAST_SECONDS
            while not self._world.lost and time.monotonic() < until:
                time.sleep(0.01)
            raise RanksLost(f"{self._name!r}: {self._world.lost or _first_line(error)}") from error


class TorchWorld(StagingWorld):
    """All ranks of torch.distributed, or some neighbours among them.

    Args:
        ranks: of all; those of this world.
        process_groups: of these ranks, by the kind of device.
        negotiator: of all ranks; None where there is one.
        local: local rank and local size.
    """

    transport = "torch"

    def __init__(self, rank: int, ranks: range, process_groups: dict[str, Any],
                 negotiator: Negotiator | None, watched: watchdog.Watchdog,
                 local: tuple[int, int] = (0, 1)) -> None:
        self.rank, self.size = rank - ranks.start, len(ranks)
        self.local_rank, self.local_size = local
        self.watchdog = watched
        self._ranks, self._process_groups, self._negotiator = ranks, process_groups, negotiator
        self._groups: dict[int, TorchWorld] = {}
        self._streams: dict[torch.device, Any] = {}

    @property
    def lost(self) -> str:
        """Which rank is lost, in words; empty while none is."""
        return self._negotiator.lost if self._negotiator is not None else ""

    @property
    def has_nccl(self) -> bool:
        """Whether all ranks have NCCL and a GPU."""
        return "cuda" in self._process_groups

    def allreduce_(self, tensor: Tensor, *, name: str, op: str = "average",
                   prescale: float = 1.0, postscale: float = 1.0) -> Handle:
        if op not in _OPS:
            raise ValueError(f"op={op!r} is no reduction of torch.distributed: use one of "
                             f"{', '.join(_OPS)}")
        after = postscale / self.size if op == "average" else postscale

        def begin(sent: Tensor) -> Handle:
            flat = sent.detach().contiguous()

            def start(_: list[int]) -> tuple[Any, Callable[[], Tensor]]:
                _scale(flat, prescale)
                return dist.all_reduce(flat, op=_OPS[op], group=self._group_of(flat),
                                       async_op=True) if flat.numel() else None, finish

            def finish() -> Tensor:
                _scale(flat, after)
                return _into(sent, flat)
            return self._ask(name, f"allreduce, {op}, of {_kind(sent)}, scaled by {prescale:g} and "
                                   f"{postscale:g}", (), flat, start)
        return self._start(lambda sent, _: begin(sent), tensor, tensor)

    def broadcast_(self, tensor: Tensor, *, root: int, name: str) -> Handle:
        def begin(sent: Tensor) -> Handle:
            flat = sent.detach().contiguous()

            def start(_: list[int]) -> tuple[Any, Callable[[], Tensor]]:
                return dist.broadcast(_bytes(flat), src=self._ranks[root], group=self._group_of(
                    flat), async_op=True) if flat.numel() else None, lambda: _into(sent, flat)
            return self._ask(name, f"broadcast of rank {root}'s {_kind(sent)}", (), flat, start)
        return self._start(lambda sent, _: begin(sent), tensor, tensor)

    def allgather(self, tensor: Tensor, *, name: str, out: Tensor | None = None) -> Handle:
        def begin(sent: Tensor, into: Tensor | None) -> Handle:
            flat = sent.detach().contiguous()

            def start(rows: list[int]) -> tuple[Any, Callable[[], Tensor]]:
                result, most = _room(flat, sum(rows), into), max(rows)
                group = self._group_of(flat)
                if result.numel() == 0:
                    return None, lambda: result
                if min(rows) == most:
                    return _gather(_bytes(result), _bytes(flat), group=group,
                                   async_op=True), lambda: _used(result)
                padded = flat.new_zeros(most, *flat.shape[1:])
                padded[:len(flat)] = flat
                everyone = flat.new_empty(len(rows) * most, *flat.shape[1:])

                def finish() -> Tensor:
                    parts = _used(everyone).split(most)
                    torch.cat([part[:count] for part, count in zip(parts, rows)], out=result)
                    return _used(result)
                return _gather(_bytes(everyone), _bytes(padded), group=group,
                               async_op=True), finish
            return self._ask(name, f"allgather of {_kind(sent, rows=False)}", (len(sent),), flat,
                             start)
        return self._start(begin, tensor, out)

    def alltoall(self, tensor: Tensor, splits: Sequence[int], *, name: str,
                 out: Tensor | None = None) -> Handle:
        if len(splits) != self.size or sum(splits) != len(tensor):
            raise ValueError(f"splits={list(splits)} of {len(tensor)} entries among {self.size} "
                             "ranks: give one for each rank, which add up")

        def begin(sent: Tensor, into: Tensor | None) -> Handle:
            flat = sent.detach().contiguous()

            def start(rows: list[int]) -> tuple[Any, Callable[[], Tensor]]:
                result, row = _room(flat, sum(rows), into), math.prod(flat.shape[1:]) * \
                    flat.element_size()
                return dist.all_to_all_single(
                    _bytes(result), _bytes(flat), [each * row for each in rows],
                    [each * row for each in splits], group=self._group_of(flat), async_op=True
                ), lambda: _used(result)
            return self._ask(name, f"alltoall of {_kind(sent, rows=False)}", splits, flat, start)
        return self._start(begin, tensor, out)

    def _ask(self, name: str, facts: str, sizes: Sequence[int], tensor: Tensor, start: Start
             ) -> Handle:
        assert self._negotiator is not None
        handle = _TorchHandle(self, name, tensor.device, start)
        self._negotiator.ask(self._ranks, name, f"{facts} on {tensor.device.type}", sizes, handle)
        return handle

    def _group_of(self, tensor: Tensor) -> Any:
        return self._process_groups[tensor.device.type]

    @contextlib.contextmanager
    def stream_after(self, event: Any, device: torch.device) -> Iterator[None]:
        """What is started inside comes after a GPU's event; None: nothing is of a GPU."""
        if event is None:
            yield
            return
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_event(event)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield

    def group(self, size: int) -> TorchWorld:
        if self.size == size:
            return self
        group_of(self.rank, self.size, size)
        if size not in self._groups:
            raise ValueError(f"torch.distributed has no process groups of {size} ranks here: start "
                             f"with hvdnoise.init(group_size={size})")
        return self._groups[size]

    def make_groups(self, size: int) -> None:
        """Make the groups of so many consecutive ranks. Collective."""
        if not 1 < size < self.size or size in self._groups:
            return
        made: list[TorchWorld] = []
        for first in range(0, self.size, size):
            ranks = group_of(first, self.size, size)
            groups = {kind: dist.new_group(list(ranks), backend=backend, timeout=_limit())
                      for kind, backend in _BACKENDS.items() if kind in self._process_groups}
            if self.rank in ranks:
                made.append(TorchWorld(self.rank, ranks, groups, self._negotiator, self.watchdog,
                                       (self.local_rank, self.local_size)))
        self._groups[size], = made

    def leave(self, seconds: float) -> None:
        """Take part in nothing more; wait until no rank does."""
        if self._negotiator is not None:
            self._negotiator.leave(seconds)


_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def _scale(tensor: Tensor, factor: float) -> None:
    if factor != 1 and tensor.is_floating_point():
        tensor.mul_(factor)
    elif factor != 1:
        tensor.copy_(tensor.double() * factor)


def _into(target: Tensor, flat: Tensor) -> Tensor:
    if flat.data_ptr() != target.data_ptr():
        target.copy_(flat)
    return target


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _room(sent: Tensor, rows: int, out: Tensor | None) -> Tensor:
    """Where a result of so many rows is to be."""
    shape = rows, *sent.shape[1:]
    return sent.new_empty(shape) if out is None else out.detach().view(shape)


def _used(tensor: Tensor) -> Tensor:
    """A tensor of another stream's, which this one is about to read."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


def _kind(tensor: Tensor, *, rows: bool = True) -> str:
    """What must be alike on all ranks, in words."""
    shape = tuple(tensor.shape) if rows else ("any", *tensor.shape[1:])
    return f"{str(tensor.dtype).removeprefix('torch.')} of the shape {shape}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------- of this process

_world: TorchWorld | None = None
_started_here = False  # torch.distributed, by this module


def running() -> bool:
    """Whether there is a world, or one can be had without a launcher's help."""
    return _world is not None or dist.is_initialized()


def world(group_size: int | None = None) -> TorchWorld:
    """The world of all ranks; the first call starts it, and torch.distributed. Collective.

    Args:
        group_size: see `hvdnoise.comm.init`.
    """
    global _world
    if _world is None:
        _world = _begin()
        atexit.register(shutdown)
    if group_size is not None:
        _world.make_groups(group_size)
    return _world


def _begin() -> TorchWorld:
    global _started_here
    given = environment()
    if not running() and given["size"] == 1:
        return TorchWorld(0, range(1), {}, None, watchdog.begin(0, 1))
    watched = watchdog.begin(given["rank"], given["size"])
    with watched.phase("start"), watched.waiting_for("torch.distributed.init_process_group"):
        if not running():
            dist.init_process_group("gloo", timeout=_limit())
            _started_here = True
        rank, size = dist.get_rank(), dist.get_world_size()
        watched = watchdog.begin(rank, size)
        if size == 1:
            return TorchWorld(0, range(1), {}, None, watched)
        gloo = dist.new_group(backend="gloo", timeout=_limit())  # the loop may use the other one
        negotiator = connect(rank, size, lambda value: _told_by_rank_0(value, gloo))
        made = TorchWorld(rank, range(size), {"cpu": gloo}, negotiator, watched)
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        everyone = made.gather_json([socket.gethostname(), nccl], name="hvdnoise.start")
        hosts = [host for host, _ in everyone]
        made.local_rank, made.local_size = hosts[:rank].count(hosts[rank]), hosts.count(hosts[rank])
        if all(has for _, has in everyone):
            made._process_groups["cuda"] = dist.new_group(backend="nccl", timeout=_limit())
    return made


def _told_by_rank_0(value: Any, group: Any) -> Any:
    told = torch.zeros(_TOLD_BYTES, dtype=torch.uint8)
    if value is not None:
        text = json.dumps(value).encode()
        told[:len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    dist.broadcast(told, src=0, group=group)
    return json.loads(bytes(told.tolist()).rstrip(b"\0"))


def _limit() -> timedelta:
    """Of torch.distributed itself: beyond those of the watchdog."""
    current = watchdog.current()
    longest = current.limits.longest if current is not None else math.inf
    return timedelta(seconds=min(longest, _LONGEST_SECONDS) + _MARGIN_SECONDS)


def shutdown() -> None:
    """End the world in this process, and torch.distributed, if it was started here."""
    global _world, _started_here
    if _world is None:
        return
    ended, _world = _world, None
    with ended.watchdog.waiting_for("the other ranks' end"):
        ended.leave(LEAVE_SECONDS)
        if _started_here and not ended.lost and dist.is_initialized():
            dist.destroy_process_group()
    _started_here = False
