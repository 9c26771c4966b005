"""DistributedOptimizer: a drop-in for Horovod's that can put structured noise into training.

The order of a step, with V workers on this rank and k backward passes each (V = k = 1 usually):

    zero_grad()
    V*k times: forward   under weight noise a module that trains sees p + delta of worker v
               backward  gradients are captured; in the last one full buckets leave as they fill
               its end   after the last pass all buckets have arrived, the noise has observed
                         them, and p.grad is the (noisy) mean
    step()               the wrapped optimizer updates; what the noise observed counts from now on

docs/semantics.md has what every other operation does, in whatever order.

With one optimizer in the process the exchange is complete when the last ``backward()`` returns. So
clipping, ``GradScaler`` used the ordinary way, ``step(closure)`` and any look at ``p.grad`` see the
reduced gradients, equal on all ranks, and ``synchronize()`` has nothing left to do. With several
optimizers it is complete after ``synchronize()``, or in ``step()``, as in Horovod itself
(`hvdnoise.ordering`). A parameter without a gradient on some ranks counts as zero there; on all
ranks, it gets a gradient of zeros (as Horovod does).
"""

from __future__ import annotations

import logging
import weakref
from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor

from hvdnoise import comm
from hvdnoise.applied import AppliedNoise, Measured, NoiseCoverage
from hvdnoise.buckets import default_bucket_bytes
from hvdnoise.costs import Plan, Shape, choose
from hvdnoise.displacement import Term
from hvdnoise.exchange import Options
from hvdnoise.noise.base import Noise
from hvdnoise.passes import Passes
from hvdnoise.watch import ModelWatch
from hvdnoise.wrapping import Wrapper, check_arguments, named, wrap


class _DistributedOptimizer(Wrapper):
    """What `DistributedOptimizer` returns; the actual class also inherits the wrapped one."""

    def __init__(self, optimizer: torch.optim.Optimizer, applied: AppliedNoise, options: Options,
                 plan: Plan, *, noise_in_eval: bool, **layout: Any) -> None:
        super().__init__(optimizer)
        self.applied, self._plan = applied, plan
        self._should_synchronize = True
        world, noise = applied.world, applied.noise
        self._passes: Passes | None = None  # None: nothing to exchange, nothing is hooked
        if world.size > 1 or (world.size == 1 and (noise or applied.virtual_workers > 1)):
            if noise is not None and (noise.acts_on == "weights" or _counts_examples(noise)):
                applied.watch = ModelWatch(_terms_of(weakref.ref(self)), layout["names"],
                                           displaces=noise.acts_on == "weights",
                                           in_eval=noise_in_eval)
            self._passes = Passes(applied, options, optimizer=optimizer, **layout)

    def _terms(self) -> dict[Tensor, Term]:
        """What the next forward that trains is to be displaced by."""
        passes = self._passes
        if passes is None:
            return {}
        return self.applied.terms(passes.worker, passes.learning_rates)

    # ------------------------------------------------------------------ what there is to know

    @property
    def noise(self) -> Noise | None:
        """The noise that was given."""
        return self.applied.noise

    @property
    def virtual_workers(self) -> int:
        """V, the workers of this rank."""
        return self.applied.virtual_workers

    @property
    def steps(self) -> int:
        """Steps taken, by which schedules and random streams count."""
        return self.applied.steps

    @property
    def examples_per_worker(self) -> int:
        """Examples that the passes of this rank's last worker have had; 0 where nobody counts."""
        return self.applied.examples_per_worker

    @property
    def noise_coverage(self) -> NoiseCoverage:
        """In how many steps noise on the weights was due, and in how many of them some gradient
        came from clean weights; on this rank, since the optimizer was made."""
        return self.applied.coverage

    @property
    def measure(self) -> bool:
        """Whether each step computes `measured`: one more pass over the gradients, and 16 bytes
        through an allreduce. Set it alike on all ranks, before the first backward of a step."""
        return self.applied.measure

    @measure.setter
    def measure(self, on: bool) -> None:
        self.applied.measure = on

    @property
    def measured(self) -> Measured | None:
        """The norms of the last exchange that was measured."""
        return self.applied.measured

    @property
    def loss_scale(self) -> float | Callable[[], float]:
        """The factor of the loss: a number or a function, such as a GradScaler's ``get_scale``."""
        return self.applied.loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: float | Callable[[], float]) -> None:
        self.applied.loss_scale = scale

    @property
    def communication_seconds(self) -> float:
        """Seconds that this rank waited for the last exchange."""
        exchange = self._passes.exchange if self._passes is not None else None
        return exchange.seconds if exchange is not None else 0.0

    @property
    def exchange_plan(self) -> str:
        """How the gradients and the noise travel: one of `hvdnoise.costs.PLANS`."""
        return self._plan.name

    @property
    def exchange_reason(self) -> str:
        """Why this plan was taken, in words."""
        return self._plan.reason

    @property
    def noise_memory(self) -> int:
        """Bytes that this rank takes for the noise: the most of rows and displaced weights, and the
        most that was in flight, at a time."""
        exchange = self._passes.exchange if self._passes is not None else None
        return self.applied.memory + (exchange.memory if exchange is not None else 0)

    # ------------------------------------------------------------------ the step

    def weigh(self, losses: Tensor) -> Tensor:
        """The loss of a backward pass from its examples' losses.

        Args:
            losses: (examples,), from a criterion with ``reduction="none"``.

        Returns:
            Their mean; under covariance noise from examples, the mean with the noise's weights.
        """
        if losses.dim() != 1:
            raise ValueError(f"losses of shape {tuple(losses.shape)}: weigh() needs one loss per "
                             'example, from a criterion with reduction="none"')
        if self._passes is None:
            return losses.mean()
        v, part = divmod(self._passes.done % self._passes.total, self._passes.per_worker)
        return self.applied.weigh(losses, v, part, self._passes.per_worker)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside are not exchanged, and count for nothing but ``p.grad``.

        Their gradients stay this rank's own and add up in ``p.grad``; the next backward pass
        outside exchanges the sum.
        """
        if self._passes is None:
            yield
            return
        before, self._passes.synced = self._passes.synced, False
        try:
            yield
        finally:
            self._passes.synced = before

    def synchronize(self) -> None:
        """Have the exchanged gradients in ``p.grad``, where they are after backward() anyway.

        With fewer than ``backward_passes_per_step`` passes made, or with gradients set by hand,
        they are exchanged now. A rank whose loss reached no parameter in this step calls this, to
        take part with zeros.

        Raises:
            RuntimeError: when some of its virtual workers have had no backward pass.
        """
        if self._passes is not None and not self._passes.reduced:
            self._passes.complete(or_zeros=True)

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """``step()`` inside does not call `synchronize` (Horovod's idiom)."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Clear the gradients; a new step begins. The arguments are the wrapped optimizer's.

        Raises:
            RuntimeError: between the backward passes of one step.
        """
        passes = self._passes
        if passes is not None and (passes.broken or passes.open
                                   or 0 < passes.done < passes.total):
            raise RuntimeError(f"zero_grad() after {passes.done} of {passes.total} backward "
                               "passes: call step() first, or reset() to drop them")
        self._begin_step()
        self._optimizer.zero_grad(*args, **kwargs)
        if passes is not None:
            passes.prepare()  # so that hooks are there before the first gradient

    def reset(self) -> None:
        """Drop the backward passes of an unfinished step and their gradients, on all ranks alike.

        Raises:
            RuntimeError: when a part of the gradients is under way to the other ranks.
        """
        passes = self._passes
        if passes is not None and not passes.under_way and passes.exchange is not None \
                and passes.exchange.in_flight:
            raise RuntimeError("backward() broke off while gradients were being exchanged, and the "
                               "other ranks wait for the rest: end this process")
        self._begin_step()
        self._optimizer.zero_grad()

    def _begin_step(self) -> None:
        if self._passes is not None:
            self._passes.begin_step()
            self.applied.begin_step()

    def distributed_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights with the exchanged gradients.

        Args:
            closure: clears the gradients, runs forward and backward, returns the loss. A noise
                with lag 0 needs it and calls it twice: the first pass gives the deviations.

        Raises:
            RuntimeError: without a backward pass before, or without the closure that lag 0 needs.
        """
        if self._passes is None:
            return self._optimizer.step() if closure is None else self._optimizer.step(closure)
        lag_0 = self.noise is not None and self.noise.lag == 0
        if closure is not None:
            closure = self._exchanged(closure)
            loss = self._two_pass_step(closure) if lag_0 else self._optimizer.step(closure)
        elif lag_0:
            raise RuntimeError("noise with lag=0 evaluates each batch twice: call step(closure)")
        else:
            if self._should_synchronize:
                self._complete()
            loss = self._optimizer.step()
        self._passes.begin_step()
        self.applied.end_step()
        return loss

    def _exchanged(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._complete()
            return loss
        return evaluate

    def _finish_exchange(self) -> None:
        passes = self.__dict__.get("_passes")
        if passes is not None and passes.under_way:
            passes.complete(or_zeros=False)

    def _complete(self) -> None:
        if self._passes is not None and not self._passes.reduced:
            self._passes.complete(or_zeros=False)

    def _two_pass_step(self, closure: Callable[[], Any]) -> Any:
        noise, watch = self.noise, self.applied.watch
        assert noise is not None and watch is not None
        self.applied.history.forget()
        closure()
        self.applied.history.commit()
        statistics = watch.normalization_statistics()
        self.applied.observing = False
        try:
            loss = self._optimizer.step(closure)
        finally:
            self.applied.observing = True
        for buffer, before in statistics:
            buffer.copy_(before)
        return loss

    def set_backward_passes_per_step(self, passes: int) -> None:
        """As Horovod's, between two steps."""
        if self._passes is not None:
            self._passes.per_worker = passes

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and, under "hvdnoise", the noise's: this rank's own."""
        state = self._optimizer.state_dict()
        if self.noise is not None:
            state["hvdnoise"] = self.applied.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; one without "hvdnoise" starts the noise anew."""
        state = dict(state_dict)
        own = state.pop("hvdnoise", None)
        self._begin_step()
        self._optimizer.load_state_dict(state)
        if self._passes is not None:
            self._passes.prepare()
            self.applied.load_state_dict(own, self._passes.layout, self._passes.by_name())


def _counts_examples(noise: Noise) -> bool:
    """Whether the noise wants to know how many examples a worker has."""
    return noise.acts_on in ("workers", "mean") and not getattr(noise, "batch_size", None)


def _terms_of(reference: weakref.ref[_DistributedOptimizer]) -> Callable[[], dict[Tensor, Term]]:
    def terms() -> dict[Tensor, Term]:
        optimizer = reference()
        return optimizer._terms() if optimizer is not None else {}
    return terms


def DistributedOptimizer(
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None, compression: Any = None,
        backward_passes_per_step: int = 1, op: Any = "average",
        gradient_predivide_factor: float = 1.0, num_groups: int = 0,
        groups: int | list[list[Tensor]] | None = None, sparse_as_dense: bool = False,
        process_set: Any = None, *, noise: Noise | None = None, virtual_workers: int = 1,
        exchange: str = "auto", noise_precision: str = "fp32", bucket_bytes: int | None = None,
        noise_in_eval: bool = False, world: comm.World | None = None) -> Any:
    """Wrap an optimizer so that it averages gradients over the ranks, with structured noise.

    The first ten arguments are those of ``hvd.DistributedOptimizer`` of Horovod 0.28.1, with the
    same meaning; the returned object is an instance of the wrapped optimizer's class.

    Args:
        optimizer: the optimizer that updates the weights.
        named_parameters: (name, parameter) pairs, usually ``model.named_parameters()``.
        compression: for the transport, as ``hvd.Compression.fp16``; default none.
        backward_passes_per_step: k backward passes whose gradients add up to one worker's.
        op: ``hvd.Average``, ``Sum``, ``Min``, ``Max``, ``Product``, or ``Adasum``, which is
            handed to Horovod's own optimizer (without noise).
        gradient_predivide_factor: divides before the sum, and multiplies after it.
        num_groups: Horovod's older name of ``groups`` as a number.
        groups: parameters that travel together: a number of groups, or lists of parameters.
        sparse_as_dense: make sparse gradients dense for the transport.
        process_set: the ranks that take part; default all.
        noise: `GNC`, `CovarianceNoise` or None. It needs ``op=Average``.
        virtual_workers: V workers on this rank, each with backward passes and a mean loss of its
            own; the gradient is the mean over all W = ranks * V workers.
        exchange: the plan by which noise that mixes all workers' deviations travels: "auto" (the
            fewest bytes), "allgather", "gather-only", "transpose", "group" (allgather among the
            ranks of a host) or "group:K" (among K consecutive ranks; it changes the noise's law,
            see hvdnoise.noise.gnc); "own" for what needs nothing from other workers. The same on
            all ranks.
        noise_precision: of deviations and mixtures on the wire: "fp32" (as the gradients are),
            "bf16" or "fp16". The gradients themselves always travel in full.
        bucket_bytes: limit of a bucket; default a quarter of the parameters, from 1 to 25 MiB,
            or HOROVOD_FUSION_THRESHOLD where that is smaller; 0: each parameter travels alone, in
            Horovod's order of additions.
        noise_in_eval: whether noise on the weights is also seen by modules in evaluation mode,
            when gradients are enabled: for models that train in that mode.
        world: the ranks, in place of Horovod's (tests).

    Raises:
        ValueError: for a bad argument, or noise that needs more workers than there are.
        RuntimeError: when Horovod has not been started.
    """
    if isinstance(optimizer, Wrapper):
        raise ValueError("the optimizer is a DistributedOptimizer already: wrap the plain one")
    reduction = op if isinstance(op, str) else comm.op_name(op)
    groups = groups if groups is not None else num_groups or None
    parameters = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    limit = default_bucket_bytes(sum(p.nbytes for p in parameters)) if bucket_bytes is None \
        else bucket_bytes
    check_arguments(backward_passes_per_step=backward_passes_per_step, op=reduction,
                    gradient_predivide_factor=gradient_predivide_factor, groups=groups,
                    virtual_workers=virtual_workers, bucket_bytes=limit, noise=noise)
    if reduction == "adasum":
        return comm.adasum_optimizer(optimizer, named_parameters=named_parameters,
                                     compression=compression, process_set=process_set,
                                     backward_passes_per_step=backward_passes_per_step)
    names = named(optimizer, named_parameters)
    world = world or comm.HorovodWorld(process_set)
    num_workers = world.size * virtual_workers
    if noise is not None and 0 < num_workers < noise.min_workers:
        raise ValueError(f"{type(noise).__name__} needs deviations between at least "
                         f"{noise.min_workers} workers and there is {num_workers}: start more "
                         "ranks, or pass virtual_workers=2 or more and as many backward passes")
    if getattr(compression, "__name__", None) == "NoneCompressor":
        compression = None
    shape = Shape(sum(p.numel() for p in parameters), max(1, world.size), virtual_workers,
                  max((p.dtype.itemsize for p in parameters), default=4), noise_precision)
    mixes = noise is not None and noise.mixes
    plan = choose(exchange, shape, mixes=mixes, local_size=world.local_size,
                  plain_mean=compression is None and gradient_predivide_factor == 1.0)
    if mixes and world.rank == 0:
        logging.getLogger("hvdnoise").info("exchange plan %s: %s", plan.name, plan.reason)
    options = Options(op=reduction, compression=compression, sparse_as_dense=sparse_as_dense,
                      gradient_predivide_factor=gradient_predivide_factor,
                      keep_rows=noise is not None and noise.looks,
                      lag=max(1, noise.lag) if noise is not None else 1, plan=plan.name,
                      precision=noise_precision,
                      peers=world.group(plan.group_size) if plan.name == "group" else None)
    applied = AppliedNoise(noise, world, virtual_workers)
    return wrap(_DistributedOptimizer, optimizer, applied, options, plan, names=names,
                noise_in_eval=noise_in_eval, per_worker=backward_passes_per_step,
                bucket_bytes=limit, bucket_groups=groups)
