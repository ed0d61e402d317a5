"""Multi-head attention up to the attention backend: projections, QK norm, RoPE.

Shapes: B sequences, T tokens of each, N = B * T, H heads, K KV heads, D head dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oneblock import spec as s
from oneblock.model.context import ForwardContext
from oneblock.model.norm import Norm, l2_norm
from oneblock.model.rope import apply_rope


class Attention(nn.Module):
    """Self-attention, or cross-attention to an image. Its scores are computed by the context's backend."""

    def __init__(self, spec: s.Attention, dim: int, norm: s.Norm):
        super().__init__()
        self.spec, self.eps = spec, norm.eps
        q_dim, kv_dim = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        self.wq = nn.Linear(dim, q_dim, bias=spec.bias[0])
        self.wk = nn.Linear(dim, kv_dim, bias=spec.bias[0])
        self.wv = nn.Linear(dim, kv_dim, bias=spec.bias[0])
        self.wo = nn.Linear(q_dim, dim, bias=spec.bias[1])
        sizes = {"head": (spec.head_dim, spec.head_dim), "full": (q_dim, kv_dim)}.get(spec.qk_norm or "")
        self.q_norm, self.k_norm = (Norm(norm, n) for n in sizes) if sizes else (nn.Identity(), nn.Identity())
        self.sinks = nn.Parameter(torch.zeros(spec.n_heads)) if spec.sinks else None

    def forward(self, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        return self.wo(self.attend(x, ctx, layer))

    def attend(self, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        """The heads' outputs, (B, T, H * D): everything before `wo`."""
        queries, h = ctx.query_context, ctx.select_queries(x)
        if self.spec.cross and ctx.image_kv(layer) is not None:
            q, k, v = self.wq(h), None, None  # the cache has the image's keys and values
        else:
            source = ctx.image if self.spec.cross else x
            assert source is not None, "the decoder skips cross-attention without an image"
            q, k, v = self.project_qkv(h, source)
            k = self.norm_and_rotate(k, self.k_norm, ctx).flatten(0, 1)
            v = self.split_heads(v).flatten(0, 1)
        q = self.norm_and_rotate(q, self.q_norm, queries)
        if self.spec.temperature_tuning:
            q = q * attention_temperature(queries.positions, *self.spec.temperature_tuning).type_as(q)
        y = queries.attend(layer, self.spec, q.flatten(0, 1), k, v, self.sinks)
        return y.reshape(*q.shape[:2], -1)

    def project_qkv(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x and keys and values of `source`, (B, T, heads * D) each."""
        return self.wq(x), self.wk(source), self.wv(source)

    def norm_and_rotate(self, x: Tensor, norm: nn.Module, ctx: ForwardContext) -> Tensor:
        """QK norm and RoPE of projected queries or keys: (B, T, heads * D) -> (B, T, heads, D)."""
        a = self.spec
        x = self.split_heads(norm(x) if a.qk_norm == "full" else x)
        x = norm(x) if a.qk_norm == "head" else x
        if a.rope:
            x = self.rotate(x, *ctx.rope_table(a.rope, a.head_dim, x.dtype))
        return l2_norm(x, self.eps) if a.qk_norm == "l2" else x

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE of x (B, T, heads, D) by tables (B or 1, T, 1, R / 2)."""
        return apply_rope(x, cos, sin, self.spec.rope is not None and self.spec.rope.interleaved)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, T, heads, D)."""
        return x.view(*x.shape[:-1], -1, self.spec.head_dim)


def attention_temperature(positions: Tensor, floor: float, slope: float) -> Tensor:
    """Llama 4's temperature tuning, which scales q up at far positions: (B, T) -> (B, T, 1, 1)."""
    steps = torch.floor((positions.float() + 1.0) / floor)
    return (1 + slope * torch.log1p(steps.clamp(min=0)))[:, :, None, None]
