"""What is measured of the real optimizer, and whether it agrees with theory.

One value of a quantity is the mean over the steps and the K problems of one run. Runs have their
own seeds for data and noise, so the values are independent and their expectation is exact, from
the first step on: nothing is left to warm up. Of a case are compared

    loss              E L of the weights after a step, without and with momentum
    weights           E theta_p^2, for each p
    noise             alpha^2/2 E nu'A nu, one step's increase of the loss; without momentum
    direction         E (e'nu)^2 for axes e, and for sums and differences of two axes: with these,
                      every entry of E nu nu'
    no noise          of GNC own, whose displacements cancel: the largest |nu|, to rounding
    smoothing         of GNC: what the gradient of c sum theta^3 gains, 3 c sum Var(delta)

nu is exactly known in each step: the gradient, less A theta + xbar. The rate of false alarms is
shared by all intervals of a command (Bonferroni).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterator

import numpy as np

from hvdnoise import streams
from hvdnoise.comm import World
from hvdnoise.noise import GNC
from hvdnoise.quadratic import intervals, theory
from hvdnoise.quadratic.cases import GNC_SOURCES, Case
from hvdnoise.quadratic.problem import (
    COPIES,
    HESSIAN,
    START,
    Array,
    Cubic,
    Layers,
    Problem,
    Quadratic,
    follow,
    layer_pulls,
    pulls,
)

ROUNDING = 1e-10
CUBIC, RADIUS, CUBIC_RATE = 0.5, 0.6, 1e-3  # c, the radius for one of the K, alpha
DIRECTIONS = np.stack([*np.eye(len(HESSIAN)), *(
    (np.eye(len(HESSIAN))[p] + sign * np.eye(len(HESSIAN))[q]) / math.sqrt(2)
    for p in range(len(HESSIAN)) for q in range(p) for sign in (1, -1))])


@dataclass(frozen=True)
class Check:
    """One quantity of one case.

    Args:
        case: its name.
        quantity: its name (see the module).
        momentum: of the runs.
        theory: what it must be.
        measured: the mean over the runs.
        low, high: the interval of the true mean.
        verdict: agrees, differs, or undecided: an interval so wide that twice the noise, or half
            of it, would agree too.
    """

    case: str
    quantity: str
    momentum: float
    theory: float
    measured: float
    low: float
    high: float
    verdict: str


def count(case: Case, momentum: bool) -> int:
    """The intervals that a case has, of both its runs and the smoothing."""
    weights = 1 + len(HESSIAN)
    noise = 0 if case.silent else 1 + len(DIRECTIONS)
    return weights + noise + weights * (momentum and not case.on_weights) + (
        case.on_weights and not case.silent)


def quadratic(case: Case, problem: Problem, world: World, seeds: Iterator[int], *, replicas: int,
              steps: int, false_alarm: float) -> Iterator[list[Check] | None]:
    """Run a case on the quadratic: None after each run, and at last its checks. Collective."""
    runs = []
    for number in range(replicas):
        seed = next(seeds)
        model: Layers | Quadratic = Layers() if case.in_layers else Quadratic()
        batches: Any = (x_TWbKP := pulls(problem, steps, seed=seed))
        if case.in_layers:
            batches, x_TWbKP = layer_pulls(problem, steps, seed)
        before, after, gradients = follow(model, problem, case.noise(problem, seed), world,
                                          batches)
        noise = gradients - before @ HESSIAN - x_TWbKP.mean((1, 2)).numpy()
        runs.append(_quantities(problem, after, noise))
        yield None
    sigmas, noises = theory.moments(problem, case.law(problem), START, steps)
    expected = _expected(problem, sigmas.mean(0), noises.mean(0))
    checks = []
    for name, true in expected.items():
        of_noise = name.startswith(("noise", "direction"))
        if of_noise and (case.silent or problem.momentum):
            continue
        found = intervals.positive_mean(np.array([run[name] for run in runs]), false_alarm)
        checks.append(_check(case.name, name, problem.momentum, true, found,
                             decide=name == "noise"))
    if case.silent and not problem.momentum:
        largest = max(run["no noise"] for run in runs)
        checks.append(_exact(case.name, "no noise", 0.0, largest))
    yield checks


def _quantities(problem: Problem, theta_TKP: Array, noise_TKP: Array) -> dict[str, float]:
    flat_NP, noise_NP = (each.reshape(-1, len(HESSIAN)) for each in (theta_TKP, noise_TKP))
    found = _expected(problem, flat_NP.T @ flat_NP / len(flat_NP),
                      noise_NP.T @ noise_NP / len(noise_NP))
    return {**found, "no noise": float(np.abs(noise_NP).max())}


def _expected(problem: Problem, sigma_PP: Array, noise_PP: Array) -> dict[str, float]:
    """The quantities from the second moments."""
    along = np.einsum("dp,pq,dq->d", DIRECTIONS, noise_PP, DIRECTIONS)
    return {"loss": float(theory.loss(sigma_PP)),
            **{f"weights {p}": float(sigma_PP[p, p]) for p in range(len(HESSIAN))},
            "noise": float(theory.increase(problem, noise_PP)),
            **{f"direction {d}": float(value) for d, value in enumerate(along)}}


def _check(case: str, quantity: str, momentum: float, true: float, found: intervals.Interval,
           *, decide: bool) -> Check:
    verdict = "agrees" if found.low <= true <= found.high else "differs"
    if decide and not (found.high < 2 * found.mean and found.low > 0.5 * found.mean):
        verdict = "undecided"
    return Check(case, quantity, momentum, true, found.mean, found.low, found.high, verdict)


def _exact(case: str, quantity: str, true: float, found: float) -> Check:
    low, high = found - ROUNDING, found + ROUNDING
    return Check(case, quantity, 0.0, true, found, low, high,
                 "agrees" if low <= true <= high else "differs")


def smoothing(case: Case, problem: Problem, world: World, seeds: Iterator[int], *, replicas: int,
              steps: int, false_alarm: float) -> Iterator[list[Check] | None]:
    """As `quadratic`, of GNC on the cubic: the sum over all numbers of what the gradient gains.

    With a radius rho, sum Var(delta) is rho^2: exactly for ``own``, in expectation for the others.
    Half of the steps are enough here.
    """
    runs: list[Array] = []
    problem = Problem(CUBIC_RATE, 0.0, problem.workers, problem.batch_size, problem.emulated_batch)
    source = case.name.partition("-")[2]
    assert source in GNC_SOURCES
    for number in range(replicas):
        seed = next(seeds)
        x_TWbKP = pulls(problem, max(4, steps // 2), seed=seed)
        noise = GNC(RADIUS * math.sqrt(COPIES), source=source,
                    seed=streams.seed_for(seed, "smoothing"))
        before, _, gradients = follow(Cubic(CUBIC), problem, noise, world, x_TWbKP)
        gains = gradients - 3 * CUBIC * before ** 2 - x_TWbKP.mean((1, 2)).numpy()
        runs.append(gains.sum((1, 2))[1:] / COPIES)  # the first step has no displacement
        yield None
    true, gains_RT = 3 * CUBIC * RADIUS ** 2, np.stack(runs)
    if case.silent:
        yield [_exact(case.name, "smoothing", true, float(
            gains_RT.flat[np.abs(gains_RT - true).argmax()]))]
    else:
        found = intervals.positive_mean(gains_RT.mean(1), false_alarm)
        yield [_check(case.name, "smoothing", 0.0, true, found, decide=True)]
