"""Checks and the regression as a table for people, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from hvdnoise.quadratic import theory
from hvdnoise.quadratic.checks import Check
from hvdnoise.quadratic.config import FILE
from hvdnoise.quadratic.problem import COPIES, HESSIAN, SIZES, Problem
from hvdnoise.training.records import write_text
from hvdnoise.training.results import finite, table

Record = dict[str, Any]
_HEADS = ("noise", "loss: theory", "measured", "momentum: theory", "measured", "noise: theory",
          "measured", "smoothing: theory", "measured", "intervals", "verdict")
_COLUMNS = (("loss", False), ("loss", True), ("noise", False), ("smoothing", False))


def facts(problem: Problem) -> Record:
    """The problem in numbers."""
    return {"hessian": HESSIAN.tolist(), "covariance": theory.COVARIANCE.tolist(),
            "sizes": list(SIZES), "copies": COPIES, "workers": problem.workers,
            "batch": problem.batch, "emulated_batch": problem.emulated_batch,
            "learning_rate": problem.learning_rate}


def frobenius(problem: Problem, checks: Sequence[Check]) -> list[Record]:
    """For each structure from the workers: tr S, and tr(A S) by theory and as measured.

    tr(A S) is one step's increase of the loss over alpha^2/2 (1/M - 1/B). With S = A it is
    |A|_F^2, with S = diag(A) it is |diag A|_F^2: the same trace, another speed.
    """
    unit = problem.learning_rate ** 2 / 2 * problem.missing
    rows = []
    for check in checks:
        structure, _, source = check.case.rpartition("-")
        if check.quantity == "noise" and source == "workers":
            true_PP = theory.structured(structure, theory.COVARIANCE)
            rows.append(finite({
                "structure": structure, "trace": float(np.trace(true_PP)),
                "theory": float(np.trace(HESSIAN @ true_PP)), "measured": check.measured / unit,
                "low": check.low / unit, "high": check.high / unit}))
    return rows


def outcome(name: str, checks: Sequence[Check]) -> str:
    """A case in a line."""
    right = sum(check.verdict == "agrees" for check in checks)
    return f"{name}: {right} of {len(checks)} agree"


def disagreement(record: Record) -> str:
    """What differs from theory, on one line; empty where nothing does."""
    wrong: dict[str, Record] = {}
    for check in record["checks"]:
        if check["verdict"] != "agrees":
            wrong.setdefault(check["case"], check)
    said = [f"{name} ({check['quantity']}{_momentum(check)}: {check['measured']:.4g} measured, "
            f"{_range(check)}, {check['theory']:.4g} by theory: {check['verdict']})"
            for name, check in wrong.items()]
    if all(check["verdict"] == "undecided" for check in wrong.values()) and wrong:
        return f"too few runs to tell: {'; '.join(said)}; give more replicas or steps"
    return f"these do not agree with theory: {'; '.join(said)}" if said else ""


def _momentum(check: Record) -> str:
    return f" with momentum {check['momentum']:g}" if check["momentum"] else ""


def _range(check: Record) -> str:
    return f"[{_number(check['low'])}, {_number(check['high'])}]"


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.4g}"


def text(record: Record) -> str:
    """What was measured, as Markdown that reads well on a terminal."""
    problem, settings = record["problem"], record["settings"]
    lines = [f"{problem['workers']} workers on {record['ranks']} ranks, batch "
             f"{problem['batch']}, emulated batch {problem['emulated_batch']}, learning rate "
             f"{problem['learning_rate']:g}; {settings['replicas']} runs of {settings['steps']} "
             f"steps; {record['seconds']:.0f} s", "", *table([_HEADS, *_rows(record)]), "",
             "loss: E L over the steps; momentum: the same with momentum; noise: one step's "
             "increase; smoothing: of", "a cubic. Intervals hold the true means; a correct program "
             f"fails one command in {1 / settings['false_alarm']:.0f}."]
    if record["without_formula"]:
        lines.append(f"not checked, no formula here: {', '.join(record['without_formula'])}")
    if record["frobenius"]:
        lines += ["", "Same trace, other structure: tr(A S), which is |A|_F^2 for full and "
                  "|diag A|_F^2 for diagonal.", *table([
                      ("structure", "tr S", "tr(A S): theory", "measured"),
                      *((row["structure"], f"{row['trace']:.3f}", f"{row['theory']:.3f}",
                         f"{row['measured']:.3f} {_range(row)}") for row in record["frobenius"])])]
    return "\n".join([*lines, *_regression(record)])


def _rows(record: Record) -> list[tuple[str, ...]]:
    rows = []
    for name in dict.fromkeys(check["case"] for check in record["checks"]):
        own = [check for check in record["checks"] if check["case"] == name]
        cells = [name]
        for quantity, momentum in _COLUMNS:
            found = [check for check in own if bool(check["momentum"]) == momentum and
                     check["quantity"] in (quantity, f"no {quantity}")]
            cells += [_number(found[0]["theory"]),
                      f"{_number(found[0]['measured'])} {_range(found[0])}"] \
                if found else ["-", "-"]
        right = [check["verdict"] == "agrees" for check in own]
        verdicts = {check["verdict"] for check in own} - {"agrees"}
        verdict = "differs" if "differs" in verdicts else next(iter(verdicts), "agrees")
        rows.append((*cells, f"{sum(right)}/{len(right)}", verdict))
    return rows


def _regression(record: Record) -> list[str]:
    if not record["regression"]:
        return []
    rows = [(row["name"], f"{row['noise_trace_ratio']:.3f}", f"{row['noise_distance']:.3f}",
             f"{row['excess']:.4f}", f"{row['last_excess']:.4f}",
             "-" if row["steps"] is None else str(row["steps"])) for row in record["regression"]]
    lines = ["", "Regression in two dimensions: noise against the small batch's (trace; distance "
             "in Frobenius norm), excess loss.", *table([
                 ("way", "trace ratio", "distance", "mean excess", "at the end", "steps to 5%"),
                 *rows])]
    found = record["diagonal_faster"]
    if found is not None:
        lines += [f"diagonal has a lower excess loss than full {when}: {gain['lower']} (by "
                  f"{gain['gain']:.4f} [{gain['low']:.4f}, {gain['high']:.4f}], "
                  f"{1 - found['chance']:.0%} interval)"
                  for when, gain in (("over all steps", found["mean"]),
                                     ("in the last third", found["end"]))]
    return lines


def write(record: Record, folder: Path) -> None:
    """quadratic.json and table.md."""
    write_text(folder / FILE, json.dumps(record, indent=1, allow_nan=False))
    write_text(folder / "table.md", text(record) + "\n")
