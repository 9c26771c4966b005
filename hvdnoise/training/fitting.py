"""Whether the states in a checkpoint, whose files are whole, are those of a run.

What does not fit is found before it is loaded: some of it would be taken without a word, and end
the run much later.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any, Iterator, Mapping

import torch
from torch import Tensor, nn

from hvdnoise.training.checkpoint import BrokenCheckpoint
from hvdnoise.training.errors import ConfigError
from hvdnoise.training.job import Counters, Job

State = dict[str, Any]


@contextlib.contextmanager
def broken_unless_it_fits(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside, but a ConfigError, is one line about the checkpoint."""
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # what torch and Python raise for a state of another form
        why = " ".join(str(error).split())[:200]
        kind = "" if isinstance(error, BrokenCheckpoint) else f"{type(error).__name__}: "
        raise BrokenCheckpoint(f"checkpoint {path} does not fit this run ({kind}{why}): give "
                               "another one with --resume PATH, or start anew with --overwrite"
                               ) from error


def check_facts(shared: Any) -> None:
    """Check what is looked at before anything is loaded.

    Raises:
        BrokenCheckpoint: naming what is wrong.
    """
    _require(isinstance(shared, dict), "the shared state")
    for name in ("model", "optimizer", "scaler", "counters", "config", "versions"):
        _require(isinstance(shared.get(name), dict), name)
    _require(isinstance(shared.get("data"), (dict, type(None))), "data")
    starts = shared.get("starts", [])
    _require(isinstance(starts, list) and all(isinstance(each, dict) for each in starts), "starts")
    for name in ("steps_per_epoch", "examples_per_step"):
        _require(type(shared.get(name)) is int and shared[name] > 0, name)
    for name in ("virtual_workers", "epochs"):
        _require(_is_number(shared["config"].get(name)), f"config.{name}")


def check_states(job: Job, shared: State, own: State | None, step: int) -> None:
    """Check the shared state and this rank's own, if any, against a job at its start.

    Args:
        step: what the manifest says.

    Raises:
        BrokenCheckpoint: naming what is wrong.
    """
    model = job.model.state_dict()
    _check_like(model, shared["model"], "model")
    if job.ema is not None:
        _check_like(job.ema.state_dict(), shared.get("ema"), "ema")
    if shared.get("best") is not None:
        _check_like(model, shared["best"], "best")
    _require(job.datasets.validation is None or shared["counters"].get("best_step", 0) == 0
             or shared.get("best") is not None, "best")
    _check_like(job.scaler.state_dict(), shared["scaler"], "scaler")
    _check_optimizer(job, shared["optimizer"])
    _check_counters(shared["counters"], step)
    if own is not None:
        _require(isinstance(own, dict), "the rank's own state")
        _require(isinstance(own.get("noise"), (dict, type(None))), "noise")
        _require(isinstance(own.get("generators"), dict), "generators")
        _check_like(_buffers(job.model), own.get("buffers"), "buffers")
        if job.ema is not None:
            _check_like(_buffers(job.ema), own.get("ema_buffers"), "ema_buffers")


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    names = {name for name, _ in model.named_buffers()}
    return {name: value for name, value in model.state_dict().items() if name in names}


def _check_optimizer(job: Job, found: State) -> None:
    """The groups are those of a new optimizer; a state's tensors are numbers, or like the
    parameter that they belong to."""
    new = job.optimizer.state_dict()
    groups = found.get("param_groups")
    _require(isinstance(groups, list) and len(groups) == len(new["param_groups"]),
             "optimizer.param_groups")
    for group, expected in zip(groups or [], new["param_groups"]):
        _require(isinstance(group, dict) and group.get("params") == expected["params"],
                 "optimizer.param_groups.params")
        for name in group.keys() & expected.keys():  # another torch may have others beside them
            _check_like(expected[name], group[name], f"optimizer.param_groups.{name}")
    shapes = {number: p.shape for group, saved in zip(job.optimizer.param_groups,
                                                      new["param_groups"])
              for number, p in zip(saved["params"], group["params"])}
    states = found.get("state")
    _require(isinstance(states, dict) and states.keys() <= shapes.keys(), "optimizer.state")
    assert isinstance(states, dict)
    for number, values in states.items():
        _require(isinstance(values, dict), f"optimizer.state.{number}")
        for name, value in values.items():
            right = value is None or _is_number(value) if not isinstance(value, Tensor) else \
                value.numel() == 1 or value.shape == shapes[number]
            _require(right, f"optimizer.state.{number}.{name}")


def _check_counters(found: State, step: int) -> None:
    for name, value in found.items():
        known = vars(Counters()).get(name)
        _require(known is not None and _is_count(known, value), f"counters.{name}")
    _require(found.get("step") == step, "counters.step")


def _is_count(known: Any, value: Any) -> bool:
    """Whether a counter has the form of that of a new run."""
    if isinstance(known, dict):
        return isinstance(value, dict) and all(
            isinstance(name, str) and _is_count(0, each) for name, each in value.items())
    if isinstance(known, float):
        return _is_number(value) and math.isfinite(value)
    return type(value) is int and value >= 0


def _check_like(expected: Any, found: Any, name: str) -> None:
    """Check that ``found`` has the form of ``expected``: keys, lengths, shapes and types."""
    if isinstance(expected, Tensor):
        _require(isinstance(found, Tensor), name)
        _require(found.shape == expected.shape and found.dtype == expected.dtype
                 and found.layout == torch.strided, f"{name} of shape {tuple(found.shape)}")
    elif isinstance(expected, Mapping):
        _require(isinstance(found, Mapping), name)
        odd = sorted(map(str, expected.keys() ^ found.keys()))
        _require(not odd, f"{name}.{odd[0] if odd else ''}")
        for key, value in expected.items():
            _check_like(value, found[key], f"{name}.{key}")
    elif isinstance(expected, (list, tuple)):
        _require(isinstance(found, (list, tuple)) and len(found) == len(expected), name)
        for place, value in enumerate(expected):
            _check_like(value, found[place], f"{name}.{place}")
    else:
        alike = _is_number(expected) and _is_number(found) or type(found) is type(expected)
        _require(alike, name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require(right: bool, name: str) -> None:
    if not right:
        raise BrokenCheckpoint(f"{name} is not what it should be")
