"""What the launcher says of this process, before the ranks start."""

from __future__ import annotations

import os
from typing import Mapping

_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_TORCHRUN = "TORCHELASTIC_RUN_ID"
# launcher -> its names of (rank, size, local rank, local size); the first one that is found counts,
# so what was started inside of something else comes before it
_RANK_VARIABLES = (
    ("horovodrun", ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE")),
    ("torchrun", (*_TORCH, _TORCHRUN)),
    ("mpirun", ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_SIZE")),
    ("hydra", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    ("torchrun", (*_TORCH, "MASTER_ADDR", "MASTER_PORT")))  # set by hand, or Kubeflow's PyTorchJob

# Equal on the ranks of one launch, and different between launches on a host.
_JOB_VARIABLES = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT", "PMIX_NAMESPACE",
                  "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "SLURM_STEP_ID", _TORCHRUN,
                  "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")


def _found(given: Mapping[str, str]) -> tuple[str | None, tuple[str, ...]]:
    """The launcher, and its names of rank, size, local rank and local size."""
    for name, names in _RANK_VARIABLES:
        if all(each in given for each in (*names[:2], *names[4:])):
            return name, names[:4]
    return ("srun" if "SLURM_STEP_ID" in given else None), ()


def launcher(variables: Mapping[str, str] | None = None) -> str | None:
    """What started this process: horovodrun, torchrun, mpirun, hydra or srun; None: none of them.

    "torchrun" is whatever sets its variables.
    """
    return _found(os.environ if variables is None else variables)[0]


def launched() -> bool:
    """Whether a launcher started this process."""
    return launcher() is not None


def environment(variables: Mapping[str, str] | None = None) -> dict[str, int]:
    """Rank, size, local rank and local size as the launcher tells them, before the ranks start.

    Args:
        variables: of the process that is meant; default: of this one.
    """
    given = os.environ if variables is None else variables
    keys = ("rank", "size", "local_rank", "local_size")
    _, names = _found(given)
    if names:
        return {key: int(given.get(name, default))
                for key, name, default in zip(keys, names, "0101")}
    if "SLURM_STEP_ID" in given and "SLURM_PROCID" in given:
        size = int(given.get("SLURM_NTASKS", "1"))
        return {"rank": int(given["SLURM_PROCID"]), "size": size,
                "local_rank": int(given.get("SLURM_LOCALID", "0")),
                "local_size": int(given.get("SLURM_TASKS_PER_NODE", "1").split("(")[0])}
    return dict(zip(keys, (0, 1, 0, 1)))


def job(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """What tells a launch from others on the same host; empty where no launcher says."""
    given = os.environ if variables is None else variables
    # MPICH's mpirun says nothing, and its own processes have what launch/mpirun.sh says
    names = (*_JOB_VARIABLES, "HVDNOISE_LAUNCH") if "PMI_RANK" in given else _JOB_VARIABLES
    return {name: given[name] for name in names if name in given}
