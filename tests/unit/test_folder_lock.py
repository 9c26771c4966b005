"""One run in a folder: who gets it, who is refused, and what becomes of a dead owner's lock."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdnoise.training import folder_lock, heartbeat, loop
from hvdnoise.training.checkpoint import CheckpointError
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.folder_lock import FolderInUse
from hvdnoise.training.heartbeat import FolderLock, FolderLost
from hvdnoise.training.options import parse
from hvdnoise.training.owner import Owner, this_process
from hvdnoise.training.progress import log
from tests.fake_world import ThreadWorld, run_threads
from tests.trainer import TINY, Never, metrics, speaking, train

__all__ = ["speaking"]  # a fixture
ELSEWHERE = replace(this_process(), host="node9", boot="another boot", token="theirs")


@pytest.fixture(autouse=True)
def quick(monkeypatch: Any) -> None:
    """Seconds become tenths; a live owner beats six times before it is taken for dead."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(folder_lock, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(folder_lock, "SILENT_SECONDS", 1.0)


@pytest.fixture
def said(caplog: Any) -> Iterator[Any]:
    log.propagate = True
    yield caplog
    log.propagate = False


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


def owner_of(process: int, **changed: Any) -> Owner:
    started = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return replace(this_process(), process=process, started=started, **changed)


def write(folder: Path, owner: Owner, number: int = 1) -> Path:
    path = folder / f"lock-{number}.json"
    path.write_text(json.dumps({**asdict(owner), "beat": 0}))
    return path


def have(folder: Path, on_loss: Callable[[], None] = lambda: None) -> FolderLock:
    return FolderLock(folder, on_loss)


def test_the_second_is_told_host_and_process_and_changes_nothing(tmp_path: Path) -> None:
    lock = have(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FolderInUse, match=f"in use by process {os.getpid()} on "
                       f"{this_process().host}: wait"):
        have(tmp_path)
    assert sorted(tmp_path.iterdir()) == before == [tmp_path / "lock-1.json"]
    lock.release()
    assert list(tmp_path.iterdir()) == []
    have(tmp_path).release()


def test_a_dead_owner_of_this_machine_is_followed_at_once(
        tmp_path: Path, monkeypatch: Any, said: Any, sleeper: Any) -> None:
    monkeypatch.setattr(folder_lock, "SILENT_SECONDS", 1000.0)
    write(tmp_path, owner_of(sleeper.pid))
    with pytest.raises(FolderInUse, match=f"process {sleeper.pid} on"):
        have(tmp_path)
    sleeper.kill()
    while not folder_lock.owner_in(tmp_path) is None:  # dead, but not yet waited for
        time.sleep(0.01)
    lock = have(tmp_path)
    (line,) = [line for line in said.messages if "taking it over" in line]
    assert f"process {sleeper.pid} on" in line and "has ended" in line
    assert [path.name for path in tmp_path.iterdir()] == ["lock-2.json"]
    lock.release()


def test_another_process_of_the_same_number_is_another_owner(tmp_path: Path, monkeypatch: Any
                                                             ) -> None:
    monkeypatch.setattr(folder_lock, "SILENT_SECONDS", 1000.0)
    write(tmp_path, replace(this_process(), started="1"))
    have(tmp_path).release()


def test_a_silent_owner_elsewhere_is_followed_after_a_while(tmp_path: Path, said: Any) -> None:
    write(tmp_path, ELSEWHERE)
    started = time.monotonic()
    lock = have(tmp_path)
    assert time.monotonic() - started >= 0.9
    assert any("process" in line and "on node9" in line and "no sign of life" in line
               for line in said.messages)
    lock.release()


def test_a_beating_owner_elsewhere_is_left_alone(tmp_path: Path) -> None:
    """What it writes counts, not when its clock says it was."""
    lock, theirs = have(tmp_path), replace(this_process(), boot="another boot")
    lock.owner = replace(theirs, token=lock.owner.token)
    time.sleep(0.3)
    os.utime(lock.path, (0, 0))
    with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"):
        have(tmp_path)
    lock.release()


def test_a_stopped_owner_is_followed_after_a_while(tmp_path: Path, sleeper: Any) -> None:
    write(tmp_path, owner_of(sleeper.pid))
    os.kill(sleeper.pid, signal.SIGSTOP)
    time.sleep(0.2)
    have(tmp_path).release()


@pytest.mark.parametrize("content", [
    b"", b"\xff\0" * 300, b"[" * 600, b"[1, 2]", b'{"process": "1"}', b'{"process": 1' + b"0" * 400,
    json.dumps({**asdict(ELSEWHERE), "host": ["x"]}).encode()])
def test_a_damaged_lock_is_nobodys_after_a_while(tmp_path: Path, content: bytes, said: Any) -> None:
    (tmp_path / "lock-7.json").write_bytes(content)
    lock = have(tmp_path)
    assert lock.path.name == "lock-8.json" and "does not name" in said.text
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_no_file_is_nobodys_after_a_while(tmp_path: Path) -> None:
    (tmp_path / "lock-1.json").mkdir()
    os.mkfifo(tmp_path / "lock-2.json")
    (tmp_path / "lock-3.json").symlink_to("/dev/zero")
    lock = have(tmp_path)
    assert lock.path.name == "lock-4.json"
    lock.release()


@pytest.mark.parametrize("before", ["nobody", "dead", "silent"])
def test_of_many_at_the_same_moment_one_gets_it(tmp_path: Path, before: str) -> None:
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if before == "dead":
            write(folder, replace(this_process(), started="1"))
        elif before == "silent" and attempt < 3:
            write(folder, ELSEWHERE)
        start = threading.Barrier(8)
        got: list[FolderLock] = []
        refused: list[str] = []

        def work() -> None:
            start.wait()
            try:
                got.append(have(folder))
            except FolderInUse as error:
                refused.append(str(error))
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(got) == 1 and len(refused) == 7, (got, refused)
        assert [path.name for path in folder.iterdir()] == [got[0].path.name]
        got[0].release()


def test_one_that_came_between_is_seen(tmp_path: Path, monkeypatch: Any) -> None:
    """A lock of a number that was free when this one looked, but not when it had its own."""
    write(tmp_path, replace(this_process(), started="1"))
    create = folder_lock._create

    def slowly(path: Path, owner: Owner) -> int | None:
        if path.name == "lock-2.json":
            write(tmp_path, this_process(), 1)  # its owner came to life, or is another one
        return create(path, owner)
    monkeypatch.setattr(folder_lock, "_create", slowly)
    with pytest.raises(FolderInUse):
        have(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock-1.json"]


@pytest.mark.parametrize("how, words", [
    ("removed", "has lost its lock-1.json"), ("folder", "is gone"), ("moved", "is gone"),
    ("taken over", "was taken over by process 1 on node9"),
    ("replaced", "was taken over by process 1 on node9")])
def test_an_owner_notices_that_it_is_none_any_more(tmp_path: Path, how: str, words: str) -> None:
    folder, lost = tmp_path / "run", threading.Event()
    folder.mkdir()
    lock = have(folder, lost.set)
    assert lock.problem() is None and lock.is_ours()
    if how == "removed":
        lock.path.unlink()
    elif how == "folder":
        shutil.rmtree(folder)
    elif how == "moved":
        folder.rename(tmp_path / "elsewhere")
    elif how == "taken over":
        write(folder, replace(ELSEWHERE, process=1), 2)
    else:
        lock.path.unlink()
        write(folder, replace(ELSEWHERE, process=1))
    assert lost.wait(30)
    assert words in (lock.problem() or "")
    lock._beaten -= 1000.0  # as after a stop, when records are asked for first
    assert not lock.is_ours()
    lock.release()
    if how == "taken over":
        assert (folder / "lock-2.json").exists()  # another's stays


def test_an_owner_that_cannot_stop_is_ended(tmp_path: Path) -> None:
    """Its main thread waits, for example in a collective."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from hvdnoise.training import heartbeat\n"
        "heartbeat.BEAT_SECONDS = heartbeat.GRACE_SECONDS = 0.2\n"
        "lock = heartbeat.FolderLock(Path(sys.argv[1]), lambda: None)\n"
        "lock.path.unlink()\n"
        "time.sleep(100)\n")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True,
                          text=True, timeout=100)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"hvdnoise: error: the run folder {tmp_path} has lost its lock-1.json")
    assert line.endswith("(rank 0)")


def test_a_folder_made_for_nothing_is_removed_again(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"

    def work(world: ThreadWorld, used: bool) -> None:
        with heartbeat.held(lambda: [folder], world, lambda: None) as (path, lock):
            assert path == folder and (lock is not None) == (world.rank == 0)
            world.barrier()
            if used and world.rank == 0:
                (folder / "config.yaml").write_text("x")
    run_threads(2, lambda world: work(world, False))
    assert list(tmp_path.iterdir()) == []
    run_threads(2, lambda world: work(world, True))
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_rank_that_sees_another_folder_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    real = folder_lock.is_of
    monkeypatch.setattr(heartbeat, "SEEN_SECONDS", 0.3)
    monkeypatch.setattr(folder_lock, "is_of", lambda *arguments: real(*arguments)
                        and threading.current_thread().name != "rank 1")

    def work(world: ThreadWorld) -> None:
        with pytest.raises(ConfigError, match=r"not the folder that rank 0 has.*\(rank 1\)"):
            with heartbeat.held(lambda: [tmp_path / "run"], world, lambda: None):
                pass
    run_threads(2, work)
    assert list(tmp_path.iterdir()) == []


# ---- runs

def test_runs_of_no_given_folder_get_one_each(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    config = parse(TrainConfig, [*TINY, "--name", "x"], program="hvdnoise train")
    model = torch.nn.Linear(1, 1)
    from hvdnoise.training.runfolder import hold_folder

    def work(world: ThreadWorld) -> list[str]:
        with hold_folder(config, world, model, lambda: None) as (first, _):
            with hold_folder(config, world, model, lambda: None) as (second, _):
                return [str(first), str(second)]
    assert run_threads(1, work) == [["runs/x-now", "runs/x-now-2"]]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--resume", "auto"], ["--overwrite"]])
def test_a_run_in_a_folder_in_use_is_refused(tmp_path: Path, flags: list[str]) -> None:
    train(tmp_path, "--epochs", "1")
    lock, before = have(tmp_path), sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=f"process {os.getpid()} (on|works)"):
        train(tmp_path, "--epochs", "2", *flags)
    assert sorted(tmp_path.rglob("*")) == before
    lock.release()


def test_the_lock_goes_with_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    held: list[bool] = []
    real = loop.take_step

    def step(job: Any, *rest: Any) -> None:
        held.append((tmp_path / "lock-1.json").exists())
        real(job, *rest)
        if len(held) == 30:
            raise RuntimeError("a fault")
    monkeypatch.setattr(loop, "take_step", step)
    train(tmp_path, "--epochs", "1")
    assert not folder_lock.locks(tmp_path)
    train(tmp_path, "--epochs", "9", "--resume", "auto", stop_after=2, expect=75)
    assert not folder_lock.locks(tmp_path)
    with pytest.raises(RuntimeError, match="a fault"):
        train(tmp_path, "--epochs", "9", "--resume", "auto")
    assert not folder_lock.locks(tmp_path) and len(held) == 30 and all(held)


class At(Never):
    """Does something once, after so many steps; a run that was asked to stop stops."""

    def __init__(self, steps: int, action: Callable[[], None]) -> None:
        super().__init__()
        self.steps, self.action = steps, action

    def agreed(self, world: ThreadWorld) -> bool:
        self.steps -= 1
        if self.steps == 0:
            self.action()
        return self.wanted


def run_with(preemption: Never, folder: Path, *flags: str, ranks: int = 1) -> list[int]:
    config = parse(TrainConfig, [*TINY, "--run_dir", str(folder), *flags], program="hvdnoise train")

    def work(world: ThreadWorld) -> int:
        return loop.run(config, world, torch.device("cpu"), preemption)  # type: ignore
    return run_threads(ranks, work)


@pytest.mark.parametrize("checkpoints", ["1", "0"])
def test_a_vanished_folder_ends_the_run_and_is_not_made_anew(tmp_path: Path, checkpoints: str
                                                             ) -> None:
    folder = tmp_path / "run"

    def vanish() -> None:  # at once, for a checkpoint may be under way
        shutil.rmtree(folder.rename(tmp_path / "gone"), ignore_errors=True)
    with pytest.raises(FolderLost, match=r"the run folder .*/run is gone \(rank 0\)"):
        run_with(At(4, vanish), folder, "--checkpoint.every_steps", checkpoints)
    assert not folder.exists()


def test_a_run_that_was_taken_over_stops_at_once(tmp_path: Path) -> None:
    """Long before its next checkpoint."""
    folder = tmp_path / "run"

    def take_over() -> None:
        write(folder, replace(ELSEWHERE, process=12), 2)
        time.sleep(1)  # as a process that was stopped
    with pytest.raises(FolderLost, match="taken over by process 12 on node9 .rank 0."):
        run_with(At(4, take_over), folder, "--epochs", "100000", "--log_every", "1",
                 "--checkpoint.every_epochs", "0", "--eval_every", "0")
    assert len(metrics(folder)) < 40 and (folder / "lock-2.json").exists()


def test_no_checkpoint_is_written_into_a_folder_that_was_taken_over(tmp_path: Path,
                                                                    monkeypatch: Any) -> None:
    """Nor any other file, though the heartbeat has not noticed yet."""
    folder = tmp_path / "run"
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 100.0)
    with pytest.raises(FolderLost):
        run_with(At(4, lambda: str(write(folder, ELSEWHERE, 2))), folder,
                 "--checkpoint.every_steps", "6")
    assert list((folder / "checkpoints").iterdir()) == []
    assert not (folder / "weights.pt").exists()


@pytest.mark.parametrize("name", ["checkpoints", "weights.pt.part", "summary.json.part"])
def test_what_cannot_be_written_ends_the_run_naming_cause_folder_and_rank(tmp_path: Path, name: str
                                                                          ) -> None:
    folder = tmp_path / "run"

    def obstruct() -> None:
        if name == "checkpoints":
            (folder / name).rmdir()
            (folder / name).write_text("a file")
        else:
            (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"run folder {folder}: rank 0 could not write "
                       r"\(\w*Error: "):
        run_with(At(4, obstruct), folder)
    assert not (folder / "summary.json").exists()
