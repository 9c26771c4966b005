"""The command line of `hvdnoise launch`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Sequence

from hvdnoise.training.config import ConfigError, TrainConfig, identity
from hvdnoise.training.options import parse

_TEXT = """hvdnoise launch [OPTIONS] -- train [ARGUMENTS OF hvdnoise train]

Starts ranks by launch/horovodrun.sh or launch/mpirun.sh, and starts them again after a failure,
from the newest whole checkpoint. It adds --resume auto and, where there is none, a --run_dir that
depends on the command alone: the same command goes on with the same run.

Exit codes: 0 done; 2 bad input; 75 SIGTERM, SIGINT or SIGHUP came and the ranks have saved (a
second one ends them at once: 143); 1 given up, the last line says why."""
SCRIPTS = {"gloo": "horovodrun.sh", "mpi": "horovodrun.sh", "mpirun": "mpirun.sh"}
_HOSTFILE = "OMPI_MCA_orte_default_hostfile"  # in a Kubeflow MPIJob


@dataclass(frozen=True)
class Options:
    """What `hvdnoise launch` was asked for.

    Args:
        launcher: gloo, mpi (both horovodrun) or mpirun.
        script: the options of the script that starts the ranks, as they were given.
        hosts: whether other hosts were named.
        ranks: how many there will be, where that is known here.
        least: so many must there be, where there may be fewer, as it was given.
        max_restarts: after so many it gives up.
        backoff, backoff_limit: seconds before the first restart without a newer checkpoint, and
            at most; each time twice as long.
        train: the arguments of `hvdnoise train`, with ``--run_dir``.
        config: the same, parsed.
    """

    launcher: str
    script: tuple[str, ...]
    hosts: bool
    ranks: int | None
    least: str | None
    max_restarts: int
    backoff: float
    backoff_limit: float
    train: tuple[str, ...]
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """The run's."""
        assert self.config.run_dir is not None
        return Path(self.config.run_dir)

    @property
    def local(self) -> bool:
        """Whether all ranks are on this machine."""
        return not self.hosts and not in_slurm(self.launcher)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see hvdnoise launch --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hvdnoise launch", usage=_TEXT, allow_abbrev=False)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--gloo", dest="launcher", action="store_const", const="gloo",
                      help="horovodrun with Gloo (without hosts)")
    kind.add_argument("--mpi", dest="launcher", action="store_const", const="mpi",
                      help="horovodrun with MPI")
    kind.add_argument("--mpirun", dest="launcher", action="store_const", const="mpirun",
                      help="mpirun (with hosts, and in a Slurm allocation)")
    hosts = parser.add_mutually_exclusive_group()
    hosts.add_argument("--hosts", metavar="LIST", help="such as node1:2,node2:2")
    hosts.add_argument("--hostfile", metavar="FILE", help='lines such as "node1 slots=2"')
    parser.add_argument("-np", metavar="N", help="ranks; default: all slots of the hosts")
    parser.add_argument("--min-np", metavar="N", help="leave out hosts that cannot be reached, if "
                        "so many ranks remain; adds --resume_resize")
    for name, text in (("interface", "network interface"), ("ssh-port", "where sshd listens"),
                       ("ssh-identity", "your private key")):
        parser.add_argument(f"--{name}", metavar="X", help=text)
    parser.add_argument("--env", metavar="NAME", action="append", default=[],
                        help="a variable that ranks get too; may be repeated")
    parser.add_argument("--max-restarts", type=int, default=10, metavar="R",
                        help="give up after so many (10)")
    parser.add_argument("--backoff", type=float, default=1.0, metavar="SECONDS",
                        help="before a restart; twice as long each time without a newer "
                        "checkpoint (1)")
    parser.add_argument("--backoff-limit", type=float, default=60.0, metavar="SECONDS",
                        help="the longest (60)")
    return parser


def read(arguments: Sequence[str]) -> Options:
    """The options of a command line. ``--help`` prints and exits with 0.

    Raises:
        ConfigError: for what is wrong with it; what is wrong with hosts the script says.
    """
    words, train = _split(arguments)
    found = _parser().parse_args(words)
    for name, value in (("--max-restarts", found.max_restarts), ("--backoff", found.backoff),
                        ("--backoff-limit", found.backoff_limit)):
        if not 0 <= value < 1e9:
            raise ConfigError(f"{name}={value} is wrong: give 0 or more")
    hosts = bool(found.hosts or found.hostfile or os.environ.get(_HOSTFILE))
    launcher = found.launcher or ("mpirun" if hosts or os.environ.get("SLURM_JOB_ID") else "gloo")
    hostfile = found.hostfile or os.environ.get(_HOSTFILE)
    ranks = _ranks(found.np, found.hosts, hostfile, launcher)
    _check_least(found.min_np, hosts, ranks)
    given = [("--hosts", found.hosts), ("--hostfile", found.hostfile), ("-np", found.np),
             ("--interface", found.interface), ("--ssh-port", found.ssh_port),
             ("--ssh-identity", found.ssh_identity),
             *(("--env", each) for each in found.env)]
    script = [word for name, value in given if value is not None for word in (name, value)]
    script += [f"--{launcher}"] if SCRIPTS[launcher] == "horovodrun.sh" else []
    options = Options(launcher, tuple(script), hosts, ranks,
                      found.min_np, found.max_restarts, found.backoff, found.backoff_limit,
                      tuple(train), parse(TrainConfig, train, program="hvdnoise train"))
    return options if options.config.run_dir is not None else _with_folder(options)


def _check_least(least: str | None, hosts: bool, ranks: int | None) -> None:
    """The script would say this at a restart only."""
    if least is None:
        return
    if not re.fullmatch("[1-9][0-9]{0,4}", least):
        raise ConfigError(f"--min-np={least} is wrong: give a number of ranks, 1 or more")
    if not hosts:
        raise ConfigError(f"--min-np={least} is wrong: without --hosts or --hostfile there are no "
                          "hosts to leave out; leave it out")
    if ranks is not None and int(least) > ranks:
        raise ConfigError(f"--min-np={least} is wrong: there are {ranks} ranks at most; lower it, "
                          "or add hosts or slots")


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        if {"-h", "--help"} & set(arguments):
            return ["--help"], []
        raise ConfigError("no --; what comes after it is what the ranks run: hvdnoise launch "
                          "[OPTIONS] -- train --config FILE")
    at = list(arguments).index("--")
    words, rest = list(arguments[:at]), list(arguments[at + 1:])
    if rest[:1] != ["train"]:
        raise ConfigError(f"after -- comes {' '.join(rest[:1]) or 'nothing'!r}, and only train can "
                          "be resumed: hvdnoise launch [OPTIONS] -- train --config FILE")
    return words, rest[1:]


def _with_folder(options: Options) -> Options:
    """The same with a run folder, whose name follows from the command."""
    config = options.config
    text = json.dumps([identity(config), options.script], sort_keys=True)
    folder = f"runs/{config.title}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    return replace(options, train=(*options.train, "--run_dir", folder),
                   config=replace(config, run_dir=folder))


def in_slurm(launcher: str) -> bool:
    """Whether mpirun will ask Slurm for hosts."""
    return launcher == "mpirun" and bool(os.environ.get("SLURM_JOB_ID"))


def _ranks(np: str | None, hosts: str | None, hostfile: str | None, launcher: str
           ) -> int | None:
    """The number of ranks where the command line tells it rightly; the script checks it."""
    if np is not None:
        return int(np) if re.fullmatch("[1-9][0-9]{0,4}", np) else None
    if hosts is not None and re.fullmatch(r"([\w.-]+(:[1-9]\d{0,3})?,?)+", hosts):
        return sum(int(each.partition(":")[2] or 1) for each in hosts.split(",") if each)
    if hostfile is not None:
        return _slots(hostfile)
    if in_slurm(launcher) and os.environ.get("SLURM_NTASKS", "").isdigit():
        return int(os.environ["SLURM_NTASKS"])
    return None


def _slots(hostfile: str) -> int | None:
    try:
        lines = [line.partition("#")[0].strip() for line in Path(hostfile).read_text().splitlines()]
    except (OSError, ValueError):
        return None
    found = [re.search(r"(?::|slots\s*=\s*)([1-9]\d{0,3})", line) for line in lines if line]
    return sum(int(each[1]) if each else 1 for each in found) or None
