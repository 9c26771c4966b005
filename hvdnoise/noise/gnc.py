"""Gradient noise convolution: each worker's gradient at weights displaced by gradient noise.

Worker i evaluates its gradient at theta + delta_i, so that the mean over the workers is one
Monte-Carlo sample, per worker, of the gradient of the loss convolved with the noise. With the
deviations d_i = g_i - mean_j g_j of the step before (lag 1) or of a first pass over the same
batch (lag 0), and W workers:

    own         delta_i = -s d_i
    gathered    delta_i = s / sqrt(W-1) sum_j eps_ij d_j,  eps_ij ~ N(0, 1) private to worker i,
                so delta_i ~ N(0, s^2 D'D/(W-1)) given the deviations
    isotropic   delta_i = s z_i, E|z_i|^2 = sum_j |d_j|^2/(W-1): the control that must not help

    lr=k        s = k * learning rate of the parameter's group
    radius=r    s such that the root mean square over the workers of |delta_i| is r
    relative=r  as radius, for each parameter tensor, with r * |theta_tensor|

For the random sources the root mean square is the expected one, so that their law given the
deviations stays exactly normal. Where it acts: the weights of a worker, before forward; ranks
differ on purpose. Bytes on the wire per step: own and isotropic none beside 8 per parameter
tensor; gathered (W-1)*4P received. Memory: V rows of P, and P for the displaced weights.

Idea: Haruki et al. 2019, arXiv:1906.10822. Formulas: derived for this project.
"""

from __future__ import annotations

import math
from typing import Any, Sequence

import torch
from torch import Tensor

from hvdnoise import streams
from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import Noise, Schedule, Situation, at_step, check_scale, square_norms

SOURCES = ("own", "gathered", "isotropic")


class GNC(Noise):
    """Displace each worker's weights by gradient noise (see the module for the formulas).

    Args:
        radius, lr, relative: the scale, exactly one of the three; a number >= 0 or a function of
            the step (0 for the first), in the units of the weights (radius), of one SGD step
            (lr), of the weights' own norm (relative).
        source: "own", "gathered" or "isotropic".
        lag: 1, deviations of the step before at no extra pass; 0, of a first pass over the same
            batch, at the price of a second: then the optimizer needs step(closure).
        seed: of the private streams; the same on all ranks.

    Raises:
        ValueError: for a value outside these.
    """

    acts_on = "weights"
    needs_rows = True
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
        if lag not in (0, 1):
            raise ValueError(f"lag={lag!r} must be 0 or 1")
        ((self.scale, value),) = given.items()
        self.size = check_scale(self.scale, value)
        self.source, self.lag = source, lag
        self.needs_gathered = source == "gathered"
        self._rows: dict[int, Tensor] = {}  # bucket -> (V, N): own or mixed deviations
        self._squares: dict[int, Tensor] = {}  # bucket -> (T,): sum over all workers of |d_i|^2
        self._sizes: dict[int, int] = {}  # bucket -> N
        self._ready = False

    @property
    def ready(self) -> bool:
        return self._ready

    def observe(self, bucket: Bucket, deviations_VN: Tensor, gathered_WN: Tensor | None,
                now: Situation) -> Tensor:
        squares = square_norms(deviations_VN, bucket)
        if gathered_WN is not None:
            W = now.num_workers
            mixing_VW = torch.stack([
                streams.normal(W, self.seed, "gnc-mix", now.step, worker, dtype=torch.float64)
                for worker in now.workers]) / math.sqrt(W - 1)
            mixing_VW -= mixing_VW.mean(dim=1, keepdim=True)  # sum_j d_j = 0, so g_j serve as d_j
            # not out=deviations_VN: on one rank both arguments are the same storage
            deviations_VN.copy_(mixing_VW.to(gathered_WN) @ gathered_WN)
        if self.source != "isotropic":
            self._rows[bucket.index] = deviations_VN
        self._sizes[bucket.index] = bucket.size
        return squares

    def receive(self, bucket: Bucket, statistics: Tensor) -> None:
        self._squares[bucket.index] = statistics

    def commit(self) -> None:
        self._ready = bool(self._squares)

    def forget(self) -> None:
        self._rows, self._squares, self._sizes = {}, {}, {}
        self._ready = False

    def displace(self, bucket: Bucket, v: int, clean: Sequence[Tensor], out: Sequence[Tensor],
                 learning_rates: Sequence[float], now: Situation) -> None:
        rows_VN = self._rows.get(bucket.index)
        if self._sizes.get(bucket.index) != bucket.size or (
                rows_VN is not None and len(rows_VN) != len(now.workers)):
            raise ValueError("the loaded deviations are of other buckets or virtual workers: "
                             "resume with the same bucket_bytes and virtual_workers, or drop "
                             "\"hvdnoise\" from the optimizer's state to start the noise anew")
        if rows_VN is None:
            unit_N = streams.normal(bucket.size, self.seed, "gnc-isotropic", now.step,
                                    now.workers[v], bucket.index, device=bucket.device,
                                    dtype=bucket.dtype)
        else:
            unit_N = rows_VN[v].to(bucket.device)  # a checkpoint may have been loaded to the CPU
        factors = self._factors(bucket, clean, learning_rates, now)
        for weight, unit, target, factor in zip(clean, bucket.views(unit_N), out, factors):
            torch.add(weight, unit, alpha=factor, out=target)

    def _factors(self, bucket: Bucket, clean: Sequence[Tensor], learning_rates: Sequence[float],
                 now: Situation) -> list[float]:
        """What the rows (or normal numbers) are multiplied by, for each parameter."""
        size = at_step(self.size, now.step)
        if self.scale == "relative":
            squares = self._squares[bucket.index].tolist()
            numbers: Sequence[int] = bucket.sizes
        else:
            squares = [sum(float(s.sum()) for s in self._squares.values())] * len(clean)
            numbers = [sum(self._sizes.values())] * len(clean)
        factors = []
        for weight, rate, square, number in zip(clean, learning_rates, squares, numbers):
            # the (expected) mean square over the workers of |delta_i| at s = 1
            spread = square / (now.num_workers - (self.source != "own"))
            if spread == 0:
                factors.append(0.0)
                continue
            s = size * rate if self.scale == "lr" else size / math.sqrt(spread)
            if self.scale == "relative":
                s *= float(torch.linalg.vector_norm(weight))
            factors.append({"own": -s, "gathered": s}.get(self.source,
                                                          s * math.sqrt(spread / number)))
        return factors

    def state_dict(self) -> dict[str, Any]:
        if not self._ready:
            return {"ready": False}
        return {"ready": True, "sizes": dict(self._sizes),
                "rows": {index: rows.clone() for index, rows in self._rows.items()},
                "squares": {index: squares.clone() for index, squares in self._squares.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.forget()
        if state["ready"]:
            self._rows, self._squares = dict(state["rows"]), dict(state["squares"])
            self._sizes, self._ready = dict(state["sizes"]), True
