"""The documents: relative links lead somewhere, and paths named in backticks exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import api_docs

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "docs").glob("*/README.md"))]
MADE = {".venv", "build/api"}  # by the commands that name them


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    relative = [link for link in links if "://" not in link]
    assert [link for link in relative if not (page.parent / link).exists()] == []


def test_paths_in_contributing_exist() -> None:
    text = (ROOT / "docs" / "CONTRIBUTING.md").read_text()
    found = re.findall(r"^```\n(.*?)^```|`([^`\n]+)`", text, re.M | re.S)
    code = " ".join(block or inline for block, inline in found)
    paths = {word for word in re.findall(r"[\w.-]+(?:/[\w.-]+)+|[\w-]+\.(?:cfg|md|toml)", code)
             if not word.startswith(".venv") and word not in MADE and "index.html" not in word}
    assert len(paths) > 15
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_tests_in_reliability_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`((?:unit|parallel|integration)/\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 30
    for path, name in named:
        source = ROOT / "tests" / path
        assert source.is_file(), path
        assert not name or f"def {name}(" in source.read_text(), f"{path}::{name}"


def test_a_reference_that_names_nothing_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import hvdnoise
    from hvdnoise import plans

    monkeypatch.setattr(plans, "__doc__", "See `Shape`, `Shape.numbers` and `choose`.")
    assert api_docs.broken_references("hvdnoise.plans", [hvdnoise]) == []
    monkeypatch.setattr(plans, "__doc__", "See `Shape` and `Shapely.numbers`.")
    (fault,) = api_docs.broken_references("hvdnoise.plans", [hvdnoise])
    assert "Shapely.numbers" in fault
