"""What a training loop does with its optimizer: the traps of Horovod's wrapper, and others.

The oracle is training by hand: one rank computes the gradients of all ranks' examples itself and
gives their mean to a plain optimizer.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import hvdnoise
from hvdnoise.comm import World
from tests.checks import on
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

WORLDS = ("gloo-2", "mpi-2", "mpi-4", "torchrun-2")


@on("gloo-2")
def check_mpi4py_is_not_imported_without_mpi(world: World) -> None:
    assert hvdnoise.init().size == world.size  # again, as often as one likes
    model = net()
    optimizer = wrap(model, noise=hvdnoise.GNC(radius=0.05))
    for n in range(2):
        step(world, model, optimizer, n)
    assert not [name for name in sys.modules if name.startswith("mpi4py")]


def check_state_and_defaults_survive_wrapping(world: World) -> None:
    """Also those of an optimizer that has taken steps: its momentum goes on."""
    model, twin = net(), net()
    inner, plain = sgd(model), sgd(twin)
    for n in range(2):
        step_by_hand(world, model, inner, n)
        step_by_hand(world, twin, plain, n)
    defaults = dict(inner.defaults)
    optimizer = wrap(model, inner)
    assert isinstance(optimizer, torch.optim.SGD) and type(optimizer).__name__ == "SGD"
    assert optimizer.state is inner.state and optimizer.param_groups is inner.param_groups
    assert optimizer.defaults == defaults and defaults["momentum"] == 0.9
    for n in range(2, 4):
        step(world, model, optimizer, n)
        step_by_hand(world, twin, plain, n)
    assert close(model.parameters(), twin.parameters())
    buffers = [[s[p]["momentum_buffer"] for p in s] for s in (inner.state, plain.state)]
    assert len(buffers[0]) == 7 and close(*buffers)
    assert optimizer.state_dict().keys() == plain.state_dict().keys()


def check_zero_grad_takes_set_to_none(world: World) -> None:
    results = []
    for set_to_none in (True, False):
        model = net()
        optimizer = wrap(model)
        for n in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            expected = [None] * 7 if set_to_none or n == 0 else [0.0] * 7
            assert [p.grad if p.grad is None else float(p.grad.abs().sum())
                    for p in model.parameters()] == expected
            loss_of(model, world.rank, n).backward()
            optimizer.step()
        results.append(weights(model))
    assert same_bits(*results)


def check_synchronize_and_plain_step_reduce_once(world: World) -> None:
    """A sum, because the mean of means would hide it; and step() asks nothing of the world."""
    results = []
    for synchronize in (False, True):
        model, spy = net(), Spy(world)
        optimizer = wrap(model, op="sum", world=spy)
        loss_of(model, world.rank).backward()
        reduced = gradients(model)
        asked = len(spy.events)
        assert asked > 0
        for _ in range(2 * synchronize):
            optimizer.synchronize()
        optimizer.step()
        assert len(spy.events) == asked and same_bits(gradients(model), reduced)
        results.append(weights(model))
    assert same_bits(*results)
    assert_ranks_agree(world, results[0])


def check_clipping(world: World) -> None:
    """Right after backward, and in Horovod's idiom; the same norm on every rank."""
    for idiom in (False, True):
        model, twin = net(), net()
        optimizer, plain = wrap(model), sgd(twin)
        for n in range(3):
            optimizer.zero_grad()
            loss_of(model, world.rank, n).backward()
            if idiom:
                optimizer.synchronize()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            assert norm > 0.3
            assert_ranks_agree(world, [norm, *gradients(model)], "clipped gradients")
            if idiom:
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                optimizer.step()
            step_by_hand(world, twin, plain, n,
                         change=lambda: nn.utils.clip_grad_norm_(twin.parameters(), 0.3))
        assert close(model.parameters(), twin.parameters())


def check_step_hooks_see_the_mean(world: World) -> None:
    """Registered on the wrapper or before, on the wrapped one; each is called once a step."""
    model, seen = net(), list[list[Tensor]]()
    inner = sgd(model)
    inner.register_step_pre_hook(lambda *_: seen.append(gradients(model)))
    optimizer = wrap(model, inner)
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(model)))
    optimizer.register_step_post_hook(lambda *_: seen.append(weights(model)))
    expected = mean_gradient(model, range(world.size), 0)
    step(world, model, optimizer, 0)
    assert len(seen) == 3 and same_bits(seen[2], weights(model))
    assert close(seen[0], expected) and close(seen[1], expected)


def check_gradients_of_a_closure(world: World) -> None:
    model, twin = net(), net()
    optimizer, plain = wrap(model), sgd(twin)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model, world.rank, 0)
        loss.backward()
        return loss

    for _ in range(2):
        loss = optimizer.step(closure)
        assert isinstance(loss, Tensor) and loss > 0
        step_by_hand(world, twin, plain, 0)
    assert close(model.parameters(), twin.parameters())
    assert_ranks_agree(world, model.parameters())


def check_lbfgs(world: World) -> None:
    """Many closures in a step, all of them on gradients that the ranks share."""
    model, twin = net().double(), net().double()
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, tolerance_change=0)
    plain = torch.optim.LBFGS(twin.parameters(), lr=0.5, max_iter=4, tolerance_change=0)
    optimizer = wrap(model, lbfgs)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = loss_of(model, world.rank)
        loss.backward()
        return loss

    def closure_by_hand() -> Tensor:
        losses = torch.stack([loss_of(twin, rank) for rank in range(world.size)])
        plain.zero_grad()
        losses.mean().backward()
        return losses.mean()

    for _ in range(2):
        optimizer.step(closure)
        plain.step(closure_by_hand)
    assert len(calls) == 8
    assert close(model.parameters(), twin.parameters(), 1e-9)
    assert_ranks_agree(world, model.parameters())


def check_parameter_groups_added_later(world: World) -> None:
    """Reduced, and updated by their own settings, from the next step on."""
    for through_wrapper in (True, False):
        model, twin = net(), net()
        inner = torch.optim.SGD(model.head.parameters(), lr=0.1)
        plain = torch.optim.SGD(twin.head.parameters(), lr=0.1)
        optimizer = hvdnoise.DistributedOptimizer(inner, model.head.named_parameters("head"))
        for n in range(4):
            if n == 2:
                added = dict(lr=0.01, momentum=0.5, weight_decay=0.1)
                (optimizer if through_wrapper else inner).add_param_group(
                    {"params": model.hidden.parameters(), **added})
                plain.add_param_group({"params": twin.hidden.parameters(), **added})
            step(world, model, optimizer, n)
            step_by_hand(world, twin, plain, n)
            for p, q in zip(model.hidden.parameters(), twin.hidden.parameters()):
                assert n < 2 or close([p.grad], [q.grad])
        assert close(model.parameters(), twin.parameters())
        assert len(optimizer.param_groups) == len(inner.param_groups) == 2


def check_a_group_that_is_added_before_the_first_backward(world: World) -> None:
    """And before any other call, so that its parameters have no names yet."""
    model, twin = net(), net()
    body = [*model.convolution.parameters(), *model.norm.parameters(), *model.hidden.parameters()]
    optimizer: Any = hvdnoise.DistributedOptimizer(torch.optim.SGD(body, lr=0.1))
    optimizer.add_param_group({"params": [*model.head.parameters()], "lr": 0.1})
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    for n in range(3):
        loss_of(model, world.rank, n).backward()
        optimizer.step()
        optimizer.zero_grad()
        step_by_hand(world, twin, plain, n)
    assert close(model.parameters(), twin.parameters())


def check_only_the_added_group_has_gradients(world: World) -> None:
    """The hooks are there before the first backward, so that clipping sees the mean."""
    model = net()
    model.convolution.requires_grad_(False)
    inner = torch.optim.SGD([*model.convolution.parameters(), *model.norm.parameters()], lr=0.1)
    optimizer = hvdnoise.DistributedOptimizer(inner)
    step(world, model, optimizer, 0)
    model.norm.requires_grad_(False)
    optimizer.add_param_group({"params": model.head.parameters()})
    expected = mean_gradient_of_head(world, model)
    optimizer.zero_grad()
    loss_of(model, world.rank, 1).backward()
    assert close([p.grad for p in model.head.parameters() if p.grad is not None], expected)
    optimizer.step()


def mean_gradient_of_head(world: World, model: Any) -> list[Tensor]:
    losses = torch.stack([loss_of(model, rank, 1) for rank in range(world.size)])
    return list(torch.autograd.grad(losses.mean(), list(model.head.parameters())))


def check_learning_rate_schedulers(world: World) -> None:
    """Made before or after wrapping: no warning of a wrong order, and the rate is used."""
    for before in (True, False):
        model, twin = net(), net()
        inner, plain = sgd(model), sgd(twin)
        make = torch.optim.lr_scheduler.StepLR
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if before:
                scheduler = make(inner, 1, gamma=0.5)
                optimizer = wrap(model, inner)
            else:
                optimizer = wrap(model, inner)
                scheduler = make(optimizer, 1, gamma=0.5)
            for n in range(3):
                step(world, model, optimizer, n)
                scheduler.step()
                plain.param_groups[0]["lr"] = 0.1 * 0.5 ** n
                step_by_hand(world, twin, plain, n)
        assert optimizer.param_groups[0]["lr"] == inner.param_groups[0]["lr"] == 0.0125
        assert close(model.parameters(), twin.parameters())


def check_weights_that_differ_at_the_start_are_refused(world: World) -> None:
    """Before the first backward pass; later they may: steps in no_sync() are a rank's own."""
    noise = hvdnoise.GNC(radius=0.05)
    model, last = net(seed=world.rank), world.size - 1
    text = raised(ValueError, step, world, model, wrap(model, noise=noise), 0)
    assert "weights on rank 1" in text and "hvd.broadcast_parameters" in text, text
    model = net()
    with torch.no_grad():  # one bit of one weight
        model.head.bias.view(torch.int32)[2] ^= int(world.rank == last)
    text = raised(ValueError, step, world, model, wrap(model), 0)
    assert f"weights on rank {last};" in text, text
    model = net()
    optimizer = wrap(model)
    with optimizer.no_sync():
        step(world, model, optimizer, 0)
    assert not torch.equal(world.allgather(model.head.bias.detach().clone(), name="local").wait()
                           .view(world.size, -1)[last], net().head.bias)
    step(world, model, optimizer, 1)


@on("torchrun-2")
def check_models_that_average_by_themselves_are_refused(world: World) -> None:
    """Twice averaged, a gradient is wrong, and the workers' deviations are zero."""
    for noise in (None, hvdnoise.GNC(radius=0.05), hvdnoise.CovarianceNoise("full", 64)):
        model = nn.parallel.DistributedDataParallel(net())
        text = raised(ValueError, step, world, model, wrap(model, noise=noise), 0)
        assert text.startswith("module.convolution.weight is a parameter of a Distributed"), text
        model = nn.parallel.DistributedDataParallel(net())
        optimizer = wrap(model.module, noise=noise)  # its gradients are averaged all the same
        text = raised(ValueError, step, world, model, optimizer, 0)
        assert "leave DistributedDataParallel out" in text, text
    model = nn.parallel.DistributedDataParallel(net())
    alone = model.module
    del model
    step(world, alone, wrap(alone), 0)
    with torch.no_grad():
        other = nn.parallel.DistributedDataParallel(net())  # of somebody else
    model = net()
    step(world, model, wrap(model), 1)
    assert other.module is not model
