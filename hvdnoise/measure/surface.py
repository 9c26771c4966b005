"""The loss on a line and a plane through the weights, and accuracy under noise on the weights.

All three go by filters: the part of a weight that makes one output (one index 0 of a weight with
two dimensions or more). Weights with fewer dimensions, such as biases and the scales of norms, stay
as they are.

- A direction is drawn from normal numbers, and each filter of it is scaled to the length of the
  same filter of the weights (Li et al. 2018, arXiv:1712.09913). So distance 1 changes every filter
  by its own length, and networks that compute the same at another scale look the same.
- Noise of level s on a filter w of n numbers is s |w| / sqrt(n) times standard normal numbers:
  its root mean square length is s |w|.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hvdnoise import streams
from hvdnoise.measure.problem import Problem
from hvdnoise.measure.spectrum import standard_error


def direction(problem: Problem, seed: int, which: int) -> Tensor:
    """A filter-normalized random direction, (P,). Not collective; equal on all ranks."""
    def normalized(weight: Tensor, draw: Tensor) -> Tensor:
        return draw * (_lengths(weight) / _lengths(draw).clamp_min(1e-30))
    return _by_filter(problem, normalized, seed, "measure.direction", which)


def noise(problem: Problem, seed: int, number: int) -> Tensor:
    """Noise of level 1, (P,). Not collective; equal on all ranks."""
    def scaled(weight: Tensor, draw: Tensor) -> Tensor:
        return draw * (_lengths(weight) / weight[0].numel() ** 0.5)
    return _by_filter(problem, scaled, seed, "measure.noise", number)


def _by_filter(problem: Problem, scale: Callable[[Tensor, Tensor], Tensor], seed: int, what: str,
               number: int) -> Tensor:
    parts = []
    for index, parameter in enumerate(problem.parameters):
        weight = parameter.detach()
        if weight.ndim < 2 or weight.numel() == 0:
            parts.append(torch.zeros_like(weight).reshape(-1))
            continue
        draw = streams.normal(tuple(weight.shape), seed, what, number, index).to(weight)
        parts.append(scale(weight, draw).reshape(-1))
    return torch.cat(parts)


def _lengths(weight: Tensor) -> Tensor:
    """Of the filters, with as many dimensions as ``weight``."""
    return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))


def steps(points: int, distance: float) -> list[float]:
    """``points`` (odd) equal steps from -distance to distance, exactly 0 in the middle."""
    half = points // 2
    return [distance * (i - half) / half for i in range(points)]


def line(problem: Problem, points: int, distance: float, seed: int) -> dict[str, Any] | None:
    """Loss and accuracy along one direction; None without points. Collective."""
    if points == 0:
        return None
    weights_P, along_P = problem.weights(), direction(problem, seed, 0)
    at = steps(points, distance)
    scores = problem.scores(weights_P + x * along_P for x in at)
    return {"at": at, "loss": [loss for loss, _ in scores],
            "accuracy": [accuracy for _, accuracy in scores]}


def plane(problem: Problem, points: int, distance: float, seed: int) -> dict[str, Any] | None:
    """Loss and accuracy on ``points`` x ``points``; the first direction is the line's. Collective.

    Returns:
        ``loss[i][j]`` is that at ``at[j]`` along the first direction and ``at[i]`` along the
        second. None without points.
    """
    if points == 0:
        return None
    weights_P = problem.weights()
    first_P, second_P = (direction(problem, seed, which) for which in (0, 1))
    at = steps(points, distance)
    scores = problem.scores(weights_P + x * first_P + y * second_P for y in at for x in at)
    rows = [scores[begin:begin + points] for begin in range(0, len(scores), points)]
    return {"at": at, "loss": [[loss for loss, _ in row] for row in rows],
            "accuracy": [[accuracy for _, accuracy in row] for row in rows]}


def under_noise(problem: Problem, levels: tuple[float, ...], draws: int, seed: int
                ) -> list[dict[str, Any]]:
    """Loss and accuracy with noise on the weights: by level, mean over the draws. Collective.

    The draws are the same at all levels, but for their size. Standard errors are over the draws,
    and None for a single one.
    """
    if not levels:
        return []
    weights_P = problem.weights()

    def points() -> Iterator[Tensor]:
        for number in range(draws):
            noise_P = noise(problem, seed, number)
            yield from (weights_P + level * noise_P for level in levels)

    scores = problem.scores(points())
    found = []
    for index, level in enumerate(levels):
        losses, accuracies = (list(each) for each in zip(*scores[index::len(levels)]))
        found.append({"level": level, "accuracy": sum(accuracies) / draws,
                      "accuracy_error": standard_error(accuracies), "accuracies": accuracies,
                      "loss": sum(losses) / draws, "loss_error": standard_error(losses)})
    return found
