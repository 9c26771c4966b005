"""Gradients that travel as sparse tensors: an allgather of their entries, as Horovod does it."""

from __future__ import annotations

import torch
from torch import Tensor

from hvdnoise.comm import World


class SparseGradients:
    """The parameters whose gradients are sparse, on this or another rank.

    Args:
        known: parameters outside the buckets, with their names.
        allowed: whether there may be any.
        op: "average" or "sum", where there may.
        label: what the names of the collectives begin with.
    """

    def __init__(self, world: World, known: dict[Tensor, str], *, allowed: bool, op: str,
                 label: str) -> None:
        self.names = dict(known)
        self._world, self._allowed, self._op = world, allowed and op in ("average", "sum"), op
        self._label = label
        self._gradients: dict[str, Tensor] = {}
        self._results: dict[Tensor, Tensor] = {}  # what p.grad became

    def keep(self, p: Tensor, name: str) -> None:
        """Take ``p.grad`` as this rank's gradient."""
        if not self._allowed:
            raise ValueError(f"the gradient of {name} is sparse: pass sparse_as_dense=True, which "
                             "noise, virtual workers and reductions other than a mean or sum need")
        if p.grad is not None:
            self._gradients[name] = p.grad.detach()

    def owns(self, p: Tensor) -> bool:
        """Whether ``p.grad`` is a result from here."""
        return p.grad is not None and p.grad is self._results.get(p)

    def remember(self, p: Tensor, result: Tensor) -> Tensor:
        """``result``, to be known again by `owns`."""
        self._results[p] = result
        return result

    def agree(self, parameters: dict[str, Tensor]) -> set[str]:
        """Names that some rank found sparse among the ``parameters``; they travel here from now
        on. Collective."""
        found = {name for names in self._world.gather_json(sorted(self._gradients),
                                                           name=f"{self._label}.sparse")
                 for name in names}
        self.names.update({p: name for name, p in parameters.items() if name in found})
        return found

    def reduce(self, *, keep: bool = True) -> None:
        """Put every result into ``p.grad``. Every rank takes part, with nothing where it has none.

        Args:
            keep: otherwise ``p.grad`` stays as it is.

        Raises:
            RuntimeError: for a gradient that turned sparse after the ranks had agreed.
        """
        unknown = set(self._gradients) - set(self.names.values())
        if unknown:
            raise RuntimeError(f"the gradient of {min(unknown)} turned sparse after the first "
                               "step: pass sparse_as_dense=True")
        for p, name in sorted(self.names.items(), key=lambda item: item[1]):
            mine = self._gradients.pop(name, None)  # entry by entry, as Horovod: no coalesce
            indices_KI = mine._indices().t().contiguous() if mine is not None else \
                torch.zeros(0, 1, dtype=torch.int64, device=p.device)
            values_K = mine._values() if mine is not None else p.new_zeros(0, *p.shape[1:])
            stem = f"{self._label}.{name}"
            indices_KI = self._world.allgather(indices_KI, name=f"{stem}.indices").wait()
            values_K = self._world.allgather(values_K, name=f"{stem}.values").wait()
            if self._op == "average":
                values_K = values_K / self._world.size
            if not keep:
                continue
            p.grad = self.remember(p, torch.sparse_coo_tensor(
                indices_KI.t(), values_K, p.shape, check_invariants=False))
