"""Without noise, the trained weights are bit for bit those of ``hvd.DistributedOptimizer``.

Both reduce one tensor per parameter here: ``bucket_bytes=0`` on our side, no fusion on Horovod's.
With larger buckets the same numbers are added, but with four ranks in another order: a ring
starts its sum at the rank that the place in the buffer says. After 50 steps of this model the
largest difference of a weight is 2e-7 (SGD) or 1e-7 (Adam) under Gloo, and none under MPI, whose
small messages are summed in one order.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, Callable

import horovod.torch as hvd
import torch

import hvdnoise
from hvdnoise.comm import World
from tests.checks import on
from tests.launcher import MARKER
from tests.parallel.toys import (
    Spy,
    assert_ranks_agree,
    loss_of,
    net,
    raised,
    same_bits,
    small_net,
    weights,
    words,
)

if MARKER in os.environ:  # in a rank, before Horovod starts
    os.environ |= {"HOROVOD_FUSION_THRESHOLD": "0", "HOROVOD_DYNAMIC_PROCESS_SETS": "1"}

WORLDS = ("gloo-2", "mpi-2", "mpi-4")  # and Gloo with four for what its ring could change
ALL = ("gloo-1", "mpi-1", "gloo-4", *WORLDS)
EXACT_ORDER = ("gloo-2", "mpi-2")  # where a + b is all there is to add

TOLERANCE = 1e-5  # of a weight, where buckets change the order of additions
CHECK_SECONDS = 150
SGD = dict(lr=0.1, momentum=0.9, weight_decay=1e-3)


def sgd(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **dict(SGD, **options))


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(world: World, wrap: Callable[..., Any], make_optimizer: Callable[..., Any],
          model: torch.nn.Module, *, steps: int = 8, passes: int = 1, broadcast: bool = False,
          world_given: World | None = None, **options: Any) -> list[torch.Tensor]:
    """The weights after some steps of the loop that Horovod's documentation has."""
    if world_given is not None:
        options["world"] = world_given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        optimizer = wrap(make_optimizer(model), named_parameters=model.named_parameters(),
                         **options)
    if broadcast:
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(passes):
            loss_of(model, hvd.rank(), step, part).backward()
        optimizer.step()
    return weights(model)


def assert_equal(world: World, make_optimizer: Callable[..., Any],
                 make_model: Callable[[], torch.nn.Module] = net, *, agree: bool = True,
                 own: dict[str, Any] | None = None, **options: Any) -> list[torch.Tensor]:
    own = {"bucket_bytes": 0} if own is None else own
    theirs = train(world, hvd.DistributedOptimizer, make_optimizer, make_model(), **options)
    ours = train(world, hvdnoise.DistributedOptimizer, make_optimizer, make_model(), **options,
                 **own)
    assert not same_bits(ours, weights(make_model())), "nothing was trained"
    assert same_bits(ours, theirs), max(float((a - b).abs().max()) for a, b in zip(ours, theirs))
    if agree:
        assert_ranks_agree(world, ours)
    return ours


def assert_equal_for_long(world: World, make_optimizer: Callable[..., Any]) -> None:
    """50 steps; also how far away one bucket for all parameters ends."""
    theirs = assert_equal(world, make_optimizer, small_net, steps=50)
    if world.size > 2:
        bucketed = train(world, hvdnoise.DistributedOptimizer, make_optimizer, small_net(),
                         steps=50, bucket_bytes=2 ** 20)
        assert_ranks_agree(world, bucketed)
        largest = max(float((a - b).abs().max()) for a, b in zip(bucketed, theirs))
        print(f"one bucket, {make_optimizer.__name__}, {world.size} ranks: {largest:.2e}")
        assert largest <= TOLERANCE, largest


@on(*ALL)
def check_sgd_with_momentum(world: World) -> None:
    assert_equal_for_long(world, sgd)


@on(*ALL)
def check_adam(world: World) -> None:
    assert_equal_for_long(world, adam)


def check_whole_loop_with_broadcasts(world: World) -> None:
    """With Horovod's two broadcasts before, from different models on the ranks."""
    for make in (adam, lambda model: sgd(model, weight_decay=0)):
        theirs = train(world, hvd.DistributedOptimizer, make, net(hvd.rank()), broadcast=True)
        ours = train(world, hvdnoise.DistributedOptimizer, make, net(hvd.rank()), broadcast=True,
                     bucket_bytes=0)
        assert same_bits(ours, theirs)
        assert_ranks_agree(world, ours)


def check_fp16_compression(world: World) -> None:
    compressed = assert_equal(world, sgd, compression=hvd.Compression.fp16)
    plain = train(world, hvdnoise.DistributedOptimizer, sgd, net(), bucket_bytes=0)
    assert not same_bits(compressed, plain), "nothing was compressed"


def check_backward_passes_per_step(world: World) -> None:
    assert_equal(world, sgd, passes=2, backward_passes_per_step=2)


def check_sum(world: World) -> None:
    assert_equal(world, lambda model: sgd(model, lr=0.02), op=hvd.Sum)


def check_gradient_predivide_factor(world: World) -> None:
    assert_equal(world, adam, gradient_predivide_factor=3.0)


def collectives_in_a_step(world: World, wrap: Callable[..., Any] = hvdnoise.DistributedOptimizer,
                          **options: Any) -> int:
    spy = Spy(world)
    train(world, wrap, sgd, net(), steps=1, world_given=spy, **options)
    return spy.events.count("allreduce")


@on(*EXACT_ORDER)
def check_groups_as_a_number(world: World) -> None:
    for groups in (3, 1):
        assert_equal(world, sgd, own={}, groups=groups)
        assert collectives_in_a_step(world, groups=groups) == groups


@on(*EXACT_ORDER)
def check_num_groups(world: World) -> None:
    assert_equal(world, sgd, own={}, num_groups=2)
    assert collectives_in_a_step(world, num_groups=2) == 2


def in_lists(wrap: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Groups of ``size`` of the model's parameters; the last four are in none."""
    def wrap_grouped(inner: torch.optim.Optimizer, **options: Any) -> Any:
        parameters = inner.param_groups[0]["params"][:4]
        groups = [parameters[start:start + size] for start in range(0, 4, size)]
        return wrap(inner, groups=groups, **options)
    return wrap_grouped


def check_groups_as_lists(world: World) -> None:
    """Groups of one at any number of ranks; of more where the order of additions is no matter."""
    for size in (1, 2) if world.size == 2 else (1,):
        theirs = train(world, in_lists(hvd.DistributedOptimizer, size), sgd, net())
        ours = train(world, in_lists(hvdnoise.DistributedOptimizer, size), sgd, net())
        assert same_bits(ours, theirs)
        spying = in_lists(hvdnoise.DistributedOptimizer, size)
        assert collectives_in_a_step(world, spying) == 4 // size + 3


def check_sparse_as_dense(world: World) -> None:
    """Also what only takes sparse gradients."""
    assert_equal(world, lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
                 lambda: words(sparse=True), sparse_as_dense=True)
    model: Any = words(sparse=True)
    model.head.requires_grad_(False)
    train(world, hvdnoise.DistributedOptimizer, lambda model: torch.optim.SparseAdam(
        model.embedding.parameters(), lr=0.1), model, sparse_as_dense=True)
    assert model.embedding.weight.grad.is_sparse
    assert_ranks_agree(world, model.parameters())


def check_sparse(world: World) -> None:
    """An allgather of indices and values."""
    for make in (lambda model: torch.optim.SGD(model.parameters(), lr=0.5),
                 lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)):
        assert_equal(world, make, lambda: words(sparse=True))


def check_sparse_equals_dense(world: World) -> None:
    """Our own two ways, to rounding: what is gathered adds up to what is reduced."""
    options = dict(make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.5),
                   bucket_bytes=0)
    dense = train(world, hvdnoise.DistributedOptimizer, model=words(False), **options)
    sparse = train(world, hvdnoise.DistributedOptimizer, model=words(True), **options)
    for a, b in zip(dense, sparse):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@on("gloo-4", "mpi-4")
def check_process_set(world: World) -> None:
    """Some ranks train together; the rest, in no set, each for itself."""
    part = _process_set([0, 2, 3])
    ours = assert_equal(world, sgd, process_set=part, agree=False)
    alone = train(world, lambda inner, named_parameters: inner, sgd, net())
    assert same_bits(ours, alone) == (not part.included())


_process_sets: dict[tuple[int, ...], Any] = {}


def _process_set(ranks: list[int]) -> Any:
    """The Horovod of this launch was started without the set, and may be asked to add it once."""
    if tuple(ranks) not in _process_sets:
        _process_sets[tuple(ranks)] = hvd.add_process_set(ranks)
    return _process_sets[tuple(ranks)]


@on("mpi-2", "mpi-4")
def check_adasum(world: World) -> None:
    """Horovod's own optimizer; it has Adasum on the CPU with MPI only."""
    assert_equal(world, sgd, op=hvd.Adasum, own={})
    part = _process_set([0, 1]) if world.size > 2 else None
    if part is not None:
        text = raised(NotImplementedError, lambda: hvdnoise.DistributedOptimizer(
            sgd(net()), op=hvd.Adasum, process_set=part))
        assert "process set" in text
