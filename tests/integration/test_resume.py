"""Runs that are killed or preempted end in the bits of the run that nobody touched."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Callable

import psutil
import pytest

from tests.integration.running import TINY, at_step, finished, hvdnoise, rank_pid, signal_ranks
from tests.launcher import Ended

LAUNCHERS = ("gloo", "mpirun")
Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "long.yaml"
    # BatchNorm, so that ranks have state of their own; 24 steps, 6 an epoch
    path.write_text(TINY.replace("epochs: 2", "epochs: 4").replace("small-cnn", "resnet20"))
    return path


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, settings: Path) -> dict[str, Any]:
    """By launcher: the summary of the uninterrupted run."""
    found = {}
    for launcher in LAUNCHERS:
        folder = tmp_path_factory.mktemp(launcher) / "run"
        found[launcher] = finished(train(folder, settings, launcher), folder)
    return found


def train(folder: Path, settings: Path, launcher: str, *flags: str) -> Ended:
    return hvdnoise(2, "train", "--config", str(settings), "--run_dir", str(folder), "--log_every",
                    "1", *flags, launcher=launcher)


def resumed(folder: Path, settings: Path, launcher: str) -> dict[str, Any]:
    return finished(train(folder, settings, launcher, "--resume", "auto"), folder)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigkill_in_mid_epoch(tmp_path: Path, settings: Path, untouched: dict[str, Any],
                              launcher: str) -> None:
    folder = tmp_path / "run"
    at_step(folder, 8, signal_ranks(folder, signal.SIGKILL, 1))
    ended = train(folder, settings, launcher)
    assert ended.exit_code not in (0, None) and not ended.leftovers, ended.report()
    assert not (folder / "summary.json").exists()
    assert resumed(folder, settings, launcher)["weights_sha256"] == \
        untouched[launcher]["weights_sha256"]


@pytest.mark.parametrize("launcher, flags", [
    ("gloo", "--noise.lag 2 --exchange transpose --noise_precision bf16"),
    ("mpirun", "--noise.lag 2 --exchange allgather"), ("gloo", "--exchange gather-only")])
def test_sigkill_with_mixtures_on_their_way(tmp_path: Path, settings: Path, launcher: str,
                                            flags: str) -> None:
    """The state of noise that mixes all workers' deviations is saved whole, under every plan."""
    options = ["--noise.source", "gathered", *flags.split()]
    whole = finished(train(tmp_path / "whole", settings, launcher, *options), tmp_path / "whole")
    folder = tmp_path / "run"
    at_step(folder, 8, signal_ranks(folder, signal.SIGKILL, 1))
    ended = train(folder, settings, launcher, "--checkpoint.every_steps", "3", *options)
    assert ended.exit_code not in (0, None) and not ended.leftovers, ended.report()
    again = finished(train(folder, settings, launcher, "--resume", "auto",
                           "--checkpoint.every_steps", "3", *options), folder)
    assert again["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_sigterm_is_agreed_on_saved_and_resumed(tmp_path: Path, settings: Path, launcher: str,
                                                untouched: dict[str, Any], ranks: tuple[int, ...]
                                                ) -> None:
    folder = tmp_path / "run"
    at_step(folder, 8, signal_ranks(folder, signal.SIGTERM, *ranks))
    ended = train(folder, settings, launcher, "--checkpoint.every_steps", "0")
    # horovodrun turns every code into 1, and says which one it was
    assert ended.exit_code == (75 if launcher == "mpirun" else 1), ended.report()
    assert "Exit code: 75" in ended.output or launcher == "mpirun"
    assert not ended.leftovers and "SIGTERM: saved at step" in ended.output
    stopped = json.loads((folder / "preempted.json").read_text())["step"]
    assert 8 <= stopped < 24
    assert (folder / "checkpoints" / f"step-{stopped:08d}").is_dir()
    assert resumed(folder, settings, launcher)["weights_sha256"] == \
        untouched[launcher]["weights_sha256"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_to_the_launcher_saves(tmp_path: Path, settings: Path, launcher: str) -> None:
    """horovodrun gives its ranks 5 s to save; mpirun passes SIGTERM on after as many seconds as it
    then gives them (1, unless odls_base_sigkill_timeout says otherwise)."""
    folder = tmp_path / "run"

    def stop() -> None:
        above = psutil.Process(rank_pid(folder, 0)).parents()
        program = "horovodrun" if launcher == "gloo" else "mpirun"
        starters = [each for each in above if any(program in part for part in each.cmdline())]
        os.kill(starters[-1].pid, signal.SIGTERM)
    at_step(folder, 8, stop)
    ended = hvdnoise(2, "train", "--config", str(settings), "--run_dir", str(folder),
                     "--log_every", "1", "--epochs", "1000", launcher=launcher,
                     env={"OMPI_MCA_odls_base_sigkill_timeout": "4"})
    assert ended.exit_code not in (0, None) and not ended.leftovers, ended.report()
    assert (folder / "preempted.json").exists(), ended.report()


def test_a_second_sigterm_ends_at_once(tmp_path: Path, settings: Path) -> None:
    """Rank 0 stands still, so rank 1 cannot reach an agreement; its second SIGTERM ends it."""
    folder = tmp_path / "run"

    def act() -> None:
        stopped, other = rank_pid(folder, 0), rank_pid(folder, 1)
        os.kill(stopped, signal.SIGSTOP)
        os.kill(other, signal.SIGTERM)
        time.sleep(2)
        os.kill(other, signal.SIGTERM)
        for _ in range(50):
            if not psutil.pid_exists(other):
                gone.append(other)
                break
            time.sleep(0.1)
        os.kill(stopped, signal.SIGCONT)
    gone: list[int] = []
    watcher = at_step(folder, 4, act)
    ended = train(folder, settings, "gloo")
    watcher.join()
    assert ended.exit_code not in (0, None) and not ended.leftovers, ended.report()
    assert "second SIGTERM: ending at once" in ended.output and gone


def test_another_number_of_ranks_is_refused_unless_asked_for(tmp_path: Path, settings: Path
                                                             ) -> None:
    folder = tmp_path / "run"
    finished(hvdnoise(1, "train", "--config", str(settings), "--run_dir", str(folder), "--epochs",
                      "1"), folder)
    ended = train(folder, settings, "gloo", "--resume", "auto", "--epochs", "2")
    assert ended.exit_code == 1 and "Exit code: 2" in ended.output, ended.report()
    assert "cannot resume on 2 ranks x 2 virtual workers" in ended.output
    ended = train(folder, settings, "gloo", "--resume", "auto", "--epochs", "2", "--resume_resize")
    assert finished(ended, folder)["ranks"] == 2
