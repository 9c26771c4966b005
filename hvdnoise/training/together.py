"""What fails on one rank fails on all, with one line that names the rank."""

from __future__ import annotations

from typing import Callable, TypeVar

from hvdnoise.comm import World
from hvdnoise.training.errors import ConfigError

T = TypeVar("T")


def call_or_raise(world: World, action: Callable[[], T]) -> T:
    """``action()``; where it raises a ValueError or OSError on one rank, a ConfigError on all.

    Collective.
    """
    value, error = None, None
    try:
        value = action()
    except (ValueError, OSError) as problem:
        error = " ".join(str(problem).split())
    for rank, text in enumerate(world.gather_json(error, name="call")):
        if text is not None:
            raise ConfigError(f"{text} ({world.places()[rank]})" if rank else text)
    return value  # type: ignore[return-value]
