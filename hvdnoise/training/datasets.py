"""The data sets: one record each, in `DATASETS`; the first is the default.

A record says what there is to know of its data set: facts, normalisation, files, how they are
fetched and read. Settings, `build`, `prepare`, plans and the doctor ask it and name no data set.
Importing this module does not import torchvision, so that a wrong setting is refused at once.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hvdnoise.training.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hvdnoise.training.dataspec import DataConfig
    from hvdnoise.training.images import Images

    Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (N, C, H, W), labels (N,)


@dataclass(frozen=True, kw_only=True)
class DataRecord(ABC):
    """A data set.

    A subclass gives `load`, and `prepare` where there are files; see `ArrayRecord`.

    Args:
        name: what `DataConfig` calls it.
        mean, std: of each channel of the training images, with pixel values in 0 .. 1.
        images: training images; see `count`.
        classes: labels are 0 .. classes - 1.
        side: height and width of the images in pixels.
        sizable: whether the settings can choose another side.
        counted: whether images and classes are known from the files alone.
        own: whether a function of the user's gives it (`hvdnoise.training.own_data`).
        padding: of the random crop, in pixels.
        folder: where the unpacked files lie, below the root; None for no place of its own.
        package: Debian's package that puts the archives into /usr/share/datasets/NAME.
    """

    needs: ClassVar[tuple[str, ...]] = ()  # of `extras.PACKAGES`
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int = 0
    classes: int = 0
    side: int
    sizable: bool = False
    counted: bool = False
    own: bool = False
    padding: int | None = None
    folder: str | None = None
    package: str | None = None

    def shape(self, config: DataConfig) -> tuple[int, ...]:
        """(channels, height, width) of the images that the loaders yield; of a set of the user's
        own any shape."""
        side = config.image_size or self.side
        return len(self.mean), side, side

    def dtype(self, config: DataConfig) -> str:
        """What the loaders yield: float32, or int64 of a set of the user's own."""
        return "float32"

    def count(self, config: DataConfig) -> tuple[int, int]:
        """Images of the training set, of which `DataConfig.in_use` says how many are trained on;
        and classes.

        Raises:
            DataError: when they are counted and the files are not there.
        """
        return self.images, self.classes

    def prepare(self, config: DataConfig) -> str | None:
        """Bring the files to their place on this host and check them.

        Returns:
            The digest of the content where it is not fixed by checksums, else None.

        Raises:
            DataError: when they cannot be had, or are not right.
        """
        return None

    @abstractmethod
    def load(self, config: DataConfig, seed: int, part: str) -> tuple[Images, int]:
        """All images of a part, "train" or "test", and the number of classes."""


@dataclass(frozen=True, kw_only=True)
class ArrayRecord(DataRecord):
    """A data set whose images fit into memory. A subclass gives `arrays`."""

    def load(self, config: DataConfig, seed: int, part: str) -> tuple[Images, int]:
        from hvdnoise.training.images import ArrayImages
        images, labels = self.arrays(config, seed, part)
        assert images.shape[1:] == self.shape(config), f"{self.name}: {images.shape}"
        padding = self.padding if part == "train" and config.augment else None
        found = ArrayImages(images, labels, mean=self.mean, std=self.std, padding=padding,
                            seed=seed, classes=self.names(config))
        return found, self.count(config)[1]

    @abstractmethod
    def arrays(self, config: DataConfig, seed: int, part: str) -> Arrays:
        """All images (N, C, H, W) of a part, "train" or "test", and their labels (N,)."""

    def names(self, config: DataConfig) -> tuple[str, ...]:
        """Of the classes, by label; none where they have no names."""
        return ()


@dataclass(frozen=True, kw_only=True)
class _Torchvision(ArrayRecord):
    """A data set that torchvision reads from unpacked files.

    Args:
        kind: torchvision's class.
    """

    needs = ("torchvision",)
    kind: str

    def arrays(self, config: DataConfig, seed: int, part: str) -> Arrays:
        import numpy as np
        found = self._class()(config.path, train=part == "train", download=False)
        images = np.asarray(found.data)  # (N, H, W) or (N, H, W, C)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(images), np.asarray(found.targets)

    def _class(self) -> Any:
        from torchvision import datasets
        return getattr(datasets, self.kind)


@dataclass(frozen=True, kw_only=True)
class _Idx(ArrayRecord):
    """MNIST and its kin: files in the IDX format, each in a .gz of its own.

    They are read here: to import torchvision takes longer than to read them.

    Args:
        url: the folder of the archives.
        files: for each unpacked file the SHA-256 of its content and of each known archive; images
            and labels of training, then of the test set.
        labels: the names of the classes.
    """

    folder: str
    url: str
    labels: tuple[str, ...]
    files: dict[str, tuple[str, ...]] = field(repr=False)

    def prepare(self, config: DataConfig) -> None:
        from hvdnoise.training import fetch
        folder = config.path / self.folder
        for name, (content, *archives) in self.files.items():
            fetch.unpack_gz(self.url + f"{name}.gz", archives, folder / name, content, config)

    def arrays(self, config: DataConfig, seed: int, part: str) -> Arrays:
        import numpy as np
        found = []
        for name in list(self.files)[0 if part == "train" else 2:][:2]:
            content = np.fromfile(config.path / self.folder / name, dtype=np.uint8)
            begin = 4 + 4 * int(content[3])  # the number of dimensions, and each one's size
            found.append(content[begin:].reshape(content[4:begin].view(">u4")))
        images, labels = found
        return images[:, None], labels.astype(np.int64)

    def names(self, config: DataConfig) -> tuple[str, ...]:
        return self.labels


@dataclass(frozen=True, kw_only=True)
class _Cifar(_Torchvision):
    """A data set of torchvision's CIFAR classes, which know the files' MD5 sums and the address.

    Args:
        sha256: of the .tar.gz.
    """

    sha256: str

    def prepare(self, config: DataConfig) -> None:
        from hvdnoise.training import fetch
        kind = self._class()
        files = dict([*kind.train_list, *kind.test_list,
                      (kind.meta["filename"], kind.meta["md5"])])
        wanted = {f"{kind.base_folder}/{name}": md5 for name, md5 in files.items()}
        fetch.unpack_tar(kind.url, kind.filename, self.sha256, wanted, config)

    def names(self, config: DataConfig) -> tuple[str, ...]:
        import pickle
        kind = self._class()
        # as torchvision has just read it, after it has found its MD5 to be right
        content = (config.path / kind.base_folder / kind.meta["filename"]).read_bytes()
        return tuple(pickle.loads(content, encoding="latin1")[kind.meta["key"]])


@dataclass(frozen=True, kw_only=True)
class _Folders(DataRecord):
    """ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE."""

    needs = ("torchvision",)

    def count(self, config: DataConfig) -> tuple[int, int]:
        from hvdnoise.training import folder
        return folder.count(config.path / "train")

    def prepare(self, config: DataConfig) -> str:
        from hvdnoise.training import folder
        return folder.check(config.path)

    def load(self, config: DataConfig, seed: int, part: str) -> tuple[Images, int]:
        from hvdnoise.training.folder import FolderImages
        train = part == "train"
        found = FolderImages(config.path / ("train" if train else "val"), side=config.side,
                             augment=train and config.augment, mean=self.mean, std=self.std,
                             seed=seed)
        return found, len(found.classes)


@dataclass(frozen=True, kw_only=True)
class _Synthetic(ArrayRecord):
    """Images that are drawn; their number, classes and size are settings."""

    def count(self, config: DataConfig) -> tuple[int, int]:
        needed = config.num_examples * math.prod(self.shape(config))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory:
            raise DataError(f"data.num_examples={config.num_examples} images take {needed >> 20} "
                            f"MiB, and this machine has {memory >> 20}: give fewer, or a smaller "
                            "data.image_size")
        return config.num_examples, config.num_classes

    def arrays(self, config: DataConfig, seed: int, part: str) -> Arrays:
        from hvdnoise.training.images import synthetic
        count = config.num_examples if part == "train" else max(1, config.num_examples // 4)
        return synthetic(count, config.num_classes, config.side, seed, part)


# The two archives of a file hold the same compressed stream; they differ in the time and the name
# in the gzip header.
_FASHION_MNIST: dict[str, tuple[str, ...]] = {  # SHA-256 of content, Debian's .gz, upstream's .gz
    "train-images-idx3-ubyte": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
    "train-labels-idx1-ubyte": (
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
    "t10k-images-idx3-ubyte": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
    "t10k-labels-idx1-ubyte": (
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
}

DATASETS: dict[str, DataRecord] = {record.name: record for record in (
    _Idx(name="fashion-mnist", mean=(0.2860,), std=(0.3530,), images=60_000, classes=10, side=28,
         padding=2, folder="FashionMNIST/raw", package="dataset-fashion-mnist",
         files=_FASHION_MNIST,
         labels=("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt",
                 "Sneaker", "Bag", "Ankle boot"),
         url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
    _Cifar(name="cifar10", mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
           images=50_000, classes=10, side=32, padding=4, folder="cifar-10-batches-py",
           kind="CIFAR10",
           sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
    _Cifar(name="cifar100", mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762),
           images=50_000, classes=100, side=32, padding=4, folder="cifar-100-python",
           kind="CIFAR100",
           sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"),
    _Folders(name="imagefolder", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
             side=224, sizable=True, counted=True),  # mean and std are ImageNet's
    _Synthetic(name="synthetic", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), padding=4,
               side=32, sizable=True),
)}
