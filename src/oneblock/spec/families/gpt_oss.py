"""gpt-oss."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from oneblock.spec.build import Sizes, family, model, yarn_attention_factor
from oneblock.spec.parts import Layer, Moe, Norm, Rope, Spec, Yarn

YARN = Rope(150_000.0, scaling=Yarn(32.0, 4096, truncate=False, attention_factor=yarn_attention_factor(32.0)))


@family(n_kv_heads=2, hidden_dim=64, act="quick_gelu")
def gpt_oss(
    sizes: Sizes,  # hidden_dim: of one expert
    n_experts: int = 4,
    top_k: int = 2,
    clamp: float | None = 7.0,
    rope: Rope = YARN,
    window: int | None = 64,
    sliding: tuple[bool, ...] = (True, False),
    attention_bias: bool = True,
) -> Spec:
    """arXiv:2508.10925: attention sinks, alternating sliding windows, experts with biases and a clamped SwiGLU."""
    full = sizes.attention(rope, attention_bias, sinks=True)
    local = replace(full, window=window)
    moe = Moe(n_experts, top_k, sizes.gated_mlp(bias=True, clamp=clamp, up_offset=1.0), router_bias=True)
    layers = (Layer(local if slides else full, moe) for slides in sliding)
    return sizes.decoder(*layers, norm=Norm(eps=sizes.norm_eps, scale_in_fp32=True))


_gpt_oss = partial(model, "gpt_oss", head_dim=64, top_k=4, window=128)

MODELS = (  # name, title, then vocabulary, dim, layers, heads, KV heads, expert size, context
    _gpt_oss("gpt-oss-20b", "gpt-oss-20b", 201088, 2880, 24, 64, 8, 2880, 131072, n_experts=32),
    _gpt_oss("gpt-oss-120b", "gpt-oss-120b", 201088, 2880, 36, 64, 8, 2880, 131072, n_experts=128),
)
