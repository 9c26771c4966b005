"""Extrapolation: each worker's gradient where a step of its own would have led: a baseline.

    delta_i = -s g_i,   s = k * learning rate of the parameter's group

g_i is the worker's own gradient of the step before, at the weights where it stood then. The first
step has no displacement. Where it acts: the weights of a worker, before forward; ranks differ on
purpose. Bytes on the wire: none. Memory: 2V rows of P; P for the displaced weights, which are gone
before the second V rows are there.

Idea: Lin et al. 2020, Extrapolation for Large-batch Training in Deep Learning, arXiv:2006.05720. It
is no method of hvdnoise.
"""

from __future__ import annotations

from typing import Sequence

from torch import Tensor

from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import (
    Observation,
    Schedule,
    StepContext,
    WeightNoise,
    at_step,
    check_scale,
    known_rate,
)


class Extrapolation(WeightNoise):
    """Baseline extrapolation: each worker's gradient after a step along its own last gradient.

    Args:
        lr: k, the length of that step in units of the learning rate; a number >= 0 or a function
            of the step.
        seed: not used.

    Raises:
        ValueError: for a value outside these.
    """

    rows = "gradients"

    def __init__(self, lr: Schedule = 1.0, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.lr = check_scale("lr", lr)

    def displacement(self, bucket: Bucket, v: int, clean: Sequence[Tensor],
                     learning_rates: Sequence[float | None], observation: Observation,
                     context: StepContext) -> tuple[Tensor, list[float]]:
        size = at_step(self.lr, context.step)
        return observation.rows[bucket.index][v], [-size * known_rate(rate, "Extrapolation", "")
                                                   for rate in learning_rates]
