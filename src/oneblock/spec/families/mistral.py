"""Mistral and Mixtral."""

from __future__ import annotations

from functools import partial

from oneblock.spec.build import BASE_1M, BASE_10K, Sizes, family, model
from oneblock.spec.parts import Layer, Moe, Rope, Spec


@family(n_kv_heads=2)
def mistral(sizes: Sizes, rope: Rope = BASE_10K, window: int | None = None) -> Spec:
    """arXiv:2310.06825: Llama with grouped-query attention and a sliding window in every layer."""
    return sizes.decoder(Layer(sizes.attention(rope, window=window), sizes.gated_mlp()))


@family(n_kv_heads=2, hidden_dim=64)
def mixtral(sizes: Sizes, n_experts: int = 4, top_k: int = 2, rope: Rope = BASE_1M, window: int | None = None) -> Spec:
    """arXiv:2401.04088: Mistral with two of eight experts per token."""
    return sizes.decoder(Layer(sizes.attention(rope, window=window), Moe(n_experts, top_k, sizes.gated_mlp())))


_mistral, _mixtral = partial(model, "mistral"), partial(model, "mixtral", n_experts=8)

MODELS = (  # name, title, then vocabulary, dim, layers, heads, KV heads, MLP or expert size, context
    _mistral("mistral-7b-v0.1", "Mistral-7B-v0.1", 32000, 4096, 32, 32, 8, 14336, 32768, window=4096),
    _mistral("mistral-7b-v0.3", "Mistral-7B-v0.3", 32768, 4096, 32, 32, 8, 14336, 32768, rope=BASE_1M),
    _mixtral("mixtral-8x7b", "Mixtral-8x7B", 32000, 4096, 32, 32, 8, 14336, 32768),
    _mixtral("mixtral-8x22b", "Mixtral-8x22B", 32768, 6144, 56, 48, 8, 16384, 65536),
)
