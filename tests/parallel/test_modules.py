"""Models that use their parameters in uncommon ways: not at all, twice, compiled, in other strides.

Documented: a parameter without a gradient on some ranks counts as zero there; on all ranks it
gets a gradient of zeros. So it is with Horovod, which is the oracle for it.
"""

from __future__ import annotations

import itertools
import time
import warnings
from typing import Any, Callable

import horovod.torch as hvd
import torch
from torch import Tensor, nn

import hvdnoise
from hvdnoise.comm import World
from tests.checks import on
from tests.parallel.toys import (
    Checkpointed,
    assert_ranks_agree,
    branch_loss,
    branches,
    close,
    gradients,
    images,
    labels,
    loss_of,
    mean_gradient,
    net,
    raised,
    same_bits,
    sgd,
    step,
    step_by_hand,
    weights,
    wrap,
)

HOROVOD = "gloo-2", "mpi-2"  # for what is compared with its own optimizer
WORLDS = (*HOROVOD, "torchrun-2")


@on(*HOROVOD)
def check_parameters_unused_on_some_or_all_ranks(world: World) -> None:
    """Weight decay and momentum reach the unused ones too, with or without zero_grad to None."""
    results = []
    for wrapping in (hvd.DistributedOptimizer, hvdnoise.DistributedOptimizer):
        model = branches()
        options: dict[str, Any] = {"bucket_bytes": 0} if wrapping is not hvd.DistributedOptimizer \
            else {}
        optimizer = wrapping(sgd(model), model.named_parameters(), **options)
        for n in range(3):
            optimizer.zero_grad()
            branch_loss(model, (world.rank + n) % 2 if n else world.rank, world.rank, n).backward()
            optimizer.step()
        results.append(weights(model))
    assert same_bits(*results)
    assert_ranks_agree(world, results[0])
    assert all(p.grad is not None and not p.grad.any() for p in model.branches[4].parameters())
    assert not same_bits(weights(model.branches[4]), weights(branches().branches[4]))


def check_a_rank_whose_loss_reaches_nothing(world: World) -> None:
    """It takes part with zeros when it says so; otherwise step() says what to do."""
    model = net()
    optimizer = wrap(model)
    expected = [grad / world.size for grad in mean_gradient(model, [0], 0)]
    if world.rank == 0:
        loss_of(model, 0, 0).backward()
    else:
        assert "synchronize()" in raised(RuntimeError, optimizer.step)
        optimizer.synchronize()
    assert close(gradients(model), expected)
    optimizer.step()
    step(world, model, optimizer, 1)
    assert_ranks_agree(world, model.parameters())


def check_requires_grad_toggled(world: World) -> None:
    """Frozen at first, trained later, frozen again; with and without noise."""
    for noise in (None, hvdnoise.GNC(radius=0.0), hvdnoise.GNC(radius=0.1, source="gathered")):
        model, twin = net(), net()
        optimizer, plain = wrap(model, noise=noise), sgd(twin)
        for n in range(6):
            for m in (model, twin):
                m.hidden.requires_grad_(2 <= n < 4)
            step(world, model, optimizer, n)
            losses = torch.stack([loss_of(twin, rank, n) for rank in range(world.size)])
            plain.zero_grad()
            losses.mean().backward()
            plain.step()
        mixes = noise is not None and noise.rows == "mixtures"
        assert close(model.parameters(), twin.parameters()) or mixes
        assert_ranks_agree(world, model.parameters())


def check_two_optimizers_on_one_backward(world: World) -> None:
    """As in adversarial training: G's loss reaches D's parameters too, and D clears them."""
    torch.manual_seed(3)
    g, d = nn.Linear(3, 3), nn.Linear(3, 1)
    g_hand, d_hand = nn.Linear(3, 3), nn.Linear(3, 1)
    g_hand.load_state_dict(g.state_dict())
    d_hand.load_state_dict(d.state_dict())

    def play(g: nn.Module, d: nn.Module, g_opt: Any, d_opt: Any, n: int, ranks: list[int]) -> None:
        z = torch.stack([images(rank, n)[:3, 0, 0, :3] for rank in ranks])
        d_opt.zero_grad()
        (d(g(z).detach()).square().mean() - d(z).mean()).backward()
        d_opt.step()
        g_opt.zero_grad()
        d(g(z)).mean().neg().backward()
        g_opt.step()

    opts = [hvdnoise.DistributedOptimizer(torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
                                          m.named_parameters()) for m in (g, d)]
    plain = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (g_hand, d_hand)]
    for n in range(3):
        play(g, d, *opts, n, [world.rank])
        play(g_hand, d_hand, *plain, n, list(range(world.size)))
    assert close([*g.parameters(), *d.parameters()], [*g_hand.parameters(), *d_hand.parameters()])


def check_models_alike_in_every_name(world: World) -> None:
    """Two optimizers, one backward through both: their buckets are under way together."""
    pair, hand = [net(1), net(2)], [net(1), net(2)]
    optimizers, plain = [wrap(model) for model in pair], [sgd(model) for model in hand]
    for n in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.stack([loss_of(model, world.rank, n) for model in pair]).sum().backward()
        for optimizer in optimizers[::-1]:
            optimizer.step()
        for model, optimizer in zip(hand, plain):
            step_by_hand(world, model, optimizer, n)
    for model, twin in zip(pair, hand):
        assert close(model.parameters(), twin.parameters())


def check_gradient_of_gradient(world: World) -> None:
    """A penalty by autograd.grad(create_graph=True); then backward(create_graph=True) itself."""
    for create_graph in (False, True):
        model, twin = branches(), branches()
        optimizer, plain = wrap(model), sgd(twin)

        def loss(m: nn.Module, rank: int, n: int) -> Tensor:
            x = images(rank, n).requires_grad_()
            (slope,) = torch.autograd.grad(m(x, 0).sum(), x, create_graph=True)
            return branch_loss(m, 0, rank, n) + slope.square().sum()

        for n in range(2):
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the memory that a graph in p.grad keeps
                loss(model, world.rank, n).backward(create_graph=create_graph, retain_graph=True)
            optimizer.step()
            plain.zero_grad()
            torch.stack([loss(twin, rank, n) for rank in range(world.size)]).mean().backward()
            for p in twin.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            plain.step()
        assert close(model.parameters(), twin.parameters())
        assert not any(p.grad.requires_grad for p in model.parameters() if p.grad is not None)


def check_channels_last(world: World) -> None:
    """Gradients have the strides of the weights, at which fused optimizers do not look."""
    for fused, before in itertools.product((True, False), (True, False)):
        model, twin = net(), net()
        # a convolution whose strides differ: more than one channel in and out
        model.convolution, twin.convolution = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3)
        for m in (model, twin):
            with torch.no_grad():
                for p in m.convolution.parameters():
                    p.copy_(torch.linspace(-0.3, 0.3, p.numel()).view(p.shape).sin())
        if before:
            model.to(memory_format=torch.channels_last)
        optimizer = wrap(model, torch.optim.Adam(model.parameters(), lr=0.01, fused=fused))
        model.to(memory_format=torch.channels_last)
        assert not model.convolution.weight.is_contiguous()
        plain = torch.optim.Adam(twin.parameters(), lr=0.01)

        def loss(m: nn.Module, rank: int, n: int) -> Tensor:
            two = images(rank, n).expand(-1, 2, -1, -1) * torch.tensor([1.0, 0.5])[:, None, None]
            return nn.functional.cross_entropy(m(two), labels(rank, n))

        for n in range(3):
            optimizer.zero_grad()
            loss(model, world.rank, n).backward()
            assert all(p.grad is not None and p.grad.stride() == p.stride()
                       for p in model.parameters())
            optimizer.step()
            plain.zero_grad()
            torch.stack([loss(twin, rank, n) for rank in range(world.size)]).mean().backward()
            plain.step()
        # the bias before batch normalization has a gradient of rounding errors only
        names = [name for name, _ in model.named_parameters() if name != "convolution.bias"]
        assert close([model.get_parameter(name) for name in names],
                     [twin.get_parameter(name) for name in names], 1e-5), (fused, before)


def check_activation_checkpoints(world: World) -> None:
    """Not reentrant: they work. Reentrant: they work, or an error names the remedy."""
    for head in (True, False):
        torch.manual_seed(4)
        model, twin = Checkpointed(False, head), Checkpointed(False, head)
        twin.load_state_dict(model.state_dict())
        optimizer, plain = wrap(model), sgd(twin)
        for n in range(2):
            step(world, model, optimizer, n)
            step_by_hand(world, twin, plain, n)
        assert close(model.parameters(), twin.parameters())
        model.reentrant = True
        if head:  # the outer backward has begun before the inner one
            step(world, model, optimizer, 2)
            step_by_hand(world, twin, plain, 2)
            assert close(model.parameters(), twin.parameters())
        else:
            optimizer.zero_grad()
            text = raised(RuntimeError, loss_of(model, world.rank, 2).backward)
            assert "use_reentrant=False" in text


def check_compiled_models(world: World) -> None:
    """Compiled before or after wrapping, as an object or in place, with displaced weights too."""
    import torch._dynamo

    def trained(noise: Any, compiling: Callable[[nn.Module], nn.Module] | None, before: bool
                ) -> list[Tensor]:
        torch._dynamo.reset()
        model: Any = net()
        called = model
        if compiling and before:
            called = compiling(model)
        optimizer = wrap(called, noise=noise)
        if compiling and not before:
            called = compiling(model)
        for n in range(4):
            step(world, called, optimizer, n)
        assert_ranks_agree(world, model.parameters())
        return weights(model)

    def as_object(model: Any) -> Any:
        return torch.compile(model, backend="aot_eager")

    def in_place(model: Any) -> Any:
        model.compile(backend="eager")
        return model

    for make_noise in (lambda: None, lambda: hvdnoise.GNC(radius=0.5),
                       lambda: hvdnoise.CovarianceNoise("isotropic", 2)):
        eager = trained(make_noise(), None, False)
        for compiling, before in itertools.product((as_object, in_place), (True, False)):
            compiled = trained(make_noise(), compiling, before)
            assert close(compiled, eager, 1e-5), (make_noise(), compiling, before)


def check_another_model_on_one_rank(world: World) -> None:
    """An error on every rank that names the rank, at once; the world lives on."""
    model: Any = net() if world.rank == 0 else branches()
    optimizer = wrap(model)
    loss = loss_of(model, 0) if world.rank == 0 else branch_loss(model, 0, 0)
    started = time.monotonic()
    text = raised(ValueError, loss.backward)
    assert "rank 1" in text and "parameters" in text, text
    assert time.monotonic() - started < 10
    world.barrier("after")
    assert optimizer.param_groups
