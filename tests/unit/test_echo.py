"""Echo: batches drawn twice in a row, displaced in the second pass by what the first has shown."""

from __future__ import annotations

import copy
from typing import Any, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from hvdnoise import GNC, SAM
from tests import reference
from tests.fake_world import Meeting, ThreadWorld, run_threads
from tests.toys import Dense, batch, build, losses, relative_error, seen, vector

W = 4
NOISES: dict[str, Any] = {"gnc": lambda: GNC(0.3, echo=True), "sam": lambda: SAM(0.3, echo=True),
                          "share": lambda: GNC(echo=True),
                          "lr": lambda: GNC(lr=2.0, echo=True, scope="matrices")}


def alone() -> ThreadWorld:
    return ThreadWorld(Meeting(1, 1.0), 0)


def passes(model: Any, optimizer: Any, number: int) -> None:
    """Of each of this rank's workers, over the examples of a batch."""
    for worker in optimizer.workers:
        x, y = batch(number, worker)
        losses(model(x), y).mean().backward()


def drive(model: Any, optimizer: Any, plan: Sequence[Any], told: bool = True) -> list[Tensor]:
    """Steps (batch, repeated[, "drop"]); the displacements (V, P) of each."""
    weights: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, *_: weights.append(seen(module)))
    found = []
    for number, repeated, *drop in plan:
        weights.clear()
        clean = vector(model.parameters())
        if told:
            optimizer.repeated = repeated
        optimizer.zero_grad()
        passes(model, optimizer, number)
        if not drop:
            optimizer.step()
        elif drop[0] == "model":
            model.zero_grad()
        found.append(torch.stack(weights[:len(optimizer.workers)]) - clean)
    hook.remove()
    return found


def twice(*numbers: int) -> list[Any]:
    return [(number, repeated) for number in numbers for repeated in (False, True)]


def dense(name: str, plan: Sequence[Any]) -> list[Any]:
    """The displacements (W, P) of each step, and the weights at the end."""
    model, noise, kept_WP = Dense(W), NOISES[name](), None
    found: list[Any] = []
    for number, repeated, *drop in plan:
        displacements_WP: Any = np.zeros((W, len(model.theta_P)))
        if not repeated:
            kept_WP = None
        if repeated and kept_WP is not None:
            along_WP = kept_WP if name == "sam" else reference.deviations(kept_WP)
            inside = model.displaced(getattr(noise, "scope", "all"))
            s = {"gnc": 0.3, "share": 0.02 * np.linalg.norm(model.theta_P)}.get(name, 0.2)
            if name == "sam":
                displacements_WP = 0.3 * along_WP / np.linalg.norm(along_WP, axis=1)[:, None]
            else:
                if name != "lr":
                    s /= reference.root_mean_square_norm(along_WP)
                displacements_WP[:, inside] = s * along_WP[:, inside]  # with the PLUS sign
        gradients_WP = model.worker_gradients(number, displacements_WP)
        if not drop:
            model.update(gradients_WP.mean(axis=0))
            if not repeated:
                kept_WP = gradients_WP
        found.append(displacements_WP)
    return [*found, model.theta_P]


def assert_dense(name: str, plan: Sequence[Any], ranks: int, told: bool = True) -> None:
    def work(world: ThreadWorld) -> tuple[list[Tensor], Tensor, Any]:
        model, optimizer = build(world, NOISES[name](), V=W // ranks, bucket_bytes=100)
        found = drive(model, optimizer, plan, told)
        return found, vector(model.parameters()), optimizer.noise_coverage
    results = run_threads(ranks, work)
    *expected, theta_P = dense(name, plan)
    for step, expected_WP in enumerate(expected):
        found_WP = torch.cat([found[step] for found, _, _ in results])
        assert np.abs(found_WP.numpy() - expected_WP).max() < 1e-10, step
    for _, weights, coverage in results:
        assert relative_error(weights, theta_P) < 1e-11
        due = sum(bool(each.any()) and len(step) == 2 for each, step in zip(expected, plan))
        assert (coverage.due, coverage.missed) == (due, 0)


@pytest.mark.parametrize("ranks", [4, 2, 1])
@pytest.mark.parametrize("name", NOISES)
def test_echo_is_the_dense_formula(name: str, ranks: int) -> None:
    assert_dense(name, twice(0, 1, 2), ranks)


@pytest.mark.parametrize("name", NOISES)
def test_each_second_step_repeats_unless_told(name: str) -> None:
    assert_dense(name, twice(0, 1), 2, told=False)


PLANS: dict[str, list[Any]] = {
    "a first pass dropped": [*twice(0), (1, False, "zero"), (1, True), *twice(2)],
    "by model.zero_grad": [*twice(0), (1, False, "model"), (1, True), *twice(2)],
    "a second pass dropped": [(0, False), (0, True, "zero"), (1, False), (1, True)],
    "and tried again": [(0, False), (0, True, "zero"), (0, True), (1, False), (1, True)],
    "no first pass": [(0, True), *twice(1)],
    "three passes": [(0, False), (0, True), (0, True), (1, False), (1, True), (1, True)],
    "three, the first dropped": [*twice(0), (1, False, "zero"), (1, True), (1, True), *twice(2)],
    "never repeated": [(0, False), (1, False), (2, False)]}


@pytest.mark.parametrize("ranks", [2, 1])
@pytest.mark.parametrize("plan", PLANS)
def test_no_deviations_of_another_batch(plan: str, ranks: int) -> None:
    for name in ("gnc", "sam", "share"):
        assert_dense(name, PLANS[plan], ranks)


def test_a_first_pass_that_was_only_announced_counts() -> None:
    """An exception before its forward, such as of the loader: then the second is undisplaced."""
    model, optimizer = build(alone(), GNC(0.3, echo=True), V=2)
    drive(model, optimizer, twice(0))
    optimizer.repeated = False
    (moved,) = drive(model, optimizer, [(1, True)])
    assert not moved.any()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_the_middle(where: str) -> None:
    model, optimizer = build(alone(), GNC(0.3, echo=True), V=2)
    drive(model, optimizer, twice(0))
    optimizer.repeated = False
    optimizer.zero_grad()
    x, y = batch(1, 0)
    losses(model(x), y).mean().backward()
    with pytest.raises(ZeroDivisionError):
        if where == "forward":
            hook = model.register_forward_pre_hook(lambda *_: 1 / 0)
            try:
                model(x)
            finally:
                hook.remove()
        else:
            loss = losses(model(x), y).mean()
            loss.register_hook(lambda _: 1 / 0)
            loss.backward()
    optimizer.reset()
    assert not drive(model, optimizer, [(1, True)])[0].any()
    first, second = drive(model, optimizer, twice(2))
    assert not first.any() and second.any()
    assert optimizer.noise_coverage.due == 2


def test_steps_that_cannot_be_counted_are_an_error() -> None:
    model, optimizer = build(alone(), GNC(0.3, echo=True), V=2)
    drive(model, optimizer, [*twice(0), (1, False, "zero")], told=False)
    with pytest.raises(RuntimeError, match="set optimizer.repeated before each step") as caught:
        drive(model, optimizer, [(1, True)], told=False)
    assert "\n" not in str(caught.value)
    optimizer.reset()
    assert not drive(model, optimizer, [(1, True)])[0].any()
    with pytest.raises(ValueError, match="repeated='yes' must be True, False or None"):
        optimizer.repeated = "yes"


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", NOISES)
def test_resume_between_the_passes_changes_no_bit(name: str, told: bool) -> None:
    plan = twice(0, 1, 2)

    def work(world: ThreadWorld) -> None:
        def new() -> Any:
            return build(world, NOISES[name](), V=2, momentum=0.9, bucket_bytes=100)
        model, optimizer = new()
        drive(model, optimizer, plan, told)
        for at in range(1, len(plan)):
            again, resumed = new()
            drive(again, resumed, plan[:at], told)
            saved = copy.deepcopy((again.state_dict(), resumed.state_dict()))
            again, resumed = new()
            again.load_state_dict(saved[0])
            resumed.load_state_dict(saved[1])
            drive(again, resumed, plan[at:], told)
            assert torch.equal(vector(again.parameters()), vector(model.parameters())), at
    run_threads(2, work)


def test_resume_without_a_state_displaces_nothing_between_the_passes() -> None:
    model, optimizer = build(alone(), GNC(0.3, echo=True), V=2)
    drive(model, optimizer, [(0, False)])
    state = optimizer.state_dict()
    del state["hvdnoise"]
    optimizer.load_state_dict(state)
    moved = drive(model, optimizer, [(0, True), *twice(1)])
    assert [bool(each.any()) for each in moved] == [False, False, True]


def test_measured_in_repetitions_only() -> None:
    model, optimizer = build(alone(), GNC(share=0.03, echo=True), V=2)
    optimizer.measure = True
    shares = []
    for step in twice(0, 1):
        drive(model, optimizer, [step])
        shares.append(optimizer.measured.noise_share)
    assert shares == [None, pytest.approx(0.03), None, pytest.approx(0.03)]


def test_others_ignore_it() -> None:
    def weights(told: bool) -> Tensor:
        model, optimizer = build(alone(), GNC(0.3), V=2)
        drive(model, optimizer, twice(0, 1), told)
        return vector(model.parameters())
    assert torch.equal(weights(True), weights(False))


def test_a_closure_works_too() -> None:
    """SAM with echo needs none, and takes one pass a step with it."""
    model, optimizer = build(alone(), SAM(0.3, echo=True), V=2)
    calls: list[int] = []
    for number, repeated in twice(0, 1):
        optimizer.repeated = repeated

        def closure() -> None:
            calls.append(number)
            optimizer.zero_grad()
            passes(model, optimizer, number)
        optimizer.step(closure)
    other, plain = build(alone(), SAM(0.3, echo=True), V=2)
    drive(other, plain, twice(0, 1))
    assert calls == [0, 0, 1, 1]
    assert torch.equal(vector(model.parameters()), vector(other.parameters()))
