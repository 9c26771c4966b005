"""The settings of an export, and what makes them right or wrong before anything is made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvdnoise import extras
from hvdnoise.training.errors import one_line_errors
from hvdnoise.training.validation import require

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors"}
PACKAGES = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime"),
            "safetensors": ("safetensors",)}  # beside torch


@dataclass(frozen=True)
class ExportConfig:
    """Write the network of a run as one file that other programs take; see docs/export.md.

    The file is there once it has predicted test images as the run's own network does. Exit code 0:
    it is; 1: the network cannot be written so, or predicts something else, and nothing is left;
    2: bad input.

    Args:
        run: the run's folder.
        format: torch: a program of torch.export (.pt2); onnx: for any ONNX runtime; both normalise
            the images themselves. safetensors: the weights alone.
        output: the file, in a folder that is there; default: one in RUN/export, named after the
            weights.
        checkpoint: final, best, ema, or the path of a checkpoint or of saved weights.
        check: so many test images (at most all) are predicted by both networks; 0 leaves that out,
            and needs no data where the run has noted the names of its classes.
        data_root: folder of the data sets; default: as the run had it.
        trust_plugins: import the functions that the run names as data set and model. They are code:
            look at them first.
        threads: default: OMP_NUM_THREADS, else one for each core.
        overwrite: replace output where it is there.
    """

    run: str = ""
    format: Literal["torch", "onnx", "safetensors"] = "torch"
    output: str | None = None
    checkpoint: str = "final"
    check: int = 1000
    data_root: str | None = None
    trust_plugins: bool = False
    threads: int | None = None
    overwrite: bool = False

    def target(self, weights: Path) -> Path:
        """The file to write.

        Args:
            weights: the file that the weights come from; of a checkpoint its shared.pt.
        """
        if self.output is not None:
            return Path(self.output)
        stem = weights.resolve().parent.name if weights.name == "shared.pt" else weights.stem
        return Path(self.run) / "export" / (stem + SUFFIXES[self.format])


@one_line_errors()
def validate(config: ExportConfig, weights: Path) -> None:
    """Check what can be without reading the weights.

    Raises:
        ConfigError: one line with the value that is wrong and the remedy.
    """
    require(config.check >= 0, "check", config.check, "give 0 or more")
    extras.require(f"format={config.format}", *PACKAGES[config.format])
    target, suffix = config.target(weights), SUFFIXES[config.format]
    require(target.suffix == suffix, "output", target,
            f"a file of format={config.format} ends with {suffix}; give such a name, or another "
            "--format")
    require(not target.is_dir(), "output", target, "it is a folder; give the name of a file")
    require(target.parent.is_dir() or config.output is None and not target.parent.exists(),
            "output", target, f"there is no folder {target.parent}; make it, or give another name")
    require(config.overwrite or not os.path.lexists(target), "output", target,
            "it is there already; give another name, or --overwrite to replace it")
