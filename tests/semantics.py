"""Training programs, what the optimizer makes of them, and a slow model of what it should.

A `Program` is a list of operations (forward, backward, step, an edit of the weights, ...) on a few
tiny networks and their optimizers. `run` executes it with the real `DistributedOptimizer`, in a
world of threads. `Model` executes it for all ranks at once with plain tensors of float64 and the
formulas of tests/reference.py, and knows nothing of hooks, buckets or modules: a forward that is
to be displaced computes with ``p + delta``. Where the semantics leave the result open, the model
raises `Unspecified` and the program ends there.

`programs` draws programs for hypothesis. It runs the model while it draws, so that most of what it
draws makes sense at its place.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter, deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hvdnoise import GNC, CovarianceNoise, DistributedOptimizer, streams
from hvdnoise.noise.base import Noise
from tests import reference
from tests.fake_world import Meeting, ThreadWorld, run_threads

Array = reference.Array
PARTS = ("first", "last")
EXAMPLES, DATA_SETS, NETS, RANKS = 3, 16, 3, 2
RATES = {"weight": 0.1, "bias": 0.2}  # two groups of parameters
NOTHING = torch.full((4,), math.inf, dtype=torch.float64)  # stands for a p.grad that is None
TINY = 1e-9  # deviations so small, in units of the gradients, are rounding; a radius magnifies it


class Unspecified(Exception):
    """The semantics do not say what comes next."""


class Failed(Exception):
    """What a forward raises when it is told to."""


# ---------------------------------------------------------------------- what a program is

@dataclass(frozen=True)
class NoiseSpec:
    """A noise: "none", GNC's "own", "gathered", "isotropic", or "workers", "white", "examples"."""

    kind: str = "none"
    scale: str = "radius"
    size: float = 0.3
    grows: bool = False  # the size is a function of the step
    lag: int = 1
    emulated: int = 2
    counts: bool = True  # examples: seen in the forward, or given as batch_size
    seed: int = 5

    @property
    def displaces(self) -> bool:
        return self.kind in ("own", "gathered", "isotropic")

    def at(self, step: int) -> float:
        return self.size * (1 + 0.5 * step) if self.grows else self.size

    def make(self, k: int) -> Noise | None:
        if self.kind == "none":
            return None
        if self.displaces:
            size: Any = self.at if self.grows else self.size
            return GNC(**{self.scale: size}, source=self.kind, lag=self.lag, seed=self.seed)
        options: dict[str, Any] = {} if self.counts else {"batch_size": k * EXAMPLES}
        structure = "isotropic" if self.kind == "white" else "full"
        if self.kind == "examples":
            options["source"] = "examples"
        return CovarianceNoise(structure, self.emulated, seed=self.seed, **options)

    def __str__(self) -> str:
        if self.kind == "none":
            return "None"
        size = f"lambda t: {self.size} * (1 + 0.5 * t)" if self.grows else f"{self.size}"
        if self.displaces:
            return f"GNC({self.scale}={size}, source={self.kind!r}, lag={self.lag})"
        return f"CovarianceNoise {self.kind}, M={self.emulated}" + ", b given" * (not self.counts)


@dataclass(frozen=True)
class Setup:
    """The optimizers of a program: each has parts of networks, such as ("0.first", "0.last")."""

    ranks: int
    V: int
    k: int
    parts: tuple[tuple[str, ...], ...]
    noises: tuple[NoiseSpec, ...]
    momentum: float = 0.0
    exchange: str = "auto"

    @property
    def W(self) -> int:
        return self.ranks * self.V

    @property
    def nets(self) -> int:
        return 1 + max(int(part[0]) for parts in self.parts for part in parts)

    @property
    def several(self) -> bool:
        return len(self.parts) > 1


@dataclass(frozen=True)
class Op:
    """One operation: a method of `Library` and of `Model`, and its arguments."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.arguments.items())})"

    __repr__ = __str__


@dataclass
class Expected:
    """What the model says of one operation, for every rank."""

    errors: frozenset[str] = frozenset()  # kinds, one of which is raised; empty: none is
    seen: list[list[Array]] = field(default_factory=list)  # [rank][layer call]: the weights
    values: list[list[Array]] = field(default_factory=list)  # losses and outputs
    known: list[str] = field(default_factory=list)  # parameters whose p.grad is
    state: list[Array] = field(default_factory=list)  # weights and gradients, see `snapshot`
    displaced: int = 0  # layer calls with displaced weights


@dataclass
class Program:
    """Operations, and what the model expects of each."""

    setup: Setup
    ops: list[Op] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)

    def __repr__(self) -> str:
        s = self.setup
        lines = [f"Program of {s.ranks} ranks, V={s.V}, k={s.k}, momentum={s.momentum}, "
                 f"exchange={s.exchange}"]
        lines += [f"    optimizer {n}: {' '.join(parts)}  {noise}"
                  for n, (parts, noise) in enumerate(zip(s.parts, s.noises))]
        for n, (op, expected) in enumerate(zip(self.ops, self.expected)):
            remark = f"raises {' or '.join(sorted(expected.errors))}" if expected.errors else \
                f"{expected.displaced} displaced" if expected.displaced else ""
            lines.append(f"    {n:2}  {op}" + f"    # {remark}" * bool(remark))
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print all numbers


# ---------------------------------------------------------------------- networks and data

class Layer(nn.Linear):
    """Notes the weights that its forward sees."""

    def __init__(self, seen: list[Array]) -> None:
        super().__init__(2, 2, dtype=torch.float64)
        self.seen, self.fails = seen, False

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        self.seen.append(flat([weight, bias]))
        if self.fails:
            raise Failed
        return F.linear(x, weight, bias)


class Net(nn.Module):
    def __init__(self, number: int, seen: list[Array]) -> None:
        super().__init__()
        self.first, self.last = Layer(seen), Layer(seen)
        with torch.no_grad():
            for (_, p), start in zip(self.named_parameters(), starts()[number]):
                p.copy_(start)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


_tables: dict[str, Any] = {}


def starts() -> list[list[Tensor]]:
    """The first weights of every network, far from zero."""
    if "starts" not in _tables:
        _tables["starts"] = [[0.7 * streams.normal(shape, 7, "start", net, n, dtype=torch.float64)
                              for n, shape in enumerate([(2, 2), (2,), (2, 2), (2,)])]
                             for net in range(NETS)]
    return _tables["starts"]


def batch(n: int, rank: int) -> tuple[Tensor, Tensor]:
    """What the n-th forward of a rank gets, and what it should give."""
    if "data" not in _tables:
        numbers = streams.normal((DATA_SETS, RANKS, EXAMPLES, 4), 11, "data", dtype=torch.float64)
        _tables["data"] = [[(x[:, :2].clone(), x[:, 2:].clone()) for x in each]
                           for each in numbers]
    return _tables["data"][n % DATA_SETS][rank]


def flat(tensors: Iterable[Tensor]) -> Array:
    return torch.cat([t.flatten() for t in tensors]).detach().numpy()


def squares(output: Tensor, target: Tensor) -> Tensor:
    """(examples,)"""
    return ((output - target) ** 2).mean(dim=1)


def keys_of(parts: Iterable[str]) -> list[str]:
    """Names of the parameters of these parts."""
    return [f"{part}.{name}" for part in parts for name in ("weight", "bias")]


def groups(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Of an optimizer: the weights, then the biases."""
    return [{"params": [p for key, p in parameters.items() if key.endswith(kind)], "lr": rate}
            for kind, rate in RATES.items()]


@torch.no_grad()
def edit(parameters: Iterable[Tensor], how: str) -> None:
    """Change weights in place."""
    for p in parameters:
        if how == "mul":
            p.mul_(0.9)
        elif how == "add":
            p.data.add_(0.05)
        elif how == "clamp":
            p.clamp_(-0.6, 0.6)
        else:
            p.copy_(p.flip(0))


TORCH_ERRORS = ("modified by an inplace operation", "backward through the graph a second time",
                "does not require grad", "can't optimize a non-leaf")
KINDS = {"second": "a second backward", "between": r"^zero_grad\(\) after",
         "nothing": "no gradients to exchange", "closure": "lag=0",
         "missing": r"backward passes were made", "weigh": r"weigh\(",
         "worker": "another worker|other worker", "broken": "broke off",
         "torch": "|".join(map(re.escape, TORCH_ERRORS))}


def kind_of(error: BaseException) -> str:
    """The name of an error in the model's language."""
    if isinstance(error, Failed):
        return "failed"
    if isinstance(error, RuntimeError):
        for kind, pattern in KINDS.items():
            if re.search(pattern, str(error)):
                return kind
    return f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------------- the library

class Library:
    """One rank that executes operations with the real optimizer."""

    def __init__(self, setup: Setup, world: ThreadWorld) -> None:
        self.setup, self.rank = setup, world.rank
        self.seen: list[Array] = []
        self.values: list[Array] = []
        self.nets = [Net(n, self.seen) for n in range(setup.nets)]
        self.parameters: dict[str, Tensor] = {
            f"{n}.{name}": p for n, net in enumerate(self.nets)
            for name, p in net.named_parameters()}
        self.places = [p.data_ptr() for p in self.parameters.values()]
        self.optimizers: list[Any] = []
        for parts, noise in zip(setup.parts, setup.noises):
            mine = {key: self.parameters[key] for key in keys_of(parts)}
            self.optimizers.append(DistributedOptimizer(
                torch.optim.SGD(groups(mine), lr=1.0, momentum=setup.momentum), mine.items(),
                noise=noise.make(setup.k), virtual_workers=setup.V, world=world,
                backward_passes_per_step=setup.k, exchange=setup.exchange
                if noise.kind == "gathered" else "auto"))
        self.losses: list[Tensor] = []
        self.forwards = 0
        self.averages = [[p.detach().clone() for p in net.parameters()] for net in self.nets]
        self.saved: dict[Any, Any] = {}

    def do(self, op: Op) -> str | None:
        """The kind of the error, if the operation raised one."""
        self.seen.clear()
        self.values.clear()
        try:
            getattr(self, op.name)(**op.arguments)
        except Exception as error:
            return kind_of(error)
        return None

    # ------------------------------------------------------------------ operations

    def forward(self, net: int, part: str = "all", then: int | None = None,
                fails: str | None = None, weigh: bool = False) -> None:
        x, y = batch(self.forwards, self.rank)
        self.forwards += 1
        model = self.nets[net]
        if fails is not None:
            x = x[1:]  # nothing of it is to be left, not even the number of examples
            getattr(model, fails).fails = True
        try:
            h = model(x) if part == "all" else getattr(model, part)(x)
        finally:
            if fails is not None:
                getattr(model, fails).fails = False
        if then is not None:
            h = self.nets[then](h)
        each = squares(h, y)
        loss = self.optimizers[0].weigh(each) if weigh else each.mean()
        self.losses.append(loss)
        self.values.append(flat([loss]))

    def backward(self, loss: int, retain: bool = False, inputs: tuple[str, ...] | None = None,
                 hold: tuple[int, ...] = ()) -> None:
        with ExitStack() as stack:
            for optimizer in hold:
                stack.enter_context(self.optimizers[optimizer].no_sync())
            self.losses[loss].backward(
                retain_graph=retain,
                inputs=None if inputs is None else [self.parameters[key] for key in inputs])

    def look(self, loss: int) -> None:
        gradients = torch.autograd.grad(self.losses[loss], list(self.parameters.values()),
                                        retain_graph=True, allow_unused=True)
        self.values.append(flat([g for g in gradients if g is not None]))

    def evaluate(self, net: int, how: str) -> None:
        modes = [(module, module.training) for module in self.nets[net].modules()]
        if how == "eval":
            self.nets[net].eval()
        with torch.inference_mode() if how == "inference" else torch.no_grad():
            self.values.append(flat([self.nets[net](batch(0, self.rank)[0])]))
        for module, mode in modes:
            module.training = mode

    def zero_grad(self, optimizer: int, to_none: bool | None) -> None:
        options = {} if to_none is None else {"set_to_none": to_none}
        self.optimizers[optimizer].zero_grad(**options)

    def net_zero_grad(self, net: int, to_none: bool) -> None:
        self.nets[net].zero_grad(set_to_none=to_none)

    def synchronize(self, optimizer: int) -> None:
        self.optimizers[optimizer].synchronize()

    def reset(self, optimizer: int) -> None:
        self.optimizers[optimizer].reset()

    def step(self, optimizer: int) -> None:
        self.optimizers[optimizer].step()

    def step_closure(self, optimizer: int, body: tuple[Op, ...]) -> None:
        def closure() -> None:
            for op in body:
                getattr(self, op.name)(**op.arguments)
        self.optimizers[optimizer].step(closure)

    def mode(self, net: int, part: str, train: bool) -> None:
        module = self.nets[net] if part == "all" else getattr(self.nets[net], part)
        module.train(train)

    def require(self, net: int, part: str, on: bool) -> None:
        getattr(self.nets[net], part).requires_grad_(on)

    def edit(self, net: int, part: str, how: str) -> None:
        edit(getattr(self.nets[net], part).parameters(), how)

    def average(self, net: int) -> None:
        with torch.no_grad():
            for average, p in zip(self.averages[net], self.nets[net].parameters()):
                average.mul_(0.9).add_(p, alpha=0.1)
        self.values.append(flat(self.averages[net]))

    def save_net(self, net: int) -> None:
        self.saved["net", net] = copy.deepcopy(self.nets[net].state_dict())
        self.values.append(flat(self.saved["net", net].values()))

    def load_net(self, net: int) -> None:
        self.nets[net].load_state_dict(self.saved["net", net])

    def save_optimizer(self, optimizer: int) -> None:
        self.saved["optimizer", optimizer] = copy.deepcopy(self.optimizers[optimizer].state_dict())

    def load_optimizer(self, optimizer: int) -> None:
        self.optimizers[optimizer].load_state_dict(
            copy.deepcopy(self.saved["optimizer", optimizer]))

    # ------------------------------------------------------------------ comparison

    def execute(self, program: Program) -> list[tuple[int, str]]:
        """Operations that went wrong, up to the first, and how."""
        for n, (op, expected) in enumerate(zip(program.ops, program.expected)):
            wrong = self.differences(self.do(op), expected)
            if wrong:
                return [(n, f"operation {n}, {op}, rank {self.rank}: {each}") for each in wrong]
        return []

    def differences(self, error: str | None, expected: Expected) -> list[str]:
        """In words, what is not as the model says."""
        wrong = []
        if (error or None) not in (expected.errors or {None}):
            wrong.append(f"raises {error}, expected {sorted(expected.errors) or 'no error'}")
        r = self.rank
        if [p.data_ptr() for p in self.parameters.values()] != self.places:
            wrong.append("a parameter's storage moved")
        if error is None:
            for what, ours, theirs in (("weights seen", self.seen, expected.seen[r]),
                                       ("loss or output", self.values, expected.values[r])):
                if len(ours) != len(theirs):
                    wrong.append(f"{len(ours)} {what}, expected {len(theirs)}")
                for n, (mine, right) in enumerate(zip(ours, theirs)):
                    wrong += difference(f"{what} [{n}]", mine, right)
        state, right = snapshot(self.parameters, expected.known), expected.state[r]
        if difference("", state, right):
            start = 0
            for key in [*self.parameters, *(f"{key}.grad" for key in expected.known)]:
                part = slice(start, start + self.parameters[key.removesuffix(".grad")].numel())
                wrong += difference(key, state[part], right[part])
                start = part.stop
        return wrong


def snapshot(parameters: dict[str, Tensor], known: Sequence[str]) -> Array:
    """All weights, and the p.grad of the known ones; infinite where there is none."""
    grads = [parameters[key].grad for key in known]
    return flat([*parameters.values(),
                 *(NOTHING[:parameters[key].numel()] if grad is None else grad
                   for key, grad in zip(known, grads))])


def difference(what: str, value: Array, expected: Array) -> list[str]:
    """In words; infinite is equal to infinite."""
    if value.shape == expected.shape:
        if np.array_equal(value, expected):
            return []
        finite = np.isfinite(expected)
        size = max(1.0, float(np.abs(expected[finite]).max(initial=0.0)))
        if np.array_equal(finite, np.isfinite(value)) and np.abs(
                value[finite] - expected[finite]).max(initial=0.0) <= 1e-9 * size:
            return []
    return [f"{what}: {value}, expected {expected}"]


def run(program: Program, timeout: float = 5.0) -> list[str]:
    """Execute a program with the library; what is not as the model expects, of the first
    operation where anything is not."""
    ranks = program.setup.ranks
    meeting = Meeting(ranks, timeout)
    libraries = [Library(program.setup, ThreadWorld(meeting, rank)) for rank in range(ranks)]

    def work(rank: int) -> list[tuple[int, str]]:
        try:
            return libraries[rank].execute(program)
        finally:
            meeting.leave(rank, None)

    found = [work(0)] if ranks == 1 else run_threads(ranks, lambda world: work(world.rank),
                                                     timeout=20 * timeout)
    first = min((n for each in found for n, _ in each), default=0)
    return [text for each in found for n, text in each if n == first]


# ---------------------------------------------------------------------- the model

@dataclass
class Loss:
    """A kept loss, on every rank, and what its graph holds."""

    tensors: list[Tensor]
    seen_as: dict[str, int] = field(default_factory=dict)  # displaced parameter -> v
    weighed: tuple[int, int] | None = None  # for which step and pass
    spent: bool = False


@dataclass
class Observation:
    """The deviations of one exchange."""

    step: int
    keys: list[str]
    deviations_WP: Array


class Book:
    """What the model keeps of an optimizer; ``kinds`` says of what each ``p.grad`` is made:
    "none", "fresh" (of this rank's backward passes), "result" (of an exchange), "zeroed" (a
    result filled with zeros), "mixed" (a result that something was added to), "unclear"."""

    def __init__(self, model: Model, number: int) -> None:
        setup = model.setup
        self.number, self.noise = number, setup.noises[number]
        self.keys = keys_of(setup.parts[number])
        self.inner = [torch.optim.SGD(groups({key: p[key] for key in self.keys}), lr=1.0,
                                      momentum=setup.momentum) for p in model.parameters]
        self.kinds = dict.fromkeys(self.keys, "none")
        self.steps = 0
        self.history: deque[Observation] = deque(maxlen=max(1, self.noise.lag))
        self.deltas: dict[tuple[int, int], dict[str, Tensor]] = {}  # of (rank, v), in this step
        self.called = False  # a call that trains came after the last pass
        self.before = 0  # examples of the last pass in this step
        self.poisoned = False  # an error in backward: reset() is needed
        self.tainted = False  # p.grad is damaged until it is cleared
        self.begin()

    def begin(self) -> None:
        """The passes of the step begin."""
        self.done = 0
        self.complete = False  # the exchange ran
        self.waiting = False  # and nobody may look at its result yet
        self.nonzero = 0  # parameters whose result is not zero
        self.rows: list[dict[str, Array]] = []  # gradients: of all ranks' first workers, ...
        self.observed: Observation | None = None
        self.trained: list[str] = []
        self.examples = 0  # of the worker whose passes are under way
        self.by_worker: list[int] = []  # of those before
        self.weighed = False

    def end_pass(self, *, counts: bool, repeated: bool = True) -> None:
        """Count the examples of a pass; without calls of its own, it repeats the one before."""
        examples = EXAMPLES if self.called else self.before if repeated else 0
        self.examples += examples * counts
        self.before = EXAMPLES if self.called else self.before
        self.called = False

    def saved(self) -> tuple[Any, ...]:
        """What a checkpoint holds."""
        return (self.steps, list(self.history), [copy.deepcopy(each.state_dict())
                                                 for each in self.inner])


class Model:
    """All ranks at once, by the book."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.total = setup.V * setup.k
        self.parameters: list[dict[str, Tensor]] = [
            {key: start.clone().requires_grad_() for n in range(setup.nets)
             for key, start in zip(keys_of([f"{n}.first", f"{n}.last"]), starts()[n])}
            for _ in range(setup.ranks)]
        self.reached: set[str] = set()
        for parameters in self.parameters:
            for key, p in parameters.items():
                p.register_post_accumulate_grad_hook(lambda _, key=key: self.reached.add(key))
        self.books = [Book(self, n) for n in range(len(setup.parts))]
        self.book_of = {key: book for book in self.books for key in book.keys}
        self.training = {(n, part): True for n in range(setup.nets) for part in ("all", *PARTS)}
        self.losses: list[Loss] = []
        self.forwards = 0
        self.averages = [[[p.detach().clone() for p in self.of_net(rank, net)]
                          for net in range(setup.nets)] for rank in range(setup.ranks)]
        self.saved: dict[Any, Any] = {}
        self.open_end = False  # after an error that leaves the state open
        self.expected = Expected()

    def of_net(self, rank: int, net: int, parts: Sequence[str] = PARTS) -> list[Tensor]:
        return [self.parameters[rank][key] for key in keys_of(f"{net}.{part}" for part in parts)]

    def do(self, op: Op) -> Expected:
        """Raises: Unspecified."""
        if self.open_end:
            raise Unspecified
        ranks = range(self.setup.ranks)
        self.expected = Expected(seen=[[] for _ in ranks], values=[[] for _ in ranks])
        errors = getattr(self, op.name)(**op.arguments)
        self.expected.errors = frozenset(errors or ())
        self.expected.known = [key for key in self.parameters[0] if self._is_known(key)]
        self.expected.state = [snapshot(p, self.expected.known) for p in self.parameters]
        return self.expected

    def _is_known(self, key: str) -> bool:
        book = self.book_of.get(key)
        return book is None or not (book.poisoned or book.tainted or book.waiting
                                    or self.open_end)

    # ------------------------------------------------------------------ forward

    def forward(self, net: int, part: str = "all", then: int | None = None,
                fails: str | None = None, weigh: bool = False) -> set[str] | None:
        n, self.forwards = self.forwards, self.forwards + 1
        kept = Loss([])
        called = [(net, part)] + ([(then, "all")] if then is not None else [])
        if any(self.book_of[key].poisoned for each in called for key in self._keys(*each)
               if key in self.book_of):
            raise Unspecified
        failed = False
        for rank in range(self.setup.ranks):
            x, y = batch(n, rank)
            x = x[fails is not None:]
            for each in called:
                h = self._call(rank, *each, x, kept, fails)
                if h is None:
                    failed = True
                    break
                x = h
            if failed:
                continue
            losses = squares(x, y)
            kept.tensors.append(self._weigh(losses, rank, kept) if weigh else losses.mean())
            self.expected.values[rank].append(flat([kept.tensors[rank]]))
        if failed:
            return {"failed"}
        for book in self.books:
            if any(key in book.keys and (self.training[each] or self.training[
                    each[0], key.split(".")[1]]) for each in called for key in self._keys(*each)):
                book.called = True
        self.losses.append(kept)
        return None

    def _keys(self, net: int, part: str) -> list[str]:
        return keys_of(f"{net}.{each}" for each in PARTS if part in (each, "all"))

    def _call(self, rank: int, net: int, part: str, x: Tensor, kept: Loss, fails: str | None
              ) -> Tensor | None:
        """The outermost call of a network or of one of its parts; None: it fails.

        In a network that does not train a part may.
        """
        weights = {key: self.parameters[rank][key] for key in self._keys(net, part)}
        for each in [part] if part != "all" or self.training[net, part] else PARTS:
            for key in self._keys(net, each) if self.training[net, each] else []:
                p = weights[key]
                book = self.book_of.get(key)
                delta = self._deltas(book, rank, self._worker(book)) if book is not None else {}
                if book is not None and p.requires_grad and key in delta:
                    weights[key] = p + delta[key]
                    kept.seen_as[key] = self._worker(book)
        return self._compute(rank, net, part, x, weights, fails)

    def _compute(self, rank: int, net: int, part: str, x: Tensor, weights: dict[str, Tensor],
                 fails: str | None = None) -> Tensor | None:
        for each in PARTS if part == "all" else [part]:
            weight, bias = (weights[key] for key in keys_of([f"{net}.{each}"]))
            self.expected.seen[rank].append(flat([weight, bias]))
            self.expected.displaced += weight is not self.parameters[rank][f"{net}.{each}.weight"]
            if fails == each:
                return None
            x = F.linear(x, weight, bias)
            if part == "all" and each == "first":
                x = torch.tanh(x)
        return x

    def _worker(self, book: Book) -> int:
        return 0 if book.done >= self.total else book.done // self.setup.k

    def _deltas(self, book: Book, rank: int, v: int) -> dict[str, Tensor]:
        """delta of this step and worker, by parameter."""
        if not book.noise.displaces or len(book.history) < max(1, book.noise.lag):
            return {}
        if (rank, v) not in book.deltas:
            seen = book.history[0]
            deltas = self._by_key(self._delta(book, seen, rank, v), seen.keys)
            if book.noise.scale != "lr" or book.noise.kind == "isotropic":  # 0: no displacement
                deltas = {key: delta for key, delta in deltas.items() if delta.any()
                          or book.noise.scale != "relative" and seen.deviations_WP.any()}
            book.deltas[rank, v] = deltas
        return book.deltas[rank, v]

    def _by_key(self, vector_P: Array, keys: Sequence[str]) -> dict[str, Tensor]:
        vector, start, result = torch.from_numpy(vector_P), 0, {}
        for key in keys:
            shape = self.parameters[0][key].shape
            result[key] = vector[start:start + shape.numel()].view(shape).clone()
            start += shape.numel()
        return result

    def _slices(self, keys: Sequence[str]) -> dict[str, slice]:
        result, start = {}, 0
        for key in keys:
            result[key] = slice(start, start + self.parameters[0][key].numel())
            start = result[key].stop
        return result

    def _normals(self, keys: Sequence[str], seed: int, *purpose: int | str) -> Array:
        """(P,): drawn for the one bucket, which holds the parameters in reverse."""
        where = self._slices(keys)
        drawn = streams.normal(sum(self.parameters[0][key].numel() for key in keys), seed,
                               *purpose, 0, dtype=torch.float64).numpy()
        result, start = np.zeros(len(drawn)), 0
        for key in reversed(keys):
            size = where[key].stop - where[key].start
            result[where[key]] = drawn[start:start + size]
            start += size
        return result

    def _delta(self, book: Book, seen: Observation, rank: int, v: int) -> Array:
        """(P,) by the formulas of METHODS section 2."""
        noise, W, worker = book.noise, self.setup.W, rank * self.setup.V + v
        size, result = noise.at(book.steps), np.zeros(seen.deviations_WP.shape[1])
        if noise.kind == "gathered":
            normals_WN = np.stack([streams.normal(W, noise.seed, "gnc-mix", seen.step, i,
                                                  dtype=torch.float64) for i in range(W)])
        elif noise.kind == "isotropic":
            normals_WN = np.stack([self._normals(seen.keys, noise.seed, "gnc-isotropic",
                                                 book.steps, i) for i in range(W)])
        where = self._slices(seen.keys)
        parts = list(where.values()) if noise.scale == "relative" else [slice(0, len(result))]
        for n, part in enumerate(parts):
            deviations_WP = seen.deviations_WP[:, part]
            if not deviations_WP.any():
                continue
            if noise.kind == "own":
                unit_WP = reference.gnc_own(deviations_WP, 1.0)
                s = reference.radius_scale(unit_WP, size) if noise.scale != "lr" else size
            elif noise.kind == "gathered":
                unit_WP = reference.gnc_gathered(deviations_WP, normals_WN, 1.0)
            else:
                unit_WP = reference.gnc_isotropic(deviations_WP, normals_WN[:, part], 1.0)
            if noise.kind != "own":
                s = reference.expected_radius_scale(deviations_WP, size) \
                    if noise.scale != "lr" else size
            if noise.scale == "relative":
                s *= float(torch.linalg.norm(self.parameters[rank][seen.keys[n]].detach()))
            result[part] = s * unit_WP[worker]
        if noise.scale == "lr":
            for key, part in where.items():
                result[part] *= RATES[key.rpartition(".")[2]]
        return result

    def _weigh(self, losses: Tensor, rank: int, kept: Loss) -> Tensor:
        book, setup = self.books[0], self.setup
        if book.noise.kind != "examples":
            return losses.mean()
        v, part = divmod(book.done % self.total, setup.k)
        kept.weighed, book.weighed = (book.steps, book.done % self.total), True
        B, M = setup.W * setup.k * EXAMPLES, book.noise.emulated
        xi = streams.normal(EXAMPLES, book.noise.seed, "full-examples", book.steps,
                            rank * setup.V + v, part, dtype=torch.float64)
        return ((1 + math.sqrt((B - M) / M) * xi) * losses).mean()

    # ------------------------------------------------------------------ backward

    def backward(self, loss: int, retain: bool = False, inputs: tuple[str, ...] | None = None,
                 hold: tuple[int, ...] = ()) -> set[str] | None:
        kept = self.losses[loss]
        self.reached.clear()
        wrong = False
        for rank, tensor in enumerate(kept.tensors):
            wanted = None if inputs is None else [self.parameters[rank][key] for key in inputs]
            try:
                tensor.backward(retain_graph=retain, inputs=wanted)
            except RuntimeError as error:
                assert kind_of(error) == "torch", error
                wrong = True
        if wrong:
            self.open_end = bool(self.reached)  # in the middle of a graph
            return {"torch"}
        kept.spent |= not retain
        reached = [book for book in self.books if self.reached & set(book.keys)]
        errors: set[str] = set()
        for book in reached:
            errors |= self._count(book, kept, held=book.number in hold)
        self.open_end |= bool(errors) and len(reached) > 1
        return errors

    def _count(self, book: Book, kept: Loss, held: bool) -> set[str]:
        """A backward pass has reached an optimizer; kinds of errors."""
        if book.poisoned or book.tainted:
            raise Unspecified
        mine = self.reached & set(book.keys)
        if any(not self.parameters[0][key].requires_grad for key in mine):
            raise Unspecified  # an error says so, but in what follows from it
        before = dict(book.kinds)
        for key in mine:
            book.kinds[key] = {"none": "fresh", "result": "mixed", "zeroed": "unclear"}.get(
                before[key], before[key])
        if held:
            if book.waiting:
                raise Unspecified
            book.end_pass(counts=False)
            return self._check_worker(book, kept, mine)
        errors = self._check_pass(book, kept, mine, before)
        if errors:
            return errors
        if book.done == 0:
            book.trained = [key for key in book.keys if self.parameters[0][key].requires_grad]
        book.done += 1
        book.end_pass(counts=True)
        if book.done % self.setup.k == 0:
            self._end_worker(book)
        return set()

    def _check_pass(self, book: Book, kept: Loss, mine: set[str], before: dict[str, str]
                    ) -> set[str]:
        if book.complete:
            cleared = {before[key] in ("none", "fresh", "zeroed") for key in book.trained}
            if cleared == {False} and "unclear" not in before.values():
                if book.nonzero < 2:  # the library may take it for cleared: nobody told it
                    raise Unspecified
                book.tainted = True
                self.open_end |= book.waiting  # what is on its way was written to
                return {"second"}
            if cleared != {True} or (book.waiting and "zeroed" in before.values()):
                raise Unspecified
            book.begin()
        if self._check_worker(book, kept, mine):
            return {"worker"}
        if book.noise.kind == "examples":
            if kept.weighed is None and not book.weighed:
                book.poisoned = True
                return {"weigh"}
            if kept.weighed != (book.steps, book.done) or not book.weighed:
                raise Unspecified
            book.weighed = False
        return set()

    def _check_worker(self, book: Book, kept: Loss, mine: set[str]) -> set[str]:
        worker = self._worker(book)
        book.poisoned = any(kept.seen_as.get(key, worker) != worker for key in mine)
        return {"worker"} if book.poisoned else set()

    def _end_worker(self, book: Book) -> None:
        """Take every p.grad as the worker's gradient; after the last worker, exchange."""
        rows = []
        for p in self.parameters:
            grads = {key: p[key].grad for key in book.trained}
            rows.append({key: np.zeros(p[key].numel()) if grad is None else flat([grad])
                         for key, grad in grads.items()})
            for key in book.trained:
                p[key].grad = None
        book.rows += rows
        book.by_worker.append(book.examples if book.noise.counts else EXAMPLES * self.setup.k)
        book.examples = 0
        book.kinds.update(dict.fromkeys(book.trained, "none"))
        if len(book.rows) == self.setup.W:
            self._exchange(book)

    def _exchange(self, book: Book) -> None:
        if not book.trained:
            raise Unspecified
        setup, noise = self.setup, book.noise
        order = [v * setup.ranks + rank for rank in range(setup.ranks) for v in range(setup.V)]
        gradients_WP = np.stack([np.concatenate([book.rows[n][key] for key in book.trained])
                                 for n in order])
        deviations_WP = reference.deviations(gradients_WP)
        mean_P = gradients_WP.mean(axis=0)
        if noise.kind in ("workers", "white") and not all(book.by_worker):
            raise Unspecified
        b = sum(book.by_worker) / setup.V
        if noise.kind == "workers":
            epsilon_W = streams.normal(setup.W, noise.seed, "full-workers", book.steps,
                                       dtype=torch.float64)
            weights_W = [reference.worker_weights(epsilon_W, book.by_worker[i % setup.V],
                                                  noise.emulated)[i] for i in range(setup.W)]
            mean_P = (np.array(weights_W)[:, None] * gradients_WP).mean(axis=0)
        if noise.kind == "white":
            mean_P = mean_P + reference.shared_normal_noise(
                "isotropic", b * reference.worker_covariance(gradients_WP, 1),
                self._normals(book.trained, noise.seed, "isotropic", book.steps),
                round(setup.W * b), noise.emulated)
        if noise.displaces:
            parts = self._slices(book.trained).values() if noise.scale == "relative" else \
                [slice(0, len(mean_P))]
            for part in parts:
                size = np.abs(gradients_WP[:, part]).max()
                if size and np.abs(deviations_WP[:, part]).max() < TINY * size:
                    raise Unspecified
        for p in self.parameters:
            for key, value in self._by_key(mean_P, book.trained).items():
                p[key].grad = value
        book.kinds.update(dict.fromkeys(book.trained, "result"))
        book.observed = Observation(book.steps, book.trained, deviations_WP)
        book.nonzero = sum(bool(mean_P[where].any())
                           for where in self._slices(book.trained).values())
        book.done, book.complete, book.waiting = self.total, True, setup.several

    def look(self, loss: int) -> set[str] | None:
        for rank, tensor in enumerate(self.losses[loss].tensors):
            try:
                gradients = torch.autograd.grad(tensor, list(self.parameters[rank].values()),
                                                retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                assert kind_of(error) == "torch", error
                return {"torch"}
            self.expected.values[rank].append(flat([g for g in gradients if g is not None]))
        return None

    def evaluate(self, net: int, how: str) -> None:
        with torch.no_grad():
            for rank, p in enumerate(self.parameters):
                output = self._compute(rank, net, "all", batch(0, rank)[0], p)
                assert output is not None
                self.expected.values[rank].append(flat([output]))

    # ------------------------------------------------------------------ steps

    def _clear(self, keys: Iterable[str], to_none: bool) -> None:
        for key in keys:
            kinds = self.book_of[key].kinds if key in self.book_of else {}
            for p in self.parameters:
                if to_none:
                    p[key].grad = None
                elif p[key].grad is not None:
                    p[key].grad = torch.zeros_like(p[key])
            if to_none:
                kinds[key] = "none"
            elif kinds.get(key, "none") != "none":
                kinds[key] = {"result": "zeroed", "zeroed": "zeroed"}.get(kinds[key], "unclear")

    def zero_grad(self, optimizer: int, to_none: bool | None) -> set[str] | None:
        book = self.books[optimizer]
        if book.poisoned:
            raise Unspecified
        if 0 < book.done < self.total:
            return {"between"}
        book.begin()
        book.tainted = False
        self._clear(book.keys, to_none is not False)
        return None

    def net_zero_grad(self, net: int, to_none: bool) -> None:
        keys = self._keys(net, "all")
        for book in self.books:
            mine = set(keys) & set(book.keys)
            if mine and (book.poisoned or book.tainted or (book.waiting and not to_none)):
                raise Unspecified
        self._clear(keys, to_none)

    def reset(self, optimizer: int) -> None:
        book = self.books[optimizer]
        if book.waiting or (book.poisoned and self.setup.several):
            raise Unspecified
        book.begin()
        book.poisoned = book.tainted = False
        self._clear(book.keys, True)

    def synchronize(self, optimizer: int) -> set[str] | None:
        return self._complete(self.books[optimizer], or_zeros=True)

    def _complete(self, book: Book, or_zeros: bool) -> set[str] | None:
        """Exchange what is there, unless the exchange ran."""
        if book.poisoned or book.tainted:
            raise Unspecified
        if book.complete:
            if book.waiting and set(book.kinds[key] for key in book.trained) != {"result"}:
                raise Unspecified
            book.waiting = False
            return None
        if book.noise.kind == "examples" and book.done == 0:
            raise Unspecified
        if book.done == 0:
            book.trained = [key for key in book.keys if self.parameters[0][key].requires_grad]
            kinds = {book.kinds[key] for key in book.trained}
            frozen = {book.kinds[key] for key in book.keys if key not in book.trained}
            if not book.trained:
                raise Unspecified
            if or_zeros or not self.setup.several:  # else what there is travels, new or old
                fresh = "fresh" in kinds
                if "unclear" in kinds | frozen or "fresh" in frozen - kinds or (
                        "mixed" in kinds | frozen and not fresh):
                    raise Unspecified
                if not fresh and not or_zeros:
                    return {"nothing", "missing"} if self.setup.V > 1 else {"nothing"}
                if not fresh:
                    if frozen - {"none"}:
                        raise Unspecified
                    self._clear(book.trained, True)
        if book.done < self.total - self.setup.k or (book.done <= self.total - self.setup.k
                                                     and self.setup.V > 1):
            if book.done or any(book.kinds[key] != "none" for key in book.keys):
                return {"missing"}
            for _ in range(self.setup.V - 1):  # nothing to give, of any worker
                book.done += self.setup.k
                book.end_pass(counts=True, repeated=False)
                self._end_worker(book)
        book.end_pass(counts=True, repeated=False)
        self._end_worker(book)
        book.waiting = False
        return None

    def step(self, optimizer: int) -> set[str] | None:
        book = self.books[optimizer]
        if book.noise.lag == 0:
            return {"closure"}
        errors = self._complete(book, or_zeros=False)
        if not errors:
            self._update(book)
        return errors

    def _update(self, book: Book) -> None:
        for inner in book.inner:
            inner.step()
        if book.observed is not None and book.noise.lag:
            book.history.append(book.observed)
        book.steps += 1
        book.begin()
        book.before = 0
        book.deltas.clear()

    def step_closure(self, optimizer: int, body: tuple[Op, ...]) -> set[str] | None:
        book = self.books[optimizer]
        if book.poisoned or book.tainted:
            raise Unspecified
        twice = book.noise.lag == 0
        for _ in range(1 + twice):
            for op in body:
                errors = getattr(self, op.name)(**op.arguments)
                if errors:
                    self.open_end = True
                    return errors
            errors = self._complete(book, or_zeros=False)
            if errors:
                self.open_end = True
                return errors
            if twice:
                book.history.append(book.observed)  # type: ignore[arg-type]
                book.deltas.clear()
        self._update(book)
        if twice:
            book.history.clear()
        return None

    # ------------------------------------------------------------------ the rest

    def mode(self, net: int, part: str, train: bool) -> None:
        for each in ("all", *PARTS) if part == "all" else [part]:
            self.training[net, each] = train

    def require(self, net: int, part: str, on: bool) -> None:
        for key in self._keys(net, part):
            book = self.book_of.get(key)
            if book is not None and (0 < book.done < self.total or book.poisoned or book.tainted):
                raise Unspecified
            for p in self.parameters:
                p[key].requires_grad_(on)

    def edit(self, net: int, part: str, how: str) -> None:
        for rank in range(self.setup.ranks):
            edit(self.of_net(rank, net, [part]), how)

    def average(self, net: int) -> None:
        for rank in range(self.setup.ranks):
            averages = self.averages[rank][net]
            with torch.no_grad():
                for average, p in zip(averages, self.of_net(rank, net)):
                    average.mul_(0.9).add_(p, alpha=0.1)
            self.expected.values[rank].append(flat(averages))

    def save_net(self, net: int) -> None:
        self.saved["net", net] = [[p.detach().clone() for p in self.of_net(rank, net)]
                                  for rank in range(self.setup.ranks)]
        for rank, tensors in enumerate(self.saved["net", net]):
            self.expected.values[rank].append(flat(tensors))

    def load_net(self, net: int) -> None:
        with torch.no_grad():
            for rank, tensors in enumerate(self.saved["net", net]):
                for p, value in zip(self.of_net(rank, net), tensors):
                    p.copy_(value)

    def save_optimizer(self, optimizer: int) -> None:
        book = self.books[optimizer]
        if book.poisoned or book.tainted:
            raise Unspecified
        self.saved["optimizer", optimizer] = book.saved()

    def load_optimizer(self, optimizer: int) -> None:
        book = self.books[optimizer]
        steps, history, inner = self.saved["optimizer", optimizer]
        trained = [key for key in book.keys if self.parameters[0][key].requires_grad]
        if book.poisoned or book.tainted or book.waiting or 0 < book.done < self.total or any(
                seen.keys != trained for seen in history):
            raise Unspecified
        book.begin()
        book.deltas.clear()
        book.steps = steps
        book.history.clear()
        book.history.extend(history)
        for optimizer_of_rank, state in zip(book.inner, inner):
            optimizer_of_rank.load_state_dict(copy.deepcopy(state))


def expect(model: Model, ops: Iterable[Op]) -> Program:
    """The program of these operations, up to where the semantics leave its course open."""
    program = Program(model.setup)
    try:
        for op in ops:
            program.expected.append(model.do(op))
            program.ops.append(op)
    except Unspecified:
        pass
    return program


# ---------------------------------------------------------------------- how programs are drawn

Draw = Callable[[st.SearchStrategy[Any]], Any]
_strategies: dict[Any, st.SearchStrategy[Any]] = {}


def one(draw: Draw, items: Sequence[Any]) -> Any:
    """One of the items, the first for a shrunk program."""
    key = tuple((type(item), item) for item in items)  # True equals 1
    if key not in _strategies:
        _strategies[key] = st.sampled_from(tuple(items))
    return draw(_strategies[key])


def rarely(draw: Draw, times: int = 8) -> bool:
    """True once in so many times."""
    return bool(one(draw, (False,) * (times - 1) + (True,)))


@dataclass(frozen=True)
class Family:
    """Of which programs a test is made."""

    kinds: tuple[str, ...] = ("none",)
    scales: tuple[str, ...] = ("radius", "lr")
    lags: tuple[int, ...] = (1,)
    several: bool = False
    left_out: tuple[str, ...] = ()
    displaced: float = 0.0  # at least this share of programs has displaced forwards


ONE = (("0.first", "0.last"),), (("0.first", "0.last", "1.first", "1.last"),), (("0.first",),)
SEVERAL = ((("0.first", "0.last"), ("1.first", "1.last")), (("0.first",), ("0.last",)),
           (("0.first", "1.last"), ("1.first", "0.last")),
           (("0.first", "0.last"), ("1.first", "1.last"), ("2.first", "2.last")))
MOST = 20  # operations; more for noises that take longer to be seen
MENU = {"whole_step": 8, "forward": 10, "backward": 14, "zero_grad": 5, "step": 6,
        "net_zero_grad": 3, "evaluate": 3, "mode": 3, "require": 3, "edit": 4, "average": 2,
        "save_net": 2, "load_net": 4, "save_optimizer": 2, "load_optimizer": 6, "synchronize": 2,
        "reset": 2, "failing": 2, "look": 5, "step_closure": 4}


def draw_setup(draw: Draw, family: Family) -> Setup:
    ranks, V = one(draw, ((1, 2), (2, 1), (1, 2), (2, 1), (2, 2)))
    k = one(draw, (1, 1, 1, 2))
    parts = one(draw, SEVERAL if family.several else ONE)
    noises = []
    for _ in parts:
        kind = one(draw, family.kinds)
        noises.append(NoiseSpec(
            kind, scale=one(draw, family.scales), lag=one(draw, family.lags),
            size=one(draw, (0.3, 1.0)), grows=one(draw, (False, False, True)),
            emulated=one(draw, (2, 1)), counts=one(draw, (True, False))))
    exchange = one(draw, ("auto", "allgather", "gather-only", "transpose")) if ranks > 1 and \
        "gathered" in family.kinds else "auto"
    return Setup(ranks, V, k, parts, tuple(noises), momentum=one(draw, (0.0, 0.9)),
                 exchange=exchange)


class Author:
    """Draws one program, and asks the model what makes sense next."""

    def __init__(self, draw: Draw, family: Family) -> None:
        self.draw, self.family = draw, family
        self.setup = draw_setup(draw, family)
        self.model = Model(self.setup)
        menu = {name: weight for name, weight in MENU.items() if name not in family.left_out}
        self.menu = tuple(name for name, weight in menu.items() for _ in range(weight))

    def write(self) -> Program:
        most = MOST + 6 * (max(self.family.lags) - 1)
        return expect(self.model, islice(self.ops(most), most))

    def ops(self, most: int) -> Iterator[Op]:
        optimizer = self.optimizer()
        for _ in range(one(self.draw, (0, 1, 2, 3))):
            yield from self.whole_step(optimizer)
        for _ in range(one(self.draw, range(1, most))):
            hurt = [book.number for book in self.model.books if book.poisoned or book.tainted]
            if hurt and not rarely(self.draw):
                yield Op("reset", {"optimizer": hurt[0]})
                continue
            yield from getattr(self, one(self.draw, self.menu))()

    def optimizer(self) -> int:
        return int(one(self.draw, range(len(self.setup.parts))))

    def net(self) -> int:
        return int(one(self.draw, range(self.setup.nets)))

    def book(self, optimizer: int) -> Book:
        return self.model.books[optimizer]

    # ------------------------------------------------------------------ the operations

    def whole_step(self, optimizer: int | None = None) -> Iterator[Op]:
        optimizer = self.optimizer() if optimizer is None else optimizer
        book = self.book(optimizer)
        if book.noise.lag == 0:
            yield from self.step_closure(optimizer)
            return
        if book.done and not book.complete:
            yield Op("reset", {"optimizer": optimizer})
        elif not rarely(self.draw, 4):
            yield Op("zero_grad", {"optimizer": optimizer, "to_none": None})
        for _ in range(self.model.total):
            yield self.forward_op(int(one(self.draw, self.setup.parts[optimizer])[0]))
            yield Op("backward", {"loss": len(self.model.losses) - 1})
        yield Op("step", {"optimizer": optimizer})

    def step_closure(self, optimizer: int | None = None) -> Iterator[Op]:
        optimizer = self.optimizer() if optimizer is None else optimizer
        if self.book(optimizer).done not in (0, self.model.total):
            yield Op("reset", {"optimizer": optimizer})
        body = [Op("zero_grad", {"optimizer": optimizer,
                                 "to_none": one(self.draw, (None, False, True))})]
        for _ in range(self.model.total - rarely(self.draw, 16)):
            body += [self.forward_op(int(one(self.draw, self.setup.parts[optimizer])[0])),
                     Op("backward", {"loss": -1})]
            if rarely(self.draw):
                body.append(Op("average", {"net": self.net()}))
            if rarely(self.draw) and "edit" in self.menu:
                body.append(next(self.edit()))
        yield Op("step_closure", {"optimizer": optimizer, "body": tuple(body)})

    def forward_op(self, net: int) -> Op:
        arguments: dict[str, Any] = {"net": net}
        part = one(self.draw, ("all",) * 6 + PARTS)
        if part != "all":
            arguments["part"] = part
        if rarely(self.draw, 6):
            arguments["then"] = self.net()
        if self.setup.noises[0].kind == "examples" and not rarely(self.draw, 20):
            arguments["weigh"] = True
        return Op("forward", arguments)

    def forward(self) -> Iterator[Op]:
        yield self.forward_op(self.net())

    def failing(self) -> Iterator[Op]:
        op = self.forward_op(self.net())
        op.arguments.pop("weigh", None)
        yield Op("forward", {**op.arguments, "part": "all", "fails": one(self.draw, PARTS)})

    def backward(self) -> Iterator[Op]:
        losses = self.model.losses
        for book in self.model.books:
            if "result" in book.kinds.values() and book.complete and not rarely(self.draw):
                if book.noise.lag and one(self.draw, (True, False)):
                    yield Op("step", {"optimizer": book.number})
                else:
                    yield Op("zero_grad", {"optimizer": book.number, "to_none": None})
        free = [n for n, loss in enumerate(losses) if not loss.spent]
        if not free or not rarely(self.draw, 3) and len(free) < 3:
            yield from self.forward()
            free.append(len(losses) - 1)
        place = one(self.draw, (-1, -1, 0))
        arguments: dict[str, Any] = {"loss": free[place]}
        if rarely(self.draw, 16):
            arguments["loss"] = one(self.draw, range(len(losses)))
        if rarely(self.draw, 6):
            arguments["retain"] = True
        if rarely(self.draw, 6):
            arguments["inputs"] = self.inputs()
        if rarely(self.draw, 6):
            arguments["hold"] = tuple(range(len(self.setup.parts))) \
                if one(self.draw, (True, False)) else (self.optimizer(),)
        yield Op("backward", arguments)
        if arguments.get("retain") and rarely(self.draw, 2):
            yield Op("backward", {"loss": arguments["loss"]})

    def inputs(self) -> tuple[str, ...]:
        keys = [key for key, p in self.model.parameters[0].items() if p.requires_grad]
        if not keys or rarely(self.draw, 3):
            return tuple(keys)
        start = one(self.draw, range(len(keys)))
        return tuple(keys[start:start + one(self.draw, (1, 2, 4))])

    def zero_grad(self) -> Iterator[Op]:
        optimizer = self.optimizer()
        if 0 < self.book(optimizer).done < self.model.total and not rarely(self.draw):
            yield from self.backward()
            return
        yield Op("zero_grad", {"optimizer": optimizer,
                               "to_none": one(self.draw, (None, False, True))})

    def net_zero_grad(self) -> Iterator[Op]:
        yield Op("net_zero_grad", {"net": self.net(), "to_none": one(self.draw, (True, False))})

    def step(self) -> Iterator[Op]:
        optimizer = self.optimizer()
        book = self.book(optimizer)
        if book.noise.lag == 0 and not rarely(self.draw, 4):
            yield from self.step_closure(optimizer)
            return
        if book.noise.lag and not book.complete and not self.setup.several \
                and not rarely(self.draw):
            yield from self.backward()
            return
        yield Op("step", {"optimizer": optimizer})

    def synchronize(self) -> Iterator[Op]:
        yield Op("synchronize", {"optimizer": self.optimizer()})

    def reset(self) -> Iterator[Op]:
        yield Op("reset", {"optimizer": self.optimizer()})

    def look(self) -> Iterator[Op]:
        free = [n for n, loss in enumerate(self.model.losses) if not loss.spent]
        if free:
            yield Op("look", {"loss": free[-1]})

    def evaluate(self) -> Iterator[Op]:
        yield Op("evaluate", {"net": self.net(),
                              "how": one(self.draw, ("eval", "no_grad", "inference"))})

    def mode(self) -> Iterator[Op]:
        net, part = self.net(), one(self.draw, ("all", "all", *PARTS))
        yield Op("mode", {"net": net, "part": part,
                          "train": not self.model.training[net, part]})

    def require(self) -> Iterator[Op]:
        net, part = self.net(), one(self.draw, PARTS)
        on = not self.model.parameters[0][f"{net}.{part}.weight"].requires_grad
        mine = [self.model.book_of.get(key) for key in keys_of([f"{net}.{part}"])]
        if not any(book is not None and 0 < book.done < self.model.total for book in mine):
            yield Op("require", {"net": net, "part": part, "on": on})

    def edit(self) -> Iterator[Op]:
        yield Op("edit", {"net": self.net(), "part": one(self.draw, PARTS),
                          "how": one(self.draw, ("add", "mul", "clamp", "flip"))})

    def average(self) -> Iterator[Op]:
        yield Op("average", {"net": self.net()})

    def save_net(self) -> Iterator[Op]:
        yield Op("save_net", {"net": self.net()})

    def load_net(self) -> Iterator[Op]:
        nets = [number for what, number in self.model.saved if what == "net"]
        if not nets:
            yield from self.save_net()
            yield from self.edit() if rarely(self.draw, 3) else self.step()
            nets = [number for what, number in self.model.saved if what == "net"]
        yield Op("load_net", {"net": one(self.draw, nets)})

    def save_optimizer(self) -> Iterator[Op]:
        yield Op("save_optimizer", {"optimizer": self.optimizer()})

    def load_optimizer(self) -> Iterator[Op]:
        saved = [number for what, number in self.model.saved if what == "optimizer"]
        optimizer = one(self.draw, saved or range(len(self.setup.parts)))
        if not saved:
            yield Op("save_optimizer", {"optimizer": optimizer})
            if rarely(self.draw, 2):
                yield from self.whole_step(optimizer)
        if self.book(optimizer).done in (0, self.model.total):
            yield Op("load_optimizer", {"optimizer": optimizer})


@st.composite
def programs(draw: Draw, family: Family) -> Program:
    """Programs of a family, with what the model expects."""
    return Author(draw, family).write()


def census(program: Program) -> Counter[str]:
    """What there is in a program: operations, errors, displaced forwards."""
    found: Counter[str] = Counter(op.name for op in program.ops)
    found.update(f"error {kind}" for each in program.expected for kind in each.errors)
    found["programs"] = 1
    found["displaced calls"] += sum(each.displaced for each in program.expected)
    found["displaced programs"] = int(found["displaced calls"] > 0)
    for op in program.ops:
        found.update(f"{op.name}({name}=...)" for name in op.arguments
                     if name in ("part", "then", "fails", "retain", "inputs", "hold"))
    return found
