"""Gemma 1, 2 and 3."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from oneblock.spec.build import BASE_1M, BASE_10K, Sizes, family, model
from oneblock.spec.parts import Attention, Layer, LinearScaling, Norm, Rope, Spec


def _decoder(sizes: Sizes, *layers: Layer, **more: Any) -> Spec:
    norm = Norm("rms", sizes.norm_eps, weight_offset=1.0, scale_in_fp32=True)
    return sizes.decoder(*layers, norm=norm, embed_scale=sizes.dim**0.5, **more)


def _scaled(attn: Attention, query_scalar: float | None) -> Attention:
    return attn if query_scalar in (None, attn.head_dim) else replace(attn, scale=query_scalar**-0.5)


@family(norm_eps=1e-6, act="gelu_tanh", tied=True)
def gemma(sizes: Sizes, rope: Rope = BASE_10K, attention_bias: bool = False) -> Spec:
    """arXiv:2403.08295: Llama with GeGLU, wide heads, norm weights stored less one, embeddings times sqrt(dim)."""
    return _decoder(sizes, Layer(sizes.attention(rope, attention_bias), sizes.gated_mlp()))


@family(n_kv_heads=2, norm_eps=1e-6, act="gelu_tanh", tied=True)
def gemma2(
    sizes: Sizes,
    rope: Rope = BASE_10K,
    window: int | None = 64,
    sliding: tuple[bool, ...] = (True, False),
    query_scalar: float | None = None,  # scores are divided by its square root; None: head_dim
    softcap: float | None = 50.0,
    logit_softcap: float | None = 30.0,
    attention_bias: bool = False,
) -> Spec:
    """arXiv:2408.00118: norms on both sides of each sublayer, soft caps, alternating sliding windows."""
    full = _scaled(sizes.attention(rope, attention_bias, softcap=softcap), query_scalar)
    local, mlp = replace(full, window=window), sizes.gated_mlp()
    layers = (Layer(local if slides else full, mlp, "sandwich") for slides in sliding)
    return _decoder(sizes, *layers, logit_softcap=logit_softcap)


@family(n_layers=6, n_kv_heads=2, norm_eps=1e-6, act="gelu_tanh", tied=True)
def gemma3(
    sizes: Sizes,
    rope: Rope = BASE_1M,  # of the full layers
    rope_local: Rope = BASE_10K,  # of the sliding-window layers
    window: int | None = 64,
    sliding: tuple[bool, ...] = (True, True, True, True, True, False),
    query_scalar: float | None = None,  # scores are divided by its square root; None: head_dim
    logit_softcap: float | None = None,
    attention_bias: bool = False,
) -> Spec:
    """arXiv:2503.19786: five sliding-window layers per full one, two RoPE bases, QK-norm instead of soft caps."""
    full = _scaled(sizes.attention(rope, attention_bias, qk_norm="head"), query_scalar)
    local, mlp = replace(full, rope=rope_local, window=window), sizes.gated_mlp()
    layers = (Layer(local if slides else full, mlp, "sandwich") for slides in sliding)
    return _decoder(sizes, *layers, logit_softcap=logit_softcap)


_gemma = partial(model, "gemma", head_dim=256)
_gemma2 = partial(model, "gemma2", window=4096)
_small = partial(model, "gemma3", head_dim=256, window=512)
_large = partial(model, "gemma3", window=1024, rope=Rope(1_000_000.0, scaling=LinearScaling(8.0)))

MODELS = (  # name, title, then vocabulary, dim, layers, heads, KV heads, MLP size, context
    _gemma("gemma-2b", "Gemma-2B", 256000, 2048, 18, 8, 1, 16384, 8192),
    _gemma("gemma-7b", "Gemma-7B", 256000, 3072, 28, 16, 16, 24576, 8192),
    _gemma2("gemma-2-2b", "Gemma-2-2B", 256000, 2304, 26, 8, 4, 9216, 8192, head_dim=256),
    _gemma2("gemma-2-9b", "Gemma-2-9B", 256000, 3584, 42, 16, 8, 14336, 8192, head_dim=256),
    _gemma2("gemma-2-27b", "Gemma-2-27B", 256000, 4608, 46, 32, 16, 36864, 8192, head_dim=128, query_scalar=144),
    _small("gemma-3-270m", "Gemma-3-270M", 262144, 640, 18, 4, 1, 2048, 32768),
    _small("gemma-3-1b", "Gemma-3-1B", 262144, 1152, 26, 4, 1, 6912, 32768),
    # 262,144 tokens, padded for image tokens
    _large("gemma-3-4b", "Gemma-3-4B (text)", 262208, 2560, 34, 8, 4, 10240, 131072, head_dim=256),
    _large("gemma-3-12b", "Gemma-3-12B (text)", 262208, 3840, 48, 16, 8, 15360, 131072, head_dim=256),
    _large(
        "gemma-3-27b", "Gemma-3-27B (text)", 262208, 5376, 62, 32, 16, 21504, 131072, head_dim=128, query_scalar=168
    ),
)
