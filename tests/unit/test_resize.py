"""What a rank takes over where the same workers live on other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hvdnoise.training import resize
from hvdnoise.training.config import CheckpointConfig, ConfigError, TrainConfig
from hvdnoise.training.validation import validate

State = dict[str, Any]


def own(rank: int, virtual: int, **kept: float) -> State:
    """Of one rank; the row of worker w is (w, w), its statistic of normalisation the rank."""
    rows = torch.arange(rank * virtual, (rank + 1) * virtual).float()[:, None].expand(-1, 2)
    seen = {"workers": 6, "names": [["w"]], "sizes": [[2]], "rows": {0: rows.clone()},
            "statistics": {0: torch.ones(3)}}
    return {"generators": rank, "buffers": {"mean": torch.full((2,), float(rank)),
                                            "count": torch.tensor(rank)}, "ema_buffers": {},
            "noise": {"steps": 9, "noise": "GNC", "seen": [seen, seen],
                      "kept": {"values": {"m": torch.tensor(kept.get("m", 0.0))}}}}


@pytest.mark.parametrize("before, now", [(1, 2), (2, 3), (3, 2), (6, 1), (2, 1), (1, 6)])
def test_rows_go_with_their_workers(before: int, now: int) -> None:
    for rank in range(6 // now):
        found = resize.regrouped(lambda old: own(old, before), before=before, now=now, rank=rank)
        workers = list(range(rank * now, (rank + 1) * now))
        for seen in found["noise"]["seen"]:
            assert seen["rows"][0][:, 0].tolist() == workers
            assert torch.equal(seen["statistics"][0], torch.ones(3))
        olds = [worker // before for worker in workers]
        torch.testing.assert_close(found["buffers"]["mean"],
                                   torch.full((2,), sum(olds) / now))
        assert found["buffers"]["count"] == olds[0] and found["generators"] == olds[0]
        assert found["noise"]["steps"] == 9


def test_what_differs_between_ranks_cannot_be_moved() -> None:
    found = resize.regrouped(lambda old: own(old, 1, m=float(old)), before=1, now=2, rank=0)
    assert found["noise"] is None
    without = resize.regrouped(lambda old: {**own(old, 1), "noise": None}, before=1, now=2, rank=0)
    assert without["noise"] is None


def checkpoint(run: Path, ranks: int, virtual: int, asked: int | None = None, step: int = 5
               ) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    shared = {"config": {"virtual_workers": virtual}}
    torch.save({**shared, resize.ASKED: asked} if asked else shared, folder / "shared.pt")
    facts = f'{{"bytes": 1, "sha256": "{"0" * 64}"}}'
    files = ", ".join(f'"{name}": {facts}' for name in (
        "shared.pt", *(f"rank-{rank}.pt" for rank in range(ranks))))
    (folder / "manifest.json").write_text(
        f'{{"format": 1, "step": {step}, "ranks": {ranks}, "files": {{{files}}}}}')


@pytest.mark.parametrize("ranks, virtual, asked, given, size, adjusted", [
    (2, 1, None, 1, 1, 2), (1, 2, 1, 1, 2, 1), (1, 2, 1, 1, 1, 2), (4, 3, None, 3, 6, 2),
    (2, 1, None, 1, 3, 1),   # 3 ranks do not divide 2
    (2, 1, None, 4, 1, 4),   # other workers are wished for
    (2, 1, None, 1, 2, 1)])  # the same ranks
def test_virtual_workers_are_adjusted(tmp_path: Path, ranks: int, virtual: int, asked: int | None,
                                      given: int, size: int, adjusted: int) -> None:
    checkpoint(tmp_path, ranks, virtual, asked)
    (tmp_path / "checkpoints" / "step-00000009").mkdir()  # broken
    for resume in ("auto", str(tmp_path), f"{tmp_path}/checkpoints/step-00000005"):
        config = TrainConfig(virtual_workers=given, run_dir=str(tmp_path), resume=resume,
                             resume_resize=True)
        assert resize.keep_workers(config, size).virtual_workers == adjusted
    config = TrainConfig(virtual_workers=given, run_dir=str(tmp_path), resume="auto")
    assert resize.keep_workers(config, size) is config


def test_a_run_that_was_killed_before_it_was_one_can_be_gone_on_with(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml.part").touch()
    (run / "lock-1.json").touch()
    config = TrainConfig(run_dir=str(run), resume="auto", checkpoint=CheckpointConfig())
    validate(config, 1)
    (run / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds no run"):
        validate(config, 1)
