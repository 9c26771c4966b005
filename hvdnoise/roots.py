"""Symmetric roots of covariance matrices, of large ones by a few eigenvalues, shared by the ranks.

    S = f I + U diag(s) U'        S^2 = U diag((f+s)^2) U' + f^2 (I - U U')

with the orthonormal columns of U for the largest eigenvalues (f+s)^2, and f^2 the mean of the
others: so S^2 has the trace of the matrix, and a product with S costs 4R operations a number
instead of 2N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

from hvdnoise.world import World

OVERSAMPLED, ITERATIONS = 10, 3  # of the iteration for leading eigenvectors


@dataclass(frozen=True)
class Root:
    """S of a matrix; see the module.

    Args:
        floor: f, one number.
        scales_R: s.
        basis_IR: U, orthonormal columns.
    """

    floor: Tensor
    scales_R: Tensor
    basis_IR: Tensor

    @classmethod
    def of(cls, matrix: Tensor, rank: int | None) -> Root:
        """Of a symmetric matrix: its largest ``rank`` eigenvalues, and the mean of the others.

        So S^2 has the trace of the matrix. All of a matrix of at most 2 ``rank`` rows is kept, and
        eigenvalues that rounding left below 0 are 0. Of others the eigenvectors are approximate
        (subspace iteration from the same start on every call). A matrix that is not finite has a
        root that is not.
        """
        size, kept = len(matrix), _kept(len(matrix), rank)
        trace = matrix.diagonal().sum(dtype=torch.float64)
        if not bool(trace.isfinite()):
            return cls.unpack(matrix.new_full((packed_size(size, rank),), math.nan), size)
        values, basis = _leading(matrix, kept)
        values = values.clamp(min=0).double()
        floor = ((trace - values.sum()) / max(1, size - kept)).clamp(min=0).sqrt()
        floor = floor if kept < size else torch.zeros_like(floor)
        return cls(floor.to(matrix).view(1), (values.sqrt() - floor).to(matrix), basis)

    @classmethod
    def unpack(cls, flat: Tensor, size: int) -> Root:
        """The root that `packed` is of, of a matrix of ``size`` rows."""
        kept = (len(flat) - 1) // (size + 1)
        floor, scales, basis = flat.split([1, kept, size * kept])
        return cls(floor, scales, basis.view(size, kept))

    @property
    def packed(self) -> Tensor:
        """As one flat tensor."""
        return torch.cat([self.floor, self.scales_R, self.basis_IR.flatten()])

    def times(self, z_NI: Tensor) -> Tensor:
        """z S, in 4 N I R operations."""
        return (self.floor * z_NI).addmm_((z_NI @ self.basis_IR) * self.scales_R, self.basis_IR.T)


def _kept(size: int, rank: int | None) -> int:
    return size if rank is None or size <= 2 * rank else rank


def packed_size(size: int, rank: int | None) -> int:
    """Numbers of a root's `packed`, of a matrix of ``size`` rows."""
    return 1 + _kept(size, rank) * (size + 1)


def _leading(matrix: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues and their vectors."""
    if kept == len(matrix):
        values, basis = torch.linalg.eigh(matrix.double())
        return values.to(matrix), basis.to(matrix)
    start = torch.Generator().manual_seed(0)
    basis = torch.randn(len(matrix), kept + OVERSAMPLED, generator=start).to(matrix)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, turn = torch.linalg.eigh(basis.T @ matrix @ basis)
    return values[-kept:], basis @ turn[:, -kept:]


def roots(matrices: Sequence[Tensor], rank: int | None, world: World, name: str) -> list[Root]:
    """The roots of symmetric matrices (`Root.of`); the same bits on all ranks.

    Each rank factorizes its share, and the ranks at the same time.
    """
    sizes = [len(matrix) for matrix in matrices]
    owners = _shares([size * size * _kept(size, rank) for size in sizes], world.size)
    packed = [Root.of(matrix, rank).packed if owner == world.rank else
              matrix.new_zeros(packed_size(len(matrix), rank))
              for matrix, owner in zip(matrices, owners)]
    handles = [world.broadcast_(flat, root=owner, name=f"{name}.{index}")
               for index, (flat, owner) in enumerate(zip(packed, owners))]
    return [Root.unpack(handle.wait(), size) for handle, size in zip(handles, sizes)]


def _shares(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank of each task: the costly first, each to who has least."""
    owners, load = [0] * len(costs), [0.0] * ranks
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = load.index(min(load))
        load[owners[index]] += costs[index]
    return owners
