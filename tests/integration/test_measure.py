"""`hvdnoise measure` as a user starts it, on a run that was trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hvdnoise import cli
from tests.integration.running import TINY, finished, hvdnoise
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
    return {str(path): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.parent.name != "measure"}


def test_any_number_of_ranks_finds_the_same(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    one, two = (measured(hvdnoise(ranks, "measure", str(run), *QUICK, *more), out)
                for ranks, more, out in ((1, [], run / "measure"),
                                         (2, ["--out", str(tmp_path / "two")], tmp_path / "two")))
    assert contents(run) == before
    summary = json.loads((run / "summary.json").read_text())
    assert (one["ranks"], two["ranks"]) == (1, 2)
    for record in (one, two):
        assert record["weights_sha256"] == summary["weights_sha256"]
        assert (record["examples"], record["test_examples"]) == (64, 48)
    for key in ("loss", "accuracy", "test_accuracy", "alignment", "line", "plane", "noise"):
        assert numbers([one[key]]) == pytest.approx(numbers([two[key]]), rel=1e-3, abs=1e-5), key
    for key in ("eigenvalues", "trace"):
        assert one["hessian"][key] == pytest.approx(two["hessian"][key], rel=2e-3), key
    assert one["test_accuracy"] == pytest.approx(summary["test_accuracy"], abs=1e-6)
    middle = one["line"]["loss"][2]
    assert middle == one["plane"]["loss"][1][1] == pytest.approx(one["loss"], rel=1e-6)


@pytest.mark.parametrize("flags, says", [
    ([], "holds a measurement already"), (["--out", "{run}/config.yaml"], "is not a folder"),
    (["--out", "x", "--workers", "33", "--examples", "32"], "workers=33 is wrong"),
    (["--out", "x", "--eigenvalues", "2.5"], "eigenvalues=2.5 is wrong: give a whole number"),
    (["--out", "x", "--checkpoint", "ema"], "checkpoint=ema: there is no"),
])
def test_a_mistake_is_one_line_and_makes_nothing(
        run: Path, tmp_path: Path, flags: list[str], says: str, capfd: Any,
        monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "measure").mkdir(exist_ok=True)
    (run / "measure" / "measure.json").touch()
    monkeypatch.chdir(tmp_path)
    before = sorted(run.rglob("*"))
    code = cli.main(["measure", str(run), *(flag.replace("{run}", str(run)) for flag in flags)])
    said = capfd.readouterr()
    assert code == 2 and said.out == "" and sorted(run.rglob("*")) == before
    assert says in said.err and len(said.err.splitlines()) == 1 and not list(tmp_path.iterdir())
