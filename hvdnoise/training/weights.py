"""Files of weights: written whole and finite or not at all, and read only as they were written.

torch.save writes a zip file, with a CRC-32 of each tensor's bytes that torch.load does not check;
`read` does. Where a summary.json lies beside the file, its digests count too.
"""

from __future__ import annotations

import copy
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvdnoise.training import checkpoint, finite
from hvdnoise.training.errors import ConfigError
from hvdnoise.training.fetch import digest
from hvdnoise.training.records import weights_digest

FILES = {"final": "weights.pt", "best": "weights-best.pt", "ema": "weights-ema.pt"}
_DIGESTS = {"weights.pt": "weights_sha256", "weights-ema.pt": "weights_ema_sha256"}
_REMEDY = "give another --checkpoint, or train again"


def write(path: Path, state: dict[str, Tensor]) -> None:
    """Write a state dict, whole or not at all; on the CPU, so that any machine can read it.

    Raises:
        NotFinite: where it is not finite (`hvdnoise.training.finite`).
    """
    finite.check({path.name: state})
    state = copy.copy(state)  # with what a module has noted beside its tensors
    for name, value in state.items():
        state[name] = value.detach().cpu()
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the bytes of each file of weights in a run's folder."""
    found = {name: digest(folder / name) for name in FILES.values()}
    return {name: sha256 for name, sha256 in found.items() if sha256 is not None}


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of weights, or in the shared.pt of a checkpoint, on the CPU.

    Raises:
        ValueError: one line, where it is damaged, not finite, or something else.
    """
    if path.name == "shared.pt":
        checkpoint.check(path.parent, {"shared.pt"})
        whole = checkpoint.read(path)
        state = whole.get("model") if isinstance(whole, Mapping) else None
    else:
        facts = _facts_beside(path)
        _check_file(path, facts)
        state = checkpoint.read(path)
    if not isinstance(state, Mapping) or not all(
            isinstance(name, str) and isinstance(each, Tensor) for name, each in state.items()):
        raise ConfigError(f"{path} holds no weights by name: {_REMEDY}")
    if path.name in _DIGESTS:
        _check_content(path, dict(state), facts)
    if (name := finite.first(state)) is not None:
        raise ConfigError(f"{path} holds {name}, which is not finite: {_REMEDY}")
    return dict(state)


def _facts_beside(path: Path) -> dict[str, Any]:
    """What the run's summary says; nothing where there is none, or for a file that is no run's."""
    summary = path.parent / "summary.json"
    if path.name not in FILES.values() or not summary.is_file():
        return {}
    try:
        facts = json.loads(summary.read_text())
    except (OSError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{summary} cannot be read ({text}), and {path.name} cannot be compared "
                          "with it: move it away to do without") from error
    return facts if isinstance(facts, dict) else {}


def _check_file(path: Path, facts: dict[str, Any]) -> None:
    files = facts.get("files_sha256")
    expected = files.get(path.name) if isinstance(files, dict) else None
    if expected is not None and digest(path) != expected:
        raise ConfigError(f"{path} does not have the SHA-256 of the run's summary.json: it is "
                          f"damaged, or another file; {_REMEDY}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises whatever a damaged file leads it to
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is damaged, or no file of weights ({type(error).__name__}: "
                          f"{text}): {_REMEDY}") from error
    if damaged is not None:
        raise ConfigError(f"{path} is damaged ({damaged} does not have its CRC-32): {_REMEDY}")


def _check_content(path: Path, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
    expected = facts.get(_DIGESTS[path.name])
    if expected is not None and weights_digest(state) != expected:
        raise ConfigError(f"{path} does not hold the weights of the run's summary.json: it is "
                          f"another run's; {_REMEDY}")
