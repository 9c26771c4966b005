"""Whether what is to be written, or was read, is finite.

All tensors and numbers of a state must be: weights, buffers, moving averages, the optimizer's
state, what the noise keeps. Only the settings, the versions and the generators are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

_NOT_LOOKED_AT = ("config", "versions", "generators")


class NotFinite(ValueError):
    """A tensor or number is not finite; one line that names it."""


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; in one fast pass where they are."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # a sum is finite only if all that it adds is; it may overflow all the same
    tensor = tensor.detach()
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check(state: Any) -> None:
    """Look at everything in a state of dicts, lists, tuples, tensors and numbers.

    Raises:
        NotFinite: naming the first that is not finite, as "model.fc.weight".
    """
    for path, value in _leaves("", state):
        if isinstance(value, Tensor) and not is_finite(value):
            wrong = int((~value.detach().isfinite()).sum())
            raise NotFinite(f"{path} is not finite ({wrong} of {value.numel()} numbers)")
        if isinstance(value, float) and not math.isfinite(value):
            raise NotFinite(f"{path} is not finite ({value})")


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            if path or name not in _NOT_LOOKED_AT:
                yield from _leaves(f"{path}.{name}" if path else str(name), each)
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _leaves(f"{path}.{index}", each)
    else:
        yield path, value


def first(named: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that is not finite."""
    return next((name for name, tensor in named.items() if not is_finite(tensor)), None)
