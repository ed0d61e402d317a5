"""Qwen2 and 2.5, Qwen3, and their mixtures of experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from oneblock.spec.build import BASE_1M, Sizes, family, model, repeat_to_depth
from oneblock.spec.parts import Layer, Mlp, Moe, Rope, Spec


@family(n_kv_heads=2, norm_eps=1e-6)
def qwen2(sizes: Sizes, rope: Rope = BASE_1M, window: int | None = None, sliding: tuple[bool, ...] = (True,)) -> Spec:
    """arXiv:2407.10671: Llama with biases on q, k and v."""
    full, mlp = sizes.attention(rope, (True, False)), sizes.gated_mlp()
    local = replace(full, window=window)
    return sizes.decoder(*(Layer(local if slides else full, mlp) for slides in sliding))


@family(norm_eps=1e-6)
def qwen2_moe(
    sizes: Sizes,  # hidden_dim: of the MLP of layers without experts
    expert_hidden_dim: int = 32,
    shared_hidden_dim: int = 64,
    n_experts: int = 4,
    top_k: int = 2,
    rope: Rope = BASE_1M,
    window: int | None = None,
    sliding: tuple[bool, ...] = (True, False),
    sparse: tuple[bool, ...] = (True,),  # the layers with experts
    renormalize: bool = False,
    qkv_bias: bool = True,
) -> Spec:
    """Qwen1.5-MoE: many small experts, and a shared expert behind a sigmoid gate."""
    full, dense = sizes.attention(rope, (qkv_bias, False)), sizes.gated_mlp()
    local = replace(full, window=window)
    expert, shared = Mlp(expert_hidden_dim, sizes.act), Mlp(shared_hidden_dim, sizes.act)
    moe = Moe(n_experts, top_k, expert, renormalize=renormalize, shared=shared, shared_gate=True)
    kinds = zip(*(repeat_to_depth(x, sizes.n_layers) for x in (sliding, sparse)), strict=True)
    return sizes.decoder(*(Layer(local if slides else full, moe if routed else dense) for slides, routed in kinds))


@family(n_kv_heads=2, norm_eps=1e-6)
def qwen3(
    sizes: Sizes,
    rope: Rope = BASE_1M,
    window: int | None = None,
    sliding: tuple[bool, ...] = (True,),
    attention_bias: bool = False,
) -> Spec:
    """arXiv:2505.09388: QK-norm per head instead of Qwen2's biases."""
    full, mlp = sizes.attention(rope, attention_bias, qk_norm="head"), sizes.gated_mlp()
    local = replace(full, window=window)
    return sizes.decoder(*(Layer(local if slides else full, mlp) for slides in sliding))


@family(n_kv_heads=2, norm_eps=1e-6)
def qwen3_moe(
    sizes: Sizes,  # hidden_dim: of the MLP of layers without experts
    expert_hidden_dim: int = 32,
    n_experts: int = 4,
    top_k: int = 2,
    rope: Rope = BASE_1M,
    window: int | None = None,
    sparse: tuple[bool, ...] = (True,),  # the layers with experts
    renormalize: bool = True,
    attention_bias: bool = False,
) -> Spec:
    """Qwen3 with 8 of 128 experts per token and no shared one."""
    attn = sizes.attention(rope, attention_bias, window=window, qk_norm="head")
    moe = Moe(n_experts, top_k, Mlp(expert_hidden_dim, sizes.act), renormalize=renormalize)
    dense = sizes.gated_mlp()
    return sizes.decoder(*(Layer(attn, moe if routed else dense) for routed in sparse))


_qwen2 = partial(model, "qwen2")
_qwen3 = partial(model, "qwen3", head_dim=128)
_qwen3_moe = partial(model, "qwen3_moe", head_dim=128, n_experts=128, top_k=8)

MODELS = (  # name, title, then vocabulary, dim, layers, heads, KV heads, MLP size, context
    _qwen2("qwen2.5-0.5b", "Qwen2.5-0.5B", 151936, 896, 24, 14, 2, 4864, 32768, tied=True),
    _qwen2("qwen2.5-1.5b", "Qwen2.5-1.5B", 151936, 1536, 28, 12, 2, 8960, 131072, tied=True),
    _qwen2("qwen2.5-3b", "Qwen2.5-3B", 151936, 2048, 36, 16, 2, 11008, 32768, tied=True),
    _qwen2("qwen2.5-7b", "Qwen2.5-7B", 152064, 3584, 28, 28, 4, 18944, 131072),
    _qwen2("qwen2.5-14b", "Qwen2.5-14B", 152064, 5120, 48, 40, 8, 13824, 131072, norm_eps=1e-5),
    _qwen2("qwen2.5-32b", "Qwen2.5-32B", 152064, 5120, 64, 40, 8, 27648, 131072, norm_eps=1e-5),
    _qwen2("qwen2.5-72b", "Qwen2.5-72B", 152064, 8192, 80, 64, 8, 29568, 131072, norm_eps=1e-5),
    model(
        "qwen2_moe",
        "qwen1.5-moe-a2.7b",
        "Qwen1.5-MoE-A2.7B",
        *(151936, 2048, 24, 16, None, 5632, 32768),
        expert_hidden_dim=1408,
        shared_hidden_dim=5632,
        n_experts=60,
        top_k=4,
    ),
    _qwen3("qwen3-0.6b", "Qwen3-0.6B", 151936, 1024, 28, 16, 8, 3072, 40960, tied=True),
    _qwen3("qwen3-1.7b", "Qwen3-1.7B", 151936, 2048, 28, 16, 8, 6144, 40960, tied=True),
    _qwen3("qwen3-4b", "Qwen3-4B", 151936, 2560, 36, 32, 8, 9728, 40960, tied=True),
    _qwen3("qwen3-8b", "Qwen3-8B", 151936, 4096, 36, 32, 8, 12288, 40960),
    _qwen3("qwen3-14b", "Qwen3-14B", 151936, 5120, 40, 40, 8, 17408, 40960),
    _qwen3("qwen3-32b", "Qwen3-32B", 151936, 5120, 64, 64, 8, 25600, 40960),
    _qwen3_moe("qwen3-30b-a3b", "Qwen3-30B-A3B", 151936, 2048, 48, 32, 4, 6144, 40960, expert_hidden_dim=768),
    _qwen3_moe("qwen3-235b-a22b", "Qwen3-235B-A22B", 151936, 4096, 94, 64, 4, 12288, 40960, expert_hidden_dim=1536),
)
