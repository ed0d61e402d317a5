"""Attention masks, and attention as its definition reads: the reference that every fast backend equals."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from oneblock import spec as s


def build_attention_mask(q: Tensor, k: Tensor, window: int | None, chunk: int | None) -> Tensor:
    """Whether a query at position q sees a key at position k: bool, of the broadcast shape of both.

    A negative position is padding. Padding queries see every key: nobody reads their output, but a row of the softmax
    without any key would be NaN.
    """
    mask = (k <= q) & (k >= 0)
    if window is not None:
        mask = mask & (k > q - window)
    if chunk is not None:
        mask = mask & (k // chunk == q // chunk)
    return mask | (q < 0)


def dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: s.Attention,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D), scores in fp32: (B, H, T, D).

    `mask` (B or 1, 1, T, S): True where a query sees a key. `sinks` (H,): one more logit per head, without a value.
    """
    q = q.unflatten(1, (k.shape[1], -1))  # (B, K, G, T, D): the G heads that share keys
    scores = q @ k[:, :, None].transpose(-1, -2) * (spec.scale or spec.head_dim**-0.5)
    scores = apply_softcap(scores.float(), spec.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -math.inf)
    if sinks is not None:
        sink = sinks.float().view(k.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return (weights.type_as(v) @ v[:, :, None]).flatten(1, 2)


def apply_softcap(x: Tensor, cap: float | None) -> Tensor:
    """Squash into (-cap, cap) (Gemma 2, arXiv:2408.00118)."""
    return x if cap is None else cap * torch.tanh(x / cap)
