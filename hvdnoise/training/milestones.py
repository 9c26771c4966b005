"""What happens between steps: scoring, saving, being preempted, finishing. All collective."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from hvdnoise.training import checkpoint, data
from hvdnoise.training.evaluate import common_buffers, evaluate
from hvdnoise.training.job import Job
from hvdnoise.training.progress import log
from hvdnoise.training.records import Records, weights_digest, write_text
from hvdnoise.training.runfolder import config_digest, write_weights


def score(job: Job, folder: Path, records: Records) -> dict[str, float]:
    """Score the model, and the moving average where there is one; keep the best weights."""
    at, world = job.counters, job.world
    scores: dict[str, float] = {}
    for prefix, model in (("", job.model), ("ema_", job.ema)):
        if model is None:
            continue
        with common_buffers(model, world):
            found = evaluate(model, _test_batches(job), world, job.device)
            if model is job.model and found.accuracy > at.best_accuracy:
                at.best_accuracy, at.best_step = found.accuracy, at.step
                _write_weights(job, folder / "weights-best.pt", model)
        scores.update({f"{prefix}test_loss": found.loss, f"{prefix}test_accuracy": found.accuracy})
    epoch = at.step / job.sampler.steps_per_epoch
    records.write("test", at.step, {"epoch": epoch, "seconds": at.seconds, **scores})
    log.info("epoch %.4g: %s", epoch, "  ".join(f"{key.replace('_', ' ')} {value:.4f}"
                                                for key, value in scores.items()))
    return scores


def _test_batches(job: Job) -> data.Loader:
    return data.test_loader(job.datasets, size=job.world.size, rank=job.world.rank,
                            batch_size=max(job.sampler.batch_size, 256))


def _write_weights(job: Job, path: Path, model: nn.Module) -> None:
    """Rank 0 writes; a failure is a CheckpointError on all ranks."""
    checkpoint.gather_or_raise(job.world, "weights",
                               lambda: write_weights(path, model.state_dict())
                               if job.world.rank == 0 else None)


def _write_facts(job: Job, path: Path, facts: dict[str, Any]) -> None:
    checkpoint.gather_or_raise(job.world, "facts",
                               lambda: write_text(path, json.dumps(facts, indent=1))
                               if job.world.rank == 0 else None)


def save(job: Job, folder: Path) -> int:
    """Write a checkpoint; the step it is of."""
    shared = job.shared_state()
    checkpoint.save(folder / "checkpoints", job.counters.step,
                    shared if job.world.rank == 0 else None, job.own_state(), job.world,
                    keep=job.config.checkpoint.keep)
    return job.counters.step


def preempted(job: Job, folder: Path, *, saved: bool) -> None:
    """Save, unless that is done, and say how to go on."""
    if not saved:
        save(job, folder)
    at = job.counters
    _write_facts(job, folder / "preempted.json", {"step": at.step})
    log.warning("SIGTERM: saved at step %d of %d; go on with --run_dir %s --resume auto", at.step,
                job.total_steps, folder)
    job.world.barrier("preempted")  # a launcher ends the other ranks when the first one exits


def finish(job: Job, folder: Path, scores: dict[str, float]) -> None:
    """Write the final weights and the summary."""
    at, world = job.counters, job.world
    digests = {}
    for name, model in (("weights", job.model), ("weights-ema", job.ema and job.ema.module)):
        if model is not None:
            with common_buffers(model, world):
                _write_weights(job, folder / f"{name}.pt", model)
                digests[f"{name.replace('-', '_')}_sha256"] = weights_digest(model.state_dict())
    summary = {**scores, "best_test_accuracy": at.best_accuracy, "best_step": at.best_step,
               "steps": at.step, "epochs": at.step / job.sampler.steps_per_epoch,
               "seconds": round(at.seconds, 3), "bad_steps": at.bad_steps, **digests,
               "ranks": world.size, "workers": job.sampler.num_workers,
               "worker_batch": job.batches.worker, "global_batch": job.batches.total,
               "config_sha256": config_digest(job.config),
               "noise": " + ".join(each.kind for each in job.config.noise.each())}
    _write_facts(job, folder / "summary.json", summary)
    log.info("test accuracy %.4f (best %.4f) after %d steps and %.0f s; everything is in %s",
             scores["test_accuracy"], at.best_accuracy, at.step, at.seconds, folder)
    world.barrier("finished")
