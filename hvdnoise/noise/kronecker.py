"""Noise on the mean gradient with Kronecker-factored covariance in each layer, as K-FAC has it.

For a layer with weight W (O, I) and bias, taken as one more column,

    nu = sqrt(1/M - 1/B) S_G Z S_A,   S_A^2 = A,  S_G^2 = G,   Z ~ N(0, I) of (O, I+1)
    so Cov(vec nu) = (1/M - 1/B) A (x) G

with the running means of the factors A of its inputs and G of its output gradients
(`hvdnoise.layers`), each with damping d: A + d tr(A)/(I+1) and G + d tr(G)/O on the diagonal. The
second moments are those of single examples, not centred. Of a factor of more than 2n rows the n
largest eigenvalues are kept (``eigenvalues``), and the mean of the others in their place, so that
the trace is the factor's. All parameters that belong to no such layer, and the layers that are left
out, get diagonal noise (`hvdnoise.noise.diagonal`).

Factors are observed, averaged over the ranks and factorized in every n-th step only; each rank
factorizes its share. Where it acts: the mean gradient, after the reduction; Z comes from a stream
shared by all ranks. Bytes on the wire in an observed step: those of diagonal noise, and an
allreduce and a broadcast of all factors. Memory: the factors and their roots, and what diagonal
noise takes.

Idea: Wen et al. 2020, arXiv:1902.08234; factors: Martens and Grosse 2015, arXiv:1503.05671, and
Grosse and Martens 2016, arXiv:1602.01407. Formula of the noise: derived for this project.
"""

from __future__ import annotations

import math
from fnmatch import fnmatch
from typing import Any, Iterable, MutableMapping

import torch
from torch import Tensor

from hvdnoise import streams
from hvdnoise.buckets import Bucket
from hvdnoise.layers import Layer
from hvdnoise.noise.base import LayerNoise, Observation, StepContext, check_count
from hvdnoise.noise.diagonal import DiagonalCovariance
from hvdnoise.roots import Root


class KroneckerCovariance(DiagonalCovariance, LayerNoise):
    """K-FAC's covariance for linear and convolution layers, diagonal elsewhere (see the module).

    Not for modules inside of a compiled one, which then get diagonal noise.

    Args:
        decay: c of the running means of factors and variances, 0 <= c < 1.
        every: the n of "every n-th step", in which they are estimated.
        eigenvalues: kept of a large factor; None: all of all, at (O + I) O I operations a
            step in each layer.
        damping: d >= 0, added to the factors' diagonals, in units of their mean.
        layers: patterns of the names of weights, as "features.*": only such layers; default: all.
        skip: patterns of the names of weights of layers to leave out.
    """

    def __init__(self, emulated_batch: int, *, decay: float = 0.9, every: int = 20,
                 damping: float = 1e-3, eigenvalues: int | None = 32,
                 layers: list[str] | None = None,
                 skip: list[str] | None = None, **options: Any) -> None:
        super().__init__(emulated_batch, decay=decay, every=every, **options)
        number = isinstance(damping, (int, float)) and not isinstance(damping, bool)
        if not (number and 0 <= damping < math.inf):
            raise ValueError(f"damping={damping!r} must be a number >= 0")
        if eigenvalues is not None:
            check_count("eigenvalues", eigenvalues, ", or None for all of them")
        for name, patterns in (("layers", layers), ("skip", skip)):
            if isinstance(patterns, str):
                raise ValueError(f"{name}={patterns!r} must be a list of patterns: [{patterns!r}]")
        self.damping, self.rank = damping, eigenvalues
        self.layers, self.skip = (None if each is None else tuple(each) for each in (layers, skip))

    def check_names(self, names: Iterable[str]) -> None:
        names = list(names)
        for option, patterns in (("layers", self.layers), ("skip", self.skip)):
            for pattern in patterns or ():
                if not any(fnmatch(name, pattern) for name in names):
                    raise ValueError(f"{option}: {pattern!r} is the name of no parameter; give "
                                     f"patterns of weights' names, as {names[0]!r} or \"*.weight\"")

    def wants_layer(self, weight: str) -> bool:
        chosen = self.layers is None or any(fnmatch(weight, each) for each in self.layers)
        return chosen and not any(fnmatch(weight, each) for each in self.skip or ())

    def observe_layer(self, bucket: Bucket, layer: Layer, inputs_II: Tensor, outputs_OO: Tensor,
                      context: StepContext) -> tuple[Tensor, Tensor]:
        state, key = context.state, f"{bucket.key} {layer.weight}"
        weight = state.get("weight", 0.0) * self.decay + 1 - self.decay  # as mean_noise will have
        means, traces = [], 1.0
        for name, new in (("inputs", inputs_II), ("outputs", outputs_OO)):
            before = state.get(f"{key} {name}")
            mean = new if before is None else before.lerp(new, (1 - self.decay) / weight)
            state[f"{key} {name}"] = mean
            trace = float(mean.diagonal().double().sum())
            means.append(mean.clone())
            means[-1].diagonal().add_(self.damping * trace / len(mean))
            traces *= trace * (1 + self.damping)
        state["layers"] = {**state.get("layers", {}), layer.weight: (layer.bias, traces)}
        return means[0], means[1]

    def take_roots(self, bucket: Bucket, layer: Layer, inputs: Root, outputs: Root,
                   context: StepContext) -> None:
        key = f"{bucket.key} {layer.weight}"
        context.state[f"{key} inputs root"] = inputs.packed
        context.state[f"{key} outputs root"] = outputs.packed
        sizes = key, len(inputs.basis_IR), len(outputs.basis_IR)
        context.state["roots"] = {**context.state.get("roots", {}), layer.weight: sizes}

    def mean_noise(self, bucket: Bucket, observation: Observation, context: StepContext) -> Tensor:
        mean_N, factor = self._take_in(bucket, observation, context)
        noise_N, layers = torch.empty_like(mean_N), context.state.get("layers", {})
        of = {name: weight for weight, (bias, _) in layers.items() for name in (weight, bias)}
        samples: dict[str, Tensor] = {}
        for t, name in enumerate(bucket.names):
            weight, part = of.get(name), bucket.view(noise_N, t)
            if weight is None:
                z = streams.normal(bucket.shapes[t], self.seed, "diagonal", context.step, name,
                                   device=bucket.device, dtype=bucket.dtype)
                torch.mul(z, bucket.view(mean_N, t).mul(factor).sqrt_(), out=part)
                continue
            if weight not in samples:
                samples[weight] = self._sample(weight, context).mul_(math.sqrt(factor))
            has_bias, sample_OI = layers[weight][0] is not None, samples[weight]
            part.copy_((sample_OI[:, :sample_OI.shape[1] - has_bias] if name == weight
                        else sample_OI[:, -1]).reshape(part.shape))
        return noise_N

    def _sample(self, weight: str, context: StepContext) -> Tensor:
        """(O, I+1): S_G Z S_A."""
        key, I, O = context.state["roots"][weight]
        inputs, outputs = (Root.unpack(context.state[f"{key} {name} root"], size)
                           for name, size in (("inputs", I), ("outputs", O)))
        z_OI = streams.normal((O, I), self.seed, "kronecker", context.step, weight,
                              device=inputs.floor.device, dtype=inputs.floor.dtype)
        return outputs.times(inputs.times(z_OI).T).T

    def _take_in_traces(self, observation: Observation, context: StepContext) -> None:
        super()._take_in_traces(observation, context)
        state, total = context.state, 0.0
        layers = state.get("layers", {})
        inside = {*layers, *(bias for bias, _ in layers.values())}
        for bucket in observation.layout.buckets:
            sums = observation.statistics[bucket.index].split(bucket.sizes)
            total += sum(float(part.sum(dtype=torch.float64))
                         for name, part in zip(bucket.names, sums) if name not in inside)
        new = (1 - self.decay) / state["weight"]
        state["rest trace"] = state.get("rest trace", 0.0) * (1 - new) \
            + new * total * self.estimate(observation, context)

    def _own_trace(self, state: MutableMapping[str, Any]) -> float:
        layers = state.get("layers", {}).values()
        return float(state["rest trace"]) + sum(trace for _, trace in layers)
