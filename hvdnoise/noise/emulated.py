"""What the noises that emulate a smaller batch share: the variance that the large batch lacks.

A mean over B = W b examples has covariance C/B; one over M examples has C/M. The noise adds the
difference, (1/M - 1/B) times a structure S of C (one example's covariance).
"""

from __future__ import annotations

import warnings

from hvdnoise.noise.base import Noise, StepContext


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
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)
                                      or value < 1):
                raise ValueError(f"{name}={value!r} must be an integer >= 1")
        self.emulated_batch = emulated_batch
        self.batch_size = batch_size
        self._warned = False

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
        if self.emulated_batch > total and not self._warned:
            self._warned = True
            warnings.warn(f"step {context.step} has {total:g} examples, fewer than "
                          f"emulated_batch={self.emulated_batch}: no noise in this and such steps",
                          stacklevel=2)
        return max(0.0, 1 / self.emulated_batch - 1 / total)
