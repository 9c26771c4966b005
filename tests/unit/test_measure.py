"""Curvature, noise and the loss around the weights, against dense formulas in float64."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from curvlinops import HessianLinearOperator
from torch import Tensor, nn
from torch.nn import functional as F

from hvdnoise.measure import alignment, report, spectrum, surface
from hvdnoise.measure.config import MeasureConfig, validate
from hvdnoise.measure.problem import Problem, Share, draw
from hvdnoise.measure.run import measure, run
from hvdnoise.training import models
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.dataspec import DataConfig
from hvdnoise.training.images import ArrayImages
from hvdnoise.training.options import parse
from hvdnoise.training.records import weights_digest
from tests import reference
from tests.fake_world import ThreadWorld, run_threads

COUNT, WORKERS, b = 30, 4, 7  # two images are left over


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def cnn() -> nn.Module:
    """With BatchNorm whose running statistics are not those of the images, and dropout."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                          nn.Dropout(0.5), nn.Flatten(), nn.Linear(24, 3)).double()
    model[1].running_mean.normal_()  # type: ignore[operator, union-attr]
    model[1].running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    return model


MODELS = {"mlp": mlp, "cnn": cnn}


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(COUNT, 1, 2, 3, generator=generator, dtype=torch.float64),
            torch.randint(3, (COUNT,), generator=generator))


def problem(world: ThreadWorld, model: nn.Module) -> Problem:
    found, labels = images()
    share = Share(found[world.rank::world.size], labels[world.rank::world.size], COUNT)
    return Problem(copy.deepcopy(model), share, world, batch_size=4)


def alone(model: nn.Module) -> Problem:
    (found,) = run_threads(1, lambda world: problem(world, model))
    return found


def dense_loss(model: nn.Module, theta_P: Tensor, start: int = 0, stop: int = COUNT) -> Tensor:
    sizes = {name: each for name, each in model.named_parameters()}
    parts = theta_P.split([each.numel() for each in sizes.values()])
    weights = {name: part.view_as(each) for (name, each), part in zip(sizes.items(), parts)}
    found, labels = images()
    own = copy.deepcopy(model).eval()  # threads share the model, and the call writes to it
    logits = torch.func.functional_call(own, weights, (found[start:stop],))
    return F.cross_entropy(logits, labels[start:stop])


def theta(model: nn.Module) -> Tensor:
    return torch.cat([each.detach().reshape(-1) for each in model.parameters()])


def dense_hessian(model: nn.Module) -> Tensor:
    return torch.autograd.functional.hessian(  # type: ignore[no-any-return, no-untyped-call]
        lambda theta_P: dense_loss(model, theta_P), theta(model))


# ---------------------------------------------------------------------------- curvature


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 2, 3, 32])  # with 32 ranks some have no image
def test_products_and_gradients_are_the_dense_ones(name: str, size: int) -> None:
    model = MODELS[name]()
    hessian_PP = dense_hessian(model)
    vectors_KP = torch.randn(3, len(hessian_PP), dtype=torch.float64)
    start_P = theta(model).requires_grad_()
    (gradient_P,) = torch.autograd.grad(dense_loss(model, start_P, 5, 17), start_P)

    def work(world: ThreadWorld) -> None:
        found = problem(world, model)
        assert torch.allclose(found.products(vectors_KP), vectors_KP @ hessian_PP, atol=1e-12)
        assert torch.allclose(found.gradient(5, 17), gradient_P, atol=1e-12)
        (loss, accuracy), (other, _) = found.scores([found.weights(), found.weights() + 0.1])
        assert loss == pytest.approx(dense_loss(model, start_P).item(), rel=1e-12)
        assert other == pytest.approx(dense_loss(model, start_P + 0.1).item(), rel=1e-12)
        assert accuracy * COUNT == pytest.approx(round(accuracy * COUNT), abs=1e-9)
    run_threads(size, work)


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_curvlinops(name: str) -> None:
    model = MODELS[name]().eval()
    found = alone(model)
    operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()),
                                     [images()])
    vectors_KP = torch.randn(2, found.size, dtype=torch.float64)
    assert torch.allclose(found.products(vectors_KP), (operator @ vectors_KP.T).T, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_eigenvalues_agree_with_the_dense_hessian(name: str) -> None:
    model = MODELS[name]()
    expected = torch.linalg.eigvalsh(dense_hessian(model)).flip(0)[:4]

    def work(world: ThreadWorld) -> spectrum.Eigen:
        return spectrum.largest(problem(world, model), 4, seed=0)
    one, two = run_threads(2, work)
    assert one.values == two.values and torch.equal(one.vectors_KP, two.vectors_KP)
    assert one.values == pytest.approx(expected.tolist(), rel=0.01)
    for value, error, right in zip(one.values, one.errors, expected.tolist()):
        assert abs(value - right) <= error + 1e-12 and error < 0.01 * value
    identity = one.vectors_KP @ one.vectors_KP.T
    assert torch.allclose(identity, torch.eye(4, dtype=torch.float64), atol=1e-12)


def test_the_error_of_an_eigenvalue_is_the_norm_of_its_residual(
        monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    hessian_PP = dense_hessian(model)
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(len(hessian_PP), 2)))[0].T
    monkeypatch.setattr(spectrum, "_eigenvectors", lambda *_: rows)
    found = spectrum.largest(alone(model), 2, seed=0)
    for value, error, v_P in zip(found.values, found.errors, found.vectors_KP):
        assert value == pytest.approx((v_P @ hessian_PP @ v_P).item())
        assert error == pytest.approx((hessian_PP @ v_P - value * v_P).norm().item())


def with_hessian(hessian_PP: Tensor) -> Problem:
    found = alone(mlp())
    found.products = lambda v_KP: v_KP @ hessian_PP  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("count", [0, 3])
def test_the_trace_is_within_its_error(count: int) -> None:
    """Over many seeds: the mean error is what is stated, and the estimate is not biased."""
    hessian_PP = dense_hessian(mlp())
    expected = hessian_PP.trace().item()
    found = with_hessian(hessian_PP)
    eigen = spectrum.largest(found, count, seed=0)
    scaled = []
    for seed in range(60):
        trace, error = spectrum.trace(found, eigen, 24, seed)
        assert trace is not None and error is not None and error < 0.5 * expected
        scaled.append((trace - expected) / error)
    assert abs(np.mean(scaled)) < 4 / math.sqrt(60)
    assert 0.7 < np.std(scaled) < 1.4


def test_known_eigenvectors_make_the_trace_more_certain() -> None:
    """For a spectrum that decays, as that of a trained network."""
    basis_PP = np.linalg.qr(np.random.default_rng(0).normal(size=(53, 53)))[0]
    found = with_hessian(torch.from_numpy(basis_PP * 0.5 ** np.arange(53) @ basis_PP.T))
    errors = []
    for count in (0, 4):
        trace, error = spectrum.trace(found, spectrum.largest(found, count, seed=0), 20, 0)
        assert trace is not None and error is not None and abs(trace - 2) < 4 * error
        errors.append(error)
    assert errors[1] < 0.15 * errors[0]


# ---------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("name, size", [("mlp", 1), ("mlp", 3), ("cnn", 2)])
def test_tr_hc_is_the_dense_one(name: str, size: int) -> None:
    model = MODELS[name]()
    start_P = theta(model).requires_grad_()
    gradients_WP = np.stack([torch.autograd.grad(dense_loss(model, start_P, i * b, (i + 1) * b),
                                                 start_P)[0].numpy() for i in range(WORKERS)])
    covariance_PP = reference.worker_covariance(gradients_WP, b)
    hessian_PP = dense_hessian(model).numpy()
    expected = np.trace(hessian_PP @ covariance_PP)

    def work(world: ThreadWorld) -> alignment.Alignment:
        return alignment.measure(problem(world, model), WORKERS)
    for found in run_threads(size, work):
        assert (found.workers, found.examples_per_worker) == (WORKERS, b)
        assert found.trace_hc == pytest.approx(expected, rel=1e-10)
        assert found.trace_c == pytest.approx(np.trace(covariance_PP), rel=1e-10)
        assert found.noise_curvature == pytest.approx(expected / np.trace(covariance_PP))
        without = [np.trace(hessian_PP @ reference.worker_covariance(
            np.delete(gradients_WP, i, axis=0), b)) for i in range(WORKERS)]
        variance = (WORKERS - 1) / WORKERS * np.square(without - np.mean(without)).sum()
        assert found.trace_hc_error == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_missing_estimates_are_null() -> None:
    found = alone(mlp())
    for workers in (0, 1):
        assert alignment.measure(found, workers).trace_hc is None
    two = alignment.measure(found, 2)
    assert two.trace_hc is not None and two.trace_hc_error is None
    assert alignment.measure(found, 1000).workers == COUNT  # there are no more images
    eigen = spectrum.largest(found, 0, seed=0)
    assert (eigen.values, eigen.errors) == ([], [])
    assert spectrum.trace(found, eigen, 0, 0) == (None, None)
    assert spectrum.trace(found, eigen, 1, 0)[1] is None
    assert surface.line(found, 0, 1.0, 0) is None and surface.plane(found, 0, 1.0, 0) is None
    assert surface.under_noise(found, (), 2, 0) == []
    assert surface.under_noise(found, (0.1,), 1, 0)[0]["accuracy_error"] is None


def test_a_hessian_of_zero_or_of_nan_has_no_eigenvalues() -> None:
    for weight in (0.0, math.nan):
        model = mlp()
        with torch.no_grad():
            for each in model.parameters():
                each.fill_(weight)
        found = alone(model)
        if weight == 0.0:
            found.share.labels.fill_(0)
            found.products = torch.zeros_like  # type: ignore[assignment, method-assign]
        eigen = spectrum.largest(found, 2, seed=0)
        assert (eigen.values, eigen.errors, len(eigen.vectors_KP)) == ([], [], 0)


def test_more_eigenvalues_than_weights_are_refused() -> None:
    found = alone(mlp())
    with pytest.raises(ValueError, match="eigenvalues=53 is wrong: the model has 53 weights"):
        spectrum.largest(found, 53, seed=0)


# ---------------------------------------------------------------------------- surface


def test_directions_have_the_filters_lengths() -> None:
    model = cnn()
    found = alone(model)
    for make, exact in ((surface.direction, True), (surface.noise, False)):
        squares = []
        for which in range(300):
            parts = found.split(make(found, 0, which))
            for part, weight in zip(parts, model.parameters()):
                if weight.ndim < 2:
                    assert not part.any()
                elif exact:
                    assert torch.allclose(part.flatten(1).norm(dim=1),
                                          weight.detach().flatten(1).norm(dim=1))
            squares.append(parts[0].flatten(1).square().sum(1))
        ratio = torch.stack(squares).mean(0) / model[0].weight.detach().flatten(  # type: ignore
            1).square().sum(1)
        assert torch.allclose(ratio, torch.ones(4, dtype=torch.float64), atol=0.15)
    assert not torch.equal(surface.direction(found, 0, 0), surface.direction(found, 0, 1))


def test_line_and_plane_are_the_loss_there() -> None:
    model = mlp()
    found = alone(model)
    line = surface.line(found, 5, 0.5, 3)
    plane = surface.plane(found, 5, 0.5, 3)
    assert line is not None and plane is not None
    assert line["at"] == plane["at"] == [-0.5, -0.25, 0.0, 0.25, 0.5]
    first_P, second_P = (surface.direction(found, 3, which) for which in (0, 1))
    for i, y in enumerate(plane["at"]):
        for j, x in enumerate(plane["at"]):
            there = dense_loss(model, theta(model) + x * first_P + y * second_P)
            assert plane["loss"][i][j] == pytest.approx(there.item(), rel=1e-12)
    assert line["loss"] == pytest.approx(plane["loss"][2], rel=1e-12)
    assert line["accuracy"] == plane["accuracy"][2]


def test_accuracy_under_noise() -> None:
    found = alone(mlp())
    rows = surface.under_noise(found, (0.0, 0.3), 4, seed=1)
    ((loss, accuracy),) = found.scores([found.weights()])
    assert rows[0]["accuracies"] == [accuracy] * 4 and rows[0]["accuracy_error"] == 0
    assert rows[0]["loss"] == pytest.approx(loss)
    scores = found.scores([found.weights() + 0.3 * surface.noise(found, 1, number)
                           for number in range(4)])
    assert rows[1]["accuracies"] == [each for _, each in scores]
    losses = [each for each, _ in scores]
    assert rows[1]["loss"] == pytest.approx(np.mean(losses))
    assert rows[1]["loss_error"] == pytest.approx(np.std(losses, ddof=1) / 2)


# ---------------------------------------------------------------------------- the whole


QUICK = MeasureConfig(eigenvalues=2, probes=3, workers=3, points=3, plane=3, levels=(0.1,), draws=2)


@pytest.mark.parametrize("name", MODELS)
def test_all_ranks_find_the_same_and_the_model_stays_as_it_was(name: str) -> None:
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def work(world: ThreadWorld) -> Any:
        found = problem(world, model)
        record = measure(QUICK, found, found)
        after = found.model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert all(each.grad is None for each in found.parameters)
        return {key: value for key, value in record.items() if key != "seconds"}

    (one,), (two, other) = run_threads(1, work), run_threads(2, work)
    assert two == other
    for key in ("line", "plane", "noise", "alignment", "hessian"):
        assert numbers(one[key]) == pytest.approx(numbers(two[key]), rel=1e-3), key


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = [each for key, each in value.items() if "error" not in key and key != "products"]
    return [each for part in value for each in numbers(part)] if isinstance(value, list) \
        else [value]


def test_the_images_are_drawn_by_the_seed_and_spread_over_the_ranks() -> None:
    pixels = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1).repeat(8, 2).repeat(8, 3)
    stored = ArrayImages(pixels, np.arange(50), mean=(0.0,), std=(1 / 255,), padding=2, seed=0)

    def work(world: ThreadWorld, seed: int = 0, part: str = "train", most: int = 12) -> list[int]:
        share = draw(stored, most, seed, part, world, torch.device("cpu"), batch_size=3)
        assert share.count == min(most, 50)
        assert share.images[:, 0, 4, 4].round().long().tolist() == share.labels.tolist()
        return share.labels.tolist()
    (whole,), parts = run_threads(1, work), run_threads(5, work)
    assert len(set(whole)) == 12 and [whole[rank::5] for rank in range(5)] == parts
    assert run_threads(1, lambda world: work(world, seed=1))[0] != whole
    assert run_threads(1, lambda world: work(world, part="test"))[0] != whole
    assert sorted(run_threads(1, lambda world: work(world, most=99))[0]) == list(range(50))
    assert sum(map(len, run_threads(14, work))) == 12  # two ranks have none


def test_the_files(tmp_path: Path) -> None:
    found = alone(mlp())
    record = {"run": "x", "examples": COUNT, "test_examples": COUNT, "test_accuracy": 0.5,
              **measure(QUICK, found, found)}
    record["line"]["loss"][0] = math.inf
    report.write(record, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "line.png", "measure.json", "noise.png", "plane.png"]
    again = json.loads((tmp_path / "measure.json").read_text())
    assert again["line"]["loss"][0] is None and again["plane"] == record["plane"]
    assert len(report.lines(record)) == 4
    record["plane"] = None
    report.write(record, tmp_path)
    assert not (tmp_path / "plane.png").exists()


def trained(folder: Path, weight: float | None = None) -> tuple[TrainConfig, Path]:
    """A network with BatchNorm on made-up images, and the file of its weights."""
    data = DataConfig(dataset="synthetic", num_examples=40, num_classes=3, image_size=8)
    torch.manual_seed(3)
    model = models.build("resnet20", 3, (3, 8, 8))
    if weight is not None:
        next(model.parameters()).data.fill_(weight)
    torch.save(model.state_dict(), folder / "weights.pt")
    return TrainConfig(data=data, model="resnet20"), folder / "weights.pt"


def test_a_run_on_two_ranks(tmp_path: Path) -> None:
    found, weights = trained(tmp_path)
    config = dataclasses.replace(QUICK, run=str(tmp_path), eigenvalues=1, examples=13)
    before = weights.read_bytes()
    run_threads(2, lambda world: run(config, found, weights, world, torch.device("cpu")))
    record = json.loads((tmp_path / "measure" / "measure.json").read_text())
    assert (record["examples"], record["test_examples"], record["ranks"]) == (13, 10, 2)
    assert record["hessian"]["eigenvalues"][0] > 0 and record["alignment"]["trace_hc"] is not None
    assert record["weights_sha256"] == weights_digest(torch.load(weights, weights_only=True))
    assert weights.read_bytes() == before


@pytest.mark.parametrize("options, weight, says", [
    ({}, math.nan, "weights.pt holds conv.weight, which is not finite"),
    ({}, 3e38, "the loss of these weights is "),
    ({"eigenvalues": 10 ** 9}, None, "eigenvalues=1000000000 is wrong: the model has"),
    ({"out": "{folder}/weights.pt/x"}, None, "weights.pt/x cannot be made"),
])
def test_what_is_found_late_makes_nothing_either(tmp_path: Path, options: dict[str, Any],
                                                 weight: float | None, says: str) -> None:
    found, weights = trained(tmp_path, weight)
    options = {key: value.replace("{folder}", str(tmp_path)) if isinstance(value, str) else value
               for key, value in options.items()}
    config = dataclasses.replace(QUICK, run=str(tmp_path), examples=4, **options)
    with pytest.raises(ConfigError) as caught:
        run_threads(2, lambda world: run(config, found, weights, world, torch.device("cpu")))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


@pytest.mark.parametrize("flags, says", [
    (["--examples", "0"], "examples=0 is wrong: give 1 or more"),
    (["--examples", "many"], "examples=many is wrong: give a whole number"),
    (["--batch_size", "0"], "batch_size=0"),
    (["--eigenvalues", "-1"], "eigenvalues=-1"),
    (["--probes", "1.5"], "probes=1.5 is wrong: give a whole number"),
    (["--workers", "-2"], "workers=-2"),
    (["--workers", "9", "--examples", "8"], "workers=9 is wrong: each has at least one of the 8"),
    (["--points", "4"], "points=4 is wrong: give an odd number"),
    (["--plane", "1"], "plane=1 is wrong: give an odd number"),
    (["--distance", "0"], "distance=0.0"),
    (["--distance", ".inf"], "distance=inf"),
    (["--levels", "[0.1, -1]"], "levels=[0.1, -1.0] is wrong: -1.0 is no size"),
    (["--levels", "[0.1, .inf]"], "inf is no size"),
    (["--levels", "[0.1, .nan]"], "levels=nan is wrong"),
    (["--levels", "loud"], "levels=loud is wrong: give a list"),
    (["--draws", "0"], "draws=0"),
    (["--seed", "-1"], "seed=-1"),
    (["--threads", "0"], "threads=0"),
    (["--device", "tpu"], "device=tpu is wrong: give one of auto, cpu, cuda"),
    (["--probs", "3"], "did you mean probes"),
    (["--out", "{folder}/file"], "it is not a folder"),
    (["--out", "{folder}/used"], "it holds a measurement already"),
])
def test_a_wrong_option_is_one_line(tmp_path: Path, flags: list[str], says: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "measure.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        validate(parse(MeasureConfig, ["RUN", *(flag.replace("{folder}", str(tmp_path))
                                                for flag in flags)],
                       program="hvdnoise measure", positional="run"))
    assert says in str(caught.value) and "\n" not in str(caught.value)
