"""The collectives of a world: Horovod's real ranks and the fake's threads pass the same checks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdnoise import DistributedOptimizer
from hvdnoise.comm import World, environment, handshake, init
from tests.checks import on
from tests.launcher import attempt, launch

WORLDS = ["threads-1", "threads-2", "threads-4", "none-1", "gloo-1", "gloo-2", "gloo-4",
          "mpi-2", "mpi-4", "mpirun-1", "mpirun-2", "mpirun-4", "torchrun-2", "torchrun-4"]
SEVERAL = [world for world in WORLDS if not world.endswith("-1")]
REAL = [world for world in WORLDS if not world.startswith("threads")]
WATCHDOG_SECONDS = 45  # import, 3 s of waiting, and the launcher's end, on a busy machine


def of_rank(rank: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A tensor that only this rank has, but that every rank can compute."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-50, 50, shape, generator=generator).to(dtype)


def of_all(world: World, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.stack([of_rank(rank, *shape, dtype=dtype) for rank in range(world.size)])


def check_rank_and_size(world: World) -> None:
    ranks = world.allgather(torch.tensor([world.rank]), name="ranks").wait()
    assert ranks.tolist() == list(range(world.size))
    assert (world.local_rank, world.local_size) == (world.rank, world.size)  # one host


@on(*REAL)
def check_environment_knows_the_rank_before_horovod(world: World) -> None:
    expected = {"rank": world.rank, "size": world.size, "local_rank": world.local_rank,
                "local_size": world.local_size}
    assert environment() == expected


def check_allreduce_every_op_and_dtype(world: World) -> None:
    for dtype in (torch.float32, torch.float64, torch.int32, torch.int64):
        everyone = of_all(world, 3, 5, dtype=dtype)
        for op, expected in (("sum", everyone.sum(0)), ("min", everyone.amin(0)),
                             ("max", everyone.amax(0)), ("product", everyone.prod(0))):
            mine = of_rank(world.rank, 3, 5, dtype=dtype)
            result = world.allreduce_(mine, name=f"{op}.{dtype}", op=op).wait()
            assert result.dtype == dtype and torch.equal(result, expected.to(dtype)), (op, dtype)
            assert torch.equal(mine, result), "in place"


def check_allreduce_averages_by_default(world: World) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        mine = of_rank(world.rank, 7, dtype=dtype)
        world.allreduce_(mine, name=f"average.{dtype}").wait()
        expected = of_all(world, 7).mean(0)
        assert torch.allclose(mine.double(), expected, rtol=2 * torch.finfo(dtype).eps), dtype


@on(*SEVERAL)
def check_allreduce_scales_before_and_after(world: World) -> None:
    everyone = of_all(world, 4)
    for op, expected in (("sum", 3 * everyone.sum(0)), ("average", 3 * everyone.mean(0))):
        mine = of_rank(world.rank, 4)
        world.allreduce_(mine, name=f"scaled.{op}", op=op, prescale=0.5, postscale=6.0).wait()
        assert torch.allclose(mine, expected, rtol=1e-14), op


def check_ranks_get_the_same_bits(world: World) -> None:
    generator = torch.Generator().manual_seed(world.rank)
    mine = torch.randn(10_001, generator=generator)
    world.allreduce_(mine, name="noise").wait()
    copies = world.allgather(mine[None], name="copies").wait()
    assert torch.equal(copies, mine.expand(world.size, -1))


def check_allreduce_scalar_and_empty(world: World) -> None:
    scalar = torch.tensor(float(world.rank))
    world.allreduce_(scalar, name="scalar", op="max").wait()
    assert scalar.shape == () and scalar.item() == world.size - 1


def check_allgather_joins_in_rank_order(world: World) -> None:
    gathered = world.allgather(of_rank(world.rank, 2, 3), name="even").wait()
    assert torch.equal(gathered, of_all(world, 2, 3).flatten(0, 1))


def check_allgather_takes_different_lengths(world: World) -> None:
    gathered = world.allgather(of_rank(world.rank, world.rank, 2), name="uneven").wait()
    expected = torch.cat([of_rank(rank, rank, 2) for rank in range(world.size)])
    assert torch.equal(gathered, expected)


def check_allgather_leaves_its_argument_alone(world: World) -> None:
    mine = of_rank(world.rank, 2)
    world.allgather(mine, name="alone").wait()
    assert torch.equal(mine, of_rank(world.rank, 2))


def check_broadcast_from_every_root(world: World) -> None:
    for root in range(world.size):
        mine = of_rank(world.rank, 5)
        result = world.broadcast_(mine, root=root, name=f"from{root}").wait()
        assert torch.equal(mine, of_rank(root, 5)) and torch.equal(result, mine)


def check_gather_json(world: World) -> None:
    value: Any = {"rank": world.rank, "text": "é" * world.rank, "list": [None, 1.5, True]}
    everyone = world.gather_json(value, name="json")
    assert [each["rank"] for each in everyone] == list(range(world.size))
    assert [each["text"] for each in everyone] == ["é" * rank for rank in range(world.size)]
    assert everyone[world.rank] == value
    assert world.gather_json(None, name="json") == [None] * world.size


def check_many_in_flight_in_any_order(world: World) -> None:
    names = [f"flight{n}" for n in range(20)]
    own_order = names if world.rank % 2 else names[::-1]
    tensors = {name: torch.full((n + 1,), float(world.rank)) for n, name in enumerate(names)}
    handles = {name: world.allreduce_(tensors[name], name=name, op="sum") for name in own_order}
    total = sum(range(world.size))
    for name in names:
        assert torch.equal(handles[name].wait(), torch.full_like(tensors[name], float(total)))


def check_done_after_a_while(world: World) -> None:
    handle = world.allreduce_(torch.ones(3), name="polled")
    world.barrier("polled.barrier")
    for _ in range(1000):
        if handle.done():
            break
        torch.ones(1000).sum()
    handle.wait()


def check_a_name_serves_again(world: World) -> None:
    for turn in range(50):
        mine = torch.tensor([float(turn + world.rank)])
        world.allreduce_(mine, name="again", op="min").wait()
        assert mine.item() == turn
        world.barrier("again")


@on(*SEVERAL)
def check_ranks_that_disagree_are_told(world: World) -> None:
    """The shapes of what is reduced are compared; every rank gets the error, none hangs."""
    mine = torch.zeros(2 + (world.rank == 1))
    try:
        world.allreduce_(mine, name="disagree", op="sum").wait()
    except Exception as error:
        assert "disagree" in str(error) or "shape" in str(error).lower(), error
    else:
        raise AssertionError("different shapes were reduced")
    world.barrier("after.disagree")  # and the world lives


def check_handshake_agrees(world: World) -> None:
    handshake(world, {"version": "1", "config": {"b": 2, "a": 1}}, name="agree")


@on(*SEVERAL)
def check_handshake_names_ranks_and_keys(world: World) -> None:
    facts = {"same": 1, "lr": 0.1 + (world.rank == world.size - 1)}
    if world.rank == 1:
        facts["only here"] = 1
    try:
        handshake(world, facts, name="differ")
    except ValueError as error:
        assert "same" not in str(error).split(";")[0] and "only here on rank 1" in str(error)
        assert f"lr on rank {world.size - 1}" in str(error) and "\n" not in str(error)
    else:
        raise AssertionError("the handshake passed")
    world.barrier("after.differ")


@on("none-1", "gloo-2", "torchrun-2")
def check_mpi4py_is_not_imported_without_mpi(world: World) -> None:
    assert "mpi4py" not in sys.modules
    world.barrier("mpi4py")


@on("gloo-2", "torchrun-2")
def check_horovod_is_not_imported_under_torchrun(world: World) -> None:
    assert ("horovod" in sys.modules) is (world.transport != "torch")
    world.barrier("horovod")


class Fp16:
    """As hvd.Compression.fp16, without importing Horovod."""


@on("torchrun-2")
def check_what_only_horovod_has_is_refused_in_one_line(world: World) -> None:
    for options in ({"op": "adasum"}, {"compression": Fp16}, {"process_set": object()}):
        model = torch.nn.Linear(2, 1)
        try:
            DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)
            raise AssertionError(options)
        except ValueError as error:
            assert "Horovod's" in str(error) and "horovodrun" in str(error), error
            assert "\n" not in str(error)
    try:
        init(comm=Communicator())
        raise AssertionError("there is no MPI")
    except ValueError as error:
        assert "leave comm out" in str(error) and "\n" not in str(error)
    world.barrier("refused")


class Communicator:
    """As mpi4py's."""

    def Get_rank(self) -> int:
        return 0


@on("torchrun-4")
def check_groups_negotiate_apart(world: Any) -> None:
    """Each group in its own order and of other things, under the same name."""
    init(group_size=2)
    group = world.group(2)
    shape = (3,) if world.rank < 2 else (5, 2)
    mine = torch.full(shape, float(world.rank))
    assert group.allreduce_(mine, name="apart", op="sum").wait()[0].flatten()[0] == \
        (1.0 if world.rank < 2 else 5.0)
    total = world.allreduce_(torch.ones(1), name="apart", op="sum").wait()
    assert total.item() == 4 and group.broadcast_(
        torch.tensor([world.rank]), root=1, name="root").wait().item() == world.rank // 2 * 2 + 1


# ---- parts of an MPI world

def reduce_in_part(members: list[int]) -> dict[str, Any]:
    """Rank's view when only ``members`` of COMM_WORLD become Horovod's ranks."""
    from mpi4py import MPI

    from hvdnoise import comm
    everyone = MPI.COMM_WORLD
    part = everyone.Split(0 if everyone.rank in members else MPI.UNDEFINED, everyone.rank)
    seen: dict[str, Any] = {"mpi_rank": everyone.rank, "member": everyone.rank in members}
    if part != MPI.COMM_NULL:
        world = comm.init(part)
        total = world.allreduce_(torch.tensor([everyone.rank]), name="part", op="sum").wait()
        seen |= {"rank": world.rank, "size": world.size, "total": total.item(),
                 "again": comm.init(part).size, "ranks": world.gather_json(everyone.rank, name="r")}
        root = world.size - 1
        seen["root"] = world.broadcast_(torch.tensor([everyone.rank]), root=root,
                                        name="root").wait().item()
    everyone.Barrier()  # MPI still works beside Horovod, for members and others
    return seen


def two_groups() -> dict[str, Any]:
    """Even and odd ranks train apart, each group a Horovod world of its own."""
    from mpi4py import MPI

    from hvdnoise import comm
    everyone = MPI.COMM_WORLD
    world = comm.init(everyone.Split(everyone.rank % 2, everyone.rank))
    return {"rank": world.rank, "ranks": world.gather_json(everyone.rank, name="r")}


def hand_over_nonsense() -> str:
    from hvdnoise import comm
    try:
        comm.init([0, 1])
    except ValueError as error:
        return str(error)
    return "accepted"


def _check_part(np: int, members: list[int]) -> None:
    seen = launch(np, f"{__file__}:reduce_in_part", args=(members,), launcher="mpirun", timeout=60)
    for each in seen:
        if each["mpi_rank"] in members:
            assert each["rank"] == members.index(each["mpi_rank"])
            assert each["size"] == each["again"] == len(members)
            assert each["total"] == sum(members) and each["ranks"] == members
            assert each["root"] == members[-1]
        else:
            assert not each["member"] and "rank" not in each


def test_part_of_three() -> None:
    _check_part(3, [0, 2])


def test_part_of_four_without_rank_zero() -> None:
    _check_part(4, [1, 2, 3])


def test_all_of_comm_world() -> None:
    _check_part(3, [0, 1, 2])


def test_two_groups_side_by_side() -> None:
    seen = launch(4, f"{__file__}:two_groups", launcher="mpirun", timeout=60)
    assert [each["rank"] for each in seen] == [0, 0, 1, 1]
    assert [each["ranks"] for each in seen] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_no_communicator() -> None:
    [text] = launch(1, f"{__file__}:hand_over_nonsense", launcher="none", timeout=60)
    assert "[0, 1]" in text and "communicator" in text


# ---- the watchdog

def leave_rank_one_behind() -> None:
    from hvdnoise import comm
    world = comm.init()
    world.barrier("together")
    if world.rank != 1:
        world.barrier("lonely")
    import time
    time.sleep(60)


def _check_watchdog(launcher: str) -> None:
    ended = attempt(3, f"{__file__}:leave_rank_one_behind", launcher=launcher, timeout=60,
                    env={"HVDNOISE_TIMEOUT": "3"})
    assert ended.exit_code not in (0, None) and not ended.leftovers, ended.report()
    assert ended.seconds < WATCHDOG_SECONDS, ended.report()
    assert "rank 0 waited 3 s for 'hvdnoise.lonely'" in ended.logs[0] + ended.logs[2].replace(
        "rank 2", "rank 0"), ended.report()
    assert "waited" not in ended.logs[1]


def test_watchdog_names_the_collective_gloo() -> None:
    _check_watchdog("gloo")


def test_watchdog_names_the_collective_mpi() -> None:
    _check_watchdog("mpirun")


# ---- torch.distributed

def inside_torch_distributed(place: str) -> dict[str, Any]:
    """A program that has initialized torch.distributed, and uses it beside."""
    import torch.distributed as dist

    from hvdnoise import comm
    if place:
        given = comm.environment()
        dist.init_process_group("gloo", init_method=f"file://{place}", rank=given["rank"],
                                world_size=given["size"])
    else:
        dist.init_process_group("gloo")
    first = torch.ones(1)
    dist.all_reduce(first)
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 1)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.full((1, 3), float(dist.get_rank()))).sum().backward()
    second = torch.ones(1)
    dist.all_reduce(second)
    optimizer.step()
    world = comm.init()
    comm.shutdown()
    dist.barrier()  # it is the program's, and stays
    return {"sums": [first.item(), second.item()], "transport": world.transport,
            "gradient": model.weight.grad.tolist(), "rank": [world.rank, world.size]}


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_torch_distributed_that_is_initialized_is_used(launcher: str, tmp_path: Path) -> None:
    """Also where mpirun started the ranks, and the program has told torch where they meet."""
    place = str(tmp_path / "store") if launcher == "mpirun" else ""
    seen = launch(2, f"{__file__}:inside_torch_distributed", launcher=launcher, timeout=60,
                  args=(place,))
    for rank, each in enumerate(seen):
        assert each == {"sums": [2.0, 2.0], "transport": "torch", "rank": [rank, 2],
                        "gradient": [[0.5, 0.5, 0.5]]}


def start_horovod_that_knows_one_rank() -> list[str]:
    import horovod.torch as hvd

    import hvdnoise
    model = torch.nn.Linear(2, 1)
    hvd.init()
    said = []
    for call in (hvdnoise.init, lambda: hvdnoise.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1))):
        with pytest.raises(RuntimeError) as error:
            call()  # type: ignore[no-untyped-call]
        said.append(str(error.value))
    return said


@pytest.mark.parametrize("launcher, text", [
    ("torchrun", "it knows 1 of 2 ranks"),
    ("mpirun", "the launcher started 2 ranks, and Horovod knows 1 of them")])
def test_ranks_that_would_train_alone_are_refused(launcher: str, text: str) -> None:
    """As under the mpirun of another MPI than Horovod's; here Gloo without a rendezvous."""
    seen = launch(2, f"{__file__}:start_horovod_that_knows_one_rank", launcher=launcher,
                  timeout=60, env={"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"})
    assert all(text in each and "\n" not in each for said in seen for each in said), seen
