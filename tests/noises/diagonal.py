"""The diagonal of the workers' covariance, with a running mean: a noise on the mean gradient.

    nu = sqrt((1/M - 1/B) v) z,   v = running mean of b/(W-1) sum_j d_j^2, bias-corrected

Idea: Wen et al. 2020, arXiv:1902.08234.
"""

from __future__ import annotations

from torch import Tensor

from hvdnoise import register_noise, streams
from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import MeanNoise, Observation, ObservingNoise, Statistics, StepContext
from hvdnoise.noise.emulated import EmulatedBatchNoise

CACHED = 2 ** 17  # numbers that stay in a processor's cache


@register_noise("diagonal-example")
class Diagonal(EmulatedBatchNoise, MeanNoise, ObservingNoise):
    """Independent noise on every weight, with its own variance over the workers.

    Args:
        emulated_batch: M, the batch whose noise the step shall have.
        decay: of the running mean of the variances, 0 <= decay < 1.
        batch_size: b, examples per worker and step.
        seed: the same on all ranks.
    """

    statistics = Statistics(elementwise=True)
    keeps_sums = True
    min_workers = 2

    def __init__(self, emulated_batch: int, *, decay: float = 0.9, batch_size: int | None = None,
                 seed: int = 0) -> None:
        super().__init__(emulated_batch, batch_size=batch_size, seed=seed)
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} must be at least 0 and less than 1")
        self.decay = decay

    def observe(self, bucket: Bucket, start: int, deviations_Kn: Tensor, out: Tensor,
                context: StepContext) -> None:
        for deviation_n in deviations_Kn:
            out.addcmul_(deviation_n, deviation_n)

    def mean_noise(self, bucket: Bucket, observation: Observation, context: StepContext) -> Tensor:
        mean_N = observation.statistics[bucket.index]  # ours now: it becomes the running mean
        before_N = context.state.get(bucket.key, mean_N)
        weight = context.state.get(f"{bucket.key} weight", 0.0)
        weight = weight * self.decay + (1 - self.decay)  # of all squares so far: 1 - decay^t
        mean_N.lerp_(before_N, 1 - (1 - self.decay) / weight)
        context.state[bucket.key], context.state[f"{bucket.key} weight"] = mean_N, weight
        factor = self.examples(context) / (context.num_workers - 1) * self.missing_variance(context)
        noise_N = streams.normal(bucket.size, self.seed, "diagonal", context.step, bucket.index,
                                 device=bucket.device, dtype=bucket.dtype)
        for noise_n, mean_n in zip(noise_N.split(CACHED), mean_N.split(CACHED)):
            noise_n.mul_(mean_n.mul(factor).sqrt_())
        return noise_N
