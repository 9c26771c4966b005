"""The spectrum of the workers' covariance against numpy, whatever the noise, plan and ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hvdnoise import GNC, CovarianceNoise
from tests import reference
from tests.fake_world import ThreadWorld, run_threads
from tests.toys import Dense, batch, build, losses, relative_error, train, vector

W, B, STEPS = 4, 4, 3
NOISES: dict[str, Any] = {
    "none": lambda: None, "own": lambda: GNC(0.3),
    "isotropic": lambda: GNC(0.3, source="isotropic"),
    "gathered": lambda: GNC(0.3, source="gathered"),
    "lag 2": lambda: GNC(0.3, source="gathered", lag=2), "lag 0": lambda: GNC(0.3, lag=0),
    "layerwise": lambda: CovarianceNoise("layerwise", 5),
    "both": lambda: [GNC(0.3), CovarianceNoise("diagonal", 5)]}


def run(noise: str, ranks: int, scale: float = 1.0, **options: Any) -> Any:
    """The spectrum of the last step, equal on all ranks, and the weights with and without it."""
    def work(world: ThreadWorld, wanted: bool) -> Any:
        model, optimizer = build(world, NOISES[noise](), V=W // ranks, bucket_bytes=100, **options)
        assert optimizer.spectrum is None
        optimizer.spectrum_batch = B if wanted else None
        train(model, optimizer, STEPS, b=B, loss_scale=scale)
        return optimizer.spectrum, vector(model.parameters())
    with_it, without = (run_threads(ranks, lambda world: work(world, wanted))
                        for wanted in (True, False))
    assert all(each[0] == with_it[0][0] for each in with_it)
    assert without[0][0] is None and torch.equal(without[0][1], with_it[0][1])
    return with_it[0][0]


def check(found: Any, gradients_WP: Any, dense: Dense) -> None:
    covariance_PP = reference.worker_covariance(gradients_WP, B)
    values = np.linalg.eigvalsh(covariance_PP)[::-1]
    mean_P = gradients_WP.mean(axis=0)
    assert found.trace == pytest.approx(np.trace(covariance_PP), rel=1e-9)
    assert found.frobenius == pytest.approx(np.linalg.norm(covariance_PP), rel=1e-9)
    assert relative_error(found.eigenvalues, values[:3]) < 1e-9
    assert found.stable_rank == pytest.approx(np.trace(covariance_PP) / values[0], rel=1e-9)
    assert found.alignment == pytest.approx(
        mean_P @ covariance_PP @ mean_P / (mean_P @ mean_P * np.trace(covariance_PP)), rel=1e-9)
    names = [name for name, _ in dense.model.named_parameters()]
    shares = [np.diag(covariance_PP)[where].sum() / np.trace(covariance_PP)
              for where in dense.tensors()]
    assert relative_error([found.shares[name] for name in names], shares) < 1e-9


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_without_noise(ranks: int) -> None:
    dense = Dense(W, b=B)
    for step in range(STEPS):
        gradients_WP = dense.worker_gradients(step)
        dense.update(gradients_WP.mean(axis=0))
    check(run("none", ranks), gradients_WP, dense)
    check(run("none", ranks, scale=1024.0), gradients_WP, dense)


@pytest.mark.parametrize("noise", NOISES)
def test_with_every_noise_it_is_the_same_on_any_ranks(noise: str) -> None:
    one, two, four = (run(noise, ranks) for ranks in (1, 2, 4))
    for other in (two, four):
        assert relative_error([other.trace, *other.eigenvalues, other.alignment],
                              [one.trace, *one.eigenvalues, one.alignment]) < 1e-9


@pytest.mark.parametrize("plan", ["allgather", "gather-only", "transpose"])
def test_every_plan(plan: str) -> None:
    one, two = run("gathered", 1), run("gathered", 2, exchange=plan)
    assert relative_error([two.trace, *two.eigenvalues], [one.trace, *one.eigenvalues]) < 1e-9


def test_one_worker_has_none() -> None:
    def work(world: ThreadWorld) -> None:
        model, optimizer = build(world, GNC(0.1), V=2)
        optimizer.spectrum_batch = B
        train(model, optimizer, 1)
        assert len(optimizer.spectrum.eigenvalues) == 1
    run_threads(1, work)

    def alone(world: ThreadWorld) -> None:
        model, optimizer = build(world, CovarianceNoise("full", 2, source="examples"))
        optimizer.spectrum_batch = B
        train(model, optimizer, 1)
        assert optimizer.spectrum is None
    run_threads(1, alone)


@pytest.mark.parametrize("before, within", [(B, None), (None, B), (B, 1)])
def test_it_is_asked_for_before_a_step(before: int | None, within: int | None) -> None:
    """What is set in the middle of a step is for the next one."""
    def work(world: ThreadWorld, within: int | None) -> Any:
        model, optimizer = build(world, GNC(0.1), V=2)
        optimizer.spectrum_batch = before
        for worker in optimizer.workers:
            x, y = batch(0, worker, B)
            losses(model(x), y).mean().backward()
            optimizer.spectrum_batch = within
        optimizer.step()
        return optimizer.spectrum
    ((changed,), (whole,)) = (run_threads(1, lambda world: work(world, each))
                              for each in (within, before))
    assert changed == whole and (whole is None) == (before is None)


@pytest.mark.parametrize("examples", [0, -3, 2.5, "4", True])
def test_a_batch_that_is_none(examples: Any) -> None:
    def work(world: ThreadWorld) -> None:
        _, optimizer = build(world, None, V=2)
        with pytest.raises(ValueError, match="^spectrum_batch=.* must be an integer >= 1"):
            optimizer.spectrum_batch = examples
    run_threads(1, work)
