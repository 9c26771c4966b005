"""The plan "group" on real ranks: groups that `hvdnoise.init` makes."""

from __future__ import annotations

import pytest
import torch

from hvdnoise import GNC
from tests.fake_world import ThreadWorld, run_threads
from tests.launcher import launch
from tests.toys import build, relative_error, train


@pytest.mark.parallel
@pytest.mark.parametrize("launcher", ["gloo", "mpi", "mpirun", "torchrun"])
def test_groups(launcher: str) -> None:
    def work(world: ThreadWorld) -> torch.Tensor:
        model, optimizer = build(world, GNC(0.4, source="gathered"), exchange="group:2")
        return train(model, optimizer, 4).weights[-1]
    expected = run_threads(4, work)[0]
    results = launch(4, "tests.parallel.test_plans:groups_on_this_rank", launcher=launcher)
    assert [members for members, _, _ in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    for _, weights, plan in results:
        assert plan == "group" and weights == results[0][1]
        assert relative_error(torch.tensor(weights, dtype=torch.float64), expected) < 1e-9


@pytest.mark.parallel
@pytest.mark.parametrize("plan, precision, explicit, launcher", [
    ("transpose", "fp32", False, "gloo"), ("allgather", "bf16", True, "gloo"),
    ("transpose", "bf16", True, "mpirun"), ("allgather", "fp32", False, "mpirun"),
    ("transpose", "fp32", False, "torchrun")])
def test_the_first_to_leave_waits_for_the_others(plan: str, precision: str, explicit: bool,
                                                 launcher: str) -> None:
    results = launch(4, "tests.parallel.test_plans:ranks_that_leave_at_different_times",
                     launcher=launcher, args=(plan, precision, explicit))
    assert results == [0, 1, 2, 3]
