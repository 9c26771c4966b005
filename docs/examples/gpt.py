"""A small GPT learns a language of 1,728 sentences, which it makes; AdamW with GNC.

The sentences are drawn with equal odds, so that the best loss that any model can have is known.
"""

import math
import re

import horovod.torch as hvd
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import hvdnoise

WIDTH, LAYERS, HEADS, CONTEXT, BATCH, STEPS = 64, 2, 4, 64, 16, 160

ADJECTIVES = ["small", "old", "red", "quick"]
NOUNS = ["dog", "cat", "girl", "king", "horse", "cook"]
VERBS = ["see", "find", "like", "want", "paint", "know"]
OBJECTS = ["tree", "house", "river", "road", "bird", "stone"]
SENTENCE = re.compile(
    f"the ({'|'.join(ADJECTIVES)}) ({'|'.join(NOUNS)})"
    f"( ({'|'.join(VERBS)})s|s ({'|'.join(VERBS)})) a ({'|'.join(OBJECTS)})\\.")
CHARACTERS = sorted(set("".join([*ADJECTIVES, *OBJECTS, *NOUNS, *VERBS, "the s a.\n"])))


def text(count, draws):
    """Sentences: the dog sees, the dogs see."""
    def one(words):
        return words[int(torch.randint(len(words), (), generator=draws))]
    lines = []
    for _ in range(count):
        many = one([True, False])
        lines.append(f"the {one(ADJECTIVES)} {one(NOUNS)}{'s' * many} "
                     f"{one(VERBS)}{'s' * (not many)} a {one(OBJECTS)}.\n")
    return "".join(lines)


def encode(string):
    return torch.tensor([CHARACTERS.index(each) for each in string])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (part.view(b, t, HEADS, -1).transpose(1, 2)
                   for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.down(gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """(b, t) characters -> (b, t, characters) logits; the head is the embedding."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(len(CHARACTERS), WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(CHARACTERS), bias=False)
        for each in (self.tokens, self.places):
            nn.init.normal_(each.weight, std=0.05)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        places = self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(self.tokens(x) + places)))


@torch.no_grad()
def written(model, count, draws):
    """``count`` lines that the model writes, each after a line's end."""
    x = encode("\n").expand(count, 1)
    for _ in range(45):
        odds = model(x[:, -CONTEXT:])[:, -1].softmax(-1)
        x = torch.cat([x, torch.multinomial(odds, 1, generator=draws)], 1)
    lines = ["".join(CHARACTERS[each] for each in row[1:]) for row in x.tolist()]
    return [line.partition("\n")[0] for line in lines]


hvd.init()
draws = torch.Generator().manual_seed(1)
corpus, held_out = encode(text(2000, draws)), encode(text(500, draws))
own = torch.Generator().manual_seed(100 + hvd.rank())  # each rank reads elsewhere


def batch(data, count, generator):
    starts = torch.randint(len(data) - CONTEXT, (count,), generator=generator)
    return torch.stack([data[start:start + CONTEXT + 1] for start in starts.tolist()])


def loss_of(x):
    return cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


torch.manual_seed(1)
model = GPT()
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = hvdnoise.DistributedOptimizer(
    torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
    named_parameters=model.named_parameters(), noise=hvdnoise.GNC(share=0.002))

best = math.log(2 * 4 * 6 * 6 * 6) * held_out.eq(CHARACTERS.index("\n")).sum() / len(held_out)
for step in range(STEPS):
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * min(1, (step + 1) / 30, 2 * (1 - step / STEPS))
    optimizer.zero_grad()
    loss_of(batch(corpus, BATCH, own)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if (step + 1) % 40 == 0:
        model.eval()
        with torch.no_grad():  # the second half of the context: there the sentence is known
            x = batch(held_out, 128, torch.Generator().manual_seed(3))
            half = CONTEXT // 2
            score = cross_entropy(model(x[:, :-1])[:, half:].flatten(0, 1),
                                  x[:, half + 1:].flatten())
        model.train()
        if hvd.rank() == 0:
            print(f"step {step + 1}  loss {score:.3f}  the best possible {best:.3f}", flush=True)

model.eval()
lines = written(model, 100, torch.Generator().manual_seed(4))
right = [line for line in lines if SENTENCE.fullmatch(line)]
if hvd.rank() == 0:
    print(f"{len(right)} of 100 lines that it writes are sentences, such as:", *right[:1])
total = sum(float(p.detach().double().sum()) for p in model.parameters())
print(f"rank {hvd.rank()}  sum of weights {total:.6f}", flush=True)
