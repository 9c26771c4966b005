"""Weights that are displaced from the forward to the end of its backward, and clean elsewhere.

The clean weights are never written: while displaced, ``parameter.data`` points at a second buffer,
and afterwards at the clean tensor again, so restoration is exact whatever the noise was. Memory:
one P for the second buffer.

The model is not an argument of an optimizer, so it is found: a hook that sees every module's call
notices the outermost modules that hold the parameters, hooks those, and removes itself when all
parameters are covered. While the weights are displaced

- a forward pass in evaluation mode, or without gradients, sees the clean weights;
- ``state_dict()`` gives the clean weights (the tensors themselves, as ever), and so does a deep
  copy of the model; pickling the model itself raises an error;
- ``load_state_dict()``, and an exception in the forward, end the displacement.

Buffers, such as BatchNorm's running statistics, belong to the forward pass that updates them: with
lag 1 they average over displaced weights. The second pass of lag 0 leaves no trace in them.
"""

from __future__ import annotations

import copy
import sys
import warnings
import weakref
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn


class _Hook:
    """A module hook that dies with its target and survives copying and pickling the module.

    ``module.compile()`` compiles the calls of hooks too, and loses what they do to ``p.data``.
    """

    def __init__(self, target: Any, method: str) -> None:
        self._target: Callable[[], Any] = weakref.ref(target)
        self._method = method
        self._call_eagerly = torch.compiler.disable(self._call)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._call_eagerly(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> None:
        target = self._target()
        if target is not None:
            getattr(target, self._method)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        target = self._target()
        if target is not None:
            target.copy_clean(memo)
        return self

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        target = self._target()
        if target is not None and target.displaced:
            raise RuntimeError("between forward and backward the weights are displaced: save the "
                               "model's state_dict(), which is always clean, or save after "
                               "backward()")
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    """What a pickled hook comes back as."""
    return _do_nothing


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None


class ModelWatch:
    """Finds the modules that hold the parameters, and swaps their weights."""

    def __init__(self, parameters: Sequence[Tensor], before_training_forward: Callable[[], None]
                 ) -> None:
        """``before_training_forward`` may call `displace`; it is called before each outermost
        forward in training mode with gradients."""
        # leading dimension of the first tensor, summed over the training forwards of a worker
        self.examples = 0
        self.roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._before_training_forward = before_training_forward
        self._swapped: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, clean, displaced
        self._paused = False
        self._first = True
        self._depth = 0
        self._uncovered: set[Tensor] = set()
        self._handles: list[Any] = []
        self._discovery: Any = None
        self.watch(parameters)

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """Look for the modules of these parameters too."""
        known = {p for root in self.roots for p in root.parameters()}
        self._uncovered |= set(parameters) - known
        if self._uncovered and self._discovery is None:
            # a compiled module would warn about the short-lived global hook
            warnings.filterwarnings("ignore", message=".*torch.compile.* when there are global")
            self._discovery = nn.modules.module.register_module_forward_pre_hook(
                _Hook(self, "_discover"))

    def close(self) -> None:
        """Restore the weights and remove every hook."""
        self.restore()
        for handle in [*self._handles, *([self._discovery] if self._discovery else [])]:
            handle.remove()

    @property
    def displaced(self) -> bool:
        """Whether the weights are displaced."""
        return bool(self._swapped)

    def displace(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Point each parameter at its displaced weights: (parameter, displaced tensor)."""
        assert not self._swapped
        self._swapped = [(p, p.data, displaced) for p, displaced in pairs]
        self._point(displaced=True)

    def restore(self) -> None:
        """Point every parameter at its clean weights again."""
        if self._swapped:
            self._point(displaced=False)
            self._swapped, self._paused = [], False

    def reset(self) -> None:
        """A new step begins: whatever forward pass broke off is over."""
        self.restore()
        self._depth = 0

    def begin_worker(self) -> None:
        """The next training forward is the first of another worker."""
        self._first = True

    def copy_clean(self, memo: dict[int, Any]) -> None:
        """Put clean copies of displaced parameters into a ``copy.deepcopy`` under way."""
        for p, clean, _ in self._swapped:
            if id(p) not in memo:
                copy.deepcopy(p, memo)
            memo[id(p)].data = clean.clone()

    def _point(self, *, displaced: bool) -> None:
        for p, clean, other in self._swapped:
            p.data = other if displaced else clean
        torch.clear_autocast_cache()  # autocast keeps low-precision copies of parameters

    def _discover(self, module: nn.Module, args: Any) -> None:
        if module in self.roots or self._uncovered.isdisjoint(module.parameters()):
            return
        self.roots.add(module)
        self._uncovered -= set(module.parameters())
        if not self._uncovered:
            self._discovery.remove()
            self._discovery = None
        self._handles += [
            module.register_forward_pre_hook(_Hook(self, "_enter"), with_kwargs=True),
            module.register_forward_hook(_Hook(self, "_leave"), with_kwargs=True,
                                         always_call=True)]
        for owner in module.modules():
            self._handles += [
                owner.register_state_dict_post_hook(_Hook(self, "_clean_state")),
                owner.register_load_state_dict_pre_hook(_Hook(self, "_before_load"))]
        self._enter(module, args, {})  # this call collected its hooks before there were ours

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in self.roots:  # a copy of the model
            return
        self._depth += 1
        if self._depth > 1:
            return
        if module.training and torch.is_grad_enabled():
            self._before_training_forward()
        elif self._swapped:
            self._point(displaced=False)
            self._paused = True

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
               output: Any) -> None:
        if module not in self.roots:
            return
        self._depth -= 1
        if self._depth > 0:
            return
        if self._paused:
            self._point(displaced=True)
            self._paused = False
        elif output is None and sys.exc_info()[0] is not None:  # the forward raised
            self.restore()
        elif module.training and torch.is_grad_enabled():
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()]
            seen = len(tensors[0]) if tensors else 0
            self.examples = seen if self._first else self.examples + seen
            self._first = False

    def _clean_state(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        clean = {p: weight for p, weight, _ in self._swapped}
        for name, p in module._parameters.items():
            if p in clean and prefix + name in state:
                state[prefix + name] = clean[p]

    def _before_load(self, module: nn.Module, *_: Any) -> None:
        if not {p for p, _, _ in self._swapped}.isdisjoint(module.parameters()):  # not for a copy
            self.restore()

    def normalization_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """(buffer, copy) of everything that forward passes in training mode write."""
        return [(buffer, buffer.clone()) for root in self.roots for module in root.modules()
                if getattr(module, "track_running_stats", False)
                for buffer in module.buffers(recurse=False)]
