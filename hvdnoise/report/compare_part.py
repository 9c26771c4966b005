"""Several runs beside one another: what they measured, without statistics."""

from __future__ import annotations

import math
from typing import Any, Sequence

from hvdnoise.report.charts import EPOCH, STEP, Curve, Quantity, accuracy, curves
from hvdnoise.report.drawing import style
from hvdnoise.report.marks import Point, Row, points, rows
from hvdnoise.report.numbers import number, text
from hvdnoise.report.parts import Part, Section, Table
from hvdnoise.report.reading import Run
from hvdnoise.report.run_part import notices, progress
from hvdnoise.report.study_figures import COSTS, TOGETHER
from hvdnoise.report.study_records import NOISE, SHARPNESS

_OF_NO_MATTER = ("run_dir", "name", "overwrite", "resume", "progress", "tensorboard", "threads")


def section(runs: Sequence[Run], key: str) -> Section:
    """Several runs."""
    ended = sum(run.outcome == "finished" for run in runs)
    words = (f"{len(runs)} runs, {ended} of them finished. Each marker and line is one run: "
             "there are no means over seeds and no intervals here, so small "
             "differences may be chance.")
    said = [f"{run.name}: {notice}" for run in runs for notice in notices(run)]
    return Section(key, "Comparison of runs", words, said, [
        Part("Summary", [_summary(runs)]), _curves(runs, key), _costs(runs, key), _gap(runs, key),
        _noise(runs, key), _sharpness(runs, key), _settings(runs)])


def _summary(runs: Sequence[Run]) -> Table:
    keys = ("test_accuracy", "best_test_accuracy", "train_accuracy", "test_loss", "seconds",
            "gradient_evaluations", "exchange_bytes")
    kept = [key for key in keys if any(run.summary.get(key) is not None for run in runs)]
    return Table("The runs", ["run", "outcome", "progress", "noise",
                              *(key.replace("_", " ") for key in kept)],
                 [[run.name, run.outcome, progress(run),
                   text(run.summary.get("noise") or run.settings.get("noise.kind")),
                   *(_cell(key, run.summary.get(key)) for key in kept)] for run in runs], left=4)


def _cell(key: str, value: Any) -> str:
    percent = key.endswith("accuracy") and math.isfinite(number(value))
    return f"{value:.2%}" if percent else text(value)


def _split(runs: Sequence[Run]) -> list[tuple[str, str, list[tuple[int, Run]]]]:
    """At most `TOGETHER` runs in a figure, each with its number."""
    numbered = list(enumerate(runs, 1))
    parts = [numbered[start:start + TOGETHER] for start in range(0, len(runs), TOGETHER)]
    return [(f"-{place}", f", part {place} of {len(parts)}", part) if len(parts) > 1
            else ("", "", part) for place, part in enumerate(parts, 1)]


def _over(runs: list[tuple[int, Run]], x: Quantity, kind: str, key: str) -> list[Curve]:
    at = "epoch" if x is EPOCH else "step"
    return [Curve(run.name, style(place), *run.values(kind, at, key)) for place, run in runs]


def _curves(runs: Sequence[Run], key: str) -> Part:
    part, caption = Part("Learning curves"), "One line for each run."
    for suffix, words, some in _split(runs):
        for of in ("validation", "test"):
            if any(run.lines.get(of) for _, run in some):
                name = of.capitalize()
                part.add(curves(f"{key}-{of}{suffix}", f"{name} accuracy by epoch{words}", caption,
                                _over(some, EPOCH, of, f"{of}_accuracy"), x=EPOCH,
                                y=accuracy(name)))
        part.add(curves(f"{key}-loss{suffix}", f"Training loss by epoch{words}", caption,
                        _over(some, EPOCH, "train", "loss"), x=EPOCH,
                        y=Quantity("Training loss (cross-entropy)", log=True)))
    return part


def _costs(runs: Sequence[Run], key: str) -> Part:
    part = Part("Accuracy against cost")
    for suffix, words, some in _split(runs):
        for cost, quantity in COSTS.items():
            found = [Point(run.name, style(place), number(run.summary.get(cost)),
                           number(run.summary.get("test_accuracy"))) for place, run in some]
            part.add(points(f"{key}-{cost.replace('_', '-')}{suffix}",
                            f"Test accuracy against {cost.replace('_', ' ')}{words}",
                            "One marker for each run with a summary.", found, x=quantity,
                            y=accuracy("Test")))
    return part


def _gap(runs: Sequence[Run], key: str) -> Part:
    part = Part("Generalization gap")
    found = [Row(run.name, style(place).colour, number(run.summary.get("train_accuracy"))
                 - number(run.summary.get("test_accuracy"))) for place, run in enumerate(runs, 1)]
    part.add(rows(f"{key}-gap", "Generalization gap", "Training accuracy minus test accuracy of "
                  "the final weights.", found, x=Quantity("Gap (percentage points)", 100)))
    return part


def _noise(runs: Sequence[Run], key: str) -> Part:
    part = Part("Noise")
    for suffix, words, some in _split(runs):
        for kind, value, name, x, log in NOISE:
            title = name.partition(",")[0].partition(" (")[0]
            part.add(curves(f"{key}-{value.replace('_', '-')}{suffix}",
                            f"{title} by {'step' if x is STEP else 'epoch'}{words}",
                            "One line for each run.", _over(some, x, kind, value), x=x,
                            y=Quantity(name, log=log)))
    return part


def _sharpness(runs: Sequence[Run], key: str) -> Part:
    part = Part("Sharpness")
    for name, title, value in SHARPNESS:
        found = [Row(run.name, style(place).colour, number(value(measured.get("hessian") or {})))
                 for place, run in enumerate(runs, 1)
                 for measured in list(run.measurements.values())[:1]]
        part.add(rows(f"{key}-sharpness-{name}", title, "Of the training loss (hvdnoise measure).",
                      found, x=Quantity(title)))
    return part


def _settings(runs: Sequence[Run]) -> Part:
    part = Part("Settings that differ")
    names = sorted({name for run in runs for name in run.settings} - set(_OF_NO_MATTER))
    rows_ = [[name, *(text(run.settings.get(name)) for run in runs)] for name in names
             if len({text(run.settings.get(name)) for run in runs}) > 1]
    if rows_:
        part.items.append(Table("Settings that differ between the runs",
                                ["setting", *(run.name for run in runs)], rows_,
                                left=1 + len(runs)))
    else:
        part.words.append("None.")
    return part
