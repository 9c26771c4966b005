"""Whole runs of the trainer in one process, for tests."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdnoise.training import loop, progress
from hvdnoise.training import steps as of_training
from hvdnoise.training.config import TrainConfig
from hvdnoise.training.options import parse
from hvdnoise.training.validation import validate
from tests.fake_world import ThreadWorld, run_threads

TINY = ["--data.dataset", "synthetic", "--data.num_examples", "48", "--data.image_size", "8",
        "--data.batch_size", "4", "--virtual_workers", "2", "--epochs", "2", "--log_every", "2",
        "--tensorboard", "false", "--progress", "none", "--optim.lr", "0.05"]
GNC = ["--noise.kind", "gnc", "--noise.radius", "0.05"]


@pytest.fixture(autouse=True)
def speaking() -> Iterator[None]:
    """Messages reach the run's log file; the handlers of one test do not see the next."""
    progress.log.setLevel(logging.INFO)
    yield
    for handler in list(progress.log.handlers):
        progress.log.removeHandler(handler)
        handler.close()


class Never:
    """A preemption that does not come, or after so many steps."""

    def __init__(self, after: int | None = None) -> None:
        self.left, self.wanted = after, False

    def want(self) -> None:
        self.wanted = True

    def agreed(self, world: ThreadWorld) -> bool:
        if self.left is None:
            return False
        self.left -= 1
        return self.left < 0

    def wait(self) -> bool:
        return False


def train(folder: Path, *flags: str, stop_after: int | None = None, model: str = "small-cnn",
          expect: int = 0) -> dict[str, Any]:
    """One rank's run; its summary (empty when it was preempted)."""
    config = parse(TrainConfig, [*TINY, "--model", model, "--run_dir", str(folder), *flags],
                   program="hvdnoise train")
    validate(config, 1)

    def work(world: ThreadWorld) -> int:
        return loop.run(config, world, torch.device("cpu"), Never(stop_after))  # type: ignore
    assert run_threads(1, work) == [expect]
    summary = folder / "summary.json"
    return json.loads(summary.read_text()) if summary.exists() else {}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def poison(monkeypatch: Any, steps: set[int]) -> None:
    """The loss of these steps (counted from 0) is NaN for the first worker."""
    real = of_training._forward_and_backward

    def forward(job: Any, parts: Any) -> Any:
        if job.counters.step in steps:
            images, labels = parts[0]
            parts = [(images * float("nan"), labels), *parts[1:]]
        return real(job, parts)
    monkeypatch.setattr(of_training, "_forward_and_backward", forward)
