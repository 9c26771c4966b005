"""When and how gradients travel: flat buckets, reduced while backward goes on.

The gradient of a parameter is captured when backward has it; a bucket whose parameters are all
captured leaves at once, by one asynchronous allreduce in place and, for noises that want the
gradients of all workers, one allgather of this rank's rows beside it. With V workers on this rank
and weights w_v (all 1, or identity I1 of the noise):

    reduced = mean over ranks of (1/V) sum_v w_v g_v        rows[v] = g_v, later d_v = g_v - mean

Bytes received per rank and step: allreduce 2(W-1)/W * 4P, allgather on top (W-1) * 4P (W workers
on as many ranks, 4-byte numbers). Across ranks: ``reduced`` is the same bits everywhere.
Memory beside the gradients themselves (which live in ``reduced``): V * P for the rows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Callable

import torch
from torch import Tensor

from hvdnoise.buckets import Bucket, Layout
from hvdnoise.comm import Handle, World, handshake


@dataclass(frozen=True)
class Options:
    """How the reduction is done: Horovod's arguments of the same names."""

    op: str = "average"
    compression: Any = None
    gradient_predivide_factor: float = 1.0
    sparse_as_dense: bool = False
    keep_rows: bool = False
    gather_rows: bool = False


@dataclass
class _Place:
    """A bucket with its buffers and what is under way for it."""

    bucket: Bucket
    reduced: Tensor
    views: list[Tensor]
    rows: Tensor | None
    row_views: list[list[Tensor]]
    missing: set[int] = field(default_factory=set)  # places not captured yet in this pass
    sparse: dict[int, int] = field(default_factory=dict)  # places whose gradient came sparse: dims
    reduction: tuple[Handle, Any] | None = None
    gathering: Handle | None = None


class Exchange:
    """The buffers and collectives of one layout; used over and over, step by step."""

    def __init__(self, world: World, layout: Layout, options: Options, num_local: int,
                 facts: dict[str, Any], sparse: dict[Tensor, str], label: str) -> None:
        """``sparse``: parameters outside the layout, with their names, that travel sparse;
        ``label``: what the names of the buckets begin with."""
        self.world, self.layout, self.options, self.num_local = world, layout, options, num_local
        self._label = label
        self.seconds = 0.0  # waited in the last `finish`
        self.gathers = True  # whether somebody looks at the gathered rows of this step
        self.found_sparse: set[str] = set()  # names that some rank found sparse in the layout
        self._facts = dict(facts, parameters=layout.digest, sparse=sorted(sparse.values()))
        self._places = [self._place(bucket) for bucket in layout.buckets]
        self._where = layout.places()
        self._agreed = False
        self._sparse = dict(sparse)
        self._sparse_gradients: dict[str, Tensor] = {}
        self._sparse_results: dict[Tensor, Tensor] = {}  # what p.grad became
        self.begin_pass()

    def _place(self, bucket: Bucket) -> _Place:
        reduced = bucket.new()
        rows = bucket.new(self.num_local) if self.options.keep_rows else None
        row_views = [bucket.views(row) for row in rows] if rows is not None else []
        return _Place(bucket, reduced, bucket.views(reduced), rows, row_views)

    @property
    def in_flight(self) -> bool:
        """Whether a collective was started that nobody has waited for."""
        return any(place.reduction is not None for place in self._places)

    def reduced(self) -> list[tuple[Bucket, Tensor]]:
        """Every bucket with its reduced gradients (N,), whose parts are the ``p.grad``."""
        return [(place.bucket, place.reduced) for place in self._places]

    def begin_pass(self) -> None:
        """Every parameter is to be captured again."""
        for place in self._places:
            place.missing = set(range(len(place.bucket.parameters)))

    def owns_gradient(self, p: Tensor) -> bool:
        """Whether ``p.grad`` is this exchange's storage, so the result of an earlier step."""
        if p.grad is None or p.grad.is_sparse or p not in self._where:
            return p.grad is not None and p.grad is self._sparse_results.get(p)
        index, t = self._where[p]
        return p.grad.data_ptr() == self._places[index].views[t].data_ptr()

    def zeroed(self, but: Tensor) -> bool:
        """Whether all results of an earlier step, ``but`` one parameter's, are zero by now."""
        results = [p.grad for p in [*self._where, *self._sparse]
                   if p.grad is not None and p is not but and self.owns_gradient(p)]
        return bool(results) and not any(grad.to_dense().any() for grad in results)

    def capture(self, p: Tensor, worker: int, weight: float, leave: bool) -> None:
        """Take ``p.grad`` as the gradient of this rank's worker number ``worker``.

        With ``leave`` the bucket leaves once it is complete, and ``p.grad`` becomes the place
        where the result will be; otherwise ``p.grad`` is emptied for the next worker.
        """
        if p in self._sparse:
            self._keep_sparse(p, self._sparse[p])
            return
        index, t = self._where[p]
        place = self._places[index]
        place.missing.discard(t)
        view = place.views[t]
        grad = self._dense_gradient(p, place, t)
        if place.rows is not None:
            place.row_views[worker][t].copy_(grad) if grad is not None else \
                place.row_views[worker][t].zero_()
        factor = weight / self.num_local
        if worker > 0:
            if grad is not None:
                view.add_(grad, alpha=factor)
        elif grad is None:
            view.zero_()
        else:
            if grad.data_ptr() != view.data_ptr():
                view.copy_(grad)
            if factor != 1:
                view.mul_(factor)
        p.grad = view if leave else None
        if leave and not place.missing:
            self._leave(place)

    def _dense_gradient(self, p: Tensor, place: _Place, t: int) -> Tensor | None:
        """``p.grad`` as a dense tensor; None where it is missing or travels as a sparse one."""
        grad = p.grad
        if grad is None or not grad.is_sparse:
            return grad.detach() if grad is not None else None
        if self.options.sparse_as_dense:
            place.sparse[t] = grad.sparse_dim()
            return grad.detach().to_dense()
        self._keep_sparse(p, place.bucket.names[t])
        return None

    def _keep_sparse(self, p: Tensor, name: str) -> None:
        plain = self.num_local == 1 and not self.options.keep_rows
        if not plain or self.options.op not in ("average", "sum"):
            raise ValueError(f"the gradient of {name} is sparse: pass sparse_as_dense=True, which "
                             "noise, virtual workers and reductions other than a mean or sum need")
        if p.grad is not None:
            self._sparse_gradients[name] = p.grad.detach()

    def _leave(self, place: _Place) -> None:
        name = f"{self._label}.{place.bucket.index}"
        if self.options.gather_rows and self.gathers:
            assert place.rows is not None
            place.gathering = self.world.allgather(place.rows, name=f"{name}.rows")
        flat, context = place.reduced, None
        if self.options.compression is not None:
            flat, context = self.options.compression.compress(flat)
        wire = flat.float() if flat.dtype == torch.bfloat16 else flat  # Horovod has no bfloat16
        average = self.options.op == "average"
        factor = self.options.gradient_predivide_factor
        handle = self.world.allreduce_(wire, name=name, op=self.options.op,
                                       prescale=1 / factor if average else 1.0,
                                       postscale=factor if average else 1.0)
        place.reduction = handle, context

    def finish(self, receive: Callable[[Bucket, Tensor, Tensor | None, Tensor | None], None]
               ) -> None:
        """Wait for every bucket, in the order of leaving, and hand each one on.

        Args:
            receive: called with (bucket, reduced (N,), rows (V, N) or None, gathered rows of all
                workers (W, N) or None) once a bucket is complete.

        Raises:
            ValueError: the first time, on all ranks, when they exchange different parameters.
        """
        started = time.perf_counter()
        self._agree()
        self.seconds = time.perf_counter() - started
        for place in self._places:
            started = time.perf_counter()
            assert place.reduction is not None
            handle, context = place.reduction
            result = handle.wait()
            gathered = place.gathering.wait() if place.gathering is not None else None
            self.seconds += time.perf_counter() - started
            place.reduction = place.gathering = None
            if self.options.compression is not None:
                result = self.options.compression.decompress(result, context)
            if result.data_ptr() != place.reduced.data_ptr():
                place.reduced.copy_(result)
            for t, (p, view) in enumerate(zip(place.bucket.parameters, place.views)):
                p.grad = view
                if t in place.sparse:
                    p.grad = self._sparse_results[p] = view.to_sparse(place.sparse[t])
            receive(place.bucket, place.reduced, place.rows, gathered)
        self._reduce_sparse()
        self.begin_pass()

    def _agree(self) -> None:
        """Once a layout: all ranks exchange the same thing, and know what travels sparse."""
        if self._agreed:
            return
        handshake(self.world, self._facts, name="hvdnoise.facts")
        found = self.world.gather_json(sorted(self._sparse_gradients), name="hvdnoise.sparse")
        self.found_sparse = {name for names in found for name in names}
        self._sparse.update({p: name for bucket in self.layout.buckets
                             for name, p in zip(bucket.names, bucket.parameters)
                             if name in self.found_sparse})
        self._agreed = True

    def _reduce_sparse(self) -> None:
        """Allgather the sparse gradients: every rank takes part, with nothing where it has none."""
        unknown = set(self._sparse_gradients) - set(self._sparse.values())
        if unknown:
            raise RuntimeError(f"the gradient of {min(unknown)} turned sparse after the first "
                               "step: pass sparse_as_dense=True")
        for p, name in sorted(self._sparse.items(), key=lambda item: item[1]):
            mine = self._sparse_gradients.pop(name, None)  # entry by entry, as Horovod: no coalesce
            indices_KI = mine._indices().t().contiguous() if mine is not None else \
                torch.zeros(0, 1, dtype=torch.int64, device=p.device)
            values_K = mine._values() if mine is not None else p.new_zeros(0, *p.shape[1:])
            indices_KI = self.world.allgather(indices_KI, name=f"hvdnoise.{name}.indices").wait()
            values_K = self.world.allgather(values_K, name=f"hvdnoise.{name}.values").wait()
            if self.options.op == "average":
                values_K = values_K / self.world.size
            p.grad = self._sparse_results[p] = torch.sparse_coo_tensor(
                indices_KI.t(), values_K, p.shape, check_invariants=False)
