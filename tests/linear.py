"""A loss whose gradients do not depend on the weights: every step draws from one known law."""

from __future__ import annotations

from typing import Any

import torch

from hvdnoise import DistributedOptimizer
from tests.fake_world import ThreadWorld, run_threads
from tests.toys import Linear

W, P, B_WORKER = 4, 3, 2


def examples() -> torch.Tensor:
    """(W, b, P): the gradient of every example, not centred."""
    generator = torch.Generator().manual_seed(3)
    return 0.5 + torch.randn(W, B_WORKER, P, generator=generator, dtype=torch.float64) \
        * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def drive(world: ThreadWorld, noise: Any, steps: int, learning_rate: float = 0.0, copies: int = 1,
          **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Displacements (steps, V, P) that this rank's forwards saw, and reduced gradients.

    ``copies`` of the parameters, with equal gradients: as many draws in a step of a noise that has
    a number of its own for each parameter. Then P is a multiple of the examples' P.
    """
    a, V = examples().repeat(1, 1, copies), W // world.size
    model = Linear(P * copies)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=learning_rate),
                                     model.named_parameters(), noise=noise, virtual_workers=V,
                                     world=world, **options)
    gradients = []
    for _ in range(steps):
        optimizer.zero_grad()
        for worker in range(world.rank * V, world.rank * V + V):
            optimizer.weigh(model(a[worker])).backward()
        gradients.append(model.theta.grad.detach().clone())  # type: ignore[union-attr]
        optimizer.step()
    return torch.stack(model.seen).view(steps, V, -1), torch.stack(gradients)


def all_displacements(make: Any, size: int, steps: int, **options: Any) -> torch.Tensor:
    """(steps - 1, W, P), without the first step's, which are 0."""
    parts = run_threads(size, lambda world: drive(world, make(), steps + 1, **options)[0])
    everyone = torch.cat(parts, dim=1)
    assert torch.count_nonzero(everyone[0]) == 0
    return everyone[1:]
