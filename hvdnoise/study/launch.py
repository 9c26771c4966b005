"""How the runs of a study are started: command lines, places, several at once."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Callable, Sequence

from hvdnoise.planning import lines
from hvdnoise.planning.config import PlanConfig
from hvdnoise.study.config import StudyConfig
from hvdnoise.supervise import guard
from hvdnoise.training.config import ConfigError

_TRAIN = [sys.executable, "-m", "hvdnoise", "train"]
_NO_RANK = ["env", "-u", "SLURM_STEP_ID"]  # or a process takes a task's number for its rank
POLL_SECONDS = 0.1
MARK = "$ "  # begins the line of a log that has the command


def in_slurm(config: StudyConfig) -> bool:
    """Whether each run is a task of a Slurm job.

    Raises:
        ConfigError: where it is to be one, and there is no job.
    """
    job = bool(os.environ.get("SLURM_JOB_ID"))
    if (config.slurm == "yes" or config.launcher == "srun") and not job:
        name, value = ("slurm", "yes") if config.slurm == "yes" else ("launcher", "srun")
        raise ConfigError(f"{name}={value} is wrong: this is no Slurm job; submit it by sbatch, or "
                          "leave it out")
    return job and config.slurm != "no"


def command(config: StudyConfig, flags: Sequence[str], run_folder: Path) -> list[str]:
    """What is started for a run, below its guard."""
    options, slurm = list(config.launcher_options), in_slurm(config)
    train = [*_TRAIN, *flags]
    if config.launcher == "srun":
        return ["srun", "--exact", f"--ntasks={config.ranks}",
                f"--cpus-per-task={config.threads}", *options, *train]
    if config.ranks > 1:
        started = _local(config, [] if slurm else options)
        train = [*started, *train]
    if not slurm:
        return train
    # One task holds all ranks of the run, so that the launcher needs no help of Slurm's.
    task = ["srun", "--exact", "--nodes=1", "--ntasks=1", "--mpi=none",
            f"--cpus-per-task={config.ranks * config.threads}", *options]
    return [*task, *guard.COMMAND, str(run_folder), *_NO_RANK, *train]


def _local(config: StudyConfig, options: Sequence[str]) -> list[str]:
    """The launcher of several ranks on this machine, as `hvdnoise plan` writes it."""
    plan = PlanConfig(ranks_per_host=config.ranks)
    line = {"mpirun": lines.mpirun, "torchrun": lines.torchrun}.get(config.launcher,
                                                                    lines.horovodrun)
    whole = line(plan, [])
    program, *words = whole[:-len(lines.train([]))]
    beside = Path(sys.executable).with_name(program)
    here = ["--disable-cache", "--network-interface", "lo"] if line is lines.horovodrun else []
    return [str(beside) if beside.exists() else program, *words, *here, *options]


def environment(config: StudyConfig, gpus: Sequence[str]) -> dict[str, str]:
    """The variables of a run; ``gpus``: those that it gets; none: what is there."""
    found = {**os.environ, "OMP_NUM_THREADS": str(config.threads), "PYTHONUNBUFFERED": "1"}
    if not in_slurm(config):
        found = {name: value for name, value in found.items()
                 if not name.startswith("SLURM_") or config.launcher == "mpirun"}
    if gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return found


def visible_gpus(device: str) -> list[str]:
    """The GPUs that runs can be given; none where they train on the CPU."""
    if device == "cpu":
        return []
    import torch
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def places(config: StudyConfig, gpus: Sequence[str]) -> list[list[str]]:
    """For each run at the same time the GPUs that it gets.

    Raises:
        ConfigError: where there is no Slurm job that is asked for.
    """
    ranks = config.ranks
    if in_slurm(config):
        tasks = int(os.environ.get("SLURM_NTASKS", "1"))
        fit = tasks // ranks if config.launcher == "srun" else tasks
        gpus = []  # Slurm gives each task its own
    elif gpus:
        fit = len(gpus) // ranks
    else:
        fit = len(os.sched_getaffinity(0)) // (ranks * config.threads)
    jobs = max(1, fit) if config.jobs == "auto" else config.jobs
    return [[gpus[(job * ranks + rank) % len(gpus)] for rank in range(min(ranks, len(gpus)))]
            if gpus else [] for job in range(jobs)]


@dataclass
class Started:
    """A run under its guard."""

    process: subprocess.Popen[bytes]

    def ask(self) -> None:
        """The run saves and ends."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def end(self) -> None:
        """Kill all of it, and wait for that."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()


def start(words: Sequence[str], *, run_folder: Path, log: Path, env: dict[str, str], lock: int
          ) -> Started:
    """Start a run; what it says is added to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"{MARK}{shlex.join(words)}\n".encode())
        output.flush()
        return start_guarded(words, run_folder=run_folder, env=env, output=output, keep=(lock,))


def start_guarded(words: Sequence[str], *, run_folder: Path, env: dict[str, str],
                  output: IO[bytes] | None = None, keep: Sequence[int] = ()) -> Started:
    """Start a run under its guard.

    Args:
        output: where it writes; default: where this process does.
        keep: descriptors that the guard inherits.
    """
    return Started(subprocess.Popen(
        [*guard.COMMAND, str(run_folder), *words], stdin=subprocess.PIPE, stdout=output,
        stderr=output, env=env, pass_fds=keep, start_new_session=True))


def wait_all(started: Sequence[Started], impatient: Callable[[], bool]) -> None:
    """Wait until all have ended; kill them once it is asked for."""
    while any(each.process.poll() is None for each in started):
        if impatient():
            break
        time.sleep(POLL_SECONDS)
    for each in started:
        each.end()
