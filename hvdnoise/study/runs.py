"""What the run folders of a study say: they are its state, and there is no other."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hvdnoise.study.launch import MARK
from hvdnoise.study.plan import Run, differing
from hvdnoise.training.config import flat

Summary = dict[str, Any]
ENDED = ("finished", "diverged")


@dataclass(frozen=True)
class Found:
    """A run folder.

    Args:
        state: finished, diverged, unfinished, other (a run with other settings) or none.
        summary: what summary.json says, of the first two.
    """

    state: str
    summary: Summary = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def look(folder: Path, run: Run) -> Found:
    """What is there of a run."""
    try:
        text = (folder / "config.yaml").read_text()
    except (FileNotFoundError, NotADirectoryError):
        return Found("none")
    try:
        settings = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:  # damaged: whose run it was is not known
        settings = None
    if not isinstance(settings, dict) or differing(flat(settings), run.complete):
        return Found("other")
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (FileNotFoundError, ValueError):
        return Found("unfinished")
    return Found(summary.get("outcome", "finished"), summary)


def make_ready(folder: Path, run: Run, found: Found) -> list[str]:
    """The flags that start the run, or go on with it; of a killed start nothing is left."""
    if found.state == "none" and folder.exists():
        shutil.rmtree(folder)  # killed before it had a config.yaml: hvdnoise train would refuse it
    folder.parent.mkdir(parents=True, exist_ok=True)
    return ["--overwrite=true"] if found.state == "other" else ["--resume=auto"]


def tidy(folder: Path) -> None:
    """Remove the checkpoints of a run that has ended."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


class State:
    """All runs of a study that have been looked at.

    Args:
        folder: the study's.
        keep: ``all``, or ``weights``: the checkpoints of runs that have ended are removed.
    """

    def __init__(self, folder: Path, keep: str) -> None:
        self._folder, self._keep = folder, keep
        self._found: dict[str, tuple[Any, Found]] = {}
        self.failed: set[str] = set()  # paths, in this command

    def of(self, run: Run) -> Found:
        """The run's folder, as it was when it was last looked at."""
        key = (run.searched, run.seed)
        if self._found.get(run.path, (None,))[0] != key:
            self._found[run.path] = key, self.look(run)
        return self._found[run.path][1]

    def look(self, run: Run) -> Found:
        """The run's folder as it is now."""
        found = look(self._folder / run.path, run)
        self._found[run.path] = (run.searched, run.seed), found
        if found.ended and self._keep == "weights":
            tidy(self._folder / run.path)
        return found

    def outcome(self, run: Run) -> str:
        """finished, diverged, failed or missing, as results.json has it."""
        found = self.of(run)
        return found.state if found.ended else \
            "failed" if run.path in self.failed else "missing"


def last_words(log: Path) -> str:
    """The line of a run's log that says why it failed."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return "no log"
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith(MARK)]
    lines = lines[starts[-1] + 1:] if starts else lines
    telling = [line for line in lines if re.search(r"hvdnoise: (error:|rank \d+ )|failed:", line)]
    return (telling or lines or ["nothing was said"])[-1][:300]
