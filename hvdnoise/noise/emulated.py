"""What the noises that emulate a smaller batch share: the variance that the large batch lacks.

A mean over B = W b examples has covariance C/B; one over M examples has C/M. The noise adds the
difference, (1/M - 1/B) times a structure S of C (one example's covariance).
"""

from __future__ import annotations

import math
import warnings

from hvdnoise.noise.base import Noise, StepContext, WeightingNoise, check_count

MOST_DEVIATION = 2.0  # of weights, without a warning


class EmulatedBatchNoise(Noise):
    """Base of the covariance noises.

    Args:
        emulated_batch: M, 1 <= M <= B: the batch whose noise the step shall have.
        batch_size: b, examples per worker and step; default: as seen in the forward pass (the
            leading dimension of the model's first tensor).
        seed: of the noise's streams; the same on all ranks.
    """

    def __init__(self, emulated_batch: int, *, batch_size: int | None = None,
                 seed: int = 0) -> None:
        super().__init__(seed=seed)
        for name, value in (("emulated_batch", emulated_batch), ("batch_size", batch_size)):
            if value is not None:
                check_count(name, value)
        self.emulated_batch = emulated_batch
        self.batch_size = batch_size
        self._warned: set[str] = set()

    def examples(self, context: StepContext) -> float:
        """b, given or seen."""
        examples = self.batch_size or context.examples_per_worker
        if not examples > 0:
            raise ValueError("covariance noise does not know how many examples a worker has: pass "
                             "batch_size= (per worker)")
        return examples

    def missing_variance(self, context: StepContext) -> float:
        """1/M - 1/B; a batch of fewer than M examples lacks none."""
        total = self.examples(context) * context.num_workers
        if self.emulated_batch > total and self.batch_size:
            raise ValueError(f"emulated_batch={self.emulated_batch} is larger than the batch of "
                             f"{total} ({context.num_workers} workers of {self.batch_size}): noise "
                             "can only emulate a smaller batch")
        if self.emulated_batch > total:
            self._warn("small", f"step {context.step} has {total:g} examples, fewer than "
                       f"emulated_batch={self.emulated_batch}: no noise in this and such steps")
        return max(0.0, 1 / self.emulated_batch - 1 / total)

    def _warn(self, of: str, text: str) -> None:
        """Once."""
        if of not in self._warned:
            self._warned.add(of)
            warnings.warn(text, stacklevel=2)


class WeightedSample(EmulatedBatchNoise, WeightingNoise):
    """Base of the noises that are a sample by normal weights 1 + sqrt(B/M - 1) z (I1, I2)."""

    def weight_deviation(self, context: StepContext) -> float:
        """sqrt(B/M - 1). A negative weight gives its gradient the wrong sign."""
        total = self.examples(context) * context.num_workers
        deviation = math.sqrt(self.missing_variance(context) * total)
        if deviation > MOST_DEVIATION:
            wrong = math.erfc(1 / deviation / math.sqrt(2)) / 2
            self._warn("deviation", (
                f"emulated_batch={self.emulated_batch} in a batch of {total:g} gives weights with "
                f"a standard deviation of {deviation:.1f}, so that {wrong:.0%} of the gradients "
                f"enter with the wrong sign: from emulated_batch={math.ceil(total / 5)} on it is "
                f"at most {MOST_DEVIATION:g}, and structure=\"diagonal\" has no weights"))
        return deviation
