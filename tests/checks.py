"""Many checks in one launch: functions ``check_*(world)`` in tests/parallel become pytest items.

    WORLDS = ["threads-2", "gloo-2", "mpi-4"]      # each check runs in each of these

    def check_sum(world):
        total = world.allreduce_(torch.ones(1), name="x", op="sum").wait()
        assert total.item() == world.size

A world is "<launcher>-<ranks>" with a launcher of `tests.launcher`, or "threads-<ranks>" for a
`ThreadWorld`. All selected checks of a file are run by one launch per world, and every check is
reported as a test item of its own. A check that fails on all ranks lets the rest go on in the same
launch; after one that failed on some ranks only, hung or died, the rest gets a new launch.
``CHECK_SECONDS`` in the file bounds each check (default 60); `on` gives one check other worlds.
"""

from __future__ import annotations

import inspect
import json
import tempfile
import traceback
from pathlib import Path
from typing import Any, Callable, Iterable, TypeVar

import pytest

from tests.fake_world import run_threads
from tests.launcher import Ended, attempt

Function = TypeVar("Function", bound=Callable[..., Any])
START_SECONDS = 30.0


class CheckFailed(Exception):
    """Carries the finished report of a failed check."""


def on(*worlds: str) -> Callable[[Function], Function]:
    """Run this check in these worlds instead of the file's WORLDS."""
    def mark(function: Function) -> Function:
        setattr(function, "worlds", worlds)
        return function
    return mark


class Check(pytest.Item):
    """One check in one world."""

    def __init__(self, *, check: str, world: str, function: Callable[[Any], None],
                 **keywords: Any) -> None:
        super().__init__(**keywords)
        self.check, self.world, self.function = check, world, function
        self.add_marker("parallel")

    @property
    def limit(self) -> float:
        return float(getattr(inspect.getmodule(self.function), "CHECK_SECONDS", 60.0))

    def runtest(self) -> None:
        kind, size = self.world.split("-")
        if kind == "threads":
            run_threads(int(size), self.function, timeout=self.limit)
            return
        batch = [item for item in self.session.items if isinstance(item, Check)
                 and (item.path, item.world) == (self.path, self.world)]
        stash = self.session.stash.setdefault(_REPORTS, {})
        key = (str(self.path), self.world)
        if key not in stash:
            names = [item.check for item in batch]
            stash[key] = run_batch(str(self.path), kind, int(size), names, self.limit)
        if stash[key][self.check]:
            raise CheckFailed(stash[key][self.check])

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        if isinstance(excinfo.value, CheckFailed):
            return str(excinfo.value)
        if self.world.startswith("threads"):
            return "".join(traceback.format_exception(excinfo.value))
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, inspect.getsourcelines(self.function)[1] - 1, self.name


_REPORTS: pytest.StashKey[dict[tuple[str, str], dict[str, str]]] = pytest.StashKey()


def collect_checks(collector: Any, name: str, obj: object) -> list[Check] | None:
    """For conftest's pytest_pycollect_makeitem."""
    if not (name.startswith("check_") and inspect.isfunction(obj)
            and obj.__module__ == collector.module.__name__):
        return None
    worlds: Iterable[str] = getattr(obj, "worlds", getattr(collector.module, "WORLDS", ()))
    if not worlds:
        raise collector.CollectError(f"{name}: the file has no WORLDS to run its checks in")
    return [Check.from_parent(collector, name=f"{name}[{world}]", check=name, world=world,
                              function=obj) for world in worlds]


def run_batch(path: str, launcher: str, np: int, names: list[str],
              limit: float) -> dict[str, str]:
    """The report of every check, empty for those that passed, from as many launches as needed."""
    reports: dict[str, str] = {}
    while left := [name for name in names if name not in reports]:
        with tempfile.TemporaryDirectory(prefix="hvdnoise-checks-") as folder:
            ended = attempt(np, "tests.rank_main:run_checks", launcher=launcher,
                            args=(folder, path, left, limit),
                            timeout=START_SECONDS + (limit + 10) * len(left))
            found = _read(folder, left, np, ended)
        if not found:  # not one check began
            return reports | {name: f"the launch failed: {ended.report()}" for name in left}
        reports.update(found)
    return reports


def _read(folder: str, names: Iterable[str], np: int, ended: Ended) -> dict[str, str]:
    reports: dict[str, str] = {}
    earlier: list[str] = []
    for name in names:
        paths = [Path(folder) / f"{name}.{rank}.check" for rank in range(np)]
        states = {rank: json.loads(path.read_text())
                  for rank, path in enumerate(paths) if path.exists()}
        if not states:
            break
        reports[name] = _report(name, states, np, ended, earlier)
        earlier += [name] if reports[name] else []
    if reports and not any(reports.values()) and ended.verdict():
        reports[list(reports)[-1]] = f"passed, but the launch ended badly: {ended.report()}"
    return reports


def _report(name: str, states: dict[int, dict[str, Any]], np: int, ended: Ended,
            earlier: list[str]) -> str:
    """What the ranks say of one check; empty when all passed."""
    words = {rank: states.get(rank, {"state": "not begun"})["state"] for rank in range(np)}
    if set(words.values()) == {"passed"}:
        return ""
    failed = sorted((state["time"], rank, state["error"]) for rank, state in states.items()
                    if state["state"] == "failed")
    lines = [f"{name}: " + ", ".join(f"rank {rank} {word}" for rank, word in words.items())]
    if earlier:
        lines.append(f"(failed earlier in the same launch: {', '.join(earlier)})")
    for nth, (_, rank, error) in enumerate(failed):
        text = error if nth == 0 else error.strip().splitlines()[-1]
        lines.append(f"--- rank {rank}{' (first)' if nth == 0 else ''}:\n{text}")
    if set(words.values()) != {"failed"}:
        lines.append(f"the launch: {ended.report()}")
    return "\n".join(lines)
