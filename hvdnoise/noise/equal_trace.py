"""What the noises on the mean gradient share: a structure that can be scaled to a given trace.

Structures differ in shape and in size. With equal traces their noise has equal variance, and the
structure is the only difference between two runs. The trace of the noise's covariance is
(1/M - 1/B) times that of the structure S, which is one of

    "own"            as the structure is defined
    a number         tr S, at every step
    "matched:full"   tr C^ = b/(W-1) sum_j |d_j|^2, that of full noise from the workers, of the
                     last step that was observed (from the examples: sum_n |g_n|^2 / B); also
                     "matched:isotropic" and "matched:layerwise", which have the same trace

Idea: Wen et al. 2020, arXiv:1902.08234 (what matters is the structure, not the variance alone).
"""

from __future__ import annotations

import math

from hvdnoise.noise.base import MeanNoise, Observation, ObservingNoise, StepContext
from hvdnoise.noise.emulated import EmulatedBatchNoise

OF_THE_STEP = ("full", "isotropic", "layerwise")  # whose trace is tr C^


class EqualTraceNoise(EmulatedBatchNoise, MeanNoise, ObservingNoise):
    """Base of the covariance noises on the mean gradient.

    The other arguments are those of `EmulatedBatchNoise`.

    Args:
        trace: of one example's covariance, as the noise has it: "own", a number >= 0, or
            "matched:STRUCTURE" for that of full, isotropic or layerwise noise.
    """

    min_workers = 2

    def __init__(self, emulated_batch: int, *, trace: float | str = "own",
                 batch_size: int | None = None, seed: int = 0) -> None:
        super().__init__(emulated_batch, batch_size=batch_size, seed=seed)
        names = ("own", *(f"matched:{structure}" for structure in OF_THE_STEP))
        number = isinstance(trace, (int, float)) and not isinstance(trace, bool)
        if not (trace in names or number and 0 <= trace < math.inf):  # type: ignore[operator]
            raise ValueError(f"trace={trace!r} must be a number >= 0 or one of {', '.join(names)}")
        self.trace = trace

    def estimate(self, observation: Observation, context: StepContext) -> float:
        """What sums of squares are multiplied by to be the (co)variance of one example.

        b/(W-1) for the deviations of workers, 1/B for the gradients of B examples, not centred.
        """
        if self.sees_examples:
            return 1 / observation.examples
        return self.examples(context) / (context.num_workers - 1)

    def scaled(self, own: float, of_step: float) -> float:
        """The factor of S.

        Args:
            own: tr S as the structure is defined.
            of_step: tr C^.
        """
        if self.trace == "own":
            return 1.0
        wanted = of_step if isinstance(self.trace, str) else float(self.trace)
        return wanted / own if own > 0 else 0.0
