"""The settings of a reproduction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvdnoise.training.errors import one_line_errors
from hvdnoise.training.records import is_run
from hvdnoise.training.validation import require


@dataclass(frozen=True)
class ReproduceConfig:
    """Run a finished run again from its own record, and compare the weights bit for bit.

    As many ranks as the record says are started on this machine, by the launcher of its transport.
    Exit code 0: equal; 1: not; 2: the folder holds no finished run, or something is missing here.

    Args:
        run: the run's folder; nothing in it is changed.
        out: folder of the new run; default: RUN/reproduced.
        data_root: folder of the data sets; default: as the run had it.
        trust_plugins: import the plugins, and the functions of data set and model, that the run
            names. They are code: look at them first.
        overwrite: replace an earlier run in out.
        dry_run: say what would be started and what differs from the record, and start nothing.
    """

    run: str = ""
    out: str | None = None
    data_root: str | None = None
    trust_plugins: bool = False
    overwrite: bool = False
    dry_run: bool = False

    @property
    def folder(self) -> Path:
        """Where the new run goes."""
        return Path(self.run) / "reproduced" if self.out is None else Path(self.out)


@one_line_errors()
def validate(config: ReproduceConfig) -> None:
    """Check where the new run goes.

    Raises:
        ConfigError: one line with the value that is wrong and the remedy.
    """
    out, record = config.folder.resolve(), Path(config.run).resolve()
    require(out != record and out not in record.parents, "out", config.folder,
            "the record is in it, which is not changed; give another one")
    require(out.is_dir() or not out.exists(), "out", config.folder, "it is not a folder")
    if out.is_dir() and any(out.iterdir()):
        require(is_run(out), "out", config.folder, "it is not empty and holds no run; give another "
                "one")
        require(config.overwrite, "out", config.folder,
                "it holds a run already; give another one, or --overwrite to replace it")
