"""The numbers of a run before it runs: steps, rates, bytes, memory and a simple model of time.

Bytes that a rank receives and the memory it takes are those of the plans (`hvdnoise.plans`). The
model of time is simple on purpose. It assumes, with R ranks on hosts of r ranks each, numbered host
by host:

- The link of a host carries the stated bandwidth in each direction, and its ranks share it. Traffic
  inside a host, latency, the mixing and a few numbers per tensor (8 to 16 bytes) cost no time.
- Allreduce and allgather are rings in the order of the ranks: of a ring's links one leads into each
  host, so what one rank receives crosses into a host once, whatever r. An alltoall's parts go each
  their own way: of what its r ranks receive, the share (R-r)/(R-1) comes from other hosts.
- Forward takes 1/3 of the compute time C, backward 2/3. Gradients leave during the last of the
  V * accumulate backward passes of a step, which lasts O = 2/3 C / (V * accumulate).

With the link's times N for what must arrive before the step ends, and T for all of it,

    no mixtures     C - O + max(O, A)               A: of the allreduce
    lag 1           C - O + max(O, T)
    lag 2           max(T, C - O + max(O, N))       the mixtures have the whole next step to arrive
    lag 0           lag 1 + no mixtures             two passes; the second reduces gradients only

N is what the mean needs, `ExchangePlan.needed_into_host`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hvdnoise.exchange_plan import ExchangePlan, Shape
from hvdnoise.noise.base import Noise
from hvdnoise.plans import PLAIN, PLANS, choose, with_group_size

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
        plan: of `hvdnoise.plans.PLANS`.
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


def predict(plan: ExchangePlan, shape: Shape, cluster: Cluster, lags: tuple[int, ...] = (1, 2)
            ) -> Prediction:
    """The costs of a plan, ``shape.precision`` being the noise's."""
    received, plain = plan.bytes_received(shape), PLAIN.bytes_received(_without_noise(shape))
    steps = {lag: step_seconds(plan, shape, cluster, lag) for lag in lags}
    seconds = {lag: time for lag, time in steps.items() if time is not None}
    plain_step = step_seconds(PLAIN, _without_noise(shape), cluster, 1)
    return Prediction(
        plan.name, shape.precision, why_not(plan, shape), received,
        received / plain if plain else None, into_host(plan, shape, cluster),
        {lag: plan.memory_bytes(shape, lag=lag) for lag in lags}, seconds,
        {lag: time / plain_step for lag, time in seconds.items()} if plain_step else {})


def received_in_a_step(plan: ExchangePlan, shape: Shape, noise: Noise | None) -> float:
    """Bytes that one rank receives in a step; with lag 0 those of the first pass too, unless what
    the noise needs of it stays on the rank."""
    twice = noise is not None and noise.lag == 0 and not noise.needs_no_mean
    again = PLAIN.bytes_received(_without_noise(shape)) if twice else 0.0
    return plan.bytes_received(shape) + again


def _without_noise(shape: Shape) -> Shape:
    return replace(shape, statistics_bytes=0)


def why_not(plan: ExchangePlan, shape: Shape) -> str:
    """Why a noise that mixes deviations cannot travel so; empty where it can."""
    try:
        choose(with_group_size(plan.name, shape.group_size) if plan.mixes else "auto", shape,
               mixes=True)
    except ValueError as error:
        return str(error)
    return ""


def into_host(plan: ExchangePlan, shape: Shape, cluster: Cluster) -> float:
    """Bytes that cross the link into one host in a step, the busiest one's (see the module)."""
    return plan.bytes_into_host(shape, cluster.hosts, cluster.ranks_per_host)


def step_seconds(plan: ExchangePlan, shape: Shape, cluster: Cluster, lag: int) -> float | None:
    """Seconds of a step; None where bandwidth or compute time is not known."""
    if cluster.bytes_per_second is None or cluster.compute_seconds is None:
        return None
    rate, compute = cluster.bytes_per_second, cluster.compute_seconds
    window = BACKWARD * compute / cluster.passes
    every = into_host(plan, shape, cluster) / rate
    needed = plan.needed_into_host(shape, cluster.hosts, cluster.ranks_per_host) / rate
    if lag == 2:
        return max(every, compute - window + max(window, needed))
    step = compute - window + max(window, every)
    if lag == 0:
        plain = into_host(PLAIN, _without_noise(shape), cluster) / rate
        step += compute - window + max(window, plain)
    return step


def predict_all(shape: Shape, cluster: Cluster, lags: tuple[int, ...] = (1, 2)
                ) -> list[Prediction]:
    """Every plan, in 32 bits and, where the noise travels by itself, in 16."""
    return [predict(plan, replace(shape, precision=precision), cluster, lags)
            for plan in PLANS.values() for precision in ("fp32", "bf16")
            if plan.mixes or precision == "fp32"]
