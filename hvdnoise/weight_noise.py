"""Noise on the weights at work: the deltas of a step, and which gradients came through them."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor

from hvdnoise.displacement import Term
from hvdnoise.mixing import square
from hvdnoise.noise.base import StepContext, WeightNoise, check_returned
from hvdnoise.pending import PendingObservation
from hvdnoise.watch import ModelWatch

Rates = Callable[[], dict[Tensor, float | None]]


@dataclass(frozen=True)
class NoiseCoverage:
    """How many steps the noise on the weights has reached, on this rank.

    Attributes:
        due: steps taken whose gradients were due to come from displaced weights.
        missed: those of them in which a parameter's gradient came from its clean weights.
    """

    due: int = 0
    missed: int = 0


def storages(values: Iterable[Any]) -> set[int]:
    """Where the tensors among some values are stored."""
    return {each.untyped_storage().data_ptr() for each in values if isinstance(each, Tensor)}


class Displacements:
    """The deltas that a `WeightNoise` gives this rank's workers.

    Attributes:
        terms: the delta of each parameter; the same dict for all calls in a row for one worker.
        keeps_total: whether to keep ``total``: one more pass over them.
        total: () the sum of their numbers, up to signs: finite only where all of them are. None:
            there are none, or it is not kept.
        coverage: of the steps so far.
    """

    def __init__(self, noise: WeightNoise) -> None:
        self.coverage = NoiseCoverage()
        # |delta|^2 and |alpha u|^2 of each worker of this rank, in a step that is measured
        self._squares: dict[int, tuple[float, float]] = {}
        self.noise = noise
        self.terms: dict[Tensor, Term] = {}
        self.keeps_total = False
        self.total: Tensor | None = None
        self._formed = 0  # bytes of them that are neither rows nor kept by the noise
        self._of: tuple[PendingObservation | None, int] | None = None
        self._missed: dict[Tensor, str] = {}  # parameter -> why
        self._warned: set[str] = set()

    @property
    def memory(self) -> int:
        """Bytes of the deltas and displaced weights of a worker."""
        return self._formed + sum(p.nbytes for p in self.terms)

    def forget(self) -> None:
        """The next forward needs other deltas."""
        self.terms, self._of, self._squares, self._formed = {}, None, {}, 0
        self.total = None

    def forget_passes(self) -> None:
        """What the passes of the step under way have shown is dropped."""
        self._missed = {}

    def step_taken(self) -> None:
        """Count the step, if noise was due in it."""
        if self.terms:
            self.coverage = NoiseCoverage(self.coverage.due + 1,
                                          self.coverage.missed + bool(self._missed))
        self.forget()

    def are_of(self, due: PendingObservation | None, v: int) -> bool:
        """Whether `terms` are these."""
        return self._of == (due, v)

    def form(self, due: PendingObservation | None, v: int, context: StepContext,
             learning_rates: Rates) -> None:
        """Form the deltas of this rank's worker number ``v``; none where no noise is due."""
        if self._of is None or self._of[0] is not due:
            self.forget()
            if due is not None:
                due.forget_weights()
        self.terms, self.total, self._of, self._formed = {}, None, (due, v), 0
        self._squares.pop(v, None)
        if due is None:
            return
        rate, known = learning_rates(), storages([*due.tensors, *context.state.values()])
        for bucket in due.layout.buckets:
            clean = [p.detach() for p in bucket.parameters]
            rates = [rate.get(p) for p in bucket.parameters]
            unit_N, factors = self.noise.displacement(bucket, v, clean, rates, due, context)
            check_returned(self.noise, "displacement", unit_N, (bucket.size,))
            check_returned(self.noise, "displacement", factors, (len(rates),))
            if self.keeps_total:
                self._add_up(unit_N, factors)
            if not storages([unit_N]) & known:
                self._formed += unit_N.nbytes
            for t, p in enumerate(bucket.parameters):
                if factors[t] and p.shape == bucket.shapes[t]:
                    self.terms[p] = Term(bucket.view(unit_N, t), factors[t], v)

    def _add_up(self, unit_N: Tensor, factors: Sequence[float]) -> None:
        """Of one bucket more; also where a unit that is not finite has a factor of 0."""
        sum_ = unit_N.sum(dtype=torch.float32) * sum(map(abs, factors))
        self.total = sum_ if self.total is None else self.total + sum_.to(self.total)

    def measure(self, context: StepContext, learning_rates: Rates) -> None:
        """Measure the deltas that were formed last, unless they are measured already."""
        if self._of is None or (due := self._of[0]) is None or self._of[1] in self._squares:
            return
        v, rates, along = self._of[1], learning_rates(), 0.0
        for bucket in due.layout.buckets:
            found = self.noise.along(bucket, v, due, context)
            for t, (p, shape) in enumerate(zip(bucket.parameters, bucket.shapes)):
                if found is None or (rate := rates.get(p)) is None:
                    along = math.nan
                elif self.noise.displaces(shape):
                    along += (rate * found[1][t]) ** 2 * square(bucket.view(found[0], t))
        total = sum(term.factor ** 2 * square(term.unit) for term in self.terms.values())
        self._squares[v] = total, along

    def measured(self) -> tuple[float, float]:
        """The sums over this rank's workers of |delta|^2 and of |alpha u|^2 (nan: not known)."""
        squares, along = zip(*self._squares.values()) if self._squares else ((), ())
        return sum(squares), sum(along)

    def check(self, p: Tensor, v: int, watch: ModelWatch) -> None:
        """Note whether the gradient of ``p`` came from its displaced weight.

        Raises:
            RuntimeError: when it came from another worker's.
        """
        if p not in self.terms:
            return
        reached = watch.reached(p)
        if reached is None:
            self._missed.setdefault(p, watch.why_not(p))
        elif reached.worker != v:
            raise RuntimeError("the forward of this backward() was made for another worker: run "
                               "the forward of each virtual worker after the backward of the one "
                               "before")

    def warn(self, watch: ModelWatch) -> None:
        """Warn once of every reason for which noise that was due has not come."""
        for why in set(self._missed.values()) - self._warned:
            self._warned.add(why)
            names = sorted(watch.name(p) for p, each in self._missed.items() if each == why)
            rest = f" and {len(names) - 1} others" if len(names) > 1 else ""
            warnings.warn(f"the gradient of {names[0]}{rest} came from weights without the noise "
                          f"that was due: {why}", stacklevel=2)
