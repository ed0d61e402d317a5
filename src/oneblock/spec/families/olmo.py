"""OLMo 2."""

from __future__ import annotations

from oneblock.spec.build import BASE_500K, Row, gated_hidden_dim, heads, row
from oneblock.spec.parts import Attention, Layer, Mlp, Norm, Rope, Spec


def olmo2(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-6,
    act: str = "silu",
    rope: Rope = BASE_500K,
    attention_bias: bool = False,
    tied: bool = False,
) -> Spec:
    """arXiv:2501.00656: norms on what comes out of each branch, and on the whole of q and k."""
    bias = (attention_bias, attention_bias)
    attn = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), rope, bias=bias, qk_norm="full")
    mlp = Mlp(hidden_dim or gated_hidden_dim(dim), act)
    norm = Norm(eps=norm_eps, scale_in_fp32=True)
    return Spec(vocab, dim, n_layers, pattern=(Layer(attn, mlp, "output"),), context=context, norm=norm, tied=tied)


def _olmo2(title: str, dim: int, n_layers: int, n_heads: int, hidden_dim: int, n_kv_heads: int | None = None) -> Row:
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "hidden_dim": hidden_dim}
    return row(title, "olmo2", vocab=100352, **sizes, context=4096)


SIZES: dict[str, Row] = {
    "olmo-2-1b": _olmo2("OLMo-2-1B", 2048, 16, 16, 8192),
    "olmo-2-7b": _olmo2("OLMo-2-7B", 4096, 32, 32, 11008),
    "olmo-2-13b": _olmo2("OLMo-2-13B", 5120, 40, 40, 13824),
    "olmo-2-32b": _olmo2("OLMo-2-32B", 5120, 64, 40, 27648, n_kv_heads=8),
}
