"""Launches that must end: a rank stalls, or goes its own way; and life inside other programs."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import pytest
import torch

import hvdnoise
from tests.launcher import Ended, attempt, launch
from tests.parallel.toys import loss_of, net, weights


def optimizer_for(model: torch.nn.Module, **options: Any) -> Any:
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return hvdnoise.DistributedOptimizer(inner, model.named_parameters(), **options)


def train(model: torch.nn.Module, optimizer: Any, rank: int, steps: range) -> None:
    for n in steps:
        optimizer.zero_grad()
        loss_of(model, rank, n).backward()
        optimizer.step()


# ---- ranks that hang

def stall() -> None:
    """Rank 1 sleeps in the third step."""
    world, model = hvdnoise.init(), net()
    optimizer = optimizer_for(model)
    train(model, optimizer, world.rank, range(2))
    if world.rank == 1:
        time.sleep(60)
    train(model, optimizer, world.rank, range(2, 4))


def freeze_alone() -> None:
    """Rank 1 alone trains fewer parameters from the third step on."""
    world, model = hvdnoise.init(), net()
    optimizer = optimizer_for(model)
    train(model, optimizer, world.rank, range(2))
    if world.rank == 1:
        model.convolution.requires_grad_(False)
    train(model, optimizer, world.rank, range(2, 4))


def run_out_of_data() -> None:
    """Rank 1 has no more batches, and calls hvd.join(); what rank 0 does gathers from all ranks."""
    world, model = hvdnoise.init(), net()
    optimizer = optimizer_for(model, noise=hvdnoise.GNC(radius=0.05, source="gathered"))
    train(model, optimizer, world.rank, range(4 if world.rank == 0 else 2))
    import horovod.torch as hvd
    with contextlib.suppress(RuntimeError):  # or the launcher ends rank 0 before it has told
        hvd.join()


def run(function: str, launcher: str, seconds: float) -> Ended:
    """A launch that must end by itself in time, badly, with nothing left."""
    ended = attempt(2, f"{__file__}:{function}", launcher=launcher, timeout=60,
                    env={"HVDNOISE_TIMEOUT": str(seconds)})
    assert ended.exit_code not in (0, None) and not ended.leftovers, ended.report()
    return ended


def assert_ends_itself(launcher: str) -> None:
    ended = run("stall", launcher, 6)
    assert "rank 0 waited 6 s for 'hvdnoise." in ended.logs[0], ended.report()
    assert "HVDNOISE_TIMEOUT" in ended.logs[0] and "waited" not in ended.logs[1], ended.report()


def test_a_stalled_rank_gloo() -> None:
    assert_ends_itself("gloo")


def test_a_stalled_rank_mpi() -> None:
    assert_ends_itself("mpi")


def test_a_stalled_rank_torchrun() -> None:
    assert_ends_itself("torchrun")


@pytest.mark.parametrize("launcher, said", [("gloo", "ismatched"),
                                            ("torchrun", "different things")])
def test_a_rank_that_changes_its_layout_alone(launcher: str, said: str) -> None:
    """Not after the watchdog's time: the shapes are compared."""
    ended = run("freeze_alone", launcher, 40)
    assert said in ended.errors[0] and ended.seconds < 40, ended.report()


def test_a_rank_that_has_run_out_of_data() -> None:
    """Horovod ends on rank 1, which cannot answer; rank 0 is told of it, and names join."""
    ended = run("run_out_of_data", "gloo", 40)
    assert "hvd.join()" in ended.errors[0] and "own" in ended.errors[0], ended.report()


# ---- inside a larger program

def train_on_a_part() -> dict[str, Any]:
    """Ranks 0 and 2 of COMM_WORLD train; rank 1 collects what they report, step by step."""
    from mpi4py import MPI
    everyone, members = MPI.COMM_WORLD, (0, 2)
    inside = everyone.rank in members
    part = everyone.Split(0 if inside else MPI.UNDEFINED, everyone.rank)
    if not inside:
        reports = [everyone.recv(source=rank, tag=n) for n in range(4) for rank in members]
        total = everyone.allreduce(1)
        return {"reports": reports, "total": total, "horovod": "horovod.torch" in sys.modules}
    world, model = hvdnoise.init(part), net()
    optimizer = optimizer_for(model, noise=hvdnoise.GNC(radius=0.05, source="gathered"))
    for n in range(4):
        train(model, optimizer, world.rank, range(n, n + 1))
        everyone.send([n, world.rank, world.size], dest=1, tag=n)
    return {"weights": weights(model), "total": everyone.allreduce(1)}


def test_training_on_a_part_of_an_mpi_program() -> None:
    first, other, second = launch(3, f"{__file__}:train_on_a_part", launcher="mpirun")
    assert other["reports"] == [[n, rank, 2] for n in range(4) for rank in range(2)]
    assert first["total"] == second["total"] == other["total"] == 3
    pairs = list(zip(first["weights"], second["weights"]))
    assert len(pairs) == 7 and all(torch.equal(a, b) for a, b in pairs)
