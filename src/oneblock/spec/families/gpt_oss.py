"""gpt-oss."""

from __future__ import annotations

from dataclasses import replace

from oneblock.spec.build import Row, fold, heads, row, spread, yarn_attention_factor
from oneblock.spec.parts import Attention, Layer, Mlp, Moe, Norm, Rope, Spec, Yarn

YARN = Rope(150_000.0, scaling=Yarn(32.0, 4096, truncate=False, attention_factor=yarn_attention_factor(32.0)))


def gpt_oss(
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
    act: str = "quick_gelu",
    clamp: float | None = 7.0,
    rope: Rope = YARN,
    window: int | None = 64,
    sliding: tuple[bool, ...] = (True, False),
    attention_bias: bool = True,
    tied: bool = False,
) -> Spec:
    """arXiv:2508.10925: attention sinks, a window in every second layer, experts with biases and a clamped SwiGLU."""
    bias = (attention_bias, attention_bias)
    full = Attention(*heads(dim, n_heads, n_kv_heads, head_dim), rope, bias=bias, sinks=True)
    local = replace(full, window=window)
    moe = Moe(n_experts, top_k, Mlp(hidden_dim, act, bias=True, clamp=clamp, up_offset=1.0), router_bias=True)
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=fold(Layer(local if slides else full, moe) for slides in spread(sliding, n_layers)),
        context=context,
        norm=Norm(eps=norm_eps, scale_in_fp32=True),
        tied=tied,
    )


def _gpt_oss(title: str, n_layers: int, n_experts: int) -> Row:
    sizes = {"dim": 2880, "n_layers": n_layers, "n_heads": 64, "n_kv_heads": 8, "head_dim": 64, "hidden_dim": 2880}
    rest = {"n_experts": n_experts, "top_k": 4, "context": 131072, "window": 128}
    return row(title, "gpt_oss", vocab=201088, **sizes, **rest)


SIZES: dict[str, Row] = {
    "gpt-oss-20b": _gpt_oss("gpt-oss-20b", 24, 32),
    "gpt-oss-120b": _gpt_oss("gpt-oss-120b", 36, 128),
}
