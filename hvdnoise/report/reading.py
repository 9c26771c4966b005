"""What runs and studies have written, read leniently: what is missing or cut off is said.

    RUN     config.yaml, metrics.jsonl, summary.json, environment.json, preempted.json,
            measure/*.json and logs/rank-0.log; each may be missing
    STUDY   results.json, study.yaml, environment.json, and the folders of its runs
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from hvdnoise.report.numbers import number, plural
from hvdnoise.training.config import ConfigError, flat

OF_A_STUDY = ("results.json", "study.yaml")
OF_A_RUN = ("config.yaml", "metrics.jsonl", "summary.json")
_EVENT = re.compile(r"^(\S+ \S+) (INFO|WARNING|ERROR|CRITICAL) (.*)")
_WORTH_TELLING = ("resum", "no checkpoint", "SIGTERM")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # many times faster
_GROUPS = ("runs", "settings", "search", "chosen", "versus_baseline")
_LISTS = ("methods", "trials", "finals", "seeds")
Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run's records.

    Args:
        settings: flat, by the flags' names.
        lines: of metrics.jsonl by kind, each in the order of its steps.
        events: (time, what) from the log of rank 0: warnings, errors, resumptions.
        measurements: of measure/, by the file's name.
        problems: what could not be read, in words.
        written: when a metric was last written, in words.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    summary: dict[str, Any]
    environment: dict[str, Any]
    lines: dict[str, list[Line]]
    events: list[tuple[str, str]]
    measurements: dict[str, dict[str, Any]]
    problems: list[str]
    preempted: bool
    written: str | None

    @property
    def outcome(self) -> str:
        """finished, diverged, preempted, or unfinished (it runs still, or has crashed)."""
        if self.summary:
            return str(self.summary.get("outcome", "finished"))
        return "preempted" if self.preempted else "unfinished"

    @property
    def scored(self) -> str:
        """Which images the scores during the run are of: validation or test."""
        return "validation" if self.lines.get("validation") else "test"

    def values(self, kind: str, *keys: str) -> list[list[float]]:
        """A list for each key over the lines of a kind, NaN where there is no number."""
        return [[number(line.get(key)) for line in self.lines.get(kind, [])] for key in keys]


@dataclass(frozen=True)
class Study:
    """A study's results, and where they are from.

    Args:
        prefix: of the keys of its figures, where a page has several studies.
    """

    folder: Path
    name: str
    results: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    prefix: str = ""
    _read: dict[str, Run] = field(default_factory=dict, repr=False)

    def run(self, name: str) -> Run:
        """One of its runs by its folder's name in results.json; each is read once."""
        if name not in self._read:
            self._read[name] = read_run(self.folder / name, name)
        return self._read[name]

    def numbered(self, place: int) -> Study:
        """The one at this place of a page; the first needs no prefix."""
        return replace(self, prefix=f"study-{place}-" if place > 1 else "")

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The methods at their batches."""
        return list(self.results.get("methods", []))


def read(folder: Path, name: str) -> Run | Study:
    """What ``folder`` holds.

    Raises:
        ConfigError: where that is neither a run nor a study.
    """
    if any((folder / file).is_file() for file in OF_A_STUDY):
        return read_study(folder, name)
    if any((folder / file).is_file() for file in OF_A_RUN):
        return read_run(folder, name)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: give folders of runs or studies")
    inside = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
    hint = f"it holds runs, such as {inside[0]}: give {folder}/*" if inside else \
        "give the folder of a run or a study"
    raise ConfigError(f"{folder} is neither a study ({' or '.join(OF_A_STUDY)}) nor a run "
                      f"({', '.join(OF_A_RUN)}): {hint}")


def read_study(folder: Path, name: str) -> Study:
    """The study in ``folder``; also one that has no results yet."""
    problems: list[str] = []
    results = _sound(_object(folder / "results.json", problems))
    return Study(folder, str(results.get("name") or name), results,
                 _object(folder / "study.yaml", problems),
                 _object(folder / "environment.json", problems), problems)


def _sound(results: dict[str, Any]) -> dict[str, Any]:
    """Without what is no group or list where there must be one, at any depth."""
    found = {}
    for key, value in results.items():
        if key in _GROUPS and not isinstance(value, dict) or key in _LISTS and not isinstance(
                value, list):
            continue
        if key in ("methods", "trials", "finals"):
            value = [_sound(each) for each in value if isinstance(each, dict)]
        found[key] = value
    return found


def read_run(folder: Path, name: str) -> Run:
    """The run in ``folder``, however little there is of it."""
    problems: list[str] = []
    metrics = folder / "metrics.jsonl"
    lines = _lines(metrics, problems)
    written = datetime.fromtimestamp(metrics.stat().st_mtime).isoformat(" ", "seconds") \
        if metrics.is_file() else None
    measured = {path.stem: _object(path, problems)
                for path in sorted((folder / "measure").glob("*.json"))}
    return Run(folder, name, flat(_object(folder / "config.yaml", problems)),
               _object(folder / "summary.json", problems),
               _object(folder / "environment.json", problems), lines,
               _events(folder / "logs" / "rank-0.log"),
               {stem: each for stem, each in measured.items() if each}, problems,
               (folder / "preempted.json").is_file(), written)


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON or YAML object; an empty one, and a problem, where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text()
        found = yaml.load(text, _LOADER) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read ({' '.join(str(error).split())[:100]})")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name} holds no object")
        return {}
    return found


def _lines(path: Path, problems: list[str]) -> dict[str, list[Line]]:
    """By kind; of two lines of a step the later one counts."""
    if not path.is_file():
        problems.append("there is no metrics.jsonl")
        return {}
    found: dict[str, dict[float, Line]] = {}
    cut = 0
    with path.open(errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
                step = number(line["step"])
                found.setdefault(str(line["kind"]), {})[step] = line
            except (ValueError, KeyError, TypeError):
                cut += 1
    if cut:
        problems.append(f"metrics.jsonl: {plural(cut, 'line')} cannot be read (cut off, for "
                        "instance)")
    if not found:
        problems.append("metrics.jsonl holds no metrics")
    return {kind: [steps[step] for step in sorted(steps)] for kind, steps in found.items()}


def _events(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        return []
    found = []
    with path.open(errors="replace") as file:
        for text in file:
            if match := _EVENT.match(text):
                time, level, message = match.groups()
                if level != "INFO" or message.startswith(_WORTH_TELLING):
                    found.append((time.partition(",")[0], message))
    return found
