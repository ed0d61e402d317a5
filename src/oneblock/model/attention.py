"""Attention: queries, keys and values, what is done to them, and who sees whom.

Shapes: B batch, T queries, S keys, H heads, K KV heads, G = H / K heads that share one, D head dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneblock import spec as s
from oneblock.model import flex
from oneblock.model.context import ForwardContext
from oneblock.model.norm import Norm, l2_norm
from oneblock.model.rope import rotate

BLOCK = 256  # queries at a time where a mask or the scores are written out: memory stays linear in the text

# Texts up to this long train faster on CPUs by plain products than by torch's fused path, whose backward pass is slow
# there: 1.0 against 8.1 ms in bf16 and 2.4 against 3.5 in fp32 for 32 texts of 64 tokens, 4 heads of 32.
SHORT = {torch.bfloat16: 512, torch.float32: 256}
MIDDLE = 4096  # bf16 texts up to this long are read by products too; a longer one's many sizes would fragment memory
PRODUCT = 128  # queries in one of those products: 8 texts of 512 in bf16, 12 heads of 64, take 21 ms; fused 70


class Attention(nn.Module):
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
        return self.wo(self.mixed(x, ctx, layer))

    def mixed(self, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        """What the heads read, (B, T, heads x D), before the last product."""
        a, asking = self.spec, ctx.asking
        source = ctx.image if a.cross else x
        assert source is not None, "the decoder skips cross-attention where there is no image"
        q, k, v = self.project(ctx.asked(x), source)
        q, k, v = self.placed(q, self.q_norm, asking), self.placed(k, self.k_norm, ctx), self.heads(v)
        if a.temperature_tuning:
            q = q * temperature(asking.positions, *a.temperature_tuning).type_as(q)
        if ctx.cache is not None and not a.cross:
            k, v = ctx.cache.update(layer, k, v)
        y = self.read(q, k, v, asking, layer)
        return y.transpose(1, 2).flatten(2)

    def placed(self, x: Tensor, norm: nn.Module, ctx: ForwardContext) -> Tensor:
        """Queries or keys as they meet, normed and turned to their positions: (B, T, heads x D) -> (B, heads, T, D)."""
        a = self.spec
        x = self.heads(norm(x) if a.qk_norm == "full" else x)
        x = norm(x) if a.qk_norm == "head" else x
        if a.rope:
            x = self.turn(x, *ctx.rotary(a.rope, a.head_dim, x.dtype))
        return l2_norm(x, self.eps) if a.qk_norm == "l2" else x

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`rotate`, as a step that inference may do otherwise."""
        return rotate(x, cos, sin, self.spec.rope is not None and self.spec.rope.interleaved)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, heads x D) -> (B, heads, T, D)."""
        return x.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, T, heads x D) each: inference puts one product in its place."""
        return self.wq(x), self.wk(source), self.wv(source)

    def read(self, q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        """`attend`, as a step that inference may do otherwise."""
        return attend(q, k, v, self.spec, ctx, layer, self.sinks)


def temperature(positions: Tensor, floor: float, slope: float) -> Tensor:
    """Llama 4's sharpening of queries far into a text: (B, T) -> (B, 1, T, 1)."""
    steps = torch.floor((positions.float() + 1.0) / floor)
    return (1 + slope * torch.log1p(steps.clamp(min=0)))[:, None, :, None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, a: s.Attention, ctx: ForwardContext, layer: int, sinks: Tensor | None
) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D): torch's fused path wherever it applies."""
    sees = ctx.sees(a, k.shape[2])
    if sees == "later" and (q.device.type != "cpu" or q.requires_grad or torch.compiler.is_compiling()):
        sees = "mask"
    written_out = a.softcap is not None or sinks is not None
    if flex.applies(q, ctx) and (sees == "mask" or written_out):
        return flex.attend(q, k, v, a, ctx, layer, sinks)
    if written_out or sees == "mask":
        return _by_blocks(q, k, v, a, ctx, layer, sinks)
    if sees in ("causal", "later") and _products_pay(q, k.shape[2]):
        return blocked_matmul(q, k, v, partial(_weights, a, ctx))
    if sees == "later":
        return _later(q, k, v, a)
    return _fused(q, k, v, a, ctx, causal=sees == "causal")


def _products_pay(q: Tensor, keys: int) -> bool:
    """Whether plain products beat torch's fused kernel, as on CPUs in bf16 and in short backward passes."""
    if q.device.type != "cpu":
        return False
    if q.requires_grad or torch.compiler.is_compiling():
        return q.requires_grad and q.shape[2] <= SHORT.get(q.dtype, 0)
    return q.dtype == torch.bfloat16 and keys <= MIDDLE


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: s.Attention,
    ctx: ForwardContext,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    scale = a.scale or a.head_dim**-0.5
    groups, dropout = q.shape[1] // k.shape[1], ctx.dropout.attn
    if q.shape[2] == 1 and groups > 1 and not causal:
        # One query: the heads of a group become its rows, since CPUs read each key once that way (10x in bf16).
        q = q.view(q.shape[0], k.shape[1], groups, -1)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        return y.reshape(y.shape[0], -1, 1, y.shape[-1])
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=scale, enable_gqa=groups > 1)


def blocked_matmul(q: Tensor, k: Tensor, v: Tensor, weigh: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """Causal attention as two batched products for each block of queries; the heads of a group are rows of one.

    `weigh`: of the last queries of a text (B K, G rows, D), of its keys (B K, keys, D) and of G, the weights.
    """
    batch, kv_heads, keys, _ = k.shape
    groups, length = q.shape[1] // kv_heads, q.shape[2]
    earlier = keys - length
    k, v = (x.reshape(batch * kv_heads, keys, -1) for x in (k, v))
    block, parts = (length if torch.compiler.is_compiling() else min(length, PRODUCT)), []
    for start in range(0, length, block) if length > block else (0,):
        end = min(start + block, length)
        rows = q[:, :, start:end].reshape(batch * kv_heads, groups * (end - start), -1)
        y = torch.bmm(weigh(rows, k[:, : earlier + end], groups).type_as(v), v[:, : earlier + end])
        parts.append(y.view(batch, kv_heads * groups, end - start, -1).transpose(1, 2))
    return torch.cat(parts, 1).transpose(1, 2)  # the heads of a token in a row, as the next product reads them


def _weights(a: s.Attention, ctx: ForwardContext, q: Tensor, k: Tensor, groups: int) -> Tensor:
    rows, keys = q.shape[1] // groups, k.shape[1]

    def build() -> Tensor:
        return torch.full((rows, keys), -math.inf, dtype=q.dtype).triu(keys - rows + 1).repeat(groups, 1)

    bias = ctx.shared(f"bias{groups}", a, build) if rows == keys else build()
    weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=a.scale or a.head_dim**-0.5).softmax(-1)
    return F.dropout(weights, ctx.dropout.attn) if ctx.dropout.attn else weights


def _later(q: Tensor, k: Tensor, v: Tensor, a: s.Attention) -> Tensor:
    """Queries over keys of earlier passes and their own: each part in one kernel, then weighed by its share."""
    fused, scale = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, a.scale or a.head_dim**-0.5
    earlier = k.shape[2] - q.shape[2]
    before, before_sum = fused(q, k[:, :, :earlier], v[:, :, :earlier], scale=scale)  # sums are logarithms, in fp32
    own, own_sum = fused(q, k[:, :, earlier:], v[:, :, earlier:], is_causal=True, scale=scale)
    return own.lerp(before, torch.sigmoid(before_sum - own_sum)[..., None].type_as(own))


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, a: s.Attention, ctx: ForwardContext, layer: int, sinks: Tensor | None
) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    block = queries if torch.compiler.is_compiling() else BLOCK
    parts = []
    for start in range(0, queries, max(block, 1)) if queries > block else (0,):
        rows = slice(start, min(start + block, queries))
        cols = _columns(a, ctx, rows, queries, keys)
        mask = None if a.cross else ctx.mask(a, layer, rows, cols)
        part = q[:, :, rows], k[:, :, cols], v[:, :, cols]
        if a.softcap is None and sinks is None:
            parts.append(_fused(*part, a, ctx, mask))
        else:
            parts.append(_written_out(*part, a, ctx, mask, sinks))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _columns(a: s.Attention, ctx: ForwardContext, rows: slice, queries: int, keys: int) -> slice:
    """The keys that a block of queries can see, where the shapes alone tell."""
    if not ctx.ordered or queries != keys or queries <= BLOCK or torch.compiler.is_compiling():
        return slice(0, keys)
    first = max(0, rows.start - a.window + 1) if a.window else 0
    if a.chunk:
        first = max(first, rows.start // a.chunk * a.chunk)
    return slice(first, rows.stop)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, a: s.Attention, ctx: ForwardContext, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """Attention with its scores in the open, for what the fused kernels cannot do: soft caps and sinks."""
    q = q.unflatten(1, (k.shape[1], -1))  # (B, K, G, T, D)
    scores = q @ k[:, :, None].transpose(-1, -2) * (a.scale or a.head_dim**-0.5)
    scores = softcap(scores.float(), a.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -math.inf)
    if sinks is not None:
        sink = sinks.float().view(k.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = F.dropout(weights, ctx.dropout.attn) if ctx.dropout.attn else weights
    return (weights.type_as(v) @ v[:, :, None]).flatten(1, 2)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Squash into (-cap, cap): Gemma 2."""
    return x if cap is None else cap * torch.tanh(x / cap)
