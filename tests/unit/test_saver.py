"""Checkpoints beside the training: it goes on meanwhile, and all ranks end one at the same step."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

from hvdnoise.training import checkpoint, saver
from hvdnoise.training.checkpoint import CheckpointError, NotFiniteError
from hvdnoise.training.saver import Saver
from tests.fake_world import ThreadWorld, run_threads

Writing = Callable[[Path, Any], Any]


class Gate:
    """Writes of checkpoints wait, file by file, until they are let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: str = "") -> None:
        self.open, self.fail = dict[str, threading.Event](), fail
        self._real: Writing = checkpoint._write
        monkeypatch.setattr(checkpoint, "_write", self._write)

    def hold(self, name: str) -> None:
        self.open[name] = threading.Event()

    def _write(self, path: Path, state: Any) -> Any:
        if path.name in self.open:
            assert self.open[path.name].wait(20), path
        if f"{path.parent.name}/{path.name}" == self.fail:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._real(path, state)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_training_goes_on_and_the_ranks_end_it_at_the_same_step(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of rank 1 is late. What is written is what was there at the start of it."""
    gate = Gate(monkeypatch)
    gate.hold("rank-1.pt")

    def work(world: ThreadWorld) -> list[int]:
        weights = {"w": torch.full((3,), 7.0)}
        saves = Saver(tmp_path, world, keep=2)
        saves.start(7, {"model": weights, "n": [1, (2.0, "x")]}, {"rank": world.rank})
        seen = []
        for step in range(8, 20):
            saves.poll()
            seen.append(len(checkpoint.found(tmp_path / "checkpoints")))
            weights["w"] += 1.0
            world.barrier(f"step-{step}")
            if step == 9 and world.rank == 0:
                saves._written.result(20)
            if step == 11 and world.rank == 1:
                gate.open["rank-1.pt"].set()
                saves._written.result(20)
        saves.poll()
        return seen
    first, second = run_threads(2, work)
    assert first[:4] == [0] * 4 and first[-1] == 1, first
    # rank 0 renames, and rank 1 knows of it when poll returns
    assert first == second and first.index(1) <= 6
    folder = tmp_path / "checkpoints" / "step-00000007"
    checkpoint.check(folder)
    shared = checkpoint.read(folder / "shared.pt")
    assert shared == {"model": {"w": shared["model"]["w"]}, "n": [1, (2.0, "x")]}
    assert shared["model"]["w"].tolist() == [7.0] * 3
    assert [checkpoint.read(folder / f"rank-{rank}.pt")["rank"] for rank in (0, 1)] == [0, 1]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_one_at_a_time(tmp_path: Path, size: int) -> None:
    """Each start waits for the one before; step is that of the last; keep holds."""
    def work(world: ThreadWorld) -> None:
        saves = Saver(tmp_path, world, keep=2)
        assert saves.step == -1
        for step in (3, 5, 8):
            saves.start(step, {"step": step}, {"w": torch.full((2,), float(step + world.rank))})
            assert saves.step == step
            if step == 5:
                saves.poll()
        saves.wait()
        saves.wait()
        saves.poll()
    run_threads(size, work)
    assert names(tmp_path) == ["step-00000005", "step-00000008"]
    for step in (5, 8):
        for rank in range(size):
            own = checkpoint.read(tmp_path / "checkpoints" / f"step-0000000{step}" /
                                  f"rank-{rank}.pt")
            assert own["w"].tolist() == [step + rank] * 2  # its memory was not taken too early


def test_a_rank_that_cannot_write_is_an_error_on_all_at_a_boundary(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Gate(monkeypatch, fail="step-00000002.tmp/rank-1.pt")

    def work(world: ThreadWorld) -> tuple[int, str]:
        saves = Saver(tmp_path, world, keep=2)
        saves.start(1, {}, {})
        saves.start(2, {}, {})
        text, at = "", 0
        while not text and at < 1000:
            try:
                at += 1
                saves.poll()
            except CheckpointError as error:
                text = str(error)
        world.barrier("seen")  # rank 0 clears up before it
        assert names(tmp_path) == ["step-00000001"]
        world.barrier("looked")
        saves.start(3, {}, {})
        saves.wait()
        return at, text
    (at, text), (at_1, text_1) = run_threads(2, work)
    assert (at, text) == (at_1, text_1) and text.startswith(f"run folder {tmp_path}: rank 1 could")
    assert "No space left" in text and "\n" not in text
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_what_is_not_finite_or_ends_the_thread_is_raised_where_the_ranks_wait(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(world: ThreadWorld) -> None:
        saves = Saver(tmp_path, world, keep=2)
        saves.start(4, {}, {"noise": torch.tensor([1.0, torch.nan if world.rank else 1.0])})
        with pytest.raises(NotFiniteError, match=r"^noise is not finite \(1 of 2.* on rank 1"):
            saves.wait()
        saves.wait()
    run_threads(2, work)

    def out_of_memory(*_: Any) -> Any:
        raise MemoryError("no room")
    monkeypatch.setattr(checkpoint, "write", out_of_memory)

    def alone(world: ThreadWorld) -> None:
        saves = Saver(tmp_path, world, keep=2)
        saves.start(5, {}, {})
        with pytest.raises(MemoryError, match="no room"):
            saves.wait()
    run_threads(1, alone)
    assert not checkpoint.found(tmp_path / "checkpoints")


def test_a_folder_that_is_not_ours_any_more_gets_no_checkpoint(tmp_path: Path) -> None:
    ours = [True]

    def check() -> None:
        if not ours[0]:
            raise RuntimeError("lost")

    def work(world: ThreadWorld) -> None:
        saves = Saver(tmp_path, world, keep=2, check=check)
        saves.start(1, {}, {})
        saves._written.result(20)
        ours[0] = False
        for call in (saves.wait, lambda: saves.start(2, {}, {})):
            with pytest.raises(RuntimeError, match="lost"):
                call()
    run_threads(1, work)
    assert not checkpoint.found(tmp_path / "checkpoints")


def test_a_copy_takes_the_memory_of_the_one_before_where_it_fits() -> None:
    state = {"a": torch.arange(6.0).view(2, 3).t(), "b": [torch.tensor(1), ({"c": torch.ones(2)},)],
             "n": 3, "none": None}
    first = saver.copied(state)
    pointers = [first["a"].data_ptr(), first["b"][0].data_ptr(), first["b"][1][0]["c"].data_ptr()]
    assert first["a"].tolist() == state["a"].tolist() and type(first["b"][1]) is tuple
    assert state["a"].data_ptr() not in pointers
    state["a"].add_(1)  # type: ignore[attr-defined]
    state["n"] = 4
    second = saver.copied(state, first)
    assert second["a"].data_ptr() == pointers[0] and torch.equal(second["a"], state["a"])
    assert second["b"][0].data_ptr() == pointers[1] and second["n"] == 4
    other = saver.copied({"a": torch.ones(2, dtype=torch.float64), "b": 1}, second)
    assert other["a"].dtype == torch.float64 and other == {"a": other["a"], "b": 1}
    assert saver.copied(["x"], {"a": 1}) == ["x"] and saver.copied({"a": 1}, ["x"]) == {"a": 1}
