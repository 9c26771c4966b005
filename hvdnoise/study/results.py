"""From run folders to the choice of settings, results.json and the table.

All of it is a function of the run folders alone (but for seconds, which are in results.json and
not in the table), so a study that was killed and went on ends with the same table.
"""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Sequence

from hvdnoise.study import search
from hvdnoise.study.config import StudyConfig
from hvdnoise.study.plan import Cell, Plan, Run
from hvdnoise.study.runs import State
from hvdnoise.study.search import LEARNING_RATE, Point
from hvdnoise.study.statistics import holm, mean_and_error, paired
from hvdnoise.training.config import ConfigError
from hvdnoise.training.records import write_text
from hvdnoise.training.results import finite, table

FILE, SCORE = "results.json", "test_accuracy"
_KEPT = ("test_accuracy", "test_loss", "validation_accuracy", "train_accuracy", "seconds", "steps",
         "gradient_evaluations", "exchange_bytes")
Entry = dict[str, Any]


# ---------------------------------------------------------------------- scores and the choice


def validation_score(run: Run, state: State) -> float | None:
    """Of the weights that count on validation images; chance where it diverged; None without a run.

    Raises:
        ConfigError: when the run has ended and says none.
    """
    return _score(run, state, "validation")


def _score(run: Run, state: State, of: str) -> float | None:
    found, key = state.of(run), run.cell.score(of)
    if not found.ended:
        return None
    if found.state == "diverged":
        return 1 / run.cell.classes
    value = found.summary.get(key)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{run.path}/summary.json has no {key}: remove that run's folder, and "
                          "start the study again")
    return float(value)


def choose(plan: Plan, cell: Cell, state: State) -> Point | None:
    """The settings of the finals: the best mean score over the tuning seeds.

    Ties go to the lower learning rate, then to the earlier trial. A trial with a run that failed
    is out; None where there is no other, or one is still to be made.
    """
    if not cell.tunes:
        return cell.points[0]
    ranked = []
    for number, point in enumerate(cell.points):
        runs = [run for run in plan.trials_of(cell) if run.trial == number]
        outcomes = {state.outcome(run) for run in runs}
        if "missing" in outcomes:
            return None
        if "failed" not in outcomes:
            scores = [validation_score(run, state) or 0.0 for run in runs]
            ranked.append((-math.fsum(scores) / len(scores), _rate(point), number))
    return cell.points[min(ranked)[2]] if ranked else None


def _rate(point: Point) -> float:
    rate = point.get(LEARNING_RATE)
    return float(rate) if isinstance(rate, (int, float)) else 0.0


# ---------------------------------------------------------------------- results.json


def collect(plan: Plan, state: State, *, complete: bool) -> dict[str, Any]:
    """Everything that results.json holds."""
    config = plan.config
    entries = [_entry(plan, cell, state) for cell in plan.cells]
    compared = _compare(config, entries)
    runs = [run["outcome"] for entry in entries for run in (*entry["trials"], *entry["finals"])]
    counts = {name: runs.count(name) for name in ("finished", "diverged", "failed")}
    return {"name": config.name, "about": config.about, "baseline": config.baseline,
            "state": "complete" if complete else "running", "score": SCORE,
            "chance": 1 / plan.cells[0].classes, "trials_per_method": config.trials,
            "tuning_seeds": config.tuning_seeds, "seeds": config.final_seeds,
            "ranks": config.ranks, "virtual_workers": config.virtual_workers,
            "workers": config.ranks * config.virtual_workers, "settings": config.settings,
            "runs": {"planned": plan.count(), **counts}, "methods": entries,
            "comparisons": compared, "adjusted": "holm"}


def _entry(plan: Plan, cell: Cell, state: State) -> Entry:
    chosen = choose(plan, cell, state)
    trials = [{"run": run.path, "seed": run.seed, "settings": run.searched,
               "outcome": state.outcome(run), "validation_accuracy": validation_score(run, state)}
              for run in plan.trials_of(cell)]
    finals = [] if chosen is None else [_final(run, state) for run in plan.finals_of(cell, chosen)]
    scores = [final["score"] for final in finals if final["score"] is not None]
    failed = sum(final["outcome"] == "failed" for final in finals)
    mean, error = (None, None) if failed else mean_and_error(scores)
    return {"method": cell.method, "label": cell.label, "batch": cell.batch,
            "virtual_workers": cell.virtual_workers,
            "workers": cell.virtual_workers * plan.config.ranks, "settings": cell.own,
            "weights": cell.weights,
            "search": search.as_json(cell.axes), "trials": trials, "chosen": chosen,
            "edge": search.edges(cell.axes, cell.points, chosen) if cell.tunes and chosen else [],
            "finals": finals, "mean": mean, "error": error, "n": len(scores),
            "diverged": sum(final["outcome"] == "diverged" for final in finals), "failed": failed,
            "versus_baseline": None}


def _final(run: Run, state: State) -> Entry:
    summary = state.of(run).summary
    return {"run": run.path, "seed": run.seed, "outcome": state.outcome(run),
            "score": _score(run, state, "test"), **{key: summary.get(key) for key in _KEPT}}


def _compare(config: StudyConfig, entries: Sequence[Entry]) -> int:
    """Fill in versus_baseline; the number of comparisons.

    With the baseline of the same batch, or its first where it has none of that.
    """
    base = {entry["batch"]: entry for entry in entries if entry["method"] == config.baseline}
    first = next(iter(base.values()))
    made = []
    for entry in entries:
        other = base.get(entry["batch"], first)
        if other is entry or entry["failed"] or other["failed"]:
            continue
        pairs = [(mine["score"], theirs["score"])
                 for mine, theirs in zip(entry["finals"], other["finals"])
                 if mine["score"] is not None and theirs["score"] is not None]
        if pairs:
            found = paired([a for a, _ in pairs], [b for _, b in pairs], level=config.level)
            entry["versus_baseline"] = {"batch": other["batch"], **asdict(found), "p_holm": None}
            made += [entry["versus_baseline"]] if found.p is not None else []
    for each, p in zip(made, holm([each["p"] for each in made])):
        each["p_holm"] = p
    return len(made)


def write(folder: Path, results: dict[str, Any]) -> None:
    """results.json, whole or not at all."""
    write_text(folder / FILE, json.dumps(finite(results), indent=1, allow_nan=False))


# ---------------------------------------------------------------------- the table

_HEADS = ("method", "batch", "trials", "chosen", "test accuracy", "n", "diverged", "failed",
          "difference", "interval", "p (Holm)")


def text(results: dict[str, Any], level: float) -> str:
    """The table for people, in Markdown, and what must be known of it."""
    rows = [_row(entry) for entry in results["methods"]]
    heads = [f"{100 * level:.4g}% interval" if head == "interval" else head for head in _HEADS]
    seeds, compared = ", ".join(map(str, results["seeds"])), results["comparisons"]
    lines = [*table([heads, *rows], left=1), "",
             f"Mean and standard error over the seeds {seeds} (n runs). Difference to "
             f"{results['baseline']}, paired by seed, and its interval (Student's t); p is "
             f"adjusted for {compared} comparison{'s' * (compared != 1)}."]
    if results["runs"]["diverged"]:
        lines.append(f"A run that diverged counts with the accuracy of chance, "
                     f"{results['chance']:.4g}.")
    if results["runs"]["failed"]:
        lines.append("A method with a final that failed has no mean until that is run again.")
    averaged = [entry["label"] for entry in results["methods"] if entry["weights"] == "ema"]
    if averaged:
        lines.append(f"The moving average of the weights counts in: {'; '.join(averaged)}.")
    for entry in results["methods"]:
        other = entry["versus_baseline"]
        if other and other["batch"] != entry["batch"]:
            lines.append(f"{entry['label']} with batch {entry['batch']} is compared with batch "
                         f"{other['batch']} of {results['baseline']}, which has no other.")
    return "\n".join([*lines, *edge_lines(results)])


def edge_lines(results: dict[str, Any]) -> list[str]:
    """A line for each method whose chosen setting is the last one that was tried on a side."""
    return [f"{entry['label']}, batch {entry['batch']}: the chosen {name}={entry['chosen'][name]} "
            "lies at the edge of what was tried: a better one may lie beyond."
            for entry in results["methods"] for name in entry["edge"]]


def _row(entry: Entry) -> list[str]:
    tried, other = entry["trials"], entry["versus_baseline"]
    bad = [f"{count} {name}" for name in ("diverged", "failed", "missing")
           if (count := sum(each["outcome"] == name for each in tried))]
    chosen = entry["chosen"]
    settings = "-" if chosen is None else ", ".join(f"{key}={value}"
                                                    for key, value in chosen.items())
    return [entry["label"], str(entry["batch"]),
            f"{len(tried)}" + (f" ({', '.join(bad)})" if bad else ""), settings,
            _with_error(entry["mean"], entry["error"]), str(entry["n"]), str(entry["diverged"]),
            str(entry["failed"]), *_difference(other)]


def _with_error(mean: float | None, error: float | None, sign: str = "") -> str:
    if mean is None:
        return "-"
    return f"{mean:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _difference(other: Entry | None) -> list[str]:
    if other is None:
        return ["-", "-", "-"]
    interval = "-" if other["low"] is None else f"[{other['low']:+.4f}, {other['high']:+.4f}]"
    p = "-" if other["p_holm"] is None else f"{other['p_holm']:.2g}"
    return [_with_error(other["difference"], other["error"], "+"), interval, p]


def as_csv(results: dict[str, Any]) -> str:
    """The table in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "label", "batch", "trials", "chosen", "mean", "error", "n",
                     "diverged", "failed", "baseline_batch", "difference", "difference_error",
                     "low", "high", "p", "p_holm", "comparisons"])
    for entry in results["methods"]:
        other = entry["versus_baseline"] or {}
        writer.writerow([entry["method"], entry["label"], entry["batch"], len(entry["trials"]),
                         json.dumps(entry["chosen"]), entry["mean"], entry["error"], entry["n"],
                         entry["diverged"], entry["failed"], *(other.get(key) for key in (
                             "batch", "difference", "error", "low", "high", "p", "p_holm")),
                         results["comparisons"]])
    return out.getvalue()
