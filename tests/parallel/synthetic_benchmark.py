"""A user's script: images per second of a torchvision model on Horovod, with made-up images.

It has the structure, the options and the calls of Horovod's "PyTorch synthetic benchmark", and
``--seed`` and ``--save`` for the test that starts it, test_synthetic_benchmark.py.
"""

import argparse
import timeit

import horovod.torch as hvd
import numpy as np
import torch
import torch.nn.functional as F
from torchvision import models

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--model", default="resnet50", help="a model of torchvision")
parser.add_argument("--batch-size", type=int, default=32, help="images of a rank in a step")
parser.add_argument("--image-size", type=int, default=224, help="height and width")
parser.add_argument("--num-warmup-batches", type=int, default=10, help="steps that are not timed")
parser.add_argument("--num-batches-per-iter", type=int, default=10, help="steps timed as one")
parser.add_argument("--num-iters", type=int, default=10, help="how often that is timed")
parser.add_argument("--fp16-allreduce", action="store_true", help="send gradients in 16 bits")
parser.add_argument("--use-adasum", action="store_true", help="add gradients by Adasum")
parser.add_argument("--no-cuda", action="store_true", help="leave GPUs alone")
parser.add_argument("--seed", type=int, default=0, help="of the images and the weights")
parser.add_argument("--save", help="a folder for each rank's weights at the end")
args = parser.parse_args()
args.cuda = not args.no_cuda and torch.cuda.is_available()

hvd.init()
torch.manual_seed(args.seed + hvd.rank())  # other images on every rank
if args.cuda:
    torch.cuda.set_device(hvd.local_rank())

model = getattr(models, args.model)()
lr_scaler = 1 if args.use_adasum else hvd.size()
if args.cuda:
    model.cuda()
    if args.use_adasum and hvd.nccl_built():
        lr_scaler = hvd.local_size()

optimizer = torch.optim.SGD(model.parameters(), lr=0.01 * lr_scaler)
compression = hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none
optimizer = hvd.DistributedOptimizer(optimizer,
                                     named_parameters=model.named_parameters(),
                                     compression=compression,
                                     op=hvd.Adasum if args.use_adasum else hvd.Average)

hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)

data = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
target = torch.randint(1000, (args.batch_size,))
if args.cuda:
    data, target = data.cuda(), target.cuda()


def benchmark_step() -> None:
    optimizer.zero_grad()
    output = model(data)
    loss = F.cross_entropy(output, target)
    loss.backward()
    optimizer.step()


def log(text: str) -> None:
    if hvd.rank() == 0:
        print(text, flush=True)


device = "GPU" if args.cuda else "CPU"
log(f"model {args.model}, {args.batch_size} images a step on each of {hvd.size()} {device}s")
timeit.timeit(benchmark_step, number=args.num_warmup_batches)

speeds = []
for nth in range(args.num_iters):
    seconds = timeit.timeit(benchmark_step, number=args.num_batches_per_iter)
    speeds.append(args.batch_size * args.num_batches_per_iter / seconds)
    log(f"iteration {nth}: {speeds[-1]:.1f} images/s per {device}")

mean, spread = np.mean(speeds), 1.96 * np.std(speeds)
log(f"one {device}: {mean:.1f} +- {spread:.1f} images/s")
log(f"{hvd.size()} {device}s: {hvd.size() * mean:.1f} +- {hvd.size() * spread:.1f} images/s")

if args.save:
    torch.save(list(model.parameters()), f"{args.save}/weights-{hvd.rank()}.pt")
