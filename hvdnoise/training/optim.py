"""Optimizers and learning-rate schedules by name.

The learning rate at optimizer step t (counted from 0) of T, with T_w warm-up steps, is

    peak = lr * s,   s = 1, B / base_batch or sqrt(B / base_batch)   ("none", "linear", "sqrt")
    t < T_w:  lr(t) = peak (t + 1) / T_w
    else, with u = (t - T_w) / (T - T_w), at most 1:
      constant:    lr(t) = peak
      cosine:      lr(t) = min_lr + (peak - min_lr) (1 + cos(pi u)) / 2
      polynomial:  lr(t) = min_lr + (peak - min_lr) (1 - u)^power
      step:        lr(t) = max(min_lr, peak gamma^(milestones passed by t))

where B is the batch of all workers together. One LambdaLR over a pure function of t: its state is
the step count, and a resumed run has the same rates bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer.

    Args:
        name: sgd and adamw are torch's; lars (You et al. 2017) and lamb (You et al. 2020) are
            pytorch_optimizer's.
        lr: learning rate at `LrConfig.base_batch` examples per step.
        momentum: of sgd and lars.
        nesterov: Nesterov momentum, of sgd and lars.
        weight_decay: coefficient; decoupled from the gradient in adamw, inside the trust ratio in
            lars and lamb.
        decay_norm_and_bias: whether weight decay also acts on parameters of at most one dimension
            (biases, normalisation); lars never lets it.
        betas: decay rates of the moments, of adamw and lamb.
        eps: added to the denominator, of adamw and lamb; default 1e-8 and 1e-6.
        trust_coefficient: of lars.

    Raises:
        ValueError: at construction, for a value out of range.
    """

    name: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | None = None
    trust_coefficient: float = 1e-3

    def __post_init__(self) -> None:
        _require(self.name in _BUILDERS, "optim.name", self.name,
                 f"choose one of {', '.join(_BUILDERS)}")
        _require(0 < self.lr < math.inf, "optim.lr", self.lr, "give a number above 0")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "give 0 <= m < 1")
        _require(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay,
                 "give 0 or more")
        _require(len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
                 "optim.betas", self.betas, "give two numbers, 0 <= beta < 1")
        _require(self.eps is None or 0 < self.eps < math.inf, "optim.eps", self.eps,
                 "give a number above 0")
        _require(0 < self.trust_coefficient < math.inf, "optim.trust_coefficient",
                 self.trust_coefficient, "give a number above 0")
        _require(not self.nesterov or self.momentum > 0, "optim.nesterov", self.nesterov,
                 "Nesterov momentum needs optim.momentum above 0")


@dataclass(frozen=True)
class LrConfig:
    """How the learning rate depends on the batch and on the step; see the module's formulas.

    Args:
        scaling: of the peak rate with the batch of all workers.
        base_batch: the batch for which `OptimConfig.lr` is meant.
        warmup_epochs: linear warm-up from near 0; may be a fraction.
        schedule: what follows the warm-up.
        milestones: epochs after which the step schedule multiplies by gamma.
        gamma: factor of the step schedule.
        power: exponent of the polynomial schedule.
        min_lr: where cosine and polynomial end, and the least of step.

    Raises:
        ValueError: at construction, for a value out of range.
    """

    scaling: Literal["none", "linear", "sqrt"] = "none"
    base_batch: int = 256
    warmup_epochs: float = 0.0
    schedule: Literal["constant", "cosine", "step", "polynomial"] = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    power: float = 2.0
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        _require(self.scaling in _SCALINGS, "lr.scaling", self.scaling,
                 f"choose one of {', '.join(_SCALINGS)}")
        _require(self.schedule in _SHAPES, "lr.schedule", self.schedule,
                 f"choose one of {', '.join(_SHAPES)}")
        _require(self.base_batch >= 1, "lr.base_batch", self.base_batch, "give 1 or more")
        _require(0 <= self.warmup_epochs < math.inf, "lr.warmup_epochs", self.warmup_epochs,
                 "give 0 or more epochs")
        _require(all(0 < each < math.inf for each in self.milestones), "lr.milestones",
                 self.milestones, "give epochs above 0")
        _require(bool(self.milestones) or self.schedule != "step", "lr.milestones",
                 self.milestones, "the step schedule needs at least one epoch")
        _require(0 < self.gamma <= 1, "lr.gamma", self.gamma, "give 0 < gamma <= 1")
        _require(0 < self.power < math.inf, "lr.power", self.power, "give a number above 0")
        _require(0 <= self.min_lr < math.inf, "lr.min_lr", self.min_lr, "give 0 or more")


def _require(right: bool, name: str, value: Any, remedy: str) -> None:
    if not right:
        raise ValueError(f"{name}={value!r} is wrong: {remedy}")


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer of all parameters that require a gradient, at the rate ``config.lr``.

    It has one parameter group, or, without weight decay on norms and biases, a second one for
    parameters of at most one dimension. LARS overwrites p.grad in its step.

    Raises:
        ValueError: when the model has nothing to train.
    """
    parameters = [each for each in model.parameters() if each.requires_grad]
    if not parameters:
        raise ValueError("the model has no parameter that requires a gradient: unfreeze some")
    decayed = [each for each in parameters if config.decay_norm_and_bias or each.ndim > 1]
    rest = [each for each in parameters if not config.decay_norm_and_bias and each.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay},
              {"params": rest, "weight_decay": 0.0}]
    return _BUILDERS[config.name]([group for group in groups if group["params"]], config)


def _sgd(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps or 1e-8)


def _lars(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    from pytorch_optimizer import LARS
    optimizer: Optimizer = LARS(groups, lr=config.lr, momentum=config.momentum,
                                nesterov=config.nesterov,
                                trust_coefficient=config.trust_coefficient)
    return optimizer


def _lamb(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    from pytorch_optimizer import Lamb

    # The paper's algorithm (version 3) takes two options. Not decoupled: the decay is added to the
    # update whose norm is in the trust ratio. adam_debias: else the library divides the rate by
    # 1 - beta1^t, so that the first step is ten times too long.
    optimizer: Optimizer = Lamb(groups, lr=config.lr, betas=config.betas, eps=config.eps or 1e-6,
                                weight_decouple=False, adam_debias=True)
    return optimizer


_BUILDERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], Optimizer]] = {
    "sgd": _sgd, "adamw": _adamw, "lars": _lars, "lamb": _lamb}
NEEDS = {"lars": ("pytorch_optimizer",), "lamb": ("pytorch_optimizer",)}  # see `extras.PACKAGES`
_SCALINGS = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}  # exponent of B / base_batch


def peak_rate(lr: float, config: LrConfig, total_batch: int) -> float:
    """The learning rate after warm-up, for ``total_batch`` examples of all workers per step."""
    return float(lr * (total_batch / config.base_batch) ** _SCALINGS[config.scaling])


def rate(step: int, peak: float, config: LrConfig, *, steps_per_epoch: int,
         epochs: float) -> float:
    """The learning rate at a step, counted from 0: the module's formulas."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    total = round(epochs * steps_per_epoch)
    fraction = min(1.0, (step - warmup) / max(1, total - warmup))
    return _SHAPES[config.schedule](peak, config, fraction, step / steps_per_epoch)


def _constant(peak: float, config: LrConfig, fraction: float, epoch: float) -> float:
    return peak


def _cosine(peak: float, config: LrConfig, fraction: float, epoch: float) -> float:
    return config.min_lr + (peak - config.min_lr) * (1 + math.cos(math.pi * fraction)) / 2


def _polynomial(peak: float, config: LrConfig, fraction: float, epoch: float) -> float:
    return config.min_lr + (peak - config.min_lr) * float((1 - fraction) ** config.power)


def _step(peak: float, config: LrConfig, fraction: float, epoch: float) -> float:
    passed = sum(milestone <= epoch for milestone in config.milestones)
    return max(config.min_lr, peak * config.gamma ** passed)


_SHAPES: dict[str, Callable[[float, LrConfig, float, float], float]] = {
    "constant": _constant, "cosine": _cosine, "step": _step, "polynomial": _polynomial}


def build_schedule(optimizer: Optimizer, config: LrConfig, total_batch: int, steps_per_epoch: int,
                   epochs: float) -> LRScheduler:
    """The schedule, to be stepped once after each optimizer step; it sets every group's rate.

    To resume, build optimizer and schedule as for a new run, then load the state of both.

    Args:
        optimizer: new, of `build_optimizer`, or the DistributedOptimizer around it.
        config: the settings.
        total_batch: examples of all workers together per optimizer step.
        steps_per_epoch: optimizer steps.
        epochs: of the whole run.

    Raises:
        ValueError: when warm-up fills the run, or min_lr is above the peak rate.
    """
    lr = float(optimizer.param_groups[0]["lr"])
    peak = peak_rate(lr, config, total_batch)
    _require(config.warmup_epochs == 0 or config.warmup_epochs < epochs, "lr.warmup_epochs",
             config.warmup_epochs, f"give less than the {epochs:g} epochs of the run")
    _require(config.min_lr <= peak, "lr.min_lr", config.min_lr,
             f"give at most the peak rate, {peak:g}")
    return LambdaLR(optimizer, lambda step: rate(
        step, peak, config, steps_per_epoch=steps_per_epoch, epochs=epochs) / lr)
