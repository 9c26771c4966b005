"""The settings, and what makes them right or wrong before anything is read or written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvdnoise.training.errors import one_line_errors
from hvdnoise.training.validation import require

PAGE = "index.html"
MARK = '<meta name="generator" content="hvdnoise report">'


@dataclass(frozen=True)
class ReportConfig:
    """Make a page of runs and studies, with figures, tables and numbers beside it; see
    docs/report.md.

    Args:
        folders: of runs and studies, finished or not.
        out: folder for index.html, report.md, runs.csv, methods.csv and figures/; default: report
            in the folder of the run or study, or here for several. A report there is replaced.
        title: of the page; default: the names of what it shows.
        overwrite: write into a folder that holds something else than a report.
    """

    folders: tuple[str, ...] = ()
    out: str | None = None
    title: str | None = None
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """Where the results go."""
        if self.out is not None:
            return Path(self.out)
        return Path(self.folders[0]) / "report" if len(self.folders) == 1 else Path("report")


def is_report(folder: Path) -> bool:
    """Whether ``folder`` holds a report."""
    page = folder / PAGE
    if not page.is_file():
        return False
    with page.open(errors="replace") as file:
        return MARK in file.read(2000)


@one_line_errors()
def validate(config: ReportConfig) -> None:
    """Check what can be without reading the records.

    Raises:
        ConfigError: one line with the value that is wrong and the remedy.
    """
    require(len(config.folders) > 0, "folders", "nothing", "give folders of runs or studies")
    for name in config.folders:
        require(Path(name).is_dir(), "folders", name,
                "there is no such folder; give those of runs or studies")
    out = config.folder
    require(out.is_dir() or not (out.exists() or out.is_symlink()), "out", out,
            "it is not a folder; give another one")
    if out.is_dir() and not is_report(out):
        require(config.overwrite or not any(out.iterdir()), "out", out,
                "it holds something else than a report; give a new one, or --overwrite to write "
                "into it")
