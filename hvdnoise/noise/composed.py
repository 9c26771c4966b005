"""Several noises at once, each where it acts: ``noise=[GNC(...), CovarianceNoise(...)]``.

At most one acts on the weights, one by weights of workers or examples, one on the mean gradient,
and one by what it saw of the mean gradient, before anything was added. Each works as it would
alone and draws from its own streams, with its own seed. What one does is seen by the other where
it acts later: deviations are those of gradients at displaced weights, and of weighted losses.

Two things are refused. Weights of workers change the mean from which deviations are taken, so they
do not go with a noise that needs deviations. And two noises of a smaller batch would add its
missing variance twice.
"""

from __future__ import annotations

from typing import Any, Sequence

from hvdnoise.buckets import Layout
from hvdnoise.noise.base import (
    ExampleNoise,
    MeanNoise,
    MeanObservingNoise,
    Noise,
    WeightNoise,
    WorkerNoise,
    check_noise,
    part,
)
from hvdnoise.noise.emulated import EmulatedBatchNoise

PLACES: dict[str, tuple[type[Noise], ...]] = {
    "on the weights": (WeightNoise,),
    "by weights of workers or examples": (WorkerNoise, ExampleNoise),
    "on the mean gradient": (MeanNoise,),
    "by the mean gradient": (MeanObservingNoise,)}


class Composed(Noise):
    """Noises that act in different places (see the module).

    Args:
        parts: the noises.

    Raises:
        TypeError: for what is no noise.
        ValueError: for noises that do not go together.
    """

    def __init__(self, parts: Sequence[Noise]) -> None:
        for each in parts:
            check_noise(each)
        super().__init__(seed=parts[0].seed)
        self.parts = tuple(parts)
        self._check()
        weights = part(self, WeightNoise)
        self.rows = weights.rows if weights is not None else None
        self.lag = weights.lag if weights is not None else 1
        self.min_workers = max(each.min_workers for each in parts)

    def _check(self) -> None:
        for where, kinds in PLACES.items():
            here = [type(each).__name__ for each in self.parts if isinstance(each, kinds)]
            if len(here) > 1:
                raise ValueError(f"noise=[{', '.join(here)}]: both act {where}; give one of them")
        of_batch = [type(each).__name__ for each in self.parts
                    if isinstance(each, EmulatedBatchNoise)]
        if len(of_batch) > 1:
            raise ValueError(f"noise=[{', '.join(of_batch)}]: each adds what a batch of "
                             "emulated_batch= lacks; give one of them")
        worker = part(self, WorkerNoise)
        needs = [type(each).__name__ for each in self.parts if each.needs_deviations]
        if worker is not None and needs:
            raise ValueError(f"noise=[{type(worker).__name__}, {needs[0]}]: the first changes the "
                             "mean that the second takes its deviations from; take "
                             "source=\"examples\", or \"diagonal\", \"layerwise\" or \"isotropic\"")

    @property
    def needs_deviations(self) -> bool:
        return any(each.needs_deviations for each in self.parts)

    @property
    def sees_examples(self) -> bool:
        return any(each.sees_examples for each in self.parts)

    def statistics_bytes(self, layout: Layout) -> int:
        return sum(each.statistics_bytes(layout) for each in self.parts)

    def describe(self) -> dict[str, Any]:
        return {type(each).__name__: each.describe() for each in self.parts}


def compose(noise: Noise | Sequence[Noise] | None) -> Noise | None:
    """One noise of what ``noise=`` may be: a noise, several, or none.

    Raises:
        TypeError: for what is no noise.
        ValueError: for noises that do not go together.
    """
    if isinstance(noise, (list, tuple)):
        noise = Composed(noise) if len(noise) > 1 else noise[0] if noise else None
    check_noise(noise)
    return noise  # type: ignore[return-value]
