"""Intervals for the mean of positive numbers, of a stated rate of false alarms.

A mean of squares of normal numbers is close to a gamma variable, also where the numbers are
correlated. Its relative spread does not depend on its mean, so it can be measured: with R
independent values of mean m and variance v, the gamma's shape is k = R m^2/v. The signed root of
the likelihood ratio of the true mean,

    r = sign(m - true) sqrt(2 k (q - 1 - log q)),   q = m/true

is close to normal, also far in the tails, where the usual (m - true)/sqrt(v/R) is skewed: numbers
that came out small have a small spread too. As k is measured, r is compared with Student's t of
R - 1 degrees of freedom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from hvdnoise.quadratic.problem import Array

ROUNDING = 1e-10  # relative; for values that are all alike


@dataclass(frozen=True)
class Interval:
    """A mean, and the interval that holds the true one but for false alarms."""

    mean: float
    low: float
    high: float


def positive_mean(values_R: Array, false_alarm: float) -> Interval:
    """The mean of independent positive values; ``high`` may be inf where they say little."""
    count, mean = len(values_R), float(np.mean(values_R))
    spread = float(np.var(values_R, ddof=1)) / mean ** 2 / count  # 1/k
    limit = spread / 2 * float(special.stdtrit(count - 1, 1 - false_alarm / 2)) ** 2
    if limit < 1e-7:  # q - 1 - log q is (q - 1)^2/2 there, and the exact roots are rounded away
        most, least = 1 + math.sqrt(2 * limit) + ROUNDING, 1 - math.sqrt(2 * limit) - ROUNDING
    elif limit > 600:
        return Interval(mean, 0.0, math.inf)
    else:  # q - 1 - log q = limit where -q exp(-q) = -exp(-1 - limit)
        most, least = (-float(special.lambertw(-math.exp(-1 - limit), branch).real)
                       for branch in (-1, 0))
    return Interval(mean, mean / most, mean / least)


def difference(values_R: Array, false_alarm: float) -> Interval:
    """The mean of independent values of any sign."""
    count, mean = len(values_R), float(np.mean(values_R))
    half = float(special.stdtrit(count - 1, 1 - false_alarm / 2)) * math.sqrt(
        float(np.var(values_R, ddof=1)) / count)
    return Interval(mean, mean - half, mean + half)
