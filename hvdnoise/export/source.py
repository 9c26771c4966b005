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
from hvdnoise.training.dataspec import DataSpec
from hvdnoise.training.errors import ConfigError, one_line_errors
from hvdnoise.training.fetch import prepare_here
from hvdnoise.training.images import PIXELS, Images, normalisation
from hvdnoise.training.records import weights_digest

_STEPS = {"weights.pt": "steps", "weights-ema.pt": "steps", "weights-best.pt": "best_step"}


class Network(nn.Module):
    """Examples (b, *shape) float32, as `Source.inputs` has them -> logits (b, classes).

    Args:
        model: takes normalised examples.
        mean, std: of each channel.
        unit, dims: of the data set; see `hvdnoise.training.images.normalisation`.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], unit: int,
                 dims: int) -> None:
        super().__init__()
        self.model, self.unit = model, unit
        self.scale: Tensor
        self.shift: Tensor
        for name, value in zip(("scale", "shift"), normalisation(mean, std, unit, dims)):
            self.register_buffer(name, value)

    def forward(self, examples: Tensor) -> Tensor:
        # in two steps: k / 255 * 255 is k exactly, and then all is as in the run
        logits: Tensor = self.model(examples * self.unit * self.scale + self.shift)
        return logits


@dataclass(frozen=True)
class Source:
    """A run's network.

    Args:
        model: in evaluation mode, with the weights, on the CPU; takes normalised examples.
        spec: of the data.
        mean, std: of each channel, of values in 0 .. 1.
        unit: stands for 1 in what the data set stores.
        labels: a name for each class.
        facts: what a file says of the network: texts by name, lists as JSON in ASCII.
        images: the test examples; None where they are not looked at.
    """

    model: nn.Module
    spec: DataSpec
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unit: int
    labels: list[str]
    facts: dict[str, str]
    images: Images | None

    @property
    def network(self) -> nn.Module:
        """The model with the normalisation before it; whole numbers, such as tokens, have none."""
        return Network(self.model, self.mean, self.std, self.unit,
                       len(self.spec.image_shape)).eval() if self.has_floats else self.model

    @property
    def has_floats(self) -> bool:
        """Whether the network takes float32; int64, if not."""
        return self.spec.dtype == "float32"

    @property
    def example(self) -> Tensor:
        """Two examples of zeros; of one torch would take the size of the batch for fixed."""
        return torch.zeros(2, *self.spec.image_shape, dtype=getattr(torch, self.spec.dtype))

    def inputs(self, indices: Sequence[int]) -> Tensor:
        """Test examples (b, *shape) as `network` takes them."""
        assert self.images is not None
        stored = self.images.stored(indices)
        return stored.float() / self.unit if self.has_floats else stored

    def normalization(self, *, inside: bool) -> str:
        """What a file says of the normalisation: whether its network does it."""
        values = "values x in 0..1" if self.unit > 1 else "x as the data set has it"
        if not self.has_floats:
            return "none: the network takes whole numbers, int64"
        return f"inside: the network takes {values} and normalises them" if inside else \
            f"outside: give the network (x - mean) / std of {values}"


@one_line_errors()
def read(config: ExportConfig, trained: TrainConfig, weights: Path) -> Source:
    """Read the weights, and the data where they are needed.

    Raises:
        ConfigError: one line; see `hvdnoise.training.rerun.restore`. Also where the classes of the
            data are not those that the run was trained on.
    """
    recorded, record = _labels(Path(config.run)), trained.data.record
    images: Images | None = None
    if config.check > 0 or recorded is None or record.own:
        prepare_here(trained.data)
        datasets, model = rerun.restore(trained, weights, torch.device("cpu"))
        spec, images = datasets.spec, datasets.test
        mean, std, unit, found = images.mean, images.std, images.unit, list(images.classes)
        if recorded and recorded != found:
            other = next((pair for pair in zip(recorded, found) if pair[0] != pair[1]), None)
            what = f"{other[1]!r} in the place of {other[0]!r}" if other else \
                f"{len(found)}, not {len(recorded)}"
            raise ConfigError(f"the data in {trained.data.path} have other classes than the run "
                              f"was trained on ({what}): give the run's own with --data_root")
        recorded = found
    else:
        mean, std, unit = record.mean, record.std, PIXELS
        spec = DataSpec(record.name, len(recorded) or record.count(trained.data)[1],
                        record.shape(trained.data), 0, 0)
        model = rerun.network(trained, weights, spec)
    labels = recorded or [str(label) for label in range(spec.num_classes)]
    facts = _facts(trained, weights, labels, spec.image_shape, mean, std)
    facts["weights_sha256"] = weights_digest(model.state_dict())
    return Source(model.eval(), spec, mean, std, unit, labels, facts,
                  images if config.check else None)


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
