"""Shards: disjoint, equal, reshuffled, independent of how workers lie on ranks, resumable."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdnoise.training import sampler as module
from hvdnoise.training.dataspec import DataError
from hvdnoise.training.sampler import WorkerSampler


def of_ranks(size: int, virtual: int, *, examples: int = 103, batch: int = 3, epoch: int = 2,
             start_step: int = 0, seed: int = 5, repeat: int = 1
             ) -> dict[tuple[int, int], list[int]]:
    """(step, worker) -> indices, gathered from the samplers of all ranks."""
    shards = {}
    for rank in range(size):
        own = list(range(rank * virtual, (rank + 1) * virtual))
        sampler = WorkerSampler(examples, num_workers=size * virtual, worker_ids=own,
                                batch_size=batch, seed=seed, repeat=repeat)
        sampler.set_epoch(epoch, start_step)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        for number, indices in enumerate(batches):
            step, place = divmod(number, virtual)
            shards[start_step + step, own[place]] = indices
    return shards


@settings(deadline=None, max_examples=50)
@given(examples=st.integers(1, 200), workers=st.integers(1, 6), batch=st.integers(1, 9),
       epoch=st.integers(0, 3))
def test_shards_are_disjoint_and_equal(examples: int, workers: int, batch: int,
                                       epoch: int) -> None:
    if examples < workers * batch:
        with pytest.raises(DataError, match=f"{examples} training examples.*{workers} workers"):
            of_ranks(workers, 1, examples=examples, batch=batch)
        return
    shards = of_ranks(workers, 1, examples=examples, batch=batch, epoch=epoch)
    assert all(len(indices) == batch for indices in shards.values())
    steps = examples // (workers * batch)
    assert set(shards) == {(step, worker) for step in range(steps) for worker in range(workers)}
    seen = [index for indices in shards.values() for index in indices]
    assert len(set(seen)) == len(seen) == steps * workers * batch
    assert set(seen) <= set(range(examples))


def test_workers_get_the_same_examples_on_any_number_of_ranks() -> None:
    assert of_ranks(4, 1) == of_ranks(2, 2) == of_ranks(1, 4)


def test_each_epoch_and_each_seed_shuffles_anew() -> None:
    drawn = [of_ranks(2, 1, epoch=epoch, seed=seed) for epoch in (0, 1) for seed in (5, 6)]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])
    assert of_ranks(2, 1, epoch=1) == of_ranks(2, 1, epoch=1)


def test_a_resumed_epoch_goes_on_as_it_would_have() -> None:
    whole = of_ranks(2, 2)
    for start in (0, 1, 5, 8):
        rest = {key: indices for key, indices in whole.items() if key[0] >= start}
        assert of_ranks(2, 2, start_step=start) == rest


def test_repeated_batches_come_in_a_row() -> None:
    once, thrice = of_ranks(2, 2), of_ranks(2, 2, repeat=3)
    assert len(thrice) == 3 * len(once)
    assert all(indices == once[step // 3, worker] for (step, worker), indices in thrice.items())
    for start in (0, 1, 4, 24):  # also in the middle of the repetitions of one batch
        rest = {key: indices for key, indices in thrice.items() if key[0] >= start}
        assert of_ranks(2, 2, start_step=start, repeat=3) == rest
    sampler = WorkerSampler(103, num_workers=4, worker_ids=[0], batch_size=3, seed=5, repeat=3)
    per_epoch = sampler.steps_per_epoch
    assert per_epoch == 24
    batches = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches += list(sampler)
    for step, batch in enumerate(batches):  # of the whole run
        again = sampler.repetition(step)
        assert (step > 0 and batches[step - 1] == batch) == bool(again)
        assert batches[step - again] == batch and again < 3


def test_places_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"worker_ids=\[2\] must be some of 0 .. 1"):
        WorkerSampler(10, num_workers=2, worker_ids=[2], batch_size=1, seed=0)
    sampler = WorkerSampler(10, num_workers=2, worker_ids=[1], batch_size=1, seed=0)
    with pytest.raises(ValueError, match="start_step=6 is no place in a run of 5 steps"):
        sampler.set_epoch(0, 6)


@settings(deadline=None)
@given(examples=st.integers(0, 300), size=st.integers(1, 9), batch=st.integers(1, 40))
def test_evaluation_counts_every_example_once(examples: int, size: int, batch: int) -> None:
    shards = [module.test_shards(examples, size, rank, batch) for rank in range(size)]
    assert sorted(i for rank in shards for each in rank for i in each) == list(range(examples))
    assert all(1 <= len(each) <= batch for rank in shards for each in rank)
    counts = [sum(map(len, rank)) for rank in shards]
    assert max(counts) - min(counts) <= 1
