"""Evaluation by several ranks: each example once, the same answer for any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hvdnoise.training.evaluate import common_buffers, evaluate, mean_buffers, own_buffers
from hvdnoise.training.sampler import test_shards as shards  # not a test
from tests.fake_world import ThreadWorld, run_threads

COUNT = 11


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(COUNT, 3, generator=generator), torch.randint(4, (COUNT,),
                                                                     generator=generator)


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


@pytest.mark.parametrize("size", [1, 2, 3, 16])  # with 16 ranks some have no example
def test_every_example_counts_once(size: int) -> None:
    images, labels = examples()
    network = model().eval()
    with torch.no_grad():
        logits = network(images)
    loss = nn.functional.cross_entropy(logits.double(), labels).item()
    accuracy = (logits.argmax(1) == labels).double().mean().item()

    def work(world: ThreadWorld) -> None:
        batches = [(images[part.start:part.stop], labels[part.start:part.stop])
                   for part in shards(COUNT, world.size, world.rank, 2)]
        found = evaluate(network, batches, world, torch.device("cpu"))
        assert found.count == COUNT and found.accuracy == pytest.approx(accuracy, abs=1e-12)
        assert found.loss == pytest.approx(loss, rel=1e-5)
    run_threads(size, work)


def test_evaluation_leaves_the_model_as_it_was() -> None:
    network = model().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, labels = examples()
    run_threads(1, lambda world: evaluate(network, [(images, labels)], world, torch.device("cpu")))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_buffers_are_common_inside_and_each_ranks_own_afterwards() -> None:
    def work(world: ThreadWorld) -> dict[str, Tensor]:
        network = nn.BatchNorm1d(2)
        network.running_mean.fill_(float(world.rank))  # type: ignore[union-attr]
        network.num_batches_tracked.fill_(5 + world.rank)  # type: ignore[union-attr]
        before = own_buffers(network)
        with common_buffers(network, world):
            inside = own_buffers(network)
            assert inside.keys() == mean_buffers(network, world).keys()
        after = own_buffers(network)
        assert all(torch.equal(after[name], before[name]) for name in before)
        return inside
    first, second = run_threads(2, work)
    assert first["running_mean"].tolist() == [0.5, 0.5] == second["running_mean"].tolist()
    assert first["num_batches_tracked"] == 5 == second["num_batches_tracked"]
