"""Horovod's PyTorch MNIST example on Fashion-MNIST, with Horovod's optimizer and with hvdnoise's.

The loop has the shape of Horovod's examples/pytorch/pytorch_mnist.py: torchvision's data set and
transforms, a DistributedSampler, a scaled learning rate, both broadcasts, compression, metrics
averaged by ``hvd.allreduce``. Only the optimizer's wrapper differs, as README.md has it. The files
are those that torchvision reads, with few images; see `tests.fashion`.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, Callable

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision import datasets, transforms

import hvdnoise
from hvdnoise.comm import World
from tests.fashion import write_files
from tests.parallel.toys import assert_ranks_agree, same_bits, weights

WORLDS = ("gloo-2", "mpi-2")
CHECK_SECONDS = 120
EPOCHS, BATCH, TRAIN, TEST = 3, 16, 1024, 256


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


def main(root: str, wrap: Callable[..., Any], weigh: bool = False,
         compression: Any = hvd.Compression.none) -> tuple[nn.Module, list[float], float]:
    """Train; returns the model, the averaged losses and the averaged test accuracy."""
    hvd.init()
    torch.manual_seed(42 + hvd.rank())  # different on purpose: the broadcast makes models equal
    transform = transforms.Compose([
        transforms.ToTensor(), transforms.Normalize((0.2860,), (0.3530,))])
    train_dataset = datasets.FashionMNIST(root, train=True, download=False, transform=transform)
    train_sampler: Any = DistributedSampler(train_dataset, num_replicas=hvd.size(),
                                            rank=hvd.rank())
    train_loader = DataLoader(train_dataset, batch_size=BATCH, sampler=train_sampler)
    test_dataset = datasets.FashionMNIST(root, train=False, download=False, transform=transform)
    test_sampler: Any = DistributedSampler(test_dataset, num_replicas=hvd.size(), rank=hvd.rank())
    test_loader = DataLoader(test_dataset, batch_size=64, sampler=test_sampler)

    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=0.05 * hvd.size(), momentum=0.5)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = wrap(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=compression,
        op=hvd.Average,
        gradient_predivide_factor=1.0)

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


def with_noise(noise: Any) -> Callable[..., Any]:
    return functools.partial(hvdnoise.DistributedOptimizer, noise=noise)


def assert_trained(world: World, wrap: Callable[..., Any], **options: Any) -> list[Tensor]:
    with tempfile.TemporaryDirectory(prefix="hvdnoise-fashion-") as root:
        write_files(Path(root), TRAIN, TEST)
        model, losses, accuracy = main(root, wrap, **options)
    assert len(losses) == EPOCHS * TRAIN // BATCH // world.size
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8]), losses
    assert accuracy > 0.5, accuracy
    assert_ranks_agree(world, model.parameters())
    return weights(model)


def check_plain_and_without_noise(world: World) -> None:
    """The same bits, in full and compressed."""
    full, half = [], []
    for wrap in hvd.DistributedOptimizer, with_noise(None):
        full.append(assert_trained(world, wrap))
        half.append(assert_trained(world, wrap, compression=hvd.Compression.fp16))
    assert same_bits(*full) and same_bits(*half)
    assert not same_bits(full[0], half[0])


def check_gnc(world: World) -> None:
    assert_trained(world, with_noise(hvdnoise.GNC(radius=0.05)))


def check_covariance_noise(world: World) -> None:
    assert_trained(world, with_noise(hvdnoise.CovarianceNoise("full", emulated_batch=BATCH)))
    assert_trained(world, with_noise(hvdnoise.CovarianceNoise("full", BATCH, source="examples")),
                   weigh=True)
