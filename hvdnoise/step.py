"""The backward passes of a step, from autograd's hooks to the step's end.

A step has V*k backward passes: k for each of this rank's V workers. In the last pass of a worker
its gradients are captured as autograd has them. In the last pass of the step a bucket's task
starts as soon as its bucket is complete. A callback of the autograd engine ends a pass. With one
optimizer in the process it waits for the exchange, so that the step's gradients are there when
that ``backward()`` returns. With several, `complete` waits (`hvdnoise.ordering`). A backward pass
that raises drops its callback unused; that is how it is noticed.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from functools import partial
from typing import Any, Iterator

import torch
from torch import Tensor

from hvdnoise.displacement import Term
from hvdnoise.exchange import WEIGHTS, Exchange
from hvdnoise.noise_state import NoiseState
from hvdnoise.ordering import FinishOrder
from hvdnoise.others import refuse_averaged
from hvdnoise.parameters import OptimizerParameters
from hvdnoise.tasks import Options

REENTRANT = "checkpoint activations with use_reentrant=False"


class StepRunner:
    """Counts the backward passes of a step, captures gradients, and ends the step's exchange.

    Args:
        per_worker: k, backward passes of each worker.
        noise_in_eval: see `DistributedOptimizer`.

    Attributes:
        done: backward passes made in this step.
        reduced: whether ``p.grad`` holds this step's exchanged gradients.
        exchange: of the layout, made when first needed.
    """

    def __init__(self, noise: NoiseState, options: Options, parameters: OptimizerParameters, *,
                 per_worker: int, noise_in_eval: bool) -> None:
        self.noise, self.options, self.parameters = noise, options, parameters
        self.per_worker = per_worker
        self.exchange: Exchange | None = None
        self._hook = partial(self._on_gradient, weakref.ref(self))
        self._synced = True  # outside no_sync()
        self._first: list[int] | None = None  # weights, as the first backward pass has them
        self._under_way = False  # all tasks have started, and nobody has waited for them
        self._versions: list[int] = []
        self._closing: weakref.ref[Any] | None = None  # what the engine calls at the pass's end
        self._forget_passes()
        noise.watch_model(weakref.WeakMethod(self.terms), parameters.names, in_eval=noise_in_eval)
        parameters.lay_out(self._hook)
        if noise.watch is not None:
            noise.watch.watch(parameters.all())
        # Models may be alike in all that a digest tells, so a number tells them apart. It belongs
        # to the first layout: if one rank alone changes its layout, the names of the handshake are
        # still equal, and the handshake finds the difference.
        digest = parameters.layout.digest
        self._number = noise.world.count(f"optimizers of {digest}")
        self.label, self.description = f"hvdnoise.{digest}.{self._number}", parameters.description
        self._order: FinishOrder = noise.world.order
        self._order.join(self)
        self._counted = False  # the optimizers of the process have been counted

    # ------------------------------------------------------------------ what the optimizer asks

    @property
    def total(self) -> int:
        """Backward passes in a step: V*k."""
        return self.noise.virtual_workers * self.per_worker

    def terms(self) -> dict[Tensor, Term]:
        """The delta of each parameter in the next forward."""
        return self.noise.terms(self._worker, self.parameters.learning_rates)

    def weigh(self, losses: Tensor) -> Tensor:
        """The loss of the next pass from its examples' losses."""
        v, part = divmod(self.done % self.total, self.per_worker)
        return self.noise.weigh(losses, v, part, self.per_worker)

    def observe_examples(self, *arguments: Any) -> bool:
        """Show the noise the gradients of the next pass's examples, if it asks for them; whether
        it did."""
        if self._under_way or self.reduced:
            raise RuntimeError("observe_examples() after the step's backward passes: call it "
                               "before the backward pass of its examples, and after zero_grad()")
        if not self.noise.sees_examples:
            return False
        self.prepare()
        return self.noise.observe_examples(self.parameters.layout, self.parameters.names,
                                           arguments, divmod(self.done, self.per_worker))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside are none of the step's."""
        before, self._synced = self._synced, False
        try:
            yield
        finally:
            self._synced = before

    def check_clearable(self) -> None:
        """Refuse zero_grad() between the backward passes of one step."""
        if self._broken or self._closing is not None or 0 < self.done < self.total:
            raise RuntimeError(f"zero_grad() after {self.done} of {self.total} backward "
                               "passes: call step() first, or reset() to drop them")

    def check_droppable(self) -> None:
        """Refuse reset() where the other ranks wait for gradients that will not come."""
        if not self._under_way and self.exchange is not None and self.exchange.in_flight:
            raise RuntimeError("backward() broke off while gradients were being exchanged, and the "
                               "other ranks wait for the rest: end this process")

    def restart(self) -> None:
        """Drop the passes of the step under way, having waited for their exchange."""
        self.noise.dropped |= self.done > 0 or self._broken
        self._forget_passes()
        self.noise.forget_passes()

    def step_taken(self) -> None:
        """The weights were updated."""
        self._forget_passes()
        self.noise.step_taken()

    def prepare(self) -> None:
        """Hook new parameters, and lay out anew where they have changed."""
        watch, changed = self.noise.watch, self.parameters.changed()
        if changed:
            self.parameters.lay_out(self._hook)
        if watch is not None:
            watch.watch(self.parameters.all() if changed else [])
        if changed and self.exchange is not None:
            self.exchange.wait()
            self.exchange = None

    def complete(self, or_zeros: bool = False) -> None:
        """Have the exchanged gradients in ``p.grad``.

        Exchange what ``p.grad`` holds, where passes are missing or gradients were set by hand.

        Args:
            or_zeros: zeros where there has been no backward pass and nothing was set.

        Raises:
            RuntimeError: when there is nothing to exchange, or a virtual worker has had no
                backward pass, or one broke off.
        """
        if self.reduced:
            return
        self._check_whole()
        if not self._under_way:
            self._make_up_passes(or_zeros)
        self.finish()

    def complete_if_under_way(self) -> None:
        """Wait for gradients that are on their way."""
        if self._under_way:
            self.complete()

    def wait(self) -> None:
        """Wait until what the noise observed is complete."""
        if self.exchange is not None:
            self.exchange.wait()

    def load_noise(self, state: dict[str, Any] | None) -> None:
        """Take over the noise's state; see `NoiseState.load_state_dict`."""
        self.prepare()
        self.noise.load_state_dict(state, self.parameters.layout, self.parameters.by_name())

    # ------------------------------------------------------------------ the end of a step

    @torch.no_grad()
    def finish(self) -> None:
        """The end of a step's passes, in its order; the tasks of all buckets have started."""
        exchange, noise = self._current_exchange(), self.noise
        if self._under_way:
            self._check_untouched()
        self._under_way, self._broken = False, True  # unless it comes to its end
        self._order.announce(noise.world, self)
        exchange.wait_for_means()
        exchange.hand_out()  # into p.grad
        exchange.share(noise.examples())  # sum up what the noise observed
        noise.add_to_mean(exchange)
        noise.measure_norms(exchange, self.parameters.learning_rates)
        self._broken, self.reduced = False, True
        self.parameters.sparse.update({p: name for p, name in self.parameters.names.items()
                                       if name in exchange.found_sparse})

    def _make_up_passes(self, or_zeros: bool) -> None:
        """Capture what ``p.grad`` holds for the passes that are missing."""
        if self.done == 0:
            self.prepare()
            self._look_at_gradients(or_zeros)
            self._start_exchange()
        nothing = self.done == 0 and all(p.grad is None for p in self.parameters.all())
        if self.total > self.per_worker and self.done <= self.total - self.per_worker \
                and not nothing:
            raise RuntimeError(f"{self.done} of {self.total} backward passes were made: each of "
                               f"the {self.noise.virtual_workers} virtual workers needs "
                               f"{self.per_worker} before step()")
        with torch.no_grad():
            while self.done < self.total:  # with nothing to give, of every worker
                self.done += (-self.done - 1) % self.per_worker
                self._end_worker(in_pass=False)

    def _look_at_gradients(self, or_zeros: bool) -> None:
        """No pass was made: are there gradients that were set by hand?"""
        exchange, parameters = self._current_exchange(), self.parameters.all()
        self._count_optimizers()
        if all(p.grad is None or exchange.owns_gradient(p) for p in parameters):
            if or_zeros:
                for p in parameters:
                    p.grad = None
            elif not self._order.several:
                raise RuntimeError("no gradients to exchange: call loss.backward() before step(), "
                                   "or synchronize() on a rank that has none to give in this step")
        elif not self._touched:
            for p in parameters:
                if p.grad is not None:
                    self.noise.check_displaced(p, self._worker, self.parameters.learning_rates,
                                               by_hand=True)

    # ------------------------------------------------------------------ backward passes

    @staticmethod
    def _on_gradient(runner: weakref.ref[StepRunner], p: Tensor) -> None:
        """Autograd has accumulated ``p.grad``."""
        self = runner()
        if self is None:
            return
        with torch.no_grad():  # no decorator, which would be one more frame
            if self._closing is None:
                self._open_pass(p)
            if not p.requires_grad and not (self._synced and self._current_exchange().has(p)):
                raise RuntimeError(f"{self.parameters.names[p]} was frozen after its forward and "
                                   "has got a gradient all the same: set requires_grad before the "
                                   "forward")
            self.noise.check_displaced(p, self._worker, self.parameters.learning_rates)
            if not self._synced or not self._is_last_of_worker:
                return
            if p in self._captured:
                raise RuntimeError(f"backward() gave {self.parameters.names[p]} a gradient twice: "
                                   f"{REENTRANT}")
            if self._capture(p):
                self._current_exchange().scheduler.advance()

    def _first_weights(self) -> list[int]:
        """`OptimizerParameters.sums_of_bits` before the first backward pass, synchronized or not:
        after one in no_sync(), ranks may have weights of their own. Looks at the model, too."""
        if self._first is None:
            names = self.parameters.names  # a parameter that was added has none yet
            refuse_averaged({p: names.get(p, "a parameter") for p in self.parameters.trained()})
            self._first = self.parameters.sums_of_bits()
        return self._first

    def _open_pass(self, p: Tensor) -> None:
        """A backward pass has begun, with the gradient of ``p``."""
        self._check_whole()
        self._first_weights()
        self._touched = True
        if self._synced and (self._under_way or self.reduced):
            self._begin_next_step(p)
        self.noise.begin_pass(counts=self._synced)
        if self._synced:
            self.noise.check_weighed()
            if self.done == 0:
                self.prepare()
                self._start_exchange()
            self.noise.check_observed()
        closing = partial(self._close_pass)
        self._closing = weakref.ref(closing, self._drop_pass)
        torch.autograd.Variable._execution_engine.queue_callback(closing)

    def _begin_next_step(self, p: Tensor) -> None:
        """The step's passes are made: gradients must have been cleared since."""
        exchange = self._current_exchange()
        if exchange.owns_gradient(p) and (self._under_way or not exchange.zeroed(but=p)):
            raise RuntimeError(
                f"a second backward() before step(): the step's {self.total} passes are made; "
                "call step() or zero_grad(), pass backward_passes_per_step= to accumulate, or put "
                "the extra backward under no_sync()")
        if self._under_way:
            self._check_untouched(cleared=True)
        self.restart()  # cleared by other means than zero_grad()

    def _drop_pass(self, closing: weakref.ref[Any]) -> None:
        if self._closing is closing:  # still open: the engine gave up
            self._closing, self._broken = None, True
            self.noise.end_pass(counts=False)

    @torch.no_grad()
    def _close_pass(self) -> None:
        self._closing = None
        if _inside_backward():
            self.noise.end_pass(counts=False)
            raise RuntimeError(f"a backward() inside another one: {REENTRANT}")
        if not self._synced:
            self.noise.end_pass(counts=False)
        elif not self._is_last_of_worker:
            self.noise.end_pass(counts=True)
            self.done += 1
        else:
            self._end_worker()
            if self._under_way and not self._order.several:
                self.finish()

    @property
    def _is_last_of_worker(self) -> bool:
        return (self.done + 1) % self.per_worker == 0

    @property
    def _worker(self) -> int:
        """The number, on this rank, of the worker whose forward comes next."""
        return 0 if self.done == self.total else self.done // self.per_worker

    def _capture(self, p: Tensor, *, in_pass: bool = True) -> bool:
        """Take ``p.grad`` as its worker's gradient; whether a bucket is complete by it."""
        self._captured.add(p)
        self.noise.captured(p.grad)
        worker = self.done // self.per_worker
        weight = self.noise.worker_weight(worker, p, in_pass=in_pass)
        return self._current_exchange().capture(p, worker, weight,
                                                last=self.done + 1 == self.total)

    def _end_worker(self, *, in_pass: bool = True) -> None:
        """The pass under way is its worker's last: what it did not reach counts as it stands."""
        exchange = self._current_exchange()
        for p in [*self.parameters.dense(), *self.parameters.sparse]:
            if p not in self._captured:
                self._capture(p, in_pass=in_pass)
        self._captured.clear()
        self.noise.end_pass(counts=True, in_pass=in_pass)
        self.noise.end_worker()
        self.done += 1
        if self.done < self.total:
            exchange.prepare_pass()
            return
        exchange.scheduler.advance()
        self._under_way, self._versions = True, exchange.versions()

    # ------------------------------------------------------------------ the exchange

    def _forget_passes(self) -> None:
        if self._under_way:
            self._order.announce(self.noise.world, self)
            self._current_exchange().discard()
        self._under_way = False
        self.done = 0
        self.reduced = False
        self._broken = False  # a backward pass has raised
        self._touched = False  # there has been a backward pass, of the step or not
        self._captured: set[Tensor] = set()

    def _current_exchange(self) -> Exchange:
        if self.exchange is None:
            kind, workers = self.noise.noise, self.noise.virtual_workers
            facts = {"optimizer": self.label, "virtual_workers": workers, "op": self.options.op,
                     "optimizers of the same model": self._number,
                     "noise": [type(kind).__name__, kind.describe() if kind else None],
                     WEIGHTS: self._first_weights()}
            self.exchange = Exchange(self.noise.world, self.parameters.layout, self.options,
                                     workers, facts, self.parameters.sparse, self.label,
                                     self._order)
        return self.exchange

    def _start_exchange(self) -> None:
        self._count_optimizers()
        self._current_exchange().prepare_tasks(
            self.noise.start_observation(self.parameters.layout), sums=self.noise.sums_gradients)

    def _count_optimizers(self) -> None:
        """Once, before the first exchange."""
        if not self._counted:
            self._counted = True
            self._order.begin()

    def _check_whole(self) -> None:
        if self._broken:
            raise RuntimeError("a backward() broke off: call reset() on all ranks to go on")

    def _check_untouched(self, *, cleared: bool = False) -> None:
        """Refuse gradients that were written to, or replaced, while they are on their way.

        ``cleared``: they may have been set to None.
        """
        exchange = self._current_exchange()
        kept = cleared or all(map(exchange.owns_gradient, self.parameters.dense()))
        if exchange.versions() != self._versions or not kept:
            raise RuntimeError("gradients were changed while they were on their way to the other "
                               "ranks: with several optimizers, call optimizer.synchronize() "
                               "after backward() and before clipping, unscaling or zeroing them")


def _inside_backward() -> bool:
    """Whether the pass that ends was started by a node of another one."""
    current_node = getattr(torch._C, "_current_autograd_node", lambda: None)
    return current_node() is not None
