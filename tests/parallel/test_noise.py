"""The noises on real ranks: W = 4 workers on 1, 2 or 4 ranks, against formulas and known laws.

Statistical checks are exact tests with a false alarm in a million at most (tests/laws.py).
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from typing import Any, Callable

import numpy as np
import torch
import yaml
from torch import nn

from hvdnoise import GNC, PNM, SAM, CovarianceNoise, DistributedOptimizer, MomentumSAM, streams
from hvdnoise.comm import World
from hvdnoise.training.config import NoiseConfig, TrainConfig
from hvdnoise.training.options import parse
from tests import linear, reference, runs
from tests.checks import on
from tests.fake_world import Meeting, ThreadWorld
from tests.laws import assert_normal
from tests.toys import Net, build, relative_error, train, vector

WORLDS = ["gloo-1", "gloo-2", "gloo-4", "mpi-4", "torchrun-4"]  # others in test_equality.py
WITH_TWO = (*WORLDS, "torchrun-2")
W, M = 4, 3
SAMPLES = 100  # steps; real ranks need milliseconds for each


def on_this_world(world: Any, noise: Any, num_steps: int = 3, **options: Any) -> Any:
    model, optimizer = build(world, noise, V=W // world.size, bucket_bytes=100, **options)
    return train(model, optimizer, num_steps)


def assert_formula(world: World, noise: Any, expected: list[tuple[Any, Any]]) -> None:
    model, optimizer = build(world, noise, V=W // world.size, bucket_bytes=100,
                             learning_rates=runs.RATES)

    def decay(step: int) -> None:
        for group, rate in zip(optimizer.param_groups, runs.RATES):
            group["lr"] = rate * 0.8 ** step
    runs.assert_same_run(train(model, optimizer, 3, before_step=decay), expected)


@on(*WITH_TWO)
def check_gnc_is_the_dense_formula(world: World) -> None:
    for case in (("own", "radius", False, 1, 2), ("gathered", "lr", True, 1, 2),
                 ("isotropic", "relative", False, 1, 2), ("gathered", "radius", False, 0, 2)):
        assert_formula(world, runs.make_gnc(*case), runs.dense_gnc(W, *case))


@on(*WITH_TWO)
def check_covariance_noise_is_the_dense_formula(world: World) -> None:
    for formula, options in runs.COVARIANCES.values():
        noise = CovarianceNoise(emulated_batch=M, seed=2, **options)
        assert_formula(world, noise, formula(W, M, 2))


def check_virtual_workers_are_workers(world: World) -> None:
    """The same as 1 rank x 4 workers, computed here without Horovod."""
    for name, make in runs.NOISES.items():
        here = on_this_world(world, make(), 20, momentum=0.9).weights[-1]
        alone = on_this_world(ThreadWorld(Meeting(1, 1.0), 0), make(), 20, momentum=0.9).weights[-1]
        assert relative_error(here, alone) < 1e-9, name


BASELINES: dict[str, tuple[str, Any]] = {
    "sam": ("radius: 0.3", lambda: SAM(0.3)),
    "momentum-sam": ("radius: 0.3, momentum: 0.5", lambda: MomentumSAM(0.3, momentum=0.5)),
    "pnm": ("beta: 0.5, beta0: 2", lambda: PNM(0.5, 2.0))}


@on("gloo-2", "mpi-4")
def check_baselines_of_a_settings_file(world: World) -> None:
    """The same as 1 rank x 4 workers, which tests/unit/test_neighbours.py compares with loops."""
    for kind, (options, make) in BASELINES.items():
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(f"noise: {{kind: {kind}, {options}}}\n")
            file.flush()
            config = parse(TrainConfig, ["--config", file.name], program="hvdnoise train")
        noise = config.noise.build(seed=0, batch_size=4, total_steps=1)
        here = on_this_world(world, noise, 6, momentum=0.9).weights[-1]
        alone = on_this_world(ThreadWorld(Meeting(1, 1.0), 0), make(), 6, momentum=0.9).weights[-1]
        assert relative_error(here, alone) < 1e-9, kind
        everyone = world.gather_json([float(each) for each in here], name="weights")
        assert all(each == everyone[0] for each in everyone), kind


@on("gloo-2", "mpi-4", "torchrun-2")
def check_a_loaded_baseline_goes_on(world: World) -> None:
    for kind, (_, make) in BASELINES.items():
        assert_goes_on(world, make, kind)


@on("gloo-2")
def check_shares_and_echo_of_a_settings_file(world: World) -> None:
    """The same as 1 rank x 4 workers, which unit tests compare with loops; and its three units."""
    for options in ("kind: gnc", "kind: gnc, relative: 0.1, scope: matrices, per: filter",
                    "kind: gnc, share: 0.04, echo: true", "kind: sam, share: 0.04, echo: true"):
        records = []
        for where in (world, ThreadWorld(Meeting(1, 1.0), 0)):
            noise = NoiseConfig(**yaml.safe_load(f"{{{options}}}")).build(
                seed=0, batch_size=4, total_steps=1)
            model, optimizer = build(where, noise, V=W // where.size, bucket_bytes=100)
            optimizer.measure = True
            records.append(train(model, optimizer, 4))
        here, alone = records
        assert relative_error(here.weights[-1], alone.weights[-1]) < 1e-9, options
        for mine, right in zip(here.measured, alone.measured):
            scale = mine.noise_radius, mine.noise_share, mine.noise_lr_multiple
            assert world.gather_json(scale, name="scale") == [list(scale)] * world.size
            assert scale == (None,) * 3 if right.noise_radius is None else np.allclose(scale, (
                right.noise_radius, right.noise_share, right.noise_lr_multiple), rtol=1e-9)
        assert sum(each.noise_radius is not None for each in here.measured) == (
            2 if "echo" in options else 3), options


@on(*WITH_TWO)
def check_replicas_stay_identical(world: World) -> None:
    """Bit for bit, after steps in float32 with every noise."""
    digests = {}
    for name, make in runs.NOISES.items():
        model, optimizer = build(world, make(), V=W // world.size, model=Net(torch.float32))
        train(model, optimizer, 3, dtype=torch.float32)
        digests[name] = hashlib.sha256(vector(model.parameters()).numpy().tobytes()).hexdigest()
    assert world.gather_json(digests, name="digests") == [digests] * world.size


def check_a_loaded_run_goes_on(world: World) -> None:
    for name in ("own", "gathered", "isotropic"):  # the rest has no state but the step
        assert_goes_on(world, runs.NOISES[name], name)


def assert_goes_on(world: World, make: Callable[[], Any], name: str) -> None:
    model, optimizer = build(world, make(), V=W // world.size)
    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    whole = train(model, optimizer, 2, first=2)
    other, resumed = build(world, make(), V=W // world.size)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    again = train(other, resumed, 2, first=2)
    assert torch.equal(again.weights[-1], whole.weights[-1]), name


def check_measured_is_the_same_on_all_ranks(world: World) -> None:
    for name in ("none", "gathered", "isotropic"):
        make = runs.NOISES[name]
        model, optimizer = build(world, make(), V=W // world.size)
        optimizer.measure = True
        record = train(model, optimizer, 2, loss_scale=8.0)
        alone_model, alone = build(ThreadWorld(Meeting(1, 1.0), 0), make(), V=W)
        alone.measure = True
        expected = train(alone_model, alone, 2).measured
        for mine, right in zip(record.measured, expected):
            values = [mine.worker_square_norm, mine.gradient_square_norm, mine.noise_rms]
            assert all(each == values for each in world.gather_json(values, name="measured"))
            assert np.allclose([value or 0 for value in values],
                               [right.worker_square_norm, right.gradient_square_norm,
                                right.noise_rms or 0], rtol=1e-9), name


# ---- laws

@on("gloo-2", "mpi-4", "torchrun-4")
def check_gathered_displacements_have_their_law(world: World) -> None:
    """All workers' displacements as one vector a step: each one's law, and their independence."""
    mine = linear.drive(world, GNC(0.7, source="gathered", seed=1), SAMPLES + 1)[0]  # type: ignore
    by_rank = world.allgather(mine.transpose(0, 1).contiguous(), name="seen").wait()
    deviations_WP = reference.deviations(linear.examples().mean(dim=1))
    covariance_PP = reference.gnc_gathered_covariance(
        deviations_WP, reference.expected_radius_scale(deviations_WP, 0.7))
    samples = by_rank.transpose(0, 1)[1:]
    assert_normal(samples.flatten(1), np.kron(np.eye(W), covariance_PP))
    assert_normal(samples.flatten(0, 1), covariance_PP, "pooled")


@on("gloo-2", "mpi-4", "torchrun-4")
def check_noise_on_the_gradient_has_its_law(world: World) -> None:
    gradients_BP = linear.examples().flatten(0, 1)
    workers_PP = reference.worker_covariance(linear.examples().mean(dim=1), linear.B_WORKER)
    for structure in ("isotropic", "layerwise", "diagonal"):  # 10,000 draws of each
        noise = CovarianceNoise(structure, M)
        gradients = linear.drive(world, noise, 10, copies=1000)[1]  # type: ignore[arg-type]
        assert_normal(gradients.view(-1, linear.P) - gradients_BP.mean(dim=0),
                      reference.noise_covariance(structure, workers_PP, len(gradients_BP), M),
                      structure)
    for structure, source, covariance_PP in (
            ("full", "workers", workers_PP),
            ("full", "examples", reference.example_second_moment(gradients_BP))):
        noise = CovarianceNoise(structure, M, source=source)
        gradients = linear.drive(world, noise, SAMPLES)[1]  # type: ignore[arg-type]
        assert_normal(gradients - gradients_BP.mean(dim=0), reference.noise_covariance(
            structure, covariance_PP, len(gradients_BP), M), f"{structure} from {source}")


@on("gloo-2", "mpi-4", "torchrun-4")
def check_kronecker_noise_has_its_law(world: World) -> None:
    """100 layers alike in 100 steps: 10,000 draws."""
    a_WbI, g_WbO = (streams.normal((W, linear.B_WORKER, size), 5, "law", size, dtype=torch.float64)
                    for size in (2, 3))
    torch.manual_seed(6)
    layers = nn.ModuleList(nn.Linear(2, 3, dtype=torch.float64) for _ in range(100))
    optimizer = DistributedOptimizer(
        torch.optim.SGD(layers.parameters(), lr=0.0), layers.named_parameters(),
        noise=CovarianceNoise("kronecker", M, damping=0.0), virtual_workers=W // world.size,
        world=world)
    draws = []
    for _ in range(100):
        optimizer.zero_grad()
        for v in optimizer.workers:
            outputs = torch.stack([layer(a_WbI[v]) for layer in layers])
            (outputs * g_WbO[v]).sum().div(linear.B_WORKER).backward()
        optimizer.step()
        draws += [torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).flatten()
                  for layer in layers]
    a_BI = torch.cat([a_WbI, torch.ones_like(a_WbI[..., :1])], 2).flatten(0, 1)
    g_BO, B = g_WbO.flatten(0, 1), W * linear.B_WORKER
    assert_normal(torch.stack(draws) - (g_BO.T @ a_BI / B).flatten(),
                  (1 / M - 1 / B) * np.kron(g_BO.T @ g_BO / B, a_BI.T @ a_BI / B))


# ---- refusals, last: they leave a step unfinished

def check_ranks_with_different_noise_are_told(world: World) -> None:
    try:
        on_this_world(world, GNC(0.1 + world.rank), 1)
    except ValueError as error:
        assert world.size > 1 and "noise on rank 1" in str(error) and "\n" not in str(error)
    else:
        assert world.size == 1
    world.barrier("after")
