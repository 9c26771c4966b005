"""The settings of a benchmark, and what makes them right or wrong before anything is started."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvdnoise import comm, extras
from hvdnoise.bench import measure, models
from hvdnoise.bench.variants import Variant, names, parse
from hvdnoise.noise import Noise
from hvdnoise.training.errors import one_line_errors
from hvdnoise.training.validation import require, require_device, require_folder


@dataclass(frozen=True)
class BenchConfig:
    """Time, bytes and memory of ways to average gradients, side by side in one run.

    Args:
        model: a model of train, for synthetic images of 10 classes, or comm:25M for 25 million
            numbers (k: thousand) whose gradients cost next to no computation.
        variants: names with commas between: plain, none, ddp, sam, gnc-own, gnc-isotropic,
            full-workers, full-examples, isotropic, stale-sam, momentum-sam, extrapolation,
            anticorrelated, pnm, gathered[:PLAN][:PRECISION][:LAG] as in
            gathered:transpose:bf16:lag2, or any other registered noise as in KIND:OPTION=VALUE;
            or default, or all. plain is always there.
        plugins: as of hvdnoise train: Python files or modules that register noises.
        batch_size: examples of each rank and step.
        image_size: width and height of the images.
        compute_ms: of comm models; milliseconds that forward and backward of an emulated
            accelerator take, during which the CPU is idle.
        rounds: how often each variant's turn comes.
        steps: measured steps of a turn.
        warmup: rounds before those that count.
        memory: measure each variant's memory, alone, before the rounds.
        radius: of GNC, SAM and other displacements, unless they follow the learning rate.
        emulated_batch: of covariance noise; default: half of the whole batch.
        group_size: ranks that gather among themselves in gathered:group.
        lr: of SGD with momentum 0.9, which all variants use.
        interface: network interface whose received bytes are counted; default:
            HOROVOD_GLOO_IFACE, else lo.
        seed: of weights, data, noise and the order of the variants.
        device: auto takes the GPU of the local rank where there is one.
        threads: of each rank; default: OMP_NUM_THREADS, else the cores shared out.
        out: folder for bench.json, table.md and figure.png.
        overwrite: replace an earlier benchmark there.
    """

    model: str = "resnet20"
    variants: str = "default"
    plugins: tuple[str, ...] = ()
    batch_size: int = 32
    image_size: int = 32
    compute_ms: float = 0.0
    rounds: int = 5
    steps: int = 10
    warmup: int = 1
    memory: bool = True
    radius: float = 0.05
    emulated_batch: int | None = None
    group_size: int = 2
    lr: float = 0.01
    interface: str | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    out: str | None = None
    overwrite: bool = False

    def new_noise(self, variant: Variant, ranks: int) -> Noise | None:
        """A new noise of a variant, on ``ranks`` ranks."""
        whole = self.batch_size * ranks
        return variant.noise(radius=self.radius, batch_size=self.batch_size, seed=self.seed,
                             emulated_batch=self.emulated_batch or max(1, whole // 2))


# What may differ between the ranks, as it changes nothing that they agree on.
FREE = ("device", "threads", "interface", "out", "overwrite")


@one_line_errors()
def validate(config: BenchConfig, ranks: int) -> list[Variant]:
    """Check the settings as a whole; the variants to run, plain first.

    Raises:
        ConfigError: one line with the value that is wrong and the remedy.
    """
    _check_numbers(config, ranks)
    models.check(config.model, config.image_size)
    require(config.compute_ms == 0 or models.is_comm(config.model), "compute_ms",
            config.compute_ms, "only models such as comm:25M emulate an accelerator; leave it "
            "out, or choose such a model")
    _check_places(config)
    return _variants(config, ranks)


def _check_numbers(config: BenchConfig, ranks: int) -> None:
    for name, least in (("batch_size", 1), ("image_size", 1), ("rounds", 1), ("steps", 1),
                        ("warmup", 0), ("group_size", 1), ("seed", 0)):
        value = getattr(config, name)
        require(value >= least, name, value, f"give {least} or more")
    require(config.threads is None or config.threads >= 1, "threads", config.threads,
            "give 1 or more")
    for name in ("compute_ms", "radius", "lr"):
        value = getattr(config, name)
        require(0 <= value < math.inf, name, value, "give a finite number >= 0")
    whole = config.batch_size * ranks
    require(config.emulated_batch is None or 1 <= config.emulated_batch <= whole,
            "emulated_batch", config.emulated_batch, f"give 1 to {whole}, the whole batch")


def _check_places(config: BenchConfig) -> None:
    interface, known = measure.interface(config.interface), measure.received()
    require(not known or interface in known, "interface", interface,
            f"this host has {', '.join(known)}")
    require_device(config.device)
    if config.out is not None:
        extras.require("--out", "matplotlib")
        require_folder(Path(config.out), "bench.json", "a benchmark", overwrite=config.overwrite)


def _variants(config: BenchConfig, ranks: int) -> list[Variant]:
    """Those asked for; of a set, those that this number of ranks can run."""
    chosen, explicit = names(config.variants)
    variants = []
    for variant in map(parse, chosen):
        why = _unfit(variant, config, ranks)
        require(not (why and explicit), "variants", variant.name, why)
        variants += [] if why else [variant]
    return variants


def _unfit(variant: Variant, config: BenchConfig, ranks: int) -> str:
    noise = config.new_noise(variant, ranks)
    if noise is not None and noise.min_workers > ranks:
        return f"it needs {noise.min_workers} ranks and there is {ranks}; start more"
    if noise is not None and noise.sees_examples:
        if models.is_comm(config.model):
            return "it sees gradients of single examples, which comm models do not have"
        try:
            models.check_examples(config.model, config.image_size)
        except ValueError as error:
            return str(error)
    if variant.grouped:
        try:
            comm.group_of(0, ranks, config.group_size)
        except ValueError as error:
            return f"{error} with --group_size"
    return ""
