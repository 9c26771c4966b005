"""Schedules against closed formulas; optimizers honour the rate and leave out what they should."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from hvdnoise.training.optim import LrConfig, OptimConfig, build_optimizer, build_schedule

NAMES = ("sgd", "adamw", "lars", "lamb")


def rates(config: LrConfig, *, lr: float = 0.1, batch: int = 512, steps: int = 10,
          epochs: int = 5) -> list[float]:
    """The rate of every step of a run."""
    optimizer = build_optimizer(nn.Linear(2, 1), OptimConfig(lr=lr))
    schedule = build_schedule(optimizer, config, batch, steps, epochs)
    seen = []
    for _ in range(steps * epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_cosine_with_warmup() -> None:
    got = rates(LrConfig(scaling="linear", base_batch=256, warmup_epochs=0.5, min_lr=0.01))
    peak = 0.2  # 0.1 * 512 / 256; 5 warm-up steps, 45 on the cosine
    expected = [peak * (step + 1) / 5 for step in range(5)]
    expected += [0.01 + 0.19 * 0.5 * (1 + math.cos(math.pi * k / 45)) for k in range(45)]
    assert got == pytest.approx(expected, rel=1e-12)


def test_polynomial() -> None:
    got = rates(LrConfig(scaling="sqrt", base_batch=128, schedule="polynomial", power=1.5))
    assert got == pytest.approx([0.2 * (1 - k / 50) ** 1.5 for k in range(50)], rel=1e-12)


def test_steps_fall_at_their_epochs() -> None:
    got = rates(LrConfig(schedule="step", milestones=(2, 3.5), gamma=0.5, warmup_epochs=0.2))
    assert got == pytest.approx([0.05, 0.1] + [0.1] * 18 + [0.05] * 15 + [0.025] * 15, rel=1e-12)
    floor = rates(LrConfig(schedule="step", milestones=(1,), gamma=0.1, min_lr=0.03))
    assert floor == pytest.approx([0.1] * 10 + [0.03] * 40, rel=1e-12)


def test_constant() -> None:
    assert rates(LrConfig(schedule="constant")) == [0.1] * 50


def test_a_resumed_schedule_has_the_same_rates() -> None:
    config = LrConfig(warmup_epochs=1, scaling="linear")
    whole = rates(config)

    def start() -> tuple[Any, Any]:
        optimizer = build_optimizer(nn.Linear(2, 1), OptimConfig())
        return optimizer, build_schedule(optimizer, config, 512, 10, 5)

    for stop in (0, 4, 17):
        optimizer, schedule = start()
        for _ in range(stop):
            optimizer.step()
            schedule.step()
        file = io.BytesIO()
        torch.save([optimizer.state_dict(), schedule.state_dict()], file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        optimizer, schedule = start()
        optimizer.load_state_dict(saved[0])
        schedule.load_state_dict(saved[1])
        rest = []
        for _ in range(50 - stop):
            rest.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rest == whole[stop:]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))


def trained(config: OptimConfig, factor: float, steps: int = 1) -> list[torch.Tensor]:
    """Weights after steps at lr * factor on fixed gradients."""
    net = model()
    torch.manual_seed(1)
    images = torch.rand(6, 3, 6, 6)
    net(images)
    optimizer = build_optimizer(net, config)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor
    for _ in range(steps):
        optimizer.zero_grad()
        net(images).square().sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_of_a_group_is_honoured(name: str) -> None:
    """The first step is linear in the rate, and at rate 0 nothing moves."""
    config = OptimConfig(name=name, lr=0.01, weight_decay=1e-3)  # type: ignore[arg-type]
    still, one, half = (trained(config, factor) for factor in (0.0, 1.0, 0.5))
    before = trained(config, 0.0, steps=0)
    for a, b, c, d in zip(before, still, one, half):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        torch.testing.assert_close(d - a, (c - a) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_may_leave_out_norms_and_biases(name: str) -> None:
    """With zero gradients only weight decay moves weights."""
    for everywhere in (True, False):
        net = model()
        net(torch.rand(2, 3, 6, 6))
        for parameter in net.parameters():
            nn.init.ones_(parameter)
            parameter.grad = torch.zeros_like(parameter)
        optimizer = build_optimizer(net, OptimConfig(
            name=name, weight_decay=0.1, decay_norm_and_bias=everywhere))  # type: ignore[arg-type]
        optimizer.step()
        for parameter in net.parameters():
            moved = bool((parameter < 1).all())
            assert moved == (parameter.ndim > 1 or everywhere and name != "lars")
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


def test_lars_and_lamb_step_by_their_papers() -> None:
    """Two steps on a matrix, against the formulas of You et al. (LAMB: no bias correction)."""
    gradient, decay, lr = torch.arange(6.0).view(2, 3), 0.1, 0.01
    for name in ("lars", "lamb"):
        layer = nn.Linear(3, 2, bias=False)
        optimizer = build_optimizer(layer, OptimConfig(
            name=name, lr=lr, weight_decay=decay, trust_coefficient=0.02))
        weight = layer.weight.detach().clone()
        first = second = torch.zeros(2, 3)
        for _ in range(2):
            layer.weight.grad = gradient.clone()
            optimizer.step()
            if name == "lars":
                local = 0.02 * weight.norm() / (gradient.norm() + decay * weight.norm())
                first = 0.9 * first + local * (gradient + decay * weight)
                update = first
            else:
                first = 0.9 * first + 0.1 * gradient
                second = 0.999 * second + 0.001 * gradient.square()
                direction = first / (second.sqrt() + 1e-6) + decay * weight
                update = weight.norm() / direction.norm() * direction
            weight = weight - lr * update
            torch.testing.assert_close(layer.weight.data, weight)


@pytest.mark.parametrize("name", NAMES)
def test_state_can_be_read_without_pickle_trust(name: str) -> None:
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(layer, OptimConfig(name=name))  # type: ignore[arg-type]
    layer(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("kind,options,text", [
    (OptimConfig, {"name": "adm"}, "optim.name='adm' is wrong: choose one of sgd, adamw, lars"),
    (OptimConfig, {"lr": 0.0}, "optim.lr=0.0 is wrong: give a number above 0"),
    (OptimConfig, {"lr": math.nan}, "optim.lr=nan is wrong"),
    (OptimConfig, {"momentum": 1.0}, "optim.momentum=1.0 is wrong"),
    (OptimConfig, {"momentum": 0.0, "nesterov": True}, "Nesterov momentum needs"),
    (OptimConfig, {"betas": (0.9, 1.0)}, r"optim.betas=\(0.9, 1.0\) is wrong"),
    (LrConfig, {"scaling": "cubic"}, "lr.scaling='cubic' is wrong: choose one of none, linear"),
    (LrConfig, {"schedule": "step"}, "the step schedule needs at least one epoch"),
    (LrConfig, {"warmup_epochs": -1.0}, "lr.warmup_epochs=-1.0 is wrong"),
    (LrConfig, {"base_batch": 0}, "lr.base_batch=0 is wrong")])
def test_wrong_settings_are_one_line(kind: type, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        kind(**options)


def test_settings_that_do_not_fit_the_run_are_one_line() -> None:
    with pytest.raises(ValueError, match="lr.warmup_epochs=5 is wrong: give less than the 5 epoch"):
        rates(LrConfig(warmup_epochs=5))
    with pytest.raises(ValueError, match="lr.min_lr=0.5 is wrong: give at most the peak rate, 0.1"):
        rates(LrConfig(min_lr=0.5))
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        build_optimizer(nn.Flatten(), OptimConfig())
