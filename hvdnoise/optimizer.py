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
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hvdnoise import comm
from hvdnoise.buckets import default_bucket_bytes
from hvdnoise.exchange_plan import Shape
from hvdnoise.measured import Measured
from hvdnoise.noise.base import (
    MeanObservingNoise,
    Noise,
    WeightNoise,
    check_count,
    check_displaces,
    check_noise,
    part,
)
from hvdnoise.noise.composed import compose
from hvdnoise.noise_state import NoiseState
from hvdnoise.parameters import OptimizerParameters
from hvdnoise.plans import Choice, choose
from hvdnoise.spectrum import Spectrum
from hvdnoise.step import StepRunner
from hvdnoise.tasks import Options
from hvdnoise.weight_noise import NoiseCoverage
from hvdnoise.wrapping import Wrapper, check_arguments, named, wrap


class _DistributedOptimizer(Wrapper):
    """What `DistributedOptimizer` returns; the actual class also inherits the wrapped one."""

    def __init__(self, optimizer: torch.optim.Optimizer, state: NoiseState, options: Options,
                 choice: Choice, *, names: dict[Tensor, str], noise_in_eval: bool, per_worker: int,
                 **layout: Any) -> None:
        super().__init__(optimizer)
        self._noise_state, self._choice = state, choice
        self._should_synchronize = True
        world, noise = state.world, state.noise
        self._runner: StepRunner | None = None  # None: nothing to exchange, nothing is hooked
        if world.size > 1 or (world.size == 1 and (noise or state.virtual_workers > 1)):
            parameters = OptimizerParameters(optimizer, names, **layout)
            self._runner = StepRunner(state, options, parameters, per_worker=per_worker,
                                      noise_in_eval=noise_in_eval)

    # ------------------------------------------------------------------ what there is to know

    @property
    def noise(self) -> Noise | None:
        """The noise that was given; of several, a `Composed` of these ``parts``."""
        return self._noise_state.noise

    @property
    def virtual_workers(self) -> int:
        """V, the workers of this rank."""
        return self._noise_state.virtual_workers

    @property
    def workers(self) -> range:
        """The indices of this rank's workers, among the W of all ranks."""
        return self._noise_state.context().workers

    @property
    def backward_passes_per_step(self) -> int:
        """k, the backward passes whose gradients add up to one worker's."""
        return self._runner.per_worker if self._runner is not None else 1

    @property
    def steps(self) -> int:
        """Steps taken, by which schedules and random streams count."""
        return self._noise_state.steps

    @property
    def examples_per_worker(self) -> int:
        """Examples that the passes of this rank's last worker have had; 0 where nobody counts."""
        return self._noise_state.examples_per_worker

    @property
    def noise_coverage(self) -> NoiseCoverage:
        """In how many steps noise on the weights was due, and in how many of them some gradient
        came from clean weights; on this rank, since the optimizer was made."""
        return self._noise_state.coverage

    @property
    def measure(self) -> bool:
        """Whether each step computes `measured`: one more pass over gradients and noise, and 32
        bytes through an allreduce. Set it alike on all ranks, before a step's first backward."""
        return self._noise_state.measure

    @measure.setter
    def measure(self, on: bool) -> None:
        self._noise_state.measure = on

    @property
    def measured(self) -> Measured | None:
        """The norms of the last exchange that was measured."""
        return self._noise_state.measured

    @property
    def repeated(self) -> bool | None:
        """Whether the step under way repeats the batch of the one before, for a noise with
        ``echo=True``; others ignore it. None, the default: each second step does. Set it alike on
        all ranks, before the step's first forward. In a repetition without a first pass, or whose
        first pass was not taken, nothing is displaced.
        """
        return self._noise_state.repeated

    @repeated.setter
    def repeated(self, told: bool | None) -> None:
        if told not in (True, False, None):
            raise ValueError(f"repeated={told!r} must be True, False or None")
        self._noise_state.repeated = None if told is None else bool(told)

    @property
    def spectrum_batch(self) -> int | None:
        """b, examples of a worker, in the steps whose `spectrum` is wanted; else None. Set it
        alike on all ranks, before the first backward of a step; later it is for the next one. It
        costs an alltoall and V*P."""
        return self._noise_state.spectrum_batch

    @spectrum_batch.setter
    def spectrum_batch(self, examples: int | None) -> None:
        if examples is not None:
            check_count("spectrum_batch", examples, ", the examples of a worker, or None")
        self._noise_state.spectrum_batch = examples

    @property
    def spectrum(self) -> Spectrum | None:
        """Of the workers' covariance in the last step for which it was wanted; None before it, and
        for one worker."""
        return self._noise_state.spectrum

    @property
    def displacement_sum(self) -> Tensor | None:
        """() the sum of the displacements of this rank's last forward, up to signs: finite only
        where all of them are. None where nothing was displaced, and unless `sum_gradients` was
        called."""
        return self._noise_state.displacement_sum

    @property
    def gradient_sums(self) -> list[tuple[int, Tensor]]:
        """Of the last exchange, in the order of its captures: the number of this rank's worker, and
        () the sum of a bucket of its gradient, or of those of the workers up to it: finite only
        where all of them are. Empty unless `sum_gradients` was called."""
        exchange = self._runner.exchange if self._runner is not None else None
        return exchange.sums if exchange is not None else []

    def sum_gradients(self) -> None:
        """From now on keep `gradient_sums`, `displacement_sum` and `exchanged_sum`: one more pass
        over each worker's gradient and displacement, and over the mean."""
        self._noise_state.keep_sums()

    @property
    def exchanged_sum(self) -> Tensor | None:
        """() the sum over the mean gradients of the last step as they were exchanged, alike on all
        ranks, before noise was added to them; None where the noise adds nothing to the mean, or
        `sum_gradients` was not called."""
        return self._noise_state.exchanged_sum

    @property
    def loss_scale(self) -> float | Callable[[], float]:
        """The factor of the loss: a number or a function, such as a GradScaler's ``get_scale``."""
        return self._noise_state.loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: float | Callable[[], float]) -> None:
        self._noise_state.loss_scale = scale

    @property
    def communication_seconds(self) -> float:
        """Seconds that this rank waited for the last exchange."""
        exchange = self._runner.exchange if self._runner is not None else None
        return exchange.seconds if exchange is not None else 0.0

    @property
    def exchange_plan(self) -> str:
        """How the gradients and the noise travel: one of `hvdnoise.plans.PLANS`."""
        return self._choice.name

    @property
    def exchange_reason(self) -> str:
        """Why this plan was taken, in words."""
        return self._choice.reason

    @property
    def noise_memory(self) -> int:
        """Bytes that this rank takes for the noise: the most of rows and displaced weights, and the
        most that was in flight, at a time."""
        exchange = self._runner.exchange if self._runner is not None else None
        return self._noise_state.memory + (exchange.memory if exchange is not None else 0)

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
        return losses.mean() if self._runner is None else self._runner.weigh(losses)

    def observe_examples(self, model: torch.nn.Module,
                         losses_of: Callable[[Tensor, Tensor], Tensor], inputs: Tensor,
                         targets: Tensor) -> bool:
        """Show the noise the gradients of the single examples of the next backward pass.

        Before that pass, for each worker and each of its passes. It costs about a forward and a
        backward where the noise asks for it (``every`` n-th step), and nothing elsewhere.

        Args:
            model: holds the parameters; undisplaced weights, in its mode of now.
            losses_of: (outputs, targets) -> (examples,): the losses whose mean is trained on.
            inputs, targets: of all examples of the pass; the leading dimension counts them.

        Returns:
            Whether the noise asked for them.

        Raises:
            ValueError: for parameters that are not the model's, or BatchNorm in training mode.
            RuntimeError: after the step's last backward pass.
        """
        return self._runner is not None and self._runner.observe_examples(
            model, losses_of, inputs, targets)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside are not exchanged, and are none of the step's passes.

        Their gradients stay this rank's own and add up in ``p.grad``; the next backward pass
        outside exchanges the sum.
        """
        with nullcontext() if self._runner is None else self._runner.no_sync():
            yield

    def synchronize(self) -> None:
        """Have the exchanged gradients in ``p.grad``, where they are after backward() anyway.

        With fewer than ``backward_passes_per_step`` passes made, or with gradients set by hand,
        they are exchanged now. A rank whose loss reached no parameter in this step calls this, to
        take part with zeros.

        Raises:
            RuntimeError: when some of its virtual workers have had no backward pass.
        """
        if self._runner is not None:
            self._runner.complete(or_zeros=True)

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
        step = self._runner
        if step is not None:
            step.check_clearable()
            step.restart()
        self._optimizer.zero_grad(*args, **kwargs)
        if step is not None:
            step.prepare()  # so that hooks are there before the first gradient

    def reset(self) -> None:
        """Drop the step under way and its gradients, on all ranks alike: the noise is as it was
        before, and displacements are formed anew.

        Raises:
            RuntimeError: when a part of the gradients is under way to the other ranks.
        """
        if self._runner is not None:
            self._runner.check_droppable()
            self._runner.restart()
            self._noise_state.forget_displacements()
        self._optimizer.zero_grad()

    def distributed_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights with the exchanged gradients.

        Args:
            closure: clears the gradients, runs forward and backward, returns the loss. A noise
                with lag 0 needs it and calls it twice: the first pass gives the deviations.

        Raises:
            RuntimeError: without a backward pass before, or without the closure that lag 0 needs.
        """
        if self._runner is None:
            return self._optimizer.step() if closure is None else self._optimizer.step(closure)
        lag_0 = self.noise is not None and self.noise.lag == 0
        if closure is not None:
            closure = self._exchanged(closure)
            loss = self._two_pass_step(closure) if lag_0 else self._optimizer.step(closure)
        elif lag_0:
            raise RuntimeError("noise with lag=0 evaluates each batch twice: call step(closure)")
        else:
            if self._should_synchronize:
                self._runner.complete()
            loss = self._optimizer.step()
        self._runner.step_taken()
        return loss

    def _exchanged(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            with torch.enable_grad():
                loss = closure()
            if self._runner is not None:
                self._runner.complete()
            return loss
        return evaluate

    def _finish_exchange(self) -> None:
        step = self.__dict__.get("_runner")
        if step is not None:
            step.complete_if_under_way()

    def _two_pass_step(self, closure: Callable[[], Any]) -> Any:
        state = self._noise_state
        assert state.watch is not None
        state.forget_observations()
        state.first_pass = True
        try:
            closure()
            state.first_pass = False
            state.keep_observation()
            statistics = state.watch.normalization_statistics()
            state.observing = False
            loss = self._optimizer.step(closure)
        except BaseException:  # the step is none
            state.forget_observations()
            raise
        finally:
            state.first_pass, state.observing = False, True
        for buffer, before in statistics:
            buffer.copy_(before)
        return loss

    def set_backward_passes_per_step(self, passes: int) -> None:
        """As Horovod's, between two steps."""
        if self._runner is not None:
            self._runner.per_worker = passes

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and, under "hvdnoise", the noise's: this rank's own."""
        state = self._optimizer.state_dict()
        if self._runner is not None:
            self._runner.wait()
        if self.noise is not None:
            state["hvdnoise"] = self._noise_state.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; one without "hvdnoise" starts the noise anew."""
        state = dict(state_dict)
        own = state.pop("hvdnoise", None)
        if self._runner is not None:
            self._runner.restart()
        self._optimizer.load_state_dict(state)
        if self._runner is not None:
            self._runner.load_noise(own)


def DistributedOptimizer(
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None, compression: Any = None,
        backward_passes_per_step: int = 1, op: Any = "average",
        gradient_predivide_factor: float = 1.0, num_groups: int = 0,
        groups: int | list[list[Tensor]] | None = None, sparse_as_dense: bool = False,
        process_set: Any = None, *, noise: Noise | Sequence[Noise] | None = None,
        virtual_workers: int = 1,
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
        op: ``hvd.Average``, ``Sum``, ``Min``, ``Max``, ``Product``, their names in small letters,
            or ``Adasum``, which is handed to Horovod's own optimizer (without noise).
        gradient_predivide_factor: divides before the sum, and multiplies after it.
        num_groups: Horovod's older name of ``groups`` as a number.
        groups: parameters that travel together: a number of groups, or lists of parameters.
        sparse_as_dense: make sparse gradients dense for the transport.
        process_set: the ranks that take part; default all.
        noise: `GNC`, `CovarianceNoise` or None, or a list of noises that act in different places
            (hvdnoise.noise.composed). It needs ``op=Average``.
        virtual_workers: V workers on this rank, each with backward passes and a mean loss of its
            own; the gradient is the mean over all W = ranks * V workers.
        exchange: the plan by which noise that mixes all workers' deviations travels: "auto" (the
            fewest bytes), "allgather", "gather-only", "transpose", "group" (allgather among the
            ranks of a host) or "group:K" (among K consecutive ranks; it changes the noise's law,
            see hvdnoise.noise.gnc). "allreduce" is the plan of all that needs nothing from other
            workers. The same on all ranks.
        noise_precision: of deviations and mixtures on the wire: "fp32" (as the gradients are),
            "bf16" or "fp16". The gradients themselves always travel in full.
        bucket_bytes: limit of a bucket; default a quarter of the parameters, from 1 to 25 MiB,
            or HOROVOD_FUSION_THRESHOLD where that is smaller; 0: each parameter travels alone, in
            Horovod's order of additions.
        noise_in_eval: whether noise on the weights is also seen by modules in evaluation mode,
            when gradients are enabled: for models that train in that mode.
        world: the ranks; default: all that `hvdnoise.init` knows.

    Raises:
        ValueError: for a bad argument, or noise that needs more workers than there are.
        RuntimeError: when neither Horovod nor torch.distributed has been started.
    """
    if isinstance(optimizer, Wrapper):
        raise ValueError("the optimizer is a DistributedOptimizer already: wrap the plain one")
    noise = compose(noise)
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
    world = world or comm.world_of(process_set)
    check_noise(noise, world.size * virtual_workers)
    check_displaces(noise, [p.shape for p in parameters])
    compression = comm.compressor(compression)
    shape = Shape(sum(p.numel() for p in parameters), max(1, world.size), virtual_workers,
                  max((p.dtype.itemsize for p in parameters), default=4), noise_precision)
    mixes = noise is not None and noise.mixes
    choice = choose(exchange, shape, mixes=mixes, local_size=world.local_size,
                    plain_mean=compression is None and gradient_predivide_factor == 1.0)
    if mixes and world.rank == 0:
        logging.getLogger("hvdnoise").info("exchange plan %s: %s", choice.name, choice.reason)
    options = Options(op=reduction, compression=compression, sparse_as_dense=sparse_as_dense,
                      gradient_predivide_factor=gradient_predivide_factor,
                      keep_rows=noise is not None and (
                          noise.needs_deviations or noise.sees_examples
                          or part(noise, WeightNoise) is not None
                          or part(noise, MeanObservingNoise) is not None),
                      lag=max(1, noise.lag) if noise is not None else 1, plan=choice.plan,
                      precision=noise_precision,
                      peers=world.group(choice.group_size) if choice.plan.grouped else None)
    return wrap(_DistributedOptimizer, optimizer, NoiseState(noise, world, virtual_workers),
                options, choice, names=names, noise_in_eval=noise_in_eval,
                per_worker=backward_passes_per_step, bucket_bytes=limit, groups=groups)
