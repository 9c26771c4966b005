"""The backward passes of a step: from autograd's hooks to an exchange that is complete.

A step has V*k backward passes: k for each of this rank's V workers. In the last pass of a worker
its gradients are captured as autograd has them; in the last pass of the step full buckets leave
at once. Its end is a callback of the autograd engine. With one optimizer in the process it waits
there, so that the exchange is complete when that ``backward()`` returns; with several the exchange
is finished by `complete` (`hvdnoise.ordering`). A backward pass that raises drops the callback
unused: so it is noticed.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any, Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hvdnoise.applied import AppliedNoise
from hvdnoise.buckets import Layout, build_layout, fingerprint
from hvdnoise.exchange import Exchange, Options
from hvdnoise.ordering import FinishOrder

REENTRANT = "checkpoint activations with use_reentrant=False"


class Passes:
    """Counts backward passes, captures gradients, and finishes the exchange."""

    def __init__(self, applied: AppliedNoise, options: Options, *, optimizer: torch.optim.Optimizer,
                 names: dict[Tensor, str], per_worker: int, bucket_bytes: int,
                 bucket_groups: int | list[list[Tensor]] | None) -> None:
        """Raises: ValueError when another optimizer here has one of the parameters."""
        self.applied, self.options = applied, options
        self.per_worker = per_worker  # k
        self.synced = True  # outside no_sync()
        self.exchange: Exchange | None = None
        self.under_way = False
        self._versions: list[int] = []
        self._optimizer, self._names = optimizer, names
        self._bucket_bytes, self._bucket_groups = bucket_bytes, bucket_groups
        self._sparse: dict[Tensor, str] = {}  # parameters that travel as sparse tensors
        self._hooked: set[Tensor] = set()  # no WeakSet, which compares tensors by their numbers
        self._layout: Layout | None = None
        self._closing: weakref.ref[Any] | None = None  # what the engine calls at the pass's end
        self.begin_step()
        self._name()
        self.prepare()
        # Models may be alike in all that a digest tells, so a number tells them apart. Of the
        # first layout, so that a rank alone in changing its own meets the others, and an error.
        self._number = applied.world.count(f"optimizers of {self.layout.digest}")
        self.label = f"hvdnoise.{self.layout.digest}.{self._number}"
        self.order: FinishOrder = applied.world.order
        self.order.join(self)
        self._begun = False  # the optimizers of the process have been counted

    @property
    def total(self) -> int:
        """Backward passes in a step: V*k."""
        return self.applied.virtual_workers * self.per_worker

    @property
    def description(self) -> str:
        """The optimizer in words: its class, and its first parameter."""
        first = next(iter(self._names.values()), "no parameters")
        return f"{type(self._optimizer).__name__} of {first}"

    @property
    def worker(self) -> int:
        """The number, on this rank, of the worker whose forward comes next."""
        return 0 if self.done == self.total else self.done // self.per_worker

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
        """Forget the passes of the step under way, having waited for their exchange."""
        if self.under_way:
            self.order.announce(self.applied.world, self)
            self.current_exchange().discard()
        self.under_way = False  # all buckets have left, and nobody has waited for them
        self.done = 0
        self.broken = False  # a backward pass has raised
        self.touched = False  # there has been a backward pass, synced or not
        self.reduced = False  # p.grad holds this step's exchanged gradients
        self._captured: set[Tensor] = set()

    def prepare(self) -> None:
        """Hook new parameters; lay out anew when parameters, dtypes or devices have changed."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        dense = [p for p in parameters if p not in self._sparse]
        if self._layout is not None and fingerprint(dense) == self._layout.fingerprint:
            if self.applied.watch is not None:
                self.applied.watch.watch([])
            return
        self._name()
        for p in parameters:
            if p not in self._hooked:
                self._hooked.add(p)
                p.register_post_accumulate_grad_hook(_gradient_hook(self))
        if self.applied.watch is not None:
            self.applied.watch.watch(self.parameters())
        if self.exchange is not None:
            self.exchange.settle()
        order = {p: place for place, p in enumerate(self._names)}  # of registration, if named
        dense.sort(key=order.__getitem__)
        self._layout = build_layout([(self._names[p], p) for p in dense],
                                    bucket_bytes=self._bucket_bytes, groups=self._bucket_groups)
        self.exchange = None

    def by_name(self) -> dict[str, Tensor]:
        """All parameters by their names."""
        return {self._names[p]: p for p in self.parameters()}

    def _name(self) -> None:
        """Give every parameter a name and this owner."""
        for i, group in enumerate(self._optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                self._names.setdefault(p, f"allreduce.noname.{i}.{j}")
                if _owner(p) not in (None, self):
                    gc.collect()
                other = _owner(p)
                if other not in (None, self):
                    raise ValueError(f"{self._names[p]} belongs to another DistributedOptimizer "
                                     f"already, {other.description}: give each parameter to one "
                                     "optimizer, or delete the other one first")
        for p in self.parameters():
            _owners[p] = weakref.ref(self)

    def current_exchange(self) -> Exchange:
        """The exchange of the layout, made when first needed."""
        if self.exchange is None:
            noise, workers = self.applied.noise, self.applied.virtual_workers
            facts = {"optimizer": self.label, "virtual_workers": workers, "op": self.options.op,
                     "optimizers of the same model": self._number,
                     "noise": [type(noise).__name__, noise.describe() if noise else None]}
            self.exchange = Exchange(self.applied.world, self.layout, self.options, workers, facts,
                                     self._sparse, self.label, self.order)
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
        if self.under_way:
            self._finish()
            return
        if self.done == 0:
            self.prepare()
            exchange = self.current_exchange()
            self._count_optimizers()
            if all(p.grad is None or exchange.owns_gradient(p) for p in self.parameters()):
                if or_zeros:
                    for p in self.parameters():
                        p.grad = None
                elif not self.order.several:
                    raise RuntimeError("no gradients to exchange: call loss.backward() before "
                                       "step(), or synchronize() on a rank that has none to give "
                                       "in this step")
            elif not self.touched:  # set by hand
                for p in self.parameters():
                    if p.grad is not None:
                        self.applied.check_displaced(p, self.worker, self.learning_rates,
                                                     by_hand=True)
            self._begin_exchange()
        nothing = self.done == 0 and all(p.grad is None for p in self.parameters())
        if self.total > self.per_worker and self.done <= self.total - self.per_worker \
                and not nothing:
            raise RuntimeError(f"{self.done} of {self.total} backward passes were made: each of "
                               f"the {self.applied.virtual_workers} virtual workers needs "
                               f"{self.per_worker} before step()")
        with torch.no_grad():
            while self.done < self.total:  # with nothing to give, of every worker
                self.done += (-self.done - 1) % self.per_worker
                self._end_worker(in_pass=False)
            self._finish()

    def _count_optimizers(self) -> None:
        """Once, before the first exchange."""
        if not self._begun:
            self._begun = True
            self.order.begin()

    def _begin_exchange(self) -> None:
        self._count_optimizers()
        self.current_exchange().begin_step(self.applied.observe(self.layout))

    def _finish(self) -> None:
        """Wait for the exchange, whose buckets have all left."""
        if self.under_way:
            self._check_untouched()
        self.under_way, self.broken = False, True  # unless it comes to its end
        self.order.announce(self.applied.world, self)
        exchange = self.current_exchange()
        self.applied.finish(exchange)
        self.broken, self.reduced = False, True
        self._sparse.update({p: name for p, name in self._names.items()
                             if name in exchange.found_sparse})

    def _check_untouched(self, *, cleared: bool = False) -> None:
        """Gradients that are on their way are not to be written to, nor (but for None, when they
        are ``cleared``) replaced."""
        exchange = self.current_exchange()
        dense = [p for bucket in self.layout.buckets for p in bucket.parameters]
        kept = cleared or all(exchange.owns_gradient(p) for p in dense)
        if exchange.versions() != self._versions or not kept:
            raise RuntimeError("gradients were changed while they were on their way to the other "
                               "ranks: with several optimizers, call optimizer.synchronize() "
                               "after backward() and before clipping, unscaling or zeroing them")

    @torch.no_grad()
    def on_gradient(self, p: Tensor) -> None:
        """Autograd has accumulated ``p.grad``."""
        if not self.open:
            self._open_pass(p)
        if not p.requires_grad and not (self.synced and self.current_exchange().has(p)):
            raise RuntimeError(f"{self._names[p]} was frozen after its forward and has got a "
                               "gradient all the same: set requires_grad before the forward")
        self.applied.check_displaced(p, self.worker, self.learning_rates)
        if not self.synced or (self.done + 1) % self.per_worker:
            return
        if p in self._captured:
            raise RuntimeError(f"backward() gave {self._names[p]} a gradient twice: {REENTRANT}")
        self._capture(p)

    def _open_pass(self, p: Tensor) -> None:
        self._check_whole()
        self.touched = True
        if self.synced:
            self.applied.check_weighed()
            if self.under_way or self.reduced:
                exchange = self.current_exchange()
                if exchange.owns_gradient(p) and (self.under_way or not exchange.zeroed(but=p)):
                    raise RuntimeError(
                        f"a second backward() before step(): the step's {self.total} passes are "
                        "made; call step() or zero_grad(), pass backward_passes_per_step= to "
                        "accumulate, or put the extra backward under no_sync()")
                if self.under_way:
                    self._check_untouched(cleared=True)
                self.begin_step()  # gradients were cleared by other means than zero_grad()
                self.applied.begin_step()
            if self.done == 0:
                self.prepare()
                self._begin_exchange()
        closing = partial(self._close_pass)
        self._closing = weakref.ref(closing, self._drop_pass)
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(closing)

    def _drop_pass(self, closing: weakref.ref[Any]) -> None:
        if self._closing is closing:  # still open: the engine gave up
            self._closing, self.broken = None, True
            self.applied.end_pass(counts=False)

    def _check_whole(self) -> None:
        if self.broken:
            raise RuntimeError("a backward() broke off: call reset() on all ranks to go on")

    def _capture(self, p: Tensor, *, in_pass: bool = True) -> None:
        self._captured.add(p)
        self.applied.captured(p.grad)
        worker = self.done // self.per_worker
        weight = self.applied.worker_weight(worker, p, in_pass=in_pass)
        self.current_exchange().capture(p, worker, weight, leave=self.done + 1 == self.total)

    @torch.no_grad()
    def _close_pass(self) -> None:
        self._closing = None
        if _inside_backward():
            self.applied.end_pass(counts=False)
            raise RuntimeError(f"a backward() inside another one: {REENTRANT}")
        if not self.synced:
            self.applied.end_pass(counts=False)
            return
        if (self.done + 1) % self.per_worker:
            self.applied.end_pass(counts=True)
            self.done += 1
            return
        self._end_worker()
        if self.under_way and not self.order.several:
            self._finish()

    def _end_worker(self, *, in_pass: bool = True) -> None:
        """The pass under way is its worker's last: what it did not reach counts as it stands."""
        dense = [p for bucket in self.layout.buckets for p in bucket.parameters]
        for p in [*dense, *self._sparse]:
            if p not in self._captured:
                self._capture(p, in_pass=in_pass)
        self._captured.clear()
        self.applied.end_pass(counts=True, in_pass=in_pass)
        self.applied.end_worker()
        self.done += 1
        exchange = self.current_exchange()
        if self.done < self.total:
            exchange.begin_pass()
            return
        self.under_way, self._versions = True, exchange.versions()

    def learning_rates(self) -> dict[Tensor, float | None]:
        """By parameter; None where the group has none."""
        return {p: group.get("lr") for group in self._optimizer.param_groups
                for p in group["params"]}


_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> its Passes, weakly


def _owner(p: Tensor) -> Any:
    reference = _owners.get(p)
    return reference() if reference is not None else None


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
