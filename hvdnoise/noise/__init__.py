"""The noises, and the one place where their names are looked up."""

from __future__ import annotations

from typing import Any

from hvdnoise.noise.base import Noise, StepContext
from hvdnoise.noise.full_examples import FullExampleCovariance
from hvdnoise.noise.full_workers import FullWorkerCovariance
from hvdnoise.noise.gnc import GNC
from hvdnoise.noise.isotropic import IsotropicCovariance

__all__ = ["COVARIANCES", "GNC", "CovarianceNoise", "Noise", "StepContext", "make_noise"]

COVARIANCES: dict[tuple[str, str], type[Noise]] = {  # (structure, source) -> class
    ("full", "workers"): FullWorkerCovariance,
    ("full", "examples"): FullExampleCovariance,
    ("isotropic", "workers"): IsotropicCovariance,
}


def CovarianceNoise(structure: str = "full", emulated_batch: int | None = None, *,
                    source: str = "workers", batch_size: int | None = None,
                    seed: int = 0) -> Noise:
    """Noise on the gradient with the covariance of a batch of ``emulated_batch`` examples.

    Args:
        structure: "full" (the gradient's own covariance) or "isotropic" (the control: the same
            variance without structure).
        emulated_batch: M, the batch whose noise the step shall have; 1 <= M <= the whole batch.
        source: estimated from the "workers" gradients, or from the "examples" (uncentred; then
            the loop says ``loss = optimizer.weigh(losses)``).
        batch_size: examples per worker and step; default: as seen in the forward pass.
        seed: the same on all ranks.

    Raises:
        ValueError: for a value outside these.
    """
    if emulated_batch is None:
        raise ValueError("CovarianceNoise needs emulated_batch=: the batch size whose noise the "
                         "step shall have, at most the whole batch")
    if (structure, source) not in COVARIANCES:
        choices = ", ".join(f"{s} from {o}" for s, o in COVARIANCES)
        raise ValueError(f"structure={structure!r} from source={source!r} is not one of: {choices}")
    return COVARIANCES[structure, source](  # type: ignore[call-arg]
        emulated_batch=emulated_batch, batch_size=batch_size, seed=seed)


def make_noise(kind: str, **options: Any) -> Noise | None:
    """A noise by name, as configurations give it: "none", "gnc" or "covariance".

    Raises:
        ValueError: for an unknown name or a bad option.
    """
    if kind == "none":
        return None
    makers = {"gnc": GNC, "covariance": CovarianceNoise}
    if kind not in makers:
        raise ValueError(f"noise kind={kind!r} must be one of none, {', '.join(makers)}")
    return makers[kind](**options)  # type: ignore[operator]
