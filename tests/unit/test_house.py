"""Rules of the house that a reader would have to check by eye."""

from __future__ import annotations

import ast
import inspect
import traceback
from pathlib import Path
from typing import Any, Iterator

import pytest

from hvdnoise import GNC
from hvdnoise.plans import PLANS
from hvdnoise.step import StepRunner
from hvdnoise.training.models import NORMS
from tests.fake_world import ThreadWorld, run_threads
from tests.launcher import ROOT
from tests.toys import build, train

MOST_FRAMES = 6
MOST_LINES = 40
PACKAGE, TESTS = ROOT / "hvdnoise", ROOT / "tests"


def trees(*folders: Path) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text())


def texts(tree: ast.Module) -> Iterator[ast.Constant]:
    """The string literals that are no docstrings."""
    lone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in lone:
            yield node


@pytest.mark.parametrize("source", ["own", "gathered"])
def test_few_frames_from_the_hook_to_the_collective(source: str) -> None:
    def work(world: ThreadWorld) -> list[list[str]]:
        model, optimizer = build(world, GNC(0.1, source=source), exchange={
            "own": "auto", "gathered": "allgather"}[source], bucket_bytes=100)
        start, stacks = world.allreduce_, []

        def allreduce_(*arguments: Any, **options: Any) -> Any:
            frames = traceback.extract_stack()
            hooks = [n for n, frame in enumerate(frames) if frame.name == "_on_gradient"]
            if hooks:
                stacks.append([f"{Path(frame.filename).name}: {frame.name}"
                               for frame in frames[hooks[-1]:]])
            return start(*arguments, **options)
        world.allreduce_ = allreduce_  # type: ignore[method-assign]
        train(model, optimizer, 2)
        return stacks
    for stacks in run_threads(2, work):
        assert len(stacks) > 2  # several buckets leave while backward goes on
        for stack in stacks:
            assert len(stack) <= MOST_FRAMES, "\n".join(stack)
    print("\n".join(stacks[0]))


def test_the_end_of_a_step_is_one_short_function() -> None:
    assert len(inspect.getsource(StepRunner.finish).splitlines()) <= MOST_LINES


def test_functions_are_short() -> None:
    long = []
    for path, tree in trees(PACKAGE):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node) is not None and len(node.body) > 1
                lines = (node.end_lineno or 0) - node.body[documented].lineno + 1
                if lines > MOST_LINES:
                    long.append(f"{path}: {node.name} has {lines} lines")
    assert not long, long


def test_plans_are_named_in_their_module_alone() -> None:
    """But for group norm."""
    names = {*PLANS}
    found = [f"{path}:{node.lineno} {node.value!r}" for path, tree in trees(PACKAGE)
             if path.name != "plans.py" for node in texts(tree)
             if node.value.partition(":")[0] in names
             and not (path.name in ("config.py", "models.py") and node.value in NORMS)]
    assert not found, found


def test_tests_do_not_import_one_another() -> None:
    found = []
    for path, tree in trees(TESTS):
        for node in ast.walk(tree):
            names = [f"{node.module}.{each.name}" for each in node.names] \
                if isinstance(node, ast.ImportFrom) else \
                [each.name for each in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path}: {name}" for name in names if name.startswith("tests.")
                      and any(part.startswith("test_") for part in name.split("."))]
    assert not found, found


def test_tests_leave_private_members_of_the_step_alone() -> None:
    private = {"_runner", "_noise_state", "_choice", "_under_way", "_captured", "_tasks", "_past"}
    found = [f"{path}:{node.lineno} {node.attr}" for path, tree in trees(TESTS)
             for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in private]
    assert not found, found
