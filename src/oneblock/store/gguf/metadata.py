"""The settings of one architecture, each checked for the kind it is asked for as."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from oneblock.errors import OneblockError

# Above any model's, and low enough that no product of them takes memory or time before it is found to be wrong.
LIMITS = {"block_count": 1 << 12, "attention.head_count": 1 << 16, "attention.head_count_kv": 1 << 16}
LIMITS |= {"expert_count": 1 << 12, "attention.key_length": 1 << 16, "rope.dimension_count": 1 << 16}
LIMIT = 1 << 24


def brief(value: Any) -> str:
    """A value as one short line of a message: a damaged file may hold any text or array."""
    return " ".join(
        repr(value[:10] if isinstance(value, str | list | np.ndarray) and len(value) > 60 else value).split()
    )


class Metadata:
    """The settings of one architecture, each of the kind that it is asked for as."""

    def __init__(self, settings: Mapping[str, Any], arch: str):
        self.settings, self.arch = settings, arch

    def get(self, key: str) -> Any:
        return self.settings.get(f"{self.arch}.{key}")

    def whole(self, key: str, least: int = 1) -> int:
        value, limit = self.get(key), LIMITS.get(key, LIMIT)
        if type(value) is not int or not least <= value <= limit:
            raise OneblockError(
                f"{self.arch}.{key} is {brief(value)}, not a whole number from {least} to {limit}; mend it"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The number that was meant: 1e-5, where 32 bits hold 0.0000099999997."""
        value = default if self.get(key) is None else self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise OneblockError(f"{self.arch}.{key} is {brief(value)}, not a number; mend it")
        return shortest(value)


def shortest(value: float) -> float:
    """The decimal number with the fewest digits that 32 bits hold as they hold this one."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
