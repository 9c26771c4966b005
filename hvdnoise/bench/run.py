"""A benchmark from its settings to its record. All collective.

The record (bench.json) holds every number as measured; hvdnoise.bench.report makes medians,
tables and figures of it.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hvdnoise import comm
from hvdnoise.bench import ddp, measure, phases, report
from hvdnoise.bench.config import BenchConfig
from hvdnoise.bench.phases import say
from hvdnoise.bench.variants import Variant
from hvdnoise.training.config import ConfigError, flatten
from hvdnoise.training.progress import log
from hvdnoise.training.records import versions
from hvdnoise.training.results import make_folder

_HOROVOD_SETTINGS = ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS", "HOROVOD_CYCLE_TIME",
                     "HOROVOD_FUSION_THRESHOLD", "HOROVOD_CACHE_CAPACITY")


def run(config: BenchConfig, variants: list[Variant], world: comm.World, device: torch.device
        ) -> int:
    """Measure, print the table and write the folder; the exit code."""
    log.setLevel(logging.WARNING)  # what each optimizer says of itself is in the record
    interface = measure.interface(config.interface)
    hosts = world.gather_json(measure.host(interface), name="bench.hosts")
    count = len(measure.first_ranks(hosts))
    if count > 1 and interface == "lo":
        raise ConfigError(f"the ranks are on {count} hosts, and interface lo connects none: name "
                          "the network's with --interface (horovodrun: --network-interface)")
    make_folder(None if config.out is None else Path(config.out), world)
    record: dict[str, Any] = {
        "command": sys.argv, "time": datetime.now(timezone.utc).isoformat("T", "seconds"),
        "settings": flatten(config), "versions": versions(), "ranks": world.size,
        "hosts": hosts, "interface": interface, "device": _device_name(device),
        "threads": torch.get_num_threads(), "machine": machine(), "launcher": launcher(),
        "horovod_settings": {name: os.environ[name] for name in _HOROVOD_SETTINGS
                             if name in os.environ}}
    with ddp.process_group(any(each.method == "ddp" for each in variants), world, hosts, device,
                           interface):
        say(world, "each variant alone")
        record.update(phases.alone(config, variants, world, device))
        turns = phases.rounds(config, variants, world, device, hosts, interface)
    for each in record["variants"]:
        each.update(turns[each["name"]])
    if world.rank == 0:
        record["results"] = report.results(record)
        say(world, report.text(record))
        if config.out is not None:
            report.write(record, Path(config.out))
            say(world, f"written to {config.out}")
    world.barrier("bench.end")
    return 0


def launcher() -> str:
    """What started this rank, and whether Horovod's ranks agree through MPI or Gloo."""
    given = os.environ
    if "OMPI_COMM_WORLD_RANK" in given:
        return "mpirun (MPI)"
    if "HOROVOD_RANK" in given:
        return f"horovodrun ({given.get('HOROVOD_CONTROLLER', 'gloo').capitalize()})"
    if "PMI_RANK" in given:
        return "hydra (MPI)"
    return "srun (MPI)" if "SLURM_STEP_ID" in given else "no launcher"


def machine() -> dict[str, Any]:
    """What this rank's host is."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": named[0] if named else platform.machine(), "cores": os.cpu_count(),
            "platform": platform.platform()}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
