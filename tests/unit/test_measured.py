"""`optimizer.measured` against dense formulas, and noise under a scaled loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hvdnoise import GNC, CovarianceNoise
from tests import reference
from tests.fake_world import ThreadWorld, run_threads
from tests.toys import Dense, Record, build, relative_error, train

pytestmark = pytest.mark.slow

W, STEPS, M = 4, 3, 3
SCALES = {"lr": 2.0, "radius": 0.4}
NOISES: dict[str, Any] = {
    "none": lambda: None, "own": lambda: GNC(0.4), "own-lr": lambda: GNC(lr=2.0),
    "gathered": lambda: GNC(0.4, source="gathered"),
    "gathered-lr": lambda: GNC(lr=2.0, source="gathered"),
    "isotropic-lr": lambda: GNC(lr=2.0, source="isotropic"),
    "relative": lambda: GNC(relative=0.3), "lag-0": lambda: GNC(lr=2.0, lag=0),
    "workers": lambda: CovarianceNoise("full", M),
    "examples": lambda: CovarianceNoise("full", M, source="examples"),
    "covariance": lambda: CovarianceNoise("isotropic", M),
    "diagonal": lambda: CovarianceNoise("diagonal", M)}


def run(name: str, size: int, loss_scale: float = 1.0, measure: bool = True, **options: Any
        ) -> Record:
    """Rank 0's record; the other ranks measure the same."""
    def work(world: ThreadWorld) -> Record:
        model, optimizer = build(world, NOISES[name](), V=W // size, bucket_bytes=100, **options)
        optimizer.measure = measure
        return train(model, optimizer, STEPS, loss_scale=loss_scale)

    records = run_threads(size, work)
    assert all(record.measured == records[0].measured for record in records)
    return records[0]


@pytest.mark.parametrize("size", [4, 2, 1])
@pytest.mark.parametrize("name", NOISES)
def test_a_scaled_loss_changes_nothing(name: str, size: int) -> None:
    """A factor that is a power of two is exact in floating point, but for square roots of sums."""
    plain, scaled = run(name, size), run(name, size, 1024.0)
    for step in range(STEPS):
        assert relative_error(scaled.weights[step], plain.weights[step]) < 1e-12
        for field in ("worker_square_norm", "gradient_square_norm", "noise_rms"):
            one, other = (getattr(record.measured[step], field) for record in (plain, scaled))
            assert other == (None if one is None else pytest.approx(one, rel=1e-12)), field


def test_a_wrong_scale_would_be_noticed() -> None:
    plain, scaled = (run("own-lr", 2, factor).weights[-1] for factor in (1.0, 1024.0))
    unaware = run_threads(2, unaware_of_the_scale)[0]
    assert relative_error(scaled, plain) < 1e-12 and relative_error(unaware, plain) > 1e-3


def unaware_of_the_scale(world: ThreadWorld) -> Any:
    model, optimizer = build(world, GNC(lr=2.0 * 1024), V=2)
    return train(model, optimizer, STEPS).weights[-1]


def test_the_scale_may_be_a_function() -> None:
    """A GradScaler's get_scale, that changes from step to step."""
    def work(world: ThreadWorld) -> Any:
        model, optimizer = build(world, GNC(lr=2.0, source="gathered"), V=2)
        weights = []
        for step in range(STEPS):
            factor = 2.0 ** (step + 3)
            record = train(model, optimizer, 1, first=step, loss_scale=lambda: factor)
            weights += record.weights
        return weights

    plain = run("gathered-lr", 2)
    for scaled, expected in zip(run_threads(2, work)[0], plain.weights):
        assert relative_error(scaled, expected) < 1e-12


@pytest.mark.parametrize("size", [4, 2, 1])
@pytest.mark.parametrize("name", NOISES)
def test_measured_norms(name: str, size: int) -> None:
    record, model = run(name, size), Dense(W, bucket_bytes=100)
    deviations_WP, seen = None, 0
    for step, measured in enumerate(record.measured):
        noise = NOISES[name]()
        if noise is not None and noise.lag == 0:
            deviations_WP, seen = reference.deviations(model.worker_gradients(step)), step
        displacements_WP: Any = np.zeros((W, 1))
        if isinstance(noise, GNC) and deviations_WP is not None:
            displacements_WP = model.gnc_displacements(
                deviations_WP, seen=seen, step=step, source=noise.source, scale=noise.scale,
                size=float(noise.size), seed=0)  # type: ignore[arg-type]
        gradients_WP = model.worker_gradients(step, displacements_WP)
        if name == "examples":  # a worker's gradient is that of its weighted loss
            assert measured.worker_square_norm > 0
        else:
            assert measured.worker_square_norm == pytest.approx(
                float((gradients_WP ** 2).sum(axis=1).mean()), rel=1e-11)
        noisy_P = reference.as_float64(record.gradients[step])
        assert measured.gradient_square_norm == pytest.approx(float(noisy_P @ noisy_P), rel=1e-11)
        mean_P = noisy_P if name in ("workers", "examples") else gradients_WP.mean(axis=0)
        assert measured.mean_square_norm == pytest.approx(float(mean_P @ mean_P), rel=1e-9)
        if name in ("workers", "examples"):
            assert measured.noise_rms is None  # never formed, so nobody knows
            assert measured.weight_deviation == pytest.approx(math.sqrt(16 / M - 1))
        elif name in ("covariance", "diagonal"):
            assert measured.weight_deviation is None
            added_P = noisy_P - gradients_WP.mean(axis=0)
            assert measured.noise_rms == pytest.approx(math.sqrt(added_P @ added_P), rel=1e-9)
        else:
            rms = reference.root_mean_square_norm(displacements_WP)
            assert measured.noise_rms == pytest.approx(rms, rel=1e-9)
            assert (rms > 0) == (noise is not None and (step > 0 or noise.lag == 0))
        assert_scale(measured, name, model, noise, deviations_WP, displacements_WP, noisy_P,
                     gradients_WP)
        deviations_WP, seen = reference.deviations(gradients_WP), step
        model.update(noisy_P)


def assert_scale(measured: Any, name: str, model: Dense, noise: Any, deviations_WP: Any,
                 displacements_WP: Any, noisy_P: Any, gradients_WP: Any) -> None:
    """The three units, from the workers' gradients alone; the learning rate is 0.1."""
    found = measured.noise_radius, measured.noise_share, measured.noise_lr_multiple
    if isinstance(noise, GNC) and deviations_WP is not None:
        radius = reference.root_mean_square_norm(displacements_WP)
        multiple = radius / 0.1 / reference.root_mean_square_norm(deviations_WP)
        if name.endswith("-lr") or name == "lag-0":
            multiple = 2.0  # exactly, whatever the source
        elif name == "gathered":  # as long as the mixtures
            multiple = found[2]
    elif name in ("covariance", "diagonal"):
        added_P = noisy_P - gradients_WP.mean(axis=0)
        radius = 0.1 * math.sqrt(added_P @ added_P)
        multiple = radius / 0.1 / reference.root_mean_square_norm(
            reference.deviations(gradients_WP))
    else:
        assert found == (None, None, None)
        return
    assert found == pytest.approx((radius, radius / np.linalg.norm(model.theta_P), multiple),
                                  rel=1e-6)


def test_noise_is_counted_once_a_worker() -> None:
    """With two backward passes a worker is displaced twice, by the same displacement."""
    once, twice = run("own", 2), run("own", 2, backward_passes_per_step=2)
    for one, two in zip(once.measured, twice.measured):
        assert two.noise_rms == pytest.approx(one.noise_rms, rel=1e-9)
        assert two.worker_square_norm == pytest.approx(one.worker_square_norm, rel=1e-9)


def test_the_radius_is_exact_for_the_own_source() -> None:
    for measured in run("own", 2).measured[1:]:
        assert measured.noise_rms == pytest.approx(0.4, rel=1e-12)


@pytest.mark.parametrize("name", NOISES)
def test_measuring_changes_no_bit(name: str) -> None:
    with_it, without = run(name, 2), run(name, 2, measure=False)
    assert without.measured == [None] * STEPS
    assert all(map(np.array_equal, with_it.weights, without.weights))


def test_measuring_may_be_switched() -> None:
    always = run("own", 2)

    def work(world: ThreadWorld) -> Any:
        model, optimizer = build(world, GNC(0.4), V=2, bucket_bytes=100)

        def switch(step: int) -> None:
            optimizer.measure = step == 2
        return train(model, optimizer, STEPS, before_step=switch).measured

    for measured in run_threads(2, work):
        assert measured[:2] == [None, None] and measured[2] == always.measured[2]


def test_the_noise_scale_comes_out() -> None:
    """What `measured` is for: unbiased estimates of tr C and |grad L|^2 from the two norms."""
    measured = run("none", 4).measured[0]
    scale = reference.noise_scale(4, 16, measured.worker_square_norm,
                                  measured.gradient_square_norm)
    gradients_WP = Dense(W).worker_gradients(0)
    trace = float(np.trace(reference.worker_covariance(gradients_WP, 4)))
    assert scale.covariance_trace == pytest.approx(trace, rel=1e-9)
