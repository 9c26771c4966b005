"""A study's section of the page."""

from __future__ import annotations

import math
from typing import Any

from hvdnoise.report import study_figures as figures
from hvdnoise.report import study_records as records
from hvdnoise.report.numbers import chance, number, plural, text, with_error
from hvdnoise.report.parts import Part, Section, Table
from hvdnoise.report.reading import Study
from hvdnoise.training.config import flat

Entry = dict[str, Any]


def section(study: Study, key: str) -> Section:
    """Everything of a study; what is missing is said."""
    if not study.entries:
        return Section(key, study.name, "There are no methods in the results yet.",
                       notices(study), [_settings(study)])
    split = figures.groups(study)
    parts = [_result(study), Part("Accuracy against cost"), Part("Accuracy against batch size"),
             Part("Learning curves"), Part("Generalization gap"),
             Part("Sensitivity to the searched settings"), Part("Noise"), Part("Sharpness"),
             _settings(study)]
    _, costs, sizes, learning, gap, sensitivity, noise, sharpness, _ = parts
    for suffix, words, entries in split:
        for cost in figures.COSTS:
            name = "cost" if cost == "gradient_evaluations" else f"cost-{cost.replace('_', '-')}"
            costs.add(figures.cost(study, entries, cost, name + suffix, words))
        for each in records.learning_curves(study, entries, suffix, words):
            learning.add(each)
        for each in records.noise(study, entries, suffix, words):
            noise.add(each)
    sizes.add(figures.batch_sizes(study))
    gap.add(figures.gap(study))
    for each in records.sensitivity(study):
        sensitivity.add(each)
    for each in records.sharpness(study):
        sharpness.add(each)
    return Section(key, study.name, headline(study), notices(study), parts)


def headline(study: Study) -> str:
    """What was compared, on what, with how many runs and comparisons."""
    found, settings = study.results, flat(study.results.get("settings") or {})
    about = str(found.get("about") or "").strip()
    about += "" if about.endswith((".", "?", "!")) or not about else "."
    methods = {str(entry.get("method")) for entry in study.entries}
    sizes = [f"{size:g}" for size in figures.batches(study) if size]
    counts = found.get("runs") or {}
    said = (about and f"{about} ") + plural(len(methods), "method")
    if sizes:
        said += f" at batch {' and '.join(sizes)}"
    on = [text(settings[name]) for name in ("model", "data.dataset") if settings.get(name)]
    if on:
        said += f", {' on '.join(on)}"
    said += f". {text(counts.get('finished', 0))} of {text(counts.get('planned'))} runs finished"
    seeds = found.get("seeds") or []
    said += f", {plural(len(seeds), 'final seed')} for each method"
    if found.get("trials_per_method") is not None:
        said += f" after {plural(found['trials_per_method'], 'trial')} each"
    baseline = found.get("baseline")
    said += f". {plural(found.get('comparisons', 0), 'comparison')} with the baseline"
    return said + (f" ({baseline})." if baseline else ".")


def notices(study: Study) -> list[str]:
    """What a reader must know first."""
    found, made = study.results, list(study.problems)
    counts = found.get("runs") or {}
    if not found:
        return [*made, "No run of this study has ended yet: there are no results."]
    if found.get("state") != "complete":
        made.append(f"The study is not complete: {text(counts.get('finished', 0))} of "
                    f"{text(counts.get('planned'))} runs have finished. What follows will change.")
    for outcome in ("diverged", "failed"):
        if number(counts.get(outcome)) > 0:
            made.append(f"{plural(counts[outcome], 'run')} {outcome} (trials and final runs).")
    chance_level = found.get("chance")
    if any(number(entry.get("diverged")) > 0 for entry in study.entries):
        made.append("A diverged final run counts with the accuracy of chance"
                    + (f" ({number(chance_level):.1%})." if chance_level is not None else "."))
    for entry in study.entries:
        if number(entry.get("failed")) > 0:
            made.append(f"{figures.label(study, entry)}: {plural(entry['failed'], 'final run')} "
                        "failed; there is no mean until all of them have run.")
    return made


def _result(study: Study) -> Part:
    part = Part("Result")
    part.items.append(methods_table(study))
    part.words.append(_statistics(study))
    part.add(figures.differences(study))
    return part


def _statistics(study: Study) -> str:
    return ("Mean ± standard error over the final seeds. Differences are paired: runs with the "
            "same seed have the same images, initial weights and order. "
            f"Comparisons made: {text(study.results.get('comparisons', 0))}; p after Holm holds "
            "for all of them together.")


def methods_table(study: Study) -> Table:
    """A row for each method at each batch."""
    score = figures.score_of(study)
    percent = score.scale == 100
    digits = 2 if percent else 4
    unit = "points" if percent else "units of the score"
    rows = []
    for entry in study.entries:
        against = entry.get("versus_baseline")
        against = against if isinstance(against, dict) else {}
        low, high, difference = (number(against.get(each)) * score.scale
                                 for each in ("low", "high", "difference"))
        rows.append([
            figures.label(study, entry), text(entry.get("batch")),
            with_error(number(entry.get("mean")) * score.scale,
                       number(entry.get("error")) * score.scale, digits),
            text(entry.get("n")), text(entry.get("diverged")), text(entry.get("failed")),
            "–" if math.isnan(difference) else f"{difference:+.{digits}f}",
            "–" if math.isnan(low) or math.isnan(high) else
            f"{low:+.{digits}f} to {high:+.{digits}f}",
            chance(number(against.get("p"))), chance(number(against.get("p_holm")))])
    return Table(f"{score.label} of the final runs, and paired differences from the baseline",
                 ["method", "batch", score.label, "n", "diverged", "failed", f"difference ({unit})",
                  "95% interval", "p", "p (Holm)"], rows)


def _settings(study: Study) -> Part:
    part = Part("Settings and versions")
    rows, at_edge = [], []
    for entry in study.entries:
        atedge = list(entry.get("edge") or [])
        at_edge += [f"{figures.label(study, entry)} ({name})" for name in atedge]
        rows.append([figures.label(study, entry), text(entry.get("settings") or {}),
                     "; ".join(f"{name}: {_space(space)}"
                               for name, space in (entry.get("search") or {}).items()) or "none",
                     text(entry.get("chosen") or None), text(len(entry.get("trials") or [])),
                     ", ".join(atedge) or "none"])
    if rows:
        part.items.append(Table("Methods: own settings, search and choice",
                                ["method", "settings", "searched", "chosen", "trials",
                                 "at the edge"], rows, left=4))
    if at_edge:
        part.words.append("Chosen at the edge of what was tried, so the best value may lie "
                          "beyond: " + "; ".join(at_edge) + ".")
    found = study.results
    facts = {name.replace("_", " "): found[name] for name in
             ("baseline", "score", "ranks", "virtual_workers", "workers",
              "trials_per_method", "tuning_seeds", "seeds") if found.get(name) is not None}
    facts.update(flat(found.get("settings") or study.settings))
    if facts:
        part.items.append(facts_table("Settings of all runs", facts, exact=True))
    if study.environment:
        part.items.append(facts_table("Versions and machine", flat(study.environment)))
    else:
        part.missing.append("Versions: there is no environment.json.")
    return part


def facts_table(caption: str, facts: dict[str, Any], *, exact: bool = False) -> Table:
    """Name and value, without those that are empty; ``exact``: with all digits, as settings are."""
    return Table(caption, ["name", "value"],
                 [[name, str(value) if exact and number(value) == value else text(value, 6)]
                  for name, value in facts.items() if value not in (None, [], {}, "")], left=2)


def _space(space: Any) -> str:
    if isinstance(space, dict):
        return f"{text(space.get('low'))} to {text(space.get('high'))}" + \
            " (log)" * bool(space.get("log"))
    return text(space)
