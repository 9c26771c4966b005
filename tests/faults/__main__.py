"""`python -m tests.faults --seed S --count N [--jobs J] [--only KIND] [--folder F]`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.trial import KINDS, Campaign, Outcome, draw


def main() -> int:
    """Run the campaign; 1 where a trial was not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--only", choices=KINDS, help="trials of this kind alone")
    parser.add_argument("--folder", type=Path, help="keep what fails here")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="hvdnoise-faults-"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    campaign = Campaign(folder.absolute())
    trials, number = [], given.first
    while len(trials) < given.count:
        trial = draw(given.seed, number)
        number += 1
        if given.only in (None, trial.kind):
            trials.append(trial)
    with ThreadPoolExecutor(given.jobs) as pool:
        outcomes = list(map(_say, pool.map(campaign.run, trials)))
    wrong = [each for each in outcomes if each.faults]
    print(f"\n{len(outcomes)} trials, {len(wrong)} not as they must be; seed {given.seed}")
    print(table(outcomes))
    if wrong:
        print(f"their runs are in {folder}")
    return int(bool(wrong))


def _say(outcome: Outcome) -> Outcome:
    verdict = "ok" if not outcome.faults else "WRONG: " + "; ".join(outcome.faults)
    print(f"{outcome.trial}  {outcome.seconds:.0f} s  {verdict}", flush=True)
    if outcome.faults:
        print("    | " + "\n    | ".join(outcome.output.strip().splitlines()[-40:]), flush=True)
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """Trials and faults of each kind, as Markdown."""
    count = Counter(each.trial.kind for each in outcomes)
    wrong = Counter(each.trial.kind for each in outcomes if each.faults)
    lines = ["| kind of fault | trials | not as it must be |", "| --- | ---: | ---: |"]
    lines += [f"| {kind} | {count[kind]} | {wrong[kind]} |" for kind in KINDS if count[kind]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
