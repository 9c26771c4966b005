"""The figures of what the runs of a study recorded: curves, trials, noise, sharpness."""

from __future__ import annotations

from typing import Any, Callable, Sequence

from hvdnoise.report import study_figures as figures
from hvdnoise.report.charts import EPOCH, STEP, Curve, Quantity, accuracy, curves
from hvdnoise.report.clouds import Cloud, clouds
from hvdnoise.report.drawing import Style
from hvdnoise.report.marks import Row, rows
from hvdnoise.report.numbers import mean_and_error, mean_curve, number
from hvdnoise.report.parts import Graphic
from hvdnoise.report.reading import Study

Entry = figures.Entry


def learning_curves(study: Study, entries: Sequence[Entry], suffix: str, words: str
                    ) -> list[Graphic | str]:
    """Accuracy and loss during training, and the training loss."""
    scored = {run.scored for entry in entries for run in figures.runs(study, entry)}
    of = "validation" if "validation" in scored else "test"
    wanted = [(of, f"{of}_accuracy", accuracy(of.capitalize()), "accuracy"),
              (of, f"{of}_loss", Quantity(f"{of.capitalize()} loss (cross-entropy)", log=True),
               "loss"),
              ("train", "loss", Quantity("Training loss (cross-entropy)", log=True), "train-loss")]
    return [over_runs(study, entries, f"curve-{name}{suffix}",
                      f"{quantity.label.partition(' (')[0]} by epoch{words}", kind, key,
                      y=quantity, x=EPOCH) for kind, key, quantity, name in wanted]


def _named(study: Study, entry: Entry) -> tuple[str, Style]:
    return figures.label(study, entry), figures.look(study, entry)


def over_runs(study: Study, entries: Sequence[Entry], key: str, title: str, kind: str, value: str,
              *, x: Quantity, y: Quantity) -> Graphic | str:
    """A number of the metrics during training, its mean and error over the finished finals."""
    found = []
    place = "epoch" if x is EPOCH else "step"
    for entry in entries:
        at, mean, error = mean_curve([run.values(kind, place, value)
                                      for run in figures.runs(study, entry)])
        found.append(Curve(*_named(study, entry), at, mean, error))
    return curves(study.prefix + key, title, "Mean over the finished final runs; the band is one "
                  "standard error to both sides (none for a single run). Diverged and failed runs "
                  "are not in it.",
                  found, x=x, y=y)


def sensitivity(study: Study) -> list[Graphic | str]:
    """The trials' validation accuracy against each setting that was searched."""
    names = list(dict.fromkeys(name for entry in study.entries
                               for name in entry.get("search") or {}))
    made: list[Graphic | str] = []
    for name in names:
        found = [cloud for entry in study.entries if (cloud := _cloud(study, entry, name))]
        key = study.prefix + f"sensitivity-{name}".replace(".", "-")
        made += clouds(key, f"Validation accuracy against {name}",
                       "Each marker is a trial of the search; the other searched settings differ "
                       "between trials, too. The dashed line is the value that was chosen. A cross "
                       "at the bottom is a trial without a score (diverged or failed).",
                       found, x=name, y=accuracy("Validation"))
    return made or ["Sensitivity: no setting was searched."]


def _cloud(study: Study, entry: Entry, name: str) -> Cloud | None:
    search = (entry.get("search") or {}).get(name)
    tried = [(each["settings"][name], number(each.get("validation_accuracy")))
             for each in entry.get("trials") or [] if name in (each.get("settings") or {})
             and each.get("outcome") != "missing"]
    if search is None or not tried:
        return None
    chosen = (entry.get("chosen") or {}).get(name)
    log = not isinstance(search, dict) or bool(search.get("log"))
    return Cloud(figures.label(study, entry), [place for place, _ in tried],
                 [score for _, score in tried], [] if chosen is None else [chosen], log)


NOISE = (("covariance", "trace", "Trace of the gradient's covariance", STEP, True),
         ("covariance", "eigenvalue_1", "Largest eigenvalue of the gradient's covariance", STEP,
          True),
         ("covariance", "stable_rank", "Stable rank of the covariance (trace / largest)", STEP,
          False),
         ("train", "gradient_noise_scale", "Gradient noise scale (examples)", EPOCH, True),
         ("train", "noise_rms", "Size of the noise, root mean square norm", EPOCH, True))


def noise(study: Study, entries: Sequence[Entry], suffix: str, words: str) -> list[Graphic | str]:
    """Spectra and scales of the noise during training."""
    return [over_runs(study, entries, f"noise-{value.replace('_', '-')}{suffix}",
                      f"{name.partition(',')[0].partition(' (')[0]} by "
                      f"{'step' if x is STEP else 'epoch'}{words}", kind, value, x=x,
                      y=Quantity(name, log=log)) for kind, value, name, x, log in NOISE]


SHARPNESS: tuple[tuple[str, str, Callable[[dict[str, Any]], Any]], ...] = (
    ("eigenvalue", "Largest eigenvalue of the Hessian",
     lambda hessian: (hessian.get("eigenvalues") or [None])[0]),
    ("trace", "Trace of the Hessian", lambda hessian: hessian.get("trace")))


def sharpness(study: Study) -> list[Graphic | str]:
    """Of the finals that `hvdnoise measure` has seen."""
    made: list[Graphic | str] = []
    for key, title, value in SHARPNESS:
        found = []
        for entry in study.entries:
            mean, error, _ = mean_and_error([
                number(value(measured.get("hessian") or {})) for run in figures.runs(study, entry)
                for measured in list(run.measurements.values())[:1]])
            label, look = _named(study, entry)
            found.append(Row(label, look.colour, mean, mean - error, mean + error))
        drawn = rows(f"{study.prefix}sharpness-{key}", title, "Of the training loss at the final "
                     "weights (hvdnoise measure); mean over the measured runs, with one standard "
                     "error to both sides.", found, x=Quantity(title))
        made.append(drawn if not isinstance(drawn, str) else
                    f"{title}: no final run is measured (hvdnoise measure RUN).")
    return made
