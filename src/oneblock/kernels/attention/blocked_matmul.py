"""Causal attention as two batched matmuls per block of queries, for short sequences on CPUs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from oneblock import spec as s
from oneblock.constants import MATMUL_BLOCK, MATMUL_MAX_PREFILL_KEYS, MATMUL_MAX_TRAINING_TOKENS
from oneblock.model.context import ForwardContext


def is_faster(q: Tensor, n_keys: int) -> bool:
    """Whether matmuls beat torch's fused kernel for q (B, H, T, D): on CPUs, in bf16 or in short backward passes."""
    if q.device.type != "cpu":
        return False
    if q.requires_grad or torch.compiler.is_compiling():
        return q.requires_grad and q.shape[2] <= MATMUL_MAX_TRAINING_TOKENS.get(q.dtype.itemsize, 0)
    return q.dtype == torch.bfloat16 and n_keys <= MATMUL_MAX_PREFILL_KEYS


def blocked_matmul(
    layer: int, spec: s.Attention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ctx: ForwardContext
) -> Tensor:
    """Causal attention of the last queries q (B, H, T, D) of a sequence over k, v (B, K, S, D)."""

    def weights(q: Tensor, k: Tensor, groups: int) -> Tensor:
        rows, keys = q.shape[1] // groups, k.shape[1]

        def build() -> Tensor:
            return torch.full((rows, keys), -math.inf, dtype=q.dtype).triu(keys - rows + 1).repeat(groups, 1)

        bias = ctx.once("causal_bias", build, groups, q.dtype) if rows == keys else build()
        scale = spec.scale or spec.head_dim**-0.5
        weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale).softmax(-1)
        return F.dropout(weights, ctx.dropout.attn) if ctx.dropout.attn else weights

    return matmul_by_blocks(q, k, v, weights)


def matmul_by_blocks(q: Tensor, k: Tensor, v: Tensor, weights: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """Causal attention; `weights(q, k, G)` are those of the last rows of q (B K, G rows, D) over k (B K, keys, D)."""
    batch, kv_heads, n_keys, _ = k.shape
    groups, n_queries = q.shape[1] // kv_heads, q.shape[2]
    cached = n_keys - n_queries
    k, v = (x.reshape(batch * kv_heads, n_keys, -1) for x in (k, v))
    block, outputs = (n_queries if torch.compiler.is_compiling() else min(n_queries, MATMUL_BLOCK)), []
    for start in range(0, n_queries, block) if n_queries > block else (0,):
        end = min(start + block, n_queries)
        rows = q[:, :, start:end].reshape(batch * kv_heads, groups * (end - start), -1)
        y = torch.bmm(weights(rows, k[:, : cached + end], groups).type_as(v), v[:, : cached + end])
        outputs.append(y.view(batch, kv_heads * groups, end - start, -1).transpose(1, 2))
    return torch.cat(outputs, 1).transpose(1, 2)  # stored token by token, as `wo` reads it
