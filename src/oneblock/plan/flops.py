"""Floating-point operations per token: 2 for each weight of a product, and attention's own for each key seen.

Norms, activations, rotations and softmax are left out: they are below 1% of the products at any size that matters.
"""

from __future__ import annotations

from oneblock.plan import params
from oneblock.plan.cache import span
from oneblock.spec import Attention, Mlp, Moe, Spec


def product_weights(m: Mlp | Moe, dim: int) -> int:
    """Weights that one token is multiplied with, biases left out."""
    if isinstance(m, Mlp):
        return (2 + m.gated) * dim * m.hidden_dim
    shared = product_weights(m.shared, dim) if m.shared else 0
    return dim * m.n_experts + m.top_k * product_weights(m.expert, dim) + shared + m.shared_gate * dim


def projection_weights(a: Attention, dim: int) -> int:
    """Weights of q, k, v and o; in cross-attention a token has no keys and values to make."""
    heads = 2 * a.n_heads if a.cross else 2 * (a.n_heads + a.n_kv_heads)
    return heads * a.head_dim * dim


def runs(a: Attention, image: int) -> bool:
    """Without an image, layers that look at one are passed over."""
    return image > 0 or not a.cross


def products(spec: Spec, image: int = 0) -> int:
    """FLOPs per token in products with weights: the part that does not depend on the text's length."""
    layers = [x for x in spec.layers if runs(x.attn, image)]
    weights = sum(projection_weights(x.attn, spec.dim) + product_weights(x.mlp, spec.dim) for x in layers)
    return 2 * (weights + spec.vocab * spec.dim)


def mean_span(a: Attention, context: int, image: int = 0) -> float:
    """Keys a query sees on average over a text of `context` tokens."""
    if a.cross:
        return image
    limit = min(n for n in (context, a.window, a.chunk) if n is not None)
    if a.chunk is None or a.chunk >= context:  # 1, 2 .. limit, limit, limit
        return (limit * (limit + 1) / 2 + (context - limit) * limit) / context
    whole, rest = divmod(context, a.chunk)
    window = min(a.window or a.chunk, a.chunk)

    def seen(n: int) -> float:
        ramp = min(n, window)
        return ramp * (ramp + 1) / 2 + (n - ramp) * window

    return (whole * seen(a.chunk) + seen(rest)) / context


def scores(a: Attention, keys: float) -> float:
    """Query times keys and weights times values: 2 FLOPs x 2 products x heads x head_dim for each key."""
    return 4 * a.n_heads * a.head_dim * keys


def prefill(spec: Spec, context: int, image: int = 0) -> float:
    """Per token, on average over a text of `context` tokens read at once; hidden scores are not computed."""
    return products(spec, image) + sum(scores(x.attn, mean_span(x.attn, context, image)) for x in spec.layers)


def decode(spec: Spec, context: int, image: int = 0) -> float:
    """Of the token that makes the text `context` tokens long."""
    return products(spec, image) + sum(scores(x.attn, span(x.attn, context, image)) for x in spec.layers)


def train(spec: Spec, context: int, checkpointing: bool = False, image: int = 0) -> float:
    """Per token: the backward pass costs two forward ones, and checkpointing computes the forward one again."""
    return (4 if checkpointing else 3) * prefill(spec, context, image)


def distinct_experts(m: Moe, batch: int) -> float:
    """How many experts `batch` tokens wake, if each picks evenly and alone."""
    return m.n_experts * (1 - (1 - m.top_k / m.n_experts) ** batch)


def weights_read(spec: Spec, batch: int = 1, image: int = 0) -> float:
    """Parameters that one decoding step of `batch` texts reads: the layers, the head and a row of each table a text."""
    total = spec.vocab * spec.dim + spec.head_bias * spec.vocab + spec.final_norm * params.norm(spec.norm, spec.dim)
    total += batch * spec.dim * (1 + (spec.positions is not None))
    for x in spec.layers:
        if not runs(x.attn, image):
            continue
        total += params.layer(x, spec.dim, spec.norm, active=True).total()
        if isinstance(x.mlp, Moe):
            more = distinct_experts(x.mlp, batch) - x.mlp.top_k
            total += more * params.mlp(x.mlp.expert, spec.dim)
    return total
