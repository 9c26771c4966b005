"""Several noises at once against dense formulas: each acts as alone, in its own place."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hvdnoise import GNC, SAM, CovarianceNoise, MomentumSAM, streams
from hvdnoise.noise.composed import Composed, compose
from tests import reference
from tests.fake_world import ThreadWorld, run_threads
from tests.runs import weights_after
from tests.toys import Dense, build, relative_error, train, vector

W, B, M, STEPS = 4, 4, 5, 5


def white(dense: Dense, structure: str, gradients_WP: Any, step: int, seed: int) -> Any:
    return reference.shared_normal_noise(
        structure, reference.worker_covariance(gradients_WP, B),
        dense.normals(structure, step, seed=seed), W * B, M, sizes=dense.sizes)


def gnc_with(dense: Dense, structure: str, source: str = "own", lag: int = 1) -> None:
    past: list[Any] = []
    for step in range(STEPS):
        displacements_WP: Any = 0.0
        if step >= lag:
            displacements_WP = dense.gnc_displacements(
                past[step - lag], seen=step - lag, step=step, source=source, scale="radius",
                size=0.3, seed=1)
        gradients_WP = dense.worker_gradients(step, displacements_WP)
        past.append(reference.deviations(gradients_WP))
        dense.update(gradients_WP.mean(axis=0) + white(dense, structure, gradients_WP, step, 2))


def gnc_with_examples(dense: Dense) -> None:
    """Weighted losses at displaced weights; deviations are those of the weighted gradients."""
    displacements_WP: Any = np.zeros((W, dense.theta_P.size))
    for step in range(STEPS):
        rows = []
        for worker in range(W):
            xi = streams.normal(B, 2, "full-examples", step, worker, 0, dtype=torch.float64)
            weights_b = 1 + np.sqrt((W * B - M) / M) * xi.numpy()
            clean, dense.theta_P = dense.theta_P, dense.theta_P + displacements_WP[worker]
            rows.append((weights_b[:, None] * dense.example_gradients(step)[
                worker * B:(worker + 1) * B]).mean(axis=0))
            dense.theta_P = clean
        gradients_WP = np.stack(rows)
        displacements_WP = dense.gnc_displacements(
            reference.deviations(gradients_WP), seen=step, step=step + 1, source="own",
            scale="radius", size=0.3, seed=1)
        dense.update(gradients_WP.mean(axis=0))


def sam_with(dense: Dense) -> None:
    for step in range(STEPS):
        first_WP = dense.worker_gradients(step)
        norms_W1 = np.linalg.norm(first_WP, axis=1, keepdims=True)
        gradients_WP = dense.worker_gradients(step, 0.2 * first_WP / norms_W1)
        dense.update(gradients_WP.mean(axis=0) + white(dense, "layerwise", gradients_WP, step, 2))


def momentum_sam_with(dense: Dense) -> None:
    v_P, seen, weight = np.zeros_like(dense.theta_P), 0.0, 0.0
    for step in range(STEPS):
        norm = np.linalg.norm(v_P)
        gradients_WP = dense.worker_gradients(step, -0.2 * v_P / norm if norm else 0.0)
        mean_P = gradients_WP.mean(axis=0)
        v_P = 0.9 * v_P + mean_P
        if step % 2 == 0:
            covariance_PP = reference.worker_covariance(gradients_WP, B)
            seen, weight = 0.8 * seen + 0.2 * np.diag(covariance_PP), 0.8 * weight + 0.2
        variance_P = (1 / M - 1 / (W * B)) * seen / weight
        dense.update(mean_P + np.sqrt(variance_P) * dense.normals("diagonal", step, seed=2))


def covariance(structure: str, **options: Any) -> Any:
    return CovarianceNoise(structure, M, seed=2, **options)


CASES: dict[str, tuple[Callable[[], list[Any]], Callable[[Dense], None]]] = {
    "gnc-layerwise": (lambda: [GNC(0.3, seed=1), covariance("layerwise")],
                      lambda dense: gnc_with(dense, "layerwise")),
    "the-other-order": (lambda: [covariance("isotropic"), GNC(0.3, seed=1)],
                        lambda dense: gnc_with(dense, "isotropic")),
    "gathered-isotropic": (lambda: [GNC(0.3, source="gathered", seed=1), covariance("isotropic")],
                           lambda dense: gnc_with(dense, "isotropic", "gathered")),
    "gathered-lag-2": (lambda: [GNC(0.3, source="gathered", lag=2, seed=1),
                                covariance("layerwise")],
                       lambda dense: gnc_with(dense, "layerwise", "gathered", 2)),
    "isotropic-gnc": (lambda: [GNC(0.3, source="isotropic", seed=1), covariance("layerwise")],
                      lambda dense: gnc_with(dense, "layerwise", "isotropic")),
    "gnc-examples": (lambda: [GNC(0.3, seed=1), covariance("full", source="examples")],
                     gnc_with_examples),
    "sam-layerwise": (lambda: [SAM(0.2), covariance("layerwise")], sam_with),
    "momentum-sam-diagonal": (lambda: [MomentumSAM(0.2), covariance("diagonal", decay=0.8)],
                              momentum_sam_with),
}


def run(name: str, ranks: int, **options: Any) -> Tensor:
    return weights_after(STEPS, CASES[name][0], ranks, V=W // ranks, b=B, **options)


@pytest.mark.parametrize("name", CASES)
def test_each_acts_as_alone(name: str) -> None:
    dense = Dense(W, b=B)
    start = dense.theta_P
    CASES[name][1](dense)
    for ranks in (1, 2, 4):
        assert relative_error(run(name, ranks) - torch.from_numpy(start),
                              dense.theta_P - start) < 1e-9, ranks


@pytest.mark.parametrize("name", ["gathered-isotropic", "gathered-lag-2"])
@pytest.mark.parametrize("plan", ["allgather", "gather-only", "transpose"])
def test_every_plan_shows_the_deviations_to_both(name: str, plan: str) -> None:
    dense = Dense(W, b=B)
    CASES[name][1](dense)
    assert relative_error(run(name, 2, exchange=plan), dense.theta_P) < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_resumed_runs_are_the_same_bits(name: str) -> None:
    def work(world: ThreadWorld) -> tuple[Tensor, Tensor]:
        model, optimizer = build(world, CASES[name][0](), V=2, bucket_bytes=100)
        train(model, optimizer, STEPS, b=B)
        through = vector(model.parameters())
        model, optimizer = build(world, CASES[name][0](), V=2, bucket_bytes=100)
        train(model, optimizer, 3, b=B)
        weights, state = model.state_dict(), optimizer.state_dict()
        model, optimizer = build(world, CASES[name][0](), V=2, bucket_bytes=100)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(model, optimizer, STEPS - 3, b=B, first=3)
        return through, vector(model.parameters())
    for through, resumed in run_threads(2, work):
        assert torch.equal(through, resumed)


def test_a_scaled_loss_changes_nothing() -> None:
    plain, scaled = (run("gathered-isotropic", 2, loss_scale=scale) for scale in (1.0, 1024.0))
    assert relative_error(scaled, plain) < 1e-12


def test_a_given_batch_size_needs_no_count() -> None:
    """Calls of several sizes in a pass, which GNC alone takes."""
    def work(world: ThreadWorld) -> None:
        model, optimizer = build(world, [GNC(0.1), covariance("layerwise", batch_size=4)], V=2)
        for _ in range(2):
            optimizer.zero_grad()
            for _ in optimizer.workers:
                loss = sum(model(torch.ones(n, 3, dtype=torch.float64)).sum() for n in (4, 2))
                loss.backward()
            optimizer.step()
    run_threads(1, work)


def test_one_of_a_list_is_itself() -> None:
    noise = GNC(0.1)
    assert compose([noise]) is noise and compose([]) is None and compose(None) is None
    both = compose((noise, covariance("diagonal")))
    assert isinstance(both, Composed) and both.lag == 1 and both.min_workers == 2


@pytest.mark.parametrize("make, says", [
    (lambda: [GNC(0.1), SAM(0.1)], "both act on the weights"),
    (lambda: [covariance("diagonal"), covariance("isotropic")], "both act on the mean gradient"),
    (lambda: [covariance("full", source="examples"), covariance("layerwise")],
     "each adds what a batch"),
    (lambda: [GNC(0.1), covariance("full")], "changes the mean that the second takes")])
def test_noises_that_do_not_go_together(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        compose(make())
    assert "\n" not in str(caught.value)


def test_a_list_of_something_else() -> None:
    with pytest.raises(TypeError, match="is no noise"):
        compose([GNC(0.1), "gnc"])  # type: ignore[list-item]
