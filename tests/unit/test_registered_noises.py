"""Noises against dense formulas: one of each kind from outside the package, and covariances.

A new noise joins by an entry in `EXPECTED`: what follows from ranks and virtual workers, plans,
checkpoints and dropped steps is then tested for it, too.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any, Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hvdnoise import make_noise, streams
from hvdnoise.bench import variants
from hvdnoise.buckets import default_layout
from hvdnoise.planning.config import read
from hvdnoise.planning.outline import noise_memory, outline
from hvdnoise.planning.report import predict
from hvdnoise.plans import PLANS
from hvdnoise.training import plugins
from tests import reference
from tests.fake_world import ThreadWorld, run_threads
from tests.noises import forgotten_afterwards
from tests.runs import weights_after
from tests.toys import Dense, batch, build, losses, relative_error, train, vector

W, B, M, STEPS = 4, 4, 5, 4
Array = reference.Array


def diagonal_run(dense: Dense) -> None:
    mean_P, weight = 0.0, 0.0
    for step in range(STEPS):
        gradients_WP = dense.worker_gradients(step)
        squares_P = (reference.deviations(gradients_WP) ** 2).sum(axis=0)
        mean_P, weight = 0.7 * mean_P + 0.3 * squares_P, 0.7 * weight + 0.3
        variance_P = (1 / M - 1 / (W * B)) * B / (W - 1) * mean_P / weight
        normals_P = dense.normals("diagonal", step, seed=3)
        dense.update(gradients_WP.mean(axis=0) + np.sqrt(variance_P) * normals_P)


def structure_run(dense: Dense, structure: str, *, decay: float = 0.0, every: int = 1,
                  trace: float | None = None, matched: bool = False) -> None:
    """A structure without correlations; its covariance is a running mean over estimates."""
    seen: list[Array] = []
    for step in range(STEPS):
        gradients_WP = dense.worker_gradients(step)
        if step % every == 0:
            seen.append(reference.worker_covariance(gradients_WP, B))
        covariance_PP = reference.running_mean(seen, decay)
        wanted = np.trace(seen[-1]) if matched else trace
        if wanted is not None:
            covariance_PP = covariance_PP * wanted / np.trace(covariance_PP)
        dense.update(gradients_WP.mean(axis=0) + reference.shared_normal_noise(
            structure, covariance_PP, dense.normals(structure, step, seed=3), W * B, M,
            sizes=dense.sizes))


def example_diagonal_run(dense: Dense, decay: float, every: int) -> None:
    seen: list[Array] = []
    for step in range(STEPS):
        if step % every == 0:
            seen.append((dense.example_gradients(step) ** 2).mean(axis=0))
        variance_P = reference.running_mean(seen, decay)
        normals_P = dense.normals("diagonal", step, seed=3)
        dense.update(dense.worker_gradients(step).mean(axis=0)
                     + np.sqrt((1 / M - 1 / (W * B)) * variance_P) * normals_P)


def one_worker_run(dense: Dense) -> None:
    for step in range(STEPS):
        chosen = int(streams.normal(W, 3, "one-worker", step).argmax())
        dense.update(dense.worker_gradients(step)[chosen])


def half_run(dense: Dense) -> None:
    for step in range(STEPS):
        total_P = 0.0
        for worker in range(W):
            coin = int(streams.normal(1, 3, "half", step, worker, 0) > 0)
            x, y = batch(step, worker, B)
            total_P = total_P + dense.gradient(dense.theta_P, x[coin::2], y[coin::2]) / W
        dense.update(total_P)  # type: ignore[arg-type]


def white_run(dense: Dense) -> None:
    for step in range(STEPS):
        mean_P = dense.worker_gradients(step).mean(axis=0)
        dense.update(mean_P + 0.5 / np.sqrt(W * B) * dense.normals("white", step, seed=3))


def displaced_run(dense: Dense, form: Callable[[Array], Array]) -> None:
    displacements_WP: Any = 0.0
    for step in range(STEPS):
        gradients_WP = dense.worker_gradients(step, displacements_WP)
        displacements_WP = form(reference.deviations(gradients_WP))
        dense.update(gradients_WP.mean(axis=0))


def covariance(structure: str, **options: Any) -> dict[str, Any]:
    return {"kind": "covariance", "structure": structure, "emulated_batch": M, **options}


EXPECTED: dict[str, tuple[dict[str, Any], Callable[[Dense], None]]] = {
    "layerwise": (covariance("layerwise"), lambda dense: structure_run(dense, "layerwise")),
    "layerwise-trace": (covariance("layerwise", trace=0.3), lambda dense: structure_run(
        dense, "layerwise", trace=0.3)),
    "isotropic-trace": (covariance("isotropic", trace=2.5), lambda dense: structure_run(
        dense, "isotropic", trace=2.5)),
    "isotropic-matched": (covariance("isotropic", trace="matched:full"), lambda dense:
                          structure_run(dense, "isotropic")),
    "diagonal": (covariance("diagonal", decay=0.7, every=1), lambda dense: structure_run(
        dense, "diagonal", decay=0.7)),
    "diagonal-every": (covariance("diagonal", decay=0.6, every=2), lambda dense: structure_run(
        dense, "diagonal", decay=0.6, every=2)),
    "diagonal-matched": (covariance("diagonal", decay=0.8, every=3, trace="matched:layerwise"),
                         lambda dense: structure_run(dense, "diagonal", decay=0.8, every=3,
                                                     matched=True)),
    "diagonal-examples": (
        covariance("diagonal", source="examples", decay=0.6, every=2),
        lambda dense: example_diagonal_run(dense, 0.6, 2)),
    "diagonal-trace": (covariance("diagonal", trace=0.7), lambda dense: structure_run(
        dense, "diagonal", decay=0.95, every=2, trace=0.7)),
    "diagonal-example": ({"emulated_batch": M, "decay": 0.7}, diagonal_run),
    "one-worker-example": ({}, one_worker_run),
    "half-example": ({}, half_run),
    "white-example": ({"size": 0.5}, white_run),
    "uphill-example": ({"size": 0.3}, lambda dense: displaced_run(
        dense, lambda d_WP: 0.3 * d_WP / np.abs(d_WP).sum())),
    "neighbour-example": ({"size": 0.3}, lambda dense: displaced_run(
        dense, lambda d_WP: 0.3 * np.roll(d_WP, -1, axis=0))),
}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with forgotten_afterwards():
        plugins.load(["tests.noises.diagonal", "tests.noises.others"])
        yield


def make(kind: str) -> Any:
    return make_noise(**{"kind": kind, **EXPECTED[kind][0]}, seed=3)


def run(kind: str, ranks: int, **options: Any) -> Tensor:
    return weights_after(STEPS, lambda: make(kind), ranks, V=W // ranks, b=B, **options)


@pytest.mark.parametrize("kind", EXPECTED)
def test_it_is_its_formula_whatever_the_ranks(kind: str) -> None:
    dense = Dense(W, b=B)
    start = dense.theta_P
    EXPECTED[kind][1](dense)
    for ranks in (1, 2, 4):
        assert relative_error(run(kind, ranks) - torch.from_numpy(start),
                              dense.theta_P - start) < 1e-9, ranks


@pytest.mark.parametrize("kind", ["layerwise", "isotropic-trace", "diagonal-matched"])
def test_traces_are_those_of_all_buckets(kind: str) -> None:
    dense = Dense(W, b=B, bucket_bytes=100)
    assert len(dense.layout.buckets) > 1
    EXPECTED[kind][1](dense)
    assert relative_error(run(kind, 2, bucket_bytes=100), dense.theta_P) < 1e-9


@pytest.mark.parametrize("plan", [name for name, plan in PLANS.items() if plan.all_workers])
def test_mixtures_by_every_plan(plan: str) -> None:
    dense = Dense(W, b=B)
    EXPECTED["neighbour-example"][1](dense)
    for ranks in (2, 4):
        weights = run("neighbour-example", ranks, exchange=plan, bucket_bytes=100)
        assert relative_error(weights, dense.theta_P) < 1e-9


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_dropped_step_and_a_resumed_run_change_nothing(kind: str) -> None:
    def work(world: ThreadWorld) -> tuple[Tensor, Tensor]:
        model, optimizer = build(world, make(kind), V=2)
        train(model, optimizer, STEPS, b=B)
        through = vector(model.parameters())
        model, optimizer = build(world, make(kind), V=2)
        train(model, optimizer, 2, b=B)
        for worker in optimizer.workers:  # a step that nobody takes
            x, y = batch(9, worker, B)
            optimizer.observe_examples(model, losses, x, y)
            optimizer.weigh(losses(model(x), y)).backward()
        optimizer.zero_grad()
        weights, state = model.state_dict(), optimizer.state_dict()
        model, optimizer = build(world, make(kind), V=2)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(model, optimizer, STEPS - 2, b=B, first=2)
        return through, vector(model.parameters())
    for through, resumed in run_threads(2, work):
        assert torch.equal(through, resumed)


def test_observations_that_were_used_are_gone() -> None:
    def work(world: ThreadWorld) -> int:
        seen: list[weakref.ref[Any]] = []
        noise = make("uphill-example")
        form = noise.displacement

        def displacement(bucket: Any, v: int, clean: Any, rates: Any, observation: Any,
                         context: Any) -> Any:
            seen.append(weakref.ref(observation))
            return form(bucket, v, clean, rates, observation, context)
        noise.displacement = displacement
        model, optimizer = build(world, noise, V=2)
        train(model, optimizer, 8, b=B)
        gc.collect()
        return len({id(each()) for each in seen if each() is not None})
    assert run_threads(2, work) == [0, 0]  # the last one was not used yet


def test_a_checkpoint_holds_the_running_mean_and_nothing_more() -> None:
    def work(world: ThreadWorld) -> Any:
        model, optimizer = build(world, make("diagonal-example"), V=2)
        train(model, optimizer, 2, b=B)
        return optimizer.state_dict()["hvdnoise"], optimizer.noise_memory
    (state, memory), _ = run_threads(2, work)
    P = Dense(W).theta_P.size
    assert state["seen"] == []
    mean_P, weight = state["kept"]["values"].values()
    assert mean_P.shape == (P,) and weight == pytest.approx(1 - 0.7 ** 2)
    assert memory == 2 * P * 8 + P * 8 + P * 8  # the rows, the sums, and what is kept


@pytest.mark.parametrize("V", [1, 2])
@pytest.mark.parametrize("kind", ["diagonal-example", "diagonal-every", "diagonal-examples"])
def test_the_plan_knows_the_memory(kind: str, V: int) -> None:
    def work(world: ThreadWorld) -> tuple[int, int]:
        model, optimizer = build(world, make(kind), V=V)
        train(model, optimizer, 4, b=B)
        layout = default_layout(list(model.named_parameters()))
        return optimizer.noise_memory, noise_memory(optimizer.noise, layout, V)
    for found, expected in run_threads(2, work):
        assert found == expected


def test_statistics_count_in_the_plan_and_the_bench() -> None:
    config, _ = read(["--hosts", "2", "--noise.kind", "diagonal-example",
                      "--noise.emulated_batch", "4"])
    run = outline(config)
    assert run.statistics_bytes == 8 + 4 * run.parameters
    received = next(each for each in predict(config, run) if each.plan == run.plan.name).received
    assert received == 4 * run.parameters + run.statistics_bytes  # of 2 ranks
    variant = variants.parse("diagonal-example")
    assert variant.predicted_bytes("allreduce", 1000, 2, 1, 4008) == 4000 + 4008


def short(noise: Any, size: int) -> Any:
    """What a noise returns, cut short."""
    for call in ("mean_noise", "mixing_weights"):
        if hasattr(noise, call):
            full = getattr(noise, call)
            setattr(noise, call, lambda *each: full(*each)[..., :size])
            return noise
    full = noise.displacement
    noise.displacement = lambda *each: (full(*each)[0], full(*each)[1][:size])
    return noise


@pytest.mark.parametrize("kind, call", [
    ("white-example", "mean_noise"), ("diagonal-example", "mean_noise"),
    ("neighbour-example", "mixing_weights"), ("uphill-example", "displacement")])
def test_what_a_noise_returns_is_checked(kind: str, call: str) -> None:
    def work(world: ThreadWorld) -> None:
        model, optimizer = build(world, short(make(kind), 1), V=2)
        with pytest.raises(ValueError, match=f"{call}: it returned .* is needed"):
            train(model, optimizer, 2, b=B)
    run_threads(1, work)


@pytest.mark.parametrize("options, says", [
    ({"emulated_batch": 4, "dekay": 0.5}, "dekay"), ({}, "emulated_batch")])
def test_a_wrong_option_is_told(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"{says}.*its options are.*decay") as caught:
        make_noise("diagonal-example", **options)
    assert "\n" not in str(caught.value)


def test_rows_of_mixing_weights_add_up_to_0() -> None:
    def work(world: ThreadWorld) -> None:
        noise = make("neighbour-example")
        noise.mixing_weights = lambda workers, peers, context: torch.ones(
            len(workers), len(peers), dtype=torch.float64)
        model, optimizer = build(world, noise, V=2)
        with pytest.raises(ValueError, match="add up to 0; subtract its mean"):
            train(model, optimizer, 1, b=B)
    run_threads(1, work)


def test_a_running_mean_of_other_parameters_is_refused() -> None:
    def work(world: ThreadWorld) -> None:
        model, optimizer = build(world, make("diagonal-example"), V=2)
        train(model, optimizer, 1, b=B)
        other = build(world, make("diagonal-example"), V=2, bucket_bytes=100)[1]
        with pytest.raises(ValueError, match="same bucket_bytes"):
            other.load_state_dict(optimizer.state_dict())
        other = build(world, make_noise("covariance", structure="isotropic", emulated_batch=M),
                      V=2)[1]
        with pytest.raises(ValueError, match="another noise"):
            other.load_state_dict(optimizer.state_dict())
    run_threads(2, work)
