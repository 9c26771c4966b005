"""`hvdnoise study` with real runs, killed again and again: it ends with the same table."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable

import pytest
import yaml

from hvdnoise.study import results
from hvdnoise.study.config import parse_study
from hvdnoise.study.plan import make
from hvdnoise.study.runs import State
from tests.integration.running import hvdnoise
from tests.launcher import BIN, Ended, run_command

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

STUDY: dict[str, Any] = {
    "settings": {"data": {"dataset": "synthetic", "num_examples": 256, "image_size": 8},
                 "model": "mlp", "epochs": 4, "log_every": 1, "spectrum_every": 0,
                 "checkpoint": {"every_steps": 3}},
    "batches": [32], "virtual_workers": 2, "baseline": "plain", "seeds": [1, 2], "jobs": 2,
    "search": {"optim.lr": [0.05]},
    "methods": {"plain": {}, "again": {},
                "gnc-own": {"settings": {"noise": {"kind": "gnc", "source": "own",
                                                   "radius": 0.05}}}}}
# All runs of a study in one process, with the trainer's own command.
TRAIN_ALL = """
import json, sys
from hvdnoise import cli
for flags in json.load(open(sys.argv[1])):
    assert cli.main(["train", *flags]) == 0
"""


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes, "out": str(folder / "out")}))
    return path


def study(path: Path, kill_when: Callable[[], bool] | None = None) -> Ended:
    """The command; SIGKILL to its process alone once ``kill_when`` holds."""
    done = threading.Event()
    lock = path.parent / "out/.lock"
    old = lock.read_text() if lock.exists() else ""

    def watch() -> None:
        until = time.monotonic() + 100
        while not done.wait(0.02) and time.monotonic() < until:
            with contextlib.suppress(OSError, ValueError):
                if kill_when and lock.read_text() != old and kill_when():
                    os.kill(int(lock.read_text().split()[0]), signal.SIGKILL)
                    return
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        ended = hvdnoise(1, "study", str(path))
    finally:
        done.set()
        thread.join()
    assert not ended.leftovers, ended.report()  # five seconds after the study's end
    return ended


def steps(out: Path) -> dict[str, int]:
    """The last step that each run has logged."""
    return {str(path.parent.relative_to(out / "runs")): path.read_text().count('"kind": "train"')
            for path in out.glob("runs/*/*/*/metrics.jsonl")}


def ended_well(ended: Ended) -> None:
    assert ended.exit_code == 0, ended.report()


@pytest.mark.timeout(240)
def test_killed_three_times_it_ends_with_the_uninterrupted_table(tmp_path: Path) -> None:
    whole, killed = write(tmp_path / "whole"), write(tmp_path / "killed")
    plan = make(parse_study([str(whole)]))
    runs = [run for cell in plan.cells for run in plan.finals_of(cell, cell.points[0])]
    commands = tmp_path / "commands.json"
    commands.write_text(json.dumps([[*run.flags(), f"--run_dir={plan.config.folder / run.path}"]
                                    for run in runs]))
    ended_well(run_command(1, [str(BIN / "python"), "-c", TRAIN_ALL, str(commands)],
                           launcher="none"))
    found = results.collect(plan, State(plan.config.folder, "all"), complete=True)
    expected = {"table.md": results.text(found, 0.95) + "\n", "table.csv": results.as_csv(found)}

    out = tmp_path / "killed/out"
    for moment in (lambda: len(list(out.glob("logs/*/*/*"))) >= 1,  # a run starts
                   lambda: any(step >= 5 for step in steps(out).values()),  # after a checkpoint
                   lambda: len(list(out.glob("runs/*/*/*/summary.json"))) >= 3):
        assert study(killed, moment).exit_code == -signal.SIGKILL
        assert not (out / "table.md").exists()
    ended_well(study(killed))
    assert {name: (out / name).read_text() for name in expected} == expected
    assert any("resumed at step" in path.read_text() for path in out.glob("logs/*/*/*"))
    found = json.loads((out / "results.json").read_text())
    by_name = {each["method"]: each for each in found["methods"]}
    again, gnc = (by_name[name]["versus_baseline"] for name in ("again", "gnc-own"))
    assert (again["low"], again["high"], again["p_holm"]) == (0, 0, 1)
    assert gnc["error"] > 0 and by_name["plain"]["error"] > 0 and found["state"] == "complete"
    assert not list(out.glob("runs/*/*/*/checkpoints"))


@pytest.mark.timeout(240)
def test_two_ranks_end_with_a_killed_study_and_go_on(tmp_path: Path) -> None:
    options: Any = {"methods": {"plain": {}}, "seeds": [1], "ranks": 2, "virtual_workers": 1}
    settings = {**STUDY["settings"], "epochs": 12}
    path = write(tmp_path, settings=settings, **options)
    out = tmp_path / "out"
    ended = study(path, lambda: any(step >= 9 for step in steps(out).values()))
    assert ended.exit_code == -signal.SIGKILL
    ended_well(study(path))
    first = out / "runs/plain/b32/final-seed-1"
    said = (first / "logs/rank-0.log").read_text()
    starts = [int(each) for each in re.findall(r"resumed at step (\d+)", said)]
    assert len(re.findall("rank 0, process", said)) == 2 and starts and starts[0] >= 3
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if line["kind"] == "train"]
    assert logged == list(range(1, 97))  # no process of the first command wrote there too
    assert json.loads((first / "summary.json").read_text())["ranks"] == 2
