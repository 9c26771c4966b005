"""Random streams that need no checkpoint: every draw is keyed by what it is for.

A stream is a pure function of (seed, key): the key names the purpose, the step and, for private
streams, the worker. Two ranks that use the same key draw the same numbers (a *shared* stream); a
key that contains the worker's index is *private* to that worker, wherever that worker lives. So a
resumed run needs the step alone, and 4 ranks x 1 worker draw what 1 rank x 4 workers draw.

Draws are equal across ranks only on like hardware and the same torch build (torch promises no
more): a job that mixes CPU types or GPU types must not use a shared stream of P normals.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seed_for(seed: int, *key: int | str) -> int:
    """A 63-bit seed for one purpose: a BLAKE2b hash of the seed and the key."""
    text = repr((int(seed),) + tuple(part if isinstance(part, str) else int(part) for part in key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator at the start of the stream (seed, key)."""
    return torch.Generator(device=device).manual_seed(seed_for(seed, *key))


def normal(shape: int | tuple[int, ...], seed: int, *key: int | str,
           device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of the stream (seed, key)."""
    size = (shape,) if isinstance(shape, int) else shape
    return torch.randn(size, generator=generator(seed, *key, device=device), device=device,
                       dtype=dtype)
