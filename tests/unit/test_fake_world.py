"""How the world of threads fails; tests/parallel checks its collectives beside Horovod's."""

from __future__ import annotations

import time

import pytest
import torch

from tests.fake_world import ThreadWorld, run_threads


def test_same_bits_on_all_ranks_and_in_every_run() -> None:
    def work(world: ThreadWorld) -> torch.Tensor:
        generator = torch.Generator().manual_seed(world.rank)
        time.sleep(0.01 * (world.rank * 7 % 3))  # ranks arrive in another order than theirs
        return world.allreduce_(torch.randn(1000, generator=generator), name="x").wait()

    def by_hand() -> torch.Tensor:
        total = torch.zeros(1000)
        for rank in range(5):
            total = total + torch.randn(1000, generator=torch.Generator().manual_seed(rank))
        return total * (1 / 5)

    for result in run_threads(5, work) + run_threads(5, work):
        assert torch.equal(result, by_hand())


def test_results_do_not_share_memory() -> None:
    def work(world: ThreadWorld) -> float:
        gathered = world.allgather(torch.zeros(1), name="x").wait()
        gathered += world.rank
        world.barrier("added")
        return gathered.sum().item()

    assert run_threads(3, work) == [0.0, 3.0, 6.0]


def test_reading_before_the_wait_shows() -> None:
    def work(world: ThreadWorld) -> tuple[bool, float]:
        tensor = torch.ones(2, requires_grad=True)
        handle = world.allreduce_(tensor, name="x", op="sum")
        early = bool(tensor.isnan().all())
        handle.wait()
        return early, tensor.sum().item()

    assert run_threads(2, work) == [(True, 4.0)] * 2


def test_backward_in_threads_with_collectives_in_hooks() -> None:
    def work(world: ThreadWorld) -> torch.Tensor:
        weight = torch.ones(3, requires_grad=True)

        def exchange(gradient: torch.Tensor) -> torch.Tensor:
            return world.allreduce_(gradient.clone(), name="gradient", op="sum").wait()

        weight.register_hook(exchange)
        (weight * (world.rank + 1.0)).sum().backward()
        assert weight.grad is not None
        return weight.grad

    for gradient in run_threads(3, work):
        assert torch.equal(gradient, torch.full((3,), 6.0))


def test_local_ranks_of_several_hosts() -> None:
    places = run_threads(4, lambda world: (world.local_rank, world.local_size), local_size=2)
    assert places == [(0, 2), (1, 2), (0, 2), (1, 2)]


def test_a_rank_that_does_not_come_is_named() -> None:
    def work(world: ThreadWorld) -> None:
        if world.rank == 2:
            time.sleep(1.0)
        world.allreduce_(torch.ones(1), name="the sum").wait()

    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"'the sum': ranks \[2\] of 3 did not come"):
        run_threads(3, work, timeout=0.3)
    assert time.monotonic() - started < 5


def test_a_rank_that_never_returns_is_shown_with_its_stack() -> None:
    def spin_here(world: ThreadWorld) -> None:
        if world.rank == 1:
            time.sleep(5)

    with pytest.raises(TimeoutError, match=r"(?s)rank 1.*spin_here"):
        run_threads(2, spin_here, timeout=0.1)


def test_a_rank_that_raises_ends_the_others_at_once() -> None:
    def work(world: ThreadWorld) -> None:
        if world.rank == 1:
            raise KeyError("the cause")
        world.barrier("b")

    started = time.monotonic()
    with pytest.raises(KeyError, match="(?s)the cause.*rank 1 of 3"):
        run_threads(3, work, timeout=30)
    assert time.monotonic() - started < 5


def test_a_rank_that_returned_ends_the_others_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="'hvdnoise.b': rank 0 will not come, it has returned"):
        run_threads(2, lambda world: world.rank and world.barrier("b"), timeout=30)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("other", [
    {"op": "max"}, {"prescale": 2.0}, {"postscale": 2.0}, {"shape": (3,)},
    {"dtype": torch.float64}])
def test_ranks_that_ask_for_different_things(other: dict) -> None:
    def work(world: ThreadWorld) -> None:
        asked = {"op": "sum", "shape": (2,), "dtype": torch.float32} | (
            other if world.rank else {})
        tensor = torch.ones(asked.pop("shape"), dtype=asked.pop("dtype"))
        world.allreduce_(tensor, name="x", **asked).wait()

    with pytest.raises(RuntimeError, match="'x': the ranks do not agree"):
        run_threads(2, work)


def test_ranks_that_disagree_on_the_root_or_the_collective() -> None:
    def roots(world: ThreadWorld) -> None:
        world.broadcast_(torch.ones(1), root=world.rank, name="x").wait()

    def kinds(world: ThreadWorld) -> None:
        (world.allgather if world.rank else world.allreduce_)(torch.ones(1), name="x").wait()

    for work in (roots, kinds):
        with pytest.raises(RuntimeError, match="do not agree"):
            run_threads(2, work)


def test_a_name_in_flight_is_refused() -> None:
    def work(world: ThreadWorld) -> None:
        world.allreduce_(torch.ones(1), name="x")
        world.allreduce_(torch.ones(1), name="x")

    with pytest.raises(ValueError, match="'x' is still in flight"):
        run_threads(2, work)


def test_finished_collectives_are_forgotten() -> None:
    def work(world: ThreadWorld) -> int:
        for _ in range(20):
            world.barrier("b")
        world.barrier("last")
        return len(world.meeting._collectives)

    assert max(run_threads(3, work)) <= 1  # the last one, while another rank has yet to wake


def test_the_global_generators_are_not_used() -> None:
    before = torch.get_rng_state()
    run_threads(3, lambda world: world.gather_json({"a": world.rank}, name="x"))
    assert torch.equal(before, torch.get_rng_state())
