"""Every plan of the exchange, in a world of threads: the same law, and mostly the same numbers."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch

from hvdnoise import GNC, CovarianceNoise, exchange
from hvdnoise.exchange_plan import Shape
from hvdnoise.mixing import Buffers, Wire, average, mix
from hvdnoise.noise import StepContext
from hvdnoise.plans import PLAIN, PLANS, choose
from tests import linear, reference
from tests.fake_world import ThreadWorld, run_threads
from tests.laws import assert_normal
from tests.runs import assert_same_run, dense_gnc, make_gnc, run
from tests.toys import build, relative_error, train, vector

SAME = ("allgather", "gather-only", "transpose")  # plans of the same numbers
SHAPES = [(2, 1), (3, 1), (2, 2), (4, 2), (7, 1)]


@pytest.mark.parametrize("lag", [1, 0, 2])
@pytest.mark.parametrize("size, V", [
    pytest.param(*each, marks=pytest.mark.slow) if each[0] > 2 else each for each in SHAPES])
@pytest.mark.parametrize("plan", SAME)
def test_plans_give_the_dense_formula(plan: str, size: int, V: int, lag: int) -> None:
    for scale in ("radius", "lr", "relative"):
        case = ("gathered", scale, False, lag, 5)
        record = run(size, V, lambda: make_gnc(*case), 4, exchange=plan)
        assert_same_run(record, dense_gnc(size * V, *case, steps=4))


@pytest.mark.parametrize("plan", [*SAME, "group:2"])
def test_storage_for_one_bucket_is_enough(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buckets wait for each other, on all ranks in the same order, and nothing changes."""
    def weights() -> Any:
        return run(4, 1, lambda: GNC(0.4, source="gathered", lag=2), 4, exchange=plan).weights[-1]
    expected = weights()
    held: list[int] = []
    take = Buffers.take

    def counted(self: Buffers, *args: Any) -> Any:
        taken = take(self, *args)
        held.append(self.held)
        return taken
    monkeypatch.setattr(Buffers, "take", counted)
    assert torch.equal(weights(), expected)
    plenty = max(held)
    held.clear()
    monkeypatch.setattr(exchange, "IN_FLIGHT_BYTES", 1)
    assert torch.equal(weights(), expected)
    assert max(held) < plenty, "the limit does not limit"


@pytest.mark.parametrize("plan", [*SAME, "group:2"])
def test_the_factor_of_the_loss_is_taken_out(plan: str) -> None:
    def work(world: ThreadWorld, factor: float) -> Any:
        model, optimizer = build(world, GNC(lr=2.0, source="gathered"), V=2, exchange=plan)
        return train(model, optimizer, 3, loss_scale=factor).weights[-1]
    once = run_threads(2 if plan in SAME else 4, lambda world: work(world, 1.0))[0]
    scaled = run_threads(2 if plan in SAME else 4, lambda world: work(world, 1024.0))[0]
    assert relative_error(scaled, once) < 1e-12


@pytest.mark.parametrize("plan", [*SAME, "group:2"])
def test_gradients_that_are_not_finite_leave_no_trace(plan: str) -> None:
    """A step that is skipped because of them, as a GradScaler does, and then a clean start."""
    def work(world: ThreadWorld, broken: bool) -> Any:
        model, optimizer = build(world, GNC(0.4, source="gathered"), exchange=plan)
        if broken:
            optimizer.zero_grad()
            (sum(p.sum() for p in model.parameters()) * (world.rank == 1) * float("inf")).backward()
            assert not torch.isfinite(vector(p.grad for p in model.parameters())).all()
        return train(model, optimizer, 3).weights[-1]
    clean, after = (run_threads(4, lambda world: work(world, broken))[0]
                    for broken in (False, True))
    assert torch.equal(clean, after)


# ---- plans that change the law or the numbers

@pytest.mark.slow
def test_groups_mix_the_deviations_of_their_own_workers() -> None:
    """delta_i ~ N(0, s^2 D_g'D_g / (k-1)), independent, with s from the deviations of all."""
    gradients_WP = linear.examples().mean(dim=1)
    s = reference.expected_radius_scale(reference.deviations(gradients_WP), 0.7)
    blocks = np.zeros((4 * linear.P, 4 * linear.P))
    for worker in range(4):
        pair = gradients_WP[worker // 2 * 2:worker // 2 * 2 + 2]
        place = slice(worker * linear.P, (worker + 1) * linear.P)
        blocks[place, place] = reference.gnc_gathered_covariance(reference.deviations(pair), s)
    samples = linear.all_displacements(lambda: GNC(0.7, source="gathered", seed=1), 4, 300,
                                       exchange="group:2")
    assert_normal(samples.flatten(1), blocks, "groups of two")


def test_a_group_of_all_is_all() -> None:
    make = lambda: GNC(0.4, source="gathered")  # noqa: E731
    whole = run(2, 2, make, exchange="group:2").weights[-1]
    assert relative_error(whole, run(2, 2, make, exchange="allgather").weights[-1]) < 1e-12


@pytest.mark.parametrize("precision, share", [("bf16", 2 ** -8), ("fp16", 2 ** -11)])
@pytest.mark.parametrize("plan", ["allgather", "transpose", "group:4"])
def test_16_bits_stay_within_their_bound(plan: str, precision: str, share: float) -> None:
    make = lambda: GNC(lr=1.0, source="gathered")  # noqa: E731

    def displaced(which: str) -> Any:  # (1, W, P), at the learning rate 1
        return linear.all_displacements(make, 4, 1, learning_rate=1.0, exchange=plan,
                                        noise_precision=which)[0]
    exact, rounded = displaced("fp32"), displaced(precision)
    error = (rounded - exact).abs()
    deviations_WP = torch.from_numpy(reference.deviations(linear.examples().mean(dim=1)))
    weights_WW = make().mixing_weights(range(4), range(4), laws_context())
    bound = exact.abs() if plan == "transpose" else weights_WW.abs() @ deviations_WP.abs()
    assert bool((error <= share * bound * 1.001).all()) and float(error.max()) > 0


def laws_context() -> StepContext:
    return StepContext(step=0, num_workers=4, workers=range(4), examples_per_worker=2)


def through(wire: Wire, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    sent = torch.empty(len(rows), wire.width(rows.shape[1]), dtype=wire.dtype)
    wire.encode(rows, sent)
    return wire.decode(sent)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_wire_rounds_little(precision: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = scale * torch.randn(3, 1000, generator=generator).exp()  # over many magnitudes
    rows[1] *= 1e-3
    wire = Wire(precision, torch.float32)
    numbers, factors = through(wire, rows)
    assert wire.dtype.itemsize == 2
    back = numbers.double() * (1 if factors is None else factors)
    bits, floor = (8, 0.0) if precision == "bf16" else (11, 2.0 ** -39)
    bound = torch.maximum(2.0 ** -bits * rows.double(), floor * rows.amax(1, keepdim=True).double())
    assert bool(((back - rows.double()).abs() <= bound).all())


def test_the_wire_carries_what_is_not_finite_or_zero() -> None:
    wire = Wire("fp16", torch.float32)
    rows = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    numbers, factors = through(wire, rows)
    assert factors is not None
    back = numbers * factors
    assert back[0].tolist() == [0, 0] and back[1, 0].isnan() and back[2, 0].isinf()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_16_bits_travel_as_they_are(dtype: torch.dtype) -> None:
    rows = torch.randn(2, 5).to(dtype)
    assert Wire("bf16", dtype).exact and Wire("fp16", dtype).exact
    numbers, factors = through(Wire("fp16", dtype), rows)
    assert torch.equal(numbers, rows) and factors is None


def test_means_and_mixtures_of_16_bits_are_computed_wide() -> None:
    rows_Wn = (100 + torch.randn(64, 7, generator=torch.Generator().manual_seed(0))).bfloat16()
    mean_n, mixed = torch.empty(7).bfloat16(), torch.empty(1, 7)
    average(rows_Wn, mean_n)
    assert torch.equal(mean_n, rows_Wn.double().mean(dim=0).bfloat16())
    weights = torch.randn(1, 64, dtype=torch.float64)
    weights -= weights.mean()
    mix(weights, rows_Wn, mixed)
    assert relative_error(mixed, weights @ rows_Wn.double()) < 1e-4


# ---- the choice

@pytest.mark.parametrize("ranks, V, precision, expected", [
    (1, 4, "fp32", "allreduce"), (2, 1, "fp32", "gather-only"), (3, 1, "fp32", "gather-only"),
    (4, 1, "fp32", "transpose"), (64, 1, "fp32", "transpose"), (2, 4, "fp32", "gather-only"),
    (2, 1, "bf16", "gather-only"), (3, 1, "bf16", "transpose"), (8, 2, "fp16", "transpose")])
def test_auto_takes_the_fewest_bytes(ranks: int, V: int, precision: str, expected: str) -> None:
    shape = Shape(1000, ranks, V, precision=precision)
    plan = choose("auto", shape, mixes=True)
    assert plan.name == expected
    if ranks > 1:
        least = min(PLANS[each].bytes_received(shape) for each in SAME)
        assert plan.plan.bytes_received(shape) == least and "fewest bytes" in plan.reason
        assert choose("auto", shape, mixes=True, plain_mean=False).name == "allgather"
    assert choose("auto", Shape(1000, ranks, V), mixes=False).plan is PLAIN


def test_bytes_of_the_plans() -> None:
    """METHODS' formulas at 4 ranks and 100 numbers, by hand."""
    shape = Shape(100, 4)
    full = Shape(100, 4, group_size=2)
    assert {name: plan.bytes_received(full) for name, plan in PLANS.items()} == {
        "allreduce": 600, "allgather": 1800, "gather-only": 1200, "transpose": 900, "group": 1000}
    half = Shape(100, 4, precision="bf16", group_size=2)
    assert {name: plan.bytes_received(half) for name, plan in PLANS.items()} == {
        "allreduce": 600, "allgather": 1200, "gather-only": 1200, "transpose": 750, "group": 800}
    assert PLANS["transpose"].bytes_received(Shape(100, 512)) < 1.5 * 800
    assert PLAIN.memory_bytes(shape) == 800
    assert PLANS["transpose"].memory_bytes(shape) == 1200
    summed = Shape(100, 4, statistics_bytes=400)
    assert PLAIN.bytes_received(summed) == 1200 and PLAIN.memory_bytes(summed) == 1600


@pytest.mark.parametrize("noise, options, value, remedy", [
    (GNC(1, source="gathered"), {"exchange": "allreduce"}, "'allreduce'", "use auto"),
    (GNC(1, source="gathered"), {"exchange": "ring"}, "'ring'", "one of auto"),
    (GNC(1, source="gathered"), {"exchange": "transpose:2"}, "'transpose:2'", "one of auto"),
    (GNC(1, source="gathered"), {"exchange": "group:x"}, "'group:x'", "group:K"),
    (GNC(1, source="gathered"), {"exchange": "group:3"}, "3", "divides the 4"),
    (GNC(1, source="gathered"), {"exchange": "group:1"}, "1 ranks", "at least 2"),
    (GNC(1, source="gathered"), {"noise_precision": "int8"}, "'int8'", "fp32, bf16, fp16"),
    (GNC(1, source="gathered"), {"exchange": "gather-only", "noise_precision": "bf16"}, "'bf16'",
     "allgather or transpose"),
    (GNC(1, source="gathered"), {"exchange": "transpose", "gradient_predivide_factor": 2.0},
     "'transpose'", "allgather"),
    (GNC(1), {"exchange": "transpose"}, "'transpose'", "defaults"),
    (CovarianceNoise("full", 4), {"noise_precision": "bf16"}, "'bf16'", "defaults"),
    (None, {"exchange": "allgather"}, "'allgather'", "defaults")])
def test_what_does_not_go_together_is_refused(noise: Any, options: dict[str, Any], value: str,
                                              remedy: str) -> None:
    def work(world: ThreadWorld) -> None:
        with pytest.raises(ValueError) as caught:
            build(world, noise, **options)
        text = str(caught.value)
        assert value in text and remedy in text and "\n" not in text
    run_threads(4, work)


def test_the_plan_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hvdnoise")

    def work(world: ThreadWorld) -> Any:
        model, optimizer = build(world, GNC(0.4, source="gathered"))
        train(model, optimizer, 2)
        return optimizer.exchange_plan, optimizer.exchange_reason
    plans = run_threads(4, work)
    assert {name for name, _ in plans} == {"transpose"} and "1.50 x" in plans[0][1]
    assert [record.getMessage() for record in caplog.records] == [
        f"exchange plan transpose: {plans[0][1]}"]


class CountingWorld(ThreadWorld):
    """Counts what its rank receives, with a ring for each allreduce."""

    received = 0.0

    def allreduce_(self, tensor: torch.Tensor, **options: Any) -> Any:
        self.received += 2 * (self.size - 1) / self.size * tensor.nbytes
        return super().allreduce_(tensor, **options)

    def allgather(self, tensor: torch.Tensor, **options: Any) -> Any:
        return self._counted(super().allgather(tensor, **options), tensor.nbytes)

    def alltoall(self, tensor: torch.Tensor, splits: Any, **options: Any) -> Any:
        own = tensor.split(splits)[self.rank].nbytes
        return self._counted(super().alltoall(tensor, splits, **options), own)

    def _counted(self, handle: Any, own_bytes: int) -> Any:
        wait = handle.wait

        def count(poll: Any = None) -> torch.Tensor:
            result = wait(poll)
            self.received += result.nbytes - own_bytes
            return result
        handle.wait = count
        return handle


def cost(size: int, plan: str, precision: str = "fp32") -> tuple[float, float]:
    """Bytes that a rank receives in a step, and its memory for the noise, in multiples of 4P."""
    same = torch.nn.Sequential(*(torch.nn.Linear(80, 80) for _ in range(3)))

    def work(world: ThreadWorld) -> tuple[float, float]:
        counting = CountingWorld(world.meeting, world.rank)
        noise = GNC(lr=1.0, source="own" if plan == "allreduce" else "gathered")
        model = copy.deepcopy(same)
        _, optimizer = build(counting, noise, model=model, exchange=plan, bucket_bytes=26_000,
                             noise_precision=precision)
        for _ in range(2):
            counting.received = 0.0  # the first step has a handshake
            model(torch.randn(2, 80)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        whole = sum(p.nbytes for p in model.parameters())
        return counting.received / whole, optimizer.noise_memory / whole
    received, memory = zip(*run_threads(size, work, timeout=100))
    return max(received), max(memory)


@pytest.mark.parametrize("size", [2, 4, 8, 64])
@pytest.mark.slow
def test_bytes_and_memory_do_not_grow_with_the_workers(size: int) -> None:
    """allreduce: 2 P; transpose: 3 P, and 1.5 allreduces, for any number of workers."""
    shape = Shape(1, size, itemsize=1)
    received, memory = cost(size, "allreduce")
    assert received == pytest.approx(PLAIN.bytes_received(shape)) and memory == 2
    received, memory = cost(size, "transpose")
    assert received == pytest.approx(PLANS["transpose"].bytes_received(shape), rel=0.02)
    assert received < 3 and memory < 3.05  # slices are rounded up


@pytest.mark.parametrize("plan, precision", [("allgather", "fp32"), ("allgather", "bf16"),
                                             ("gather-only", "fp32"), ("transpose", "bf16")])
def test_bytes_are_as_predicted(plan: str, precision: str) -> None:
    received, _ = cost(4, plan, precision)
    whole = Shape(10 ** 6, 4, precision=precision)
    expected = PLANS[plan].bytes_received(whole) / (4 * whole.numbers)
    assert received == pytest.approx(expected, rel=0.01)
