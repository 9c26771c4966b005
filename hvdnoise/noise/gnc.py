"""Gradient noise convolution: each worker's gradient at weights displaced by gradient noise.

Worker i evaluates its gradient at theta + delta_i, so that the mean over the workers is one
Monte-Carlo sample, per worker, of the gradient of the loss convolved with the noise. With the
deviations d_i = g_i - mean_j g_j of the step before (lag 1) or of a first pass over the same
batch (lag 0), and W workers:

    own         delta_i = -s d_i
    gathered    delta_i = s / sqrt(W-1) sum_j eps_ij d_j,  eps_ij ~ N(0, 1) private to worker i,
                so delta_i ~ N(0, s^2 D'D/(W-1)) given the deviations
    isotropic   delta_i = s z_i, E|z_i|^2 = sum_j |d_j|^2/(W-1): the control that must not help
    layerwise   the same within each parameter tensor, of the tensor's own share of |d_j|^2

    lr=k        s = k * learning rate of the parameter's group
    radius=r    s such that the root mean square over the workers of |delta_i| is r
    relative=r  as radius, for each parameter tensor, with r * |theta_tensor|

For the random sources the root mean square is the expected one, so that their law given the
deviations stays exactly normal. Where it acts: the weights of a worker, before forward; ranks
differ on purpose. Lag 2 takes the deviations of two steps before, so that their exchange has a
whole step's time. Bytes on the wire per step: own, isotropic and layerwise none but 8, and 8 per
bucket (relative, layerwise: per parameter tensor); gathered: as the plan of the exchange says
(hvdnoise.plans). The plan does not change the law, but for these:

    group       sum over the k V workers of the rank's group alone, 1/sqrt(kV-1) for 1/sqrt(W-1),
                d_j from the group's mean: delta_i ~ N(0, s^2 D_g'D_g/(kV-1)), the same in the mean
                over independent batches; s from the deviations of all
    16 bits     each number of what is sent, d_j (allgather, group) or delta_i (transpose), is off
                by 2^-8 of itself at most in bf16, by 2^-11 (or 2^-39 of its row's largest) in fp16

Memory: V rows of P for each step of lag and one more; P for the displaced weights, which are gone
before the one more is there.

Idea: Haruki et al. 2019, arXiv:1906.10822. Formulas: derived for this project.
"""

from __future__ import annotations

import math
from typing import Sequence

import torch
from torch import Tensor

from hvdnoise import streams
from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import (
    MixingNoise,
    Observation,
    ObservingNoise,
    Schedule,
    Statistics,
    StepContext,
    at_step,
    check_scale,
    known_rate,
    square_norm,
    square_norms,
)

SOURCES = ("own", "gathered", "isotropic", "layerwise")


class GNC(MixingNoise, ObservingNoise):
    """Displace each worker's weights by gradient noise (see the module for the formulas).

    Args:
        radius, lr, relative: the scale, exactly one of the three; a number >= 0 or a function of
            the step (0 for the first), in the units of the weights (radius), of one SGD step
            (lr), of the weights' own norm (relative).
        source: "own", "gathered", "isotropic" or "layerwise".
        lag: 1, deviations of the step before at no extra pass; 2, of the one before that, whose
            exchange is hidden behind a step's computation; 0, of a first pass over the same
            batch, at the price of a second: then the optimizer needs step(closure).
        seed: of the private streams; the same on all ranks.

    Raises:
        ValueError: for a value outside these.
    """

    min_workers = 2

    def __init__(self, radius: Schedule | None = None, *, lr: Schedule | None = None,
                 relative: Schedule | None = None, source: str = "own", lag: int = 1,
                 seed: int = 0) -> None:
        super().__init__(seed=seed)
        given = {name: value for name, value in (("radius", radius), ("lr", lr),
                                                 ("relative", relative)) if value is not None}
        if len(given) != 1:
            raise ValueError(f"GNC got {' and '.join(given) or 'no scale'}: give exactly one of "
                             "radius=, lr= and relative=")
        if source not in SOURCES:
            raise ValueError(f"source={source!r} must be one of {', '.join(SOURCES)}")
        if lag not in (0, 1, 2):
            raise ValueError(f"lag={lag!r} must be 0, 1 or 2")
        ((self.scale, value),) = given.items()
        self.size = check_scale(self.scale, value)
        self.source, self.lag = source, lag
        if self.scale == "relative" or source == "layerwise":
            self.statistics = Statistics(per_parameter=1)
        elif self.scale == "radius" or source == "isotropic":
            self.statistics = Statistics(per_bucket=1)
        if source in ("own", "gathered"):
            self.rows = "mixtures" if source == "gathered" else "deviations"

    def observe(self, bucket: Bucket, start: int, deviations_Kn: Tensor, out: Tensor,
                context: StepContext) -> None:
        if self.statistics is not None and self.statistics.per_parameter:
            out += square_norms(deviations_Kn, bucket, start)
        else:
            out += square_norm(deviations_Kn)

    def mixing_weights(self, workers: Sequence[int], peers: Sequence[int], context: StepContext
                       ) -> Tensor:
        weights = torch.stack([
            streams.normal(context.num_workers, self.seed, "gnc-mix", context.step, worker,
                           dtype=torch.float64)[list(peers)]
            for worker in workers]) / math.sqrt(len(peers) - 1)
        return weights - weights.mean(dim=1, keepdim=True)

    def displacement(self, bucket: Bucket, v: int, clean: Sequence[Tensor],
                     learning_rates: Sequence[float | None], observation: Observation,
                     context: StepContext) -> tuple[Tensor, list[float]]:
        if self.rows is None:
            unit_N = streams.normal(bucket.size, self.seed, "gnc-isotropic", context.step,
                                    context.workers[v], bucket.index, device=bucket.device,
                                    dtype=bucket.dtype)
        else:
            unit_N = observation.rows[bucket.index][v]
        return unit_N, self._factors(bucket, clean, learning_rates, observation, context)

    def _factors(self, bucket: Bucket, clean: Sequence[Tensor],
                 learning_rates: Sequence[float | None], observation: Observation,
                 context: StepContext) -> list[float]:
        """What the rows (or normal numbers) are multiplied by, for each parameter."""
        size = at_step(self.size, context.step)
        rates = [1.0] * len(clean)
        if self.scale == "lr":
            rates = [known_rate(rate, "GNC(lr=...)", ", or use radius= or relative=")
                     for rate in learning_rates]
        if self.statistics is None:  # lr
            sign = -1.0 if self.source == "own" else 1.0
            return [sign * size * rate for rate in rates]
        norms = [1.0] * len(clean)
        # the (expected) sums over the workers of |delta_i|^2 at s = 1, and in how many numbers:
        # of all parameters, or of each one
        squares = [sum(float(each.sum()) for each in observation.statistics.values())] * len(clean)
        shares, numbers = squares, [observation.layout.numbers] * len(clean)
        if self.statistics.per_parameter:
            shares = observation.statistics[bucket.index].tolist()
            numbers = list(bucket.sizes)
        if self.scale == "relative":
            norms, squares = torch.stack(torch._foreach_norm(list(clean))).tolist(), shares
        count = context.num_workers - (self.source != "own")
        factors = []
        for norm, rate, square, share, number in zip(norms, rates, squares, shares, numbers):
            if square == 0:
                factors.append(0.0)
                continue
            s = size * rate if self.scale == "lr" else size * norm / math.sqrt(square / count)
            factors.append({"own": -s, "gathered": s}.get(
                self.source, s * math.sqrt(share / count / number)))
        return factors
