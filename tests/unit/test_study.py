"""`hvdnoise study` as a whole, with a trainer that is none; real ones are in tests/integration."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable

import pytest
import yaml

from hvdnoise import cli
from hvdnoise.study import launch
from hvdnoise.study.lock import only_one
from hvdnoise.supervise import guard
from hvdnoise.training.config import ConfigError, TrainConfig, flatten
from hvdnoise.training.progress import log
from tests.launcher import ROOT

RATES = {"low": .01, "high": 1.0, "log": True}
STUDY: dict[str, Any] = {
    "settings": {"data": {"dataset": "synthetic", "num_examples": 128, "validation": 32,
                          "image_size": 8}, "model": "mlp", "epochs": 1},
    "batches": [32], "virtual_workers": 2, "baseline": "plain", "search": {"optim.lr": RATES},
    "trials": 3, "tuning_seeds": [8], "seeds": [1, 2], "jobs": 2,
    "methods": {"plain": {}, "same": {}}}


@pytest.fixture(autouse=True)
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = tmp_path / "defaults.json"
    defaults.write_text(json.dumps({key: value for key, value in flatten(TrainConfig()).items()}))
    monkeypatch.setattr(launch, "_TRAIN", [
        sys.executable, "-I", "-S", str(ROOT / "tests" / "fake_trainer.py"), str(defaults)])
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(log, "handlers", [])  # each command adds one
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)


def study(*flags: str, **changes: Any) -> int:
    values = {**STUDY, **changes}
    Path("my.yaml").write_text(yaml.safe_dump(values))
    return cli.main(["study", "my.yaml", *flags])


def model(name: str) -> dict[str, Any]:
    """A method whose fake trainer does that."""
    return {"settings": {"model": name}}


@pytest.fixture
def any_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdnoise.study.plan.validate", lambda *_: None)


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("studies/my/results.json").read_text())
    return found


def entry(method: str) -> dict[str, Any]:
    (found,) = (each for each in results()["methods"] if each["method"] == method)
    return found


def starts(method: str = "*") -> list[Path]:
    """Where runs have been started, one for each start."""
    return [path.parent for path in Path("studies/my/runs").glob(f"{method}/*/*/starts")
            for _ in path.read_text().split()]


def test_a_whole_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert study() == 0
    found = results()
    assert found["state"] == "complete" and found["comparisons"] == 1
    assert found["runs"] == {"planned": 10, "finished": 10, "diverged": 0, "failed": 0}
    same = entry("same")
    assert [trial["settings"]["optim.lr"] for trial in same["trials"]] == [.1, .03162, .3162]
    assert same["chosen"] == {"optim.lr": .1} and same["edge"] == []
    assert [final["score"] for final in same["finals"]] == pytest.approx([.901, .902])
    assert same["mean"] == pytest.approx(.9015) and same["error"] == pytest.approx(.0005)
    versus = same["versus_baseline"]
    assert (versus["low"], versus["difference"], versus["high"], versus["p_holm"]) == (0, 0, 0, 1)
    said = capsys.readouterr().out
    assert "run 10/10" in said and "same, batch 32, final, seed 2: test accuracy 0.9020" in said
    table = Path("studies/my/table.md").read_text()
    assert table in said and "| 0.9015 ± 0.0005 |" in table
    before = [path.read_bytes() for path in map(Path, ("studies/my/table.md",
                                                       "studies/my/table.csv"))]
    assert study() == 0 and len(starts()) == 10  # nothing is done twice
    assert before == [path.read_bytes() for path in map(Path, ("studies/my/table.md",
                                                               "studies/my/table.csv"))]


def test_the_moving_average_of_the_weights_counts_where_a_method_says_so(
        capsys: pytest.CaptureFixture[str]) -> None:
    averaged = {"settings": {"ema": 0.9}}
    assert study(methods={"plain": averaged, "mean": {**averaged, "weights": "ema"}}) == 0
    plain, mean = entry("plain"), entry("mean")
    assert plain["chosen"] == {"optim.lr": .1} and mean["chosen"] == {"optim.lr": .3162}
    assert plain["mean"] == pytest.approx(.9015) and mean["mean"] == pytest.approx(.9115, abs=1e-4)
    assert [trial["validation_accuracy"] for trial in mean["trials"]] == pytest.approx(
        [.761, .711, .811], abs=1e-4)
    assert "mean, batch 32, final, seed 2: ema test accuracy 0.9120" in capsys.readouterr().out
    table = Path("studies/my/table.md").read_text()
    assert "The moving average of the weights counts in: mean." in table


@pytest.mark.slow
def test_the_choice_at_an_edge_and_ties_to_the_lower_rate() -> None:
    assert study(search={"optim.lr": [1.0, 10.0]}, trials=2) == 0
    assert entry("plain")["chosen"] == {"optim.lr": 1.0} and entry("plain")["edge"] == ["optim.lr"]
    assert "plain, batch 32: the chosen optim.lr=1.0 lies at the edge" in \
        Path("studies/my/table.md").read_text()
    assert study("--out", "tie", search={"optim.lr": [.4, .025]}, trials=2) == 0
    found = json.loads(Path("tie/results.json").read_text())["methods"][0]
    scores = [each["validation_accuracy"] for each in found["trials"]]
    assert scores[0] == pytest.approx(scores[1])
    assert found["chosen"]["optim.lr"] in ([.025] if scores[0] == scores[1] else [.4, .025])


def test_what_failed_is_tried_once_more_and_shown(any_model: None,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    methods = {"plain": {}, "bad": model("fail"), "moody": model("flaky"),
               "wild": model("diverge")}
    assert study(methods=methods, search={"optim.lr": [.1]}) == 1
    bad, moody, wild = map(entry, ("bad", "moody", "wild"))
    assert (bad["failed"], bad["mean"], bad["versus_baseline"]) == (2, None, None)
    assert len(starts("bad")) == len(starts("moody")) == 4 and len(starts("plain")) == 2
    assert (moody["failed"], moody["n"]) == (0, 2)
    assert (wild["diverged"], wild["n"], wild["mean"], wild["error"]) == (2, 2, .1, 0)
    assert results()["runs"] == {"planned": 8, "finished": 4, "diverged": 2, "failed": 2}
    assert results()["comparisons"] == 2 and results()["state"] == "complete"
    said = capsys.readouterr().out
    assert "failed: runs/bad/b32/final-seed-1: hvdnoise: error: the disk is full" in said
    assert "wild, batch 32, final, seed 1: diverged" in said
    assert "A method with a final that failed has no mean" in said


@pytest.mark.slow
def test_failed_trials_are_out_and_diverged_ones_are_chance(any_model: None) -> None:
    assert study(methods={"plain": {}, "bad": model("fail"), "wild": model("diverge")}) == 1
    bad, wild = entry("bad"), entry("wild")
    assert bad["chosen"] is None and bad["finals"] == []
    assert {each["outcome"] for each in bad["trials"]} == {"failed"}
    assert {each["validation_accuracy"] for each in wild["trials"]} == {.1}
    assert wild["chosen"] == {"optim.lr": .03162}  # all alike: the lowest learning rate
    assert "3 (3 failed)" in Path("studies/my/table.md").read_text()


@pytest.mark.slow
def test_a_study_grows(capsys: pytest.CaptureFixture[str]) -> None:
    assert study(trials=2, search={"optim.lr": {"low": .001, "high": .1, "log": True}}) == 0
    assert entry("plain")["chosen"] == {"optim.lr": .01}
    finals = [path for path in starts() if path.name.startswith("final")]
    assert study(trials=3, seeds=3,  # point 3 is better: the finals are made again
                 search={"optim.lr": {"low": .001, "high": .1, "log": True}}) == 0
    assert entry("plain")["chosen"] == {"optim.lr": .03162} and entry("plain")["n"] == 3
    again = [path for path in starts() if path.name.startswith("final")]
    assert len(finals) == 4 and len(again) == 10
    assert "made with other settings, before the choice changed" in capsys.readouterr().err


def during(condition: Callable[[], bool], action: Callable[[], None]) -> threading.Thread:
    def watch() -> None:
        until = time.monotonic() + 20
        while not condition() and time.monotonic() < until:
            time.sleep(0.01)
        action()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_runs_and_the_same_command_goes_on(
        any_model: None, capsys: pytest.CaptureFixture[str], number: int, code: int) -> None:
    methods = {"plain": {}, "slow": model("slow")}
    thread = during(lambda: len(starts("slow")) == 2, lambda: os.kill(os.getpid(), number))
    began = time.monotonic()
    assert study(methods=methods, search={"optim.lr": [.1]}) == code
    thread.join()
    assert time.monotonic() - began < 20 and alive("fake_trainer") == []
    assert "go on with the same command" in capsys.readouterr().err
    assert results()["state"] == "running" and not Path("studies/my/table.md").exists()
    assert study(methods=methods, search={"optim.lr": [.1]}) == 0
    assert entry("slow")["mean"] == entry("plain")["mean"] and len(starts("plain")) == 2


def alive(word: str) -> list[str]:
    """The processes of this test's folder whose command line has the word."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            here = os.readlink(path / "cwd") == os.getcwd()
            command = (path / "cmdline").read_bytes().decode()
        except OSError:
            continue
        found += [command] if here and word in command else []
    return found


def test_an_error_in_the_study_leaves_no_run(any_model: None,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")
    monkeypatch.setattr("hvdnoise.study.results.write", full)
    with pytest.raises(OSError, match="no space"):
        study(methods={"plain": {}, "slow": model("stubborn")}, search={"optim.lr": [.1]})
    assert alive("fake_trainer") == [] and alive("sleep") == []


# ---------------------------------------------------------------------- guard and lock


def under_guard(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, guard.__file__, "none", *command],
                            stdin=subprocess.PIPE, start_new_session=True)


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


TREE = "(setsid sleep 77 &); trap '' TERM; setsid sleep 77 & sleep 77; sleep 77"


@pytest.mark.parametrize("how", ["study gone", "asked twice"])
def test_the_guard_leaves_nothing(how: str) -> None:
    process = under_guard("bash", "-c", TREE)
    wait_for(lambda: len([each for each in alive("77") if each.startswith("sleep")]) == 3)
    if how == "study gone":
        assert process.stdin
        process.stdin.close()
    else:
        process.terminate()
        time.sleep(0.3)
        assert process.poll() is None  # it has time to save
        process.terminate()
    process.wait(10)
    assert alive("77") == []


def test_the_guard_ends_with_the_commands_exit_code_and_what_it_left() -> None:
    assert under_guard("bash", "-c", "(setsid sleep 77 &); exit 7").wait(10) == 7
    assert alive("77") == []
    assert under_guard("bash", "-c", "kill -9 $$").wait(10) == 137
    process = under_guard("sleep", "78")
    wait_for(lambda: [each for each in alive("78") if each.startswith("sleep")])
    process.terminate()
    assert process.wait(10) == 143


def test_the_command_dies_with_a_guard_that_is_killed() -> None:
    process = under_guard("sleep", "79")
    wait_for(lambda: [each for each in alive("79") if each.startswith("sleep")])
    process.kill()
    process.wait(10)
    wait_for(lambda: alive("79") == [])


@pytest.mark.parametrize("named", [{"plugins": ["mine.py"]}, {"model": "mine.py:net"}])
def test_code_that_the_folder_alone_names_is_not_imported(
        named: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text("open('mark', 'w')\n")
    folder = Path("there")
    folder.mkdir()
    earlier = {**STUDY, "settings": {**STUDY["settings"], **named}}
    (folder / "study.yaml").write_text(yaml.safe_dump(earlier))
    assert study("--out", str(folder)) == 2
    assert "study.yaml cannot be read" in (said := capsys.readouterr().err) or "was" in said
    assert not Path("mark").exists()
    assert cli.main(["study", str(folder / "study.yaml"), "--out", "new", "--dry_run"]) == 2 * (
        "model" in named)  # named by the command, it is: mine.py has no function net
    assert Path("mark").exists()


def test_one_study_at_a_time(tmp_path: Path) -> None:
    with only_one(tmp_path) as runs:
        with pytest.raises(ConfigError, match=f"another study works in .*process {os.getpid()} on"):
            with only_one(tmp_path):
                pass
        left = subprocess.Popen(["sleep", "5"], pass_fds=(runs,))  # a run that outlives its study
    try:
        with pytest.raises(ConfigError, match=f"do not end .process {left.pid}"):
            with only_one(tmp_path, wait=0.3):
                pass
    finally:
        left.kill()
        left.wait()
    with only_one(tmp_path, wait=0.3):
        pass


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("changes, expected", [
    ({"baseline": "plane"}, "baseline='plane' is wrong: give one of the methods: plain, same"),
    ({"batches": [33]}, "methods.plain, batch 33: global_batch=33 is wrong"),
    ({"batches": []}, "methods.plain: batches=[] is wrong"),
    ({"methods": {"plain": {"lable": "x"}}}, "methods.plain: unknown setting 'lable': did you "
     "mean label?"),
    ({"methods": {"plain": {}, "b/c": {}}}, "methods='b/c' is wrong"),
    ({"methods": {"plain": {"weights": "ema"}}}, "weights=ema is wrong: the runs have no moving "
     "average"),
    ({"methods": {"plain": {"weights": "best"}}}, "weights=best is wrong: give one of"),
    ({"methods": {"plain": {"settings": {"modle": "mlp"}}}}, "methods.plain, batch 32: unknown "
     "setting 'modle'"),
    ({"methods": {"plain": {"settings": {"seed": 3}}}}, "settings=seed is wrong: the study sets "
     "it: give seeds and tuning_seeds"),
    ({"methods": {"plain": {"settings": {"optim.lr": 0.1}}}}, "they are searched too"),
    ({"search": {"optim.momentum": [0.9]}}, "every method has its learning rate searched"),
    ({"search": {"optim.lr": {"low": 1, "high": 0.1}}}, "low must be less than high"),
    ({"search": {"optim.lr": {"low": 0, "high": 0.1, "log": True}}}, "log needs low above 0"),
    ({"search": {"optim.lr": 0.1}}, "give {low: ..., high: ..., log: true} or a list"),
    ({"search": {"optim.lr": ["fast"]}}, "optim.lr=fast is wrong: give a number"),
    ({"search": {"optim.lr": [0.1], "optim.rate": [1, 2]}}, "unknown setting 'optim.rate'"),
    ({"tuning_seeds": [2]}, "2 is in seeds too"), ({"seeds": 0}, "seeds=[] is wrong"),
    ({"seeds": [1, 1]}, "a seed is there twice"), ({"trials": 0}, "trials=0"),
    ({"trials": "many"}, "trials=many is wrong: give a whole number"),
    ({"settings": {**STUDY["settings"], "data": {"dataset": "synthetic"}}},
     "settings.data.validation=0 is wrong: trials are compared on validation images"),
    ({"launcher": "srun"}, "launcher=srun is wrong: this is no Slurm job"),
    ({"jobs": "some"}, "jobs=some"), ({"name": "a/b"}, "name='a/b' is wrong")])
def test_mistakes_are_one_line_and_nothing_is_made(
        capsys: pytest.CaptureFixture[str], changes: dict[str, Any], expected: str) -> None:
    assert study(**changes) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("hvdnoise: error:") and expected in line, line
    assert sorted(path.name for path in Path().iterdir()) == ["defaults.json", "my.yaml"]


def test_a_file_that_is_not_there_and_a_folder_of_something_else(
        capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "none.yaml"]) == 2
    assert "file=none.yaml is wrong: there is none" in capsys.readouterr().err
    for arguments in ([], ["--dry_run", "my.yaml"]):
        assert cli.main(["study", *arguments]) == 2
        assert "no file of a study: give it first" in capsys.readouterr().err
    Path("other").mkdir()
    Path("other/thesis.tex").write_text("x")
    assert study("--out", "other") == 2
    assert "it holds thesis.tex and no study" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert study("--dry_run", "--seconds_per_run", "360") == 0
    said = capsys.readouterr().out
    assert "my: 10 runs (6 trials, 4 finals), 2 at a time, in studies/my" in said
    assert "time: 0.5 hours for the 10 runs that are left" in said
    assert "--optim.lr=0.1 --seed=8 --run_dir=studies/my/runs/plain/b32/trial-00-seed-8" in said
    assert not Path("studies").exists()
    assert study() == 0
    capsys.readouterr()
    assert study("--dry_run", seeds=4) == 0
    assert "for the 4 runs that are left, at 1 s each" in capsys.readouterr().out
    assert len(starts()) == 10
