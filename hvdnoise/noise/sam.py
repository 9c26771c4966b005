"""Sharpness-aware minimization, each worker by its own gradient: a baseline, no method of hvdnoise.

    delta_i = rho g_i / |g_i|      the norm is over all parameters; |g_i| = 0: no displacement
    rho     radius, or share * |theta| (hvdnoise.noise.scale)

    lag 0   g_i of a first pass over the same batch at theta: SAM, m-SAM in its worker-wise form
    lag 1   g_i of the step before, at the weights where the worker stood then: stale SAM
    echo    for batches that are drawn twice in a row: g_i of the batch's first pass, which is an
            ordinary step at theta; displaced in its second pass. An idea of this project,
            experimental

Where it acts: the weights of a worker, before forward; ranks differ on purpose. Bytes on the wire:
none; the first pass of lag 0 stays on its rank, so ``p.grad`` is the rank's own gradient after it.
Memory: V rows of P for each step of lag and one more; P for the displaced weights.

Idea: Foret et al. 2020, arXiv:2010.01412; by workers: arXiv:2302.09693; with the gradient of the
step before: arXiv:2503.11147.
"""

from __future__ import annotations

from typing import Sequence

from torch import Tensor

from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import Observation, Schedule, StepContext
from hvdnoise.noise.scale import SizedNoise


class SAM(SizedNoise):
    """Baseline SAM: each worker's gradient at weights moved along its own gradient.

    Args:
        radius, share: rho, the length of the displacement, in the units of the weights or as a
            share of their norm; one of the two, a number >= 0 or a function of the step.
        lag: 0, the gradient of a first pass over the same batch, at the price of a second: then
            the optimizer needs step(closure); 1, of the step before, at no extra pass.
        echo: experimental; for batches that are drawn twice in a row: displace in the second pass
            only, by the gradient of the first, without step(closure) (see ``optimizer.repeated``).
        seed: not used.

    Raises:
        ValueError: for a value outside these.
    """

    rows = "gradients"

    def __init__(self, radius: Schedule | None = None, *, share: Schedule | None = None,
                 lag: int = 0, echo: bool = False, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if lag not in (0, 1) or isinstance(lag, bool):
            raise ValueError(f"lag={lag!r} must be 0 or 1")
        if not isinstance(echo, bool):
            raise ValueError(f"echo={echo!r} must be True or False")
        if echo and lag:
            raise ValueError(f"echo=True does not go with lag={lag}: its gradients are of the same "
                             "batch; leave lag out")
        self.take_scale(radius=radius, share=share)
        self.lag, self.echo = int(echo or lag), echo

    def displacement(self, bucket: Bucket, v: int, clean: Sequence[Tensor],
                     learning_rates: Sequence[float | None], observation: Observation,
                     context: StepContext) -> tuple[Tensor, list[float]]:
        norm = observation.row_norm(v)
        factor = self.length(observation, context) / norm if norm > 0 else 0.0
        return observation.rows[bucket.index][v], [factor] * len(clean)


class StaleSAM(SAM):
    """Baseline stale SAM: as SAM, with each worker's gradient of the step before and no extra pass.

    Args:
        radius, share: rho, as for SAM.
        seed: not used.
    """

    def __init__(self, radius: Schedule | None = None, *, share: Schedule | None = None,
                 seed: int = 0) -> None:
        super().__init__(radius, share=share, lag=1, seed=seed)
