"""The chain of processes that started a rank: which belong to its launcher, and which are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvdnoise import ancestors
from hvdnoise.ancestors import first_gone, is_launcher, of_launch
from tests.quick import BARE_PACKAGE

RANK = ["/venv/bin/python", "/venv/bin/hvdnoise", "train"]
SHELL = ["-bash"]
TREES = {  # from the topmost down to the rank's parent -> how many of the lowest are the launcher's
    "alone": ([["systemd"], ["sshd: me@pts/0"], SHELL], 0),
    "mpirun": ([SHELL, ["/venv/bin/mpirun", "-np", "2", "hvdnoise"]], 1),
    "script": ([["tmux"], SHELL, ["bash", "launch/mpirun.sh", "--"], ["mpirun", "-np", "2"]], 2),
    "horovodrun": ([SHELL, ["/venv/bin/python", "/venv/bin/horovodrun", "-np", "2"],
                    ["/venv/bin/python", "-c", "from multiprocessing.spawn import spawn_main"],
                    ["/bin/sh", "-c", "env HOROVOD_RANK=0 hvdnoise train"]], 3),
    "study": ([["python", "-m", "hvdnoise", "study", "a.yaml"],
               ["python", "-I", "-S", "/x/study/guard.py", "runs/a", "mpirun"], ["mpirun"]], 2),
    "supervisor": ([SHELL, ["python", "-m", "hvdnoise", "launch", "-np", "2"], ["mpirun"]], 2),
    "supervisor's script": ([SHELL, [*RANK[:2], "launch", "-np", "2"], ["mpirun"]], 2),
    "own script": ([SHELL, ["bash", "job.sh"], ["mpirun"]], 1),
    "one string": ([["bash", "-c", "mpirun -np 2 hvdnoise train --run_dir a/mpirun"], SHELL], 0),
    "daemon": ([["sshd: me@notty"], ["/venv/bin/orted", "-mca"]], 1),
    "slurm": ([["slurmd"], ["slurmstepd: [12.batch]"], ["/bin/bash", "/var/slurm_script"],
               ["bash", "launch/mpirun.sh"], ["mpirun"]], 4),
    "hydra": ([SHELL, ["mpiexec.hydra", "-n", "2"], ["/usr/bin/hydra_pmi_proxy"]], 2),
}
REMOTE = {
    "ssh": ([["sshd: /usr/sbin/sshd"], ["sshd: me@notty"], ["bash", "-c", "cd /x"],
             ["sh", "-c", "env HOROVOD_RANK=1"]], 3),
    "login": ([["sshd: me@pts/0"], SHELL], 0),
}


def proc_of(folder: Path, tree: list[list[str]]) -> Path:
    """A /proc of the tree's processes, 100, 101, ..., and the rank below."""
    for place, words in enumerate([*tree, RANK]):
        one = folder / str(100 + place)
        one.mkdir(parents=True)
        (one / "cmdline").write_bytes("\0".join(words).encode() + b"\0")
        parent = 99 + place if place else 1
        write_state(one, "S", parent, 5000 + place)
    return folder


def write_state(one: Path, state: str, parent: int, started: int) -> None:
    numbers = " ".join(["0"] * 17)
    (one / "stat").write_text(f"{one.name} (a) b) {state} {parent} {numbers} {started} 0 0\n")


@pytest.mark.parametrize("name", TREES)
def test_which_ancestors_belong_to_the_launcher(name: str, tmp_path: Path) -> None:
    tree, expected = TREES[name]
    proc = proc_of(tmp_path, tree)
    chain = of_launch(100 + len(tree), proc)
    assert [each.pid for each in chain] == [99 + len(tree) - n for n in range(expected)]


@pytest.mark.parametrize("name", REMOTE)
def test_of_ranks_that_ssh_started(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                   ) -> None:
    tree, expected = REMOTE[name]
    proc = proc_of(tmp_path, tree)
    assert of_launch(100 + len(tree), proc) == []
    monkeypatch.setattr(ancestors, "launched", lambda: True)
    assert len(of_launch(100 + len(tree), proc)) == expected


@pytest.mark.parametrize("change", ["gone", "zombie", "another"])
def test_an_ancestor_that_is_gone(change: str, tmp_path: Path) -> None:
    tree, _ = TREES["horovodrun"]
    proc = proc_of(tmp_path, tree)
    chain = of_launch(104, proc)
    assert first_gone(chain, proc) is None
    write_state(proc / "101", "T", 1, 5001)  # stopped, and of another parent: still there
    assert first_gone(chain, proc) is None
    if change == "gone":
        (proc / "101" / "stat").unlink()
    else:
        write_state(proc / "101", "Z" if change == "zombie" else "S", 1,
                    5001 + (change == "another"))
    gone = first_gone(chain, proc)
    assert gone is not None and gone.pid == 101


def test_what_is_no_launcher() -> None:
    for words in ([], ["vim", "mpirun"], ["hvdnoise", "train"], ["python", "-c", "mpirun"],
                  ["timeout", "9", "mpirun"], ["bash"], ["ssh", "node", "mpirun"]):
        assert not is_launcher(words), words


# ---- real processes

PROGRAM = BARE_PACKAGE + """
import os, sys, time
from hvdnoise import watchdog
watchdog.ORPHAN_SECONDS = 1.0
dog = watchdog.begin(0, 1)
if sys.argv[1] == "ask":
    dog.ask = lambda: open(sys.argv[2] + ".asked", "w").close()
open(sys.argv[2], "w").write(str(os.getpid()))
time.sleep(100)
"""


def start(tmp_path: Path, launcher: str, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """A shell, named as a launcher or not, and a watched process below it: its number."""
    script, program = tmp_path / launcher, tmp_path / "program.py"
    program.write_text(PROGRAM)
    script.write_text(f'"{sys.executable}" "{program}" "$@"; exit $?\n')
    shell = subprocess.Popen(["bash", str(script), *arguments, str(tmp_path / "pid")],
                             stderr=(tmp_path / "said").open("w"))
    until = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    return shell, int((tmp_path / "pid").read_text())


def ends(pid: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("way", ["ask", "alone"])
def test_a_process_whose_launcher_is_killed_ends(tmp_path: Path, way: str) -> None:
    shell, pid = start(tmp_path, "mpirun", way)
    try:
        shell.kill()
        shell.wait()
        assert ends(pid, 30)
    finally:
        shell.kill()
        if not ends(pid, 0.1):
            os.kill(pid, signal.SIGKILL)
    said = (tmp_path / "said").read_text()
    assert "hvdnoise: rank 0" in said and "its launcher is gone (bash, process " in said
    assert (tmp_path / "pid.asked").exists() == (way == "ask")


def test_a_shell_that_is_killed_is_no_launcher(tmp_path: Path) -> None:
    shell, pid = start(tmp_path, "my-own-script", "alone")
    try:
        shell.kill()
        shell.wait()
        assert not ends(pid, 4)
    finally:
        os.kill(pid, signal.SIGKILL)
    assert (tmp_path / "said").read_text() == ""
