"""Positive-negative momentum: two momenta with weights of opposite sign: a baseline.

    m_t = beta^2 m_{t-2} + (1 - beta^2) g_t,   m_0 = m_{-1} = 0
    theta <- theta - alpha [(1 + beta0) m_t - beta0 m_{t-1}] / sqrt((1 + beta0)^2 + beta0^2)

g_t is the mean gradient. The momentum is the noise's own, so the optimizer shall be SGD *without*
momentum: with momentum there would be two, one after the other. Its weight decay, in contrast to
the paper's optimizer, stays outside of m. Clipping sees the direction, not g_t.

Where it acts: the mean gradient, after the reduction: what is added is direction - g_t, so that the
direction is off by the rounding of that sum. Bytes on the wire: none. Memory: 2P for both momenta,
P more while a step ends.

Idea and formula: Xie et al. 2021, arXiv:2103.17182. It is no method of hvdnoise.
"""

from __future__ import annotations

import math

from torch import Tensor

from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import MeanObservingNoise, StepContext, check_share


class PNM(MeanObservingNoise):
    """Baseline positive-negative momentum in place of the mean gradient, for SGD without momentum.

    Args:
        beta: decay of the momenta, 0 <= beta < 1.
        beta0: the weight of the negative momentum, a finite number >= 0; 0: ordinary momentum of
            every second gradient.
        seed: not used.

    Raises:
        ValueError: for a value outside these.
    """

    kept = 2

    def __init__(self, beta: float = 0.9, beta0: float = 1.0, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.beta = check_share("beta", beta)
        number = isinstance(beta0, (int, float)) and not isinstance(beta0, bool)
        if not (number and math.isfinite(beta0) and beta0 >= 0):
            raise ValueError(f"beta0={beta0!r} must be a finite number >= 0")
        self.beta0 = beta0

    def observe_mean(self, bucket: Bucket, mean_N: Tensor, context: StepContext) -> Tensor:
        decay, newer, older = self.beta ** 2, bucket.key, f"{bucket.key} older"
        negative_N, before_N = context.state.get(newer), context.state.get(older)
        positive_N = mean_N * (1 - decay)
        if before_N is not None:
            positive_N.add_(before_N, alpha=decay)
        norm = math.hypot(1 + self.beta0, self.beta0)
        added_N = positive_N * ((1 + self.beta0) / norm) - mean_N
        if negative_N is not None:
            added_N.sub_(negative_N, alpha=self.beta0 / norm)
            context.state[older] = negative_N
        context.state[newer] = positive_N
        return added_N
