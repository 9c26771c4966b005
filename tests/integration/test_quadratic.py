"""`hvdnoise quadratic` under a launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hvdnoise.quadratic.cases import known
from tests.integration.running import error_lines, hvdnoise
from tests.launcher import run_command

QUICK = ["--replicas", "12", "--steps", "8", "--momentum", "0", "--false_alarm", "0.001"]


def test_two_ranks_agree_with_theory(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    names = "full-workers,isotropic-workers,full-examples,gnc-own"
    ended = hvdnoise(2, "quadratic", *QUICK, "--structures", names, "--regression", "false",
                     "--out", str(folder))
    assert ended.exit_code == 0 and not ended.leftovers, ended.report()
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "quadratic.json",
                                                              "table.md"]
    record = json.loads((folder / "quadratic.json").read_text())
    assert (record["ranks"], record["problem"]["workers"]) == (2, 8)
    for name in names.split(","):
        assert name in known() and ended.output.count(f"| {name} ") == 1  # rank 0 alone prints
    assert "gnc-own: 7 of 7 agree" in ended.output


def test_bad_input_on_two_ranks(tmp_path: Path) -> None:
    ended = hvdnoise(2, "quadratic", "--emulated_batch", "16", "--out", str(tmp_path / "out"))
    assert ended.exit_code not in (0, None) and not ended.leftovers, ended.report()
    (line,) = error_lines(ended.output)
    assert "emulated_batch=16 is wrong: give less than 16" in line
    assert not (tmp_path / "out").exists()


WRONG = """
import sys
from hvdnoise import cli
from hvdnoise.noise import COVARIANCES
isotropic = COVARIANCES["isotropic", "workers"]
missing = isotropic.missing_variance
isotropic.missing_variance = lambda *given: 2 * missing(*given)
sys.exit(cli.main())
"""


def test_a_wrong_factor_on_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    ended = run_command(2, [sys.executable, str(script), "quadratic", *QUICK, "--structures",
                            "none,isotropic-workers", "--regression", "false", "--out",
                            str(tmp_path / "out")], timeout=120)
    assert ended.exit_code not in (0, 2, None) and not ended.leftovers, ended.report()
    (line,) = error_lines(ended.output)
    assert "these do not agree with theory: isotropic-workers (" in line and "none" not in line
    assert (tmp_path / "out" / "quadratic.json").exists()  # what was found is kept
