"""Real ranks that are stopped, hang, fail or lose their launcher: all end, and say who and why."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.running import TINY, at_step, rank_pid, steps_logged
from tests.launcher import BIN, ROOT, Ended, run_command

pytestmark = pytest.mark.parallel
GLOO_SCRIPT, MPI_SCRIPT = "launch/horovodrun.sh", "launch/mpirun.sh"
FAILING = [sys.executable, str(ROOT / "tests" / "programs" / "failing.py")]
STOPPED_FIRST = """#!/bin/sh
[ ${HOROVOD_RANK:-$OMPI_COMM_WORLD_RANK} = 0 ] || kill -STOP $$
exec hvdnoise "$@"
"""


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("epochs: 2", "epochs: 4").replace("log_every: 2", "log_every: 1"))
    return ["--config", str(path), "--run_dir", str(tmp_path / "run")]


def last_own_line(ended: Ended) -> str:
    """The last line of the output that is hvdnoise's."""
    return re.findall(r"(?:hvdnoise|\w+\.sh): .*", ended.output)[-1]


def assert_failed(ended: Ended) -> None:
    assert ended.exit_code not in (0, None) and not ended.leftovers, ended.report()


@pytest.mark.parametrize("launcher", ["gloo", "mpirun"])
def test_a_rank_that_is_stopped_before_the_start(launcher: str, tmp_path: Path, settings: list[str]
                                                 ) -> None:
    program = tmp_path / "program"
    program.write_text(STOPPED_FIRST)
    program.chmod(0o755)
    ended = run_command(2, [str(program), "train", *settings], launcher=launcher,
                        env={"HVDNOISE_TIMEOUT_START": "4"})
    assert_failed(ended)
    assert last_own_line(ended) == (
        "hvdnoise: rank 0 waited 4 s for 'hvd.init' in the start: rank 1 is stopped; ending this "
        "rank (HVDNOISE_TIMEOUT_START sets the limit)")
    assert "stacks of rank 0" in ended.output and not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher", ["gloo", "mpirun"])
def test_a_rank_that_is_stopped_in_a_step(launcher: str, tmp_path: Path, settings: list[str]
                                          ) -> None:
    ended = run_command(2, [*FAILING, "train", *settings], launcher=launcher,
                        env={"HVDNOISE_TIMEOUT": "8", "HVDNOISE_TEST_FAILS": "stop 1 7"})
    assert_failed(ended)
    expected = r"rank 0 waited 8 s for 'hvdnoise\.\S+' in step 7: rank 1 is stopped; ending .*"
    assert re.fullmatch(f"hvdnoise: {expected}", last_own_line(ended)), ended.report()
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "in take_step" in log and re.search(expected, log.splitlines()[-1])


FAULTS = [  # what one rank does, and what the last line of the launch says of it
    ("gloo", "hang 1 7", r"rank 1 stood still for 8 s in step 7, outside of any collective: .*"),
    (GLOO_SCRIPT, "leave 1 7", r"rank 1 failed in step 7: SystemExit: 0"),
    (MPI_SCRIPT, "vanish 1 7", r"rank 1 on localhost ended first, by an exit in mid-run: "
                               r"rank 0 ends in step 7: rank 1 is gone: it was killed, crashed, or "
                               r"left without a word"),
]


@pytest.mark.parametrize("launcher, fault, expected", FAULTS)
def test_the_last_line_names_the_first_rank_and_its_cause(
        launcher: str, fault: str, expected: str, tmp_path: Path, settings: list[str]) -> None:
    ended = launch(launcher, tmp_path, settings, {"HVDNOISE_TEST_FAILS": fault,
                                                  "HVDNOISE_TIMEOUT": "8"}, failing=True)
    assert_failed(ended)
    if launcher == "gloo":  # what its own traceback follows
        assert re.search(f"hvdnoise: {expected}", ended.output), ended.report()
    else:
        assert re.fullmatch(f"{Path(launcher).name}: {expected}", ended.output.splitlines()[-1]
                            ), ended.report()
        assert ended.output.count("Traceback (most recent") == (fault[:6] != "vanish")


def launch(launcher: str, tmp_path: Path, settings: list[str], env: dict[str, str], *,
           failing: bool = False) -> Ended:
    """Two ranks under a launcher or a launch script; ``failing``: of the program that fails."""
    if not launcher.endswith(".sh"):
        program = FAILING if failing else [str(BIN / "hvdnoise")]
        return run_command(2, [*program, "train", *settings], launcher=launcher, env=env)
    if failing:
        program_file = tmp_path / "bin" / "hvdnoise"
        program_file.parent.mkdir()
        program_file.write_text(f'#!/bin/sh\nexec {" ".join(FAILING)} "$@"\n')
        program_file.chmod(0o755)
        for name in ("horovodrun", "mpirun"):
            (program_file.parent / name).symlink_to(BIN / name)
        env = {**env, "PATH": f"{program_file.parent}:{BIN}:{os.environ['PATH']}"}
    return run_command(1, [str(ROOT / launcher), "-np", "2", "--", *settings], launcher="none",
                       env=env)


@pytest.mark.parametrize("launcher", ["mpirun", GLOO_SCRIPT])
def test_a_long_pause_and_a_launcher_that_is_killed(launcher: str, tmp_path: Path,
                                                    settings: list[str]) -> None:
    """The pause is longer than Gloo's own limit. The ranks that the launcher leaves save."""
    folder, paused = tmp_path / "run", list[int]()

    def act() -> None:
        rank = rank_pid(folder, 1)
        os.kill(rank, signal.SIGSTOP)
        time.sleep(5)
        paused.append(steps_logged(folder))
        os.kill(rank, signal.SIGCONT)
        at_step(folder, paused[0] + 4, lambda: kill_launcher(rank_pid(folder, 0), launcher)).join()
    thread = at_step(folder, 4, act)
    ended = launch(launcher, tmp_path, [*settings, "--epochs", "100000"],
                   {"HOROVOD_GLOO_TIMEOUT_SECONDS": "2"})
    thread.join()
    assert paused and ended.exit_code == -signal.SIGKILL, ended.report()
    assert json.loads((folder / "preempted.json").read_text())["step"] >= paused[0] + 4
    logs = [(folder / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    # one rank may follow the other, and of the script something outlives it that may ask first
    assert launcher == GLOO_SCRIPT or any("its launcher is gone" in log for log in logs)


def kill_launcher(rank: int, name: str) -> None:
    """SIGKILL to the topmost ancestor of a rank that is called so."""
    above = [each for each in psutil.Process(rank).parents()
             if any(word.endswith(name) for word in each.cmdline()[:2])]
    os.kill(above[-1].pid, signal.SIGKILL)
