"""Anticorrelated noise between the steps, as one white displacement of all workers: a baseline.

    theta <- theta - alpha g(theta) + (xi_{t+1} - xi_t),   xi_t ~ N(0, r^2/P I),   xi_0 = 0

With theta~_t = theta_t - xi_t this is

    theta~ <- theta~ - alpha g(theta~ + xi_t)

so the weights that hvdnoise calls clean are theta~, and the workers' weights are the method's
theta: the displacement is xi_t, the same for all workers and new in each step. The two are equal
where the optimizer's update depends on the gradients alone: SGD with any momentum, without weight
decay. What an optimizer takes from the weights themselves, it takes here from theta~: weight decay
pulls theta~ and not theta~ + xi_t (a difference of alpha * decay * xi_t in a step), and LARS or
LAMB measure |theta~|. The run ends with theta~, without the last xi.

Where it acts: the weights of all workers alike, before forward. The first step has no displacement.
All ranks draw the same bits, on like hardware (see `hvdnoise.streams`). Bytes on the wire: none.
Memory: 2P, for xi and the displaced weights.

Idea: Orvieto et al. 2022, Anticorrelated Noise Injection for Improved Generalization,
arXiv:2202.02831. It is no method of hvdnoise.
"""

from __future__ import annotations

import math
from typing import Sequence

from torch import Tensor

from hvdnoise import streams
from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import Observation, Schedule, StepContext
from hvdnoise.noise.scale import SizedNoise


class AnticorrelatedNoise(SizedNoise):
    """Baseline anticorrelated noise: gradients at weights moved by white noise, alike everywhere.

    Args:
        radius, share: r, the root mean square length of the noise, in the units of the weights or
            as a share of their norm; one of the two, a number >= 0 or a function of the step. Each
            weight's noise has the standard deviation r/sqrt(P).
        seed: of the shared stream; the same on all ranks.

    Raises:
        ValueError: for a value outside these.
    """

    most_share = math.inf

    def __init__(self, radius: Schedule | None = None, *, share: Schedule | None = None,
                 seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.take_scale(radius=radius, share=share)

    def displacement(self, bucket: Bucket, v: int, clean: Sequence[Tensor],
                     learning_rates: Sequence[float | None], observation: Observation,
                     context: StepContext) -> tuple[Tensor, list[float]]:
        deviation = self.length(observation, context) / math.sqrt(observation.layout.numbers)
        xi_N = streams.normal(bucket.size, self.seed, "anticorrelated", context.step, bucket.index,
                              device=bucket.device, dtype=bucket.dtype)
        return xi_N, [deviation] * len(clean)
