"""GPT-1, GPT-2, GPT-3 and open models of their kind: GPT-Neo, OPT, GPT-NeoX (Pythia)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from oneblock.spec.build import Sizes, family, model
from oneblock.spec.parts import Layer, Positions, Rope, Spec


@family(act="gelu_tanh", tied=True)  # the paper's code calls it "gelu" and computes the tanh form
def gpt1(sizes: Sizes) -> Spec:
    """Radford et al. 2018, "Improving language understanding by generative pre-training": post-norm, no final norm."""
    layer = Layer(sizes.attention(bias=True), sizes.plain_mlp(), "post")
    norm, positions = sizes.layer_norm(bias=True), Positions(sizes.context)
    return sizes.decoder(layer, norm=norm, positions=positions, final_norm=False)


@family(act="gelu_tanh", tied=True)
def gpt2(
    sizes: Sizes,
    scaled: bool = True,  # divide scores by sqrt(head_dim)
    scale_by_depth: bool = False,  # also divide the scores of layer i by i + 1 (Mistral's GPT-2s)
) -> Spec:
    """Radford et al. 2019, "Language models are unsupervised multitask learners": pre-norm and a final norm."""
    attn, mlp = sizes.attention(bias=True), sizes.plain_mlp()
    scale = attn.head_dim**-0.5 if scaled else 1.0
    if scale_by_depth:
        attns = [replace(attn, scale=scale / (i + 1)) for i in range(sizes.n_layers)]
    else:
        attns = [attn if scaled else replace(attn, scale=scale)]
    layers = [Layer(attn, mlp) for attn in attns]
    return sizes.decoder(*layers, norm=sizes.layer_norm(bias=True), positions=Positions(sizes.context))


@family(act="gelu_tanh", tied=True)
def gpt3(
    sizes: Sizes,
    window: int | None = 256,  # of the locally banded layers; never published, 256 is GPT-Neo's. None: all dense
) -> Spec:
    """GPT-2 with a locally banded sparse attention in every second layer (arXiv:2005.14165, section 2.1)."""
    dense, mlp = sizes.attention(bias=True), sizes.plain_mlp()
    layers = Layer(dense, mlp), Layer(replace(dense, window=window), mlp)
    return sizes.decoder(*layers, norm=sizes.layer_norm(bias=True), positions=Positions(sizes.context))


@family(act="gelu_tanh", tied=True)
def gpt_neo(sizes: Sizes, window: int | None = 256, sliding: tuple[bool, ...] = (False, True)) -> Spec:
    """EleutherAI's GPT-3: scores are not divided by sqrt(head_dim), and q, k, v have no bias."""
    full, mlp = sizes.attention(bias=(False, True), scale=1.0), sizes.plain_mlp()
    local = replace(full, window=window)
    layers = [Layer(local if slides else full, mlp) for slides in sliding]
    return sizes.decoder(*layers, norm=sizes.layer_norm(bias=True), positions=Positions(sizes.context))


@family(act="relu", tied=True)
def opt(sizes: Sizes, bias: bool = True, pre_norm: bool = True, final_norm: bool = True) -> Spec:
    """arXiv:2205.01068. Position 0 is row 2 of the table; the rows before it belonged to fairseq's padding."""
    layer = Layer(sizes.attention(bias=bias), sizes.plain_mlp(bias), "pre" if pre_norm else "post")
    norm, positions = sizes.layer_norm(bias=True), Positions(sizes.context, offset=2)
    return sizes.decoder(layer, norm=norm, positions=positions, final_norm=pre_norm and final_norm)


@family(act="gelu")
def gpt_neox(
    sizes: Sizes,
    rope: Rope | None = None,  # None: a quarter of each head, base 10,000
    attention_bias: bool = True,
    parallel: bool = True,
) -> Spec:
    """arXiv:2204.06745: attention and MLP in parallel, each behind its own norm."""
    attn = sizes.attention(bias=attention_bias)
    attn = replace(attn, rope=rope or Rope(dim=attn.head_dim // 4))
    layer = Layer(attn, sizes.plain_mlp(), "parallel_two" if parallel else "pre")
    return sizes.decoder(layer, norm=sizes.layer_norm(bias=True))


_gpt2, _gpt3, _opt, _neox = (partial(model, name) for name in ("gpt2", "gpt3", "opt", "gpt_neox"))

MODELS = (  # name, title, then vocabulary, dim, layers, heads, KV heads, MLP size (None: 4 dim), context
    model("gpt1", "gpt1", "GPT-1 (117M)", 40478, 768, 12, 12, None, None, 512),
    _gpt2("gpt2", "GPT-2 small (124M)", 50257, 768, 12, 12, None, None, 1024),
    _gpt2("gpt2-medium", "GPT-2 medium (355M)", 50257, 1024, 24, 16, None, None, 1024),
    _gpt2("gpt2-large", "GPT-2 large (774M)", 50257, 1280, 36, 20, None, None, 1024),
    _gpt2("gpt2-xl", "GPT-2 XL (1.5B)", 50257, 1600, 48, 25, None, None, 1024),
    _gpt3("gpt3-small", "GPT-3 Small (125M)", 50257, 768, 12, 12, None, None, 2048),
    _gpt3("gpt3-medium", "GPT-3 Medium (350M)", 50257, 1024, 24, 16, None, None, 2048),
    _gpt3("gpt3-large", "GPT-3 Large (760M)", 50257, 1536, 24, 16, None, None, 2048),
    # The paper prints 24 heads of 128 for a width of 2048; its parameter count fits 16 of them.
    _gpt3("gpt3-xl", "GPT-3 XL (1.3B)", 50257, 2048, 24, 16, None, None, 2048),
    _gpt3("gpt3-2.7b", "GPT-3 2.7B", 50257, 2560, 32, 32, None, None, 2048),
    _gpt3("gpt3-6.7b", "GPT-3 6.7B", 50257, 4096, 32, 32, None, None, 2048),
    # The paper prints 40 heads of 128 for a width of 5140; 5140 = 20 x 257 is its only split near that.
    _gpt3("gpt3-13b", "GPT-3 13B", 50257, 5140, 40, 20, None, None, 2048),
    _gpt3("gpt3-175b", "GPT-3 175B (davinci)", 50257, 12288, 96, 96, None, None, 2048),
    _opt("opt-125m", "OPT-125M", 50272, 768, 12, 12, None, None, 2048),
    _opt("opt-1.3b", "OPT-1.3B", 50272, 2048, 24, 32, None, None, 2048),
    _opt("opt-2.7b", "OPT-2.7B", 50272, 2560, 32, 32, None, None, 2048),
    _opt("opt-6.7b", "OPT-6.7B", 50272, 4096, 32, 32, None, None, 2048),
    _opt("opt-13b", "OPT-13B", 50272, 5120, 40, 40, None, None, 2048),
    _opt("opt-30b", "OPT-30B", 50272, 7168, 48, 56, None, None, 2048),
    _opt("opt-66b", "OPT-66B", 50272, 9216, 64, 72, None, None, 2048),
    _opt("opt-175b", "OPT-175B", 50272, 12288, 96, 96, None, None, 2048),
    _neox("gpt-neox-20b", "GPT-NeoX-20B", 50432, 6144, 44, 64, None, None, 2048),
    _neox("pythia-160m", "Pythia-160M", 50304, 768, 12, 12, None, None, 2048),
)
