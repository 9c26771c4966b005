"""Whole training steps of the real optimizer, in a world of threads, against dense formulas.

Everything is in float64; the oracles are in tests/runs.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvdnoise import GNC, CovarianceNoise
from tests.fake_world import ThreadWorld, run_threads
from tests.runs import (
    COVARIANCES,
    NOISES,
    RATES,
    RTOL,
    SIZES,
    assert_same_run,
    dense_full_examples,
    dense_full_workers,
    dense_gnc,
    make_gnc,
    run,
)
from tests.toys import build, relative_error, train

pytestmark = pytest.mark.slow

WORLDS = [(1, 2), (1, 4), (2, 1), (3, 1), (2, 2), (5, 1), (3, 2), (7, 1), (2, 4), (4, 2), (8, 1)]


# ---- GNC


@pytest.mark.parametrize("lag", [1, 0, 2])
@pytest.mark.parametrize("scheduled", [False, True], ids=["value", "schedule"])
@pytest.mark.parametrize("scale", ["lr", "radius", "relative"])
@pytest.mark.parametrize("source", ["own", "gathered", "isotropic", "layerwise"])
def test_gnc_is_the_dense_formula(source: str, scale: str, scheduled: bool, lag: int) -> None:
    case = (source, scale, scheduled, lag, 3)
    steps = 4 if lag == 2 else 3
    assert_same_run(run(2, 2, lambda: make_gnc(*case), steps), dense_gnc(4, *case, steps=steps))


@pytest.mark.parametrize("size, V", WORLDS)
@pytest.mark.parametrize("source", ["own", "gathered", "isotropic", "layerwise"])
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
    """Except for noise whose numbers are drawn bucket by bucket (not layer by layer)."""
    def weights(bucket_bytes: int) -> Any:
        def work(world: ThreadWorld) -> Any:
            model, optimizer = build(world, NOISES[name](), V=2, bucket_bytes=bucket_bytes,
                                     learning_rates=RATES)
            return train(model, optimizer, 3).weights[-1]
        return run_threads(2, work)[0]

    error = relative_error(weights(0), weights(2 ** 20))
    drawn = name.startswith(("isotropic", "layerwise", "diagonal"))
    assert error > 1e-3 if drawn else error < RTOL
