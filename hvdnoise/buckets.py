"""Named parameters <-> flat buckets: the one memory layout of gradients, deviations and noise.

Parameters are laid out in REVERSE order of registration, because backward finishes the last
layers first; a bucket closes when it would pass the byte limit, and holds one dtype and one
device. Inside a bucket, parameter t occupies ``flat[starts[t]:starts[t] + sizes[t]]``, in the order
of the parameter's own memory (row-major, or channels last): fused optimizers walk through weight
and gradient side by side and do not look at strides.
A quantity with one row per worker is a matrix of shape (workers, bucket.size).

The limit is a quarter of the whole, so that what is exchanged overlaps with backward, but from 1
to 25 MiB, so that it pays to send; or Horovod's HOROVOD_FUSION_THRESHOLD where that is smaller;
0 gives every parameter a bucket of its own, which is Horovod's layout without fusion and sums in
exactly its order.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from itertools import accumulate
from typing import Iterable, Mapping, Sequence

import torch
from torch import Tensor

LEAST_BUCKET_BYTES, MOST_BUCKET_BYTES = 2 ** 20, 25 * 2 ** 20
Named = tuple[str, Tensor]
BUCKETS = 4  # about so many, between the two


@dataclass(frozen=True)
class Bucket:
    """Some parameters of one dtype and device, and their places in one flat tensor."""

    index: int
    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def key(self) -> str:
        """What tells it from the layout's other buckets: the name of its first parameter."""
        return self.names[0]

    @property
    def size(self) -> int:
        """Numbers in the bucket."""
        return sum(self.sizes)

    def new(self, *leading: int) -> Tensor:
        """A tensor of shape (*leading, size) of zeros."""
        return torch.zeros(*leading, self.size, dtype=self.dtype, device=self.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor of shape (size,), one a parameter, in the shapes of those."""
        return [self.view(flat, t) for t in range(len(self.sizes))]

    def view(self, flat: Tensor, t: int) -> Tensor:
        """The part of one parameter."""
        return flat.as_strided(self.shapes[t], self.strides[t],
                               flat.storage_offset() + self.starts[t])


@dataclass(frozen=True)
class Layout:
    """All buckets of an optimizer, in the order in which backward fills them."""

    buckets: tuple[Bucket, ...]
    fingerprint: frozenset[object]  # of the parameters; when it changes, a new layout is made
    # of names, shapes, strides and dtypes: equal on all ranks, or they may not exchange
    digest: str

    @property
    def numbers(self) -> int:
        """Numbers in all buckets."""
        return sum(bucket.size for bucket in self.buckets)

    def places(self) -> dict[Tensor, tuple[int, int]]:
        """Parameter -> (bucket, place in the bucket)."""
        return {p: (b.index, t) for b in self.buckets for t, p in enumerate(b.parameters)}


def default_bucket_bytes(total_bytes: int) -> int:
    """The byte limit of a bucket where the user gave none, for so many bytes of parameters."""
    limit = max(LEAST_BUCKET_BYTES, min(MOST_BUCKET_BYTES, total_bytes // BUCKETS))
    threshold = os.environ.get("HOROVOD_FUSION_THRESHOLD", "")
    return min(int(threshold), limit) if threshold else limit


def fingerprint(parameters: Iterable[Tensor]) -> frozenset[object]:
    """What a layout depends on, in any order; cheap enough to look at in every step."""
    return frozenset((id(p), p.dtype, p.device, p.shape, p.stride()) for p in parameters
                     if p.requires_grad)


def build_layout(named_parameters: Sequence[tuple[str, Tensor]], *, bucket_bytes: int,
                 groups: int | Sequence[Sequence[Tensor]] | None = None) -> Layout:
    """Lay out the parameters that require a gradient.

    Args:
        named_parameters: (name, parameter) in order of registration, names unique.
        bucket_bytes: limit of a bucket's size in bytes; one parameter may exceed it.
        groups: as Horovod's: a number of buckets of about as many parameters each, or a list of
            lists of parameters that travel together (any other parameter travels alone).
            Without it the byte limit decides.
    """
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    backward_order = trainable[::-1]
    if groups is None:
        parts = _split_by_bytes(backward_order, bucket_bytes)
    elif isinstance(groups, int):
        parts = _split_evenly(backward_order, groups)
    else:
        parts = _split_by_group(backward_order, groups)
    return _layout([same for part in parts for same in _split_by_kind(part)])


def default_layout(named_parameters: Sequence[tuple[str, Tensor]]) -> Layout:
    """The layout of parameters for which the user gives no limit."""
    limit = default_bucket_bytes(sum(p.nbytes for _, p in named_parameters))
    return build_layout(named_parameters, bucket_bytes=limit)


def layout_of(names: Sequence[Sequence[str]], by_name: Mapping[str, Tensor]) -> Layout | None:
    """The layout whose buckets hold the parameters of these names; None where one is unknown."""
    if any(name not in by_name for part in names for name in part):
        return None
    return _layout([[(name, by_name[name]) for name in part] for part in names])


def _layout(parts: Sequence[Sequence[Named]]) -> Layout:
    buckets = tuple(_bucket(index, part) for index, part in enumerate(parts))
    text = repr([(b.names, [tuple(p.shape) for p in b.parameters], b.strides, str(b.dtype))
                 for b in buckets])
    return Layout(buckets, fingerprint(p for part in parts for _, p in part),
                  hashlib.sha256(text.encode()).hexdigest()[:16])


def _bucket(index: int, part: Sequence[Named]) -> Bucket:
    names, parameters = zip(*part)
    sizes = tuple(p.numel() for p in parameters)
    starts = (0, *accumulate(sizes))[:-1]
    # without gaps: of a parameter that has some, the order only
    strides = tuple(torch.empty_like(p, device="meta").stride() for p in parameters)
    shapes = tuple(p.shape for p in parameters)
    return Bucket(index, names, parameters, starts, sizes, shapes, strides, parameters[0].dtype,
                  parameters[0].device)


def _split_by_bytes(named: Sequence[Named], limit: int) -> list[list[Named]]:
    parts: list[list[Named]] = []
    filled: dict[tuple[torch.dtype, torch.device], list[Named]] = {}
    for name, p in named:
        part = filled.get((p.dtype, p.device))
        if part is None or sum(q.nbytes for _, q in part) + p.nbytes > limit:
            part = filled[p.dtype, p.device] = []
            parts.append(part)
        part.append((name, p))
    return parts


def _split_evenly(named: Sequence[Named], count: int) -> list[list[Named]]:
    size, extra = divmod(len(named), count)
    ends = list(accumulate([size + 1] * extra + [size] * (count - extra)))
    return [list(named[start:end]) for start, end in zip([0, *ends], ends) if end > start]


def _split_by_group(named: Sequence[Named], groups: Sequence[Sequence[Tensor]]
                    ) -> list[list[Named]]:
    group_of = {id(p): g for g, group in enumerate(groups) for p in group}
    parts: dict[object, list[Named]] = {}
    for name, p in named:
        parts.setdefault(group_of.get(id(p), name), []).append((name, p))
    return list(parts.values())


def _split_by_kind(part: Sequence[Named]) -> list[list[Named]]:
    kinds: dict[object, list[Named]] = {}
    for name, p in part:
        kinds.setdefault((p.dtype, p.device), []).append((name, p))
    return list(kinds.values())
