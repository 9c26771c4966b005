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
    share=r     as radius, with r |theta|, of all displaced weights; the default, r = 0.02
    relative=r  as radius, for each parameter tensor, with r |theta_tensor|

For the random sources the root mean square is the expected one, so that their law given the
deviations stays exactly normal. Where it acts: the weights of a worker, before forward; ranks
differ on purpose. Lag 2 takes the deviations of two steps before, so that their exchange has a
whole step's time. Bytes on the wire per step: own, isotropic and layerwise none but 8, and 8 per
bucket (relative, layerwise, scope="matrices": per parameter tensor; per="filter": per filter);
gathered: as the plan of the exchange says (hvdnoise.plans). The plan does not change the law, but
for these:

    group       sum over the k V workers of the rank's group alone, 1/sqrt(kV-1) for 1/sqrt(W-1),
                d_j from the group's mean: delta_i ~ N(0, s^2 D_g'D_g/(kV-1)), the same in the mean
                over independent batches; s from the deviations of all
    16 bits     each number of what is sent, d_j (allgather, group) or delta_i (transpose), is off
                by 2^-8 of itself at most in bf16, by 2^-11 (or 2^-39 of its row's largest) in fp16

Memory: V rows of P for each step of lag and one more; P for the displaced weights, which are gone
before the one more is there, and P more for per="filter".

With ``echo`` (experimental) each batch is drawn twice in a row or more often. The first pass is at
theta and shows d_i; in the others, on the same examples, the sign of own is plus:

    echo        delta_i = s d_i, d_i of the batch's first pass; 0 in the first pass

``scope="matrices"`` displaces parameters of two and more dimensions only; all sums, norms and
counts are over these. ``per="filter"`` takes each row p[k] of them for a tensor in ``relative``.

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
    known_rate,
    norms,
    square_norm,
    square_norms,
)
from hvdnoise.noise.filters import filter_norms, filter_sizes, filter_square_norms, times_filters
from hvdnoise.noise.scale import SizedNoise

SOURCES = ("own", "gathered", "isotropic", "layerwise")
SCOPES, PER = ("all", "matrices"), ("tensor", "filter")


class GNC(SizedNoise, MixingNoise, ObservingNoise):
    """Displace each worker's weights by gradient noise (see the module for the formulas).

    Args:
        radius, lr, relative, share: the scale, one of the four; a number >= 0 or a function of the
            step (0 for the first), in the units of the weights (radius), of one SGD step (lr), of
            the norm of each weight tensor (relative) or of all weights together (share). Without
            any, share is 0.02; above 0.05 a warning comes, but for white noise.
        source: "own", "gathered", "isotropic" or "layerwise".
        lag: 1, deviations of the step before at no extra pass; 2, of the one before that, whose
            exchange is hidden behind a step's computation; 0, of a first pass over the same
            batch, at the price of a second: then the optimizer needs step(closure).
        scope: "all" parameters, or "matrices", those of two and more dimensions alone.
        per: "tensor", or "filter": relative is of the norm of each filter p[k] of a matrix.
        echo: experimental; for batches that are drawn twice in a row: displace in the second pass
            only, by plus the deviations of the first (see ``optimizer.repeated``).
        seed: of the private streams; the same on all ranks.

    Raises:
        ValueError: for a value outside these, or options that do not go together.
    """

    min_workers = 2

    def __init__(self, radius: Schedule | None = None, *, lr: Schedule | None = None,
                 relative: Schedule | None = None, share: Schedule | None = None,
                 source: str = "own", lag: int = 1, scope: str = "all", per: str = "tensor",
                 echo: bool = False, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if source in ("isotropic", "layerwise"):
            self.most_share = math.inf
        self.take_scale(("share", 0.02), radius=radius, lr=lr, relative=relative, share=share)
        for name, value, known in (("source", source, SOURCES), ("scope", scope, SCOPES),
                                   ("per", per, PER)):
            if value not in known:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
        if lag not in (0, 1, 2):
            raise ValueError(f"lag={lag!r} must be 0, 1 or 2")
        if not isinstance(echo, bool):
            raise ValueError(f"echo={echo!r} must be True or False")
        if echo and (source, lag) != ("own", 1):
            raise ValueError(f"echo=True does not go with source={source!r} and lag={lag!r}: it "
                             "takes own deviations of the batch's first pass; leave both out")
        if per == "filter" and (self.scale, scope) != ("relative", "matrices"):
            raise ValueError(f"per='filter' does not go with {self.scale}= and scope={scope!r}: "
                             "give relative= and scope='matrices'")
        self.source, self.lag, self.scope, self.per, self.echo = source, lag, scope, per, echo
        self.scales_numbers = per == "filter"
        self.statistics = self._wanted()
        if source in ("own", "gathered"):
            self.rows = "mixtures" if source == "gathered" else "deviations"

    def _wanted(self) -> Statistics | None:
        """What it has to know of the deviations' squares."""
        if self.per == "filter":
            return Statistics(per_filter=1)
        if self.scale == "relative" or self.source == "layerwise":
            return Statistics(per_parameter=1)
        if self.scale == "lr" and self.source != "isotropic":
            return None
        return Statistics(per_parameter=1) if self.scope == "matrices" else Statistics(per_bucket=1)

    def displaces(self, shape: Sequence[int]) -> bool:
        return self.scope == "all" or len(shape) > 1

    def observe(self, bucket: Bucket, start: int, deviations_Kn: Tensor, out: Tensor,
                context: StepContext) -> None:
        assert self.statistics is not None
        if self.statistics.per_filter:
            out += filter_square_norms(deviations_Kn, bucket, start)
        elif self.statistics.per_parameter:
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
        along_N, factors = self.along(bucket, v, observation, context)
        if self.per == "filter":
            s_F = self._filter_scales(bucket, clean, observation, context)
            return times_filters(along_N, bucket, s_F), factors
        scales = self._scales(bucket, clean, learning_rates, observation, context)
        return along_N, [s * factor for s, factor in zip(scales, factors)]

    def along(self, bucket: Bucket, v: int, observation: Observation, context: StepContext
              ) -> tuple[Tensor, list[float]]:
        """The displacement for s = 1."""
        inside = [float(self.displaces(shape)) for shape in bucket.shapes]
        if self.rows is not None:
            sign = -1.0 if self.source == "own" and not self.echo else 1.0
            return observation.rows[bucket.index][v], [sign * each for each in inside]
        z_N = streams.normal(bucket.size, self.seed, "gnc-isotropic", context.step,
                             context.workers[v], bucket.index, device=bucket.device,
                             dtype=bucket.dtype)
        count, squares = self._count(context), observation.statistics[bucket.index]
        if self.per == "filter":
            deviation_F = (squares / count / filter_sizes(bucket)).sqrt()
            return times_filters(z_N, bucket, deviation_F.to(bucket.device)), inside
        shares, numbers = squares.tolist(), list(bucket.sizes)
        if self.source == "isotropic" and self.scale != "relative":
            shares = [self._total(observation)] * len(inside)
            numbers = [sum(size for each in observation.layout.buckets for size, shape
                           in zip(each.sizes, each.shapes) if self.displaces(shape))] * len(inside)
        return z_N, [within and math.sqrt(share / count / number)
                     for within, share, number in zip(inside, shares, numbers)]

    def _count(self, context: StepContext) -> int:
        """What sums of squares over the workers are divided by."""
        return context.num_workers - (self.source != "own")

    def _total(self, observation: Observation) -> float:
        """The sum over the workers of |d_i|^2, of what is displaced."""
        if self.scope == "all":
            return sum(float(each.sum()) for each in observation.statistics.values())
        return sum(square for bucket in observation.layout.buckets for square, shape in zip(
            observation.statistics[bucket.index].tolist(), bucket.shapes) if self.displaces(shape))

    def _scales(self, bucket: Bucket, clean: Sequence[Tensor],
                learning_rates: Sequence[float | None], observation: Observation,
                context: StepContext) -> list[float]:
        """s for each parameter; 0 where there are no deviations."""
        if self.scale == "lr":
            size = at_step(self.size, context.step)
            return [size * known_rate(rate, "GNC(lr=...)", ", or use radius=, share= or relative=")
                    for rate in learning_rates]
        if self.scale == "relative":
            size = at_step(self.size, context.step)
            lengths = [size * norm for norm in norms(clean).tolist()]
            squares = observation.statistics[bucket.index].tolist()
        else:
            lengths = [self.length(observation, context)] * len(clean)
            squares = [self._total(observation)] * len(clean)
        count = self._count(context)
        return [length / math.sqrt(square / count) if square > 0 else 0.0
                for length, square in zip(lengths, squares)]

    def _filter_scales(self, bucket: Bucket, clean: Sequence[Tensor], observation: Observation,
                       context: StepContext) -> Tensor:
        """(F,): s for each filter."""
        square_F = observation.statistics[bucket.index].to(bucket.device)
        lengths_F = at_step(self.size, context.step) * filter_norms(clean)
        return torch.where(square_F > 0, lengths_F / (square_F / self._count(context)).sqrt(), 0.0)
