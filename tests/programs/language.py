"""Sequences: a GPT with tied embeddings, an LSTM with truncated backpropagation, and LoRA."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention
from torch.nn.utils import clip_grad_norm_, parametrize

from tests.parallel.toys import images, labels
from tests.programs.lab import Lab, tokens

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, 2, -1).transpose(1, 2)
                   for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """The head has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(16, WIDTH), nn.Embedding(8, WIDTH)
        self.blocks = nn.ModuleList([Block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.tokens(words) + self.places(torch.arange(words.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def next_word_loss(model: Callable[[Tensor], Tensor], *key: int) -> Tensor:
    text = tokens(*key)
    return cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def gpt(lab: Lab) -> None:
    """AdamW with two groups, accumulation, clipping, and a learning rate that warms up."""
    model = lab.build("gpt", GPT)
    call = lab.callable("gpt")
    groups = [{"params": [p for p in model.parameters() if p.dim() == dim], "weight_decay": decay}
              for dim, decay in ((2, 0.1), (1, 0.0))]
    optimizer = lab.wrap(torch.optim.AdamW(groups, lr=0.01), model.named_parameters(),
                         backward_passes_per_step=2)
    for n in lab.steps():
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1, (n + 1) / 3)
        optimizer.zero_grad()
        for part in range(2):
            (next_word_loss(call, lab.rank, n, part) / 2).backward()
        optimizer.synchronize()
        lab.exchanged("gpt")
        clip_grad_norm_(model.parameters(), 0.5)
        with optimizer.skip_synchronize():
            optimizer.step()
        with lab.evaluation("gpt"):
            lab.losses.append(float(next_word_loss(call, 0)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 16)

    def forward(self, words: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        out, state = self.lstm(self.embedding(words), state)
        return self.head(out), state


def lstm_loss(model: Callable[..., Any], text: Tensor, state: tuple[Tensor, Tensor]
              ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    logits, state = model(text[:, :-1], state)
    return cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()), state


def pieces_of_text(lab: Lab) -> tuple[Tensor, ...]:
    """Each goes on where the one before ends."""
    return tokens(lab.rank, shape=(4, 4 * lab.iterations + 1)).unfold(1, 5, 4).unbind(1)


def lstm(lab: Lab) -> None:
    """The hidden state goes on from piece to piece of a text, detached."""
    model = lab.build("lstm", Recurrent)
    call = lab.callable("lstm")
    optimizer = lab.wrap(torch.optim.SGD(model.parameters(), 0.5, momentum=0.9),
                         model.named_parameters())
    pieces = pieces_of_text(lab)
    state = (torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))
    for n in lab.steps():
        optimizer.zero_grad()
        loss, state = lstm_loss(call, pieces[n], (state[0].detach(), state[1].detach()))
        loss.backward()
        optimizer.synchronize()
        lab.exchanged("lstm")
        clip_grad_norm_(model.parameters(), 0.25)
        with optimizer.skip_synchronize():
            optimizer.step()
        with lab.evaluation("lstm"):
            blank = (torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))
            lab.losses.append(float(lstm_loss(call, tokens(0), blank)[0]))


class LowRank(nn.Module):
    """A parametrization: the weight, and a product of two thin matrices."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, columns) / columns ** 0.5)
        self.up = nn.Parameter(torch.zeros(rows, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


class Adapted(nn.Module):
    """A wrapper: a layer, and two thin ones beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + linear(self.down(x), self.up.weight)


def adapted_net() -> nn.Module:
    """One layer by a parametrization and one by a wrapper; only these additions train."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 4))
    model.requires_grad_(False)
    parametrize.register_parametrization(model[1], "weight", LowRank(12, 36))
    model[3] = Adapted(model[3])
    return model


def lora(lab: Lab) -> None:
    model = lab.build("lora", adapted_net)
    call = lab.callable("lora")
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = lab.wrap(torch.optim.AdamW(adapters, lr=0.02), model.named_parameters())
    for n in lab.steps():
        optimizer.zero_grad()
        cross_entropy(call(images(lab.rank, n)), labels(lab.rank, n)).backward()
        optimizer.step()
        with lab.evaluation("lora"):
            lab.losses.append(float(cross_entropy(call(images(0)), labels(0))))
