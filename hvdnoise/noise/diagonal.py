"""Noise on the mean gradient with the diagonal of its covariance: the paper's own method.

    nu = sqrt((1/M - 1/B) v) * z,   z ~ N(0, I) from a stream shared by all ranks
    v = running mean, per number, of    b/(W-1) sum_j d_j^2     from the W workers
                                        (1/B) sum_n g_n^2       from the B examples, not centred

The running mean is bias-corrected: v_t = (1 - c) sum_k c^(t-k) x_k / (1 - c^t) with the decay c and
the estimates x_1 ... x_t, of every n-th step. In between nothing travels but 8 bytes. Where it
acts: the mean gradient, after the reduction. Bytes on the wire: one allreduce of P numbers in every
n-th step, started bucket by bucket as their means arrive. Memory: P for the running mean, at least
float32, and in the steps that observe V P for rows and P for the sums, which become the mean.

Idea: Wen et al. 2020, arXiv:1902.08234. Formula: derived for this project; whether the paper
keeps a running mean is not known here.
"""

from __future__ import annotations

from typing import Any, Literal, MutableMapping

import torch
from torch import Tensor

from hvdnoise import streams
from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import Observation, Statistics, StepContext, check_count
from hvdnoise.noise.equal_trace import EqualTraceNoise

CACHED = 2 ** 17  # numbers that stay in a processor's cache


class DiagonalCovariance(EqualTraceNoise):
    """Independent noise on every weight, of the weight's own variance (see the module).

    From the workers. The other arguments are those of `EqualTraceNoise`.

    Args:
        decay: c of the running mean of the variances, 0 <= c < 1.
        every: the n of "every n-th step", in which the variances are estimated.
    """

    statistics = Statistics(elementwise=True)
    keeps_sums = True

    def __init__(self, emulated_batch: int, *, decay: float = 0.95, every: int = 2,
                 trace: float | str = "own", batch_size: int | None = None, seed: int = 0) -> None:
        super().__init__(emulated_batch, trace=trace, batch_size=batch_size, seed=seed)
        if isinstance(decay, bool) or not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} must be at least 0 and less than 1")
        check_count("every", every)
        self.decay, self.every = decay, every

    def observe(self, bucket: Bucket, start: int, deviations_Kn: Tensor, out: Tensor,
                context: StepContext) -> None:
        for deviation_n in deviations_Kn:
            out.addcmul_(deviation_n, deviation_n)

    def mean_noise(self, bucket: Bucket, observation: Observation, context: StepContext) -> Tensor:
        mean_N, factor = self._take_in(bucket, observation, context)
        noise_N = streams.normal(bucket.size, self.seed, "diagonal", context.step, bucket.index,
                                 device=bucket.device, dtype=bucket.dtype)
        for noise_n, mean_n in zip(noise_N.split(CACHED), mean_N.split(CACHED)):
            noise_n.mul_(mean_n.mul(factor).sqrt_())
        return noise_N

    def _take_in(self, bucket: Bucket, observation: Observation, context: StepContext
                 ) -> tuple[Tensor, float]:
        """The variances of one example, and what the noise's are in terms of them."""
        state = context.state
        if observation.statistics:
            if bucket.index == 0:  # the first
                self._take_in_traces(observation, context)
            mean_N = observation.statistics[bucket.index]  # ours now: it becomes the running mean
            mean_N.mul_(self.estimate(observation, context))
            if bucket.key in state:
                mean_N.lerp_(state[bucket.key], 1 - (1 - self.decay) / state["weight"])
            state[bucket.key] = mean_N
        factor = self.missing_variance(context) * self.scaled(self._own_trace(state),
                                                              state["trace"])
        return state[bucket.key], factor

    def _own_trace(self, state: MutableMapping[str, Any]) -> float:
        return float(state["mean trace"])

    def _take_in_traces(self, observation: Observation, context: StepContext) -> None:
        """Once a step, before the sums change: tr C^, its running mean, and the mean's weight."""
        state = context.state
        trace = self.estimate(observation, context) * sum(
            float(sums.sum(dtype=torch.float64)) for sums in observation.statistics.values())
        weight = state.get("weight", 0.0) * self.decay + (1 - self.decay)  # 1 - decay^t
        new = (1 - self.decay) / weight
        state["mean trace"] = state.get("mean trace", 0.0) * (1 - new) + trace * new
        state["trace"], state["weight"] = trace, weight


class DiagonalExampleCovariance(DiagonalCovariance):
    """Independent noise on every weight, from the gradients of single examples (see the module).

    The loop calls ``optimizer.observe_examples`` before each backward pass.

    Args:
        every: as from the workers; an observed step costs about one more forward and backward.
        labels: "true", or "sampled" from the model's own prediction (softmax of its outputs), as
            the Fisher matrix has them.
    """

    observed = "examples"
    min_workers = 1

    def __init__(self, emulated_batch: int, *, every: int = 10,
                 labels: Literal["true", "sampled"] = "true", **options: Any) -> None:
        super().__init__(emulated_batch, every=every, **options)
        if labels not in ("true", "sampled"):
            raise ValueError(f"labels={labels!r} must be true or sampled")
        self.labels = labels
