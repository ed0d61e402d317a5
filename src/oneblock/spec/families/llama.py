"""Llama 1 to 3.3 (and SmolLM2), SmolLM3, Llama 4 and the text side of Llama 3.2 Vision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from oneblock.spec.build import (
    BASE_2M,
    BASE_10K,
    BASE_500K,
    INTERLEAVED_500K,
    Row,
    fold,
    gated_hidden_dim,
    heads,
    row,
    spread,
)
from oneblock.spec.parts import Attention, Layer, Llama3Scaling, Mlp, Moe, Norm, Rope, Spec


def llama(
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
    attention_bias: bool = False,
    mlp_bias: bool = False,
    tied: bool = False,
) -> Spec:
    """arXiv:2302.13971: RMSNorm, rotary positions, SwiGLU, no biases; grouped-query attention since Llama 2 70B."""
    attn = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), rope, bias=(attention_bias, attention_bias))
    mlp = Mlp(hidden_dim or gated_hidden_dim(dim), act, bias=mlp_bias)
    return Spec(vocab, dim, n_layers, pattern=(Layer(attn, mlp),), context=context, norm=Norm(eps=norm_eps), tied=tied)


def smollm3(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 4,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-6,
    act: str = "silu",
    rope: Rope = BASE_2M,
    rope_layers: tuple[bool, ...] = (True, True, True, False),
    window: int | None = None,
    sliding: tuple[bool, ...] = (False, False, False, True),
    attention_bias: bool = False,
    mlp_bias: bool = False,
    tied: bool = True,
) -> Spec:
    """Llama with no rotation in every fourth layer (arXiv:2501.18795)."""
    full = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), bias=(attention_bias, attention_bias))
    mlp = Mlp(hidden_dim or gated_hidden_dim(dim), act, bias=mlp_bias)
    kinds = zip(spread(rope_layers, n_layers), spread(sliding, n_layers), strict=True)
    attns = [replace(full, rope=rope if turns else None, window=window if slides else None) for turns, slides in kinds]
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=fold(Layer(attn, mlp) for attn in attns),
        context=context,
        norm=Norm(eps=norm_eps),
        tied=tied,
    )


def llama4(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 4,
    n_heads: int = 4,
    n_kv_heads: int | None = 2,
    head_dim: int | None = None,
    hidden_dim: int = 64,  # of one expert, and of the shared one
    dense_hidden_dim: int = 128,  # of the MLP of layers without experts
    n_experts: int = 4,
    top_k: int = 1,
    context: int = 256,
    norm_eps: float = 1e-5,
    act: str = "silu",
    rope: Rope = INTERLEAVED_500K,
    rope_layers: tuple[bool, ...] = (True, True, True, False),
    chunk: int | None = 64,
    chunked: tuple[bool, ...] | None = None,  # None: the layers with rotation
    sparse: tuple[bool, ...] = (True,),  # the layers with experts
    qk_norm: bool = True,  # on layers with rotation only
    temperature_tuning: tuple[float, float] | None = (8192.0, 0.1),  # on layers without rotation only
    attention_bias: bool = False,
    tied: bool = False,
) -> Spec:
    """The text side of Llama 4: chunked rotary layers, full layers without positions, one expert of many per token."""
    plain = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), bias=(attention_bias, attention_bias))
    turning = replace(plain, rope=rope, qk_norm="l2" if qk_norm else None)
    still = replace(plain, temperature_tuning=temperature_tuning)
    expert = Mlp(hidden_dim, act)
    experts = Moe(n_experts, top_k, expert, "sigmoid", renormalize=False, scale_expert_input=True, shared=expert)
    dense = Mlp(dense_hidden_dim, act)
    kinds = zip(*(spread(k, n_layers) for k in (rope_layers, chunked or rope_layers, sparse)), strict=True)
    layers = [
        Layer(replace(turning if turns else still, chunk=chunk if cut else None), experts if many else dense)
        for turns, cut, many in kinds
    ]
    return Spec(vocab, dim, n_layers, pattern=fold(layers), context=context, norm=Norm(eps=norm_eps), tied=tied)


def mllama(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 5,
    n_heads: int = 4,
    n_kv_heads: int | None = 2,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-5,
    act: str = "silu",
    rope: Rope = BASE_500K,
    cross: tuple[bool, ...] = (False, False, False, True, False),
    embed_extra: int = 8,
    tied: bool = False,
) -> Spec:
    """The text side of Llama 3.2 Vision (arXiv:2407.21783, section 7): gated cross-attention layers among Llama's."""
    own = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), rope)
    image = replace(own, rope=None, qk_norm="head", cross=True)
    mlp = Mlp(hidden_dim or gated_hidden_dim(dim), act)
    crosses = spread(cross, n_layers)
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=fold(Layer(image, mlp, gated=True) if crossing else Layer(own, mlp) for crossing in crosses),
        context=context,
        norm=Norm(eps=norm_eps),
        embed_extra=embed_extra,
        tied=tied,
    )


LONG = Rope(500_000.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))  # Llama 3.1, 3.3 and 3.2 Vision
SMALL = Rope(500_000.0, scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192))  # Llama 3.2 1B and 3B
SCOUT = Rope(500_000.0, interleaved=True, scaling=Llama3Scaling(16.0, 1.0, 1.0, 8192))


def _llama(title: str, dim: int, n_layers: int, n_heads: int, hidden_dim: int, **rest: Any) -> Row:
    return row(title, "llama", dim=dim, n_layers=n_layers, n_heads=n_heads, hidden_dim=hidden_dim, **rest)


def _llama1(title: str, dim: int, n_layers: int, n_heads: int, hidden_dim: int) -> Row:
    return _llama(title, dim, n_layers, n_heads, hidden_dim, vocab=32000, context=2048, norm_eps=1e-6)


def _llama2(title: str, dim: int, n_layers: int, n_heads: int, hidden_dim: int, n_kv_heads: int | None = None) -> Row:
    return _llama(title, dim, n_layers, n_heads, hidden_dim, n_kv_heads=n_kv_heads, vocab=32000, context=4096)


def _llama3(title: str, dim: int, n_layers: int, n_heads: int, hidden_dim: int, **rest: Any) -> Row:
    return _llama(title, dim, n_layers, n_heads, hidden_dim, n_kv_heads=8, vocab=128256, **rest)


def _vision(title: str, dim: int, n_layers: int, n_heads: int, hidden_dim: int) -> Row:
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "hidden_dim": hidden_dim}
    return row(title, "mllama", **sizes, n_kv_heads=8, vocab=128256, context=131072, rope=LONG)


def _llama4(title: str, n_experts: int, **rest: Any) -> Row:
    sizes = {"dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "head_dim": 128}
    hidden_dim = {"hidden_dim": 8192, "dense_hidden_dim": 16384, "n_experts": n_experts}
    return row(title, "llama4", vocab=202048, **sizes, **hidden_dim, chunk=8192, **rest)


def _smollm2(title: str, dim: int, n_layers: int, n_heads: int, hidden_dim: int, n_kv_heads: int, theta: float) -> Row:
    rest = {"n_kv_heads": n_kv_heads, "rope": Rope(theta), "vocab": 49152, "context": 8192, "tied": True}
    return _llama(title, dim, n_layers, n_heads, hidden_dim, **rest)


SIZES: dict[str, Row] = {
    "llama-7b": _llama1("LLaMA-7B", 4096, 32, 32, 11008),
    "llama-13b": _llama1("LLaMA-13B", 5120, 40, 40, 13824),
    "llama-33b": _llama1("LLaMA-33B", 6656, 60, 52, 17920),
    "llama-65b": _llama1("LLaMA-65B", 8192, 80, 64, 22016),
    "llama-2-7b": _llama2("Llama-2-7B", 4096, 32, 32, 11008),
    "llama-2-13b": _llama2("Llama-2-13B", 5120, 40, 40, 13824),
    "llama-2-70b": _llama2("Llama-2-70B", 8192, 80, 64, 28672, n_kv_heads=8),
    "llama-3-8b": _llama3("Llama-3-8B", 4096, 32, 32, 14336, context=8192, rope=BASE_500K),
    "llama-3-70b": _llama3("Llama-3-70B", 8192, 80, 64, 28672, context=8192, rope=BASE_500K),
    "llama-3.1-8b": _llama3("Llama-3.1-8B", 4096, 32, 32, 14336, context=131072, rope=LONG),
    "llama-3.1-70b": _llama3("Llama-3.1-70B", 8192, 80, 64, 28672, context=131072, rope=LONG),
    # The first upload held every KV head twice (16); 8 is the paper's and the present one's.
    "llama-3.1-405b": _llama3("Llama-3.1-405B", 16384, 126, 128, 53248, context=131072, rope=LONG),
    "llama-3.2-1b": _llama3("Llama-3.2-1B", 2048, 16, 32, 8192, context=131072, rope=SMALL, tied=True),
    "llama-3.2-3b": _llama3("Llama-3.2-3B", 3072, 28, 24, 8192, context=131072, rope=SMALL, tied=True),
    "llama-3.3-70b": _llama3("Llama-3.3-70B", 8192, 80, 64, 28672, context=131072, rope=LONG),
    "llama-3.2-11b-vision": _vision("Llama-3.2-11B-Vision", 4096, 40, 32, 14336),
    "llama-3.2-11b-vision-instruct": _vision("Llama-3.2-11B-Vision-Instruct", 4096, 40, 32, 14336),
    "llama-3.2-90b-vision-instruct": _vision("Llama-3.2-90B-Vision-Instruct", 8192, 100, 64, 28672),
    "llama-4-scout": _llama4("Llama-4-Scout (17B-16E)", 16, context=10_485_760, rope=SCOUT),
    "llama-4-maverick": _llama4(
        "Llama-4-Maverick (17B-128E)", 128, context=1_048_576, sparse=(False, True), qk_norm=False
    ),
    "smollm2-135m": _smollm2("SmolLM2-135M", 576, 30, 9, 1536, 3, 100_000.0),
    "smollm2-360m": _smollm2("SmolLM2-360M", 960, 32, 15, 2560, 5, 100_000.0),
    "smollm2-1.7b": _smollm2("SmolLM2-1.7B", 2048, 24, 32, 8192, 32, 130_000.0),
    "smollm3-3b": row(
        "SmolLM3-3B",
        "smollm3",
        vocab=128256,
        dim=2048,
        n_layers=36,
        n_heads=16,
        n_kv_heads=4,
        hidden_dim=11008,
        context=65536,
        rope=Rope(5_000_000.0),
    ),
}
