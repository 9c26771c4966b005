"""What an exchange plan is, and what its cost depends on. The plans are in `hvdnoise.plans`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generator

from hvdnoise.world import Handle

if TYPE_CHECKING:
    from hvdnoise.tasks import BucketTask

MEAN = None
Schedule = Generator["Handle | None", Any, None]
PRECISIONS = ("fp32", "bf16", "fp16")
IN_FLIGHT_BYTES = 256 * 2 ** 20  # of gathered rows; one bucket may exceed it


@dataclass(frozen=True)
class Shape:
    """What the cost of an exchange depends on.

    Args:
        numbers: P, trainable parameters.
        ranks: R.
        virtual_workers: V, of each rank.
        itemsize: bytes of a gradient's number.
        precision: of the noise on the wire: "fp32" (as the gradients are), "bf16" or "fp16".
        group_size: k, for plans that gather inside groups of ranks.
        statistics_bytes: of the noise's statistics, which are summed over the ranks.
    """

    numbers: int
    ranks: int
    virtual_workers: int = 1
    itemsize: int = 4
    precision: str = "fp32"
    group_size: int = 1
    statistics_bytes: int = 0

    @property
    def noise_itemsize(self) -> int:
        """Bytes of a number of the noise on the wire."""
        return self.itemsize if self.precision == "fp32" else min(2, self.itemsize)

    def allreduced(self, nbytes: float) -> float:
        """Bytes that a rank receives in an allreduce of so many."""
        return 2 * (self.ranks - 1) / self.ranks * nbytes


class ExchangePlan(ABC):
    """One way for gradients and noise to travel.

    Attributes:
        mixes: whether it carries mixtures of the workers' deviations.
        all_workers: whether the mixtures are of all workers, so that the noise's law is the same.
        mean_from_rows: whether the mean is computed from the workers' gradients as they are, which
            compression or a predivide factor excludes.
        takes_storage: whether a task takes a buffer of rows, whose number is bounded.
        grouped: whether the rows travel inside groups of ranks only.
        carries_16_bits: whether the noise may travel in 16 bits.
        compared: the precisions and lags with which ``hvdnoise bench --variants all`` runs it.
        note: what `hvdnoise plan` says of it where there are several hosts.
    """

    name: str
    mixes = True
    all_workers = True
    mean_from_rows = False
    takes_storage = True
    grouped = False
    carries_16_bits = True
    compared: tuple[str, ...] = ("",)
    note = ""

    @abstractmethod
    def schedule(self, task: BucketTask) -> Schedule:
        """Take one bucket through the exchange; see the module."""

    @abstractmethod
    def row_bytes(self, shape: Shape) -> float:
        """Bytes that a rank receives in a step, but for the statistics."""

    @abstractmethod
    def _in_flight_bytes(self, shape: Shape, lag: int) -> float:
        """Bytes of one rank in flight at a time, if they were not bounded."""

    def rows_in_flight(self, peers: int) -> int:
        """Rows of each worker of a rank that one bucket in flight takes, with so many ranks."""
        return peers

    def bytes_received(self, shape: Shape) -> float:
        """Bytes that one rank receives in a step (see the module)."""
        return self.row_bytes(shape) + shape.allreduced(shape.statistics_bytes)

    def memory_bytes(self, shape: Shape, *, lag: int = 1) -> float:
        """Bytes of one rank that GNC under this plan takes, at its peak, beside plain training."""
        V, full = shape.virtual_workers, shape.itemsize
        kept = (V * (lag + 1) if lag else V + 1) * full * shape.numbers
        return kept + (lag + 1) * shape.statistics_bytes + self._in_flight_bytes(shape, lag)

    def bytes_into_host(self, shape: Shape, hosts: int, ranks_per_host: int) -> float:
        """Bytes that cross the link into one host in a step, the busiest one's.

        Ranks are numbered host by host. Of a ring's links one leads into each host.
        """
        return 0.0 if hosts == 1 else self.bytes_received(shape)

    def needed_into_host(self, shape: Shape, hosts: int, ranks_per_host: int) -> float:
        """That part of `bytes_into_host` that must arrive before the step ends, with lag 2."""
        return self.bytes_into_host(shape, hosts, ranks_per_host)

    def check(self, shape: Shape) -> None:
        """Refuse what does not go with this plan, for noise that mixes.

        Raises:
            ValueError: naming the value and the remedy.
        """
