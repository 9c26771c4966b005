"""The backward passes of a step: from autograd's hooks to an exchange that is complete.

A step has V*k backward passes: k for each of this rank's V workers. In the last pass of a worker
its gradients are captured as autograd has them; in the last pass of the step full buckets leave
at once. The exchange is complete when that ``backward()`` returns, because its end is a callback
of the autograd engine. A backward pass that raises drops the callback unused: so it is noticed, and
the weights are clean after it too.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, Callable

import torch
from torch import Tensor

from hvdnoise.applied import AppliedNoise
from hvdnoise.buckets import Layout, build_layout, fingerprint
from hvdnoise.exchange import Exchange, Options

REENTRANT = "checkpoint activations with use_reentrant=False"


class Passes:
    """Counts backward passes, captures gradients, and finishes the exchange."""

    def __init__(self, applied: AppliedNoise, options: Options, *, optimizer: torch.optim.Optimizer,
                 names: dict[Tensor, str], per_worker: int, bucket_bytes: int,
                 bucket_groups: int | list[list[Tensor]] | None) -> None:
        self.applied, self.options = applied, options
        self.per_worker = per_worker  # k
        self.synced = True  # outside no_sync()
        self.exchange: Exchange | None = None
        self._optimizer, self._names = optimizer, names
        self._bucket_bytes, self._bucket_groups = bucket_bytes, bucket_groups
        self._sparse: dict[Tensor, str] = {}  # parameters that travel as sparse tensors
        self._hooked: set[Tensor] = set()  # no WeakSet, which compares tensors by their numbers
        self._layout: Layout | None = None
        self._closing: weakref.ref[Any] | None = None  # what the engine calls at the pass's end
        self.begin_step()
        self.prepare()
        # Models may be alike in all that a digest tells, so a number tells them apart. Of the
        # first layout, so that a rank alone in changing its own meets the others, and an error.
        self._number = applied.world.count(f"optimizers of {self.layout.digest}")
        self._label = f"hvdnoise.{self.layout.digest}.{self._number}"

    @property
    def total(self) -> int:
        """Backward passes in a step: V*k."""
        return self.applied.virtual_workers * self.per_worker

    @property
    def open(self) -> bool:
        """Whether a backward pass is going on."""
        return self._closing is not None

    @property
    def layout(self) -> Layout:
        assert self._layout is not None
        return self._layout

    def parameters(self) -> list[Tensor]:
        """All parameters of the optimizer, as its groups are now."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def begin_step(self) -> None:
        """Forget the passes of the step under way."""
        self.done = 0
        self.broken = False  # a backward pass has raised
        self.reduced = False  # p.grad holds this step's exchanged gradients
        self._captured: set[Tensor] = set()

    def prepare(self) -> None:
        """Hook new parameters; lay out anew when parameters, dtypes or devices have changed."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        dense = [p for p in parameters if p not in self._sparse]
        if self._layout is not None and fingerprint(dense) == self._layout.fingerprint:
            return
        for i, group in enumerate(self._optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                self._names.setdefault(p, f"allreduce.noname.{i}.{j}")
        for p in parameters:
            if p not in self._hooked:
                self._hooked.add(p)
                p.register_post_accumulate_grad_hook(_gradient_hook(self))
        if self.applied.watch is not None:
            self.applied.watch.watch(parameters)
        self.applied.history.forget()  # it saw another layout
        order = {p: place for place, p in enumerate(self._names)}  # of registration, if named
        dense.sort(key=order.__getitem__)
        self._layout = build_layout([(self._names[p], p) for p in dense],
                                    bucket_bytes=self._bucket_bytes, groups=self._bucket_groups)
        self.exchange = None

    def current_exchange(self) -> Exchange:
        """The exchange of the layout, made when first needed."""
        if self.exchange is None:
            noise, workers = self.applied.noise, self.applied.virtual_workers
            facts = {"virtual_workers": workers, "op": self.options.op,
                     "optimizers of the same model": self._number,
                     "noise": [type(noise).__name__, noise.describe() if noise else None]}
            self.exchange = Exchange(self.applied.world, self.layout, self.options, workers, facts,
                                     self._sparse, self._label)
        return self.exchange

    def complete(self, or_zeros: bool) -> None:
        """Exchange what ``p.grad`` holds, for passes that are missing or gradients set by hand.

        Args:
            or_zeros: zeros where there has been no backward pass and nothing was set.

        Raises:
            RuntimeError: when there is nothing to exchange, or a virtual worker has had no
                backward pass, or one broke off.
        """
        self._check_whole()
        if self.done == 0:
            self.prepare()
            exchange = self.current_exchange()
            if all(p.grad is None or exchange.owns_gradient(p) for p in self.parameters()):
                if not or_zeros:
                    raise RuntimeError("no gradients to exchange: call loss.backward() before "
                                       "step(), or synchronize() on a rank that has none to give "
                                       "in this step")
                for p in self.parameters():
                    p.grad = None
            exchange.begin_step(self.applied.look())
        if self.done < self.total - self.per_worker:
            raise RuntimeError(f"{self.done} of {self.total} backward passes were made: each of "
                               f"the {self.applied.virtual_workers} virtual workers needs "
                               f"{self.per_worker} before step()")
        self.done = self.total - 1
        with torch.no_grad():
            self._end_worker()

    @torch.no_grad()
    def on_gradient(self, p: Tensor) -> None:
        """Autograd has accumulated ``p.grad``."""
        if not self.open:
            self._open_pass(p)
        if not self.synced or (self.done + 1) % self.per_worker:
            return
        if p in self._captured:
            raise RuntimeError(f"backward() gave {self._names[p]} a gradient twice: {REENTRANT}")
        self._capture(p)

    def _open_pass(self, p: Tensor) -> None:
        self._check_whole()
        if self.synced:
            if self.reduced:
                exchange = self.current_exchange()
                if exchange.owns_gradient(p) and not exchange.zeroed(but=p):
                    raise RuntimeError(
                        f"a second backward() before step(): the step's {self.total} passes are "
                        "made; call step() or zero_grad(), pass backward_passes_per_step= to "
                        "accumulate, or put the extra backward under no_sync()")
                self.begin_step()  # gradients were cleared by other means than zero_grad()
                self.applied.begin_step()
            if self.done == 0:
                self.prepare()
                self.current_exchange().begin_step(self.applied.look())
        closing = partial(self._close_pass)
        self._closing = weakref.ref(closing, self._drop_pass)
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(closing)

    def _drop_pass(self, closing: weakref.ref[Any]) -> None:
        if self._closing is closing:  # still open: the engine gave up
            self._closing, self.broken = None, True
            self.applied.end_pass()

    def _check_whole(self) -> None:
        if self.broken:
            raise RuntimeError("a backward() broke off: call reset() on all ranks to go on")

    def _capture(self, p: Tensor) -> None:
        self._captured.add(p)
        self.applied.captured(p.grad)
        worker = self.done // self.per_worker
        self.current_exchange().capture(p, worker, self.applied.worker_weight(worker),
                                        leave=self.done + 1 == self.total)

    @torch.no_grad()
    def _close_pass(self) -> None:
        self._closing = None
        self.applied.end_pass()
        if _inside_backward():
            raise RuntimeError(f"a backward() inside another one: {REENTRANT}")
        if self.synced:
            self.applied.check_weighed()
            if (self.done + 1) % self.per_worker:
                self.done += 1
            else:
                self._end_worker()

    def _end_worker(self) -> None:
        """The pass under way is its worker's last: what it did not reach counts as it stands."""
        dense = [p for bucket in self.layout.buckets for p in bucket.parameters]
        for p in [*dense, *self._sparse]:
            if p not in self._captured:
                self._capture(p)
        self._captured.clear()
        self.done += 1
        exchange = self.current_exchange()
        if self.done < self.total:
            exchange.begin_pass()
            self.applied.begin_worker()
            return
        self.applied.finish(exchange)
        self.reduced = True
        self._sparse.update({p: name for p, name in self._names.items()
                             if name in exchange.found_sparse})


def _inside_backward() -> bool:
    """Whether the pass that ends was started by a node of another one."""
    current_node = getattr(torch._C, "_current_autograd_node", lambda: None)
    return current_node() is not None


def _gradient_hook(passes: Passes) -> Callable[[Tensor], None]:
    reference = weakref.ref(passes)

    def hook(p: Tensor) -> None:
        target = reference()
        if target is not None:
            target.on_gradient(p)
    return hook
