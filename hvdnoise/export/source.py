"""What is exported: the run's network, its facts, and the test images it is checked with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import torch
from torch import Tensor, nn

import hvdnoise
from hvdnoise.export.config import ExportConfig
from hvdnoise.reproduce.record import read_json
from hvdnoise.training import checkpoint, rerun
from hvdnoise.training.config import TrainConfig
from hvdnoise.training.errors import ConfigError, one_line_errors
from hvdnoise.training.fetch import prepare_here
from hvdnoise.training.images import Images, normalisation
from hvdnoise.training.records import weights_digest

INSIDE = "inside: the network takes values 0..1 and normalises them"
OUTSIDE = "outside: give the network (x - mean) / std of values x in 0..1"
_STEPS = {"weights.pt": "steps", "weights-ema.pt": "steps", "weights-best.pt": "best_step"}


class Network(nn.Module):
    """Images (b, C, H, W) float32 with values in 0 .. 1 -> logits (b, classes).

    Args:
        model: takes normalised images.
        mean, std: of each channel.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.scale: Tensor
        self.shift: Tensor
        for name, value in zip(("scale", "shift"), normalisation(mean, std)):
            self.register_buffer(name, value)

    def forward(self, images: Tensor) -> Tensor:
        # in two steps: k / 255 * 255 is k exactly, and then all is as in the run
        logits: Tensor = self.model(images * 255 * self.scale + self.shift)
        return logits


@dataclass(frozen=True)
class Source:
    """A run's network.

    Args:
        model: in evaluation mode, with the weights, on the CPU; takes normalised images.
        shape: (C, H, W) of an image.
        mean, std: of each channel, of pixel values in 0 .. 1.
        labels: a name for each class.
        facts: what a file says of the network: texts by name, lists as JSON in ASCII.
        images: the test images; None where they are not looked at.
    """

    model: nn.Module
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: list[str]
    facts: dict[str, str]
    images: Images | None

    @property
    def network(self) -> Network:
        """The model with the normalisation before it."""
        return Network(self.model, self.mean, self.std).eval()


@one_line_errors()
def read(config: ExportConfig, trained: TrainConfig, weights: Path) -> Source:
    """Read the weights, and the data where they are needed.

    Raises:
        ConfigError: one line; see `hvdnoise.training.rerun.restore`. Also where the classes of the
            data are not those that the run was trained on.
    """
    recorded, record = _labels(Path(config.run)), trained.data.record
    images: Images | None = None
    if config.check > 0 or recorded is None:
        prepare_here(trained.data)
        datasets, model = rerun.restore(trained, weights, torch.device("cpu"))
        shape, classes, images = datasets.spec.image_shape, datasets.spec.num_classes, datasets.test
        mean, std, found = images.mean, images.std, list(images.classes)
        if recorded and recorded != found:
            other = next((pair for pair in zip(recorded, found) if pair[0] != pair[1]), None)
            what = f"{other[1]!r} in the place of {other[0]!r}" if other else \
                f"{len(found)}, not {len(recorded)}"
            raise ConfigError(f"the data in {trained.data.path} have other classes than the run "
                              f"was trained on ({what}): give the run's own with --data_root")
        recorded = found
    else:
        shape, mean, std = record.shape(trained.data), record.mean, record.std
        classes = len(recorded) or record.count(trained.data)[1]
        model = rerun.network(trained, weights, classes, shape)
    labels = recorded or [str(label) for label in range(classes)]
    facts = _facts(trained, weights, labels, shape, mean, std)
    facts["weights_sha256"] = weights_digest(model.state_dict())
    return Source(model.eval(), shape, mean, std, labels, facts, images if config.check else None)


def _facts(trained: TrainConfig, weights: Path, labels: list[str], shape: Sequence[int],
           mean: Sequence[float], std: Sequence[float]) -> dict[str, str]:
    facts: dict[str, Any] = {
        "model": trained.model, "norm": trained.norm, "dataset": trained.data.dataset,
        "labels": labels, "input_shape": list(shape), "mean": list(mean), "std": list(std),
        "weights": weights.parent.name if weights.name == "shared.pt" else weights.name,
        "step": _step(weights), "hvdnoise": hvdnoise.__version__}
    return {name: value if isinstance(value, str) else json.dumps(value)
            for name, value in facts.items() if value is not None}


def _labels(run: Path) -> list[str] | None:
    """The names of the classes that the run has noted: [] where they have none, None where an
    older run has noted nothing."""
    path = run / "environment.json"
    found = read_json(path).get("labels") if path.is_file() else None
    if found is not None and not (isinstance(found, list) and all(
            isinstance(each, str) for each in found)):
        raise ConfigError(f"{path} is damaged: its labels are no list of names; take them out to "
                          "have them from the data")
    return found


def _step(weights: Path) -> int | None:
    """The step that the weights are of, where the run says so."""
    if weights.name == "shared.pt":
        step = checkpoint.check(weights.parent, {"shared.pt"})["step"]
    else:
        summary = weights.parent / "summary.json"
        step = read_json(summary).get(_STEPS.get(weights.name, "")) if summary.is_file() else None
    return step if type(step) is int else None
