"""The quadratic, and one run of the real optimizer on it.

Example n has the loss theta'A theta/2 + x_n'theta, with x_n ~ N(0, C) drawn anew in each step. So
one example's gradient has the covariance C wherever the weights are, and C = A here (Fisher =
Hessian). theta is two tensors of two numbers. C is a Kronecker product G (x) A of two covariances,
so that theta may also be the weight (2, 2) of a linear layer and x_n = g_n (x) a_n, with the
layer's input a_n ~ N(0, A) and its output's gradient g_n ~ N(0, G), which Kronecker noise sees.

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
INPUTS: Array = np.array([[1.0, 0.25], [0.25, 0.4]])  # A of a layer
OUTPUTS: Array = np.array([[1.0, 0.28], [0.28, 0.5]])  # G
HESSIAN: Array = np.asarray(np.kron(OUTPUTS, INPUTS), dtype=np.float64)
START: Array = np.array([1.0, -1.0, 1.0, -1.0])
COPIES, LAYERS = 32, 8  # K; in layers, which cost more


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
        return self.rows(list(self.parts))

    def rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Of tensors like its parameters: (K, P)."""
        return torch.cat(list(tensors), dim=1)


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


class Layers(nn.Module):
    """The quadratic with K = `LAYERS` linear layers."""

    def __init__(self) -> None:
        super().__init__()
        outputs, inputs = len(OUTPUTS), len(INPUTS)
        self.layers = nn.ModuleList(
            nn.Linear(inputs, outputs, bias=False, dtype=torch.float64) for _ in range(LAYERS))
        self.hessian_PP = torch.from_numpy(HESSIAN)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.from_numpy(START).view(outputs, inputs))

    def rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Of tensors like its parameters: (K, P)."""
        return torch.stack([each.flatten() for each in tensors])

    def forward(self, a_bKI: Tensor, g_bKO: Tensor) -> Tensor:
        """(b,)"""
        theta_KP = self.rows(list(self.parameters()))
        quadratic = 0.5 * (theta_KP * (theta_KP @ self.hessian_PP)).sum()
        outputs_bKO = torch.stack([layer(a_bKI[:, k]) for k, layer in enumerate(self.layers)], 1)
        return quadratic + (g_bKO * outputs_bKO).sum((1, 2))


class Cubic(Rows):
    """The losses c sum theta^3 + x_n'theta, from theta = 0."""

    def __init__(self, cubic: float) -> None:
        super().__init__(np.zeros_like(START))
        self.cubic = cubic

    def forward(self, x_bKP: Tensor) -> Tensor:
        """(b,)"""
        theta_KP = self.theta
        return self.cubic * (theta_KP ** 3).sum() + (x_bKP * theta_KP).sum((1, 2))


def pulls(problem: Problem, steps: int, *key: int | str, seed: int, of: Array = HESSIAN,
          copies: int = COPIES) -> Tensor:
    """(T, W, b, K, P): the x_n of all workers, with covariance ``of``; the same on all ranks."""
    root = torch.from_numpy(np.linalg.cholesky(of))
    shape = (steps, problem.workers, problem.batch_size, copies, len(of))
    return streams.normal(shape, seed, "quadratic", *key, dtype=torch.float64) @ root.T


def layer_pulls(problem: Problem, steps: int, seed: int) -> tuple[list[list[Any]], Tensor]:
    """By step and worker, the inputs of `Layers`; and the x_n as those of `pulls`."""
    a, g = (pulls(problem, steps, name, seed=seed, of=of, copies=LAYERS)
            for name, of in (("inputs", INPUTS), ("outputs", OUTPUTS)))
    x_TWbKP = (g[..., :, None] * a[..., None, :]).flatten(-2)
    return [[*zip(a_WbKI, g_WbKO)] for a_WbKI, g_WbKO in zip(a, g)], x_TWbKP


def follow(model: Rows | Layers, problem: Problem, noise: Noise | None, world: World,
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
        before.append(_numbers(model, model.parameters()))
        optimizer.zero_grad()
        for worker in optimizer.workers:
            inputs = batch[worker]
            if isinstance(inputs, Tensor):
                optimizer.observe_examples(model, lambda losses, _: losses, inputs, inputs)
            losses = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
            optimizer.weigh(losses).backward()
        optimizer.synchronize()
        gradients.append(_numbers(model, [part.grad for part in model.parameters()]))
        with optimizer.skip_synchronize():
            optimizer.step()
        after.append(_numbers(model, model.parameters()))
    return np.stack(before), np.stack(after), np.stack(gradients)


def _numbers(model: Rows | Layers, tensors: Iterable[Any]) -> Array:
    rows: Array = model.rows([each.detach() for each in tensors]).numpy().copy()
    return rows
