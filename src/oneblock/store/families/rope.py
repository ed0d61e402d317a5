"""RoPE settings of a config.json: the present `rope_parameters`, the older `rope_theta` and `rope_scaling`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from oneblock.errors import OneblockError
from oneblock.spec import DynamicNTK, LinearScaling, Llama3Scaling, LongRope, Rope, RopeScaling, Spec, Yarn
from oneblock.spec.build import check_limit, longrope_attention_factor, yarn_attention_factor
from oneblock.store.families.fields import Keywords, Raw, Values, read_number, rope_attention

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeKeys:
    """The RoPE settings of a class."""

    theta: float = 10_000.0  # the class's default base
    partial: float | None = None  # its default share of each head that is rotated; None: always whole heads
    interleaved: bool = False
    theta_key: str = "rope_theta"
    partial_key: str = "partial_rotary_factor"
    types: tuple[str, ...] = TYPES
    renamed: Mapping[str, str] = field(default_factory=dict)  # other names of types in this class
    default: Raw = field(default_factory=dict)  # the class's settings where a config has none

    def read(self, values: Values, keywords: Keywords) -> Keywords:
        raw = values.raw.get("rope_scaling") or values.raw.get("rope_parameters")
        raw = self.default if raw is None else raw or {}
        if not isinstance(raw, dict):
            raise OneblockError(f"rope_parameters is {raw!r:.60}, not an object; fix it")
        theta = values.raw.get(self.theta_key, self.theta)
        partial = values.raw.get(self.partial_key, self.partial)
        return {"rope": self.read_one(values, {"rope_theta": theta, "partial_rotary_factor": partial, **raw}, keywords)}

    def read_one(self, values: Values, raw: Raw, keywords: Keywords) -> Rope:
        """One set of parameters, with base and partial rotary factor filled in."""
        kind = raw.get("rope_type", raw.get("type", "default"))
        kind = self.renamed.get(kind, kind) if isinstance(kind, str) else kind
        if kind not in self.types:
            raise OneblockError(f"RoPE type {kind!r:.40} is not supported; supported are {', '.join(self.types)}")
        head_dim = keywords.get("head_dim") or keywords["dim"] // keywords["n_heads"]
        part = raw.get("partial_rotary_factor")
        part = 1.0 if part is None else _number(raw, "partial_rotary_factor")
        if part != 1.0 and self.partial is None:
            raise OneblockError(f"partial_rotary_factor {part} is not supported: this class rotates whole heads")
        dim = int(head_dim * part)
        if dim % 2 or not 0 < dim <= head_dim:
            raise OneblockError(f"RoPE over {dim} of {head_dim} dimensions is not supported: use an even number")
        scaling = _read_scaling(kind, values, raw, keywords["context"], dim)
        return Rope(_number(raw, "rope_theta"), None if dim == head_dim else dim, self.interleaved, scaling)

    def write(self, spec: Spec) -> Raw:
        attn = rope_attention(spec)
        rope = write_rope(attn.rope, attn.head_dim)
        is_partial = self.partial not in (None, 1.0)
        return {"rope_parameters": {"partial_rotary_factor": 1.0, **rope} if is_partial else rope}


@dataclass(frozen=True)
class LayerTypeRopes:
    """The RoPE of the full and of the sliding-window layers; the older `rope_scaling` is for the full ones alone."""

    def read(self, values: Values, keywords: Keywords) -> Keywords:
        nested = values.raw.get("rope_parameters") or {}
        if not isinstance(nested, dict) or nested.keys() - {"full_attention", "sliding_attention"}:
            raise OneblockError("rope_parameters must hold full_attention and sliding_attention; fix it")
        full = {"rope_theta": values.get("rope_theta"), **(nested.get("full_attention") or {})}
        local = {"rope_theta": values.get("rope_local_base_freq"), **(nested.get("sliding_attention") or {})}
        full |= values.raw.get("rope_scaling") or {}
        for raw in (full, local):
            raw.pop("truncate", None)  # transformers looks for it outside the nested sets, where it is not
        keys = RopeKeys()
        return {"rope": keys.read_one(values, full, keywords), "rope_local": keys.read_one(values, local, keywords)}

    def write(self, spec: Spec) -> Raw:
        full = next((x.attn for x in spec.pattern if not x.attn.window), None)
        local = next((x.attn for x in spec.pattern if x.attn.window), None)
        kinds = {"full_attention": full, "sliding_attention": local}
        return {"rope_parameters": {kind: write_rope(x.rope, x.head_dim) if x else {} for kind, x in kinds.items()}}


def _read_scaling(kind: str, values: Values, raw: Raw, longest: int, dim: int) -> RopeScaling | None:
    key = "original_max_position_embeddings"
    context = values.raw.get(key, values.table.defaults.get(key)) or raw.get(key) or longest
    check_limit("context", context, key)
    match kind:
        case "linear":
            return LinearScaling(_number(raw, "factor"))
        case "dynamic":
            return DynamicNTK(_number(raw, "factor"), longest)
        case "llama3":
            low, high = _number(raw, "low_freq_factor"), _number(raw, "high_freq_factor")
            return Llama3Scaling(_number(raw, "factor"), low, high, context)
        case "yarn":
            return _read_yarn(raw, longest, context)
        case "longrope":
            return _read_longrope(raw, longest, context, dim)
    return None


def _read_yarn(raw: Raw, longest: int, context: int) -> Yarn:
    factor = longest / context if raw.get("factor") is None else _number(raw, "factor")
    if raw.get("attention_factor") is not None:
        attention_factor = _number(raw, "attention_factor")
    elif raw.get("mscale") and raw.get("mscale_all_dim"):
        attention_factor = yarn_attention_factor(factor, _number(raw, "mscale"))
        attention_factor /= yarn_attention_factor(factor, _number(raw, "mscale_all_dim"))
    else:
        attention_factor = yarn_attention_factor(factor)
    beta_fast = _number(raw, "beta_fast") if raw.get("beta_fast") else 32.0
    beta_slow = _number(raw, "beta_slow") if raw.get("beta_slow") else 1.0
    return Yarn(factor, context, beta_fast, beta_slow, bool(raw.get("truncate", True)), attention_factor)


def _read_longrope(raw: Raw, longest: int, context: int, dim: int) -> LongRope:
    def factors(key: str) -> tuple[float, ...]:
        value = raw.get(key)
        if not isinstance(value, list) or len(value) != dim // 2:
            raise OneblockError(f"{key} of longrope must be a list of {dim // 2} numbers; fix it")
        return tuple(read_number(f"{key} of longrope", x) for x in value)

    factor = longest / context if raw.get("factor") is None else _number(raw, "factor")
    has_factor = raw.get("attention_factor") is not None
    attention_factor = _number(raw, "attention_factor") if has_factor else longrope_attention_factor(factor, context)
    return LongRope(factors("short_factor"), factors("long_factor"), context, attention_factor)


def _number(raw: Raw, key: str) -> float:
    return read_number(f"{key} of RoPE", raw.get(key))


def write_rope(rope: Rope | None, head_dim: int) -> Raw:
    """`rope_parameters` that read back as this Rope; empty without RoPE."""
    if rope is None:
        return {}
    raw: Raw = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.dim is not None:
        part = rope.dim / head_dim
        raw["partial_rotary_factor"] = part if int(head_dim * part) == rope.dim else (rope.dim + 0.5) / head_dim
    match rope.scaling:
        case LinearScaling(factor):
            raw |= {"rope_type": "linear", "factor": factor}
        case DynamicNTK(factor, _):  # its original context is max_position_embeddings
            raw |= {"rope_type": "dynamic", "factor": factor}
        case Llama3Scaling(factor, low, high, context):
            raw |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            raw |= {"original_max_position_embeddings": context}
        case Yarn() as yarn:
            raw |= {"rope_type": "yarn", "factor": yarn.factor, "beta_fast": yarn.beta_fast}
            raw |= {"beta_slow": yarn.beta_slow, "truncate": yarn.truncate, "attention_factor": yarn.attention_factor}
            raw |= {"original_max_position_embeddings": yarn.original_context}
        case LongRope(short, long, context, attention_factor):
            raw |= {"rope_type": "longrope", "short_factor": list(short), "long_factor": list(long)}
            raw |= {"attention_factor": attention_factor, "original_max_position_embeddings": context}
        case None:
            pass
    return raw
