"""What a noise learns from a step: collected while the step is exchanged, used `lag` steps later.

A `Sighting` belongs to one exchange, and owns its rows. The exchange fills it: rows (deviations or
mixtures) and local statistics of each bucket; `share` sums the statistics over the ranks, in one
allreduce, and `settle` waits for whatever is still on its way. A `History` keeps the sightings of
the last `lag` steps that were taken, and is what a checkpoint holds of a noise. An exchange that no
step uses leaves it as it was.
"""

from __future__ import annotations

from collections import deque
from functools import cached_property
from typing import Any, Callable, Mapping, Sequence

import torch
from torch import Tensor

from hvdnoise.buckets import Bucket, Layout, layout_of
from hvdnoise.comm import Handle, World
from hvdnoise.noise.base import Noise, Observation, Situation


class Sighting:
    """An `Observation` in the making.

    Args:
        now: of the step; its ``examples_per_worker`` is not known yet.
        scale: tells the factor of the loss, by which everything is divided.
    """

    def __init__(self, noise: Noise, now: Situation, layout: Layout, scale: Callable[[], float]
                 ) -> None:
        self.noise, self.now = noise, now
        self.seen = Observation(layout, {}, {}, 0.0)
        self.settlers: list[Callable[[], None]] = []  # called once, before anybody looks
        self._tell_scale = scale
        self._weights: dict[tuple[range, range], Tensor] = {}
        self._told: dict[int, Tensor] = {}
        self._sharing: Handle | None = None
        self._shapes: dict[int, int] = {}

    @cached_property
    def _scale(self) -> float:
        """The factor of the loss, asked for once: a GradScaler's waits for its GPU."""
        return self._tell_scale()

    def rows(self, bucket: Bucket) -> Tensor:
        """(V, N): the rows of a bucket, made when first asked for."""
        if bucket.index not in self.seen.rows:
            self.seen.rows[bucket.index] = torch.empty(
                len(self.now.workers), bucket.size, dtype=bucket.dtype, device=bucket.device)
        return self.seen.rows[bucket.index]

    @property
    def memory(self) -> int:
        """Bytes of the rows."""
        return sum(rows.nbytes for rows in self.seen.rows.values())

    def observe(self, bucket: Bucket, start: int, deviations_Kn: Tensor) -> None:
        """Take in the deviations, as they come, of some workers in a part of a bucket."""
        unscaled = deviations_Kn / self._scale if self._scale != 1 else deviations_Kn
        told = self.noise.observe(bucket, start, unscaled, self.now)
        before = self._told.get(bucket.index)
        self._told[bucket.index] = told if before is None else before + told

    def mixing_weights(self, workers: range, peers: range) -> Tensor:
        """(workers, peers) on the CPU, for gradients as they come; the same for every bucket."""
        key = workers, peers
        if key not in self._weights:
            self._weights[key] = self.noise.mixing_weights(*key, self.now) / self._scale
        return self._weights[key]

    def unscale_(self, rows_VN: Tensor) -> None:
        """Divide rows by the factor of the loss."""
        if self._scale != 1:
            rows_VN.div_(self._scale)

    def share(self, world: World, name: str, examples: float) -> None:
        """Start to add up the statistics of all ranks, and this rank's ``examples``."""
        if not self.noise.observes:
            return
        empty = torch.zeros(1, 0)
        buckets = self.seen.layout.buckets
        for bucket in buckets:  # ranks whose part of a bucket is empty have told nothing
            if bucket.index not in self._told:
                self.observe(bucket, 0, empty)
        told = [self._told[bucket.index].cpu() for bucket in buckets]
        self._shapes = {bucket.index: len(each) for bucket, each in zip(buckets, told)}
        told.append(torch.tensor([examples], dtype=torch.float64))
        self._sharing = world.allreduce_(torch.cat(told), name=name, op="sum")

    def done(self) -> bool:
        """Whether the statistics are there."""
        return self._sharing is None or self._sharing.done()

    def settle(self) -> Observation:
        """What was seen, complete."""
        for settle in self.settlers:
            settle()
        self.settlers.clear()
        if self._sharing is not None:
            *parts, examples = self._sharing.wait().split([*self._shapes.values(), 1])
            self.seen.statistics = dict(zip(self._shapes, parts))
            self.seen.examples = float(examples)
            self._sharing = None
        if self.noise.displaces_by is None:
            self.seen.rows.clear()
        return self.seen


class History:
    """The sightings of the last ``lag`` steps that were taken, and of the one under way."""

    def __init__(self, lag: int) -> None:
        self.new: Sighting | None = None
        self._kept: deque[Sighting] = deque(maxlen=max(1, lag))

    @property
    def due(self) -> Sighting | None:
        """Of ``lag`` steps ago, if there was one."""
        return self._kept[0] if len(self._kept) == self._kept.maxlen else None

    @property
    def memory(self) -> int:
        """Bytes of all rows."""
        return sum(each.memory for each in (*self._kept, self.new) if each is not None)

    def commit(self) -> None:
        """The step under way was taken."""
        if self.new is not None:
            self._kept.append(self.new)
        self.new = None

    def forget(self) -> None:
        """The next step is as the first."""
        self.new = None
        self._kept.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """Of the steps that were taken; waits for what is on its way."""
        copies = []
        for sighting in self._kept:
            seen = sighting.settle()
            copies.append({"workers": sighting.now.num_workers,
                           "names": [list(bucket.names) for bucket in seen.layout.buckets],
                           "sizes": [list(bucket.sizes) for bucket in seen.layout.buckets],
                           "rows": {i: rows.clone() for i, rows in seen.rows.items()},
                           "statistics": {i: s.clone() for i, s in seen.statistics.items()}})
        return copies

    def load_state_dict(self, state: Sequence[dict[str, Any]], noise: Noise, now: Situation,
                        layout: Layout, parameters: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Args:
            layout: of now.
            parameters: by name, which the state's buckets hold.

        Raises:
            ValueError: for a state of other parameters, workers or another noise.
        """
        self.forget()
        for each in state:
            then = layout_of(each.get("names", [[""]]), parameters)
            if then is None or not _alike(each, then, noise, now) or (
                    _names(then) == _names(layout) and then.digest != layout.digest):
                self.forget()
                raise ValueError("the loaded deviations are of other buckets, workers or another "
                                 "noise: resume with the same bucket_bytes, ranks, virtual_workers "
                                 "and noise, or drop \"hvdnoise\" from the optimizer's state to "
                                 "start the noise anew")
            sighting = Sighting(noise, now, then, lambda: 1.0)
            rows = {i: row.to(then.buckets[i].device) for i, row in each["rows"].items()}
            sighting.seen = Observation(then, rows, dict(each["statistics"]), 0.0)
            self._kept.append(sighting)


def _names(layout: Layout) -> set[str]:
    return {name for bucket in layout.buckets for name in bucket.names}


def _alike(state: dict[str, Any], layout: Layout, noise: Noise, now: Situation) -> bool:
    """Whether a state is of this layout, noise and number of workers."""
    rows, statistics, buckets = state["rows"], state["statistics"], range(len(layout.buckets))
    return (state["sizes"] == [list(bucket.sizes) for bucket in layout.buckets]
            and state["workers"] == now.num_workers
            and all(len(row) == len(now.workers) for row in rows.values())
            and (sorted(rows) == list(buckets)) == (noise.displaces_by is not None)
            and (sorted(statistics) == list(buckets)) == noise.observes)
