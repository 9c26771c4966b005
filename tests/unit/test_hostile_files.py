"""Files of a run folder that somebody damaged or made up: one line, nothing executed or changed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdnoise.training import checkpoint
from hvdnoise.training.checkpoint import BrokenCheckpoint
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.fetch import digest
from hvdnoise.training.job import build
from hvdnoise.training.options import parse
from hvdnoise.training.progress import log
from hvdnoise.training.resume import find_source, restore
from hvdnoise.training.settings_file import read_settings
from tests.fake_world import ThreadWorld, run_threads
from tests.trainer import GNC, TINY, speaking, train

__all__ = ["speaking"]  # a fixture
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi"))
CONFIGS = {
    "text": b"some words", "list": b"- 1\n- 2\n", "number": b"17\n", "empty": b"",
    "null": b"null\n",
    "binary": bytes(range(256)), "zeros": b"\0" * 500, "cut": b"data:\n  dataset: [synthetic",
    "nested flow": b"a: " + b"[" * 100_000, "nested block": b"".join(
        b" " * n + b"a:\n" for n in range(1000)),
    "bomb": BOMB.encode(), "recursive": b"a: &x [*x]\n",
    "python": b"epochs: !!python/object/apply:os.mkdir ['{folder}/owned']\n",
    "python name": b"epochs: !!python/name:os.system\n", "tag": b"epochs: !thing 1\n",
    "digits": b"epochs: " + b"9" * 5000, "keys": b"{1: 2, [3]: 4}\n", "number keys": b"1: 2\n",
    "large": b"a: " + b"x" * (2 << 20),
    "two": b"a: 1\n---\nb: 2\n",
    "latin": "epochs: \xe4".encode("latin-1")}


def contents(folder: Path) -> dict[str, bytes]:
    """All but the logs, which the first run in this process keeps open."""
    return {str(path): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.parent.name != "logs"}


@pytest.mark.parametrize("name", CONFIGS)
def test_damaged_settings(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(CONFIGS[name].replace(b"{folder}", str(tmp_path).encode()))
    with pytest.raises(ConfigError) as caught:
        read_settings(path)
    text = str(caught.value)
    assert text.startswith(f"{path} is damaged (") and "\n" not in text and len(text) < 700
    assert [each.name for each in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_with_damaged_settings_is_not_gone_on_with(tmp_path: Path, whole: bool) -> None:
    """Whether or not there is a checkpoint."""
    train(tmp_path, stop_after=2, expect=75)
    if not whole:
        shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "config.yaml").write_bytes(CONFIGS["list"])
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="config.yaml is damaged"):
        train(tmp_path, "--resume", "auto")
    assert contents(tmp_path) == before


def test_settings_that_a_run_has_written_are_read(tmp_path: Path) -> None:
    train(tmp_path, *GNC, "--noise.also", '[{"kind": "covariance", "structure": "diagonal", '
          '"emulated_batch": 2}]', stop_after=0, expect=75)
    assert read_settings(tmp_path / "config.yaml")["data.dataset"] == "synthetic"


# ---- metrics

def test_damaged_metrics_are_named_and_an_unfinished_line_is_dropped(tmp_path: Path) -> None:
    train(tmp_path, stop_after=6, expect=75)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    number = whole.count(b"\n") + 1
    for bad in (b"words\n", b"\0" * 99 + b"\n", b"[1]\n", b'{"kind": 1, "step": 1}\n', b"\n",
                b'{"kind": "train", "step": "1"}\n', b'{"kind": "train"}\n', b"[" * 99_999 + b"\n",
                b'{"kind": "train", "step": ' + b"1" * 5000 + b"}\n"):
        path.write_bytes(whole + bad + whole)
        before = contents(tmp_path)
        with pytest.raises(ConfigError, match=f"metrics.jsonl is damaged in line {number}: repair"):
            train(tmp_path, "--resume", "auto")
        assert contents(tmp_path) == before
    path.write_bytes(whole + b'{"kind": "tr\0\0')
    train(tmp_path, "--resume", "auto")
    assert path.read_bytes().startswith(whole)


# ---- manifests

@pytest.fixture(scope="module")
def template(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("template") / "run"
    train(folder, "--checkpoint.every_steps", "2", stop_after=4, expect=75)
    assert [path.name for path in checkpoint.found(folder / "checkpoints")] == [
        "step-00000004", "step-00000002"]
    return folder


@pytest.fixture
def two(tmp_path: Path, template: Path) -> Path:
    """A run with two checkpoints, of the steps 2 and 4."""
    return Path(shutil.copytree(template, tmp_path / "run"))


def newest(folder: Path) -> Path:
    return checkpoint.found(folder / "checkpoints")[0]


ODD = [None, True, False, -1, 0, 1.0, 2.5, 10**12, 10**30, "4", "x" * 10_000, [], [1], {}, {"a": 1},
       float("nan"), float("inf"), "../../etc/passwd", "\0"]
TEXTS = [b"", b"{", b"[]", b"null", b"NaN", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000,
         b'{"format": 1, "step": ' + b"4" * 5000 + b', "ranks": 1, "files": {}}',
         b'{"format": 1, "step": 4, "ranks": ' + b"1" * 4000 + b', "files": {}}',
         b'{"format": 1, "step": NaN, "ranks": 1, "files": {}}', b"{" + b" " * (65 << 20) + b"}"]


@pytest.mark.parametrize("place", range(len(TEXTS)))
def test_a_manifest_that_is_no_json(two: Path, place: int) -> None:
    (newest(two) / "manifest.json").write_bytes(TEXTS[place])
    with pytest.raises(BrokenCheckpoint) as caught:
        checkpoint.check(newest(two))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_values_of_a_manifest_that_are_none(two: Path) -> None:
    """Every value replaced by every odd one, and seeded mixtures of that."""
    folder = newest(two)
    path = folder / "manifest.json"
    right = json.loads(path.read_text())
    places: list[tuple[Any, ...]] = [("format",), ("step",), ("ranks",), ("files",)]
    places += [("files", name) for name in right["files"]]
    places += [("files", name, key) for name in right["files"] for key in ("bytes", "sha256")]
    draws = random.Random(0)
    changes = [[(place, odd)] for place in places for odd in ODD]
    changes += [[(draws.choice(places), draws.choice(ODD)) for _ in range(3)] for _ in range(200)]
    assert len(changes) > 300
    for change in changes:
        manifest = json.loads(json.dumps(right))
        for place, odd in change:
            at: Any = manifest
            for key in place[:-1]:
                at = at[key] if isinstance(at, dict) and key in at else {}
            if isinstance(at, dict):
                at[place[-1]] = odd
        path.write_text(json.dumps(manifest))
        with pytest.raises(BrokenCheckpoint) as caught:
            checkpoint.check(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400, change
    path.write_text(json.dumps({**right, "files": {**right["files"], "../evil.pt": {
        "bytes": 1, "sha256": "0" * 64}}}))
    with pytest.raises(BrokenCheckpoint, match="does not name the files"):
        checkpoint.check(folder)
    path.write_text(json.dumps(right))
    assert checkpoint.check(folder)["step"] == 4


def by_a_link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("how", [by_a_link, by_a_folder, by_a_pipe])
@pytest.mark.parametrize("name", ["manifest.json", "shared.pt", "rank-0.pt"])
def test_what_is_no_file_is_broken(two: Path, name: str, how: Callable[[Path], None]) -> None:
    how(newest(two) / name)
    with pytest.raises(BrokenCheckpoint, match=f"{name} is no file"):
        checkpoint.check(newest(two))


def test_a_hostile_manifest_costs_one_checkpoint(two: Path, caplog: Any) -> None:
    (newest(two) / "manifest.json").write_bytes(b"[" * 100_000)
    log.propagate = True
    train(two, "--resume", "auto")
    log.propagate = False
    assert "step-00000004 is broken" in caplog.text and "resumed at step 2" in caplog.text


# ---- whole files that hold something else

def change(folder: Path, name: str, edit: Callable[[Any], Any]) -> None:
    """Edit a file of the newest checkpoint, with a manifest that fits."""
    path = newest(folder) / name
    state = checkpoint.read(path)
    edited = edit(state)
    state = state if edited is None else edited
    torch.save(state, path)
    manifest = json.loads(path.with_name("manifest.json").read_text())
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    path.with_name("manifest.json").write_text(json.dumps(manifest))


def setting(*keys: Any, to: Any) -> Callable[[Any], None]:
    def edit(state: Any) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = to
    return edit


def first_weight(to: Any) -> Callable[[Any], None]:
    return lambda state: setting("model", next(iter(state["model"])), to=to)(state)


SHARED: dict[str, Callable[[Any], Any]] = {
    "a list": lambda state: [1], "a tensor": lambda state: torch.zeros(3),
    **{f"without {key}": lambda state, key=key: {  # type: ignore[misc]
        name: value for name, value in state.items() if name != key}
        for key in ("model", "optimizer", "scaler", "counters", "config", "versions",
                    "steps_per_epoch", "examples_per_step")},
    **{f"{key} is text": setting(key, to="x") for key in (
        "model", "optimizer", "scaler", "counters", "config", "versions", "steps_per_epoch",
        "examples_per_step", "data", "best")},
    "weight of another shape": first_weight(torch.zeros(7)),
    "weight that would be spread": first_weight(torch.zeros(1)),
    "weight of another type": first_weight(torch.zeros(3, dtype=torch.int64)),
    "weight is a number": first_weight(1.0),
    "one weight more": setting("model", "more", to=torch.zeros(1)),
    "momentum of another shape": setting("optimizer", "state", 0, "momentum_buffer",
                                         to=torch.zeros(3)),
    "momentum is text": setting("optimizer", "state", 0, "momentum_buffer", to="x"),
    "state is a list": setting("optimizer", "state", to=[1]),
    "state of no parameter": setting("optimizer", "state", 999, to={}),
    "groups": setting("optimizer", "param_groups", to=[]),
    "group is text": setting("optimizer", "param_groups", 0, to="x"),
    "rate is text": setting("optimizer", "param_groups", 0, "momentum", to="x"),
    "step is text": setting("counters", "step", to="4"),
    "step is another": setting("counters", "step", to=2),
    "step is negative": setting("counters", "step", to=-4),
    "seconds are none": setting("counters", "seconds", to=float("nan")),
    "counter that is none": setting("counters", "nonsense", to=1),
    "epochs is text": setting("config", "epochs", to="x"),
    "steps of an epoch": setting("steps_per_epoch", to=0),
}


OWN: dict[str, Callable[[Any], Any]] = {
    "a list": lambda state: [1], "no generators": setting("generators", to=None),
    "torch's is text": setting("generators", "torch", to="x"),
    "numpy's is short": setting("generators", "numpy", to=[1, 2]),
    "Python's is another": setting("generators", "python", to=[1, 2, 3]),
    "noise": setting("noise", to="x"), "buffers": setting("buffers", to={"x": torch.zeros(1)}),
    "buffers are a number": setting("buffers", to=1)}


@pytest.mark.parametrize("name, edits", [("shared.pt", SHARED), ("rank-0.pt", OWN)])
def test_states_that_are_none(two: Path, name: str, edits: dict[str, Callable[[Any], Any]]) -> None:
    """Every one is refused before it does anything."""
    config = parse(TrainConfig, [*TINY, "--model", "small-cnn", "--run_dir", str(two), "--resume",
                                 "auto"], program="hvdnoise train")
    right = shutil.copytree(newest(two), two / "right")

    def work(world: ThreadWorld) -> None:
        job = build(config, world, torch.device("cpu"))
        for case, edit in edits.items():
            change(two, name, edit)
            with pytest.raises(ConfigError) as caught:
                source = find_source(job)
                assert source is not None
                restore(job, source)
                print(case)
            text = str(caught.value)
            assert "step-00000004 does not fit this run" in text and "\n" not in text, case
            shutil.copytree(right, newest(two), dirs_exist_ok=True)
        source = find_source(job)
        assert source is not None
        restore(job, source)
    run_threads(1, work)


def test_a_state_that_is_none_changes_nothing(two: Path) -> None:
    change(two, "shared.pt", SHARED["momentum of another shape"])
    before = contents(two)
    with pytest.raises(ConfigError, match="optimizer.state.0.momentum_buffer is not what it"):
        train(two, "--resume", "auto")
    assert contents(two) == before
