"""An optimizer that stands in for another: same class, same state, same groups, same defaults.

The wrapped optimizer stays the one that holds ``state``, ``param_groups``, ``defaults`` and its
hooks; the wrapper reads and writes them there. So learning-rate schedulers made before or after
wrapping, ``load_state_dict`` on either and hooks registered on either all work.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable

import torch
from torch import Tensor


class Wrapper(torch.optim.Optimizer):
    """Delegates to the wrapped optimizer whatever is not overridden."""

    _step_supports_amp_scaling = False  # GradScaler unscales p.grad, also for fused optimizers

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # not Optimizer.__init__: it would make state and groups of its own
        object.__setattr__(self, "_optimizer", optimizer)

    def __getattr__(self, name: str) -> Any:
        if name == "_optimizer":  # asked for while being unpickled or copied
            raise AttributeError(name)
        return getattr(self._optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # an attribute of the wrapped optimizer is set there; but schedulers patch `step` on each
        inner = name != "step" and name in vars(self._optimizer)
        object.__setattr__(self._optimizer if inner else self, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("a DistributedOptimizer cannot be copied: copy its state_dict(), and make "
                        "another one for another model")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a DistributedOptimizer cannot be pickled: save its state_dict()")

    def __repr__(self) -> str:
        return repr(self._optimizer)  # asks nobody for gradients

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups. Who asks may look at gradients: they are whole."""
        self._finish_exchange()
        return self._optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._optimizer.param_groups = groups

    def _finish_exchange(self) -> None:
        """Wait for gradients that are on their way."""

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self._optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self._optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self._optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings; they are exchanged from the next step on."""
        self._optimizer.add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Create the wrapped optimizer's state without a collective, and touch no weight.

        This is not the step that users call: `wrap` puts ``distributed_step`` in its place. It is
        what ``hvd.broadcast_optimizer_state`` reaches through ``super()``, with gradients of
        zeros, on the ranks whose state is still empty and on those only, so that a collective
        here would hang. Stand-ins take the step, for weight decay would move the weights, and
        would be in the momentum.
        """
        inner = self._optimizer
        stand_ins = {p: p.detach().clone() for g in inner.param_groups for p in g["params"]}
        for p, stand_in in stand_ins.items():
            stand_in.grad = p.grad
        kept = [(group, group["params"], group.get("weight_decay"))
                for group in inner.param_groups]
        try:
            for group, parameters, decay in kept:
                group["params"] = [stand_ins[p] for p in parameters]
                if decay:
                    group["weight_decay"] = 0.0
            inner.step()
        finally:
            for group, parameters, decay in kept:
                group["params"] = parameters
                if decay:
                    group["weight_decay"] = decay
        for p, stand_in in stand_ins.items():
            if stand_in in inner.state:
                inner.state[p] = inner.state.pop(stand_in)


def wrap(core: type[Wrapper], optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any
         ) -> torch.optim.Optimizer:
    """An object of a class that inherits ``core`` and the optimizer's own class.

    Its module is named as Horovod's own wrapper's, by which ``hvd.broadcast_optimizer_state``
    decides to initialize state through ``super().step()``, which is `Wrapper.step`.
    """
    body = {"step": core.distributed_step,  # type: ignore[attr-defined]
            "__module__": "horovod.torch.optimizer", "__doc__": core.__doc__}
    cls = type(type(optimizer).__name__, (core, type(optimizer)), body)
    wrapped: torch.optim.Optimizer = cls(optimizer, *args, **kwargs)
    return wrapped


def named(optimizer: torch.optim.Optimizer,
          named_parameters: Iterable[tuple[str, Tensor]] | None) -> dict[Tensor, str]:
    """The name of every parameter; those of ``named_parameters``, checked as Horovod checks them.

    Raises:
        ValueError: for what is no (name, parameter) pair, a name twice, a parameter without one.
    """
    if named_parameters is None:
        return {}
    pairs = list(named_parameters)
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise ValueError("named_parameters must be (name, parameter) tuples: pass "
                         "model.named_parameters()")
    names = [name for name, _ in pairs]
    duplicates = sorted({name for name in names if names.count(name) > 1}) \
        if len(set(names)) < len(names) else []
    if duplicates:
        raise ValueError(f"named_parameters has {', '.join(duplicates)} more than once: names must "
                         "be unique")
    by_parameter = {p: name for name, p in pairs}
    unnamed = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]
               if p not in by_parameter]
    if unnamed:
        raise ValueError(f"{len(unnamed)} parameters of the optimizer are not in named_parameters "
                         f"(the first has shape {unnamed[0]}): name all of them, or none")
    return by_parameter


def check_arguments(*, backward_passes_per_step: int, op: str, gradient_predivide_factor: float,
                    groups: Any, virtual_workers: int, bucket_bytes: int, noise: Any) -> None:
    """Refuse bad values before anything is hooked. Raises: ValueError, naming value and remedy."""
    for name, value in (("backward_passes_per_step", backward_passes_per_step),
                        ("virtual_workers", virtual_workers)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer > 0")
    if op not in ("average", "sum", "adasum", "min", "max", "product"):
        raise ValueError(f"op={op!r} is no reduction: use hvd.Average, Sum, Adasum, Min, Max or "
                         "Product")
    if gradient_predivide_factor != 1.0 and op != "average":
        raise ValueError(f"gradient_predivide_factor={gradient_predivide_factor} needs "
                         f"op=hvd.Average, not {op}")
    if gradient_predivide_factor <= 0:
        raise ValueError(f"gradient_predivide_factor={gradient_predivide_factor} must be > 0")
    if bucket_bytes < 0:
        raise ValueError(f"bucket_bytes={bucket_bytes} must be >= 0 (0: a bucket per parameter)")
    if op != "average" and (noise is not None or virtual_workers > 1):
        raise ValueError(f"op={op} reduces no mean: noise and virtual workers need op=hvd.Average")
    if isinstance(groups, int):
        if groups <= 0:
            raise ValueError(f"groups={groups} must be a number > 0 or a list of lists of tensors")
    elif groups is not None:
        members = [p for group in groups for p in group]
        if any(not isinstance(p, Tensor) for p in members):
            raise ValueError("groups must be lists of torch.Tensor")
        if len(set(map(id, members))) < len(members):
            raise ValueError("groups has a parameter twice: each may be in one group only")
