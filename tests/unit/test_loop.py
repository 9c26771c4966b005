"""The training loop in one process: every kind of step, bad steps, resuming, bit for bit."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdnoise.training import checkpoint, loop
from hvdnoise.training.checkpoint import CheckpointError
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.options import parse
from hvdnoise.world import handshake
from tests.fake_world import ThreadWorld, run_threads
from tests.trainer import GNC, TINY, Never, metrics, poison, speaking, train

__all__ = ["speaking"]  # a fixture
pytestmark = pytest.mark.slow  # many seconds in all

KINDS = {
    "plain": ["--virtual_workers", "1"],
    "gnc": GNC,
    "gathered": [*GNC, "--noise.source", "gathered", "--accumulate", "2"],
    "lag 0": [*GNC, "--noise.lag", "0", "--clip_norm", "1"],
    "workers": ["--noise.kind", "covariance", "--noise.emulated_batch", "2"],
    "examples": ["--noise.kind", "covariance", "--noise.emulated_batch", "2", "--noise.source",
                 "examples", "--accumulate", "2"],
    "isotropic": ["--noise.kind", "covariance", "--noise.emulated_batch", "2",
                  "--noise.structure", "isotropic"],
    "diagonal": ["--noise.kind", "covariance", "--noise.emulated_batch", "2",
                 "--noise.structure", "diagonal", "--accumulate", "2", "--noise.every", "3"],
    "diagonal examples": ["--noise.kind", "covariance", "--noise.emulated_batch", "2",
                          "--noise.structure", "diagonal", "--noise.source", "examples",
                          "--noise.labels", "sampled", "--noise.every", "3", "--precision", "bf16"],
    "gnc and layerwise": [*GNC, "--noise.also", json.dumps([
        {"kind": "covariance", "structure": "diagonal", "emulated_batch": 2, "every": 3}])],
    "bf16 ema": [*GNC, "--precision", "bf16", "--ema", "0.9", "--label_smoothing", "0.1"],
    "fp16": [*GNC, "--precision", "fp16"],
    "adamw": [*GNC, "--optim.name", "adamw", "--optim.lr", "0.001"],
    "lamb": [*GNC, "--optim.name", "lamb", "--optim.lr", "0.001"],
    "lars": ["--optim.name", "lars", "--lr.scaling", "linear", "--lr.warmup_epochs", "0.5"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path: Path, kind: str) -> None:
    flags = KINDS[kind]
    whole = train(tmp_path / "whole", *flags)
    assert whole["steps"] == (24 if kind == "plain" else 12)
    again = tmp_path / "again"
    assert train(again, *flags, stop_after=2, expect=75) == {}
    assert json.loads((again / "preempted.json").read_text()) == {"step": 2}
    assert train(again, *flags, "--resume", "auto", stop_after=5, expect=75) == {}
    resumed = train(again, *flags, "--resume", "auto")
    differ = {key for key in whole if whole[key] != resumed[key]}
    assert differ <= {"seconds"}
    assert not (again / "preempted.json").exists()
    assert [line["step"] for line in metrics(again)] == [line["step"] for line in
                                                         metrics(tmp_path / "whole")]


def test_batch_norm_and_dropout_resume_too(tmp_path: Path) -> None:
    flags = [*GNC, "--data.image_size", "32", "--data.num_examples", "32", "--epochs", "1",
             "--ema", "0.9"]
    whole = train(tmp_path / "whole", *flags, model="mobilenet_v3_small")
    train(tmp_path / "again", *flags, model="mobilenet_v3_small", stop_after=2, expect=75)
    resumed = train(tmp_path / "again", *flags, "--resume", "auto", model="mobilenet_v3_small")
    assert whole["weights_sha256"] == resumed["weights_sha256"]
    assert whole["weights_ema_sha256"] == resumed["weights_ema_sha256"]


def test_the_spectrum_is_a_line_of_its_own(tmp_path: Path) -> None:
    train(tmp_path / "two", *GNC, "--epochs", "1", "--spectrum_every", "2", "--log_every", "1")
    lines = [line for line in metrics(tmp_path / "two") if line["kind"] == "covariance"]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["trace"] > 0 and line["stable_rank"] == pytest.approx(1.0)  # of two workers
        shares = [value for key, value in line.items() if key.startswith("share/")]
        assert sum(shares) == pytest.approx(1.0) and len(shares) > 3
    train(tmp_path / "one", "--virtual_workers", "1", "--epochs", "1", "--spectrum_every", "2")
    assert all(line["kind"] != "covariance" for line in metrics(tmp_path / "one"))


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    digests = {train(tmp_path / name, *GNC, "--epochs", "1", *flags)["weights_sha256"]
               for name, flags in (("a", []), ("b", []), ("c", ["--seed", "1"]))}
    assert len(digests) == 2


def test_a_finished_run_can_be_started_again_and_stays_what_it_was(tmp_path: Path) -> None:
    first = train(tmp_path, *GNC, "--epochs", "1")
    second = train(tmp_path, *GNC, "--epochs", "1", "--resume", "auto")
    assert first.pop("seconds") >= 0 and second.pop("seconds") >= 0 and first == second


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    train(tmp_path, *GNC, "--epochs", "1")
    with pytest.raises(ConfigError, match="optim.lr .was 0.05, is 0.1."):
        train(tmp_path, *GNC, "--epochs", "1", "--resume", "auto", "--optim.lr", "0.1")
    with pytest.raises(ConfigError, match="virtual_workers .was 2, is 4."):
        train(tmp_path, *GNC, "--epochs", "1", "--resume", "auto", "--virtual_workers", "4")


def test_resize_goes_on_with_examples_that_are_new(tmp_path: Path) -> None:
    flags = [*GNC, "--checkpoint.every_epochs", "0"]
    train(tmp_path, *flags, stop_after=7, expect=75)  # epoch 1, step 1 of 6
    done = train(tmp_path, *flags, "--resume", "auto", "--resume_resize", "--virtual_workers", "4")
    assert done["steps"] == 6 and done["workers"] == 4  # 3 steps an epoch: 3 + 1, then 2 more
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "resumed with another number of workers" in log and "resumed at step 4" in log


def test_a_longer_run_says_that_its_schedule_changes(tmp_path: Path) -> None:
    train(tmp_path, *GNC, "--epochs", "1")
    done = train(tmp_path, *GNC, "--epochs", "3", "--resume", "auto")
    assert done["steps"] == 18
    assert "schedule of the new length" in (tmp_path / "logs" / "rank-0.log").read_text()
    rates = {line["step"]: line["learning_rate"] for line in metrics(tmp_path)
             if line["kind"] == "train"}
    assert rates[6] < 0.01 < rates[8]  # the old schedule had come to its end


def test_a_broken_newest_checkpoint_costs_one_interval_and_no_bit(tmp_path: Path) -> None:
    flags = [*GNC, "--checkpoint.every_steps", "2", "--checkpoint.keep", "3"]
    whole = train(tmp_path / "whole", *flags)
    train(tmp_path / "again", *flags, stop_after=6, expect=75)
    newest = tmp_path / "again" / "checkpoints" / "step-00000006" / "rank-0.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = train(tmp_path / "again", *flags, "--resume", "auto")
    assert whole["weights_sha256"] == resumed["weights_sha256"]
    log = (tmp_path / "again" / "logs" / "rank-0.log").read_text()
    assert "step-00000006 is broken" in log and "resumed at step 4" in log
    for path in (tmp_path / "again" / "checkpoints").glob("*/shared.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        train(tmp_path / "again", *flags, "--resume", "auto")


@pytest.mark.parametrize("kind", ["gnc", "lag 0", "fp16", "workers", "bf16 ema", "adamw", "lamb"])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(
        tmp_path: Path, monkeypatch: Any, kind: str) -> None:
    poison(monkeypatch, {3})
    done = train(tmp_path, *KINDS[kind])
    assert done["bad_steps"] == (2 if kind == "fp16" else 1)  # fp16's first scale is too large
    assert done["steps"] == 12
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    (line,) = [line for line in metrics(tmp_path) if line["kind"] == "train" and line["step"] == 4]
    assert line["bad_steps"] == 1 and line["loss"] is None


def test_a_bad_step_changes_no_weight(tmp_path: Path, monkeypatch: Any) -> None:
    """A run whose only step is bad ends where it began."""
    flags = [*GNC, "--epochs", "0.1"]
    poison(monkeypatch, {0})
    bad = train(tmp_path / "bad", *flags)
    assert bad["steps"] == 1 == bad["bad_steps"]
    begun = tmp_path / "begun"
    train(begun, *flags, stop_after=0, expect=75)
    start = torch.load(begun / "checkpoints" / "step-00000000" / "shared.pt", weights_only=True)
    weights = torch.load(tmp_path / "bad" / "weights.pt", weights_only=True)
    assert all(torch.equal(start["model"][name], weights[name]) for name in weights)


def test_too_many_bad_steps_end_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    poison(monkeypatch, set(range(2, 100)))
    with pytest.raises(loop.Diverged, match="3 steps in a row, the last at step 5"):
        train(tmp_path, *GNC, "--max_bad_steps", "3")


def test_virtual_workers_stand_for_ranks(tmp_path: Path, monkeypatch: Any) -> None:
    """1 x 4, 2 x 2 and 4 x 1 on the same data: the same losses, to rounding (METHODS.md section
    6)."""
    one_at_a_time, real = threading.Lock(), loop.build

    def build(*arguments: Any) -> Any:  # threads share the generator that draws initial weights
        with one_at_a_time:
            return real(*arguments)
    monkeypatch.setattr(loop, "build", build)

    def losses(ranks: int, virtual: int) -> list[float]:
        folder = tmp_path / f"{ranks}x{virtual}"
        config = parse(TrainConfig, [*TINY, *GNC, "--virtual_workers", str(virtual), "--run_dir",
                                     str(folder)], program="hvdnoise train")

        def work(world: ThreadWorld) -> int:
            return loop.run(config, world, torch.device("cpu"), Never())  # type: ignore
        assert run_threads(ranks, work) == [0] * ranks
        return [line["loss"] for line in metrics(folder) if line["kind"] == "train"]
    alone = losses(1, 4)
    assert losses(2, 2) == pytest.approx(alone, rel=1e-4)
    assert losses(4, 1) == pytest.approx(alone, rel=1e-4)


def test_what_fails_on_one_rank_is_one_error_on_all(tmp_path: Path) -> None:
    def work(world: ThreadWorld) -> str:
        def action() -> int:
            if world.rank == 1:
                raise OSError("no space")
            return 3
        with pytest.raises(ConfigError) as caught:
            loop.call_or_raise(world, action)
        return str(caught.value)
    assert run_threads(3, work) == ["no space (rank 1)"] * 3


def test_with_several_hosts_an_error_names_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {f"rank {rank}": f"node{rank // 2 + 1}" for rank in range(4)}
    monkeypatch.setattr("socket.gethostname", lambda: nodes[threading.current_thread().name])

    def work(world: ThreadWorld) -> list[str]:
        def fail() -> None:
            if world.rank == 3:
                raise OSError("no space")
        said = []
        for action in (lambda: handshake(world, {"torch": world.rank < 2}),
                       lambda: loop.call_or_raise(world, fail),
                       lambda: checkpoint.gather_or_raise(world, "write", fail)):
            with pytest.raises((ValueError, ConfigError, CheckpointError)) as caught:
                action()
            said.append(str(caught.value))
        return said
    for shaken, together, written in run_threads(4, work):
        assert "rank 0: torch on rank 2 of node2, rank 3 of node2; start all" in shaken
        assert together == "no space (rank 3 of node2)"
        assert written.startswith("rank 3 of node2 could not write (OSError: no space)")


def test_a_full_disk_at_a_checkpoint_is_an_error_on_all_ranks(tmp_path: Path,
                                                              monkeypatch: Any) -> None:
    from hvdnoise.training import checkpoint
    flags = [*GNC, "--checkpoint.every_steps", "2"]
    real = checkpoint._write

    def full(path: Path, state: Any) -> Any:
        if "step-00000006" in str(path):
            raise OSError(28, "No space left on device")
        return real(path, state)
    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(tmp_path, *flags)
    monkeypatch.setattr(checkpoint, "_write", real)
    assert [path.name for path in checkpoint.found(tmp_path / "checkpoints")] == [
        "step-00000004", "step-00000002"]
    train(tmp_path, *flags, "--resume", "auto")
