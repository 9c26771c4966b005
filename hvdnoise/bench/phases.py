"""The two phases of a benchmark: each variant alone, then all in turns. All collective.

Alone: what it is, what memory it takes, and that it trains: how far its weights move in
`STEPS_ALONE` steps, how far from plain's, and whether they are the same on all ranks.

In turns: there is one variant at a time, built anew for each turn, so that the memory of the
largest is enough for all. It makes `STEPS_BEFORE` steps, in which buffers are made and ranks agree
on what they exchange, and lets everything arrive; then its measured steps follow.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
from typing import Any

import torch

from hvdnoise.bench import measure, models
from hvdnoise.bench.build import Runner, build, flat_weights
from hvdnoise.bench.config import BenchConfig
from hvdnoise.bench.variants import Variant
from hvdnoise.comm import World
from hvdnoise.training.records import weights_digest

STEPS_ALONE = 5
STEPS_BEFORE = 3


def say(world: World, text: str) -> None:
    """On rank 0's terminal."""
    if world.rank == 0:
        print(text, flush=True)


def _problem(config: BenchConfig, world: World, device: torch.device) -> models.Problem:
    return models.make(config.model, batch_size=config.batch_size, image_size=config.image_size,
                       compute_seconds=config.compute_ms / 1000, seed=config.seed,
                       rank=world.rank, device=device)


def _wait(runner: Runner, world: World, name: str) -> None:
    """Return when nothing is under way between the ranks."""
    runner.wait()
    world.barrier(f"bench.{name}")  # Horovod may do it before an exchange that is ready with it,
    world.barrier(f"bench.{name}.all")  # but not this one


# ---------------------------------------------------------------------------- alone

def alone(config: BenchConfig, variants: list[Variant], world: World, device: torch.device
          ) -> dict[str, Any]:
    """Parameters, and of each variant what this phase finds."""
    problem = _problem(dataclasses.replace(config, compute_ms=0.0), world, device)
    start = flat_weights(problem.new_model())
    plain: torch.Tensor | None = None  # its weights at the end
    mine: list[dict[str, Any]] = []
    with measure.blocks_returned():
        for variant in variants:
            if config.memory:  # what is taken once and kept is taken now
                _wait(_trained(variant, config, problem, world), world, "first")
            before = measure.start_memory(device) if config.memory else None
            runner = _trained(variant, config, problem, world)
            memory = measure.peak_memory(device) - before if before is not None else None
            _wait(runner, world, "alone")
            end = flat_weights(runner.model)
            plain = end if plain is None else plain
            mine.append({
                **runner.facts(world.size, config.group_size), "memory": memory,
                "digest": weights_digest({"": end}), "distance_moved": _distance(end, start),
                "distance_from_plain": _distance(end, plain)})
            del runner, end
    everyone = world.gather_json(mine, name="bench.alone")
    return {"parameters": start.numel(),
            "variants": [_together(of_ranks) for of_ranks in zip(*everyone)]}


def _trained(variant: Variant, config: BenchConfig, problem: models.Problem, world: World
             ) -> Runner:
    runner = build(variant, config, problem, world)
    for _ in range(STEPS_ALONE):
        runner.step()
    return runner


def _together(of_ranks: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """What the ranks found of one variant: rank 0's words, each one's memory."""
    digests = {each.pop("digest") for each in of_ranks}
    return {**of_ranks[0], "memory": [each["memory"] for each in of_ranks],
            "replicas_equal": len(digests) == 1}


def _distance(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """None where it is no number."""
    distance = float(torch.linalg.vector_norm(one - other))
    return distance if math.isfinite(distance) else None


# ---------------------------------------------------------------------------- in turns

def rounds(config: BenchConfig, variants: list[Variant], world: World, device: torch.device,
           hosts: list[dict[str, Any]], interface: str) -> dict[str, dict[str, Any]]:
    """By variant's name, what its turns gave: seconds and bytes per step, by round."""
    problem = _problem(config, world, device)
    order = random.Random(config.seed)  # the same on all ranks
    mine: dict[str, list[tuple[float, int]]] = {variant.name: [] for variant in variants}
    for number in range(config.warmup + config.rounds):
        for variant in order.sample(variants, len(variants)):
            turn = _turn(variant, config, problem, world, device, interface)
            if number >= config.warmup:
                mine[variant.name].append(turn)
        say(world, f"round {number + 1} of {config.warmup + config.rounds}"
            + (" (warm-up)" if number < config.warmup else ""))
    everyone = world.gather_json(mine, name="bench.turns")
    found = {}
    for variant in variants:
        turns = [each[variant.name] for each in everyone]  # [rank][round]
        seconds = [[seconds for seconds, _ in rank] for rank in turns]
        received = [sum(turns[rank][number][1] for rank in measure.first_ranks(hosts))
                    / world.size / (config.steps + 1) for number in range(config.rounds)]
        found[variant.name] = {"seconds_by_rank": seconds, "interface_bytes": received,
                               "seconds": [max(of_ranks) for of_ranks in zip(*seconds)]}
    return found


def _turn(variant: Variant, config: BenchConfig, problem: models.Problem, world: World,
          device: torch.device, interface: str) -> tuple[float, int]:
    """A variant's measured steps: seconds per step, and bytes that this host received in all."""
    gc.collect()  # the last one's garbage
    runner = build(variant, config, problem, world)
    for _ in range(STEPS_BEFORE):
        runner.step()
    _wait(runner, world, "before")
    before = measure.received().get(interface, 0)
    world.barrier("bench.start")
    seconds = measure.seconds_per_step(runner.step, config.steps, device)
    _wait(runner, world, "after")
    return seconds, measure.received().get(interface, 0) - before
