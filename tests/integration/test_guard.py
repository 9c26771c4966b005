"""A NaN on one of two real ranks, and damaged weights: `hvdnoise` as a user starts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.integration.running import TINY, error_lines, finished, hvdnoise

# a rank's images are NaN in one step
NAN = """
from hvdnoise.training import steps
real = steps._forward_and_backward

def forward(job, parts):
    if job.counters.step == 3 and job.world.rank == 1:
        parts = [parts[0], (parts[1][0] * float("nan"), parts[1][1])]
    return real(job, parts)
steps._forward_and_backward = forward
"""
# nothing of that step is computed
SKIPPED = """
import torch
from hvdnoise.training import steps
real = steps._update

def update(job, parts):
    return (torch.ones(3), False) if job.counters.step == 3 else real(job, parts)
steps._update = update
"""
SETTINGS = TINY.replace("epochs: 2", "epochs: 1").replace("source: gathered", "source: own") + """
norm: batch
ema: 0.9
plugins: [fault.py]
"""


def run(tmp_path: Path, name: str, plugin: str, launcher: str) -> tuple[dict[str, Any], str]:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "fault.py").write_text(plugin)
    (folder / "settings.yaml").write_text(SETTINGS)
    ended = hvdnoise(2, "train", "--config", "settings.yaml", "--run_dir", "run", cwd=folder,
                     launcher=launcher)
    return finished(ended, folder / "run"), ended.output


def test_a_step_with_a_nan_on_one_rank_leaves_no_trace(tmp_path: Path) -> None:
    expected, _ = run(tmp_path, "skipped", SKIPPED, "gloo")
    for launcher in ("gloo", "mpirun"):
        summary, output = run(tmp_path, launcher, NAN, launcher)
        assert "step 4 was not taken" in output and "of worker 3 on rank 1" in output
        assert (summary["bad_steps"], summary["last_bad_step"]) == (1, 4)
        assert summary["bad_workers"] == {"rank 1, worker 3": 1}
        for key in ("weights_sha256", "weights_ema_sha256", "test_loss"):
            assert summary[key] == expected[key], (launcher, key)
        weights = torch.load(tmp_path / launcher / "run" / "weights.pt", weights_only=True)
        assert all(bool(each.isfinite().all()) for each in weights.values())
    _damaged_weights_are_refused(tmp_path / "gloo" / "run")


def _damaged_weights_are_refused(folder: Path) -> None:
    content = bytearray((folder / "weights.pt").read_bytes())
    content[len(content) // 2] ^= 16
    (folder / "weights.pt").write_bytes(content)
    ended = hvdnoise(1, "eval", str(folder))
    (line,) = error_lines(ended.output)
    assert ended.exit_code == 2 and "weights.pt does not have the SHA-256" in line
    assert "accuracy" not in ended.output and "Traceback" not in ended.output


def test_weights_that_are_not_finite_end_two_ranks(tmp_path: Path) -> None:
    """The last line names step, tensor and rank; the checkpoint from before is finite."""
    fault = """
import torch
from hvdnoise.training import loop
real = loop.take_step

def take_step(job, *arguments):
    if job.counters.step == 4 and job.world.rank == 1:
        with torch.no_grad():
            list(job.model.parameters())[2][0] = float("-inf")
    real(job, *arguments)
loop.take_step = take_step
"""
    (tmp_path / "fault.py").write_text(fault)
    (tmp_path / "settings.yaml").write_text(SETTINGS.replace("every_steps: 5", "every_steps: 2"))
    ended = hvdnoise(2, "train", "--config", "settings.yaml", "--run_dir", "run", cwd=tmp_path,
                     launcher="mpirun")
    assert ended.exit_code == 1 and not ended.leftovers, ended.report()
    (line,) = error_lines(ended.output)
    assert "the weight 2.bias of rank 1 is not finite at step 5" in line
    shared = torch.load(tmp_path / "run" / "checkpoints" / "step-00000004" / "shared.pt",
                        weights_only=True)
    assert all(bool(each.isfinite().all()) for each in shared["model"].values())
