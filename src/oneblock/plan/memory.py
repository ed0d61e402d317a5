"""Bytes to serve and to train a model.

What training keeps for the backward pass is read off the Spec, tensor by tensor, for attention that never writes its
scores out (FlashAttention, arXiv:2205.14135) and element-wise operations that are not fused.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from oneblock.errors import OneblockError
from oneblock.plan import params
from oneblock.plan.cache import kv_bytes
from oneblock.spec import Attention, Layer, Mlp, Moe, Spec

# Bytes per weight. int8: a 16-bit scale for 32 weights; int4 likewise (the layout of llama.cpp's q8_0 and q4_0).
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "int8": 1.0625, "int4": 0.5625}

PREFILL = 2048  # tokens that a server pushes through the model at a time


def weight_bytes(dtype: str) -> float:
    if dtype not in BYTES:
        raise OneblockError(f"unknown dtype {dtype!r}: choose from {', '.join(BYTES)}")
    return BYTES[dtype]


def compute_bytes(dtype: str) -> int:
    """Of a cached or computed number: quantised weights are computed with in bfloat16."""
    return 4 if weight_bytes(dtype) == 4 else 2


@dataclass(frozen=True)
class Serving:
    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Training:
    weights: int
    gradients: int
    optimizer: int  # AdamW's two moments in fp32, and the fp32 weights where the model's are 16-bit
    activations: int
    logits: int

    @property
    def states(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


def serving(spec: Spec, context: int, batch: int = 1, dtype: str = "bfloat16", image: int = 0) -> Serving:
    """`batch` texts of `context` tokens, all in memory at once."""
    size = compute_bytes(dtype)
    return Serving(
        weights=round(params.total(spec) * weight_bytes(dtype)),
        cache=batch * kv_bytes(spec, context, size, image),
        workspace=workspace(spec, min(batch * context, PREFILL), batch, size),
    )


def workspace(spec: Spec, tokens: int, batch: int, size: int) -> int:
    """The widest moment of a forward pass over `tokens` tokens, and the fp32 logits of `batch` last ones."""
    widest = max(max(_attention_width(x.attn), _mlp_width(x.mlp)) for x in spec.layers)
    return tokens * (2 * spec.dim + widest) * size + batch * spec.vocab * (size + 4)


def _attention_width(a: Attention) -> int:
    """q, k, v before and after rotation, and the answer."""
    return (3 * a.n_heads + 4 * a.n_kv_heads) * a.head_dim


def _mlp_width(m: Mlp | Moe) -> int:
    """Gate, up and their product, for every expert a token is copied to."""
    if isinstance(m, Mlp):
        return (2 + m.gated) * m.hidden
    shared = _mlp_width(m.shared) if m.shared else 0
    return max(m.top_k * _mlp_width(m.expert), shared)


def training(
    spec: Spec, context: int, batch: int = 1, dtype: str = "bfloat16", checkpointing: bool = False
) -> Training:
    """One device holds it all and sees `batch` texts of `context` tokens a step. States: 16 bytes a parameter.

    16-bit: weights 2, gradients 2, AdamW 8, fp32 weights 4 (arXiv:1910.02054, section 3.1); fp32: 4 + 4 + 8.
    """
    size, count, tokens = compute_bytes(dtype), params.total(spec), batch * context
    return Training(
        weights=count * size,
        gradients=count * size,
        optimizer=count * (8 if size == 4 else 12),
        activations=tokens * activations(spec, size, checkpointing),
        # logits, their log-probabilities in fp32 and the gradient of these
        logits=tokens * spec.vocab * (size + 8),
    )


def activations(spec: Spec, size: int = 2, checkpointing: bool = False) -> int:
    """Bytes per token kept for the backward pass, logits left out.

    With checkpointing: each layer's input, and all of the one layer that is being computed again.
    """
    layers = [layer_activations(x, spec.dim, size) for x in spec.layers]
    ends = 2 * spec.dim * size * spec.final_norm  # the final norm's input and output
    return ends + (len(layers) * spec.dim * size + max(layers) if checkpointing else sum(layers))


# Vectors of the residual stream's width that a layer keeps: what each norm reads, what each linear reads.
STREAM = {"pre": 4, "post": 4, "output": 4, "sandwich": 6, "parallel": 2, "parallel_two": 3}


def layer_activations(layer: Layer, dim: int, size: int = 2) -> int:
    """Bytes per token that one layer keeps for its backward pass."""
    numbers = STREAM[layer.residual] * dim + 2 * layer.gated * dim
    numbers += attention_activations(layer.attn) + mlp_activations(layer.mlp, dim)
    return numbers * size + 4 * layer.attn.n_heads  # softmax statistics, fp32


def attention_activations(a: Attention) -> int:
    """q, k, v as attention reads them, its answer, and what q and k were before their norm."""
    q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    kept = 2 * q if a.cross else 2 * q + 2 * kv
    return kept + (q + (0 if a.cross else kv) if a.qk_norm else 0)


def mlp_activations(m: Mlp | Moe, dim: int) -> int:
    """Gated: gate, act(gate), up and their product; plain: before and after the activation. ReLU needs only after."""
    if isinstance(m, Mlp):
        return ((4 if m.gated else 2) - (m.act == "relu")) * m.hidden
    routed = m.top_k * (mlp_activations(m.expert, dim) + 2 * dim)  # a copy of the token goes in, an answer comes out
    shared = mlp_activations(m.shared, dim) if m.shared else 0
    return routed + shared + m.n_experts + m.shared_gate * dim
