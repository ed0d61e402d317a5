"""Cohere's Command R7B and its kin."""

from __future__ import annotations

from dataclasses import replace

from oneblock.spec.build import INTERLEAVED_10K, Row, fold, gated_hidden_dim, heads, spread
from oneblock.spec.parts import Attention, Layer, Mlp, Norm, Rope, Spec


def cohere2(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 4,
    n_heads: int = 4,
    n_kv_heads: int | None = 2,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-5,
    act: str = "silu",
    rope: Rope = INTERLEAVED_10K,
    window: int | None = 64,
    sliding: tuple[bool, ...] = (True, True, True, False),
    attention_bias: bool = False,
    logit_scale: float = 0.0625,
    tied: bool = True,
) -> Spec:
    """arXiv:2504.00698: parallel branches behind one LayerNorm; windowed layers rotate, full ones have no positions."""
    full = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), bias=(attention_bias, attention_bias))
    # A layer rotates because it has a window: without one, none does.
    local = full if window is None else replace(full, rope=rope, window=window)
    mlp = Mlp(hidden_dim or gated_hidden_dim(dim), act)
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=fold(Layer(local if slides else full, mlp, "parallel") for slides in spread(sliding, n_layers)),
        context=context,
        norm=Norm("layer", norm_eps),
        tied=tied,
        logit_scale=logit_scale,
    )


SIZES: dict[str, Row] = {}
