"""The report's pages in headless Chromium, and the page of a run that was trained here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hvdnoise import cli
from tests.browser import CHROMIUM, chromium, look, without_policy
from tests.integration.running import TINY, finished, hvdnoise
from tests.stored_study import LABELS, write_study

MOST_BYTES = 5_000_000
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of fifteen methods, one with a long name and one that diverged."""
    folder = tmp_path_factory.mktemp("wide") / "study"
    names = [*LABELS[:13], "a long name, " * 12 + "with an end", "<i>&\"'$_{x}$"]
    write_study(folder, methods=names, seeds=2, trials=3, epochs=4, diverged=True)
    assert cli.main(["report", str(folder)]) == 0
    return folder / "report" / "index.html"


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width, print_media", [(1280, False), (390, False), (720, True)])
def test_nothing_overflows_or_overlaps(page: Path, tmp_path: Path, width: int, print_media: bool
                                       ) -> None:
    found = look(page, tmp_path, width=width, print_media=print_media)
    assert found["figures"] == page.read_text().count("<svg") > 12
    for fault in ("wide", "outside", "overlaps", "empty"):
        assert found[fault] == [], fault
    assert found["overflow"] == 0
    levels = found["headings"]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    assert page.stat().st_size < MOST_BYTES


@needs_chromium
@pytest.mark.slow
def test_no_request_leaves(page: Path, tmp_path: Path) -> None:
    """The browser's own log tells; an image in a copy without the policy would be seen in it."""
    def asked(name: str, text: str) -> set[str]:
        shown, log = tmp_path / f"{name}.html", tmp_path / f"{name}.json"
        shown.write_text(text)
        chromium("--dump-dom", f"--log-net-log={log}", shown.as_uri(), profile=tmp_path / name)
        found = set(re.findall(r'"url":"([^"]*)"', log.read_text()))
        own = re.compile(r"(file|data|chrome[\w-]*):|https?://[\w.-]*(google|gvt1|gstatic)")
        return {url for url in found if not own.match(url)}  # the browser asks its makers
    text = page.read_text()
    image = text.replace("</main>", "<img alt='' src='http://hvdnoise.invalid/x.png'></main>")
    assert not re.search("google|gvt1|gstatic", text) and asked("page", text) == set()
    assert asked("image", without_policy(image)) == {"http://hvdnoise.invalid/x.png"}


@pytest.mark.slow
def test_the_page_of_a_run_that_was_trained_here(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    ended = hvdnoise(1, "train", "--config", str(tmp_path / "tiny.yaml"), "--run_dir",
                     str(tmp_path / "run"), "--spectrum_every", "5", "--log_every", "2")
    summary = finished(ended, tmp_path / "run")
    ended = hvdnoise(1, "report", str(tmp_path / "run"))
    assert ended.exit_code == 0 and not ended.leftovers, ended.report()
    text = (tmp_path / "run" / "report" / "index.html").read_text()
    assert f"{summary['test_accuracy']:.2%}" in text
    for title in ("Accuracy by epoch", "Loss by epoch", "Learning rate by epoch",
                  "Time of a step by epoch", "Size of the noise by epoch", "Stable rank by step"):
        assert f'-t">{title}</title>' in text, title
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["versions"]["torch"] \
        in text
