"""The arithmetic of the exchange: means, deviations and mixtures of rows, and rows in 16 bits.

Rows have shape (workers, numbers). Everything goes chunk by chunk, so that what several operations
need of the same numbers is in the processor's cache when they come: one pass over memory.
"""

from __future__ import annotations

import math
from typing import Iterator, Sequence

import torch
from torch import Tensor

_CACHED = 2 ** 18  # numbers of all rows together, on a CPU: 1 MB in float32
_WHOLE = 2 ** 26  # elsewhere, where each chunk costs a launch


def chunks(rows_Wn: Tensor) -> Iterator[slice]:
    """Parts of the second dimension."""
    numbers = _CACHED if rows_Wn.device.type == "cpu" else _WHOLE
    step = max(1, numbers // max(1, len(rows_Wn)))
    for start in range(0, rows_Wn.shape[1], step):
        yield slice(start, min(start + step, rows_Wn.shape[1]))


def total(tensors: Sequence[Tensor]) -> Tensor:
    """() the sum in float32, on the device of the first: finite only where all numbers are."""
    sums = [each.sum(dtype=torch.float32).to(tensors[0].device) for each in tensors]
    return torch.stack(sums).sum()


def average(rows_Wn: Tensor, out_n: Tensor) -> None:
    """The mean of the rows, added up in their order: the same bits on every kind of processor."""
    wide_Wn = rows_Wn.to(torch.promote_types(rows_Wn.dtype, torch.float32))
    total_n = wide_Wn[0] + wide_Wn[1] if len(rows_Wn) > 1 else wide_Wn[0].clone()
    for row_n in wide_Wn[2:]:
        total_n.add_(row_n)
    out_n.copy_(total_n.div_(len(rows_Wn)))


def mix(weights_KW: Tensor, rows_Wn: Tensor, out_Kn: Tensor, factors_W1: Tensor | None = None
        ) -> None:
    """``out = weights @ (factors * rows)``, in float32 or better; out may be the rows' storage."""
    if factors_W1 is not None:
        weights_KW = weights_KW.to(factors_W1) * factors_W1.T
    wide = torch.promote_types(out_Kn.dtype, torch.float32)
    weights_KW = weights_KW.to(out_Kn.device, wide)
    for part in chunks(rows_Wn):
        out_Kn[:, part] = weights_KW @ rows_Wn[:, part].to(wide)


def slices(size: int, count: int) -> list[int]:
    """Sizes of ``count`` parts of about the same size."""
    return [size // count + (index < size % count) for index in range(count)]


def pack(rows_VN: Tensor, sizes: list[int]) -> Tensor:
    """The rows' slices, one rank's after the other's: (V * N,)."""
    return torch.cat([part_Vn.reshape(-1) for part_Vn in rows_VN.split(sizes, dim=1)])


def unpack(packed: Tensor, widths: list[int], wire: Wire, rows_VN: Tensor) -> None:
    """Rows from what `pack` made of them on the wire, slice by slice."""
    start, V = 0, len(rows_VN)
    for part in packed.split([V * width for width in widths]):
        numbers_Vn, factors_V1 = wire.decode(part.view(V, -1))
        slot = rows_VN[:, start:start + numbers_Vn.shape[1]]
        slot.copy_(numbers_Vn)
        if factors_V1 is not None:
            slot.mul_(factors_V1)
        start += numbers_Vn.shape[1]


def square_sum(tensor: Tensor) -> Tensor:
    """() float64: the sum of the squares, to 1e-6 of it.

    Sums of 1,024 squares are in float32, and what they add up to is in float64: over millions of
    numbers a sum in float32 is off by 1e-3.
    """
    wide, flat = torch.promote_types(tensor.dtype, torch.float32), tensor.detach().flatten()
    whole = len(flat) // 1024 * 1024
    parts = [torch.linalg.vector_norm(part.view(-1, size), dim=1, dtype=wide)
             for part, size in ((flat[:whole], 1024), (flat[whole:], 1)) if len(part)]
    return torch.cat(parts).double().square().sum() if parts else flat.double().sum()


def square(tensor: Tensor) -> float:
    """The sum of the squares, to 1e-6 of it."""
    return float(square_sum(tensor))


def copy_into(target: Tensor, result: Tensor) -> None:
    """Copy a result to its place, unless it is there."""
    if result.data_ptr() != target.data_ptr():
        target.copy_(result)


class Wire:
    """Rows as they travel: "fp32" (as they are), "bf16" or "fp16", for tensors of ``dtype``.

    bf16 rounds each number by 2^-8 of itself at most. fp16 scales each row by the power of two that
    brings its largest number near the top of the range, and appends the exponent as one number
    more: it rounds by 2^-11 of the number or 2^-39 of the row's largest, whichever is more.
    """

    def __init__(self, precision: str, dtype: torch.dtype) -> None:
        kinds = {"fp32": dtype, "bf16": torch.bfloat16, "fp16": torch.float16}
        self.exact = precision == "fp32" or dtype.itemsize <= 2
        self.dtype = dtype if self.exact else kinds[precision]
        self._scales = self.dtype == torch.float16 and not self.exact

    def width(self, numbers: int) -> int:
        """Numbers that a row of so many numbers takes."""
        return numbers + 1 if self._scales else numbers

    def encode(self, rows_Kn: Tensor, out_Kw: Tensor) -> None:
        """Write into ``out`` of the shape (K, width) and the wire's dtype."""
        if not self._scales:
            out_Kw.copy_(rows_Kn)
            return
        largest_K1 = rows_Kn.new_zeros(len(rows_Kn), 1)
        if rows_Kn.shape[1]:
            torch.linalg.vector_norm(rows_Kn, ord=float("inf"), dim=1, keepdim=True,
                                     out=largest_K1)
        exponents_K1 = torch.where(largest_K1.isfinite() & (largest_K1 > 0),
                                   torch.frexp(largest_K1).exponent - 15, 0).clamp(min=-110)
        torch.mul(rows_Kn, torch.exp2(-exponents_K1.to(rows_Kn)), out=out_Kw[:, :-1])
        out_Kw[:, -1:] = exponents_K1

    def decode(self, wire_Kw: Tensor) -> tuple[Tensor, Tensor | None]:
        """(K, n) in the wire's dtype, and factors (K, 1) of the rows, if any."""
        if not self._scales:
            return wire_Kw, None
        factors_K1 = torch.exp2(wire_Kw[:, -1:].double())
        return wire_Kw[:, :-1], factors_K1


class Buffers:
    """Storage that is used again and again, and counted."""

    def __init__(self) -> None:
        self.held = 0  # bytes
        self._free: list[Tensor] = []
        self._lent: dict[int, Tensor] = {}  # by address

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of undefined numbers; give it back with `give`."""
        size = math.prod(shape) * dtype.itemsize
        fitting = [each for each in self._free if each.device == device and len(each) >= size]
        if fitting:
            best = min(fitting, key=len)
            self._free = [each for each in self._free if each is not best]
        else:
            whole = max(8, -(-size // 8) * 8)  # so that it can be seen as any dtype
            best = torch.empty(whole, dtype=torch.uint8, device=device)
            self.held += best.nbytes
        self._lent[best.data_ptr()] = best
        return best[:size].view(dtype).view(shape)

    def give(self, taken: Tensor) -> None:
        """Take back what `take` gave out, or a view of it."""
        self._free.append(self._lent.pop(taken.untyped_storage().data_ptr()))
