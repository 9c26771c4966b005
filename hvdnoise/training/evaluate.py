"""Evaluation by all ranks together: every test example counts exactly once.

Replicas have the same parameters, but buffers such as BatchNorm's running statistics are each
rank's own: they average what that rank's examples gave. What is evaluated, and saved as the final
weights, is the model with the mean of those buffers over the ranks; the rank's own come back
afterwards, so that evaluating does not change training by a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvdnoise import watchdog
from hvdnoise.comm import World


@dataclass(frozen=True)
class Score:
    """Mean loss per example, accuracy in 0 .. 1, and how many examples they are from."""

    loss: float
    accuracy: float
    count: int


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], world: World,
             device: torch.device) -> Score:
    """Score this rank's ``batches``, and add up over the ranks. Collective.

    Args:
        model: put into evaluation mode for the time, in full precision.
        batches: (images, labels) of this rank; ranks may have unequal numbers of them.
    """
    (score,) = evaluate_all([model], batches, world, device)
    return score


@watchdog.phase("evaluation")
@torch.no_grad()
def evaluate_all(models: Sequence[nn.Module], batches: Iterable[tuple[Tensor, Tensor]],
                 world: World, device: torch.device) -> list[Score]:
    """As `evaluate`, of several models that share no module, reading each batch once."""
    were_training = [model.training for model in models]
    for model in models:
        model.eval()
    losses = torch.zeros(len(models), dtype=torch.float64, device=device)
    counts = torch.zeros(len(models) + 1, dtype=torch.int64, device=device)  # correct; examples
    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        for place, model in enumerate(models):
            logits = model(images).float()
            losses[place] += F.cross_entropy(logits, labels, reduction="none").double().sum()
            counts[place] += (logits.argmax(1) == labels).sum()
        counts[-1] += len(labels)
    for model, was_training in zip(models, were_training):
        model.train(was_training)
    totals = world.allreduce_(losses.cpu(), name="evaluate.loss", op="sum").wait().tolist()
    *correct, count = world.allreduce_(counts.cpu(), name="evaluate.counts", op="sum"
                                       ).wait().tolist()
    return [Score(total / max(count, 1), right / max(count, 1), count)
            for total, right in zip(totals, correct)]


def own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What may differ between replicas: copies of the buffers in the model's state."""
    buffers = {name for name, _ in model.named_buffers()}
    return {name: value.clone() for name, value in model.state_dict().items() if name in buffers}


def mean_buffers(model: nn.Module, world: World) -> dict[str, Tensor]:
    """The buffers averaged over the ranks (floating point), or rank 0's (other). Collective."""
    buffers = {name: buffer.cpu() for name, buffer in sorted(own_buffers(model).items())}
    handles = [world.allreduce_(buffer, name=f"buffers.{name}", op="average")
               if buffer.is_floating_point() else
               world.broadcast_(buffer, root=0, name=f"buffers.{name}")
               for name, buffer in buffers.items()]
    return {name: handle.wait() for name, handle in zip(buffers, handles)}


def set_buffers(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Write ``values`` into the model's buffers."""
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in values.items():
            buffers[name].copy_(value)


@contextmanager
def common_buffers(model: nn.Module, world: World) -> Iterator[None]:
    """The model has the mean buffers inside, and this rank's own afterwards. Collective."""
    before = own_buffers(model)
    set_buffers(model, mean_buffers(model, world))
    try:
        yield
    finally:
        set_buffers(model, before)
