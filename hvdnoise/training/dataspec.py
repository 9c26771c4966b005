"""What data a run uses: the settings and the facts of a data set.

Imports no torchvision, so that a wrong setting is refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvdnoise.training import plugins
from hvdnoise.training.datasets import DATASETS, DataRecord
from hvdnoise.training.errors import DataError
from hvdnoise.training.own_data import OwnData

__all__ = ["DataConfig", "DataError", "DataSpec"]


@dataclass(frozen=True)
class DataSpec:
    """The facts of a data set that models and trainers need.

    Args:
        name: the data set's name in `DataConfig`.
        num_classes: labels are 0 .. num_classes - 1.
        image_shape: (channels, height, width) of the images that the loaders yield; of a set of the
            user's own any shape.
        num_train: training examples in use (`DataConfig.in_use`).
        num_test: test examples.
        num_validation: examples of the training set that are held out.
        dtype: of what the loaders yield: float32 or int64.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, ...]
    num_train: int
    num_test: int
    num_validation: int = 0
    dtype: str = "float32"


@dataclass(frozen=True)
class DataConfig:
    """The data settings of a run.

    Args:
        dataset: which data set; or a function of your own that returns one, as FILE.py:FUNCTION or
            MODULE:FUNCTION, see docs/own.md.
        root: folder of the data sets; for imagefolder the folder that holds train/ and val/; a
            function of your own is given it.
        batch_size: training examples per worker and step (b).
        augment: random crops and horizontal flips of the training images; for a data set of your
            own, whether what its items draw at random is another in each epoch.
        loader_workers: processes per rank that prepare batches; 0 prepares them in the rank itself.
        image_size: height and width in pixels; only for {sizable}, the other sets have their own.
        download: fetch a missing data set from its home page.
        num_examples: training examples of the synthetic set.
        num_classes: classes of the synthetic set.
        validation: hold out so many images of the training set, chosen by the seed: the best
            weights are chosen on them, and the test set is read once only, at the end.
        limit: train on so many of the other training images only, chosen by the seed.
        label_noise: share of the training images in use, exactly round(share * n) of them, that get
            the label of another class, drawn by the seed with equal odds for each other class. The
            labels of validation and test images stay as they are.
        repeat: draw each batch so many times in a row, with the same augmentation. An epoch is a
            pass over the images and has so many times the steps.
        digest: what ranks compare of a data set before they train. Labels always, and of image
            folders names and sizes; of the images all where they are few, else a sample; whole:
            all of them.

    Raises:
        DataError: at construction, when a value is out of range or does not fit the data set.
    """

    # read anew by each parse: a plugin's record is a choice like the others
    dataset: Literal[tuple(DATASETS)] | str = next(iter(DATASETS))  # type: ignore[valid-type]
    root: str = "data"
    batch_size: int = 64
    augment: bool = True
    loader_workers: int = 0
    image_size: int | None = None
    download: bool = True
    num_examples: int = 2048
    num_classes: int = 10
    validation: int = 0
    limit: int | None = None
    label_noise: float = 0.0
    repeat: int = 1
    digest: Literal["sample", "whole"] = "sample"

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS and not plugins.names_function(self.dataset):
            raise DataError(f"data.dataset={self.dataset} is wrong: give one of "
                            f"{', '.join(DATASETS)}, or a function of your own as FILE.py:FUNCTION "
                            "or MODULE:FUNCTION")
        smallest = {"batch_size": 1, "loader_workers": 0, "image_size": 8, "num_examples": 1,
                    "num_classes": 2, "validation": 0, "limit": 1, "repeat": 1}
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"data.{name}={value} is too small: give {least} or more")
        largest = {"loader_workers": 1024, "image_size": 1 << 14, "num_classes": 1_000_000,
                   "repeat": 1_000_000}
        for name, most in largest.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise DataError(f"data.{name}={value} is too large: give {most} or less")
        if not 0 <= self.label_noise < 1:
            raise DataError(f"data.label_noise={self.label_noise} is wrong: give 0 <= share < 1")
        if self.image_size is not None and not self.record.sizable:
            raise DataError(f"data.image_size={self.image_size} does not go with {self.dataset}, "
                            "whose images have their own size: leave it out")

    @property
    def record(self) -> DataRecord:
        """What there is to know of the data set."""
        return DATASETS.get(self.dataset) or OwnData(name=self.dataset)

    def in_use(self, images: int) -> int:
        """The examples that are trained on, of so many ``images`` of the training set.

        Raises:
            DataError: when none is left.
        """
        left = images - self.validation
        if left < 1:
            raise DataError(f"data.validation={self.validation} leaves none of the {images} "
                            "training images to train on: hold out fewer")
        return min(left, self.limit or left)

    @property
    def side(self) -> int:
        """Height and width of the images in pixels."""
        return self.image_size or self.record.side

    @property
    def path(self) -> Path:
        """The root folder, with ~ expanded."""
        return Path(self.root).expanduser()


# --help names the sets whose image size can be chosen
DataConfig.__doc__ = (DataConfig.__doc__ or "").replace("{sizable}", " and ".join(
    f"{each.name} (default {each.side})" for each in DATASETS.values() if each.sizable))
