"""Which examples a worker trains on at a step, and which a rank counts in evaluation.

With N examples, W workers and b examples per worker and step, a pass over the data, an epoch, has
floor(N / (W b)) batches. A permutation p of 0 .. N-1 is drawn anew for each epoch from (seed,
epoch), and worker w trains on p[(s W + w) b : (s W + w + 1) b] of batch s. Each batch is drawn
``repeat`` = K times in a row (once, unless asked for): step t of an epoch takes batch floor(t / K),
and an epoch has K floor(N / (W b)) steps. So the shards of an epoch are disjoint and of equal
length; the N mod (W b) examples at the end of the permutation sit this epoch out (another epoch
draws others). The assignment depends on (seed, epoch, N, W, b, K) alone: 4 ranks x 1 worker,
2 x 2 and 1 x 4 give a worker the same examples in the same order, and so does a run that is
resumed at any step.
"""

from __future__ import annotations

from typing import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from hvdnoise import streams
from hvdnoise.training.dataspec import DataError


def steps_per_epoch(num_examples: int, num_workers: int, batch_size: int, *, repeat: int = 1
                    ) -> int:
    """Optimizer steps in an epoch: repeat * floor(num_examples / (num_workers * batch_size)).

    Raises:
        DataError: when the examples do not fill a single step.
    """
    steps = num_examples // (num_workers * batch_size)
    if steps < 1:
        raise DataError(
            f"{num_examples} training examples do not fill one step of {num_workers} workers x "
            f"{batch_size} examples: use a smaller data.batch_size, fewer workers or more data")
    return steps * repeat


class WorkerSampler(Sampler[list[int]]):
    """The batches of a rank's own workers, in the order of its backward passes.

    For every step it yields one list of ``batch_size`` example indices per worker in
    ``worker_ids``; see the module's docstring for the rule.

    Args:
        num_examples: N, training examples in the data set.
        num_workers: W, workers of all ranks together.
        worker_ids: this rank's workers, of 0 .. W-1: rank * V .. rank * V + V-1.
        batch_size: b, examples per worker and step.
        seed: of the shuffling; equal on all ranks.
        repeat: K, how many times in a row each batch is drawn.

    Attributes:
        epoch, start_step: where the next iteration begins; see `set_epoch`.
        steps_per_epoch: optimizer steps in a full epoch, equal on all ranks.

    Raises:
        DataError: when N < W b.
        ValueError: when a worker id is not one of 0 .. W-1.
    """

    def __init__(self, num_examples: int, *, num_workers: int, worker_ids: Sequence[int],
                 batch_size: int, seed: int, repeat: int = 1) -> None:
        wrong = [worker for worker in worker_ids if not 0 <= worker < num_workers]
        if wrong or not worker_ids:
            raise ValueError(f"worker_ids={list(worker_ids)} must be some of 0 .. "
                             f"{num_workers - 1}, as num_workers={num_workers}")
        self.steps_per_epoch = steps_per_epoch(num_examples, num_workers, batch_size,
                                               repeat=repeat)
        self.num_examples, self.num_workers = num_examples, num_workers
        self.worker_ids, self.batch_size, self.seed = list(worker_ids), batch_size, seed
        self.repeat = repeat
        self.epoch = self.start_step = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Begin the next iteration at a step of an epoch (0 .. steps_per_epoch, the end)."""
        if epoch < 0 or not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"epoch={epoch}, start_step={start_step} is no place in a run of "
                             f"{self.steps_per_epoch} steps per epoch")
        self.epoch, self.start_step = epoch, start_step

    def repetition(self, step: int) -> int:
        """How many times the batch of a step of the run (from 0) has been drawn before, in the
        steps right before it: 0 .. repeat - 1."""
        return step % self.repeat  # an epoch has a multiple of repeat steps

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.num_examples, generator=streams.generator(
            self.seed, "data.order", self.epoch))
        batches = self.steps_per_epoch // self.repeat
        used = batches * self.num_workers * self.batch_size
        shards = order[:used].view(batches, self.num_workers, self.batch_size)
        for step in range(self.start_step, self.steps_per_epoch):
            for worker in self.worker_ids:
                yield shards[step // self.repeat, worker].tolist()

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.start_step) * len(self.worker_ids)


def test_shards(num_test: int, size: int, rank: int, batch: int) -> list[range]:
    """The evaluation batches of a rank: index ranges of at most ``batch`` examples.

    Rank r takes the examples floor(r N / size) .. floor((r+1) N / size) - 1, so all ranks together
    count each example exactly once. The last batch of a rank may be short, and ranks may have
    unequal numbers of batches (one may have none): nothing collective may run inside this loop.
    """
    begin, end = rank * num_test // size, (rank + 1) * num_test // size
    return [range(start, min(start + batch, end)) for start in range(begin, end, batch)]
