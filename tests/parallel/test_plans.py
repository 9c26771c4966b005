"""The plans of the exchange on real ranks: W = 4 workers, against the formula and each other."""

from __future__ import annotations

import copy
import hashlib
import time
from typing import Any

import torch

from hvdnoise import GNC, comm
from hvdnoise.comm import World
from tests import runs
from tests.checks import on
from tests.toys import Net, build, relative_error, train, vector

WORLDS = ["gloo-1", "gloo-2", "gloo-4", "mpi-4", "torchrun-4"]
W = 4
SAME = ("allgather", "gather-only", "transpose")


def plans(world: World) -> list[dict[str, str]]:
    several = [{"exchange": plan, "noise_precision": precision} for plan in SAME
               for precision in ("fp32", "bf16", "fp16")
               if (plan, precision) not in (("gather-only", "bf16"), ("gather-only", "fp16"))]
    return several if world.size > 1 else [{"exchange": "auto"}]


@on(*WORLDS, "torchrun-2")
def check_plans_are_the_dense_formula(world: World) -> None:
    for lag, plan in ((1, "allgather"), (1, "gather-only"), (1, "transpose"), (0, "transpose"),
                      (2, "allgather"), (2, "transpose")):
        case = ("gathered", "radius", False, lag, 2)
        model, optimizer = build(world, runs.make_gnc(*case), V=W // world.size, exchange=plan,
                                 bucket_bytes=100, learning_rates=runs.RATES)

        def decay(step: int) -> None:
            for group, rate in zip(optimizer.param_groups, runs.RATES):
                group["lr"] = rate * 0.8 ** step
        runs.assert_same_run(train(model, optimizer, 4, before_step=decay),
                             runs.dense_gnc(W, *case, steps=4))


def check_replicas_stay_identical(world: World) -> None:
    """Bit for bit, in float32, under every plan, precision and lag."""
    digests = {}
    for plan in plans(world):
        for lag in (1, 2):
            noise = GNC(0.4, source="gathered", lag=lag)
            model, optimizer = build(world, noise, V=W // world.size, model=Net(torch.float32),
                                     bucket_bytes=50, **plan)
            train(model, optimizer, 5, dtype=torch.float32)
            digest = hashlib.sha256(vector(model.parameters()).numpy().tobytes()).hexdigest()
            digests[f"{plan} {lag}"] = digest
    assert world.gather_json(digests, name="digests") == [digests] * world.size


def check_a_loaded_run_goes_on(world: World) -> None:
    for plan in plans(world):
        for lag in (1, 2):
            def make() -> Any:
                return build(world, GNC(0.4, source="gathered", lag=lag), V=W // world.size, **plan)
            model, optimizer = make()
            train(model, optimizer, 3)
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            whole = train(model, optimizer, 3, first=3)
            other, resumed = make()
            other.load_state_dict(saved[0])
            resumed.load_state_dict(saved[1])
            again = train(other, resumed, 3, first=3)
            assert torch.equal(again.weights[-1], whole.weights[-1]), (plan, lag)


@on("gloo-2", "gloo-4", "mpi-4", "torchrun-4")
def check_16_bits_are_near(world: World) -> None:
    def weights(**plan: str) -> Any:
        model, optimizer = build(world, GNC(0.4, source="gathered"), V=W // world.size, **plan)
        return train(model, optimizer, 2).weights[-1]
    exact = weights(exchange="transpose")
    for plan in plans(world):
        error = relative_error(weights(**plan), exact)
        assert error < 1e-2 and (error > 1e-9) is (plan["noise_precision"] != "fp32"), plan


@on("gloo-2", "gloo-4", "mpi-4", "torchrun-4")
def check_alltoall(world: World) -> None:
    """Uneven and empty parts, every dtype that travels, into storage that was given."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8):
        splits = [(world.rank + 2 * to) % 3 for to in range(world.size)]
        sent = torch.arange(sum(splits)).add(10 * world.rank).to(dtype)
        expected = []
        for rank in range(world.size):
            counts = [(rank + 2 * to) % 3 for to in range(world.size)]
            first = sum(counts[:world.rank])
            expected += [10 * rank + first + n for n in range(counts[world.rank])]
        out = torch.empty(len(expected), dtype=dtype)
        got = world.alltoall(sent, splits, name="uneven", out=out).wait()
        assert got.tolist() == out.tolist() == expected and got.dtype == dtype
        assert world.alltoall(sent, splits, name="new").wait().tolist() == expected


@on("gloo-2", "gloo-4", "mpi-4", "torchrun-4")
def check_allgather_into_storage(world: World) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(world.size * 3, 2, dtype=dtype)
        sent = torch.full((3, 2), float(world.rank), dtype=dtype)
        got = world.allgather(sent, name="into", out=out).wait()
        assert got.data_ptr() == out.data_ptr()
        assert out[::3, 0].tolist() == list(range(world.size))


@on("gloo-2", "mpi-4", "torchrun-2")
def check_copies_in_the_hosts_memory_travel_alike(world: Any) -> None:
    """What several ranks on one GPU do, here with tensors that are in the host's memory anyway."""
    def weights(plan: dict[str, str]) -> Any:
        model, optimizer = build(world, GNC(0.4, source="gathered"), V=W // world.size, **plan)
        return train(model, optimizer, 3).weights[-1]
    for plan in ({"exchange": "transpose", "noise_precision": "bf16"}, {"exchange": "allgather"},
                 {"exchange": "gather-only"}):
        direct = weights(plan)
        world._through_host = lambda tensor: True
        try:
            assert torch.equal(weights(plan), direct), plan
            shared = torch.full((3,), float(world.rank))
            assert world.broadcast_(shared, root=1, name="b").wait().tolist() == [1.0] * 3
            assert shared.tolist() == [1.0] * 3
        finally:
            del world._through_host


@on("gloo-2", "gloo-4", "mpi-4", "torchrun-4")
def check_a_group_that_was_not_made_is_refused(world: World) -> None:
    """Before anything travels, and saying how to make it."""
    try:
        world.group(3)
        raise AssertionError("3 divides no 2 or 4")
    except ValueError as error:
        assert "divide" in str(error)
    if world.size == 4:
        try:
            build(world, GNC(0.4, source="gathered"), exchange="group:2")
            raise AssertionError("there is no such group")
        except ValueError as error:
            assert "hvdnoise.init(group_size=2)" in str(error) and "\n" not in str(error)


def groups_on_this_rank() -> list[Any]:
    """Run by test_groups in a launch of its own, because groups are made at the start."""
    world = comm.init(group_size=2)
    group = world.group(2)
    members = group.gather_json(world.rank, name="members")
    model, optimizer = build(world, GNC(0.4, source="gathered"), exchange="group:2")
    weights = train(model, optimizer, 4).weights[-1].tolist()
    comm.shutdown()
    return [members, weights, optimizer.exchange_plan]


def ranks_that_leave_at_different_times(plan: str, precision: str, explicit: bool) -> int:
    """Lag 2: what is on its way at the end of the last step must not fail on the slower ranks."""
    world = comm.init()
    model, optimizer = build(world, GNC(0.4, source="gathered", lag=2), exchange=plan,
                             noise_precision=precision)
    train(model, optimizer, 4)
    if world.rank == 1:
        time.sleep(1.0)
    if world.rank > 0:
        optimizer.state_dict()  # waits for all of it
    if explicit:
        comm.shutdown()
    return world.rank
