"""Numbers of records: leniently read, averaged over seeds, thinned out, and written for people."""

from __future__ import annotations

import math
from typing import Any, Sequence

import numpy as np

POINTS = 200  # of a curve, at most


def number(value: Any) -> float:
    """A float; NaN for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        found = float(value)
    except OverflowError:
        return math.nan
    return found if math.isfinite(found) else math.nan


def mean_and_error(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean, its standard error (NaN for fewer than two) and count of the finite ones."""
    kept = [value for value in values if math.isfinite(value)]
    if not kept:
        return math.nan, math.nan, 0
    error = float(np.std(kept, ddof=1)) / math.sqrt(len(kept)) if len(kept) > 1 else math.nan
    return float(np.mean(kept)), error, len(kept)


def thin(*columns: Any) -> tuple[Any, ...]:
    """At most `POINTS` of the places, evenly spread, the first and the last among them."""
    arrays = [np.asarray(column, dtype=float) for column in columns]
    count = len(arrays[0])
    if count <= POINTS:
        return tuple(arrays)
    kept = np.linspace(0, count - 1, POINTS).round().astype(int)
    return tuple(array[kept] for array in arrays)


def mean_curve(curves: Sequence[Sequence[Any]]) -> tuple[Any, Any, Any]:
    """Places, mean and standard error of (places, values) of several runs.

    Where the runs have other places than one another, values between places are interpolated.
    The curve ends where the first of them ends, so that each mean is over all of them. The error is
    NaN for a single curve.
    """
    kept = [(x[ok], y[ok]) for x, y in ((np.asarray(x, float), np.asarray(y, float))
                                        for x, y in curves)
            for ok in [np.isfinite(x) & np.isfinite(y)] if ok.any()]
    if not kept:
        return np.empty(0), np.empty(0), np.empty(0)
    x = np.unique(np.concatenate([x for x, _ in kept]).round(9))
    first, last = max(x.min() for x, _ in kept), min(x.max() for x, _ in kept)
    x = x[(x >= first - 1e-9) & (x <= last + 1e-9)]
    (x,) = thin(x)
    y_SN = np.array([np.interp(x, *each) for each in kept])
    error = y_SN.std(axis=0, ddof=1) / math.sqrt(len(y_SN)) if len(y_SN) > 1 \
        else np.full(len(x), math.nan)
    return x, y_SN.mean(axis=0), error


def text(value: Any, digits: int = 4) -> str:
    """A value for a table; a dash for what is missing."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value.is_integer() and 1e3 <= abs(value) < 1e15:
            return f"{int(value):,}"
        return f"{value:.{digits}g}" if abs(value) < 10 ** digits else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(text(each, digits) for each in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {text(each, digits)}" for key, each in value.items()) or "none"
    return " ".join(str(value).split())


def with_error(value: float, error: float, digits: int) -> str:
    """mean ± standard error, with so many decimals."""
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def chance(p: float) -> str:
    """A p value."""
    return "–" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def plural(count: Any, noun: str) -> str:
    """3 runs, 1 run."""
    return f"{text(count)} {noun}{'s' * (count != 1)}"
