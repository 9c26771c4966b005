"""The numbers of a log interval: from sums over steps and ranks to a line of metrics.

Gradient noise scale, "simple" (McCandlish et al. 2018, arXiv:1812.06162). With the mean squared
norm s_b of the workers' gradients (batches of b) and that of the averaged gradient s_B (B):

    E s_b = |G|^2 + tr C / b,    E s_B = |G|^2 + tr C / B
    tr C  = (s_b - s_B) / (1/b - 1/B),    |G|^2 = (B s_B - b s_b) / (B - b)

Both are averaged over the interval before the division tr C / |G|^2. Noise that is added to the
mean is not in s_B. Noise by weights changes what is measured: from workers, with noise that
emulates a batch of M, s_B has M in the place of B; from examples, tr C / b and tr C / B have the
factor B/M and ((B-M)/M)|G|^2 is added to tr C, which is taken out again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvdnoise.comm import World
from hvdnoise.measured import Measured
from hvdnoise.spectrum import Spectrum

SCALES = ("noise_radius", "noise_share", "noise_lr_multiple")  # see hvdnoise.measured


@dataclass(frozen=True)
class Batches:
    """b, B and, under covariance noise by weights, M and whether it comes from examples."""

    worker: int
    total: int
    emulated: int | None = None
    from_examples: bool = False


def noise_scale(worker_square: float, total_square: float, batches: Batches
                ) -> tuple[float | None, float | None, float | None]:
    """tr C / |G|^2, tr C and |G|^2; None for what these norms do not tell."""
    b, B, M = batches.worker, batches.total, batches.emulated
    if M is not None and not batches.from_examples:
        B = M
    if b == B:
        return None, None, None
    trace = (worker_square - total_square) / (1 / b - 1 / B)
    square = (B * total_square - b * worker_square) / (B - b)
    if M is not None and batches.from_examples:
        trace = (trace - (B - M) / M * square) * M / B
    return (trace / square if trace > 0 and square > 0 else None), trace, square


@dataclass
class Meter:
    """Sums since the last `flush`."""

    batches: Batches
    device: torch.device
    steps: int = 0
    bad_steps: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    learning_rate: float = 0.0  # of the last step
    sums: Tensor = field(init=False)  # loss, correct, examples; of this rank
    measured: list[Measured] = field(default_factory=list)
    spectrum: tuple[int, Spectrum] | None = None  # the last one since the last line, and its step

    def __post_init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.steps = self.bad_steps = 0
        self.seconds = self.waiting = 0.0
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.measured = []

    def add(self, sums: Tensor, *, learning_rate: float, seconds: float, waiting: float, bad: bool,
            measured: Measured | None) -> None:
        """Take in a step: ``sums`` as in the attribute, host seconds in all and in waiting."""
        self.learning_rate = learning_rate
        self.steps += 1
        self.bad_steps += bad
        self.seconds += seconds
        self.waiting += waiting
        self.sums += sums
        if measured is not None and not bad:
            self.measured.append(measured)

    def flush(self, world: World) -> dict[str, float | None]:
        """The metrics since the last time, over all ranks. Collective."""
        loss, correct, count = world.allreduce_(self.sums.cpu(), name="meter", op="sum"
                                                ).wait().tolist()
        values: dict[str, float | None] = {
            "learning_rate": self.learning_rate, "loss": loss / count, "accuracy": correct / count,
            "examples_per_second": count / self.seconds if self.seconds else None,
            "step_seconds": self.seconds / self.steps,
            "communication_seconds": self.waiting / self.steps, "bad_steps": self.bad_steps,
            **{name: self._root_mean_square(name) for name in SCALES}}
        if self.measured:
            worker = _mean([each.worker_square_norm for each in self.measured])
            total = _mean([each.gradient_square_norm for each in self.measured])
            mean = _mean([each.mean_square_norm for each in self.measured])
            scale, trace, square = noise_scale(worker, mean, self.batches)
            values.update(
                noise_rms=self._root_mean_square("noise_rms"),
                worker_square_norm=worker, gradient_square_norm=total,
                noise_weight_deviation=self.measured[-1].weight_deviation,
                gradient_noise_scale=scale, gradient_noise_trace=trace,
                true_gradient_square_norm=square)
        self._clear()
        return values

    def _root_mean_square(self, name: str) -> float | None:
        """Over the measured steps in which it is known."""
        known = [value for each in self.measured if (value := getattr(each, name)) is not None]
        return math.sqrt(_mean([value ** 2 for value in known])) if known else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
