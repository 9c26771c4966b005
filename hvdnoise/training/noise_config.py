"""The settings of the noise. Which there are is what the registered noises declare."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Literal, Mapping

from hvdnoise.noise.base import Noise, check_noise
from hvdnoise.noise.composed import compose
from hvdnoise.noise.registry import find, kinds, make_noise, noise_options, supplied
from hvdnoise.noise.signature import REQUIRED, Option, summary
from hvdnoise.training.errors import ConfigError

# options that are written for every kind: a run's settings are compared with its checkpoint's
ALWAYS = ("source", "radius", "lr", "relative", "final", "lag", "structure", "emulated_batch")


@dataclass(frozen=True, init=False, repr=False)
class NoiseConfig:
    """The structured noise (see hvdnoise.noise).

    An option of any registered noise is an attribute; None where it is not given.

    Args:
        kind: none, or the name of a registered noise.
        options: those given, by name; or each as an argument of its own.
        also: further noises that act at the same time, in other places.
    """

    kind: str
    options: tuple[tuple[str, Any], ...]
    also: tuple[NoiseConfig, ...]

    def __init__(self, kind: str = "none", options: Mapping[str, Any] | Iterable[tuple[str, Any]]
                 = (), *, also: Iterable[Mapping[str, Any] | NoiseConfig] | None = None,
                 **more: Any) -> None:
        given = {name: tuple(value) if isinstance(value, list) else value
                 for name, value in {**dict(options), **more}.items() if value is not None}
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "options", tuple(sorted(given.items())))
        object.__setattr__(self, "also", tuple(
            each if isinstance(each, NoiseConfig) else NoiseConfig(**each) for each in also or ()))
        self._check(given)
        if self.also and "none" in [each.kind for each in self.each()]:
            raise ConfigError("noise.also: one of several noises is none: leave it out")

    def _check(self, given: dict[str, Any]) -> None:
        if self.kind not in ("none", *kinds()):
            raise ConfigError(f"noise.kind={self.kind} is wrong: give one of "
                              f"{', '.join(('none', *kinds()))}")
        takes = settings_of(self.kind)
        for name, value in given.items():
            if name not in takes:
                raise ConfigError(f"noise.{name}={value!r} does not go with noise.kind={self.kind},"
                                  f" which takes {', '.join(takes) or 'no options'}")
        final = given.get("final")
        if final is not None and not 0 <= final < math.inf:
            raise ConfigError(f"noise.final={final!r} must be a finite number >= 0")

    def __getattr__(self, name: str) -> Any:
        given = dict(vars(self).get("options", ()))
        if name in given:
            return given[name]
        if not name.startswith("_") and any(name in settings_of(kind) for kind in kinds()):
            return None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}: no registered "
                             "noise has such an option")

    def each(self) -> tuple[NoiseConfig, ...]:
        """This noise, and those that act at the same time."""
        return self, *self.also

    def __repr__(self) -> str:
        also = [("also", list(self.also))] if self.also else []
        return "NoiseConfig(" + ", ".join(f"{name}={value!r}" for name, value in (
            ("kind", self.kind), *self.options, *also)) + ")"

    def settings(self) -> dict[str, Any]:
        """Kind and options by name, None where not given: those of its kind, and `ALWAYS`."""
        takes = dict.fromkeys((*ALWAYS, *settings_of(self.kind)))
        also = {"also": [{"kind": each.kind, **dict(each.options)} for each in self.also]}
        return {"kind": self.kind, **takes, **dict(self.options), **(also if self.also else {})}

    def build(self, *, seed: int, batch_size: int, total_steps: int) -> Noise | None:
        """The noise, or None; batch_size: examples per worker and step.

        Raises:
            ValueError: for a value outside what the noise takes, or one that is missing.
        """
        built = [each._build(seed=seed, batch_size=batch_size, total_steps=total_steps)
                 for each in self.each()]
        return compose([noise for noise in built if noise is not None])

    def _build(self, *, seed: int, batch_size: int, total_steps: int) -> Noise | None:
        options = dict(self.options)
        final = options.pop("final", None)
        scheduled = [name for name, each in noise_options(self.kind).items() if each.schedule]
        if final is not None and not any(name in options for name in scheduled):
            raise ConfigError(f"noise.final={final:g} is the end of what is not given: give "
                              f"{' or '.join(f'noise.{name}' for name in scheduled)}, too")
        for name, option in noise_options(self.kind).items():
            if option.default is REQUIRED and name not in options:
                raise ConfigError(f"noise.kind={self.kind} needs noise.{name}")
            if option.schedule and final is not None and name in options:
                options[name] = _linear(options[name], final, total_steps)
        known = {"seed": seed, "batch_size": batch_size}
        try:
            noise = make_noise(self.kind, **options, **{name: known[name]
                                                        for name in supplied(self.kind)})
            check_noise(noise)
        except TypeError as error:  # of a registered class
            raise ConfigError(f"noise.kind={self.kind}: {' '.join(str(error).split())}") from error
        return noise

    @classmethod
    def schema(cls, chosen: str = "none") -> type:
        """A dataclass with every setting that there is at present, for the command line.

        Where kinds have options of one name, the type is that of the ``chosen`` kind, or any.
        """
        takers: dict[str, dict[str, Option]] = {}  # name -> kind -> option
        for kind in kinds():
            for name, option in settings_of(kind).items():
                takers.setdefault(name, {})[kind] = option
        fields: list[tuple[str, Any, Any]] = [
            ("kind", Literal[("none", *kinds())], dataclasses.field(default="none"))]
        fields += [(name, _hint(options, chosen), dataclasses.field(default=None))
                   for name, options in takers.items()]
        fields.append(("also", list[dict[str, Any]] | None, dataclasses.field(default=None)))
        made = dataclasses.make_dataclass(cls.__name__, fields, frozen=True)
        about = "; ".join(f"{kind}: {summary(find(kind)).rstrip('.')}" for kind in kinds())
        made.__doc__ = "\n".join([
            (cls.__doc__ or "").split("\n")[0], "", "Args:", f"    kind: {about}.",
            *(f"    {name}: {_explained(options)}" for name, options in takers.items()),
            "    also: further noises that act in other places, each as {kind: ..., ...}; in a "
            "file noise may be a list of them."])
        return made


def settings_of(kind: str) -> dict[str, Option]:
    """The options of a kind, and ``final`` where it has schedules."""
    found = noise_options(kind)
    if names := [name for name, option in found.items() if option.schedule]:
        found["final"] = Option(float, None, f"the value of {'/'.join(names)} at the end of the "
                                "run, reached linearly; default: it stays the same.")
    return found


def _hint(options: dict[str, Option], chosen: str) -> Any:
    """The type of an option, or null. Text comes last: it would take a number too."""
    hints = [options[chosen].hint] if chosen in options else \
        sorted((option.hint for option in options.values()), key=lambda hint: "str" in str(hint))
    return functools.reduce(operator.or_, hints) | None


def _explained(options: dict[str, Option]) -> str:
    """The texts of an option, and which kinds take it."""
    takers: dict[str, list[str]] = {}
    for kind, option in options.items():
        default = "" if option.default in (REQUIRED, None) else f"; default: {option.default}"
        takers.setdefault(option.text.rstrip(".") + default, []).append(kind)
    return "; ".join(f"of {' and '.join(names)}: {text}" for text, names in takers.items()) + "."


def _linear(start: float, end: float, steps: int) -> Callable[[int], float]:
    return lambda step: start + (end - start) * min(1.0, step / max(1, steps))
