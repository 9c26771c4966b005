"""A study in its order: check, lock, trials, choice, finals, table."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Sequence

from hvdnoise import comm
from hvdnoise.study import launch, results, words
from hvdnoise.study.config import OF_A_COMMAND, PROGRAM, StudyConfig, check, parse_study
from hvdnoise.study.launch import Started
from hvdnoise.study.lock import only_one
from hvdnoise.study.plan import Plan, Run, check_same, make
from hvdnoise.study.runs import State, last_words, make_ready
from hvdnoise.training import yamlfile
from hvdnoise.training.config import ConfigError, nested
from hvdnoise.training.options import from_file
from hvdnoise.training.preemption import EXIT_PREEMPTED
from hvdnoise.training.process import EXIT_FAILED, EXIT_INTERRUPTED
from hvdnoise.training.progress import Progress, log, start_terminal
from hvdnoise.training.records import environment, versions, write_text
from hvdnoise.training.validation import require

FILE = "study.yaml"


def run(arguments: Sequence[str]) -> int:
    """`hvdnoise study`; the exit code.

    Raises:
        ConfigError: for anything that is wrong; nothing was started.
    """
    config = parse_study(arguments)
    plan = make(config)
    folder = config.folder
    _check_folder(folder)
    if (folder / FILE).is_file():
        check_same(_earlier(folder), plan)
    gpus = launch.visible_gpus(plan.cells[0].complete["device"])
    places = launch.places(replace(config, slurm="no", launcher="auto")
                           if config.dry_run and config.launcher == "srun" else config, gpus)
    if config.dry_run:
        print(words.plan_text(plan, State(folder, "all"), len(places)))
        return 0
    start_terminal(0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={folder} cannot be made ({error.strerror}): give another one"
                          ) from error
    with only_one(folder) as lock:
        _describe(config)
        return Study(plan, places, lock).run()


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and not (folder / FILE).is_file():
        there = [path.name for path in folder.iterdir() if not path.name.startswith(".lock")]
        require(not there, "out", folder, f"it holds {there[0] if there else ''} and no study; "
                "give another one")


def _earlier(folder: Path) -> Plan:
    """The plan of the command that ran here before."""
    try:
        config = from_file(StudyConfig, folder / FILE, program=PROGRAM)
        check(config)
        return make(replace(config, dry_run=True), trust=False)  # the folder is data
    except ConfigError as error:
        raise ConfigError(f"{folder / FILE} cannot be read ({error}): restore it, or give another "
                          "out") from error


def _describe(config: StudyConfig) -> None:
    """Write study.yaml and environment.json."""
    folder = config.folder
    values = {key: value for key, value in nested(config).items() if key not in OF_A_COMMAND}
    write_text(folder / FILE, yamlfile.dump(values))
    path = folder / "environment.json"
    if not path.is_file():
        facts = environment([socket.gethostname()], comm.environment())
        write_text(path, json.dumps(facts, indent=1))
        return
    before, now = json.loads(path.read_text())["versions"], versions()
    other = [f"{key} {before.get(key)}, now {now.get(key)}" for key in {**before, **now}
             if before.get(key) != now.get(key)]
    if other:
        log.warning("the study was begun with other versions (%s): its runs may differ for that "
                    "reason", ", ".join(other))


class Study:
    """A study at work.

    Args:
        plan: of all runs.
        places: for each run at the same time its GPUs.
        lock: the descriptor that the guards of the runs hold.
    """

    def __init__(self, plan: Plan, places: list[list[str]], lock: int) -> None:
        self.plan, self.config = plan, plan.config
        self.folder = plan.config.folder
        self.state = State(self.folder, plan.config.keep)
        self._places, self._lock = places, lock
        self._active: dict[int, tuple[Run, Started]] = {}  # by place
        self._signals: list[int] = []

    def run(self) -> int:
        """All of it; the exit code."""
        before = {number: signal.signal(number, self._on_signal)
                  for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = self._run()
        finally:  # also after an error: no run goes on without the study
            for _, started in self._active.values():
                started.end()
            for number, handler in before.items():
                signal.signal(number, handler)
        return code

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)

    def _run(self) -> int:
        trials = self.plan.trials()
        finals = self._finals()
        done = sum(self.state.of(run).ended for run in (*trials, *finals))
        total = self.plan.count()
        log.info("%s: %d runs, %d at a time, %d of them done, in %s", self.config.name, total,
                 len(self._places), done, self.folder)
        self.progress = Progress(self.config.progress, rank=0, total=total, done=done, unit="run")
        try:
            for runs in (lambda: trials, self._finals):
                self._all(runs())
                if self._signals:
                    return self._stop()
        finally:
            self.progress.close()
        return self._end()

    def _finals(self) -> list[Run]:
        """The finals of the cells that have chosen, paired: one seed after the other."""
        chosen = [(cell, results.choose(self.plan, cell, self.state)) for cell in self.plan.cells]
        runs = [run for cell, point in chosen if point is not None
                for run in self.plan.finals_of(cell, point)]
        return sorted(runs, key=lambda run: self.config.final_seeds.index(run.seed))

    def _all(self, runs: list[Run]) -> None:
        """Do what is not done; what fails is tried once more after all others."""
        left = self._each([run for run in runs if not self.state.of(run).ended])
        for run in left:
            log.warning("%s failed: %s; it is tried once more", run.path, self._why(run))
        for run in self._each(left):
            self.state.failed.add(run.path)
            log.warning("%s failed: %s", run.path, self._why(run))
        self._write(complete=False)

    def _each(self, runs: list[Run]) -> list[Run]:
        """Run them, several at a time, until a signal; those that failed."""
        waiting, failed = deque(runs), list[Run]()
        while (waiting or self._active) and not self._signals:
            for place in range(len(self._places)):
                if place not in self._active and waiting:
                    self._active[place] = self._start(waiting.popleft(), place)
            time.sleep(launch.POLL_SECONDS)
            for place, (run, started) in list(self._active.items()):
                if started.process.poll() is not None:
                    del self._active[place]
                    started.end()
                    failed += [] if self._ended(run) or self._signals else [run]
        return failed

    def _start(self, run: Run, place: int) -> tuple[Run, Started]:
        folder = self.folder / run.path
        found = self.state.look(run)
        if found.state == "other":
            log.warning("%s was made with other settings, before the choice changed: it is made "
                        "again", run.path)
        line = launch.command(self.config, [
            *run.flags(), f"--run_dir={folder}", *make_ready(folder, run, found)], folder)
        env = launch.environment(self.config, self._places[place])
        return run, launch.start(line, run_folder=folder, log=self._log(run), env=env,
                                 lock=self._lock)

    def _log(self, run: Run) -> Path:
        return self.folder / "logs" / f"{run.path.removeprefix('runs/')}.log"

    def _why(self, run: Run) -> str:
        return last_words(self._log(run))

    def _ended(self, run: Run) -> bool:
        found = self.state.look(run)
        if found.ended:
            self.progress.step()
            self.progress.show(words.run_text(run, self.state))
            self._write(complete=False)
        return found.ended

    def _write(self, *, complete: bool) -> dict[str, Any]:
        found = results.collect(self.plan, self.state, complete=complete)
        results.write(self.folder, found)
        return found

    def _stop(self) -> int:
        """After a signal: the runs save and end, and the user hears how to go on."""
        number, since, known = self._signals[0], time.monotonic(), len(self._signals)
        running = [started for _, started in self._active.values()]
        log.warning("%s: %d runs save and end; once more ends them at once",
                    signal.Signals(number).name, len(running))
        for started in running:
            started.ask()
        # what comes within a second is the same wish, delivered twice
        launch.wait_all(running, lambda: len(self._signals) > known
                        and time.monotonic() - since > 1)
        for run, _ in self._active.values():
            self.state.look(run)
        self._active.clear()
        self._write(complete=False)
        log.warning("go on with the same command; what is done stays, in %s", self.folder)
        return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED

    def _end(self) -> int:
        found = self._write(complete=True)
        text = results.text(found, self.config.level)
        write_text(self.folder / "table.md", text + "\n")
        write_text(self.folder / "table.csv", results.as_csv(found))
        failed = [f"{path}: {last_words(self.folder / 'logs' / f'{path[5:]}.log')}"
                  for path in sorted(self.state.failed)]
        print("\n".join(["", text, "", *(f"failed: {each}" for each in failed),
                         f"written to {self.folder}"]), flush=True)
        return EXIT_FAILED if failed else 0
