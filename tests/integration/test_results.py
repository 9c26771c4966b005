"""The tables of docs/results: every study can be run, and a small one of each form is."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hvdnoise.study.config import parse_study
from hvdnoise.study.plan import make
from tests.integration.running import hvdnoise
from tests.launcher import run_command

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
STUDIES = sorted(RESULTS.glob("*.yaml"))
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_can_be_run(path: Path, tmp_path: Path) -> None:
    plan = make(parse_study([str(path), "--out", str(tmp_path / "out"), "--trials",
                             "2"]))  # checks every run
    tuned = [cell for cell in plan.cells if cell.tunes]
    assert len(tuned) == len(plan.cells)
    assert len(plan.config.final_seeds) >= (3 if path.stem == "resnet20" else 5)
    assert not {*plan.config.final_seeds} & {*plan.config.tuning_seeds}
    for cell in plan.cells:  # as many gradients for all but SAM
        passes = cell.complete["epochs"] * cell.complete["data.repeat"]
        assert passes == plan.cells[0].complete["epochs"], cell.method


def miniature(path: Path, out: Path) -> Path:
    """The study with two methods, nothing to choose, one seed and next to no data."""
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    names = ("plain", "echo-gnc")
    values.update(methods={name: values["methods"][name] for name in names}, seeds=[1], trials=1,
                  ranks=1, virtual_workers=values["ranks"] * values["virtual_workers"],
                  batches=[32], out=str(out))
    data = values["settings"]["data"]
    if data["dataset"] == "fashion-mnist":
        data.update(limit=64, validation=64)
    else:  # images of CIFAR's format
        data.update(dataset="synthetic", num_examples=64, image_size=32, validation=32,
                    num_classes=10, loader_workers=0)
    values["settings"].update(epochs=2, precision="fp32", lr={})
    values["methods"]["echo-gnc"]["settings"]["epochs"] = 1
    small = out.with_suffix(".yaml")
    small.write_text(yaml.safe_dump(values, sort_keys=False))
    return small


@pytest.mark.parametrize("name", ["mlp-noisy", "cifar10-resnet18"])
def test_a_small_study_of_each_form(name: str, tmp_path: Path) -> None:
    out = tmp_path / "study"
    ended = hvdnoise(1, "study", str(miniature(RESULTS / f"{name}.yaml", out)), timeout=240)
    assert ended.exit_code == 0 and not ended.leftovers, ended.report()
    found = json.loads((out / "results.json").read_text())
    assert found["state"] == "complete" and found["runs"]["finished"] == 2
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [row["method"] for row in rows] == ["plain", "echo-gnc"]
    ended = hvdnoise(1, "report", str(out), timeout=120)
    assert ended.exit_code == 0, ended.report()
    assert (out / "report" / "figures" / "cost.svg").stat().st_size > 2000


def test_a_small_table_of_the_lag(tmp_path: Path) -> None:
    ended = run_command(1, [
        sys.executable, str(RESULTS / "lag.py"), "--out", str(tmp_path), "--networks", "mlp",
        "--images", "128", "--batch", "32", "--workers", "4", "--epochs", "1", "--points", "2",
        "--eigenvalues", "2", "--seeds", "1", "2"], launcher="none", timeout=120)
    assert ended.exit_code == 0, ended.report()
    rows = list(csv.DictReader((tmp_path / "lag.csv").open()))
    assert [(row["network"], row["seed"], row["step"]) for row in rows] == [
        ("mlp", seed, step) for seed in "12" for step in "13"]
    for row in rows:  # the same batch after one step is much nearer than another batch
        assert abs(float(row["cos_stale_fresh"])) < float(row["cos_stale_moved"]) <= 1.0001
        assert 0.5 < float(row["pull_fresh_plus"]) < 2
    assert (tmp_path / "lag.md").read_text().count("\n") == 2 + 2 + 1 + 2 + 3
