"""What deviations of the step before know of this step: the table of lag.md.

    docs/results/make.sh lag            # lag/lag.json, lag.csv and lag.md

A network is trained by SGD on W workers' batches. At some steps, theta being the weights and g_i(x)
worker i's gradient on its batch x, three kinds of deviations d_i = g_i - mean_j g_j are compared:

    stale    at the weights and on the batch of the step before: what lag 1 has
    moved    at theta, on the batch of the step before: what a repeated batch ("echo") has
    fresh    at theta, on the batch of this step: what lag 0 has

- cosines between them, worker by worker; those of unrelated vectors have mean 0;
- their share in the span of the k largest eigenvectors of H, the Hessian of the mean of the
  workers' losses on this batch; a random vector has k/P there;
- what a displacement delta_i = s d_i of root mean square r = share |theta| does to the mean
  gradient of this step. With u(s) = mean_i g_i(theta + s d_i) - mean_i g_i(theta)

      odd = (u(s) - u(-s))/2 = s mean_i H_i d_i + O(s^3)      even = (u(s) + u(-s))/2 = O(s^2)

  For fresh deviations the odd part is s/2 times the gradient of mean_i |d_i|^2: the plus sign makes
  the workers agree. For stale ones of other examples H_i and d_i are independent but for what the
  steps have in common, so that the expected odd part is mean_i H d_i = 0: what is left is the even
  part, the smoothing of the loss, whatever the sign. The pull is the component of u along the odd
  part w of the fresh ones, <u, w>/<w, w>: 1 for fresh ones with the plus sign, to first order.

BatchNorm uses each worker's own batch throughout, as in training.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from torch.nn import functional as F

from hvdnoise.training import data, models
from hvdnoise.training.results import table
from hvdnoise.training.sampler import WorkerSampler

NETWORKS = {"mlp": ("mlp", "auto"), "cnn, group norm": ("small-cnn", "group"),
            "cnn, batch norm": ("small-cnn", "batch")}
Batch = list[tuple[Tensor, Tensor]]  # one (images, labels) a worker


def flat(parts: Any) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


class Network:
    """A model in training mode, whose weights are a flat vector."""

    def __init__(self, name: str, norm: str, spec: data.DataSpec, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = models.build(name, spec.num_classes, spec.image_shape, norm=norm).train()
        named = dict(self.model.named_parameters())
        self.names, self.parameters = list(named), list(named.values())
        self.sizes = [p.numel() for p in self.parameters]
        self.layers = [name for name, p in named.items() if p.ndim > 1]

    def weights(self) -> Tensor:
        return flat(p.detach() for p in self.parameters).clone()

    def loss(self, weights_P: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        parts = weights_P.split(self.sizes)
        given = {name: part.view_as(p) for name, part, p in zip(self.names, parts, self.parameters)}
        return F.cross_entropy(torch.func.functional_call(self.model, given, (images,)), labels)

    def gradients(self, points_WP: Tensor, batch: Batch) -> Tensor:
        """(W, P): each worker's gradient at its own point."""
        found = []
        for point_P, (images, labels) in zip(points_WP, batch):
            point_P = point_P.detach().requires_grad_()
            found.append(torch.autograd.grad(self.loss(point_P, images, labels), point_P)[0])
        return torch.stack(found)

    def deviations(self, weights_P: Tensor, batch: Batch) -> Tensor:
        found_WP = self.gradients(weights_P.expand(len(batch), -1), batch)
        return found_WP - found_WP.mean(0)

    def top(self, weights_P: Tensor, batch: Batch, count: int) -> Tensor:
        """(K, P): eigenvectors of the largest eigenvalues of the mean loss's Hessian."""
        point_P = weights_P.detach().requires_grad_()
        graphs = [torch.autograd.grad(self.loss(point_P, *each), point_P, create_graph=True)[0]
                  for each in batch]
        mean_P = torch.stack(graphs).mean(0)

        def multiply(vector: Any) -> Any:
            given_P = torch.from_numpy(vector.reshape(-1)).float()
            return torch.autograd.grad(mean_P, point_P, given_P, retain_graph=True
                                       )[0].double().numpy()
        size = len(weights_P)
        start = torch.randn(size, generator=torch.Generator().manual_seed(0)).double().numpy()
        try:
            _, columns = eigsh(LinearOperator((size, size), matvec=multiply, dtype=np.float64),
                               k=count, v0=start, tol=0.02, ncv=2 * count + 4, maxiter=20)
        except ArpackNoConvergence as error:
            columns = error.eigenvectors
        return torch.from_numpy(np.linalg.qr(columns)[0].T.copy()).float()


def cosine(left_WP: Tensor, right_WP: Tensor) -> float:
    """The mean over the workers."""
    return F.cosine_similarity(left_WP, right_WP, dim=1).mean().item()


def share_in(vectors_WP: Tensor, span_KP: Tensor) -> float:
    """Of the squared length, in the span; the mean over the workers."""
    if not len(span_KP):
        return math.nan
    basis_KP = torch.linalg.qr(span_KP.T)[0].T
    inside_W = (vectors_WP @ basis_KP.T).square().sum(1)
    return (inside_W / vectors_WP.square().sum(1)).mean().item()


def displaced(network: Network, weights_P: Tensor, batch: Batch, mean_P: Tensor, d_WP: Tensor,
              radius: float) -> tuple[Tensor, Tensor]:
    """u(s) and u(-s)."""
    delta_WP = d_WP * (radius / d_WP.square().sum(1).mean().sqrt())
    plus, minus = (network.gradients(weights_P + sign * delta_WP, batch).mean(0) - mean_P
                   for sign in (1, -1))
    return plus, minus


def compare(network: Network, batch: Batch, before: Batch, stale_WP: Tensor,
            options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of one step."""
    weights_P = network.weights()
    mean_P = network.gradients(weights_P.expand(len(batch), -1), batch).mean(0)
    fresh_WP, moved_WP = (network.deviations(weights_P, each) for each in (batch, before))
    top_KP = network.top(weights_P, batch, options.eigenvalues)
    radius = options.share * weights_P.norm().item()
    stale_plus, stale_minus = displaced(network, weights_P, batch, mean_P, stale_WP, radius)
    fresh_plus, fresh_minus = displaced(network, weights_P, batch, mean_P, fresh_WP, radius)
    w_P, gradient = (fresh_plus - fresh_minus) / 2, mean_P.norm().item()
    found: dict[str, Any] = {
        "fresh_squares": fresh_WP.square().sum(1).mean().item(), "gradient": gradient,
        "cos_stale_fresh": cosine(stale_WP, fresh_WP),
        "cos_stale_moved": cosine(stale_WP, moved_WP),
        "top_stale": share_in(stale_WP, top_KP), "top_fresh": share_in(fresh_WP, top_KP),
        "top_chance": len(top_KP) / len(weights_P),
        "odd_stale": (stale_plus - stale_minus).norm().item() / 2 / gradient,
        "even_stale": (stale_plus + stale_minus).norm().item() / 2 / gradient,
        "odd_fresh": w_P.norm().item() / gradient,
        "even_fresh": (fresh_plus + fresh_minus).norm().item() / 2 / gradient,
        "pull_stale_minus": (stale_minus @ w_P / (w_P @ w_P)).item(),
        "pull_fresh_plus": (fresh_plus @ w_P / (w_P @ w_P)).item(), "layers": {}}
    split = [each.split(network.sizes, dim=1) for each in (stale_WP, moved_WP, fresh_WP, top_KP)]
    for name, stale, moved, fresh, top in zip(network.names, *split):
        if name in network.layers:
            found["layers"][name] = {
                "share": (fresh.square().sum() / fresh_WP.square().sum()).item(),
                "cos_stale_fresh": cosine(stale, fresh), "cos_stale_moved": cosine(stale, moved),
                "top_stale": share_in(stale, top), "top_fresh": share_in(fresh, top),
                "top_chance": min(1.0, len(top) / top.shape[1])}
    return found


def batches(datasets: data.Datasets, seed: int, options: argparse.Namespace) -> Iterator[Batch]:
    """One list of the workers' batches a step, as the trainer draws them."""
    sampler = WorkerSampler(len(datasets.train), num_workers=options.workers, seed=seed,
                            batch_size=options.batch // options.workers,
                            worker_ids=range(options.workers))
    loader = data.train_loader(datasets, sampler)
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        found = list(loader)
        for start in range(0, len(found), options.workers):
            yield found[start:start + options.workers]


def measure(title: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train a network, and compare at ``options.points`` steps of the run."""
    config = data.DataConfig(limit=options.images, augment=False)
    config.record.prepare(config)
    datasets = data.build(config, seed=seed)
    network = Network(*NETWORKS[title], datasets.spec, seed)
    rate = options.lr
    optimizer = torch.optim.SGD(network.parameters, lr=rate, momentum=0.9, weight_decay=5e-4)
    total = options.epochs * (len(datasets.train) // options.batch)
    wanted = {max(1, round(total * (n + 1) / options.points) - 1) for n in range(options.points)}
    found, before, stale_WP = [], [], torch.empty(0)
    for step, batch in enumerate(batches(datasets, seed, options)):
        if step in wanted:
            found.append({"network": title, "seed": seed, "step": step,
                          "epoch": step * options.epochs / total,
                          **compare(network, batch, before, stale_WP, options)})
            print(json.dumps({key: value for key, value in found[-1].items() if key != "layers"}),
                  flush=True)
        gradients_WP = network.gradients(network.weights().expand(options.workers, -1), batch)
        before, stale_WP = batch, gradients_WP - gradients_WP.mean(0)
        for p, part in zip(network.parameters, gradients_WP.mean(0).split(network.sizes)):
            p.grad = part.view_as(p)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / total)) / 2
        optimizer.step()
    return found


HEADS = {"cos_stale_fresh": "cos(stale, fresh)", "cos_stale_moved": "cos(stale, moved)",
         "top_stale": "stale in top", "top_fresh": "fresh in top", "top_chance": "chance",
         "odd_stale": "odd, stale", "even_stale": "even, stale", "odd_fresh": "odd, fresh",
         "even_fresh": "even, fresh", "pull_stale_minus": "pull of -stale",
         "pull_fresh_plus": "pull of +fresh"}


def mean(values: list[float]) -> str:
    """The mean, and of several that differ its standard error."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len({*values}) > 1 else 0.0
    return f"{np.mean(values):.3g}" + (f" ± {error:.2g}" if error else "")


def lines(found: list[dict[str, Any]]) -> list[str]:
    """Two tables in Markdown, of means over the seeds: by step; by layer, over the steps too."""
    keys, names = ["share", *list(HEADS)[:5]], list(HEADS.values())
    cells = [["network", "epoch", *names]]
    layers = [["network", "layer", "share of the deviations", *names[:5]]]
    for network in dict.fromkeys(each["network"] for each in found):
        of = [each for each in found if each["network"] == network]
        for step in dict.fromkeys(each["step"] for each in of):
            at = [each for each in of if each["step"] == step]
            cells.append([network, f"{at[0]['epoch']:.1f}",
                          *(mean([each[key] for each in at]) for key in HEADS)])
        layers += [[network, name, *(f"{np.mean([each['layers'][name][key] for each in of]):.3g}"
                                     for key in keys)] for name in of[0]["layers"]]
    return [*table(cells), "", *table(layers, left=2)]


def main() -> None:
    parser = argparse.ArgumentParser(description="compare the deviations of two steps")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    for name, value in (("images", 4096), ("batch", 512), ("workers", 16), ("epochs", 30),
                        ("points", 4), ("eigenvalues", 10)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--share", type=float, default=0.02, help="radius by the weights' norm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    found = [each for title in options.networks for seed in options.seeds
             for each in measure(title, seed, options)]
    (options.out / "lag.json").write_text(json.dumps(found, indent=1))
    with (options.out / "lag.csv").open("w", newline="") as file:
        rows = [{key: value for key, value in each.items() if key != "layers"} for each in found]
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (options.out / "lag.md").write_text("\n".join(lines(found)) + "\n")
    print("\n".join(lines(found)))


if __name__ == "__main__":
    main()
