"""Full covariance of the examples' gradients, by one weight an example (identity I2).

    example n's loss times 1 + sqrt((B-M)/M) xi_n,  xi_n ~ N(0, 1)
    Cov(nu) = (B-M)/(B M) (1/B) sum_n g_n g_n'      (uncentred: the empirical Fisher)

with B examples in all and M the emulated batch. Where it acts: the weight of an example's loss,
so forward must give per-example losses: ``loss = optimizer.weigh(losses)`` stands in the loop
instead of their mean. The xi of an example depend on the worker and the step, whichever rank the
worker lives on. Bytes on the wire: none beside the allreduce.

Idea: Wen et al. 2020, arXiv:1902.08234. Formula: derived for this project.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvdnoise import streams
from hvdnoise.noise.base import ExampleNoise, StepContext
from hvdnoise.noise.emulated import WeightedSample


class FullExampleCovariance(WeightedSample, ExampleNoise):
    """Noise with the second moment of the examples' gradients (see the module)."""

    def example_weights(self, worker: int, part: int, count: int, context: StepContext) -> Tensor:
        xi = streams.normal(count, self.seed, "full-examples", context.step, worker, part,
                            dtype=torch.float64)
        return 1 + self.weight_deviation(context) * xi  # sqrt((B-M)/M)
