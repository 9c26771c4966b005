"""Settings of the test run: one thread, a time limit on every test, the check items."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.checks import Check, collect_checks  # noqa: E402

torch.set_num_threads(1)
SECONDS = {"unit": 120, "parallel": 900, "integration": 900}


def pytest_pycollect_makeitem(collector: Any, name: str, obj: object) -> list[Check] | None:
    return collect_checks(collector, name, obj)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nothing may hang: a limit on every test, by its folder, besides those of the launches."""
    for item in items:
        folder = item.path.parent.name
        if folder == "parallel":
            item.add_marker("parallel")
        if item.get_closest_marker("timeout") is None:
            # A signal raises in the test, so that `launcher` still ends its ranks; a thread would
            # end this process at once, but is the only way out of a hang inside C code.
            method = "thread" if folder == "unit" else "signal"
            item.add_marker(pytest.mark.timeout(SECONDS.get(folder, 120), method=method))
