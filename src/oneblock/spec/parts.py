"""The architecture of a decoder, as data: what GPT-1 and Llama 4 do differently is written here and nowhere else.

A `Spec` is a tree of frozen dataclasses. A field is a size, a number, a name looked up in a table, or a smaller
part; `None` means the part is not there. Specs are hashable, so what depends on a part (rotary angles, masks) is
built once per distinct part.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal


@dataclass(frozen=True)
class Norm:
    """Layer normalisation (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5
    bias: bool = False
    offset: float = 0.0  # the gain is stored as (gain - offset); Gemma: 1
    gain: Literal["after", "before"] = "after"  # multiply after or before the cast back from fp32


@dataclass(frozen=True)
class Positions:
    """Absolute position embeddings, added to the token embeddings."""

    length: int
    kind: Literal["learned", "sinusoidal"] = "learned"
    offset: int = 0  # unused rows before position 0; OPT: 2


@dataclass(frozen=True)
class Linear:
    """Position interpolation (arXiv:2306.15595): every frequency divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Dynamic:
    """NTK-aware base that grows with the text once it is longer than `context`."""

    factor: float
    context: int  # the context length before scaling


@dataclass(frozen=True)
class Llama3:
    """Long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low: float
    high: float
    context: int  # the context length before scaling


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071): a ramp over dimensions between interpolation and none."""

    factor: float
    context: int  # the context length before scaling
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the ramp's ends to whole dimensions
    gain: float = 1.0  # multiplies cos and sin


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv:2402.13753): one divisor per frequency, another set once the text is longer than `context`."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    context: int  # the context length before scaling
    gain: float = 1.0  # multiplies cos and sin


Scaling = Linear | Dynamic | Llama3 | Yarn | LongRope


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv:2104.09864)."""

    theta: float = 10_000.0
    dim: int | None = None  # rotate this many dimensions of each head; None: all of them
    interleaved: bool = False  # rotate neighbours (0, 1), (2, 3) .. instead of halves (i, i + dim / 2)
    scaling: Scaling | None = None


@dataclass(frozen=True)
class Attention:
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Rope | None = None  # None: no rotation (GPT, or a NoPE layer)
    window: int | None = None  # see this many tokens, oneself included
    chunk: int | None = None  # see only tokens of the same chunk
    bias: tuple[bool, bool] = (False, False)  # on q, k, v; on the output
    # "head" and "full" (all heads as one vector): before the rotation; "l2": after it, without a gain
    qk_norm: Literal["head", "full", "l2"] | None = None
    scale: float | None = None  # None: head_dim ** -0.5
    softcap: float | None = None
    temperature_tuning: tuple[float, float] | None = (
        None  # (floor, slope): longer contexts get sharper queries (Llama 4)
    )
    sinks: bool = False  # one learned logit per head that takes attention and gives nothing (gpt-oss)
    cross: bool = False  # keys and values come from the image, all of them visible


@dataclass(frozen=True)
class Mlp:
    hidden_dim: int
    act: str = "silu"  # a key of model.mlp.ACT
    gated: bool = True
    bias: bool = False
    limit: float | None = None  # clamp the gate from above and the up product on both sides (gpt-oss)
    up_offset: float = 0.0  # added to the up product before the gate multiplies it (gpt-oss: 1)


@dataclass(frozen=True)
class Moe:
    n_experts: int
    top_k: int
    expert: Mlp
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True  # make the top-k weights sum to one
    weigh_input: bool = False  # weigh what goes into an expert instead of what comes out (Llama 4)
    router_bias: bool = False
    shared: Mlp | None = None
    shared_gate: bool = False


@dataclass(frozen=True)
class Layer:
    attn: Attention
    mlp: Mlp | Moe
    residual: Literal["pre", "post", "sandwich", "output", "parallel", "parallel_two"] = "pre"
    gated: bool = False  # a learned tanh gate, shut at first, on each sublayer (Llama 3.2 vision)


@dataclass(frozen=True)
class Spec:
    vocab: int
    dim: int
    n_layers: int
    pattern: tuple[Layer, ...]  # repeated over the depth
    context: int  # the longest text the model was made for, in tokens
    norm: Norm = Norm()
    positions: Positions | None = None
    embed_scale: float = 1.0
    embed_extra: int = 0  # input rows past the vocabulary that are never predicted (Llama 3.2 vision: 8)
    final_norm: bool = True
    tied: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(islice(cycle(self.pattern), self.n_layers))
