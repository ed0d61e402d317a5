"""A GGUF file's metadata for one architecture, each value checked for type and range when it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from oneblock.errors import OneblockError

# Above any model's, and low enough that no product of them takes memory or time before it is refused.
LIMITS = {"block_count": 1 << 12, "attention.head_count": 1 << 16, "attention.head_count_kv": 1 << 16}
LIMITS |= {"expert_count": 1 << 12, "attention.key_length": 1 << 16, "rope.dimension_count": 1 << 16}
LIMIT = 1 << 24


class Metadata:
    """The keys of one architecture: `block_count` is `llama.block_count` in the file."""

    def __init__(self, values: Mapping[str, Any], arch: str):
        self.values, self.arch = values, arch

    def get(self, key: str) -> Any:
        return self.values.get(f"{self.arch}.{key}")

    def read_int(self, key: str) -> int:
        value, limit = self.get(key), LIMITS.get(key, LIMIT)
        if type(value) is not int or not 1 <= value <= limit:
            raise OneblockError(f"{self.arch}.{key} is {shorten(value)}, not a whole number from 1 to {limit}; fix it")
        return value

    def read_float(self, key: str, default: float | None = None) -> float:
        """The shortest decimal of the stored fp32 number: 1e-5, not 0.0000099999997."""
        value = default if self.get(key) is None else self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise OneblockError(f"{self.arch}.{key} is {shorten(value)}, not a finite number; fix it")
        return shortest_decimal(value)


def shortest_decimal(value: float) -> float:
    """The decimal number with the fewest digits that rounds to the same fp32 number."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def shorten(value: Any) -> str:
    """A value as a short line of an error: a damaged file may hold any string or array."""
    is_long = isinstance(value, str | list | np.ndarray) and len(value) > 60
    return " ".join(repr(value[:10] if is_long else value).split())
