"""What the variants train: a model by name and one batch of synthetic data on the device.

comm:25M is a model of pure communication: P float32 numbers in layers of about a million, whose
backward delivers preset gradients. It costs one multiplication per number and what sleeping is
asked for: ``compute_ms`` a step, a third of it over the layers of forward and two thirds over
those of backward. The CPU is idle meanwhile, as it is beside a GPU, so that communication can
overlap with computation as it does there. (Where there is a real GPU, the host sleeps too.)

Its loss for example n is linear, l_n = x_n + sum over layers of <h, w>, with h normal numbers of
the rank's own and standard deviation 0.001; the value is not computed beyond x_n = 0, the gradient
is: weighted losses sum_n a_n l_n give every layer the gradient (sum_n a_n) h.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvdnoise.per_example import check_model
from hvdnoise.training import models

NUM_CLASSES = 10
LAYER = 1_000_000  # numbers, about, of a layer of a comm model
LEAST_LAYERS = 4   # also of a small one, so that there is something to overlap
GRADIENT = 1e-3    # standard deviation of a comm model's gradients
_COMM = re.compile(r"comm:(\d+(?:\.\d+)?)([kM])")


@dataclass(frozen=True)
class Problem:
    """A model and one batch: (b, ...) inputs and (b,) classes, None for comm models."""

    new_model: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor | None

    def losses(self, model: nn.Module) -> Tensor:
        """(b,): the loss of each example."""
        outputs: Tensor = model(self.inputs)
        if self.targets is None:
            return outputs
        return cross_entropies(outputs, self.targets)

    def observe(self, optimizer: Any, model: nn.Module) -> None:
        """Show the examples to a noise that asks for them."""
        if self.targets is not None:
            optimizer.observe_examples(model, cross_entropies, self.inputs, self.targets)


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """(b,)"""
    return F.cross_entropy(outputs, targets, reduction="none")


def is_comm(name: str) -> bool:
    return name.startswith("comm:")


def numbers(name: str) -> int:
    """P of a comm model's name.

    Raises:
        ValueError: when it says no number of numbers.
    """
    found = _COMM.fullmatch(name)
    count = round(float(found[1]) * {"k": 1e3, "M": 1e6}[found[2]]) if found else 0
    if count < LEAST_LAYERS:
        raise ValueError(f"model {name!r} is wrong: give comm:25M for 25 million numbers, or "
                         "comm:500k for 500 thousand")
    return count


def check(name: str, image_size: int) -> None:
    """Raise a ValueError when there is no model of this name, or it cannot take such images."""
    if is_comm(name):
        numbers(name)
    else:
        models.build(name, NUM_CLASSES, (3, image_size, image_size))


def check_examples(name: str, image_size: int) -> None:
    """Raise a ValueError when the model's examples have no gradients of their own."""
    check_model(models.outline(name, NUM_CLASSES, (3, image_size, image_size)), [], {})


def make(name: str, *, batch_size: int, image_size: int, compute_seconds: float, seed: int,
         rank: int, device: torch.device) -> Problem:
    """The problem of a rank: weights equal on all ranks, data (or gradients) of its own."""
    own = torch.Generator().manual_seed(1_000_003 * (seed + 1) + rank)
    if is_comm(name):
        sizes = layer_sizes(numbers(name))
        gradient = (GRADIENT * torch.randn(max(sizes), generator=own)).to(device)
        build: Callable[[], nn.Module] = partial(CommModel, sizes, gradient, compute_seconds)
        inputs, targets = torch.zeros(batch_size, 1), None
    else:
        shape = (3, image_size, image_size)
        build = partial(models.build, name, NUM_CLASSES, shape)
        inputs = torch.randn(batch_size, *shape, generator=own)
        targets = torch.randint(NUM_CLASSES, (batch_size,), generator=own).to(device)

    def new_model() -> nn.Module:
        torch.manual_seed(seed)
        return build().to(device)
    return Problem(new_model, inputs.to(device), targets)


def layer_sizes(count: int) -> list[int]:
    """``count`` numbers in layers of about `LAYER`, as equal as can be."""
    layers = max(LEAST_LAYERS, round(count / LAYER))
    return [count // layers + (layer < count % layers) for layer in range(layers)]


class CommModel(nn.Module):
    """See the module. Forward: (b, 1) -> (b,) losses.

    Args:
        sizes: numbers of each layer.
        gradient: h; every layer takes as many of its first numbers as it has itself.
        compute_seconds: that forward and backward sleep together.
    """

    def __init__(self, sizes: list[int], gradient: Tensor, compute_seconds: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(0.01 * torch.randn(size)) for size in sizes)
        self.gradient = gradient  # no buffer: DistributedDataParallel makes those equal on all
        self.layer_seconds = compute_seconds / 3 / len(sizes)

    def forward(self, inputs: Tensor) -> Tensor:
        losses = inputs[:, 0]
        for weights in self.layers:
            losses = _Layer.apply(losses, weights, self.gradient[:weights.numel()],
                                  self.layer_seconds)
        return losses


class _Layer(torch.autograd.Function):
    """losses + <gradient, weights>, whose value is left out."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, weights: Tensor, gradient: Tensor, seconds: float
                ) -> Tensor:
        _sleep(seconds)
        ctx.gradient, ctx.seconds = gradient, seconds
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None, None]:
        _sleep(2 * ctx.seconds)
        return outer[0], ctx.gradient * outer[0].sum(), None, None


def _sleep(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)
