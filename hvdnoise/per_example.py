"""The gradients of single examples, by `torch.func`: a chunk of the batch at a time.

They are those of the model as it is, with undisplaced weights. The calls count for nothing in the
step under way, and the loop's random numbers stay where they are. Under vmap dropout draws other
numbers for each example. A network whose BatchNorm is in training mode has no gradient of a single
example: each one's output depends on the whole batch.
"""

from __future__ import annotations

from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _NormBase

from hvdnoise.buckets import Bucket, Layout
from hvdnoise.displacement import unseen
from hvdnoise.noise.base import Noise, ObservingNoise, StepContext

CHUNK_BYTES = 64 * 2 ** 20  # of gradients at a time, but for one example
LossesOf = Callable[[Tensor, Tensor], Tensor]


def check_model(model: nn.Module, parameters: list[Tensor], names: dict[Tensor, str]
                ) -> dict[Tensor, str]:
    """The model's names of these parameters.

    Raises:
        ValueError: for parameters that are not the model's, and as `check_statistics`.
    """
    check_statistics(model)
    found: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    if strange := [p for p in parameters if p not in found]:
        raise ValueError(f"observe_examples: {names[strange[0]]} is no parameter of this "
                         f"{type(model).__name__}: pass the model that the optimizer trains")
    return {p: found[p] for p in parameters}


def check_statistics(model: nn.Module) -> None:
    """Raise a ValueError where examples have no gradients of their own."""
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and (module.training if module.track_running_stats else
                                              isinstance(module, nn.modules.batchnorm._BatchNorm)):
            raise ValueError(f"{name or 'the model'} ({type(module).__name__}) computes its "
                             "statistics over the batch, so that no example has a gradient of its "
                             "own: take source=\"workers\", or a model with GroupNorm")


def example_gradients(names: dict[Tensor, str], model: nn.Module, losses_of: LossesOf,
                      inputs: Tensor, targets: Tensor, sampling: torch.Generator | None
                      ) -> Iterator[dict[Tensor, Tensor]]:
    """Of each chunk of K examples: parameter -> (K, *shape), detached.

    Args:
        names: `check_model`'s.
        losses_of: (outputs, targets) -> (examples,).
        inputs, targets: the leading dimension counts the examples.
        sampling: draws targets from the model's softmax outputs (examples, classes) in their place.
    """
    weights = {name: p.detach() for p, name in names.items()}
    size = max(1, CHUNK_BYTES // max(1, sum(w.nbytes for w in weights.values())))

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return losses_of(functional_call(model, weights, (x[None],)), y[None]).sum()
    gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
    devices = [inputs.device] if inputs.is_cuda else []
    for start in range(0, len(inputs), size):
        x, y = inputs[start:start + size], targets[start:start + size]
        with unseen(), torch.random.fork_rng(devices):
            if sampling is not None:
                y = sampled(functional_call(model, weights, (x,)), sampling)
            found = gradients(weights, x, y)
        yield {p: found[name].detach() for p, name in names.items()}


@torch.no_grad()
def sampled(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """(examples,) int64: classes drawn from softmax(outputs)."""
    if outputs.dim() != 2:
        raise ValueError(f"labels=\"sampled\" needs outputs of shape (examples, classes), and they "
                         f"are {tuple(outputs.shape)}: take labels=\"true\"")
    shares = outputs.double().softmax(dim=1).cpu()
    return torch.multinomial(shares, 1, generator=generator)[:, 0].to(outputs.device)


class ExampleStatistics:
    """What a noise sums up over the examples of this rank, in the step under way.

    Attributes:
        sums: by the index of the bucket.
        count: examples of the step.
        count_of_pass: those of them that the next backward pass comes from; None: not told yet.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The step begins anew."""
        self.sums: dict[int, Tensor] = {}
        self.count = 0
        self.count_of_pass: int | None = None

    def add(self, noise: Noise, layout: Layout, context: StepContext, count: int,
            gradients: Iterable[dict[Tensor, Tensor]]) -> None:
        """Show the noise the gradients of ``count`` examples, which come in chunks."""
        assert isinstance(noise, ObservingNoise) and noise.statistics is not None
        for chunk in gradients:
            for bucket in layout.buckets:
                if bucket.index not in self.sums:
                    self.sums[bucket.index] = noise.statistics.new(bucket)
                for t, p in enumerate(bucket.parameters):
                    start, out = bucket.starts[t], self.sums[bucket.index]
                    if noise.statistics.elementwise:
                        out = out[start:start + bucket.sizes[t]]
                    noise.observe(bucket, start, _flat(chunk[p], bucket, t), out, context)
        self.count += count
        self.count_of_pass = (self.count_of_pass or 0) + count


def _flat(gradients: Tensor, bucket: Bucket, t: int) -> Tensor:
    """(K, size): in the order in which a parameter lies in its bucket."""
    flat = gradients.new_empty(len(gradients), bucket.sizes[t])
    flat.as_strided(gradients.shape, (bucket.sizes[t], *bucket.strides[t])).copy_(gradients)
    return flat
