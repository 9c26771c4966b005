"""One step of training: the passes of this rank's workers, and the update, taken or not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from hvdnoise.streams import seed_for
from hvdnoise.training.config import TrainConfig
from hvdnoise.training.errors import Diverged
from hvdnoise.training.guard import NotTaken
from hvdnoise.training.job import Job
from hvdnoise.training.meter import Meter

MEASURES_PER_LINE = 4  # steps of a log interval whose norms are measured


def take_step(job: Job, batches: Iterator[tuple[Tensor, Tensor]], meter: Meter) -> None:
    """One step: forward and backward of each of this rank's workers, and the update.

    Where something is not finite, the step is not taken, on all ranks alike, and leaves no trace
    but that it is counted as bad (`hvdnoise.training.guard`).
    """
    started = time.perf_counter()
    optimizer, at = job.optimizer, job.counters
    job.guard.begin()
    rate = job.set_learning_rate()
    parts = [next(batches) for _ in job.sampler.worker_ids]
    shows = _announce(job)
    sums, taken = _update(job, parts)
    at.step += 1
    at.exchange_bytes += job.received_in_a_step
    if taken:
        if job.ema is not None:
            job.ema.update_parameters(job.model)
        # of a noise with echo: what a batch has shown goes when it was drawn for the last time
        optimizer.repeated = job.sampler.repetition(at.step) > 0
        if shows and optimizer.spectrum is not None:
            meter.spectrum = at.step, optimizer.spectrum
    _count_bad(job, bad=not taken)
    seconds = time.perf_counter() - started
    at.seconds += seconds
    meter.add(sums, learning_rate=rate, seconds=seconds, bad=not taken,
              waiting=optimizer.communication_seconds,
              measured=optimizer.measured if optimizer.measure else None)


def _update(job: Job, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, bool]:
    """Move the weights by the batches of this rank's workers; the sums of the forwards, and whether
    the step was taken."""
    optimizer, scaler, guard = job.optimizer, job.scaler, job.guard
    two_passes = optimizer.noise is not None and optimizer.noise.lag == 0
    sums: list[Tensor] = []

    def gradients() -> None:
        optimizer.zero_grad()
        sums[:] = [_forward_and_backward(job, parts)]
        if guard.evaluated() == 1 and two_passes:  # for the noise alone
            return
        scaler.unscale_(optimizer)
        guard.check(_clip(job))

    try:
        if two_passes:
            optimizer.step(gradients)
        else:
            gradients()
            scaler.step(optimizer)
        taken = True
    except NotTaken:
        guard.undo()
        taken = False
    if not two_passes:
        scaler.update()
    return sums[0], taken


def _clip(job: Job) -> Tensor:
    """() the norm of the gradient, which is limited to ``clip_norm``, if that is set."""
    if job.config.clip_norm is not None:
        return clip_grad_norm_(job.model.parameters(), job.config.clip_norm)
    gradients = [p.grad for p in job.model.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def _announce(job: Job) -> bool:
    """Say to the optimizer what step begins; whether the spectrum is wanted of it."""
    config, optimizer, step = job.config, job.optimizer, job.counters.step
    # by the place in the data, whatever became of the step before
    optimizer.repeated = job.sampler.repetition(step) > 0
    every = max(1, config.log_every // MEASURES_PER_LINE)
    if config.data.repeat > 1:
        every |= 1  # odd, so that it meets first passes and repetitions
    optimizer.measure = (step + 1) % every == 0 and (
        optimizer.noise is not None or job.batches.worker != job.batches.total)
    shows = config.spectrum_every > 0 and (step + 1) % config.spectrum_every == 0
    optimizer.spectrum_batch = job.batches.worker if shows else None
    return shows


def _forward_and_backward(job: Job, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(3,): the sums of losses and of right answers, and the number of examples."""
    config = job.config
    loss_sum = right = torch.zeros((), dtype=torch.float64, device=job.device)
    count = 0
    for worker, (images, labels) in zip(job.sampler.worker_ids, parts):
        # dropout and the like depend on step and worker alone, wherever the worker lives
        _seed(job.device, seed_for(config.seed, "worker", job.counters.step, worker))
        images = images.to(job.device, non_blocking=True)
        labels = labels.to(job.device, non_blocking=True)
        for x, y in zip(images.chunk(config.accumulate), labels.chunk(config.accumulate)):
            seen = job.optimizer.observe_examples(job.model, partial(_losses, config), x, y)
            job.counters.gradient_evaluations += len(y) * job.world.size * (1 + seen)
            with _autocast(config, job.device):
                logits = job.model(x)
            losses = _losses(config, logits, y)
            loss = job.optimizer.weigh(losses) / config.accumulate
            start = job.guard.start(loss, worker)
            job.scaler.scale(loss).backward(gradient=start)
            loss_sum = loss_sum + losses.detach().double().sum()
            right = right + (logits.argmax(1) == y).sum()
            count += len(y)
    return torch.stack([loss_sum, right, torch.full_like(right, count)])


def _autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.float16 if config.precision == "fp16" else
                          torch.bfloat16)


def _seed(device: torch.device, seed: int) -> None:
    """As torch.manual_seed, but of the device in use alone: it is slow where there is no GPU."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _losses(config: TrainConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """(examples,)"""
    return F.cross_entropy(logits.float(), labels, reduction="none",
                           label_smoothing=config.label_smoothing)


def _count_bad(job: Job, *, bad: bool) -> None:
    at = job.counters
    at.bad_in_a_row = at.bad_in_a_row + 1 if bad else 0
    if bad:
        at.bad_steps, at.last_bad_step = at.bad_steps + 1, at.step
        for rank, worker in job.guard.explain(at.step, at.bad_in_a_row):
            name = f"rank {rank}, worker {worker}"
            at.bad_workers[name] = at.bad_workers.get(name, 0) + 1
    in_a_row = job.guard.same_steps.compare(at.bad_steps, at.bad_in_a_row)
    if in_a_row >= job.config.max_bad_steps:
        raise Diverged(f"the gradient was not finite in {in_a_row} steps in a row, the last "
                       f"at step {at.last_bad_step}: lower optim.lr or the noise's scale, set "
                       "clip_norm, or look for bad data; the last checkpoint is intact")
