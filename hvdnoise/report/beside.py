"""What lies beside the page: Markdown, CSV, and the figures as PNG and SVG."""

from __future__ import annotations

import csv
import html
import io
from typing import Any, Sequence

from hvdnoise.report import study_figures as figures
from hvdnoise.report.parts import Graphic, Section, Table
from hvdnoise.report.reading import Run, Study
from hvdnoise.training import results

_FINAL = ("score", "test_accuracy", "test_loss", "validation_accuracy", "validation_loss",
          "train_accuracy", "train_loss", "best_test_accuracy", "steps", "epochs", "seconds",
          "gradient_evaluations", "exchange_bytes")
_METHOD = ("mean", "error", "n", "diverged", "failed")
_VERSUS = ("batch", "difference", "error", "low", "high", "level", "p", "p_holm", "n")


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The words and tables, and links to the PNG files."""
    lines = [f"# {_escaped(title)}", ""]
    for section in sections:
        lines += [f"## {_escaped(section.title)}", "", _escaped(section.headline), ""]
        lines += [f"- {_escaped(notice)}" for notice in section.notices] + [""]
        for part in section.parts:
            lines += [f"### {_escaped(part.title)}", ""]
            for words in part.words:
                lines += [_escaped(words), ""]
            for item in part.items:
                lines += _table(item) if isinstance(item, Table) else _figure(item)
            lines += [f"- {_escaped(each)}" for each in part.left_out] + [""] * bool(part.left_out)
    return "\n".join(lines).rstrip() + "\n"


def _figure(item: Graphic) -> list[str]:
    title = _escaped(item.title).replace("[", r"\[").replace("]", r"\]")
    return [f"![{title}](figures/{item.key}.png)", "", _escaped(item.caption), ""]


def _table(item: Table) -> list[str]:
    cells = [[_escaped(cell) for cell in row] for row in (item.columns, *item.rows)]
    return [f"{_escaped(item.caption)}:", "", *results.table(cells, left=item.left), ""]


def _escaped(words: str) -> str:
    """Words that Markdown shows as they are."""
    return html.escape(" ".join(words.split()), quote=False).replace("|", r"\|").replace("`", r"\`")


def runs_csv(found: Sequence[Run | Study]) -> str:
    """A row for each final run of a study, and for each run."""
    rows = []
    for each in found:
        if isinstance(each, Run):
            rows.append(["", each.name, "", each.summary.get("global_batch"),
                         each.settings.get("seed"), each.outcome,
                         *(each.summary.get(key) for key in _FINAL)])
            continue
        for entry in each.entries:
            for final in entry.get("finals") or []:
                rows.append([each.name, final.get("run"), entry.get("method"), entry.get("batch"),
                             final.get("seed"), final.get("outcome"),
                             *(final.get(key) for key in _FINAL)])
    return _csv(["study", "run", "method", "batch", "seed", "outcome", *_FINAL], rows)


def methods_csv(found: Sequence[Run | Study]) -> str:
    """A row for each method of a study at each batch."""
    rows = []
    for each in found:
        for entry in each.entries if isinstance(each, Study) else ():
            against: dict[str, Any] = entry.get("versus_baseline") or {}
            costs = [figures.mean_and_error(figures.final_values(entry, key))[0]
                     for key in figures.COSTS]
            rows.append([each.name, entry.get("method"), entry.get("label"), entry.get("batch"),
                         *(entry.get(key) for key in _METHOD), len(entry.get("trials") or []),
                         *(None if cost != cost else cost for cost in costs),
                         *(against.get(key) for key in _VERSUS)])
    return _csv(["study", "method", "label", "batch", *_METHOD, "trials",
                 *(f"mean_{key}" for key in figures.COSTS),
                 *(f"baseline_{key}" for key in _VERSUS)], rows)


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    return made.getvalue()
