"""Start real ranks under a real launcher, bounded in time, and leave no process behind.

    results = launch(2, "tests.parallel.tasks:train", args=(3,), launcher="gloo")

runs ``train(3)`` in two ranks and returns what each returned (JSON values, or tensors in plain
containers). `attempt` is the same without the verdict, for tests of ranks that fail; `run_command`
does it for any command. Every process of a launch carries a marker in its environment, by which
it is found and killed wherever it hides: a process that outlives its launcher fails the test.
"""

from __future__ import annotations

import getpass
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import psutil

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
MARKER = "HVDNOISE_TEST_LAUNCH"
LEFTOVER_SECONDS = 5.0  # what processes have to be gone in once the launcher has ended
TAIL = 4000

_HOROVODRUN = [sys.executable, str(ROOT / "tests" / "horovodrun.py"), "--disable-cache",
               "--network-interface", "lo"]
LAUNCHERS = {"none": [], "gloo": [*_HOROVODRUN, "--gloo"], "mpi": [*_HOROVODRUN, "--mpi"],
             "mpirun": [str(BIN / "mpirun")],
             "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--no-python"]}

_SETTINGS = {
    "OMP_NUM_THREADS": "1", "HOROVOD_GLOO_IFACE": "lo", "PYTHONUNBUFFERED": "1",
    "OMPI_MCA_btl": "self,vader,tcp", "OMPI_MCA_btl_tcp_if_include": "lo",
    "OMPI_MCA_oob_tcp_if_include": "lo", "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none"}
_INHERITED_FROM_A_LAUNCHER = ("HOROVOD_", "OMPI_", "PMIX_", "PMI_", "SLURM_", "TORCHELASTIC_",
                              "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")


class LaunchFailed(AssertionError):
    """A launch that raised, hung, died, or left a process behind."""


@dataclass
class Ended:
    """How a launch ended, whatever the way."""

    exit_code: int | None            # of the launcher; None: killed at the time limit
    seconds: float
    output: str                      # the launcher's
    leftovers: list[str] = field(default_factory=list)       # "pid command", killed since
    results: dict[int, Any] = field(default_factory=dict)    # by rank
    errors: dict[int, str] = field(default_factory=dict)     # tracebacks by rank
    logs: dict[int, str] = field(default_factory=dict)       # what each rank printed

    def verdict(self) -> str:
        """One line on what went wrong; empty when nothing did."""
        reasons = [f"rank {rank} raised {text.strip().splitlines()[-1]}"
                   for rank, text in sorted(self.errors.items())]
        if self.exit_code is None:
            reasons.append(f"killed at its time limit after {self.seconds:.1f} s")
        elif self.exit_code:
            reasons.append(f"exit code {self.exit_code} after {self.seconds:.1f} s")
        reasons += [f"left a process behind: {each}" for each in self.leftovers]
        return "; ".join(reasons)

    def report(self) -> str:
        tails = [f"--- rank {rank}:\n{text[-TAIL:]}" for rank, text in sorted(self.logs.items())]
        return "\n".join([self.verdict(), *tails, f"--- launcher:\n{self.output[-TAIL:]}"])


def launch(np: int, target: str, *, launcher: str = "gloo", args: Sequence[Any] = (),
           timeout: float = 120, env: Mapping[str, str] | None = None) -> list[Any]:
    """The results of ``target`` on ``np`` ranks, in rank order; any failure is a LaunchFailed.

    ``target``: "module:function" or "path.py:function"; ``args``: JSON values.
    """
    ended = attempt(np, target, launcher=launcher, args=args, timeout=timeout, env=env)
    missing = sorted(set(range(np)) - set(ended.results))
    if ended.verdict() or missing:
        raise LaunchFailed(f"{target} on {np} ranks under {launcher}, no result from ranks "
                           f"{missing}: {ended.report()}")
    return [ended.results[rank] for rank in range(np)]


def attempt(np: int, target: str, *, launcher: str = "gloo", args: Sequence[Any] = (),
            timeout: float = 120, env: Mapping[str, str] | None = None) -> Ended:
    """`launch` without the verdict."""
    module, function = target.rsplit(":", 1)
    with tempfile.TemporaryDirectory(prefix="hvdnoise-launch-") as name:
        folder = Path(name)
        call = {"module": module, "function": function, "args": list(args),
                "deadline": time.time() + timeout}
        (folder / "call.json").write_text(json.dumps(call))
        command = [sys.executable, str(ROOT / "tests" / "rank_main.py"), name]
        ended = run_command(np, command, launcher=launcher, timeout=timeout, env=env)
        for rank in range(np):
            _collect(ended, folder / f"rank-{rank}", rank)
    return ended


def _collect(ended: Ended, stem: Path, rank: int) -> None:
    log = stem.with_suffix(".log")
    ended.logs[rank] = log.read_text(errors="replace") if log.exists() else "(never started)"
    if stem.with_suffix(".error").exists():
        ended.errors[rank] = stem.with_suffix(".error").read_text()
    if stem.with_suffix(".json").exists():
        ended.results[rank] = json.loads(stem.with_suffix(".json").read_text())
    elif stem.with_suffix(".pt").exists():
        import torch
        ended.results[rank] = torch.load(stem.with_suffix(".pt"), weights_only=True)


def run_command(np: int, command: Sequence[str], *, launcher: str = "gloo", timeout: float = 120,
                env: Mapping[str, str] | None = None, cwd: Path = ROOT,
                grace: float = LEFTOVER_SECONDS) -> Ended:
    """Run ``command`` on ``np`` ranks, and see to it that nothing of it is left.

    Args:
        grace: seconds that processes have to be gone in once the launcher has ended.
    """
    if launcher == "none" and np != 1:
        raise ValueError(f"np={np}: without a launcher there is one rank")
    number = "--nproc-per-node" if launcher == "torchrun" else "-np"
    prefix = [*LAUNCHERS[launcher], number, str(np)] if launcher != "none" else []
    mark = f"{MARKER}={uuid.uuid4().hex}"
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([*prefix, *command], env=_environment(mark, env), cwd=cwd,
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   start_new_session=True)
        exit_code = None
        try:
            exit_code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also when pytest itself is interrupted
            ended_after = time.monotonic() - started
            leftovers = _end_all(mark, grace if exit_code is not None else 0.0)
            process.wait(10)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ended(exit_code, ended_after, text, leftovers if exit_code is not None else [])


def _environment(mark: str, extra: Mapping[str, str] | None) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(_INHERITED_FROM_A_LAUNCHER)}
    env.update(_SETTINGS, PATH=f"{BIN}{os.pathsep}{env.get('PATH', '')}")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    if getpass.getuser() == "root":
        env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return env | {MARKER: mark.removeprefix(f"{MARKER}=")} | dict(extra or {})


def processes_of(mark: str) -> dict[int, str]:
    """Pid and command line of every process whose environment holds ``mark``."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").strip()
                    found[int(entry.name)] = command.decode(errors="replace")[:200]
            except OSError:  # ended meanwhile, or another user's
                continue
    return found


def oldest_process(matches: Callable[[list[str]], bool]) -> psutil.Process | None:
    """The first started of those whose command line matches: a subshell has that of its shell,
    and may have the smaller number, as numbers begin anew at the greatest."""
    found = [each for each in psutil.process_iter(["cmdline", "create_time"])
             if matches(each.info["cmdline"] or [])]
    return min(found, key=lambda each: float(each.info["create_time"]), default=None)


def _end_all(mark: str, grace: float) -> list[str]:
    """Give the processes ``grace`` seconds to end, then kill them; returns those it had to kill."""
    until = time.monotonic() + grace
    while (left := processes_of(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    killed = [f"{pid} {command}" for pid, command in sorted(left.items())]
    for _ in range(200):  # again and again: a process may be born while others are killed
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if not (left := processes_of(mark)):
            break
        time.sleep(0.05)
    return killed
