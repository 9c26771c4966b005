"""The data of a run: `prepare` it on every host, `build` the data sets, load batches.

- datasets.py: one record a data set. dataspec.py: settings and facts.
- fetch.py: find, download, check, unpack.
- sampler.py: which examples when. augment.py, images.py, folder.py: the images themselves.

What a loader yields depends on (seed, epoch, example index) alone, not on ranks, loader processes
or the step where a run was resumed.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hvdnoise import streams
from hvdnoise.training.dataspec import DataConfig, DataError, DataSpec
from hvdnoise.training.errors import ConfigError
from hvdnoise.training.fetch import prepare
from hvdnoise.training.images import Images, Subset, noisy_labels
from hvdnoise.training.sampler import WorkerSampler, steps_per_epoch, test_shards

__all__ = ["DataConfig", "DataError", "DataSpec", "Datasets", "Loader", "WorkerSampler", "build",
           "prepare", "steps_per_epoch", "eval_loader", "test_shards", "train_loader"]

Loader = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Datasets:
    """The training and test images and their facts.

    Args:
        train: those that are trained on, with the labels trained on.
        validation: those held out, if any; their batches without an epoch are not augmented.
    """

    train: Images
    test: Images
    spec: DataSpec
    validation: Images | None = None


def build(config: DataConfig, *, seed: int) -> Datasets:
    """Open the data sets that `prepare` has made ready.

    Args:
        config: the settings.
        seed: of the augmentation, the images held out and left out, the noise in labels and the
            synthetic images; equal on all ranks.

    Raises:
        DataError: when the files are not there or damaged, or hold too few images.
    """
    record = config.record
    try:
        whole, num_classes = record.load(config, seed, "train")
        test, _ = record.load(config, seed, "test")
    except (ConfigError, DataError):
        raise
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"cannot read {config.dataset} in {config.path} ({text}): call "
                        "hvdnoise.training.data.prepare first") from error
    train, validation = _split(whole, config, num_classes, seed)
    held_out = 0 if validation is None else len(validation)
    spec = DataSpec(config.dataset, num_classes, record.shape(config), len(train), len(test),
                    held_out, record.dtype(config))
    return Datasets(train, test, spec, validation)


def _split(whole: Images, config: DataConfig, num_classes: int, seed: int
           ) -> tuple[Images, Images | None]:
    """The images trained on and those held out, each in the order of the whole set.

    One permutation for the seed: what is held out comes first, and a smaller ``limit`` takes a
    part of what a larger one takes.
    """
    held_out, used = config.validation, config.in_use(len(whole))
    if used == len(whole) and config.label_noise == 0:
        return whole, None
    order = torch.randperm(len(whole), generator=streams.generator(seed, "data.split")).numpy()
    chosen = np.sort(order[held_out:held_out + used])
    labels = whole.labels[chosen]
    if config.label_noise > 0:
        if num_classes < 2:
            raise DataError(f"data.label_noise={config.label_noise} needs another class, and the "
                            "data set has one: leave it out")
        labels = noisy_labels(labels, config.label_noise, num_classes, seed)
    validation = Subset(whole, np.sort(order[:held_out])) if held_out else None
    return Subset(whole, chosen, labels), validation


def train_loader(datasets: Datasets, sampler: WorkerSampler, *, loader_workers: int = 0,
                 pin_memory: bool = False) -> Loader:
    """Yields (images (b, C, H, W) float32, labels (b,) int64), one item per micro-batch.

    The items come in the order of ``sampler``: for each step one per worker of this rank. Call
    ``sampler.set_epoch`` before each iteration. With ``loader_workers`` > 0 the same batches are
    prepared by that many processes, which live as long as the loader.
    """
    return _loader(datasets.train, _WithEpoch(sampler), loader_workers, pin_memory)


def eval_loader(images: Images, *, size: int, rank: int, batch_size: int,
                loader_workers: int = 0, pin_memory: bool = False) -> Loader:
    """Yields this rank's share of images to score, each once, not augmented; see `test_shards`."""
    shards = test_shards(len(images), size, rank, batch_size)
    return _loader(images, [(None, shard) for shard in shards], loader_workers, pin_memory)


class _WithEpoch(Sampler[tuple[int, list[int]]]):
    """The batches of a sampler with their epoch, which loader processes cannot know otherwise."""

    def __init__(self, sampler: WorkerSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch = self._sampler.epoch
        return ((epoch, indices) for indices in self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """A data set whose items are batches, by key (epoch, indices)."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __getitem__(self, key: tuple[int | None, Sequence[int]]) -> tuple[Tensor, Tensor]:
        epoch, indices = key
        return self._images.batch(indices, epoch)


class _InProcess(Iterable[tuple[Tensor, Tensor]]):
    """Batches as a DataLoader without processes gives them, at less cost."""

    def __init__(self, batches: _Batches, keys: Iterable[Any]) -> None:
        self._batches, self._keys = batches, keys

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self._batches.__getitem__, self._keys)


def _loader(images: Images, keys: Iterable[Any], workers: int, pin_memory: bool) -> Loader:
    """A DataLoader over batches, or what does the same.

    Its processes are spawned. A fork would copy Horovod's and MPI's state without their threads
    (locks held for ever, registered memory and CUDA contexts gone wrong); a fork server would die
    of a SIGTERM that a scheduler sends to the whole process group, and its workers with it.
    """
    if workers == 0 and not pin_memory:
        return _InProcess(_Batches(images), keys)
    options: dict[str, Any] = {}
    if workers > 0:
        options = {"multiprocessing_context": "spawn", "persistent_workers": True,
                   "worker_init_fn": _outlive_signals}
        atexit.register(_end_workers)
    # A generator of its own: else each iteration draws from the default one, and a resumed run,
    # which starts one iteration more, would part from the uninterrupted one.
    return DataLoader(_Batches(images), batch_size=None, sampler=keys, num_workers=workers,
                      collate_fn=_as_it_is, pin_memory=pin_memory, generator=torch.Generator(),
                      **options)


def _as_it_is(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    """In a loader process: leave SIGTERM and SIGINT to the rank.

    A preempted rank still needs batches until all ranks have reached the step at which they save.
    A loader process ends when the rank closes it, exits (`_end_workers`) or is gone (it looks
    every 5 s). Before this runs, while the process starts, a SIGTERM still ends it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_workers() -> None:
    """At exit: kill the daemonic children; Python would send SIGTERM only and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed one for a fault
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
