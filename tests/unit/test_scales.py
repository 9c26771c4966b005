"""Scales of displacements: share of the norm, matrices only, per filter; in three units."""

from __future__ import annotations

import math
import warnings
from typing import Any, Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvdnoise import (
    GNC,
    SAM,
    CovarianceNoise,
    Extrapolation,
    MomentumSAM,
    StaleSAM,
    mixing,
    streams,
)
from hvdnoise.buckets import build_layout
from hvdnoise.noise import AnticorrelatedNoise
from hvdnoise.noise.filters import filter_norms, filter_square_norms, times_filters
from tests import reference
from tests.fake_world import Meeting, ThreadWorld, run_threads
from tests.noises import forgotten_afterwards
from tests.runs import RATES, assert_same_run, run
from tests.toys import Dense, batch, build, losses, seen, train, vector

W = 4
MATRICES: dict[str, Any] = {"scope": "matrices"}
FILTERS: dict[str, Any] = {"scope": "matrices", "per": "filter"}


def alone() -> ThreadWorld:
    return ThreadWorld(Meeting(1, 1.0), 0)


# ---- against the dense formulas

def dense_gnc(source: str, scale: str, size: float, *, lag: int = 1, **where: Any) -> Any:
    """(averaged gradient, weights after) of three steps, and the displacements of each."""
    model = Dense(W, learning_rates=RATES, bucket_bytes=100)
    result, displaced, past = [], [], []
    for step in range(3):
        model.rates = [rate * 0.8 ** step for rate in RATES]
        displacements_WP: Any = np.zeros((W, 1))
        if step >= lag:
            displacements_WP = model.gnc_displacements(
                past[step - lag], seen=step - lag, step=step, source=source, scale=scale,
                size=size, seed=2, **where)
        gradients_WP = model.worker_gradients(step, displacements_WP)
        past.append(reference.deviations(gradients_WP))
        displaced.append((displacements_WP, model.theta_P))
        model.update(gradients_WP.mean(axis=0))
        result.append((gradients_WP.mean(axis=0), model.theta_P))
    return result, displaced


CASES: list[tuple[str, str, float, dict[str, Any]]] = [
    ("own", "share", 0.04, {}), ("gathered", "share", 0.04, {}), ("layerwise", "share", 0.04, {}),
    ("isotropic", "share", 0.04, {}), ("own", "share", 0.04, MATRICES),
    ("isotropic", "radius", 0.3, MATRICES), ("layerwise", "radius", 0.3, MATRICES),
    ("gathered", "relative", 0.3, MATRICES), ("own", "lr", 2.0, MATRICES),
    ("own", "relative", 0.3, FILTERS), ("gathered", "relative", 0.3, FILTERS),
    ("isotropic", "relative", 0.3, FILTERS)]


@pytest.mark.parametrize("source, scale, size, where", CASES, ids=str)
def test_gnc_is_the_dense_formula(source: str, scale: str, size: float, where: dict[str, Any]
                                  ) -> None:
    expected, displaced = dense_gnc(source, scale, size, **where)
    for ranks in (4, 2, 1):
        record = run(ranks, W // ranks, lambda: GNC(
            **{scale: size}, source=source, seed=2, **where))  # type: ignore[arg-type]
        assert_same_run(record, expected)
    displacements_WP, theta_P = displaced[1]
    if source == "own" and scale == "share":  # exactly
        inside = Dense(W).displaced(where.get("scope", "all"))
        assert reference.share_of(displacements_WP, theta_P[inside]) == pytest.approx(0.04)


@pytest.mark.parametrize("ranks, exchange", [(4, "transpose"), (2, "transpose"), (4, "allgather"),
                                             (2, "gather-only")])
@pytest.mark.parametrize("source", ["own", "gathered"])
def test_parts_that_cut_through_filters_add_up(monkeypatch: Any, source: str, ranks: int,
                                               exchange: str) -> None:
    """Slices of the ranks and chunks of five numbers; filters have three and four."""
    if source == "own":
        exchange = "auto"
    monkeypatch.setattr(mixing, "_CACHED", 20)
    record = run(ranks, W // ranks, lambda: GNC(relative=0.3, source=source, seed=2, **FILTERS),
                 exchange=exchange)
    assert_same_run(record, dense_gnc(source, "relative", 0.3, **FILTERS)[0])


def test_a_scope_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"none of the parameters.*\(4,\).*scope=\"all\""):
        build(alone(), GNC(scope="matrices"), model=nn.LayerNorm(4), V=2)


def test_gnc_without_arguments_is_two_percent() -> None:
    given, default = (run(2, 2, make) for make in (lambda: GNC(share=0.02), GNC))
    assert all(map(torch.equal, given.weights, default.weights))
    assert_same_run(default, dense_gnc("own", "share", 0.02)[0])


def test_frozen_weights_do_not_count() -> None:
    def work(world: ThreadWorld) -> float:
        model, optimizer = build(world, GNC(share=0.03), V=2)
        model.first.weight.requires_grad_(False)
        model.first.weight.data.mul_(1000)
        optimizer.measure = True
        for step in range(2):
            trained = vector(p for p in model.parameters() if p.requires_grad)
            optimizer.zero_grad()
            for worker in optimizer.workers:
                x, y = batch(step, worker)
                losses(model(x), y).mean().backward()
            optimizer.step()
        assert optimizer.measured.noise_share == pytest.approx(0.03)
        return float(optimizer.measured.noise_radius / trained.norm())
    assert run_threads(2, work) == [pytest.approx(0.03)] * 2


def test_the_norm_is_computed_once_a_step(monkeypatch: Any) -> None:
    from hvdnoise.noise import base
    calls: list[int] = []
    length_of = base.length_of
    monkeypatch.setattr(base, "length_of", lambda *a: calls.append(1) or length_of(*a))
    model, optimizer = build(alone(), GNC(), V=4, bucket_bytes=0)
    train(model, optimizer, 4)
    assert len(calls) == 3  # four workers, four buckets, and no noise in the first step


def test_half_precision_does_not_overflow() -> None:
    p = nn.Parameter(torch.full((3, 100), 60000.0, dtype=torch.float16))
    layout = build_layout([("p", p)], bucket_bytes=100)
    from hvdnoise.noise.base import length_of
    assert length_of(layout) == pytest.approx(60000 * math.sqrt(300), rel=1e-6)
    assert filter_norms([p.detach()]).tolist() == pytest.approx([600000.0] * 3)


def test_norms_of_millions_of_numbers() -> None:
    """torch's own sum of 3 million squares in float32 is off by 1e-4."""
    x = 0.005 + 0.01 * streams.normal(3_000_001, 0, "many")
    expected = float(np.square(x.numpy().astype(np.float64)).sum())
    assert mixing.square(x) == pytest.approx(expected, rel=1e-7)
    assert mixing.square(x[1:].view(3, -1).T) == pytest.approx(expected, rel=1e-6)
    assert mixing.square(x[:0]) == 0 and mixing.square(x[:5].double()) > 0


# ---- filters

def parameters() -> list[tuple[str, nn.Parameter]]:
    """A bias, a matrix, a convolution in channels last, a transposed matrix, one number, and
    filters that are the second of three dimensions in memory."""
    shapes = [(5,), (4, 3), (2, 3, 2, 2), (3, 4), (), (4, 3, 2)]
    made = [1 + streams.normal(shape, 3, "p", n, dtype=torch.float64)
            for n, shape in enumerate(shapes)]
    made[2] = made[2].to(memory_format=torch.channels_last)
    made[3] = made[3].T.contiguous().T
    made[5] = made[5].transpose(0, 1).contiguous().transpose(0, 1)
    return [(f"p{n}", nn.Parameter(each)) for n, each in enumerate(made)]


@pytest.mark.parametrize("cuts", [[], [7], list(range(1, 60))])
def test_filters_of_any_memory_order(cuts: list[int]) -> None:
    (bucket,) = build_layout(parameters(), bucket_bytes=10_000).buckets
    rows_KN = streams.normal((2, bucket.size), 0, "rows", dtype=torch.float64)
    expected = [float((bucket.view(rows_N, t)[k] ** 2).sum()) for rows_N in rows_KN[:1]
                for t, shape in enumerate(bucket.shapes) if len(shape) > 1
                for k in range(shape[0])]
    expected = (np.array(expected) + [
        float((bucket.view(rows_KN[1], t)[k] ** 2).sum()) for t, shape in enumerate(bucket.shapes)
        if len(shape) > 1 for k in range(shape[0])]).tolist()
    edges = [0, *[cut for cut in cuts if cut < bucket.size], bucket.size]
    total = sum(filter_square_norms(rows_KN[:, a:b], bucket, a) for a, b in zip(edges, edges[1:]))
    assert total.tolist() == pytest.approx(expected, rel=1e-12)  # type: ignore[union-attr]
    scaled_N = times_filters(rows_KN[0], bucket, 1.0 + torch.arange(len(expected)))
    start = 0
    for t, shape in enumerate(bucket.shapes):
        before, after = bucket.view(rows_KN[0], t), bucket.view(scaled_N, t)
        for k in range(shape[0] if len(shape) > 1 else 0):
            assert torch.equal(after[k], before[k] * (1 + start + k))
        start += shape[0] if len(shape) > 1 else 0
        assert len(shape) > 1 or not after.any()


def test_each_filter_has_its_length() -> None:
    """A convolution in channels last with BatchNorm: what the forwards see, W = 4."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 2)
                          ).double().to(memory_format=torch.channels_last)
    _, optimizer = build(alone(), GNC(relative=0.1, **FILTERS), model=model, V=W)
    weights: list[list[Tensor]] = []
    for module in model:  # within its call
        module.register_forward_hook(lambda module, *_: weights.append(
            [module._parameters[name].detach().clone() for name in module._parameters]))
    for step in range(2):
        clean = [p.detach().clone() for p in model.parameters()]
        weights.clear()
        optimizer.zero_grad()
        for worker in range(W):
            x = streams.normal((4, 3, 4, 4), 1, step, worker, dtype=torch.float64)
            model(x).square().sum().backward()
        optimizer.step()
    by_worker = np.array(weights, dtype=object).reshape(W, len(model))
    moved = [torch.stack([torch.as_tensor(row[layer][n]) for row in by_worker])
             for layer, count in ((0, 2), (1, 2), (3, 2)) for n in range(count)]
    for p, seen_W in zip(clean, moved):
        deltas_W = seen_W - p
        if p.dim() == 1:
            assert not deltas_W.any()
            continue
        rms = deltas_W.flatten(2).square().sum(2).mean(0).sqrt()
        assert rms.tolist() == pytest.approx((0.1 * p.flatten(1).norm(dim=1)).tolist(), rel=1e-9)


# ---- the noises that share the scale

SIZED: dict[str, Callable[..., Any]] = {
    "sam": SAM, "stale-sam": StaleSAM, "momentum-sam": MomentumSAM, "anti": AnticorrelatedNoise}


@pytest.mark.parametrize("ranks", [2, 1])
@pytest.mark.parametrize("kind", SIZED)
def test_a_share_of_other_noises(kind: str, ranks: int) -> None:
    def work(world: ThreadWorld) -> None:
        model, optimizer = build(world, SIZED[kind](share=0.03), V=W // ranks, bucket_bytes=100)
        optimizer.measure = True
        train(model, optimizer, 2)
        clean, weights = vector(model.parameters()), []
        model.register_forward_hook(lambda module, *_: weights.append(seen(module)))
        measured = train(model, optimizer, 1, first=2).measured[0]
        if kind != "anti":
            for each in weights[-(W // ranks):]:
                assert (each - clean).norm() / clean.norm() == pytest.approx(0.03)
            assert measured.noise_share == pytest.approx(0.03)
        assert measured.noise_radius / float(clean.norm()) == pytest.approx(measured.noise_share)
        assert (measured.noise_lr_multiple is None) == (kind == "anti")
    run_threads(ranks, work)


def measured_of(noise: Any, ranks: int, steps: int = 2, **options: Any) -> Any:
    def work(world: ThreadWorld) -> Any:
        model, optimizer = build(world, noise(), V=W // ranks, bucket_bytes=100, **options)
        optimizer.measure = True
        return train(model, optimizer, steps).measured
    found = run_threads(ranks, work)
    assert all(each == found[0] for each in found)
    return found[0][-1]


@pytest.mark.parametrize("ranks", [4, 2, 1])
def test_multiples_of_the_learning_rate(ranks: int) -> None:
    """Of gradients (SAM and its kin, extrapolation), momentum and deviations; by numpy."""
    model = Dense(W, learning_rates=RATES)
    gradients_WP, alpha_P = model.worker_gradients(0), model.rate_P()
    mean_P = gradients_WP.mean(axis=0)
    model.update(mean_P)
    theta_P = model.theta_P

    def by_numpy(radius: float, along_WP: Any) -> Any:
        return pytest.approx((radius, radius / np.linalg.norm(theta_P), radius
                              / reference.root_mean_square_norm(along_WP * alpha_P)), rel=1e-9)
    with forgotten_afterwards():
        from tests.noises import scaled
    deviations_WP = reference.deviations(gradients_WP)
    extrapolated_WP = 3.0 * alpha_P * gradients_WP
    for noise, radius, along_WP in (
            (lambda: StaleSAM(0.3), 0.3, gradients_WP),
            (lambda: MomentumSAM(0.3), 0.3, np.stack([mean_P])),
            (lambda: Extrapolation(3.0), reference.root_mean_square_norm(extrapolated_WP),
             gradients_WP),
            (lambda: GNC(0.3), 0.3, deviations_WP),
            (lambda: scaled.Scaled(0.3, factor=2.0), 0.6, deviations_WP)):
        found = measured_of(noise, ranks, learning_rates=RATES)
        assert (found.noise_radius, found.noise_share, found.noise_lr_multiple) == by_numpy(
            radius, along_WP)
    for source in ("own", "gathered", "isotropic", "layerwise"):  # two rates, and k all the same
        for scope in ("all", "matrices"):
            found = measured_of(lambda: GNC(lr=1.5, source=source, scope=scope), ranks,
                                learning_rates=RATES)
            assert found.noise_lr_multiple == pytest.approx(1.5, rel=1e-12)


def test_two_learning_rates_of_a_covariance_noise() -> None:
    found = measured_of(lambda: CovarianceNoise("layerwise", 3), 2, 1, learning_rates=RATES)
    model = Dense(W, learning_rates=RATES, bucket_bytes=100)
    gradients_WP = model.worker_gradients(0)
    covariance_PP = reference.worker_covariance(gradients_WP, 4)
    noise_P = reference.shared_normal_noise("layerwise", covariance_PP, model.normals(
        "layerwise", 0, seed=0), 16, 3, model.sizes)
    radius = float(np.linalg.norm(model.rate_P() * noise_P))
    deviation = reference.root_mean_square_norm(reference.deviations(gradients_WP))
    assert (found.noise_radius, found.noise_share, found.noise_lr_multiple) == pytest.approx(
        (radius, radius / np.linalg.norm(model.theta_P), np.linalg.norm(noise_P) / deviation))


def test_of_several_noises_the_one_on_the_weights_is_told() -> None:
    both, one = (measured_of(make, 2) for make in (
        lambda: [GNC(share=0.03), CovarianceNoise("isotropic", 3)], lambda: GNC(share=0.03)))
    assert both.noise_share == pytest.approx(0.03) and one.noise_share == pytest.approx(0.03)


def test_a_forward_before_measuring_is_measured_too() -> None:
    """The deltas are made in the first forward of the step, when `measure` may still be off."""
    model, optimizer = build(alone(), GNC(0.3), V=2)
    train(model, optimizer, 1)
    model(torch.zeros(1, 3, dtype=torch.float64))
    optimizer.measure = True
    measured = train(model, optimizer, 1, first=1).measured[0]
    assert measured.noise_rms == measured.noise_radius == pytest.approx(0.3)


# ---- the warning

def test_a_large_share_is_warned_of_once() -> None:
    with pytest.warns(UserWarning, match="share=0.06: .* lower it") as caught:
        for _ in range(2):
            run(2, 2, lambda noise=GNC(share=0.06): noise)
    assert len([each for each in caught if "share=" in str(each.message)]) == 2  # two noises
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GNC(share=0.05)
        GNC(share=1.0, source="isotropic")  # as long as the weights, and helps
        run(2, 2, lambda: GNC(share=lambda step: 0.01))


def test_a_schedule_is_warned_of_when_it_passes_the_mark() -> None:
    noise = GNC(share=lambda step: 0.04 + 0.02 * (step >= 2))
    model, optimizer = build(alone(), noise, V=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)
    with pytest.warns(UserWarning, match="share=0.06 at step 2") as caught:
        train(model, optimizer, 3, first=2)
    assert len(caught) == 1
