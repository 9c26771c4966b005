"""A data set and a model of the user's own, from training to its page, under the real launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.running import error_lines, finished, hvdnoise

MINE = """
import os, random
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

class Drawn(Dataset):
    def __init__(self, x, labels):
        self.x, self.targets = x, labels
    def __len__(self):
        return len(self.x)
    def __getitem__(self, n):
        return self.x[n] + 0.1 * (torch.randn(6) + np.random.randn() + random.random()), \
            self.targets[n]

def load(root):
    x = torch.randn(72, 6)
    labels = (x.sum(1) > 0).long() + (x[:, 0] > 1).long()
    return dict(train=Drawn(x, labels), test=(x[:30], labels[:30]), classes=3, std=2.0)

class Net(nn.Module):
    def __init__(self, classes, shape):
        super().__init__()
        self.first, self.head = nn.Linear(*shape, 8), nn.Linear(8, classes)
        self.still = nn.Linear(8, 8).requires_grad_(False)
    def forward(self, x):
        return self.head(self.still(self.first(x).tanh()))

def differs(root):
    found = load(root)
    if os.environ.get("HOROVOD_RANK") == "1":
        found["test"] = found["test"][0] + 1, found["test"][1]
    return found

def fails(root):
    if os.environ.get("HOROVOD_RANK") == "1":
        raise KeyError("rank one")
    return load(root)

def more(root):
    found = load(root)
    return {**found, "classes": 4} if os.environ.get("HOROVOD_RANK") == "1" else found
"""
SETTINGS = """
data: {dataset: mine.py:load, batch_size: 4, validation: 8}
model: mine.py:Net
epochs: 2
noise: {kind: gnc, share: 0.02}
optim: {lr: 0.1}
lr: {schedule: constant}
tensorboard: false
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "run.yaml").write_text(SETTINGS)
    return tmp_path


def test_every_command_knows_them(folder: Path) -> None:
    """Resumed with a loading process, bit for bit; scored, measured, reproduced, reported."""
    whole = finished(hvdnoise(2, "train", "--config", "run.yaml", "--run_dir", "whole",
                              cwd=folder), folder / "whole")
    start = ("train", "--config", "run.yaml", "--run_dir", "run")
    finished(hvdnoise(2, *start, "--epochs", "1", cwd=folder), folder / "run")
    summary = finished(hvdnoise(2, *start, "--resume", "auto", "--data.loader_workers", "1",
                                cwd=folder), folder / "run")
    assert (summary["steps"], summary["ranks"]) == (16, 2)
    assert summary["weights_sha256"] == whole["weights_sha256"]

    for command in (("eval", "run"), ("measure", "run"), ("reproduce", "run")):
        ended = hvdnoise(1, *command, cwd=folder)
        (line,) = error_lines(ended.output)
        assert ended.exit_code == 2 and "mine.py" in line and "--trust_plugins" in line, line
    assert sorted(path.name for path in (folder / "run").iterdir() if path.is_dir()) == [
        "checkpoints", "logs"]

    ended = hvdnoise(1, "eval", "run", "--trust_plugins", cwd=folder)
    said = f"test accuracy {summary['test_accuracy']:.4f}"
    assert ended.exit_code == 0 and said in ended.output, ended.report()
    ended = hvdnoise(1, "measure", "run", "--trust_plugins", "--points", "0", "--plane", "0",
                     "--probes", "2", "--workers", "4", cwd=folder)
    assert ended.exit_code == 0, ended.report()
    measured = json.loads((folder / "run" / "measure" / "measure.json").read_text())
    assert measured["parameters"] == 6 * 8 + 8 + 8 * 3 + 3  # what is frozen is no weight
    assert measured["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)
    ended = hvdnoise(1, "reproduce", "run", "--trust_plugins", cwd=folder)
    assert ended.exit_code == 0 and "mine.py (as recorded)" in ended.output, ended.report()
    assert f"equal: weights_sha256 {summary['weights_sha256']}" in ended.output
    ended = hvdnoise(1, "report", "run", "--out", "page", cwd=folder)
    assert ended.exit_code == 0, ended.report()
    assert "mine.py:load" in (folder / "page" / "index.html").read_text()


@pytest.mark.parametrize("function, says", [
    ("differs", "the ranks differ from rank 0: data.test.images on rank 1"),
    ("more", "the ranks differ from rank 0: data.test.facts on rank 1; data.train.facts on rank 1"),
    ("fails", "data.dataset=mine.py:fails raised KeyError: 'rank one' (line")])
def test_ranks_that_differ_are_one_line(folder: Path, function: str, says: str) -> None:
    ended = hvdnoise(2, "train", "--config", "run.yaml", "--run_dir", "run", "--data.dataset",
                     f"mine.py:{function}", cwd=folder, timeout=60)
    (line,) = error_lines(ended.output)
    assert says in line and "rank 1" in line, line
    assert ended.exit_code and not ended.leftovers, ended.report()
    assert not (folder / "run").exists()
