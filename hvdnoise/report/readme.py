"""The one figure that a README shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Sequence

from hvdnoise.report.reading import read_study


def cost_figure(study: Path | str, path: Path | str, *, batch: int | None = None,
                methods: Sequence[str] = ()) -> None:
    """Draw accuracy (mean ± standard error) against gradient evaluations, one marker a method.

    The SVG brings its background and follows the reader's dark or light setting.

    Args:
        study: folder of a study, or its results.json.
        path: the SVG to write.
        batch: only the methods at this batch; default: all.
        methods: only these, by their keys in the study; default: all.

    Raises:
        ValueError: where the study has nothing to draw, or lacks a method.
    """
    from hvdnoise.report.study_figures import cost
    folder = Path(study)
    folder = folder.parent if folder.name == "results.json" else folder
    found = read_study(folder, folder.name)
    known = [str(each.get("method")) for each in found.entries]
    if missing := sorted(set(methods) - set(known)):
        raise ValueError(f"{json.dumps(str(folder))} has no method {', '.join(missing)}: give some "
                         f"of {', '.join(dict.fromkeys(known))}")
    entries = [each for each in found.entries if batch in (None, each.get("batch"))
               and (not methods or each.get("method") in methods)]
    found.results["methods"] = entries  # so that colours are given to these alone
    drawn = cost(found, entries, "gradient_evaluations", "cost")
    if isinstance(drawn, str):
        raise ValueError(f"{json.dumps(str(folder))}: {drawn}")
    Path(path).write_text(drawn.standalone)
