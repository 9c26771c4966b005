"""A mean teacher, a mixture of experts, recommendations, two towers, and steps with closures."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, normalize

from tests.parallel.toys import images, labels
from tests.programs.lab import Lab, normal, tokens


def classifier() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Flatten(), nn.Linear(64, 4))


def mean_teacher(lab: Lab) -> None:
    """The teacher is a moving average of the student, and told about it in place."""
    student = lab.build("student", classifier)
    optimizer = lab.wrap(torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, nesterov=True),
                         student.named_parameters())
    teacher = lab.copy("teacher", "student").requires_grad_(False)
    learn, teach = lab.callable("student"), lab.callable("teacher")
    for n in lab.steps():
        x = images(lab.rank, n)
        optimizer.zero_grad()
        logits = learn(x + 0.1 * images(lab.rank, n, 1))
        with torch.no_grad():
            target = teach(x).softmax(1)
        consistency = kl_div(logits.log_softmax(1), target, reduction="batchmean")
        (cross_entropy(logits, labels(lab.rank, n)) + consistency).backward()
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(teacher.parameters(), student.parameters()):
                ours.mul_(0.9).add_(theirs, alpha=0.1)
            for ours, theirs in zip(teacher.buffers(), student.buffers()):
                ours.copy_(theirs)
        with lab.evaluation("student", "teacher"):
            lab.losses.append(float(cross_entropy(teach(images(0)) + learn(images(0)), labels(0))))


class Experts(nn.Module):
    """Every example goes to the expert that the gate likes best; four of eight or more idle."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
                                     for _ in range(8))
        self.head = nn.Linear(8, 4)
        self.aux_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(1)
        share, best = shares.max(1)
        load = torch.bincount(best, minlength=8) / len(best)
        self.aux_loss = 8 * (load * shares.mean(0)).sum()
        out = torch.zeros_like(x)
        for index in best.unique().tolist():
            mine = (best == index).nonzero().squeeze(1)
            out = out.index_add(0, mine, self.experts[index](x[mine]) * share[mine, None])
        logits: Tensor = self.head(x + out)
        return logits


def experts(lab: Lab) -> None:
    model = lab.build("experts", Experts)
    call = lab.callable("experts")
    optimizer = lab.wrap(torch.optim.Adam(model.parameters(), 0.01), model.named_parameters())
    for n in lab.steps():
        optimizer.zero_grad()
        loss = cross_entropy(call(2 * normal(lab.rank, n)), labels(lab.rank, n))
        (loss + 0.1 * model.aux_loss).backward()
        optimizer.step()
        with lab.evaluation("experts"):
            lab.losses.append(float(cross_entropy(call(normal(0)), labels(0))))


class Clicks(nn.Module):
    """DLRM: products of embeddings, one of them sparse, and numbers tell if somebody clicks."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(16, 6, sparse=place == 0) for place in range(3))
        self.bottom, self.top = nn.Linear(8, 6), nn.Linear(12, 1)

    def forward(self, numbers: Tensor, kinds: Tensor) -> Tensor:
        bottom = torch.relu(self.bottom(numbers))
        features = torch.stack([bottom, *(table(kinds[:, place])
                                          for place, table in enumerate(self.tables))], 1)
        row, column = torch.tril_indices(4, 4, offset=-1)
        products = (features @ features.transpose(1, 2))[:, row, column]
        logits: Tensor = self.top(torch.cat([bottom, products], 1)).squeeze(1)
        return logits


def dlrm(lab: Lab) -> None:
    """One optimizer for the embeddings, one for the rest; one backward for both."""
    model = lab.build("clicks", Clicks)
    call = lab.callable("clicks")
    dense = [*model.bottom.named_parameters("bottom"), *model.top.named_parameters("top")]
    optimizers = [
        lab.wrap(torch.optim.SGD(model.tables.parameters(), 0.1),
                 model.tables.named_parameters("tables"), sparse_as_dense=True),
        lab.wrap(torch.optim.Adam([p for _, p in dense], 0.01), iter(dense))]

    def loss(*key: int) -> Tensor:
        logits = call(normal(*key), tokens(*key, shape=(4, 3)))
        return binary_cross_entropy_with_logits(logits, (labels(*key) > 1).float())

    for n in lab.steps():
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(lab.rank, n).backward()
        for optimizer in optimizers:
            optimizer.step()
        with lab.evaluation("clicks"):
            lab.losses.append(float(loss(0)))


class TextTower(nn.Module):
    """An encoder layer, which evaluation computes on a path of its own; and the temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, words: Tensor) -> Tensor:
        return normalize(self.encoder(self.embedding(words)).mean(1)) * self.log_scale.exp()


class ImageTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.layers(x))


def towers(lab: Lab, locked: bool = False, separate: bool = False) -> None:
    """Contrastive; the accuracy of the batch is looked at between forward and backward."""
    pair = nn.ModuleDict({"image": lab.build("image", ImageTower),
                          "text": lab.build("text", TextTower)})
    if locked:
        pair["image"].eval().requires_grad_(False)
    see, read = lab.callable("image"), lab.callable("text")
    parts = [pair["image"], pair["text"]] if separate else [pair]
    optimizers = [lab.wrap(torch.optim.AdamW([p for p in part.parameters() if p.requires_grad],
                                             0.01), part.named_parameters(f"part{place}"))
                  for place, part in enumerate(parts)]
    for n in lab.steps():
        x, words = images(lab.rank, n), tokens(lab.rank, n, shape=(4, 5))
        for optimizer in optimizers:
            optimizer.zero_grad()
        scores = see(x) @ read(words).T
        with lab.evaluation("text", *[] if locked else ["image"]):
            lab.losses.append(float((see(x) @ read(words).T).diagonal().mean()))
        target = torch.arange(4)
        (cross_entropy(scores, target) + cross_entropy(scores.T, target)).backward()
        for optimizer in optimizers:
            optimizer.step()


def towers_separate(lab: Lab) -> None:
    """An optimizer for each tower."""
    towers(lab, separate=True)


def towers_locked(lab: Lab) -> None:
    """The image tower is frozen and in evaluation mode."""
    towers(lab, locked=True)


def closures(lab: Lab, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Horovod exchanges inside the closure only if the closure says so."""
    model = lab.build("net", lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(),
                                                   nn.Linear(8, 4)))
    call = lab.callable("net")
    optimizer = lab.wrap(make(model.parameters()), model.named_parameters())
    for n in lab.steps():
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(call(images(lab.rank, n)), labels(lab.rank, n))
            loss.backward()
            optimizer.synchronize()
            return lab.mean(loss)

        with optimizer.skip_synchronize():
            lab.losses.append(float(optimizer.step(closure)))
        with lab.evaluation("net"):
            lab.losses.append(float(cross_entropy(call(images(0)), labels(0))))


def lbfgs(lab: Lab) -> None:
    closures(lab, lambda parameters: torch.optim.LBFGS(
        parameters, lr=0.5, max_iter=3, line_search_fn="strong_wolfe"))


def sgd_closure(lab: Lab) -> None:
    closures(lab, lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9))
