"""launch/slurm.sbatch in a real Slurm: stopped in every way, a run ends in the same bits."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Iterator

import pytest

from tests.integration.running import HVDNOISE, TINY, finished, hvdnoise, steps_logged
from tests.launcher import ROOT
from tests.slurm import Slurm, told, why_not

pytestmark = [pytest.mark.parallel, pytest.mark.namespaces, pytest.mark.slurm]
SBATCH = str(ROOT / "launch" / "slurm.sbatch")
TASKS = ("--nodes=2", "--ntasks=2")
# Open MPI's mpirun ends so many seconds x 4 after the first rank with another exit code than 0.
HOME = {"HVDNOISE_HOME": str(ROOT), "OMPI_MCA_odls_base_sigkill_timeout": "2"}
SOON = HOME | {"OMPI_MCA_odls_base_sigkill_timeout": "1"}
STEPS = 96  # some seconds on a fast machine: it is not over before it is preempted
STUDY = """
settings: {data: {dataset: synthetic, num_examples: 192, image_size: 8}, model: resnet20,
           epochs: 4, log_every: 1, spectrum_every: 0, checkpoint: {every_steps: 2}}
batches: [16]
virtual_workers: 2
seeds: 1
baseline: plain
search: {optim.lr: [0.05]}
methods: {plain: {}, gnc: {settings: {noise: {kind: gnc, source: own, radius: 0.05}}}}
"""
COMMAND = """\
sbatch --nodes=2 --ntasks-per-node=1 --time=8:00:00 launch/slurm.sbatch -- \\
    --config my.yaml --run_dir runs/first
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if reason := why_not():
        pytest.skip(reason)
    with Slurm() as slurm:
        yield slurm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to submit from, with the settings of a short and of an endless run."""
    folder = tmp_path / "my project"
    folder.mkdir()
    settings = TINY.replace("small-cnn", "resnet20").replace("every_steps: 5", "every_steps: 0")
    settings = settings.replace("log_every: 2", "log_every: 1")
    (folder / "my.yaml").write_text(settings.replace("epochs: 2", "epochs: 16"))
    (folder / "endless.yaml").write_text(settings.replace("epochs: 2", "epochs: 100000"))
    return folder


def at_step(run: Path, step: int, output: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while steps_logged(run) < step:
        assert time.monotonic() < until, f"not at step {step} in {seconds} s: {told(output)}"
        time.sleep(0.02)


def preempted_at(run: Path) -> int:
    step: int = json.loads((run / "preempted.json").read_text())["step"]
    return step


def test_a_preempted_job_goes_on_to_the_same_bits(slurm: Slurm, folder: Path) -> None:
    """Submitted as docs/cluster.md says it."""
    (folder / "launch").symlink_to(ROOT / "launch")
    submitted = slurm.run("bash", "-c", COMMAND, cwd=folder, **HOME | {"HVDNOISE_HOME": ""})
    assert submitted.returncode == 0, submitted
    job = submitted.stdout.split()[-1]
    run, output = folder / "runs" / "first", folder / f"slurm-{job}.out"
    at_step(run, 3, output)
    high = slurm.submit("--partition=high", *TASKS, "--output=high.txt", "--wrap=srun hostname",
                        cwd=folder)
    slurm.wait_for(high, "COMPLETED")
    assert told(folder / "high.txt").split() in (["node1", "node2"], ["node2", "node1"])
    stopped = preempted_at(run)
    assert 3 <= stopped < STEPS
    slurm.wait_for(job, "COMPLETED", restarts=1)
    printed = told(output)
    assert slurm.job(job)["Restarts"] == "1" and f"resumed at step {stopped}" in \
        (run / "logs" / "rank-0.log").read_text(), printed
    assert printed.count("slurm.sbatch: stopped with 75: back into the queue") == 1, printed
    alone = folder / "alone"
    ended = hvdnoise(2, "train", "--config", "my.yaml", "--run_dir", str(alone), cwd=folder,
                     launcher="mpirun")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["weights_sha256"] == finished(ended, alone)["weights_sha256"]


def test_the_time_limit_and_then_the_user_end_a_job(slurm: Slurm, folder: Path) -> None:
    """Before its time is over it saves and goes on later; cancelled, it saves and is over."""
    output = folder / "out.txt"
    job = slurm.submit(*TASKS, "--time=1", "--signal=B:TERM@35", "--output=out.txt", SBATCH, "--",
                       "--config", "endless.yaml", cwd=folder, **HOME)
    run = folder / "runs" / f"slurm-{job}"
    at_step(run, 1, output)
    slurm.wait_for(job, "RUNNING", restarts=1)
    assert "DUE TO TIME LIMIT" not in told(output) and "back into the queue" in told(output)
    stopped = preempted_at(run)
    at_step(run, stopped + 3, output)
    assert slurm.run("scancel", job).returncode == 0
    slurm.wait_for(job, "CANCELLED", restarts=1)
    until = time.monotonic() + 30
    while slurm.run("squeue", "--noheader", f"--jobs={job}").stdout.strip():
        assert time.monotonic() < until, told(output)
        time.sleep(0.2)
    assert preempted_at(run) > stopped
    assert slurm.job(job)["Restarts"] == "1" and told(output).count("back into the queue") == 1


def test_a_job_that_slurm_does_not_take_back_says_so(slurm: Slurm, folder: Path) -> None:
    """Here as `hvdnoise plan` writes it."""
    output = folder / "out.txt"
    arguments = ["--config", "endless.yaml", "--run_dir", "the run"]
    planned = hvdnoise(1, "plan", *arguments, "--hosts", "2", "--write", "planned", cwd=folder)
    assert planned.exit_code == 0, planned.report()
    job = slurm.submit("--no-requeue", "--output=out.txt", "planned/job.sbatch", cwd=folder, **SOON)
    at_step(folder / "the run", 3, output)
    assert slurm.run("scancel", "--batch", "--signal=TERM", job).returncode == 0
    assert slurm.wait_for(job, "FAILED")["ExitCode"] == "75:0"
    last = told(output).splitlines()[-1]
    assert "does not take the job back" in last and "--resume auto" in last
    assert preempted_at(folder / "the run") >= 3


def test_a_job_stopped_before_it_trains_is_not_lost(slurm: Slurm, folder: Path) -> None:
    job = slurm.submit(*TASKS, "--output=out.txt", SBATCH, "--", "--config", "endless.yaml",
                       cwd=folder, **SOON)
    slurm.wait_for(job, "RUNNING")
    until = time.monotonic() + 30
    while not slurm.run("squeue", "--steps", "--noheader", f"--jobs={job}").stdout.strip():
        assert time.monotonic() < until, told(folder / "out.txt")
    assert slurm.run("scancel", "--batch", "--signal=TERM", job).returncode == 0
    slurm.wait_for(job, "PENDING", restarts=1)
    slurm.run("scancel", job)


def test_the_page_has_the_command_that_is_tested() -> None:
    assert f"```sh\n{COMMAND}```" in (ROOT / "docs" / "cluster.md").read_text()


# ------------------------------------------------------------------ bad input


def refused(slurm: Slurm, folder: Path, *arguments: str, **variables: str) -> str:
    """What a job printed that ended with exit code 2, was not queued again and left nothing."""
    job = slurm.submit(*TASKS, "--output=../out.txt", SBATCH, *arguments, cwd=folder, **variables)
    state = slurm.wait_for(job, "FAILED")
    assert state["ExitCode"] == "2:0" and state["Restarts"] == "0", state
    assert sorted(each.name for each in folder.iterdir()) == ["endless.yaml", "my.yaml"]
    return told(folder.parent / "out.txt")


def test_bad_settings_end_the_job(slurm: Slurm, folder: Path) -> None:
    printed = refused(slurm, folder, "--", "--config", "endless.yaml", "--epochs", "many", **SOON)
    assert "hvdnoise: error: epochs=many is wrong" in printed


@pytest.mark.parametrize("arguments, home, words", [
    (["--", "--config", "endless.yaml"], "", ["no launch/mpirun.sh in ", "HVDNOISE_HOME="]),
    (["--config", "endless.yaml"], str(ROOT), ["no --; "]),
    (["--hots", "node1", "--", "--config", "endless.yaml"], str(ROOT), ["'--hots'", "--help"])])
def test_what_cannot_start_says_why(slurm: Slurm, folder: Path, arguments: list[str], home: str,
                                    words: list[str]) -> None:
    printed = refused(slurm, folder, *arguments, **SOON | {"HVDNOISE_HOME": home})
    assert printed.count("\n") == 1 and "error: " in printed
    assert all(word in printed for word in words), printed


def test_outside_of_slurm_it_says_how_to_submit() -> None:
    ended = subprocess.run([SBATCH, "--", "--config", "x.yaml"], capture_output=True, text=True,
                           timeout=30, env={"PATH": "/usr/bin:/bin"})
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "sbatch launch/slurm.sbatch --" in ended.stderr


def test_a_study_gives_each_run_a_task(slurm: Slurm, folder: Path) -> None:
    """Killed in the middle it leaves no task behind, and a second job goes on."""
    (folder / "study.yaml").write_text(STUDY)
    options = ("--nodes=2", "--ntasks=2", "--output=out.txt", "--open-mode=append",
               f"--wrap=exec {HVDNOISE} study study.yaml")
    runs, output = folder / "studies" / "study" / "runs", folder / "out.txt"
    job = slurm.submit(*options, cwd=folder, **HOME)
    at_step(runs / "plain" / "b16" / "final-seed-1", 3, output)
    at_step(runs / "gnc" / "b16" / "final-seed-1", 3, output)  # both at once
    study = int((folder / "studies/study/.lock").read_text().split()[0])
    assert slurm.run("kill", "-KILL", str(study)).returncode == 0
    slurm.wait_for(job, "FAILED")
    assert slurm.run("squeue", "--noheader", "--steps").stdout == "", told(output)
    again = slurm.submit(*options, cwd=folder, **HOME)
    slurm.wait_for(again, "COMPLETED")
    found = json.loads((folder / "studies/study/results.json").read_text())
    assert found["state"] == "complete" and found["runs"]["finished"] == 2, told(output)
    hosts = [json.loads(path.read_text())["hosts"] for path in runs.glob("*/*/*/environment.json")]
    assert sorted(hosts) == [["node1"], ["node2"]]
