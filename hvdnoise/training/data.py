"""The data of a run: `prepare` it on every host, `build` the data sets, load batches.

- dataspec.py: settings, facts, the error. fetch.py: find, download, check, unpack.
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
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hvdnoise.training.dataspec import DataConfig, DataError, DataSpec
from hvdnoise.training.fetch import prepare
from hvdnoise.training.images import ArrayImages, Images, synthetic
from hvdnoise.training.sampler import WorkerSampler, steps_per_epoch, test_shards

__all__ = ["DataConfig", "DataError", "DataSpec", "Datasets", "Loader", "WorkerSampler", "build",
           "prepare", "steps_per_epoch", "test_loader", "test_shards", "train_loader"]

Loader = DataLoader[tuple[Tensor, Tensor]]

_MEAN_AND_STD = {  # per channel, of the training images with pixel values in 0 .. 1
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
    "synthetic": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}
_PADDING = {"fashion-mnist": 2, "cifar10": 4, "cifar100": 4, "synthetic": 4}


@dataclass(frozen=True)
class Datasets:
    """The training and test images and their facts."""

    train: Images
    test: Images
    spec: DataSpec


def build(config: DataConfig, *, seed: int) -> Datasets:
    """Open the data sets that `prepare` has made ready.

    Args:
        config: the settings.
        seed: of the augmentation and of the synthetic images; equal on all ranks.

    Raises:
        DataError: when the files are not there or damaged.
    """
    try:
        if config.dataset == "imagefolder":
            return _folders(config, seed)
        return _arrays(config, seed)
    except (RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"cannot read {config.dataset} in {config.path} ({text}): call "
                        "hvdnoise.training.data.prepare first") from error


def _folders(config: DataConfig, seed: int) -> Datasets:
    from hvdnoise.training.folder import FolderImages
    mean, std = _MEAN_AND_STD["imagefolder"]
    train = FolderImages(config.path / "train", side=config.side, augment=config.augment,
                         limit=config.limit, mean=mean, std=std, seed=seed)
    test = FolderImages(config.path / "val", side=config.side, augment=False, limit=None,
                        mean=mean, std=std, seed=seed)
    shape = (3, config.side, config.side)
    return Datasets(train, test, DataSpec(config.dataset, len(train.classes), shape, len(train),
                                          len(test)))


def _arrays(config: DataConfig, seed: int) -> Datasets:
    mean, std = _MEAN_AND_STD[config.dataset]
    padding = _PADDING[config.dataset] if config.augment else None
    images, labels, num_classes = _load(config, seed, "train")
    train = ArrayImages(images[:config.limit], labels[:config.limit], mean=mean, std=std,
                        padding=padding, seed=seed)
    images, labels, _ = _load(config, seed, "test")
    test = ArrayImages(images, labels, mean=mean, std=std, padding=None, seed=seed)
    channels, height, width = images.shape[1:]
    return Datasets(train, test, DataSpec(config.dataset, num_classes, (channels, height, width),
                                          len(train), len(test)))


def _load(config: DataConfig, seed: int,
          part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """Images (N, C, H, W), labels (N,) and the number of classes."""
    if config.dataset == "synthetic":
        count = config.num_examples if part == "train" else max(1, config.num_examples // 4)
        return *synthetic(count, config.num_classes, config.side, seed, part), config.num_classes
    from torchvision import datasets
    kind = {"fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10,
            "cifar100": datasets.CIFAR100}[config.dataset]
    found = kind(config.path, train=part == "train", download=False)
    images = np.asarray(found.data)  # (N, H, W) or (N, H, W, C)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), np.asarray(found.targets), len(found.classes)


def train_loader(datasets: Datasets, sampler: WorkerSampler, *, loader_workers: int = 0,
                 pin_memory: bool = False) -> Loader:
    """Yields (images (b, C, H, W) float32, labels (b,) int64), one item per micro-batch.

    The items come in the order of ``sampler``: for each step one per worker of this rank. Call
    ``sampler.set_epoch`` before each iteration. With ``loader_workers`` > 0 the same batches are
    prepared by that many processes, which live as long as the loader.
    """
    return _loader(datasets.train, _WithEpoch(sampler), loader_workers, pin_memory)


def test_loader(datasets: Datasets, *, size: int, rank: int, batch_size: int,
                loader_workers: int = 0, pin_memory: bool = False) -> Loader:
    """Yields this rank's share of the test set, each example once; see `test_shards`."""
    shards = test_shards(len(datasets.test), size, rank, batch_size)
    return _loader(datasets.test, [(None, shard) for shard in shards], loader_workers, pin_memory)


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


def _loader(images: Images, keys: Iterable[Any], workers: int, pin_memory: bool) -> Loader:
    """A DataLoader over batches.

    Its processes are spawned. A fork would copy Horovod's and MPI's state without their threads
    (locks held for ever, registered memory and CUDA contexts gone wrong); a fork server would die
    of a SIGTERM that a scheduler sends to the whole process group, and its workers with it.
    """
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
