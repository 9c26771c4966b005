"""What a noise is: where it acts, what it needs to know, and what it computes from that.

The optimizer calls a noise in the order of a step. Everything it gets is a tensor or a number and
everything it returns is; it never sees a parameter, a model or a collective:

1. `worker_weights` or `example_weights`, before the reduction (noises on those weights);
2. `observe`, when a bucket's mean gradient is known: the noise may return statistics, which the
   optimizer sums over all ranks and hands back to `receive`;
3. `mean_noise`, added to the mean gradient (noises on the mean);
4. `commit`, when the step was taken: what was observed counts from now on;
5. `displace`, before the next forward (noises on the weights).

A noise implements the calls that its `acts_on` names and inherits the rest. Its random numbers
come from `hvdnoise.streams`, keyed by its seed, the step and, where ranks must differ, the worker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Literal, Sequence

import torch
from torch import Tensor

from hvdnoise.buckets import Bucket

Schedule = float | Callable[[int], float]


@dataclass(frozen=True)
class Situation:
    """What a noise may know about the step under way; equal on all ranks but for ``workers``."""

    step: int
    num_workers: int  # W, of all ranks
    workers: range  # the indices, among the W, of this rank's workers
    examples_per_worker: int  # b; 0 where it is not known


class Noise:
    """A structured gradient noise. ``seed`` is shared by all ranks."""

    acts_on: ClassVar[Literal["weights", "workers", "examples", "mean"]]
    needs_rows: bool = False  # keep each worker's own gradient until the mean is known
    needs_gathered: bool = False  # the rows of all workers on every rank
    lag: int = 1
    min_workers: int = 1

    def __init__(self, *, seed: int = 0) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed={seed!r} must be an integer")
        self.seed = seed

    @property
    def ready(self) -> bool:
        """Whether `displace` has something to displace by."""
        return False

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

    def begin(self) -> None:
        """The buckets of a step are about to be observed."""

    def observe(self, bucket: Bucket, deviations_VN: Tensor, gathered_WN: Tensor | None,
                now: Situation) -> Tensor | None:
        """Take in a bucket; may keep and overwrite ``deviations_VN`` until the next step.

        Args:
            deviations_VN: d_i of this rank's workers; the caller's storage.
            gathered_WN: the gradients g_j of all workers, when `needs_gathered`; not kept.

        Returns:
            Statistics to sum over all ranks (float64, on the CPU), or None.
        """

    def receive(self, bucket: Bucket, statistics: Tensor) -> None:
        """Take in the sum over all ranks of what `observe` returned."""

    def mean_noise(self, bucket: Bucket, now: Situation) -> Tensor:
        """(N,): what is added to the mean gradient; the same bits on every rank."""
        raise AssertionError(f"{type(self).__name__} does not act on the mean")

    def commit(self) -> None:
        """The step whose gradients were observed has been taken."""

    def forget(self) -> None:
        """Drop what was observed: the next step is as the first."""

    def displace(self, bucket: Bucket, v: int, clean: Sequence[Tensor], out: Sequence[Tensor],
                 learning_rates: Sequence[float], now: Situation) -> None:
        """Write the displaced weights of this rank's worker number ``v`` into ``out``.

        Args:
            clean: the weights, one tensor a parameter of the bucket; not to be changed.
            out: tensors of the same shapes.
            learning_rates: of the parameters, for the step under way.
        """
        raise AssertionError(f"{type(self).__name__} does not act on the weights")

    def state_dict(self) -> dict[str, Any]:
        """What a bitwise resumption needs beside the step: tensors, numbers and text only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


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


def square_norms(rows_VN: Tensor, bucket: Bucket) -> Tensor:
    """(T,) float64 on the CPU: for each parameter the sum over the rows of its squared norm."""
    dtype = torch.promote_types(rows_VN.dtype, torch.float32)
    parts = [torch.linalg.vector_norm(rows_VN[:, start:start + size], dtype=dtype)
             for start, size in zip(bucket.starts, bucket.sizes)]
    return torch.stack(parts).double().square().cpu()
