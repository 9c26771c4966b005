"""Statistical tests with exact distributions and a stated rate of false alarms.

Samples that shall be N(0, Sigma) are whitened and then tested, in many directions e, on

    sum_n <e, u_n> ~ N(0, n)     and     sum_n <e, u_n>^2 ~ chi^2 with n degrees of freedom

which hold exactly for independent standard normal u_n. The directions are all axes and all
diagonals of pairs of axes, so that every entry of the covariance matrix is looked at: for pairs,
2 u_i u_j is the difference of two such squares. ``FALSE_ALARM`` is shared by all the tests of one
call (Bonferroni), so a correct program fails one call in a million or less; seeds are fixed, so
it does not fail now and then.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special  # scipy.stats takes a second to import, on every rank

from tests.reference import Array, as_float64

FALSE_ALARM = 1e-6


def directions(size: int) -> Array:
    """(K, size) unit vectors: the axes, and e_i + e_j and e_i - e_j of each pair."""
    axes = np.eye(size)
    pairs = [(axes[i] + sign * axes[j]) / np.sqrt(2) for i in range(size) for j in range(i)
             for sign in (1, -1)]
    return np.stack([*axes, *pairs])


def assert_normal(samples_NQ: ArrayLike, covariance_QQ: ArrayLike, what: str = "samples") -> None:
    """Independent rows of N(0, covariance); in the null space of the covariance they are 0."""
    samples_NQ, covariance_QQ = as_float64(samples_NQ), as_float64(covariance_QQ)
    variances, axes = np.linalg.eigh(covariance_QQ)
    positive = variances > 1e-9 * variances.max()
    rest = np.abs(samples_NQ @ axes[:, ~positive])
    assert rest.size == 0 or rest.max() < 1e-6 * np.sqrt(variances.max()), \
        f"{what}: {rest.max():g} along directions without variance"
    assert_standard_normal(samples_NQ @ axes[:, positive] / np.sqrt(variances[positive]), what)


def assert_standard_normal(whitened_NQ: ArrayLike, what: str = "samples") -> None:
    """Independent rows of N(0, I)."""
    whitened_NQ = as_float64(whitened_NQ)
    n = len(whitened_NQ)
    projected_NK = whitened_NQ @ directions(whitened_NQ.shape[1]).T
    tail = FALSE_ALARM / (4 * projected_NK.shape[1])  # two tests, two sides, each direction
    means = np.abs(projected_NK.sum(axis=0)) / np.sqrt(n)
    limit = -special.ndtri(tail)
    assert means.max() < limit, f"{what}: the mean is {means.max():.2f} standard errors from 0"
    squares = (projected_NK ** 2).sum(axis=0)
    low, high = 2 * special.gammaincinv(n / 2, tail), 2 * special.gammainccinv(n / 2, tail)
    assert low < squares.min() and squares.max() < high, (
        f"{what}: variances of {n} samples from {squares.min() / n:.3f} to {squares.max() / n:.3f} "
        f"of the expected, outside {low / n:.3f} .. {high / n:.3f}")
