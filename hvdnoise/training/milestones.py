"""What happens between steps: scoring, saving, being preempted, finishing. All collective."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Callable

from torch import nn

from hvdnoise import watchdog
from hvdnoise.training import checkpoint, data, heartbeat, models, weights
from hvdnoise.training.evaluate import Score, common_buffers, evaluate, evaluate_all
from hvdnoise.training.images import Images
from hvdnoise.training.job import Job
from hvdnoise.training.progress import log
from hvdnoise.training.records import Records, weights_digest, write_text
from hvdnoise.training.runfolder import config_digest
from hvdnoise.training.saver import Saver, naming

Scores = dict[str, float]


def score(job: Job, folder: Path, records: Records) -> Scores:
    """Score the model, and the moving average where there is one; keep the best weights.

    On the validation images where there are any, else on the test images.
    """
    at, world, validation = job.counters, job.world, job.datasets.validation
    kind, images = ("test", job.datasets.test) if validation is None else ("validation", validation)
    scores: Scores = {}
    for prefix, model in (("", job.model), ("ema_", job.ema)):
        if model is None:
            continue
        with common_buffers(model, world):
            found = evaluate(model, _batches(job, images), world, job.device)
            if model is job.model and found.accuracy > at.best_accuracy:
                at.best_accuracy, at.best_step = found.accuracy, at.step
                if validation is not None:
                    job.best = {name: value.detach().cpu().clone()
                                for name, value in model.state_dict().items()}
                _write_weights(job, folder / "weights-best.pt", model.state_dict())
        scores.update(_named(f"{prefix}{kind}", found))
    _record(job, records, kind, scores)
    return scores


def _score_test(job: Job, records: Records) -> Scores:
    """The test images, read once: with the final weights, their moving average and the best."""
    models_ = {"test": job.model, "ema_test": job.ema}
    with contextlib.ExitStack() as stack:
        for model in models_.values():
            if model is not None:
                stack.enter_context(common_buffers(model, job.world))
        models_["best_test"] = _best_model(job)
        found = evaluate_all([model for model in models_.values() if model is not None],
                             _batches(job, job.datasets.test), job.world, job.device)
    named = zip((name for name, model in models_.items() if model is not None), found)
    scores = {key: value for each in named for key, value in _named(*each).items()}
    _record(job, records, "test", scores)
    return scores


def _best_model(job: Job) -> nn.Module:
    model = models.build_for(job.config.model, job.datasets.spec,
                             norm=job.config.norm).to(job.device)
    assert job.best is not None  # there has been a score
    model.load_state_dict(job.best)
    return model


def _named(prefix: str, found: Score) -> Scores:
    return {f"{prefix}_loss": found.loss, f"{prefix}_accuracy": found.accuracy}


def _record(job: Job, records: Records, kind: str, scores: Scores) -> None:
    at, epoch = job.counters, job.epoch
    records.write(kind, at.step, {"epoch": epoch, "seconds": at.seconds, **scores})
    log.info("epoch %.4g: %s", epoch, "  ".join(f"{key.replace('_', ' ')} {value:.4f}"
                                                for key, value in scores.items()))


def _batches(job: Job, images: Images) -> data.Loader:
    return data.eval_loader(images, size=job.world.size, rank=job.world.rank,
                            batch_size=max(job.sampler.batch_size, 256))


def _write(job: Job, folder: Path, what: str, action: Callable[[], None]) -> None:
    """Rank 0 writes into the run folder, while it has it; a failure is a CheckpointError on all
    ranks, which names the folder."""
    heartbeat.check(job.lock, job.world)
    with naming(folder):
        checkpoint.gather_or_raise(job.world, what, lambda: action() if job.world.rank == 0
                                   else None)


def _write_weights(job: Job, path: Path, state: dict[str, Any]) -> None:
    _write(job, path.parent, "weights", lambda: weights.write(path, state))


def _write_facts(job: Job, path: Path, facts: dict[str, Any]) -> None:
    _write(job, path.parent, "facts", lambda: write_text(path, json.dumps(facts, indent=1)))


def saver_of(job: Job, folder: Path) -> Saver:
    """What writes the checkpoints of a run."""
    return Saver(folder, job.world, keep=job.config.checkpoint.keep,
                 check=lambda: heartbeat.check(job.lock, job.world))


@watchdog.phase("checkpoint")
def save(job: Job, saver: Saver) -> None:
    """Begin to write a checkpoint of this step, unless it has begun."""
    if saver.step == job.counters.step:
        return
    job.guard.same_steps.settle()
    saver.start(job.counters.step, job.shared_state(), job.own_state())


def preempted(job: Job, folder: Path, saver: Saver) -> None:
    """Save, and say how to go on.

    Raises:
        FolderLost: when the run was stopped because the folder is no longer its own.
    """
    heartbeat.check(job.lock, job.world)
    save(job, saver)
    saver.wait()
    at = job.counters
    _write_facts(job, folder / "preempted.json", {"step": at.step})
    log.warning("SIGTERM: saved at step %d of %d; go on with --run_dir %s --resume auto", at.step,
                job.total_steps, folder)
    watchdog.enter("finish", at.step)
    job.world.barrier("preempted")  # a launcher ends the other ranks when the first one exits


def finish(job: Job, folder: Path, records: Records, scores: Scores) -> None:
    """Write the final weights and the summary; with validation, read the test images first.

    Args:
        scores: of the final weights, by `score`.
    """
    at, world, digests = job.counters, job.world, {}
    best = {"best_test_accuracy": at.best_accuracy}
    if job.best is not None:
        best = {"best_validation_accuracy": at.best_accuracy}
        scores = {**scores, **_score_test(job, records)}
        # the run may have been resumed in another folder, which has no best weights yet
        _write_weights(job, folder / "weights-best.pt", job.best)
    if job.config.score_train:
        with common_buffers(job.model, world):
            scores = {**scores, **_named("train", evaluate(
                job.model, _batches(job, job.datasets.train), world, job.device))}
    for name, model in (("weights", job.model), ("weights-ema", job.ema and job.ema.module)):
        if model is not None:
            with common_buffers(model, world):
                _write_weights(job, folder / f"{name}.pt", model.state_dict())
                digests[f"{name.replace('-', '_')}_sha256"] = weights_digest(model.state_dict())
    files = checkpoint.gather_or_raise(world, "digests", lambda: weights.digests(folder)
                                       if world.rank == 0 else None)[0]
    summary = {"outcome": "finished", **best, **scores, "best_step": at.best_step,
               **digests, "files_sha256": files, **_facts(job),
               "gradient_evaluations": at.gradient_evaluations,
               "exchange_bytes": round(at.exchange_bytes), "starts": job.starts}
    _write_facts(job, folder / "summary.json", summary)
    log.info("test accuracy %.4f (best %.4f) after %d steps and %.0f s; everything is in %s",
             scores["test_accuracy"], summary["best_test_accuracy"], at.step, at.seconds, folder)
    world.barrier("finished")


def diverged(job: Job, folder: Path, reason: str) -> None:
    """Write the summary of a run that is given up."""
    _write_facts(job, folder / "summary.json",
                 {"outcome": "diverged", "reason": reason, **_facts(job)})


def _facts(job: Job) -> dict[str, Any]:
    """What every summary says."""
    at = job.counters
    return {"steps": at.step, "epochs": job.epoch, "seconds": round(at.seconds, 3),
            "bad_steps": at.bad_steps, "last_bad_step": at.last_bad_step or None,
            "bad_workers": at.bad_workers,
            "ranks": job.world.size, "workers": job.sampler.num_workers,
            "worker_batch": job.batches.worker, "global_batch": job.batches.total,
            "config_sha256": config_digest(job.config),
            "noise": " + ".join(each.kind for each in job.config.noise.each())}
