"""All of it in its order: check every case, train the regression, write, say what disagrees."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import sys
import time
import warnings
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any, Iterator, TypeVar

import torch

from hvdnoise import comm, streams
from hvdnoise.quadratic import checks, figure, regression, report
from hvdnoise.quadratic.cases import Case, without_formula
from hvdnoise.quadratic.checks import Check
from hvdnoise.quadratic.config import QuadraticConfig
from hvdnoise.training import process
from hvdnoise.training.config import flatten
from hvdnoise.training.progress import Progress, log
from hvdnoise.training.records import versions
from hvdnoise.training.results import finite, make_folder

T = TypeVar("T")


def run(config: QuadraticConfig, cases: list[Case], world: comm.World) -> int:
    """Measure, print the table, write the folder; the exit code, 1 where a noise disagrees.

    Collective. Every rank computes the same; rank 0 decides, prints and writes.
    """
    make_folder(None if config.out is None else Path(config.out), world)
    started = time.monotonic()
    bar = Progress(config.progress, rank=world.rank, total=_runs(config, cases), done=0)
    with _quietly():
        found = list(_all_checks(config, cases, world, bar))
        paths = list(_all_paths(config, world, bar))
    bar.close()
    record: dict[str, Any] = {
        "command": sys.argv, "time": datetime.now(timezone.utc).isoformat("T", "seconds"),
        "settings": flatten(config), "versions": versions(), "ranks": world.size,
        "threads": torch.get_num_threads(), "seconds": time.monotonic() - started,
        "problem": report.facts(config.problem(world.size)),
        "without_formula": without_formula(),
        "checks": finite([dataclasses.asdict(check) for check in found]),
        "frobenius": report.frobenius(config.problem(world.size), found),
        "regression": regression.results(paths) if paths else [],
        "diagonal_faster": regression.faster(paths) if paths else None}
    if world.rank == 0:
        print(report.text(record), flush=True)
        if config.out is not None:
            report.write(record, Path(config.out))
            figure.draw(record, paths, Path(config.out) / "figure.png")
            print(f"written to {config.out}", flush=True)
    wrong = world.gather_json(report.disagreement(record), name="quadratic.verdict")[0]
    return process.fail_together(wrong, world, process.EXIT_FAILED) if wrong else 0


def _runs(config: QuadraticConfig, cases: list[Case]) -> int:
    of_cases = sum(2 if case.on_weights or config.momentum else 1 for case in cases)
    ways = len(regression.ways()) if config.regression else 0
    return config.replicas * of_cases + regression.RUNS * ways


def _all_checks(config: QuadraticConfig, cases: list[Case], world: comm.World, bar: Progress
                ) -> Iterator[Check]:
    problem = config.problem(world.size)
    intervals = sum(checks.count(case, bool(config.momentum)) for case in cases)
    options: dict[str, Any] = dict(replicas=config.replicas, steps=config.steps,
                                   false_alarm=config.false_alarm / intervals)
    seeds = (streams.seed_for(config.seed, "quadratic", number) for number in count())
    for case in cases:
        _forget()
        found = _last(checks.quadratic(case, problem, world, seeds, **options), bar)
        if case.on_weights:
            found += _last(checks.smoothing(case, problem, world, seeds, **options), bar)
        elif config.momentum:
            with_momentum = config.with_momentum(problem)
            found += _last(checks.quadratic(case, with_momentum, world, seeds, **options), bar)
        _show(bar, report.outcome(case.name, found))
        yield from found


def _all_paths(config: QuadraticConfig, world: comm.World, bar: Progress
               ) -> Iterator[regression.Paths]:
    problem = config.problem(world.size)
    for way in regression.ways() if config.regression else []:
        _forget()
        yield _last(regression.train(way, problem, world, config.seed), bar)
        _show(bar, f"regression, {way}: done")


def _last(steps: Iterator[T | None], bar: Progress) -> T:
    """What comes at last; each None before it is a run that is done."""
    for each in steps:
        if each is not None:
            return each
        bar.step()
    raise AssertionError("it ended without a result")


def _show(bar: Progress, text: str) -> None:
    log.setLevel(logging.INFO)
    bar.show(text)
    log.setLevel(logging.WARNING)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what each of many optimizers says of itself."""
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "emulated_batch=")
            yield
    finally:
        gc.unfreeze()
        log.setLevel(level)


def _forget() -> None:
    """Optimizers of earlier runs must be gone when a new one starts, so each new one collects
    garbage (`hvdnoise.ordering`). This makes that quick: what is there now is not looked at."""
    gc.collect()
    gc.freeze()
