"""Llama 1 to 3.3 (and SmolLM2), SmolLM3, Llama 4 and the text side of Llama 3.2 Vision."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from oneblock.spec.build import BASE_2M, BASE_10K, BASE_500K, INTERLEAVED_500K, Sizes, family, model, repeat_to_depth
from oneblock.spec.parts import Layer, Llama3Scaling, Mlp, Moe, Rope, Spec


@family()
def llama(sizes: Sizes, rope: Rope = BASE_10K, attention_bias: bool = False, mlp_bias: bool = False) -> Spec:
    """arXiv:2302.13971: RMSNorm, RoPE, SwiGLU, no biases; grouped-query attention since Llama 2 70B."""
    return sizes.decoder(Layer(sizes.attention(rope, attention_bias), sizes.gated_mlp(bias=mlp_bias)))


@family(n_layers=4, norm_eps=1e-6, tied=True)
def smollm3(
    sizes: Sizes,
    rope: Rope = BASE_2M,
    rope_layers: tuple[bool, ...] = (True, True, True, False),
    window: int | None = None,
    sliding: tuple[bool, ...] = (False, False, False, True),
    attention_bias: bool = False,
    mlp_bias: bool = False,
) -> Spec:
    """Llama with NoPE, no RoPE, in every fourth layer (arXiv:2501.18795)."""
    full, mlp = sizes.attention(bias=attention_bias), sizes.gated_mlp(bias=mlp_bias)
    kinds = zip(*(repeat_to_depth(x, sizes.n_layers) for x in (rope_layers, sliding)), strict=True)
    attns = [replace(full, rope=rope if turns else None, window=window if slides else None) for turns, slides in kinds]
    return sizes.decoder(*(Layer(attn, mlp) for attn in attns))


@family(n_layers=4, n_kv_heads=2, hidden_dim=64)
def llama4(
    sizes: Sizes,  # hidden_dim: of one expert, and of the shared one
    dense_hidden_dim: int = 128,  # of the MLP of layers without experts
    n_experts: int = 4,
    top_k: int = 1,
    rope: Rope = INTERLEAVED_500K,
    rope_layers: tuple[bool, ...] = (True, True, True, False),
    chunk: int | None = 64,
    chunked: tuple[bool, ...] | None = None,  # None: the layers with RoPE
    sparse: tuple[bool, ...] = (True,),  # the layers with experts
    qk_norm: bool = True,  # in layers with RoPE
    temperature_tuning: tuple[float, float] | None = (8192.0, 0.1),  # in layers without RoPE
    attention_bias: bool = False,
) -> Spec:
    """The text side of Llama 4: chunked RoPE layers, full NoPE layers, one routed expert per token and a shared one."""
    plain, expert = sizes.attention(bias=attention_bias), sizes.gated_mlp()
    local = replace(plain, rope=rope, qk_norm="l2" if qk_norm else None)
    nope = replace(plain, temperature_tuning=temperature_tuning)
    experts = Moe(n_experts, top_k, expert, "sigmoid", renormalize=False, scale_expert_input=True, shared=expert)
    dense = Mlp(dense_hidden_dim, sizes.act)
    kinds = (repeat_to_depth(x, sizes.n_layers) for x in (rope_layers, chunked or rope_layers, sparse))
    layers = (
        Layer(replace(local if turns else nope, chunk=chunk if cut else None), experts if routed else dense)
        for turns, cut, routed in zip(*kinds, strict=True)
    )
    return sizes.decoder(*layers)


@family(n_layers=5, n_kv_heads=2)
def mllama(
    sizes: Sizes,
    rope: Rope = BASE_500K,
    cross: tuple[bool, ...] = (False, False, False, True, False),
    embed_extra: int = 8,
) -> Spec:
    """The text side of Llama 3.2 Vision (arXiv:2407.21783, section 7): gated cross-attention layers among Llama's."""
    own, mlp = sizes.attention(rope), sizes.gated_mlp()
    image = replace(own, rope=None, qk_norm="head", cross=True)
    layers = (Layer(image, mlp, gated=True) if crosses else Layer(own, mlp) for crosses in cross)
    return sizes.decoder(*layers, embed_extra=embed_extra)


LONG = Rope(500_000.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))  # Llama 3.1, 3.3 and 3.2 Vision
SMALL = Rope(500_000.0, scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192))  # Llama 3.2 1B and 3B
SCOUT = Rope(500_000.0, interleaved=True, scaling=Llama3Scaling(16.0, 1.0, 1.0, 8192))

_llama1 = partial(model, "llama", norm_eps=1e-6)
_llama2 = partial(model, "llama")
_llama3 = partial(model, "llama", rope=BASE_500K)
_llama31 = partial(model, "llama", rope=LONG)
_llama32 = partial(model, "llama", rope=SMALL, tied=True)
_vision = partial(model, "mllama", rope=LONG)
_llama4 = partial(model, "llama4", head_dim=128, dense_hidden_dim=16384, chunk=8192)
_smollm2 = partial(model, "llama", tied=True)

MODELS = (  # name, title, then vocabulary, dim, layers, heads, KV heads (None: heads), MLP size, context
    _llama1("llama-7b", "LLaMA-7B", 32000, 4096, 32, 32, None, 11008, 2048),
    _llama1("llama-13b", "LLaMA-13B", 32000, 5120, 40, 40, None, 13824, 2048),
    _llama1("llama-33b", "LLaMA-33B", 32000, 6656, 60, 52, None, 17920, 2048),
    _llama1("llama-65b", "LLaMA-65B", 32000, 8192, 80, 64, None, 22016, 2048),
    _llama2("llama-2-7b", "Llama-2-7B", 32000, 4096, 32, 32, None, 11008, 4096),
    _llama2("llama-2-13b", "Llama-2-13B", 32000, 5120, 40, 40, None, 13824, 4096),
    _llama2("llama-2-70b", "Llama-2-70B", 32000, 8192, 80, 64, 8, 28672, 4096),
    _llama3("llama-3-8b", "Llama-3-8B", 128256, 4096, 32, 32, 8, 14336, 8192),
    _llama3("llama-3-70b", "Llama-3-70B", 128256, 8192, 80, 64, 8, 28672, 8192),
    _llama31("llama-3.1-8b", "Llama-3.1-8B", 128256, 4096, 32, 32, 8, 14336, 131072),
    _llama31("llama-3.1-70b", "Llama-3.1-70B", 128256, 8192, 80, 64, 8, 28672, 131072),
    # The first upload stored every KV head twice (16); 8 is the paper's count and the present one's.
    _llama31("llama-3.1-405b", "Llama-3.1-405B", 128256, 16384, 126, 128, 8, 53248, 131072),
    _llama32("llama-3.2-1b", "Llama-3.2-1B", 128256, 2048, 16, 32, 8, 8192, 131072),
    _llama32("llama-3.2-3b", "Llama-3.2-3B", 128256, 3072, 28, 24, 8, 8192, 131072),
    _llama31("llama-3.3-70b", "Llama-3.3-70B", 128256, 8192, 80, 64, 8, 28672, 131072),
    _vision("llama-3.2-11b-vision", "Llama-3.2-11B-Vision", 128256, 4096, 40, 32, 8, 14336, 131072),
    _vision("llama-3.2-11b-vision-instruct", "Llama-3.2-11B-Vision-Instruct", 128256, 4096, 40, 32, 8, 14336, 131072),
    _vision("llama-3.2-90b-vision-instruct", "Llama-3.2-90B-Vision-Instruct", 128256, 8192, 100, 64, 8, 28672, 131072),
    _llama4(
        "llama-4-scout", "Llama-4-Scout (17B-16E)", 202048, 5120, 48, 40, 8, 8192, 10_485_760, n_experts=16, rope=SCOUT
    ),
    _llama4(
        "llama-4-maverick",
        "Llama-4-Maverick (17B-128E)",
        *(202048, 5120, 48, 40, 8, 8192, 1_048_576),
        n_experts=128,
        sparse=(False, True),
        qk_norm=False,
    ),
    _smollm2("smollm2-135m", "SmolLM2-135M", 49152, 576, 30, 9, 3, 1536, 8192, rope=Rope(100_000.0)),
    _smollm2("smollm2-360m", "SmolLM2-360M", 49152, 960, 32, 15, 5, 2560, 8192, rope=Rope(100_000.0)),
    _smollm2("smollm2-1.7b", "SmolLM2-1.7B", 49152, 2048, 24, 32, 32, 8192, 8192, rope=Rope(130_000.0)),
    model("smollm3", "smollm3-3b", "SmolLM3-3B", 128256, 2048, 36, 16, 4, 11008, 65536, rope=Rope(5_000_000.0)),
)
