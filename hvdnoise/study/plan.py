"""Every run of a study: settings, folder, command; checked before anything is started."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Iterator

from hvdnoise.study import search
from hvdnoise.study.config import (
    PROGRAM,
    MethodConfig,
    StudyConfig,
    batches_of,
    read_methods,
    settings_of,
)
from hvdnoise.study.search import Axis, Point
from hvdnoise.training import plugins
from hvdnoise.training.arguments import several_noises
from hvdnoise.training.config import ConfigError, TrainConfig, changes, flat, flatten
from hvdnoise.training.errors import one_line_errors
from hvdnoise.training.options import reader
from hvdnoise.training.validation import require, validate


@dataclass(frozen=True)
class Cell:
    """A method with a batch size.

    Args:
        method, label, batch: which.
        virtual_workers: V.
        own: the method's own settings, by flag.
        given: the settings of every run of it that are given to the trainer, by flag.
        axes: what is searched.
        points: the settings of each trial; one alone is chosen without a trial.
        complete: every setting of a run, by flag, but for what is searched and the seed.
        classes: of the data set.
        weights: whose accuracy counts.
    """

    method: str
    label: str
    batch: int
    virtual_workers: int
    own: dict[str, Any]
    given: dict[str, Any]
    axes: dict[str, Axis]
    points: list[Point]
    complete: dict[str, Any]
    classes: int
    weights: str

    def score(self, of: str) -> str:
        """The key of a run's summary for the accuracy that counts, of "test" or "validation"."""
        return f"{'ema_' if self.weights == 'ema' else ''}{of}_accuracy"

    @property
    def tunes(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.points) > 1


@dataclass(frozen=True)
class Run:
    """One run: a trial (``trial`` is its number) or a final (None)."""

    cell: Cell
    trial: int | None
    seed: int
    searched: Point

    @property
    def path(self) -> str:
        """Its folder, in that of the study."""
        kind = "final" if self.trial is None else f"trial-{self.trial:02d}"
        return f"runs/{self.cell.method}/b{self.cell.batch}/{kind}-seed-{self.seed}"

    @property
    def complete(self) -> dict[str, Any]:
        """Every setting, by flag, as RUN/config.yaml has it."""
        return {**self.cell.complete, **self.searched, "seed": self.seed}

    def flags(self) -> list[str]:
        """What `hvdnoise train` is given, but for folder and resuming."""
        given = {**self.cell.given, **self.searched, "seed": self.seed}
        return [f"--{name}={_text(value)}" for name, value in given.items()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Plan:
    """All cells of a study, in the file's order."""

    config: StudyConfig
    cells: list[Cell]

    @property
    def tunes(self) -> bool:
        return any(cell.tunes for cell in self.cells)

    def trials_of(self, cell: Cell) -> Iterator[Run]:
        """Its trials, none where there is nothing to choose."""
        if cell.tunes:
            for number, point in enumerate(cell.points):
                for seed in self.config.tuning_seeds:
                    yield Run(cell, number, seed, point)

    def finals_of(self, cell: Cell, chosen: Point) -> Iterator[Run]:
        """Its finals with the chosen settings."""
        for seed in self.config.final_seeds:
            yield Run(cell, None, seed, chosen)

    def trials(self) -> list[Run]:
        """All trials, so that after a part of them all methods have about as many."""
        runs = [run for cell in self.cells for run in self.trials_of(cell)]
        return sorted(runs, key=lambda run: (run.trial, run.seed))

    def count(self) -> int:
        """Trials and finals."""
        return len(self.trials()) + len(self.cells) * len(self.config.final_seeds)


@one_line_errors()
def make(config: StudyConfig, *, trust: bool = True) -> Plan:
    """Every run, its settings checked as `hvdnoise train` would on the ranks of the study.

    Args:
        trust: import the code that the settings name; else what was imported already counts.

    Raises:
        ConfigError: one line that names method and batch.
    """
    methods = read_methods(config)
    for each in (config.settings, *(method.settings for method in methods.values())) * trust:
        plugins.load(tuple(each.get("plugins") or ()))
    read = reader(TrainConfig, program=PROGRAM)
    cells = []
    for name, method in methods.items():
        for batch in batches_of(config, method):
            try:
                cells.append(_cell(config, name, method, batch, read, trust))
            except ConfigError as error:
                raise ConfigError(f"methods.{name}, batch {batch}: {error}") from error
    plan = Plan(config, cells)
    lacking = [cell for cell in cells if cell.tunes and not cell.complete.get("data.validation")]
    require(not lacking, "settings.data.validation", 0, "trials are compared on validation images: "
            "give how many to hold out of the training images, or one choice for every setting of "
            "every search")
    return plan


def _cell(config: StudyConfig, name: str, method: MethodConfig, batch: int, read: Any,
          trust: bool) -> Cell:
    given = settings_of(config, method)
    axes = search.read({**config.search, **method.search})
    require(search.LEARNING_RATE in axes, "search", list(axes),
            "every method has its learning rate searched: add optim.lr: {low: ..., high: ..., log: "
            "true}, or optim.lr: [one value] where it is given by something else")
    both = sorted(given.keys() & axes.keys())
    require(not both, "settings", both, "they are searched too: leave them out of one of the two")
    virtual = method.virtual_workers or config.virtual_workers
    given.update(global_batch=batch, virtual_workers=virtual, threads=config.threads)
    points = search.points(axes, config.trials)
    trained = [read(_nested({**given, **point})) for point in points]
    for each in trained:
        if trust:
            plugins.load_functions(each)
        validate(replace(each, device="auto") if config.dry_run else each, config.ranks)
    require(method.weights == "final" or all(each.ema for each in trained), "weights",
            method.weights, "the runs have no moving average: add ema to settings, as 0.999")
    own = flat(several_noises(method.settings))
    complete = {key: value for key, value in flatten(trained[0]).items() if key not in axes}
    data = trained[0].data
    return Cell(name, method.label or name, batch, virtual, own, given, axes, points, complete,
                data.record.count(data)[1], method.weights)


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """Settings by flag as nested groups."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        inside = found
        for group in groups:
            inside = inside.setdefault(group, {})
            if not isinstance(inside, dict):
                raise ConfigError(f"{name}={value} is wrong: {group} is given as one value too")
        inside[last] = value
    return found


# ---------------------------------------------------------------------- an earlier command's study


def check_same(before: Plan, now: Plan) -> None:
    """Refuse what would mix different runs in one folder, or drop some.

    Methods, batches, seeds and trials may be added; what is said about runs, and how they are
    started, may change.

    Raises:
        ConfigError: one line that names the setting.
    """
    old, new = before.config, now.config
    remedy = "set it back, or give another out"
    for name in ("ranks", "threads"):
        was, is_ = getattr(old, name), getattr(new, name)
        require(was == is_, name, is_, f"the study has runs with {was}; {remedy}")
    require(new.trials >= old.trials, "trials", new.trials,
            f"the study has made choices among {old.trials}; give no fewer, or another out")
    for name in ("final_seeds", "tuning_seeds"):
        gone = [seed for seed in getattr(old, name) if seed not in getattr(new, name)]
        require(not gone, name.removeprefix("final_"), getattr(new, name),
                f"the study has runs of {gone}, and none is dropped; add them, or give another out")
    cells = {(cell.method, cell.batch): cell for cell in now.cells}
    for cell in before.cells:
        found = cells.get((cell.method, cell.batch))
        if found is None:
            raise ConfigError(f"methods: {cell.method} with batch {cell.batch} is gone, and no "
                              "run is dropped; add it, or give another out")
        _check_same_cell(cell, found, remedy)


def _check_same_cell(old: Cell, new: Cell, remedy: str) -> None:
    where = f"methods.{new.method}, batch {new.batch}: "
    if old.axes != new.axes:
        name = next(name for name in {**old.axes, **new.axes}
                    if old.axes.get(name) != new.axes.get(name))
        raise ConfigError(f"{where}search.{name} was {old.axes.get(name)} and is "
                          f"{new.axes.get(name)}: trials of both would be mixed; {remedy}")
    for name in differing(old.complete, new.complete):
        raise ConfigError(f"{where}{name} was {old.complete.get(name)} and is "
                          f"{new.complete.get(name)}: runs of both would be mixed; {remedy}")


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings (by flag) that make two runs different ones."""
    found = changes(before, now, resize=False)
    return found + ["epochs"] * (before.get("epochs") != now.get("epochs"))
