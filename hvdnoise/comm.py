"""The world of ranks: who takes part, and the collectives between them.

The only module that imports Horovod or mpi4py. Everything else works on a `World`: `HorovodWorld`
here, and in the tests a world of threads with the same attributes, so that the whole method runs
in one process under a debugger.

Every collective carries a name that is equal on all ranks; it may be used again once the earlier
one of that name is finished. In a world of one rank every collective is the identity.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from typing import Any, Protocol

import torch
from torch import Tensor

from hvdnoise.watchdog import Watchdog, timeout_from_environment

_RANK_VARIABLES = {  # launcher -> its names of (rank, size, local rank, local size)
    "horovodrun": ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
               "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "hydra": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> Tensor:
        """The result, once every rank has taken part."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""


class Finished:
    """A collective that needed nobody else."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor

    def done(self) -> bool:
        return True


class World(ABC):
    """Ranks that call the same collectives; ``rank`` and ``size`` count inside this world."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    _counts: Counter[str]

    def count(self, what: str) -> int:
        """How often this world was asked this before: equal on ranks that ask alike."""
        self.__dict__.setdefault("_counts", Counter())[what] += 1
        return self._counts[what] - 1

    @abstractmethod
    def allreduce_(self, tensor: Tensor, *, name: str, op: str = "average",
                   prescale: float = 1.0, postscale: float = 1.0) -> Handle:
        """Reduce ``tensor`` in place over all ranks; op: average, sum, min, max or product."""

    @abstractmethod
    def allgather(self, tensor: Tensor, *, name: str) -> Handle:
        """The tensors of all ranks, one after the other along dimension 0, in rank order."""

    @abstractmethod
    def broadcast_(self, tensor: Tensor, *, root: int, name: str) -> Handle:
        """Overwrite ``tensor`` with rank ``root``'s."""

    def barrier(self, name: str = "barrier") -> None:
        """Return when every rank has called it."""
        self.allreduce_(torch.zeros(1), name=f"hvdnoise.{name}", op="sum").wait()

    def gather_json(self, value: Any, *, name: str) -> list[Any]:
        """Every rank's JSON value, on every rank (nothing that crosses ranks is a pickle)."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.allgather(torch.tensor([len(text)]), name=f"{name}.sizes").wait().tolist()
        texts = self.allgather(text, name=f"{name}.texts").wait()
        return [json.loads(bytes(part.tolist())) for part in texts.split(sizes)]


def handshake(world: World, facts: dict[str, Any], *, name: str = "handshake") -> None:
    """Check that all ranks hold the same ``facts``, comparing digests of fixed size.

    Raises:
        ValueError: on every rank alike, naming the keys and the ranks that differ from rank 0.
    """
    digests = {key: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode())
               .hexdigest()[:32] for key, value in facts.items()}
    everyone = world.gather_json(digests, name=name)
    wrong = {key: ranks for key in sorted({key for each in everyone for key in each})
             if (ranks := [rank for rank, each in enumerate(everyone)
                           if each.get(key) != everyone[0].get(key)])}
    if wrong:
        text = "; ".join(f"{key} on rank {', '.join(map(str, ranks))}"
                         for key, ranks in wrong.items())
        raise ValueError(f"the ranks differ from rank 0: {text}; start all ranks with the same "
                         "command, files and versions")


class _HorovodHandle:
    def __init__(self, world: HorovodWorld, handle: Any, name: str, dtype: torch.dtype) -> None:
        self._world, self._handle, self._name, self._dtype = world, handle, name, dtype

    def wait(self) -> Tensor:
        with self._world.watchdog.waiting_for(self._name):
            result: Tensor = self._world.hvd.synchronize(self._handle)
        return result.view(self._dtype)

    def done(self) -> bool:
        return bool(self._world.hvd.poll(self._handle))


class HorovodWorld(World):
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
        self._ops = {"average": hvd.Average, "sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max,
                     "product": hvd.Product}
        self.watchdog = _watchdog(hvd.rank())
        self._counts = _counts[self.process_set.process_set_id]

    def allreduce_(self, tensor: Tensor, *, name: str, op: str = "average",
                   prescale: float = 1.0, postscale: float = 1.0) -> Handle:
        if self.size == 1:
            return Finished(tensor)
        handle = self.hvd.allreduce_async_(
            tensor, name=name, op=self._ops[op], prescale_factor=prescale,
            postscale_factor=postscale, process_set=self.process_set)
        return _HorovodHandle(self, handle, name, tensor.dtype)

    def allgather(self, tensor: Tensor, *, name: str) -> Handle:
        if self.size == 1:
            return Finished(tensor)
        handle = self.hvd.allgather_async(_wire(tensor), name=name, process_set=self.process_set)
        return _HorovodHandle(self, handle, name, tensor.dtype)

    def broadcast_(self, tensor: Tensor, *, root: int, name: str) -> Handle:
        if self.size == 1:
            return Finished(tensor)
        handle = self.hvd.broadcast_async_(_wire(tensor), self.process_set.ranks[root], name=name,
                                           process_set=self.process_set)
        return _HorovodHandle(self, handle, name, tensor.dtype)


def _wire(tensor: Tensor) -> Tensor:
    """What to send for a tensor that is not computed with: Horovod has no bfloat16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _horovod() -> Any:
    import horovod.torch as hvd
    return hvd


_watchdogs: dict[int, Watchdog] = {}
_counts: defaultdict[int, Counter[str]] = defaultdict(Counter)  # by process set


def _watchdog(rank: int) -> Watchdog:
    """One watchdog a process, whatever the number of worlds."""
    if os.getpid() not in _watchdogs:
        _watchdogs[os.getpid()] = Watchdog(f"rank {rank}", timeout_from_environment())
    return _watchdogs[os.getpid()]


def init(comm: Any = None) -> HorovodWorld:
    """Start Horovod, unless it runs already, and return the world of all its ranks.

    Args:
        comm: an mpi4py communicator (COMM_WORLD or a part of it) whose processes become the
            ranks, for programs that use MPI for other things too; default: all processes that
            the launcher started. Every process of ``comm`` must call this, and no other.

    Raises:
        ValueError: when ``comm`` is no communicator, or Horovod was started already without it.
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
    elif comm is not None:
        hvd.init(comm=comm)
    else:
        if not _launched():  # alone: no MPI runtime to start, so none is asked for
            os.environ.setdefault("HOROVOD_CONTROLLER", "gloo")
            os.environ.setdefault("HOROVOD_CPU_OPERATIONS", "gloo")
        hvd.init()
    return HorovodWorld()


def shutdown() -> None:
    """End Horovod in this process."""
    _horovod().shutdown()


def _launched() -> bool:
    return any(name in os.environ for name in (
        "SLURM_STEP_ID", *(names[0] for names in _RANK_VARIABLES.values())))


def environment() -> dict[str, int]:
    """Rank, size, local rank and local size as the launcher tells them, before Horovod starts."""
    keys = ("rank", "size", "local_rank", "local_size")
    for names in _RANK_VARIABLES.values():
        if names[0] in os.environ and names[1] in os.environ:
            return {key: int(os.environ.get(name, default))
                    for key, name, default in zip(keys, names, "0101")}
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
        size = int(os.environ.get("SLURM_NTASKS", "1"))
        return {"rank": int(os.environ["SLURM_PROCID"]), "size": size,
                "local_rank": int(os.environ.get("SLURM_LOCALID", "0")),
                "local_size": int(os.environ.get("SLURM_TASKS_PER_NODE", "1").split("(")[0])}
    return dict(zip(keys, (0, 1, 0, 1)))


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
