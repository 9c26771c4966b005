"""The guard of a step: whatever is not finite on one rank keeps all ranks from taking the step.

The ranks decide in the reduction of the gradients, and need no other. Each backward pass starts
from a factor that is 1, or NaN where the loss, the buffers after the forward (running statistics of
normalisation), the weights or the displacements are not finite:

    factor = 1 + 0 * (loss + sum of buffers + sum of weights + bound of displacements)

So the gradient of that worker is NaN, and the mean with it, on all ranks alike. Nothing waits for
the device. A step that is not taken leaves no trace: `undo` brings buffers and generator back, and
drops what the noise has seen; the optimizer and the moving average were not asked. Only then do the
ranks tell each other, as JSON, what each worker had found. Weights or earlier buffers that are not
finite themselves end the run: no later step could be taken.

Noise on the mean gradient is added by each rank by itself, the same bits everywhere. Should one
rank alone find it not finite, it alone would leave the step out. So with such a noise the ranks
compare how many steps they have left out, a step later and without waiting, and end where they
differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn

from hvdnoise.comm import Handle, World
from hvdnoise.noise.base import MeanNoise, MeanObservingNoise, part
from hvdnoise.training import finite
from hvdnoise.training.errors import Diverged
from hvdnoise.training.progress import log

SCALING_STEPS = 3  # of float16 in a row, that are taken for the search of the loss scale


class NotTaken(Exception):
    """The step's gradient is not finite, on all ranks alike."""


@dataclass
class Pass:
    """What the guard has seen of a backward pass: numbers on the device, finite or not."""

    worker: int
    evaluation: int  # of the batch, in the step: with lag 0 each is evaluated twice
    loss: Tensor
    buffers: Tensor | None
    displacement: Tensor | None
    gradients: list[Tensor] = field(default_factory=list)  # sums; of each parameter

    def wrong(self, *, buffers_before: bool) -> list[str]:
        """What was the first to be not finite, in words.

        Args:
            buffers_before: the buffers were that already before this pass.
        """
        found = {"displacement": self.displacement, "loss": self.loss,
                 "buffers": None if buffers_before else self.buffers}
        wrong = [name for name, value in found.items() if not _is_finite(value)]
        return wrong or ["gradient"] * (not all(map(_is_finite, self.gradients)))


class Guard:
    """Watches the steps of a model on this rank; see the module.

    Args:
        num_workers: of all ranks.
        scaled: whether a loss scale is searched for (float16), for which steps are left out.
    """

    def __init__(self, model: nn.Module, optimizer: Any, world: World, *, num_workers: int,
                 scaled: bool) -> None:
        self._optimizer, self._world, self._scaled = optimizer, world, scaled
        self._weights = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        self._before = {name: buffer.clone() for name, buffer in self._buffers.items()}
        self._watched = [each for each in self._buffers.values() if each.is_floating_point()]
        self._on_gpu = any(p.is_cuda for p in self._weights.values())
        self._generators: list[tuple[Callable[[Tensor], None], Tensor]] = []
        self._evaluation = 0
        self._weights_sum: Tensor | None = None
        self._passes: list[Pass] = []
        self._alone = num_workers == 1
        if not self._alone:  # else it is clear whose gradient it is
            for p in self._weights.values():
                p.register_hook(partial(_note_gradient, self._passes))
        noise = optimizer.noise
        self._compares = world.size > 1 and any(
            part(noise, kind) is not None for kind in (MeanNoise, MeanObservingNoise))
        self._counts: Handle | None = None
        self._row = self._next_row = 0
        self._only_here = 0  # the last step whose noise on the mean was not finite on this rank

    # ------------------------------------------------------------------ a step

    def begin(self) -> None:
        """A step begins: keep what a forward changes."""
        _copy(self._buffers, self._before)
        self._generators = [(torch.set_rng_state, torch.get_rng_state())]
        if self._on_gpu:
            self._generators.append((torch.cuda.set_rng_state, torch.cuda.get_rng_state()))
        self._passes.clear()
        self._evaluation = 0
        self._weights_sum = _sum([p.detach() for p in self._weights.values()])

    def evaluate(self) -> int:
        """The step's batch is to be evaluated; how many times it will have been then."""
        self._evaluation += 1
        return self._evaluation

    def start(self, loss: Tensor, worker: int) -> Tensor:
        """From what a backward pass is to start: () 1, or NaN.

        Args:
            loss: () of the pass, whose forward is through.
            worker: whose pass it is, of those of all ranks.
        """
        seen = Pass(worker, self._evaluation, loss.detach(), _sum(self._watched),
                    self._optimizer.displacement_bound)
        self._passes.append(seen)
        total = seen.loss
        for each in (self._weights_sum, seen.buffers, seen.displacement):
            total = total if each is None else total + each
        return (total * 0 + 1).to(loss.dtype)

    def check(self, norm: Tensor) -> None:
        """Raise NotTaken where the norm of the gradient is not finite."""
        if not bool(norm.isfinite()):
            raise NotTaken

    def undo(self) -> None:
        """The step is not taken: all is as it was before it."""
        _copy(self._before, self._buffers)
        for set_state, state in self._generators:
            set_state(state)
        self._optimizer.reset()

    # ------------------------------------------------------------------ what was wrong

    def explain(self, step: int, in_a_row: int) -> list[tuple[int, int]]:
        """Say why a step was not taken; whose fault it was. Collective, on ranks that are alike.

        Args:
            step: which, from 1. in_a_row: so many were not taken, with this one.

        Returns:
            (rank, worker) of each worker with something that was not finite, equal on all ranks;
            none of a step that was left out for the loss scale, or for noise on the mean.

        Raises:
            Diverged: where weights, or buffers from before the step, are not finite.
        """
        if self._scaled and in_a_row <= SCALING_STEPS:
            return []
        mean = self._optimizer.exchanged_sum
        if mean is not None and _is_finite(mean):  # the others may have taken the step
            self._only_here = step
            log.warning("step %d was not taken, for something is not finite: the noise on the mean "
                        "gradient, or the norm of their sum", step)
            return []
        everyone = self._world.gather_json(self._findings(), name="hvdnoise.guard.findings")
        places = self._world.places()
        for place, found in zip(places, everyone):
            for kind, name in found["lasting"].items():
                raise Diverged(f"the {kind} {name} of {place} is not finite at step {step}, and "
                               "no later step can be taken: lower optim.lr, set clip_norm, or look "
                               "for a faulty machine; the last checkpoint is intact")
        blamed = [(rank, *each) for rank, found in enumerate(everyone) for each in found["workers"]]
        first = min((evaluation for _, evaluation, _, _ in blamed), default=0)
        blamed = [each for each in blamed if each[1] == first]  # the others follow from these
        said = "; ".join(f"{' and '.join(wrong)} of worker {worker} on {places[rank]}"
                         for rank, _, worker, wrong in blamed)
        log.warning("step %d was not taken, for something is not finite: %s", step,
                    said or "the mean gradient, its noise or its norm")
        return [(rank, worker) for rank, _, worker, _ in blamed]

    def _findings(self) -> dict[str, Any]:
        """Of this rank, as JSON."""
        lasting = {"weight": finite.first(self._weights), "buffer": finite.first(self._before)}
        workers: dict[int, tuple[int, int, list[str]]] = {}  # the first thing that was wrong
        before = False
        for seen in self._passes:
            wrong = seen.wrong(buffers_before=before)
            before = not _is_finite(seen.buffers)
            if wrong:
                workers.setdefault(seen.worker, (seen.evaluation, seen.worker, wrong))
        if self._alone and not workers:
            workers[0] = 1, 0, ["gradient"]
        return {"lasting": {kind: name for kind, name in lasting.items() if name},
                "workers": list(workers.values())}

    # ------------------------------------------------------------------ are the ranks alike?

    def compare(self, bad_steps: int, in_a_row: int) -> int:
        """Start to compare the ranks, at the end of each step. Collective.

        Returns:
            How many steps in a row were not taken, as of the last step that has been compared.

        Raises:
            Diverged: where the ranks have not taken the same steps.
        """
        if not self._compares:
            return in_a_row
        row = self.settle()
        self._counts = self._world.allreduce_(torch.tensor([float(bad_steps), -bad_steps]),
                                              name="hvdnoise.guard.steps", op="max")
        self._next_row = in_a_row
        return row

    def settle(self) -> int:
        """Wait for the comparison under way, if there is one; returns and raises as `compare`."""
        if self._counts is not None:
            most, least = self._counts.wait().tolist()
            self._counts, self._row = None, self._next_row
            if most != -least:
                self._give_up()
        return self._row

    def _give_up(self) -> None:
        steps = self._world.gather_json(self._only_here, name="hvdnoise.guard.alone")
        text = ", ".join(f"{place} left out step {step}"
                         for place, step in zip(self._world.places(), steps) if step)
        raise Diverged(f"the ranks have not taken the same steps: {text}, for the noise on the mean "
                       "gradient was not finite there, and it was elsewhere: such noise must be the "
                       "same on all ranks; the last checkpoint is intact")


def _note_gradient(passes: list[Pass], gradient: Tensor) -> None:
    if passes:
        passes[-1].gradients.append(gradient.sum())


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    if source:
        with torch.no_grad():
            torch._foreach_copy_(list(target.values()), list(source.values()))


def _sum(tensors: Sequence[Tensor]) -> Tensor | None:
    """() in float32: finite only where all numbers are; None of none."""
    if not tensors:
        return None
    return torch.stack([each.sum(dtype=torch.float32) for each in tensors]).sum()


def _is_finite(value: Tensor | None) -> bool:
    return value is None or bool(value.isfinite())
