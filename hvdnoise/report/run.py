"""From folders to a report."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Sequence

from hvdnoise.report import beside, compare_part, run_part, study_part
from hvdnoise.report.config import PAGE, ReportConfig, is_report
from hvdnoise.report.page import render
from hvdnoise.report.parts import Graphic, Section
from hvdnoise.report.reading import Run, Study, read
from hvdnoise.training.config import ConfigError
from hvdnoise.training.records import write_text


def run(config: ReportConfig) -> int:
    """Read, draw and write; the exit code.

    Raises:
        ConfigError: for a folder that holds neither a run nor a study, and where ``out`` cannot be
            written.
    """
    found = [read(Path(path), name) for path, name in _names(config.folders)]
    found = [each.numbered(place) if isinstance(each, Study) else each
             for place, each in enumerate(found, 1)]
    sections = build(found)
    title = config.title or _title(found)
    sources = f"{len(found)} folder{'s' * (len(found) != 1)}: " + ", ".join(
        name for _, name in _names(config.folders))
    files = {PAGE: render(title, sections, sources), "report.md": beside.markdown(title, sections),
             "runs.csv": beside.runs_csv(found)}
    if any(isinstance(each, Study) for each in found):
        files["methods.csv"] = beside.methods_csv(found)
    try:
        _write(config.folder, files, sections)
    except OSError as error:
        raise ConfigError(f"out={config.folder} cannot be written ({error}): give another one"
                          ) from error
    print(f"{config.folder / PAGE}: {', '.join(section.title for section in sections)}")
    return 0


def build(found: Sequence[Run | Study]) -> list[Section]:
    """A section for each study, one for a lone run, one comparison of several runs."""
    sections = [study_part.section(each, f"part-{place}") for place, each in enumerate(found, 1)
                if isinstance(each, Study)]
    runs = [each for each in found if isinstance(each, Run)]
    if len(runs) == 1:
        sections.append(run_part.section(runs[0], "run"))
    elif runs:
        sections.append(compare_part.section(runs, "runs"))
    return sections


def _names(folders: Sequence[str]) -> list[tuple[str, str]]:
    """Each folder once, with a name that no other has."""
    paths = {os.path.realpath(path): path for path in reversed(folders)}
    kept = list(reversed(paths.items()))
    count = Counter(os.path.basename(real) for real, _ in kept)
    return [(path, os.path.basename(real) if count[os.path.basename(real)] == 1 else
             os.path.normpath(path)) for real, path in kept]


def _title(found: Sequence[Run | Study]) -> str:
    names = [each.name for each in found]
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} runs and studies"


def _write(folder: Path, files: dict[str, str], sections: Sequence[Section]) -> None:
    """The page last, so that an old one stays whole until the new one is complete."""
    drawn = folder / "figures"
    before = sorted(drawn.glob("*")) if is_report(folder) else []
    drawn.mkdir(parents=True, exist_ok=True)
    written = set()
    for section in sections:
        for part in section.parts:
            for item in part.items:
                if isinstance(item, Graphic):
                    (drawn / f"{item.key}.png").write_bytes(item.png)
                    write_text(drawn / f"{item.key}.svg", item.standalone)
                    written |= {f"{item.key}.png", f"{item.key}.svg"}
    for name in reversed(files):
        write_text(folder / name, files[name])
    for path in before:  # figures of an earlier report that have no successor
        if path.name not in written and path.suffix in (".png", ".svg"):
            path.unlink()
