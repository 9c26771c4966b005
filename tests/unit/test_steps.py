"""Whole training steps of the real optimizer, in a world of threads, against dense formulas.

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
from tests.toys import Dense, Record, build, relative_error, train

RTOL = 1e-11
SMALL_BUCKETS = 100  # bytes: each bias with a weight or alone, several buckets
RATES = (0.1, 0.3)  # two groups of parameters
SIZES = {"lr": 2.0, "radius": 0.4, "relative": 0.3}
WORLDS = [(1, 2), (1, 4), (2, 1), (3, 1), (2, 2), (5, 1), (3, 2), (7, 1), (2, 4), (4, 2), (8, 1)]


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


def dense(W: int) -> Dense:
    return Dense(W, learning_rates=RATES, bucket_bytes=SMALL_BUCKETS)


def assert_same_run(record: Record, expected: list[tuple[Any, Any]]) -> None:
    for step, (gradient_P, theta_P) in enumerate(expected):
        assert relative_error(record.gradients[step], gradient_P) < RTOL, f"gradient, step {step}"
        assert relative_error(record.weights[step], theta_P) < RTOL, f"weights, step {step}"


# ---- GNC

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


@pytest.mark.parametrize("lag", [1, 0, 2])
@pytest.mark.parametrize("scheduled", [False, True], ids=["value", "schedule"])
@pytest.mark.parametrize("scale", ["lr", "radius", "relative"])
@pytest.mark.parametrize("source", ["own", "gathered", "isotropic"])
def test_gnc_is_the_dense_formula(source: str, scale: str, scheduled: bool, lag: int) -> None:
    case = (source, scale, scheduled, lag, 3)
    steps = 4 if lag == 2 else 3
    assert_same_run(run(2, 2, lambda: make_gnc(*case), steps), dense_gnc(4, *case, steps=steps))


@pytest.mark.parametrize("size, V", WORLDS)
@pytest.mark.parametrize("source", ["own", "gathered", "isotropic"])
def test_gnc_in_worlds_of_any_shape(source: str, size: int, V: int) -> None:
    case = (source, "radius", False, 1, 5)
    assert_same_run(run(size, V, lambda: make_gnc(*case)), dense_gnc(size * V, *case))


@pytest.mark.parametrize("size, V", [(1, 4), (4, 1)])
def test_gnc_of_lag_0_with_virtual_workers(size: int, V: int) -> None:
    case = ("gathered", "lr", False, 0, 5)
    assert_same_run(run(size, V, lambda: make_gnc(*case)), dense_gnc(4, *case))


@pytest.mark.parametrize("noise", ["own", "workers", "examples"])
def test_accumulated_passes_are_one_worker(noise: str) -> None:
    """k backward passes of a worker are its one batch; Horovod sums them, so 1/k makes a mean."""
    expected = {"own": lambda: dense_gnc(4, "own", "radius", False, 1, 0),
                "workers": lambda: dense_full_workers(4, 3, 0),
                "examples": lambda: dense_full_examples(4, 3, 0, parts=2)}[noise]()
    assert_same_run(run(2, 2, NOISES[noise], backward_passes_per_step=2), expected)


def test_the_first_step_has_no_displacement() -> None:
    plain, noisy = run(2, 1, lambda: None, 2), run(2, 1, lambda: GNC(0.4), 2)
    assert torch.equal(plain.gradients[0], noisy.gradients[0])
    assert not torch.equal(plain.gradients[1], noisy.gradients[1])


# ---- covariance noise on the gradient

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
    def noisy(model: Dense, step: int) -> Any:
        gradients_WP = model.worker_gradients(step)
        return gradients_WP.mean(axis=0) + reference.shared_normal_noise(
            "isotropic", reference.worker_covariance(gradients_WP, model.b),
            model.normals("isotropic", step, seed=seed), W * model.b, M)
    return dense_covariance(W, noisy)


COVARIANCES: dict[str, tuple[Any, Any]] = {
    "workers": (dense_full_workers, {"structure": "full"}),
    "examples": (dense_full_examples, {"structure": "full", "source": "examples"}),
    "isotropic": (dense_isotropic, {"structure": "isotropic"})}


@pytest.mark.parametrize("size, V", WORLDS)
@pytest.mark.parametrize("name", COVARIANCES)
def test_covariance_noise_is_the_dense_formula(name: str, size: int, V: int) -> None:
    formula, options = COVARIANCES[name]
    record = run(size, V, lambda: CovarianceNoise(emulated_batch=3, seed=5, **options))
    assert_same_run(record, formula(size * V, 3, 5))


@pytest.mark.parametrize("M", [1, 2, 7, 16])
@pytest.mark.parametrize("name", COVARIANCES)
def test_any_emulated_batch(name: str, M: int) -> None:
    """With M = B = 16 there is nothing to add."""
    formula, options = COVARIANCES[name]
    record = run(2, 2, lambda: CovarianceNoise(emulated_batch=M, **options))
    assert_same_run(record, formula(4, M, 0))


@pytest.mark.parametrize("name", COVARIANCES)
def test_a_given_batch_size_counts(name: str) -> None:
    """Where forward does not show b, or shows something else, the user says it."""
    formula, options = COVARIANCES[name]
    given = run(2, 2, lambda: CovarianceNoise(emulated_batch=3, batch_size=4, **options))
    assert_same_run(given, formula(4, 3, 0))
    other = run(2, 2, lambda: CovarianceNoise(emulated_batch=3, batch_size=40, **options))
    assert relative_error(other.gradients[0], given.gradients[0]) > 1e-3


# ---- properties

NOISES: dict[str, Any] = {
    "none": lambda: None, "own": lambda: GNC(0.4), "lr": lambda: GNC(lr=2.0),
    "gathered": lambda: GNC(0.4, source="gathered"),
    "isotropic-gnc": lambda: GNC(0.4, source="isotropic"),
    "workers": lambda: CovarianceNoise("full", 3),
    "examples": lambda: CovarianceNoise("full", 3, source="examples"),
    "isotropic": lambda: CovarianceNoise("isotropic", 3)}
SCALE_0: dict[str, Any] = {
    **{f"{source}-{scale}": (lambda source=source, scale=scale: GNC(**{scale: 0}, source=source))
       for source in ("own", "gathered", "isotropic") for scale in SIZES},
    **{name: (lambda options=options: CovarianceNoise(emulated_batch=16, **options))
       for name, (_, options) in COVARIANCES.items()}}


@pytest.mark.parametrize("name", SCALE_0)
def test_no_noise_is_the_identity(name: str) -> None:
    """Bit for bit where the gradients travel as they do without noise."""
    options = {"exchange": "allgather"} if name.startswith("gathered") else {}
    plain, still = run(2, 2, lambda: None), run(2, 2, SCALE_0[name], **options)
    auto = run(2, 2, SCALE_0[name])
    for step in range(3):
        assert torch.equal(plain.weights[step], still.weights[step])
        assert relative_error(auto.weights[step], plain.weights[step]) < RTOL


@pytest.mark.parametrize("name", NOISES)
def test_virtual_workers_are_workers(name: str) -> None:
    """4 ranks x 1, 2 x 2 and 1 x 4 on the same examples; the momentum remembers differences."""
    runs = [run(size, 4 // size, NOISES[name], 20, momentum=0.9) for size in (4, 2, 1)]
    for other in runs[1:]:
        assert relative_error(other.weights[-1], runs[0].weights[-1]) < 1e-9
    if name != "none":
        plain = run(4, 1, NOISES["none"], 20, momentum=0.9)
        assert relative_error(runs[0].weights[-1], plain.weights[-1]) > 1e-3


@pytest.mark.parametrize("name", NOISES)
def test_bucket_size_changes_rounding_only(name: str) -> None:
    """Except for isotropic noise, whose numbers are drawn bucket by bucket."""
    def weights(bucket_bytes: int) -> Any:
        def work(world: ThreadWorld) -> Any:
            model, optimizer = build(world, NOISES[name](), V=2, bucket_bytes=bucket_bytes,
                                     learning_rates=RATES)
            return train(model, optimizer, 3).weights[-1]
        return run_threads(2, work)[0]

    error = relative_error(weights(0), weights(2 ** 20))
    assert error > 1e-3 if name.startswith("isotropic") else error < RTOL
