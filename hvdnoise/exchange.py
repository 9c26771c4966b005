"""When and how gradients travel: flat buckets, exchanged while backward goes on.

The gradient of a parameter is captured when backward has it; a bucket whose parameters are all
captured leaves at once, on a journey that its plan describes (`hvdnoise.plans`). With V workers on
this rank and weights w_v (all 1, or identity I1 of the noise) the result is, for every plan,

    reduced = mean over ranks of (1/V) sum_v w_v g_v        the same bits on every rank

and for noises that want them the deviations or mixtures of this rank's workers, and statistics.
All of it is there when `finish` returns, but with lag 2 mixtures and statistics, which may be on
their way until the next step's `finish` returns.

Gathered rows in flight are limited to `hvdnoise.costs.IN_FLIGHT_BYTES`, or one bucket. Memory
beside the gradients themselves (which live in ``reduced``): the rows, V * P for each exchange,
which their `Sighting` owns, and what is in flight.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvdnoise.buckets import Bucket, Layout
from hvdnoise.comm import Handle, World, before_shutdown, handshake
from hvdnoise.costs import IN_FLIGHT_BYTES
from hvdnoise.mixing import Buffers, Wire
from hvdnoise.observation import Sighting
from hvdnoise.ordering import FinishOrder
from hvdnoise.plans import PLANS, Traveller, into
from hvdnoise.sparse import SparseGradients
from hvdnoise.traffic import Traffic, Trip


@dataclass(frozen=True)
class Options:
    """How the reduction is done: Horovod's arguments of the same names, and the plan.

    Attributes:
        keep_rows: whether each worker's own gradient is wanted beside the mean.
        lag: how many steps mixtures and statistics may take.
        plan, precision: of mixtures (hvdnoise.costs).
        peers: the ranks among which rows are gathered; default all.
    """

    op: str = "average"
    compression: Any = None
    gradient_predivide_factor: float = 1.0
    sparse_as_dense: bool = False
    keep_rows: bool = False
    lag: int = 1
    plan: str = "own"
    precision: str = "fp32"
    peers: World | None = None


@dataclass
class _Place:
    """A bucket with its buffers and what has been captured of it."""

    bucket: Bucket
    reduced: Tensor
    views: list[Tensor]
    missing: set[int] = field(default_factory=set)  # places not captured yet in this pass
    sparse: dict[int, int] = field(default_factory=dict)  # places whose gradient came sparse: dims


class _Reduction:
    """The allreduce of a bucket, with Horovod's options."""

    def __init__(self, world: World, options: Options, reduced: Tensor, name: str) -> None:
        self._reduced, self._compression, self._context = reduced, options.compression, None
        flat = reduced
        if self._compression is not None:
            flat, self._context = self._compression.compress(flat)
        wire = flat.float() if flat.dtype == torch.bfloat16 else flat  # Horovod has no bfloat16
        average = options.op == "average"
        factor = options.gradient_predivide_factor
        self.handle: Handle = world.allreduce_(
            wire, name=name, op=options.op, prescale=1 / factor if average else 1.0,
            postscale=factor if average else 1.0)

    def finish(self, result: Tensor) -> None:
        """Put the result in its place."""
        if self._compression is not None:
            result = self._compression.decompress(result, self._context)
        into(self._reduced, result)


class Exchange:
    """The buffers and collectives of one layout; used over and over, step by step."""

    def __init__(self, world: World, layout: Layout, options: Options, num_local: int,
                 facts: dict[str, Any], sparse: dict[Tensor, str], label: str,
                 order: FinishOrder | None = None) -> None:
        """``sparse``: parameters outside the layout, with their names, that travel sparse;
        ``label``: what the names of all its collectives begin with; ``order``: in which the
        exchanges of several optimizers are waited for."""
        self.world, self.layout, self.options, self.num_local = world, layout, options, num_local
        self.seconds = 0.0  # waited for the last exchange
        self._waited = 0.0  # and ever, until its end
        self.found_sparse: set[str] = set()  # names that some rank found sparse in the layout
        self.buffers = Buffers()
        self.label, self._order = label, order
        self._peers = options.peers or world
        self._facts = dict(facts, parameters=layout.digest, sparse=sorted(sparse.values()),
                           exchange=[options.plan, self._peers.size, options.precision])
        self._places = [self._place(bucket) for bucket in layout.buckets]
        self._where = layout.places()
        self._agreed = False
        self._sparse = SparseGradients(world, sparse, op=options.op, label=label,
                                       allowed=num_local == 1 and not options.keep_rows)
        self._traffic = Traffic(self._buckets_in_flight(), order)
        self._trips: list[Trip] = []  # of this step
        self._late: deque[Sighting] = deque()  # of steps that are finished but for the noise
        self._turn, self._turn_used = 0, True
        self.begin_step(None)
        if options.lag > 1:
            before_shutdown(self.flush)

    def _place(self, bucket: Bucket) -> _Place:
        reduced = bucket.new()
        return _Place(bucket, reduced, bucket.views(reduced))

    def _buckets_in_flight(self) -> int:
        if not self.layout.buckets:
            return 1
        largest = max(bucket.size * bucket.dtype.itemsize for bucket in self.layout.buckets)
        rows = 1 if self.options.plan == "transpose" else self._peers.size
        return max(1, IN_FLIGHT_BYTES // max(1, largest * rows * self.num_local))

    @property
    def memory(self) -> int:
        """The most bytes that were in flight beside gradients and rows."""
        return self.buffers.held

    @property
    def in_flight(self) -> bool:
        """Whether a mean is on its way that nobody has waited for."""
        return any(trip.started and not trip.has_mean for trip in self._trips)

    def reduced(self) -> list[tuple[Bucket, Tensor]]:
        """Every bucket with its reduced gradients (N,), whose parts are the ``p.grad``."""
        return [(place.bucket, place.reduced) for place in self._places]

    # ------------------------------------------------------------------ a step

    def begin_step(self, sighting: Sighting | None) -> None:
        """A step's gradients are to be captured.

        Args:
            sighting: what the noise sees of them; None: nothing.
        """
        plan = "own"
        if sighting is not None and sighting.noise.mixes:
            plan = self.options.plan if self.world.size > 1 else "gather-only"  # from itself
        if sighting is not None and self._turn_used:  # and not by one that was dropped
            self._turn, self._turn_used = (self._turn + 1) % self.options.lag, False
        either = plan in ("gather-only", "transpose")  # one of the two is enough
        self._fills_rows = sighting is not None and not (either and self.num_local == 1)
        self._fills_reduced = not (either and self._fills_rows)
        self._trips = self._traffic.plan([PLANS[plan](self._traveller(place, sighting))
                                          for place in self._places],
                                         hold=self.options.lag > 1)
        if sighting is not None:
            sighting.settlers.append(partial(self._traffic.settle, self._trips))
        self._sighting = sighting
        self.begin_pass()

    def _traveller(self, place: _Place, sighting: Sighting | None) -> Traveller:
        name = f"{self.label}.{place.bucket.index}"
        return Traveller(
            place.bucket, f"{name}.{self._turn}", place.reduced,
            lambda: _Reduction(self.world, self.options, place.reduced, name), self.world,
            self._peers, Wire(self.options.precision, place.bucket.dtype), self.buffers, sighting,
            late=self.options.lag > 1)

    def begin_pass(self) -> None:
        """Every parameter is to be captured again."""
        for place in self._places:
            place.missing = set(range(len(place.bucket.parameters)))

    def flush(self) -> None:
        """See what is late to its end: this rank's leaving must not cut it off for the others.

        It cannot end when another rank has failed: so for ten seconds at most.
        """
        until = time.monotonic() + 10
        while time.monotonic() < until and not (self._traffic.quiet()
                                                and all(late.done() for late in self._late)):
            time.sleep(0.001)

    # ------------------------------------------------------------------ gradients

    def has(self, p: Tensor) -> bool:
        """Whether the parameter is in the layout."""
        return p in self._where

    def owns_gradient(self, p: Tensor) -> bool:
        """Whether ``p.grad`` is this exchange's storage, so the result of an earlier step."""
        if p.grad is None or p.grad.is_sparse or p not in self._where:
            return self._sparse.own(p)
        index, t = self._where[p]
        return p.grad.data_ptr() == self._places[index].views[t].data_ptr()

    def zeroed(self, but: Tensor) -> bool:
        """Whether all results of an earlier step, ``but`` one parameter's, are zero by now."""
        results = [p.grad for p in [*self._where, *self._sparse.names]
                   if p.grad is not None and p is not but and self.owns_gradient(p)]
        return bool(results) and not any(grad.to_dense().any() for grad in results)

    def capture(self, p: Tensor, worker: int, weight: float, leave: bool) -> None:
        """Take ``p.grad`` as the gradient of this rank's worker number ``worker``.

        With ``leave`` the bucket leaves once it is complete, and ``p.grad`` becomes the place
        where the result will be; otherwise ``p.grad`` is emptied for the next worker.
        """
        if p in self._sparse.names:
            self._sparse.keep(p, self._sparse.names[p])
            return
        index, t = self._where[p]
        place = self._places[index]
        place.missing.discard(t)
        view = place.views[t]
        grad = self._dense_gradient(p, place, t)
        if self._fills_rows and self._sighting is not None:
            row = place.bucket.view(self._sighting.rows(place.bucket)[worker], t)
            row.copy_(grad) if grad is not None else row.zero_()
        if self._fills_reduced:
            self._add_up(view, grad, weight / self.num_local, first=worker == 0)
        p.grad = view if leave else None
        if leave and not place.missing:
            self._traffic.leave(self._trips[index])

    def _add_up(self, view: Tensor, grad: Tensor | None, factor: float, *, first: bool) -> None:
        if not first:
            if grad is not None:
                view.add_(grad, alpha=factor)
        elif grad is None:
            view.zero_()
        else:
            if grad.data_ptr() != view.data_ptr():
                view.copy_(grad)
            if factor != 1:
                view.mul_(factor)

    def _dense_gradient(self, p: Tensor, place: _Place, t: int) -> Tensor | None:
        """``p.grad`` as a dense tensor; None where it is missing or travels as a sparse one."""
        grad = p.grad
        if grad is None or not grad.is_sparse:
            return grad.detach() if grad is not None else None
        if self.options.sparse_as_dense:
            place.sparse[t] = grad.sparse_dim()
            return grad.detach().to_dense()
        self._sparse.keep(p, place.bucket.names[t])
        return None

    def finish(self, examples: float) -> None:
        """Wait for the mean of every bucket, in the order of leaving.

        Args:
            examples: of this rank's workers together; nan if they are not known.

        Raises:
            ValueError: the first time, on all ranks, when they exchange different parameters.
        """
        self._wait_for_means()
        for place in self._places:
            for t, (p, view) in enumerate(zip(place.bucket.parameters, place.views)):
                p.grad = view
                if t in place.sparse:
                    p.grad = self._sparse.remember(p, view.to_sparse(place.sparse[t]))
        self._sparse.reduce()
        if self._sighting is not None:
            self._sighting.share(self.world, f"{self.label}.seen.{self._turn}", examples)
            self._late.append(self._sighting)
            self._turn_used = True
        self._traffic.release(self._trips)
        if len(self._late) == self.options.lag:  # the next exchange but one takes its names
            self._late.popleft().settle()
        self.seconds, self._waited = self._traffic.seconds - self._waited, self._traffic.seconds

    def _wait_for_means(self) -> None:
        started = time.perf_counter()
        self._agree()
        self._traffic.seconds += time.perf_counter() - started
        for trip in self._trips:
            self._traffic.until_mean(trip)

    def discard(self) -> None:
        """Wait for an exchange whose results nobody wants; ``p.grad`` stays as it is."""
        self._wait_for_means()
        self._sparse.reduce(keep=False)
        self._traffic.release(self._trips)
        if self._sighting is not None:
            self._traffic.settle(self._trips)
            self._sighting.settlers.clear()

    def settle(self) -> None:
        """Wait until nothing is on its way any more."""
        while self._late:
            self._late.popleft().settle()

    def versions(self) -> list[int]:
        """What changes when somebody writes into a gradient."""
        return [place.reduced._version for place in self._places]

    def _agree(self) -> None:
        """Once a layout: all ranks exchange the same thing, and know what travels sparse."""
        if self._agreed:
            return
        handshake(self.world, self._facts, name="hvdnoise.facts",
                  poll=self._order.poll if self._order is not None else None)
        self.found_sparse = self._sparse.agree(
            {name: p for bucket in self.layout.buckets
             for name, p in zip(bucket.names, bucket.parameters)})
        self._agreed = True
