"""Everything that a training run consists of on this rank, built from its settings, and its state.

What is equal on all ranks (weights, optimizer, moving average, loss scale, position) is the shared
state; what is a rank's own (generators, noise, running statistics of normalisation) is saved by
each rank. The learning rate follows from the position, and so do the data and their augmentation.
"""

from __future__ import annotations

import functools
import random
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from hvdnoise.buckets import default_layout
from hvdnoise.comm import World
from hvdnoise.exchange_plan import Shape
from hvdnoise.noise.base import ExampleNoise, part
from hvdnoise.noise.emulated import WeightedSample
from hvdnoise.optimizer import DistributedOptimizer
from hvdnoise.planning.predict import received_in_a_step
from hvdnoise.plans import PLANS
from hvdnoise.training import data, models, resize
from hvdnoise.training.config import TrainConfig, flatten
from hvdnoise.training.ema import make_ema
from hvdnoise.training.evaluate import mean_buffers, own_buffers, set_buffers
from hvdnoise.training.guard import Guard
from hvdnoise.training.heartbeat import FolderLock
from hvdnoise.training.meter import Batches
from hvdnoise.training.optim import build_optimizer, build_schedule
from hvdnoise.training.origin import Start, facts, starts_with
from hvdnoise.training.records import versions
from hvdnoise.training.sampler import WorkerSampler
from hvdnoise.training.validation import fits

State = dict[str, Any]


@dataclass
class Counters:
    """Where the run is and what it has seen; saved with it."""

    step: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    last_bad_step: int = 0  # 0: there was none
    bad_workers: dict[str, int] = field(default_factory=dict)  # bad steps by "rank 0, worker 1"
    best_accuracy: float = -1.0
    best_step: int = 0
    gradient_evaluations: int = 0
    exchange_bytes: float = 0.0


@dataclass
class Job:
    """A run on this rank; see the module."""

    config: TrainConfig
    world: World
    device: torch.device
    datasets: data.Datasets
    sampler: WorkerSampler
    model: nn.Module
    optimizer: Any
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    total_steps: int
    counters: Counters = field(default_factory=Counters)
    virtual_workers_asked: int | None = None  # the setting, before `resize` adjusted it
    starts: list[Start] = field(default_factory=list)  # of the run; this one is the last
    best: State | None = None  # with validation: the best weights, on the CPU, equal on all ranks
    digests: dict[str, str] = field(default_factory=dict)  # of the data, once ranks agree on them
    lock: FolderLock | None = None  # rank 0's, of the run folder
    guard: Guard = field(init=False)

    def __post_init__(self) -> None:
        self.guard = Guard(self.model, self.optimizer, self.world, scaled=self.scaler.is_enabled(),
                           workers=self.sampler.worker_ids)

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return self.counters.step / self.sampler.steps_per_epoch

    @property
    def batches(self) -> Batches:
        """The batch sizes, as the noise scale needs them."""
        noise, worker = self.optimizer.noise, self.sampler.batch_size
        weighted = part(noise, WeightedSample)
        emulated = weighted.emulated_batch if weighted is not None else None
        return Batches(worker, worker * self.sampler.num_workers, emulated,
                       part(noise, ExampleNoise) is not None)

    @functools.cached_property
    def received_in_a_step(self) -> float:
        """Bytes of gradients and noise that this rank receives in a step, as the plan counts them:
        without the few bytes of measured norms, and the spectrum's."""
        noise, local_size = self.optimizer.noise, self.world.local_size
        layout = default_layout(list(self.model.named_parameters()))
        shape = Shape(layout.numbers, self.world.size, self.config.virtual_workers,
                      precision=self.config.noise_precision,
                      group_size=self.config.group_size(local_size) or local_size,
                      statistics_bytes=noise.statistics_bytes(layout) if noise is not None else 0)
        return received_in_a_step(PLANS[self.optimizer.exchange_plan], shape, noise)

    # ------------------------------------------------------------------ state

    def shared_state(self) -> State:
        """What is equal on all ranks. Collective (buffers are averaged)."""
        optimizer = self.optimizer.state_dict()
        optimizer.pop("hvdnoise", None)
        return {"model": {**self.model.state_dict(), **mean_buffers(self.model, self.world)},
                "ema": None if self.ema is None else
                {**self.ema.state_dict(), **mean_buffers(self.ema, self.world)},
                "optimizer": optimizer, "scaler": self.scaler.state_dict(),
                "best": self.best, "starts": self.starts, "counters": asdict(self.counters),
                "config": flatten(self.config), "data": self.digests,
                resize.ASKED: self.virtual_workers_asked,
                "steps_per_epoch": self.sampler.steps_per_epoch,
                "examples_per_step": self.batches.total, "versions": versions()}

    def own_state(self) -> State:
        """What is this rank's own."""
        return {"generators": _generators(),
                "noise": self.optimizer.state_dict().get("hvdnoise"),
                "buffers": own_buffers(self.model),
                "ema_buffers": {} if self.ema is None else own_buffers(self.ema)}

    def load(self, shared: State, own: State | None) -> None:
        """Go on where the states were taken.

        Args:
            own: None where the number of workers has changed: then generators and noise start
                anew, and the position becomes the next step with examples that are new.
        """
        self.model.load_state_dict(shared["model"])
        if self.ema is not None:
            self.ema.load_state_dict(shared["ema"])
        state = dict(shared["optimizer"])
        if own is not None and own["noise"] is not None:
            state["hvdnoise"] = own["noise"]
        self.optimizer.load_state_dict(state)
        self.scaler.load_state_dict(shared["scaler"])
        self.counters = Counters(**shared["counters"])
        self.best = shared.get("best")
        self.starts = shared.get("starts", [])  # older checkpoints have none
        if own is None:
            self.counters.step = self._step_of_examples(shared)
        else:
            set_buffers(self.model, own["buffers"])
            if self.ema is not None:
                set_buffers(self.ema, own["ema_buffers"])
            _set_generators(own["generators"])

    def _step_of_examples(self, shared: State) -> int:
        epoch, step = divmod(shared["counters"]["step"], shared["steps_per_epoch"])
        repeat, batch = self.sampler.repeat, self.batches.total
        seen = -(-step // repeat) * shared["examples_per_step"]
        return epoch * self.sampler.steps_per_epoch + min(-(-seen // batch) * repeat,
                                                          self.sampler.steps_per_epoch)

    def start(self) -> None:
        """Take down that the run begins, or goes on, here and now."""
        config = self.config
        self.starts = starts_with(self.starts, {
            "step": self.counters.step, "ranks": self.world.size,
            "virtual_workers": config.virtual_workers, "epochs": config.epochs,
            **facts(self.world.transport, versions())})

    def set_learning_rate(self) -> float:
        """Give every parameter group the rate of the step to come, which depends on the position
        alone; returns the first group's."""
        for group, base, factor in zip(self.optimizer.param_groups, self.schedule.base_lrs,
                                       self.schedule.lr_lambdas):
            group["lr"] = base * factor(self.counters.step)
        return float(self.optimizer.param_groups[0]["lr"])


def build(config: TrainConfig, world: World, device: torch.device) -> Job:
    """Build a run at its start. The ranks' models are alike by their seed only; see `align`.

    Raises:
        ValueError: for settings that do not fit the data.
    """
    datasets = data.build(config.data, seed=config.seed)
    workers, virtual = config.workers(world.size), config.virtual_workers
    sampler = WorkerSampler(
        len(datasets.train), num_workers=workers, batch_size=config.worker_batch(world.size),
        worker_ids=range(world.rank * virtual, (world.rank + 1) * virtual), seed=config.seed,
        repeat=config.data.repeat)
    total_steps = max(1, round(config.epochs * sampler.steps_per_epoch))
    torch.manual_seed(config.seed)
    model = models.build_for(config.model, datasets.spec, norm=config.norm)
    model.to(device)
    ema = make_ema(model, config.ema)
    noise = config.noise.build(seed=config.seed, batch_size=sampler.batch_size,
                               total_steps=total_steps)
    if noise is not None:
        fits(noise, model)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    optimizer = DistributedOptimizer(
        build_optimizer(model, config.optim), named_parameters=model.named_parameters(),
        backward_passes_per_step=config.accumulate, noise=noise, virtual_workers=virtual,
        exchange=config.exchange, noise_precision=config.noise_precision, world=world)
    optimizer.loss_scale = scaler.get_scale if scaler.is_enabled() else 1.0
    schedule = build_schedule(optimizer, config.lr, sampler.batch_size * workers,
                              sampler.steps_per_epoch, config.epochs)
    assert isinstance(schedule, LambdaLR)
    return Job(config, world, device, datasets, sampler, model, optimizer, schedule, scaler, ema,
               total_steps)


def align(job: Job) -> None:
    """Give every rank the model of rank 0. Collective."""
    handles = [job.world.broadcast_(tensor, root=0, name=f"align.{name}")
               for name, tensor in job.model.state_dict().items()]
    for handle in handles:
        handle.wait()
    if job.ema is not None:
        job.ema.module.load_state_dict(job.model.state_dict())


def _generators() -> State:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: State = {"torch": torch.get_rng_state(), "python": random.getstate(),
                    "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position,
                              has_gauss, gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_generators(state: State) -> None:
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, _as_uint32(keys), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _as_uint32(keys: Tensor) -> Any:
    return keys.numpy().astype(np.uint32)
