"""Reading the settings that a run has written, which may be damaged or not its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hvdnoise.training import yamlfile
from hvdnoise.training.config import ConfigError, flat


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml, by the flags' names. Nothing of it is executed.

    Raises:
        ConfigError: when it is damaged.
    """
    try:
        values = yamlfile.read(path)[1]
        if not values:
            raise ConfigError(f"{path} holds no settings")
    except ConfigError as error:
        why = str(error).removeprefix(f"{path}").removeprefix(":").strip()[:200]
        raise ConfigError(f"{path} is damaged ({why}): put the right one back, or go on from the "
                          f"checkpoints in a new folder with --resume {path.parent} --run_dir NEW, "
                          "or start anew with --overwrite") from error
    return flat(values)
