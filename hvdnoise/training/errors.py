"""What settings and runs raise."""

from __future__ import annotations

import contextlib
from typing import Iterator


class ConfigError(ValueError):
    """A setting is wrong; one line that names it and the remedy."""


class DataError(ValueError):
    """A data set is missing, damaged or too small; one line that names the path and the remedy."""


class Diverged(RuntimeError):
    """The run cannot go on with the numbers it has; one line, equal on all ranks."""


class CommonDataError(DataError):
    """A `DataError` that all ranks raise together."""


# What the system and Python's own functions raise for a value that they cannot take.
REFUSALS = (ValueError, OSError, ArithmeticError, MemoryError, RecursionError)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What is raised for a wrong value (`REFUSALS`) becomes a ConfigError of one line."""
    try:
        yield
    except ConfigError:
        raise
    except REFUSALS as error:
        raise ConfigError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """What an exception says, on one line and without the number of a system's error."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        text = "there is not enough memory for this"
    return " ".join(text.split()) or type(error).__name__
