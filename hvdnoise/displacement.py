"""A training forward sees p + delta; the parameter p itself never moves.

The displaced weight is the ordinary autograd expression ``p + delta``, whose gradient is p's. A
module sees it where it reads its weight by name (``self.weight``) during a call that trains:

- The call decides: in training mode, with gradients enabled. Everything inside it, in its thread,
  sees p + delta; every other call sees p. Inside a backward pass, where activation checkpoints
  compute a forward again, reading gives what the forwards of the pass saw.
- Everything else sees p, at every moment and in every thread: ``parameters()``, ``state_dict()``,
  ``p.grad``, ``p.data``, copies, pickles.

Autograd holds the displaced tensors, so nothing depends on when backward comes, or how often.

Two things are put on a module for it. Its ``_parameters`` become a dict that knows the thread's
calls (`Parameters`). Its calls go through a `Call`, which stands in ``_compiled_call_impl``: where
``module.compile()`` puts its function, and what torch asks first. A ``finally`` there ends the call
whatever ends it, and copies and pickles of the module leave it out.

Which modules, and what delta, an optimizer's `hvdnoise.watch.ModelWatch` says.

Memory: one tensor for each parameter, from the forward until autograd needs it no more.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from contextlib import contextmanager
from types import FrameType
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Protocol, Sequence

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback


class Term(NamedTuple):
    """A parameter's delta: ``factor * unit``; ``worker`` counts this rank's."""

    unit: Tensor
    factor: float
    worker: int


class Watch(Protocol):
    """An optimizer's side: see `hvdnoise.watch.ModelWatch`."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
              ) -> Displaced | None:
        """A module is called, in no call that trains; what it sees, if this call trains."""

    def displaced(self, p: Tensor, term: Term) -> Tensor:
        """p + delta; p itself where it is frozen."""

    def ended(self, call: Displaced) -> None:
        """A call that trains has come to its end, and not to an exception."""

    def recomputed(self, p: Tensor) -> Term | None:
        """The delta that the forwards of the pass under way saw."""

    def name(self, p: Tensor) -> str:
        """The parameter's name."""


current_graph_task_id = torch._C._current_graph_task_id  # -1 outside of backward passes


class _Thread(threading.local):
    """The calls under way in this thread."""

    displaced: tuple[Displaced, ...] = ()  # those that train, one for each optimizer
    depth = 0  # of `Call`s
    inside = False  # a call of a watched module is under way; what is compiled asks
    unseen = False  # calls are none of the training's


thread = _Thread()


@contextmanager
def unseen() -> Iterator[None]:
    """The calls inside are none of the training's: nothing is displaced or counted."""
    before, thread.unseen = thread.unseen, True
    try:
        yield
    finally:
        thread.unseen = before


def lasting() -> tuple[Displaced, ...]:
    if not thread.displaced:
        return ()
    return tuple(each for each in thread.displaced if each.lasts())


class Parameters(dict[str, Any]):
    """A module's ``_parameters``: read by name, what the thread's call sees; else as they are.

    A parameter is told by its id: torch.compile, which follows this code, compares numbers when it
    uses a compiled function for another module again, and would take any tensor of the same shape.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__(parameters)
        self.ids = {name: id(p) for name, p in parameters.items()}

    def __getitem__(self, name: str) -> Any:
        p = dict.__getitem__(self, name)
        which = self.ids.get(name)
        for displaced in thread.displaced:
            if which in displaced.terms and displaced.lasts():
                return displaced[which]
        if thread.depth or torch.compiler.is_compiling():
            return p
        if current_graph_task_id() != -1 and torch.is_grad_enabled():
            return _seen_in_forward(p)
        return p

    def __setitem__(self, name: str, value: Any) -> None:
        """A displaced weight that is put back stands for its parameter (``functional_call``)."""
        value = getattr(value, "_hvdnoise_parameter", value)
        self.ids[name] = id(value)
        dict.__setitem__(self, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        from copy import deepcopy
        memo[id(self)] = copied = {}
        copied.update({name: deepcopy(p, memo) for name, p in self.items()})
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class Displaced(dict[Any, Tensor]):
    """What one call sees of one optimizer's parameters, by their ids; made when first asked for."""

    def __init__(self, watch: Watch, terms: Mapping[Tensor, Term], size: int,
                 frame: FrameType | None = None) -> None:
        super().__init__()
        self.watch, self.size, self._frame = watch, size, frame
        self.terms = {id(p): (p, term) for p, term in terms.items()}

    def make(self, module: nn.Module, *, below: bool) -> None:
        """Displace the weights that a module is about to read, of a compiled one all below too.

        Not before: autograd goes back in the order in which things were made, and a gradient has
        to come, and leave for the other ranks, as soon as its module's backward is done.
        """
        if self.terms:
            for p in module.parameters() if below else module._parameters.values():
                if id(p) in self.terms:
                    self[id(p)]

    def lasts(self) -> bool:
        """Whether the call is under way, where no `Call` will say that it has ended."""
        if self._frame is None:
            return True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is self._frame

    def __missing__(self, which: int) -> Tensor:
        self[which] = displaced = self.watch.displaced(*self.terms[which])
        return displaced


def _end(calls: Sequence[Displaced]) -> None:
    """Raise where a forward has written into a displaced weight, and so not into p."""
    for call in calls:
        call.watch.ended(call)
        for which, displaced in call.items():
            p, _ = call.terms[which]
            if displaced is not p and displaced._version:
                raise RuntimeError(
                    f"the forward changes the weight {call.watch.name(p)} in place, and with noise "
                    "on the weights the change would be lost: change it outside of the forward "
                    "(nn.Embedding: without max_norm)")


class Call:
    """The call of a module that holds parameters of one or more optimizers."""

    def __init__(self, module: nn.Module) -> None:
        _keep_from_compiler()
        self._lock = threading.RLock() if isinstance(module, nn.RNNBase) else None
        self.module = module  # no weak one: torch.compile would take all modules for the first
        self.compiled = module.__dict__.get("_compiled_call_impl")
        self.watches: weakref.WeakSet[Watch] = weakref.WeakSet()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and thread.inside:
            return self._call(*args, **kwargs)  # what is traced runs inside of a call
        return self._enter(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        call = self.compiled or self.module._call_impl
        if self._lock is None:
            return call(*args, **kwargs)
        with self._lock, _flat_weights(self.module):
            return call(*args, **kwargs)

    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        if current_graph_task_id() != -1:
            return self._call(*args, **kwargs)
        compiling = is_compiling()
        begin, end = (uncompiled(Call._begin), uncompiled(_end)) if compiling else (Call._begin,
                                                                                    _end)
        before, mine = begin(self, args, kwargs, compiling)
        try:
            thread.displaced, thread.inside = (*before, *mine), True
            thread.depth += 1
            result = self._call(*args, **kwargs)
        finally:
            thread.depth -= 1
            thread.displaced, thread.inside = before, thread.depth > 0
        if mine:
            end(mine)
        return result

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], compiling: bool
               ) -> tuple[tuple[Displaced, ...], list[Displaced]]:
        """The calls under way around this one, and this one for those whom it is new."""
        before = lasting()
        if not before and not torch.is_grad_enabled():
            return before, []
        known = [displaced.watch for displaced in before]
        mine = [displaced for watch in self.watches if watch not in known
                and (displaced := watch.enter(self.module, args, kwargs)) is not None]
        compiling |= self.compiled is not None or is_compiled(self.module)
        for displaced in (*before, *mine):
            displaced.make(self.module, below=compiling)
        return before, mine

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


@contextmanager
def _flat_weights(module: Any) -> Iterator[None]:
    """An RNN reads its weights from a list of its own, which other threads share."""
    before = module._flat_weights, module._flat_weight_refs
    weights = [getattr(module, name, None) for name in module._flat_weights_names]
    changed = any(new is not old for new, old in zip(weights, before[0]))
    try:
        if changed:
            module._flat_weights = weights
            module._flat_weight_refs = [w if w is None else weakref.ref(w) for w in weights]
        yield
    finally:
        if changed:
            module._flat_weights, module._flat_weight_refs = before


def is_compiling() -> bool:
    """Whether this runs inside of a function under torch.compile, by which it is not compiled."""
    return get_eval_frame_callback() not in (None, False)


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what ``torch.compile(module)`` returns."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


@functools.cache
def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run as it is also in compiled code."""
    disabled: Callable[..., Any] = torch.compiler.disable(function)
    return disabled


@functools.cache
def _keep_from_compiler() -> None:
    """torch.compile is to run `_enter` as it is, and to go on with the module that it calls."""
    torch.compiler.disable(Call._enter, recursive=False)


def _seen_in_forward(p: Tensor) -> Tensor:
    """What the forwards of the backward pass under way saw of a parameter."""
    for watch in list(watches):
        term = watch.recomputed(p)
        if term is not None:
            return watch.displaced(p, term)
    return p


watches: weakref.WeakSet[Watch] = weakref.WeakSet()  # all
