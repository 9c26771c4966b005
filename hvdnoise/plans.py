"""The plans: the ways in which a bucket's gradients, and the noise made of them, can travel.

A plan is a generator function over one bucket. It starts collectives, yields the handle of each one
that it has to wait for and gets its result; `MEAN` says that the mean gradient is in its place and
the noise has observed the deviations, which is all that the step waits for. What comes after it,
the mixtures, is needed ``lag`` steps later. All plans give the same mixtures

    m_i = sum_j weights[i, j] g_j,    sum_j weights[i, j] = 0, so m_i = sum_j weights[i, j] d_j

up to rounding, "group" with the rank's group in place of all workers. W workers on R ranks, V each:

    own           allreduce of the mean; rows become deviations where a noise wants them
    allgather     the same, and an allgather of the rows beside it; in 16 bits, of the deviations
    group         the same inside groups of consecutive ranks
    gather-only   an allgather of the rows alone; every rank takes the mean of it (I4)
    transpose     alltoall: rank r gets slice r of every worker's row, and computes the slice of the
                  mean and of all W mixtures; allgather of the mean, alltoall of the mixtures (I5)

The mean is the same bits on every rank: one rank computes it, or all add up the same rows in the
same order. Bytes and memory: `hvdnoise.costs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Generator, Protocol

import torch
from torch import Tensor

from hvdnoise.buckets import Bucket
from hvdnoise.comm import Handle, World
from hvdnoise.mixing import Buffers, Wire, average, chunks, mix
from hvdnoise.observation import Sighting


class Claim:
    """Yielded for leave to take storage from the buffers; see `Exchange`."""


MEAN = None
Journey = Generator["Handle | Claim | None", Any, None]


class Reduction(Protocol):
    """An allreduce of a bucket under way; see `Exchange`."""

    handle: Handle

    def finish(self, result: Tensor) -> None:
        """Put the result in its place."""


@dataclass
class Traveller:
    """A bucket on its way.

    Attributes:
        reduced: (N,), where the mean gradient is to be. It holds this rank's share of it (one
            worker's gradient, or the sum of V workers' over V), unless `rows` are enough.
        reduce: starts the allreduce of ``reduced``; see `Exchange`.
        peers: the world in which rows are gathered.
        sighting: what to observe and mix; None: the mean is all.
        late: with lag 2, mixtures wait until the means of all buckets are there (`Trip.held`).
    """

    bucket: Bucket
    name: str
    reduced: Tensor
    reduce: Callable[[], Reduction]
    world: World
    peers: World
    wire: Wire
    buffers: Buffers
    sighting: Sighting | None
    late: bool

    @property
    def rows(self) -> Tensor | None:
        """(V, N): this rank's workers' gradients; later what the noise keeps of them."""
        return self.sighting.rows(self.bucket) if self.sighting is not None else None

    @property
    def single(self) -> bool:
        """Whether the rank has one worker, whose gradient ``reduced`` is."""
        return self.rows is None or len(self.rows) == 1

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A buffer; see `Buffers`."""
        return self.buffers.take(shape, dtype, self.bucket.device)

    def workers(self, world: World, of: int | None = None) -> range:
        """The workers of all ranks of ``world``, or of one of them."""
        assert self.rows is not None and self.sighting is not None
        V = len(self.rows)
        first = self.sighting.now.workers.start - world.rank * V  # where this world begins
        if of is None:
            return range(first, first + world.size * V)
        return range(first + of * V, first + (of + 1) * V)


def own(at: Traveller) -> Journey:
    """The mean by allreduce; rows become the deviations."""
    reduction = at.reduce()
    reduction.finish((yield reduction.handle))
    _observe(at, keep=True)
    if at.sighting is not None and at.rows is not None:
        at.sighting.unscale_(at.rows)
    yield MEAN


def allgather(at: Traveller) -> Journey:
    """The mean by allreduce, and the rows of the peers beside it."""
    assert at.rows is not None and at.sighting is not None
    rows_VN, peers, wire = at.rows, at.peers, at.wire
    shape = peers.size * len(rows_VN), wire.width(at.bucket.size)
    weights_VW = at.sighting.mixing_weights(at.workers(peers, peers.rank), at.workers(peers))
    yield Claim()
    gathered, sent = at.take(*shape, dtype=wire.dtype), rows_VN
    if not wire.exact:
        sent = at.take(len(rows_VN), shape[1], dtype=wire.dtype)
    reduction = at.reduce()
    gathering = peers.allgather(sent, name=f"{at.name}.rows", out=gathered) \
        if wire.exact and not at.late else None
    reduction.finish((yield reduction.handle))
    _observe(at, keep=not wire.exact)
    if at.late:
        yield MEAN
    if gathering is None:
        if not wire.exact:
            wire.encode(rows_VN, sent)
        gathering = peers.allgather(sent, name=f"{at.name}.rows", out=gathered)
    if not at.late:
        yield MEAN
    arrived = yield gathering
    numbers_WN, factors_W1 = wire.decode(arrived.view(shape))
    mix(weights_VW, numbers_WN, rows_VN, factors_W1)
    at.buffers.give(gathered)
    if not wire.exact:
        at.buffers.give(sent)


def gather_only(at: Traveller) -> Journey:
    """The rows of all, and from them the mean and the mixtures."""
    assert at.rows is not None and at.sighting is not None
    rows_VN, world, N = at.rows, at.world, at.bucket.size
    V, W = len(rows_VN), world.size * len(rows_VN)
    weights_VW = at.sighting.mixing_weights(at.workers(world, world.rank), at.workers(world))
    yield Claim()
    gathered = at.take(W, N, dtype=rows_VN.dtype) if world.size > 1 else None
    sent = at.reduced.view(1, N) if at.single else rows_VN
    arrived = yield world.allgather(sent, name=f"{at.name}.rows", out=gathered)
    rows_WN = arrived.view(W, N)
    mine = slice(world.rank * V, (world.rank + 1) * V)
    for part in chunks(rows_WN):
        x_Wn = rows_WN[:, part]
        average(x_Wn, at.reduced[part])
        if at.sighting.noise.observes:
            at.sighting.observe(at.bucket, part.start, x_Wn[mine] - at.reduced[part])
        mix(weights_VW, x_Wn, rows_VN[:, part])
    if gathered is not None:
        at.buffers.give(gathered)
    yield MEAN


def transpose(at: Traveller) -> Journey:
    """Each rank mixes a slice for all."""
    assert at.rows is not None and at.sighting is not None
    rows_VN, world, V = at.rows, at.world, len(at.rows)
    sizes = slices(at.bucket.size, world.size)
    n, W, start = sizes[world.rank], world.size * V, sum(sizes[:world.rank])
    weights_WW = at.sighting.mixing_weights(at.workers(world), at.workers(world))
    yield Claim()
    received = at.take(W * n, dtype=rows_VN.dtype)
    packed = at.reduced if at.single else pack(rows_VN, sizes)
    into(received, (yield world.alltoall(packed, [V * size for size in sizes],
                                         name=f"{at.name}.slices", out=received)))
    x_Wn = received.view(W, n)
    mean_n = torch.empty_like(at.reduced[:n])
    for part in chunks(x_Wn):
        average(x_Wn[:, part], mean_n[part])
        x_Wn[:, part] -= mean_n[part]
        if at.sighting.noise.observes:
            at.sighting.observe(at.bucket, start + part.start, x_Wn[:, part])
        mix(weights_WW, x_Wn[:, part], x_Wn[:, part])
    gathering = world.allgather(mean_n, name=f"{at.name}.mean", out=at.reduced)
    sent, back = received, rows_VN.view(-1)
    widths = [at.wire.width(size) for size in sizes]
    if not at.wire.exact:
        sent = at.take(W, widths[world.rank], dtype=at.wire.dtype)
        at.wire.encode(x_Wn, sent)
        at.buffers.give(received)
    if V > 1 or not at.wire.exact:
        back = at.take(V * sum(widths), dtype=at.wire.dtype)

    def give_back() -> Handle:
        return world.alltoall(sent.view(-1), [V * widths[world.rank]] * world.size,
                              name=f"{at.name}.mixtures", out=back)
    returning = None if at.late else give_back()
    into(at.reduced, (yield gathering))
    yield MEAN
    if returning is None:
        returning = give_back()
    into(back, (yield returning))
    at.buffers.give(sent)
    if back.data_ptr() != rows_VN.data_ptr():
        unpack(back, widths, at.wire, rows_VN)
        at.buffers.give(back)


PLANS: dict[str, Callable[[Traveller], Journey]] = {
    "own": own, "allgather": allgather, "group": allgather, "gather-only": gather_only,
    "transpose": transpose}


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


def _observe(at: Traveller, *, keep: bool) -> None:
    """Show the noise the deviations of this rank's rows; with ``keep`` the rows become them."""
    rows_VN, sighting = at.rows, at.sighting
    if rows_VN is None or sighting is None or not (keep or sighting.noise.observes):
        return
    for part in chunks(rows_VN):
        x_Vn = rows_VN[:, part]
        x_Vn = torch.sub(x_Vn, at.reduced[part], out=x_Vn if keep else None)
        if sighting.noise.observes:
            sighting.observe(at.bucket, part.start, x_Vn)


def into(target: Tensor, result: Tensor) -> None:
    """Copy a result to its place, unless it is there."""
    if result.data_ptr() != target.data_ptr():
        target.copy_(result)
