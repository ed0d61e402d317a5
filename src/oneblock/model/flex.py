"""FlexAttention: on GPUs, masks and soft caps compiled into one kernel that skips what nobody sees.

Shapes as in attention.py. arXiv:2412.05496.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from oneblock import spec as s
from oneblock.model.context import ForwardContext, visible

SMALLEST = 128  # queries: below one block of the kernel an ordinary mask is as good


def applies(q: Tensor, ctx: ForwardContext) -> bool:
    """On CUDA, for more than a few queries; the kernel has no dropout."""
    return q.is_cuda and q.shape[2] >= SMALLEST and not ctx.dropout.attn


@lru_cache(maxsize=2)
def _kernels(compiled: bool) -> tuple[Any, Any]:
    """Attention, and what builds its mask of blocks."""
    if not compiled:
        return flex_attention, create_block_mask
    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: s.Attention,
    ctx: ForwardContext,
    layer: int,
    sinks: Tensor | None,
    compiled: bool = True,
) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D)."""
    kernel, blocks = _kernels(compiled)
    sizes = q.shape[0], None, q.shape[2], k.shape[2]
    mask = None
    if not a.cross:
        mask = ctx.shared("blocks", a, lambda: blocks(_sees(a, ctx, layer, q.shape[0]), *sizes, device=q.device.type))
    y, aux = kernel(
        q, k, v, score_mod=_cap(a.softcap), block_mask=mask, scale=a.scale or a.head_dim**-0.5,
        enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=sinks is not None),
    )  # fmt: skip
    if sinks is None:
        return y
    return y * torch.sigmoid(aux.lse - sinks.float()[:, None])[..., None].type_as(
        y
    )  # one more term in the softmax's sum


def _sees(a: s.Attention, ctx: ForwardContext, layer: int, batch: int) -> Callable[..., Tensor]:
    """Whether query i of row b sees key j, for the kernel."""
    queries, keys = (x.expand(batch, -1) for x in (ctx.positions, ctx.key_positions(layer)))
    documents = ctx.documents

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        mask = visible(queries[b, i], keys[b, j], a.window, a.chunk)
        return mask if documents is None else mask & (documents[b, i] == documents[b, j])

    return sees


def _cap(limit: float | None) -> Callable[..., Tensor] | None:
    if limit is None:
        return None
    return lambda score, b, h, i, j: limit * torch.tanh(score / limit)
