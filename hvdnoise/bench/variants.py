"""The variants by name, and the settings that a name stands for.

    plain           Horovod's own hvd.DistributedOptimizer: what all others are compared with
    none            hvdnoise.DistributedOptimizer without noise
    ddp             torch's DistributedDataParallel: gloo, or nccl with a GPU for every rank
    sam             sharpness-aware minimization of pytorch_optimizer, rho 0.05: two passes, of
                    which the first stays on the rank and the second is averaged by Horovod
    gnc-own, gnc-isotropic                  GNC that needs nothing from the other workers [:LAG]
    gathered[:PLAN][:PRECISION][:LAG]       GNC from mixtures of all workers' deviations
    full-workers, full-examples             covariance noise by weights (identities I1 and I2)
    isotropic                               covariance noise without structure: the control

    PLAN        auto (default), allgather, gather-only, transpose, group (of --group_size ranks)
    PRECISION   fp32 (default), bf16, fp16: of the noise on the wire
    LAG         lag0, lag1 (default), lag2

For instance gathered:transpose:bf16:lag2. GNC: Haruki et al. 2019; covariance noise: Wen et al.
2020; SAM: Foret et al., Sharpness-Aware Minimization, ICLR 2021, arXiv:2010.01412.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from hvdnoise.exchange_plan import PRECISIONS, Shape
from hvdnoise.noise import GNC, CovarianceNoise, Noise
from hvdnoise.plans import PLAIN
from hvdnoise.plans import PLANS as _P

METHODS = ("plain", "none", "ddp", "sam", "gnc-own", "gnc-isotropic", "gathered", "full-workers",
           "full-examples", "isotropic")
PLANS = ("auto", "allgather", "gather-only", "transpose", "group")
LAGS = ("lag0", "lag1", "lag2")
SETS = {
    "default": ("plain", "none", "ddp", "sam", "gnc-own", "full-workers", "gathered"),
    "all": ("plain", "none", "ddp", "sam", "gnc-own", "gnc-isotropic", "full-workers",
            "full-examples", "isotropic", "gathered", "gathered:allgather",
            "gathered:allgather:bf16", "gathered:gather-only", "gathered:transpose",
            "gathered:transpose:bf16", "gathered:transpose:lag2",
            "gathered:transpose:bf16:lag2", "gathered:group"),
}


@dataclass(frozen=True)
class Variant:
    """What a name stands for; ``name`` is its shortest form."""

    method: str
    plan: str = "auto"
    precision: str = "fp32"
    lag: int = 1

    @property
    def name(self) -> str:
        options = ((self.plan, "auto"), (self.precision, "fp32"), (f"lag{self.lag}", "lag1"))
        return ":".join([self.method, *(value for value, usual in options if value != usual)])

    def noise(self, *, radius: float, emulated_batch: int, batch_size: int, seed: int
              ) -> Noise | None:
        """A new noise of this variant; None where it has none. The arguments are the noises'."""
        if self.method.startswith(("gnc-", "gathered")):
            return GNC(radius, source=self.method.removeprefix("gnc-"), lag=self.lag, seed=seed)
        if self.method in ("full-workers", "full-examples", "isotropic"):
            structure, _, source = self.method.partition("-")
            return CovarianceNoise(structure, emulated_batch, source=source or "workers",
                                   batch_size=batch_size, seed=seed)
        return None

    def options(self, group_size: int) -> dict[str, Any]:
        """What `hvdnoise.DistributedOptimizer` is given besides the noise."""
        plan = f"group:{group_size}" if self.plan == "group" else self.plan
        return {key: value for key, value, usual in (("exchange", plan, "auto"),
                                                     ("noise_precision", self.precision, "fp32"))
                if value != usual}

    def predicted_bytes(self, plan: str, numbers: int, ranks: int, group_size: int) -> float:
        """Bytes that a rank receives in a step under a plan of `hvdnoise.costs`.

        The first pass of lag 0 costs an exchange of its own.
        """
        shape = Shape(numbers, ranks, precision=self.precision, group_size=group_size)
        again = PLAIN.bytes_received(shape) if self.lag == 0 else 0.0
        return _P[plan].bytes_received(shape) + again


def parse(name: str) -> Variant:
    """The variant of a name (see the module).

    Raises:
        ValueError: when there is no such variant.
    """
    method, *options = name.split(":")
    if method not in METHODS:
        near = difflib.get_close_matches(name, [*METHODS, *SETS["all"]], n=2)
        raise ValueError(f"variant {name!r} is unknown: " + (
            f"did you mean {' or '.join(near)}?" if near else
            f"give some of {', '.join(METHODS)}, or all"))
    takes = {"gathered": (PLANS, PRECISIONS, LAGS), "gnc-own": (LAGS,), "gnc-isotropic": (LAGS,)}
    found: dict[tuple[str, ...], str] = {}
    for option in options:
        kind = next((kind for kind in takes.get(method, ()) if option in kind), None)
        if kind is None or kind in found:
            choices = ", ".join(f"one of {', '.join(kind)}" for kind in takes.get(method, ()))
            raise ValueError(f"variant {name!r}: {option!r} is not an option of {method} here, "
                             f"which takes {choices or 'none'}")
        found[kind] = option
    variant = Variant(method, found.get(PLANS, "auto"), found.get(PRECISIONS, "fp32"),
                      int(found.get(LAGS, "lag1")[-1]))
    if variant.plan == "gather-only" and variant.precision != "fp32":
        raise ValueError(f"variant {name!r}: gather-only sends the gradients themselves, in their "
                         "own precision; drop the precision or choose another plan")
    return variant


def names(text: str) -> tuple[list[str], bool]:
    """The names in a list, plain in front, each once; and whether the user named each of them."""
    given = [name for name in re.split(r"[,\s]+", text.strip()) if name]
    explicit = not any(name in SETS for name in given)
    each = [one for name in ["plain", *given] for one in SETS.get(name, (name,))]
    return list(dict.fromkeys(parse(name).name for name in each)), explicit
