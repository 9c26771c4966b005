"""Sharpness-aware minimization, each worker by its own gradient: a baseline, no method of hvdnoise.

    delta_i = rho g_i / |g_i|      the norm is over all parameters; |g_i| = 0: no displacement

    lag 0   g_i of a first pass over the same batch at theta: SAM, m-SAM in its worker-wise form
    lag 1   g_i of the step before, at the weights where the worker stood then: stale SAM

Where it acts: the weights of a worker, before forward; ranks differ on purpose. Bytes on the wire:
none; the first pass of lag 0 stays on its rank, so ``p.grad`` is the rank's own gradient after it.
Memory: V rows of P for each step of lag and one more; P for the displaced weights.

Idea: Foret et al. 2020, arXiv:2010.01412; by workers: arXiv:2302.09693; with the gradient of the
step before: arXiv:2503.11147.
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
)


class SAM(WeightNoise):
    """Baseline SAM: each worker's gradient at weights moved along its own gradient.

    Args:
        radius: rho, the length of the displacement; a number >= 0 or a function of the step.
        lag: 0, the gradient of a first pass over the same batch, at the price of a second: then
            the optimizer needs step(closure); 1, of the step before, at no extra pass.
        seed: not used.

    Raises:
        ValueError: for a value outside these.
    """

    rows = "gradients"

    def __init__(self, radius: Schedule, *, lag: int = 0, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if lag not in (0, 1) or isinstance(lag, bool):
            raise ValueError(f"lag={lag!r} must be 0 or 1")
        self.radius = check_scale("radius", radius)
        self.lag = lag

    def displacement(self, bucket: Bucket, v: int, clean: Sequence[Tensor],
                     learning_rates: Sequence[float | None], observation: Observation,
                     context: StepContext) -> tuple[Tensor, list[float]]:
        norm = observation.row_norm(v)
        factor = at_step(self.radius, context.step) / norm if norm > 0 else 0.0
        return observation.rows[bucket.index][v], [factor] * len(clean)


class StaleSAM(SAM):
    """Baseline stale SAM: as SAM, with each worker's gradient of the step before and no extra pass.

    Args:
        radius: rho, the length of the displacement; a number >= 0 or a function of the step.
        seed: not used.
    """

    def __init__(self, radius: Schedule, *, seed: int = 0) -> None:
        super().__init__(radius, lag=1, seed=seed)
