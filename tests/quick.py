"""Programs of tests that import modules of the core in no time."""

from __future__ import annotations

from tests.launcher import ROOT

# The package without its own imports, torch above all, which take seconds.
BARE_PACKAGE = f"""
import sys, types
sys.modules["hvdnoise"] = types.ModuleType("hvdnoise")
sys.modules["hvdnoise"].__path__ = [{str(ROOT / "hvdnoise")!r}]
"""
