"""A data set and a model of one's own for `hvdnoise train`: waves of four forms, which it makes.

`load` and `build` are what signals.yaml names. A training example is shifted in time anew each time
that it is drawn; hvdnoise sees to it that a resumed run draws the same.
"""

import math

import torch
from torch import nn
from torch.utils.data import Dataset

LENGTH = 64
FORMS = [torch.sin, lambda t: torch.sin(t).sign(),                    # sine, square
         lambda t: t / math.pi - 1, lambda t: (t / math.pi - 1).abs() * 2 - 1]  # saw, triangle


class Shifted(Dataset):
    """Items (x, label), x of the shape (1, LENGTH)."""

    def __init__(self, x, labels):
        self.x, self.targets = x, labels  # `targets` saves reading each item for its label

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        shift = int(torch.randint(LENGTH, ()))
        return self.x[index].roll(shift, dims=-1), self.targets[index]


def waves(count, seed):
    """(count, 1, LENGTH) noisy waves of 2 to 4 periods, and their labels (count,)."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(FORMS), (count,), generator=draws)
    periods = torch.randint(2, 5, (count, 1), generator=draws)
    phase = 2 * math.pi * torch.rand(count, 1, generator=draws)
    t = (2 * math.pi * periods * torch.arange(LENGTH) / LENGTH + phase) % (2 * math.pi)
    x = torch.stack([FORMS[label](each) for label, each in zip(labels, t)])
    return (x + 0.5 * torch.randn(x.shape, generator=draws))[:, None], labels


def load(root):
    """What hvdnoise calls, with the folder `data.root`, which is not needed here."""
    return {"train": Shifted(*waves(2048, seed=1)), "test": waves(1024, seed=2),
            "classes": len(FORMS), "mean": 0.0, "std": 0.8}


def build(classes, shape):
    """What hvdnoise calls for the model: (b, *shape) -> (b, classes)."""
    return nn.Sequential(
        nn.Conv1d(shape[0], 32, 9, padding=4), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(32, 64, 9, padding=4), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(),
        nn.Linear(64, classes))
