"""What a world of ranks is: who takes part, and the collectives between them.

Every collective carries a name that is equal on all ranks; it may be used again once the earlier
one of that name is finished. In a world of one rank every collective is the identity. Horovod's
ranks are a `hvdnoise.horovod_world.HorovodWorld`, torch.distributed's a
`hvdnoise.torch_world.TorchWorld`; the tests have a world of threads.
"""

from __future__ import annotations

import hashlib
import json
import socket
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any, Callable, Mapping, Protocol, Sequence

import torch
from torch import Tensor


class RanksLost(RuntimeError):
    """Another rank is gone, or has left, so that a collective can never end."""


class TransportError(RuntimeError):
    """What is to carry the ranks is not there, or cannot; one line with the remedy."""


class Handle(Protocol):
    """A collective under way."""

    def wait(self, poll: Callable[[], None] | None = None) -> Tensor:
        """The result, once every rank has taken part. ``poll`` is called again and again until
        then, and may raise an error, which ends the wait."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""


class Finished:
    """A collective that needed nobody else."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self, poll: Callable[[], None] | None = None) -> Tensor:
        return self._tensor

    def done(self) -> bool:
        return True


class World(ABC):
    """Ranks that call the same collectives; ``rank`` and ``size`` count inside this world."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    transport: str | None = None  # of collectives between processes: gloo, mpi or torch
    _counts: Counter[str]

    @property
    def order(self) -> Any:
        """The `FinishOrder` of this world's optimizers."""
        from hvdnoise.ordering import FinishOrder
        return self.__dict__.setdefault("_order", FinishOrder())

    def count(self, what: str) -> int:
        """How often this world was asked this before: equal on ranks that ask alike."""
        self.__dict__.setdefault("_counts", Counter())[what] += 1
        return self._counts[what] - 1

    @abstractmethod
    def allreduce_(self, tensor: Tensor, *, name: str, op: str = "average",
                   prescale: float = 1.0, postscale: float = 1.0) -> Handle:
        """Reduce ``tensor`` in place over all ranks; op: average, sum, min, max or product."""

    @abstractmethod
    def allgather(self, tensor: Tensor, *, name: str, out: Tensor | None = None) -> Handle:
        """The tensors of all ranks, one after the other along dimension 0, in rank order.

        Sizes along dimension 0 may differ. ``out``: contiguous storage of the result, if given.
        """

    @abstractmethod
    def alltoall(self, tensor: Tensor, splits: Sequence[int], *, name: str,
                 out: Tensor | None = None) -> Handle:
        """What all ranks sent to this one, along dimension 0, in rank order.

        ``splits``: how many of ``tensor``'s entries along dimension 0 go to each rank, from the
        first on; 0 is allowed. ``out``: contiguous storage of the result, if given.
        """

    @abstractmethod
    def broadcast_(self, tensor: Tensor, *, root: int, name: str) -> Handle:
        """Overwrite ``tensor`` with rank ``root``'s."""

    @abstractmethod
    def group(self, size: int) -> World:
        """The world of this rank and its neighbours: ``size`` consecutive ranks. Not collective.

        Raises:
            ValueError: when there is no such group of ranks; it says how to make it.
        """

    def barrier(self, name: str = "barrier") -> None:
        """Return when every rank has called it."""
        self.allreduce_(torch.zeros(1), name=f"hvdnoise.{name}", op="sum").wait()

    def gather_json(self, value: Any, *, name: str, poll: Callable[[], None] | None = None
                    ) -> list[Any]:
        """Every rank's JSON value, on every rank (nothing that crosses ranks is a pickle)."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.allgather(torch.tensor([len(text)]), name=f"{name}.sizes").wait(poll)
        texts = self.allgather(text, name=f"{name}.texts").wait(poll)
        return [json.loads(bytes(part.tolist())) for part in texts.split(sizes.tolist())]

    def hosts(self) -> list[str]:
        """The host name of every rank. Collective."""
        return self.gather_json(socket.gethostname(), name="hvdnoise.hosts")

    def places(self) -> list[str]:
        """Every rank in words, with its host where there are several. Collective."""
        hosts = self.hosts()
        several = len(set(hosts)) > 1
        return [f"rank {rank}" + f" of {host}" * several for rank, host in enumerate(hosts)]


def handshake(world: World, facts: dict[str, Any], *, name: str = "handshake",
              poll: Callable[[], None] | None = None, cures: Mapping[str, str] = {}) -> None:
    """Check that all ranks hold the same ``facts``, comparing digests of fixed size.

    Args:
        cures: what to do about a key that differs, where it is not the usual thing.

    Raises:
        ValueError: on every rank alike, naming the keys, the ranks that differ from rank 0, and
            their hosts.
    """
    digests = {key: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode())
               .hexdigest()[:32] for key, value in facts.items()}
    everyone = world.gather_json(digests, name=name, poll=poll)
    wrong = {key: ranks for key in sorted({key for each in everyone for key in each})
             if (ranks := [rank for rank, each in enumerate(everyone)
                           if each.get(key) != everyone[0].get(key)])}
    if wrong:
        places = world.places()
        text = "; ".join(f"{key} on {', '.join(places[rank] for rank in ranks)}"
                         for key, ranks in wrong.items())
        usual = "start all ranks with the same command, files and versions"
        raise ValueError(f"the ranks differ from rank 0: {text}; "
                         f"{'; '.join({cures.get(key, usual): None for key in wrong})}")


def group_of(rank: int, size: int, group_size: int) -> range:
    """The ranks of the group of ``group_size`` consecutive ranks that ``rank`` belongs to."""
    if group_size < 1 or size % group_size:
        raise ValueError(f"groups of {group_size} ranks do not divide {size} ranks: give a size "
                         "that does")
    first = rank - rank % group_size
    return range(first, first + group_size)
