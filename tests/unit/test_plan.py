"""`hvdnoise plan`: its numbers, its model of time, its launch lines, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shlex
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hvdnoise.cli import main
from hvdnoise.exchange_plan import Shape
from hvdnoise.planning import lines
from hvdnoise.planning.config import PlanConfig, read
from hvdnoise.planning.outline import Outline, model_layout, outline
from hvdnoise.planning.predict import Cluster, into_host, predict, predict_all, step_seconds
from hvdnoise.plans import PLAIN, PLANS, choose
from hvdnoise.training import job, models
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.options import parse
from tests import mpijob
from tests.fake_world import run_threads

pytestmark = pytest.mark.slow  # many seconds in all

ROOT = Path(__file__).resolve().parents[2]
SYNTHETIC = ["--data.dataset", "synthetic", "--data.num_examples", "200", "--data.image_size", "8",
             "--data.batch_size", "4"]
GATHERED = ["--noise.kind", "gnc", "--noise.source", "gathered", "--noise.radius", "0.1"]
QUICKSTART = ["--config", str(ROOT / "launch" / "quickstart.yaml")]
P = 1000
FAST = Cluster(2, 1, bytes_per_second=math.inf, compute_seconds=0.1)


def plan(*flags: str) -> tuple[PlanConfig, Outline]:
    config, _ = read(flags)
    return config, outline(config)


def printed(capsys: Any, *flags: str) -> str:
    assert main(["plan", *flags]) == 0
    text: str = capsys.readouterr().out
    return text


# ---------------------------------------------------------------------- the run


def test_quickstart_by_hand() -> None:
    _, run = plan(*QUICKSTART, "--hosts", "4", "--ranks_per_host", "2")
    assert (run.ranks, run.workers, run.worker_batch, run.batch) == (8, 32, 32, 1024)
    assert run.peak_rate == pytest.approx(0.4)  # 0.1 * 1024 / 256
    assert (run.steps_per_epoch, run.total_steps) == (53, 212)  # 55000 // 1024, 4 epochs
    assert run.first_rate == pytest.approx(0.4 / 26)  # half an epoch of warm-up
    # three 3x3 convolutions with group norm, 3x3 pixels left of 28x28
    expected = 9 * (32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + (128 * 9 + 1) * 10
    assert run.parameters == expected
    assert run.plan.name == "allreduce" and not run.mixes


@pytest.mark.parametrize("flags", [
    [], ["--lr.scaling", "linear", "--lr.warmup_epochs", "1", "--epochs", "2.5"],
    ["--lr.scaling", "sqrt", "--virtual_workers", "2", "--data.limit", "100"],
    ["--data.validation", "100", "--data.repeat", "3", "--norm", "batch"],
    ["--global_batch", "40", "--lr.scaling", "linear"]])
def test_what_the_trainer_builds_is_what_was_planned(flags: list[str]) -> None:
    flags = [*SYNTHETIC, *GATHERED, "--model", "small-cnn", *flags]
    _, run = plan(*flags, "--ranks_per_host", "2")
    config = parse(TrainConfig, flags, program="hvdnoise train")
    rank_0 = run_threads(2, lambda world: facts(job.build(config, world, torch.device("cpu"))))[0]
    assert rank_0 == (run.first_rate, run.peak_rate, run.steps_per_epoch, run.total_steps,
                      run.batch, run.parameters, run.plan.name)


def facts(built: job.Job) -> tuple[Any, ...]:
    first, rates = built.set_learning_rate(), []
    for built.counters.step in range(built.total_steps):
        rates.append(built.set_learning_rate())
    return (first, pytest.approx(max(rates)), built.sampler.steps_per_epoch, built.total_steps,
            built.batches.total, sum(p.numel() for p in built.model.parameters()),
            built.optimizer.exchange_plan)


@pytest.mark.parametrize("name, shape", [
    ("resnet20", (3, 32, 32)), ("vgg16-bn", (1, 28, 28)), ("mobilenet_v3_small", (3, 32, 32)),
    ("regnet_y_400mf", (3, 64, 64))])  # the last looks at its numbers: not on the meta device
def test_parameters_are_counted_without_keeping_them(name: str, shape: Any) -> None:
    built = models.build(name, 7, shape)
    assert model_layout(name, 7, shape).numbers == sum(p.numel() for p in built.parameters())


def test_an_imagefolder_is_counted_or_described(tmp_path: Path) -> None:
    folder = ["--data.dataset", "imagefolder", "--data.root", str(tmp_path), "--data.image_size",
              "32", "--data.batch_size", "2"]
    with pytest.raises(ConfigError, match="give --examples N"):
        plan(*folder)
    _, described = plan(*folder, "--examples", "1281167", "--classes", "1000")
    assert described.steps_per_epoch == 640583
    for label in "abc":
        (tmp_path / "train" / label).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "train" / label / f"{number}.png").touch()
    _, counted = plan(*folder)
    assert (counted.examples, counted.steps_per_epoch) == (9, 4)
    assert plan(*folder, "--data.limit", "5")[1].examples == 5
    assert counted.parameters < described.parameters


def test_the_plan_that_auto_takes() -> None:
    def taken(*flags: str) -> str:
        return plan(*SYNTHETIC, "--model", "small-cnn", *flags)[1].plan.name
    assert taken("--hosts", "2", *GATHERED) == "gather-only"
    assert taken("--hosts", "8", *GATHERED) == "transpose"
    assert taken("--virtual_workers", "2", *GATHERED) == "allreduce"  # one rank
    assert taken("--hosts", "2", "--noise.kind", "gnc", "--noise.radius", "1") == "allreduce"
    assert taken("--hosts", "2", *GATHERED, "--exchange", "transpose") == "transpose"
    _, grouped = plan(*SYNTHETIC, "--ranks_per_host", "4", *GATHERED, "--exchange", "group:2")
    assert (grouped.plan.name, grouped.plan.group_size) == ("group", 2)
    _, run = plan(*SYNTHETIC, "--hosts", "8", *GATHERED)
    shape = Shape(run.parameters, 8)
    assert run.plan == choose("auto", shape, mixes=True, local_size=1)


# ---------------------------------------------------------------------- bytes


def test_bytes_into_a_host_by_hand() -> None:
    shape, one, four = Shape(P, 4, group_size=2), Cluster(4, 1), Cluster(1, 4)
    two = Cluster(2, 2)
    for plan in PLANS.values():  # one rank a host: all that it receives; one host: nothing
        assert into_host(plan, shape, one) == pytest.approx(plan.bytes_received(shape))
        assert into_host(plan, shape, four) == 0
    # 2 hosts x 2 ranks. Rings enter a host once: allreduce 6/4 * 4P, allgather 3 * 4P on top
    assert into_host(PLAIN, shape, two) == pytest.approx(6 * P)
    assert into_host(PLANS["allgather"], shape, two) == pytest.approx(18 * P)
    assert into_host(PLANS["gather-only"], shape, two) == pytest.approx(12 * P)
    assert into_host(PLANS["group"], shape, two) == pytest.approx(6 * P)
    # mean: ring of 3/4 * 4P; each alltoall: 2 ranks x 2 slices of P/4 from the other host
    assert into_host(PLANS["transpose"], shape, two) == pytest.approx(3 * P + 2 * 4 * P)
    bf16 = replace(shape, precision="bf16", virtual_workers=3)
    assert into_host(PLANS["transpose"], bf16, two) == pytest.approx(3 * P + 3 * (4 + 2) * P)


@pytest.mark.parametrize("group, rings", [(2, 0), (4, 0), (3, 2), (6, 2), (12, 1), (8, 1)])
def test_groups_across_hosts(group: int, rings: int) -> None:
    """4 ranks a host, 6 hosts: as many rings lead into the busiest host as groups straddle it."""
    shape = Shape(P, 24, group_size=group)
    extra = into_host(PLANS["group"], shape, Cluster(6, 4)) - into_host(PLAIN, shape, Cluster(6, 4))
    assert extra == pytest.approx(rings * (group - 1) * 4 * P)


def test_every_plan_and_what_cannot_be() -> None:
    found = predict_all(Shape(P, 4, group_size=2), Cluster(2, 2))
    assert [(each.plan, each.precision) for each in found if each.impossible] == [
        ("gather-only", "bf16")]
    assert {each.plan for each in found} == set(PLANS) and len(found) == 9
    for each in found:
        shape = Shape(P, 4, precision=each.precision, group_size=2)
        assert each.memory == {lag: PLANS[each.plan].memory_bytes(shape, lag=lag)
                               for lag in (1, 2)}
        assert each.ratio == each.received / (6 * P)
    alone = predict_all(Shape(P, 1), Cluster(1, 1, 1e9, 0.1))
    assert all(each.ratio is None and each.overhead == {1: 1, 2: 1} for each in alone)
    groups = predict_all(Shape(P, 4, group_size=1), Cluster(4, 1))
    assert "groups of 1" in next(each.impossible for each in groups if each.plan == "group")


# ---------------------------------------------------------------------- time


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_limits_of_the_model_of_time(name: str, precision: str) -> None:
    shape = Shape(P, 4, 2, precision=precision, group_size=2)
    fast = predict(PLANS[name], shape, Cluster(2, 2, math.inf, 0.1), (0, 1, 2))
    assert fast.overhead == pytest.approx({0: 2, 1: 1, 2: 1})
    lazy = Cluster(2, 2, 1e6, 0.0)
    slow = predict(PLANS[name], shape, lazy)
    ratio = into_host(PLANS[name], shape, lazy) / into_host(PLAIN, shape, lazy)
    assert slow.overhead == pytest.approx({1: ratio, 2: ratio})
    assert predict(PLANS[name], shape, Cluster(2, 2)).seconds == {}
    still = predict(PLANS[name], shape, Cluster(2, 2, math.inf, 0.0))
    assert still.seconds == {1: 0, 2: 0} and still.overhead == {}


def test_lag_2_hides_the_noise_and_nothing_else() -> None:
    shape = Shape(P, 4)  # 6 KB of gradients; 12 KB more gathered
    cluster = Cluster(4, 1, bytes_per_second=1e6, compute_seconds=0.018)
    assert step_seconds(PLAIN, shape, cluster, 1) == pytest.approx(0.018)  # 6 ms within 12 ms
    assert step_seconds(PLANS["allgather"], shape, cluster, 1) == pytest.approx(0.006 + 0.018)
    assert step_seconds(PLANS["allgather"], shape, cluster, 2) == pytest.approx(0.018)
    # 12 ms that the mean is in, hidden by 12 ms of backward
    assert step_seconds(PLANS["gather-only"], shape, cluster, 2) == pytest.approx(0.018)
    quick = replace(cluster, compute_seconds=0.0090)
    assert step_seconds(PLANS["gather-only"], shape, quick, 2) == pytest.approx(0.003 + 0.012)
    full = step_seconds(PLANS["allgather"], shape, quick, 2)  # the link is full
    assert full == pytest.approx(0.018)
    # transpose: 3 + 3 KB before the step ends, 3 KB of mixtures after
    assert step_seconds(PLANS["transpose"], shape, quick, 1) == pytest.approx(0.003 + 0.009)
    assert step_seconds(PLANS["transpose"], shape, quick, 2) == pytest.approx(0.009)
    half = replace(shape, precision="bf16")  # 1.5 KB of mixtures, and the same before them
    slower = replace(cluster, compute_seconds=0.006)
    assert step_seconds(PLANS["transpose"], half, slower, 2) == pytest.approx(0.002 + 0.006)
    # with passes before it, the last backward hides less
    assert step_seconds(PLAIN, shape, replace(cluster, passes=4), 1) == pytest.approx(
        0.018 - 0.003 + 0.006)


def test_more_bytes_or_compute_never_take_less_time() -> None:
    times: dict[str, list[float]] = {}
    for numbers in (P, 10 * P, 1000 * P):
        for name in PLANS:
            seconds = predict(PLANS[name], Shape(numbers, 8, group_size=4), Cluster(2, 4, 1e6, 0.05)
                              ).seconds
            assert seconds[2] <= seconds[1]
            times.setdefault(name, []).append(seconds[1])
    assert all(each == sorted(each) for each in times.values())


# ---------------------------------------------------------------------- what is printed


def test_text(capsys: Any) -> None:
    text = printed(capsys, *QUICKSTART, "--hosts", "4", "--bandwidth_gbit", "1", "--compute_ms",
                   "120")
    assert "it needs no exchange" in text and "gather-only (no)" in text
    assert "512 examples a step" in text and max(
        len(line) for line in text.splitlines()[:18]) <= 100
    text = printed(capsys, *SYNTHETIC, *GATHERED, "--hosts", "4", "--ranks_per_host", "8")
    assert "transpose: fewest bytes" in text and "give --bandwidth_gbit" in text
    assert "it needs no exchange" not in text


def test_json_alone(capsys: Any, tmp_path: Path) -> None:
    flags = [*SYNTHETIC, *GATHERED, "--hosts", "4", "--bandwidth_gbit", ".inf", "--compute_ms", "9"]
    found = json.loads(printed(capsys, *flags, "--json", "--write", str(tmp_path / "x")))
    assert found["run"]["plan"]["name"] == "transpose" and found["exchange_needed"]
    assert found["cluster"]["bytes_per_second"] is None
    assert {each["overhead"]["1"] for each in found["plans"]} == {1.0}
    assert found["commands"]["train"] == ["hvdnoise", "train", *SYNTHETIC, *GATHERED]
    assert sorted(found["files"]) == sorted(path.name for path in (tmp_path / "x").iterdir())


def test_every_setting_is_explained(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "10^9 bits a second" in text and "V, workers that each rank stands for" in text


# ---------------------------------------------------------------------- launch lines


FLAGS = [*SYNTHETIC, *GATHERED, "--name", "it's mine", "--optim.lr=0.2", "--optim.nesterov",
         "--optim.betas", "[0.8, 0.9]"]
CLUSTER = ["--hostnames", "a,b, c.net", "--ranks_per_host=2", "--image", "r.io/x:1", "--json",
           "--bandwidth_gbit", "10", "--compute_ms=5"]


def mixed() -> list[str]:
    """The plan's flags among those of the run."""
    return [*CLUSTER[:2], *FLAGS[:4], *CLUSTER[2:3], *FLAGS[4:], *CLUSTER[3:]]


def test_the_same_flags_reach_every_launcher() -> None:
    config, flags = read(mixed())
    assert flags == FLAGS
    train = ["hvdnoise", "train", *FLAGS]
    for command in (lines.horovodrun(config, flags), lines.mpirun(config, flags)):
        assert command[-len(train):] == train
        assert command[command.index("-H") + 1] == "a:2,b:2,c.net:2"
        assert command[command.index("-np") + 1] == "6"
        assert shlex.split(shlex.join(command)) == command
    assert parse(TrainConfig, flags, program="") == parse(
        TrainConfig, lines.horovodrun(config, flags)[-len(FLAGS):], program="")
    assert "odls_base_sigkill_timeout 10" in shlex.join(lines.mpirun(config, flags))
    container = yaml.safe_load(lines.mpijob(config, flags))["spec"]["mpiReplicaSpecs"]["Launcher"][
        "template"]["spec"]["containers"][0]
    assert container["command"][-len(train):] == train and container["image"] == "r.io/x:1"
    *_, line = lines.slurm(config, flags).splitlines()
    assert shlex.split(line)[2:] == ["--", *flags]


def test_files_are_written_once(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "new" / "launch"
    flags = [*SYNTHETIC, "--hosts", "2", "--write", str(folder), "--resume", "auto", "--run_dir",
             str(tmp_path / "run"), "--device", "cuda"]
    text = printed(capsys, *flags)
    assert "wrote" in text and "#SBATCH" not in text
    for name in ("horovodrun.sh", "mpirun.sh", "job.sbatch"):
        assert subprocess.run(["bash", "-n", str(folder / name)]).returncode == 0
    assert (folder / "mpirun.sh").stat().st_mode & stat.S_IXUSR
    job_script = (folder / "job.sbatch").read_text()
    assert "--requeue" in job_script and "--gpus-per-node=1" in job_script
    assert "nvidia.com/gpu" in (folder / "mpijob.yaml").read_text()
    (folder / "mpirun.sh").unlink()
    assert main(["plan", *flags]) == 2
    assert "is there already" in capsys.readouterr().err
    assert not (folder / "mpirun.sh").exists()


def test_the_manifest_is_an_mpijob() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    config, flags = read([*mixed(), "--device", "cuda"])
    manifest = yaml.safe_load(lines.mpijob(config, flags))
    jsonschema.validate(manifest, mpijob.schema())
    assert manifest["apiVersion"] == "kubeflow.org/v2beta1"
    assert manifest["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"] == 3
    manifest["spec"]["slotPerWorker"] = 2
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, mpijob.schema())


@pytest.mark.parametrize("name", ["A very long name, " * 5, "ÄÖ", "x_1.y"])
def test_a_job_has_a_name_that_kubernetes_takes(name: str) -> None:
    config, _ = read([*SYNTHETIC, "--name", name])
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", lines.job_name(config))


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("flags, expected", [
    (["--hosts", "0"], "hosts=0 is wrong"),
    (["--ranks_per_host", "-1"], "ranks_per_host=-1 is wrong"),
    (["--hosts", "x"], "hosts=x is wrong: give a whole number"),
    (["--hosts", "3", "--hostnames", "a,b"], "these are 2 names and hosts=3"),
    (["--hostnames", "a,,b"], "'' is no host's name"),
    (["--hostnames", "a,b;rm"], "'b;rm' is no host's name"),
    (["--hostnames", "a,a"], "twice"),
    (["--bandwidth_gbit", "0"], "bandwidth_gbit=0.0 is wrong"),
    (["--compute_ms", "-1"], "compute_ms=-1.0 is wrong"),
    (["--compute_ms", ".nan"], "compute_ms=nan is wrong"),
    (["--examples", "5"], "examples=5 is wrong"),
    (["--bandwith_gbit", "1"], "did you mean bandwidth_gbit"),
    (["--optim.learning_rate", "1"], "unknown --optim.learning_rate"),
    (["--noise.kind", "gnc", "--noise.radius", "1"], "virtual_workers=2 or more"),
    (["--hosts", "2", "--global_batch", "65"], "not divisible by the 2 workers"),
    (["--hosts", "2", "--noise.kind", "covariance", "--noise.emulated_batch", "129"],
     "the batch of all workers is 128"),
    (["--hosts", "2", "--exchange", "transpose"], "exchange='transpose'"),
    (["--hosts", "3", *GATHERED, "--exchange", "group:2"], "divides the 3 ranks"),
    (["--hosts", "2", *GATHERED, "--exchange", "gather-only", "--noise_precision", "fp16"],
     "in full"),
    (["--hosts", "1000"], "do not fill one step"),
    (["--model", "resnet21"], "did you mean"),
    (["--data.dataset", "synthetic", "--data.image_size", "8", "--model", "alexnet"],
     "cannot take images"),
    (["--config", "{folder}/own.yaml"], "unknown setting 'hosts'"),
    (["--write", "{folder}/own.yaml"], "write={folder}/own.yaml is wrong"),
    (["--data.dataset", "imagefolder", "--data.root", "{folder}"], "give --examples N"),
])
def test_a_mistake_is_one_line(flags: list[str], expected: str, tmp_path: Path, capsys: Any
                               ) -> None:
    (tmp_path / "own.yaml").write_text("hosts: 3\n")
    flags = [flag.replace("{folder}", str(tmp_path)) for flag in flags]
    assert main(["plan", *flags]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("hvdnoise: error: ") and not said.out
    assert expected.replace("{folder}", str(tmp_path)) in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.yaml"]


def test_a_gpu_need_not_be_here() -> None:
    config, flags = read([*SYNTHETIC, "--device", "cuda", "--hosts", "2"])
    assert config.device == "cuda" and flags[-2:] == ["--device", "cuda"]
