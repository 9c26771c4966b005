"""The quadratic, and one run of the real optimizer on it.

Example n has the loss theta'A theta/2 + x_n'theta, with x_n ~ N(0, C) drawn anew in each step. So
one example's gradient has the covariance C wherever the weights are, and C = A here (Fisher =
Hessian). theta is two tensors of two numbers.

K such problems are trained at once, with x_n of their own: theta is K rows of P = 4 numbers, and an
example's loss is the sum over them. Every noise then has the law of one problem in each of them:
traces and numbers both grow K-fold. But what a noise draws for a worker or an example is shared by
the K, so that they are not independent, and one value for all of them is what counts. Numbers are
float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvdnoise import DistributedOptimizer, streams
from hvdnoise.comm import World
from hvdnoise.noise import Noise

Array = NDArray[np.float64]
SIZES = (2, 2)
_VARIANCES = np.array([1.0, 0.4, 0.5, 0.2])
_CORRELATION = 0.4
HESSIAN: Array = np.sqrt(np.outer(_VARIANCES, _VARIANCES)) * (
    _CORRELATION + (1 - _CORRELATION) * np.eye(len(_VARIANCES)))
START: Array = np.array([1.0, -1.0, 1.0, -1.0])
COPIES = 32  # K


@dataclass(frozen=True)
class Problem:
    """The quadratic, and the numbers of a run on it.

    Args:
        learning_rate: alpha.
        momentum: mu of SGD.
        workers: W.
        batch_size: b, examples of a worker and step.
        emulated_batch: M.
    """

    learning_rate: float
    momentum: float
    workers: int
    batch_size: int
    emulated_batch: int

    @property
    def batch(self) -> int:
        """B = W b."""
        return self.workers * self.batch_size

    @property
    def missing(self) -> float:
        """1/M - 1/B."""
        return 1 / self.emulated_batch - 1 / self.batch

    @property
    def noise_scale(self) -> float:
        """s of GNC: its displacements have 0.5/lambda_max of the deviations' size."""
        return 0.5 / float(np.linalg.eigvalsh(HESSIAN)[-1])


class Rows(nn.Module):
    """theta_KP as parameter tensors of some of its columns each."""

    def __init__(self, start_P: Array, sizes: Sequence[int] = SIZES) -> None:
        super().__init__()
        rows_KP = torch.from_numpy(start_P).repeat(COPIES, 1)
        self.parts = nn.ParameterList(
            nn.Parameter(part.clone()) for part in rows_KP.split(list(sizes), dim=1))

    @property
    def theta(self) -> Tensor:
        """(K, P)"""
        return torch.cat(list(self.parts), dim=1)


class Quadratic(Rows):
    """The quadratic's losses of some examples."""

    def __init__(self) -> None:
        super().__init__(START)
        self.hessian_PP = torch.from_numpy(HESSIAN)

    def forward(self, x_bKP: Tensor) -> Tensor:
        """(b,)"""
        theta_KP = self.theta
        quadratic = 0.5 * (theta_KP * (theta_KP @ self.hessian_PP)).sum()
        return quadratic + (x_bKP * theta_KP).sum((1, 2))


class Cubic(Rows):
    """The losses c sum theta^3 + x_n'theta, from theta = 0."""

    def __init__(self, cubic: float) -> None:
        super().__init__(np.zeros_like(START))
        self.cubic = cubic

    def forward(self, x_bKP: Tensor) -> Tensor:
        """(b,)"""
        theta_KP = self.theta
        return self.cubic * (theta_KP ** 3).sum() + (x_bKP * theta_KP).sum((1, 2))


def pulls(problem: Problem, steps: int, *key: int | str, seed: int) -> Tensor:
    """(T, W, b, K, P): the x_n of all workers; the same on all ranks."""
    root = torch.from_numpy(np.linalg.cholesky(HESSIAN))
    shape = (steps, problem.workers, problem.batch_size, COPIES, len(HESSIAN))
    return streams.normal(shape, seed, "quadratic", *key, dtype=torch.float64) @ root.T


def follow(model: Rows, problem: Problem, noise: Noise | None, world: World,
           batches: Any) -> tuple[Array, Array, Array]:
    """Train a model, one step for each of the batches.

    Args:
        batches: by step and worker, of all workers, the model's inputs: a tensor or a tuple.

    Returns:
        theta before each step, after it, and the gradient of the step with its noise; (T, K, P)
        each. The same on all ranks.
    """
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=problem.learning_rate, momentum=problem.momentum),
        model.named_parameters(), noise=noise, world=world,
        virtual_workers=problem.workers // world.size)
    before, after, gradients = [], [], []
    for batch in batches:
        before.append(_numbers(model.parts))
        optimizer.zero_grad()
        for worker in optimizer.workers:
            inputs = batch[worker]
            if isinstance(inputs, Tensor):
                optimizer.observe_examples(model, lambda losses, _: losses, inputs, inputs)
            losses = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
            optimizer.weigh(losses).backward()
        optimizer.synchronize()
        gradients.append(_numbers([part.grad for part in model.parts]))
        with optimizer.skip_synchronize():
            optimizer.step()
        after.append(_numbers(model.parts))
    return np.stack(before), np.stack(after), np.stack(gradients)


def _numbers(parts_KP: Iterable[Any]) -> Array:
    rows: Array = torch.cat([part.detach() for part in parts_KP], dim=1).numpy().copy()
    return rows
