"""A measurement from its settings to its record. All collective.

Nothing is created before the run's weights and data are there and their loss is finite.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

from hvdnoise.comm import World
from hvdnoise.measure import alignment, report, spectrum, surface
from hvdnoise.measure.config import MeasureConfig
from hvdnoise.measure.problem import Problem, draw
from hvdnoise.training import data, rerun
from hvdnoise.training.config import ConfigError, TrainConfig, flatten
from hvdnoise.training.progress import log
from hvdnoise.training.records import versions, weights_digest
from hvdnoise.training.results import make_folder
from hvdnoise.training.together import call_or_raise

T = TypeVar("T")
FORMAT = 1


def run(config: MeasureConfig, trained: TrainConfig, weights: Path, world: World,
        device: torch.device) -> int:
    """Measure, say the results and write the folder; the exit code.

    Args:
        trained: the settings of the run. weights: the file of its weights; see `rerun.find`.

    Raises:
        ConfigError: on all ranks, when there is nothing to measure.
    """
    data.prepare(trained.data, world)
    datasets, model = call_or_raise(world, lambda: rerun.restore(trained, weights, device))
    rerun.agree(datasets, trained, device, world)
    train, test = call_or_raise(world, lambda: _problems(config, datasets, model, world, device))
    before = weights_digest(train.model.state_dict())
    start = _start(train, test)
    make_folder(config.folder, world)
    log.info("%d weights; train loss %.4f  accuracy %.4f on %d images; test accuracy %.4f on %d",
             train.size, start["loss"], start["accuracy"], train.count, start["test_accuracy"],
             test.count)
    record: dict[str, Any] = {
        "format": FORMAT, "command": sys.argv,
        "time": datetime.now(timezone.utc).isoformat("T", "seconds"), "run": config.run,
        "weights": str(weights), "weights_sha256": before, "settings": flatten(config),
        "versions": versions(), "ranks": world.size, "device": device.type,
        "parameters": train.size, "examples": train.count, "test_examples": test.count, **start,
        **measure(config, train, test)}
    assert weights_digest(train.model.state_dict()) == before, "measuring has changed the weights"
    for text in report.lines(record):
        log.info("%s", text)
    call_or_raise(world, lambda: report.write(record, config.folder) if world.rank == 0 else None)
    log.info("written to %s", config.folder)
    world.barrier("measure.end")
    return 0


def measure(config: MeasureConfig, train: Problem, test: Problem) -> dict[str, Any]:
    """Everything but the facts of the run, as docs/measure.md lists it. Collective."""
    seconds: dict[str, float] = {}

    def timed(what: str, words: str, action: Callable[[], T]) -> T:
        log.info("measuring %s", words)
        begin = time.monotonic()
        result = action()
        seconds[what] = round(time.monotonic() - begin, 3)
        return result

    eigen = timed("eigenvalues", "the largest eigenvalues of the Hessian",
                  lambda: spectrum.largest(train, config.eigenvalues, config.seed))
    trace, error = timed("trace", "its trace",
                         lambda: spectrum.trace(train, eigen, config.probes, config.seed))
    aligned = timed("alignment", "how the gradient's noise lies in the curvature",
                    lambda: alignment.measure(train, config.workers))
    line = timed("line", "the loss on a line",
                 lambda: surface.line(train, config.points, config.distance, config.seed))
    plane = timed("plane", "the loss on a plane",
                  lambda: surface.plane(train, config.plane, config.distance, config.seed))
    noise = timed("noise", "accuracy under noise on the weights",
                  lambda: surface.under_noise(test, config.levels, config.draws, config.seed))
    missing = [None] * (config.eigenvalues - len(eigen.values))
    return {"hessian": {"eigenvalues": [*eigen.values, *missing],
                        "eigenvalue_errors": [*eigen.errors, *missing],
                        "products": eigen.products, "trace": trace, "trace_error": error,
                        "mean_curvature": None if trace is None else trace / train.size},
            "alignment": aligned.record(), "line": line, "plane": plane, "noise": noise,
            "seconds": seconds}


def _problems(config: MeasureConfig, datasets: data.Datasets, model: torch.nn.Module, world: World,
              device: torch.device) -> tuple[Problem, Problem]:
    """The loss on training images and on test images."""
    shares = [draw(images, config.examples, config.seed, part, world, device,
                   batch_size=config.batch_size)
              for images, part in ((datasets.train, "train"), (datasets.test, "test"))]
    train, test = (Problem(model, share, world, batch_size=config.batch_size) for share in shares)
    spectrum.check(train, config.eigenvalues)
    return train, test


def _start(train: Problem, test: Problem) -> dict[str, float]:
    """Loss and accuracy of the weights as they are."""
    ((loss, accuracy),), ((test_loss, test_accuracy),) = (
        problem.scores([problem.weights()]) for problem in (train, test))
    if not abs(loss) < float("inf"):
        raise ConfigError(f"the loss of these weights is {loss}, so there is nothing to measure: "
                          "give another --checkpoint")
    return {"loss": loss, "accuracy": accuracy, "test_loss": test_loss,
            "test_accuracy": test_accuracy}
