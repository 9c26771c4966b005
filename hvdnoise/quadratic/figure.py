"""The figure: paths over the regression's contours, its loss, and the checks' intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

import numpy as np

from hvdnoise.quadratic.regression import HESSIAN, Paths

_SHOWN = 3  # paths in a panel


def draw(record: dict[str, Any], paths: Sequence[Paths], path: Path) -> None:
    """Above: a panel for each way to train. Below: mean excess loss; measured over theory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    drawing: Any = Figure(figsize=(15, 8.5 if paths else 5), layout="constrained")
    FigureCanvasAgg(drawing)
    if not paths:
        _intervals(drawing.subplots(), record["checks"])
    else:
        above, below = drawing.subfigures(2, 1, height_ratios=(1, 1.4))
        panels = above.subplots(1, len(paths), sharex=True, sharey=True, squeeze=False)[0]
        for axes, each in zip(panels, paths):
            _path(axes, each)
        left, right = below.subplots(1, 2)
        for row in record["regression"]:
            left.semilogy(row["curve"], label=row["name"])
        left.set(xlabel="step", ylabel="excess loss, mean of the runs")
        left.legend(frameon=False)
        left.grid(alpha=0.3)
        _intervals(right, record["checks"])
    drawing.savefig(path, dpi=110)


def _path(axes: Any, each: Paths) -> None:
    side = np.linspace(-3.5, 3.5, 80)
    x_NN, y_NN = np.meshgrid(side, side)
    loss_NN = 0.5 * (HESSIAN[0, 0] * x_NN ** 2 + 2 * HESSIAN[0, 1] * x_NN * y_NN
                     + HESSIAN[1, 1] * y_NN ** 2)
    axes.contour(x_NN, y_NN, loss_NN, levels=[0.02, 0.1, 0.3, 0.7, 1.5, 3, 5], colors="grey",
                 linewidths=0.6)
    for theta_T2 in each.theta_RTKP[0].swapaxes(0, 1)[:_SHOWN]:
        axes.plot(*theta_T2.T, linewidth=0.9, marker=".", markersize=2.5)
    axes.plot(0, 0, "k+", markersize=10)
    axes.set(title=each.name, aspect="equal")


def _intervals(axes: Any, checks: Sequence[dict[str, Any]]) -> None:
    """Measured over theory, of losses, noise and smoothing."""
    shown = [check for check in checks if check["quantity"] in ("loss", "noise", "smoothing")]
    for place, check in enumerate(shown):
        low, high = ((check["measured"] if check[end] is None else check[end]) / check["theory"]
                     for end in ("low", "high"))
        middle = check["measured"] / check["theory"]
        axes.errorbar([middle], [place], xerr=[[middle - low], [high - middle]], fmt="o",
                      markersize=3, capsize=2,
                      color="tab:blue" if check["verdict"] == "agrees" else "tab:red")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="measured over theory, with intervals", yticks=range(len(shown)))
    axes.set_yticklabels([f"{check['case']}, {check['quantity']}"
                          + ", momentum" * bool(check["momentum"]) for check in shown], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
