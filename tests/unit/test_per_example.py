"""`optimizer.observe_examples`: gradients of single examples against a loop over the examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdnoise import GNC, CovarianceNoise, DistributedOptimizer, per_example, streams
from hvdnoise.buckets import build_layout, default_layout
from tests.fake_world import ThreadWorld, run_threads
from tests.runs import weights_after
from tests.toys import Net, batch, build, losses, relative_error, vector


class Conv(nn.Module):
    """A network with shared weights, channels last, and GroupNorm."""

    def __init__(self, norm: Any = lambda: nn.GroupNorm(2, 4)) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), norm()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 5)
        self.to(torch.float64)
        with torch.no_grad():
            for n, p in enumerate(self.parameters()):
                p.copy_(0.5 * streams.normal(tuple(p.shape), 2, "conv", n, dtype=torch.float64))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(torch.tanh(self.conv(x)[:, :3]))))
        return self.head(self.drop(x).mean(dim=(2, 3)))


def images(worker: int = 0) -> tuple[Tensor, Tensor]:
    x = streams.normal((6, 3, 4, 4), 3, "images", worker, dtype=torch.float64)
    return x, torch.arange(6) % 5


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="none")


def noise(**options: Any) -> Any:
    return CovarianceNoise("diagonal", 4, source="examples", **options)


def observed(make: Any, model: nn.Module, world: Any = None, V: int = 1, **options: Any) -> Any:
    """The optimizer after a step, and the (P,) variances that it keeps, by parameters."""
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0),
                                     model.named_parameters(), noise=make, world=world,
                                     virtual_workers=V, **options)
    for worker in optimizer.workers:
        x, y = images(worker)
        optimizer.observe_examples(model, cross_entropy, x, y)
        optimizer.weigh(cross_entropy(model(x), y)).backward()
    optimizer.step()
    return optimizer, variances(optimizer, list(model.named_parameters()), **options)


def variances(optimizer: Any, named: list[tuple[str, Any]], bucket_bytes: int | None = None
              ) -> Tensor:
    """(P,): what the noise keeps, in the order of the parameters."""
    kept = optimizer.state_dict()["hvdnoise"]["kept"]["values"]
    layout = default_layout(named) if bucket_bytes is None else build_layout(
        named, bucket_bytes=bucket_bytes)
    parts = {name: view for bucket in layout.buckets
             for name, view in zip(bucket.names, bucket.views(kept[bucket.key]))}
    return torch.cat([parts[name].flatten() for name, _ in named])


def looped(model: nn.Module, workers: int = 1) -> Tensor:
    """(P,): the mean of the squared gradients of the examples, one by one."""
    rows = []
    for worker in range(workers):
        for x, y in zip(*images(worker)):
            loss = cross_entropy(model(x[None]), y[None]).sum()
            rows.append(vector(torch.autograd.grad(loss, list(model.parameters()))) ** 2)
    return torch.stack(rows).mean(dim=0)


@pytest.mark.parametrize("bucket_bytes", [None, 100])
def test_squares_of_a_convolution_used_twice(bucket_bytes: int | None) -> None:
    def work(world: ThreadWorld) -> Any:
        model = Conv().eval()
        return observed(noise(), model, world, V=2, bucket_bytes=bucket_bytes)[1]
    expected = looped(Conv().eval(), 4)
    for found in run_threads(2, work):
        assert relative_error(found, expected) < 1e-12


def test_chunks_add_up(monkeypatch: Any) -> None:
    P = sum(p.nbytes for p in Conv().parameters())
    monkeypatch.setattr(per_example, "CHUNK_BYTES", 4 * P)  # 4 examples, and 2
    found = run_threads(1, lambda world: observed(noise(), Conv().eval(), world)[1])[0]
    assert relative_error(found, looped(Conv().eval())) < 1e-12


def test_the_loops_random_numbers_and_gradients_stay() -> None:
    def work(world: ThreadWorld, shown: bool) -> Tensor:
        torch.manual_seed(3)
        model = Conv()  # with dropout
        _, optimizer = build(world, None if not shown else CovarianceNoise("diagonal", 6,
                                                                           source="examples"),
                             model=model)
        x, y = images()
        optimizer.observe_examples(model, cross_entropy, x, y)
        cross_entropy(model(x), y).mean().backward()
        optimizer.step()
        return vector(model.parameters())
    # one worker and M = B: no noise; torch's generator is the process's, so one after the other
    plain, shown = (run_threads(1, lambda world: work(world, shown))[0] for shown in (False, True))
    assert torch.equal(plain, shown)


def test_sampled_labels_are_the_models_own_and_the_same_wherever_a_worker_lives() -> None:
    model = Conv().eval()
    shares = F.softmax(model(images()[0]).detach(), dim=1)
    draws = torch.stack([per_example.sampled(model(images()[0]), streams.generator(0, "x", n))
                         for n in range(4000)])
    found = F.one_hot(draws, 5).double().mean(dim=0)
    spread = (shares * (1 - shares) / 4000).sqrt()
    assert float(((found - shares) / spread).abs().max()) < 5.5  # of 30: 1 in 10^6

    def work(world: ThreadWorld) -> Tensor:
        return observed(noise(labels="sampled"), Conv().eval(), world, V=4 // world.size)[1]
    everywhere = [run_threads(ranks, work)[0] for ranks in (1, 2, 4)]
    assert all(relative_error(each, everywhere[0]) < 1e-12 for each in everywhere)
    assert relative_error(everywhere[0], looped(Conv().eval(), 4)) > 1e-3  # not the true ones


def test_accumulation_and_a_scaled_loss() -> None:
    def work(**options: Any) -> Tensor:
        return weights_after(3, lambda: noise(every=2), 2, V=2, **options)
    plain = work()
    assert relative_error(work(backward_passes_per_step=2), plain) < 1e-12
    assert relative_error(work(loss_scale=1024.0), plain) < 1e-12


def test_it_is_nothing_to_other_noises() -> None:
    def work(world: ThreadWorld, show: bool) -> Tensor:
        model, optimizer = build(world, GNC(0.1), V=2)
        for step in range(3):
            optimizer.zero_grad()
            for worker in optimizer.workers:
                x, y = batch(step, worker)
                if show:
                    optimizer.observe_examples(model, losses, x, y)
                losses(model(x), y).mean().backward()
            optimizer.step()
        return vector(model.parameters())
    one, other = (run_threads(2, lambda world: work(world, show))[0] for show in (True, False))
    assert torch.equal(one, other)


def test_another_optimizers_noise_on_the_weights_is_not_in_them() -> None:
    """A GNC on the first layer displaces the training forward; the examples see clean weights."""
    def work(world: ThreadWorld) -> None:
        model = Net()
        parts = (("first", GNC(5.0)), ("last", noise(every=1, decay=0.0)))
        optimizers = [DistributedOptimizer(
            torch.optim.SGD(getattr(model, part).parameters(), lr=0.1),
            getattr(model, part).named_parameters(prefix=part), noise=each, world=world)
            for part, each in parts]
        for step in range(2):
            x, y = batch(step, world.rank)
            for optimizer in optimizers:
                optimizer.zero_grad()
            rows = []
            for n in range(len(x)):
                with torch.enable_grad():
                    weights = dict(model.named_parameters())
                    out = torch.tanh(F.linear(x[n], weights["first.weight"], weights["first.bias"]))
                    out = F.linear(out, weights["last.weight"], weights["last.bias"])
                    loss = ((out - y[n]) ** 2).mean()
                rows.append(vector(torch.autograd.grad(loss, list(model.last.parameters()))) ** 2)
            with pytest.raises(ValueError, match="is no parameter of this Linear"):
                optimizers[1].observe_examples(model.first, losses, x, y)
            optimizers[1].observe_examples(model, losses, x, y)
            losses(model(x), y).mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            mine = torch.stack(rows).sum(dim=0)
            total = world.allreduce_(mine, name="total", op="sum").wait() / 8
            found = variances(optimizers[1], list(model.last.named_parameters(prefix="last")))
            assert relative_error(found, total) < 1e-12
    run_threads(2, work)


# ---------------------------------------------------------------------- refusals


def test_batch_statistics_are_refused() -> None:
    for norm in (lambda: nn.BatchNorm2d(4), lambda: nn.BatchNorm2d(4, track_running_stats=False),
                 lambda: nn.InstanceNorm2d(4, track_running_stats=True)):
        with pytest.raises(ValueError, match='^norm .*statistics over the batch.*"workers"') as e:
            run_threads(1, lambda world: observed(noise(), Conv(norm), world))
        assert "\n" not in str(e.value)
    run_threads(1, lambda world: observed(noise(), Conv(lambda: nn.BatchNorm2d(4)).eval(), world))


def test_calls_that_are_missing_late_or_of_other_examples_are_told() -> None:
    def work(world: ThreadWorld) -> None:
        model, optimizer = build(world, noise())
        x, y = batch(0, 0)
        with pytest.raises(RuntimeError, match="call optimizer.observe_examples"):
            losses(model(x), y).mean().backward()
        optimizer.reset()
        optimizer.observe_examples(model, losses, x[:2], y[:2])
        with pytest.raises(ValueError, match="given 2 examples and the forward had 4"):
            losses(model(x), y).mean().backward()
        optimizer.reset()
        optimizer.observe_examples(model, losses, x, y)
        losses(model(x), y).mean().backward()
        with pytest.raises(RuntimeError, match="after the step's backward passes"):
            optimizer.observe_examples(model, losses, x, y)
        optimizer.step()
        losses(model(x), y).mean().backward()  # the second step of ten asks for nothing
        optimizer.step()
    run_threads(1, work)


@pytest.mark.parametrize("options, says", [
    ({"labels": "fake"}, "labels='fake' must be true or sampled"),
    ({"every": 0}, "every=0 must be an integer >= 1"),
    ({"decay": 1.0}, "decay=1.0 must be at least 0"),
    ({"trace": -1.0}, "trace=-1.0 must be a number >= 0 or one of own"),
    ({"trace": "matched:kronecker"}, "trace='matched:kronecker' must be")])
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        noise(**options)
    assert "\n" not in str(caught.value)


def test_sampling_needs_classes() -> None:
    with pytest.raises(ValueError, match='needs outputs of shape .* take labels="true"'):
        per_example.sampled(torch.zeros(3, 4, 5), torch.Generator())
