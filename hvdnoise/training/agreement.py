"""What all ranks must have alike before they train, compared by digests.

The settings, all of them but those in `OF_A_HOST`; the variables of the environment that change
results or how ranks talk to each other; code and versions (`hvdnoise.training.records.versions`);
and the data, once it is there.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from hvdnoise.comm import World, handshake
from hvdnoise.training.config import ConfigError, TrainConfig, flatten
from hvdnoise.training.data import Datasets
from hvdnoise.training.dataspec import DataConfig
from hvdnoise.training.digest import digests_of
from hvdnoise.training.together import call_or_raise

# Settings that may differ between hosts: paths, cores, and what one sees on the terminal.
OF_A_HOST = {"data.root", "data.download", "data.loader_workers", "threads", "progress"}

_COMPARED = re.compile(
    "HVDNOISE_.*|HOROVOD_.*|NCCL_.*|OMPI_MCA_coll.*|CUBLAS_WORKSPACE_CONFIG|CUBLASLT_.*"
    "|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|TORCH_BLAS_PREFER_.*|TORCH_LINALG_.*"
    "|ATEN_CPU_CAPABILITY|MKL_CBWR|MKL_ENABLE_INSTRUCTIONS|OPENBLAS_CORETYPE|(DNN|ONEDNN|DNNL)_.*"
    "|CUDNN_.*|PYTORCH_NVFUSER_.*|TORCHINDUCTOR_.*|PYTORCH_JIT.*")
# Ranks, places, addresses, interfaces, adapters, paths, what is written down for people, and what
# only a build of Horovod reads.
_NOT_COMPARED = re.compile(
    "HVDNOISE_(DATASETS|HOME|SSH.*|SIM_HOSTS|LAUNCH)"
    "|HOROVOD_((LOCAL_|CROSS_)?(RANK|SIZE)|HOSTNAME|.*_(IFACE|ADDR|PORT)|SECRET_KEY|TIMELINE.*"
    "|LOG_.*|THREAD_AFFINITY|AUTOTUNE_LOG|.*_HOME|.*_LINK|BUILD_.*|WITH_.*|WITHOUT_.*|CMAKE)"
    "|NCCL_(SOCKET_.*|COMM_ID|IB_.*|TOPO_.*|GRAPH_.*|DEBUG.*|CONF_FILE|NET_PLUGIN|CROSS_NIC)"
    "|.*_(VERBOSE|LOG.*|CACHE_DIR|DEBUG.*)")


def settings(config: TrainConfig) -> dict[str, Any]:
    """Every setting by its flag's name, also those that a resumed run may change."""
    return {key: value for key, value in flatten(config).items() if key not in OF_A_HOST}


def environment() -> dict[str, str]:
    """The variables of the environment that must be equal; one that is not set is not there."""
    return {f"environment {name}": value for name, value in os.environ.items()
            if _COMPARED.fullmatch(name) and not _NOT_COMPARED.fullmatch(name)}


def agree_on_data(datasets: Datasets, config: DataConfig, device: torch.device, world: World
                  ) -> dict[str, str]:
    """The digests of the data, which all ranks have alike, as they have the kind of device.
    Collective.

    Raises:
        ConfigError: on all ranks, naming what differs and where, or what cannot be read.
    """
    found = call_or_raise(world, lambda: digests_of(datasets, whole=config.digest == "whole"))
    try:
        handshake(world, {**found, "kind of device": device.type}, name="handshake.data")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return found
