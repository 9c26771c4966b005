"""A run's folder: which one, having it alone, and what is written into it at the start.

Everything that can be refused is refused before anything is created, on all ranks alike.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Callable, Iterator

from torch import nn

from hvdnoise import comm
from hvdnoise.comm import World
from hvdnoise.training import heartbeat, records, yamlfile
from hvdnoise.training.config import ConfigError, TrainConfig, identity, nested
from hvdnoise.training.heartbeat import FolderLock
from hvdnoise.training.together import call_or_raise

__all__ = ["call_or_raise", "config_digest", "hold_folder", "open_folder"]


def hold_folder(config: TrainConfig, world: World, model: nn.Module, on_loss: Callable[[], None]
                ) -> AbstractContextManager[tuple[Path, FolderLock | None]]:
    """Have the run's folder alone, and make it where there is none; see `heartbeat.held`.

    Raises:
        ConfigError: when it cannot be had, or its file system is too full.
    """
    def folders() -> Iterator[Path]:
        _check_space(config, Path(config.run_dir or "runs"), model)
        if config.run_dir is not None:
            yield Path(config.run_dir)
            return
        stem = f"{config.title}-{time.strftime('%Y%m%d-%H%M%S')}"
        for suffix in ("", *(f"-{number}" for number in range(2, 100))):
            folder = Path("runs") / f"{stem}{suffix}"
            if not folder.exists():
                yield folder
    return heartbeat.held(folders, world, on_loss)


def open_folder(config: TrainConfig, world: World, folder: Path, facts: dict[str, Any]) -> None:
    """Write settings and environment into the run's folder. Collective.

    Args:
        facts: what environment.json says besides.

    Raises:
        ConfigError: when it cannot be written.
    """
    hosts = world.hosts()

    def describe() -> None:
        if world.rank > 0:
            return
        if config.overwrite and records.is_run(folder):
            records.clear(folder)
        # the settings first: a folder without them holds no run, and is refused if not empty
        records.write_text(folder / "config.yaml", yamlfile.dump(nested(config)))
        found = {**records.environment(hosts, comm.environment(), world.transport), **facts}
        records.write_text(folder / "environment.json", json.dumps(found, indent=1))
        for name in ("preempted.json", "summary.json"):
            (folder / name).unlink(missing_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
    call_or_raise(world, describe)
    call_or_raise(world, lambda: records.start_logs(folder, world.rank))


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
