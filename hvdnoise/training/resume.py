"""What a run goes on from: found, checked and loaded before anything in its folder changes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdnoise import watchdog
from hvdnoise.comm import World
from hvdnoise.training import checkpoint, fitting, records, resize
from hvdnoise.training.checkpoint import BrokenCheckpoint
from hvdnoise.training.config import ConfigError, TrainConfig, changes, flatten
from hvdnoise.training.job import Job
from hvdnoise.training.progress import log
from hvdnoise.training.settings_file import read_settings
from hvdnoise.training.together import call_or_raise

State = dict[str, Any]
_LONGEST = 80  # characters of a value in a message


@dataclass(frozen=True)
class Source:
    """What to go on from.

    Args:
        path: the checkpoint.
        step: what its manifest says.
        shared: the state that is equal on all ranks.
        own: this rank's own; with ``resume_resize`` that of the same workers where only the ranks
            have changed, and None where the number of workers has.
    """

    path: Path
    step: int
    shared: State
    own: State | None


@watchdog.phase("checkpoint")
def find_source(job: Job) -> Source | None:
    """What to go on from; None to start at step 0. Collective.

    Raises:
        ConfigError: when the checkpoint is of another run, or the run folder's files are damaged.
        CheckpointError: when there are checkpoints and none is whole.
    """
    config, world = job.config, job.world
    if config.resume == "never":
        return None
    before = call_or_raise(world, lambda: _read_folder(Path(config.run_dir or ""), world.rank))
    chosen = checkpoint.choose(resize.candidates(config), world)
    if chosen is None:
        call_or_raise(world, lambda: _check_same_run(before, config))
        log.info("no checkpoint to resume from: starting at step 0")
        return None
    path, manifest = chosen

    def load() -> Source:
        shared = checkpoint.read(path / "shared.pt")
        with fitting.broken_unless_it_fits(path):
            fitting.check_facts(shared)
            _check_same_run(shared["config"], config)
            _check_same_data(shared, job)
            _check_size(shared, manifest["ranks"], config, world)
            _warn_of_differences(shared, config)
            own = _own(path, shared, manifest["ranks"], config, world)
        return Source(path, manifest["step"], shared, own)

    log.info("resuming from %s", path)
    source = call_or_raise(world, load)
    if source.own is not None and manifest["ranks"] != world.size:
        _agree_on_noise(source.shared, source.own, world)
    return source


def restore(job: Job, source: Source) -> None:
    """Have the job go on where the source was taken. Collective.

    Raises:
        ConfigError: on all ranks, when its states do not fit.
    """
    def load() -> None:
        with fitting.broken_unless_it_fits(source.path):
            fitting.check_states(job, source.shared, source.own, source.step)
            job.load(source.shared, source.own)
    call_or_raise(job.world, load)


def _own(path: Path, shared: State, ranks: int, config: TrainConfig, world: World
         ) -> State | None:
    """This rank's own state; None where there are other workers."""
    virtual = shared["config"]["virtual_workers"]
    if (ranks, virtual) == (world.size, config.virtual_workers):
        return checkpoint.read(path / f"rank-{world.rank}.pt")
    if ranks * virtual != config.workers(world.size):
        return None
    return resize.regrouped(lambda rank: checkpoint.read(path / f"rank-{rank}.pt"), before=virtual,
                            now=config.virtual_workers, rank=world.rank)


def _agree_on_noise(shared: State, own: State, world: World) -> None:
    """Where one rank cannot take over the noise's state, it starts anew on all. Collective."""
    if any(world.gather_json(own["noise"] is None, name="resize.noise")):
        own["noise"] = None
        if shared["config"].get("noise.kind", "none") != "none":
            log.warning("what the noise keeps differs between ranks, and cannot be moved to "
                        "others: it starts anew")


def _read_folder(folder: Path, rank: int) -> State:
    """The settings of the run in a folder; nothing where there is none.

    Raises:
        BrokenCheckpoint: when its metrics are damaged; the incomplete line that a killed run
            leaves is no damage.
        ConfigError: when its settings are.
    """
    path = folder / "config.yaml"
    found = read_settings(path) if path.is_file() else {}
    metrics = folder / "metrics.jsonl"
    if rank == 0 and metrics.is_file():
        with metrics.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n") and not _is_metrics(line):
                    raise BrokenCheckpoint(f"{metrics} is damaged in line {number}: repair it, or "
                                           "move it away")
    return found


def _is_metrics(line: bytes) -> bool:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and type(values.get("step")) is int \
        and isinstance(values.get("kind"), str)


def _check_same_run(before: State, config: TrainConfig) -> None:
    now = flatten(config)
    different = changes(before, now, resize=config.resume_resize) if before else []
    if different:
        text = ", ".join(f"{key} (was {_short(before.get(key))}, is {_short(now.get(key))})"
                         for key in different)
        raise ConfigError(f"cannot resume with other settings: {text}; set them back, or start a "
                          "new run")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _check_same_data(shared: State, job: Job) -> None:
    """As far as both know digests of the same things."""
    before, now = shared.get("data"), job.digests
    if before is None:
        log.warning("the checkpoint does not say what data it was trained on: not compared")
        return
    other = [key for key in sorted(before.keys() & now.keys()) if before[key] != now[key]]
    if other:
        raise ConfigError(f"cannot resume with other data: {', '.join(other)} of "
                          f"{job.config.data.path} differ from what the run has been trained on; "
                          "put the same files back, or start a new run")


def _check_size(shared: State, ranks: int, config: TrainConfig, world: World) -> None:
    """Raise for other ranks or workers, unless they are asked for; say what they mean."""
    virtual = shared["config"]["virtual_workers"]
    if (ranks, virtual) == (world.size, config.virtual_workers):
        return
    if not config.resume_resize:
        raise ConfigError(
            f"cannot resume on {world.size} ranks x {config.virtual_workers} virtual workers: the "
            f"checkpoint is of {ranks} x {virtual}, and noise and batches depend on it; start "
            f"{ranks} ranks, or add --resume_resize to make it another run")
    if ranks * virtual == config.workers(world.size):
        log.warning("resumed on %d ranks x %d workers, was %d x %d: the same workers, data and "
                    "noise, but not the bits of the run without the interruption, as sums are "
                    "added in another order", world.size, config.virtual_workers, ranks, virtual)
        return
    log.warning("resumed with another number of workers (%d x %d, was %d x %d): not the run that "
                "would have been without the interruption", world.size, config.virtual_workers,
                ranks, virtual)


def _warn_of_differences(shared: State, config: TrainConfig) -> None:
    old, new = shared["config"]["epochs"], config.epochs
    if old != new:
        log.warning("the run has %g epochs now, %g before: from here on its learning rate follows "
                    "the schedule of the new length", new, old)
    now = records.versions()
    other = [f"{key} {value} (now {now.get(key)})" for key, value in shared["versions"].items()
             if now.get(key) != value]
    if other:
        log.warning("the checkpoint was written with %s: the run may differ in rounding",
                    ", ".join(other))
