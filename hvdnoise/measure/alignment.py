"""How the gradient's noise lies in the curvature: tr(H C^).

C is the covariance of one example's gradient. The images are dealt into W equal parts of b, as if
to W workers. With their mean gradients g_i and the deviations d_i = g_i - mean(g),

    C^ = b / (W - 1) sum_i d_i d_i'         (docs/methods.md, section 1)
    tr(H C^) = b / (W - 1) sum_i d_i' H d_i

from one Hessian-vector product for each part. A step of SGD with learning rate a and batch B raises
the loss by a^2 / (2 B) tr(H C) through its noise, to second order.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch

from hvdnoise.measure.problem import Problem
from hvdnoise.measure.spectrum import GROUP


@dataclass(frozen=True)
class Alignment:
    """What the workers' deviations give; None where it cannot be estimated.

    Args:
        workers: W. examples_per_worker: b.
        trace_hc: tr(H C^).
        trace_hc_error: its standard error over the draw of the images, by the jackknife over the
            parts with H held fixed; it needs W >= 3.
        trace_c: tr C^, the variance of one example's gradient.
        noise_curvature: tr(H C^) / tr C^, the mean curvature along the noise.
    """

    workers: int
    examples_per_worker: int | None
    trace_hc: float | None = None
    trace_hc_error: float | None = None
    trace_c: float | None = None
    noise_curvature: float | None = None

    def record(self) -> dict[str, float | int | None]:
        """As JSON values."""
        return asdict(self)


def measure(problem: Problem, workers: int) -> Alignment:
    """Of the first W b of the problem's N images, b = N // W. Collective.

    With fewer than two workers there is no deviation, and no estimate.
    """
    workers = min(workers, problem.count)
    if workers < 2:
        return Alignment(workers, problem.count if workers else None)
    b = problem.count // workers
    mean_P = problem.gradient(0, workers * b)
    curvatures: list[float] = []  # d_i' H d_i
    squares: list[float] = []     # d_i' d_i
    for first in range(0, workers, GROUP):
        d_KP = torch.stack([problem.gradient(i * b, (i + 1) * b)
                            for i in range(first, min(first + GROUP, workers))]) - mean_P
        curvatures += (d_KP.double() * problem.products(d_KP).double()).sum(1).tolist()
        squares += d_KP.double().square().sum(1).tolist()
    trace_hc, trace_c = (b / (workers - 1) * sum(each) for each in (curvatures, squares))
    return Alignment(workers, b, trace_hc, jackknife_error(curvatures, b), trace_c,
                     trace_hc / trace_c if trace_c > 0 else None)


def jackknife_error(curvatures: list[float], b: int) -> float | None:
    """Standard error of b / (W - 1) sum_i t_i with t_i = d_i' H d_i; None for W < 3.

    Without part i the mean moves, and the estimate becomes b / (W - 2) (sum_j t_j - W / (W - 1)
    t_i). The jackknife's variance is (W - 1) / W times the sum of the squared deviations of these W
    numbers.
    """
    workers = len(curvatures)
    if workers < 3:
        return None
    t_W = np.asarray(curvatures)
    without_W = b / (workers - 2) * (t_W.sum() - workers / (workers - 1) * t_W)
    return float(np.sqrt((workers - 1) / workers * np.square(without_W - without_W.mean()).sum()))
