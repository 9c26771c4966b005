"""A variant ready to train: its model, its optimizer, and what one step of it is.

All use SGD with momentum 0.9 from the same weights on the same batch. What torch's
DistributedDataParallel does beside averaging gradients, making buffers equal in every step, is
switched off: the others do not do it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor, nn

from hvdnoise import comm
from hvdnoise.bench.config import BenchConfig
from hvdnoise.bench.models import Problem
from hvdnoise.bench.variants import Variant
from hvdnoise.buckets import default_layout
from hvdnoise.optimizer import DistributedOptimizer
from hvdnoise.plans import PLAIN
from hvdnoise.wrapping import Wrapper

MOMENTUM = 0.9


@dataclass
class Runner:
    """A variant at work."""

    variant: Variant
    model: nn.Module
    optimizer: Any
    step: Callable[[], Any]

    def facts(self, ranks: int, group_size: int) -> dict[str, Any]:
        """What it says of itself, and what the plan says of it. Bytes per step."""
        plan = getattr(self.optimizer, "exchange_plan", PLAIN.name)
        noise = getattr(self.optimizer, "noise", None)
        layout = default_layout(list(self.model.named_parameters()))
        summed = noise.statistics_bytes(layout) if noise is not None else 0
        return {"name": self.variant.name, "plan": plan,
                "reason": getattr(self.optimizer, "exchange_reason", ""),
                "noise_memory": getattr(self.optimizer, "noise_memory", None),
                "predicted_bytes": self.variant.predicted_bytes(plan, layout.numbers, ranks,
                                                                group_size, summed)}

    def wait(self) -> None:
        """See to it that what this rank has under way goes on to its end. Collective."""
        if isinstance(self.optimizer, Wrapper):
            self.optimizer.state_dict()  # which waits for what it holds


def flat_weights(model: nn.Module) -> Tensor:
    """(P,): a copy of all weights."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def build(variant: Variant, config: BenchConfig, problem: Problem, world: comm.World) -> Runner:
    """A new model and optimizer of this variant. Collective."""
    model = problem.new_model()
    makers = {"plain": _plain, "ddp": _ddp}
    optimizer, step = makers.get(variant.method, _noisy)(variant, model, config, problem, world)
    return Runner(variant, model, optimizer, step)


_Made = tuple[Any, Callable[[], Any]]


def _sgd(parameters: Any, config: BenchConfig) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=config.lr, momentum=MOMENTUM)


def _plain(variant: Variant, model: nn.Module, config: BenchConfig, problem: Problem,
           world: comm.World) -> _Made:
    optimizer = comm.horovod_optimizer(_sgd(model.parameters(), config), model.named_parameters())
    return optimizer, _ordinary(optimizer, lambda: problem.losses(model).mean())


def _noisy(variant: Variant, model: nn.Module, config: BenchConfig, problem: Problem,
           world: comm.World) -> _Made:
    optimizer = DistributedOptimizer(
        _sgd(model.parameters(), config), named_parameters=model.named_parameters(), world=world,
        noise=config.new_noise(variant, world.size), **variant.options(config.group_size))

    def loss() -> Tensor:
        problem.observe(optimizer, model)
        weighed: Tensor = optimizer.weigh(problem.losses(model))
        return weighed

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    if optimizer.noise is not None and optimizer.noise.lag == 0:
        return optimizer, lambda: optimizer.step(evaluate)
    return optimizer, _ordinary(optimizer, loss)


def _ddp(variant: Variant, model: nn.Module, config: BenchConfig, problem: Problem,
         world: comm.World) -> _Made:
    device = problem.inputs.device
    with warnings.catch_warnings():  # newer torch has another name for broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        parallel = nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False)
    optimizer = _sgd(model.parameters(), config)
    return optimizer, _ordinary(optimizer, lambda: problem.losses(parallel).mean())


def _ordinary(optimizer: Any, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return step
