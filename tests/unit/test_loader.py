"""Augmentation by counter; loaders: the same batches whoever prepares them, no stray process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hvdnoise.training import data
from hvdnoise.training.augment import crop_and_flip, example_bits
from hvdnoise.training.data import DataConfig
from tests.folders import write_folders


def small(**options: object) -> data.Datasets:
    return data.build(DataConfig("synthetic", num_examples=96, image_size=12,
                                 **options), seed=3)  # type: ignore[arg-type]


def sampler_of(sets: data.Datasets, worker_ids: list[int], num_workers: int,
               batch: int = 8) -> data.WorkerSampler:
    return data.WorkerSampler(len(sets.train), num_workers=num_workers, worker_ids=worker_ids,
                              batch_size=batch, seed=3)


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right))


def test_crop_and_flip_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 2, 5, 6), np.uint8)
    bits = example_bits(1, 2, np.arange(64))
    result = crop_and_flip(images, bits, 3)
    for image, word, got in zip(images, bits.tolist(), result):
        row, column = (word % 2**24 * 7) >> 24, ((word >> 24) % 2**24 * 7) >> 24
        expected = np.pad(image, ((0, 0), (3, 3), (3, 3)))[:, row:row + 5, column:column + 6]
        assert np.array_equal(got, expected[:, :, ::-1] if word >> 63 else expected)


def test_draws_are_uniform_and_fresh() -> None:
    """Over 2 x 20,000 draws of 9 cells a count has standard deviation 44.4: within 5 of it."""
    indices = np.arange(20_000)
    first, second = example_bits(0, 0, indices), example_bits(0, 1, indices)
    assert len(set(first) | set(second) | set(example_bits(1, 0, indices))) == 60_000
    bits = np.concatenate([first, second])
    for field in (bits & np.uint64(0xFFFFFF), bits >> np.uint64(24) & np.uint64(0xFFFFFF)):
        counts = np.bincount((field * np.uint64(9) >> np.uint64(24)).astype(int), minlength=9)
        assert np.all(np.abs(counts - 40_000 / 9) < 5 * 62.9)
    assert abs((bits >> np.uint64(63)).sum() - 20_000.0) < 5 * 100


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    train = small().train
    images, _ = train.batch([5, 9, 70], 4)
    again, _ = train.batch([70, 1, 5], 4)
    assert torch.equal(images[0], again[2]) and torch.equal(images[2], again[0])
    assert not torch.equal(images, train.batch([5, 9, 70], 5)[0])
    other = data.build(DataConfig("synthetic", num_examples=96, image_size=12), seed=3).train
    assert torch.equal(images, other.batch([5, 9, 70], 4)[0])
    plain = small(augment=False).train
    assert torch.equal(plain.batch([5], 4)[0], plain.batch([5], None)[0])
    assert torch.equal(plain.batch([5], None)[0], train.batch([5], None)[0])


def test_synthetic_images_differ_by_class_and_seed() -> None:
    sets = small()
    assert sets.spec == data.DataSpec("synthetic", 10, (3, 12, 12), 96, 24)
    images, labels = sets.train.batch(range(96), None)
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])
    tests, wanted = sets.test.batch(range(24), None)
    nearest = (tests[:, None] - means).square().flatten(2).sum(2).argmin(1)
    assert (nearest == wanted).float().mean() > 0.9  # the classes are the same in both parts
    assert not torch.equal(images, data.build(DataConfig(
        "synthetic", num_examples=96, image_size=12), seed=4).train.batch(range(96), None)[0])


def test_virtual_workers_load_what_ranks_load() -> None:
    sets = small()
    alone = list(data.train_loader(sets, sampler_of(sets, [0, 1, 2, 3], 4)))
    for worker in range(4):
        assert same(list(data.train_loader(sets, sampler_of(sets, [worker], 4))),
                    alone[worker::4])


def test_a_loader_yields_the_sampled_examples_as_augmented_in_their_epoch() -> None:
    sets = small()
    sampler = sampler_of(sets, [1], 2)
    loader = data.train_loader(sets, sampler)
    for epoch, start in ((0, 0), (3, 2)):
        sampler.set_epoch(epoch, start)
        expected = [sets.train.batch(indices, epoch) for indices in sampler]
        assert len(expected) == 6 - start
        assert same(list(loader), expected)


def test_iterating_draws_nothing_from_torch() -> None:
    sets = small()
    loader = data.train_loader(sets, sampler_of(sets, [0], 1))
    before = torch.get_rng_state()
    list(loader)
    list(data.eval_loader(sets.test, size=1, rank=0, batch_size=7))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_loads_every_example_once() -> None:
    sets = small()
    parts = [list(data.eval_loader(sets.test, size=5, rank=rank, batch_size=3))
             for rank in range(5)]
    images = torch.cat([images for part in parts for images, _ in part])
    assert torch.equal(images, sets.test.batch(range(24), None)[0])


@pytest.mark.slow
def test_loader_processes_give_the_same_batches(tmp_path: Path) -> None:
    write_folders(tmp_path)
    folders = data.build(DataConfig("imagefolder", root=str(tmp_path), image_size=16), seed=3)
    for sets, batch in ((folders, 2), (small(), 8)):
        sampler = sampler_of(sets, [0, 1], 2, batch)
        here = data.train_loader(sets, sampler)
        there = data.train_loader(sets, sampler, loader_workers=2)
        before = torch.get_rng_state()
        for epoch, start in ((0, 0), (1, 1)):
            sampler.set_epoch(epoch, start)
            assert same(list(here), list(there))
        assert torch.equal(torch.get_rng_state(), before)
        assert same(list(data.eval_loader(sets.test, size=2, rank=1, batch_size=2)),
                    list(data.eval_loader(sets.test, size=2, rank=1, batch_size=2,
                                          loader_workers=1)))


PROGRAM = """
import multiprocessing, sys, time
from hvdnoise.training import data
if __name__ == "__main__":
    sets = data.build(data.DataConfig("synthetic", num_examples=64, image_size=8), seed=0)
    sampler = data.WorkerSampler(64, num_workers=1, worker_ids=[0], batch_size=1, seed=0)
    batches = iter(data.train_loader(sets, sampler, loader_workers=2))
    next(batches), next(batches)  # one of each process: both are up
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
    print("rest", sum(1 for _ in batches), flush=True)
    if sys.argv[1] == "raise":
        raise RuntimeError("on purpose")
    if sys.argv[1] == "wait":
        time.sleep(60)
"""


def start(ending: str, tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen([sys.executable, str(script), ending], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root})
    assert process.stdout is not None
    children = [int(pid) for pid in process.stdout.readline().split()]
    assert len(children) == 2
    return process, children


def alive(pids: list[int]) -> list[int]:
    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return "X"
    return [pid for pid in pids if state(pid) not in "XZ"]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["return", "raise"])
def test_loader_processes_outlive_sigterm_and_end_with_the_rank(ending: str,
                                                                tmp_path: Path) -> None:
    process, children = start(ending, tmp_path)
    for child in children:  # as a scheduler does that signals the whole job
        os.kill(child, signal.SIGTERM)
        os.kill(child, signal.SIGINT)
    begun = time.monotonic()
    out, err = process.communicate("go on\n", timeout=60)
    assert out == "rest 62\n"
    assert process.returncode == (1 if ending == "raise" else 0), err
    assert "on purpose" in err if ending == "raise" else err == "", err
    assert "DataLoader worker" not in err
    assert not alive(children) and time.monotonic() - begun < 20


@pytest.mark.slow
def test_loader_processes_end_when_the_rank_is_killed(tmp_path: Path) -> None:
    process, children = start("wait", tmp_path)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 15
    while alive(children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(children)
    process.communicate()
