"""Parameters by part, counted from the Spec alone."""

from __future__ import annotations

from collections import Counter

from oneblock.spec import Attention, Layer, Mlp, Moe, Norm, Spec

PARTS = ("embedding", "positions", "attention", "mlp", "experts", "norms", "gates", "head")

# Norms over the residual stream, per kind of residual.
NORMS = {"pre": 2, "post": 2, "output": 2, "sandwich": 4, "parallel": 1, "parallel_two": 2}


def linear(n_in: int, n_out: int, bias: bool = False) -> int:
    return n_in * n_out + n_out * bias


def norm(n: Norm, dim: int) -> int:
    return dim * (1 + n.bias)


def attention(a: Attention, dim: int) -> int:
    """The four projections and the attention sinks."""
    q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    projections = linear(dim, q, a.bias[0]) + 2 * linear(dim, kv, a.bias[0]) + linear(q, dim, a.bias[1])
    return projections + a.sinks * a.n_heads


def qk_norms(a: Attention, n: Norm) -> int:
    """Weights of the query and key norms; "l2" has none."""
    match a.qk_norm:
        case "head":
            return 2 * norm(n, a.head_dim)
        case "full":
            return norm(n, a.n_heads * a.head_dim) + norm(n, a.n_kv_heads * a.head_dim)
    return 0


def mlp(m: Mlp, dim: int) -> int:
    return (1 + m.gated) * linear(dim, m.hidden_dim, m.bias) + linear(m.hidden_dim, dim, m.bias)


def experts(m: Moe, dim: int, active: bool = False) -> int:
    """Router, experts (active: only the top k) and the shared expert."""
    routed = (m.top_k if active else m.n_experts) * mlp(m.expert, dim)
    shared = (mlp(m.shared, dim) if m.shared else 0) + m.shared_gate * dim
    return linear(dim, m.n_experts, m.router_bias) + routed + shared


def layer(layer: Layer, dim: int, n: Norm, active: bool = False) -> Counter[str]:
    return Counter(
        attention=attention(layer.attn, dim),
        mlp=mlp(layer.mlp, dim) if isinstance(layer.mlp, Mlp) else 0,
        experts=experts(layer.mlp, dim, active) if isinstance(layer.mlp, Moe) else 0,
        norms=NORMS[layer.residual] * norm(n, dim) + qk_norms(layer.attn, n),
        gates=2 * layer.gated,
    )


def by_part(spec: Spec, active: bool = False) -> dict[str, int]:
    """Parameters of each of PARTS. `active`: those that one token uses, embedding and LM head included.

    A tied LM head counts once, under embedding.
    """
    rows = spec.positions.length + spec.positions.offset if spec.positions and spec.positions.kind == "learned" else 0
    parts = Counter(
        embedding=(spec.vocab + spec.embed_extra) * spec.dim,
        positions=rows * spec.dim,
        norms=spec.final_norm * norm(spec.norm, spec.dim),
        head=(0 if spec.tied else spec.vocab * spec.dim) + spec.head_bias * spec.vocab,
    )
    for each in spec.layers:
        parts.update(layer(each, spec.dim, spec.norm, active))
    return {part: parts[part] for part in PARTS}


def total(spec: Spec, active: bool = False) -> int:
    return sum(by_part(spec, active).values())
