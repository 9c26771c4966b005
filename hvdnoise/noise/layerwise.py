"""White noise within each parameter tensor, with the tensor's own share of the trace.

    nu_t = sqrt((1/M - 1/B) tr_t(C^) / P_t) z_t,   tr_t(C^) = b/(W-1) sum_j |d_j,t|^2

for each tensor t of P_t numbers. It is the fairer control: noise that is white on all weights at
once (`isotropic`) grows with the width of a network for reasons of its own (arXiv:2206.04613).
Where it acts: the mean gradient, after the reduction; every rank adds the same bits (on like
hardware: see `hvdnoise.streams`). Bytes on the wire: 8 per parameter tensor, and 8.

Idea: the control of Wen et al. 2020, arXiv:1902.08234. Formula: derived for this project.
"""

from __future__ import annotations

from torch import Tensor

from hvdnoise import streams
from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import Observation, Statistics, StepContext, square_norms
from hvdnoise.noise.equal_trace import EqualTraceNoise


class LayerwiseCovariance(EqualTraceNoise):
    """White noise within each tensor, of the tensor's own variance (see the module)."""

    statistics = Statistics(per_parameter=1)

    def observe(self, bucket: Bucket, start: int, deviations_Kn: Tensor, out: Tensor,
                context: StepContext) -> None:
        out += square_norms(deviations_Kn, bucket, start)

    def mean_noise(self, bucket: Bucket, observation: Observation, context: StepContext) -> Tensor:
        estimate = self.estimate(observation, context)
        trace = estimate * sum(float(each.sum()) for each in observation.statistics.values())
        factor = self.missing_variance(context) * estimate * self.scaled(trace, trace)
        noise_N = streams.normal(bucket.size, self.seed, "layerwise", context.step, bucket.index,
                                 device=bucket.device, dtype=bucket.dtype)
        squares = observation.statistics[bucket.index].tolist()
        for noise_n, size, square in zip(noise_N.split(bucket.sizes), bucket.sizes, squares):
            noise_n.mul_((factor * square / size) ** 0.5)
        return noise_N
