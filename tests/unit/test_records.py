"""What a run leaves behind: metrics, digests, folders; and that no record is worth a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdnoise.measured import Measured
from hvdnoise.training import progress, records
from hvdnoise.training.meter import Batches, Meter, noise_scale
from hvdnoise.training.records import Records, weights_digest
from tests.fake_world import ThreadWorld, run_threads


@pytest.fixture
def warnings(caplog: Any) -> Any:
    records.log.propagate = True
    caplog.set_level(logging.WARNING, logger="hvdnoise")
    return caplog


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_json_even_when_not_finite(tmp_path: Path) -> None:
    written = Records(tmp_path, rank=0, resumed_at=None, tensorboard=False)
    written.write("train", 3, {"loss": float("nan"), "accuracy": 0.5, "noise_rms": None})
    assert lines(tmp_path) == [{"kind": "train", "step": 3, "loss": None, "accuracy": 0.5,
                                "noise_rms": None}]


def test_only_rank_0_writes(tmp_path: Path) -> None:
    Records(tmp_path, rank=1, resumed_at=None, tensorboard=True).write("train", 1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path) -> None:
    first = Records(tmp_path, rank=0, resumed_at=None, tensorboard=False)
    for step in (1, 2, 3):
        first.write("train", step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    again = Records(tmp_path, rank=0, resumed_at=2, tensorboard=False)
    again.write("train", 3, {"loss": 30.0})
    assert [(each["step"], each["loss"]) for each in lines(tmp_path)] == [
        (1, 1.0), (2, 2.0), (3, 30.0)]


def test_events_hold_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    written = Records(tmp_path, rank=0, resumed_at=None, tensorboard=True)
    written.write("test", 5, {"test_accuracy": 0.75, "test_loss": None})
    written.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("test/test_accuracy")
    assert (event.step, event.value) == (5, 0.75)


def test_a_record_that_fails_is_warned_of_once_and_the_other_goes_on(
        tmp_path: Path, monkeypatch: Any, warnings: Any) -> None:
    written = Records(tmp_path, rank=0, resumed_at=None, tensorboard=True)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(written._events, "add_scalar", full)
    for step in (1, 2, 3):
        written.write("train", step, {"loss": 1.0})
    monkeypatch.setattr(written, "_append", full)
    for step in (4, 5):
        written.write("train", step, {"loss": 1.0})
    written.close()
    said = [each.getMessage() for each in warnings.records]
    assert len(said) == 2 and "TensorBoard" in said[0] and "metrics.jsonl" in said[1]
    assert all("No space left" in text and "training goes on" in text for text in said)
    assert [each["step"] for each in lines(tmp_path)] == [1, 2, 3]


def test_a_log_file_on_a_full_disk_is_one_warning(tmp_path: Path, warnings: Any,
                                                  capsys: Any) -> None:
    handler = records._LogFile(tmp_path / "rank-0.log")
    records.log.addHandler(handler)
    try:
        handler.stream.close()
        handler.stream = open("/dev/full", "w")
        records.log.setLevel(logging.INFO)
        records.log.info("one")
        records.log.info("two")
    finally:
        records.log.removeHandler(handler)
    said = [each.getMessage() for each in warnings.records if each.levelno == logging.WARNING]
    assert len(said) == 1 and "No space left" in said[0]
    assert "Traceback" not in capsys.readouterr().err


def test_the_digest_sees_names_types_shapes_and_bytes() -> None:
    base = {"a": torch.arange(4.0), "b": torch.tensor(3)}
    digest = weights_digest(base)
    assert digest == weights_digest({"b": torch.tensor(3), "a": torch.arange(4.0)})
    flipped = torch.arange(4.0)
    flipped[0] = -0.0  # equal in value, not in bits
    others = [{"a": flipped, "b": torch.tensor(3)}, {"c": base["a"], "b": base["b"]},
              {"a": base["a"].double(), "b": base["b"]},
              {"a": base["a"].view(2, 2), "b": base["b"]}, {"a": base["a"]}]
    assert len({digest, *map(weights_digest, others)}) == 6


def test_overwriting_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "weights.pt", "notes.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    records.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("how", ["plain", "emulated", "examples"])
def test_the_noise_scale_is_exact_on_expected_norms(how: str) -> None:
    b, B, M, trace, square = 4, 32, 8, 5.0, 2.0
    worker, total = square + trace / b, square + trace / B
    batches = Batches(b, B)
    if how == "emulated":  # covariance (1/M - 1/B) C is added to the mean
        total, batches = square + trace / M, Batches(b, B, M)
    if how == "examples":  # example n has weight 1 + sqrt((B-M)/M) xi_n, E|g_n|^2 = trace + square
        extra = (B - M) / M * (trace + square)
        worker, total = worker + extra / b, total + extra / B
        batches = Batches(b, B, M, from_examples=True)
    found = noise_scale(worker, total, batches)
    assert found == pytest.approx((trace / square, trace, square), rel=1e-12)


def test_a_noise_scale_that_is_not_there_is_none() -> None:
    assert noise_scale(1.0, 1.0, Batches(4, 4)) == (None, None, None)
    assert noise_scale(1.0, 1.0, Batches(4, 16, 4)) == (None, None, None)
    assert noise_scale(1.0, 0.1, Batches(4, 16))[0] is None  # |G|^2 estimated below 0
    assert noise_scale(1.0, 2.0, Batches(4, 16))[0] is None  # tr C estimated below 0


def test_the_meter_averages_over_ranks_and_before_it_divides() -> None:
    def work(world: ThreadWorld) -> dict[str, Any]:
        meter = Meter(Batches(2, 4), torch.device("cpu"))
        for norms in ((4.0, 2.0), (2.0, 2.0)):
            sums = torch.tensor([1.0 + world.rank, 1.0, 2.0], dtype=torch.float64)
            meter.add(sums, learning_rate=0.1, seconds=0.5, waiting=0.25, bad=False,
                      measured=Measured(norms[0], 99.0, norms[1], noise_rms=norms[0],
                                        noise_radius=norms[0],
                                        noise_share=None if norms[0] > 3 else 0.02))
        bad = torch.tensor([float(world.rank), 0, 2], dtype=torch.float64)
        meter.add(bad, learning_rate=0.1, seconds=0.5, waiting=0.25, bad=True,
                  measured=Measured(float("nan"), float("nan"), float("nan"), None))
        values = meter.flush(world)
        assert meter.steps == 0 and not meter.measured and float(meter.sums.sum()) == 0
        return values
    first, second = run_threads(2, work)
    assert first == second
    assert first["loss"] == pytest.approx((2 * 1 + 2 * 2 + 0 + 1) / 12)
    assert first["accuracy"] == pytest.approx(4 / 12) and first["bad_steps"] == 1
    assert first["examples_per_second"] == pytest.approx(12 / 1.5)
    # means 3 and 2: tr C = 1 / (1/2 - 1/4) = 4, |G|^2 = (4*2 - 2*3) / 2 = 1
    assert first["gradient_noise_scale"] == pytest.approx(4.0)
    assert first["noise_rms"] == first["noise_radius"] == pytest.approx(((16 + 4) / 2) ** 0.5)
    # a step in which nothing is known does not count
    assert (first["noise_share"], first["noise_lr_multiple"]) == (pytest.approx(0.02), None)


def test_plain_lines_say_how_far_and_how_long(caplog: Any) -> None:
    progress.log.propagate = True
    caplog.set_level(logging.INFO, logger="hvdnoise")
    shown = progress.Progress("lines", rank=0, total=40, done=10)
    for _ in range(10):
        shown.step()
    shown.show("loss 1.0")
    progress.Progress("lines", rank=1, total=40, done=10).show("from another rank")
    (record,) = caplog.records
    assert "[##########..........] step 20/40  loss 1.0  0:00 left" == record.getMessage()


def test_the_environment_names_the_image(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(records.sys, "prefix", str(tmp_path))
    monkeypatch.delenv("HVDNOISE_IMAGE", raising=False)

    def image() -> Any:
        return records.environment(["a"], {"local_size": 1})["image"]

    assert image() is None  # not in a container
    (tmp_path / "image.json").write_text('{"version": "1.2", "packages_sha256": "ab"}')
    assert image() == {"version": "1.2", "packages_sha256": "ab"}
    monkeypatch.setenv("HVDNOISE_IMAGE", "sha256:12")
    assert image() == {"version": "1.2", "packages_sha256": "ab", "digest": "sha256:12"}
    (tmp_path / "image.json").write_text("half a fi")
    assert image() == {"digest": "sha256:12"}
