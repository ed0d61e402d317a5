"""Bytes of keys and values that a text leaves behind.

Spans: a windowed layer keeps its window, a chunked one its chunk, a full one everything; cross-attention keeps the
image's tokens and nothing of the text.
"""

from __future__ import annotations

from oneblock.spec import Attention, Spec


def span(a: Attention, context: int, image: int = 0) -> int:
    """The most tokens a layer keeps, and its last query sees, after `context` of them."""
    if a.cross:
        return image
    return min(n for n in (context, a.window, a.chunk) if n is not None)


def width(a: Attention, itemsize: float) -> float:
    """Bytes of one token's keys and values in one layer."""
    return 2 * a.n_kv_heads * a.head_dim * itemsize


def kv_bytes(spec: Spec, context: int, itemsize: float = 2, image: int = 0) -> int:
    """Of one text of `context` tokens, with `image` tokens of an image for cross-attention to look at."""
    return round(sum(width(x.attn, itemsize) * span(x.attn, context, image) for x in spec.layers))


def kv_bytes_per_token(spec: Spec, itemsize: float = 2) -> int:
    """What a token adds while every layer still sees the whole text."""
    return kv_bytes(spec, 1, itemsize)


def kv_bytes_growth(spec: Spec, context: int, itemsize: float = 2) -> int:
    """What the token after `context` tokens adds: full layers only, once the windows are full."""
    return kv_bytes(spec, context + 1, itemsize) - kv_bytes(spec, context, itemsize)
