"""A noise at work in an optimizer: what happens to it in the course of a step, on this rank.

This is where a noise, which sees numbers only, meets the model's weights, the exchange and the
other ranks. Without a noise it does nothing, and keeps count of the steps.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor

from hvdnoise.buckets import Layout
from hvdnoise.comm import World
from hvdnoise.displacement import Term
from hvdnoise.exchange import Exchange
from hvdnoise.noise.base import Noise, Situation
from hvdnoise.observation import History, Sighting
from hvdnoise.watch import ModelWatch

Rates = Callable[[], dict[Tensor, float | None]]


@dataclass(frozen=True)
class Measured:
    """Squared norms of one step, equal on all ranks, in units of the unscaled loss."""

    worker_square_norm: float  # mean over the workers of |g_i|^2
    gradient_square_norm: float  # |g|^2 of the gradient that the update uses, noise included
    # of the displacements over all workers, or of the noise on the mean; None for the noises that
    # act through weights of workers or examples, whose noise is never formed
    noise_rms: float | None


@dataclass(frozen=True)
class NoiseCoverage:
    """How many steps the noise on the weights has reached, on this rank.

    Attributes:
        due: steps taken whose gradients were due to come from displaced weights.
        missed: those of them in which a parameter's gradient came from its clean weights.
    """

    due: int = 0
    missed: int = 0


class AppliedNoise:
    """A noise (or None) with the state of the step under way.

    Attributes:
        steps: steps taken; schedules and random streams count by it.
        measure: whether to compute `measured` at the end of each exchange.
        loss_scale: the factor of the loss, or a function that tells it (a GradScaler's
            ``get_scale``); what the noise sees is divided by it.
        watch: the calls of the model's modules; None where no noise needs to know of them.
        coverage: of the steps so far.
        memory: the most bytes that rows and displaced weights took at a time.
    """

    def __init__(self, noise: Noise | None, world: World, virtual_workers: int) -> None:
        self.noise, self.world, self.virtual_workers = noise, world, virtual_workers
        self.steps = 0
        self.measure = False
        self.measured: Measured | None = None
        self.loss_scale: float | Callable[[], float] = 1.0
        self.observing = True
        self.watch: ModelWatch | None = None
        self.coverage = NoiseCoverage()
        self.memory = 0
        self.history = History(noise.lag if noise is not None else 1)
        self._terms: dict[Tensor, Term] = {}
        self._terms_of: tuple[Sighting, int] | None = None
        self._displaced: dict[int, float] = {}  # own worker -> |delta|^2, in this step
        self._last_examples = 0
        self._told: set[str] = set()
        self._weighed = False  # what the next backward pass comes from
        self.begin_step()

    def begin_step(self) -> None:
        """Nothing of the passes under way remains; what they have shown is dropped."""
        self.history.new = None
        self._weights: dict[float, list[float]] = {}
        self._local_squares: list[Tensor] = []
        self._noise_squares: dict[int, float] = {}  # own worker -> |noise|^2
        self._examples: list[list[int]] = [[]]  # by worker and pass
        self._missed: dict[Tensor, str] = {}  # parameter -> why

    def end_step(self) -> None:
        """The step was taken."""
        if self._terms:
            self.coverage = NoiseCoverage(self.coverage.due + 1,
                                          self.coverage.missed + bool(self._missed))
        self._forget_terms()
        if self.noise is not None and self.noise.lag == 0:
            self.history.forget()
        self.history.commit()
        self.steps += 1
        self._weighed = False
        if self.watch is not None:
            self.watch.end_step()
        self.begin_step()

    def observe(self, layout: Layout) -> Sighting | None:
        """What the noise is to see of the exchange whose first backward pass begins."""
        noise = self.noise
        if noise is None or not self.observing or not noise.looks:
            return None
        self.history.new = Sighting(noise, self.situation(), layout, self._current_loss_scale)
        return self.history.new

    def _current_loss_scale(self) -> float:
        return float(self.loss_scale() if callable(self.loss_scale) else self.loss_scale)

    def situation(self, examples: float = 0) -> Situation:
        """The step under way; ``examples``: of a worker."""
        first = self.world.rank * self.virtual_workers
        return Situation(step=self.steps, num_workers=self.world.size * self.virtual_workers,
                         workers=range(first, first + self.virtual_workers),
                         examples_per_worker=examples)

    # ------------------------------------------------------------------ before the reduction

    @torch.no_grad()
    def terms(self, v: int, learning_rates: Rates) -> dict[Tensor, Term]:
        """The delta of each parameter for this rank's worker number ``v``: the same dict for all
        calls in a row of a step and worker; empty where no noise is due."""
        noise, due = self.noise, self.history.due
        if noise is None or noise.acts_on != "weights" or due is None:
            if self._terms:
                self._forget_terms()
            return self._terms
        if self._terms_of == (due, v):
            return self._terms
        self._terms, self._terms_of, square = {}, (due, v), 0.0
        seen, now, rate = due.settle(), self.situation(), learning_rates()
        for bucket in seen.layout.buckets:
            clean = [p.detach() for p in bucket.parameters]
            rates = [rate.get(p) for p in bucket.parameters]
            unit_N, factors = noise.displacement(bucket, v, clean, rates, seen, now)
            for t, p in enumerate(bucket.parameters):
                if factors[t] and p.shape == bucket.shapes[t]:
                    self._terms[p] = Term(bucket.view(unit_N, t), factors[t], v)
                    if self.measure:
                        square += factors[t] ** 2 * _square(self._terms[p].unit)
        self._displaced[v] = square
        units = noise.displaces_by is None
        self._note_memory(sum(p.nbytes for p in self._terms) * (2 if units else 1))
        return self._terms

    def _forget_terms(self) -> None:
        self._terms, self._terms_of, self._displaced = {}, None, {}

    def _note_memory(self, more: int = 0) -> None:
        self.memory = max(self.memory, self.history.memory + more)

    def check_displaced(self, p: Tensor, v: int, learning_rates: Rates, *, by_hand: bool = False
                        ) -> None:
        """Backward has given ``p`` a gradient: note whether it came from displaced weights.

        Raises:
            RuntimeError: when they were another worker's.
        """
        watch = self.watch
        if watch is None or self.noise is None or self.noise.acts_on != "weights":
            return
        if not by_hand:
            watch.note_gradient(p)
        due = self.terms(v, learning_rates)
        if p not in due:
            return
        reached = watch.reached(p)
        if reached is None:
            self._missed.setdefault(p, watch.why_not(p))
        elif reached.worker != v:
            raise RuntimeError(f"the forward of this backward() was made for another worker: run "
                               f"the forward of each of the {self.virtual_workers} virtual workers "
                               "after the backward of the one before")

    def weigh(self, losses: Tensor, v: int, part: int, parts: int) -> Tensor:
        """The loss of part ``part`` of ``parts`` of a worker's batch from its examples' losses."""
        if self.noise is None or self.noise.acts_on != "examples":
            return losses.mean()
        now = self.situation(len(losses) * parts)
        weights = self.noise.example_weights(now.workers[v], part, len(losses), now)
        self._weighed = True
        return (weights.to(losses) * losses).mean()

    def worker_weight(self, v: int, p: Tensor, *, in_pass: bool) -> float:
        """The factor of the gradient of this rank's worker number ``v``, in ``p.grad``."""
        if self.noise is None or self.noise.acts_on != "workers" or p.grad is None:
            return 1.0
        examples = self._examples[-1] + ([] if self.watch is None else [
            self.watch.examples(repeated=in_pass)])
        now = self.situation(sum(examples))
        if now.examples_per_worker not in self._weights:
            weights_W = self.noise.worker_weights(now).tolist()
            self._weights[now.examples_per_worker] = [weights_W[i] for i in now.workers]
        return self._weights[now.examples_per_worker][v]

    def captured(self, grad: Tensor | None) -> None:
        """A worker's gradient of one parameter is known."""
        if self.measure and grad is not None:
            self._local_squares.append(torch.linalg.vector_norm(grad).double().square())

    def end_pass(self, *, counts: bool, in_pass: bool = True) -> None:
        """A backward pass is through; ``counts``: it was one of the step."""
        watch, noise = self.watch, self.noise
        if watch is None or noise is None:
            return
        if counts and noise.acts_on in ("workers", "mean"):
            self._examples[-1].append(watch.examples(repeated=in_pass))
        watch.end_pass()
        for why in set(self._missed.values()) - self._told:
            self._told.add(why)
            names = sorted(watch.name(p) for p, each in self._missed.items() if each == why)
            rest = f" and {len(names) - 1} others" if len(names) > 1 else ""
            warnings.warn(f"the gradient of {names[0]}{rest} came from weights without the noise "
                          f"that was due: {why}", stacklevel=2)

    def end_worker(self) -> None:
        """The next pass is another worker's."""
        self._last_examples = sum(self._examples[-1])
        self._examples.append([])

    def check_weighed(self) -> None:
        """Raise where the loss of the pass that begins was not weighed but had to be."""
        if self.noise is not None and self.noise.acts_on == "examples" and not self._weighed:
            raise RuntimeError("covariance noise from examples weighs their losses: call "
                               "loss = optimizer.weigh(losses) before backward()")
        self._weighed = False

    # ------------------------------------------------------------------ after the reduction

    def finish(self, exchange: Exchange) -> None:
        """Wait for the mean gradients, put noise on them, measure."""
        self._note_memory()
        exchange.finish(self._all_examples())
        scale, noise = self._current_loss_scale(), self.noise
        if noise is not None and noise.acts_on == "mean":
            assert self.history.new is not None
            seen, added = self.history.new.settle(), 0.0
            now = self.situation(seen.examples / (self.world.size * self.virtual_workers))
            for bucket, reduced_N in exchange.reduced():
                noise_N = noise.mean_noise(bucket, seen, now)
                reduced_N.add_(noise_N, alpha=scale)
                if self.measure:
                    added += _square(noise_N)
            self._noise_squares = dict.fromkeys(range(self.virtual_workers), added)
        if self.measure:
            self._measure(exchange, scale)

    def _all_examples(self) -> float:
        """Of this rank's workers together; nan where a call has no tensor that would tell."""
        examples = [each for worker in self._examples for each in worker]
        return sum(examples) if min(examples, default=0) >= 0 else math.nan

    @property
    def examples_per_worker(self) -> int:
        """Of this rank's last worker whose passes are through; 0 where nobody counts."""
        return max(0, self._last_examples)

    def _measure(self, exchange: Exchange, scale: float) -> None:
        mine = torch.tensor([sum(map(float, self._local_squares)) / scale ** 2,
                             sum((self._noise_squares or self._displaced).values())],
                            dtype=torch.float64)
        handle = self.world.allreduce_(mine, name=f"{exchange.label}.measure")
        mean = handle.wait() / self.virtual_workers
        worker, noise = mean.tolist()
        total = sum(_square(flat) for _, flat in exchange.reduced())
        known = self.noise is None or self.noise.acts_on in ("weights", "mean")
        self.measured = Measured(worker, total / scale ** 2, math.sqrt(noise) if known else None)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, for a bitwise resumption."""
        return {"steps": self.steps, "seen": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None, layout: Layout,
                        parameters: dict[str, Tensor]) -> None:
        """Take over a state; None starts the noise anew."""
        self.begin_step()
        self.history.forget()
        self._forget_terms()
        self.steps = state["steps"] if state else 0
        if self.noise is not None and state:
            self.history.load_state_dict(state["seen"], self.noise, self.situation(), layout,
                                         parameters)


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32).double().square()
                 if tensor.dtype != torch.float64 else tensor.square().sum())
