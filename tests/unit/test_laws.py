"""The laws of the noises, from many steps of the real optimizer, by exact tests (tests/laws.py).

The loss <theta, a_n> has the same gradients wherever the weights are, so every step draws from
one known law, and the steps are independent. Each test raises a false alarm for at most one choice
of seeds in a million.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hvdnoise import GNC, CovarianceNoise, DistributedOptimizer
from tests import reference
from tests.fake_world import ThreadWorld, run_threads
from tests.laws import assert_normal
from tests.linear import B_WORKER, P, W, all_displacements, drive, examples
from tests.toys import relative_error

STEPS = 1500  # on one rank; the same law needs no such precision in every world


def steps_for(size: int) -> int:
    return STEPS if size == 1 else STEPS // 5


@pytest.mark.slow
@pytest.mark.parametrize("source, size", [("gathered", 1), ("gathered", 2), ("isotropic", 1)])
def test_displacements_of_all_workers(source: str, size: int) -> None:
    """Each worker's law, and that workers are independent: one vector of W*P numbers a step."""
    rho = 0.7
    deviations_WP = reference.deviations(examples().mean(dim=1))
    s = reference.expected_radius_scale(deviations_WP, rho)
    covariance_PP = reference.gnc_gathered_covariance(deviations_WP, s)
    if source == "isotropic":
        covariance_PP = np.trace(covariance_PP) / P * np.eye(P)
    assert np.trace(covariance_PP) == pytest.approx(rho ** 2)
    samples = all_displacements(lambda: GNC(rho, source=source, seed=1), size, steps_for(size))
    assert_normal(samples.flatten(1), np.kron(np.eye(W), covariance_PP), source)


@pytest.mark.slow
def test_successive_displacements_are_independent() -> None:
    """Two steps as one vector; for the gathered noise the numbers are drawn a step earlier."""
    deviations_WP = reference.deviations(examples().mean(dim=1))
    covariance_PP = reference.gnc_gathered_covariance(
        deviations_WP, reference.expected_radius_scale(deviations_WP, 1.0))
    samples = all_displacements(lambda: GNC(1.0, source="gathered"), 1, STEPS)
    assert_normal(samples[:, 0].reshape(-1, 2 * P), np.kron(np.eye(2), covariance_PP))


@pytest.mark.slow
def test_seeds_are_independent_too() -> None:
    deviations_WP = reference.deviations(examples().mean(dim=1))
    covariance_PP = reference.gnc_gathered_covariance(
        deviations_WP, reference.expected_radius_scale(deviations_WP, 1.0))
    samples = [all_displacements(lambda: GNC(1.0, source="gathered", seed=seed), 1, 1)[0].flatten()
               for seed in range(400)]
    assert_normal(torch.stack(samples), np.kron(np.eye(W), covariance_PP))


M = 3


def noise_on_the_gradient(make: Any, size: int) -> torch.Tensor:
    """(steps, P)"""
    everyone = run_threads(size, lambda world: drive(world, make(), steps_for(size))[1])
    assert all(torch.equal(each, everyone[0]) for each in everyone), "ranks add different noise"
    return everyone[0] - examples().mean(dim=(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("structure", ["full", "isotropic", "layerwise", "diagonal"])
def test_worker_covariance(structure: str, size: int) -> None:
    """The gradients are the same in every step, so a running mean of them is known too."""
    covariance_PP = reference.worker_covariance(examples().mean(dim=1), B_WORKER)
    noise = noise_on_the_gradient(lambda: CovarianceNoise(structure, M), size)
    assert_normal(noise, reference.noise_covariance(structure, covariance_PP, W * B_WORKER, M))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_example_covariance(size: int) -> None:
    second_PP = reference.example_second_moment(examples().flatten(0, 1))
    noise = noise_on_the_gradient(lambda: CovarianceNoise("full", M, source="examples"), size)
    assert_normal(noise, reference.noise_covariance("full", second_PP, W * B_WORKER, M))


def test_the_tests_would_notice() -> None:
    """W for W-1, a trace for a matrix, a shared stream for a private one."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(STEPS, W, P, generator=generator, dtype=torch.float64)
    wrong = {"W for W-1": (samples * (3 / 4) ** 0.5, 1.0), "shared": (samples[:, :1] + 0 * samples,
             1.0), "biased": (samples + 0.2, 1.0)}
    assert_normal(samples.flatten(1), np.eye(W * P))
    for what, (bad, variance) in wrong.items():
        with pytest.raises(AssertionError):
            assert_normal(bad.flatten(1), variance * np.eye(W * P), what)


# ---- the oracle: a convex quadratic with noise (METHODS section 5)

A = np.array([[1.0, 0.3], [0.3, 0.4]])
RATE, T, RUNS = 0.5, 5, 400


class Quadratic(torch.nn.Module):
    """Worker i's loss: theta'A theta/2 + <theta, a_i>, the a_i summing to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, a_bP: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.theta @ torch.from_numpy(A) @ self.theta + a_bP @ self.theta


def pulls() -> torch.Tensor:
    """(4 workers, b = 2, P = 2)"""
    a = torch.tensor([[1.0, 0.2], [-0.5, 1.0], [0.3, -1.5], [-0.8, 0.3]], dtype=torch.float64)
    return torch.stack([a, a], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("structure, momentum", [("full", 0.0), ("full", 0.6),
                                                 ("isotropic", 0.0)])
def test_second_moments_on_a_quadratic(structure: str, momentum: float) -> None:
    """From theta = 0 the weights after T steps are exactly N(0, Sigma_T), so E L is too."""
    noise_PP = reference.noise_covariance(
        structure, reference.worker_covariance(pulls().mean(dim=1), 2), 8, 1)
    if momentum:
        moment = np.zeros((4, 4))
        for _ in range(T):
            moment = reference.quadratic_momentum_step(A, noise_PP, RATE, momentum, moment)
        moment = moment[:2, :2]
    else:
        moment = np.zeros((2, 2))
        for _ in range(T):
            moment = reference.quadratic_step(A, noise_PP, RATE, moment)

    def work(world: ThreadWorld) -> torch.Tensor:
        ends = []
        for seed in range(RUNS):
            model = Quadratic()
            optimizer = DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=RATE, momentum=momentum), world=world,
                noise=CovarianceNoise(structure, 1, seed=seed), virtual_workers=4 // world.size)
            for _ in range(T):
                optimizer.zero_grad()
                for worker in pulls().chunk(world.size)[world.rank]:
                    model(worker).mean().backward()
                optimizer.step()
            ends.append(model.theta.detach().clone())
        return torch.stack(ends)

    assert_normal(run_threads(1, work)[0], moment, "weights after the last step")


def test_gnc_does_not_bias_a_quadratic() -> None:
    """own: mean(delta_i) = 0, so the averaged gradient is A theta to rounding."""
    def work(world: ThreadWorld) -> None:
        model = Quadratic()
        with torch.no_grad():
            model.theta.copy_(torch.tensor([2.0, -1.0]))
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=RATE), world=world,
                                         noise=GNC(3.0), virtual_workers=2)
        for _ in range(4):
            theta = model.theta.detach().numpy().copy()
            optimizer.zero_grad()
            for worker in pulls().chunk(2)[world.rank]:
                model(worker).mean().backward()
            assert relative_error(model.theta.grad, A @ theta) < 1e-13
            optimizer.step()

    run_threads(2, work)


CUBIC = 0.2


class Cubic(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([1.5], dtype=torch.float64))

    def forward(self, pull: torch.Tensor) -> torch.Tensor:
        return (CUBIC * self.theta ** 3 + pull * self.theta).sum()


def test_gnc_smooths_a_cubic() -> None:
    """The averaged gradient of c theta^3 gains 3 c Var(delta), for the own source exactly."""
    pull_W = torch.tensor([1.0, -2.0, 0.5, 0.5], dtype=torch.float64)

    def work(world: ThreadWorld) -> None:
        model = Cubic()
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), world=world,
                                         noise=GNC(lr=4.0), virtual_workers=2)
        displacements_W = torch.zeros(4, dtype=torch.float64)
        for step in range(5):
            clean = model.theta.item()
            optimizer.zero_grad()
            for pull in pull_W.chunk(2)[world.rank].split(1):
                model(pull).backward()
            gain = reference.cubic_gradient_gain(CUBIC, float(displacements_W.var(correction=0)))
            assert step == 0 or gain > 1e-3
            expected = 3 * CUBIC * clean ** 2 + gain
            assert relative_error(model.theta.grad, [expected]) < 1e-13
            gradients_W = 3 * CUBIC * (clean + displacements_W) ** 2 + pull_W
            displacements_W = -4.0 * 0.1 * (gradients_W - gradients_W.mean())
            optimizer.step()

    run_threads(2, work)
