"""FlexAttention: on GPUs, masks and soft caps compiled into one kernel that skips what nobody sees.

Shapes as in attention.py. arXiv:2412.05496.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from oneblock import spec as s
from oneblock.model.step import Step, visible

SMALLEST = 128  # queries: below one block of the kernel an ordinary mask is as good


def applies(q: Tensor, step: Step) -> bool:
    """On CUDA, for more than a few queries; the kernel has no dropout."""
    return q.is_cuda and q.shape[2] >= SMALLEST and not step.dropout.attn


@lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=True), torch.compile(
        create_block_mask, dynamic=True
    )


def _cap(limit: float | None) -> Callable[..., Tensor] | None:
    if limit is None:
        return None
    return lambda score, b, h, i, j: limit * torch.tanh(score / limit)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: s.Attention,
    step: Step,
    layer: int,
    sinks: Tensor | None,
    compiled: bool = True,
) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D)."""
    from torch.nn.attention.flex_attention import (
        AuxRequest,
        create_block_mask,
        flex_attention,
    )

    kernel, blocks = _kernels() if compiled else (flex_attention, create_block_mask)
    keys = step.key_positions(layer)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        mask = visible(queries[b, i], keys_[b, j], a.window, a.chunk)
        return (
            mask if documents is None else mask & (documents[b, i] == documents[b, j])
        )

    batch = q.shape[0]
    queries, keys_ = step.positions.expand(batch, -1), keys.expand(batch, -1)
    documents = step.documents
    block_mask = None
    if not a.cross:
        block_mask = step.shared(
            "blocks",
            a,
            lambda: blocks(
                sees, batch, None, q.shape[2], k.shape[2], device=q.device.type
            ),
        )

    y, aux = kernel(
        q, k, v, score_mod=_cap(a.softcap), block_mask=block_mask,
        scale=a.scale or a.head_dim**-0.5, enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    if sinks is None:
        return y
    return y * torch.sigmoid(aux.lse - sinks.float()[:, None])[..., None].type_as(
        y
    )  # one more term in the softmax's sum
