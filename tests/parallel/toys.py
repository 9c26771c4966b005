"""A small model and its data, for the checks that compare whole training loops."""

from __future__ import annotations

from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hvdnoise
from hvdnoise.comm import World


class Net(nn.Module):
    """Convolution, batch normalization and two linear layers: 7 parameters, 1,152 numbers.

    The convolution has no bias: its gradient would be rounding errors only, which Adam enlarges.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(64, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.convolution(images))).flatten(1)
        logits: Tensor = self.head(torch.tanh(self.hidden(features)))
        return logits


class Words(nn.Module):
    """An embedding, sparse or not, whose rows several examples share."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8, sparse=sparse)
        self.head = nn.Linear(8, 4)

    def forward(self, words: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(words).mean(1))
        return logits


def net(seed: int = 1) -> Net:
    """The same model on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def small_net() -> nn.Module:
    """3 parameters, where every collective counts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Flatten(), nn.Tanh(),
                             nn.Linear(64, 4))


class Branches(nn.Module):
    """Every rank can take another branch; one is taken by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(36, 8)
        self.branches = nn.ModuleList(nn.Linear(8, 4) for _ in range(5))

    def forward(self, x: Tensor, branch: int) -> Tensor:
        return self.branches[branch](torch.tanh(self.trunk(x.flatten(1))))


def branches() -> Branches:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return Branches()


def branch_loss(model: nn.Module, branch: int, *key: int) -> Tensor:
    return nn.functional.cross_entropy(model(images(*key), branch), labels(*key))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, head: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 4))
        self.first, self.head = nn.Linear(36, 36), nn.Linear(4, 4) if head else nn.Identity()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        inner = checkpoint(self.inner, self.first(x.flatten(1)), use_reentrant=self.reentrant)
        return self.head(inner)


def words(sparse: bool) -> Words:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Words(sparse)


def images(*key: int, count: int = 4) -> Tensor:
    """(count, 1, 6, 6): the same for the same key, such as (rank, step)."""
    return torch.randn(count, 1, 6, 6, generator=_generator(key))


def word_lists(*key: int, count: int = 4) -> Tensor:
    return torch.randint(12, (count, 3), generator=_generator(key))


def labels(*key: int, count: int = 4) -> Tensor:
    return torch.randint(4, (count,), generator=_generator((*key, 7)))


def loss_of(model: nn.Module, *key: int) -> Tensor:
    """The mean loss over the examples of a key."""
    inputs = word_lists(*key) if isinstance(model, Words) else \
        images(*key).to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(inputs), labels(*key))


def mean_gradient(model: nn.Module, ranks: Iterable[int], *key: int) -> list[Tensor]:
    """What an exchange between these ranks must give, computed by this rank alone."""
    losses = [loss_of(model, rank, *key) for rank in ranks]
    return list(torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters())))


def close(left: Iterable[Tensor], right: Iterable[Tensor], tolerance: float = 1e-6) -> bool:
    """Equal to rounding."""
    return all(torch.allclose(a.detach().double(), b.detach().double(), rtol=10 * tolerance,
                              atol=tolerance) for a, b in zip(left, right, strict=True))


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def assert_ranks_agree(world: World, tensors: Iterable[Tensor], what: str = "weights") -> None:
    """The same bits on every rank, and finite."""
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    everyone = world.allgather(flat[None], name=f"agree.{what}").wait()
    assert bool(everyone.isfinite().all()), f"{what} are not finite"
    assert torch.equal(everyone, flat.expand(world.size, -1)), f"the ranks differ in {what}"


def raised(kind: type[BaseException], call: Any, *args: Any) -> str:
    """The message of the error that a call must raise."""
    try:
        call(*args)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


def _generator(key: Sequence[int]) -> torch.Generator:
    seed = 1
    for part in key:
        seed = seed * 1_000_003 + part + 17
    return torch.Generator().manual_seed(seed % 2 ** 63)


class Spy(World):
    """Another world that remembers, in order, what was asked of it and what it was told."""

    def __init__(self, world: World) -> None:
        self.world, self.events = world, list[str]()
        self.rank, self.size = world.rank, world.size
        self.local_rank, self.local_size = world.local_rank, world.local_size

    def tell(self, event: str) -> None:
        self.events.append(event)

    def count(self, what: str) -> int:
        return self.world.count(what)

    @property
    def order(self) -> Any:
        return self.world.order

    def allreduce_(self, tensor: Tensor, **options: Any) -> Any:
        self.events.append("allreduce")
        return self.world.allreduce_(tensor, **options)

    def allgather(self, tensor: Tensor, **options: Any) -> Any:
        self.events.append("allgather")
        return self.world.allgather(tensor, **options)

    def alltoall(self, tensor: Tensor, splits: Any, **options: Any) -> Any:
        self.events.append("alltoall")
        return self.world.alltoall(tensor, splits, **options)

    def group(self, size: int) -> World:
        return self.world.group(size)

    def broadcast_(self, tensor: Tensor, **options: Any) -> Any:
        self.events.append("broadcast")
        return self.world.broadcast_(tensor, **options)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


def wrap(model: nn.Module, inner: torch.optim.Optimizer | None = None, **options: Any) -> Any:
    return hvdnoise.DistributedOptimizer(inner or sgd(model), model.named_parameters(), **options)


def step_by_hand(world: World, model: nn.Module, optimizer: torch.optim.Optimizer, *key: int,
                 change: Callable[[], Any] = lambda: None) -> None:
    """A step on the mean gradient of all ranks; ``change`` may clip it."""
    for p, grad in zip(model.parameters(), mean_gradient(model, range(world.size), *key)):
        p.grad = grad
    change()
    optimizer.step()


def step(world: World, model: nn.Module, optimizer: Any, *key: int) -> None:
    optimizer.zero_grad()
    loss_of(model, world.rank, *key).backward()
    optimizer.step()
