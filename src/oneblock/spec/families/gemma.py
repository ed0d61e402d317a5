"""Gemma 1, 2 and 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from oneblock.spec.build import BASE_1M, BASE_10K, Row, fold, gated_hidden_dim, heads, row, spread
from oneblock.spec.parts import Attention, Layer, LinearScaling, Mlp, Norm, Rope, Spec


def _norm(eps: float) -> Norm:
    return Norm("rms", eps, weight_offset=1.0, scale_in_fp32=True)


def _scale(query_scalar: float | None, head_dim: int) -> float | None:
    return None if query_scalar in (None, head_dim) else query_scalar**-0.5


def gemma(
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
    act: str = "gelu_tanh",
    rope: Rope = BASE_10K,
    attention_bias: bool = False,
    tied: bool = True,
) -> Spec:
    """arXiv:2403.08295: Llama with GeGLU, wide heads, gains stored less one and embeddings times sqrt(dim)."""
    attn = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), rope, bias=(attention_bias, attention_bias))
    mlp = Mlp(hidden_dim or gated_hidden_dim(dim), act)
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=(Layer(attn, mlp),),
        context=context,
        norm=_norm(norm_eps),
        embed_scale=dim**0.5,
        tied=tied,
    )


def gemma2(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int | None = 2,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-6,
    act: str = "gelu_tanh",
    rope: Rope = BASE_10K,
    window: int | None = 64,
    sliding: tuple[bool, ...] = (True, False),
    query_scalar: float | None = None,  # scores are divided by its square root; None: head_dim
    softcap: float | None = 50.0,
    logit_softcap: float | None = 30.0,
    attention_bias: bool = False,
    tied: bool = True,
) -> Spec:
    """arXiv:2408.00118: norms on both sides of every branch, soft caps, a window in every second layer."""
    n_heads, n_kv_heads, head_dim = heads(dim, n_heads, n_kv_heads, head_dim)
    full = Attention(n_heads, n_kv_heads, head_dim, rope, bias=(attention_bias, attention_bias))
    full = replace(full, scale=_scale(query_scalar, head_dim), softcap=softcap)
    local = replace(full, window=window)
    mlp = Mlp(hidden_dim or gated_hidden_dim(dim), act)
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=fold(Layer(local if slides else full, mlp, "sandwich") for slides in spread(sliding, n_layers)),
        context=context,
        norm=_norm(norm_eps),
        embed_scale=dim**0.5,
        tied=tied,
        logit_softcap=logit_softcap,
    )


def gemma3(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 6,
    n_heads: int = 4,
    n_kv_heads: int | None = 2,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-6,
    act: str = "gelu_tanh",
    rope: Rope = BASE_1M,  # of the full layers
    rope_local: Rope = BASE_10K,  # of the layers with a window
    window: int | None = 64,
    sliding: tuple[bool, ...] = (True, True, True, True, True, False),
    query_scalar: float | None = None,  # scores are divided by its square root; None: head_dim
    logit_softcap: float | None = None,
    attention_bias: bool = False,
    tied: bool = True,
) -> Spec:
    """arXiv:2503.19786: five windowed layers to a full one, two rotary bases, q and k norms instead of soft caps."""
    n_heads, n_kv_heads, head_dim = heads(dim, n_heads, n_kv_heads, head_dim)
    full = Attention(n_heads, n_kv_heads, head_dim, rope, bias=(attention_bias, attention_bias), qk_norm="head")
    full = replace(full, scale=_scale(query_scalar, head_dim))
    local = replace(full, rope=rope_local, window=window)
    mlp = Mlp(hidden_dim or gated_hidden_dim(dim), act)
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=fold(Layer(local if slides else full, mlp, "sandwich") for slides in spread(sliding, n_layers)),
        context=context,
        norm=_norm(norm_eps),
        embed_scale=dim**0.5,
        tied=tied,
        logit_softcap=logit_softcap,
    )


def _gemma(title: str, dim: int, n_layers: int, n_heads: int, n_kv_heads: int, hidden_dim: int) -> Row:
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": 256}
    return row(title, "gemma", vocab=256000, **sizes, hidden_dim=hidden_dim, context=8192)


def _gemma2(title: str, dim: int, n_layers: int, n_heads: int, hidden_dim: int, **rest: Any) -> Row:
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_heads // 2, "hidden_dim": hidden_dim}
    return row(title, "gemma2", vocab=256000, **sizes, context=8192, window=4096, **{"head_dim": 256, **rest})


def _gemma3(title: str, dim: int, n_layers: int, n_heads: int, n_kv_heads: int, hidden_dim: int, **rest: Any) -> Row:
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "hidden_dim": hidden_dim}
    return row(title, "gemma3", **sizes, **{"head_dim": 256, **rest})


SMALL: dict[str, Any] = {"vocab": 262144, "context": 32768, "window": 512}
LARGE: dict[str, Any] = {  # 262,144 tokens, padded for those of images
    "vocab": 262208,
    "context": 131072,
    "window": 1024,
    "rope": Rope(1_000_000.0, scaling=LinearScaling(8.0)),
}

SIZES: dict[str, Row] = {
    "gemma-2b": _gemma("Gemma-2B", 2048, 18, 8, 1, 16384),
    "gemma-7b": _gemma("Gemma-7B", 3072, 28, 16, 16, 24576),
    "gemma-2-2b": _gemma2("Gemma-2-2B", 2304, 26, 8, 9216),
    "gemma-2-9b": _gemma2("Gemma-2-9B", 3584, 42, 16, 14336),
    "gemma-2-27b": _gemma2("Gemma-2-27B", 4608, 46, 32, 36864, head_dim=128, query_scalar=144),
    "gemma-3-270m": _gemma3("Gemma-3-270M", 640, 18, 4, 1, 2048, **SMALL),
    "gemma-3-1b": _gemma3("Gemma-3-1B", 1152, 26, 4, 1, 6912, **SMALL),
    "gemma-3-4b": _gemma3("Gemma-3-4B (text)", 2560, 34, 8, 4, 10240, **LARGE),
    "gemma-3-12b": _gemma3("Gemma-3-12B (text)", 3840, 48, 16, 8, 15360, **LARGE),
    "gemma-3-27b": _gemma3("Gemma-3-27B (text)", 5376, 62, 32, 16, 21504, head_dim=128, query_scalar=168, **LARGE),
}
