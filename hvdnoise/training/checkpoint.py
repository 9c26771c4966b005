"""Checkpoints: written beside, flushed, checksummed, renamed; so the newest is whole or absent.

    RUN/checkpoints/step-00000123/
        shared.pt        what is equal on all ranks, by rank 0
        rank-N.pt        what is rank N's own: generators, noise, buffers
        manifest.json    format, step, ranks, and size and SHA-256 of each file

The folder is called ``step-00000123.tmp`` until every rank has written its file to the disk and
rank 0 the manifest. A checkpoint counts only when every file is there and right; a broken one is
named and the one before is taken. Files are read with ``weights_only=True``, never otherwise.
All ranks must see the same folder: on several hosts it lies in a shared file system.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any, Callable

import torch

from hvdnoise.comm import World
from hvdnoise.training import finite
from hvdnoise.training.fetch import digest
from hvdnoise.training.manifest import FORMAT, BrokenCheckpoint, read_manifest
from hvdnoise.training.progress import log

__all__ = ["FORMAT", "BrokenCheckpoint", "CheckpointError", "begin", "check", "choose",
           "commit", "folder_of", "found", "gather_or_raise", "read", "write"]

State = dict[str, Any]
Facts = dict[str, dict[str, Any]]  # of each file
_NAME = re.compile(r"step-([0-9]{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; one line, equal on all ranks."""


class NotFiniteError(CheckpointError):
    """What was to be written is not finite, so it was not written."""


def folder_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def found(checkpoints: Path) -> list[Path]:
    """The finished checkpoints in a folder, the newest first, whole or not."""
    if not checkpoints.is_dir():
        return []
    return sorted((path for path in checkpoints.iterdir()
                   if path.is_dir() and _NAME.fullmatch(path.name)),
                  key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name[5:])


# ---------------------------------------------------------------------- writing


def begin(checkpoints: Path, step: int, world: World) -> Path:
    """Make the folder that the files of a checkpoint are written to. Collective.

    Raises:
        CheckpointError: on all ranks, when it cannot be.
    """
    part = checkpoints / f"{folder_of(step)}.tmp"
    gather_or_raise(world, "begin", lambda: _begin(part) if world.rank == 0 else None)
    return part


def write(part: Path, shared: State | None, own: State, rank: int) -> Facts:
    """Write this rank's files, through to the disk; their sizes and digests. Not collective.

    Args:
        shared: rank 0's (others may pass None); own: this rank's. Tensors, numbers, text and
            plain containers only.

    Raises:
        NotFinite, OSError, RuntimeError: when they cannot be.
    """
    states = {f"rank-{rank}.pt": own} if rank else {"shared.pt": shared, "rank-0.pt": own}
    return {name: _write(part / name, state) for name, state in states.items()}


def commit(part: Path, written: Callable[[], Facts], world: World, *, keep: int) -> Path:
    """Make a checkpoint of what all ranks have written, or leave no trace of it. Collective.

    It and the newest before it stay, ``keep`` in all. Those of later steps, which a run that went
    back has left behind, are dropped too.

    Args:
        written: what `write` gave, or raises what it raised.

    Raises:
        CheckpointError: on all ranks, when a rank could not write, or something is not finite (the
            earlier checkpoints stay).
    """
    final, leads = part.with_suffix(""), world.rank == 0
    try:
        everyone = gather_or_raise(world, "write", written)
        files = {name: facts for each in everyone for name, facts in each.items()}
        manifest = {"format": FORMAT, "step": _step_of(final), "ranks": world.size, "files": files}
        gather_or_raise(world, "finish", lambda: _finish(part, final, manifest) if leads else None)
    except CheckpointError:
        if leads:
            shutil.rmtree(part, ignore_errors=True)
        raise
    if leads:
        here = found(part.parent)
        for gone in {*here} - {*here[here.index(final):][:keep]}:
            shutil.rmtree(gone, ignore_errors=True)
    return final


def _begin(part: Path) -> None:
    for stale in part.parent.glob("*.tmp"):
        shutil.rmtree(stale)
    part.mkdir()


def _write(path: Path, state: State | None) -> dict[str, Any]:
    finite.check(state)
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return _facts(path)


def _finish(part: Path, final: Path, manifest: dict[str, Any]) -> None:
    with (part / "manifest.json").open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _flush_folder(part)
    if final.exists():  # a broken one, or the very same step again
        shutil.rmtree(final)
    part.rename(final)
    _flush_folder(final.parent)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def gather_or_raise(world: World, what: str, action: Callable[[], Any]) -> list[Any]:
    """What ``action`` gave on each rank (JSON values); an OSError or NotFinite on one is a
    CheckpointError on all. Collective."""
    value, error, infinite = None, None, None
    try:
        value = action()
    except finite.NotFinite as problem:
        infinite = str(problem)
    except (OSError, RuntimeError) as problem:  # torch.save raises RuntimeError on a full disk
        error = f"{type(problem).__name__}: {problem}".splitlines()[0]
    everyone = world.gather_json([value, error, infinite], name=f"checkpoint.{what}")
    for rank, (_, error, infinite) in enumerate(everyone):
        if infinite is not None:
            raise NotFiniteError(f"{infinite} on {world.places()[rank]}, and is not written: lower "
                                 "optim.lr or the noise's scale, or set clip_norm; earlier "
                                 "checkpoints are intact")
        if error is not None:
            raise CheckpointError(f"{world.places()[rank]} could not write ({error}): free some "
                                  "space or give another run_dir; earlier checkpoints are intact")
    return [value for value, *_ in everyone]


# ---------------------------------------------------------------------- reading


def check(folder: Path, names: set[str] | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint, once its files (those in ``names``; default all) are right.

    Raises:
        BrokenCheckpoint: naming what is wrong.
    """
    try:
        manifest = read_manifest(folder)
        files = manifest["files"]
        for name in sorted(files if names is None else files.keys() & names):
            if not stat.S_ISREG(os.lstat(folder / name).st_mode):
                raise BrokenCheckpoint(f"{name} is no file, but a link or a folder")
            if _facts(folder / name) != files[name]:
                raise BrokenCheckpoint(f"{name} does not have the SHA-256 of its manifest")
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{Path(str(error.filename)).name} is missing") from error
    except OSError as error:
        raise BrokenCheckpoint(f"it cannot be read ({type(error).__name__}: {error})") from error
    return manifest


def choose(candidates: list[Path], world: World) -> tuple[Path, dict[str, Any]] | None:
    """The first whole checkpoint of rank 0's list, and its manifest. Collective.

    Each rank checks the shared file and its own; rank 0 those of ranks that no longer exist.

    Raises:
        CheckpointError: on all ranks, when there are some and none of them is whole.
    """
    names = world.gather_json([str(path) for path in candidates], name="checkpoint.list")[0]
    for folder in map(Path, names):
        problem, manifest = None, {}
        try:
            manifest = check(folder, None if world.rank == 0 else
                             {"shared.pt", f"rank-{world.rank}.pt"})
        except BrokenCheckpoint as error:
            problem = str(error)
        problems = world.gather_json(problem, name="checkpoint.check")
        wrong = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]
        if not wrong:
            return folder, manifest
        log.warning("checkpoint %s is broken (%s): not used", folder, "; ".join(wrong))
    if names:
        raise CheckpointError(f"none of the {len(names)} checkpoints in {Path(names[0]).parent} is "
                              "whole: give another one with --resume PATH, or start anew with "
                              "--overwrite")
    return None


def read(path: Path) -> State:
    """One file of a checkpoint, or saved weights, on the CPU; never unpickles code.

    Raises:
        BrokenCheckpoint: when the file is no such thing.
    """
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a damaged file leads it to
        text = str(error).splitlines()[0][:200] if str(error) else ""
        raise BrokenCheckpoint(f"{path} cannot be read ({type(error).__name__}: {text})") from error
    return state
