"""The file of a study, and what makes it right or wrong by itself; the runs are in `plan`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Sequence

from hvdnoise.training.arguments import several_noises
from hvdnoise.training.config import ConfigError, flat
from hvdnoise.training.errors import one_line_errors
from hvdnoise.training.options import parse, reader
from hvdnoise.training.validation import require

PROGRAM = "hvdnoise study"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# What the study gives each run, and where it is said instead.
OWN = {"seed": "seeds and tuning_seeds", "global_batch": "batches", "data.batch_size": "batches",
       "virtual_workers": "virtual_workers, of the study or a method",
       "threads": "threads, of the study", "run_dir": "out", "overwrite": "another out",
       "resume": "the same command again", "resume_resize": "another out", "name": "name"}


@dataclass(frozen=True)
class MethodConfig:
    """A method of a study.

    Args:
        label: its name in the table; default: its key.
        settings: of hvdnoise train, over those of the study; noise with a kind replaces the
            study's noise whole.
        search: over the study's; a range {low, high, log} or a list of choices by setting.
        batches: in place of the study's.
        virtual_workers: in place of the study's.
        weights: whose accuracy counts, at the choice and in the table: the final ones, or their
            moving average (the setting ema).
    """

    label: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    batches: list[int] | None = None
    virtual_workers: int | None = None
    weights: Literal["final", "ema"] = "final"


@dataclass(frozen=True)
class StudyConfig:
    """Methods x batch sizes x seeds: tune each on validation images, compare on test images.

    The same command again goes on where it ended, whatever ended it.

    Args:
        name: of the study; default: that of its file.
        about: one sentence for the report.
        settings: of hvdnoise train, of every run.
        search: what is searched for every method: a range {low, high, log} or a list of choices by
            setting, as {optim.lr: {low: 0.01, high: 1.0, log: true}}.
        methods: by name: label, settings, search, batches, virtual_workers, weights.
        baseline: the method that the others are compared with.
        batches: examples of all workers per step.
        ranks: R, of every run.
        virtual_workers: V, of every rank.
        trials: settings that are tried for each method and batch.
        tuning_seeds: of the trials.
        seeds: of the finals, which are compared; a number n means 1 .. n.
        level: of the intervals.
        threads: of each rank.
        jobs: runs at the same time; auto: as many as cores, GPUs or Slurm's tasks allow.
        launcher: of several ranks on this machine, horovodrun, mpirun or torchrun; auto:
            horovodrun; srun: Slurm starts the ranks.
        slurm: inside a Slurm job start each run as a task of it; auto: where there is a job.
        launcher_options: more words for the launcher, or for srun inside a Slurm job.
        keep: of a finished run all, or not its checkpoints (its weights stay).
        out: folder of the study; default: studies/NAME.
        dry_run: print the plan, and do nothing.
        seconds_per_run: for the plan's estimate.
        progress: bar, lines or none on the terminal; auto: a bar where there is a terminal.
    """

    name: str = ""
    about: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    baseline: str = ""
    batches: list[int] = field(default_factory=list)
    ranks: int = 1
    virtual_workers: int = 1
    trials: int = 1
    tuning_seeds: list[int] = field(default_factory=lambda: [1000])
    seeds: int | list[int] = 5
    level: float = 0.95
    threads: int = 1
    jobs: int | Literal["auto"] = "auto"
    launcher: Literal["auto", "horovodrun", "mpirun", "torchrun", "srun"] = "auto"
    slurm: Literal["auto", "yes", "no"] = "auto"
    launcher_options: list[str] = field(default_factory=list)
    keep: Literal["all", "weights"] = "weights"
    out: str | None = None
    dry_run: bool = False
    seconds_per_run: float | None = None
    progress: Literal["auto", "bar", "lines", "none"] = "auto"

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.out or f"studies/{self.name}")

    @property
    def final_seeds(self) -> list[int]:
        """The seeds of the finals."""
        return self.seeds if isinstance(self.seeds, list) else list(range(1, self.seeds + 1))


# What study.yaml does not hold: it is of one command, not of the study.
OF_A_COMMAND = ("dry_run", "seconds_per_run", "progress")


@one_line_errors()
def parse_study(arguments: Sequence[str]) -> StudyConfig:
    """The settings from ``FILE.yaml --FLAG VALUE ...``.

    Raises:
        ConfigError: one line, for anything that is wrong by itself.
    """
    if arguments and not arguments[0].startswith("-"):
        file = Path(arguments[0])
        require(file.is_file(), "file", file, "there is none; give the YAML file of a study first")
        arguments = ["--name", file.stem, "--config", arguments[0], *arguments[1:]]
    elif not {each.partition("=")[0] for each in arguments} & {"--config", "--help", "-h"}:
        raise ConfigError("no file of a study: give it first, as hvdnoise study my.yaml --dry_run")
    config = parse(StudyConfig, arguments, program=PROGRAM)
    check(config)
    return config


def check(config: StudyConfig) -> None:
    """Check the study's own settings.

    Raises:
        ConfigError: one line with the value that is wrong and the remedy.
    """
    require(bool(_NAME.fullmatch(config.name)), "name", repr(config.name),
            "give letters, digits, and . _ + - between them")
    for name, least in (("ranks", 1), ("virtual_workers", 1), ("trials", 1), ("threads", 1)):
        require(getattr(config, name) >= least, name, getattr(config, name),
                f"give {least} or more")
    require(config.jobs == "auto" or config.jobs >= 1, "jobs", config.jobs, "give 1 or more")
    require(0 < config.level < 1, "level", config.level, "give 0 < level < 1, as 0.95")
    require(config.seconds_per_run is None or config.seconds_per_run > 0, "seconds_per_run",
            config.seconds_per_run, "give a number above 0")
    require(bool(config.methods), "methods", config.methods, "give two or more, as {plain: {}}")
    require(config.baseline in config.methods, "baseline", repr(config.baseline),
            f"give one of the methods: {', '.join(config.methods)}")
    _check_seeds(config)
    require(config.folder.is_dir() or not config.folder.exists(), "out", config.folder,
            "it is not a folder")


def _check_seeds(config: StudyConfig) -> None:
    seeds, tuning = config.final_seeds, config.tuning_seeds
    for name, found in (("seeds", seeds), ("tuning_seeds", tuning)):
        require(bool(found), name, found, "give one or more")
        require(min(found) >= 0, name, found, "give numbers of 0 or more")
        require(len(set(found)) == len(found), name, found, "a seed is there twice")
    both = sorted(set(seeds) & set(tuning))
    require(not both, "tuning_seeds", tuning,
            f"{', '.join(map(str, both))} is in seeds too: what was tuned on a seed looks better "
            "there; give others")


def read_methods(config: StudyConfig) -> dict[str, MethodConfig]:
    """The methods by name.

    Raises:
        ConfigError: one line that begins with the method's name.
    """
    read, found = reader(MethodConfig, program=PROGRAM), {}
    for name, values in config.methods.items():
        require(bool(_NAME.fullmatch(name)), "methods", repr(name),
                "a method's name has letters, digits, and . _ + - between them")
        try:
            found[name] = read(values)
            batches_of(config, found[name])
        except ConfigError as error:
            raise ConfigError(f"methods.{name}: {error}") from error
    return found


def batches_of(config: StudyConfig, method: MethodConfig) -> list[int]:
    """The method's batches, in the file's order."""
    batches = config.batches if method.batches is None else method.batches
    require(bool(batches), "batches", batches, "give the examples of all workers per step")
    require(min(batches) >= 1, "batches", batches, "give 1 or more")
    require(len(set(batches)) == len(batches), "batches", batches, "one is there twice")
    return batches


def settings_of(config: StudyConfig, method: MethodConfig) -> dict[str, Any]:
    """The settings of the method's runs by flag, but for what is searched and what is the study's.

    Raises:
        ConfigError: for a setting that the study gives itself.
    """
    common, own = (flat(several_noises(each)) for each in (config.settings, method.settings))
    for name in (*common, *own, *config.search, *method.search):
        require(name not in OWN, "settings", name, f"the study sets it: give {OWN.get(name)}")
    if "noise.kind" in own:
        common = {name: value for name, value in common.items() if not name.startswith("noise.")}
    return {"tensorboard": False, **common, **own}
