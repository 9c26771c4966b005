"""What a training program runs in: its wrapper, its models and, if asked, a record of every call.

A program is a function of a `Lab`. It builds its models here, calls them through `Lab.callable`
and wraps its optimizers by `Lab.wrap`; everything else is an ordinary loop that is legal with
``hvd.DistributedOptimizer``. With ``watched=True`` every call of a model becomes a `Call`, which
says what its weights were inside the forward, found without asking the library:

- ``clean``: ``named_parameters()`` right before the call;
- ``weights``: the attributes (``module.weight``) read while the forward runs;
- ``replayed``: how far the output is from that of another copy of the model, one that no
  optimizer knows, with ``weights`` written into it.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves, tree_map

Call_ = Callable[..., Any]


def draw(*key: int) -> torch.Generator:
    """Random numbers that are the same for the same key, such as (rank, step)."""
    seed = 5
    for part in key:
        seed = seed * 1_000_003 + part + 23
    return torch.Generator().manual_seed(seed % 2 ** 63)


def normal(*key: int, shape: tuple[int, ...] = (4, 8)) -> Tensor:
    return torch.randn(shape, generator=draw(*key))


def tokens(*key: int, shape: tuple[int, ...] = (4, 9), kinds: int = 16) -> Tensor:
    return torch.randint(kinds, shape, generator=draw(*key))


@dataclass
class Call:
    """One call of a model."""

    iteration: int
    model: str
    training: bool             # in training mode, with gradients, and with parameters that train
    args: tuple[Any, ...]
    clean: dict[str, Tensor]
    weights: dict[str, Tensor]
    due: set[str]              # parameters that require gradients and belong to an optimizer
    moved: bool                # whether named_parameters() told something else after the call
    replayed: float

    def displaced(self) -> set[str]:
        """The parameters that were not the clean ones inside the forward."""
        return {name for name, clean in self.clean.items()
                if not torch.equal(clean, self.weights[name])}


@dataclass(repr=False)
class Lab:
    """A program's surroundings, and what is left of it when it has ended."""

    rank: int
    wrapping: Call_
    options: Callable[[], dict[str, Any]] = dict  # of the wrapper; called for each optimizer
    compiled: bool = False
    watched: bool = False
    iterations: int = 5
    models: dict[str, nn.Module] = field(default_factory=dict)
    twins: dict[str, nn.Module] = field(default_factory=dict)
    optimizers: list[Any] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    gradients: dict[tuple[int, str], dict[str, Tensor]] = field(default_factory=dict)
    graphs: list[int] = field(default_factory=list)  # compiled, after each iteration
    losses: list[float] = field(default_factory=list)
    now: int = 0

    def build(self, name: str, factory: Callable[[], nn.Module]) -> Any:
        """A model, the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(self.models))
            self.models[name] = factory()
        self.twins[name] = copy.deepcopy(self.models[name])
        return self.models[name]

    def copy(self, name: str, original: str) -> Any:
        """A copy of a model as it is now, with whatever hooks it has."""
        self.models[name] = copy.deepcopy(self.models[original])
        self.twins[name] = copy.deepcopy(self.twins[original])
        return self.models[name]

    def callable(self, name: str) -> Call_:
        """By which the program calls a model."""
        if self.compiled:
            return torch.compile(self.models[name], backend="aot_eager")
        return self._watcher(name) if self.watched else self.models[name]

    def wrap(self, inner: torch.optim.Optimizer, named_parameters: Iterator[tuple[str, Tensor]],
             **options: Any) -> Any:
        self.optimizers.append(self.wrapping(inner, named_parameters=named_parameters, **options,
                                             **self.options()))
        return self.optimizers[-1]

    def steps(self) -> Iterator[int]:
        """The iterations of a program."""
        for self.now in range(self.iterations):
            yield self.now
            self.graphs.append(counters["stats"]["unique_graphs"])

    def exchanged(self, name: str) -> None:
        """The program says that a model's gradients are now the mean."""
        self.gradients[self.now, name] = {
            key: p.grad.detach().to_dense().clone()
            for key, p in self.models[name].named_parameters() if p.grad is not None}

    def mean(self, loss: Tensor) -> Tensor:
        """Of all ranks, where an optimizer decides by the loss."""
        return hvd.allreduce(loss.detach(), name="program.loss")

    @contextmanager
    def evaluation(self, *names: str) -> Iterator[None]:
        for name in names:
            self.models[name].eval()
        with torch.no_grad():
            yield
        for name in names:
            self.models[name].train()

    def outcome(self) -> dict[str, Tensor]:
        """All parameters and buffers."""
        return {f"{name}.{key}": value.detach().clone() for name, model in self.models.items()
                for key, value in model.state_dict().items()}

    def _watcher(self, name: str) -> Call_:
        model = self.models[name]

        def call(*args: Any) -> Any:
            clean, weights = _clean(model), dict[str, Tensor]()
            buffers = [b.clone() for b in model.buffers()]
            with _reading(model, weights):
                out = model(*args)
            trained = {p for o in self.optimizers for g in o.param_groups for p in g["params"]}
            due = {key for key, p in model.named_parameters() if p.requires_grad and p in trained}
            self.calls.append(Call(
                self.now, name, bool(due) and model.training and torch.is_grad_enabled(),
                tree_map(_detached, args), clean, weights, due,
                any(not torch.equal(p, clean[key]) for key, p in _clean(model).items()),
                self._replay(name, weights, buffers, args, out)))
            return out
        return call

    def _replay(self, name: str, weights: dict[str, Tensor], buffers: list[Tensor],
                args: tuple[Any, ...], out: Any) -> float:
        """The largest difference of an output from that of the copy with these weights."""
        twin = self.twins[name]
        for module, original in zip(twin.modules(), self.models[name].modules()):
            module.training = original.training
        with torch.no_grad():
            for buffer, before in zip(twin.buffers(), buffers):
                buffer.copy_(before)
            again = put_in(twin, weights)(*args)
        return max(float((a.detach() - b).abs().max())
                   for a, b in zip(tree_leaves(out), tree_leaves(again)))


@torch.no_grad()
def put_in(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The same model, with these weights written into it."""
    for name, p in model.named_parameters():
        p.copy_(weights[name])
    return model


def _clean(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in dict(model.named_parameters()).items()}


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextmanager
def _reading(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Read all attributes when the forward calls its first submodule: then it surely runs."""
    def read(*_: Any) -> None:
        if not weights:
            for name, _p in model.named_parameters():
                path, _, attribute = name.rpartition(".")
                weights[name] = getattr(model.get_submodule(path), attribute).detach().clone()

    handles = [module.register_forward_pre_hook(read)
               for module in model.modules() if module is not model]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
