"""Full worker covariance on the mean gradient, by one weight a worker (identity I1).

    (1/W) sum_j (1 + c (eps_j - mean eps)) g_j = mean g + nu,   nu = (c/W) sum_j eps_j d_j
    c = W sqrt(b (1/M - 1/B) / (W-1)),   Cov(nu) = (1/M - 1/B) C^,   C^ = b/(W-1) D'D

with b examples a worker, B = W b in all, M the emulated batch, eps from a stream shared by all
ranks. Where it acts: the weight of a worker's gradient, before the reduction, so the reduced
gradient is the sample, the same bits on every rank. Bytes on the wire: none beside the allreduce.

Idea: Wen et al. 2020, arXiv:1902.08234. Formula: derived for this project.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvdnoise import streams
from hvdnoise.noise.base import StepContext, WorkerNoise
from hvdnoise.noise.emulated import WeightedSample


class FullWorkerCovariance(WeightedSample, WorkerNoise):
    """Noise with the covariance of the workers' gradients (see the module)."""

    min_workers = 2

    def worker_weights(self, context: StepContext) -> Tensor:
        W, share = context.num_workers, self.missing_variance(context)
        eps_W = streams.normal(W, self.seed, "full-workers", context.step, dtype=torch.float64)
        c = W * math.sqrt(self.examples(context) * share / (W - 1))
        return 1 + c * (eps_W - eps_W.mean())
