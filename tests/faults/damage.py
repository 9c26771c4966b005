"""Ways to damage the newest of several checkpoints."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Callable

from hvdnoise.training import checkpoint


def do(way: str, checkpoints: Path) -> None:
    """Damage the newest checkpoint where there is another one, or else nothing."""
    found = checkpoint.found(checkpoints)
    if len(found) > 1:
        WAYS[way](found[0])


def _truncate(folder: Path) -> None:
    path = folder / "shared.pt"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _flip(folder: Path) -> None:
    path = folder / "rank-0.pt"
    content = bytearray(path.read_bytes())
    content[random.Random(str(folder)).randrange(len(content))] ^= 1
    path.write_bytes(content)


def _manifest(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "manifest.json").write_text(text)
    return write


def _step_as_text(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "step": "x", "ranks": -1}))


WAYS: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate, "flipped": _flip,
    "file gone": lambda folder: (folder / "rank-1.pt").unlink(),
    "manifest gone": lambda folder: (folder / "manifest.json").unlink(),
    "manifest empty": _manifest(""), "manifest deep": _manifest("[" * 100_000),
    "manifest huge number": _manifest('{"format": 1, "step": ' + "9" * 5000 + "}"),
    "manifest text": _step_as_text,
    "files emptied": lambda folder: [path.write_bytes(b"") for path in folder.glob("*.pt")]
    and None,
    "folder emptied": lambda folder: (shutil.rmtree(folder), folder.mkdir()) and None}
