"""A loop that does not take a step leaves the noise as it was, bit for bit, whatever the noise."""

from __future__ import annotations

import copy
from typing import Any, Callable

import pytest
import torch
from torch import Tensor

from hvdnoise import GNC, make_noise
from tests.fake_world import ThreadWorld, run_threads
from tests.runs import NOISES
from tests.toys import batch, build, losses, train, vector

pytestmark = pytest.mark.slow  # many seconds in all
OTHERS: dict[str, Callable[[], Any]] = {
    "lag 0": lambda: GNC(0.4, lag=0), "lag 2": lambda: GNC(0.4, source="gathered", lag=2),
    "echo": lambda: GNC(0.4, echo=True), "pnm": lambda: make_noise("pnm"),
    "sam": lambda: make_noise("sam", radius=0.1),
    "sam echo": lambda: make_noise("sam", radius=0.1, echo=True),
    "stale sam": lambda: make_noise("stale-sam", radius=0.1),
    "momentum sam": lambda: make_noise("momentum-sam", radius=0.1),
    "extrapolation": lambda: make_noise("extrapolation"),
    "anticorrelated": lambda: make_noise("anticorrelated", radius=0.1)}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


class Skipped(Exception):
    """What a closure raises."""


@pytest.mark.parametrize("how, value", [("zero_grad", 1.0), ("reset", float("nan"))])
@pytest.mark.parametrize("name", [*NOISES, *OTHERS])
def test_a_step_that_is_not_taken(name: str, how: str, value: float) -> None:
    """By zero_grad() or reset() in place of step(); with lag 0 by an error in the closure."""
    def work(world: ThreadWorld) -> tuple[Tensor, Tensor]:
        ended = []
        for skips in (False, True):
            model, optimizer = build(world, {**NOISES, **OTHERS}[name](), V=2, momentum=0.9)

            def closure() -> None:
                optimizer.zero_grad()
                for worker in optimizer.workers:
                    x, y = batch(7, worker)
                    optimizer.observe_examples(model, losses, x, y)
                    (optimizer.weigh(losses(model(x), y)) * value).backward()
                passes.append(0)
                if len(passes) == 2:
                    raise Skipped

            def turn(step: int) -> None:
                optimizer.repeated = step % 2 == 1
            train(model, optimizer, 3, before_step=turn)
            if skips:
                passes: list[int] = []
                before = copy.deepcopy(optimizer.state_dict())
                turn(3)
                if optimizer.noise is not None and optimizer.noise.lag == 0:
                    with pytest.raises(Skipped):
                        optimizer.step(closure)
                else:
                    closure()
                getattr(optimizer, how)()
                assert same(optimizer.state_dict(), before)
            train(model, optimizer, 2, first=3, before_step=turn)
            ended.append(vector(model.parameters()))
        return ended[0], ended[1]
    for through, skipped in run_threads(2, work):
        assert torch.equal(through, skipped)
