"""`hvdnoise reproduce` with real ranks: runs that were interrupted, and reproductions that are."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Callable

import psutil
import pytest

from tests.integration.running import TINY, at_step, finished, hvdnoise, signal_ranks, steps_logged

pytestmark = [pytest.mark.parallel]


def interrupted(folder: Path, launcher: str, number: signal.Signals) -> str:
    """A run that a signal ended, and that was gone on with; the digest of its weights."""
    settings = folder.parent / "settings.yaml"
    settings.write_text(TINY.replace("epochs: 2", "epochs: 4").replace("log_every: 2",
                                                                       "log_every: 1"))
    command = ["train", "--config", str(settings), "--run_dir", str(folder)]
    at_step(folder, 8, signal_ranks(folder, number, 1))
    ended = hvdnoise(2, *command, launcher=launcher)
    assert ended.exit_code != 0 and not ended.leftovers, ended.report()
    summary = finished(hvdnoise(2, *command, "--resume", "auto", launcher=launcher), folder)
    assert "resumed at step" in (folder / "logs" / "rank-0.log").read_text()
    assert len(summary["starts"]) == 1  # it went on where nothing is another
    return str(summary["weights_sha256"])


def test_after_sigkill_under_gloo(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    digest = interrupted(folder, "gloo", signal.SIGKILL)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ended = hvdnoise(1, "reproduce", str(folder), "--out", str(tmp_path / "again"))
    assert ended.exit_code == 0 and not ended.leftovers, ended.report()
    assert "nothing that is recorded differs" in ended.output, ended.output
    assert f"equal: weights_sha256 {digest}" in ended.output, ended.output
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    again = json.loads((tmp_path / "again" / "environment.json").read_text())
    assert (again["ranks"], again["transport"]) == (2, "gloo")


def once_it_trains(folder: Path, action: Callable[[psutil.Process], None]) -> threading.Thread:
    """Do something to `hvdnoise reproduce` when its ranks have logged a step."""
    def watch() -> None:
        until = time.monotonic() + 100
        while steps_logged(folder) < 1 and time.monotonic() < until:
            time.sleep(0.02)
        pid = int((folder / "logs" / "rank-0.log").read_text().split("process ")[1].split()[0])
        action(next(each for each in psutil.Process(pid).parents() if "reproduce" in each.cmdline()
                    and not any("guard.py" in word for word in each.cmdline())))
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.timeout(300)
def test_after_sigterm_under_mpi_and_itself_ended(tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "run" / "reproduced"
    digest = interrupted(folder, "mpirun", signal.SIGTERM)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("epochs: 4.0", "epochs: 10000.0"))
    for number in (signal.SIGKILL, signal.SIGTERM):  # it never ends by itself
        watcher = once_it_trains(out, lambda process: os.kill(process.pid, number))
        ended = hvdnoise(1, "reproduce", str(folder), "--overwrite")
        watcher.join()
        assert ended.exit_code == (-9 if number == signal.SIGKILL else 128 + number)
        assert not ended.leftovers, ended.report()
        assert number == signal.SIGKILL or "nothing is left running" in ended.output
        (out / "metrics.jsonl").unlink()
    (folder / "config.yaml").write_text(text)
    ended = hvdnoise(1, "reproduce", str(folder), "--overwrite")
    assert ended.exit_code == 0 and f"equal: weights_sha256 {digest}" in ended.output, \
        ended.report()
    assert json.loads((out / "environment.json").read_text())["transport"] == "mpi"
