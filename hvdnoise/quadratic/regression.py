"""A linear regression in two dimensions: paths of a small batch, a large one, and noises.

Example n has the loss (z_n'theta - e_n)^2/2 with z_n ~ N(0, H) and e_n ~ N(0, 1), drawn anew in
each step, so the expected loss is theta'H theta/2 + 1/2 and one example's gradient has, at
theta = 0, the covariance H. The small batch is that which the noises emulate.

Measured are

    noise       E n n' of n = gradient - H theta in the second half of the steps, how far it is from
                the small batch's (Frobenius norm of the difference over the small batch's norm),
                and its trace over that of the small batch
    excess      the mean of theta'H theta/2 over all steps, and over the last third
    steps       until the excess, in the mean of the runs, is below 5% of its start

Idea: the first figure of Wen et al. 2020, arXiv:1902.08234, as described in docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator

import numpy as np
import torch
from torch import Tensor

from hvdnoise import streams
from hvdnoise.comm import World
from hvdnoise.noise import COVARIANCES, CovarianceNoise
from hvdnoise.quadratic.intervals import difference
from hvdnoise.quadratic.problem import COPIES, Array, Problem, Rows, follow

HESSIAN: Array = np.array([[1.0, 0.3], [0.3, 0.25]])
START: Array = np.array([2.0, -3.0])
RATE, STEPS, RUNS = 0.3, 48, 6
SMALL, LARGE = 1, 16  # b
CHANCE = 0.01  # that an interval of a difference does not hold the true one
STRUCTURES = ("isotropic", "full", "diagonal")


class Regression(Rows):
    """The regression's losses of some examples, the sum over K of them."""

    def __init__(self) -> None:
        super().__init__(START, sizes=(2,))

    def forward(self, z_bKP: Tensor, e_bK: Tensor) -> Tensor:
        """(b,)"""
        return 0.5 * (((z_bKP * self.theta).sum(2) - e_bK) ** 2).sum(1)


@dataclass(frozen=True)
class Paths:
    """What one way to train did.

    Args:
        name: small batch, large batch, or a structure.
        theta_RTKP: the weights before each step, of all runs and problems.
        noise_RTKP: the gradients' deviations from H theta.
    """

    name: str
    theta_RTKP: Array
    noise_RTKP: Array

    @property
    def excess_RT(self) -> Array:
        """theta'H theta/2, the mean of the K problems."""
        value: Array = 0.5 * np.einsum("rtkp,pq,rtkq->rtk", self.theta_RTKP, HESSIAN,
                                       self.theta_RTKP).mean(2)
        return value

    @property
    def noise_PP(self) -> Array:
        """E n n', in the second half."""
        late_NP = self.noise_RTKP[:, STEPS // 2:].reshape(-1, 2)
        moment: Array = late_NP.T @ late_NP / len(late_NP)
        return moment


def ways() -> list[str]:
    """The names of `Paths`: both batches, and the structures that are registered."""
    return ["small batch", "large batch",
            *(each for each in STRUCTURES if (each, "workers") in COVARIANCES)]


def train(way: str, problem: Problem, world: World, seed: int) -> Iterator[Paths | None]:
    """None after each run, and at last the paths. Collective."""
    size = SMALL if way == "small batch" else LARGE
    emulated = problem.workers * SMALL
    chosen = Problem(RATE, 0.0, problem.workers, size, emulated)
    thetas, noises = [], []
    for run in range(RUNS):
        noise = None if way.endswith("batch") else CovarianceNoise(
            way, emulated, batch_size=size, seed=streams.seed_for(seed, way, run))
        before, _, gradients = follow(Regression(), chosen, noise, world,
                                      _batches(chosen, seed, run))
        thetas.append(before)
        noises.append(gradients - before @ HESSIAN)
        yield None
    yield Paths(way, np.stack(thetas), np.stack(noises))


def _batches(problem: Problem, seed: int, run: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """By step and worker; the small batch is the beginning of the large one."""
    root = torch.from_numpy(np.linalg.cholesky(HESSIAN))
    for step in range(STEPS):
        yield [(normal[:problem.batch_size, :, :2] @ root.T, normal[:problem.batch_size, :, 2])
               for worker in range(problem.workers)
               for normal in [streams.normal((LARGE, COPIES, 3), seed, "regression", run, step,
                                             worker, dtype=torch.float64)]]


def results(paths: list[Paths]) -> list[dict[str, Any]]:
    """What was measured of each, the small batch first, as JSON values."""
    small, rows, late = paths[0].noise_PP, [], slice(STEPS - STEPS // 3, None)
    for each in paths:
        mean_T = each.excess_RT.mean(0)
        reached = np.flatnonzero(mean_T < 0.05 * mean_T[0])
        rows.append({
            "name": each.name, "noise": each.noise_PP.tolist(),
            "noise_distance": float(np.linalg.norm(each.noise_PP - small)
                                    / np.linalg.norm(small)),
            "noise_trace_ratio": float(np.trace(each.noise_PP) / np.trace(small)),
            "excess": float(mean_T.mean()), "last_excess": float(mean_T[late].mean()),
            "steps": int(reached[0]) if len(reached) else None, "curve": mean_T.tolist()})
    return rows


def faster(paths: list[Paths]) -> dict[str, Any] | None:
    """How much lower the diagonal's excess loss is than that of full, over all steps and over the
    last third, with intervals; if both ran.

    Runs of one number have the same data, so the differences are formed within them.
    """
    named = {each.name: each.excess_RT for each in paths}
    if not {"full", "diagonal"} <= set(named):
        return None
    gains = {}
    for when, first in (("mean", 0), ("end", STEPS - STEPS // 3)):
        gain_R = (named["full"] - named["diagonal"])[:, first:].mean(1)
        found = difference(gain_R, CHANCE)
        verdict = "yes" if found.low > 0 else "no" if found.high < 0 else "undecided"
        gains[when] = {"gain": found.mean, "low": found.low, "high": found.high,
                       "lower": verdict}
    return {**gains, "chance": CHANCE}
