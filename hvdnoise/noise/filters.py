"""The filters of weights: the rows p[k] of parameters of two and more dimensions.

Of a linear layer a filter is what goes into one output, of a convolution one output channel's
kernel. Biases and the scales of normalizations have none. The filters of a bucket, F of them, are
counted parameter by parameter.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hvdnoise.buckets import Bucket
from hvdnoise.noise.base import num_filters


def filter_square_norms(part_Kn: Tensor, bucket: Bucket, start: int) -> Tensor:
    """(F,) float64: for each filter of the bucket, the sum of its squares in all rows there.

    Args:
        part_Kn: ``[start, start + n)`` of the bucket, which may cut through a filter.
    """
    out_F = torch.zeros(sum(map(num_filters, bucket.shapes)), dtype=torch.float64,
                        device=part_Kn.device)
    stop = start + part_Kn.shape[1]
    first, end = bisect_right(bucket.starts, start) - 1, bisect_left(bucket.starts, stop)
    for t, filters in _filters(bucket):
        if first <= t < end and filters.stop > filters.start:
            a = max(bucket.starts[t], start)
            b = min(bucket.starts[t] + bucket.sizes[t], stop)
            _add(part_Kn[:, a - start:b - start], a - bucket.starts[t], out_F[filters],
                 bucket.strides[t][0], bucket.sizes[t])
    return out_F


def _add(part_Kn: Tensor, start: int, out_F: Tensor, stride: int, size: int) -> None:
    """Add the squares of a part of one parameter, whose filters begin each ``stride`` numbers."""
    wide = torch.promote_types(part_Kn.dtype, torch.float32)
    stop = start + part_Kn.shape[1]
    if stride * len(out_F) == size:  # each filter lies in one piece: fill up those cut through
        first, end = start // stride, -(-stop // stride)
        whole = F.pad(part_Kn, (start - first * stride, end * stride - stop))
        out_F[first:end] += torch.linalg.vector_norm(
            whole.view(len(part_Kn), end - first, stride), dim=(0, 2), dtype=wide
            ).double().square()
        return
    which_n = torch.arange(start, stop, device=part_Kn.device) // stride % len(out_F)
    out_F.index_add_(0, which_n, part_Kn.double().square().sum(dim=0))


def filter_norms(clean: Sequence[Tensor]) -> Tensor:
    """(F,) float64: the length of each filter of the parameters."""
    found = [torch.linalg.vector_norm(p.flatten(1), dim=1, dtype=torch.promote_types(
        p.dtype, torch.float32)).double() for p in clean if num_filters(p.shape)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64,
                                                      device=clean[0].device)


def filter_sizes(bucket: Bucket) -> Tensor:
    """(F,) float64: the numbers in each filter."""
    return torch.cat([torch.full((num_filters(shape),), size / max(1, num_filters(shape)))
                      for shape, size in zip(bucket.shapes, bucket.sizes)]).double()


def times_filters(numbers_N: Tensor, bucket: Bucket, factors_F: Tensor) -> Tensor:
    """(N,): a copy, each filter multiplied by its factor, and zeros outside of filters."""
    out_N = torch.zeros_like(numbers_N)
    for t, filters in _filters(bucket):
        if filters.stop > filters.start:
            factors = factors_F[filters].to(numbers_N).view(-1, *[1] * (len(bucket.shapes[t]) - 1))
            torch.mul(bucket.view(numbers_N, t), factors, out=bucket.view(out_N, t))
    return out_N


def _filters(bucket: Bucket) -> Iterator[tuple[int, slice]]:
    """Each parameter's place, and those of its filters."""
    start = 0
    for t, shape in enumerate(bucket.shapes):
        yield t, slice(start, start + num_filters(shape))
        start += num_filters(shape)
