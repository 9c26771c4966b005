"""Real ranks: one run in a folder, ranks that agree, and a folder that goes away in mid-run."""

from __future__ import annotations

import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.running import (
    TINY,
    at_step,
    error_lines,
    finished,
    hvdnoise,
    rank_pid,
    signal_ranks,
)
from tests.launcher import Ended, run_command


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("epochs: 2", "epochs: 4"))
    return path


def train(ranks: int, folder: Path, settings: Path, *flags: str, launcher: str = "gloo") -> Ended:
    return hvdnoise(ranks, "train", "--config", str(settings), "--run_dir", str(folder),
                    "--log_every", "1", *flags, launcher=launcher)


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")
            if "checkpoints" not in path.parts}


def test_a_second_job_is_refused_and_a_killed_one_is_followed(tmp_path: Path, settings: Path
                                                              ) -> None:
    """Other flags of the second job: test_folder_lock.py; bits: test_resume.py."""
    folder, refusals = tmp_path / "run", []
    found: dict[str, Any] = {}
    flags = ["--checkpoint.every_epochs", "0", "--checkpoint.every_steps", "0", "--eval_every", "0"]

    def intrude() -> None:
        found["owner"], before = rank_pid(folder, 0), contents(folder)
        refusals.append(train(1, folder, settings, "--overwrite"))
        found["new"] = contents(folder) - before
        signal_ranks(folder, signal.SIGKILL, 0, 1)()
    watcher = at_step(folder, 8, intrude)
    ended = train(2, folder, settings, "--epochs", "100000", *flags)
    watcher.join()
    assert ended.exit_code not in (0, None) and not ended.leftovers, ended.report()
    assert found["new"] == set() and (folder / "lock-1.json").exists()
    for refused in refusals:
        (line,) = error_lines(refused.output)
        assert re.search(rf"run_dir=.* is in use by process {found['owner']} on \S+: wait", line)
        assert refused.exit_code == 2, refused.report()
    again = train(2, folder, settings, "--epochs", "1", "--resume", "auto")
    assert finished(again, folder) and not list(folder.glob("lock-*"))
    assert f"process {found['owner']} on" in again.output and "taking it over" in again.output


def images(root: Path) -> Path:
    from PIL import Image
    draws = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            for number in range(16):
                pixels = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{number}.bmp")
    return root


@pytest.mark.parametrize("launcher, variable, flags, expected", [
    ("gloo", "HOROVOD_CYCLE_TIME=3", "--eval_every 3 --run_dir other --resume auto",
     r"rank 0: environment HOROVOD_CYCLE_TIME on rank 1; eval_every on rank 1; resume on rank 1; "
     r"run_dir on rank 1; start"),
    ("mpirun", "X=1", "--data.root flipped", r"rank 0: data.train.images on rank 1; start")])
def test_ranks_that_differ_are_named(tmp_path: Path, launcher: str, variable: str, flags: str,
                                     expected: str) -> None:
    root = images(tmp_path / "images")
    shutil.copytree(root, tmp_path / "flipped")
    path = tmp_path / "flipped" / "train" / "b" / "7.bmp"
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(bytes(content))
    script = tmp_path / "differ.sh"
    script.write_text(
        "#!/bin/sh\nset -- train --data.dataset imagefolder --data.root images --data.image_size 8 "
        "--data.batch_size 4 --run_dir run\n"
        f'[ "${{HOROVOD_RANK:-$OMPI_COMM_WORLD_RANK}}" = 0 ] || set -- "$@" {flags}\n'
        f'[ "${{HOROVOD_RANK:-$OMPI_COMM_WORLD_RANK}}" = 0 ] || export {variable}\n'
        'exec hvdnoise "$@"\n')
    script.chmod(0o755)
    before = contents(tmp_path)
    ended = run_command(2, [str(script)], launcher=launcher, cwd=tmp_path)
    (line,) = error_lines(ended.output)
    assert re.search(expected, line), line
    assert ended.exit_code == (1 if launcher == "gloo" else 2) and not ended.leftovers
    assert contents(tmp_path) == before


def test_a_vanished_folder_ends_all_ranks(tmp_path: Path, settings: Path) -> None:
    folder = tmp_path / "run"
    gone: list[float] = []

    def remove() -> None:
        while folder.exists():  # also what is written meanwhile
            shutil.rmtree(folder, ignore_errors=True)
        gone.append(time.monotonic())
    at_step(folder, 4, remove)
    ended = train(2, folder, settings, "--epochs", "100000", "--checkpoint.every_steps", "0",
                  "--checkpoint.every_epochs", "0", launcher="mpirun")
    seconds = time.monotonic() - gone[0]
    assert ended.exit_code == 1 and not ended.leftovers, ended.report()
    (line,) = error_lines(ended.output)
    assert f"the run folder {folder} is gone (rank 0)" in line
    assert not folder.exists() and seconds < 60
