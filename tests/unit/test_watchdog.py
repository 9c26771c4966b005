"""The watchdog of one process: when it ends it, what it says, and what does not trip it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest

from hvdnoise import watchdog
from tests.quick import BARE_PACKAGE

PROGRAM = BARE_PACKAGE + """
import os, sys, threading, time
from pathlib import Path
from hvdnoise import watchdog
def stand_still():
    time.sleep(100)
dog = watchdog.begin(3, 4)
dog.log = Path("rank-3.log")
print("begun", flush=True)
"""


def start(program: str, folder: Path, stderr: IO[Any] | int | None = None, **variables: str
          ) -> subprocess.Popen[str]:
    """A process with a watchdog, once it has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + program], stdout=subprocess.PIPE, text=True, cwd=folder,
        stderr=subprocess.PIPE if stderr is None else stderr, env={**os.environ, **variables})
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


def start_all(programs: dict[str, str], folder: Path, **variables: str
              ) -> dict[str, subprocess.Popen[str]]:
    """All at the same time, each in a folder of its own: they mostly sleep."""
    for name in programs:
        (folder / name).mkdir()
    return {name: start(program, folder / name, **variables)
            for name, program in programs.items()}


ENDS = {  # what the process does -> the last line
    "step": ("dog.enter('step', 7); stand_still()",
             "rank 3 stood still for 1 s in step 7, outside of any collective: see its stacks "
             "above; ending this rank (HVDNOISE_TIMEOUT sets the limit)"),
    "collective": ("dog.enter('step', 7)\nwith dog.waiting_for('x'): stand_still()",
                   "rank 3 waited 1 s for 'x' in step 7: another rank is stalled, gone, or took "
                   "another path; ending this rank (HVDNOISE_TIMEOUT sets the limit)"),
    "library": ("with dog.waiting_for('x'): stand_still()",
                "rank 3 waited 1 s for 'x': another rank is stalled, gone, or took another path; "
                "ending this rank (HVDNOISE_TIMEOUT sets the limit)"),
    "start": ("dog.enter('start')\nwith dog.waiting_for('hvd.init'): stand_still()",
              "rank 3 waited 2 s for 'hvd.init' in the start: another rank is stalled, gone, or "
              "took another path; ending this rank (HVDNOISE_TIMEOUT_START sets the limit)"),
    "evaluation": ("dog.enter('step', 7)\nwith watchdog.phase('evaluation'): stand_still()",
                   "rank 3 stood still for 1.5 s in the evaluation after step 7, outside of any "
                   "collective: see its stacks above; ending this rank "
                   "(HVDNOISE_TIMEOUT_EVALUATION sets the limit)"),
    "finish": ("dog.enter('finish', 9); stand_still()",
               "rank 3 stood still for 1 s in the finish after step 9, outside of any collective: "
               "see its stacks above; ending this rank (HVDNOISE_TIMEOUT sets the limit)"),
}


def test_standing_still_ends_the_process(tmp_path: Path) -> None:
    processes = start_all({name: program for name, (program, _) in ENDS.items()}, tmp_path,
                          HVDNOISE_TIMEOUT="1", HVDNOISE_TIMEOUT_START="2",
                          HVDNOISE_TIMEOUT_EVALUATION="1.5")
    for name, (_, last) in ENDS.items():
        _, said = processes[name].communicate(timeout=60)
        assert processes[name].returncode == 1, name
        for text in (said, (tmp_path / name / "rank-3.log").read_text()):
            assert text.splitlines()[0].startswith("hvdnoise: stacks of rank 3, process ")
            assert " in stand_still" in text and text.splitlines()[-1] == f"hvdnoise: {last}"


LIVES = {
    "progress": "for n in range(12): dog.enter('step', n); time.sleep(0.25)",
    "collectives": "dog.enter('step', 7)\nfor n in range(12):\n"
                   "    with dog.waiting_for('x'): time.sleep(0.25)",
    "no phase": "time.sleep(3)",
    "switched off": "dog.enter('checkpoint'); time.sleep(3)",
    "back from a phase": "dog.enter('step', 1)\nfor n in range(4):\n    time.sleep(0.4)\n"
                         "    with watchdog.phase('checkpoint'): time.sleep(0.4)",
    "ended": "dog.enter('finish'); dog.rest(); time.sleep(3)",
}


def test_what_makes_progress_lives(tmp_path: Path) -> None:
    processes = start_all(LIVES, tmp_path, HVDNOISE_TIMEOUT="2", HVDNOISE_TIMEOUT_CHECKPOINT="0")
    for name, process in processes.items():
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, ""), name


def test_a_pause_of_the_whole_process_does_not_trip_it(tmp_path: Path) -> None:
    process = start("dog.enter('step', 7); time.sleep(1.5)", tmp_path, HVDNOISE_TIMEOUT="3")
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


def test_a_reader_that_does_not_read_cannot_stop_the_end(tmp_path: Path) -> None:
    read, write = os.pipe()
    process = start("watchdog._LAST_WORDS_SECONDS = 1.0\nos.set_blocking(2, False)\n"
                    "try:\n    while True: os.write(2, bytes(4096))\n"
                    "except BlockingIOError: os.set_blocking(2, True)\n"
                    "dog.enter('step', 7); stand_still()", tmp_path, stderr=write,
                    HVDNOISE_TIMEOUT="1")
    try:
        assert process.wait(60) == 1
    finally:
        process.kill()
        os.close(read)
        os.close(write)


def test_loader_processes_end_with_it(tmp_path: Path) -> None:
    process = start("import multiprocessing\n"
                    "child = multiprocessing.get_context('fork').Process(target=stand_still, "
                    "daemon=True)\nchild.start(); print(child.pid, flush=True)\n"
                    "dog.enter('step', 7); stand_still()", tmp_path, HVDNOISE_TIMEOUT="1")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.communicate(timeout=60)
    until = time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < until
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_without_a_watchdog_phases_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_of_process", {})
    watchdog.enter("step", 7)
    with watchdog.phase("evaluation"):
        assert watchdog.place() == "" and watchdog.current() is None
