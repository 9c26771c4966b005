"""How long a rank may stand still, in seconds: one limit for each phase, from the environment.

    HVDNOISE_TIMEOUT              a step, a collective outside of the other phases, the end (1800)
    HVDNOISE_TIMEOUT_START        from Horovod's start to the first step (1800)
    HVDNOISE_TIMEOUT_EVALUATION   scoring (3600)
    HVDNOISE_TIMEOUT_CHECKPOINT   writing or reading a checkpoint (3600)

0 switches one off. The time counts from the last progress: a phase, a step or a collective that
begins or ends.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Mapping

VARIABLE = "HVDNOISE_TIMEOUT"
# Gloo has a limit of its own, 30 s by default, for whatever it does.
_GLOO_VARIABLE = "HOROVOD_GLOO_TIMEOUT_SECONDS"
_GLOO_MARGIN_SECONDS = 60
_LONGEST_SECONDS = 100_000_000  # three years


@dataclass(frozen=True)
class Limits:
    """Seconds for each phase; 0 is no limit."""

    step: float = 1800.0
    start: float = 1800.0
    evaluation: float = 3600.0
    checkpoint: float = 3600.0

    def of(self, phase: str) -> float:
        """The limit of a phase; that of a step where it has none of its own."""
        limit: float = getattr(self, phase, self.step)
        return limit

    @property
    def shortest(self) -> float:
        """The smallest that is not off; 0 when all are."""
        return min((limit for limit in self._all() if limit > 0), default=0.0)

    @property
    def longest(self) -> float:
        """The greatest, infinite when one is off."""
        return max(limit if limit > 0 else math.inf for limit in self._all())

    def _all(self) -> list[float]:
        return [getattr(self, each.name) for each in fields(self)]


def variable(phase: str) -> str:
    """The name of the variable that sets the limit of a phase."""
    own = phase != "step" and phase in {each.name for each in fields(Limits)}
    return f"{VARIABLE}_{phase.upper()}" if own else VARIABLE


def from_environment(environment: Mapping[str, str] | None = None) -> Limits:
    """The limits that ``environment`` (default: this process's) sets.

    Raises:
        ValueError: one line, for a value that is no number of seconds, or a variable that sets
            nothing.
    """
    given = os.environ if environment is None else environment
    names = {variable(each.name): each.name for each in fields(Limits)}
    for name in given:
        if name.startswith(f"{VARIABLE}_") and name not in names:
            raise ValueError(f"{name} sets nothing: give one of {', '.join(names)}, or unset it")
    return Limits(**{phase: _seconds(name, given[name]) for name, phase in names.items()
                     if name in given})


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _LONGEST_SECONDS:
        raise ValueError(f"{name}={text!r} is no number of seconds from 0 (no limit) to "
                         f"{_LONGEST_SECONDS}: give one, or unset it")
    return value


def raise_gloo_timeout(limits: Limits) -> None:
    """Let Gloo wait for longer than any of ``limits``, unless it does already.

    Horovod reads the variable when it starts. horovodrun always sets it, so whether the user chose
    its value is not known; the limits above are the ones that count.
    """
    wanted = min(limits.longest, _LONGEST_SECONDS) + _GLOO_MARGIN_SECONDS
    try:
        given = int(os.environ.get(_GLOO_VARIABLE, ""))
    except ValueError:
        given = 0
    os.environ[_GLOO_VARIABLE] = str(max(given, math.ceil(wanted)))
