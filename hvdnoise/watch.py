"""The calls of the modules that hold an optimizer's parameters.

An optimizer is not told its model. So until its first step is taken, a global hook sees every call,
and whoever holds one of its parameters is watched, with the modules below. The calls that are found
so are under way already: they last while their frame does. A parameter that gets a gradient though
no module that holds it was called is seen as it is: a warning names it.

What is kept of the calls: the examples that they had, for noises that ask; and of the backward
passes, which gradients came through displaced weights, so that noise that was due and did not come
is told.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from types import FrameType
from typing import Any, Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from hvdnoise.displacement import (
    Call,
    Displaced,
    Parameters,
    Term,
    current_graph_task_id,
    is_compiled,
    is_compiling,
    lasting,
    thread,
    uncompiled,
    watches,
)


class ModelWatch:
    """The calls of the modules that hold an optimizer's parameters.

    Args:
        terms: asked at the outermost call that trains, while its object lives: the delta of each
            parameter that is to be displaced now.
        names: of the parameters, for messages; parameters may be added.
        displaces: whether there will ever be a delta.
        in_eval: whether calls in evaluation mode, with gradients enabled, train too.
        on_module: is told every module that is found to hold parameters, once.
    """

    def __init__(self, terms: weakref.WeakMethod[Callable[[], Mapping[Tensor, Term]]],
                 names: Mapping[Tensor, str], *, displaces: bool = True, in_eval: bool = False,
                 on_module: Callable[[nn.Module], None] = lambda module: None) -> None:
        self._terms, self._names = terms, names
        self._displaces, self._in_eval, self._on_module = displaces, in_eval, on_module
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._parameters: set[Tensor] = set()
        self._not_found: set[Tensor] = set()  # parameters whose modules have not been called
        self._lost: set[Tensor] = set()  # those of them that have got a gradient
        self._seen: dict[Tensor, Term] = {}  # by the last forward that trained each parameter
        # parameters whose displaced weight has got a gradient in the pass under way
        self._reached: dict[Tensor, tuple[Term, int]] = {}
        self._in_eval_mode: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()
        self._sizes: dict[int, None] = {}  # of the calls since the last pass
        self._last_size = 0
        watches.add(self)
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
            if not isinstance(module.__dict__.get("_compiled_call_impl"), Call):
                self._wrap(module)

    def found(self, module: nn.Module) -> None:
        """A module is called: watch it and all below, if it holds parameters."""
        if module in self._modules or self._parameters.isdisjoint(module.parameters()):
            return
        holders = [each for each in module.modules() if isinstance(each._parameters, dict)
                   and not self._parameters.isdisjoint(each.parameters())]
        for each in holders:
            if not isinstance(each._parameters, Parameters):
                each.__dict__["_parameters"] = Parameters(each._parameters)
            self._not_found -= set(each._parameters.values())
        # A parametrized weight may be read anywhere: its computation is no call of a model.
        inner = {m for each in holders if isinstance(each, ParametrizationList)
                 for m in each.modules()}
        for each in holders:
            if each not in inner:
                self._wrap(each)
        weakref.finalize(self, _release, [weakref.ref(each) for each in holders]).atexit = False
        if module in self._modules and not any(
                displaced.watch is self and displaced.lasts() for displaced in thread.displaced):
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
            displaced.make(module, below=is_compiled(module) or is_compiling()
                           or call.compiled is not None)
            thread.displaced += (displaced,)

            def ended(*_: Any) -> None:
                handle.remove()
                if displaced.lasts():  # else it is of a later call, and this one has failed
                    self.ended(displaced)
            handle = module.register_forward_hook(ended)
        thread.inside = True

    def _wrap(self, module: nn.Module) -> None:
        call = module.__dict__.get("_compiled_call_impl")
        if not isinstance(call, Call):
            call = module.__dict__["_compiled_call_impl"] = Call(module)
        call.watches.add(self)
        if module not in self._modules:
            self._on_module(module)
        self._modules.add(module)

    # ------------------------------------------------------------------ calls

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
              frame: FrameType | None = None) -> Displaced | None:
        """A module is called, in no call that trains; what it sees, if this call trains."""
        if thread.unseen or not torch.is_grad_enabled():
            return None
        if not (module.training or self._in_eval):
            self._in_eval_mode.setdefault(module)  # the outermost comes first
            for p in module.parameters():
                self._seen.pop(p, None)
            return None
        terms = self._terms()
        return Displaced(self, terms() if terms else {}, _leading_size(args, kwargs), frame)

    def displaced(self, p: Tensor, term: Term) -> Tensor:
        """p + delta; p itself where it is frozen."""
        if not p.requires_grad:
            return p
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            displaced = torch.add(p, term.unit.to(p), alpha=term.factor)
        else:
            with torch.inference_mode(False), torch.enable_grad():
                displaced = torch.add(p, term.unit.to(p), alpha=term.factor)
        reference = weakref.ref(self)
        displaced.register_hook(lambda grad: _note_reached(reference, p, term))
        displaced._hvdnoise_parameter = p  # type: ignore[attr-defined]
        self._seen[p] = term
        return displaced

    def ended(self, call: Displaced) -> None:
        """A call that trains has come to its end, and not to an exception."""
        self._sizes[call.size] = None
        self._last_size = call.size

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
        return term if current_graph_task_id() in (task, -1) else None

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
        sizes = sorted(size for size in self._sizes if size >= 0)
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
        thread.displaced = lasting()  # an ended call would keep its frame
        self._not_found -= self._lost
        self._lost.clear()
        self._sizes.clear()
        self._reached.clear()
        self._in_eval_mode.clear()

    def end_step(self) -> None:
        """A step was taken: nothing of it counts any more."""
        thread.inside = thread.depth > 0
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
        watch._reached[p] = term, current_graph_task_id()


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
    if not (torch.compiler.is_compiling() and thread.inside):
        uncompiled(_look_at)(module)


def _look_at(module: nn.Module) -> None:
    for watch in list(_searching):
        watch.found(module)


def _release(modules: list[weakref.ref[nn.Module]]) -> None:
    """Take from the modules what no optimizer needs any more."""
    for reference in modules:
        module = reference()
        call = module.__dict__.get("_compiled_call_impl") if module is not None else None
        if module is not None and isinstance(call, Call) and not list(call.watches):
            module.__dict__["_compiled_call_impl"] = call.compiled
            module.__dict__["_parameters"] = dict(module._parameters)
