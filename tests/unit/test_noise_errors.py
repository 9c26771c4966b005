"""What the optimizer refuses about noise: one line that names the value and the remedy."""

from __future__ import annotations

import warnings
from typing import Any, Callable

import pytest
import torch
from torch import nn

from hvdnoise import GNC, CovarianceNoise
from tests.fake_world import Meeting, ThreadWorld, run_threads
from tests.toys import Net, batch, build, losses, train


def alone() -> ThreadWorld:
    return ThreadWorld(Meeting(1, 1.0), 0)


def error_of(call: Callable[[], Any], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def backward(model: nn.Module, step: int = 0, worker: int = 0) -> None:
    x, y = batch(step, worker)
    losses(model(x), y).mean().backward()


# ---- one worker has no deviation

@pytest.mark.parametrize("noise", [GNC(0.1), GNC(0.1, source="gathered"), GNC(lr=1, lag=0),
                                   CovarianceNoise("full", 2), CovarianceNoise("isotropic", 2)],
                         ids=lambda noise: type(noise).__name__)
def test_one_worker_is_too_few(noise: Any) -> None:
    text = error_of(lambda: build(alone(), noise), ValueError)
    assert "at least 2 workers" in text and "there is 1" in text and "virtual_workers=2" in text


def test_one_worker_is_enough_for_noise_from_examples() -> None:
    model, optimizer = build(alone(), CovarianceNoise("full", 2, source="examples"))
    train(model, optimizer, 2)


@pytest.mark.parametrize("op", ["sum", "min", "max", "product"])
def test_noise_needs_a_mean(op: str) -> None:
    text = error_of(lambda: build(alone(), GNC(0.1), V=2, op=op), ValueError)
    assert f"op={op}" in text and "op=hvd.Average" in text


# ---- the emulated batch

@pytest.mark.parametrize("options", [{}, {"structure": "isotropic"}, {"source": "examples"}],
                         ids=repr)
def test_a_larger_batch_cannot_be_emulated(options: dict[str, Any]) -> None:
    def work(world: ThreadWorld) -> str:
        noise = CovarianceNoise(emulated_batch=17, batch_size=4, **options)
        model, optimizer = build(world, noise, V=2)
        return error_of(lambda: train(model, optimizer, 1), ValueError)  # 2 x 2 workers of 4

    for text in run_threads(2, work):
        assert "emulated_batch=17" in text and "batch of 16" in text and "4 workers of 4" in text


@pytest.mark.parametrize("options", [{}, {"structure": "isotropic"}, {"source": "examples"}],
                         ids=repr)
def test_a_batch_that_is_smaller_has_no_noise(options: dict[str, Any]) -> None:
    """The last of an epoch, for instance; said once, and the noise goes on after it."""
    def work(world: ThreadWorld) -> Any:
        runs = [build(world, noise, V=2) for noise in (CovarianceNoise(emulated_batch=5, **options),
                                                       None)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step, b in enumerate((4, 2, 2, 4)):
                noisy, plain = (train(*run, 1, first=step, b=b) for run in runs)
                same = torch.equal(noisy.gradients[0], plain.gradients[0])
                assert same == (b == 2)
                runs[0][0].load_state_dict(runs[1][0].state_dict())
        return [str(each.message) for each in caught]

    texts = sum(run_threads(1, work), [])
    assert len(texts) == 1 and "step 1 has 4 examples" in texts[0] and "no noise" in texts[0]


class Dictionary(Net):
    """Its forward shows nobody how many examples there are."""

    def forward(self, inputs: Any) -> torch.Tensor:
        return super().forward(inputs["x"])


@pytest.mark.parametrize("structure", ["full", "isotropic"])
def test_an_unknown_batch_size_can_be_given(structure: str) -> None:
    def one_step(**options: Any) -> None:
        model, optimizer = build(alone(), CovarianceNoise(structure, 2, **options), V=2,
                                 model=Dictionary())
        optimizer.zero_grad()
        for worker in (0, 1):
            x, y = batch(0, worker)
            losses(model({"x": x}), y).mean().backward()
        optimizer.step()

    assert "batch_size=" in error_of(one_step, ValueError)
    one_step(batch_size=4)


def test_keyword_arguments_show_the_batch_size_too() -> None:
    """From the first forward on, by which the model is found."""
    model, optimizer = build(alone(), CovarianceNoise("full", 2), V=2)
    for step in range(2):
        optimizer.zero_grad()
        for worker in (0, 1):
            x, y = batch(step, worker)
            losses(model(x=x), y).mean().backward()
        assert optimizer.examples_per_worker == 4
        optimizer.step()


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_the_batch_size_after_a_skipped_step(clear: str) -> None:
    """A GradScaler skips a step; the gradients may be cleared through the model."""
    model, optimizer = build(alone(), CovarianceNoise("full", 2), V=2)
    for _ in range(3):
        for worker in (0, 1):
            backward(model, worker=worker)
        assert optimizer.examples_per_worker == 4
        (optimizer if clear == "optimizer" else model).zero_grad()


# ---- weighing

def test_forgotten_weighing() -> None:
    def work(world: ThreadWorld) -> list[str]:
        model, optimizer = build(world, CovarianceNoise("full", 2, source="examples"), V=2)
        texts = [error_of(lambda: backward(model), RuntimeError)]
        optimizer.reset()
        x, y = batch(0, 0)
        optimizer.weigh(losses(model(x), y)).backward()
        texts.append(error_of(lambda: backward(model), RuntimeError))  # of the second worker
        return texts

    for texts in run_threads(2, work):
        assert all("loss = optimizer.weigh(losses)" in text for text in texts)


@pytest.mark.parametrize("shape", [(), (4, 2), (2, 2, 1)], ids=repr)
@pytest.mark.parametrize("noise", [None, CovarianceNoise("full", 2, source="examples")],
                         ids=["none", "noise"])
def test_weighing_the_wrong_shape(noise: Any, shape: tuple[int, ...]) -> None:
    _, optimizer = build(alone(), noise)
    text = error_of(lambda: optimizer.weigh(torch.zeros(shape)), ValueError)
    assert str(shape) in text and 'reduction="none"' in text


def test_weighing_without_noise_is_the_mean() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    for noise in (None, GNC(0.1), CovarianceNoise("full", 2)):
        assert build(alone(), noise, V=2)[1].weigh(values) == 3


# ---- lag 0, schedules

def test_lag_0_needs_a_closure() -> None:
    model, optimizer = build(alone(), GNC(0.1, lag=0), V=2)
    for worker in (0, 1):
        backward(model, worker=worker)
    text = error_of(optimizer.step, RuntimeError)
    assert "lag=0" in text and "step(closure)" in text


def test_a_schedule_that_goes_wrong() -> None:
    model, optimizer = build(alone(), GNC(lambda step: 1.0 - step), V=2)
    train(model, optimizer, 2)
    text = error_of(lambda: train(model, optimizer, 1), ValueError)
    assert "step 2 is -1.0" in text and ">= 0" in text


# ---- the ranks must agree

@pytest.mark.parametrize("mine", [
    lambda rank: GNC(0.1 + rank), lambda rank: GNC(0.1, seed=rank),
    lambda rank: GNC(0.1) if rank else None, lambda rank: CovarianceNoise("full", 2 + rank),
    lambda rank: GNC(0.1, source="own" if rank else "gathered")],
    ids=["radius", "seed", "one has none", "emulated batch", "source"])
def test_ranks_with_different_noise(mine: Any) -> None:
    def work(world: ThreadWorld) -> str:
        model, optimizer = build(world, mine(world.rank))
        return error_of(lambda: train(model, optimizer, 1), ValueError)

    for text in run_threads(2, work):
        assert "noise on rank 1" in text and "start all ranks with the same" in text


def test_ranks_with_different_virtual_workers() -> None:
    def work(world: ThreadWorld) -> str:
        model, optimizer = build(world, GNC(0.1), V=1 + world.rank)
        return error_of(lambda: train(model, optimizer, 1), ValueError)

    for text in run_threads(2, work):
        assert "virtual_workers on rank 1" in text
