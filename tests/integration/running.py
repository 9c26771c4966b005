"""Starts `hvdnoise` as a user would, and does things to it while it runs."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable, Mapping

from tests.launcher import BIN, Ended, run_command

HVDNOISE = str(BIN / "hvdnoise")
TINY = """
data: {dataset: synthetic, num_examples: 192, image_size: 8, batch_size: 8}
model: small-cnn
epochs: 2
virtual_workers: 2
noise: {kind: gnc, radius: 0.05, source: gathered}
optim: {lr: 0.05}
log_every: 2
checkpoint: {every_steps: 5, every_epochs: 1}
tensorboard: false
"""


def hvdnoise(ranks: int, *arguments: str, launcher: str = "gloo", timeout: float = 120,
             env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Ended:
    """Run ``hvdnoise``; alone without a launcher when there is one rank."""
    options: dict[str, Any] = {} if cwd is None else {"cwd": cwd}
    return run_command(ranks, [HVDNOISE, *arguments],
                       launcher="none" if ranks == 1 else launcher, timeout=timeout, env=env,
                       **options)


def finished(ended: Ended, folder: Path) -> dict[str, Any]:
    """The summary of a run that ended well."""
    assert ended.exit_code == 0 and not ended.leftovers, ended.report()
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def steps_logged(folder: Path) -> int:
    """The last step in metrics.jsonl; 0 where there is none."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, IndexError, ValueError):
        return 0


def rank_pid(folder: Path, rank: int) -> int:
    """The newest process of a rank, from its log."""
    text = (folder / "logs" / f"rank-{rank}.log").read_text()
    return int(re.findall(rf"rank {rank}, process (\d+)", text)[-1])


def at_step(folder: Path, step: int, action: Callable[[], None], *, limit: float = 100
            ) -> threading.Thread:
    """Do ``action`` in a thread once the run in ``folder`` has logged ``step``."""
    def watch() -> None:
        until = time.monotonic() + limit
        while steps_logged(folder) < step and time.monotonic() < until:
            time.sleep(0.02)
        if steps_logged(folder) >= step:
            action()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def signal_ranks(folder: Path, number: signal.Signals, *ranks: int) -> Callable[[], None]:
    """An action: send a signal to these ranks."""
    return lambda: [os.kill(rank_pid(folder, rank), number) for rank in ranks] and None


def error_lines(output: str) -> list[str]:
    """hvdnoise's own error lines, without a launcher's tags."""
    return [line[line.index("hvdnoise: error:"):] for line in output.splitlines()
            if "hvdnoise: error:" in line]
