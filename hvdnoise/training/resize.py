"""Resuming on another number of ranks: the same workers, on other ranks.

A run's law depends on its W workers, not on the ranks that stand for them: data order,
augmentation, dropout and noise are keyed by the worker. So where the ranks divide W, each stands
for W / ranks, and takes over what belongs to these workers. Sums over the workers are then added
in another order, so that the bits differ. What is a rank's own and no worker's cannot be the same:
see `regrouped`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor

from hvdnoise.training import checkpoint
from hvdnoise.training.config import TrainConfig

State = dict[str, Any]
ASKED = "virtual_workers_asked"  # in the shared state: the setting before it was adjusted


def keep_workers(config: TrainConfig, size: int) -> TrainConfig:
    """The settings with ``virtual_workers`` such that ``size`` ranks have as many workers as the
    run that is resumed with ``resume_resize``; unchanged where that cannot be or is not wanted.

    Whoever gives another ``virtual_workers`` than the run was started with wants other workers.
    """
    if not config.resume_resize:
        return config
    for path in candidates(config):
        try:
            ranks = int(checkpoint.check(path, set())["ranks"])
            shared = torch.load(path / "shared.pt", map_location="cpu", weights_only=True,
                                mmap=True)
            virtual = int(shared["config"]["virtual_workers"])
            asked = int(shared.get(ASKED, virtual))
        except Exception:  # whatever a damaged file leads torch.load to; it is named later
            continue
        workers = ranks * virtual
        if asked != config.virtual_workers or workers % size:
            return config
        return dataclasses.replace(config, virtual_workers=workers // size)
    return config


def candidates(config: TrainConfig) -> list[Path]:
    """The checkpoints that ``resume`` allows, the first choice first."""
    if config.resume == "never":
        return []
    if config.resume == "auto":
        return checkpoint.found(Path(config.run_dir or "") / "checkpoints")
    path = Path(config.resume)
    if (path / "checkpoints").is_dir():
        return checkpoint.found(path / "checkpoints")
    return [path]


def regrouped(read: Callable[[int], State], *, before: int, now: int, rank: int) -> State:
    """The own state of a rank, from those of other ranks with the same workers.

    Args:
        read: gives the own state of a rank of before.
        before: virtual workers of a rank then.
        now: virtual workers of a rank now.
        rank: this one.

    What noise keeps of each worker goes with the worker. What it keeps besides is equal on all
    ranks; where it is not, "noise" is None, and it starts anew. Running statistics of normalisation
    are the mean of those of the workers' ranks, generators those of the first worker's.
    """
    workers = range(rank * now, (rank + 1) * now)
    ranks = sorted({worker // before for worker in workers})
    states = {each: read(each) for each in ranks}
    shares = {each: sum(worker // before == each for worker in workers) / now for each in ranks}
    first = states[ranks[0]]
    return {**first, "noise": _noise({each: states[each]["noise"] for each in ranks}, workers,
                                     before),
            **{name: _mean({each: states[each][name] for each in ranks}, shares)
               for name in ("buffers", "ema_buffers")}}


def _mean(values: dict[int, dict[str, Tensor]], shares: dict[int, float]) -> dict[str, Tensor]:
    """By name; of whole numbers the first rank's."""
    first = next(iter(values.values()))
    if len(values) == 1:
        return first
    return {name: torch.stack([shares[rank] * each[name].double() for rank, each in values.items()]
                              ).sum(0).to(value.dtype) if value.is_floating_point() else value
            for name, value in first.items()}


def _noise(states: dict[int, State | None], workers: range, before: int) -> State | None:
    """The noise's state for these workers; None where there is none, or it cannot be moved."""
    first = states[workers[0] // before]
    if first is None or not all(_same_but_rows(first, each) for each in states.values()):
        return None
    seen = []
    for number, each in enumerate(first["seen"]):
        rows = {bucket: torch.stack([
            _rows(states[worker // before], number, bucket)[worker % before]
            for worker in workers]) for bucket in each["rows"]}
        seen.append({**each, "rows": rows})
    return {**first, "seen": seen}


def _rows(state: State | None, number: int, bucket: int) -> Tensor:
    assert state is not None  # as `_same_but_rows` has seen
    rows: Tensor = state["seen"][number]["rows"][bucket]
    return rows


def _same_but_rows(one: State, other: State | None) -> bool:
    """Whether two ranks' states differ in nothing but the rows of their workers."""
    return other is not None and _equal(_without_rows(one), _without_rows(other))


def _without_rows(state: State) -> State:
    seen = [{**each, "rows": sorted(each["rows"])} for each in state["seen"]]
    return {**state, "seen": seen}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(
            _equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return isinstance(other, type(one)) and len(one) == len(other) and all(
            map(_equal, one, other))
    return bool(one == other)
