"""A run's section of the page."""

from __future__ import annotations

import math
from typing import Any, Sequence

import numpy as np

from hvdnoise.report.charts import EPOCH, STEP, Curve, Quantity, accuracy, curves
from hvdnoise.report.drawing import style
from hvdnoise.report.numbers import number, plural, text
from hvdnoise.report.parts import Part, Section, Table
from hvdnoise.report.reading import Run
from hvdnoise.report.study_part import facts_table
from hvdnoise.training.config import flat

_EVENTS = 60  # in the table
_LAYERS = 20
_LOSS = Quantity("Loss (cross-entropy)", log=True)
Drawn = tuple[str, str, str, Quantity, Sequence[tuple[str, str, str]], Quantity]
# heading, then key, title, caption, x, (kind, key, label) of the lines, y
_FIGURES: dict[str, Sequence[Drawn]] = {
    "Curves": (
        ("accuracy", "Accuracy by epoch", "Training accuracy is that of the steps since the last "
         "line of metrics, with augmentation and noise, if any.", EPOCH,
         (("train", "accuracy", "training"), ("validation", "validation_accuracy", "validation"),
          ("test", "test_accuracy", "test"),
          ("validation", "ema_validation_accuracy", "validation, moving average"),
          ("test", "ema_test_accuracy", "test, moving average")),
         Quantity("Accuracy (%)", 100)),
        ("loss", "Loss by epoch", "Training loss is that of the steps since the last line of "
         "metrics.", EPOCH,
         (("train", "loss", "training"), ("validation", "validation_loss", "validation"),
          ("test", "test_loss", "test"),
          ("validation", "ema_validation_loss", "validation, moving average"),
          ("test", "ema_test_loss", "test, moving average")), _LOSS),
        ("learning-rate", "Learning rate by epoch", "Of the last step before each line.", EPOCH,
         (("train", "learning_rate", "learning rate"),), Quantity("Learning rate"))),
    "Timings": (
        ("step-time", "Time of a step by epoch", "Mean over the steps since the last line; the "
         "time that rank 0 waits for communication is part of the step.", EPOCH,
         (("train", "step_seconds", "step"),
          ("train", "communication_seconds", "waiting for communication")),
         Quantity("Time of a step (s)")),
        ("communication-share", "Share of communication by epoch", "Waiting for communication by "
         "the time of the step.", EPOCH, (("train", "communication_share", "share"),),
         Quantity("Share of the step (%)", 100))),
    "Noise": (
        ("noise-size", "Size of the noise by epoch", "Root mean square norm of the noise, and its "
         "radius on the weights where it acts there.", EPOCH,
         (("train", "noise_rms", "root mean square norm"), ("train", "noise_radius", "radius")),
         Quantity("Norm, over all weights", log=True)),
        ("noise-share", "Noise as a share of the weights' norm", "The radius by the norm of all "
         "displaced weights.", EPOCH, (("train", "noise_share", "share"),),
         Quantity("Share of the norm (%)", 100)),
        ("noise-multiple", "Noise in multiples of the learning rate", "The scale of the noise by "
         "the learning rate of the step.", EPOCH,
         (("train", "noise_lr_multiple", "multiple"),), Quantity("Multiple of the learning rate")),
        ("noise-coverage", "Steps that had the noise that was due", "Counts since the start; a "
         "step is missed where a gradient came from weights without the noise.", STEP,
         (("train", "noise_due_steps", "due"), ("train", "noise_missed_steps", "missed")),
         Quantity("Steps", unit="")),
        ("noise-scale", "Gradient noise scale by epoch", "tr(C) / |gradient|², simple noise scale "
         "(McCandlish et al.). Values that are not positive are not drawn.", EPOCH,
         (("train", "gradient_noise_scale", "noise scale"),),
         Quantity("Noise scale (examples)", log=True))),
    "Spectrum of the gradient's covariance": (
        ("eigenvalues", "Trace and largest eigenvalues by step", "Of the covariance of one "
         "example's gradient, estimated from the workers.", STEP,
         (("covariance", "trace", "trace"),
          *(("covariance", f"eigenvalue_{n}", f"eigenvalue {n}") for n in (1, 2, 3))),
         Quantity("Trace, eigenvalue", log=True)),
        ("stable-rank", "Stable rank by step", "Trace by largest eigenvalue.", STEP,
         (("covariance", "stable_rank", "stable rank"),), Quantity("Stable rank")),
        ("alignment", "Alignment of the gradient with the covariance", "As the metrics give it.",
         STEP, (("covariance", "alignment", "alignment"),), Quantity("Alignment")))}


def section(run: Run, key: str) -> Section:
    """Everything of a run; what is missing is said."""
    parts = [Part("Summary", [_summary(run)])]
    for heading, figures in _FIGURES.items():
        part = Part(heading)
        for name, title, caption, x, lines, y in figures:
            part.add(curves(f"{key}-{name}", title, caption, _curves(run, x, lines), x=x, y=y))
        if heading.startswith("Spectrum") and (shares := _shares(run)):
            part.items.append(shares)
        parts.append(part)
    parts += [_sharpness(run, key), _events(run), _settings(run)]
    return Section(key, run.name, headline(run), notices(run), parts)


def _curves(run: Run, x: Quantity, lines: Sequence[tuple[str, str, str]]) -> list[Curve]:
    found = []
    for place, (kind, key, label) in enumerate(lines):
        if key == "communication_share":
            at, whole, waiting = run.values(kind, "epoch", "step_seconds", "communication_seconds")
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.array(waiting) / np.array(whole)
        else:
            at, values = run.values(kind, "epoch" if x is EPOCH else "step", key)
        if np.isfinite(np.asarray(values, float)).any():
            found.append(Curve(label, style(place + 1, place), at, values))
    return found


def progress(run: Run) -> str:
    """How far it is."""
    steps = [number(line.get("step")) for lines in run.lines.values() for line in lines]
    last = max((step for step in steps if math.isfinite(step)), default=math.nan)
    epochs = [epoch for kind in run.lines for epoch in run.values(kind, "epoch")[0]
              if math.isfinite(epoch)]
    if math.isnan(last):
        return "no step is recorded"
    planned = run.settings.get("epochs")
    of = f" of {text(planned)}" if planned is not None else ""
    return f"step {last:g}" + (f", epoch {max(epochs):.4g}{of}" if epochs else "")


def headline(run: Run) -> str:
    """What it is and how it ended."""
    setting = run.settings
    named = [text(setting[name]) for name in ("model", "data.dataset") if setting.get(name)]
    noise = run.summary.get("noise") or setting.get("noise.kind")
    words = " on ".join(named) or run.name
    if noise:
        words += f", noise {noise}"
    workers, batch = run.summary.get("workers"), run.summary.get("global_batch")
    if workers and batch:
        words += f", {text(workers)} workers, batch {text(batch)}"
    ended = {"finished": "finished", "diverged": "diverged",
             "preempted": "was preempted and can go on"}.get(run.outcome, "has not finished")
    words += f". The run {ended}"
    score = number(run.summary.get("test_accuracy"))
    return words + ("." if math.isnan(score) else f" with a test accuracy of {score:.2%}.")


def notices(run: Run) -> list[str]:
    """What a reader must know first."""
    found = list(run.problems)
    if run.outcome == "diverged":
        reason = run.summary.get("reason")
        found.append("The run diverged" + (f": {text(reason)}" if reason else "") + ".")
    elif run.outcome == "preempted":
        found.append(f"The run was preempted and saved ({progress(run)}); --resume auto goes on.")
    elif run.outcome == "unfinished":
        when = f"; its last metrics are of {run.written}" if run.written else ""
        found.append(f"There is no summary.json: the run goes on still, or it has crashed "
                     f"({progress(run)}{when}).")
    return found


def _summary(run: Run) -> Table:
    facts: dict[str, Any] = {"outcome": run.outcome, "progress": progress(run)}
    for name, value in run.summary.items():
        if name not in ("outcome", "reason", "starts") and value is not None:
            percent = name.endswith("_accuracy") and math.isfinite(number(value))
            facts[name.replace("_", " ")] = f"{value:.2%}" if percent else value
    return facts_table("Summary", facts)


def _shares(run: Run) -> Table | None:
    """Of the trace, by parameter, in the last spectrum."""
    last = (run.lines.get("covariance") or [{}])[-1]
    found = sorted(((number(value), name.removeprefix("share/")) for name, value in last.items()
                    if name.startswith("share/") and math.isfinite(number(value))), reverse=True)
    if not found:
        return None
    more = f", the {_LAYERS} largest of {len(found)}" if len(found) > _LAYERS else ""
    return Table(f"Shares of the trace by parameter at step {last['step']}{more}",
                 ["parameter", "share"],
                 [[name, f"{share:.2%}"] for share, name in found[:_LAYERS]])


def _sharpness(run: Run, key: str) -> Part:
    part = Part("Sharpness")
    for stem, found in run.measurements.items():
        hessian, aligned = (found.get(name) or {} for name in ("hessian", "alignment"))
        facts = {"examples": found.get("examples"), "training loss": found.get("loss"),
                 **{name.replace("_", " "): value for name, value in hessian.items()},
                 **{name.replace("_", " "): value for name, value in aligned.items()}}
        part.items.append(facts_table(f"Sharpness ({stem}.json; see docs/measure.md)", facts))
        line, noise = found.get("line") or {}, found.get("noise") or []
        part.add(curves(f"{key}-{stem}-line", f"Loss on a line through the weights ({stem})",
                        "Distance in lengths of the filters.",
                        [Curve("training loss", style(1, 0), line.get("at", []),
                               [number(each) for each in line.get("loss", [])])],
                        x=Quantity("Distance (lengths of the filters)"), y=_LOSS))
        columns = [[number(each.get(name)) for each in noise]
                   for name in ("level", "accuracy", "accuracy_error")]
        part.add(curves(f"{key}-{stem}-levels", f"Accuracy with noise on the weights ({stem})",
                        "Mean over the draws; the band is one standard error to both sides.",
                        [Curve("test accuracy", style(1, 0), columns[0], columns[1],
                               np.array(columns[2]))],
                        x=Quantity("Size of the noise (lengths of the filters)"),
                        y=accuracy("Test")))
    if not run.measurements:
        part.missing.append("Sharpness: the run is not measured (hvdnoise measure RUN).")
    return part


def _events(run: Run) -> Part:
    part = Part("Events")
    found = list(run.events)
    skipped = [(f"step {line['step']}", f"{plural(line['bad_steps'], 'step')} without a "
                "finite gradient skipped since the line before")
               for line in run.lines.get("train", []) if number(line.get("bad_steps")) > 0]
    if not any("without a finite gradient" in what for _, what in found):
        found += skipped  # otherwise the log has them already
    if not found:
        part.words.append("None: no resumption, no skipped step and no warning is recorded.")
        return part
    shown = found[:_EVENTS // 2] + found[max(_EVENTS // 2, len(found) - _EVENTS // 2):]
    left = len(found) - len(shown)
    part.items.append(Table("Resumptions, skipped steps, warnings and errors"
                            + (f" ({left} in the middle left out)" if left else ""),
                            ["when", "what"], [list(each) for each in shown], left=2))
    return part


def _settings(run: Run) -> Part:
    part = Part("Settings and versions")
    for caption, facts, file in (("Settings", run.settings, "config.yaml"),
                                 ("Versions and machine", flat(run.environment),
                                  "environment.json")):
        if facts:
            part.items.append(facts_table(caption, facts, exact=True))
        else:
            part.missing.append(f"{caption}: there is no {file} that can be read.")
    return part
