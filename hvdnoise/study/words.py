"""What a study says on the terminal: its plan, and a line for each run that has ended."""

from __future__ import annotations

import shlex
from dataclasses import replace

from hvdnoise.study import launch, results, search
from hvdnoise.study.plan import Cell, Plan, Run
from hvdnoise.study.runs import State


def run_text(run: Run, state: State) -> str:
    """Which run, and its score."""
    kind = "final" if run.trial is None else f"trial {run.trial}"
    key = run.cell.score("test" if run.trial is None else "validation")
    found = state.of(run)
    score = found.summary.get(key)
    said = "diverged" if found.state == "diverged" else key.replace("_", " ") + (
        f" {score:.4f}" if isinstance(score, float) else " unknown")
    return f"{run.cell.method}, batch {run.cell.batch}, {kind}, seed {run.seed}: {said}"


def plan_text(plan: Plan, state: State, jobs: int) -> str:
    """What the study will do: runs, budgets, searches, commands, hours."""
    config = plan.config
    tuned, finals = len(plan.trials()), len(plan.cells) * len(config.final_seeds)
    lines = [f"{config.name}: {tuned + finals} runs ({tuned} trials, {finals} finals), {jobs} at a "
             f"time, in {config.folder}", _hours(plan, state, jobs),
             f"ranks {config.ranks}, tuning seeds {config.tuning_seeds}, seeds "
             f"{config.final_seeds}, baseline {config.baseline}", ""]
    for cell in plan.cells:
        lines += _cell(plan, cell)
    return "\n".join(lines)


def _cell(plan: Plan, cell: Cell) -> list[str]:
    trials = len(cell.points) if cell.tunes else 0
    about = f"{trials} trials x {len(plan.config.tuning_seeds)} seeds" if trials else \
        "nothing to choose: no trials"
    axes = [f"    {name}: {axis}" for name, axis in search.as_json(cell.axes).items()]
    run = next(iter([*plan.trials_of(cell), *plan.finals_of(cell, cell.points[0])]))
    folder = plan.config.folder / run.path
    config = plan.config if plan.config.launcher != "srun" else replace(plan.config, slurm="no")
    words = launch.command(config, [*run.flags(), f"--run_dir={folder}", "--resume=auto"], folder)
    return [f"{cell.label}, batch {cell.batch}: {about}, "
            f"{len(plan.config.final_seeds)} finals", *axes, f"    {shlex.join(words)}", ""]


def _hours(plan: Plan, state: State, jobs: int) -> str:
    """An estimate by what is given, or by the runs that are there."""
    chosen = [(cell, results.choose(plan, cell, state)) for cell in plan.cells]
    known = [*plan.trials(), *(run for cell, point in chosen if point is not None
                               for run in plan.finals_of(cell, point))]
    ended = [state.of(run).summary for run in known if state.of(run).ended]
    seconds, source = plan.config.seconds_per_run, "as given"
    if seconds is None:
        measured = [found["seconds"] for found in ended if found.get("seconds")]
        if not measured:
            return "time: not known; give --seconds_per_run, or start it and ask again"
        seconds, source = sum(measured) / len(measured), f"of steps alone, mean of {len(measured)}"
    left = plan.count() - len(ended)
    return (f"time: {left * seconds / jobs / 3600:.3g} hours for the {left} runs that are left, at "
            f"{seconds:.3g} s each ({source})")
