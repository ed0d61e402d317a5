"""Activation memory: bytes that a training step saves for its backward pass, counted tensor by tensor from the Spec.

Assumes fp32 weights, matmuls in `itemsize` bytes (2 under autocast), unfused element-wise operations, and attention
that does not materialise its scores (FlashAttention, arXiv:2205.14135), except for short sequences on CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oneblock.constants import MATMUL_BLOCK, MATMUL_MAX_TRAINING_TOKENS
from oneblock.spec import Attention, Layer, Mlp, Moe, Norm, Spec

STREAM_BYTES = 4  # bytes of a residual-stream element, which stays in fp32

# Per kind of residual: norms over the stream, norms over a sublayer's output.
NORM_COUNTS = {
    "pre": (2, 0),
    "post": (2, 0),
    "sandwich": (2, 2),
    "output": (0, 2),
    "parallel": (1, 0),
    "parallel_two": (2, 0),
}

ActivationCheckpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ActivationConfig:
    """Everything that decides activation memory besides the Spec."""

    itemsize: int = 2  # bytes of a matmul operand
    context: int = 2048  # tokens of a sequence
    cpu: bool = False  # RMSNorm is one kernel on GPUs; on CPUs it is several, which save one more vector
    tp: int = 1  # sequence-parallel ranks, each with a part of every sequence outside the matmuls


def activations(spec: Spec, config: ActivationConfig, checkpointing: ActivationCheckpointing = "none") -> int:
    """Bytes per token, without the loss.

    Full checkpointing saves each layer's input, selective checkpointing its matmul outputs as well; the backward pass
    recomputes one layer at a time.
    """
    layers = [layer(x, spec, config) for x in spec.layers]
    ends = (spec.final_norm * norm(spec.norm, spec.dim, config) + spec.dim * config.itemsize) // config.tp
    if checkpointing == "none":
        return ends + sum(layers)
    inputs = len(layers) * spec.dim * STREAM_BYTES // config.tp
    outputs = sum(matmul_outputs(x, spec.dim) for x in spec.layers) if checkpointing == "selective" else 0
    return ends + inputs + outputs * config.itemsize + max(layers)


def layer(x: Layer, spec: Spec, config: ActivationConfig) -> int:
    """Bytes per token that one layer saves."""
    inputs = 1 if x.residual == "parallel" else 2  # inputs of the sublayers' first matmuls
    norms = sum(NORM_COUNTS[x.residual]) * norm(spec.norm, spec.dim, config) // config.tp
    gates = 2 * x.gated * spec.dim * config.itemsize
    return (
        norms
        + gates
        + inputs * spec.dim * config.itemsize
        + attention(x.attn, spec.norm, config)
        + mlp(x.mlp, spec, config)
    )


def norm(n: Norm, dim: int, config: ActivationConfig) -> int:
    return (2 if n.kind == "rms" and config.cpu else 1) * dim * STREAM_BYTES


def attention(a: Attention, n: Norm, config: ActivationConfig) -> int:
    """q, k, v, the output, the scores or their log-sum-exp, and q and k before their norm."""
    q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    vectors = (2 * q + (0 if a.cross else 2 * kv)) * config.itemsize
    before = norm(n, q + (0 if a.cross else kv), config) if a.qk_norm else 0
    return vectors + before + scores(a, config)


def scores(a: Attention, config: ActivationConfig) -> int:
    """The log-sum-exp in fp32; for short sequences on CPUs the lower triangle of the attention weights, in blocks."""
    is_causal = not (a.window or a.chunk or a.softcap or a.sinks)
    if not config.cpu or not is_causal or config.context > MATMUL_MAX_TRAINING_TOKENS[config.itemsize]:
        return 4 * a.n_heads
    blocks = -(-config.context // MATMUL_BLOCK)
    return round(a.n_heads * config.context * (blocks + 1) / (2 * blocks)) * config.itemsize


def mlp(m: Mlp | Moe, spec: Spec, config: ActivationConfig) -> int:
    """Gated: gate, act(gate), up, their product; plain: input and output of the activation, ReLU its output alone."""
    if isinstance(m, Mlp):
        return ((4 if m.gated else 2) - (m.act == "relu")) * m.hidden_dim * config.itemsize
    routed = m.top_k * (mlp(m.expert, spec, config) + 2 * spec.dim * config.itemsize)  # the token is copied in and out
    shared = mlp(m.shared, spec, config) if m.shared else 0
    return routed + shared + (m.n_experts + m.shared_gate * spec.dim) * config.itemsize


def matmul_outputs(x: Layer, dim: int) -> int:
    """Elements per token that a layer's weight matmuls write, which selective checkpointing saves; experts excepted."""
    a, m = x.attn, x.mlp
    attn = (a.n_heads + (0 if a.cross else 2 * a.n_kv_heads)) * a.head_dim + dim
    dense = m if isinstance(m, Mlp) else m.shared
    return attn + ((1 + dense.gated) * dense.hidden_dim + dim if dense else 0)
