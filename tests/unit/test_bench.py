"""The benchmark's parts in one process: names, problems, counters, memory, statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
import torch

from hvdnoise import register_covariance
from hvdnoise.bench import measure, models, report, variants
from hvdnoise.bench.config import BenchConfig, validate
from hvdnoise.bench.variants import SETS, Variant, names, parse
from hvdnoise.exchange_plan import Shape
from hvdnoise.noise import GNC, PNM, SAM
from hvdnoise.noise.base import ExampleNoise, MeanNoise, WorkerNoise
from hvdnoise.noise.full_examples import FullExampleCovariance
from hvdnoise.plans import PLAIN
from hvdnoise.training import plugins
from hvdnoise.training.config import ConfigError
from hvdnoise.training.options import parse as parse_settings
from tests.noises import forgotten_afterwards

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize("name, expected", [
    ("plain", Variant("plain")),
    ("gathered", Variant("gathered")),
    ("gathered:gather-only", Variant("gathered", "gather-only")),
    ("gathered:bf16", Variant("gathered", precision="bf16")),
    ("gathered:transpose:bf16:lag2", Variant("gathered", "transpose", "bf16", 2)),
    ("gnc-own:lag0", Variant("gnc-own", lag=0)),
])
def test_a_name_says_what_runs_and_comes_back(name: str, expected: Variant) -> None:
    assert parse(name) == expected
    assert expected.name == name


def test_options_come_in_any_order_and_defaults_add_nothing() -> None:
    assert parse("gathered:lag2:fp16:group").name == "gathered:group:fp16:lag2"
    assert parse("gathered:auto:fp32:lag1").name == "gathered"


@pytest.mark.parametrize("name, says", [
    ("gatherd", "did you mean gathered"),
    ("quux", "give some of plain, none"),
    ("gathered:sideways", "'sideways' is not an option of gathered"),
    ("gathered:bf16:fp16", "'fp16' is not an option of gathered here"),
    ("gathered:lag3", "'lag3'"),
    ("plain:lag1", "takes none"),
    ("gnc-own:transpose", "takes one of lag0, lag1, lag2"),
    ("gathered:gather-only:bf16", "own precision"),
    ("gathered:", "''"),
])
def test_other_names_are_one_line(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        parse(name)
    assert "\n" not in str(caught.value)


def test_plain_leads_every_list_and_no_name_comes_twice() -> None:
    assert names("none, ddp none") == (["plain", "none", "ddp"], True)
    assert names("default,gathered:lag1")[0] == list(SETS["default"])
    assert names("all") == ([parse(name).name for name in SETS["all"]], False)
    assert names("gathered:lag1:fp16,plain")[0] == ["plain", "gathered:fp16"]


def test_every_plan_is_among_all() -> None:
    assert {parse(name).plan for name in SETS["all"]} == set(variants.CHOICES)
    assert {parse(name).method for name in SETS["all"]} == set(variants.methods())


def test_what_the_optimizer_is_given() -> None:
    assert parse("gathered").options(2) == {} == parse("gnc-own").options(2)
    assert parse("gathered:group").options(4) == {"exchange": "group:4"}
    assert parse("gathered:transpose:fp16").options(2) == {"exchange": "transpose",
                                                           "noise_precision": "fp16"}
    numbers: dict[str, Any] = dict(radius=0.5, emulated_batch=8, batch_size=4, seed=3)
    for name, source in (("gathered", "gathered"), ("gnc-own", "own"),
                         ("gnc-isotropic", "isotropic")):
        noise = parse(name).noise(**numbers)
        assert isinstance(noise, GNC) and (noise.source, noise.seed) == (source, 3)
    acts = {name: parse(name).noise(**numbers) for name in ("plain", "none", "ddp")}
    assert set(acts.values()) == {None}
    for name, kind in (("full-workers", WorkerNoise), ("full-examples", ExampleNoise),
                       ("isotropic", MeanNoise), ("sam", SAM), ("pnm", PNM)):
        assert isinstance(parse(name).noise(**numbers), kind)


def test_predictions_are_those_of_costs() -> None:
    half = parse("gathered:transpose:bf16")
    assert half.predicted_bytes("transpose", 1000, 4, 2) == 0.75 * 1000 * (4 + 4 + 2)
    assert parse("gathered:group").predicted_bytes("group", 1000, 4, 2) == 6000 + 4000
    assert parse("gnc-own:lag0").predicted_bytes("allreduce", 1000, 4, 2) == 2 * (
        PLAIN.bytes_received(Shape(1000, 4)))
    for name in ("sam", "sam:lag=0", "stale-sam", "momentum-sam", "pnm"):  # a first pass stays
        assert parse(name).predicted_bytes("allreduce", 1000, 4, 2) == PLAIN.bytes_received(
            Shape(1000, 4))


# ---------------------------------------------------------------------------- registered noises

NUMBERS: dict[str, Any] = dict(radius=0.5, emulated_batch=8, batch_size=4, seed=3)


@pytest.fixture
def scaled() -> Iterator[None]:
    with forgotten_afterwards():
        plugins.load(["tests/noises/scaled.py"])
        yield


def test_a_registered_noise_is_a_variant(scaled: None) -> None:
    assert parse("scaled") == Variant("scaled") and "scaled" in variants.methods()
    noise = parse("scaled").noise(**NUMBERS)
    assert (noise.factor, noise.size, noise.seed) == (2.0, 0.5, 3)  # type: ignore[union-attr]
    variant = parse("scaled:lag=0:factor=3:lr=0.1")
    assert variant.name == "scaled:factor=3:lag=0:lr=0.1" and parse(variant.name) == variant
    noise = variant.noise(**NUMBERS)
    assert isinstance(noise, GNC)
    assert (getattr(noise, "factor"), noise.scale, noise.size, noise.lag) == (3.0, "lr", 0.1, 0)
    assert variant.predicted_bytes("allreduce", 1000, 4, 2) == 2 * PLAIN.bytes_received(
        Shape(1000, 4))
    assert names("scaled:factor=3,none")[0] == ["plain", "scaled:factor=3", "none"]


@pytest.mark.parametrize("name, says", [
    ("scald", "did you mean scaled"),
    ("scaled:fator=3", "'fator=3' is not an option here: give OPTION=VALUE, each of factor, "
                       "radius, lr, relative, share, source, lag, scope, per, echo at most once"),
    ("scaled:factor", "'factor' is not an option"), ("scaled:", "'' is not an option"),
    ("scaled:factor=1:factor=2", "at most once"), ("scaled:lag1", "'lag1' is not an option"),
    ("scaled:factor=big", "noise.factor=big is wrong: give a number"),
    ("scaled:factor=-1", "factor=-1.0 must be above 0")])
def test_its_wrong_options_are_one_line(scaled: None, name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(BenchConfig(model="comm:1k", variants=name), ranks=4)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_registered_covariance_is_a_variant() -> None:
    with forgotten_afterwards():
        @register_covariance("low-rank", "examples")
        class LowRank(FullExampleCovariance):
            def __init__(self, emulated_batch: int, *, rank: int = 3, **options: Any) -> None:
                super().__init__(emulated_batch, **options)
                self.rank = rank
        noise = parse("low-rank-examples:rank=5").noise(**NUMBERS)
        assert isinstance(noise, LowRank)
        assert (noise.rank, noise.emulated_batch, noise.batch_size, noise.seed) == (5, 8, 4, 3)
        with pytest.raises(ValueError, match="each of rank at most once"):
            parse("low-rank-examples:depth=5")
    with pytest.raises(ValueError, match="unknown"):
        parse("low-rank-examples")


def test_plugins_of_a_benchmark() -> None:
    with forgotten_afterwards():
        config = parse_settings(BenchConfig, ["--plugins", "tests/noises/scaled.py", "--model",
                                              "comm:1k", "--variants", "scaled:factor=3"],
                                program="hvdnoise bench")
        assert [each.name for each in validate(config, 2)] == ["plain", "scaled:factor=3"]

# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize("settings, says", [
    ({"rounds": 0}, "rounds=0 is wrong: give 1 or more"),
    ({"model": "resnet19"}, "model 'resnet19' is unknown: did you mean"),
    ({"model": "resnet20", "compute_ms": 5.0}, "compute_ms=5.0"),
    ({"model": "comm:many"}, "give comm:25M"),
    ({"model": "comm:0M"}, "give comm:25M"),
    ({"variants": "plain,gatherd"}, "did you mean gathered"),
    ({"variants": "gathered:group", "group_size": 3}, "groups of 3 ranks do not divide 4 ranks"),
    ({"emulated_batch": 1000}, "emulated_batch=1000"),
    ({"interface": "nowhere0"}, "interface=nowhere0 is wrong: this host has"),
    ({"lr": float("nan")}, "lr=nan"),
])
def test_bad_settings_are_one_line(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(BenchConfig(**{"model": "comm:1k", **settings}), ranks=4)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_with_a_benchmark_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a benchmark already"):
        validate(BenchConfig(model="comm:1k", out=str(tmp_path)), ranks=2)
    validate(BenchConfig(model="comm:1k", out=str(tmp_path), overwrite=True), ranks=2)


def test_one_rank_runs_what_needs_no_others() -> None:
    config = BenchConfig(model="comm:1k", variants="default")
    assert [each.name for each in validate(config, 1)] == ["plain", "none", "ddp", "sam"]
    with pytest.raises(ConfigError, match="needs 2 ranks and there is 1"):
        validate(BenchConfig(model="comm:1k", variants="gnc-own"), 1)

# ---------------------------------------------------------------------------- problems


def problem(name: str = "comm:10k", rank: int = 0, **options: Any) -> models.Problem:
    return models.make(name, **{"batch_size": 3, "image_size": 8, "compute_seconds": 0.0,
                                "seed": 5, "rank": rank, "device": CPU, **options})


@pytest.mark.parametrize("name, count, layers", [
    ("comm:25M", 25_000_000, 25), ("comm:2.5k", 2500, 4), ("comm:10.2M", 10_200_000, 10)])
def test_comm_models_have_the_numbers_that_they_say(name: str, count: int, layers: int) -> None:
    sizes = models.layer_sizes(models.numbers(name))
    assert sum(sizes) == count and len(sizes) == layers and max(sizes) - min(sizes) <= 1


def test_comm_gradients_are_the_preset_ones_weighed_by_example() -> None:
    made = problem()
    model = made.new_model()
    losses = made.losses(model)
    assert losses.shape == (3,)
    (losses * torch.tensor([0.5, 2.0, -1.0])).sum().backward()
    preset = model.gradient
    assert isinstance(preset, torch.Tensor) and preset.std() == pytest.approx(1e-3, rel=0.1)
    for layer in model.parameters():
        torch.testing.assert_close(layer.grad, 1.5 * preset[:layer.numel()])
    other = problem(rank=1).new_model()
    assert not torch.equal(torch.as_tensor(other.gradient), preset)
    for mine, others in zip(model.parameters(), other.parameters()):
        assert torch.equal(mine, others)


def test_comm_models_sleep_a_third_forward_and_two_thirds_backward(
        monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(models.time, "sleep", slept.append)
    made = problem(compute_seconds=0.6)
    loss = made.losses(made.new_model()).mean()
    assert slept == pytest.approx([0.05] * 4)  # four layers
    loss.backward()
    assert slept[4:] == pytest.approx([0.1] * 4)


def test_a_comm_backward_delivers_the_last_layer_first_and_sleeps_between(
        monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(models.time, "sleep", lambda seconds: seen.append("sleep"))
    made = problem(compute_seconds=0.6)
    model = made.new_model()
    loss = made.losses(model).mean()
    seen.clear()
    for index, layer in enumerate(model.parameters()):
        layer.register_post_accumulate_grad_hook(lambda p, index=index: seen.append(index))
    loss.backward()
    assert seen == ["sleep", 3, "sleep", 2, "sleep", 1, "sleep", 0]


def test_image_models_start_alike_on_data_of_their_own() -> None:
    made = [problem("small-cnn", rank=rank) for rank in (0, 1)]
    assert not torch.equal(made[0].inputs, made[1].inputs)
    first, second = (each.new_model().state_dict() for each in made)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert made[0].losses(made[0].new_model()).shape == (3,)

# ---------------------------------------------------------------------------- measuring


DEV = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop
    lo:    3193      29    0    0    0     0          0         0     3193      29    0    0
  eth0:115439187    3239    0    0    0     0          0         0   214070    1904    0    0
"""


def test_counters_of_the_interfaces() -> None:
    assert measure.received(DEV) == {"lo": 3193, "eth0": 115439187}
    assert measure.received("") == {}


def test_the_interface_is_the_one_asked_for_or_horovods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOROVOD_GLOO_IFACE", raising=False)
    assert measure.interface(None) == "lo"
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "eth0,eth1")
    assert (measure.interface(None), measure.interface("eth2")) == ("eth0", "eth2")


def test_hosts_differ_by_name_or_network() -> None:
    hosts = [{"host": host, "network": network} for host, network in (
        ("a", 1), ("b", 1), ("a", 1), ("a", 2), ("b", 1))]
    assert measure.first_ranks(hosts) == [0, 1, 3]
    if "lo" in measure.received():
        assert measure.address("lo") == "127.0.0.1"


def test_memory_of_a_known_allocation_also_when_it_was_freed_before_the_end() -> None:
    with measure.blocks_returned():
        before = measure.start_memory(CPU)
        if before is None:
            pytest.skip("this kernel does not let the peak be reset")
        kept = np.ones(4 * 2 ** 20)  # 32 MiB
        passing = np.ones(8 * 2 ** 20)  # 64 MiB
        del passing
        peak = measure.peak_memory(CPU) - before
        assert 95 < peak / 2 ** 20 < 100  # the kernel counts by batches of pages
        before = measure.start_memory(CPU)
        assert before is not None
        assert measure.peak_memory(CPU) - before < 2 * 2 ** 20  # the old peak is forgotten
        del kept


def test_time_is_the_mean_of_the_steps_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    lengths = iter([50.0, 1.0, 2.0, 6.0])

    def step() -> None:
        clock[0] += next(lengths)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    assert measure.seconds_per_step(step, 3, CPU) == 3.0

# ---------------------------------------------------------------------------- report


def made_up() -> dict[str, Any]:
    """A machine that gets twice as slow from round to round, and a variant that costs 1.5 x."""
    def variant(name: str, seconds: list[float], **others: Any) -> dict[str, Any]:
        return {"name": name, "plan": "allreduce", "reason": "", "predicted_bytes": 4000.0,
                "noise_memory": None, "seconds": seconds, "interface_bytes": [4000.0] * 5,
                "replicas_equal": True, "distance_moved": 1.0, "distance_from_plain": 0.0,
                "memory": [10_000, 12_000], **others}
    slow = [1.0, 2.0, 4.0, 8.0, 16.0]
    return {
        "settings": {"model": "comm:1k", "batch_size": 4, "compute_ms": 3.0, "rounds": 5,
                     "steps": 2, "seed": 0},
        "versions": {"torch": "2", "horovod": "0"}, "machine": {"cpu": "some", "cores": 2},
        "hosts": [{"host": "a", "network": 1}] * 2, "ranks": 2, "launcher": "none",
        "device": "CPU", "threads": 1, "interface": "lo", "parameters": 1000,
        "variants": [
            variant("plain", slow),
            variant("none", [1.5 * each for each in slow], memory=[13_000, 18_000],
                    noise_memory=6000, interface_bytes=[8000.0, 8100.0, 7900.0, 8000.0, 1e9]),
            variant("sam", [1.0, 3.0, 8.0, 32.0, 80.0], interface_bytes=[30.0] * 5,
                    memory=[None, 5], replicas_equal=False)]}


def test_ratios_are_formed_within_rounds() -> None:
    plain, none, sam = report.results(made_up())
    assert plain["seconds"] == {"median": 4.0, "q1": 2.0, "q3": 8.0}
    assert plain["ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    assert none["ratio"] == {"median": 1.5, "q1": 1.5, "q3": 1.5}  # whatever the machine did
    assert sam["ratio"] == {"median": 2.0, "q1": 1.5, "q3": 4.0}
    assert report.spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}


def test_bytes_and_memory_in_multiples_of_the_gradients() -> None:
    plain, none, sam = report.results(made_up())
    assert (none["bytes"], none["bytes_4P"], none["bytes_ratio"]) == (8000.0, 2.0, 2.0)
    assert none["predicted_4P"] == 1.0
    assert (plain["memory"], none["memory"]) == (12_000, 18_000)  # of the rank that takes most
    assert (none["memory_beside_plain"], none["memory_beside_plain_4P"]) == (6000, 1.5)
    assert none["noise_memory_4P"] == 1.5
    # nothing where nothing can be said
    assert (sam["bytes"], sam["bytes_4P"], sam["bytes_ratio"]) == (None, None, None)
    assert (sam["memory"], sam["memory_beside_plain_4P"], sam["noise_memory_4P"]) == (None,) * 3


def test_the_files_and_the_table(tmp_path: Path) -> None:
    record = made_up()
    record["results"] = report.results(record)
    report.write(record, tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text()) == record
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 and len({len(row) for row in rows}) == 1
    assert [cell.strip() for cell in rows[3].split("|")[1:-1]] == [
        "none", "allreduce", "6000.0 [3000.0, 12000.0]", "1.50 [1.50, 1.50]", "0.01", "2.00",
        "1.00",
        "2.00", "0", "+1.50", "1.50"]
    assert rows[4].count(" - ") == 6
    assert "2 ranks on 1 host" in text and "3 ms of emulated computation" in text
    assert "WARNING: sam: the ranks' weights differ." in text
    assert "does not see the exchange" in text and "btl" in text
