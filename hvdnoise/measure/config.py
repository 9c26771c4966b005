"""The settings of a measurement, and what makes them right or wrong before anything is started."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvdnoise.training.errors import one_line_errors
from hvdnoise.training.validation import require, require_device, require_folder


@dataclass(frozen=True)
class MeasureConfig:
    """Measure the sharpness of a run's weights, and the loss and the accuracy around them.

    Args:
        run: the run's folder.
        checkpoint: final, best, ema, or the path of a checkpoint or of saved weights.
        data_root: folder of the data sets; default: as the run had it.
        trust_plugins: import the functions that the run names as data set and model. They are code:
            look at them first.
        device: auto takes the GPU of the local rank where there is one.
        threads: of each rank; default: OMP_NUM_THREADS, else the cores shared out.
        examples: use at most so many training images, and as many test images; drawn by the seed.
        batch_size: images at a time, of each rank; changes memory and speed only.
        eigenvalues: how many of the Hessian's largest; 0 leaves them out.
        probes: random vectors for the trace of the Hessian; 0 leaves it out.
        workers: equal parts of the images whose gradients give the noise; 0 leaves it out.
        points: of the line, odd; 0 leaves it out.
        plane: points of each side of the plane, odd; 0 leaves it out.
        distance: how far line and plane reach to both sides, in lengths of the filters.
        levels: of noise on the weights, in lengths of the filters; [] leaves it out.
        draws: of the noise at each level.
        seed: of images, probes, directions and noise.
        out: folder for measure.json and figures; default: RUN/measure.
        overwrite: replace an earlier measurement there.
    """

    run: str = ""
    checkpoint: str = "final"
    data_root: str | None = None
    trust_plugins: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    examples: int = 512
    batch_size: int = 128
    eigenvalues: int = 3
    probes: int = 16
    workers: int = 16
    points: int = 21
    plane: int = 9
    distance: float = 1.0
    levels: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    draws: int = 5
    seed: int = 0
    out: str | None = None
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(self.run) / "measure" if self.out is None else Path(self.out)


# What may differ between the ranks, as it changes nothing that they agree on.
FREE = ("device", "threads", "data_root", "out", "overwrite")


@one_line_errors()
def validate(config: MeasureConfig) -> None:
    """Check the settings as a whole; that the run is there is `rerun.find`'s to see.

    Raises:
        ConfigError: one line with the value that is wrong and the remedy.
    """
    for name, least in (("examples", 1), ("batch_size", 1), ("eigenvalues", 0), ("probes", 0),
                        ("workers", 0), ("points", 0), ("plane", 0), ("draws", 1), ("seed", 0)):
        value = getattr(config, name)
        require(value >= least, name, value, f"give {least} or more")
    require(config.threads is None or config.threads >= 1, "threads", config.threads,
            "give 1 or more")
    require(config.workers <= config.examples, "workers", config.workers,
            f"each has at least one of the {config.examples} examples; lower it, or raise examples")
    for name in ("points", "plane"):
        value = getattr(config, name)
        require(value == 0 or value >= 3 and value % 2 == 1, name, value,
                "give an odd number from 3 on, so that the weights are in the middle, or 0 to "
                "leave it out")
    require(0 < config.distance < math.inf, "distance", config.distance,
            "give a number above 0")
    for level in config.levels:
        require(0 <= level < math.inf, "levels", list(config.levels),
                f"{level} is no size of noise; give finite numbers >= 0")
    require_device(config.device)
    require_folder(config.folder, "measure.json", "a measurement", overwrite=config.overwrite)
