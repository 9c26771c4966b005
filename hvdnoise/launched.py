"""What the launcher says of this process, before Horovod starts."""

from __future__ import annotations

import os

_RANK_VARIABLES = {  # launcher -> its names of (rank, size, local rank, local size)
    "horovodrun": ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
               "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "hydra": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


def launched() -> bool:
    """Whether a launcher started this process."""
    return any(name in os.environ for name in (
        "SLURM_STEP_ID", *(names[0] for names in _RANK_VARIABLES.values())))


def environment() -> dict[str, int]:
    """Rank, size, local rank and local size as the launcher tells them, before Horovod starts."""
    keys = ("rank", "size", "local_rank", "local_size")
    for names in _RANK_VARIABLES.values():
        if names[0] in os.environ and names[1] in os.environ:
            return {key: int(os.environ.get(name, default))
                    for key, name, default in zip(keys, names, "0101")}
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
        size = int(os.environ.get("SLURM_NTASKS", "1"))
        return {"rank": int(os.environ["SLURM_PROCID"]), "size": size,
                "local_rank": int(os.environ.get("SLURM_LOCALID", "0")),
                "local_size": int(os.environ.get("SLURM_TASKS_PER_NODE", "1").split("(")[0])}
    return dict(zip(keys, (0, 1, 0, 1)))
