"""The settings of a training run.

The dataclasses are the command line: `hvdnoise train --help` shows their docstrings. Groups of
their own: `data` (hvdnoise.training.dataspec), `optim` and `lr` (hvdnoise.training.optim).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Callable, Literal

from hvdnoise.noise import Noise, make_noise
from hvdnoise.training.dataspec import DataConfig
from hvdnoise.training.optim import LrConfig, OptimConfig


class ConfigError(ValueError):
    """A setting is wrong; one line that names it and the remedy."""


@dataclass(frozen=True)
class NoiseConfig:
    """The structured noise (see hvdnoise.noise).

    Args:
        kind: gnc displaces each worker's weights by gradient noise; covariance gives the gradient
            the noise of a smaller batch.
        source: of gnc: own (default), gathered, isotropic; of covariance: workers (default),
            examples.
        radius: gnc's scale as the size of the displacement, in the units of the weights.
        lr: gnc's scale as a multiple of the learning rate.
        relative: gnc's scale as a share of each weight tensor's norm.
        final: gnc's scale at the end of the run, reached linearly; default: it stays the same.
        lag: gnc's deviations: 1, of the step before (default); 2, of the one before that, whose
            exchange hides behind a step; 0, of a first pass over the same batch, at twice the cost.
        structure: of covariance: full (default) or isotropic.
        emulated_batch: of covariance: the batch size whose noise the step shall have.
    """

    kind: Literal["none", "gnc", "covariance"] = "none"
    source: str | None = None
    radius: float | None = None
    lr: float | None = None
    relative: float | None = None
    final: float | None = None
    lag: int | None = None
    structure: str | None = None
    emulated_batch: int | None = None

    def __post_init__(self) -> None:
        foreign = [name for name, value in self._given().items()
                   if value is not None and name not in _NOISE_OPTIONS[self.kind]]
        if foreign:
            takes = ", ".join(_NOISE_OPTIONS[self.kind]) or "no options"
            raise ConfigError(f"noise.{foreign[0]}={getattr(self, foreign[0])!r} does not go with "
                              f"noise.kind={self.kind}, which takes {takes}")
        if self.final is not None and not 0 <= self.final < math.inf:
            raise ConfigError(f"noise.final={self.final!r} must be a finite number >= 0")

    def _given(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items()
                if key != "kind" and value is not None}

    def build(self, *, seed: int, batch_size: int, total_steps: int) -> Noise | None:
        """The noise, or None; batch_size: examples per worker and step.

        Raises:
            ValueError: for a value outside what the noise takes.
        """
        options = self._given()
        final = options.pop("final", None)
        for name in ("radius", "lr", "relative"):
            if final is not None and name in options:
                options[name] = _linear(options[name], final, total_steps)
        if self.kind == "covariance":
            options["batch_size"] = batch_size
        if self.kind != "none":
            options["seed"] = seed
        return make_noise(self.kind, **options)


_NOISE_OPTIONS = {"none": (), "gnc": ("source", "radius", "lr", "relative", "final", "lag"),
                  "covariance": ("source", "structure", "emulated_batch")}


def _linear(start: float, end: float, steps: int) -> Callable[[int], float]:
    return lambda step: start + (end - start) * min(1.0, step / max(1, steps))


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save; a run also saves at its end and on SIGTERM.

    Args:
        every_steps: save after each so many steps; 0: never for this reason.
        every_epochs: save after each so many epochs; 0: never for this reason.
        keep: how many of the newest to keep.
    """

    every_steps: int = 0
    every_epochs: int = 1
    keep: int = 2


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
        data: the data set.
        model: small-cnn, resnet20/32/44/56/110, vgg16-bn, or a classifier of torchvision by name.
        optim: the optimizer.
        lr: the learning rate over the run.
        noise: the structured noise.
        exchange: how noise that mixes the workers' deviations (gnc gathered) travels: auto,
            allgather, gather-only, transpose, group (ranks of a host) or group:K (K consecutive).
        noise_precision: of that noise on the wire; the gradients always travel in full.
        checkpoint: when to save.
        epochs: length of the run; may be a fraction.
        virtual_workers: V, workers that each rank stands for; W = ranks * V.
        global_batch: examples of all W workers per step; overrides data.batch_size (one worker's).
        accumulate: split each worker's batch into so many passes, to save memory.
        label_smoothing: share of the label's weight spread over all classes.
        clip_norm: limit of the gradient's norm.
        precision: of forward and backward; weights stay in 32 bits.
        ema: decay of a moving average of the weights, which is evaluated too.
        max_bad_steps: give up after so many steps in a row whose gradient is not finite.
        eval_every: evaluate after each so many epochs; 0: at the end only.
        seed: of initial weights, data order, augmentation and noise.
        device: auto takes the GPU of the local rank where there is one.
        threads: of each rank; default: OMP_NUM_THREADS, else the cores shared out.
        name: of the run; default: model and data set.
        run_dir: the run's folder, seen by all ranks; default: runs/NAME-TIME.
        overwrite: replace an earlier run in run_dir.
        resume: never; auto (the newest whole checkpoint in run_dir, or a start where there is
            none); or the path of a checkpoint or of a run.
        resume_resize: resume with another number of workers, which makes it another run.
        log_every: steps between two lines of metrics.
        tensorboard: write TensorBoard events.
        progress: bar, lines or none on the terminal; auto: a bar where there is a terminal.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: str = "small-cnn"
    optim: OptimConfig = field(default_factory=OptimConfig)
    lr: LrConfig = field(default_factory=LrConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    exchange: str = "auto"
    noise_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    epochs: float = 10.0
    virtual_workers: int = 1
    global_batch: int | None = None
    accumulate: int = 1
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float | None = None
    max_bad_steps: int = 10
    eval_every: int = 1
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    name: str | None = None
    run_dir: str | None = None
    overwrite: bool = False
    resume: str = "never"
    resume_resize: bool = False
    log_every: int = 20
    tensorboard: bool = True
    progress: Literal["auto", "bar", "lines", "none"] = "auto"

    def workers(self, size: int) -> int:
        """W, on ``size`` ranks."""
        return size * self.virtual_workers

    def group_size(self, local_size: int) -> int | None:
        """Ranks of a group of the exchange, where there are groups."""
        name, _, number = self.exchange.partition(":")
        return int(number or local_size) if name == "group" else None

    def worker_batch(self, size: int) -> int:
        """b, examples per worker and step, on ``size`` ranks."""
        if self.global_batch is None:
            return self.data.batch_size
        return self.global_batch // self.workers(size)


# What a resumed run may change without being another run.
_FREE = {"epochs", "max_bad_steps", "eval_every", "device", "threads", "name", "run_dir",
         "overwrite", "resume", "resume_resize", "log_every", "tensorboard", "progress",
         "checkpoint.every_steps", "checkpoint.every_epochs", "checkpoint.keep", "data.root",
         "data.download", "data.loader_workers"}
# What it may change with resume_resize.
_SIZES = {"virtual_workers", "global_batch", "data.batch_size", "accumulate"}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its flag's name, as JSON values."""
    flat: dict[str, Any] = {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{each.name}."))
        else:
            flat[prefix + each.name] = list(value) if isinstance(value, tuple) else value
    return flat


def changes(before: dict[str, Any], now: dict[str, Any], *, resize: bool) -> list[str]:
    """The settings (of `flatten`) in which a resumed run may not differ, and does."""
    free = _FREE | _SIZES if resize else _FREE
    return [key for key in sorted(before.keys() | now.keys())
            if key not in free and before.get(key) != now.get(key)]


def identity(config: TrainConfig) -> dict[str, Any]:
    """The settings (of `flatten`) that make a run the run it is."""
    return {key: value for key, value in flatten(config).items() if key not in _FREE}
