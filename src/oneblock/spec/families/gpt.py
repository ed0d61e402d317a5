"""GPT-1, GPT-2, GPT-3 and their open kin: GPT-Neo, OPT, GPT-NeoX (Pythia)."""

from __future__ import annotations

from dataclasses import replace

from oneblock.spec.build import Row, fold, heads, row, spread
from oneblock.spec.parts import Attention, Layer, Mlp, Norm, Positions, Rope, Spec


def gpt1(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-5,
    act: str = "gelu_tanh",  # the paper's code calls it "gelu" and computes the tanh form
    tied: bool = True,
) -> Spec:
    """Radford et al. 2018, "Improving language understanding by generative pre-training": post-norm, no final norm."""
    attn = Attention(*heads(dim, n_heads, None, head_dim), bias=(True, True))
    mlp = Mlp(hidden_dim or 4 * dim, act, gated=False, bias=True)
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=(Layer(attn, mlp, "post"),),
        context=context,
        norm=Norm("layer", norm_eps, bias=True),
        positions=Positions(context),
        final_norm=False,
        tied=tied,
    )


def gpt2(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-5,
    act: str = "gelu_tanh",
    scaled: bool = True,  # divide scores by sqrt(head_dim)
    scale_by_depth: bool = False,  # divide layer i's scores by i + 1 as well (Mistral's GPT-2s)
    tied: bool = True,
) -> Spec:
    """Radford et al. 2019, "Language models are unsupervised multitask learners": pre-norm and a final norm."""
    attn = Attention(*heads(dim, n_heads, None, head_dim), bias=(True, True))
    scale = attn.head_dim**-0.5 if scaled else 1.0
    if scale_by_depth:
        attns = [replace(attn, scale=scale / (i + 1)) for i in range(n_layers)]
    else:
        attns = [attn if scaled else replace(attn, scale=scale)] * n_layers
    mlp = Mlp(hidden_dim or 4 * dim, act, gated=False, bias=True)
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=fold(Layer(attn, mlp) for attn in attns),
        context=context,
        norm=Norm("layer", norm_eps, bias=True),
        positions=Positions(context),
        tied=tied,
    )


def gpt3(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-5,
    act: str = "gelu_tanh",
    band: int | None = 256,  # never published; 256 is GPT-Neo's window. None: every layer dense
    tied: bool = True,
) -> Spec:
    """GPT-2 with every second layer seeing only a band of tokens (arXiv:2005.14165, section 2.1)."""
    dense = Attention(*heads(dim, n_heads, None, head_dim), bias=(True, True))
    mlp = Mlp(hidden_dim or 4 * dim, act, gated=False, bias=True)
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=fold(spread((Layer(dense, mlp), Layer(replace(dense, window=band), mlp)), n_layers)),
        context=context,
        norm=Norm("layer", norm_eps, bias=True),
        positions=Positions(context),
        tied=tied,
    )


def gpt_neo(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-5,
    act: str = "gelu_tanh",
    window: int | None = 256,
    sliding: tuple[bool, ...] = (False, True),
    tied: bool = True,
) -> Spec:
    """EleutherAI's GPT-3: scores are not divided by sqrt(head_dim), and q, k, v have no bias."""
    full = Attention(*heads(dim, n_heads, None, head_dim), bias=(False, True), scale=1.0)
    local = replace(full, window=window)
    mlp = Mlp(hidden_dim or 4 * dim, act, gated=False, bias=True)
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=fold(Layer(local if slides else full, mlp) for slides in spread(sliding, n_layers)),
        context=context,
        norm=Norm("layer", norm_eps, bias=True),
        positions=Positions(context),
        tied=tied,
    )


def opt(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-5,
    act: str = "relu",
    bias: bool = True,
    pre_norm: bool = True,
    final_norm: bool = True,
    tied: bool = True,
) -> Spec:
    """arXiv:2205.01068. Position 0 is row 2 of the table: the rows before it belonged to fairseq's padding."""
    attn = Attention(*heads(dim, n_heads, None, head_dim), bias=(bias, bias))
    mlp = Mlp(hidden_dim or 4 * dim, act, gated=False, bias=bias)
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=(Layer(attn, mlp, "pre" if pre_norm else "post"),),
        context=context,
        norm=Norm("layer", norm_eps, bias=True),
        positions=Positions(context, offset=2),
        final_norm=pre_norm and final_norm,
        tied=tied,
    )


def gpt_neox(
    *,
    vocab: int = 256,
    dim: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    context: int = 256,
    norm_eps: float = 1e-5,
    act: str = "gelu",
    rope: Rope | None = None,  # None: a quarter of each head, base 10,000
    attention_bias: bool = True,
    parallel: bool = True,
    tied: bool = False,
) -> Spec:
    """arXiv:2204.06745: attention and MLP read the same stream, each through its own norm."""
    n_heads, n_kv_heads, head_dim = heads(dim, n_heads, None, head_dim)
    rope = rope or Rope(dim=head_dim // 4)
    attn = Attention(n_heads, n_kv_heads, head_dim, rope, bias=(attention_bias, attention_bias))
    mlp = Mlp(hidden_dim or 4 * dim, act, gated=False, bias=True)
    return Spec(
        vocab,
        dim,
        n_layers,
        pattern=(Layer(attn, mlp, "parallel_two" if parallel else "pre"),),
        context=context,
        norm=Norm("layer", norm_eps, bias=True),
        tied=tied,
    )


def _gpt2(title: str, dim: int, n_layers: int, n_heads: int) -> Row:
    return row(title, "gpt2", vocab=50257, dim=dim, n_layers=n_layers, n_heads=n_heads, context=1024)


def _gpt3(title: str, dim: int, n_layers: int, n_heads: int) -> Row:
    return row(title, "gpt3", vocab=50257, dim=dim, n_layers=n_layers, n_heads=n_heads, context=2048)


def _opt(title: str, dim: int, n_layers: int, n_heads: int) -> Row:
    return row(title, "opt", vocab=50272, dim=dim, n_layers=n_layers, n_heads=n_heads, context=2048)


def _neox(title: str, vocab: int, dim: int, n_layers: int, n_heads: int) -> Row:
    return row(title, "gpt_neox", vocab=vocab, dim=dim, n_layers=n_layers, n_heads=n_heads, context=2048)


SIZES: dict[str, Row] = {
    "gpt1": row("GPT-1 (117M)", "gpt1", vocab=40478, dim=768, n_layers=12, n_heads=12, context=512),
    "gpt2": _gpt2("GPT-2 small (124M)", 768, 12, 12),
    "gpt2-medium": _gpt2("GPT-2 medium (355M)", 1024, 24, 16),
    "gpt2-large": _gpt2("GPT-2 large (774M)", 1280, 36, 20),
    "gpt2-xl": _gpt2("GPT-2 XL (1.5B)", 1600, 48, 25),
    "gpt3-small": _gpt3("GPT-3 Small (125M)", 768, 12, 12),
    "gpt3-medium": _gpt3("GPT-3 Medium (350M)", 1024, 24, 16),
    "gpt3-large": _gpt3("GPT-3 Large (760M)", 1536, 24, 16),
    # The paper prints 24 heads of 128 for a width of 2048; its parameter count fits 16 of them.
    "gpt3-xl": _gpt3("GPT-3 XL (1.3B)", 2048, 24, 16),
    "gpt3-2.7b": _gpt3("GPT-3 2.7B", 2560, 32, 32),
    "gpt3-6.7b": _gpt3("GPT-3 6.7B", 4096, 32, 32),
    # The paper prints 40 heads of 128 for a width of 5140; 5140 = 20 x 257 is its only split near that.
    "gpt3-13b": _gpt3("GPT-3 13B", 5140, 40, 20),
    "gpt3-175b": _gpt3("GPT-3 175B (davinci)", 12288, 96, 96),
    "opt-125m": _opt("OPT-125M", 768, 12, 12),
    "opt-1.3b": _opt("OPT-1.3B", 2048, 24, 32),
    "opt-2.7b": _opt("OPT-2.7B", 2560, 32, 32),
    "opt-6.7b": _opt("OPT-6.7B", 4096, 32, 32),
    "opt-13b": _opt("OPT-13B", 5120, 40, 40),
    "opt-30b": _opt("OPT-30B", 7168, 48, 56),
    "opt-66b": _opt("OPT-66B", 9216, 64, 72),
    "opt-175b": _opt("OPT-175B", 12288, 96, 96),
    "gpt-neox-20b": _neox("GPT-NeoX-20B", 50432, 6144, 44, 64),
    "pythia-160m": _neox("Pythia-160M", 50304, 768, 12, 12),
}
