"""The baselines against plain loops over the workers, which know nothing of ranks or buckets."""

from __future__ import annotations

import math
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn

from hvdnoise import (
    GNC,
    PNM,
    SAM,
    AnticorrelatedNoise,
    DistributedOptimizer,
    Extrapolation,
    MomentumSAM,
    StaleSAM,
    make_noise,
)
from hvdnoise.buckets import build_layout
from hvdnoise.noise import base
from hvdnoise.noise.base import MeanObservingNoise, WeightNoise
from hvdnoise.planning import outline
from hvdnoise.training.config import TrainConfig
from hvdnoise.training.options import parse as parse_settings
from tests.fake_world import Meeting, ThreadWorld, run_threads
from tests.toys import Dense, Linear, Net, batch, groups_of, losses, seen, train, vector

STEPS, RATES, DECAY = 7, (0.05, 0.1), 0.03
SMALL_BUCKETS = 100  # bytes
WORLDS = [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)]  # ranks, virtual workers
NOISES: dict[str, Any] = {
    "sam": lambda: SAM(lambda step: 0.2 + 0.1 * step), "stale-sam": lambda: StaleSAM(0.4),
    "momentum-sam": lambda: MomentumSAM(0.4, momentum=0.7),
    "extrapolation": lambda: Extrapolation(lr=3.0),
    "anticorrelated": lambda: AnticorrelatedNoise(0.6, seed=5),
    "pnm": lambda: PNM(beta=0.8, beta0=0.7)}


# ---------------------------------------------------------------------- the methods, in plain loops

class Loop:
    """W workers, one after the other, and an SGD of torch's; vectors in order of registration."""

    def __init__(self, W: int, momentum: float) -> None:
        self.W, self.model = W, Net()
        self.sgd = torch.optim.SGD(groups_of(self.model, RATES), lr=1.0, momentum=momentum,
                                   weight_decay=DECAY)
        self.rates_P = torch.cat([torch.full((p.numel(),), RATES[t % 2], dtype=p.dtype)
                                  for t, p in enumerate(self.model.parameters())])

    @property
    def theta_P(self) -> Tensor:
        return vector(self.model.parameters())

    def gradients(self, step: int, deltas: Any = None) -> list[Tensor]:
        """Each worker's own, at its displaced weights."""
        found, theta_P = [], self.theta_P
        for worker in range(self.W):
            nn.utils.vector_to_parameters(
                theta_P if deltas is None else theta_P + deltas[worker], self.model.parameters())
            x, y = batch(step, worker)
            found.append(vector(torch.autograd.grad(losses(self.model(x), y).mean(),
                                                    list(self.model.parameters()))))
        nn.utils.vector_to_parameters(theta_P, self.model.parameters())
        return found

    def update(self, gradient_P: Tensor) -> None:
        start = 0
        for p in self.model.parameters():
            p.grad = gradient_P[start:start + p.numel()].view(p.shape).clone()
            start += p.numel()
        self.sgd.step()


def mean(vectors: list[Tensor]) -> Tensor:
    return torch.stack(vectors).mean(dim=0)


def plain_sam(loop: Loop) -> None:
    for step in range(STEPS):
        rho = 0.2 + 0.1 * step
        deltas = [rho * g / g.norm() for g in loop.gradients(step)]
        loop.update(mean(loop.gradients(step, deltas)))


def plain_stale_sam(loop: Loop) -> None:
    deltas = None
    for step in range(STEPS):
        found = loop.gradients(step, deltas)
        deltas = [0.4 * g / g.norm() for g in found]
        loop.update(mean(found))


def plain_momentum_sam(loop: Loop) -> None:
    v_P: Any = 0.0
    for step in range(STEPS):
        delta = -0.4 * v_P / v_P.norm() if step else 0.0
        gradient_P = mean(loop.gradients(step, [delta] * loop.W))
        v_P = 0.7 * v_P + gradient_P
        loop.update(gradient_P)


def plain_extrapolation(loop: Loop) -> None:
    deltas = None
    for step in range(STEPS):
        found = loop.gradients(step, deltas)
        deltas = [-3.0 * loop.rates_P * g for g in found]
        loop.update(mean(found))


def plain_anticorrelated(loop: Loop) -> None:
    """The method as it was published: the noise is in the weights, and the last one is taken back.

    Weight decay is of the weights without the noise, as the module says.
    """
    normals, P = Dense(1, bucket_bytes=SMALL_BUCKETS).normals, len(loop.theta_P)

    def xi(step: int) -> Tensor:
        return 0.6 / math.sqrt(P) * torch.from_numpy(normals("anticorrelated", step, seed=5)) \
            if step else torch.zeros(P, dtype=torch.float64)
    for step in range(STEPS):
        gradient_P = mean(loop.gradients(step)) - DECAY * xi(step)
        loop.update(gradient_P)
        nn.utils.vector_to_parameters(loop.theta_P + xi(step + 1) - xi(step),
                                      loop.model.parameters())
    nn.utils.vector_to_parameters(loop.theta_P - xi(STEPS), loop.model.parameters())


def plain_pnm(loop: Loop) -> None:
    m = [torch.zeros_like(loop.theta_P)] * 2  # m_{t-2}, m_{t-1}
    for step in range(STEPS):
        m.append(0.8 ** 2 * m[-2] + (1 - 0.8 ** 2) * mean(loop.gradients(step)))
        loop.update((1.7 * m[-1] - 0.7 * m[-2]) / math.sqrt(1.7 ** 2 + 0.7 ** 2))


PLAIN: dict[str, Callable[[Loop], None]] = {
    "sam": plain_sam, "stale-sam": plain_stale_sam, "momentum-sam": plain_momentum_sam,
    "extrapolation": plain_extrapolation, "anticorrelated": plain_anticorrelated,
    "pnm": plain_pnm}


# ---------------------------------------------------------------------- the optimizer's runs

def build(world: Any, noise: Any, V: int, *, momentum: float = 0.0, model: Any = None,
          **options: Any) -> tuple[Any, Any]:
    model = model or Net()
    inner = torch.optim.SGD(groups_of(model, RATES), lr=1.0, momentum=momentum, weight_decay=DECAY)
    options = {"bucket_bytes": SMALL_BUCKETS, **options}
    return model, DistributedOptimizer(inner, model.named_parameters(), noise=noise, world=world,
                                       virtual_workers=V, **options)


def alone() -> ThreadWorld:
    return ThreadWorld(Meeting(1, 1.0), 0)


def momentum_of(kind: str) -> float:
    return 0.0 if kind == "pnm" else 0.9


@pytest.mark.parametrize("ranks, V", WORLDS)
@pytest.mark.parametrize("kind", NOISES)
def test_it_is_the_plain_loop(kind: str, ranks: int, V: int) -> None:
    loop = Loop(ranks * V, momentum_of(kind))
    start_P = loop.theta_P
    PLAIN[kind](loop)

    def work(world: ThreadWorld) -> Tensor:
        model, optimizer = build(world, NOISES[kind](), V, momentum=momentum_of(kind))
        train(model, optimizer, STEPS)
        return vector(model.parameters())
    weights = run_threads(ranks, work)
    assert all(torch.equal(each, weights[0]) for each in weights)
    moved_P = loop.theta_P - start_P
    assert (weights[0] - loop.theta_P).abs().max() < 1e-11 * moved_P.abs().max()


def test_pnm_is_pytorch_optimizers() -> None:
    from pytorch_optimizer import PNM as Theirs
    loop = Loop(2, 0.0)
    theirs = Theirs(groups_of(loop.model, RATES), betas=(0.8, 0.7))
    for step in range(STEPS):
        x, y = torch.stack([torch.cat(batch(step, worker), dim=1) for worker in (0, 1)]).flatten(
            0, 1).split((3, 2), dim=1)
        theirs.zero_grad()
        losses(loop.model(x), y).mean().backward()
        theirs.step()
    model = Net()
    optimizer = DistributedOptimizer(torch.optim.SGD(groups_of(model, RATES), lr=1.0),
                                     model.named_parameters(), noise=NOISES["pnm"](),
                                     virtual_workers=2, world=alone())
    train(model, optimizer, STEPS)
    assert torch.allclose(vector(model.parameters()), loop.theta_P, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", NOISES)
def test_it_is_not_plain_sgd(kind: str) -> None:
    model, optimizer = build(alone(), NOISES[kind](), 2)
    train(model, optimizer, 4)
    plain, ordinary = build(alone(), None, 2)
    train(plain, ordinary, 4)
    assert (vector(model.parameters()) - vector(plain.parameters())).abs().max() > 1e-4


@pytest.mark.parametrize("kind", NOISES)
def test_it_gathers_the_passes_of_a_worker(kind: str) -> None:
    once, twice = (build(alone(), NOISES[kind](), 2, backward_passes_per_step=k) for k in (1, 2))
    whole = train(*once, 4).weights[-1]
    assert torch.allclose(train(*twice, 4).weights[-1], whole, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", NOISES)
def test_the_loss_scale_changes_no_bit(kind: str) -> None:
    def work(world: ThreadWorld) -> bool:
        plain = build(world, NOISES[kind](), 2, momentum=0.9)
        scaled = build(world, NOISES[kind](), 2, momentum=0.9)
        for step in range(5):  # it changes from step to step
            train(*plain, 1, first=step)
            train(*scaled, 1, first=step, loss_scale=2.0 ** (12 - 3 * step))
        return torch.equal(vector(plain[0].parameters()), vector(scaled[0].parameters()))
    assert run_threads(2, work) == [True, True]


def passes(model: Any, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    for worker in optimizer.workers:
        x, y = batch(step, worker)
        losses(model(x), y).mean().backward()


def drop_a_step(model: Any, optimizer: Any) -> None:
    passes(model, optimizer, 9)
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", NOISES)
def test_a_dropped_step_and_a_resumed_run_change_no_bit(kind: str) -> None:
    def work(world: ThreadWorld) -> tuple[Tensor, Tensor]:
        model, optimizer = build(world, NOISES[kind](), 2, momentum=0.9)
        train(model, optimizer, 6)
        through = vector(model.parameters())
        model, optimizer = build(world, NOISES[kind](), 2, momentum=0.9)
        train(model, optimizer, 3)
        drop_a_step(model, optimizer)
        weights, state = model.state_dict(), optimizer.state_dict()
        model, optimizer = build(world, NOISES[kind](), 2, momentum=0.9)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(model, optimizer, 1, first=3)
        drop_a_step(model, optimizer)
        train(model, optimizer, 2, first=4)
        return through, vector(model.parameters())
    for through, resumed in run_threads(2, work):
        assert torch.equal(through, resumed)


@pytest.mark.parametrize("kind", NOISES)
def test_a_state_of_another_number_of_workers_is_refused(kind: str) -> None:
    if kind in ("sam", "pnm"):
        return  # they keep nothing of the single steps
    model, optimizer = build(alone(), NOISES[kind](), 2)
    train(model, optimizer, 2)
    with pytest.raises(ValueError, match="same bucket_bytes, ranks, virtual_workers"):
        build(alone(), NOISES[kind](), 3)[1].load_state_dict(optimizer.state_dict())


# ---------------------------------------------------------------------- displacements

@pytest.mark.parametrize("kind", NOISES)
def test_the_first_step_is_clean_but_of_sam(kind: str) -> None:
    model, optimizer = build(alone(), NOISES[kind](), 2)
    weights: list[Tensor] = []
    model.register_forward_hook(lambda module, *_: weights.append(seen(module)))
    clean = vector(model.parameters())
    train(model, optimizer, 1)
    assert [torch.equal(each, clean) for each in weights] == [True] * 2 + [False] * (
        2 * (kind == "sam"))
    assert optimizer.noise_coverage.due == (kind == "sam") and optimizer.noise_coverage.missed == 0


@pytest.mark.parametrize("noise, radius", [
    (SAM(0.3), 0.3), (StaleSAM(0.3), 0.3), (MomentumSAM(0.3), 0.3)])
def test_the_radius_is_the_length_of_each_displacement(noise: Any, radius: float) -> None:
    def work(world: ThreadWorld) -> None:
        model, optimizer = build(world, noise, 2)
        optimizer.measure = True
        weights: list[Tensor] = []
        model.register_forward_hook(lambda module, *_: weights.append(seen(module)))
        train(model, optimizer, 1)
        weights.clear()
        clean = vector(model.parameters())
        record = train(model, optimizer, 1, first=1)
        for each in weights[-2:]:
            assert (each - clean).norm().item() == pytest.approx(radius)
        assert record.measured[0].noise_rms == pytest.approx(radius)
    run_threads(2, work)


@pytest.mark.parametrize("noise", [SAM(0.3), StaleSAM(0.3), MomentumSAM(0.3), Extrapolation()])
def test_no_gradient_is_no_displacement(noise: Any) -> None:
    model = Linear(3)
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                     model.named_parameters(), noise=noise, world=alone())

    def closure() -> None:
        optimizer.zero_grad()
        model(torch.zeros(3, dtype=torch.float64)).backward()
    for _ in range(3):
        optimizer.step(closure)
    assert all(torch.count_nonzero(each) == 0 for each in model.seen)


def test_a_norm_is_computed_once_a_worker_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = base.square_norm
    monkeypatch.setattr(base, "square_norm", lambda part: calls.append(1) or real(part))
    model, optimizer = build(alone(), StaleSAM(0.3), 2)
    train(model, optimizer, 1)
    assert calls == []
    train(model, optimizer, 2, first=1)
    assert len(calls) == 2 * 2 * 3  # steps, workers, buckets


class NoRate(torch.optim.Optimizer):
    """An optimizer that has no learning rate and does nothing."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


def test_extrapolation_needs_a_learning_rate() -> None:
    model = Net()
    optimizer = DistributedOptimizer(NoRate(model.parameters()), model.named_parameters(),
                                     noise=Extrapolation(), world=alone())
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="^Extrapolation follows the learning rate.* an lr$"):
        train(model, optimizer, 1, first=1)


# ---------------------------------------------------------------------- exchange, memory, layouts

def test_the_first_pass_of_sam_stays_on_its_rank() -> None:
    def work(world: ThreadWorld) -> tuple[list[str], bool]:
        model, optimizer = build(world, SAM(0.3), 1)
        train(model, optimizer, 1)
        names: list[str] = []
        start = world.allreduce_

        def allreduce_(tensor: Tensor, *, name: str, **options: Any) -> Any:
            names.append(name)
            return start(tensor, name=name, **options)
        world.allreduce_ = allreduce_  # type: ignore[method-assign]
        grads: list[Tensor] = []
        own: list[Tensor] = []

        def closure() -> None:
            optimizer.zero_grad()
            x, y = batch(1, world.rank)
            loss = losses(model(x), y).mean()
            own.append(vector(torch.autograd.grad(loss, list(model.parameters()),
                                                  retain_graph=True)))
            loss.backward()
            grads.append(vector(p.grad for p in model.parameters()))
        optimizer.step(closure)
        assert not torch.equal(grads[1], own[1])
        return names, torch.equal(grads[0], own[0])
    for names, stayed in run_threads(2, work):
        assert stayed and len(names) == 3, names  # one for each bucket, of the second pass


def test_only_sam_in_its_first_pass_stays() -> None:
    """A backward outside of step(closure) is averaged, as under any noise."""
    def work(world: ThreadWorld) -> Tensor:
        model, optimizer = build(world, SAM(0.3), 1)
        x, y = batch(0, world.rank)
        losses(model(x), y).mean().backward()
        return vector(p.grad for p in model.parameters())
    first, second = run_threads(2, work)
    assert torch.equal(first, second)


ROWS = {  # in units of P, at one and at two virtual workers
    "sam": (2, 3), "stale-sam": (2, 5), "extrapolation": (2, 5), "momentum-sam": (2, 2),
    "anticorrelated": (2, 2), "pnm": (3, 3)}


@pytest.mark.parametrize("V", [1, 2])
@pytest.mark.parametrize("kind", NOISES)
def test_memory_counts_what_is_kept(kind: str, V: int) -> None:
    model, optimizer = build(alone(), NOISES[kind](), V)
    train(model, optimizer, 4)
    P = sum(p.nbytes for p in model.parameters())
    layout = build_layout(list(model.named_parameters()), bucket_bytes=SMALL_BUCKETS)
    assert optimizer.noise_memory == ROWS[kind][V - 1] * P
    assert outline.noise_memory(optimizer.noise, layout, V) == optimizer.noise_memory


@pytest.mark.parametrize("source, lag", [("own", 1), ("own", 0), ("own", 2), ("isotropic", 1)])
@pytest.mark.parametrize("V", [2, 3])
def test_the_plan_knows_the_memory_of_gnc(source: str, lag: int, V: int) -> None:
    model, optimizer = build(alone(), GNC(0.1, source=source, lag=lag), V)
    train(model, optimizer, 4)
    layout = build_layout(list(model.named_parameters()), bucket_bytes=SMALL_BUCKETS)
    predicted = outline.noise_memory(optimizer.noise, layout, V)
    assert optimizer.noise_memory == pytest.approx(predicted, abs=3 * 8 * 3)  # of statistics


def test_a_noise_that_needs_no_rows_takes_none() -> None:
    for noise in (MomentumSAM(0.3), AnticorrelatedNoise(0.3), PNM()):
        model, optimizer = build(alone(), noise, 2)
        train(model, optimizer, 2)
        state = optimizer.state_dict()["hvdnoise"]
        assert [seen["rows"] for seen in state["seen"]] == [{}] * isinstance(noise, WeightNoise)
        kept = state.get("kept", {"values": {}})["values"]
        tensors = [each for each in kept.values() if isinstance(each, Tensor)]
        P = sum(p.numel() for p in model.parameters())
        assert sum(each.numel() for each in tensors) == P * (
            0 if not isinstance(noise, MeanObservingNoise) else 2 if isinstance(noise, PNM) else 1)


@pytest.mark.parametrize("kind", [kind for kind in NOISES if kind != "sam"])
def test_parameters_may_be_frozen_on_the_way(kind: str) -> None:
    """The step after the change has the displacement of the step before it, also when it is tried
    twice; what is kept by buckets begins anew with the new buckets."""
    model, optimizer = build(alone(), NOISES[kind](), 2)
    train(model, optimizer, 2)
    model.first.weight.requires_grad_(False)
    drop_a_step(model, optimizer)
    clean, weights, coverage = vector(model.parameters()), [], optimizer.noise_coverage
    hook = model.register_forward_hook(lambda module, *_: weights.append(seen(module)))
    passes(model, optimizer, 2)
    optimizer.step()
    hook.remove()
    noisy = kind != "pnm"
    assert [not torch.equal(each, clean) for each in weights] == [noisy] * 2
    passes(model, optimizer, 3)
    optimizer.step()
    assert optimizer.noise_coverage.due - coverage.due == 2 * noisy
    assert optimizer.noise_coverage.missed == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())
    saved = model.state_dict(), optimizer.state_dict()
    other, resumed = build(alone(), NOISES[kind](), 2)
    other.first.weight.requires_grad_(False)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for each in ((model, optimizer), (other, resumed)):
        passes(*each, 4)
        each[1].step()
    assert torch.equal(vector(other.parameters()), vector(model.parameters()))


@pytest.mark.parametrize("kind", [kind for kind in NOISES if kind != "sam"])
def test_a_dropped_step_of_other_parameters_changes_no_bit(kind: str) -> None:
    ends, states = [], []
    for freezes in (False, True):
        model, optimizer = build(alone(), NOISES[kind](), 2)
        train(model, optimizer, 2)
        model.first.weight.requires_grad_(not freezes)
        drop_a_step(model, optimizer)
        model.first.weight.requires_grad_(True)
        kept = optimizer.state_dict()["hvdnoise"].get("kept", {"values": {}})
        states.append(list(kept["values"]))
        train(model, optimizer, 2, first=2)
        ends.append(vector(model.parameters()))
    assert torch.equal(*ends) and states[0] == states[1]


@pytest.mark.parametrize("kind", ["stale-sam", "momentum-sam", "anticorrelated", "pnm"])
def test_sparse_gradients_are_refused(kind: str) -> None:
    model = nn.Embedding(5, 2, sparse=True)
    _ = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(),
                             noise=NOISES[kind](), world=alone())
    with pytest.raises(ValueError, match="sparse_as_dense=True"):
        model(torch.tensor([1])).sum().backward()


# ---------------------------------------------------------------------- options

@pytest.mark.parametrize("kind, options, says", [
    ("sam", {"radius": -1.0}, "radius=-1.0 must be a finite number >= 0"),
    ("sam", {"radius": "big"}, "radius='big' must be"),
    ("sam", {}, "SAM got no scale: give exactly one of radius= and share="),
    ("sam", {"radius": 1, "share": 0.01}, "SAM got radius and share"),
    ("sam", {"share": 0.01, "lag": 1, "echo": True}, "lag=1: its gradients are of the same batch"),
    ("sam", {"share": 0.01, "echo": 1}, "echo=1 must be True or False"),
    ("momentum-sam", {"share": -1}, "share=-1 must be a finite number >= 0"),
    ("sam", {"radius": 0.1, "lag": 2}, "lag=2 must be 0 or 1"),
    ("stale-sam", {"radius": math.nan}, "radius=nan must be"),
    ("stale-sam", {"radius": 0.1, "lag": 0}, "its options are radius, share, seed"),
    ("momentum-sam", {"radius": 0.1, "momentum": 1.0}, "momentum=1.0 must be a number of at least "
                                                       "0 and less than 1"),
    ("momentum-sam", {"radius": 0.1, "momentum": True}, "momentum=True must be"),
    ("extrapolation", {"lr": -2}, "lr=-2 must be"),
    ("anticorrelated", {"radius": math.inf}, "radius=inf must be"),
    ("anticorrelated", {"radius": 0.1, "seed": 0.5}, "seed=0.5 must be an integer"),
    ("pnm", {"beta": -0.1}, "beta=-0.1 must be"), ("pnm", {"beta0": -1}, "beta0=-1 must be"),
    ("pnm", {"beta0": math.inf}, "beta0=inf must be a finite number >= 0")])
def test_bad_values_are_one_line(kind: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_noise(kind, **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind, flags", [
    ("sam", ["radius", "0.1", "lag", "1"]), ("stale-sam", ["radius", "0.1", "final", "0"]),
    ("momentum-sam", ["radius", "0.1", "momentum", "0.5"]), ("extrapolation", ["lr", "2"]),
    ("anticorrelated", ["radius", "0.1"]), ("pnm", ["beta", "0.5", "beta0", "0.1"])])
def test_flags_make_it(kind: str, flags: list[str]) -> None:
    given = [part for name, value in zip(flags[::2], flags[1::2])
             for part in (f"--noise.{name}", value)]
    config = parse_settings(TrainConfig, ["--noise.kind", kind, *given], program="hvdnoise train")
    noise: Any = config.noise.build(seed=4, batch_size=8, total_steps=10)
    assert type(noise) is type(NOISES[kind]()) and noise.seed == 4
    for name, value in zip(flags[::2], flags[1::2]):
        if name != "final" and "final" not in flags:
            assert getattr(noise, "size" if name == "radius" else name) == float(value)
