"""A bucket's task, and the order in which tasks go on.

A `BucketTask` is one bucket in one step: what has been captured of it, and its way through the
schedule of its plan (`hvdnoise.plans`). The `ExchangeScheduler` takes the tasks on. Tasks end, and
are waited for, in the order of their buckets on every rank, so no two ranks wait for each other.
Storage for gathered rows is bounded: a task that takes some starts only when fewer than
``lookahead`` earlier ones are under way.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from hvdnoise.buckets import Bucket
from hvdnoise.exchange_plan import ExchangePlan
from hvdnoise.mixing import Buffers, Wire, chunks, copy_into
from hvdnoise.pending import PendingObservation
from hvdnoise.plans import PLAIN
from hvdnoise.world import Handle, World


@dataclass(frozen=True)
class Options:
    """How the reduction is done: Horovod's arguments of the same names, and the plan.

    Attributes:
        plan: of mixtures, where the noise mixes.
        keep_rows: whether the noise wants more of the gradients than that they be averaged.
        lag: how many steps mixtures and statistics may take.
        precision: of mixtures on the wire.
        peers: the ranks among which rows are gathered; default all.
    """

    op: str = "average"
    compression: Any = None
    gradient_predivide_factor: float = 1.0
    sparse_as_dense: bool = False
    keep_rows: bool = False
    lag: int = 1
    plan: ExchangePlan = PLAIN
    precision: str = "fp32"
    peers: World | None = None


class BucketTask:
    """One bucket in one step.

    Args:
        reduced: (N,), where the mean gradient is to be. It holds this rank's share of it (one
            worker's gradient, or the sum of V workers' over V), unless the rows are enough.
        views: its parts, one a parameter.
        name: of its allreduce; ``turn`` is appended for all that may take several steps.
        pending: what to observe and mix; None: the mean is all.

    Attributes:
        missing: parameters of the bucket, by number, that are not captured yet in this pass.
        ready: all is captured; the task may start, in its turn.
        held: it is not to go beyond its mean yet.
    """

    def __init__(self, bucket: Bucket, reduced: Tensor, views: list[Tensor], *, world: World,
                 options: Options, buffers: Buffers, plan: ExchangePlan, name: str, turn: int,
                 pending: PendingObservation | None) -> None:
        self.bucket, self.reduced, self.views, self.pending = bucket, reduced, views, pending
        self.world, self.peers = world, options.peers or world
        self.name, self.late = f"{name}.{turn}", options.lag > 1
        self.wire = Wire(options.precision, bucket.dtype)
        self.missing: set[int] = set()
        self.ready = self.started = self.has_mean = self.over = False
        self.held = self.late
        self.waits_for: Handle | None = None
        self.takes_storage = plan.takes_storage
        self.schedule = plan.schedule(self)
        self.give = buffers.give
        self._options, self._buffers, self._reduction = options, buffers, name
        self._context: Any = None  # of the compression

    # ------------------------------------------------------------------ what schedules use

    @property
    def rows(self) -> Tensor:
        """(V, N): this rank's workers' gradients; later what the noise keeps of them."""
        return self._observation.rows_of(self.bucket)

    @property
    def _observation(self) -> PendingObservation:
        assert self.pending is not None
        return self.pending

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A buffer of undefined numbers; `give` gives it back."""
        return self._buffers.take(shape, dtype, self.bucket.device)

    def workers(self, world: World, of: int | None = None) -> range:
        """The workers of all ranks of ``world``, or of one of them."""
        V, own = len(self.rows), self._observation.context.workers
        first = own.start - world.rank * V  # where this world begins
        if of is None:
            return range(first, first + world.size * V)
        return range(first + of * V, first + (of + 1) * V)

    def mixing_weights(self, world: World, workers: range) -> Tensor:
        """(workers, all workers of ``world``): the factors of the gradients in the mixtures."""
        return self._observation.mixing_weights(workers, self.workers(world))

    def start_allreduce(self) -> Handle:
        """The allreduce of ``reduced``, with Horovod's options."""
        options, flat = self._options, self.reduced
        if options.compression is not None:
            flat, self._context = options.compression.compress(flat)
        wire = flat.float() if flat.dtype == torch.bfloat16 else flat  # Horovod has no bfloat16
        factor = options.gradient_predivide_factor if options.op == "average" else 1.0
        return self.world.allreduce_(wire, name=self._reduction, op=options.op,
                                     prescale=1 / factor, postscale=factor)

    def finish_allreduce(self, result: Tensor) -> None:
        """Put its result in its place."""
        if self._options.compression is not None:
            result = self._options.compression.decompress(result, self._context)
        copy_into(self.reduced, result)

    @property
    def observes(self) -> bool:
        """Whether the noise wants to observe."""
        return self.pending is not None and self.pending.sums_deviations

    def observe_part(self, start: int, deviations_Kn: Tensor) -> None:
        """Show the noise a part of the bucket."""
        self._observation.observe(self.bucket, start, deviations_Kn)

    def observe(self, *, keep: bool) -> None:
        """Show the noise the deviations of the rows; with ``keep`` the rows become them."""
        if not (keep or self.observes):
            return
        for part in chunks(self.rows):
            x_Vn = self.rows[:, part]
            x_Vn = torch.sub(x_Vn, self.reduced[part], out=x_Vn if keep else None)
            if self.observes:
                self.observe_part(part.start, x_Vn)

    def keep_rows(self) -> None:
        """The rows become what the noise keeps of them without the rows of others."""
        if self.pending is not None and self.pending.needs_deviations:
            self.observe(keep=self.pending.noise.rows != "gradients")
            self.pending.unscale_(self.rows)

    def reach_mean(self) -> None:
        """The mean is in its place, and the noise has observed."""
        self.has_mean = True
        if self.pending is not None:
            self.pending.share_bucket(self.bucket, self.world, f"{self.name}.statistics")


class ExchangeScheduler:
    """Takes the tasks of a step and, with lag 2, of the one before, through their schedules.

    Args:
        lookahead: how many tasks may hold storage at a time.
        poll: tells what to call while waiting; see `Handle.wait`.

    Attributes:
        seconds: spent waiting, ever.
    """

    def __init__(self, lookahead: int, poll: Callable[[], Callable[[], None] | None]) -> None:
        self.seconds = 0.0
        self._lookahead, self._poll = lookahead, poll
        self._tasks: deque[BucketTask] = deque()  # in the order of their buckets, older first

    def add(self, tasks: Sequence[BucketTask]) -> None:
        """The tasks of a new step; those that are over go, and those that will never be ready."""
        self._tasks = deque(task for task in self._tasks if task.ready and not task.over)
        self._tasks.extend(tasks)

    def advance(self) -> None:
        """Take every task that is ready as far as it goes without waiting."""
        for task in self._tasks:
            while task.ready and not task.over and self._resume(task, wait=False):
                pass

    def wait_for_mean(self, task: BucketTask) -> None:
        """Wait until the bucket's mean is in its place."""
        while not task.has_mean:
            if not self._resume(task, wait=True):
                self._finish_first()  # which gives its storage back

    def release(self, tasks: Sequence[BucketTask]) -> None:
        """All means are there: let the tasks go beyond them."""
        for task in tasks:
            task.held = False
        self.advance()

    def wait(self, tasks: Sequence[BucketTask]) -> None:
        """Wait until these tasks, and earlier ones, are over."""
        while not all(task.over for task in tasks):
            self._finish_first()

    def idle(self) -> bool:
        """Whether all tasks are over, once they have gone as far as they go."""
        self.advance()
        return all(task.over for task in self._tasks)

    def _resume(self, task: BucketTask, *, wait: bool) -> bool:
        """Go on to the next point at which the schedule waits.

        Returns:
            False where the task cannot go on: it is held, another task must end before, or, unless
            ``wait`` is set, a collective is not finished.
        """
        result = None
        if task.held and task.has_mean:
            return False
        if not task.started and task.takes_storage and not self._may_take_storage(task):
            return False
        if task.waits_for is not None:
            if not wait and not task.waits_for.done():
                return False
            began = time.perf_counter()
            result = task.waits_for.wait(self._poll())
            self.seconds += time.perf_counter() - began
        try:
            task.waits_for = task.schedule.send(result)
        except StopIteration:
            task.over = True
            return True
        task.started = True
        if task.waits_for is None and not task.has_mean:
            task.reach_mean()
        return True

    def _may_take_storage(self, task: BucketTask) -> bool:
        under_way = [other for other in self._tasks if not other.over]
        return task in under_way[:self._lookahead]

    def _finish_first(self) -> None:
        first = self._tasks[0]
        first.held = False
        while not first.over:
            self._resume(first, wait=True)
        self._tasks.popleft()
