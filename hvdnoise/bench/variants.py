"""The variants by name, and the settings that a name stands for.

    plain           Horovod's own hvd.DistributedOptimizer: what all others are compared with
    none            hvdnoise.DistributedOptimizer without noise
    ddp             torch's DistributedDataParallel: gloo, or nccl with a GPU for every rank
    sam             sharpness-aware minimization by each worker's own gradient: two passes, of
                    which the first stays on the rank
    gnc-own, gnc-isotropic                  GNC that needs nothing from the other workers [:LAG]
    gathered[:PLAN][:PRECISION][:LAG]       GNC from mixtures of all workers' deviations
    full-workers, full-examples             covariance noise by weights (identities I1 and I2)
    isotropic                               covariance noise without structure: the control
    STRUCTURE-SOURCE[:OPTION=VALUE...]      any other registered covariance
    stale-sam, momentum-sam, extrapolation, anticorrelated, pnm     baselines without a second pass
    KIND[:OPTION=VALUE...]                  any other registered noise, by its name

    PLAN        auto (default), allgather, gather-only, transpose, group (of --group_size ranks)
    PRECISION   fp32 (default), bf16, fp16: of the noise on the wire
    LAG         lag0, lag1 (default), lag2

For instance gathered:transpose:bf16:lag2. GNC: Haruki et al. 2019; covariance noise: Wen et al.
2020; SAM: Foret et al., Sharpness-Aware Minimization, ICLR 2021, arXiv:2010.01412. The sources of
the other baselines are in their modules in hvdnoise.noise.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from hvdnoise.exchange_plan import PRECISIONS, Shape
from hvdnoise.noise import COVARIANCES, Noise, kinds, noise_options
from hvdnoise.noise.covariance import own_options
from hvdnoise.noise.gnc import SOURCES
from hvdnoise.planning.predict import received_in_a_step
from hvdnoise.plans import MIXING_PLANS, PLANS, with_group_size
from hvdnoise.training.config import NoiseConfig, TrainConfig
from hvdnoise.training.options import parse as parse_settings

CHOICES = ("auto", *MIXING_PLANS)
LAGS = ("lag0", "lag1", "lag2")
SETS = {
    "default": ("plain", "none", "ddp", "sam", "gnc-own", "full-workers", "gathered"),
    "all": ("plain", "none", "ddp", "sam", "gnc-own", "gnc-isotropic", "gnc-layerwise",
            "full-workers", "full-examples", "diagonal", "diagonal-examples", "kronecker",
            "isotropic", "layerwise", "stale-sam", "momentum-sam", "extrapolation",
            "anticorrelated", "pnm", "gathered",
            *(f"gathered:{name}{options}" for name in MIXING_PLANS
              for options in PLANS[name].compared)),
}


def methods() -> dict[str, dict[str, Any] | None]:
    """The methods by name: the settings of each one's noise, None where it has none."""
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(("plain", "none", "ddp"))
    for source in SOURCES:
        found["gathered" if source == "gathered" else f"gnc-{source}"] = {
            "kind": "gnc", "source": source}
    for structure, source in COVARIANCES:
        usual = source == "workers" and structure != "full"
        found[structure if usual else f"{structure}-{source}"] = {
            "kind": "covariance", "structure": structure, "source": source}
    for kind in kinds():
        if kind not in ("gnc", "covariance"):
            found.setdefault(kind, {"kind": kind})
    return found


@dataclass(frozen=True)
class Variant:
    """What a name stands for; ``name`` is its shortest form."""

    method: str
    plan: str = "auto"
    precision: str = "fp32"
    lag: int = 1
    given: tuple[str, ...] = ()  # OPTION=VALUE

    @property
    def name(self) -> str:
        options = ((self.plan, "auto"), (self.precision, "fp32"), (f"lag{self.lag}", "lag1"))
        return ":".join([self.method, *(value for value, usual in options if value != usual),
                         *self.given])

    @property
    def grouped(self) -> bool:
        """Whether ranks gather inside groups."""
        return self.plan in PLANS and PLANS[self.plan].grouped

    def noise(self, *, radius: float, emulated_batch: int, batch_size: int, seed: int
              ) -> Noise | None:
        """A new noise of this variant; None where it has none. The arguments are the noises'."""
        settings = methods()[self.method]
        if settings is None:
            return None
        settings = {**settings, **_values(settings["kind"], self.given)}
        takes = noise_options(settings["kind"])
        if self.lag != 1:
            settings["lag"] = self.lag
        if "radius" in takes and not any(takes[name].schedule for name in settings
                                         if name in takes):
            settings["radius"] = radius
        if "emulated_batch" in takes:
            settings.setdefault("emulated_batch", emulated_batch)
        return NoiseConfig(**settings).build(seed=seed, batch_size=batch_size, total_steps=1)

    def options(self, group_size: int) -> dict[str, Any]:
        """What `hvdnoise.DistributedOptimizer` is given besides the noise."""
        plan = with_group_size(self.plan, group_size)
        return {key: value for key, value, usual in (("exchange", plan, "auto"),
                                                     ("noise_precision", self.precision, "fp32"))
                if value != usual}

    def predicted_bytes(self, plan: str, numbers: int, ranks: int, group_size: int,
                        statistics_bytes: int = 0) -> float:
        """Bytes that a rank receives in a step under a plan of `hvdnoise.plans`.

        The first pass of lag 0 costs an exchange of its own, unless it stays on the rank.
        """
        noise = self.noise(radius=0.0, emulated_batch=1, batch_size=1, seed=0)
        shape = Shape(numbers, ranks, precision=self.precision, group_size=group_size,
                      statistics_bytes=statistics_bytes)
        return received_in_a_step(PLANS[plan], shape, noise)


def parse(name: str) -> Variant:
    """The variant of a name (see the module).

    Raises:
        ValueError: when there is no such variant.
    """
    method, *options = name.split(":")
    known = methods()
    if method not in known:
        near = difflib.get_close_matches(name, [*known, *SETS["all"]], n=2)
        raise ValueError(f"variant {name!r} is unknown: " + (
            f"did you mean {' or '.join(near)}?" if near else
            f"give some of {', '.join(known)}, or all"))
    if options and (own := _own_options(known[method])):
        return Variant(method, given=_given(name, options, own))
    takes = {"gathered": (CHOICES, PRECISIONS, LAGS), "gnc-own": (LAGS,), "gnc-isotropic": (LAGS,),
             "gnc-layerwise": (LAGS,)}
    found: dict[tuple[str, ...], str] = {}
    for option in options:
        kind = next((kind for kind in takes.get(method, ()) if option in kind), None)
        if kind is None or kind in found:
            choices = ", ".join(f"one of {', '.join(kind)}" for kind in takes.get(method, ()))
            raise ValueError(f"variant {name!r}: {option!r} is not an option of {method} here, "
                             f"which takes {choices or 'none'}")
        found[kind] = option
    variant = Variant(method, found.get(CHOICES, "auto"), found.get(PRECISIONS, "fp32"),
                      int(found.get(LAGS, "lag1")[-1]))
    plan = PLANS.get(variant.plan)
    if variant.precision != "fp32" and plan is not None and not plan.carries_16_bits:
        raise ValueError(f"variant {name!r}: {plan.name} sends the gradients themselves, in their "
                         "own precision; drop the precision or choose another plan")
    return variant


def _own_options(settings: dict[str, Any] | None) -> list[str]:
    """The options that a method takes as OPTION=VALUE."""
    if settings is None or settings["kind"] == "gnc":
        return []
    if settings["kind"] == "covariance":
        return list(own_options(settings["structure"], settings["source"]))
    return list(noise_options(settings["kind"]))


def _given(name: str, options: list[str], own: list[str]) -> tuple[str, ...]:
    """The options of a variant's name, each once."""
    given = dict(option.partition("=")[::2] for option in options)
    wrong = [option for option in options if option.partition("=")[0] not in own
             or "=" not in option]
    if wrong or len(given) < len(options):
        raise ValueError(f"variant {name!r}: {(wrong or options)[0]!r} is not an option here: give "
                         f"OPTION=VALUE, each of {', '.join(own)} at most once")
    return tuple(f"{key}={value}" for key, value in sorted(given.items()))


def _values(kind: str, given: tuple[str, ...]) -> dict[str, Any]:
    """Their values, as the trainer reads them."""
    if not given:
        return {}
    flags = [f"--noise.{option}" for option in given]
    return dict(parse_settings(TrainConfig, ["--noise.kind", kind, *flags],
                               program="hvdnoise bench").noise.options)


def names(text: str) -> tuple[list[str], bool]:
    """The names in a list, plain in front, each once; and whether the user named each of them."""
    given = [name for name in re.split(r"[,\s]+", text.strip()) if name]
    explicit = not any(name in SETS for name in given)
    each = [one for name in ["plain", *given] for one in SETS.get(name, (name,))]
    return list(dict.fromkeys(parse(name).name for name in each)), explicit
