"""Reading the settings that a run has written, which may be damaged or not its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hvdnoise.training.config import ConfigError, flat

_MOST_BYTES = 1 << 20


class _Plain(yaml.SafeLoader):
    """YAML without aliases, which a run does not write, and a few bytes of which can stand for
    more than fits into memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml, by the flags' names. Nothing of it is executed.

    Raises:
        ConfigError: when it is damaged.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
        values = yaml.load(content.decode(), _Plain)
        if not isinstance(values, dict) or not values:
            raise ValueError("it holds no settings")
        return flat(values)
    except (OSError, ValueError, TypeError, OverflowError, AttributeError, RecursionError,
            yaml.YAMLError) as error:
        why = " ".join((str(error) or type(error).__name__).split())[:200]
        raise ConfigError(f"{path} is damaged ({why}): put the right one back, or go on from the "
                          f"checkpoints in a new folder with --resume {path.parent} --run_dir NEW, "
                          "or start anew with --overwrite") from error
