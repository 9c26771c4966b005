"""The launch scripts on simulated hosts: they train as one host does, and say what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import pytest
from PIL import Image

from tests.cluster import run_on_hosts, why_not
from tests.integration.running import TINY, error_lines, finished, steps_logged
from tests.launcher import BIN, ROOT, Ended, oldest_process, run_command

pytestmark = pytest.mark.parallel
HOROVODRUN, MPIRUN = "launch/horovodrun.sh", "launch/mpirun.sh"
SECRET = "hvdnoise-test-secret"  # what must not be seen
CURED_WITHIN = 60


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(TINY.replace("epochs: 2", "epochs: 1"))
    return str(path)


@pytest.fixture
def hosts_can_be_simulated() -> None:
    if reason := why_not():
        pytest.skip(reason)


def on_simulated_hosts(test: Any) -> Any:
    return pytest.mark.namespaces(pytest.mark.usefixtures("hosts_can_be_simulated")(test))


def shell(hosts: int, script: str, *arguments: str, timeout: float = 120,
          env: Mapping[str, str] | None = None) -> Ended:
    """Run a bash script on node1; $@ are the arguments."""
    return run_on_hosts(hosts, ["bash", "-uo", "pipefail", "-c", script, "bash", *arguments],
                        timeout=timeout, env=env)


def errors(ended: Ended) -> list[str]:
    """The scripts' own error lines."""
    return re.findall(r"^(?:horovodrun|mpirun)\.sh: error: (.*)$", ended.output, re.MULTILINE)


# ---- ranks on hosts

@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory, settings: str) -> Callable[..., str]:
    """(script, ranks) -> the digest of the weights of so many ranks on this machine."""
    found: dict[tuple[str, ...], str] = {}

    def digest(ranks: int, *script: str) -> str:
        if (str(ranks), *script) not in found:
            folder = tmp_path_factory.mktemp("one-host") / "run"
            ended = run_command(1, [*script, "-np", str(ranks), "--", "--config", settings,
                                    "--run_dir", str(folder)], launcher="none")
            found[str(ranks), *script] = finished(ended, folder)["weights_sha256"]
        return found[str(ranks), *script]
    return digest


PAGE = ROOT / "docs" / "cluster.md"
RUN_HERE = ("Two machines", "Network interfaces")
UNTESTED = "# not tested here: "
RUN_BY = re.compile(r"<!-- run by ((tests|docker)/\S+) -->\n$")


def commands(section: str) -> list[str]:
    """The blocks of commands of a section of the page."""
    return re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def test_every_command_of_the_page_is_run_or_marked() -> None:
    for name, text in sections().items():
        assert text.count("```") == 2 * len(commands(text)), f"{name}: blocks begin with ```sh"
        before = text.split("```sh\n")
        for block, above in zip(commands(text), before):
            by = RUN_BY.search(above)
            assert name in RUN_HERE or block.startswith(UNTESTED) or \
                by and (ROOT / by[1]).is_file(), f"{name}: who runs this?\n{block}"


@on_simulated_hosts
def test_the_page_and_two_hosts(tmp_path: Path, settings: str, one_host: Callable[..., str]
                                ) -> None:
    """The commands of the page as they stand, which train as one host does."""
    for name, target in (("launch", ROOT / "launch"), (".venv", BIN.parent),
                         ("my.yaml", Path(settings))):
        (tmp_path / name).symlink_to(target)
    lines = "".join(block for name in RUN_HERE for block in commands(sections()[name])
                    if not block.startswith(UNTESTED))
    ended = shell(2, 'cd "$1" && set -ex; eval "$2"', str(tmp_path), lines)
    assert ended.exit_code == 0 and not ended.leftovers, ended.report()
    here, there = re.findall("^versions .*", ended.output, re.MULTILINE)
    assert here == there
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == lines.count("--run_dir") == 5
    for run in runs:
        assert json.loads((run / "environment.json").read_text())["hosts"] == ["node1", "node2"]
        summary = json.loads((run / "summary.json").read_text())
        assert summary["weights_sha256"] == one_host(2, MPIRUN), run


OWN_NAME = """
own=/run/own-hosts
ssh node3 "sed '/ node3$/d' /etc/hosts >$own; mount --bind $own /etc/hosts"
"$@"
"""


@on_simulated_hosts
@pytest.mark.parametrize("hosts, script", [(3, [HOROVODRUN]), (3, [MPIRUN])])
def test_hosts_train_as_one_host_does(tmp_path: Path, settings: str, hosts: int, script: list[str],
                                      one_host: Callable[..., str]) -> None:
    """One of them does not know its own name."""
    folder = tmp_path / "run"
    (tmp_path / "hosts").write_text("# all\n" + "".join(
        f"node{number} slots=1\n" for number in range(1, hosts + 1)))
    ended = shell(hosts, OWN_NAME, *script, "--hostfile", str(tmp_path / "hosts"), "--interface",
                  "eth0", "--", "--config", settings, "--run_dir", str(folder))
    summary = finished(ended, folder)
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["hosts"] == [f"node{number}" for number in range(1, hosts + 1)]
    assert summary["weights_sha256"] == one_host(hosts, *script)


WATCH = """
while sleep 0.05; do
    for each in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$each; echo; done 2>/dev/null
done >>"$1" &
"${@:2}"
"""


@on_simulated_hosts
@pytest.mark.parametrize("script", [HOROVODRUN, MPIRUN])
def test_only_listed_variables_leave_the_machine(tmp_path: Path, script: str) -> None:
    """No command line of the launch shows the secret, no rank has it, and --env hands on."""
    program = tmp_path / "bin" / "hvdnoise"  # in place of the trainer: says its environment
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$1" = train ] || exec {BIN}/hvdnoise "$@"\n'
                       f"sleep 0.5\nenv >{tmp_path}/$(hostname)\n")
    program.chmod(0o755)
    for name in ("horovodrun", "mpirun"):
        (tmp_path / "bin" / name).symlink_to(BIN / name)
    seen = tmp_path / "seen"
    ended = shell(2, WATCH, str(seen), script, "--hosts", "node1,node2", "--interface", "eth0",
                  "--env", "GREETING", "--",
                  env={"PATH": f"{tmp_path}/bin:{BIN}:{os.environ['PATH']}",
                       "API_TOKEN": SECRET, "GREETING": "hello there",
                       "HVDNOISE_DATASETS": "/some where"})
    assert ended.exit_code == 0, ended.report()
    lines = [line for line in seen.read_text().splitlines() if str(program) in line]
    assert any("node2" in line for line in lines) and SECRET not in seen.read_text()
    for host in ("node1", "node2"):
        variables = (tmp_path / host).read_text()
        assert SECRET not in variables and "API_TOKEN" not in variables
        assert "GREETING=hello there\n" in variables
        assert "HVDNOISE_DATASETS=/some where\n" in variables


# ---- what is wrong with a host

BREAK_HOSTS = """
venv=$1 parent=$2
shift 2
site=$(dirname $(dirname $venv/lib/python3*/site-packages/torch/__init__.py))
torch=$(echo $site/torch-*.dist-info/METADATA)
cd /run/cluster-sim
sed 's/^Version: .*/Version: 1.2.3/' "$torch" >METADATA
ssh-keygen -q -t ed25519 -N '' -f other_key
mkdir empty
# Without its sshd, something else must keep a host up.
ssh node2 'sleep 99 </dev/null >/dev/null 2>&1 & kill $(cat /run/cluster-sim/node2.pid)'
nsenter --net --target $(cat node3.pid) ip link set eth0 down
sed -n 's/^node\\* /node5 /p' known_hosts >rest
echo "node5 $(cat other_key.pub)" >known_hosts
for i in 1 2 3 6 7 8; do sed "s/^node5/node$i/" rest; done >>known_hosts
ssh node6 mount --bind /run/cluster-sim/METADATA "$torch"
ssh node7 mount --bind /run/cluster-sim/empty "$venv/bin"
ssh node8 mount -t tmpfs none "$parent"
cd "$parent/project"
before=$(date +%s%N)
"$@"
status=$?
echo "took $((($(date +%s%N) - before) / 1000000)) ms"
exit $status
"""


@on_simulated_hosts
def test_every_broken_host_is_named_with_its_cure(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    hosts = ",".join(["node1", "nosuchhost", *(f"node{number}" for number in range(2, 9))])
    ended = shell(8, BREAK_HOSTS, str(BIN.parent), str(tmp_path), str(ROOT / MPIRUN), "--hosts",
                  hosts, "--", "--run_dir", "run")
    assert ended.exit_code == 1 and not ended.leftovers, ended.report()
    told = {line.split()[0]: line for line in errors(ended)}
    assert list(told) == hosts.split(",")[1:], ended.report()  # one line for each, in order
    for host, words in {
            "nosuchhost": ["no known host name", "/etc/hosts"],
            "node2": ["refuses connections to port 22", "--ssh-port"],
            "node3": ["does not answer on port 22", "firewall"],
            "node4": ["host key that you do not know", "ssh node4"],
            "node5": ["another host key", "ssh-keygen -R node5"],
            "node6": ["torch 1.2.3 (here ", "launch/setup.sh"],
            "node7": [f"has no {BIN}/hvdnoise", "same path"],
            "node8": [f"has no folder {project}", "same path"]}.items():
        for word in words:
            assert word in told[host], told[host]
    assert len(ended.output.splitlines()) == len(told) + 1, ended.output
    took = re.search(r"took (\d+) ms", ended.output)
    assert took and int(took[1]) < CURED_WITHIN * 1000
    assert not list(project.iterdir())


OWN_DAEMON = """
cd /run/cluster-sim
ssh-keygen -q -t ed25519 -N '' -f id2
sed -e 's/^SetEnv.*//' -e 's/id\\.pub/id2.pub/' sshd_config >sshd2_config
ssh node2 "$(command -v sshd) -f $PWD/sshd2_config -o ListenAddress=10.0.0.2:2222 -o PidFile=none"
ip link add ib0 type veth peer name ib1
cd "$OLDPWD"
hosts='--hosts node1,node2 --interface'
launch/horovodrun.sh $hosts ib0 -- ; echo "exit code $?"
launch/horovodrun.sh $hosts eth0 --ssh-port 2222 -- ; echo "exit code $?"
sed -i '/IdentityFile/d' /run/cluster-sim/ssh_config
launch/mpirun.sh $hosts eth0 --ssh-port 2222 --ssh-identity /run/cluster-sim/id2 -- --config "$1" \\
    --run_dir "$2"; echo "exit code $?"
"""


@on_simulated_hosts
def test_another_port_and_key_and_a_wrong_interface(tmp_path: Path, settings: str) -> None:
    """Also: where ssh sets no PATH on the other host, its programs are found."""
    ended = shell(2, OWN_DAEMON, settings, str(tmp_path / "run"))
    first, second = errors(ended)
    assert first == "node2 has no interface ib0, only eth0 lo; name one that all hosts have: " \
                    "--interface"
    assert second.startswith("node2 takes no key of yours; add it there with ssh-copy-id node2")
    assert re.findall("exit code (.*)", ended.output) == ["1", "1", "0"], ended.report()
    assert (tmp_path / "run" / "summary.json").is_file()


def test_the_check_of_host_keys_stays_as_the_user_has_it(tmp_path: Path) -> None:
    """Horovod's wish to check none is not passed on, and nothing is asked."""
    (tmp_path / "ssh").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
    (tmp_path / "ssh").chmod(0o755)
    ended = launch("launch/bin/ssh", "-o", "PasswordAuthentication=no", "-o",
                   "StrictHostKeyChecking=no", "node2", "true",
                   PATH=f"{ROOT}/launch/bin:{tmp_path}:{os.environ['PATH']}")
    words = ended.stdout.split()
    assert ended.returncode == 7 and "StrictHostKeyChecking=no" not in words, ended
    assert "BatchMode=yes" in words and words[-4:] == ["-o", "PasswordAuthentication=no", "node2",
                                                       "true"]


def test_without_ssh_another_host_is_out_of_reach(tmp_path: Path) -> None:
    for folder in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for program in Path(folder).iterdir():
            if program.name != "ssh" and not (tmp_path / program.name).is_symlink():
                (tmp_path / program.name).symlink_to(program)
    ended = launch(HOROVODRUN, "--hosts", "192.0.2.1:2", "--", PATH=f"{BIN}:{tmp_path}")
    assert ended.returncode == 1
    assert ended.stderr == ("horovodrun.sh: error: 192.0.2.1 is another machine, and there is no "
                            "ssh here; install it (Debian, Ubuntu: apt-get install "
                            "openssh-client)\n")


@on_simulated_hosts
def test_data_missing_on_one_host(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (8, 8)).save(tmp_path / "data" / part / kind / f"{number}.png")
    hide = 'ssh node2 mount -t tmpfs none "$1"; "${@:2}"'
    ended = shell(2, hide, str(tmp_path / "data"), HOROVODRUN, "--hosts", "node1,node2",
                  "--interface", "eth0", "--", "--data.dataset", "imagefolder", "--data.root",
                  str(tmp_path / "data"), "--run_dir", str(tmp_path / "run"), "--model",
                  "resnet18")
    assert ended.exit_code == 2 and not ended.leftovers, ended.report()
    assert "(rank 1 of node2)" in error_lines(ended.output)[0]


# ---- while it runs

def watch(folder: Path, step: int, action: Callable[[], None]) -> threading.Thread:
    """Do ``action`` in a thread once the run has logged ``step``."""
    def wait() -> None:
        until = time.monotonic() + 60
        while steps_logged(folder) < step and time.monotonic() < until:
            time.sleep(0.05)
        action()
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


CUT = """
(
    until [[ -s "$1/metrics.jsonl" ]]; do sleep 0.05; done
    date +%s%N >"$1/cut"
    nsenter --net --target $(cat /run/cluster-sim/node2.pid) ip link set eth0 down
) &
"${@:2}"
status=$?
until ! pgrep -f 'hvdnoise[ ]train' >/dev/null; do sleep 0.1; done
echo "all ranks gone $((($(date +%s%N) - $(cat "$1/cut")) / 1000000)) ms after the cut"
exit $status
"""


@on_simulated_hosts
def test_a_host_that_is_lost_is_named(tmp_path: Path, settings: str) -> None:
    """Under both scripts, at the same time: they mostly wait."""
    def lose(script: str) -> Ended:
        folder = tmp_path / Path(script).stem
        return shell(2, CUT, str(folder), script, "--hosts", "node1,node2", "--interface", "eth0",
                     "--", "--config", settings, "--run_dir", str(folder), "--epochs", "10000",
                     "--checkpoint.every_steps", "0", env={"HVDNOISE_TIMEOUT": "5"})
    with ThreadPoolExecutor() as pool:
        for ended in pool.map(lose, [HOROVODRUN, MPIRUN]):
            assert ended.exit_code == 1 and not ended.leftovers, ended.report()
            assert "node2 does not answer on port 22" in errors(ended)[-1], ended.report()
            gone = re.search(r"all ranks gone (\d+) ms after", ended.output)
            assert gone and int(gone[1]) < CURED_WITHIN * 1000, ended.report()


@on_simulated_hosts
@pytest.mark.parametrize("script", [[HOROVODRUN], [HOROVODRUN, "--mpi"], [MPIRUN]])
def test_sigterm_to_the_script_saves(tmp_path: Path, settings: str, script: list[str]) -> None:
    """Even where no rank is on the host of the script."""
    folder = tmp_path / "run"

    def stop() -> None:
        process = oldest_process(lambda words: str(folder) in words and any(
            word.endswith(script[0]) for word in words[1:2]))
        assert process is not None
        process.terminate()
    watch(folder, 4, stop)
    ended = run_on_hosts(3, [*script, "--hosts", "node2,node3", "--interface", "eth0", "--",
                             "--config", settings, "--run_dir", str(folder), "--epochs", "10000"])
    assert ended.exit_code == 75 and not ended.leftovers, ended.report()
    assert json.loads((folder / "preempted.json").read_text())["step"] >= 4


# ---- bad input

def launch(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(("SLURM_", "OMPI_"))}
    env.update({"PATH": f"{BIN}:{env['PATH']}", **variables})
    return subprocess.run([str(ROOT / script), *arguments], capture_output=True, text=True,
                          timeout=60, env=env, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("arguments, words", [
    (["-np", "2"], ["no --", "hvdnoise train"]),
    (["train"], ["unknown option 'train'", "after --"]),
    (["--hosts", "--"], ["--hosts wants a value"]),
    (["--"], ["neither hosts nor a number of ranks", "-np"]),
    (["-np", "two", "--"], ["-np is 'two'"]),
    (["-np", "0", "--"], ["-np is '0'"]),
    (["-np", "3", "--hosts", "a:1,b:1", "--"], ["too few slots", "-np is 3", "a:1,b:1 have 2"]),
    (["--hosts", "a:1,b:x", "--"], ["'a:1,b:x'", "node1:2,node2:2"]),
    (["--hosts", "a,b:2,a:3", "--"], ["host a is given twice"]),
    (["--hosts", "localhost,b", "--"], ["localhost", "the name by which"]),
    (["--hosts", "a", "--hostfile", "f", "--"], ["both --hosts and --hostfile"]),
    (["--hostfile", "nowhere", "--"], ["'nowhere' cannot be read", "node1 slots=2"]),
    (["--hosts", "a", "--interface", "eth0,eth1", "--"], ["'eth0,eth1'", "one name"]),
    (["--hosts", "a", "--ssh-port", "ssh", "--"], ["--ssh-port is 'ssh'"]),
    (["--hosts", "a", "--ssh-identity", "/nowhere/id", "--"], ["'/nowhere/id'", "private key"]),
    (["-np", "1", "--env", "NOT_SET", "--"], ["'NOT_SET'", "no such variable"]),
    (["-np", "1", "--env", "HOME=x", "--"], ["'HOME=x'", "without its value"]),
])
@pytest.mark.parametrize("script", [HOROVODRUN, MPIRUN])
def test_bad_input_is_one_line(script: str, arguments: list[str], words: Sequence[str]) -> None:
    ended = launch(script, *arguments)
    assert_refused(ended, script, words)


@pytest.mark.parametrize("text, words", [
    ("", ["names no host"]), ("# none\n\n", ["names no host"]),
    ("a slots=2\nb slots\n", ["line 2", "'b slots'", "node1 slots=2"]),
    ("a:2\na slots=1", ["host a is given twice"])])
def test_a_bad_hostfile_is_one_line(tmp_path: Path, text: str, words: Sequence[str]) -> None:
    (tmp_path / "hosts").write_text(text)
    assert_refused(launch(MPIRUN, "--hostfile", str(tmp_path / "hosts"), "--"), MPIRUN, words)


def test_options_of_the_other_script() -> None:
    assert_refused(launch(MPIRUN, "--gloo", "-np", "1", "--"), MPIRUN, ["horovodrun.sh"])
    assert_refused(launch(HOROVODRUN, "-np", "1", "--interface", "10.0.0.0/8", "--"), HOROVODRUN,
                   ["'10.0.0.0/8'", "mpirun.sh"])


# ---- MPICH

HYDRA = "if [ $1 = --version ]; then printf 'HYDRA build:\\n    Version: 4.0.2\\n'; exit; fi"


def programs(folder: Path, **lines: str) -> str:
    """A PATH that begins with these programs."""
    for name, text in lines.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.skipif(os.environ.get("SLURM_JOB_ID") is not None, reason="Slurm knows the hosts")
def test_mpichs_mpirun_gets_options_of_its_own(tmp_path: Path) -> None:
    """What is sent to it; tests/system_mpi.sh trains under the real one."""
    path = programs(tmp_path, mpirun=f'{HYDRA}\nprintf "%s\\n" "$@"; exit 75',
                    hvdnoise="echo versions a=1")
    ended = launch(MPIRUN, "-np", "2", "--interface", "lo", "--ssh-port", "2222", "--",
                   "--config", "x", PATH=path, HVDNOISE_TIMEOUT="60", SECRET="hidden")
    words = ended.stdout.split("\n")
    assert ended.returncode == 75, ended
    given = dict(zip(words, words[1:]))
    assert (given["-np"], given["-hosts"], given["-iface"]) == ("2", "localhost:2", "lo")
    assert given["-launcher-exec"] == str(ROOT / "launch" / "bin" / "ssh")
    sent = given["-genvlist"].split(",")
    assert {"PATH", "HVDNOISE_TIMEOUT", "HVDNOISE_LAUNCH", "UCX_NET_DEVICES"} <= {*sent}
    assert "SECRET" not in sent and not {"-x", "--prefix", "--map-by"} & {*words}
    assert words[-5:] == [str(tmp_path / "hvdnoise"), "train", "--config", "x", ""]


def test_what_mpichs_mpirun_does_not_take(tmp_path: Path) -> None:
    path = programs(tmp_path, mpirun=HYDRA, hvdnoise="echo versions a=1")
    assert_refused(launch(MPIRUN, "-np", "1", "--interface", "10.0.0.0/8", "--", PATH=path),
                   MPIRUN, ["'10.0.0.0/8'", "MPICH's mpirun takes a name"])
    assert_refused(launch(HOROVODRUN, "--mpi", "-np", "1", "--", PATH=path), HOROVODRUN,
                   ["does not know MPICH's mpirun", "launch/mpirun.sh"])


@pytest.mark.parametrize("script", [[MPIRUN], [HOROVODRUN, "--mpi"]])
def test_a_mixture_of_mpis_is_refused(tmp_path: Path, script: list[str]) -> None:
    """As the doctor says it, see tests/unit/test_doctor.py."""
    path = programs(
        tmp_path, mpirun="echo 'mpirun (Open MPI) 4.1.4'",
        hvdnoise="echo versions mpi=none mpi-of-Horovod=MPICH-4.0.2 mpi-of-mpirun=Open-MPI-4.1.4")
    ended = launch(*script, "-np", "2", "--", PATH=path, OMPI_ALLOW_RUN_AS_ROOT="1",
                   OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended
    assert "a mixture of MPIs (Horovod has MPICH-4.0.2,mpirun has Open-MPI-4.1.4)" in ended.stderr
    assert "first on the PATH" in ended.stderr and "--mpi system" in ended.stderr


def assert_refused(ended: subprocess.CompletedProcess[str], script: str, words: Sequence[str]
                   ) -> None:
    assert ended.returncode == 2 and not ended.stdout, ended
    assert ended.stderr.count("\n") == 1, ended
    assert ended.stderr.startswith(f"{Path(script).name}: error: "), ended
    for word in words:
        assert word in ended.stderr, ended
