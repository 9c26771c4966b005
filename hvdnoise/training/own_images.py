"""Examples of a data set of the user's own: from tensors, or from a map-style data set.

An example is float32, or uint8 (pixels 0 .. 255, which become 0 .. 1), and is normalised; or it is
whole numbers, such as tokens, and goes to the model as int64. What an item draws at random, by
torch's, numpy's and Python's own generators, depends on (seed, epoch, index) alone.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset

from hvdnoise import streams
from hvdnoise.training import plugins
from hvdnoise.training.errors import DataError
from hvdnoise.training.images import PIXELS, Images, digest_of, digests_of_arrays
from hvdnoise.training.own_data import kind_of

_COMPARED = 16  # items whose label must be what `targets` says, for that to be believed


@dataclass(frozen=True)
class Part:
    """Training or test examples.

    Args:
        say: how a message about them begins.
        code: the file or module that they come from.
        items: (N, *shape) float32, uint8 or int64; or a data set whose items are (x, label).
        labels: (N,) int64.
        shape: of an example.
        kind: what an example is stored as: float32, uint8 or int64.
    """

    say: str
    code: str
    items: Any
    labels: NDArray[np.int64]
    shape: tuple[int, ...]
    kind: str

    @property
    def fed_as(self) -> str:
        """The dtype that the model sees."""
        return "int64" if self.kind == "int64" else "float32"

    @property
    def in_memory(self) -> bool:
        return isinstance(self.items, np.ndarray)


@dataclass(frozen=True)
class Sets:
    """What a function has returned, looked at; `OwnImages` has the meaning of mean and std."""

    train: Part
    test: Part
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def own_part(found: Any, say: str, code: str, classes: int) -> Part:
    """Look at what a function has returned for "train" or "test".

    Raises:
        DataError: one line, beginning with ``say``.
    """
    if isinstance(found, TensorDataset) and len(found.tensors) == 2:
        found = found.tensors
    if isinstance(found, (tuple, list)) and len(found) == 2 and all(map(_is_array, found)):
        return _from_arrays(found, say, code, classes)
    _check_map_style(found, say)
    count = len(found)
    first, _ = _item(found, 0, say)
    labels = _labels_of(found, say)
    _check_labels(labels, say, classes)
    assert len(labels) == count
    return Part(say, code, found, labels, tuple(first.shape), _kind(first, f"{say}[0]"))


def _from_arrays(found: Sequence[Any], say: str, code: str, classes: int) -> Part:
    x, labels = (torch.as_tensor(each).detach().cpu() for each in found)
    if x.ndim < 2 or not len(x):
        raise DataError(f"{say}: the examples have the shape {tuple(x.shape)}: give (N, ...) with "
                        "at least one example, and at least one dimension of each")
    kind = _kind(x, say)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{say}: the labels are {_name(labels)}: give whole numbers 0 .. "
                        f"{classes - 1}, for instance by .long()")
    if tuple(labels.shape) != (len(x),):
        raise DataError(f"{say}: the labels have the shape {tuple(labels.shape)}: give one whole "
                        f"number for each of the {len(x)} examples, ({len(x)},)")
    numbers = labels.long().numpy()
    _check_labels(numbers, say, classes)
    # copies: what is trained on stays what was looked at
    return Part(say, code, x.to(getattr(torch, kind)).numpy().copy(), numbers.copy(),
                tuple(x.shape[1:]), kind)


def _check_map_style(found: Any, say: str) -> None:
    give = "give a data set whose items are (x, label), or a pair of tensors"
    if isinstance(found, IterableDataset):
        raise DataError(f"{say} is an IterableDataset ({type(found).__name__}), whose examples "
                        f"have no number to draw them by: {give}")
    if not callable(getattr(type(found), "__getitem__", None)) or isinstance(found, (dict, str)):
        raise DataError(f"{say} is {kind_of(found)}: {give}")
    try:
        count = len(found)
    except (TypeError, NotImplementedError) as error:
        raise DataError(f"{say} is {kind_of(found)} without a length: add __len__, or {give}"
                        ) from error
    if count < 1:
        raise DataError(f"{say} is empty: give at least one example")


def _item(items: Any, index: int, say: str) -> tuple[Tensor, int]:
    """Example and label of an item, looked at."""
    where = f"{say}[{index}]"
    item = items[index]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        more = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise DataError(f"{where} is {kind_of(item)}{more}: give (x, label)")
    x, label = item
    if not _is_array(x):
        raise DataError(f"{where}: x is {kind_of(x)}: give a tensor (of a picture: "
                        "transform=torchvision.transforms.PILToTensor())")
    x = torch.as_tensor(x).detach()
    if x.ndim < 1:
        raise DataError(f"{where}: x is a single number: give it a dimension, (1,)")
    return x, _label(label, where)


def _label(label: Any, where: str) -> int:
    shape = getattr(label, "shape", ())
    if len(shape) == 0:
        value = label.item() if _is_array(label) or isinstance(label, np.generic) else label
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise DataError(f"{where}: the label is {value!r} ({type(value).__name__}): give a whole "
                        "number")
    raise DataError(f"{where}: the label has the shape {tuple(shape)}: give one whole number")


def _labels_of(items: Any, say: str) -> NDArray[np.int64]:
    """Every label; from ``targets``, as torchvision's sets have them, where those are right."""
    count = len(items)
    if isinstance(items, Subset):
        inside = _labels_of(items.dataset, say)
        return inside[np.asarray(items.indices, dtype=np.int64)]
    try:
        known = np.asarray(getattr(items, "targets", None))
    except (TypeError, ValueError, RuntimeError):
        known = np.empty(0)
    if known.shape == (count,) and known.dtype.kind in "iu":
        places = {place * (count - 1) // (_COMPARED - 1) for place in range(_COMPARED)}
        if all(_item(items, place, say)[1] == known[place] for place in places):
            return known.astype(np.int64)
    return np.array([_item(items, index, say)[1] for index in range(count)], dtype=np.int64)


def _check_labels(labels: NDArray[np.int64], say: str, classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataError(f"{say}[{wrong[0]}] has the label {labels[wrong[0]]}, and classes is "
                        f"{classes}: labels are 0 .. {classes - 1} ({len(wrong)} of {len(labels)} "
                        "are not)")


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _kind(x: Tensor, where: str) -> str:
    if x.is_complex():
        raise DataError(f"{where}: x is {_name(x)}: give real numbers, (2, ...)")
    return "uint8" if x.dtype == torch.uint8 else \
        "float32" if x.is_floating_point() else "int64"


class OwnImages(Images):
    """The examples of a part, in batches.

    Args:
        part: the examples.
        mean, std: one number, or one for each channel (the first dimension of an example).
        classes: for the digest.
        draws_anew: whether what items draw at random is another in each epoch.
    """

    def __init__(self, part: Part, *, mean: Sequence[float], std: Sequence[float], classes: int,
                 seed: int, draws_anew: bool) -> None:
        super().__init__(mean, std, seed, unit=PIXELS if part.kind == "uint8" else 1,
                         dims=len(part.shape))
        self.labels, self._part, self._draws_anew = part.labels, part, draws_anew
        self._facts = repr((part.shape, part.kind, classes, tuple(mean), tuple(std)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """As the user's data set has it."""
        if self._part.in_memory:
            return torch.from_numpy(self._part.items[index].copy()), int(self.labels[index])
        part = self._part
        x, label = _item(part.items, index, part.say)
        if (tuple(x.shape), _kind(x, part.say)) != (part.shape, part.kind):
            raise DataError(f"{part.say}[{index}] is {_name(x)} {tuple(x.shape)}, and the first "
                            f"one {part.kind} {part.shape}: give all the same shape and kind")
        if label != self.labels[index]:
            raise DataError(f"{part.say}[{index}] has the label {label} now, and had "
                            f"{self.labels[index]}: an item's label must stay the same")
        return x.to(getattr(torch, part.kind)), label

    def batch(self, indices: Sequence[int], epoch: int | None) -> tuple[Tensor, Tensor]:
        chosen = np.asarray(indices, dtype=np.int64)
        labels = torch.from_numpy(self.labels[chosen])
        return self.normalise(self._examples(chosen, epoch)), labels

    def stored(self, indices: Sequence[int]) -> Tensor:
        """(b, *shape), of the kind that the data set has."""
        return self._examples(np.asarray(indices, dtype=np.int64), None)

    def _examples(self, chosen: NDArray[np.int64], epoch: int | None) -> Tensor:
        if self._part.in_memory:
            return torch.from_numpy(self._part.items[chosen])
        key: tuple[int | str, ...] = ("always",) if epoch is None or not self._draws_anew \
            else (epoch,)
        found = []
        with without_chance(0) as again:
            for index in chosen.tolist():
                again(streams.seed_for(self.seed, "data.own", *key, index))
                found.append(self[index][0])
        return torch.stack(found)

    def normalise(self, images: Tensor) -> Tensor:
        if self._part.kind == "int64":
            return images
        return images.float().mul(self._scale).add_(self._shift)

    def digests(self, *, whole: bool) -> dict[str, str]:
        facts = {"facts": digest_of(np.frombuffer(self._facts.encode(), dtype=np.uint8))}
        if self._part.in_memory:
            return {**digests_of_arrays(self._part.items, self.labels, whole=whole), **facts}
        return {**super().digests(whole=whole), **facts}

    def check_travels(self, workers: int) -> None:
        """Raise a DataError where loading processes cannot be given the data set."""
        if self._part.in_memory:
            return
        try:
            pickle.dumps(self)
        except Exception as error:
            text = " ".join(str(error).split())
            raise DataError(f"{self._part.say} cannot be sent to the data.loader_workers={workers} "
                            f"processes ({text}): define its parts at the top of the file, or set "
                            "data.loader_workers=0") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the user's file is imported first: its name is no module's."""
        return _received, ("" if self._part.in_memory else self._part.code,
                           pickle.dumps(self.__dict__))


def _received(code: str, content: bytes) -> OwnImages:
    if code:
        plugins.import_code(code, "")
    found = OwnImages.__new__(OwnImages)
    found.__dict__.update(pickle.loads(content))
    return found


@contextmanager
def without_chance(seed: int) -> Iterator[Any]:
    """Torch's CPU generator, numpy's and Python's start from ``seed``, and afterwards are where
    they were; what it yields starts them from another seed."""
    def again(seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        again(seed)
        yield again
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
