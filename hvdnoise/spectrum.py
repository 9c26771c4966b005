"""The spectrum of the workers' covariance in one step, from the deviations of that step.

With the deviations d_i of W workers of b examples each, D their rows, the estimate of one example's
covariance C^ = b/(W-1) D'D has the eigenvalues of the small matrix b/(W-1) DD'. So W x W numbers,
summed over the buckets, give (docs/methods.md, I4)

    trace           tr C^, and the share of each parameter tensor in it
    frobenius       |C^|_F
    eigenvalues     the largest ones; there are W-1
    stable rank     tr C^ / lambda_1
    alignment       m' C^ m / (|m|^2 tr C^), m the mean gradient: 1 where all noise lies along it,
                    1/P for white noise

Each rank gets a slice of every worker's deviations by an alltoall, (R-1)/R V 4P bytes, unless its
plan gives it slices anyway (transpose). Memory: V P in such a step.

Formulas: derived for this project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hvdnoise.buckets import Bucket
from hvdnoise.exchange import Exchange
from hvdnoise.mixing import pack, slices
from hvdnoise.noise.base import ObservingNoise, Statistics, StepContext, square_norms
from hvdnoise.pending import PendingObservation
from hvdnoise.world import World

LARGEST = 3  # eigenvalues


@dataclass(frozen=True)
class Spectrum:
    """Of one step, the same on all ranks, in units of the unscaled loss; see the module."""

    trace: float
    frobenius: float
    eigenvalues: tuple[float, ...]
    stable_rank: float | None  # None where there is no deviation
    alignment: float | None  # None where there is no deviation or no gradient
    shares: dict[str, float]  # of the trace, by the parameter's name

    def numbers(self) -> dict[str, float | None]:
        """All of it by name, as a line of metrics holds it."""
        return {"trace": self.trace, "frobenius": self.frobenius, "stable_rank": self.stable_rank,
                "alignment": self.alignment,
                **{f"eigenvalue_{n}": value for n, value in enumerate(self.eigenvalues, 1)},
                **{f"share/{name}": share for name, share in self.shares.items()}}


class SpectrumObserver(ObservingNoise):
    """Sees the deviations of a step, as a noise does, and adds nothing."""

    statistics = Statistics(per_parameter=1)
    min_workers = 2

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """The step begins anew."""
        self._rows: dict[int, Tensor] = {}  # (V, N) by bucket, where this rank sees its own only
        self._slices: list[tuple[Bucket, int, Tensor]] = []

    def observe(self, bucket: Bucket, start: int, deviations_Kn: Tensor, out: Tensor,
                context: StepContext) -> None:
        out += square_norms(deviations_Kn, bucket, start)
        count = len(deviations_Kn)
        if count == context.num_workers:  # all of them, so this part is this rank's to sum up
            self._slices.append((bucket, start, deviations_Kn.clone()))
            return
        if bucket.index not in self._rows:
            self._rows[bucket.index] = deviations_Kn.new_zeros(count, bucket.size)
        self._rows[bucket.index][:, start:start + deviations_Kn.shape[1]] = deviations_Kn

    def spectrum(self, exchange: Exchange, world: World, observation: PendingObservation,
                 scale: float) -> Spectrum:
        """Of the observed step, before anything was added to its mean. Collective."""
        context = observation.context
        means = dict(enumerate(flat for _, flat in exchange.reduced()))
        W, parts = context.num_workers, self._slices
        for bucket in exchange.layout.buckets:
            if bucket.index in self._rows:
                parts.append(_own_slice(bucket, self._rows.pop(bucket.index), world,
                                        f"{exchange.label}.spectrum.{bucket.index}"))
        sums = torch.zeros(W * W + W, dtype=torch.float64)
        for bucket, start, x_Wn in parts:
            x_Wn = x_Wn.double()
            mean_n = means[bucket.index][start:start + x_Wn.shape[1]].double() / scale
            sums += torch.cat([(x_Wn @ x_Wn.T).flatten(), x_Wn @ mean_n]).cpu()
        if world.size > 1:
            sums = world.allreduce_(sums, name=f"{exchange.label}.spectrum", op="sum").wait()
        square = sum(float(torch.linalg.vector_norm(m.double() / scale)) ** 2
                     for m in means.values())
        self.forget()
        return _spectrum(sums, W, context.examples_per_worker, square, observation)


def _own_slice(bucket: Bucket, rows_VN: Tensor, world: World, name: str
               ) -> tuple[Bucket, int, Tensor]:
    sizes, V = slices(bucket.size, world.size), len(rows_VN)
    packed = pack(rows_VN, sizes)
    received = world.alltoall(packed, [V * size for size in sizes], name=name).wait()
    return bucket, sum(sizes[:world.rank]), received.view(world.size * V, sizes[world.rank])


def _spectrum(sums: Tensor, W: int, b: float, square: float,
              observation: PendingObservation) -> Spectrum:
    factor = b / (W - 1)
    gram_WW, along_W = sums[:W * W].view(W, W) * factor, sums[W * W:]
    values = [math.nan] * W
    if bool(gram_WW.isfinite().all()):  # else some LAPACKs raise
        values = torch.linalg.eigvalsh(gram_WW).flip(0).clamp(min=0).tolist()
    trace = float(gram_WW.trace())
    names = [name for bucket in observation.layout.buckets for name in bucket.names]
    squares = torch.cat([observation.statistics[bucket.index]
                         for bucket in observation.layout.buckets]).tolist()
    total = sum(squares)
    return Spectrum(
        trace, float(torch.linalg.matrix_norm(gram_WW)), tuple(values[:min(LARGEST, W - 1)]),
        trace / values[0] if values[0] > 0 else None,
        factor * float(along_W @ along_W) / (square * trace) if square * trace > 0 else None,
        {name: each / total for name, each in zip(names, squares)} if total > 0 else {})
