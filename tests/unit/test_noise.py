"""The noises by themselves: tensors in, tensors out; their values, schedules and refusals."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvdnoise import GNC, CovarianceNoise, make_noise, streams
from hvdnoise.buckets import Bucket, Layout, build_layout
from hvdnoise.noise import COVARIANCES, Noise, StepContext
from hvdnoise.noise.base import (
    MeanNoise,
    Observation,
    Statistics,
    WeightNoise,
    at_step,
    check_noise,
    check_scale,
    square_norms,
)
from hvdnoise.noise.gnc import SOURCES
from tests import reference
from tests.toys import relative_error

NAN, INFINITY = float("nan"), float("inf")


def context(step: int = 0, W: int = 4, workers: range = range(4), b: int = 8) -> StepContext:
    return StepContext(step, W, workers, b)


def layout(bucket_bytes: int = 100) -> Layout:
    named = [(f"p{n}", nn.Parameter(1 + streams.normal(size, 0, "p", n, dtype=torch.float64)))
             for n, size in enumerate((3, 5, 7))]
    return build_layout(named, bucket_bytes=bucket_bytes)


def buckets(bucket_bytes: int = 100) -> tuple[Bucket, ...]:
    return layout(bucket_bytes).buckets


# ---- bad values: one line that names the value and what to do

SCALES: list[tuple[dict[str, Any], str, str]] = [
    ({"radius": value}, f"radius={value!r}", "finite number >= 0 or a function of the step")
    for value in (-1, -0.1, NAN, INFINITY, "0.1", True, [1])]
REFUSED_GNC = SCALES + [
    ({"radius": 1, "lr": 1}, "radius and lr", "exactly one of radius=, lr=, relative= and share="),
    ({"radius": 1, "share": 0.01}, "radius and share", "exactly one"),
    ({"share": -0.1}, "share=-0.1", ">= 0"), ({"share": "1"}, "share='1'", "finite number"),
    ({"scope": "layers"}, "scope='layers'", "all, matrices"),
    ({"per": "row"}, "per='row'", "tensor, filter"),
    ({"relative": 0.1, "per": "filter"}, "per='filter'", "scope='matrices'"),
    ({"share": 0.01, "per": "filter", "scope": "matrices"}, "per='filter'", "give relative="),
    ({"echo": 1}, "echo=1", "True or False"),
    ({"echo": True, "lag": 0}, "lag=0", "leave both out"),
    ({"echo": True, "lag": 2}, "lag=2", "leave both out"),
    ({"echo": True, "source": "gathered"}, "source='gathered'", "leave both out"),
    ({"echo": True, "source": "isotropic"}, "source='isotropic'", "leave both out"),
    ({"radius": 1, "relative": 0}, "radius and relative", "exactly one"),
    ({"lr": -1}, "lr=-1", ">= 0"), ({"relative": NAN}, "relative=nan", "finite"),
    ({"radius": 1, "source": "allgather"}, "source='allgather'", "own, gathered, isotropic"),
    ({"radius": 1, "lag": 3}, "lag=3", "0, 1 or 2"),
    ({"radius": 1, "lag": None}, "lag=None", "0, 1 or 2"),
    ({"radius": 1, "seed": 1.5}, "seed=1.5", "integer"),
    ({"radius": 1, "seed": "1"}, "seed='1'", "integer"),
    ({"radius": 1, "seed": True}, "seed=True", "integer")]


def assert_one_line(error: BaseException, value: str, remedy: str) -> None:
    assert value in str(error) and remedy in str(error) and "\n" not in str(error), error


@pytest.mark.parametrize("options, value, remedy", REFUSED_GNC, ids=lambda o: repr(o)[:30])
def test_gnc_refuses(options: dict[str, Any], value: str, remedy: str) -> None:
    with pytest.raises(ValueError) as caught:
        GNC(**options)
    assert_one_line(caught.value, value, remedy)


REFUSED_COVARIANCE: list[tuple[dict[str, Any], str, str]] = [
    ({}, "emulated_batch=", "batch size"),
    ({"emulated_batch": 0}, "emulated_batch=0", "integer >= 1"),
    ({"emulated_batch": -4}, "emulated_batch=-4", "integer >= 1"),
    ({"emulated_batch": 4.0}, "emulated_batch=4.0", "integer"),
    ({"emulated_batch": NAN}, "emulated_batch=nan", "integer"),
    ({"emulated_batch": True}, "emulated_batch=True", "integer"),
    ({"emulated_batch": 4, "batch_size": 0}, "batch_size=0", "integer >= 1"),
    ({"emulated_batch": 4, "structure": "round"}, "'round'", "full from workers"),
    ({"emulated_batch": 4, "source": "ranks"}, "'ranks'", "full from examples"),
    ({"emulated_batch": 4, "structure": "isotropic", "source": "examples"}, "'isotropic'",
     "isotropic from workers"),
    ({"emulated_batch": 4, "seed": None}, "seed=None", "integer")]


@pytest.mark.parametrize("options, value, remedy", REFUSED_COVARIANCE, ids=lambda o: repr(o)[:40])
def test_covariance_refuses(options: dict[str, Any], value: str, remedy: str) -> None:
    with pytest.raises(ValueError) as caught:
        CovarianceNoise(**options)
    assert_one_line(caught.value, value, remedy)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        make_noise("gaussian")
    assert_one_line(caught.value, "'gaussian'", "none, gnc, covariance")


def test_make_noise() -> None:
    assert make_noise("none") is None
    gnc, covariance = make_noise("gnc", lr=2.0, source="gathered"), \
        make_noise("covariance", structure="isotropic", emulated_batch=4)
    default = make_noise("gnc")
    assert isinstance(default, GNC) and (default.scale, default.size) == ("share", 0.02)
    assert isinstance(gnc, GNC) and (gnc.scale, gnc.size, gnc.source) == ("lr", 2.0, "gathered")
    assert type(covariance) is COVARIANCES["isotropic", "workers"]


# ---- schedules

def test_a_schedule_is_a_number_or_a_function() -> None:
    assert at_step(0.5, 9) == 0.5 and at_step(lambda step: step / 2, 9) == 4.5
    assert check_scale("radius", 0) == 0


@pytest.mark.parametrize("value", [-1.0, NAN, INFINITY])
def test_a_schedule_that_goes_wrong_is_refused_in_its_step(value: float) -> None:
    with pytest.raises(ValueError) as caught:
        at_step(lambda step: value if step == 3 else 1.0, 3)
    assert_one_line(caught.value, f"step 3 is {value}", "finite and >= 0")


def test_what_ranks_must_agree_on() -> None:
    assert GNC(0.1).describe() == GNC(0.1).describe()
    others = [GNC(0.2), GNC(lr=0.1), GNC(0.1, source="gathered"), GNC(0.1, lag=0), GNC(0.1, seed=1),
              GNC(share=0.1), GNC(0.1, scope="matrices"), GNC(0.1, echo=True)]
    assert all(other.describe() != GNC(0.1).describe() for other in others)
    assert CovarianceNoise("full", 4).describe() != CovarianceNoise("full", 5).describe()
    repr(GNC(lambda step: 1.0).describe())  # a function cannot be compared, and is left out


# ---- the weights of workers and examples

@pytest.mark.parametrize("W, b, M", [(2, 1, 1), (4, 8, 3), (5, 2, 10), (8, 16, 1)])
def test_worker_weights(W: int, b: int, M: int) -> None:
    now, noise = context(9, W, range(W), b), CovarianceNoise("full", M, seed=2)
    weights_W = noise.worker_weights(now)
    epsilon_W = streams.normal(W, 2, "full-workers", 9, dtype=torch.float64)
    assert relative_error(weights_W, reference.worker_weights(epsilon_W, b, M)) < 1e-13
    assert float(weights_W.mean()) == pytest.approx(1, abs=1e-13)
    c = W * math.sqrt(b * (1 / M - 1 / (W * b)) / (W - 1))
    spread_W = (epsilon_W - epsilon_W.mean()).numpy()
    assert relative_error(weights_W - 1, c * spread_W) < 1e-12 or c == 0


def test_worker_weights_are_the_same_wherever_workers_live() -> None:
    noise = CovarianceNoise("full", 3)
    assert torch.equal(noise.worker_weights(context(workers=range(0, 1))),
                       noise.worker_weights(context(workers=range(2, 4))))


@pytest.mark.parametrize("source", ["workers", "examples"])
def test_weights_that_turn_gradients_round_are_warned_of(source: str) -> None:
    """Past a standard deviation of 2: sqrt(B/M - 1) with B = 32."""
    with pytest.warns(UserWarning, match="deviation of 2.3, so that 33% .* "
                                         "from emulated_batch=7 on") as caught:
        noise: Any = CovarianceNoise("full", 5, source=source)
        assert noise.weight_deviation(context()) == pytest.approx((32 / 5 - 1) ** 0.5)
        noise.weight_deviation(context())
    assert len(caught) == 1  # once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mild: Any = CovarianceNoise("full", 7, source=source)
        assert mild.weight_deviation(context()) < 2


def test_example_weights() -> None:
    noise, now = CovarianceNoise("full", 5, source="examples", seed=3), context(7)
    weights = [noise.example_weights(worker, 0, 8, now) for worker in range(4)]
    xi_B = torch.cat([streams.normal(8, 3, "full-examples", 7, worker, 0, dtype=torch.float64)
                      for worker in range(4)])
    assert relative_error(torch.cat(weights), reference.example_weights(xi_B, 5)) < 1e-13
    assert len({float(w[0]) for w in weights}) == 4  # private to each worker
    assert not torch.equal(noise.example_weights(0, 0, 8, now), noise.example_weights(0, 1, 8, now))


# ---- GNC

def observation() -> Observation:
    return Observation(layout(), {}, {}, 0.0)


def observed(source: str, step: int = 0, noise: GNC | None = None, same: bool = False
             ) -> tuple[GNC, Observation, Tensor]:
    """A noise, what it has seen of four workers on one rank, and their gradients (W, P)."""
    noise = noise or GNC(lr=1.0, source=source)
    W, gradients_WP, seen, now = 4, [], observation(), context(step, 4)
    for bucket in buckets():
        gradients_WN = 2 + streams.normal((W, bucket.size), 5, "g", bucket.index,
                                          dtype=torch.float64)
        if same:
            gradients_WN[:] = 1.0
        deviations_WN = gradients_WN - gradients_WN.mean(dim=0)
        if noise.rows == "mixtures":
            weights = noise.mixing_weights(range(W), range(W), now)
            assert float(weights.sum(dim=1).abs().max()) < 1e-15
            seen.rows[bucket.index] = weights @ gradients_WN
        elif noise.rows == "deviations":
            seen.rows[bucket.index] = deviations_WN
        if noise.statistics is not None:
            half = bucket.size // 2  # the parts of a bucket add up, and so do the workers
            out = seen.statistics[bucket.index] = noise.statistics.new(bucket)
            for start, stop in ((0, half), (half, bucket.size)):
                for rows in (slice(0, 1), slice(1, 4)):
                    noise.observe(bucket, start, deviations_WN[rows, start:stop], out, now)
        gradients_WP.append(gradients_WN)
    return noise, seen, torch.cat(gradients_WP, dim=1)


def displacements(noise: GNC, seen: Observation, *_: Tensor, step: int = 1, rates: float = 1.0
                  ) -> Tensor:
    """(W, P), in the order of the buckets."""
    rows = []
    for v in range(4):
        row = []
        for bucket in buckets():
            clean = [p.detach() for p in bucket.parameters]
            before = [p.clone() for p in clean]
            unit_N, factors = noise.displacement(bucket, v, clean, [rates] * len(clean), seen,
                                                 context(step))
            assert all(map(torch.equal, clean, before)), "the clean weights were written"
            row += [factor * unit.flatten() for factor, unit in zip(factors, bucket.views(unit_N))]
        rows.append(torch.cat(row))
    return torch.stack(rows)


@pytest.mark.parametrize("source", ["own", "gathered", "isotropic", "layerwise"])
def test_displacements_grow_with_scale_and_learning_rate(source: str) -> None:
    once = displacements(*observed(source))
    double = displacements(*observed(source, noise=GNC(lr=2.0, source=source)))
    assert relative_error(double, 2 * once) < 1e-12
    assert relative_error(displacements(*observed(source), rates=0.1), 0.1 * once) < 1e-12
    still = displacements(*observed(source, noise=GNC(lr=0.0, source=source)))
    assert torch.count_nonzero(still) == 0


def test_own_displacements_sum_to_zero() -> None:
    noise, seen, gradients_WP = observed("own")
    rows = displacements(noise, seen)
    assert float(rows.sum(dim=0).abs().max()) < 1e-14 * float(rows.abs().max()) * 10
    expected = reference.gnc_own(reference.deviations(gradients_WP), 1.0)
    assert relative_error(rows, expected) < 1e-12


def test_which_displacements_change_from_step_to_step() -> None:
    for source, changes in (("own", False), ("gathered", False), ("isotropic", True)):
        noise, seen, _ = observed(source)  # gathered noise is drawn when it sees the deviations
        one, two = displacements(noise, seen, step=1), displacements(noise, seen, step=2)
        assert torch.equal(one, two) is not changes
    one, two = (displacements(*observed("gathered", step=step)) for step in (1, 2))
    assert not torch.equal(one, two)


def test_no_deviation_no_displacement() -> None:
    for source in SOURCES:
        for scale in ("radius", "lr", "relative"):
            options: dict[str, Any] = {scale: 1.0, "source": source}
            seen = observed(source, noise=GNC(**options), same=True)
            assert float(displacements(*seen).abs().max()) < 1e-14


def test_a_scale_in_steps_needs_no_statistics() -> None:
    """Nothing but rows: no norms to compute, nothing to add up over the ranks."""
    wants = {(source, scale): GNC(**{scale: 1.0}, source=source).statistics  # type: ignore
             for source in ("own", "gathered", "isotropic") for scale in ("lr", "radius")}
    assert [key for key, wanted in wants.items() if not wanted] == [("own", "lr"),
                                                                    ("gathered", "lr")]


@pytest.mark.parametrize("cuts", [[], [7], [1, 2, 30]])
def test_square_norms_of_each_parameter(cuts: list[int]) -> None:
    (bucket,) = buckets(10_000)
    rows = streams.normal((2, bucket.size), 0, "rows")
    expected = [float((part.double() ** 2).sum()) for part in rows.split(bucket.sizes, dim=1)]
    edges = [0, *cuts, bucket.size]
    parts = [square_norms(rows[:, a:b], bucket, a) for a, b in zip(edges, edges[1:])]
    assert torch.stack(parts).sum(dim=0).tolist() == pytest.approx(expected, rel=1e-6)
    assert all(part.dtype == torch.float64 for part in parts)
    half = square_norms(1000 * torch.ones(2, bucket.size, dtype=torch.float16), bucket, 0)
    assert half.tolist() == pytest.approx([2e6 * size for size in bucket.sizes], rel=1e-6)


# ---- a noise's class says which calls it has

class Halfway(WeightNoise):
    """Lacks `displacement`."""


class Unobserving(MeanNoise):
    statistics = Statistics(per_bucket=1)

    def mean_noise(self, *_: Any) -> Tensor:
        raise NotImplementedError


class Unmixing(WeightNoise):
    rows = "mixtures"

    def displacement(self, *_: Any) -> tuple[Tensor, list[float]]:
        raise NotImplementedError


class Nowhere(Noise):
    pass


def test_a_call_that_is_missing_is_found_before_training() -> None:
    with pytest.raises(TypeError, match="displacement"):
        Halfway()  # type: ignore[abstract]
    for noise, remedy in ((Unobserving(), "ObservingNoise"), (Unmixing(), "MixingNoise"),
                          (Nowhere(), "MeanNoise"), ("gnc", "GNC"), (GNC, "GNC")):
        with pytest.raises(TypeError, match=remedy) as caught:
            check_noise(noise)
        assert "\n" not in str(caught.value)
    for right in (None, GNC(0.1), CovarianceNoise("full", 4), CovarianceNoise("isotropic", 4)):
        check_noise(right)
