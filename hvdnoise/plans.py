"""The exchange plans: how a bucket's gradients, and the noise made of them, travel.

One object a plan. It holds the plan's schedule, its bytes, its memory, and what it requires.

A schedule is a generator over the `BucketTask` of one bucket. It starts collectives, yields the
handle of each one that it waits for, and gets its result. It yields `MEAN` when the mean gradient
is in its place and the noise has observed the deviations. The step waits for that, and not for the
mixtures after it, which are needed ``lag`` steps later. All plans give the same mixtures

    m_i = sum_j weights[i, j] g_j,    sum_j weights[i, j] = 0, so m_i = sum_j weights[i, j] d_j

up to rounding; "group" has the rank's group in place of all workers. The mean is the same bits on
every rank: one rank computes it, or all ranks add up the same rows in the same order.

Bytes that one rank receives in a step, with ring or pairwise algorithms (what Gloo, Open MPI and
NCCL use for large tensors). There are P numbers of ``itemsize`` bytes, R ranks with V workers each,
W = R*V workers, n bytes for a number of the noise on the wire, and groups of k ranks:

    allreduce     2 (R-1)/R * itemsize * P                       the mean alone
    allgather     allreduce + (R-1) V n P                        the rows, beside the allreduce
    group         allreduce + (k-1) V n P                        the same, inside groups of ranks
    gather-only   (R-1) V * itemsize * P                         the mean comes of the rows (I4)
    transpose     (R-1)/R * P * (V itemsize + itemsize + V n)    constant in R (I5)

The statistics of a noise add an allreduce of their bytes. Memory of one rank beside weights,
gradients and optimizer: V P for the rows of each step of lag and of the step under way, the
statistics, and what is in flight. Formulas: derived for this project.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from hvdnoise.exchange_plan import IN_FLIGHT_BYTES, MEAN, PRECISIONS, ExchangePlan, Schedule, Shape
from hvdnoise.mixing import average, chunks, copy_into, mix, pack, slices, unpack
from hvdnoise.world import Handle

if TYPE_CHECKING:
    from hvdnoise.tasks import BucketTask


class AllreducePlan(ExchangePlan):
    """The mean by allreduce; rows become the deviations, or stay gradients."""

    name = "allreduce"
    mixes = all_workers = takes_storage = carries_16_bits = False

    def schedule(self, task: BucketTask) -> Schedule:
        task.finish_allreduce((yield task.start_allreduce()))
        task.keep_rows()
        yield MEAN

    def row_bytes(self, shape: Shape) -> float:
        return shape.allreduced(shape.itemsize * shape.numbers)

    def _in_flight_bytes(self, shape: Shape, lag: int) -> float:
        return 0.0

    def check(self, shape: Shape) -> None:
        raise ValueError(f"exchange={self.name!r}: this noise mixes the deviations of all workers, "
                         f"which must travel: use auto, {', '.join(MIXING_PLANS)}")


class StayingPlan(AllreducePlan):
    """Nothing travels, and the mean is this rank's own: of a pass that is only looked at."""

    name = "staying"

    def schedule(self, task: BucketTask) -> Schedule:
        task.keep_rows()
        yield MEAN

    def row_bytes(self, shape: Shape) -> float:
        return 0.0


class AllgatherPlan(ExchangePlan):
    """The mean by allreduce, and the rows of the peers beside it."""

    name = "allgather"
    compared: tuple[str, ...] = ("", ":bf16")

    def schedule(self, task: BucketTask) -> Schedule:
        rows_VN, peers, wire = task.rows, task.peers, task.wire
        shape = peers.size * len(rows_VN), wire.width(task.bucket.size)
        weights_VW = task.mixing_weights(peers, task.workers(peers, peers.rank))
        gathered, sent = task.take(*shape, dtype=wire.dtype), rows_VN
        if not wire.exact:
            sent = task.take(len(rows_VN), shape[1], dtype=wire.dtype)
        reduction = task.start_allreduce()
        gathering = peers.allgather(sent, name=f"{task.name}.rows", out=gathered) \
            if wire.exact and not task.late else None
        task.finish_allreduce((yield reduction))
        task.observe(keep=not wire.exact)
        if task.late:
            yield MEAN
        if gathering is None:
            if not wire.exact:
                wire.encode(rows_VN, sent)
            gathering = peers.allgather(sent, name=f"{task.name}.rows", out=gathered)
        if not task.late:
            yield MEAN
        arrived = yield gathering
        numbers_WN, factors_W1 = wire.decode(arrived.view(shape))
        mix(weights_VW, numbers_WN, rows_VN, factors_W1)
        task.give(gathered)
        if not wire.exact:
            task.give(sent)

    def _gathered_ranks(self, shape: Shape) -> int:
        return shape.ranks

    def row_bytes(self, shape: Shape) -> float:
        others = self._gathered_ranks(shape) - 1
        noise = others * shape.virtual_workers * shape.noise_itemsize * shape.numbers
        return PLAIN.row_bytes(shape) + noise

    def _in_flight_bytes(self, shape: Shape, lag: int) -> float:
        rows = self._gathered_ranks(shape) * shape.virtual_workers
        return min(IN_FLIGHT_BYTES, rows * shape.noise_itemsize * shape.numbers + _copies(shape))

    def needed_into_host(self, shape: Shape, hosts: int, ranks_per_host: int) -> float:
        return PLAIN.bytes_into_host(shape, hosts, ranks_per_host)


class GroupPlan(AllgatherPlan):
    """Allgather inside groups of consecutive ranks."""

    name = "group"
    compared = ("",)
    all_workers, grouped = False, True
    note = "carries no noise between hosts; it mixes fewer workers, which changes the noise's law"

    def _gathered_ranks(self, shape: Shape) -> int:
        return shape.group_size

    def bytes_into_host(self, shape: Shape, hosts: int, ranks_per_host: int) -> float:
        if hosts == 1:
            return 0.0
        mean, r, most = PLAIN.bytes_received(shape), ranks_per_host, 0
        for first in range(0, hosts * r, r):  # groups with ranks both in this host and elsewhere
            groups = {rank // shape.group_size for rank in range(first, first + r)}
            most = max(most, sum(group * shape.group_size < first
                                 or (group + 1) * shape.group_size > first + r
                                 for group in groups))
        return mean + (self.bytes_received(shape) - mean) * most

    def check(self, shape: Shape) -> None:
        if shape.group_size < 2 or shape.ranks % shape.group_size:
            raise ValueError(f"exchange={self.name!r} with groups of {shape.group_size} ranks: give"
                             f" {self.name}:K with a K of at least 2 that divides the "
                             f"{shape.ranks} ranks")


class GatherOnlyPlan(ExchangePlan):
    """The rows of all workers; every rank computes the mean and the mixtures from them."""

    name = "gather-only"
    mean_from_rows, carries_16_bits = True, False

    def schedule(self, task: BucketTask) -> Schedule:
        rows_VN, world, N = task.rows, task.world, task.bucket.size
        V, W = len(rows_VN), world.size * len(rows_VN)
        weights_VW = task.mixing_weights(world, task.workers(world, world.rank))
        gathered = task.take(W, N, dtype=rows_VN.dtype) if world.size > 1 else None
        sent = task.reduced.view(1, N) if V == 1 else rows_VN
        arrived = yield world.allgather(sent, name=f"{task.name}.rows", out=gathered)
        rows_WN = arrived.view(W, N)
        mine = slice(world.rank * V, (world.rank + 1) * V)
        for part in chunks(rows_WN):
            x_Wn = rows_WN[:, part]
            average(x_Wn, task.reduced[part])
            if task.observes:
                task.observe_part(part.start, x_Wn[mine] - task.reduced[part])
            mix(weights_VW, x_Wn, rows_VN[:, part])
        if gathered is not None:
            task.give(gathered)
        yield MEAN

    def row_bytes(self, shape: Shape) -> float:
        return (shape.ranks - 1) * shape.virtual_workers * shape.itemsize * shape.numbers

    def _in_flight_bytes(self, shape: Shape, lag: int) -> float:
        rows = shape.ranks * shape.virtual_workers
        return min(IN_FLIGHT_BYTES, rows * shape.itemsize * shape.numbers)


class TransposePlan(ExchangePlan):
    """Rank r gets slice r of every worker's row, and computes that slice of the mean and of all
    mixtures. The mean travels by allgather, the mixtures by alltoall."""

    name = "transpose"
    mean_from_rows = True
    compared = ("", ":bf16", ":lag2", ":bf16:lag2")

    def schedule(self, task: BucketTask) -> Schedule:
        rows_VN, world, V = task.rows, task.world, len(task.rows)
        sizes = slices(task.bucket.size, world.size)
        n, W, start = sizes[world.rank], world.size * V, sum(sizes[:world.rank])
        weights_WW = task.mixing_weights(world, task.workers(world))
        received = task.take(W * n, dtype=rows_VN.dtype)
        packed = task.reduced if V == 1 else pack(rows_VN, sizes)
        copy_into(received, (yield world.alltoall(packed, [V * size for size in sizes],
                                                  name=f"{task.name}.slices", out=received)))
        x_Wn = received.view(W, n)
        mean_n = torch.empty_like(task.reduced[:n])
        for part in chunks(x_Wn):
            average(x_Wn[:, part], mean_n[part])
            x_Wn[:, part] -= mean_n[part]
            if task.observes:
                task.observe_part(start + part.start, x_Wn[:, part])
            mix(weights_WW, x_Wn[:, part], x_Wn[:, part])
        gathering = world.allgather(mean_n, name=f"{task.name}.mean", out=task.reduced)
        sent, back = received, rows_VN.view(-1)
        widths = [task.wire.width(size) for size in sizes]
        if not task.wire.exact:
            sent = task.take(W, widths[world.rank], dtype=task.wire.dtype)
            task.wire.encode(x_Wn, sent)
            task.give(received)
        if V > 1 or not task.wire.exact:
            back = task.take(V * sum(widths), dtype=task.wire.dtype)

        def give_back() -> Handle:
            return world.alltoall(sent.view(-1), [V * widths[world.rank]] * world.size,
                                  name=f"{task.name}.mixtures", out=back)
        returning = None if task.late else give_back()
        copy_into(task.reduced, (yield gathering))
        yield MEAN
        if returning is None:
            returning = give_back()
        copy_into(back, (yield returning))
        task.give(sent)
        if back.data_ptr() != rows_VN.data_ptr():
            unpack(back, widths, task.wire, rows_VN)
            task.give(back)

    def rows_in_flight(self, peers: int) -> int:
        return 1

    def row_bytes(self, shape: Shape) -> float:
        V, full = shape.virtual_workers, shape.itemsize
        numbers = V * full + full + V * shape.noise_itemsize
        return (shape.ranks - 1) / shape.ranks * shape.numbers * numbers

    def _in_flight_bytes(self, shape: Shape, lag: int) -> float:
        return (shape.virtual_workers * shape.itemsize * shape.numbers * max(1, lag)
                + _copies(shape))

    def bytes_into_host(self, shape: Shape, hosts: int, ranks_per_host: int) -> float:
        if hosts == 1:
            return 0.0
        R, r, ring = shape.ranks, ranks_per_host, self._ring_bytes(shape)
        parts = self.bytes_received(shape) - ring  # each goes its own way
        return ring + parts * r * (R - r) / (R - 1)

    def needed_into_host(self, shape: Shape, hosts: int, ranks_per_host: int) -> float:
        total = self.bytes_into_host(shape, hosts, ranks_per_host)
        ring = self._ring_bytes(shape) if hosts > 1 else 0.0
        mixtures = shape.noise_itemsize / (shape.itemsize + shape.noise_itemsize)
        return total - (total - ring) * mixtures

    def _ring_bytes(self, shape: Shape) -> float:
        """Of the allgather of the mean, the second half of an allreduce; and of the statistics."""
        return PLAIN.row_bytes(shape) / 2 + shape.allreduced(shape.statistics_bytes)


def _copies(shape: Shape) -> float:
    """Bytes of what is sent where that is a copy, in 16 bits."""
    sent = shape.noise_itemsize
    return 0 if sent == shape.itemsize else shape.virtual_workers * sent * shape.numbers


PLAIN = AllreducePlan()
ALONE = GatherOnlyPlan()  # of a world of one rank: from itself
STAYING = StayingPlan()
PLANS: dict[str, ExchangePlan] = {plan.name: plan for plan in (
    PLAIN, ALONE, AllgatherPlan(), TransposePlan(), GroupPlan())}
MIXING_PLANS = tuple(name for name, plan in PLANS.items() if plan.mixes)
_OLD_NAMES = {"own": PLAIN.name}


@dataclass(frozen=True)
class Choice:
    """The plan that was chosen, and why."""

    plan: ExchangePlan
    group_size: int
    reason: str

    @property
    def name(self) -> str:
        """The plan's name."""
        return self.plan.name


def group_size(exchange: str, local_size: int) -> int | None:
    """Ranks of a group, as the setting ``exchange`` says; None where there are no groups."""
    name, _, number = exchange.partition(":")
    if name not in PLANS or not PLANS[name].grouped:
        return None
    return int(number) if number.isdigit() else local_size


def with_group_size(name: str, size: int) -> str:
    """The setting ``exchange`` for a plan's name, with groups of so many ranks."""
    return f"{name}:{size}" if name in PLANS and PLANS[name].grouped else name


def choose(exchange: str, shape: Shape, *, mixes: bool, plain_mean: bool = True,
           local_size: int = 1) -> Choice:
    """The plan for ``exchange="auto"`` or a plan's name, checked.

    Args:
        exchange: "auto", one of `PLANS`, or "group:K".
        mixes: whether the noise mixes the deviations of all workers (GNC from "gathered").
        plain_mean: whether the gradients travel as they are, so that their mean may be taken from
            gathered rows; not with compression or a predivide factor.
        local_size: ranks of a host, the groups of "group" without a number.

    Raises:
        ValueError: for an unknown plan or precision, or one that does not go with the rest.
    """
    name, _, number = exchange.partition(":")
    name = _current_name(name)
    grouped = name in PLANS and PLANS[name].grouped
    if name not in ("auto", *PLANS) or (number and not (grouped and number.isdigit())):
        raise ValueError(f"exchange={exchange!r} must be one of auto, {', '.join(PLANS)}, group:K")
    if shape.precision not in PRECISIONS:
        raise ValueError(f"noise_precision={shape.precision!r} must be one of "
                         f"{', '.join(PRECISIONS)}")
    if not mixes:
        if name not in ("auto", PLAIN.name) or shape.precision != "fp32":
            raise ValueError(f"exchange={exchange!r} with noise_precision={shape.precision!r} is "
                             "for noise that mixes the workers' deviations, such as "
                             "GNC(source=\"gathered\"): leave both at their defaults")
        return Choice(PLAIN, 1, "no worker needs the rows of others")
    if shape.ranks == 1:
        return Choice(PLAIN, 1, "there is one rank")
    if name != "auto":
        size = int(number or local_size) if grouped else 1
        _check(PLANS[name], replace(shape, group_size=size), plain_mean)
        return Choice(PLANS[name], size, "asked for")
    return _least(shape, plain_mean)


def _check(plan: ExchangePlan, shape: Shape, plain_mean: bool) -> None:
    if plan.mean_from_rows and not plain_mean:
        others = [name for name in MIXING_PLANS if not PLANS[name].mean_from_rows]
        raise ValueError(f"exchange={plan.name!r} takes the mean from the gradients themselves: "
                         f"use {' or '.join(others)} with compression or gradient_predivide_factor")
    if shape.precision != "fp32" and plan.mixes and not plan.carries_16_bits:
        others = [name for name in MIXING_PLANS if PLANS[name].carries_16_bits]
        raise ValueError(f"exchange={plan.name!r} with noise_precision={shape.precision!r}: it "
                         f"sends the gradients themselves, in full; use {' or '.join(others)}")
    plan.check(shape)


def _least(shape: Shape, plain_mean: bool) -> Choice:
    """The plan of the fewest bytes that can be had."""
    candidates = [plan for plan in PLANS.values()  # the first of equals wins
                  if plan.all_workers and (plain_mean or not plan.mean_from_rows)]
    best = min(candidates, key=lambda plan: plan.bytes_received(shape))
    ratio = best.bytes_received(shape) / PLAIN.bytes_received(shape)
    reason = "fewest bytes" if plain_mean else "the gradients are compressed or predivided"
    return Choice(best, 1, f"{reason}: {ratio:.2f} x a plain allreduce at {shape.ranks} ranks x "
                           f"{shape.virtual_workers} workers")


def _current_name(name: str) -> str:
    """A plan's name; an old one with a warning."""
    if name in _OLD_NAMES:
        warnings.warn(f"exchange={name!r} is now called {_OLD_NAMES[name]!r}", DeprecationWarning,
                      stacklevel=4)
    return _OLD_NAMES.get(name, name)
