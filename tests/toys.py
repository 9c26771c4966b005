"""Small problems for tests of the noises, trained by the real optimizer and by dense formulas.

`train` runs whole steps of a `DistributedOptimizer` on one rank of any world. `Dense` does the
same with vectors of float64 and the formulas of tests/reference.py, knowing nothing of ranks,
buckets or hooks. Vectors of parameters (P,) are in order of registration.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hvdnoise import DistributedOptimizer, streams
from hvdnoise.buckets import build_layout
from hvdnoise.comm import World
from tests import reference

Array = reference.Array
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """3 -> 4 -> 2 with a tanh; weights far from zero, so that no gradient is."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.to(dtype)
        with torch.no_grad():  # threads share torch's global generator
            for n, p in enumerate(self.parameters()):
                p.copy_(0.7 * streams.normal(tuple(p.shape), 7, "net", n, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Linear(nn.Module):
    """Loss <theta, a>: example n's gradient is a_n wherever theta is, so its law is known."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, a: Tensor) -> Tensor:
        self.seen.append(self.theta.detach().clone())
        return a @ self.theta


def batch(step: int, worker: int, examples: int = 4, dtype: torch.dtype = torch.float64) -> Batch:
    """What a worker, wherever it lives, sees in a step."""
    numbers = streams.normal((examples, 5), 11, "batch", step, worker, dtype=torch.float64)
    return numbers[:, :3].to(dtype), numbers[:, 3:].to(dtype)


def losses(output: Tensor, target: Tensor) -> Tensor:
    """(examples,)"""
    return ((output - target) ** 2).mean(dim=1)


def seen(model: nn.Module) -> Tensor:
    """(P,): the weights that a forward of the model sees, read as a module reads its own."""
    return vector(getattr(module, name) for module in model.modules()
                  for name, p in module._parameters.items() if p is not None)


def vector(tensors: Any) -> Tensor:
    """One vector (P,) of the tensors' numbers, a copy."""
    return torch.cat([t.detach().flatten() for t in tensors])


def groups_of(model: nn.Module, learning_rates: Sequence[float]) -> list[dict[str, Any]]:
    """Parameters dealt out to groups of these learning rates, first, second, first, ..."""
    parameters = list(model.parameters())
    return [{"params": parameters[n::len(learning_rates)], "lr": rate}
            for n, rate in enumerate(learning_rates)]


def build(world: World | None, noise: Any = None, *, model: nn.Module | None = None, V: int = 1,
          learning_rates: Sequence[float] = (0.1,), momentum: float = 0.0, **options: Any
          ) -> tuple[Any, Any]:
    """A model and its `DistributedOptimizer`."""
    model = model or Net()
    inner = torch.optim.SGD(groups_of(model, learning_rates), lr=learning_rates[0],
                            momentum=momentum)
    return model, DistributedOptimizer(inner, model.named_parameters(), noise=noise, world=world,
                                       virtual_workers=V, **options)


@dataclass
class Record:
    """What a run was like, step by step."""

    gradients: list[Tensor] = field(default_factory=list)  # averaged, as the update used them
    weights: list[Tensor] = field(default_factory=list)  # after the step
    measured: list[Any] = field(default_factory=list)


def train(model: nn.Module, optimizer: Any, steps: int, *, b: int = 4, first: int = 0,
          loss_scale: float | Callable[[], float] = 1.0, dtype: torch.dtype = torch.float64,
          before_step: Callable[[int], None] | None = None) -> Record:
    """Whole steps, each of this rank's workers on its own examples; lag 0 by a closure."""
    record, k = Record(), optimizer.backward_passes_per_step
    optimizer.loss_scale = loss_scale
    factor = loss_scale() if callable(loss_scale) else loss_scale
    for step in range(first, first + steps):
        if before_step is not None:
            before_step(step)

        def closure() -> None:
            optimizer.zero_grad()
            for worker in optimizer.workers:
                x, y = batch(step, worker, b, dtype)
                for part in range(k):
                    part_x, part_y = x[part::k], y[part::k]
                    optimizer.observe_examples(model, losses, part_x, part_y)
                    loss = optimizer.weigh(losses(model(part_x), part_y)) / k
                    (loss * factor).backward()
            optimizer.synchronize()  # there may be other optimizers in this world
            gradients = vector(p.grad for p in model.parameters())
            if factor != 1:  # what GradScaler.unscale_ does
                for p in model.parameters():
                    assert p.grad is not None
                    p.grad.div_(factor)
            record.gradients.append(gradients / factor)
        if optimizer.noise is not None and optimizer.noise.lag == 0:
            optimizer.step(closure)
            del record.gradients[-2]  # of the first, clean pass
        else:
            closure()
            optimizer.step()
        record.weights.append(vector(model.parameters()))
        record.measured.append(optimizer.measured)
    return record


class Dense:
    """The same training in one vector of weights, all workers in a loop, by the formulas."""

    def __init__(self, W: int, *, b: int = 4, learning_rates: Sequence[float] = (0.1,),
                 bucket_bytes: int = 2 ** 20) -> None:
        self.W, self.b = W, b
        self.model = Net()
        # isotropic noise is drawn by buckets
        self.layout = build_layout(list(self.model.named_parameters()), bucket_bytes=bucket_bytes)
        self.theta_P = reference.as_float64(vector(self.model.parameters()))
        self.sizes = [p.numel() for p in self.model.parameters()]
        self.rates = list(learning_rates)

    def rate_P(self) -> Array:
        """The learning rate of every number."""
        return np.concatenate([np.full(size, self.rates[t % len(self.rates)])
                               for t, size in enumerate(self.sizes)])

    def tensors(self) -> list[slice]:
        """Where in P each parameter tensor lies."""
        ends = np.cumsum(self.sizes)
        return [slice(end - size, end) for end, size in zip(ends, self.sizes)]

    def gradient(self, theta_P: Array, x: Tensor, y: Tensor) -> Array:
        """Of the mean loss of these examples at these weights."""
        with torch.no_grad():
            for p, where in zip(self.model.parameters(), self.tensors()):
                p.copy_(torch.from_numpy(theta_P[where]).view(p.shape))
        grads = torch.autograd.grad(losses(self.model(x), y).mean(), list(self.model.parameters()))
        return reference.as_float64(vector(grads))

    def worker_gradients(self, step: int, displacements_WP: Array | float = 0.0) -> Array:
        """(W, P): every worker's gradient at its own displaced weights."""
        thetas_WP = self.theta_P + np.zeros((self.W, 1)) + displacements_WP
        return np.stack([self.gradient(theta_P, *batch(step, worker, self.b))
                         for worker, theta_P in enumerate(thetas_WP)])

    def example_gradients(self, step: int) -> Array:
        """(W*b, P)"""
        rows = []
        for worker in range(self.W):
            x, y = batch(step, worker, self.b)
            rows += [self.gradient(self.theta_P, x[n:n + 1], y[n:n + 1]) for n in range(self.b)]
        return np.stack(rows)

    def update(self, gradient_P: Array) -> None:
        """A step of SGD."""
        self.theta_P = self.theta_P - self.rate_P() * gradient_P

    def normals(self, *key: int | str, seed: int, per_worker: bool = False, worker: int = 0
                ) -> Array:
        """(P,) numbers of the streams (key[, worker], bucket), put in order of registration."""
        by_name: dict[str, Array] = {}
        private = (worker,) if per_worker else ()
        for bucket in self.layout.buckets:
            flat_N = streams.normal(bucket.size, seed, *key, *private, bucket.index,
                                    dtype=torch.float64)
            by_name.update((name, reference.as_float64(view.flatten()))
                           for name, view in zip(bucket.names, bucket.views(flat_N)))
        return np.concatenate([by_name[name] for name, _ in self.model.named_parameters()])

    def displaced(self, scope: str) -> Any:
        """Where in P the parameters lie that a scope displaces."""
        shapes = [p.dim() for p in self.model.parameters()]
        return np.concatenate([np.arange(each.start, each.stop) for each, dim in zip(
            self.tensors(), shapes) if scope == "all" or dim > 1])

    def parts(self, scale: str, scope: str, per: str) -> list[Any]:
        """Where in P the parts lie each of which has a scale of its own."""
        if scale != "relative":
            return [self.displaced(scope)]
        found: list[Any] = []
        for p, where in zip(self.model.parameters(), self.tensors()):
            if scope == "all" or p.dim() > 1:
                found += np.split(np.arange(where.start, where.stop),
                                  p.shape[0] if per == "filter" else 1)
        return found

    def gnc_displacements(self, deviations_WP: Array, *, seen: int, step: int, source: str,
                          scale: str, size: float, seed: int, scope: str = "all",
                          per: str = "tensor") -> Array:
        """(W, P): delta_i of METHODS section 2, from deviations seen in step ``seen``.

        gathered draws when it sees the deviations, isotropic when it displaces.
        """
        W, P = deviations_WP.shape
        if source == "gathered":
            normals_WN = np.stack([streams.normal(W, seed, "gnc-mix", seen, i, dtype=torch.float64)
                                   for i in range(W)])
        else:
            normals_WN = np.stack([self.normals("gnc-isotropic", step, seed=seed, per_worker=True,
                                                worker=i) for i in range(W)])
        displacements_WP, inside = np.zeros((W, P)), self.displaced(scope)
        for where in self.parts(scale, scope, per):
            part_WP, radius = deviations_WP[:, where], size
            if source == "own":
                unit_WP = reference.gnc_own(part_WP, 1.0)
            elif source == "gathered":
                unit_WP = reference.gnc_gathered(part_WP, normals_WN, 1.0)
            elif source == "layerwise" and scale != "relative":
                unit_WP = np.concatenate([
                    reference.gnc_isotropic(deviations_WP[:, t], normals_WN[:, t], 1.0)
                    for t in self.tensors() if t.start in inside], axis=1)
            else:
                unit_WP = reference.gnc_isotropic(part_WP, normals_WN[:, where], 1.0)
            if scale in ("relative", "share"):
                radius = reference.share_radius(self.theta_P[where], size)
            s = size if scale == "lr" else reference.radius_scale(unit_WP, radius) \
                if source == "own" else reference.expected_radius_scale(part_WP, radius)
            displacements_WP[:, where] = s * unit_WP
        return displacements_WP * (self.rate_P() if scale == "lr" else 1.0)


def relative_error(value: Any, expected: Any) -> float:
    """The greatest difference, in units of the greatest expected number."""
    value, expected = reference.as_float64(value), reference.as_float64(expected)
    assert value.shape == expected.shape, (value.shape, expected.shape)
    return float(np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-300))
