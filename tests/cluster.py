"""Several hosts on this machine for tests, by launch/cluster-sim.sh.

    launch(2, "tests.parallel.tasks:train", launcher=on_hosts(2, "mpirun"))
    run_on_hosts(3, ["ssh", "node2", "hostname"], rate="100mbit")

Limits in time and processes left behind are seen to as in every other launch.
"""

from __future__ import annotations

import functools
from typing import Mapping, Sequence

from tests.launcher import LAUNCHERS, ROOT, Ended, run_command

SCRIPT = ROOT / "launch" / "cluster-sim.sh"

_HOROVODRUN = ["horovodrun", "--disable-cache", "--network-interface", "eth0"]
_VARIABLES = 'PYTHONPATH OMP_NUM_THREADS "${!HVDNOISE_@}"'  # horovodrun takes all along
_TORCHRUN = r"""
IFS=, read -r -a hosts <<<"$2"
np=$4 failed=0
shift 4
start() { # NUMBER COMMAND: the words that start a host's ranks
    local name kept=(GLOO_SOCKET_IFNAME=eth0)
    for name in PATH PYTHONPATH OMP_NUM_THREADS "${!HVDNOISE_@}"; do kept+=("$name=${!name-}"); done
    printf '%q ' env "${kept[@]}" torchrun --nnodes "${#hosts[@]}" --node-rank "$1" \
        --master-addr "${hosts[0]%:*}" --nproc-per-node $((np / ${#hosts[@]})) --no-python "${@:2}"
}
for number in "${!hosts[@]}"; do
    ssh "${hosts[number]%:*}" "cd $(printf %q "$PWD"); exec $(start "$number" "$@")" &
done
for each in $(jobs -p); do wait "$each" || failed=$?; done
exit "$failed"
"""
_ON_NODE1 = {
    "torchrun": ["bash", "-c", _TORCHRUN, "torchrun"],
    "gloo": [*_HOROVODRUN, "--gloo"], "mpi": [*_HOROVODRUN, "--mpi"],
    "mpirun": ["bash", "-c", f'exec mpirun $(printf -- "-x %s " {_VARIABLES}) "$@"', "mpirun"]}


@functools.cache
def why_not() -> str:
    """Why no hosts can be simulated here; empty where they can."""
    ended = run_on_hosts(1, ["true"], timeout=60)
    return ended.output.strip() if ended.exit_code == 2 else ""


def run_on_hosts(hosts: int, command: Sequence[str], *, slots: int = 1, rate: str | None = None,
                 timeout: float = 120, env: Mapping[str, str] | None = None) -> Ended:
    """Run ``command`` on the first of so many hosts, node1."""
    return run_command(1, [*_simulation(hosts, slots, rate, timeout), *command], launcher="none",
                       timeout=timeout, env=env)


def on_hosts(hosts: int, launcher: str, *, slots: int = 1, rate: str | None = None) -> str:
    """The name of a launcher, for all that take one, with its ranks on so many hosts."""
    name = f"{launcher} on {hosts} hosts x {slots}, {rate or 'unlimited'}"
    host_list = ",".join(f"node{number}:{slots}" for number in range(1, hosts + 1))
    LAUNCHERS[name] = [*_simulation(hosts, slots, rate), *_ON_NODE1[launcher], "-H", host_list]
    return name


def _simulation(hosts: int, slots: int, rate: str | None, timeout: float = 600) -> list[str]:
    """The limit in time is for when the tests themselves are ended before they end it."""
    limit = ["--rate", rate] if rate else []
    return [str(SCRIPT), "--hosts", str(hosts), "--slots", str(slots), *limit,
            "--timeout", str(int(timeout) + 30), "--"]
