"""What a fair comparison needs of a run: test images unread until the end, choices made on held-out
images, batches drawn twice, counts of what it cost; also when the run was interrupted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdnoise.planning.config import read
from hvdnoise.planning.outline import outline
from hvdnoise.planning.report import predict
from hvdnoise.training import data, loop, milestones
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.evaluate import evaluate
from hvdnoise.training.images import Images
from hvdnoise.training.options import parse
from hvdnoise.training.rerun import find, restore
from hvdnoise.training.validation import validate
from tests.fake_world import ThreadWorld, run_threads
from tests.trainer import GNC, TINY, Never, metrics, poison, speaking, train

__all__ = ["speaking"]  # a fixture
pytestmark = pytest.mark.slow  # many seconds in all

HELD_OUT = ["--data.validation", "16", "--data.label_noise", "0.2", "--model", "mlp"]  # 4 steps


class Reads:
    """How often each image was read, of the training set and of the test set.

    ``test_at``: the steps that the run had taken when test images were read.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.test: Counter[int] = Counter()
        self.test_at: set[int] = set()
        self._step = 0
        real_build, real_step = data.build, loop.take_step

        def build(*arguments: Any, **options: Any) -> data.Datasets:
            found = real_build(*arguments, **options)
            self._count(found.test)
            return found

        def step(job: Any, *arguments: Any) -> None:
            real_step(job, *arguments)
            self._step = job.counters.step
        monkeypatch.setattr(data, "build", build)
        monkeypatch.setattr(loop, "take_step", step)

    def _count(self, images: Images) -> None:
        real = images.batch

        def batch(indices: Any, epoch: int | None) -> Any:
            self.test.update(indices)
            self.test_at.add(self._step)
            return real(indices, epoch)
        images.batch = batch  # type: ignore[method-assign]


def test_test_images_are_read_once_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                              ) -> None:
    reads = Reads(monkeypatch)
    flags = [*GNC, *HELD_OUT, "--ema", "0.9", "--epochs", "3"]
    whole = train(tmp_path / "whole", *flags)
    assert reads.test == Counter(range(12)) and reads.test_at == {12}  # a quarter of 48
    reads.test.clear()
    again = tmp_path / "again"
    for stop in (3, 7):  # in the middle of an epoch
        train(again, *flags, "--resume", "auto", stop_after=stop, expect=75)
        assert not reads.test
    resumed = train(again, *flags, "--resume", "auto")
    assert reads.test == Counter(range(12)) and reads.test_at == {12}
    ended = train(again, *flags, "--resume", "auto")  # once more, after its end
    for other in (resumed, ended):
        assert {key for key in whole if whole[key] != other[key]} <= {"seconds"}
    lines = [(line["kind"], line["step"]) for line in metrics(again)]
    assert lines == [(line["kind"], line["step"]) for line in metrics(tmp_path / "whole")]
    assert [step for kind, step in lines if kind == "validation"] == [4, 8, 12]
    assert [step for kind, step in lines if kind == "test"] == [12]


def test_without_held_out_images_all_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    reads = Reads(monkeypatch)
    done = train(tmp_path, *GNC, "--model", "mlp")
    assert reads.test == Counter({place: 2 for place in range(12)}) and reads.test_at == {6, 12}
    kinds = [line["kind"] for line in metrics(tmp_path)]
    assert kinds.count("test") == 2 and "validation" not in kinds
    assert "best_validation_accuracy" not in done and "validation_loss" not in done
    before = metrics(tmp_path)
    train(tmp_path, *GNC, "--model", "mlp", "--resume", "auto")
    assert [line["step"] for line in metrics(tmp_path)] == [line["step"] for line in before]


def test_scores_are_those_of_the_weights_that_are_left_behind(tmp_path: Path) -> None:
    """Computed anew from the weights' files, on images taken by hand."""
    flags = [*GNC, *HELD_OUT, "--ema", "0.9", "--epochs", "5", "--score_train", "--optim.lr", "0.3"]
    done = train(tmp_path, *flags)
    assert done["outcome"] == "finished" and done["steps"] == 20
    validations = [line for line in metrics(tmp_path) if line["kind"] == "validation"]
    best = max(validations, key=lambda line: line["validation_accuracy"])  # the first of equals
    assert done["best_step"] == best["step"]
    assert done["best_validation_accuracy"] == best["validation_accuracy"]
    assert "best_test_accuracy" in done

    def scores(which: str) -> dict[str, tuple[float, float]]:
        config, weights = find(str(tmp_path), which, None)
        sets, model = restore(config, weights, torch.device("cpu"))
        assert sets.validation is not None
        whole = data.build(data.DataConfig("synthetic", num_examples=48, image_size=8), seed=0)
        places = sets.validation.indices.tolist()  # type: ignore[attr-defined]
        parts = {"test": whole.test.batch(range(12), None),
                 "validation": whole.train.batch(places, None),
                 "train": sets.train.batch(range(32), None)}

        def work(world: ThreadWorld) -> dict[str, tuple[float, float]]:
            found = {}
            for name, part in parts.items():
                score = evaluate(model, [part], world, torch.device("cpu"))
                found[name] = score.loss, score.accuracy
            return found
        return run_threads(1, work)[0]
    for which, prefix, names in (("final", "", ("test", "validation", "train")),
                                 ("best", "best_", ("test",)), ("ema", "ema_", ("test",))):
        found = scores(which)
        for name in names:
            loss, accuracy = found[name]
            assert done[f"{prefix}{name}_loss"] == pytest.approx(loss, rel=1e-6)
            assert done[f"{prefix}{name}_accuracy"] == pytest.approx(accuracy)
    assert scores("best")["validation"][1] == pytest.approx(done["best_validation_accuracy"])
    (line,) = [line for line in metrics(tmp_path) if line["kind"] == "test"]
    assert {key: value for key, value in line.items() if "test_" in key} == {
        key: value for key, value in done.items() if "test_" in key}


def test_the_best_weights_go_with_the_checkpoint(tmp_path: Path) -> None:
    """A run that is resumed in another folder still has them, and their test score."""
    flags = [*GNC, *HELD_OUT, "--epochs", "4", "--optim.lr", "2.0", "--max_bad_steps", "99"]
    whole = train(tmp_path / "whole", *flags)
    train(tmp_path / "cut", *flags, stop_after=9, expect=75)
    moved = train(tmp_path / "moved", *flags, "--resume", str(tmp_path / "cut"))
    assert {key for key in whole if whole[key] != moved[key]} <= {"seconds"}
    files = [torch.load(tmp_path / name / "weights-best.pt", weights_only=True)
             for name in ("whole", "moved")]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_a_longer_run_has_one_line_of_test_scores(tmp_path: Path) -> None:
    train(tmp_path, *GNC, *HELD_OUT, "--epochs", "1")
    train(tmp_path, *GNC, *HELD_OUT, "--epochs", "2", "--resume", "auto")
    assert [line["step"] for line in metrics(tmp_path) if line["kind"] == "test"] == [8]


def test_a_diverged_run_says_so_and_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    flags = [*GNC, *HELD_OUT, "--max_bad_steps", "3", "--checkpoint.every_steps", "2"]
    with monkeypatch.context() as poisoned:
        poison(poisoned, set(range(2, 100)))
        with pytest.raises(loop.Diverged):
            train(tmp_path, *flags)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["outcome"] == "diverged" and summary["steps"] == 5
    assert "3 steps in a row, the last at step 5" in summary["reason"]
    assert set(summary) == {"outcome", "steps", "epochs", "seconds", "reason", "ranks", "workers",
                            "worker_batch", "global_batch", "noise", "config_sha256", "bad_steps",
                            "last_bad_step", "bad_workers"}
    assert train(tmp_path, *flags, "--resume", "auto")["outcome"] == "finished"


def test_a_batch_drawn_twice_and_resumed_between(tmp_path: Path) -> None:
    flags = [*GNC, "--data.repeat", "2", "--epochs", "1", "--model", "mlp"]
    whole = train(tmp_path / "whole", *flags)
    assert whole["steps"] == 12 and whole["epochs"] == 1  # 48 images, 8 a step, each twice
    train(tmp_path / "again", *flags, stop_after=5, expect=75)
    again = train(tmp_path / "again", *flags, "--resume", "auto")
    assert {key for key in whole if whole[key] != again[key]} <= {"seconds"}
    # another number of workers begins with a batch that is new, for the first time
    train(tmp_path / "resized", *flags, stop_after=5, expect=75)
    train(tmp_path / "resized", *flags, "--resume", "auto", "--resume_resize", "--virtual_workers",
          "4")  # 3 batches of 8 were drawn; the third batch of 16 is new
    log = (tmp_path / "resized" / "logs" / "rank-0.log").read_text()
    assert "resumed at step 4" in log


def test_gradient_evaluations_by_hand(tmp_path: Path) -> None:
    def evaluations(name: str, *flags: str) -> int:
        return int(train(tmp_path / name, "--model", "mlp", *flags)["gradient_evaluations"])
    plain = 2 * 6 * 8  # epochs, steps, examples
    assert evaluations("plain") == plain
    assert evaluations("split", "--accumulate", "2") == plain
    assert evaluations("lag-1", *GNC) == plain
    assert evaluations("lag-0", *GNC, "--noise.lag", "0") == 2 * plain
    diagonal = ["--noise.kind", "covariance", "--noise.emulated_batch", "2", "--noise.structure",
                "diagonal", "--noise.source", "examples", "--noise.every", "3"]
    assert evaluations("observed", *diagonal) == plain + plain // 3


@pytest.mark.parametrize("flags, passes", [
    (["--virtual_workers", "1"], 1), (GNC, 1), ([*GNC, "--noise.source", "gathered"], 1),
    ([*GNC, "--noise.source", "gathered", "--noise.lag", "0"], 2),
    (["--noise.kind", "sam", "--noise.radius", "0.1"], 1),  # the first pass stays on the rank
    (["--noise.kind", "covariance", "--noise.emulated_batch", "2", "--noise.structure", "diagonal"],
     1)])
def test_exchange_bytes_are_those_of_the_plan(tmp_path: Path, flags: list[str], passes: int
                                              ) -> None:
    shared = [*TINY, *flags, "--model", "mlp"]
    config = parse(TrainConfig, [*shared, "--run_dir", str(tmp_path)], program="hvdnoise train")
    validate(config, 2)
    assert run_threads(2, lambda world: loop.run(
        config, world, torch.device("cpu"), Never())) == [0, 0]  # type: ignore[arg-type]
    summary = json.loads((tmp_path / "summary.json").read_text())
    planned, _ = read([*shared, "--ranks_per_host", "2"])
    run = outline(planned)
    assert summary["steps"] == run.total_steps > 0
    found = {each.plan: each.received for each in predict(planned, run)
             if each.precision == "fp32"}
    step = found[run.plan.name] + (passes - 1) * 4 * run.parameters  # 2 (R-1)/R = 1
    assert summary["exchange_bytes"] == pytest.approx(run.total_steps * step, rel=1e-12)


def test_a_rank_alone_receives_nothing(tmp_path: Path) -> None:
    done = train(tmp_path, *GNC, "--noise.source", "gathered", "--epochs", "1", "--model", "mlp")
    assert done["exchange_bytes"] == 0


def test_ranks_choose_the_same_best_weights(tmp_path: Path) -> None:
    """Batch norm: each rank has its own statistics, and what is scored and kept is their mean."""
    config = parse(TrainConfig, [
        *TINY, *GNC, "--data.validation", "16", "--norm", "batch", "--virtual_workers", "1",
        "--run_dir", str(tmp_path)], program="hvdnoise train")
    kept: list[Any] = []
    real = milestones.finish

    def finish(job: Any, *arguments: Any) -> None:
        kept.append(job.best)
        real(job, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "finish", finish)
        run_threads(2, lambda world: loop.run(
            config, world, torch.device("cpu"), Never()))  # type: ignore[arg-type]
    file = torch.load(tmp_path / "weights-best.pt", weights_only=True)
    assert len(kept) == 2
    for state in kept:
        assert all(torch.equal(state[name], file[name]) for name in file)


def test_settings_that_leave_nothing_are_refused_before_the_start(tmp_path: Path) -> None:
    for flags, text in (
            (["--data.validation", "48"], "data.validation=48 leaves none of the 48"),
            (["--data.validation", "41"], "7 training examples do not fill one step"),
            (["--model", "mlp", "--norm", "batch"], "norm=batch does nothing in model 'mlp'")):
        with pytest.raises(ConfigError, match=text):
            train(tmp_path / "none", *flags)
    assert not (tmp_path / "none").exists()
