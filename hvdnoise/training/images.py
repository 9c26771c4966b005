"""Data sets that hand out whole batches: images in memory, and folders of image files.

`batch(indices, epoch)` gives normalised float32 images (b, C, H, W) and int64 labels (b,). With an
epoch the images are augmented, by draws that depend on (seed, epoch, example index) alone; with
epoch None they are not. `data_set[index]` gives one image as it is stored, for looking at.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hvdnoise import streams
from hvdnoise.training.augment import crop_and_flip, example_bits

PIXELS = 255  # a pixel's largest value, which stands for 1
SAMPLE = 64  # images, where not all are read for a digest
MODERATE_BYTES = 256 << 20  # of images in memory that are read whole


class Images(Dataset[tuple[Any, int]]):
    """A data set that prepares a batch at a time.

    Args:
        mean, std: of each channel, of values in 0 .. 1.
        seed: of the augmentation; equal on all ranks.
        unit: the number that stands for 1 in what is stored.
        dims: of an example.

    Attributes:
        labels: (N,) int64.
        classes: the names of the classes, by label; none where they have no names.
    """

    labels: NDArray[np.int64]
    classes: Sequence[str] = ()

    def __init__(self, mean: Sequence[float], std: Sequence[float], seed: int, *,
                 unit: int = PIXELS, dims: int = 3) -> None:
        self.mean, self.std, self.seed, self.unit = tuple(mean), tuple(std), seed, unit
        self._scale, self._shift = normalisation(mean, std, unit, dims)

    @abstractmethod
    def __len__(self) -> int:
        """The number of examples."""

    @abstractmethod
    def batch(self, indices: Sequence[int], epoch: int | None) -> tuple[Tensor, Tensor]:
        """Images (b, C, H, W) float32, normalised, and labels (b,) int64."""

    @abstractmethod
    def stored(self, indices: Sequence[int]) -> Tensor:
        """(b, C, H, W) uint8: what `batch` normalises where there is no epoch."""

    def normalise(self, images: Tensor) -> Tensor:
        """(b, C, H, W) uint8 -> float32 with mean 0 and standard deviation 1 per channel."""
        return images.float().mul_(self._scale).add_(self._shift)

    def digests(self, *, whole: bool) -> dict[str, str]:
        """SHA-256 of the labels and of the images, by what they are of.

        Here of the batches of `SAMPLE` images spread over the set, or of all. A set that has its
        images at hand in another form may do it faster.

        Raises:
            OSError: when a file cannot be read.
        """
        chosen = range(len(self)) if whole else spread(len(self), SAMPLE)
        total = hashlib.sha256()
        for first in range(0, len(chosen), SAMPLE):
            images, _ = self.batch(chosen[first:first + SAMPLE], None)
            total.update(images.numpy().tobytes())
        return {"labels": digest_of(self.labels), content_name(whole): total.hexdigest()}


def normalisation(mean: Sequence[float], std: Sequence[float], unit: int = PIXELS, dims: int = 3
                  ) -> tuple[Tensor, Tensor]:
    """Scale and shift, each (C, 1, 1) float32: numbers 0 .. ``unit`` times scale, plus shift, are
    normalised.

    Args:
        mean, std: of each channel, of values in 0 .. 1.
        unit: stands for 1.
        dims: of an example; the first are channels.
    """
    scale = (1 / (unit * torch.tensor(std, dtype=torch.float64))).float()
    shift = (-torch.tensor(mean) / torch.tensor(std)).float()
    each = -1, *[1] * (dims - 1)
    return scale.view(each), shift.view(each)


def spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of 0 .. count - 1, evenly spread, with the first and the last."""
    return sorted({place * (count - 1) // max(1, wanted - 1) for place in range(wanted)}
                  ) if count else []


def content_name(whole: bool) -> str:
    """What a digest of images is called."""
    return "images" if whole else "sampled images"


def digest_of(values: NDArray[Any]) -> str:
    """SHA-256 of an array's dtype, shape and numbers."""
    total = hashlib.sha256(f"{values.dtype.str} {values.shape}".encode())
    total.update(np.ascontiguousarray(values).data)
    return total.hexdigest()


def digests_of_arrays(images: NDArray[Any], labels: NDArray[np.int64], *, whole: bool
                      ) -> dict[str, str]:
    """As `Images.digests`, of images in memory: of all where they are few, else of a part."""
    whole |= images.nbytes <= MODERATE_BYTES
    wanted = MODERATE_BYTES * len(images) // max(1, images.nbytes)
    chosen = images if whole else images[spread(len(images), wanted)]
    return {"labels": digest_of(labels), content_name(whole): digest_of(chosen)}


class ArrayImages(Images):
    """Images in memory.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        padding: of the random crop, in pixels; None for no augmentation.
        classes: the names of the classes, by label.
    """

    # numpy arrays, not tensors: a tensor sent to a loader process goes through /dev/shm, which is
    # 64 MB in a container unless asked for.
    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], *,
                 mean: Sequence[float], std: Sequence[float], padding: int | None,
                 seed: int, classes: Sequence[str] = ()) -> None:
        super().__init__(mean, std, seed)
        self.classes = classes
        assert images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(labels)
        self.images, self.labels, self.padding = images, labels.astype(np.int64), padding

    def __len__(self) -> int:
        return len(self.images)

    def digests(self, *, whole: bool) -> dict[str, str]:
        return digests_of_arrays(self.images, self.labels, whole=whole)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.images[index].copy()), int(self.labels[index])

    def batch(self, indices: Sequence[int], epoch: int | None) -> tuple[Tensor, Tensor]:
        chosen = np.asarray(indices, dtype=np.int64)
        images = self.images[chosen]
        if epoch is not None and self.padding is not None:
            images = crop_and_flip(images, example_bits(self.seed, epoch, chosen), self.padding)
        return self.normalise(torch.from_numpy(images)), torch.from_numpy(self.labels[chosen])

    def stored(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.images[np.asarray(indices, dtype=np.int64)])


class Subset(Images):
    """Some images of a data set, with labels of their own.

    An image is augmented by the draws of its place in the whole set: they do not depend on which
    others are in the subset.

    Args:
        whole: the data set.
        indices: (n,) int64, which of its images.
        labels: (n,) int64; default: those that they have.
    """

    def __init__(self, whole: Images, indices: NDArray[np.int64],
                 labels: NDArray[np.int64] | None = None) -> None:
        self.whole, self.indices, self.seed = whole, indices, whole.seed
        self.labels = whole.labels[indices] if labels is None else labels

    def chosen_digest(self) -> str:
        """SHA-256 of which images these are, and their labels."""
        return digest_of(np.stack([self.indices, self.labels]))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, _ = self.whole[int(self.indices[index])]
        return image, int(self.labels[index])

    def batch(self, indices: Sequence[int], epoch: int | None) -> tuple[Tensor, Tensor]:
        chosen = np.asarray(indices, dtype=np.int64)
        images, _ = self.whole.batch(self.indices[chosen].tolist(), epoch)
        return images, torch.from_numpy(self.labels[chosen])

    def stored(self, indices: Sequence[int]) -> Tensor:
        return self.whole.stored(self.indices[np.asarray(indices, dtype=np.int64)].tolist())


def noisy_labels(labels: NDArray[np.int64], share: float, num_classes: int, seed: int
                 ) -> NDArray[np.int64]:
    """Labels (n,) with symmetric noise: round(share * n) of them, drawn by the seed, are another
    class, each other class being equally likely."""
    draws = streams.generator(seed, "data.label_noise")
    wrong = torch.randperm(len(labels), generator=draws)[:round(share * len(labels))].numpy()
    shifts = torch.randint(1, num_classes, (len(wrong),), generator=draws).numpy()
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + shifts) % num_classes
    return noisy


def synthetic(num_examples: int, num_classes: int, side: int, seed: int,
              part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 3, side, side) that differ by class: coarse blocks of colour under noise.

    Deterministic in (seed, part, sizes); the blocks are those of the seed in every part.
    """
    blocks = torch.randint(0, 128, (num_classes, 3, 4, 4), dtype=torch.uint8,
                           generator=streams.generator(seed, "data.synthetic.blocks"))
    draws = streams.generator(seed, "data.synthetic", part)
    labels = torch.randint(0, num_classes, (num_examples,), generator=draws)
    images = torch.randint(0, 128, (num_examples, 3, side, side), dtype=torch.uint8,
                           generator=draws)
    place = torch.arange(side) * 4 // side
    for label in range(num_classes):
        images[labels == label] += blocks[label][:, place][:, :, place]
    return images.numpy(), labels.numpy()
