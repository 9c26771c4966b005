"""What a noise is: where it acts, what it needs to know, and what it computes from that.

The optimizer calls a noise in the order of a step. Everything it gets is a tensor or a number and
everything it returns is; it never sees a parameter, a model or a collective, and keeps nothing of
a step:

1. `worker_weights` or `example_weights`, before the reduction (noises on those weights);
2. `observe`, when mean gradients are known, on parts of a bucket: statistics of the deviations;
3. `mixing_weights`, for noises that displace by mixtures of all workers' deviations;
4. `mean_noise`, added to the mean gradient (noises on the mean);
5. `displacement`, before a forward `lag` steps later (noises on the weights).

What 2 and 3 give is summed and mixed by the exchange, whatever way the gradients travel, and comes
back as an `Observation`. A noise implements the calls that its `acts_on` names and inherits the
rest. Its random numbers come from `hvdnoise.streams`, keyed by its seed, the step and, where ranks
must differ, the worker.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Literal, Sequence

import torch
from torch import Tensor

from hvdnoise.buckets import Bucket, Layout

Schedule = float | Callable[[int], float]


@dataclass(frozen=True)
class Situation:
    """What a noise may know about the step under way; equal on all ranks but for ``workers``."""

    step: int
    num_workers: int  # W, of all ranks
    workers: range  # the indices, among the W, of this rank's workers
    examples_per_worker: float  # b; 0 where it is not known


@dataclass
class Observation:
    """What one step showed of the workers' deviations, by bucket."""

    layout: Layout  # its buckets
    rows: dict[int, Tensor]  # (V, N): what `displaces_by` names, of this rank's workers
    statistics: dict[int, Tensor]  # what `observe` returned, summed over all workers; on the CPU
    examples: float  # of all workers together; nan where a worker's are not known


class Noise:
    """A structured gradient noise. ``seed`` is shared by all ranks."""

    acts_on: ClassVar[Literal["weights", "workers", "examples", "mean"]]
    # whether `observe` wants the deviations
    observes: bool = False
    # what `displacement` needs of the workers' deviations: each one's own, or a mixture of all
    displaces_by: Literal["deviations", "mixtures"] | None = None
    lag: int = 1
    min_workers: int = 1

    def __init__(self, *, seed: int = 0) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed={seed!r} must be an integer")
        self.seed = seed

    @property
    def looks(self) -> bool:
        """Whether it wants anything of a step's deviations."""
        return self.observes or self.displaces_by is not None

    @property
    def mixes(self) -> bool:
        """Whether it needs mixtures of all workers' deviations."""
        return self.displaces_by == "mixtures"

    def describe(self) -> dict[str, Any]:
        """What must be equal on all ranks."""
        return {key: repr(value) for key, value in sorted(vars(self).items())
                if not key.startswith("_") and not callable(value)}

    def worker_weights(self, now: Situation) -> Tensor:
        """(W,) float64: the factor of each worker's gradient in the mean; their mean is 1."""
        raise AssertionError(f"{type(self).__name__} does not weigh workers")

    def example_weights(self, worker: int, part: int, count: int, now: Situation) -> Tensor:
        """(count,) float64: the factor of each example of this part of the worker's batch.

        ``part`` counts the backward passes that one worker accumulates.
        """
        raise AssertionError(f"{type(self).__name__} does not weigh examples")

    def observe(self, bucket: Bucket, start: int, deviations_Kn: Tensor, now: Situation) -> Tensor:
        """Statistics of a part of the deviations, float64 on their device.

        What it returns is added up over all parts of a bucket and all workers, so it must be
        additive in both, and of the same shape for every part.

        Args:
            start: the part is ``[start, start + n)`` of the bucket.
            deviations_Kn: d_i of K of the workers there; not to be changed or kept.
        """
        raise AssertionError(f"{type(self).__name__} does not observe")

    def mixing_weights(self, workers: Sequence[int], peers: Sequence[int], now: Situation
                       ) -> Tensor:
        """(workers, peers) float64: worker i's mixture is sum_j weights[i, j] d_j over its peers.

        Each row adds up to 0, so that gradients serve as deviations. The same on all ranks for
        the same workers.
        """
        raise AssertionError(f"{type(self).__name__} does not mix")

    def mean_noise(self, bucket: Bucket, seen: Observation, now: Situation) -> Tensor:
        """(N,): what is added to the mean gradient; the same bits on every rank."""
        raise AssertionError(f"{type(self).__name__} does not act on the mean")

    def displacement(self, bucket: Bucket, v: int, clean: Sequence[Tensor],
                     learning_rates: Sequence[float | None], seen: Observation, now: Situation
                     ) -> tuple[Tensor, list[float]]:
        """What is added to the weights of this rank's worker number ``v``.

        Args:
            bucket: of the layout at the time of ``seen``.
            clean: the weights, one tensor a parameter of the bucket; not to be changed.
            learning_rates: of the parameters, for the step under way; None where there is none.
            seen: of the step `lag` steps before.

        Returns:
            (N,) numbers, which are not changed afterwards, and a factor for each parameter.
        """
        raise AssertionError(f"{type(self).__name__} does not act on the weights")


def at_step(schedule: Schedule, step: int) -> float:
    """The value of a number, or of a function of the step (0 for the first)."""
    value = float(schedule(step)) if callable(schedule) else float(schedule)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"the noise scale at step {step} is {value}: it must be finite and >= 0")
    return value


def check_scale(name: str, value: Schedule) -> Schedule:
    """Refuse a scale that is neither a finite number >= 0 nor a function of the step."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not callable(value) and not (number and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r} must be a finite number >= 0 or a function of the step")
    return value


def square_norm(part: Tensor) -> Tensor:
    """(1,) float64: the sum of the squares."""
    dtype = torch.promote_types(part.dtype, torch.float32)
    return torch.linalg.vector_norm(part, dtype=dtype).double().square().reshape(1)


def square_norms(part_Kn: Tensor, bucket: Bucket, start: int) -> Tensor:
    """(T,) float64: for each parameter of the bucket the sum of squares that the part holds."""
    squares = torch.zeros(len(bucket.sizes), dtype=torch.float64, device=part_Kn.device)
    stop = start + part_Kn.shape[1]
    first = bisect_right(bucket.starts, start) - 1
    for t in range(first, bisect_left(bucket.starts, stop)):
        low = max(bucket.starts[t], start) - start
        high = min(bucket.starts[t] + bucket.sizes[t], stop) - start
        if high > low:
            squares[t] = square_norm(part_Kn[:, low:high])[0]
    return squares
