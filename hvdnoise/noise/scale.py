"""How long a displacement is: its scale, in one of several units.

    radius=r    r, in the units of the weights
    share=r     r |theta|, a share of the norm of all weights that the noise displaces

A noise may have further units of its own. Exactly one is given, as a number or a function of the
step. |theta| is that of the clean weights, the same for all workers of a step.
"""

from __future__ import annotations

import warnings

from hvdnoise.noise.base import (
    Observation,
    Schedule,
    StepContext,
    WeightNoise,
    at_step,
    check_scale,
)


class SizedNoise(WeightNoise):
    """Base of the noises whose displacement has a length that is given.

    Attributes:
        scale: the unit in which it is given.
        size: how much of it; a number, or a function of the step.
        most_share: the largest share without a warning; white noise takes far more.
    """

    scale: str
    size: Schedule
    most_share = 0.05
    _warned = False

    def take_scale(self, default: tuple[str, float] | None = None, **units: Schedule | None
                   ) -> None:
        """Set the scale to the one unit that is given, or to the default.

        Raises:
            ValueError: for none without a default, more than one, or a bad value.
        """
        given = {name: value for name, value in units.items() if value is not None}
        if not given and default is not None:
            given = dict([default])
        if len(given) != 1:
            *names, last = [f"{name}=" for name in units]
            raise ValueError(f"{type(self).__name__} got {' and '.join(given) or 'no scale'}: give "
                             f"exactly one of {', '.join(names)} and {last}")
        ((self.scale, value),) = given.items()
        self.size = check_scale(self.scale, value)
        if self.scale == "share" and not callable(self.size):
            self._check_share(self.size, "")

    def length(self, observation: Observation, context: StepContext) -> float:
        """The length of the displacement in this step, by radius or share."""
        size = at_step(self.size, context.step)
        if self.scale != "share":
            return size
        self._check_share(size, f" at step {context.step}")
        return size * observation.weight_norm(self)

    def _check_share(self, share: float, where: str) -> None:
        """Warn once of a share that is too large."""
        if share > self.most_share and not self._warned:
            self._warned = True
            warnings.warn(f"share={share:g}{where}: above {self.most_share:g} of the weights' norm "
                          "a displacement tends to stop training; lower it (0.02 is usual)",
                          stacklevel=4)
