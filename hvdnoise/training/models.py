"""Models by name.

- mlp: two hidden layers of 128 and 64 ReLUs on the pixels; 109,386 parameters on Fashion-MNIST.
- small-cnn: three convolutions with group norm and a linear layer; for small images and quick runs.
- resnet20, 32, 44, 56, 110: the CIFAR networks of He et al., Deep residual learning, 2015, with
  shortcuts of option A (strided identity, new channels zero), as in the paper's CIFAR section.
- resnet18-cifar: ResNet-18 with a first convolution of 3x3 pixels and without the max pooling, as
  is usual for images of 32x32 pixels.
- wrn16-4, wrn16-8, wrn28-10: wide residual networks (Zagoruyko and Komodakis 2016,
  arXiv:1605.07146) of that depth and width, without dropout.
- vgg16-bn: VGG16 with batch norm and one linear layer, for images of about 32x32 pixels.
- any classifier of torchvision.models by its name, with random weights ("resnet18", or
  "torchvision:resnet18"). Its first convolution is made anew for images without 3 channels.
- a function of the user's own, as FILE.py:FUNCTION or MODULE:FUNCTION; see docs/own.md. mlp and
  such a function also take examples that are no images.

The normalisation of small-cnn, the CIFAR networks and vgg16-bn can be chosen (``norm``):

- group: group norm (Wu and He 2018, arXiv:1803.08494); of C channels min(32, C / 4) groups, in
  small-cnn 4 groups. An example's output depends on that example alone.
- batch: batch norm. In training each worker's statistics are those of its own batch ("ghost
  batches"), with V virtual workers those of each of the V micro-batches by itself; the running
  statistics are a rank's own, and evaluation uses their mean over the ranks
  (`hvdnoise.training.evaluate`).
- auto: each network's own: group in small-cnn, batch in the others.

Weights are drawn from torch's default generator: seed it (equally on all ranks) before `build`.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hvdnoise import extras
from hvdnoise.training import plugins
from hvdnoise.training.dataspec import DataSpec
from hvdnoise.training.residual import (
    LAYERS,
    CifarResNet,
    Norm,
    SmallImageResNet18,
    WideResNet,
    kaiming,
)

Shape = tuple[int, ...]
_Builder = Callable[[int, Any], nn.Module]
NORMS = ("auto", "batch", "group")
_PREFIX = "torchvision:"


def names() -> list[str]:
    """Every name that `build` knows."""
    return [*_own_names(), *_torchvision_names()]


def _own_names() -> list[str]:
    return [*_NORMED, *_BUILDERS]


def build_for(name: str, spec: DataSpec, *, norm: str = "auto") -> nn.Module:
    """`build`, for a data set."""
    return build(name, spec.num_classes, spec.image_shape, norm=norm, dtype=spec.dtype)


def build(name: str, num_classes: int, image_shape: Shape, *, norm: str = "auto",
          dtype: str = "float32") -> nn.Module:
    """A new model: (b, C, H, W) images -> (b, num_classes) logits.

    Args:
        name: one of `names()`; "torchvision:NAME" takes torchvision's where both have one; or the
            name of a function of the user's own, which the user has named (`plugins.function`).
        num_classes: width of the logits.
        image_shape: (C, H, W); of the user's own data any shape.
        norm: one of `NORMS`; see the module.
        dtype: of the images: float32, or int64 of the user's own data.

    Raises:
        ValueError: an unknown name (with the nearest ones), images the model cannot take, or a
            ``norm`` for a model without a choice.
    """
    builder = find(name, norm)
    blank = torch.zeros(1, *image_shape, dtype=getattr(torch, dtype))
    if plugins.names_function(name):
        return _own(name, builder, num_classes, blank)
    if name != "mlp" and len(image_shape) != 3 or dtype != "float32":
        raise ValueError(f"model {name!r} takes images (C, H, W) of floats, and an example is "
                         f"{dtype} {image_shape}: give a model of your own, as FILE.py:FUNCTION")
    try:
        model = builder(num_classes, image_shape).eval()
        with torch.no_grad():  # a blank image, so that a misfit is an error before the run
            logits = model(blank)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"model {name!r} cannot take images of shape {image_shape} "
                         f"({' '.join(str(error).split())}): choose another model or "
                         "data.image_size") from error
    assert logits.shape == (1, num_classes)
    return model.train()


def _own(name: str, function: Callable[..., Any], num_classes: int, blank: torch.Tensor
         ) -> nn.Module:
    """The model of the user's function; whatever is wrong with it is one line."""
    shape = tuple(blank.shape[1:])
    try:
        model = function(num_classes, shape)
    except (Exception, SystemExit) as error:
        raise ValueError(f"model={name}, called with {num_classes} classes and the shape {shape}, "
                         f"raised {plugins.blame(error, function)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={name} returned {type(model).__name__}: return a torch.nn.Module")
    try:
        with torch.no_grad():
            logits = model.eval()(blank)
    except Exception as error:
        raise ValueError(f"model={name} cannot take the batch {_describe(blank)}: "
                         f"{plugins.blame(error, function)}") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes) \
            or not logits.is_floating_point():
        raise ValueError(f"model={name} gives {_describe(logits)} for the batch "
                         f"{_describe(blank)}: give logits (1, {num_classes})")
    return model.train()


def _describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def outline(name: str, num_classes: int, image_shape: Shape, *, norm: str = "auto",
            dtype: str = "float32") -> nn.Module:
    """A model to look at; it is built without storage where it can be. Raises as `build`."""
    try:
        with torch.device("meta"):
            return build(name, num_classes, image_shape, norm=norm, dtype=dtype)
    except ValueError:  # some of torchvision's look at their numbers; or it is a real misfit
        return build(name, num_classes, image_shape, norm=norm, dtype=dtype)


def find(name: str, norm: str = "auto") -> _Builder:
    """What builds the model of this name. Raises as `build`, but for images."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown: choose one of {', '.join(NORMS)}")
    if name in _NORMED:
        return functools.partial(_NORMED[name], norm)
    if plugins.names_function(name):
        if norm != "auto":
            raise ValueError(f"norm={norm} does nothing in model {name!r}: leave it out")
        return plugins.function(name)
    plain = name.removeprefix(_PREFIX)
    if name not in _BUILDERS and plain not in _torchvision_names():
        near = difflib.get_close_matches(plain, names(), n=3, cutoff=0.5)
        raise ValueError(f"model {name!r} is unknown: " + (
            f"did you mean {' or '.join(near)}?" if near else
            f"choose one of {', '.join(_own_names())}, a classifier of torchvision, or a function "
            "of your own as FILE.py:FUNCTION"))
    if norm != "auto":
        raise ValueError(f"norm={norm} does nothing in model {name!r}: leave it out, or choose one "
                         f"of {', '.join(_NORMED)}")
    return _BUILDERS.get(name) or functools.partial(_torchvision, plain)


def _mlp(num_classes: int, image_shape: Shape) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), 128), nn.ReLU(),
                         nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, num_classes))


class _SmallCNN(nn.Sequential):
    """Three times (3x3 convolution, norm, ReLU, 2x2 max pooling), then a linear layer.

    Group norm unless asked otherwise: no statistics of the batch, so that a worker's gradient
    depends on its own examples alone and W virtual workers give what W ranks give.
    """

    def __init__(self, norm: str, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        channels, height, width = image_shape
        layer: Norm = nn.BatchNorm2d if norm == "batch" else functools.partial(nn.GroupNorm, 4)
        layers: list[nn.Module] = []
        for wide in (32, 64, 128):
            layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), nn.MaxPool2d(2),
                       layer(wide), nn.ReLU()]
            channels = wide
        layers += [nn.Flatten(), nn.Linear(channels * (height // 8) * (width // 8), num_classes)]
        super().__init__(*layers)


def _vgg16_bn(norm: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    channels, layer = image_shape[0], LAYERS["batch" if norm == "auto" else norm]
    layers: list[nn.Module] = []
    for widths in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        for wide in widths:
            layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), layer(wide),
                       nn.ReLU(inplace=True)]
            channels = wide
        layers.append(nn.MaxPool2d(2, ceil_mode=True))  # ceil: 28 pixels last five halvings too
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes)]
    model = nn.Sequential(*layers)
    kaiming(model)
    return model


def _torchvision_names() -> list[str]:
    extras.require("a model that is none of hvdnoise's own", "torchvision")
    from torchvision import models
    found: list[str] = models.list_models(module=models)
    return found


def _torchvision(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    from torchvision import models
    options: dict[str, Any] = {"num_classes": num_classes, "weights": None}
    if name in ("googlenet", "inception_v3"):  # else they return a tuple, and warn
        options.update(aux_logits=False, init_weights=True)
    if name.startswith("vit_"):
        options["image_size"] = image_shape[1]
    model: nn.Module = models.get_model(name, **options)
    if image_shape[0] != 3:
        first: Any
        path, first = next((path, module) for path, module in model.named_modules()
                           if isinstance(module, nn.Conv2d))
        assert first.dilation == (1, 1) and first.groups == 1
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Conv2d(
            image_shape[0], first.out_channels, first.kernel_size, first.stride, first.padding,
            bias=first.bias is not None))
    return model


_BUILDERS: dict[str, _Builder] = {"mlp": _mlp}
_NORMED: dict[str, Callable[..., nn.Module]] = {  # the norm comes first
    "small-cnn": _SmallCNN,
    **{f"resnet{depth}": functools.partial(CifarResNet, depth)
       for depth in (20, 32, 44, 56, 110)},
    "resnet18-cifar": SmallImageResNet18,
    **{f"wrn{depth}-{times}": functools.partial(WideResNet, depth, times)
       for depth, times in ((16, 4), (16, 8), (28, 10))},
    "vgg16-bn": _vgg16_bn,
}
