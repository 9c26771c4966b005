"""What a checkpoint costs, written beside the training and not; rank 0 prints it.

    horovodrun --gloo -np 2 python -m tests.checkpoint_costs MODEL STEPS ROUNDS NOISE FOLDER

Rounds of three blocks of STEPS steps: without a checkpoint, with one that the training waits for,
and with one beside it, after the first step of the block. MODEL: small-cnn, resnet18, or 100M for
one matrix of 100 million weights. NOISE: none, own or gathered. Times are medians and quartiles.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import hvdnoise
from hvdnoise.training import models
from hvdnoise.training.saver import Saver
from tests.folders import save_checkpoint

BATCH = {"100M": 8, "resnet18": 8, "small-cnn": 32}
SHAPES = {"small-cnn": (1, 28, 28), "resnet18": (3, 32, 32), "100M": (10_000,)}
MODES = ("none", "waiting", "beside")


class Costs:
    """A training of its own, in blocks."""

    def __init__(self, model: str, steps: int, noise: str, folder: Path) -> None:
        self.world, self.steps, self.step, self.folder = hvdnoise.init(), steps, 0, folder
        torch.manual_seed(0)
        shape = SHAPES[model]
        self.model = torch.nn.Linear(*shape, *shape) if model == "100M" else \
            models.build(model, 10, shape)  # type: ignore[arg-type]
        self.images = torch.randn(BATCH[model], *shape)
        self.labels = torch.zeros(BATCH[model], dtype=torch.long)
        self.optimizer: Any = hvdnoise.DistributedOptimizer(
            torch.optim.SGD(self.model.parameters(), 1e-4, momentum=0.9),
            self.model.named_parameters(),
            noise=None if noise == "none" else hvdnoise.GNC(radius=0.01, source=noise))
        self.saver = Saver(folder, self.world, keep=2)

    def block(self, mode: str) -> tuple[float, float]:
        """Seconds of the block, and those that the training stood still in."""
        self.world.barrier("block")
        began, stood = time.perf_counter(), 0.0
        for number in range(self.steps):
            self.saver.poll()
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.images), self.labels).backward()
            self.optimizer.step()
            self.step += 1
            if number == 0 and mode != "none":
                stops = time.perf_counter()
                self.save(mode)
                stood = time.perf_counter() - stops
        self.saver.wait()
        return time.perf_counter() - began, stood

    def save(self, mode: str) -> None:
        optimizer = self.optimizer.state_dict()
        own = {"noise": optimizer.pop("hvdnoise", None)}
        shared = {"model": self.model.state_dict(), "optimizer": optimizer}
        if mode == "beside":
            self.saver.start(self.step, shared, own)
        else:
            save_checkpoint(self.folder / "checkpoints", self.step, shared, own, self.world, keep=2)


def main() -> None:
    """Measure and print."""
    model, steps, rounds, noise, folder = sys.argv[1:]
    costs = Costs(model, int(steps), noise, Path(folder))
    if costs.world.rank == 0:
        (costs.folder / "checkpoints").mkdir(parents=True)
    costs.world.barrier("folder")
    for mode in MODES:
        costs.block(mode)
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for _ in range(int(rounds)):
        for mode in MODES:
            found[mode].append(costs.block(mode))
    if costs.world.rank:
        return
    plain = [seconds for seconds, _ in found["none"]]
    size = sum(file.stat().st_size
               for file in max((costs.folder / "checkpoints").iterdir()).iterdir())
    print(f"{model}, noise {noise}: a step {1e3 * statistics.median(plain) / costs.steps:.0f} ms, "
          f"a checkpoint {size / 1e6:.1f} MB")
    for mode in MODES[1:]:
        more = [1e3 * (took - base) for (took, _), base in zip(found[mode], plain)]
        low, middle, high = statistics.quantiles(more, n=4)
        stood = 1e3 * statistics.median(stood for _, stood in found[mode])
        print(f"  {mode}: {middle:.0f} [{low:.0f}, {high:.0f}] ms a checkpoint, "
              f"of which the training stands still for {stood:.0f}")


if __name__ == "__main__":
    main()
