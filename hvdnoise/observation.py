"""What a noise learns from a step: collected while the step is exchanged, used `lag` steps later.

A `Sighting` belongs to one step. The exchange fills it: rows (deviations or mixtures) and local
statistics of each bucket; `share` sums the statistics over the ranks, in one allreduce, and
`settle` waits for whatever is still on its way. A `History` keeps the sightings of the last `lag`
steps that were taken, and is what a checkpoint holds of a noise.
"""

from __future__ import annotations

from collections import deque
from functools import cached_property
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from hvdnoise.buckets import Bucket, Layout
from hvdnoise.comm import Handle, World
from hvdnoise.noise.base import Noise, Observation, Situation


class Sighting:
    """An `Observation` in the making.

    Args:
        scale: tells the factor of the loss, by which everything is divided.
    """

    def __init__(self, noise: Noise, now: Situation, scale: Callable[[], float]) -> None:
        self.noise, self.now = noise, now
        self.seen = Observation({}, {}, {})
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

    def keep(self, bucket: Bucket, rows_VN: Tensor | None) -> None:
        """Remember a bucket, and its rows where the noise displaces by them."""
        self.seen.sizes[bucket.index] = bucket.size
        if rows_VN is not None and self.noise.displaces_by is not None:
            self.seen.rows[bucket.index] = rows_VN

    def unscale_(self, rows_VN: Tensor) -> None:
        """Divide rows by the factor of the loss."""
        if self._scale != 1:
            rows_VN.div_(self._scale)

    def share(self, world: World, layout: Layout, name: str) -> None:
        """Start to add up the statistics of all ranks."""
        if not self.noise.observes:
            return
        empty = torch.zeros(1, 0)
        for bucket in layout.buckets:  # ranks whose part of a bucket is empty have told nothing
            if bucket.index not in self._told:
                self.observe(bucket, 0, empty)
        told = [self._told[bucket.index].cpu() for bucket in layout.buckets]
        self._shapes = {bucket.index: len(each) for bucket, each in zip(layout.buckets, told)}
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
            parts = self._sharing.wait().split(list(self._shapes.values()))
            self.seen.statistics = dict(zip(self._shapes, parts))
            self._sharing = None
        return self.seen


class History:
    """The sightings of the last ``lag`` steps, and of the one under way."""

    def __init__(self, lag: int) -> None:
        self.new: Sighting | None = None
        self._kept: deque[Sighting] = deque(maxlen=max(1, lag))

    @property
    def due(self) -> Sighting | None:
        """Of ``lag`` steps ago, if there was one."""
        return self._kept[0] if len(self._kept) == self._kept.maxlen else None

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
            copies.append({"workers": sighting.now.num_workers, "sizes": dict(seen.sizes),
                           "rows": {i: rows.clone() for i, rows in seen.rows.items()},
                           "statistics": {i: s.clone() for i, s in seen.statistics.items()}})
        return copies

    def load_state_dict(self, state: Sequence[dict[str, Any]], noise: Noise, now: Situation,
                        layout: Layout) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: for a state of other buckets, workers or another noise.
        """
        self.forget()
        for each in state:
            rows, statistics = each["rows"], each["statistics"]
            sizes = {bucket.index: bucket.size for bucket in layout.buckets}
            alike = (each["sizes"] == sizes and each["workers"] == now.num_workers
                     and all(len(row) == len(now.workers) for row in rows.values())
                     and (rows.keys() == sizes.keys()) == (noise.displaces_by is not None)
                     and (statistics.keys() == sizes.keys()) == noise.observes)
            if not alike:
                self.forget()
                raise ValueError("the loaded deviations are of other buckets, workers or another "
                                 "noise: resume with the same bucket_bytes, ranks, virtual_workers "
                                 "and noise, or drop \"hvdnoise\" from the optimizer's state to "
                                 "start the noise anew")
            sighting = Sighting(noise, now, lambda: 1.0)
            devices = {bucket.index: bucket.device for bucket in layout.buckets}
            sighting.seen = Observation(
                dict(sizes), {i: row.to(devices[i]) for i, row in rows.items()}, dict(statistics))
            self._kept.append(sighting)
