"""Isotropic noise on the mean gradient with the trace of the worker covariance: the control.

    nu = sqrt((1/M - 1/B) tr(C^) / P) z,   tr(C^) = b/(W-1) sum_j |d_j|^2,   z ~ N(0, I)

It has the variance of the structured noise and none of its structure. Where it acts: the mean
gradient, after the reduction; z comes from a stream shared by all ranks, so every rank adds the
same bits (on like hardware: see `hvdnoise.streams`). Bytes on the wire: 8 per bucket, and 8.
Its b is the mean over the workers, whose batches may differ.

Idea: Wen et al. 2020, arXiv:1902.08234. Formula: derived for this project.
"""

from __future__ import annotations

import math

from torch import Tensor

from hvdnoise import streams
from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import Observation, Statistics, StepContext, square_norm
from hvdnoise.noise.equal_trace import EqualTraceNoise


class IsotropicCovariance(EqualTraceNoise):
    """White noise of the same variance as the structured noise (see the module)."""

    statistics = Statistics(per_bucket=1)

    def observe(self, bucket: Bucket, start: int, deviations_Kn: Tensor, out: Tensor,
                context: StepContext) -> None:
        out += square_norm(deviations_Kn)

    def mean_noise(self, bucket: Bucket, observation: Observation, context: StepContext) -> Tensor:
        squares = sum(float(square) for square in observation.statistics.values())
        trace = squares * self.examples(context) / (context.num_workers - 1)
        trace *= self.scaled(trace, trace)
        deviation = math.sqrt(self.missing_variance(context) * trace / observation.layout.numbers)
        noise_N = streams.normal(bucket.size, self.seed, "isotropic", context.step, bucket.index,
                                 device=bucket.device, dtype=bucket.dtype)
        return noise_N.mul_(deviation)
