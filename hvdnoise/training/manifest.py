"""The manifest of a checkpoint: what it must say. It is read as text that anybody may have written.

    {"format": 1, "step": 123, "ranks": 2,
     "files": {"shared.pt": {"bytes": 9, "sha256": "..."}, "rank-0.pt": ..., "rank-1.pt": ...}}
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

FORMAT = 1
_MOST_BYTES = 64 << 20  # half a million ranks
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BrokenCheckpoint(ValueError):
    """A checkpoint is not whole; one line that says what is wrong with it."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in ``folder``, all of whose values have the right type.

    Raises:
        BrokenCheckpoint: naming what is wrong; OSError where it cannot be read.
    """
    manifest = _parse(folder / "manifest.json")
    if not isinstance(manifest, dict):
        raise BrokenCheckpoint("it cannot be read (the manifest is no JSON object)")
    if manifest.get("format") != FORMAT or type(manifest["format"]) is not int:
        raise BrokenCheckpoint(f"it has format {_short(manifest.get('format'))}, and this hvdnoise "
                               f"reads {FORMAT}")
    step, ranks, files = manifest.get("step"), manifest.get("ranks"), manifest.get("files")
    if not _is_count(step) or f"step-{step:08d}" != folder.name:
        raise BrokenCheckpoint(f"its manifest does not fit its folder (step {_short(step)})")
    if not isinstance(files, dict) or not _is_count(ranks) or files.keys() != _names(ranks, files):
        raise BrokenCheckpoint(f"its manifest does not name the files of {_short(ranks)} ranks")
    for name, facts in files.items():
        if not isinstance(facts, dict) or facts.keys() != {"bytes", "sha256"} \
                or not _is_count(facts["bytes"]) or not isinstance(facts["sha256"], str) \
                or not _SHA256.fullmatch(facts["sha256"]):
            raise BrokenCheckpoint(f"its manifest has no size and SHA-256 of {name}")
    return manifest


def _names(ranks: Any, files: dict[str, Any]) -> set[str]:
    """The files of so many ranks; of no more than there can be in ``files``."""
    return {"shared.pt", *(f"rank-{rank}.pt" for rank in range(min(ranks, len(files))))}


def _parse(path: Path) -> Any:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise BrokenCheckpoint(f"{path.name} is no file, but a link or a folder")
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise BrokenCheckpoint(f"{path.name} has more than {_MOST_BYTES} bytes")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # also of a number of too many digits
        raise BrokenCheckpoint(f"it cannot be read ({path.name}: {type(error).__name__}: "
                               f"{_short(error)})") from error


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _short(value: Any) -> str:
    """At most 80 characters of it, whatever it is."""
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__}"
    if type(value) is int and abs(value) >= 1 << 63:
        return "of too many digits"
    return " ".join(str(value).split())[:80]
