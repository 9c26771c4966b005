"""Random streams: a pure function of seed and key; different keys, independent numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hvdnoise import streams
from tests.laws import assert_standard_normal


def test_the_same_key_gives_the_same_numbers() -> None:
    first = streams.normal(100, 3, "purpose", 7, 2)
    torch.randn(5)  # the global generator has no part in it
    assert torch.equal(streams.normal(100, 3, "purpose", 7, 2), first)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    streams.normal(10, 0, "x")
    assert torch.equal(torch.get_rng_state(), before)


KEYS: list[Any] = [
    (0, "a", 1), (1, "a", 1), (-1, "a", 1), (10, "a", 1), (2 ** 63, "a", 1),
    (0, "b", 1), (0, "a", 2), (0, "a", "1"), (0, "a", 1, 0), (0, "a", 1, 1), (0, "a"),
    (0, "a", 11), (0, "a1"), (0, 1, "a"), (0, "a", 1, 11), (0, "a", 11, 1), (0, "a, 1")]


def test_every_part_of_the_key_counts() -> None:
    seeds = {streams.seed_for(*key) for key in KEYS}
    assert len(seeds) == len(KEYS)


def test_seeds_have_63_bits() -> None:
    seeds = np.array([streams.seed_for(0, "bits", n) for n in range(1000)])
    assert seeds.min() >= 0 and seeds.max() < 2 ** 63
    for bit in range(63):  # a bit that is always 0 or always 1 has a chance of 2^-999
        assert 0 < ((seeds >> bit) & 1).sum() < 1000


def test_seeds_are_for_ever() -> None:
    """A checkpoint holds the step alone, so the key's meaning must not change."""
    assert streams.seed_for(0, "gnc-mix", 3, 1) == 754421277734879643


def test_numbers_of_other_types_are_the_same_key() -> None:
    seed: Any = np.int64(3)
    step: Any = torch.tensor(7)
    assert streams.seed_for(seed, "x", step) == streams.seed_for(3, "x", 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_shape(dtype: torch.dtype) -> None:
    assert streams.normal((2, 3), 0, "x", dtype=dtype).dtype == dtype
    assert streams.normal((2, 3), 0, "x").shape == (2, 3)
    assert streams.normal(4, 0, "x").shape == (4,)
    assert streams.normal((), 0, "x").shape == ()


def test_a_stream_is_normal() -> None:
    assert_standard_normal(streams.normal((20_000, 4), 0, "law", dtype=torch.float64))


def test_streams_are_independent() -> None:
    """Of successive steps, workers and seeds, drawn as the noises draw them: few numbers each."""
    samples = [[float(streams.normal(1, seed, "law", step, worker, dtype=torch.float64))
                for step in (n, n + 10_000) for worker in (0, 1) for seed in (0, 1)]
               for n in range(2000)]
    assert_standard_normal(samples)
    pairs = [torch.cat([streams.normal(4, 0, "law", step, dtype=torch.float64)
                        for step in (2 * n, 2 * n + 1)]) for n in range(1500)]
    assert_standard_normal(torch.stack(pairs))


def test_a_generator_starts_at_the_beginning() -> None:
    once = streams.generator(0, "x")
    first, second = torch.randn(3, generator=once), torch.randn(3, generator=once)
    assert torch.equal(torch.randn(3, generator=streams.generator(0, "x")), first)
    assert not torch.equal(first, second)


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    first, again = (streams.normal(1000, 0, "x", device="cuda") for _ in range(2))
    assert first.is_cuda and torch.equal(first, again)
