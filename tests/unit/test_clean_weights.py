"""A training forward sees p + delta; the parameters, and everything else, stay clean.

Clean means: the same bits, in the same storage. One rank with two virtual workers, so that a
displacement is due in any forward.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
from contextlib import nullcontext
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvdnoise import GNC
from tests.fake_world import Meeting, ThreadWorld
from tests.toys import Net, batch, build, losses, relative_error, seen, train, vector

pytestmark = pytest.mark.slow


def alone() -> ThreadWorld:
    return ThreadWorld(Meeting(1, 1.0), 0)


class Trained:
    """A model two steps under way, so that the next training forward is displaced."""

    def __init__(self, model: nn.Module | None = None, noise: Any = None, **options: Any) -> None:
        self.model, self.optimizer = build(alone(), noise or GNC(0.5), V=2, model=model, **options)
        train(self.model, self.optimizer, 2)
        self.optimizer.zero_grad()
        self.clean = vector(self.model.parameters())
        self.storages = [p.data_ptr() for p in self.model.parameters()]
        self.forwards: list[Tensor] = []  # the weights that each forward saw
        self.model.register_forward_hook(lambda m, *_: self.forwards.append(seen(m)))

    def forward(self, worker: int = 0, step: int = 2) -> Tensor:
        x, y = batch(step, worker)
        return losses(self.model(x), y).mean()

    def assert_clean(self) -> None:
        for weights in (vector(self.model.parameters()), seen(self.model),
                        vector(self.model.state_dict().values())):
            assert torch.equal(weights, self.clean)
        assert [p.data_ptr() for p in self.model.parameters()] == self.storages

    def assert_displaced(self) -> None:
        """The last forward was."""
        assert not torch.equal(self.forwards[-1], self.clean)


@pytest.fixture
def trained() -> Trained:
    return Trained()


def test_clean_at_every_moment(trained: Trained) -> None:
    for worker in (0, 1):
        trained.assert_clean()
        loss = trained.forward(worker)
        trained.assert_displaced()
        trained.assert_clean()
        loss.backward()
        trained.assert_clean()
    trained.optimizer.synchronize()
    gradients = vector(p.grad for p in trained.model.parameters())
    trained.optimizer.step()
    expected = trained.clean.add(gradients, alpha=-0.1)  # SGD from the clean weights, bit for bit
    assert torch.equal(vector(trained.model.parameters()), expected)
    assert [p.data_ptr() for p in trained.model.parameters()] == trained.storages


def test_each_virtual_worker_has_weights_of_its_own(trained: Trained) -> None:
    trained.forward(0).backward()
    trained.forward(1).backward()
    first, second = trained.forwards
    assert relative_error(second - trained.clean, trained.clean - first) < 1e-9  # two: -d, d


def test_gradients_are_those_at_the_displaced_weights(trained: Trained) -> None:
    """By a model that really has them; the two workers' mean."""
    expected = torch.zeros_like(trained.clean)
    for worker in (0, 1):
        trained.forward(worker).backward()
        twin = Net()
        nn.utils.vector_to_parameters(trained.forwards[-1], twin.parameters())
        x, y = batch(2, worker)
        losses(twin(x), y).mean().backward()
        expected += vector(p.grad for p in twin.parameters()) / 2
    assert relative_error(vector(p.grad for p in trained.model.parameters()), expected) < 1e-12


# ---- what looks at the model in a training forward, after it, and after its backward

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
    return vector(copy.deepcopy(trained.model.layers if hasattr(trained.model, "layers")
                                else trained.model).parameters())


def part_deep_copied(trained: Trained) -> Tensor:
    together = copy.deepcopy({"net": trained.model, "part": trained.model.last})
    return vector(together["net"].parameters())


def averaged(trained: Trained) -> Tensor:
    """As an EMA reads them."""
    return vector(p.detach().lerp(p.detach() * 0, 0.5) for p in trained.model.parameters())


def in_another_thread(trained: Trained) -> Tensor:
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(without_grad(trained)))
    thread.start()
    thread.join(10)
    return results[0]


LOOKS: dict[str, Callable[[Trained], Tensor]] = {
    look.__name__: look for look in (
        evaluated, without_grad, in_inference_mode, raising_evaluation, state_dict, saved,
        deep_copied, part_deep_copied, averaged, in_another_thread)}


@pytest.mark.parametrize("look", LOOKS)
def test_looking_sees_clean_weights_and_changes_nothing(look: str) -> None:
    """Before a forward, between it and its backward, and after the backward."""
    trained, other = Trained(), Trained()
    trained.model._forward_hooks.clear()  # which cannot be copied
    expected = LOOKS[look](trained)
    for worker in (0, 1):
        loss, undisturbed = trained.forward(worker), other.forward(worker)
        assert torch.equal(LOOKS[look](trained), expected)
        trained.assert_clean()
        loss.backward()
        undisturbed.backward()
        assert torch.equal(LOOKS[look](trained), expected)
    for p, q in zip(trained.model.parameters(), other.model.parameters()):
        assert torch.equal(p.grad, q.grad)


INSIDE = [look for look in ("state_dict", "saved", "averaged", "in_another_thread")]


@pytest.mark.parametrize("look", INSIDE)
def test_looking_from_inside_a_training_forward(trained: Trained, look: str) -> None:
    expected, found = LOOKS[look](trained), list[Tensor]()

    def hook(*_: Any) -> None:
        handle.remove()  # first: the look may call the module again
        found.append(LOOKS[look](trained))
    handle = trained.model.first.register_forward_hook(hook)
    trained.forward().backward()
    assert torch.equal(found[0], expected)


def test_weights_may_be_changed_between_forward_and_backward(trained: Trained) -> None:
    """As a clipping of weights does; the change is of the parameters, and stays."""
    for worker in (0, 1):
        loss = trained.forward(worker)
        with torch.no_grad():
            for p in trained.model.parameters():
                p.clamp_(-0.3, 0.3)
        loss.backward()
    assert torch.equal(vector(trained.model.parameters()), trained.clean.clamp(-0.3, 0.3))
    trained.optimizer.step()


# ---- copies

def unpickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("model", ["net", "lstm"])
@pytest.mark.parametrize("how", [copy.deepcopy, unpickled], ids=["deep copy", "pickle"])
def test_copies_are_models_of_their_own(how: Callable[[Any], Any], model: str) -> None:
    trained = Trained() if model == "net" else Trained(Recurrent())
    trained.model._forward_hooks.clear()
    loss = trained.forward()
    twin = how(trained.model)
    assert all(type(m._parameters) is dict and "hvdnoise" not in repr(m.__dict__)
               for m in twin.modules())
    assert torch.equal(vector(twin.parameters()), trained.clean)
    expected = output_of(twin)
    without_grad(trained)
    loss.backward()
    trained.forward(1).backward()
    trained.optimizer.step()
    assert torch.equal(output_of(twin), expected), "the copy follows the model"


def test_an_optimizer_is_neither_copied_nor_pickled(trained: Trained) -> None:
    for how in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"state_dict\(\)"):
            how(trained.optimizer)


def test_nothing_is_left_on_a_model_without_optimizer(trained: Trained) -> None:
    model = trained.model
    del trained.optimizer
    gc.collect()
    for module in model.modules():
        assert type(module._parameters) is dict
        assert module.__dict__.get("_compiled_call_impl") is None
    assert not nn.modules.module._global_forward_pre_hooks


def test_many_optimizers_leave_no_global_hook() -> None:
    """Also of parameters that belong to no module."""
    kept = []
    for _ in range(20):
        p = nn.Parameter(torch.ones(2, dtype=torch.float64))
        inner = torch.optim.SGD([p], lr=0.1)
        from hvdnoise import DistributedOptimizer
        optimizer = DistributedOptimizer(inner, noise=GNC(0.1), virtual_workers=2, world=alone())
        assert len(nn.modules.module._global_forward_pre_hooks) == 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                p.square().sum().backward()
            optimizer.step()
        assert "allreduce.noname.0.0" in str(caught[0].message) and len(caught) == 1
        assert not nn.modules.module._global_forward_pre_hooks
        kept.append(optimizer)


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
    trained.assert_clean()
    trained.model.error = None
    trained.forward()
    trained.assert_displaced()  # the noise goes on
    records = [train(each.model, each.optimizer, 2, first=2) for each in (trained, undisturbed)]
    assert torch.equal(records[0].weights[-1], records[1].weights[-1])


def test_an_interrupt_in_the_call_that_is_found_first() -> None:
    """It began before the model was watched, in a resumed run with noise due."""
    whole = Trained()
    state = copy.deepcopy((whole.model.state_dict(), whole.optimizer.state_dict()))
    model, optimizer = build(alone(), GNC(0.5), V=2, model=Raises())
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    forwards: list[Tensor] = []
    model.register_forward_pre_hook(lambda m, *_: forwards.append(seen(m)))
    model.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(batch(2, 0)[0])
    assert not torch.equal(forwards[0], whole.clean), "the first call was displaced"
    assert torch.equal(seen(model), whole.clean)
    model.error = None
    records = [train(m, o, 2, first=2) for m, o in ((model, optimizer),
                                                    (whole.model, whole.optimizer))]
    assert torch.equal(records[0].weights[-1], records[1].weights[-1])


def test_an_exception_in_backward(trained: Trained) -> None:
    loss = trained.forward()
    handle = trained.model.last.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    trained.assert_clean()
    trained.optimizer.reset()
    handle.remove()
    trained.forward().backward()


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.weight.mul_(0.5)
        return super().forward(x)


def test_a_forward_that_changes_its_weights_is_refused() -> None:
    model, optimizer = build(alone(), GNC(0.5), V=2, model=InPlace())
    with pytest.raises(RuntimeError, match="changes the weight first.weight in place"):
        train(model, optimizer, 2)


def test_freezing_between_forward_and_backward_is_refused(trained: Trained) -> None:
    """Its gradient would stay this rank's own."""
    for hold in (True, False):
        loss = trained.forward()
        trained.model.first.requires_grad_(False)
        with trained.optimizer.no_sync() if hold else nullcontext():
            with pytest.raises(RuntimeError, match="first.* was frozen after its forward"):
                loss.backward()
        trained.model.first.requires_grad_(True)
        trained.optimizer.reset()


# ---- modules of other kinds

class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(3, 4, batch_first=True, num_layers=2).double()
        self.last = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x[:, None].expand(-1, 3, -1))[0][:, -1])


class Tied(nn.Module):
    """A weight used by two modules, and by its name from outside of both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.last(torch.tanh(self.first(x))))
        return nn.functional.linear(h, self.first.weight)[:, :2]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4).double())
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(3, 3).double() for _ in range(2))
        self.named = nn.ParameterDict({"last": torch.randn(2, 3).double()})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x @ self.named["last"].T


class Checkpointed(Net):
    """One checkpoint of a module, and one of a method that reads its weights itself."""

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.first, x, use_reentrant=False)
        result: Tensor = checkpoint(self.head, h, use_reentrant=False)
        return result

    def head(self, h: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(h), self.last.weight, self.last.bias)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].T @ x


class WithFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(Own.apply(x, self.first.weight) + self.first.bias)
        return Own.apply(h, self.last.weight) + self.last.bias


@pytest.mark.parametrize("make", [Recurrent, Tied, Normed, Listed, Checkpointed, WithFunction])
def test_gradients_of_modules_of_all_kinds(make: Callable[[], nn.Module]) -> None:
    """Those of a twin that has the displaced weights for real."""
    trained, twin = Trained(make()), make()
    for worker in (0, 1):
        loss = trained.forward(worker)
        gradients = torch.autograd.grad(loss, list(trained.model.parameters()), retain_graph=True)
        weights = dict(zip(dict(trained.model.named_parameters()), split(trained)))
        twin.load_state_dict({**twin.state_dict(), **weights})
        x, y = batch(2, worker)
        expected = torch.autograd.grad(losses(twin(x), y).mean(), list(twin.parameters()))
        assert relative_error(vector(gradients), vector(expected)) < 1e-12
        trained.assert_displaced()
        loss.backward()
    trained.optimizer.step()
    assert trained.optimizer.noise_coverage.missed == 0


def split(trained: Trained) -> list[Tensor]:
    """What the last forward saw of each parameter; a shared one counts once."""
    by_name: dict[int, Tensor] = {}
    start = 0
    for module in trained.model.modules():
        for p in module._parameters.values():
            assert p is not None
            by_name.setdefault(id(p), trained.forwards[-1][start:start + p.numel()].view(p.shape))
            start += p.numel()
    return [by_name[id(p)] for p in trained.model.parameters()]


def test_a_parametrized_weight_is_clean_outside_of_calls() -> None:
    trained = Trained(Normed())
    expected = trained.model.first.weight.detach().clone()
    trained.forward()
    assert torch.equal(trained.model.first.weight, expected)


def test_functional_call_inside_a_forward_puts_back_the_parameter() -> None:
    class Functional(Net):
        def forward(self, x: Tensor) -> Tensor:
            weights = {name: 2 * p for name, p in self.first.named_parameters()}
            return self.last(torch.tanh(torch.func.functional_call(self.first, weights, (x,))))

    trained = Trained(Functional())
    trained.forward()
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in trained.model.parameters())
    trained.assert_clean()


# ---- noise that does not reach a gradient

def missed(trained: Trained, step: Callable[[Trained, int], None]) -> list[str]:
    """The warnings of two steps; both count."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = trained.optimizer.noise_coverage
        for n in (2, 3):
            trained.optimizer.zero_grad()
            for worker in (0, 1):
                step(trained, worker)
            trained.optimizer.step()
    now = trained.optimizer.noise_coverage
    assert (now.due - before.due, now.missed - before.missed) == (2, 2)
    return [str(each.message) for each in caught]


def in_eval_mode(trained: Trained, worker: int) -> None:
    trained.model.eval()
    trained.forward(worker).backward()


def part_in_eval_mode(trained: Trained, worker: int) -> None:
    x, y = batch(2, worker)
    trained.model.first.eval()
    losses(trained.model.last(torch.tanh(trained.model.first(x))), y).mean().backward()


def outside_of_modules(trained: Trained, worker: int) -> None:
    (trained.model.first.weight * batch(2, worker)[0].mean()).sum().backward()


def by_forward(trained: Trained, worker: int) -> None:
    x, y = batch(2, worker)
    losses(nn.functional.linear(trained.model.first.forward(x), trained.model.last.weight),
           y).mean().backward()


@pytest.mark.parametrize("step, cause", [
    (in_eval_mode, r"Net was called in evaluation mode"),
    (part_in_eval_mode, r"Linear was called in evaluation mode"),
    (outside_of_modules, "no call of its module"), (by_forward, "no call of its module")],
    ids=lambda each: getattr(each, "__name__", ""))
def test_noise_that_was_due_and_did_not_come_is_told_once(step: Any, cause: str) -> None:
    told = missed(Trained(), step)
    assert len(told) == 1 and cause in told[0] and "first." in told[0], told


def test_training_in_evaluation_mode_can_be_asked_for() -> None:
    trained = Trained(noise_in_eval=True)
    trained.model.eval()
    for worker in (0, 1):
        trained.forward(worker).backward()
        trained.assert_displaced()
        assert torch.equal(without_grad(trained), output_of_clean(trained))
    trained.optimizer.step()
    assert trained.optimizer.noise_coverage.missed == 0


def output_of_clean(trained: Trained) -> Tensor:
    twin = Net()
    nn.utils.vector_to_parameters(trained.clean, twin.parameters())
    return output_of(twin)


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
