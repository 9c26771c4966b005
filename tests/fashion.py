"""Fashion-MNIST's files as torchvision reads them, small: real images where they are, else made up.

The format is MNIST's IDX: two zero bytes, 8 for unsigned bytes, the number of dimensions, each
dimension as a big-endian 32-bit number, then the bytes.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

REAL = next((folder for folder in map(Path, (
    "/usr/share/datasets/fashion-mnist",
    str(Path(__file__).parents[2] / "shared/data/fashion-mnist"),
    str(Path(__file__).parents[1] / "shared/data/fashion-mnist"))) if folder.is_dir()), None)


def write_files(root: Path, train: int, test: int) -> None:
    """Write ROOT/FashionMNIST/raw with so many images."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in ("train", train), ("t10k", test):
        images, labels = real(part, count) if REAL else made_up(part, count)
        for name, array in (f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte",
                                                                   labels):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / name).write_bytes(head + array.tobytes())


def real(part: str, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The first images (N, 28, 28) and their labels (N,)."""
    assert REAL is not None
    with gzip.open(REAL / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(16 + count * 784)[16:], np.uint8)
    with gzip.open(REAL / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(8 + count)[8:], np.uint8)
    return images.reshape(count, 28, 28), labels


def made_up(part: str, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One coarse pattern for each class, under noise."""
    patterns = np.random.default_rng(0).uniform(0, 255, (10, 7, 7)).repeat(4, 1).repeat(4, 2)
    rng = np.random.default_rng(len(part))
    labels = rng.integers(0, 10, count).astype(np.uint8)
    noise = rng.normal(0, 40, (count, 28, 28))
    return (patterns[labels] + noise).clip(0, 255).astype(np.uint8), labels
