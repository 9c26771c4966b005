"""A loss on some images that are spread over the ranks: values, gradients, curvature.

The loss is the mean cross-entropy of the images as they are stored: no augmentation, no label
smoothing, no weight decay. The model is in evaluation mode, so BatchNorm uses its running
statistics, dropout is off, and the loss is a fixed function of the weights with a Hessian H.

Position p of the images belongs to rank p mod R. Each rank sums over its own images and an
allreduce adds the ranks up, so results are equal on all ranks, and for any number of ranks they
agree to rounding. All methods but `weights` are collective. The model's own weights are never
written: displaced ones stand in for them during a call (`torch.func.functional_call`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvdnoise import streams
from hvdnoise.comm import World
from hvdnoise.training.images import Images


@dataclass(frozen=True)
class Share:
    """What a rank holds of the images.

    Args:
        images: (n, C, H, W) float32 or float64, of positions rank, rank + R, rank + 2 R, ...
        labels: (n,) int64.
        count: N, images of all ranks together.
    """

    images: Tensor
    labels: Tensor
    count: int


def draw(images: Images, most: int, seed: int, part: str, world: World, device: torch.device, *,
         batch_size: int) -> Share:
    """This rank's share of ``most`` images, or of all where there are fewer. Not collective.

    Args:
        images: a data set; the chosen ones depend on its length, ``seed`` and ``part`` alone.
        part: "train" or "test".
        batch_size: how many to read at a time.
    """
    order = torch.randperm(len(images), generator=streams.generator(seed, "measure.images", part))
    chosen = order[:most]
    own = chosen[world.rank::world.size].tolist()
    parts = [images.batch(own[start:start + batch_size], None)
             for start in range(0, len(own), batch_size)]
    if not parts:  # more ranks than images: a blank one gives the shape
        blank, label = images.batch([0], None)
        parts = [(blank[:0], label[:0])]
    return Share(torch.cat([part[0] for part in parts]).to(device),
                 torch.cat([part[1] for part in parts]).to(device), len(chosen))


class Problem:
    """The mean loss of a model on images, as a function of its P trainable weights.

    Vectors of weights are flat, (P,), in the order of ``model.parameters()``, with the weights'
    dtype and device.

    Args:
        model: put into evaluation mode.
        share: this rank's images.
        batch_size: images at a time.
    """

    def __init__(self, model: nn.Module, share: Share, world: World, *, batch_size: int) -> None:
        self.model, self.share, self.world = model.eval(), share, world
        self._batch_size = batch_size
        named = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.names, self.parameters = list(named), list(named.values())
        self.size = sum(each.numel() for each in self.parameters)

    @property
    def count(self) -> int:
        """N, images of all ranks together."""
        return self.share.count

    def weights(self) -> Tensor:
        """A copy of the weights, (P,)."""
        return _flat([each.detach() for each in self.parameters]).clone()

    def split(self, vector_P: Tensor) -> list[Tensor]:
        """Views of a flat vector in the shapes of the parameters."""
        parts = vector_P.split([each.numel() for each in self.parameters])
        return [part.view_as(each) for part, each in zip(parts, self.parameters)]

    def gradient(self, start: int, stop: int) -> Tensor:
        """Mean gradient (P,) of the images at positions ``start`` .. ``stop`` - 1."""
        total_P = torch.zeros_like(self.weights())
        for images, labels in self._batches(start, stop):
            total_P += _flat(self._gradients(images, labels, graph=False))
        self.world.allreduce_(total_P, name="measure.gradient", op="sum").wait()
        return total_P.div_(stop - start)

    def products(self, vectors_KP: Tensor) -> Tensor:
        """H times each of K vectors, (K, P).

        The gradient's graph is made once for each batch of images and used for all vectors.
        """
        total_KP = torch.zeros_like(vectors_KP)
        for images, labels in self._batches(0, self.count):
            gradients = self._gradients(images, labels, graph=True)
            moving = [each.requires_grad for each in gradients]
            for total_P, vector_P in zip(total_KP, vectors_KP):
                given = [part for part, moves in zip(self.split(vector_P), moving) if moves]
                total_P += _flat(torch.autograd.grad(
                    [each for each in gradients if each.requires_grad], self.parameters, given,
                    retain_graph=True, materialize_grads=True))
        self.world.allreduce_(total_KP, name="measure.products", op="sum").wait()
        return total_KP.div_(self.count)

    def scores(self, points: Iterable[Tensor]) -> list[tuple[float, float]]:
        """(mean loss, accuracy in 0 .. 1) with each of the weights (P,) in ``points``."""
        sums = torch.stack([self._sums(point_P) for point_P in points])
        self.world.allreduce_(sums, name="measure.scores", op="sum").wait()
        return [(loss / self.count, correct / self.count) for loss, correct in sums.tolist()]

    @torch.no_grad()
    def _sums(self, point_P: Tensor) -> Tensor:
        """[loss, correct] summed over this rank's images, float64 on the CPU."""
        weights = dict(zip(self.names, self.split(point_P)))
        found = torch.zeros(2, dtype=torch.float64, device=point_P.device)
        for images, labels in self._batches(0, self.count):
            logits = torch.func.functional_call(self.model, weights, (images,))
            found[0] += F.cross_entropy(logits, labels, reduction="none").double().sum()
            found[1] += (logits.argmax(1) == labels).sum()
        return found.cpu()

    def _gradients(self, images: Tensor, labels: Tensor, *, graph: bool) -> Sequence[Tensor]:
        loss = F.cross_entropy(self.model(images), labels, reduction="sum")
        return torch.autograd.grad(loss, self.parameters, create_graph=graph,
                                   materialize_grads=True)

    def _batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's images among the positions ``start`` .. ``stop`` - 1."""
        rank, ranks = self.world.rank, self.world.size
        first, last = (-((rank - position) // ranks) for position in (start, stop))
        for begin in range(first, last, self._batch_size):
            end = min(begin + self._batch_size, last)
            yield self.share.images[begin:end], self.share.labels[begin:end]


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
