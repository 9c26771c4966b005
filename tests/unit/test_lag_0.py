"""GNC with lag 0: two passes over the same batch; what the first one leaves, and the second not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvdnoise import GNC
from tests.fake_world import Meeting, ThreadWorld, run_threads
from tests.toys import batch, build, losses, seen, vector


class NormalizedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        self.seen: list[Tensor] = []  # the weights that each forward saw

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(seen(self))
        result: Tensor = self.layers(x)
        return result

    def statistics(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.buffers()]


def build_normalized(noise: Any, V: int = 2) -> tuple[Any, Any]:
    model, optimizer = build(ThreadWorld(Meeting(1, 1.0), 0), noise, V=V, model=NormalizedNet())
    return model, optimizer


def passes(model: nn.Module, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    for worker in (0, 1):
        x, y = batch(step, worker, 8, torch.float32)
        losses(model(x), y).mean().backward()


def test_statistics_are_those_of_the_clean_pass() -> None:
    model, optimizer = build_normalized(GNC(0.5, lag=0))
    for step in range(3):
        expected = copy.deepcopy(model.layers)
        clean = vector(model.parameters())
        with torch.no_grad():
            for worker in (0, 1):
                expected(batch(step, worker, 8, torch.float32)[0])
        model.seen.clear()
        optimizer.step(lambda: passes(model, optimizer, step))
        for buffer, right in zip(model.statistics(), expected.buffers()):
            assert torch.equal(buffer, right)
        first, second, third, fourth = model.seen
        assert torch.equal(first, clean) and torch.equal(second, clean)
        assert not torch.equal(third, clean) and not torch.equal(fourth, clean)
        assert not torch.equal(third, fourth)
        gradients = vector(p.grad for p in model.parameters())
        assert torch.equal(vector(model.parameters()), clean.add(gradients, alpha=-0.1))
    assert model.layers[1].num_batches_tracked == 6  # 3 steps of 2 workers


def test_lag_1_averages_over_displaced_weights() -> None:
    """Its statistics belong to the forward passes as they were, as the docstring says."""
    model, optimizer = build_normalized(GNC(0.5))
    passes(model, optimizer, 0)
    optimizer.step()
    expected, undisplaced = copy.deepcopy(model.layers), copy.deepcopy(model.layers)
    model.seen.clear()
    passes(model, optimizer, 1)
    for worker, weights in enumerate(model.seen):
        x = batch(1, worker, 8, torch.float32)[0]
        undisplaced(x)
        nn.utils.vector_to_parameters(weights, expected.parameters())
        expected(x)
    for buffer, right in zip(model.statistics(), expected.buffers()):
        assert torch.equal(buffer, right)
    assert not torch.equal(model.layers[1].running_mean, undisplaced[1].running_mean)


def test_the_closure_is_called_twice_and_its_loss_returned() -> None:
    model, optimizer = build_normalized(GNC(0.5, lag=0))
    calls: list[int] = []

    def closure() -> str:
        passes(model, optimizer, 0)
        calls.append(len(calls))
        return f"loss {len(calls)}"

    assert optimizer.step(closure) == "loss 2" and len(calls) == 2
    assert optimizer.steps == 1


def test_a_closure_with_lag_1_is_called_once() -> None:
    model, optimizer = build_normalized(GNC(0.5))
    for step in range(2):
        optimizer.step(lambda: passes(model, optimizer, step))
    assert len(model.seen) == 4
    assert not torch.equal(model.seen[2], model.seen[3]), "displaced by the first step's deviations"


def test_each_step_starts_clean() -> None:
    """Nothing of a step's deviations is left for the next, nor for a plain forward."""
    model, optimizer = build_normalized(GNC(0.5, lag=0))
    for step in range(2):
        optimizer.step(lambda: passes(model, optimizer, step))
        clean = vector(model.parameters())
        model.train()(batch(9, 0, 8, torch.float32)[0])
        assert torch.equal(model.seen[-1], clean)


def test_a_second_pass_that_breaks_off_leaves_clean_weights() -> None:
    model, optimizer = build_normalized(GNC(0.5, lag=0))
    clean, calls = vector(model.parameters()), []

    def closure() -> None:
        passes(model, optimizer, 0)
        calls.append(0)
        if len(calls) == 2:
            raise ValueError("broken off")

    with pytest.raises(ValueError, match="broken off"):
        optimizer.step(closure)
    assert torch.equal(vector(model.parameters()), clean)
    optimizer.step(lambda: passes(model, optimizer, 0))  # and works again
    assert len(model.seen) == 8 and not torch.equal(model.seen[-1], clean)


def test_sam_is_two_passes_for_the_own_source() -> None:
    """Two ranks: what rank i's second pass sees is theta - s d_i of its first pass."""
    def work(world: ThreadWorld) -> tuple[Tensor, Tensor]:
        model, optimizer = build(world, GNC(lr=5.0, lag=0))
        weights: list[Tensor] = []
        own: list[Tensor] = []
        mean: list[Tensor] = []
        model.register_forward_hook(lambda module, *_: weights.append(seen(module)))

        def closure() -> None:
            optimizer.zero_grad()
            x, y = batch(0, world.rank)
            output = model(x)
            loss = losses(output, y).mean()
            own.append(vector(torch.autograd.grad(loss, list(model.parameters()),
                                                  retain_graph=True)))
            loss.backward()
            mean.append(vector(p.grad for p in model.parameters()))
        optimizer.step(closure)
        return weights[1] - weights[0], -5.0 * 0.1 * (own[0] - mean[0])

    for displacement, expected in run_threads(2, work):
        assert torch.allclose(displacement, expected, rtol=1e-9, atol=1e-14)
