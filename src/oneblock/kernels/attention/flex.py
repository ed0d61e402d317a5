"""FlexAttention (arXiv:2412.05496): on CUDA, masks and soft caps compiled into one kernel that skips hidden blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from oneblock import spec as s
from oneblock.constants import FLEX_MIN_QUERIES
from oneblock.model.context import ForwardContext
from oneblock.model.masked_attention import build_attention_mask


def is_supported(q: Tensor, ctx: ForwardContext) -> bool:
    """Whether FlexAttention computes q (B, H, T, D): on CUDA, for more than a few queries, without dropout."""
    return q.is_cuda and q.shape[2] >= FLEX_MIN_QUERIES and not ctx.dropout.attn


@cache
def compiled_kernels() -> tuple[Any, Any]:
    """FlexAttention and the function that builds its block mask."""
    return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)


def flex(
    layer: int, spec: s.Attention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ctx: ForwardContext
) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D) with any mask, soft cap and sinks; eager on other devices."""
    kernel, build_block_mask = compiled_kernels() if q.is_cuda else (flex_attention, create_block_mask)
    sizes = q.shape[0], None, q.shape[2], k.shape[2]
    block_mask = None
    if not spec.cross:
        block_mask = ctx.once(
            "block_mask",
            lambda: build_block_mask(mask_mod(spec, ctx, layer, q.shape[0]), *sizes, device=q.device.type),
            spec.window,
            spec.chunk,
        )
    y, aux = kernel(
        q, k, v, score_mod=score_mod(spec.softcap), block_mask=block_mask, scale=spec.scale or spec.head_dim**-0.5,
        enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=sinks is not None),
    )  # fmt: skip
    if sinks is None:
        return y
    assert aux.lse is not None
    return y * torch.sigmoid(aux.lse - sinks.float()[:, None])[..., None].type_as(y)  # one more term of the softmax


def mask_mod(spec: s.Attention, ctx: ForwardContext, layer: int, batch: int) -> Callable[..., Tensor]:
    """FlexAttention's `mask_mod`: whether query i of row b sees key j."""
    queries, keys = (x.expand(batch, -1) for x in (ctx.positions, ctx.key_positions(layer)))
    documents = ctx.documents if ctx.documents is None else ctx.documents.expand(batch, -1)

    def is_visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        mask = build_attention_mask(queries[b, i], keys[b, j], spec.window, spec.chunk)
        return mask if documents is None else mask & (documents[b, i] == documents[b, j])

    return is_visible


def score_mod(softcap: float | None) -> Callable[..., Tensor] | None:
    """FlexAttention's `score_mod` for a soft cap."""
    if softcap is None:
        return None
    return lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)
