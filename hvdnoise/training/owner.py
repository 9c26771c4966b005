"""Which process has something, written down so that others can tell whether it still lives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Owner:
    """A process; what is not known is empty.

    Args:
        boot, namespace: of its machine; where both are equal, a number means the same process.
        started: when it started, in the kernel's units since the boot.
        token: another one for each thing that it has.
    """

    host: str = ""
    process: int = 0
    boot: str = ""
    namespace: str = ""
    started: str = ""
    token: str = ""

    def __str__(self) -> str:
        known = f"process {self.process} on {self.host}"
        return known if self.process else "a process that its lock does not name"

    @property
    def is_gone(self) -> bool:
        """Whether it was a process of this machine, and is there no more."""
        return self._is_of_this_machine() and _stat(self.process)[1] != self.started

    @property
    def is_running(self) -> bool:
        """Whether it is a process of this machine, and not a stopped one (SIGSTOP)."""
        state, started = _stat(self.process) if self._is_of_this_machine() else ("", "")
        return started != "" and started == self.started and state not in "Tt"

    def _is_of_this_machine(self) -> bool:
        here = _boot(), _namespace()
        return all(here) and here == (self.boot, self.namespace)


def this_process() -> Owner:
    """This process, with a new token."""
    process = os.getpid()
    return Owner(socket.gethostname(), process, _boot(), _namespace(), _stat(process)[1],
                 uuid.uuid4().hex)


def read_owner(content: bytes) -> Owner:
    """Whom the JSON object ``content`` names; nobody where it is damaged."""
    values: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(content)
    if not isinstance(values, dict):
        return Owner()
    known = {each.name: values.get(each.name) for each in fields(Owner)}
    process = known.pop("process")
    if type(process) is not int or not all(isinstance(each, str) for each in known.values()):
        return Owner()
    return Owner(process=process, **{name: " ".join(str(each).split())
                                     for name, each in known.items()})


def _stat(process: int) -> tuple[str, str]:
    """State and start of a process; empty where there is none, or one that has ended."""
    values = _text(f"/proc/{process}/stat").rpartition(")")[2].split()
    return (values[0], values[19]) if len(values) > 19 and values[0] not in "ZX" else ("", "")


def _boot() -> str:
    return _text("/proc/sys/kernel/random/boot_id")


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError):
        return ""
