"""Mistral and Mixtral."""

from __future__ import annotations

from typing import Any

from oneblock.spec.build import BASE_1M, BASE_10K, Row, gated_hidden_dim, heads, row
from oneblock.spec.parts import Attention, Layer, Mlp, Moe, Norm, Rope, Spec


def mistral(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int | None = 2,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-5,
    act: str = "silu",
    rope: Rope = BASE_10K,
    window: int | None = None,
    tied: bool = False,
) -> Spec:
    """arXiv:2310.06825: Llama with grouped-query attention and a sliding window in every layer."""
    attn = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), rope, window)
    mlp = Mlp(hidden_dim or gated_hidden_dim(dim), act)
    return Spec(vocab, dim, n_layers, pattern=(Layer(attn, mlp),), context=context, norm=Norm(eps=norm_eps), tied=tied)


def mixtral(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int | None = 2,
    head_dim: int | None = None,
    hidden_dim: int = 64,  # of one expert
    n_experts: int = 4,
    top_k: int = 2,
    context: int = 256,
    norm_eps: float = 1e-5,
    act: str = "silu",
    rope: Rope = BASE_1M,
    window: int | None = None,
    tied: bool = False,
) -> Spec:
    """arXiv:2401.04088: Mistral with two of eight experts per token."""
    attn = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), rope, window)
    moe = Moe(n_experts, top_k, Mlp(hidden_dim, act))
    return Spec(vocab, dim, n_layers, pattern=(Layer(attn, moe),), context=context, norm=Norm(eps=norm_eps), tied=tied)


def _mistral(title: str, **rest: Any) -> Row:
    sizes = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "hidden_dim": 14336}
    return row(title, "mistral", **sizes, context=32768, **rest)


def _mixtral(title: str, vocab: int, dim: int, n_layers: int, n_heads: int, hidden_dim: int, context: int) -> Row:
    sizes = {"vocab": vocab, "dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": 8}
    return row(title, "mixtral", **sizes, hidden_dim=hidden_dim, n_experts=8, context=context)


SIZES: dict[str, Row] = {
    "mistral-7b-v0.1": _mistral("Mistral-7B-v0.1", vocab=32000, window=4096),
    "mistral-7b-v0.3": _mistral("Mistral-7B-v0.3", vocab=32768, rope=BASE_1M),
    "mixtral-8x7b": _mixtral("Mixtral-8x7B", 32000, 4096, 32, 32, 14336, 32768),
    "mixtral-8x22b": _mixtral("Mixtral-8x22B", 32768, 6144, 56, 48, 16384, 65536),
}
