"""The limits of the watchdog: what the environment may say, and what is refused before a start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvdnoise import cli, limits
from hvdnoise.limits import Limits, from_environment

WRONG = ["abc", "nan", "-5", "inf", "1e400", "", "  "]


def test_each_phase_has_a_limit() -> None:
    assert from_environment({}) == Limits()
    given = from_environment({"HVDNOISE_TIMEOUT": "7", "HVDNOISE_TIMEOUT_START": "0",
                              "HVDNOISE_TIMEOUT_EVALUATION": "2.5", "OTHER": "abc"})
    assert given == Limits(step=7.0, start=0.0, evaluation=2.5)
    assert [given.of(phase) for phase in ("step", "start", "evaluation", "checkpoint", "finish", "")
            ] == [7.0, 0.0, 2.5, 3600.0, 7.0, 7.0]
    assert given.shortest == 2.5 and given.longest == float("inf")
    assert Limits(0, 0, 0, 0).shortest == 0
    assert limits.variable("evaluation") == "HVDNOISE_TIMEOUT_EVALUATION"
    assert limits.variable("finish") == limits.variable("step") == "HVDNOISE_TIMEOUT"


@pytest.mark.parametrize("text", WRONG)
@pytest.mark.parametrize("name", ["HVDNOISE_TIMEOUT", "HVDNOISE_TIMEOUT_CHECKPOINT"])
def test_a_wrong_limit_names_itself(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}={text!r} is no number of seconds.*unset it$"):
        from_environment({name: text})


def test_a_misspelt_variable_is_refused() -> None:
    with pytest.raises(ValueError, match="HVDNOISE_TIMEOUT_EVAL sets nothing.*_EVALUATION"):
        from_environment({"HVDNOISE_TIMEOUT_EVAL": "5"})


@pytest.mark.parametrize("command", [
    ["train"], ["bench"], ["doctor"], ["quadratic"], ["study", "no.yaml"]])
def test_every_command_that_starts_ranks_refuses_it(
        command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HVDNOISE_TIMEOUT", "nan")
    (tmp_path / "no.yaml").write_text("")
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hvdnoise: error: HVDNOISE_TIMEOUT='nan' is no number of seconds")
    assert [path.name for path in tmp_path.iterdir()] == ["no.yaml"]


def test_a_plain_library_user_gets_a_value_error() -> None:
    program = "import hvdnoise\ntry: hvdnoise.init()\nexcept ValueError as error: print(error)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                           env={**os.environ, "HVDNOISE_TIMEOUT": "-5"}, timeout=200)
    assert ended.stdout.startswith("HVDNOISE_TIMEOUT='-5' is no number"), ended


@pytest.mark.parametrize("given, expected", [
    (None, 3660), ("30", 3660), ("9999", 9999), ("nonsense", 3660)])
def test_gloo_waits_for_longer_than_the_longest(given: str | None, expected: int,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_GLOO_TIMEOUT_SECONDS", given or "")
    limits.raise_gloo_timeout(Limits())
    assert int(os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"]) == expected


def test_gloo_waits_for_years_where_a_limit_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_GLOO_TIMEOUT_SECONDS", "30")
    limits.raise_gloo_timeout(Limits(step=0))
    seconds = int(os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"])
    assert 10 ** 8 <= seconds < 2 ** 31  # which Horovod reads as an int
