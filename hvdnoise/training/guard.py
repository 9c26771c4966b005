"""The guard of a step: whatever is not finite on one rank keeps all ranks from taking the step.

The ranks decide in the reduction of the gradients, and need no other. Each backward pass starts
from a factor that is 1, or NaN where the weights, the loss, the buffers after the forward (running
statistics of normalisation) or the displacements are not finite:

    factor = 1 + 0 * (sum of weights + loss + sum of buffers + sum of displacements)

So the gradient of that worker is NaN, and the mean with it, on all ranks alike. A sum is finite
only where all that it adds is, and nothing waits for the device.

A step that is not taken leaves no trace: `undo` brings buffers, generator and learning rates back,
and drops what the noise has seen; optimizer and moving average were not asked. Only then do the
ranks tell each other, as JSON, what was wrong with which worker. Weights or earlier buffers that
are not finite themselves end the run: no later step could be taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn

from hvdnoise.comm import World
from hvdnoise.mixing import total
from hvdnoise.noise.base import MeanNoise, MeanObservingNoise, part
from hvdnoise.training import finite
from hvdnoise.training.alike import SameSteps
from hvdnoise.training.errors import Diverged
from hvdnoise.training.progress import log

SCALING_STEPS = 3  # left out in a row under float16: the search of the loss scale, not looked at
Sums = list[tuple[int, Tensor]]


class NotTaken(Exception):
    """The step's gradient is not finite."""


@dataclass
class Pass:
    """What was seen of a backward pass: () numbers on the device, finite or not.

    Attributes:
        evaluation: of the batch, in the step: with lag 0 it is evaluated twice.
        worker: of those of all ranks.
    """

    evaluation: int
    worker: int
    loss: Tensor
    buffers: Tensor | None
    displacement: Tensor | None

    def wrong(self, *, buffers_before: bool) -> list[str]:
        """What is not finite, in words.

        Args:
            buffers_before: the buffers were that already before this pass.
        """
        found = {"displacement": self.displacement, "loss": self.loss,
                 "buffers": None if buffers_before else self.buffers}
        return [name for name, value in found.items() if not _is_finite(value)]


class Guard:
    """Watches the steps of a model on this rank; see the module.

    Args:
        workers: this rank's, of those of all ranks.
        scaled: whether a loss scale is searched for (float16), for which steps are left out.

    Attributes:
        same_steps: compares the ranks where they add noise to the mean.
    """

    def __init__(self, model: nn.Module, optimizer: Any, world: World, *, workers: Sequence[int],
                 scaled: bool) -> None:
        self._optimizer, self._world, self._scaled = optimizer, world, scaled
        self._workers = list(workers)
        self._weights = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        self._before = {name: buffer.clone() for name, buffer in self._buffers.items()}
        self._watched = [each for each in self._buffers.values() if each.is_floating_point()]
        self._on_gpu = any(p.is_cuda for p in self._weights.values())
        self._generators: list[tuple[Callable[[Tensor], None], Tensor]] = []
        self._rates: list[float] = []
        self._factor = torch.ones(())
        self._passes: list[Pass] = []
        self._gradients: list[Sums] = []  # by evaluation
        optimizer.sum_gradients()
        self.same_steps = SameSteps(world, needed=any(
            part(optimizer.noise, kind) is not None for kind in (MeanNoise, MeanObservingNoise)))

    # ------------------------------------------------------------------ a step

    def begin(self) -> None:
        """A step begins, before its learning rate is set: keep what it changes on its way."""
        _copy(self._buffers, self._before)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._generators = [(torch.set_rng_state, torch.get_rng_state())]
        if self._on_gpu:
            self._generators.append((torch.cuda.set_rng_state, torch.cuda.get_rng_state()))
        self._passes.clear()
        self._gradients.clear()
        self._factor = total([p.detach() for p in self._weights.values()]) * 0 + 1

    def start(self, loss: Tensor, worker: int) -> Tensor:
        """From what a backward pass is to start: () 1, or NaN.

        Args:
            loss: () of the pass, whose forward is through.
            worker: whose pass it is, of those of all ranks.
        """
        seen = Pass(len(self._gradients), worker, loss.detach(),
                    total(self._watched) if self._watched else None,
                    self._optimizer.displacement_sum)
        self._passes.append(seen)
        factor = self._factor.to(loss)
        for each in (seen.loss, seen.buffers, seen.displacement):
            if each is not None:
                factor = factor.add(each, alpha=0)  # 0 * inf and 0 * nan are nan
        return factor

    def evaluated(self) -> int:
        """All passes of the batch were made; how often this was so in this step."""
        self._gradients.append(self._optimizer.gradient_sums)
        return len(self._gradients)

    def check(self, norm: Tensor) -> None:
        """Raise NotTaken where () the norm of the gradient, noise included, is not finite."""
        if not _is_finite(norm):
            raise NotTaken

    def undo(self) -> None:
        """The step is not taken: all is as it was before it."""
        _copy(self._before, self._buffers)
        for group, rate in zip(self._optimizer.param_groups, self._rates):
            group["lr"] = rate
        for set_state, state in self._generators:
            set_state(state)
        self._optimizer.reset()

    # ------------------------------------------------------------------ what was wrong

    def explain(self, step: int, in_a_row: int) -> list[tuple[int, int]]:
        """Say why a step was not taken, once it is undone. Collective.

        Args:
            step: which, from 1. in_a_row: so many were not taken, with this one.

        Returns:
            (rank, worker) of each worker with something that was not finite, equal on all ranks;
            none for a step that was left out for the loss scale, or for noise on the mean.

        Raises:
            Diverged: where weights, or buffers from before the step, are not finite.
        """
        if self._scaled and in_a_row <= SCALING_STEPS:
            return []
        mean = self._optimizer.exchanged_sum
        if mean is not None and _is_finite(mean):  # the other ranks may have taken the step
            self.same_steps.left_out = step
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
        first = min((evaluation for _, evaluation, *_ in blamed), default=0)
        blamed = [each for each in blamed if each[1] == first]  # the others follow from these
        said = "; ".join(f"{' and '.join(wrong)} of worker {worker} on {places[rank]}"
                         for rank, _, worker, wrong in blamed)
        log.warning("step %d was not taken, for something is not finite: %s", step,
                    said or "the mean gradient, its noise or its norm")
        return [(rank, worker) for rank, _, worker, _ in blamed]

    def _findings(self) -> dict[str, Any]:
        """Of this rank, as JSON."""
        lasting = {"weight": finite.first(self._weights), "buffer": finite.first(self._before)}
        workers: dict[tuple[int, int], list[str]] = {}  # the first pass that was wrong
        before = False
        for seen in self._passes:
            wrong = seen.wrong(buffers_before=before)
            before = not _is_finite(seen.buffers)
            if wrong:
                workers.setdefault((seen.evaluation, seen.worker), wrong)
        for evaluation, worker in enumerate(map(self._first_gradient, self._gradients)):
            if worker is not None and not any(known == evaluation for known, _ in workers):
                workers[evaluation, worker] = ["gradient"]
        return {"lasting": {kind: name for kind, name in lasting.items() if name},
                "workers": [[*key, wrong] for key, wrong in workers.items()]}

    def _first_gradient(self, sums: Sums) -> int | None:
        """Whose gradient was the first to be not finite."""
        if not sums and self._workers == [0] and self._world.size == 1:  # nothing was exchanged
            return 0
        wrong = (worker for worker, each in sums if not _is_finite(each))
        return next((self._workers[worker] for worker in wrong), None)


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    if source:
        with torch.no_grad():
            torch._foreach_copy_(list(target.values()), list(source.values()))


def _is_finite(value: Tensor | None) -> bool:
    return value is None or bool(value.isfinite())
