"""The supervisor: when it starts a run again, when it gives up, and that nothing outlives it.

A script stands in for the launch scripts; real ranks are in tests/integration/test_supervise.py.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from hvdnoise import cli
from hvdnoise.supervise import guard
from hvdnoise.supervise.cause import Cause, Reader
from hvdnoise.supervise.failures import Failure, History
from hvdnoise.supervise.options import read
from tests.supervised import Supervised, alive, supervise

BOOM = "[1]<stderr>:hvdnoise: rank 1 failed: boom"


def arguments_of(train: list[str]) -> dict[str, str]:
    """The last value of each flag."""
    return {name: value for name, value in zip(train, train[1:]) if name.startswith("--")}


def last(run: Supervised) -> str:
    assert not alive(run.run.parent)
    return run.lines[-1]


# ---------------------------------------------------------------------- restarts

def test_it_goes_on_from_checkpoints_until_the_run_is_done(tmp_path: Path) -> None:
    run = supervise(tmp_path, [{"checkpoint": 5, "step": 7, "say": BOOM, "exit": 1},
                               {"exit": 75}, {"checkpoint": 10, "step": 10, "kill": True}, {}])
    assert run.wait() == 0
    assert len(run.attempts) == 4
    assert all(arguments_of(each)["--resume"] == "auto" for each in run.attempts)
    said = [line for line in run.lines if line.startswith("hvdnoise:")]
    assert said == [
        "hvdnoise: rank 1: boom, at step 7: restart 1 of at most 10 in 0.01 s; newest "
        f"checkpoint: step 5, in {run.run}",
        "hvdnoise: the ranks were told to stop, and saved, before the first step: restart 2 of at "
        f"most 10 in 0.02 s; newest checkpoint: step 5, in {run.run}",
        "hvdnoise: the launcher was killed by SIGKILL, at step 10: restart 3 of at most 10 in "
        f"0.01 s; newest checkpoint: step 10, in {run.run}"]
    assert run.lines.count(BOOM) == 1  # as it came


def test_it_gives_up_when_a_step_fails_twice(tmp_path: Path) -> None:
    run = supervise(tmp_path, [{"checkpoint": 5, "step": 7, "say": BOOM, "exit": 1}])
    assert run.wait() == 1
    assert len(run.attempts) == 2
    assert last(run) == ("hvdnoise: error: gave up, the same failure came twice: rank 1: boom, at "
                         f"step 7; newest checkpoint: step 5, in {run.run}")


def test_it_gives_up_after_so_many_restarts(tmp_path: Path) -> None:
    steps = [{"checkpoint": step, "step": step, "say": BOOM, "exit": 1} for step in range(1, 9)]
    run = supervise(tmp_path, steps, "--max-restarts", "3")
    assert run.wait() == 1
    assert len(run.attempts) == 4
    assert "3 restarts are over: rank 1: boom, at step 4" in last(run)


def test_exit_code_0_without_an_end_is_a_failure(tmp_path: Path) -> None:
    run = supervise(tmp_path, [{"step": 3, "finishes": False}])
    assert run.wait() == 1
    assert "exit code 0 before the end of the run, at step 3" in last(run)


def test_bad_input_is_not_tried_again(tmp_path: Path) -> None:
    line = "[0]<stderr>:hvdnoise: error: data.root=/x is wrong (rank 1 of node2)"
    run = supervise(tmp_path, [{"settings": False, "say": f"{line}\nrubbish", "exit": 2}])
    assert run.wait() == 2
    assert len(run.attempts) == 1 and not run.run.exists()
    assert run.lines[:2] == [line, "rubbish"]
    assert last(run) == "hvdnoise: error: data.root=/x is wrong (rank 1 of node2)"


def test_hosts_out_of_reach_are_fatal_only_at_the_start(tmp_path: Path) -> None:
    line = "mpirun.sh: error: node2 does not answer on port 22; is it up?"
    away = {"settings": False, "say": line, "exit": 1}
    run = supervise(tmp_path, [away])
    assert run.wait() == 1 and len(run.attempts) == 1
    assert "nothing was started: node2 does not answer" in last(run)
    (tmp_path / "later").mkdir()
    run = supervise(tmp_path / "later", [{"checkpoint": 5, "step": 5, "exit": 1}, away, away, {}])
    assert run.wait() == 0 and len(run.attempts) == 4


def test_overwrite_replaces_the_run_once(tmp_path: Path) -> None:
    """Not an attempt's own checkpoints, and the other run's are not resumed from."""
    (tmp_path / "run" / "checkpoints" / "step-00000099").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    run = supervise(tmp_path, [{"settings": False, "exit": 1}, {"step": 1, "exit": 1}, {}],
                    train=["--overwrite"])
    assert run.wait() == 0
    first, second, third = (arguments_of([*each, ""]) for each in run.attempts)
    assert "--resume" not in first and "--resume" not in second
    assert (third["--resume"], third["--overwrite"]) == ("auto", "false")


def test_a_run_that_goes_on_from_another(tmp_path: Path) -> None:
    """Until it has a checkpoint of its own."""
    other = tmp_path / "other"
    other.mkdir()
    run = supervise(tmp_path, [{"step": 1, "exit": 1}, {"checkpoint": 5, "step": 6, "exit": 1}, {}],
                    train=["--resume", str(other)])
    assert run.wait() == 0
    assert [arguments_of(each)["--resume"] for each in run.attempts] == [
        str(other), str(other), "auto"]


# ---------------------------------------------------------------------- signals

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_and_its_end_is_75(tmp_path: Path, number: signal.Signals) -> None:
    run = supervise(tmp_path, [{"checkpoint": 5, "step": 7, "wait": 60, "exit": 75}])
    run.wait_for_attempt(1)
    os.kill(run.process.pid, number)
    assert run.wait() == 75
    assert last(run).startswith("hvdnoise: stopped; newest checkpoint: step 5")


def test_ranks_that_could_not_save_are_no_75(tmp_path: Path) -> None:
    run = supervise(tmp_path, [{"checkpoint": 5, "step": 7, "wait": 60, "exit": 1}])
    run.wait_for_attempt(1)
    run.process.terminate()
    assert run.wait() == 1
    assert "stopped at step 7, and the ranks had not saved" in last(run)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    run = supervise(tmp_path, [{"step": 7, "say": "up", "child": True, "wait": 60}])
    run.wait_for_attempt(1)
    os.kill(_script_of(run), signal.SIGSTOP)  # it does not end by the first
    run.process.terminate()
    time.sleep(1.5)
    assert run.process.is_alive()
    started = time.monotonic()
    run.process.terminate()
    assert run.wait() == 143 and time.monotonic() - started < 10
    assert "ended at once" in last(run)


def test_a_signal_between_two_attempts(tmp_path: Path) -> None:
    run = supervise(tmp_path, [{"step": 7, "say": BOOM, "exit": 1}], "--backoff", "50")
    until = time.monotonic() + 30
    while not any("restart 1" in line for line in run.lines):
        assert time.monotonic() < until
        time.sleep(0.05)
    run.process.terminate()
    assert run.wait() == 75 and len(run.attempts) == 1


def _script_of(run: Supervised) -> int:
    """The process of the script: the oldest that is no guard."""
    found = [int(each.split()[0]) for each in alive(run.run.parent)
             if "guard.py" not in each and "setsid" not in each and "bash" not in each]
    return min(found)


# ---------------------------------------------------------------------- nothing is left

def test_a_killed_supervisor_leaves_nothing_and_the_command_goes_on(tmp_path: Path) -> None:
    run = supervise(tmp_path, [{"checkpoint": 5, "step": 7, "child": True, "wait": 60}, {}])
    run.wait_for_attempt(1)
    assert len(alive(tmp_path)) >= 3
    run.process.kill()
    run.process.join()
    again = supervise(tmp_path, [{"wait": 60}, {}])  # at once
    assert again.wait() == 0 and len(again.attempts) == 2
    assert not alive(tmp_path)


def test_a_killed_guard_or_script_is_a_failure_like_others(tmp_path: Path) -> None:
    run = supervise(tmp_path, [{"checkpoint": 5, "step": 7, "child": True, "wait": 60},
                               {"checkpoint": 6, "step": 7, "child": True, "wait": 60}, {}])
    run.wait_for_attempt(1)
    os.kill(_script_of(run), signal.SIGKILL)
    run.wait_for_attempt(2)
    guards = [int(each.split()[0]) for each in alive(tmp_path) if "guard.py" in each]
    os.kill(guards[0], signal.SIGKILL)
    assert run.wait() == 0 and len(run.attempts) == 3
    last(run)


def test_what_is_left_on_other_hosts_is_ended_when_something_was_killed(tmp_path: Path) -> None:
    after = f'["touch", "{tmp_path}/after"]'
    words = ["python3", guard.__file__, "--after", after, "-"]
    assert os.spawnvp(os.P_WAIT, "python3", [*words, "sh", "-c", "exit 7"]) == 7
    assert not (tmp_path / "after").exists()
    assert os.spawnvp(os.P_WAIT, "python3", [*words, "sh", "-c", "kill -9 $$"]) == 137
    assert (tmp_path / "after").exists()


def test_two_supervisors_of_one_run(tmp_path: Path) -> None:
    run = supervise(tmp_path, [{"step": 7, "wait": 60, "exit": 75}])
    run.wait_for_attempt(1)
    said = run.said.rename(tmp_path / "first")
    second = supervise(tmp_path, [{}])
    assert second.wait() == 2 and len(second.attempts) == 1
    assert "another hvdnoise launch works on" in second.lines[-1]
    run.process.terminate()
    run.said = said
    assert run.wait() == 75


def test_nothing_grows_with_the_attempts(tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [
        {"checkpoint": step, "step": step, "say": BOOM * 1000, "exit": 1} for step in range(1, 13)]
    run = supervise(tmp_path, [*steps, {"wait": 60, "exit": 75}], "--max-restarts", "20")

    def sizes() -> tuple[int, int]:
        process = Path("/proc") / str(run.process.pid)
        pages = int((process / "statm").read_text().split()[1])
        return len(list((process / "fd").iterdir())), pages
    run.wait_for_attempt(3)
    files, before = sizes()
    run.wait_for_attempt(13)
    files_now, now = sizes()
    run.process.terminate()
    assert run.wait() == 75
    assert abs(files_now - files) <= 2 and now - before < 2000  # pages: 8 MB
    last(run)


# ---------------------------------------------------------------------- the same failure

SAID, KILLED = Cause("said", "rank 1: boom", 1), Cause("killed", "rank 1 was killed", 1)


@pytest.mark.parametrize("failures, again", [
    ([(SAID, 5, 7), (SAID, 5, 7)], True),
    ([(SAID, 5, 7), (SAID, 5, 6)], True),      # no further
    ([(SAID, 5, 7), (SAID, 5, 8)], False),     # further
    ([(SAID, 5, 7), (SAID, 6, 7)], False),     # a newer checkpoint
    ([(SAID, None, None), (SAID, None, None)], True),  # at the start
    ([(SAID, 5, 7), (SAID, 5, None)], False),  # once in a step, once at the start
    ([(SAID, 5, 7), (SAID, 5, None), (SAID, 5, 7)], True),  # with another between
    ([(KILLED, 5, 7), (KILLED, 5, 7)], True),
    ([(KILLED, 5, 7), (KILLED, 5, 6)], False),
    ([(KILLED, 5, 7), (Cause("killed", "", 0), 5, 7)], False),  # another rank
    ([(KILLED, 5, None), (KILLED, 5, None)], False),  # at the start: by anybody
    ([(Cause("launcher", ""), 5, 7)] * 2, False),
    ([(Cause("hosts", ""), 5, None)] * 2, False),
    ([(Cause("preempted", ""), 5, 5)] * 2, False)])
def test_when_a_failure_is_the_same(failures: list[tuple[Any, ...]], again: bool) -> None:
    history = History()
    assert [history.add(Failure(*each)) for each in failures][-1] == again


# ---------------------------------------------------------------------- the cause

GLOO_KILL = """\
[1]<stderr>:Killed
[0]<stderr>:hvdnoise: rank 0 ends in step 7: another rank is gone, or a collective failed (x)
Process name: 1
horovodrun.sh: rank 1 on localhost ended first, with exit code 137
"""
MPI_KILL = "mpirun noticed that process rank 1 with PID 0 on node vm exited on signal 9 (Killed).\n"
TRACEBACK = """\
[0]<stderr>:hvdnoise: rank 0 ends in step 7: another rank is gone, or a collective failed (x)
[1]<stderr>:Traceback (most recent call last):
[0]<stderr>:hvdnoise: rank 0 says more
[1]<stderr>:  File "x.py", line 1, in f
[1]<stderr>:ValueError: boom
[1]<stderr>:hvdnoise: rank 1 failed in step 7: ValueError: boom: at last
"""


@pytest.mark.parametrize("text, code, kind, words", [
    (GLOO_KILL, 137, "killed", "rank 1 on localhost was killed by SIGKILL"),
    (MPI_KILL, 137, "killed", "rank 1 on vm was killed by SIGKILL"),
    ("", 137, "launcher", "the launcher was killed by SIGKILL"),
    ("hvdnoise: rank 0: its launcher is gone (mpirun, process 7): asking for a save\n",
     143, "launcher", "launcher was killed"),
    (TRACEBACK, 1, "said", "rank 1: ValueError: boom: at last"),
    ("hvdnoise: rank 1 was interrupted in step 7\n", 1, "said", "rank 1: was interrupted"),
    ("hvdnoise: rank 1 stood still for 9 s in step 3, outside of any collective: see\n", 1, "said",
     "rank 1: stood still for 9 s"),
    ("hvdnoise: rank 0 waited 9 s for 'x' in step 3: rank 1 is stopped; ending\n", 1, "said",
     "rank 1 is stopped"),
    ("hvdnoise: rank 0 ends in step 7: rank 1 is gone: it was killed, crashed\n", 1, "killed",
     "rank 1 is gone"),
    ("hvdnoise: rank 0 waited 60 s for 'x': another rank is stalled, gone\n", 1, "said",
     "rank 0: waited 60 s"),
    ("hvdnoise: error: rank 1 of node2 could not write\n", 1, "said", "rank 1 of node2 could not"),
    ("hvdnoise: rank 1 failed at step 7: boom\n", 1, "said", "rank 1: boom"),
    ("horovodrun.sh: rank 1 on node2 ended first, with exit code 3\n", 3, "said",
     "rank 1 on node2 ended with exit code 3"),
    ("mpirun.sh: error: node2 does not answer on port 22; It was there at the start: ...\n", 1,
     "hosts", "node2 does not answer"),
    ("hvdnoise: rank 0 ends: another rank is gone, or a collective failed (x)\n", 1, "killed",
     "nothing says why; rank 0: another rank is gone"),
    ("", 75, "preempted", "saved"), ("rubbish\n", 1, "said", "exit code 1 and did not say why")])
def test_the_cause(text: str, code: int, kind: str, words: str) -> None:
    for size in (7, 4096):  # however it is cut into pieces
        reader, raw = Reader(), text.encode()
        for start in range(0, len(raw), size):
            reader.feed(raw[start:start + size])
        cause = reader.cause(code)
        assert cause.kind == kind and words in cause.text, cause


def test_an_endless_line_takes_no_memory() -> None:
    reader = Reader()
    for _ in range(100):
        reader.feed(b"x" * 100_000)
    assert len(reader._rest) <= 2 * 16384


# ---------------------------------------------------------------------- the command line

@pytest.mark.parametrize("arguments, words", [
    (["-np", "2"], "no --; what comes after it"),
    (["-np", "2", "--"], "after -- comes 'nothing'"),
    (["-np", "2", "--", "eval", "run"], "after -- comes 'eval', and only train can be resumed"),
    (["--max-restarts", "-1", "--", "train"], "--max-restarts=-1 is wrong: give 0 or more"),
    (["--max-restarts", "many", "--", "train"], "invalid int value: 'many'"),
    (["--backoff", "nan", "--", "train"], "--backoff=nan is wrong"),
    (["--nodes", "2", "--", "train"], "unrecognized arguments: --nodes 2"),
    (["--gloo", "--mpirun", "--", "train"], "not allowed with argument"),
    (["--hosts", "a", "--hostfile", "b", "--", "train"], "not allowed with argument"),
    (["-np", "2", "--min-np", "1", "--", "train"], "--min-np=1 is wrong: without --hosts"),
    (["--hosts", "a,b", "--min-np", "x", "--", "train"], "--min-np=x is wrong"),
    (["--hosts", "a,b:2", "--min-np", "4", "--", "train"], "there are 3 ranks at most"),
    (["-np", "2", "--", "train", "--model", "none"], "none"),
    (["-np", "2", "--", "train", "--modle", "mlp"], "did you mean model"),
    (["-np", "3", "--", "train", "--global_batch", "64"], "global_batch=64"),
    (["-np", "2", "--", "train", "--resume", "/nowhere"], "there is no such folder")])
def test_bad_input_is_one_line(arguments: list[str], words: str, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str],
                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["launch", *arguments]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1, found
    assert found.err.startswith("hvdnoise: error: ") and words in found.err, found.err
    assert not list(tmp_path.iterdir())


def test_without_a_run_dir_the_same_command_has_the_same_one() -> None:
    def folder(*arguments: str, ranks: str = "2") -> str:
        options = read(["-np", ranks, "--", "train", *arguments])
        assert options.train[-2:] == ("--run_dir", str(options.folder))
        return str(options.folder)
    assert re.fullmatch(r"runs/mlp-synthetic-[0-9a-f]{10}", folder(
        "--model", "mlp", "--data.dataset", "synthetic"))
    assert folder("--seed", "1", "--epochs", "2") == folder("--seed=1", "--epochs", "9")
    assert folder("--seed", "1") not in (folder("--seed", "2"), folder("--seed", "1", ranks="3"))


def test_the_launcher_follows_from_where_the_ranks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def launcher(*arguments: str) -> str:
        return read([*arguments, "--", "train"]).launcher
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert launcher("-np", "2") == "gloo" and launcher("--hosts", "a,b") == "mpirun"
    assert launcher("--mpi", "--hosts", "a,b") == "mpi"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launcher() == "mpirun"


def test_a_long_line_passes_through_whole(tmp_path: Path) -> None:
    run = supervise(tmp_path, [{"step": 1, "say": "x" * 300_000, "exit": 1}, {}])
    assert run.wait() == 0 and any(len(line) == 300_000 for line in run.lines)
