"""When a failure is the same again, so that another attempt would fail, too.

A failure has a kind and a place. The place is the newest checkpoint, and the last step that was
taken (RUN/step); or the start, if no step was. All failures since the newest checkpoint count.

- A rank that said what was wrong, or ended with an exit code: the same again if it is of no later
  step than one before, or both were at the start.
- A rank that a signal has killed: the same again if the same rank was killed at the very same step
  before. So a rank that is always out of memory in a step is found, and one that somebody
  kills now and then is not taken for it.
- A launcher that was killed, ranks that were told to save, or hosts out of reach: never.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hvdnoise.supervise.cause import Cause


@dataclass(frozen=True)
class Failure:
    """An attempt that did not come to its end.

    Args:
        cause: the first rank's.
        checkpoint: step of the newest one afterwards, None without any.
        step: the last one that rank 0 has taken; None: the training loop did not begin.
    """

    cause: Cause
    checkpoint: int | None
    step: int | None

    @property
    def place(self) -> str:
        """In words."""
        return "before the first step" if self.step is None else f"at step {self.step}"

    def repeats(self, before: Failure) -> bool:
        """Whether this is the same as one before it, with the same newest checkpoint."""
        if self.cause.kind != before.cause.kind or (self.step is None) != (before.step is None):
            return False
        if self.cause.kind == "said":
            return self.step is None or before.step is None or self.step <= before.step
        return self.cause.kind == "killed" and self.step is not None \
            and (self.step, self.cause.rank) == (before.step, before.cause.rank)


@dataclass
class History:
    """The failures since the newest checkpoint."""

    failures: list[Failure] = field(default_factory=list)

    def add(self, failure: Failure) -> bool:
        """Take in a failure; whether it is the same as an earlier one."""
        if self.failures and failure.checkpoint != self.failures[-1].checkpoint:
            self.failures.clear()
        again = any(failure.repeats(before) for before in self.failures)
        self.failures.append(failure)
        return again
