"""OLMo 2 and 3."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from oneblock.spec.build import BASE_500K, Sizes, family, model, yarn_attention_factor
from oneblock.spec.parts import Layer, Norm, Rope, Spec, Yarn


@family(norm_eps=1e-6)
def olmo2(sizes: Sizes, rope: Rope = BASE_500K, attention_bias: bool = False) -> Spec:
    """arXiv:2501.00656: norms on the output of each sublayer, and on all heads of q and k at once."""
    layer = Layer(sizes.attention(rope, attention_bias, qk_norm="full"), sizes.gated_mlp(), "output")
    return sizes.decoder(layer, norm=Norm(eps=sizes.norm_eps, scale_in_fp32=True))


@family(n_layers=4, norm_eps=1e-6)
def olmo3(
    sizes: Sizes,
    rope: Rope = BASE_500K,  # of the full layers
    rope_local: Rope = BASE_500K,  # of the sliding-window layers
    window: int | None = 64,
    sliding: tuple[bool, ...] = (True, True, True, False),
    attention_bias: bool = False,
) -> Spec:
    """arXiv:2512.13961: OLMo 2 with a sliding window in three of four layers, and YaRN in the others."""
    full, mlp = sizes.attention(rope, attention_bias, qk_norm="full"), sizes.gated_mlp()
    local = replace(full, rope=rope_local, window=window)
    layers = (Layer(local if slides else full, mlp, "output") for slides in sliding)
    return sizes.decoder(*layers, norm=Norm(eps=sizes.norm_eps, scale_in_fp32=True))


_olmo2 = partial(model, "olmo2")
YARN = Rope(500_000.0, scaling=Yarn(8.0, 8192, attention_factor=yarn_attention_factor(8.0)))
_olmo3 = partial(model, "olmo3", window=4096, rope=YARN)

MODELS = (  # name, title, then vocabulary, dim, layers, heads, KV heads (None: heads), MLP size, context
    _olmo2("olmo-2-1b", "OLMo-2-1B", 100352, 2048, 16, 16, None, 8192, 4096),
    _olmo2("olmo-2-7b", "OLMo-2-7B", 100352, 4096, 32, 32, None, 11008, 4096),
    _olmo2("olmo-2-13b", "OLMo-2-13B", 100352, 5120, 40, 40, None, 13824, 4096),
    _olmo2("olmo-2-32b", "OLMo-2-32B", 100352, 5120, 64, 40, 8, 27648, 4096),
    _olmo3("olmo-3-7b", "OLMo-3-7B", 100278, 4096, 32, 32, None, 11008, 65536),
    _olmo3("olmo-3-32b", "OLMo-3-32B", 100278, 5120, 64, 40, 8, 27648, 65536),
)
