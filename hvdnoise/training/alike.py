"""Whether all ranks have taken the same steps, told a step later, so that nobody waits for it.

The mean gradient is the same on all ranks, and so is what they make of it. But noise on the mean is
added by each rank by itself. It must be the same bits everywhere; should one rank alone find it not
finite, it alone would leave the step out.
"""

from __future__ import annotations

import torch

from hvdnoise.comm import Handle, World
from hvdnoise.training.errors import Diverged


class SameSteps:
    """Compares how many steps the ranks have left out.

    Args:
        needed: whether the ranks can differ at all.

    Attributes:
        left_out: the last step that this rank has left out for its own noise on the mean; 0: none.
    """

    def __init__(self, world: World, *, needed: bool) -> None:
        self.left_out = 0
        self._world, self._needed = world, needed and world.size > 1
        self._counts: Handle | None = None
        self._row = self._next_row = self._next_left_out = 0

    def compare(self, bad_steps: int, in_a_row: int) -> int:
        """Start to compare, at the end of each step. Collective.

        Args:
            bad_steps: so many were left out. in_a_row: so many of them just now, in a row.

        Returns:
            ``in_a_row``; where the ranks can differ, that of the last step compared.

        Raises:
            Diverged: where the ranks have not taken the same steps.
        """
        if not self._needed:
            return in_a_row
        row = self.settle()
        self._counts = self._world.allreduce_(torch.tensor([float(bad_steps), -bad_steps]),
                                              name="hvdnoise.guard.steps", op="max")
        self._next_row, self._next_left_out = in_a_row, self.left_out
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
        steps = self._world.gather_json(self._next_left_out, name="hvdnoise.guard.alone")
        text = ", ".join(f"{place} left out step {step}"
                         for place, step in zip(self._world.places(), steps) if step)
        raise Diverged(f"the ranks have not taken the same steps: {text}, for the noise on the "
                       "mean gradient was not finite there, but elsewhere it was: such noise must "
                       "be the same on all ranks; the last checkpoint is intact")
