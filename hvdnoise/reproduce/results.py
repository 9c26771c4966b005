"""The weights and the metrics of two runs: where they part, and by how much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from hvdnoise.training import checkpoint
from hvdnoise.training.records import weights_digest

MOST_TENSORS = 20  # that are named
_OF_TIME = ("second",)  # in the name of a metric


def digests(was: dict[str, str], now: dict[str, str]) -> list[str]:
    """A line for each file of weights whose digest is another."""
    return [f"{key}: {was.get(key, 'none')} in the record, {now.get(key, 'none')} now"
            for key in sorted({*was, *now}) if was.get(key) != now.get(key)]


def weights(record: Path, again: Path, expected: str) -> list[str]:
    """Which tensors of the final weights differ, and by how much.

    Args:
        expected: the digest of the record's weights.
    """
    try:
        was, now = (_state(folder / "weights.pt") for folder in (record, again))
    except ValueError as error:
        return [f"weights cannot be compared one by one: {error}"]
    lines = []
    if weights_digest(was) != expected:
        lines.append(f"{record / 'weights.pt'} does not have the digest of its summary.json")
    differing = [line for name in sorted({*was, *now})
                 if (line := _difference(name, was.get(name), now.get(name)))]
    lines.append(f"{len(differing)} of {len({*was, *now})} tensors differ")
    more = len(differing) - MOST_TENSORS
    return [*lines, *differing[:MOST_TENSORS], *([f"and {more} more"] if more > 0 else [])]


def _state(path: Path) -> dict[str, Tensor]:
    state = checkpoint.read(path)
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(each, Tensor) for name, each in state.items()):
        raise ValueError(f"{path} holds no weights")
    return state


def _difference(name: str, was: Tensor | None, now: Tensor | None) -> str:
    """In words; empty where there is none."""
    if was is None or now is None:
        return f"{name}: only in the {'new run' if was is None else 'record'}"
    if was.shape != now.shape or was.dtype != now.dtype:
        return (f"{name}: {was.dtype} {tuple(was.shape)} in the record, {now.dtype} "
                f"{tuple(now.shape)} now")
    if weights_digest({name: was}) == weights_digest({name: now}):
        return ""
    apart = (was.double() - now.double()).abs()
    count = int((apart != 0).sum())  # NaN counts, too
    return (f"{name}: {count} of {apart.numel()} numbers, by {float(apart.max()):.3g} at most "
            f"(of values up to {float(was.double().abs().max()):.3g})")


def metrics(record: Path, again: Path) -> list[str]:
    """The first step whose metrics differ, but for those of time."""
    was, now = _lines(record), _lines(again)
    for key in sorted({*was} & {*now}):
        step, kind = key
        names = [name for name in was[key]
                 if not any(word in name for word in _OF_TIME)
                 and was[key][name] != now[key].get(name)]
        if names:
            text = ", ".join(f"{name} {was[key][name]} then and {now[key].get(name)} now"
                             for name in names[:3])
            return [f"metrics differ first at step {step} ({kind}): {text}"]
    return [f"the metrics of {len({*was} & {*now})} lines are equal"]


def _lines(folder: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """By step and kind; what is no such line is left out."""
    found = {}
    try:
        text = (folder / "metrics.jsonl").read_text(errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        try:
            values = json.loads(line)
            found[int(values["step"]), str(values["kind"])] = values
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return found
