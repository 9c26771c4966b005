"""The kinds of noise by name; flags, files, help and bench variants come from what is here."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Callable, TypeVar, overload

from hvdnoise.noise.anticorrelated import AnticorrelatedNoise
from hvdnoise.noise.base import Noise
from hvdnoise.noise.covariance import COVARIANCES, CovarianceNoise, own_options
from hvdnoise.noise.extrapolation import Extrapolation
from hvdnoise.noise.gnc import GNC
from hvdnoise.noise.momentum_sam import MomentumSAM
from hvdnoise.noise.pnm import PNM
from hvdnoise.noise.sam import SAM, StaleSAM
from hvdnoise.noise.signature import Maker, Option, check_maker, check_name, name_of, options_of

BUILT_IN: dict[str, Maker] = {
    "gnc": GNC, "covariance": CovarianceNoise,
    # what others do, to compare with
    "sam": SAM, "stale-sam": StaleSAM, "momentum-sam": MomentumSAM, "extrapolation": Extrapolation,
    "anticorrelated": AnticorrelatedNoise, "pnm": PNM}
SUPPLIED = ("seed", "batch_size")  # by the trainer, where the constructor takes them
_MAKERS: dict[str, Maker] = dict(BUILT_IN)

M = TypeVar("M", bound=Maker)


@overload
def register_noise(kind: str) -> Callable[[M], M]: ...


@overload
def register_noise(kind: str, maker: M) -> M: ...


def register_noise(kind: str, maker: Maker | None = None) -> Any:
    """Make a noise known by name: a call, or a decorator of the class.

    Its constructor declares its options: parameters with type hints, explained in the docstring's
    Args section. The trainer gives ``seed`` and, where there is one, ``batch_size``.

    Args:
        kind: the name, as in ``--noise.kind``.
        maker: the class, or a function that returns the noise; left out by a decorator.

    Raises:
        ValueError: for a bad name, a name that another maker has, or a constructor that cannot be
            told by flags.
    """
    check_name("kind", kind)
    if maker is None:
        return lambda made: register_noise(kind, made)
    if kind == "none":
        raise ValueError("kind='none' means no noise; choose another name")
    check_maker(maker)
    known = _MAKERS.get(kind, maker)
    if name_of(known) != name_of(maker):
        raise ValueError(f"kind={kind!r} is {name_of(known)} already; choose another name")
    _MAKERS[kind] = maker
    return maker


def kinds() -> list[str]:
    """The names, without "none"."""
    return list(_MAKERS)


def find(kind: str) -> Maker:
    """The class or function of a kind.

    Raises:
        ValueError: where there is none of this name.
    """
    if kind not in _MAKERS:
        raise ValueError(f"noise kind={kind!r} must be one of none, {', '.join(_MAKERS)}")
    return _MAKERS[kind]


def make_noise(kind: str, **options: Any) -> Noise | None:
    """A noise by name, as configurations give it: "none", or a registered kind.

    Raises:
        ValueError: for an unknown name or a bad option.
    """
    if kind == "none":
        return None
    maker = find(kind)
    try:
        inspect.signature(maker).bind(**options)
    except TypeError as error:
        raise ValueError(f"noise kind={kind!r}: {error}; its options are "
                         f"{', '.join(options_of(maker))}") from error
    return maker(**options)


def noise_options(kind: str) -> dict[str, Option]:
    """The options of a kind, by name; without those that the trainer supplies.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind == "none":
        return {}
    found = {name: option for name, option in options_of(find(kind)).items()
             if name not in SUPPLIED}
    return {**found, **_of_structures()} if find(kind) is CovarianceNoise else found


def _of_structures() -> dict[str, Option]:
    """The options that only some covariances have; their texts say which."""
    found: dict[str, Option] = {}
    having: dict[str, list[str]] = {}
    for structure, source in COVARIANCES:
        for name, option in own_options(structure, source).items():
            found.setdefault(name, option)
            having.setdefault(name, []).append(structure)
    return {name: dataclasses.replace(
        option, default=None, text=f"(of {', '.join(dict.fromkeys(having[name]))}) {option.text}")
        for name, option in found.items()}


def supplied(kind: str) -> list[str]:
    """What the trainer supplies to a kind."""
    return [] if kind == "none" else [name for name in SUPPLIED if name in options_of(find(kind))]
