"""The launcher of the tests: whatever ranks do, it comes back in time, says why, leaves nothing.

The functions that ranks run are at the top; most need neither torch nor Horovod, to be quick.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.launcher import MARKER, Ended, LaunchFailed, attempt, launch, processes_of

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(300, method="signal")]
LAUNCHERS = ["gloo", "mpi", "mpirun"]
HERE = __file__
ENOUGH = 45.0  # for a launch with a limit of 20 s, on a busy machine


def rank() -> int:
    from tests.rank_main import own_rank
    return own_rank()


def say_hello(*args: Any) -> dict[str, Any]:
    print("hello from", rank())
    return {"rank": rank(), "args": args, "threads": os.environ["OMP_NUM_THREADS"],
            "extra": os.environ.get("EXTRA"), "python": sys.executable}


def return_tensors() -> dict[str, Any]:
    import torch
    return {"rank": rank(), "values": [torch.full((2,), float(rank()), dtype=torch.float64)]}


def raise_on_one() -> None:
    if rank() == 1:
        local_clue = "forty-two"
        raise KeyError(f"missing {local_clue.upper()}")
    time.sleep(60)


def sleep_for_ever() -> None:
    print("about to sleep", flush=True)
    while True:
        time.sleep(1)


def wait_in_a_collective_alone() -> None:
    from hvdnoise import comm
    world = comm.init()
    if world.rank == 0:
        world.barrier("never")
    time.sleep(600)


def kill_one() -> None:
    from hvdnoise import comm
    world = comm.init()
    world.barrier("start")
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier("end")


def leave_a_child() -> None:
    if rank() == 0:
        subprocess.Popen(["sleep", "77"], start_new_session=True, stdin=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=True)


OWNER_MARK = f"{MARKER}_OWNER={os.getpid()}"
OWNER = dict([OWNER_MARK.split("=")])


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    """Whatever a test did, none of its processes is alive afterwards."""
    yield
    left = processes_of(OWNER_MARK)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_rank_answers_in_order(launcher: str) -> None:
    seen = launch(3, f"{HERE}:say_hello", launcher=launcher, args=(1, ["two"]), timeout=60,
                  env=OWNER | {"EXTRA": "a b;c $HOME"})
    assert [each["rank"] for each in seen] == [0, 1, 2]
    assert {each["extra"] for each in seen} == {"a b;c $HOME"}
    assert all(each["args"] == [1, ["two"]] and each["threads"] == "1"
               and each["python"] == sys.executable for each in seen)


def test_module_names_and_tensors() -> None:
    torch = pytest.importorskip("torch")
    seen = launch(2, "tests.unit.test_launcher:return_tensors", launcher="mpirun", timeout=60)
    assert [each["rank"] for each in seen] == [0, 1]
    assert torch.equal(seen[1]["values"][0], torch.ones(2, dtype=torch.float64))


def test_without_a_launcher_there_is_one_rank() -> None:
    assert launch(1, f"{HERE}:say_hello", launcher="none")[0]["rank"] == 0
    with pytest.raises(ValueError, match="np=2"):
        launch(2, f"{HERE}:say_hello", launcher="none")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_raises(launcher: str) -> None:
    with pytest.raises(LaunchFailed) as caught:
        launch(3, f"{HERE}:raise_on_one", launcher=launcher, timeout=40, env=OWNER)
    text = str(caught.value)
    assert "rank 1 raised" in text and "missing FORTY-TWO" in text
    assert "local_clue = 'forty-two'" in text  # the frame's variables
    assert "time limit" not in text and "--- rank 2:" in text


def stuck(np: int, function: str, launchers: list[str], timeout: float) -> list[Ended]:
    """How launches end at their time limit, all at the same time."""
    def one(launcher: str) -> Ended:
        return attempt(np, f"{HERE}:{function}", launcher=launcher, timeout=timeout, env=OWNER)
    started = time.monotonic()
    with ThreadPoolExecutor() as pool:
        all_of_them = list(pool.map(one, launchers))
    assert time.monotonic() - started < ENOUGH
    return all_of_them


def test_ranks_that_sleep_for_ever() -> None:
    for ended in stuck(4, "sleep_for_ever", LAUNCHERS, timeout=10):
        assert ended.exit_code is None and "time limit" in ended.verdict()
        for log in ended.logs.values():
            assert "about to sleep" in log and "sleep_for_ever" in log  # said, and its stack


def test_a_rank_that_waits_in_a_collective() -> None:
    for ended in stuck(2, "wait_in_a_collective_alone", ["gloo", "mpirun"], timeout=20):
        assert ended.exit_code is None
        assert "in barrier" in ended.logs[0] and "in barrier" not in ended.logs[1]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_killed(launcher: str) -> None:
    ended = attempt(3, f"{HERE}:kill_one", launcher=launcher, timeout=40, env=OWNER)
    assert ended.exit_code not in (0, None), ended.report()
    assert not ended.results and not ended.leftovers


@pytest.mark.parametrize("launcher", ["none", *LAUNCHERS])
def test_a_child_left_behind_is_found_and_killed(launcher: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.launcher.LEFTOVER_SECONDS", 1.0)
    np = 1 if launcher == "none" else 2
    with pytest.raises(LaunchFailed, match="left a process behind: [0-9]+ sleep 77"):
        launch(np, f"{HERE}:leave_a_child", launcher=launcher, timeout=20, env=OWNER)


def test_a_function_that_is_not_there() -> None:
    with pytest.raises(LaunchFailed, match="rank 0 raised AttributeError.*nonsense"):
        launch(1, f"{HERE}:nonsense", launcher="none")


def test_processes_are_found_by_their_marker() -> None:
    with subprocess.Popen(["sleep", "30"], env={"MARK_OF_TEST": "x1"}) as process:
        try:
            assert processes_of("MARK_OF_TEST=x1") == {process.pid: "sleep 30"}
            assert not processes_of("MARK_OF_TEST=x") and not processes_of("MARK_OF_TEST=x11")
        finally:
            process.kill()


# ---- checks as pytest items

CHECKS = """
    import os, time
    import torch
    from tests.checks import on
    WORLDS = ["threads-2", "gloo-2"]
    CHECK_SECONDS = 8

    def check_first(world):
        print(f"FIRST in {os.getpid()}")
        assert world.size == 2

    def check_fails_everywhere(world):
        number = 41
        assert number == 42

    def check_after_it(world):
        world.barrier("after")

    def check_fails_on_one(world):
        assert world.rank == 0, "only rank 1"
        world.barrier("one")

    def check_after_that(world):
        world.barrier("after")

    @on("gloo-2")
    def check_hangs(world):
        if world.rank == 0:
            world.barrier("hang")
        while True:
            time.sleep(1)

    @on("gloo-2")
    def check_dies(world):
        os._exit(7)

    def check_last(world):
        assert world.gather_json(world.rank, name="r") == [0, 1]
"""


def test_checks_are_reported_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text(textwrap.dedent(CHECKS))
    (tmp_path / "conftest.py").write_text("from tests.conftest import *  # noqa: F401,F403\n")
    root = Path(HERE).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", tmp_path,
         str(tmp_path)], capture_output=True, text=True, timeout=150,
        env=os.environ | {"PYTHONPATH": str(root)} | OWNER)
    words = dict(line.split("::")[1].split()[:2] for line in done.stdout.splitlines()
                 if "::check_" in line and "%]" in line)
    expected = {"first": "PASSED", "fails_everywhere": "FAILED", "after_it": "PASSED",
                "fails_on_one": "FAILED", "after_that": "PASSED", "last": "PASSED"}
    assert words == {
        **{f"check_{name}[gloo-2]": word for name, word in expected.items()},
        **{f"check_{name}[threads-2]": word for name, word in expected.items()},
        "check_hangs[gloo-2]": "FAILED", "check_dies[gloo-2]": "FAILED"}, done.stdout
    assert "number = 41" in done.stdout
    assert re.search(r"--- rank 1 \(first\):[^-]*only rank 1", done.stdout)  # who began it
    assert "Timeout" in done.stdout  # faulthandler's stacks of the ranks that hung
