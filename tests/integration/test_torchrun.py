"""Runs under torchrun, on one host and two: they train as Horovod's do, end together, and go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import psutil
import pytest

from tests.checks import run_batch
from tests.cluster import on_hosts, run_on_hosts, why_not
from tests.integration.running import (
    HVDNOISE,
    TINY,
    at_step,
    error_lines,
    finished,
    hvdnoise,
    rank_pid,
    signal_ranks,
)
from tests.launcher import BIN, ROOT, Ended, run_command
from tests.rank_main import load

END_SECONDS = 30.0  # in which the others end after a rank that was killed
IMPORT_SECONDS = 0.2  # that hvdnoise's import may take beside torch's
WITHOUT_HOROVOD = """
import importlib.machinery as machinery
real = machinery.PathFinder.find_spec
hidden = "horovod", "mpi4py"
machinery.PathFinder.find_spec = lambda name, *rest: \\
    None if name.partition(".")[0] in hidden else real(name, *rest)
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "long.yaml"
    path.write_text(TINY.replace("epochs: 2", "epochs: 8"))  # on 2 ranks 48 steps, 6 an epoch
    return path


@pytest.fixture(scope="module")
def without_horovod(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that find neither Horovod nor mpi4py."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(WITHOUT_HOROVOD)
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": os.pathsep.join(paths)}
    tried = subprocess.run([sys.executable, "-c", "import horovod"], env={**os.environ, **env},
                           capture_output=True, text=True)
    assert "No module named 'horovod'" in tried.stderr
    return env


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, settings: Path,
          without_horovod: dict[str, str]) -> Callable[[int], str]:
    """The digest of the weights of the run of so many ranks that nobody touched."""
    found: dict[int, str] = {}

    def digest(ranks: int) -> str:
        if ranks not in found:
            folder = tmp_path_factory.mktemp("whole") / "run"
            found[ranks] = finished(train(ranks, folder, settings, env=without_horovod),
                                    folder)["weights_sha256"]
        return found[ranks]
    return digest


def train(ranks: int, folder: Path, settings: Path, *flags: str, **options: Any) -> Ended:
    return hvdnoise(ranks, "train", "--config", str(settings), "--run_dir", str(folder),
                    "--log_every", "1", *flags, **{"launcher": "torchrun", **options})


def noted(times: list[float], action: Callable[[], None]) -> Callable[[], None]:
    def act() -> None:
        times.append(time.monotonic())
        action()
    return act


def test_it_trains_without_horovod_as_horovod_does_on_two_ranks(
        tmp_path: Path, settings: Path, whole: Callable[[int], str]) -> None:
    """Not promised; but a sum of two has one order."""
    under_horovod = train(2, tmp_path / "run", settings, launcher="gloo")
    assert finished(under_horovod, tmp_path / "run")["weights_sha256"] == whole(2)


def test_the_command_of_the_page(tmp_path: Path) -> None:
    """With fewer examples."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    [line] = re.findall(r"^torchrun --nproc-per-node 2 .*", page, re.MULTILINE)
    words = [*line.split(), "--data.dataset", "synthetic", "--data.num_examples", "1024",
             "--data.validation", "256", "--epochs", "1", "--run_dir", str(tmp_path / "run")]
    summary = finished(run_command(1, words, launcher="none"), tmp_path / "run")
    assert summary["ranks"] == 2 and json.loads(
        (tmp_path / "run" / "environment.json").read_text())["transport"] == "torch"


LOOP = """
import torch, torch.distributed, hvdnoise
torch.seed()  # another on each rank
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
{block}
for step in range(5):
    optimizer.zero_grad()
    model(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()
print("weights", [float(p.detach().double().sum()) for p in model.parameters()])
print("steps with noise", optimizer.noise_coverage.due - optimizer.noise_coverage.missed)
"""


def test_the_loop_of_the_page(tmp_path: Path, without_horovod: dict[str, str]) -> None:
    page = (ROOT / "docs" / "launchers.md").read_text()
    [block] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    program = tmp_path / "loop.py"
    program.write_text(LOOP.format(block=block))
    ended = run_command(2, [sys.executable, str(program)], launcher="torchrun", timeout=60,
                        env=without_horovod)
    assert ended.exit_code == 0 and not ended.leftovers, ended.report()
    seen = re.findall(r"weights (\[[^]]*\])", ended.output)
    assert len(seen) == 2 and seen[0] == seen[1], ended.report()
    assert len(re.findall("steps with noise 4", ended.output)) == 2


def test_one_process_needs_neither_horovod_nor_torchrun(
        tmp_path: Path, settings: Path, without_horovod: dict[str, str]) -> None:
    ended = train(1, tmp_path / "run", settings, "--epochs", "1", env=without_horovod)
    assert finished(ended, tmp_path / "run")["ranks"] == 1


def test_a_launcher_of_horovods_without_horovod_is_refused(
        tmp_path: Path, settings: Path, without_horovod: dict[str, str]) -> None:
    command = [HVDNOISE, "train", "--config", str(settings), "--run_dir", str(tmp_path / "run")]
    ended = run_command(1, command, launcher="mpirun", env=without_horovod)
    assert ended.exit_code == 2 and not (tmp_path / "run").exists(), ended.report()
    assert "Horovod is not installed: start the ranks with torchrun" in \
        error_lines(ended.output)[0]


def test_bad_input_and_what_needs_horovod() -> None:
    """torchrun makes every exit code 1, and says which one it was."""
    for arguments, said in ((["train", "--epochs", "-1"], "epochs=-1"),
                            (["bench"], "start with horovodrun or mpirun")):
        ended = hvdnoise(2, *arguments, launcher="torchrun")
        assert ended.exit_code == 1 and "exitcode  : 2 " in ended.output, ended.report()
        assert said in error_lines(ended.output)[0]


@pytest.mark.parametrize("ranks, killed", [(2, 0), (4, 3)])
def test_a_killed_rank_ends_the_rest_and_the_run_goes_on(
        tmp_path: Path, settings: Path, whole: Callable[[int], str], ranks: int, killed: int
        ) -> None:
    folder, times = tmp_path / "run", list[float]()
    at_step(folder, 8, noted(times, signal_ranks(folder, signal.SIGKILL, killed)))
    ended = train(ranks, folder, settings)
    assert ended.exit_code == 1 and not ended.leftovers, ended.report()
    assert time.monotonic() - times[0] < END_SECONDS, ended.report()
    assert f"rank {killed} is gone" in ended.output, ended.report()
    again = finished(train(ranks, folder, settings, "--resume", "auto"), folder)
    assert again["weights_sha256"] == whole(ranks)


def test_sigterm_to_a_rank_is_agreed_on_saved_and_resumed(
        tmp_path: Path, settings: Path, whole: Callable[[int], str]) -> None:
    folder = tmp_path / "run"
    at_step(folder, 8, signal_ranks(folder, signal.SIGTERM, 1))
    ended = train(2, folder, settings, "--checkpoint.every_steps", "0")
    assert ended.exit_code == 1 and "exitcode  : 75 " in ended.output, ended.report()
    assert not ended.leftovers and "SIGTERM: saved at step" in ended.output
    assert json.loads((folder / "preempted.json").read_text())["step"] >= 8
    again = finished(train(2, folder, settings, "--resume", "auto"), folder)
    assert again["weights_sha256"] == whole(2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_torchrun_saves(tmp_path: Path, settings: Path, number: signal.Signals
                                    ) -> None:
    """torchrun hands SIGTERM on; when it is gone itself, the ranks notice."""
    folder = tmp_path / "run"

    def stop() -> None:
        psutil.Process(rank_pid(folder, 0)).parent().send_signal(number)
    at_step(folder, 8, stop)
    command = [HVDNOISE, "train", "--config", str(settings), "--run_dir", str(folder),
               "--log_every", "1", "--epochs", "1000"]
    ended = run_command(2, command, launcher="torchrun", grace=END_SECONDS)
    assert ended.exit_code not in (0, None) and not ended.leftovers, ended.report()
    assert (folder / "preempted.json").exists(), ended.report()


# ---- two hosts

ON_TWO_HOSTS = r"""
per_host=$1 folder=$2 kill=$3
shift 3
start() { # node rank
    printf '%q ' env PATH="$PATH" PYTHONPATH="$PYTHONPATH" OMP_NUM_THREADS=1 \
        HVDNOISE_TEST_LAUNCH="$HVDNOISE_TEST_LAUNCH" GLOO_SOCKET_IFNAME=eth0 \
        torchrun --nnodes 2 --node-rank "$1" --master-addr node1 \
        --nproc-per-node "$per_host" -m hvdnoise train "${@:2}"
}
on_node2='cd "$1/logs"
until grep -q "\"step\": 8" ../metrics.jsonl; do sleep 0.02; done
last=$(printf "%s\n" rank-*.log | sort -V | tail -n 1)
kill -KILL "$(grep -o "rank [0-9]*, process [0-9]*" "$last" | tail -n 1 | grep -o "[0-9]*$")"
date +%s.%N >"$1.killed"'
kill_last() { # its log has the number that it has on its host
    until [[ -e $folder/logs ]]; do sleep 0.1; done
    ssh node2 "$(printf '%q ' bash -c "$on_node2" bash "$folder")" 2>/dev/null
}
[[ -z $kill ]] || kill_last &
ssh node2 "$(start 1 "$@")" &
eval "$(start 0 "$@")"
status=$?
wait $! || status=$?
exit "$status"
"""


@pytest.mark.namespaces
@pytest.mark.parametrize("ranks", [4])
def test_two_hosts(tmp_path: Path, settings: Path, whole: Callable[[int], str], ranks: int) -> None:
    """They train as one host does; and a rank that is killed on one ends all on both."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path / "run"

    def run(kill: str) -> Ended:
        return run_on_hosts(2, [
            "bash", "-uo", "pipefail", "-c", ON_TWO_HOSTS, "bash", str(ranks // 2), str(folder),
            kill, "--config", str(settings), "--run_dir", str(folder), "--log_every", "1",
            "--resume", "auto"], timeout=120)
    ended = run("kill")
    killed = float((tmp_path / "run.killed").read_text())
    assert ended.exit_code not in (0, None) and not ended.leftovers, ended.report()
    assert time.time() - killed < END_SECONDS, ended.report()
    ended = run("")
    assert finished(ended, folder)["weights_sha256"] == whole(ranks)
    hosts = json.loads((folder / "environment.json").read_text())["hosts"]
    assert hosts == ["node1"] * (ranks // 2) + ["node2"] * (ranks // 2)


@pytest.mark.namespaces
@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_noise.py", "test_plans.py"])
def test_the_laws_of_every_noise_and_plan_on_two_hosts(file: str) -> None:
    """What holds on one host, with two ranks on each of two."""
    if reason := why_not():
        pytest.skip(reason)
    module = load(str(ROOT / "tests" / "parallel" / file))
    names = [name for name, each in vars(module).items() if name.startswith("check_")
             and "torchrun-4" in getattr(each, "worlds", module.WORLDS)]
    reports = run_batch(str(module.__file__), on_hosts(2, "torchrun", slots=2), 4, names, 60)
    assert len(names) > 5 and reports == dict.fromkeys(names, ""), reports


# ---- the import

def test_the_import_is_short_and_brings_neither_horovod_nor_mpi4py() -> None:
    program = ("import time, torch; began = time.process_time(); import hvdnoise, sys;"
               "print(time.process_time() - began, 'horovod' in sys.modules,"
               "'mpi4py' in sys.modules)")
    seen = [subprocess.run([str(BIN / "python"), "-c", program], cwd=ROOT, check=True,
                           capture_output=True, text=True).stdout.split() for _ in range(3)]
    assert all(each[1:] == ["False", "False"] for each in seen)
    assert min(float(each[0]) for each in seen) < IMPORT_SECONDS, seen
