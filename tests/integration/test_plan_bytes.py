"""`hvdnoise plan`'s bytes against those that a network interface counts.

A linear layer of about 2 million numbers, Gloo, 2 and 4 ranks. What all ranks of a machine receive
over `lo`, divided by their number, is what one rank receives; what a host's only link receives is
what crosses into the host. The steps that are counted come after some that are not, so start-up is
not in it. Packet headers, acknowledgements and the coordinator's messages are, and come to about
1%. On a busy machine TCP sends anew what only was late, so the least of several steps counts, and
a count that is off is taken again. Where root may, the ranks get a network of their own: else
others' traffic is counted too.
"""

from __future__ import annotations

import functools
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import pytest

from hvdnoise.exchange_plan import Shape
from hvdnoise.planning.predict import Cluster, predict
from hvdnoise.plans import PLANS
from tests import cluster
from tests.launcher import LAUNCHERS, launch

TOLERANCE = 0.05
SIDE = 1400  # of the layer
STEPS = 3
GROUP = 2  # ranks
NUMBERS = SIDE * SIDE + SIDE
# name -> plan, options of DistributedOptimizer, precision
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "plain": ("allreduce", {}, "fp32"),
    "own": ("allreduce", {"source": "own"}, "fp32"),
    "allgather": ("allgather", {"source": "gathered"}, "fp32"),
    "allgather-bf16": ("allgather", {"source": "gathered"}, "bf16"),
    "group": ("group", {"source": "gathered"}, "fp32"),
    "gather-only": ("gather-only", {"source": "gathered"}, "fp32"),
    "transpose": ("transpose", {"source": "gathered"}, "fp32"),
    "transpose-bf16": ("transpose", {"source": "gathered"}, "bf16"),
    "transpose-lag-2": ("transpose", {"source": "gathered", "lag": 2}, "fp32"),
}


# ---------------------------------------------------------------------- on the ranks


def received(interface: str) -> int:
    """Bytes that an interface of this network has received."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[0])
    raise AssertionError(f"there is no interface {interface}")


def count(interface: str, virtual_workers: int, names: list[str]) -> dict[str, int]:
    """Bytes that the interface receives in a step, of each case: the least of STEPS steps."""
    from hvdnoise import comm
    world = comm.init(group_size=GROUP if "group" in names else None)
    found: dict[str, int] = {}
    for name in names:
        step = stepper(name, virtual_workers)
        for _ in range(2):  # agreements of the first step; deviations to displace by
            step()
        world.barrier("before")
        each = []
        for _ in range(STEPS):
            before = received(interface)
            world.barrier("begin")
            step()
            world.barrier("after")
            each.append(received(interface) - before)
        found[name] = min(each)
    comm.shutdown()
    return found


def stepper(name: str, virtual_workers: int) -> Callable[[], None]:
    """A function that takes a step of a case."""
    import torch

    import hvdnoise
    plan, noise, precision = CASES[name]
    torch.manual_seed(1)
    model = torch.nn.Linear(SIDE, SIDE)
    options: dict[str, Any] = {"virtual_workers": virtual_workers}
    exchange = f"group:{GROUP}" if plan == "group" else plan
    if noise:
        options |= {"noise": hvdnoise.GNC(radius=0.1, **noise), "exchange": exchange,
                    "noise_precision": precision}
    optimizer = hvdnoise.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters(), **options)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(virtual_workers):
            model(torch.randn(2, SIDE)).square().mean().backward()
        optimizer.step()
        optimizer.state_dict()  # with lag 2, waits for what is still under way
    step()
    assert not noise or optimizer.exchange_plan == plan, optimizer.exchange_reason
    return step


# ---------------------------------------------------------------------- the tests


@functools.cache
def private_network() -> bool:
    """Whether ranks can have a `lo` of their own here."""
    try:
        return os.geteuid() == 0 and subprocess.run(
            ["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True,
            timeout=20).returncode == 0
    except OSError:
        return False


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> str:
    """Gloo over a `lo` of its own, where that can be had."""
    if not private_network():
        return "gloo"
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    monkeypatch.setitem(LAUNCHERS, "gloo-alone", [*alone, *LAUNCHERS["gloo"]])
    return "gloo-alone"


def compare(measured: dict[str, float], predicted: dict[str, float]) -> dict[str, str]:
    """What is off, in words."""
    return {name: f"{measured[name] / 1e6:.3f} MB measured, {predicted[name] / 1e6:.3f} predicted"
            for name in predicted
            if abs(measured[name] / predicted[name] - 1) > TOLERANCE}


def predictions(names: list[str], shape: Shape, hosts: int, per_host: int) -> dict[str, Any]:
    found = {}
    for name in names:
        plan, _, precision = CASES[name]
        found[name] = predict(PLANS[plan], replace(shape, precision=precision),
                              Cluster(hosts, per_host))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks, virtual_workers", [(4, 1), (2, 2)])
def test_bytes_that_a_rank_receives(ranks: int, virtual_workers: int, launcher: str) -> None:
    shape = Shape(NUMBERS, ranks, virtual_workers, group_size=GROUP)
    todo = list(CASES)
    for _ in range(3):
        predicted = {name: each.received
                     for name, each in predictions(todo, shape, 1, ranks).items()}
        counted = launch(ranks, f"{__name__}:count", args=("lo", virtual_workers, todo),
                         launcher=launcher, timeout=200)[0]
        off = compare({name: value / ranks for name, value in counted.items()}, predicted)
        if not off:
            break
        todo = list(off)
    assert not off, off


@pytest.mark.slow
@pytest.mark.namespaces
@pytest.mark.parametrize("hosts, per_host", [(2, 2), (3, 1)])
def test_bytes_that_cross_into_a_host(hosts: int, per_host: int) -> None:
    if cluster.why_not():
        pytest.skip(cluster.why_not())
    names = [name for name in CASES if name not in ("own", "allgather", "transpose-lag-2")
             and (name != "group" or hosts * per_host % GROUP == 0)]
    shape = Shape(NUMBERS, hosts * per_host, group_size=GROUP)
    found = predictions(names, shape, hosts, per_host)
    counted = launch(hosts * per_host, f"{__name__}:count", args=("eth0", 1, names),
                     launcher=cluster.on_hosts(hosts, "gloo", slots=per_host), timeout=200)
    off = compare(counted[0], {name: each.into_host for name, each in found.items()})
    assert not off, off
