"""Opening a run: what it goes on from, and its folder.

Everything that can be refused is refused before anything is created, on all ranks alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, Callable, TypeVar

import torch
import yaml
from torch import nn

from hvdnoise import comm
from hvdnoise.comm import World
from hvdnoise.training import checkpoint, records, yamlfile
from hvdnoise.training.config import (
    ConfigError,
    TrainConfig,
    changes,
    flat,
    flatten,
    identity,
    nested,
)
from hvdnoise.training.progress import log

T = TypeVar("T")
State = dict[str, Any]


def call_or_raise(world: World, action: Callable[[], T]) -> T:
    """``action()``; where it raises a ValueError or OSError on one rank, a ConfigError on all."""
    value, error = None, None
    try:
        value = action()
    except (ValueError, OSError) as problem:
        error = " ".join(str(problem).split())
    for rank, text in enumerate(world.gather_json(error, name="call")):
        if text is not None:
            raise ConfigError(f"{text} ({world.places()[rank]})" if rank else text)
    return value  # type: ignore[return-value]


# ---------------------------------------------------------------------- what to go on from


def find_source(config: TrainConfig, world: World) -> tuple[State, State | None] | None:
    """The shared state and this rank's own to go on from; None to start at step 0. Collective.

    The own state is None where the number of workers has changed (``resume_resize``).

    Raises:
        ConfigError: when the checkpoint is of another run.
        CheckpointError: when there are checkpoints and none is whole.
    """
    if config.resume == "never":
        return None
    chosen = checkpoint.choose(_candidates(config), world)
    if chosen is None:
        call_or_raise(world, lambda: _check_same_run(_settings_of(config), config))
        log.info("no checkpoint to resume from: starting at step 0")
        return None
    path, manifest = chosen

    def load() -> tuple[State, State | None]:
        shared = checkpoint.read(path / "shared.pt")
        _check_same_run(shared["config"], config)
        same_size = _check_size(shared, manifest["ranks"], config, world)
        _warn_of_differences(shared, config)
        return shared, checkpoint.read(path / f"rank-{world.rank}.pt") if same_size else None

    log.info("resuming from %s", path)
    return call_or_raise(world, load)


def _candidates(config: TrainConfig) -> list[Path]:
    if config.resume == "auto":
        return checkpoint.found(Path(config.run_dir or "") / "checkpoints")
    path = Path(config.resume)
    if (path / "checkpoints").is_dir():
        return checkpoint.found(path / "checkpoints")
    return [path]


def _settings_of(config: TrainConfig) -> dict[str, Any]:
    """What the run in run_dir says its settings are; nothing where there is none."""
    path = Path(config.run_dir or "") / "config.yaml"
    if not path.is_file():
        return {}
    return flat(yaml.safe_load(path.read_text()))


def _check_same_run(before: dict[str, Any], config: TrainConfig) -> None:
    now = flatten(config)
    different = changes(before, now, resize=config.resume_resize) if before else []
    if different:
        text = ", ".join(f"{key} (was {before.get(key)}, is {now.get(key)})" for key in different)
        raise ConfigError(f"cannot resume with other settings: {text}; set them back, or start a "
                          "new run")


def _check_size(shared: State, ranks: int, config: TrainConfig, world: World) -> bool:
    """Whether every rank finds its own workers again."""
    virtual = shared["config"]["virtual_workers"]
    if (ranks, virtual) == (world.size, config.virtual_workers):
        return True
    if not config.resume_resize:
        raise ConfigError(
            f"cannot resume on {world.size} ranks x {config.virtual_workers} virtual workers: the "
            f"checkpoint is of {ranks} x {virtual}, and noise and batches depend on it; start "
            f"{ranks} ranks, or add --resume_resize to make it another run")
    log.warning("resumed with another number of workers (%d x %d, was %d x %d): not the run that "
                "would have been without the interruption", world.size, config.virtual_workers,
                ranks, virtual)
    return False


def _warn_of_differences(shared: State, config: TrainConfig) -> None:
    old, new = shared["config"]["epochs"], config.epochs
    if old != new:
        log.warning("the run has %g epochs now, %g before: from here on its learning rate follows "
                    "the schedule of the new length", new, old)
    now = records.versions()
    other = [f"{key} {value} (now {now.get(key)})" for key, value in shared["versions"].items()
             if now.get(key) != value]
    if other:
        log.warning("the checkpoint was written with %s: the run may differ in rounding",
                    ", ".join(other))


# ---------------------------------------------------------------------- the folder


def open_folder(config: TrainConfig, world: World, model: nn.Module) -> Path:
    """Make or reuse the run's folder, and write settings and environment into it. Collective.

    Raises:
        ConfigError: when it cannot be had, or its file system is too full.
    """
    chosen = call_or_raise(world, lambda: str(_make(config, model)) if world.rank == 0 else "")
    folder = Path(world.gather_json(chosen, name="run.folder")[0])
    call_or_raise(world, lambda: records.start_logs(folder, world.rank))
    hosts = world.hosts()

    def describe() -> None:
        if world.rank == 0:
            records.write_text(folder / "config.yaml", yamlfile.dump(nested(config)))
            facts = records.environment(hosts, comm.environment(), world.transport)
            records.write_text(folder / "environment.json", json.dumps(facts, indent=1))
            for name in ("preempted.json", "summary.json"):
                (folder / name).unlink(missing_ok=True)
    call_or_raise(world, describe)
    return folder


def _make(config: TrainConfig, model: nn.Module) -> Path:
    _check_space(config, Path(config.run_dir or "runs"), model)
    if config.run_dir is not None:
        folder = Path(config.run_dir)
        if config.overwrite and records.is_run(folder):
            records.clear(folder)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        name = config.name or f"{config.model.replace(':', '-')}-{config.data.dataset}"
        stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for suffix in ("", *(f"-{number}" for number in range(2, 100))):
            folder = Path("runs") / f"{stem}{suffix}"
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                continue
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"run_dir={folder} cannot be written: give another one")
    return folder


def _check_space(config: TrainConfig, folder: Path, model: nn.Module) -> None:
    weights = sum(value.nbytes for value in model.state_dict().values())
    needed = 4 * weights * (config.checkpoint.keep + 2)  # optimizer, average, noise: about 4 times
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(f"run_dir={folder} has {free >> 20} MiB free and checkpoints may take "
                          f"{needed >> 20}: free some, give another folder, or lower "
                          "checkpoint.keep")


def config_digest(config: TrainConfig) -> str:
    """SHA-256 over the settings that make the run what it is."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()


def write_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a state dict, whole or not at all."""
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    part.replace(path)
