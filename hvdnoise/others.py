"""What else averages gradients: with it, a parameter's gradient would be averaged twice, and the
workers' deviations would be gone.
"""

from __future__ import annotations

import gc
import sys
from typing import Any, Iterator, Mapping

import torch
from torch import Tensor

_MODULES = {"torch.nn.parallel.distributed": "DistributedDataParallel",
            "torch.distributed.fsdp": "FullyShardedDataParallel"}


def refuse_averaged(names: Mapping[Tensor, str]) -> None:
    """Refuse parameters of a model that averages their gradients itself.

    Args:
        names: of the parameters.

    Raises:
        ValueError: naming a parameter, and what averages it.
    """
    found = _found(names)
    if found is not None:
        gc.collect()  # a model that nobody has any more
        found = _found(names)
    if found is not None:
        raise ValueError(found)


def _found(names: Mapping[Tensor, str]) -> str | None:
    sharded = _class("torch.distributed.tensor", "DTensor")
    for p, name in names.items():
        if sharded is not None and isinstance(p, sharded):
            return (f"{name} is a DTensor, which is not whole on any rank: give the optimizer a "
                    "model that is not sharded")
    for model in _models():
        for p in model.parameters():
            if p in names:
                kind = type(model).__name__
                return (f"{names[p]} is a parameter of a {kind}, which averages gradients itself: "
                        f"leave {kind} out, for the optimizer takes its place")
    return None


def _models() -> Iterator[torch.nn.Module]:
    """All models of this process that average gradients."""
    kinds = tuple(kind for place, name in _MODULES.items()
                  if (kind := _class(place, name)) is not None)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        yield from (each for each in gc.get_objects() if issubclass(type(each), kinds))


def _class(module: str, name: str) -> Any:
    """A class, if anybody has loaded its module."""
    return getattr(sys.modules.get(module), name, None)
