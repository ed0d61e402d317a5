"""KV cache size in bytes.

A sliding-window layer caches its window, a chunked one its chunk, a full one every token; cross-attention caches the
image tokens and no text tokens.
"""

from __future__ import annotations

from oneblock.spec import Attention, Spec


def span(a: Attention, context: int, image: int = 0) -> int:
    """Tokens that a layer caches, and its last query attends to, after `context` tokens."""
    if a.cross:
        return image
    return min(n for n in (context, a.window, a.chunk) if n is not None)


def width(a: Attention, itemsize: float) -> float:
    """Bytes of one token's keys and values in one layer."""
    return 2 * a.n_kv_heads * a.head_dim * itemsize


def kv_bytes(spec: Spec, context: int, itemsize: float = 2, image: int = 0) -> int:
    """KV cache of one sequence of `context` tokens, with `image` image tokens for cross-attention layers."""
    return round(sum(width(x.attn, itemsize) * span(x.attn, context, image) for x in spec.layers))


def kv_bytes_per_token(spec: Spec, itemsize: float = 2) -> int:
    """KV cache that one token adds while no sliding window is full."""
    return kv_bytes(spec, 1, itemsize)
