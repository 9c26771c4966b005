"""Each noise with its law: what is run, and what it must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from hvdnoise.noise import COVARIANCES, GNC, CovarianceNoise, Noise
from hvdnoise.quadratic.problem import Problem
from hvdnoise.quadratic.theory import (
    FORMULAS,
    CovarianceLaw,
    ExamplesDiagonalLaw,
    ExamplesLaw,
    GncLaw,
    Law,
)

DECAY, EVERY = 0.5, 3  # of the diagonal from examples, whose second moments change in time
_OPTIONS: dict[tuple[str, str], dict[str, float]] = {
    ("diagonal", "examples"): {"decay": DECAY, "every": EVERY},
    ("kronecker", "workers"): {"decay": DECAY, "every": EVERY, "damping": 0.0}}
GNC_SOURCES = {"own": "", "gathered": "full", "isotropic": "isotropic", "layerwise": "layerwise"}


@dataclass(frozen=True)
class Case:
    """A noise and its law.

    Args:
        name: STRUCTURE-SOURCE, gnc-SOURCE, or none.
        noise: makes it for a problem, from a seed.
        law: makes its law for a problem.
        on_weights: whether it is GNC.
        in_layers: whether theta is the weight of a layer.
        silent: whether the mean gradient has no noise at all.
    """

    name: str
    noise: Callable[[Problem, int], Noise | None]
    law: Callable[[Problem], Law]
    on_weights: bool = False
    in_layers: bool = False
    silent: bool = False


def _covariance(structure: str, source: str) -> Case:
    pair = structure, source

    def noise(problem: Problem, seed: int) -> Noise:
        return CovarianceNoise(structure, problem.emulated_batch, source=source,
                               batch_size=problem.batch_size, seed=seed,
                               **_OPTIONS.get(pair, {}))
    laws: dict[tuple[str, str], Callable[[Problem], Law]] = {
        ("full", "examples"): ExamplesLaw,
        ("diagonal", "examples"): lambda problem: ExamplesDiagonalLaw(problem, DECAY, EVERY)}
    return Case(f"{structure}-{source}", noise,
                laws.get(pair, lambda problem: CovarianceLaw(problem, structure)),
                in_layers=structure == "kronecker")


def _gnc(source: str, structure: str) -> Case:
    def noise(problem: Problem, seed: int) -> Noise:
        return GNC(lr=problem.noise_scale / problem.learning_rate, source=source, seed=seed)
    return Case(f"gnc-{source}", noise, lambda problem: GncLaw(problem, structure),
                on_weights=True, silent=source == "own")


def known() -> dict[str, Case]:
    """The cases by their names: those covariances that are registered and have a formula, GNC."""
    formulas = [*((structure, "workers") for structure in FORMULAS), ("full", "examples"),
                ("diagonal", "examples")]
    cases = [Case("none", lambda problem, seed: None, Law, silent=True),
             *(_covariance(*pair) for pair in formulas if pair in COVARIANCES),
             *(_gnc(*each) for each in GNC_SOURCES.items())]
    return {case.name: case for case in cases}


def without_formula() -> list[str]:
    """The covariances that are registered and have no formula here."""
    names = known()
    return [f"{structure}-{source}" for structure, source in COVARIANCES
            if f"{structure}-{source}" not in names]
