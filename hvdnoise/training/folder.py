"""ImageNet-style folders of image files, decoded and transformed image by image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2 as transforms

from hvdnoise import streams
from hvdnoise.training.errors import DataError
from hvdnoise.training.images import SAMPLE, Images, content_name, digest_of, spread

MODERATE_BYTES = 32 << 20  # of all files together that are read whole


class FolderImages(Images):
    """The images folder/CLASS/FILE, RGB, cut to side x side.

    Training: a random part of the image (8-100% of its area), resized, half of them mirrored.
    Otherwise: the short side resized to side * 256/224 and the centre cut out.

    Args:
        folder: holds one folder per class; labels number the sorted names.
        side: height and width of the batches' images in pixels.
        augment: whether batches of an epoch are augmented.
    """

    def __init__(self, folder: Path, *, side: int, augment: bool, mean: Sequence[float],
                 std: Sequence[float], seed: int) -> None:
        super().__init__(mean, std, seed)
        found = datasets.ImageFolder(folder)
        self._folder = folder
        self.samples: list[tuple[str, int]] = found.samples
        self.labels = np.array(found.targets, dtype=np.int64)
        self.classes = found.classes
        self._augment = augment
        self._training = transforms.Compose([
            transforms.RandomResizedCrop(side, antialias=True),
            transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
        self._testing = transforms.Compose([
            transforms.Resize(round(side * 256 / 224), antialias=True),
            transforms.CenterCrop(side), transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self.samples)

    def digests(self, *, whole: bool) -> dict[str, str]:
        """Of labels, names and sizes, and of the files as they are: all of them where they are
        small together, else those of `SAMPLE` images."""
        paths = [path for path, _ in self.samples]
        sizes = [os.stat(path).st_size for path in paths]
        names = hashlib.sha256()
        for path, size in zip(paths, sizes):
            names.update(f"{os.path.relpath(path, self._folder)}\0{size}\n".encode(
                errors="surrogateescape"))
        whole |= sum(sizes) <= MODERATE_BYTES
        content = hashlib.sha256()
        for place in range(len(paths)) if whole else spread(len(paths), SAMPLE):
            content.update(Path(paths[place]).read_bytes())
        return {"labels": digest_of(self.labels), "names and sizes": names.hexdigest(),
                content_name(whole): content.hexdigest()}

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The PIL image, as it is in the file but RGB, and its label."""
        path, label = self.samples[index]
        try:
            return datasets.folder.pil_loader(path), label
        except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for broken files
            raise DataError(f"{path} cannot be read as an image ({error}): repair or remove "
                            "it") from error

    def batch(self, indices: Sequence[int], epoch: int | None) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for index in indices:
            image, label = self[index]
            if epoch is None or not self._augment:
                images.append(self._testing(image))
            else:
                with _draws(streams.seed_for(self.seed, "data.augment", epoch, index)):
                    images.append(self._training(image))
            labels.append(label)
        return self.normalise(torch.stack(images)), torch.tensor(labels)

    def stored(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self._testing(self[index][0]) for index in indices])


def count(folder: Path) -> tuple[int, int]:
    """Images and classes of folder/CLASS/IMAGE.

    Raises:
        DataError: when there are none, or they cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder on this machine")
    try:
        found = datasets.ImageFolder(folder)
    except OSError as error:  # an empty one, or one that cannot be read
        text = " ".join(str(error).split()).rstrip(".")
        raise DataError(f"{folder}: {text}") from error
    return len(found.samples), len(found.classes)


def check(root: Path) -> str:
    """Check the layout root/{train,val}/CLASS/IMAGE; the digest of all names in it.

    Raises:
        DataError: when it is another.
    """
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise DataError(f"{root / part} is not a folder: data.root must hold train/CLASS/IMAGE "
                            "and val/CLASS/IMAGE")
    names = hashlib.sha256()
    classes = []
    for part in ("train", "val"):
        try:
            found = datasets.ImageFolder(root / part)
        except FileNotFoundError as error:
            text = " ".join(str(error).split())
            raise DataError(f"{root / part}: {text}; every class needs a folder with images "
                            "in train/ and in val/") from error
        classes.append(found.classes)
        for path, _ in found.samples:
            names.update(os.path.relpath(path, root).encode(
                errors="surrogateescape") + b"\0")
    if classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1]))[0]
        raise DataError(f"{root}: the class {odd!r} is in only one of train/ and val/: give both "
                        "the same class folders")
    return names.hexdigest()


@contextmanager
def _draws(seed: int) -> Iterator[None]:
    """Torch's default CPU generator at ``seed``; afterwards where it was.

    The transforms draw from it and take no other. Not torch.manual_seed, which would reseed the
    accelerators too.
    """
    before = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(before)
