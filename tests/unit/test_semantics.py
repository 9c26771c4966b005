"""Random training programs: the library does what the slow model of tests/semantics.py does.

``HVDNOISE_PROGRAMS=180`` runs twice as many as usual, other ones among them.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from typing import Any, Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from tests.semantics import (
    MENU,
    Family,
    Model,
    NoiseSpec,
    Op,
    Program,
    Setup,
    census,
    expect,
    programs,
    run,
)

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
PROGRAMS = int(os.environ.get("HVDNOISE_PROGRAMS", "90"))  # of each family
ERRORS = ("second", "between", "missing", "nothing", "worker", "closure", "torch", "failed")
CENSUS: dict[str, Counter[str]] = {}  # of the families that passed


@pytest.fixture(autouse=True)
def few_objects() -> Iterator[None]:
    """Whatever collects garbage, or looks for modules, sees the programs' objects only."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
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
    assert found["programs"] >= PROGRAMS
    assert found["displaced programs"] >= family.displaced * found["programs"], found
    CENSUS[name] = found


@pytest.mark.slow
def test_random_programs_have_everything() -> None:
    """Every operation, every variant and every error; else they would show little."""
    if len(CENSUS) < len(FAMILIES):
        pytest.skip("looks at what test_random_programs has drawn for all families")
    found = sum(CENSUS.values(), Counter[str]())
    expected = [name for name in MENU if name not in ("whole_step", "failing")]
    expected += [f"forward({each}=...)" for each in ("part", "then", "fails")]
    expected += [f"backward({each}=...)" for each in ("retain", "inputs", "hold")]
    assert not {each: found[each] for each in expected if found[each] < PROGRAMS / 13}, found
    rare = {each: found[each] for each in ERRORS if found[f"error {each}"] < PROGRAMS / 130}
    assert not rare, found


# ---------------------------------------------------------------------- programs that went wrong

def op(name: str, **arguments: Any) -> Op:
    return Op(name, arguments)


def whole_step(first: int, passes: int = 2, net: int = 0) -> list[Op]:
    """An ordinary step, whose losses are ``first``, ..."""
    pairs = [each for n in range(passes) for each in (
        op("forward", net=net), op("backward", loss=first + n))]
    return [op("zero_grad", optimizer=0, to_none=None), *pairs, op("step", optimizer=0)]


def one_optimizer(kind: str = "own", *, ranks: int = 1, V: int = 2, parts: tuple[str, ...] = (
        "0.first", "0.last"), **noise: Any) -> Setup:
    return Setup(ranks, V, 1, (parts,), (NoiseSpec(kind, **noise),))


PINNED: dict[str, tuple[Setup, list[Op]]] = {
    "the last worker's backward reached nothing": (
        one_optimizer("none", parts=("0.first",)),
        [op("forward", net=0), op("backward", loss=0), op("forward", net=0, part="last"),
         op("backward", loss=1), op("step", optimizer=0)]),
    "an edit through p.data while an earlier graph lives": (
        one_optimizer(),
        [*whole_step(0), op("forward", net=0), op("edit", net=0, part="last", how="add"),
         op("forward", net=0), op("backward", loss=3), op("forward", net=0),
         op("backward", loss=4), op("step", optimizer=0)]),
    "reset between the passes with lag 2": (
        one_optimizer(ranks=2, lag=2),
        [*whole_step(0), op("forward", net=0), op("backward", loss=2), op("reset", optimizer=0),
         *whole_step(3), *whole_step(5)]),
    "a layer that trains in a network that does not": (
        one_optimizer(),
        [*whole_step(0), op("mode", net=0, part="all", train=False),
         op("mode", net=0, part="last", train=True), op("forward", net=0),
         op("forward", net=0, part="last")]),
    "another batch after one that failed": (
        one_optimizer("workers"),
        [op("forward", net=0, fails="last"), op("forward", net=0), op("backward", loss=0),
         op("forward", net=0), op("backward", loss=1), op("step", optimizer=0)]),
    "gradients of another worker's graph by autograd.grad": (
        one_optimizer(),
        [*whole_step(0), op("forward", net=0), op("backward", loss=2, retain=True),
         op("look", loss=2), op("mode", net=0, part="all", train=False), op("forward", net=0),
         op("backward", loss=3), op("step", optimizer=0)]),
    "gradients cleared while they are on their way": (
        Setup(2, 1, 1, (("0.first", "0.last"), ("1.first", "1.last")),
              (NoiseSpec("own"), NoiseSpec("own"))),
        [*whole_step(0, 1), op("forward", net=0, then=1), op("backward", loss=1),
         op("step", optimizer=0), op("net_zero_grad", net=1, to_none=True),
         op("forward", net=1), op("backward", loss=2), op("step", optimizer=1)])}


@pytest.mark.filterwarnings("ignore:the gradient of:UserWarning")
@pytest.mark.parametrize("name", PINNED)
def test_programs_that_went_wrong(name: str) -> None:
    setup, ops = PINNED[name]
    program = expect(Model(setup), ops)
    assert program.ops == ops, "the model calls this unspecified"
    wrong = run(program)
    assert not wrong, "\n".join([*wrong, repr(program)])
