"""Users' script synthetic_benchmark.py under the launchers: as it is, and with two lines changed.

The change is the one that README.md asks for: an import more, and one line with another wrapper.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.launcher import run_command
from tests.parallel.toys import same_bits

SCRIPT = Path(__file__).with_name("synthetic_benchmark.py")
IMPORT = "import horovod.torch as hvd\n"
LINE = "optimizer = hvd.DistributedOptimizer(optimizer,\n"
SMALL = ["--no-cuda", "--model", "resnet18", "--batch-size", "2", "--image-size", "64",
         "--num-warmup-batches", "1", "--num-iters", "2", "--num-batches-per-iter", "2"]
SECONDS = 180


def with_noise(folder: Path, noise: str) -> Path:
    """The script with one import and one line changed."""
    text = SCRIPT.read_text()
    assert text.count(IMPORT) == text.count(LINE) == 1
    changed = folder / "with_noise.py"
    changed.write_text(text.replace(IMPORT, IMPORT + "import hvdnoise\n").replace(
        LINE, f"optimizer = hvdnoise.DistributedOptimizer(optimizer, noise={noise},\n"))
    return changed


def run(launcher: str, script: Path, folder: Path) -> list[Tensor]:
    """The weights at the end, the same on both ranks."""
    command = [sys.executable, str(script), *SMALL, "--save", str(folder)]
    ended = run_command(2, command, launcher=launcher, timeout=SECONDS, cwd=folder)
    assert not ended.verdict(), ended.report()
    for text, times in {"model resnet18, 2 images a step on each of 2 CPUs": 1, "iteration 0: ": 1,
                        "iteration 1: ": 1, "one CPU: ": 1, "2 CPUs: ": 1,
                        "images/s": 4}.items():
        assert ended.output.count(text) == times, (text, ended.output)
    first, second = (torch.load(folder / f"weights-{rank}.pt", weights_only=True)
                     for rank in range(2))
    assert len(first) == 62 and all(bool(weight.isfinite().all()) for weight in first)
    assert same_bits(first, second), "the ranks differ"
    return list(first)


@pytest.fixture(params=["gloo", "mpi"], scope="module")
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
          ) -> Iterator[tuple[str, list[Tensor]]]:
    """The launcher, and the weights of the script as it is."""
    yield request.param, run(request.param, SCRIPT, tmp_path_factory.mktemp("plain"))


def test_without_noise_as_horovod(plain: tuple[str, list[Tensor]], tmp_path: Path) -> None:
    launcher, weights = plain
    assert same_bits(run(launcher, with_noise(tmp_path, "None"), tmp_path), weights)


def test_gnc(plain: tuple[str, list[Tensor]], tmp_path: Path) -> None:
    launcher, weights = plain
    noisy = run(launcher, with_noise(tmp_path, "hvdnoise.GNC(radius=0.05)"), tmp_path)
    assert not same_bits(noisy, weights)
    difference = torch.cat([(a - b).flatten() for a, b in zip(noisy, weights, strict=True)])
    assert difference.norm() < 0.1 * torch.cat([each.flatten() for each in weights]).norm()
