"""`hvdnoise launch` in a process that is forked, with a script in place of the real ones.

    run = supervise(folder, [{"step": 7, "say": "hvdnoise: rank 1 failed: ...", "exit": 1}, {}])

The script behaves in each attempt as the list says, the last one again and again: `settings`
(False: it does not come as far as writing config.yaml), `step` and `checkpoint` (that it reaches),
`say` (on stderr), `wait` (seconds, or until SIGTERM, upon which it ends with `exit`), `child` (it
leaves a process behind that ignores SIGTERM), `kill` (itself), `exit`. With exit code 0 it finishes
the run, unless `finishes` is False.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

ALREADY = "--tests-supervised"  # marks the processes


@dataclass
class Supervised:
    """A supervisor, under way or ended."""

    process: Any
    run: Path
    said: Path

    def wait(self, seconds: float = 60) -> int:
        """Its exit code."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"it has not ended: {self.lines}")
        return int(self.process.exitcode)

    @property
    def lines(self) -> list[str]:
        """What it and its attempts have said on stderr."""
        return self.said.read_text().splitlines() if self.said.exists() else []

    @property
    def attempts(self) -> list[list[str]]:
        """The arguments of `hvdnoise train` of each attempt so far."""
        path = self.run.parent / "attempts"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_attempt(self, number: int, seconds: float = 30) -> None:
        """Until so many attempts have begun."""
        until = time.monotonic() + seconds
        while len(self.attempts) < number or not (self.run.parent / f"ready-{number}").exists():
            assert time.monotonic() < until, self.lines
            time.sleep(0.02)


def supervise(folder: Path, behaviours: Sequence[dict[str, Any]], *options: str,
              train: Sequence[str] = ()) -> Supervised:
    """Start one, on the run folder ``folder``/run."""
    _import_all()
    (folder / "behaviours").write_text(json.dumps(behaviours))
    run, said = folder / "run", folder / "said"
    arguments = ["launch", "-np", "2", "--backoff", "0.01", *options, "--", "train",
                 "--data.dataset", "synthetic", "--data.num_examples", "256", "--data.image_size",
                 "8", "--model", "mlp", "--run_dir", str(run), *train]
    process = multiprocessing.get_context("fork").Process(
        target=_supervisor, args=(arguments, folder, said))
    process.start()
    return Supervised(process, run, said)


@functools.cache
def _import_all() -> None:
    """Once, and not in each process: the check of settings imports for more than a second."""
    import hvdnoise.supervise.run  # noqa: F401
    from hvdnoise.training.config import TrainConfig
    from hvdnoise.training.validation import validate
    validate(TrainConfig(model="mlp"), 1)


def _supervisor(arguments: list[str], folder: Path, said: Path) -> None:
    from hvdnoise import cli
    from hvdnoise.supervise import scripts
    scripts.start = lambda options, mark, train, *, resumes=False: [
        sys.executable, "-I", "-S", __file__, str(folder), ALREADY, *train]
    with said.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", closefd=False)
    os._exit(cli.main(arguments))


def alive(folder: Path) -> list[str]:
    """The processes of attempts of this folder, and what they left."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if ALREADY.encode() in words and str(folder).encode() in words:
                found.append(f"{entry.name} {words}")
    return found


# ---------------------------------------------------------------------- in place of the scripts


def script(folder: Path, train: list[str]) -> int:
    """One attempt."""
    with (folder / "attempts").open("a") as file:
        file.write(json.dumps(train) + "\n")
    number = len((folder / "attempts").read_text().splitlines())
    behaviours = json.loads((folder / "behaviours").read_text())
    what = behaviours[min(number, len(behaviours)) - 1]
    run = Path(train[train.index("--run_dir") + 1])
    code = int(what.get("exit", 0))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    if what.get("settings", True):
        _replace(run / "config.yaml", "{}")
        (run / "summary.json").unlink(missing_ok=True)
    if "checkpoint" in what:
        (run / "checkpoints" / f"step-{what['checkpoint']:08d}").mkdir(parents=True, exist_ok=True)
    if "step" in what:
        _replace(run / "step", f"{what['step']}\n")
    if what.get("child"):
        stubborn = "trap '' TERM; sleep 60 & wait; wait"
        subprocess.Popen(["setsid", "bash", "-c", stubborn, str(folder), ALREADY])
    if "say" in what:
        print(what["say"], file=sys.stderr, flush=True)
    (folder / f"ready-{number}").touch()
    time.sleep(what.get("wait", 0))
    if what.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if code == 0 and what.get("finishes", True):
        (run / "summary.json").write_text("{}")
    return code


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(script(Path(sys.argv[1]), sys.argv[3:]))
