"""Models by name: sizes known from the papers, all image shapes in use, errors in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from hvdnoise.training import models

CIFAR, FASHION = (3, 32, 32), (1, 28, 28)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("depth,millions", [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85),
                                            (110, 1.7)])
def test_cifar_resnets_have_the_sizes_of_the_paper(depth: int, millions: float) -> None:
    """He et al. 2015, table 6; and the depth: convolutions and the linear layer."""
    model = models.build(f"resnet{depth}", 10, CIFAR)
    assert abs(size(model) / 1e6 - millions) < (0.05 if depth == 110 else 0.006)
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


def test_option_a_shortcuts_are_strided_identities() -> None:
    model = models.build("resnet20", 10, CIFAR).eval()
    block = next(module for module in model.modules() if getattr(module, "stride", 0) == 2
                 and not isinstance(module, nn.Conv2d))
    nn.init.zeros_(block.bn2.weight)  # type: ignore[union-attr, arg-type]
    images = torch.rand(2, 16, 6, 6)
    out = block(images)
    assert out.shape == (2, 32, 3, 3)
    torch.testing.assert_close(out[:, 8:24], images[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


@pytest.mark.parametrize("name,shape", [
    ("mlp", FASHION), ("mlp", CIFAR), ("small-cnn", FASHION), ("small-cnn", CIFAR),
    ("resnet20", FASHION), ("vgg16-bn", CIFAR),
    ("vgg16-bn", FASHION), ("resnet18", CIFAR), ("torchvision:resnet18", FASHION),
    ("mobilenet_v3_small", FASHION), ("googlenet", (3, 64, 64))])
def test_models_train_on_these_shapes(name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = models.build(name, 7, shape)
    assert model.training
    logits = model(torch.rand(2, *shape))
    assert logits.shape == (2, 7) and logits.dtype == torch.float32
    logits.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all()
               for parameter in model.parameters())


def test_vgg16_has_13_convolutions() -> None:
    assert size(models.build("vgg16-bn", 10, CIFAR)) == 14_724_042
    convolutions = [m for m in models.build("vgg16-bn", 10, FASHION).modules()
                    if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 13 and convolutions[0].in_channels == 1


def test_the_mlp_has_the_size_of_the_studies() -> None:
    assert size(models.build("mlp", 10, FASHION)) == 109_386


@pytest.mark.parametrize("name", ["small-cnn", "resnet20", "vgg16-bn"])
def test_norm_changes_the_layers_and_no_weight_that_is_drawn(name: str) -> None:
    kinds = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm}
    built = {}
    for norm in models.NORMS:
        torch.manual_seed(3)
        built[norm] = models.build(name, 10, CIFAR, norm=norm)
    own = "group" if name == "small-cnn" else "batch"
    for norm, model in built.items():
        found = [type(each) for each in model.modules() if isinstance(each, tuple(kinds.values()))]
        assert len(found) >= 3 and set(found) == {kinds[own if norm == "auto" else norm]}
        outlined = models.outline(name, 10, CIFAR, norm=norm)
        assert list(outlined.state_dict()) == list(model.state_dict())
    for (key, batch), (_, group) in zip(built["batch"].named_parameters(),
                                        built["group"].named_parameters()):
        assert torch.equal(batch, group), key
    images = torch.rand(4, *CIFAR)
    torch.testing.assert_close(built["group"](images)[:2], built["group"](images[:2]))
    assert not torch.allclose(built["batch"](images)[:2], built["batch"](images[:2]))


def test_groups_have_four_channels_until_there_are_32() -> None:
    groups = {each.num_channels: each.num_groups
              for each in models.build("vgg16-bn", 10, CIFAR, norm="group").modules()
              if isinstance(each, nn.GroupNorm)}
    assert groups == {64: 16, 128: 32, 256: 32, 512: 32}


@pytest.mark.parametrize("name, norm, text", [
    ("mlp", "group", "norm=group does nothing in model 'mlp': leave it out, or choose one of sm"),
    ("resnet18", "batch", "norm=batch does nothing in model 'resnet18'"),
    ("resnet20", "layer", "norm='layer' is unknown: choose one of auto, batch, group")])
def test_a_norm_that_does_nothing_is_refused(name: str, norm: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        models.build(name, 10, CIFAR, norm=norm)


def test_building_draws_weights_by_the_seed_only() -> None:
    torch.manual_seed(3)
    first = models.build("small-cnn", 10, FASHION).state_dict()
    torch.manual_seed(3)
    second = models.build("small-cnn", 10, FASHION).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_batch_statistics_start_untouched() -> None:
    """The blank image that `build` tries must leave no trace in batch norm."""
    for name in ("resnet20", "vgg16-bn", "resnet18"):
        for key, value in models.build(name, 10, CIFAR).state_dict().items():
            if key.endswith("running_mean") or key.endswith("num_batches_tracked"):
                assert not value.any()


def test_small_cnn_treats_each_example_alone() -> None:
    model = models.build("small-cnn", 10, FASHION)
    images = torch.rand(4, *FASHION)
    torch.testing.assert_close(model(images)[:2], model(images[:2]))


@pytest.mark.parametrize("name,shape,text", [
    ("resnet19", CIFAR, "model 'resnet19' is unknown: did you mean resnet18"),
    ("small_cnn", CIFAR, "did you mean small-cnn"),
    ("torchvision:nothing-like-it", CIFAR, "choose one of small-cnn, resnet20"),
    ("alexnet", FASHION, r"'alexnet' cannot take images of shape \(1, 28, 28\).*another model"),
    ("vit_b_16", FASHION, "'vit_b_16' cannot take images"),
    ("torchvision:resnet20", CIFAR, "is unknown")])
def test_misfits_are_one_line(name: str, shape: tuple[int, int, int], text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        models.build(name, 10, shape)
    assert "\n" not in str(caught.value)


def test_names_lists_ours_and_torchvisions() -> None:
    names = set(models.names())
    assert {"small-cnn", "resnet110", "vgg16-bn", "resnet18", "convnext_tiny"} <= names


@pytest.mark.slow
def test_torchvision_is_imported_late() -> None:
    """The data and the models of ours need no torchvision."""
    program = ("import sys; from hvdnoise.training import data, models;"
               "models.build('small-cnn', 10, (1, 28, 28));"
               "assert 'torchvision' not in sys.modules; models.build('resnet18', 10, (3, 32, 32))")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
