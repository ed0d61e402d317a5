"""StableLM."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from oneblock.spec.build import Sizes, family, model
from oneblock.spec.parts import Layer, Rope, Spec


@family()
def stablelm(
    sizes: Sizes,
    rope: Rope | None = None,  # None: a quarter of each head, base 10,000
    qkv_bias: bool = False,
    parallel: bool = False,
) -> Spec:
    """arXiv:2402.17834: Llama with LayerNorm and RoPE on a quarter of each head."""
    attn = sizes.attention(bias=(qkv_bias, False))
    attn = replace(attn, rope=rope or Rope(dim=attn.head_dim // 4))
    layer = Layer(attn, sizes.gated_mlp(), "parallel" if parallel else "pre")
    return sizes.decoder(layer, norm=sizes.layer_norm(bias=True))


_stablelm = partial(model, "stablelm")

MODELS = (  # name, title, then vocabulary, dim, layers, heads, KV heads (None: heads), MLP size, context
    _stablelm("stablelm-3b", "StableLM-3B-4E1T", 50304, 2560, 32, 32, None, 6912, 4096),
    _stablelm("stablelm-2-1.6b", "StableLM-2-1.6B", 100352, 2048, 24, 32, None, 5632, 4096, qkv_bias=True),
)
