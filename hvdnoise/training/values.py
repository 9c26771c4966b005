"""What the value of a setting may be, whatever the setting."""

from __future__ import annotations

import math
from typing import Any

from hvdnoise.training.errors import ConfigError

LARGEST_INTEGER = 1 << 63


def check_value(name: str, value: Any) -> None:
    """Refuse numbers that nothing can compute with, and text that no file can hold, at any depth.

    Raises:
        ConfigError: one line that begins with ``name``.
    """
    if isinstance(value, dict):
        for each in (*value, *value.values()):
            check_value(name, each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            check_value(name, each)
    elif isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
        raise ConfigError(f"{name} is wrong: it has {value.bit_length()} bits; give a whole number "
                          "of less than 64")
    elif isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{name}=nan is wrong: give a number")
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{name}={value!r} is wrong: it is no text in UTF-8") from error
