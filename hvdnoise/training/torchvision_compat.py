"""The one place that imports torchvision; the others take datasets, models, transforms from here.

torchvision's wheel on PyPI is built for CUDA torch. Beside a CPU torch its C++ extension does not
load, and ``import torchvision`` then fails at ``operator torchvision::nms does not exist``. The
schemas of its two operators are all that the import needs, so they are defined here first, and
only where the extension is missing. Models, transforms and data sets then work; ``ops.nms`` and
``io.read_image`` do not, and are not used.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def _extension_loads() -> bool:
    """Whether torchvision's operators are known to this torch, or load into it."""
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return True  # not installed: let the import say so
    try:
        for path in Path(found.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(path))
    except (ImportError, OSError):
        return False
    return hasattr(torch.ops.torchvision, "nms")


if not _extension_loads():
    _schemas = torch.library.Library("torchvision", "DEF")  # held here: it unregisters when freed
    for _operator in ("nms", "qnms"):
        _schemas.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision.datasets  # noqa: E402
import torchvision.models  # noqa: E402
import torchvision.transforms.v2  # noqa: E402

datasets = torchvision.datasets
models = torchvision.models
transforms = torchvision.transforms.v2
