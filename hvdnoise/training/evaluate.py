"""Evaluation by all ranks together: every test example counts exactly once.

Replicas have the same parameters, but buffers such as BatchNorm's running statistics are each
rank's own: they average what that rank's examples gave. What is evaluated, and saved as the final
weights, is the model with the mean of those buffers over the ranks; the rank's own come back
afterwards, so that evaluating does not change training by a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvdnoise.comm import World


@dataclass(frozen=True)
class Score:
    """Mean loss per example, accuracy in 0 .. 1, and how many examples they are from."""

    loss: float
    accuracy: float
    count: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], world: World,
             device: torch.device) -> Score:
    """Score this rank's ``batches``, and add up over the ranks. Collective.

    Args:
        model: put into evaluation mode for the time, in full precision.
        batches: (images, labels) of this rank; ranks may have unequal numbers of them.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)  # correct, all
    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = model(images).float()
        loss += F.cross_entropy(logits, labels, reduction="none").double().sum()
        counts[0] += (logits.argmax(1) == labels).sum()
        counts[1] += len(labels)
    model.train(was_training)
    total = world.allreduce_(loss.cpu(), name="evaluate.loss", op="sum").wait().item()
    correct, count = world.allreduce_(counts.cpu(), name="evaluate.counts", op="sum"
                                      ).wait().tolist()
    return Score(total / max(count, 1), correct / max(count, 1), count)


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
