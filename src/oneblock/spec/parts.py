"""The architecture of a decoder-only language model as data: everything in which GPT-1 and Llama 4 differ.

A `Spec` is a tree of frozen dataclasses. A field is a size, a number, a name looked up in a table, or a smaller
part; `None` means the part is absent. Specs are hashable, so what a part determines (RoPE tables, masks) is built
once per distinct part.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal


@dataclass(frozen=True)
class Norm:
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5
    bias: bool = False
    weight_offset: float = 0.0  # added to the stored weight; Gemma: 1
    scale_in_fp32: bool = False  # multiply by the weight before, not after, the cast back from fp32


@dataclass(frozen=True)
class Positions:
    """Absolute position embeddings, added to the token embeddings."""

    length: int  # positions in the table
    kind: Literal["learned", "sinusoidal"] = "learned"
    offset: int = 0  # unused rows before position 0; OPT: 2


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv:2306.15595): every frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class DynamicNTK:
    """NTK-aware RoPE base that grows with the sequence once it is longer than `original_context`."""

    factor: float
    original_context: int  # context length before scaling


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones are kept, with a ramp between them."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int  # context length before scaling


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071): a ramp over the dimensions from no interpolation to full interpolation."""

    factor: float
    original_context: int  # context length before scaling
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the ends of the ramp to whole dimensions
    attention_factor: float = 1.0  # multiplies cos and sin


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv:2402.13753): one divisor per frequency, and other ones past `original_context` tokens."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_context: int  # context length before scaling
    attention_factor: float = 1.0  # multiplies cos and sin


RopeScaling = LinearScaling | DynamicNTK | Llama3Scaling | Yarn | LongRope


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, RoPE (arXiv:2104.09864)."""

    theta: float = 10_000.0  # base
    dim: int | None = None  # rotated dimensions of each head; None: all of them
    interleaved: bool = False  # rotate the pairs (0, 1), (2, 3) .. instead of the halves (i, i + dim / 2)
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class Attention:
    """Multi-head attention; grouped-query (GQA) where `n_kv_heads` is smaller than `n_heads`."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Rope | None = None  # None: no RoPE (GPT, or a NoPE layer)
    window: int | None = None  # sliding window, in tokens, the query's own included
    chunk: int | None = None  # chunked attention: a query sees only tokens of its own chunk
    bias: tuple[bool, bool] = (False, False)  # on q, k, v; on the output
    # "head": each head before RoPE; "full": all heads as one vector, before RoPE; "l2": after RoPE, without a weight
    qk_norm: Literal["head", "full", "l2"] | None = None
    scale: float | None = None  # multiplies q @ k; None: head_dim ** -0.5
    softcap: float | None = None  # soft cap of the attention scores
    temperature_tuning: tuple[float, float] | None = None  # (floor, slope): q grows with its position (Llama 4)
    sinks: bool = False  # attention sink: one learned logit per head in the softmax, without a value (gpt-oss)
    cross: bool = False  # cross-attention: keys and values come from the image, without a causal mask


@dataclass(frozen=True)
class Mlp:
    """MLP; gated (SwiGLU, GeGLU): act(gate(x)) * up(x), then down."""

    hidden_dim: int
    act: str = "silu"  # a key of model.mlp.ACT
    gated: bool = True
    bias: bool = False
    clamp: float | None = None  # clamp the gate from above and `up` from both sides (gpt-oss: 7)
    up_offset: float = 0.0  # added to `up` before the gate multiplies it (gpt-oss: 1)


@dataclass(frozen=True)
class Moe:
    """Mixture of experts: a router picks `top_k` of `n_experts` MLPs for each token."""

    n_experts: int
    top_k: int
    expert: Mlp
    score_func: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True  # make the top-k router weights sum to one
    scale_expert_input: bool = False  # the router weight multiplies an expert's input, not its output (Llama 4)
    router_bias: bool = False
    shared: Mlp | None = None  # shared expert, which every token passes through
    shared_gate: bool = False  # a sigmoid gate on the shared expert


@dataclass(frozen=True)
class Layer:
    """One decoder block: attention and an MLP, or a mixture of experts, on the residual stream."""

    attn: Attention
    mlp: Mlp | Moe
    residual: Literal["pre", "post", "sandwich", "output", "parallel", "parallel_two"] = "pre"  # where the norms are
    gated: bool = False  # a learned tanh gate, zero at first, on each sublayer (Llama 3.2 Vision)


@dataclass(frozen=True)
class Spec:
    """A decoder-only model."""

    vocab: int  # tokens in the vocabulary
    dim: int  # width of the residual stream
    n_layers: int
    pattern: tuple[Layer, ...]  # repeated over the depth
    context: int  # longest context length, in tokens
    norm: Norm = Norm()
    positions: Positions | None = None
    embed_scale: float = 1.0  # multiplies the token embeddings
    embed_extra: int = 0  # input embeddings past the vocabulary, never predicted (Llama 3.2 Vision: 8)
    final_norm: bool = True
    tied: bool = False  # weight tying: the LM head is the embedding matrix
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layer of each depth."""
        return tuple(islice(cycle(self.pattern), self.n_layers))
