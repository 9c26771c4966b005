"""What a run folder says of its run. It is data from others: read with limits, nothing executed."""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdnoise.training import plugins, yamlfile
from hvdnoise.training.config import ConfigError
from hvdnoise.training.errors import one_line
from hvdnoise.training.origin import is_variable

LARGEST = 16 << 20  # bytes of a JSON file
MOST_RANKS = 1024
_VALUE = re.compile(r"[\w.,:+-]{0,64}", re.ASCII)  # of a variable: no path, nothing to expand
_DIGEST = re.compile(r"weights\w*_sha256")


@dataclass(frozen=True)
class Record:
    """A finished run.

    Args:
        folder: the run's.
        settings: as config.yaml nests them.
        environment: what environment.json says.
        summary: what summary.json says.
        ranks: R.
    """

    folder: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    ranks: int

    @property
    def plugins(self) -> list[str]:
        """Python files and modules that the run imports: its plugins, and those of functions."""
        found = self.settings.get("plugins") or []
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise ConfigError(f"{self.folder / 'config.yaml'}: plugins={found} is no list of names")
        return list(dict.fromkeys([*found, *map(
            plugins.code_of, plugins.function_names(self.settings).values())]))

    @property
    def transport(self) -> str:
        """What carried the collectives: gloo, mpi or torch; gloo where the record does not say."""
        found = self.environment.get("transport")
        return found if found in ("mpi", "torch") else "gloo"

    @property
    def threads(self) -> int:
        """Of each rank."""
        found = self.environment.get("threads")
        return found if isinstance(found, int) and 1 <= found <= MOST_RANKS else 1

    @property
    def device(self) -> str:
        """Where it trained: cpu or cuda."""
        gpus = bool(self.environment.get("gpus"))
        return "cuda" if gpus and self.settings.get("device") != "cpu" else "cpu"

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that may change bits, of those that can be handed on."""
        found = self.environment.get("variables")
        kept = {name: value for name, value in found.items() if is_variable(name)
                and isinstance(value, str) and _VALUE.fullmatch(value)} \
            if isinstance(found, dict) else {}
        return {"OMP_NUM_THREADS": str(self.threads), **kept} if found is None else kept

    @property
    def digests(self) -> dict[str, str]:
        """Of the weights, by the summary's keys."""
        return {key: value for key, value in self.summary.items()
                if _DIGEST.fullmatch(key) and isinstance(value, str)}


def read(folder: Path) -> Record:
    """The record of a finished run.

    Raises:
        ConfigError: one line, where there is none, it is damaged, or the run cannot be had again.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run={folder} holds no config.yaml: give the folder of a run")
    if not (folder / "summary.json").is_file():
        raise ConfigError(f"run={folder} holds no finished run: there is no summary.json")
    settings = yamlfile.read(folder / "config.yaml")[1]
    summary, environment = (read_json(folder / f"{name}.json")
                            for name in ("summary", "environment"))
    if summary.get("outcome", "finished") != "finished" or "weights_sha256" not in summary:
        raise ConfigError(f"run={folder} holds no finished run: summary.json says "
                          f"{summary.get('outcome')!r}, and has no digest of final weights")
    ranks = environment.get("ranks")
    if type(ranks) is not int or not 1 <= ranks <= MOST_RANKS or ranks != summary.get("ranks"):
        raise ConfigError(f"run={folder}: environment.json says ranks={ranks!r}, summary.json "
                          f"{summary.get('ranks')!r}: one of them is damaged")
    _check_starts(folder, summary.get("starts"))
    return Record(folder, settings, environment, summary, ranks)


def starts(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Where and how the run was started, and gone on with elsewhere; older runs do not say."""
    found = summary.get("starts")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _check_starts(folder: Path, found: Any) -> None:
    workers = [(each.get("ranks"), each.get("virtual_workers"), each.get("step"))
               for each in starts({"starts": found})]
    for before, now in zip(workers, workers[1:]):
        if before[:2] != now[:2]:
            raise ConfigError(
                f"run={folder} cannot be reproduced: it was resumed at step {now[2]} on {now[0]} "
                f"ranks x {now[1]} virtual workers, after {before[0]} x {before[1]} "
                "(resume_resize), and no single run does that")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file that anybody may have written.

    Raises:
        ConfigError: one line that names the file.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode) or state.st_size > LARGEST:
            raise ValueError(f"it is no file of at most {LARGEST} bytes")
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} cannot be read: it holds no object")
    return found


def plugin_file(plugin: str) -> Path | None:
    """The file that would be imported, found without importing anything."""
    if plugin.endswith(".py"):
        return Path(plugin) if Path(plugin).is_file() else None
    parts, places, origin = plugin.split("."), sys.path, ""
    for depth in range(1, len(parts) + 1):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:depth]), places)
        if spec is None:
            return None
        places, origin = list(spec.submodule_search_locations or []), spec.origin or ""
    return Path(origin) if Path(origin).is_file() else None


def plugin_digest(plugin: str) -> str | None:
    """SHA-256 (16 digits) of that file, as the record has it; None where there is none."""
    file = plugin_file(plugin)
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file is not None else None
