"""Horovod's PyTorch MNIST example with the change that DESIGN.md asks for, and no other.

The loop has the shape of Horovod's examples/pytorch/pytorch_mnist.py: a DistributedSampler, a
scaled learning rate, both broadcasts, compression, metrics averaged by ``hvd.allreduce``. The
digits are made here: each is a fixed pattern under noise.
"""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import hvdnoise
from hvdnoise.comm import World
from tests.parallel.toys import assert_ranks_agree, same_bits, weights

WORLDS = ("gloo-2", "mpi-2")
CHECK_SECONDS = 120
EPOCHS, BATCH = 2, 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, kernel_size=5)
        self.conv2 = nn.Conv2d(4, 8, kernel_size=5)
        self.conv2_drop = nn.Dropout2d(0.1)
        self.fc1 = nn.Linear(128, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = F.relu(self.fc1(x.view(-1, 128)))
        return F.log_softmax(self.fc2(F.dropout(x, 0.1, self.training)), dim=1)


def digits(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(10, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    patterns = F.interpolate(patterns, scale_factor=4, mode="bilinear")
    targets = torch.randint(10, (count,), generator=generator)
    noise = torch.randn(count, 1, 28, 28, generator=generator)
    return TensorDataset(2 * patterns[targets] + noise, targets)


def metric_average(value: float, name: str) -> float:
    return float(hvd.allreduce(torch.tensor(value), name=name))


def evaluate(model: nn.Module, loader: DataLoader[Any]) -> float:
    model.eval()
    correct, seen = 0, 0
    with torch.no_grad():
        for data, target in loader:
            correct += int((model(data).argmax(1) == target).sum())
            seen += len(target)
    return metric_average(correct / seen, "avg_accuracy")


def main(noise: Any, weigh: bool = False, compression: Any = hvd.Compression.none
         ) -> tuple[nn.Module, list[float], float]:
    """Train; returns the model, the averaged losses and the averaged test accuracy."""
    hvd.init()
    torch.manual_seed(42 + hvd.rank())  # different on purpose: the broadcast makes models equal
    train_dataset, test_dataset = digits(512, 1), digits(256, 2)
    train_sampler: Any = DistributedSampler(train_dataset, num_replicas=hvd.size(),
                                            rank=hvd.rank())
    train_loader = DataLoader(train_dataset, batch_size=BATCH, sampler=train_sampler)
    test_sampler: Any = DistributedSampler(test_dataset, num_replicas=hvd.size(), rank=hvd.rank())
    test_loader = DataLoader(test_dataset, batch_size=64, sampler=test_sampler)

    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=0.05 * hvd.size(), momentum=0.5)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvdnoise.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=compression,
        op=hvd.Average,
        gradient_predivide_factor=1.0,
        noise=noise)

    losses = []
    for epoch in range(1, EPOCHS + 1):
        model.train()
        train_sampler.set_epoch(epoch)
        for data, target in train_loader:
            optimizer.zero_grad()
            output = model(data)
            loss = optimizer.weigh(F.nll_loss(output, target, reduction="none")) if weigh \
                else F.nll_loss(output, target)
            loss.backward()
            optimizer.step()
            losses.append(metric_average(loss.item(), "avg_loss"))
    return model, losses, evaluate(model, test_loader)


def assert_trained(world: World, noise: Any, **options: Any) -> list[Tensor]:
    model, losses, accuracy = main(noise, **options)
    assert len(losses) == EPOCHS * 512 // BATCH // world.size
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4]), losses
    assert accuracy > 0.8, accuracy
    assert_ranks_agree(world, model.parameters())
    return weights(model)


def check_gnc(world: World) -> None:
    assert_trained(world, hvdnoise.GNC(radius=0.05))


def check_covariance_noise(world: World) -> None:
    assert_trained(world, hvdnoise.CovarianceNoise("full", emulated_batch=BATCH))
    assert_trained(world, hvdnoise.CovarianceNoise("full", BATCH, source="examples"), weigh=True)


def check_no_noise_and_compression(world: World) -> None:
    plain = assert_trained(world, None)
    compressed = assert_trained(world, None, compression=hvd.Compression.fp16)
    assert not same_bits(plain, compressed)
