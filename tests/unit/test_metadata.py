"""What setup.cfg claims: bounds that tests have run with, and extras that the commands name."""

from __future__ import annotations

import configparser
import re

import pytest

from hvdnoise import extras
from hvdnoise.training.errors import ConfigError
from tests.launcher import ROOT

NO_BOUND = "test"  # the extra of which no version is claimed


def sections() -> dict[str, list[str]]:
    """The requirements of setup.cfg: "" are those of the library, others of an extra."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    given = {"": parser["options"]["install_requires"], **parser["options.extras_require"]}
    return {extra: [line for line in text.splitlines() if line and not line.startswith("#")]
            for extra, text in given.items()}


def bounds() -> dict[str, str]:
    """The least version of each package, as it is written."""
    found = {}
    for extra, lines in sections().items():
        for line in lines:
            if extra == NO_BOUND or line == "hvdnoise[trainer]":
                continue
            match = re.fullmatch(r"([\w-]+(?:\[\w+\])?) >=([\d.]+)", line)
            assert match, f"{line!r} of {extra!r} names no least version, or more than that"
            found[match[1]] = match[2]
    return found


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+(?:\[\w+\])?)==([\w.]+)", (ROOT / "launch" / name).read_text(),
                           re.MULTILINE))


def test_the_least_versions_are_those_that_tests_have_run_with() -> None:
    claimed, oldest = bounds(), pins("oldest.lock")
    assert claimed.pop("mpi4py") == pins("requirements.lock")["mpi4py"]  # no older one was tried
    assert claimed == oldest
    text = (ROOT / "launch" / "oldest.lock").read_text()
    python = re.search(r"under Python ([\d.]+\d)", text)
    assert python and f"python_requires = >={python[1]}\n" in (ROOT / "setup.cfg").read_text()


def test_the_library_alone_needs_torch_and_numpy() -> None:
    assert [line.split()[0] for line in sections()[""]] == ["numpy", "torch"]


def test_the_commands_name_the_extras_of_the_metadata() -> None:
    listed = {extra: {re.split(r"[ \[]", line)[0] for line in lines}
              for extra, lines in sections().items()}
    for module, (package, extra) in extras.PACKAGES.items():
        assert package in listed[extra], f"{module}: {package} is not in the extra {extra}"
    named = {package for package, _ in extras.PACKAGES.values()}
    assert named == set().union(
        *(packages for extra, packages in listed.items() if extra != NO_BOUND and extra)
    ) - {"hvdnoise"}


def test_what_is_missing_is_one_line_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("nowhere_1", "nowhere_2", "nowhere_3"):
        monkeypatch.setitem(extras.PACKAGES, module, (module, "trainer"))
    extras.require("hvdnoise x", "jinja2", "scipy")
    with pytest.raises(ConfigError) as raised:
        extras.require("hvdnoise x", "scipy", "nowhere_1")
    assert str(raised.value) == ("hvdnoise x needs nowhere_1, which is not installed: "
                                 "pip install 'hvdnoise[trainer]'")
    monkeypatch.setitem(extras.PACKAGES, "nowhere_3", ("nowhere_3", "report"))
    with pytest.raises(ConfigError) as raised:
        extras.require("hvdnoise x", "nowhere_1", "nowhere_2", "nowhere_3")
    assert str(raised.value) == ("hvdnoise x needs nowhere_1, nowhere_2 and nowhere_3, which are "
                                 "not installed: pip install 'hvdnoise[trainer,report]'")


def test_versions_compare_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.10.0+cu130", "numpy": "1.9", "tqdm": "4.66.2"}
    monkeypatch.setattr(extras, "requires", lambda _: [
        "torch>=2.6.0", "numpy>=1.26.4", "tqdm>=4.66.2; extra == 'trainer'",
        "hvdnoise[trainer]; extra == 'report'"])
    monkeypatch.setattr(extras, "version", versions.__getitem__)
    assert extras.too_old() == [("numpy", "1.9", "1.26.4")]
