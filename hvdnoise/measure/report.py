"""From the record of a measurement to words, measure.json and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hvdnoise.training.records import write_text
from hvdnoise.training.results import finite


def lines(record: dict[str, Any]) -> list[str]:
    """What was found, for a terminal."""
    hessian, aligned = record["hessian"], record["alignment"]
    found = ["largest eigenvalues of the Hessian: " + ", ".join(
        _with_error(value, error) for value, error in zip(hessian["eigenvalues"],
                                                          hessian["eigenvalue_errors"]))] \
        if hessian["eigenvalues"] else []
    if hessian["trace"] is not None:
        found.append("trace of the Hessian: " + _with_error(hessian["trace"],
                                                            hessian["trace_error"]))
    if aligned["trace_hc"] is not None:
        found.append("tr(H C): " + _with_error(aligned["trace_hc"], aligned["trace_hc_error"])
                     + f", tr C: {aligned['trace_c']:.4g}, of {aligned['workers']} workers x "
                     f"{aligned['examples_per_worker']} examples")
    found += [f"test accuracy with noise of {each['level']:g} on the weights: "
              + _with_error(each["accuracy"], each["accuracy_error"]) for each in record["noise"]]
    return found


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "not found"
    return f"{value:.4g}" + (f" ± {error:.1g}" if error is not None else "")


def write(record: dict[str, Any], folder: Path) -> None:
    """measure.json, and line.png, plane.png and noise.png where there is something to draw.

    A figure of an earlier measurement that has no successor is removed.

    Raises:
        OSError: when they cannot be written.
    """
    clean = finite(record)
    for name, draw in (("line", _line), ("plane", _plane), ("noise", _noise)):
        (folder / f"{name}.png").unlink(missing_ok=True)
        if clean[name]:
            _figure(draw, clean, folder / f"{name}.png")
    write_text(folder / "measure.json", json.dumps(clean, indent=1, allow_nan=False))


def _figure(draw: Any, record: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    drawing = Figure(figsize=(6, 4.5), layout="constrained")
    FigureCanvasAgg(drawing)
    draw(drawing, record)
    drawing.suptitle(f"{record['run']}, {record['examples']} training and "
                     f"{record['test_examples']} test images", fontsize=8)
    drawing.savefig(path, dpi=130)


def _numbers(values: Any) -> Any:
    """An array, with NaN for what is missing."""
    import numpy as np
    return np.array(values, dtype=float)


def _line(drawing: Any, record: dict[str, Any]) -> None:
    line = record["line"]
    loss = drawing.subplots()
    loss.plot(line["at"], _numbers(line["loss"]), ".-", color="tab:blue")
    loss.set(xlabel="distance, in lengths of the filters")
    loss.set_ylabel("training loss", color="tab:blue")
    accuracy = loss.twinx()
    accuracy.plot(line["at"], _numbers(line["accuracy"]), ".--", color="tab:orange")
    accuracy.set_ylabel("training accuracy", color="tab:orange")
    accuracy.set_ylim(0, 1.02)


def _plane(drawing: Any, record: dict[str, Any]) -> None:
    import numpy as np
    plane = record["plane"]
    axes = drawing.subplots()
    found = np.ma.masked_invalid(_numbers(plane["loss"]))
    colours = axes.pcolormesh(plane["at"], plane["at"], found, shading="nearest")
    if found.count() == found.size and np.ptp(found) > 0:
        axes.contour(plane["at"], plane["at"], found, levels=12, colors="white", linewidths=0.7)
    axes.plot([0], [0], "w+", markersize=10)
    axes.set(xlabel="first direction, in lengths of the filters", ylabel="second direction",
             aspect="equal")
    drawing.colorbar(colours, ax=axes, label="training loss")


def _noise(drawing: Any, record: dict[str, Any]) -> None:
    rows = record["noise"]
    axes = drawing.subplots()
    axes.errorbar(_numbers([row["level"] for row in rows]),
                  _numbers([row["accuracy"] for row in rows]), fmt="o-", capsize=3,
                  yerr=[row["accuracy_error"] or 0.0 for row in rows])
    axes.axhline(record["test_accuracy"], color="grey", linewidth=0.8, label="without noise")
    axes.set(xlabel="noise on the weights, in lengths of the filters", ylim=(0, 1.02),
             ylabel="test accuracy (mean over the draws, standard error)")
    axes.legend(loc="lower left", frameon=False)
