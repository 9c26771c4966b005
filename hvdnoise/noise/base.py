"""What a noise is: where it acts, what it needs to know, and what it computes from that.

The optimizer calls a noise in the order of a step. A noise gets tensors and numbers, and returns
them. It never sees a model or a collective. Its class says where it acts, and so which calls it
has:

    WorkerNoise     `worker_weights`, before the reduction: a factor for each worker's gradient
    ExampleNoise    `example_weights`, before backward: a factor for each example's loss
    MeanNoise       `mean_noise`, after the reduction: added to the mean gradient
    WeightNoise     `displacement`, before a forward ``lag`` steps later: added to the weights
    MixingNoise     a WeightNoise made of mixtures of all workers' deviations: `mixing_weights`

An `ObservingNoise`, which a noise may be as well, has `observe`: it sees the workers' deviations
d_i = g_i - mean, part by part, and sums up statistics of them. The exchange sums these over the
ranks, mixes rows by the mixing weights, and gives both back as an `Observation`. A
`MeanObservingNoise` has `observe_mean`: it sees the mean gradient of each step, and may add to it.

Random numbers come from `hvdnoise.streams`, keyed by the noise's seed, the step and, where ranks
must differ, the worker. What else a noise keeps from step to step, such as a running mean, it puts
into `StepContext.state`. So a checkpoint holds it, and a step that is not taken does not change it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Literal, MutableMapping, Sequence, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hvdnoise.buckets import Bucket, Layout
from hvdnoise.layers import Layer, layer_bytes, layer_sizes
from hvdnoise.mixing import square_sum
from hvdnoise.roots import Root

Schedule = float | Callable[[int], float]


@dataclass(frozen=True)
class StepContext:
    """What a noise may know about the step under way; equal on all ranks but for ``workers``.

    Attributes:
        step: 0 for the first.
        num_workers: W, of all ranks.
        workers: the indices, among the W, of this rank's workers.
        examples_per_worker: b; 0 where it is not known.
        state: what the noise keeps, tensors and numbers by names of its choice; a tensor that
            belongs to a bucket by `Bucket.key`, or by it, a space and a word. What is set here
            counts once the step is taken.
            Set a new tensor; do not change one in place. It starts anew where the buckets change.
    """

    step: int
    num_workers: int
    workers: range
    examples_per_worker: float
    state: MutableMapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Statistics:
    """How many numbers a noise sums up over the deviations; give one of the four.

    Args:
        per_bucket: numbers of a bucket, float64.
        per_parameter: numbers of each parameter, float64; in an order of the noise's choice.
        per_filter: numbers of each filter (`hvdnoise.noise.filters`), float64; likewise.
        elementwise: one for each number of the bucket, in its dtype but at least float32.
    """

    per_bucket: int = 0
    per_parameter: int = 0
    per_filter: int = 0
    elementwise: bool = False

    def new(self, bucket: Bucket, device: torch.device | str | None = None) -> Tensor:
        """Zeros for one bucket, on its device or another."""
        size, dtype = self.per_bucket + self.per_parameter * len(bucket.sizes), torch.float64
        size += self.per_filter * sum(map(num_filters, bucket.shapes))
        if self.elementwise:
            size, dtype = bucket.size, torch.promote_types(bucket.dtype, torch.float32)
        return torch.zeros(size, dtype=dtype, device=device or bucket.device)


@dataclass(eq=False)  # the same one or another; its tensors are not compared
class Observation:
    """What one step showed of the workers' deviations, by the index of the bucket.

    Attributes:
        layout: its buckets.
        rows: (V, N), what `Noise.rows` names, of this rank's workers.
        statistics: what `observe` summed up, over all workers; on the CPU unless elementwise.
        examples: of all workers together; nan where a worker's are not known.
    """

    layout: Layout
    rows: dict[int, Tensor]
    statistics: dict[int, Tensor]
    examples: float
    _norms: dict[int, float] = field(default_factory=dict, init=False, repr=False)
    _weight_norms: dict[WeightNoise, float] = field(default_factory=dict, init=False, repr=False)

    def row_norm(self, v: int) -> float:
        """The length of row ``v`` over all buckets; computed once, when first asked for."""
        if v not in self._norms:
            self._norms[v] = _length(square_norm(self.rows[bucket.index][v])
                                     for bucket in self.layout.buckets)
        return self._norms[v]

    def weight_norm(self, noise: WeightNoise) -> float:
        """The length of all clean weights that the noise displaces; computed once in a step.

        It is the same on all ranks, whose weights are equal.
        """
        if noise not in self._weight_norms:
            self._weight_norms[noise] = length_of(self.layout, noise.displaces)
        return self._weight_norms[noise]

    def forget_weights(self) -> None:
        """The weights are other ones than before."""
        self._weight_norms.clear()


class Noise(ABC):
    """A structured gradient noise. Inherit from one of the classes below.

    Args:
        seed: of its random streams, shared by all ranks.

    Attributes:
        statistics: what it sums up over what it observes; None: it does not observe.
        observed: what `observe` is shown: the workers' "deviations", or the gradients of single
            "examples", for which the loop calls ``optimizer.observe_examples``.
        labels: of those examples: the "true" ones, or "sampled" from the model's own prediction.
        rows: what it needs of this rank's workers: each one's own gradient or deviations, or a
            mixture of all deviations.
        lag: for how many steps the observation is kept.
        every: it observes in every n-th step only, and where it keeps nothing yet.
        keeps_sums: whether the sums of an observation become what it keeps in its state.
        min_workers: the fewest that it can be estimated from.
    """

    statistics: Statistics | None = None
    observed: Literal["deviations", "examples"] = "deviations"
    labels: Literal["true", "sampled"] = "true"
    rows: Literal["gradients", "deviations", "mixtures"] | None = None
    lag: int = 1
    every: int = 1
    keeps_sums: bool = False
    min_workers: int = 1

    def __init__(self, *, seed: int = 0) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed={seed!r} must be an integer")
        self.seed = seed

    @property
    def needs_deviations(self) -> bool:
        """Whether it wants anything of the single workers' gradients or deviations."""
        return self.rows is not None or (self.statistics is not None and not self.sees_examples)

    @property
    def sees_examples(self) -> bool:
        """Whether it sums up statistics of single examples' gradients."""
        return self.statistics is not None and self.observed == "examples"

    @property
    def needs_no_mean(self) -> bool:
        """Whether each rank knows alone what it needs, so a first pass (lag 0) can stay there."""
        return self.rows == "gradients" and self.statistics is None

    @property
    def mixes(self) -> bool:
        """Whether it needs mixtures of all workers' deviations."""
        return self.rows == "mixtures"

    def statistics_bytes(self, layout: Layout) -> int:
        """Bytes that are summed over the ranks in a step, on average: statistics, and examples."""
        return 8 + self.sums_bytes(layout) // self.every if self.statistics is not None else 0

    def sums_bytes(self, layout: Layout) -> int:
        """Bytes of the statistics of one observation."""
        return 0 if self.statistics is None else sum(
            self.statistics.new(bucket, "meta").nbytes for bucket in layout.buckets)

    def kept_bytes(self, layout: Layout) -> int:
        """Bytes of what it makes of statistics and keeps."""
        return self.sums_bytes(layout) if self.keeps_sums else 0

    def describe(self) -> dict[str, Any]:
        """What must be equal on all ranks."""
        return {key: repr(value) for key, value in sorted(vars(self).items())
                if not key.startswith("_") and not callable(value)}


class ObservingNoise(Noise):
    """A noise that sums up statistics of the workers' deviations or of examples' gradients.

    It says which in ``statistics`` and ``observed``.
    """

    @abstractmethod
    def observe(self, bucket: Bucket, start: int, deviations_Kn: Tensor, out: Tensor,
                context: StepContext) -> None:
        """Add the statistics of a part of the deviations, or of gradients, to ``out``.

        Every part of a bucket comes once for each worker or example, on one of the ranks. ``out``
        is summed over the ranks, so what is added must be additive in parts and rows.

        Args:
            start: the part is ``[start, start + n)`` of the bucket.
            deviations_Kn: d_i of K of the workers there, or the gradients of K examples; not to be
                changed or kept.
            out: (n,), the part's own, where statistics are elementwise; else (size,), the bucket's.
        """


class MeanObservingNoise(Noise):
    """A noise that keeps something of the mean gradient, such as its running mean.

    Attributes:
        kept: how many tensors of the gradient's size it keeps from step to step.
    """

    kept = 1

    @abstractmethod
    def observe_mean(self, bucket: Bucket, mean_N: Tensor, context: StepContext) -> Tensor | None:
        """The step's mean gradient is known: keep what is needed of it in ``context.state``.

        All ranks get the same bits. A displacement sees what is kept from the next step on.

        Args:
            mean_N: before anything was added; not to be changed or kept.

        Returns:
            (N,), what is added to the mean gradient, the same bits on every rank; None: nothing.
        """


class LayerNoise(Noise):
    """A noise that is shown the Kronecker factors of layers (`hvdnoise.layers`).

    Args:
        rank: eigenvalues that it wants of a factor of more than twice as many rows; None: all.
    """

    rank: int | None = None

    def statistics_bytes(self, layout: Layout) -> int:
        factors, roots = self._factor_bytes(layout)  # a broadcast has half the bytes of a sum
        return super().statistics_bytes(layout) + (factors + roots // 2) // self.every

    def kept_bytes(self, layout: Layout) -> int:
        return super().kept_bytes(layout) + sum(self._factor_bytes(layout))

    def _factor_bytes(self, layout: Layout) -> tuple[int, int]:
        """Of the factors and of their roots, as the parameters' names and shapes tell."""
        found = [layer_bytes(*layer, self.rank) for layer in layer_sizes(layout, self.wants_layer)]
        return sum(each[0] for each in found), sum(each[1] for each in found)

    def check_names(self, names: Iterable[str]) -> None:
        """Raise ValueError where its options name what is not among the parameters' names."""

    @abstractmethod
    def wants_layer(self, weight: str) -> bool:
        """Whether the layer whose weight has this name is to be observed."""

    @abstractmethod
    def observe_layer(self, bucket: Bucket, layer: Layer, inputs_II: Tensor, outputs_OO: Tensor,
                      context: StepContext) -> tuple[Tensor, Tensor]:
        """The step's factors of a layer, averaged over the ranks; called before `mean_noise`.

        Args:
            bucket: of the layer's weight.
            inputs_II, outputs_OO: A and G.

        Returns:
            Two symmetric matrices of these sizes whose roots it wants.
        """

    @abstractmethod
    def take_roots(self, bucket: Bucket, layer: Layer, inputs: Root, outputs: Root,
                   context: StepContext) -> None:
        """The roots of what `observe_layer` returned; the same bits on every rank."""


class WeightingNoise(Noise):
    """A noise that acts by factors, whose law has a known standard deviation or none."""

    def weight_deviation(self, context: StepContext) -> float | None:
        """The standard deviation of a factor; None where the noise does not tell."""
        return None


class WorkerNoise(WeightingNoise):
    """A noise that acts on the weights of the workers' gradients in the mean."""

    @abstractmethod
    def worker_weights(self, context: StepContext) -> Tensor:
        """(W,) float64: the factor of each worker's gradient; their mean is 1."""


class ExampleNoise(WeightingNoise):
    """A noise that acts on the weights of the examples' losses."""

    @abstractmethod
    def example_weights(self, worker: int, part: int, count: int, context: StepContext) -> Tensor:
        """(count,) float64: the factor of each example of this part of the worker's batch.

        ``part`` counts the backward passes that one worker accumulates.
        """


class MeanNoise(Noise):
    """A noise that is added to the mean gradient."""

    @abstractmethod
    def mean_noise(self, bucket: Bucket, observation: Observation, context: StepContext) -> Tensor:
        """(N,): what is added to the mean gradient; the same bits on every rank.

        The observation's statistics are the noise's own: it may write into them and keep them.
        """


class WeightNoise(Noise):
    """A noise that is added to each worker's weights, ``lag`` steps after the observation.

    Attributes:
        echo: whether it acts in repetitions of a batch only, by what it has observed in the
            batch's first pass, and observes nothing in repetitions.
        scales_numbers: whether the numbers of its displacement are new ones, made of its rows.
    """

    echo: bool = False
    scales_numbers: bool = False

    def displaces(self, shape: Sequence[int]) -> bool:
        """Whether it displaces parameters of this shape; the others count in no norm."""
        return True

    def along(self, bucket: Bucket, v: int, observation: Observation, context: StepContext
              ) -> tuple[Tensor, list[float]] | None:
        """Along what it displaces the worker, in the units of gradients; as `displacement`.

        The displacement is measured in multiples of what the learning rate makes of it
        (`hvdnoise.measured`). None: there is nothing of the kind.
        """
        if self.rows is None:
            return None
        return observation.rows[bucket.index][v], [1.0] * len(bucket.sizes)

    @abstractmethod
    def displacement(self, bucket: Bucket, v: int, clean: Sequence[Tensor],
                     learning_rates: Sequence[float | None], observation: Observation,
                     context: StepContext) -> tuple[Tensor, list[float]]:
        """What is added to the weights of this rank's worker number ``v``.

        Args:
            bucket: of the observation's layout.
            clean: the weights, one tensor a parameter of the bucket; not to be changed.
            learning_rates: of the parameters, for the step under way; None where there is none.
            observation: of the step ``lag`` steps before.

        Returns:
            A pair: (N,) numbers, which may be the observation's and are not changed afterwards, and
            a factor for each parameter. The delta of a parameter is its factor times its numbers.
        """


class MixingNoise(WeightNoise):
    """A noise on the weights that may need mixtures of all workers' deviations."""

    @abstractmethod
    def mixing_weights(self, workers: Sequence[int], peers: Sequence[int], context: StepContext
                       ) -> Tensor:
        """(workers, peers) float64: worker i's mixture is sum_j weights[i, j] d_j over its peers.

        Each row adds up to 0, so that gradients serve as deviations. The same on all ranks for
        the same workers. Asked for where ``rows`` is "mixtures".
        """


N = TypeVar("N", bound=Noise)


def parts_of(noise: Noise | None) -> tuple[Noise, ...]:
    """The noises that one stands for: none, itself, or several (`Composed`)."""
    return () if noise is None else getattr(noise, "parts", (noise,))


def part(noise: Noise | None, kind: Callable[..., N]) -> N | None:
    """The one of its `parts_of` that is of this kind (a class), if any."""
    found: Any = [each for each in parts_of(noise) if isinstance(each, cast(type, kind))]
    return found[0] if found else None


def check_noise(noise: object, num_workers: int = 0) -> None:
    """Refuse what is no noise, lacks calls that it promises, or needs more workers.

    Args:
        num_workers: 0: not known.

    Raises:
        TypeError: naming the class to inherit from.
        ValueError: for fewer workers than it needs.
    """
    if noise is None:
        return
    if not isinstance(noise, Noise):
        raise TypeError(f"noise={noise!r} is no noise: pass GNC(...), CovarianceNoise(...) or None")
    if len(parts_of(noise)) > 1:
        for each in parts_of(noise):
            check_noise(each, num_workers)
        return
    wanted: list[type | tuple[type, ...]] = [(WorkerNoise, ExampleNoise, MeanNoise, WeightNoise,
                                              MeanObservingNoise)]
    wanted += [ObservingNoise] if noise.statistics is not None else []
    wanted += [MixingNoise] if noise.mixes else []
    if isinstance(noise, ObservingNoise) and isinstance(noise, MeanNoise) and not noise.statistics:
        raise TypeError(f"{type(noise).__name__} has observe() and no statistics: set statistics = "
                        "Statistics(...)")
    if not hasattr(noise, "seed"):
        raise TypeError(f"{type(noise).__name__} has no seed: call super().__init__(seed=seed)")
    for kinds in wanted:
        if not isinstance(noise, kinds):
            names = [kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,))]
            raise TypeError(f"{type(noise).__name__} lacks the calls of {' or '.join(names)}: "
                            "inherit from it")
    if 0 < num_workers < noise.min_workers:
        raise ValueError(f"{type(noise).__name__} needs deviations between at least "
                         f"{noise.min_workers} workers and there is {num_workers}: start more "
                         "ranks, or pass virtual_workers=2 or more and as many backward passes")


def check_displaces(noise: Noise | None, shapes: Sequence[Sequence[int]]) -> None:
    """Refuse a noise on the weights that leaves out all parameters, which have these shapes."""
    weights = part(noise, WeightNoise)
    if weights is not None and shapes and not any(map(weights.displaces, shapes)):
        raise ValueError(f"{type(weights).__name__} would displace none of the parameters, which "
                         f"have shapes such as {tuple(shapes[0])}: give scope=\"all\"")


def check_returned(noise: Noise, call: str, value: Any, shape: tuple[int, ...]) -> None:
    """Refuse what a noise returned, if it is not of this shape.

    Raises:
        ValueError: naming the noise, the call, and the shape that it needs.
    """
    found = tuple(value.shape) if isinstance(value, Tensor) else \
        (len(value),) if isinstance(value, (list, tuple)) else type(value).__name__
    if found != shape:
        raise ValueError(f"{type(noise).__name__}.{call}: it returned {found} where the shape "
                         f"{shape} is needed")


def at_step(schedule: Schedule, step: int) -> float:
    """The value of a number, or of a function of the step (0 for the first)."""
    value = float(schedule(step)) if callable(schedule) else float(schedule)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"the noise scale at step {step} is {value}: it must be finite and >= 0")
    return value


def check_scale(name: str, value: Schedule) -> Schedule:
    """Refuse a scale that is neither a finite number >= 0 nor a function of the step."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not callable(value) and not (number and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r} must be a finite number >= 0 or a function of the step")
    return value


def check_count(name: str, value: Any, more: str = "") -> None:
    """Refuse what is no integer of 1 or more; ``more``: what else it may be."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer >= 1{more}")


def check_share(name: str, value: float) -> float:
    """Refuse a number outside 0 <= value < 1."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and 0 <= value < 1):
        raise ValueError(f"{name}={value!r} must be a number of at least 0 and less than 1")
    return value


def known_rate(rate: float | None, follows: str, remedy: str) -> float:
    """A parameter's learning rate; refuse an optimizer that has none for what follows it."""
    if rate is None:
        raise ValueError(f"{follows} follows the learning rate, and the optimizer has none: give "
                         f"its groups an lr{remedy}")
    return float(rate)


def num_filters(shape: Sequence[int]) -> int:
    """The rows p[k] of a parameter of two and more dimensions; others have none."""
    return shape[0] if len(shape) > 1 else 0


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """(T,): the length of each of some tensors of one dtype and device, in float32 at least."""
    return torch.stack(torch._foreach_norm(list(tensors), dtype=torch.promote_types(
        tensors[0].dtype, torch.float32)))


def length_of(layout: Layout, counts: Callable[[Sequence[int]], bool] = lambda shape: True
              ) -> float:
    """The length of all parameters of a layout together, of those whose shape ``counts``."""
    return _length(square_sum(p) for bucket in layout.buckets for p in bucket.parameters
                   if counts(p.shape))


def _length(squares: Iterable[Tensor]) -> float:
    """The square root of the sum of numbers, which may lie on several devices; waits once."""
    found = list(squares)
    return math.sqrt(float(sum(each.to(found[0].device) for each in found))) if found else 0.0


def square_norm(part: Tensor) -> Tensor:
    """(1,) float64: the sum of the squares."""
    dtype = torch.promote_types(part.dtype, torch.float32)
    return torch.linalg.vector_norm(part, dtype=dtype).double().square().reshape(1)


def square_norms(part_Kn: Tensor, bucket: Bucket, start: int) -> Tensor:
    """(T,) float64: for each parameter of the bucket, the sum of its squares in all rows there."""
    stop = start + part_Kn.shape[1]
    first, end = bisect_right(bucket.starts, start) - 1, bisect_left(bucket.starts, stop)
    inside = [part_Kn[:, max(bucket.starts[t], start) - start:
                      min(bucket.starts[t] + bucket.sizes[t], stop) - start]
              for t in range(first, end)]
    squares = torch.stack([square_norm(each)[0] for each in inside]) if inside else \
        torch.zeros(0, dtype=torch.float64, device=part_Kn.device)
    return F.pad(squares, (first, len(bucket.sizes) - end))
