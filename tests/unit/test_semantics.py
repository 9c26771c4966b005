"""Random training programs: the library does what the slow model of tests/semantics.py does."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from tests.semantics import MENU, Family, Program, census, programs, run

GNC_KINDS = ("own", "gathered", "isotropic")
FAMILIES = {
    "none": Family(),
    "own": Family(("own",), displaced=0.4),
    "sources": Family(("gathered", "isotropic", "own"), displaced=0.4),
    "relative": Family(GNC_KINDS, ("relative",), displaced=0.4,
                       left_out=("edit", "load_net", "require", "load_optimizer")),
    "lag 2": Family(GNC_KINDS, lags=(2,), displaced=0.3),
    "lag 0": Family(GNC_KINDS, lags=(0,), displaced=0.4),
    "covariance": Family(("workers", "white", "examples")),
    "several": Family(("own", "none", "gathered", "workers"), lags=(1, 1, 2), several=True,
                      displaced=0.2)}
PROGRAMS = 260  # of each family
ERRORS = ("second", "missing", "nothing", "torch", "failed")


@pytest.fixture(autouse=True)
def few_objects() -> Iterator[None]:
    """Whatever collects garbage, or looks for modules, sees the programs' objects only."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.filterwarnings("ignore:the gradient of:UserWarning")  # from weights without noise
@pytest.mark.parametrize("name", FAMILIES)
def test_random_programs(name: str) -> None:
    family, found = FAMILIES[name], Counter[str]()

    @settings(max_examples=PROGRAMS, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(programs(family))
    def check(program: Program) -> None:
        wrong = run(program)
        assert not wrong, "\n".join([*wrong, repr(program)])
        found.update(census(program))

    check()
    assert_interesting(family, found)


def assert_interesting(family: Family, found: Counter[str]) -> None:
    """The programs have every operation, errors, and displaced forwards; else they show nothing."""
    assert found["programs"] >= PROGRAMS
    operations = set(MENU) - set(family.left_out) - {"whole_step", "failing"}
    rare = {name: found[name] for name in operations if found[name] < 5}
    assert not rare, f"too few of these operations: {rare} in {found}"
    variants = [f"{name}={value}" for name, value in (
        ("forward(part", "..."), ("forward(then", "..."), ("forward(fails", "..."),
        ("backward(retain", "..."), ("backward(inputs", "..."), ("backward(hold", "..."))]
    assert all(found[f"{each})"] >= 5 for each in variants), found
    assert sum(found[f"error {kind}"] > 0 for kind in ERRORS) >= len(ERRORS) - 1, found
    assert found["displaced programs"] >= family.displaced * found["programs"], found
