"""Fine-tuning with frozen layers: a network that knows some stripes learns others from 48 pictures.

A frozen layer is not exchanged between the ranks, not displaced by the noise, and does not change;
its BatchNorm stays in evaluation mode.
"""

import math

import horovod.torch as hvd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hvdnoise

SIDE = 16


def stripes(angles, count, seed):
    """(count, 1, SIDE, SIDE) noisy stripes in one of these directions (degrees), and which."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(angles), (count,), generator=draws)
    angle = torch.tensor(angles)[labels] * math.pi / 180
    phase = 2 * math.pi * torch.rand(count, generator=draws)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    along = torch.cos(angle)[:, None, None] * x + torch.sin(angle)[:, None, None] * y
    pictures = torch.cos(2 * math.pi * along / 5 + phase[:, None, None])
    return (pictures + 1.2 * torch.randn(pictures.shape, generator=draws))[:, None], labels


def features():
    layers = []
    for before, after in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 5, padding=2), nn.BatchNorm2d(after), nn.ReLU(),
                   nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Network(nn.Module):
    """With ``frozen``, the body neither learns nor counts statistics, also in `train()`."""

    def __init__(self, body, classes, frozen):
        super().__init__()
        self.body, self.head, self.frozen = body, nn.Linear(32, classes), frozen
        self.body.requires_grad_(not frozen)

    def train(self, mode=True):
        super().train(mode)
        self.body.train(mode and not self.frozen)
        return self

    def forward(self, x):
        return self.head(self.body(x))


def fit(model, x, y, steps, batch, lr):
    """Train on all ranks; each draws its own examples."""
    optimizer = hvdnoise.DistributedOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, momentum=0.9),
        named_parameters=[(name, p) for name, p in model.named_parameters() if p.requires_grad],
        noise=hvdnoise.GNC())
    own = torch.Generator().manual_seed(100 + hvd.rank())
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=own)
        optimizer.zero_grad()
        cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return optimizer


@torch.no_grad()
def accuracy(model, x, y):
    return float((model.eval()(x).argmax(1) == y).double().mean())


def say(text):
    if hvd.rank() == 0:
        print(text, flush=True)


hvd.init()
torch.manual_seed(1)
known = [0, 30, 60, 90, 120, 150]
others = [15, 45, 75, 105, 135, 165]
pretrained = Network(features(), len(known), frozen=False)
hvd.broadcast_parameters(pretrained.state_dict(), root_rank=0)
fit(pretrained, *stripes(known, 2048, seed=1), steps=80, batch=32, lr=0.05)
for buffer in pretrained.buffers():  # each rank has counted its own statistics
    if buffer.is_floating_point():
        buffer.copy_(hvd.allreduce(buffer))
say(f"known stripes: test accuracy {accuracy(pretrained, *stripes(known, 1024, seed=2)):.3f}")

few, test = stripes(others, 48, seed=3), stripes(others, 1024, seed=4)
for name, body in (("pretrained", pretrained.body), ("random", features())):
    model = Network(body, len(others), frozen=True)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    before = {key: value.clone() for key, value in body.state_dict().items()}
    optimizer = fit(model, *few, steps=100, batch=16, lr=0.1)
    same = sum(torch.equal(value, before[key]) for key, value in body.state_dict().items())
    say(f"other stripes, {name} body frozen: test accuracy {accuracy(model, *test):.3f}; "
        f"{same} of {len(before)} tensors of the body unchanged; the noise was on the head in "
        f"{optimizer.noise_coverage.due} steps")
total = sum(float(p.detach().double().sum()) for p in model.parameters())
print(f"rank {hvd.rank()}  sum of weights {total:.6f}", flush=True)
