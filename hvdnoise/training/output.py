"""Standard output and error that outlive their reader.

The terminal is closed, or what reads a pipe has ended (``hvdnoise train | head``): a run must not
be lost for that. What would be written is dropped, and the log says so once. The same holds for
what the other commands print.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from typing import Any

log = logging.getLogger("hvdnoise")
lost: list[str] = []  # what could not be written, but for a reader that had read enough


class _Lasting(io.FileIO):
    """A file descriptor that takes what its reader does not any more."""

    def __init__(self, descriptor: int, what: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._what = what
        self._lost = False

    def write(self, data: Any) -> int:
        if not self._lost:
            try:
                return super().write(data)
            except OSError as error:
                self._lost = True
                if error.errno not in (errno.EPIPE, errno.EIO):
                    lost.append(f"{self._what} cannot be written: {error}")
                if log.handlers:  # of a run
                    log.warning("%s is lost (%s): what is said stands in the logs alone",
                                self._what, error, extra={"terminal": False})
        return memoryview(data).nbytes


def make_lasting() -> None:
    """Replace this process's standard output and error by ones that outlive their reader."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))
        elif stream is getattr(sys, f"__{name}__") and not isinstance(
                getattr(stream.buffer, "raw", stream.buffer), _Lasting):
            setattr(sys, name, _lasting(stream, name))


def _lasting(stream: Any, name: str) -> io.TextIOWrapper:
    stream.flush()
    raw = _Lasting(stream.fileno(), f"standard {'output' if name == 'stdout' else 'error'}")
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding=stream.encoding,
                            errors=stream.errors, line_buffering=stream.line_buffering,
                            write_through=stream.write_through)
