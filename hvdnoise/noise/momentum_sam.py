"""Momentum SAM: weights moved against the momentum of the mean gradient: a baseline.

    delta = -rho v / |v|,   v <- mu v + mean gradient      |v| = 0: no displacement
    rho     radius, or share * |theta| (hvdnoise.noise.scale)

v is the noise's own, of the mean gradients as they were exchanged: before clipping, and without
the optimizer's weight decay. The norm is over all parameters. The first step has no displacement.
Where it acts: the weights of all workers alike, before forward. Bytes on the wire: none.
Memory: P for v, P more while a step ends; P for the displaced weights.

Idea: Becker et al. 2024, arXiv:2401.12033. It is no method of hvdnoise.
"""

from __future__ import annotations

import math
from typing import Sequence

from torch import Tensor

from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import (
    MeanObservingNoise,
    Observation,
    Schedule,
    StepContext,
    check_share,
    square_norm,
)
from hvdnoise.noise.scale import SizedNoise


class MomentumSAM(SizedNoise, MeanObservingNoise):
    """Baseline momentum SAM: gradients at weights moved against the momentum, at no extra pass.

    Args:
        radius, share: rho, the length of the displacement, in the units of the weights or as a
            share of their norm; one of the two, a number >= 0 or a function of the step.
        momentum: mu, 0 <= momentum < 1, of the noise's own buffer.
        seed: not used.

    Raises:
        ValueError: for a value outside these.
    """

    def __init__(self, radius: Schedule | None = None, *, share: Schedule | None = None,
                 momentum: float = 0.9, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.take_scale(radius=radius, share=share)
        self.momentum = check_share("momentum", momentum)

    def observe_mean(self, bucket: Bucket, mean_N: Tensor, context: StepContext) -> None:
        before_N = context.state.get(bucket.key)
        v_N = mean_N.clone() if before_N is None else mean_N.add(before_N, alpha=self.momentum)
        context.state[bucket.key] = v_N
        context.state[f"{bucket.key} square"] = float(square_norm(v_N))

    def displacement(self, bucket: Bucket, v: int, clean: Sequence[Tensor],
                     learning_rates: Sequence[float | None], observation: Observation,
                     context: StepContext) -> tuple[Tensor, list[float]]:
        norm = math.sqrt(sum(context.state[f"{each.key} square"]
                             for each in observation.layout.buckets))
        factor = -self.length(observation, context) / norm if norm > 0 else 0.0
        return context.state[bucket.key], [factor] * len(clean)

    def along(self, bucket: Bucket, v: int, observation: Observation, context: StepContext
              ) -> tuple[Tensor, list[float]]:
        return context.state[bucket.key], [1.0] * len(bucket.sizes)
