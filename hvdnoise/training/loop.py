"""The training loop, from top to bottom.

`run` prepares what a run needs (data, model, a checkpoint to go on from, the folder) and calls
`train`; a step is in `hvdnoise.training.steps`, what happens between steps in
`hvdnoise.training.milestones`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from hvdnoise import watchdog
from hvdnoise.comm import World
from hvdnoise.training import data
from hvdnoise.training.agreement import agree_on_data
from hvdnoise.training.checkpoint import NotFiniteError
from hvdnoise.training.config import TrainConfig
from hvdnoise.training.errors import Diverged
from hvdnoise.training.job import Job, align, build
from hvdnoise.training.meter import Meter
from hvdnoise.training.milestones import diverged, finish, preempted, save, saver_of, score
from hvdnoise.training.preemption import EXIT_PREEMPTED, Preemption
from hvdnoise.training.progress import Progress, log
from hvdnoise.training.records import Records
from hvdnoise.training.resume import find_source, restore
from hvdnoise.training.runfolder import call_or_raise, hold_folder, open_folder
from hvdnoise.training.saver import Saver
from hvdnoise.training.steps import take_step
from hvdnoise.training.validation import check_run_dir


def run(config: TrainConfig, world: World, device: torch.device, preemption: Preemption, *,
        virtual_workers_asked: int | None = None) -> int:
    """Train as ``config`` says; the exit code. Collective.

    Args:
        virtual_workers_asked: the setting, where `hvdnoise.training.resize` has adjusted it.

    Raises:
        ConfigError, DataError: for settings or data that cannot be used; nothing was created.
        CheckpointError, Diverged: on all ranks alike. Where something is not finite, the folder
            has a summary that says so.
    """
    watchdog.enter("start")
    data.prepare(config.data, world)
    job = call_or_raise(world, lambda: build(config, world, device))
    job.virtual_workers_asked = virtual_workers_asked or config.virtual_workers
    job.digests = agree_on_data(job.datasets, config.data, device, world)
    with hold_folder(config, world, job.model, on_loss=preemption.want) as (folder, job.lock):
        return _run(job, folder, preemption)


def _run(job: Job, folder: Path, preemption: Preemption) -> int:
    """`run`, once the folder is this run's. Collective."""
    config, world = job.config, job.world
    call_or_raise(world, lambda: check_run_dir(config))  # it may have come meanwhile
    source = find_source(job)
    if source is None:
        align(job)
    else:
        restore(job, source)
    job.start()
    open_folder(config, world, folder, {"data": job.digests,
                                        "labels": list(job.datasets.test.classes)})
    at = job.counters
    if source is not None:
        log.info("resumed at step %d", at.step)
    records = Records(folder, rank=world.rank, tensorboard=config.tensorboard,
                      resumed_at=None if config.resume == "never" else at.step,
                      again=_scored_again(job),
                      is_ours=job.lock.is_ours if job.lock is not None else lambda: True)
    progress = Progress(config.progress, rank=world.rank, total=job.total_steps, done=at.step)
    log.info("%d ranks x %d workers x %d examples, %d steps, in %s", world.size,
             config.virtual_workers, job.batches.worker, job.total_steps, folder)
    log.info("exchange %s: %s", job.optimizer.exchange_plan, job.optimizer.exchange_reason)
    saver = saver_of(job, folder)
    try:
        return train(job, folder, records, progress, preemption, saver)
    except (Diverged, NotFiniteError) as error:
        diverged(job, folder, str(error))
        with contextlib.suppress(NotFiniteError):  # one is enough
            saver.wait()
        raise
    finally:
        progress.close()
        records.close()


def _scored_again(job: Job) -> set[str]:
    """The kinds of scores that a run resumed at this step writes (again) for this step."""
    if job.counters.step >= job.total_steps:
        return {"test", "validation"}
    return {"test"} if job.datasets.validation is not None else set()  # of an end that is none now


def train(job: Job, folder: Path, records: Records, progress: Progress, preemption: Preemption,
          saver: Saver) -> int:
    """The loop, and what comes after it. Collective."""
    config, at = job.config, job.counters
    per_epoch = job.sampler.steps_per_epoch
    loader = data.train_loader(job.datasets, job.sampler, pin_memory=job.device.type == "cuda",
                               loader_workers=config.data.loader_workers)
    meter = Meter(job.batches, job.device)
    scored_at, scores = -1, dict[str, float]()
    job.model.train()
    records.note_step(at.step)
    while at.step < job.total_steps:
        job.sampler.set_epoch(at.step // per_epoch, at.step % per_epoch)
        batches = iter(loader)
        epoch_end = min(job.total_steps, (at.step // per_epoch + 1) * per_epoch)
        while at.step < epoch_end:
            watchdog.enter("step", at.step + 1)
            saver.poll()
            if preemption.agreed(job.world):
                preempted(job, folder, saver)
                return EXIT_PREEMPTED
            take_step(job, batches, meter)
            records.note_step(at.step)
            progress.step()
            if at.step % config.log_every == 0 or at.step == epoch_end:
                _log(job, meter, records, progress)
            if _due(at.step, config.eval_every * per_epoch):
                scored_at, scores = at.step, score(job, folder, records)
            if _due(at.step, config.checkpoint.every_steps) or _due(
                    at.step, config.checkpoint.every_epochs * per_epoch):
                save(job, saver)
    watchdog.enter("finish", at.step)
    preemption.wait()
    if scored_at != at.step:
        scores = score(job, folder, records)
    save(job, saver)
    saver.wait()
    finish(job, folder, records, scores)
    return 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _log(job: Job, meter: Meter, records: Records, progress: Progress) -> None:
    bad = meter.bad_steps
    if meter.spectrum is not None:
        step, spectrum = meter.spectrum
        records.write("covariance", step, spectrum.numbers())
        meter.spectrum = None
    values = meter.flush(job.world)
    epoch, coverage = job.epoch, job.optimizer.noise_coverage
    records.write("train", job.counters.step, {
        "epoch": epoch, **values, "noise_due_steps": coverage.due,
        "noise_missed_steps": coverage.missed})
    if bad:
        log.warning("%d steps without a finite gradient were skipped", bad)
    progress.show(f"epoch {epoch:.1f}  loss {values['loss']:.3f}  "
                  f"train accuracy {values['accuracy']:.3f}  "
                  f"{values['examples_per_second'] or 0:.0f} examples/s")
