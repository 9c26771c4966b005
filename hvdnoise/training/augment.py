"""Augmentation of in-memory images, a batch at a time: random crop of the padded image, and flip.

Randomness is counter-based: example i in epoch e is cropped and flipped by 64 bits that are a hash
of (seed, e, i) and of nothing else. So which process prepares a batch, in which order, and where a
run was resumed make no difference.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hvdnoise import streams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def example_bits(seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits per example: output number ``index`` of the SplitMix64 stream (seed, epoch).

    Source: Steele, Lea, Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    start = np.uint64(streams.seed_for(seed, "data.augment", epoch))
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        bits = start + (indices.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def crop_and_flip(images: NDArray[np.uint8], bits: NDArray[np.uint64],
                  padding: int) -> NDArray[np.uint8]:
    """Each image shifted by -padding .. padding pixels both ways (zeros come in), half of them
    mirrored left to right.

    Args:
        images: (b, C, H, W).
        bits: (b,), of `example_bits`.
        padding: pixels of zeros on each side before the crop.

    Returns:
        (b, C, H, W), a new array.
    """
    height, width = images.shape[-2:]
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    offsets = 2 * padding + 1
    rows = _below(bits & np.uint64(0xFFFFFF), offsets)
    columns = _below((bits >> np.uint64(24)) & np.uint64(0xFFFFFF), offsets)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    cropped = windows[np.arange(len(images)), :, rows, columns]
    flipped = (bits >> np.uint64(63)).astype(bool)
    cropped[flipped] = cropped[flipped][..., ::-1]
    return cropped


def _below(bits: NDArray[np.uint64], limit: int) -> NDArray[np.int64]:
    """Uniform integers in 0 .. limit-1 from 24 bits each (bias below limit / 2^24)."""
    return ((bits * np.uint64(limit)) >> np.uint64(24)).astype(np.int64)
