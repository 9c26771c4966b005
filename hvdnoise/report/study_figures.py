"""The figures of a study's scores. Means, errors and intervals are those of results.json."""

from __future__ import annotations

import math
from typing import Any, Sequence

from hvdnoise.report.charts import Quantity, accuracy
from hvdnoise.report.drawing import Style, style
from hvdnoise.report.marks import Point, Row, points, rows
from hvdnoise.report.numbers import mean_and_error, number
from hvdnoise.report.parts import Graphic
from hvdnoise.report.reading import Run, Study

Entry = dict[str, Any]
TOGETHER = 15  # series in a figure
COSTS = {"gradient_evaluations": Quantity("Gradient evaluations of a run (examples × passes)",
                                          unit="", log=True),
         "seconds": Quantity("Training time of a run (s)", log=True),
         "exchange_bytes": Quantity("Received by each rank in a run (bytes)", unit="B", log=True)}
_COST_NAMES = {"gradient_evaluations": "gradient evaluations", "seconds": "time",
               "exchange_bytes": "bytes exchanged"}


def score_of(study: Study) -> Quantity:
    """What the study's score is, as an axis."""
    name = str(study.results.get("score", "test_accuracy"))
    words = name.replace("_", " ").capitalize()
    return accuracy(words.rpartition(" ")[0]) if words.endswith(" accuracy") else Quantity(words)


def label(study: Study, entry: Entry) -> str:
    """The method's, with the batch where the method has several."""
    name = " ".join(str(entry.get("label") or entry.get("method") or "unnamed").split())
    return f"{name}, batch {entry.get('batch')}" if has_several(study, entry) else name


def has_several(study: Study, entry: Entry) -> bool:
    """Whether the entry's method has several batches."""
    return sum(each.get("method") == entry.get("method") for each in study.entries) > 1


def batch_of(entry: Entry) -> float:
    """An entry's batch; 0 where it says none."""
    found = number(entry.get("batch"))
    return 0.0 if math.isnan(found) else found


def batches(study: Study) -> list[float]:
    """The batches of a study, in order."""
    return sorted({batch_of(entry) for entry in study.entries})


def look(study: Study, entry: Entry) -> Style:
    """A colour for the method, black for the baseline; the marker tells batches apart too."""
    baseline = study.results.get("baseline")
    methods = list(dict.fromkeys(str(each.get("method")) for each in study.entries))
    others = [method for method in methods if method != baseline]
    method = str(entry.get("method"))
    colour = 0 if method == baseline else 1 + others.index(method)
    place = batches(study).index(batch_of(entry))
    return style(colour, colour + place * (len(others) + 1))


def finals(entry: Entry, outcome: str = "finished") -> list[dict[str, Any]]:
    """The final runs that ended so."""
    found = entry.get("finals")
    return [each for each in found if isinstance(each, dict) and each.get("outcome") == outcome] \
        if isinstance(found, list) else []


def final_values(entry: Entry, key: str) -> list[float]:
    """A number of each finished final."""
    return [number(each.get(key)) for each in finals(entry)]


def runs(study: Study, entry: Entry) -> list[Run]:
    """The finished finals' own records."""
    return [study.run(str(each.get("run"))) for each in finals(entry)]


def groups(study: Study) -> list[tuple[str, str, list[Entry]]]:
    """Entries that share a figure: (suffix of the key, words for the title, entries).

    All of them where they are few, otherwise each batch for itself, and at most `TOGETHER`.
    """
    if len(study.entries) <= TOGETHER:
        return [("", "", study.entries)]
    made = []
    for batch in batches(study):
        same = [entry for entry in study.entries if batch_of(entry) == batch]
        for start in range(0, len(same), TOGETHER):
            part = f", part {start // TOGETHER + 1}" if len(same) > TOGETHER else ""
            words = f", batch {batch:g}{part}" if len(batches(study)) > 1 else part
            made.append((f"-b{batch:g}-{start // TOGETHER + 1}", words,
                         same[start:start + TOGETHER]))
    return made


def cost(study: Study, entries: Sequence[Entry], key: str, name: str, words: str = ""
         ) -> Graphic | str:
    """The score against a cost of the runs."""
    found = []
    for entry in entries:
        x, x_error, _ = mean_and_error(final_values(entry, key))
        found.append(Point(label(study, entry), look(study, entry), x, number(entry.get("mean")),
                           x_error, number(entry.get("error")), number(entry.get("diverged")) > 0))
    title = f"{_headline(study)} against {_COST_NAMES[key]}{words}"
    caption = ("Each marker is the mean over the final seeds, each bar one standard error to both "
               "sides. Higher and further left is better.")
    return points(study.prefix + name, title, caption, found, x=COSTS[key], y=score_of(study))


def _headline(study: Study) -> str:
    return str(study.results.get("score", "test_accuracy")).replace("_", " ").capitalize()


def differences(study: Study) -> Graphic | str:
    """The paired differences from the baseline with their intervals."""
    found = []
    for entry in study.entries:
        against = entry.get("versus_baseline")
        if isinstance(against, dict):
            found.append(Row(label(study, entry), look(study, entry).colour,
                             number(against.get("difference")), number(against.get("low")),
                             number(against.get("high")), number(entry.get("diverged")) > 0))
    score = score_of(study)
    unit = "percentage points" if score.scale == 100 else score.label
    if not found:
        return "Differences from the baseline: none is computed yet."
    return rows(study.prefix + "differences", "Difference from the baseline",
                "Mean of the differences of runs with the same seed, with its 95% confidence "
                "interval (no interval with one seed). An interval that reaches over 0 shows no "
                "difference. The intervals are not corrected for their number; p after Holm is.",
                found, x=Quantity(f"Difference ({unit})", score.scale), zero=True)


def batch_sizes(study: Study) -> Graphic | str:
    """The score against the batch, a line for each method."""
    sizes = batches(study)
    if not any(has_several(study, entry) for entry in study.entries):
        return "Accuracy against batch size: no method has several."
    first = {str(entry.get("method")): entry for entry in reversed(study.entries)}
    found = [Point(str(entry.get("label") or entry.get("method")),
                   look(study, first[str(entry.get("method"))]), batch_of(entry),
                   number(entry.get("mean")), math.nan, number(entry.get("error")),
                   number(entry.get("diverged")) > 0)
             for entry in study.entries]
    return points(study.prefix + "batch-size", f"{_headline(study)} against batch size",
                  "Mean over the final seeds, with one standard error to both sides.", found,
                  x=Quantity("Examples per step, all workers (batch)", log=True), y=score_of(study),
                  joined=True, ticks=sizes)


def gap(study: Study) -> Graphic | str:
    """Training minus test accuracy of the finals that have both."""
    found = []
    for entry in study.entries:
        both = [train - test for train, test in zip(final_values(entry, "train_accuracy"),
                                                    final_values(entry, "test_accuracy"))]
        mean, error, _ = mean_and_error(both)
        found.append(Row(label(study, entry), look(study, entry).colour, mean, mean - error,
                         mean + error))
    made = rows(study.prefix + "gap", "Generalization gap", "Training accuracy minus test "
                "accuracy of the final weights; mean over the finished final runs, with one "
                "standard error to both sides.", found, x=Quantity("Gap (percentage points)", 100))
    return "Generalization gap: no run has a training accuracy (setting score_train)." \
        if isinstance(made, str) else made
