"""`hvdnoise doctor`: the line of versions, and the MPIs that must be one."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from hvdnoise import doctor, mpis
from hvdnoise.cli import main
from hvdnoise.training.records import code_digest

# What these programs and libraries say of themselves, in their first lines.
SAID = {
    "mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/\n":
        "Open MPI 4.1.4",
    "Open MPI v4.1.8, package: Open MPI user@localhost Distribution, ident: 4.1.8, repo rev: "
    "v4.1.8, Feb 04, 2025\n": "Open MPI 4.1.8",
    "HYDRA build details:\n    Version:                                 4.0.2\n"
    "    Release Date:                            Thu Apr  7 12:34:45 CDT 2022\n": "MPICH 4.0.2",
    "MPICH Version:\t4.0.2\nMPICH Release date:\tThu Apr  7 12:34:45 CDT 2022\n": "MPICH 4.0.2",
    "Segmentation fault\n": "unknown (Segmentation fault)",
    "": "unknown (says nothing)",
}


@pytest.mark.parametrize("said", SAID)
def test_an_mpi_is_known_by_what_it_says(said: str) -> None:
    assert mpis.named(said) == SAID[said]


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
    (mpi,) = set(mpis.parts(doctor._path()).values())
    assert found["mpi"] == mpi.replace(" ", "-") and mpi.startswith(("Open MPI 4", "MPICH"))


def test_what_is_missing_is_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "versions", lambda: {"torch": "not installed"})
    monkeypatch.setattr(mpis, "of_horovod", lambda: None)
    monkeypatch.setattr(mpis, "of_mpi4py", lambda: None)
    monkeypatch.setattr(doctor, "_path", lambda: "/nowhere")
    assert doctor.version_line() == "versions mpi=none torch=not-installed"


def first_on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """An mpirun that is no more than this."""
    (folder / "mpirun").write_text(f"#!/bin/sh\necho '{said}'\n")
    (folder / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_all_parts_have_one_mpi_here() -> None:
    """Horovod's library, mpi4py and mpirun, asked as they are."""
    found = mpis.parts(doctor._path())
    assert set(found) == {"Horovod", "mpi4py", "mpirun"} and mpis.mixture(found) is None
    ((verdict, text),) = doctor._mpi(found)
    assert verdict == doctor.OK and ", of Horovod, mpi4py, mpirun (/" in text


def test_a_mixture_is_refused_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                            ) -> None:
    here = mpis.of_horovod()
    first_on_the_path(tmp_path, monkeypatch, "HYDRA build details:\n    Version:    4.0.2")
    ((verdict, text),) = doctor._mpi(mpis.parts(doctor._users_path()))
    assert verdict == doctor.BROKEN and "\n" not in text
    assert f"Horovod has {here}, mpi4py has {here}, mpirun is of MPICH 4.0.2" in text
    assert "first on the PATH" in text and "launch/setup.sh --mpi system" in text
    assert " mpi-of-" not in doctor.version_line()  # this environment's own mpirun is used there
    monkeypatch.setattr(doctor, "_BIN", tmp_path)
    assert f"mpi-of-Horovod={str(here).replace(' ', '-')} " in doctor.version_line()
    assert "mpi-of-mpirun=MPICH-4.0.2 " in doctor.version_line()


def test_an_mpi_that_does_not_load_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                               ) -> None:
    """mpi4py with the name of a library that is none."""
    monkeypatch.setenv("MPI4PY_LIBMPI", str(tmp_path / "libmpi.so"))
    found = mpis.parts(doctor._path())
    assert found["mpi4py"].startswith("unknown (")
    assert "mpi4py has unknown (" in str(mpis.mixture(found))


@pytest.mark.parametrize("found", [
    {}, {"mpirun": "MPICH 4.0.2"}, {"Horovod": "Open MPI 4.1.4", "mpirun": "Open MPI 4.1.4"},
    {"Horovod": "MPICH 4.0.2"}])
def test_what_is_no_mixture(found: dict[str, str]) -> None:
    assert mpis.mixture(found) is None


def test_without_an_mpirun() -> None:
    ((verdict, text), *_) = doctor._mpi({"Horovod": "Open MPI 4.1.8"})
    assert verdict == doctor.NOTE and "no mpirun on the PATH" in text
