"""What the second moments must be: dense formulas in float64, independent of the noises' code.

With Sigma = E theta theta', a step theta' = theta - alpha (A theta + xbar + nu), xbar the mean of
the x_n, has

    Sigma' = (I - alpha A) Sigma (I - alpha A) + alpha^2 (C/B + N),   N = E nu nu'

exactly, when xbar and nu have mean 0 given the past and are uncorrelated. For momentum mu, with
v' = mu v + A theta + xbar + nu and theta' = theta - alpha v', the same holds for (theta, v). N is

    covariance noise      (1/M - 1/B) S; S is made from C, as estimates C^ of it enter linearly
    full, from examples   (1/M - 1/B) (C + A Sigma A): uncentred, so the mean gradient counts
    diagonal, from them   (1/M - 1/B) times the running mean of diag(C + A Sigma A), as observed
    GNC                   A E[deltabar deltabar'] A, deltabar the mean of the W displacements

E deltabar deltabar' is 0 for ``own``. Otherwise it is s^2 S(G)/W, G = E D'D/(W-1) of the step
before, for which G' = C/b + s^2 A S(G) A and S(G) is G itself (gathered) or white noise of its
trace. One step's increase of E L due to the noise is alpha^2/2 tr(A N).

Source: section 5 of docs/methods.md; the rest is derived for this project.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np

from hvdnoise.quadratic.problem import HESSIAN, SIZES, Array, Problem

COVARIANCE = HESSIAN  # C
FORMULAS = ("full", "diagonal", "kronecker", "isotropic", "layerwise")


def structured(structure: str, covariance_PP: Array, sizes: Sequence[int] = SIZES) -> Array:
    """S, (P, P), of a covariance.

    Args:
        structure: one of `FORMULAS`.
        sizes: of the parameter tensors, for layerwise.
    """
    if structure in ("full", "kronecker"):  # C is a Kronecker product
        return covariance_PP
    if structure == "diagonal":
        return np.diag(np.diag(covariance_PP))
    variance_P, start = np.diag(covariance_PP).copy(), 0
    for size in [len(covariance_PP)] if structure == "isotropic" else sizes:
        variance_P[start:start + size] = variance_P[start:start + size].mean()
        start += size
    return np.diag(variance_P)


class Law:
    """No noise: N = 0. One object for one run; its steps come in their order."""

    multiplies = False  # whether N grows with Sigma

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def moment(self, sigma_PP: Array) -> Array:
        """N of the next step, from the Sigma before it."""
        return np.zeros_like(sigma_PP)


class CovarianceLaw(Law):
    """Covariance noise of a structure, from the workers."""

    def __init__(self, problem: Problem, structure: str) -> None:
        super().__init__(problem)
        self.structure = structure

    def moment(self, sigma_PP: Array) -> Array:
        return self.problem.missing * structured(self.structure, COVARIANCE)


class ExamplesLaw(Law):
    """Full covariance noise from the examples."""

    multiplies = True

    def moment(self, sigma_PP: Array) -> Array:
        return self.problem.missing * (COVARIANCE + HESSIAN @ sigma_PP @ HESSIAN)


class ExamplesDiagonalLaw(Law):
    """Diagonal covariance noise from the examples of every n-th step, with a decay."""

    def __init__(self, problem: Problem, decay: float, every: int) -> None:
        super().__init__(problem)
        self.decay, self.every = decay, every
        self._step, self._weight, self._sum_P = 0, 0.0, np.zeros(len(HESSIAN))

    def moment(self, sigma_PP: Array) -> Array:
        if self._step % self.every == 0:
            seen_P = np.diag(COVARIANCE + HESSIAN @ sigma_PP @ HESSIAN)
            self._sum_P = self.decay * self._sum_P + seen_P
            self._weight = self.decay * self._weight + 1
        self._step += 1
        return self.problem.missing * np.diag(self._sum_P / self._weight)


class GncLaw(Law):
    """GNC with lag 1 and s the problem's; a structure, or "" for ``own``."""

    def __init__(self, problem: Problem, structure: str) -> None:
        super().__init__(problem)
        self.structure = structure
        self._delta_PP = np.zeros_like(HESSIAN)  # of one worker, given the step before

    def moment(self, sigma_PP: Array) -> Array:
        seen_PP = HESSIAN @ self._delta_PP @ HESSIAN
        if self.structure:
            spread_PP = COVARIANCE / self.problem.batch_size + seen_PP
            self._delta_PP = self.problem.noise_scale ** 2 * structured(self.structure, spread_PP)
        return seen_PP / self.problem.workers


def transition(problem: Problem) -> tuple[Array, Array]:
    """F (2P, 2P) and H (2P, P): (theta, v)' = F (theta, v) + H (xbar + nu)."""
    one, alpha, mu = np.eye(len(HESSIAN)), problem.learning_rate, problem.momentum
    step = np.block([[one - alpha * HESSIAN, -alpha * mu * one], [HESSIAN, mu * one]])
    return step, np.vstack([-alpha * one, one])


def moments(problem: Problem, law: Law, start_P: Array, steps: int) -> tuple[Array, Array]:
    """Sigma after each step, and N of each step; (T, P, P) both."""
    size = len(start_P)
    step, entry = transition(problem)
    state = np.zeros((2 * size, 2 * size))
    state[:size, :size] = np.outer(start_P, start_P)
    sigmas, noises = [], []
    for _ in range(steps):
        noise_PP = law.moment(state[:size, :size])
        state = step @ state @ step.T + entry @ (COVARIANCE / problem.batch + noise_PP) @ entry.T
        sigmas.append(state[:size, :size])
        noises.append(noise_PP)
    return np.stack(sigmas), np.stack(noises)


def growth(problem: Problem, multiplies: bool) -> float:
    """The factor by which a large second moment grows in a step, in the long run."""
    size = len(HESSIAN)
    step, entry = transition(problem)
    linear = np.kron(step, step)
    if multiplies:
        pick = np.hstack([HESSIAN, np.zeros((size, size))])
        linear = linear + problem.missing * np.kron(entry @ pick, entry @ pick)
    return float(np.abs(np.linalg.eigvals(linear)).max())


def loss(sigma_PP: Array) -> Array:
    """E L = tr(A Sigma)/2; also of a stack (T, P, P)."""
    value: Array = 0.5 * np.einsum("pq,...qp->...", HESSIAN, sigma_PP)
    return value


def increase(problem: Problem, noise_PP: Array) -> Array:
    """alpha^2/2 tr(A N); also of a stack."""
    value: Array = problem.learning_rate ** 2 * loss(noise_PP)
    return value
