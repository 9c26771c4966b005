"""A Slurm of its own on simulated hosts: Debian's slurmctld, slurmd and munge, run for a while.

    with Slurm() as slurm:
        job = slurm.submit("--nodes=2", "launch/slurm.sbatch", "--", "--config", "my.yaml", cwd=...)
        slurm.wait_for(job, "COMPLETED")

Keys, sockets, state and logs are in the simulation's own /run and its ports on the simulation's own
network, so nothing of it is left or seen outside, however it ends. Jobs in the partition "high"
preempt those in "low". Intervals are short: a job that is put back into the queue starts again
within seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from tests import cluster
from tests.launcher import Ended

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
GRACE_SECONDS = 40
_FOLDER = "/run/slurm-test"

# linuxproc: a signal to a step reaches all its processes, as where Slurm uses cgroups.
# cred_expire: how long a job waits in the queue after it was put back.
_CONFIG = f"""
ClusterName=test
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=15
StateSaveLocation={_FOLDER}/state
SlurmdSpoolDir={_FOLDER}/%n
SlurmctldPidFile={_FOLDER}/slurmctld.pid
SlurmdPidFile={_FOLDER}/%n.pid
SlurmctldLogFile={_FOLDER}/slurmctld.log
SlurmdLogFile={_FOLDER}/%n.log
NodeName=node[1-HOSTS] CPUs=1 RealMemory=100
PartitionName=low Nodes=ALL PriorityTier=1 GraceTime={GRACE_SECONDS} Default=YES
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
_START = f"""
set -euo pipefail
mkdir -p {_FOLDER}/state /run/munge
cd {_FOLDER}
trap 'tail -n 20 *.log' EXIT
printf %s "$2" >slurm.conf
echo CgroupPlugin=cgroup/v1 >cgroup.conf # not used, but without it slurmd looks for one
head -c 1024 /dev/urandom | install -m 600 /dev/stdin munge.key
munged --key-file=munge.key --socket=/run/munge/munge.socket.2 --pid-file={_FOLDER}/munged.pid \
    --log-file={_FOLDER}/munged.log --seed-file={_FOLDER}/munged.seed
export SLURM_CONF={_FOLDER}/slurm.conf
slurmctld
for host in $(tr , ' ' <<<"$HVDNOISE_SIM_HOSTS"); do
    ssh "${{host%:*}}" "SLURM_CONF=$SLURM_CONF slurmd"
done
exec -a "$1" cat "$3" # ends when nobody has it open for writing: with this test, however that ends
"""


def why_not() -> str:
    """Why there can be no Slurm here; empty where it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {missing[0]}: install it (Debian, Ubuntu: apt-get install slurm-wlm munge)"
    return cluster.why_not()


class Slurm:
    """Hosts node1, node2, ... of one CPU each; all jobs are gone at the end."""

    def __init__(self, hosts: int = 2, seconds: float = 600) -> None:
        self.hosts, self.seconds = hosts, seconds
        self._name = f"slurm-{uuid.uuid4().hex}"
        self._ended: Ended | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._node1: psutil.Process | None = None

    def _run(self) -> None:
        config = _CONFIG.replace("HOSTS", str(self.hosts))
        with tempfile.TemporaryDirectory(prefix="hvdnoise-slurm-") as folder:
            os.mkfifo(fifo := os.path.join(folder, "alive"))
            alive = os.open(fifo, os.O_RDWR)
            try:
                self._ended = cluster.run_on_hosts(
                    self.hosts, ["bash", "-c", _START, "slurm", self._name, config, fifo],
                    timeout=self.seconds)
            finally:
                os.close(alive)

    def __enter__(self) -> Slurm:
        self._thread.start()
        try:
            until = time.monotonic() + 60
            while not self._is_up():
                if self._ended or time.monotonic() > until:
                    raise RuntimeError(f"no Slurm: {self._ended and self._ended.report()}")
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _is_up(self) -> bool:
        found = [each for each in psutil.process_iter(["cmdline"])
                 if self._name in (each.info["cmdline"] or [])[:1]]
        self._node1 = found[0] if found else None
        idle = self.run("sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D")
        return idle.stdout.strip() == str(self.hosts)

    def __exit__(self, *_: Any) -> None:
        if self._node1:
            self._node1.kill()  # the first command of the simulation: all ends with it
            self._thread.join(30)
            assert self._ended and not self._ended.leftovers, self._ended

    def run(self, *command: str, cwd: str | Path = "/", timeout: float = 60,
            **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command on node1."""
        if self._node1 is None:
            return subprocess.CompletedProcess(command, 1, "", "not up")
        enter = ["nsenter", f"--target={self._node1.pid}", "--mount", "--net", "--uts", "--ipc",
                 "--pid", "env", f"--chdir={cwd}"]
        return subprocess.run([*enter, *command], env=self._node1.environ() | variables, text=True,
                              capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout)

    def submit(self, *arguments: str, cwd: str | Path, **variables: str) -> str:
        """The number of a new job."""
        ended = self.run("sbatch", "--parsable", *arguments, cwd=cwd, **variables)
        assert ended.returncode == 0, ended
        return ended.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        said = self.run("scontrol", "--oneliner", "show", "job", number)
        assert said.returncode == 0, said
        return dict(word.split("=", 1) for word in said.stdout.split() if "=" in word)

    def wait_for(self, number: str, state: str, *, restarts: int = 0, seconds: float = 90
                 ) -> dict[str, str]:
        """Wait until a job is in a state, after so many restarts."""
        until = time.monotonic() + seconds
        while (now := self.job(number))["JobState"] != state or int(now["Restarts"]) < restarts:
            assert time.monotonic() < until, (f"not {state} in {seconds} s: {now}", self.logs())
            time.sleep(0.2)
        return now

    def logs(self) -> str:
        """The ends of Slurm's own logs."""
        return self.run("sh", "-c", f"tail -n 15 {_FOLDER}/*.log").stdout


def told(path: Path) -> str:
    """What a job has printed so far."""
    return path.read_text(errors="replace") if os.path.exists(path) else ""
