"""Folders of images, as an imagefolder data set has them, and of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hvdnoise.training import checkpoint
from hvdnoise.world import World


def save_checkpoint(folder: Path, step: int, shared: Any, own: Any, world: World, *,
                    keep: int) -> Path:
    """Write a checkpoint, and wait for it. Collective."""
    part = checkpoint.begin(folder, step, world)
    return checkpoint.commit(part, lambda: checkpoint.write(part, shared, own, world.rank), world,
                             keep=keep)


def write_folders(root: Path, train: int = 3, val: int = 2, classes: Sequence[str] = "abc") -> None:
    rng = np.random.default_rng(2)
    for part, count in (("train", train), ("val", val)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
                suffix = "png" if i % 2 else "jpg"
                Image.fromarray(pixels).save(root / part / name / f"{i}.{suffix}")
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(root / "train" / classes[0] / "gray.png")
