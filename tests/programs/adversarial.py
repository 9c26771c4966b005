"""Two players: a GAN, and Wasserstein GANs with a gradient penalty or clipped weights."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from tests.parallel.toys import images
from tests.programs.lab import Lab, draw, normal


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 36))


def discriminator() -> nn.Module:
    return nn.Sequential(nn.Linear(36, 12), nn.LeakyReLU(0.2), nn.Linear(12, 1))


def discriminator_loss(judge: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-judge(real)).mean() + softplus(judge(fake)).mean()


def _players(lab: Lab) -> tuple[nn.Module, nn.Module, Any, Any]:
    """Generator, discriminator and their optimizers."""
    g, d = lab.build("g", generator), lab.build("d", discriminator)
    optimizers = [lab.wrap(torch.optim.Adam(model.parameters(), 0.01, betas=(0.5, 0.9)),
                           model.named_parameters(name)) for name, model in (("g", g), ("d", d))]
    return g, d, *optimizers


def _sample(lab: Lab, make: Callable[[Tensor], Tensor], judge: Callable[[Tensor], Tensor]) -> None:
    with lab.evaluation("g", "d"):
        lab.losses.append(float(judge(make(normal(lab.now))).mean()))


def gan(lab: Lab, frozen: bool = True) -> None:
    """The generator's backward reaches the discriminator, which Horovod bears when it is frozen."""
    g, d, g_optimizer, d_optimizer = _players(lab)
    make, judge = lab.callable("g"), lab.callable("d")
    for n in lab.steps():
        real, z = images(lab.rank, n).flatten(1), normal(lab.rank, n)
        d_optimizer.zero_grad()
        discriminator_loss(judge, real, make(z).detach()).backward()
        d_optimizer.synchronize()
        lab.exchanged("d")
        with d_optimizer.skip_synchronize():
            d_optimizer.step()

        d.requires_grad_(not frozen)
        g_optimizer.zero_grad()
        softplus(-judge(make(z))).mean().backward()
        g_optimizer.step()
        d.requires_grad_(True)
        _sample(lab, make, judge)


def gan_unfrozen(lab: Lab) -> None:
    """Illegal with Horovod: gradients of the discriminator are on their way when it clears them."""
    gan(lab, frozen=False)


def wgan(lab: Lab, penalty: bool) -> None:
    """Two steps of the critic for one of the generator."""
    g, critic, g_optimizer, optimizer = _players(lab)
    make, judge = lab.callable("g"), lab.callable("d")
    for n in lab.steps():
        for part in range(2):
            real = images(lab.rank, n, part).flatten(1)
            with torch.no_grad():
                fake = make(normal(lab.rank, n, part))
            optimizer.zero_grad()
            loss = judge(fake).mean() - judge(real).mean()
            if penalty:
                loss = loss + 10 * gradient_penalty(judge, real, fake, lab.rank, n, part)
            loss.backward()
            optimizer.step()
            if not penalty:
                with torch.no_grad():
                    for p in critic.parameters():
                        p.clamp_(-0.1, 0.1)

        critic.requires_grad_(False)
        g_optimizer.zero_grad()
        judge(make(normal(lab.rank, n))).mean().neg().backward()
        g_optimizer.step()
        critic.requires_grad_(True)
        _sample(lab, make, judge)


def gradient_penalty(judge: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, *key: int
                     ) -> Tensor:
    """How far the critic's slope between real and fake examples is from 1."""
    share = torch.rand(len(real), 1, generator=draw(*key))
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(judge(between).sum(), between, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def wgan_gp(lab: Lab) -> None:
    wgan(lab, penalty=True)


def wgan_clipped(lab: Lab) -> None:
    """The critic's weights are clipped in place after each of its steps."""
    wgan(lab, penalty=False)
