"""Sparse gradients, beside what test_equality.py says of them: under noise, and out of order."""

from __future__ import annotations

import itertools

import torch

import hvdnoise
from hvdnoise.comm import World
from tests.parallel.toys import assert_ranks_agree, loss_of, raised, step, words, wrap

WORLDS = ("gloo-2", "torchrun-2")


def check_sparse_gradients_under_noise(world: World) -> None:
    """They are exchanged dense, when the user says so."""
    for dense in (False, True):
        model = words(sparse=True)
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), sparse_as_dense=dense,
                         noise=hvdnoise.GNC(radius=0.1, source="gathered"), bucket_bytes=0)
        if not dense:
            text = raised(ValueError, loss_of(model, world.rank, 0).backward)
            assert "embedding.weight" in text and "sparse_as_dense=True" in text
            continue
        for n in range(3):
            step(world, model, optimizer, n)
        assert model.embedding.weight.grad.is_sparse
        assert_ranks_agree(world, model.parameters())


def check_order_of_calls_with_sparse_gradients(world: World) -> None:
    """The same errors, and the same ways to clear gradients, as with dense ones."""
    for dense, sparse_only in itertools.product((False, True), (False, True)):
        model = words(sparse=True)
        model.head.requires_grad_(not sparse_only)
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), sparse_as_dense=dense)
        for n in range(2):
            step(world, model, optimizer, n)
        assert "loss.backward()" in raised(RuntimeError, optimizer.step)
        for set_to_none in (True, sparse_only):  # of one gradient alone, zeroing is not seen
            model.zero_grad(set_to_none)
            loss_of(model, world.rank, 2).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, world.rank, 2).backward()
        text = raised(RuntimeError, loss_of(model, world.rank, 3).backward)
        assert "a second backward()" in text
        optimizer.zero_grad()
        step(world, model, optimizer, 3)
        assert_ranks_agree(world, model.parameters())
