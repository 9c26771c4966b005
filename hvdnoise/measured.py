"""What a step's gradients and noise are like in norms: ``optimizer.measured``.

The scale of a noise is told in three units. On the weights, with the displacements delta_i of the
W workers and theta, the clean weights that the noise displaces:

    noise_radius        sqrt(mean_i |delta_i|^2), in the units of the weights
    noise_share         noise_radius / |theta|
    noise_lr_multiple   noise_radius / sqrt(mean_i |alpha u_i|^2): multiples of what the learning
                        rate makes of that along which the weights are displaced

u_i is what the noise says (`WeightNoise.along`): of GNC the deviation d_i, the mixture or white
noise as long as these, so that GNC(lr=k) has k; of SAM the gradient g_i; of momentum SAM v. Where
nothing is displaced in the step, there is no scale.

Noise nu that is added to the mean gradient moves the weights as alpha nu does:

    noise_radius        |alpha nu|
    noise_share         noise_radius / |theta|, of all weights
    noise_lr_multiple   |nu| / sqrt(mean_i |d_i|^2), of the step's own deviations d_i

alpha is the learning rate of each parameter's group; clipping, momentum and what else an optimizer
makes of a gradient do not count. Of noises that act by weights of workers or examples nothing is
known. Of several noises at once it is the scale of the one on the weights, if there is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hvdnoise.buckets import Bucket, Layout
from hvdnoise.mixing import square, square_sum
from hvdnoise.noise.base import Observation, length_of, square_norms
from hvdnoise.weight_noise import Displacements, Rates
from hvdnoise.world import World

Scale = tuple[float | None, float | None, float | None]  # radius, share, multiple
UNKNOWN: Scale = (None, None, None)


@dataclass(frozen=True)
class Measured:
    """Squared norms of one step, equal on all ranks, in units of the unscaled loss.

    The last three are explained above; None where they are not known.
    """

    worker_square_norm: float  # mean over the workers of |g_i|^2
    gradient_square_norm: float  # |g|^2 of the gradient that the update uses, noise included
    mean_square_norm: float  # the same before a noise on the mean was added
    # of the displacements over all workers, or of the noise on the mean; None for the noises that
    # act through weights of workers or examples, whose noise is never formed
    noise_rms: float | None
    weight_deviation: float | None = None  # of weights of workers or examples, where it is known
    noise_radius: float | None = None
    noise_share: float | None = None
    noise_lr_multiple: float | None = None


class Measurement:
    """What is measured in the course of one step, on this rank."""

    def __init__(self) -> None:
        self._own: list[Tensor] = []  # |g_i|^2 of each parameter
        self._mean: float | None = None  # |mean|^2 before noise was added
        self._added: list[tuple[Bucket, Tensor]] = []  # |nu|^2 of each parameter

    def worker(self, grad: Tensor) -> None:
        """A worker's gradient of one parameter."""
        self._own.append(square_sum(grad))

    def mean(self, flats: list[Tensor]) -> None:
        """The mean gradient before noise is added to it."""
        self._mean = sum(map(square, flats))

    def added(self, bucket: Bucket, noise_N: Tensor) -> None:
        """What is added to the mean gradient, without the loss scale."""
        self._added.append((bucket, square_norms(noise_N[None], bucket, 0)))

    def finish(self, flats: list[Tensor], layout: Layout, weights: Displacements | None,
               due: Observation | None, rates: Rates, world: World, *, workers: int,
               loss_scale: float, name: str, known: bool, weight_deviation: float | None
               ) -> Measured:
        """The step's norms. Collective.

        Args:
            flats: the gradient that the update uses.
            weights: of a noise on the weights.
            due: by which the weights are displaced in this step, if they are.
            workers: V.
            known: whether the noise, if there is one, is formed at all.
        """
        added = sum(float(squares_T.sum()) for _, squares_T in self._added)
        squares, along = (added * workers, 0.0) if weights is None else weights.measured()
        theta = 0.0
        if weights is not None and due is not None:
            theta = due.weight_norm(weights.noise)
        elif self._added:
            theta = length_of(layout)
        mine = torch.tensor([sum(map(float, self._own)) / loss_scale ** 2, squares, along, theta],
                            dtype=torch.float64)
        worker, noise, along, theta = (world.allreduce_(mine, name=name).wait()
                                       / torch.tensor([workers] * 3 + [1])).tolist()
        total = sum(map(square, flats)) / loss_scale ** 2
        mean = total if self._mean is None else self._mean / loss_scale ** 2
        if weights is not None:
            scale = _scale(math.sqrt(noise), theta, along) if due else UNKNOWN
        else:
            scale = self._scale_of_added(added, rates(), theta, worker - mean)
        return Measured(worker, total, mean, math.sqrt(noise) if known else None,
                        weight_deviation, *scale)

    def _scale_of_added(self, added: float, rates: dict[Tensor, float | None], theta: float,
                        deviation: float) -> Scale:
        """``deviation``: mean_i |d_i|^2."""
        if not self._added:
            return UNKNOWN
        moved = 0.0
        for bucket, squares_T in self._added:
            for p, each in zip(bucket.parameters, squares_T.tolist()):
                rate = rates.get(p)
                moved += (math.nan if rate is None else float(rate)) ** 2 * each
        radius, share, _ = _scale(math.sqrt(moved), theta, 0.0)
        return radius, share, math.sqrt(added / deviation) if deviation > 0 else None


def _scale(radius: float, theta: float, along: float) -> Scale:
    """A radius in the three units; ``along``: the mean of |alpha u_i|^2, nan where unknown."""
    if math.isnan(radius):
        return UNKNOWN
    return (radius, radius / theta if theta > 0 else None,
            radius / math.sqrt(along) if along > 0 else None)
