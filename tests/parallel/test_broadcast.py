"""``hvd.broadcast_parameters`` and ``hvd.broadcast_optimizer_state``, at any state, hang nowhere.

Horovod makes the state of a fresh optimizer by a step with gradients of zeros, on the ranks that
have none and on those only: that must be no collective, and must leave the weights alone, which
with weight decay it does not in Horovod.
"""

from __future__ import annotations

import copy
from typing import Any, Callable

import horovod.torch as hvd
import torch
from torch import Tensor

import hvdnoise
from hvdnoise.comm import World
from tests.parallel.toys import (
    Spy,
    assert_ranks_agree,
    loss_of,
    net,
    same_bits,
    step,
    weights,
    wrap,
)

WORLDS = ("gloo-2", "mpi-4")
CHECK_SECONDS = 90

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
NOISES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "gnc": lambda: hvdnoise.GNC(radius=0.05),
    "gathered": lambda: hvdnoise.GNC(lr=0.5, source="gathered"),
    "full": lambda: hvdnoise.CovarianceNoise("full", 2),
    "isotropic": lambda: hvdnoise.CovarianceNoise("isotropic", 2),
}


def state_tensors(optimizer: Any) -> list[Tensor]:
    return [value.detach().clone() for p in optimizer.param_groups[0]["params"]
            for _, value in sorted(optimizer.state.get(p, {}).items())]


def broadcast(world: World, model: Any, optimizer: Any) -> None:
    """Both, as every Horovod script does, and nothing moves."""
    before = weights(model)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert same_bits(weights(model), before), "the weights were moved"
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    if state_tensors(optimizer):
        assert_ranks_agree(world, state_tensors(optimizer), "state")


def check_fresh(world: World) -> None:
    """From a different model on every rank; the state is that of no step with any gradient."""
    for name, make in OPTIMIZERS.items():
        model = net(seed=world.rank)
        optimizer = wrap(model, make(model.parameters()))
        broadcast(world, model, optimizer)
        assert_ranks_agree(world, model.state_dict().values())
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
        momenta = [t for t in state_tensors(optimizer) if t.dim() > 0]
        assert len(momenta) >= 7 and not any(bool(t.any()) for t in momenta), name
        for n in range(2):
            step(world, model, optimizer, n)
        assert_ranks_agree(world, model.parameters())


def check_at_any_time(world: World) -> None:
    """After steps; then before, between and after the parts of a step; with every noise."""
    for kind, make_noise in NOISES.items():
        model, twin = net(), net()
        optimizer, undisturbed = (
            wrap(m, OPTIMIZERS["sgd"](m.parameters()), noise=make_noise()) for m in (model, twin))
        for n in range(5):
            for m, o in ((model, optimizer), (twin, undisturbed)):
                disturb = m is model and n > 0
                o.zero_grad()
                if disturb and n == 1:
                    broadcast(world, m, o)
                loss = loss_of(m, world.rank, n)
                if disturb and n in (2, 4):  # the weights may be displaced
                    clean = dict(m.state_dict())
                    hvd.broadcast_parameters(clean, root_rank=0)
                    hvd.broadcast_optimizer_state(o, root_rank=0)
                loss.backward()
                if disturb and n >= 3:
                    broadcast(world, m, o)
                o.step()
            assert same_bits(weights(model), weights(twin)), (kind, n)
        assert_ranks_agree(world, model.parameters())


def check_fresh_between_forward_and_backward(world: World) -> None:
    """Horovod replaces the gradients of a fresh optimizer by zeros then, and backward adds."""
    for kind, make_noise in NOISES.items():
        model, twin = net(), net()
        optimizer = wrap(model, OPTIMIZERS["adamw"](model.parameters()), noise=make_noise())
        other = wrap(twin, OPTIMIZERS["adamw"](twin.parameters()), noise=make_noise())
        hvd.broadcast_optimizer_state(other, root_rank=0)
        step(world, twin, other, 0)
        optimizer.zero_grad()
        loss = loss_of(model, world.rank, 0)
        broadcast(world, model, optimizer)
        loss.backward()
        optimizer.step()
        assert same_bits(weights(model), weights(twin)), kind
        assert_ranks_agree(world, model.parameters())


def check_state_on_the_root_only(world: World) -> None:
    """Resumed on rank 0: it has nothing to initialize, and must not be waited for."""
    for kind, make_noise in NOISES.items():
        for name, make in OPTIMIZERS.items() if kind == "gnc" else [("adam", OPTIMIZERS["adam"])]:
            trained = net()
            first = wrap(trained, make(trained.parameters()))
            step(world, trained, first, 0)
            model, spy = net(seed=5 + world.rank), Spy(world)
            optimizer = wrap(model, make(model.parameters()), noise=make_noise(), world=spy)
            if world.rank == 0:
                model.load_state_dict(trained.state_dict())
                optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
            broadcast(world, model, optimizer)
            assert not spy.events, "the wrapper's own collectives were called"
            assert same_bits(weights(model), weights(trained))
            assert same_bits(state_tensors(optimizer), state_tensors(first)), (kind, name)
            for m, o in ((model, optimizer), (trained, first)):
                step(world, m, o, 1)
            assert_ranks_agree(world, model.parameters())
            if kind in ("none", "gnc"):  # GNC has no deviations yet
                assert same_bits(weights(model), weights(trained))


def check_options_are_broadcast(world: World) -> None:
    """The learning rate of the root, into the groups of the wrapped optimizer."""
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1 + world.rank, momentum=0.9)
    optimizer = wrap(model, inner)
    broadcast(world, model, optimizer)
    assert inner.param_groups[0]["lr"] == 0.1


def check_plain_optimizer_too(world: World) -> None:
    """Broadcast before wrapping, as some scripts do."""
    model = net()
    inner = OPTIMIZERS["sgd"](model.parameters())
    step_weights = weights(model)
    optimizer = wrap(model, inner)
    hvd.broadcast_optimizer_state(inner, root_rank=0)
    assert not same_bits(weights(model), step_weights)  # this is Horovod's own weight decay
    step(world, model, optimizer, 0)
    assert_ranks_agree(world, model.parameters())
