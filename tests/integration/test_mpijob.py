"""launch/kubernetes/mpijob.yaml: what its schema says, and its commands run as in its pods."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import run_on_hosts, why_not
from tests.integration.running import TINY, finished, hvdnoise
from tests.launcher import BIN, ROOT, Ended
from tests.mpijob import operator_environment, schema, worker_hosts

jsonschema = pytest.importorskip("jsonschema")
FILE = ROOT / "launch" / "kubernetes" / "mpijob.yaml"
TEXT = FILE.read_text()
ROLES = ("Launcher", "Worker")


def manifest(text: str = TEXT) -> Any:
    return yaml.safe_load(text)


def pod(job: Any, role: str) -> Any:
    return job["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]


def container(job: Any, role: str) -> Any:
    (only,) = pod(job, role)["containers"]
    return only


# ---------------------------------------------------------------------- its schema


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("# gpu: ", "").replace("-cpu-", "-gpu-")])
def test_it_is_an_mpijob(text: str) -> None:
    jsonschema.validate(manifest(text), schema())


def test_a_misspelled_field_is_noticed() -> None:
    for path in (["spec"], ["spec", "runPolicy"], ["spec", "mpiReplicaSpecs", "Worker"],
                 ["spec", "mpiReplicaSpecs", "Worker", "template", "spec"],
                 ["spec", "mpiReplicaSpecs", "Worker", "template", "spec", "containers", 0]):
        job = copy.deepcopy(manifest())
        place = job
        for key in path:
            place = place[key]
        place["nope"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(job, schema())


def test_gpus_are_one_line() -> None:
    assert "nvidia.com/gpu" not in str(manifest())
    limits = container(manifest(TEXT.replace("# gpu: ", "")), "Worker")["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1


# ---------------------------------------------------------------------- what it promises


@pytest.mark.parametrize("role", ROLES)
def test_nothing_is_root(role: str) -> None:
    job = manifest()
    assert not pod(job, role)["automountServiceAccountToken"]
    user, rights = pod(job, role)["securityContext"], container(job, role)["securityContext"]
    assert user["runAsNonRoot"] and user["runAsUser"] == user["fsGroup"] == 1000
    assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    assert rights == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_it_fits_the_image() -> None:
    """Its version, user, folder of keys, port and programs are those of docker/."""
    job = manifest()
    version = re.search(r"^version = (.*)", (ROOT / "setup.cfg").read_text(), re.M)
    files = {each.name: each.read_text() for each in (ROOT / "docker").iterdir() if each.is_file()}
    assert version is not None
    for role in ROLES:
        assert container(job, role)["image"].endswith(f":{version[1]}-cpu-cluster")
        assert container(job, role)["workingDir"] == "/work"
    assert "WORKDIR /work\n" in files["Dockerfile"]
    assert "USER 1000:1000\n" in files["cluster.Dockerfile"]
    assert f"HVDNOISE_SSH:-{job['spec']['sshAuthMountPath']}}}" in files["ssh.sh"]
    (port,) = container(job, "Worker")["ports"]
    assert f"HVDNOISE_SSH_PORT:-{port['containerPort']}}}" in files["ssh.sh"]
    assert container(job, "Worker")["command"] == ["hvdnoise-sshd"]
    assert '"$venv/bin/hvdnoise-sshd"' in files["stage.sh"]
    assert re.search(r"/src/launch/\{.*\bmpirun.sh.*\bquickstart.yaml", files["stage.sh"])


def test_a_stopped_run_is_started_again_where_it_was() -> None:
    """All that its end and its restart need: files on the volume, and time to write them."""
    job = manifest()
    arguments = container(job, "Launcher")["args"]
    assert arguments[0] == "--" and arguments[-2:] == ["--resume", "auto"]
    assert arguments[arguments.index("--run_dir") + 1].startswith("runs/")
    assert job["spec"]["runPolicy"]["backoffLimit"] > 0
    assert job["spec"]["launcherCreationPolicy"] == "WaitForWorkersReady"
    for role in ROLES:
        assert pod(job, role)["terminationGracePeriodSeconds"] >= 60
        places = {each["mountPath"] for each in container(job, role)["volumeMounts"]
                  if each["name"] == "project"}
        assert places == {"/work/data", "/work/runs"}


# ---------------------------------------------------------------------- its commands

# A container on a simulated host: the image's files at the image's places, on top of this
# machine's; its user, without rights; only the variables that it gets.
CONTAINER = r"""
set -euo pipefail
root=/run/pods/$1 home=/home/hvdnoise
mkdir -p "$root"
if ! mountpoint -q "$root"; then
    mount -t tmpfs -o mode=755 tmpfs "$root"
    share() { # what this machine has, at the same place
        if [[ -L $1 ]]; then ln -s "$(readlink "$1")" "$root$1"
        elif [[ -d $1 ]]; then mkdir -p "$root$1"; mount --rbind "$1" "$root$1"
        else touch "$root$1"; mount --bind "$1" "$root$1"; fi
    }
    mkdir "$root"/{home,opt,etc,root,run,work,ssh}
    for each in /*; do [[ -e $root$each ]] || share "$each"; done
    shopt -s nullglob dotglob # what is in /root may belong to this Python
    for each in /home/* /opt/* /root/* /work/*; do share "$each"; done
    cp -a /etc "$root"
    mkdir -p "$root/etc/mpi" "$root$home" "$root/opt/hvdnoise/bin" "$root"/work/{data,runs}
    cp "$POD/hostfile" "$root/etc/mpi/hostfile"
    cp -r "$POD/ssh" "$root/"
    chmod 755 "$root/ssh"
    chmod 644 "$root"/ssh/*
    chown 1000:1000 "$root$home"
    mount --bind "$POD/runs" "$root/work/runs"
    awk -F : '$3 != 1000' /etc/passwd >"$root/etc/passwd"
    echo "hvdnoise:x:1000:1000::$home:/bin/bash" >>"$root/etc/passwd"
    ln -s "$BIN"/* "$root/opt/hvdnoise/bin/"
    install -m 755 "$REPOSITORY/docker/ssh.sh" "$root/opt/hvdnoise/bin/hvdnoise-sshd"
    ln -s hvdnoise-sshd "$root/opt/hvdnoise/bin/ssh"
    cp -r "$REPOSITORY/launch" "$root/opt/hvdnoise/launch"
fi
. "$POD/$2.sh" # sets folder, variables and command
exec chroot "$root" setpriv --reuid 1000 --regid 1000 --clear-groups --bounding-set=-all \
    --no-new-privs env -i --chdir="$folder" "HOME=$home" "HOSTNAME=$(hostname)" \
    PATH=/opt/hvdnoise/bin:/usr/local/bin:/usr/bin:/bin "${variables[@]}" "${command[@]}"
"""

# node1 is the launcher, the others are the workers.
CLUSTER = r"""
set -euo pipefail
names=(- $(cut -d ' ' -f 1 "$POD/hostfile"))
echo "10.0.0.1 $JOB-launcher" >>/etc/hosts
echo "$JOB-launcher" >/proc/sys/kernel/hostname
for i in $(seq 1 $((${#names[@]} - 1))); do
    echo "10.0.0.$((i + 1)) ${names[i]} ${names[i]%%.*}" >>/etc/hosts
done
variables="POD=$POD BIN=$BIN REPOSITORY=$REPOSITORY"
start() { # NODE NAME ROLE
    ssh "node$1" "echo $2 >/proc/sys/kernel/hostname; $variables bash $POD/container $2 $3"
}
for i in $(seq 1 $((${#names[@]} - 1))); do
    start $((i + 1)) "${names[i]%%.*}" worker >"$POD/worker-$i.log" 2>&1 &
done
for i in $(seq 1 $((${#names[@]} - 1))); do # the readiness probe
    until (: <"/dev/tcp/10.0.0.$((i + 1))/$PORT") 2>/dev/null; do sleep 0.1; done
done
if [[ $STOP ]]; then # a worker's pod has to go
    metrics=$POD/runs/first/metrics.jsonl
    (until [[ -e $metrics && $(wc -l <"$metrics") -ge 3 ]]; do sleep 0.05; done
    start 2 "${names[1]%%.*}" stop >"$POD/stop.log" 2>&1) &
fi
status=0
bash "$POD/container" launcher launcher || status=$?
[[ ! $STOP ]] || kill $! 2>/dev/null || true
tail -n 5 "$POD"/*.log
exit "$status"
"""


def run_job(job: Any, folder: Path, *, stop: bool = False) -> Ended:
    """One start of the launcher."""
    slots, workers = job["spec"]["slotsPerWorker"], worker_hosts(job)
    (folder / "hostfile").write_text("".join(f"{name} slots={slots}\n" for name in workers))
    (folder / "container").write_text(CONTAINER)
    launcher, worker = container(job, "Launcher"), container(job, "Worker")
    commands = {"launcher": launcher["command"] + launcher["args"], "worker": worker["command"],
                "stop": worker["lifecycle"]["preStop"]["exec"]["command"]}
    for name, command in commands.items():
        role = "launcher" if name == "launcher" else "worker"
        given = container(job, role.title())
        variables = {each["name"]: each["value"] for each in given.get("env", [])}
        variables |= operator_environment(role, slots)
        words = [f"{key}={value}" for key, value in variables.items()]
        (folder / f"{name}.sh").write_text(
            f"folder={shlex.quote(given['workingDir'])}\nvariables=({shlex.join(words)})\n"
            f"command=({shlex.join(command)})\n")
    (port,) = worker["ports"]
    return run_on_hosts(1 + len(workers), ["bash", "-c", CLUSTER], env={
        "JOB": job["metadata"]["name"], "POD": str(folder), "BIN": str(BIN),
        "REPOSITORY": str(ROOT), "STOP": "1" * stop, "PORT": str(port["containerPort"])})


def prepare(folder: Path) -> Path:
    """The secret that the operator makes for a job, and a volume, of which this is runs/."""
    runs, secret = folder / "runs", folder / "ssh"
    runs.mkdir()
    secret.mkdir()
    key = secret / "id_rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", "", "-f",
                    str(key)], check=True, timeout=30)
    (secret / "authorized_keys").write_text((secret / "id_rsa.pub").read_text())
    os.chown(runs, 1000, 1000)
    return runs


@pytest.mark.parallel
@pytest.mark.namespaces
def test_its_commands_train_stop_and_go_on(tmp_path: Path) -> None:
    """As the operator runs them: its key, its hostfile, its variables; a worker that has to go
    makes the ranks save, and the next start ends in the bits of a run that nobody stopped."""
    if reason := why_not():
        pytest.skip(reason)
    above = {ROOT, *ROOT.parents} - {Path("/root")}
    if any(each.stat().st_mode & 0o005 != 0o005 for each in above):
        pytest.skip(f"other users cannot read {ROOT}")
    runs = prepare(tmp_path)
    settings = TINY.replace("small-cnn", "resnet20").replace("epochs: 2", "epochs: 10")
    (runs / "own.yaml").write_text(settings.replace("log_every: 2", "log_every: 1"))
    job = manifest()
    launcher = container(job, "Launcher")
    launcher["args"][launcher["args"].index("--config") + 1] = "runs/own.yaml"
    (threads,) = (each for each in launcher["env"] if each["name"] == "OMP_NUM_THREADS")
    threads["value"] = "1"  # the workers share this machine, and bits depend on it

    ended = run_job(job, tmp_path, stop=True)
    assert ended.exit_code == 75 and not ended.leftovers, ended.report()
    stopped = json.loads((runs / "first" / "preempted.json").read_text())["step"]
    assert 3 <= stopped < 60
    ended = run_job(job, tmp_path)
    summary = finished(ended, runs / "first")
    assert summary["ranks"] == 2
    assert f"resumed at step {stopped}" in (runs / "first" / "logs" / "rank-0.log").read_text()

    alone = tmp_path / "alone"
    ended = hvdnoise(2, "train", "--config", str(runs / "own.yaml"), "--run_dir", str(alone),
                     launcher="mpirun", env={"OMP_NUM_THREADS": "1"})
    assert summary["weights_sha256"] == finished(ended, alone)["weights_sha256"]
