"""GradScaler used the ordinary way, right on every rank: late ranks, overflow on one rank.

The gradients are reduced when backward() returns, so unscale_ finds the same infinities on every
rank and all ranks skip the same steps.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

import hvdnoise
from hvdnoise.comm import World
from tests.parallel.toys import (
    assert_ranks_agree,
    close,
    loss_of,
    net,
    same_bits,
    sgd,
    step_by_hand,
    weights,
    wrap,
)

WORLDS = ("gloo-2", "mpi-4")
SCALE = 2.0 ** 12


class Scaled:
    """A model trained with a scaler."""

    def __init__(self, world: World, *, clip: bool = False, fused: bool = False,
                 zero_grad: str = "optimizer", **options: Any) -> None:
        self.world, self.model, self.clip, self.zero_grad = world, net(), clip, zero_grad
        inner = torch.optim.Adam(self.model.parameters(), lr=0.01, fused=True) if fused else \
            sgd(self.model)
        self.optimizer = wrap(self.model, inner, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
        self.optimizer.loss_scale = self.scaler.get_scale

    def step(self, n: int, *, overflow: bool = False, late: bool = False) -> None:
        getattr(self, self.zero_grad).zero_grad()
        loss = loss_of(self.model, self.world.rank, n)
        if late:
            time.sleep(0.1)
        if overflow:
            loss = loss * math.inf
        self.scaler.scale(loss).backward()
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.3)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def check_as_without_a_scaler(world: World) -> None:
    """A scale that is a power of two changes no bit; each rank is late once."""
    for fused in (False, True):
        scaled = Scaled(world, fused=fused)
        plain = net()
        optimizer = wrap(plain, torch.optim.Adam(plain.parameters(), lr=0.01) if fused else None)
        for n in range(4):
            scaled.step(n, late=n == world.rank)
            optimizer.zero_grad()
            loss_of(plain, world.rank, n).backward()
            optimizer.step()
        assert close(weights(scaled.model), weights(plain))
        assert fused or same_bits(weights(scaled.model), weights(plain))
        assert_ranks_agree(world, scaled.model.parameters())


def check_clipping_what_was_unscaled(world: World) -> None:
    scaled, twin = Scaled(world, clip=True), net()
    plain = sgd(twin)
    for n in range(3):
        scaled.step(n, late=n == world.rank)
        step_by_hand(world, twin, plain, n,
                     change=lambda: nn.utils.clip_grad_norm_(twin.parameters(), 0.3))
    assert close(weights(scaled.model), weights(twin))
    assert_ranks_agree(world, scaled.model.parameters())


def check_overflow_on_one_rank(world: World) -> None:
    """All ranks skip the step and halve the scale; then training goes on as if it had not been."""
    for options in (dict(), dict(clip=True), dict(fused=True), dict(zero_grad="model")):
        scaled, undisturbed = Scaled(world, **options), Scaled(world, **options)
        for n in range(6):
            before = weights(scaled.model)
            bad = n in (0, 3)
            scaled.step(n, overflow=bad and world.rank == (world.size - 1 if n else 0),
                        late=n == world.rank)
            assert same_bits(weights(scaled.model), before) == bad, (n, options)
            assert_ranks_agree(world, [*scaled.model.parameters(),
                                       torch.tensor(scaled.scaler.get_scale())])
            if not bad:
                undisturbed.step(n)
        assert scaled.scaler.get_scale() == SCALE / 4
        assert close(weights(scaled.model), weights(undisturbed.model)), options


def check_overflow_with_noise(world: World) -> None:
    """The deviations of a skipped step are infinite, and no weight is ever displaced by them."""
    for noise in (hvdnoise.GNC(radius=0.05), hvdnoise.GNC(relative=0.01, source="gathered"),
                  hvdnoise.GNC(radius=0.05, source="isotropic"),
                  hvdnoise.CovarianceNoise("full", 2), hvdnoise.CovarianceNoise("isotropic", 2)):
        for zero_grad in ("optimizer", "model"):
            scaled = Scaled(world, noise=noise, zero_grad=zero_grad)
            outputs: list[Tensor] = []
            scaled.model.register_forward_hook(lambda *args: outputs.append(args[2]))
            for n in range(5):
                before = weights(scaled.model)
                scaled.step(n, overflow=n == 2 and world.rank == 1)
                assert same_bits(weights(scaled.model), before) == (n == 2)
                assert_ranks_agree(world, scaled.model.parameters())
            assert len(outputs) == 5 and all(bool(each.isfinite().all()) for each in outputs)


def check_float16_weights(world: World) -> None:
    """Reduced in half precision, and bfloat16 by way of float32."""
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        model, twin = net().to(dtype), net()
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
        plain = torch.optim.SGD(twin.parameters(), lr=0.1)
        for n in range(2):
            optimizer.zero_grad()
            loss_of(model, world.rank, n).backward()
            optimizer.step()
            step_by_hand(world, twin, plain, n)
        assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
        assert close(model.parameters(), twin.parameters(), tolerance)
        assert_ranks_agree(world, model.parameters())
