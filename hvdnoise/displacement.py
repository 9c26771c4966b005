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
calls (`_Parameters`). Its calls go through a `_Call`, which stands in ``_compiled_call_impl``: where
``module.compile()`` puts its function, and what torch asks first. A ``finally`` there ends the call
whatever ends it, and copies and pickles of the module leave it out.

An optimizer is not told its model. So until its first step is taken, a global hook sees every call,
and whoever holds one of its parameters is watched, with the modules below. The calls that are found
so are under way already: they last while their frame does. A parameter that gets a gradient though
no module that holds it was called is seen as it is: a warning names it.

Memory: one tensor for each parameter, from the forward until autograd needs it no more.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
import weakref
from types import FrameType
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.nn.utils.parametrize import ParametrizationList


class Term(NamedTuple):
    """A parameter's delta: ``factor * unit``; ``worker`` counts this rank's."""

    unit: Tensor
    factor: float
    worker: int


_current_graph_task_id = torch._C._current_graph_task_id  # -1 outside of backward passes


class _Thread(threading.local):
    """The calls under way in this thread."""

    displaced: tuple[_Displaced, ...] = ()  # those that train, one for each optimizer
    depth = 0  # of `_Call`s
    inside = False  # a call of a watched module is under way; what is compiled asks


_thread = _Thread()


def _lasting() -> tuple[_Displaced, ...]:
    return tuple(each for each in _thread.displaced if each.lasts())


class _Parameters(dict[str, Any]):
    """A module's ``_parameters``: read by name, what the thread's call sees; else as they are."""

    def __getitem__(self, name: str) -> Any:
        p = dict.__getitem__(self, name)
        for displaced in _thread.displaced:
            if p in displaced.terms and displaced.lasts():
                return displaced[p]
        if _thread.depth or torch.compiler.is_compiling():
            return p
        if _current_graph_task_id() != -1 and torch.is_grad_enabled():
            return _seen_in_forward(p)
        return p

    def __setitem__(self, name: str, value: Any) -> None:
        """A displaced weight that is put back stands for its parameter (``functional_call``)."""
        dict.__setitem__(self, name, getattr(value, "_hvdnoise_parameter", value))

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        from copy import deepcopy
        memo[id(self)] = copied = {}
        copied.update({name: deepcopy(p, memo) for name, p in self.items()})
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class _Displaced(dict[Tensor, Tensor]):
    """What one call sees of one optimizer's parameters; made when first asked for."""

    def __init__(self, watch: ModelWatch, terms: Mapping[Tensor, Term], size: int,
                 frame: FrameType | None = None) -> None:
        super().__init__()
        self.watch, self.terms, self.size, self._frame = watch, terms, size, frame

    def make(self, module: nn.Module, *, below: bool) -> None:
        """Displace the weights that a module is about to read, of a compiled one all below too.

        Not before: autograd goes back in the order in which things were made, and a gradient has
        to come, and leave for the other ranks, as soon as its module's backward is done.
        """
        if self.terms:
            for p in module.parameters() if below else module._parameters.values():
                if p is not None and p in self.terms:
                    self[p]

    def lasts(self) -> bool:
        """Whether the call is under way, where no `_Call` will say that it has ended."""
        frame: FrameType | None = sys._getframe(1) if self._frame is not None else None
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is self._frame

    def __missing__(self, p: Tensor) -> Tensor:
        self[p] = displaced = self.watch.displaced(p, self.terms[p])
        return displaced


def _end(calls: Sequence[_Displaced]) -> None:
    """Raise where a forward has written into a displaced weight, and so not into p."""
    for call in calls:
        call.watch.ended(call)
        for p, displaced in call.items():
            if displaced is not p and displaced._version:
                raise RuntimeError(
                    f"the forward changes the weight {call.watch.name(p)} in place, and with noise "
                    "on the weights the change would be lost: change it outside of the forward "
                    "(nn.Embedding: without max_norm)")


class _Call:
    """The call of a module that holds parameters of one or more optimizers."""

    def __init__(self, module: nn.Module) -> None:
        _keep_from_compiler()
        self.module = module  # no weak one: torch.compile would take all modules for the first
        self.compiled = module.__dict__.get("_compiled_call_impl")
        self.watches: weakref.WeakSet[ModelWatch] = weakref.WeakSet()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and _thread.inside:
            return self._call(*args, **kwargs)  # what is traced runs inside of a call
        return self._enter(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return (self.compiled or self.module._call_impl)(*args, **kwargs)

    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        if _current_graph_task_id() != -1:
            return self._call(*args, **kwargs)
        before, mine = _uncompiled(_Call._begin)(self, args, kwargs, _is_compiling())
        try:
            _thread.displaced, _thread.inside = (*before, *mine), True
            _thread.depth += 1
            result = self._call(*args, **kwargs)
        finally:
            _thread.depth -= 1
            _thread.displaced, _thread.inside = before, _thread.depth > 0
        _uncompiled(_end)(mine)
        return result

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], compiling: bool
               ) -> tuple[tuple[_Displaced, ...], list[_Displaced]]:
        """The calls under way around this one, and this one for those whom it is new."""
        before = _lasting()
        known = {displaced.watch for displaced in before}
        mine = [displaced for watch in self.watches if watch not in known
                and (displaced := watch.enter(self.module, args, kwargs)) is not None]
        compiling |= self.compiled is not None or _is_compiled(self.module)
        for displaced in (*before, *mine):
            displaced.make(self.module, below=compiling)
        return before, mine

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _is_compiling() -> bool:
    """Whether this runs inside of a function under torch.compile, by which it is not compiled."""
    return get_eval_frame_callback() not in (None, False)


def _is_compiled(module: nn.Module) -> bool:
    """Whether it is what ``torch.compile(module)`` returns."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


@functools.cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run as it is also in compiled code."""
    disabled: Callable[..., Any] = torch.compiler.disable(function)
    return disabled


@functools.cache
def _keep_from_compiler() -> None:
    """torch.compile is to run `_enter` as it is, and to go on with the module that it calls."""
    torch.compiler.disable(_Call._enter, recursive=False)


def _seen_in_forward(p: Tensor) -> Tensor:
    """What the forwards of the backward pass under way saw of a parameter."""
    for watch in list(_watches):
        term = watch.recomputed(p)
        if term is not None:
            return watch.displaced(p, term)
    return p


_watches: weakref.WeakSet[ModelWatch] = weakref.WeakSet()


class ModelWatch:
    """The calls of the modules that hold an optimizer's parameters.

    Args:
        terms: asked at the outermost call that trains: the delta of each parameter that is to be
            displaced now.
        names: of the parameters, for messages; parameters may be added.
        displaces: whether there will ever be a delta.
        in_eval: whether calls in evaluation mode, with gradients enabled, train too.
    """

    def __init__(self, terms: Callable[[], Mapping[Tensor, Term]], names: Mapping[Tensor, str], *,
                 displaces: bool = True, in_eval: bool = False) -> None:
        self._terms, self._names = terms, names
        self._displaces, self._in_eval = displaces, in_eval
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._parameters: set[Tensor] = set()
        self._not_found: set[Tensor] = set()  # parameters whose modules have not been called
        self._lost: set[Tensor] = set()  # those of them that have got a gradient
        self._seen: dict[Tensor, Term] = {}  # by the last forward that trained each parameter
        # parameters whose displaced weight has got a gradient in the pass under way
        self._reached: dict[Tensor, tuple[Term, int]] = {}
        self._in_eval_mode: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()
        self._sizes: list[int] = []
        self._last_size = 0
        _watches.add(self)
        weakref.finalize(self, _unhook).atexit = False

    def name(self, p: Tensor) -> str:
        """The parameter's name."""
        return self._names.get(p, f"of shape {tuple(p.shape)}")

    # ------------------------------------------------------------------ finding the modules

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """Watch the modules of these parameters too, and those compiled in place since."""
        new = set(parameters) - self._parameters
        if new:
            self._parameters |= new
            self._not_found |= new
            _search(self)
        for module in self._modules:
            if not isinstance(module.__dict__.get("_compiled_call_impl"), _Call):
                self._wrap(module)

    def found(self, module: nn.Module) -> None:
        """A module is called: watch it and all below, if it holds parameters."""
        if module in self._modules or self._parameters.isdisjoint(module.parameters()):
            return
        holders = [each for each in module.modules() if isinstance(each._parameters, dict)
                   and not self._parameters.isdisjoint(each.parameters())]
        for each in holders:
            if not isinstance(each._parameters, _Parameters):
                each.__dict__["_parameters"] = _Parameters(each._parameters)
            self._not_found -= set(each._parameters.values())
        # A parametrized weight may be read anywhere: its computation is no call of a model.
        inner = {m for each in holders if isinstance(each, ParametrizationList)
                 for m in each.modules()}
        for each in holders:
            if each not in inner:
                self._wrap(each)
        weakref.finalize(self, _release, [weakref.ref(each) for each in holders]).atexit = False
        if module in self._modules and not any(
                displaced.watch is self and displaced.lasts() for displaced in _thread.displaced):
            self._enter_under_way(module)

    def _enter_under_way(self, module: nn.Module) -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename != nn.modules.module.__file__:
            frame = frame.f_back
        assert frame is not None
        call = frame.f_locals  # of torch's own code, which tells a global hook no kwargs
        displaced = self.enter(module, call.get("args", ()), call.get("kwargs", {}), frame)
        if displaced is not None:
            call = module.__dict__["_compiled_call_impl"]
            displaced.make(module, below=_is_compiled(module) or _is_compiling()
                           or call.compiled is not None)
            _thread.displaced += (displaced,)

            def ended(*_: Any) -> None:
                handle.remove()
                if displaced.lasts():  # else it is of a later call, and this one has failed
                    self.ended(displaced)
            handle = module.register_forward_hook(ended)
        _thread.inside = True

    def _wrap(self, module: nn.Module) -> None:
        call = module.__dict__.get("_compiled_call_impl")
        if not isinstance(call, _Call):
            call = module.__dict__["_compiled_call_impl"] = _Call(module)
        call.watches.add(self)
        self._modules.add(module)

    # ------------------------------------------------------------------ calls

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
              frame: FrameType | None = None) -> _Displaced | None:
        """A module is called, in no call that trains; what it sees, if this call trains."""
        if not torch.is_grad_enabled():
            return None
        if not (module.training or self._in_eval):
            self._in_eval_mode.setdefault(module)  # the outermost comes first
            for p in module.parameters():
                self._seen.pop(p, None)
            return None
        return _Displaced(self, self._terms(), _leading_size(args, kwargs), frame)

    def displaced(self, p: Tensor, term: Term) -> Tensor:
        """p + delta; p itself where it is frozen."""
        if not p.requires_grad:
            return p
        with torch.inference_mode(False), torch.enable_grad():
            displaced = torch.add(p, term.unit.to(p), alpha=term.factor)
        reference = weakref.ref(self)
        displaced.register_hook(lambda grad: _note_reached(reference, p, term))
        displaced._hvdnoise_parameter = p  # type: ignore[attr-defined]
        self._seen[p] = term
        return displaced

    def ended(self, call: _Displaced) -> None:
        """A call that trains has come to its end, and not to an exception."""
        self._sizes.append(call.size)

    def recomputed(self, p: Tensor) -> Term | None:
        """The delta that the forwards of the pass under way saw."""
        return self._seen.get(p)

    # ------------------------------------------------------------------ backward passes

    def note_gradient(self, p: Tensor) -> None:
        """Backward has given a parameter a gradient."""
        if p in self._not_found:
            self._lost.add(p)

    def reached(self, p: Tensor) -> Term | None:
        """The delta of the displaced weight that has got a gradient in the pass under way; outside
        of a pass, by ``autograd.grad``."""
        term, task = self._reached.get(p, (None, -1))
        return term if _current_graph_task_id() in (task, -1) else None

    def why_not(self, p: Tensor) -> str:
        """Why the gradient of a parameter is not of its displaced weight, and the remedy."""
        for module in self._in_eval_mode:
            if any(q is p for q in module.parameters()):
                return (f"{type(module).__name__} was called in evaluation mode: call "
                        f"train() on it, or pass noise_in_eval=True")
        return ("no call of its module was seen that trains: call the module itself, not its "
                "forward() or a function of its weights, and compile the model, not a function "
                "around it")

    def examples(self, *, repeated: bool) -> int:
        """Examples of the pass under way: the leading dimension that its calls agree on.

        Args:
            repeated: whether a pass without calls of its own has the examples of the one before.

        Returns:
            -1 where no call had a tensor that would tell.

        Raises:
            ValueError: where calls disagree.
        """
        sizes = sorted({size for size in self._sizes if size >= 0})
        if len(sizes) > 1:
            raise ValueError(f"the modules were called with {' and '.join(map(str, sizes))} "
                             "examples in one backward pass: pass batch_size= (examples per "
                             "worker) to the noise")
        if self._sizes:
            return sizes[0] if sizes else -1
        return self._last_size if repeated else 0

    def end_pass(self) -> None:
        """A backward pass is through."""
        if self._lost and self._displaces:
            names = sorted(self.name(p) for p in self._lost)
            warnings.warn(f"no module that holds {', '.join(names[:5])}"
                          f"{' and others' if len(names) > 5 else ''} was called: such parameters "
                          "are not displaced; register them in a module (nn.ParameterList), call "
                          "that, and use no ScriptModule", stacklevel=2)
        _thread.displaced = _lasting()  # an ended call would keep its frame
        self._not_found -= self._lost
        self._lost.clear()
        if self._sizes:
            self._last_size = self._sizes[-1]
        self._sizes = []
        self._reached.clear()
        self._in_eval_mode.clear()

    def end_step(self) -> None:
        """A step was taken: nothing of it counts any more."""
        _thread.inside = _thread.depth > 0
        if not self._not_found:
            _found(self)
        self._last_size = 0
        self._seen = {}

    def normalization_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """(buffer, copy) of everything that forward passes in training mode write."""
        return [(buffer, buffer.clone())
                for module in {each for top in self._modules for each in top.modules()}
                if getattr(module, "track_running_stats", False)
                for buffer in module.buffers(recurse=False)]


def _note_reached(reference: weakref.ref[ModelWatch], p: Tensor, term: Term) -> None:
    watch = reference()
    if watch is not None:
        watch._reached[p] = term, _current_graph_task_id()


def _leading_size(args: Iterable[Any], kwargs: Mapping[str, Any]) -> int:
    """Of the first tensor that has dimensions; -1: there is none."""
    return next((len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()),
                -1)


_searching: weakref.WeakSet[ModelWatch] = weakref.WeakSet()
_hooks: list[Any] = []  # the global one, while anybody searches


def _search(watch: ModelWatch) -> None:
    _searching.add(watch)
    if not _hooks:
        # a compiled module would warn about the short-lived global hook
        warnings.filterwarnings("ignore", message=".*torch.compile.* when there are global")
        _hooks.append(nn.modules.module.register_module_forward_pre_hook(_is_called))


def _found(watch: ModelWatch) -> None:
    _searching.discard(watch)
    _unhook()


def _unhook() -> None:
    while _hooks and not _searching:
        _hooks.pop().remove()


def _is_called(module: nn.Module, args: Any) -> None:
    if not (torch.compiler.is_compiling() and _thread.inside):
        _uncompiled(_look_at)(module)


def _look_at(module: nn.Module) -> None:
    for watch in list(_searching):
        watch.found(module)


def _release(modules: list[weakref.ref[nn.Module]]) -> None:
    """Take from the modules what no optimizer needs any more."""
    for reference in modules:
        module = reference()
        call = module.__dict__.get("_compiled_call_impl") if module is not None else None
        if module is not None and isinstance(call, _Call) and not list(call.watches):
            module.__dict__["_compiled_call_impl"] = call.compiled
            module.__dict__["_parameters"] = dict(module._parameters)
