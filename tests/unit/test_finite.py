"""Nothing that is not finite gets into a file, and nothing that is damaged out of one."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import threading
import zipfile
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

from hvdnoise.training import checkpoint, finite, loop, rerun, weights
from hvdnoise.training.checkpoint import NotFiniteError
from hvdnoise.training.config import TrainConfig
from hvdnoise.training.errors import Diverged
from hvdnoise.training.job import Job
from hvdnoise.training.options import parse
from hvdnoise.training.saver import Saver
from tests.fake_world import ThreadWorld, run_threads
from tests.folders import save_checkpoint
from tests.trainer import GNC, TINY, Never, poison, speaking, train

__all__ = ["speaking"]  # a fixture
pytestmark = pytest.mark.slow  # many seconds in all
BATCH_NORM = [*GNC, "--norm", "batch", "--ema", "0.9", "--checkpoint.every_steps", "1"]


# ---------------------------------------------------------------------- writing


def test_every_tensor_and_number_is_looked_at() -> None:
    state = {"a": torch.ones(3), "b": {"c": [1, (torch.zeros(2), 2.0)], "d": "nan", "e": None},
             "config": {"clip": float("inf")}, "f": torch.zeros(0), "g": torch.ones(2) > 0,
             "h": torch.full((9,), 3e38), "i": torch.tensor([6e4] * 9, dtype=torch.float16)}
    finite.check(state)
    state["b"]["c"][1][0][1] = float("nan")  # type: ignore[index]
    with pytest.raises(finite.NotFinite, match=r"^b.c.1.0 is not finite \(1 of 2 numbers\)$"):
        finite.check(state)
    with pytest.raises(finite.NotFinite, match=r"^x.y is not finite \(inf\)$"):
        finite.check({"x": {"y": float("inf")}})
    with pytest.raises(finite.NotFinite, match=r"^inner.config.0 is not finite \(nan\)$"):
        finite.check({"inner": {"config": [float("nan")]}})
    assert finite.first({"a": torch.ones(2), "b": torch.tensor([1, torch.inf])}) == "b"


def test_a_checkpoint_that_is_not_finite_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    def work(world: ThreadWorld, step: int, value: float) -> str:
        own = {"noise": {"rows": torch.tensor([1.0, value if world.rank == 1 else 0.0])}}
        shared = {"model": {"w": torch.ones(2)}} if world.rank == 0 else None
        try:
            save_checkpoint(tmp_path, step, shared, own, world, keep=1)
        except NotFiniteError as error:
            return str(error)
        return ""
    assert run_threads(2, lambda world: work(world, 1, 0.0)) == ["", ""]
    texts = run_threads(2, lambda world: work(world, 2, float("nan")))
    assert texts[0] == texts[1] and texts[0].startswith(
        "noise.rows is not finite (1 of 2 numbers) on rank 1, and is not written")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


PLACES: dict[str, Callable[[Job], torch.Tensor]] = {
    "optimizer.state.0.momentum_buffer": lambda job: job.optimizer.state[
        next(job.model.parameters())]["momentum_buffer"],
    "ema.module.0.weight": lambda job: job.ema.state_dict()["module.0.weight"],  # type: ignore
    "model.0.weight": lambda job: job.model.state_dict()["0.weight"],
    "model.2.running_var": lambda job: job.model.state_dict()["2.running_var"]}


@pytest.mark.parametrize("place, first", [*((place, "checkpoint") for place in PLACES),
                                          ("model.0.weight", "step")])
def test_a_run_ends_before_it_writes_what_is_not_finite(
        tmp_path: Path, place: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the checkpoint or the step after it is done first."""
    real, start, write = loop.take_step, Saver.start, checkpoint.write

    def take_step(job: Job, *arguments: Any) -> None:
        real(job, *arguments)
        if job.counters.step == 4:
            with torch.no_grad():
                PLACES[place](job).view(-1)[0] = float("inf")

    def start_and_wait(saver: Saver, *arguments: Any) -> None:
        start(saver, *arguments)
        saver.wait()

    def write_late(*arguments: Any) -> Any:
        failed.wait(60 if "step-00000004" in str(arguments[0]) else 0)
        return write(*arguments)

    def fail(*arguments: Any) -> None:
        diverged(*arguments)
        failed.set()
    failed, diverged = threading.Event(), loop.diverged
    monkeypatch.setattr(loop, "take_step", take_step)
    if first == "checkpoint":
        error: type[Exception] = NotFiniteError
        text = rf"^{place} is not finite \(1 of .* on rank 0"
        monkeypatch.setattr(Saver, "start", start_and_wait)
    else:
        error, text = Diverged, "^the weight 0.weight of rank 0 is not finite at step 5"
        monkeypatch.setattr(checkpoint, "write", write_late)
        monkeypatch.setattr(loop, "diverged", fail)
    with pytest.raises(error, match=text):
        train(tmp_path, *BATCH_NORM)
    assert checkpoint.found(tmp_path / "checkpoints")[0].name == "step-00000003"
    assert json.loads((tmp_path / "summary.json").read_text())["outcome"] == "diverged"
    assert not (tmp_path / "weights.pt").exists()


def test_with_nan_in_every_step_the_newest_checkpoint_is_that_of_before(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        poison(patch, set(range(5, 99)))
        with pytest.raises(Diverged, match="4 steps in a row, the last at step 9"):
            train(tmp_path / "bad", *BATCH_NORM, "--max_bad_steps", "4")
    summary = json.loads((tmp_path / "bad" / "summary.json").read_text())
    assert (summary["outcome"], summary["bad_steps"], summary["last_bad_step"]) == (
        "diverged", 4, 9)
    assert summary["bad_workers"] == {"rank 0, worker 0": 4}
    newest = checkpoint.found(tmp_path / "bad" / "checkpoints")[0]
    assert newest.name == "step-00000008"  # three bad steps later
    train(tmp_path / "stopped", *BATCH_NORM, stop_after=5, expect=75)
    before = tmp_path / "stopped" / "checkpoints" / "step-00000005"
    states = [[torch.load(folder / name, weights_only=True) for name in ("shared.pt", "rank-0.pt")]
              for folder in (newest, before)]
    for (shared, own), (expected, own_expected) in zip(*[iter(states)] * 2):
        for key in ("model", "ema"):
            assert all(torch.equal(shared[key][name], expected[key][name])
                       for name in expected[key])
        assert all(torch.equal(own["buffers"][name], value)
                   for name, value in own_expected["buffers"].items())
    train(tmp_path / "bad", *BATCH_NORM, "--resume", "auto")  # whose steps are good


def test_a_run_resumed_after_a_bad_step_ends_in_the_same_bits(tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch
                                                              ) -> None:
    """The displacement of a step that was not taken is not that of the next one: its learning rate
    is another. With one worker a rank the old one was at hand."""
    real_build = loop.build

    def build(*arguments: Any) -> Any:
        with lock:
            return real_build(*arguments)
    lock = threading.Lock()
    monkeypatch.setattr(loop, "build", build)
    poison(monkeypatch, {3})
    flags = [*BATCH_NORM, "--noise.radius", "null", "--noise.lr", "1", "--virtual_workers", "1"]

    def runs(folder: Path, *more: str, stop: int | None = None) -> None:
        config = parse(TrainConfig, [*TINY, *flags, "--run_dir", str(folder), *more],
                       program="hvdnoise train")
        run_threads(2, lambda world: loop.run(config, world, torch.device("cpu"),
                                              Never(stop)))  # type: ignore[arg-type]
    runs(tmp_path / "whole")
    runs(tmp_path / "again", stop=4)
    runs(tmp_path / "again", "--resume", "auto")
    whole, again = (json.loads((tmp_path / name / "summary.json").read_text())
                    for name in ("whole", "again"))
    assert {key for key in whole if whole[key] != again[key]} <= {"seconds"}
    assert whole["bad_steps"] == 1 and set(whole["bad_workers"].values()) == {1}


# ---------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train(folder, *GNC, "--epochs", "0.2", "--ema", "0.9", model="mlp")
    return folder


def refused(folder: Path, which: str = "final") -> str:
    """The one line with which the weights are refused."""
    config, path = rerun.find(str(folder), which, None)
    with pytest.raises(ValueError) as caught:
        rerun.restore(config, path, torch.device("cpu"))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 900
    return text


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_whole_weights_are_read(run: Path) -> None:
    for which in ("final", "best", "ema", str(next((run / "checkpoints").iterdir()))):
        config, path = rerun.find(str(run), which, None)
        rerun.restore(config, path, torch.device("cpu"))


@pytest.mark.parametrize("name", ["weights.pt", "weights-best.pt"])
@pytest.mark.parametrize("summary", ["there", "older", "none"])
def test_flipped_bits_are_noticed(copied: Path, name: str, summary: str) -> None:
    """200 of them, one by one: any, where the summary has the file's digest; else each that changes
    a weight."""
    if summary == "none":
        (copied / "summary.json").unlink()
    elif summary == "older":
        facts = json.loads((copied / "summary.json").read_text())
        del facts["files_sha256"]
        (copied / "summary.json").write_text(json.dumps(facts))
    whole, rng = (copied / name).read_bytes(), random.Random(4)
    expected = weights.read(copied / name)
    noticed = 0
    for _ in range(200):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (copied / name).write_bytes(content)
        try:
            found = weights.read(copied / name)
        except ValueError as error:
            assert "\n" not in str(error)
            noticed += 1
        else:
            assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert noticed == 200 if summary == "there" else noticed > 180
    content = bytearray(whole)
    for _ in range(200):  # all at once
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    (copied / name).write_bytes(content)
    refused(copied, "final" if name == "weights.pt" else "best")


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code was run')",)


def put(folder: Path, how: str) -> None:
    """Another file in the place of the weights."""
    path = folder / "weights.pt"
    whole = path.read_bytes()
    if how == "truncated":
        path.write_bytes(whole[:-1000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("weights")
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif how == "pickle in a zip":
        torch.save({"0.weight": Evil()}, path)
    elif how == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weights/data.txt", "weights")
    elif how == "list":
        torch.save([torch.ones(3)], path)
    elif how == "numbers":
        torch.save({"0.weight": 3.0}, path)
    elif how == "another network's":
        torch.save({"0.weight": torch.ones(3)}, path)
    elif how == "another run's":
        state = torch.load(path, weights_only=True)
        torch.save({name: value * 2 for name, value in state.items()}, path)
    elif how == "not finite":
        state = torch.load(path, weights_only=True)
        state["1.bias"][3] = float("nan")
        torch.save(state, path)


OTHERS = {"truncated": "damaged, or no file", "empty": "damaged, or no file",
          "text": "damaged, or no file", "pickle": "damaged, or no file",
          "pickle in a zip": "cannot be read", "another zip": "cannot be read",
          "list": "holds no weights by name", "numbers": "holds no weights by name",
          "another network's": "does not fit the model",
          "not finite": "holds 1.bias, which is not finite",
          "another run's": ""}


@pytest.mark.parametrize("how", OTHERS)
def test_another_file_in_the_place_of_the_weights(copied: Path, how: str) -> None:
    put(copied, how)
    text = refused(copied)
    assert "SHA-256 of the run's summary.json" in text
    facts = json.loads((copied / "summary.json").read_text())
    del facts["files_sha256"]
    (copied / "summary.json").write_text(json.dumps(facts))
    text = refused(copied)
    if how in ("another run's", "another network's", "not finite"):
        assert "does not hold the weights of the run's summary.json" in text
    (copied / "summary.json").unlink()
    if OTHERS[how]:
        assert OTHERS[how] in refused(copied)
    (copied / "summary.json").write_text("[" * 9000)
    assert "summary.json cannot be read" in refused(copied)


def test_a_checkpoint_of_something_else(copied: Path) -> None:
    folder = next((copied / "checkpoints").iterdir())
    for state in ([1], {"model": 3}, {"model": {"0.weight": "text"}}, {}):
        torch.save(state, folder / "shared.pt")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["shared.pt"] = checkpoint._facts(folder / "shared.pt")
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert "holds no weights by name" in refused(copied, str(folder))
