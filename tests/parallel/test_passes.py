"""Backward passes out of the ordinary: not exchanged, in the wrong order, broken off, late."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

import hvdnoise
from hvdnoise.comm import World
from tests.parallel.toys import (
    Spy,
    assert_ranks_agree,
    close,
    gradients,
    loss_of,
    mean_gradient,
    net,
    raised,
    same_bits,
    sgd,
    step,
    step_by_hand,
    weights,
    wrap,
)

WORLDS = ("gloo-2", "mpi-2", "torchrun-2")


def check_no_sync_keeps_gradients_local(world: World) -> None:
    """They add up in p.grad, and the next backward outside exchanges the sum."""
    model, spy = net(), Spy(world)
    optimizer = wrap(model, world=spy)
    own = [mean_gradient(model, [world.rank], part) for part in range(2)]
    means = [mean_gradient(model, range(world.size), part) for part in range(3)]
    with optimizer.no_sync():
        for part in range(2):
            loss_of(model, world.rank, part).backward()
    assert not spy.events
    assert close(gradients(model), [a + b for a, b in zip(*own)])
    loss_of(model, world.rank, 2).backward()
    assert close(gradients(model), [a + b + c for a, b, c in zip(*means)])
    optimizer.step()
    assert_ranks_agree(world, model.parameters())


def check_two_pass_method_of_the_users_own(world: World) -> None:
    """Sharpness-aware minimization: each rank climbs by its own gradient first (m-SAM)."""
    model, twin = net(), net()
    optimizer, plain = wrap(model), sgd(twin)

    def climb(module: nn.Module, grads: list[Tensor], size: float) -> None:
        with torch.no_grad():
            for p, grad in zip(module.parameters(), grads):
                p.add_(grad, alpha=size)

    def put(module: nn.Module, values: list[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(module.parameters(), values):
                p.copy_(value)

    for n in range(3):
        optimizer.zero_grad()
        start = weights(model)
        with optimizer.no_sync():
            loss_of(model, world.rank, n).backward()
        climb(model, gradients(model), 0.05)
        optimizer.zero_grad()
        loss_of(model, world.rank, n).backward()
        put(model, start)
        optimizer.step()

        start = weights(twin)
        mean = [torch.zeros_like(p) for p in twin.parameters()]
        for rank in range(world.size):
            climb(twin, mean_gradient(twin, [rank], n), 0.05)
            for total, grad in zip(mean, mean_gradient(twin, [rank], n)):
                total.add_(grad / world.size)
            put(twin, start)
        for p, grad in zip(twin.parameters(), mean):
            p.grad = grad
        plain.step()
    assert close(model.parameters(), twin.parameters())
    assert_ranks_agree(world, model.parameters())


def check_two_backwards(world: World) -> None:
    model = net()
    optimizer = wrap(model)
    loss_of(model, world.rank, 0).backward()
    text = raised(RuntimeError, loss_of(model, world.rank, 1).backward)
    for remedy in ("step()", "zero_grad()", "backward_passes_per_step", "no_sync()"):
        assert remedy in text, text
    optimizer.zero_grad()
    loss_of(model, world.rank, 2).backward()
    optimizer.step()


def check_step_without_backward(world: World) -> None:
    model = net()
    optimizer = wrap(model)
    assert "loss.backward()" in raised(RuntimeError, optimizer.step)
    step(world, model, optimizer, 0)
    before = weights(model)
    assert "loss.backward()" in raised(RuntimeError, optimizer.step)  # with old gradients there
    optimizer.zero_grad()
    assert "loss.backward()" in raised(RuntimeError, optimizer.step)
    assert same_bits(before, weights(model))


def check_zero_grad_between_passes(world: World) -> None:
    """An error; reset() drops the passes that were made, and their gradients."""
    model = net()
    optimizer = wrap(model, backward_passes_per_step=2)
    loss_of(model, world.rank, 0).backward()
    text = raised(RuntimeError, optimizer.zero_grad)
    assert "1 of 2" in text and "reset()" in text and "step()" in text
    optimizer.reset()
    for part in (1, 2):
        loss_of(model, world.rank, part).backward()
    parts = [mean_gradient(model, range(world.size), part) for part in (1, 2)]
    assert close(gradients(model), [a + b for a, b in zip(*parts)])
    optimizer.step()


def check_fewer_passes_than_announced(world: World) -> None:
    """step() exchanges what there is, as Horovod does."""
    model = net()
    optimizer = wrap(model, backward_passes_per_step=2)
    expected = mean_gradient(model, range(world.size), 0)
    loss_of(model, world.rank, 0).backward()
    optimizer.synchronize()
    assert close(gradients(model), expected)
    optimizer.step()
    optimizer.set_backward_passes_per_step(1)
    step(world, model, optimizer, 1)
    assert_ranks_agree(world, model.parameters())


def check_model_zero_grad(world: World) -> None:
    """In place of the optimizer's, also when no step followed, as after a skipped one."""
    for set_to_none in (True, False):
        model, twin = net(), net()
        optimizer, plain = wrap(model), sgd(twin)
        for n in range(4):
            model.zero_grad(set_to_none=set_to_none)
            loss_of(model, world.rank, n).backward()
            if n != 1:
                optimizer.step()
                step_by_hand(world, twin, plain, n)
        assert close(model.parameters(), twin.parameters())


class _Boom(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise ArithmeticError("boom")


def _explode(world: World, model: Any) -> None:
    hook = model.hidden.register_forward_hook(lambda *args: _Boom.apply(args[2]))
    try:
        loss_of(model, world.rank).backward()
    finally:
        hook.remove()


def check_backward_that_raises(world: World) -> None:
    """The error is the user's own; whatever follows says reset(), and then training goes on."""
    for noise in (None, hvdnoise.GNC(radius=0.1)):
        model = net()
        optimizer = wrap(model, noise=noise)  # one bucket: nothing is under way yet
        step(world, model, optimizer, 0)
        before = weights(model)
        optimizer.zero_grad()
        assert "boom" in raised(ArithmeticError, _explode, world, model)
        assert same_bits(before, weights(model)), "weights are still displaced"
        for call in (optimizer.zero_grad, optimizer.step, optimizer.synchronize,
                     loss_of(model, world.rank).backward):
            assert "reset()" in raised(RuntimeError, call)
        optimizer.reset()
        expected = mean_gradient(model, range(world.size), 1) if noise is None else []
        loss_of(model, world.rank, 1).backward()
        assert noise is not None or close(gradients(model), expected)
        optimizer.step()
        assert_ranks_agree(world, model.parameters())


def check_backward_that_raises_in_mid_exchange(world: World) -> None:
    """A bucket has left: this rank cannot go back, and says so (last: the world is not clean)."""
    model = net()
    optimizer = wrap(model, bucket_bytes=0)
    assert "boom" in raised(ArithmeticError, _explode, world, model)
    assert "end this process" in raised(RuntimeError, optimizer.reset)
    assert "reset()" in raised(RuntimeError, optimizer.zero_grad)


class Probe(nn.Module):
    """Tells when backward comes by."""

    def __init__(self, spy: Spy) -> None:
        super().__init__()
        self.spy = spy

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda grad: self.spy.tell("backward"))
        return x


def overlapping(world: World) -> tuple[nn.Module, Spy]:
    spy = Spy(world)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), Probe(spy), nn.Linear(8, 4)), spy


def assert_overlap(world: World, model: nn.Module, optimizer: Any, spy: Spy, key: int) -> None:
    """The last layer's gradients leave before backward reaches the first layer."""
    spy.events.clear()
    step(world, model, optimizer, key)
    before = spy.events[:spy.events.index("backward")]
    assert before.count("allreduce") == 2, spy.events


def check_overlap(world: World) -> None:
    model, spy = overlapping(world)
    optimizer = wrap(model, world=spy, bucket_bytes=0)
    for n in range(2):
        assert_overlap(world, model, optimizer, spy, n)


def check_casting_after_wrapping_keeps_overlap(world: World) -> None:
    for noise in (None, hvdnoise.GNC(radius=0.05, source="gathered")):
        model, spy = overlapping(world)
        model.load_state_dict({name: torch.ones_like(p) * 0.1 for name, p
                               in model.state_dict().items()})
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), world=spy,
                         bucket_bytes=0, noise=noise, exchange="allgather" if noise else "auto")
        for n, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.float32)):
            optimizer.zero_grad()
            model.to(dtype)
            loss_of(model, world.rank, n).backward()
            optimizer.step()
            model.to(dtype)
            assert_overlap(world, model, optimizer, spy, n)
            assert all(p.dtype == p.grad.dtype == dtype for p in model.parameters()
                       if p.grad is not None)
            assert_ranks_agree(world, model.parameters())


def check_late_ranks(world: World) -> None:
    model, twin = net(), net()
    optimizer, plain = wrap(model), sgd(twin)
    for n in range(world.size + 1):
        if n == world.rank:
            time.sleep(0.2)
        step(world, model, optimizer, n)
        step_by_hand(world, twin, plain, n)
    assert close(model.parameters(), twin.parameters())
    assert_ranks_agree(world, model.parameters())
