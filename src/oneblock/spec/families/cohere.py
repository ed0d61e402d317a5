"""Cohere's Command R7B and its relatives."""

from __future__ import annotations

from dataclasses import replace

from oneblock.spec.build import INTERLEAVED_10K, Model, Sizes, family
from oneblock.spec.parts import Layer, Rope, Spec


@family(n_layers=4, n_kv_heads=2, tied=True)
def cohere2(
    sizes: Sizes,
    rope: Rope = INTERLEAVED_10K,
    window: int | None = 64,
    sliding: tuple[bool, ...] = (True, True, True, False),
    attention_bias: bool = False,
    logit_scale: float = 0.0625,
) -> Spec:
    """arXiv:2504.00698: attention and MLP in parallel behind one LayerNorm; RoPE in sliding-window layers only."""
    full, mlp = sizes.attention(bias=attention_bias), sizes.gated_mlp()
    # A layer has RoPE because it has a window: without a window, none has.
    local = full if window is None else replace(full, rope=rope, window=window)
    layers = (Layer(local if slides else full, mlp, "parallel") for slides in sliding)
    return sizes.decoder(*layers, norm=sizes.layer_norm(), logit_scale=logit_scale)


MODELS: tuple[Model, ...] = ()
