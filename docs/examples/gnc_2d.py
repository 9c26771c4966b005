# %% What GNC does, in two dimensions: python docs/examples/gnc_2d.py [FILE.png]
"""A loss of two weights has a minimum that is sharp along x, and deeper, and a wide one.

Eight workers, here one process with virtual_workers=8. Each has the loss plus a linear term of its
own, drawn anew in each step: the noise of its batch, larger along x than along y. The optimizer is
hvdnoise's own; nothing of it is written again here.
"""
import sys

import matplotlib
import torch
from torch import nn

import hvdnoise

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

WORKERS, STEPS, SEEDS, RADIUS = 8, 160, 4, 0.5
SHARP, WIDE = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.0])
NOISE = torch.tensor([1.0, 0.1])  # standard deviation of a worker's gradient, along x and y


# %% The loss: (..., 2) -> (...)
def loss(w):
    sharp = 0.9 * torch.exp(-((w - SHARP) / torch.tensor([0.2, 1.2])).square().sum(-1) / 2)
    wide = torch.exp(-(w - WIDE).square().sum(-1) / 2)
    return 0.05 * w.square().sum(-1) - sharp - wide


class Point(nn.Module):
    """Two weights; what a forward reads is what the noise makes of them."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(SHARP.clone())
        self.read = []

    def forward(self, slope):
        self.read.append(self.w.detach().clone())
        return loss(self.w) + slope @ self.w


# %% A training run from the sharp minimum
def train(noise, seed):
    """The weights after each step (STEPS + 1, 2), and the displacements of all workers."""
    model = Point()
    optimizer = hvdnoise.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.06), named_parameters=model.named_parameters(),
        noise=noise, virtual_workers=WORKERS)
    draws = torch.Generator().manual_seed(seed)
    path, moved = [SHARP.clone()], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(WORKERS):
            model(NOISE * torch.randn(2, generator=draws)).backward()
            moved.append(model.read.pop() - path[-1])
        optimizer.step()
        path.append(model.w.detach().clone())
    return torch.stack(path), torch.stack(moved[WORKERS:WORKERS * STEPS // 2])  # of full size


def radius(step):
    """It shrinks in the second half of the run, so that this ends in the minimum it is at."""
    return RADIUS * min(1, 2 * (1 - step / STEPS))


def noises(seed):
    return {"SGD": None, "GNC": hvdnoise.GNC(radius, source="own", seed=seed),
            "white noise": hvdnoise.GNC(radius, source="isotropic", seed=seed)}


hvdnoise.init()
runs = {name: [train(noises(seed)[name], seed) for seed in range(SEEDS)] for name in noises(0)}

# %% Where they end, and what the displacements were
for name, each in runs.items():
    ends = torch.stack([path[-1] for path, _ in each])
    near = int(((ends - WIDE).norm(dim=-1) < 0.5).sum())
    moved = torch.cat([moved for _, moved in each])
    size = moved.square().sum(-1).mean().sqrt()
    along = moved[:, 0].square().mean().sqrt()
    print(f"{name}: {near} of {SEEDS} runs end in the wide minimum; displacement {size:.2f}, "
          f"along x {along:.2f}; loss at the ends {loss(ends).mean():.2f}")

# %% The loss as it is, and as workers that are displaced see it: the mean over those displacements
line = torch.stack([torch.linspace(-2, 2.5, 200), torch.zeros(200)], -1)
seen = {name: loss(line[:, None] + torch.cat([moved for _, moved in runs[name]])[::7]).mean(1)
        for name in ("GNC", "white noise")}
between = (line[:, 0] >= -1) & (line[:, 0] <= 1)
for name, values in {"the loss itself": loss(line), **seen}.items():
    lowest = values[between].cummin(0).values
    climbs = (values[between] - lowest).max()
    print(f"from the sharp minimum to the wide one it climbs {climbs:.2f}: {name}")

# %% The figure
figure, (map_, section) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
x, y = torch.meshgrid(torch.linspace(-2, 2.5, 200), torch.linspace(-1.6, 1.6, 150), indexing="xy")
map_.contourf(x, y, loss(torch.stack([x, y], -1)), levels=25, cmap="Greys_r")
colours = {"SGD": "tab:orange", "GNC": "tab:blue", "white noise": "tab:green"}
for name, each in runs.items():
    for number, (path, _) in enumerate(each):
        map_.plot(path[:, 0], path[:, 1], color=colours[name], linewidth=0.8, alpha=0.7,
                  label=name if number == 0 else None)
        map_.plot(*path[-1], "o", color=colours[name], markersize=4)
map_.set(title=f"{SEEDS} runs of each from the sharp minimum; dots: their ends", xlabel="x",
         ylabel="y")
map_.legend(loc="lower right")
section.plot(line[:, 0], loss(line), color="black", label="the loss at y = 0")
for name, values in seen.items():
    section.plot(line[:, 0], values, color=colours[name],
                 label=f"mean over the displacements: {name}")
section.set(title=f"radius {RADIUS}", xlabel="x")
section.legend()
file = sys.argv[1] if len(sys.argv) > 1 else "gnc_2d.png"
figure.savefig(file, dpi=110)
print(f"written to {file}")
