"""`hvdnoise measure` as a user starts it, on a run that was trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.running import TINY, error_lines, finished, hvdnoise
from tests.launcher import Ended

FILES = ["line.png", "measure.json", "noise.png", "plane.png"]
QUICK = ["--examples", "64", "--eigenvalues", "2", "--probes", "4", "--workers", "4", "--points",
         "5", "--plane", "3", "--levels", "[0.1, 0.3]", "--draws", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    (folder / "tiny.yaml").write_text(TINY)
    ended = hvdnoise(1, "train", "--config", str(folder / "tiny.yaml"), "--run_dir",
                     str(folder / "run"), "--epochs", "1")
    finished(ended, folder / "run")
    return folder / "run"


def measured(ended: Ended, folder: Path) -> dict[str, Any]:
    """The record of a measurement that ended well."""
    assert ended.exit_code == 0 and not ended.leftovers, ended.report()
    assert sorted(path.name for path in folder.iterdir()) == FILES
    record: dict[str, Any] = json.loads((folder / "measure.json").read_text())
    return record


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    return [each for part in value for each in numbers(part)] if isinstance(value, list) \
        else [value]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_any_number_of_ranks_finds_the_same(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    found = []
    for ranks, launcher in ((1, "none"), (2, "gloo")):
        out = tmp_path / f"{ranks}"
        ended = hvdnoise(ranks, "measure", str(run), *QUICK, "--out", str(out), launcher=launcher)
        record = measured(ended, out)
        assert record["ranks"] == ranks and record["examples"] == 64
        assert record["test_examples"] == 48 and "largest eigenvalues" in ended.output
        found.append(record)
    assert contents(run) == before
    summary = json.loads((run / "summary.json").read_text())
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"] == summary["weights_sha256"]
    for key in ("loss", "accuracy", "test_accuracy", "alignment", "line", "plane", "noise"):
        one, two = (numbers([record[key]]) for record in found)
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5), key
    one, two = (record["hessian"] for record in found)
    assert one["eigenvalues"] == pytest.approx(two["eigenvalues"], rel=2e-3)
    assert one["trace"] == pytest.approx(two["trace"], rel=2e-3)
    assert found[0]["test_accuracy"] == pytest.approx(summary["test_accuracy"], abs=1e-6)
    middle = found[0]["line"]["loss"][2]
    assert middle == found[0]["plane"]["loss"][1][1] == pytest.approx(found[0]["loss"], rel=1e-6)


def test_in_the_run_folder_and_what_is_refused(run: Path) -> None:
    """Nulls where nothing was asked for; an earlier measurement is safe; a mistake makes nothing."""
    least = ["--examples", "32", "--eigenvalues", "0", "--probes", "0", "--points", "3", "--plane",
             "3", "--levels", "[0.1]", "--draws", "1"]
    wrong = [(["--workers", "33", *least], "workers=33 is wrong"),
             (["--eigenvalues", "2.5"], "eigenvalues=2.5 is wrong: give a whole number"),
             (["--eigenvalues", "1000000"], "the model has"),
             (["--checkpoint", "ema"], "checkpoint=ema"),
             (["--out", str(run / "config.yaml")], "is not a folder"),
             (["--out", str(run / "config.yaml" / "x")], "cannot be made")]
    before = contents(run)
    for flags, says in wrong:
        ended = hvdnoise(1, "measure", str(run), *flags)
        assert ended.exit_code == 2 and not ended.leftovers, ended.report()
        (line,) = error_lines(ended.output)
        assert says in line and contents(run) == before and not (run / "measure").exists(), line
    flags = ["--workers", "1", *least]
    newest = sorted((run / "checkpoints").iterdir())[-1]
    record = measured(hvdnoise(1, "measure", str(run), *flags, "--checkpoint", str(newest)),
                      run / "measure")
    assert record["hessian"]["eigenvalues"] == [] and record["hessian"]["trace"] is None
    assert record["alignment"]["trace_hc"] is record["alignment"]["noise_curvature"] is None
    assert record["noise"][0]["accuracy_error"] is None
    ended = hvdnoise(1, "measure", str(run), *flags)
    assert ended.exit_code == 2 and "holds a measurement" in error_lines(ended.output)[0]
    measured(hvdnoise(1, "measure", str(run), *flags, "--overwrite"), run / "measure")


def test_weights_that_are_not_finite_are_refused(run: Path, tmp_path: Path) -> None:
    state = torch.load(run / "weights.pt", weights_only=True)
    next(iter(state.values())).fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    ended = hvdnoise(2, "measure", str(run), *QUICK, "--checkpoint", str(tmp_path / "nan.pt"),
                     "--out", str(tmp_path / "out"))
    assert ended.exit_code == 1 and not ended.leftovers, ended.report()  # horovodrun's code
    (line,) = error_lines(ended.output)
    assert "the loss of these weights is nan" in line and not (tmp_path / "out").exists()
