"""What a run will be, from its settings alone: workers, batch, rates, steps, parameters."""

from __future__ import annotations

from dataclasses import dataclass

from hvdnoise.buckets import Layout, default_layout
from hvdnoise.exchange_plan import Shape
from hvdnoise.noise.base import MeanObservingNoise, Noise, WeightNoise, part, parts_of
from hvdnoise.planning.config import PlanConfig
from hvdnoise.plans import Choice, choose
from hvdnoise.training import models
from hvdnoise.training.errors import ConfigError, DataError, one_line_errors
from hvdnoise.training.optim import peak_rate, rate
from hvdnoise.training.sampler import steps_per_epoch


@dataclass(frozen=True)
class Outline:
    """A run in numbers.

    Args:
        ranks: R.
        workers: W.
        worker_batch: b, examples per worker and step.
        examples: training images in use.
        first_rate: learning rate at the first step.
        peak_rate: after the warm-up, scaled with the batch.
        steps_per_epoch: optimizer steps.
        total_steps: of the whole run.
        parameters: P, trainable numbers of 4 bytes.
        statistics_bytes: of the noise's statistics, which are summed over the ranks in a step.
        noise_memory: bytes of a rank for the noise, without what mixtures take in flight.
        mixes: whether the noise mixes the deviations of all workers.
        plan: of the exchange, as DistributedOptimizer will take it.
    """

    ranks: int
    workers: int
    worker_batch: int
    examples: int
    first_rate: float
    peak_rate: float
    steps_per_epoch: int
    total_steps: int
    parameters: int
    statistics_bytes: int
    noise_memory: int
    mixes: bool
    plan: Choice

    @property
    def batch(self) -> int:
        """B, examples of all workers per step."""
        return self.workers * self.worker_batch


@one_line_errors()
def outline(config: PlanConfig) -> Outline:
    """The run that `hvdnoise train` will make of these settings, which `read` has checked.

    Raises:
        ConfigError: where they do not fit the data, or each other.
    """
    ranks, batch = config.ranks, config.worker_batch(config.ranks)
    workers = config.workers(ranks)
    examples, classes, image_shape = facts(config)
    dtype = config.data.record.dtype(config.data)
    per_epoch = steps_per_epoch(examples, workers, batch, repeat=config.data.repeat)
    total = max(1, round(config.epochs * per_epoch))
    peak = peak_rate(config.optim.lr, config.lr, workers * batch)
    layout = model_layout(config.model, classes, image_shape, norm=config.norm, dtype=dtype)
    noise = config.noise.build(seed=config.seed, batch_size=batch, total_steps=total)
    mixes = noise is not None and noise.mixes
    plan = choose(config.exchange, shape(config, layout.numbers), mixes=mixes,
                  local_size=config.ranks_per_host)
    return Outline(ranks, workers, batch, examples,
                   rate(0, peak, config.lr, steps_per_epoch=per_epoch, epochs=config.epochs),
                   peak, per_epoch, total, layout.numbers,
                   noise.statistics_bytes(layout) if noise is not None else 0,
                   noise_memory(noise, layout, config.virtual_workers), mixes, plan)


def noise_memory(noise: Noise | None, layout: Layout, V: int) -> int:
    """Bytes of a rank for rows, statistics, what is kept and displaced weights, at their peak.

    That is in the forward of the last of the rank's V workers, when the rows of the step are there
    if V > 1, or at the step's end, when the noise has made anew what it keeps.
    """
    if noise is None:
        return 0
    observer = part(noise, MeanObservingNoise)
    kept = observer.kept if observer is not None else 0
    rows = V if noise.needs_deviations else 0
    past = max(1, noise.lag) * V if noise.rows is not None else 0
    displaced = 0
    if (weights := part(noise, WeightNoise)) is not None:
        own = weights.scales_numbers or noise.rows is None and not kept
        displaced = 1 + own  # with the numbers themselves
    forward = kept + past + displaced + (rows if V > 1 and noise.lag > 0 else 0)
    end = kept + bool(kept) + rows + (past if noise.lag > 0 else 0)
    nbytes = sum(bucket.size * bucket.dtype.itemsize for bucket in layout.buckets)
    sums = sum(each.sums_bytes(layout) * (1 if each.rows is None else each.lag + 1)
               + (each.kept_bytes(layout) if each.rows is None else 0) for each in parts_of(noise))
    return max(forward, end) * nbytes + sums


def shape(config: PlanConfig, parameters: int, statistics_bytes: int = 0) -> Shape:
    """What the exchange's cost depends on, in the precision of the settings."""
    return Shape(parameters, config.ranks, config.virtual_workers,
                 precision=config.noise_precision,
                 group_size=config.group_size(config.ranks_per_host) or config.ranks_per_host,
                 statistics_bytes=statistics_bytes)


def facts(config: PlanConfig) -> tuple[int, int, tuple[int, ...]]:
    """Training images in use, classes and (channels, height, width) of the data set.

    Raises:
        ConfigError: for folders of images that are not here and were not described.
    """
    data = config.data
    described = data.record.counted and not data.record.own
    examples, classes = _counted(config) if described else data.record.count(data)
    return data.in_use(examples), classes, data.record.shape(data)


def _counted(config: PlanConfig) -> tuple[int, int]:
    """Images and classes of a data set that has to be counted: as given, else counted."""
    if config.examples is not None and config.classes is not None:
        return config.examples, config.classes
    try:
        examples, classes = config.data.record.count(config.data)
    except DataError as error:
        raise ConfigError(f"{error}: give --examples N, the training images, and --classes N, or "
                          "a data.root that holds train/CLASS/IMAGE") from error
    return config.examples or examples, config.classes or classes


def model_layout(model: str, classes: int, image_shape: tuple[int, ...], *,
                 norm: str = "auto", dtype: str = "float32") -> Layout:
    """The buckets of a model's parameters.

    Raises:
        ValueError: when there is no such model, or it cannot take such images.
    """
    built = models.outline(model, classes, image_shape, norm=norm, dtype=dtype)
    return default_layout(list(built.named_parameters()))
