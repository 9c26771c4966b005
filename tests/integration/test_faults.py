"""Ten trials of the campaign of faults; `python -m tests.faults` has more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.trial import KINDS, Campaign, draw

SEED, COUNT = 12, 10


def test_trials_are_drawn_again_alike() -> None:
    drawn = [draw(SEED, number) for number in range(2 * len(KINDS))]
    assert drawn == [draw(SEED, number) for number in range(2 * len(KINDS))]
    assert {each.kind for each in drawn} == set(KINDS)
    assert drawn != [draw(SEED + 1, number) for number in range(2 * len(KINDS))]


@pytest.mark.parallel
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_must_hold_holds(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    outcomes = []
    for number in range(0, 2 * COUNT, 2):  # every second kind: both halves of the list have a share
        trial = draw(SEED, number)
        # of one noise and size, so that few undisturbed runs serve all
        outcomes.append(campaign.run(replace(trial, ranks=2, rank=trial.rank % 2, noise="own")))
    wrong = [f"{each.trial}: {'; '.join(each.faults)}\n{each.output[-3000:]}"
             for each in outcomes if each.faults]
    assert not wrong, "\n\n".join(wrong)
