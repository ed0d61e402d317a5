"""torch's fused attention, `scaled_dot_product_attention`, for every mask without a soft cap or sinks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oneblock import spec as s
from oneblock.kernels.attention.eager import attend_by_blocks
from oneblock.model.context import ForwardContext


def sdpa(
    layer: int, spec: s.Attention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ctx: ForwardContext
) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D); no mask is materialized where shapes tell it."""
    kind = ctx.mask_kind(spec, k.shape[2])
    if kind == "causal_lower_right" and can_split_lower_right(q):
        return attend_lower_right(q, k, v, spec)
    if kind in ("none", "causal"):
        return fused(q, k, v, spec, ctx.dropout.attn, None, kind == "causal")

    def attend_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return fused(q, k, v, spec, ctx.dropout.attn, mask)

    return attend_by_blocks(attend_block, layer, spec, q, k, v, ctx)


def fused(
    q: Tensor, k: Tensor, v: Tensor, spec: s.Attention, dropout: float, mask: Tensor | None, causal: bool = False
) -> Tensor:
    scale, groups = spec.scale or spec.head_dim**-0.5, q.shape[1] // k.shape[1]
    if q.shape[2] == 1 and groups > 1 and not causal:
        # The heads of a group become the rows of one query block, so that CPUs read each key once (10x faster in bf16).
        q = q.reshape(q.shape[0], k.shape[1], groups, -1)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        return y.reshape(y.shape[0], -1, 1, y.shape[-1])
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=scale, enable_gqa=groups > 1)


def can_split_lower_right(q: Tensor) -> bool:
    """Whether `attend_lower_right` works: it calls an operator of CPUs without a backward pass."""
    return q.device.type == "cpu" and not q.requires_grad and not torch.compiler.is_compiling()


def attend_lower_right(q: Tensor, k: Tensor, v: Tensor, spec: s.Attention) -> Tensor:
    """Queries over cached keys and over their own, one fused call each, merged by their log-sum-exps (fp32)."""
    flash, scale = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, spec.scale or spec.head_dim**-0.5
    cached = k.shape[2] - q.shape[2]
    y_cached, lse_cached = flash(q, k[:, :, :cached], v[:, :, :cached], scale=scale)
    y_new, lse_new = flash(q, k[:, :, cached:], v[:, :, cached:], is_causal=True, scale=scale)
    return y_new.lerp(y_cached, torch.sigmoid(lse_cached - lse_new)[..., None].type_as(y_new))
