"""Attention in bf16 on CPUs with our C++ operators: a fused decode step, and a prefill with a fused causal softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from oneblock import spec as s
from oneblock.kernels.attention.blocked_matmul import matmul_by_blocks
from oneblock.kernels.build import can_use_kernels
from oneblock.model.context import ForwardContext


def is_supported(spec: s.Attention, q: Tensor, k: Tensor, sinks: Tensor | None, ctx: ForwardContext) -> bool:
    has_operator = not spec.cross and spec.softcap is None and sinks is None and spec.head_dim % 32 == 0
    return has_operator and can_use_kernels(q) and k.dtype == q.dtype and ctx.documents is None


def decode_attention(
    layer: int, spec: s.Attention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ctx: ForwardContext
) -> Tensor:
    """One query per sequence, q (B, H, 1, D): each key is read once for all heads that share it."""
    mask = ctx.attention_mask(spec, layer)[:, 0, 0]
    scale = spec.scale or spec.head_dim**-0.5
    return torch.ops.oneblock_cpu.decode_attention(q.contiguous(), k, v, mask.contiguous(), scale)


def causal_prefill(
    layer: int, spec: s.Attention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ctx: ForwardContext
) -> Tensor:
    """Causal attention by blocked matmuls, with scale, mask and softmax in one operator."""

    def weights(q: Tensor, k: Tensor, groups: int) -> Tensor:
        scores = torch.bmm(q, k.transpose(1, 2))
        torch.ops.oneblock_cpu.causal_softmax(scores, q.shape[1] // groups, spec.scale or spec.head_dim**-0.5)
        return scores

    return matmul_by_blocks(q, k, v, weights)
