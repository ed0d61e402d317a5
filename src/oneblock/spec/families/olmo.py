"""OLMo 2."""

from __future__ import annotations

from functools import partial

from oneblock.spec.build import BASE_500K, Sizes, family, model
from oneblock.spec.parts import Layer, Norm, Rope, Spec


@family(norm_eps=1e-6)
def olmo2(sizes: Sizes, rope: Rope = BASE_500K, attention_bias: bool = False) -> Spec:
    """arXiv:2501.00656: norms on the output of each sublayer, and on all heads of q and k at once."""
    layer = Layer(sizes.attention(rope, attention_bias, qk_norm="full"), sizes.gated_mlp(), "output")
    return sizes.decoder(layer, norm=Norm(eps=sizes.norm_eps, scale_in_fp32=True))


_olmo2 = partial(model, "olmo2")

MODELS = (  # name, title, then vocabulary, dim, layers, heads, KV heads (None: heads), MLP size, context
    _olmo2("olmo-2-1b", "OLMo-2-1B", 100352, 2048, 16, 16, None, 8192, 4096),
    _olmo2("olmo-2-7b", "OLMo-2-7B", 100352, 4096, 32, 32, None, 11008, 4096),
    _olmo2("olmo-2-13b", "OLMo-2-13B", 100352, 5120, 40, 40, None, 13824, 4096),
    _olmo2("olmo-2-32b", "OLMo-2-32B", 100352, 5120, 64, 40, 8, 27648, 4096),
)
