"""Steps in which something is not finite: no trace, on all ranks alike, and who is named."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvdnoise import register_noise
from hvdnoise.noise.base import MeanNoise, Observation, StepContext, WeightNoise
from hvdnoise.training import checkpoint, data, loop
from hvdnoise.training.config import TrainConfig
from hvdnoise.training.errors import Diverged
from hvdnoise.training.job import Job, build
from hvdnoise.training.meter import Meter
from hvdnoise.training.options import parse
from tests.fake_world import ThreadWorld, run_threads
from tests.noises import forgotten_afterwards
from tests.trainer import GNC, TINY, Never, speaking

__all__ = ["speaking"]  # a fixture

BATCH_NORM = ["--norm", "batch", "--ema", "0.9"]
COVARIANCE = ["--noise.kind", "covariance", "--noise.emulated_batch", "2", "--noise.structure"]
RADIUS = ["--noise.radius", "0.05"]
KINDS = {
    "none": [], "adamw": ["--optim.name", "adamw"], "lamb": ["--optim.name", "lamb"],
    "spectrum": ["--spectrum_every", "1"], "gnc": GNC,
    "gnc of lr": ["--noise.kind", "gnc", "--noise.lr", "1"],
    "gnc lag 0": [*GNC, "--noise.lag", "0"], "gnc lag 2": [*GNC, "--noise.lag", "2"],
    "gathered": [*GNC, "--noise.source", "gathered", "--accumulate", "2"],
    "gathered lag 2": [*GNC, "--noise.source", "gathered", "--noise.lag", "2"],
    "white": [*GNC, "--noise.source", "isotropic"],
    "white lag 0": [*GNC, "--noise.source", "isotropic", "--noise.lag", "0"],
    "layerwise gnc": ["--noise.kind", "gnc", "--noise.relative", "0.01", "--noise.source",
                      "layerwise"],
    "echo": ["--noise.kind", "gnc", "--noise.echo", "--data.repeat", "2"],
    "sam": ["--noise.kind", "sam", *RADIUS],
    "sam echo": ["--noise.kind", "sam", *RADIUS, "--noise.echo", "--data.repeat", "2"],
    "stale sam": ["--noise.kind", "stale-sam", *RADIUS],
    "momentum sam": ["--noise.kind", "momentum-sam", *RADIUS],
    "pnm": ["--noise.kind", "pnm"], "extrapolation": ["--noise.kind", "extrapolation"],
    "anticorrelated": ["--noise.kind", "anticorrelated", *RADIUS],
    "workers": [*COVARIANCE, "full"],
    "examples": [*COVARIANCE, "full", "--noise.source", "examples", "--accumulate", "2"],
    "isotropic": [*COVARIANCE, "isotropic"], "layerwise": [*COVARIANCE, "layerwise"],
    "diagonal": [*COVARIANCE, "diagonal", "--noise.every", "2"],
    "kronecker": [*COVARIANCE, "kronecker", "--noise.every", "1"],
    "two": [*GNC, "--noise.also", json.dumps([{"kind": "covariance", "structure": "diagonal",
                                               "emulated_batch": 2}])],
    "per example": [*COVARIANCE, "diagonal", "--noise.source", "examples", "--noise.every", "1",
                    "--norm", "group"]}

State = dict[str, Any]
Fault = Callable[[Job, int], None]  # given the step that begins, from 0
one_at_a_time = threading.Lock()  # threads share the generator that draws initial weights


def job_of(world: ThreadWorld, *flags: str) -> Job:
    """A job for `steps`; what comes later in the flags counts."""
    config = parse(TrainConfig, [*TINY, *BATCH_NORM, "--model", "small-cnn", *flags],
                   program="hvdnoise train")
    with one_at_a_time:
        job = build(config, world, torch.device("cpu"))
    world.barrier()  # a step draws from it, too
    job.model.train()
    return job


def state_of(job: Job) -> State:
    """All that a checkpoint would hold but the counters."""
    shared = {key: value for key, value in job.shared_state().items() if key != "counters"}
    return copy.deepcopy({"shared": shared, "own": job.own_state()})


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two states differ by a bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from differences(a.get(key), b.get(key), f"{path}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for index, pair in enumerate(zip(a, b)):
            yield from differences(*pair, f"{path}.{index}")
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield path
    elif a is not b and a != b:
        yield path


def steps(job: Job, count: int, fault: Fault = lambda job, step: None, *,
          after: Callable[[int], None] = lambda step: None) -> None:
    """Take steps; ``fault`` is called before each of them."""
    loader = data.train_loader(job.datasets, job.sampler, pin_memory=False, loader_workers=0)
    per_epoch, meter = job.sampler.steps_per_epoch, Meter(job.batches, job.device)
    for step in range(job.counters.step, job.counters.step + count):
        if step % per_epoch == 0 or step == job.counters.step:
            job.sampler.set_epoch(step // per_epoch, step % per_epoch)
            batches: Any = iter(loader)
        fault(job, step)
        loop.take_step(job, batches, meter)
        after(step)


# ---------------------------------------------------------------------- faults


def images_of(value: float, *, at: set[int], worker: int = 0) -> Fault:
    """The images of a worker (of all) are ``value`` in some steps."""
    def fault(job: Job, step: int) -> None:
        if step in at and worker in job.sampler.worker_ids:
            local = job.sampler.worker_ids.index(worker)
            changed = [0]

            def change(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                if not torch.is_grad_enabled():
                    return arguments
                part = changed[0] // job.config.accumulate % len(job.sampler.worker_ids)
                changed[0] += 1
                return (torch.full_like(arguments[0], value),) if part == local else arguments
            handles.append(job.model.register_forward_pre_hook(change))
        else:
            clear()
    handles: list[Any] = []

    def clear() -> None:
        while handles:
            handles.pop().remove()
    return fault


def gradient_of(value: float, *, at: set[int], rank: int = 0, worker: int = 0) -> Fault:
    """One number of one gradient is ``value``, in some passes of this rank's worker number."""
    def fault(job: Job, step: int) -> None:
        while handles:
            handles.pop().remove()
        if step not in at or job.world.rank != rank:
            return
        p, passes = list(job.model.parameters())[0], [0]

        def change(gradient: Tensor) -> Tensor:
            passes[0] += 1
            of = (passes[0] - 1) // job.config.accumulate % len(job.sampler.worker_ids)
            changed = gradient.clone()
            changed.view(-1)[3] = value if of == worker else changed.view(-1)[3]
            return changed
        handles.append(p.register_hook(change))
    handles: list[Any] = []
    return fault


def buffers_of(value: float, *, at: set[int], rank: int = 0) -> Fault:
    """A forward leaves one number of the running variance like this; loss and gradient are fine."""
    def fault(job: Job, step: int) -> None:
        while handles:
            handles.pop().remove()
        if step in at and job.world.rank == rank:
            norm = next(m for m in job.model.modules() if isinstance(m, torch.nn.BatchNorm2d))

            def change(*_: Any) -> None:
                norm.running_var.data[1] = value  # type: ignore[union-attr]
            handles.append(norm.register_forward_hook(change))
    handles: list[Any] = []
    return fault


def weight_of(name: str, value: float, *, at: set[int], rank: int = 0) -> Fault:
    def fault(job: Job, step: int) -> None:
        if step in at and job.world.rank == rank:
            with torch.no_grad():
                dict(job.model.named_parameters())[name][2] = value
    return fault


@pytest.fixture(autouse=True)
def noises() -> Iterator[None]:
    """Noises with a fault, known in one test alone."""
    with forgotten_afterwards():
        @register_noise("sunk-bias")
        class SunkBias(WeightNoise):
            """Worker 1's last bias in front of a ReLU is -inf in step 3, which no loss shows."""

            def displacement(self, bucket: Any, v: int, clean: Any, learning_rates: Any,
                             observation: Observation, context: StepContext
                             ) -> tuple[Tensor, list[float]]:
                unit_N = torch.zeros(bucket.size)
                if context.step == 3 and context.workers[v] == 1:
                    unit_N[bucket.starts[2]] = -torch.inf  # of the first norm
                return unit_N, [1.0] * len(clean)

        @register_noise("broken-mean")
        class BrokenMean(MeanNoise):
            """The noise on the mean is NaN in step 3, on some ranks.

            Args:
                ranks: those; or nothing: all.
            """

            def __init__(self, ranks: int = -1, *, seed: int = 0) -> None:
                super().__init__(seed=seed)
                self.ranks = ranks

            def mean_noise(self, bucket: Any, observation: Observation, context: StepContext
                           ) -> Tensor:
                wrong = context.step == 3 and (
                    self.ranks < 0 or context.workers.start == self.ranks * len(context.workers))
                return torch.full((bucket.size,), torch.nan if wrong else 1e-3)
        yield


# ---------------------------------------------------------------------- no trace


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_step_leaves_no_trace(kind: str) -> None:
    """All that a checkpoint would hold is bitwise as before; and later steps are good again."""
    bad = {1, 4, 5}
    faults = [images_of(float("nan"), at={1}), gradient_of(float("inf"), at={4}, worker=1),
              images_of(float("inf"), at={5}, worker=1)]

    def work(world: ThreadWorld) -> Job:
        job = job_of(world, *KINDS[kind])
        states = [state_of(job)]

        def fault(job: Job, step: int) -> None:
            for each in faults:
                each(job, step)

        def compare(step: int) -> None:
            states.append(state_of(job))
            found = list(differences(states[-2], states[-1]))
            assert bool(found) == (step not in bad), (step, found)
        steps(job, 7, fault, after=compare)
        return job
    (job,) = run_threads(1, work, timeout=200)
    at = job.counters
    assert (at.step, at.bad_steps, at.last_bad_step, at.bad_in_a_row) == (7, 3, 6, 0)
    assert at.bad_workers == {"rank 0, worker 0": 1, "rank 0, worker 1": 2}


@pytest.mark.slow
def test_of_a_skipped_first_pass_nothing_is_used_and_nothing_is_left() -> None:
    """Noise with echo: bad steps at either place of a batch, and both."""
    for bad in ({2}, {3}, {2, 3}, {0}):
        def work(world: ThreadWorld) -> None:
            job = job_of(world, *KINDS["echo"])
            states = [state_of(job)]

            def compare(step: int) -> None:
                states.append(state_of(job))
                assert bool(list(differences(states[-2], states[-1]))) == (step not in bad)
            steps(job, 6, images_of(float("nan"), at=bad), after=compare)
            due = {step for step in (1, 3, 5) if not {step, step - 1} & bad}
            assert job.optimizer.noise_coverage.due == len(due)
        run_threads(1, work)


def test_float16_leaves_no_trace_but_its_loss_scale(caplog: pytest.LogCaptureFixture) -> None:
    """A search of the loss scale is nothing to warn of, unless it does not end."""
    loop.log.propagate = True

    def work(world: ThreadWorld) -> Job:
        job = job_of(world, *GNC, "--precision", "fp16")
        steps(job, 4)
        before = state_of(job)
        at = job.counters.bad_steps
        steps(job, 4, images_of(float("nan"), at={4, 5, 6}), after=lambda step: check(before, step))
        assert job.counters.bad_steps == at + 3 and not job.counters.bad_workers
        assert "not taken" not in caplog.text
        steps(job, 4, images_of(float("nan"), at=set(range(8, 12)), worker=1))
        return job

    def check(before: State, step: int) -> None:
        found = {each.split(".")[2] for each in differences(before, state_of(jobs[0]))}
        assert step == 7 or found == {"scaler"}, (step, found)
    jobs: list[Job] = []
    real = Job.__post_init__

    def made(job: Job) -> None:
        real(job)
        jobs.append(job)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "__post_init__", made)
        (job,) = run_threads(1, work)
    assert job.counters.bad_workers == {"rank 0, worker 1": 1}  # of the fourth in a row
    assert "step 12 was not taken" in caplog.text


# ---------------------------------------------------------------------- all ranks alike

FAULTS: dict[str, tuple[Callable[[], Fault], str]] = {
    "images": (lambda: images_of(float("nan"), at={2}, worker=3),
               "loss and buffers of worker 3 on rank 1"),
    "activations": (lambda: images_of(1e30, at={2}, worker=2), "buffers of worker 2 on rank 1"),
    "gradient": (lambda: gradient_of(float("nan"), at={2}, rank=1, worker=1),
                 "gradient of worker 3 on rank 1"),
    "buffers": (lambda: buffers_of(float("inf"), at={2}, rank=1), "buffers of worker 2 on rank 1")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "gnc lag 0", "workers"])
@pytest.mark.parametrize("name", FAULTS)
def test_one_rank_s_fault_is_a_step_that_nobody_takes(name: str, kind: str,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    """Two ranks; the end is, bit for bit, that of a run which never computes the step."""
    loop.log.propagate = True
    fault, said = FAULTS[name]

    def work(world: ThreadWorld, faulty: bool) -> tuple[State, Any]:
        job = job_of(world, *KINDS[kind])
        if faulty:
            steps(job, 4, fault())
        else:
            steps(job, 2)
            job.counters.step += 1
            steps(job, 1)
        state = state_of(job)
        del state["own"]["generators"]  # which the threads share
        return state, job.counters
    ended = [run_threads(2, partial(work, faulty=faulty)) for faulty in (True, False)]
    for (state, at), (expected, _) in zip(*ended):
        assert not list(differences(state, expected))
        assert (at.step, at.bad_steps, at.last_bad_step) == (4, 1, 3)
        worker = said.split()[said.split().index("worker") + 1]
        assert at.bad_workers == {f"rank 1, worker {worker}": 1}
    assert said in caplog.text
    assert not list(differences(ended[0][0][0]["shared"], ended[0][1][0]["shared"]))


def test_a_displacement_that_no_loss_shows(caplog: pytest.LogCaptureFixture) -> None:
    """-inf in front of a ReLU: everything else is finite."""
    loop.log.propagate = True

    def work(world: ThreadWorld) -> Job:
        job = job_of(world, "--norm", "group", "--noise.kind", "sunk-bias", "--accumulate", "2")
        before: list[State] = []

        def look(step: int) -> None:
            before.append(job.shared_state()["model"])
        steps(job, 3, after=look)
        before = copy.deepcopy(before)
        with pytest.raises(Diverged, match="10 steps in a row"):  # the noise counts steps taken
            steps(job, 99, after=look)
        assert not list(differences(before[-1], job.shared_state()["model"]))
        return job
    (job,) = run_threads(1, work)
    assert job.counters.bad_workers == {"rank 0, worker 1": 10}
    assert "displacement of worker 1 on rank 0" in caplog.text


@pytest.mark.parametrize("limit", [1, 10])
def test_noise_on_the_mean_must_be_alike(limit: int) -> None:
    """Where one rank alone finds it not finite, all ranks end, and nobody waits for ever."""
    def work(world: ThreadWorld) -> tuple[str, int]:
        job = job_of(world, "--noise.kind", "broken-mean", "--noise.ranks", "1",
                     "--max_bad_steps", str(limit))
        with pytest.raises(Diverged) as caught:
            steps(job, 9)
        return str(caught.value), job.counters.step
    for text, step in run_threads(2, work):
        assert "the ranks have not taken the same steps: rank 1 left out step 4" in text
        assert step == 5


def test_such_noise_never_gets_into_a_checkpoint(tmp_path: Path) -> None:
    config = parse(TrainConfig, [*TINY, "--noise.kind", "broken-mean", "--noise.ranks", "1",
                                 "--run_dir", str(tmp_path), "--checkpoint.every_steps", "1",
                                 "--virtual_workers", "1"], program="hvdnoise train")

    def work(world: ThreadWorld) -> str:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Diverged) as caught:
            real = build

            def locked(*arguments: Any) -> Job:
                with one_at_a_time:
                    return real(*arguments)
            patch.setattr(loop, "build", locked)
            loop.run(config, world, torch.device("cpu"), Never())  # type: ignore[arg-type]
        return str(caught.value)
    assert len(set(run_threads(2, work))) == 1
    assert checkpoint.found(tmp_path / "checkpoints")[0].name == "step-00000003"
    assert json.loads((tmp_path / "summary.json").read_text())["outcome"] == "diverged"


def test_noise_on_the_mean_of_all_ranks_is_a_step_that_nobody_takes() -> None:
    def work(world: ThreadWorld) -> tuple[State, Any]:
        job = job_of(world, "--noise.kind", "broken-mean", "--max_bad_steps", "3")
        states: list[State] = []
        with pytest.raises(Diverged, match="3 steps in a row, the last at step"):
            steps(job, 9, after=lambda step: states.append(state_of(job)))
        assert not list(differences(states[2]["shared"], job.shared_state() | {
            "counters": states[2]["shared"].get("counters")}))
        return job.counters.bad_workers, job.counters.last_bad_step
    assert run_threads(2, work) == [({}, 7)] * 2  # told a step later


@pytest.mark.parametrize("name, value, rank", [
    ("13.bias", "inf", 0), ("2.bias", "-inf", 1)])  # the second before a ReLU: no loss shows it
def test_a_weight_that_is_not_finite_ends_the_run_at_once(name: str, value: str, rank: int) -> None:
    def work(world: ThreadWorld) -> str:
        job = job_of(world, *GNC)
        with pytest.raises(Diverged) as caught:
            steps(job, 9, weight_of(name, float(value), at={2}, rank=rank))
        assert job.counters.step == 3
        return str(caught.value)
    for text in run_threads(2, work):
        assert f"the weight {name} of rank {rank} is not finite at step 3" in text


def test_a_buffer_from_before_that_is_not_finite_ends_the_run_at_once() -> None:
    def fault(job: Job, step: int) -> None:
        if step == 2:
            next(iter(dict(job.model.named_buffers()).values()))[0] = float("nan")

    def work(world: ThreadWorld) -> None:
        job = job_of(world)
        with pytest.raises(Diverged, match="the buffer 2.running_mean of rank 0 .* at step 3"):
            steps(job, 9, fault)
    run_threads(1, work)
