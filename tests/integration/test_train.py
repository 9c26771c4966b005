"""Whole runs under the launchers, as a user starts them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.cluster import why_not
from tests.integration.running import HVDNOISE, TINY, finished, hvdnoise
from tests.launcher import run_command

PIECES = ("config.yaml", "environment.json", "metrics.jsonl", "summary.json", "weights.pt",
          "weights-best.pt", "checkpoints", "logs/rank-0.log")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize("ranks, launcher", [(2, "gloo"), (4, "mpirun")])
def test_the_same_file_trains_under_both_launchers(tmp_path: Path, settings: Path, ranks: int,
                                                   launcher: str) -> None:
    folder = tmp_path / "run"
    ended = hvdnoise(ranks, "train", "--config", str(settings), "--run_dir", str(folder),
                     "--tensorboard", "--data.batch_size", "4", launcher=launcher)
    summary = finished(ended, folder)
    assert summary["ranks"] == ranks and summary["workers"] == 2 * ranks
    assert summary["steps"] == 2 * (192 // (4 * 2 * ranks)) and summary["bad_steps"] == 0
    for piece in (*PIECES, f"logs/rank-{ranks - 1}.log"):
        assert (folder / piece).exists(), piece
    assert list((folder / "tensorboard").iterdir())
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["ranks"] == ranks and len(environment["hosts"]) == ranks
    assert environment["versions"]["horovod"] and environment["threads"] == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert {name for name in trained[-1] if name.startswith("noise_")} >= {
        "noise_radius", "noise_share", "noise_lr_multiple"}
    assert trained[-1]["noise_share"] > 0 and trained[-1]["noise_lr_multiple"] > 0
    assert trained[-1]["noise_rms"] == trained[-1]["noise_radius"] > 0
    assert trained[-1]["examples_per_second"] > 0
    assert f"test accuracy {summary['test_accuracy']:.4f}" in ended.output
    assert str(folder) in ended.output.splitlines()[-1] + ended.output.splitlines()[-2]


def test_the_same_run_twice_and_its_evaluation(tmp_path: Path, settings: Path) -> None:
    runs = []
    for name in ("one", "two"):
        folder = tmp_path / name
        runs.append(finished(hvdnoise(2, "train", "--config", str(settings), "--run_dir",
                                      str(folder), "--model", "resnet20", "--ema", "0.9",
                                      "--epochs", "1"), folder))
    assert runs[0]["weights_sha256"] == runs[1]["weights_sha256"]
    assert runs[0]["weights_ema_sha256"] == runs[1]["weights_ema_sha256"]
    for ranks, which, key in ((2, "final", "test_accuracy"), (1, "ema", "ema_test_accuracy")):
        ended = hvdnoise(ranks, "eval", str(tmp_path / "one"), "--checkpoint", which)
        assert ended.exit_code == 0, ended.report()
        found = re.search(r"test accuracy (\S+)  test loss (\S+)  on 48 examples", ended.output)
        assert found and float(found[1]) == pytest.approx(runs[0][key], abs=5e-5)
    newest = sorted((tmp_path / "one" / "checkpoints").iterdir())[-1]
    ended = hvdnoise(1, "eval", str(tmp_path / "one"), "--checkpoint", str(newest))
    assert f"test accuracy {runs[0]['test_accuracy']:.4f}" in ended.output


CRASH = """
import sys
from hvdnoise import cli, comm
from hvdnoise.training import steps
real = steps._count_bad
def count(job, *, bad):
    if job.world.rank == 1 and job.counters.step == 3:
        raise ZeroDivisionError("the trap")
    real(job, bad=bad)
steps._count_bad = count
sys.exit(cli.main())
"""


@pytest.mark.parametrize("launcher", ["gloo", "mpirun"])
def test_a_python_exception_on_one_rank_ends_all(tmp_path: Path, settings: Path, launcher: str
                                                 ) -> None:
    """Its traceback is shown once, with its rank; nobody hangs."""
    program, folder = tmp_path / "crash.py", tmp_path / "run"
    program.write_text(CRASH)
    ended = run_command(2, [sys.executable, str(program), "train", "--config", str(settings),
                            "--run_dir", str(folder)], launcher=launcher, timeout=90)
    assert ended.exit_code not in (0, None) and not ended.leftovers, ended.report()
    traced = re.findall(r"^(?:\[1\]<stderr>:)?ZeroDivisionError: the trap$", ended.output, re.M)
    assert len(traced) == 1, ended.report()
    assert "hvdnoise: rank 1 failed in step 3: ZeroDivisionError: the trap" in ended.output
    assert "ZeroDivisionError" in (folder / "logs" / "rank-1.log").read_text()


def test_the_doctor_says_what_works(tmp_path: Path) -> None:
    ended = hvdnoise(2, "doctor", cwd=tmp_path)
    assert ended.exit_code == 0 and not ended.leftovers, ended.report()
    assert "an allreduce over 2 ranks gave the right sum" in ended.output
    assert ended.output.count("Python ") == 1 and not list(tmp_path.iterdir())


NOWHERE = """
echo nowhere >/proc/sys/kernel/hostname
ip link set lo up
exec env --unset=HOROVOD_GLOO_IFACE "$@"
"""


@pytest.mark.namespaces
def test_a_host_that_does_not_know_its_own_name(tmp_path: Path) -> None:
    """As in a container without a network: one process alone, and two ranks by each launcher."""
    if reason := why_not():
        pytest.skip(reason)
    ended = run_command(1, ["unshare", "--uts", "--net", "bash", "-ec", NOWHERE, "bash", HVDNOISE,
                            "doctor"], launcher="none", cwd=tmp_path)
    assert ended.exit_code == 0 and not ended.leftovers, ended.report()
    for said in ("over 1 rank", "horovodrun --gloo -np 2", "mpirun --oversubscribe -np 2"):
        assert re.search(f"^ok .*{said}", ended.output, re.M), ended.report()
