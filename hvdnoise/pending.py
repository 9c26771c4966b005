"""What a noise learns from a step, while the step is exchanged.

A `PendingObservation` belongs to one exchange and owns its rows. The tasks of the exchange fill it
with rows (gradients, deviations or mixtures) and statistics. `start_sharing` sums the statistics
over the ranks; `finish` takes the sums. What was saved of one in a checkpoint comes back by
`restore`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Callable, Mapping

import torch
from torch import Tensor

from hvdnoise.buckets import Bucket, Layout, layout_of
from hvdnoise.noise.base import (
    MixingNoise,
    Noise,
    Observation,
    ObservingNoise,
    StepContext,
    check_returned,
)
from hvdnoise.world import Handle, World


class PendingObservation(Observation):
    """An `Observation` in the making.

    Args:
        context: of the step; its ``examples_per_worker`` is not known yet.
        loss_scale: tells the factor of the loss, by which everything is divided.
        stays: the pass is there to be observed by each rank alone; nobody uses its mean.
        statistics: of this rank's examples, which are filled until the exchange begins.
    """

    def __init__(self, noise: Noise, context: StepContext, layout: Layout,
                 loss_scale: Callable[[], float], *, stays: bool = False,
                 statistics: dict[int, Tensor] | None = None) -> None:
        super().__init__(layout, {}, {} if statistics is None else statistics, 0.0)
        self.noise, self.context, self.stays = noise, context, stays
        self.observes = noise.statistics is not None
        self._loss_scale = loss_scale
        self._weights: dict[tuple[range, range], Tensor] = {}
        self.beside: PendingObservation | None = None  # of another noise, of the same deviations
        self._sums: Handle | None = None
        self._elementwise: list[Handle] = []

    @cached_property
    def _scale(self) -> float:
        """The factor of the loss, asked for once: a GradScaler's waits for its GPU."""
        return self._loss_scale()

    def rows_of(self, bucket: Bucket) -> Tensor:
        """(V, N): the rows of a bucket, made when first asked for."""
        if bucket.index not in self.rows:
            self.rows[bucket.index] = torch.empty(len(self.context.workers), bucket.size,
                                                  dtype=bucket.dtype, device=bucket.device)
        return self.rows[bucket.index]

    def each(self) -> tuple[PendingObservation, ...]:
        """This one, and those beside it."""
        return (self,) if self.beside is None else (self, *self.beside.each())

    @property
    def tensors(self) -> list[Tensor]:
        """Rows and statistics."""
        return [*self.rows.values(),
                *(sums for each in self.each() for sums in each.statistics.values())]

    @property
    def needs_deviations(self) -> bool:
        """Whether the workers' rows are wanted."""
        return any(each.noise.needs_deviations for each in self.each())

    @property
    def sums_deviations(self) -> bool:
        """Whether statistics of the deviations are wanted."""
        return any(each._sums_deviations for each in self.each())

    @property
    def _sums_deviations(self) -> bool:
        return self.observes and not self.noise.sees_examples

    def observe(self, bucket: Bucket, start: int, deviations_Kn: Tensor) -> None:
        """Take in the deviations, as they come, of some workers in a part of a bucket."""
        unscaled = deviations_Kn / self._scale if self._scale != 1 else deviations_Kn
        for each in self.each():
            if each._sums_deviations:
                each._take_in(bucket, start, unscaled)

    def _take_in(self, bucket: Bucket, start: int, deviations_Kn: Tensor) -> None:
        assert isinstance(self.noise, ObservingNoise)
        out = self._statistics_of(bucket)
        if self._is_elementwise:
            out = out[start:start + deviations_Kn.shape[1]]
        self.noise.observe(bucket, start, deviations_Kn, out, self.context)

    @property
    def _is_elementwise(self) -> bool:
        return self.noise.statistics is not None and self.noise.statistics.elementwise

    def _statistics_of(self, bucket: Bucket) -> Tensor:
        assert self.noise.statistics is not None
        if bucket.index not in self.statistics:
            self.statistics[bucket.index] = self.noise.statistics.new(bucket)
        return self.statistics[bucket.index]

    def mixing_weights(self, workers: range, peers: range) -> Tensor:
        """(workers, peers) on the CPU, for gradients as they come; the same for every bucket."""
        assert isinstance(self.noise, MixingNoise)
        key = workers, peers
        if key not in self._weights:
            weights = self.noise.mixing_weights(*key, self.context)
            check_returned(self.noise, "mixing_weights", weights, (len(workers), len(peers)))
            if weights.sum(dim=1).abs().max() > 1e-6 * (1 + weights.abs().max()):
                raise ValueError(f"{type(self.noise).__name__}.mixing_weights: a row does not add "
                                 "up to 0; subtract its mean")
            self._weights[key] = weights / self._scale
        return self._weights[key]

    def unscale_(self, rows_VN: Tensor) -> None:
        """Divide rows by the factor of the loss."""
        if self._scale != 1:
            rows_VN.div_(self._scale)

    # ------------------------------------------------------------------ sums over the ranks

    def share_bucket(self, bucket: Bucket, world: World, name: str) -> None:
        """All parts of a bucket were observed: start to sum statistics as large as the bucket."""
        if self._is_elementwise:
            self._elementwise.append(world.allreduce_(self._statistics_of(bucket), name=name,
                                                      op="sum"))
        if self.beside is not None:
            self.beside.share_bucket(bucket, world, f"{name}.beside")

    def start_sharing(self, world: World, name: str, examples: float) -> None:
        """Start to sum the other statistics, and this rank's ``examples``."""
        if self.beside is not None:
            self.beside.start_sharing(world, f"{name}.beside", examples)
        if not self.observes:
            return
        sums = [] if self._is_elementwise else [
            self._statistics_of(bucket).cpu() for bucket in self.layout.buckets]
        sums.append(torch.tensor([examples], dtype=torch.float64))
        self._sums = world.allreduce_(torch.cat(sums), name=name, op="sum")

    def done(self) -> bool:
        """Whether all sums are there."""
        handles = [handle for each in self.each() for handle in (*each._elementwise, each._sums)]
        return all(handle.done() for handle in handles if handle is not None)

    def finish(self) -> None:
        """Wait for the sums; the observation is complete, but for mixtures on their way."""
        self.finish_beside()
        self.wait_for_elementwise()
        if self._sums is not None:
            sums, self._sums = self._sums.wait(), None
            if not self._is_elementwise:
                sizes = [len(self._statistics_of(bucket)) for bucket in self.layout.buckets]
                *parts, sums = sums.split([*sizes, 1])
                self.statistics = dict(enumerate(parts))
            self.examples = float(sums)
        if self.noise.rows is None:
            self.rows.clear()

    def finish_beside(self) -> None:
        """Complete the observation beside this one, which is of the step's own mean."""
        if self.beside is not None:
            self.beside.finish()

    def wait_for_elementwise(self) -> None:
        """Wait for the sums that `share_bucket` has started."""
        for each in self.each():
            for handle in each._elementwise:
                handle.wait()
            each._elementwise.clear()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Of a complete observation."""
        return {"workers": self.context.num_workers,
                "names": [list(bucket.names) for bucket in self.layout.buckets],
                "sizes": [list(bucket.sizes) for bucket in self.layout.buckets],
                "rows": {i: rows.clone() for i, rows in self.rows.items()},
                "statistics": {i: sums.clone() for i, sums in self.statistics.items()}}

    @classmethod
    def restore(cls, state: Mapping[str, Any], noise: Noise, context: StepContext, layout: Layout,
                parameters: Mapping[str, Tensor]) -> PendingObservation | None:
        """What `state_dict` gave; None where it is of other parameters, workers or another noise.

        Args:
            layout: of now.
            parameters: by name, which the state's buckets hold.
        """
        then = layout_of(state.get("names", [[""]]), parameters)
        if then is None or not _alike(state, then, noise, context) or (
                _names(then) == _names(layout) and then.digest != layout.digest):
            return None
        restored = cls(noise, context, then, lambda: 1.0)
        restored.rows = {i: row.to(then.buckets[i].device) for i, row in state["rows"].items()}
        restored.statistics = dict(state["statistics"])
        return restored


def _names(layout: Layout) -> set[str]:
    return {name for bucket in layout.buckets for name in bucket.names}


def _alike(state: Mapping[str, Any], layout: Layout, noise: Noise, context: StepContext) -> bool:
    """Whether a state is of this layout, noise and number of workers."""
    rows, statistics, buckets = state["rows"], state["statistics"], range(len(layout.buckets))
    return (state["sizes"] == [list(bucket.sizes) for bucket in layout.buckets]
            and state["workers"] == context.num_workers
            and all(len(row) == len(context.workers) for row in rows.values())
            and (sorted(rows) == list(buckets)) == (noise.rows is not None)
            and (sorted(statistics) == list(buckets)) == (noise.statistics is not None)
            and all(noise.statistics is not None and sums.shape == noise.statistics.new(
                layout.buckets[index], "meta").shape for index, sums in statistics.items()))
