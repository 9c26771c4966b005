"""What makes settings right or wrong as a whole, before anything is started or created."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdnoise import extras
from hvdnoise.exchange_plan import Shape
from hvdnoise.noise.base import LayerNoise, Noise, WeightNoise, part
from hvdnoise.plans import choose
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.errors import one_line_errors
from hvdnoise.training.process import MOST_THREADS

if TYPE_CHECKING:
    from torch import nn

MOST_EPOCHS = 1e9
MOST_WORKERS = 1 << 16  # virtual ones, of a rank


def validate(config: TrainConfig, size: int) -> None:
    """Check the settings as a whole, for ``size`` ranks.

    Raises:
        ConfigError: one line with the value that is wrong and the remedy.
    """
    for check in (_check_packages, _check_numbers,
                  _check_batch, _check_noise, _check_names, _check_folders):
        with one_line_errors():
            check(config, size)


def require(right: bool, name: str, value: Any, remedy: str) -> None:
    """Raise a ConfigError unless ``right``."""
    if not right:
        raise ConfigError(f"{name}={value} is wrong: {remedy}")


def require_folder(folder: Path, file: str, holds: str, *, overwrite: bool) -> None:
    """Raise a ConfigError for an ``out`` that is no folder, or has such results already.

    Args:
        file: whose presence tells that.
        holds: what it holds then, in words.
    """
    require(folder.is_dir() or not folder.exists(), "out", folder, "it is not a folder")
    require(overwrite or not (folder / file).exists(), "out", folder,
            f"it holds {holds} already; give a new one, or --overwrite to replace it")


def require_device(device: str) -> None:
    """Raise a ConfigError for a GPU that is not there."""
    if device == "cuda":
        import torch
        require(torch.cuda.is_available(), "device", "cuda",
                "torch sees no GPU here; use device=auto or cpu, or a CUDA build of torch")


def _check_packages(config: TrainConfig, size: int) -> None:
    from hvdnoise.training.optim import NEEDS
    if config.tensorboard:
        extras.require("tensorboard=true (false does without)", "tensorboard")
    extras.require(f"data.dataset={config.data.dataset}", *config.data.record.needs)
    extras.require(f"optim.name={config.optim.name}", *NEEDS.get(config.optim.name, ()))


def _check_numbers(config: TrainConfig, size: int) -> None:
    require(0 < config.epochs <= MOST_EPOCHS, "epochs", config.epochs,
            f"give a number above 0, of at most {MOST_EPOCHS:g}")
    require(config.virtual_workers <= MOST_WORKERS, "virtual_workers", config.virtual_workers,
            f"give at most {MOST_WORKERS}")
    for name, least in (("virtual_workers", 1), ("accumulate", 1), ("max_bad_steps", 1),
                        ("log_every", 1), ("spectrum_every", 0), ("eval_every", 0), ("seed", 0)):
        value = getattr(config, name)
        require(value >= least, name, value, f"give {least} or more")
    require(config.threads is None or 1 <= config.threads <= MOST_THREADS, "threads",
            config.threads, f"give 1 to {MOST_THREADS}")
    require(0 <= config.label_smoothing < 1, "label_smoothing", config.label_smoothing,
            "give 0 <= s < 1")
    require(config.clip_norm is None or 0 < config.clip_norm < math.inf, "clip_norm",
            config.clip_norm, "give a number above 0")
    require(config.ema is None or 0 < config.ema < 1, "ema", config.ema, "give 0 < decay < 1")
    for name, least in (("every_steps", 0), ("every_epochs", 0), ("keep", 1)):
        value = getattr(config.checkpoint, name)
        require(value >= least, f"checkpoint.{name}", value, f"give {least} or more")


def _check_batch(config: TrainConfig, size: int) -> None:
    workers = config.workers(size)
    if config.global_batch is not None:
        lower = config.global_batch // workers * workers
        require(config.global_batch >= 1 and config.global_batch % workers == 0, "global_batch",
                config.global_batch, f"it is not divisible by the {workers} workers ({size} ranks x"
                f" {config.virtual_workers} virtual workers); give {lower or workers} or "
                f"{lower + workers}, or change virtual_workers")
    batch = config.worker_batch(size)
    require(batch % config.accumulate == 0, "accumulate", config.accumulate,
            f"it does not divide a worker's batch of {batch}")
    from torch import nn, optim

    from hvdnoise.training.optim import build_schedule
    from hvdnoise.training.sampler import steps_per_epoch
    data = config.data
    used = data.limit if data.record.counted else data.in_use(data.record.count(data)[0])
    if used is not None:
        steps_per_epoch(used, workers, batch)
    build_schedule(optim.SGD(nn.Linear(1, 1).parameters(), lr=config.optim.lr), config.lr,
                   batch * workers, 1, config.epochs)  # for what it refuses


def _check_noise(config: TrainConfig, size: int) -> None:
    workers, batch = config.workers(size), config.worker_batch(size)
    noise = config.noise.build(seed=config.seed, batch_size=batch, total_steps=1)
    shape = Shape(1, size, config.virtual_workers, precision=config.noise_precision)
    choose(config.exchange, shape, local_size=size,
           mixes=noise is not None and noise.mixes)
    if noise is None:
        return
    kind = " + ".join(each.kind for each in config.noise.each())
    require(workers >= noise.min_workers, "noise.kind", kind,
            f"it needs at least {noise.min_workers} workers and there is {workers} ({size} rank x "
            f"virtual_workers={config.virtual_workers}); set virtual_workers=2 or more, or start "
            "more ranks")
    for each in config.noise.each():
        emulated = each.emulated_batch
        require(emulated is None or emulated <= batch * workers, "noise.emulated_batch", emulated,
                f"the batch of all workers is {batch * workers}, and noise can only emulate a "
                "smaller one; lower it, or raise the batch")
    require(noise.lag != 0 or config.precision != "fp16", "noise.lag", noise.lag,
            "it does not go with precision=fp16 (a step of two passes cannot be scaled); use bf16 "
            "or lag 1")
    weights = part(noise, WeightNoise)
    require(weights is None or not weights.echo or config.data.repeat >= 2,
            "noise.echo", True, "it acts in the second pass over a batch, and each batch is drawn "
            "once; set data.repeat=2")
    record = config.data.record
    if not record.own and (noise.sees_examples or part(noise, LayerNoise) is not None):
        from hvdnoise.training import models
        fits(noise, models.outline(config.model, 10, record.shape(config.data), norm=config.norm))


def fits(noise: Noise, model: nn.Module) -> None:
    """Raise a ValueError where a noise that looks into the model does not go with it."""
    if noise.sees_examples:
        from hvdnoise.per_example import check_statistics
        check_statistics(model)
    if (layered := part(noise, LayerNoise)) is not None:
        layered.check_names(name for name, _ in model.named_parameters())


def _check_names(config: TrainConfig, size: int) -> None:
    from hvdnoise.training import models
    models.find(config.model, config.norm)
    name = config.name
    require(name is None or bool(name) and Path(name).name == name, "name", repr(name),
            "give a plain name without slashes")
    require_device(config.device)


def _check_folders(config: TrainConfig, size: int) -> None:
    from hvdnoise.training.folder_lock import owner_in
    resumes = config.resume != "never"
    require(not (resumes and config.overwrite), "overwrite", config.overwrite,
            f"it contradicts resume={config.resume}; leave one out")
    require(resumes or not config.resume_resize, "resume_resize", config.resume_resize,
            "there is nothing to resize without resume; add --resume auto or a path")
    require(config.resume != "auto" or config.run_dir is not None, "resume", "auto",
            "name the run to go on with: add --run_dir")
    require(config.resume in ("never", "auto") or Path(config.resume).is_dir(), "resume",
            config.resume, "there is no such folder; give never, auto or the path of a checkpoint "
            "or run")
    if config.run_dir is not None:
        owner = owner_in(Path(config.run_dir))
        check_run_dir(config, f", at which {owner} works" if owner is not None else "")


def check_run_dir(config: TrainConfig, at_work: str = "") -> None:
    """Check that what is in ``run_dir`` may be there.

    Args:
        at_work: words for who is in the folder.

    Raises:
        ConfigError: one line with the remedy.
    """
    from hvdnoise.training.records import is_free, is_run
    if config.run_dir is None:
        return
    folder = Path(config.run_dir)
    require(folder.is_dir() or not folder.exists(), "run_dir", folder, "it is not a folder")
    if folder.is_dir() and not is_free(folder):
        require(is_run(folder), "run_dir", folder,
                "the folder is not empty and holds no run; give a new one")
        require(config.resume != "never" or config.overwrite, "run_dir", folder,
                f"it holds a run already{at_work}; give a new one, or --resume auto to go on with "
                "it, or --overwrite to replace it")
