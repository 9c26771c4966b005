"""The state of the noises: a run that was saved and loaded goes on as if nothing had happened."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from hvdnoise import GNC, CovarianceNoise
from tests.fake_world import ThreadWorld, run_threads
from tests.toys import batch, build, losses, seen, train, vector

pytestmark = pytest.mark.slow  # many seconds in all

NOISES: dict[str, Any] = {
    "own": lambda: GNC(0.4), "gathered": lambda: GNC(0.4, source="gathered"),
    "gathered-lr": lambda: GNC(lr=2.0, source="gathered", seed=4),
    "isotropic": lambda: GNC(relative=0.2, source="isotropic"),
    "schedule": lambda: GNC(lambda step: 0.1 * step), "lag-0": lambda: GNC(0.4, lag=0),
    "lag-2": lambda: GNC(0.4, source="gathered", lag=2), "own-lag-2": lambda: GNC(lr=2.0, lag=2),
    "workers": lambda: CovarianceNoise("full", 3),
    "examples": lambda: CovarianceNoise("full", 3, source="examples"),
    "covariance": lambda: CovarianceNoise("isotropic", 3)}
OPTIONS: dict[str, Any] = {"V": 2, "momentum": 0.9, "bucket_bytes": 100}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("name", NOISES)
def test_a_loaded_run_goes_on_bit_for_bit(name: str, stop: int) -> None:
    """Every rank saves and loads its own state."""
    def work(world: ThreadWorld) -> None:
        model, optimizer = build(world, NOISES[name](), **OPTIONS)
        train(model, optimizer, stop)
        saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        whole = train(model, optimizer, 3, first=stop)

        other, resumed = build(world, NOISES[name](), **OPTIONS)
        train(other, resumed, 2, first=50)  # a state of its own, to be replaced
        other.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        assert resumed.steps == stop
        again = train(other, resumed, 3, first=stop)
        assert all(map(torch.equal, again.gradients, whole.gradients))
        assert all(map(torch.equal, again.weights, whole.weights))

    run_threads(2, work)


@pytest.mark.parametrize("name", NOISES)
def test_a_state_without_noise_starts_it_anew(name: str) -> None:
    """As a checkpoint of a run without noise, or of plain Horovod, does."""
    def work(world: ThreadWorld) -> None:
        runs = []
        for warm_up in (0, 2):
            model, optimizer = build(world, NOISES[name](), **OPTIONS)
            state = {key: value for key, value in copy.deepcopy(optimizer.state_dict()).items()
                     if key != "hvdnoise"}
            weights = copy.deepcopy(model.state_dict())
            train(model, optimizer, warm_up)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            assert optimizer.steps == 0
            runs.append(train(model, optimizer, 3))
        assert torch.equal(runs[0].weights[-1], runs[1].weights[-1])

    run_threads(2, work)


def test_the_state_is_plain() -> None:
    """Tensors, numbers and text only; without noise there is no entry."""
    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            assert all(isinstance(key, (int, str)) for key in value)
            return [leaf for each in value.values() for leaf in leaves(each)]
        if isinstance(value, list):
            return [leaf for each in value for leaf in leaves(each)]
        return [value]

    def work(world: ThreadWorld) -> None:
        model, optimizer = build(world, GNC(0.4, source="gathered"), **OPTIONS)
        train(model, optimizer, 1)
        kinds = {type(leaf) for leaf in leaves(optimizer.state_dict()["hvdnoise"])}
        assert kinds == {Tensor, int, str}
        assert "hvdnoise" not in build(world, **OPTIONS)[1].state_dict()

    run_threads(2, work)


def test_a_saved_state_does_not_change_any_more() -> None:
    def work(world: ThreadWorld) -> None:
        model, optimizer = build(world, GNC(0.4), **OPTIONS)
        train(model, optimizer, 2)
        state = optimizer.state_dict()["hvdnoise"]
        before = copy.deepcopy(state)
        train(model, optimizer, 2, first=2)
        assert state["steps"] == before["steps"] == 2
        for index, rows in state["seen"][0]["rows"].items():
            assert torch.equal(rows, before["seen"][0]["rows"][index])
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()) | {"hvdnoise": state})
        train(model, optimizer, 2, first=2)  # what was loaded is not written to either
        for index, rows in state["seen"][0]["rows"].items():
            assert torch.equal(rows, before["seen"][0]["rows"][index])

    run_threads(2, work)


def test_a_noisy_state_loads_without_noise() -> None:
    def work(world: ThreadWorld) -> None:
        model, optimizer = build(world, GNC(0.4), **OPTIONS)
        train(model, optimizer, 2)
        plain_model, plain = build(world, None, **OPTIONS)
        plain.load_state_dict(optimizer.state_dict())
        plain_model.load_state_dict(model.state_dict())
        train(plain_model, plain, 1, first=2)
        torch.optim.SGD(model.parameters(), lr=0.1)  # and the plain part in a plain optimizer

    run_threads(2, work)


@pytest.mark.parametrize("source", ["own", "isotropic"])
@pytest.mark.parametrize("changed", [{"bucket_bytes": 10_000}, {"V": 3}], ids=repr)
def test_a_state_of_another_layout_is_refused(source: str, changed: dict[str, int]) -> None:
    def work(world: ThreadWorld) -> str:
        model, optimizer = build(world, GNC(0.4, source=source), **OPTIONS)
        train(model, optimizer, 2)
        model, other = build(world, GNC(0.4, source=source), **OPTIONS | changed)
        with pytest.raises(ValueError) as caught:
            other.load_state_dict(optimizer.state_dict())
        train(model, other, 1)  # without what it saw, as a first step
        return str(caught.value)

    for text in run_threads(2, work):
        assert "bucket_bytes" in text and "virtual_workers" in text and "\n" not in text


def test_a_state_of_other_ranks_or_another_noise_is_refused() -> None:
    def state_of(source: str) -> Any:
        def work(world: ThreadWorld) -> Any:
            model, optimizer = build(world, GNC(0.4, source=source), **OPTIONS)
            train(model, optimizer, 2)
            return optimizer.state_dict()
        return work

    def load(noise: GNC, state: Any) -> None:
        def work(world: ThreadWorld) -> None:
            with pytest.raises(ValueError, match="ranks, virtual_workers and noise"):
                build(world, noise, **OPTIONS)[1].load_state_dict(state)
        run_threads(2, work)

    load(GNC(0.4), run_threads(4, state_of("own"))[0])
    load(GNC(0.4), run_threads(2, state_of("isotropic"))[0])
    load(GNC(lr=1.0), run_threads(2, state_of("own"))[0])


def test_steps_count_updates_only() -> None:
    def work(world: ThreadWorld) -> None:
        model, optimizer = build(world, GNC(0.4), **OPTIONS)
        assert optimizer.steps == 0
        train(model, optimizer, 2)
        assert optimizer.steps == 2

        def exchange() -> None:
            optimizer.zero_grad()
            for _ in range(2):
                x, y = batch(2, world.rank)
                losses(model(x), y).mean().backward()
        forwards: list[Tensor] = []
        model.register_forward_hook(lambda module, *_: forwards.append(seen(module)))
        for _ in range(2):
            exchange()  # a step that a GradScaler skips
            assert optimizer.steps == 2
            optimizer.zero_grad()
        assert not torch.equal(forwards[0], vector(model.parameters()))
        assert torch.equal(forwards[2], forwards[0]), "the skipped step's deviations count"

    run_threads(2, work)
