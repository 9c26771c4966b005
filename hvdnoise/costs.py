"""What an exchange costs, in bytes, and the plan that costs least.

P numbers of `itemsize` bytes (4 for float32), R ranks with V workers each, W = R*V, noise sent in
n bytes a number (itemsize, or 2 in 16 bits), groups of k ranks. Bytes that one rank receives in a
step, with ring or pairwise algorithms (what Gloo, Open MPI and NCCL use for large tensors):

    own           2 (R-1)/R * itemsize * P                       the plain allreduce
    allgather     own + (R-1) V n P                              beside the allreduce
    group         own + (k-1) V n P                              the same, inside groups of ranks
    gather-only   (R-1) V * itemsize * P                         the mean comes of the rows (I4)
    transpose     (R-1)/R * P * (V itemsize + itemsize + V n)    constant in R (I5)

Memory of one rank beside weights, gradients and optimizer: V P for the rows or mixtures of each
step of lag and of the step under way, and what is in flight. (The displaced weights, P, are gone
before the last rows are there.) Formulas: derived for this project.
"""

from __future__ import annotations

from dataclasses import dataclass

PLANS = ("own", "allgather", "gather-only", "transpose", "group")
PRECISIONS = ("fp32", "bf16", "fp16")
_MIXING = ("gather-only", "allgather", "transpose")  # auto's candidates; the first of equals wins
IN_FLIGHT_BYTES = 256 * 2 ** 20  # of gathered rows; one bucket may exceed it


@dataclass(frozen=True)
class Shape:
    """What the cost depends on.

    Args:
        numbers: P, trainable parameters.
        ranks: R.
        virtual_workers: V, of each rank.
        itemsize: bytes of a gradient's number.
        precision: of the noise on the wire: "fp32" (as the gradients are), "bf16" or "fp16".
        group_size: k, for the plan "group".
    """

    numbers: int
    ranks: int
    virtual_workers: int = 1
    itemsize: int = 4
    precision: str = "fp32"
    group_size: int = 1

    @property
    def noise_itemsize(self) -> int:
        """Bytes of a number of the noise on the wire."""
        return self.itemsize if self.precision == "fp32" else min(2, self.itemsize)


def bytes_received(plan: str, shape: Shape) -> float:
    """Bytes that one rank receives in a step (see the module)."""
    R, V, P = shape.ranks, shape.virtual_workers, shape.numbers
    full, noise = shape.itemsize, shape.noise_itemsize
    own = 2 * (R - 1) / R * full * P
    return {"own": own, "allgather": own + (R - 1) * V * noise * P,
            "group": own + (shape.group_size - 1) * V * noise * P,
            "gather-only": (R - 1) * V * full * P,
            "transpose": (R - 1) / R * P * (V * full + full + V * noise)}[plan]


def memory_bytes(plan: str, shape: Shape, *, lag: int = 1) -> float:
    """Bytes of one rank that GNC under this plan takes, at its peak, beside plain training."""
    R, V, P, full = shape.ranks, shape.virtual_workers, shape.numbers, shape.itemsize
    kept = (V * (lag + 1) if lag else V + 1) * full * P
    sent = shape.noise_itemsize
    mine = 0 if sent == full else V * sent * P  # in 16 bits, what is sent is a copy
    in_flight = {"own": 0.0, "allgather": R * V * sent * P + mine, "gather-only": R * V * full * P,
                 "group": shape.group_size * V * sent * P + mine,
                 "transpose": V * full * P * max(1, lag) + mine}[plan]
    bounded = plan in ("allgather", "gather-only", "group")
    return kept + (min(in_flight, IN_FLIGHT_BYTES) if bounded else in_flight)


@dataclass(frozen=True)
class Plan:
    """How the gradients and the noise travel, and why."""

    name: str
    group_size: int
    reason: str


def choose(exchange: str, shape: Shape, *, mixes: bool, plain_mean: bool = True,
           local_size: int = 1) -> Plan:
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
    if name not in ("auto", *PLANS) or (number and not (name == "group" and number.isdigit())):
        raise ValueError(f"exchange={exchange!r} must be one of auto, {', '.join(PLANS)}, group:K")
    if shape.precision not in PRECISIONS:
        raise ValueError(f"noise_precision={shape.precision!r} must be one of "
                         f"{', '.join(PRECISIONS)}")
    if not mixes:
        if name not in ("auto", "own") or shape.precision != "fp32":
            raise ValueError(f"exchange={exchange!r} with noise_precision={shape.precision!r} is "
                             "for noise that mixes the workers' deviations, such as "
                             "GNC(source=\"gathered\"): leave both at their defaults")
        return Plan("own", 1, "nothing but the gradients travels")
    if shape.ranks == 1:
        return Plan("own", 1, "there is one rank")
    size = int(number or local_size)
    _check(name, shape, size, plain_mean)
    if name != "auto":
        return Plan(name, size if name == "group" else 1, "asked for")
    best = min(_MIXING if plain_mean else ("allgather",),
               key=lambda each: bytes_received(each, shape))
    ratio = bytes_received(best, shape) / bytes_received("own", shape)
    reason = "fewest bytes" if plain_mean else "the gradients are compressed or predivided"
    return Plan(best, 1, f"{reason}: {ratio:.2f} x a plain allreduce at {shape.ranks} ranks x "
                         f"{shape.virtual_workers} workers")


def _check(name: str, shape: Shape, group_size: int, plain_mean: bool) -> None:
    if name == "own":
        raise ValueError("exchange='own': this noise mixes the deviations of all workers, which "
                         f"must travel: use auto, {', '.join(PLANS[1:])}")
    if name in ("gather-only", "transpose") and not plain_mean:
        raise ValueError(f"exchange={name!r} takes the mean from the gradients themselves: use "
                         "allgather or group with compression or gradient_predivide_factor")
    if name == "gather-only" and shape.precision != "fp32":
        raise ValueError(f"exchange='gather-only' with noise_precision={shape.precision!r}: it "
                         "sends the gradients themselves, in full; use allgather or transpose")
    if name == "group" and (group_size < 2 or shape.ranks % group_size):
        raise ValueError(f"exchange='group' with groups of {group_size} ranks: give group:K with "
                         f"a K of at least 2 that divides the {shape.ranks} ranks")
