"""The exchange of one layout: gradients are captured, reduced and handed out, step by step.

The gradient of a parameter is captured when backward has it. A bucket whose parameters are all
captured is ready; its task (`hvdnoise.tasks`) then takes it through its plan (`hvdnoise.plans`).
With V workers on this rank and weights w_v (all 1, or identity I1 of the noise) the result is, for
every plan,

    reduced = mean over ranks of (1/V) sum_v w_v g_v        the same bits on every rank

and, for a noise that needs them, the deviations or mixtures of this rank's workers, and statistics.
With lag 2, mixtures and statistics may be on their way until the end of the next step.

Memory beside the gradients themselves, which live in ``reduced``: the rows, V * P for each step,
which its `PendingObservation` owns, and what is in flight: `IN_FLIGHT_BYTES` of gathered rows, or
one bucket.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from torch import Tensor

from hvdnoise.buckets import Bucket, Layout
from hvdnoise.comm import World, before_shutdown, handshake
from hvdnoise.exchange_plan import IN_FLIGHT_BYTES, ExchangePlan
from hvdnoise.mixing import Buffers
from hvdnoise.ordering import FinishOrder
from hvdnoise.pending import PendingObservation
from hvdnoise.plans import ALONE, PLAIN, STAYING
from hvdnoise.sparse import SparseGradients
from hvdnoise.tasks import BucketTask, ExchangeScheduler, Options

FLUSH_SECONDS = 10.0
WEIGHTS = "weights"  # among the facts


class Exchange:
    """The buffers and collectives of one layout.

    Args:
        num_local: V, workers of this rank.
        facts: what must be equal on all ranks.
        sparse: parameters outside the layout, with their names, that travel sparse.
        label: what the names of all its collectives begin with.
        order: in which the exchanges of several optimizers are waited for.
    """

    def __init__(self, world: World, layout: Layout, options: Options, num_local: int,
                 facts: dict[str, Any], sparse: dict[Tensor, str], label: str,
                 order: FinishOrder) -> None:
        self.world, self.layout, self.options, self.num_local = world, layout, options, num_local
        self.label, self._order = label, order
        self.seconds = 0.0  # waited for the last exchange
        self._waited = 0.0  # and ever, until its end
        # of the step, in the order of captures: worker, and () sum of a bucket of its gradient, or
        # of the gradients up to it
        self.sums: list[tuple[int, Tensor]] = []
        self.found_sparse: set[str] = set()  # names that some rank found sparse in the layout
        self._facts = dict(facts, parameters=layout.digest, sparse=sorted(sparse.values()),
                           exchange=[options.plan.name, (options.peers or world).size,
                                     options.precision])
        self._reduced = [bucket.new() for bucket in layout.buckets]
        self._views = [bucket.views(flat) for bucket, flat in zip(layout.buckets, self._reduced)]
        self._where = layout.places()
        self._sparse = SparseGradients(world, sparse, op=options.op, label=label,
                                       allowed=num_local == 1 and not options.keep_rows)
        self._sparse_dims: dict[Tensor, int] = {}  # of gradients that came sparse, made dense
        self._agreed = False
        self._buffers = Buffers()
        self.scheduler = ExchangeScheduler(self._lookahead(), lambda: order.poll)
        self._tasks: list[BucketTask] = []  # of this step, by bucket
        # of steps that are finished but for the noise
        self._late: deque[tuple[PendingObservation, list[BucketTask]]] = deque()
        self._turn, self._turn_used = 0, True
        self.prepare_tasks(None)
        if options.lag > 1:
            before_shutdown(self.flush)

    def _lookahead(self) -> int:
        """Buckets whose rows may be in flight at a time."""
        largest = max((bucket.size * bucket.dtype.itemsize for bucket in self.layout.buckets),
                      default=0)
        peers = (self.options.peers or self.world).size
        rows = self.options.plan.rows_in_flight(peers) * self.num_local
        return max(1, IN_FLIGHT_BYTES // max(1, largest * rows))

    @property
    def memory(self) -> int:
        """The most bytes that were in flight beside gradients and rows."""
        return self._buffers.held

    @property
    def in_flight(self) -> bool:
        """Whether a mean is on its way that nobody has waited for."""
        return any(task.ready and not task.has_mean for task in self._tasks)

    def reduced(self) -> list[tuple[Bucket, Tensor]]:
        """Every bucket with its reduced gradients (N,), whose parts are the ``p.grad``."""
        return list(zip(self.layout.buckets, self._reduced))

    # ------------------------------------------------------------------ capturing a step

    def prepare_tasks(self, pending: PendingObservation | None, *, sums: bool = False) -> None:
        """A step's gradients are to be captured.

        Args:
            pending: what the noise observes of them; None: nothing.
            sums: whether to keep `sums` of them.
        """
        self._keeps_sums = sums
        plan: ExchangePlan = PLAIN
        if pending is not None and pending.noise.mixes:
            plan = self.options.plan if self.world.size > 1 else ALONE
        elif pending is not None and pending.stays:
            plan = STAYING
        if pending is not None and self._turn_used:  # and not by one that was dropped
            self._turn, self._turn_used = (self._turn + 1) % self.options.lag, False
        # a plan that takes the mean from the rows, of one worker, needs them once
        self._fills_rows = pending is not None and pending.needs_deviations \
            and not (plan.mean_from_rows and self.num_local == 1)
        self._fills_reduced = not (plan.mean_from_rows and self._fills_rows)
        self._tasks = [BucketTask(bucket, reduced, views, world=self.world, options=self.options,
                                  buffers=self._buffers, plan=plan, turn=self._turn,
                                  name=f"{self.label}.{bucket.index}", pending=pending)
                       for bucket, reduced, views in zip(self.layout.buckets, self._reduced,
                                                         self._views)]
        self.scheduler.add(self._tasks)
        self._pending, self.sums = pending, []
        self.prepare_pass()

    def prepare_pass(self) -> None:
        """Every parameter is to be captured again."""
        for task in self._tasks:
            task.missing = set(range(len(task.views)))

    def capture(self, p: Tensor, worker: int, weight: float, *, last: bool) -> bool:
        """Take ``p.grad`` as the gradient of this rank's worker number ``worker``.

        In the last pass of a step ``p.grad`` becomes the place where the result will be, and the
        task is ready once its bucket is complete. Before, ``p.grad`` is emptied for the next
        worker.

        Returns:
            Whether a task is ready by it.
        """
        if p in self._sparse.names:
            self._sparse.keep(p, self._sparse.names[p])
            return False
        index, t = self._where[p]
        task = self._tasks[index]
        task.missing.discard(t)
        view = task.views[t]
        grad = self._dense_gradient(p, task, t)
        if self._fills_rows:
            row = task.bucket.view(task.rows[worker], t)
            row.copy_(grad) if grad is not None else row.zero_()
        if self._fills_reduced:
            self._add_up(view, grad, weight / self.num_local, first=worker == 0)
        p.grad = view if last else None
        if self._keeps_sums and not task.missing:
            flat = task.rows[worker] if self._fills_rows else task.reduced
            self.sums.append((worker, flat.sum(dtype=torch.float32)))
        task.ready = last and not task.missing
        return task.ready

    def _add_up(self, view: Tensor, grad: Tensor | None, factor: float, *, first: bool) -> None:
        if not first:
            if grad is not None:
                view.add_(grad, alpha=factor)
        elif grad is None:
            view.zero_()
        elif factor != 1:
            torch.mul(grad, factor, out=view)
        elif grad.data_ptr() != view.data_ptr():
            view.copy_(grad)

    def _dense_gradient(self, p: Tensor, task: BucketTask, t: int) -> Tensor | None:
        """``p.grad`` as a dense tensor; None where it is missing or travels as a sparse one."""
        grad = p.grad
        if grad is None or not grad.is_sparse:
            return grad.detach() if grad is not None else None
        if self.options.sparse_as_dense:
            self._sparse_dims[p] = grad.sparse_dim()
            return grad.detach().to_dense()
        self._sparse.keep(p, task.bucket.names[t])
        return None

    # ------------------------------------------------------------------ finishing a step

    def wait_for_means(self) -> None:
        """Wait for the mean of every bucket, in the order of the buckets.

        Raises:
            ValueError: the first time, on all ranks, when they exchange different parameters.
        """
        began = time.perf_counter()
        self._agree()
        self.scheduler.seconds += time.perf_counter() - began
        for task in self._tasks:
            self.scheduler.wait_for_mean(task)

    def hand_out(self) -> None:
        """Put the results into every ``p.grad``."""
        for task in self._tasks:
            for p, view in zip(task.bucket.parameters, task.views):
                p.grad = view
                if p in self._sparse_dims:
                    p.grad = self._sparse.remember(p, view.to_sparse(self._sparse_dims[p]))
        self._sparse.reduce()

    def share(self, examples: float) -> None:
        """Sum up what the noise observed, and see that it is complete ``lag`` steps later.

        Args:
            examples: of this rank's workers together; nan if they are not known.
        """
        if self._pending is not None:
            self._pending.start_sharing(self.world, f"{self.label}.seen.{self._turn}", examples)
            self._late.append((self._pending, self._tasks))
            self._turn_used = True
        self.scheduler.release(self._tasks)
        if self._pending is not None:
            self._pending.finish_beside()
        if len(self._late) == self.options.lag:  # the next exchange but one takes its names
            self._finish_oldest()
        self.seconds = self.scheduler.seconds - self._waited
        self._waited = self.scheduler.seconds

    def _finish_oldest(self) -> None:
        pending, tasks = self._late.popleft()
        self.scheduler.wait(tasks)
        pending.finish()

    def wait(self) -> None:
        """Wait until all observations are complete and nothing is on its way any more."""
        while self._late:
            self._finish_oldest()

    def discard(self) -> None:
        """Wait for an exchange whose results nobody wants; ``p.grad`` stays as it is."""
        self.wait_for_means()
        self._sparse.reduce(keep=False)
        self.scheduler.release(self._tasks)
        if self._pending is not None:
            self.scheduler.wait(self._tasks)
            self._pending.wait_for_elementwise()

    def flush(self) -> None:
        """Before this rank leaves: take what is late to its end, or the others would lack it.

        It cannot end when another rank has failed: so for `FLUSH_SECONDS` at most.
        """
        until = time.monotonic() + FLUSH_SECONDS
        while time.monotonic() < until and not (
                self.scheduler.idle() and all(pending.done() for pending, _ in self._late)):
            time.sleep(0.001)

    def _agree(self) -> None:
        """Once a layout: all ranks exchange the same thing, and know what travels sparse."""
        if self._agreed:
            return
        handshake(self.world, self._facts, name="hvdnoise.facts", poll=self._order.poll,
                  cures={WEIGHTS: "give all ranks rank 0's weights before the first backward, by "
                                  "hvd.broadcast_parameters or torch.distributed.broadcast"})
        self.found_sparse = self._sparse.agree(
            {name: p for bucket in self.layout.buckets
             for name, p in zip(bucket.names, bucket.parameters)})
        self._agreed = True

    # ------------------------------------------------------------------ who holds which gradient

    def has(self, p: Tensor) -> bool:
        """Whether the parameter is in the layout."""
        return p in self._where

    def owns_gradient(self, p: Tensor) -> bool:
        """Whether ``p.grad`` is this exchange's storage, so the result of an earlier step."""
        if p.grad is None or p.grad.is_sparse or p not in self._where:
            return self._sparse.owns(p)
        index, t = self._where[p]
        return p.grad.data_ptr() == self._views[index][t].data_ptr()

    def zeroed(self, but: Tensor) -> bool:
        """Whether all results of an earlier step, ``but`` one parameter's, are zero by now."""
        results = [p.grad for p in [*self._where, *self._sparse.names]
                   if p.grad is not None and p is not but and self.owns_gradient(p)]
        return bool(results) and not any(grad.to_dense().any() for grad in results)

    def versions(self) -> list[int]:
        """What changes when somebody writes into a gradient."""
        return [flat._version for flat in self._reduced]
