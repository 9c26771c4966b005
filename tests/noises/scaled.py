"""A noise that the package does not know: GNC, some times larger."""

from __future__ import annotations

from typing import Any

from hvdnoise import GNC, register_noise


@register_noise("scaled")
class Scaled(GNC):
    """Displace as GNC does, by a multiple of it.

    Args:
        factor: what the displacement is multiplied by; 100% of GNC is 1.
    """

    def __init__(self, *args: Any, factor: float = 2.0, **options: Any) -> None:
        super().__init__(*args, **options)
        if not factor > 0:
            raise ValueError(f"factor={factor!r} must be above 0")
        self.factor = factor

    def displacement(self, *args: Any) -> Any:
        unit_N, factors = super().displacement(*args)
        return unit_N, [self.factor * each for each in factors]
