"""Phi-1.5 and 2, Phi-3, Phi-4 and Phi-4-mini."""

from __future__ import annotations

from typing import Any

from oneblock.spec.build import BASE_10K, Row, gated_hidden_dim, heads, longrope_attention_factor, row
from oneblock.spec.parts import Attention, Layer, LongRope, Mlp, Norm, Rope, Spec


def phi(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-5,
    act: str = "gelu_tanh",
    rope: Rope | None = None,  # None: half of each head, base 10,000
    qk_norm: bool = False,
    tied: bool = False,
) -> Spec:
    """arXiv:2309.05463: attention and MLP side by side behind one norm, biases everywhere, the head's included."""
    n_heads, n_kv_heads, head_dim = heads(dim, n_heads, n_kv_heads, head_dim)
    rope = rope or Rope(dim=head_dim // 2)
    attn = Attention(n_heads, n_kv_heads, head_dim, rope, bias=(True, True), qk_norm="head" if qk_norm else None)
    mlp = Mlp(hidden_dim or 4 * dim, act, gated=False, bias=True)
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=(Layer(attn, mlp, "parallel"),),
        context=context,
        norm=Norm("layer", norm_eps, bias=True),
        tied=tied,
        head_bias=True,
    )


def phi3(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-5,
    act: str = "silu",
    rope: Rope = BASE_10K,
    window: int | None = None,
    tied: bool = False,
) -> Spec:
    """arXiv:2404.14219: Llama with a window and LongRoPE."""
    attn = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), rope, window)
    mlp = Mlp(hidden_dim or gated_hidden_dim(dim), act)
    return Spec(vocab, dim, n_layers, pattern=(Layer(attn, mlp),), context=context, norm=Norm(eps=norm_eps), tied=tied)


# The 48 divisors are placeholders (all 1): two tables were published for Phi-3-mini-128k, in April and in June 2024,
# and which one a model has stands in its config.json. They change no count and no cost.
ONES = (1.0,) * 48
LONG = LongRope(ONES, ONES, 4096, attention_factor=longrope_attention_factor(131072 / 4096, 4096))


def _phi(title: str, dim: int, n_layers: int) -> Row:  # both models rotate 32 dimensions
    return row(title, "phi", vocab=51200, dim=dim, n_layers=n_layers, n_heads=32, context=2048, rope=Rope(dim=32))


def _mini(title: str, **rest: Any) -> Row:
    return row(title, "phi3", dim=3072, n_layers=32, hidden_dim=8192, **rest)


def _medium(title: str, **rest: Any) -> Row:
    return row(title, "phi3", dim=5120, n_layers=40, n_heads=40, n_kv_heads=10, hidden_dim=17920, **rest)


SIZES: dict[str, Row] = {
    "phi-1.5": _phi("Phi-1.5", 2048, 24),
    "phi-2": _phi("Phi-2", 2560, 32),
    "phi-3-mini-4k": _mini("Phi-3-mini-4k", n_heads=32, vocab=32064, context=4096, window=2047),
    "phi-3-mini-128k": _mini(
        "Phi-3-mini-128k", n_heads=32, vocab=32064, context=131072, window=262144, rope=Rope(scaling=LONG)
    ),
    "phi-3-medium-4k": _medium("Phi-3-medium-4k", vocab=32064, context=4096, window=2047),
    "phi-4": _medium("Phi-4 (14B)", vocab=100352, context=16384, rope=Rope(250_000.0)),
    "phi-4-mini": _mini(
        "Phi-4-mini (3.8B)",
        n_heads=24,
        n_kv_heads=8,
        vocab=200064,
        context=131072,
        window=262144,
        rope=Rope(dim=96, scaling=LONG),
        tied=True,
    ),
}
