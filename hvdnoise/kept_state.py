"""What the noises of an optimizer keep from step to step: their `StepContext.state`.

What is set in a step counts once the step is taken; a step that is dropped leaves nothing. It
starts anew where the buckets change. Of several noises each has names of its own.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, MutableMapping
from typing import Any, Sequence

from torch import Tensor

from hvdnoise.buckets import Layout
from hvdnoise.noise.base import Noise

Values = dict[str, Any]


class KeptState:
    """See the module.

    Args:
        noises: whose state it is.
    """

    def __init__(self, noises: Sequence[Noise]) -> None:
        self._prefixes = {id(each): f"{type(each).__name__}: " if len(noises) > 1 else ""
                          for each in noises}
        self._kept: Values = {}  # of the steps that were taken
        self._set: Values = {}  # in the step under way
        self._learned: Values = {}  # of its mean gradient, at its end
        self._layout: str | None = None  # the digest of the layout that it belongs to
        # as of the last step that was taken
        self._taken: tuple[Values, str | None] = self._kept, self._layout

    def begin(self, layout: Layout) -> None:
        """A step with these buckets begins."""
        if self._layout != layout.digest:
            self._kept, self._layout = {}, layout.digest

    def drop(self) -> None:
        """The step under way is none."""
        self._kept, self._layout = self._taken
        self._set.clear()
        self._learned.clear()

    def commit(self) -> None:
        """The step under way is taken."""
        self._kept.update({**self._set, **self._learned})
        self._taken = self._kept, self._layout

    def of(self, noise: Noise) -> MutableMapping[str, Any]:
        """One noise's own, in the step under way."""
        return self._own(noise, self._set, self._kept)

    def of_displacement(self, noise: Noise) -> MutableMapping[str, Any]:
        """The same for the buckets of the last step that was taken, which are displaced."""
        return self._own(noise, self._set, self._taken[0])

    def of_mean(self, noise: Noise) -> MutableMapping[str, Any]:
        """The same where the mean gradient is seen, which displacements do not see yet."""
        return self._own(noise, self._learned, self._kept)

    def _own(self, noise: Noise, new: Values, kept: Values) -> MutableMapping[str, Any]:
        prefix = self._prefixes[id(noise)]
        return _Own(ChainMap(new, kept), prefix) if prefix else ChainMap(new, kept)

    def has(self, noise: Noise, layout: Layout | None = None) -> bool:
        """Whether a noise keeps anything, of these buckets."""
        return (layout is None or self._layout == layout.digest) and any(self.of(noise))

    def tensors(self) -> list[Tensor]:
        """All of it that takes memory."""
        return [each for values in (self._kept, self._set, self._learned)
                for each in values.values() if isinstance(each, Tensor)]

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Of the steps that were taken; empty where nothing is kept."""
        return {"layout": self._layout, "values": dict(self._kept)} if self._kept else {}

    def load_state_dict(self, state: dict[str, Any], layout: Layout) -> bool:
        """Take over a state, or none; whether it was of these buckets."""
        self._kept, self._layout = {}, layout.digest
        self._taken = self._kept, self._layout
        if state and state["layout"] != layout.digest:
            return False
        for key, value in state.get("values", {}).items():
            self._kept[key] = self._placed(key, value, layout)
        return True

    def _placed(self, key: str, value: Any, layout: Layout) -> Any:
        """What belongs to a bucket goes to its device."""
        name = next((key[len(prefix):] for prefix in self._prefixes.values()
                     if prefix and key.startswith(prefix)), key)
        devices = [bucket.device for bucket in layout.buckets
                   if f"{name} ".startswith(f"{bucket.key} ")]
        return value.to(devices[0]) if devices and isinstance(value, Tensor) else value


class _Own(MutableMapping[str, Any]):
    """What is one noise's own of a state that several share."""

    def __init__(self, shared: MutableMapping[str, Any], prefix: str) -> None:
        self._shared, self._prefix = shared, prefix

    def __getitem__(self, name: str) -> Any:
        return self._shared[self._prefix + name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._shared[self._prefix + name] = value

    def __delitem__(self, name: str) -> None:
        del self._shared[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        start = len(self._prefix)
        return (name[start:] for name in self._shared if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
