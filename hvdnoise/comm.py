"""Horovod's ranks as a `World`, and its start and end.

The only module that imports Horovod or mpi4py. Everything else works on a `World`
(`hvdnoise.world`): `HorovodWorld` here, and in the tests a world of threads with the same
attributes, so that the whole method runs in one process under a debugger.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
import warnings
import weakref
from collections import Counter, defaultdict
from contextlib import nullcontext
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from hvdnoise import watchdog
from hvdnoise.launched import environment, launched
from hvdnoise.limits import raise_gloo_timeout
from hvdnoise.ordering import FinishOrder
from hvdnoise.world import Finished, Handle, World, group_of, handshake

__all__ = ["ALONE", "Finished", "Handle", "HorovodWorld", "World", "adasum_optimizer",
           "before_shutdown", "build_report", "environment", "group_of", "handshake",
           "horovod_optimizer", "init", "launched", "op_name", "shutdown"]

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


class _StagedHandle:
    """A collective on a copy in the host's memory."""

    def __init__(self, handle: Handle, device: torch.device, target: Tensor | None) -> None:
        self._handle, self._device, self._target = handle, device, target

    def wait(self, poll: Callable[[], None] | None = None) -> Tensor:
        result = self._handle.wait(poll)
        if self._target is None:
            return result.to(self._device)
        return self._target.copy_(result.view(self._target.shape))

    def done(self) -> bool:
        return self._handle.done()


class HorovodWorld(World):
    """The ranks of a Horovod process set (default: all); Horovod must have been started.

    NCCL takes one rank a GPU. Where several share one, what they exchange goes through the host's
    memory, with a warning; and without NCCL.
    """

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
        self._shared_gpu: bool | None = None  # not known yet
        self._counts = _counts[self.process_set.process_set_id]
        self._order = _orders[self.process_set.process_set_id]

    def allreduce_(self, tensor: Tensor, *, name: str, op: str = "average",
                   prescale: float = 1.0, postscale: float = 1.0) -> Handle:
        def start(sent: Tensor, _: Tensor | None) -> Any:
            return self.hvd.allreduce_async_(
                sent, name=name, op=self._ops[op], prescale_factor=prescale,
                postscale_factor=postscale, process_set=self.process_set)
        return self._start(start, tensor, name, tensor)

    def allgather(self, tensor: Tensor, *, name: str, out: Tensor | None = None) -> Handle:
        def start(sent: Tensor, into: Tensor | None) -> Any:
            # Horovod's public function always allocates; the one beneath resizes what it is given
            return self.hvd.mpi_ops._allgather_async(_wire(sent), _wire(_storage(sent, into)), name,
                                                     self.process_set)
        return self._start(start, tensor, name, out, gathers=True)

    def alltoall(self, tensor: Tensor, splits: Sequence[int], *, name: str,
                 out: Tensor | None = None) -> Handle:
        def start(sent: Tensor, into: Tensor | None) -> Any:
            counts = torch.tensor(splits, dtype=torch.int32)
            return self.hvd.mpi_ops._alltoall_async(
                _wire(sent), counts, _wire(_storage(sent, into)), torch.empty_like(counts), name,
                self.process_set)
        return self._start(start, tensor, name, out, gathers=True)

    def broadcast_(self, tensor: Tensor, *, root: int, name: str) -> Handle:
        def start(sent: Tensor, _: Tensor | None) -> Any:
            return self.hvd.broadcast_async_(_wire(sent), self.process_set.ranks[root], name=name,
                                             process_set=self.process_set)
        return self._start(start, tensor, name, tensor)

    def _start(self, start: Callable[[Tensor, Tensor | None], Any], tensor: Tensor, name: str,
               target: Tensor | None, *, gathers: bool = False) -> Handle:
        """``start(sent, storage of the result)``, on the device or through the host."""
        if self.size == 1:
            return Finished(tensor)
        if not self._through_host(tensor):
            return _HorovodHandle(self, start(tensor, target), name, tensor.dtype, gathers=gathers)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        host.copy_(tensor)
        handle = _HorovodHandle(self, start(host, None), name, tensor.dtype, gathers=gathers)
        return _StagedHandle(handle, tensor.device, target)

    def _through_host(self, tensor: Tensor) -> bool:
        if not tensor.is_cuda:
            return False
        if not self.hvd.nccl_built():
            return True  # Horovod would, but a thread of its own would write into the gradients
        if self._shared_gpu is None:
            properties = torch.cuda.get_device_properties(tensor.device)
            mine = [socket.gethostname(), str(getattr(properties, "uuid", tensor.device.index))]
            everyone = self.gather_json(mine, name="hvdnoise.gpus")
            self._shared_gpu = len({tuple(each) for each in everyone}) < self.size
            if self._shared_gpu and self.rank == 0:
                warnings.warn("several ranks share a GPU, which NCCL does not do: gradients go "
                              "through the host's memory; start one rank a GPU to use NCCL",
                              stacklevel=2)
        return self._shared_gpu

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
    import horovod.torch as hvd
    return hvd


_counts: defaultdict[int, Counter[str]] = defaultdict(Counter)  # by process set
_orders: defaultdict[int, FinishOrder] = defaultdict(FinishOrder)


def init(comm: Any = None, *, group_size: int | None = None) -> HorovodWorld:
    """Start Horovod, unless it runs already, and return the world of all its ranks.

    Args:
        group_size: make groups of so many consecutive ranks, for the exchange plan "group"; the
            whole of the ranks must divide into them.
        comm: an mpi4py communicator (COMM_WORLD or a part of it) whose processes become the
            ranks, for programs that use MPI for other things too; default: all processes that
            the launcher started. Every process of ``comm`` must call this, and no other.

    Raises:
        ValueError: when ``comm`` is no communicator, Horovod was started already without it, or
            ``HVDNOISE_TIMEOUT`` or another limit in the environment is none (`hvdnoise.limits`).
    """
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
    return HorovodWorld()


def shutdown() -> None:
    """End Horovod in this process."""
    _finish_late()
    watched = watchdog.current()
    with watched.waiting_for("hvd.shutdown") if watched is not None else nullcontext():
        _horovod().shutdown()


_late: list[weakref.WeakMethod[Callable[[], None]]] = []


def before_shutdown(finish: Callable[[], None]) -> None:
    """Have a bound method called before Horovod ends in this process, unless its object is gone.

    For collectives that nobody waits for any more: the other ranks may still take part in them.
    """
    if not _late:
        atexit.register(_finish_late)  # after Horovod's own, so it is called before
    _late.append(weakref.WeakMethod(finish))


def _finish_late() -> None:
    while _late:
        finish = _late.pop()()
        if finish is not None:
            finish()


def build_report() -> dict[str, Any]:
    """What the installed Horovod is and was built with."""
    import horovod
    hvd = _horovod()
    return {"horovod": horovod.__version__, "mpi_built": bool(hvd.mpi_built()),
            "gloo_built": bool(hvd.gloo_built()), "nccl_built": bool(hvd.nccl_built()),
            "cuda_built": bool(hvd.cuda_built())}


def op_name(op: Any) -> str:
    """The name of a reduction given as Horovod's constant or as a name."""
    hvd = _horovod()
    names = {hvd.Average: "average", hvd.Sum: "sum", hvd.Adasum: "adasum", hvd.Min: "min",
             hvd.Max: "max", hvd.Product: "product"}
    name = names.get(op, op)
    if name not in names.values():
        raise ValueError(f"op={op!r} is no reduction: use hvd.Average, Sum, Adasum, Min, Max or "
                         "Product")
    return str(name)


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
