"""Simulated hosts: they are separate, joined, limited as asked, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch

import hvdnoise
from tests.cluster import SCRIPT, on_hosts, run_on_hosts, why_not
from tests.launcher import LEFTOVER_SECONDS, launch
from tests.parallel.toys import loss_of, small_net, weights
from tests.rank_main import own_rank

pytestmark = [pytest.mark.parallel, pytest.mark.namespaces]
STEPS = 3
MEGABIT = 1e6 / 8  # bytes


@pytest.fixture(autouse=True, scope="module")
def hosts_can_be_simulated() -> None:
    if reason := why_not():
        pytest.skip(reason)


def shell(hosts: int, script: str, **options: Any) -> list[str]:
    """What a script prints on the first host, in lines."""
    ended = run_on_hosts(hosts, ["bash", "-euo", "pipefail", "-c", script], **options)
    assert not ended.verdict(), ended.report()
    return ended.output.splitlines()


# ---- hosts and names

def test_every_host_reaches_every_host_by_name(tmp_path: Path) -> None:
    visit = "for host in node{1..3}; do ssh $host 'echo $(hostname) ${SSH_CLIENT%% *}'; done"
    (tmp_path / "visit").write_text(visit)
    lines = shell(3, f"for host in node{{1..3}}; do ssh $host bash {tmp_path}/visit; done")
    assert lines == [f"node{b} 10.0.0.{a}" for a in (1, 2, 3) for b in (1, 2, 3)]


def test_hosts_have_interfaces_and_memory_of_their_own() -> None:
    script = "touch /dev/shm/mine; ssh node2 'ls /dev/shm; ls /sys/class/net; ss -Htln'"
    *names, listening = shell(2, script)
    assert names == ["eth0", "lo"] and listening.split()[-2] == "10.0.0.2:22"


def test_every_host_knows_the_host_list_and_has_the_same_path() -> None:
    script = "echo $HVDNOISE_SIM_HOSTS $PATH"
    first, second = shell(2, f"{script}; ssh node2 '{script}'", slots=3)
    assert first == second and first.startswith("node1:3,node2:3 ")


def test_an_unknown_host_key_is_refused() -> None:
    """Even where the caller wants none checked, as horovodrun does."""
    script = ("ssh-keygen -q -t ed25519 -N '' -f other;"
              " echo \"node* $(cat other.pub)\" >known_hosts;"
              " ssh -o StrictHostKeyChecking=no node2 hostname 2>&1 || true")
    assert shell(2, f"cd /run/cluster-sim; {script}")[-1] == "Host key verification failed."


def test_root_gets_in_where_the_account_is_locked(tmp_path: Path) -> None:
    accounts = Path("/etc/shadow").read_text().splitlines()
    locked = ["root:!:20000::::::" if line.startswith("root:") else line for line in accounts]
    (tmp_path / "shadow").write_text("\n".join(locked) + "\n")
    script = f"mount --bind {tmp_path}/shadow /etc/shadow; {SCRIPT} --hosts 2 -- ssh node2 true"
    subprocess.run(["unshare", "--mount", "sh", "-ec", script], check=True, timeout=30)


# ---- ranks on hosts

def train() -> dict[str, Any]:
    world, model = hvdnoise.init(), small_net()
    optimizer: Any = hvdnoise.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, world.rank, step).backward()
        optimizer.step()
    return {"host": socket.gethostname(), "rank": world.rank, "weights": weights(model),
            "variable": os.environ["HVDNOISE_OF_THIS_TEST"]}


def trained_alone(ranks: int) -> list[torch.Tensor]:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.stack([loss_of(model, rank, step) for rank in range(ranks)]).mean().backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("launcher", ["gloo", "mpi", "mpirun"])
def test_ranks_on_hosts_train_together(launcher: str) -> None:
    results = launch(2, f"{__file__}:train", launcher=on_hosts(2, launcher),
                     env={"HVDNOISE_OF_THIS_TEST": "a b"})
    assert [(each["rank"], each["host"]) for each in results] == [(0, "node1"), (1, "node2")]
    for result in results:
        assert result["variable"] == "a b"
        torch.testing.assert_close(result["weights"], trained_alone(2))


# ---- the rate

def exchange(size: int) -> dict[str, float]:
    """Ranks 1 and 2 send to rank 0 at once, and it sends to both; seconds and bytes of rank 0."""
    if own_rank():
        link = connect("node1")
        link.recv(1)  # rank 0 has both and starts its clock
        link.sendall(bytes(size))
        receive(link, size)
        link.sendall(b"!")
        return {}
    with socket.create_server((socket.gethostname(), 5000)) as server:
        links = [server.accept()[0] for _ in range(2)]

    def take(link: socket.socket) -> None:
        link.sendall(b"!")
        receive(link, size)

    def give(link: socket.socket) -> None:
        link.sendall(bytes(size))
        link.recv(1)

    marks = [(time.monotonic(), *eth0_bytes())]
    with ThreadPoolExecutor(2) as both:
        for action in (take, give):
            list(both.map(action, links))
            marks.append((time.monotonic(), *eth0_bytes()))
    (start, in_0, out_0), (middle, in_1, out_1), (end, in_2, out_2) = marks
    return {"in_seconds": middle - start, "in_bytes": in_1 - in_0,
            "out_seconds": end - middle, "out_bytes": out_2 - out_1}


def connect(host: str) -> socket.socket:
    """Once the other listens; `launch` limits the time."""
    while True:
        try:
            return socket.create_connection((host, 5000))
        except ConnectionRefusedError:
            time.sleep(0.02)


def receive(link: socket.socket, size: int) -> None:
    while size > 0:
        size -= len(link.recv(min(size, 1 << 20)))


def eth0_bytes() -> tuple[int, int]:
    """Received and sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            return int(counters.split()[0]), int(counters.split()[8])
    raise LookupError("no eth0")


def test_a_link_is_limited_in_both_directions() -> None:
    """Two peers at once: their own links alone would let through twice as much."""
    size, rate, bursts = 10_000_000, 100 * MEGABIT, 2 * 256 * 1024
    launcher = on_hosts(3, "mpirun", rate="100mbit")
    measured = launch(3, f"{__file__}:exchange", args=(size,), launcher=launcher)[0]
    for way in ("in", "out"):
        assert measured[f"{way}_seconds"] >= (2 * size - bursts) / rate, measured
        assert 2 * size < measured[f"{way}_bytes"] < 1.03 * 2 * size, measured


# ---- the end

def test_the_exit_code_is_that_of_the_command() -> None:
    assert run_on_hosts(2, ["bash", "-c", "exit 7"]).exit_code == 7


def test_the_time_limit_ends_what_runs() -> None:
    ended = subprocess.run([SCRIPT, "--hosts", "2", "--timeout", "1", "--", "sleep", "100"],
                           capture_output=True, timeout=30)
    assert ended.returncode == 137


def machine() -> list[Any]:
    """What a simulation might change of the machine."""
    return [socket.if_nameindex(), socket.gethostname(), Path("/etc/hosts").read_text(),
            Path("/etc/shadow").read_text(), Path("/run/cluster-sim").exists(),
            sorted(Path("~/.ssh").expanduser().glob("*"))]


def inhabitants(namespace: str) -> Iterator[str]:
    """The processes in a process namespace, but those that only wait for init to note their end."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "ns" / "pid") == namespace and \
                    "State:\tZ" not in (entry / "status").read_text():
                yield (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:  # ended meanwhile
            continue


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_after(number: signal.Signals) -> None:
    before = machine()
    script = "readlink /proc/self/ns/pid; ssh node2 'echo; sleep 99 & sleep 99' & setsid sleep 99"
    command = [str(SCRIPT), "--hosts", "2", "--timeout", "30", "--", "bash", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as simulation:
        assert simulation.stdout is not None
        namespace = simulation.stdout.readline().strip()
        simulation.stdout.readline()
        try:
            assert len(list(inhabitants(namespace))) > 5
            assert machine() == before, "it changes the machine while it runs"
        finally:
            simulation.send_signal(number)
        assert simulation.wait(10) in (137, -signal.SIGKILL)
    until = time.monotonic() + LEFTOVER_SECONDS
    while (left := list(inhabitants(namespace))) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left and machine() == before


def test_two_simulations_at_once(tmp_path: Path) -> None:
    def meet(own: str, other: str) -> list[str]:
        script = f"touch {tmp_path}/{own}; until [ -e {tmp_path}/{other} ]; do sleep 0.02; done"
        return shell(2, f"ssh node2 '{script}; hostname'", timeout=30)

    with ThreadPoolExecutor(2) as both:
        assert list(both.map(meet, "ab", "ba")) == [["node2"]] * 2


# ---- bad input

@pytest.mark.parametrize("arguments, words", [
    (["--", "true"], ["--hosts is ''", "1 to 250"]),
    (["--hosts", "0", "--", "true"], ["--hosts is '0'", "1 to 250"]),
    (["--hosts", "251", "--", "true"], ["--hosts is '251'", "1 to 250"]),
    (["--hosts", "two", "--", "true"], ["--hosts is 'two'", "1 to 250"]),
    (["--hosts", "2", "--slots", "-1", "--", "true"], ["--slots is '-1'", "1 to 9999"]),
    (["--hosts", "2", "--rate", "fast", "--", "true"], ["--rate is 'fast'", "100mbit"]),
    (["--hosts", "2", "--timeout", "1h", "--", "true"], ["--timeout is '1h'", "seconds"]),
    (["--hosts", "2", "true"], ["'true'", "--help"]),
    (["--hosts", "2", "--"], ["no command", "-- COMMAND"]),
    (["--hosts"], ["--hosts", "--help"]),
])
def test_bad_input_is_one_line(arguments: list[str], words: list[str]) -> None:
    assert_refused([SCRIPT, *arguments], *words)


def test_who_is_not_root_is_told_so() -> None:
    user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    assert_refused([*user, "bash", SCRIPT, "--hosts", "2", "--", "true"], "user 65534", "sudo")


def test_a_missing_program_is_named_with_its_package(tmp_path: Path) -> None:
    for program in ("bash", "dirname", "realpath", "ip", "tc"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    env = {**os.environ, "PATH": str(tmp_path)}
    assert_refused([SCRIPT, "--hosts", "2", "--", "true"], "'sshd'",
                   "apt-get install openssh-server", env=env)


def test_a_container_without_rights_is_told_so() -> None:
    assert_refused(["setpriv", "--bounding-set", "-sys_admin", SCRIPT, "--hosts", "2", "--",
                    "true"], "namespaces", "--privileged")


def assert_refused(command: list[Any], *words: str, **options: Any) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, **options)
    assert ended.returncode == 2 and not ended.stdout, ended
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("cluster-sim: "), ended
    for word in words:
        assert word in ended.stderr, ended
