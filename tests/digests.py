"""Digests of the weights after a matrix of runs: shows that a rewriting of the core keeps the bits.

    python -m tests.digests --out before.txt --weights before/
    ...                                                        (the core is rewritten)
    python -m tests.digests --compare before.txt --weights after/ --weights-before before/

Each of the worlds, Gloo and MPI on 1, 2 and 4 ranks, is one launch; it makes all `cases`, some with
1 and with 2 virtual workers a rank, one after the other: a model with fixed weights, 8 steps, fixed
data for each worker. A line says

    <transport> <ranks> <case> <digest of all parameters and buffers of all ranks>

Only the public API is used. What would leave the order of additions to chance is switched off:
Horovod fuses no tensors, and there is one thread. So a case must have the same digest in every run
on one machine with the same versions; other machines may differ.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from tests.launcher import launch

WORLDS = tuple(f"{transport}-{ranks}" for transport in ("gloo", "mpi") for ranks in (1, 2, 4))
SECONDS = 400  # limit of a launch
STEPS, EXAMPLES, WORDS = 8, 4, 50
LARGE, SMALL = 1 << 20, 5000  # bytes of a bucket: all parameters fit, or few

SCALES = {"radius": 0.5, "lr": 2.0, "relative": 0.1}
SOURCES = ("own", "gathered", "isotropic")
PLANS = [(plan, precision) for plan in ("allgather", "transpose", "group:2")
         for precision in ("fp32", "bf16", "fp16")] + [("gather-only", "fp32"), ("auto", "fp32")]
OPTIONS: dict[str, dict[str, Any]] = {
    "k2": {"backward_passes_per_step": 2}, "groups2": {"groups": 2}, "lists": {"groups": "lists"},
    "buckets": {"bucket_bytes": SMALL}, "alone": {"bucket_bytes": 0},
    "compressed": {"compression": "fp16"}, "predivided": {"gradient_predivide_factor": 2.0},
    "many": {"backward_passes_per_step": 2, "bucket_bytes": SMALL,
             "gradient_predivide_factor": 2.0}}


@dataclass(frozen=True)
class Case:
    """One run: what `hvdnoise.make_noise` and the optimizer are given, and the kind of model."""

    noise: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "images"  # or "words": sparse gradients
    training: bool = True  # False: the model is in evaluation mode


def gnc(source: str, scale: str = "radius", lag: int = 1) -> dict[str, Any]:
    """A displacement of the weights."""
    return {"kind": "gnc", "source": source, scale: SCALES[scale], "lag": lag, "seed": 3}


def covariance(structure: str, source: str) -> dict[str, Any]:
    """A noise on the gradient."""
    return {"kind": "covariance", "structure": structure, "source": source, "emulated_batch": 2,
            "seed": 3}


NOISES = {"none": {"kind": "none"}, **{source: gnc(source) for source in SOURCES},
          "cov-full-workers": covariance("full", "workers"),
          "cov-full-examples": covariance("full", "examples"),
          "cov-isotropic-workers": covariance("isotropic", "workers")}


def cases() -> dict[str, Case]:
    """All cases, by name."""
    found = {name: Case(noise) for name, noise in NOISES.items()}
    for source in SOURCES:
        found |= {f"{source}-{scale}": Case(gnc(source, scale)) for scale in ("lr", "relative")}
        found |= {f"{source}-{scale}-lag{lag}": Case(gnc(source, scale, lag))
                  for lag in (0, 2) for scale in ("radius", "relative")}
    for lag in (1, 2):
        for plan, precision in PLANS:
            given = {"exchange": plan, "noise_precision": precision, "bucket_bytes": SMALL}
            found[f"plan-{plan}-{precision}-lag{lag}"] = Case(gnc("gathered", lag=lag), given)
    for name, noise in NOISES.items():
        chosen = OPTIONS if name in ("none", "own", "gathered") else ("many", "groups2")
        found |= {f"{name}-{option}": Case(noise, OPTIONS[option]) for option in chosen}
    found["own-lag0-many"] = Case(gnc("own", lag=0), OPTIONS["many"])
    found["gathered-lag2-many"] = Case(gnc("gathered", lag=2), OPTIONS["many"])
    found["own-eval"] = Case(gnc("own"), {"noise_in_eval": True}, training=False)
    for name in ("none", *SOURCES):
        found[f"{name}-sparse-as-dense"] = Case(NOISES[name], {"sparse_as_dense": True}, "words")
    return found | {"none-sparse": Case(NOISES["none"], model="words")}


def virtual_workers(name: str, case: Case, ranks: int) -> tuple[int, ...]:
    """With how many virtual workers a rank a case is run.

    Most noises need two workers in all, and sparse gradients travel as such from one worker only.
    """
    if name == "none-sparse":
        return (1,)
    if ranks == 1:
        if name.startswith("plan-"):  # one rank has no plan, only a precision
            return (2,) if "allgather" in name else ()
        return (1, 2) if name.startswith(("none", "cov-full-examples")) else (2,)
    both = not case.options or name.endswith(("many", "dense")) or case.noise.get("lag") == 2
    return (1, 2) if both else (1,)


def make_model(kind: str) -> nn.Module:
    """The same weights every time: 9,826 numbers for images, 2,570 for words."""
    torch.manual_seed(1)
    if kind == "words":
        return nn.Sequential(nn.Embedding(WORDS, 32, sparse=True), nn.Flatten(), nn.Linear(96, 10))
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 32), nn.Tanh(), nn.Linear(32, 10))


def batch(kind: str, worker: int, step: int, part: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a worker's backward pass."""
    generator = torch.Generator().manual_seed(1 + part + 2 * (step + STEPS * worker))
    inputs = torch.randint(WORDS, (EXAMPLES, 3), generator=generator) if kind == "words" else \
        torch.randn(EXAMPLES, 1, 8, 8, generator=generator)
    return inputs, torch.randint(10, (EXAMPLES,), generator=generator)


def train(case: Case, V: int, rank: int) -> dict[str, Tensor]:
    """All parameters and buffers after the steps."""
    import horovod.torch as hvd

    import hvdnoise
    model = make_model(case.model).train(case.training)
    parameters = list(model.parameters())
    options = {"bucket_bytes": LARGE, **case.options}
    k = options.get("backward_passes_per_step", 1)
    if options.get("groups") == "lists":  # the others travel alone
        options["groups"] = [parameters[:3], parameters[-2:]]
    if options.get("compression") == "fp16":
        options["compression"] = hvd.Compression.fp16
    groups: Any = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:]}]
    optimizer = hvdnoise.DistributedOptimizer(
        torch.optim.SGD(groups, lr=0.05, momentum=0.9),
        model.named_parameters(), noise=hvdnoise.make_noise(**case.noise), virtual_workers=V,
        **options)
    weighs = case.noise.get("source") == "examples"

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        for v in range(V):
            for part in range(k):
                inputs, labels = batch(case.model, rank * V + v, step, part)
                losses = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
                loss: Tensor = (optimizer.weigh(losses) if weighs else losses.mean()) / k
                loss.backward()
        return loss

    for step in range(STEPS):
        if case.noise.get("lag") == 0:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.95
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def runs(ranks: int, weights: str | None) -> dict[str, str]:
    """Make all cases; returns this rank's digests. Rank 0 saves its weights, if asked for."""
    import horovod.torch as hvd

    import hvdnoise
    torch.set_num_threads(1)
    hvdnoise.init(group_size=2)
    digests: dict[str, str] = {}
    kept = {}
    for name, case in cases().items():
        for V in virtual_workers(name, case, ranks):
            print(f"{name}-V{V}", flush=True)  # to the log, which a failure shows
            state = kept[f"{name}-V{V}"] = train(case, V, hvd.rank())
            gc.collect()  # so that only one optimizer lives
            if not digests:
                gc.freeze()  # what was imported need not be looked at again
            assert all(tensor.isfinite().all() for tensor in state.values()), name
            content = b"".join(tensor.numpy().tobytes() for tensor in state.values())
            digests[f"{name}-V{V}"] = hashlib.sha256(content).hexdigest()
    if weights is not None and hvd.rank() == 0:
        torch.save(kept, weights)
    hvd.barrier()  # with lag 2, something may be on its way
    hvdnoise.shutdown()
    return digests


def lines_of(world: str, weights: Path | None) -> Iterator[tuple[str, str]]:
    """("<transport> <ranks> <case>", digest) of every case in a world."""
    transport, ranks = world.split("-")
    file = str(weights.resolve() / f"{world}.pt") if weights is not None else None
    everyone = launch(int(ranks), "tests.digests:runs", launcher=transport, timeout=SECONDS,
                      args=(int(ranks), file), env={"HOROVOD_FUSION_THRESHOLD": "0"})
    for name in everyone[0]:
        content = " ".join(digests[name] for digests in everyone)
        yield f"{transport} {ranks} {name}", hashlib.sha256(content.encode()).hexdigest()[:16]


def largest_difference(case: str, before: Path, after: Path) -> float:
    """Of a number in rank 0's parameters and buffers."""
    transport, ranks, name = case.split()
    old, new = (torch.load(folder / f"{transport}-{ranks}.pt", weights_only=True)[name]
                for folder in (before, after))
    return max(float((old[key].double() - new[key].double()).abs().max()) for key in old)


def main() -> int:
    """Exits with 1 when a case differs, or is in one record only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file to write the lines to")
    parser.add_argument("--compare", type=Path, help="such a file, of an earlier run")
    parser.add_argument("--only", nargs="+", choices=WORLDS, default=WORLDS, help="these worlds")
    parser.add_argument("--weights", type=Path, help="folder to save rank 0's weights in")
    parser.add_argument("--weights-before", type=Path, help="such a folder, of an earlier run")
    given = parser.parse_args()
    if given.weights is not None:
        given.weights.mkdir(parents=True, exist_ok=True)
    now: dict[str, str] = {}
    for world in sorted(given.only):
        found = sorted(lines_of(world, given.weights))
        now |= found
        print("".join(f"{case} {digest}\n" for case, digest in found), end="", flush=True)
        if given.out is not None:
            given.out.write_text("".join(f"{case} {digest}\n" for case, digest in now.items()))
    if given.compare is None:
        return 0
    before = dict(line.rsplit(" ", 1) for line in given.compare.read_text().splitlines()
                  if "-".join(line.split()[:2]) in given.only)
    differing = [case for case in sorted(before | now) if before.get(case) != now.get(case)]
    for case in differing:
        size = ""
        if case in before and case in now and given.weights and given.weights_before:
            size = f", by {largest_difference(case, given.weights_before, given.weights):.3g}"
        print(f"DIFFERS {case}: {before.get(case)} -> {now.get(case)}{size}")
    print(f"{len(differing)} of {len(before | now)} cases differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
