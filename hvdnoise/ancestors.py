"""Which processes started this one, and whether they are still there.

A rank whose launcher was killed would train on alone. So each remembers, at its start, the chain
of processes from its parent up to the topmost that belongs to the launcher, known by name. When one
of them is gone, the launch is over. What is above, such as a shell, a terminal or a login, may go:
a run that was started with nohup, setsid or in tmux outlives them.

Ranks that horovodrun starts through ssh have no launcher on their host: theirs is sshd's session.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hvdnoise.launched import launched

_LAUNCHERS = {"horovodrun", "horovodrun.sh", "mpirun", "mpirun.sh", "mpiexec", "mpiexec.hydra",
              "orterun", "orted", "prte", "prted", "prterun", "hydra_pmi_proxy",
              "hydra_bstrap_proxy", "srun", "slurmstepd", "quickstart.sh", "guard.py", "torchrun",
              "torch.distributed.run", "torch.distributed.launch"}
_INTERPRETER = re.compile(r"(python[\d.]*|bash|dash|sh|zsh)")
_MOST = 64  # ancestors; a chain is no longer


@dataclass(frozen=True)
class Ancestor:
    """A process that cannot be taken for a later one of the same number."""

    pid: int
    started: str  # in clock ticks since the machine's start
    command: str


def of_launch(pid: int | None = None, proc: Path = Path("/proc")) -> list[Ancestor]:
    """The ancestors of ``pid`` (default: this process) that belong to its launcher, the nearest
    first; none where no launcher is known."""
    chain: list[Ancestor] = []
    last = -1  # the topmost of the launcher's
    session = -1
    at = _parent(pid or os.getpid(), proc)
    while at > 1 and len(chain) < _MOST:
        words = _words(at, proc)
        state = _state(at, proc)
        if state is None:
            break
        chain.append(Ancestor(at, state[1], _name(words)))
        if is_launcher(words):
            last = len(chain) - 1
        if session < 0 and _is_session(words):
            session = len(chain) - 1
        at = _parent(at, proc)
    if last < 0 and launched():
        last = session
    return chain[:last + 1]


def first_gone(chain: list[Ancestor], proc: Path = Path("/proc")) -> Ancestor | None:
    """The nearest ancestor that has ended, if one has."""
    for each in chain:
        state = _state(each.pid, proc)
        if state is None or state[1] != each.started or state[0] in "ZX":
            return each
    return None


def is_launcher(words: list[str]) -> bool:
    """Whether the command line ``words`` is a launcher's, or that of `hvdnoise launch`."""
    name, rest = _program(words)
    return name in _LAUNCHERS or name == "hvdnoise" and rest[:1] == ["launch"]


def _program(words: list[str]) -> tuple[str, list[str]]:
    """The name of the program, for an interpreter that of its script, and its arguments."""
    name, rest = _name(words), words[1:]
    if not _INTERPRETER.fullmatch(name):
        return name, rest
    for place, word in enumerate(rest):
        if word == "-c":
            break
        if not word.startswith("-"):
            return os.path.basename(word), rest[place + 1:]
    return name, rest


def _name(words: list[str]) -> str:
    # daemons write what they do behind their name: "sshd: user@notty"
    return os.path.basename(words[0].partition(":")[0]) if words else ""


def _is_session(words: list[str]) -> bool:
    """Whether it is a session of sshd without a terminal, which a program asked for."""
    return _name(words) in ("sshd", "sshd-session") and "@notty" in words[0]


def _words(pid: int, proc: Path) -> list[str]:
    try:
        line = (proc / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [word for word in line.decode(errors="replace").split("\0") if word]


def _fields(pid: int, proc: Path) -> list[str]:
    try:  # the name in brackets may hold anything
        return (proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _state(pid: int, proc: Path) -> tuple[str, str] | None:
    """State letter and start; None where there is no such process."""
    found = _fields(pid, proc)
    return (found[0], found[19]) if len(found) > 19 else None


def _parent(pid: int, proc: Path) -> int:
    found = _fields(pid, proc)
    return int(found[1]) if len(found) > 1 else 0
