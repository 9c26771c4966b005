"""What the bits of a run depend on beside its settings: code, libraries, processor, threads.

RUN/environment.json has it of the last start, RUN/summary.json of every start that was another than
the one before. `hvdnoise reproduce` compares it with what is here.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

# which algorithm a library takes, or in which order it adds; no names, no paths, no secrets
_VARIABLES = re.compile(
    r"ATEN_CPU_CAPABILITY|CUBLAS_WORKSPACE_CONFIG|OMP_NUM_THREADS|NVIDIA_TF32_OVERRIDE|"
    r"(DNNL|ONEDNN|MKL|OPENBLAS|KMP)_\w+|NCCL_(ALGO|PROTO|NTHREADS|M\w+_NCHANNELS)|"
    r"HOROVOD_(FUSION_THRESHOLD|CPU_OPERATIONS|GPU_OPERATIONS|HIERARCHICAL_\w+|AUTOTUNE)|"
    r"OMPI_MCA_coll\w*")
Start = dict[str, Any]


def facts(transport: str | None, versions: dict[str, str]) -> dict[str, Any]:
    """Of this process.

    Args:
        transport: what carries the collectives between the ranks: gloo, mpi or torch; None: not
            known.
        versions: of code and libraries.
    """
    return {"versions": versions, "transport": transport, "threads": torch.get_num_threads(),
            "processor": processor(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "variables": variables()}


def variables() -> dict[str, str]:
    """The environment variables that may change bits."""
    return {name: value for name, value in sorted(os.environ.items()) if is_variable(name)}


def is_variable(name: str) -> bool:
    """Whether an environment variable may change bits."""
    return _VARIABLES.fullmatch(name) is not None


def processor() -> str:
    """The model of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return found[1].strip() if found else platform.processor() or platform.machine()


def starts_with(before: list[Start], now: Start) -> list[Start]:
    """The starts of a run and this one; left out where nothing but its step is another."""
    def without_step(start: Start) -> Start:
        return {key: value for key, value in start.items() if key != "step"}
    if before and without_step(before[-1]) == without_step(now):
        return before
    return [*before, now]
