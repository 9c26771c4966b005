"""The settings of a plan: those of a training run, and the cluster that it shall run on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from typing import Sequence

from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.datasets import DATASETS
from hvdnoise.training.errors import one_line_errors
from hvdnoise.training.options import parse
from hvdnoise.training.validation import require, validate

PROGRAM = "hvdnoise plan"
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Say what a run will cost and how to launch it; takes every setting of hvdnoise train too.

    Args:
        hosts: machines of the cluster; default: as many as hostnames, else 1.
        ranks_per_host: ranks on each of them, usually its GPUs.
        hostnames: their names, separated by commas; default: host1,host2,...
        bandwidth_gbit: of a host's link, in each direction, in 10^9 bits a second.
        compute_ms: milliseconds that one rank computes in a step (forward, backward and update of
            all its workers), without communication.
        examples: training images of an imagefolder that is not on this machine.
        classes: its classes.
        image: container image with hvdnoise, for Kubernetes.
        json: print JSON and nothing else.
        write: folder for the launch files; made where there is none.
    """

    hosts: int | None = None
    ranks_per_host: int = 1
    hostnames: str | None = None
    bandwidth_gbit: float | None = None
    compute_ms: float | None = None
    examples: int | None = None
    classes: int | None = None
    image: str = "hvdnoise:latest"
    json: bool = False
    write: str | None = None

    @property
    def names(self) -> list[str]:
        """The hosts' names."""
        if self.hostnames is not None:
            return [name.strip() for name in self.hostnames.split(",")]
        return [f"host{number}" for number in range(1, (self.hosts or 1) + 1)]

    @property
    def ranks(self) -> int:
        """R, on all hosts."""
        return len(self.names) * self.ranks_per_host


# --help explains the settings of a run as well
PlanConfig.__doc__ = f"{PlanConfig.__doc__}" + (TrainConfig.__doc__ or "").split("Args:\n")[-1]
_OWN = {each.name for each in fields(PlanConfig)} - {each.name for each in fields(TrainConfig)}


@one_line_errors()
def read(arguments: Sequence[str]) -> tuple[PlanConfig, list[str]]:
    """The settings, and those of the arguments that `hvdnoise train` is to be given.

    Raises:
        ConfigError: one line, as `hvdnoise train` would give it on the ranks of the plan; but a
            GPU and a data set need not be here.
    """
    config = parse(PlanConfig, arguments, program=PROGRAM)
    flags = train_flags(arguments)
    try:
        parse(TrainConfig, flags, program=PROGRAM)
    except ConfigError as error:  # in the YAML file, where train would refuse it
        raise ConfigError(f"{error} (settings of {PROGRAM} alone are flags, not part of a file "
                          "that hvdnoise train reads)") from error
    _check(config)
    validate(replace(config, device="auto"), config.ranks)
    return config, flags


def train_flags(arguments: Sequence[str]) -> list[str]:
    """The arguments without those of `PlanConfig` alone and their values."""
    kept: list[str] = []
    own = False  # whether the flag at hand, or before the value at hand, is the plan's own
    for argument in arguments:
        if argument.startswith("--"):
            own = argument[2:].partition("=")[0] in _OWN
        if not own:
            kept.append(argument)
    return kept


def _check(config: PlanConfig) -> None:
    for name in ("hosts", "ranks_per_host", "examples", "classes"):
        value = getattr(config, name)
        require(value is None or value >= 1, name, value, "give 1 or more")
    require(config.hosts in (None, len(config.names)), "hostnames", config.hostnames,
            f"these are {len(config.names)} names and hosts={config.hosts}; give one of the two, "
            "or as many names as hosts")
    for host in config.names:
        require(_HOSTNAME.fullmatch(host) is not None, "hostnames", config.hostnames,
                f"{host!r} is no host's name; separate names by commas")
    require(len(set(config.names)) == len(config.names), "hostnames", config.hostnames,
            "a name is there twice; ranks_per_host says how many ranks each host has")
    bandwidth, compute = config.bandwidth_gbit, config.compute_ms
    require(bandwidth is None or bandwidth > 0, "bandwidth_gbit", bandwidth,
            "give a number above 0")
    require(compute is None or 0 <= compute < math.inf, "compute_ms", compute, "give 0 or more")
    require(config.image.strip() != "", "image", repr(config.image), "give an image's name")
    counted = [each.name for each in DATASETS.values() if each.counted]
    for name in ("examples", "classes"):
        require(config.data.dataset in counted or getattr(config, name) is None, name,
                getattr(config, name), f"it goes with data.dataset={' or '.join(counted)}; "
                f"{config.data.dataset} is known")
