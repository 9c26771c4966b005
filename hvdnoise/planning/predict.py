"""The numbers of a run before it runs: steps, rates, bytes, memory and a simple model of time.

Bytes that a rank receives and the memory it takes are those of `hvdnoise.costs`. The model of time
is simple on purpose; it assumes, with R ranks on hosts of r ranks each, numbered host by host:

- The link of a host carries the stated bandwidth in each direction, and its ranks share it. Traffic
  inside a host, latency, the mixing and a few numbers per tensor (8 to 16 bytes) cost no time.
- Allreduce and allgather are rings in the order of the ranks: of a ring's links one leads into each
  host, so what one rank receives crosses into a host once, whatever r. An alltoall's parts go each
  their own way: of what its r ranks receive, the share (R-r)/(R-1) comes from other hosts.
- Forward takes 1/3 of the compute time C, backward 2/3. Gradients leave during the last of the
  V * accumulate backward passes of a step, which lasts O = 2/3 C / (V * accumulate).

With the link's times N for what must arrive before the step ends, and T for all of it,

    no noise, own   C - O + max(O, A)               A: of the allreduce
    lag 1           C - O + max(O, T)
    lag 2           max(T, C - O + max(O, N))       the mixtures have the whole next step to arrive
    lag 0           lag 1 + no noise                two passes; the second reduces gradients only

N: the allreduce of allgather and group; all of gather-only, whose mean is in the rows; without the
way back of the mixtures for transpose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hvdnoise import costs
from hvdnoise.costs import Shape

BACKWARD = 2 / 3  # share of the compute time


@dataclass(frozen=True)
class Cluster:
    """Where a run shall run.

    Args:
        hosts: H.
        ranks_per_host: r.
        bytes_per_second: of a host's link, in each direction; None: not known.
        compute_seconds: C, of one rank's step without communication; None: not known.
        passes: V * accumulate, backward passes of a rank's step.
    """

    hosts: int
    ranks_per_host: int
    bytes_per_second: float | None = None
    compute_seconds: float | None = None
    passes: int = 1


@dataclass(frozen=True)
class Prediction:
    """What GNC costs with one plan of exchange, in one precision of the noise.

    Args:
        plan: of `hvdnoise.costs.PLANS`.
        precision: of the noise on the wire.
        impossible: why the plan cannot be had; empty where it can.
        received: bytes that one rank receives in a step.
        ratio: of them to those of a plain allreduce; None on one rank.
        into_host: bytes that cross the link into one host in a step.
        memory: bytes of one rank for the noise, by lag.
        seconds: of a step, by lag; empty where the cluster's speed is not known.
        overhead: a step's seconds over those without noise, by lag; empty as well where a plain
            step takes no time.
    """

    plan: str
    precision: str
    impossible: str
    received: float
    ratio: float | None
    into_host: float
    memory: dict[int, float]
    seconds: dict[int, float]
    overhead: dict[int, float]


def predict(plan: str, shape: Shape, cluster: Cluster, lags: tuple[int, ...] = (1, 2)
            ) -> Prediction:
    """The costs of a plan, ``shape.precision`` being the noise's."""
    received, own = costs.bytes_received(plan, shape), costs.bytes_received("own", shape)
    steps = {lag: step_seconds(plan, shape, cluster, lag) for lag in lags}
    seconds = {lag: time for lag, time in steps.items() if time is not None}
    plain = step_seconds("own", shape, cluster, 1)
    return Prediction(
        plan, shape.precision, why_not(plan, shape), received, received / own if own else None,
        into_host(plan, shape, cluster),
        {lag: costs.memory_bytes(plan, shape, lag=lag) for lag in lags}, seconds,
        {lag: time / plain for lag, time in seconds.items()} if plain else {})


def why_not(plan: str, shape: Shape) -> str:
    """Why a noise that mixes deviations cannot travel so; empty where it can."""
    name = f"group:{shape.group_size}" if plan == "group" else plan
    try:
        costs.choose("auto" if plan == "own" else name, shape, mixes=True)
    except ValueError as error:
        return str(error)
    return ""


def into_host(plan: str, shape: Shape, cluster: Cluster) -> float:
    """Bytes that cross the link into one host in a step, the busiest one's (see the module)."""
    if cluster.hosts == 1:
        return 0.0
    own, all_ = costs.bytes_received("own", shape), costs.bytes_received(plan, shape)
    if plan == "transpose":  # its ring returns the mean: the second half of an allreduce
        R, r = shape.ranks, cluster.ranks_per_host
        return own / 2 + (all_ - own / 2) * r * (R - r) / (R - 1)
    if plan == "group":
        return own + (all_ - own) * _rings_into_a_host(cluster, shape.group_size)
    return all_


def _rings_into_a_host(cluster: Cluster, group_size: int) -> int:
    """How many groups have ranks both in a host and elsewhere; of the host with most."""
    r, most = cluster.ranks_per_host, 0
    for first in range(0, cluster.hosts * r, r):
        groups = {rank // group_size for rank in range(first, first + r)}
        most = max(most, sum(group * group_size < first or (group + 1) * group_size > first + r
                             for group in groups))
    return most


def _needed_into_host(plan: str, shape: Shape, cluster: Cluster) -> float:
    """That part of `into_host` that must arrive before the step ends."""
    if plan in ("allgather", "group"):
        plan = "own"
    total = into_host(plan, shape, cluster)
    if plan != "transpose":
        return total
    mixtures = total - into_host("own", shape, cluster) / 2  # both alltoalls
    return total - mixtures * shape.noise_itemsize / (shape.itemsize + shape.noise_itemsize)


def step_seconds(plan: str, shape: Shape, cluster: Cluster, lag: int) -> float | None:
    """Seconds of a step; None where bandwidth or compute time is not known."""
    if cluster.bytes_per_second is None or cluster.compute_seconds is None:
        return None
    rate, compute = cluster.bytes_per_second, cluster.compute_seconds
    window = BACKWARD * compute / cluster.passes
    every = into_host(plan, shape, cluster) / rate
    needed = _needed_into_host(plan, shape, cluster) / rate
    if lag == 2:
        return max(every, compute - window + max(window, needed))
    step = compute - window + max(window, every)
    if lag == 0:
        step += compute - window + max(window, into_host("own", shape, cluster) / rate)
    return step


def predict_all(shape: Shape, cluster: Cluster, lags: tuple[int, ...] = (1, 2)
                ) -> list[Prediction]:
    """Every plan, in 32 bits and, where the noise travels by itself, in 16."""
    return [predict(plan, replace(shape, precision=precision), cluster, lags)
            for plan in costs.PLANS for precision in ("fp32", "bf16")
            if plan != "own" or precision == "fp32"]
