"""Qwen2 and 2.5, Qwen3, and their mixtures of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from oneblock.spec.build import BASE_1M, Row, fold, gated_hidden_dim, heads, row, spread
from oneblock.spec.parts import Attention, Layer, Mlp, Moe, Norm, Rope, Spec


def qwen2(
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
    act: str = "silu",
    rope: Rope = BASE_1M,
    window: int | None = None,
    sliding: tuple[bool, ...] = (True,),  # the layers that have the window
    tied: bool = False,
) -> Spec:
    """arXiv:2407.10671: Llama with biases on q, k and v."""
    full = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), rope, bias=(True, False))
    local = replace(full, window=window)
    mlp = Mlp(hidden_dim or gated_hidden_dim(dim), act)
    pattern = fold(Layer(local if slides else full, mlp) for slides in spread(sliding, n_layers))
    return Spec(vocab, dim, n_layers, pattern=pattern, context=context, norm=Norm(eps=norm_eps), tied=tied)


def qwen2_moe(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden_dim: int | None = None,  # of the MLP of layers without experts
    expert_hidden_dim: int = 32,
    shared_hidden_dim: int = 64,
    n_experts: int = 4,
    top_k: int = 2,
    context: int = 256,
    norm_eps: float = 1e-6,
    act: str = "silu",
    rope: Rope = BASE_1M,
    window: int | None = None,
    sliding: tuple[bool, ...] = (True, False),
    sparse: tuple[bool, ...] = (True,),  # the layers with experts
    renormalize: bool = False,
    qkv_bias: bool = True,
    tied: bool = False,
) -> Spec:
    """Qwen1.5-MoE: many small experts, and a shared one behind a sigmoid gate."""
    full = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), rope, bias=(qkv_bias, False))
    local = replace(full, window=window)
    shared = Mlp(shared_hidden_dim, act)
    moe = Moe(n_experts, top_k, Mlp(expert_hidden_dim, act), renormalize=renormalize, shared=shared, shared_gate=True)
    dense = Mlp(hidden_dim or gated_hidden_dim(dim), act)
    kinds = zip(spread(sliding, n_layers), spread(sparse, n_layers), strict=True)
    pattern = fold(Layer(local if slides else full, moe if many else dense) for slides, many in kinds)
    return Spec(vocab, dim, n_layers, pattern=pattern, context=context, norm=Norm(eps=norm_eps), tied=tied)


def qwen3(
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
    act: str = "silu",
    rope: Rope = BASE_1M,
    window: int | None = None,
    sliding: tuple[bool, ...] = (True,),
    attention_bias: bool = False,
    tied: bool = False,
) -> Spec:
    """arXiv:2505.09388: queries and keys normalised per head instead of Qwen2's biases."""
    bias = (attention_bias, attention_bias)
    full = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), rope, bias=bias, qk_norm="head")
    local = replace(full, window=window)
    mlp = Mlp(hidden_dim or gated_hidden_dim(dim), act)
    pattern = fold(Layer(local if slides else full, mlp) for slides in spread(sliding, n_layers))
    return Spec(vocab, dim, n_layers, pattern=pattern, context=context, norm=Norm(eps=norm_eps), tied=tied)


def qwen3_moe(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int | None = 2,
    head_dim: int | None = None,
    hidden_dim: int | None = None,  # of the MLP of layers without experts
    expert_hidden_dim: int = 32,
    n_experts: int = 4,
    top_k: int = 2,
    context: int = 256,
    norm_eps: float = 1e-6,
    act: str = "silu",
    rope: Rope = BASE_1M,
    window: int | None = None,
    sparse: tuple[bool, ...] = (True,),
    renormalize: bool = True,
    attention_bias: bool = False,
    tied: bool = False,
) -> Spec:
    """Qwen3 with 8 of 128 experts per token and none shared."""
    bias = (attention_bias, attention_bias)
    attn = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), rope, window, bias=bias, qk_norm="head")
    moe = Moe(n_experts, top_k, Mlp(expert_hidden_dim, act), renormalize=renormalize)
    dense = Mlp(hidden_dim or gated_hidden_dim(dim), act)
    pattern = fold(Layer(attn, moe if many else dense) for many in spread(sparse, n_layers))
    return Spec(vocab, dim, n_layers, pattern=pattern, context=context, norm=Norm(eps=norm_eps), tied=tied)


def _qwen2(title: str, dim: int, n_layers: int, n_heads: int, n_kv_heads: int, hidden_dim: int, **rest: Any) -> Row:
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "hidden_dim": hidden_dim}
    return row(title, "qwen2", **sizes, **{"vocab": 151936, "context": 131072, **rest})


def _qwen3(title: str, dim: int, n_layers: int, n_heads: int, hidden_dim: int, tied: bool) -> Row:
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": 8, "head_dim": 128}
    return row(title, "qwen3", vocab=151936, **sizes, hidden_dim=hidden_dim, context=40960, tied=tied)


def _qwen3_moe(title: str, dim: int, n_layers: int, n_heads: int, hidden_dim: int, expert_hidden_dim: int) -> Row:
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": 4, "head_dim": 128}
    hiddens = {"hidden_dim": hidden_dim, "expert_hidden_dim": expert_hidden_dim, "n_experts": 128, "top_k": 8}
    return row(title, "qwen3_moe", vocab=151936, **sizes, **hiddens, context=40960)


SIZES: dict[str, Row] = {
    "qwen2.5-0.5b": _qwen2("Qwen2.5-0.5B", 896, 24, 14, 2, 4864, context=32768, tied=True),
    "qwen2.5-1.5b": _qwen2("Qwen2.5-1.5B", 1536, 28, 12, 2, 8960, tied=True),
    "qwen2.5-3b": _qwen2("Qwen2.5-3B", 2048, 36, 16, 2, 11008, context=32768, tied=True),
    "qwen2.5-7b": _qwen2("Qwen2.5-7B", 3584, 28, 28, 4, 18944, vocab=152064),
    "qwen2.5-14b": _qwen2("Qwen2.5-14B", 5120, 48, 40, 8, 13824, vocab=152064, norm_eps=1e-5),
    "qwen2.5-32b": _qwen2("Qwen2.5-32B", 5120, 64, 40, 8, 27648, vocab=152064, norm_eps=1e-5),
    "qwen2.5-72b": _qwen2("Qwen2.5-72B", 8192, 80, 64, 8, 29568, vocab=152064, norm_eps=1e-5),
    "qwen1.5-moe-a2.7b": row(
        "Qwen1.5-MoE-A2.7B",
        "qwen2_moe",
        vocab=151936,
        dim=2048,
        n_layers=24,
        n_heads=16,
        hidden_dim=5632,
        expert_hidden_dim=1408,
        shared_hidden_dim=5632,
        n_experts=60,
        top_k=4,
        context=32768,
    ),
    "qwen3-0.6b": _qwen3("Qwen3-0.6B", 1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3("Qwen3-1.7B", 2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3("Qwen3-4B", 2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3("Qwen3-8B", 4096, 36, 32, 12288, tied=False),
    "qwen3-14b": _qwen3("Qwen3-14B", 5120, 40, 40, 17408, tied=False),
    "qwen3-32b": _qwen3("Qwen3-32B", 5120, 64, 64, 25600, tied=False),
    "qwen3-30b-a3b": _qwen3_moe("Qwen3-30B-A3B", 2048, 48, 32, 6144, 768),
    "qwen3-235b-a22b": _qwen3_moe("Qwen3-235B-A22B", 4096, 94, 64, 12288, 1536),
}
