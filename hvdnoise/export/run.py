"""From a run to a file: written beside its place, checked against the run, renamed."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch

from hvdnoise.export import formats
from hvdnoise.export.config import ExportConfig
from hvdnoise.export.source import Source, read
from hvdnoise.training import models, process
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.errors import one_line
from hvdnoise.training.images import spread
from hvdnoise.training.progress import log, start_terminal

TOLERANCE = 1e-5  # of logits, of the largest in size
_BATCH = 64


class ExportError(RuntimeError):
    """The network cannot be written, or what was written is another; one line."""


def run(config: ExportConfig, trained: TrainConfig, weights: Path) -> int:
    """Export; the exit code.

    Args:
        trained: the run's settings.
        weights: the file that the weights come from.

    Raises:
        ConfigError: where the weights or the data are not there or not right, and where the file
            cannot be written.
    """
    start_terminal(0)
    source, target = read(config, trained, weights), config.target(weights)
    try:
        with _in_place(target) as part:
            facts = _write(config, source, trained, part)
            found = _check(config, source, trained, part, facts)
    except ExportError as error:
        return process.fail(str(error))
    except OSError as error:
        raise ConfigError(f"output={target} cannot be written ({one_line(error)}): give another "
                          "name, or make room") from error
    log.info("%s: %s, weights %s, %d classes; %s", target, trained.model, weights,
             len(source.labels), found)
    return 0


def _write(config: ExportConfig, source: Source, trained: TrainConfig, part: Path
           ) -> dict[str, str]:
    try:
        return formats.write(config.format, source, part)
    except OSError:
        raise
    except Exception as error:  # an exporter raises whatever it is led to
        raise ExportError(f"model={trained.model} cannot be written with format={config.format} "
                          f"({type(error).__name__}: {one_line(error)[:300]}): give another "
                          "--format") from error


def _check(config: ExportConfig, source: Source, trained: TrainConfig, part: Path,
           facts: dict[str, str]) -> str:
    """What the check of the written file has found, in words.

    Raises:
        ExportError: where it is not the run's network.
    """
    if source.images is None:
        return "not checked"
    count = min(config.check, len(source.images))
    try:
        predict, read_back = formats.read(config.format, part, lambda: models.build_for(
            trained.model, source.spec, norm=trained.norm))
        worst = difference(source, predict, spread(len(source.images), count))
    except OSError:
        raise
    except Exception as error:  # a runtime raises whatever it is led to
        raise ExportError(f"the file of format={config.format} does not work "
                          f"({type(error).__name__}: {one_line(error)[:300]}), and is not kept: "
                          "give another --format") from error
    if read_back != facts:
        raise ExportError(f"the file of format={config.format} says other facts than were written, "
                          "and is not kept: give another --format")
    if not worst <= TOLERANCE:
        raise ExportError(f"the logits of format={config.format} differ from the run's by "
                          f"{worst:.2g} of the largest on {count} test images, and {TOLERANCE:g} "
                          "is allowed: the file is not kept; give another --format")
    return f"on {count} test images its logits are the run's to {worst:.1g} of the largest"


@torch.no_grad()
def difference(source: Source, predict: formats.Predict, indices: list[int]) -> float:
    """The largest difference between the logits of a network and the run's, as a share of the
    largest of the run's in size, over some test images.

    Args:
        predict: as in `hvdnoise.export.formats`.
        indices: of the test images.
    """
    assert source.images is not None
    worst, largest = torch.zeros(()), torch.zeros(())
    for first in range(0, len(indices), _BATCH):
        chosen = indices[first:first + _BATCH]
        images, _ = source.images.batch(chosen, None)
        expected = source.model(images)
        inputs = source.inputs(chosen)
        found = predict(inputs).reshape(expected.shape)
        alone = predict(inputs[:1]).reshape(expected[:1].shape)
        for difference in ((found - expected), (alone - expected[:1])):
            worst = torch.maximum(worst, difference.abs().max())  # NaN stays
        largest = torch.maximum(largest, expected.abs().max())
    return 0.0 if worst == 0 else float(worst / largest)


@contextlib.contextmanager
def _in_place(target: Path) -> Iterator[Path]:
    """A scratch file beside ``target``, which takes its place when the block ends well; otherwise
    nothing is left."""
    made = not target.parent.is_dir()
    part = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
    if made:
        target.parent.mkdir()
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                target.parent.rmdir()
