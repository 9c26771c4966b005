"""Which transport carries the ranks, and its start and end.

Horovod is the default. torch.distributed is used where torchrun started this process, or whoever
sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; where torch.distributed is initialized already;
and for a process alone where Horovod is not installed. Then nothing imports Horovod. A Horovod that
runs already, or ranks that horovodrun has started, come first.

Everything else works on a `World` (`hvdnoise.world`), and so does a world of threads in the tests,
in which the whole method runs in one process under a debugger.
"""

from __future__ import annotations

import atexit
import importlib.util
import sys
import weakref
from typing import Any, Callable

import torch

from hvdnoise import horovod_world
from hvdnoise.horovod_world import ALONE, HorovodWorld, build_report
from hvdnoise.launched import environment, launched, launcher
from hvdnoise.world import Finished, Handle, TransportError, World, group_of, handshake

__all__ = ["ALONE", "Finished", "Handle", "HorovodWorld", "World", "adasum_optimizer",
           "before_shutdown", "build_report", "compressor", "environment", "group_of", "handshake",
           "horovod_optimizer", "init", "launched", "needs_horovod", "op_name", "shutdown",
           "uses_torch", "world_of"]

_HOROVODS_OPS = {"Average": "average", "Sum": "sum", "Adasum": "adasum", "Min": "min",
                 "Max": "max", "Product": "product"}


def uses_torch() -> bool:
    """Whether torch.distributed carries the ranks; Horovod, if not."""
    started_by = launcher()
    if horovod_world.running() or started_by == "horovodrun":
        return False
    if started_by == "torchrun" or _torch_runs():
        return True
    return started_by is None and importlib.util.find_spec("horovod") is None


def _torch_runs() -> bool:
    if not torch.distributed.is_available():
        return False
    from hvdnoise import torch_world
    return torch_world.running()


def needs_horovod(what: str, cure: str) -> None:
    """Refuse what only Horovod has, where torch.distributed carries the ranks.

    Raises:
        ValueError: one line.
    """
    if uses_torch():
        raise ValueError(f"{what} is Horovod's, and torch.distributed carries these ranks: {cure}")


def init(comm: Any = None, *, group_size: int | None = None) -> World:
    """Start the transport, unless it runs already, and return the world of all its ranks.

    Args:
        group_size: make groups of so many consecutive ranks, for the exchange plan "group"; the
            whole of the ranks must divide into them.
        comm: an mpi4py communicator (COMM_WORLD or a part of it) whose processes become Horovod's
            ranks, for programs that use MPI for other things too; default: all processes that
            the launcher started. Every process of ``comm`` must call this, and no other.

    Raises:
        ValueError: when ``comm`` is no communicator, or Horovod is not used, or was started already
            without it, or ``HVDNOISE_TIMEOUT`` or another limit in the environment is none
            (`hvdnoise.limits`).
        TransportError: where Horovod is needed and not installed, or knows this rank alone.
    """
    if uses_torch():
        if comm is not None:
            needs_horovod("a communicator", "leave comm out, or start with mpirun")
        from hvdnoise import torch_world
        return torch_world.world(group_size)
    world = horovod_world.init(comm, group_size)
    _check_horovod()
    return world


def world_of(process_set: Any = None) -> World:
    """The world that an optimizer without one takes: of all ranks, or a Horovod process set.

    Raises:
        RuntimeError: when nothing has been started.
    """
    if not uses_torch():
        _check_horovod()
        return HorovodWorld(process_set)
    if process_set is not None:
        needs_horovod("process_set", "leave it out, or start with horovodrun or mpirun")
    from hvdnoise import torch_world
    if not torch_world.running():
        raise RuntimeError("torch.distributed has not been started: call hvdnoise.init() or "
                           "torch.distributed.init_process_group() first")
    return torch_world.world()


def _check_horovod() -> None:
    """Refuse a rank that would train alone: Horovod was started under torchrun, or under the mpirun
    of another MPI. Whoever means it gives `init` a communicator."""
    size = environment()["size"]
    if not horovod_world.running() or horovod_world.given_comm or \
            horovod_world.size() > 1 or size == 1:
        return
    if launcher() == "torchrun":
        raise TransportError(f"hvd.init() has started Horovod under torchrun, and it knows 1 of "
                             f"{size} ranks: call hvdnoise.init() instead, or start with "
                             "horovodrun")
    raise TransportError(f"the launcher started {size} ranks, and Horovod knows 1 of them: "
                         "hvdnoise doctor finds mixtures of MPIs; if each is to train alone, call "
                         "hvdnoise.init(MPI.COMM_SELF)")


def shutdown() -> None:
    """End the transport in this process."""
    _finish_late()
    if uses_torch():
        from hvdnoise import torch_world
        torch_world.shutdown()
    else:
        horovod_world.shutdown()


_late: list[weakref.WeakMethod[Callable[[], None]]] = []


def before_shutdown(finish: Callable[[], None]) -> None:
    """Have a bound method called before the transport ends in this process, unless its object is
    gone.

    For collectives that nobody waits for any more: the other ranks may still take part in them.
    """
    if not _late:
        atexit.register(_finish_late)  # after the transport's own, so it is called before
    _late.append(weakref.WeakMethod(finish))


def _finish_late() -> None:
    while _late:
        finish = _late.pop()()
        if finish is not None:
            finish()


def op_name(op: Any) -> str:
    """The name of a reduction given as Horovod's constant or as a name."""
    name = op
    if not isinstance(op, str) and (loaded := sys.modules.get("horovod.torch")) is not None:
        name = {getattr(loaded, each): known for each, known in _HOROVODS_OPS.items()}.get(op)
    if name not in _HOROVODS_OPS.values():
        raise ValueError(f"op={op!r} is no reduction: use hvd.Average, Sum, Adasum, Min, Max or "
                         f"Product, or {', '.join(_HOROVODS_OPS.values())}")
    return str(name)


def compressor(compression: Any) -> Any:
    """What compresses gradients; None for ``hvd.Compression.none``."""
    if getattr(compression, "__name__", None) == "NoneCompressor":
        return None
    if compression is not None:
        needs_horovod("compression", "leave it out, or start with horovodrun or mpirun")
    return compression


def adasum_optimizer(optimizer: torch.optim.Optimizer, **options: Any) -> torch.optim.Optimizer:
    """Horovod's own optimizer for op=Adasum, which reduces updates instead of gradients."""
    needs_horovod("op=Adasum", "use op=average, or start with horovodrun or mpirun")
    return horovod_world.adasum_optimizer(optimizer, **options)


def horovod_optimizer(optimizer: torch.optim.Optimizer, named_parameters: Any,
                      **options: Any) -> torch.optim.Optimizer:
    """Horovod's own DistributedOptimizer, to compare with."""
    needs_horovod("hvd.DistributedOptimizer", "start with horovodrun or mpirun")
    return horovod_world.horovod_optimizer(optimizer, named_parameters, **options)
