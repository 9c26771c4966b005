"""`hvdnoise bench` under the launchers. Nothing is asserted about times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hvdnoise.bench.variants import CHOICES, SETS
from tests.integration.running import error_lines, hvdnoise
from tests.launcher import Ended, run_command

QUICK = ["--rounds", "2", "--steps", "2", "--warmup", "0"]


def finished(ended: Ended, folder: Path) -> dict[str, Any]:
    """The record of a benchmark that ended well, with everything that each one must hold."""
    assert ended.exit_code == 0 and not ended.leftovers, ended.report()
    record: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "figure.png",
                                                              "table.md"]
    for each in record["variants"]:
        assert each["replicas_equal"] and each["distance_moved"] > 0, each
        assert len(each["seconds"]) == len(each["interface_bytes"]) == 2
        assert f"| {each['name']} " in ended.output
    return record


def by_name(record: dict[str, Any], what: str = "variants") -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in record[what]}


def test_gloo_bytes_memory_and_weights(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    names = ["plain", "none", "ddp", "sam", "gnc-own", "gathered:allgather",
             "gathered:transpose:lag2"]
    ended = hvdnoise(2, "bench", "--model", "comm:4M", "--compute_ms", "4", *QUICK, "--variants",
                     ",".join(names), "--out", str(folder))
    record = finished(ended, folder)
    own, rows, P = by_name(record), by_name(record, "results"), record["parameters"]
    assert P == 4_000_000 and record["ranks"] == 2 and len(record["hosts"]) == 2
    # what the kernel counted is what the algorithms need (others may use the loopback meanwhile)
    assert own["plain"]["predicted_bytes"] == 2 * (2 - 1) / 2 * 4 * P
    for name in names:
        least = min(own[name]["interface_bytes"])
        assert least == pytest.approx(own[name]["predicted_bytes"], rel=0.05), name
    assert own["gathered:allgather"]["predicted_bytes"] == pytest.approx(
        2 * own["plain"]["predicted_bytes"], rel=1e-3)  # and the statistics
    # the same steps from the same weights
    for name in ("none", "ddp"):
        assert own[name]["distance_from_plain"] < 1e-5 * own["plain"]["distance_moved"], name
    # weights, gradients and momentum; GNC holds a row of deviations and the displaced weights
    if rows["plain"]["memory"] is not None:
        assert 3 * 4 * P < rows["plain"]["memory"] < 6 * 4 * P
        assert 1.5 < rows["gnc-own"]["memory_beside_plain_4P"] < 3
    assert "2 ranks on 1 host, horovodrun (Gloo)" in ended.output


EACH_PLAN = [f"gathered:{plan}" for plan in CHOICES if plan != "auto"]


@pytest.mark.parametrize("ranks, launcher, names", [
    (2, "mpirun", list(SETS["all"])), (4, "gloo", ["plain", *EACH_PLAN])])
def test_every_variant_trains_a_network(tmp_path: Path, ranks: int, launcher: str,
                                        names: list[str]) -> None:
    ended = hvdnoise(ranks, "bench", "--model", "small-cnn", "--image_size", "8", "--batch_size",
                     "4", *QUICK, "--memory", "false", "--variants", ",".join(names),
                     "--out", str(tmp_path), launcher=launcher, timeout=300)
    record = finished(ended, tmp_path)
    own = by_name(record)
    assert set(own) == set(names)
    moved = own["plain"]["distance_moved"]
    for name, each in own.items():
        assert each["memory"] == [None] * ranks
        if name in ("plain", "none", "ddp"):
            assert each["distance_from_plain"] < 1e-4 * moved, name
        else:  # noise, or another gradient, was at work
            assert each["distance_from_plain"] > 1e-3 * moved, name
    for plan in ("allgather", "gather-only", "transpose", "group"):
        assert own[f"gathered:{plan}"]["plan"] == plan


def test_shared_memory_shows_no_bytes_and_says_so(tmp_path: Path) -> None:
    ended = hvdnoise(2, "bench", "--model", "comm:4M", *QUICK, "--memory", "false", "--variants",
                     "none,full-examples", "--out", str(tmp_path), launcher="mpirun")
    record = finished(ended, tmp_path)
    assert [row["bytes"] for row in record["results"]] == [None] * 3
    assert "does not see the exchange" in ended.output
    assert "mpirun (MPI)" in ended.output


def test_one_rank_without_a_launcher_and_a_folder_in_use(tmp_path: Path) -> None:
    flags = ["bench", "--model", "comm:100k", *QUICK, "--out", str(tmp_path)]
    record = finished(hvdnoise(1, *flags), tmp_path)
    assert list(by_name(record)) == ["plain", "none", "ddp", "sam"]
    assert [row["bytes"] for row in record["results"]] == [None] * 4  # nothing to receive
    before = (tmp_path / "bench.json").read_bytes()
    ended = hvdnoise(1, *flags)
    assert ended.exit_code == 2 and "holds a benchmark already" in error_lines(ended.output)[0]
    assert (tmp_path / "bench.json").read_bytes() == before
    ended = hvdnoise(1, *flags, "--overwrite", "--variants", "none")
    assert list(by_name(finished(ended, tmp_path))) == ["plain", "none"]


@pytest.mark.parametrize("flags, says", [
    (["--variants", "gatherd"], "did you mean gathered"),
    (["--rounds", "0"], "rounds=0 is wrong"),
    (["--model", "resnet19"], "model 'resnet19' is unknown"),
    (["--rouns", "3"], "did you mean rounds"),
    (["--variants", "gnc-own"], "needs 2 ranks"),
])
def test_bad_input_is_one_line(tmp_path: Path, flags: list[str], says: str) -> None:
    ended = hvdnoise(1, "bench", "--model", "comm:10k", "--out", str(tmp_path / "out"), *flags)
    assert ended.exit_code == 2 and not ended.leftovers, ended.report()
    (line,) = error_lines(ended.output)
    assert says in line and not (tmp_path / "out").exists()


def test_bad_input_and_a_folder_that_cannot_be_made_on_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for flags, says in ((["--variants", "gathered:x"], "'x' is not an option of gathered"),
                        (["--out", str(tmp_path / "file" / "out")], "cannot be made")):
        ended = hvdnoise(2, "bench", "--model", "comm:10k", *flags)
        assert ended.exit_code != 0 and not ended.leftovers, ended.report()
        (line,) = error_lines(ended.output)
        assert says in line and "Traceback" not in line


CRASH = """
import sys
from hvdnoise import cli
from hvdnoise.bench import phases
real, turns = phases._turn, []
def turn(variant, config, problem, world, *others):
    turns.append(variant)
    if world.rank == 1 and len(turns) == 3:
        raise ZeroDivisionError("the trap")
    return real(variant, config, problem, world, *others)
phases._turn = turn
sys.exit(cli.main())
"""


def test_a_rank_that_raises_ends_the_benchmark(tmp_path: Path) -> None:
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    ended = run_command(2, [sys.executable, str(script), "bench", "--model", "comm:10k", *QUICK,
                            "--memory", "false", "--variants", "none,ddp", "--out",
                            str(tmp_path / "out")], timeout=90)
    assert ended.exit_code not in (0, None) and not ended.leftovers, ended.report()
    assert "rank 1 failed" in ended.output and "the trap" in ended.output
    assert not list((tmp_path / "out").iterdir())
