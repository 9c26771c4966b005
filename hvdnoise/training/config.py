"""The settings of a training run.

The dataclasses are the command line: `hvdnoise train --help` shows their docstrings. Groups of
their own: `data` (hvdnoise.training.dataspec), `optim` and `lr` (hvdnoise.training.optim).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from hvdnoise.plans import group_size
from hvdnoise.training.dataspec import DataConfig
from hvdnoise.training.errors import ConfigError
from hvdnoise.training.noise_config import NoiseConfig
from hvdnoise.training.optim import LrConfig, OptimConfig

__all__ = ["CheckpointConfig", "ConfigError", "NoiseConfig", "TrainConfig", "changes", "flat",
           "flatten", "identity", "nested"]


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
        model: mlp, small-cnn, resnet20/32/44/56/110, resnet18-cifar, wrn16-4/16-8/28-10,
            vgg16-bn, or a classifier of torchvision by name; or a function of your own that
            returns one, as FILE.py:FUNCTION or MODULE:FUNCTION, see docs/own.md.
        norm: normalisation of small-cnn, vgg16-bn and the residual networks for small images;
            auto: each one's own. Under batch norm each worker's batch has its own statistics.
        optim: the optimizer.
        lr: the learning rate over the run.
        noise: the structured noise.
        plugins: Python files (.py) or modules that register noises, imported before the other
            settings are read; as a flag, with commas between.
        exchange: how noise that mixes the workers' deviations (gnc gathered) travels: auto,
            allgather, gather-only, transpose, group (ranks of a host) or group:K (K consecutive).
        noise_precision: of that noise on the wire; the gradients always travel in full.
        checkpoint: when to save.
        epochs: length of the run, in passes over the training images; may be a fraction.
        virtual_workers: V, workers that each rank stands for; W = ranks * V.
        global_batch: examples of all W workers per step; overrides data.batch_size (one worker's).
        accumulate: split each worker's batch into so many passes, to save memory.
        label_smoothing: share of the label's weight spread over all classes.
        clip_norm: limit of the gradient's norm.
        precision: of forward and backward; weights stay in 32 bits.
        ema: decay of a moving average of the weights, which is evaluated too.
        max_bad_steps: give up after so many steps in a row in which something is not finite.
        eval_every: evaluate after each so many epochs, on the validation images where there are
            any, else on the test images; 0: at the end only.
        score_train: at the end, also score the images trained on, without augmentation.
        seed: of initial weights, data order, augmentation and noise.
        device: auto takes the GPU of the local rank where there is one.
        threads: of each rank; default: OMP_NUM_THREADS, else the cores shared out.
        name: of the run; default: model and data set.
        run_dir: the run's folder, seen by all ranks; default: runs/NAME-TIME.
        overwrite: replace an earlier run in run_dir.
        resume: never; auto (the newest whole checkpoint in run_dir, or a start where there is
            none); or the path of a checkpoint or of a run.
        resume_resize: resume on another number of ranks, with virtual_workers such that W stays
            the same, or with another number of workers, which makes it another run.
        log_every: steps between two lines of metrics.
        spectrum_every: steps between two lines with the spectrum of the workers' covariance;
            0: none.
        tensorboard: write TensorBoard events.
        progress: bar, lines or none on the terminal; auto: a bar where there is a terminal.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: str = "small-cnn"
    norm: Literal["auto", "batch", "group"] = "auto"
    optim: OptimConfig = field(default_factory=OptimConfig)
    lr: LrConfig = field(default_factory=LrConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    plugins: tuple[str, ...] = ()
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
    score_train: bool = False
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    name: str | None = None
    run_dir: str | None = None
    overwrite: bool = False
    resume: str = "never"
    resume_resize: bool = False
    log_every: int = 20
    spectrum_every: int = 100
    tensorboard: bool = True
    progress: Literal["auto", "bar", "lines", "none"] = "auto"

    @property
    def title(self) -> str:
        """The run's name as a folder's."""
        return self.name or re.sub(r"[^\w.-]+", "-", f"{self.model}-{self.data.dataset}")

    def workers(self, size: int) -> int:
        """W, on ``size`` ranks."""
        return size * self.virtual_workers

    def group_size(self, local_size: int) -> int | None:
        """Ranks of a group of the exchange, where there are groups."""
        return group_size(self.exchange, local_size)

    def worker_batch(self, size: int) -> int:
        """b, examples per worker and step, on ``size`` ranks."""
        if self.global_batch is None:
            return self.data.batch_size
        return self.global_batch // self.workers(size)


# What a resumed run may change without being another run.
_FREE = {"epochs", "max_bad_steps", "eval_every", "score_train", "device", "threads", "name",
         "run_dir", "overwrite", "resume", "resume_resize", "log_every", "spectrum_every",
         "tensorboard", "progress",
         "checkpoint.every_steps", "checkpoint.every_epochs", "checkpoint.keep", "data.root",
         "data.download", "data.loader_workers", "data.digest"}
# What it may change with resume_resize.
_SIZES = {"virtual_workers", "global_batch", "data.batch_size", "accumulate"}


def nested(config: Any) -> dict[str, Any]:
    """Every setting as JSON values, a group as a dict: what a YAML file holds."""
    if isinstance(config, NoiseConfig):
        values = config.settings()
    else:
        values = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    return {key: nested(value) if dataclasses.is_dataclass(value) else
            list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What `nested` or a file holds, by the flags' names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict)
                     else {prefix + key: value})
    return found


def flatten(config: Any) -> dict[str, Any]:
    """Every setting by its flag's name, as JSON values."""
    return flat(nested(config))


def changes(before: dict[str, Any], now: dict[str, Any], *, resize: bool) -> list[str]:
    """The settings (of `flatten`) in which a resumed run may not differ, and does.

    A setting that is not there, null or an empty list counts as not given.
    """
    free = _FREE | _SIZES if resize else _FREE
    empty: tuple[Any, ...] = (None, [])
    return [key for key in sorted(before.keys() | now.keys())
            if key not in free and before.get(key) != now.get(key)
            and not (before.get(key) in empty and now.get(key) in empty)]


def identity(config: TrainConfig) -> dict[str, Any]:
    """The settings (of `flatten`) that make a run the run it is."""
    return {key: value for key, value in flatten(config).items() if key not in _FREE}
