"""Covariance noise: the class that fits a structure and a source."""

from __future__ import annotations

from typing import Any, Callable, TypeVar

from hvdnoise.noise.base import Noise
from hvdnoise.noise.diagonal import DiagonalCovariance, DiagonalExampleCovariance
from hvdnoise.noise.full_examples import FullExampleCovariance
from hvdnoise.noise.full_workers import FullWorkerCovariance
from hvdnoise.noise.isotropic import IsotropicCovariance
from hvdnoise.noise.kronecker import KroneckerCovariance
from hvdnoise.noise.layerwise import LayerwiseCovariance
from hvdnoise.noise.signature import (
    REQUIRED,
    Maker,
    Option,
    check_maker,
    check_name,
    name_of,
    options_of,
)

C = TypeVar("C", bound=Maker)

COVARIANCES: dict[tuple[str, str], Maker] = {  # (structure, source) -> class
    ("full", "workers"): FullWorkerCovariance,
    ("full", "examples"): FullExampleCovariance,
    ("diagonal", "workers"): DiagonalCovariance,
    ("diagonal", "examples"): DiagonalExampleCovariance,
    ("isotropic", "workers"): IsotropicCovariance,
    ("kronecker", "workers"): KroneckerCovariance,
    ("layerwise", "workers"): LayerwiseCovariance,
}
_COMMON = ("emulated_batch", "batch_size", "seed")


def register_covariance(structure: str, source: str) -> Callable[[C], C]:
    """A decorator: this class is the covariance noise of a structure from a source.

    Its constructor takes ``emulated_batch``, ``batch_size`` and ``seed``. What else it takes are
    options of `CovarianceNoise`, and of the trainer.

    Raises:
        ValueError: for a bad name, or a pair that another class has.
    """
    def register(maker: C) -> C:
        check_name("structure", structure)
        check_name("source", source)
        check_maker(maker)
        known = COVARIANCES.get((structure, source), maker)
        if name_of(known) != name_of(maker):
            raise ValueError(f"structure={structure!r} from source={source!r} is "
                             f"{name_of(known)} already; give {name_of(maker)} another name")
        if missing := [name for name in _COMMON if name not in options_of(maker)]:
            raise ValueError(f"{name_of(maker)}: a covariance noise takes {', '.join(missing)}")
        COVARIANCES[structure, source] = maker
        return maker
    return register


def own_options(structure: str, source: str) -> dict[str, Option]:
    """The options that this covariance noise has beside those that all have."""
    found = options_of(COVARIANCES[structure, source])
    return {name: option for name, option in found.items() if name not in _COMMON}


def CovarianceNoise(structure: str = "full", emulated_batch: int | None = None, *,
                    source: str = "workers", batch_size: int | None = None,
                    seed: int = 0, **options: Any) -> Noise:
    """Noise on the gradient with the covariance of a batch of ``emulated_batch`` examples.

    Args:
        structure: "full" (the gradient's own covariance), "diagonal" (its diagonal, with a running
            mean), "isotropic" (the control: the same variance without structure) or "layerwise"
            (the fairer control: white within each tensor).
        emulated_batch: M, the batch whose noise the step shall have; 1 <= M <= the whole batch.
        source: estimated from the "workers" gradients, or from the "examples" (uncentred; then
            the loop says ``loss = optimizer.weigh(losses)``).
        batch_size: examples per worker and step; default: as seen in the forward pass.
        seed: the same on all ranks.
        options: those that this structure alone has.

    Raises:
        ValueError: for a value outside these.
    """
    if emulated_batch is None:
        raise ValueError("CovarianceNoise needs emulated_batch=: the batch size whose noise the "
                         "step shall have, at most the whole batch")
    if (structure, source) not in COVARIANCES:
        choices = ", ".join(f"{s} from {o}" for s, o in COVARIANCES)
        raise ValueError(f"structure={structure!r} from source={source!r} is not one of: {choices}")
    own = own_options(structure, source)
    for name, value in options.items():
        if name not in own:
            raise ValueError(f"{name}={value!r} does not go with structure={structure!r} from "
                             f"source={source!r}; options of its own: {', '.join(own) or 'none'}")
    missing = [name for name, option in own.items()
               if option.default is REQUIRED and name not in options]
    if missing:
        raise ValueError(f"structure={structure!r} from source={source!r} needs {missing[0]}=")
    return COVARIANCES[structure, source](emulated_batch=emulated_batch, batch_size=batch_size,
                                          seed=seed, **options)
