"""Phi-1.5 and 2, Phi-3, Phi-4 and Phi-4-mini."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from oneblock.spec.build import BASE_10K, Sizes, family, longrope_attention_factor, model
from oneblock.spec.parts import Layer, LongRope, Rope, Spec


@family(act="gelu_tanh")
def phi(
    sizes: Sizes,
    rope: Rope | None = None,  # None: half of each head, base 10,000
    qk_norm: bool = False,
) -> Spec:
    """arXiv:2309.05463: attention and MLP in parallel behind one norm, biases everywhere, the LM head's included."""
    attn = sizes.attention(bias=True, qk_norm="head" if qk_norm else None)
    attn = replace(attn, rope=rope or Rope(dim=attn.head_dim // 2))
    return sizes.decoder(Layer(attn, sizes.plain_mlp(), "parallel"), norm=sizes.layer_norm(bias=True), head_bias=True)


@family()
def phi3(sizes: Sizes, rope: Rope = BASE_10K, window: int | None = None) -> Spec:
    """arXiv:2404.14219: Llama with a sliding window and LongRoPE."""
    return sizes.decoder(Layer(sizes.attention(rope, window=window), sizes.gated_mlp()))


# The 48 divisors are placeholders (all 1): two tables were published for Phi-3-mini-128k, in April and in June 2024,
# and a model's own is in its config.json. They change no count and no cost.
ONES = (1.0,) * 48
LONG = LongRope(ONES, ONES, 4096, attention_factor=longrope_attention_factor(131072 / 4096, 4096))

_phi = partial(model, "phi", rope=Rope(dim=32))
_phi3 = partial(model, "phi3")

MODELS = (  # name, title, then vocabulary, dim, layers, heads, KV heads (None: heads), MLP size (None: 4 dim), context
    _phi("phi-1.5", "Phi-1.5", 51200, 2048, 24, 32, None, None, 2048),
    _phi("phi-2", "Phi-2", 51200, 2560, 32, 32, None, None, 2048),
    _phi3("phi-3-mini-4k", "Phi-3-mini-4k", 32064, 3072, 32, 32, None, 8192, 4096, window=2047),
    _phi3(
        "phi-3-mini-128k",
        "Phi-3-mini-128k",
        *(32064, 3072, 32, 32, None, 8192, 131072),
        window=262144,
        rope=Rope(scaling=LONG),
    ),
    _phi3("phi-3-medium-4k", "Phi-3-medium-4k", 32064, 5120, 40, 40, 10, 17920, 4096, window=2047),
    _phi3("phi-4", "Phi-4 (14B)", 100352, 5120, 40, 40, 10, 17920, 16384, rope=Rope(250_000.0)),
    _phi3(
        "phi-4-mini",
        "Phi-4-mini (3.8B)",
        *(200064, 3072, 32, 24, 8, 8192, 131072),
        window=262144,
        rope=Rope(dim=96, scaling=LONG),
        tied=True,
    ),
)
