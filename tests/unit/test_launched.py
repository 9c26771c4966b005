"""Which launcher started a process, and what it says of the ranks."""

from __future__ import annotations

import pytest

from hvdnoise.launched import environment, job, launcher

HOROVODRUN = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "1",
              "HOROVOD_LOCAL_SIZE": "2"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3",
          "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1",
        "SLURM_TASKS_PER_NODE": "2"}
BY_HAND = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {**BY_HAND, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize("variables, name, expected", [
    ({}, None, (0, 1, 0, 1)), (HOROVODRUN, "horovodrun", (1, 2, 1, 2)),
    (MPIRUN, "mpirun", (2, 3, 0, 1)), (SRUN, "srun", (1, 2, 1, 2)),
    (TORCHRUN, "torchrun", (3, 4, 1, 2)), (BY_HAND, "torchrun", (3, 4, 0, 1)),
    # one inside another: what is nearer to the ranks counts
    ({**SRUN, **TORCHRUN}, "torchrun", (3, 4, 1, 2)),
    ({**MPIRUN, **TORCHRUN}, "torchrun", (3, 4, 1, 2)),
    ({**TORCHRUN, **HOROVODRUN}, "horovodrun", (1, 2, 1, 2)),
    ({**SRUN, **BY_HAND}, "torchrun", (3, 4, 0, 1)),
    # variables that a cluster sets for every job do not take ranks from MPI
    ({**MPIRUN, **BY_HAND}, "mpirun", (2, 3, 0, 1)),
    # and less than all of them say nothing
    ({"RANK": "1", "WORLD_SIZE": "2"}, None, (0, 1, 0, 1)),
    ({"MASTER_ADDR": "node1", "MASTER_PORT": "1"}, None, (0, 1, 0, 1))])
def test_the_nearest_launcher_counts(variables: dict[str, str], name: str | None,
                                     expected: tuple[int, ...]) -> None:
    assert launcher(variables) == name
    assert tuple(environment(variables).values()) == expected


def test_launches_by_torchrun_are_told_apart() -> None:
    assert job(TORCHRUN) != job({**TORCHRUN, "MASTER_PORT": "29501"})
    assert job({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "0"}) != \
        job({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"})
    assert job({**TORCHRUN, "RANK": "0"}) == job(TORCHRUN)
