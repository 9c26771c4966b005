"""`hvdnoise doctor --versions`: one line, the same on every host of the same set-up."""

from __future__ import annotations

import platform
from importlib.metadata import version

import pytest

from hvdnoise import doctor
from hvdnoise.cli import main
from hvdnoise.training.records import code_digest


def test_versions_are_one_line_of_names_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--versions"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    word, *pairs = said.split()
    found = dict(pair.split("=") for pair in pairs)
    assert word == "versions" and list(found) == sorted(found)
    expected = {"python": platform.python_version(), "hvdnoise": code_digest(),
                **{name: version(name) for name in ("torch", "torchvision", "horovod", "numpy")}}
    assert {**found, **expected} == found
    mpi = doctor._mpi_version()
    assert found["mpi"] == ("none" if mpi is None else mpi.split()[-1])


def test_what_is_missing_is_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "versions", lambda: {"torch": "not installed"})
    monkeypatch.setattr(doctor, "_path", lambda: "/nowhere")
    assert doctor.version_line() == "versions mpi=none torch=not-installed"
