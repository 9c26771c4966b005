"""Horovod's ranks as a `World`, its start and end, and what only Horovod has.

The only module that imports Horovod; `hvdnoise.comm` says when it is used.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, defaultdict
from contextlib import nullcontext
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from hvdnoise import watchdog
from hvdnoise.launched import environment, launched
from hvdnoise.limits import raise_gloo_timeout
from hvdnoise.ordering import FinishOrder
from hvdnoise.staging import StagingWorld
from hvdnoise.world import Handle, TransportError, group_of

# What Horovod reads where no launcher started this process.
ALONE = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo", "HOROVOD_GLOO_IFACE": "lo"}

POLL_SECONDS = 0.0002


class _HorovodHandle:
    def __init__(self, world: HorovodWorld, handle: Any, name: str, dtype: torch.dtype, *,
                 gathers: bool = False) -> None:
        self._world, self._handle, self._name, self._dtype = world, handle, name, dtype
        self._gathers = gathers

    def wait(self, poll: Callable[[], None] | None = None) -> Tensor:
        with self._world.watchdog.waiting_for(self._name):
            while poll is not None and not self.done():
                poll()
                time.sleep(POLL_SECONDS)
            try:
                result = self._world.hvd.synchronize(self._handle)
            except RuntimeError as error:
                if not self._gathers:
                    raise
                text = str(error).strip().splitlines()[0]
                raise RuntimeError(
                    f"{self._name!r} needs all ranks, and another one has failed or has called "
                    "hvd.join() (then give all ranks the same number of batches, or use a noise "
                    f'that needs only the allreduce, as GNC(source="own")): {text}') from error
        tensor: Tensor = result[0] if isinstance(result, tuple) else result  # of an alltoall
        return tensor.view(self._dtype)

    def done(self) -> bool:
        return bool(self._world.hvd.poll(self._handle))


class HorovodWorld(StagingWorld):
    """The ranks of a Horovod process set (default: all); Horovod must have been started."""

    def __init__(self, process_set: Any = None) -> None:
        hvd = self.hvd = _horovod()
        if not hvd.is_initialized():
            raise RuntimeError("Horovod has not been started: call hvd.init() or hvdnoise.init() "
                               "first")
        self.process_set = hvd.global_process_set if process_set is None else process_set
        self.included = bool(self.process_set.included())
        self.rank = self.process_set.rank() if self.included else -1
        self.size = self.process_set.size() if self.included else 0
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self.transport = "mpi" if hvd.mpi_enabled() else "gloo"
        self._ops = {"average": hvd.Average, "sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max,
                     "product": hvd.Product}
        self.watchdog = watchdog.begin(hvd.rank(), hvd.size())
        self._counts = _counts[self.process_set.process_set_id]
        self._order = _orders[self.process_set.process_set_id]

    @property
    def has_nccl(self) -> bool:
        """Whether Horovod has been built with NCCL."""
        return bool(self.hvd.nccl_built())

    def allreduce_(self, tensor: Tensor, *, name: str, op: str = "average",
                   prescale: float = 1.0, postscale: float = 1.0) -> Handle:
        def start(sent: Tensor, _: Tensor | None) -> Handle:
            return self._handle(self.hvd.allreduce_async_(
                sent, name=name, op=self._ops[op], prescale_factor=prescale,
                postscale_factor=postscale, process_set=self.process_set), name, sent)
        return self._start(start, tensor, tensor)

    def allgather(self, tensor: Tensor, *, name: str, out: Tensor | None = None) -> Handle:
        def start(sent: Tensor, into: Tensor | None) -> Handle:
            # Horovod's public function always allocates; the one beneath resizes what it is given
            return self._handle(self.hvd.mpi_ops._allgather_async(
                _wire(sent), _wire(_storage(sent, into)), name, self.process_set), name, sent,
                gathers=True)
        return self._start(start, tensor, out)

    def alltoall(self, tensor: Tensor, splits: Sequence[int], *, name: str,
                 out: Tensor | None = None) -> Handle:
        def start(sent: Tensor, into: Tensor | None) -> Handle:
            counts = torch.tensor(splits, dtype=torch.int32)
            return self._handle(self.hvd.mpi_ops._alltoall_async(
                _wire(sent), counts, _wire(_storage(sent, into)), torch.empty_like(counts), name,
                self.process_set), name, sent, gathers=True)
        return self._start(start, tensor, out)

    def broadcast_(self, tensor: Tensor, *, root: int, name: str) -> Handle:
        def start(sent: Tensor, _: Tensor | None) -> Handle:
            return self._handle(self.hvd.broadcast_async_(
                _wire(sent), self.process_set.ranks[root], name=name,
                process_set=self.process_set), name, sent)
        return self._start(start, tensor, tensor)

    def _handle(self, handle: Any, name: str, sent: Tensor, *, gathers: bool = False) -> Handle:
        return _HorovodHandle(self, handle, name, sent.dtype, gathers=gathers)

    def group(self, size: int) -> HorovodWorld:
        if self.size == size:
            return self
        ranks = [self.process_set.ranks[rank] for rank in group_of(self.rank, self.size, size)]
        known_sets = self.hvd.mpi_ops._basics._get_process_set_ids_and_ranks()
        for set_id, members in known_sets.items():
            if list(members) == ranks:
                known = self.hvd.ProcessSet(ranks)
                known.process_set_id = set_id
                return HorovodWorld(known)
        raise ValueError(f"Horovod has no process set of the ranks {ranks}: start with "
                         f"hvdnoise.init(group_size={size}), or hvd.init(process_sets=...)")


def _storage(tensor: Tensor, out: Tensor | None) -> Tensor:
    return tensor.new_empty(0) if out is None else out


def _wire(tensor: Tensor) -> Tensor:
    """What to send for a tensor that is not computed with: Horovod has no bfloat16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _horovod() -> Any:
    try:
        import horovod.torch as hvd
    except ModuleNotFoundError as error:
        if error.name != "horovod":
            raise
        raise TransportError("Horovod is not installed: start the ranks with torchrun, or install "
                             "Horovod") from error
    return hvd


_counts: defaultdict[int, Counter[str]] = defaultdict(Counter)  # by process set
_orders: defaultdict[int, FinishOrder] = defaultdict(FinishOrder)
given_comm = False  # whether `init` was given a communicator


def init(comm: Any, group_size: int | None) -> HorovodWorld:
    """`hvdnoise.comm.init`, over Horovod."""
    global given_comm
    hvd = _horovod()
    if comm is not None and not hasattr(comm, "Get_rank"):
        raise ValueError(f"comm={comm!r} is no mpi4py communicator: pass one, or nothing to use "
                         "all processes of the launcher")
    if hvd.is_initialized():
        if comm is not None and comm.Get_size() != hvd.size():
            raise ValueError(f"Horovod already runs on {hvd.size()} ranks, not on the "
                             f"{comm.Get_size()} of comm: call hvdnoise.init(comm) before "
                             "hvd.init()")
    else:
        size = comm.Get_size() if comm is not None else environment()["size"]
        groups = [group_of(first, size, group_size) for first in range(0, size, group_size)] \
            if group_size is not None and 1 < group_size < size else []
        if comm is None and not launched():  # alone: it needs no MPI runtime and no network
            for name, value in ALONE.items():
                os.environ.setdefault(name, value)
        watched = watchdog.begin(environment()["rank"], size)
        raise_gloo_timeout(watched.limits)
        with watched.phase("start"), watched.waiting_for("hvd.init"):
            hvd.init(comm=comm, process_sets=[hvd.ProcessSet(ranks) for ranks in groups])
    given_comm = comm is not None
    return HorovodWorld()


def running() -> bool:
    """Whether Horovod has been started in this process, by whomever; without importing it."""
    loaded = sys.modules.get("horovod.torch")
    return loaded is not None and bool(loaded.is_initialized())


def size() -> int:
    """How many ranks Horovod knows."""
    return int(_horovod().size())


def shutdown() -> None:
    """End Horovod in this process."""
    watched = watchdog.current()
    with watched.waiting_for("hvd.shutdown") if watched is not None else nullcontext():
        _horovod().shutdown()


def build_report() -> dict[str, Any]:
    """What the installed Horovod is and was built with."""
    import horovod
    hvd = _horovod()
    return {"horovod": horovod.__version__, "mpi_built": bool(hvd.mpi_built()),
            "gloo_built": bool(hvd.gloo_built()), "nccl_built": bool(hvd.nccl_built()),
            "cuda_built": bool(hvd.cuda_built())}


def adasum_optimizer(optimizer: torch.optim.Optimizer, **options: Any) -> torch.optim.Optimizer:
    """Horovod's own optimizer for op=Adasum, which reduces updates instead of gradients."""
    hvd = _horovod()
    given = {key: value for key, value in options.items() if value is not None}
    wrapped: torch.optim.Optimizer = hvd.DistributedOptimizer(optimizer, op=hvd.Adasum, **given)
    return wrapped


def horovod_optimizer(optimizer: torch.optim.Optimizer, named_parameters: Any,
                      **options: Any) -> torch.optim.Optimizer:
    """Horovod's own DistributedOptimizer, to compare with."""
    wrapped: torch.optim.Optimizer = _horovod().DistributedOptimizer(
        optimizer, named_parameters=named_parameters, **options)
    return wrapped
