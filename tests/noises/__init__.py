"""Noises that the package does not know, and a registry that forgets them again."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import Iterator

from hvdnoise.noise import COVARIANCES, registry
from hvdnoise.training import plugins


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """What is registered or imported as a plugin inside is gone afterwards."""
    known = [dict(table) for table in (registry._MAKERS, COVARIANCES, plugins._digests)]
    modules = set(sys.modules)
    try:
        yield
    finally:
        for table, before in zip((registry._MAKERS, COVARIANCES, plugins._digests), known):
            table.clear()
            table.update(before)  # type: ignore[arg-type]
        for name in set(sys.modules) - modules:
            if name.startswith(("hvdnoise_plugin_", "tests.noises.")):
                del sys.modules[name]
