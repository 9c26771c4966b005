"""The wrapper stands in for the wrapped optimizer: same class, state, groups, defaults, hooks."""

from __future__ import annotations

import copy
import re
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn

import hvdnoise
from hvdnoise import DistributedOptimizer
from hvdnoise.wrapping import Wrapper, named
from tests.fake_world import Meeting, ThreadWorld

Make = Callable[..., torch.optim.Optimizer]


def world() -> ThreadWorld:
    return ThreadWorld(Meeting(1, 1.0), 0)


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def sgd(net: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def wrapped(net: nn.Module, inner: torch.optim.Optimizer | None = None, **options: Any) -> Any:
    return DistributedOptimizer(inner or sgd(net), net.named_parameters(),
                                **{"world": world(), **options})


def bits(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def train(net: nn.Module, optimizer: Any, steps: int = 3) -> None:
    for n in range(steps):
        optimizer.zero_grad()
        net(torch.linspace(-1, 1, 6).view(2, 3) * (n + 1)).square().mean().backward()
        optimizer.step()


def test_it_is_what_it_wraps() -> None:
    net = model()
    inner = sgd(net, weight_decay=0.5)
    optimizer = wrapped(net, inner)
    assert isinstance(optimizer, torch.optim.SGD) and isinstance(optimizer, Wrapper)
    assert type(optimizer).__name__ == "SGD" and "SGD" in repr(optimizer)
    assert optimizer.defaults is inner.defaults and optimizer.defaults["weight_decay"] == 0.5
    assert optimizer.state is inner.state and optimizer.param_groups is inner.param_groups


def test_alone_it_trains_as_the_plain_optimizer() -> None:
    """One rank, no noise: nothing is hooked, and all of the interface does nothing else."""
    net, twin = model(), model()
    optimizer = wrapped(net)
    train(twin, sgd(twin))
    train(net, optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    with optimizer.no_sync():
        net(torch.linspace(-1, 1, 6).view(2, 3) * 2).square().mean().backward()
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        optimizer.step()
    optimizer.reset()
    net(torch.linspace(-1, 1, 6).view(2, 3) * 3).square().mean().backward()
    optimizer.step()
    assert same(bits(net.parameters()), bits(twin.parameters()))


def test_state_dicts_are_interchangeable() -> None:
    net, twin = model(), model()
    inner = sgd(net)
    optimizer = wrapped(net, inner)
    train(net, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved.keys() == sgd(twin).state_dict().keys()
    plain = sgd(twin, lr=5.0)
    plain.load_state_dict(saved)
    twin.load_state_dict(net.state_dict())
    again = wrapped(twin, plain)
    assert again.param_groups[0]["lr"] == 0.1
    inner.load_state_dict(copy.deepcopy(saved))  # behind the wrapper's back: new groups
    assert optimizer.param_groups is inner.param_groups
    for n, o in ((net, optimizer), (twin, again)):
        train(n, o)
    assert same(bits(net.parameters()), bits(twin.parameters()))


def test_attributes_of_the_wrapped_one_are_read_and_set_there() -> None:
    net = model()
    inner: Any = sgd(net)
    inner.note = "inner"
    optimizer = wrapped(net, inner)
    assert optimizer.note == "inner"
    optimizer.note = "set"
    optimizer.own = "own"
    assert inner.note == "set" and not hasattr(inner, "own") and optimizer.own == "own"
    optimizer.defaults = {"lr": 1.0}
    assert inner.defaults == {"lr": 1.0}
    with pytest.raises(AttributeError, match="nothing"):
        optimizer.nothing


def test_schedulers_patch_the_step_of_their_own_object() -> None:
    net = model()
    inner = sgd(net)
    optimizer = wrapped(net, inner)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "step" in vars(optimizer) and "step" not in vars(inner)


def test_gradient_scalers_unscale_for_fused_optimizers_too() -> None:
    net = model()
    inner = torch.optim.Adam(net.parameters(), fused=True)
    assert getattr(inner, "_step_supports_amp_scaling")
    assert not wrapped(net, inner)._step_supports_amp_scaling


def initialize(optimizer: Any) -> None:
    """What hvd.broadcast_optimizer_state does where there is no state."""
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    assert optimizer.__module__ == "horovod.torch.optimizer"
    super(optimizer.__class__, optimizer).step()


OPTIMIZERS = ["SGD", "Adam", "AdamW", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "ASGD",
              "Rprop"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_made_without_touching_a_weight(name: str) -> None:
    net = model()
    options: dict[str, Any] = {"lr": 0.1}
    options |= {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    options |= {"weight_decay": 0.3} if name != "Rprop" else {}
    inner = getattr(torch.optim, name)(net.parameters(), **options)
    optimizer = wrapped(net, inner)
    before, versions = bits(net.parameters()), [p._version for p in net.parameters()]
    groups = [list(group["params"]) for group in inner.param_groups]
    initialize(optimizer)
    assert same(bits(net.parameters()), before)
    assert [p._version for p in net.parameters()] == versions  # a graph may hold them
    assert all(a is b for a, b in zip(groups[0], inner.param_groups[0]["params"]))
    assert inner.param_groups[0].get("weight_decay", 0.3) == 0.3
    assert list(map(id, inner.state)) == list(map(id, net.parameters()))
    for state in inner.state.values():
        for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg", "acc_delta"):
            assert not bool(torch.as_tensor(state.get(key, 0)).any()), key
    train(net, optimizer)


def test_an_error_while_state_is_made_leaves_the_groups() -> None:
    net = model()
    inner: Any = sgd(net, weight_decay=0.5)
    optimizer = wrapped(net, inner)

    def fail() -> None:
        raise ArithmeticError

    inner.step = fail
    with pytest.raises(ArithmeticError):
        initialize(optimizer)
    assert inner.param_groups[0]["weight_decay"] == 0.5
    assert all(p is q for p, q in zip(inner.param_groups[0]["params"], net.parameters()))


def test_names() -> None:
    net = model()
    optimizer = sgd(net)
    assert list(named(optimizer, net.named_parameters()).values()) == [
        "0.weight", "0.bias", "2.weight", "2.bias"]
    assert named(optimizer, None) == {}
    more = [*net.named_parameters(), ("another", torch.zeros(1))]
    assert len(named(optimizer, more)) == 5


@pytest.mark.parametrize("pairs, text", [
    (lambda net: net.parameters(), "named_parameters must be (name, parameter) tuples"),
    (lambda net: [("a", p) for p in net.parameters()], "a more than once"),
    (lambda net: list(net.named_parameters())[1:], "1 parameters of the optimizer are not in")])
def test_bad_names(pairs: Callable[[nn.Module], Any], text: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=re.escape(text)):
        named(sgd(net), pairs(net))


P = torch.zeros(2, requires_grad=True)


@pytest.mark.parametrize("options, text", [
    (dict(backward_passes_per_step=0), "backward_passes_per_step=0"),
    (dict(backward_passes_per_step=1.5), "backward_passes_per_step=1.5"),
    (dict(virtual_workers=-1), "virtual_workers=-1"),
    (dict(op="sum", gradient_predivide_factor=2.0), "gradient_predivide_factor=2.0 needs"),
    (dict(gradient_predivide_factor=0.0), "gradient_predivide_factor=0.0 must be > 0"),
    (dict(bucket_bytes=-1), "bucket_bytes=-1"),
    (dict(op="mean"), "op='mean' is no reduction"),
    (dict(op=17), "op=17 is no reduction"),
    (dict(op="sum", virtual_workers=2), "op=sum"),
    (dict(op="max", noise=hvdnoise.GNC(radius=0.1)), "op=max"),
    (dict(groups=0), "groups=0"),
    (dict(num_groups=-2), "groups=-2"),
    (dict(groups=[["p"]]), "torch.Tensor"),
    (dict(groups=[[P], [P]]), "twice"),
    (dict(noise=hvdnoise.GNC(radius=0.1)), "virtual_workers=2")])
def test_bad_arguments(options: dict[str, Any], text: str) -> None:
    """One line that names the value; nothing is hooked."""
    net = model()
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        wrapped(net, **options)
    assert "\n" not in str(caught.value)
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


def test_before_horovod_has_started() -> None:
    with pytest.raises(RuntimeError, match="hvdnoise.init()"):
        DistributedOptimizer(sgd(model()))


def test_wrapping_twice() -> None:
    net = model()
    optimizer = wrapped(net)
    with pytest.raises(ValueError, match="DistributedOptimizer already"):
        DistributedOptimizer(optimizer, world=world())
