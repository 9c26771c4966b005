"""A noise of each of the other kinds, and one that observes nothing; as small as they can be."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from hvdnoise import register_noise, streams
from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import (
    ExampleNoise,
    MeanNoise,
    MixingNoise,
    Observation,
    ObservingNoise,
    Statistics,
    StepContext,
    WeightNoise,
    WorkerNoise,
)


@register_noise("one-worker-example")
class OneWorker(WorkerNoise):
    """Only one worker's gradient counts, a random one in each step."""

    def worker_weights(self, context: StepContext) -> Tensor:
        W = context.num_workers
        chosen = streams.normal(W, self.seed, "one-worker", context.step).argmax()
        return W * torch.nn.functional.one_hot(chosen, W).double()


@register_noise("half-example")
class HalfTheExamples(ExampleNoise):
    """The examples at even places count, or those at odd places, by a coin for each worker."""

    def example_weights(self, worker: int, part: int, count: int, context: StepContext) -> Tensor:
        coin = streams.normal(1, self.seed, "half", context.step, worker, part) > 0
        return 2.0 * (torch.arange(count) % 2 == int(coin)).double()


@register_noise("uphill-example")
class Uphill(WeightNoise, ObservingNoise):
    """Each worker's weights are moved by its own deviation, in proportion to all deviations.

    Args:
        size: of the displacement.
        seed: not used.
    """

    rows = "deviations"
    statistics = Statistics(per_bucket=1)
    min_workers = 2

    def __init__(self, size: float, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.size = size

    def observe(self, bucket: Bucket, start: int, deviations_Kn: Tensor, out: Tensor,
                context: StepContext) -> None:
        out += deviations_Kn.double().abs().sum()

    def displacement(self, bucket: Bucket, v: int, clean: Sequence[Tensor],
                     learning_rates: Sequence[float | None], observation: Observation,
                     context: StepContext) -> tuple[Tensor, list[float]]:
        total = sum(float(each) for each in observation.statistics.values())
        return observation.rows[bucket.index][v], [self.size / total] * len(clean)


@register_noise("neighbour-example")
class Neighbour(MixingNoise):
    """Each worker's weights are moved by the deviation of the next worker.

    Args:
        size: the factor of the deviation.
        seed: not used.
    """

    rows = "mixtures"
    min_workers = 2

    def __init__(self, size: float, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.size = size

    def mixing_weights(self, workers: Sequence[int], peers: Sequence[int], context: StepContext
                       ) -> Tensor:
        following = torch.tensor([peers[(peers.index(worker) + 1) % len(peers)]
                                  for worker in workers])
        weights = (following[:, None] == torch.tensor(list(peers))).double()
        return weights - weights.mean(dim=1, keepdim=True)

    def displacement(self, bucket: Bucket, v: int, clean: Sequence[Tensor],
                     learning_rates: Sequence[float | None], observation: Observation,
                     context: StepContext) -> tuple[Tensor, list[float]]:
        return observation.rows[bucket.index][v], [self.size] * len(clean)


@register_noise("white-example")
class White(MeanNoise):
    """White noise on the mean gradient, whatever the gradients are.

    Args:
        size: its standard deviation for one example a step.
        seed: the same on all ranks.
    """

    def __init__(self, size: float, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.size = size

    def mean_noise(self, bucket: Bucket, observation: Observation, context: StepContext) -> Tensor:
        noise_N = streams.normal(bucket.size, self.seed, "white", context.step, bucket.index,
                                 device=bucket.device, dtype=bucket.dtype)
        return noise_N.mul_(self.size / observation.examples ** 0.5)
