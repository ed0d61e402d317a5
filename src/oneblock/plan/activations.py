"""Bytes that a training step keeps for its backward pass, read off the Spec tensor by tensor.

For weights in fp32, products in `size` bytes (2 under autocast), element-wise operations that are not fused, and
attention that does not write its scores out (FlashAttention, arXiv:2205.14135), but for short texts on CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oneblock.spec import Attention, Layer, Mlp, Moe, Norm, Spec

WIDE = 4  # bytes of a number of the residual stream: sums stay in fp32

# Of each shape of block: norms that read the stream, norms that read a sublayer's answer.
NORMS = {
    "pre": (2, 0),
    "post": (2, 0),
    "sandwich": (2, 2),
    "output": (0, 2),
    "parallel": (1, 0),
    "parallel_two": (2, 0),
}

SHORT = {2: 512, 4: 256}  # tokens up to which CPUs write scores out, and in blocks of so many queries
BLOCK = 128

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ActivationConfig:
    """How it is computed: what decides about bytes beside the Spec."""

    size: int = 2  # bytes of a number in products
    context: int = 2048
    cpu: bool = False  # RMSNorm is one kernel on GPUs; on CPUs it is several, which keep one vector more
    tp: int = 1  # ranks that have a piece of every row each, but in products


def activations(spec: Spec, kept: ActivationConfig, recompute: Recompute = "none") -> int:
    """Bytes per token, the loss left out.

    Recomputing in full keeps each layer's input, selectively that and its products; all of one layer comes back.
    """
    layers = [layer(x, spec, kept) for x in spec.layers]
    ends = (spec.final_norm * norm(spec.norm, spec.dim, kept) + spec.dim * kept.size) // kept.tp
    if recompute == "none":
        return ends + sum(layers)
    inputs = len(layers) * spec.dim * WIDE // kept.tp
    products = sum(layer_products(x, spec.dim) for x in spec.layers) * kept.size if recompute == "selective" else 0
    return ends + inputs + products + max(layers)


def layer(x: Layer, spec: Spec, kept: ActivationConfig) -> int:
    """Bytes per token that one layer keeps."""
    on_stream, on_answers = NORMS[x.residual]
    inputs = 1 if x.residual == "parallel" else 2  # what the first products of the sublayers read
    norms = (on_stream + on_answers) * norm(spec.norm, spec.dim, kept) // kept.tp
    gates = 2 * x.gated * spec.dim * kept.size
    return norms + gates + inputs * spec.dim * kept.size + attention(x.attn, spec.norm, kept) + mlp(x.mlp, spec, kept)


def norm(n: Norm, dim: int, kept: ActivationConfig) -> int:
    return (2 if n.kind == "rms" and kept.cpu else 1) * dim * WIDE


def attention(a: Attention, n: Norm, kept: ActivationConfig) -> int:
    """q, k, v as attention reads them, its answer, scores or their sums, and what q and k were before their norm."""
    q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    vectors = (2 * q + (0 if a.cross else 2 * kv)) * kept.size
    before = norm(n, q + (0 if a.cross else kv), kept) if a.qk_norm else 0
    return vectors + before + scores(a, kept)


def scores(a: Attention, kept: ActivationConfig) -> int:
    """Softmax statistics in fp32; or, of short texts on CPUs, the lower triangle of the weights in blocks."""
    if not kept.cpu or kept.context > SHORT[kept.size] or a.window or a.chunk or a.softcap or a.sinks:
        return 4 * a.n_heads
    blocks = -(-kept.context // BLOCK)
    return round(a.n_heads * kept.context * (blocks + 1) / (2 * blocks)) * kept.size


def mlp(m: Mlp | Moe, spec: Spec, kept: ActivationConfig) -> int:
    """Gated: gate, act(gate), up and their product; plain: before and after the activation. ReLU needs only after."""
    if isinstance(m, Mlp):
        return ((4 if m.gated else 2) - (m.act == "relu")) * m.hidden_dim * kept.size
    routed = m.top_k * (mlp(m.expert, spec, kept) + 2 * spec.dim * kept.size)  # a copy of the token goes in and out
    shared = mlp(m.shared, spec, kept) if m.shared else 0
    return routed + shared + (m.n_experts + m.shared_gate * spec.dim) * kept.size


def layer_products(x: Layer, dim: int) -> int:
    """Numbers per token that a layer's products with weights make; stacked experts are computed again."""
    a, m = x.attn, x.mlp
    attn = (a.n_heads + (0 if a.cross else 2 * a.n_kv_heads)) * a.head_dim + dim
    dense = m if isinstance(m, Mlp) else m.shared
    return attn + ((1 + dense.gated) * dense.hidden_dim + dim if dense else 0)
