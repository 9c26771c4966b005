"""What the run folder says of an attempt. Files are compared with how they were before it, never by
a clock, since the folder may be another machine's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvdnoise.training import checkpoint
from hvdnoise.training.records import STEP_FILE

Stamp = tuple[int, int] | None


@dataclass(frozen=True)
class RunState:
    """How the folder of a run is at one moment.

    Args:
        checkpoint: step of the newest finished checkpoint, None without any.
        step: the last step that was taken, None before the first start of the training loop.
        settings, steps: of the files that every start of the trainer, and of its loop, makes anew.
        finished: whether there is a summary, which a start removes and the end writes.
    """

    checkpoint: int | None
    step: int | None
    settings: Stamp
    steps: Stamp
    finished: bool


def look(folder: Path) -> RunState:
    """The folder as it is now."""
    found = checkpoint.found(folder / "checkpoints")
    try:
        step = int((folder / STEP_FILE).read_text())
    except (OSError, ValueError):
        step = None
    return RunState(int(found[0].name[5:]) if found else None, step,
                    _stamp(folder / "config.yaml"), _stamp(folder / STEP_FILE),
                    (folder / "summary.json").is_file())


def _stamp(path: Path) -> Stamp:
    """Another one for each new file of this name."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_ctime_ns
