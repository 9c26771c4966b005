"""launch/horovodrun.sh and launch/mpirun.sh, which start the ranks of one attempt."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Sequence

import hvdnoise
from hvdnoise.supervise.options import SCRIPTS, Options
from hvdnoise.training.config import ConfigError


def find(name: str) -> Path:
    """A script: in the checkout beside the package, or among the files that a wheel has installed.

    Raises:
        ConfigError: where it is missing.
    """
    beside = Path(hvdnoise.__file__).resolve().parents[1] / "launch" / name
    if beside.is_file():
        return beside
    try:
        for each in files("hvdnoise") or ():
            if each.parts[-3:] == ("hvdnoise", "launch", name) and Path(each.locate()).is_file():
                return Path(each.locate()).resolve()
    except PackageNotFoundError:
        pass
    raise ConfigError(f"launch/{name} is not there, neither in {beside.parents[1]} nor among the "
                      "installed files; install hvdnoise again")


def start(options: Options, mark: str, train: Sequence[str], *, resumes: bool = False
          ) -> list[str]:
    """The command of an attempt, by whose ``mark`` its processes are found on all hosts.

    Only an attempt that ``resumes`` from a checkpoint, which says how many workers there are,
    may leave out hosts.
    """
    fewer = ["--min-np", options.least] if options.least is not None and resumes else []
    return [str(find(SCRIPTS[options.launcher])), *options.script, *fewer, "--mark", mark, "--",
            *train]


def end(options: Options, mark: str) -> list[str]:
    """The command that ends what is left of an attempt on other hosts; empty without such hosts.

    In a Slurm allocation Open MPI's daemons end their ranks when mpirun is gone.
    """
    if not options.hosts:
        return []
    return [str(find(SCRIPTS[options.launcher])), *options.script, "--end", mark, "--"]


def environment() -> dict[str, str]:
    """Of the scripts: they find the `hvdnoise` of this Python first."""
    here = Path(sys.executable).parent
    path = os.environ.get("PATH", os.defpath)
    return {**os.environ, "PATH": f"{here}{os.pathsep}{path}"} if (here / "hvdnoise").exists() \
        else dict(os.environ)
