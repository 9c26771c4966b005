"""A training loop with plain Horovod: 1,024 examples with some wrong labels, which it makes."""

import horovod.torch as hvd
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import hvdnoise


def examples(count, wrong, seed):
    """Points in 20 dimensions, labelled by a network that is drawn; a share of labels is wrong."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5))
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 20, generator=draws)
    labels = (4 * teacher(x)).argmax(1)
    other = torch.randint(5, (count,), generator=draws)
    return x, torch.where(torch.rand(count, generator=draws) < wrong, other, labels)


hvd.init()
train, (test_x, test_y) = TensorDataset(*examples(1024, 0.2, seed=1)), examples(4096, 0, seed=2)
sampler = DistributedSampler(train, hvd.size(), hvd.rank(), seed=1)
batches = DataLoader(train, batch_size=64, sampler=sampler)

torch.manual_seed(1)
model = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                      nn.Linear(128, 5))
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = hvdnoise.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    named_parameters=model.named_parameters(), noise=hvdnoise.GNC())

for epoch in range(20):
    sampler.set_epoch(epoch)
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).double().mean()
    if hvd.rank() == 0 and (epoch + 1) % 5 == 0:
        print(f"epoch {epoch + 1}  last loss {loss:.3f}  test accuracy {accuracy:.3f}", flush=True)

total = sum(float(p.detach().double().sum()) for p in model.parameters())
print(f"rank {hvd.rank()}  sum of weights {total:.6f}", flush=True)
