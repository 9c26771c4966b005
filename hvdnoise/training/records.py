"""What a run leaves behind, and what it says while it runs.

    RUN/config.yaml          the settings, as `hvdnoise train --config` takes them
    RUN/environment.json     versions, ranks, hosts, and what else bits depend on
    RUN/metrics.jsonl        one JSON object a line, "kind": "train" (every log interval),
                             "validation" (every eval_every epochs, where there are such images),
                             "test" (at the end alone where there are, else every eval_every
                             epochs) or "covariance" (`hvdnoise.spectrum`)
    RUN/tensorboard/         the same numbers as events
    RUN/summary.json         how the run ended, "outcome": "finished" or "diverged"; there is none
                             before, and none of a run that crashed; see docs/runs.md
    RUN/step                 the last step that was taken, also of a run that was killed
    RUN/weights*.pt          state dicts: final, best accuracy (on the validation images, else on
                             the test images), moving average
    RUN/checkpoints/         see `hvdnoise.training.checkpoint`
    RUN/logs/rank-N.log      every rank's own; beside it, while it runs, rank-N.state, see
                             `hvdnoise.peers`
    RUN/logs/rank-N.log      every rank's own
    RUN/lock-N.json          who trains in the folder now (`hvdnoise.training.folder_lock`)
    RUN/measure/             what `hvdnoise measure` found of the weights; see docs/measure.md
    RUN/export/              the network for other programs, by `hvdnoise export`
    RUN/report/              the page of `hvdnoise report`; see docs/report.md
    RUN/reproduced/          the run once more, by `hvdnoise reproduce`

Rank 0 writes all but the logs. A record that cannot be written (a full disk) is warned of once,
and training goes on: it is the checkpoints that must not fail silently.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor

from hvdnoise import watchdog
from hvdnoise.training import folder_lock, origin, plugins
from hvdnoise.training.progress import log

STEP_FILE = "step"
_OF_A_RUN = ("environment.json", "metrics.jsonl", "preempted.json", "summary.json", "weights.pt",
             "weights-best.pt", "weights-ema.pt", "checkpoints", "logs", "export", "measure",
             "report", "reproduced", "tensorboard", STEP_FILE,
             "config.yaml")  # tells that there is a run, so it goes last


def is_run(folder: Path) -> bool:
    """Whether ``folder`` holds a run (finished or not)."""
    return (folder / "config.yaml").is_file()


def is_free(folder: Path) -> bool:
    """Whether ``folder`` holds nothing but what a run that was killed at its start leaves."""
    return all(folder_lock.is_name(path.name) or path.name == "config.yaml.part"
               for path in folder.iterdir())


def clear(folder: Path) -> None:
    """Remove what an earlier run wrote into ``folder``, and nothing else."""
    for name in _OF_A_RUN:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write so that a reader sees the old content or the new, also after a power cut."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def weights_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over the names (sorted), dtypes, shapes and bytes of a state dict."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """What must be equal on all ranks for a run to be one run."""
    found = {"python": platform.python_version(), "hvdnoise": code_digest()}
    for package in ("torch", "torchvision", "horovod", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {**found, **plugins.versions()}


def code_digest() -> str:
    """SHA-256 (16 digits) of the package's source files."""
    root = Path(__file__).resolve().parents[1]
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return total.hexdigest()[:16]


def environment(hosts: list[str], launcher: dict[str, int], transport: str | None = None
                ) -> dict[str, Any]:
    """What environment.json says."""
    return {**origin.facts(transport, versions()), "mpi": first_line("mpirun", "--version"),
            "git": first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
            "image": image(), "platform": platform.platform(),
            "command": sys.argv, "folder": os.getcwd(), "hosts": hosts, "ranks": len(hosts),
            "local_size": launcher["local_size"]}


def image() -> dict[str, Any] | None:
    """The container image that this runs in; None outside of one.

    What it is made of stands in the image itself. Its own digest cannot: whoever starts the
    container says it, in HVDNOISE_IMAGE.
    """
    try:
        found: dict[str, Any] = json.loads(Path(sys.prefix, "image.json").read_text())
    except (OSError, ValueError):
        found = {}
    if named := os.environ.get("HVDNOISE_IMAGE"):
        found["digest"] = named
    return found or None


def first_line(*command: str) -> str | None:
    """Of what a program prints; None where it is not there, fails or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None


class _LogFile(logging.FileHandler):
    """A log file whose failure is one warning, not a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        log.removeHandler(self)
        with contextlib.suppress(OSError):  # it flushes, and the disk may still be full
            self.close()
        log.warning("cannot write %s any more: %s", self.baseFilename, error)


def start_logs(folder: Path, rank: int) -> None:
    """Everything goes to RUN/logs/rank-N.log; rank 0 also speaks on the terminal."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    file = _LogFile(folder / "logs" / f"rank-{rank}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    watched = watchdog.current()
    if watched is not None:
        watched.log = Path(file.baseFilename)
        watched.peers.share(folder / "logs")
    log.info("rank %d, process %d on %s", rank, os.getpid(), socket.gethostname(),
             extra={"terminal": False})


class Records:
    """Rank 0's metrics; on the other ranks nothing is written.

    Args:
        folder: the run's.
        resumed_at: a step: what an earlier process wrote about later steps is dropped.
        again: kinds of which the lines of that step are dropped too: they will be written anew.
        tensorboard: whether to write events too.
        is_ours: whether the folder is still this run's, asked before each line.
    """

    def __init__(self, folder: Path, *, rank: int, resumed_at: int | None, tensorboard: bool,
                 again: Collection[str] = (), is_ours: Callable[[], bool] = lambda: True) -> None:
        self.folder = folder
        self._path = folder / "metrics.jsonl"
        self._events: Any = None
        self._failed: set[str] = set()
        self._active, self._is_ours = rank == 0, is_ours
        self._step: int | None = None  # the descriptor of RUN/step
        if self._active and resumed_at is not None:
            self._attempt("metrics.jsonl", lambda: self._drop_after(resumed_at, again))
        if self._active and tensorboard:
            self._attempt("TensorBoard events", lambda: self._open_events(resumed_at))

    def _open_events(self, resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter
        purge = None if resumed_at is None else resumed_at + 1
        self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)

    def _drop_after(self, step: int, again: Collection[str]) -> None:
        def stays(line: dict[str, Any]) -> bool:
            return line["step"] < step or line["step"] == step and line["kind"] not in again
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines(keepends=True)
                    if line.endswith("\n") and stays(json.loads(line))]
            write_text(self._path, "".join(kept))

    def write(self, kind: str, step: int, values: dict[str, float | int | None]) -> None:
        """Record numbers of a step; what is not finite is recorded as null."""
        if not self._active or not self._is_ours():
            return
        clean = {key: value if value is not None and math.isfinite(value) else None
                 for key, value in values.items()}
        self._attempt("metrics.jsonl", lambda: self._append({"kind": kind, "step": step, **clean}))
        if self._events is not None:
            self._attempt("TensorBoard events", lambda: self._send(kind, step, clean))

    def note_step(self, step: int) -> None:
        """Keep RUN/step up to date, for whoever looks at the run when it was killed."""
        if self._active:
            self._attempt("step", lambda: self._write_step(step))

    def _write_step(self, step: int) -> None:
        if self._step is None:  # a new file at each start
            write_text(self.folder / STEP_FILE, f"{step:<19d}\n")
            self._step = os.open(self.folder / STEP_FILE, os.O_WRONLY)
        os.pwrite(self._step, b"%-19d\n" % step, 0)

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _send(self, kind: str, step: int, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if value is not None:
                self._events.add_scalar(f"{kind}/{key}", value, step)
        self._events.flush()

    def _attempt(self, what: str, action: Any) -> None:
        """Run ``action``; a failure is warned of once, and that record is given up."""
        if what in self._failed:
            return
        try:
            action()
        except Exception as error:  # a record is never worth the run
            self._failed.add(what)
            log.warning("%s: not written any more (%s: %s); training goes on", what,
                        type(error).__name__, error)

    def close(self) -> None:
        """Close the event file."""
        if self._events is not None:
            self._attempt("TensorBoard events", self._events.close)
        if self._step is not None:
            os.close(self._step)
            self._step = None
