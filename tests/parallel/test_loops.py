"""Loops that nobody here wrote: odd orders of calls, two of a thing, half of a thing.

Right values come from plain Horovod (no noise), or, under GNC, from a twin model that has the
displaced weights for real: what each forward saw is recorded inside of it, and the twin's gradients
there are averaged over the ranks.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from typing import Any, Callable, Iterator

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint_sequential

import hvdnoise
from hvdnoise import GNC, CovarianceNoise, streams
from hvdnoise.comm import World
from tests import reference
from tests.checks import on
from tests.parallel.toys import (
    assert_ranks_agree,
    images,
    labels,
    mean_gradient,
    net,
    raised,
    same_bits,
    weights,
)
from tests.toys import relative_error, seen, vector

HOROVOD = "gloo-2", "mpi-2"  # for what is compared with its own optimizer
WORLDS = (*HOROVOD, "torchrun-2")
RADIUS = 0.3


class Watched:
    """A model in training under GNC, two steps under way, with what its forwards saw."""

    def __init__(self, world: World, model: nn.Module | None = None, *, steps: int = 2,
                 noise: Any = None, **options: Any) -> None:
        self.world, self.model = world, (model or net()).double()
        self.twin = copy.deepcopy(self.model)
        self.forwards: list[tuple[Tensor, Tensor, Tensor]] = []  # weights, inputs, outputs
        self.model.register_forward_hook(lambda m, x, y: self.forwards.append((seen(m), x[0], y)))
        self.optimizer: Any = hvdnoise.DistributedOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9),
            self.model.named_parameters(), noise=noise or GNC(RADIUS), **options)
        for n in range(steps):
            for _ in range(options.get("backward_passes_per_step", 1)):
                self.loss(n).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.forwards.clear()

    def loss(self, n: int) -> Tensor:
        return F.cross_entropy(self.model(images(self.world.rank, n).double()),
                               labels(self.world.rank, n))

    def expected(self, *key: int) -> Tensor:
        """The mean over the ranks of the twin's gradients at the weights of forwards ``key``."""
        total = torch.zeros_like(vector(self.twin.parameters()))
        for n, (vector_P, x, _) in zip(key, self.forwards):
            assert not torch.equal(vector_P, vector(self.model.parameters())), "not displaced"
            nn.utils.vector_to_parameters(vector_P, self.twin.parameters())
            self.twin.train()
            loss = F.cross_entropy(self.twin(x), labels(self.world.rank, n))
            total += vector(torch.autograd.grad(loss, list(self.twin.parameters())))
        return self.world.allreduce_(total, name="expected").wait()

    def assert_gradients(self, *key: int) -> None:
        self.optimizer.synchronize()  # there may be another optimizer
        found = vector(p.grad for p in self.model.parameters())
        error = relative_error(found, self.expected(*key))
        assert error < 1e-9, error
        self.optimizer.step()
        assert_ranks_agree(self.world, self.model.parameters())
        assert self.optimizer.noise_coverage.missed == 0


def check_zero_grad_between_forward_and_backward(world: World) -> None:
    for clear in (lambda run: run.optimizer.zero_grad(), lambda run: run.model.zero_grad(),
                  lambda run: run.optimizer.zero_grad(set_to_none=False)):
        run = Watched(world)  # with batch normalization
        loss = run.loss(5)
        clear(run)
        loss.backward()
        run.assert_gradients(5)


def check_several_forwards_then_backwards(world: World) -> None:
    run = Watched(world, backward_passes_per_step=2)
    for loss in [run.loss(n) for n in (5, 6)]:
        loss.backward()
    run.assert_gradients(5, 6)


def check_one_graph_backward_twice(world: World) -> None:
    run = Watched(world, backward_passes_per_step=2)
    loss = run.loss(5)
    loss.backward(retain_graph=True)
    loss.backward()
    run.forwards *= 2
    run.assert_gradients(5, 5)


def check_a_rank_without_a_gradient(world: World) -> None:
    """It has made a forward, and takes part with zeros; the update is not lost."""
    run = Watched(world)
    before = vector(run.model.parameters())
    loss = run.loss(5)
    if world.rank == 0:
        loss.backward()
    else:
        run.optimizer.synchronize()
    run.optimizer.step()
    assert not torch.equal(vector(run.model.parameters()), before)
    assert_ranks_agree(world, run.model.parameters())


def check_gradients_set_by_hand(world: World) -> None:
    run = Watched(world)
    parameters = list(run.model.parameters())
    for p, grad in zip(parameters, torch.autograd.grad(run.loss(5), parameters)):
        p.grad = grad
    run.optimizer.synchronize()
    run.assert_gradients(5)


def check_backward_with_inputs(world: World) -> None:
    """Of a part of the parameters: the others count as zero; clipping of weights stays."""
    run = Watched(world)
    loss = run.loss(5)
    loss.backward(inputs=list(run.model.head.parameters()))
    with torch.no_grad():
        for p in run.model.parameters():
            p.clamp_(-0.1, 0.1)
    assert max(float(p.detach().abs().max()) for p in run.model.parameters()) <= 0.1
    expected = run.expected(5)
    for p in run.model.parameters():
        count = sum(q is p for q in run.model.head.parameters()) * p.numel()
        part, expected = expected[:p.numel()], expected[p.numel():]
        assert relative_error(p.grad.flatten(), part if count else 0 * part) < 1e-9
    run.optimizer.step()


def check_a_thread_that_evaluates(world: World) -> None:
    """It sees clean weights, and training sees displaced ones, at every moment."""
    run, stop, wrong = Watched(world, nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(),
                                                    nn.Linear(16, 4))), [], list[bool]()
    x = images(9).double()
    run.twin.load_state_dict(run.model.state_dict())
    right = run.twin(x).detach()

    def evaluate() -> None:
        with torch.no_grad():
            while not stop:
                wrong.append(not torch.equal(run.model(x), right))
    run.model._forward_hooks.clear()
    thread = threading.Thread(target=evaluate)
    thread.start()
    try:
        outputs = [run.model(x).detach() for _ in range(200)]  # in training mode, with gradients
    finally:
        stop.append(1)
        thread.join(30)
    assert len(wrong) > 0 and not any(wrong)
    assert all(torch.equal(each, outputs[0]) for each in outputs)


# ---- adversarial training

class Game:
    """A generator and a discriminator whose weights in each forward are recorded."""

    def __init__(self, world: World, noise: Callable[[], Any], wrap: Any = None) -> None:
        torch.manual_seed(3)
        self.world = world
        self.g, self.d = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        self.displaced: dict[nn.Module, list[bool]] = {self.g: [], self.d: []}
        for model in (self.g, self.d):
            model.register_forward_hook(lambda m, *_: self.displaced[m].append(
                not torch.equal(seen(m), vector(m.parameters()))))
        options = {} if wrap else {"noise": noise(), "bucket_bytes": 0}
        self.opts = [(wrap or hvdnoise.DistributedOptimizer)(
            torch.optim.SGD(m.parameters(), 0.1, momentum=0.9), m.named_parameters(), **options)
            for m in (self.g, self.d)]

    def step(self, n: int, clear: Callable[[nn.Module, Any], Any], toggle: bool) -> None:
        z = images(self.world.rank, n)[:3, 0, 0, :3]
        (g_opt, d_opt) = self.opts
        clear(self.d, d_opt)
        (self.d(self.g(z).detach()).square().mean() - self.d(z).mean()).backward()
        d_opt.step()
        if toggle:
            self.d.requires_grad_(False)
        clear(self.g, g_opt)
        if toggle:
            clear(self.d, d_opt)
        self.d(self.g(z)).mean().neg().backward()
        g_opt.step()
        if toggle:
            self.d.requires_grad_(True)


@on(*HOROVOD)
def check_gan(world: World) -> None:
    """The discriminator is displaced in all its steps, whatever reached it in between."""
    ways: list[Callable[[nn.Module, Any], Any]] = [
        lambda model, optimizer: optimizer.zero_grad(), lambda model, optimizer: model.zero_grad()]
    for clear in ways:
        for toggle in (True, False):
            for source in ("own", "gathered"):
                game = Game(world, lambda: GNC(RADIUS, source=source))
                for n in range(6):
                    game.step(n, clear, toggle)
                frozen = 18 - 6 if toggle else 18  # in the generator's step there is no weight
                d = game.displaced[game.d]
                assert sum(d) == frozen - 2 - (not toggle) * 0, (d, toggle)
                assert sum(game.displaced[game.g]) == 10, game.displaced[game.g]
                for optimizer in game.opts:
                    assert (optimizer.noise_coverage.due, optimizer.noise_coverage.missed) == (5, 0)
                assert_ranks_agree(world, [*game.g.parameters(), *game.d.parameters()])
            trained = [weights_of(world, wrap, clear, toggle)
                       for wrap in ((hvd.DistributedOptimizer, None) if toggle else (None, None))]
            assert same_bits(*trained)


def weights_of(world: World, wrap: Any, clear: Any, toggle: bool) -> list[Tensor]:
    """Without noise; by plain Horovod where it can."""
    game = Game(world, lambda: None, wrap)
    for n in range(4):
        game.step(n, clear, toggle)
    return [*weights(game.g), *weights(game.d)]


# ---- evaluation mode

def check_an_encoder_in_evaluation_mode(world: World) -> None:
    """Its gradients are those of its clean weights, which is told; the head is displaced."""
    encoder, head = nn.Linear(36, 8).double(), nn.Linear(8, 4).double()
    pair = nn.ModuleList([encoder, head])
    optimizer: Any = hvdnoise.DistributedOptimizer(
        torch.optim.SGD(pair.parameters(), 0.1), pair.named_parameters(), noise=GNC(RADIUS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(4):
            encoder.eval()
            saw: list[Tensor] = []
            handle = head.register_forward_hook(lambda m, *_: saw.append(seen(m)))
            x = images(world.rank, n).double().flatten(1)
            optimizer.zero_grad()
            F.cross_entropy(head(torch.tanh(encoder(x))), labels(world.rank, n)).backward()
            handle.remove()
            twin = copy.deepcopy(pair)
            nn.utils.vector_to_parameters(saw[0], twin[1].parameters())
            loss = F.cross_entropy(twin[1](torch.tanh(twin[0](x))), labels(world.rank, n))
            expected = vector(torch.autograd.grad(loss, list(twin.parameters())))
            expected = world.allreduce_(expected, name="expected").wait()
            found = vector(p.grad for p in pair.parameters())
            assert relative_error(found, expected) < 1e-9
            optimizer.step()
    told = [str(each.message) for each in caught if "noise" in str(each.message)]
    assert len(told) == 1 and "Linear was called in evaluation mode" in told[0], told
    assert (optimizer.noise_coverage.due, optimizer.noise_coverage.missed) == (3, 3)


# ---- how many examples a worker has

def assert_full_covariance(world: World, loss: Callable[[], Tensor], parameters: list[Tensor],
                           optimizer: Any, b: int) -> None:
    """p.grad is the mean of the workers' gradients with the weights of identity I1, for b."""
    mine = vector(torch.autograd.grad(loss(), parameters))
    optimizer.zero_grad()
    loss().backward()
    epsilon_W = streams.normal(world.size, 0, "full-workers", 0, dtype=torch.float64)
    factor = float(reference.worker_weights(epsilon_W, b, 2)[world.rank])
    expected = world.allreduce_(mine * factor, name="expected").wait()
    assert relative_error(vector(p.grad for p in parameters), expected) < 1e-9
    assert optimizer.examples_per_worker == b
    optimizer.step()


def check_a_chain_of_networks_has_one_batch(world: World) -> None:
    for kind in ("chain", "checkpoints", "twice"):
        torch.manual_seed(1)
        chain = nn.Sequential(nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(),
                              nn.Linear(8, 4)).double()
        optimizer: Any = hvdnoise.DistributedOptimizer(
            torch.optim.SGD(chain.parameters(), 0.1), chain.named_parameters(),
            noise=CovarianceNoise("full", 2))
        x, y = images(world.rank, count=8).double().flatten(1), labels(world.rank, count=8)

        def loss() -> Tensor:
            if kind == "chain":
                h = x
                for part in chain:
                    h = part(h)
                return F.cross_entropy(h, y)
            if kind == "twice":
                return F.cross_entropy(chain(x), y) + chain(-x).square().mean()
            return F.cross_entropy(checkpoint_sequential(chain, 3, x, use_reentrant=False), y)
        assert_full_covariance(world, loss, list(chain.parameters()), optimizer, 8)


def check_calls_that_disagree_ask_for_the_batch_size(world: World) -> None:
    model: Any = nn.ModuleDict({"words": nn.Embedding(5, 4), "images": nn.Linear(3, 4)}).double()

    def backward(**options: Any) -> None:
        optimizer = hvdnoise.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(),
            noise=CovarianceNoise("full", 2, **options))
        tokens, pictures = torch.zeros(24, dtype=torch.int64), torch.ones(8, 3).double()
        (model["words"](tokens).sum() + model["images"](pictures).sum()).backward()
        optimizer.step()
    text = raised(ValueError, backward)
    assert "batch_size=" in text and "8 and 24" in text and "\n" not in text
    backward(batch_size=8)


def check_ranks_with_batches_of_different_sizes(world: World) -> None:
    """As the last of an epoch may be; the noise on the mean is the same on all ranks."""
    for structure in ("isotropic", "full"):
        model = net()
        optimizer: Any = hvdnoise.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(),
            noise=CovarianceNoise(structure, 4))
        for n in range(3):
            optimizer.zero_grad()
            count = 4 + 3 * world.rank
            F.cross_entropy(model(images(world.rank, n, count=count)),
                            labels(world.rank, n, count=count)).backward()
            optimizer.step()
            assert_ranks_agree(world, model.parameters())


# ---- several optimizers

class Tasks:
    """A trunk and a head a task, an optimizer each; a rank trains the head of its own task."""

    def __init__(self, wrap: Any, **options: Any) -> None:
        torch.manual_seed(5)
        self.trunk = nn.Linear(36, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 4) for _ in range(2))
        self.opts = [wrap(torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
                          [(f"{name}.{n}", p) for n, p in m.named_parameters()], **options)
                     for name, m in (("trunk", self.trunk), ("a", self.heads[0]),
                                     ("b", self.heads[1]))]

    def step(self, rank: int, n: int, task: int, order: list[int]) -> None:
        for optimizer in self.opts:
            optimizer.zero_grad()
        x = torch.tanh(self.trunk(images(rank, n).flatten(1)))
        F.cross_entropy(self.heads[task](x), labels(rank, n)).backward()
        for index in order:
            self.opts[index].step()

    def weights(self) -> list[Tensor]:
        return [*weights(self.trunk), *weights(self.heads)]


@on(*HOROVOD)
def check_a_head_for_each_rank(world: World) -> None:
    """Steps in which the ranks are alike, and such in which each trains its own head."""
    runs = [Tasks(hvd.DistributedOptimizer),
            Tasks(hvdnoise.DistributedOptimizer, bucket_bytes=0)]
    for n in range(6):
        for run in runs:
            run.step(world.rank, n, 0 if n < 2 else world.rank, [0, 1, 2])
    assert same_bits(runs[0].weights(), runs[1].weights())
    assert_ranks_agree(world, runs[1].weights())
    noisy = Tasks(hvdnoise.DistributedOptimizer, noise=GNC(RADIUS, source="gathered"))
    for n in range(6):
        noisy.step(world.rank, n, world.rank, [0, 1, 2])
    assert_ranks_agree(world, noisy.weights())


def check_gradients_are_whole_after_synchronize(world: World) -> None:
    """With several optimizers; whoever clips before is told."""
    pair = [net(1), net(2)]
    opts = [hvdnoise.DistributedOptimizer(torch.optim.SGD(m.parameters(), 0.1),
                                          m.named_parameters()) for m in pair]
    for m, optimizer in zip(pair, opts):
        F.cross_entropy(m(images(world.rank)), labels(world.rank)).backward()
        optimizer.synchronize()
        expected = mean_gradient(m, range(world.size))
        for p, right in zip(m.parameters(), expected):
            torch.testing.assert_close(p.grad, right)
        with optimizer.skip_synchronize():
            optimizer.step()
    F.cross_entropy(pair[0](images(world.rank)), labels(world.rank)).backward()
    nn.utils.clip_grad_norm_(pair[0].parameters(), 0.01)
    assert "optimizer.synchronize()" in raised(RuntimeError, opts[0].step)


def check_the_same_parameter_in_two_optimizers(world: World) -> None:
    model = net()
    first = hvdnoise.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1),
                                          model.named_parameters())
    for bucket_bytes in (0, None):
        text = raised(ValueError, lambda: hvdnoise.DistributedOptimizer(
            torch.optim.SGD(model.head.parameters(), 0.1), bucket_bytes=bucket_bytes))
        assert "SGD of convolution.weight" in text and "\n" not in text
    other = hvdnoise.DistributedOptimizer(torch.optim.SGD(net().parameters(), 0.1))
    other.add_param_group({"params": model.head.parameters()})
    assert "another DistributedOptimizer" in raised(ValueError, other.zero_grad)
    del first, other
    hvdnoise.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1))


# ---- smaller things

class Plain(torch.optim.SGD):
    """A user's own class, whose zero_grad knows no arguments."""

    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad()


class NoRate(torch.optim.SGD):
    """As Adafactor with ``lr=None``, or groups without a rate."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=0.1)


def rates() -> Iterator[tuple[Any, Any]]:
    """(noise, error)"""
    yield GNC(0.1), None
    yield GNC(relative=0.1, source="isotropic"), None
    yield GNC(lr=1.0), "learning rate"


def check_optimizers_of_the_users_own(world: World) -> None:
    model = net()
    optimizer: Any = hvdnoise.DistributedOptimizer(Plain(model.parameters(), 0.1),
                                                   noise=GNC(RADIUS))
    for n in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images(world.rank, n)), labels(world.rank, n)).backward()
        optimizer.step()
    with pytest.raises(TypeError, match=r"state_dict\(\)"):
        copy.deepcopy(optimizer)
    for lr in (None, "missing"):
        for noise, error in rates():
            model = net()
            inner = NoRate(model.parameters(), 0.1)
            for group in inner.param_groups:
                group["lr"] = None
                if lr == "missing":
                    del group["lr"]
            optimizer = hvdnoise.DistributedOptimizer(inner, noise=noise)
            for n in range(2):
                if n and error:
                    assert error in raised(ValueError, model, images(world.rank))
                    break
                optimizer.zero_grad()
                F.cross_entropy(model(images(world.rank, n)), labels(world.rank, n)).backward()
                optimizer.step()


# ---- what breaks the world, last

@on(*WORLDS)
def check_z_ranks_that_differ_in_the_order_of_their_optimizers(world: World) -> None:
    """Where a rank has no gradient of what the other waits for: an error on both, in time.

    All gradients may have arrived before a rank looks; it is told in the next step then.
    """
    run = Tasks(hvdnoise.DistributedOptimizer)
    for n in range(2):
        run.step(world.rank, n, world.rank, [0, 1, 2])
    started = time.monotonic()
    order = [0, 1, 2] if world.rank == 0 else [0, 2, 1]

    def steps() -> None:
        for n in (2, 3):
            run.step(world.rank, n, 1 - world.rank, order)
    text = raised(RuntimeError, steps)
    assert time.monotonic() - started < 10
    assert "SGD of a.weight" in text and "SGD of b.weight" in text and "same order" in text, text


@on(*HOROVOD)
def check_z_a_rank_that_has_run_out_of_data(world: World) -> None:
    """hvd.join(): what needs only the allreduce goes on."""
    model = net()
    optimizer: Any = hvdnoise.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), noise=GNC(RADIUS, source="own"))
    for n in range(4 if world.rank == 0 else 2):
        optimizer.zero_grad()
        F.cross_entropy(model(images(world.rank, n)), labels(world.rank, n)).backward()
        optimizer.step()
    hvd.join()
