"""Checkpoints: whole or absent, the newest whole one is taken, nothing is unpickled."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvdnoise.training import checkpoint, job
from hvdnoise.training.checkpoint import BrokenCheckpoint, CheckpointError
from tests.fake_world import ThreadWorld, run_threads
from tests.folders import save_checkpoint as save


def write(folder: Path, step: int, *, size: int = 2, keep: int = 2) -> list[Path]:
    """A checkpoint by ``size`` ranks, with what it is of inside."""
    def work(world: ThreadWorld) -> Path:
        shared = {"step": step, "weights": torch.full((3,), float(step))}
        return save(folder, step, shared, {"rank": world.rank}, world, keep=keep)
    return run_threads(size, work)


def choose(folder: Path, size: int = 2) -> list[Any]:
    return run_threads(size, lambda world: checkpoint.choose(checkpoint.found(folder), world))


def test_every_rank_finds_its_own_state_again(tmp_path: Path) -> None:
    write(tmp_path, 7, size=3)
    for path, manifest in choose(tmp_path, 3):
        assert path == tmp_path / "step-00000007" and manifest["ranks"] == 3
    assert torch.equal(checkpoint.read(path / "shared.pt")["weights"], torch.full((3,), 7.0))
    assert [checkpoint.read(path / f"rank-{r}.pt")["rank"] for r in range(3)] == [0, 1, 2]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 100000000, 3):
        write(tmp_path, step)
    # step 3 came last: what lay ahead of it belongs to a run that went back
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-00000003", "step-00000002"]


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "bit flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    elif how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["truncated", "bit flipped", "missing", "empty"])
@pytest.mark.parametrize("name", ["shared.pt", "rank-0.pt", "rank-1.pt", "manifest.json"])
def test_a_broken_newest_one_is_named_and_the_one_before_used(tmp_path: Path, name: str, how: str,
                                                              caplog: Any) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    damage(tmp_path / "step-00000002" / name, how)
    if (name, how) == ("manifest.json", "bit flipped"):  # any flip inside a digest will do
        text = (tmp_path / "step-00000002" / name)
        text.write_text(text.read_text().replace('"sha256": "', '"sha256": "0'))
    checkpoint.log.propagate = True
    for path, manifest in choose(tmp_path):
        assert path.name == "step-00000001" and manifest["step"] == 1
    assert "step-00000002 is broken" in caplog.text


def test_all_broken_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    def work(world: ThreadWorld) -> str:
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as caught:
            checkpoint.choose(checkpoint.found(tmp_path), world)
        return str(caught.value)
    write(tmp_path, 1)
    write(tmp_path, 2)
    damage(tmp_path / "step-00000001" / "rank-1.pt", "truncated")
    damage(tmp_path / "step-00000002" / "shared.pt", "missing")
    assert len(set(run_threads(2, work))) == 1


def test_none_at_all_is_a_fresh_start(tmp_path: Path) -> None:
    assert choose(tmp_path / "nowhere") == [None, None]


def test_what_was_left_half_written_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, 1)
    half = tmp_path / "step-00000002.tmp"
    half.mkdir()
    (half / "shared.pt").write_bytes(b"half")
    assert choose(tmp_path)[0][0].name == "step-00000001"
    write(tmp_path, 3)
    assert not half.exists()


def test_a_rank_that_cannot_write_stops_all_and_harms_nothing(tmp_path: Path,
                                                              monkeypatch: Any) -> None:
    write(tmp_path, 1)
    real = checkpoint._write

    def full(path: Path, state: Any) -> Any:
        if path.name == "rank-1.pt":
            path.write_bytes(b"only a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, state)

    monkeypatch.setattr(checkpoint, "_write", full)

    def work(world: ThreadWorld) -> str:
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, 2, {"a": 1}, {"b": world.rank}, world, keep=1)
        return str(caught.value)
    texts = run_threads(2, work)
    assert len(set(texts)) == 1 and "rank 1 could not write" in texts[0] and "No space" in texts[0]
    assert choose(tmp_path)[0][0].name == "step-00000001"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_folder_that_has_gone_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rank 0 could not write .FileNotFoundError"):
        write(tmp_path / "run" / "checkpoints", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_appears_whole(tmp_path: Path, monkeypatch: Any) -> None:
    """Before the rename nothing has the checkpoint's name; at the rename all is on the disk."""
    flushed: list[str] = []
    real_fsync, real_rename = checkpoint.os.fsync, Path.rename

    def fsync(handle: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{handle}").resolve().name)
        real_fsync(handle)

    def rename(self: Path, target: Path) -> Path:
        assert self.name == "step-00000005.tmp" and not target.exists()
        assert {"shared.pt", "rank-0.pt", "rank-1.pt", "manifest.json", self.name} <= set(flushed)
        checkpoint_files = {path.name for path in self.iterdir()}
        assert checkpoint_files == {"shared.pt", "rank-0.pt", "rank-1.pt", "manifest.json"}
        return real_rename(self, target)

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    write(tmp_path, 5)
    assert flushed[-1] == tmp_path.name  # so that the new name outlives a power cut
    assert checkpoint.check(tmp_path / "step-00000005")["step"] == 5


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "owned",)
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(BrokenCheckpoint, match="evil.pt cannot be read"):
        checkpoint.read(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_a_manifest_of_another_step_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000002")
    with pytest.raises(BrokenCheckpoint, match="does not fit its folder"):
        checkpoint.check(tmp_path / "step-00000002")
    manifest = tmp_path / "step-00000002" / "manifest.json"
    manifest.write_text(json.dumps([1, 2]))
    with pytest.raises(BrokenCheckpoint, match="cannot be read"):
        checkpoint.check(tmp_path / "step-00000002")


def test_generators_come_back(tmp_path: Path) -> None:
    def draws() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    torch.save(job._generators(), tmp_path / "generators.pt")
    first = draws()
    assert draws() != first
    job._set_generators(checkpoint.read(tmp_path / "generators.pt"))
    assert draws() == first
