"""Kronecker covariance: factors against loops over examples, noise against its formula."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdnoise import CovarianceNoise, DistributedOptimizer, cli, streams
from hvdnoise.buckets import default_layout
from hvdnoise.layers import LayerStatistics, rows_of
from hvdnoise.noise import StepContext
from hvdnoise.planning.outline import noise_memory
from hvdnoise.roots import Root, roots
from tests import reference
from tests.fake_world import ThreadWorld, run_threads
from tests.laws import assert_normal
from tests.toys import Dense, Net, batch, build, losses, relative_error, train, vector

W, B, M, STEPS = 4, 4, 5, 5


def kronecker(**options: Any) -> Any:
    return CovarianceNoise("kronecker", M, seed=3, **options)


def factors(net: Net, step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and G of both layers, from one backward pass for each example of each worker."""
    found: dict[str, list[Any]] = {"first.weight": [0.0, 0.0], "last.weight": [0.0, 0.0]}
    for worker in range(W):
        for x, y in zip(*batch(step, worker, B)):
            hidden = net.first(x)
            active = torch.tanh(hidden)
            out = net.last(active)
            loss = losses(out[None], y[None]).sum()
            g_hidden, g_out = torch.autograd.grad(loss, [hidden, out])
            for name, a, g in (("first.weight", x, g_hidden), ("last.weight", active, g_out)):
                a1 = np.append(a.detach().numpy(), 1.0)
                found[name][0] = found[name][0] + np.outer(a1, a1) / (W * B)
                found[name][1] = found[name][1] + np.outer(g.numpy(), g.numpy()) / (W * B)
    return {name: (a, g) for name, (a, g) in found.items()}


def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors * np.sqrt(values.clip(min=0)) @ vectors.T)


def dense_run(dense: Dense, *, decay: float, every: int, damping: float, skip: bool = False,
              trace: float | None = None) -> None:
    seen: list[Any] = []
    diagonals: list[Any] = []
    for step in range(STEPS):
        gradients_WP = dense.worker_gradients(step)
        net = Net()
        with torch.no_grad():
            for p, where in zip(net.parameters(), dense.tensors()):
                p.copy_(torch.from_numpy(dense.theta_P[where]).view(p.shape))
        if step % every == 0:
            seen.append(factors(net, step))
            diagonals.append(np.diag(reference.worker_covariance(gradients_WP, B)))
        weights = np.array([decay ** age for age in range(len(seen))][::-1])
        weights = weights / weights.sum()
        missing = 1 / M - 1 / (W * B)
        variance_P = sum(w * d for w, d in zip(weights, diagonals))
        normals_P = np.concatenate([
            streams.normal(p.numel(), 3, "diagonal", step, name, dtype=torch.float64).numpy()
            for name, p in net.named_parameters()])
        nu_P, total = np.sqrt(variance_P) * normals_P, 0.0
        first = 0
        for name in ("first.weight", "last.weight"):
            O, I = dict(net.named_parameters())[name].shape
            size = O * I + O
            if skip and name.startswith("first"):
                total += variance_P[first:first + size].sum()
                first += size
                continue
            pair = []
            for k in (0, 1):
                mean = sum(w * each[name][k] for w, each in zip(weights, seen))
                pair.append(mean + damping * np.trace(mean) / len(mean) * np.eye(len(mean)))
            total += np.trace(pair[0]) * np.trace(pair[1])
            z = streams.normal((O, I + 1), 3, "kronecker", step, name, dtype=torch.float64).numpy()
            n = root(pair[1]) @ z @ root(pair[0])
            nu_P[first:first + size] = np.concatenate([n[:, :I].ravel(), n[:, I]])
            first += size
        scale = 1.0 if trace is None else trace / total
        dense.update(gradients_WP.mean(axis=0) + np.sqrt(missing * scale) * nu_P)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "every step": ({"every": 1, "decay": 0.7}, {}),
    "every second": ({"every": 2, "decay": 0.6, "damping": 0.1}, {}),
    "one layer": ({"every": 2, "decay": 0.6, "skip": ["first.*"]}, {"skip": True}),
    "the other way": ({"every": 2, "decay": 0.6, "layers": ["last.weight"]}, {"skip": True}),
    "trace": ({"every": 2, "decay": 0.5, "trace": 0.7}, {"trace": 0.7}),
    "trace, one layer": ({"every": 2, "decay": 0.5, "trace": 0.7, "skip": ["first*"]},
                         {"trace": 0.7, "skip": True})}


def run(options: dict[str, Any], ranks: int, **more: Any) -> Tensor:
    scale = more.pop("loss_scale", 1.0)

    def work(world: ThreadWorld) -> Tensor:
        model, optimizer = build(world, kronecker(**options), V=W // ranks, **more)
        train(model, optimizer, STEPS, b=B, loss_scale=scale)
        return vector(model.parameters())
    weights = run_threads(ranks, work)
    assert all(torch.equal(weights[0], each) for each in weights)
    return weights[0]


@pytest.mark.parametrize("name", CASES)
def test_it_is_its_formula_whatever_the_ranks(name: str) -> None:
    options, more = CASES[name]
    dense = Dense(W, b=B)
    start = dense.theta_P
    dense_run(dense, decay=options["decay"], every=options["every"],
              damping=options.get("damping", 1e-3), **more)
    for ranks in (1, 2, 4):
        assert relative_error(run(options, ranks) - torch.from_numpy(start),
                              dense.theta_P - start) < 1e-8, ranks


def test_loss_scale_accumulation_and_given_batch_size_change_nothing() -> None:
    options = CASES["every second"][0]
    plain = run(options, 2)
    assert relative_error(run(options, 2, loss_scale=1024.0), plain) < 1e-10
    assert relative_error(run(options, 2, backward_passes_per_step=2), plain) < 1e-10
    assert relative_error(run({**options, "batch_size": B}, 2), plain) < 1e-10


def test_weight_and_bias_in_two_buckets_share_their_noise() -> None:
    def work(world: ThreadWorld) -> Tensor:
        model, optimizer = build(world, kronecker(every=1, damping=0.0), V=4, bucket_bytes=0)
        train(model, optimizer, 1, b=B)
        return vector(model.parameters())
    separate = run_threads(1, work)[0]
    dense = Dense(W, b=B, bucket_bytes=0)
    start = dense.theta_P
    dense_run_of_one_step(dense)
    assert relative_error(separate - torch.from_numpy(start), dense.theta_P - start) < 1e-6


def dense_run_of_one_step(dense: Dense) -> None:
    global STEPS
    before, STEPS = STEPS, 1
    try:
        dense_run(dense, decay=0.9, every=1, damping=0.0)
    finally:
        STEPS = before


def test_resumed_between_two_observations_are_the_same_bits() -> None:
    def work(world: ThreadWorld) -> tuple[Tensor, Tensor]:
        def make() -> Any:
            return build(world, kronecker(every=3, decay=0.5), V=2, bucket_bytes=100)
        model, optimizer = make()
        train(model, optimizer, 6, b=B)
        through = vector(model.parameters())
        model, optimizer = make()
        train(model, optimizer, 2, b=B)
        weights, state = model.state_dict(), optimizer.state_dict()
        model, optimizer = make()
        model.load_state_dict(weights)
        optimizer.load_state_dict(pickle.loads(pickle.dumps(state)))
        train(model, optimizer, 4, b=B, first=2)
        return through, vector(model.parameters())
    for through, resumed in run_threads(2, work):
        assert torch.equal(through, resumed)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2},
                                     {"padding": (0, 2), "stride": (1, 2)}])
def test_rows_of_a_convolution_give_its_gradient(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=False, **options).double()
    x = torch.randn(5, 3, 7, 8, dtype=torch.float64)
    out = conv(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    rows = list(rows_of(conv, x, grad))
    total = sum(g.T @ a for a, g in rows)
    assert relative_error(total, conv.weight.grad.view(4, -1)) < 1e-12  # type: ignore


def test_a_convolution_and_a_sequence_in_a_step() -> None:
    """The factors' traces: tr A tr G of a layer with positions, from loops over examples."""
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.line = nn.Conv2d(2, 3, 2), nn.Linear(4, 2)
            self.to(torch.float64)

        def forward(self, x: Tensor) -> Tensor:  # (n, 2, 3, 5) -> (n, 3, 2, 4) -> (n, 3, 2, 2)
            return self.line(torch.tanh(self.conv(x)))

    def work(world: ThreadWorld) -> None:
        torch.manual_seed(1)
        model = Model()
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0), model.named_parameters(),
            noise=kronecker(every=1, batch_size=4), virtual_workers=2, world=world)
        x = streams.normal((8, 2, 3, 5), 0, "x", dtype=torch.float64)
        for part in x.chunk(2):
            (model(part) ** 2).sum((1, 2, 3)).mean().backward()
        optimizer.step()
        kept = optimizer.state_dict()["hvdnoise"]["kept"]["values"]
        expected = {"conv.weight": [0.0, 0.0], "line.weight": [0.0, 0.0]}
        for each in x:
            hidden = model.conv(each[None])
            active = torch.tanh(hidden)
            out = model.line(active)
            grads = torch.autograd.grad((out ** 2).sum(), [hidden, out])
            columns = F.unfold(each[None], 2)[0].T  # (8 positions, 8)
            for name, a, g in (("conv.weight", columns, grads[0][0].flatten(1).T),
                               ("line.weight", active.reshape(-1, 4), grads[1].reshape(-1, 2))):
                expected[name][0] += float((a.detach() ** 2).sum() + len(a)) / 8
                expected[name][1] += float((g ** 2).sum()) / (8 * len(a))
        for name, (a, g) in expected.items():
            _, trace = kept["layers"][name]
            assert trace == pytest.approx(a * g * 1.001 ** 2, rel=1e-9), name
    run_threads(1, work)


def test_its_law_over_ten_thousand_draws() -> None:
    """All numbers of a layer against A (x) G; a false alarm for one choice of seeds in 10^6."""
    noise = kronecker(damping=0.0)
    A, G = (torch.tensor(each, dtype=torch.float64) for each in (
        [[1.0, 0.7], [0.7, 0.74]], [[4.0, -2.0, 0.4], [-2.0, 1.1, 0.3], [0.4, 0.3, 1.5]]))
    state = {"roots": {"w": ("w", 2, 3)}, "w inputs root": Root.of(A, None).packed,
             "w outputs root": Root.of(G, None).packed}
    draws = torch.stack([noise._sample("w", StepContext(step, 1, range(1), 4, state)).flatten()
                         for step in range(10_000)])
    assert_normal(draws, np.kron(G.numpy(), A.numpy()))
    with pytest.raises(AssertionError):
        assert_normal(draws, 1.15 * np.kron(G.numpy(), A.numpy()))


def test_other_runs_of_autograd_are_left_out() -> None:
    """A gradient penalty's inner gradient, and the backward of another loss through the model."""
    def work(world: ThreadWorld, more: bool) -> Any:
        model = Net()
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0), model.named_parameters(),
            noise=kronecker(every=1, batch_size=B), virtual_workers=2, world=world)
        for worker in optimizer.workers:
            x, y = batch(0, worker, B)
            if more:
                x.requires_grad_()
                torch.autograd.grad(losses(model(x), y).sum() ** 2, x, create_graph=True)
                for p in model.parameters():
                    p.requires_grad_(False)
                model(x).sum().backward()  # as a generator's loss
                for p in model.parameters():
                    p.requires_grad_(True)
            losses(model(x), y).mean().backward()
        optimizer.step()
        return optimizer.state_dict()["hvdnoise"]["kept"]["values"]
    plain, other = (run_threads(1, lambda world: work(world, more))[0] for more in (False, True))
    for name in ("inputs", "outputs"):
        (key,) = [key for key in plain if key.endswith(f"first.weight {name}")]
        assert relative_error(other[key], plain[key]) < 1e-12


def test_gradients_of_outputs_are_not_held_until_the_pass_ends() -> None:
    """They would be as many numbers as the batch has activations."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(8)))
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    layers, held = LayerStatistics(names, lambda weight: True, lambda: True), []
    for module in model:
        layers.watch(module)

    def has_gradient(p: Tensor) -> None:
        held.append(sum(map(len, layers._arrived.values())))
        if len(held) == 1:  # the first tells that it is a pass of the step
            layers.begin_pass(counts=True)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(has_gradient)
    model(torch.ones(B, 3)).square().mean().backward()
    assert held == [1] + 15 * [0]


def test_a_step_dropped_by_the_models_zero_grad_leaves_nothing() -> None:
    """As after an overflow under GradScaler: the next step begins with its own backward pass."""
    def work(world: ThreadWorld, dropped: bool) -> Tensor:
        model, optimizer = build(world, kronecker(every=1), V=W)
        for step in ([9, 0, 1] if dropped else [0, 1]):
            model.zero_grad()
            for worker in range(W):
                x, y = batch(step, worker, B)
                losses(model(x), y).mean().backward()
            if step != 9:
                optimizer.step()
        return vector(model.parameters())
    ((with_it,), (without,)) = (run_threads(1, lambda world: work(world, dropped))
                                for dropped in (True, False))
    assert torch.equal(with_it, without)


def square_of(found: Root) -> Tensor:
    S = found.times(torch.eye(len(found.basis_IR), dtype=torch.float64))
    assert relative_error(S, S.T) < 1e-12
    return S @ S


def test_roots_of_singular_matrices() -> None:
    v = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)
    (found,) = run_threads(1, lambda world: roots([v @ v.T], None, world, "roots"))[0]
    assert relative_error(square_of(found), v @ v.T) < 1e-12


def test_the_largest_eigenvalues_of_a_large_factor_and_its_trace() -> None:
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q
    values = 0.5 ** torch.arange(40, dtype=torch.float64)
    matrix = vectors * values @ vectors.T
    for ranks in (1, 2):
        for found in run_threads(ranks, lambda world: roots([matrix] * 3, 8, world, "roots")):
            for each in found:
                square = square_of(each)
                assert each.basis_IR.shape == (40, 8)
                assert float(square.trace()) == pytest.approx(float(matrix.trace()), rel=1e-12)
                kept, others = torch.linalg.eigvalsh(square).flip(0).split([8, 32])
                assert relative_error(kept, values[:8]) < 1e-9
                assert relative_error(others, torch.full((32,), values[8:].mean())) < 1e-9
    whole = Root.of(matrix, 20)  # of 2 x 20 rows: all of it
    assert relative_error(square_of(whole), matrix) < 1e-12


def test_a_factor_that_is_not_finite_makes_the_noise_so() -> None:
    for rank in (None, 1):
        found = Root.of(torch.full((4, 4), float("nan")), rank)
        assert found.times(torch.ones(2, 4)).isnan().all()


def test_models_are_copied_and_pickled_without_it() -> None:
    def work(world: ThreadWorld) -> None:
        model, optimizer = build(world, kronecker(every=1), V=2)
        train(model, optimizer, 1, b=B)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(batch(0, 0)[0]).sum().backward()  # counts for nothing
        train(model, optimizer, 1, b=B, first=1)
        del optimizer
        losses(*(model(batch(0, 0)[0]), batch(0, 0)[1])).mean().backward()
    run_threads(1, work)


def test_the_plan_knows_its_memory_and_bytes() -> None:
    noise = kronecker(every=4, eigenvalues=1)

    def work(world: ThreadWorld) -> tuple[int, int]:
        model, optimizer = build(world, noise, V=2)
        train(model, optimizer, 5, b=B)
        layout = default_layout(list(model.named_parameters()))
        return optimizer.noise_memory, noise_memory(noise, layout, 2)
    for found, expected in run_threads(2, work):
        assert found == expected
    layout = default_layout(list(Net().named_parameters()))
    sizes = [(p.shape[1] + 1, p.shape[0]) for p in Net().parameters() if p.dim() == 2]
    factors = sum(8 * (I * I + O * O) for I, O in sizes)
    roots = sum(8 * (1 + size * size + size if size <= 2 else 2 + size)
                for pair in sizes for size in pair)
    P = layout.numbers
    assert noise.statistics_bytes(layout) == 8 + 8 * P // 4 + (factors + roots // 2) // 4


@pytest.mark.parametrize("options, says", [
    ({"damping": -1.0}, "damping=-1.0 must be a number >= 0"),
    ({"layers": "first"}, "layers='first' must be a list"),
    ({"eigenvalues": 0}, "eigenvalues=0 must be an integer >= 1, or None"),
    ({"every": 0}, "every=0 must be an integer >= 1")])
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        kronecker(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options, says", [
    ({"layers": ["fisrt.*"]}, "layers: 'fisrt.*' is the name of no parameter"),
    ({"skip": ["last.weight", "first"]}, "skip: 'first' is the name of no parameter")])
def test_patterns_that_match_nothing_are_refused(options: dict[str, Any], says: str,
                                                 tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    def work(world: ThreadWorld) -> None:
        with pytest.raises(ValueError, match=re.escape(says)):
            build(world, kronecker(**options), V=2)
    run_threads(1, work)
    (option, patterns), folder = *options.items(), tmp_path / "run"
    assert cli.main(["train", "--data.dataset", "synthetic", "--run_dir", str(folder),
                     "--virtual_workers", "2", "--noise.kind", "covariance",
                     "--noise.structure", "kronecker", "--noise.emulated_batch", "16",
                     f"--noise.{option}", json.dumps([patterns[-1]])]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line and not folder.exists()
