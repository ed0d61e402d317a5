"""Eager attention: the reference's arithmetic, a block of queries at a time.

Kernels take q (B, H, T, D) and k, v (B, K, S, D) and return (B, H, T, D).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oneblock import spec as s
from oneblock.constants import MASK_BLOCK
from oneblock.model.context import ForwardContext
from oneblock.model.masked_attention import dot_product_attention


def eager(
    layer: int, spec: s.Attention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ctx: ForwardContext
) -> Tensor:
    """Attention with its scores materialized: soft caps and sinks, which torch's fused attention has not."""

    def attend_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return dot_product_attention(q, k, v, spec, mask, sinks, ctx.dropout.attn)

    return attend_by_blocks(attend_block, layer, spec, q, k, v, ctx)


def attend_by_blocks(
    attend_block: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    layer: int,
    spec: s.Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ctx: ForwardContext,
) -> Tensor:
    """Attend with masks of one block of queries at a time, so that memory is linear in the sequence length."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    masked = ctx.mask_kind(spec, n_keys) != "none"
    if n_queries <= MASK_BLOCK or torch.compiler.is_compiling():  # a graph holds no loop of a dynamic length
        return attend_block(q, k, v, ctx.attention_mask(spec, layer) if masked else None)
    outputs = []
    for start in range(0, n_queries, MASK_BLOCK):
        rows = slice(start, min(start + MASK_BLOCK, n_queries))
        cols = visible_columns(spec, ctx, rows, n_queries, n_keys)
        mask = ctx.attention_mask(spec, layer, rows, cols) if masked else None
        outputs.append(attend_block(q[:, :, rows], k[:, :, cols], v[:, :, cols], mask))
    return torch.cat(outputs, 2)


def visible_columns(spec: s.Attention, ctx: ForwardContext, rows: slice, n_queries: int, n_keys: int) -> slice:
    """The keys that a block of queries can see, as far as shapes tell."""
    if not ctx.has_default_positions or n_queries != n_keys or spec.cross:
        return slice(0, n_keys)
    first = max(0, rows.start - spec.window + 1) if spec.window else 0
    if spec.chunk:
        first = max(first, rows.start // spec.chunk * spec.chunk)
    return slice(first, rows.stop)
