"""The attention backend over dense keys and values, and the rule that selects its kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from oneblock import spec as s
from oneblock.constants import MATMUL_MAX_PREFILL_KEYS
from oneblock.kernels.attention import blocked_matmul, cpu_operators, eager, flex, sdpa
from oneblock.model.context import ForwardContext

# (layer, spec, q, k, v, sinks, ctx) -> y, with q and y (B, H, T, D), k and v (B, K, S, D)
Kernel = Callable[[int, s.Attention, Tensor, Tensor, Tensor, Tensor | None, ForwardContext], Tensor]


@dataclass(frozen=True)
class FastAttention:
    """An `AttentionBackend` over dense keys and values. It selects a kernel once per pass and kind of layer."""

    kernel: Kernel | None = None  # always this one
    use_cpu_operators: bool = False  # our C++ operators, which inference compiles at first use

    def __call__(
        self,
        layer: int,
        spec: s.Attention,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        sinks: Tensor | None,
        ctx: ForwardContext,
    ) -> Tensor:
        q = ctx.layout.to_batch(q)
        keys, values = ctx.update_kv(layer, spec, k, v)
        kernel = self.kernel or ctx.once(
            "attention_kernel",
            lambda: select_kernel(spec, q, keys, sinks, ctx, self.use_cpu_operators),
            spec.window,
            spec.chunk,
            spec.cross,
            spec.softcap is None and sinks is None,
            q.requires_grad,
        )
        return ctx.layout.to_tokens(kernel(layer, spec, q, keys, values, sinks, ctx))


def select_kernel(
    spec: s.Attention, q: Tensor, k: Tensor, sinks: Tensor | None, ctx: ForwardContext, use_cpu_operators: bool = False
) -> Kernel:
    """Select the fastest kernel for q (B, H, T, D) over k (B, K, S, D) by device, dtype, gradients and lengths."""
    n_keys = k.shape[2]
    kind = ctx.mask_kind(spec, n_keys)
    is_causal = kind in ("causal", "causal_lower_right")
    if use_cpu_operators and cpu_operators.is_supported(spec, q, k, sinks, ctx):
        if q.shape[2] == 1:
            return cpu_operators.decode_attention
        if is_causal and n_keys <= MATMUL_MAX_PREFILL_KEYS and not torch.compiler.is_compiling():
            return cpu_operators.causal_prefill
    needs_scores = spec.softcap is not None or sinks is not None
    needs_mask = kind == "explicit" or (kind == "causal_lower_right" and not sdpa.can_split_lower_right(q))
    if (needs_scores or needs_mask) and flex.is_supported(q, ctx):
        return flex.flex
    if needs_scores:
        return eager.eager
    if is_causal and not needs_mask and blocked_matmul.is_faster(q, n_keys):
        return blocked_matmul.blocked_matmul
    return sdpa.sdpa
