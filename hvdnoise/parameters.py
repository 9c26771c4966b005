"""The parameters of an optimizer: their names, their owner, and their layout in buckets."""

from __future__ import annotations

import gc
import weakref
from typing import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hvdnoise.buckets import Layout, build_layout, fingerprint

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by the bytes of a number


class OptimizerParameters:
    """What is known of an optimizer's parameters, as its groups are now.

    Args:
        names: of the parameters; those that have none get one.
        bucket_bytes, groups: see `build_layout`.

    Attributes:
        sparse: parameters whose gradients travel as sparse tensors, with their names.
        layout: of all others that require a gradient.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: dict[Tensor, str], *,
                 bucket_bytes: int, groups: int | list[list[Tensor]] | None) -> None:
        self.names = names
        self.sparse: dict[Tensor, str] = {}
        self._optimizer, self._bucket_bytes, self._groups = optimizer, bucket_bytes, groups
        self._hooked: set[Tensor] = set()  # no WeakSet, which compares tensors by their numbers
        self.layout: Layout  # made by `lay_out`

    @property
    def description(self) -> str:
        """The optimizer in words: its class, and its first parameter."""
        first = next(iter(self.names.values()), "no parameters")
        return f"{type(self._optimizer).__name__} of {first}"

    def all(self) -> list[Tensor]:
        """All parameters."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def by_name(self) -> dict[str, Tensor]:
        """All parameters by their names."""
        return {self.names[p]: p for p in self.all()}

    def dense(self) -> list[Tensor]:
        """The parameters in the layout."""
        return [p for bucket in self.layout.buckets for p in bucket.parameters]

    def learning_rates(self) -> dict[Tensor, float | None]:
        """By parameter; None where the group has none."""
        return {p: group.get("lr") for group in self._optimizer.param_groups
                for p in group["params"]}

    def trained(self) -> list[Tensor]:
        """Those that require a gradient which does not travel sparse, also new ones."""
        return [p for p in self.all() if p.requires_grad and p not in self.sparse]

    def sums_of_bits(self) -> list[int]:
        """A number for each of `trained`, which tells whether two ranks have the same weights."""
        return [int(p.detach().reshape(-1).view(_BITS.get(p.itemsize, torch.int64))
                    .sum(dtype=torch.int64)) for p in self.trained()]

    def changed(self) -> bool:
        """Whether parameters, their dtypes or devices are others than the layout's."""
        return fingerprint(self.trained()) != self.layout.fingerprint

    def lay_out(self, hook: Callable[[Tensor], None]) -> None:
        """Make the layout for the parameters as they are now, and hook the new ones.

        Raises:
            ValueError: when another optimizer has one of the parameters.
        """
        self._name()
        for p in self.all():
            if p.requires_grad and p not in self._hooked:
                self._hooked.add(p)
                p.register_post_accumulate_grad_hook(hook)
        order = {p: place for place, p in enumerate(self.names)}  # of registration, if named
        trained = sorted(self.trained(), key=order.__getitem__)
        self.layout = build_layout([(self.names[p], p) for p in trained], groups=self._groups,
                                   bucket_bytes=self._bucket_bytes)

    def _name(self) -> None:
        """Give every parameter a name and this owner."""
        for i, group in enumerate(self._optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                self.names.setdefault(p, f"allreduce.noname.{i}.{j}")
                if _owner(p) not in (None, self):
                    gc.collect()
                other = _owner(p)
                if other is not None and other is not self:
                    raise ValueError(f"{self.names[p]} belongs to another DistributedOptimizer "
                                     f"already, {other.description}: give each parameter to one "
                                     "optimizer, or delete the other one first")
        for p in self.all():
            _owners[p] = weakref.ref(self)


_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> its OptimizerParameters, weakly


def _owner(p: Tensor) -> OptimizerParameters | None:
    reference = _owners.get(p)
    return reference() if reference is not None else None
