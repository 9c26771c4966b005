"""hvdnoise train | launch | eval | measure | export | reproduce | study | report | plan | ...

Settings are parsed and checked before the ranks start, so that a mistake costs nothing and leaves
nothing behind. Exit codes: 0 done; 2 bad input, one line on stderr; 75 preempted by SIGTERM and
saved, start me again; 1 anything else.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from typing import Any, Callable, Literal, Sequence, TypeVar

from hvdnoise import comm, extras
from hvdnoise.training import process
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.output import make_lasting
from hvdnoise.world import TransportError

T = TypeVar("T")
_USAGE = """usage: hvdnoise train [--config YAML] [--FLAG VALUE ...]   train a network
       hvdnoise launch [OPTIONS] -- train [...]            start ranks, again after failures
       hvdnoise eval RUN [--FLAG VALUE ...]                score the weights of a run
       hvdnoise measure RUN [--FLAG VALUE ...]             sharpness of a run's weights
       hvdnoise export RUN [--format FORM]                 its network for other programs
       hvdnoise reproduce RUN [--FLAG VALUE ...]           run again; the same bits?
       hvdnoise study FILE.yaml [--FLAG VALUE ...]         compare methods: tune, run, table
       hvdnoise report RUN_OR_STUDY... [--out FOLDER]      a page of what they recorded
       hvdnoise plan [--config YAML] [--FLAG VALUE ...]    say what a run costs; launch lines
       hvdnoise bench [--FLAG VALUE ...]                   time ways to average gradients
       hvdnoise quadratic [--FLAG VALUE ...]               check the noises against exact theory
       hvdnoise doctor [--FLAG VALUE ...]                  say what works on this machine
Each takes --help. Start several ranks with hvdnoise launch, or with horovodrun, mpirun, srun or
torchrun in front."""


@dataclass(frozen=True)
class EvalConfig:
    """Score a run's weights on its test set.

    Args:
        run: the run's folder.
        checkpoint: final, best, ema, or the path of a checkpoint or of saved weights.
        data_root: folder of the data sets; default: as the run had it.
        trust_plugins: import the functions that the run names as data set and model. They are code:
            look at them first.
        device: auto takes the GPU of the local rank where there is one.
        threads: of each rank; default: OMP_NUM_THREADS, else the cores shared out.
        batch_size: images at a time, of each rank.
    """

    run: str = ""
    checkpoint: str = "final"
    data_root: str | None = None
    trust_plugins: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    batch_size: int = 256


@dataclass(frozen=True)
class DoctorConfig:
    """Check the installation, one line a check; exit code 1 when something is broken.

    Args:
        data_root: folder of the data sets to look into.
        launch: also start two ranks, when alone.
        seconds: limit of that.
        versions: only say which versions are installed, on one line to compare between hosts.
    """

    data_root: str = "data"
    launch: bool = True
    seconds: int = 60
    versions: bool = False


_PLAIN_DOCTORS = {  # which need no parser: a doctor says what is missing, whatever that is
    (): DoctorConfig(), ("--launch", "false"): DoctorConfig(launch=False),
    ("--versions",): DoctorConfig(versions=True)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    launched = comm.environment()
    make_lasting()
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    commands: dict[str, Callable[[Sequence[str], dict[str, int]], int]] = {
        "train": _train, "launch": _launch, "eval": _eval, "measure": _measure,
        "export": _export, "reproduce": _reproduce, "study": _study,
        "report": _report, "plan": _plan, "bench": _bench, "quadratic": _quadratic,
        "doctor": _doctor}
    if command in ("--help", "-h", "help"):
        print(_USAGE)
        return 0
    try:
        if command not in commands:
            *names, last = commands
            raise ConfigError(f"unknown command {command!r}: give {', '.join(names)} or {last}; "
                              "see hvdnoise --help")
        if command != "doctor":
            extras.require(f"hvdnoise {command}", *extras.EVERY_COMMAND,
                           *extras.COMMANDS.get(command, ()))
        code = commands[command](rest, launched)
    except ConfigError as error:
        return process.refuse(str(error), launched)
    if code == 0 and command in ("doctor", "plan", "report"):  # what they say is all that they do
        return process.said_all()
    return code


def _parse(kind: type[T], arguments: Sequence[str], launched: dict[str, int], **options: Any) -> T:
    """`parse`, with what --help and --print_config print coming from one rank only."""
    silent = contextlib.redirect_stdout(io.StringIO()) if launched["rank"] else \
        contextlib.nullcontext()
    with silent:
        from hvdnoise.training.options import parse
        return parse(kind, arguments, **options)


def _train(arguments: Sequence[str], launched: dict[str, int]) -> int:
    config = _parse(TrainConfig, arguments, launched, program="hvdnoise train")
    from hvdnoise.training.resize import keep_workers
    from hvdnoise.training.validation import validate
    asked, config = config.virtual_workers, keep_workers(config, launched["size"])
    validate(config, launched["size"])

    from hvdnoise.training import agreement, loop
    from hvdnoise.training.preemption import Preemption
    preemption = Preemption()
    process.watch(launched).ask = preemption.want
    process.set_threads(config.threads, launched["local_size"])
    process.be_deterministic()
    return _in_world(launched, agreement.settings(config), lambda world: loop.run(
        config, world, process.pick_device(config.device, world), preemption.listen(),
        virtual_workers_asked=asked),
        group_size=config.group_size(launched["local_size"]))


def _launch(arguments: Sequence[str], launched: dict[str, int]) -> int:
    _refuse_launcher("launch", launched)
    from hvdnoise.supervise.run import run
    return run(arguments)


def _eval(arguments: Sequence[str], launched: dict[str, int]) -> int:
    config = _parse(EvalConfig, arguments, launched, program="hvdnoise eval", positional="run")
    from hvdnoise.training import rerun
    from hvdnoise.training.validation import require
    require(config.batch_size >= 1, "batch_size", config.batch_size, "give 1 or more")
    trained, weights = rerun.find(config.run, config.checkpoint, config.data_root,
                                  trust=config.trust_plugins)
    process.set_threads(config.threads, launched["local_size"])
    process.be_deterministic()
    return _in_world(launched, {"run": config.run, "checkpoint": str(weights)},
                     lambda world: rerun.score(
                         trained, weights, world, process.pick_device(config.device, world),
                         batch_size=config.batch_size))


def _measure(arguments: Sequence[str], launched: dict[str, int]) -> int:
    from hvdnoise.measure.config import FREE, MeasureConfig, validate
    config = _parse(MeasureConfig, arguments, launched, program="hvdnoise measure",
                    positional="run")
    from hvdnoise.training import rerun
    trained, weights = rerun.find(config.run, config.checkpoint, config.data_root,
                                  trust=config.trust_plugins)
    validate(config)
    from hvdnoise.measure.run import run
    from hvdnoise.training.config import flatten
    process.set_threads(config.threads, launched["local_size"])
    process.be_deterministic()
    facts = {key: value for key, value in flatten(config).items() if key not in FREE}
    return _in_world(launched, {**facts, "weights": str(weights)}, lambda world: run(
        config, trained, weights, world, process.pick_device(config.device, world)))


def _export(arguments: Sequence[str], launched: dict[str, int]) -> int:
    from hvdnoise.export.config import ExportConfig, validate
    config = _parse(ExportConfig, arguments, launched, program="hvdnoise export",
                    positional="run")
    if launched["rank"] > 0:  # one process exports
        return 0
    from hvdnoise.training import rerun
    trained, weights = rerun.find(config.run, config.checkpoint, config.data_root,
                                  trust=config.trust_plugins)
    validate(config, weights)
    process.set_threads(config.threads, 1)
    from hvdnoise.export.run import run
    return run(config, trained, weights)


def _reproduce(arguments: Sequence[str], launched: dict[str, int]) -> int:
    from hvdnoise.reproduce.config import ReproduceConfig
    config = _parse(ReproduceConfig, arguments, launched, program="hvdnoise reproduce",
                    positional="run")
    _refuse_launcher("reproduce", launched)
    from hvdnoise.reproduce.run import run
    return run(config)


def _study(arguments: Sequence[str], launched: dict[str, int]) -> int:
    from hvdnoise.study.run import run
    process.check_limits()
    _refuse_launcher("study", launched)
    return run(arguments)


def _refuse_launcher(command: str, launched: dict[str, int]) -> None:
    if launched["size"] > 1 and "SLURM_STEP_ID" not in os.environ or launched["rank"] > 0:
        raise ConfigError(f"hvdnoise {command} starts ranks by itself, and here are "
                          f"{launched['size']} of it: start it without a launcher")


def _report(arguments: Sequence[str], launched: dict[str, int]) -> int:
    from hvdnoise.report.config import ReportConfig, validate
    config = _parse(ReportConfig, arguments, launched, program="hvdnoise report",
                    positional="folders")
    if launched["rank"] > 0:  # one process reports
        return 0
    validate(config)
    from hvdnoise.report.run import run
    return run(config)


def _plan(arguments: Sequence[str], launched: dict[str, int]) -> int:
    from hvdnoise.planning.report import run
    if launched["rank"] > 0:  # one process plans
        return 0
    return run(arguments)


def _bench(arguments: Sequence[str], launched: dict[str, int]) -> int:
    from hvdnoise.bench.config import FREE, BenchConfig, validate
    config = _parse(BenchConfig, arguments, launched, program="hvdnoise bench")
    if comm.uses_torch():
        raise ConfigError("hvdnoise bench compares with Horovod's own optimizer, and "
                          "torch.distributed carries these ranks: start with horovodrun or mpirun")
    variants = validate(config, launched["size"])
    from hvdnoise.bench.run import run
    from hvdnoise.training.config import flatten
    process.set_threads(config.threads, launched["local_size"])
    facts = {key: value for key, value in flatten(config).items() if key not in FREE}
    grouped = any(variant.grouped for variant in variants)
    return _in_world(launched, facts, lambda world: run(
        config, variants, world, process.pick_device(config.device, world)),
        group_size=config.group_size if grouped else None)


def _quadratic(arguments: Sequence[str], launched: dict[str, int]) -> int:
    from hvdnoise.quadratic.config import FREE, QuadraticConfig, validate
    config = _parse(QuadraticConfig, arguments, launched, program="hvdnoise quadratic")
    cases = validate(config, launched["size"])
    from hvdnoise.quadratic.run import run
    from hvdnoise.training.config import flatten
    process.set_threads(config.threads, launched["local_size"])
    facts = {key: value for key, value in flatten(config).items() if key not in FREE}
    return _in_world(launched, facts, lambda world: run(config, cases, world))


def _doctor(arguments: Sequence[str], launched: dict[str, int]) -> int:
    config = _PLAIN_DOCTORS.get(tuple(arguments))
    if config is None:
        extras.require("hvdnoise doctor with such options", *extras.EVERY_COMMAND)
        config = _parse(DoctorConfig, arguments, launched, program="hvdnoise doctor")
    from hvdnoise.doctor import examine, version_line
    if config.versions:
        if launched["rank"] == 0:
            print(version_line())
        return 0
    process.check_limits()
    return examine(launched, data_root=config.data_root, launch=config.launch,
                   seconds=config.seconds)


def _in_world(launched: dict[str, int], facts: dict[str, Any],
              action: Callable[[comm.World], int], *, group_size: int | None = None) -> int:
    """Start the ranks, see that all agree on ``facts``, run, and end whatever happens."""
    from hvdnoise.training.agreement import environment
    from hvdnoise.training.checkpoint import CheckpointError
    from hvdnoise.training.errors import CommonDataError
    from hvdnoise.training.loop import Diverged
    from hvdnoise.training.progress import start_terminal
    from hvdnoise.training.records import versions
    watched = process.watch(launched)
    start_terminal(launched["rank"])
    try:
        try:
            world = comm.init(group_size=group_size)
        except TransportError as error:
            return process.refuse(str(error), launched)
        try:
            _handshake(world, {**versions(), **environment(), **facts})
            watched.enter("")
            code = action(world)
        except (ConfigError, CommonDataError) as error:
            code = process.fail_together(str(error), world, process.EXIT_BAD_INPUT)
        except (CheckpointError, Diverged) as error:
            code = process.fail_together(str(error), world, process.EXIT_FAILED)
        watched.enter("finish")
        comm.shutdown()
        watched.rest()
        return code
    except BaseException as error:
        process.crash(error, watched.rank)


def _handshake(world: comm.World, facts: dict[str, Any]) -> None:
    try:
        comm.handshake(world, facts)
    except ValueError as error:
        raise ConfigError(str(error)) from error
