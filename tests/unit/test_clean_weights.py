"""Weights are displaced from a training forward to the end of its backward, and nowhere else.

Clean means: the same bits, in the same storage. One rank with two virtual workers, so that a
displacement stands between any forward and its backward.
"""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn

from hvdnoise import GNC
from tests.fake_world import Meeting, ThreadWorld
from tests.toys import Net, batch, build, losses, relative_error, train, vector


def alone() -> ThreadWorld:
    return ThreadWorld(Meeting(1, 1.0), 0)


class Trained:
    """A model two steps under way, so that the next forward is displaced."""

    def __init__(self, model: nn.Module | None = None, **options: Any) -> None:
        self.model, self.optimizer = build(alone(), GNC(0.5, **options), V=2, model=model)
        train(self.model, self.optimizer, 2)
        self.optimizer.zero_grad()
        self.clean = self.bits()
        self.storages = [p.data_ptr() for p in self.model.parameters()]

    def bits(self) -> Tensor:
        return vector(self.model.parameters())

    def forward(self, worker: int = 0, step: int = 2) -> Tensor:
        x, y = batch(step, worker)
        return losses(self.model(x), y).mean()

    def assert_clean(self) -> None:
        assert torch.equal(self.bits(), self.clean)
        assert [p.data_ptr() for p in self.model.parameters()] == self.storages

    def assert_displaced(self) -> None:
        assert not torch.equal(self.bits(), self.clean)


@pytest.fixture
def trained() -> Trained:
    return Trained()


def test_from_the_forward_to_the_end_of_its_backward(trained: Trained) -> None:
    for worker in (0, 1):
        trained.assert_clean()
        loss = trained.forward(worker)
        trained.assert_displaced()
        loss.backward()
        trained.assert_clean()
    trained.optimizer.synchronize()
    trained.assert_clean()
    gradients = vector(p.grad for p in trained.model.parameters())
    trained.optimizer.step()
    expected = trained.clean.add(gradients, alpha=-0.1)  # SGD from the clean weights, bit for bit
    assert torch.equal(trained.bits(), expected)
    assert [p.data_ptr() for p in trained.model.parameters()] == trained.storages


def test_each_virtual_worker_has_weights_of_its_own(trained: Trained) -> None:
    first = trained.forward(0)
    seen = trained.bits()
    first.backward()
    second = trained.forward(1)
    assert relative_error(trained.bits() - trained.clean, trained.clean - seen) < 1e-9  # two: -d, d
    second.backward()


# ---- what looks at the model between forward and backward

def output_of(model: nn.Module) -> Tensor:
    result: Tensor = model(batch(9, 0)[0])
    return result.detach()


def evaluated(trained: Trained) -> Tensor:
    trained.model.eval()
    with_grad = output_of(trained.model)
    with torch.no_grad():
        assert torch.equal(output_of(trained.model), with_grad)
    trained.model.train()
    return with_grad


def without_grad(trained: Trained) -> Tensor:
    with torch.no_grad():
        return output_of(trained.model)


def in_inference_mode(trained: Trained) -> Tensor:
    with torch.inference_mode():
        return output_of(trained.model).clone()


def raising_evaluation(trained: Trained) -> Tensor:
    with torch.no_grad(), pytest.raises(RuntimeError):
        trained.model(torch.zeros(1, 99, dtype=torch.float64))
    return without_grad(trained)


def state_dict(trained: Trained) -> Tensor:
    state = trained.model.state_dict()
    inner = trained.model.first.state_dict(prefix="first.")
    assert all(torch.equal(state[name], inner[name]) for name in inner)
    assert [tensor.data_ptr() for tensor in state.values()] == trained.storages
    return vector(state.values())


def saved(trained: Trained) -> Tensor:
    file = io.BytesIO()
    torch.save(trained.model.state_dict(), file)
    file.seek(0)
    return vector(torch.load(file, weights_only=True).values())


def deep_copied(trained: Trained) -> Tensor:
    return vector(copy.deepcopy(trained.model).parameters())


def part_deep_copied(trained: Trained) -> Tensor:
    together = copy.deepcopy({"net": trained.model, "part": trained.model.last})
    return vector(together["net"].parameters())


def unpickled(trained: Trained) -> Any:
    file = io.BytesIO()
    torch.save(trained.model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(trained: Trained) -> Tensor:
    return vector(unpickled(trained).parameters())


LOOKS: dict[str, Callable[[Trained], Tensor]] = {
    look.__name__: look for look in (
        evaluated, without_grad, in_inference_mode, raising_evaluation, state_dict, saved,
        deep_copied, part_deep_copied, pickled)}


@pytest.mark.parametrize("look", LOOKS)
def test_clean_outside_the_window(trained: Trained, look: str) -> None:
    """Before a forward, and after a backward before the step."""
    before = LOOKS[look](trained)
    for worker in (0, 1):
        trained.forward(worker).backward()
        assert torch.equal(LOOKS[look](trained), before)
    trained.assert_clean()


INSIDE = [look for look in LOOKS if look != "pickled"]


@pytest.mark.parametrize("look", INSIDE)
def test_clean_between_forward_and_backward(trained: Trained, look: str) -> None:
    expected = LOOKS[look](trained)
    other = Trained()
    for worker in (0, 1):
        loss, undisturbed = trained.forward(worker), other.forward(worker)
        assert torch.equal(LOOKS[look](trained), expected)
        trained.assert_displaced()  # and the pass goes on as if nobody had looked
        loss.backward()
        undisturbed.backward()
    for p, q in zip(trained.model.parameters(), other.model.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_a_pickle_between_forward_and_backward_is_refused(trained: Trained) -> None:
    """A pickle would hold the displaced weights."""
    loss = trained.forward()
    with pytest.raises(RuntimeError, match="state_dict"):
        pickled(trained)
    loss.backward()
    assert torch.equal(pickled(trained), trained.clean)


@pytest.mark.parametrize("how", ["deep copy", "pickle"])
def test_copies_are_models_of_their_own(trained: Trained, how: str) -> None:
    twin = copy.deepcopy(trained.model) if how == "deep copy" else unpickled(trained)
    loss = trained.forward()
    expected = Net()
    expected.load_state_dict(trained.model.state_dict())
    assert torch.equal(output_of(twin), output_of(expected)), "the copy was displaced"
    twin.load_state_dict(expected.state_dict())
    trained.assert_displaced()
    loss.backward()
    trained.assert_clean()
    output_of(twin)
    trained.assert_clean()
    trained.forward(1)
    trained.assert_displaced()


def test_loading_weights_ends_the_displacement(trained: Trained) -> None:
    trained.forward()
    weights = {name: tensor + 1 for name, tensor in trained.model.state_dict().items()}
    trained.model.load_state_dict(weights)
    assert torch.equal(trained.bits(), trained.clean + 1)
    assert [p.data_ptr() for p in trained.model.parameters()] == trained.storages


# ---- what goes wrong on the way

class Raises(Net):
    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        if self.error is not None:
            raise self.error
        return output


@pytest.mark.parametrize("error", [ValueError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_an_exception_in_forward(error: BaseException) -> None:
    trained, undisturbed = Trained(Raises()), Trained()
    trained.model.error = error
    with pytest.raises(type(error)):
        trained.forward()
    assert torch.equal(state_dict(trained), trained.clean)
    if isinstance(error, Exception):  # torch tells no hook of others
        trained.assert_clean()
    trained.optimizer.zero_grad()
    trained.assert_clean()
    trained.model.error = None
    trained.forward()
    trained.assert_displaced()  # the noise goes on
    trained.optimizer.zero_grad()
    records = [train(each.model, each.optimizer, 2, first=2) for each in (trained, undisturbed)]
    assert torch.equal(records[0].weights[-1], records[1].weights[-1])


def test_an_exception_in_backward(trained: Trained) -> None:
    loss = trained.forward()
    trained.model.last.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert torch.equal(state_dict(trained), trained.clean)
    trained.optimizer.reset()
    trained.assert_clean()


def test_a_forward_without_backward(trained: Trained) -> None:
    trained.forward()
    trained.optimizer.zero_grad()
    trained.assert_clean()


def test_after_the_exchange_a_forward_is_clean(trained: Trained) -> None:
    trained.forward(0).backward()
    trained.forward(1).backward()
    expected = without_grad(trained)
    assert torch.equal(output_of(trained.model), expected)
    trained.assert_clean()


# ---- autocast keeps low-precision copies of the weights

def test_autocast_sees_each_workers_weights() -> None:
    def gradients(one_region: bool) -> Tensor:
        model, optimizer = build(alone(), GNC(0.5), V=2, model=Net(torch.float32))
        train(model, optimizer, 2, dtype=torch.float32)
        optimizer.zero_grad()
        outer = torch.autocast("cpu", dtype=torch.bfloat16) if one_region else nullcontext()
        with outer:
            for worker in (0, 1):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    x, y = batch(2, worker, dtype=torch.float32)
                    loss = losses(model(x).float(), y).mean()
                loss.backward()
        return vector(p.grad for p in model.parameters())

    assert torch.equal(gradients(one_region=True), gradients(one_region=False))
