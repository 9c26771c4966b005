"""A noise at work in an optimizer: what happens to it in the course of a step, on this rank.

This is where a noise, which sees numbers only, meets the model's weights, the exchange and the
other ranks. Without a noise it does nothing, and keeps count of the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Callable

import torch
from torch import Tensor

from hvdnoise.buckets import Layout
from hvdnoise.comm import World
from hvdnoise.displacement import ModelWatch
from hvdnoise.exchange import Exchange
from hvdnoise.noise.base import Noise, Situation
from hvdnoise.observation import History, Sighting


@dataclass(frozen=True)
class Measured:
    """Squared norms of one step, equal on all ranks, in units of the unscaled loss."""

    worker_square_norm: float  # mean over the workers of |g_i|^2
    gradient_square_norm: float  # |g|^2 of the gradient that the update uses, noise included
    # of the displacements over all workers, or of the noise on the mean; None for the noises that
    # act through weights of workers or examples, whose noise is never formed
    noise_rms: float | None


class AppliedNoise:
    """A noise (or None) with the state of the step under way.

    Attributes:
        steps: steps taken; schedules and random streams count by it.
        measure: whether to compute `measured` at the end of each exchange.
        loss_scale: the factor of the loss, or a function that tells it (a GradScaler's
            ``get_scale``); what the noise sees is divided by it.
        watch: the model's forward passes; None where no noise needs to know of them.
    """

    def __init__(self, noise: Noise | None, world: World, virtual_workers: int) -> None:
        self.noise, self.world, self.virtual_workers = noise, world, virtual_workers
        self.steps = 0
        self.measure = False
        self.measured: Measured | None = None
        self.loss_scale: float | Callable[[], float] = 1.0
        self.observing = True
        self.watch: ModelWatch | None = None
        self.history = History(noise.lag if noise is not None else 1)
        self._weighed = False
        self._weights: list[float] | None = None
        self._buffers: dict[str, list[list[Tensor]]] = {}  # displaced weights, of one layout
        self._local_squares: list[Tensor] = []
        self._noise_squares: dict[int, float] = {}  # own worker -> |noise|^2

    def begin_step(self) -> None:
        """Nothing of a step under way remains; an observation that no step took is dropped."""
        if self.history.new is not None:
            self.history.forget()  # also what was before: its rows have been written over
        self._weighed = False
        self._weights = None
        self._local_squares, self._noise_squares = [], {}
        if self.watch is not None:
            self.watch.reset()

    def begin_worker(self) -> None:
        """The next worker's forward passes begin."""
        if self.watch is not None:
            self.watch.begin_worker()

    def end_step(self) -> None:
        """The step was taken."""
        if self.noise is not None and self.noise.lag == 0:
            self.history.forget()
        self.history.commit()
        self.steps += 1
        self.begin_step()

    def look(self) -> Sighting | None:
        """What the noise is to see of the step whose first backward pass begins."""
        noise = self.noise
        if noise is None or not self.observing or not noise.looks:
            return None
        self.history.new = Sighting(noise, self.situation(), self._current_loss_scale)
        return self.history.new

    def _current_loss_scale(self) -> float:
        return float(self.loss_scale() if callable(self.loss_scale) else self.loss_scale)

    @property
    def memory(self) -> int:
        """Bytes of the displaced weights."""
        return sum(each.nbytes for buffers in self._buffers.values() for one in buffers
                   for each in one)

    def situation(self) -> Situation:
        first = self.world.rank * self.virtual_workers
        return Situation(step=self.steps, num_workers=self.world.size * self.virtual_workers,
                         workers=range(first, first + self.virtual_workers),
                         examples_per_worker=self.watch.examples if self.watch else 0)

    # ------------------------------------------------------------------ before the reduction

    @torch.no_grad()
    def displace(self, layout: Layout, v: int, learning_rates: dict[Tensor, float]) -> None:
        """Displace the weights for this rank's worker number ``v``, if there is noise for it."""
        noise, watch = self.noise, self.watch
        due = self.history.due
        if noise is None or watch is None or watch.displaced or due is None:
            return
        seen = due.settle()
        if layout.digest not in self._buffers:
            self._buffers = {layout.digest: [[_alike(p) for p in b.parameters]
                                             for b in layout.buckets]}
        pairs: list[tuple[Tensor, Tensor]] = []
        square = 0.0
        for bucket, buffers in zip(layout.buckets, self._buffers[layout.digest]):
            clean = [p.data for p in bucket.parameters]
            noise.displace(bucket, v, clean, buffers,
                           [learning_rates[p] for p in bucket.parameters], seen,
                           self.situation())
            pairs += zip(bucket.parameters, buffers)
            if self.measure:
                square += sum(_square(b - c) for b, c in zip(buffers, clean))
        self._noise_squares[v] = square  # the same in all k passes of the worker
        watch.displace(pairs)

    def weigh(self, losses: Tensor, v: int, part: int, parts: int) -> Tensor:
        """The loss of part ``part`` of ``parts`` of a worker's batch from its examples' losses."""
        if self.noise is None or self.noise.acts_on != "examples":
            return losses.mean()
        now = replace(self.situation(), examples_per_worker=len(losses) * parts)
        weights = self.noise.example_weights(now.workers[v], part, len(losses), now)
        self._weighed = True
        return (weights.to(losses) * losses).mean()

    def worker_weight(self, v: int) -> float:
        """The factor of the gradient of this rank's worker number ``v``."""
        if self.noise is None or self.noise.acts_on != "workers":
            return 1.0
        if self._weights is None:
            now = self.situation()
            weights_W = self.noise.worker_weights(now).tolist()
            self._weights = [weights_W[worker] for worker in now.workers]
        return self._weights[v]

    def captured(self, grad: Tensor | None) -> None:
        """A worker's gradient of one parameter is known."""
        if self.measure and grad is not None:
            self._local_squares.append(torch.linalg.vector_norm(grad).double().square())

    def end_pass(self) -> None:
        """A backward pass is through: the weights are clean again."""
        if self.watch is not None:
            self.watch.restore()

    def check_weighed(self) -> None:
        """Raise where the loss of an exchanged backward pass was not weighed but had to be."""
        if self.noise is not None and self.noise.acts_on == "examples" and not self._weighed:
            raise RuntimeError("covariance noise from examples weighs their losses: call "
                               "loss = optimizer.weigh(losses) before backward()")
        self._weighed = False

    # ------------------------------------------------------------------ after the reduction

    def finish(self, exchange: Exchange) -> None:
        """Wait for the mean gradients, put noise on them, measure."""
        exchange.finish()
        scale, noise = self._current_loss_scale(), self.noise
        if noise is not None and noise.acts_on == "mean":
            assert self.history.new is not None
            seen, now, added = self.history.new.settle(), self.situation(), 0.0
            for bucket, reduced_N in exchange.reduced():
                noise_N = noise.mean_noise(bucket, seen, now)
                reduced_N.add_(noise_N, alpha=scale)
                if self.measure:
                    added += _square(noise_N)
            self._noise_squares = dict.fromkeys(range(self.virtual_workers), added)
        if self.measure:
            self._measure(exchange, scale)
        self.begin_worker()

    def _measure(self, exchange: Exchange, scale: float) -> None:
        mine = torch.tensor([sum(map(float, self._local_squares)) / scale ** 2,
                             sum(self._noise_squares.values())], dtype=torch.float64)
        mean = self.world.allreduce_(mine, name="hvdnoise.measure").wait() / self.virtual_workers
        worker, noise = mean.tolist()
        total = sum(_square(flat) for _, flat in exchange.reduced())
        known = self.noise is None or self.noise.acts_on in ("weights", "mean")
        self.measured = Measured(worker, total / scale ** 2, math.sqrt(noise) if known else None)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, for a bitwise resumption."""
        return {"steps": self.steps, "seen": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None, layout: Layout) -> None:
        """Take over a state; None starts the noise anew."""
        self.begin_step()
        self.history.forget()
        self.steps = state["steps"] if state else 0
        if self.noise is not None and state:
            self.history.load_state_dict(state["seen"], self.noise, self.situation(), layout)


def _alike(p: Tensor) -> Tensor:
    """An empty tensor with the very strides of ``p``, by which layouts are told apart."""
    return torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device)


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32).double().square()
                 if tensor.dtype != torch.float64 else tensor.square().sum())
