"""Isotropic noise on the mean gradient with the trace of the worker covariance: the control.

    nu = sqrt((1/M - 1/B) tr(C^) / P) z,   tr(C^) = b/(W-1) sum_j |d_j|^2,   z ~ N(0, I)

It has the variance of the structured noise and none of its structure. Where it acts: the mean
gradient, after the reduction; z comes from a stream shared by all ranks, so every rank adds the
same bits (on like hardware: see `hvdnoise.streams`). Bytes on the wire: 8 per parameter tensor.

Idea: Wen et al. 2020, arXiv:1902.08234. Formula: derived for this project.
"""

from __future__ import annotations

import math

from torch import Tensor

from hvdnoise import streams
from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import Situation, square_norms
from hvdnoise.noise.emulated import EmulatedBatchNoise


class IsotropicCovariance(EmulatedBatchNoise):
    """White noise of the same variance as the structured noise (see the module)."""

    acts_on = "mean"
    needs_rows = True
    min_workers = 2
    _trace = 0.0  # of (W-1)/b C^, summed bucket by bucket
    _numbers = 0

    def begin(self) -> None:
        self._trace, self._numbers = 0.0, 0

    def observe(self, bucket: Bucket, deviations_VN: Tensor, gathered_WN: Tensor | None,
                now: Situation) -> Tensor:
        self._numbers += bucket.size
        return square_norms(deviations_VN, bucket)

    def receive(self, bucket: Bucket, statistics: Tensor) -> None:
        self._trace += float(statistics.sum())

    def mean_noise(self, bucket: Bucket, now: Situation) -> Tensor:
        trace = self._trace * self.examples(now) / (now.num_workers - 1)
        deviation = math.sqrt(self.missing_variance(now) * trace / self._numbers)
        return deviation * streams.normal(bucket.size, self.seed, "isotropic", now.step,
                                          bucket.index, device=bucket.device, dtype=bucket.dtype)
