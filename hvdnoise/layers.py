"""Second moments of layers' inputs and output gradients, for noises with Kronecker factors.

The gradient of a linear layer's weight is, for one example, the sum over its positions t (one; more
for a convolution or a sequence) of g_t a_t', with a the layer's input (and 1, where there is a
bias) and g the gradient of the example's loss with respect to its output. With B examples and T
positions in each

    A = (1/B) sum_n sum_t a a'          G = 1/(B T) sum_n sum_t g g'

so that A (x) G is the second moment of one example's gradient if inputs and output gradients are
independent of each other, and of those at other positions (K-FAC: Martens and Grosse 2015,
arXiv:1503.05671; convolutions: Grosse and Martens 2016, arXiv:1602.01407).

They are summed up in the backward passes of an observed step by hooks on the modules, and reduced
over the ranks once, at its end. What comes in another run of autograd, such as ``autograd.grad`` or
the backward of another model's loss, is left out. `nn.Linear` and `nn.Conv2d` without groups are
known. Modules inside of a compiled one are not seen.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdnoise.buckets import Bucket, Layout
from hvdnoise.displacement import current_graph_task_id, thread
from hvdnoise.roots import packed_size
from hvdnoise.world import Handle, World

_Row = tuple["Layer", nn.Module, Tensor, Tensor]  # with a call's input and output gradient
UNFOLDED_BYTES = 64 * 2 ** 20  # of a convolution's inputs at a time


@dataclass(frozen=True)
class Layer:
    """A layer: the names of its weight and bias."""

    weight: str
    bias: str | None


@dataclass
class _Sums:
    layer: Layer
    inputs_II: Tensor
    outputs_OO: Tensor  # of the worker under way, for a mean loss
    scaled_OO: Tensor  # of the workers before
    rows: int = 0

    @classmethod
    def new(cls, layer: Layer, inputs: int, outputs: int, dtype: torch.dtype,
            device: torch.device) -> _Sums:
        return cls(layer, *(torch.zeros(size, size, dtype=dtype, device=device)  # type: ignore
                            for size in (inputs, outputs, outputs)))


class LayerStatistics:
    """The factors of an optimizer's layers, in the step under way, on this rank.

    Args:
        names: of the parameters; some may be added.
        wanted: tells from a weight's name whether its layer is to be observed.
        active: tells whether the passes under way are observed.
    """

    def __init__(self, names: Mapping[Tensor, str] | None = None,
                 wanted: Callable[[str], bool] = lambda weight: False,
                 active: Callable[[], bool] = lambda: False) -> None:
        self._names = {} if names is None else names
        self._wanted, self._active = wanted, active
        self._sums: dict[str, _Sums] = {}
        self._arrived: dict[int, list[_Row]] = {}  # by autograd's run, until its pass ends
        self._pass, self._counts = -1, False

    def watch(self, module: nn.Module) -> None:
        """Hook a module, if its layer is known and wanted."""
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if not is_known(module) or weight is None or weight not in self._names \
                or not self._wanted(self._names[weight]):
            return
        layer = Layer(self._names[weight], None if bias is None else self._names.get(bias))
        module.register_forward_hook(_Hook(weakref.ref(self), layer))

    def forget(self) -> None:
        """The step begins anew, maybe with the backward pass under way."""
        self._sums.clear()
        run = current_graph_task_id()
        self._arrived = {run: self._arrived[run]} if run in self._arrived else {}

    def begin_pass(self, *, counts: bool) -> None:
        """The run of autograd under way is a backward pass of this optimizer's.

        Args:
            counts: it is one of the step's; if it breaks off, the step begins anew.
        """
        self._pass, self._counts = current_graph_task_id(), counts
        self._take_in()

    def end_pass(self) -> None:
        """What has come in no pass of the step's is left out."""
        self._arrived.clear()
        self._pass = -1

    def _take_in(self) -> None:
        """Sum up at once, so that the gradients of all outputs are never held at a time."""
        if self._counts:
            with torch.no_grad():
                for row in self._arrived.pop(self._pass, []):
                    self._add(*row)

    def called(self, layer: Layer, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """A forward of a layer: have its output's gradient come here."""
        if thread.unseen or not output.requires_grad or not self._active():
            return
        reference, x = weakref.ref(self), x.detach()

        def arrived(grad: Tensor) -> None:
            statistics = reference()
            if statistics is not None and statistics._active():
                statistics._arrived.setdefault(current_graph_task_id(), []).append(
                    (layer, module, x, grad.detach()))
                statistics._take_in()
        output.register_hook(arrived)

    def _add(self, layer: Layer, module: nn.Module, x: Tensor, grad: Tensor) -> None:
        weight: Any = dict.__getitem__(module._parameters, "weight")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if layer.weight not in self._sums:
            inputs = weight[0].numel() + (layer.bias is not None)
            self._sums[layer.weight] = _Sums.new(layer, inputs, len(weight), dtype, weight.device)
        sums = self._sums[layer.weight]
        for a_NI, g_NO in rows_of(module, x.to(dtype), grad.to(dtype)):
            if layer.bias is not None:
                a_NI = torch.cat([a_NI, a_NI.new_ones(len(a_NI), 1)], dim=1)
            sums.inputs_II.addmm_(a_NI.T, a_NI)
            sums.outputs_OO.addmm_(g_NO.T, g_NO)
            sums.rows += len(a_NI)

    def end_worker(self, factor: float) -> None:
        """The worker's mean loss has been differentiated: ``factor`` makes it an example's."""
        for sums in self._sums.values():
            sums.scaled_OO.add_(sums.outputs_OO, alpha=factor ** 2)
            sums.outputs_OO.zero_()

    def reduce(self, layout: Layout, examples: float, world: World, name: str
               ) -> dict[Layer, tuple[Bucket, tuple[Tensor, Tensor]]]:
        """Of each layer that some rank has seen: its weight's bucket, and A and G of all ranks.

        Args:
            examples: B, of all ranks.
        """
        mine = [[sums.layer.weight, sums.layer.bias, len(sums.inputs_II), len(sums.outputs_OO)]
                for sums in self._sums.values()]
        seen = {each[0]: each for rank in world.gather_json(mine, name=f"{name}.seen")
                for each in rank}
        sent: deque[tuple[Bucket, Layer, int, int, Handle]] = deque()
        for bucket in layout.buckets:
            dtype = torch.promote_types(bucket.dtype, torch.float32)
            for weight in filter(seen.__contains__, bucket.names):
                _, bias, I, O = seen[weight]
                sums = self._sums.pop(weight, None) or _Sums.new(
                    Layer(weight, bias), I, O, dtype, bucket.device)
                flat = torch.cat([sums.inputs_II.flatten(), sums.scaled_OO.flatten(),
                                  sums.inputs_II.new_full((1,), float(sums.rows))])
                sent.append((bucket, sums.layer, I, O, world.allreduce_(
                    flat, name=f"{name}.{weight}", op="sum")))
        self._sums.clear()
        found = {}
        while sent:  # one by one: the factors may take more memory than the weights
            bucket, layer, I, O, handle = sent.popleft()
            A, G, rows = handle.wait().split([I * I, O * O, 1])
            found[layer] = bucket, (A.view(I, I) / examples,
                                    G.view(O, O) / max(1.0, float(rows)))
        return found


def layer_sizes(layout: Layout, wanted: Callable[[str], bool]) -> Iterator[tuple[int, int, int]]:
    """(I, O, bytes of a number) of what look like layers: weights of two dimensions or more."""
    names = {name for bucket in layout.buckets for name in bucket.names}
    for bucket in layout.buckets:
        for name, shape in zip(bucket.names, bucket.shapes):
            if name.endswith("weight") and len(shape) > 1 and wanted(name):
                bias = name.removesuffix("weight") + "bias" in names
                yield math.prod(shape[1:]) + bias, shape[0], bucket.dtype.itemsize


def layer_bytes(I: int, O: int, itemsize: int, rank: int | None) -> tuple[int, int]:
    """Bytes of a layer's two factors, and of their roots."""
    return (I * I + O * O) * itemsize, (packed_size(I, rank) + packed_size(O, rank)) * itemsize


def is_known(module: nn.Module) -> bool:
    """Whether the factors of a module can be computed."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" \
            and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def rows_of(module: nn.Module, x: Tensor, grad: Tensor
            ) -> Iterator[tuple[Tensor, Tensor]]:
    """(a, g) of a call, one row a position: (N, I) without the 1 of the bias and (N, O)."""
    if isinstance(module, nn.Linear):
        yield x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return
    assert isinstance(module, nn.Conv2d)
    assert not isinstance(module.padding, str)
    positions = grad.shape[2] * grad.shape[3]
    each = max(1, UNFOLDED_BYTES // (module.weight[0].numel() * positions * x.itemsize))
    for x_part, grad_part in zip(x.split(each), grad.split(each)):
        columns = F.unfold(x_part, module.kernel_size, module.dilation, module.padding,
                           module.stride)
        yield (columns.transpose(1, 2).reshape(-1, columns.shape[1]),
               grad_part.permute(0, 2, 3, 1).reshape(-1, grad_part.shape[1]))


class _Hook:
    """A module's forward hook; copies and pickles of the module have one that does nothing."""

    def __init__(self, statistics: weakref.ref[LayerStatistics] | None = None,
                 layer: Layer | None = None) -> None:
        self._statistics, self._layer = statistics, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or self._statistics is None or self._layer is None:
            return
        statistics = self._statistics()
        if statistics is not None and args and isinstance(output, Tensor):
            statistics.called(self._layer, module, args[0], output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()
