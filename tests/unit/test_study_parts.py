"""The parts of `hvdnoise study` that are functions: statistics, points, plans, commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from hvdnoise.study import launch, search
from hvdnoise.study.config import StudyConfig
from hvdnoise.study.plan import Plan, Run, check_same, make
from hvdnoise.study.search import Range
from hvdnoise.study.statistics import Paired, holm, mean_and_error, paired
from hvdnoise.training import job
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.options import parse
from hvdnoise.training.records import weights_digest
from hvdnoise.training.results import table
from tests.fake_world import ThreadWorld, run_threads

# accuracies of ten seeds each
VALUES = [.8471, .8523, .8390, .8502, .8467, .8533, .8419, .8488, .8510, .8455]
BASELINE = [.8402, .8510, .8405, .8441, .8399, .8496, .8420, .8401, .8477, .8430]
RATES = {"low": .01, "high": 1.0, "log": True}
SETTINGS: dict[str, Any] = {
    "data": {"dataset": "synthetic", "num_examples": 128, "image_size": 8}, "model": "mlp",
    "epochs": 1}


def study(tmp_path: Path, **changes: Any) -> StudyConfig:
    options: dict[str, Any] = {
        "name": "s", "settings": SETTINGS, "baseline": "plain", "batches": [32], "seeds": 2,
        "virtual_workers": 2, "search": {"optim.lr": [0.1]}, "out": str(tmp_path / "s"),
        "methods": {"plain": {}, "gnc": {"settings": {"noise": {"kind": "gnc", "source": "own",
                                                                "radius": 0.01}}}}}
    return StudyConfig(**{**options, **changes})


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_paired_differences_are_scipys(level: float) -> None:
    found, scipys = paired(VALUES, BASELINE, level=level), stats.ttest_rel(VALUES, BASELINE)
    interval = scipys.confidence_interval(level)
    assert found.p == pytest.approx(scipys.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert found.difference == pytest.approx(0.00377, abs=1e-12)
    assert found.error == pytest.approx(found.difference / scipys.statistic, rel=1e-12)
    assert found.n == 10


def test_pairs_without_spread_and_single_ones() -> None:
    assert paired(VALUES, VALUES) == Paired(0.0, 0.0, 0.0, 0.0, 1.0, 10, 0.95)
    assert paired([.5, .75], [.25, .5]) == Paired(0.25, 0.0, 0.25, 0.25, 0.0, 2, 0.95)
    assert paired([.5], [.25]) == Paired(0.25, None, None, None, None, 1, 0.95)
    assert mean_and_error([0.5]) == (0.5, None)
    assert mean_and_error([]) == (None, None)
    assert mean_and_error(VALUES)[1] == pytest.approx(stats.sem(VALUES))
    for values, baseline in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="no pairs"):
            paired(values, baseline)


def test_holms_correction_by_hand() -> None:
    # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, made monotone: .02 .03 .06 .06
    assert holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])
    assert holm([.5, .9, .6]) == pytest.approx([1, 1, 1])
    assert holm([.02]) == [.02] and holm([]) == []


def test_points_are_nested_and_share_the_learning_rates() -> None:
    one = search.read({"optim.lr": RATES})
    two = search.read({"noise.share": {"low": .1, "high": .3}, "optim.lr": RATES})
    assert list(two) == ["optim.lr", "noise.share"]
    rates = [point["optim.lr"] for point in search.points(one, 16)]
    # 1/2, 1/4, 3/4, 1/8 ... of the way from .01 to 1 in the logarithm
    assert rates[:4] == pytest.approx([.1, .03162, .3162, .01778])
    assert len(set(rates)) == 16 and .01 < min(rates) and max(rates) < 1
    assert [point["optim.lr"] for point in search.points(two, 16)] == rates
    assert search.points(two, 5) == search.points(two, 16)[:5]
    shares = [point["noise.share"] for point in search.points(two, 3)]
    assert shares == pytest.approx([.1 + .2 / 3, .1 + .4 / 3, .1 + .2 / 9], abs=1e-4)


def test_lists_are_choices_and_a_grid_has_each_combination_once() -> None:
    axes = search.read({"optim.lr": [.1, .2, .4], "optim.nesterov": [True, False]})
    points = search.points(axes, 6)
    assert len(points) == 6 and search.points(axes, 50) == points
    assert {(point["optim.lr"], point["optim.nesterov"]) for point in points} == {
        (rate, nesterov) for rate in (.1, .2, .4) for nesterov in (True, False)}
    assert search.points(axes, 4) == points[:4]
    mixed = search.points(search.read({"optim.lr": RATES, "optim.name": ["sgd", "lars"]}), 8)
    assert len(mixed) == 8 and {point["optim.name"] for point in mixed} == {"sgd", "lars"}


def test_edges() -> None:
    axes = {"optim.lr": Range(.01, 1, True), "b": [1, 3, 2], "c": ["x", "y"], "d": [5]}
    tried = search.points(axes, 8)
    rates = sorted(point["optim.lr"] for point in tried)
    inside = {"optim.lr": rates[3], "b": 2, "c": "x", "d": 5}
    assert search.edges(axes, tried, inside) == []
    assert search.edges(axes, tried, {**inside, "optim.lr": rates[-1]}) == ["optim.lr"]
    assert search.edges(axes, tried, {**inside, "optim.lr": rates[0], "b": 3}) == ["optim.lr", "b"]


def test_methods_start_from_the_same_weights_and_see_the_same_batch(tmp_path: Path) -> None:
    plan = make(study(tmp_path, settings={**SETTINGS, "data": {
        **SETTINGS["data"], "limit": 96, "label_noise": 0.2, "validation": 16}}))
    plain, gnc = plan.cells

    def start(cell: Any, seed: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        run = Run(cell, None, seed, cell.points[0])
        config = parse(TrainConfig, run.flags(), program="test")

        def work(world: ThreadWorld) -> tuple[str, torch.Tensor, torch.Tensor]:
            made = job.build(config, world, torch.device("cpu"))
            made.sampler.set_epoch(0, 0)
            indices = [i for each, _ in zip(made.sampler, range(2)) for i in each]
            images, labels = made.datasets.train.batch(indices, 0)
            return weights_digest(made.model.state_dict()), images, labels
        return run_threads(1, work)[0]

    first, second, other = start(plain, 1), start(gnc, 1), start(gnc, 2)
    assert first[0] == second[0] != other[0]
    assert len(first[2]) == 32
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    assert not torch.equal(first[1], other[1])


def test_settings_of_a_method_go_over_those_of_the_study(tmp_path: Path) -> None:
    config = study(tmp_path, settings={**SETTINGS, "noise": {"kind": "gnc", "radius": 0.1},
                                       "lr.schedule": "constant"},
                   methods={"plain": {"settings": {"noise": {"kind": "none"}, "epochs": 3}},
                            "half": {"settings": {"noise.radius": 0.2}, "batches": [16, 64]},
                            "sam": {"settings": {"noise": [{"kind": "sam", "radius": 0.1}]}}})
    plain, half, large, sam = make(config).cells
    assert "noise.radius" not in plain.given and plain.complete["epochs"] == 3
    assert plain.complete["lr.schedule"] == "constant"
    assert half.complete["noise.radius"] == 0.2 and half.complete["noise.kind"] == "gnc"
    assert (half.batch, large.batch, large.complete["global_batch"]) == (16, 64, 64)
    assert sam.complete["noise.kind"] == "sam" and sam.own["noise.radius"] == 0.1
    flags = Run(sam, None, 3, {"optim.lr": 0.1}).flags()
    assert "--seed=3" in flags and "--optim.lr=0.1" in flags and "--global_batch=32" in flags


@pytest.mark.parametrize("changes, expected", [
    ({"trials": 3}, "trials=3"), ({"seeds": [1]}, "seeds=[1]"), ({"ranks": 2}, "ranks=2"),
    ({"methods": {"plain": {}}}, "gnc with batch 32 is gone"), ({"batches": [64]}, "batch 32"),
    ({"settings": {**SETTINGS, "epochs": 2}}, "epochs was 1.0 and is 2"),
    ({"settings": {**SETTINGS, "model": "small-cnn"}}, "model was mlp"),
    ({"search": {"optim.lr": [0.2]}}, "search.optim.lr was [0.1] and is [0.2]")])
def test_a_changed_study_that_would_mix_runs_is_refused(tmp_path: Path, changes: dict[str, Any],
                                                        expected: str) -> None:
    before = make(study(tmp_path, trials=4))
    with pytest.raises(ConfigError) as error:
        check_same(before, make(study(tmp_path, **{"trials": 4, **changes})))
    assert expected in str(error.value)


def test_a_study_may_grow(tmp_path: Path) -> None:
    before = make(study(tmp_path))
    check_same(before, make(study(
        tmp_path, seeds=5, trials=9, batches=[16, 32], tuning_seeds=[1000, 7], jobs=3, about="x",
        settings={**SETTINGS, "log_every": 3}, baseline="gnc",
        methods={"gnc": {"label": "GNC", **study(tmp_path).methods["gnc"]}, "plain": {},
                 "new": {"settings": {"ema": 0.9}}})))


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    folder = tmp_path / "r"
    alone = launch.command(study(tmp_path), ["--a=1"], folder)
    assert alone[1:] == ["-m", "hvdnoise", "train", "--a=1"]
    two = launch.command(study(tmp_path, ranks=2, launcher_options=["--verbose"]), ["--a=1"],
                         folder)
    assert Path(two[0]).name == "horovodrun" and two[two.index("-np") + 1] == "2"
    assert two[two.index("-H") + 1] == "localhost:2" and "hvdnoise" not in two[:-4]
    assert two[-6] == "--verbose" and two[-1] == "--a=1"
    mpi = launch.command(study(tmp_path, ranks=2, launcher="mpirun"), [], folder)
    assert Path(mpi[0]).name == "mpirun" and mpi[-1] == "train"
    for name in ("slurm", "launcher"):
        with pytest.raises(ConfigError, match="no Slurm job"):
            launch.command(study(tmp_path, **{name: {"slurm": "yes"}.get(name, "srun")}), [],
                           folder)


def test_commands_in_a_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "6")
    folder, config = tmp_path / "r", study(tmp_path, ranks=2, threads=3)
    words = launch.command(config, ["--a=1"], folder)
    assert words[0] == "srun" and {"--exact", "--ntasks=1", "--cpus-per-task=6"} <= set(words)
    inside = words.index("env")
    assert words[inside - 2].endswith("guard.py") and words[inside - 1] == str(folder)
    assert Path(words[inside + 3]).name == "horovodrun"
    assert launch.places(config, ["0", "1"]) == [[]] * 6  # one task is one run
    ranks = study(tmp_path, ranks=2, launcher="srun")
    assert launch.command(ranks, [], folder)[:3] == ["srun", "--exact", "--ntasks=2"]
    assert len(launch.places(ranks, [])) == 3
    assert launch.command(study(tmp_path, slurm="no"), [], folder)[-1] == "train"
    assert "SLURM_JOB_ID" not in launch.environment(study(tmp_path, slurm="no"), [])


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: set(range(8)))
    assert launch.places(study(tmp_path, ranks=2, threads=2), []) == [[], []]
    assert launch.places(study(tmp_path, ranks=16), []) == [[]]  # slow, and the user's wish
    two = study(tmp_path, ranks=2)
    assert launch.places(two, ["0", "1", "4", "5"]) == [["0", "1"], ["4", "5"]]
    assert launch.places(study(tmp_path, jobs=3), ["0", "1"]) == [["0"], ["1"], ["0"]]
    env = launch.environment(two, ["4", "5"])
    assert env["CUDA_VISIBLE_DEVICES"] == "4,5" and env["OMP_NUM_THREADS"] == "1"


def test_a_plan_counts_its_runs(tmp_path: Path) -> None:
    settings = {**SETTINGS, "data": {**SETTINGS["data"], "validation": 32}}
    plan: Plan = make(study(
        tmp_path, trials=3, tuning_seeds=[8, 9], seeds=[1, 2, 3], settings=settings,
        search={"optim.lr": RATES},
        methods={"plain": {}, "fixed": {"search": {"optim.lr": [0.3]}}}))
    assert [run.path for run in plan.trials()] == [
        f"runs/plain/b32/trial-0{trial}-seed-{seed}" for trial in range(3) for seed in (8, 9)]
    assert plan.count() == 6 + 2 * 3


def test_a_bar_in_a_label_starts_no_column() -> None:
    lines = table([["method", "n"], ["a | b", "2"]])
    assert lines[2] == r"| a \| b | 2 |" and len({len(line) for line in lines}) == 1
