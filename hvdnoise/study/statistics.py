"""Means, paired differences and many comparisons: pure functions of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Sequence

import numpy as np
from scipy import special


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences.

    Args:
        difference: mean of values minus baseline.
        error: standard error of it; None for one pair.
        low, high: the two-sided interval of ``level``; None for one pair.
        p: of Student's paired test, two-sided, not adjusted; None for one pair.
        n: pairs.
        level: of the interval.
    """

    difference: float
    error: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    level: float


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error, which needs two values; None where it is not known."""
    if not values:
        return None, None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(np.mean(values)), error


def paired(values: Sequence[float], baseline: Sequence[float], *, level: float = 0.95) -> Paired:
    """Student's t interval and test of values minus baseline, pair by pair.

    Differences without any spread give an interval of no width, and p = 1 where they are 0, else 0.

    Raises:
        ValueError: for no pairs, another number of values, or a level outside of 0 .. 1.
    """
    if len(values) != len(baseline) or not values:
        raise ValueError(f"{len(values)} values and {len(baseline)} of the baseline are no pairs: "
                         "give as many of both, one or more")
    if not 0 < level < 1:
        raise ValueError(f"level={level} is wrong: give 0 < level < 1")
    differences_N = np.asarray(values, float) - np.asarray(baseline, float)
    n, mean = len(differences_N), float(np.mean(differences_N))
    if n == 1:
        return Paired(mean, None, None, None, None, 1, level)
    error = float(np.std(differences_N, ddof=1)) / math.sqrt(n)
    half = float(special.stdtrit(n - 1, (1 + level) / 2)) * error
    if error > 0:
        p = min(1.0, 2 * float(special.stdtr(n - 1, -abs(mean) / error)))
    else:
        p = float(mean == 0)
    return Paired(mean, error, mean - half, mean + half, p, n, level)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for the number of comparisons; Holm, Scand. J. Statist. 6 (1979) 65-70.

    The k-th smallest of m is multiplied by m - k + 1; none is below a smaller one's, or above 1.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, least = [0.0] * len(p_values), 0.0
    for k, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - k) * p_values[index]))
        adjusted[index] = least
    return adjusted
