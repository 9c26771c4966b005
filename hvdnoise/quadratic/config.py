"""The settings, and what makes them right or wrong before anything is started."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hvdnoise import extras
from hvdnoise.quadratic.cases import Case, known
from hvdnoise.quadratic.problem import Problem
from hvdnoise.quadratic.theory import growth
from hvdnoise.training.config import ConfigError
from hvdnoise.training.errors import one_line_errors
from hvdnoise.training.validation import require, require_folder

WORKERS = 8
FILE = "quadratic.json"


@dataclass(frozen=True)
class QuadraticConfig:
    """Check every noise against exact second moments on a convex quadratic; exit code 1 and the
    noise's name when one of them differs.

    Args:
        structures: names with commas between, as full-workers,gnc-own; or all.
        learning_rate: of SGD; with momentum m it is (1 - m) times that.
        momentum: of the runs with momentum; 0: there are none.
        batch_size: examples of each worker and step.
        emulated_batch: of covariance noise, less than the whole batch.
        virtual_workers: workers that each rank stands for; default: so many that there are 8.
        replicas: independent runs of each noise.
        steps: of each run.
        false_alarm: the chance that a correct program fails, all noises together.
        regression: also train the regression in two dimensions.
        seed: of data and noise.
        threads: of each rank; default: OMP_NUM_THREADS, else the cores shared out.
        progress: bar, lines or none on the terminal; auto: a bar where there is a terminal.
        out: folder for quadratic.json, table.md and figure.png.
        overwrite: replace what an earlier command wrote there.
    """

    structures: str = "all"
    learning_rate: float = 0.6
    momentum: float = 0.5
    batch_size: int = 2
    emulated_batch: int = 4
    virtual_workers: int | None = None
    replicas: int = 24
    steps: int = 8
    false_alarm: float = 1e-4
    regression: bool = True
    seed: int = 0
    threads: int | None = None
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    out: str | None = None
    overwrite: bool = False

    def problem(self, ranks: int) -> Problem:
        """The problem without momentum, on so many ranks."""
        virtual = self.virtual_workers or -(-WORKERS // ranks)
        return Problem(self.learning_rate, 0.0, ranks * virtual, self.batch_size,
                       self.emulated_batch)

    def with_momentum(self, problem: Problem) -> Problem:
        """The same with momentum."""
        return replace(problem, momentum=self.momentum,
                       learning_rate=(1 - self.momentum) * self.learning_rate)


# What may differ between the ranks, as it changes nothing that they agree on.
FREE = ("threads", "progress", "out", "overwrite")


@one_line_errors()
def validate(config: QuadraticConfig, ranks: int) -> list[Case]:
    """Check the settings as a whole; the cases to run.

    Raises:
        ConfigError: one line with the value that is wrong and the remedy.
    """
    for name, least in (("batch_size", 1), ("emulated_batch", 1), ("replicas", 8), ("steps", 8),
                        ("seed", 0)):
        value = getattr(config, name)
        require(value >= least, name, value, f"give {least} or more")
    for name in ("threads", "virtual_workers"):
        value = getattr(config, name)
        require(value is None or value >= 1, name, value, "give 1 or more")
    require(0 <= config.momentum < 1, "momentum", config.momentum, "give 0 <= m < 1")
    require(1e-12 <= config.false_alarm <= 0.1, "false_alarm", config.false_alarm,
            "give 1e-12 to 0.1")
    require(0 < config.learning_rate < math.inf, "learning_rate", config.learning_rate,
            "give a number above 0")
    cases, problem = _cases(config.structures), config.problem(ranks)
    require(problem.workers >= 2, "virtual_workers", config.virtual_workers,
            "the noises need 2 workers; give 2 or more, or start more ranks")
    require(config.emulated_batch < problem.batch, "emulated_batch", config.emulated_batch,
            f"give less than {problem.batch}, the whole batch ({problem.workers} workers of "
            f"{config.batch_size}), or a larger batch_size")
    _check_stable(config, problem, cases)
    if config.out is not None:
        extras.require("--out", "matplotlib")
        require_folder(Path(config.out), FILE, "such results", overwrite=config.overwrite)
    require(config.out is not None or not config.overwrite, "overwrite", "true",
            "it goes with --out")
    return cases


def _cases(structures: str) -> list[Case]:
    cases, names = known(), [name.strip() for name in structures.split(",")]
    if names == ["all"]:
        return list(cases.values())
    for name in names:
        near = difflib.get_close_matches(name, cases, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"give all, or some of {', '.join(cases)}"
        require(name in cases, "structures", repr(name), remedy)
    return [cases[name] for name in dict.fromkeys(names)]


def _check_stable(config: QuadraticConfig, problem: Problem, cases: list[Case]) -> None:
    problems = [problem, config.with_momentum(problem)]
    for case in cases:
        multiplies = case.law(problem).multiplies
        if any(growth(each, multiplies) >= 1 for each in problems):
            raise ConfigError(
                f"learning_rate={config.learning_rate} is wrong: {case.name} diverges with it "
                f"(momentum {config.momentum}, emulated_batch {config.emulated_batch}); give less")
