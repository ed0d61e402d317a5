"""What the families' builders share: default sizes, and the folding of a depth of layers into a pattern."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple, TypeVar

from oneblock.errors import OneblockError
from oneblock.spec.parts import Layer, Rope

T = TypeVar("T")

# Rotary embeddings by base; NEIGHBOURS rotate (0, 1), (2, 3) ..
BASE_10K = Rope(10_000.0)
BASE_500K = Rope(500_000.0)
BASE_1M = Rope(1_000_000.0)
BASE_2M = Rope(2_000_000.0)
INTERLEAVED_10K = Rope(10_000.0, interleaved=True)
INTERLEAVED_500K = Rope(500_000.0, interleaved=True)


class Row(NamedTuple):
    """A published size of a family: its title and the builder's keywords."""

    title: str
    family: str
    kwargs: dict[str, Any]


def row(title: str, family: str, **kwargs: Any) -> Row:
    return Row(title, family, kwargs)


def heads(dim: int, n_heads: int, n_kv_heads: int | None, head_dim: int | None) -> tuple[int, int, int]:
    """Query heads, KV heads and their width, with what was left out filled in."""
    n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
    if head_dim is None and dim % n_heads:
        raise OneblockError(f"dim {dim} cannot be split over {n_heads} heads: change one, or give head_dim")
    if n_heads % n_kv_heads:
        raise OneblockError(f"{n_heads} query heads cannot share {n_kv_heads} KV heads: n_kv_heads must divide n_heads")
    return n_heads, n_kv_heads, head_dim or dim // n_heads


def gated_hidden_dim(dim: int) -> int:
    """8/3 dim, up to a multiple of 32: three matrices then cost what two of 4 dim do (arXiv:2002.05202)."""
    return 32 * math.ceil(dim * 8 / 3 / 32)


def spread(kinds: Sequence[T], n_layers: int) -> tuple[T, ...]:
    """One kind per layer: `kinds` from the first layer on, started again as often as the depth asks."""
    return tuple(islice(cycle(kinds), n_layers))


def fold(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """The shortest pattern that, repeated and cut off at the depth, gives these layers: ABABA -> AB."""
    depth = tuple(layers)
    for length in range(1, len(depth) + 1):
        if all(layer == depth[i % length] for i, layer in enumerate(depth)):
            return depth[:length]
    return depth


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """YaRN's default gain on cos and sin (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def longrope_attention_factor(factor: float, context: int) -> float:
    """LongRoPE's default gain on cos and sin; `context` is the length before scaling."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
