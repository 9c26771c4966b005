"""Whole runs of the real optimizer in a world of threads, and the dense formulas of the same runs.

Everything is in float64, so agreement is to rounding: ``RTOL`` is far above the rounding of a few
steps and far below any wrong factor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hvdnoise import GNC, CovarianceNoise, streams
from tests import reference
from tests.fake_world import ThreadWorld, run_threads
from tests.toys import Dense, Record, build, relative_error, train, vector

RTOL = 1e-11
SMALL_BUCKETS = 100  # bytes: each bias with a weight or alone, several buckets
RATES = (0.1, 0.3)  # two groups of parameters
SIZES = {"lr": 2.0, "radius": 0.4, "relative": 0.3}


def schedule(size: float) -> Any:
    return lambda step: size * (1 + 0.5 * step)


def run(size: int, V: int, noise_of: Any, steps: int = 3, **options: Any) -> Record:
    """Rank 0's record of a run on ``size`` ranks, all of which end with the same bits."""
    def work(world: ThreadWorld) -> Record:
        model, optimizer = build(world, noise_of(), V=V, learning_rates=RATES,
                                 bucket_bytes=SMALL_BUCKETS, **options)

        def decay(step: int) -> None:
            for group, rate in zip(optimizer.param_groups, RATES):
                group["lr"] = rate * 0.8 ** step
        return train(model, optimizer, steps, before_step=decay)

    records = run_threads(size, work)
    for other in records[1:]:
        for gradients, expected in zip(other.gradients, records[0].gradients):
            assert torch.equal(gradients, expected), "the ranks' gradients differ"
        for weights, expected in zip(other.weights, records[0].weights):
            assert torch.equal(weights, expected), "the replicas have drifted apart"
    return records[0]


def weights_after(steps: int, noise_of: Any, ranks: int, *, b: int = 4, loss_scale: float = 1.0,
                  **options: Any) -> Any:
    """(P,): the weights after a run on so many ranks, which all end with the same bits."""
    def work(world: ThreadWorld) -> Any:
        model, optimizer = build(world, noise_of(), **options)
        train(model, optimizer, steps, b=b, loss_scale=loss_scale)
        return vector(model.parameters())
    weights = run_threads(ranks, work)
    assert all(torch.equal(weights[0], each) for each in weights), "the replicas have drifted apart"
    return weights[0]


def dense(W: int) -> Dense:
    return Dense(W, learning_rates=RATES, bucket_bytes=SMALL_BUCKETS)


def assert_same_run(record: Record, expected: list[tuple[Any, Any]]) -> None:
    for step, (gradient_P, theta_P) in enumerate(expected):
        assert relative_error(record.gradients[step], gradient_P) < RTOL, f"gradient, step {step}"
        assert relative_error(record.weights[step], theta_P) < RTOL, f"weights, step {step}"


def dense_gnc(W: int, source: str, scale: str, scheduled: bool, lag: int, seed: int,
              steps: int = 3) -> list[tuple[Any, Any]]:
    """(averaged gradient, weights after) of every step."""
    model, result = dense(W), []
    past: list[Any] = []  # the deviations of each step
    for step in range(steps):
        model.rates = [rate * 0.8 ** step for rate in RATES]
        deviations_WP, seen = (past[step - lag], step - lag) if step >= lag > 0 else (None, 0)
        if lag == 0:
            deviations_WP, seen = reference.deviations(model.worker_gradients(step)), step
        displacements_WP: Any = 0.0
        if deviations_WP is not None:
            size = schedule(SIZES[scale])(step) if scheduled else SIZES[scale]
            displacements_WP = model.gnc_displacements(
                deviations_WP, seen=seen, step=step, source=source, scale=scale, size=size,
                seed=seed)
            if scale == "radius" and source == "own":  # exactly, not only on average
                rms = reference.root_mean_square_norm(displacements_WP)
                assert rms == pytest.approx(size, rel=1e-12)
        gradients_WP = model.worker_gradients(step, displacements_WP)
        past.append(reference.deviations(gradients_WP))
        mean_P = gradients_WP.mean(axis=0)
        model.update(mean_P)
        result.append((mean_P, model.theta_P))
    return result


def make_gnc(source: str, scale: str, scheduled: bool, lag: int, seed: int) -> GNC:
    size = SIZES[scale]
    value: Any = schedule(size) if scheduled else size
    return GNC(**{scale: value}, source=source, lag=lag, seed=seed)


def dense_covariance(W: int, noisy_gradient: Any, steps: int = 3) -> list[tuple[Any, Any]]:
    """``noisy_gradient(model, step)``: g + nu (P,)."""
    model, result = dense(W), []
    for step in range(steps):
        model.rates = [rate * 0.8 ** step for rate in RATES]
        gradient_P = noisy_gradient(model, step)
        model.update(gradient_P)
        result.append((gradient_P, model.theta_P))
    return result


def dense_full_workers(W: int, M: int, seed: int) -> list[tuple[Any, Any]]:
    def noisy(model: Dense, step: int) -> Any:
        gradients_WP = model.worker_gradients(step)
        epsilon_W = streams.normal(W, seed, "full-workers", step, dtype=torch.float64)
        return gradients_WP.mean(axis=0) + reference.worker_noise(gradients_WP, epsilon_W,
                                                                  model.b, M)
    return dense_covariance(W, noisy)


def dense_full_examples(W: int, M: int, seed: int, parts: int = 1) -> list[tuple[Any, Any]]:
    def noisy(model: Dense, step: int) -> Any:
        xi_Wb = np.zeros((W, model.b))
        for worker in range(W):
            for part in range(parts):  # toys.train deals a worker's examples out to its passes
                xi_Wb[worker, part::parts] = streams.normal(
                    model.b // parts, seed, "full-examples", step, worker, part,
                    dtype=torch.float64)
        weights_B = reference.example_weights(xi_Wb.reshape(-1), M)
        return (weights_B[:, None] * model.example_gradients(step)).mean(axis=0)
    return dense_covariance(W, noisy)


def dense_isotropic(W: int, M: int, seed: int) -> list[tuple[Any, Any]]:
    return dense_shared(W, M, seed, "isotropic")


def dense_shared(W: int, M: int, seed: int, structure: str, decay: float = 0.0, every: int = 1
                 ) -> list[tuple[Any, Any]]:
    """Structures without correlations; of estimates in every n-th step, a running mean."""
    seen: list[Any] = []

    def noisy(model: Dense, step: int) -> Any:
        gradients_WP = model.worker_gradients(step)
        if step % every == 0:
            seen.append(reference.worker_covariance(gradients_WP, model.b))
        return gradients_WP.mean(axis=0) + reference.shared_normal_noise(
            structure, reference.running_mean(seen, decay),
            model.normals(structure, step, seed=seed), W * model.b, M, sizes=model.sizes)
    return dense_covariance(W, noisy)


def dense_layerwise(W: int, M: int, seed: int) -> list[tuple[Any, Any]]:
    return dense_shared(W, M, seed, "layerwise")


def dense_diagonal(W: int, M: int, seed: int) -> list[tuple[Any, Any]]:
    return dense_shared(W, M, seed, "diagonal", decay=0.95, every=2)


def dense_diagonal_examples(W: int, M: int, seed: int) -> list[tuple[Any, Any]]:
    """Of the first step, which is the only one of ten that is observed."""
    seen: list[Any] = []

    def noisy(model: Dense, step: int) -> Any:
        if step == 0:
            seen.append((model.example_gradients(step) ** 2).mean(axis=0))
        missing = reference.emulation_factor(W * model.b, M)
        return model.worker_gradients(step).mean(axis=0) + np.sqrt(
            missing * seen[0]) * model.normals("diagonal", step, seed=seed)
    return dense_covariance(W, noisy)


COVARIANCES: dict[str, tuple[Any, Any]] = {
    "workers": (dense_full_workers, {"structure": "full"}),
    "examples": (dense_full_examples, {"structure": "full", "source": "examples"}),
    "isotropic": (dense_isotropic, {"structure": "isotropic"}),
    "layerwise": (dense_layerwise, {"structure": "layerwise"}),
    "diagonal": (dense_diagonal, {"structure": "diagonal"}),
    "diagonal-examples": (dense_diagonal_examples,
                          {"structure": "diagonal", "source": "examples"})}
NOISES: dict[str, Any] = {
    "none": lambda: None, "own": lambda: GNC(0.4), "lr": lambda: GNC(lr=2.0),
    "gathered": lambda: GNC(0.4, source="gathered"),
    "isotropic-gnc": lambda: GNC(0.4, source="isotropic"),
    "workers": lambda: CovarianceNoise("full", 3),
    "examples": lambda: CovarianceNoise("full", 3, source="examples"),
    "isotropic": lambda: CovarianceNoise("isotropic", 3),
    "layerwise": lambda: CovarianceNoise("layerwise", 3),
    "diagonal": lambda: CovarianceNoise("diagonal", 3),
    "diagonal-examples": lambda: CovarianceNoise("diagonal", 3, source="examples"),
    "kronecker": lambda: CovarianceNoise("kronecker", 3, every=2),
    "diagonal-with-gnc": lambda: [GNC(0.4), CovarianceNoise("diagonal", 3)]}
