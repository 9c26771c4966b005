"""Standard output whose reader has ended, that is closed or full: neither run nor command fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.quick import BARE_PACKAGE

STUDY = {"settings": {"data": {"dataset": "synthetic", "num_examples": 128, "image_size": 8},
                      "model": "mlp", "epochs": 1},
         "batches": [32], "virtual_workers": 2, "baseline": "plain", "seeds": [1, 2],
         "search": {"optim.lr": [0.05]}, "methods": {"plain": {}, "same": {}}}
TRAIN = ["train", "--data.dataset", "synthetic", "--data.num_examples", "64", "--data.image_size",
         "8", "--data.batch_size", "8", "--log_every", "1", "--epochs", "2", "--run_dir", "run"]


def shell(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``script`` of bash, in which $@ is hvdnoise with ``arguments``."""
    return subprocess.run(
        ["bash", "-uo", "pipefail", "-c", script, "bash", sys.executable, "-m", "hvdnoise",
         *arguments], cwd=cwd, capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("arguments", [
    ["study", "study.yaml", "--dry_run"], ["--help"]])
def test_a_command_whose_reader_ends(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**STUDY, "out": str(tmp_path / "out")}))
    ended = shell('"$@" | true', *arguments, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_run_goes_on_without_its_terminal(tmp_path: Path) -> None:
    ended = shell('"$@" | head -n 1', *TRAIN, cwd=tmp_path)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended
    assert ended.stdout.count("\n") == 1 and (tmp_path / "run" / "summary.json").exists()
    said = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert said.count("WARNING standard output is lost ([Errno 32] Broken pipe)") == 1
    assert "test accuracy" in said.splitlines()[-1]
    assert not list((tmp_path / "run" / "logs").glob("*.state"))


PRINT = BARE_PACKAGE + """
from hvdnoise.training import output
output.make_lasting()
for n in range(3):
    print("line", n, flush=True)
print("error", file=sys.stderr)
sys.exit(len(output.lost))
"""


@pytest.mark.parametrize("redirected, code, errors", [
    ("| true", 0, "error\n"), (">/dev/full", 1, "error\n"), (">&-", 0, "error\n"),
    ("2>&-", 0, ""), (">/dev/full 2>&1", 2, ""), (">/dev/null", 0, "error\n")])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_cannot_be_written(redirected: str, code: int, errors: str, unbuffered: str) -> None:
    ended = subprocess.run(
        ["bash", "-uo", "pipefail", "-c", f'"$@" {redirected}', "bash", sys.executable, "-c",
         PRINT], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert (ended.returncode, ended.stderr) == (code, errors), ended


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_can_be_written_is(unbuffered: str) -> None:
    ended = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True,
                           env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, timeout=60)
    assert ended.stdout == "line 0\nline 1\nline 2\n"
    assert (ended.returncode, ended.stderr) == (0, "error\n")
