"""`hvdnoise report`: what it reads, computes and writes, without a browser."""

from __future__ import annotations

import csv
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdnoise import cli
from hvdnoise.report import cost_figure, study_figures, study_part
from hvdnoise.report.charts import Curve, Quantity, accuracy, curves
from hvdnoise.report.drawing import DARK, LIGHT, style
from hvdnoise.report.marks import Point, points
from hvdnoise.report.numbers import POINTS, mean_and_error, mean_curve, number, thin
from hvdnoise.report.parts import Graphic
from hvdnoise.report.reading import read_run, read_study
from tests.stored_study import write_run, write_study

LINE = {"kind": "train", "step": 1, "epoch": 0.5, "loss": 1.25, "accuracy": 0.3}
NASTY = "<b>&\"'$x^2$ | `_*_`"


def report(*folders: Path, out: Path) -> str:
    """The page, made by the command."""
    assert cli.main(["report", *map(str, folders), "--out", str(out)]) == 0
    return (out / "index.html").read_text()


def words(page: str) -> str:
    """What the page says, without figures and their numbers."""
    return html.unescape(re.sub(r"<(svg|style|details).*?</\1>|<[^>]*>", " ", page, flags=re.S))


def make_run(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Folder, results, page."""
    folder = tmp_path_factory.mktemp("study") / "first"
    results = write_study(folder, methods=["plain", NASTY, "third"], seeds=3, trials=3, epochs=3,
                          diverged=True)
    return folder, results, report(folder, out=folder / "report")


# ---------------------------------------------------------------------- numbers


def test_numbers() -> None:
    assert [number(1), number(2.5)] == [1.0, 2.5]
    for wrong in (None, "1", True, [1], math.inf, math.nan, 10 ** 400):
        assert math.isnan(number(wrong))
    assert mean_and_error([1.0, 2.0, 6.0, math.nan]) == pytest.approx((3, math.sqrt(7 / 3), 3))
    assert mean_and_error([2.0])[::2] == (2.0, 1) and math.isnan(mean_and_error([2.0])[1])
    x, y = thin(range(1001), range(1001))
    assert len(x) == POINTS and (x[0], x[-1]) == (0, 1000) and (x == y).all()


def test_a_mean_curve_is_over_all_runs_at_each_place() -> None:
    x, mean, error = mean_curve([([1, 2, 3], [1, 2, 3]), ([1, 2], [3, math.nan]),
                                 ([1, 2, 3], [5, 5, 5])])
    assert x.tolist() == [1] and mean.tolist() == [3] and error[0] == pytest.approx(
        2 / math.sqrt(3))
    x, mean, error = mean_curve([([1, 3], [0, 2]), ([1, 2, 3], [1, 1, 1])])
    assert x.tolist() == [1, 2, 3] and mean.tolist() == [0.5, 1, 1.5]
    assert error.tolist() == [0.5, 0, 0.5]
    assert np.isnan(mean_curve([([1, 2], [3, 4])])[2]).all()
    assert all(len(each) == 0 for each in mean_curve([([], []), ([1], [math.nan])]))


def test_figures_show_numbers_as_they_are_in_the_colours_of_the_page() -> None:
    drawn = curves("key", "A & B", "Why.", [
        Curve("_a $x$", style(1), [1.0, 2.0], [0.01234, 0.01236]),
        Curve("b", style(0), [1.0], [0.01235])], x=Quantity("Step"), y=Quantity("Rate"))
    assert isinstance(drawn, Graphic)
    texts = [html.unescape(text).strip() for text in
             re.findall(r"<text[^>]*>(.*?)</text>", drawn.inline, re.S)]
    assert {"0.01235", "_a $x$", "b", "Step", "Rate"} <= set(texts)  # no digit is rounded away
    assert not re.findall(r"#[0-9a-f]{6}", re.sub(r"#ffffff", "", drawn.inline))
    assert set(re.findall(r"var\(--([\w-]+)\)", drawn.inline)) <= LIGHT.keys() == DARK.keys()
    assert "prefers-color-scheme: dark" in drawn.standalone and drawn.png[:4] == b"\x89PNG"
    assert '<title id="key-t">A &amp; B</title>' in drawn.inline
    assert drawn.table.rows == [["_a $x$", "0.01234", "0.01236"], ["b", "0.01235", "–"]]
    nothing = curves("key", "T", "", [Curve("a", style(1), [1.0], [math.nan])], x=Quantity("x"),
                     y=Quantity("y"))
    assert nothing == "T: not recorded"


# ---------------------------------------------------------------------- studies


def test_a_study_shows_what_its_results_say(study: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, page = study
    said, (plain, _, third) = words(page), results["methods"]
    assert f"{100 * third['mean']:.2f} ± {100 * third['error']:.2f}" in said
    against = third["versus_baseline"]
    assert f"{100 * against['low']:+.2f} to {100 * against['high']:+.2f}" in said
    assert f"{against['p']:.4f}" in said and "2 comparisons with the baseline (m0)" in said
    assert "4 runs diverged" in said and "accuracy of chance (10.0%)" in said
    assert "off the axis" in page  # the diverged method leaves the axis to the others
    rows = list(csv.DictReader((folder / "report" / "methods.csv").open()))
    assert [float(row["mean"]) for row in rows] == [each["mean"] for each in results["methods"]]
    finals = list(csv.DictReader((folder / "report" / "runs.csv").open()))
    assert [row["outcome"] for row in finals].count("diverged") == 1 and len(finals) == 9
    assert finals[0]["test_accuracy"] == str(plain["finals"][0]["test_accuracy"])
    markdown = (folder / "report" / "report.md").read_text()
    links = re.findall(r"\]\((figures/[^)]*)\)", markdown)
    assert len(links) == page.count("<svg") > 10
    assert all((folder / "report" / link).is_file() for link in links)
    assert "<b>" not in markdown


def test_a_page_asks_for_nothing_and_hides_no_markup(study: tuple[Path, dict[str, Any], str]
                                                     ) -> None:
    page = study[2]
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert "<script" not in page and "<b>" not in page and html.escape("<b>&") in page
    targets = re.findall(r'(?:\ssrc|href|\saction|\sdata)="([^"]*)"', page)
    assert targets and all(target.startswith("#") for target in targets)
    addresses = set(re.findall(r"url\(([^)]*)\)", page))
    assert all(each.startswith("#") for each in addresses) and "@import" not in page
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and {target[1:] for target in targets} <= set(ids)
    assert page.count("<figure>") == page.count("<svg") == page.count("<details>") == page.count(
        "aria-labelledby")
    assert page.count("<table>") == page.count("<caption>") == page.count('tabindex="0"')


def test_a_study_in_progress_and_one_without_results(tmp_path: Path) -> None:
    write_study(tmp_path / "begun", methods=2, seeds=0, trials=2, state="running")
    said = words(report(tmp_path / "begun", out=tmp_path / "out"))
    assert "The study is not complete: 2 of 4 runs have finished." in said
    assert "Not drawn, as there are no numbers of it: Test accuracy against gradient" in said
    made = make_run(tmp_path / "early", study__yaml="name: early\n")
    assert "No run of this study has ended yet" in words(report(made, out=tmp_path / "out"))
    assert not list((tmp_path / "out" / "figures").iterdir())  # those of the first report are gone


def test_results_with_parts_of_a_wrong_kind_are_read(tmp_path: Path) -> None:
    entry = {"method": "a", "search": "x", "trials": [None, {"settings": "y"}], "finals": "z",
             "chosen": None, "versus_baseline": 3}
    (tmp_path / "results.json").write_text(json.dumps(
        {"runs": "many", "seeds": 3, "methods": [entry, None, "b"]}))
    section = study_part.section(read_study(tmp_path, "s"), "s")
    assert "1 method" in section.headline and section.parts[0].items
    assert not [item for part in section.parts for item in part.items if isinstance(item, Graphic)]


def test_a_failed_run_leaves_its_method_without_a_mean(tmp_path: Path) -> None:
    write_study(tmp_path / "a", methods=2, seeds=2, trials=0, epochs=1, failed=True)
    study = read_study(tmp_path / "a", "a")
    assert study_part.methods_table(study).rows[1][2:6] == ["–", "1", "0", "1"]
    assert "1 final run failed; there is no mean" in " ".join(study_part.notices(study))
    assert study_part.methods_table(study).rows[0][6:] == ["–"] * 4


def test_choices_at_the_edge_of_what_was_tried(tmp_path: Path) -> None:
    results = write_study(tmp_path / "a", methods=2, seeds=1, trials=2, epochs=1)
    results["methods"][1]["edge"] = ["noise.radius"]
    (tmp_path / "a" / "results.json").write_text(json.dumps(results))
    part = study_part.section(read_study(tmp_path / "a", "a"), "a").parts[-1]
    label = results["methods"][1]["label"]
    assert part.words == ["Chosen at the edge of what was tried, so the best value may lie beyond: "
                          f"{label} (noise.radius)."]
    (table, *_) = [item for item in part.items if item.columns[-1] == "at the edge"]
    assert [row[-1] for row in table.rows] == ["none", "noise.radius"]


def test_the_figure_for_a_readme(study: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    cost_figure(study[0] / "results.json", tmp_path / "cost.svg")
    text = (tmp_path / "cost.svg").read_text()
    assert text == (study[0] / "report" / "figures" / "cost.svg").read_text()
    assert "Gradient evaluations" in text and "--page" in text
    with pytest.raises(ValueError, match="not recorded"):
        cost_figure(study[0], tmp_path / "cost.svg", batch=7)
    third = study[1]["methods"][2]["method"]
    cost_figure(study[0], tmp_path / "cost.svg", methods=[third])
    text = (tmp_path / "cost.svg").read_text()
    assert ">third<" in text and ">plain<" not in text
    assert "var(--series-1)" in text and "var(--series-2)" not in text  # the first colour
    with pytest.raises(ValueError, match="no method other"):
        cost_figure(study[0], tmp_path / "cost.svg", methods=[third, "other"])


@pytest.mark.parametrize("joined", [False, True])
def test_markers_of_one_cost_stand_side_by_side(joined: bool) -> None:
    costs = {"a": 100.0, "b": 100.0, "c": 200.0, "d": 102.0}
    drawn = points("cost", "Title", "Caption.", [
        Point(label, style(number), cost, 0.5)
        for number, (label, cost) in enumerate(costs.items())],
        x=Quantity("Cost"), y=accuracy("Test"), joined=joined)
    assert isinstance(drawn, Graphic)
    found = [re.search(rf'<use[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*var\(--series-{number}\)',
                       drawn.inline) for number in range(4)]
    assert len({each and each[2] for each in found}) == 1
    a, b, c, d = (float(each[1]) for each in found if each)
    if joined:
        assert a == b < d < c
        return
    assert b - a == pytest.approx(12)  # points, as 1/72 inch
    assert d - b == pytest.approx(12) and c - b > 100 and "one band" in drawn.caption
    assert re.findall(r">(\d+)</text>", drawn.inline)[:2] == ["100", "200"]  # a tick each


def test_markers_of_many_costs_stay_at_their_places() -> None:
    def places(costs: list[float]) -> list[float]:
        drawn = points("cost", "Title", "Caption.", [
            Point(f"m{number}", style(number), cost, 0.5) for number, cost in enumerate(costs)],
            x=Quantity("Cost"), y=accuracy("Test"))
        assert isinstance(drawn, Graphic)
        return [float(re.findall(rf'<use[^>]* x="([\d.]+)"[^>]*var\(--series-{number}\)',
                                 drawn.inline)[0]) for number in range(len(costs))]
    spread = places([100.0, 101.0, 120.0, 140.0, 160.0, 180.0])
    assert 0 < spread[1] - spread[0] < 5
    # bands do not overlap: the last marker of one is left of the first of the next
    almost = places([852.0, 877.0])  # one place, though nothing else is on the axis
    assert almost[1] - almost[0] == pytest.approx(12)
    near = places([100.0] * 3 + [110.0] * 3 + [200.0])
    assert near == sorted(near) and near[3] - near[2] >= 12


def test_a_batch_is_named_where_a_method_has_several(tmp_path: Path) -> None:
    results = write_study(tmp_path / "a", methods=["plain", "other"], seeds=1, trials=1, epochs=1)
    plain, other = results["methods"]
    study = read_study(tmp_path / "a", "a")
    study.results["methods"] = [plain, {**other, "batch": 7}]
    assert [study_figures.label(study, each) for each in study.entries] == ["plain", "other"]
    study.results["methods"] += [{**plain, "batch": 7}]
    assert [study_figures.label(study, each) for each in study.entries] == [
        f"plain, batch {plain['batch']}", "other", "plain, batch 7"]


# ---------------------------------------------------------------------- runs


def test_runs_that_did_not_end_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = json.dumps(LINE) + "\n" + json.dumps({**LINE, "step": 2, "epoch": 1.0, "loss": None})
    cut = make_run(tmp_path / "cut", config__yaml="epochs: 10\nmodel: mlp\n",
                   metrics__jsonl=lines + '\n{"kind": "tra')
    page = report(cut, out=tmp_path / "cut-report")
    assert "metrics.jsonl: 1 line cannot be read" in words(page)
    assert "it has crashed (step 2, epoch 1 of 10" in words(page)
    assert page.count("<svg") == 2 and "Loss by epoch" in page
    junk = '[1]\n5\n{"kind": 1, "step": "x"}\n\0\n'
    for name, files in {"empty": {"config__yaml": "", "metrics__jsonl": ""},
                        "bare": {"config__yaml": "model: mlp\n"},
                        "junk": {"config__yaml": "[1", "summary__json": "[]",
                                 "metrics__jsonl": junk}}.items():
        page = report(make_run(tmp_path / name, **files), out=tmp_path / f"{name}-report")
        assert "<svg" not in page and "There is no summary.json" in words(page)
    lost = read_run(make_run(tmp_path / "lost", summary__json=json.dumps(
        {"outcome": "diverged", "reason": "why not"})), "lost")
    assert lost.outcome == "diverged"
    assert read_run(make_run(tmp_path / "p", preempted__json="{}", config__yaml=""), "p"
                    ).outcome == "preempted"


@pytest.mark.slow
def test_a_run_that_was_resumed_and_skipped_steps(tmp_path: Path) -> None:
    write_run(tmp_path / "run", epochs=3, measured=True)
    page = report(tmp_path / "run", out=tmp_path / "out")
    said = words(page)
    assert "resumed at step 4" in said and "1 steps without a finite gradient" in said
    assert "rank 0, process" not in said  # only what is worth telling
    for title in ("Trace and largest eigenvalues", "Share of communication", "Noise as a share",
                  "Loss on a line", "Gradient noise scale"):
        assert title in said
    assert "numbers of it" not in said


def test_several_runs_are_compared_without_statistics(tmp_path: Path) -> None:
    files = {"config__yaml": f"seed: 1\nname: {json.dumps(NASTY)}\n",
             "metrics__jsonl": json.dumps(LINE), "summary__json": '{"test_accuracy": 0.5}'}
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    first, second = (make_run(tmp_path / name / "same", **files) for name in ("x", "y"))
    (second / "config.yaml").write_text("seed: 2\n")
    page = report(first, second, first, out=tmp_path / "out")  # one of them twice
    said = words(page)
    assert "2 runs, 2 of them finished" in said and "no means over seeds" in said
    assert str(first) in said and str(second) in said and "Settings that differ" in said
    assert len((tmp_path / "out" / "runs.csv").read_text().splitlines()) == 3
    assert not (tmp_path / "out" / "methods.csv").exists()


def test_where_a_report_may_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", config__yaml="", metrics__jsonl=json.dumps(LINE))
    for _ in range(2):  # a report is replaced
        assert cli.main(["report", str(run)]) == 0
    assert (run / "report" / "index.html").is_file()
    other = make_run(tmp_path / "other", index__html="mine")
    (other / "figures").mkdir()
    (other / "figures" / "mine.png").write_text("")
    for arguments, said in (
            ([run, "--out", other], "holds something else than a report"),
            ([run, "--out", run / "config.yaml"], "it is not a folder"),
            ([run, "--out", run / "config.yaml" / "new"], "give another one"),
            ([tmp_path / "nowhere"], "there is no such folder"), ([], "folders"),
            ([tmp_path], "neither a study"), ([run, tmp_path], "it holds runs, such as other")):
        if said.startswith("it holds runs"):
            (other / "config.yaml").write_text("")
        assert cli.main(["report", *map(str, arguments)]) == 2
        output = capsys.readouterr().err
        assert said in output and output.count("\n") == 1, output
    assert (other / "index.html").read_text() == "mine"
    assert cli.main(["report", str(run), "--out", str(other), "--overwrite"]) == 0
    assert (other / "figures" / "mine.png").exists()
