"""FLOPs per token: 2 for each weight of a matmul, and the attention scores and values for each key attended to.

Norms, activations, RoPE and softmax are left out: they are below 1% of the matmuls at any size that matters.
"""

from __future__ import annotations

from oneblock.plan import params
from oneblock.plan.cache import span
from oneblock.spec import Attention, Mlp, Moe, Spec


def mlp_weights(m: Mlp | Moe, dim: int) -> int:
    """Weights that one token is multiplied with, without biases."""
    if isinstance(m, Mlp):
        return (2 + m.gated) * dim * m.hidden_dim
    shared = mlp_weights(m.shared, dim) if m.shared else 0
    return dim * m.n_experts + m.top_k * mlp_weights(m.expert, dim) + shared + m.shared_gate * dim


def projection_weights(a: Attention, dim: int) -> int:
    """Weights of wq, wk, wv and wo; in cross-attention a token has no keys and values."""
    heads = 2 * a.n_heads if a.cross else 2 * (a.n_heads + a.n_kv_heads)
    return heads * a.head_dim * dim


def is_active(a: Attention, image: int) -> bool:
    """Whether the layer runs: without an image, cross-attention layers are skipped."""
    return image > 0 or not a.cross


def matmuls(spec: Spec, image: int = 0) -> int:
    """FLOPs per token in matmuls with weights: the part that does not depend on the sequence length."""
    layers = [x for x in spec.layers if is_active(x.attn, image)]
    weights = sum(projection_weights(x.attn, spec.dim) + mlp_weights(x.mlp, spec.dim) for x in layers)
    return 2 * (weights + spec.vocab * spec.dim)


def mean_span(a: Attention, context: int, image: int = 0) -> float:
    """Keys that a query attends to, averaged over a sequence of `context` tokens."""
    if a.cross:
        return image
    limit = min(n for n in (context, a.window, a.chunk) if n is not None)
    if a.chunk is None or a.chunk >= context:  # 1, 2 .. limit, limit, limit
        return (limit * (limit + 1) / 2 + (context - limit) * limit) / context
    full_chunks, remainder = divmod(context, a.chunk)
    window = min(a.window or a.chunk, a.chunk)

    def keys(n: int) -> float:
        ramp = min(n, window)
        return ramp * (ramp + 1) / 2 + (n - ramp) * window

    return (full_chunks * keys(a.chunk) + keys(remainder)) / context


def scores(a: Attention, keys: float) -> float:
    """Scores and weighted values: 2 FLOPs x 2 matmuls x heads x head_dim for each key."""
    return 4 * a.n_heads * a.head_dim * keys


def prefill(spec: Spec, context: int, image: int = 0) -> float:
    """FLOPs per token, averaged over a prefill of `context` tokens; masked scores are not counted."""
    return matmuls(spec, image) + sum(scores(x.attn, mean_span(x.attn, context, image)) for x in spec.layers)


def decode(spec: Spec, context: int, image: int = 0) -> float:
    """FLOPs of decoding the last of `context` tokens."""
    return matmuls(spec, image) + sum(scores(x.attn, span(x.attn, context, image)) for x in spec.layers)


def train(spec: Spec, context: int, checkpointing: bool = False, image: int = 0) -> float:
    """FLOPs per token of training: backward costs two forward passes, full activation checkpointing one more."""
    return (4 if checkpointing else 3) * prefill(spec, context, image)


def distinct_experts(m: Moe, batch: int) -> float:
    """Expected number of distinct experts that `batch` tokens use, if routing is uniform and independent."""
    return m.n_experts * (1 - (1 - m.top_k / m.n_experts) ** batch)


def weights_read(spec: Spec, batch: int = 1, image: int = 0) -> float:
    """Parameters read by one decoding step of `batch` sequences: layers, LM head, one row of each table a sequence."""
    total = spec.vocab * spec.dim + spec.head_bias * spec.vocab + spec.final_norm * params.norm(spec.norm, spec.dim)
    total += batch * spec.dim * (1 + (spec.positions is not None))
    for x in spec.layers:
        if not is_active(x.attn, image):
            continue
        total += params.layer(x, spec.dim, spec.norm, active=True).total()
        if isinstance(x.mlp, Moe):
            more = distinct_experts(x.mlp, batch) - x.mlp.top_k
            total += more * params.mlp(x.mlp.expert, spec.dim)
    return total
