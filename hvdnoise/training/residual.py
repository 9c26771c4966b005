"""Residual networks for images of about 32x32 pixels; `hvdnoise.training.models` has their sources.

All start with a 3x3 convolution of stride 1, have three or four groups of blocks, of which each
after the first halves the image, and end in the mean over pixels and a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

Norm = Callable[[int], nn.Module]  # of the number of channels


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(min(32, channels // 4), channels)


LAYERS: dict[str, Norm] = {"batch": nn.BatchNorm2d, "group": _group_norm}


def chosen(norm: str) -> Norm:
    """The layer of a setting "auto", "batch" or "group"."""
    return LAYERS["batch" if norm == "auto" else norm]


def kaiming(model: nn.Module) -> None:
    """He et al.'s initialisation: normal, variance 2 / fan_out, in every convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _OptionA(nn.Module):
    """Two 3x3 convolutions and the shortcut of option A."""

    def __init__(self, norm: Norm, narrow: int, wide: int) -> None:
        super().__init__()
        self.stride = 1 if narrow == wide else 2
        self.conv1 = nn.Conv2d(narrow, wide, 3, self.stride, padding=1, bias=False)
        self.bn1 = norm(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn2 = norm(wide)
        self.new_channels = wide - narrow

    def forward(self, images: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images)))))
        if self.stride == 2:
            images = images[:, :, ::2, ::2]
            half = self.new_channels // 2
            images = F.pad(images, (0, 0, 0, 0, half, half))
        return F.relu(out + images)


class CifarResNet(nn.Module):
    """6n + 2 layers: n blocks each of 16, 32 and 64 channels, mean over pixels, linear."""

    def __init__(self, depth: int, norm: str, num_classes: int,
                 image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        layer = chosen(norm)
        self.conv = nn.Conv2d(image_shape[0], 16, 3, padding=1, bias=False)
        self.bn = layer(16)
        widths = [16] + [wide for wide in (16, 32, 64) for _ in range((depth - 2) // 6)]
        self.blocks = nn.Sequential(*(_OptionA(layer, a, b) for a, b in zip(widths, widths[1:])))
        self.linear = nn.Linear(64, num_classes)
        kaiming(self)

    def forward(self, images: Tensor) -> Tensor:
        out = self.blocks(F.relu(self.bn(self.conv(images))))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


class _Basic(nn.Module):
    """Two 3x3 convolutions, norms after them; where sizes change, the shortcut is a 1x1 one."""

    def __init__(self, norm: Norm, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3(narrow, wide, stride), norm(wide)
        self.conv2, self.bn2 = _conv3(wide, wide), norm(wide)
        self.shortcut = nn.Sequential() if narrow == wide and stride == 1 else nn.Sequential(
            nn.Conv2d(narrow, wide, 1, stride, bias=False), norm(wide))

    def forward(self, images: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images)))))
        return F.relu(out + self.shortcut(images))


class SmallImageResNet18(nn.Sequential):
    """Two basic blocks each of 64, 128, 256 and 512 channels."""

    def __init__(self, norm: str, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        layer = chosen(norm)
        layers: list[nn.Module] = [_conv3(image_shape[0], 64), layer(64), nn.ReLU()]
        narrow = 64
        for wide in (64, 128, 256, 512):
            layers += [_Basic(layer, narrow, wide, 1 if wide == 64 else 2),
                       _Basic(layer, wide, wide, 1)]
            narrow = wide
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(512, num_classes))
        kaiming(self)


class _PreActivated(nn.Module):
    """Two 3x3 convolutions, norms and ReLUs before them; where the number of channels changes, the
    shortcut is a 1x1 convolution of what the first ReLU gives."""

    def __init__(self, norm: Norm, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = norm(narrow), _conv3(narrow, wide, stride)
        self.bn2, self.conv2 = norm(wide), _conv3(wide, wide)
        self.shortcut = None if narrow == wide else nn.Conv2d(narrow, wide, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        ready = F.relu(self.bn1(images))
        out = self.conv2(F.relu(self.bn2(self.conv1(ready))))
        passed: Tensor = images if self.shortcut is None else self.shortcut(ready)
        return out + passed


class WideResNet(nn.Sequential):
    """6n + 4 layers: n blocks each of 16k, 32k and 64k channels, norm, ReLU."""

    def __init__(self, depth: int, times: int, norm: str, num_classes: int,
                 image_shape: tuple[int, int, int]) -> None:
        layer, narrow = chosen(norm), 16
        layers: list[nn.Module] = [_conv3(image_shape[0], 16)]
        for wide in (16 * times, 32 * times, 64 * times):
            for number in range((depth - 4) // 6):
                stride = 2 if number == 0 and wide > 16 * times else 1
                layers.append(_PreActivated(layer, narrow, wide, stride))
                narrow = wide
        super().__init__(*layers, layer(narrow), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(narrow, num_classes))
        kaiming(self)


def _conv3(narrow: int, wide: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(narrow, wide, 3, stride, padding=1, bias=False)
