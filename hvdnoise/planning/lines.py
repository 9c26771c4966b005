"""Ready commands and files that launch a run: horovodrun, mpirun, Slurm, Kubernetes.

All end in the same ``hvdnoise train`` with the flags that the user gave. Ranks are not bound to
cores: a rank takes its share of the host's cores by itself (hvdnoise.training.process). mpirun
gives ranks that it ends 10 s to save. File names in the flags are as given: launch from the same
folder, seen by all hosts.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, Sequence

import yaml

from hvdnoise.planning.config import PlanConfig
from hvdnoise.training.config import ConfigError

_MPI = ["--bind-to", "none", "--map-by", "slot", "--mca", "odls_base_sigkill_timeout", "10"]
_VARIABLES = ["-x", "PATH", "-x", "PYTHONUNBUFFERED=1"]
_WALL_SECONDS = 120  # between Slurm's SIGTERM and the end of the job


def train(flags: Sequence[str]) -> list[str]:
    """The command of every rank."""
    return ["hvdnoise", "train", *flags]


def host_list(config: PlanConfig) -> str:
    """host1:2,host2:2 as horovodrun and mpirun take it; localhost for one host without a name."""
    names = config.names if len(config.names) > 1 or config.hostnames else ["localhost"]
    return ",".join(f"{name}:{config.ranks_per_host}" for name in names)


def horovodrun(config: PlanConfig, flags: Sequence[str]) -> list[str]:
    """For networks where every machine is trusted (see README)."""
    return ["horovodrun", "--gloo", "-np", str(config.ranks), "-H", host_list(config),
            *train(flags)]


def mpirun(config: PlanConfig, flags: Sequence[str]) -> list[str]:
    """Open MPI 4."""
    return ["mpirun", "-np", str(config.ranks), "-H", host_list(config), *_MPI, *_VARIABLES,
            *train(flags)]


def torchrun(config: PlanConfig, flags: Sequence[str]) -> list[str]:
    """On one host; on several each starts a torchrun of its own."""
    return ["torchrun", "--standalone", "--nproc-per-node", str(config.ranks), "--no-python",
            *train(flags)]


def script(command: Sequence[str], note: str) -> str:
    """A shell script of one command."""
    return f"#!/usr/bin/env bash\n# {note}\nset -euo pipefail\nexec {shlex.join(command)}\n"


def slurm(config: PlanConfig, flags: Sequence[str]) -> str:
    """A batch script that hands over to launch/slurm.sbatch, which saves, requeues and resumes."""
    lines = ["#!/bin/bash", *(f"#SBATCH --{option}" for option in (
        f"job-name={job_name(config)}", f"nodes={len(config.names)}",
        f"ntasks-per-node={config.ranks_per_host}",
        *([f"gpus-per-node={config.ranks_per_host}"] if config.device == "cuda" else []),
        f"signal=B:TERM@{_WALL_SECONDS}", "requeue", "open-mode=append"))]
    if config.hostnames is not None:
        lines.append(f"#SBATCH --nodelist={','.join(config.names)}")
    command = 'exec "${HVDNOISE_HOME:-$SLURM_SUBMIT_DIR}/launch/slurm.sbatch" -- '
    lines += ["# Add time, partition and cpus-per-task; submit from the folder of the planning,",
              "# with HVDNOISE_HOME=/path/to/the/repository set where that is another one.",
              command + shlex.join(flags)]
    return "\n".join([*lines, ""])


def mpijob(config: PlanConfig, flags: Sequence[str]) -> str:
    """A Kubeflow MPIJob (v2beta1): the operator gives mpirun its hosts.

    In the short: launch/kubernetes/mpijob.yaml has volumes, limits, and saves when a pod must go.
    """
    command = ["mpirun", "-np", str(config.ranks), *_MPI, *_VARIABLES, *train(flags)]
    worker: dict[str, Any] = {"name": "worker", "image": config.image, "workingDir": "/work",
                              "command": ["hvdnoise-sshd"],
                              "readinessProbe": {"tcpSocket": {"port": 2222}}}
    if config.device == "cuda":
        worker["resources"] = {"limits": {"nvidia.com/gpu": config.ranks_per_host}}
    manifest = {
        "apiVersion": "kubeflow.org/v2beta1", "kind": "MPIJob",
        "metadata": {"name": job_name(config)},
        "spec": {
            "slotsPerWorker": config.ranks_per_host,
            "launcherCreationPolicy": "WaitForWorkersReady",
            "sshAuthMountPath": "/ssh",  # where the image looks for the operator's key
            "runPolicy": {"cleanPodPolicy": "Running"},
            "mpiReplicaSpecs": {
                "Launcher": _replicas(1, {"name": "launcher", "image": config.image,
                                          "workingDir": "/work", "command": command}),
                "Worker": _replicas(len(config.names), worker)}}}
    text: str = yaml.safe_dump(manifest, sort_keys=False, width=90)
    return ("# Files named in the command must be in the image or on a volume; give all pods one\n"
            "# for the data sets and the run folder, as launch/kubernetes/mpijob.yaml does.\n"
            f"{text}")


def _replicas(count: int, container: dict[str, Any]) -> dict[str, Any]:
    user = {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}
    return {"replicas": count,
            "template": {"spec": {"securityContext": user, "containers": [container]}}}


def job_name(config: PlanConfig) -> str:
    """A name that Kubernetes allows: at most 40 of a-z, 0-9 and -."""
    return re.sub(r"[^a-z0-9]+", "-", config.title.lower()).strip("-")[:40].strip("-") or "hvdnoise"


def files(config: PlanConfig, flags: Sequence[str]) -> dict[str, str]:
    """File name -> content, of all ways to launch."""
    return {"horovodrun.sh": script(horovodrun(config, flags), "On a network where every machine "
                                    "is trusted; from the folder of the planning."),
            "mpirun.sh": script(mpirun(config, flags), "From the folder of the planning."),
            "job.sbatch": slurm(config, flags), "mpijob.yaml": mpijob(config, flags)}


def write(folder: Path, contents: dict[str, str]) -> list[Path]:
    """Write the files, the scripts executable; nothing where one of them is there already.

    Raises:
        ConfigError: when the folder or a file cannot be had.
    """
    paths = [folder / name for name in contents]
    for path in paths:
        if path.exists():
            raise ConfigError(f"write={folder} is wrong: {path.name} is there already; give a new "
                              "folder, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in zip(paths, contents.values()):
            path.write_text(text)
            if path.suffix == ".sh":
                path.chmod(0o755)
    except OSError as error:
        raise ConfigError(f"write={folder} is wrong: {error.strerror or error}") from error
    return paths
