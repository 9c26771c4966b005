"""A noise at work in an optimizer: what happens to it in the course of a step, on this rank.

Here a noise, which gets numbers only, meets the model's weights, the exchange and the other ranks.
Without a noise it does nothing, and counts the steps.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from dataclasses import replace
from typing import Any, Callable

import torch
from torch import Tensor, nn

from hvdnoise.buckets import Bucket, Layout
from hvdnoise.comm import World
from hvdnoise.displacement import Term
from hvdnoise.exchange import Exchange
from hvdnoise.kept_state import KeptState
from hvdnoise.layers import LayerStatistics
from hvdnoise.measured import Measured, Measurement
from hvdnoise.mixing import total
from hvdnoise.noise.base import (
    ExampleNoise,
    LayerNoise,
    MeanNoise,
    MeanObservingNoise,
    Noise,
    Observation,
    StepContext,
    WeightNoise,
    WorkerNoise,
    check_returned,
    part,
    parts_of,
)
from hvdnoise.pending import PendingObservation
from hvdnoise.per_example import ExampleStatistics, LossesOf, check_model, example_gradients
from hvdnoise.roots import roots
from hvdnoise.spectrum import Spectrum, SpectrumObserver
from hvdnoise.streams import generator
from hvdnoise.watch import ModelWatch
from hvdnoise.weight_noise import Displacements, NoiseCoverage, Rates


class NoiseState:
    """A noise (or None) with the state of the step under way.

    Attributes:
        steps: steps taken; schedules and random streams count by it.
        measure: whether each step computes `measured`.
        loss_scale: the factor of the loss, or a function that tells it (a GradScaler's
            ``get_scale``); what the noise observes is divided by it.
        spectrum_batch: b, examples of a worker, in the steps whose `spectrum` is wanted; else None.
        spectrum: of the last step for which it was wanted; None for one worker.
        observing: whether the noise may observe; not in the second pass of lag 0.
        first_pass: whether this is the first pass of lag 0, whose mean nobody uses.
        repeated: whether the step under way repeats the batch of the one before, for a noise with
            ``echo``; None: in each second step.
        dropped: whether there has been a step that was not taken, by which steps are miscounted.
        watch: the calls of the model's modules; None where no noise needs to know of them.
        sums_gradients: whether the exchange keeps sums of each worker's gradient.
        exchanged_sum: () the sum of the step's mean gradients before noise was added to them; None
            where none ever is, and without ``sums_gradients``.
        memory: the most bytes that rows, statistics, what the noise keeps and displaced weights
            took at a time.
    """

    def __init__(self, noise: Noise | None, world: World, virtual_workers: int) -> None:
        self.noise, self.world, self.virtual_workers = noise, world, virtual_workers
        self.steps = self.memory = 0
        self.measure = False
        self.measured: Measured | None = None
        self.spectrum_batch: int | None = None
        self.spectrum: Spectrum | None = None
        self.sums_gradients = False
        self.exchanged_sum: Tensor | None = None
        self._observer = SpectrumObserver()
        self.loss_scale: float | Callable[[], float] = 1.0
        self.observing, self.first_pass = True, False
        self._repeated: bool | None = None
        self.dropped = False
        self.watch: ModelWatch | None = None
        weights = part(noise, WeightNoise)
        self._weights = Displacements(weights) if weights is not None else None
        self._mean, self._mean_observer = part(noise, MeanNoise), part(noise, MeanObservingNoise)
        self._worker, self._example = part(noise, WorkerNoise), part(noise, ExampleNoise)
        # of the last steps that were taken, for a noise that needs them `lag` steps later
        self._past: deque[PendingObservation] = deque(maxlen=max(1, noise.lag if noise else 1))
        self._pending: PendingObservation | None = None  # of the step under way
        self._kept = KeptState(parts_of(noise))
        self._last_examples = 0
        self._layers = LayerStatistics()  # for a noise that sees layers
        self._counts = False  # the examples of the calls
        self._from_examples = ExampleStatistics()  # for a noise that sees examples
        self._weighed = False  # what the next backward pass comes from
        self.forget_passes()

    def watch_model(self, terms: weakref.WeakMethod[Any], names: dict[Tensor, str], *,
                    in_eval: bool) -> None:
        """Have the calls of the model's modules watched, if the noise needs to know of them."""
        self._counts = any(not getattr(each, "batch_size", None)
                           for each in (self._worker, self._mean) if each is not None)
        if (layered := part(self.noise, LayerNoise)) is not None:
            layered.check_names(names.values())
            self._layers = LayerStatistics(names, layered.wants_layer, lambda: (
                not self.first_pass and self._is_due(layered)))
        if self._counts or self._weights is not None or layered is not None:
            self.watch = ModelWatch(terms, names, displaces=self._weights is not None,
                                    in_eval=in_eval, on_module=self._layers.watch)

    @property
    def repeated(self) -> bool | None:
        return self._repeated

    @repeated.setter
    def repeated(self, told: bool | None) -> None:
        self._repeated = told
        if told is False and self._echoes:  # another batch than that of the last observation
            self._past.clear()

    @property
    def _echoes(self) -> bool:
        return self._weights is not None and self._weights.noise.echo

    @property
    def _repeats(self) -> bool:
        """Whether the step under way is a repetition."""
        if self._repeated is None and self.dropped:
            raise RuntimeError("a step was dropped, and noise with echo=True takes each second "
                               "step for a repetition: set optimizer.repeated before each step")
        return self.steps % 2 == 1 if self._repeated is None else self._repeated

    def forget_passes(self) -> None:
        """Nothing of the passes under way remains; what they have shown is dropped."""
        self._pending = None
        self._kept.drop()
        self._worker_weights: dict[float, list[float]] = {}  # by examples of a worker
        self._measurement = Measurement()
        self._weight_deviation: float | None = None
        self._examples: list[list[int]] = [[]]  # by worker and pass
        self._from_examples.forget()
        self._layers.forget()
        self._observer.forget()
        if self._weights is not None:
            self._weights.forget_passes()

    def step_taken(self) -> None:
        """What was observed and set in this step counts from now on."""
        if self._weights is not None:
            self._weights.step_taken()
        self._kept.commit()
        if self.noise is not None and self.noise.lag == 0:
            self.forget_observations()
        self.keep_observation()
        self.steps += 1
        self._weighed = False
        if self.watch is not None:
            self.watch.end_step()
        self.forget_passes()

    def keep_observation(self) -> None:
        """Keep what was observed, if the noise needs it in a later step."""
        if self._weights is not None and (own := self._seen_by(self._weights.noise)) is not None:
            own.beside = None
            self._past.append(own)
        self._pending = None

    def forget_observations(self) -> None:
        """The next step is as the first."""
        self._pending = None
        self._past.clear()

    def start_observation(self, layout: Layout) -> PendingObservation | None:
        """What the noise is to observe of the exchange whose first backward pass begins."""
        self._kept.begin(layout)
        mean, weights = self._mean, None if self._weights is None else self._weights.noise
        self._pending = None
        if mean is not None and mean.statistics and not self.first_pass and self._is_due(mean):
            self._pending = PendingObservation(
                mean, self.context(of=mean), layout, self._current_loss_scale,
                statistics=self._from_examples.sums if mean.sees_examples else None)
        if self._echoes and not self._repeats:
            self._past.clear()
        if weights is not None and self.observing and self._is_due(weights) and not (
                self._echoes and self._repeats):
            of_weights = PendingObservation(
                weights, self.context(of=weights), layout, self._current_loss_scale,
                stays=self.first_pass and weights.needs_no_mean)
            self._pending, of_weights.beside = of_weights, self._pending
        if self.spectrum_batch and not self.first_pass and self.context().num_workers > 1:
            of_spectrum = PendingObservation(
                self._observer, self.context(self.spectrum_batch), layout,
                self._current_loss_scale)
            if self._pending is None:
                self._pending = of_spectrum
            else:
                self._pending.each()[-1].beside = of_spectrum
        return self._pending

    def _is_due(self, noise: Noise) -> bool:
        """Whether a noise observes in this step."""
        return self.steps % noise.every == 0 or not self._kept.has(noise)

    def _seen_by(self, noise: Noise) -> PendingObservation | None:
        """What a noise observes in this step."""
        return next((each for each in (self._pending.each() if self._pending else ())
                     if each.noise is noise), None)

    def observe_examples(self, layout: Layout, names: dict[Tensor, str],
                         of: tuple[nn.Module, LossesOf, Tensor, Tensor], where: tuple[int, int]
                         ) -> bool:
        """Show a noise that `sees_examples` the gradients of a pass's, if they are due; whether.

        Args:
            names: of the parameters.
            of: the model, its losses, inputs and targets.
            where: the number of this rank's worker, and of its pass.
        """
        noise = self._mean
        if noise is None or not noise.sees_examples or (
                self._kept.has(noise, layout) and not self._is_due(noise)):
            return False
        (model, _, inputs, _), (v, number), context = of, where, self.context(of=noise)
        found = check_model(model, [p for bucket in layout.buckets for p in bucket.parameters],
                            names)
        sampling = None
        if noise.labels == "sampled":
            sampling = generator(noise.seed, "labels", self.steps, context.workers[v], number)
        self._from_examples.add(noise, layout, context, len(inputs),
                                example_gradients(found, *of, sampling))
        return True

    def check_observed(self) -> None:
        """Raise where the examples of the pass that begins were not shown but had to be."""
        if self._observes_examples and self._from_examples.count_of_pass is None:
            raise RuntimeError("this noise sees the gradients of single examples in this step: "
                               "call optimizer.observe_examples(model, losses_of, inputs, "
                               "targets) before backward()")

    def _current_loss_scale(self) -> float:
        return float(self.loss_scale() if callable(self.loss_scale) else self.loss_scale)

    @property
    def sees_examples(self) -> bool:
        """Whether the noise asks for the gradients of single examples, in some steps."""
        return self._mean is not None and self._mean.sees_examples

    @property
    def _observes_examples(self) -> bool:
        return self.sees_examples and self._mean is not None \
            and self._seen_by(self._mean) is not None

    def context(self, examples: float = 0, of: Noise | None = None) -> StepContext:
        """The step under way; ``examples``: of a worker; ``of``: the noise whose state it has."""
        first = self.world.rank * self.virtual_workers
        return StepContext(step=self.steps, num_workers=self.world.size * self.virtual_workers,
                           workers=range(first, first + self.virtual_workers),
                           examples_per_worker=examples,
                           state={} if of is None else self._kept.of(of))

    # ------------------------------------------------------------------ before the reduction

    @property
    def coverage(self) -> NoiseCoverage:
        """Of the steps so far."""
        return self._weights.coverage if self._weights is not None else NoiseCoverage()

    def keep_sums(self) -> None:
        """From now on keep the sums by which one sees whether all is finite."""
        self.sums_gradients = True
        if self._weights is not None:
            self._weights.keeps_total = True

    @property
    def displacement_sum(self) -> Tensor | None:
        """() of the last worker's forward; see `Displacements`."""
        return self._weights.total if self._weights is not None else None

    def forget_displacements(self) -> None:
        """The next forward forms its displacements anew."""
        if self._weights is not None:
            self._weights.forget()

    def terms(self, v: int, learning_rates: Rates) -> dict[Tensor, Term]:
        """The delta of each parameter for this rank's worker number ``v``; see `Displacements`."""
        if self._weights is None:
            return {}
        due = self._due
        formed = self._weights.are_of(due, v)
        if formed and not self.measure:
            return self._weights.terms
        state = self._kept.of_displacement(self._weights.noise)
        context = replace(self.context(), state=state)
        if not formed:
            with torch.no_grad():
                self._weights.form(due, v, context, learning_rates)
            self._note_memory(self._weights.memory)
        if self.measure:
            with torch.no_grad():
                self._weights.measure(context, learning_rates)
        return self._weights.terms

    @property
    def _due(self) -> PendingObservation | None:
        """The observation by which the step under way is displaced; None: it is not."""
        if self._echoes and not self._repeats:
            return None
        return self._past[0] if len(self._past) == self._past.maxlen else None

    def _note_memory(self, displaced: int = 0) -> None:
        """The displaced weights are gone before the rows of the step are there."""
        held = [each for seen in (*self._past, self._pending) if seen for each in seen.tensors]
        held += self._kept.tensors()
        once = {each.untyped_storage().data_ptr(): each.nbytes for each in held}
        self.memory = max(self.memory, sum(once.values()) + displaced)

    def check_displaced(self, p: Tensor, v: int, learning_rates: Rates, *, by_hand: bool = False
                        ) -> None:
        """Backward has given ``p`` a gradient: note whether it came from displaced weights."""
        if self.watch is None or self._weights is None:
            return
        if not by_hand:
            self.watch.note_gradient(p)
        self.terms(v, learning_rates)
        self._weights.check(p, v, self.watch)

    def weigh(self, losses: Tensor, v: int, number: int, parts: int) -> Tensor:
        """The loss of part ``number`` of ``parts`` of a worker's batch, from its examples' ones."""
        noise = self._example
        if noise is None:
            return losses.mean()
        context = self.context(len(losses) * parts, of=noise)
        self._weight_deviation = noise.weight_deviation(context)
        weights = noise.example_weights(context.workers[v], number, len(losses), context)
        self._weighed = True
        return (weights.to(losses) * losses).mean()

    def check_weighed(self) -> None:
        """Raise where the loss of the pass that begins was not weighed but had to be."""
        if self._example is not None and not self._weighed:
            raise RuntimeError("covariance noise from examples weighs their losses: call "
                               "loss = optimizer.weigh(losses) before backward()")
        self._weighed = False

    def worker_weight(self, v: int, p: Tensor, *, in_pass: bool) -> float:
        """The factor of the gradient of this rank's worker number ``v``, in ``p.grad``."""
        noise = self._worker
        if noise is None or p.grad is None:
            return 1.0
        examples = self._examples[-1] + ([] if self.watch is None else [
            self.watch.examples(repeated=in_pass)])
        context = self.context(sum(examples), of=noise)
        known = self._worker_weights
        if context.examples_per_worker not in known:
            self._weight_deviation = noise.weight_deviation(context)
            weights_W = noise.worker_weights(context).tolist()
            known[context.examples_per_worker] = [weights_W[i] for i in context.workers]
        return known[context.examples_per_worker][v]

    def captured(self, grad: Tensor | None) -> None:
        """A worker's gradient of one parameter is known."""
        if self.measure and grad is not None:
            self._measurement.worker(grad)

    def begin_pass(self, *, counts: bool) -> None:
        """A backward pass has begun; ``counts``: it is one of the step, if it comes to its end."""
        self._layers.begin_pass(counts=counts)

    def end_pass(self, *, counts: bool, in_pass: bool = True) -> None:
        """A backward pass is through; ``counts``: it was one of the step."""
        self._layers.end_pass()
        shown, self._from_examples.count_of_pass = self._from_examples.count_of_pass, None
        if self.watch is None:
            return
        if counts and self._counts:
            examples = self.watch.examples(repeated=in_pass)
            self._examples[-1].append(examples)
            if shown is not None and examples > 0 and examples != shown:
                raise ValueError(f"observe_examples() was given {shown} examples and the forward "
                                 f"had {examples}: give it the whole batch of the pass")
        self.watch.end_pass()
        if self._weights is not None:
            self._weights.warn(self.watch)

    def end_worker(self) -> None:
        """The next pass is another worker's."""
        self._last_examples = sum(self._examples[-1])
        given = getattr(self._mean, "batch_size", None) or self._last_examples
        self._layers.end_worker(given / self._current_loss_scale())
        self._examples.append([])

    # ------------------------------------------------------------------ after the reduction

    def examples(self) -> float:
        """Of this rank's workers together; nan where a call has no tensor that would tell."""
        self._note_memory()
        if self._observes_examples:
            return self._from_examples.count
        examples = [each for worker in self._examples for each in worker]
        return sum(examples) if min(examples, default=0) >= 0 else math.nan

    @property
    def examples_per_worker(self) -> int:
        """Of this rank's last worker whose passes are through; 0 where nobody counts."""
        return max(0, self._last_examples)

    def add_to_mean(self, exchange: Exchange) -> None:
        """Show the mean gradients to the noise and add it to them, where it acts on them."""
        noise, observer = self._mean, self._mean_observer
        if self.first_pass:  # whose mean nobody uses
            return
        if (seen := self._seen_by(self._observer)) is not None:
            self.spectrum = self._observer.spectrum(exchange, self.world, seen,
                                                    self._current_loss_scale())
        if self.measure and (noise is not None or observer is not None):
            self._measurement.mean([flat for _, flat in exchange.reduced()])
        if self.sums_gradients and (noise is not None or observer is not None):
            self.exchanged_sum = total([flat for _, flat in exchange.reduced()])
        if observer is not None:
            self._show_means(observer, exchange)
        if noise is None:
            return
        observation = self._seen_by(noise) or self._unobserved(exchange)
        workers = self.world.size * self.virtual_workers
        context, scale = self.context(observation.examples / workers, of=noise), \
            self._current_loss_scale()
        if isinstance(noise, LayerNoise) and self._seen_by(noise) is not None:
            self._show_layers(noise, exchange, context)
        for bucket, reduced_N in exchange.reduced():
            noise_N = noise.mean_noise(bucket, observation, context)
            self._add(noise, "mean_noise", bucket, noise_N, reduced_N, scale)

    def _show_means(self, noise: MeanObservingNoise, exchange: Exchange) -> None:
        context = replace(self.context(), state=self._kept.of_mean(noise))
        scale = self._current_loss_scale()
        for bucket, reduced_N in exchange.reduced():
            mean_N = reduced_N / scale if scale != 1 else reduced_N
            added_N = noise.observe_mean(bucket, mean_N, context)
            if added_N is not None:
                self._add(noise, "observe_mean", bucket, added_N, reduced_N, scale)
        self._note_memory()

    def _show_layers(self, noise: LayerNoise, exchange: Exchange, context: StepContext) -> None:
        examples = getattr(noise, "batch_size", None) or context.examples_per_worker
        found = self._layers.reduce(exchange.layout, examples * context.num_workers, self.world,
                                    f"{exchange.label}.layers")
        places = {layer: bucket for layer, (bucket, _) in found.items()}
        wanted = {layer: noise.observe_layer(bucket, layer, *found.pop(layer)[1], context)
                  for layer, bucket in places.items()}
        rooted = roots([each for pair in wanted.values() for each in pair], noise.rank,
                       self.world, f"{exchange.label}.roots")
        for layer, pair in zip(wanted, zip(rooted[::2], rooted[1::2])):
            noise.take_roots(places[layer], layer, *pair, context)

    def _add(self, noise: Noise, call: str, bucket: Bucket, noise_N: Tensor, reduced_N: Tensor,
             scale: float) -> None:
        check_returned(noise, call, noise_N, tuple(reduced_N.shape))
        reduced_N.add_(noise_N, alpha=scale)
        if self.measure:
            self._measurement.added(bucket, noise_N)

    def _unobserved(self, exchange: Exchange) -> Observation:
        """For a noise that does not observe: the examples alone."""
        examples = torch.tensor([self.examples()], dtype=torch.float64)
        handle = self.world.allreduce_(examples, name=f"{exchange.label}.examples", op="sum")
        return Observation(exchange.layout, {}, {}, float(handle.wait()))

    def measure_norms(self, exchange: Exchange, learning_rates: Rates) -> None:
        """Compute `measured`, if it is wanted."""
        if not self.measure:
            return
        known = self.noise is None or any(
            each is not None for each in (self._weights, self._mean, self._mean_observer))
        self.measured = self._measurement.finish(
            [flat for _, flat in exchange.reduced()], exchange.layout, self._weights,
            self._due, learning_rates, self.world, workers=self.virtual_workers,
            loss_scale=self._current_loss_scale(), name=f"{exchange.label}.measure", known=known,
            weight_deviation=self._weight_deviation)

    # ------------------------------------------------------------------ state

    @property
    def _kind(self) -> str:
        return " + ".join(type(each).__name__ for each in parts_of(self.noise)) or "NoneType"

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, for a bitwise resumption; once the exchange has been waited for."""
        state: dict[str, Any] = {"steps": self.steps, "noise": self._kind,
                                 "seen": [each.state_dict() for each in self._past]}
        if kept := self._kept.state_dict():
            state["kept"] = kept
        return state

    def load_state_dict(self, state: dict[str, Any] | None, layout: Layout,
                        parameters: dict[str, Tensor]) -> None:
        """Take over a state; None starts the noise anew.

        Raises:
            ValueError: for a state of other parameters, workers or another noise.
        """
        self.forget_passes()
        self.forget_observations()
        of_buckets = self._kept.load_state_dict((state or {}).get("kept", {}), layout)
        if self._weights is not None:
            self._weights.forget()
        self.steps, self.dropped = state["steps"] if state else 0, False
        if self.noise is None or not state:
            return
        weights = part(self.noise, WeightNoise)
        past = [None if weights is None else PendingObservation.restore(
            each, weights, self.context(of=weights), layout, parameters) for each in state["seen"]]
        if None in past or not of_buckets or state.get("noise", self._kind) != self._kind:
            self._kept.load_state_dict({}, layout)
            raise ValueError("the loaded deviations are of other buckets, workers or another "
                             "noise: resume with the same bucket_bytes, ranks, virtual_workers "
                             "and noise, or drop \"hvdnoise\" from the optimizer's state to "
                             "start the noise anew")
        if self._weights is not None:
            self._past.extend(each for each in past if each is not None)
